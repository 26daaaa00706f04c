// This file starts the client of github.com/r3labs/sse. It proves that the client
// sees every event once and in order, and comes back with the last ID after an abort.
// An end without an error, as a drain's, is the end to this client: a program that
// subscribes again with it misses nothing either.

package conformance

import (
	"context"
	"testing"
	"time"

	"github.com/r3labs/sse/v2"
)

func TestR3labsFollowsEvents(t *testing.T) {
	t.Parallel()
	f := newFeed(t, nil, "")
	ctx, cancel := context.WithCancel(t.Context())
	client := sse.NewClient(f.server.url + "/events")
	var saw transcript
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			client.SubscribeRawWithContext(ctx, func(e *sse.Event) { saw.add(string(e.Event), string(e.Data)) })
			time.Sleep(10 * time.Millisecond)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	f.live(t, "HTTP/1.1", saw.seen)
}
