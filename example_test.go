package conduit_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"iter"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing/fstest"
	"time"

	"example.com/conduit"
)

// A whole service: routes, the usual chain, a server and a shutdown that loses
// no request. Here a context ends it, and in production a signal does.
func Example() {
	mux := http.NewServeMux()
	mux.Handle("GET /health", conduit.Health())
	mux.HandleFunc("GET /hello/{name}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello, %s\n", r.PathValue("name"))
	})
	handler := conduit.Chain(
		conduit.RequestID(),
		conduit.Recovery(),
		conduit.Logging(),
		conduit.Timeout(10*time.Second),
	)(mux)
	srv, err := conduit.New(conduit.DefaultConfig(handler))
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- conduit.NewGracefulShutdown(srv, nil).Run(ctx, l) }()

	res, err := http.Get("http://" + l.Addr().String() + "/hello/gopher")
	if err != nil {
		log.Fatal(err)
	}
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	fmt.Print(string(body))

	stop()
	fmt.Println(<-ended)
	// Output:
	// hello, gopher
	// <nil>
}

// A body that is too long, or is no JSON, gets an error in JSON.
func Example_bodyLimit() {
	writeError := func(w http.ResponseWriter, status int, message string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]string{"error": message})
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var order struct{ Item string }
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&order)
		if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
			writeError(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body has more than %d bytes", tooLarge.Limit))
			return
		}
		if err != nil {
			writeError(w, http.StatusBadRequest, "the body is not the JSON of an order")
			return
		}
		w.WriteHeader(http.StatusCreated)
	})

	for _, item := range []string{`"tea"`, `tea`, `"` + strings.Repeat("tea", 1000) + `"`} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("POST", "/orders", strings.NewReader(`{"item": `+item+`}`)))
		fmt.Print(w.Code, "\n", w.Body)
	}
	// Output:
	// 201
	// 400
	// {"error":"the body is not the JSON of an order"}
	// 413
	// {"error":"the body has more than 1024 bytes"}
}

// The defaults, but for uploads that may take two minutes.
func ExampleDefaultConfig() {
	cfg := conduit.DefaultConfig(http.NotFoundHandler())
	cfg.ReadTimeout = 2 * time.Minute
	srv, err := conduit.New(cfg)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("header", srv.HTTPServer().ReadHeaderTimeout)
	fmt.Println("read", srv.HTTPServer().ReadTimeout)
	// Output:
	// header 10s
	// read 2m0s
}

// A field that is not set gets its default.
func ExampleNew() {
	mux := http.NewServeMux()
	srv, err := conduit.New(&conduit.Config{
		Address:      "127.0.0.1:8080",
		Handler:      mux,
		WriteTimeout: time.Minute,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("read", srv.HTTPServer().ReadTimeout)
	fmt.Println("write", srv.HTTPServer().WriteTimeout)
	// Output:
	// read 15s
	// write 1m0s
}

// One error names every invalid field.
func ExampleNew_errors() {
	_, err := conduit.New(&conduit.Config{
		Address:       "localhost",
		MinTLSVersion: tls.VersionTLS11,
		KeyFile:       "key.pem",
	})
	fmt.Println(err)
	// Output:
	// conduit: Handler: is required
	// conduit: Address: address localhost: missing port in address
	// conduit: MinTLSVersion: TLS 1.1 is not supported, only TLS 1.2 and TLS 1.3 are
	// conduit: CertFile: is required with KeyFile
}

// Serve takes any listener and returns nil once a shutdown is done.
func ExampleServer_Serve() {
	srv, err := conduit.New(conduit.DefaultConfig(http.NotFoundHandler()))
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()

	res, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	fmt.Println(res.Status)

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println("shutdown:", srv.Shutdown(ctx))
	fmt.Println("serve:", <-served)
	// Output:
	// 404 Not Found
	// shutdown: <nil>
	// serve: <nil>
}

// The hooks run when the last request has its response, the last one
// registered first: whatever was opened last is closed first.
func ExampleGracefulShutdown() {
	srv, err := conduit.New(&conduit.Config{
		Address: "127.0.0.1:0",
		Handler: http.NotFoundHandler(),
	})
	if err != nil {
		log.Fatal(err)
	}
	g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{
		Timeout: 20 * time.Second,
		Delay:   -1, // 5 seconds behind a load balancer
	})
	g.RegisterHook(func(ctx context.Context) error {
		fmt.Println("database closed")
		return nil
	})
	g.RegisterHook(func(ctx context.Context) error {
		fmt.Println("queue flushed")
		return nil
	})

	time.AfterFunc(10*time.Millisecond, g.Shutdown) // or SIGTERM
	fmt.Println(g.Start())
	// Output:
	// queue flushed
	// database closed
	// <nil>
}

// The last line of a main without hooks.
func ExampleStartWithGracefulShutdown() {
	srv, err := conduit.New(conduit.DefaultConfig(http.FileServer(http.Dir("public"))))
	if err != nil {
		log.Fatal(err)
	}
	err = conduit.StartWithGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: 5 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
}

// A long poll that ends when the server drains, so that it does not hold up
// the shutdown.
func ExampleDraining() {
	events := make(chan string)
	poll := func(w http.ResponseWriter, r *http.Request) {
		select {
		case e := <-events:
			fmt.Fprintln(w, e)
		case <-conduit.Draining(r.Context()):
			w.WriteHeader(http.StatusNoContent) // the client asks again, and gets another server
		case <-r.Context().Done():
		}
	}

	srv, err := conduit.New(conduit.DefaultConfig(http.HandlerFunc(poll)))
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(l)
	defer srv.Close()

	time.AfterFunc(20*time.Millisecond, srv.Drain)
	res, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	fmt.Println(res.Status)
	// Output: 204 No Content
}

// systemd, or another service manager, is told that the service stops as soon
// as it drains.
func ExampleServer_Draining() {
	srv, err := conduit.New(conduit.DefaultConfig(http.NotFoundHandler()))
	if err != nil {
		log.Fatal(err)
	}
	dir, _ := os.MkdirTemp("", "")
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "notify") // systemd's is in NOTIFY_SOCKET
	systemd, err := net.ListenPacket("unixgram", socket)
	if err != nil {
		log.Fatal(err)
	}
	defer systemd.Close()

	go func() {
		<-srv.Draining()
		conn, err := net.Dial("unixgram", socket)
		if err != nil {
			log.Print(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "STOPPING=1")
	}()

	srv.Drain()
	message := make([]byte, 64)
	n, _, _ := systemd.ReadFrom(message)
	fmt.Println(string(message[:n]))
	// Output: STOPPING=1
}

// A check is any function that returns an error, which goes to the log and not to the client.
func ExampleHealth() {
	var queue error
	health := conduit.Health(func(ctx context.Context) error { return queue })

	w := httptest.NewRecorder()
	health.ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
	fmt.Println(w.Code, w.Body)

	queue = errors.New("queue: connection refused")
	w = httptest.NewRecorder()
	health.ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
	fmt.Println(w.Code, w.Body)
	// Output:
	// 200 {"status":"ok"}
	// 503 {"status":"failing"}
}

// The first is the outermost. Any func(http.Handler) http.Handler fits in,
// chi's and gorilla's middleware too.
func ExampleChain() {
	step := func(name string) conduit.Middleware {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fmt.Println(name, "in")
				next.ServeHTTP(w, r)
				fmt.Println(name, "out")
			})
		}
	}
	handler := conduit.Chain(step("first"), step("second"))(http.NotFoundHandler())

	handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	// Output:
	// first in
	// second in
	// second out
	// first out
}

// An id from the proxy in front is kept, one that is not fit to be logged is
// replaced.
func ExampleRequestID() {
	handler := conduit.RequestID()(http.NotFoundHandler())

	for _, id := range []string{"5f3a-17", "a b", ""} {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("X-Request-ID", id)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		got := w.Header().Get("X-Request-ID")
		fmt.Println(got == id, len(got))
	}
	// Output:
	// true 7
	// false 26
	// false 26
}

// Send the id on with the requests that a handler makes, so that the logs of
// all services tell of one.
func ExampleRequestIDFrom() {
	handler := conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, err := http.NewRequestWithContext(r.Context(), "GET", "http://stock.internal/items", nil)
		if err != nil {
			http.Error(w, "Internal Server Error", http.StatusInternalServerError)
			return
		}
		req.Header.Set("X-Request-ID", conduit.RequestIDFrom(r.Context()))
		fmt.Println(req.URL, req.Header)
	}))

	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("X-Request-ID", "5f3a-17")
	handler.ServeHTTP(httptest.NewRecorder(), r)
	// Output: http://stock.internal/items map[X-Request-Id:[5f3a-17]]
}

// The client learns nothing of what went wrong, the log all of it.
func ExampleRecovery() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		Level: slog.LevelError,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case "time", "remote", "stack": // vary
				return slog.Attr{}
			}
			return a
		},
	}))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) {
		names := []string{"ann", "bob"}
		id, _ := strconv.Atoi(r.PathValue("id"))
		fmt.Fprintln(w, names[id])
	})
	srv, err := conduit.New(&conduit.Config{Handler: conduit.Recovery()(mux), Logger: logger})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(l)
	defer srv.Close()

	res, err := http.Get("http://" + l.Addr().String() + "/users/7")
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	fmt.Println(res.Status)
	// Output:
	// level=ERROR msg=panic method=GET path=/users/7 pattern="GET /users/{id}" err="runtime error: index out of range [7] with length 2"
	// 500 Internal Server Error
}

// What a handler logs has the id of its request, as the request's own line has.
func ExampleLogger() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case "time", "addr": // vary
				return slog.Attr{}
			}
			return a
		},
	}))
	handler := conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conduit.Logger(r.Context()).InfoContext(r.Context(), "order placed", "order", 42)
	}))
	srv, err := conduit.New(&conduit.Config{Handler: handler, Logger: logger})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(l)
	defer srv.Close()

	req, err := http.NewRequest("POST", "http://"+l.Addr().String(), nil)
	if err != nil {
		log.Fatal(err)
	}
	req.Header.Set("X-Request-ID", "5f3a-17")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	// Output:
	// level=INFO msg=listening tls=false
	// level=INFO msg="order placed" request_id=5f3a-17 order=42
}

// The server's logger writes the line. Health checks are left out of it, and
// every request says which tenant it was for.
func ExampleLoggingWith() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case "time", "addr", "duration", "remote": // vary
				return slog.Attr{}
			}
			return a
		},
	}))
	logging := conduit.LoggingWith(&conduit.LoggingConfig{
		Skip: func(r *http.Request) bool { return r.URL.Path == "/health" },
		Attrs: func(r *http.Request) []slog.Attr {
			return []slog.Attr{slog.String("tenant", r.URL.Query().Get("tenant"))}
		},
	})
	mux := http.NewServeMux()
	mux.Handle("GET /health", conduit.Health())
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "order", r.PathValue("id"))
	})
	srv, err := conduit.New(&conduit.Config{Handler: logging(mux), Logger: logger})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(l)
	defer srv.Close()

	for _, target := range []string{"/health", "/orders/42?tenant=acme"} {
		res, err := http.Get("http://" + l.Addr().String() + target)
		if err != nil {
			log.Fatal(err)
		}
		res.Body.Close()
	}
	// Output:
	// level=INFO msg=listening tls=false
	// level=INFO msg=request method=GET path=/orders/42 pattern="GET /orders/{id}" status=200 bytes=9 tenant=acme
}

// Durations in milliseconds, for whatever reads the log. JSONHandler writes
// nanoseconds by itself.
func ExampleConfig_milliseconds() {
	out := new(bytes.Buffer) // os.Stderr in a service
	logger := slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Value.Kind() == slog.KindDuration {
				return slog.Float64(a.Key+"_ms", float64(a.Value.Duration())/float64(time.Millisecond))
			}
			return a
		},
	}))
	srv, err := conduit.New(&conduit.Config{
		Handler: conduit.Logging()(http.NotFoundHandler()),
		Logger:  logger,
	})
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()
	res, err := http.Get("http://" + l.Addr().String() + "/orders")
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	if err := errors.Join(srv.Close(), <-served); err != nil {
		log.Fatal(err)
	}

	for line := range strings.Lines(out.String()) {
		var request struct {
			Path     string  `json:"path"`
			Duration float64 `json:"duration_ms"`
		}
		if err := json.Unmarshal([]byte(line), &request); err != nil {
			log.Fatal(err)
		}
		if request.Path != "" {
			fmt.Println(request.Path, 0 < request.Duration && request.Duration < 10_000)
		}
	}
	// Output: /orders true
}

// A handler that takes too long gets a 503, whether it heeds its context
// or not.
func ExampleTimeout() {
	release := make(chan struct{})
	defer close(release)
	stuck := func(w http.ResponseWriter, r *http.Request) { <-release }
	handler := conduit.Timeout(10 * time.Millisecond)(http.HandlerFunc(stuck))

	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	fmt.Println(w.Code, w.Body)
	// Output: 503 Service Unavailable
}

// Of two timeouts around a handler the shorter one fires, so each route has its
// own, and the chain has none.
func ExampleTimeout_perRoute() {
	orderTimedOut := make(chan struct{})
	order := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-r.Context().Done() // the database is slow
	})
	report := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-orderTimedOut // so it lasts longer than an order may
		fmt.Fprintln(w, "report")
	})
	mux := http.NewServeMux()
	quick, slow := conduit.Timeout(100*time.Millisecond), conduit.Timeout(2*time.Minute)
	mux.Handle("GET /orders/{id}", quick(order))
	mux.Handle("GET /report", slow(report))
	srv := httptest.NewServer(mux)
	defer srv.Close()

	statuses := make(chan string)
	go func() {
		res, err := http.Get(srv.URL + "/report")
		if err != nil {
			log.Fatal(err)
		}
		res.Body.Close()
		statuses <- res.Status
	}()
	res, err := http.Get(srv.URL + "/orders/42")
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	close(orderTimedOut)
	fmt.Println("order:", res.Status)
	fmt.Println("report:", <-statuses)
	// Output:
	// order: 503 Service Unavailable
	// report: 200 OK
}

// A gateway that speaks JSON, with an upload route that may take its time.
func ExampleTimeoutWith() {
	timeout := conduit.TimeoutWith(&conduit.TimeoutConfig{
		Duration: 10 * time.Millisecond,
		Status:   http.StatusGatewayTimeout,
		Message:  `{"error":"upstream did not respond in time"}`,
		Skip:     func(r *http.Request) bool { return r.URL.Path == "/upload" },
	})
	handler := timeout(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(50 * time.Millisecond):
			fmt.Fprint(w, "done")
		case <-r.Context().Done():
		}
	}))

	for _, target := range []string{"/", "/upload"} {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest("GET", target, nil))
		fmt.Println(w.Code, w.Header().Get("Content-Type"), w.Body)
	}
	// Output:
	// 504 application/json {"error":"upstream did not respond in time"}
	// 200 text/plain; charset=utf-8 done
}

// A handler that hands its context on, as to a database, ends by itself when
// the time is up. The response is sent at that moment, not when it returns.
func ExampleFastTimeout() {
	query := func(ctx context.Context) error {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	handler := conduit.FastTimeout(10 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := query(r.Context()); err != nil {
			fmt.Println(errors.Is(err, conduit.ErrTimeout), errors.Is(err, context.DeadlineExceeded))
			return
		}
		fmt.Fprint(w, "rows")
	}))

	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	fmt.Println(w.Code, w.Body)
	// Output:
	// true true
	// 503 Service Unavailable
}

// The pool of a job that runs no Server, beside the services that share its
// database.
func ExampleDatabaseConfig_Apply() {
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL")) // import a driver for it
	if err != nil {
		log.Fatal(err)
	}
	pool := &conduit.DatabaseConfig{DB: db, MaxOpenConns: 20, MaxIdleConns: 20}
	if err := pool.Apply(); err != nil {
		log.Fatal(err)
	}
}

// The pool is bounded when the server is made, warm before the first request
// comes, and closed when the last one that may use it has its response.
func ExampleDatabaseConfig_Warm() {
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL")) // import a driver for it
	if err != nil {
		log.Fatal(err)
	}
	pool := &conduit.DatabaseConfig{DB: db, MaxOpenConns: 50, MaxIdleConns: 50}
	mux := http.NewServeMux()
	mux.Handle("GET /health", conduit.Health(conduit.DatabaseHealth(db)))
	srv, err := conduit.New(&conduit.Config{Handler: mux, Database: pool})
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := pool.Warm(ctx, 20); err != nil {
		log.Fatal(err)
	}
	g := conduit.NewGracefulShutdown(srv, nil)
	g.RegisterHook(func(context.Context) error { return db.Close() })
	if err := g.Start(); err != nil {
		log.Fatal(err)
	}
}

// A service whose queue is short may prefer to stay in rotation while its pool
// is full: only a database that is down makes it unwell.
func ExampleDatabaseHealth() {
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL")) // import a driver for it
	if err != nil {
		log.Fatal(err)
	}
	check := conduit.DatabaseHealth(db)
	http.Handle("GET /health", conduit.Health(func(ctx context.Context) error {
		err := check(ctx)
		if errors.Is(err, conduit.ErrPoolSaturated) {
			return nil
		}
		return err
	}))
}

// A long list is compressed for clients that accept it, a short response as it
// is.
func ExampleCompression() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, r *http.Request) {
		items := make([]map[string]any, 1000)
		for i := range items {
			items[i] = map[string]any{"id": i, "name": fmt.Sprint("item ", i)}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(items)
	})
	mux.HandleFunc("GET /hello", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello")
	})
	handler := conduit.Compression()(mux)

	for _, path := range []string{"/items", "/hello"} {
		for _, accept := range []string{"gzip, deflate, br", "identity"} {
			r := httptest.NewRequest("GET", path, nil)
			r.Header.Set("Accept-Encoding", accept)
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			fmt.Printf("%s for %s: over 10 KB %t, %v\n", path, accept, w.Body.Len() > 10<<10, w.Header()["Content-Encoding"])
		}
	}
	// Output:
	// /items for gzip, deflate, br: over 10 KB false, [gzip]
	// /items for identity: over 10 KB true, []
	// /hello for gzip, deflate, br: over 10 KB false, []
	// /hello for identity: over 10 KB false, []
}

// Compress only large responses, of the types that the service sends, and take more
// time for it.
func ExampleCompressionWith() {
	compress := conduit.CompressionWith(&conduit.CompressionConfig{
		Level:   6,
		MinSize: 16 << 10,
		Types:   []string{"text/*", "application/json", "*/*+json"},
	})
	handler := compress(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lines, _ := strconv.Atoi(r.URL.Query().Get("lines"))
		w.Header().Set("Content-Type", "application/geo+json")
		io.WriteString(w, strings.Repeat("[8.54, 47.37]\n", lines))
	}))

	for _, target := range []string{"/?lines=100", "/?lines=10000"} {
		r := httptest.NewRequest("GET", target, nil)
		r.Header.Set("Accept-Encoding", "gzip")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		fmt.Println(target, w.Header()["Content-Encoding"])
	}
	// Output:
	// /?lines=100 []
	// /?lines=10000 [gzip]
}

// A directory at /static/. Register it at the prefix and do not strip that.
func ExampleNewFileServer() {
	dir, err := os.MkdirTemp("", "public")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "hello.txt"), []byte("hello\n"), 0o600); err != nil {
		log.Fatal(err)
	}

	files := conduit.NewFileServer(dir, "/static")
	defer files.Close()
	mux := http.NewServeMux()
	mux.Handle("/static/", files)

	srv := httptest.NewServer(mux)
	defer srv.Close()
	res, err := http.Get(srv.URL + "/static/hello.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	fmt.Print(string(body))
	fmt.Println(res.Header.Get("Content-Type"))
	// Output:
	// hello
	// text/plain; charset=utf-8
}

// A single-page application in the binary. The map stands for the embed.FS that
// a service would have.
func ExampleNewFileServerWith() {
	site := fstest.MapFS{
		"index.html": {Data: []byte("<!doctype html><script src=app.js></script>")},
		"app.js":     {Data: []byte("render()")},
	}
	files, err := conduit.NewFileServerWith(&conduit.FileServerConfig{
		FS:       site,
		Fallback: "index.html", // /users/17 is a route of the application
	})
	if err != nil {
		log.Fatal(err)
	}
	defer files.Close()

	for _, path := range []string{"/app.js", "/users/17", "/missing.js"} {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Accept", "text/html")
		w := httptest.NewRecorder()
		files.ServeHTTP(w, r)
		fmt.Println(path, w.Code, w.Header().Get("Content-Type"))
	}
	// Output:
	// /app.js 200 text/javascript; charset=utf-8
	// /users/17 200 text/html; charset=utf-8
	// /missing.js 404 text/plain; charset=utf-8
}

// A page names its files with the hash of their content, so that browsers may
// keep them for ever and still see a new one at once.
func ExampleFileServer_URL() {
	files, err := conduit.NewFileServerWith(&conduit.FileServerConfig{
		FS:     fstest.MapFS{"app.js": {Data: []byte("render()")}},
		Prefix: "/static",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer files.Close()

	page := template.Must(template.New("page").Funcs(template.FuncMap{"static": files.URL}).Parse(
		`<script src="{{static "app.js"}}"></script>` + "\n"))
	if err := page.Execute(os.Stdout, nil); err != nil {
		log.Fatal(err)
	}

	w := httptest.NewRecorder()
	files.ServeHTTP(w, httptest.NewRequest("GET", files.URL("app.js"), nil))
	fmt.Println(w.Header().Get("Cache-Control"))
	// Output:
	// <script src="/static/app.js?v=MuEi4PRmqADeF7hg05ue"></script>
	// public, max-age=31536000, immutable
}

// Each write is with the client when it returns.
func ExampleNewTextStream() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewTextStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		for _, step := range []string{"fetch", "build", "test"} {
			if _, err := fmt.Fprintln(s, step, "done"); err != nil {
				return // the client has disconnected
			}
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// text/plain; charset=utf-8
	// fetch done
	// build done
	// test done
}

// A copy goes out as its source delivers it.
func ExampleNewBinaryStream() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "video/mp4")
		s, err := conduit.NewBinaryStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		var camera io.Reader = strings.NewReader("frame frame frame\n")
		if _, err := io.Copy(s, camera); err != nil {
			// It goes nowhere if a part was sent: the client sees that it is one.
			http.Error(w, "no picture", http.StatusBadGateway)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// video/mp4
	// frame frame frame
}

// The deferred Abort aborts the response of a handler that does not get as far as
// Close, so that no client takes half an array for the whole.
func ExampleNewJSONStream() {
	type post struct {
		ID    int    `json:"id"`
		Title string `json:"title"`
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewJSONStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		defer s.Abort()
		for i, title := range []string{"first", "second"} {
			if err := s.Write(post{i + 1, title}); err != nil {
				// It goes nowhere if something was sent: that is aborted.
				http.Error(w, "cannot encode", http.StatusInternalServerError)
				return
			}
		}
		s.Close()
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/json
	// [{"id":1,"title":"first"},{"id":2,"title":"second"}]
}

// A producer that has a channel already. It ends with the request's context too,
// because nobody receives once the client has disconnected.
func ExampleJSONStream_WriteJSONArray() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewJSONStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		defer s.Abort()
		items := make(chan any)
		go func() {
			defer close(items)
			for i := range 3 {
				select {
				case items <- i:
				case <-r.Context().Done():
					return
				}
			}
		}()
		if err := s.WriteJSONArray(items); err != nil {
			http.Error(w, "cannot encode", http.StatusInternalServerError)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/json
	// [0,1,2]
}

// NDJSON is one document per line, which a client can use as they come.
func ExampleNewNDJSONStream() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewNDJSONStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		defer s.Abort()
		for i := range 3 {
			if err := s.Write(map[string]int{"square": i * i}); err != nil {
				return
			}
		}
		s.Close()
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/x-ndjson
	// {"square":0}
	// {"square":1}
	// {"square":4}
}

// The rows of a query, as they come from the database. An error before the
// first one is out gets a 500, and one after it aborts the response.
func ExampleStreamJSON() {
	rows := func(yield func(string, error) bool) {
		// for rows.Next() { ... } and rows.Err() in the end
		_ = yield("first", nil) && yield("second", nil)
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		if err := conduit.StreamJSON(w, r, rows); err != nil {
			conduit.Logger(r.Context()).ErrorContext(r.Context(), "posts", "err", err)
			// It goes nowhere if the response has started.
			http.Error(w, "the posts are not available", http.StatusInternalServerError)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/json
	// ["first","second"]
}

// Nothing has gone out when the source fails: the client gets a real 500.
func ExampleStreamJSON_error() {
	rows := func(yield func(string, error) bool) {
		yield("", errors.New("no connection to 10.0.0.7"))
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		if err := conduit.StreamJSON(w, r, rows); err != nil {
			http.Error(w, "the posts are not available", http.StatusInternalServerError)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// 500 Internal Server Error
	// text/plain; charset=utf-8
	// the posts are not available
}

// A log, of which a client can show each line as it comes.
func ExampleStreamNDJSON() {
	lines := func(yield func(map[string]string, error) bool) {
		for _, level := range []string{"info", "warn"} {
			if !yield(map[string]string{"level": level}, nil) {
				return
			}
		}
	}
	handler := func(w http.ResponseWriter, r *http.Request) {
		if err := conduit.StreamNDJSON(w, r, lines); err != nil {
			http.Error(w, "the log is not available", http.StatusInternalServerError)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/x-ndjson
	// {"level":"info"}
	// {"level":"warn"}
}

// A typed channel as an iterator, which ends with the channel or the context.
func ExampleReceive() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		results := make(chan int)
		go func() {
			defer close(results)
			for i := range 5 {
				select {
				case results <- i * i:
				case <-r.Context().Done():
					return
				}
			}
		}()
		if err := conduit.StreamJSON(w, r, conduit.Receive(r.Context(), results)); err != nil {
			http.Error(w, "cannot compute", http.StatusInternalServerError)
		}
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// application/json
	// [0,1,4,9,16]
}

// The handler that needs no more than the items of a request.
func ExampleJSONHandler() {
	mux := http.NewServeMux()
	mux.Handle("GET /words/{text}", conduit.JSONHandler(func(r *http.Request) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			for word := range strings.SplitSeq(r.PathValue("text"), "+") {
				if !yield(word, nil) {
					return
				}
			}
		}
	}))
	srv := httptest.NewServer(mux)
	defer srv.Close()

	res, err := http.Get(srv.URL + "/words/never+odd+or+even")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	var words []string
	if err := json.NewDecoder(res.Body).Decode(&words); err != nil {
		log.Fatal(err)
	}
	fmt.Println(len(words), words)
	// Output:
	// 4 [never odd or even]
}

// An event is with the client when WriteSSE returns.
func ExampleNewSSEStream() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewSSEStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		for percent := 50; percent <= 100; percent += 50 {
			if err := s.WriteSSE(&conduit.SSEEvent{Event: "progress", Data: fmt.Sprint(percent, "%")}); err != nil {
				return // the client has disconnected
			}
		}
		s.WriteSSE(&conduit.SSEEvent{Event: "done"})
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// text/event-stream
	// event: progress
	// data: 50%
	//
	// event: progress
	// data: 100%
	//
	// event: done
	// data:
}

// Serve sends what a channel has, with a heartbeat while it has nothing, until
// the channel closes, the client disconnects or the server drains.
func ExampleSSEStream_Serve() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewSSEStream(w, r)
		if err != nil {
			http.Error(w, "cannot stream", http.StatusInternalServerError)
			return
		}
		events := make(chan *conduit.SSEEvent, 16)
		go func() {
			defer close(events)
			for _, word := range strings.Fields("one token after another") {
				select {
				case events <- &conduit.SSEEvent{Data: word}:
				case <-r.Context().Done():
					return
				}
			}
		}()
		s.Serve(events)
	}
	streamExample(http.HandlerFunc(handler))
	// Output:
	// text/event-stream
	// data: one
	//
	// data: token
	//
	// data: after
	//
	// data: another
}

// A client that comes back says what it has seen, and gets what came after that.
func ExampleSSEStream_LastEventID() {
	news := []string{"first", "second", "third"}
	handler := conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
		seen, err := strconv.Atoi(s.LastEventID())
		if err != nil || seen < 0 || seen > len(news) { // it is the client's to choose
			seen = 0
		}
		for i, text := range news[seen:] {
			if err := s.WriteSSE(&conduit.SSEEvent{ID: strconv.Itoa(seen + i + 1), Data: text}); err != nil {
				return err
			}
		}
		return nil
	})

	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Last-Event-ID", "2")
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	fmt.Println(w.Body)
	// Output:
	// id: 3
	// data: third
}

// SSEHandler logs the error that is returned, sends heartbeats, and at a drain
// tells the client when to come back.
func ExampleSSEHandler() {
	handler := conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
		for i := range 3 {
			if err := s.WriteSSE(&conduit.SSEEvent{ID: fmt.Sprint(i), Data: fmt.Sprint("square ", i*i)}); err != nil {
				return err
			}
			select {
			case <-time.After(time.Millisecond):
			case <-s.Done():
				return nil
			}
		}
		return nil
	})
	streamExample(handler)
	// Output:
	// text/event-stream
	// id: 0
	// data: square 0
	//
	// id: 1
	// data: square 1
	//
	// id: 2
	// data: square 4
}

// One side publishes, and every open page has it at once. A client that comes
// back says what it has had, and gets the rest.
func ExampleSSEBroker() {
	broker := conduit.NewSSEBroker(nil)
	mux := http.NewServeMux()
	mux.Handle("GET /events", broker)
	mux.HandleFunc("POST /posts", func(w http.ResponseWriter, r *http.Request) {
		title, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<10))
		if err != nil {
			http.Error(w, "too long", http.StatusRequestEntityTooLarge)
			return
		}
		if err := broker.Publish(&conduit.SSEEvent{Event: "post", Data: string(title)}); err != nil {
			http.Error(w, "not now", http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()
	defer broker.Close() // ends the streams, which srv.Close waits for

	page, err := http.Get(srv.URL + "/events")
	if err != nil {
		log.Fatal(err)
	}
	defer page.Body.Close()
	res, err := http.Post(srv.URL+"/posts", "text/plain", strings.NewReader("hello"))
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	lines := bufio.NewScanner(page.Body)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "data: ") {
		if !strings.HasPrefix(lines.Text(), "id: ") { // they differ from one broker to the next
			fmt.Println(lines.Text())
		}
	}
	fmt.Println(lines.Text())
	// Output:
	// event: post
	// data: hello
}

// streamExample prints what a client gets.
func streamExample(h http.Handler) {
	srv := httptest.NewServer(h)
	defer srv.Close()
	res, err := http.Get(srv.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		log.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		fmt.Println(res.Status)
	}
	fmt.Println(res.Header.Get("Content-Type"))
	fmt.Println(strings.TrimSpace(string(body)))
}

// On the machine itself, go tool pprof http://localhost:8080/debug/pprof/heap
// and a browser at http://localhost:8080/debug/pprof/live; from anywhere else
// there is nothing to see.
func ExampleEnableDefaultProfiling() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })
	conduit.EnableDefaultProfiling(mux)

	srv := httptest.NewServer(mux)
	defer srv.Close()
	for _, host := range []string{"localhost", "service.example"} {
		req, err := http.NewRequest("GET", srv.URL+"/debug/pprof/heap", nil)
		if err != nil {
			log.Fatal(err)
		}
		req.Host = host
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			log.Fatal(err)
		}
		res.Body.Close()
		fmt.Println(host, res.Status)
	}
	// Output:
	// localhost 200 OK
	// service.example 403 Forbidden
}

// A Profiler with a rate for mutexes and the flight recorder of the last ten
// seconds, which /debug/pprof/flight sends.
func ExampleProfiler_Enable() {
	p, err := conduit.NewProfiler(&conduit.ProfilingConfig{
		MutexFraction:  100,
		FlightRecorder: 10 * time.Second,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer p.Close() // in a service, in a hook of its shutdown
	mux := http.NewServeMux()
	p.Enable(mux)

	srv := httptest.NewServer(mux)
	defer srv.Close()
	res, err := http.Get(srv.URL + "/debug/pprof/flight")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	fmt.Println(res.Status, res.Header.Get("Content-Disposition"))
	// Output:
	// 200 OK attachment; filename="flight"
}

// Behind a proxy, or for Prometheus on another machine, a token decides. Allow
// is then all the protection there is.
func ExampleProfilingConfig_allow() {
	token := []byte("Bearer " + "a secret from the environment")
	p, err := conduit.NewProfiler(&conduit.ProfilingConfig{
		Allow: func(r *http.Request) bool {
			return subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), token) == 1
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	srv := httptest.NewServer(p)
	defer srv.Close()
	for _, authorization := range []string{"", string(token)} {
		req, err := http.NewRequest("GET", srv.URL+"/debug/pprof/stats?format=prometheus", nil)
		if err != nil {
			log.Fatal(err)
		}
		req.Header.Set("Authorization", authorization)
		req.Header.Set("X-Forwarded-For", "192.0.2.1")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			log.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		fmt.Println(res.Status, strings.Contains(string(body), "go_goroutines"))
	}
	// Output:
	// 403 Forbidden false
	// 200 OK true
}

// A recording of what went on, in the directory, when a request has taken two
// seconds.
func ExampleProfiler_SlowRequests() {
	p, err := conduit.NewProfiler(&conduit.ProfilingConfig{FlightRecorder: 10 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "recordings")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	handler := conduit.Chain(
		conduit.RequestID(),
		conduit.Recovery(),
		conduit.Logging(),
		p.SlowRequests(2*time.Second, dir),
		conduit.Timeout(20*time.Second),
	)(http.NotFoundHandler())
	srv, err := conduit.New(conduit.DefaultConfig(handler))
	if err != nil {
		log.Fatal(err)
	}
	g := conduit.NewGracefulShutdown(srv, nil)
	g.RegisterHook(func(context.Context) error { return p.Close() })
	ctx, stop := context.WithCancel(context.Background())
	stop() // a service goes on until a signal comes
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(g.Run(ctx, l))
	// Output:
	// <nil>
}

// A port of its own, which the service's public side does not have. ":6060" is
// 127.0.0.1:6060.
func ExampleNewProfilingServer() {
	srv, err := conduit.NewProfilingServer(":0", nil)
	if err != nil {
		log.Fatal(err)
	}
	l, err := net.Listen("tcp", srv.HTTPServer().Addr)
	if err != nil {
		log.Fatal(err)
	}
	served := make(chan error)
	go func() { served <- srv.Serve(l) }()

	res, err := http.Get("http://" + l.Addr().String() + "/debug/pprof/profile?seconds=0.1")
	if err != nil {
		log.Fatal(err)
	}
	res.Body.Close()
	fmt.Println(res.Status)
	fmt.Println(srv.Shutdown(context.Background()), <-served)
	// Output:
	// 200 OK
	// <nil> <nil>
}

// What a program reports of itself, where nobody asks for /debug/pprof/stats.
func ExampleReadRuntimeStats() {
	s := conduit.ReadRuntimeStats()
	fmt.Println(s.Goroutines > 0, s.HeapBytes > 0)
	// Output:
	// true true
}
