package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	fanOutClients   = 1000
	openConnections = 10_000 // of which the memory is measured
)

// A sample is what one peer costs on one route in one round.
type sample struct {
	cost float64 // processor seconds of the server for one response or event, or bytes for one connection
	rate float64 // responses or events per second; 0 where there is no such thing
}

// measurer has what all measurements need.
type measurer struct {
	seconds time.Duration // of each measurement
	dir     string        // where each peer has its site
	cpu     string        // for the servers
	site    *site         // to compare with
}

// measure measures p on r.
func (m *measurer) measure(ctx context.Context, p *process, r *route) (sample, error) {
	var s sample
	var err error
	switch r.kind {
	case requests:
		s, err = m.measureRequests(ctx, p, r)
	case fanOut:
		s, err = m.measureFanOut(ctx, p, r)
	case connections:
		s, err = m.measureConnections(ctx, p.peer, r)
	}
	if err == nil {
		err = ctx.Err() // or one that ended early would count
	}
	if err != nil {
		return sample{}, fmt.Errorf("%s by %s: %w", r.name, p.peer.name, err)
	}
	return s, nil
}

func (m *measurer) measureRequests(ctx context.Context, p *process, r *route) (sample, error) {
	base := p.base(r)
	x, err := check(ctx, base, p.peer, r, m.site)
	if err != nil {
		return sample{}, err
	}
	l := newLoad(x, p.addr)
	if r.http2 {
		l = newHTTP2Load(x, base)
	}
	defer l.close()
	return p.measureLoad(ctx, l, m.seconds)
}

// measureFanOut publishes as many events at a time as r's body says, each time
// when all clients have got those before.
func (m *measurer) measureFanOut(ctx context.Context, p *process, r *route) (sample, error) {
	n, err := strconv.Atoi(r.body)
	if err != nil {
		return sample{}, err
	}
	l, err := newLoadOfEvents(ctx, p.addr, fanOutClients, n)
	if err != nil {
		return sample{}, err
	}
	defer l.close()
	return p.measureLoad(ctx, l, m.seconds)
}

// measureConnections has a process of its own, so that the memory is not what
// others have left behind. Each connection has had one response.
func (m *measurer) measureConnections(ctx context.Context, peer *peer, r *route) (sample, error) {
	p, err := startProcess(peer, m.dir, m.cpu)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	first, err := openConnection(p.addr, r)
	if err != nil {
		return sample{}, err
	}
	conns = append(conns, first)
	before, err := p.memory()
	if err != nil {
		return sample{}, err
	}
	const side = 16 // by side
	var mu sync.Mutex
	var errs []error
	var group sync.WaitGroup
	for range side {
		group.Go(func() {
			for range openConnections / side {
				conn, err := openConnection(p.addr, r)
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					conns = append(conns, conn)
				}
				mu.Unlock()
				if err != nil || ctx.Err() != nil {
					return
				}
			}
		})
	}
	group.Wait()
	if len(errs) > 0 {
		return sample{}, errs[0]
	}
	after, err := p.memory()
	if err != nil {
		return sample{}, err
	}
	return sample{cost: float64(after-before) / openConnections}, nil
}

func openConnection(addr string, r *route) (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", r.path, addr)
	res, err := http.ReadResponse(bufio.NewReaderSize(conn, 512), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
	}
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(res.Status)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// measureLoad measures p under l for d, after a fifth of that to warm up.
func (p *process) measureLoad(ctx context.Context, l *load, d time.Duration) (sample, error) {
	if _, err := l.run(ctx, d/5); err != nil {
		return sample{}, err
	}
	return p.during(func() (int64, error) { return l.run(ctx, d) })
}

// during measures p while do has it do something, and returns the cost of each
// of those that do has counted.
func (p *process) during(do func() (int64, error)) (sample, error) {
	before, err := p.processorTime()
	if err != nil {
		return sample{}, err
	}
	begin := time.Now()
	n, err := do()
	if err != nil {
		return sample{}, err
	}
	took := time.Since(begin)
	after, err := p.processorTime()
	if err != nil {
		return sample{}, err
	}
	return sample{
		cost: (after - before).Seconds() / float64(n),
		rate: float64(n) / took.Seconds(),
	}, nil
}

// base returns where p serves r.
func (p *process) base(r *route) string {
	if r.http2 {
		return "https://" + p.secure
	}
	return "http://" + p.addr
}

// enoughFiles returns an error if the process may not open the connections
// that r needs.
func enoughFiles(r *route) error {
	need := map[kind]uint64{requests: 100, fanOut: fanOutClients + 100, connections: openConnections + 100}[r.kind]
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Cur < need {
		return fmt.Errorf("%s needs %d file descriptors and the limit is %d: raise it with ulimit -n %d", r.name, need, limit.Cur, need)
	}
	return nil
}
