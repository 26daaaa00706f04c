package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
)

// serveReady sends replies that are ready: what Conduit has answered once, the
// header included, from one handler with no router. It is the limit that
// net/http sets to whatever stands on it.
func serveReady(s *site, l, secure net.Listener) (*service, error) {
	replies, err := readyReplies(s)
	if err != nil {
		return nil, err
	}
	return serveHandler(s, l, secure, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reply := replies[readyKey{
			path:        r.URL.Path,
			gzip:        len(r.Header["Accept-Encoding"]) > 0,
			conditional: len(r.Header["If-None-Match"]) > 0,
		}]
		if reply == nil {
			http.NotFound(w, r)
			return
		}
		header := w.Header()
		for name, values := range reply.header {
			header[name] = values
		}
		w.WriteHeader(reply.status)
		if len(reply.body) > 0 {
			w.Write(reply.body)
		}
	}))
}

type readyKey struct {
	path              string
	gzip, conditional bool
}

type readyReply struct {
	status int
	header http.Header
	body   []byte
}

// readyReplies asks a Conduit server for all replies that are always the same.
func readyReplies(s *site) (map[readyKey]*readyReply, error) {
	l, secure, err := listen()
	if err != nil {
		return nil, err
	}
	conduit, err := serveConduit(s, l, secure)
	if err != nil {
		return nil, err
	}
	replies := make(map[readyKey]*readyReply)
	for _, r := range routes() {
		if r.http2 || r.kind != requests || slices.Contains(notReady, r.name) {
			continue
		}
		header := r.header(&peer{})
		rec := record(conduit.server.Handler, &r, header)
		if r.conditional {
			addValidators(header, rec.Header())
			rec = record(conduit.server.Handler, &r, header)
		}
		if rec.Code != r.status {
			return nil, fmt.Errorf("ready: %s: status %d, want %d", r.name, rec.Code, r.status)
		}
		replies[readyKey{r.path, r.gzip, r.conditional}] = &readyReply{rec.Code, rec.Header(), rec.Body.Bytes()}
	}
	return replies, errors.Join(conduit.stop())
}

func record(h http.Handler, r *route, header http.Header) *httptest.ResponseRecorder {
	req := httptest.NewRequest(r.method, r.path, nil)
	req.Header = header
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return rec
}
