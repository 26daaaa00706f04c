package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/conduit"
)

// attackedPeers are those that slow attacks are made on: Conduit with its
// defaults, but for timeouts that one need not wait for so long, and net/http
// as it comes.
func attackedPeers() []peer {
	return []peer{
		{name: "attacked_conduit", title: "Conduit", serve: func(s *site, l, secure net.Listener) (*service, error) {
			files := conduit.NewFileServer(s.dir, "/static")
			cfg := conduit.DefaultConfig(attackedMux(s, files, func(w http.ResponseWriter, r *http.Request) io.Writer {
				stream, err := conduit.NewBinaryStream(w, r)
				if err != nil {
					panic(err)
				}
				return stream
			}))
			cfg.ReadHeaderTimeout = 4 * time.Second
			cfg.ReadTimeout = 6 * time.Second
			cfg.WriteTimeout = 6 * time.Second
			cfg.IdleTimeout = 6 * time.Second
			cfg.Logger = s.log
			srv, err := conduit.New(cfg)
			if err != nil {
				return nil, err
			}
			go srv.Serve(l)
			return &service{stop: func() error { return errors.Join(srv.Close(), files.Close()) }}, nil
		}},
		{name: "attacked_bare", title: "http.Server{}", serve: func(s *site, l, secure net.Listener) (*service, error) {
			files := http.StripPrefix("/static", http.FileServer(http.Dir(s.dir)))
			srv := &http.Server{Handler: attackedMux(s, files, func(w http.ResponseWriter, r *http.Request) io.Writer {
				return flushedWriter{w}
			})}
			go srv.Serve(l)
			return &service{stop: srv.Close}, nil
		}},
	}
}

func attackedMux(s *site, files http.Handler, stream func(http.ResponseWriter, *http.Request) io.Writer) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /text", serveText)
	mux.HandleFunc("POST /items", servePost)
	mux.Handle("GET /static/", files)
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		to := stream(w, r)
		for {
			if _, err := to.Write(s.document); err != nil {
				return
			}
		}
	})
	return mux
}

type flushedWriter struct{ w http.ResponseWriter }

func (f flushedWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	return n, errors.Join(err, http.NewResponseController(f.w).Flush())
}

// An attack is what many connections do to hold what they can for as long as
// they can: they send a beginning, and then send or read a byte each second.
type attack struct {
	title string
	begin string
	sends bool
}

func attacks() []attack {
	return []attack{
		{title: "slow header", sends: true, begin: "GET /text HTTP/1.1\r\nHost: localhost\r\nX-Slow: "},
		{title: "slow body", sends: true, begin: "POST /items HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"},
		{title: "slow read of 1 MiB", begin: "GET /static/large.pdf HTTP/1.1\r\nHost: localhost\r\n\r\n"},
		{title: "slow read of a stream", begin: "GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"},
	}
}

// attackLimit is for how long an attack is watched once all attackers are there.
const attackLimit = 40 * time.Second

// measureAttacks writes a table of how n attackers fare, and others meanwhile.
func measureAttacks(ctx context.Context, n int, stdout io.Writer) error {
	// A file that is sent has a descriptor beside its connection's.
	if err := mayOpen(uint64(2*n+100), fmt.Sprintf("%d attackers need", n)); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "conduit-attack-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	list := attackedPeers()
	for _, p := range list {
		if _, err := newSite(filepath.Join(dir, p.name)); err != nil {
			return err
		}
	}
	time.Sleep(settling)
	fmt.Fprintf(stdout, "%s.\n%d attackers at a time.\n\n", machine(), n)
	fmt.Fprint(stdout, "| attack | server | half of them last | left | memory for each | p50 of others | p99 | failed |\n|---|---|---|---|---|---|---|---|\n")
	for _, a := range append([]attack{{title: "none"}}, attacks()...) {
		for _, p := range list {
			result, err := a.measure(ctx, &p, dir, n)
			if err != nil {
				return fmt.Errorf("%s of %s: %w", a.title, p.name, err)
			}
			fmt.Fprintf(stdout, "| %s | %s | %s |\n", a.title, p.title, result)
		}
	}
	return nil
}

// attacked is what came of an attack.
type attacked struct {
	n, left   int
	half, all time.Duration // after which so many of the attackers were gone; 0: never
	memory    int64         // bytes, for all of them
	others    *others
}

// measure has n attackers attack p, which has a process of its own, until they
// are all cut or the limit is over. Without a beginning nobody attacks.
func (a *attack) measure(ctx context.Context, p *peer, dir string, n int) (*attacked, error) {
	proc, err := startProcess(p, dir, "")
	if err != nil {
		return nil, err
	}
	defer proc.stop()
	before, err := proc.memory()
	if err != nil {
		return nil, err
	}
	ordinary, err := proc.descriptors()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel(nil)
	result := &attacked{others: &others{}}
	ask := func() { result.others.ask(ctx, "http://"+proc.addr+"/text") }
	if a.begin == "" {
		group.Go(ask)
		return result, sleep(ctx, 5*time.Second)
	}

	result.n = n
	var there atomic.Int64
	for i := range n {
		group.Go(func() {
			conn, err := dialSlow(ctx, proc.addr)
			if err != nil {
				cancel(err)
				return
			}
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			defer conn.Close()
			there.Add(1)
			a.trickle(ctx, conn)
		})
		// To fill the listener's queue is another attack.
		if i%10 == 9 {
			if err := sleep(ctx, time.Millisecond); err != nil {
				return nil, err
			}
		}
	}
	for there.Load() < int64(n) {
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return nil, err
		}
	}
	begin := time.Now()
	if err := sleep(ctx, time.Second); err != nil {
		return nil, err
	}
	after, err := proc.memory()
	if err != nil {
		return nil, err
	}
	result.memory = after - before
	group.Go(ask) // now: that so many are dialled by this process is no attack
	return result, result.watch(ctx, proc, ordinary, begin)
}

// watch waits until the server has no more descriptors than before the attack,
// or the limit is over.
func (r *attacked) watch(ctx context.Context, proc *process, ordinary int, begin time.Time) error {
	for most := 0; r.all == 0 && time.Since(begin) < attackLimit; {
		now, err := proc.descriptors()
		if err != nil {
			return err
		}
		now -= ordinary
		most = max(most, now)
		// Some are the others', which come and go between two looks.
		r.left = min(r.n, now*r.n/max(most-othersCount, 1))
		if r.half == 0 && now <= most/2 {
			r.half = time.Since(begin)
		}
		if now <= 0 {
			r.all = time.Since(begin)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func (r *attacked) String() string {
	half, left, memory := "-", "-", "-"
	if r.n > 0 {
		half, left = fmt.Sprintf("more than %s", attackLimit), strconv.Itoa(r.left)
		memory = fmt.Sprintf("%.1f KiB", float64(r.memory)/1024/float64(r.n))
		if r.half > 0 {
			half = fmt.Sprintf("%.1f s", r.half.Seconds())
		}
		if r.all > 0 {
			left = fmt.Sprintf("none after %.1f s", r.all.Seconds())
		}
	}
	return fmt.Sprintf("%s | %s | %s | %s", half, left, memory, r.others)
}

// dialSlow dials as one does who wants little at a time. The segments are those
// of an Ethernet: over the loopback's the kernel would take the whole reply.
func dialSlow(ctx context.Context, address string) (net.Conn, error) {
	dialer := net.Dialer{Control: func(network, address string, c syscall.RawConn) error {
		var err error
		controlErr := c.Control(func(fd uintptr) {
			err = errors.Join(
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096),
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1460),
			)
		})
		return errors.Join(controlErr, err)
	}}
	return dialer.DialContext(ctx, "tcp", address)
}

// trickle attacks on conn until it is cut.
func (a *attack) trickle(ctx context.Context, conn net.Conn) {
	if _, err := io.WriteString(conn, a.begin); err != nil {
		return
	}
	if a.sends {
		// One that is cut hears of it here, and is no attacker any more.
		go func() {
			io.Copy(io.Discard, conn)
			conn.Close()
		}()
	}
	one := []byte{' '}
	for sleep(ctx, time.Second) == nil {
		var err error
		if a.sends {
			_, err = conn.Write(one)
		} else {
			_, err = conn.Read(one)
		}
		if err != nil {
			return
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// descriptors returns how many descriptors the server has open.
func (p *process) descriptors() (int, error) {
	dir, err := os.Open(filepath.Join("/proc", strconv.Itoa(p.pid), "fd"))
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	return len(names), err
}

// othersCount is how many honest clients ask during an attack, each on a new
// connection every time.
const othersCount = 8

type others struct {
	mu     sync.Mutex // guards what follows
	took   []time.Duration
	failed int
}

// ask asks until ctx ends.
func (o *others) ask(ctx context.Context, url string) {
	transport := &http.Transport{DisableKeepAlives: true}
	var group sync.WaitGroup
	for range othersCount {
		group.Go(func() {
			for sleep(ctx, 20*time.Millisecond) == nil {
				o.askOnce(transport, url)
			}
		})
	}
	group.Wait()
}

func (o *others) askOnce(transport *http.Transport, url string) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	begin := time.Now()
	body, err := func() ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return nil, err
		}
		res, err := transport.RoundTrip(req)
		if err != nil {
			return nil, err
		}
		defer res.Body.Close()
		return io.ReadAll(res.Body)
	}()
	took := time.Since(begin)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.took = append(o.took, took)
	if err != nil || string(body) != helloText {
		o.failed++
	}
}

func (o *others) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	slices.Sort(o.took)
	percentile := func(p int) string {
		if len(o.took) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f ms", float64(o.took[len(o.took)*p/100].Microseconds())/1000)
	}
	return fmt.Sprintf("%s | %s | %d of %d", percentile(50), percentile(99), o.failed, len(o.took))
}
