#!/usr/bin/env bash
# Load tests of a running service, and the targets that examples/optimized has
# to reach. See usage below, or --help.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
many=10000 # connections of the target for memory

usage() {
	cat <<EOF
Usage: scripts/load_test.sh SUBCOMMAND

  vegeta      a constant rate
  ab          as many requests as possible, with ApacheBench
  wrk         as many requests as possible, with wrk
  endpoints   each endpoint of examples/optimized in turn
  concurrent  1, 10, 100 and 1,000 connections
  keepalive   connections that are kept, and a new one for each request
  profile     a CPU profile under load; prints its top
  targets     measures and judges: throughput of 30,000 req/s; at RATE,
              p50 < 5 ms, p95 < 10 ms, p99 < 50 ms and less than 80 % CPU;
              less than 500 MB with $many connections. vegeta sends RATE;
              where it cannot, wrk sends it, and the output says so
  all         all of them

From the environment:

  SERVER_URL  what to load (http://127.0.0.1:8080); targets and all start
              examples/optimized there if nothing responds on this machine
  DURATION    seconds of each measurement, as 5 or 5s (10)
  RATE        requests per second of vegeta (1000) and of targets (30000)
  WORKERS     connections (64)

Exit status: 0; 1 if a target was missed; 2 if it could not be measured.
EOF
}

die() {
	printf 'load_test: %s\n' "$*" >&2
	exit 2
}

main() {
	[ $# -gt 0 ] || {
		usage >&2
		exit 2
	}
	case $1 in
	-h | --help | help)
		usage
		exit 0
		;;
	vegeta | ab | wrk | endpoints | concurrent | keepalive | profile | targets | all) ;;
	*) die "unknown subcommand '$1' (see --help)" ;;
	esac
	[ $# -eq 1 ] || die "unexpected argument '$2' (see --help)"
	read_environment "$1"
	# 1 is for a missed target; any other failure is 2.
	set -E
	trap 'exit 2' ERR
	tmp=$(mktemp -d)
	trap clean_up EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	# Progress goes here, also where errors go to a file.
	exec 3>&2
	"run_$1"
}

# read_environment sets url, origin, host, port, duration, rate and workers.
read_environment() {
	url=${SERVER_URL:-http://127.0.0.1:8080}
	duration=${DURATION:-10}
	duration=${duration%s}
	workers=${WORKERS:-64}
	if [ "$1" = vegeta ]; then rate=${RATE:-1000}; else rate=${RATE:-30000}; fi
	is_number DURATION "$duration"
	is_number RATE "$rate"
	is_number WORKERS "$workers"
	[[ $url =~ ^(https?)://(\[[0-9a-fA-F:]+\]|[^]/:@[:space:]]+)(:([0-9]+))?(/[^[:space:]]*)?$ ]] ||
		die "SERVER_URL is '$url', not a URL such as http://127.0.0.1:8080"
	scheme=${BASH_REMATCH[1]}
	host=${BASH_REMATCH[2]}
	port=${BASH_REMATCH[4]}
	path=${BASH_REMATCH[5]:-/}
	[ -n "$port" ] || if [ "$scheme" = https ]; then port=443; else port=80; fi
	if [ ${#port} -gt 5 ] || [ "$port" -gt 65535 ]; then die "SERVER_URL is '$url', and there is no port $port"; fi
	origin=$scheme://$host:$port
	url=$origin$path
}

is_number() {
	# No more digits than every tool can count.
	[[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "$1 is '$2', not a whole number from 1 on"
}

# Each command that this script starts has a process group of its own, which
# ends with the script, however it ends.
groups=()
server=

clean_up() {
	local pid
	for pid in ${groups[@]+"${groups[@]}"}; do
		kill -TERM -- "-$pid" 2>/dev/null || true
	done
	[ -z "$server" ] || wait "$server" 2>/dev/null || true
	rm -rf "$tmp"
}

# start runs a command in the background, in a group of its own, and sets
# started to its number.
start() {
	set -m
	"$@" </dev/null &
	started=$!
	set +m
	groups+=("$started")
}

# attend runs a command that takes about so many seconds. It shows the progress:
# all the time on a terminal, every ten seconds elsewhere. The command's status
# is its own.
attend() {
	local what=$1 seconds=$2 begin=$SECONDS shown=0 now
	shift 2
	start "$@"
	while kill -0 "$started" 2>/dev/null; do
		sleep 0.5
		now=$((SECONDS - begin))
		if [ -t 3 ]; then
			printf '\r\033[K%s: %d of %d s' "$what" "$now" "$seconds" >&3
		elif [ "$now" -ge $((shown + 10)) ]; then
			shown=$now
			printf '%s: %d of %d s\n' "$what" "$now" "$seconds" >&3
		fi
	done
	[ ! -t 3 ] || printf '\r\033[K' >&3
	wait "$started"
}

need() {
	command -v "$1" >/dev/null && return
	case $1 in
	go) die 'go is missing: see https://go.dev/doc/install' ;;
	ab) die 'ab is missing: on Debian, apt-get install apache2-utils' ;;
	*) die "$1 is missing: on Debian, apt-get install $1; on macOS, brew install $1" ;;
	esac
}

need_vegeta() {
	need go
	GOBIN=$tmp go install github.com/tsenart/vegeta/v12@v12.13.0 >"$tmp/build" 2>&1 ||
		die "vegeta does not build: $(tail -n 1 "$tmp/build")"
}

# responds reports whether an HTTP server responds at the URL, with any status.
# It leaves the reason in refused if none does.
responds() {
	need curl
	refused=$(curl -sS -k -o /dev/null --max-time 5 "$1" 2>&1) && return
	refused=${refused#curl: }
	return 1
}

# need_server makes sure of a server at url, and of the tools given.
need_server() {
	local tool
	responds "$url" || die "$url does not respond ($refused); go run ./examples/optimized serves http://127.0.0.1:8080"
	for tool; do need "$tool"; done
	warn_if_busy
}

# need_files makes sure that so many connections can be open.
need_files() {
	local need=$(($1 + 100)) hard
	hard=$(ulimit -Hn)
	if [ "$hard" != unlimited ] && [ "$hard" -lt "$need" ]; then
		die "$1 connections need $need file descriptors and the limit is $hard: raise it with ulimit -n $need, as root"
	fi
	if [ "$(ulimit -n)" != unlimited ] && [ "$(ulimit -n)" -lt "$need" ]; then
		ulimit -Sn "$need"
	fi
}

# warn_if_busy says so where other programs use this machine's processors.
warn_if_busy() {
	[ -r /proc/stat ] || return 0
	local before
	before=$(head -n 1 /proc/stat)
	sleep 1
	head -n 1 /proc/stat | awk -v before="$before" '{
		split(before, b)
		for (i = 2; i <= 9; i++) all += $i - b[i]
		if (all > 0) idle = 100 * ($5 + $6 - b[5] - b[6]) / all
		if (all > 0 && idle < 80) printf "This machine was only %d %% idle before the run: other programs make the figures worse.\n", idle
	}'
}

# server_or_example makes sure that a server responds at url. It starts
# examples/optimized, which ends with this script, if none does.
server_or_example() {
	responds "$url" && return
	case $scheme:$host in
	http:127.* | http:localhost | http:\[::1\]) ;;
	*) die "$url does not respond ($refused), and examples/optimized can only be started on this machine, with http" ;;
	esac
	need go
	(cd "$root" && go build -buildvcs=false -o "$tmp/optimized" ./examples/optimized) >"$tmp/build" 2>&1 ||
		die "examples/optimized does not build: $(tail -n 1 "$tmp/build")"
	# A file of its log would grow by some megabytes a second.
	start "$tmp/optimized" -addr "$host:$port" >/dev/null 2>&1
	server=$started
	for _ in {1..50}; do
		if responds "$url"; then
			echo "examples/optimized serves $origin"
			return
		fi
		kill -0 "$server" 2>/dev/null || break
		sleep 0.1
	done
	die "$url does not respond, and examples/optimized does not start there: $(timeout 2 "$tmp/optimized" -addr "$host:$port" 2>&1 | head -n 1)"
}

processors() { getconf _NPROCESSORS_ONLN; }

# threads is how many wrk has: half of the processors, the others are the
# server's.
threads() {
	local n=$(($(processors) / 2))
	[ "$n" -ge 1 ] || n=1
	[ "$n" -le "$1" ] || n=$1
	echo "$n"
}

# load_with_wrk loads with so many connections, for duration, and prints the
# output of wrk.
load_with_wrk() {
	local connections=$1 what=$2
	shift 2
	attend "$what" "$duration" wrk -t "$(threads "$connections")" -c "$connections" -d "${duration}s" --timeout 10s --latency "$@"
}

# measure loads with wrk too, and sets sent, p50, p95, p99 (in milliseconds) and
# errors. A rate and the number of threads may follow the URL, after --: wrk has
# no rate limit, but waits before each request for as long as delay returns.
measure() {
	cat >"$tmp/wrk.lua" <<'EOF'
local ffi = require("ffi")
ffi.cdef("typedef struct { long s; int us; } timeval; int gettimeofday(timeval *, void *);")

local function now()
	local t = ffi.new("timeval")
	ffi.C.gettimeofday(t, nil)
	return tonumber(t.s) * 1000 + t.us / 1000
end

function init(args)
	if not args[1] then return end
	local interval, due = 1000 * args[2] / args[1], now()
	function delay()
		due = due + interval
		return math.max(0, due - now())
	end
end

function done(summary, latency)
	local e = summary.errors
	io.write(string.format("figures %d %.2f %.2f %.2f %d\n", summary.requests / summary.duration * 1e6,
		latency:percentile(50) / 1000, latency:percentile(95) / 1000, latency:percentile(99) / 1000,
		e.connect + e.read + e.write + e.timeout + e.status))
end
EOF
	load_with_wrk "$1" "$2" -s "$tmp/wrk.lua" "${@:3}" >"$tmp/wrk" || return
	read -r sent p50 p95 p99 errors <<<"$(sed -n 's/^figures //p' "$tmp/wrk")"
}

# row prints what measure has set, below table_header.
row() { printf '%-34s %10s %9s %9s %8s\n' "$1" "$sent" "$p50" "$p99" "$errors"; }
table_header() { printf '%-34s %10s %9s %9s %8s\n' "$1" req/s 'p50 ms' 'p99 ms' errors; }

run_vegeta() {
	need_server go
	need_vegeta
	attack
	"$tmp/vegeta" report "$tmp/results"
}

# attack has vegeta send rate for duration.
attack() {
	echo "GET $url" >"$tmp/target"
	attend "vegeta, $rate req/s" "$duration" "$tmp/vegeta" attack -insecure -targets "$tmp/target" -rate "$rate/1s" -duration "${duration}s" \
		-workers "$workers" -max-workers 2000 -output "$tmp/results"
}

run_ab() {
	need_server ab
	# -n after -t: ab would stop at 50,000.
	attend ab "$duration" ab -q -k -c "$workers" -t "$duration" -n 100000000 "$url"
}

run_wrk() {
	need_server wrk
	load_with_wrk "$workers" wrk "$url"
}

run_endpoints() {
	need_server wrk
	local endpoint status
	table_header endpoint
	for endpoint in / /health /api/posts /api/posts/1 /api/posts/stream /static/style.css '/static/queue.js gzip'; do
		local header=() path=${endpoint% gzip}
		[ "$path" = "$endpoint" ] || header=(-H 'Accept-Encoding: gzip')
		status=$(curl -sS -k -o /dev/null --max-time 5 -w '%{http_code}' "$origin$path") || die "$origin$path does not respond"
		if [ "$status" != 200 ]; then
			printf '%-34s not there (%s)\n' "$endpoint" "$status"
			continue
		fi
		measure "$workers" "$endpoint" ${header[@]+"${header[@]}"} "$origin$path"
		row "$endpoint"
	done
}

run_concurrent() {
	need_files 1000
	need_server wrk
	local connections
	table_header connections
	for connections in 1 10 100 1000; do
		measure "$connections" "$connections connections" "$url"
		row "$connections"
	done
}

run_keepalive() {
	need_server wrk
	local kept
	table_header connections
	measure "$workers" kept "$url"
	row kept
	kept=$sent
	measure "$workers" 'a new one each' -H 'Connection: close' "$url"
	row 'a new one for each request'
	awk -v kept="$kept" -v new="$sent" 'BEGIN { if (new > 0) printf "kept connections carry %.1f times as many requests\n", kept / new }'
}

run_profile() {
	need_server go wrk
	local status file=$root/dist/load_test/cpu.pprof
	status=$(curl -sS -k -o /dev/null --max-time 5 -w '%{http_code}' "$origin/debug/pprof/") || die "$origin/debug/pprof/ does not respond"
	[ "$status" = 200 ] || die "$origin/debug/pprof/ responds with $status: the server has no profiling, or not for this machine"
	mkdir -p "${file%/*}"
	# A little longer than the profile, so that all of it is under load.
	start wrk -t "$(threads "$workers")" -c "$workers" -d "$((duration + 5))s" "$url"
	local load=$started
	sleep 0.5
	attend 'CPU profile' "$duration" curl -sS -k -f -o "$file" --max-time $((duration + 30)) "$origin/debug/pprof/profile?seconds=$duration" ||
		die "no profile from $origin/debug/pprof/profile?seconds=$duration"
	kill "$load" 2>/dev/null || die "wrk ended early: $url was not under load all the time"
	go tool pprof -top -nodecount=30 "$file"
	echo "profile: $file (go tool pprof -http : $file)"
}

# The verdict of the targets.
missed=0
not_judged=0

run_targets() {
	need_files "$many"
	need wrk
	server_or_example
	need_vegeta
	find_server
	warn_if_busy
	printf '%-46s %-32s %s\n' target measured ''
	judge_throughput
	judge_at_rate
	judge_memory
	[ "$missed" = 0 ] || exit 1
	[ "$not_judged" = 0 ] || exit 2
}

# judge prints a target, its figure and whether it is reached, as a condition of
# awk says. A fourth argument says why the target cannot be judged.
judge() {
	local verdict=ok
	if [ -n "${4-}" ]; then
		verdict="not judged: $4" not_judged=1
	else
		awk "BEGIN { exit !($3) }" || verdict=MISSED missed=1
	fi
	printf '%-46s %-32s %s\n' "$1" "$2" "$verdict"
}

# judge_throughput has wrk send as many requests as it can.
judge_throughput() {
	local what='throughput of at least 30000 req/s' reason=''
	if ! measure "$workers" throughput "$url" 2>"$tmp/error"; then
		judge "$what" - '' "$(tail -n 1 "$tmp/error")"
		return
	fi
	[ "$errors" = 0 ] || reason="$errors requests failed"
	judge "$what" "$sent req/s" "$sent >= 30000" "$reason"
}

# judge_at_rate judges latencies and CPU at the rate. vegeta keeps its schedule,
# but takes far more processor time than the server. Where it cannot send the
# rate, wrk does. wrk needs a free connection for each request, and corrects its
# latencies for the requests that a slow response delays.
judge_at_rate() {
	local by=vegeta reason='' least=$((rate * 95 / 100)) before cpu
	before=$(cpu_seconds)
	measure_with_vegeta
	cpu=$(percent_since "$before")
	if [ "$sent" -lt "$least" ]; then
		echo "vegeta sent only $sent of $rate req/s on this machine: wrk sends the rate instead"
		by=wrk
		before=$(cpu_seconds)
		measure "$workers" "wrk, $rate req/s" "$url" -- "$rate" "$(threads "$workers")"
		cpu=$(percent_since "$before")
	fi
	if [ "$errors" != 0 ]; then
		reason="$errors requests failed"
	elif [ "$sent" -lt "$least" ]; then
		reason='the rate was not reached'
	fi

	by="at $sent req/s ($by)"
	judge "p50 below 5 ms at $rate req/s" "$p50 ms $by" "$p50 < 5" "$reason"
	judge "p95 below 10 ms at $rate req/s" "$p95 ms $by" "$p95 < 10" "$reason"
	judge "p99 below 50 ms at $rate req/s" "$p99 ms $by" "$p99 < 50" "$reason"
	[ -n "$pid" ] || reason=$no_process cpu=-
	judge "CPU below 80 % of $(processors) processors at $rate req/s" "$cpu % $by" "$cpu < 80" "$reason"
}

# measure_with_vegeta sets what measure sets.
measure_with_vegeta() {
	attack
	"$tmp/vegeta" report -type json "$tmp/results" >"$tmp/report"
	read -r sent p50 p95 p99 errors <<<"$(
		sed -E 's/.*"50th":([^,]+).*"95th":([^,]+).*"99th":([^,]+).*"requests":([^,]+),"rate":([^,]+).*"success":([^,]+).*/\5 \1 \2 \3 \4 \6/' "$tmp/report" |
			awk '{ printf "%d %.2f %.2f %.2f %.0f", $1, $2 / 1e6, $3 / 1e6, $4 / 1e6, $5 * (1 - $6) }'
	)"
}

# cpu_seconds prints how long the server has run, in user and system mode.
cpu_seconds() {
	[ -n "$pid" ] || {
		echo 0
		return
	}
	# The name, which comes second, may have spaces in it.
	sed 's/^.*) //' "/proc/$pid/stat" 2>/dev/null | awk -v hz="$(getconf CLK_TCK)" '{ print ($12 + $13) / hz }' ||
		die "process $pid, the server, has ended"
}

# percent_since prints the server's share of all processors for duration, since
# cpu_seconds printed the argument.
percent_since() {
	local now
	now=$(cpu_seconds)
	awk -v a="$1" -v b="$now" -v s="$duration" -v n="$(processors)" 'BEGIN { printf "%.0f", 100 * (b - a) / s / n }'
}

# judge_memory has many connections send requests, and looks at the server
# meanwhile.
judge_memory() {
	local what="less than 500 MB with $many connections" limit
	if [ -z "$pid" ]; then
		judge "$what" - '' "$no_process"
		return
	fi
	limit=$(awk '/^Max open files/ { print $4 }' "/proc/$pid/limits")
	if [ "$limit" != unlimited ] && [ "$limit" -lt $((many + 100)) ]; then
		judge "$what" - '' "the server may open $limit files, and needs $((many + 100))"
		return
	fi
	start look_at_server
	if ! attend "$many connections" "$((duration + 5))" wrk -t "$(threads "$many")" -c "$many" -d "$((duration + 5))s" --timeout 30s "$url" >"$tmp/wrk" 2>&1; then
		judge "$what" - '' "$(tail -n 1 "$tmp/wrk")"
		return
	fi
	local megabytes connections reason=''
	read -r megabytes connections <"$tmp/memory" || die "process $pid, the server, has ended"
	[ "$connections" -ge "$many" ] || reason="only $connections connections were open"
	judge "$what" "$megabytes MB at most" "$megabytes < 500" "$reason"
}

# look_at_server keeps in a file the most memory that the server has had since
# its start, and how many sockets it has shortly before wrk ends.
look_at_server() {
	local most
	sleep $((duration + 3))
	most=$(awk '/^VmHWM/ { printf "%d", $2 * 1024 / 1e6 }' "/proc/$pid/status")
	echo "$most $(find "/proc/$pid/fd" -lname 'socket:*' | wc -l)" >"$tmp/memory"
}

# find_server sets pid to the number of the process of this machine that listens
# on port. It sets no_process to the reason if there is none to look at.
find_server() {
	pid=$server
	[ -z "$pid" ] || return 0
	no_process="no process of this machine listens on port $port"
	[ -r /proc/net/tcp ] || return 0
	case $host in
	127.* | localhost | \[::1\]) ;;
	*) return 0 ;;
	esac
	local inode inodes
	inodes=$(awk -v port="$(printf ':%04X' "$port")" '$4 == "0A" && substr($2, length($2) - 4) == port { print $10 }' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true)
	pid=$(for inode in $inodes; do
		find /proc/[0-9]*/fd -lname "socket:\[$inode\]" 2>/dev/null || true
	done | cut -d / -f 3 | sort -u)
	if [ "$(wc -w <<<"$pid")" -gt 1 ]; then
		pid=
		no_process="several processes listen on port $port"
	fi
}

run_all() {
	local name rc worst=0
	server_or_example
	for name in endpoints vegeta ab wrk concurrent keepalive profile targets; do
		printf '\n== %s\n' "$name"
		rc=0
		start "${BASH_SOURCE[0]}" "$name"
		wait "$started" || rc=$?
		# A missed target is worse than a missing tool.
		if [ "$rc" = 1 ] || [ "$worst" = 0 ]; then worst=$rc; fi
	done
	exit "$worst"
}

main "$@"
