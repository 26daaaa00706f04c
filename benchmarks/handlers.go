package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
)

// These are handlers as one writes them for net/http, which every peer that
// takes an http.Handler uses.

func serveText(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", textType)
	io.WriteString(w, helloText)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", jsonType)
	json.NewEncoder(w).Encode(v)
}

func (s *site) serveItem(w http.ResponseWriter, r *http.Request) { writeJSON(w, s.item) }

func (s *site) serveItems(w http.ResponseWriter, r *http.Request) { writeJSON(w, s.items) }

func servePost(w http.ResponseWriter, r *http.Request) {
	var received item
	if err := json.NewDecoder(r.Body).Decode(&received); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	received.ID++
	writeJSON(w, received)
}

func (s *site) serveDocument(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", jsonType)
	w.Write(s.document)
}

// serveStream is the loop by hand that sends the whole of a stream with one
// flush: the cheapest one, whose first element waits for a buffer to fill.
func (s *site) serveStream(w http.ResponseWriter, r *http.Request) { s.writeStream(w, false) }

// serveStreamFlushed is the loop by hand that sends each element when it is
// made.
func (s *site) serveStreamFlushed(w http.ResponseWriter, r *http.Request) { s.writeStream(w, true) }

func (s *site) writeStream(w http.ResponseWriter, flushEach bool) {
	w.Header().Set("Content-Type", jsonType)
	flusher := http.NewResponseController(w)
	encoder := json.NewEncoder(w)
	io.WriteString(w, "[")
	for i := range s.elements {
		if i > 0 {
			io.WriteString(w, ",")
		}
		if encoder.Encode(&s.elements[i]) != nil {
			return
		}
		if flushEach && flusher.Flush() != nil {
			return
		}
	}
	io.WriteString(w, "]")
	flusher.Flush()
}

func (s *site) serveSSE(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	flusher := http.NewResponseController(w)
	for e := range source(r.Context(), s.events) {
		fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.id, e.name, e.data)
		if flusher.Flush() != nil {
			return
		}
	}
}

// servePublish returns the handler that publishes as many events to all
// clients as the query's n says.
func servePublish(publish func(event) error) http.HandlerFunc {
	var sequence atomic.Int64
	return func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil || n < 1 {
			http.Error(w, "n is no number", http.StatusBadRequest)
			return
		}
		for range n {
			if err := publish(event{id: strconv.FormatInt(sequence.Add(1), 10), name: "tick", data: eventData}); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
		w.WriteHeader(http.StatusNoContent)
	}
}
