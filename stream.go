// SPDX-License-Identifier: MIT

package conduit

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Stream is a response of text or bytes sent as it is written: progress, a log,
// an export.
//
// A stream outlives the timeouts. A [Timeout] ends at its first byte, and
// WriteTimeout gives way to 15 seconds for each write of up to 64 KiB. A client
// that takes nothing for so long is disconnected. One that is slow, or is sent
// nothing, is not. Linux may wait until the client has taken up to 1.3 MB of a
// full buffer: a client of some 100 kB/s may look as if it took nothing. A
// ResponseWriter without the method Unwrap keeps WriteTimeout in force. On a
// plain [http.Server] no deadline covers the last few bytes, which net/http
// writes after the handler.
//
// The first error stays, and wraps its cause: [context.Cause] of a request
// whose client has disconnected, [ErrTimeout] of a Timeout before the first
// byte. If no response has started, the handler may respond by other means. If
// one has, it is aborted: the client gets nothing more. To abort it yourself,
// panic with [http.ErrAbortHandler].
//
// A drain only closes Done. For HEAD only the header is sent: Done is closed,
// writes fail with [http.ErrBodyNotAllowed], and functions, iterators and
// channels that would give a body are left alone. Any goroutine may call the
// methods until the handler returns.
type Stream struct{ streamResponse }

// NewTextStream makes a stream of type text/plain; charset=utf-8, unless the
// handler has set another. It sends nothing yet. If w cannot flush, it changes
// nothing, and the error wraps [http.ErrNotSupported].
func NewTextStream(w http.ResponseWriter, r *http.Request) (*Stream, error) {
	return newStream(w, r, "text/plain; charset=utf-8")
}

// NewBinaryStream is [NewTextStream] for application/octet-stream.
func NewBinaryStream(w http.ResponseWriter, r *http.Request) (*Stream, error) {
	return newStream(w, r, "application/octet-stream")
}

func newStream(w http.ResponseWriter, r *http.Request, contentType string) (*Stream, error) {
	s := new(Stream)
	if err := s.open(w, r, contentType); err != nil {
		return nil, err
	}
	return s, nil
}

// Write sends p, and returns when it is flushed. An empty p sends the header.
func (s *Stream) Write(p []byte) (int, error) {
	n := 0
	err := s.withLock(func() (err error) {
		if n, err = s.buffer().Write(p); err != nil {
			return err
		}
		return s.flush()
	})
	return n, err
}

// ReadFrom sends what it reads from src, each part as it comes, until src ends.
// If src fails, so does the stream. Only a write notices a disconnected client:
// a src that waits should end with the request's context.
func (s *Stream) ReadFrom(src io.Reader) (int64, error) {
	if s.head {
		_, err := s.Write(nil)
		return 0, err
	}
	returned := false
	defer s.endUnless(&returned)
	n, err := io.Copy(struct{ io.Writer }{s}, src)
	returned = true
	if err != nil {
		err = s.fail(fmt.Errorf("source: %w", err))
	}
	return n, err
}

// JSONStream is a response of many JSON values, one array or one document a
// line, sent while they are made. Timeouts, drains, errors and HEAD are as for
// a [Stream]. Elements are gathered for a millisecond, or up to 16 KiB. A
// document that ends before anything was sent has a Content-Length.
//
// The handler ends the document with Close, or with a deferred Abort after an
// error or panic; [StreamJSON] does both. After an error or Abort the handler
// may respond, such as with 500, if nothing was sent. Otherwise the response is
// aborted.
//
// A JSONStream is for one goroutine, except Done. Set header fields before the
// first element, and do not call WriteHeader, which would rule out the 500.
type JSONStream struct {
	streamResponse
	separator byte // before the next element: '[', then ','; 0 for lines
	encoder   *json.Encoder
}

// NewJSONStream is [NewTextStream] for one JSON array, application/json.
func NewJSONStream(w http.ResponseWriter, r *http.Request) (*JSONStream, error) {
	return newJSONStream(w, r, "application/json", '[')
}

// NewNDJSONStream is [NewJSONStream] for newline-delimited JSON,
// application/x-ndjson. Only the end of the response tells a client whether it
// is whole.
func NewNDJSONStream(w http.ResponseWriter, r *http.Request) (*JSONStream, error) {
	return newJSONStream(w, r, "application/x-ndjson", 0)
}

func newJSONStream(w http.ResponseWriter, r *http.Request, contentType string, separator byte) (*JSONStream, error) {
	s := &JSONStream{separator: separator}
	if err := s.open(w, r, contentType); err != nil {
		return nil, err
	}
	s.document = true
	s.encoder = json.NewEncoder(elementWriter{s})
	w.Header().Del("Content-Length")
	return s, nil
}

// Write adds v to the document, as [encoding/json] encodes it.
func (s *JSONStream) Write(v any) error {
	if p, ok := v.(*any); ok && p != nil {
		v = *p // which Go 1.27 encodes in half the time
	}
	returned := false
	defer s.endUnless(&returned) // for a panic of MarshalJSON
	err := s.encoder.Encode(v)
	returned = true
	if err != nil {
		return s.fail(fmt.Errorf("element: %w", err))
	}
	return nil
}

// elementWriter takes each element with its line break from a JSONStream's
// encoder, in one write. The stream is not locked before: MarshalJSON may take
// long.
type elementWriter struct{ *JSONStream }

func (s elementWriter) Write(p []byte) (int, error) {
	err := s.withLock(func() error {
		b, element := s.buffer(), p
		if s.separator != 0 {
			b.WriteByte(s.separator)
			s.separator = ','
			element = p[:len(p)-1]
		}
		_, err := b.Write(element)
		s.flushSoon()
		return err
	})
	return len(p), err
}

// WriteJSONArray sends every item until the channel is closed, as [StreamJSON]
// of [Receive] does, and then closes the stream.
func (s *JSONStream) WriteJSONArray(items <-chan any) error {
	if err := s.fail(nil); err != nil && !s.head { // it has ended
		return err
	}
	return streamItems(s, nil, Receive(s.ctx, items))
}

// Close ends the document, "[]" if nothing was written, and flushes it. After
// Close it returns nil, after an error or Abort an error.
func (s *JSONStream) Close() error {
	err := s.withLock(func() error {
		b := s.buffer()
		switch s.separator {
		case '[':
			b.WriteString("[]")
		case ',':
			b.WriteByte(']')
		}
		if h := s.w.Header(); !s.started && len(h["Trailer"]) == 0 {
			h["Content-Length"] = []string{strconv.Itoa(b.Buffered())}
		}
		return cmp.Or(s.flush(), errStreamClosed)
	})
	if errors.Is(err, errStreamClosed) {
		return nil
	}
	return err
}

// Abort ends a document that is not whole, and aborts the response if something
// was sent: by a panic with [http.ErrAbortHandler] if the ResponseWriter has no
// deadlines. After Close it does nothing: defer it.
func (s *JSONStream) Abort() { s.fail(errors.New("aborted")) }

// StreamJSON responds with items as one JSON array, a [JSONStream] in one call.
// It returns, wrapped, an error of items, of encoding or of the client.
// Elements are encoded as those of a []T. A nil iterator is an error. A panic
// of the iterator passes on.
func StreamJSON[T any](w http.ResponseWriter, r *http.Request, items iter.Seq2[T, error]) error {
	s, err := NewJSONStream(w, r)
	return streamItems(s, err, items)
}

// StreamNDJSON is [StreamJSON] for newline-delimited JSON.
func StreamNDJSON[T any](w http.ResponseWriter, r *http.Request, items iter.Seq2[T, error]) error {
	s, err := NewNDJSONStream(w, r)
	return streamItems(s, err, items)
}

// streamItems writes items to the stream that NewJSONStream returned with err.
func streamItems[T any](s *JSONStream, err error, items iter.Seq2[T, error]) error {
	switch {
	case err != nil:
		return err
	case s.head:
		return s.Close()
	case items == nil:
		return s.fail(errors.New("items: the iterator is nil"))
	}
	defer s.endUnless(new(bool)) // items may panic; if not, the stream has ended by then

	// A pointer to one variable spares an allocation for each item, and has
	// MarshalJSON called where it is a method of *T.
	item := new(T)
	for v, err := range items {
		if err != nil {
			return s.fail(fmt.Errorf("items: %w", err))
		}
		*item = v
		if err := s.Write(item); err != nil {
			return err
		}
	}
	return s.Close()
}

// Receive returns an iterator over what comes from ch, for [StreamJSON], until
// ch is closed. If ctx ends first, it yields [context.Cause]. Give it the
// request's context, and the producer too: after an error nobody receives. A
// nil channel yields an error.
func Receive[T any](ctx context.Context, ch <-chan T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		if ch == nil {
			yield(zero, errors.New("conduit: Receive: the channel is nil"))
			return
		}
		for ctx.Err() == nil {
			v, open := zero, false
			select { // without ctx, which takes two thirds of the time
			case v, open = <-ch:
			default:
				select {
				case v, open = <-ch:
				case <-ctx.Done():
					continue
				}
			}
			if !open || !yield(v, nil) {
				return
			}
		}
		yield(zero, context.Cause(ctx))
	}
}

// JSONHandler returns a handler that calls [StreamJSON] with what items returns
// for a request. It logs an error as "stream failed", at level debug if the
// client has disconnected, and responds with 500 if nothing was sent. It panics
// if items is nil.
func JSONHandler[T any](items func(*http.Request) iter.Seq2[T, error]) http.Handler {
	if items == nil {
		panic("conduit: JSONHandler: items is nil")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var seq iter.Seq2[T, error]
		if r.Method != http.MethodHead { // nobody would close what it opens
			seq = items(r)
		}
		s, err := NewJSONStream(w, r)
		if err := streamItems(s, err, seq); err != nil {
			streamFailed(w, r, err, s != nil && s.started)
			return
		}
		s.deadline.arm() // for what net/http still writes, on a plain http.Server
	})
}

// streamFailed logs an error that nobody else gets, and responds if nobody has.
// For a client that has disconnected there is no error line, and no 500.
func streamFailed(w http.ResponseWriter, r *http.Request, err error, started bool) {
	ctx, level := r.Context(), slog.LevelError
	// On HTTP/2 the abort of a response ends the context too, after the error.
	disconnected := errors.Is(context.Cause(ctx), context.Canceled) && errors.Is(err, context.Canceled)
	if disconnected {
		level = slog.LevelDebug
	}

	Logger(ctx).Log(ctx, level, "stream failed", "method", r.Method, "path", r.URL.Path, "pattern", r.Pattern, "err", err.Error())

	switch {
	case started, responseStarted(w):
		// The stream has aborted the response.
	case disconnected:
		abortResponseOrPanic(w, r)
	default:
		http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
	}
}

// SSEEvent is a server-sent event ([WHATWG HTML]). It has data, even if empty,
// or clients would drop it. Only one with just Retry has none: clients heed it
// and show nothing.
//
// [WHATWG HTML]: https://html.spec.whatwg.org/multipage/server-sent-events.html
type SSEEvent struct {
	// ID is what a client that reconnects sends as Last-Event-ID; empty leaves the
	// last one in place. It must be printable ASCII, at most 256 bytes.
	ID string

	// Event is the type, "message" if empty. No line breaks are allowed.
	Event string

	// Data is any text. LF, CRLF and CR end its lines; clients get LF.
	Data string

	// Retry, if positive, is how long clients wait before they reconnect, in whole
	// milliseconds, from now on. Negative is an error.
	Retry time.Duration
}

// check returns an error that names what cannot be sent. Some clients cannot
// send other IDs back, and proxies refuse them.
func (e *SSEEvent) check() error {
	switch {
	case e == nil:
		return errors.New("conduit: stream: event: is nil")
	case len(e.ID) > 256:
		return fmt.Errorf("conduit: stream: ID: %d bytes are more than 256", len(e.ID))
	case strings.ContainsFunc(e.ID, func(c rune) bool { return c < ' ' || c > '~' }):
		return fmt.Errorf("conduit: stream: ID: %q is not printable ASCII", e.ID)
	case strings.ContainsAny(e.Event, "\r\n"):
		return fmt.Errorf("conduit: stream: Event: %q has a line break", e.Event)
	case e.Retry < 0:
		return fmt.Errorf("conduit: stream: Retry: %v is negative", e.Retry)
	}
	return nil
}

// onlyRetry reports whether the event carries nothing for the page.
func (e *SSEEvent) onlyRetry() bool {
	return e.Retry > 0 && e.ID == "" && e.Event == "" && e.Data == ""
}

// appendTo appends the event as it is sent.
func (e *SSEEvent) appendTo(b []byte) []byte {
	if e.ID != "" {
		b = appendLine(b, "id:", e.ID)
	}
	if e.Event != "" {
		b = appendLine(b, "event:", e.Event)
	}
	if e.Retry > 0 {
		b = append(b, "retry: "...)
		b = strconv.AppendInt(b, max(e.Retry.Milliseconds(), 1), 10)
		b = append(b, '\n')
	}
	if !e.onlyRetry() {
		b = appendLines(b, "data:", e.Data)
	}
	return append(b, '\n')
}

// appendLines appends a field for each line of text.
func appendLines(b []byte, name, text string) []byte {
	if strings.IndexByte(text, '\r') >= 0 {
		text = strings.ReplaceAll(strings.ReplaceAll(text, "\r\n", "\n"), "\r", "\n")
	}
	for {
		end := strings.IndexByte(text, '\n')
		if end < 0 {
			return appendLine(b, name, text)
		}
		b = appendLine(b, name, text[:end])
		text = text[end+1:]
	}
}

// appendLine appends a field. Clients drop one space after the colon: without
// it, a value that begins with a space would lose that one.
func appendLine(b []byte, name, value string) []byte {
	b = append(b, name...)
	if value != "" {
		b = append(b, ' ')
	}
	return append(append(b, value...), '\n')
}

// SSEStream is a response of server-sent events, for a browser's EventSource.
// Timeouts, errors, HEAD and goroutines are as for a [Stream].
//
// A client whose response ends reconnects, with the ID of the last event that
// it saw. To end for good, send an event upon which the page closes its
// EventSource.
//
// A status other than 200, such as a proxy's 502 while the instance behind it
// restarts, is final to an EventSource. To survive it, a page opens a new one
// when readyState is CLOSED, after a random delay that grows to some seconds.
//
// On Linux the stream of a client that vanishes, its cable pulled, ends only
// after some 15 minutes of heartbeats. SendPingTimeout of [http.HTTP2Config]
// shortens that on HTTP/2, the sysctl net.ipv4.tcp_retries2 on HTTP/1: 8 makes
// it less than two minutes.
type SSEStream struct {
	streamResponse
	retrySent atomic.Bool
}

// NewSSEStream sends the header, of type text/event-stream unless the handler
// has set another, with fields that keep caches and proxies from delaying or
// changing events. It fails as [NewTextStream] and a [Stream] do.
func NewSSEStream(w http.ResponseWriter, r *http.Request) (*SSEStream, error) {
	s := new(SSEStream)
	if err := s.open(w, r, eventStream); err != nil {
		return nil, err
	}
	w.Header().Del("Content-Length")
	w.Header().Set("Cache-Control", "no-cache, no-transform")
	if err := s.withLock(s.flush); err != nil && !s.head {
		return nil, err
	}
	return s, nil
}

// WriteSSE sends and flushes an event. One that is nil or that [SSEEvent]
// forbids is an error, and the stream goes on.
func (s *SSEStream) WriteSSE(e *SSEEvent) error { return s.sendEvent(e, s.flush) }

func (s *SSEStream) sendEvent(e *SSEEvent, flush func() error) error {
	if err := e.check(); err != nil {
		return err
	}
	return s.withLock(func() error {
		b := s.buffer()
		b.Write(e.appendTo(b.AvailableBuffer())) // its error is the flush's too
		return flush()
	})
}

// Comment sends each line of text as a comment, which clients ignore.
func (s *SSEStream) Comment(text string) error {
	return s.sendFrames(s.flush, append(appendLines(nil, ":", text), '\n'))
}

func (s *SSEStream) sendFrames(flush func() error, frames ...[]byte) error {
	return s.withLock(func() error {
		for _, frame := range frames {
			s.buffer().Write(frame)
		}
		return flush()
	})
}

// Serve sends every event from the channel: at once, or together with others if
// a flush was less than a millisecond ago. When nothing was sent for 15
// seconds, it sends a comment, the heartbeat.
//
// It returns nil when the channel is closed or the server drains. At a drain it
// sends what is ready in the channel, and tells the client to come back after a
// random 2 to 10 seconds. It returns an error when the client disconnects or
// [SSEEvent] forbids an event; those before it are sent. Nobody receives from
// the channel then: a producer must also end with the request's context. A nil
// channel is an error.
func (s *SSEStream) Serve(events <-chan *SSEEvent) error {
	if events == nil {
		return errors.New("conduit: stream: events: the channel is nil")
	}
	if s.head {
		return nil
	}

	s.addHeartbeat(1)
	defer s.addHeartbeat(-1)

	var err error
	for e, ended := range Receive(s.doneContext(), events) {
		if ended != nil {
			err = s.serveRest(events)
		} else {
			err = s.sendEvent(e, s.flushShared)
		}
		if err != nil {
			break
		}
	}
	return cmp.Or(err, s.withLock(s.flush))
}

// serveRest ends Serve at a drain. If the client has disconnected instead, the
// write fails.
func (s *SSEStream) serveRest(events <-chan *SSEEvent) error {
	for range len(events) {
		select {
		case e, open := <-events:
			if !open {
				return s.sendRetry()
			}
			if err := s.sendEvent(e, s.flushShared); err != nil {
				return err
			}
		default: // somebody else has received it
		}
	}
	return s.sendRetry()
}

// sendRetry tells the client, once, when to come back: each at another time,
// and none before an instance that restarts is likely to be there again.
func (s *SSEStream) sendRetry() error {
	if s.retrySent.Swap(true) {
		return nil
	}
	return s.WriteSSE(&SSEEvent{Retry: 2*time.Second + rand.N(8*time.Second)})
}

// addHeartbeat starts heartbeats with 1 and ends them with -1.
func (s *SSEStream) addHeartbeat(n int) {
	s.withLock(func() error {
		s.heartbeats += n
		if s.heartbeats > 0 && !s.due {
			s.timer.Reset(streamHeartbeat - time.Since(s.flushed))
		}
		return nil
	})
}

// LastEventID returns the ID of the last event that the client saw, or "": its
// Last-Event-ID, or lastEventId of the query, for clients that cannot set
// fields. The client chooses it: never trust it.
func (s *SSEStream) LastEventID() string { return lastEventID(s.r) }

func lastEventID(r *http.Request) string {
	return cmp.Or(r.Header.Get("Last-Event-ID"), r.URL.Query().Get("lastEventId"))
}

// SSEHandler returns a handler that opens a stream for each request, and ends
// it when serve returns. It sends heartbeats, and at a drain a time to come
// back, as [SSEStream.Serve] does, and logs errors as [JSONHandler] does. It
// panics if serve is nil.
func SSEHandler(serve func(s *SSEStream, r *http.Request) error) http.Handler {
	if serve == nil {
		panic("conduit: SSEHandler: serve is nil")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := NewSSEStream(w, r)
		if err != nil {
			streamFailed(w, r, err, false)
			return
		}
		if s.head {
			return
		}
		defer s.withLock(func() error {
			s.deadline.arm() // for what net/http still writes, on a plain http.Server
			return errStreamClosed
		})
		s.addHeartbeat(1)
		err = serve(s, r)
		if drainContext(r.Context()).Err() != nil {
			s.sendRetry()
		}
		if err != nil {
			streamFailed(w, r, withCause(r.Context(), err), true)
		}
	})
}

// SSEBrokerConfig configures [NewSSEBroker].
type SSEBrokerConfig struct {
	// Replay is how many events are kept for clients that reconnect, 256 by
	// default. Negative: none.
	Replay int

	// Queue is how many events a client may lag behind. Default: Replay, or 256
	// if Replay is negative. With a small Replay, set it to more than what is
	// published within a few milliseconds.
	Queue int

	// MaxClients is the most clients at once; 0: no limit. More get 503 with
	// Retry-After, final to an EventSource: see [SSEStream].
	MaxClients int
}

func (c *SSEBrokerConfig) withDefaults() (SSEBrokerConfig, error) {
	var d SSEBrokerConfig
	if c != nil {
		d = *c
	}

	d.Replay = max(cmp.Or(d.Replay, 256), 0)
	d.Queue = cmp.Or(d.Queue, d.Replay, 256)

	var errs errorList
	if d.Queue < 0 {
		errs.add("Queue: %d is negative", d.Queue)
	}
	if d.MaxClients < 0 {
		errs.add("MaxClients: %d is negative", d.MaxClients)
	}
	return d, errors.Join(errs...)
}

// SSEBroker is a handler that sends every published event to all its clients,
// with heartbeats. The zero value has the defaults. A client more than Queue
// events behind gets an event of type gap, and its response ends as at a drain;
// it holds up neither Publish nor others.
//
// A client that reconnects with the ID of a kept event gets what it missed.
// With an unknown one, too old or from before a restart, it gets a gap, then
// all that is kept. A page that needs what it missed reloads at a gap.
//
// A client that is sent no event at first gets the ID to come back with, in a
// block without data. Against the standard some clients, such as go-sse and
// r3labs/sse, deliver that as an empty event: skip it.
type SSEBroker struct {
	mu      sync.Mutex // guards what follows
	config  SSEBrokerConfig
	prefix  string        // of the IDs that the broker gives, random
	ring    []sseFrame    // the last events: number n is at n % len; nil in a zero value
	next    uint64        // number of the next event
	last    string        // ID of the newest event that has one, prefix before there is one
	wake    chan struct{} // closed when there is something new; nil if nobody waits for it
	clients int
	closed  bool
}

type sseFrame struct {
	id    string
	bytes []byte // the event as it is sent, never changed
}

// NewSSEBroker returns a broker for cfg. It panics on a negative Queue or
// MaxClients.
func NewSSEBroker(cfg *SSEBrokerConfig) *SSEBroker {
	b := new(SSEBroker)
	b.configure(cfg)
	return b
}

func (b *SSEBroker) configure(cfg *SSEBrokerConfig) {
	c, err := cfg.withDefaults()
	if err != nil {
		panic(err)
	}
	b.config = c
	b.prefix = strconv.FormatUint(rand.Uint64(), 36) + "-"
	b.last = b.prefix
	b.ring = make([]sseFrame, max(c.Replay, c.Queue))
}

// lock locks mu, and gives a zero value its defaults.
func (b *SSEBroker) lock() {
	b.mu.Lock()
	if b.ring == nil {
		b.configure(nil)
	}
}

// Publish sends a copy of e to all clients, waiting for none, and keeps it for
// those that come back. An event without an ID gets one, a prefix random for
// each broker and a number, unless it has only Retry. An event that [SSEEvent]
// forbids is an error, as is any after Close.
func (b *SSEBroker) Publish(e *SSEEvent) error {
	if err := e.check(); err != nil {
		return err
	}

	event := *e
	b.lock()
	defer b.mu.Unlock()
	if b.closed {
		return errors.New("conduit: stream: Publish: the broker is closed")
	}
	if event.ID == "" && !event.onlyRetry() {
		event.ID = b.prefix + strconv.FormatUint(b.next, 10)
	}

	id := strings.Trim(event.ID, " ") // a field's value comes back without blanks at its ends
	b.last = cmp.Or(id, b.last)
	size := 64 + len(event.ID) + len(event.Event) + len(event.Data)
	*b.frameLocked(b.next) = sseFrame{id, event.appendTo(make([]byte, 0, size))}
	b.next++
	b.wakeLocked()
	return nil
}

// frameLocked returns the place of an event in the ring.
func (b *SSEBroker) frameLocked(n uint64) *sseFrame { return &b.ring[n%uint64(len(b.ring))] }

func (b *SSEBroker) wakeLocked() {
	if b.wake != nil {
		close(b.wake)
		b.wake = nil
	}
}

// ServeHTTP sends events until the client disconnects, the broker is closed or
// the server drains. Methods other than GET and HEAD get 405.
func (b *SSEBroker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !requireGetOrHead(w, r) {
		return
	}
	// This comes before the header: a client that has it misses nothing.
	c := b.subscribe(strings.Trim(lastEventID(r), " ")) // HTTP/2 keeps the blanks
	if c == nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, http.StatusText(http.StatusServiceUnavailable), http.StatusServiceUnavailable)
		return
	}
	defer b.unsubscribe()
	SSEHandler(func(s *SSEStream, _ *http.Request) error { return b.serveClient(s, c) }).ServeHTTP(w, r)
}

// Clients returns the number of clients.
func (b *SSEBroker) Clients() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.clients
}

// Close ends the responses of all clients, and of later ones, as a drain does,
// once they have what was published. It waits for none, and returns nil.
func (b *SSEBroker) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.wakeLocked()
	return nil
}

// sseClient is a client's place in the broker's events.
type sseClient struct {
	next   uint64   // number of the next event to take
	frames [][]byte // taken, and to be sent
}

var gapEvent = []byte("event: gap\ndata:\n\n")

// subscribe returns the place of a client that comes from id, nil if no more
// clients are allowed. It gives the ID to come back with to a client that gets
// no event: without one the client would miss what is published while it is
// away.
func (b *SSEBroker) subscribe(id string) *sseClient {
	b.lock()
	defer b.mu.Unlock()
	if b.config.MaxClients > 0 && b.clients >= b.config.MaxClients {
		return nil
	}

	b.clients++
	c := &sseClient{next: b.next}
	if b.closed || id == b.last {
		return c
	}

	from := b.next
	if id != "" {
		oldest := b.next - min(b.next, uint64(b.config.Replay))
		for from > oldest && b.frameLocked(from-1).id != id {
			from--
		}
		if from == oldest && !(oldest == 0 && id == b.prefix) {
			c.frames = append(c.frames, gapEvent)
		}
	}
	if from == b.next {
		c.frames = append(c.frames, []byte("id: "+b.last+"\n\n"))
	}
	for ; from < b.next; from++ {
		c.frames = append(c.frames, b.frameLocked(from).bytes)
	}
	return c
}

func (b *SSEBroker) unsubscribe() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clients--
}

// serveClient sends a client what it missed, and then what is published. At a
// drain it sends what is published by then, but no more of a replay: the client
// asks for the rest when it is back.
func (b *SSEBroker) serveClient(s *SSEStream, c *sseClient) error {
	ctx := s.doneContext()
	for _, frame := range c.frames {
		if ctx.Err() != nil {
			return s.sendRetry()
		}
		if err := s.sendFrames(s.flushShared, frame); err != nil {
			return err
		}
	}

	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		ending := ctx.Err() != nil
		more := b.take(c)
		if err := s.sendFrames(s.flush, c.frames...); err != nil {
			return err
		}
		if more == nil || ending {
			return s.sendRetry()
		}

		sent := time.Now()
		select {
		case <-more:
		case <-ctx.Done():
		}
		if rest := streamPause - time.Since(sent); rest > 0 { // in which more may come
			pause.Reset(rest)
			select {
			case <-pause.C:
			case <-ctx.Done():
			}
		}
	}
}

// take makes the client's frames what is published since it last took. It
// returns a channel that is closed once there is more. It returns nil if there
// will be none: the broker is closed, or the client lags.
func (b *SSEBroker) take(c *sseClient) (more <-chan struct{}) {
	clear(c.frames) // an idle client keeps no event alive
	c.frames = c.frames[:0]

	b.lock()
	defer b.mu.Unlock()
	if b.next-c.next > uint64(b.config.Queue) {
		c.frames = append(c.frames, gapEvent)
		return nil
	}
	for ; c.next < b.next; c.next++ {
		c.frames = append(c.frames, b.frameLocked(c.next).bytes)
	}

	if b.closed {
		return nil
	}
	if b.wake == nil {
		b.wake = make(chan struct{})
	}
	return b.wake
}

const (
	// A flush is a system call, and costs as much as writing 50 small elements
	// does. What is written within streamPause shares one, and streamBatch bytes
	// are written without waiting for it.
	streamPause = time.Millisecond
	streamBatch = 16 << 10

	// Proxies end a stream that is silent for 30 to 60 seconds, and only a write
	// notices that a client has vanished.
	streamHeartbeat = 15 * time.Second
)

// streamResponse is the part that all streams share. Three rules hold it
// together:
//
//   - One lock. Everything that writes holds mu. When mu is unlocked,
//     everything is flushed, or the timer is set to flush, or the stream has
//     ended.
//   - One sticky error. A stream that was closed or aborted, whose write failed
//     or whose request is over has ended with err, and refuses everything with
//     it.
//   - One timer. It flushes what is due, and sends heartbeats. It never aborts
//     a response, which may take a panic: the handler's next call does.
type streamResponse struct {
	w           http.ResponseWriter
	r           *http.Request
	deadline    rollingDeadline
	contentType [1]string // as the value of a field
	head        bool
	document    bool // is a JSONStream's, whose one goroutine may panic to abort it

	ctx context.Context // the request's

	doneMu     sync.Mutex      // guards what follows
	doneCtx    context.Context // Done is its channel; nil until somebody asks
	cancel     context.CancelFunc
	doneClosed bool // doneCtx is cancelled, or will be once it is made

	mu         channelLock   // guards what follows, and is held over writes to the client
	buf        *bufio.Writer // what is not yet written; nil while that is nothing
	timer      *time.Timer   // of tick
	due        bool          // the timer is set to flush
	heartbeats int           // unless it is 0, the timer is set for a heartbeat at the latest
	flushed    time.Time     // last
	started    bool          // the header is sent, or may be: it is too late for another response
	err        error         // that the stream ended with
}

var (
	errStreamClosed   = errors.New("conduit: stream: write after the end")
	errStreamHead     = fmt.Errorf("%w: HEAD: %w", errStreamClosed, http.ErrBodyNotAllowed)
	errStreamPanicked = errors.New("conduit: stream: ended by a panic")
)

// open makes s a stream on w.
func (s *streamResponse) open(w http.ResponseWriter, r *http.Request, contentType string) error {
	if !canFlush(w) {
		return fmt.Errorf("conduit: stream: %T cannot flush: %w", w, http.ErrNotSupported)
	}

	s.w, s.r, s.ctx = w, r, r.Context()
	s.contentType[0] = contentType
	s.head = r.Method == http.MethodHead
	s.doneClosed = s.head
	s.deadline = rollingDeadline{w, writeAllowance}
	s.mu.free = make(chan struct{}, 1)
	s.timer = time.AfterFunc(streamHeartbeat, s.tick)
	s.timer.Stop()

	if r.ProtoMajor > 1 { // where WriteTimeout would reset a quiet stream
		s.deadline.clear()
	}
	return nil
}

// Done returns a channel that closes when the client disconnects, the stream
// ends or the server drains.
func (s *streamResponse) Done() <-chan struct{} { return s.doneContext().Done() }

// doneContext returns the context of Done, and makes it when it is first
// asked for: to follow a request's context may cost as much as a small
// document.
func (s *streamResponse) doneContext() context.Context {
	s.doneMu.Lock()
	defer s.doneMu.Unlock()
	if s.doneCtx == nil {
		s.doneCtx, s.cancel = context.WithCancel(s.ctx)
		stop := context.AfterFunc(drainContext(s.ctx), s.cancel)
		context.AfterFunc(s.doneCtx, func() { stop() })
	}

	if s.doneClosed {
		s.cancel()
	}
	return s.doneCtx
}

func (s *streamResponse) closeDone() {
	s.doneMu.Lock()
	defer s.doneMu.Unlock()
	s.doneClosed = true
	if s.cancel != nil {
		s.cancel()
	}
}

// withLock calls f, which may write and flush, with mu held. An error of f or
// of the request ends the stream. It aborts a response that has started, and
// leaves one that has not to the handler. For HEAD withLock sends the header
// and ends the stream.
func (s *streamResponse) withLock(f func() error) error {
	if s.mu.free == nil {
		panic("conduit: stream: a zero value: use NewTextStream, NewJSONStream or NewSSEStream")
	}

	s.mu.lock()
	defer s.mu.unlock()

	if s.err == nil {
		var err error
		switch {
		case s.head:
			err = cmp.Or(s.start(), errStreamHead)
		case s.ctx.Err() != nil:
			err = context.Cause(s.ctx)
		default:
			s.err = errStreamPanicked // which stays unless f returns
			err = f()
			s.err = nil
		}
		if err == nil {
			return nil
		}
		s.end(err)
	}

	defer s.closeDone() // last: the handler that it wakes may return
	switch {
	case !s.started, errors.Is(s.err, errStreamClosed):
		// There is no response to abort, or it is whole.
	case s.document:
		abortResponseOrPanic(s.w, s.r)
	default:
		abortResponse(s.w)
	}
	return s.err
}

// fail ends the stream, unless err is nil, and returns the error that it ended
// with.
func (s *streamResponse) fail(err error) error {
	return s.withLock(func() error { return err })
}

// endUnless is deferred around code that is not ours. If that panics, no timer
// may write beside a handler that recovers, and no panic of ours that aborts
// the response may replace it.
func (s *streamResponse) endUnless(returned *bool) {
	if *returned {
		return
	}
	s.withLock(func() error {
		s.document = false
		return errors.New("panic")
	})
}

// end ends the stream with err. It is called with mu held, as all that follow
// are, except tick.
func (s *streamResponse) end(err error) {
	s.err = err
	s.timer.Stop()
	if errors.Is(err, errStreamClosed) {
		return
	}

	s.err = fmt.Errorf("conduit: stream: %w", withCause(s.ctx, err))
	s.started = s.started || responseStarted(s.w)
	if limit := writeTimeoutOf(s.ctx); !s.started && s.r.ProtoMajor > 1 && limit > 0 {
		// open has cleared the deadline that the handler's own response needs.
		if d, ok := s.ctx.Deadline(); ok {
			limit = max(limit, time.Until(d)+responseGrace)
		}
		s.deadline.set(time.Now().Add(limit))
	}
}

// withCause adds why a context has ended to an error that it led to. net/http
// ends the context when it cannot write, with a cause of its own.
func withCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// start releases every Timeout and sets the header, once, before the first
// write. For HEAD it sends the header.
func (s *streamResponse) start() error {
	if s.started {
		return nil
	}
	if !releaseTimeout(s.w) {
		// It refuses a deadline with its own error, before its context has it.
		return cmp.Or(s.deadline.clear(), context.Cause(s.ctx), context.DeadlineExceeded)
	}

	s.started = true
	h := s.w.Header()
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = s.contentType[:]
	}
	h["X-Content-Type-Options"] = nosniffValue // or browsers would wait for the first bytes
	h["X-Accel-Buffering"] = noBuffering       // by nginx, and others that know the field
	if s.head {
		s.w.Write(nil) // unlike WriteHeader it may come after one of the handler's
		return nil
	}
	s.deadline.arm() // for a flush of the header alone
	return nil
}

var noBuffering = []string{"no"} // shared by responses, never written to

// buffer returns the buffer for all that is written to s.
func (s *streamResponse) buffer() *bufio.Writer {
	if s.buf == nil {
		s.buf = streamBuffers.Get().(*bufio.Writer)
		s.buf.Reset(streamWriter{s})
	}
	return s.buf
}

// streamBuffers holds *bufio.Writer that are empty.
var streamBuffers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, streamBatch) }}

// streamWriter takes the bytes of a stream's buffer. The deadline of the write
// is that of the flush too, which clears it.
type streamWriter struct{ *streamResponse }

func (s streamWriter) Write(p []byte) (int, error) {
	if err := s.start(); err != nil {
		return 0, err
	}
	return s.deadline.write(p)
}

// flush sends all that is written. On HTTP/1 only a flush reports errors, and a
// deadline left in place would abort the end of the response.
func (s *streamResponse) flush() error {
	s.due = false
	if s.buf != nil {
		if err := s.buf.Flush(); err != nil {
			return err // and the buffer is lost: somebody may still be reading from it
		}
		s.buf.Reset(nil)
		streamBuffers.Put(s.buf)
		s.buf = nil
	}

	if err := s.start(); err != nil {
		return err
	}

	if err := http.NewResponseController(s.w).Flush(); err != nil {
		return err
	}
	s.deadline.clear() // if that fails, so does what comes next; this is delivered
	s.flushed = time.Now()
	return nil
}

// flushShared flushes, or has the timer do so if the last flush was just now.
func (s *streamResponse) flushShared() error {
	if s.due || time.Since(s.flushed) < streamPause {
		s.flushSoon()
		return nil
	}
	return s.flush()
}

// flushSoon has the timer flush.
func (s *streamResponse) flushSoon() {
	if !s.due {
		s.due = true
		s.timer.Reset(streamPause)
	}
}

// tick is called by the timer: it flushes, or sends a heartbeat.
func (s *streamResponse) tick() {
	s.mu.lock()
	defer s.mu.unlock()
	if s.err != nil || s.ctx.Err() != nil {
		return
	}

	if !s.due {
		if s.heartbeats == 0 {
			return
		}
		if rest := streamHeartbeat - time.Since(s.flushed); rest > 0 {
			s.timer.Reset(rest)
			return
		}
		s.buffer().WriteString(":\n\n")
	}

	if err := s.flushSafely(); err != nil {
		s.end(err)
		s.closeDone()
	} else if s.heartbeats > 0 {
		s.timer.Reset(streamHeartbeat)
	}
}

// flushSafely is flush on the timer's goroutine, where a panic of somebody's
// ResponseWriter would end the process.
func (s *streamResponse) flushSafely() (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return s.flush()
}

// channelLock is a mutex. A goroutine that waits for a sync.Mutex would hold up
// the clock of a testing/synctest bubble, and with that the deadline of the
// write that it waits for. A channel alone would take a tenth of an element's
// time.
type channelLock struct {
	wanted atomic.Int32  // by how many, the holder included
	free   chan struct{} // of capacity 1; passes the lock on to one that waits
}

func (l *channelLock) lock() {
	if l.wanted.Add(1) > 1 {
		<-l.free
	}
}

func (l *channelLock) unlock() {
	if l.wanted.Add(-1) > 0 {
		l.free <- struct{}{}
	}
}
