// This file starts Chromium, and nginx with its defaults. It proves that the
// browser's EventSource, over HTTP/1.1, over HTTP/2 and behind nginx, sees every
// event once and in order, comes back with the last ID after a drain and after an abort,
// as soon as it is told to, and sees the gap after a restart that has forgotten the
// events. A server that is away is tried again, unless nginx responds in its place.

package conformance

import (
	"crypto/tls"
	"testing"
)

const eventSourcePage = `<!DOCTYPE html>
<title>Events</title>
<link rel="icon" href="data:,">
<script>
const seen = [];
let failures = 0;
const events = new EventSource("/events");
for (const type of ["message", "tick", "gap"]) {
	events.addEventListener(type, (event) => seen.push(event.type + " " + event.data));
}
events.addEventListener("error", () => failures++);
</script>`

func TestEventSourceFollowsEvents(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		name  string
		tls   *tls.Config
		nginx bool
		proto string // as the server sees it
	}{
		{"HTTP/1.1", nil, false, "HTTP/1.1"},
		{"HTTP/2", testTLS(), false, "HTTP/2.0"},
		{"nginx", nil, true, "HTTP/1.0"},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			f := newFeed(t, way.tls, eventSourcePage)
			url := f.server.url
			if way.nginx {
				url = "http://" + startNginx(t, `server { listen ADDRESS; location / { proxy_pass `+url+`; } }`)
			}
			tab := newTab(t, url)
			f.live(t, way.proto, func() []string { return evaluate[[]string](t, tab, "seen") })

			failures := evaluate[int](t, tab, "failures")
			f.server.Close() // and it is away for a while
			if way.nginx {
				eventually(t, "nginx's 502 is final", func() bool { return evaluate[bool](t, tab, "events.readyState === EventSource.CLOSED") })
				return
			}
			eventually(t, "the page has tried", func() bool { return evaluate[int](t, tab, "failures") >= failures+2 })
			f.restart(t, f.broker.Load())
			eventually(t, "the page is back", func() bool { return f.broker.Load().Clients() == 1 })
		})
	}
}
