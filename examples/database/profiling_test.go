package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"testing"

	"github.com/chromedp/chromedp"
)

// The live page draws what it is sent, the pool with it, under a policy that
// allows it no more than that, and leads to every profile.
func TestLivePageMoves(t *testing.T) {
	keepDefaultLogger(t)
	slog.SetDefault(slog.New(slog.DiscardHandler))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- engines[0].newService(t).run(ctx, l) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	in := &instance{url: "http://" + l.Addr().String()}
	tab := newBrowser(t).visit(t, in.url+"/debug/pprof/live")
	for _, profile := range []string{"profile", "heap", "goroutine", "allocs", "block", "mutex", "threadcreate", "trace"} {
		tab.waitFor(t, fmt.Sprintf(`//a[contains(@href, %q)]`, profile))
	}
	for _, chart := range []string{"Heap, MiB", "Goroutines", "GC pauses, ms per second", "Requests in flight", "Open connections", "Pool, connections"} {
		tab.waitFor(t, fmt.Sprintf(`//figure[.//*[. = %q]]`, chart))
	}
	const look = `[...document.querySelectorAll("path")].map((path) => path.getAttribute("d")).join()`
	before, err := chromedp.Run(tab.ctx, chromedp.Evaluate[string](look))
	if err != nil {
		t.Fatal(err)
	}
	for moves := 0; moves < 2; { // once is the first sample, twice is a plot that goes on
		in.create(t, "traffic")
		after, err := chromedp.Run(tab.ctx, chromedp.Evaluate[string](look))
		if err != nil {
			t.Fatalf("the page moved %d times: %v", moves, err) // the tab has a minute
		}
		if after != before {
			before = after
			moves++
		}
	}
}
