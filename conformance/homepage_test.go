// This file starts the examples optimized and database, and Chromium, with a proxy of
// its own in between that refuses requests. It proves that each link of the home page
// works, as does its curl line, and that the page opens its events again after each
// response that closes an EventSource for good, after a time that grows.

package conformance

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"sync"
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

		links := evaluate[[]string](t, tab, `[...document.querySelectorAll("a")].map((a) => a.href)`)
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
	statuses []int // of the next responses for path
	refused  []time.Time
}

func newRefuser(t *testing.T, address string) *refuser {
	t.Helper()
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: address})
	f := new(refuser)
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status := f.next(r.URL.Path); status != 0 {
			w.WriteHeader(status)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

// next returns the status with which to refuse a request, or 0.
func (f *refuser) next(path string) (status int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if path != f.path {
		return 0
	}
	f.refused = append(f.refused, time.Now())
	if len(f.statuses) > 0 {
		status, f.statuses = f.statuses[0], f.statuses[1:]
	}
	return status
}

func (f *refuser) refuse(path string, statuses ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.path, f.statuses, f.refused = path, statuses, nil
}

// requests returns when each request for the path came.
func (f *refuser) requests() []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.refused)
}

func TestHomePageOpensClosedEventsAgain(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		proxy := newRefuser(t, e.address)
		tab := openPage(t, proxy.Listener.Addr().String())
		e.post("before")
		shows(t, tab, "before")

		statuses := []int{http.StatusServiceUnavailable, http.StatusNoContent, http.StatusBadGateway, http.StatusServiceUnavailable}
		proxy.refuse("/api/events", statuses...)
		proxy.CloseClientConnections()
		e.post("meanwhile")
		shows(t, tab, "meanwhile", "before")
		e.post("after")
		shows(t, tab, "after", "meanwhile", "before")

		requests := proxy.requests()
		if len(requests) != len(statuses)+1 {
			t.Fatalf("%d requests for the events, want one for each of %d and one more", len(requests), statuses)
		}
		first, last := requests[1].Sub(requests[0]), requests[4].Sub(requests[3])
		if first < 250*time.Millisecond || last < 2*time.Second || first >= last {
			t.Errorf("the page waited %v after the first refusal and %v after the last, want from 250ms and from 2s", first, last)
		}
	})
}

func TestHomePageLoadsItsListAgain(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		e.post("before")
		proxy := newRefuser(t, e.address)
		proxy.refuse("/api/posts", http.StatusBadGateway)
		tab := newTab(t, proxy.URL)
		shows(t, tab, "before")
		if got := len(proxy.requests()); got != 2 {
			t.Errorf("%d requests for the list, want 2", got)
		}
	})
}
