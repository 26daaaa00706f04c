// SPDX-License-Identifier: MIT

package conduit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ShutdownConfig configures [NewGracefulShutdown]. HookTimeout and Delay, if
// zero, are at most a quarter of Timeout each. So are those of
// [DefaultShutdownConfig] if they would leave no time to drain.
type ShutdownConfig struct {
	// Timeout bounds a whole shutdown: delay, drain and hooks. Default: 30
	// seconds. The service manager must wait longer before it kills the process;
	// Kubernetes waits 30 seconds by default.
	Timeout time.Duration

	// HookTimeout is the part of Timeout that is kept for hooks. Default: 5
	// seconds. Negative: they get what is left.
	HookTimeout time.Duration

	// Delay is how long the server drains before the listener closes, so that
	// clients go elsewhere. Default: 500 milliseconds. Behind a load balancer
	// that polls [Health], use more than two of its intervals, 5 seconds as a
	// rule.
	Delay time.Duration

	// Signals are what [GracefulShutdown.Run] waits for. Default: SIGINT and
	// SIGTERM. Empty but not nil: none.
	Signals []os.Signal
}

// DefaultShutdownConfig returns the defaults of [ShutdownConfig].
func DefaultShutdownConfig() *ShutdownConfig {
	return &ShutdownConfig{
		Timeout:     30 * time.Second,
		HookTimeout: 5 * time.Second,
		Delay:       500 * time.Millisecond,
		Signals:     []os.Signal{syscall.SIGINT, syscall.SIGTERM},
	}
}

func (c *ShutdownConfig) withDefaults() (ShutdownConfig, error) {
	var d ShutdownConfig
	if c != nil {
		d = *c
	}

	defaults := DefaultShutdownConfig()
	d.Timeout = cmp.Or(d.Timeout, defaults.Timeout)

	var errs errorList
	errs.addShort("Timeout", d.Timeout)
	errs.addShort("HookTimeout", d.HookTimeout)
	errs.addShort("Delay", d.Delay)
	if len(errs) > 0 {
		return d, errors.Join(errs...)
	}

	if d.Timeout > 0 {
		if max(d.Delay, 0)+max(d.HookTimeout, 0) >= d.Timeout {
			// A default was hardly meant to contradict Timeout.
			if d.Delay == defaults.Delay {
				d.Delay = 0
			}
			if d.HookTimeout == defaults.HookTimeout {
				d.HookTimeout = 0
			}
		}

		defaults.HookTimeout = min(defaults.HookTimeout, d.Timeout/4, (d.Timeout-max(d.Delay, 0))/2)
		defaults.Delay = min(defaults.Delay, d.Timeout/4, (d.Timeout-max(d.HookTimeout, 0))/2)
		explicit := max(d.Delay, 0) + max(d.HookTimeout, 0)
		if explicit >= d.Timeout {
			return d, fmt.Errorf("conduit: Timeout: %v leaves no time to drain beside Delay, %v, and HookTimeout, %v", d.Timeout, d.Delay, d.HookTimeout)
		}
	}

	d.HookTimeout = cmp.Or(d.HookTimeout, defaults.HookTimeout)
	d.Delay = cmp.Or(d.Delay, defaults.Delay)
	if d.Signals == nil {
		d.Signals = defaults.Signals
	}
	d.Signals = slices.Clone(d.Signals)
	return d, nil
}

// GracefulShutdown runs a [Server] until a signal, and then stops it without
// losing a request, in this order:
//
//  1. The channel of [Draining] closes and [Health] responds with 503.
//     Connections and requests are still accepted.
//  2. For four fifths of Delay responses carry Connection: close (on HTTP/2 a
//     GOAWAY).
//  3. For the last fifth they do not, so that nobody has a reason to dial.
//  4. The listener closes once its queue is empty.
//  5. Responses carry Connection: close again, for up to 250 ms, until no
//     connection is left.
//  6. Idle connections close, and running requests may end. When the time is
//     up, their contexts are cancelled and their connections closed.
//  7. The hooks run.
//
// A second signal means that the time is up. A third ends the process at once,
// with exit status 128 plus the signal's number. The log line shutdown has the
// result: drained counts the requests that ended meanwhile; delay is the time
// of steps 1 to 3, accept, linger, wait and hooks that of the others.
type GracefulShutdown struct {
	server  *Server
	config  ShutdownConfig
	trigger chan struct{} // closed by Shutdown
	once    sync.Once
	ran     atomic.Bool

	mu    sync.Mutex // guards hooks
	hooks []func(context.Context) error
}

// NewGracefulShutdown returns a GracefulShutdown for srv. It panics if srv is
// nil or cfg leaves no time to drain.
func NewGracefulShutdown(srv *Server, cfg *ShutdownConfig) *GracefulShutdown {
	c, err := cfg.withDefaults()
	if srv == nil {
		err = errors.New("conduit: NewGracefulShutdown: the server is nil")
	} else {
		srv.checkMade()
	}
	if err != nil {
		panic(err)
	}
	return &GracefulShutdown{server: srv, config: c, trigger: make(chan struct{})}
}

// checkMade panics if NewGracefulShutdown has not made g.
func (g *GracefulShutdown) checkMade() {
	if g.server == nil {
		panic("conduit: GracefulShutdown: was not made by NewGracefulShutdown")
	}
}

// StartWithGracefulShutdown is [NewGracefulShutdown], which may panic, and
// [GracefulShutdown.Start] in one, without hooks.
func StartWithGracefulShutdown(srv *Server, cfg *ShutdownConfig) error {
	return NewGracefulShutdown(srv, cfg).Start()
}

// RegisterHook adds a function to run when the server has stopped or failed to
// start. The last runs first: register the closing of a database right after
// opening it.
//
// The hooks share HookTimeout: each one's context ends after an equal part of
// the time left. A hook that fails, panics or takes longer does not stop the
// others; the error of Run names it and wraps its own. A hook may register
// another, which runs next. RegisterHook panics if hook is nil.
func (g *GracefulShutdown) RegisterHook(hook func(context.Context) error) {
	g.checkMade()
	if hook == nil {
		panic("conduit: RegisterHook: the hook is nil")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hooks = append(g.hooks, hook)
}

// Start serves on Config.Address until a signal comes, and shuts down. It is
// [GracefulShutdown.Run] without a context and a listener.
func (g *GracefulShutdown) Start() error {
	return g.Run(context.Background(), nil)
}

// Run serves on l, or on Config.Address if l is nil, until a signal comes, ctx
// ends, Shutdown is called or the server stops. It shuts down and returns nil
// after a clean end. The error joins all that went wrong: why the server could
// not serve, how many connections were aborted, which hooks failed. Run always
// closes l. A second call returns an error. While Run runs, its signals lose
// their usual effect.
func (g *GracefulShutdown) Run(ctx context.Context, l net.Listener) error {
	g.checkMade()
	if g.ran.Swap(true) {
		if l != nil {
			l.Close()
		}
		return errors.New("conduit: Run: was called before")
	}

	signals := make(chan os.Signal, 3)
	if len(g.config.Signals) > 0 {
		signal.Notify(signals, g.config.Signals...)
		defer signal.Stop(signals)
	}

	served := make(chan error, 1)
	go func() {
		if l == nil {
			served <- g.server.ListenAndServe()
		} else {
			served <- g.server.Serve(l)
		}
	}()
	heard, stopped, serveErr := g.waitForCause(ctx, signals, served)

	start := time.Now()
	shutdownCtx, abort := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abort(nil)
	finished := make(chan struct{})
	defer close(finished)
	go g.escalate(signals, heard, abort, finished)

	var delayed time.Duration
	if !stopped {
		delayed = g.delay(shutdownCtx)
	}

	drainCtx, cancelDrain := g.drainContext(shutdownCtx, start)
	defer cancelDrain()
	report := g.server.shutdown(drainCtx)
	if !stopped {
		serveErr = <-served
	}

	hooksStart := time.Now()
	hooksErr := g.runHooks(context.WithoutCancel(ctx), start)

	err := errors.Join(serveErr, report.err(), hooksErr)
	if serveErr != nil && g.server.Addr() == nil {
		return err // it never served, and the error says all there is
	}
	g.log(ctx, report, err,
		slog.Duration("delay", delayed),
		slog.Duration("hooks", time.Since(hooksStart)),
		slog.Duration("duration", time.Since(start)),
	)
	return err
}

// waitForCause returns when there is a cause to shut down. heard is the number
// of signals so far. stopped means that the server has stopped by itself, with
// err.
func (g *GracefulShutdown) waitForCause(ctx context.Context, signals <-chan os.Signal, served <-chan error) (heard int, stopped bool, err error) {
	logger := g.server.logger
	select {
	case err = <-served:
		return 0, true, err
	case sig := <-signals:
		heard++
		logger.Info("draining", "cause", sig.String())
	case <-ctx.Done():
		logger.Info("draining", "cause", context.Cause(ctx).Error())
	case <-g.trigger:
		logger.Info("draining", "cause", "Shutdown")
	}
	return heard, false, nil
}

// log logs the result of the shutdown.
func (g *GracefulShutdown) log(ctx context.Context, report shutdownReport, err error, durations ...slog.Attr) {
	level, attrs := slog.LevelInfo, append([]slog.Attr{
		slog.Int64("drained", report.drained),
		slog.Int64("aborted_connections", report.aborted),
		slog.Int64("hijacked_waited", report.hijackedWaited),
		slog.Int64("hijacked_left", report.hijackedLeft),
		slog.Duration("accept", report.accepting),
		slog.Duration("linger", report.lingering),
		slog.Duration("wait", report.waiting),
	}, durations...)
	if err != nil {
		level, attrs = slog.LevelError, append(attrs, slog.Any("err", err))
	}
	g.server.logger.LogAttrs(ctx, level, "shutdown", attrs...)
}

// Shutdown makes Run shut down, as a signal does, and returns at once. It may
// be called before Run, and any number of times: only signals escalate.
func (g *GracefulShutdown) Shutdown() {
	g.checkMade()
	g.once.Do(func() { close(g.trigger) })
}

var errSecondSignal = errors.New("conduit: Run: a second signal")

// escalate handles the signals during a shutdown, of which heard came before.
// It returns when the shutdown has finished.
func (g *GracefulShutdown) escalate(signals <-chan os.Signal, heard int, abort context.CancelCauseFunc, finished <-chan struct{}) {
	for {
		select {
		case sig := <-signals:
			heard++
			if heard == 2 {
				g.server.logger.Warn("drain aborted", "cause", sig.String())
				abort(errSecondSignal)
			}
			if heard > 2 {
				g.server.logger.Error("shutdown aborted", "cause", sig.String())
				os.Exit(exitStatus(sig))
			}
		case <-finished:
			return
		}
	}
}

// exitStatus returns the status that a shell reports for a process killed by
// the signal. Raising the signal again would not do: a process that was started
// with it ignored, as in the background of a script, would live on.
func exitStatus(sig os.Signal) int {
	if n, ok := sig.(syscall.Signal); ok {
		return 128 + int(n)
	}
	return 1
}

// drainContext returns a context that ends when the time of the hooks starts.
func (g *GracefulShutdown) drainContext(ctx context.Context, start time.Time) (context.Context, context.CancelFunc) {
	if g.config.Timeout < 0 {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, start.Add(g.config.Timeout-max(g.config.HookTimeout, 0)))
}

// delay serves on while clients disconnect, and returns how long it did. It
// does not end early when no connection is open: a client that was told to
// close dials again at that very moment.
func (g *GracefulShutdown) delay(ctx context.Context) time.Duration {
	start := time.Now()
	g.server.Drain()
	if g.config.Delay > 0 {
		closing := g.config.Delay * 4 / 5
		pause(ctx, closing)
		g.server.sayClose.Store(false)
		pause(ctx, g.config.Delay-closing)
	}
	return time.Since(start)
}

func pause(ctx context.Context, d time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	<-ctx.Done()
}

// runHooks runs the hooks, last in first out, with those that a hook registers.
func (g *GracefulShutdown) runHooks(ctx context.Context, start time.Time) error {
	var deadline time.Time
	switch {
	case g.config.HookTimeout > 0:
		deadline = time.Now().Add(g.config.HookTimeout)
	case g.config.Timeout > 0:
		deadline = start.Add(g.config.Timeout)
	}

	var errs []error
	for {
		g.mu.Lock()
		left := len(g.hooks)
		if left == 0 {
			g.mu.Unlock()
			return errors.Join(errs...)
		}
		hook := g.hooks[left-1]
		g.hooks = g.hooks[:left-1]
		g.mu.Unlock()

		hookCtx, cancel := ctx, context.CancelFunc(func() {})
		if !deadline.IsZero() {
			hookCtx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		}
		if err := runHook(hookCtx, hook); err != nil {
			errs = append(errs, fmt.Errorf("conduit: hook %s: %w", hookName(hook), err))
		}
		cancel()
	}
}

// runHook runs one hook, and abandons it when its context has ended.
func runHook(ctx context.Context, hook func(context.Context) error) error {
	done := runSafely(ctx, hook)
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(hookGrace):
		return fmt.Errorf("did not return: %w", ctx.Err())
	}
}

// hookGrace is how long a hook may take to return after its context has ended.
const hookGrace = 50 * time.Millisecond

func hookName(hook func(context.Context) error) string {
	return runtime.FuncForPC(reflect.ValueOf(hook).Pointer()).Name()
}
