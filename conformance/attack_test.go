// This file starts attackers: connections that send or read one byte a second, with
// the small windows of one who means it. It proves that a server with Conduit's kinds
// of timeouts, shortened, cuts every one of them while others are served.
//
//	go test -run Attackers -attackers 2000 -compare -v
//
// has an http.Server{} attacked as well, which has no timeouts and keeps all of them.
// A file's reader has twice WriteTimeout, because the kernel's buffer takes what looks
// like progress; a stream's reader has 15 seconds for a write.

package conformance

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"example.com/conduit"
)

var attackers = flag.Int("attackers", 200, "how many attackers each attack has")

// An attack is what connections do to hold what they can for as long as they can:
// they send a beginning, and then send or read a byte each second.
type attack struct {
	name  string
	begin string
	sends bool
}

var attacks = []attack{
	{name: "slow header", sends: true, begin: "GET /text HTTP/1.1\r\nHost: localhost\r\nX-Slow: "},
	{name: "slow body", sends: true, begin: "POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"},
	{name: "slow read of a file", begin: "GET /static/large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n"},
	{name: "slow read of a stream", begin: "GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"},
}

// No timeout is shorter than this.
const shortestTimeout = 2 * time.Second

func TestSlowAttackersAreCut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "large.bin"), make([]byte, 8<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, a := range attacks {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			cfg := conduit.DefaultConfig(attacked(conduit.NewFileServer(dir, "/static"), func(w http.ResponseWriter, r *http.Request) (io.Writer, error) {
				return conduit.NewBinaryStream(w, r)
			}))
			cfg.ReadHeaderTimeout = shortestTimeout
			cfg.ReadTimeout, cfg.WriteTimeout, cfg.IdleTimeout = 3*time.Second, 3*time.Second, 3*time.Second
			srv, err := conduit.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			v := newVictim(t, srv.HTTPServer(), srv.Serve, srv.Close)
			if left := v.attack(t, &a); left > 0 {
				t.Errorf("after %v %d of %d attackers are still there", patience, left, *attackers)
			}
		})
		if !*compare {
			continue
		}
		t.Run(a.name+", http.Server{}", func(t *testing.T) {
			t.Parallel()
			srv := &http.Server{Handler: attacked(http.StripPrefix("/static", http.FileServer(http.Dir(dir))), func(w http.ResponseWriter, r *http.Request) (io.Writer, error) {
				return flushedWriter{w}, nil
			})}
			v := newVictim(t, srv, srv.Serve, srv.Close)
			t.Logf("after %v %d of %d attackers are still there", patience, v.attack(t, &a), *attackers)
		})
	}
}

func attacked(files http.Handler, stream func(http.ResponseWriter, *http.Request) (io.Writer, error)) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /static/", files)
	mux.HandleFunc("GET /text", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello\n") })
	mux.HandleFunc("POST /body", func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		to, err := stream(w, r)
		for some := make([]byte, 40<<10); err == nil; {
			_, err = to.Write(some)
		}
	})
	return mux
}

type flushedWriter struct{ w http.ResponseWriter }

func (f flushedWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	return n, errors.Join(err, http.NewResponseController(f.w).Flush())
}

// victim is a server that is attacked.
type victim struct {
	address string

	mu     sync.Mutex           // guards what follows
	opened map[string]time.Time // when, by the client's address
	lasted map[string]time.Duration
}

func newVictim(t *testing.T, srv *http.Server, serve func(net.Listener) error, stop func() error) *victim {
	t.Helper()
	l := listen(t, freeAddress(t))
	v := &victim{address: l.Addr().String(), opened: make(map[string]time.Time), lasted: make(map[string]time.Duration)}
	srv.ConnState = func(conn net.Conn, state http.ConnState) {
		v.mu.Lock()
		defer v.mu.Unlock()
		client := conn.RemoteAddr().String()
		switch state {
		case http.StateNew:
			v.opened[client] = time.Now()
			delete(v.lasted, client)
		case http.StateClosed:
			v.lasted[client] = time.Since(v.opened[client])
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(stop(), ignore(<-ended, http.ErrServerClosed)); err != nil {
			t.Error(err)
		}
	})
	return v
}

// attack has the attackers attack, and others ask, until all attackers are disconnected or
// patience ends. It returns how many are left then.
func (v *victim) attack(t *testing.T, a *attack) (left int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	for range 4 {
		group.Go(func() { v.ask(ctx, t) })
	}
	clients := make([]string, *attackers)
	for i := range clients {
		conn, err := dialSlow(ctx, v.address)
		if err != nil {
			t.Fatal(err)
		}
		clients[i] = conn.LocalAddr().String()
		group.Go(func() {
			defer context.AfterFunc(ctx, func() { conn.Close() })()
			defer conn.Close()
			a.trickle(ctx, conn)
		})
	}

	begin := time.Now()
	half := time.Duration(0)
	for time.Since(begin) < patience {
		if left = v.left(clients); left == 0 {
			break
		}
		if half == 0 && left <= len(clients)/2 {
			half = time.Since(begin)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if left == 0 {
		t.Logf("half of the attackers were disconnected after %.1f s, all after %.1f s", half.Seconds(), time.Since(begin).Seconds())
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, client := range clients {
		if lasted, disconnected := v.lasted[client]; disconnected && lasted < shortestTimeout {
			t.Errorf("an attacker was disconnected after %v, before any timeout: that was no attack", lasted)
		}
	}
	return left
}

// left returns how many of these clients the server has not disconnected.
func (v *victim) left(clients []string) (n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, client := range clients {
		if _, disconnected := v.lasted[client]; !disconnected {
			n++
		}
	}
	return n
}

// ask is what others do meanwhile: each time on a new connection.
func (v *victim) ask(ctx context.Context, t *testing.T) {
	transport := &http.Transport{DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: patience}
	for sleep(ctx, 50*time.Millisecond) {
		resp, err := client.Get("http://" + v.address + "/text")
		if err != nil {
			t.Errorf("another client: %v", err)
			return
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(body, []byte("hello\n")) {
			t.Errorf("another client: %q, %v", body, err)
			return
		}
	}
}

// dialSlow dials as one does who wants little at a time. The segments are those of
// an Ethernet: over the loopback's the kernel would take the whole response.
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

// trickle attacks on conn until it is disconnected.
func (a *attack) trickle(ctx context.Context, conn net.Conn) {
	if _, err := io.WriteString(conn, a.begin); err != nil {
		return
	}
	one := []byte{' '}
	for sleep(ctx, time.Second) {
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

// sleep reports whether ctx goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
