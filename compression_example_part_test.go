package conduit_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"

	"example.com/conduit"
)

// A long list goes out coded to clients that accept it, a short reply as it
// is.
func ExampleCompression() {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, r *http.Request) {
		items := make([]map[string]any, 1000)
		for i := range items {
			items[i] = map[string]any{"id": i, "name": fmt.Sprint("item ", i)}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(items)
	})
	mux.HandleFunc("GET /hello", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello")
	})
	handler := conduit.Compression()(mux)

	for _, path := range []string{"/items", "/hello"} {
		for _, accept := range []string{"gzip, deflate, br", "identity"} {
			r := httptest.NewRequest("GET", path, nil)
			r.Header.Set("Accept-Encoding", accept)
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			fmt.Printf("%s for %s: over 10 KB %t, %v\n", path, accept, w.Body.Len() > 10<<10, w.Header()["Content-Encoding"])
		}
	}
	// Output:
	// /items for gzip, deflate, br: over 10 KB false, [gzip]
	// /items for identity: over 10 KB true, []
	// /hello for gzip, deflate, br: over 10 KB false, []
	// /hello for identity: over 10 KB false, []
}

// Code large replies alone, of the types that the service sends, and take more
// time for it.
func ExampleCompressionWith() {
	compress := conduit.CompressionWith(&conduit.CompressionConfig{
		Level:   6,
		MinSize: 16 << 10,
		Types:   []string{"text/*", "application/json", "*/*+json"},
	})
	srv, err := conduit.New(conduit.DefaultConfig(compress(http.DefaultServeMux)))
	if err != nil {
		fmt.Println(err)
		return
	}
	srv.ListenAndServe()
}
