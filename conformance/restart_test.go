// This file starts nginx and HAProxy, each in front of two instances that are
// restarted in turn while 32 clients POST. It proves that the shutdown loses no
// request behind them: none fails and none is executed twice. Both proxies are set up
// as their documentation has it: connections to the instances are kept, a POST that
// was sent is not sent again; HAProxy asks for the health twice a second, nginx does
// not. It also restarts a server without a proxy, whose listening socket is shared.
//
//	go test -run Restarts -restarts 10 -compare -v
//
// also restarts net/http's server. Of so many POSTs, on two processors, these failed
// with a 502 or a closed connection; none of them had been executed:
//
//	nginx 1.22    Conduit, Delay 2 s                     0 of 144,070
//	              net/http, Shutdown                    18 of 58,486
//	              net/http, health 503, 2 s, Shutdown   19 of 114,645
//	HAProxy 2.6   Conduit, Delay 2 s                     0 of 167,049
//	              net/http, Shutdown                    52 of 1,870
//	              net/http, health 503, 2 s, Shutdown    0 of 183,331
//
// Waiting by hand helps where somebody asks for the health. nginx goes on to send on
// the connections that it has, and what arrives once Shutdown has begun is dropped;
// Conduit's responses have said Connection: close before.

package conformance

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"example.com/conduit"
)

var restarts = flag.Int("restarts", 2, "how often each instance behind a proxy is restarted")

// stopDelay is how long an instance goes on serving: HAProxy has asked for its
// health four times by then.
const stopDelay = 2 * time.Second

const nginxBefore = `
	upstream instances {
		server FIRST fail_timeout=1s;
		server SECOND fail_timeout=1s;
		keepalive 64;
	}
	server {
		listen ADDRESS;
		location / {
			proxy_pass http://instances;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
		}
	}`

const haproxyBefore = `
global
	log stdout format raw local0
defaults
	mode http
	log global
	option httplog
	option dontlog-normal
	option redispatch
	timeout connect 5s
	timeout client 60s
	timeout server 60s
	timeout check 5s
	default-server inter 500ms fall 2 rise 1
listen instances
	bind ADDRESS
	option httpchk GET /health
	http-check expect status 200
	server first FIRST check
	server second SECOND check
`

// Not in parallel with other tests: on a machine that is too busy HAProxy would be
// right to leave an instance out.
func TestRestartsLoseNoRequest(t *testing.T) {
	for _, proxy := range []struct {
		name  string
		start func(t *testing.T, address string, names *strings.Replacer)
	}{
		{"nginx", func(t *testing.T, address string, names *strings.Replacer) {
			startNginxOn(t, address, names.Replace(nginxBefore))
		}},
		{"HAProxy", func(t *testing.T, address string, names *strings.Replacer) {
			startProxy(t, address, names.Replace(haproxyBefore), program(t, "haproxy"), "-db", "-f", "DIR/config")
		}},
	} {
		for _, server := range []struct {
			name string
			run  func(ctx context.Context, l net.Listener, mux *http.ServeMux) error
			lose bool // requests, as it may
		}{
			{"Conduit", runConduit, false},
			{"net/http, Shutdown", runNetHTTP(0), true},
			{"net/http, health 503, 2 s, Shutdown", runNetHTTP(stopDelay), true},
		} {
			if server.lose && !*compare {
				continue
			}
			t.Run(proxy.name+", "+server.name, func(t *testing.T) {
				if !*compare {
					t.Parallel()
				}
				o := &orders{address: freeAddress(t)}
				instances := []*instance{newInstance(t, o, server.run), newInstance(t, o, server.run)}
				proxy.start(t, o.address, strings.NewReplacer("FIRST", instances[0].address, "SECOND", instances[1].address))
				var clients sync.WaitGroup
				ctx, cancel := context.WithCancel(t.Context())
				defer clients.Wait()
				defer cancel()
				clients.Go(func() { o.post(ctx) })
				for _, i := range instances {
					i.works()
				}
				for range *restarts {
					for _, i := range instances {
						i.stop()
						i.start()
						i.works()
					}
				}
				cancel()
				clients.Wait()
				o.judge(t, server.lose)
			})
		}
	}
}

// Without a proxy: four servers in turn serve one listening socket, under load from
// clients that send a request only once, on connections that they keep.
func TestRestartsLoseNoRequestOfDirectClients(t *testing.T) {
	base := listen(t, "127.0.0.1:0").(*net.TCPListener)
	defer base.Close()
	share := func() net.Listener {
		f, err := base.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Timeout(time.Minute))
	echo := chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	run := func() (*conduit.GracefulShutdown, chan error) {
		srv, err := conduit.New(conduit.DefaultConfig(echo))
		if err != nil {
			t.Fatal(err)
		}
		g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: 250 * time.Millisecond, Signals: []os.Signal{}})
		done := make(chan error, 1)
		go func() { done <- g.Run(context.Background(), share()) }()
		return g, done
	}

	current, ended := run()
	var responded, lost atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 48 {
		clients.Go(func() {
			var conn net.Conn
			var br *bufio.Reader
			for n := 0; ; n++ {
				select {
				case <-stop:
					if conn != nil {
						conn.Close()
					}
					return
				default:
				}
				if conn == nil {
					var err error
					if conn, err = net.Dial("tcp", base.Addr().String()); err != nil {
						t.Error(err)
						return
					}
					br = bufio.NewReader(conn)
				}
				body := strconv.Itoa(n)
				_, err := fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				var res *http.Response
				if err == nil {
					res, err = http.ReadResponse(br, nil)
				}
				var got []byte
				if err == nil {
					got, err = io.ReadAll(res.Body)
				}
				if err != nil || string(got) != body {
					lost.Add(1)
					conn.Close()
					conn = nil
					continue
				}
				responded.Add(1)
				if res.Close {
					conn.Close()
					conn = nil
				}
			}
		})
	}
	for range 3 {
		for before := responded.Load(); responded.Load() < before+500; {
			runtime.Gosched()
		}
		next, nextEnded := run()
		current.Shutdown()
		if err := <-ended; err != nil {
			t.Errorf("Run = %v", err)
		}
		current, ended = next, nextEnded
	}
	close(stop)
	clients.Wait()
	current.Shutdown()
	if err := <-ended; err != nil {
		t.Errorf("Run = %v", err)
	}
	if lost.Load() != 0 {
		t.Errorf("%d of %d requests lost in three restarts", lost.Load(), lost.Load()+responded.Load())
	}
	t.Logf("%d requests with a response, %d lost", responded.Load(), lost.Load())
}

func runConduit(ctx context.Context, l net.Listener, mux *http.ServeMux) error {
	mux.Handle("GET /health", conduit.Health())
	srv, err := conduit.New(conduit.DefaultConfig(mux))
	if err != nil {
		return err
	}
	return conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: stopDelay}).Run(ctx, l)
}

// runNetHTTP returns the shutdown that one writes by hand. With a delay the health
// check fails for as long before.
func runNetHTTP(delay time.Duration) func(context.Context, net.Listener, *http.ServeMux) error {
	return func(ctx context.Context, l net.Listener, mux *http.ServeMux) error {
		mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
			if ctx.Err() != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		})
		srv := &http.Server{Handler: mux}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(l) }()
		<-ctx.Done()
		time.Sleep(delay)
		return errors.Join(srv.Shutdown(context.Background()), ignore(<-served, http.ErrServerClosed))
	}
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// instance is one of the two behind the proxy.
type instance struct {
	t        *testing.T
	orders   *orders
	run      func(context.Context, net.Listener, *http.ServeMux) error
	address  string
	executed atomic.Int64
	stop     func() // returns when the instance has ended
}

// newInstance starts an instance, which ends with the test.
func newInstance(t *testing.T, o *orders, run func(context.Context, net.Listener, *http.ServeMux) error) *instance {
	t.Helper()
	i := &instance{t: t, orders: o, run: run, address: freeAddress(t)}
	i.start()
	t.Cleanup(func() { i.stop() })
	return i
}

func (i *instance) start() {
	i.t.Helper()
	l := listen(i.t, i.address)
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", i.execute)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.run(ctx, l, mux) }()
	i.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			i.t.Errorf("the shutdown of %s: %v", i.address, err)
		}
	})
}

func (i *instance) execute(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	digits, _, _ := strings.Cut(string(body), " ")
	number, err := strconv.Atoi(digits)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	time.Sleep(5 * time.Millisecond) // as if there were a database
	i.orders.note(func() { i.orders.executed[number]++ })
	i.executed.Add(1)
	io.WriteString(w, digits)
}

// works waits until the proxy gives the instance orders.
func (i *instance) works() {
	i.t.Helper()
	before := i.executed.Load()
	eventually(i.t, i.address+" gets orders", func() bool { return i.executed.Load() > before })
}

// orders are POSTs with a number each, none of which is sent twice by its client.
type orders struct {
	address string

	mu       sync.Mutex // guards what follows
	last     int
	executed map[int]int    // how often, by number
	failures map[int]string // why, by number
}

func (o *orders) note(what func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.executed == nil {
		o.executed, o.failures = make(map[int]int), make(map[int]string)
	}
	what()
}

// post sends orders until ctx ends, and returns when all have a response.
func (o *orders) post(ctx context.Context) {
	const clients = 32
	// net/http's client would send a POST again if it could.
	transport := &http.Transport{MaxIdleConnsPerHost: clients}
	defer transport.CloseIdleConnections()
	filler := strings.Repeat(" and so on", 2000)
	var group sync.WaitGroup
	for range clients {
		group.Go(func() {
			for ctx.Err() == nil {
				var number int
				o.note(func() {
					o.last++
					number = o.last
				})
				// Some are more than a proxy reads at once, or keeps in memory.
				if err := o.send(transport, number, filler[:10+number%3*9990]); err != nil {
					o.note(func() { o.failures[number] = err.Error() })
				}
			}
		})
	}
	group.Wait()
}

func (o *orders) send(transport *http.Transport, number int, filler string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	want := strconv.Itoa(number)
	body := io.NopCloser(strings.NewReader(want + filler)) // which cannot be rewound
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+o.address+"/orders", body)
	if err != nil {
		return err
	}
	req.ContentLength = int64(len(want) + len(filler))
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || string(got) != want {
		return fmt.Errorf("status %d, %.100q", resp.StatusCode, got)
	}
	return nil
}

// judge fails the test if an order was lost or executed twice, unless it may.
func (o *orders) judge(t *testing.T, lose bool) {
	t.Helper()
	reasons := make(map[string]int)
	phantom, twice := 0, 0
	for number := 1; number <= o.last; number++ {
		reason, failed := o.failures[number]
		if failed {
			reasons[reason]++
		}
		if !failed && o.executed[number] == 0 {
			phantom++
		}
		if o.executed[number] > 1 {
			twice++
		}
	}
	report := fmt.Sprintf("of %d orders %d failed, %d got a response and were not executed, %d executed twice", o.last, len(o.failures), phantom, twice)
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		report += fmt.Sprintf("\n%d times %s", reasons[reason], reason)
	}
	if !lose && len(o.failures)+phantom+twice > 0 {
		t.Error(report)
	}
	t.Log(report)
}
