package conduit

import (
	"database/sql"
	"errors"
	"fmt"
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

	// MaxOpenConns is the most connections open at once, 100 by default; who
	// needs one beyond that waits. Negative: no limit.
	MaxOpenConns int

	// MaxIdleConns is the most connections kept open while nobody uses them:
	// 10 by default, or MaxOpenConns if that is less. More than MaxOpenConns
	// is an error. Negative: none.
	//
	// Load that comes in bursts wants it near MaxOpenConns: every connection
	// beyond it is closed as soon as it is given back and dialled again in
	// the next burst. sql.DBStats.MaxIdleClosed grows when that happens.
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

func (c *DatabaseConfig) withDefaults() (DatabaseConfig, error) {
	var d DatabaseConfig
	if c != nil {
		d = *c
	}
	defaults := DefaultDatabaseConfig(d.DB)
	if d.MaxOpenConns == 0 {
		d.MaxOpenConns = defaults.MaxOpenConns
	}
	if d.MaxIdleConns == 0 {
		d.MaxIdleConns = defaults.MaxIdleConns
		if d.MaxOpenConns > 0 {
			d.MaxIdleConns = min(d.MaxIdleConns, d.MaxOpenConns)
		}
	}
	if d.ConnMaxLifetime == 0 {
		d.ConnMaxLifetime = defaults.ConnMaxLifetime
	}
	if d.ConnMaxIdleTime == 0 {
		d.ConnMaxIdleTime = defaults.ConnMaxIdleTime
	}

	var faults []error
	if d.DB == nil {
		faults = append(faults, errors.New("conduit: DB: is required"))
	}
	if d.MaxOpenConns > 0 && d.MaxIdleConns > d.MaxOpenConns {
		faults = append(faults, fmt.Errorf("conduit: MaxIdleConns: %d is more than MaxOpenConns, %d", d.MaxIdleConns, d.MaxOpenConns))
	}
	return d, errors.Join(faults...)
}

// Apply sets the bounds on c.DB. It may be called at any time and from any
// goroutine; connections over a new bound are closed as they are given back.
// It changes nothing and returns an error that names each faulty field if DB
// is nil or MaxIdleConns exceeds MaxOpenConns.
func (c *DatabaseConfig) Apply() error {
	d, err := c.withDefaults()
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
