package main

import (
	"net"
	"net/http"

	"github.com/klauspost/compress/gzhttp"
)

// serveGzhttp is net/http by hand with gzhttp for compression, as its README
// sets it up; the script is compressed on its way, out of http.FileServer.
func serveGzhttp(s *site, l, secure net.Listener) (*service, error) {
	compress := func(h http.Handler) http.Handler { return gzhttp.GzipHandler(h) }
	mux := newNetHTTPHandler(s, compress)
	files := http.StripPrefix("/static", http.FileServer(http.Dir(s.dir)))
	h := http.NewServeMux()
	h.Handle("/", mux)
	h.Handle("GET /static/", compress(files))
	return serveHandler(s, l, secure, h)
}
