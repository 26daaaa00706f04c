// Benchmarks compares Conduit with net/http by hand, chi, echo, gin, fiber,
// gzhttp, go-sse and nginx, end to end: each serves the same routes in a
// process of its own, and what counts is how much processor time that takes.
//
//	go run . -also go1.26.8 -picture ratios.svg
//	go run . -rounds 1 -seconds 1 -routes 'static|not_modified' -peers 'conduit|nginx'
//
// See README.md for the rules, and bench_test.go for the same in process.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// options are the flags of a run.
type options struct {
	rounds     int
	seconds    float64
	routes     string
	peers      string
	also       string
	picture    string
	scale      bool
	serverCPU  string
	clientCPU  string
	serve, dir string
}

// run returns the exit status: 0 when all was measured, 2 for flags that make
// no sense, 1 for all else that goes wrong.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("benchmarks", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.rounds, "rounds", 5, "how often each is measured, in turn")
	flags.Float64Var(&o.seconds, "seconds", 1, "how long each is measured in a round")
	flags.StringVar(&o.routes, "routes", ".", "`pattern` of the names of routes to measure")
	flags.StringVar(&o.peers, "peers", ".", "`pattern` of the names of peers to measure; net_http always is")
	flags.StringVar(&o.also, "also", "", "another `toolchain`, such as go1.26.8, with which net/http and Conduit are measured too")
	flags.StringVar(&o.picture, "picture", "", "`file` for a picture of the ratios, as SVG")
	flags.BoolVar(&o.scale, "scale", false, "measure how the costs of Conduit grow, and nothing else")
	flags.StringVar(&o.serverCPU, "server-cpu", "0", "the processor for the servers, where taskset is")
	flags.StringVar(&o.clientCPU, "client-cpu", "1", "the processor for the clients")
	flags.StringVar(&o.serve, "serve", "", "serve one `peer`, which the runner starts by itself")
	flags.StringVar(&o.dir, "dir", "", "`directory` for the files of -serve")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "benchmarks: unexpected argument %q\n", flags.Arg(0))
		return 2
	case o.rounds < 1 || !(o.seconds > 0 && o.seconds <= 60): // NaN is neither
		fmt.Fprintln(stderr, "benchmarks: -rounds must be at least 1, and -seconds more than 0 and at most 60")
		return 2
	}
	if o.serve != "" {
		if err := o.serveOne(stdin, stdout); err != nil {
			fmt.Fprintln(stderr, err)
			return 1
		}
		return 0
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	measure := o.runRoutes
	if o.scale {
		measure = o.runScale
	}
	if err := measure(ctx, stdout, stderr); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		fmt.Fprintln(stderr, "benchmarks:", err)
		if errors.Is(err, errFlags) {
			return 2
		}
		return 1
	}
	return 0
}

// errFlags is wrapped by errors of flags that make no sense.
var errFlags = errors.New("see -help")

// runRoutes measures the peers on the routes and writes the tables and the
// picture.
func (o *options) runRoutes(ctx context.Context, stdout, stderr io.Writer) error {
	chosen, err := o.choose()
	if err != nil {
		return fmt.Errorf("%w; %w", err, errFlags)
	}
	pinned := o.pin(stderr)
	if err := chosen.measure(ctx, o); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s.\nMedians of %d rounds of %g s each; %s.\n\n", machine(), o.rounds, o.seconds, pinned)
	chosen.writeTables(stdout)
	if o.picture == "" {
		return nil
	}
	return chosen.writePicture(o.picture)
}

// duration is that of each measurement.
func (o *options) duration() time.Duration { return time.Duration(o.seconds * float64(time.Second)) }

func (o *options) serveOne(stdin io.Reader, stdout io.Writer) error {
	for _, p := range append(peers(), scalePeer) {
		if p.name == o.serve {
			return serve(&p, o.dir, stdin, stdout)
		}
	}
	return fmt.Errorf("no peer %q", o.serve)
}

// choose returns results, still empty, for the routes and peers that the flags
// ask for.
func (o *options) choose() (*results, error) {
	ofRoutes, err := regexp.Compile(o.routes)
	if err != nil {
		return nil, fmt.Errorf("-routes: %w", err)
	}
	ofPeers, err := regexp.Compile(o.peers)
	if err != nil {
		return nil, fmt.Errorf("-peers: %w", err)
	}
	list := slices.DeleteFunc(routes(), func(r route) bool { return !ofRoutes.MatchString(r.name) })
	if len(list) == 0 {
		return nil, fmt.Errorf("-routes: no route matches %q", o.routes)
	}
	for i := range list {
		if err := enoughFiles(&list[i]); err != nil {
			return nil, err
		}
	}
	return newResults(list, slices.DeleteFunc(peers(), func(p peer) bool {
		return p.name != "net_http" && !ofPeers.MatchString(p.name)
	})), nil
}

// pinnedVariable tells a runner that it is on its processor already.
const pinnedVariable = "CONDUIT_BENCHMARKS_PINNED"

// pin puts this process on the processor for clients, by starting it again
// under taskset, and says in the end where what ran.
func (o *options) pin(stderr io.Writer) string {
	if os.Getenv(pinnedVariable) != "" {
		return fmt.Sprintf("servers on processor %s, clients on %s", o.serverCPU, o.clientCPU)
	}
	if err := o.startPinned(); err != nil {
		fmt.Fprintln(stderr, "not pinned to processors, expect more noise:", err)
	}
	o.serverCPU = ""
	return "not pinned to processors"
}

// startPinned returns only if it could not.
func (o *options) startPinned() error {
	taskset, err := exec.LookPath("taskset")
	if err != nil {
		return err
	}
	if runtime.NumCPU() < 2 {
		return errors.New("there is only one")
	}
	program, err := os.Executable()
	if err != nil {
		return err
	}
	env := append(os.Environ(), pinnedVariable+"=1")
	return syscall.Exec(taskset, append([]string{"taskset", "-c", o.clientCPU, program}, os.Args[1:]...), env)
}

// measure measures every peer on every route, in rounds, forward and backward
// in turn, so that what changes in the meantime changes for all.
func (res *results) measure(ctx context.Context, o *options) error {
	dir, err := os.MkdirTemp("", "conduit-benchmarks-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.also != "" {
		program, err := build(ctx, o.also, dir)
		if err != nil {
			return err
		}
		res.peers = append(res.peers, builtWith(o.also, program)...)
	}
	m := &measurer{seconds: o.duration(), dir: dir, cpu: o.serverCPU}
	for _, p := range res.peers {
		if m.site, err = newSite(filepath.Join(dir, p.name)); err != nil {
			return err
		}
	}
	processes, err := res.start(m)
	defer func() {
		for _, p := range processes {
			p.stop()
		}
	}()
	if err != nil {
		return err
	}
	steps := 0
	for i := range res.routes {
		for _, p := range processes {
			if p.peer.has(&res.routes[i]) {
				steps += o.rounds
			}
		}
	}
	// A peer that hangs is stopped by its own deadlines; this is for the sum.
	ctx, cancel := context.WithTimeout(ctx, time.Minute+time.Duration(steps)*(3*m.seconds+5*time.Second))
	defer cancel()
	told := newProgress(steps)
	fmt.Fprintf(os.Stderr, "%d measurements, about %s\n", steps, (time.Duration(steps) * (m.seconds*6/5 + 300*time.Millisecond)).Round(time.Second))
	defer told.clear()
	for i := range res.routes {
		r := &res.routes[i]
		for round := range o.rounds {
			order := slices.Clone(processes)
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for _, p := range order {
				if !p.peer.has(r) {
					continue
				}
				told.step(fmt.Sprintf("%s, round %d of %d, %s", r.title, round+1, o.rounds, p.peer.title))
				s, err := m.measure(ctx, p, r)
				if err != nil {
					return err
				}
				res.add(r, p.peer, s)
			}
		}
	}
	return nil
}

// build builds this program with another release of Go, into dir, and returns
// its path. It is run where its source is.
func build(ctx context.Context, toolchain, dir string) (string, error) {
	program := filepath.Join(dir, "benchmarks-"+toolchain)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", program, ".")
	cmd.Env = append(os.Environ(), "GOTOOLCHAIN="+toolchain)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("-also %s: %w: %s", toolchain, err, firstLine(string(out)))
	}
	return program, nil
}

// start starts a process for each peer. An nginx that is not installed is left
// out, with a line that says so.
func (res *results) start(m *measurer) ([]*process, error) {
	var processes []*process
	var there []peer
	for i := range res.peers {
		p := &res.peers[i]
		if !slices.ContainsFunc(res.routes, func(r route) bool { return p.has(&r) }) {
			continue
		}
		proc, err := startProcess(p, m.dir, m.cpu)
		if errors.Is(err, errNoNginx) {
			fmt.Fprintln(os.Stderr, "without nginx:", err)
			continue
		}
		if err != nil {
			return processes, err
		}
		processes = append(processes, proc)
		there = append(there, *p)
	}
	res.peers = there
	return processes, nil
}

// machine says what it was measured on.
func machine() string {
	model := runtime.GOARCH
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, "model name"); ok {
				model = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(value), ":"))
				break
			}
		}
	}
	kernel := runtime.GOOS
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel += " " + strings.TrimSpace(string(text))
	}
	return fmt.Sprintf("%s, %s, %s", model, kernel, runtime.Version())
}
