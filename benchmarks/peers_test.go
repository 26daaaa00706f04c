package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
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
				if _, err := check(t.Context(), at, &r, s); err != nil {
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
				// It ends where it was cut.
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

// startPeer starts p in this process until the test ends, and returns where it
// serves. An nginx that is not installed is no failure, and nothing to be
// skipped either: the others are what this module can answer for.
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
