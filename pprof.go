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

// ProfilingConfig configures a [Profiler]. A zero field means the default that
// its comment gives. A negative number is an error.
type ProfilingConfig struct {
	// Allow reports whether to answer a request, and alone decides that when
	// it is set. It is called for every request, from many goroutines. nil
	// admits this machine only; see [Profiler].
	Allow func(*http.Request) bool

	// MaxDuration is the longest profile to record, 5 minutes by default. A
	// request for a longer one gets 400, and one without ?seconds= no more.
	MaxDuration time.Duration

	// MutexFraction is the rate for [runtime.SetMutexProfileFraction] until
	// Close: one in so many contentions is recorded. 0 leaves the rate alone.
	MutexFraction int

	// BlockRate is the rate for [runtime.SetBlockProfileRate] until Close: one
	// event is recorded for so many nanoseconds that goroutines wait. 0 leaves
	// the rate alone. 10,000 costs little.
	BlockRate int

	// FlightRecorder is how much of the past an execution trace in memory
	// covers, for the endpoint flight and for [Profiler.SlowRequests]. It is
	// kept in about 10 MiB, which a busy program fills in less time. A process
	// has one flight recorder: a second is an error until the first is closed.
	// 0 turns it off.
	FlightRecorder time.Duration

	// DB is a pool whose state joins the statistics.
	DB *sql.DB
}

func (c *ProfilingConfig) withDefaults() (ProfilingConfig, error) {
	var d ProfilingConfig
	if c != nil {
		d = *c
	}
	d.MaxDuration = cmp.Or(d.MaxDuration, 5*time.Minute)
	var faults faultList
	if d.MaxDuration < 0 {
		faults.add("MaxDuration: %v is negative", d.MaxDuration)
	}
	if d.MutexFraction < 0 {
		faults.add("MutexFraction: %d is negative", d.MutexFraction)
	}
	if d.BlockRate < 0 {
		faults.add("BlockRate: %d is negative", d.BlockRate)
	}
	if d.FlightRecorder < 0 {
		faults.add("FlightRecorder: %v is negative", d.FlightRecorder)
	}
	return d, errors.Join(faults...)
}

// EnableDefaultProfiling serves profiles and statistics at /debug/pprof/ on
// mux, for this machine only, which includes a proxy on it: see [Profiler].
// It is [NewProfiler] with the defaults and [Profiler.Enable], holds nothing that
// would have to be closed, and panics if mux is nil or has these patterns already.
func EnableDefaultProfiling(mux *http.ServeMux) {
	p, err := NewProfiler(nil)
	if err != nil {
		panic(err)
	}
	p.Enable(mux)
}

// Profiler serves what [net/http/pprof] does, for go tool pprof and go tool
// trace, and more, at /debug/pprof/:
//
//	profile              CPU, for 30 seconds or ?seconds=
//	trace                execution trace, for 1 second or ?seconds=
//	heap allocs          memory; ?gc=1 collects garbage before heap
//	goroutine threadcreate, and every other profile of runtime/pprof
//	block mutex          waiting and contention
//	flight               the flight recorder's window, an execution trace
//	stats                RuntimeStats and more, in JSON or for Prometheus
//	live                 a page that plots the statistics as they come
//	symbol cmdline       as in net/http/pprof
//
// Importing net/http/pprof shows all of that to anybody who can reach
// [http.DefaultServeMux]. A Profiler touches no mux but the one it is given.
//
// # Who may look
//
// Without Allow, a request is answered only if it comes from this machine: its
// peer is a loopback address or a Unix socket, its Host is localhost or a
// loopback address, so that no web page reaches it by DNS rebinding, it is not
// HTTP/1.0, and it has none of the fields that proxies add, such as Forwarded,
// Via, X-Forwarded-* or X-Real-IP. What another site's page has a browser fetch
// is refused too (Sec-Fetch-Site), unless it is a link that somebody follows.
// All that are refused get 403, and the log a line, "profiling refused".
//
// Behind a proxy on the same machine this is not enough. Every peer is a loopback
// address there, and not every proxy says that it is one: nginx from 1.29.7 on
// and haproxy add no field of their own, and pass on, or make, a Host that
// looks local. Use a port that the proxy does not lead to, [NewProfilingServer],
// set Allow, or have the proxy refuse /debug/. The guard tells machines apart,
// not the users of one.
//
// # Profiles that take time
//
// profile, trace and block or mutex with ?seconds= last longer than other
// requests: neither [Timeout] nor the server's WriteTimeout ends them, and the
// client has 15 seconds for each 64 KiB of a reply, as for that of a stream. They
// end when the client goes, and a drain of the server ends them early with what
// they have, which is a complete profile of a shorter time, as is a trace that
// has grown to 32 MiB. Fractions of a second are fine. A second CPU profile or
// trace at the same time gets 409.
//
// With ?seconds= block and mutex turn their rate on for that long if it is off:
// every contention is recorded, and all waiting from 10 microseconds on. The
// runtime only ever adds up: a profile also has what was recorded before, by an
// earlier request or by a rate that is on. Rates belong to the process. A mutex
// rate that somebody else has set is seen and left alone; a block rate cannot be
// seen, so set it by BlockRate or it is turned off. A mutex that goroutines have
// queued for without a break since before its rate was on stays unseen. Without
// ?seconds= and a rate the two are empty. The other profiles show a moment, and
// refuse ?seconds= with 400: two of them are compared with go tool pprof -base.
//
// Errors are text that go tool pprof shows. No reply may be stored.
//
// The methods of a Profiler may be called from any goroutine.
type Profiler struct {
	config   ProfilingConfig
	alone    bool                  // on a server of its own, whose connections nobody wants to know of
	flightMu sync.Mutex            // guards flight; Start, Stop and WriteTo race without it
	flight   *trace.FlightRecorder // nil without one, and after Close
	closing  sync.Once
	slow     sync.WaitGroup // for recordSlow

	mu       sync.Mutex // guards what follows
	closed   bool
	slowLast time.Time // when the last recording of a slow request began
}

// NewProfiler returns a Profiler for cfg, which it copies; nil is all defaults.
// It sets the rates and starts the flight recorder. The error names every field
// that is negative, or FlightRecorder if the process has one already.
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
	mutexRate.configure(c.MutexFraction)
	blockRate.configure(c.BlockRate)
	return p, nil
}

// Enable serves p on mux, at /debug/pprof/. It registers GET, and POST for
// symbol, so that it gets along with the mux's other routes. It panics if mux
// is nil or has these patterns already.
func (p *Profiler) Enable(mux *http.ServeMux) {
	if mux == nil {
		panic("conduit: mux: is nil")
	}
	mux.Handle("GET "+profilingPath, p)
	mux.Handle("GET "+strings.TrimSuffix(profilingPath, "/"), p) // or mux redirects whom p refuses
	mux.Handle("POST "+profilingPath+"symbol", p)
}

const profilingPath = "/debug/pprof/"

// Close sets the rates back, stops the flight recorder, and waits for a
// recording that [Profiler.SlowRequests] is writing. The mutex rate is again
// what it was before [NewProfiler], and the block rate off if BlockRate was
// set, since what it was cannot be found out. What needs neither is served as
// before. Close returns nil, and may be called more than once.
func (p *Profiler) Close() error {
	p.closing.Do(func() {
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		p.slow.Wait()
		mutexRate.restore(p.config.MutexFraction)
		blockRate.restore(p.config.BlockRate)
		p.flightMu.Lock()
		defer p.flightMu.Unlock()
		if p.flight != nil {
			p.flight.Stop()
			p.flight = nil
		}
	})
	return nil
}

// ServeHTTP answers a request whose path is /debug/pprof/ or below it, with any
// router. Methods other than GET and HEAD, and POST for symbol, get 405.
func (p *Profiler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h["X-Content-Type-Options"] = nosniffValue
	if reason := p.refuse(r); reason != "" {
		Logger(r.Context()).Warn("profiling refused", "method", r.Method, "path", r.URL.Path, "remote", r.RemoteAddr, "err", reason)
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return
	}
	name, below := strings.CutPrefix(r.URL.Path, profilingPath)
	switch {
	case r.URL.Path+"/" == profilingPath:
		h.Set("Location", "pprof/") // relative, for what a router has stripped
		w.WriteHeader(http.StatusMovedPermanently)
		return
	case !below:
		profileError(w, http.StatusNotFound, "not below "+profilingPath)
		return
	}
	methods := []string{http.MethodGet, http.MethodHead}
	if name == "symbol" {
		methods = append(methods, http.MethodPost)
	}
	if !slices.Contains(methods, r.Method) {
		h.Set("Allow", strings.Join(methods, ", "))
		profileError(w, http.StatusMethodNotAllowed, http.StatusText(http.StatusMethodNotAllowed))
		return
	}
	p.serve(w, r, name)
}

func (p *Profiler) serve(w http.ResponseWriter, r *http.Request, name string) {
	if name == "symbol" {
		serveSymbol(w, r) // whose query is no form
		return
	}
	q, err := p.parseQuery(r)
	if err != nil {
		profileError(w, http.StatusBadRequest, err.Error())
		return
	}
	switch name {
	case "":
		servePage(w, indexPage)
	case "live":
		servePage(w, livePage)
	case "stats":
		p.serveStats(w, r, q.format)
	case "cmdline":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, strings.Join(os.Args, "\x00"))
	case "profile":
		record(w, r, name, cmp.Or(q.duration, min(30*time.Second, p.config.MaxDuration)), recording{
			start: pprof.StartCPUProfile,
			stop:  func(io.Writer) error { pprof.StopCPUProfile(); return nil },
		})
	case "trace":
		record(w, r, name, cmp.Or(q.duration, min(time.Second, p.config.MaxDuration)), recording{
			start: trace.Start,
			stop:  func(io.Writer) error { trace.Stop(); return nil },
		})
	case "flight":
		p.serveFlight(w, r)
	default:
		serveProfile(w, r, name, q)
	}
}

// profilingQuery is what the parameters of a request ask for.
type profilingQuery struct {
	duration time.Duration // 0 if it is not given
	debug    int
	gc       bool
	format   string
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
		q.duration = max(time.Duration(seconds*float64(time.Second)), 1)
	}
	if text := form.Get("debug"); text != "" {
		if q.debug, err = strconv.Atoi(text); err != nil {
			return q, fmt.Errorf("debug: %q is not a number", text)
		}
	}
	q.gc = form.Get("gc") != "" && form.Get("gc") != "0"
	q.format = form.Get("format")
	return q, nil
}

// refuse returns why a request is not answered, "" if it is.
func (p *Profiler) refuse(r *http.Request) string {
	if p.config.Allow != nil {
		if p.config.Allow(r) {
			return ""
		}
		return "not allowed"
	}
	for field := range r.Header {
		if slices.Contains(forwardedFields, field) || strings.HasPrefix(field, "X-Forwarded") || strings.HasPrefix(field, "X-Original") || strings.HasPrefix(field, "X-Envoy-") {
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
		return "from a page of another site" // which could not read it, but have the program profiled all day
	}
	return ""
}

// forwardedFields are what proxies and content delivery networks add, beside
// X-Forwarded-* and the like. It is never written to.
var forwardedFields = []string{
	"Forwarded", "Via", "X-Real-Ip", "X-Client-Ip", "Client-Ip", "X-Cluster-Client-Ip", "True-Client-Ip",
	"Cdn-Loop", "Cf-Connecting-Ip", "Fastly-Client-Ip", "X-Amzn-Trace-Id",
}

// isLocalPeer reports whether a request came from a loopback address or a Unix
// socket. A RemoteAddr that is neither, because a middleware has changed it, is
// no proof.
func isLocalPeer(r *http.Request) bool {
	local, known := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if known && local.Network() == "unix" || !known && (r.RemoteAddr == "" || r.RemoteAddr == "@") {
		return true
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && peer.Addr().IsLoopback()
}

func isLocalHost(host string) bool {
	if name, port, err := net.SplitHostPort(host); err == nil && strings.Trim(port, "0123456789") == "" {
		host = name
	}
	if strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil && addr.IsLoopback()
}

// profileError answers with a text that go tool pprof shows.
func profileError(w http.ResponseWriter, status int, text string) {
	h := w.Header()
	h.Del("Content-Disposition")
	h.Set("X-Go-Pprof", "1")
	http.Error(w, text, status)
}

// serveProfile answers for a profile of the runtime's or the program's.
func serveProfile(w http.ResponseWriter, r *http.Request, name string, q profilingQuery) {
	profile := pprof.Lookup(name)
	if profile == nil {
		profileError(w, http.StatusNotFound, fmt.Sprintf("unknown profile %q", name))
		return
	}
	take := func(w io.Writer) error { return profile.WriteTo(w, q.debug) }
	rate := map[string]*samplingRate{"block": &blockRate, "mutex": &mutexRate}[name]
	if q.duration > 0 && rate == nil {
		profileError(w, http.StatusBadRequest, name+" shows a moment, and ?seconds= is not supported: compare two of them with go tool pprof -base")
		return
	}
	if q.duration > 0 {
		record(w, r, name, q.duration, recording{
			text:  q.debug != 0,
			start: func(io.Writer) error { rate.begin(); return nil },
			stop: func(w io.Writer) error {
				defer rate.end() // afterwards: the profile depends on the rate at which it is written
				return take(w)
			},
		})
		return
	}
	setProfileHeader(w, name, q.debug != 0)
	if q.gc && name == "heap" {
		runtime.GC()
	}
	var body bytes.Buffer
	if err := take(&body); err != nil {
		profileError(w, http.StatusInternalServerError, err.Error())
		return
	}
	sendProfile(w, r, body.Bytes())
}

func setProfileHeader(w http.ResponseWriter, name string, text bool) {
	h := w.Header()
	if text {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		return
	}
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", "attachment; filename="+strconv.Quote(name))
}

// samplingRate is a rate of the runtime's that recordings need to be on. The
// rate is the process's, and so is this, or two Profilers would turn off each
// other's.
type samplingRate struct {
	set    func(int)
	get    func() int // nil if the rate cannot be read
	demand int        // what recordings turn it on to

	mu         sync.Mutex // guards what follows
	configured int        // how many Profilers have set the rate
	base       int        // what the last of them has set it to
	before     int        // what it was before the first of them
	recordings int        // how many need it to be on
	turnedOn   bool       // by a recording
}

var (
	mutexRate = samplingRate{
		set:    func(rate int) { runtime.SetMutexProfileFraction(rate) },
		get:    func() int { return runtime.SetMutexProfileFraction(-1) },
		demand: 1,
	}
	blockRate = samplingRate{set: runtime.SetBlockProfileRate, demand: 10_000}
)

// now returns the rate, as far as it is known.
func (s *samplingRate) now() int {
	switch {
	case s.get != nil:
		return s.get()
	case s.turnedOn:
		return s.demand
	}
	return s.base
}

func (s *samplingRate) configure(rate int) {
	if rate == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.configured == 0 {
		s.before = s.now()
		if s.turnedOn {
			s.before = 0
		}
	}
	s.configured++
	s.base, s.turnedOn = rate, false
	s.set(rate)
}

// restore undoes configure, if only when the last recording ends.
func (s *samplingRate) restore(rate int) {
	if rate == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.configured--
	if s.configured > 0 {
		return
	}
	s.base = s.before
	if s.recordings > 0 && s.base == 0 {
		s.turnedOn = true
		s.set(s.demand)
		return
	}
	s.set(s.base)
}

func (s *samplingRate) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recordings++
	if s.now() == 0 {
		s.turnedOn = true
		s.set(s.demand)
	}
}

func (s *samplingRate) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recordings--
	if s.recordings > 0 || !s.turnedOn {
		return
	}
	// What somebody else has set meanwhile is left alone.
	if s.now() == s.demand {
		s.set(0)
	}
	s.turnedOn = false
}

// recording is a profile that takes time.
type recording struct {
	start, stop func(io.Writer) error
	text        bool
}

// record answers with a recording of this duration. It is made in memory and
// sent when it is whole: a slow client would hold up the flight recorder, which
// shares a goroutine of the runtime's with a trace.
func record(w http.ResponseWriter, r *http.Request, name string, d time.Duration, rec recording) {
	setProfileHeader(w, name, rec.text)
	if r.Method == http.MethodHead || !releaseTimeout(w) {
		return
	}
	deadline := rollingDeadline{w, writeAllowance}
	deadline.clear()
	body := recordingBuffer{full: make(chan struct{})}
	if err := rec.start(&body); err != nil {
		profileError(w, http.StatusConflict, name+": "+err.Error())
		return
	}
	gone := waitRecording(r.Context(), d, body.full)
	err := rec.stop(&body)
	deadline.arm()
	switch {
	case errors.Is(gone, context.DeadlineExceeded):
		profileError(w, http.StatusServiceUnavailable, name+": cut short: "+gone.Error())
	case gone != nil:
		cutReply(w, r)
	case err != nil:
		profileError(w, http.StatusInternalServerError, name+": "+err.Error())
	default:
		sendProfile(w, r, body.Bytes())
	}
}

// waitRecording returns after d, or when there is enough, or when the server
// drains, and with an error if there is nobody to send to.
func waitRecording(ctx context.Context, d time.Duration, full <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-full:
	case <-Draining(ctx):
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// maxRecording is how large a trace becomes before it ends.
const maxRecording = 32 << 20

// recordingBuffer tells when it has more than maxRecording.
type recordingBuffer struct {
	bytes.Buffer
	full chan struct{} // closed then
}

func (b *recordingBuffer) Write(p []byte) (int, error) {
	before := b.Len()
	n, err := b.Buffer.Write(p)
	if before <= maxRecording && b.Len() > maxRecording {
		close(b.full)
	}
	return n, err
}

// sendProfile answers with what is in memory, which may take longer than the
// server's WriteTimeout.
func sendProfile(w http.ResponseWriter, r *http.Request, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodHead || !releaseTimeout(w) {
		return
	}
	deadline := rollingDeadline{w, writeAllowance}
	if _, err := deadline.write(body); err != nil {
		cutReply(w, r)
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
	reply := []byte("num_symbols: 1\n") // or any other number but 0
	for word := range strings.SplitSeq(text, "+") {
		pc, err := strconv.ParseUint(strings.TrimSpace(word), 0, 64)
		if f := runtime.FuncForPC(uintptr(pc)); err == nil && f != nil {
			reply = fmt.Appendf(reply, "%#x %s\n", pc, f.Name())
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	sendProfile(w, r, reply)
}

func (p *Profiler) serveFlight(w http.ResponseWriter, r *http.Request) {
	body, err := p.snapshot()
	switch {
	case errors.Is(err, errNoFlightRecorder):
		profileError(w, http.StatusBadRequest, err.Error())
	case err != nil:
		profileError(w, http.StatusInternalServerError, "flight: "+err.Error())
	default:
		setProfileHeader(w, "flight", false)
		sendProfile(w, r, body)
	}
}

var errNoFlightRecorder = errors.New("flight: no flight recorder runs: set ProfilingConfig.FlightRecorder")

// snapshot copies the flight recorder's window to memory.
func (p *Profiler) snapshot() ([]byte, error) {
	p.flightMu.Lock()
	defer p.flightMu.Unlock()
	if p.flight == nil {
		return nil, errNoFlightRecorder
	}
	var body bytes.Buffer
	_, err := p.flight.WriteTo(&body)
	return body.Bytes(), err
}

const (
	slowPause = time.Minute // from one recording to the next
	slowKept  = 10          // recordings
)

// SlowRequests writes what the flight recorder has when a request took
// threshold or longer, to a file in dir for go tool trace: what the handler,
// and everything else, did in the seconds before. At most one a minute is
// written, and of all in dir the newest ten are kept. The name has the time and
// the request's id, slow-20060102T150405.000Z-ID.trace, and the log a line,
// "slow request recorded", with the file.
//
// A request ends when its handler returns. One that lasts by nature ends with
// the first byte of its reply, or when its connection is hijacked: a stream, an
// event stream, a file of a [FileServer]. The file is written on a goroutine of
// its own, and neither the reply nor another request waits for it;
// [Profiler.Close] does, so that a service calls that in a hook.
//
// It belongs inside [RequestID], for the id, and outside [Timeout], which ends
// a request too. SlowRequests panics, naming each, if the Profiler has no
// FlightRecorder, threshold is not positive, or dir is not a directory that
// can be written to.
func (p *Profiler) SlowRequests(threshold time.Duration, dir string) Middleware {
	var faults faultList
	if p.config.FlightRecorder == 0 {
		faults.add("FlightRecorder: SlowRequests needs one")
	}
	if threshold <= 0 {
		faults.add("threshold: %v is not positive", threshold)
	}
	dir, err := writableDir(dir)
	if err != nil {
		faults.add("dir: %w", err)
	}
	if err := errors.Join(faults...); err != nil {
		panic(err)
	}
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s := &slowWriter{
				exchange: exchangeOf(w, r), profiler: p, threshold: threshold, dir: dir,
				request: r, path: r.URL.Path, start: time.Now(),
			}
			defer s.end()
			next.ServeHTTP(s, r)
		})
	}
}

// writableDir returns the absolute path of a directory, having tried to make a
// file in it.
func writableDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return dir, err
	}
	f, err := os.CreateTemp(dir, ".slow-*")
	if err != nil {
		return dir, err
	}
	return dir, errors.Join(f.Close(), os.Remove(f.Name()))
}

// slowWriter is the handler's ResponseWriter behind SlowRequests, which sees
// when a request ends.
type slowWriter struct {
	*exchange
	profiler  *Profiler
	threshold time.Duration
	dir       string
	request   *http.Request
	path      string // a handler may change that of the request
	start     time.Time
	ended     atomic.Bool
}

func (s *slowWriter) Unwrap() http.ResponseWriter { return s.exchange }

// releaseTimeout is called by the function releaseTimeout in conduit.go, just
// before the first byte of what outlives a timeout by nature.
func (s *slowWriter) releaseTimeout() bool {
	s.end()
	return true
}

// end has the request recorded if it was slow. Only the first call counts.
func (s *slowWriter) end() {
	took := time.Since(s.start)
	if !s.ended.CompareAndSwap(false, true) || took < s.threshold || !s.profiler.claimSlow() {
		return
	}
	ctx, r := s.request.Context(), s.request
	logger := Logger(ctx).With("method", r.Method, "path", s.path, "pattern", r.Pattern, "duration", took)
	name := "slow-" + time.Now().UTC().Format("20060102T150405.000Z")
	if id := RequestIDFrom(ctx); id != "" {
		name += "-" + id // RequestID lets nothing through that a name cannot have
	}
	go s.profiler.recordSlow(logger, s.dir, name+".trace")
}

func (s *slowWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := s.exchange.Hijack()
	if err == nil {
		s.end()
	}
	return conn, buf, err
}

// claimSlow reports whether a slow request is to be recorded now, by
// recordSlow.
func (p *Profiler) claimSlow() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.closed || !p.slowLast.IsZero() && now.Sub(p.slowLast) < slowPause {
		return false
	}
	p.slowLast = now
	p.slow.Add(1)
	return true
}

func (p *Profiler) recordSlow(logger *slog.Logger, dir, name string) {
	defer p.slow.Done()
	file := filepath.Join(dir, name)
	body, err := p.snapshot()
	if err == nil {
		err = writeWhole(file, body)
	}
	if err != nil {
		logger.Error("slow request not recorded", "err", err)
		return
	}
	logger.Warn("slow request recorded", "file", file)
	if err := removeOldest(dir); err != nil {
		logger.Error("old recording not removed", "err", err)
	}
}

// writeWhole writes a file that has its name only once it is whole. What it
// holds is for the owner alone.
func writeWhole(file string, body []byte) error {
	part := file + ".part"
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(body)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(part, file)
	}
	if err != nil {
		os.Remove(part)
	}
	return err
}

// removeOldest keeps the newest recordings in a directory, which their names
// sort by time.
func removeOldest(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool {
		return !strings.HasPrefix(e.Name(), "slow-") || !strings.HasSuffix(e.Name(), ".trace") || !e.Type().IsRegular()
	})
	var faults []error
	for _, e := range entries[:max(len(entries)-slowKept, 0)] {
		if err := os.Remove(filepath.Join(dir, e.Name())); !errors.Is(err, fs.ErrNotExist) {
			faults = append(faults, err)
		}
	}
	return errors.Join(faults...)
}

// NewProfilingServer returns a server of its own for a Profiler: a port that
// the public side of a service does not have, and that no middleware is in
// front of. It has no WriteTimeout. Its Profiler closes when the server has been
// shut down or closed: do that even if it never served.
//
// An addr without a host, ":6060", is 127.0.0.1; "[::1]:6060" is the other
// loopback address. With a host that others can reach, "10.0.0.7:6060" or
// "0.0.0.0:6060", they still get 403 unless cfg has an Allow that lets them in.
// It logs to [slog.Default]. Its statistics say nothing of a server: the
// service's connections and requests are those of another. The error names addr,
// or what [NewProfiler] refuses.
func NewProfilingServer(addr string, cfg *ProfilingConfig) (*Server, error) {
	host, port, err := net.SplitHostPort(addr)
	mux := http.NewServeMux()
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
	p.alone = true
	p.Enable(mux)
	srv.atEnd = func() { p.Close() }
	return srv, nil
}

// RuntimeStats is the state of the process as the Go runtime tells it through
// [runtime/metrics], which stops nothing to do so. Totals are since the start.
// The percentiles are those of a histogram since the start, each the upper
// bound of a bucket.
type RuntimeStats struct {
	GoVersion     string  `json:"go_version"`
	UptimeSeconds float64 `json:"uptime_seconds"`
	GOMAXPROCS    uint64  `json:"gomaxprocs"`
	Goroutines    uint64  `json:"goroutines"`

	// HeapBytes is what objects take that are in use or not yet swept,
	// HeapLiveBytes what the last collection found in use, HeapGoalBytes where
	// the next one is to end.
	HeapBytes     uint64 `json:"heap_bytes"`
	HeapLiveBytes uint64 `json:"heap_live_bytes"`
	HeapGoalBytes uint64 `json:"heap_goal_bytes"`
	HeapObjects   uint64 `json:"heap_objects"`
	StackBytes    uint64 `json:"stack_bytes"`

	// MemoryBytes is all that the runtime has from the system and has not
	// given back.
	MemoryBytes         uint64 `json:"memory_bytes"`
	AllocatedBytesTotal uint64 `json:"allocated_bytes_total"`

	GCCyclesTotal uint64 `json:"gc_cycles_total"`

	// GCPausesTotal counts the times that a collection stopped the world,
	// usually two a cycle. GCPauseSecondsTotal is how long they took, an
	// estimate from the histogram.
	GCPausesTotal       uint64  `json:"gc_pauses_total"`
	GCPauseSecondsTotal float64 `json:"gc_pause_seconds_total"`
	GCPauseP50Seconds   float64 `json:"gc_pause_p50_seconds"`
	GCPauseP99Seconds   float64 `json:"gc_pause_p99_seconds"`

	// The scheduler's latency is how long goroutines that could run had to wait.
	SchedulerLatencyP50Seconds float64 `json:"scheduler_latency_p50_seconds"`
	SchedulerLatencyP99Seconds float64 `json:"scheduler_latency_p99_seconds"`

	// MutexWaitSecondsTotal is how long goroutines waited for a sync.Mutex or
	// sync.RWMutex.
	MutexWaitSecondsTotal float64 `json:"mutex_wait_seconds_total"`

	// The processor time of the program's code and of collection, estimates
	// that the runtime makes at the end of each collection, which comes at
	// least every two minutes unless it is off. They are 0 before the first.
	CPUUserSecondsTotal float64 `json:"cpu_user_seconds_total"`
	CPUGCSecondsTotal   float64 `json:"cpu_gc_seconds_total"`
}

// ReadRuntimeStats reads the process's statistics in a few microseconds,
// without allocation and without stopping the world as
// [runtime.ReadMemStats] does. It may be called from any goroutine.
//
// The endpoint stats adds the open connections and the requests in flight of
// the [Server] that it is asked through, and the pool of ProfilingConfig.DB.
func ReadRuntimeStats() RuntimeStats {
	m := readRuntime()
	defer runtimeReadings.Put(m)
	return m.stats()
}

// readRuntime returns what the runtime says now, to be put back into
// runtimeReadings.
func readRuntime() *runtimeReading {
	m := runtimeReadings.Get().(*runtimeReading)
	metrics.Read(m.samples)
	return m
}

// processStart is when the package was initialized, before main.
var processStart = time.Now()

// runtimeReading has the metrics that are numbers or histograms of durations.
type runtimeReading struct {
	samples  []metrics.Sample
	families []metricFamily // of each sample
}

// metricFamily is what Prometheus is told of a metric.
type metricFamily struct{ name, kind, text string }

// runtimeReadings holds *runtimeReading, whose histograms are used again.
var runtimeReadings = sync.Pool{New: func() any {
	m := new(runtimeReading)
	underscores := strings.NewReplacer("/", "_", ":", "_", "-", "_")
	for _, d := range metrics.All() {
		name, kind := "go"+underscores.Replace(d.Name), "gauge"
		switch {
		case d.Kind == metrics.KindFloat64Histogram && strings.HasSuffix(d.Name, ":seconds"):
			kind = "histogram"
		case d.Kind == metrics.KindFloat64Histogram, strings.HasPrefix(d.Name, "/godebug/"):
			continue
		case d.Cumulative:
			name, kind = name+"_total", "counter"
		}
		m.samples = append(m.samples, metrics.Sample{Name: d.Name})
		m.families = append(m.families, metricFamily{name, kind, strings.Join(strings.Fields(d.Description), " ")})
	}
	return m
}}

// value returns a metric, the zero Value if the runtime does not have it.
func (m *runtimeReading) value(name string) metrics.Value {
	for i := range m.samples {
		if m.samples[i].Name == name {
			return m.samples[i].Value
		}
	}
	return metrics.Value{}
}

func (m *runtimeReading) number(name string) float64 { return metricNumber(m.value(name)) }

func metricNumber(v metrics.Value) float64 {
	switch v.Kind() {
	case metrics.KindUint64:
		return float64(v.Uint64())
	case metrics.KindFloat64:
		return v.Float64()
	}
	return 0
}

func (m *runtimeReading) histogram(name string) *metrics.Float64Histogram {
	if v := m.value(name); v.Kind() == metrics.KindFloat64Histogram {
		return v.Float64Histogram()
	}
	return &metrics.Float64Histogram{}
}

func (m *runtimeReading) stats() RuntimeStats {
	pauses, latencies := m.histogram("/sched/pauses/total/gc:seconds"), m.histogram("/sched/latencies:seconds")
	count, sum := histogramTotals(pauses)
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
		GCPausesTotal:              count,
		GCPauseSecondsTotal:        sum,
		GCPauseP50Seconds:          percentile(pauses, 0.50),
		GCPauseP99Seconds:          percentile(pauses, 0.99),
		SchedulerLatencyP50Seconds: percentile(latencies, 0.50),
		SchedulerLatencyP99Seconds: percentile(latencies, 0.99),
		MutexWaitSecondsTotal:      m.number("/sync/mutex/wait/total:seconds"),
		CPUUserSecondsTotal:        m.number("/cpu/classes/user:cpu-seconds"),
		CPUGCSecondsTotal:          m.number("/cpu/classes/gc/total:cpu-seconds"),
	}
}

// histogramTotals returns how many values there are and an estimate of their
// sum.
func histogramTotals(h *metrics.Float64Histogram) (count uint64, sum float64) {
	for i, n := range h.Counts {
		if n > 0 {
			low, high := bucketBounds(h, i)
			count += n
			sum += float64(n) * (low + high) / 2
		}
	}
	return count, sum
}

// bucketBounds returns the bounds of a bucket of durations, an infinite one
// being the same as the other.
func bucketBounds(h *metrics.Float64Histogram, i int) (low, high float64) {
	low, high = max(h.Buckets[i], 0), h.Buckets[i+1]
	if math.IsInf(high, 1) {
		high = low
	}
	return low, high
}

// percentile returns the upper bound of the bucket with the value that this
// fraction of all does not exceed, 0 if there are none.
func percentile(h *metrics.Float64Histogram, fraction float64) float64 {
	count, _ := histogramTotals(h)
	rank := uint64(math.Ceil(float64(count) * fraction))
	for i, n := range h.Counts {
		if rank <= n && n > 0 {
			_, high := bucketBounds(h, i)
			return high
		}
		rank -= min(rank, n)
	}
	return 0
}

// profilerStats is the reply of the endpoint stats.
type profilerStats struct {
	RuntimeStats
	Server   statistics `json:"server,omitempty"`
	Database statistics `json:"database,omitempty"`
}

// statistics are numbers with their names in JSON and for Prometheus.
type statistics []struct {
	key, name, kind, text string
	value                 float64
}

func (s statistics) MarshalJSON() ([]byte, error) {
	object := make(map[string]float64)
	for _, n := range s {
		object[n.key] = n.value
	}
	return json.Marshal(object)
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

// serveStats answers in JSON, or for Prometheus if the format or the Accept
// field, in which the first type that is known counts, asks for that.
func (p *Profiler) serveStats(w http.ResponseWriter, r *http.Request, format string) {
	addVary(w.Header(), "Accept")
	if format == "" && acceptsExposition(r.Header["Accept"]) {
		format = "prometheus"
	}
	m := readRuntime()
	defer runtimeReadings.Put(m)
	stats := profilerStats{RuntimeStats: m.stats()}
	if s := serverFrom(r.Context()); s != nil && !p.alone {
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

func acceptsExposition(accept []string) bool {
	for _, line := range accept {
		for member := range strings.SplitSeq(line, ",") {
			switch mediaType(member) {
			case "text/plain", "application/openmetrics-text":
				return true
			case "application/json", "text/html":
				return false
			}
		}
	}
	return false
}

// exposition returns the statistics, and all other numbers of the runtime's, in
// [Prometheus' text format]. The names are those that its client for Go gives
// to the runtime's metrics.
//
// [Prometheus' text format]: https://prometheus.io/docs/instrumenting/exposition_formats/
func (s *profilerStats) exposition(m *runtimeReading) []byte {
	e := make(exposition, 0, 32<<10)
	e.add(fmt.Sprintf("go_info{version=%q}", s.GoVersion), "gauge", "Version of Go.", 1)
	e.add("process_start_time_seconds", "gauge", "Start of the process, in Unix time.", float64(processStart.UnixMilli())/1e3)
	e.add("go_goroutines", "gauge", "Goroutines that exist.", float64(s.Goroutines))
	for i, f := range m.families {
		if v := m.samples[i].Value; v.Kind() == metrics.KindFloat64Histogram {
			e.addHistogram(f.name, f.text, v.Float64Histogram())
		} else {
			e.add(f.name, f.kind, f.text, metricNumber(v))
		}
	}
	for _, n := range slices.Concat(s.Server, s.Database) {
		e.add(n.name, n.kind, n.text, n.value)
	}
	return e
}

// exposition is a text in Prometheus' format.
type exposition []byte

// add adds a metric with one sample, which may have labels.
func (e *exposition) add(sample, kind, text string, v float64) {
	name, _, _ := strings.Cut(sample, "{")
	e.head(name, kind, text)
	e.sample(sample, v)
}

func (e *exposition) head(name, kind, text string) {
	*e = append(*e, "# HELP "+name+" "+text+"\n# TYPE "+name+" "+kind+"\n"...)
}

func (e *exposition) sample(sample string, v float64) {
	*e = append(append(*e, sample...), ' ')
	*e = append(strconv.AppendFloat(*e, v, 'g', -1, 64), '\n')
}

// addHistogram adds one with a bucket for each power of ten of seconds: a value
// counts where the end of the runtime's finer bucket is.
func (e *exposition) addHistogram(name, text string, h *metrics.Float64Histogram) {
	e.head(name, "histogram", text)
	count, sum := histogramTotals(h)
	i, below := 0, uint64(0)
	for _, bound := range []float64{1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1} {
		for ; i < len(h.Counts) && h.Buckets[i+1] <= bound; i++ {
			below += h.Counts[i]
		}
		e.sample(name+`_bucket{le="`+strconv.FormatFloat(bound, 'g', -1, 64)+`"}`, float64(below))
	}
	e.sample(name+`_bucket{le="+Inf"}`, float64(count))
	e.sample(name+"_sum", sum)
	e.sample(name+"_count", float64(count))
}

// servePage sends one of the two pages. Nothing in them comes from elsewhere,
// and their policy forbids what would.
func servePage(w http.ResponseWriter, page string) {
	nonce := rand.Text()
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-"+nonce+"'; "+
		"style-src 'nonce-"+nonce+"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	io.WriteString(w, strings.NewReplacer("STYLE", pageStyle, "NONCE", nonce, "PROFILES", profileList()).Replace(page))
}

// profileList returns a list of links to every profile, as HTML.
func profileList() string {
	var list strings.Builder
	link := func(href, name, text string) {
		fmt.Fprintf(&list, "<li><a href=\"%s\">%s</a> %s\n", html.EscapeString(href), html.EscapeString(name), text)
	}
	link("profile?seconds=30", "profile", "where the processors' time goes, in 30 seconds")
	link("trace?seconds=1", "trace", "all that goroutines do, in a second, for <code>go tool trace</code>")
	for _, profile := range pprof.Profiles() {
		name := profile.Name()
		href := (&url.URL{Path: name}).String() // a name may have slashes, and more
		text := profileTexts[name]
		switch name {
		case "block", "mutex":
			link(href+"?seconds=10&debug=1", name, text)
		default:
			link(href+"?debug=1", name, fmt.Sprint(text, " (", profile.Count(), ")"))
		}
	}
	link("goroutine?debug=2", "all goroutines", "with their whole stacks")
	link("flight", "flight", "the flight recorder's window, for <code>go tool trace</code>")
	link("stats", "stats", `numbers, also <a href="stats?format=prometheus">for Prometheus</a>`)
	link("cmdline", "cmdline", "how the program was started")
	return list.String()
}

var profileTexts = map[string]string{
	"allocs":       "all memory allocated since the start",
	"block":        "where goroutines wait, in 10 seconds",
	"goroutine":    "where goroutines are",
	"heap":         "memory in use",
	"mutex":        "who holds mutexes that others wait for, in 10 seconds",
	"threadcreate": "what led to threads",
}

const pageStyle = `:root { color-scheme: light dark; --line: light-dark(#06c, #6af); --soft: light-dark(#777, #999); --edge: light-dark(#ddd, #333) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; background: light-dark(#fff, #121212); color: light-dark(#111, #eee) }
h1 { font-size: 1.3rem; margin: 0 }
h2 { font-size: 1rem }
a { color: var(--line) }
code { font-size: .9em; overflow-wrap: anywhere }
ul { padding-left: 1.2rem }
li { padding: .15rem 0 }
#state { color: var(--soft); margin: 0 0 1rem }
#state.gone { color: light-dark(#b00020, #ff8a80); font-weight: bold }
#charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)) }
figure { margin: 0; padding: .6rem .8rem; border: 1px solid var(--edge); border-radius: .5rem; min-width: 0 }
figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem }
output { font-variant-numeric: tabular-nums; font-weight: bold; white-space: nowrap }
small { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem }
svg { display: block; width: 100%; height: 5rem; overflow: hidden }
path { fill: none; stroke: var(--line); stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round }
path.more { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3 }
.gone figure { opacity: .5 }
`

const pageHead = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style nonce="NONCE">
STYLE</style>
`

const indexPage = pageHead + `<title>Profiles</title>
</head>
<body>
<h1>Profiles</h1>
<ul>
<li><a href="live">live</a> the statistics as they come
PROFILES</ul>
<p>Links with <code>?debug=1</code> show text. Without it the profile is for <code>go tool pprof</code> and this page's address with the profile's name.</p>
</body>
</html>
`

const livePage = pageHead + `<title>Live</title>
</head>
<body>
<h1>Live</h1>
<p id="state" role="status">Connecting.</p>
<div id="charts"></div>
<p>A point each second, two minutes of them.</p>
<noscript><p>The plots need JavaScript; <a href="stats">the numbers</a> do not.</p></noscript>
<h2>Profiles</h2>
<ul>
PROFILES</ul>
<script nonce="NONCE">
"use strict";
const kept = 120;
const count = v => v.toLocaleString("en", { maximumFractionDigits: 0 });
const ms = v => v.toLocaleString("en", { maximumSignificantDigits: 3 }) + " ms";
const bytes = v => {
  let unit = 0;
  for (; v >= 1024 && unit < 4; unit++) v /= 1024;
  return v.toFixed(unit && v < 100 ? 1 : 0) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
};
// Each chart: title, format, what the lines are, and their values, null for none.
const charts = [
  ["Heap", bytes, "in use, and goal", s => [s.heap_bytes, s.heap_goal_bytes]],
  ["Goroutines", count, "", s => [s.goroutines]],
  ["GC pause", ms, "in each second", (s, last) => [last ? 1e3 * (s.gc_pause_seconds_total - last.gc_pause_seconds_total) / Math.max(1, s.uptime_seconds - last.uptime_seconds) : 0]],
  ["Requests in flight", count, "", s => s.server && [s.server.requests]],
  ["Open connections", count, "", s => s.server && [s.server.connections]],
  ["Database pool", count, "in use, and open", s => s.database && [s.database.in_use, s.database.open]],
].map(([title, format, note, values]) => ({ title, format, note, values, points: [] }));
const state = document.getElementById("state");
const make = (parent, name, space) => parent.appendChild(space ? document.createElementNS(space, name) : document.createElement(name));
const show = chart => {
  const figure = make(document.getElementById("charts"), "figure");
  const caption = make(figure, "figcaption");
  make(caption, "span").textContent = chart.title;
  chart.now = make(caption, "output");
  const space = "http://www.w3.org/2000/svg";
  const svg = make(figure, "svg", space);
  svg.setAttribute("viewBox", "0 0 " + (kept - 1) + " 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  chart.lines = ["more", ""].map(name => {
    const path = make(svg, "path", space);
    path.setAttribute("class", name);
    return path;
  }).reverse();
  const foot = make(figure, "small");
  make(foot, "span").textContent = chart.note;
  chart.top = make(foot, "span");
};
const draw = chart => {
  const all = chart.points.filter(p => p).flat();
  const top = Math.max(...all, 0) * 1.1 || 1;
  chart.lines.forEach((line, i) => {
    let d = "", pen = "M";
    chart.points.forEach((p, x) => {
      if (!p || p[i] === undefined) return pen = "M"; // a gap
      d += pen + (x + kept - chart.points.length) + " " + (98 - 96 * p[i] / top).toFixed(2);
      pen = "L";
    });
    line.setAttribute("d", d);
  });
  chart.top.textContent = "peak " + chart.format(Math.max(...all, 0));
};
const plot = (s, last) => {
  for (const chart of charts) {
    const values = s && chart.values(s, last) || null;
    if (values && !chart.now) show(chart);
    chart.points.push(values);
    if (chart.points.length > kept) chart.points.shift();
    if (!chart.now) continue;
    chart.now.textContent = values ? values.map(chart.format).join(" / ") : "–";
    draw(chart);
  }
};
const uptime = v => [[86400, " d "], [3600, " h "], [60, " min "], [1, " s"]].reduce((text, [size, unit]) => {
  const n = Math.floor(v / size);
  v -= n * size;
  return n || text || size === 1 ? text + n + unit : text;
}, "");
let last = null, gone = null;
const look = async () => {
  let s = null;
  try {
    const reply = await fetch("stats", { headers: { Accept: "application/json" }, cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!reply.ok) throw new Error(reply.status + " " + reply.statusText);
    s = await reply.json();
    if (last && s.uptime_seconds < last.uptime_seconds) last = null; // another process
    gone = null;
    state.textContent = s.go_version + ", " + s.gomaxprocs + " processors, up " + uptime(s.uptime_seconds) + ", " + count(s.gc_cycles_total) + " collections";
  } catch (err) {
    gone ??= new Date();
    state.textContent = "No answer since " + gone.toLocaleTimeString() + " (" + err.message + "). Trying again.";
  }
  document.body.classList.toggle("gone", !s);
  state.classList.toggle("gone", !s);
  plot(s, last);
  last = s || last;
  setTimeout(look, 1000);
};
look();
</script>
</body>
</html>
`
