// This file starts servers with other people's routers: chi, echo, gin, gorilla/mux
// and ServeMux. It proves that the usual chain works around each of them and, but
// for gin, inside, with late handlers, panics and compression, and which pattern the
// log has then.

package conformance

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"

	"example.com/conduit"
)

// route is a handler. id reads the parameter id, now and not when the route began.
type route func(w http.ResponseWriter, r *http.Request, id func() string)

// routers are the routers. make returns one that has inside, if it is set, as its
// own middleware, and a route at each of these paths, before the parameter.
// pattern is what Logging inside of it knows as the pattern of /users/.
var routers = []struct {
	name, pattern string
	make          func(inside conduit.Middleware, routes map[string]route) http.Handler
}{
	{"ServeMux", `"GET /users/{id}"`, func(inside conduit.Middleware, routes map[string]route) http.Handler {
		m := http.NewServeMux()
		for path, h := range routes {
			m.Handle("GET "+path+"{id}", within(inside, func(w http.ResponseWriter, r *http.Request) { h(w, r, func() string { return r.PathValue("id") }) }))
		}
		return m
	}},
	{"chi", "/users/{id}", func(inside conduit.Middleware, routes map[string]route) http.Handler {
		m := chi.NewRouter()
		if inside != nil {
			m.Use(inside)
		}
		for path, h := range routes {
			m.Get(path+"{id}", func(w http.ResponseWriter, r *http.Request) { h(w, r, func() string { return chi.URLParam(r, "id") }) })
		}
		return m
	}},
	{"gorilla/mux", `""`, func(inside conduit.Middleware, routes map[string]route) http.Handler {
		m := mux.NewRouter()
		if inside != nil {
			m.Use(mux.MiddlewareFunc(inside))
		}
		for path, h := range routes {
			m.HandleFunc(path+"{id}", func(w http.ResponseWriter, r *http.Request) { h(w, r, func() string { return mux.Vars(r)["id"] }) })
		}
		return m
	}},
	{"echo", `""`, func(inside conduit.Middleware, routes map[string]route) http.Handler {
		m := echo.New()
		if inside != nil {
			m.Use(echo.WrapMiddleware(inside))
		}
		for path, h := range routes {
			m.GET(path+":id", func(c echo.Context) error {
				h(c.Response(), c.Request(), func() string { return c.Param("id") })
				return nil
			})
		}
		return m
	}},
	{"gin", "", func(_ conduit.Middleware, routes map[string]route) http.Handler {
		gin.SetMode(gin.ReleaseMode)
		m := gin.New() // it takes no middleware of net/http's
		for path, h := range routes {
			m.GET(path+":id", func(c *gin.Context) { h(c.Writer, c.Request, func() string { return c.Param("id") }) })
		}
		return m
	}},
}

func within(mw conduit.Middleware, h http.HandlerFunc) http.Handler {
	if mw == nil {
		return h
	}
	return mw(h)
}

// lines is a log that is read while it is written.
type lines struct {
	mu  sync.Mutex
	all strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

func TestChainAroundEachRouter(t *testing.T) {
	for _, router := range routers {
		t.Run(router.name, func(t *testing.T) {
			t.Parallel()
			others, ended := make(chan struct{}), make(chan string)
			h := router.make(nil, map[string]route{
				"/users/": func(w http.ResponseWriter, _ *http.Request, id func() string) {
					w.Header().Set("Content-Type", "text/plain; charset=utf-8")
					io.WriteString(w, strings.Repeat(id()+" ", 1000))
				},
				"/late/": func(_ http.ResponseWriter, r *http.Request, id func() string) {
					<-r.Context().Done()
					<-others
					ended <- id()
				},
				"/panics/": func(http.ResponseWriter, *http.Request, func() string) { panic("on purpose") },
			})
			var log lines
			cfg := conduit.DefaultConfig(conduit.Chain(
				conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(100*time.Millisecond), conduit.Compression(),
			)(h))
			cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			srv := serve(t, cfg)

			status, body, header := ask(t, srv.url+"/users/17")
			if status != 200 || body != strings.Repeat("17 ", 1000) || header.Get("X-Request-Id") == "" || header.Get("Vary") != "Accept-Encoding" {
				t.Errorf("%d, %d bytes, %v", status, len(body), header)
			}
			if status, _, _ := ask(t, srv.url+"/panics/1"); status != 500 {
				t.Errorf("after a panic: %d, want 500", status)
			}
			if status, _, _ := ask(t, srv.url+"/late/18"); status != 503 {
				t.Errorf("late: %d, want 503", status)
			}
			for range 10 {
				ask(t, srv.url+"/users/other")
			}
			close(others)
			if id := <-ended; id != "18" {
				t.Errorf("the late handler had the parameter %q", id)
			}
			for _, want := range []string{"path=/users/17 ", "path=/panics/1 ", "path=/late/18 "} {
				eventually(t, "the log has a line with "+want, func() bool { return strings.Contains(log.String(), want) })
			}
		})
	}
}

func TestPartsInsideEachRouter(t *testing.T) {
	for _, router := range routers {
		if router.name == "gin" {
			continue // the chain goes around it
		}
		t.Run(router.name, func(t *testing.T) {
			t.Parallel()
			others := make(chan struct{})
			inside := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.FastTimeout(100*time.Millisecond), conduit.Compression())
			h := router.make(inside, map[string]route{
				"/users/": func(w http.ResponseWriter, _ *http.Request, id func() string) { io.WriteString(w, id()) },
				"/late/": func(_ http.ResponseWriter, r *http.Request, id func() string) {
					<-r.Context().Done()
					<-others
					if got := id(); got != "x" {
						t.Errorf("the late handler has the parameter %q", got)
					}
				},
				"/panics/": func(http.ResponseWriter, *http.Request, func() string) { panic("on purpose") },
			})
			var log lines
			cfg := conduit.DefaultConfig(h)
			cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			srv := serve(t, cfg)

			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if status, _, _ := ask(t, srv.url+"/late/x"); status != 503 {
						t.Errorf("late: %d, want 503", status)
					}
				})
			}
			for i := range 100 {
				want := fmt.Sprint(i)
				if status, body, _ := ask(t, srv.url+"/users/"+want); status != 200 || body != want {
					t.Errorf("%d %q, want 200 %q", status, body, want)
				}
			}
			close(others)
			wg.Wait()
			if status, _, _ := ask(t, srv.url+"/panics/1"); status != 500 {
				t.Errorf("after a panic: %d, want 500", status)
			}
			want := "pattern=" + router.pattern + " "
			eventually(t, "the log has a line with "+want, func() bool { return strings.Contains(log.String(), "path=/users/1 "+want) })
		})
	}
}

// The order that the package comment warns of: chi gives the context of a route to
// the next request once the route has returned, and Timeout returns before a late
// handler does.
func TestTimeoutInsideChiLosesTheParameters(t *testing.T) {
	t.Parallel()
	timedOut, seen := make(chan struct{}), make(chan string)
	m := chi.NewRouter()
	m.Use(conduit.Timeout(50 * time.Millisecond))
	m.Get("/late/{id}", func(_ http.ResponseWriter, r *http.Request) {
		<-timedOut
		seen <- chi.URLParam(r, "id")
	})
	m.Get("/users/{id}", func(http.ResponseWriter, *http.Request) {})
	srv := serve(t, conduit.DefaultConfig(m))

	eventually(t, "a late handler reads the parameter of another request", func() bool {
		if status, _, _ := ask(t, srv.url+"/late/18"); status != 503 {
			t.Fatalf("late: %d, want 503", status)
		}
		for range 10 {
			ask(t, srv.url+"/users/other")
		}
		timedOut <- struct{}{}
		return <-seen == "other"
	})
}

// What gin and echo have of their own asserts optional interfaces of the
// ResponseWriter, which the chain must not hide: gin's Stream needs an
// http.CloseNotifier.
func TestRoutersStreamBehindTheChain(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file.txt")
	if err := os.WriteFile(file, []byte("of a file"), 0o644); err != nil {
		t.Fatal(err)
	}
	gin.SetMode(gin.ReleaseMode)
	g := gin.New()
	g.GET("/stream", func(c *gin.Context) {
		n := 0
		c.Stream(func(w io.Writer) bool {
			n++
			fmt.Fprintf(w, "%d\n", n)
			return n < 3
		})
	})
	g.GET("/event", func(c *gin.Context) { c.SSEvent("tick", "data") })
	g.GET("/file", func(c *gin.Context) { c.File(file) })
	e := echo.New()
	e.GET("/stream", func(c echo.Context) error { return c.Stream(200, "text/plain", strings.NewReader("1\n2\n3\n")) })
	e.GET("/event", func(c echo.Context) error {
		fmt.Fprint(c.Response(), "event:tick\ndata:data\n\n")
		c.Response().Flush()
		return nil
	})
	e.GET("/file", func(c echo.Context) error { return c.File(file) })

	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression())
	for name, router := range map[string]http.Handler{"gin": g, "echo": e} {
		srv := serve(t, conduit.DefaultConfig(chain(router)))
		for path, want := range map[string]string{"/stream": "1\n2\n3\n", "/event": "event:tick\ndata:data\n\n", "/file": "of a file", "/missing": ""} {
			wantStatus := 200
			if want == "" {
				wantStatus = 404
			}
			if status, body, _ := ask(t, srv.url+path); status != wantStatus || want != "" && body != want {
				t.Errorf("%s: GET %s: %d %q, want %d %q", name, path, status, body, wantStatus, want)
			}
		}
	}
}
