package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// audience is many clients of one stream of events.
type audience struct {
	addr    string
	conns   []net.Conn
	missing atomic.Int64 // events that they have not seen yet, of the last publish
	all     chan struct{}
	readers sync.WaitGroup
	heard   func(client int, p []byte) // for a test, what each client reads
}

// newAudience connects n clients and returns once all of them are known to
// be sent what is published.
func newAudience(ctx context.Context, addr string, n int, heard func(client int, p []byte)) (*audience, error) {
	a := &audience{addr: addr, all: make(chan struct{}, 1), heard: heard}
	for i := range n {
		conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err != nil {
			a.close()
			return nil, err
		}
		a.conns = append(a.conns, conn)
		if _, err := fmt.Fprintf(conn, "GET /events HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\n\r\n", addr); err != nil {
			a.close()
			return nil, err
		}
		a.readers.Go(func() { a.read(i, conn) })
	}
	// Not every peer sends a header before the first event, which is why only
	// an event tells that a client is there.
	for range 10 {
		if err := a.publish(ctx, 1, time.Second); err == nil {
			return a, nil
		} else if !errors.Is(err, errNotAll) {
			a.close()
			return nil, err
		}
	}
	a.close()
	return nil, fmt.Errorf("%d clients of %s: %w", n, addr, errNotAll)
}

func (a *audience) close() {
	for _, conn := range a.conns {
		conn.Close()
	}
	a.readers.Wait()
}

// read counts events by their data, which may come in two pieces.
func (a *audience) read(client int, conn net.Conn) {
	mark := []byte(eventData)
	buf := make([]byte, 32<<10)
	kept := 0
	for {
		n, err := conn.Read(buf[kept:])
		if err != nil {
			return
		}
		if a.heard != nil {
			a.heard(client, buf[kept:kept+n])
		}
		text := buf[:kept+n]
		if n := int64(bytes.Count(text, mark)); n > 0 {
			if left := a.missing.Add(-n); left <= 0 && left+n > 0 {
				select {
				case a.all <- struct{}{}:
				default:
				}
			}
		}
		if i := bytes.LastIndex(text, mark); i >= 0 {
			text = text[i+len(mark):]
		}
		kept = copy(buf, text[max(0, len(text)-len(mark)+1):])
	}
}

var errNotAll = errors.New("not every client has seen every event")

// publish has the server publish n events, and waits until every client has
// seen all of them.
func (a *audience) publish(ctx context.Context, n int, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-a.all: // of one that nobody waited for any longer
	default:
	}
	a.missing.Store(int64(n * len(a.conns)))
	req, err := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("http://%s/publish?n=%d", a.addr, n), nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusNoContent {
		return fmt.Errorf("publish: %s: %s", res.Status, text)
	}
	select {
	case <-a.all:
		return nil
	case <-ctx.Done():
		return errNotAll
	}
}
