// Package conformance proves that Conduit gets along with other people's
// programs: clients, proxies, tools, attackers. Each file has one counterpart, and
// its first comment says what it starts and what it proves.
//
//	go test -parallel 8 ./...
//
// The tests wait more than they work. They need Linux. A test whose program is not installed is skipped, which .ci/run
// refuses.
package conformance

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"example.com/conduit"
)

// compare has the tests that watch a server under stress watch net/http's as
// well, which may fail what Conduit may not.
var compare = flag.Bool("compare", false, "log how net/http does under restarts and attacks")

// patience is how long a test waits for what must come: far longer than it
// takes, since other tests run at the same time.
const patience = time.Minute

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for variable, program := range map[string]func() error{sendfileVariable: sendfileProgram, recipeVariable: recipeProgram} {
		if os.Getenv(variable) == "" {
			continue
		}
		if err := program(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	status := m.Run()
	closeBrowser()
	os.Exit(status)
}

// program returns the path of a program. Debian has daemons in a directory that
// is not in everybody's PATH.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		t.Skipf("%s is not installed", name)
	}
	return path
}

// run runs a program to its end, with input if that is not nil, and returns what
// it printed and its exit status.
func run(t *testing.T, input []byte, path string, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = t.TempDir()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &errs
	endWithParent(cmd)
	err := cmd.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || ctx.Err() != nil {
		t.Fatalf("%s %q: %v, %v\n%s", path, args, err, ctx.Err(), &errs)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// start starts a program that runs until stop is called or the test ends: it has
// a while to end by itself.
func start(t *testing.T, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	endWithParent(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		defer time.AfterFunc(patience, func() { cmd.Process.Kill() }).Stop()
		cmd.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// endWithParent has a process end with this one, however that ends.
func endWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

// eventually waits until holds reports true.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %v it is not so that %s", patience, what)
		}
	}
}

// ask returns the status, the body and the header of the response to a GET.
func ask(t *testing.T, url string) (int, string, http.Header) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
	return resp.StatusCode, string(body), resp.Header
}

// server is a Conduit server in this process.
type server struct {
	*conduit.Server
	address string
	url     string
}

// serve serves cfg on a free address until the test ends.
func serve(t *testing.T, cfg *conduit.Config) *server {
	t.Helper()
	return serveOn(t, freeAddress(t), cfg)
}

func serveOn(t *testing.T, address string, cfg *conduit.Config) *server {
	t.Helper()
	srv, err := conduit.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l := listen(t, address)
	s := &server{srv, address, "http://" + address}
	if cfg.TLSConfig != nil {
		s.url = "https://" + address
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(srv.Close(), <-ended); err != nil {
			t.Error(err)
		}
	})
	return s
}

// listen listens on an address that may be that of a server which has just ended:
// a process that another test starts has its listener too, for as long as that
// takes from fork to exec.
func listen(t *testing.T, address string) (l net.Listener) {
	t.Helper()
	var err error
	eventually(t, address+" is free", func() bool {
		l, err = net.Listen("tcp", address)
		return !errors.Is(err, syscall.EADDRINUSE)
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// testTLS returns the configuration of a server with a certificate that nobody
// trusts.
func testTLS() *tls.Config {
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	return &tls.Config{Certificates: srv.TLS.Certificates}
}

// drain ends the server as a restart does.
func (s *server) drain(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
}

// startNginx starts an nginx with what stands in the block http, and returns the
// address that it puts there for ADDRESS. DIR is a directory of its own.
func startNginx(t *testing.T, block string) (address string) {
	t.Helper()
	address = freeAddress(t)
	startNginxOn(t, address, block)
	return address
}

func startNginxOn(t *testing.T, address, block string) (stop func()) {
	t.Helper()
	const config = `
		daemon off;
		master_process off;
		pid DIR/nginx.pid;
		error_log DIR/log;
		events {}
		http {
			access_log off;
			client_body_temp_path DIR/body;
			proxy_temp_path DIR/proxy;
			fastcgi_temp_path DIR/fastcgi;
			uwsgi_temp_path DIR/uwsgi;
			scgi_temp_path DIR/scgi;
			HTTP
		}`
	return startProxy(t, address, strings.Replace(config, "HTTP", block, 1), program(t, "nginx"), "-p", "DIR", "-e", "DIR/log", "-c", "DIR/config")
}

// startProxy starts a program that listens on address, which stands for ADDRESS in
// its configuration. DIR is a directory of its own.
func startProxy(t *testing.T, address, config string, args ...string) (stop func()) {
	t.Helper()
	names := strings.NewReplacer("DIR", t.TempDir(), "ADDRESS", address)
	if err := os.WriteFile(names.Replace("DIR/config"), []byte(names.Replace(config)), 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = names.Replace(args[i])
	}
	return startServer(t, address, args...)
}

// startServer starts a program that listens on address.
func startServer(t *testing.T, address string, args ...string) (stop func()) {
	t.Helper()
	var output bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &output, &output
	stop = start(t, cmd)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
			return stop
		}
	}
	stop()
	t.Fatalf("%s does not listen: %s", args[0], &output)
	return nil
}

var lastHost atomic.Int32

// freeAddress returns an address whose host nobody else listens on: its port
// stays free until its server starts, and while that restarts.
func freeAddress(t *testing.T) string {
	t.Helper()
	n := lastHost.Add(1)
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", os.Getpid()%256, n/250, n%250+1))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// feed is a broker of events behind a server that restarts on its address.
type feed struct {
	config  *conduit.Config
	address string
	broker  atomic.Pointer[conduit.SSEBroker]
	server  *server

	mu       sync.Mutex // guards what follows
	requests []request
}

// request is what a client of events has asked.
type request struct{ proto, lastEventID string }

// newFeed serves the events of a new broker at /events, and page at /.
func newFeed(t *testing.T, tlsConfig *tls.Config, page string) *feed {
	t.Helper()
	f := &feed{address: freeAddress(t)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, page)
	})
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.requests = append(f.requests, request{r.Proto, r.Header.Get("Last-Event-ID")})
		f.mu.Unlock()
		f.broker.Load().ServeHTTP(w, r)
	})
	f.config = conduit.DefaultConfig(mux)
	f.config.TLSConfig = tlsConfig
	f.restart(t, conduit.NewSSEBroker(nil))
	return f
}

// restart starts a server for broker.
func (f *feed) restart(t *testing.T, broker *conduit.SSEBroker) {
	t.Helper()
	f.broker.Store(broker)
	f.server = serveOn(t, f.address, f.config)
}

func (f *feed) lastRequest() request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests[len(f.requests)-1]
}

func (f *feed) publish(t *testing.T, events ...conduit.SSEEvent) {
	t.Helper()
	for _, e := range events {
		if err := f.broker.Load().Publish(&e); err != nil {
			t.Fatal(err)
		}
	}
}

// live has a client live through what happens to clients of events. What it has
// seen is the type and the data of each event.
func (f *feed) live(t *testing.T, proto string, seen func() []string) {
	t.Helper()
	var want []string
	sees := func(events ...string) {
		t.Helper()
		want = append(want, events...)
		for end := time.Now().Add(patience); !slices.Equal(seen(), want); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the client has seen %q, want %q", seen(), want)
			}
		}
	}
	connected := func(lastEventID string) {
		t.Helper()
		eventually(t, "there is a client", func() bool { return f.broker.Load().Clients() == 1 })
		if got := f.lastRequest(); got != (request{proto, lastEventID}) {
			t.Errorf("the request's protocol and Last-Event-ID are %q, want %q and %q", got, proto, lastEventID)
		}
	}

	connected("")
	f.publish(t,
		conduit.SSEEvent{ID: "a-1", Data: "first"},
		conduit.SSEEvent{ID: "a-2", Event: "tick", Data: "one\ntwo\r\n three: √\r"},
		conduit.SSEEvent{ID: "a-3", Event: "tick"},
		conduit.SSEEvent{Retry: time.Hour}, // which a drain must change, or the client does not come back
	)
	sees("message first", "tick one\ntwo\n three: √\n", "tick ")

	f.server.drain(t)
	f.publish(t, conduit.SSEEvent{ID: "a-4", Data: "missed"})
	f.restart(t, f.broker.Load())
	sees("message missed")
	connected("a-3")

	f.publish(t, conduit.SSEEvent{Retry: 2 * time.Second})
	f.publish(t, conduit.SSEEvent{ID: "a-5", Data: "last"})
	sees("message last")
	f.server.Close()
	anew := conduit.NewSSEBroker(nil)
	f.restart(t, anew)
	f.publish(t, conduit.SSEEvent{ID: "b-1", Data: "of another broker"})
	sees("gap ", "message of another broker")
	connected("a-5")
}

// transcript is what a client has seen.
type transcript struct {
	mu     sync.Mutex
	events []string
}

func (tr *transcript) add(typ, data string) {
	if typ == "" && data == "" {
		return // a block without data, which is none to a browser
	}
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.events = append(tr.events, cmp.Or(typ, "message")+" "+data)
}

func (tr *transcript) seen() []string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return slices.Clone(tr.events)
}

var (
	browser      context.Context // of the Chromium that all tests share
	closeBrowser = func() {}
	startBrowser sync.Once
)

// tab is a page that is open in Chromium.
type tab struct{ ctx context.Context }

// newTab opens a page. Whatever it complains of on the console until the end is
// a failure, but for connections, which the tests close.
func newTab(t *testing.T, url string) *tab {
	t.Helper()
	path := program(t, "chromium")
	startBrowser.Do(func() {
		ctx, cancel := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
			chromedp.ExecPath(path), chromedp.NoSandbox,
			chromedp.Flag("disable-gpu", true),
			chromedp.Flag("disable-quic", true),
			chromedp.Flag("disable-component-update", true),
			chromedp.Flag("ignore-certificate-errors", true))...)
		browser, closeBrowser = ctx, cancel
		browser, _ = chromedp.NewContext(ctx)
		if err := chromedp.Do(browser); err != nil { // before any context with a timeout, which would end it
			t.Fatalf("%s: %v", path, err)
		}
	})
	ctx, cancel := chromedp.NewContext(browser)
	t.Cleanup(cancel)
	var (
		mu       sync.Mutex // guards what follows
		messages []string
	)
	err := chromedp.Listen(ctx, func(event any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			messages = append(messages, e.ExceptionDetails.Text)
		case *cdplog.EventEntryAdded:
			if e.Entry.Source != cdplog.EntrySourceNetwork {
				messages = append(messages, e.Entry.Text)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, message := range messages {
			t.Errorf("%s: console: %s", url, message)
		}
	})
	ctx, cancel = context.WithTimeout(ctx, 3*patience)
	t.Cleanup(cancel)
	tab := &tab{ctx}
	tab.do(t, chromedp.Navigate(url))
	return tab
}

func (tab *tab) do(t *testing.T, actions ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(tab.ctx, actions...); err != nil {
		t.Fatal(err)
	}
}

// evaluate returns the value of an expression in the page.
func evaluate[T any](t *testing.T, tab *tab, expression string) T {
	t.Helper()
	v, err := chromedp.Run(tab.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		t.Fatalf("%s: %v", expression, err)
	}
	return v
}
