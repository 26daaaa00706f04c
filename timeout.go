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
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// ErrTimeout is the cause ([context.Cause]) of a request's context and the
// error of a handler's writes after a [Timeout]. For [errors.Is] it is also
// [context.DeadlineExceeded] and [http.ErrHandlerTimeout].
var ErrTimeout error = timeoutError{}

type timeoutError struct{}

func (timeoutError) Error() string { return "conduit: Timeout: the handler did not respond in time" }
func (timeoutError) Timeout() bool { return true }
func (timeoutError) Is(target error) bool {
	return target == context.DeadlineExceeded || target == http.ErrHandlerTimeout
}

// TimeoutConfig configures [TimeoutWith].
type TimeoutConfig struct {
	// Duration bounds the start and end of a response. Required, at least 1 ms.
	Duration time.Duration

	// Status is sent for a late handler, 400 to 599. Default: 503.
	Status int

	// Message is the body of that response. Default: the text of Status.
	Message string

	// ContentType is its media type. Default: application/json if Message is valid
	// JSON, else text/plain; charset=utf-8.
	ContentType string

	// Fast makes it a [FastTimeout].
	Fast bool

	// Skip, if set, reports which requests not to limit.
	Skip func(*http.Request) bool
}

func (c *TimeoutConfig) withDefaults() (TimeoutConfig, error) {
	var d TimeoutConfig
	if c != nil {
		d = *c
	}

	d.Status = cmp.Or(d.Status, http.StatusServiceUnavailable)
	d.Message = cmp.Or(d.Message, http.StatusText(d.Status)+"\n")
	if d.ContentType == "" && json.Valid([]byte(d.Message)) {
		d.ContentType = "application/json"
	}
	d.ContentType = cmp.Or(d.ContentType, "text/plain; charset=utf-8")

	var errs errorList
	if d.Duration <= 0 {
		errs.add("Duration: %v is not positive", d.Duration)
	}
	errs.addShort("Duration", d.Duration)
	if d.Status < 400 || d.Status > 599 {
		errs.add("Status: %d is not an error, 400 to 599", d.Status)
	}
	return d, errors.Join(errs...)
}

// Timeout responds with 503 for a handler that has not started its response
// after d, and aborts a response that has not ended by then. See [TimeoutWith].
// It panics if d is less than a millisecond.
func Timeout(d time.Duration) Middleware {
	return TimeoutWith(&TimeoutConfig{Duration: d})
}

// FastTimeout is [Timeout] without a goroutine per request, at less than half
// the cost, for handlers that heed their context. It responds at the same
// moment, but cannot abandon a handler. On HTTP/1 a timeout closes the
// connection when the handler returns, and aborts a started response only then.
// On HTTP/2 the response arrives, but its stream ends when the handler returns,
// or a second after the timeout with a reset, which clients take for an error.
func FastTimeout(d time.Duration) Middleware {
	return TimeoutWith(&TimeoutConfig{Duration: d, Fast: true})
}

// TimeoutWith limits how long a handler may take. When the time is up,
//
//   - the request's context is cancelled: its Err is
//     [context.DeadlineExceeded], its cause [ErrTimeout];
//   - a response that has not started becomes Status and Message;
//   - a response that has started is aborted, with [http.ErrAbortHandler];
//   - a handler that waits for the request's body is freed, and its writes fail
//     with ErrTimeout.
//
// Nothing is buffered: writes, flushes, informational responses and sendfile go
// straight through. If the server's WriteTimeout is sooner, the write deadline
// moves to 5 seconds after the timeout; ReadTimeout stays. A client that is
// still sending its request has half a second to read the timeout's response
// before an HTTP/1 connection closes. Hijacking ends the timeout. Of nested
// timeouts the shortest counts.
//
// The handler runs on a goroutine of its own unless Fast is set. Its panic
// reaches the serving goroutine with value and stack, for [Recovery]; one after
// the timeout is logged. A handler that ignores its context is abandoned: it
// runs until it returns, and a shutdown of the [Server] waits for it. For chi
// and echo, see the package comment.
//
// In a [Stream], or another response that outlives the timeout, a context that
// the handler derives with a deadline after the timeout's never ends: package
// context gives it no timer of its own. Instead, have [time.AfterFunc] call the
// cancel function of [context.WithCancelCause] with [context.DeadlineExceeded]:
// without a cause the client counts as disconnected.
func TimeoutWith(cfg *TimeoutConfig) Middleware {
	c, err := cfg.withDefaults()
	if err != nil {
		panic(err)
	}
	return func(next http.Handler) http.Handler {
		checkHandler("Timeout", next)
		return &timeoutHandler{
			TimeoutConfig: c,
			next:          next,
			contentType:   []string{c.ContentType},
			contentLength: []string{strconv.Itoa(len(c.Message))},
		}
	}
}

// The states of a request under a Timeout, held by its timeoutWriter. The end of
// the handler, a release and the timer race to end timeoutRunning, and the first
// one wins.
const (
	timeoutRunning = iota

	// Set by releaseTimeout and Hijack. The handler may take any time;
	// timeoutEnded follows.
	timeoutReleased

	// Set by endInTime, when the handler has returned in time. Its response is
	// completed, and later writes pass through.
	timeoutEnded

	// Set by the timer. The handler reaches the client no more: the serving
	// goroutine responds, or if Fast the timer's.
	timeoutFired
)

type timeoutHandler struct {
	TimeoutConfig
	next                       http.Handler
	contentType, contentLength []string  // shared by all responses, never changed
	workers                    sync.Pool // of *timeoutWorker
}

func (h *timeoutHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.Skip != nil && h.Skip(r) {
		h.next.ServeHTTP(w, r)
		return
	}
	now := time.Now()
	t := &timeoutWriter{
		ResponseWriter: w,
		Context:        r.Context(),
		handler:        h,
		original:       r,
		path:           r.URL.Path,
		deadline:       now.Add(h.Duration),
	}
	t.request = copyRequest(r, t)
	t.extendWriteDeadline()

	k := h.worker(t, now)
	if h.Fast {
		h.serveInline(t, k)
	} else {
		h.serveInGoroutine(t, k)
	}
}

// serveInGoroutine runs the handler on a goroutine of its own, which it
// abandons when the time is up.
func (h *timeoutHandler) serveInGoroutine(t *timeoutWriter, k *timeoutWorker) {
	go k.run()
	<-k.done

	if t.state.Load() == timeoutFired {
		// Ask the router again for the pattern: the copy of the request that
		// has it belongs to the handler now.
		r := t.original
		probe := &http.Request{Method: r.Method, Host: r.Host, URL: &url.URL{Path: t.path}}
		r.Pattern = cmp.Or(patternOf(h.next, probe), r.Pattern)
		if !t.writeTimeoutResponse() {
			panic(http.ErrAbortHandler)
		}
		return
	}

	h.stop(k)
	t.waitForWrites()
	copyBack(t.original, &t.request)

	switch {
	case t.panicked != nil:
		panic(t.panicked)
	case t.exited:
		runtime.Goexit()
	}
	t.finish()
}

// serveInline runs the handler on this goroutine. The timer's goroutine
// responds for it.
func (h *timeoutHandler) serveInline(t *timeoutWriter, k *timeoutWorker) {
	returned := false
	defer func() {
		t.endInTime()
		if !h.stop(k) {
			<-k.done // the timer's goroutine may be writing the response
		}
		t.waitForWrites()
		copyBack(t.original, &t.request)

		switch {
		case !returned:
			return // a panic goes on
		case t.panicked != nil:
			panic(t.panicked)
		case t.aborted:
			panic(http.ErrAbortHandler)
		}
		t.finish()
	}()

	h.next.ServeHTTP(t, &t.request)
	returned = true
}

// timeoutWorker holds the parts that cost an allocation and can be used again:
// a timer, a channel, and the function for the go statement.
type timeoutWorker struct {
	t      *timeoutWriter
	timer  *time.Timer
	done   chan struct{} // gets one value: the handler has ended, or the timer has fired
	run    func()        // k.serve, as a value for the go statement
	shared bool          // may go back to the pool
}

// worker returns a worker for t whose timer runs.
func (h *timeoutHandler) worker(t *timeoutWriter, now time.Time) *timeoutWorker {
	// In a testing/synctest bubble timers and channels must not come from outside
	// nor go there. Only in a bubble has the time no monotonic part.
	shared := now != now.Round(0)
	if shared {
		if k, ok := h.workers.Get().(*timeoutWorker); ok {
			k.t = t
			k.timer.Reset(h.Duration)
			return k
		}
	}

	k := &timeoutWorker{t: t, done: make(chan struct{}, 1), shared: shared}
	k.run = k.serve
	k.timer = time.AfterFunc(h.Duration, k.expire)
	return k
}

// stop stops the timer and reports whether it did. Only then is the worker used
// again: a timer that has fired still works on it.
func (h *timeoutHandler) stop(k *timeoutWorker) bool {
	stopped := k.timer.Stop()
	if stopped && k.shared {
		k.t = nil
		h.workers.Put(k)
	}
	return stopped
}

// serve is the handler's goroutine.
func (k *timeoutWorker) serve() {
	growStack(0)
	t := k.t
	returned := false
	defer func() {
		if !returned {
			if value := recover(); value != nil {
				t.panicked = wrapPanic(value)
			} else {
				t.exited = true
			}
		}
		if t.endInTime() {
			k.done <- struct{}{}
			return
		}
		t.cleanUpLate()
	}()

	t.handler.next.ServeHTTP(t, &t.request)
	returned = true
}

// expire is the timer's goroutine.
func (k *timeoutWorker) expire() {
	t := k.t
	t.countAbandoned(1) // before cleanUpLate can take it back
	fired := t.state.CompareAndSwap(timeoutRunning, timeoutFired)
	if fired {
		t.cancellable().cancel(ErrTimeout)
	} else {
		t.countAbandoned(-1)
	}
	if !fired && !t.handler.Fast {
		return // the handler's goroutine sends to done
	}

	defer func() {
		if value := recover(); value != nil { // from a ResponseWriter outside
			t.panicked = wrapPanic(value)
		}
		k.done <- struct{}{}
	}()
	if fired && t.handler.Fast {
		t.aborted = !t.writeTimeoutResponse()
	}
}

// timeoutWriter is the handler's ResponseWriter and the context of its request.
// It has a header map of its own, since an abandoned handler may still write to
// it, and lets no write of such a handler through.
type timeoutWriter struct {
	http.ResponseWriter
	context.Context
	handler  *timeoutHandler
	original *http.Request
	request  http.Request // the copy for the handler
	path     string       // of the URL, which the two requests share
	deadline time.Time

	state   atomic.Int32
	started atomic.Bool // the header is written; set with mu held

	mu     sync.Mutex  // held over each write
	header http.Header // nil until the handler calls Header

	// control is held while a deadline is set. It is not mu, because a
	// deadline may be what ends a write.
	control sync.Mutex

	context atomic.Pointer[timeoutContext]

	panicked any  // what the handler, or a write of the timer's, panicked with
	exited   bool // the handler ended its goroutine
	aborted  bool // the timer found the response started
}

var _ fullWriter = (*timeoutWriter)(nil)

// extendWriteDeadline moves the connection's write deadline past the timeout's
// if it is sooner. net/http sets it anew for the next request.
func (t *timeoutWriter) extendWriteDeadline() {
	if d := writeTimeoutOf(t.Context); d == 0 || d >= t.handler.Duration+responseGrace {
		return
	}
	if outer, ok := t.Context.Value(timeoutKey{}).(*timeoutWriter); ok && outer.deadline.After(t.deadline) {
		return
	}
	http.NewResponseController(t.ResponseWriter).SetWriteDeadline(t.deadline.Add(responseGrace))
}

// checkOpen returns an error if the timeout has fired. A handler that has ended
// in time leaves the writer open: a router may respond to its error.
func (t *timeoutWriter) checkOpen() error {
	if t.state.Load() == timeoutFired {
		return ErrTimeout
	}
	return nil
}

// Unwrap is for [http.ResponseController] and for the functions of conduit.go
// that look for releaseTimeout and responseStarted.
func (t *timeoutWriter) Unwrap() http.ResponseWriter { return t.ResponseWriter }

// Header returns the handler's own header, which starts as a copy of the outer
// one.
func (t *timeoutWriter) Header() http.Header {
	switch {
	case t.state.Load() == timeoutEnded:
		return t.ResponseWriter.Header()
	case t.header != nil:
		return t.header
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.header = make(http.Header)
	if t.checkOpen() == nil {
		for field, values := range t.ResponseWriter.Header() {
			t.header[field] = slices.Clip(values)
		}
	}
	return t.header
}

func (t *timeoutWriter) WriteHeader(status int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.checkOpen() != nil:
	case t.state.Load() == timeoutEnded:
		t.ResponseWriter.WriteHeader(status)
	case t.started.Load():
		logSuperfluous(t, status)
	case !isFinal(status):
		t.writeInformational(status)
	case t.commit() == nil:
		closeIfTooLarge(t.ResponseWriter, t.original, status)
		t.ResponseWriter.WriteHeader(status)
	}
}

// writeInformational sends the handler's header as it is now and takes it back
// from the response, which may yet be a timeout's.
func (t *timeoutWriter) writeInformational(status int) {
	if t.header == nil {
		t.ResponseWriter.WriteHeader(status)
		return
	}
	h := t.ResponseWriter.Header()
	outer := maps.Clone(h)
	replaceHeader(h, t.header)

	// It is not sent, but with it net/http's HTTP/2 encodes a copy. Otherwise, if
	// the client has reset the stream, it may read the map after WriteHeader has
	// returned.
	h["Content-Length"] = nil
	t.ResponseWriter.WriteHeader(status)
	replaceHeader(h, outer)
}

// commit makes the handler's header that of the response. It is called with mu
// held, before the first write.
func (t *timeoutWriter) commit() error {
	if t.started.Load() {
		return nil
	}
	t.started.Store(true)

	// Since started is set, a timer that fires from now on sees it.
	if err := t.checkOpen(); err != nil {
		t.started.Store(false)
		return err
	}
	if t.header != nil {
		replaceHeader(t.ResponseWriter.Header(), t.header)
	}
	return nil
}

func replaceHeader(dst, src http.Header) {
	clear(dst)
	maps.Copy(dst, src)
}

// start is called before each write, with mu held.
func (t *timeoutWriter) start() error {
	if err := t.checkOpen(); err != nil {
		return err
	}
	return t.commit()
}

func (t *timeoutWriter) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.start(); err != nil {
		return 0, err
	}
	return t.ResponseWriter.Write(p)
}

func (t *timeoutWriter) WriteString(p string) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.start(); err != nil {
		return 0, err
	}
	return io.WriteString(t.ResponseWriter, p)
}

// ReadFrom keeps sendfile for regular files. Other sources may block, which
// must not happen with mu held.
func (t *timeoutWriter) ReadFrom(src io.Reader) (int64, error) {
	rf, ok := t.ResponseWriter.(io.ReaderFrom)
	if !ok || !readsFile(src) {
		return io.Copy(struct{ io.Writer }{t}, src)
	}
	var first int64
	if !t.started.Load() {
		var more bool
		var err error
		if first, more, err = copyFirst(t, src); !more {
			return first, err
		}
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.start(); err != nil {
		return first, err
	}
	n, err := rf.ReadFrom(src)
	return first + n, err
}

// readsFile reports whether src is a regular file or a limit around one.
func readsFile(src io.Reader) bool {
	if limited, ok := src.(*io.LimitedReader); ok {
		src = limited.R
	}
	file, ok := src.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode().IsRegular()
}

// Flush is FlushError for callers that look for an [http.Flusher].
func (t *timeoutWriter) Flush() { t.FlushError() }

func (t *timeoutWriter) FlushError() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch err := t.checkOpen(); {
	case err != nil:
		return err // before the ResponseWriter is touched
	case !canFlush(t.ResponseWriter):
		return http.ErrNotSupported // and nothing has started
	}
	if err := t.commit(); err != nil {
		return err
	}
	return http.NewResponseController(t.ResponseWriter).Flush()
}

// CloseNotify is for code that takes every ResponseWriter for a CloseNotifier.
func (t *timeoutWriter) CloseNotify() <-chan bool { return closeNotify(t) }

func (t *timeoutWriter) Push(target string, opts *http.PushOptions) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.checkOpen(); err != nil {
		return err
	}
	return push(t.ResponseWriter, target, opts)
}

// Hijack releases the timeout: a hijacked connection has no response.
func (t *timeoutWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	released := t.state.CompareAndSwap(timeoutRunning, timeoutReleased)
	if err := t.checkOpen(); err != nil {
		return nil, nil, err
	}

	conn, buf, err := http.NewResponseController(t.ResponseWriter).Hijack()
	if err != nil && released {
		t.state.CompareAndSwap(timeoutReleased, timeoutRunning)
	}
	return conn, buf, err
}

func (t *timeoutWriter) SetReadDeadline(deadline time.Time) error {
	return t.withControl(func(rc *http.ResponseController) error { return rc.SetReadDeadline(deadline) })
}

func (t *timeoutWriter) SetWriteDeadline(deadline time.Time) error {
	return t.withControl(func(rc *http.ResponseController) error { return rc.SetWriteDeadline(deadline) })
}

func (t *timeoutWriter) EnableFullDuplex() error {
	return t.withControl((*http.ResponseController).EnableFullDuplex)
}

func (t *timeoutWriter) withControl(set func(*http.ResponseController) error) error {
	t.control.Lock()
	defer t.control.Unlock()
	if err := t.checkOpen(); err != nil {
		return err
	}
	return set(http.NewResponseController(t.ResponseWriter))
}

// releaseTimeout lifts the timeout for good and leaves the context alone. It
// returns false if the timeout has fired, after which nothing may be written.
// It takes no lock: a released response is usually inside a write.
//
// The function releaseTimeout in conduit.go calls it, for responses that
// outlive a timeout by nature.
func (t *timeoutWriter) releaseTimeout() bool {
	return t.state.CompareAndSwap(timeoutRunning, timeoutReleased) || t.state.Load() != timeoutFired
}

// responseStarted reports whether the handler has started its response. The
// function responseStarted in conduit.go calls it.
func (t *timeoutWriter) responseStarted() bool { return t.started.Load() }

// endInTime notes that the handler has ended, and reports whether in time.
func (t *timeoutWriter) endInTime() bool {
	return t.state.CompareAndSwap(timeoutRunning, timeoutEnded) ||
		t.state.CompareAndSwap(timeoutReleased, timeoutEnded)
}

// waitForWrites waits for writes by other goroutines of a handler that has
// ended, and cancels its context.
func (t *timeoutWriter) waitForWrites() {
	t.control.Lock()
	defer t.control.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.context.Load(); c != nil {
		c.cancel(context.Canceled)
	}
}

// finish completes the response of a handler that has returned in time: with
// its header if it wrote nothing, with its trailers if it did. Later calls go
// straight to the ResponseWriter inside, those of Header too.
func (t *timeoutWriter) finish() {
	switch {
	case t.state.Load() == timeoutFired:
		return
	case t.header == nil:
	case t.started.Load():
		maps.Copy(t.ResponseWriter.Header(), t.header)
	default:
		replaceHeader(t.ResponseWriter.Header(), t.header)
	}
	t.started.Store(true)
}

// writeTimeoutResponse responds for a late handler. It returns false if the
// response had started, which the caller must abort. In state timeoutFired the
// handler starts no new write; this waits for the one that it may be in.
func (t *timeoutWriter) writeTimeoutResponse() bool {
	t.control.Lock()
	defer t.control.Unlock()
	defer t.freeReader()

	rc := http.NewResponseController(t.ResponseWriter)
	if t.started.Load() {
		rc.SetWriteDeadline(time.Unix(1, 0))
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	if t.started.Load() {
		return false
	}

	h := t.handler
	header := t.ResponseWriter.Header()
	clearRepresentation(header)
	header["Content-Type"] = h.contentType
	header["Content-Length"] = h.contentLength

	http1 := t.original.ProtoMajor == 1
	switch { // on HTTP/2 either would end the other streams too
	case http1 && t.hasBody():
		// Otherwise net/http waits for a handler that is stuck in Read, to read
		// the rest of the body.
		closeAfterResponse(t.ResponseWriter)
	case http1 && h.Fast:
		header["Connection"] = []string{"close"}
	}

	// The response must end by its Content-Length, whatever the handler does.
	disableCompression(t.ResponseWriter)
	t.ResponseWriter.WriteHeader(h.Status)
	io.WriteString(t.ResponseWriter, h.Message)
	rc.Flush()
	if h.Fast && !http1 {
		// The stream ends with the handler. If that is not soon, it ends with a
		// reset.
		rc.SetWriteDeadline(time.Now().Add(time.Second))
	}
	return true
}

func (t *timeoutWriter) hasBody() bool {
	return t.original.Body != nil && t.original.Body != http.NoBody
}

// freeReader frees a handler that waits for the request's body. The deadline
// ends its Read, and Close makes the next one fail. Without Close, net/http
// would lift the deadline of a Read that it finds at the end of the request,
// and wait without one for the rest of the body.
func (t *timeoutWriter) freeReader() {
	if t.hasBody() && http.NewResponseController(t.ResponseWriter).SetReadDeadline(time.Unix(1, 0)) == nil {
		t.original.Body.Close()
	}
}

// countAbandoned counts abandoned handlers. A shutdown waits for them: its
// hooks close what they use.
func (t *timeoutWriter) countAbandoned(n int64) {
	if s := serverFrom(t.Context); s != nil && !t.handler.Fast {
		s.requests.Add(n)
		s.notify()
	}
}

// cleanUpLate ends an abandoned handler.
func (t *timeoutWriter) cleanUpLate() {
	defer t.countAbandoned(-1)
	if p, ok := t.panicked.(*panicError); ok {
		r := t.original
		Logger(t.Context).LogAttrs(t.Context, slog.LevelError, "panic after a timeout",
			slog.String("method", r.Method),
			slog.String("path", t.path),
			slog.String("pattern", t.request.Pattern),
			slog.String("remote", r.RemoteAddr),
			slog.String("err", fmt.Sprint(p.value)),
			slog.String("stack", string(p.stack)),
		)
	}
	if form := t.request.MultipartForm; form != nil && form != t.original.MultipartForm {
		form.RemoveAll()
	}
}

// timeoutContext is the cancellable part of a timeoutWriter's context. It is
// made on demand: few handlers need it, and it costs as much as the rest of the
// timeout.
type timeoutContext struct {
	context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when Context is cancelled
}

type timeoutKey struct{}

func (t *timeoutWriter) cancellable() *timeoutContext {
	if c := t.context.Load(); c != nil {
		return c
	}
	c := &timeoutContext{done: make(chan struct{})}
	c.Context, c.cancel = context.WithCancelCause(t.Context)
	context.AfterFunc(c.Context, func() { close(c.done) })
	if !t.context.CompareAndSwap(nil, c) {
		c.cancel(context.Canceled)
		return t.context.Load()
	}
	if t.state.Load() == timeoutEnded { // nobody else will cancel it
		c.cancel(context.Canceled)
	}
	return c
}

func (t *timeoutWriter) Deadline() (time.Time, bool) {
	deadline, ok := t.Context.Deadline()
	if t.state.Load() != timeoutReleased && (!ok || t.deadline.Before(deadline)) {
		return t.deadline, true
	}
	return deadline, ok
}

// Done returns another channel than the cancelled context inside, so that
// derived contexts ask this one for its Err and do not take over
// [context.Canceled].
func (t *timeoutWriter) Done() <-chan struct{} { return t.cancellable().done }

// Err is [context.DeadlineExceeded] after a timeout.
func (t *timeoutWriter) Err() error {
	c := t.context.Load()
	if c == nil {
		return t.Context.Err()
	}
	if err := c.Err(); err == nil || context.Cause(c) != ErrTimeout {
		return err
	}
	return context.DeadlineExceeded
}

func (t *timeoutWriter) Value(key any) any {
	if key == (timeoutKey{}) {
		return t
	}
	if c := t.context.Load(); c != nil {
		return c.Value(key)
	}
	return t.Context.Value(key)
}

// AfterFunc lets package context follow a foreign context without a goroutine.
func (t *timeoutWriter) AfterFunc(f func()) (stop func() bool) {
	return context.AfterFunc(t.cancellable().Context, f)
}
