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

// feed sends new posts to every open page. The table is its only source. A post of
// its own instance, a notification of another, or a new connection only wakes it:
// it then reads on in the table. So every instance publishes the same events, with
// the ids of the posts, in the same order, and a page may reconnect to any.
type feed struct {
	posts  *store
	broker *conduit.SSEBroker
	wake   chan struct{} // has room for one: a second would add nothing

	mu   sync.Mutex // guards last, and is held while newer posts are published
	last int64      // the id of the newest post that was published

	cancel context.CancelFunc
	ended  sync.WaitGroup
}

// newFeed returns a feed that has already published the newest posts. A page that
// was connected to another instance, or to this one before a restart, gets the
// posts that it missed.
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

// notify says that there may be new posts. It does not wait.
func (f *feed) notify() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// follow publishes the new posts each time that it is woken.
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
	// A page that comes from another instance may know a newer post than this
	// instance, whose notification is still on its way. Without catching up, the
	// page would get a gap, and the post again. An invented id costs one look
	// into an index, and such requests wait for each other.
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

// listen wakes the feed when Postgres says that there are new posts. When it loses
// the connection it makes another; posts of the time between are in the table.
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

// hear listens on one connection until that fails.
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
		// The first time for posts that were made before the LISTEN.
		f.notify()
		if err := waitForNotification(ctx, conn); err != nil {
			return err
		}
	}
}

// waitForNotification returns at the next notification, or after 30 quiet seconds
// if the connection still works. It has to ask: a connection whose other end has
// vanished is as quiet as one without notifications.
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

// closeWithin closes the connection in a bounded time: the other end may not
// respond.
func closeWithin(d time.Duration, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	conn.Close(ctx)
}

// backoff waits between attempts that fail: 100 milliseconds, then twice as long
// each time, up to 10 seconds. A random part of that, up to half, is left out, so
// that instances do not try all at once.
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
