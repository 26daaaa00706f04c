package conduit_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/conduit"
)

// Compression

var compressionAcceptCases = []struct {
	lines []string
	want  bool // gzip
}{
	{nil, false},
	{[]string{""}, false},
	{[]string{"gzip"}, true},
	{[]string{"gzip, deflate, br, zstd"}, true},
	{[]string{"GZip"}, true},
	{[]string{"x-gzip"}, true},
	{[]string{"X-GZIP;q=0.5"}, true},
	{[]string{"gzip;q=0"}, false},
	{[]string{"gzip;q=0.000"}, false},
	{[]string{"gzip;q=0."}, false},
	{[]string{"gzip;q=0.001"}, true},
	{[]string{"gzip;Q=1"}, true},
	{[]string{"gzip;q=1.000"}, true},
	{[]string{"gzip \t; \tq=0.5 "}, true},
	{[]string{"*"}, true},
	{[]string{"*;q=0"}, false},
	{[]string{"*;q=0, gzip"}, true},
	{[]string{"gzip;q=0, *"}, false},
	{[]string{"gzip;q=0", "*"}, false},
	{[]string{"br", "gzip"}, true},
	{[]string{"br"}, false},
	{[]string{"deflate, br;q=0.1"}, false},
	{[]string{"identity"}, false},
	{[]string{"identity;q=0"}, false},
	{[]string{"identity;q=0, gzip;q=0.1"}, true},
	{[]string{"identity, gzip;q=0.5"}, false},
	{[]string{"identity;q=0.6, *;q=0.5"}, false},
	{[]string{"identity;q=0.5, gzip;q=0.5"}, true},
	{[]string{"gzip, gzip;q=0"}, false},
	{[]string{"gzip;q=0, x-gzip"}, false},
	{[]string{",, gzip ,"}, true},
	// Malformed, and so ignored.
	{[]string{"gzip;q=2"}, false},
	{[]string{"gzip;q=1.001"}, false},
	{[]string{"gzip;q=0.1234"}, false},
	{[]string{"gzip;q=-1"}, false},
	{[]string{"gzip;q"}, false},
	{[]string{"gzip;q="}, false},
	{[]string{"gzip;"}, false},
	{[]string{"gzip;q=a"}, false},
	{[]string{"gzip;q=0a1"}, false},
	{[]string{"gzip;q =1"}, false},
	{[]string{"gzip;level=9"}, false},
	{[]string{"gzip;q=1;q=1"}, false},
	{[]string{"gzip deflate"}, false},
	{[]string{"gzipx, xgzip"}, false},
	{[]string{"gzip;q=2, gzip;q=0.5"}, true},
	{[]string{"gzip;q=2, *;q=0.5"}, true},
}

func TestCompressionNegotiates(t *testing.T) {
	text := compressionJSON(4 << 10)
	url := serve(t, newServer(t, conduit.DefaultConfig(conduit.Compression()(compressionHandler("application/json", text)))))
	for _, c := range compressionAcceptCases {
		req, _ := http.NewRequest("GET", url, nil)
		req.Header["Accept-Encoding"] = c.lines
		if c.lines == nil {
			req.Header["Accept-Encoding"] = []string{} // or the client adds its own
		}
		transport := &http.Transport{DisableCompression: true}
		got := do(t, newClient(t, transport), req)
		coded := got.header.Get("Content-Encoding") == "gzip"
		if coded != c.want || compressionText(t, got) != text || got.header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("Accept-Encoding %q: got gzip %t, Vary %q, want gzip %t", c.lines, coded, got.header["Vary"], c.want)
		}
	}
}

// FuzzAcceptEncoding holds the negotiation against one that is slow and plain.
func FuzzAcceptEncoding(f *testing.F) {
	for _, c := range compressionAcceptCases {
		f.Add(strings.Join(c.lines, "\n"))
	}
	h := conduit.Compression()(compressionHandler("text/plain", strings.Repeat("text ", 400)))
	f.Fuzz(func(t *testing.T, value string) {
		lines := strings.Split(value, "\n")
		r := httptest.NewRequest("HEAD", "/", nil)
		r.Header["Accept-Encoding"] = lines
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		got, want := w.Header().Get("Content-Encoding"), compressionOracle(lines)
		if got != want {
			t.Errorf("Accept-Encoding %q: got %q, want %q", lines, got, want)
		}
	})
}

// compressionOracle returns "gzip" if that is what lines prefer.
func compressionOracle(lines []string) string {
	qualities := make(map[string]float64)
	for _, member := range strings.Split(strings.Join(lines, ","), ",") {
		name, weight, weighted := strings.Cut(member, ";")
		name = strings.ToLower(strings.Trim(name, " \t\r\n"))
		q := 1.0
		if weighted {
			digits, ok := strings.CutPrefix(strings.ToLower(strings.Trim(weight, " \t\r\n")), "q=")
			whole, fraction, _ := strings.Cut(digits, ".")
			if !ok || whole != "0" && whole != "1" || len(fraction) > 3 || strings.Trim(fraction, "0123456789") != "" {
				continue
			}
			q, _ = strconv.ParseFloat(whole+"."+fraction, 64)
			if q > 1 {
				continue
			}
		}
		if name == "x-gzip" {
			name = "gzip"
		}
		if old, ok := qualities[name]; !ok || q < old {
			qualities[name] = q
		}
	}
	q, ok := qualities["gzip"]
	if !ok {
		q = qualities["*"]
	}
	if q > 0 && q >= qualities["identity"] {
		return "gzip"
	}
	return ""
}

func TestCompressionShrinksText(t *testing.T) {
	text := compressionJSON(40 << 10)
	eachProtocol(t, func(t *testing.T, p protocol) {
		var logs logBuffer
		chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression())
		srv := p.server(t, &conduit.Config{Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h.Set("Content-Type", "application/json")
			h.Set("Content-Length", strconv.Itoa(len(text)))
			h.Set("Accept-Ranges", "bytes")
			h.Set("Etag", `"v1"`)
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, text)
		}))})
		got := compressionGet(t, p.client(t), p.serve(t, srv), "GET", nil)
		want := http.Header{
			"Content-Encoding": {"gzip"},
			"Content-Type":     {"application/json"},
			"Etag":             {`W/"v1"`},
			"Vary":             {"Accept-Encoding"},
		}
		for _, varies := range []string{"Date", "X-Request-Id"} {
			delete(got.header, varies)
		}
		if got.status != 202 || !maps.EqualFunc(got.header, want, slices.Equal) {
			t.Errorf("got %d %v, want 202 %v", got.status, got.header, want)
		}
		if len(got.body) > len(text)*4/10 || compressionText(t, got) != text {
			t.Errorf("%d bytes became %d", len(text), len(got.body))
		}
		if line := logs.request(t); line["status"] != 202.0 || line["bytes"] != float64(len(got.body)) {
			t.Errorf("logged %v, want the %d bytes that were sent", line, len(got.body))
		}
	})
}

func TestCompressionLeavesAlone(t *testing.T) {
	text := compressionJSON(4 << 10)
	small := text[:1023]
	with := func(body string, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			io.WriteString(w, body)
		}
	}
	status := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(status)
		}
	}
	content := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.json", time.Time{}, strings.NewReader(text))
	}
	tests := []struct {
		name    string
		request http.Header
		handler http.HandlerFunc
		status  int
		body    string
		vary    bool
	}{
		{"image", nil, with(text, "Content-Type", "image/png"), 200, text, false},
		{"image found out", nil, with("\x89PNG\r\n\x1a\n" + text), 200, "\x89PNG\r\n\x1a\n" + text, false},
		{"type withheld", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Type"] = nil
			io.WriteString(w, text)
		}, 200, text, false},
		{"event stream", nil, with(text, "Content-Type", "text/event-stream"), 200, text, false},
		{"event stream with a charset", nil, with(text, "Content-Type", "Text/Event-Stream ; charset=utf-8"), 200, text, false},
		{"coded", nil, with(text, "Content-Type", "text/plain", "Content-Encoding", "br"), 200, text, false},
		{"not to be coded", nil, with(text, "Content-Type", "text/plain", "Content-Encoding", "identity"), 200, text, false},
		{"no-transform", nil, with(text, "Content-Type", "text/plain", "Cache-Control", "public, No-Transform"), 200, text, false},
		{"digest", nil, with(text, "Content-Type", "text/plain", "Content-Digest", "sha-256=:x:"), 200, text, false},
		{"part", http.Header{"Range": {"bytes=0-2047"}}, content, 206, text[:2048], false},
		{"part of its own kind", nil, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, text)
		}, 206, text, false},
		{"range not satisfiable", http.Header{"Range": {"bytes=9999999-"}}, content, 416, "invalid range: failed to overlap\n", false},
		{"204", nil, status(204), 204, "", false},
		{"304", nil, status(304), 304, "", true},
		{"empty", nil, status(200), 200, "", true},
		{"small", nil, with(small, "Content-Type", "text/plain"), 200, small, true},
		{"small, found out", nil, with(small), 200, small, true},
		{"small, of known length", nil, with(small, "Content-Type", "text/plain", "Content-Length", "1023"), 200, small, true},
		{"small, found out, of known length", nil, with(small, "Content-Length", "1023"), 200, small, true},
		{"not accepted", http.Header{"Accept-Encoding": {"br"}}, with(text, "Content-Type", "text/plain"), 200, text, true},
		{"not accepted, found out", http.Header{"Accept-Encoding": {"br"}}, with(text), 200, text, true},
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		var handler http.Handler
		srv := p.server(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler.ServeHTTP(w, r) })})
		client, url := p.client(t), p.serve(t, srv)
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				handler = tt.handler
				want := compressionGet(t, client, url, "GET", tt.request)
				handler = conduit.Compression()(tt.handler)
				got := compressionGet(t, client, url, "GET", tt.request)
				if got.status != tt.status || got.body != tt.body {
					t.Errorf("got %d %.80q, want %d %.80q", got.status, got.body, tt.status, tt.body)
				}
				if vary := got.header.Get("Vary") == "Accept-Encoding"; vary != tt.vary {
					t.Errorf("Vary = %q, want it %t", got.header["Vary"], tt.vary)
				}
				for _, varies := range []string{"Vary", "Date"} {
					delete(got.header, varies)
					delete(want.header, varies)
				}
				if !maps.EqualFunc(got.header, want.header, slices.Equal) {
					t.Errorf("header %v, without Compression %v", got.header, want.header)
				}
			})
		}
	})
}

func TestCompressionCodes(t *testing.T) {
	text := strings.Repeat("some text ", 500)
	for contentType, want := range map[string]bool{
		"":           true, // found out
		"text/plain": true, "TEXT/HTML; Charset=UTF-8": true, "text/css": true, "text/javascript": true,
		"application/json": true, "application/javascript": true, "application/xml": true, "application/wasm": true,
		"application/problem+json": true, "application/atom+xml": true, "image/svg+xml": true, "application/manifest+json": true,
		"application/x-ndjson": true, "font/ttf": true, "font/otf": true, "image/x-icon": true,
		"image/png": false, "image/webp": false, "font/woff2": false, "video/mp4": false, "application/zip": false,
		"application/pdf": false, "application/octet-stream": false, "text/event-stream": false, "application/grpc": false, "nonsense": false,
	} {
		got := compressionRecord(t, conduit.Compression()(compressionHandler(contentType, text)), "GET", nil)
		if coded := got.header.Get("Content-Encoding") == "gzip"; coded != want || compressionText(t, got) != text {
			t.Errorf("%q: coded %t, want %t", contentType, coded, want)
		}
	}
}

// net/http would find application/x-gzip in coded bytes, and in few bytes of
// text something else than in many.
func TestCompressionFindsOutTheType(t *testing.T) {
	page := "   <!DOCTYPE html><title>x</title>" + strings.Repeat("<p>text", 500)
	for _, size := range []int{1, 7, 600, 5000} {
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for part := range slices.Chunk([]byte(page), size) {
				w.Write(part)
			}
		})
		for _, minSize := range []int{-1, 5, 0, 2000} {
			got := get(t, http.DefaultClient, serve(t, newServer(t, conduit.DefaultConfig(conduit.CompressionWith(&conduit.CompressionConfig{MinSize: minSize})(h)))))
			if got.header.Get("Content-Type") != "text/html; charset=utf-8" || got.body != page {
				t.Errorf("in parts of %d, MinSize %d: type %q", size, minSize, got.header["Content-Type"])
			}
		}
	}
}

func TestCompressionAddsToVary(t *testing.T) {
	shared := append(make([]string, 0, 4), "Origin")
	for _, c := range []struct{ have, want []string }{
		{nil, []string{"Accept-Encoding"}},
		{shared, []string{"Origin", "Accept-Encoding"}},
		{[]string{"Origin, accept-encoding"}, []string{"Origin, accept-encoding"}},
		{[]string{"Cookie", "Accept-Encoding"}, []string{"Cookie", "Accept-Encoding"}},
		{[]string{"*"}, []string{"*"}},
		{[]string{"X-Accept-Encoding"}, []string{"X-Accept-Encoding", "Accept-Encoding"}},
	} {
		h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.have != nil {
				w.Header()["Vary"] = c.have
			}
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "small")
			w.Header().Add("Vary", "Late") // must not reach the next reply
		}))
		for range 2 {
			if got := compressionRecord(t, h, "GET", nil).header["Vary"]; !slices.Equal(got, c.want) {
				t.Errorf("%q became %q, want %q", c.have, got, c.want)
			}
		}
	}
	if beyond := shared[:2][1]; beyond != "" {
		t.Errorf("%q was written into a shared slice", beyond)
	}
}

func TestCompressedHEADHasTheHeaderOfGET(t *testing.T) {
	text := compressionJSON(4 << 10)
	for name, handler := range map[string]http.HandlerFunc{
		"ServeContent": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Etag", `"v1"`)
			http.ServeContent(w, r, "x.json", time.Unix(1e9, 0), strings.NewReader(text))
		},
		"ServeContent of an image": func(w http.ResponseWriter, r *http.Request) {
			http.ServeContent(w, r, "x.png", time.Time{}, strings.NewReader(text))
		},
		"only the header": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.Header().Set("Content-Length", strconv.Itoa(len(text)))
			if r.Method != http.MethodHead {
				io.WriteString(w, text)
			}
		},
		"large":  func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text) },
		"medium": func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text[:1500]) },
		"small": func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, text[:100])
			io.WriteString(w, text[100:200])
		},
		"in parts": func(w http.ResponseWriter, r *http.Request) {
			for part := range slices.Chunk([]byte(text), 100) {
				w.Write(part)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachProtocol(t, func(t *testing.T, p protocol) {
				url, client := p.serve(t, p.server(t, &conduit.Config{Handler: conduit.Compression()(handler)})), p.client(t)
				want, got := compressionGet(t, client, url, "GET", nil), compressionGet(t, client, url, "HEAD", nil)
				delete(got.header, "Date")
				delete(want.header, "Date")
				if want.header.Get("Content-Encoding") != "" {
					delete(want.header, "Content-Length") // net/http's, of coded bytes that fit its buffer
				}
				if got.status != want.status || got.body != "" || !maps.EqualFunc(got.header, want.header, slices.Equal) {
					t.Errorf("HEAD: %d %v %q, GET: %d %v", got.status, got.header, got.body, want.status, want.header)
				}
			})
		})
	}
}

func TestCompressionRevisesA304(t *testing.T) {
	text := compressionJSON(4 << 10)
	tests := []struct {
		name, accept, match, tag string
		want                     string
		status                   int
	}{
		{"first", "gzip", "", `"v1"`, `W/"v1"`, 200},
		{"weak", "gzip", `W/"v1"`, `"v1"`, `W/"v1"`, 304},
		{"weak among others", "gzip", `"v0", W/"v1"`, `"v1"`, `W/"v1"`, 304},
		{"strong", "gzip", `"v1"`, `"v1"`, `"v1"`, 304},
		{"not accepted", "br", `W/"v1"`, `"v1"`, `"v1"`, 304},
		{"weak by itself", "gzip", `W/"v1"`, `W/"v1"`, `W/"v1"`, 304},
		{"changed", "gzip", `W/"v0"`, `"v1"`, `W/"v1"`, 200},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachProtocol(t, func(t *testing.T, p protocol) {
				h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Etag", tt.tag)
					http.ServeContent(w, r, "x.json", time.Time{}, strings.NewReader(text))
				}))
				got := compressionGet(t, p.client(t), p.serve(t, p.server(t, &conduit.Config{Handler: h})), "GET", http.Header{"Accept-Encoding": {tt.accept}, "If-None-Match": {tt.match}})
				if got.status != tt.status || got.header.Get("Etag") != tt.want {
					t.Errorf("got %d with ETag %s, want %d with %s", got.status, got.header.Get("Etag"), tt.status, tt.want)
				}
				if tt.status == 304 && tt.want != tt.tag && got.header.Get("Vary") != "Accept-Encoding" {
					t.Errorf("a 304 for a coded reply has Vary %q", got.header["Vary"])
				}
			})
		})
	}
}

// Whatever goes wrong once the reply has begun, no client takes what it got
// for the whole, and what was only held back is not in the way of a 500.
func TestCompressionEndsNothingThatFailed(t *testing.T) {
	text := compressionJSON(40 << 10)
	tests := []struct {
		name string
		head string // written before
		end  func(w http.ResponseWriter)
		want int // 0: cut
	}{
		{"panic", text, func(http.ResponseWriter) { panic("boom") }, 0},
		{"abort", text, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 0},
		{"Goexit", text, func(http.ResponseWriter) { runtime.Goexit() }, 0},
		{"flushed, then panic", text[:10], func(w http.ResponseWriter) { w.(http.Flusher).Flush(); panic("boom") }, 0},
		{"held back, then panic", text[:10], func(http.ResponseWriter) { panic("boom") }, 500},
		{"held back, then abort", text[:10], func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 0},
		{"less than declared", text, func(w http.ResponseWriter) {}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachProtocol(t, func(t *testing.T, p protocol) {
				h := conduit.Chain(conduit.Recovery(), conduit.Compression())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "application/json")
					if tt.name == "less than declared" {
						w.Header().Set("Content-Length", strconv.Itoa(len(tt.head)+1))
					}
					w.WriteHeader(http.StatusOK)
					io.WriteString(w, tt.head)
					tt.end(w)
				}))
				req, _ := http.NewRequest("GET", p.serve(t, p.server(t, &conduit.Config{Handler: h})), nil)
				req.Header.Set("Accept-Encoding", "gzip")
				res, err := p.client(t).Do(req)
				if err != nil {
					if tt.want != 0 {
						t.Error(err)
					}
					return // cut before the header was out
				}
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				if tt.want != 0 {
					if res.StatusCode != tt.want || err != nil || string(body) != "Internal Server Error\n" || res.Header.Get("Content-Encoding") != "" {
						t.Errorf("got %d %v %.80q, %v; want %d", res.StatusCode, res.Header, body, err, tt.want)
					}
					return
				}
				if err == nil {
					t.Errorf("got %d with %d bytes and no error", res.StatusCode, len(body))
				}
				if z, err := gzip.NewReader(bytes.NewReader(body)); err == nil {
					if _, err := io.ReadAll(z); err == nil {
						t.Errorf("the %d bytes that came are valid", len(body))
					}
				}
			})
		})
	}
}

func TestCompressionRefusesMoreThanDeclared(t *testing.T) {
	text := compressionJSON(4 << 10)
	h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("Content-Length", strconv.Itoa(len(text)))
		io.WriteString(w, text)
		if n, err := io.WriteString(w, "more"); n != 0 || err != http.ErrContentLength {
			t.Errorf("Write = %d, %v, want ErrContentLength", n, err)
		}
	}))
	if got := compressionRecord(t, h, "GET", nil); compressionText(t, got) != text {
		t.Error("the body is not what was declared")
	}
}

func TestCompressionFlushes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for name, chain := range map[string]conduit.Middleware{
			"alone":           conduit.Compression(),
			"inside Timeout":  conduit.Chain(conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression()),
			"outside Timeout": conduit.Chain(conduit.Compression(), conduit.Timeout(time.Minute)),
			"foreign":         conduit.Chain(foreign, conduit.Compression(), foreign),
		} {
			t.Run(name, func(t *testing.T) {
				next := make(chan string)
				srv := p.server(t, &conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "application/x-ndjson")
					rc := http.NewResponseController(w)
					for {
						if err := rc.Flush(); err != nil { // the first one without a byte
							t.Error(err)
						}
						line, ok := <-next
						if !ok {
							return
						}
						io.WriteString(w, line)
					}
				}))})
				req, _ := http.NewRequest("GET", p.serve(t, srv), nil)
				req.Header.Set("Accept-Encoding", "gzip")
				res, err := p.client(t).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				if res.Header.Get("Content-Encoding") != "gzip" {
					t.Fatalf("header %v, want gzip", res.Header)
				}
				var z *gzip.Reader
				for i := range 3 {
					line := fmt.Sprintf("{\"line\":%d}\n", i)
					next <- line
					if z == nil {
						if z, err = gzip.NewReader(res.Body); err != nil {
							t.Fatal(err)
						}
					}
					got := make([]byte, len(line))
					if _, err := io.ReadFull(z, got); err != nil || string(got) != line {
						t.Fatalf("got %q, %v, want %q", got, err, line)
					}
				}
				close(next)
				if rest, err := io.ReadAll(z); len(rest) != 0 || err != nil {
					t.Errorf("then %q, %v", rest, err)
				}
			})
		}
	})
}

// A body of nothing is a valid one too once its coding is announced.
func TestCompressionFlushesNothing(t *testing.T) {
	h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.(http.Flusher).Flush()
	}))
	got := compressionGet(t, http.DefaultClient, serve(t, newServer(t, conduit.DefaultConfig(h))), "GET", nil)
	if got.header.Get("Content-Encoding") == "gzip" && compressionDecode(t, got.body) != "" {
		t.Errorf("got %v %q", got.header, got.body)
	}
}

func TestCompressionReportsFlushError(t *testing.T) {
	want := errors.New("flush")
	for _, contentType := range []string{"text/plain", "image/png"} {
		var got error
		conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", contentType)
			io.WriteString(w, "text")
			got = http.NewResponseController(w).Flush()
		})).ServeHTTP(flushErrorWriter{httptest.NewRecorder(), want}, compressionRequest("GET", "/", nil))
		if got != want {
			t.Errorf("%s: Flush = %v, want %v", contentType, got, want)
		}
	}
}

func TestCompressionPassesInformationalReplies(t *testing.T) {
	text := compressionJSON(4 << 10)
	eachProtocol(t, func(t *testing.T, p protocol) {
		srv := p.server(t, &conduit.Config{Handler: conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, text)
		}))})
		var hints []string
		req := compressionRequest("GET", p.serve(t, srv), nil)
		req.RequestURI = ""
		got := do(t, p.client(t), req.WithContext(traceInformational(t.Context(), &hints)))
		if got.status != http.StatusNotFound || !slices.Equal(hints, []string{"103 </style.css>; rel=preload"}) || compressionText(t, got) != text {
			t.Errorf("got %d %v after %q, want a coded 404 after the hint", got.status, got.header, hints)
		}
	})
}

func TestCompressionLeavesUpgradesAlone(t *testing.T) {
	for name, upgrade := range map[string]func(w http.ResponseWriter){
		"hijack": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusOK) // held back, and dropped
			io.WriteString(w, "dropped")
		},
		"Hijacker": func(http.ResponseWriter) {},
	} {
		t.Run(name, func(t *testing.T) {
			var logs logBuffer
			srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.Logging(), conduit.Compression())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				upgrade(w)
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello")
			}))})
			conn, br := rawDial(t, strings.TrimPrefix(serve(t, srv), "http://"))
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			all, err := io.ReadAll(br)
			if !strings.HasPrefix(string(all), "HTTP/1.1 101 ") || !strings.HasSuffix(string(all), "\r\n\r\nhello") || err != nil {
				t.Errorf("got %q, %v", all, err)
			}
			if line := logs.request(t); line["status"] != 101.0 || len(logs.find("net/http")) != 0 {
				t.Errorf("logged %s", logs.String())
			}
		})
	}
	t.Run("101", func(t *testing.T) {
		w := httptest.NewRecorder()
		conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusSwitchingProtocols)
		})).ServeHTTP(w, compressionRequest("GET", "/", nil))
		if w.Code != 101 || len(w.Header()) != 0 {
			t.Errorf("got %d %v", w.Code, w.Header())
		}
	})
}

// What is not coded reaches the ReadFrom below with the source that the
// handler had, which is what sendfile needs.
func TestCompressionKeepsSendfile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := slices.Concat([]byte("\x89PNG\r\n\x1a\n"), make([]byte, 100<<10))
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		header http.Header
		accept string
		most   int // bytes that may be read by other means
	}{
		{"type", http.Header{"Content-Type": {"image/png"}}, "gzip", 0},
		{"type and length", http.Header{"Content-Type": {"image/png"}, "Content-Length": {strconv.Itoa(len(content))}}, "gzip", 0},
		{"coded", http.Header{"Content-Type": {"text/plain"}, "Content-Encoding": {"br"}}, "gzip", 0},
		{"no-transform", http.Header{"Content-Type": {"text/plain"}, "Cache-Control": {"no-transform"}}, "gzip", 0},
		{"not accepted", http.Header{"Content-Type": {"text/plain"}}, "br", 0},
		{"found out", nil, "gzip", 4096},
		{"found out, length", http.Header{"Content-Length": {strconv.Itoa(len(content))}}, "gzip", 4096},
	} {
		for _, explicit := range []bool{false, true} {
			t.Run(fmt.Sprint(tt.name, ", WriteHeader ", explicit), func(t *testing.T) {
				f, err := os.Open(name)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				src := &io.LimitedReader{R: f, N: int64(len(content))}
				w := &compressionReaderFrom{ResponseRecorder: httptest.NewRecorder()}
				conduit.Chain(conduit.Logging(), conduit.Compression())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					maps.Copy(w.Header(), tt.header)
					if explicit {
						w.WriteHeader(http.StatusOK)
					}
					if n, err := io.Copy(w, src); n != int64(len(content)) || err != nil {
						t.Errorf("Copy = %d, %v", n, err)
					}
				})).ServeHTTP(w, compressionRequest("GET", "/", http.Header{"Accept-Encoding": {tt.accept}}))
				if w.src != io.Reader(src) || w.n < int64(len(content)-tt.most) || !bytes.Equal(w.Body.Bytes(), content) {
					t.Errorf("ReadFrom got %T and %d bytes of %d, %d in all", w.src, w.n, len(content), w.Body.Len())
				}
			})
		}
	}
}

// compressionReaderFrom notes what its ReadFrom was given last.
type compressionReaderFrom struct {
	*httptest.ResponseRecorder
	src io.Reader
	n   int64
}

func (w *compressionReaderFrom) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(struct{ io.Writer }{w.ResponseRecorder}, src)
	w.src, w.n = src, w.n+n
	return n, err
}

// A source that fails before its first byte leaves the status to the handler.
func TestCompressionReadFromLeavesTheStatusOpen(t *testing.T) {
	for _, header := range []http.Header{nil, {"Content-Type": {"text/plain"}, "Content-Length": {"5000"}}, {"Content-Type": {"image/png"}}} {
		h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), header)
			src := io.MultiReader(strings.NewReader(""), compressionErrReader{})
			if n, err := w.(io.ReaderFrom).ReadFrom(src); n != 0 || err == nil {
				t.Errorf("ReadFrom = %d, %v", n, err)
			}
			http.Error(w, "gone", http.StatusBadGateway)
		}))
		got := compressionGet(t, http.DefaultClient, serve(t, newServer(t, conduit.DefaultConfig(h))), "GET", nil)
		if got.status != http.StatusBadGateway || got.body != "gone\n" {
			t.Errorf("%v: got %d %q, want 502", header, got.status, got.body)
		}
	}
}

type compressionErrReader struct{}

func (compressionErrReader) Read([]byte) (int, error) { return 0, errors.New("read") }

// The header is the one that was there when the handler began to reply, and
// trailers are trailers, however long the body is held back.
func TestCompressionKeepsHeadersAndTrailersApart(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for name, chain := range map[string]conduit.Middleware{
			"alone": conduit.Compression(), "inside Timeout": conduit.Chain(conduit.Timeout(time.Minute), conduit.Compression()), "outside Timeout": conduit.Chain(conduit.Compression(), conduit.Timeout(time.Minute)),
		} {
			for _, size := range []int{100, 5000} {
				t.Run(fmt.Sprint(name, size), func(t *testing.T) {
					text := strings.Repeat("x", size)
					url := p.serve(t, p.server(t, &conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						h := w.Header()
						h.Set("Content-Type", "text/plain")
						h.Set("Trailer", "X-Sum")
						h.Set("X-Early", "1")
						w.WriteHeader(http.StatusCreated)
						h.Set("X-Late", "1")
						h.Set("X-Early", "2")
						io.WriteString(w, text)
						h.Set("X-Sum", "sum")
						h.Set(http.TrailerPrefix+"X-More", "more")
					}))}))
					req, _ := http.NewRequest("GET", url, nil)
					req.Header.Set("Accept-Encoding", "gzip")
					res, err := p.client(t).Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer res.Body.Close()
					body, err := io.ReadAll(res.Body)
					if err != nil || compressionText(t, reply{header: res.Header, body: string(body)}) != text {
						t.Errorf("body %.80q, %v", body, err)
					}
					if h := res.Header; res.StatusCode != 201 || h.Get("X-Early") != "1" || h.Get("X-Late")+h.Get("X-Sum") != "" {
						t.Errorf("got %d %v", res.StatusCode, h)
					}
					if res.Trailer.Get("X-Sum") != "sum" || res.Trailer.Get("X-More") != "more" {
						t.Errorf("trailer %v", res.Trailer)
					}
				})
			}
		}
	})
}

func TestCompressionWithTimeout(t *testing.T) {
	text := compressionJSON(4 << 10)
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		for name, order := range map[string]func(conduit.Middleware) conduit.Middleware{
			"inside": func(timeout conduit.Middleware) conduit.Middleware {
				return conduit.Chain(timeout, conduit.Compression())
			},
			"outside": func(timeout conduit.Middleware) conduit.Middleware {
				return conduit.Chain(conduit.Compression(), timeout)
			},
		} {
			t.Run(name, func(t *testing.T) {
				serveWithin := func(d time.Duration) string {
					return p.serve(t, p.server(t, &conduit.Config{Handler: conduit.Chain(conduit.Recovery(), order(limit.new(d)))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("Content-Type", "application/json")
						switch r.URL.Path {
						case "/held":
							io.WriteString(w, text[:10])
						case "/begun":
							io.WriteString(w, text[:2000])
							w.(http.Flusher).Flush()
						case "/quick":
							io.WriteString(w, text)
							return
						}
						<-r.Context().Done()
						io.WriteString(w, text)
						w.(http.Flusher).Flush()
					}))}))
				}
				client := p.client(t)
				if got := compressionGet(t, client, serveWithin(time.Minute)+"/quick", "GET", nil); got.status != 200 || compressionText(t, got) != text {
					t.Errorf("in time: got %d %v", got.status, got.header)
				}
				url := serveWithin(100 * time.Millisecond)
				late := []string{"/late"}
				if name == "inside" { // outside, it has begun for Timeout
					late = append(late, "/held")
				}
				for _, path := range late {
					got := compressionGet(t, client, url+path, "GET", nil)
					if got.status != 503 || got.body != "Service Unavailable\n" || got.header.Get("Content-Encoding") != "" {
						t.Errorf("%s: got %d %v %q, want a plain 503", path, got.status, got.header, got.body)
					}
				}
				req := compressionRequest("GET", url+"/begun", nil)
				req.RequestURI = ""
				res, err := client.Do(req)
				if err != nil {
					return // cut before the header was out
				}
				defer res.Body.Close()
				if body, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("begun: got %d bytes and no error", len(body))
				}
			})
		}
	})
}

func TestCompressionRefusesLateWrites(t *testing.T) {
	text := compressionJSON(4 << 10)
	for _, size := range []int{0, 10, len(text)} {
		var late http.ResponseWriter
		h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			if late = w; size > 0 {
				io.WriteString(w, text[:size])
			}
		}))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, compressionRequest("GET", "/", nil))
		want := w.Body.String()
		late.Header().Set("X-Late", "1")
		late.WriteHeader(http.StatusTeapot)
		_, err1 := late.Write([]byte(text))
		_, err2 := io.WriteString(late, text)
		_, err3 := late.(io.ReaderFrom).ReadFrom(strings.NewReader(text))
		err4 := http.NewResponseController(late).Flush()
		for i, err := range []error{err1, err2, err3, err4} {
			if err == nil {
				t.Errorf("after %d bytes: late use %d has no error", size, i+1)
			}
		}
		if w.Code != 200 || w.Body.String() != want || w.Header().Get("X-Late") != "" {
			t.Errorf("after %d bytes: a late write got through", size)
		}
	}
}

func TestCompressionHoldsBackNoMoreThanMinSize(t *testing.T) {
	for _, tt := range []struct {
		minSize, want int
		header        http.Header
	}{
		{0, 1024, http.Header{"Content-Type": {"text/plain"}}},
		{0, 1024, nil},
		{100, 100, http.Header{"Content-Type": {"text/plain"}}},
		{100, 512, nil},
		{-1, 1, http.Header{"Content-Type": {"text/plain"}}},
		{0, 1, http.Header{"Content-Type": {"image/png"}}},
		{0, 1, http.Header{"Content-Type": {"text/plain"}, "Content-Length": {"5000"}}},
		{0, 512, http.Header{"Content-Length": {"5000"}}},
	} {
		rec := &compressionHeaderNoter{ResponseRecorder: httptest.NewRecorder()}
		var wrote, began int
		conduit.CompressionWith(&conduit.CompressionConfig{MinSize: tt.minSize})(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), tt.header)
			for wrote < 5000 {
				w.Write([]byte("x"))
				wrote++
				if began == 0 && rec.wrote {
					began = wrote
				}
			}
		})).ServeHTTP(rec, compressionRequest("GET", "/", nil))
		if began != tt.want {
			t.Errorf("MinSize %d, %v: the reply began after %d bytes, want %d", tt.minSize, tt.header, began, tt.want)
		}
	}
}

type compressionHeaderNoter struct {
	*httptest.ResponseRecorder
	wrote bool
}

func (w *compressionHeaderNoter) WriteHeader(status int) {
	w.wrote = true
	w.ResponseRecorder.WriteHeader(status)
}

func TestCompressionConfig(t *testing.T) {
	text := strings.Repeat("some text ", 500)
	for _, tt := range []struct {
		cfg               *conduit.CompressionConfig
		contentType, text string
		want              bool
	}{
		{nil, "text/plain", text[:1024], true},
		{nil, "text/plain", text[:1023], false},
		{&conduit.CompressionConfig{MinSize: 10}, "text/plain", text[:10], true},
		{&conduit.CompressionConfig{MinSize: 10}, "text/plain", text[:9], false},
		{&conduit.CompressionConfig{MinSize: -1}, "text/plain", "x", true},
		{&conduit.CompressionConfig{MinSize: -1}, "text/plain", "", false},
		{&conduit.CompressionConfig{Level: 9}, "text/plain", text, true},
		{&conduit.CompressionConfig{Types: []string{"*/*+JSON", "application/x-own"}}, "application/x-own", text, true},
		{&conduit.CompressionConfig{Types: []string{"*/*+JSON", "application/x-own"}}, "Application/A+json; x=y", text, true},
		{&conduit.CompressionConfig{Types: []string{"*/*+JSON", "application/x-own"}}, "text/plain", text, false},
		{&conduit.CompressionConfig{Types: []string{"text/*"}}, "text/event-stream; charset=utf-8", text, false},
	} {
		got := compressionRecord(t, conduit.CompressionWith(tt.cfg)(compressionHandler(tt.contentType, tt.text)), "GET", nil)
		if coded := got.header.Get("Content-Encoding") == "gzip"; coded != tt.want || compressionText(t, got) != tt.text {
			t.Errorf("%+v: %d bytes of %s: coded %t, want %t", tt.cfg, len(tt.text), tt.contentType, coded, tt.want)
		}
		if !tt.want && tt.text != "" && len(tt.text) < 1024 && got.header.Get("Content-Length") != strconv.Itoa(len(tt.text)) {
			t.Errorf("%+v: %d bytes have Content-Length %q", tt.cfg, len(tt.text), got.header["Content-Length"])
		}
	}

	for want, cfg := range map[string]*conduit.CompressionConfig{
		"conduit: Level: 10 is not between 1 and 9":     {Level: 10},
		"conduit: Level: -1 ":                           {Level: -1},
		`conduit: Types: "text/[": `:                    {Types: []string{"text/*", "text/["}},
		`conduit: Types: "json": a media type has a sl`: {Types: []string{"json"}},
		"conduit: Level: 11 is not between 1 and 9\nco": {Level: 11, Types: []string{"["}},
	} {
		func() {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.HasPrefix(got, want) {
					t.Errorf("panic %q, want it to begin with %q", got, want)
				}
			}()
			conduit.CompressionWith(cfg)
		}()
	}
	types := []string{"text/*"}
	mw := conduit.CompressionWith(&conduit.CompressionConfig{Types: types})
	types[0] = "image/*"
	if got := compressionRecord(t, mw(compressionHandler("text/plain", text)), "GET", nil); got.header.Get("Content-Encoding") != "gzip" {
		t.Error("changing the configuration later changed the middleware")
	}
}

func TestCompressionKeepsInvalidStatusesApart(t *testing.T) {
	defer func() {
		if got := fmt.Sprint(recover()); !strings.Contains(got, "invalid WriteHeader code") {
			t.Errorf("panic %q, want net/http's", got)
		}
	}()
	conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(1000)
		t.Error("WriteHeader returned")
	})).ServeHTTP(httptest.NewRecorder(), compressionRequest("GET", "/", nil))
}

// However a body is written, it comes out as it would without Compression.
func TestCompressionIsTransparent(t *testing.T) {
	text := compressionJSON(128 << 10)
	sizes := []int{0, 1, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 4097, 10000, 100000}
	types := []string{"", "application/json", "image/png"}
	seed := uint64(time.Now().UnixNano())
	for i := range 300 {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		size := sizes[rng.IntN(len(sizes))]
		if rng.IntN(3) == 0 {
			size = rng.IntN(100000)
		}
		contentType := types[rng.IntN(len(types))]
		declare, explicit, flushes := rng.IntN(3) == 0, rng.IntN(2) == 0, rng.IntN(3) == 0
		most := []int{3, 600, 3000, 200000}[rng.IntN(4)]
		size = min(size, most*1000) // flushing is slow
		steps := rng.Uint64()
		h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rng := rand.New(rand.NewPCG(steps, 0))
			if contentType != "" {
				w.Header().Set("Content-Type", contentType)
			}
			if declare {
				w.Header().Set("Content-Length", strconv.Itoa(size))
			}
			if explicit {
				w.WriteHeader(http.StatusTeapot)
			}
			for rest := text[:size]; rest != ""; {
				part := rest[:min(len(rest), rng.IntN(most+1))]
				rest = rest[len(part):]
				var n int64
				var m int
				var err error
				switch rng.IntN(4) {
				case 0:
					m, err = io.WriteString(w, part)
				case 1:
					m, err = w.Write([]byte(part))
				case 2:
					n, err = io.Copy(w, struct{ io.Reader }{strings.NewReader(part)})
				case 3:
					n, err = io.Copy(w, strings.NewReader(part))
				}
				if int(n)+m != len(part) || err != nil {
					t.Errorf("wrote %d of %d: %v", int(n)+m, len(part), err)
				}
				if flushes && rng.IntN(4) == 0 {
					w.(http.Flusher).Flush()
				}
			}
		})
		minSize := []int{0, -1, 100, 5000}[rng.IntN(4)]
		want := compressionRecord(t, h, "GET", nil)
		got := compressionRecord(t, conduit.CompressionWith(&conduit.CompressionConfig{MinSize: minSize})(h), "GET", nil)
		what := fmt.Sprintf("seed %d, %d: %d bytes of %q, declared %t, WriteHeader %t, flushes %t, MinSize %d", seed, i, size, contentType, declare, explicit, flushes, minSize)
		if got.status != want.status || compressionText(t, got) != want.body {
			t.Errorf("%s: got %d and %d bytes, want %d and %d", what, got.status, len(got.body), want.status, len(want.body))
		}
		// A recorder looks at the first part alone, and only without a status.
		if got.header.Get("Content-Type") != want.header.Get("Content-Type") && most > 3 && !explicit {
			t.Errorf("%s: type %q, want %q", what, got.header["Content-Type"], want.header["Content-Type"])
		}
	}
}

// Coders and buffers are shared by requests: no byte may get from one to
// another, whatever becomes of either.
func TestCompressionRaces(t *testing.T) {
	chain := conduit.Chain(conduit.Recovery(), conduit.Timeout(time.Minute), conduit.Compression())
	srv := newServer(t, conduit.DefaultConfig(chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		n, _ := strconv.Atoi(r.URL.Path[1:])
		for range 20 {
			io.WriteString(w, strings.Repeat(r.URL.Path, n%50))
			if n%7 == 1 {
				w.(http.Flusher).Flush()
			}
		}
		if n%5 == 3 {
			panic(http.ErrAbortHandler)
		}
	}))))
	url := serve(t, srv)
	client := newClient(t, &http.Transport{})
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range 40 {
				n := worker*40 + i
				req, _ := http.NewRequest("GET", fmt.Sprint(url, "/", n), nil)
				res, err := client.Do(req) // which decodes
				if err != nil {
					if n%5 != 3 {
						t.Error(err)
					}
					continue
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				want := strings.Repeat(fmt.Sprint("/", n), 20*(n%50))
				if whole := n%5 != 3; whole && (string(body) != want || err != nil) || !whole && (err == nil || !strings.HasPrefix(want, string(body))) {
					t.Errorf("%d: got %d bytes, want %d; %v", n, len(body), len(want), err)
				}
			}
		})
	}
	wg.Wait()
}

func TestCompressionWorksBetweenForeignWrappers(t *testing.T) {
	text := compressionJSON(4 << 10)
	h := conduit.Chain(foreign, conduit.Compression(), foreign, conduit.Logging(), foreign)(compressionHandler("", text))
	plain := httptest.NewServer(h) // no conduit Server
	defer plain.Close()
	got := compressionGet(t, http.DefaultClient, plain.URL, "GET", nil)
	if got.header.Get("Content-Encoding") != "gzip" || compressionText(t, got) != text {
		t.Errorf("got %d %v", got.status, got.header)
	}
}

// compressionHandler replies with a text of a type, which may be none.
func compressionHandler(contentType, text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if contentType != "" {
			w.Header().Set("Content-Type", contentType)
		}
		io.WriteString(w, text)
	})
}

// compressionRequest accepts gzip unless header says otherwise.
func compressionRequest(method, url string, header http.Header) *http.Request {
	r := httptest.NewRequestWithContext(context.Background(), method, url, nil)
	r.Header.Set("Accept-Encoding", "gzip")
	maps.Copy(r.Header, header)
	return r
}

func compressionGet(t *testing.T, client *http.Client, url, method string, header http.Header) reply {
	t.Helper()
	req := compressionRequest(method, url, header)
	req.RequestURI = ""
	return do(t, client, req)
}

func compressionRecord(t *testing.T, h http.Handler, method string, header http.Header) reply {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, compressionRequest(method, "/", header))
	res := w.Result()
	return reply{res.StatusCode, res.Header, w.Body.String(), res.Close}
}

// compressionText returns the text of a body, coded or not.
func compressionText(t *testing.T, r reply) string {
	t.Helper()
	if r.header.Get("Content-Encoding") != "gzip" {
		return r.body
	}
	return compressionDecode(t, r.body)
}

func compressionDecode(t testing.TB, body string) string {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(body))
	if err != nil {
		t.Errorf("%v: %.80q", err, body)
		return ""
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Errorf("%v after %d bytes", err, len(text))
	}
	return string(text)
}
