// This file takes the zstd and the gzip of klauspost/compress as Encoders of
// Compression. It proves that clients get the coding they prefer, that curl,
// Chromium and klauspost's own decoders read what they get, also while it is being
// sent and by many side by side, and that zstd's window is one that browsers allow.

package conformance

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"example.com/conduit"
)

// klauspost are the encoders in the server's order of preference.
func klauspost() []conduit.Encoder {
	return []conduit.Encoder{
		{Coding: "zstd", New: func() conduit.EncodingWriter {
			// 1 MB of window takes 3 MB of memory for each response that is being
			// compressed, the default of 8 MB takes 18.
			z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
			if err != nil {
				panic(err) // of the options alone
			}
			return z
		}},
		{Coding: "gzip", New: func() conduit.EncodingWriter { return gzip.NewWriter(nil) }},
	}
}

func Example_klauspost() {
	compression := conduit.CompressionWith(&conduit.CompressionConfig{Encoders: klauspost()})
	srv := httptest.NewServer(compression(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, strings.Repeat("text that shrinks ", 1000))
	})))
	defer srv.Close()

	for _, accepts := range []string{"gzip, deflate, br, zstd", "gzip;q=1, zstd;q=0.5", "br"} {
		req, _ := http.NewRequest("GET", srv.URL, nil)
		req.Header.Set("Accept-Encoding", accepts)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			fmt.Println(err)
			return
		}
		resp.Body.Close()
		fmt.Printf("%s: %q\n", accepts, resp.Header.Get("Content-Encoding"))
	}
	// Output:
	// gzip, deflate, br, zstd: "zstd"
	// gzip;q=1, zstd;q=0.5: "gzip"
	// br: ""
}

// klauspostServer serves different text at each path, and at /stream two parts of
// which the second waits for a value from more.
func klauspostServer(t *testing.T, more <-chan struct{}) *server {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		io.WriteString(w, klauspostText(r.URL.Path))
	})
	mux.HandleFunc("GET /stream", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, "first\n")
		http.NewResponseController(w).Flush()
		<-more
		io.WriteString(w, "second\n")
	})
	cfg := conduit.DefaultConfig(conduit.CompressionWith(&conduit.CompressionConfig{Encoders: klauspost()})(mux))
	cfg.TLSConfig = testTLS()
	return serve(t, cfg)
}

// klauspostText is 3 MB of text, more than the window.
func klauspostText(path string) string {
	return strings.Repeat(path+" is text that shrinks\n", 100_000)
}

// fetch returns the response to a GET as it was sent.
func (s *server) fetch(t *testing.T, path, accepts string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", accepts)
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// decode reads a coding while it arrives.
func decode(t *testing.T, coding string, body io.Reader) io.Reader {
	t.Helper()
	var decoded io.Reader
	var err error
	switch coding {
	case "zstd":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(body, zstd.WithDecoderConcurrency(1)); err == nil {
			t.Cleanup(z.Close)
		}
		decoded = z
	case "gzip":
		decoded, err = gzip.NewReader(body)
	default:
		t.Fatalf("Content-Encoding %q", coding)
	}
	if err != nil {
		t.Fatal(err)
	}
	return decoded
}

func TestKlauspostSideBySide(t *testing.T) {
	t.Parallel()
	srv := klauspostServer(t, nil)
	for round := range 3 { // the writers come from the pool again
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				coding, path := [...]string{"zstd", "gzip"}[i%2], fmt.Sprintf("/%d/%d", round, i)
				resp := srv.fetch(t, path, coding)
				body, err := io.ReadAll(decode(t, resp.Header.Get("Content-Encoding"), resp.Body))
				if err != nil || string(body) != klauspostText(path) {
					t.Errorf("GET %s with %s: %v, %d bytes, want %d", path, coding, err, len(body), len(klauspostText(path)))
				}
			})
		}
		wg.Wait()
	}
}

func TestKlauspostStreams(t *testing.T) {
	t.Parallel()
	for _, coding := range []string{"zstd", "gzip"} {
		more := make(chan struct{}, 1)
		srv := klauspostServer(t, more)
		resp := srv.fetch(t, "/stream", coding)
		body := decode(t, resp.Header.Get("Content-Encoding"), resp.Body)
		first := make([]byte, len("first\n"))
		if _, err := io.ReadFull(body, first); err != nil || string(first) != "first\n" {
			t.Fatalf("%s: the first part is %q, %v", coding, first, err)
		}
		more <- struct{}{}
		if rest, err := io.ReadAll(body); err != nil || string(rest) != "second\n" {
			t.Errorf("%s: the rest is %q, %v", coding, rest, err)
		}
	}
}

// RFC 9659: a client may refuse a window above 8 MB.
func TestKlauspostWindowIsForBrowsers(t *testing.T) {
	t.Parallel()
	resp := klauspostServer(t, nil).fetch(t, "/", "zstd")
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var frame zstd.Header
	if err := frame.Decode(body); err != nil || frame.WindowSize == 0 || frame.WindowSize > 8<<20 {
		t.Errorf("the window is %d bytes, %v; want at most 8 MB", frame.WindowSize, err)
	}
}

func TestKlauspostWithCurl(t *testing.T) {
	t.Parallel()
	srv := klauspostServer(t, nil)
	for _, accepts := range []string{"zstd", "gzip"} {
		out, errs, status := run(t, nil, program(t, "curl"), "-sS", "-k", "--compressed", "-H", "Accept-Encoding: "+accepts, "-D", "/dev/stderr", srv.url+"/curl")
		if status != 0 || out != klauspostText("/curl") || !strings.Contains(strings.ToLower(errs), "content-encoding: "+accepts) {
			t.Errorf("%s: exit status %d, %d bytes, %s", accepts, status, len(out), errs)
		}
	}
}

func TestKlauspostWithChromium(t *testing.T) {
	t.Parallel()
	srv := klauspostServer(t, nil)
	tab := newTab(t, srv.url+"/page")
	tab.do(t, chromedp.WaitReady("body"))
	if got := evaluate[string](t, tab, "document.body.innerText"); !strings.HasPrefix(got, "/page is text") || len(got) < 1<<20 {
		t.Errorf("the page has %d characters, %.40q", len(got), got)
	}
	const coding = `(() => { const r = new XMLHttpRequest(); r.open("GET", "/xhr", false); r.send(); return r.getResponseHeader("Content-Encoding") + " " + r.responseText.length })()`
	if got, want := evaluate[string](t, tab, coding), fmt.Sprint("zstd ", len(klauspostText("/xhr"))); got != want {
		t.Errorf("Chromium has got %q, want %q", got, want)
	}
}
