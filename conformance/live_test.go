// This file starts Chromium. It proves that the live page of Profiler draws what the
// process does, the pool with it, under a policy that allows it no more than that,
// goes on after a restart, and leads to every profile.

package conformance

import (
	"database/sql"
	"net/http"
	"runtime"
	"strings"
	"testing"

	"example.com/conduit"
)

func TestLivePageMoves(t *testing.T) {
	t.Parallel()
	db := sql.OpenDB(noDatabase{})
	defer db.Close()
	p, err := conduit.NewProfiler(&conduit.ProfilingConfig{DB: db})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	mux := http.NewServeMux()
	p.Enable(mux)
	address := freeAddress(t)
	srv := serveOn(t, address, conduit.DefaultConfig(mux))
	tab := newTab(t, srv.url+"/debug/pprof/live")

	links := evaluate[string](t, tab, `[...document.links].map((a) => a.pathname).join(" ") + " "`)
	for _, profile := range []string{"profile", "heap", "goroutine", "allocs", "block", "mutex", "threadcreate", "trace"} {
		if !strings.Contains(links, "/debug/pprof/"+profile+" ") {
			t.Errorf("no link to %s in %s", profile, links)
		}
	}
	for _, chart := range []string{"heap", "goroutines", "gc pause", "requests in flight", "open connections", "pool"} {
		eventually(t, "there is a chart of "+chart, func() bool {
			return strings.Contains(evaluate[string](t, tab, `[...document.querySelectorAll("figure")].map((f) => f.innerText).join().toLowerCase()`), chart)
		})
	}
	moves := func() {
		t.Helper()
		const lines = `[...document.querySelectorAll("path")].map((path) => path.getAttribute("d")).join()`
		before := evaluate[string](t, tab, lines)
		eventually(t, "the lines move", func() bool { return evaluate[string](t, tab, lines) != before })
	}
	moves()
	moves() // once may be the first sample
	connected := func() bool {
		return strings.Contains(evaluate[string](t, tab, `document.querySelector("#state").textContent`), runtime.Version())
	}
	srv.Close()
	eventually(t, "the page says that nobody responds", func() bool { return !connected() })
	serveOn(t, address, conduit.DefaultConfig(mux))
	eventually(t, "the page is back", connected)
}
