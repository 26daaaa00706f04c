package main

import (
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// serveNetHTTP is what a careful service does on net/http alone: each
// middleware by hand, http.TimeoutHandler, http.FileServer, a script that was
// compressed when it was built, a channel for each client of the events.
func serveNetHTTP(s *site, l, secure net.Listener) (*service, error) {
	return serveHandler(s, l, secure, newNetHTTPHandler(s, gzipByHand))
}

// newNetHTTPHandler returns the routes with compress as the middleware for
// compression.
func newNetHTTPHandler(s *site, compress func(http.Handler) http.Handler) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /text", serveText)
	mux.HandleFunc("GET /json", s.serveItem)
	mux.HandleFunc("GET /items", s.serveItems)
	mux.HandleFunc("POST /items", servePost)
	mux.HandleFunc("GET /users/{id}/posts/{post}", serveParams)
	mux.Handle("GET /chain", requestIDByHand(recoverByHand(s.logByHand(
		http.TimeoutHandler(compress(http.HandlerFunc(serveText)), handlerTimeout, "Service Unavailable\n")))))
	mux.Handle("GET /document", compress(http.HandlerFunc(s.serveDocument)))
	mux.Handle("GET /static/", http.StripPrefix("/static", http.FileServer(http.Dir(s.dir))))
	mux.HandleFunc("GET /static/script.js", s.serveScript)
	mux.HandleFunc("GET /stream", s.serveStream)
	mux.HandleFunc("GET /sse", s.serveSSE)
	b := &broker{clients: make(map[chan event]context.Context)}
	mux.Handle("GET /events", b)
	mux.Handle("POST /publish", servePublish(b.publish))
	return mux
}

func serveParams(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", textType)
	io.WriteString(w, r.PathValue("id")+" "+r.PathValue("post"))
}

// serveScript sends the file that was compressed before to those that accept
// it.
func (s *site) serveScript(w http.ResponseWriter, r *http.Request) {
	name := "script.js"
	w.Header().Set("Vary", "Accept-Encoding")
	w.Header().Set("Content-Type", "text/javascript; charset=utf-8")
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		name = "script.js.gz"
		w.Header().Set("Content-Encoding", "gzip")
	}
	file, err := os.Open(filepath.Join(s.dir, name))
	if err != nil {
		http.NotFound(w, r)
		return
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		http.Error(w, "Internal Server Error", http.StatusInternalServerError)
		return
	}
	http.ServeContent(w, r, name, info.ModTime(), file)
}

type requestIDKey struct{}

func requestIDByHand(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-ID")
		if id == "" {
			var random [16]byte
			rand.Read(random[:])
			id = hex.EncodeToString(random[:])
		}
		w.Header().Set("X-Request-ID", id)
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id)))
	})
}

func recoverByHand(next http.Handler) http.Handler {
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

// recorder remembers status and size.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *recorder) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.bytes += n
	return n, err
}

func (s *site) logByHand(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r)
		level := slog.LevelInfo
		if rec.status >= 500 {
			level = slog.LevelError
		}
		id, _ := r.Context().Value(requestIDKey{}).(string)
		s.log.LogAttrs(r.Context(), level, "request",
			slog.String("method", r.Method),
			slog.String("path", r.URL.Path),
			slog.String("pattern", r.Pattern),
			slog.Int("status", rec.status),
			slog.Int("bytes", rec.bytes),
			slog.Duration("duration", time.Since(start)),
			slog.String("remote", r.RemoteAddr),
			slog.String("request_id", id),
		)
	})
}

// gzipByHand has a pool, gzip's own level and no smallest size.
func gzipByHand(next http.Handler) http.Handler {
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
		next.ServeHTTP(gzipWriter{w, z}, r)
	})
}

type gzipWriter struct {
	http.ResponseWriter
	z *gzip.Writer
}

func (w gzipWriter) Write(p []byte) (int, error) { return w.z.Write(p) }

// broker gives each client a channel, and formats and flushes each event for
// each client.
type broker struct {
	mu      sync.Mutex
	clients map[chan event]context.Context
}

func (b *broker) publish(e event) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for ch, ctx := range b.clients {
		select {
		case ch <- e:
		case <-ctx.Done():
		}
	}
	return nil
}

func (b *broker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ch := make(chan event, 256)
	b.mu.Lock()
	b.clients[ch] = r.Context()
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.clients, ch)
	}()
	flusher := http.NewResponseController(w)
	flusher.SetWriteDeadline(time.Time{}) // or the server's WriteTimeout ends the stream
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	flusher.Flush()
	for {
		select {
		case e := <-ch:
			fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.id, e.name, e.data)
			if flusher.Flush() != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}
