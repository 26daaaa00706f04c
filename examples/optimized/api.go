package main

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
)

// writeJSON responds with v. It encodes first, so that the response has a length.
// net/http sends no chunks then, which spares a system call.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // a type that cannot be encoded: Recovery responds and logs it
	}
	body = append(body, '\n')
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(body)
}

// apiError is the body of each response of the API that is an error.
type apiError struct {
	Error string `json:"error"`
}

func writeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, apiError{message})
}

// unmatched responds to requests below its own pattern that no other route of mux
// matches. The mux would respond in plain text, unmatched does in JSON: with 405
// and Allow if there is a route for another method, with 404 if there is none.
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
