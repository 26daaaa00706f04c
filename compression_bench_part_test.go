package conduit_test

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"example.com/conduit"
)

// BenchmarkCompression measures 40 KB of JSON, which a client that accepts
// gzip gets coded, and a body that is too small for it. Written by hand, the
// writer is pooled and has gzip's own level, 6, and nothing is too small.
func BenchmarkCompression(b *testing.B) {
	large := compressionJSON(40 << 10)
	for _, c := range []struct{ name, reply, accept string }{
		{"JSON_40KB", large, "gzip, deflate, br, zstd"},
		{"tiny", benchHelloText, "gzip, deflate, br, zstd"},
		{"not_accepted", large, "identity"},
	} {
		b.Run(c.name, func(b *testing.B) {
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Content-Type"] = compressionJSONType
				io.WriteString(w, c.reply)
			})
			b.Run("conduit", func(b *testing.B) {
				compressionBench(b, benchConduitServer(b, conduit.Compression()(h), slog.DiscardHandler).HTTPServer(), c.reply, c.accept)
			})
			b.Run("conduit_alone", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, conduit.Compression()(h)), c.reply, c.accept)
			})
			b.Run("net_http", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, compressionByHand(h)), c.reply, c.accept)
			})
			b.Run("bare_handler", func(b *testing.B) {
				compressionBench(b, benchHTTPServer(b, h), c.reply, "")
			})
		})
	}
}

var compressionJSONType = []string{"application/json"}

// compressionJSON returns a JSON array of about n bytes, which shrinks as much
// as JSON that services send.
func compressionJSON(n int) string {
	words := strings.Fields("amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge meadow north ocean prairie quarry ridge shore tundra upland valley willow yonder")
	rng := rand.New(rand.NewPCG(1, 2))
	word := func() string { return words[rng.IntN(len(words))] }
	var items []benchItem
	for size := 0; size < n; size += 85 {
		items = append(items, benchItem{ID: rng.IntN(1e6), Name: word() + " " + word() + " " + word(), Price: float64(rng.IntN(1e5)) / 100, Tags: []string{word(), word()}})
	}
	text, err := json.Marshal(items)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func compressionBench(b *testing.B, srv *http.Server, reply, accept string) {
	ctx, cancel := context.WithCancel(benchContext(srv))
	defer cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", "/", nil)
	r.Header.Set("Accept-Encoding", accept)

	rec := httptest.NewRecorder()
	srv.Handler.ServeHTTP(rec, r)
	body := rec.Body.String()
	if rec.Header().Get("Content-Encoding") == "gzip" {
		body = compressionDecode(b, body)
	}
	if rec.Code != http.StatusOK || body != reply {
		b.Fatalf("got %d %v with %d bytes, want 200 with %d", rec.Code, rec.Header(), len(body), len(reply))
	}

	w := &benchWriter{header: make(http.Header)}
	b.ReportAllocs()
	b.SetBytes(int64(len(reply)))
	for b.Loop() {
		w.reset()
		srv.Handler.ServeHTTP(w, r)
	}
	b.ReportMetric(float64(rec.Body.Len()), "sent-B")
	if w.status != http.StatusOK || w.bytes != rec.Body.Len() {
		b.Fatalf("got %d with %d bytes in the end, want 200 with %d", w.status, w.bytes, rec.Body.Len())
	}
}

// compressionByHand is what a service without a library does.
func compressionByHand(next http.Handler) http.Handler {
	pool := sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Accept-Encoding")
		if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := pool.Get().(*gzip.Writer)
		defer pool.Put(z)
		z.Reset(w)
		defer z.Close()
		next.ServeHTTP(compressionByHandWriter{w, z}, r)
	})
}

type compressionByHandWriter struct {
	http.ResponseWriter
	z *gzip.Writer
}

func (w compressionByHandWriter) Write(p []byte) (int, error) { return w.z.Write(p) }
