// Basic is the smallest whole service: a mux, a server with the defaults, and
// a shutdown that loses no request.
//
//	go run ./examples/basic
//	curl localhost:8080/hello/gopher
//
// Ctrl-C stops it.
package main

import (
	"fmt"
	"net/http"
	"os"

	"example.com/conduit"
)

func main() {
	mux := http.NewServeMux()
	mux.Handle("GET /health", conduit.Health())
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "Try /hello/gopher.")
	})
	mux.HandleFunc("GET /hello/{name}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello, %s\n", r.PathValue("name"))
	})

	srv, err := conduit.New(conduit.DefaultConfig(mux))
	if err == nil {
		err = conduit.StartWithGracefulShutdown(srv, nil)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "basic:", err)
		os.Exit(1)
	}
}
