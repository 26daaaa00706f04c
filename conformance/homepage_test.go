// This file starts the examples optimized and database, and Chromium, with a proxy of
// its own in between that refuses requests. It proves that each link of the home page
// works, as does its curl line, and that the page opens its events again after each
// response that closes an EventSource for good, and for each list that fails, after a
// time that grows, and that it has one EventSource at a time.

package conformance

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestHomePageLinksWork(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		tab := openPage(t, e.address)
		command := evaluate[string](t, tab, `document.querySelector("#curl").textContent`)
		if _, stderr, status := run(t, nil, program(t, "bash"), "-c", command); status != 0 {
			t.Fatalf("%s: status %d\n%s", command, status, stderr)
		}
		shows(t, tab, "Hello")

		for what, find := range map[string]string{
			"routes without a link":        `[...document.querySelectorAll("#routes dt:not(:has(a[href]))")].map((dt) => dt.textContent)`,
			"links to a place not in here": `[...document.querySelectorAll("a")].map((a) => a.hash).filter((hash) => hash && !document.querySelector(hash))`,
		} {
			if found := evaluate[[]string](t, tab, find); len(found) > 0 {
				t.Errorf("%s: %q", what, found)
			}
		}
		links := evaluate[[]string](t, tab, `[...document.querySelectorAll("[href]")].map((element) => element.href)`)
		if len(links) < 10 {
			t.Errorf("the page has %d links, want one for each route: %q", len(links), links)
		}
		newest := evaluate[string](t, tab, `document.querySelector("#newest a").href`)
		if got := evaluate[string](t, tab, `document.querySelector("#one").href`); got != newest {
			t.Errorf("the link to one post leads to %q, want the newest, %q", got, newest)
		}
		for _, link := range links {
			resp, err := http.Get(link)
			if err != nil {
				t.Fatalf("%q: %v", link, err)
			}
			resp.Body.Close() // that of the events does not end
			if resp.StatusCode != http.StatusOK {
				t.Errorf("GET %s: status %d, want 200", link, resp.StatusCode)
			}
		}
	})
}

// refuser is a proxy that refuses requests for one path.
type refuser struct {
	*httptest.Server

	mu       sync.Mutex // guards what follows
	path     string
	statuses []int       // of the next responses for path
	requests []time.Time // when each for path came
}

func newRefuser(t *testing.T, address string) *refuser {
	t.Helper()
	f := new(refuser)
	f.Server = newProxy(t, address, func(w http.ResponseWriter, r *http.Request) bool {
		status := f.next(r.URL.Path)
		if status != 0 {
			w.WriteHeader(status)
		}
		return status != 0
	})
	return f
}

// newProxy starts a proxy that passes on each request to which responds does not.
func newProxy(t *testing.T, address string, responds func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !responds(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return srv
}

// next returns the status with which to refuse a request, or 0.
func (f *refuser) next(path string) (status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if path != f.path {
		return 0
	}
	f.requests = append(f.requests, time.Now())
	if len(f.statuses) > 0 {
		status, f.statuses = f.statuses[0], f.statuses[1:]
	}
	return status
}

func (f *refuser) refuse(path string, statuses ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.path, f.statuses, f.requests = path, statuses, nil
}

// wantGrowingWaits fails unless the page has asked once more after each of four
// refusals, each time after a longer wait.
func (f *refuser) wantGrowingWaits(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.requests) != 5 {
		t.Fatalf("%d requests for %s, want 5", len(f.requests), f.path)
	}
	first, last := f.requests[1].Sub(f.requests[0]), f.requests[4].Sub(f.requests[3])
	if first < 250*time.Millisecond || last < 2*time.Second || first >= last {
		t.Errorf("%s: the page waited %v after the first refusal and %v after the last, want from 250ms and from 2s", f.path, first, last)
	}
}

func TestHomePageOpensClosedEventsAgain(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		proxy := newRefuser(t, e.address)
		tab := openPage(t, proxy.Listener.Addr().String())
		e.post("before")
		shows(t, tab, "before")

		proxy.refuse("/api/events", http.StatusServiceUnavailable, http.StatusNoContent, http.StatusBadGateway, http.StatusServiceUnavailable)
		proxy.CloseClientConnections()
		e.post("meanwhile")
		shows(t, tab, "meanwhile", "before")
		e.post("after")
		shows(t, tab, "after", "meanwhile", "before")
		proxy.wantGrowingWaits(t)
	})
}

func TestHomePageLoadsItsListAgain(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		e.post("before")
		proxy := newRefuser(t, e.address)
		proxy.refuse("/api/posts", http.StatusBadGateway, http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusBadGateway)
		tab := newTab(t, proxy.URL)
		shows(t, tab, "before")
		proxy.wantGrowingWaits(t)
	})
}

// The EventSource closes while the list is on its way, and then the list fails. The
// page opens one EventSource, and not one for each.
func TestHomePageHasOneStreamOfEvents(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		e.post("before")
		var events, lists atomic.Int32
		release := make(chan struct{})
		proxy := newProxy(t, e.address, func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case r.URL.Path == "/api/events" && events.Add(1) == 1: // ends, and Chromium connects again
				w.Header().Set("Content-Type", "text/event-stream")
				io.WriteString(w, "retry: 1\n\n")
				return true
			case r.URL.Path == "/api/events" && events.Load() == 2: // closes the EventSource
				w.WriteHeader(http.StatusBadGateway)
				return true
			case r.URL.Path == "/api/posts" && lists.Add(1) == 1:
				select {
				case <-release:
				case <-r.Context().Done():
				}
				w.WriteHeader(http.StatusBadGateway)
				return true
			}
			return false
		})

		tab := newTab(t, proxy.URL)
		connected := func() bool {
			return evaluate[string](t, tab, `document.querySelector("#state").textContent`) == "New posts appear as they are made."
		}
		eventually(t, "the page has a second EventSource", func() bool { return events.Load() == 3 && connected() })
		close(release)
		shows(t, tab, "before")
		<-time.After(3 * time.Second) // a third would be open by then
		if got := events.Load(); got != 3 || !connected() {
			t.Errorf("%d requests for events, want 3; the page is connected: %t", got, connected())
		}
	})
}
