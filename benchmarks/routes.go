package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// A route is a row of the table: a request, the response that every peer must
// give, and what Conduit is to reach.
type route struct {
	name  string // in flags and in the names of benchmarks
	title string // in the table
	kind  kind

	method      string // GET
	path        string
	body        string // sent as JSON
	gzip        bool   // say that gzip is accepted
	compressed  bool   // and the response must be compressed
	conditional bool   // send the validators of a first response

	status int    // 200
	mime   string // the media type, without parameters
	want   func(*site) []byte
	same   func(got, want []byte) error // bytes.Equal

	http2   bool // over TLS and HTTP/2
	targets []target
}

type kind int

const (
	requests    kind = iota // as many as go
	fanOut                  // events published to 1,000 clients
	connections             // open and idle
)

// A target is the least ratio of a peer to another one, or to the best of
// several. It is reached too where the ratio to the ready response, which is
// net/http's own limit, is at least readyLimit.
type target struct {
	of      string
	against []string
	atLeast float64
}

const readyLimit = 0.95

var routers = []string{"chi", "echo", "gin"}

// least returns the targets of Conduit to net/http by hand, and to the best
// router.
func least(byHand, router float64) []target {
	return []target{
		{"conduit", []string{"net_http"}, byHand},
		{"conduit", routers, router},
	}
}

// routes returns every route, in the order of the table.
func routes() []route {
	list := []route{
		{
			name: "text", title: "text", path: "/text",
			mime: "text/plain", want: hello, targets: least(0.98, 0.97),
		},
		{
			name: "json", title: "JSON", path: "/json",
			mime: jsonType, want: func(s *site) []byte { return encoded(s.item) }, same: sameJSON, targets: least(0.98, 0.97),
		},
		{
			name: "json_array", title: "JSON array of 100", path: "/items",
			mime: jsonType, want: func(s *site) []byte { return encoded(s.items) }, same: sameJSON, targets: least(0.98, 0.97),
		},
		{
			name: "params", title: "path parameters", path: "/users/17/posts/42",
			mime: "text/plain", want: func(*site) []byte { return []byte("17 42") }, targets: least(0.98, 0.97),
		},
		{
			name: "post", title: "POST with body", method: "POST", path: "/items",
			body: `{"id":41,"name":"item 42","price":19.99,"tags":["new","sale"]}`,
			mime: jsonType, want: func(s *site) []byte { return encoded(s.item) }, same: sameJSON, targets: least(0.98, 0.97),
		},
		{
			name: "chain", title: "chain of five", path: "/chain",
			mime: "text/plain", want: hello, targets: least(1.15, 1),
		},
		{
			name: "chain_gzip", title: "chain of five, gzip accepted", path: "/chain", gzip: true,
			mime: "text/plain", want: hello, targets: least(1.15, 1),
		},
		{
			name: "gzip", title: "gzip of 40 KB JSON", path: "/document", gzip: true, compressed: true,
			mime: jsonType, want: func(s *site) []byte { return s.document }, targets: append(least(1.5, 1.2),
				target{"conduit_gzip", []string{"net_http"}, 2.5},
				target{"conduit_zstd", []string{"net_http"}, 2.5},
			),
		},
		{
			name: "static", title: "static 4 KB", path: "/static/small.txt",
			mime: "text/plain", want: func(s *site) []byte { return s.file("small.txt") }, targets: least(1.5, 1.5),
		},
		{
			name: "not_modified", title: "304", path: "/static/small.txt", conditional: true,
			status: 304, want: func(*site) []byte { return nil }, targets: least(1.7, 1.7),
		},
		{
			name: "script", title: "131 KB script as gzip", path: "/static/script.js", gzip: true, compressed: true,
			mime: "text/javascript", want: func(s *site) []byte { return s.file("script.js") }, targets: least(1.8, 5),
		},
		{
			name: "large", title: "1 MiB file", path: "/static/large.pdf",
			mime: "application/pdf", want: func(s *site) []byte { return s.file("large.pdf") }, targets: least(1.05, 1),
		},
		{
			name: "stream", title: "JSON stream of 1,000", path: "/stream",
			mime: jsonType, want: func(s *site) []byte { return encoded(s.elements) }, same: sameJSON, targets: least(1.4, 5),
		},
		{
			name: "sse", title: "SSE of 1,000 from a channel", path: "/sse",
			mime: "text/event-stream", want: func(s *site) []byte { return eventStream(s.events) }, same: sameEvents, targets: least(20, 20),
		},
		{
			name: "fan_out", title: "SSE to 1,000 clients, 100 at a time", path: "/events", kind: fanOut, body: "100",
			targets: []target{{"conduit", []string{"go_sse"}, 3}},
		},
		{
			name: "fan_out_one", title: "SSE to 1,000 clients, one at a time", path: "/events", kind: fanOut, body: "1",
			targets: []target{{"conduit", []string{"go_sse"}, 0.9}},
		},
		{
			name: "connections", title: "memory per open connection", path: "/text", kind: connections,
			targets: []target{{"conduit", []string{"net_http"}, 1 / 1.03}},
		},
	}
	for i := range list {
		list[i].method = cmp.Or(list[i].method, "GET")
		list[i].status = cmp.Or(list[i].status, 200)
		if list[i].same == nil {
			list[i].same = sameBytes
		}
	}
	return append(list, overHTTP2(list)...)
}

// overHTTP2 returns the main ones of list, over TLS and HTTP/2. The targets are
// those of HTTP/1.1, but for the plain routes.
func overHTTP2(list []route) []route {
	var second []route
	for _, r := range list {
		switch r.name {
		case "text", "json":
			r.targets = least(0.97, 0.97)
		case "gzip":
			r.targets = r.targets[:2] // klauspost's encoders are measured over HTTP/1.1 alone
		case "chain", "chain_gzip", "static", "script", "stream", "sse":
		default:
			continue
		}
		r.http2 = true
		r.name += "_h2"
		r.title += ", HTTP/2"
		second = append(second, r)
	}
	return second
}

func hello(*site) []byte { return []byte(helloText) }

func encoded(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return text
}

func eventStream(events []event) []byte {
	var buf bytes.Buffer
	for _, e := range events {
		fmt.Fprintf(&buf, "id: %s\nevent: %s\ndata: %s\n\n", e.id, e.name, e.data)
	}
	return buf.Bytes()
}

func sameBytes(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return fmt.Errorf("body of %d bytes %.60q, want %d bytes %.60q", len(got), got, len(want), want)
	}
	return nil
}

// sameJSON compares without white space: json.Encoder ends a document with a
// newline, json.Marshal does not, and frameworks use either.
func sameJSON(got, want []byte) error {
	var compact bytes.Buffer
	if err := json.Compact(&compact, got); err != nil {
		return fmt.Errorf("body %.60q: %w", got, err)
	}
	return sameBytes(compact.Bytes(), want)
}

// sameEvents compares the fields of events, whose order and spaces are the
// peer's to choose.
func sameEvents(got, want []byte) error {
	g, w := parseEvents(got), parseEvents(want)
	if !slices.Equal(g, w) {
		return fmt.Errorf("%d events %.200q, want %d %.200q", len(g), got, len(w), want)
	}
	return nil
}

func parseEvents(stream []byte) []event {
	var events []event
	for block := range strings.SplitSeq(string(stream), "\n\n") {
		var e event
		for line := range strings.SplitSeq(block, "\n") {
			field, value, _ := strings.Cut(line, ":")
			value = strings.TrimPrefix(value, " ")
			switch field {
			case "id":
				e.id = value
			case "event":
				e.name = value
			case "data":
				e.data = value
			}
		}
		if e != (event{}) {
			events = append(events, e)
		}
	}
	return events
}
