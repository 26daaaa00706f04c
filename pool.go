// SPDX-License-Identifier: MIT

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

// DatabaseConfig bounds a [sql.DB]'s pool of connections. Without bounds, a
// burst of requests opens one each, until the database refuses.
type DatabaseConfig struct {
	// DB is required.
	DB *sql.DB

	// MaxOpenConns is the most connections open at once; others wait. Default:
	// 100. Negative: no limit. Each process has its own pool, and the database
	// limits them together: Postgres to 100 by default.
	MaxOpenConns int

	// MaxIdleConns is the most connections kept open while unused. Default: 10,
	// which means MaxOpenConns if that is less. Any other number above
	// MaxOpenConns is an error. Negative: none.
	//
	// For load in bursts, set it near MaxOpenConns: a connection beyond it closes
	// when given back, and the next burst dials again. 60 workers that pause
	// between queries dialled 6,493 times with 10, 60 times with 100.
	// [sql.DBStats].MaxIdleClosed counts these closings.
	MaxIdleConns int

	// ConnMaxLifetime is how long a connection is used, so that the pool follows a
	// failover or a changed address. Default: 1 hour.
	ConnMaxLifetime time.Duration

	// ConnMaxIdleTime is how long a connection may be idle. Default: 10 minutes.
	ConnMaxIdleTime time.Duration
}

// DefaultDatabaseConfig returns the defaults of [DatabaseConfig] for db.
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

// Apply sets the bounds on c.DB, at any time. Idle connections beyond a new
// bound close at once, those in use when they are given back. If a field is
// invalid (a positive time below a millisecond is), Apply changes nothing and
// returns an error.
func (c *DatabaseConfig) Apply() error {
	d, err := c.withDefaults("")
	if err != nil {
		return err
	}
	// Zero is no limit to SetMaxOpenConns, and no connection to SetMaxIdleConns.
	// Open goes first: below idle, it would lower idle too.
	d.DB.SetMaxOpenConns(max(d.MaxOpenConns, 0))
	d.DB.SetMaxIdleConns(max(d.MaxIdleConns, 0))
	d.DB.SetConnMaxLifetime(d.ConnMaxLifetime)
	d.DB.SetConnMaxIdleTime(d.ConnMaxIdleTime)
	return nil
}

// Warm opens connections side by side until n are open at once, and gives them
// back, so that the first n requests need not dial. Idle connections count.
// Call it once, before traffic comes: it waits for connections in use, and two
// calls at once may wait for each other.
//
// It first applies the bounds, as [DatabaseConfig.Apply] does. An n below zero
// or above MaxIdleConns, beyond which connections close at once, is an error
// that names n and changes nothing.
//
// If a connection cannot be opened, or ctx ends and the driver heeds it, Warm
// opens no more and returns the first error, which wraps the driver's or ctx's.
// Open connections stay in the pool.
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
				// The errors of the others follow from this one.
				failed.Do(func() { failure = err; cancel() })
				return
			}
			conns[i] = conn
		})
	}

	// None is given back before the last is open, or it would be taken again as
	// one of the n.
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

// ErrPoolSaturated is wrapped by the error of [DatabaseHealth] when all
// connections that the pool may open stay in use.
var ErrPoolSaturated = errors.New("every connection of the pool is in use")

// saturationWait is how long DatabaseHealth waits for a connection of a full
// pool. A pool that is merely busy has one sooner, and the probe of an
// orchestrator, which waits a second, still gets its response.
const saturationWait = 250 * time.Millisecond

// DatabaseHealth returns a check for [Health] that pings db within the time of
// its context. It differs from db.PingContext:
//
//   - If all MaxOpenConns are in use, PingContext waits until its context ends.
//     The check waits 250 milliseconds, or half of its context's time if that
//     is less. Its error then wraps [ErrPoolSaturated]. The database may be
//     well, or no longer respond. A service that should still get requests then
//     can test the error.
//   - If the driver has no [driver.Pinger], PingContext takes a dead connection
//     for a live one. The check sends SELECT 1.
//   - After a restart of the database idle connections are dead. The check
//     closes them until one responds or a new one is made.
//
// DatabaseHealth panics if db is nil.
func DatabaseHealth(db *sql.DB) func(context.Context) error {
	if db == nil {
		panic("conduit: DatabaseHealth: DB: is required")
	}
	return func(ctx context.Context) error {
		// Each bad connection is closed. After as many as are idle, the next one
		// is new.
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

// takeConn is db.Conn that does not wait long for a full pool. Otherwise it
// sets no limit: db.Conn may be dialling, which takes its time.
//
// It has four outcomes. The result of db.Conn, if its time was not limited or
// not up. A saturated pool, if it is still full. A second db.Conn, if there is
// room now and dialling took too long. The end of ctx.
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
	case wait.Err() == nil || !errors.Is(err, context.DeadlineExceeded): // or the error may be a driver's own
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
