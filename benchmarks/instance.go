package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"example.com/conduit"
)

// stopDelay is how long an instance that heeds its clients goes on serving
// after a SIGTERM: HAProxy has polled it four times by then.
const stopDelay = 2 * time.Second

// A stoppable is one way to serve until a SIGTERM comes.
type stoppable struct {
	name  string
	title string
	serve func(l net.Listener, mux *http.ServeMux) error
}

func stoppables() []stoppable {
	return []stoppable{
		{"conduit", "Conduit, Delay 2 s", serveUntilDrained},
		{"net_http", "net/http, Shutdown", func(l net.Listener, mux *http.ServeMux) error {
			return serveUntilShutdown(l, mux, 0)
		}},
		{"net_http_delay", "net/http, health 503, 2 s, Shutdown", func(l net.Listener, mux *http.ServeMux) error {
			return serveUntilShutdown(l, mux, stopDelay)
		}},
	}
}

func serveUntilDrained(l net.Listener, mux *http.ServeMux) error {
	mux.Handle("GET /health", conduit.Health())
	srv, err := conduit.New(conduit.DefaultConfig(mux))
	if err != nil {
		return err
	}
	return conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: stopDelay}).Run(context.Background(), l)
}

// serveUntilShutdown is the shutdown that one writes by hand. With a delay the
// health check fails for as long before.
func serveUntilShutdown(l net.Listener, mux *http.ServeMux, delay time.Duration) error {
	var leaving atomic.Bool
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		if leaving.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	srv := newServer(mux)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	leaving.Store(true)
	time.Sleep(delay)
	return srv.Shutdown(context.Background())
}

// serveInstance is what a process does that was started to be restarted: it
// takes orders on address, and notes the number of each one that it executes.
func serveInstance(name, address, dir string) error {
	// An interrupt at the terminal is for the runner.
	signal.Ignore(os.Interrupt)
	file, err := os.OpenFile(executedFile(dir, address), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		number, _, _ := strings.Cut(string(body), " ")
		if _, err := strconv.Atoi(number); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		time.Sleep(5 * time.Millisecond) // as if there were a database
		if _, err := file.WriteString(number + "\n"); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		io.WriteString(w, number)
	})
	for _, s := range stoppables() {
		if s.name == name {
			return s.serve(l, mux)
		}
	}
	return fmt.Errorf("no server %q", name)
}
