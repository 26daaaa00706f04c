package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestResponses(t *testing.T) {
	srv := newTestServer(t, newStore())
	const jsonType = "application/json"
	long := strings.Repeat("é", maxTitle)

	for _, tt := range []struct {
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
		{name: "health", method: "GET", path: "/health", status: 200, wantType: jsonType, want: `{"status":"ok"}`},
		{name: "unknown path", method: "GET", path: "/nothing", status: 404, wantType: "text/plain; charset=utf-8"},
		{name: "method of the page", method: "POST", path: "/", status: 405, wantType: "text/plain; charset=utf-8", header: [2]string{"Allow", "GET, HEAD"}},

		{name: "list", method: "GET", path: "/api/posts", status: 200, wantType: jsonType, want: `"title":"Welcome"`},
		{name: "head of list", method: "HEAD", path: "/api/posts", status: 200, wantType: jsonType},
		{name: "limit", method: "GET", path: "/api/posts?limit=1", status: 200, wantType: jsonType, want: `[{"id":3,`, header: [2]string{"Link", `</api/posts?before=3&limit=1>; rel="next"`}},
		{name: "before", method: "GET", path: "/api/posts?before=3", status: 200, wantType: jsonType, want: `[{"id":2,`},
		{name: "nothing before", method: "GET", path: "/api/posts?before=1", status: 200, wantType: jsonType, want: "[]\n"},
		{name: "far before", method: "GET", path: "/api/posts?before=9223372036854775807", status: 200, wantType: jsonType, want: `[{"id":3,`},
		{name: "limit 0", method: "GET", path: "/api/posts?limit=0", status: 400, wantType: jsonType},
		{name: "limit 101", method: "GET", path: "/api/posts?limit=101", status: 400, wantType: jsonType},
		{name: "limit empty", method: "GET", path: "/api/posts?limit=", status: 400, wantType: jsonType},
		{name: "limit not a number", method: "GET", path: "/api/posts?limit=ten", status: 400, wantType: jsonType},
		{name: "limit out of range", method: "GET", path: "/api/posts?limit=4294967297", status: 400, wantType: jsonType},
		{name: "before 0", method: "GET", path: "/api/posts?before=0", status: 400, wantType: jsonType},
		{name: "before not a number", method: "GET", path: "/api/posts?before=x", status: 400, wantType: jsonType},
		{name: "malformed query", method: "GET", path: "/api/posts?limit=%zz", status: 400, wantType: jsonType},

		{name: "stream", method: "GET", path: "/api/posts/stream", status: 200, wantType: jsonType, want: `[{"id":3,`},
		{name: "stream of lines", method: "GET", path: "/api/posts/stream?format=ndjson", status: 200, wantType: "application/x-ndjson", want: "}\n{\"id\":1,"},
		{name: "head of stream", method: "HEAD", path: "/api/posts/stream", status: 200, wantType: jsonType},
		{name: "stream of what", method: "GET", path: "/api/posts/stream?format=xml", status: 400, wantType: jsonType},
		{name: "method of events", method: "POST", path: "/api/events", status: 405, wantType: jsonType, header: [2]string{"Allow", "GET, HEAD"}},

		{name: "one", method: "GET", path: "/api/posts/1", status: 200, wantType: jsonType, want: `{"id":1,`},
		{name: "unknown", method: "GET", path: "/api/posts/4000", status: 404, wantType: jsonType},
		{name: "negative", method: "GET", path: "/api/posts/-1", status: 404, wantType: jsonType},
		{name: "beyond 64 bits", method: "GET", path: "/api/posts/92233720368547758070", status: 404, wantType: jsonType},
		{name: "not a number", method: "GET", path: "/api/posts/one", status: 400, wantType: jsonType},
		{name: "half a number", method: "GET", path: "/api/posts/1.5", status: 400, wantType: jsonType},

		{name: "no type", method: "POST", path: "/api/posts", body: `{"title":"a"}`, status: 415, wantType: jsonType},
		{name: "form", method: "POST", path: "/api/posts", contentType: "application/x-www-form-urlencoded", body: "title=a", status: 415, wantType: jsonType},
		{name: "type that starts the same", method: "POST", path: "/api/posts", contentType: "application/jsonp", body: `{"title":"a"}`, status: 415, wantType: jsonType},
		{name: "too large", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","body":"` + strings.Repeat("x", maxDocument) + `"}`, status: 413, wantType: jsonType},
		{name: "too large behind the document", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a"}` + strings.Repeat(" ", maxDocument), status: 413, wantType: jsonType},
		{name: "empty body", method: "POST", path: "/api/posts", contentType: jsonType, status: 400, wantType: jsonType},
		{name: "malformed", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":`, status: 400, wantType: jsonType},
		{name: "not an object", method: "POST", path: "/api/posts", contentType: jsonType, body: `["a"]`, status: 400, wantType: jsonType},
		{name: "null", method: "POST", path: "/api/posts", contentType: jsonType, body: `null`, status: 400, wantType: jsonType},
		{name: "unknown field", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","id":7}`, status: 400, wantType: jsonType},
		{name: "second document", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a"}{"title":"b"}`, status: 400, wantType: jsonType},
		{name: "trailing text", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a"} and more`, status: 400, wantType: jsonType},
		{name: "no title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"body":"a"}`, status: 400, wantType: jsonType},
		{name: "blank title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":" \t"}`, status: 400, wantType: jsonType},
		{name: "long title", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"` + long + `e"}`, status: 400, wantType: jsonType},

		{name: "unknown path of the API", method: "GET", path: "/api/nothing", status: 404, wantType: jsonType},
		{name: "root of the API", method: "GET", path: "/api/", status: 404, wantType: jsonType},
		{name: "trailing slash", method: "GET", path: "/api/posts/", status: 404, wantType: jsonType},
		{name: "method of the list", method: "DELETE", path: "/api/posts", status: 405, wantType: jsonType, header: [2]string{"Allow", "GET, HEAD, POST"}},
		{name: "method of one", method: "PUT", path: "/api/posts/1", status: 405, wantType: jsonType, header: [2]string{"Allow", "GET, HEAD"}},

		// Last: they change the start of the list.
		{name: "create", method: "POST", path: "/api/posts", contentType: jsonType, body: `{"title":"a","body":"b"}`, status: 201, wantType: jsonType, want: `{"id":4,"title":"a","body":"b",`, header: [2]string{"Location", "/api/posts/4"}},
		{name: "created", method: "GET", path: "/api/posts/4", status: 200, wantType: jsonType, want: `{"id":4,"title":"a","body":"b",`},
		{name: "create with charset", method: "POST", path: "/api/posts", contentType: "Application/JSON; charset=utf-8", body: `{"title":"` + long + `"}`, status: 201, wantType: jsonType, header: [2]string{"Location", "/api/posts/5"}},
		{name: "list of all", method: "GET", path: "/api/posts", status: 200, wantType: jsonType, want: `[{"id":5,`, header: [2]string{"Link", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequest(tt.method, srv.URL+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if tt.contentType != "" {
				req.Header.Set("Content-Type", tt.contentType)
			}
			resp, body := do(t, srv.Client(), req)
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
			if resp.Header.Get("X-Request-ID") == "" {
				t.Errorf("%s %s: no X-Request-ID", tt.method, tt.path)
			}
			if tt.wantType == jsonType && tt.status >= 400 {
				var e apiError
				if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == "" {
					t.Errorf("%s %s: body %q, want an object with an error", tt.method, tt.path, body)
				}
			}
		})
	}
}

func TestPageAllowsItsOwnFilesAlone(t *testing.T) {
	srv := newTestServer(t, newStore())
	resp, body := do(t, srv.Client(), newGet(t, srv.URL))
	policy := resp.Header.Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none';") || strings.Contains(policy, "unsafe") {
		t.Errorf("Content-Security-Policy %q is not strict", policy)
	}
	// The policy forbids scripts and styles in the page itself.
	for _, inline := range []string{"<style", "style=", "<script>", "data:"} {
		if strings.Contains(body, inline) {
			t.Errorf("the page has %q in it, which its policy forbids", inline)
		}
	}
	// Each file has the hash of its content in its URL, and may be kept for ever.
	urls := regexp.MustCompile(`(?:href|src)="(/static/[^"?]+[?][^"]+)"`).FindAllStringSubmatch(body, -1)
	if len(urls) != 4 {
		t.Errorf("the page links %d files by content, want 4: %q", len(urls), urls)
	}
	for _, url := range urls {
		resp, _ := do(t, srv.Client(), newGet(t, srv.URL+html.UnescapeString(url[1])))
		if got := resp.Header.Get("Cache-Control"); resp.StatusCode != http.StatusOK || !strings.Contains(got, "immutable") {
			t.Errorf("GET %s: status %d, Cache-Control %q, want 200 and immutable", url[1], resp.StatusCode, got)
		}
	}
}

func TestFilesAreServed(t *testing.T) {
	srv := newTestServer(t, newStore())
	for _, tt := range []struct {
		path, contentType, file string
	}{
		{"/static/", "text/html; charset=utf-8", "static/index.html"},
		{"/static/queue.js", "text/javascript; charset=utf-8", "static/queue.js"},
		{"/static/posts.js", "text/javascript; charset=utf-8", "static/posts.js"},
		{"/static/style.css", "text/css; charset=utf-8", "static/style.css"},
		{"/static/icon.svg", "image/svg+xml", "static/icon.svg"},
	} {
		want, err := embedded.ReadFile(tt.file)
		if err != nil {
			t.Fatal(err)
		}
		for _, coding := range []string{"identity", "gzip"} {
			resp, body := do(t, srv.Client(), newGetAccepting(t, srv.URL+tt.path, coding))
			if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != tt.contentType {
				t.Errorf("GET %s: status %d, Content-Type %q, want 200 and %q", tt.path, resp.StatusCode, resp.Header.Get("Content-Type"), tt.contentType)
			}
			compressed := coding == "gzip" && len(want) >= 1024
			if got := resp.Header.Get("Content-Encoding"); compressed != (got == "gzip") {
				t.Errorf("GET %s, accepting %s: Content-Encoding %q of %d bytes", tt.path, coding, got, len(want))
			}
			if decompressed(t, resp, body) != string(want) {
				t.Errorf("GET %s, accepting %s: the body is not %s", tt.path, coding, tt.file)
			}

			// Each content coding has a tag of its own, which gets a 304.
			req := newGetAccepting(t, srv.URL+tt.path, coding)
			req.Header.Set("If-None-Match", resp.Header.Get("ETag"))
			again, body := do(t, srv.Client(), req)
			if again.StatusCode != http.StatusNotModified || body != "" {
				t.Errorf("GET %s, accepting %s, with ETag %q: status %d, %d bytes, want 304 and none", tt.path, coding, resp.Header.Get("ETag"), again.StatusCode, len(body))
			}
			if got := again.Header.Get("Cache-Control"); got != "no-cache" {
				t.Errorf("GET %s: Cache-Control %q, want no-cache", tt.path, got)
			}
		}
	}

	for path, want := range map[string]int{
		"/static/nothing.js":          http.StatusNotFound,
		"/static/../main.go":          http.StatusNotFound,
		"/static/%2e%2e/main.go":      http.StatusNotFound,
		"/static/queue.js?v=outdated": http.StatusOK,
	} {
		resp, _ := do(t, srv.Client(), newGet(t, srv.URL+path))
		if resp.StatusCode != want {
			t.Errorf("GET %s: status %d, want %d", path, resp.StatusCode, want)
		}
		if got := resp.Header.Get("Cache-Control"); strings.Contains(got, "max-age") {
			t.Errorf("GET %s: Cache-Control %q, want none that lets it be kept", path, got)
		}
	}
}

func TestResponsesAreCompressed(t *testing.T) {
	s := newStore()
	for i := range 100 {
		s.add(fmt.Sprintf("Post %d", i), "Say it, wait, stop to accept, finish, and only then leave.")
	}
	srv := newTestServer(t, s)
	for _, tt := range []struct {
		path       string
		compressed bool
	}{
		{"/", true},
		{"/api/posts?limit=100", true},
		{"/api/posts/1", false},
		{"/api/nothing", false},
		{"/health", false},
	} {
		_, want := do(t, srv.Client(), newGetAccepting(t, srv.URL+tt.path, "identity"))
		resp, body := do(t, srv.Client(), newGetAccepting(t, srv.URL+tt.path, "gzip"))
		if got := resp.Header.Get("Content-Encoding"); tt.compressed != (got == "gzip") {
			t.Errorf("GET %s: Content-Encoding %q of %d bytes", tt.path, got, len(want))
		}
		if tt.compressed && resp.Header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("GET %s: Vary %q, want Accept-Encoding", tt.path, resp.Header.Get("Vary"))
		}
		if tt.compressed && len(body) > len(want)*3/5 {
			t.Errorf("GET %s: %d bytes of %d, want at most three fifths", tt.path, len(body), len(want))
		}
		if got := decompressed(t, resp, body); got != want {
			t.Errorf("GET %s: %q with gzip, want %q", tt.path, got, want)
		}
	}
}

func TestPagesFollowTheirLinks(t *testing.T) {
	s := newStore()
	for i := range 47 {
		s.add(fmt.Sprint(i), "")
	}
	srv := newTestServer(t, s)
	want := int64(50)
	for next := "/api/posts?limit=7"; next != ""; {
		resp, body := do(t, srv.Client(), newGet(t, srv.URL+next))
		var posts []post
		if err := json.Unmarshal([]byte(body), &posts); err != nil {
			t.Fatalf("GET %s: %v in %q", next, err, body)
		}
		for _, p := range posts {
			if p.ID != want {
				t.Fatalf("GET %s: post %d, want %d", next, p.ID, want)
			}
			want--
		}
		next, _, _ = strings.Cut(strings.TrimPrefix(resp.Header.Get("Link"), "<"), ">")
	}
	if want != 0 {
		t.Errorf("the pages ended before post %d", want)
	}
}

// The store is read a page at a time, and the stream has every post once.
func TestStreamHasEveryPost(t *testing.T) {
	const posts = 2*maxLimit + 50
	s := newStore()
	for s.len() < posts {
		s.add("title", "body")
	}
	_, body := do(t, http.DefaultClient, newGet(t, newTestServer(t, s).URL+"/api/posts/stream"))
	var got []post
	if err := json.Unmarshal([]byte(body), &got); err != nil || len(got) != posts {
		t.Fatalf("%d posts of %d, %v", len(got), posts, err)
	}
	for i, p := range got {
		if p.ID != int64(posts-i) {
			t.Fatalf("post %d at place %d", p.ID, i)
		}
	}
}

// Every open page gets a new post before its sender gets the response. A page that
// reconnects gets the posts that it missed.
func TestNewPostReachesEveryOpenPage(t *testing.T) {
	srv := newTestServer(t, newStore())
	open := func(last string) *bufio.Scanner {
		req := newGet(t, srv.URL+"/api/events")
		if last != "" {
			req.Header.Set("Last-Event-ID", last)
		}
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("events: %d, %q", resp.StatusCode, resp.Header.Get("Content-Type"))
		}
		return bufio.NewScanner(resp.Body)
	}
	next := func(lines *bufio.Scanner) (id, title string) {
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ": ")
			switch name {
			case "id":
				id = value
			case "data":
				var p post
				if err := json.Unmarshal([]byte(value), &p); err != nil {
					t.Fatalf("%q: %v", value, err)
				}
				return id, p.Title
			}
		}
		t.Fatalf("the events ended: %v", lines.Err())
		return "", ""
	}
	create := func(title string) {
		resp, err := srv.Client().Post(srv.URL+"/api/posts", "application/json", strings.NewReader(`{"title":"`+title+`"}`))
		if err != nil || resp.StatusCode != http.StatusCreated {
			t.Fatalf("create: %v, %v", resp, err)
		}
		resp.Body.Close()
	}

	pages := []*bufio.Scanner{open(""), open(""), open("")}
	create("first")
	var last string
	for i, page := range pages {
		id, title := next(page)
		if title != "first" || id == "" {
			t.Errorf("page %d got %q with the id %q", i, title, id)
		}
		last = id
	}
	create("second")
	if id, title := next(open(last)); title != "second" || id == last {
		t.Errorf("the page that reconnects got %q with the id %q", title, id)
	}
}

func TestStoreIsBounded(t *testing.T) {
	t.Run("posts", func(t *testing.T) {
		s := newStore()
		for range maxPosts + 5 {
			s.add("title", "body")
		}
		newest, oldest := int64(maxPosts+8), int64(9)
		if n := s.len(); n != maxPosts {
			t.Errorf("%d posts are kept, want %d", n, maxPosts)
		}
		for id, want := range map[int64]bool{0: false, oldest - 1: false, oldest: true, newest: true, newest + 1: false} {
			if p, ok := s.get(id); ok != want || ok && p.ID != id {
				t.Errorf("get(%d) = %d, %v, want %v", id, p.ID, ok, want)
			}
		}
		if posts, more := s.list(oldest+2, 5); len(posts) != 2 || posts[1].ID != oldest || more {
			t.Errorf("list(%d, 5) = %v, %v, want the two oldest and no more", oldest+2, posts, more)
		}
	})
	t.Run("bytes", func(t *testing.T) {
		s := newStore()
		body := strings.Repeat("x", maxDocument)
		for range 2 * maxTextBytes / maxDocument {
			s.add("title", body)
		}
		total := 0
		posts, _ := s.list(1<<62, maxPosts)
		for _, p := range posts {
			total += p.size()
		}
		if total != s.bytes || total > maxTextBytes || total < maxTextBytes-2*maxDocument {
			t.Errorf("%d bytes are kept, counted as %d, want just under %d", total, s.bytes, maxTextBytes)
		}
	})
}

func TestPostsAtTheSameTime(t *testing.T) {
	srv := newTestServer(t, newStore())
	const workers, each = 8, 25
	var wg sync.WaitGroup
	var mu sync.Mutex
	locations := make(map[string]bool)
	for range workers {
		wg.Go(func() {
			for range each {
				req, err := http.NewRequest("POST", srv.URL+"/api/posts", strings.NewReader(`{"title":"t","body":"b"}`))
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Content-Type", "application/json")
				resp, body := do(t, srv.Client(), req)
				if resp.StatusCode != http.StatusCreated {
					t.Errorf("POST: status %d, body %q", resp.StatusCode, body)
				}
				mu.Lock()
				locations[resp.Header.Get("Location")] = true
				mu.Unlock()
			}
		})
		wg.Go(func() {
			for range each {
				_, body := do(t, srv.Client(), newGet(t, srv.URL+"/api/posts?limit=100"))
				var posts []post
				if err := json.Unmarshal([]byte(body), &posts); err != nil {
					t.Errorf("GET: %v in %q", err, body)
					return
				}
				for i := 1; i < len(posts); i++ {
					if posts[i].ID != posts[i-1].ID-1 || posts[i].CreatedAt.After(posts[i-1].CreatedAt) {
						t.Errorf("post %d of %v follows post %d of %v", posts[i].ID, posts[i].CreatedAt, posts[i-1].ID, posts[i-1].CreatedAt)
					}
				}
			}
		})
	}
	wg.Wait()
	if len(locations) != workers*each {
		t.Errorf("%d posts have a Location of their own, want %d", len(locations), workers*each)
	}
}

func TestRunServesUntilItIsStopped(t *testing.T) {
	keepDefaultLogger(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	r, w := io.Pipe()
	status := make(chan int, 1)
	go func() {
		status <- run(ctx, []string{"-addr", "127.0.0.1:0", "-h2c"}, func(string) string { return "" }, w)
		w.Close()
	}()

	var requests, messages []string
	for lines := bufio.NewScanner(r); lines.Scan(); {
		var line struct {
			Msg, URL, Path string
			RequestID      string  `json:"request_id"`
			Duration       float64 `json:"duration_ms"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("log: %v in %q", err, lines.Text())
		}
		switch line.Msg {
		case "home page":
			// In a goroutine: the log has to be read meanwhile.
			go func() {
				defer stop()
				for _, protocol := range []func(*http.Protocols){
					func(p *http.Protocols) { p.SetHTTP1(true) },
					func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) },
				} {
					transport := &http.Transport{Protocols: new(http.Protocols)}
					protocol(transport.Protocols)
					for _, path := range []string{"/health", "/api/posts"} {
						do(t, &http.Client{Transport: transport}, newGet(t, strings.TrimSuffix(line.URL, "/")+path))
					}
					transport.CloseIdleConnections()
				}
			}()
		case "request":
			requests = append(requests, line.Path)
			if line.RequestID == "" {
				t.Errorf("log: %q has no request_id", lines.Text())
			}
			if line.Duration <= 0 || line.Duration > 10_000 {
				t.Errorf("log: %q has no duration in milliseconds", lines.Text())
			}
		default:
			messages = append(messages, line.Msg)
		}
	}
	if got := <-status; got != 0 {
		t.Errorf("status %d, want 0", got)
	}
	if got, want := fmt.Sprint(requests), "[/api/posts /api/posts]"; got != want {
		t.Errorf("requests in the log: %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(messages), "[listening draining store closed shutdown]"; got != want {
		t.Errorf("messages in the log: %s, want %s", got, want)
	}
}

func TestHomeURL(t *testing.T) {
	for addr, want := range map[string]string{
		"0.0.0.0:8080":   "http://localhost:8080/",
		"[::]:8080":      "http://localhost:8080/",
		"127.0.0.1:8081": "http://127.0.0.1:8081/",
		"[::1]:8080":     "http://[::1]:8080/",
	} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := homeURL("http", a); got != want {
			t.Errorf("homeURL(%s) = %s, want %s", addr, got, want)
		}
	}
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

// The address of the profiles is in the log, and they end with the service.
func TestRunServesProfiles(t *testing.T) {
	keepDefaultLogger(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	r, w := io.Pipe()
	status := make(chan int, 1)
	go func() {
		status <- run(ctx, []string{"-addr", "127.0.0.1:0", "-debug-addr", ":0"}, func(string) string { return "" }, w)
		w.Close()
	}()
	var url string
	for lines := bufio.NewScanner(r); lines.Scan(); {
		var line struct{ Msg, URL, Level string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("log: %v in %q", err, lines.Text())
		}
		if line.Level != "INFO" {
			t.Errorf("log: %s", lines.Text())
		}
		if line.Msg == "profiling" {
			url = line.URL
			go func() {
				defer stop()
				for _, path := range []string{"/debug/pprof/live", "/debug/pprof/heap"} {
					if resp, _ := do(t, http.DefaultClient, newGet(t, strings.Replace(url, "/debug/pprof/live", path, 1))); resp.StatusCode != http.StatusOK {
						t.Errorf("GET %s: status %d, want 200", path, resp.StatusCode)
					}
				}
			}()
		}
	}
	if got := <-status; got != 0 {
		t.Errorf("status %d, want 0", got)
	}
	if !strings.HasPrefix(url, "http://127.0.0.1:") {
		t.Errorf("the log says that profiles are at %q, want an address of this machine", url)
	}
	if resp, err := http.Get(url); err == nil {
		resp.Body.Close()
		t.Errorf("GET %s: status %d after the end, want an error", url, resp.StatusCode)
	}
}

// The service itself serves them to its own machine, not through a proxy.
func TestProfilesAreForThisMachine(t *testing.T) {
	srv := newTestServer(t, newStore())
	for field, want := range map[string]int{"X-Anything": http.StatusOK, "X-Forwarded-For": http.StatusForbidden} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/live", "/debug/pprof/stats", "/debug/pprof/profile?seconds=0.01"} {
			req := newGet(t, srv.URL+path)
			req.Header.Set(field, "192.0.2.1")
			if resp, body := do(t, srv.Client(), req); resp.StatusCode != want {
				t.Errorf("GET %s with %s: status %d, want %d; body %.100q", path, field, resp.StatusCode, want, body)
			}
		}
	}
}

func TestRunThatCannotServe(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	missing := t.TempDir() + "/missing.pem"

	for _, tt := range []struct {
		name    string
		args    []string
		port    string
		status  int
		oneLine bool     // and no more is printed
		want    []string // in what is printed
	}{
		{name: "port taken", args: []string{"-addr", taken.Addr().String()}, status: 1, oneLine: true, want: []string{taken.Addr().String()}},
		{name: "flag wins over PORT", args: []string{"-addr", taken.Addr().String()}, port: "none", status: 1, oneLine: true, want: []string{taken.Addr().String()}},
		{name: "PORT", port: "none", status: 1, oneLine: true, want: []string{"Address", "none"}},
		{name: "address without port", args: []string{"-addr", "localhost"}, status: 1, oneLine: true, want: []string{"Address"}},
		{name: "unreadable pair", args: []string{"-addr", ":" + port, "-tls-cert", missing, "-tls-key", missing}, status: 1, oneLine: true, want: []string{"CertFile", "KeyFile", missing}},
		{name: "certificate alone", args: []string{"-tls-cert", missing}, status: 1, oneLine: true, want: []string{"KeyFile: is required"}},
		{name: "key alone", args: []string{"-tls-key", missing}, status: 1, oneLine: true, want: []string{"CertFile: is required"}},
		{name: "debug port taken", args: []string{"-addr", "127.0.0.1:0", "-debug-addr", taken.Addr().String()}, status: 1, oneLine: true, want: []string{"not started", "-debug-addr", taken.Addr().String()}},
		{name: "debug address without port", args: []string{"-addr", "127.0.0.1:0", "-debug-addr", "localhost"}, status: 1, oneLine: true, want: []string{"not started", "-debug-addr", "missing port"}},
		{name: "delay without a unit", args: []string{"-delay", "5"}, status: 2, want: []string{"-delay", "Usage"}},
		{name: "unknown flag", args: []string{"-verbose"}, status: 2, want: []string{"-verbose", "Usage"}},
		{name: "argument", args: []string{"start"}, status: 2, want: []string{`"start"`, "Usage"}},
		{name: "help", args: []string{"-h"}, status: 0, want: []string{"Usage", "-tls-cert"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keepDefaultLogger(t)
			var stderr bytes.Buffer
			getenv := func(name string) string {
				if name == "PORT" {
					return tt.port
				}
				return ""
			}
			// It ends only for a service that starts in spite of all.
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
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
		})
	}
}

func newTestServer(t *testing.T, s *store) *httptest.Server {
	t.Helper()
	keepDefaultLogger(t)
	slog.SetDefault(slog.New(slog.DiscardHandler))
	files, err := newFiles()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { files.Close() })
	srv := httptest.NewServer(newHandler(s, files))
	t.Cleanup(srv.Close)
	return srv
}

func newGet(t *testing.T, url string) *http.Request {
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Error(err)
	}
	return req
}

// newGetAccepting is newGet with a content coding that the client does not undo.
func newGetAccepting(t *testing.T, url, coding string) *http.Request {
	req := newGet(t, url)
	req.Header.Set("Accept-Encoding", coding)
	return req
}

// decompressed returns the body of a response without its content coding.
func decompressed(t *testing.T, resp *http.Response, body string) string {
	t.Helper()
	if resp.Header.Get("Content-Encoding") != "gzip" {
		return body
	}
	z, err := gzip.NewReader(strings.NewReader(body))
	if err != nil {
		t.Fatalf("gzip: %v", err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatalf("gzip: %v", err)
	}
	return string(plain)
}

// do returns the response and its whole body. It does not end the test, so that
// any goroutine may call it.
func do(t *testing.T, client *http.Client, req *http.Request) (*http.Response, string) {
	resp, err := client.Do(req)
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
