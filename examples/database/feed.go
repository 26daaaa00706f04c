package main

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"example.com/conduit"
)

// feed tells every open page of new posts. The table is its only source: what
// wakes it, a post of its own instance, a notification of another, or a
// connection that is back, only says that it is time to read on. So every
// instance publishes the same events with the same ids, those of the posts, in
// the same order, and a page may come back to any of them.
type feed struct {
	posts  *store
	broker *conduit.SSEBroker
	wake   chan struct{} // has room for one: two say no more than one

	mu   sync.Mutex // guards last, and is held while what follows it is published
	last int64      // the newest post that was published

	cancel context.CancelFunc
	ended  sync.WaitGroup
}

// newFeed returns a feed that has published the newest posts already: a page
// that was with another instance, or with this one before a restart, gets what
// it missed.
func newFeed(ctx context.Context, posts *store, replay int) (*feed, error) {
	f := &feed{
		posts:  posts,
		broker: conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: replay}),
		wake:   make(chan struct{}, 1),
	}
	var err error
	if f.last, err = posts.beforeNewest(ctx, replay); err != nil {
		return nil, err
	}
	return f, f.catchUp(ctx)
}

func (f *feed) start() {
	var ctx context.Context
	ctx, f.cancel = context.WithCancel(context.Background())
	f.ended.Go(func() { f.follow(ctx) })
	if f.posts.listen != nil {
		f.ended.Go(func() { f.listen(ctx, f.posts.listen) })
	}
}

// stop is a hook of the shutdown.
func (f *feed) stop(context.Context) error {
	f.cancel()
	f.ended.Wait()
	return f.broker.Close()
}

// notify says that there may be new posts. It waits for nothing.
func (f *feed) notify() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// follow publishes what is new whenever it is woken.
func (f *feed) follow(ctx context.Context) {
	var b backoff
	for {
		select {
		case <-f.wake:
		case <-ctx.Done():
			return
		}
		if err := f.catchUp(ctx); err != nil && ctx.Err() == nil {
			slog.Error("new posts not read", "err", err)
			f.notify()
			b.wait(ctx)
			continue
		}
		b.reset()
	}
}

// catchUp publishes the posts that are new in the table.
func (f *feed) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	for p, err := range f.posts.since(ctx, f.last) {
		if err != nil {
			return err
		}
		data, err := json.Marshal(p)
		if err != nil {
			return err
		}
		event := &conduit.SSEEvent{ID: strconv.FormatInt(p.ID, 10), Event: "post", Data: string(data)}
		if err := f.broker.Publish(event); err != nil {
			return err
		}
		f.last = p.ID
	}
	return nil
}

// ServeHTTP sends a page the posts that it missed, and new ones as they come.
func (f *feed) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// A page that comes from another instance may know more than this one,
	// whose notification is still on its way. It would be told of a gap, and of
	// the post again. Whoever invents an id costs one look into an index, and
	// waits for those of others.
	last := cmp.Or(r.Header.Get("Last-Event-ID"), r.URL.Query().Get("lastEventId"))
	id, err := strconv.ParseInt(last, 10, 64)
	if err == nil && f.lags(id) {
		if err := f.catchUp(r.Context()); err != nil {
			conduit.Logger(r.Context()).Error("new posts not read", "err", err)
		}
	}
	f.broker.ServeHTTP(w, r)
}

func (f *feed) lags(id int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last < id
}

// listen wakes the feed when Postgres says that there are new posts. When the
// connection is lost it makes another, and what came meanwhile is in the table.
func (f *feed) listen(ctx context.Context, cfg *pgx.ConnConfig) {
	var b backoff
	for {
		err := f.hear(ctx, cfg, b.reset)
		if ctx.Err() != nil {
			return
		}
		slog.Warn("not listening for posts of other instances", "err", err)
		b.wait(ctx)
	}
}

// hear listens on one connection until it is lost.
func (f *feed) hear(ctx context.Context, cfg *pgx.ConnConfig, connected func()) error {
	dialing, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(dialing, cfg)
	if err != nil {
		return err
	}
	defer closeWithin(time.Second, conn)
	if _, err := conn.Exec(dialing, "LISTEN posts"); err != nil {
		return err
	}
	connected()
	slog.Info("listening for posts of other instances")
	for {
		// At the beginning for what came while nobody listened.
		f.notify()
		if err := waitForNotification(ctx, conn); err != nil {
			return err
		}
	}
}

// waitForNotification returns at the next notification, or when the connection
// has been quiet for a while and is still good. One whose other end has gone
// without a word is as quiet as one on which nothing happens.
func waitForNotification(ctx context.Context, conn *pgx.Conn) error {
	quiet, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := conn.WaitForNotification(quiet)
	if err == nil || quiet.Err() == nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return conn.Ping(asking)
}

// closeWithin says goodbye, and does not wait long for the answer: the other
// end may be gone.
func closeWithin(d time.Duration, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	conn.Close(ctx)
}

// backoff spaces attempts that fail: 100 milliseconds, then twice as long each
// time up to 10 seconds, each a random part shorter so that instances do not
// come all at once.
type backoff struct{ failed int }

func (b *backoff) reset() { b.failed = 0 }

func (b *backoff) wait(ctx context.Context) {
	longest := min(100*time.Millisecond<<b.failed, 10*time.Second)
	b.failed = min(b.failed+1, 10)
	select {
	case <-time.After(longest/2 + rand.N(longest/2)):
	case <-ctx.Done():
	}
}
