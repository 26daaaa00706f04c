// This file starts curl, and nginx with its defaults and with a cache. It proves
// that a client that was sent a part of a response sees that it is one, over each
// protocol and however the response was aborted: curl's exit status says so, and the
// cache keeps nothing of it.

package conformance

import (
	"errors"
	"io"
	"iter"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/conduit"
)

// firstBytes are what a client has before the response is aborted.
var firstBytes = strings.Repeat("0123456789abcde\n", 640)

// cuts are the handlers that abort their responses.
func cuts() map[string]http.Handler {
	const timeout = 500 * time.Millisecond
	late := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sendFirstBytes(w)
		<-r.Context().Done()
	})
	panics := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sendFirstBytes(w)
		panic("on purpose")
	})
	elements := func(*http.Request) iter.Seq2[string, error] {
		return func(yield func(string, error) bool) {
			for range 2 { // of less than 16 KiB none may be out yet
				if !yield(firstBytes, nil) {
					return
				}
			}
			yield("", errors.New("on purpose"))
		}
	}
	return map[string]http.Handler{
		"panic behind Recovery":    conduit.Recovery()(panics),
		"panic":                    panics,
		"panic behind Compression": conduit.Chain(conduit.Recovery(), conduit.Compression())(panics),
		"panic in a stream": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if s, err := conduit.NewTextStream(w, r); err == nil {
				io.WriteString(s, firstBytes)
			}
			panic("on purpose")
		}),
		"ErrAbortHandler": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			sendFirstBytes(w)
			panic(http.ErrAbortHandler)
		}),
		"Timeout":     conduit.Timeout(timeout)(late),
		"FastTimeout": conduit.FastTimeout(timeout)(late),
		"JSONHandler": conduit.JSONHandler(elements),
		"StreamNDJSON": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			conduit.StreamNDJSON(w, r, elements(r))
		}),
		"JSONStream.Abort": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if s, err := conduit.NewJSONStream(w, r); err == nil {
				s.Write(firstBytes)
				s.Write(firstBytes)
				s.Abort()
			}
		}),
		"Stream.ReadFrom": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if s, err := conduit.NewTextStream(w, r); err == nil {
				s.ReadFrom(io.MultiReader(strings.NewReader(firstBytes), failingReader{}))
			}
		}),
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("on purpose") }

func sendFirstBytes(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "text/plain")
	io.WriteString(w, firstBytes)
	http.NewResponseController(w).Flush()
}

func TestCurlSeesThatAResponseIsCut(t *testing.T) {
	t.Parallel()
	curl := program(t, "curl")
	var mu sync.Mutex
	requests := make(map[string]int) // guarded by mu: how many there were of a URL
	mux := http.NewServeMux()
	handle := func(name string, h http.Handler) {
		mux.HandleFunc("/{way}/"+pathOf(name), func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			requests[r.URL.Path]++
			mu.Unlock()
			h.ServeHTTP(w, r)
		})
	}
	handle("whole", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { sendFirstBytes(w) }))
	for name, h := range cuts() {
		handle(name, h)
	}
	cfg := conduit.DefaultConfig(mux)
	cfg.EnableH2C = true
	plain := serve(t, cfg)
	overTLS := conduit.DefaultConfig(mux)
	overTLS.TLSConfig = testTLS()
	secure := serve(t, overTLS)
	nginx := startNginx(t, `
		proxy_cache_path DIR/cache keys_zone=responses:1m;
		proxy_cache_valid 200 1h;
		proxy_ignore_headers Cache-Control Expires X-Accel-Buffering;
		server {
			listen ADDRESS;
			location / { proxy_pass `+plain.url+`; }
			location /new/ { proxy_http_version 1.1; proxy_pass `+plain.url+`; }
			location /cache/ { proxy_cache responses; proxy_pass `+plain.url+`; }
		}`)

	const (
		partialFile  = 18
		receiveError = 56
		streamError  = 92
	)
	ways := []struct {
		name string
		args []string
		url  string
		want []int
	}{
		{"HTTP/1.1", []string{"--http1.1"}, plain.url + "/http1.1/", []int{partialFile}},
		{"HTTP/1.0", []string{"--http1.0"}, plain.url + "/http1.0/", []int{receiveError}},
		{"HTTP/2 in cleartext", []string{"--http2-prior-knowledge"}, plain.url + "/h2c/", []int{streamError}},
		{"HTTP/1.1 over TLS", []string{"--insecure", "--http1.1"}, secure.url + "/http1.1/", []int{partialFile, receiveError}}, // a record is truncated as well
		{"HTTP/1.0 over TLS", []string{"--insecure", "--no-alpn", "--http1.0"}, secure.url + "/http1.0/", []int{receiveError}},
		{"HTTP/2", []string{"--insecure", "--http2"}, secure.url + "/h2/", []int{streamError}},
		{"nginx", nil, "http://" + nginx + "/old/", []int{partialFile}},
		{"nginx with proxy_http_version 1.1", nil, "http://" + nginx + "/new/", []int{partialFile}},
		{"nginx with a cache", nil, "http://" + nginx + "/cache/", []int{partialFile}},
	}
	ask := func(t *testing.T, url string, args ...string) (body, stderr string, status int) {
		t.Helper()
		return run(t, nil, curl, append(args, "--silent", "--show-error", "--fail", "--compressed", "--max-time", "60", url)...)
	}
	// The group ends when all that is parallel in it has.
	t.Run("over", func(t *testing.T) {
		for _, way := range ways {
			t.Run(way.name, func(t *testing.T) {
				t.Parallel()
				for range 2 { // a cache that has kept something has it now
					if body, stderr, status := ask(t, way.url+"whole", way.args...); status != 0 || body != firstBytes {
						t.Errorf("whole: exit status %d and %d bytes, want 0 and %d; %s", status, len(body), len(firstBytes), stderr)
					}
					for name := range cuts() {
						if body, stderr, status := ask(t, way.url+pathOf(name), way.args...); !slices.Contains(way.want, status) {
							t.Errorf("%s: exit status %d after %d bytes, want one of %d; %s", name, status, len(body), way.want, stderr)
						}
					}
				}
			})
		}
	})
	mu.Lock()
	defer mu.Unlock()
	if got := requests["/cache/whole"]; got != 1 {
		t.Errorf("behind the cache there were %d requests for the whole response, want 1", got)
	}
	for name := range cuts() {
		if got := requests["/cache/"+pathOf(name)]; got != 2 {
			t.Errorf("%s: behind the cache there were %d requests, want 2", name, got)
		}
	}
}

func pathOf(name string) string { return strings.ReplaceAll(name, " ", "-") }
