// This file runs the code of ../examples/recipes.md: over connections, on SQLite,
// under a service manager's sockets, with a log that goes into a closed pipe, and as
// the first process of a container that has nothing but what the Dockerfile puts
// there, for which it needs root. It proves that each recipe does what the page says,
// and that the page shows the code that is run here or in ../example_test.go.

package conformance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	_ "modernc.org/sqlite"

	"example.com/conduit"
)

func TestRecipesShowTestedCode(t *testing.T) {
	t.Parallel()
	wantSnippetsIn(t, "../examples/recipes.md", "recipes_test.go", "../example_test.go")
}

// wantSnippetsIn fails unless every block of Go in a document is found, line by line,
// in one of the files of tests.
func wantSnippetsIn(t *testing.T, document string, tests ...string) {
	t.Helper()
	var code string
	for _, name := range tests {
		code += "\n" + unindented(readText(t, name)) + "\n"
	}
	blocks := snippets(t, document, "go")
	if len(blocks) == 0 {
		t.Fatalf("%s has no Go", document)
	}
	for _, block := range blocks {
		if !strings.Contains(code, "\n"+unindented(block)+"\n") {
			t.Errorf("%s shows what none of %q has:\n%s", document, tests, block)
		}
	}
}

// snippets returns the blocks of a document in one language.
func snippets(t *testing.T, document, language string) (blocks []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)\n```$").FindAllStringSubmatch(readText(t, document), -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

func unindented(code string) string {
	lines := strings.Split(code, "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

func readText(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// clientAddress returns the rightmost address of X-Forwarded-For that is none
// of our own proxies, or the peer's if the peer is none.
func clientAddress(r *http.Request, proxies []netip.Prefix) netip.Addr {
	peer, _ := netip.ParseAddrPort(r.RemoteAddr)
	client := peer.Addr().Unmap().WithZone("")
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, hop := range slices.Backward(hops) {
		if !slices.ContainsFunc(proxies, func(p netip.Prefix) bool { return p.Contains(client) }) {
			break
		}
		next, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil {
			break
		}
		client = next.Unmap().WithZone("")
	}
	return client
}

func TestRecipeClientAddress(t *testing.T) {
	t.Parallel()
	proxies := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/24")}
	logging := conduit.LoggingWith(&conduit.LoggingConfig{
		Attrs: func(r *http.Request) []slog.Attr {
			return []slog.Attr{slog.String("client", clientAddress(r, proxies).String())}
		},
	})

	for _, test := range []struct {
		peer      string
		forwarded []string
		want      string
	}{
		{"192.0.2.7:1234", nil, "192.0.2.7"},
		{"192.0.2.7:1234", []string{"198.51.100.1"}, "192.0.2.7"}, // it is no proxy of ours
		{"127.0.0.1:1234", []string{"198.51.100.1"}, "198.51.100.1"},
		{"127.0.0.1:1234", []string{"203.0.113.9, 198.51.100.1"}, "198.51.100.1"}, // the first is invented
		{"127.0.0.1:1234", []string{"203.0.113.9", "198.51.100.1, 10.0.0.3"}, "198.51.100.1"},
		{"127.0.0.1:1234", []string{"127.0.0.1, 198.51.100.1,10.0.0.3"}, "198.51.100.1"},
		{"127.0.0.1:1234", []string{"198.51.100.1, unknown, 10.0.0.3"}, "10.0.0.3"},
		{"127.0.0.1:1234", []string{"10.0.0.4, 10.0.0.3"}, "10.0.0.4"}, // one of ours asks itself
		{"127.0.0.1:1234", nil, "127.0.0.1"},
		{"[::ffff:127.0.0.1]:1234", []string{"::ffff:198.51.100.1"}, "198.51.100.1"},
		{"[2001:db8::1]:1234", []string{"198.51.100.1"}, "2001:db8::1"},
		{"127.0.0.1:1234", []string{"2001:db8::1"}, "2001:db8::1"},
		{"@", []string{"198.51.100.1"}, "invalid IP"}, // a Unix socket
	} {
		r := httptest.NewRequest("GET", "/", nil)
		r.RemoteAddr, r.Header["X-Forwarded-For"] = test.peer, test.forwarded
		if got := clientAddress(r, proxies).String(); got != test.want {
			t.Errorf("%s, %q: %s, want %s", test.peer, test.forwarded, got, test.want)
		}
	}

	var log lines
	cfg := conduit.DefaultConfig(logging(http.NotFoundHandler()))
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	srv := serve(t, cfg)
	proxy := startNginx(t, `server {
		listen ADDRESS;
		location / {
			proxy_pass `+srv.url+`;
			proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
		}
	}`)
	// nginx adds a loopback address.
	if r := send("GET", "http://"+proxy, "", "X-Forwarded-For", "203.0.113.9, 10.0.0.3"); r.status != http.StatusNotFound {
		t.Errorf("through nginx: %+v", r)
	}
	eventually(t, "the log has the client's address", func() bool {
		return strings.Contains(log.String(), "client=203.0.113.9") && strings.Contains(log.String(), "remote=127.")
	})
}

// query returns the rows of a query, which starts with each loop over them.
func query[T any](ctx context.Context, db *sql.DB, scan func(*sql.Rows, *T) error, text string, args ...any) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var none T
		rows, err := db.QueryContext(ctx, text, args...)
		if err != nil {
			yield(none, err)
			return
		}
		defer rows.Close()
		for rows.Next() {
			var row T
			err := scan(rows, &row)
			if !yield(row, err) || err != nil {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(none, err)
		}
	}
}

type book struct {
	ID    int    `json:"id"`
	Title string `json:"title"`
}

func TestRecipeRowsOfADatabase(t *testing.T) {
	t.Parallel()
	db, err := sql.Open("sqlite", filepath.Join(t.TempDir(), "books.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	execute := func(statement string) {
		t.Helper()
		if _, err := db.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /books", conduit.JSONHandler(func(r *http.Request) iter.Seq2[book, error] {
		scan := func(rows *sql.Rows, b *book) error { return rows.Scan(&b.ID, &b.Title) }
		return query(r.Context(), db, scan, `SELECT id, title FROM books ORDER BY id`)
	}))
	endless, panicking := make(chan error, 1), make(chan any, 1)
	mux.HandleFunc("GET /endless", func(w http.ResponseWriter, r *http.Request) {
		scan := func(rows *sql.Rows, n *int) error { return rows.Scan(n) }
		endless <- conduit.StreamJSON(w, r, query(r.Context(), db, scan, `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT i FROM n`))
	})
	mux.HandleFunc("GET /panic", func(w http.ResponseWriter, r *http.Request) {
		defer func() { panicking <- recover() }()
		scan := func(*sql.Rows, *int) error { panic("on purpose") }
		conduit.StreamJSON(w, r, query(r.Context(), db, scan, `SELECT 1`))
	})
	var log lines
	cfg := conduit.DefaultConfig(mux)
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	srv := serve(t, cfg)
	unused := func() {
		t.Helper()
		eventually(t, "every connection is back in the pool", func() bool { return db.Stats().InUse == 0 })
	}

	// The table is missing, and the query fails at once.
	if status, _, _ := ask(t, srv.url+"/books"); status != http.StatusInternalServerError {
		t.Errorf("without a table: %d, want 500", status)
	}
	eventually(t, "the log has the error", func() bool { return strings.Contains(log.String(), "no such table") })
	unused()

	execute(`CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT)`)
	if status, body, _ := ask(t, srv.url+"/books"); status != http.StatusOK || body != "[]" {
		t.Errorf("an empty table: %d %s, want 200 []", status, body)
	}
	execute(`INSERT INTO books VALUES (1, 'Emma'), (2, 'Ulysses')`)
	if status, body, _ := ask(t, srv.url+"/books"); status != http.StatusOK || body != `[{"id":1,"title":"Emma"},{"id":2,"title":"Ulysses"}]` {
		t.Errorf("two books: %d %s", status, body)
	}
	unused()

	// The last of many rows cannot be read.
	execute(`WITH RECURSIVE n(i) AS (SELECT 3 UNION ALL SELECT i+1 FROM n WHERE i < 20000) INSERT INTO books SELECT i, 'more of it' FROM n`)
	execute(`INSERT INTO books VALUES (30000, NULL)`)
	resp, err := http.Get(srv.url + "/books")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK || !errors.Is(err, io.ErrUnexpectedEOF) || len(body) == 0 {
		t.Errorf("a bad row: %d, %d bytes, %v; want 200, some, and %v", resp.StatusCode, len(body), err, io.ErrUnexpectedEOF)
	}
	unused()

	// The client disconnects.
	resp, err = http.Get(srv.url + "/endless")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
		t.Error(err)
	}
	if n := db.Stats().InUse; n != 1 {
		t.Errorf("%d connections in use during the response, want 1", n)
	}
	resp.Body.Close()
	if err := <-endless; err == nil {
		t.Error("an endless response has ended without an error")
	}
	unused()

	if status, _, _ := ask(t, srv.url+"/panic"); status != http.StatusOK || <-panicking != "on purpose" {
		t.Errorf("a panic in a row: %d", status)
	}
	unused()
}

// The recipe of a timeout per route is an example of the package. This is what it says
// of the server's timeouts.
func TestRecipeRouteThatOutlivesTheServersTimeouts(t *testing.T) {
	t.Parallel()
	const serverTimeout = 100 * time.Millisecond
	slow := conduit.Timeout(patience)
	mux := http.NewServeMux()
	echoes := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprint(w, string(body), " ", err)
	}
	mux.Handle("POST /moved", slow(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Error(err)
		}
		echoes(w, r)
	})))
	mux.Handle("POST /left", slow(http.HandlerFunc(echoes)))
	cfg := conduit.DefaultConfig(conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging())(mux))
	cfg.ReadTimeout, cfg.WriteTimeout = serverTimeout, serverTimeout
	srv := serve(t, cfg)

	for path, want := range map[string]string{"/moved": "first last <nil>", "/left": "first  "} {
		conn, err := net.Dial("tcp", srv.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nfirst ", path)
		<-time.After(3 * serverTimeout)
		io.WriteString(conn, "last")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || !strings.HasPrefix(string(body), want) {
			t.Errorf("%s: %q, %v; want %q", path, body, err, want)
		}
		if timedOut := strings.Contains(string(body), "timeout"); timedOut != (path == "/left") {
			t.Errorf("%s: %q", path, body)
		}
	}
}

// recipeVariable is set in the environment of the service that is this test binary.
const recipeVariable = "CONFORMANCE_RECIPE"

// recipeProgram is the service of the recipes that need a process of their own.
func recipeProgram() error {
	if os.Getenv(recipeVariable) == "heeds SIGPIPE" {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // not Ignore, which child processes would inherit
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	handler := conduit.Logging()(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, strconv.Itoa(os.Getpid()))
	}))
	return serveUnderSystemd(handler)
}

func serveUnderSystemd(handler http.Handler) error {
	srv, err := conduit.New(conduit.DefaultConfig(handler))
	if err != nil {
		return err
	}
	l, err := listener(":8080")
	if err != nil {
		return err
	}
	go func() {
		<-srv.Draining()
		if err := notify("STOPPING=1"); err != nil {
			slog.Error("notify", "err", err)
		}
	}()
	if err := notify("READY=1"); err != nil {
		slog.Error("notify", "err", err)
	}
	return conduit.NewGracefulShutdown(srv, nil).Run(context.Background(), l)
}

// listener returns the socket that systemd has opened for this process, and
// opens one if there is none.
func listener(address string) (net.Listener, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) || os.Getenv("LISTEN_FDS") != "1" {
		return net.Listen("tcp", address)
	}
	f := os.NewFile(3, "systemd")
	defer f.Close() // FileListener makes a copy
	return net.FileListener(f)
}

// notify tells systemd of a new state of the service.
func notify(state string) error {
	socket := os.Getenv("NOTIFY_SOCKET")
	if socket == "" {
		return nil // systemd did not start the process, or does not ask
	}
	conn, err := net.Dial("unixgram", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte(state))
	return err
}

// manager does what systemd does with a socket unit: it opens the port and keeps it
// open, and listens to what the services that it starts notify it of.
type manager struct {
	url    string
	socket *os.File
	notify *net.UnixConn
}

func newManager(t *testing.T) *manager {
	t.Helper()
	l := listen(t, freeAddress(t))
	t.Cleanup(func() { l.Close() })
	socket, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(t.TempDir(), "notify")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { notify.Close() })
	return &manager{"http://" + l.Addr().String(), socket, notify}
}

// start starts the service of a recipe, which logs to stderr.
func (m *manager) start(t *testing.T, recipe string, stderr io.Writer) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0]) // the number is known only here
	cmd.Env = append(os.Environ(), recipeVariable+"="+recipe, "LISTEN_FDS=1", "NOTIFY_SOCKET="+m.notify.LocalAddr().String())
	cmd.ExtraFiles = []*os.File{m.socket}
	cmd.Stderr = stderr
	start(t, cmd)
	return cmd
}

// hears waits until a service notifies the manager of a state.
func (m *manager) hears(t *testing.T, want string) {
	t.Helper()
	m.notify.SetReadDeadline(time.Now().Add(patience))
	message := make([]byte, 64)
	n, err := m.notify.Read(message)
	if got := string(message[:n]); got != want || err != nil {
		t.Fatalf("the service notifies of %q, %v; want %q", got, err, want)
	}
}

// asks returns what the service that runs responds with, or an error as text. Each
// request needs the listening socket, since it closes its connection.
func (m *manager) asks() string {
	r := send("GET", m.url, "", "Connection", "close")
	if r.status != http.StatusOK {
		return fmt.Sprint(r.status, r.err)
	}
	return r.body
}

func TestRecipeSystemd(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	var log lines
	first := m.start(t, "systemd", &log)
	m.hears(t, "READY=1")
	if got, want := m.asks(), strconv.Itoa(first.Process.Pid); got != want {
		t.Errorf("process %s responds, want %s", got, want)
	}

	first.Process.Signal(syscall.SIGTERM)
	m.hears(t, "STOPPING=1")
	if err := first.Wait(); err != nil {
		t.Errorf("a stopped service: %v\n%s", err, &log)
	}

	// Nobody serves: the request waits for the next instance.
	conn, err := net.Dial("tcp", strings.TrimPrefix(m.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	second := m.start(t, "systemd", &log)
	m.hears(t, "READY=1")
	conn.SetReadDeadline(time.Now().Add(patience))
	response, err := io.ReadAll(conn)
	if want := strconv.Itoa(second.Process.Pid); err != nil || !strings.HasSuffix(string(response), "\r\n\r\n"+want) {
		t.Errorf("the response is %q, %v; want that of process %s", response, err, want)
	}

	// Without systemd.
	t.Run("without systemd", func(t *testing.T) {
		l, err := listener("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		if err := notify("READY=1"); err != nil {
			t.Error(err)
		}
	})
}

func TestRecipeLogsToAClosedPipe(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		recipe string
		dies   bool
	}{{"none", true}, {"heeds SIGPIPE", false}} {
		t.Run(test.recipe, func(t *testing.T) {
			t.Parallel()
			m := newManager(t)
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd := m.start(t, test.recipe, w)
			w.Close()
			pid := strconv.Itoa(cmd.Process.Pid)
			asks := func() {
				t.Helper()
				if got := m.asks(); got != pid {
					t.Errorf("process %s responds, want %s", got, pid)
				}
			}
			m.hears(t, "READY=1")
			asks()
			log := bufio.NewScanner(r)
			for log.Scan() && !strings.Contains(log.Text(), "msg=request") {
				continue
			}
			if err := log.Err(); err != nil || !strings.Contains(log.Text(), "status=200") {
				t.Fatalf("no line of the request in the log: %v", err)
			}

			r.Close()
			if test.dies {
				// The line is written before the response is flushed.
				if got := m.asks(); got == pid {
					t.Error("the service responds")
				}
				err := cmd.Wait()
				if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGPIPE {
					t.Errorf("the service ends with %v, want SIGPIPE", err)
				}
				return
			}
			asks()
			asks()
			cmd.Process.Signal(syscall.SIGTERM)
			m.hears(t, "STOPPING=1")
			if err := cmd.Wait(); err != nil {
				t.Errorf("a stopped service: %v", err)
			}
		})
	}
}

// newHandler is what a service would have in its main.go.
func newHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "order", r.PathValue("id"))
	})
	mux.HandleFunc("GET /broken", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half of it")
		w.(http.Flusher).Flush()
		panic("on purpose")
	})
	return conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute))(mux)
}

func TestRecipeTestOfAHandler(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest("GET", "/orders/42", nil)
	r.Header.Set("X-Request-ID", "test-1")
	w := httptest.NewRecorder()
	newHandler().ServeHTTP(w, r)
	if w.Code != http.StatusOK || w.Header().Get("X-Request-ID") != "test-1" {
		t.Errorf("%d %v", w.Code, w.Header())
	}

	func() {
		defer func() {
			if v := recover(); v != http.ErrAbortHandler {
				t.Errorf("an aborted response without a server panics with %v, want http.ErrAbortHandler", v)
			}
		}()
		newHandler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/broken", nil))
	}()

	var log bytes.Buffer
	srv, err := conduit.New(&conduit.Config{
		Handler: newHandler(),
		Logger:  slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()
	res, err := http.Get("http://" + l.Addr().String() + "/broken")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := io.ReadAll(res.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("reading the body: %v, want %v", err, io.ErrUnexpectedEOF)
	}
	if err := errors.Join(srv.Shutdown(t.Context()), <-served); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.String(), "aborted=true") { // nobody writes any more
		t.Error(log.String())
	}
}

// Without docker: what the Dockerfile puts into the image becomes the root directory
// of a process which is the first of its PID namespace, as a container's is.
func TestRecipeDocker(t *testing.T) {
	t.Parallel()
	build, root := t.TempDir(), t.TempDir()
	var user []uint32
	var entrypoint []string
	for line := range strings.Lines(snippets(t, "../examples/recipes.md", "dockerfile")[0]) {
		instruction, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch instruction {
		case "RUN":
			cmd := exec.CommandContext(t.Context(), "sh", "-c", strings.Replace(rest, "-o /", "-o "+build+"/", 1))
			cmd.Dir = ".."
			endWithParent(cmd)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("RUN %s: %v\n%s", rest, err, out)
			}
		case "COPY":
			args := strings.Fields(rest)
			if args[0] != "--from=build" {
				continue // the sources, which are here
			}
			from, to := args[1], filepath.Join(root, args[2])
			if strings.HasSuffix(args[2], "/") {
				to = filepath.Join(to, filepath.Base(from))
			}
			if _, err := os.Stat(filepath.Join(build, from)); err == nil {
				from = filepath.Join(build, from)
			}
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, []byte(readText(t, from)), 0o755); err != nil {
				t.Fatal(err)
			}
		case "USER":
			for id := range strings.SplitSeq(rest, ":") {
				n, err := strconv.ParseUint(id, 10, 32)
				if err != nil || n == 0 {
					t.Fatalf("USER %s, want the numbers of one who is not root", rest)
				}
				user = append(user, uint32(n))
			}
		case "ENTRYPOINT":
			if err := json.Unmarshal([]byte(rest), &entrypoint); err != nil {
				t.Fatalf("ENTRYPOINT %s: %v", rest, err)
			}
		}
	}
	if !x509.NewCertPool().AppendCertsFromPEM([]byte(readText(t, filepath.Join(root, "etc/ssl/certs/ca-certificates.crt")))) {
		t.Error("the image has no certificates")
	}
	data := filepath.Join(root, "data") // a volume
	if err := errors.Join(os.Mkdir(data, 0o700), os.Chown(data, int(user[0]), int(user[1]))); err != nil {
		t.Fatal(err)
	}

	address := freeAddress(t)
	var log lines
	cmd := exec.Command(entrypoint[0], append(entrypoint[1:], "-addr", address, "-db", "/data/posts.db")...)
	cmd.Env = []string{}
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Chroot:     root,
		Credential: &syscall.Credential{Uid: user[0], Gid: user[1]},
		Cloneflags: syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("as root of another root directory: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer cmd.Process.Kill()
	eventually(t, "the service listens", func() bool {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			select {
			case err := <-ended:
				t.Fatalf("the service ends: %v\n%s", err, &log)
			default:
			}
			return false
		}
		conn.Close()
		return true
	})
	if status, body, _ := ask(t, "http://"+address+"/health"); status != http.StatusOK {
		t.Errorf("GET /health: %d %s", status, body)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-ended:
		if err != nil || !strings.Contains(log.String(), `"msg":"shutdown"`) {
			t.Errorf("after a TERM: %v, want exit status 0 and a shutdown in the log\n%s", err, &log)
		}
	case <-time.After(patience):
		t.Errorf("%v after a TERM the service still runs\n%s", patience, &log)
	}
}

// The image is the one that the guide deploys.
func TestRecipeDockerIsTheGuides(t *testing.T) {
	t.Parallel()
	image := regexp.MustCompile(`(?m)^\s*image: (\S+)$`).FindStringSubmatch(readText(t, "../examples/README.md"))
	if image == nil {
		t.Fatal("the Kubernetes guide has no image")
	}
	if want := "docker build -t " + image[1] + " ."; !slices.Contains(strings.Split(snippets(t, "../examples/recipes.md", "sh")[0], "\n"), want) {
		t.Errorf("recipes.md has no line %q", want)
	}
}
