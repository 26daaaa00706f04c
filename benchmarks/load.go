package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/valyala/fasthttp"
)

// clients is how many connections of HTTP/1.1, or streams of HTTP/2, ask at
// the same time.
const clients = 32

// load asks for one exchange again and again, until it is closed.
type load struct {
	ask   []func() error // each for one goroutine
	each  int64          // how many responses or events one of ask has had, 1 if it is 0
	close func()
}

// newLoad returns a load of HTTP/1.1 on the address addr, each client with a
// connection that it keeps.
func newLoad(x *exchange, addr string) *load {
	host := newHostClient(addr, clients)
	l := &load{close: host.CloseIdleConnections}
	for range clients {
		var req fasthttp.Request
		var res fasthttp.Response
		req.SetRequestURI("http://" + addr + x.path)
		req.Header.SetMethod(x.method)
		for name, values := range x.header {
			req.Header.Set(name, values[0])
		}
		req.SetBodyString(x.body)
		l.ask = append(l.ask, func() error {
			if err := host.Do(&req, &res); err != nil {
				return err
			}
			return x.checkAgain(res.StatusCode(), len(res.Body()))
		})
	}
	return l
}

// newHostClient returns a client that keeps up to n connections to addr.
func newHostClient(addr string, n int) *fasthttp.HostClient {
	return &fasthttp.HostClient{
		Addr:                     addr,
		MaxConns:                 n,
		ReadTimeout:              20 * time.Second,
		WriteTimeout:             20 * time.Second,
		ReadBufferSize:           64 << 10,
		NoDefaultUserAgentHeader: true,
		DisablePathNormalizing:   true,
	}
}

// newHTTP2Load returns a load over TLS and HTTP/2 on base, with four
// connections that the clients share.
func newHTTP2Load(x *exchange, base string) *load {
	l := &load{}
	var transports []*http.Transport
	for range 4 {
		transports = append(transports, newTransport())
	}
	l.close = func() {
		for _, t := range transports {
			t.CloseIdleConnections()
		}
	}
	for i := range clients {
		transport := transports[i%len(transports)]
		l.ask = append(l.ask, func() error {
			req, err := http.NewRequest(x.method, base+x.path, strings.NewReader(x.body))
			if err != nil {
				return err
			}
			req.Header = x.header
			res, err := transport.RoundTrip(req)
			if err != nil {
				return err
			}
			defer res.Body.Close()
			n, err := io.Copy(io.Discard, res.Body)
			if err != nil {
				return err
			}
			return x.checkAgain(res.StatusCode, int(n))
		})
	}
	return l
}

// newLoadOfEvents returns a load of a broker's n clients, for whom so many events
// are published at a time, each time when all have got those before. It counts
// each event at each client.
func newLoadOfEvents(ctx context.Context, addr string, n, events int) (*load, error) {
	a, err := newAudience(ctx, addr, n, nil)
	if err != nil {
		return nil, err
	}
	return &load{
		ask:   []func() error{func() error { return a.publish(ctx, events, 20*time.Second) }},
		each:  int64(n) * int64(events),
		close: a.close,
	}, nil
}

// checkAgain returns an error unless a response looks like the one that was
// checked.
func (x *exchange) checkAgain(status, length int) error {
	if status != x.status || length != x.length {
		return fmt.Errorf("%s %s: got %d with %d bytes under load, want %d with %d", x.method, x.path, status, length, x.status, x.length)
	}
	return nil
}

// run asks for d, and until the last responses have come, and returns how many
// did. It is an error if parent ends before.
func (l *load) run(parent context.Context, d time.Duration) (int64, error) {
	ctx, cancel := context.WithTimeout(parent, d)
	defer cancel()
	var responses atomic.Int64
	var mu sync.Mutex
	var errs []error
	var group sync.WaitGroup
	for _, ask := range l.ask {
		group.Go(func() {
			for first := true; first || ctx.Err() == nil; first = false {
				if err := ask(); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
					cancel()
					return
				}
				responses.Add(max(l.each, 1))
			}
		})
	}
	group.Wait()
	if len(errs) > 0 {
		return 0, errs[0] // the others only follow
	}
	if err := parent.Err(); err != nil {
		return 0, err
	}
	if responses.Load() == 0 {
		return 0, errors.New("no response came in time")
	}
	return responses.Load(), nil
}
