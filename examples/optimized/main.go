// Optimized is a service as one would run it in production: a small JSON API with
// streams and events, and a page that shows new posts as they are made. All of it
// is behind the whole chain of middleware. It has HTTP/2, TLS that is renewed
// without a restart, structured logs, profiles for its own machine, and a shutdown
// that loses no request.
//
//	go run ./examples/optimized
//	curl localhost:8080/api/posts
//	curl localhost:8080/api/posts -H 'Content-Type: application/json' -d '{"title": "Hello"}'
//	curl localhost:8080/api/posts/stream
//	curl -N localhost:8080/api/events
//	curl --compressed localhost:8080/static/
//	go tool pprof localhost:8080/debug/pprof/heap
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
	flags := flag.NewFlagSet("optimized", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&address, "addr", address, "`address` to listen on; PORT in the environment changes the default")
	certFile := flags.String("tls-cert", "", "`file` with the certificate chain, which turns on TLS")
	keyFile := flags.String("tls-key", "", "`file` with the certificate's private key")
	h2c := flags.Bool("h2c", false, "accept HTTP/2 in cleartext, from a proxy that speaks it")
	delay := flags.Duration("delay", 500*time.Millisecond, "how long to serve on after the signal, until clients and proxies have disconnected; 5s behind a load balancer")
	debugAddress := flags.String("debug-addr", "", "second `address` for profiles, with no proxy in front of it; on 127.0.0.1 if it has no host")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "optimized: unexpected argument %q\n", flags.Arg(0))
		flags.Usage()
		return 2
	}

	slog.SetDefault(newLogger(stderr))
	files, err := newFiles()
	if err != nil {
		slog.Error("not started", "err", err)
		return 1
	}
	posts := newStore()
	cfg := conduit.DefaultConfig(newHandler(posts, files))
	cfg.Address = address
	cfg.CertFile, cfg.KeyFile = *certFile, *keyFile
	cfg.EnableH2C = *h2c
	srv, err := conduit.New(cfg)
	if err != nil {
		slog.Error("not started", "err", err)
		return 1
	}

	l, err := net.Listen("tcp", address)
	if err != nil {
		slog.Error("not started", "err", err)
		return 1
	}
	g := conduit.NewGracefulShutdown(srv, newShutdownConfig(*delay))
	if *debugAddress != "" {
		profiling, err := startProfiling(*debugAddress)
		if err != nil {
			l.Close()
			slog.Error("not started", "err", err)
			return 1
		}
		g.RegisterHook(profiling.Shutdown) // not earlier: a drain is worth a profile
	}
	g.RegisterHook(func(ctx context.Context) error {
		slog.InfoContext(ctx, "store closed", "posts", posts.len())
		return nil
	})
	g.RegisterHook(func(context.Context) error { return files.Close() })
	scheme := "http"
	if *certFile != "" {
		scheme = "https"
	}
	slog.Info("home page", "url", homeURL(scheme, l.Addr()))
	if err := g.Run(ctx, l); err != nil {
		slog.Error("stopped", "err", err)
		return 1
	}
	return 0
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

// startProfiling starts a server of profiles and returns it.
func startProfiling(address string) (*conduit.Server, error) {
	srv, err := conduit.NewProfilingServer(address, nil)
	if err != nil {
		return nil, fmt.Errorf("-debug-addr: %w", err)
	}
	l, err := net.Listen("tcp", srv.HTTPServer().Addr)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("-debug-addr: %w", err), srv.Close())
	}
	slog.Info("profiling", "url", "http://"+l.Addr().String()+"/debug/pprof/live")
	go func() {
		if err := srv.Serve(l); err != nil {
			slog.Error("profiling stopped", "err", err)
		}
	}()
	return srv, nil
}

// newHandler returns the whole service: its routes behind its middleware.
func newHandler(posts *store, files *conduit.FileServer) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", newPage(files))
	mux.Handle("GET /static/", files)
	mux.Handle("GET /health", conduit.Health())
	mux.HandleFunc("GET /api/posts", posts.serveList)
	mux.HandleFunc("POST /api/posts", posts.serveCreate)
	mux.HandleFunc("GET /api/posts/stream", posts.serveStream)
	mux.HandleFunc("GET /api/posts/{id}", posts.serveOne)
	mux.Handle("GET /api/events", posts.events)
	mux.Handle("/api/", unmatched(mux))
	conduit.EnableDefaultProfiling(mux) // for this machine only: a proxy on it must not lead here

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
