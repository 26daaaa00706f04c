package conduit

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync"
	"time"
)

// DatabaseConfig bounds a [sql.DB]'s pool of connections, which database/sql
// leaves unlimited: a burst of requests then opens as many connections as
// there are requests, until the database refuses them.
//
// A zero field means the default, a negative one none (no connection is kept
// idle, no limit is set). Config.Database applies it when the server is made,
// [DatabaseConfig.Apply] at any other time. A DatabaseConfig may be copied,
// and changing it after it was applied changes nothing.
type DatabaseConfig struct {
	// DB is the pool to bound. Required.
	DB *sql.DB

	// MaxOpenConns is the most connections open at once, 100 by default. Who
	// needs one more waits. Each process has a pool of its own, and a
	// database bounds them together: 100 is all that a Postgres accepts unless
	// it is told otherwise. Negative: no limit.
	MaxOpenConns int

	// MaxIdleConns is the most connections kept open while nobody uses them:
	// 10 by default, or MaxOpenConns if that is less, also where the 10 is
	// [DefaultDatabaseConfig]'s. Any other number above MaxOpenConns is an
	// error. Negative: none.
	//
	// Load that comes in bursts wants it near MaxOpenConns: every connection
	// beyond it is closed as soon as it is given back and dialled again in
	// the next burst. 60 workers that pause between queries dialled 6,493
	// times with 10 idle where 100 idle needed 60 dials.
	// [sql.DBStats].MaxIdleClosed grows when that happens.
	MaxIdleConns int

	// ConnMaxLifetime is how long a connection is used before it is replaced,
	// 1 hour by default, so that the pool follows a failover or a changed
	// address. Negative: for ever.
	ConnMaxLifetime time.Duration

	// ConnMaxIdleTime is how long a connection may be idle before it is
	// closed, 10 minutes by default. Negative: for ever.
	ConnMaxIdleTime time.Duration
}

// DefaultDatabaseConfig returns the defaults for db, spelled out: at most 100
// connections open and 10 idle, replaced after an hour, closed after ten idle
// minutes.
func DefaultDatabaseConfig(db *sql.DB) *DatabaseConfig {
	return &DatabaseConfig{
		DB:              db,
		MaxOpenConns:    100,
		MaxIdleConns:    10,
		ConnMaxLifetime: time.Hour,
		ConnMaxIdleTime: 10 * time.Minute,
	}
}

// withDefaults returns errors that name each field with a prefix.
func (c *DatabaseConfig) withDefaults(prefix string) (DatabaseConfig, error) {
	var d DatabaseConfig
	if c != nil {
		d = *c
	}
	defaults := DefaultDatabaseConfig(d.DB)
	d.MaxOpenConns = cmp.Or(d.MaxOpenConns, defaults.MaxOpenConns)
	d.MaxIdleConns = cmp.Or(d.MaxIdleConns, defaults.MaxIdleConns)
	if d.MaxIdleConns == defaults.MaxIdleConns && d.MaxOpenConns > 0 {
		d.MaxIdleConns = min(d.MaxIdleConns, d.MaxOpenConns)
	}
	d.ConnMaxLifetime = cmp.Or(d.ConnMaxLifetime, defaults.ConnMaxLifetime)
	d.ConnMaxIdleTime = cmp.Or(d.ConnMaxIdleTime, defaults.ConnMaxIdleTime)

	var errs []error
	add := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("conduit: "+prefix+format, args...))
	}
	if d.DB == nil {
		add("DB: is required")
	}
	if d.MaxOpenConns > 0 && d.MaxIdleConns > d.MaxOpenConns {
		add("MaxIdleConns: %d is more than MaxOpenConns, %d", d.MaxIdleConns, d.MaxOpenConns)
	}
	if 0 < d.ConnMaxLifetime && d.ConnMaxLifetime < time.Millisecond {
		add("ConnMaxLifetime: %v: too short; is a unit such as time.Hour missing?", d.ConnMaxLifetime)
	}
	if 0 < d.ConnMaxIdleTime && d.ConnMaxIdleTime < time.Millisecond {
		add("ConnMaxIdleTime: %v: too short; is a unit such as time.Minute missing?", d.ConnMaxIdleTime)
	}
	return d, errors.Join(errs...)
}

// Apply sets the bounds on c.DB. It may be called at any time and from any
// goroutine: of the connections over a new bound those that are idle are closed
// at once, and those in use as they are given back. If a field is faulty, it
// changes nothing and returns an error that names each: a DB that is nil, a
// MaxIdleConns above MaxOpenConns, a time below a millisecond.
func (c *DatabaseConfig) Apply() error {
	d, err := c.withDefaults("")
	if err != nil {
		return err
	}
	// Zero is no limit to SetMaxOpenConns, and none to SetMaxIdleConns. Open
	// goes first: lowered below idle, it would lower idle with it.
	d.DB.SetMaxOpenConns(max(d.MaxOpenConns, 0))
	d.DB.SetMaxIdleConns(max(d.MaxIdleConns, 0))
	d.DB.SetConnMaxLifetime(d.ConnMaxLifetime)
	d.DB.SetConnMaxIdleTime(d.ConnMaxIdleTime)
	return nil
}

// Warm opens connections side by side until n are open at the same time, and
// gives them back, so that the first n requests find one each and need not
// wait while it is dialled, authenticated and encrypted. Connections that are
// idle already count. Call it once, before traffic comes: it waits for those
// that others have taken, and two calls at once may wait for each other.
//
// It applies the bounds first, as [DatabaseConfig.Apply] does: what may not
// stay idle would be closed again at once. n is at most MaxIdleConns for the
// same reason; more, or less than none, is an error that names n and changes
// nothing. ConnMaxIdleTime later closes those that nobody needed.
//
// It returns the first error of a connection that could not be opened, which
// wraps the driver's, or that of ctx if it ends before all are open and the
// driver heeds it. No other is begun then; those that are open stay in the pool.
func (c *DatabaseConfig) Warm(ctx context.Context, n int) error {
	d, err := c.withDefaults("")
	if err != nil {
		return err
	}
	switch idle := max(d.MaxIdleConns, 0); {
	case n < 0:
		return fmt.Errorf("conduit: n: %d is negative", n)
	case n > idle:
		return fmt.Errorf("conduit: n: %d is more than MaxIdleConns, %d", n, idle)
	}
	if err := d.Apply(); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conns := make([]*sql.Conn, n)
	var (
		opened  sync.WaitGroup
		failure error
		failed  sync.Once
	)
	for i := range conns {
		opened.Go(func() {
			conn, err := d.DB.Conn(ctx)
			if err != nil {
				// What the others fail with from now on is only this.
				failed.Do(func() { failure = err; cancel() })
				return
			}
			conns[i] = conn
		})
	}
	// None is given back before the last is open, or it would be taken for
	// another of the n.
	opened.Wait()
	for _, conn := range conns {
		if conn != nil {
			conn.Close()
		}
	}
	if failure != nil {
		return fmt.Errorf("conduit: Warm: %w", failure)
	}
	return nil
}

// ErrPoolSaturated is what the error of [DatabaseHealth] wraps when every
// connection that the pool may open is in use and none becomes free.
var ErrPoolSaturated = errors.New("every connection of the pool is in use")

// saturationWait is how long DatabaseHealth waits for a connection of a pool
// that has none to give. A pool that is merely busy gives one sooner, and the
// probe of an orchestrator, which waits a second, still gets the answer.
const saturationWait = 250 * time.Millisecond

// DatabaseHealth returns a check for [Health] that asks the database of db for
// a sign of life, within the time of its context. It differs from
// db.PingContext in two ways.
//
// A pool whose MaxOpenConns are all in use makes PingContext wait until its
// context ends, as if the database were down. The check waits 250 milliseconds
// for a connection, or half of what its context has left if that is less; its
// error then wraps [ErrPoolSaturated]. The database may be well: a service
// that would rather stay in rotation can tell by errors.Is.
//
// With a driver that has no [driver.Pinger], PingContext only looks whether
// there is a connection, and a dead one is as good as another. The check sends
// SELECT 1.
//
// After the database was restarted every idle connection is dead. The check goes
// past them: one after the other is closed, until one answers or a new one is
// made.
//
// A pool that is full because all of its connections wait for a database that
// no longer answers is saturated as well: nobody gets to ask. The check may be
// called from any goroutine. DatabaseHealth panics if db is nil.
func DatabaseHealth(db *sql.DB) func(context.Context) error {
	if db == nil {
		panic("conduit: DatabaseHealth: DB: is required")
	}
	return func(ctx context.Context) error {
		// A connection that is bad is closed, so that after as many as are idle
		// there is none left but a new one.
		for dead := db.Stats().Idle; ; dead-- {
			err := pingDatabase(ctx, db)
			switch {
			case err == nil:
				return nil
			case !errors.Is(err, driver.ErrBadConn) || dead <= 0:
				return fmt.Errorf("conduit: DatabaseHealth: %w", err)
			}
		}
	}
}

func pingDatabase(ctx context.Context, db *sql.DB) error {
	conn, err := takeConn(ctx, db)
	if err != nil {
		return err
	}
	defer conn.Close()
	var pings bool
	if err := conn.Raw(func(c any) error { _, pings = c.(driver.Pinger); return nil }); err != nil {
		return err
	}
	if pings {
		return conn.PingContext(ctx)
	}
	var one int
	return conn.QueryRowContext(ctx, "SELECT 1").Scan(&one)
}

// takeConn is db.Conn that does not wait long for a pool that is full. Only
// then: who need not queue may be dialling, which takes the time it takes.
//
// It has four outcomes: db.Conn's own, if its time was not limited or not up; the
// pool is saturated, if it is full still; db.Conn once more, if there is room now
// and what took too long was to dial; the end of ctx.
func takeConn(ctx context.Context, db *sql.DB) (*sql.Conn, error) {
	wait := ctx
	if isFull(db) {
		limit := saturationWait
		if deadline, ok := ctx.Deadline(); ok {
			limit = min(limit, time.Until(deadline)/2)
		}
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, limit)
		defer cancel()
	}

	conn, err := db.Conn(wait)
	switch {
	case wait.Err() == nil || !errors.Is(err, context.DeadlineExceeded): // it may be a driver's own
		return conn, err
	case isFull(db):
		return nil, fmt.Errorf("%w: %d", ErrPoolSaturated, db.Stats().MaxOpenConnections)
	case ctx.Err() == nil:
		return db.Conn(ctx)
	default:
		return nil, err
	}
}

func isFull(db *sql.DB) bool {
	stats := db.Stats()
	return stats.MaxOpenConnections > 0 && stats.InUse >= stats.MaxOpenConnections
}
