// Database is a service that keeps its posts in a database: in a SQLite file that
// it makes itself, or in Postgres if DATABASE_URL is set. Every open page shows a
// new post at once, whichever instance received it. A page that lost its
// connection misses none.
//
//	cd examples/database
//	go run .
//	curl localhost:8080/api/posts -H 'Content-Type: application/json' -d '{"title": "Hello"}'
//	curl localhost:8080/api/posts
//	curl localhost:8080/api/posts/stream
//	curl -N localhost:8080/api/events
//
// Any number of instances may share a Postgres. A SQLite file is for one: two that
// open the same file do not tell each other of new posts.
//
//	DATABASE_URL=postgres://user:password@localhost/posts go run . -addr :8081
//	DATABASE_URL=postgres://user:password@localhost/posts go run . -addr :8082
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"example.com/conduit"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Getenv, os.Stderr))
}

// run serves until a signal comes or ctx ends. It returns the exit status: 0 after
// a clean shutdown, 2 for wrong flags, 1 for any other error.
func run(ctx context.Context, args []string, getenv func(string) string, stderr io.Writer) int {
	address := ":8080"
	if port := getenv("PORT"); port != "" {
		address = ":" + port
	}
	flags := flag.NewFlagSet("database", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&address, "addr", address, "`address` to listen on; PORT in the environment changes the default")
	file := flags.String("db", "posts.db", "SQLite `file`, made if it does not exist; DATABASE_URL in the environment, the URL of a Postgres, replaces it")
	delay := flags.Duration("delay", 500*time.Millisecond, "how long to serve on after the signal, until clients and proxies have disconnected; 5s behind a load balancer")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "database: unexpected argument %q\n", flags.Arg(0))
		flags.Usage()
		return 2
	}

	slog.SetDefault(newLogger(stderr))
	s := service{address: address, delay: *delay, file: *file, url: getenv("DATABASE_URL"), replay: 256}
	if err := s.run(ctx, nil); err != nil {
		slog.Error("stopped", "err", err)
		return 1
	}
	return 0
}

// service is one instance.
type service struct {
	address string
	delay   time.Duration // of a shutdown
	file    string        // of SQLite
	url     string        // of Postgres; if it is set, file is not used
	replay  int           // posts that a page may miss and still get
}

// newLogger returns a logger of lines in JSON. slog would write a duration in
// nanoseconds; here it is in milliseconds, and its name says so.
func newLogger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Value.Kind() == slog.KindDuration {
				return slog.Float64(a.Key+"_ms", float64(a.Value.Duration())/float64(time.Millisecond))
			}
			return a
		},
	}))
}

// homeURL returns the URL of the home page of a service that listens on addr,
// for a browser on the same machine.
func homeURL(scheme string, addr net.Addr) string {
	host, port, _ := net.SplitHostPort(addr.String())
	if net.ParseIP(host).IsUnspecified() {
		host = "localhost"
	}
	return scheme + "://" + net.JoinHostPort(host, port) + "/"
}

// handlerTimeout is how long a request may take. Streams may take longer.
const handlerTimeout = 30 * time.Second

// newShutdownConfig makes a shutdown wait for any request that may be open.
func newShutdownConfig(delay time.Duration) *conduit.ShutdownConfig {
	cfg := conduit.DefaultShutdownConfig()
	cfg.Timeout = max(delay, 0) + handlerTimeout + cfg.HookTimeout + time.Second
	if cfg.Delay = delay; delay == 0 {
		cfg.Delay = -1 // none: 0 would be the default
	}
	return cfg
}

// startTimeout bounds the work before the first request: connections, migrations,
// the newest posts.
const startTimeout = 30 * time.Second

// run serves on l, or on the address if l is nil, until a signal comes or ctx ends.
// Requests end first, then files, then events, and last the database, which all of
// them may use.
func (s service) run(ctx context.Context, l net.Listener) error {
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	posts, err := s.open(starting)
	if err != nil {
		return err
	}
	feed, err := newFeed(starting, posts, s.replay)
	if err != nil {
		return errors.Join(err, posts.close())
	}
	files, err := newFiles()
	if err != nil {
		return errors.Join(err, posts.close())
	}
	profiler, err := conduit.NewProfiler(&conduit.ProfilingConfig{DB: posts.db})
	if err != nil {
		return errors.Join(err, posts.close())
	}
	cfg := conduit.DefaultConfig(newHandler(posts, feed, files, profiler))
	cfg.Address = s.address
	cfg.Database = posts.pool
	srv, err := conduit.New(cfg)
	if err != nil {
		return errors.Join(err, posts.close())
	}

	if l == nil {
		if l, err = net.Listen("tcp", s.address); err != nil {
			return errors.Join(err, posts.close())
		}
	}
	g := conduit.NewGracefulShutdown(srv, newShutdownConfig(s.delay))
	g.RegisterHook(func(context.Context) error { return posts.close() })
	g.RegisterHook(feed.stop)
	g.RegisterHook(func(context.Context) error { return errors.Join(files.Close(), profiler.Close()) })
	feed.start()
	slog.Info("home page", "url", homeURL("http", l.Addr()), "posts", posts.place)
	return g.Run(ctx, l)
}

func (s service) open(ctx context.Context) (*store, error) {
	if s.url != "" {
		return openPostgres(ctx, s.url)
	}
	return openSQLite(ctx, s.file)
}

// newHandler returns the whole service: its routes behind its middleware.
func newHandler(posts *store, feed *feed, files *conduit.FileServer, profiler *conduit.Profiler) http.Handler {
	api := &api{posts: posts, feed: feed}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", newPage(files))
	mux.Handle("GET /static/", files)
	mux.Handle("GET /health", conduit.Health(conduit.DatabaseHealth(posts.db)))
	mux.HandleFunc("GET /api/posts", api.serveList)
	mux.HandleFunc("POST /api/posts", api.serveCreate)
	mux.HandleFunc("GET /api/posts/stream", api.serveStream)
	mux.HandleFunc("GET /api/posts/{id}", api.serveOne)
	mux.Handle("GET /api/events", feed)
	mux.Handle("/api/", unmatched(mux))
	profiler.Enable(mux) // for this machine only: a proxy on it must not lead here

	return conduit.Chain(
		conduit.RequestID(),
		conduit.Recovery(),
		conduit.LoggingWith(&conduit.LoggingConfig{Skip: isRoutine}),
		conduit.TimeoutWith(&conduit.TimeoutConfig{
			Duration: handlerTimeout,
			Message:  `{"error":"timed out"}`,
		}),
		conduit.Compression(),
	)(mux)
}

// isRoutine reports whether r is a request that a load balancer, or the page of
// live charts, sends every second. They would fill the log.
func isRoutine(r *http.Request) bool {
	return r.Method == http.MethodGet && (r.URL.Path == "/health" || r.URL.Path == "/debug/pprof/stats")
}
