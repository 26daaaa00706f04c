package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/valyala/fasthttp"
)

// BenchmarkRoutes is the handlers in process: no connection, a writer that
// throws away what it gets and flushes for nothing. To compare:
//
//	go test -run '^$' -bench Routes -count 6 | tee bench.txt
//	go run golang.org/x/perf/cmd/benchstat@latest -row /route -col '/peer@(net_http conduit chi echo gin fiber)' bench.txt
func BenchmarkRoutes(b *testing.B) {
	sites := make(map[string]*site)
	for _, p := range peers() {
		var err error
		if sites[p.name], err = newSite(b.TempDir()); err != nil {
			b.Fatal(err)
		}
	}
	for _, r := range routes() {
		if r.kind != requests || r.http2 {
			continue
		}
		b.Run("route="+r.name, func(b *testing.B) {
			for _, p := range peers() {
				if p.outside || !p.has(&r) {
					continue
				}
				b.Run("peer="+p.name, func(b *testing.B) { benchmark(b, &p, &r, sites[p.name]) })
			}
		})
	}
}

func benchmark(b *testing.B, p *peer, r *route, s *site) {
	l, secure, err := listen()
	if err != nil {
		b.Fatal(err)
	}
	svc, err := p.serve(s, l, secure)
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		if err := svc.stop(); err != nil {
			b.Error(err)
		}
	}()
	// Over a connection, because a response in process has no protocol.
	x, err := check(b.Context(), "http://"+l.Addr().String(), p, r, s)
	if err != nil {
		b.Fatal(err)
	}
	if svc.server == nil {
		benchmarkFasthttp(b, svc.fasthttp, x)
	} else {
		benchmarkHandler(b, svc.server, x)
	}
}

func benchmarkHandler(b *testing.B, srv *http.Server, x *exchange) {
	ctx, cancel := context.WithCancel(requestContext(srv))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, x.method, "http://127.0.0.1"+x.path, nil)
	if err != nil {
		b.Fatal(err)
	}
	req.RequestURI, req.RemoteAddr, req.Header = x.path, "192.0.2.1:1234", x.header
	body, sent := &requestBody{}, []byte(x.body)
	if x.body != "" {
		req.Body, req.ContentLength = body, int64(len(x.body))
	}
	w := &discardWriter{header: make(http.Header)}
	b.ReportAllocs()
	for b.Loop() {
		body.Reset(sent)
		clear(w.header)
		w.status, w.length = 0, 0
		srv.Handler.ServeHTTP(w, req)
		if err := x.checkAgain(w.status, w.length); err != nil {
			b.Fatal(err)
		}
	}
}

func benchmarkFasthttp(b *testing.B, h fasthttp.RequestHandler, x *exchange) {
	var req fasthttp.Request
	req.SetRequestURI(x.path)
	req.Header.SetMethod(x.method)
	req.Header.SetHost("127.0.0.1")
	for name, values := range x.header {
		req.Header.Set(name, values[0])
	}
	req.SetBodyString(x.body)
	var ctx fasthttp.RequestCtx
	sent := &counter{}
	b.ReportAllocs()
	for b.Loop() {
		ctx.Init(&req, nil, nil)
		ctx.Response.Reset()
		h(&ctx)
		sent.n = 0
		if err := ctx.Response.BodyWriteTo(sent); err != nil {
			b.Fatal(err)
		}
		ctx.Response.CloseBodyStream()
		if err := x.checkAgain(ctx.Response.StatusCode(), sent.n); err != nil {
			b.Fatal(err)
		}
	}
}

// requestContext is like the one that net/http gives a request on a connection.
func requestContext(srv *http.Server) context.Context {
	ctx := context.Background()
	if srv.BaseContext != nil {
		ctx = srv.BaseContext(nil)
	}
	ctx = context.WithValue(ctx, http.ServerContextKey, srv)
	return context.WithValue(ctx, http.LocalAddrContextKey, &net.TCPAddr{})
}

type requestBody struct{ bytes.Reader }

func (*requestBody) Close() error { return nil }

// discardWriter has what net/http's own writer has, so that nobody goes a
// longer way here than there.
type discardWriter struct {
	header http.Header
	status int
	length int
}

func (w *discardWriter) Header() http.Header { return w.header }

func (w *discardWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *discardWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	w.length += len(p)
	return len(p), nil
}

func (w *discardWriter) WriteString(s string) (int, error) {
	w.WriteHeader(http.StatusOK)
	w.length += len(s)
	return len(s), nil
}

// ReadFrom reads a file, which sendfile would not: large files are compared end
// to end.
func (w *discardWriter) ReadFrom(src io.Reader) (int64, error) {
	w.WriteHeader(http.StatusOK)
	n, err := io.Copy(io.Discard, src)
	w.length += int(n)
	return n, err
}

func (w *discardWriter) Flush()                           { w.WriteHeader(http.StatusOK) }
func (w *discardWriter) FlushError() error                { w.Flush(); return nil }
func (w *discardWriter) SetReadDeadline(time.Time) error  { return nil }
func (w *discardWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *discardWriter) CloseNotify() <-chan bool         { return nil }

type counter struct{ n int }

func (c *counter) Write(p []byte) (int, error) {
	c.n += len(p)
	return len(p), nil
}
