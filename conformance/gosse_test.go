// This file starts the client of github.com/tmaxmax/go-sse. It proves that the
// client sees every event once and in order, comes back with the last ID after a
// drain and after a cut, as soon as it is told to, and sees the gap after a restart
// that has forgotten the events.

package conformance

import (
	"context"
	"net/http"
	"testing"

	"github.com/tmaxmax/go-sse"
)

func TestGoSSEFollowsEvents(t *testing.T) {
	t.Parallel()
	f := newFeed(t, nil, "")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, f.server.url+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	conn := sse.NewConnection(req)
	var saw transcript
	conn.SubscribeToAll(func(e sse.Event) { saw.add(e.Type, e.Data) })
	ended := make(chan error, 1)
	go func() { ended <- conn.Connect() }()
	t.Cleanup(func() {
		if err := <-ended; err != context.Canceled { // the test's context
			t.Error(err)
		}
	})
	f.live(t, "HTTP/1.1", saw.seen)
}
