package conduit_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"example.com/conduit"
)

// BenchmarkStaticFileServing serves one file in process, with writers that
// throw away what they get.
func BenchmarkStaticFileServing(b *testing.B) {
	dir := b.TempDir()
	for name, size := range map[string]int{"small.txt": 4 << 10, "script.js": 131 << 10, "large.bin": 1 << 20} {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, staticText(size), 0o600); err != nil {
			b.Fatal(err)
		}
		long := time.Now().Add(-time.Hour)
		if err := os.Chtimes(file, long, long); err != nil {
			b.Fatal(err)
		}
	}
	files := conduit.NewFileServer(dir, "")
	defer files.Close()
	std := http.FileServer(http.Dir(dir))
	benchStatic(b, "hit_4KB", files, std, "/small.txt", http.StatusOK, false, nil)
	benchStatic(b, "not_modified", files, std, "/small.txt", http.StatusNotModified, true, nil)
	benchStatic(b, "gzip_131KB", files, std, "/script.js", http.StatusOK, false, http.Header{"Accept-Encoding": {"gzip"}})
	benchStatic(b, "large_1MB", files, std, "/large.bin", http.StatusOK, false, nil)
}

func benchStatic(b *testing.B, name string, files, std http.Handler, target string, status int, revalidate bool, header http.Header) {
	for _, peer := range []struct {
		name string
		h    http.Handler
	}{{"conduit", files}, {"net_http", std}} {
		b.Run(name+"/"+peer.name, func(b *testing.B) {
			r := httptest.NewRequest("GET", target, nil)
			for field, values := range header {
				r.Header[field] = values
			}
			rec := httptest.NewRecorder()
			peer.h.ServeHTTP(rec, r)
			if rec.Code != http.StatusOK {
				b.Fatalf("status %d, want 200", rec.Code)
			}
			if revalidate {
				// A browser sends what it has been given.
				if tag := rec.Header().Get("Etag"); tag != "" {
					r.Header.Set("If-None-Match", tag)
				}
				r.Header.Set("If-Modified-Since", rec.Header().Get("Last-Modified"))
			}
			w := &staticDiscard{header: make(http.Header)}
			b.ReportAllocs()
			for b.Loop() {
				clear(w.header)
				w.status = http.StatusOK
				peer.h.ServeHTTP(w, r)
				if w.status != status {
					b.Fatalf("status %d, want %d", w.status, status)
				}
			}
		})
	}
}

// staticDiscard is a ResponseWriter that keeps nothing but the header.
type staticDiscard struct {
	header http.Header
	status int
}

func (w *staticDiscard) Header() http.Header         { return w.header }
func (w *staticDiscard) Write(p []byte) (int, error) { return len(p), nil }
func (w *staticDiscard) WriteHeader(status int)      { w.status = status }

func (w *staticDiscard) ReadFrom(src io.Reader) (int64, error) { return io.Copy(io.Discard, src) }

// staticText returns text that gzip shrinks about as much as a script.
func staticText(size int) []byte {
	var buf bytes.Buffer
	for i := 0; buf.Len() < size; i++ {
		fmt.Fprintf(&buf, "function f%d(a, b) { return a * %d + b[%q]; }\n", i, i*7919%10007, fmt.Sprint("key", i*31%97))
	}
	return buf.Bytes()[:size]
}
