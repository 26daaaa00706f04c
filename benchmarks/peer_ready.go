package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
)

// serveReady sends responses that are ready: what Conduit has responded with once, the
// header included, from one handler with no router. It is the limit that
// net/http sets to whatever stands on it.
func serveReady(s *site, l, secure net.Listener) (*service, error) {
	responses, err := readyResponses(s)
	if err != nil {
		return nil, err
	}
	return serveHandler(s, l, secure, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		response := responses[readyKey{
			path:        r.URL.Path,
			gzip:        len(r.Header["Accept-Encoding"]) > 0,
			conditional: len(r.Header["If-None-Match"]) > 0,
		}]
		if response == nil {
			http.NotFound(w, r)
			return
		}
		header := w.Header()
		for name, values := range response.header {
			header[name] = values
		}
		w.WriteHeader(response.status)
		if len(response.body) > 0 {
			w.Write(response.body)
		}
	}))
}

type readyKey struct {
	path              string
	gzip, conditional bool
}

type readyResponse struct {
	status int
	header http.Header
	body   []byte
}

// readyResponses asks a Conduit server for all responses that are always the same.
func readyResponses(s *site) (map[readyKey]*readyResponse, error) {
	l, secure, err := listen()
	if err != nil {
		return nil, err
	}
	conduit, err := serveConduit(s, l, secure)
	if err != nil {
		return nil, err
	}
	responses := make(map[readyKey]*readyResponse)
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
		responses[readyKey{r.path, r.gzip, r.conditional}] = &readyResponse{rec.Code, rec.Header(), rec.Body.Bytes()}
	}
	return responses, errors.Join(conduit.stop())
}

func record(h http.Handler, r *route, header http.Header) *httptest.ResponseRecorder {
	req := httptest.NewRequest(r.method, r.path, nil)
	req.Header = header
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return rec
}
