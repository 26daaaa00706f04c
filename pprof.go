// SPDX-License-Identifier: MIT

package conduit

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"runtime/pprof"
	"runtime/trace"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ProfilingConfig configures a [Profiler]. Negative numbers are errors.
type ProfilingConfig struct {
	// Allow alone decides which requests to serve. Many goroutines call it. nil
	// allows this machine only; see [Profiler].
	Allow func(*http.Request) bool

	// MaxDuration is the longest profile, 5 minutes by default. A request for more
	// gets 400, one without ?seconds= at most that.
	MaxDuration time.Duration

	// MutexFraction and BlockRate are for [runtime.SetMutexProfileFraction] and
	// [runtime.SetBlockProfileRate] until Close; 0 leaves the rate alone. A
	// BlockRate of 10,000 nanoseconds costs little.
	MutexFraction int
	BlockRate     int

	// FlightRecorder is how much of the past a trace in memory covers, for the
	// endpoint flight and [Profiler.SlowRequests]; 0: none. It takes about 10
	// MiB, which a busy program fills sooner. A process has one: another is an
	// error until that is closed.
	FlightRecorder time.Duration

	// DB is a pool to show in the statistics; nil: none.
	DB *sql.DB
}

func (c *ProfilingConfig) withDefaults() (ProfilingConfig, error) {
	var d ProfilingConfig
	if c != nil {
		d = *c
	}

	d.MaxDuration = cmp.Or(d.MaxDuration, 5*time.Minute)

	var errs errorList
	check := func(field string, value any, negative bool) {
		if negative {
			errs.add("%s: %v is negative", field, value)
		}
	}
	check("MaxDuration", d.MaxDuration, d.MaxDuration < 0)
	check("MutexFraction", d.MutexFraction, d.MutexFraction < 0)
	check("BlockRate", d.BlockRate, d.BlockRate < 0)
	check("FlightRecorder", d.FlightRecorder, d.FlightRecorder < 0)
	return d, errors.Join(errs...)
}

// EnableDefaultProfiling is [Profiler.Enable] of a [Profiler] with the
// defaults. It serves this machine only, which includes a proxy on it. Nothing
// needs closing.
func EnableDefaultProfiling(mux *http.ServeMux) {
	p, err := NewProfiler(nil)
	if err != nil {
		panic(err)
	}
	p.Enable(mux)
}

// Profiler serves the endpoints of [net/http/pprof], and more, at
// /debug/pprof/:
//
//	profile              CPU, for 30 seconds or ?seconds=
//	trace                execution trace, for 1 second or ?seconds=
//	heap allocs          memory; ?gc=1 collects garbage before heap
//	goroutine threadcreate, and every other profile of runtime/pprof
//	block mutex          waiting and contention
//	flight               the flight recorder's window, an execution trace
//	stats                RuntimeStats and more, in JSON or for Prometheus
//	live                 a page that plots the statistics
//	symbol cmdline       as in net/http/pprof
//
// Unlike net/http/pprof it registers nothing by itself.
//
// # Access
//
// Without Allow, a Profiler serves this machine only. The peer must be a
// loopback address or a Unix socket, the Host localhost or a loopback address
// (against DNS rebinding). It refuses HTTP/1.0, which nginx before 1.29.7
// speaks to upstreams by default, fields that proxies add, such as Forwarded,
// Via, X-Forwarded-* or X-Real-IP, and fetches by other sites' pages
// (Sec-Fetch-Site), except links. Refusals get 403 and the log line "profiling
// refused".
//
// That is not enough behind a proxy on the same machine: every peer is a
// loopback address, nginx from 1.29.7 on and haproxy add no field by default,
// and the Host may look local. Use a port that the proxy does not lead to
// ([NewProfilingServer]), set Allow, or have the proxy refuse /debug/. The
// users of one machine are not told apart.
//
// # Recording
//
// profile, trace, and block or mutex with ?seconds= outlive the timeouts from
// the start; seconds may be fractions. They end early, as a complete profile of
// a shorter time, when the request's context ends, the server drains, or a
// trace has 32 MiB. A second CPU profile or trace at the same time gets 409.
//
// ?seconds= turns the rate of block or mutex on for so long if it is off: for
// every contention, and all waiting from 10 microseconds on. The profile also
// has what was recorded before. Without a rate and ?seconds=, nothing new is
// recorded.
//
// Rates belong to the process. A recording keeps a mutex rate that the program
// has set, but turns off a block rate not set by BlockRate, since the runtime
// does not tell it. A mutex that goroutines have queued for without a break
// since before its rate was on is not seen.
//
// Other profiles show one moment, and refuse ?seconds= with 400. To see what
// changes in an interval, of block and mutex too, compare two with go tool
// pprof -base.
//
// Errors are text that go tool pprof shows. Caches may store no response.
type Profiler struct {
	config     ProfilingConfig
	standalone bool           // on a server of its own, whose connections are left out
	slow       sync.WaitGroup // goroutines that write a slow request's recording

	mu       sync.Mutex            // guards what follows, and the calls of flight's methods
	flight   *trace.FlightRecorder // nil without one, and after Close
	releases []func()              // of the rates
	slowLast time.Time             // when the last recording of a slow request started
	closed   bool
}

// NewProfiler returns a Profiler for cfg, sets its rates and starts its flight
// recorder.
func NewProfiler(cfg *ProfilingConfig) (*Profiler, error) {
	c, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}

	p := &Profiler{config: c}
	if c.FlightRecorder > 0 {
		p.flight = trace.NewFlightRecorder(trace.FlightRecorderConfig{MinAge: c.FlightRecorder})
		if err := p.flight.Start(); err != nil {
			return nil, fmt.Errorf("conduit: FlightRecorder: %w", err)
		}
	}

	if c.MutexFraction > 0 {
		p.releases = append(p.releases, mutexRate.hold(c.MutexFraction))
	}
	if c.BlockRate > 0 {
		p.releases = append(p.releases, blockRate.hold(c.BlockRate))
	}
	return p, nil
}

const profilingPath = "/debug/pprof/"

// Enable serves p on mux: GET /debug/pprof/, and POST for symbol. It panics if
// mux is nil or has these patterns.
func (p *Profiler) Enable(mux *http.ServeMux) {
	if mux == nil {
		panic("conduit: mux: is nil")
	}
	mux.Handle("GET "+profilingPath, p)
	mux.Handle("POST "+profilingPath+"symbol", p)
}

// Close stops the flight recorder, waits for a recording of
// [Profiler.SlowRequests], sets the mutex rate back and turns a BlockRate off.
// All else is served as before. Close returns nil, also when called again.
func (p *Profiler) Close() error {
	p.mu.Lock()
	p.closed = true // no slow request is recorded from here on
	p.mu.Unlock()
	p.slow.Wait()

	p.mu.Lock()
	defer p.mu.Unlock()
	for _, release := range p.releases {
		release()
	}
	p.releases = nil
	if p.flight != nil {
		p.flight.Stop()
		p.flight = nil
	}
	return nil
}

// ServeHTTP responds at and below /debug/pprof/, with any router. Methods other
// than GET and HEAD, and POST for symbol, get 405.
func (p *Profiler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h["X-Content-Type-Options"] = nosniffValue

	if reason := p.denyReason(r); reason != "" {
		Logger(r.Context()).Warn("profiling refused", "method", r.Method, "path", r.URL.Path, "remote", r.RemoteAddr, "err", reason)
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return
	}

	name := strings.TrimPrefix(r.URL.Path, profilingPath)
	if (name != "symbol" || r.Method != http.MethodPost) && !requireGetOrHead(w, r) {
		return
	}
	if name == "symbol" {
		serveSymbol(w, r) // whose query is no form
		return
	}

	q, err := p.parseQuery(r)
	if err != nil {
		profileError(w, http.StatusBadRequest, err.Error())
		return
	}
	p.serve(w, r, name, q)
}

// denyReason returns why a request is refused, "" if it is not.
func (p *Profiler) denyReason(r *http.Request) string {
	if p.config.Allow != nil {
		if p.config.Allow(r) {
			return ""
		}
		return "not allowed"
	}

	for field := range r.Header {
		if slices.Contains(forwardedFields, field) || strings.HasPrefix(field, "X-Forwarded") {
			return "forwarded: " + field
		}
	}
	switch {
	case !r.ProtoAtLeast(1, 1):
		return "forwarded: HTTP/1.0"
	case !isLocalPeer(r):
		return "not from this machine"
	case !isLocalHost(r.Host):
		return "foreign Host"
	case r.Header.Get("Sec-Fetch-Site") == "cross-site" && r.Header.Get("Sec-Fetch-User") != "?1":
		return "from a page of another site" // which cannot read the response, but can keep the program busy
	}
	return ""
}

// forwardedFields are fields that proxies add, beside X-Forwarded-*. It is
// never written to.
var forwardedFields = []string{"Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "True-Client-Ip", "Cf-Connecting-Ip"}

// isLocalPeer reports whether a request came from a loopback address or over a
// Unix socket. A RemoteAddr that a middleware has changed to an address without
// a port proves nothing.
func isLocalPeer(r *http.Request) bool {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && local.Network() == "unix" {
		return true
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().IsLoopback()
}

func isLocalHost(host string) bool {
	name := (&url.URL{Host: host}).Hostname() // without port and brackets
	addr, err := netip.ParseAddr(name)
	return err == nil && addr.IsLoopback() || strings.EqualFold(strings.TrimSuffix(name, "."), "localhost")
}

// profileError responds with a text that go tool pprof shows.
func profileError(w http.ResponseWriter, status int, text string) {
	h := w.Header()
	h.Del("Content-Disposition")
	h.Set("X-Go-Pprof", "1")
	http.Error(w, text, status)
}

func (p *Profiler) serve(w http.ResponseWriter, r *http.Request, name string, q profilingQuery) {
	switch name {
	case "":
		servePage(w, indexPage)
	case "live":
		servePage(w, livePage)
	case "stats":
		p.serveStats(w, r)
	case "cmdline":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, strings.Join(os.Args, "\x00"))
	case "profile":
		q.seconds = cmp.Or(q.seconds, min(30*time.Second, p.config.MaxDuration))
		record(w, r, name, q, func(to io.Writer) (func() error, error) {
			return func() error { pprof.StopCPUProfile(); return nil }, pprof.StartCPUProfile(to)
		})
	case "trace":
		q.seconds = cmp.Or(q.seconds, min(time.Second, p.config.MaxDuration))
		record(w, r, name, q, func(to io.Writer) (func() error, error) {
			return func() error { trace.Stop(); return nil }, trace.Start(to)
		})
	case "flight":
		body, err := p.snapshot()
		if err != nil {
			profileError(w, http.StatusBadRequest, "flight: "+err.Error())
			return
		}
		setProfileHeader(w, name, 0)
		sendProfile(w, r, body)
	default:
		serveProfile(w, r, name, q)
	}
}

// profilingQuery is what the parameters of a request ask for.
type profilingQuery struct {
	seconds time.Duration // 0 if it is not given
	debug   int           // 0 is the format of go tool pprof, all others are text
	gc      bool
}

func (p *Profiler) parseQuery(r *http.Request) (q profilingQuery, err error) {
	form, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return q, err
	}
	if text := form.Get("seconds"); text != "" {
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil || !(seconds > 0) { // nor NaN
			return q, fmt.Errorf("seconds: %q is not a positive number", text)
		}
		if most := p.config.MaxDuration; seconds > most.Seconds() {
			return q, fmt.Errorf("seconds: %s is more than %v, the longest allowed", text, most)
		}
		q.seconds = max(time.Duration(seconds*float64(time.Second)), 1)
	}
	if text := form.Get("debug"); text != "" {
		if q.debug, err = strconv.Atoi(text); err != nil {
			return q, fmt.Errorf("debug: %q is not a number", text)
		}
	}
	q.gc = form.Get("gc") != "" && form.Get("gc") != "0"
	return q, nil
}

// serveProfile responds with a profile of the runtime's or the program's.
func serveProfile(w http.ResponseWriter, r *http.Request, name string, q profilingQuery) {
	profile := pprof.Lookup(name)
	if profile == nil {
		profileError(w, http.StatusNotFound, fmt.Sprintf("unknown profile %q", name))
		return
	}
	if q.seconds > 0 {
		rate := map[string]*samplingRate{"block": &blockRate, "mutex": &mutexRate}[name]
		if rate == nil {
			profileError(w, http.StatusBadRequest, name+" shows a moment, and ?seconds= is not supported: compare two of them with go tool pprof -base")
			return
		}
		record(w, r, name, q, func(to io.Writer) (func() error, error) {
			release := rate.hold(0)
			return func() error {
				defer release() // after WriteTo, which scales the profile by the rate
				return profile.WriteTo(to, q.debug)
			}, nil
		})
		return
	}

	if q.gc && name == "heap" {
		runtime.GC()
	}

	var body bytes.Buffer
	if err := profile.WriteTo(&body, q.debug); err != nil {
		profileError(w, http.StatusInternalServerError, name+": "+err.Error())
		return
	}
	setProfileHeader(w, name, q.debug)
	sendProfile(w, r, body.Bytes())
}

// samplingRate is one of the runtime's two rates, which belong to the process.
// Each Profiler and each recording holds it; the last to come of those that
// still hold it decides. For example, a recording takes the rate 3 of a
// Profiler. The rate is 3 until both have released it, in either order; then it
// is what it was before both.
type samplingRate struct {
	set      func(int)
	get      func() int // 0 if the runtime does not tell
	onDemand int        // for a recording, if the rate is off

	mu    sync.Mutex // guards rates
	rates []*int     // the first is the rate before anybody held it, the last is on
}

var (
	mutexRate = samplingRate{
		set:      func(rate int) { runtime.SetMutexProfileFraction(rate) },
		get:      func() int { return runtime.SetMutexProfileFraction(-1) },
		onDemand: 1,
	}
	blockRate = samplingRate{set: runtime.SetBlockProfileRate, get: func() int { return 0 }, onDemand: 10_000}
)

// hold sets the rate until release is called. 0 means the rate that is on, or
// onDemand if it is off.
func (s *samplingRate) hold(rate int) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()

	if len(s.rates) <= 1 {
		before := s.get()
		s.rates = []*int{&before}
	}
	rate = cmp.Or(rate, *s.rates[len(s.rates)-1], s.onDemand)
	s.rates = append(s.rates, &rate)
	s.set(rate)

	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.rates = slices.DeleteFunc(s.rates, func(held *int) bool { return held == &rate })
		s.set(*s.rates[len(s.rates)-1])
	}
}

// record responds with what start records for q.seconds. It records in memory
// and sends the whole: a slow client would hold up the flight recorder, which
// shares a goroutine of the runtime with a trace.
func record(w http.ResponseWriter, r *http.Request, name string, q profilingQuery, start func(to io.Writer) (stop func() error, err error)) {
	setProfileHeader(w, name, q.debug)
	if r.Method == http.MethodHead || !releaseTimeout(w) {
		return
	}

	rollingDeadline{w, writeAllowance}.clear()

	enough, cancel := context.WithTimeout(context.Background(), q.seconds)
	defer cancel()
	body := recordingBuffer{full: cancel}
	stop, err := start(&body)
	if err != nil {
		profileError(w, http.StatusConflict, name+": "+err.Error())
		return
	}

	select {
	case <-enough.Done():
	case <-Draining(r.Context()):
	case <-r.Context().Done():
	}

	if err := stop(); err != nil {
		profileError(w, http.StatusInternalServerError, name+": "+err.Error())
		return
	}
	sendProfile(w, r, body.Bytes())
}

// maxRecording is the size at which a recording ends.
const maxRecording = 32 << 20

// recordingBuffer calls full once it holds more than maxRecording.
type recordingBuffer struct {
	bytes.Buffer
	full func()
}

func (b *recordingBuffer) Write(p []byte) (int, error) {
	n, err := b.Buffer.Write(p)
	if b.Len() > maxRecording {
		b.full()
	}
	return n, err
}

func setProfileHeader(w http.ResponseWriter, name string, debug int) {
	h := w.Header()
	if debug != 0 {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		return
	}
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", "attachment; filename="+strconv.Quote(name))
}

// sendProfile responds with what is in memory, which may take longer than the
// server's WriteTimeout.
func sendProfile(w http.ResponseWriter, r *http.Request, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodHead || !releaseTimeout(w) {
		return
	}
	if _, err := (rollingDeadline{w, writeAllowance}).write(body); err != nil {
		abortResponseOrPanic(w, r)
	}
}

// serveSymbol names the functions at the program counters of a query or body.
func serveSymbol(w http.ResponseWriter, r *http.Request) {
	text := r.URL.RawQuery
	if r.Method == http.MethodPost {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			profileError(w, http.StatusRequestEntityTooLarge, "symbol: "+err.Error())
			return
		}
		text = string(body)
	}

	response := []byte("num_symbols: 1\n") // or any other number but 0
	for word := range strings.SplitSeq(text, "+") {
		pc, err := strconv.ParseUint(strings.TrimSpace(word), 0, 64)
		if f := runtime.FuncForPC(uintptr(pc)); err == nil && f != nil {
			response = fmt.Appendf(response, "%#x %s\n", pc, f.Name())
		}
	}

	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	sendProfile(w, r, response)
}

// snapshot copies the flight recorder's window to memory.
func (p *Profiler) snapshot() ([]byte, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.flight == nil {
		return nil, errors.New("no flight recorder runs: set ProfilingConfig.FlightRecorder")
	}
	var body bytes.Buffer
	_, err := p.flight.WriteTo(&body)
	return body.Bytes(), err
}

const (
	slowPause = time.Minute // from one recording to the next
	slowKept  = 10          // recordings
)

// SlowRequests writes the flight recorder's window, for go tool trace, to a
// file in dir when a request took threshold or longer: what the whole process
// did until then. It writes at most one a minute, and keeps the newest ten. The
// name, slow-20060102T150405.000Z-ID.trace, has the time and the request's id,
// and is in the log line "slow request recorded".
//
// A request ends when its handler returns, its connection is hijacked, or a
// stream or a file of a [FileServer] sends its first byte. No request waits for
// the file; [Profiler.Close] does: call it in a hook of the shutdown.
//
// Put SlowRequests inside [RequestID], for the id, and outside [Timeout], which
// ends a request too. It panics if FlightRecorder is not set, threshold not
// positive or dir no directory.
func (p *Profiler) SlowRequests(threshold time.Duration, dir string) Middleware {
	var errs errorList
	if p.config.FlightRecorder == 0 {
		errs.add("FlightRecorder: SlowRequests needs one")
	}
	if threshold <= 0 {
		errs.add("threshold: %v is not positive", threshold)
	}
	if _, err := os.ReadDir(dir); err != nil {
		errs.add("dir: %w", err)
	}
	if err := errors.Join(errs...); err != nil {
		panic(err)
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s := &slowWriter{
				responseWriter: responseWriterOf(w, r), profiler: p, threshold: threshold, dir: dir,
				request: r, path: r.URL.Path, start: time.Now(),
			}
			defer s.endRequest()
			next.ServeHTTP(s, r)
		})
	}
}

// slowWriter is the ResponseWriter that SlowRequests gives to the handler. It
// sees when a request ends.
type slowWriter struct {
	*responseWriter
	profiler  *Profiler
	threshold time.Duration
	dir       string
	request   *http.Request
	path      string // a handler may change that of the request
	start     time.Time
	ended     atomic.Bool
}

func (s *slowWriter) Unwrap() http.ResponseWriter { return s.responseWriter }

// releaseTimeout is called by the function releaseTimeout in conduit.go, just
// before the first byte of a response that outlives a timeout by nature.
func (s *slowWriter) releaseTimeout() bool {
	s.endRequest()
	return true
}

func (s *slowWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := s.responseWriter.Hijack()
	if err == nil {
		s.endRequest()
	}
	return conn, buf, err
}

// endRequest has the request recorded if it was slow. Only the first call
// counts.
func (s *slowWriter) endRequest() {
	took := time.Since(s.start)
	if s.ended.Swap(true) || took < s.threshold || !s.profiler.claimSlow() {
		return
	}

	ctx, r := s.request.Context(), s.request
	logger := Logger(ctx).With("method", r.Method, "path", s.path, "pattern", r.Pattern, "duration", took)
	name := "slow-" + time.Now().UTC().Format("20060102T150405.000Z")
	if id := RequestIDFrom(ctx); id != "" {
		name += "-" + id // RequestID lets only characters through that a name may have
	}
	go s.profiler.recordSlow(logger, s.dir, name+".trace")
}

// claimSlow reports whether recordSlow is to be called now. It is false while a
// snapshot is taken: no request waits for that.
func (p *Profiler) claimSlow() bool {
	if !p.mu.TryLock() {
		return false
	}
	defer p.mu.Unlock()

	now := time.Now()
	if p.closed || now.Sub(p.slowLast) < slowPause {
		return false
	}
	p.slowLast = now
	p.slow.Add(1)
	return true
}

// recordSlow writes a recording. The file gets its name once it is whole, and
// only the owner may read it. The names sort by time.
func (p *Profiler) recordSlow(logger *slog.Logger, dir, name string) {
	defer p.slow.Done()
	file := filepath.Join(dir, name)
	part := file + ".part"
	body, err := p.snapshot()
	if err == nil {
		err = os.WriteFile(part, body, 0o600)
	}
	if err == nil {
		err = os.Rename(part, file)
	}

	if err != nil {
		os.Remove(part)
		logger.Error("slow request not recorded", "err", err)
		return
	}
	logger.Warn("slow request recorded", "file", file)

	names, _ := fs.Glob(os.DirFS(dir), "slow-*.trace")
	for _, old := range names[:max(len(names)-slowKept, 0)] {
		os.Remove(filepath.Join(dir, old))
	}
}

// NewProfilingServer returns a server for a Profiler alone. It has no
// WriteTimeout, and logs to [slog.Default]. Shut it down or close it, even if
// it never served, to close the Profiler.
//
// An addr without a host, ":6060", is 127.0.0.1. At another, such as
// "0.0.0.0:6060", other machines get 403 unless Allow lets them in. Its
// statistics leave out connections and requests.
func NewProfilingServer(addr string, cfg *ProfilingConfig) (*Server, error) {
	mux := http.NewServeMux()
	host, port, err := net.SplitHostPort(addr)
	var srv *Server
	if err == nil {
		srv, err = New(&Config{Address: net.JoinHostPort(cmp.Or(host, "127.0.0.1"), port), Handler: mux, WriteTimeout: -1})
	}
	if err != nil {
		_, cfgErr := cfg.withDefaults()
		return nil, errors.Join(fmt.Errorf("conduit: addr: %w", err), cfgErr)
	}

	p, err := NewProfiler(cfg)
	if err != nil {
		return nil, err
	}
	p.standalone = true
	p.Enable(mux)
	srv.onStopped = func() { p.Close() }
	return srv, nil
}

// RuntimeStats is the state of the process, from [runtime/metrics]. Totals are
// since the start. Percentiles are upper bounds of a histogram's buckets since
// then.
type RuntimeStats struct {
	GoVersion     string  `json:"go_version"`
	UptimeSeconds float64 `json:"uptime_seconds"`
	GOMAXPROCS    uint64  `json:"gomaxprocs"`
	Goroutines    uint64  `json:"goroutines"`

	// HeapBytes is the memory of objects in use or not yet swept, HeapLiveBytes of
	// those in use at the last collection. The next is to end at HeapGoalBytes.
	HeapBytes     uint64 `json:"heap_bytes"`
	HeapLiveBytes uint64 `json:"heap_live_bytes"`
	HeapGoalBytes uint64 `json:"heap_goal_bytes"`
	HeapObjects   uint64 `json:"heap_objects"`
	StackBytes    uint64 `json:"stack_bytes"`

	// MemoryBytes is what the runtime holds from the system.
	MemoryBytes         uint64 `json:"memory_bytes"`
	AllocatedBytesTotal uint64 `json:"allocated_bytes_total"`

	GCCyclesTotal uint64 `json:"gc_cycles_total"`

	// GCPausesTotal counts stops of the world for collection, usually two a cycle,
	// GCPauseSecondsTotal their time, an estimate from the histogram.
	GCPausesTotal       uint64  `json:"gc_pauses_total"`
	GCPauseSecondsTotal float64 `json:"gc_pause_seconds_total"`
	GCPauseP50Seconds   float64 `json:"gc_pause_p50_seconds"`
	GCPauseP99Seconds   float64 `json:"gc_pause_p99_seconds"`

	// The scheduler's latency is how long runnable goroutines waited.
	SchedulerLatencyP50Seconds float64 `json:"scheduler_latency_p50_seconds"`
	SchedulerLatencyP99Seconds float64 `json:"scheduler_latency_p99_seconds"`

	// MutexWaitSecondsTotal is for sync.Mutex, sync.RWMutex and locks of the
	// runtime.
	MutexWaitSecondsTotal float64 `json:"mutex_wait_seconds_total"`

	// Processor time of the program's code and of collection, estimated at the end
	// of each collection: at least every two minutes unless off. It is 0 before the
	// first.
	CPUUserSecondsTotal float64 `json:"cpu_user_seconds_total"`
	CPUGCSecondsTotal   float64 `json:"cpu_gc_seconds_total"`
}

// ReadRuntimeStats reads the statistics in a few microseconds, without
// allocation and without stopping the world.
//
// The endpoint stats adds connections and requests of the [Server] it is asked
// through, the pool of ProfilingConfig.DB, and on Linux the process's processor
// time, memory and file descriptors. Prometheus gets them under the names of
// its Go client, with all of its go_memstats, and histograms of collection
// pauses and scheduling latency.
func ReadRuntimeStats() RuntimeStats {
	m := readRuntime()
	defer runtimeReadings.Put(m)
	return m.stats()
}

// processStart is when the package was initialized, before main.
var processStart = time.Now()

// runtimeReading has a sample of each metric in runtimeFamilies, sorted by
// name.
type runtimeReading struct{ samples []metrics.Sample }

// runtimeReadings holds *runtimeReading, whose histograms are used again.
var runtimeReadings = sync.Pool{New: func() any {
	var names []string
	for _, f := range runtimeFamilies {
		names = append(names, strings.Fields(f.metrics)...)
	}
	slices.Sort(names)
	m := new(runtimeReading)
	for _, name := range slices.Compact(names) {
		m.samples = append(m.samples, metrics.Sample{Name: name})
	}
	return m
}}

// readRuntime returns what the runtime says now. The caller puts it back into
// runtimeReadings.
func readRuntime() *runtimeReading {
	m := runtimeReadings.Get().(*runtimeReading)
	metrics.Read(m.samples)
	return m
}

func (m *runtimeReading) value(name string) metrics.Value {
	i, _ := slices.BinarySearchFunc(m.samples, name, func(s metrics.Sample, name string) int { return strings.Compare(s.Name, name) })
	return m.samples[i].Value
}

// number returns a metric, 0 if this version of Go does not have it.
func (m *runtimeReading) number(name string) float64 {
	switch v := m.value(name); v.Kind() {
	case metrics.KindUint64:
		return float64(v.Uint64())
	case metrics.KindFloat64:
		return v.Float64()
	}
	return 0
}

// histogram returns a metric, an empty one if this version of Go does not have
// it.
func (m *runtimeReading) histogram(name string) *metrics.Float64Histogram {
	if v := m.value(name); v.Kind() == metrics.KindFloat64Histogram {
		return v.Float64Histogram()
	}
	return &metrics.Float64Histogram{}
}

func (m *runtimeReading) stats() RuntimeStats {
	pauses, pauseSeconds, pauseP50, pauseP99 := summarize(m.histogram("/sched/pauses/total/gc:seconds"))
	_, _, latencyP50, latencyP99 := summarize(m.histogram("/sched/latencies:seconds"))
	return RuntimeStats{
		GoVersion:                  runtime.Version(),
		UptimeSeconds:              time.Since(processStart).Seconds(),
		GOMAXPROCS:                 uint64(m.number("/sched/gomaxprocs:threads")),
		Goroutines:                 uint64(m.number("/sched/goroutines:goroutines")),
		HeapBytes:                  uint64(m.number("/memory/classes/heap/objects:bytes")),
		HeapLiveBytes:              uint64(m.number("/gc/heap/live:bytes")),
		HeapGoalBytes:              uint64(m.number("/gc/heap/goal:bytes")),
		HeapObjects:                uint64(m.number("/gc/heap/objects:objects")),
		StackBytes:                 uint64(m.number("/memory/classes/heap/stacks:bytes")),
		MemoryBytes:                uint64(m.number("/memory/classes/total:bytes") - m.number("/memory/classes/heap/released:bytes")),
		AllocatedBytesTotal:        uint64(m.number("/gc/heap/allocs:bytes")),
		GCCyclesTotal:              uint64(m.number("/gc/cycles/total:gc-cycles")),
		GCPausesTotal:              pauses,
		GCPauseSecondsTotal:        pauseSeconds,
		GCPauseP50Seconds:          pauseP50,
		GCPauseP99Seconds:          pauseP99,
		SchedulerLatencyP50Seconds: latencyP50,
		SchedulerLatencyP99Seconds: latencyP99,
		MutexWaitSecondsTotal:      m.number("/sync/mutex/wait/total:seconds"),
		CPUUserSecondsTotal:        m.number("/cpu/classes/user:cpu-seconds"),
		CPUGCSecondsTotal:          m.number("/cpu/classes/gc/total:cpu-seconds"),
	}
}

// summarize returns how many durations a histogram has, an estimate of their
// sum, and the upper bounds of the buckets with the median and the 99th
// percentile.
func summarize(h *metrics.Float64Histogram) (count uint64, sum, p50, p99 float64) {
	for _, n := range h.Counts {
		count += n
	}
	below := uint64(0)
	for i, n := range h.Counts {
		if n == 0 {
			continue
		}
		low, high := max(h.Buckets[i], 0), h.Buckets[i+1]
		if math.IsInf(high, 1) {
			high = low
		}
		sum += float64(n) * (low + high) / 2
		below += n
		if p50 == 0 && below*2 >= count {
			p50 = high
		}
		if p99 == 0 && below*100 >= count*99 {
			p99 = high
		}
	}
	return count, sum, p50, p99
}

// profilerStats is the response of the endpoint stats.
type profilerStats struct {
	RuntimeStats
	Process  statistics `json:"process,omitempty"`
	Server   statistics `json:"server,omitempty"`
	Database statistics `json:"database,omitempty"`
}

// statistics are numbers with their names in JSON and for Prometheus.
type statistics []struct {
	key, name, kind, help string
	value                 float64
}

func (s statistics) MarshalJSON() ([]byte, error) {
	object := make(map[string]float64)
	for _, n := range s {
		object[n.key] = n.value
	}
	return json.Marshal(object)
}

// readProcess returns the process's statistics from /proc, nil on a system
// without it. The fields of stat are those of proc_pid_stat(5). Linux counts
// 100 clock ticks a second there, on every processor that Go runs on.
func readProcess() statistics {
	stat, err := os.ReadFile("/proc/self/stat")
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:])) // the program's name may have spaces
	if err != nil || len(fields) < 22 {
		return nil
	}

	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil
	}
	defer dir.Close()

	fds, _ := dir.Readdirnames(-1) // os.ReadDir would sort them, and there may be 10,000
	field := func(number int) float64 {
		v, _ := strconv.ParseFloat(fields[number-3], 64) // fields starts after pid and name
		return v
	}
	return statistics{
		{"cpu_seconds_total", "process_cpu_seconds_total", "counter", "Processor time of the process.", (field(14) + field(15)) / 100},
		{"virtual_bytes", "process_virtual_memory_bytes", "gauge", "Address space of the process.", field(23)},
		{"resident_bytes", "process_resident_memory_bytes", "gauge", "Memory of the process.", field(24) * float64(os.Getpagesize())},
		{"open_fds", "process_open_fds", "gauge", "File descriptors that are open.", float64(len(fds) - 1)}, // without dir
	}
}

func serverStatistics(s *Server) statistics {
	return statistics{
		{"connections", "conduit_open_connections", "gauge", "Connections that are open.", float64(s.conns.Load())},
		{"requests", "conduit_requests_in_flight", "gauge", "Requests whose handler runs, without this one.", float64(s.requests.Load() - 1)},
	}
}

func databaseStatistics(d sql.DBStats) statistics {
	return statistics{
		{"max_open", "go_sql_max_open_connections", "gauge", "Most connections to the database, 0 for no limit.", float64(d.MaxOpenConnections)},
		{"open", "go_sql_open_connections", "gauge", "Connections to the database.", float64(d.OpenConnections)},
		{"in_use", "go_sql_in_use_connections", "gauge", "Connections to the database in use.", float64(d.InUse)},
		{"idle", "go_sql_idle_connections", "gauge", "Connections to the database not in use.", float64(d.Idle)},
		{"waits_total", "go_sql_wait_count_total", "counter", "Times that a connection was waited for.", float64(d.WaitCount)},
		{"wait_seconds_total", "go_sql_wait_duration_seconds_total", "counter", "Time that connections were waited for.", d.WaitDuration.Seconds()},
		{"max_idle_closed_total", "go_sql_max_idle_closed_total", "counter", "Connections closed because of MaxIdleConns.", float64(d.MaxIdleClosed)},
		{"max_idle_time_closed_total", "go_sql_max_idle_time_closed_total", "counter", "Connections closed because of ConnMaxIdleTime.", float64(d.MaxIdleTimeClosed)},
		{"max_lifetime_closed_total", "go_sql_max_lifetime_closed_total", "counter", "Connections closed because of ConnMaxLifetime.", float64(d.MaxLifetimeClosed)},
	}
}

// serveStats responds in JSON, or for Prometheus if the format or the Accept
// field asks for it. The Accept of Prometheus has application/openmetrics-text
// or begins with text/plain. Other clients that accept text/plain prefer
// something else.
func (p *Profiler) serveStats(w http.ResponseWriter, r *http.Request) {
	addVary(w.Header(), "Accept")
	format, accept := r.URL.Query().Get("format"), strings.ToLower(r.Header.Get("Accept"))
	if format == "" && (strings.HasPrefix(accept, "text/plain") || strings.Contains(accept, "application/openmetrics-text")) {
		format = "prometheus"
	}

	m := readRuntime()
	defer runtimeReadings.Put(m)
	stats := profilerStats{RuntimeStats: m.stats(), Process: readProcess()}
	if s := serverFrom(r.Context()); s != nil && !p.standalone {
		stats.Server = serverStatistics(s)
	}
	if p.config.DB != nil {
		stats.Database = databaseStatistics(p.config.DB.Stats())
	}

	switch format {
	case "prometheus":
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Write(stats.exposition(m))
	case "", "json":
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(&stats)
	default:
		profileError(w, http.StatusBadRequest, fmt.Sprintf("format: %q is not json or prometheus", format))
	}
}

// runtimeFamilies are the metrics for Prometheus: each has one metric of
// [runtime/metrics], or several to add up. They include all that RuntimeStats
// needs. It is never written to.
var runtimeFamilies = []struct{ name, kind, metrics, help string }{
	{"go_goroutines", "gauge", "/sched/goroutines:goroutines", "Goroutines that exist."},
	{"go_threads", "gauge", "/sched/threads/total:threads", "Threads of the operating system that exist."},
	{"go_sched_gomaxprocs_threads", "gauge", "/sched/gomaxprocs:threads", "Threads that may run Go code at the same time."},
	{"go_gc_gogc_percent", "gauge", "/gc/gogc:percent", "GOGC."},
	{"go_gc_gomemlimit_bytes", "gauge", "/gc/gomemlimit:bytes", "GOMEMLIMIT."},
	{"go_gc_heap_live_bytes", "gauge", "/gc/heap/live:bytes", "Heap that the last collection found in use."},
	{"go_gc_cycles_total_gc_cycles_total", "counter", "/gc/cycles/total:gc-cycles", "Collections."},
	{"go_memstats_alloc_bytes", "gauge", "/memory/classes/heap/objects:bytes", "Heap of objects in use or not yet swept."},
	{"go_memstats_alloc_bytes_total", "counter", "/gc/heap/allocs:bytes", "Heap allocated since the start."},
	{"go_memstats_mallocs_total", "counter", "/gc/heap/allocs:objects /gc/heap/tiny/allocs:objects", "Objects allocated since the start."},
	{"go_memstats_frees_total", "counter", "/gc/heap/frees:objects /gc/heap/tiny/allocs:objects", "Objects freed since the start."},
	{"go_memstats_sys_bytes", "gauge", "/memory/classes/total:bytes", "Memory from the system."},
	{"go_memstats_heap_alloc_bytes", "gauge", "/memory/classes/heap/objects:bytes", "Heap of objects in use or not yet swept."},
	{"go_memstats_heap_sys_bytes", "gauge", "/memory/classes/heap/objects:bytes /memory/classes/heap/unused:bytes /memory/classes/heap/free:bytes /memory/classes/heap/released:bytes", "Heap from the system."},
	{"go_memstats_heap_inuse_bytes", "gauge", "/memory/classes/heap/objects:bytes /memory/classes/heap/unused:bytes", "Heap spans in use."},
	{"go_memstats_heap_idle_bytes", "gauge", "/memory/classes/heap/free:bytes /memory/classes/heap/released:bytes", "Heap spans not in use."},
	{"go_memstats_heap_released_bytes", "gauge", "/memory/classes/heap/released:bytes", "Heap given back to the system."},
	{"go_memstats_heap_objects", "gauge", "/gc/heap/objects:objects", "Objects on the heap."},
	{"go_memstats_next_gc_bytes", "gauge", "/gc/heap/goal:bytes", "Heap at which the next collection is to end."},
	{"go_memstats_stack_inuse_bytes", "gauge", "/memory/classes/heap/stacks:bytes", "Stacks of goroutines."},
	{"go_memstats_stack_sys_bytes", "gauge", "/memory/classes/heap/stacks:bytes /memory/classes/os-stacks:bytes", "Stacks of goroutines and threads."},
	{"go_memstats_mspan_inuse_bytes", "gauge", "/memory/classes/metadata/mspan/inuse:bytes", "The runtime's mspans in use."},
	{"go_memstats_mspan_sys_bytes", "gauge", "/memory/classes/metadata/mspan/inuse:bytes /memory/classes/metadata/mspan/free:bytes", "The runtime's mspans."},
	{"go_memstats_mcache_inuse_bytes", "gauge", "/memory/classes/metadata/mcache/inuse:bytes", "The runtime's mcaches in use."},
	{"go_memstats_mcache_sys_bytes", "gauge", "/memory/classes/metadata/mcache/inuse:bytes /memory/classes/metadata/mcache/free:bytes", "The runtime's mcaches."},
	{"go_memstats_buck_hash_sys_bytes", "gauge", "/memory/classes/profiling/buckets:bytes", "Tables of the profiles."},
	{"go_memstats_gc_sys_bytes", "gauge", "/memory/classes/metadata/other:bytes", "The runtime's other metadata."},
	{"go_memstats_other_sys_bytes", "gauge", "/memory/classes/other:bytes", "All else that the runtime has from the system."},
	{"go_cpu_classes_user_cpu_seconds_total", "counter", "/cpu/classes/user:cpu-seconds", "Processor time of the program's code, an estimate as of the last collection."},
	{"go_cpu_classes_gc_total_cpu_seconds_total", "counter", "/cpu/classes/gc/total:cpu-seconds", "Processor time of collections, an estimate as of the last one."},
	{"go_sync_mutex_wait_total_seconds_total", "counter", "/sync/mutex/wait/total:seconds", "Time that goroutines waited for locks."},
	{"go_gc_pauses_seconds", "histogram", "/sched/pauses/total/gc:seconds", "Pauses of the program for collections."},
	{"go_sched_pauses_total_gc_seconds", "histogram", "/sched/pauses/total/gc:seconds", "Pauses of the program for collections."},
	{"go_sched_latencies_seconds", "histogram", "/sched/latencies:seconds", "Time that goroutines which could run had to wait."},
}

// exposition returns the statistics in [Prometheus' text format].
//
// [Prometheus' text format]: https://prometheus.io/docs/instrumenting/exposition_formats/
func (s *profilerStats) exposition(m *runtimeReading) []byte {
	e := make(exposition, 0, 16<<10)
	e.add(fmt.Sprintf("go_info{version=%q}", s.GoVersion), "gauge", "Version of Go.", 1)
	e.add("process_start_time_seconds", "gauge", "Start of the process, in Unix time.", float64(processStart.UnixMilli())/1e3)
	for _, f := range runtimeFamilies {
		if f.kind == "histogram" {
			e.addHistogram(f.name, f.help, m.histogram(f.metrics))
			continue
		}
		sum := 0.0
		for name := range strings.FieldsSeq(f.metrics) {
			sum += m.number(name)
		}
		e.add(f.name, f.kind, f.help, sum)
	}
	e.addCollections()
	for _, n := range slices.Concat(s.Process, s.Server, s.Database) {
		e.add(n.name, n.kind, n.help, n.value)
	}
	return e
}

// exposition is a text in Prometheus' format.
type exposition []byte

// add adds a metric with one sample, which may have labels.
func (e *exposition) add(sample, kind, help string, v float64) {
	name, _, _ := strings.Cut(sample, "{")
	e.head(name, kind, help)
	e.sample(sample, v)
}

func (e *exposition) head(name, kind, help string) {
	*e = fmt.Appendf(*e, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

func (e *exposition) sample(sample string, v float64) { *e = fmt.Appendf(*e, "%s %v\n", sample, v) }

// addHistogram adds a histogram with a bucket for each power of ten of seconds.
// A value counts where the runtime's finer bucket ends.
func (e *exposition) addHistogram(name, help string, h *metrics.Float64Histogram) {
	e.head(name, "histogram", help)
	count, sum, _, _ := summarize(h)
	i, below := 0, uint64(0)
	for _, bound := range []float64{1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1} {
		for ; i < len(h.Counts) && h.Buckets[i+1] <= bound; i++ {
			below += h.Counts[i]
		}
		e.sample(fmt.Sprintf("%s_bucket{le=\"%v\"}", name, bound), float64(below))
	}
	e.sample(name+`_bucket{le="+Inf"}`, float64(count))
	e.sample(name+"_sum", sum)
	e.sample(name+"_count", float64(count))
}

// addCollections adds the numbers that only [debug.ReadGCStats] has: the pauses
// of the last 256 collections, and the time of the last one.
func (e *exposition) addCollections() {
	gc := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&gc)
	e.add("go_memstats_last_gc_time_seconds", "gauge", "Time of the last collection, in Unix time.", float64(gc.LastGC.UnixMilli())/1e3)
	e.head("go_gc_duration_seconds", "summary", "Pause of the program in a collection.")
	for i, pause := range gc.PauseQuantiles {
		e.sample(fmt.Sprintf("go_gc_duration_seconds{quantile=\"%v\"}", float64(i)/4), pause.Seconds())
	}
	e.sample("go_gc_duration_seconds_sum", gc.PauseTotal.Seconds())
	e.sample("go_gc_duration_seconds_count", float64(gc.NumGC))
}

// servePage sends one of the two pages. They need nothing else, and their
// policy forbids everything else.
func servePage(w http.ResponseWriter, page string) {
	var others strings.Builder
	for _, profile := range pprof.Profiles() {
		href := (&url.URL{Path: profile.Name()}).String() // a name may have slashes, and more
		if link := fmt.Sprintf("<li><a href=\"%s?debug=1\">%s</a>", html.EscapeString(href), html.EscapeString(profile.Name())); !strings.Contains(page, link) {
			fmt.Fprintf(&others, "%s (%d)\n", link, profile.Count())
		}
	}

	nonce := rand.Text()
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-"+nonce+"'; "+
		"style-src 'nonce-"+nonce+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	io.WriteString(w, strings.NewReplacer("NONCE", nonce, "OTHERS", others.String()).Replace(page))
}

const pageHead = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --line: light-dark(#06c, #6af); --soft: light-dark(#666, #999); --edge: light-dark(#ddd, #333) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; background: light-dark(#fff, #121212); color: light-dark(#111, #eee) }
a { color: var(--line) }
#charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
figure:not([hidden]) { margin: 0; padding: .8rem; border: 1px solid var(--edge); border-radius: .5rem; display: grid; grid-template-columns: auto 1fr; align-content: start; gap: .6rem }
figcaption { grid-column: 1 / -1; display: flex; gap: 1rem; font-size: .9rem; font-variant-numeric: tabular-nums }
figcaption b { flex: 1 }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem; line-height: 0 }
.y { flex-direction: column; text-align: right }
.x { grid-column: 2; line-height: 1 }
svg { width: 100%; height: 6rem; overflow: visible }
path { fill: none; stroke: var(--edge); vector-effect: non-scaling-stroke; stroke-linejoin: round }
.line { color: var(--line); stroke: var(--line); stroke-width: 2 }
.line + .line { color: var(--soft); stroke: var(--soft); stroke-dasharray: 4 3 }
.failing #state { color: light-dark(#b00020, #ff8a80); font-weight: bold }
.failing figure { opacity: .5 }
</style>
`

const pageProfiles = `<ul>
<li><a href="profile?seconds=30">profile</a> where the processors' time goes, recorded for 30 seconds
<li><a href="trace?seconds=1">trace</a> all that goroutines do, recorded for a second, for <code>go tool trace</code>
<li><a href="heap?debug=1">heap</a> memory in use
<li><a href="allocs?debug=1">allocs</a> all memory allocated since the start
<li><a href="goroutine?debug=1">goroutine</a> where goroutines are, also <a href="goroutine?debug=2">one by one</a>
<li><a href="block?debug=1">block</a> where goroutines wait; <a href="block?seconds=10&amp;debug=1">record 10 seconds</a>, which adds to what was recorded before
<li><a href="mutex?debug=1">mutex</a> who holds mutexes that others wait for; <a href="mutex?seconds=10&amp;debug=1">record 10 seconds</a>, which adds to what was recorded before
<li><a href="threadcreate?debug=1">threadcreate</a> where threads were created
OTHERS<li><a href="flight">flight</a> the flight recorder's window, for <code>go tool trace</code>
<li><a href="stats">stats</a> numbers, also <a href="stats?format=prometheus">for Prometheus</a>
<li><a href="cmdline">cmdline</a> how the program was started
</ul>
<p>Links with <code>debug=</code> show text. Without it they are for <code>go tool pprof</code>. block and mutex only ever add up, and heap, allocs and goroutine show one moment. To see what changes in an interval, fetch two of a kind and compare them: <code>go tool pprof -base first second</code>.</p>
`

const indexPage = pageHead + `<title>Profiles</title>
</head>
<body>
<h1>Profiles</h1>
<p><a href="live">The statistics as they come</a></p>
` + pageProfiles + `</body>
</html>
`

const livePage = pageHead + `<title>Live</title>
</head>
<body>
<h1>Live</h1>
<p id="state" role="status">Connecting.</p>
<div id="charts"></div>
<template>
<figure hidden>
<figcaption><b></b></figcaption>
<div class="scale y"><span></span><span></span><span>0</span></div>
<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><path d="M0 0H100M0 50H100M0 100H100"/><path class="line"/><path class="line"/></svg>
<div class="scale x"><span>2 minutes ago</span><span>now</span></div>
</figure>
</template>
<noscript><p>The charts need JavaScript; <a href="stats">the numbers</a> do not.</p></noscript>
<h2>Profiles</h2>
` + pageProfiles + `<script nonce="NONCE">
"use strict";
const kept = 120e3; // milliseconds
// Each chart: what and in which unit, the names of its lines, and their values, nothing for none.
const charts = [
  ["Heap, MiB", ["in use", "goal"], s => [s.heap_bytes / 2 ** 20, s.heap_goal_bytes / 2 ** 20]],
  ["Goroutines", [""], s => [s.goroutines]],
  ["GC pauses, ms per second", [""], (s, last) => last && [1e3 * (s.gc_pause_seconds_total - last.gc_pause_seconds_total) / (s.uptime_seconds - last.uptime_seconds)]],
  ["Requests in flight", [""], s => s.server && [s.server.requests]],
  ["Open connections", [""], s => s.server && [s.server.connections]],
  ["Pool, connections", ["in use", "open"], s => s.database && [s.database.in_use, s.database.open]],
].map(([title, names, values]) => {
  const figure = document.querySelector("template").content.cloneNode(true).firstElementChild;
  figure.querySelector("b").textContent = title;
  figure.querySelector("figcaption").append(...names.map(() => Object.assign(document.createElement("span"), { className: "line" })));
  document.getElementById("charts").append(figure);
  return { figure, names, values, points: [] };
});
const number = v => v.toLocaleString("en", v < 1000 ? { maximumSignificantDigits: 3 } : { maximumFractionDigits: 0 });
// A scale ends at a round number, half of which is round too.
const round = v => {
  const power = 10 ** Math.floor(Math.log10(v));
  return [1, 2, 4, 10].find(n => n * power >= v) * power;
};
const draw = (chart, at, values) => {
  chart.points = chart.points.filter(p => at - p.at <= kept).concat({ at, values });
  if (values) chart.figure.hidden = false;
  const top = round(Math.max(2, ...chart.points.flatMap(p => p.values || [])));
  const marks = chart.figure.querySelectorAll(".y span"), lines = chart.figure.querySelectorAll("path.line"), now = chart.figure.querySelectorAll("span.line");
  marks[0].textContent = number(top);
  marks[1].textContent = number(top / 2);
  chart.names.forEach((name, i) => {
    let d = "", pen = "M"; // M is up, for a gap
    for (const p of chart.points) {
      if (p.values) d += pen + (100 - (at - p.at) / kept * 100).toFixed(2) + " " + (100 - p.values[i] / top * 100).toFixed(2);
      pen = p.values ? "L" : "M";
    }
    lines[i].setAttribute("d", d);
    now[i].textContent = name + " " + (values ? number(values[i]) : "–");
  });
};
const state = document.getElementById("state");
let last = null, failingSince = null;
const look = async () => {
  let s = null;
  try {
    const response = await fetch("stats?format=json", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!response.ok) throw new Error(response.status + " " + response.statusText);
    s = await response.json();
    if (last && s.uptime_seconds < last.uptime_seconds) last = null; // another process
    failingSince = null;
    state.textContent = s.go_version + ", " + s.gomaxprocs + " processors, started " + new Date(Date.now() - 1e3 * s.uptime_seconds).toLocaleString() + ", " + "garbage collections: " + number(s.gc_cycles_total);
  } catch (err) {
    failingSince ??= new Date();
    state.textContent = "No response since " + failingSince.toLocaleTimeString() + " (" + err.message + "). Trying again each second.";
  }
  document.body.classList.toggle("failing", !s);
  const at = Date.now();
  for (const chart of charts) draw(chart, at, s && chart.values(s, last));
  last = s || last;
  setTimeout(look, 1000);
};
look();
</script>
</body>
</html>
`
