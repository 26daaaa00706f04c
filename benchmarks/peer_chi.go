package main

import (
	"io"
	"log"
	"net"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
)

// serveChi has chi's own middleware, in the order of its README. Its Timeout
// cancels the request's context and responds for no handler that ignores that.
// It has no streams of its own: they are the usual loops by hand that send each
// element when it is made.
func serveChi(s *site, l, secure net.Listener) (*service, error) {
	r := chi.NewRouter()
	r.Get("/text", serveText)
	r.Get("/json", s.serveItem)
	r.Get("/items", s.serveItems)
	r.Post("/items", servePost)
	r.Get("/users/{id}/posts/{post}", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", textType)
		io.WriteString(w, chi.URLParam(r, "id")+" "+chi.URLParam(r, "post"))
	})
	r.Group(func(r chi.Router) {
		r.Use(middleware.RequestID, sendRequestID)
		r.Use(middleware.RequestLogger(&middleware.DefaultLogFormatter{Logger: log.New(discard{}, "", log.LstdFlags), NoColor: true}))
		r.Use(middleware.Recoverer)
		r.Use(middleware.Timeout(handlerTimeout))
		r.Use(middleware.Compress(5))
		r.Get("/chain", serveText)
	})
	files := http.StripPrefix("/static", http.FileServer(http.Dir(s.dir)))
	r.Handle("/static/*", files) // Compress would take sendfile from the large one
	r.Group(func(r chi.Router) {
		r.Use(middleware.Compress(5))
		r.Get("/document", s.serveDocument)
		r.Handle("/static/script.js", files)
	})
	r.Get("/stream", s.serveStreamFlushed)
	r.Get("/sse", s.serveSSE)
	return serveHandler(s, l, secure, r)
}

// sendRequestID has the response carry the id, which chi's own RequestID leaves to
// the service.
func sendRequestID(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(middleware.RequestIDHeader, middleware.GetReqID(r.Context()))
		next.ServeHTTP(w, r)
	})
}
