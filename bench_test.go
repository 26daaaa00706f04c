package conduit_test

// Each benchmark measures one thing side by side, as sub-benchmarks: conduit
// is how a conduit Server runs it, conduit_alone the same middleware without
// the Server, net_http what a service does today with net/http and by hand,
// bare_handler the handler with only the router around it. To run it all:
//
//	go test -run '^$' -bench . -count 6 . | tee bench.txt
//
// What counts are ratios within one run; the figures themselves are the
// machine's. benchstat shows them, in percent of net_http:
//
//	sed -E '/^Bench/s,/(conduit|net_http|bare_handler),/peer=\1,' bench.txt |
//		go run golang.org/x/perf/cmd/benchstat@latest \
//			-col '/peer@(net_http conduit conduit_alone bare_handler)' -
//
// Most run in process and leave out the connection, whose round trip costs
// some hundred times as much as a plain handler: a tenth of a microsecond more
// in BenchmarkSimpleHandler is less than one percent of
// BenchmarkKeepAliveConnections. There and in BenchmarkConcurrentRequests the
// client runs on the same processors, but allocates nothing. The module in
// benchmarks compares with other packages, each in a process of its own.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	mathrand "math/rand/v2"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/conduit"
)

func BenchmarkSimpleHandler(b *testing.B) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", benchHello)
	benchPlain(b, mux, benchCase{target: "/", response: benchHelloText})
}

func BenchmarkJSONResponse(b *testing.B) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /item", func(w http.ResponseWriter, r *http.Request) {
		benchWriteJSON(w, benchItem{ID: 42, Name: "item 42", Price: 19.99, Tags: []string{"new", "sale"}})
	})
	benchPlain(b, mux, benchCase{
		target:   "/item",
		response: `{"id":42,"name":"item 42","price":19.99,"tags":["new","sale"]}` + "\n",
	})
}

func BenchmarkJSONArrayResponse(b *testing.B) {
	items := make([]benchItem, 100)
	for i := range items {
		items[i] = benchItem{ID: i, Name: "item " + strconv.Itoa(i), Price: 19.99, Tags: []string{"new", "sale"}}
	}
	response, err := json.Marshal(items)
	if err != nil {
		b.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, r *http.Request) {
		benchWriteJSON(w, items)
	})
	benchPlain(b, mux, benchCase{target: "/items", response: string(response) + "\n"})
}

func BenchmarkRouterSimple(b *testing.B) {
	benchPlain(b, benchRoutes(), benchCase{target: "/about", response: benchHelloText})
}

func BenchmarkRouterWithParams(b *testing.B) {
	benchPlain(b, benchRoutes(), benchCase{target: "/users/17/posts/42", response: "17 42"})
}

func BenchmarkPOSTWithBody(b *testing.B) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /items", func(w http.ResponseWriter, r *http.Request) {
		var item benchItem
		if err := json.NewDecoder(r.Body).Decode(&item); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		item.ID++
		benchWriteJSON(w, item)
	})
	benchPlain(b, mux, benchCase{
		method:   "POST",
		target:   "/items",
		body:     `{"id":41,"name":"item","price":19.99,"tags":["new","sale"]}`,
		response: `{"id":42,"name":"item","price":19.99,"tags":["new","sale"]}` + "\n",
	})
}

func BenchmarkRequestID(b *testing.B) {
	benchMiddleware(b, benchCase{wantID: true}, conduit.RequestID(), benchByHandRequestID)
}

func BenchmarkRecovery(b *testing.B) {
	benchMiddleware(b, benchCase{}, conduit.Recovery(), benchByHandRecovery)
}

func BenchmarkLogging(b *testing.B) {
	benchMiddleware(b, benchCase{wantLog: benchLogLine}, conduit.Logging(), benchByHandLogging)
}

func BenchmarkTimeout(b *testing.B) {
	benchTimeout(b, conduit.Timeout(30*time.Second))
}

func BenchmarkFastTimeout(b *testing.B) {
	benchTimeout(b, conduit.FastTimeout(30*time.Second))
}

func benchTimeout(b *testing.B, mw conduit.Middleware) {
	benchMiddleware(b, benchCase{}, mw, benchByHandTimeout)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", benchHello)
	b.Run("bare_handler", func(b *testing.B) {
		benchCase{}.run(b, benchHTTPServer(b, mux))
	})
}

// BenchmarkMiddlewareChain is the usual five, for a client that accepts no
// coding; what Compression does is BenchmarkCompression's to measure.
func BenchmarkMiddlewareChain(b *testing.B) { benchChain(b, conduit.Timeout) }

// BenchmarkMiddlewareChainFast has FastTimeout in the place of Timeout.
func BenchmarkMiddlewareChainFast(b *testing.B) { benchChain(b, conduit.FastTimeout) }

func benchChain(b *testing.B, timeout func(time.Duration) conduit.Middleware) {
	benchMiddleware(b, benchCase{wantID: true, wantLog: benchLogLine + " request_id=ID"},
		conduit.Chain(
			conduit.RequestID(),
			conduit.Recovery(),
			conduit.Logging(),
			timeout(30*time.Second),
			conduit.Compression(),
		),
		conduit.Chain(
			benchByHandRequestID,
			benchByHandRecovery,
			benchByHandLogging,
			benchByHandTimeout,
			compressionByHand,
		))
}

// BenchmarkConcurrentRequests is 8 connections for each processor over the
// loopback, each with a request under way at all times.
func BenchmarkConcurrentRequests(b *testing.B) {
	const parallelism = 8
	benchListening(b, func(b *testing.B, addr string) {
		clients := make(chan *benchClient, parallelism*runtime.GOMAXPROCS(0))
		for range cap(clients) {
			clients <- benchDial(b, addr)
		}
		b.ReportAllocs()
		b.SetParallelism(parallelism)
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			client := <-clients
			for pb.Next() {
				if err := client.get(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

// BenchmarkKeepAliveConnections is one connection over the loopback, with one
// request after the other.
func BenchmarkKeepAliveConnections(b *testing.B) {
	benchListening(b, func(b *testing.B, addr string) {
		client := benchDial(b, addr)
		b.ReportAllocs()
		for b.Loop() {
			if err := client.get(); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// benchClient is a connection that is kept, with a client that allocates
// nothing and costs next to nothing: what is left is the server.
type benchClient struct {
	conn      net.Conn
	request   []byte
	responses *bufio.Reader
}

// benchDial connects, and compares the first response in full.
func benchDial(b *testing.B, addr string) *benchClient {
	b.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := &benchClient{
		conn:      conn,
		request:   []byte("GET / HTTP/1.1\r\nHost: " + addr + "\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n"),
		responses: bufio.NewReader(conn),
	}
	conn.Write(c.request)
	res, err := http.ReadResponse(c.responses, nil)
	if err != nil {
		b.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || res.Close || string(body) != benchHelloText {
		b.Fatalf("got %s, close %t, %q %v, want 200 %q", res.Status, res.Close, body, err, benchHelloText)
	}
	return c
}

func (c *benchClient) get() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	return benchSkipResponse(c.responses)
}

// benchSkipResponse reads a response like the first one, without a parser.
func benchSkipResponse(responses *bufio.Reader) error {
	line, err := responses.ReadSlice('\n')
	if err == nil && !bytes.HasPrefix(line, []byte("HTTP/1.1 200 ")) {
		return fmt.Errorf("got %q, want a 200", line)
	}
	for err == nil && len(line) > len("\r\n") {
		line, err = responses.ReadSlice('\n')
	}
	if err != nil {
		return err
	}
	body, err := responses.Peek(len(benchHelloText))
	if err == nil && string(body) != benchHelloText {
		return fmt.Errorf("got body %q, want %q", body, benchHelloText)
	}
	responses.Discard(len(body))
	return err
}

// benchListening calls measure with the address of a conduit Server and of an
// http.Server with the same timeouts.
func benchListening(b *testing.B, measure func(b *testing.B, addr string)) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", benchHello)
	b.Run("conduit", func(b *testing.B) {
		srv := benchConduitServer(b, mux, slog.DiscardHandler)
		measure(b, srv.Addr().String())
	})
	b.Run("net_http", func(b *testing.B) {
		srv := benchHTTPServer(b, mux)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		go srv.Serve(l)
		b.Cleanup(func() { srv.Close() })
		measure(b, l.Addr().String())
	})
}

// benchPlain compares a handler in a conduit Server with the handler.
func benchPlain(b *testing.B, h http.Handler, c benchCase) {
	b.Run("conduit", func(b *testing.B) {
		c.run(b, benchConduitServer(b, h, slog.DiscardHandler).HTTPServer())
	})
	b.Run("net_http", func(b *testing.B) {
		c.run(b, benchHTTPServer(b, h))
	})
}

// benchMiddleware compares a middleware with the one written by hand.
func benchMiddleware(b *testing.B, c benchCase, mw, byHand conduit.Middleware) {
	sink := &benchSink{Writer: io.Discard}
	logs := slog.NewTextHandler(sink, nil)
	c.sink = sink
	// The router is outside: by hand, nothing carries the pattern out through
	// a middleware that copies the request.
	route := func(mw conduit.Middleware) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("GET /{$}", mw(http.HandlerFunc(benchHello)))
		return mux
	}
	b.Run("conduit", func(b *testing.B) {
		c.run(b, benchConduitServer(b, route(mw), logs).HTTPServer())
	})
	b.Run("conduit_alone", func(b *testing.B) {
		benchSetDefaultLogger(b, logs)
		c.run(b, benchHTTPServer(b, route(mw)))
	})
	b.Run("net_http", func(b *testing.B) {
		benchSetDefaultLogger(b, logs)
		c.run(b, benchHTTPServer(b, route(byHand)))
	})
}

// benchCase is a request, and the response it must get.
type benchCase struct {
	method, target, body string // GET, /, none
	response             string // benchHelloText
	wantID               bool   // X-Request-Id in the response
	wantLog              string // the line, without what varies
	sink                 *benchSink
}

// run measures srv's handler in process.
func (c benchCase) run(b *testing.B, srv *http.Server) {
	c.method, c.target, c.response = cmp.Or(c.method, "GET"), cmp.Or(c.target, "/"), cmp.Or(c.response, benchHelloText)
	ctx, cancel := context.WithCancel(benchContext(srv))
	defer cancel()
	r := httptest.NewRequestWithContext(ctx, c.method, c.target, nil)
	body := &benchBody{}
	if c.body != "" {
		r.Body, r.ContentLength = body, int64(len(c.body))
	}

	body.Reset(c.body)
	c.check(b, srv.Handler, r)

	w := &benchWriter{header: make(http.Header)}
	b.ReportAllocs()
	for b.Loop() {
		w.reset()
		body.Reset(c.body)
		srv.Handler.ServeHTTP(w, r)
	}
	if w.status != http.StatusOK || w.bytes != len(c.response) {
		b.Fatalf("%s %s: got %d with %d bytes in the end, want 200 with %d", c.method, c.target, w.status, w.bytes, len(c.response))
	}
}

// check fails unless the response and the log are what they should be.
func (c benchCase) check(b *testing.B, h http.Handler, r *http.Request) {
	var logged bytes.Buffer
	if c.sink != nil {
		c.sink.Writer = &logged
		defer func() { c.sink.Writer = io.Discard }()
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != http.StatusOK || w.Body.String() != c.response || w.Header().Get("Content-Type") == "" {
		b.Fatalf("%s %s: got %d %v %q, want 200 with a type and %q", c.method, c.target, w.Code, w.Header(), w.Body, c.response)
	}
	if id := w.Header().Get("X-Request-Id"); (len(id) > 20) != c.wantID {
		b.Fatalf("%s %s: got X-Request-Id %q, want one: %t", c.method, c.target, id, c.wantID)
	}
	line := logged.String()
	for pattern, with := range benchVarying {
		line = pattern.ReplaceAllString(line, with)
	}
	if strings.TrimSuffix(line, "\n") != c.wantLog {
		b.Fatalf("%s %s: got log %q, want %q", c.method, c.target, line, c.wantLog)
	}
}

const benchLogLine = `level=INFO msg=request method=GET path=/ pattern="GET /{$}" status=200 bytes=14 duration=D remote=192.0.2.1:1234`

var benchVarying = map[*regexp.Regexp]string{
	regexp.MustCompile(`^time=\S+ `):                             "",
	regexp.MustCompile(`duration=\d\S*`):                         "duration=D",
	regexp.MustCompile(`request_id=([A-Z2-7]{26}|[0-9a-f]{32})`): "request_id=ID",
}

// benchContext is like the context that net/http gives a request on a
// connection: the length of the way through it is part of the cost.
func benchContext(srv *http.Server) context.Context {
	ctx := context.Background()
	if srv.BaseContext != nil {
		ctx = srv.BaseContext(nil)
	}
	ctx = context.WithValue(ctx, http.ServerContextKey, srv)
	ctx = context.WithValue(ctx, http.LocalAddrContextKey, &net.TCPAddr{})
	return ctx
}

// benchWriter is a ResponseWriter that costs nothing.
type benchWriter struct {
	header http.Header
	status int
	bytes  int
}

func (w *benchWriter) reset() {
	clear(w.header)
	w.status, w.bytes = 0, 0
}

func (w *benchWriter) Header() http.Header { return w.header }

func (w *benchWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *benchWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	w.bytes += len(p)
	return len(p), nil
}

func (w *benchWriter) WriteString(p string) (int, error) {
	w.WriteHeader(http.StatusOK)
	w.bytes += len(p)
	return len(p), nil
}

// As net/http's own writer has it, so that nobody pays for the error.
func (w *benchWriter) SetReadDeadline(time.Time) error  { return nil }
func (w *benchWriter) SetWriteDeadline(time.Time) error { return nil }

// benchBody is a request's body that can be read again after a Reset.
type benchBody struct{ strings.Reader }

func (*benchBody) Close() error { return nil }

// benchSink is a writer that can be changed under a slog.Handler.
type benchSink struct{ io.Writer }

// benchConduitServer returns a conduit Server for h that serves.
func benchConduitServer(b *testing.B, h http.Handler, logs slog.Handler) *conduit.Server {
	b.Helper()
	srv, err := conduit.New(&conduit.Config{Handler: h, Logger: slog.New(logs)})
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	// It is called once the handler is in place and all is logged.
	serves := make(chan struct{})
	closeServes := sync.OnceFunc(func() { close(serves) })
	srv.HTTPServer().BaseContext = func(net.Listener) context.Context {
		closeServes()
		return context.Background()
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	b.Cleanup(func() {
		srv.Close()
		if err := <-served; err != nil {
			b.Error(err)
		}
	})
	<-serves
	return srv
}

// benchHTTPServer returns an http.Server for h with a conduit Server's
// timeouts.
func benchHTTPServer(b *testing.B, h http.Handler) *http.Server {
	b.Helper()
	c := conduit.DefaultConfig(h)
	return &http.Server{
		Handler:           c.Handler,
		ReadTimeout:       c.ReadTimeout,
		ReadHeaderTimeout: c.ReadHeaderTimeout,
		WriteTimeout:      c.WriteTimeout,
		IdleTimeout:       c.IdleTimeout,
		MaxHeaderBytes:    c.MaxHeaderBytes,
	}
}

// benchSetDefaultLogger makes logs slog's default until the benchmark ends.
func benchSetDefaultLogger(b *testing.B, logs slog.Handler) {
	logger, out, flags := slog.Default(), log.Writer(), log.Flags()
	slog.SetDefault(slog.New(logs))
	b.Cleanup(func() {
		// SetDefault has turned package log to slog, and does not turn it
		// back.
		slog.SetDefault(logger)
		log.SetOutput(out)
		log.SetFlags(flags)
	})
}

const benchHelloText = "hello, gopher\n"

var (
	benchHelloBytes = []byte(benchHelloText)
	benchTextType   = "text/plain; charset=utf-8"
	benchTextTypes  = []string{benchTextType}
)

// benchHello allocates nothing, so that what a benchmark reports is not its.
func benchHello(w http.ResponseWriter, r *http.Request) {
	w.Header()["Content-Type"] = benchTextTypes
	w.Write(benchHelloBytes)
}

type benchItem struct {
	ID    int      `json:"id"`
	Name  string   `json:"name"`
	Price float64  `json:"price"`
	Tags  []string `json:"tags"`
}

func benchWriteJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// benchRoutes is a small service's router.
func benchRoutes() *http.ServeMux {
	mux := http.NewServeMux()
	for _, pattern := range []string{
		"GET /{$}", "GET /about", "GET /contact", "GET /health",
		"GET /users", "POST /users", "GET /users/{id}", "PUT /users/{id}", "DELETE /users/{id}",
		"GET /users/{id}/posts", "POST /users/{id}/posts",
	} {
		mux.HandleFunc(pattern, benchHello)
	}
	mux.HandleFunc("GET /users/{id}/posts/{post}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", benchTextType)
		io.WriteString(w, r.PathValue("id")+" "+r.PathValue("post"))
	})
	return mux
}

// What follows is the chain as services write it on net/http alone.

type benchByHandIDKey struct{}

func benchByHandRequestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-ID")
		if id == "" {
			var random [16]byte
			rand.Read(random[:])
			id = hex.EncodeToString(random[:])
		}
		w.Header().Set("X-Request-ID", id)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), benchByHandIDKey{}, id)))
	})
}

func benchByHandRecovery(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if value := recover(); value != nil {
				if value == http.ErrAbortHandler {
					panic(value)
				}
				slog.ErrorContext(r.Context(), "panic", "err", value, "stack", string(debug.Stack()))
				http.Error(w, "Internal Server Error", http.StatusInternalServerError)
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// benchByHandWriter remembers status and size.
type benchByHandWriter struct {
	http.ResponseWriter
	status int
	bytes  int
}

func (w *benchByHandWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *benchByHandWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *benchByHandWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += n
	return n, err
}

func benchByHandLogging(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		recorder := &benchByHandWriter{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(recorder, r)
		level := slog.LevelInfo
		if recorder.status >= 500 {
			level = slog.LevelError
		}
		attrs := []slog.Attr{
			slog.String("method", r.Method),
			slog.String("path", r.URL.Path),
			slog.String("pattern", r.Pattern),
			slog.Int("status", recorder.status),
			slog.Int("bytes", recorder.bytes),
			slog.Duration("duration", time.Since(start)),
			slog.String("remote", r.RemoteAddr),
		}
		if id, ok := r.Context().Value(benchByHandIDKey{}).(string); ok {
			attrs = append(attrs, slog.String("request_id", id))
		}
		slog.LogAttrs(r.Context(), level, "request", attrs...)
	})
}

func benchByHandTimeout(next http.Handler) http.Handler {
	return http.TimeoutHandler(next, 30*time.Second, "Service Unavailable\n")
}

// BenchmarkCompression measures 40 KB of JSON, which a client that accepts
// gzip gets coded, and a body that is too small for it. Written by hand, the
// writer is pooled and has gzip's own level, 6, and nothing is too small.
func BenchmarkCompression(b *testing.B) {
	large := compressionJSON(40 << 10)
	for _, c := range []struct {
		name, response, accept string
		coded, byHand          bool // whether the response is, Conduit's and that of who does it by hand
	}{
		{"JSON_40KB", large, "gzip, deflate, br, zstd", true, true},
		{"tiny", benchHelloText, "gzip, deflate, br, zstd", false, true},
		{"not_accepted", large, "identity", false, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Content-Type"] = compressionJSONType
				io.WriteString(w, c.response)
			})
			b.Run("conduit", func(b *testing.B) {
				compressionBench(b, benchConduitServer(b, conduit.Compression()(h), slog.DiscardHandler).HTTPServer(), c.response, c.accept, c.coded)
			})
			b.Run("conduit_alone", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, conduit.Compression()(h)), c.response, c.accept, c.coded)
			})
			b.Run("net_http", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, compressionByHand(h)), c.response, c.accept, c.byHand)
			})
			b.Run("bare_handler", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, h), c.response, "", false)
			})
		})
	}
}

var compressionJSONType = []string{"application/json"}

// compressionJSON returns a JSON array of about n bytes, which shrinks as much
// as JSON that services send.
func compressionJSON(n int) string {
	words := strings.Fields("amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge meadow north ocean prairie quarry ridge shore tundra upland valley willow yonder")
	rng := mathrand.New(mathrand.NewPCG(1, 2))
	word := func() string { return words[rng.IntN(len(words))] }
	var items []benchItem
	for size := 0; size < n; size += 85 {
		items = append(items, benchItem{ID: rng.IntN(1e6), Name: word() + " " + word() + " " + word(), Price: float64(rng.IntN(1e5)) / 100, Tags: []string{word(), word()}})
	}
	text, err := json.Marshal(items)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func compressionBench(b *testing.B, srv *http.Server, response, accept string, coded bool) {
	ctx, cancel := context.WithCancel(benchContext(srv))
	defer cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	r.Header.Set("Accept-Encoding", accept)

	rec := httptest.NewRecorder()
	srv.Handler.ServeHTTP(rec, r)
	body, coding := rec.Body.String(), ""
	if coded {
		body, coding = compressionDecode(b, body), "gzip"
	}
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Encoding") != coding || body != response {
		b.Fatalf("got %d %v with %d bytes, want 200 in the coding %q with %d", rec.Code, rec.Header(), len(body), coding, len(response))
	}

	w := &benchWriter{header: make(http.Header)}
	b.ReportAllocs()
	b.SetBytes(int64(len(response)))
	for b.Loop() {
		w.reset()
		srv.Handler.ServeHTTP(w, r)
	}
	b.ReportMetric(float64(rec.Body.Len()), "sent-B")
	if w.status != http.StatusOK || w.bytes != rec.Body.Len() {
		b.Fatalf("got %d with %d bytes in the end, want 200 with %d", w.status, w.bytes, rec.Body.Len())
	}
}

// compressionByHand is what a service without a library does.
func compressionByHand(next http.Handler) http.Handler {
	pool := sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept-Encoding")
		if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := pool.Get().(*gzip.Writer)
		defer pool.Put(z)
		z.Reset(w)
		defer z.Close()
		next.ServeHTTP(compressionByHandWriter{w, z}, r)
	})
}

type compressionByHandWriter struct {
	http.ResponseWriter
	z *gzip.Writer
}

func (w compressionByHandWriter) Write(p []byte) (int, error) { return w.z.Write(p) }

// BenchmarkStaticFileServing serves one file in process, with writers that
// throw away what they get. Without a connection there is no sendfile: the file
// of 1 MiB, which neither has in memory, is read by both. By hand it is
// http.FileServer, and for the script a file that was compressed before.
func BenchmarkStaticFileServing(b *testing.B) {
	dir := b.TempDir()
	var coded bytes.Buffer
	z := gzip.NewWriter(&coded)
	z.Write(staticText(131 << 10))
	z.Close()
	for name, content := range map[string][]byte{
		"small.txt":    staticText(4 << 10),
		"script.js":    staticText(131 << 10),
		"script.js.gz": coded.Bytes(),
		"large.txt":    staticText(1 << 20),
	} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, content, 0o600); err != nil {
			b.Fatal(err)
		}
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(file, long, long); err != nil {
			b.Fatal(err)
		}
	}
	// Of a file that has just changed a FileServer has the bytes in memory,
	// however large it is.
	time.Sleep(1100 * time.Millisecond)
	files := conduit.NewFileServer(dir, "")
	defer files.Close()
	byHand := http.FileServer(http.Dir(dir))
	for _, c := range []staticCase{
		{name: "hit_4KB", byHand: byHand, target: "/small.txt", size: 4 << 10},
		{name: "not_modified", byHand: byHand, target: "/small.txt", size: 4 << 10, revalidate: true},
		{name: "gzip_131KB", byHand: staticCodedByHand(dir), target: "/script.js", size: 131 << 10, coded: true},
		{name: "large_1MB", byHand: byHand, target: "/large.txt", size: 1 << 20},
	} {
		b.Run(c.name+"/conduit", func(b *testing.B) { c.run(b, files) })
		b.Run(c.name+"/net_http", func(b *testing.B) { c.run(b, c.byHand) })
	}
}

// staticCodedByHand sends the compressed file beside the one that is asked
// for.
func staticCodedByHand(dir string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Vary", "Accept-Encoding")
		w.Header().Set("Content-Type", mime.TypeByExtension(path.Ext(r.URL.Path)))
		name := filepath.Join(dir, filepath.FromSlash(path.Clean(r.URL.Path)))
		if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			w.Header().Set("Content-Encoding", "gzip")
			name += ".gz"
		}
		http.ServeFile(w, r, name)
	})
}

// staticCase is a file, and how it is asked for.
type staticCase struct {
	name, target string
	byHand       http.Handler
	size         int
	revalidate   bool // with what a browser has been given, for a 304
	coded        bool // with gzip
}

func (c staticCase) run(b *testing.B, h http.Handler) {
	r := httptest.NewRequest("GET", c.target, nil)
	if c.coded {
		r.Header.Set("Accept-Encoding", "gzip")
	}
	status, length := c.check(b, h, r)
	w := &staticDiscard{header: make(http.Header)}
	b.ReportAllocs()
	for b.Loop() {
		clear(w.header)
		w.status, w.bytes = http.StatusOK, 0
		h.ServeHTTP(w, r)
		if w.status != status || w.bytes != int64(length) {
			b.Fatalf("got %d with %d bytes, want %d with %d", w.status, w.bytes, status, length)
		}
	}
}

// check compares the response with the file, makes r the one that is measured, and
// returns the status and the length that its response has.
func (c staticCase) check(b *testing.B, h http.Handler, r *http.Request) (status, length int) {
	b.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	body, coding := rec.Body.String(), ""
	if c.coded {
		body, coding = compressionDecode(b, body), "gzip"
	}
	header := rec.Header()
	if rec.Code != http.StatusOK || header.Get("Content-Encoding") != coding || header.Get("Content-Type") == "" || body != string(staticText(c.size)) {
		b.Fatalf("%s: got %d %v with %d bytes, want 200 in the coding %q with the file's %d", c.target, rec.Code, header, len(body), coding, c.size)
	}
	if !c.revalidate {
		return rec.Code, rec.Body.Len()
	}
	if tag := header.Get("Etag"); tag != "" {
		r.Header.Set("If-None-Match", tag)
	}
	r.Header.Set("If-Modified-Since", header.Get("Last-Modified"))
	rec = httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	if rec.Code != http.StatusNotModified || rec.Body.Len() > 0 {
		b.Fatalf("%s: got %d with %d bytes, want 304 without a body", c.target, rec.Code, rec.Body.Len())
	}
	return rec.Code, 0
}

// staticDiscard is a ResponseWriter that keeps nothing but the header and how
// much there was.
type staticDiscard struct {
	header http.Header
	status int
	bytes  int64
}

func (w *staticDiscard) Header() http.Header    { return w.header }
func (w *staticDiscard) WriteHeader(status int) { w.status = status }

func (w *staticDiscard) Write(p []byte) (int, error) {
	w.bytes += int64(len(p))
	return len(p), nil
}

func (w *staticDiscard) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(io.Discard, src)
	w.bytes += n
	return n, err
}

// staticText returns text that gzip shrinks about as much as a script.
func staticText(size int) []byte {
	var buf bytes.Buffer
	for i := 0; buf.Len() < size; i++ {
		fmt.Fprintf(&buf, "function f%d(a, b) { return a * %d + b[%q]; }\n", i, i*7919%10007, fmt.Sprint("key", i*31%97))
	}
	return buf.Bytes()[:size]
}

// BenchmarkJSONStream is an array of 1,000 small items over the loopback. By
// hand it is a loop around json.Encoder, with one flush at the end or one for
// each item.
func BenchmarkJSONStream(b *testing.B) {
	const n = 1000
	items := make([]streamBenchItem, n)
	for i := range items {
		items[i] = streamBenchItem{ID: i, Name: "item " + strconv.Itoa(i), Price: 19.99}
	}
	response, err := json.Marshal(items)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("conduit", func(b *testing.B) {
		streamBench(b, func(w http.ResponseWriter, r *http.Request) {
			if err := conduit.StreamJSON(w, r, streamBenchSeq(items)); err != nil {
				b.Error(err)
			}
		}, n, string(response))
	})
	b.Run("conduit_channel", func(b *testing.B) {
		streamBench(b, func(w http.ResponseWriter, r *http.Request) {
			ch := make(chan any, 16)
			go func() {
				defer close(ch)
				for i := range items {
					select {
					case ch <- &items[i]:
					case <-r.Context().Done():
						return
					}
				}
			}()
			s, err := conduit.NewJSONStream(w, r)
			if err == nil {
				err = s.WriteJSONArray(ch)
			}
			if err != nil {
				b.Error(err)
			}
		}, n, string(response))
	})
	b.Run("conduit_write", func(b *testing.B) {
		streamBench(b, func(w http.ResponseWriter, r *http.Request) {
			s, err := conduit.NewJSONStream(w, r)
			if err != nil {
				b.Error(err)
				return
			}
			for i := range items {
				if err := s.Write(&items[i]); err != nil {
					b.Error(err)
				}
			}
			if err := s.Close(); err != nil {
				b.Error(err)
			}
		}, n, string(response))
	})
	byHand := func(flushEach bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			flusher := w.(http.Flusher)
			encoder := json.NewEncoder(w)
			io.WriteString(w, "[")
			for i := range items {
				if i > 0 {
					io.WriteString(w, ",")
				}
				if err := encoder.Encode(&items[i]); err != nil {
					b.Error(err)
				}
				if flushEach {
					flusher.Flush()
				}
			}
			io.WriteString(w, "]")
			flusher.Flush()
		}
	}
	b.Run("net_http", func(b *testing.B) { streamBench(b, byHand(false), n, string(response)) })
	b.Run("net_http_flush_each", func(b *testing.B) { streamBench(b, byHand(true), n, string(response)) })
}

type streamBenchItem struct {
	ID    int     `json:"id"`
	Name  string  `json:"name"`
	Price float64 `json:"price"`
}

func streamBenchSeq[T any](items []T) func(yield func(T, error) bool) {
	return func(yield func(T, error) bool) {
		for _, item := range items {
			if !yield(item, nil) {
				return
			}
		}
	}
}

// streamBench asks for the same stream again and again over one connection,
// with a client that costs next to nothing. The response is compared once, without
// line breaks.
func streamBench(b *testing.B, h http.HandlerFunc, n int, want string) {
	srv := benchConduitServer(b, h, slog.DiscardHandler)
	conn, err := net.Dial("tcp", srv.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	request := []byte("GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
	conn.Write(request)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		b.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || len(res.TransferEncoding) == 0 || string(bytes.ReplaceAll(body, []byte("\n"), nil)) != want {
		b.Fatalf("got %s, in chunks %v, %.100q, %v; want 200 and %.100q", res.Status, res.TransferEncoding, body, err, want)
	}
	end := []byte("\r\n0\r\n\r\n")
	buf := make([]byte, 256<<10)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := conn.Write(request); err != nil {
			b.Fatal(err)
		}
		got := 0
		for !bytes.HasSuffix(buf[:got], end) {
			m, err := conn.Read(buf[got:])
			if err != nil {
				b.Fatal(err)
			}
			got += m
		}
		if got < len(body) {
			b.Fatalf("got %d bytes, want more than %d", got, len(body))
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/item")
}

// BenchmarkSSE is 1,000 events from a channel of 16 places over the loopback,
// and the cost of one event alone.
func BenchmarkSSE(b *testing.B) {
	const n = 1000
	var want string
	events := make([]*conduit.SSEEvent, n)
	for i := range events {
		events[i] = &conduit.SSEEvent{ID: strconv.Itoa(i), Event: "tick", Data: `{"price":19.99}`}
		want += "id: " + events[i].ID + "event: tickdata: " + events[i].Data
	}
	source := func(r *http.Request) <-chan *conduit.SSEEvent {
		ch := make(chan *conduit.SSEEvent, 16)
		go func() {
			defer close(ch)
			for _, e := range events {
				select {
				case ch <- e:
				case <-r.Context().Done():
					return
				}
			}
		}()
		return ch
	}
	b.Run("conduit", func(b *testing.B) {
		streamBench(b, func(w http.ResponseWriter, r *http.Request) {
			s, err := conduit.NewSSEStream(w, r)
			if err == nil {
				err = s.Serve(source(r))
			}
			if err != nil {
				b.Error(err)
			}
		}, n, want)
	})
	b.Run("net_http_flush_each", func(b *testing.B) {
		streamBench(b, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			flusher := w.(http.Flusher)
			for e := range source(r) {
				fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.ID, e.Event, e.Data)
				flusher.Flush()
			}
		}, n, want)
	})
	b.Run("format", func(b *testing.B) {
		w := &streamBenchWriter{header: make(http.Header)}
		s, err := conduit.NewSSEStream(w, httptest.NewRequestWithContext(context.Background(), "GET", "/", nil))
		if err != nil {
			b.Fatal(err)
		}
		e := &conduit.SSEEvent{ID: "42", Event: "tick", Data: "{\"price\":19.99,\n\"name\":\"item\"}"}
		b.ReportAllocs()
		for b.Loop() {
			if err := s.WriteSSE(e); err != nil {
				b.Fatal(err)
			}
		}
		if w.n == 0 {
			b.Fatal("nothing was written")
		}
	})
}

// streamBenchWriter throws away what it gets, and has all that net/http's own
// has.
type streamBenchWriter struct {
	header http.Header
	n      int64
}

func (w *streamBenchWriter) Header() http.Header              { return w.header }
func (w *streamBenchWriter) WriteHeader(int)                  {}
func (w *streamBenchWriter) FlushError() error                { return nil }
func (w *streamBenchWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *streamBenchWriter) Write(p []byte) (int, error)      { w.n += int64(len(p)); return len(p), nil }

func (w *streamBenchWriter) WriteString(s string) (int, error) {
	w.n += int64(len(s))
	return len(s), nil
}

// BenchmarkSSEBroker publishes to clients over the loopback, no faster than
// they take it: an operation is 100 events that have reached all of them. By
// hand, each client has a channel, and each event is formatted and flushed for
// each client.
func BenchmarkSSEBroker(b *testing.B) {
	for _, clients := range []int{100, 1000} {
		b.Run(fmt.Sprint(clients, "/conduit"), func(b *testing.B) {
			broker := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: 4096})
			defer broker.Close()
			sseBenchBroker(b, broker, clients, func(e *conduit.SSEEvent) {
				if err := broker.Publish(e); err != nil {
					b.Error(err)
				}
			})
		})
		b.Run(fmt.Sprint(clients, "/by_hand"), func(b *testing.B) {
			var mu sync.Mutex
			channels := make(map[chan *conduit.SSEEvent]bool)
			h := func(w http.ResponseWriter, r *http.Request) {
				ch := make(chan *conduit.SSEEvent, 4096)
				mu.Lock()
				channels[ch] = true
				mu.Unlock()
				defer func() {
					mu.Lock()
					delete(channels, ch)
					mu.Unlock()
				}()
				w.Header().Set("Content-Type", "text/event-stream")
				flusher := w.(http.Flusher)
				flusher.Flush()
				for {
					select {
					case e := <-ch:
						fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.ID, e.Event, e.Data)
						flusher.Flush()
					case <-r.Context().Done():
						return
					}
				}
			}
			sseBenchBroker(b, http.HandlerFunc(h), clients, func(e *conduit.SSEEvent) {
				mu.Lock()
				defer mu.Unlock()
				for ch := range channels {
					ch <- e
				}
			})
		})
	}
}

// sseBenchBroker publishes in rounds, each of which has to reach every client
// before the next one.
func sseBenchBroker(b *testing.B, h http.Handler, clients int, publish func(*conduit.SSEEvent)) {
	const round = 100
	srv := benchConduitServer(b, h, slog.DiscardHandler)
	addr := srv.Addr().String()
	var arrived sync.WaitGroup
	var readers sync.WaitGroup
	conns := make([]net.Conn, clients)
	end := []byte("data: end of the round\n")
	for i := range conns {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		conns[i] = conn
		fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
		in := bufio.NewReaderSize(conn, 4<<10)
		for line := []byte("xxx"); len(line) > len("\r\n"); {
			if line, err = in.ReadSlice('\n'); err != nil {
				b.Fatal(err)
			}
		}
		// A chunk may end anywhere in a line.
		body := bufio.NewReaderSize(httputil.NewChunkedReader(in), 4<<10)
		readers.Go(func() {
			for {
				line, err := body.ReadSlice('\n')
				if err != nil {
					return
				}
				if bytes.Equal(line, end) {
					arrived.Done()
				}
			}
		})
	}
	defer readers.Wait()
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	event := &conduit.SSEEvent{ID: "42", Event: "tick", Data: `{"price":19.99}`}
	last := &conduit.SSEEvent{ID: "43", Event: "tick", Data: "end of the round"}
	turn := func() {
		arrived.Add(clients)
		for range round - 1 {
			publish(event)
		}
		publish(last)
		arrived.Wait()
	}
	turn()
	b.ReportAllocs()
	for b.Loop() {
		turn()
	}
	perEvent := float64(b.Elapsed().Nanoseconds()) / float64(b.N) / round
	b.ReportMetric(perEvent, "ns/event")
	b.ReportMetric(perEvent/float64(clients), "ns/event/client")
}

// read is ReadRuntimeStats. ReadMemStats is what programs call today for fewer
// numbers, and stops the world. JSON and Prometheus are the endpoint's responses,
// with the numbers of the process and the pool.
func BenchmarkRuntimeStats(b *testing.B) {
	b.Run("read", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = conduit.ReadRuntimeStats()
		}
	})
	b.Run("ReadMemStats", func(b *testing.B) {
		b.ReportAllocs()
		var m runtime.MemStats
		for b.Loop() {
			runtime.ReadMemStats(&m)
		}
	})
	db := sql.OpenDB(new(scriptedDatabase))
	defer db.Close()
	p := profilingNew(b, &conduit.ProfilingConfig{DB: db})
	for name, query := range map[string]string{"JSON": "", "Prometheus": "?format=prometheus"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			r := httptest.NewRequest("GET", "/debug/pprof/stats"+query, nil)
			r.RemoteAddr, r.Host = "127.0.0.1:1", "localhost"
			w := &benchWriter{header: make(http.Header)}
			for b.Loop() {
				w.reset()
				p.ServeHTTP(w, r)
			}
			if w.status != http.StatusOK || w.bytes < 500 {
				b.Errorf("%d with %d bytes", w.status, w.bytes)
			}
		})
	}
}

// What SlowRequests costs a request that is not slow.
func BenchmarkSlowRequests(b *testing.B) {
	p := profilingNew(b, &conduit.ProfilingConfig{FlightRecorder: 1e9})
	h := p.SlowRequests(1e12, b.TempDir())(http.HandlerFunc(benchHello))
	for name, h := range map[string]http.Handler{"conduit": h, "bare_handler": http.HandlerFunc(benchHello)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			srv := benchConduitServer(b, h, slog.DiscardHandler)
			r := httptest.NewRequest("GET", "/", nil).WithContext(context.WithValue(b.Context(), http.ServerContextKey, srv.HTTPServer()))
			w := &benchWriter{header: make(http.Header)}
			for b.Loop() {
				w.reset()
				srv.HTTPServer().Handler.ServeHTTP(w, r)
			}
		})
	}
}
