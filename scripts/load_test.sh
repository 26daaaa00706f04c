#!/usr/bin/env bash
# Load tests of a running service, and the targets that examples/optimized has
# to reach. See usage below, or --help.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
vegeta_module=github.com/tsenart/vegeta/v12@v12.13.0
many=10000 # connections of the target for memory

usage() {
	cat <<EOF
Usage: scripts/load_test.sh SUBCOMMAND

  vegeta      a constant rate
  ab          as many requests as go, with ApacheBench
  wrk         as many requests as go, with wrk
  endpoints   each endpoint of examples/optimized in turn
  concurrent  1, 10, 100 and 1,000 connections
  keepalive   connections that are kept, and a new one for each request
  profile     a CPU profile under load; prints its top
  targets     measures and judges: throughput of 30,000 req/s, p50 < 5 ms,
              p95 < 10 ms, p99 < 50 ms, less than 500 MB with $many
              connections, less than 80 % CPU at the rate; latencies and
              CPU are those of wrk where vegeta cannot send as much
  all         all of them

From the environment:

  SERVER_URL  what to load (http://127.0.0.1:8080); targets and all start
              examples/optimized there if nothing responds on this machine
  DURATION    seconds of each measurement (10)
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
	# 1 is for a target that was missed; what fails otherwise is no measurement.
	set -E
	trap 'exit 2' ERR
	tmp=$(mktemp -d)
	trap clean_up EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
	# Progress is for whoever started this, also where errors are kept.
	exec 3>&2
	"run_$1"
}

# read_environment sets url, origin, host, port, duration, rate and workers.
read_environment() {
	url=${SERVER_URL:-http://127.0.0.1:8080}
	duration=${DURATION:-10}
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

# What this script has started is in groups of processes of its own, which end
# with it, however it ends.
groups=()
server=

clean_up() {
	local pid
	for pid in ${groups[@]+"${groups[@]}"}; do
		kill -TERM -- "-$pid" 2>/dev/null || true
	done
	if [ -n "$server" ]; then
		kill -TERM "$server" 2>/dev/null || true
		for _ in {1..100}; do
			kill -0 "$server" 2>/dev/null || break
			sleep 0.1
		done
		kill -KILL "$server" 2>/dev/null || true
	fi
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

# attend runs a command that takes about so many seconds, and says meanwhile how
# far it is. The command's status is its own.
attend() {
	local what=$1 seconds=$2 rc=0 command ticker
	shift 2
	start "$@"
	command=$started
	start tick "$what" "$seconds"
	ticker=$started
	wait "$command" || rc=$?
	stop "$ticker"
	[ ! -t 3 ] || printf '\r\033[K' >&3
	return "$rc"
}

# stop ends what start has started. TERM would not do: a function that has only
# just been started has this shell's traps still, and would clean up.
stop() {
	kill -KILL -- "-$1" 2>/dev/null || true
	wait "$1" 2>/dev/null || true
}

# tick says how far a measurement is: every second on a terminal, every ten
# elsewhere.
tick() {
	local second
	for ((second = 1; ; second++)); do
		sleep 1
		if [ -t 3 ]; then
			printf '\r\033[K%s: %d of %d s' "$1" "$second" "$2" >&3
		elif [ $((second % 10)) = 0 ]; then
			printf '%s: %d of %d s\n' "$1" "$second" "$2" >&3
		fi
	done
}

need() {
	command -v "$1" >/dev/null || die "$1 is missing: $2"
}
need_curl() { need curl 'on Debian, apt-get install curl'; }
need_wrk() { need wrk 'on Debian, apt-get install wrk; on macOS, brew install wrk'; }
need_ab() { need ab 'on Debian, apt-get install apache2-utils; on macOS it is there'; }
need_go() { need go 'see https://go.dev/doc/install'; }

# need_vegeta sets vegeta to the command, which Go builds if it is not there.
need_vegeta() {
	if command -v vegeta >/dev/null; then
		vegeta=(vegeta)
		return
	fi
	command -v go >/dev/null || die "vegeta is missing: install Go (https://go.dev/doc/install), which runs it with go run $vegeta_module"
	vegeta=(go run "$vegeta_module")
	"${vegeta[@]}" -version >"$tmp/vegeta" 2>&1 || die "vegeta cannot be run with go run $vegeta_module: $(tail -n 1 "$tmp/vegeta")"
}

# responds reports whether an HTTP server responds at the URL, with any status.
# It leaves the reason in refused if none does.
responds() {
	need_curl
	refused=$(curl -sS -k -o /dev/null --max-time 5 "$1" 2>&1) && return
	refused=${refused#curl: }
	return 1
}

need_server() {
	responds "$url" || die "$url does not respond ($refused); go run ./examples/optimized serves http://127.0.0.1:8080"
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

# server_or_example makes sure of a server at url: the one that responds, or
# examples/optimized, which ends with this script.
server_or_example() {
	responds "$url" && return
	case $scheme:$host in
	http:127.* | http:localhost | http:\[::1\]) ;;
	*) die "$url does not respond ($refused), and examples/optimized can only be started on this machine, with http" ;;
	esac
	need_go
	(cd "$root" && go build -buildvcs=false -o "$tmp/optimized" ./examples/optimized) >"$tmp/build" 2>&1 ||
		die "examples/optimized does not build: $(tail -n 1 "$tmp/build")"
	# Its log goes nowhere: a file of it would grow by some megabytes a second.
	set -m
	"$tmp/optimized" -addr "$host:$port" </dev/null >/dev/null 2>&1 &
	server=$!
	set +m
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

# threads is how many wrk has: half of the processors, the others are the
# server's.
threads() {
	local n=$(($(processors) / 2))
	[ "$n" -ge 1 ] || n=1
	[ "$n" -le "$1" ] || n=$1
	echo "$n"
}

processors() { getconf _NPROCESSORS_ONLN; }

# load_with_wrk loads with so many connections, for duration, and prints what
# wrk says.
load_with_wrk() {
	local connections=$1 what=$2
	shift 2
	attend "$what" "$duration" wrk -t "$(threads "$connections")" -c "$connections" -d "${duration}s" --timeout 10s --latency "$@"
}

# of_wrk prints one thing of what wrk has said: rate, p50, p99 in milliseconds,
# or errors.
of_wrk() {
	awk -v what="$1" '
		function ms(s) {
			if (s ~ /us$/) return s / 1000
			if (s ~ /ms$/) return s + 0
			if (s ~ /m$/) return s * 60000
			return s * 1000
		}
		/^Requests\/sec:/ { rate = sprintf("%.0f", $2) }
		$1 == "50%" { p50 = sprintf("%.2f", ms($2)) }
		$1 == "99%" { p99 = sprintf("%.2f", ms($2)) }
		/Socket errors:/ { gsub(/,/, ""); errors += $4 + $6 + $8 + $10 }
		/Non-2xx or 3xx responses:/ { errors += $NF }
		END { print what == "rate" ? rate : what == "p50" ? p50 : what == "p99" ? p99 : errors + 0 }
	' "$tmp/wrk"
}

# row prints a line of a table of what wrk has said, below the one of
# table_header.
row() { printf '%-34s %10s %9s %9s %8s\n' "$1" "$(of_wrk rate)" "$(of_wrk p50)" "$(of_wrk p99)" "$(of_wrk errors)"; }
table_header() { printf '%-34s %10s %9s %9s %8s\n' "$1" req/s 'p50 ms' 'p99 ms' errors; }

run_vegeta() {
	need_server
	need_vegeta
	attack
	"${vegeta[@]}" report "$tmp/results"
}

# attack has vegeta send rate for duration.
attack() {
	echo "GET $url" >"$tmp/target"
	attend "vegeta, $rate req/s" "$duration" "${vegeta[@]}" attack -insecure -targets "$tmp/target" -rate "$rate/1s" -duration "${duration}s" \
		-workers "$workers" -max-workers 2000 -output "$tmp/results"
}

run_ab() {
	need_server
	need_ab
	# -n after -t: ab would stop at 50,000.
	attend ab "$duration" ab -q -k -c "$workers" -t "$duration" -n 100000000 "$url"
}

run_wrk() {
	need_server
	need_wrk
	load_with_wrk "$workers" wrk "$url"
}

run_endpoints() {
	need_server
	need_wrk
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
		load_with_wrk "$workers" "$endpoint" ${header[@]+"${header[@]}"} "$origin$path" >"$tmp/wrk"
		row "$endpoint"
	done
}

run_concurrent() {
	need_files 1000
	need_server
	need_wrk
	local connections
	table_header connections
	for connections in 1 10 100 1000; do
		load_with_wrk "$connections" "$connections connections" "$url" >"$tmp/wrk"
		row "$connections"
	done
}

run_keepalive() {
	need_server
	need_wrk
	local kept
	table_header connections
	load_with_wrk "$workers" kept "$url" >"$tmp/wrk"
	row kept
	kept=$(of_wrk rate)
	load_with_wrk "$workers" 'a new one each' -H 'Connection: close' "$url" >"$tmp/wrk"
	row 'a new one for each request'
	awk -v kept="$kept" -v new="$(of_wrk rate)" 'BEGIN { if (new > 0) printf "kept ones give %.1f times as much\n", kept / new }'
}

run_profile() {
	need_go
	need_server
	need_wrk
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
	kill -0 "$load" 2>/dev/null || die "wrk ended early: $url was not under load all the time"
	stop "$load"
	go tool pprof -top -nodecount=30 "$file"
	echo "profile: $file (go tool pprof -http : $file)"
}

# The verdict of the targets.
missed=0
unmeasured=0

run_targets() {
	need_files "$many"
	need_wrk
	need_vegeta
	server_or_example
	find_server
	here="$(processors) processors"
	printf '%-46s %-38s %s\n' target measured ''
	judge_throughput
	judge_at_rate
	judge_memory
	[ "$missed" = 0 ] || exit 1
	[ "$unmeasured" = 0 ] || exit 2
}

# judge prints a target, the figure and whether it is reached, which a condition
# of awk says.
judge() {
	local verdict=ok
	awk "BEGIN { exit !($3) }" || verdict=MISSED missed=1
	printf '%-46s %-38s %s\n' "$1" "$2" "$verdict"
}

not_measured() {
	unmeasured=1
	printf '%-46s %-38s %s\n' "$1" - "not measured: $2"
}

# judge_throughput has wrk ask as fast as it can, and keeps for judge_at_rate
# what latencies and CPU were meanwhile.
judge_throughput() {
	local what='throughput of at least 30000 req/s' before
	full_rate=0
	cat >"$tmp/percentiles.lua" <<'EOF'
done = function(summary, latency, requests)
	io.write(string.format("percentiles %.3f %.3f %.3f\n", latency:percentile(50) / 1000, latency:percentile(95) / 1000, latency:percentile(99) / 1000))
end
EOF
	before=$(cpu_seconds)
	if ! load_with_wrk "$workers" throughput -s "$tmp/percentiles.lua" "$url" >"$tmp/wrk" 2>&1; then
		not_measured "$what" "$(tail -n 1 "$tmp/wrk")"
		return
	fi
	full_cpu=$(percent_since "$before")
	if [ "$(of_wrk errors)" != 0 ]; then
		not_measured "$what" "$(of_wrk errors) requests failed"
		return
	fi
	full_rate=$(of_wrk rate)
	full_latencies=$(awk '/^percentiles / { print $2, $3, $4 }' "$tmp/wrk")
	judge "$what" "$full_rate req/s" "$full_rate >= 30000"
}

# judge_at_rate judges latencies and CPU at the rate, as vegeta sends it. Where
# vegeta cannot send as much, which takes it several times the processor time
# that the server takes, they are those of wrk if that had more than the rate.
judge_at_rate() {
	local reason='' by cpu latencies before sent success
	before=$(cpu_seconds)
	if ! attack 2>"$tmp/error"; then
		reason="vegeta: $(tail -n 1 "$tmp/error")"
		sent=0
	else
		cpu=$(percent_since "$before")
		"${vegeta[@]}" report -type json "$tmp/results" >"$tmp/report"
		sent=$(of_vegeta rate)
		sent=${sent%.*}
		success=$(of_vegeta success)
		by="vegeta, $sent req/s"
		latencies=$(awk -v a="$(of_vegeta 50th)" -v b="$(of_vegeta 95th)" -v c="$(of_vegeta 99th)" 'BEGIN { print a / 1e6, b / 1e6, c / 1e6 }')
	fi
	if [ $((sent * 100)) -lt $((rate * 95)) ]; then
		if [ "$full_rate" -ge "$rate" ]; then
			by="wrk, $full_rate req/s" latencies=$full_latencies cpu=$full_cpu
		else
			reason=${reason:-"vegeta sent only $sent req/s, wrk $full_rate: set RATE lower, or load from another machine"}
		fi
	elif [ "$success" != 1 ]; then
		reason="only $success of vegeta's requests succeeded"
	fi

	local p50 p95 p99
	read -r p50 p95 p99 <<<"${latencies:-}"
	judge_latency 50 5 "$p50" "$by" "$reason"
	judge_latency 95 10 "$p95" "$by" "$reason"
	judge_latency 99 50 "$p99" "$by" "$reason"
	local what="CPU below 80 % of $here at $rate req/s"
	if [ -z "$pid" ]; then
		not_measured "$what" "$no_process"
	elif [ -n "$reason" ]; then
		not_measured "$what" "$reason"
	else
		judge "$what" "$cpu % ($by)" "$cpu < 80"
	fi
}

judge_latency() {
	local what="p$1 below $2 ms at $rate req/s"
	if [ -n "$5" ]; then
		not_measured "$what" "$5"
	else
		judge "$what" "$(printf '%.2f ms (%s)' "$3" "$4")" "$3 < $2"
	fi
}

# cpu_seconds prints how long the server has run, in user and system mode.
cpu_seconds() {
	[ -n "$pid" ] || {
		echo 0
		return
	}
	# The name, which comes second, may have spaces in it.
	sed 's/^.*) //' "/proc/$pid/stat" 2>/dev/null | awk -v hz="$(getconf CLK_TCK)" '{ print ($12 + $13) / hz }' ||
		die "process $pid, the server, has gone"
}

# percent_since prints how much of all processors the server has had for
# duration, since cpu_seconds printed what is given.
percent_since() {
	local now
	now=$(cpu_seconds)
	awk -v a="$1" -v b="$now" -v s="$duration" -v n="$(processors)" 'BEGIN { printf "%.0f", 100 * (b - a) / s / n }'
}

# of_vegeta prints a number of vegeta's report.
of_vegeta() { sed -nE "s/.*\"$1\":([0-9.]+).*/\1/p" "$tmp/report"; }

# judge_memory has many connections at work, and looks at the server meanwhile.
judge_memory() {
	local what="less than 500 MB with $many connections" limit
	if [ -z "$pid" ]; then
		not_measured "$what" "$no_process"
		return
	fi
	if ! limit=$(awk '/^Max open files/ { print $4 }' "/proc/$pid/limits" 2>/dev/null); then
		not_measured "$what" "process $pid has gone"
		return
	fi
	if [ "$limit" != unlimited ] && [ "$limit" -lt $((many + 100)) ]; then
		not_measured "$what" "the server may open $limit files, and needs $((many + 100))"
		return
	fi
	start watch_memory "$pid"
	local watcher=$started rc=0 kilobytes connections
	attend "$many connections" "$((duration + 5))" wrk -t "$(threads "$many")" -c "$many" -d "$((duration + 5))s" --timeout 30s "$url" >"$tmp/wrk" 2>&1 || rc=$?
	stop "$watcher"
	if [ "$rc" != 0 ]; then
		not_measured "$what" "$(tail -n 1 "$tmp/wrk")"
		return
	fi
	if ! read -r kilobytes connections <"$tmp/memory"; then
		not_measured "$what" "process $pid has gone"
		return
	fi
	# The server has a few files besides.
	if [ "$connections" -lt "$many" ]; then
		not_measured "$what" "no more than $connections were open at a time"
		return
	fi
	local megabytes=$((kilobytes * 1024 / 1000000))
	judge "$what" "$megabytes MB" "$megabytes < 500"
}

# watch_memory keeps the most memory that a process has, in kilobytes, and the
# most files that it has open, in a file.
watch_memory() {
	local most=0 files=0 now
	while sleep 0.2; do
		now=$(awk '/^VmRSS/ { print $2 }' "/proc/$1/status" 2>/dev/null) || return 0
		[ "$now" -le "$most" ] || most=$now
		now=$(find "/proc/$1/fd" -lname 'socket:*' 2>/dev/null | wc -l)
		[ "$now" -le "$files" ] || files=$now
		echo "$most $files" >"$tmp/memory.new"
		mv "$tmp/memory.new" "$tmp/memory"
	done
}

# find_server sets pid to the number of the process of this machine that listens
# on port, or no_process to why there is none to look at.
find_server() {
	pid=
	no_process="no process of this machine listens on port $port"
	[ -r /proc/net/tcp ] || return 0
	if [ -n "$server" ]; then
		pid=$server
		return
	fi
	case $host in
	127.* | localhost | \[::1\]) ;;
	*) return 0 ;;
	esac
	local inode inodes pids
	inodes=$(awk -v port="$(printf ':%04X' "$port")" '$4 == "0A" && substr($2, length($2) - 4) == port { print $10 }' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true)
	pids=$(for inode in $inodes; do
		find /proc/[0-9]*/fd -lname "socket:\[$inode\]" 2>/dev/null || true
	done | cut -d / -f 3 | sort -u)
	if [ "$(wc -w <<<"$pids")" -gt 1 ]; then
		no_process="several processes listen on port $port"
		return
	fi
	pid=$pids
}

run_all() {
	local name rc worst=0
	server_or_example
	for name in endpoints vegeta ab wrk concurrent keepalive profile targets; do
		printf '\n== %s\n' "$name"
		rc=0
		start "${BASH_SOURCE[0]}" "$name"
		wait "$started" || rc=$?
		# A target that is missed is worse than a tool that is.
		if [ "$rc" = 1 ] || [ "$worst" = 0 ]; then worst=$rc; fi
	done
	exit "$worst"
}

main "$@"
