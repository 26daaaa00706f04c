package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"

	"example.com/conduit"
)

// scalePeer serves what a run with -scale measures: Conduit alone.
var scalePeer = peer{name: "scale", title: "Conduit", serve: serveScale}

// manyFiles is how many files there are to be cached, of a kilobyte each.
const manyFiles = 10_000

// keptEvents are how many events the brokers keep, at /kept/N. Each has had twice
// as many.
var keptEvents = []int{100, 1_000, 100_000}

// A scaleStep is a row of the table: one thing that grows, how much of it there
// is, and what is done meanwhile.
type scaleStep struct {
	what string
	n    int
	load func(ctx context.Context, addr string, n int) (*load, error)
}

func scaleSteps() []scaleStep {
	var steps []scaleStep
	add := func(what string, load func(context.Context, string, int) (*load, error), sizes ...int) {
		for _, n := range sizes {
			steps = append(steps, scaleStep{what, n, load})
		}
	}
	add("connections that ask for a text through the chain", func(_ context.Context, addr string, n int) (*load, error) {
		return newLoadOfPaths(addr, n, "", func(int64) string { return "/chain" }), nil
	}, 100, 1_000, 10_000)
	add("cached files of 1 KB, asked for in turn", func(_ context.Context, addr string, n int) (*load, error) {
		l := newLoadOfPaths(addr, clients, "", func(i int64) string { return fmt.Sprintf("/static/many/%d.txt", i%int64(n)) })
		for range n { // which caches them
			if err := l.ask[0](); err != nil {
				l.close()
				return nil, err
			}
		}
		return l, nil
	}, 10, manyFiles)
	add("bytes of a body", func(_ context.Context, addr string, n int) (*load, error) {
		return newLoadOfPaths(addr, clients, "", func(int64) string { return "/body/" + strconv.Itoa(n) }), nil
	}, 2_000, 10_000, 100_000, 1_000_000)
	add("bytes of a body, compressed", func(_ context.Context, addr string, n int) (*load, error) {
		return newLoadOfPaths(addr, clients, "gzip", func(int64) string { return "/body/" + strconv.Itoa(n) }), nil
	}, 2_000, 10_000, 100_000, 1_000_000)
	resumes := func(missed func(n int) int) func(context.Context, string, int) (*load, error) {
		return func(_ context.Context, addr string, n int) (*load, error) {
			l := &load{close: func() {}}
			for range clients {
				l.ask = append(l.ask, func() error { return resume(addr, n, missed(n)) })
			}
			return l, nil
		}
	}
	add("events that a broker keeps, for a client that has missed 10", resumes(func(int) int { return 10 }), keptEvents...)
	add("the same, for a client that has missed more than all", resumes(func(n int) int { return n }), keptEvents...)
	add("clients of a broker, an event to one", func(ctx context.Context, addr string, n int) (*load, error) {
		return newLoadOfEvents(ctx, addr, n, 1)
	}, 10, 100, 1_000, 10_000)
	return steps
}

// runScale measures each step and writes the table.
func (o *options) runScale(ctx context.Context, stdout, stderr io.Writer) error {
	if err := enoughFiles(&route{name: "-scale", kind: connections}); err != nil {
		return err
	}
	pinned := o.pin(stderr)
	dir, err := os.MkdirTemp("", "conduit-benchmarks-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	site, err := newSite(filepath.Join(dir, scalePeer.name))
	if err != nil {
		return err
	}
	if err := site.writeManyFiles(); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s.\nMedians of %d rounds of %g s each; %s. The client can be what limits the rate.\n\n", machine(), o.rounds, o.seconds, pinned)
	fmt.Fprint(stdout, "| what grows | to | a second | processor time of each | memory |\n|---|---|---|---|---|\n")
	for _, step := range scaleSteps() {
		var costs, rates, memories []float64
		for range o.rounds {
			s, memory, err := o.measureStep(ctx, dir, &step)
			if err != nil {
				return fmt.Errorf("%s, %d: %w", step.what, step.n, err)
			}
			costs, rates, memories = append(costs, s.cost), append(rates, s.rate), append(memories, float64(memory))
		}
		cost, _ := median(costs)
		rate, _ := median(rates)
		memory, _ := median(memories)
		fmt.Fprintf(stdout, "| %s | %d | %.0f | %.1f µs | %.0f MB |\n", step.what, step.n, rate, cost*1e6, memory/1e6)
	}
	return nil
}

// measureStep returns what each request or event of step costs in a process of
// its own, and the memory of that afterwards, with the connections still open.
func (o *options) measureStep(ctx context.Context, dir string, step *scaleStep) (sample, int64, error) {
	p, err := startProcess(&scalePeer, dir, o.serverCPU)
	if err != nil {
		return sample{}, 0, err
	}
	defer p.stop()
	l, err := step.load(ctx, p.addr, step.n)
	if err != nil {
		return sample{}, 0, err
	}
	defer l.close()
	s, err := p.measureLoad(ctx, l, o.duration())
	if err != nil {
		return sample{}, 0, err
	}
	memory, err := p.memory()
	return s, memory, err
}

// newLoadOfPaths returns a load of n connections that ask for one path after the
// other, in whichever order they come to it.
func newLoadOfPaths(addr string, n int, coding string, path func(i int64) string) *load {
	var hosts []*fasthttp.HostClient
	l := &load{close: func() {
		for _, host := range hosts {
			host.CloseIdleConnections()
		}
	}}
	var asked atomic.Int64
	for range n {
		host := newHostClient(addr, 1) // or they would share the connections that open first
		hosts = append(hosts, host)
		var req fasthttp.Request
		var res fasthttp.Response
		if coding != "" {
			req.Header.Set("Accept-Encoding", coding)
		}
		l.ask = append(l.ask, func() error {
			path := path(asked.Add(1) - 1)
			req.SetRequestURI("http://" + addr + path)
			if err := host.Do(&req, &res); err != nil {
				return err
			}
			if res.StatusCode() != http.StatusOK || string(res.Header.Peek("Content-Encoding")) != coding {
				return fmt.Errorf("%s: status %d, coding %q", path, res.StatusCode(), res.Header.Peek("Content-Encoding"))
			}
			return nil
		})
	}
	return l
}

// resume connects as a client that has missed the last events of the broker that
// keeps n, and disconnects once it has them. One that has missed more than are
// kept gets a gap and all of them.
func resume(addr string, n, missed int) error {
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	last := 2 * n
	fmt.Fprintf(conn, "GET /kept/%d HTTP/1.1\r\nHost: %s\r\nLast-Event-ID: %d\r\n\r\n", n, addr, last-missed)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	lines, events := bufio.NewScanner(res.Body), 0
	for lines.Scan() {
		id, ok := strings.CutPrefix(lines.Text(), "id: ")
		if !ok {
			continue
		}
		if events++; id != strconv.Itoa(last) {
			continue
		}
		if events != missed {
			return fmt.Errorf("%d events, want %d", events, missed)
		}
		return nil
	}
	return errors.Join(errors.New("the stream ended"), lines.Err())
}

// writeManyFiles writes the files that are to be cached.
func (s *site) writeManyFiles() error {
	if err := os.MkdirAll(filepath.Join(s.dir, "many"), 0o755); err != nil {
		return err
	}
	for i := range manyFiles {
		if err := s.writeFile(fmt.Sprintf("many/%d.txt", i), s.document[:1000]); err != nil {
			return err
		}
	}
	return nil
}

// serveScale serves what Conduit's other peers do, bodies of any length and
// brokers that keep much.
func serveScale(s *site, l, secure net.Listener) (*service, error) {
	h := newConduitHandler(s, conduit.Timeout(handlerTimeout))
	text := document(1_200_000)
	h.mux.Handle("GET /body/{n}", conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.PathValue("n"))
		if err != nil || n > len(text) {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", textType)
		w.Write(text[:n])
	})))
	for _, n := range keptEvents {
		kept := sync.OnceValue(func() http.Handler { // or its events would count as memory of every row
			kept := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: n})
			for i := range 2 * n {
				if err := kept.Publish(&conduit.SSEEvent{ID: strconv.Itoa(i + 1), Data: eventData}); err != nil {
					panic(err)
				}
			}
			return kept
		})
		h.mux.HandleFunc("GET /kept/"+strconv.Itoa(n), func(w http.ResponseWriter, r *http.Request) { kept().ServeHTTP(w, r) })
	}
	return serveConduitHandler(s, l, secure, h.mux, h.close)
}
