package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"math"
	"net/url"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite" // the driver "sqlite", in Go alone

	"example.com/conduit"
)

// post is one entry. It never changes once it is stored.
type post struct {
	ID        int64     `json:"id"`
	Title     string    `json:"title"`
	Body      string    `json:"body"`
	CreatedAt time.Time `json:"created_at"`
}

// store keeps the posts. The feed relies on one promise: a query that sees a post
// sees every post with a smaller id.
type store struct {
	db     *sql.DB
	pool   *conduit.DatabaseConfig
	place  string          // where the posts are, for the log
	listen *pgx.ConnConfig // to listen for posts of other instances; nil on SQLite

	older, newer, oldest, one, create *sql.Stmt
}

// sqliteMigrations and postgresMigrations make the tables. A released step never
// changes: the next one goes below it.
var sqliteMigrations = []string{
	// With AUTOINCREMENT, the id of a deleted post does not come again. SQLite
	// has one writer at a time, so ids become visible in their order.
	`CREATE TABLE posts (
		id         INTEGER PRIMARY KEY AUTOINCREMENT,
		title      TEXT NOT NULL,
		body       TEXT NOT NULL,
		created_at TIMESTAMP NOT NULL
	)`,
}

var postgresMigrations = []string{
	// A sequence gives ids in one order, and transactions commit in another. Post
	// 8 may be visible before post 7: a page that has seen 8 asks for newer posts,
	// and never gets 7. So inserts take turns, those of the service and those by
	// hand. The lock is taken before the first id, and released once the rows are
	// visible. A transaction that inserts should end soon: others wait for it.
	//
	// The notification is part of the transaction: it goes out if the rows do.
	// It carries nothing, for what is new is in the table.
	`CREATE TABLE posts (
		id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
		title      TEXT NOT NULL,
		body       TEXT NOT NULL,
		created_at TIMESTAMPTZ NOT NULL
	);
	CREATE FUNCTION posts_take_turns() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock(TG_RELID::bigint);
		RETURN NULL;
	END $$;
	CREATE TRIGGER posts_take_turns BEFORE INSERT ON posts
		FOR EACH STATEMENT EXECUTE FUNCTION posts_take_turns();
	CREATE FUNCTION posts_notify() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_notify('posts', '');
		RETURN NULL;
	END $$;
	CREATE TRIGGER posts_notify AFTER INSERT ON posts
		FOR EACH STATEMENT EXECUTE FUNCTION posts_notify();`,
}

// postgresMigrationLock makes instances that start together take turns.
const postgresMigrationLock = "SELECT pg_advisory_xact_lock(0)"

// openSQLite opens the database in a file, which it makes if it does not exist.
func openSQLite(ctx context.Context, file string) (*store, error) {
	if file == "" || file == ":memory:" {
		// Each connection of the pool would have a database of its own.
		return nil, fmt.Errorf("sqlite: %q is not a file", file)
	}
	// With a write-ahead log, readers do not wait for the writer. Writers wait
	// for each other, 5 seconds at most. A transaction that will write says so
	// at its start: after a read it could not wait any more.
	settings := url.Values{
		"_pragma":      {"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(NORMAL)", "foreign_keys(1)"},
		"_txlock":      {"immediate"},
		"_time_format": {"sqlite"},
	}
	path := url.URL{Path: file}
	db, err := sql.Open("sqlite", "file:"+path.EscapedPath()+"?"+settings.Encode())
	if err != nil {
		return nil, err
	}
	s := &store{db: db, place: "SQLite: " + file, pool: &conduit.DatabaseConfig{
		DB: db,
		// More connections would only wait for the same file. These are cheap to
		// keep, and no failover makes them useless.
		MaxOpenConns:    8,
		ConnMaxLifetime: -1,
		ConnMaxIdleTime: -1,
	}}
	if err := s.prepare(ctx, sqliteMigrations, ""); err != nil {
		return nil, fmt.Errorf("sqlite: %s: %w", file, errors.Join(err, db.Close()))
	}
	return s, nil
}

// openPostgres opens the database of a URL, or of settings as libpq has them. A
// pooler in between must be in session mode: LISTEN needs a connection of its own.
func openPostgres(ctx context.Context, dsn string) (*store, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: %w", err) // without its password
	}
	db := stdlib.OpenDB(*cfg)
	s := &store{db: db, place: "Postgres: " + cfg.Database + " at " + cfg.Host, listen: cfg, pool: &conduit.DatabaseConfig{
		DB: db,
		// Postgres allows 100 connections, for all instances together. All that are
		// open may stay idle, or each burst would dial again.
		MaxOpenConns: 20,
		MaxIdleConns: 20,
	}}
	if err := s.prepare(ctx, postgresMigrations, postgresMigrationLock); err != nil {
		return nil, fmt.Errorf("postgres: %w", errors.Join(err, db.Close()))
	}
	return s, nil
}

// prepare bounds the pool, makes the tables, prepares the statements and opens the
// first connections. lock keeps other instances from migrating at the same time.
func (s *store) prepare(ctx context.Context, migrations []string, lock string) error {
	if err := s.pool.Apply(); err != nil {
		return err
	}
	if err := migrate(ctx, s.db, migrations, lock); err != nil {
		return err
	}
	for _, statement := range []struct {
		to   **sql.Stmt
		text string
	}{
		{&s.older, `SELECT id, title, body, created_at FROM posts WHERE id < $1 ORDER BY id DESC LIMIT $2`},
		{&s.newer, `SELECT id, title, body, created_at FROM posts WHERE id > $1 ORDER BY id`},
		{&s.oldest, `SELECT id FROM posts ORDER BY id DESC LIMIT 1 OFFSET $1`},
		{&s.one, `SELECT id, title, body, created_at FROM posts WHERE id = $1`},
		{&s.create, `INSERT INTO posts (title, body, created_at) VALUES ($1, $2, $3) RETURNING id`},
	} {
		var err error
		if *statement.to, err = s.db.PrepareContext(ctx, statement.text); err != nil {
			return err
		}
	}
	return s.pool.Warm(ctx, 4)
}

// migrate takes the steps that the database does not have yet, all or none.
func migrate(ctx context.Context, db *sql.DB, migrations []string, lock string) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after a commit it does nothing
	if lock != "" {
		if _, err := tx.ExecContext(ctx, lock); err != nil {
			return fmt.Errorf("migrations: %w", err)
		}
	}
	if _, err := tx.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY)`); err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	var version int
	if err := tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(version), 0) FROM migrations`).Scan(&version); err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	if version > len(migrations) {
		return fmt.Errorf("migrations: the database is at version %d, and this program knows %d", version, len(migrations))
	}
	for ; version < len(migrations); version++ {
		if _, err := tx.ExecContext(ctx, migrations[version]); err != nil {
			return fmt.Errorf("migrations: version %d: %w", version+1, err)
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO migrations (version) VALUES ($1)`, version+1); err != nil {
			return fmt.Errorf("migrations: version %d: %w", version+1, err)
		}
	}
	return tx.Commit()
}

func (s *store) close() error { return s.db.Close() }

func (s *store) add(ctx context.Context, title, body string) (post, error) {
	p := post{Title: title, Body: body, CreatedAt: time.Now().UTC().Truncate(time.Microsecond)}
	err := s.create.QueryRowContext(ctx, p.Title, p.Body, p.CreatedAt).Scan(&p.ID)
	return p, err
}

// get returns a post, or sql.ErrNoRows.
func (s *store) get(ctx context.Context, id int64) (post, error) {
	for p, err := range rows(ctx, s.one, id) {
		return p, err
	}
	return post{}, sql.ErrNoRows
}

// list yields up to limit posts with an id below before, newest first.
func (s *store) list(ctx context.Context, before int64, limit int) iter.Seq2[post, error] {
	return rows(ctx, s.older, before, limit)
}

// all yields every post, newest first. It reads a page at a time: between pages
// the connection is back in the pool, and no transaction stays open for as long as
// a slow client takes. Posts that are made meanwhile shift nothing, since a page
// starts at an id and not at an offset.
func (s *store) all(ctx context.Context) iter.Seq2[post, error] {
	return func(yield func(post, error) bool) {
		for before, n := int64(math.MaxInt64), maxLimit; n == maxLimit; {
			n = 0
			for p, err := range s.list(ctx, before, maxLimit) {
				if !yield(p, err) || err != nil {
					return
				}
				before = p.ID
				n++
			}
		}
	}
}

// since yields the posts with an id above after, oldest first.
func (s *store) since(ctx context.Context, after int64) iter.Seq2[post, error] {
	return rows(ctx, s.newer, after)
}

// beforeNewest returns the id before the n newest posts, or 0 if there are no more
// than n.
func (s *store) beforeNewest(ctx context.Context, n int) (id int64, err error) {
	err = s.oldest.QueryRowContext(ctx, n).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return id, err
}

// rows yields the posts of a query as the database sends them. An error is the last
// element. The connection returns to the pool when the loop ends, however it ends.
func rows(ctx context.Context, statement *sql.Stmt, args ...any) iter.Seq2[post, error] {
	return func(yield func(post, error) bool) {
		rows, err := statement.QueryContext(ctx, args...)
		if err != nil {
			yield(post{}, err)
			return
		}
		defer rows.Close()
		for rows.Next() {
			var p post
			err := rows.Scan(&p.ID, &p.Title, &p.Body, &p.CreatedAt)
			p.CreatedAt = p.CreatedAt.UTC()
			if !yield(p, err) || err != nil {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(post{}, err)
		}
	}
}
