package main

import (
	"cmp"
	"errors"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/valyala/fasthttp"
)

// A peer is one way to serve the routes.
type peer struct {
	name  string
	title string
	only  []string // the routes it has, whichever HTTP; nil: all
	lacks []string // and those that it has not
	http1 bool     // it speaks no HTTP/2
	// coding is the content coding that its clients accept where a route has
	// them accept one: gzip if empty.
	coding  string
	program string // that serves it, "" if it is this one
	// outside: it is a program of its own, which is not there in process.
	outside bool

	// serve serves s on l, and over TLS on secure, until the service is
	// stopped.
	serve func(s *site, l, secure net.Listener) (*service, error)
}

// service is a peer that serves.
type service struct {
	server   *http.Server            // what handles the requests of l; nil for those that are not net/http
	fasthttp fasthttp.RequestHandler // the same, for fiber
	pid      int                     // of the process that serves, if it is another one
	stop     func() error
}

// peers returns all of them, in the order of the table.
func peers() []peer {
	return []peer{
		{name: "net_http", title: "net/http by hand", serve: serveNetHTTP},
		{name: "conduit", title: "Conduit", serve: serveConduit},
		{name: "conduit_fast", title: "Conduit, FastTimeout", only: []string{"chain", "chain_gzip"}, serve: serveConduitFast},
		{name: "chi", title: "chi", lacks: []string{"fan_out", "fan_out_one"}, serve: serveChi},
		{name: "echo", title: "echo", lacks: []string{"fan_out", "fan_out_one"}, serve: serveEcho},
		{name: "gin", title: "gin", lacks: []string{"fan_out", "fan_out_one"}, serve: serveGin},
		{name: "fiber", title: "fiber (not net/http)", lacks: []string{"fan_out", "fan_out_one"}, http1: true, serve: serveFiber},
		{name: "gzhttp", title: "gzhttp", only: []string{"chain", "chain_gzip", "gzip", "script"}, serve: serveGzhttp},
		{name: "conduit_gzip", title: "Conduit, klauspost's gzip", only: []string{"gzip"}, http1: true, serve: serveConduitEncoder("gzip", newGzip)},
		{name: "chi_gzip", title: "chi, klauspost's gzip", only: []string{"gzip"}, http1: true, serve: serveChiEncoder("gzip", newGzip)},
		{name: "conduit_zstd", title: "Conduit, zstd", only: []string{"gzip"}, http1: true, coding: "zstd", serve: serveConduitEncoder("zstd", newZstd)},
		{name: "chi_zstd", title: "chi, zstd", only: []string{"gzip"}, http1: true, coding: "zstd", serve: serveChiEncoder("zstd", newZstd)},
		{name: "go_sse", title: "go-sse", only: []string{"sse", "fan_out", "fan_out_one"}, serve: serveGoSSE},
		{name: "ready", title: "ready bytes", lacks: notReady, serve: serveReady},
		{name: "nginx", title: "nginx", only: []string{"static", "not_modified", "script", "large", "connections"}, outside: true, serve: serveNginx},
	}
}

// builtWith returns net/http by hand and Conduit again, served by a program that
// another release of Go has built.
func builtWith(toolchain, program string) []peer {
	var list []peer
	for _, p := range peers() {
		if p.name == "net_http" || p.name == "conduit" {
			p.name += "@" + toolchain
			p.title += ", " + toolchain
			p.program = program
			list = append(list, p)
		}
	}
	return list
}

// notReady are the routes whose responses cannot be ready.
var notReady = []string{"post", "stream", "sse", "fan_out", "fan_out_one", "connections"}

// has reports whether p serves r.
func (p *peer) has(r *route) bool {
	name := r.name
	if r.http2 {
		if p.http1 {
			return false
		}
		name = strings.TrimSuffix(name, "_h2")
	}
	if p.only != nil {
		return slices.Contains(p.only, name)
	}
	return !slices.Contains(p.lacks, name)
}

// accepts is the content coding that clients of p accept.
func (p *peer) accepts() string { return cmp.Or(p.coding, "gzip") }

// The timeouts of a server are those that Conduit has by default: they cost
// something, so all peers have them.
const (
	readTimeout       = 15 * time.Second
	readHeaderTimeout = 10 * time.Second
	writeTimeout      = 15 * time.Second
	idleTimeout       = 60 * time.Second

	handlerTimeout = 30 * time.Second // of the chain
)

// serveHandler serves h with net/http's own server.
func serveHandler(s *site, l, secure net.Listener, h http.Handler) (*service, error) {
	plain, overTLS := newServer(h), newServer(h)
	go plain.Serve(l)
	go overTLS.ServeTLS(secure, s.certFile, s.keyFile)
	return &service{
		server: plain,
		stop:   func() error { return errors.Join(plain.Close(), overTLS.Close()) },
	}, nil
}

// newServer returns a plain server with the timeouts of all.
func newServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadTimeout:       readTimeout,
		ReadHeaderTimeout: readHeaderTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
	}
}
