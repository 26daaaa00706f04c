package main

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
)

// writeJSON replies with v. It encodes first, so that a length can be given,
// which spares the reply a chunk, and a write system call with it.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // a type that cannot be encoded: Recovery answers and logs it
	}
	body = append(body, '\n')
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(body)
}

// apiError is the body of every reply of the API that is an error.
type apiError struct {
	Error string `json:"error"`
}

func writeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, apiError{message})
}

// unmatched answers what no route of mux below its own pattern takes. The mux
// would do it in plain text; this says the same in JSON: 405 with Allow where
// another method has a route, 404 where none has.
func unmatched(mux *http.ServeMux) http.Handler {
	methods := []string{
		http.MethodGet, http.MethodHead, http.MethodPost,
		http.MethodPut, http.MethodPatch, http.MethodDelete,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var allowed []string
		for _, method := range methods {
			probe := &http.Request{Method: method, Host: r.Host, URL: r.URL}
			if _, pattern := mux.Handler(probe); pattern != r.Pattern {
				allowed = append(allowed, method)
			}
		}
		if allowed == nil {
			writeError(w, http.StatusNotFound, "not found")
			return
		}
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		writeError(w, http.StatusMethodNotAllowed, "method not allowed")
	})
}
