// SPDX-License-Identifier: MIT

// Package conduit is what a production HTTP service needs around net/http: a
// server that is safe as configured ([New]), a shutdown that loses no request
// ([GracefulShutdown]), timeouts that respond ([Timeout]), static files
// ([FileServer]), streams that outlive the timeouts ([StreamJSON], [SSEBroker],
// [Stream]), profiles that leak nothing ([Profiler]), a bounded database pool
// ([DatabaseConfig]) and middleware ([Chain]).
//
// It is not a framework: every part works alone, with [http.ServeMux] or any
// other router, behind a plain [http.Server], around any ResponseWriter. The
// package's example is a whole service.
//
// Any goroutine may call any function or method, unless its comment says
// otherwise.
//
// # Configuration
//
// [Timeout] has the defaults, [TimeoutWith] takes a configuration, and other
// parts do the same. For every configuration, unless its comment says otherwise:
//
//   - It is copied.
//   - A zero field means its default, a negative duration or size none.
//   - A nil pointer means all defaults, if no field is required.
//   - All invalid fields are reported at once: in an error, or by a panic if
//     the function returns none.
//
// # Two layers of time
//
// The server's timeouts guard against slow clients, [Timeout] against slow
// handlers: it responds for them, and extends WriteTimeout if necessary.
// Neither ends a profile, nor a stream or a large file after its first byte:
// each write moves the deadline.
//
// # In other routers
//
// Around a router every part works: Chain(...)(router). [RequestID],
// [Recovery], [Logging] and [Timeout] belong there.
//
// Inside a router, as its middleware, every part works except Timeout in chi
// and echo. They reuse a route's context once the route returns. A handler that
// Timeout has abandoned would read the parameters of another request.
// [FastTimeout] abandons none. The parameters of ServeMux
// ([http.Request.PathValue]) and gorilla/mux are safe.
//
// chi and gorilla/mux take a part by Use, echo by
// Use(echo.WrapMiddleware(part)). gin has no such function: put the chain
// around it. [FileServer], [Health], [SSEBroker] and [Profiler] are handlers,
// for Handle in chi and gorilla/mux, echo.WrapHandler and gin.WrapH.
//
// [Logging] logs the Pattern of its request. ServeMux sets it wherever Logging
// is, chi if Logging is inside. A middleware between the two that copies the
// request, by [http.Request.WithContext], hides it: put Logging inside of that.
// For other routers, put Logging inside and add the pattern with
// [LoggingConfig].Attrs.
package conduit

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"os"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Version is the release that this copy of the package is. Releases follow
// semantic versioning.
const Version = "1.0.0"

// Config describes a [Server].
type Config struct {
	// Address is the host:port of [Server.ListenAndServe]. Default: ":8080".
	Address string

	// Handler is required.
	Handler http.Handler

	// ReadTimeout bounds reading a whole request. Default: 15 seconds.
	ReadTimeout time.Duration

	// ReadHeaderTimeout bounds reading a request's header, against clients that
	// send byte by byte. Default: 10 seconds.
	ReadHeaderTimeout time.Duration

	// WriteTimeout bounds a response, from the end of the request's header.
	// Default: 15 seconds.
	WriteTimeout time.Duration

	// IdleTimeout bounds a connection's wait for its next request. Default: 60
	// seconds.
	IdleTimeout time.Duration

	// MaxHeaderBytes bounds a request's header; HTTP/1 allows 4096 bytes more.
	// Default: 1 MiB. Negative is an error. A larger header gets 431, or on HTTP/2
	// a GOAWAY if far larger, and no middleware sees it.
	MaxHeaderBytes int

	// EnableHTTP2 offers HTTP/2 over TLS, by ALPN. [DefaultConfig] sets it.
	EnableHTTP2 bool

	// EnableH2C accepts cleartext HTTP/2, for trusted networks: with prior
	// knowledge (RFC 9113, Section 3.3), not by an upgrade from HTTP/1.1.
	EnableH2C bool

	// CertFile and KeyFile name a certificate chain and its private key, in PEM,
	// and turn on TLS. A handshake, at most once a second, reloads them if they
	// changed. A pair that does not load is logged once per change, and the old
	// one stays.
	CertFile, KeyFile string

	// TLSConfig turns on TLS too. It needs certificates unless CertFile is set,
	// which wins. Without CipherSuites a clone of it gets Go's secure ones except
	// CBC mode. The configs of its GetConfigForClient are completed too.
	TLSConfig *tls.Config

	// MinTLSVersion is the oldest TLS version to accept. Default:
	// tls.VersionTLS12; older is an error. A newer MinVersion of TLSConfig wins.
	MinTLSVersion uint16

	// Database, if set, is applied by [New].
	Database *DatabaseConfig

	// Logger gets all log lines. Default: [slog.Default] when [New] runs.
	Logger *slog.Logger
}

// DefaultConfig returns the defaults of [Config] for a handler.
func DefaultConfig(h http.Handler) *Config {
	return &Config{
		Address:           ":8080",
		Handler:           h,
		ReadTimeout:       15 * time.Second,
		ReadHeaderTimeout: 10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    1 << 20,
		EnableHTTP2:       true,
		MinTLSVersion:     tls.VersionTLS12,
	}
}

func (c *Config) withDefaults() (Config, error) {
	var d Config
	if c != nil {
		d = *c
	}

	defaults := DefaultConfig(d.Handler)
	d.Address = cmp.Or(d.Address, defaults.Address)
	d.ReadTimeout = cmp.Or(d.ReadTimeout, defaults.ReadTimeout)
	d.ReadHeaderTimeout = cmp.Or(d.ReadHeaderTimeout, defaults.ReadHeaderTimeout)
	d.WriteTimeout = cmp.Or(d.WriteTimeout, defaults.WriteTimeout)
	d.IdleTimeout = cmp.Or(d.IdleTimeout, defaults.IdleTimeout)
	d.MaxHeaderBytes = cmp.Or(d.MaxHeaderBytes, defaults.MaxHeaderBytes)
	d.MinTLSVersion = cmp.Or(d.MinTLSVersion, defaults.MinTLSVersion)
	if d.Logger == nil {
		d.Logger = slog.Default()
	}

	var errs errorList
	if isNil(d.Handler) {
		errs.add("Handler: is required")
	}
	if err := checkAddress(d.Address); err != nil {
		errs.add("Address: %w", err)
	}
	errs.addShort("ReadTimeout", d.ReadTimeout)
	errs.addShort("ReadHeaderTimeout", d.ReadHeaderTimeout)
	errs.addShort("WriteTimeout", d.WriteTimeout)
	errs.addShort("IdleTimeout", d.IdleTimeout)
	if d.MaxHeaderBytes < 0 {
		errs.add("MaxHeaderBytes: %d is negative", d.MaxHeaderBytes)
	}
	if v := d.MinTLSVersion; v != tls.VersionTLS12 && v != tls.VersionTLS13 {
		errs.add("MinTLSVersion: %s is not supported, only TLS 1.2 and TLS 1.3 are", tls.VersionName(v))
	}
	switch {
	case d.CertFile == "" && d.KeyFile != "":
		errs.add("CertFile: is required with KeyFile")
	case d.CertFile != "" && d.KeyFile == "":
		errs.add("KeyFile: is required with CertFile")
	}

	if d.TLSConfig != nil {
		d.checkTLS(&errs)
	}
	if d.Database != nil {
		if _, err := d.Database.withDefaults("Database."); err != nil {
			errs = append(errs, err)
		}
	}
	return d, errors.Join(errs...)
}

func checkAddress(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		if _, number := strconv.Atoi(address); number == nil {
			return fmt.Errorf("%q is a port alone: \":%s\" is every address of this machine", address, address)
		}
		return err
	}
	_, err = net.LookupPort("tcp", port)
	return err
}

// checkTLS adds the errors of TLSConfig.
func (c *Config) checkTLS(errs *errorList) {
	t := c.TLSConfig
	if c.CertFile == "" && c.KeyFile == "" && len(t.Certificates) == 0 && t.GetCertificate == nil && t.GetConfigForClient == nil {
		errs.add("TLSConfig: has no certificate, and CertFile is not set")
	}
	if v := t.MinVersion; v != 0 && v != tls.VersionTLS12 && v != tls.VersionTLS13 {
		errs.add("TLSConfig: MinVersion %s is not supported, only TLS 1.2 and TLS 1.3 are", tls.VersionName(v))
	}
	if t.MaxVersion != 0 && t.MaxVersion < max(t.MinVersion, c.MinTLSVersion) {
		errs.add("TLSConfig: MaxVersion %s is older than the minimum", tls.VersionName(t.MaxVersion))
	}
	for i, cert := range t.Certificates {
		if len(cert.Certificate) == 0 {
			errs.add("TLSConfig: certificate %d is empty", i+1)
		}
	}
	if c.EnableHTTP2 && t.CipherSuites != nil && max(t.MinVersion, c.MinTLSVersion) < tls.VersionTLS13 &&
		!slices.Contains(t.CipherSuites, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256) &&
		!slices.Contains(t.CipherSuites, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256) {
		errs.add("TLSConfig: CipherSuites lacks the suite that HTTP/2 requires, TLS_ECDHE_*_WITH_AES_128_GCM_SHA256 (RFC 9113, Section 9.2.2)")
	}
}

// errorList collects the errors of a configuration, for [errors.Join].
type errorList []error

// add adds an error whose text starts with the name of the field.
func (f *errorList) add(format string, args ...any) {
	*f = append(*f, fmt.Errorf("conduit: "+format, args...))
}

// addShort adds an error for a duration that must be a number without its unit.
func (f *errorList) addShort(field string, d time.Duration) {
	if 0 < d && d < time.Millisecond {
		f.add("%s: %v: too short; is a unit such as time.Second missing?", field, d)
	}
}

// isNil reports whether h can do nothing but panic.
func isNil(h http.Handler) bool {
	switch h := h.(type) {
	case nil:
		return true
	case http.HandlerFunc:
		return h == nil
	case *http.ServeMux:
		return h == nil
	}
	return false
}

// checkHandler panics if a middleware gets no handler.
func checkHandler(middleware string, h http.Handler) {
	if isNil(h) {
		panic("conduit: " + middleware + ": the handler is nil")
	}
}

// Server is an [http.Server] that is safe as configured and stops without
// losing a request. Like an http.Server it does not serve again after Shutdown
// or Close.
//
// An aborted response never looks whole: on HTTP/1.1 its last chunk is missing,
// on HTTP/2 its stream is reset, and on HTTP/1.0, which nginx before 1.29.7
// speaks to upstreams by default, the connection is reset. Over a Unix socket,
// which has no reset, and after [Server.Close], which sends none, HTTP/1.0
// clients cannot tell.
type Server struct {
	http    *http.Server
	address string
	logger  *slog.Logger
	prepare sync.Once
	secure  bool // speaks TLS; set by prepare

	draining
	requests atomic.Int64 // handlers that run
	hijacked atomic.Int64 // those of them that have hijacked their connection
	conns    atomic.Int64 // len(open)
	newConns atomic.Int64 // how many of open are new

	mu        sync.Mutex // guards the fields below, and those of draining that say so
	addr      net.Addr
	listeners map[*drainListener]struct{}
	open      map[net.Conn]bool // true: new, no request was read from it
	cancels   []context.CancelCauseFunc

	onStopped func() // set before serving; called once, before stopped is closed
}

// draining is the state of a Server that ends. Drain starts it: the context
// drain ends and sayClose is set. The delay of a GracefulShutdown clears
// sayClose for its last fifth. Then Shutdown stops accepting, sets sayClose
// again for the connections that remain, and waits for them. Last, it closes
// stopped.
type draining struct {
	drain    context.Context // ends with Drain; streams follow it without a goroutine
	endDrain context.CancelFunc
	sayClose atomic.Bool   // responses carry Connection: close
	changed  chan struct{} // wakes wait
	stopped  chan struct{} // closed when the server has stopped

	drained        atomic.Int64 // requests that ended while draining
	hijackedWaited atomic.Int64 // those of them that had hijacked

	cancelShutdown context.CancelCauseFunc // ends the time of the shutdown; nil before Shutdown or Close; guarded by mu
	report         shutdownReport          // guarded by mu
}

func (d *draining) isDraining() bool { return d.drain.Err() != nil }

// New returns a Server and opens no port. Certificate files that do not load
// are an error.
func New(cfg *Config) (*Server, error) {
	c, err := cfg.withDefaults()
	errs := []error{err}

	var certs *certificateFiles
	if c.CertFile != "" && c.KeyFile != "" {
		certs, err = newCertificateFiles(c.CertFile, c.KeyFile, c.Logger)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if c.Database != nil {
		if err := c.Database.Apply(); err != nil {
			return nil, err
		}
	}

	s := &Server{
		address:   c.Address,
		logger:    c.Logger,
		listeners: make(map[*drainListener]struct{}),
		open:      make(map[net.Conn]bool),
	}
	s.changed, s.stopped = make(chan struct{}, 1), make(chan struct{})
	s.drain, s.endDrain = context.WithCancel(context.Background())

	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(c.EnableHTTP2)
	protocols.SetUnencryptedHTTP2(c.EnableH2C)
	s.http = &http.Server{
		Addr:              c.Address,
		Handler:           c.Handler,
		ReadTimeout:       c.ReadTimeout,
		ReadHeaderTimeout: c.ReadHeaderTimeout,
		WriteTimeout:      c.WriteTimeout,
		IdleTimeout:       c.IdleTimeout,
		MaxHeaderBytes:    c.MaxHeaderBytes,
		Protocols:         protocols,
		ErrorLog:          log.New(errorLog{c.Logger}, "", 0),
	}

	if certs != nil || c.TLSConfig != nil {
		s.http.TLSConfig = c.completeTLS(c.TLSConfig, certs)
	}
	return s, nil
}

// completeTLS completes a clone of base, which may be nil.
func (c *Config) completeTLS(base *tls.Config, certs *certificateFiles) *tls.Config {
	t := &tls.Config{}
	if base != nil {
		t = base.Clone()
	}

	t.MinVersion = max(t.MinVersion, c.MinTLSVersion)
	if certs != nil {
		t.Certificates = nil
		t.GetCertificate = certs.get
	}

	if get := t.GetConfigForClient; get != nil {
		t.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			forClient, err := get(hello)
			if err != nil || forClient == nil {
				return nil, err
			}
			forClient = c.completeTLS(forClient, certs)
			if forClient.NextProtos == nil && c.EnableHTTP2 { // net/http sets only those of t
				forClient.NextProtos = []string{"h2", "http/1.1"}
			}
			return forClient, nil
		}
	}

	if t.CipherSuites == nil {
		// Suites in CBC mode are open to timing attacks (Lucky 13), which Go
		// prevents only in part. Every client since 2014 has a better one.
		for _, suite := range tls.CipherSuites() {
			if !strings.Contains(suite.Name, "_CBC_") {
				t.CipherSuites = append(t.CipherSuites, suite.ID)
			}
		}
	}
	return t
}

// checkMade panics if New has not made s.
func (s *Server) checkMade() {
	if s.http == nil {
		panic("conduit: Server: was not made by New")
	}
}

// HTTPServer returns the http.Server inside, for fields that Config lacks. Set
// them before serving. A ConnState or BaseContext set there is called too; a
// Handler replaces Config.Handler, an ErrorLog the Server's own. Stop with the
// Server's methods: the others do not drain.
func (s *Server) HTTPServer() *http.Server {
	s.checkMade()
	return s.http
}

// Addr returns the address of the first listener, with its real port, or nil
// until the server listens.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addr
}

// ListenAndServe listens on Config.Address over TCP and calls [Server.Serve].
// Its error names an address that is taken.
func (s *Server) ListenAndServe() error {
	s.checkMade()
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		return fmt.Errorf("conduit: Address: %w", err)
	}
	return s.Serve(l)
}

// Serve accepts connections on l, over TLS if the server has a certificate.
// When a shutdown or Close is done it returns nil, never
// [http.ErrServerClosed]: a main that then returns aborts nothing
// (golang/go#19579). Any other end is an error. Serve closes l. Several
// listeners may be served at once.
func (s *Server) Serve(l net.Listener) error {
	s.checkMade()
	s.prepare.Do(s.install)
	dl := &drainListener{Listener: l, stopped: make(chan struct{})}

	s.mu.Lock()
	if s.cancelShutdown != nil {
		s.mu.Unlock()
		l.Close()
		<-s.stopped
		return nil
	}

	s.listeners[dl] = struct{}{}
	if s.addr == nil {
		s.addr = l.Addr()
	}
	s.mu.Unlock()
	s.logger.Info("listening", "addr", l.Addr().String(), "tls", s.secure)

	var err error
	if s.secure {
		err = s.http.ServeTLS(dl, "", "")
	} else {
		err = s.http.Serve(dl)
	}
	dl.Close() // net/http leaves it open if it fails before it accepts

	s.mu.Lock()
	delete(s.listeners, dl)
	stopping := s.cancelShutdown != nil
	s.mu.Unlock()

	if stopping {
		<-s.stopped
		return nil
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil // stopped by HTTPServer's own methods
	}
	return fmt.Errorf("conduit: Serve: %w", err)
}

// install puts the server's own handler and hooks around those of HTTPServer.
func (s *Server) install() {
	hs := s.http
	s.secure = hs.TLSConfig != nil // net/http sets one even without TLS, once it serves
	if hs.Handler == nil {
		hs.Handler = http.DefaultServeMux // as net/http takes it
	}
	hs.Handler = &serverHandler{server: s, next: hs.Handler, options: !hs.DisableGeneralOptionsHandler}
	hs.DisableGeneralOptionsHandler = true // or a drain would not see OPTIONS *

	connState := hs.ConnState
	hs.ConnState = func(c net.Conn, state http.ConnState) {
		s.trackConn(c, state)
		if connState != nil {
			connState(c, state)
		}
	}

	baseContext := hs.BaseContext
	hs.BaseContext = func(l net.Listener) context.Context {
		ctx := context.Background()
		if baseContext != nil {
			if dl, ok := l.(*drainListener); ok {
				l = dl.Listener
			}
			ctx = baseContext(l)
		}
		ctx, cancel := context.WithCancelCause(ctx)
		s.mu.Lock()
		s.cancels = append(s.cancels, cancel)
		s.mu.Unlock()
		return context.WithValue(ctx, serverKey{}, s)
	}
}

// trackConn records the open connections, and which of them have sent no
// request yet: http.Server.Shutdown waits more than five seconds for those.
func (s *Server) trackConn(c net.Conn, state http.ConnState) {
	if (state == http.StateActive || state == http.StateIdle) && s.newConns.Load() == 0 {
		return // nearly always
	}
	s.mu.Lock()
	switch state {
	case http.StateNew:
		s.open[c] = true
		s.newConns.Add(1)
	default:
		if s.open[c] {
			s.open[c] = false
			s.newConns.Add(-1)
		}
		if state == http.StateHijacked || state == http.StateClosed {
			delete(s.open, c)
		}
	}
	s.conns.Store(int64(len(s.open)))
	s.mu.Unlock()
	s.notify()
}

// notify wakes a shutdown that waits for connections and requests to end.
func (s *Server) notify() {
	if !s.isDraining() {
		return
	}
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Drain starts to drain: the channel of [Draining] closes, [Health] responds
// with 503, and responses carry Connection: close (on HTTP/2 a GOAWAY).
// Connections and requests are accepted until Shutdown or Close. A second call
// does nothing.
func (s *Server) Drain() {
	s.checkMade()
	if !s.isDraining() {
		s.sayClose.Store(true)
		s.endDrain()
	}
}

// Draining returns a channel that is closed when the server starts to drain,
// for code outside of requests. Handlers use the function [Draining].
func (s *Server) Draining() <-chan struct{} {
	s.checkMade()
	return s.drain.Done()
}

// Shutdown drains, stops accepting, waits until every handler has returned and
// its response is sent, and returns nil. If ctx ends first, it cancels the
// contexts of the remaining requests, with a cause, and closes their
// connections; the error counts them and wraps the [context.Cause] of ctx. It
// also waits for handlers that a [Timeout] has abandoned or that have hijacked
// their connection, which stays open. A handler must not wait for Shutdown.
//
// [GracefulShutdown] adds a delay, for load balancers, and hooks. Shutdown may
// be called before Serve, together with Close, and again. Each call returns
// when the server has stopped, with the same result. The first context that
// ends counts.
func (s *Server) Shutdown(ctx context.Context) error {
	s.checkMade()
	return s.shutdown(ctx).err()
}

// shutdownReport is the result of a shutdown.
type shutdownReport struct {
	drained        int64 // requests that ended while the server drained
	hijackedWaited int64 // those of them that had hijacked their connection
	aborted        int64 // connections closed when the time was up
	unfinished     int64 // requests whose handlers had not returned by then
	hijackedLeft   int64 // those of them that had hijacked
	accepting      time.Duration
	lingering      time.Duration
	waiting        time.Duration
	cause          error
}

func (r shutdownReport) err() error {
	if r.aborted == 0 && r.unfinished == 0 {
		return nil
	}
	return fmt.Errorf("conduit: Shutdown: %d connections aborted, %d requests unfinished, %d of them hijacked: %w", r.aborted, r.unfinished, r.hijackedLeft, r.cause)
}

// errShutdown is the cause of the contexts that a shutdown cancels.
var errShutdown = errors.New("conduit: Shutdown: out of time")

func (s *Server) shutdown(ctx context.Context) shutdownReport {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if cancelFirst := s.claimShutdown(cancel); cancelFirst != nil {
		select {
		case <-s.stopped:
		case <-ctx.Done():
			cancelFirst(context.Cause(ctx))
			<-s.stopped
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.report
	}

	var report shutdownReport
	start := time.Now()
	phase := func(d *time.Duration) {
		*d = time.Since(start)
		start = start.Add(*d)
	}

	s.Drain()
	s.stopAccepting(ctx)
	phase(&report.accepting)

	s.sayClose.Store(true)
	s.linger(ctx)
	phase(&report.lingering)

	for c, isNew := range s.openConns() {
		if isNew {
			c.Close()
		}
	}

	closed := make(chan struct{})
	go func() {
		// It waits without a deadline for the accept loops, and one of them may
		// wait for a connection to close.
		s.http.Shutdown(ctx)
		close(closed)
	}()
	select {
	case <-closed:
	case <-ctx.Done():
	}

	// A handler may outlive its connection on HTTP/2, and its request behind a
	// Timeout.
	s.wait(ctx, func() bool { return s.requests.Load() == 0 })

	report.drained = s.drained.Load()
	report.hijackedWaited = s.hijackedWaited.Load()
	if ctx.Err() != nil {
		report.aborted, report.unfinished, report.hijackedLeft = s.conns.Load(), s.requests.Load(), s.hijacked.Load()
		report.cause = context.Cause(ctx)
		s.abort(errShutdown, resetConn)
	}
	<-closed
	phase(&report.waiting)

	s.mu.Lock()
	s.report = report
	s.mu.Unlock()
	s.cancelRequests(http.ErrServerClosed)
	s.stop()
	return report
}

// stop calls onStopped, which closes the Profiler of NewProfilingServer, and then
// closes stopped.
func (s *Server) stop() {
	if s.onStopped != nil {
		s.onStopped()
	}
	close(s.stopped)
}

// claimShutdown returns nil to the first caller, which must call stop when the
// server has stopped. Others get the function that ends the first one's time.
func (s *Server) claimShutdown(cancel context.CancelCauseFunc) (cancelFirst context.CancelCauseFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cancelFirst = s.cancelShutdown
	if cancelFirst == nil {
		s.cancelShutdown = cancel
	}
	return cancelFirst
}

// stopAccepting closes the listeners once their queues are empty. It returns
// when the accept loops have ended: until then there may be a connection that
// nothing has counted.
func (s *Server) stopAccepting(ctx context.Context) {
	s.mu.Lock()
	listeners := maps.Clone(s.listeners)
	s.mu.Unlock()
	for l := range listeners {
		l.stop()
	}
	for l := range listeners {
		select {
		case <-l.stopped:
		case <-ctx.Done():
		}
	}
}

// linger waits for connections to end by themselves. net/http drops a request
// that it reads after its Shutdown has started. So a client that is about to
// send one gets time to do so, and the response tells it to close. If all
// connections are new, 100 ms are enough for their first requests, but not for
// a TLS handshake.
func (s *Server) linger(ctx context.Context) {
	all, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
	defer cancel()
	first, cancelFirst := context.WithTimeout(all, 100*time.Millisecond)
	defer cancelFirst()
	s.wait(first, func() bool { return s.conns.Load() == 0 })
	s.wait(all, func() bool {
		conns := s.conns.Load()
		return conns == 0 || !s.secure && conns == s.newConns.Load()
	})
}

// wait returns when done reports true or ctx ends. It asks done again whenever
// a connection or a request has ended.
func (s *Server) wait(ctx context.Context, done func() bool) {
	for !done() {
		select {
		case <-s.changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) openConns() map[net.Conn]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.open)
}

// abort cancels all requests and closes the listeners and connections.
// Connections go first: http.Server.Close waits for the accept loops, which may
// wait for one of them.
func (s *Server) abort(cause error, closeConn func(net.Conn)) error {
	s.cancelRequests(cause)
	for c := range s.openConns() {
		closeConn(c)
	}
	return s.http.Close()
}

// cancelRequests cancels all requests before it returns: a connection that
// closes first would give its requests a cause of its own.
func (s *Server) cancelRequests(cause error) {
	s.mu.Lock()
	cancels := s.cancels
	s.mu.Unlock()
	for _, cancel := range cancels {
		cancel(cause)
	}
}

// Close cancels all requests and closes listeners and connections at once,
// except hijacked ones. It returns the error of closing the listeners. During a
// Shutdown it ends the wait and returns when the server has stopped. Later
// calls return nil.
func (s *Server) Close() error {
	s.checkMade()
	if cancelFirst := s.claimShutdown(func(error) {}); cancelFirst != nil {
		cancelFirst(http.ErrServerClosed)
		<-s.stopped
		return nil
	}
	s.Drain()
	// Not by resets: they would lose the end of whole responses that clients have
	// not read yet.
	err := s.abort(http.ErrServerClosed, func(c net.Conn) { c.Close() })
	s.stop()
	return err
}

// drainListener is a listener that is emptied before it is closed. Closing a
// listener resets the connections in its queue, and with them requests that
// clients have already sent.
type drainListener struct {
	net.Listener
	mu       sync.Mutex // guards stopping; held while stop sets a deadline
	stopping bool
	stopped  chan struct{} // closed when the listener is closed and nothing is accepted any more
	once     sync.Once
}

// Accept runs on one goroutine, net/http's. Once told to stop, it goes on until
// the queue is empty and then closes the listener itself, at once: connections
// that come between the last look and the close are lost.
func (l *drainListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		return c, nil
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stopping {
		return nil, err
	}

	if d, ok := l.Listener.(deadliner); ok {
		// A deadline in the past would not even look at the queue. A look that
		// took long was interrupted, because the processors are busy: it may have
		// missed a connection, or one may have come since.
		for range 20 {
			start := time.Now()
			d.SetDeadline(start.Add(20 * time.Microsecond))
			if c, err = l.Listener.Accept(); err == nil {
				d.SetDeadline(time.Unix(1, 0))
				return c, nil
			}
			if time.Since(start) < 200*time.Microsecond {
				break
			}
		}
	}
	l.Close()
	return nil, http.ErrServerClosed
}

type deadliner interface{ SetDeadline(time.Time) error }

// stop makes Accept empty the queue and close the listener. A listener without
// deadlines is closed here, which ends Accept.
func (l *drainListener) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stopping = true
	if d, ok := l.Listener.(deadliner); !ok || d.SetDeadline(time.Unix(1, 0)) != nil {
		l.Listener.Close()
	}
}

// Close is called when nothing is accepted any more.
func (l *drainListener) Close() error {
	var err error
	l.once.Do(func() {
		err = l.Listener.Close()
		close(l.stopped)
	})
	return err
}

// certificateFiles serves the certificate of two files and reads them again
// when they change.
type certificateFiles struct {
	certFile, keyFile string
	logger            *slog.Logger
	current           atomic.Pointer[tls.Certificate]

	mu      sync.Mutex // guards the fields below; held by the handshake that looks at the files
	checked time.Time
	seen    [2]os.FileInfo // the files as they were last read; nil if missing
}

func newCertificateFiles(certFile, keyFile string, logger *slog.Logger) (*certificateFiles, error) {
	c := &certificateFiles{certFile: certFile, keyFile: keyFile, logger: logger}
	c.checked, c.seen = time.Now(), c.stat()
	return c, c.load()
}

func (c *certificateFiles) stat() (infos [2]os.FileInfo) {
	for i, name := range []string{c.certFile, c.keyFile} {
		infos[i], _ = os.Stat(name)
	}
	return infos
}

// load reads the files that stat saw. It does not read a pipe, which may never
// end.
func (c *certificateFiles) load() error {
	var pems [2][]byte
	var errs errorList
	for i, file := range []struct{ field, name string }{{"CertFile", c.certFile}, {"KeyFile", c.keyFile}} {
		if info := c.seen[i]; info != nil && !info.Mode().IsRegular() {
			errs.add("%s: %s: is not a regular file", file.field, file.name)
			continue
		}
		var err error
		if pems[i], err = os.ReadFile(file.name); err != nil {
			errs.add("%s: %w", file.field, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}

	cert, err := tls.X509KeyPair(pems[0], pems[1])
	if err != nil {
		return fmt.Errorf("conduit: CertFile, KeyFile: %s, %s: %w", c.certFile, c.keyFile, err)
	}
	c.current.Store(&cert)
	return nil
}

// get is a tls.Config.GetCertificate. No handshake waits for another one that
// looks at the files.
func (c *certificateFiles) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c.mu.TryLock() {
		c.refresh()
		c.mu.Unlock()
	}
	return c.current.Load(), nil
}

func (c *certificateFiles) refresh() {
	now := time.Now()
	if now.Sub(c.checked) < time.Second {
		return
	}
	c.checked = now

	seen := c.stat()
	if fileUnchanged(seen[0], c.seen[0]) && fileUnchanged(seen[1], c.seen[1]) {
		return
	}
	c.seen = seen

	if err := c.load(); err != nil {
		c.logger.Error("certificate not reloaded, the old one stays in service", "err", err)
		return
	}
	c.logger.Info("certificate reloaded", "file", c.certFile)
}

// fileUnchanged reports whether two looks saw the same file, not replaced and
// not written to. Files of other file systems than the system's have no
// identity to compare.
func fileUnchanged(a, b os.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return (os.SameFile(a, b) || !os.SameFile(a, a)) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// errorLog gets the lines of net/http's ErrorLog, which are free text. Their
// prefixes give the level: scanners on the internet must not hide the lines
// that a programmer must see.
type errorLog struct{ logger *slog.Logger }

func (l errorLog) Write(p []byte) (int, error) {
	text := string(bytes.TrimSpace(p))
	level := slog.LevelWarn
	switch {
	case strings.HasPrefix(text, "http: panic serving"), strings.HasPrefix(text, "http2: panic serving"),
		strings.HasPrefix(text, "http: Accept error"):
		level = slog.LevelError
	case strings.HasPrefix(text, "http: TLS handshake error"):
		if strings.HasSuffix(text, "EOF") || strings.Contains(text, "connection reset") || strings.Contains(text, "i/o timeout") {
			level = slog.LevelDebug
		}
	}
	l.logger.Log(context.Background(), level, "net/http", "err", text)
	return len(p), nil
}

// serverHandler is the outermost handler of a Server.
type serverHandler struct {
	server  *Server
	next    http.Handler
	options bool // respond to OPTIONS * in place of net/http
}

func (h *serverHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	growStack(0) // on HTTP/2 each request has a new goroutine
	x := &responseWriter{ResponseWriter: w, incoming: r, server: h.server, outermost: true}
	h.server.requests.Add(1)
	defer x.finish()
	if !h.options || r.RequestURI != "*" || r.Method != http.MethodOptions { // a ping (RFC 9110, Section 9.3.7)
		h.next.ServeHTTP(x, r)
	}
	x.returned = true
}

// growStack has a frame larger than the stack of a new goroutine, which so grows
// while there is one frame to copy. Below a handler that writes a header there
// are a dozen, and to copy them takes a microsecond. It is called with 0, with
// which it does nothing.
//
//go:noinline
func growStack(i int) byte {
	if i == 0 {
		return 0
	}
	var frame [3 << 10]byte
	return frame[i]
}

type serverKey struct{}

func serverFrom(ctx context.Context) *Server {
	s, _ := ctx.Value(serverKey{}).(*Server)
	return s
}

// Draining returns a channel that is closed when the server of the request with
// this context starts to drain. Streams, long polls and other handlers that
// last should then end. Outside a conduit [Server] it is nil.
func Draining(ctx context.Context) <-chan struct{} {
	return drainContext(ctx).Done()
}

// drainContext returns a context that ends when the server of the request with
// this context starts to drain. Outside a [Server] it never ends. The streams
// of stream.go follow it with [context.AfterFunc].
func drainContext(ctx context.Context) context.Context {
	if s := serverFrom(ctx); s != nil {
		return s.drain
	}
	return context.Background()
}

// Logger returns the logger that all parts use for the request with this
// context: Config.Logger, or [slog.Default] outside a conduit [Server]. Behind
// [RequestID] it has the attribute request_id.
func Logger(ctx context.Context) *slog.Logger {
	logger := slog.Default()
	if s := serverFrom(ctx); s != nil {
		logger = s.logger
	}
	if id := RequestIDFrom(ctx); id != "" {
		logger = logger.With("request_id", id)
	}
	return logger
}

// healthTimeout bounds the checks of one health request together.
const healthTimeout = 5 * time.Second

// Health returns a handler for load balancers and orchestrators. It responds
// with 200 {"status":"ok"} if every check returns nil, else 503
// {"status":"failing"}. Once the server drains it responds with 503
// {"status":"draining"} and runs no check. Responses have Cache-Control:
// no-store. Methods other than GET and HEAD get 405.
//
// Checks run one after the other, within 5 seconds together; requests that come
// meanwhile share the result. A check's context ends with the 5 seconds and has
// the values of the request that started the checks. A check fails if it
// returns an error, panics or is late. Until a late one returns, requests get
// 503 at once and no check runs. Errors are logged, never sent. Health panics
// if a check is nil.
func Health(checks ...func(context.Context) error) http.Handler {
	for i, check := range checks {
		if check == nil {
			panic(fmt.Sprintf("conduit: Health: check %d is nil", i+1))
		}
	}
	return &health{checks: slices.Clone(checks)}
}

type health struct {
	checks []func(context.Context) error

	mu  sync.Mutex // guards run
	run *healthRun // nil while none runs
}

// healthRun is one run of the checks. It may outlive the request that started
// it.
type healthRun struct {
	context.Context // ends with the time of the checks
	current         atomic.Int64
	done            chan struct{} // closed when they have returned
	err             error         // set before done is closed
}

func (h *health) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !requireGetOrHead(w, r) {
		return
	}
	status, body := http.StatusOK, `{"status":"ok"}`
	select {
	case <-Draining(r.Context()):
		status, body = http.StatusServiceUnavailable, `{"status":"draining"}`
	default:
		err := h.check(r.Context())
		if r.Context().Err() == context.Canceled {
			panic(http.ErrAbortHandler) // the client has disconnected: that is no error of ours
		}
		if err != nil {
			status, body = http.StatusServiceUnavailable, `{"status":"failing"}`
			Logger(r.Context()).Error("health check failed", "err", err)
		}
	}

	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

// check returns the result of the checks. It starts them unless they run
// already.
func (h *health) check(ctx context.Context) error {
	if len(h.checks) == 0 {
		return nil
	}
	run := h.join(ctx)
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-run.Context.Done(): // right after run.done, or when the time is up
	}
	select {
	case <-run.done:
		return run.err
	default:
		return fmt.Errorf("conduit: Health: check %d has not returned in time", run.current.Load())
	}
}

func (h *health) join(ctx context.Context) *healthRun {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.run != nil {
		return h.run
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTimeout)
	run := &healthRun{Context: ctx, done: make(chan struct{})}
	h.run = run

	go func() {
		defer cancel()
		defer close(run.done)
		var errs []error
		for i, check := range h.checks {
			run.current.Store(int64(i + 1))
			if err := <-runSafely(ctx, check); err != nil {
				errs = append(errs, fmt.Errorf("conduit: Health: check %d: %w", i+1, err))
			}
		}
		run.err = errors.Join(errs...)

		h.mu.Lock()
		h.run = nil
		h.mu.Unlock()
	}()
	return run
}

// runSafely runs f on a goroutine of its own. The channel gets its error, also
// if f panics or ends its goroutine.
func runSafely(ctx context.Context, f func(context.Context) error) <-chan error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("ended its goroutine")
		defer func() {
			if value := recover(); value != nil {
				err = fmt.Errorf("panic: %v\n%s", value, debug.Stack())
			}
			done <- err
		}()
		err = f(ctx)
	}()
	return done
}

// requireGetOrHead reports whether a request is a GET or a HEAD. It responds to
// other requests with 405.
func requireGetOrHead(w http.ResponseWriter, r *http.Request) bool {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return true
	}
	w.Header().Set("Allow", "GET, HEAD")
	http.Error(w, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
	return false
}

// Middleware wraps a handler in another one.
type Middleware = func(http.Handler) http.Handler

// Chain composes middleware into one, the first outermost. It panics if one is
// nil or returns nil.
//
// The usual order is [RequestID], [Recovery], [Logging], [Timeout],
// [Compression]: the log line then has the id and Recovery's status for a
// panic, and a timeout can replace a response that Compression holds back.
func Chain(mw ...Middleware) Middleware {
	for i, m := range mw {
		if m == nil {
			panic(fmt.Sprintf("conduit: Chain: middleware %d is nil", i+1))
		}
	}
	mw = slices.Clone(mw)
	return func(h http.Handler) http.Handler {
		checkHandler("Chain", h)
		for i, m := range slices.Backward(mw) {
			if h = m(h); isNil(h) {
				panic(fmt.Sprintf("conduit: Chain: middleware %d returns no handler", i+1))
			}
		}
		return h
	}
}

// responseWriter is one request and its response: the ResponseWriter that all
// middleware shares, and with RequestID the request's context too. The Server
// makes it, or else the first middleware that needs it. Each finds it by a type
// assertion on its ResponseWriter and fills in its part. A context may outlive
// its request, so a responseWriter is never used again.
type responseWriter struct {
	http.ResponseWriter
	context.Context // set by RequestID
	incoming        *http.Request

	server    *Server // nil outside a conduit Server
	outermost bool    // made by the Server
	returned  bool    // the server's handler has returned and not panicked
	finished  atomic.Bool
	aborted   atomic.Bool  // set by abortResponse: writes fail
	deadline  atomic.Int64 // of writes, in Unix nanoseconds, or noDeadline; 0 until it is set

	id       [1]string // set by RequestID, as the value of its field
	status   int       // 0 until the header is written; never informational
	bytes    int64     // of the body, as the handler wrote it
	flushed  bool      // nothing was written since the last flush
	hijacked bool
	recovers bool // set by Recovery, before the handlers inside it run
}

// responseWriterOf returns w if it is a responseWriter. Otherwise it returns a
// new one around w, which knows what the next responseWriter further out knows:
// a Timeout's wrapper, or somebody else's, may be between the two.
func responseWriterOf(w http.ResponseWriter, r *http.Request) *responseWriter {
	if x, ok := w.(*responseWriter); ok {
		return x
	}
	x := &responseWriter{ResponseWriter: w, incoming: r}
	for w = unwrap(w); w != nil; w = unwrap(w) {
		if outer, ok := w.(*responseWriter); ok {
			x.server, x.id[0], x.recovers = outer.server, outer.id[0], outer.recovers
			return x
		}
	}
	x.server, x.id[0] = serverFrom(r.Context()), RequestIDFrom(r.Context())
	return x
}

// fullWriter has the methods of net/http's own ResponseWriters. The wrappers of
// this package have them too, or they would hide something from a handler.
type fullWriter interface {
	http.ResponseWriter
	http.Flusher
	http.Hijacker
	http.Pusher
	io.ReaderFrom
	io.StringWriter
	FlushError() error
	CloseNotify() <-chan bool
	Unwrap() http.ResponseWriter // for [http.ResponseController]
}

var (
	_ fullWriter = (*responseWriter)(nil)
	_ fullWriter = (*compressWriter)(nil)
)

// unwrap returns the ResponseWriter inside w, or nil if w has no Unwrap.
func unwrap(w http.ResponseWriter) http.ResponseWriter {
	if u, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
		return u.Unwrap()
	}
	return nil
}

func (x *responseWriter) logger() *slog.Logger {
	if x.server != nil {
		return x.server.logger
	}
	return slog.Default()
}

// errFinished is the error of a write by a goroutine that has outlived its
// handler. The write would reach another request's buffer (HTTP/1) or crash the
// process (HTTP/2).
var errFinished = errors.New("conduit: write after the handler has returned")

// errAborted is the error of a write to an aborted response.
var errAborted = errors.New("conduit: write after the response was aborted")

// checkOpen returns an error if the response must not be used any more.
func (x *responseWriter) checkOpen() error {
	switch {
	case x.finished.Load():
		return errFinished
	case x.aborted.Load():
		return errAborted
	}
	return nil
}

// Unwrap is for [http.ResponseController].
func (x *responseWriter) Unwrap() http.ResponseWriter { return x.ResponseWriter }

// Header returns an empty header once the handler has returned.
func (x *responseWriter) Header() http.Header {
	if x.finished.Load() {
		return make(http.Header)
	}
	return x.ResponseWriter.Header()
}

// WriteHeader passes informational responses on, which do not set the status
// (RFC 9110, Section 15.2).
func (x *responseWriter) WriteHeader(status int) {
	switch {
	case x.checkOpen() != nil:
	case x.status != 0 || x.hijacked:
		logSuperfluous(x.logContext(), status)
	default:
		if isFinal(status) {
			x.recordStatus(status)
		}
		x.ResponseWriter.WriteHeader(status)
	}
}

// isFinal reports whether a status is the response's: not informational, and
// not invalid, for which net/http panics.
func isFinal(status int) bool {
	return 200 <= status && status <= 999 || status == http.StatusSwitchingProtocols
}

// logContext returns the context of the request, with its id.
func (x *responseWriter) logContext() context.Context {
	if x.Context != nil {
		return x
	}
	return x.incoming.Context()
}

func (x *responseWriter) Write(p []byte) (int, error) {
	if err := x.start(); err != nil {
		return 0, err
	}
	n, err := x.ResponseWriter.Write(p)
	x.count(int64(n))
	return n, err
}

// WriteString saves the copy that [io.WriteString] makes for a writer without
// it.
func (x *responseWriter) WriteString(p string) (int, error) {
	if err := x.start(); err != nil {
		return 0, err
	}
	n, err := io.WriteString(x.ResponseWriter, p)
	x.count(int64(n))
	return n, err
}

// count counts bytes of the body, which a response to a HEAD does not have.
func (x *responseWriter) count(n int64) {
	x.flushed = false
	if x.incoming.Method != http.MethodHead {
		x.bytes += n
	}
}

// ReadFrom keeps sendfile, which net/http uses only through this method.
func (x *responseWriter) ReadFrom(src io.Reader) (int64, error) {
	rf, ok := x.ResponseWriter.(io.ReaderFrom)
	if !ok {
		return io.Copy(struct{ io.Writer }{x}, src)
	}
	var first int64
	if x.status == 0 {
		var more bool
		var err error
		if first, more, err = copyFirst(x, src); !more {
			return first, err
		}
	}
	if err := x.start(); err != nil {
		return first, err
	}
	n, err := rf.ReadFrom(src)
	x.count(n)
	if err == nil && x.bytes == contentLength(x.Header()) {
		x.FlushError() // the bytes are on the connection already, unless that is TLS
	}
	return first + n, err
}

// copyFirst copies the first bytes of a body. A source that fails or panics at
// once then leaves the response unstarted, and one that panics later does not.
// It reports whether there is more.
func copyFirst(w io.Writer, src io.Reader) (n int64, more bool, err error) {
	n, err = io.CopyN(struct{ io.Writer }{w}, src, sniffLen)
	if err == io.EOF {
		return n, false, nil
	}
	return n, err == nil, err
}

// Flush is FlushError for callers that look for an [http.Flusher].
func (x *responseWriter) Flush() { x.FlushError() }

func (x *responseWriter) FlushError() error {
	if x.status == 0 && !canFlush(x.ResponseWriter) {
		return http.ErrNotSupported // and nothing has started
	}
	if err := x.start(); err != nil {
		return err
	}
	err := http.NewResponseController(x.ResponseWriter).Flush()
	x.flushed = err == nil
	return err
}

const noDeadline = -1

// The deadlines are forwarded here, and not through Unwrap, so that they end
// with the handler. A goroutine that outlives it would otherwise set those of
// the next request (HTTP/1) or crash the process (HTTP/2).

func (x *responseWriter) SetReadDeadline(deadline time.Time) error {
	if err := x.checkOpen(); err != nil {
		return err
	}
	return http.NewResponseController(x.ResponseWriter).SetReadDeadline(deadline)
}

func (x *responseWriter) SetWriteDeadline(deadline time.Time) error {
	if err := x.checkOpen(); err != nil {
		return err
	}
	if deadline.IsZero() {
		x.deadline.Store(noDeadline)
	} else {
		x.deadline.Store(deadline.UnixNano())
	}
	return http.NewResponseController(x.ResponseWriter).SetWriteDeadline(deadline)
}

func (x *responseWriter) EnableFullDuplex() error {
	if err := x.checkOpen(); err != nil {
		return err
	}
	return http.NewResponseController(x.ResponseWriter).EnableFullDuplex()
}

func (x *responseWriter) CloseNotify() <-chan bool { return closeNotify(x.incoming.Context()) }

func (x *responseWriter) Push(target string, opts *http.PushOptions) error {
	if err := x.checkOpen(); err != nil {
		return err
	}
	return push(x.ResponseWriter, target, opts)
}

func (x *responseWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if err := x.checkOpen(); err != nil {
		return nil, nil, err
	}
	conn, buf, err := http.NewResponseController(x.ResponseWriter).Hijack()
	if err == nil && !x.hijacked {
		x.hijacked = true
		if x.outermost {
			x.server.hijacked.Add(1)
		}
	}
	return conn, buf, err
}

// start is called before each write.
func (x *responseWriter) start() error {
	if err := x.checkOpen(); err != nil {
		return err
	}
	if x.hijacked {
		return http.ErrHijacked
	}
	if x.status == 0 {
		x.recordStatus(http.StatusOK)
	}
	return nil
}

// recordStatus notes the status just before the header is written.
func (x *responseWriter) recordStatus(status int) {
	x.status = status
	x.announceClose(status)
	closeIfTooLarge(x.ResponseWriter, x.incoming, status)
}

// announceClose tells the client to close the connection if the server drains.
// The decision is made when the header goes out, so that requests from before
// the drain are told too.
func (x *responseWriter) announceClose(status int) {
	if x.server != nil && x.server.sayClose.Load() && status != http.StatusSwitchingProtocols {
		x.ResponseWriter.Header()["Connection"] = []string{"close"}
	}
}

// finish is called once the server's handler has returned or panicked.
func (x *responseWriter) finish() {
	s := x.server
	if !x.hijacked {
		x.finishResponse()
	}
	x.finished.Store(true)
	s.requests.Add(-1)
	if x.hijacked {
		s.hijacked.Add(-1)
	}
	if s.isDraining() {
		s.drained.Add(1)
		if x.hijacked {
			s.hijackedWaited.Add(1)
		}
		s.notify()
	}
}

// finishResponse prepares the end of the response, which net/http writes next
// unless the handler has panicked.
func (x *responseWriter) finishResponse() {
	if x.status == 0 {
		x.announceClose(http.StatusOK)
	}
	if x.deadline.Load() == noDeadline {
		if limit := x.server.http.WriteTimeout; limit > 0 {
			// The last writes of net/http must not wait for ever.
			http.NewResponseController(x.ResponseWriter).SetWriteDeadline(time.Now().Add(limit))
		}
	}

	if x.status == 0 || x.incoming.ProtoAtLeast(1, 1) {
		return
	}
	// net/http announces the length of a body that fits in its buffer. The end of
	// a longer one is flushed here, so that a failure resets the connection.
	const buffered = 2048
	if !x.returned || x.aborted.Load() || x.bytes >= buffered && x.FlushError() != nil {
		x.reset()
	}
}

// isAborted reports whether the client cannot have the whole response of a
// handler that has returned. start and end are those of the request.
func (x *responseWriter) isAborted(start, end time.Time) bool {
	head := x.incoming.Method == http.MethodHead
	length := int64(0) // of the body, -1 if unknown
	if !head && x.status != http.StatusNoContent && x.status != http.StatusNotModified {
		length = contentLength(x.ResponseWriter.Header())
	}

	switch {
	case x.aborted.Load():
		return true
	case head && x.status != 0: // on HTTP/2 its stream may end before the handler
		return false
	case x.flushed && 0 <= length && length <= x.bytes:
		return false
	}
	// A failed write has ended the context. The last bytes are still in net/http's
	// buffer, until the handler returns.
	return x.bytes < length || x.incoming.Context().Err() != nil || x.isPastDeadline(start, end)
}

// contentLength returns the valid Content-Length of a header, or -1.
func contentLength(h http.Header) int64 {
	if values := h["Content-Length"]; len(values) == 1 {
		if n, err := strconv.ParseInt(values[0], 10, 64); err == nil && n >= 0 {
			return n
		}
	}
	return -1
}

// isPastDeadline reports whether the time to write was over at end.
func (x *responseWriter) isPastDeadline(start, end time.Time) bool {
	switch deadline := x.deadline.Load(); {
	case deadline == noDeadline:
		return false
	case deadline != 0:
		return end.UnixNano() >= deadline
	}

	took := end.Sub(start)
	if took < time.Millisecond {
		return false // no server has a shorter timeout, and the lookup takes time
	}
	limit := writeTimeoutOf(x.incoming.Context())
	return limit > 0 && took >= limit
}

// reset resets the connection. To an HTTP/1.0 client the end of the connection
// is the end of the body, and only a reset says that it came too soon.
func (x *responseWriter) reset() {
	rc := http.NewResponseController(x.ResponseWriter)
	rc.SetWriteDeadline(time.Unix(1, 0)) // or Hijack would flush the header
	if conn, _, err := rc.Hijack(); err == nil {
		resetConn(conn)
	}
}

// resetConn closes a connection with a reset, or normally if it has none, as
// over a Unix socket. It goes past a tls.Conn, whose Close says that all is
// well.
func resetConn(conn net.Conn) {
	inner := conn
	if c, ok := conn.(*tls.Conn); ok {
		inner = c.NetConn()
	}
	if c, ok := inner.(interface{ SetLinger(sec int) error }); ok {
		c.SetLinger(0)
	}
	inner.Close()
	conn.Close()
}

type responseWriterKey struct{}

// Value makes the responseWriter a context that knows itself.
func (x *responseWriter) Value(key any) any {
	if key == (responseWriterKey{}) {
		return x
	}
	return x.Context.Value(key)
}

// copyRequest returns a copy of a request with another context. The two share
// the map of trailers: net/http adds unannounced ones to its own request when
// the body ends.
func copyRequest(r *http.Request, ctx context.Context) http.Request {
	if r.Trailer == nil && len(r.TransferEncoding) > 0 {
		r.Trailer = make(http.Header)
	}
	return *r.WithContext(ctx)
}

// copyBack copies what a router and a handler have set on their copy of a
// request back to the original: the pattern, for the log, and the multipart
// form, whose temporary files net/http removes only if they are on its own
// request (golang/go#58809).
func copyBack(r, copied *http.Request) {
	r.Pattern = copied.Pattern
	if r.MultipartForm == nil {
		r.MultipartForm = copied.MultipartForm
	}
}

// patternOf returns the pattern that the router behind h has for a request, or
// "" if h knows of no router.
func patternOf(h http.Handler, r *http.Request) string {
	switch h := h.(type) {
	case interface {
		Handler(*http.Request) (http.Handler, string)
	}:
		_, pattern := h.Handler(r)
		return pattern
	case interface{ patternOf(*http.Request) string }:
		return h.patternOf(r)
	}
	return ""
}

// requestIDField is the canonical name of the field with the id.
const requestIDField = "X-Request-Id"

// RequestID gives each request an id for logs and problem reports. It keeps the
// incoming X-Request-ID if there is just one, of 1 to 128 characters A-Z a-z
// 0-9 . _ -. Otherwise it makes 26 random characters with at least 128 bits of
// entropy. The response carries it in X-Request-ID. See [RequestIDFrom].
//
// Clients choose the incoming id, so it proves nothing unless a proxy sets it.
func RequestID() Middleware {
	return func(next http.Handler) http.Handler {
		checkHandler("RequestID", next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := responseWriterOf(w, r)
			if x.id[0] != "" {
				next.ServeHTTP(x, r)
				return
			}
			x.identify(r)
			copied := copyRequest(r, x)
			defer copyBack(r, &copied)
			next.ServeHTTP(x, &copied)
		})
	}
}

// identify gives the request an id, and makes its responseWriter its context.
func (x *responseWriter) identify(r *http.Request) {
	if in := r.Header[requestIDField]; len(in) == 1 && isRequestID(in[0]) {
		x.id[0] = in[0]
	} else {
		x.id[0] = rand.Text()
	}
	x.Header()[requestIDField] = x.id[:]
	x.Context = r.Context()
}

// isRequestID reports whether an incoming id is safe to log and to send on.
func isRequestID(id string) bool {
	if len(id) == 0 || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// RequestIDFrom returns the id that [RequestID] gave the request with this
// context, or "".
func RequestIDFrom(ctx context.Context) string {
	if x, ok := ctx.Value(responseWriterKey{}).(*responseWriter); ok {
		return x.id[0]
	}
	return ""
}

// Recovery turns a panic of the handler into a 500, and logs its value and
// stack, which the client never sees. A response that has started is aborted
// instead, by [http.ErrAbortHandler]. A handler's own ErrAbortHandler passes
// unlogged. A handler that ends its goroutine ([runtime.Goexit]) gets a 500
// too.
func Recovery() Middleware {
	return func(next http.Handler) http.Handler {
		checkHandler("Recovery", next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			x := responseWriterOf(w, r)
			x.recovers = true
			returned := false
			defer func() {
				if !returned {
					handlePanic(x, r, recover())
				}
			}()
			next.ServeHTTP(x, r)
			returned = true
		})
	}
}

// handlePanic responds for a handler that panicked with this value, or that
// ended its goroutine if the value is nil.
func handlePanic(x *responseWriter, r *http.Request, value any) {
	if value == http.ErrAbortHandler {
		panic(value)
	}
	message := "panic"
	stack := debug.Stack()
	switch v := value.(type) {
	case nil:
		message, value = "handler ended its goroutine", "runtime.Goexit"
	case *panicError:
		value, stack = v.value, v.stack
	}

	attrs := []slog.Attr{
		slog.String("method", r.Method),
		slog.String("path", r.URL.Path),
		slog.String("pattern", r.Pattern),
		slog.String("remote", r.RemoteAddr),
		slog.String("err", fmt.Sprint(value)),
		slog.String("stack", string(stack)),
	}
	if x.id[0] != "" {
		attrs = append(attrs, slog.String("request_id", x.id[0]))
	}
	x.logger().LogAttrs(r.Context(), slog.LevelError, message, attrs...)

	if x.status != 0 || x.hijacked {
		panic(http.ErrAbortHandler)
	}

	h := x.Header()
	clearRepresentation(h)
	const body = "Internal Server Error\n"
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h["X-Content-Type-Options"] = nosniffValue
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if message != "panic" {
		// When its goroutine ends, net/http closes the connection without a
		// flush.
		h.Set("Connection", "close")
		defer x.FlushError()
	}

	x.WriteHeader(http.StatusInternalServerError)
	io.WriteString(x, body)
}

// representationFields describe a body and how it may be stored. The first ones
// are about its very bytes.
var representationFields = [...]string{
	"Content-Encoding", "Content-Range", "Content-Md5", "Content-Digest", "Repr-Digest", "Digest",
	"Accept-Ranges", "Content-Disposition", "Content-Language", "Content-Length", "Content-Location",
	"Cache-Control", "Cdn-Cache-Control", "Etag", "Expires", "Last-Modified", "Trailer", "Transfer-Encoding",
}

var bodyFields = representationFields[:6]

// clearRepresentation removes the fields of a body that is not sent. The error
// in its place is neither compressed nor stored, and has another name. Its
// writer sets the type.
func clearRepresentation(h http.Header) {
	for _, field := range representationFields {
		delete(h, field)
	}
}

// panicError carries a panic to another goroutine, with its stack. Recovery
// logs both, or without Recovery net/http does.
type panicError struct {
	value any
	stack []byte
}

func (p *panicError) Error() string { return fmt.Sprintf("%v\n\n%s", p.value, p.stack) }

// Unwrap returns the value if it is an error.
func (p *panicError) Unwrap() error {
	err, _ := p.value.(error)
	return err
}

// wrapPanic returns the value to panic with on another goroutine. It must be
// called on the goroutine that panicked, before that unwinds. ErrAbortHandler
// stays as it is, since net/http compares it.
func wrapPanic(value any) any {
	if _, ok := value.(*panicError); ok || value == http.ErrAbortHandler {
		return value
	}
	return &panicError{value, debug.Stack()}
}

// LoggingConfig configures [LoggingWith].
type LoggingConfig struct {
	// Skip, if set, reports which requests not to log.
	Skip func(*http.Request) bool

	// Attrs, if set, returns more attributes. It is called after the handler, when
	// Pattern is set. A handler that a [Timeout] has abandoned may still use the
	// request's URL and Header.
	Attrs func(*http.Request) []slog.Attr
}

// Logging logs a line for each request when it ends. See [LoggingWith].
func Logging() Middleware { return LoggingWith(nil) }

// LoggingWith logs a line for each request when it ends, with the message
// request, at level error from status 500 on and info below. The attributes are
// method, path (without the query, which may hold secrets), pattern (the route,
// from the router), status (101 for a hijacked connection), bytes (of the body,
// without that of a [Recovery] outside, and before any [Compression] there),
// duration, remote and, behind [RequestID], request_id.
//
// The attribute aborted=true says that the client cannot have the whole
// response:
//
//   - its handler panicked and no Recovery responded, or a Timeout or a stream
//     aborted it;
//   - it has fewer bytes than its Content-Length;
//   - its handler returned after the write deadline, or after the client
//     disconnected or a shutdown was out of time. A response of known length
//     that was flushed before is whole.
//
// With aborted=true, status is 0 if nothing was written.
//
// Inside [Timeout], Logging sees the handler's end and not the client's
// response.
func LoggingWith(cfg *LoggingConfig) Middleware {
	var c LoggingConfig
	if cfg != nil {
		c = *cfg
	}
	return func(next http.Handler) http.Handler {
		checkHandler("Logging", next)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.Skip != nil && c.Skip(r) {
				next.ServeHTTP(w, r)
				return
			}
			x := responseWriterOf(w, r)
			recovers, path := x.recovers, r.URL.Path // a handler may change the path

			start := time.Now()
			returned := false
			defer func() {
				var value any
				if !returned {
					value = recover()
				}
				end := time.Now()
				status, aborted := x.status, !returned
				switch {
				case x.hijacked:
					status = http.StatusSwitchingProtocols
				case !returned && status == 0 && recovers && value != http.ErrAbortHandler:
					status, aborted = http.StatusInternalServerError, false // Recovery's
				case returned:
					if aborted = x.isAborted(start, end); status == 0 && !aborted {
						status = http.StatusOK
					}
				}
				c.log(x, r, path, start, end, status, aborted)

				if value != nil {
					panic(value)
				}
			}()
			next.ServeHTTP(x, r)
			returned = true
		})
	}
}

func (c *LoggingConfig) log(x *responseWriter, r *http.Request, path string, start, end time.Time, status int, aborted bool) {
	level := slog.LevelInfo
	if status >= 500 {
		level = slog.LevelError
	}
	logger := x.logger()
	if !logger.Enabled(r.Context(), level) {
		return
	}

	// A Record made by hand needs no program counter, which would always point
	// here and costs more than the rest.
	record := slog.NewRecord(end, level, "request", 0)
	attrs := append(make([]slog.Attr, 0, 9),
		slog.String("method", r.Method),
		slog.String("path", path),
		slog.String("pattern", r.Pattern),
		slog.Int("status", status),
		slog.Int64("bytes", x.bytes),
		slog.Duration("duration", end.Sub(start)),
		slog.String("remote", r.RemoteAddr),
	)
	if x.id[0] != "" {
		attrs = append(attrs, slog.String("request_id", x.id[0]))
	}
	if aborted {
		attrs = append(attrs, slog.Bool("aborted", true))
	}
	if c.Attrs != nil {
		attrs = append(attrs, c.Attrs(r)...)
	}

	record.AddAttrs(attrs...)
	_ = logger.Handler().Handle(r.Context(), record)
}

// CompressionConfig configures [CompressionWith].
type CompressionConfig struct {
	// Level is the built-in gzip's, 1 (fastest) to 9. Default: 4. Compared with
	// level 6, gzip's own default, 40 KB of text take a third to two thirds of
	// the time on Go 1.26, two thirds or more on 1.27, and are 1 to 9 percent
	// larger.
	Level int

	// MinSize is the least number of bytes to compress. Default: 1024.
	MinSize int

	// Types are the media types to compress, as patterns for [path.Match]:
	// "text/*", "*/*+json". Default: text, JSON, XML, JavaScript, WebAssembly,
	// SVG, uncompressed fonts and the like.
	Types []string

	// Encoders are content codings beside gzip. A client gets the one it
	// prefers; of equal weight the first, gzip last. One named gzip replaces
	// the built-in one.
	Encoders []Encoder
}

// Encoder is a content coding from another library.
//
// Browsers decode zstd with a window of up to 8 MB ([RFC 9659]), the default of
// klauspost's zstd.NewWriter. Its WithWindowSize sets less, and
// WithEncoderConcurrency(1) spares goroutines. Each response takes a writer
// while it is compressed: 0.8 MB for Go's gzip, 1 MB for klauspost's, 18 MB for
// its zstd (3 MB with a window of 1 MB), 9 MB for andybalholm's brotli.
//
// [RFC 9659]: https://www.rfc-editor.org/rfc/rfc9659
type Encoder struct {
	// Coding is its name in Accept-Encoding, in lower case: "zstd", "br".
	Coding string

	// New returns a new writer, for one response after the other. Any goroutine
	// may call New.
	New func() EncodingWriter
}

// EncodingWriter compresses one body after the other: Reset starts one, Flush
// sends what was written, Close ends it. The writers of compress/gzip,
// klauspost's gzip and zstd and andybalholm's brotli are EncodingWriters.
type EncodingWriter interface {
	io.WriteCloser
	Flush() error
	Reset(io.Writer)
}

func (c *CompressionConfig) withDefaults() (CompressionConfig, error) {
	var d CompressionConfig
	if c != nil {
		d = *c
	}
	d.Level = cmp.Or(d.Level, 4)
	switch {
	case d.MinSize == 0:
		d.MinSize = 1024
	case d.MinSize < 0:
		d.MinSize = 1 // an empty body only grows
	}

	var errs errorList
	if d.Level < gzip.BestSpeed || d.Level > gzip.BestCompression {
		errs.add("Level: %d is not between %d and %d", d.Level, gzip.BestSpeed, gzip.BestCompression)
	}
	d.Types = slices.Clone(d.Types)
	for i, pattern := range d.Types {
		d.Types[i] = strings.ToLower(pattern)
		if _, err := path.Match(pattern, ""); err != nil {
			errs.add("Types: %q: %w", pattern, err)
		} else if !strings.Contains(pattern, "/") {
			errs.add("Types: %q: a media type has a slash", pattern)
		}
	}

	var codings []string
	d.Encoders = slices.Clone(d.Encoders)
	for i, e := range d.Encoders {
		switch {
		case !isCoding(e.Coding):
			errs.add("Encoders: %d: Coding: %q is not the name of a coding in lower case", i+1, e.Coding)
		case slices.Contains(codings, e.Coding):
			errs.add("Encoders: %d: Coding: %q is there twice", i+1, e.Coding)
		case e.New == nil:
			errs.add("Encoders: %d: New: is required for %q", i+1, e.Coding)
		}
		codings = append(codings, e.Coding)
	}

	if !slices.Contains(codings, "gzip") {
		d.Encoders = append(d.Encoders, Encoder{"gzip", func() EncodingWriter {
			z, _ := gzip.NewWriterLevel(nil, d.Level)
			return z
		}})
	}
	return d, errors.Join(errs...)
}

// isCoding reports whether Accept-Encoding can ask for a coding of this name.
func isCoding(name string) bool {
	return name != "" && name != "identity" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-._") == ""
}

// compresses reports whether to compress bodies of this media type.
func (c *CompressionConfig) compresses(contentType string) bool {
	if len(c.Types) == 0 {
		return compressible(contentType)
	}
	t := mediaType(contentType)
	return t != eventStream && slices.ContainsFunc(c.Types, func(pattern string) bool {
		ok, _ := path.Match(pattern, t)
		return ok
	})
}

// Compression compresses text from 1 KiB on with gzip. See [CompressionWith].
func Compression() Middleware { return CompressionWith(nil) }

// CompressionWith compresses responses with the content coding that the client
// prefers ([RFC 9110, Section 12.5.3]), if their media type is one of Types and
// their body has MinSize bytes. Text shrinks by 60 to 80 percent.
//
// The first bytes are held back until that is decided: at MinSize, when the
// handler returns, or at once if it flushes, declares a Trailer or has set a
// Content-Length. A flushed body is compressed whatever its size, unless its
// Content-Length is below MinSize. Flushes reach the client; other bytes may
// wait until the handler returns. A missing Content-Type is detected from the
// first 512 bytes, as in net/http. If such a response is flushed before its
// first byte, it is not compressed. Fields set while the body is held back may
// reach the client, except Content-Length and Content-Encoding.
//
// Never compressed are responses without a body, parts (206), event streams,
// bodies with a Content-Encoding or a digest of their bytes, and responses with
// Cache-Control: no-transform. A handler opts out with Content-Encoding:
// identity, which is removed. Sendfile sends what is not compressed, except the
// first 4 KiB if the handler has not called WriteHeader.
//
// A response that could be compressed has Vary: Accept-Encoding. A compressed
// one loses Content-Length and Accept-Ranges, and a strong ETag becomes weak,
// as in a 304 to a client that has the weak one. If-Match never matches a weak
// tag (RFC 9110, Section 13.1.1): a client that edits a resource must fetch it
// uncompressed. HEAD gets the header of GET if the handler sets Content-Type
// and Content-Length or writes the body. Dates cannot be weakened: without an
// ETag, resuming a compressed response by If-Range with Last-Modified gets
// bytes that do not fit.
//
// A response is aborted if its handler panics or writes less than its
// Content-Length.
//
// Do not compress a secret beside text that a stranger can choose: the size
// reveals it (BREACH).
//
// [RFC 9110, Section 12.5.3]: https://www.rfc-editor.org/rfc/rfc9110#section-12.5.3
func CompressionWith(cfg *CompressionConfig) Middleware {
	c, err := cfg.withDefaults()
	if err != nil {
		panic(err)
	}
	h := compressHandler{config: &c}
	for _, e := range c.Encoders {
		h.encodings = append(h.encodings, &encoding{Encoder: e, header: []string{e.Coding}})
		h.codings = append(h.codings, e.Coding)
	}
	return func(next http.Handler) http.Handler {
		checkHandler("Compression", next)
		h := h
		h.next = next
		return &h
	}
}

type compressHandler struct {
	config    *CompressionConfig
	encodings []*encoding
	codings   []string // their names
	next      http.Handler
}

func (h *compressHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	z := &compressWriter{
		ResponseWriter: w,
		config:         h.config,
		request:        r,
	}
	if coding := negotiate(r.Header, h.codings...); coding != "" {
		z.encoding = h.encodings[slices.Index(h.codings, coding)]
	}

	if responseStarted(w) {
		z.state = compressPlain
	}
	h.next.ServeHTTP(z, r)
	z.finish() // not deferred: after a panic the response must not look whole
}

// patternOf is for Timeout, which looks for the router behind Compression.
func (h *compressHandler) patternOf(r *http.Request) string { return patternOf(h.next, r) }

// The states of a compressWriter, in their order.
const (
	compressOpen    = iota // the handler has set no status and written nothing
	compressHeld           // the status is known, the decision on the body is not made
	compressPlain          // the body goes through as it is
	compressEncoded        // the body is compressed
)

// compressWriter is the handler's ResponseWriter behind Compression.
type compressWriter struct {
	http.ResponseWriter
	config   *CompressionConfig
	request  *http.Request
	encoding *encoding // nil if the client accepts none

	state    int
	status   int
	declared int64           // the Content-Length that the handler has set, or -1
	limit    int             // how many bytes to hold back at most
	held     *compressBuffer // the first bytes of the body, in compressHeld
	encoder  EncodingWriter  // nil until something is compressed
	encoded  int64           // bytes that the encoder was given

	contentType [1]string // the detected value
	text        strings.Reader
}

const (
	compressBufferSize = 4 << 10
	sniffLen           = 512 // the bytes that http.DetectContentType looks at
)

type compressBuffer struct{ bytes []byte }

// compressBuffers holds empty *compressBuffer.
var compressBuffers = sync.Pool{New: func() any {
	return &compressBuffer{make([]byte, 0, compressBufferSize)}
}}

func (b *compressBuffer) free() {
	if cap(b.bytes) <= 16*compressBufferSize {
		b.bytes = b.bytes[:0]
		compressBuffers.Put(b)
	}
}

// Unwrap is for [http.ResponseController].
func (z *compressWriter) Unwrap() http.ResponseWriter { return z.ResponseWriter }

func (z *compressWriter) WriteHeader(status int) {
	switch {
	case z.status != 0:
		logSuperfluous(z.request.Context(), status)
	case z.state != compressOpen, !isFinal(status):
		z.ResponseWriter.WriteHeader(status)
	default:
		z.start(status)
	}
}

// start decides as much as status and header allow.
func (z *compressWriter) start(status int) {
	z.status = status
	z.state = z.decide(status)
	switch z.state {
	case compressHeld:
		z.held = compressBuffers.Get().(*compressBuffer)
		return
	case compressEncoded:
		z.setEncodingHeader()
	}
	z.writeHeader()
}

func (z *compressWriter) writeHeader() {
	closeIfTooLarge(z.ResponseWriter, z.request, z.status)
	z.ResponseWriter.WriteHeader(z.status)
}

// decide returns the state that follows from status and header alone. It adds
// to Vary if the response could be compressed.
func (z *compressWriter) decide(status int) int {
	h := z.ResponseWriter.Header()
	z.declared = -1
	if slices.Equal(h["Content-Encoding"], identityValue) { // the handler opts out; identity is no coding
		delete(h, "Content-Encoding")
		disableCompression(z.ResponseWriter)
		return compressPlain
	}

	switch status {
	case http.StatusNotModified:
		z.reviseNotModified(h)
		return compressPlain
	case http.StatusSwitchingProtocols, http.StatusNoContent, http.StatusResetContent:
		return compressPlain
	}

	types, typed := h["Content-Type"]
	if typed && (len(types) == 0 || !z.config.compresses(types[0])) {
		return compressPlain
	}
	if status == http.StatusPartialContent {
		addVary(h, "Accept-Encoding") // RFC 9110, Section 15.3.7: as in the 200
		return compressPlain
	}
	trailers := h["Trailer"]
	for _, name := range bodyFields {
		if len(h[name]) > 0 || hasMember(trailers, name) {
			return compressPlain
		}
	}
	if hasMember(h["Cache-Control"], "no-transform") {
		return compressPlain
	}

	if typed {
		addVary(h, "Accept-Encoding")
	}
	z.declared = contentLength(h)
	trailer := len(trailers) > 0 // its fields must not be set when the header is written
	known := z.encoding == nil || z.declared >= 0 || trailer

	switch {
	case typed && known && z.shouldCompress(0, trailer):
		return compressEncoded
	case typed && known, trailer:
		return compressPlain
	case typed:
		z.limit = z.config.MinSize
	case z.declared >= 0:
		z.limit = int(min(z.declared, sniffLen)) // the body has no more
	case known:
		z.limit = sniffLen
	default:
		z.limit = max(z.config.MinSize, sniffLen)
	}
	return compressHeld
}

// shouldCompress reports whether to compress a body of a type that shrinks, of
// which size bytes are known.
func (z *compressWriter) shouldCompress(size int, flush bool) bool {
	if z.encoding == nil {
		return false
	}
	if z.declared >= 0 {
		return z.declared >= int64(z.config.MinSize)
	}
	return size >= z.config.MinSize || flush
}

// reviseNotModified gives a 304 the header of the compressed response if that
// is the one that the client has. The handler knows only the strong tag, from
// which the weak one was made (RFC 9110, Section 15.4.5). A 304 of net/http has
// no Content-Type any more.
func (z *compressWriter) reviseNotModified(h http.Header) {
	types, typed := h["Content-Type"]
	tag := h.Get("Etag")
	has := z.encoding != nil && strings.HasPrefix(tag, `"`) &&
		slices.ContainsFunc(z.request.Header["If-None-Match"], func(line string) bool { return strings.Contains(line, "W/"+tag) })
	if has {
		weakenETag(h)
	}
	if has || !typed || len(types) > 0 && z.config.compresses(types[0]) {
		addVary(h, "Accept-Encoding")
	}
}

// weakenETag says that the bytes are not always the same: another version of an
// encoder may make others.
func weakenETag(h http.Header) {
	if tag := h.Get("Etag"); strings.HasPrefix(tag, `"`) {
		h["Etag"] = []string{"W/" + tag}
	}
}

// setEncodingHeader makes the header that of a compressed response.
func (z *compressWriter) setEncodingHeader() {
	h := z.ResponseWriter.Header()
	h["Content-Encoding"] = z.encoding.header
	if len(h["Content-Length"]) > 0 { // nil tells net/http to add none
		delete(h, "Content-Length")
	}
	delete(h, "Accept-Ranges")
	weakenETag(h)
}

// sendHeld decides whether to compress the body that is held back, and sends
// it. It is called when there are enough bytes, on a flush, and when the
// handler has returned.
func (z *compressWriter) sendHeld(flush bool) error {
	h := z.ResponseWriter.Header()
	held := z.held
	z.held = nil

	compresses := len(h["Content-Type"]) > 0 // decide has looked at it then
	if !compresses && len(held.bytes) > 0 {
		// net/http would detect the type of the compressed bytes.
		z.contentType[0] = http.DetectContentType(held.bytes)
		h["Content-Type"] = z.contentType[:]
		if compresses = z.config.compresses(z.contentType[0]); compresses {
			addVary(h, "Accept-Encoding")
		}
	}

	// The handler has set them after the body, which they would not fit.
	delete(h, "Content-Encoding")
	if z.declared < 0 && len(h["Content-Length"]) > 0 {
		delete(h, "Content-Length")
	}
	z.dropHeadLength()

	z.state = compressPlain
	if compresses && z.shouldCompress(len(held.bytes), flush) {
		z.state = compressEncoded
		z.setEncodingHeader()
	}
	z.writeHeader()

	var err error
	if len(held.bytes) > 0 {
		_, err = z.write(held.bytes)
	}
	if err == nil { // otherwise net/http may still read it
		held.free()
	}
	return err
}

func (z *compressWriter) Write(p []byte) (int, error) {
	if z.state == compressOpen {
		z.start(http.StatusOK)
	}
	if z.state != compressHeld {
		return z.write(p)
	}

	n := min(len(p), z.limit-len(z.held.bytes))
	z.held.bytes = append(z.held.bytes, p[:n]...)
	if len(z.held.bytes) < z.limit {
		return n, nil
	}
	if err := z.sendHeld(false); err != nil || n == len(p) {
		return n, err
	}
	m, err := z.write(p[n:])
	return n + m, err
}

// write sends a part of the body after the decision.
func (z *compressWriter) write(p []byte) (int, error) {
	if z.state == compressPlain {
		return z.ResponseWriter.Write(p)
	}

	var excess error
	if left := z.declared - z.encoded; z.declared >= 0 && int64(len(p)) > left {
		// A file may have grown: send as much as was announced.
		p, excess = p[:left], http.ErrContentLength
	}
	n, err := len(p), error(nil)
	if n > 0 && z.request.Method != http.MethodHead {
		n, err = z.writer().Write(p)
	}
	z.encoded += int64(n)
	return n, cmp.Or(err, excess)
}

func (z *compressWriter) writer() EncodingWriter {
	if z.encoder == nil {
		z.encoder = z.encoding.get(z.ResponseWriter)
	}
	return z.encoder
}

// WriteString saves the copy that [io.WriteString] makes for a writer without
// it.
func (z *compressWriter) WriteString(s string) (int, error) {
	if z.state == compressOpen {
		z.start(http.StatusOK)
	}
	if z.state == compressPlain {
		return io.WriteString(z.ResponseWriter, s)
	}
	z.text.Reset(s)
	n, err := z.ReadFrom(&z.text)
	return int(n), err
}

// ReadFrom keeps sendfile for bodies that are not compressed, even if that is
// decided only after the first bytes. A source that fails before its first byte
// leaves the header unwritten, as without Compression.
func (z *compressWriter) ReadFrom(src io.Reader) (int64, error) {
	var n int64
	buf := compressBuffers.Get().(*compressBuffer)
	for z.state != compressPlain {
		m, readErr := src.Read(buf.bytes[:compressBufferSize])
		if m > 0 {
			written, err := z.Write(buf.bytes[:m])
			n += int64(written)
			if err != nil {
				return n, err
			}
		}
		if readErr != nil {
			buf.free()
			if readErr == io.EOF {
				readErr = nil
			}
			return n, readErr
		}
	}
	buf.free()
	m, err := z.forward(src)
	return n + m, err
}

func (z *compressWriter) forward(src io.Reader) (int64, error) {
	if rf, ok := z.ResponseWriter.(io.ReaderFrom); ok {
		return rf.ReadFrom(src)
	}
	return io.Copy(struct{ io.Writer }{z.ResponseWriter}, src)
}

// Flush is FlushError for callers that look for an [http.Flusher].
func (z *compressWriter) Flush() { z.FlushError() }

func (z *compressWriter) FlushError() error {
	if z.state < compressPlain && !canFlush(z.ResponseWriter) {
		return http.ErrNotSupported // and nothing is decided
	}
	if z.state == compressOpen {
		z.start(http.StatusOK)
	}
	if z.state == compressHeld {
		if err := z.sendHeld(true); err != nil {
			return err
		}
	}
	if z.encoder != nil {
		if err := z.encoder.Flush(); err != nil {
			return err
		}
	}
	return http.NewResponseController(z.ResponseWriter).Flush()
}

// Hijack drops the bytes that are held back: the connection is the handler's.
func (z *compressWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := http.NewResponseController(z.ResponseWriter).Hijack()
	if err == nil {
		z.state, z.held, z.encoder = compressPlain, nil, nil
	}
	return conn, buf, err
}

// CloseNotify is for code that takes every ResponseWriter for a CloseNotifier.
func (z *compressWriter) CloseNotify() <-chan bool { return closeNotify(z.request.Context()) }

func (z *compressWriter) Push(target string, opts *http.PushOptions) error {
	return push(z.ResponseWriter, target, opts)
}

// finish ends the response of a handler that has returned. Later writes pass as
// they are: some routers respond to an error that their handler has returned.
func (z *compressWriter) finish() {
	head := z.request.Method == http.MethodHead
	switch z.state {
	case compressOpen:
		if head { // its header may be that of a GET with a body
			switch z.decide(http.StatusOK) {
			case compressEncoded:
				z.setEncodingHeader()
			case compressHeld:
				z.dropHeadLength()
			}
		}
		z.state = compressPlain
	case compressHeld:
		z.sendHeld(false)
	}

	if z.state != compressEncoded || head {
		return
	}
	if z.encoded < z.declared {
		panic(http.ErrAbortHandler) // as net/http does; with a trailer it would look whole
	}
	if z.writer().Close() == nil { // and nobody else uses it
		z.encoding.pool.Put(z.encoder)
	}
	z.encoder = nil
	z.declared = z.encoded // no more can be written
}

// dropHeadLength drops the Content-Length of a HEAD without a Content-Type: the
// GET may be compressed.
func (z *compressWriter) dropHeadLength() {
	h := z.ResponseWriter.Header()
	if len(h["Content-Type"]) == 0 && z.encoding != nil && z.request.Method == http.MethodHead {
		delete(h, "Content-Length")
	}
}

// disableCompression makes every Compression around w leave the response and
// its Content-Length as they are, for the response of a Timeout.
func disableCompression(w http.ResponseWriter) {
	for ; w != nil; w = unwrap(w) {
		if z, ok := w.(*compressWriter); ok {
			z.encoding = nil
		}
	}
}

// negotiate returns the one of offers that a request with this header prefers,
// or "" for identity. Offers are lower-case codings in the server's order of
// preference. An offer counts if Accept-Encoding has it, or else a *, with a
// weight above 0. The highest weight wins, of equal ones the earlier offer;
// identity wins only if it is named with a higher one. Malformed weights are
// ignored, and of contradicting ones the lower one counts. See
// [RFC 9110, Section 12.5.3].
//
// [RFC 9110, Section 12.5.3]: https://www.rfc-editor.org/rfc/rfc9110#section-12.5.3
func negotiate(header http.Header, offers ...string) string {
	lines := header["Accept-Encoding"]
	if len(lines) == 0 {
		return "" // all codings are acceptable, but such clients rarely decode them
	}
	if len(lines) == 1 {
		switch lines[0] {
		case "gzip, deflate, br, zstd", "gzip, deflate, br", "gzip, deflate", "gzip": // from browsers and Go
			for _, offer := range offers {
				if hasMember(lines, offer) {
					return offer
				}
			}
			return ""
		}
	}

	best, bestWeight := "", max(codingWeight(lines, "identity"), 1)
	anyOther := codingWeight(lines, "*")
	for _, offer := range offers {
		weight := codingWeight(lines, offer)
		if weight < 0 {
			weight = anyOther
		}
		if weight > bestWeight || weight == bestWeight && best == "" {
			best, bestWeight = offer, weight
		}
	}
	return best
}

// codingWeight returns the weight, in thousandths, that the lines of an
// Accept-Encoding give to a coding, or -1 if they do not name it.
func codingWeight(lines []string, coding string) int {
	lowest := -1
	for _, line := range lines {
		for member := range strings.SplitSeq(line, ",") {
			name, parameter, weighted := strings.Cut(member, ";")
			name = textproto.TrimString(name)
			if !strings.EqualFold(name, coding) && !(coding == "gzip" && strings.EqualFold(name, "x-gzip")) {
				continue
			}
			weight := 1000
			if weighted {
				weight = parseWeight(textproto.TrimString(parameter))
			}
			if weight >= 0 && (lowest < 0 || weight < lowest) {
				lowest = weight
			}
		}
	}
	return lowest
}

// parseWeight returns a weight such as q=0.5 in thousandths, or -1 if it is
// malformed.
func parseWeight(s string) int {
	if len(s) < 3 || len(s) > 7 || !strings.EqualFold(s[:2], "q=") || len(s) > 3 && s[3] != '.' || strings.Trim(s[2:], "0123456789.") != "" {
		return -1
	}
	q, err := strconv.ParseFloat(s[2:], 64)
	if err != nil || q > 1 {
		return -1
	}
	return int(q*1000 + 0.5)
}

const eventStream = "text/event-stream"

// compressible reports whether bodies of a media type shrink; parameters do not
// matter. An event stream would too, but proxies hold back a body that they
// cannot read.
func compressible(contentType string) bool {
	switch t := mediaType(contentType); t {
	case eventStream:
		return false
	case "application/json", "application/javascript", "application/x-javascript", "application/ecmascript",
		"application/xml", "application/xml-dtd", "application/wasm", "application/rtf", "application/sql",
		"application/graphql", "application/yaml", "application/x-yaml", "application/toml",
		"application/ndjson", "application/x-ndjson", "application/jsonl", "application/json-seq",
		"application/x-www-form-urlencoded", "application/vnd.ms-fontobject", "application/x-font-ttf",
		"font/ttf", "font/otf", "font/sfnt", "font/collection",
		"image/bmp", "image/x-icon", "image/vnd.microsoft.icon":
		return true
	default:
		return strings.HasPrefix(t, "text/") || strings.HasSuffix(t, "+json") || strings.HasSuffix(t, "+xml") ||
			strings.HasSuffix(t, "+yaml")
	}
}

// mediaType returns the type of a Content-Type without parameters, in lower
// case.
func mediaType(contentType string) string {
	t, _, _ := strings.Cut(contentType, ";")
	return strings.ToLower(textproto.TrimString(t))
}

// These values are shared by responses and never changed.
var (
	identityValue      = []string{"identity"}
	varyAcceptEncoding = []string{"Accept-Encoding"}
	nosniffValue       = []string{"nosniff"}
)

// addVary adds a field name to Vary unless it is there. It does not change the
// slice that is there: other responses may share it.
func addVary(h http.Header, field string) {
	vary := h["Vary"]
	switch {
	case hasMember(vary, field), hasMember(vary, "*"):
	case len(vary) == 0 && field == varyAcceptEncoding[0]:
		h["Vary"] = varyAcceptEncoding
	default:
		h["Vary"] = append(slices.Clip(vary), field)
	}
}

// hasMember reports whether a field whose value is a list has this member, in
// any case.
func hasMember(lines []string, member string) bool {
	for _, line := range lines {
		for m := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(textproto.TrimString(m), member) {
				return true
			}
		}
	}
	return false
}

// encoding is an [Encoder] and its idle writers.
type encoding struct {
	Encoder
	header []string  // Coding as the value of a field, shared by responses and never changed
	pool   sync.Pool // of EncodingWriter
}

// get returns a writer to dst. It goes back to the pool after its Close, and
// not after a panic: then somebody else may still use it.
func (e *encoding) get(dst io.Writer) EncodingWriter {
	z, ok := e.pool.Get().(EncodingWriter)
	if !ok {
		z = e.New()
	}
	z.Reset(dst)
	return z
}

// releaseTimeout lifts every Timeout around w, just before the first byte of a
// response that outlives them by nature. It returns false if one has fired:
// then nothing may be written. It calls the method releaseTimeout of
// timeout.go's writer and of the slowWriter of pprof.go, for which the request
// then ends.
func releaseTimeout(w http.ResponseWriter) bool {
	for ; w != nil; w = unwrap(w) {
		if t, ok := w.(interface{ releaseTimeout() bool }); ok && !t.releaseTimeout() {
			return false
		}
	}
	return true
}

// abortResponse aborts a response that has started: the client sees that it is
// not whole, and later writes, such as the text of an error, fail. It reports
// whether that is certain, which needs a deadline. A deadline in the past
// resets an HTTP/2 stream at once. On HTTP/1 it makes net/http's last flush
// fail, and net/http closes the connection.
func abortResponse(w http.ResponseWriter) bool {
	err := http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0))
	for ; w != nil; w = unwrap(w) {
		if x, ok := w.(*responseWriter); ok {
			x.aborted.Store(true)
		}
	}
	switch {
	case err == nil:
		return true
	case errors.Is(err, errAborted), errors.Is(err, errFinished), errors.Is(err, http.ErrHandlerTimeout): // ErrTimeout is that
		return true // the response had ended before
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.ErrClosedPipe):
		return true // and so had the connection
	}
	return false
}

// responseStarted reports whether the response has a status, as far as the
// wrappers of this package know. It calls timeout.go's method responseStarted
// and goes no further: the writers around a Timeout may be in use.
func responseStarted(w http.ResponseWriter) bool {
	for ; w != nil; w = unwrap(w) {
		switch x := w.(type) {
		case interface{ responseStarted() bool }:
			return x.responseStarted()
		case *responseWriter:
			if x.status != 0 || x.outermost {
				return x.status != 0
			}
		case *compressWriter:
			if x.state != compressOpen {
				return true
			}
		}
	}
	return false
}

// abortResponseOrPanic is abortResponse for the handler's own goroutine. It
// panics with [http.ErrAbortHandler] if nothing else aborts the response of a
// server.
func abortResponseOrPanic(w http.ResponseWriter, r *http.Request) {
	if !abortResponse(w) && r.Context().Value(http.ServerContextKey) != nil {
		panic(http.ErrAbortHandler)
	}
}

// closeAfterResponse makes net/http close an HTTP/1 connection after the
// response, without reading the rest of the request first. The client, which
// may still be sending, has half a second to read the response: an immediate
// close, with data unread, would reset the connection and lose the response.
//
// net/http does so for its own MaxBytesReader, whose private signal reaches
// only the innermost writer.
func closeAfterResponse(w http.ResponseWriter) {
	w.Header()["Connection"] = []string{"close"}
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
}

// closeIfTooLarge calls [closeAfterResponse] for a 413 on HTTP/1. A wrapper
// hides the signal of a handler's own MaxBytesReader from net/http.
func closeIfTooLarge(w http.ResponseWriter, r *http.Request, status int) {
	if status == http.StatusRequestEntityTooLarge && r.ProtoMajor == 1 && r.ContentLength != 0 {
		closeAfterResponse(w)
	}
}

// closeNotify returns a channel that gets a value when the context of a request
// ends. Wrappers have a CloseNotify for code that takes every ResponseWriter
// for an http.CloseNotifier.
func closeNotify(ctx context.Context) <-chan bool {
	notify := make(chan bool, 1)
	context.AfterFunc(ctx, func() { notify <- true })
	return notify
}

// push calls the Push of the first writer inside w that has one.
func push(w http.ResponseWriter, target string, opts *http.PushOptions) error {
	for ; w != nil; w = unwrap(w) {
		if p, ok := w.(http.Pusher); ok {
			return p.Push(target, opts)
		}
	}
	return http.ErrNotSupported
}

// logSuperfluous logs a WriteHeader that comes too late, with its caller.
// net/http would name a wrapper of this package.
func logSuperfluous(ctx context.Context, status int) {
	pcs := make([]uintptr, 16)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	frame, more := frames.Next()
	for more && isWrapper(frame.Function) {
		frame, more = frames.Next()
	}
	caller := fmt.Sprintf("%s (%s:%d)", frame.Function, path.Base(frame.File), frame.Line)
	Logger(ctx).Warn("superfluous WriteHeader", "status", status, "caller", caller)
}

// isWrapper reports whether a function only passes a WriteHeader on.
func isWrapper(function string) bool {
	return strings.HasPrefix(function, "net/http.") || strings.Contains(function, ".(*responseWriter).") ||
		strings.Contains(function, ".(*compressWriter).") || strings.Contains(function, ".(*timeoutWriter).")
}

// canFlush reports whether w can be flushed. The wrappers of this package all
// have a Flush, so the innermost writer decides.
func canFlush(w http.ResponseWriter) bool {
	for inner := unwrap(w); inner != nil; inner = unwrap(w) {
		w = inner
	}
	switch w.(type) {
	case http.Flusher, interface{ FlushError() error }:
		return true
	}
	return false
}

// rollingDeadline moves the connection's write deadline along with a response
// that may last longer than WriteTimeout. It is set before each write and
// cleared once that is flushed. So only a client that takes nothing is
// disconnected, while a deadline that stays would reset an HTTP/2 stream that
// is merely quiet.
type rollingDeadline struct {
	w         http.ResponseWriter
	allowance time.Duration // for each write
}

// writeAllowance is the time that a client has to take each write of a response
// that may last longer than WriteTimeout.
const writeAllowance = 15 * time.Second

// responseGrace is the time to write the response that says that the time of a
// request is over.
const responseGrace = 5 * time.Second

// writeTimeoutOf returns the WriteTimeout of the server of the request with
// this context, or 0.
func writeTimeoutOf(ctx context.Context) time.Duration {
	if srv, ok := ctx.Value(http.ServerContextKey).(*http.Server); ok {
		return max(srv.WriteTimeout, 0)
	}
	return 0
}

// writePiece is the most that is written under one deadline.
const writePiece = 64 << 10

// write writes p, each piece under a deadline of its own. The last deadline
// stays, for the flush. An error of setting one is ignored: if the client has
// disconnected, the write fails too.
func (d rollingDeadline) write(p []byte) (n int, err error) {
	for {
		d.arm()

		piece := p[n:min(len(p), n+writePiece)]
		if len(piece) > 0 {
			if _, err := d.w.Write(piece); err != nil {
				return n, err
			}
		}
		if n += len(piece); n == len(p) {
			return n, nil
		}
	}
}

func (d rollingDeadline) arm() { d.set(time.Now().Add(d.allowance)) }

func (d rollingDeadline) clear() error { return d.set(time.Time{}) }

// set ignores that a writer has no deadlines, such as an
// httptest.ResponseRecorder.
func (d rollingDeadline) set(deadline time.Time) error {
	err := http.NewResponseController(d.w).SetWriteDeadline(deadline)
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	return err
}
