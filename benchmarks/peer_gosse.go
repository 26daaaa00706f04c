package main

import (
	"net"
	"net/http"
	"time"

	"github.com/tmaxmax/go-sse"
)

// serveGoSSE has go-sse's sessions for one client and its Server, with the
// provider that it has by default, for many.
func serveGoSSE(s *site, l, secure net.Listener) (*service, error) {
	messages := make([]*sse.Message, len(s.events))
	for i, e := range s.events {
		messages[i] = newMessage(e)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /sse", func(w http.ResponseWriter, r *http.Request) {
		session, err := sse.Upgrade(w, r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for m := range source(r.Context(), messages) {
			if session.Send(m) != nil || session.Flush() != nil {
				return
			}
		}
	})
	server := &sse.Server{}
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		// Or the server's WriteTimeout ends the stream.
		http.NewResponseController(w).SetWriteDeadline(time.Time{})
		server.ServeHTTP(w, r)
	})
	mux.Handle("POST /publish", servePublish(func(e event) error { return server.Publish(newMessage(e)) }))
	return serveHandler(s, l, secure, mux)
}

func newMessage(e event) *sse.Message {
	m := &sse.Message{ID: sse.ID(e.id), Type: sse.Type(e.name)}
	m.AppendData(e.data)
	return m
}
