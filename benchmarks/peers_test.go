package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestPeersAnswerTheSame asks every peer for every route that it has.
func TestPeersAnswerTheSame(t *testing.T) {
	for _, p := range peers() {
		t.Run(p.name, func(t *testing.T) {
			s, base, secure := startPeer(t, &p)
			for _, r := range routes() {
				if r.kind != requests || !p.has(&r) {
					continue
				}
				at := base
				if r.http2 {
					at = secure
				}
				if _, err := check(t.Context(), at, &p, &r, s); err != nil {
					t.Errorf("%s: %v", r.name, err)
				}
			}
		})
	}
}

// TestPeersPublishTheSame has two clients for whom a few events are published.
func TestPeersPublishTheSame(t *testing.T) {
	for _, p := range peers() {
		if !p.has(&route{name: "fan_out"}) {
			continue
		}
		t.Run(p.name, func(t *testing.T) {
			_, base, _ := startPeer(t, &p)
			heard := make([]bytes.Buffer, 2)
			a, err := newAudience(t.Context(), strings.TrimPrefix(base, "http://"), len(heard), func(client int, p []byte) { heard[client].Write(p) })
			if err != nil {
				t.Fatal(err)
			}
			err = a.publish(t.Context(), 3, 10*time.Second)
			a.close()
			if err != nil {
				t.Fatal(err)
			}
			for i := range heard {
				res, err := http.ReadResponse(bufio.NewReader(&heard[i]), nil)
				if err != nil {
					t.Fatal(err)
				}
				if got := res.Header.Get("Content-Type"); res.StatusCode != 200 || !strings.HasPrefix(got, "text/event-stream") {
					t.Fatalf("%s, %q, want 200 and text/event-stream", res.Status, got)
				}
				// It ends where it was closed.
				stream, _ := io.ReadAll(res.Body)
				got := parseEvents(stream)
				// Before these three are those that told that all are there.
				got = got[max(0, len(got)-3):]
				first, err := strconv.Atoi(got[0].id)
				if err != nil {
					t.Fatalf("got %q, want ids that are numbers", stream)
				}
				var want []event
				for j := range 3 {
					want = append(want, event{id: strconv.Itoa(first + j), name: "tick", data: eventData})
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q, want in the end %q", stream, want)
				}
			}
		})
	}
}

// TestCheckSeesWhatDiffers has responses that differ from what is wanted in one
// thing.
func TestCheckSeesWhatDiffers(t *testing.T) {
	s, err := newSite(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	byHand := newNetHTTPHandler(s, gzipByHand)
	for _, c := range []struct {
		route, why string // why is what the error must say, none if empty
		change     func(res *httptest.ResponseRecorder)
	}{
		{"text", "", func(*httptest.ResponseRecorder) {}},
		{"text", "status 500", func(res *httptest.ResponseRecorder) { res.Code = 500 }},
		{"text", "Content-Type", func(res *httptest.ResponseRecorder) { res.Header().Set("Content-Type", "text/html") }},
		{"text", "body", func(res *httptest.ResponseRecorder) { res.Body.Bytes()[0]++ }},
		{"text", "Content-Encoding", func(res *httptest.ResponseRecorder) { res.Header().Set("Content-Encoding", "gzip") }},
		{"text_h2", "came by HTTP/1.1", func(*httptest.ResponseRecorder) {}},
		{"json_array", "", func(*httptest.ResponseRecorder) {}},
		{"json_array", "body", func(res *httptest.ResponseRecorder) { res.Body.Bytes()[len("[{")]++ }},
		{"chain", "X-Request-Id", func(res *httptest.ResponseRecorder) { res.Header().Del("X-Request-Id") }},
		{"gzip", "", func(*httptest.ResponseRecorder) {}},
		{"gzip", "Vary", func(res *httptest.ResponseRecorder) { res.Header().Del("Vary") }},
		{"gzip", "Content-Encoding identity", func(res *httptest.ResponseRecorder) {
			res.Header().Del("Content-Encoding")
			res.Body = bytes.NewBuffer(s.document)
		}},
		{"gzip", "EOF", func(res *httptest.ResponseRecorder) { res.Body.Truncate(res.Body.Len() - 1) }},
		{"not_modified", "no ETag", func(res *httptest.ResponseRecorder) { res.Header().Del("Last-Modified") }},
		{"sse", "", func(*httptest.ResponseRecorder) {}},
		{"sse", "999 events", func(res *httptest.ResponseRecorder) { res.Body.Next(bytes.Index(res.Body.Bytes(), []byte("\n\n"))) }},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			res := httptest.NewRecorder()
			byHand.ServeHTTP(res, r)
			c.change(res)
			maps.Copy(w.Header(), res.Header())
			w.WriteHeader(res.Code)
			w.Write(res.Body.Bytes())
		}))
		list := routes()
		r := &list[slices.IndexFunc(list, func(r route) bool { return r.name == c.route })]
		_, err := check(t.Context(), srv.URL, &peer{}, r, s)
		srv.Close()
		if (err == nil) != (c.why == "") || err != nil && !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: got error %v, want %q", c.route, err, c.why)
		}
	}
}

// startPeer starts p in this process until the test ends, and returns where it
// serves. An nginx that is not installed is no failure, and nothing to be
// skipped either: the others are what this module is for.
func startPeer(t *testing.T, p *peer) (s *site, base, secure string) {
	t.Helper()
	s, err := newSite(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l, overTLS, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	svc, err := p.serve(s, l, overTLS)
	if errors.Is(err, errNoNginx) {
		t.Log(err)
		p.only = []string{}
		return s, "", ""
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := svc.stop(); err != nil {
			t.Error(err)
		}
	})
	return s, "http://" + l.Addr().String(), "https://" + overTLS.Addr().String()
}

// TestScaleStepsWork has one request for each thing that grows.
func TestScaleStepsWork(t *testing.T) {
	s, err := newSite(t.TempDir())
	if err == nil {
		err = s.writeManyFiles()
	}
	if err != nil {
		t.Fatal(err)
	}
	l, secure, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	svc, err := serveScale(s, l, secure)
	if err != nil {
		t.Fatal(err)
	}
	what := ""
	for _, step := range scaleSteps() {
		if step.what == what {
			continue // larger
		}
		what = step.what
		load, err := step.load(t.Context(), l.Addr().String(), step.n)
		if err != nil {
			t.Errorf("%s, %d: %v", step.what, step.n, err)
			continue
		}
		if err := load.ask[0](); err != nil {
			t.Errorf("%s, %d: %v", step.what, step.n, err)
		}
		load.close()
	}
	if err := svc.stop(); err != nil {
		t.Error(err)
	}
}
