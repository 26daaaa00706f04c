package conduit

import (
	"bytes"
	"cmp"
	"context"
	cryptorand "crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// A flush is a system call, and costs as much as writing 50 small elements
	// does. What comes within streamPause of the last one shares the next,
	// unless it is streamBatch bytes.
	streamPause = time.Millisecond
	streamBatch = 16 << 10

	// streamHeartbeat is how long an event stream may be silent: proxies end
	// one that is for 30 to 60 seconds, and a client that has gone without a
	// word is noticed only by writing to it.
	streamHeartbeat = 15 * time.Second
)

// Stream is a reply of text or bytes that is sent as it is written, for as
// long as it takes: progress, a log that is followed, an export. It is an
// [io.Writer] whose Write returns when the bytes are flushed to the client.
//
// A stream outlives the timeouts. [Timeout] bounds the time to its first byte
// and no more. The server's WriteTimeout, which would reset even a quiet HTTP/2
// stream, gives way to 15 seconds for each write of up to 64 KiB: a client that
// takes nothing for so long is let go, and one that is slow, or is sent nothing,
// is not. The kernel has a say in what slow is: with its buffer full it asks for
// more only once a good part of that is taken, up to 1.3 MB on Linux, so that a
// client of some 100 kB/s may look like one that takes nothing. A ResponseWriter
// around the server's has to have Unwrap, or WriteTimeout holds; and on a plain
// [http.Server] the last few bytes, which net/http writes when the handler has
// returned, are under no deadline.
//
// An error stays, as that of a [bufio.Writer] does, and wraps its cause: that of
// the request's context ([context.Cause]) when the client has gone, beside the
// connection's own error where a write met that; [ErrTimeout] when a Timeout came
// before the first byte. After an error, what the handler still writes goes nowhere
// if the reply had begun, and is the reply if it had not. To end a reply so that
// nobody takes a part for the whole, a handler panics with [http.ErrAbortHandler].
//
// A HEAD request gets the header, and its writes fail with
// [http.ErrBodyNotAllowed]. The methods may be called from any goroutine, but
// not once the handler has returned.
type Stream struct{ reply streamReply }

// NewTextStream begins a reply of text/plain; charset=utf-8, unless the handler
// has set another Content-Type. It sends nothing yet. It returns an error that
// wraps [http.ErrNotSupported], and changes nothing, if w cannot flush.
func NewTextStream(w http.ResponseWriter, r *http.Request) (*Stream, error) {
	return newStream(w, r, "NewTextStream", textStreamType)
}

// NewBinaryStream is [NewTextStream] for bytes, application/octet-stream.
func NewBinaryStream(w http.ResponseWriter, r *http.Request) (*Stream, error) {
	return newStream(w, r, "NewBinaryStream", binaryStreamType)
}

func newStream(w http.ResponseWriter, r *http.Request, name string, contentType []string) (*Stream, error) {
	s := new(Stream)
	if err := s.reply.open(w, r, name); err != nil {
		return nil, err
	}
	setStreamHeader(w.Header(), contentType)
	return s, nil
}

// Write sends p and returns when it is flushed. An empty p sends the header.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.reply.write(p)
	if err == nil && s.reply.head {
		err = errStreamHead
	}
	return n, err
}

// ReadFrom sends what it reads from src until that ends, each part as soon as
// it is read. It returns the number of bytes and the error of src or of the
// client; that src has ended is none. A drain does not end it. It notices that
// the client has gone when it writes: a src that waits should end with the
// request's context.
func (s *Stream) ReadFrom(src io.Reader) (int64, error) {
	if s.reply.head {
		_, err := s.Write(nil)
		return 0, err
	}
	buf := make([]byte, 32<<10)
	var n int64
	for {
		m, readErr := src.Read(buf)
		if m > 0 {
			written, err := s.reply.write(buf[:m])
			n += int64(written)
			if err != nil {
				return n, err
			}
		}
		if readErr == io.EOF {
			return n, nil
		}
		if readErr != nil {
			return n, readErr
		}
	}
}

// Done returns a channel that is closed when the client has gone, a write has
// failed or the server drains ([Draining]). For a HEAD request it is closed
// from the start.
func (s *Stream) Done() <-chan struct{} { return s.reply.Done() }

// JSONStream is a reply of many JSON values, one array or one document a line,
// that is sent while they are made. What [Stream] says of timeouts holds for it
// too. Elements are gathered for a millisecond, or until there are 16 KiB of
// them, so that a busy source pays for few flushes and a slow one is not kept
// waiting. A document that ends before anything was sent goes out whole, with a
// Content-Length.
//
// The handler decides how it ends:
//
//	s, err := conduit.NewJSONStream(w, r)
//	if err != nil {
//		return err
//	}
//	defer s.Abort()
//	for rows.Next() {
//		...
//		if err := s.Write(row); err != nil {
//			return err
//		}
//	}
//	if err := rows.Err(); err != nil {
//		return err
//	}
//	return s.Close()
//
// An error stays. If nothing has been sent by then, what was written is dropped
// and the reply is the handler's to make, a 500 for one: not even a header is
// set. If something has, the reply is cut at once, as by [JSONStream.Abort].
//
// A JSONStream is for one goroutine, except Done. Header fields must be set before
// the first element, and WriteHeader must not be called: an early error could not
// be answered then. Before the handler returns or panics it must call Close or
// Abort, which [StreamJSON] does by itself.
type JSONStream struct {
	reply  streamReply
	lines  bool
	some   bool          // an element was written
	closed bool          // and the reply is whole
	ended  error         // what Write returns from now on; nil while it may go on
	buf    *streamBuffer // element and encoder are Write's, sending belongs to reply.turn

	mu     sync.Mutex // guards what follows, and buf.pending
	timer  *time.Timer
	armed  bool  // timer runs
	failed error // what became of a write by tick
}

// NewJSONStream begins a reply that is one JSON array, of type
// application/json unless the handler has set another Content-Type. It sends
// nothing yet. It returns an error that wraps [http.ErrNotSupported], and
// changes nothing, if w cannot flush.
func NewJSONStream(w http.ResponseWriter, r *http.Request) (*JSONStream, error) {
	return newJSONStream(w, r, "NewJSONStream", jsonStreamType, false)
}

// NewNDJSONStream is [NewJSONStream] for newline-delimited JSON, of type
// application/x-ndjson: one document a line, which a client can read while
// they come. A client cannot tell a cut one from a whole one by its content,
// only by how the reply ended, and on HTTP/1.0 not at all.
func NewNDJSONStream(w http.ResponseWriter, r *http.Request) (*JSONStream, error) {
	return newJSONStream(w, r, "NewNDJSONStream", ndjsonStreamType, true)
}

func newJSONStream(w http.ResponseWriter, r *http.Request, name string, contentType []string, lines bool) (*JSONStream, error) {
	s := &JSONStream{lines: lines}
	if err := s.reply.open(w, r, name); err != nil {
		return nil, err
	}
	s.reply.document = contentType
	s.buf = newStreamBuffer()
	return s, nil
}

// Write adds v, as [encoding/json] encodes it, to the document. It is sent
// within a few milliseconds. For a HEAD request it sends the header and drops
// v.
func (s *JSONStream) Write(v any) error {
	if s.ended != nil {
		return s.ended
	}
	if s.reply.head {
		return s.sendHead()
	}
	if s.reply.ctx.Err() != nil {
		return s.fail(s.reply.gone())
	}
	// Outside of the lock: MarshalJSON is somebody else's, and may take long
	// or panic.
	element := &s.buf.element
	element.Reset()
	returned := false
	defer func() {
		if !returned {
			s.abandon()
		}
	}()
	err := s.buf.encoder.Encode(v)
	returned = true
	if err != nil {
		return s.fail(fmt.Errorf("conduit: stream: element: %w", err))
	}
	pending, err := s.add(element.Bytes())
	if err == nil && pending >= streamBatch {
		err = s.push()
	}
	if err != nil {
		return s.fail(err)
	}
	return nil
}

// sendHead is all that there is to the reply to HEAD.
func (s *JSONStream) sendHead() error {
	if _, err := s.reply.write(nil); err != nil {
		return s.fail(err)
	}
	return nil
}

// add appends an encoded element, which ends in a newline, to what is pending,
// and returns how much that is.
func (s *JSONStream) add(element []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed != nil {
		return 0, s.failed
	}
	b := s.buf
	if !s.lines {
		element = element[:len(element)-1]
		separator := byte(',')
		if !s.some {
			separator = '['
		}
		b.pending = append(b.pending, separator)
	}
	b.pending = append(b.pending, element...)
	s.some = true
	if !s.armed {
		s.arm(streamPause)
	}
	return len(b.pending), nil
}

// arm has tick called after d. It is called with mu held.
func (s *JSONStream) arm(d time.Duration) {
	s.armed = true
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.tick)
		return
	}
	s.timer.Reset(d)
}

// tick sends what is pending if a millisecond has gone by since the last flush.
func (s *JSONStream) tick() {
	s.reply.lock()
	defer s.reply.unlock()
	if s.reply.usable() != nil {
		return
	}
	s.mu.Lock()
	rest := streamPause - time.Since(s.reply.flushed)
	if rest > 0 {
		s.arm(rest)
	} else {
		s.armed = false
	}
	s.mu.Unlock()
	if rest > 0 {
		return
	}
	if p := s.take(); len(p) > 0 || s.reply.unflushed {
		if err := s.reply.sendAside(p); err != nil {
			s.mu.Lock()
			s.failed = err
			s.mu.Unlock()
		}
	}
}

// take returns what is pending, so that more can be added while it is sent. It
// is called with reply.turn held.
func (s *JSONStream) take() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.buf
	b.pending, b.sending = b.sending[:0], b.pending
	return b.sending
}

// push writes what is pending, since it is enough. The flush, which on HTTP/1
// would be a system call for a line break, is the next batch's, or tick's.
func (s *JSONStream) push() error {
	s.reply.lock()
	defer s.reply.unlock()
	p := s.take()
	if len(p) == 0 { // tick was first, and no flush would follow to clear the deadline
		return s.reply.usable()
	}
	_, err := s.reply.put(p)
	return err
}

// flush sends what is pending.
func (s *JSONStream) flush() error {
	s.reply.lock()
	defer s.reply.unlock()
	_, err := s.reply.send(s.take())
	return err
}

// WriteJSONArray writes every item that comes from the channel until that is
// closed, and then closes the stream. What has come is sent at once when no
// more is ready and the last flush is over a millisecond old. It returns an
// error, as [JSONStream.Write] and [JSONStream.Close] do, when the client goes
// or an item cannot be encoded; nobody receives from the channel then, so a
// producer must also end with the request's context, or it waits for ever. A
// nil channel is an error. For a HEAD request it returns at once and leaves the
// channel alone. A drain does not end it.
func (s *JSONStream) WriteJSONArray(items <-chan any) error {
	if s.ended != nil {
		return s.ended
	}
	if items == nil {
		return s.fail(errors.New("conduit: stream: items: the channel is nil"))
	}
	if s.reply.head {
		return s.sendHead()
	}
	for {
		var v any
		open := true
		select {
		case v, open = <-items:
		default:
			if err := s.idle(); err != nil {
				return s.fail(err)
			}
			select {
			case v, open = <-items:
			case <-s.reply.ctx.Done():
				return s.fail(s.reply.gone())
			}
		}
		if !open {
			return s.Close()
		}
		if err := s.Write(v); err != nil {
			return err
		}
	}
}

// idle sends what is pending, since nothing more is ready, unless the last
// flush was just now: then the timer does.
func (s *JSONStream) idle() error {
	s.mu.Lock()
	pending, err := len(s.buf.pending), s.failed
	s.mu.Unlock()
	if err != nil || pending == 0 || s.reply.sinceFlush() < streamPause {
		return err
	}
	return s.flush()
}

// Close ends the document and returns when it is flushed: an array with "]", or as
// "[]" if nothing was written. After an error it returns that one, after Abort an
// error too. A second Close does nothing.
func (s *JSONStream) Close() error {
	if s.closed {
		return nil
	}
	if s.ended != nil {
		return s.ended
	}
	if err := s.finish(); err != nil {
		return s.fail(err)
	}
	s.closed, s.ended = true, errStreamEnded
	s.reply.closeDone()
	return nil
}

func (s *JSONStream) finish() error {
	s.reply.lock()
	defer s.reply.unlock()
	if err := s.reply.usable(); err != nil {
		return err
	}
	p := s.take()
	if !s.lines {
		if !s.some {
			p = append(p, '[')
		}
		p = append(p, ']')
	}
	if !s.reply.started && !s.reply.head {
		if err := s.reply.start(len(p)); err != nil {
			return err
		}
	}
	if _, err := s.reply.send(p); err != nil {
		return err
	}
	s.end()
	s.buf.sending = p
	s.buf.free()
	return nil
}

// end refuses all that is written from here on. It is called with reply.turn
// held.
func (s *JSONStream) end() {
	s.reply.ended = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
}

// Abort ends a document that is not to be taken for a whole one. If something
// was sent, the reply is cut: the client gets an unexpected end on HTTP/1 and a
// reset stream on HTTP/2, caches keep nothing, and what the handler still
// writes goes nowhere. If nothing was, the reply is the handler's to make. After
// Close, an error or another Abort it does nothing, so that it can be deferred.
//
// It panics with [http.ErrAbortHandler], which cuts as well, behind a
// ResponseWriter of a server that supports no deadlines.
func (s *JSONStream) Abort() {
	if s.ended != nil {
		return
	}
	if s.drop() {
		cutReply(s.reply.w, s.reply.r)
	}
}

// drop ends the stream where it is, and reports whether something was sent. It
// does nothing to one that has ended.
func (s *JSONStream) drop() bool {
	if s.ended != nil {
		return false
	}
	s.ended = errStreamEnded
	s.reply.lock()
	s.end()
	begun := s.reply.begun()
	s.reply.unlock()
	defer s.reply.closeDone()
	if !begun {
		s.reply.giveBack()
	}
	return begun && !s.reply.head
}

// abandon ends the stream of a panic that passes through: no timer must write to
// the reply any more, which is cut if it has begun.
func (s *JSONStream) abandon() {
	if s.drop() {
		muteReply(s.reply.w)
	}
}

// fail ends the stream with an error, the first if there was one before.
func (s *JSONStream) fail(err error) error {
	s.ended = s.reply.fail(err)
	return s.ended
}

// Done returns a channel that is closed when the client has gone, the stream
// has ended or failed, or the server drains ([Draining]). A drain ends no
// document: the handler decides whether to go on. For a HEAD request it is
// closed from the start.
func (s *JSONStream) Done() <-chan struct{} { return s.reply.Done() }

// StreamJSON replies with items as one JSON array, sent while they come. It is
// [JSONStream] in one call: an error that items yields, that encoding meets or
// that the client causes is returned, wrapped; the reply is then the caller's
// to make if nothing has been sent, and has been cut if something has.
//
//	err := conduit.StreamJSON(w, r, store.Posts(r.Context()))
//
// Elements are encoded as those of a []T are. When the stream ends early the
// iterator's loop is ended, so that it can clean up. A nil iterator is an error,
// and a panic of the iterator passes on. For a HEAD request items is not called.
func StreamJSON[T any](w http.ResponseWriter, r *http.Request, items iter.Seq2[T, error]) error {
	s, err := NewJSONStream(w, r)
	if err != nil {
		return err
	}
	return streamItems(s, items)
}

// StreamNDJSON is [StreamJSON] for newline-delimited JSON, one document a line.
func StreamNDJSON[T any](w http.ResponseWriter, r *http.Request, items iter.Seq2[T, error]) error {
	s, err := NewNDJSONStream(w, r)
	if err != nil {
		return err
	}
	return streamItems(s, items)
}

func streamItems[T any](s *JSONStream, items iter.Seq2[T, error]) error {
	if s.reply.head {
		return s.sendHead()
	}
	if items == nil {
		return s.fail(errors.New("conduit: stream: items: the iterator is nil"))
	}
	defer s.abandon() // for a panic of items
	// A pointer to one variable spares an allocation for each item, and has
	// MarshalJSON called where it is a method of *T.
	item := new(T)
	for v, err := range items {
		if err != nil {
			return s.fail(fmt.Errorf("conduit: stream: items: %w", err))
		}
		*item = v
		if err := s.Write(item); err != nil {
			return err
		}
	}
	return s.Close()
}

// Receive returns an iterator over what comes from a channel, for [StreamJSON],
// until that is closed. When ctx ends it yields [context.Cause] and stops; give
// it the request's, and the producer too. A nil channel yields an error.
func Receive[T any](ctx context.Context, ch <-chan T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		var zero T
		if ch == nil {
			yield(zero, errors.New("conduit: stream: Receive: the channel is nil"))
			return
		}
		for {
			select {
			case v, open := <-ch:
				if !open || !yield(v, nil) {
					return
				}
			case <-ctx.Done():
				yield(zero, context.Cause(ctx))
				return
			}
		}
	}
}

// JSONHandler returns a handler that replies to each request with [StreamJSON]
// of what items returns for it. An error is logged as "stream failed", at level
// debug if the client has gone, and its text never sent: the client gets a 500
// if nothing was sent before, and otherwise a reply that is cut. For a HEAD
// request items is not called. JSONHandler panics if items is nil.
func JSONHandler[T any](items func(*http.Request) iter.Seq2[T, error]) http.Handler {
	if items == nil {
		panic("conduit: JSONHandler: items is nil")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var seq iter.Seq2[T, error]
		if r.Method != http.MethodHead { // whatever it opens nobody would close
			seq = items(r)
		}
		s, err := NewJSONStream(w, r)
		if err == nil {
			err = streamItems(s, seq)
		}
		if err == nil {
			s.reply.deadline.arm() // for what net/http still writes, on a plain http.Server
			return
		}
		logStreamFailure(r, err)
		if s == nil || !s.reply.started {
			replyForStream(w, r)
		}
	})
}

// replyForStream answers for a stream that has failed before it began. To a
// client that has gone nothing is said, nor is a 500 logged.
func replyForStream(w http.ResponseWriter, r *http.Request) {
	if clientGone(r.Context()) {
		cutReply(w, r)
		return
	}
	http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
}

func clientGone(ctx context.Context) bool {
	return ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled)
}

// logStreamFailure logs an error that nobody else gets. That clients go is not
// worth a line.
func logStreamFailure(r *http.Request, err error) {
	ctx := r.Context()
	level := slog.LevelError
	if clientGone(ctx) {
		level = slog.LevelDebug
	}
	Logger(ctx).LogAttrs(ctx, level, "stream failed",
		slog.String("method", r.Method),
		slog.String("path", r.URL.Path),
		slog.String("pattern", r.Pattern),
		slog.String("err", err.Error()),
	)
}

// SSEEvent is a server-sent event ([WHATWG HTML, Section 9.2]).
//
// An event is sent with data, even if that is empty, because clients drop one
// without. Only an event with nothing but Retry goes without: clients heed it and
// show nothing.
//
// [WHATWG HTML, Section 9.2]: https://html.spec.whatwg.org/multipage/server-sent-events.html
type SSEEvent struct {
	// ID is what a client that reconnects sends as Last-Event-ID; empty leaves
	// the last one in place. A control character other than TAB in it, such as a
	// line break or NUL, is an error. An [SSEBroker] tells events apart by it.
	ID string

	// Event is the type under which a browser dispatches the event, "message"
	// if it is empty. A line break in it is an error.
	Event string

	// Data is any text. Its lines, which LF, CRLF and CR end, reach the client
	// with LF between them.
	Data string

	// Retry, when it is set, is how long clients wait before they reconnect, in
	// whole milliseconds. Negative is an error.
	Retry time.Duration
}

// check returns an error that names what cannot be sent.
func (e *SSEEvent) check() error {
	switch {
	case e == nil:
		return errors.New("conduit: stream: event: is nil")
	case strings.ContainsFunc(e.ID, isControl):
		return fmt.Errorf("conduit: stream: ID: %q has a control character", e.ID)
	case strings.ContainsAny(e.Event, "\r\n"):
		return fmt.Errorf("conduit: stream: Event: %q has a line break", e.Event)
	case e.Retry < 0:
		return fmt.Errorf("conduit: stream: Retry: %v is negative", e.Retry)
	}
	return nil
}

// isControl reports what no field value has (RFC 9110, Section 5.5), and with it
// no Last-Event-ID: net/http answers 400 to one that does, which is final.
func isControl(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }

// onlyRetry reports whether the event carries nothing for the page.
func (e *SSEEvent) onlyRetry() bool {
	return e.Retry > 0 && e.ID == "" && e.Event == "" && e.Data == ""
}

// size is at least as much as append adds.
func (e *SSEEvent) size() int {
	lines := 1 + strings.Count(e.Data, "\n") + strings.Count(e.Data, "\r")
	return len("id: \nevent: \nretry: \n\n") + 20 + len(e.ID) + len(e.Event) + len(e.Data) + lines*len("data: \n")
}

// append appends the event as it is sent.
func (e *SSEEvent) append(b []byte) []byte {
	if e.ID != "" {
		b = append(b, "id: "...)
		b = append(b, e.ID...)
		b = append(b, '\n')
	}
	if e.Event != "" {
		b = append(b, "event: "...)
		b = append(b, e.Event...)
		b = append(b, '\n')
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

// appendLines appends each line of text behind a prefix that ends in a colon.
// The space after that is not part of the text, but would be missed by one that
// begins with a space.
func appendLines(b []byte, prefix, text string) []byte {
	next := strings.IndexByte
	if strings.IndexByte(text, '\r') >= 0 {
		next = func(text string, _ byte) int { return strings.IndexAny(text, "\r\n") }
	}
	for {
		end := next(text, '\n')
		line := text
		if end >= 0 {
			line = text[:end]
		}
		b = append(b, prefix...)
		if line != "" {
			b = append(b, ' ')
			b = append(b, line...)
		}
		b = append(b, '\n')
		if end < 0 {
			return b
		}
		if strings.HasPrefix(text[end:], "\r\n") {
			end++
		}
		text = text[end+1:]
	}
}

// SSEStream is a reply of server-sent events, which a browser's EventSource
// reads ([WHATWG HTML, Section 9.2]). What [Stream] says of timeouts, errors and
// HEAD holds for it too. Its methods may be called from several goroutines, but
// not once the handler has returned.
//
// A client whose reply ends reconnects by itself, with the ID of the last event
// that it saw; one that gets a status other than 200 does not. A stream that is
// to end for good says so in an event, upon which the page closes its
// EventSource.
//
// [WHATWG HTML, Section 9.2]: https://html.spec.whatwg.org/multipage/server-sent-events.html
type SSEStream struct {
	reply streamReply
	bye   bool // guarded by reply.turn: the client was told when to come back
}

// NewSSEStream sends the header of a stream of events: text/event-stream unless
// the handler has set another Content-Type, and what keeps caches and proxies
// from holding events back or changing them, whatever Cache-Control there was. It
// returns an error that wraps [http.ErrNotSupported], and changes nothing, if w
// cannot flush, and other errors as [Stream] has them.
func NewSSEStream(w http.ResponseWriter, r *http.Request) (*SSEStream, error) {
	return newSSEStream(w, r, nil)
}

// newSSEStream sends what is to be first together with the header.
func newSSEStream(w http.ResponseWriter, r *http.Request, first []byte) (*SSEStream, error) {
	s := new(SSEStream)
	if err := s.reply.open(w, r, "NewSSEStream"); err != nil {
		return nil, err
	}
	s.reply.events = true
	if _, err := s.reply.write(first); err != nil {
		return nil, err
	}
	s.reply.flushed = time.Time{} // the first event need not wait because of the header
	return s, nil
}

// WriteSSE sends an event, and returns nil when it is flushed. One that cannot
// be sent, nil or with a field that [SSEEvent] forbids, is an error that names
// the field; nothing is written then and the stream can be used further.
func (s *SSEStream) WriteSSE(e *SSEEvent) error {
	if err := e.check(); err != nil {
		return err
	}
	if s.reply.head {
		return errStreamHead
	}
	b := newStreamBuffer()
	b.pending = e.append(b.pending)
	return s.writeBuffer(b)
}

// Comment sends a comment, which clients ignore: a heartbeat. Each line of text
// becomes one.
func (s *SSEStream) Comment(text string) error {
	if s.reply.head {
		return errStreamHead
	}
	b := newStreamBuffer()
	b.pending = append(appendLines(b.pending, ":", text), '\n')
	return s.writeBuffer(b)
}

// writeBuffer sends what is pending in b, which it frees.
func (s *SSEStream) writeBuffer(b *streamBuffer) error {
	if _, err := s.reply.write(b.pending); err != nil {
		return err
	}
	b.free()
	return nil
}

// Serve sends every event that comes from the channel, and a comment whenever
// nothing was sent for 15 seconds. What has come is sent at once when no more
// is ready and the last flush is over a millisecond old, or when it is 16 KiB: a
// busy source pays no flush per event.
//
// It returns nil when the channel is closed, or when the server drains, with
// what is ready in the channel sent and the client told to come back after a
// random time from 1 to 10 seconds, so that not all come at once. It returns an
// error when the client goes, when the channel or an event is nil, and when an
// event is one that [SSEEvent] forbids; what came before that is sent. Nobody
// receives from the channel then, so a producer must also end with the request's
// context. For a HEAD request Serve returns nil at once and leaves the channel
// alone.
func (s *SSEStream) Serve(events <-chan *SSEEvent) error {
	if events == nil {
		return errors.New("conduit: stream: events: the channel is nil")
	}
	if s.reply.head {
		return nil
	}
	defer s.keepAlive()()
	p := ssePump{stream: s}
	defer p.stop()
	done := s.reply.Done()
	for {
		var e *SSEEvent
		open := true
		select {
		case e, open = <-events:
		default:
			if err := p.idle(); err != nil {
				return err
			}
			select {
			case e, open = <-events:
			case <-p.due:
				if err := p.flush(); err != nil {
					return err
				}
				continue
			case <-done:
				return s.leave(&p, events)
			}
		}
		if !open {
			return p.flush()
		}
		full, err := p.add(e)
		if err != nil {
			return err
		}
		if full {
			select {
			case <-done: // which a channel that is never empty would keep from being seen
				return s.leave(&p, events)
			default:
			}
		}
	}
}

// leave ends Serve once Done is closed.
func (s *SSEStream) leave(p *ssePump, events <-chan *SSEEvent) error {
	for range len(events) {
		select {
		case e, open := <-events:
			if !open {
				continue
			}
			if _, err := p.add(e); err != nil {
				return err
			}
		default: // somebody else has it
		}
	}
	if err := p.flush(); err != nil {
		return err
	}
	return s.farewell()
}

// ssePump gathers events for Serve, on its goroutine.
type ssePump struct {
	stream *SSEStream
	buf    *streamBuffer    // nil while nothing is pending
	due    <-chan time.Time // when to send what is pending; nil if that is not settled
	timer  *time.Timer
}

// add appends an event to what is pending and reports whether that was sent,
// since it was enough. Before it returns an error it sends what is pending.
func (p *ssePump) add(e *SSEEvent) (full bool, err error) {
	if err := e.check(); err != nil {
		if err := p.flush(); err != nil {
			return false, err
		}
		return false, err
	}
	if p.buf == nil {
		p.buf = newStreamBuffer()
	}
	p.buf.pending = e.append(p.buf.pending)
	if len(p.buf.pending) < streamBatch {
		return false, nil
	}
	return true, p.flush()
}

// idle sends what is pending, since nothing more is ready, or sets due if the
// last flush was just now.
func (p *ssePump) idle() error {
	if p.buf == nil || p.due != nil {
		return nil
	}
	rest := streamPause - p.stream.reply.sinceFlush()
	if rest <= 0 {
		return p.flush()
	}
	if p.timer == nil {
		p.timer = time.NewTimer(rest)
	} else {
		p.timer.Reset(rest)
	}
	p.due = p.timer.C
	return nil
}

func (p *ssePump) flush() error {
	b := p.buf
	p.buf, p.due = nil, nil
	if b == nil {
		return nil
	}
	return p.stream.writeBuffer(b)
}

func (p *ssePump) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
}

// farewell tells the client when to come back, once.
func (s *SSEStream) farewell() error {
	s.reply.lock()
	bye := s.bye
	s.bye = true
	s.reply.unlock()
	if bye {
		_, err := s.reply.write(nil)
		return err
	}
	wait := time.Second + time.Duration(rand.IntN(9001))*time.Millisecond
	return s.WriteSSE(&SSEEvent{Retry: wait})
}

// keepAlive sends a comment whenever nothing was written for 15 seconds, until
// stop is called. The timer runs through: a write costs it nothing.
func (s *SSEStream) keepAlive() (stop func()) {
	r := &s.reply
	stopped := false // guarded by r.turn, as is timer
	var timer *time.Timer
	r.lock()
	defer r.unlock()
	timer = time.AfterFunc(streamHeartbeat, func() {
		r.lock()
		defer r.unlock()
		if stopped || r.usable() != nil {
			return
		}
		rest := streamHeartbeat - time.Since(r.flushed)
		if rest <= 0 {
			r.sendAside(heartbeatComment)
			rest = streamHeartbeat
		}
		timer.Reset(rest)
	})
	return func() {
		timer.Stop()
		r.lock()
		stopped = true
		r.unlock()
	}
}

// heartbeatComment is never written to.
var heartbeatComment = []byte(":\n\n")

// end refuses all that is written from here on: the handler is about to return,
// and what net/http then writes is to have a deadline on a plain [http.Server]
// too.
func (s *SSEStream) end() {
	s.reply.lock()
	s.reply.ended = true
	if s.reply.err == nil {
		s.reply.deadline.arm()
	}
	s.reply.unlock()
	s.reply.closeDone()
}

// LastEventID returns the ID of the last event that the client has seen, as it
// says: the request's Last-Event-ID, "" without one. The client chooses it: look
// it up, never trust it. net/http lets none through that has a control character.
func (s *SSEStream) LastEventID() string { return s.reply.r.Header.Get("Last-Event-ID") }

// Done returns a channel that is closed when the client has gone, a write has
// failed or the server drains ([Draining]). For a HEAD request it is closed
// from the start.
func (s *SSEStream) Done() <-chan struct{} { return s.reply.Done() }

// SSEHandler returns a handler that opens a stream of events for each request
// and has serve fill it. While serve runs, a comment is sent whenever nothing
// was sent for 15 seconds. The stream ends when serve returns, and clients
// reconnect; at a drain they are told to do that after a random time from 1 to 10
// seconds. An error is logged as "stream failed", at level debug if the client
// has gone, and its text is never sent. For a HEAD request serve is not called.
// SSEHandler panics if serve is nil.
func SSEHandler(serve func(s *SSEStream, r *http.Request) error) http.Handler {
	if serve == nil {
		panic("conduit: SSEHandler: serve is nil")
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serveSSE(w, r, nil, func(s *SSEStream) error { return serve(s, r) })
	})
}

func serveSSE(w http.ResponseWriter, r *http.Request, first []byte, serve func(*SSEStream) error) {
	s, err := newSSEStream(w, r, first)
	if err != nil {
		logStreamFailure(r, err)
		replyForStream(w, r)
		return
	}
	if s.reply.head {
		return
	}
	defer s.end()
	defer s.keepAlive()()
	err = serve(s)
	select {
	case <-Draining(r.Context()):
		s.farewell()
	default:
	}
	if err != nil {
		logStreamFailure(r, err)
	}
}

// SSEBrokerConfig configures [NewSSEBroker].
type SSEBrokerConfig struct {
	// Replay is how many events are kept for clients that reconnect, 256 by
	// default, negative for none.
	Replay int

	// Queue is how many events a client may lag behind before it is told of a
	// gap and let go: Replay by default, and 256 where that is none. It should
	// be more than what is published within a few milliseconds: with a small
	// Replay, set it. Negative panics.
	Queue int

	// MaxClients is how many clients there may be at once; more get 503 with
	// Retry-After. To a browser's EventSource that is final, as any status but
	// 200 is: the page has to make a new one. 0 is no limit, negative panics.
	MaxClients int
}

const sseReplay = 256

func (c *SSEBrokerConfig) withDefaults() (SSEBrokerConfig, error) {
	var d SSEBrokerConfig
	if c != nil {
		d = *c
	}
	d.Replay = max(cmp.Or(d.Replay, sseReplay), 0)
	d.Queue = cmp.Or(d.Queue, d.Replay, sseReplay)
	var faults faultList
	if d.Queue < 0 {
		faults.add("Queue: %d is negative", d.Queue)
	}
	if d.MaxClients < 0 {
		faults.add("MaxClients: %d is negative", d.MaxClients)
	}
	return d, errors.Join(faults...)
}

// SSEBroker is a handler that sends every event which is published to all of
// its clients. An event is formatted once, and what a client has not been sent
// yet goes out in one write. A client that lags more than Queue events behind
// gets an event of type gap, and its reply ends; it holds up neither Publish nor
// the other clients. Whoever is sent nothing for 15 seconds gets a comment.
//
// A client that reconnects with a Last-Event-ID that the broker knows gets what
// it missed. If the broker does not know it, the event being too old or from
// before a restart, it gets an event of type gap, and then all that is kept. A
// page that cannot do without the events it missed loads its state anew upon a
// gap:
//
//	events.addEventListener("gap", () => location.reload())
//
// Its methods may be called from any goroutine.
type SSEBroker struct {
	config SSEBrokerConfig
	kept   int    // events in a full ring
	prefix string // of the IDs that the broker gives, random

	mu      sync.Mutex    // guards what follows
	next    uint64        // number of the next event
	last    string        // ID of the newest event that has one, prefix before there is one
	ring    []sseFrame    // the last events: number n is at n % kept
	wake    chan struct{} // closed when there is something new; nil if nobody waits for it
	clients int
	closed  bool
}

// sseFrame is an event as it is sent, never changed.
type sseFrame struct {
	id    string
	bytes []byte
}

// NewSSEBroker returns a broker for cfg, which it copies; nil is all defaults.
// It panics, naming the field, on a negative Queue or MaxClients.
func NewSSEBroker(cfg *SSEBrokerConfig) *SSEBroker {
	c, err := cfg.withDefaults()
	if err != nil {
		panic(err)
	}
	prefix := cryptorand.Text()[:12] + "-"
	return &SSEBroker{config: c, kept: max(c.Replay, c.Queue), prefix: prefix, last: prefix}
}

// Publish sends an event to the clients that are there, and keeps it for those
// that come back. It waits for none of them. An event without an ID gets one, of
// a prefix that is random for each broker and a number, unless it carries
// nothing but Retry. e is copied. An event that is nil or has a field that
// [SSEEvent] forbids is an error and changes nothing, and so is any after Close.
func (b *SSEBroker) Publish(e *SSEEvent) error {
	if err := e.check(); err != nil {
		return err
	}
	event := *e
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return errors.New("conduit: stream: Publish: the broker is closed")
	}
	if event.ID == "" && !event.onlyRetry() {
		id := append(make([]byte, 0, 40), b.prefix...)
		event.ID = string(strconv.AppendUint(id, b.next, 10))
	}
	// It comes back in a field, whose value has no blanks at its ends (RFC 9110,
	// Section 5.5).
	id := strings.Trim(event.ID, " \t")
	b.last = cmp.Or(id, b.last)
	frame := sseFrame{id, event.append(make([]byte, 0, event.size()))}
	if len(b.ring) < b.kept {
		b.ring = append(b.ring, frame)
	} else {
		*b.frame(b.next) = frame
	}
	b.next++
	b.unlockAndWake()
	return nil
}

// ServeHTTP sends events until the client goes, the broker is closed or the
// server drains. Methods other than GET and HEAD get 405.
func (b *SSEBroker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !onlyReads(w, r) {
		return
	}
	// Before the header goes out: whoever has that misses nothing.
	c := b.join(strings.Trim(r.Header.Get("Last-Event-ID"), " \t")) // HTTP/2 leaves them
	if c == nil {
		w.Header().Set("Retry-After", "5")
		http.Error(w, http.StatusText(http.StatusServiceUnavailable), http.StatusServiceUnavailable)
		return
	}
	defer b.part()
	serveSSE(w, r, c.first, func(s *SSEStream) error { return b.feed(s, c) })
}

// Clients returns the number of clients.
func (b *SSEBroker) Clients() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.clients
}

// Close ends the replies of all clients, once they have what was published, and
// tells them to come back after a random time from 1 to 10 seconds. It does not
// wait for them. Clients that come later are told the same. It returns nil, and
// may be called more than once.
func (b *SSEBroker) Close() error {
	b.mu.Lock()
	b.closed = true
	b.unlockAndWake()
	return nil
}

// unlockAndWake releases mu and wakes the clients that wait, in this order: all
// of them want it.
func (b *SSEBroker) unlockAndWake() {
	wake := b.wake
	b.wake = nil
	b.mu.Unlock()
	if wake != nil {
		close(wake)
	}
}

// sseClient is a client's place in the broker's events.
type sseClient struct {
	cursor uint64 // number of the next event to send
	until  uint64 // number of the first event not to send
	first  []byte // goes out with the header
	replay [][]byte
	batch  [][]byte
	size   int // of batch, in bytes
}

// join returns a place for a client that comes from id, nil if there is none.
// What is replayed is taken at once: it does not count as lag, and is not
// overwritten. A client that gets no event is told the ID to come back with, in
// a block without data that pages do not see: or what is published while it is
// away, before its first event, would pass it by without a word.
func (b *SSEBroker) join(id string) *sseClient {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.config.MaxClients > 0 && b.clients >= b.config.MaxClients {
		return nil
	}
	b.clients++
	c := &sseClient{cursor: b.next, until: math.MaxUint64}
	if b.closed || id == b.last {
		return c
	}
	from := b.next
	if id != "" {
		oldest := b.next - min(b.next, uint64(b.config.Replay))
		for from > oldest && b.frame(from-1).id != id {
			from--
		}
		if from == oldest && !(oldest == 0 && id == b.prefix) {
			c.first = append(c.first, gapEvent...)
		}
	}
	if from == b.next {
		c.first = append(c.first, "id: "+b.last+"\n\n"...)
	}
	for ; from < b.next; from++ {
		c.replay = append(c.replay, b.frame(from).bytes)
	}
	return c
}

const gapEvent = "event: gap\ndata:\n\n"

func (b *SSEBroker) part() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clients--
}

// frame returns the place of an event in the ring. It is called with mu held.
func (b *SSEBroker) frame(n uint64) *sseFrame {
	return &b.ring[n%uint64(b.kept)]
}

// feed is a client's loop.
func (b *SSEBroker) feed(s *SSEStream, c *sseClient) error {
	done := s.reply.Done()
	for len(c.replay) > 0 {
		select {
		case <-done: // the rest is replayed when it is back
			return s.farewell()
		default:
		}
		var err error
		if c.replay, err = s.writeFrames(c.replay); err != nil {
			return err
		}
	}
	pause := time.NewTimer(0)
	defer pause.Stop()
	for {
		if wake := b.waitFor(c); wake != nil {
			select {
			case <-wake:
			case <-done:
			}
		}
		select {
		case <-done: // which a client with much to take would not see
			b.limit(c)
		default:
		}
		if rest := streamPause - s.reply.sinceFlush(); rest > 0 && c.size < streamBatch && c.until == math.MaxUint64 {
			pause.Reset(rest)
			select {
			case <-pause.C:
			case <-done:
				b.limit(c)
			}
		}
		switch b.take(c) {
		case sseLagging:
			_, err := s.reply.write([]byte(gapEvent))
			return err
		case sseEnded:
			return s.farewell()
		}
		if _, err := s.writeFrames(c.batch); err != nil {
			return err
		}
	}
}

// waitFor returns a channel that is closed once there is something to take, and
// nil if there is already.
func (b *SSEBroker) waitFor(c *sseClient) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.cursor < b.next || c.cursor >= c.until || b.closed {
		return nil
	}
	if b.wake == nil {
		b.wake = make(chan struct{})
	}
	return b.wake
}

// limit has the client end with what is published by now.
func (b *SSEBroker) limit(c *sseClient) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.until = min(c.until, b.next)
}

// What comes of taking events.
const (
	sseTaken   = iota
	sseLagging // too far behind
	sseEnded   // nothing more will come
)

// take fills the client's batch, up to 16 KiB of it or one event.
func (b *SSEBroker) take(c *sseClient) int {
	c.batch, c.size = c.batch[:0], 0
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next-c.cursor > uint64(b.config.Queue) {
		return sseLagging
	}
	for end := min(b.next, c.until); c.cursor < end && c.size < streamBatch; c.cursor++ {
		frame := b.frame(c.cursor).bytes
		c.batch = append(c.batch, frame)
		c.size += len(frame)
	}
	if len(c.batch) == 0 && (b.closed || c.cursor >= c.until) {
		return sseEnded
	}
	return sseTaken
}

// writeFrames sends the first events, up to 16 KiB of them or one, in one write,
// and returns the rest.
func (s *SSEStream) writeFrames(frames [][]byte) (rest [][]byte, err error) {
	if len(frames) == 0 {
		return nil, nil
	}
	if len(frames) == 1 || len(frames[0]) >= streamBatch {
		_, err := s.reply.write(frames[0])
		return frames[1:], err
	}
	b := newStreamBuffer()
	for len(frames) > 0 && len(b.pending) < streamBatch {
		b.pending = append(b.pending, frames[0]...)
		frames = frames[1:]
	}
	return frames, s.writeBuffer(b)
}

// streamReply is what all streams have in common: a reply that is written and
// flushed under a deadline of its own, that ends with an error which stays, and
// that outlives what would end it too early.
type streamReply struct {
	w        http.ResponseWriter
	r        *http.Request
	ctx      context.Context
	deadline rollingDeadline
	head     bool
	events   bool     // it is an SSEStream's
	document []string // the Content-Type of a JSONStream, else nil

	// turn is a lock: it guards what follows, and is held over writes to the
	// client so that they do not mix. It is not a mutex because whoever waits for
	// one holds up the clock of a testing/synctest bubble, and with it the
	// deadline of the write.
	turn      chan struct{}
	started   bool // the header is out, or may be
	ended     bool // nothing may be written any more
	cut       bool
	err       error     // the first one
	flushed   time.Time // when something last was
	unflushed bool      // something was written since

	doneMu sync.Mutex // guards what follows
	done   context.Context
	cancel context.CancelFunc
	over   bool // done is to be cancelled
}

var (
	errStreamEnded = errors.New("conduit: stream: write after the end")
	errStreamHead  = fmt.Errorf("conduit: stream: HEAD: %w", http.ErrBodyNotAllowed)
)

// open makes s a stream on w. name is that of the constructor.
func (s *streamReply) open(w http.ResponseWriter, r *http.Request, name string) error {
	if !canFlush(w) {
		return fmt.Errorf("conduit: stream: %s: %T cannot flush: %w", name, w, http.ErrNotSupported)
	}
	s.w, s.r, s.ctx = w, r, r.Context()
	s.deadline = rollingDeadline{w, writeAllowance}
	s.head = r.Method == http.MethodHead
	s.over = s.head
	s.turn = make(chan struct{}, 1)
	s.deadline.clear()
	return nil
}

func (s *streamReply) lock() { s.turn <- struct{}{} }

func (s *streamReply) unlock() { <-s.turn }

// Done is that of the streams. Few handlers ask for it.
func (s *streamReply) Done() <-chan struct{} {
	s.doneMu.Lock()
	defer s.doneMu.Unlock()
	if s.done == nil {
		s.done, s.cancel = context.WithCancel(s.ctx)
		if s.over {
			s.cancel()
		} else {
			stop := context.AfterFunc(drainContext(s.ctx), s.cancel)
			context.AfterFunc(s.done, func() { stop() })
		}
	}
	return s.done.Done()
}

// closeDone closes the channel of Done, now or when somebody asks for it.
func (s *streamReply) closeDone() {
	s.doneMu.Lock()
	defer s.doneMu.Unlock()
	s.over = true
	if s.cancel != nil {
		s.cancel()
	}
}

// write sends p and flushes it.
func (s *streamReply) write(p []byte) (int, error) {
	n, err := s.sendLocked(p)
	if err != nil {
		return n, s.fail(err)
	}
	return n, nil
}

func (s *streamReply) sendLocked(p []byte) (int, error) {
	s.lock()
	defer s.unlock()
	return s.send(p)
}

// sendAside is send for a timer's goroutine, where a panic of somebody's
// ResponseWriter would end the process. The error stays for the handler's next
// write. It is called with turn held.
func (s *streamReply) sendAside(p []byte) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("conduit: stream: write: panic: %v", v)
		}
		if err != nil {
			s.err = err
			s.cut = s.started && muteReply(s.w)
			s.closeDone()
		}
	}()
	_, err = s.send(p)
	return err
}

// send writes p and flushes it. It is called with turn held. On HTTP/1 it is the
// flush that tells of errors, and a deadline left in place would cut the
// reply's end.
func (s *streamReply) send(p []byte) (n int, err error) {
	if n, err = s.put(p); err != nil || s.head {
		return n, err
	}
	if err := http.NewResponseController(s.w).Flush(); err != nil {
		return n, s.broken("flush", err)
	}
	s.deadline.clear() // if that fails, so does what comes next; this is delivered
	s.flushed, s.unflushed = time.Now(), false
	return n, nil
}

// put writes p and leaves the deadline for the flush. It is called with turn
// held.
func (s *streamReply) put(p []byte) (n int, err error) {
	if err := s.usable(); err != nil {
		return 0, err
	}
	if !s.started {
		if err := s.start(-1); err != nil {
			return 0, err
		}
	}
	if s.head {
		return 0, nil
	}
	if n, err = s.deadline.write(p); err != nil {
		return n, s.broken("write", err)
	}
	s.unflushed = true
	return n, nil
}

// usable returns the error with which a write is refused, nil if it is not. It
// is called with turn held.
func (s *streamReply) usable() error {
	switch {
	case s.err != nil:
		return s.err
	case s.ended:
		return errStreamEnded
	case s.ctx.Err() != nil:
		return s.gone()
	}
	return nil
}

// broken is the error of a write that failed. net/http ends the request's context
// then, if the client has gone.
func (s *streamReply) broken(what string, err error) error {
	if s.ctx.Err() != nil {
		return fmt.Errorf("conduit: stream: %s: %w: %w", what, context.Cause(s.ctx), err)
	}
	return fmt.Errorf("conduit: stream: %s: %w", what, err)
}

// gone is the error of a request whose context has ended.
func (s *streamReply) gone() error {
	return fmt.Errorf("conduit: stream: request: %w", context.Cause(s.ctx))
}

// start precedes the first byte. A length other than -1 is that of the whole
// body. It is called with turn held.
func (s *streamReply) start(length int) error {
	if !releaseTimeout(s.w) {
		// It refuses a deadline with its own error, before its context has it.
		cause := cmp.Or(s.deadline.clear(), context.Cause(s.ctx), context.DeadlineExceeded)
		return fmt.Errorf("conduit: stream: start: %w", cause)
	}
	s.started = true
	h := s.w.Header()
	switch {
	case s.events:
		setStreamHeader(h, eventStreamType)
		h["Cache-Control"] = eventStreamCaching
		delete(h, "Content-Length")
	case s.document != nil:
		setStreamHeader(h, s.document)
		delete(h, "Content-Length")
		if length >= 0 && len(h["Trailer"]) == 0 {
			h["Content-Length"] = []string{strconv.Itoa(length)}
		}
	}
	if s.head {
		// An empty write sends the header, and unlike WriteHeader it may come
		// after one of the handler's.
		s.w.Write(nil)
	}
	return nil
}

// fail ends the stream with an error, and returns the first one. A reply that
// has begun is cut, and one that has not is the caller's to make.
func (s *streamReply) fail(err error) error {
	s.lock()
	if s.ended {
		s.unlock()
		return err // and what was sent is whole
	}
	if s.err == nil {
		s.err = err
	}
	err = s.err
	begun, cut := s.begun(), s.cut
	s.cut = true
	s.unlock()
	defer s.closeDone() // last: whom it wakes may return, and nobody touch w then
	switch {
	case cut:
	case !begun:
		s.giveBack()
	case s.head:
	case s.document != nil:
		cutReply(s.w, s.r)
	default:
		muteReply(s.w) // any goroutine may be here, and must not panic
	}
	return err
}

// begun reports whether it is too late for another reply: the stream's header is
// out, or the handler has chosen a status. It is called with turn held.
func (s *streamReply) begun() bool { return s.started || replyBegun(s.w) }

// giveBack leaves a reply that has not begun to the handler, under the time that
// the server gives it, or a Timeout if that is more: it had moved the deadline
// for a reply of its own.
func (s *streamReply) giveBack() {
	limit := writeTimeoutOf(s.ctx)
	if limit == 0 {
		return
	}
	end := time.Now().Add(limit)
	if d, ok := s.ctx.Deadline(); ok && end.Before(d.Add(replyGrace)) {
		end = d.Add(replyGrace)
	}
	s.deadline.set(end)
}

func (s *streamReply) sinceFlush() time.Duration {
	s.lock()
	defer s.unlock()
	return time.Since(s.flushed)
}

// Values of header fields that replies share and never write to.
var (
	textStreamType     = []string{"text/plain; charset=utf-8"}
	binaryStreamType   = []string{"application/octet-stream"}
	jsonStreamType     = []string{"application/json"}
	ndjsonStreamType   = []string{"application/x-ndjson"}
	eventStreamType    = []string{eventStream}
	eventStreamCaching = []string{"no-cache, no-transform"}
	noBuffering        = []string{"no"} // by nginx, and others that heed X-Accel-Buffering
)

// setStreamHeader keeps browsers from looking for a type in the first bytes,
// for which they would wait.
func setStreamHeader(h http.Header, contentType []string) {
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = contentType
	}
	h["X-Content-Type-Options"] = nosniffValue
	h["X-Accel-Buffering"] = noBuffering
}

// streamBuffer is what streams gather before they write, and JSON's encoder.
type streamBuffer struct {
	pending []byte // to be sent
	sending []byte // what a JSONStream was sending while more came
	element bytes.Buffer
	encoder *json.Encoder // to element
}

// streamBuffers holds *streamBuffer that no ResponseWriter can be reading any
// more. After an error one may be.
var streamBuffers = sync.Pool{New: func() any {
	b := new(streamBuffer)
	b.encoder = json.NewEncoder(&b.element)
	return b
}}

func newStreamBuffer() *streamBuffer {
	b := streamBuffers.Get().(*streamBuffer)
	b.pending = b.pending[:0]
	return b
}

func (b *streamBuffer) free() {
	if max(cap(b.pending), cap(b.sending), b.element.Cap()) <= writePiece {
		streamBuffers.Put(b)
	}
}
