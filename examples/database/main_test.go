package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/conduit"
)

// engines are the databases on which the service keeps each promise.
var engines = []struct {
	name       string
	newService func(t *testing.T) service
}{
	{"SQLite", func(t *testing.T) service {
		// A name that needs escaping in a URL.
		return service{file: filepath.Join(t.TempDir(), "100% sure?.db"), replay: 256}
	}},
	{"Postgres", func(t *testing.T) service { return service{url: newDatabase(t), replay: 256} }},
}

func eachEngine(t *testing.T, test func(t *testing.T, s service)) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) { test(t, engine.newService(t)) })
	}
}

func TestResponses(t *testing.T) {
	const jsonType = "application/json"
	long := strings.Repeat("é", maxTitle)
	tests := []struct {
		name         string
		method, path string
		contentType  string // of the request
		body         string
		status       int
		wantType     string // of the response
		want         string // in its body
		header       [2]string
	}{
		{name: "page", method: "GET", path: "/", status: 200, wantType: "text/html; charset=utf-8", want: "GET /api/posts"},
		{name: "script", method: "GET", path: "/static/posts.js", status: 200, wantType: "text/javascript; charset=utf-8", want: "EventSource"},
		{name: "health", method: "GET", path: "/health", status: 200, wantType: jsonType, want: `{"status":"ok"}`},
		{name: "unknown path", method: "GET", path: "/nothing", status: 404, wantType: "text/plain; charset=utf-8"},

		{name: "empty list", method: "GET", path: "/api/posts", status: 200, wantType: jsonType, want: `[]`},
		{name: "empty stream", method: "GET", path: "/api/posts/stream", status: 200, wantType: jsonType, want: `[]`},
		{name: "first", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","body":"b"}`, status: 201, wantType: jsonType, want: `{"id":1,"title":"a","body":"b","created_at":"20`, header: [2]string{"Location", "/api/posts/1"}},
		{name: "charset", method: "POST", path: "/api/posts", contentType: "Application/JSON; charset=utf-8", body: `{"title":"` + long + `"}`, status: 201, wantType: jsonType, header: [2]string{"Location", "/api/posts/2"}},
		{name: "quotes", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"'; DROP TABLE posts; --","body":"\"\\\n<b>"}`, status: 201, wantType: jsonType, header: [2]string{"Location", "/api/posts/3"}},

		{name: "list", method: "GET", path: "/api/posts", status: 200, wantType: jsonType, want: `[{"id":3,"title":"'; DROP TABLE posts; --","body":"\"\\\n\u003cb\u003e",`},
		{name: "head of list", method: "HEAD", path: "/api/posts", status: 200, wantType: jsonType},
		{name: "limit", method: "GET", path: "/api/posts?limit=1", status: 200, wantType: jsonType, want: `[{"id":3,`},
		{name: "before", method: "GET", path: "/api/posts?before=3", status: 200, wantType: jsonType, want: `[{"id":2,`},
		{name: "nothing before", method: "GET", path: "/api/posts?before=1", status: 200, wantType: jsonType, want: "[]"},
		{name: "far before", method: "GET", path: "/api/posts?before=9223372036854775807", status: 200, wantType: jsonType, want: `[{"id":3,`},
		{name: "limit 0", method: "GET", path: "/api/posts?limit=0", status: 400, wantType: jsonType},
		{name: "limit 101", method: "GET", path: "/api/posts?limit=101", status: 400, wantType: jsonType},
		{name: "limit empty", method: "GET", path: "/api/posts?limit=", status: 400, wantType: jsonType},
		{name: "before 0", method: "GET", path: "/api/posts?before=0", status: 400, wantType: jsonType},
		{name: "before not a number", method: "GET", path: "/api/posts?before=1%3B--", status: 400, wantType: jsonType},
		{name: "malformed query", method: "GET", path: "/api/posts?limit=%zz", status: 400, wantType: jsonType},

		{name: "stream", method: "GET", path: "/api/posts/stream", status: 200, wantType: jsonType, want: `},{"id":1,"title":"a","body":"b",`},
		{name: "stream of lines", method: "GET", path: "/api/posts/stream?format=ndjson", status: 200, wantType: "application/x-ndjson", want: "}\n{\"id\":1,"},
		{name: "head of stream", method: "HEAD", path: "/api/posts/stream", status: 200, wantType: jsonType},
		{name: "stream of what", method: "GET", path: "/api/posts/stream?format=xml", status: 400, wantType: jsonType},

		{name: "one", method: "GET", path: "/api/posts/1", status: 200, wantType: jsonType, want: `{"id":1,"title":"a","body":"b","created_at":"20`},
		{name: "unknown", method: "GET", path: "/api/posts/4000", status: 404, wantType: jsonType},
		{name: "negative", method: "GET", path: "/api/posts/-1", status: 404, wantType: jsonType},
		{name: "beyond 64 bits", method: "GET", path: "/api/posts/92233720368547758070", status: 404, wantType: jsonType},
		{name: "not a number", method: "GET", path: "/api/posts/one", status: 400, wantType: jsonType},

		{name: "no type", method: "POST", path: "/api/posts", body: `{"title":"a"}`, status: 415, wantType: jsonType},
		{name: "form", method: "POST", path: "/api/posts", contentType: "application/x-www-form-urlencoded", body: "title=a", status: 415, wantType: jsonType},
		{name: "too large", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","body":"` + strings.Repeat("x", maxDocument) + `"}`, status: 413, wantType: jsonType},
		{name: "too large behind the document", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a"}` + strings.Repeat(" ", maxDocument), status: 413, wantType: jsonType},
		{name: "empty body", method: "POST", path: "/api/posts", contentType: jsonType, status: 400, wantType: jsonType},
		{name: "unknown field", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","id":7}`, status: 400, wantType: jsonType},
		{name: "second document", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a"}{"title":"b"}`, status: 400, wantType: jsonType},
		{name: "blank title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":" \t"}`, status: 400, wantType: jsonType},
		{name: "long title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"` + long + `e"}`, status: 400, wantType: jsonType},
		{name: "NUL in the title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a\u0000"}`, status: 400, wantType: jsonType},
		{name: "NUL in the body", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","body":"\u0000"}`, status: 400, wantType: jsonType},
		{name: "half a surrogate", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"\ud800"}`, status: 201, wantType: jsonType},
		{name: "bytes that are no text", method: "POST", path: "/api/posts", contentType: jsonType, body: "{\"title\":\"\xff\"}", status: 201, wantType: jsonType},

		{name: "unknown path of the API", method: "GET", path: "/api/nothing", status: 404, wantType: jsonType},
		{name: "method of the list", method: "DELETE", path: "/api/posts", status: 405, wantType: jsonType, header: [2]string{"Allow", "GET, HEAD, POST"}},
		{name: "method of events", method: "POST", path: "/api/events", status: 405, wantType: jsonType, header: [2]string{"Allow", "GET, HEAD"}},
	}
	eachEngine(t, func(t *testing.T, s service) {
		url := start(t, s).url
		for _, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				req, err := http.NewRequest(tt.method, url+tt.path, strings.NewReader(tt.body))
				if err != nil {
					t.Fatal(err)
				}
				if tt.contentType != "" {
					req.Header.Set("Content-Type", tt.contentType)
				}
				resp, body := do(t, req)
				if resp.StatusCode != tt.status {
					t.Fatalf("%s %s: status %d, want %d; body %q", tt.method, tt.path, resp.StatusCode, tt.status, body)
				}
				if got := resp.Header.Get("Content-Type"); got != tt.wantType {
					t.Errorf("%s %s: Content-Type %q, want %q", tt.method, tt.path, got, tt.wantType)
				}
				if !strings.Contains(body, tt.want) {
					t.Errorf("%s %s: body %q, want %q in it", tt.method, tt.path, body, tt.want)
				}
				if field, want := tt.header[0], tt.header[1]; field != "" && resp.Header.Get(field) != want {
					t.Errorf("%s %s: %s %q, want %q", tt.method, tt.path, field, resp.Header.Get(field), want)
				}
				if tt.wantType == jsonType && tt.status >= 400 {
					var e apiError
					if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == "" {
						t.Errorf("%s %s: body %q, want an object with an error", tt.method, tt.path, body)
					}
				}
			})
		}
	})
}

// Pages and streams have each post that was made.
func TestEveryPostIsFoundOnce(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		in := start(t, s)
		want := make([]post, 2*maxLimit+50)
		for i := range want {
			p, err := in.posts.add(t.Context(), fmt.Sprint("title ", i), "body")
			if err != nil {
				t.Fatal(err)
			}
			want[len(want)-1-i] = p
		}
		same := func(name string, got []post) {
			t.Helper()
			if len(got) != len(want) {
				t.Fatalf("%s: %d posts, want %d", name, len(got), len(want))
			}
			for i, p := range got {
				if p != want[i] {
					t.Fatalf("%s: post %d is %v, want %v", name, i, p, want[i])
				}
			}
		}

		same("stream", fetch(t, in.url+"/api/posts/stream"))

		_, body := do(t, newGet(t, in.url+"/api/posts/stream?format=ndjson"))
		var lines []post
		for line := range strings.Lines(body) {
			var p post
			if err := json.Unmarshal([]byte(line), &p); err != nil {
				t.Fatalf("%v in %q", err, line)
			}
			lines = append(lines, p)
		}
		same("lines", lines)

		var pages []post
		for before := int64(1 << 62); ; {
			page := fetch(t, fmt.Sprintf("%s/api/posts?limit=70&before=%d", in.url, before))
			pages = append(pages, page...)
			if len(page) < 70 {
				break
			}
			before = page[len(page)-1].ID
		}
		same("pages", pages)
	})
}

// Clients that disconnect halfway, more than the pool has connections, cost it
// none.
func TestConnectionsComeBackFromAbandonedStreams(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		in := start(t, s)
		body := strings.Repeat("x", 60_000) // more than a connection holds
		for range 150 {
			if _, err := in.posts.add(t.Context(), "title", body); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 * in.posts.pool.MaxOpenConns {
			resp, err := http.Get(in.url + "/api/posts/stream")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, resp.Body, 100_000); err != nil {
				t.Error(err)
			}
			resp.Body.Close()
		}
		if got := fetch(t, in.url+"/api/posts?limit=1"); len(got) != 1 {
			t.Errorf("%d posts, want 1", len(got))
		}
	})
}

// A query that fails halfway is an error, and not the end of the posts. One that is
// not read to its end returns its connection.
func TestQueriesEndWithTheirLoops(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		store, err := s.open(t.Context()) // which no feed queries
		if err != nil {
			t.Fatal(err)
		}
		defer store.close()
		for range 2*maxLimit - 1 {
			if _, err := store.add(t.Context(), "title", ""); err != nil {
				t.Fatal(err)
			}
		}
		idle := func() bool { return store.db.Stats().InUse == 0 }

		for _, err := range store.list(t.Context(), 1<<62, maxLimit) {
			if err != nil || idle() {
				t.Fatalf("%v, idle %v", err, idle())
			}
			break
		}
		if !idle() {
			t.Fatal("a loop that was left has its connection still")
		}

		for name, posts := range map[string]func(context.Context) iter.Seq2[post, error]{
			"list": func(ctx context.Context) iter.Seq2[post, error] { return store.list(ctx, 1<<62, maxLimit) },
			"all":  store.all,
		} {
			for _, cancelled := range []int{1, maxLimit - 1} {
				ctx, cancel := context.WithCancel(t.Context())
				var last error
				n := 0
				for _, err := range posts(ctx) {
					last = err
					if n++; n == cancelled {
						cancel()
						for !idle() { // until database/sql has heard of it
							runtime.Gosched()
						}
					}
				}
				cancel()
				if !errors.Is(last, context.Canceled) || n != cancelled+1 {
					t.Errorf("%s: %d posts, then %v, want %d, then context.Canceled", name, n-1, last, cancelled)
				}
			}
		}
	})
}

// Every open page gets a new post, with the id of the post. A page that reconnects
// gets the posts that it missed, from a new process too.
func TestNewPostReachesEveryOpenPage(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		in := start(t, s)
		pages := []*page{in.open(t, ""), in.open(t, ""), in.open(t, "")}
		first := in.create(t, "first")
		for _, page := range pages {
			page.want(t, first)
		}
		second, third := in.create(t, "second"), in.create(t, "third")
		in.open(t, first).want(t, second, third)
		pages[0].want(t, second, third)

		in.stop()
		in = start(t, s)
		page := in.open(t, first)
		page.want(t, second, third)
		fourth := in.create(t, "fourth")
		page.want(t, fourth)
		page = in.open(t, fourth)
		page.want(t, in.create(t, "fifth"))
	})
}

// A page that missed more than is kept gets a gap, as does one with an id that
// never was.
func TestPageThatMissedTooMuchIsToldOfAGap(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		s.replay = 3
		in := start(t, s)
		all := in.open(t, "")
		var ids []string
		for i := range 6 {
			ids = append(ids, in.create(t, fmt.Sprint(i)))
			all.want(t, ids[i]) // published, and not only stored
		}
		for _, restarted := range []bool{false, true} {
			if restarted {
				in.stop()
				in = start(t, s)
			}
			for _, last := range []string{ids[1], "9223372036854775807", "-1", "no id"} {
				page := in.open(t, last)
				if name, id := page.next(t); name != "gap" || id != "" {
					t.Errorf("restarted %v, Last-Event-ID %q: %q with id %q, want a gap", restarted, last, name, id)
				}
				page.want(t, ids[3:]...)
			}
			in.open(t, ids[3]).want(t, ids[4:]...)
		}
	})
}

// A file has the name that was asked for: no part of it is a setting.
func TestSQLiteFileHasItsName(t *testing.T) {
	for _, name := range []string{"posts.db", "100% sure?.db", "a#b&c=d.db", "é %41.db"} {
		file := filepath.Join(t.TempDir(), name)
		posts, err := openSQLite(t.Context(), file)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		var mode string
		if err := posts.db.QueryRow("PRAGMA journal_mode").Scan(&mode); err != nil || mode != "wal" {
			t.Errorf("%s: journal_mode %q, %v, want wal", file, mode, err)
		}
		posts.close()
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}
}

func TestHealthFollowsTheDatabase(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		in := start(t, s)
		health := func(want int) {
			t.Helper()
			if resp, body := do(t, newGet(t, in.url+"/health")); resp.StatusCode != want {
				t.Errorf("health: %d %q, want %d", resp.StatusCode, body, want)
			}
		}
		health(http.StatusOK)

		// Every connection is in use.
		in.posts.db.SetMaxOpenConns(1)
		conn, err := in.posts.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		health(http.StatusServiceUnavailable)
		conn.Close()
		health(http.StatusOK)

		in.posts.db.Close()
		health(http.StatusServiceUnavailable)
		resp, body := do(t, newGet(t, in.url+"/api/posts"))
		if resp.StatusCode != http.StatusInternalServerError || body != `{"error":"internal error"}`+"\n" {
			t.Errorf("list without a database: %d %q, want 500 that tells nothing", resp.StatusCode, body)
		}
	})
}

func TestInstancesMigrateTogether(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		var opened sync.WaitGroup
		for range 5 {
			opened.Go(func() {
				posts, err := s.open(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				defer posts.close()
				if _, err := posts.add(t.Context(), "title", ""); err != nil {
					t.Error(err)
				}
			})
		}
		opened.Wait()
		posts, err := s.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer posts.close()
		var n int
		if err := posts.db.QueryRow("SELECT COUNT(*) FROM posts").Scan(&n); err != nil || n != 5 {
			t.Errorf("%d posts, %v, want 5", n, err)
		}

		// A later step is taken once too.
		lock := ""
		if s.url != "" {
			lock = postgresMigrationLock
		}
		for range 5 {
			opened.Go(func() {
				if err := migrate(t.Context(), posts.db, []string{"", "CREATE TABLE more (id INTEGER)"}, lock); err != nil {
					t.Error(err)
				}
			})
		}
		opened.Wait()

		// An older program must refuse a database of a newer one.
		if _, err := posts.db.Exec("INSERT INTO migrations (version) VALUES (99)"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.open(t.Context()); err == nil || !strings.Contains(err.Error(), "version 99") {
			t.Errorf("opened a database of a newer version: %v", err)
		}
	})
}

func TestMigrationThatFailsLeavesNothing(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		posts, err := s.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer posts.close()
		steps := []string{"", "CREATE TABLE half (id INTEGER)", "CREATE TABLE ("}
		if err := migrate(t.Context(), posts.db, steps, ""); err == nil || !strings.Contains(err.Error(), "version 3") {
			t.Errorf("migrate = %v, want an error that names version 3", err)
		}
		if _, err := posts.db.Exec("SELECT id FROM half"); err == nil {
			t.Error("the step before the one that failed is there")
		}
		if err := migrate(t.Context(), posts.db, steps[:2], ""); err != nil {
			t.Error(err)
		}
	})
}

// A page that is connected to one instance gets the posts of all, however they came
// into the table.
func TestPostReachesThePagesOfTheOtherInstance(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	a, b := start(t, s), start(t, s)
	atA, atB := a.open(t, ""), b.open(t, "")
	byHand := administrate(t, databaseName(s.url))
	for range 3 { // an instance that has just started to listen looks by itself
		first := a.create(t, "at a")
		atA.want(t, first)
		atB.want(t, first)
		second := b.create(t, "at b")
		atA.want(t, second)
		atB.want(t, second)
		execute(t, byHand, "INSERT INTO posts (title, body, created_at) VALUES ('by hand', '', now())")
		third := newest(t, a)
		atA.want(t, third)
		atB.want(t, third)
	}
}

// A page moves from instance to instance while posts are made at both, and gets each
// once, in order.
func TestPageThatMovesBetweenInstancesMissesNothing(t *testing.T) {
	const workers, each = 6, 40
	s := service{url: newDatabase(t), replay: workers * each}
	instances := []*instance{start(t, s), start(t, s)}
	first := instances[0].create(t, "first")
	var created sync.WaitGroup
	for i := range workers {
		created.Go(func() {
			for range each {
				instances[i%2].create(t, "post")
			}
		})
	}
	defer created.Wait()

	last := first
	seen := 0
	for move := 0; seen < workers*each; move++ {
		page := instances[move%2].open(t, last)
		for range min(7, workers*each-seen) {
			name, id := page.next(t)
			if name != "post" || number(t, id) <= number(t, last) {
				t.Fatalf("after %d posts and id %s: %q with id %q", seen, last, name, id)
			}
			last = id
			seen++
		}
		page.close()
	}
	if got := newest(t, instances[0]); got != last {
		t.Errorf("the last of %d posts is %s, want %s", seen, last, got)
	}
}

// Post 2 is not visible before post 1: a page that has seen 2 would never get 1.
func TestPostsBecomeVisibleInTheirOrder(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	in := start(t, s)
	page := in.open(t, "")
	const insert = "INSERT INTO posts (title, body, created_at) VALUES ('by hand', '', now())"
	conn := administrate(t, databaseName(s.url))
	execute(t, conn, "BEGIN")
	execute(t, conn, insert)

	second := make(chan string, 1)
	go func() { second <- in.create(t, "second") }()
	watch := administrate(t, "postgres")
	for waiting := 0; waiting == 0; {
		select {
		case id := <-second:
			t.Fatalf("post %s is there, and the one before it is not", id)
		default:
		}
		const count = "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'advisory'"
		if err := watch.QueryRow(t.Context(), count, databaseName(s.url)).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	execute(t, conn, "COMMIT")
	id := <-second
	page.want(t, "1", id)
}

// An instance that loses its listening connection misses no post.
func TestLostListenerMissesNothing(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	a, b := start(t, s), start(t, s)
	page := a.open(t, "")
	page.want(t, b.create(t, "before"))

	// No new connection is possible until a post was made.
	admin := administrate(t, "postgres")
	name := databaseName(s.url)
	byHand := administrate(t, name)
	execute(t, admin, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false")
	var killed int
	const kill = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = $1 AND query LIKE 'LISTEN%'"
	if err := admin.QueryRow(t.Context(), kill, name).Scan(&killed); err != nil || killed == 0 {
		t.Fatalf("%d listeners, %v, want that of each instance", killed, err)
	}
	execute(t, byHand, "INSERT INTO posts (title, body, created_at) VALUES ('meanwhile', '', now())")
	execute(t, admin, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS true")

	page.want(t, newest(t, a))
	page.want(t, b.create(t, "after"))
}

// A restart of the database ends every connection. The service recovers with it.
func TestServiceOutlivesARestartOfTheDatabase(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	in := start(t, s)
	admin := administrate(t, "postgres")
	name := databaseName(s.url)
	const kill = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity WHERE datname = $1"
	health := func(want int) {
		t.Helper()
		if resp, body := do(t, newGet(t, in.url+"/health")); resp.StatusCode != want {
			t.Errorf("health: %d %q, want %d", resp.StatusCode, body, want)
		}
	}
	page := in.open(t, "")
	execute(t, admin, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false")
	execute(t, admin, kill, name)
	health(http.StatusServiceUnavailable)
	execute(t, admin, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS true")
	health(http.StatusOK)
	page.want(t, in.create(t, "after"))
}

// A page may have a post of another instance before this one has read it.
func TestPageKnowsMoreThanItsInstance(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	deaf := assemble(t, s) // its feed is not started
	other := start(t, s)
	other.create(t, "first")
	second := other.create(t, "second")
	page := deaf.open(t, second)
	third := other.create(t, "third")
	if err := deaf.feed.catchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	page.want(t, third)
}

func TestRunServesUntilItIsStopped(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		keepDefaultLogger(t)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		r, w := io.Pipe()
		status := make(chan int, 1)
		go func() {
			getenv := func(name string) string { return map[string]string{"DATABASE_URL": s.url}[name] }
			status <- run(ctx, []string{"-addr", "127.0.0.1:0", "-db", s.file}, getenv, w)
			w.Close()
		}()

		draining := make(chan struct{})
		created := make(chan string, 1)
		var messages []string
		for lines := bufio.NewScanner(r); lines.Scan(); {
			var line struct{ Msg, URL, Err string }
			if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
				t.Fatalf("log: %v in %q", err, lines.Text())
			}
			switch line.Msg {
			case "home page":
				addr := strings.TrimSuffix(strings.TrimPrefix(line.URL, "http://"), "/")
				go func() { created <- postAcrossTheDrain(t, addr, stop, draining) }()
			case "draining":
				close(draining)
			case "listening for posts of other instances": // whenever
				continue
			}
			messages = append(messages, line.Msg)
		}
		if got := <-status; got != 0 {
			t.Errorf("status %d, want 0", got)
		}
		if got := <-created; !strings.Contains(got, " 201 ") {
			t.Errorf("the request that was there before the drain got %q, want 201: the database is closed last", got)
		}
		if got, want := fmt.Sprint(messages), "[home page listening draining request shutdown]"; got != want {
			t.Errorf("messages in the log: %s, want %s", got, want)
		}
		// It is in the table.
		in := start(t, s)
		if got := fetch(t, in.url+"/api/posts"); len(got) != 1 || got[0].Title != "late" {
			t.Errorf("posts: %v, want the late one", got)
		}
	})
}

func TestStopLeavesARequestItsTime(t *testing.T) {
	for delay, want := range map[time.Duration]time.Duration{-1: -1, 0: -1, time.Second: time.Second, time.Minute: time.Minute} {
		cfg := newShutdownConfig(delay)
		if left := cfg.Timeout - max(cfg.Delay, 0) - cfg.HookTimeout; left <= handlerTimeout {
			t.Errorf("-delay %v leaves %v for a request that may take %v", delay, left, handlerTimeout)
		}
		if cfg.Delay != want {
			t.Errorf("-delay %v: Delay is %v, want %v", delay, cfg.Delay, want)
		}
	}
}

// postAcrossTheDrain sends the head of a request, calls stop, and sends the
// body once the server drains. It returns the status line of the response.
func postAcrossTheDrain(t *testing.T, addr string, stop func(), draining <-chan struct{}) string {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer conn.Close()
	const body = `{"title":"late"}`
	// The server asks for the body when the handler does.
	fmt.Fprintf(conn, "POST /api/posts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(body))
	r := bufio.NewReader(conn)
	if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, " 100 ") {
		t.Errorf("%q, %v, want 100", line, err)
	}
	r.ReadString('\n')
	stop()
	<-draining
	io.WriteString(conn, body)
	line, err := r.ReadString('\n')
	if err != nil {
		t.Error(err)
	}
	return line
}

func TestRunThatCannotServe(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	db := filepath.Join(dir, "posts.db")
	for _, tt := range []struct {
		name    string
		args    []string
		url     string
		port    string
		status  int
		oneLine bool     // and no more is printed
		want    []string // in what is printed
		never   string
	}{
		{name: "port taken", args: []string{"-db", db, "-addr", taken.Addr().String()}, status: 1, oneLine: true, want: []string{taken.Addr().String()}},
		{name: "PORT", args: []string{"-db", db}, port: "none", status: 1, oneLine: true, want: []string{"Address", "none"}},
		{name: "no such directory", args: []string{"-db", dir + "/missing/posts.db"}, status: 1, oneLine: true, want: []string{"sqlite", "missing/posts.db"}},
		{name: "a directory", args: []string{"-db", dir}, status: 1, oneLine: true, want: []string{"sqlite", dir}},
		{name: "no file", args: []string{"-db", ""}, status: 1, oneLine: true, want: []string{"sqlite"}},
		{name: "memory", args: []string{"-db", ":memory:"}, status: 1, oneLine: true, want: []string{"sqlite", ":memory:"}},
		{name: "no Postgres", url: "postgres://me:secret@127.0.0.1:" + free + "/posts", status: 1, oneLine: true, want: []string{"postgres", free}, never: "secret"},
		{name: "no URL of Postgres", url: "postgres://me:secret@:x/posts", status: 1, oneLine: true, want: []string{"DATABASE_URL"}, never: "secret"},
		{name: "unknown flag", args: []string{"-verbose"}, status: 2, want: []string{"-verbose", "Usage"}},
		{name: "argument", args: []string{"start"}, status: 2, want: []string{`"start"`, "Usage"}},
		{name: "help", args: []string{"-h"}, status: 0, want: []string{"Usage", "-db", "DATABASE_URL"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keepDefaultLogger(t)
			var stderr bytes.Buffer
			getenv := func(name string) string {
				return map[string]string{"PORT": tt.port, "DATABASE_URL": tt.url}[name]
			}
			// It ends only for a service that starts in spite of all.
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if got := run(ctx, tt.args, getenv, &stderr); got != tt.status {
				t.Errorf("run(%q): status %d, want %d", tt.args, got, tt.status)
			}
			if n := strings.Count(stderr.String(), "\n"); tt.oneLine && n != 1 {
				t.Errorf("run(%q): %d lines, want 1:\n%s", tt.args, n, &stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("run(%q): printed %q, want %q in it", tt.args, &stderr, want)
				}
			}
			if tt.never != "" && strings.Contains(stderr.String(), tt.never) {
				t.Errorf("run(%q): printed %q, which is a secret", tt.args, &stderr)
			}
		})
	}
}

// instance is a service on a port of its own that starts and stops at once, with no
// drain.
type instance struct {
	url   string
	posts *store
	feed  *feed
	stop  func()
}

func start(t *testing.T, s service) *instance {
	t.Helper()
	in := assemble(t, s)
	in.feed.start()
	return in
}

// assemble is start for a feed that does not follow the table.
func assemble(t *testing.T, s service) *instance {
	t.Helper()
	keepDefaultLogger(t)
	slog.SetDefault(slog.New(slog.DiscardHandler))
	posts, err := s.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	feed, err := newFeed(t.Context(), posts, s.replay)
	if err != nil {
		t.Fatal(err)
	}
	files, err := newFiles()
	if err != nil {
		t.Fatal(err)
	}
	profiler, err := conduit.NewProfiler(nil)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(newHandler(posts, feed, files, profiler))
	in := &instance{url: srv.URL, posts: posts, feed: feed}
	in.stop = sync.OnceFunc(func() {
		if feed.cancel != nil {
			feed.stop(context.Background())
		}
		srv.CloseClientConnections()
		srv.Close()
		files.Close()
		posts.close()
	})
	t.Cleanup(in.stop)
	return in
}

// create makes a post and returns its id. It may be called from any goroutine.
func (in *instance) create(t *testing.T, title string) string {
	req, err := http.NewRequest("POST", in.url+"/api/posts", strings.NewReader(`{"title":"`+title+`"}`))
	if err != nil {
		t.Error(err)
		return ""
	}
	req.Header.Set("Content-Type", "application/json")
	resp, body := do(t, req)
	if resp.StatusCode != http.StatusCreated {
		t.Errorf("POST: status %d, body %q", resp.StatusCode, body)
		return ""
	}
	var p post
	if err := json.Unmarshal([]byte(body), &p); err != nil {
		t.Errorf("%v in %q", err, body)
	}
	return strconv.FormatInt(p.ID, 10)
}

// page reads events as a browser does.
type page struct {
	lines *bufio.Scanner
	close func()
}

// open opens the events as a browser that has seen last. It returns once they are
// open: posts that are made from now on must come.
func (in *instance) open(t *testing.T, last string) *page {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	req := newGet(t, in.url+"/api/events").WithContext(ctx)
	if last != "" {
		req.Header.Set("Last-Event-ID", last)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	p := &page{lines: bufio.NewScanner(resp.Body), close: func() { cancel(); resp.Body.Close() }}
	t.Cleanup(p.close)
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("events: %d, %q", resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	return p
}

// next returns the name and the id of the next event.
func (p *page) next(t *testing.T) (name, id string) {
	t.Helper()
	for p.lines.Scan() {
		field, value, _ := strings.Cut(p.lines.Text(), ":")
		switch value = strings.TrimPrefix(value, " "); field {
		case "event":
			name = value
		case "id":
			id = value
		case "":
			if name != "" {
				return name, id
			}
		}
	}
	t.Fatalf("the events ended: %v", p.lines.Err())
	return "", ""
}

// want makes sure that the next events are the posts with these ids.
func (p *page) want(t *testing.T, ids ...string) {
	t.Helper()
	for _, want := range ids {
		if name, id := p.next(t); name != "post" || id != want {
			t.Fatalf("%q with id %q, want post %s of %v", name, id, want, ids)
		}
	}
}

func newest(t *testing.T, in *instance) string {
	t.Helper()
	posts := fetch(t, in.url+"/api/posts?limit=1")
	if len(posts) != 1 {
		t.Fatal("there is no post")
	}
	return strconv.FormatInt(posts[0].ID, 10)
}

func number(t *testing.T, id string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func fetch(t *testing.T, url string) []post {
	t.Helper()
	resp, body := do(t, newGet(t, url))
	var posts []post
	if err := json.Unmarshal([]byte(body), &posts); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %d, %v in %q", url, resp.StatusCode, err, body)
	}
	return posts
}

func newGet(t *testing.T, url string) *http.Request {
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Error(err)
	}
	return req
}

// do returns the response and its whole body. It does not end the test, so that
// any goroutine may call it.
func do(t *testing.T, req *http.Request) (*http.Response, string) {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Errorf("%s %s: %v", req.Method, req.URL, err)
		return &http.Response{}, ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("%s %s: %v", req.Method, req.URL, err)
	}
	return resp, string(body)
}

// keepDefaultLogger restores the loggers that run changes. slog.SetDefault changes
// package log too, and does not change it back.
func keepDefaultLogger(t *testing.T) {
	logger, output, flags := slog.Default(), log.Writer(), log.Flags()
	t.Cleanup(func() {
		slog.SetDefault(logger)
		log.SetOutput(output)
		log.SetFlags(flags)
	})
}
