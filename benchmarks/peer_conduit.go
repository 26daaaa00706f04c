package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"example.com/conduit"
)

func serveConduit(s *site, l, secure net.Listener) (*service, error) {
	return serveConduitWith(conduit.Timeout, s, l, secure)
}

func serveConduitFast(s *site, l, secure net.Listener) (*service, error) {
	return serveConduitWith(conduit.FastTimeout, s, l, secure)
}

func serveConduitWith(timeout func(time.Duration) conduit.Middleware, s *site, l, secure net.Listener) (*service, error) {
	h := newConduitHandler(s, timeout(handlerTimeout))
	return serveConduitHandler(s, l, secure, h.mux, h.close)
}

// serveConduitHandler serves h with Conduit's server. To stop it calls
// closeHandler first.
func serveConduitHandler(s *site, l, secure net.Listener, h http.Handler, closeHandler func() error) (*service, error) {
	cfg := conduit.DefaultConfig(h)
	cfg.Logger = s.log
	plain, err := conduit.New(cfg)
	if err != nil {
		return nil, err
	}
	cfg.CertFile, cfg.KeyFile = s.certFile, s.keyFile
	overTLS, err := conduit.New(cfg)
	if err != nil {
		return nil, err
	}
	// A Server has its whole handler in place when it asks for a context.
	serves := make(chan struct{})
	closeServes := sync.OnceFunc(func() { close(serves) })
	plain.HTTPServer().BaseContext = func(net.Listener) context.Context {
		closeServes()
		return context.Background()
	}
	go plain.Serve(l)
	go overTLS.Serve(secure)
	<-serves
	return &service{
		server: plain.HTTPServer(),
		stop:   func() error { return errors.Join(closeHandler(), plain.Close(), overTLS.Close()) },
	}, nil
}

type conduitHandler struct {
	mux    *http.ServeMux
	files  *conduit.FileServer
	broker *conduit.SSEBroker
}

func newConduitHandler(s *site, timeout conduit.Middleware) *conduitHandler {
	h := &conduitHandler{
		mux:    http.NewServeMux(),
		files:  conduit.NewFileServer(s.dir, "/static"),
		broker: conduit.NewSSEBroker(nil),
	}
	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), timeout, conduit.Compression())
	h.mux.HandleFunc("GET /text", serveText)
	h.mux.HandleFunc("GET /json", s.serveItem)
	h.mux.HandleFunc("GET /items", s.serveItems)
	h.mux.HandleFunc("POST /items", servePost)
	h.mux.HandleFunc("GET /users/{id}/posts/{post}", serveParams)
	h.mux.Handle("GET /chain", chain(http.HandlerFunc(serveText)))
	h.mux.Handle("GET /document", conduit.Compression()(http.HandlerFunc(s.serveDocument)))
	h.mux.Handle("GET /static/", h.files)
	h.mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		conduit.StreamJSON(w, r, s.elementSeq())
	})
	events := make([]*conduit.SSEEvent, len(s.events))
	for i, e := range s.events {
		events[i] = &conduit.SSEEvent{ID: e.id, Event: e.name, Data: e.data}
	}
	h.mux.Handle("GET /sse", conduit.SSEHandler(func(stream *conduit.SSEStream, r *http.Request) error {
		return stream.Serve(source(r.Context(), events))
	}))
	h.mux.Handle("GET /events", h.broker)
	h.mux.Handle("POST /publish", servePublish(func(e event) error {
		return h.broker.Publish(&conduit.SSEEvent{ID: e.id, Event: e.name, Data: e.data})
	}))
	return h
}

func (h *conduitHandler) close() error { return errors.Join(h.broker.Close(), h.files.Close()) }

func (s *site) elementSeq() func(yield func(element, error) bool) {
	return func(yield func(element, error) bool) {
		for _, e := range s.elements {
			if !yield(e, nil) {
				return
			}
		}
	}
}
