// This file starts servers with the middleware of chi, echo and gin, each beside one
// with Conduit's or with what ../examples/migration.md names in its place. It proves
// each row of that page's tables with the same requests to both sides, and that the
// page has no row, no name and no code that is not run here.

package conformance

import (
	stdgzip "compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	stdlog "log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	gincors "github.com/gin-contrib/cors"
	"github.com/gin-contrib/gzip"
	"github.com/gin-contrib/pprof"
	"github.com/gin-contrib/requestid"
	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	chicors "github.com/go-chi/cors"
	"github.com/go-chi/httprate"
	"github.com/labstack/echo/v4"
	echomiddleware "github.com/labstack/echo/v4/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/cors"
	"golang.org/x/time/rate"

	"example.com/conduit"
)

const migrationPage = "../examples/migration.md"

// migrations has the test of each row of the tables.
var migrations = map[string]func(t *testing.T){
	"order":             migrateOrder,
	"request id":        migrateRequestID,
	"panic":             migratePanic,
	"log":               migrateLog,
	"timeout":           migrateTimeout,
	"compression":       migrateCompression,
	"health":            migrateHealth,
	"profiles":          migrateProfiles,
	"files":             migrateFiles,
	"events":            migrateEvents,
	"start and stop":    migrateStartAndStop,
	"parameter":         migrateParameter,
	"CORS":              migrateCORS,
	"rate limit":        migrateRateLimit,
	"basic auth":        migrateBasicAuth,
	"real IP":           migrateRealIP,
	"CSRF":              migrateCSRF,
	"body limit":        migrateBodyLimit,
	"metrics per route": migrateMetrics,
}

func TestMigration(t *testing.T) {
	gin.SetMode(gin.ReleaseMode)
	errorWriter := gin.DefaultErrorWriter
	gin.DefaultErrorWriter = io.Discard // of Recovery, which prints the stack of a panic
	t.Cleanup(func() { gin.DefaultErrorWriter = errorWriter })
	for name, test := range migrations {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t)
		})
	}
}

func TestMigrationShowsTestedCode(t *testing.T) {
	t.Parallel()
	wantSnippetsIn(t, migrationPage, "migration_test.go")
}

// Every row has a test, and the test uses every name that the row has.
func TestMigrationRowsHaveTests(t *testing.T) {
	t.Parallel()
	// As this file imports them, column by column.
	columns := []*strings.Replacer{
		nil, // the subject
		strings.NewReplacer("middleware.", "chimiddleware.", "cors.", "chicors."),
		strings.NewReplacer("middleware.", "echomiddleware."),
		strings.NewReplacer("cors.", "gincors."),
		strings.NewReplacer(),
	}
	sources, seen := migrationSources(t), map[string]bool{}
	for line := range strings.Lines(readText(t, migrationPage)) {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| |") {
			continue
		}
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		name := strings.TrimSpace(cells[0])
		source, ok := sources[name]
		if !ok {
			t.Errorf("the row %q has no test", name)
			continue
		}
		seen[name] = true
		for i, replacer := range columns {
			if replacer == nil {
				continue
			}
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[i], -1) {
				use := replacer.Replace(m[1])
				if !strings.Contains(use, ".") {
					use = "conduit." + use
				}
				if !regexp.MustCompile(`(^|[^\w.])` + regexp.QuoteMeta(use) + `\b`).MatchString(source) {
					t.Errorf("the test of the row %q does not use %s", name, use)
				}
			}
		}
	}
	for name := range migrations {
		if !seen[name] {
			t.Errorf("%s has no row %q", migrationPage, name)
		}
	}
}

// migrationSources returns the source of each test of migrations, with that of the
// page's middleware which it calls.
func migrationSources(t *testing.T) map[string]string {
	t.Helper()
	const name = "migration_test.go"
	text, positions := readText(t, name), token.NewFileSet()
	file, err := parser.ParseFile(positions, name, text, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	functions := map[string]string{}
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok {
			functions[f.Name.Name] = text[positions.Position(f.Body.Pos()).Offset:positions.Position(f.Body.End()).Offset]
		}
	}
	sources := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^\t"([^"]+)": +(migrate\w+),$`).FindAllStringSubmatch(text, -1) {
		sources[m[1]] = functions[m[2]]
		for _, middleware := range []string{"rateLimit", "basicAuth", "bodyLimit"} {
			if strings.Contains(functions[m[2]], middleware) {
				sources[m[1]] += functions[middleware]
			}
		}
	}
	return sources
}

// onChi, onEcho and onGin return routers with their own middleware, and one handler
// for whatever is asked.
func onChi(h http.Handler, middleware ...func(http.Handler) http.Handler) http.Handler {
	r := chi.NewRouter()
	r.Use(middleware...)
	r.Handle("/*", h)
	return r
}

func onEcho(h http.Handler, middleware ...echo.MiddlewareFunc) http.Handler {
	e := echo.New()
	e.Logger.SetOutput(io.Discard)
	e.Use(middleware...)
	e.Any("/*", echo.WrapHandler(h))
	return e
}

func onGin(h http.Handler, middleware ...gin.HandlerFunc) http.Handler {
	r := gin.New()
	r.Use(middleware...)
	r.Any("/*path", gin.WrapH(h))
	return r
}

// sides are servers that are to be compared, by name.
type sides map[string]string

// newSides starts a server for each handler: Conduit's for the one named conduit, and
// net/http's for the others. It returns their URLs.
func newSides(t *testing.T, handlers map[string]http.Handler) sides {
	t.Helper()
	s := sides{}
	for name, h := range handlers {
		if name == "conduit" {
			s[name] = serve(t, conduit.DefaultConfig(h)).url
			continue
		}
		srv := httptest.NewUnstartedServer(h)
		srv.Config.ErrorLog = stdlog.New(io.Discard, "", 0)
		srv.Start()
		t.Cleanup(srv.Close)
		s[name] = srv.URL
	}
	return s
}

// response is what a client gets.
type response struct {
	status int // 0 without a response
	body   string
	header http.Header
	close  bool  // the server closes the connection
	err    error // of the request, or of reading the body
}

// send sends a request to each side.
func (s sides) send(method, path, body string, fields ...string) map[string]response {
	responses := map[string]response{}
	for name, url := range s {
		responses[name] = send(method, url+path, body, fields...)
	}
	return responses
}

// send sends a request and follows no redirection. The fields of its header come in
// pairs. Any goroutine may call it.
func send(method, url, body string, fields ...string) response {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return response{err: err}
	}
	for i := 0; i < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return response{err: err}
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return response{resp.StatusCode, string(got), resp.Header, resp.Close, err}
}

// wantEach fails unless each side has sent the same.
func wantEach(t *testing.T, what string, responses map[string]response, of func(response) any, want any) {
	t.Helper()
	for name, r := range responses {
		if got := of(r); got != want {
			t.Errorf("%s: %s: %v, want %v (%d %.100q %v %v)", what, name, got, want, r.status, r.body, r.header, r.err)
		}
	}
}

func status(r response) any { return r.status }

func body(r response) any { return r.body }

func whole(r response) any { return r.err == nil }

func field(name string) func(response) any {
	return func(r response) any { return r.header.Get(name) }
}

// except returns the responses without those of the named sides, which differ.
func except(responses map[string]response, names ...string) map[string]response {
	rest := maps.Clone(responses)
	for _, name := range names {
		delete(rest, name)
	}
	return rest
}

func migrateOrder(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header["Order"], conduit.RequestIDFrom(r.Context()))
	})
	step := func(name string) conduit.Middleware {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				r.Header.Add("Order", name)
				next.ServeHTTP(w, r)
			})
		}
	}
	handlers := map[string]http.Handler{
		"conduit": conduit.Chain(conduit.RequestID(), step("first"), step("second"))(h),
	}
	{
		r := chi.NewRouter()
		r.Use(conduit.RequestID(), step("first"), step("second"))
		r.Handle("/*", h)
		handlers["chi"] = r
	}
	{
		e := echo.New()
		e.Use(echo.WrapMiddleware(conduit.RequestID()), echo.WrapMiddleware(step("first")), echo.WrapMiddleware(step("second")))
		e.Any("/*", echo.WrapHandler(h))
		handlers["echo"] = e
	}
	{
		r := gin.New()
		r.Use(func(c *gin.Context) { c.Request.Header.Add("Order", "first") }, func(c *gin.Context) { c.Request.Header.Add("Order", "second") })
		r.Any("/*path", gin.WrapH(h))
		handlers["gin"] = conduit.RequestID()(r)
	}
	// chi's own middleware in a chain.
	handlers["chi's in Chain"] = conduit.Chain(conduit.RequestID(), chimiddleware.SetHeader("X", "y"), step("first"), chimiddleware.StripSlashes, step("second"))(h)

	responses := newSides(t, handlers).send("GET", "/", "", "X-Request-ID", "5f3a-17")
	wantEach(t, "order", responses, body, "[first second]5f3a-17")
}

func migrateRequestID(t *testing.T) {
	e := echo.New()
	e.Use(echomiddleware.RequestID())
	e.GET("/", func(c echo.Context) error {
		return c.String(http.StatusOK, c.Response().Header().Get(echo.HeaderXRequestID))
	})
	r := gin.New()
	r.Use(requestid.New())
	r.GET("/", func(c *gin.Context) { c.String(http.StatusOK, requestid.Get(c)) })
	s := newSides(t, map[string]http.Handler{
		"chi": onChi(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, chimiddleware.GetReqID(r.Context()))
		}), chimiddleware.RequestID),
		"echo": e,
		"gin":  r,
		"conduit": conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, conduit.RequestIDFrom(r.Context()))
		})),
	})

	responses := s.send("GET", "/", "", "X-Request-ID", "5f3a-17")
	wantEach(t, "an incoming id", responses, body, "5f3a-17")
	wantEach(t, "an incoming id", except(responses, "chi"), field("X-Request-Id"), "5f3a-17")
	if id := responses["chi"].header.Get("X-Request-Id"); id != "" {
		t.Errorf("chi sends the id %q, of which the page says that it does not", id)
	}
	for name, r := range s.send("GET", "/", "") {
		if r.body == "" || name != "chi" && r.header.Get("X-Request-Id") != r.body {
			t.Errorf("a new id: %s: %q and %v", name, r.body, r.header)
		}
	}
	made := send("GET", s["chi"], "").body
	if !strings.Contains(made, "/") {
		t.Errorf("chi makes the id %q, want one with a slash", made)
	}
	for _, unfit := range []string{`" level=error`, made} {
		responses = s.send("GET", "/", "", "X-Request-ID", unfit)
		wantEach(t, "an unfit id", except(responses, "conduit"), body, unfit)
		if id := responses["conduit"].body; len(id) != 26 {
			t.Errorf("an unfit id: conduit: %q", id)
		}
	}
}

func migratePanic(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/late" {
			io.WriteString(w, "half of it")
			http.NewResponseController(w).Flush()
		}
		panic("on purpose")
	})
	s := newSides(t, map[string]http.Handler{
		"chi":     onChi(h, chimiddleware.RequestLogger(silence{}), chimiddleware.Recoverer),
		"echo":    onEcho(h, echomiddleware.Recover()),
		"gin":     onGin(h, gin.Recovery()),
		"conduit": conduit.Recovery()(h),
	})
	wantEach(t, "a panic", s.send("GET", "/", ""), status, http.StatusInternalServerError)
	responses := s.send("GET", "/late", "")
	wantEach(t, "a panic in the middle", responses, status, http.StatusOK)
	wantEach(t, "a panic in the middle", except(responses, "conduit"), whole, true)
	if err := responses["conduit"].err; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a panic in the middle: conduit: %v, want %v", err, io.ErrUnexpectedEOF)
	}

	// Recovery is outside of Logging, and the line has the status all the same.
	var log lines
	cfg := conduit.DefaultConfig(conduit.Chain(conduit.Recovery(), conduit.Logging())(h))
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	send("GET", serve(t, cfg).url, "")
	if !strings.Contains(log.String(), "level=ERROR msg=request method=GET path=/ pattern=\"\" status=500 ") {
		t.Errorf("the log has no line of the panic with status 500:\n%s", &log)
	}
}

// silence keeps chi from printing the stack of a panic.
type silence struct{}

func (s silence) NewLogEntry(*http.Request) chimiddleware.LogEntry { return s }

func (silence) Write(int, int, http.Header, time.Duration, any) {}

func (silence) Panic(any, []byte) {}

func migrateLog(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "ok") })
	logs := map[string]*lines{"chi": {}, "echo": {}, "gin": {}, "conduit": {}}

	before := chimiddleware.DefaultLogger
	t.Cleanup(func() { chimiddleware.DefaultLogger = before })
	chimiddleware.DefaultLogger = chimiddleware.RequestLogger(&chimiddleware.DefaultLogFormatter{Logger: stdlog.New(logs["chi"], "", 0), NoColor: true})
	s := newSides(t, map[string]http.Handler{
		"chi": onChi(h, chimiddleware.Logger),
		"echo": onEcho(h, echomiddleware.RequestLogger(), echomiddleware.RequestLoggerWithConfig(echomiddleware.RequestLoggerConfig{
			LogURI: true, LogMethod: true, LogStatus: true,
			Skipper: func(c echo.Context) bool { return c.Request().URL.Path == "/health" },
			LogValuesFunc: func(_ echo.Context, v echomiddleware.RequestLoggerValues) error {
				fmt.Fprintln(logs["echo"], v.Method, v.URI, v.Status)
				return nil
			},
		})),
		"gin": onGin(h, gin.LoggerWithConfig(gin.LoggerConfig{Output: logs["gin"], SkipPaths: []string{"/health"}})),
	})
	cfg := conduit.DefaultConfig(conduit.LoggingWith(&conduit.LoggingConfig{
		Skip: func(r *http.Request) bool { return r.URL.Path == "/health" },
	})(h))
	cfg.Logger = slog.New(slog.NewTextHandler(logs["conduit"], nil))
	s["conduit"] = serve(t, cfg).url
	var plain lines
	cfg = conduit.DefaultConfig(conduit.Logging()(h))
	cfg.Logger = slog.New(slog.NewTextHandler(&plain, nil))
	send("GET", serve(t, cfg).url+"/orders/42", "")

	wantEach(t, "health", s.send("GET", "/health", ""), status, http.StatusOK)
	wantEach(t, "logged", s.send("GET", "/orders/42?token=secret", ""), status, http.StatusOK)
	for name, log := range logs {
		eventually(t, name+"'s log has the request", func() bool { return strings.Contains(log.String(), "/orders/42") })
		if got := log.String(); !strings.Contains(got, "GET") || !strings.Contains(got, "200") || strings.Contains(got, "/health") && name != "chi" {
			t.Errorf("%s's log:\n%s", name, got)
		}
		if got := strings.Contains(log.String(), "secret"); got != (name != "conduit") {
			t.Errorf("%s's log has the query: %t\n%s", name, got, log)
		}
	}
	eventually(t, "the log of Logging has the request", func() bool { return strings.Contains(plain.String(), "path=/orders/42 ") })
}

func migrateTimeout(t *testing.T) {
	const d = 50 * time.Millisecond
	asked, release := make(chan struct{}, 4), make(chan struct{})
	heeds := func(r *http.Request) error { <-r.Context().Done(); return r.Context().Err() }
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/heeds" {
			heeds(r)
			return
		}
		asked <- struct{}{}
		<-release
		io.WriteString(w, "late")
	})
	e := echo.New()
	e.Use(echomiddleware.ContextTimeout(d))
	e.GET("/heeds", func(c echo.Context) error { return heeds(c.Request()) })
	e.GET("/*", echo.WrapHandler(h))
	s := newSides(t, map[string]http.Handler{
		"chi":     onChi(h, chimiddleware.Timeout(d)),
		"echo":    e,
		"conduit": conduit.Timeout(d)(h),
	})
	as := newSides(t, map[string]http.Handler{
		"conduit": conduit.TimeoutWith(&conduit.TimeoutConfig{Duration: d, Status: http.StatusGatewayTimeout})(h),
	})
	responses := s.send("GET", "/heeds", "")
	wantEach(t, "a handler that heeds its context", except(responses, "chi"), status, http.StatusServiceUnavailable)
	wantEach(t, "chi's status", map[string]response{"chi": responses["chi"], "conduit": as.send("GET", "/heeds", "")["conduit"]}, status, http.StatusGatewayTimeout)

	// The others wait for a handler that does not. The second response of Conduit comes
	// when their time is up too.
	others := make(chan map[string]response, 2)
	for _, name := range []string{"chi", "echo"} {
		go func() { others <- sides{name: s[name]}.send("GET", "/stuck", "") }()
		<-asked
	}
	for range 2 {
		if r := send("GET", s["conduit"]+"/stuck", ""); r.status != http.StatusServiceUnavailable {
			t.Errorf("a stuck handler: conduit: %d, want 503", r.status)
		}
	}
	close(release)
	for range 2 {
		wantEach(t, "a late handler", <-others, body, "late")
	}
}

func migrateCompression(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if r.URL.Path == "/short" {
			io.WriteString(w, "short")
			return
		}
		io.WriteString(w, strings.Repeat("text that shrinks ", 1000))
	})
	s := newSides(t, map[string]http.Handler{
		"chi":     onChi(h, chimiddleware.Compress(5)),
		"echo":    onEcho(h, echomiddleware.Gzip()),
		"gin":     onGin(h, gzip.Gzip(gzip.DefaultCompression)),
		"conduit": conduit.Compression()(h),
	})
	responses := s.send("GET", "/", "", "Accept-Encoding", "gzip")
	wantEach(t, "a long body", responses, field("Content-Encoding"), "gzip")
	wantEach(t, "a long body", responses, field("Vary"), "Accept-Encoding")
	wantEach(t, "a long body", responses, func(r response) any {
		z, err := stdgzip.NewReader(strings.NewReader(r.body))
		if err != nil {
			return err
		}
		plain, err := io.ReadAll(z)
		return err == nil && string(plain) == strings.Repeat("text that shrinks ", 1000)
	}, true)
	wantEach(t, "a client without gzip", s.send("GET", "/", "", "Accept-Encoding", "identity"), field("Content-Encoding"), "")
	responses = s.send("GET", "/short", "", "Accept-Encoding", "gzip")
	wantEach(t, "a short body", except(responses, "conduit"), field("Content-Encoding"), "gzip")
	if got := responses["conduit"]; got.header.Get("Content-Encoding") != "" || got.body != "short" {
		t.Errorf("a short body: conduit: %+v", got)
	}
}

func migrateHealth(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle("GET /ping", conduit.Health())
	srv := serve(t, conduit.DefaultConfig(mux))
	s := newSides(t, map[string]http.Handler{"chi": onChi(http.NotFoundHandler(), chimiddleware.Heartbeat("/ping"))})
	s["conduit"] = srv.url
	wantEach(t, "health", s.send("GET", "/ping", ""), status, http.StatusOK)
	srv.Drain()
	if r := send("GET", srv.url+"/ping", ""); r.status != http.StatusServiceUnavailable || r.body != `{"status":"draining"}` {
		t.Errorf("health during a drain: %d %q", r.status, r.body)
	}
}

func migrateProfiles(t *testing.T) {
	withChi := chi.NewRouter()
	withChi.Mount("/debug", chimiddleware.Profiler())
	withGin := gin.New()
	pprof.Register(withGin)
	mux := http.NewServeMux()
	conduit.EnableDefaultProfiling(mux)
	p, err := conduit.NewProfiler(&conduit.ProfilingConfig{
		Allow: func(r *http.Request) bool { return r.Header.Get("Authorization") == "Bearer token" },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	inChi := chi.NewRouter()
	inChi.Handle("/debug/pprof/*", p)

	s := newSides(t, map[string]http.Handler{"chi": withChi, "gin": withGin, "conduit": mux})
	wantEach(t, "from this machine", s.send("GET", "/debug/pprof/heap", ""), status, http.StatusOK)
	responses := s.send("GET", "/debug/pprof/heap", "", "X-Forwarded-For", "192.0.2.1")
	wantEach(t, "from elsewhere", except(responses, "conduit"), status, http.StatusOK)
	wantEach(t, "from elsewhere", except(responses, "chi", "gin"), status, http.StatusForbidden)

	allowed := newSides(t, map[string]http.Handler{"conduit": inChi})
	wantEach(t, "with a token", allowed.send("GET", "/debug/pprof/heap", "", "X-Forwarded-For", "192.0.2.1", "Authorization", "Bearer token"), status, http.StatusOK)
	wantEach(t, "without a token", allowed.send("GET", "/debug/pprof/heap", ""), status, http.StatusForbidden)
}

func migrateFiles(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"app.js": "render()", ".env": "secret", "sub/page.html": "<p>"} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	e := echo.New()
	e.Static("/static", dir)
	r := gin.New()
	r.Static("/static", dir)
	mux := http.NewServeMux()
	mux.Handle("/static/", conduit.NewFileServer(dir, "/static"))
	withChi := chi.NewRouter()
	withChi.Handle("/static/*", http.StripPrefix("/static", http.FileServer(http.Dir(dir))))
	s := newSides(t, map[string]http.Handler{"chi": withChi, "echo": e, "gin": r, "conduit": mux})

	responses := s.send("GET", "/static/app.js", "")
	wantEach(t, "a file", responses, body, "render()")
	wantEach(t, "a file", responses, field("Content-Type"), "text/javascript; charset=utf-8")
	wantEach(t, "a part", s.send("GET", "/static/app.js", "", "Range", "bytes=0-2"), body, "ren")
	wantEach(t, "no file", s.send("GET", "/static/missing.js", ""), status, http.StatusNotFound)
	responses = s.send("GET", "/static/.env", "")
	wantEach(t, "a hidden file", except(responses, "conduit"), body, "secret")
	wantEach(t, "a hidden file", except(responses, "chi", "echo", "gin"), status, http.StatusNotFound)
	responses = s.send("GET", "/static/sub/", "")
	wantEach(t, "a directory", except(responses, "chi"), status, http.StatusNotFound)
	wantEach(t, "a directory", except(responses, "conduit", "echo", "gin"), status, http.StatusOK)
}

func migrateEvents(t *testing.T) {
	r := gin.New()
	r.GET("/events", func(c *gin.Context) { c.SSEvent("tick", "one") })
	s := newSides(t, map[string]http.Handler{
		"gin": r,
		"conduit": conduit.SSEHandler(func(s *conduit.SSEStream, _ *http.Request) error {
			return s.WriteSSE(&conduit.SSEEvent{Event: "tick", Data: "one"})
		}),
	})
	responses := s.send("GET", "/events", "")
	// A space after the colon is no part of the value.
	wantEach(t, "an event", responses, func(r response) any { return strings.ReplaceAll(r.body, ": ", ":") }, "event:tick\ndata:one\n\n")
	wantEach(t, "the type", responses, func(r response) any {
		mediaType, _, _ := strings.Cut(r.header.Get("Content-Type"), ";")
		return mediaType
	}, "text/event-stream")

	// A stream that is quiet for longer than WriteTimeout goes on.
	const writeTimeout = 50 * time.Millisecond
	cfg := conduit.DefaultConfig(conduit.SSEHandler(func(s *conduit.SSEStream, _ *http.Request) error {
		err := s.WriteSSE(&conduit.SSEEvent{Data: "first"})
		<-time.After(3 * writeTimeout)
		return errors.Join(err, s.WriteSSE(&conduit.SSEEvent{Data: "last"}))
	}))
	cfg.WriteTimeout = writeTimeout
	if r := send("GET", serve(t, cfg).url, ""); r.body != "data: first\n\ndata: last\n\n" || r.err != nil {
		t.Errorf("events beyond WriteTimeout: %q, %v", r.body, r.err)
	}
}

func migrateStartAndStop(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-release
		io.WriteString(w, "whole")
	})
	srv, err := conduit.New(&conduit.Config{Address: freeAddress(t), Handler: h})
	if err != nil {
		t.Fatal(err)
	}
	e := onEcho(h).(*echo.Echo)
	e.HideBanner, e.HidePort = true, true
	r := onGin(h).(*gin.Engine)
	l := listen(t, freeAddress(t))
	echoAddress := freeAddress(t)

	ended := map[string]chan error{"conduit": make(chan error, 1), "echo": make(chan error, 1), "gin": make(chan error, 1)}
	go func() { ended["conduit"] <- conduit.StartWithGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: -1}) }()
	go func() { ended["echo"] <- e.Start(echoAddress) }()
	go func() { ended["gin"] <- r.RunListener(l) }()
	eventually(t, "conduit and echo listen", func() bool { return srv.Addr() != nil && e.ListenerAddr() != nil })

	responses := make(chan response, 3)
	for _, address := range []string{srv.Addr().String(), echoAddress, l.Addr().String()} {
		go func() { responses <- send("GET", "http://"+address, "") }()
		<-asked
	}
	stopped := make(chan error, 2)
	go func() { stopped <- srv.Shutdown(context.Background()) }()
	go func() { stopped <- e.Shutdown(context.Background()) }()
	l.Close()
	close(release)
	for range 3 {
		if r := <-responses; r.status != http.StatusOK || r.body != "whole" || r.err != nil {
			t.Errorf("a request at the stop: %+v", r)
		}
	}
	if err := errors.Join(<-stopped, <-stopped, <-ended["conduit"]); err != nil {
		t.Error(err)
	}
	if err := <-ended["echo"]; !errors.Is(err, http.ErrServerClosed) {
		t.Errorf("echo's Start: %v, want %v", err, http.ErrServerClosed)
	}
	if err := <-ended["gin"]; !errors.Is(err, net.ErrClosed) {
		t.Errorf("gin's RunListener: %v, want %v", err, net.ErrClosed)
	}
}

func migrateParameter(t *testing.T) {
	withChi := chi.NewRouter()
	withChi.Get("/users/{id}", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, chi.URLParam(r, "id")) })
	withChi.Get("/files/*", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, chi.URLParam(r, "*")) })
	e := echo.New()
	e.GET("/users/:id", func(c echo.Context) error { return c.String(http.StatusOK, c.Param("id")) })
	e.GET("/files/*", func(c echo.Context) error { return c.String(http.StatusOK, c.Param("*")) })
	withGin := gin.New()
	withGin.GET("/users/:id", func(c *gin.Context) { c.String(http.StatusOK, c.Param("id")) })
	withGin.GET("/files/*rest", func(c *gin.Context) { c.String(http.StatusOK, strings.TrimPrefix(c.Param("rest"), "/")) })
	mux := http.NewServeMux()
	mux.HandleFunc("GET /users/{id}", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.PathValue("id")) })
	mux.HandleFunc("GET /files/{rest...}", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.PathValue("rest")) })
	s := newSides(t, map[string]http.Handler{"chi": withChi, "echo": e, "gin": withGin, "conduit": mux})
	wantEach(t, "a parameter", s.send("GET", "/users/17", ""), body, "17")
	wantEach(t, "the rest", s.send("GET", "/files/a/b.txt", ""), body, "a/b.txt")
}

// greet is the handler behind what is absent in Conduit.
var greet = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			http.Error(w, "too long", http.StatusRequestEntityTooLarge)
		}
		return
	}
	io.WriteString(w, "hello")
})

func migrateCORS(t *testing.T) {
	origins, methods := []string{"https://app.example"}, []string{"GET", "POST", "DELETE"}
	crossOrigin := cors.New(cors.Options{AllowedOrigins: origins, AllowedMethods: methods})
	s := newSides(t, map[string]http.Handler{
		"chi":     onChi(greet, chicors.Handler(chicors.Options{AllowedOrigins: origins, AllowedMethods: methods})),
		"echo":    onEcho(greet, echomiddleware.CORSWithConfig(echomiddleware.CORSConfig{AllowOrigins: origins, AllowMethods: methods})),
		"gin":     onGin(greet, gincors.New(gincors.Config{AllowOrigins: origins, AllowMethods: methods})),
		"conduit": conduit.Chain(conduit.Logging(), crossOrigin.Handler)(greet),
	})
	responses := s.send("GET", "/", "", "Origin", "https://app.example")
	wantEach(t, "the origin", responses, field("Access-Control-Allow-Origin"), "https://app.example")
	wantEach(t, "the origin", responses, body, "hello")
	wantEach(t, "the origin", responses, func(r response) any { return slices.Contains(r.header.Values("Vary"), "Origin") }, true)
	wantEach(t, "another origin", s.send("GET", "/", "", "Origin", "https://other.example"), field("Access-Control-Allow-Origin"), "")
	preflight := s.send("OPTIONS", "/", "", "Origin", "https://app.example", "Access-Control-Request-Method", "DELETE")
	wantEach(t, "a preflight", preflight, field("Access-Control-Allow-Origin"), "https://app.example")
	wantEach(t, "a preflight", preflight, func(r response) any {
		return r.status/100 == 2 && r.body == "" && strings.Contains(r.header.Get("Access-Control-Allow-Methods"), "DELETE")
	}, true)
}

// rateLimit refuses requests that come faster than limiter allows.
func rateLimit(limiter *rate.Limiter) conduit.Middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !limiter.Allow() {
				w.Header().Set("Retry-After", "1")
				http.Error(w, "too many requests", http.StatusTooManyRequests)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func migrateRateLimit(t *testing.T) {
	const burst = 3
	s := newSides(t, map[string]http.Handler{
		"chi": onChi(greet, httprate.LimitBy(burst, time.Hour, func(*http.Request) (string, error) { return "all", nil })),
		"echo": onEcho(greet, echomiddleware.RateLimiter(echomiddleware.NewRateLimiterMemoryStoreWithConfig(
			echomiddleware.RateLimiterMemoryStoreConfig{Rate: 1e-6, Burst: burst, ExpiresIn: time.Hour}))),
		"conduit": rateLimit(rate.NewLimiter(rate.Every(time.Hour), burst))(greet),
	})
	for range burst {
		wantEach(t, "within the limit", s.send("GET", "/", ""), status, http.StatusOK)
	}
	responses := s.send("GET", "/", "")
	wantEach(t, "beyond the limit", responses, status, http.StatusTooManyRequests)
	if responses["conduit"].header.Get("Retry-After") != "1" {
		t.Errorf("beyond the limit: conduit: %v", responses["conduit"].header)
	}

	proxies := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	perClient := httprate.LimitBy(100, time.Minute, func(r *http.Request) (string, error) {
		return httprate.CanonicalizeIP(clientAddress(r, proxies).String()), nil
	})
	each := newSides(t, map[string]http.Handler{"conduit": conduit.Chain(conduit.Logging(), perClient)(greet)})
	last := 0
	for i := 0; i < 300 && last != http.StatusTooManyRequests; i++ {
		last = each.send("GET", "/", "", "X-Forwarded-For", "192.0.2.1")["conduit"].status
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("one client, beyond its limit: %d, want 429", last)
	}
	wantEach(t, "another client", each.send("GET", "/", "", "X-Forwarded-For", "192.0.2.2"), status, http.StatusOK)
}

func basicAuth(user, password string) conduit.Middleware {
	want := sha256.Sum256([]byte(user + ":" + password))
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			user, password, _ := r.BasicAuth()
			got := sha256.Sum256([]byte(user + ":" + password))
			if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
				w.Header().Set("WWW-Authenticate", `Basic realm="service"`)
				http.Error(w, "unauthorized", http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func migrateBasicAuth(t *testing.T) {
	s := newSides(t, map[string]http.Handler{
		"chi": onChi(greet, chimiddleware.BasicAuth("service", map[string]string{"admin": "a:b"})),
		"echo": onEcho(greet, echomiddleware.BasicAuth(func(user, password string, _ echo.Context) (bool, error) {
			return user == "admin" && password == "a:b", nil
		})),
		"gin":     onGin(greet, gin.BasicAuth(gin.Accounts{"admin": "a:b"})),
		"conduit": basicAuth("admin", "a:b")(greet),
	})
	credentials := func(user, password string) string {
		r := httptest.NewRequest("GET", "/", nil)
		r.SetBasicAuth(user, password)
		if u, p, ok := r.BasicAuth(); u != user || p != password || !ok {
			t.Fatalf("%q and %q do not arrive", user, password)
		}
		return r.Header.Get("Authorization")
	}
	wantEach(t, "the password", s.send("GET", "/", "", "Authorization", credentials("admin", "a:b")), status, http.StatusOK)
	for _, authorization := range []string{"", "Bearer token", credentials("admin", "a"), credentials("admin", ""), credentials("", ""), credentials("root", "a:b")} {
		responses := s.send("GET", "/", "", "Authorization", authorization)
		wantEach(t, authorization, responses, status, http.StatusUnauthorized)
		wantEach(t, authorization, responses, func(r response) any {
			return strings.HasPrefix(strings.ToLower(r.header.Get("WWW-Authenticate")), "basic realm=")
		}, true)
		wantEach(t, authorization, responses, func(r response) any { return strings.Contains(r.body, "hello") }, false)
	}
}

func migrateRealIP(t *testing.T) {
	e := echo.New()
	e.IPExtractor = echo.ExtractIPFromXFFHeader(echo.TrustLoopback(true), echo.TrustPrivateNet(true), echo.TrustLinkLocal(false))
	e.GET("/", func(c echo.Context) error { return c.String(http.StatusOK, c.RealIP()) })
	r := gin.New()
	if err := r.SetTrustedProxies([]string{"127.0.0.0/8", "10.0.0.0/8"}); err != nil {
		t.Fatal(err)
	}
	r.GET("/", func(c *gin.Context) { c.String(http.StatusOK, c.ClientIP()) })
	proxies := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")}
	s := newSides(t, map[string]http.Handler{
		"chi": onChi(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, chimiddleware.GetClientIP(r.Context()))
		}), chimiddleware.ClientIPFromXFF("127.0.0.0/8", "10.0.0.0/8")),
		"echo":    e,
		"gin":     r,
		"conduit": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, clientAddress(r, proxies)) }),
	})
	for forwarded, want := range map[string]string{
		"198.51.100.1":                        "198.51.100.1",
		"203.0.113.9, 198.51.100.1":           "198.51.100.1",
		"203.0.113.9, 198.51.100.1, 10.0.0.3": "198.51.100.1",
		"2001:db8::1, 127.0.0.1":              "2001:db8::1",
	} {
		wantEach(t, forwarded, s.send("GET", "/", "", "X-Forwarded-For", forwarded), body, want)
	}
}

func migrateCSRF(t *testing.T) {
	s := newSides(t, map[string]http.Handler{
		"echo":    onEcho(greet, echomiddleware.CSRF()),
		"conduit": http.NewCrossOriginProtection().Handler(greet),
	})
	for site, want := range map[string]int{"same-origin": 200, "none": 200, "cross-site": 403} {
		wantEach(t, "a POST, "+site, s.send("POST", "/", "", "Sec-Fetch-Site", site), status, want)
	}
	wantEach(t, "a GET", s.send("GET", "/", "", "Sec-Fetch-Site", "cross-site"), status, http.StatusOK)
	responses := s.send("POST", "/", "")
	wantEach(t, "no browser", except(responses, "echo"), status, http.StatusOK)
	wantEach(t, "no browser", except(responses, "conduit"), status, http.StatusBadRequest)

	forgery := http.NewCrossOriginProtection()
	if err := forgery.AddTrustedOrigin("https://app.example"); err != nil {
		t.Fatal(err)
	}
	s = newSides(t, map[string]http.Handler{
		"echo":    onEcho(greet, echomiddleware.CSRFWithConfig(echomiddleware.CSRFConfig{TrustedOrigins: []string{"https://app.example"}})),
		"conduit": forgery.Handler(greet),
	})
	for origin, want := range map[string]int{"https://app.example": 200, "https://other.example": 403} {
		wantEach(t, origin, s.send("POST", "/", "", "Sec-Fetch-Site", "cross-site", "Origin", origin), status, want)
	}
}

func bodyLimit(next http.Handler) http.Handler { return http.MaxBytesHandler(next, 64<<10) }

func migrateBodyLimit(t *testing.T) {
	s := newSides(t, map[string]http.Handler{
		"chi":     onChi(greet, chimiddleware.RequestSize(64<<10)),
		"echo":    onEcho(greet, echomiddleware.BodyLimit("64KiB")),
		"conduit": conduit.Chain(conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression(), bodyLimit)(greet),
	})
	wantEach(t, "a body as long as the limit", s.send("POST", "/", strings.Repeat("x", 64<<10)), status, http.StatusOK)
	responses := s.send("POST", "/", strings.Repeat("x", 64<<10+1))
	wantEach(t, "a longer one", responses, status, http.StatusRequestEntityTooLarge)
	wantEach(t, "a longer one", except(responses, "echo"), func(r response) any { return r.close }, true)
}

func migrateMetrics(t *testing.T) {
	registry, mux := prometheus.NewRegistry(), http.NewServeMux()
	seconds := promauto.With(registry).NewHistogramVec(prometheus.HistogramOpts{
		Name: "http_request_duration_seconds", Help: "Time to respond.",
	}, []string{"route", "method", "code"})
	handle := func(pattern string, h http.Handler) {
		route := seconds.MustCurryWith(prometheus.Labels{"route": pattern})
		mux.Handle(pattern, promhttp.InstrumentHandlerDuration(route, h))
	}

	slow := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	timeout := conduit.Timeout(20 * time.Millisecond)
	handle("GET /users/{id}", greet)
	handle("GET /slow/inside", timeout(slow))
	handle("GET /slow/outside", slow)
	handle("GET /events", conduit.SSEHandler(func(s *conduit.SSEStream, _ *http.Request) error {
		return s.WriteSSE(&conduit.SSEEvent{Data: "one"})
	}))
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	s := newSides(t, map[string]http.Handler{"conduit": conduit.TimeoutWith(&conduit.TimeoutConfig{
		Duration: 20 * time.Millisecond,
		Skip:     func(r *http.Request) bool { return r.URL.Path != "/slow/outside" },
	})(mux)})
	for path, want := range map[string]int{"/users/17": 200, "/users/18": 200, "/slow/inside": 503, "/slow/outside": 503, "/events": 200} {
		wantEach(t, path, s.send("GET", path, ""), status, want)
	}
	for _, want := range []string{
		`{code="200",method="get",route="GET /users/{id}"} 2`,
		`{code="503",method="get",route="GET /slow/inside"} 1`,
		`{code="200",method="get",route="GET /slow/outside"} 1`,
		`{code="200",method="get",route="GET /events"} 1`,
	} {
		eventually(t, "the metrics have "+want, func() bool {
			return strings.Contains(send("GET", s["conduit"]+"/metrics", "").body, "http_request_duration_seconds_count"+want+"\n")
		})
	}
}

// migrated puts the page's whole chain around a router.
func migrated(router http.Handler, limiter *rate.Limiter, client func(*http.Request) []slog.Attr, password string) (http.Handler, error) {
	crossOrigin := cors.New(cors.Options{
		AllowedOrigins: []string{"https://app.example"},
		AllowedMethods: []string{"GET", "POST", "DELETE"},
	})
	forgery := http.NewCrossOriginProtection()
	if err := forgery.AddTrustedOrigin("https://app.example"); err != nil {
		return nil, err
	}
	handler := conduit.Chain(
		conduit.RequestID(),
		conduit.Recovery(),
		conduit.LoggingWith(&conduit.LoggingConfig{Attrs: client}), // the recipe of the client's address
		crossOrigin.Handler, // whatever refuses stands further in: a page may then read the refusal
		rateLimit(limiter),
		conduit.Timeout(20*time.Second),
		conduit.Compression(),
		forgery.Handler,
		basicAuth("admin", password), // inside CORS: a preflight has no password
		bodyLimit,
	)(router)

	outer := http.NewServeMux()
	outer.Handle("GET /health", conduit.Health())
	outer.Handle("/", handler)
	return outer, nil
}

func TestMigrationChainAroundEachRouter(t *testing.T) {
	mux := http.NewServeMux()
	mux.Handle("/", greet)
	for name, router := range map[string]http.Handler{"chi": onChi(greet), "echo": onEcho(greet), "gin": onGin(greet), "ServeMux": mux} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := func(r *http.Request) []slog.Attr {
				return []slog.Attr{slog.Any("client", clientAddress(r, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}))}
			}
			handler, err := migrated(router, rate.NewLimiter(rate.Every(time.Hour), 6), client, "secret")
			if err != nil {
				t.Fatal(err)
			}
			var log lines
			cfg := conduit.DefaultConfig(handler)
			cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			srv := serve(t, cfg)

			const page = "https://app.example"
			right := httptest.NewRequest("GET", "/", nil)
			right.SetBasicAuth("admin", "secret")
			authorization := right.Header.Get("Authorization")
			for i, test := range []struct {
				method, body, origin, authorization string
				want                                int
			}{
				{"GET", "", page, authorization, 200},
				{"GET", "", page, "", 401},
				{"OPTIONS", "", page, "", 204}, // a preflight, which counts for no limit
				{"GET", "", "https://other.example", authorization, 200},
				{"POST", "", "https://other.example", authorization, 403},
				{"POST", "", page, authorization, 200},
				{"POST", strings.Repeat("x", 64<<10+1), page, authorization, 413},
				{"GET", "", page, authorization, 429},
			} {
				id := fmt.Sprint("test-", i)
				fields := []string{"Origin", test.origin, "Sec-Fetch-Site", "cross-site", "X-Request-ID", id, "X-Forwarded-For", "192.0.2.7"}
				if test.authorization != "" {
					fields = append(fields, "Authorization", test.authorization)
				}
				if test.method == "OPTIONS" {
					fields = append(fields, "Access-Control-Request-Method", "POST")
				}
				r := send(test.method, srv.url, test.body, fields...)
				allowed := ""
				if test.origin == page {
					allowed = page
				}
				if r.status != test.want || r.header.Get("X-Request-Id") != id || r.header.Get("Access-Control-Allow-Origin") != allowed {
					t.Errorf("%v: %d %q %v, want %d and the origin %q", test, r.status, r.body, r.header, test.want, allowed)
				}
				line := fmt.Sprintf(`method=%s path=/ pattern=`, test.method)
				eventually(t, "the log has a line for "+id, func() bool {
					for l := range strings.Lines(log.String()) {
						if strings.Contains(l, line) && strings.Contains(l, fmt.Sprintf(" status=%d ", test.want)) &&
							strings.Contains(l, "client=192.0.2.7") && strings.Contains(l, "request_id="+id) {
							return true
						}
					}
					return false
				})
			}
			if r := send("GET", srv.url+"/health", ""); r.status != 200 {
				t.Errorf("/health: %d %q, want 200 without a password and beyond the limit", r.status, r.body)
			}
		})
	}
}
