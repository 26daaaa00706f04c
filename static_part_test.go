package conduit_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"example.com/conduit"
)

// Static files

var staticTime = time.Date(2024, 5, 6, 7, 8, 9, 500e6, time.UTC)

const staticModified = "Mon, 06 May 2024 07:08:09 GMT"

// staticWrite writes files whose last change is long ago.
func staticWrite(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, staticTime, staticTime); err != nil {
			t.Fatal(err)
		}
	}
}

// staticTree is a directory with these files.
func staticTree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	staticWrite(t, dir, files)
	return dir
}

func staticServer(t testing.TB, cfg conduit.FileServerConfig) *conduit.FileServer {
	t.Helper()
	f, err := conduit.NewFileServerWith(&cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// staticAsk asks h in process. Header lines are "Field: value".
func staticAsk(h http.Handler, method, target string, lines ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	for _, line := range lines {
		field, value, _ := strings.Cut(line, ": ")
		r.Header.Add(field, value)
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	return rec
}

// staticHash is the hash that tags and versions are made of.
func staticHash(content string) string {
	sum := sha256.Sum256([]byte(content))
	return base64.RawURLEncoding.EncodeToString(sum[:15])
}

func staticTag(content string) string { return `"` + staticHash(content) + `"` }

func staticGunzip(t testing.TB, coded string) string {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(coded))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

func TestFileServerReportsEveryFault(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		cfg  *conduit.FileServerConfig
		want []string
	}{
		{"nil", nil, []string{"conduit: Dir: is required"}},
		{"neither", &conduit.FileServerConfig{}, []string{"conduit: Dir: is required"}},
		{"both", &conduit.FileServerConfig{Dir: dir, FS: os.DirFS(dir)}, []string{"conduit: FS: "}},
		{"missing", &conduit.FileServerConfig{Dir: filepath.Join(dir, "none")}, []string{"conduit: Dir: "}},
		{"a file", &conduit.FileServerConfig{Dir: file}, []string{"conduit: Dir: "}},
		{"prefix", &conduit.FileServerConfig{Dir: dir, Prefix: "static"}, []string{"conduit: Prefix: "}},
		{"prefix up", &conduit.FileServerConfig{Dir: dir, Prefix: "/a/../b"}, []string{"conduit: Prefix: "}},
		{"prefix double", &conduit.FileServerConfig{Dir: dir, Prefix: "//b"}, []string{"conduit: Prefix: "}},
		{"several", &conduit.FileServerConfig{Prefix: "x", Index: "../i", Fallback: "/etc/passwd"}, []string{
			"conduit: Dir: ", "conduit: Prefix: ", "conduit: Index: ", "conduit: Fallback: ",
		}},
		{"index up", &conduit.FileServerConfig{Dir: dir, Index: ".."}, []string{"conduit: Index: "}},
		{"fallback backslash", &conduit.FileServerConfig{Dir: dir, Fallback: `..\x`}, []string{"conduit: Fallback: "}},
	} {
		f, err := conduit.NewFileServerWith(test.cfg)
		if err == nil || f != nil {
			t.Errorf("%s: %v, %v", test.name, f, err)
			continue
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != len(test.want) {
			t.Errorf("%s: %q, want %d faults", test.name, lines, len(test.want))
			continue
		}
		for i, want := range test.want {
			if !strings.HasPrefix(lines[i], want) {
				t.Errorf("%s: fault %q, want %q", test.name, lines[i], want)
			}
		}
	}
	for _, prefix := range []string{"", "/", "/static", "/static/", "/a/b"} {
		staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: prefix})
	}
}

func TestNewFileServerPanicsWithoutItsDirectory(t *testing.T) {
	defer func() {
		if err, ok := recover().(error); !ok || !strings.HasPrefix(err.Error(), "conduit: Dir: ") {
			t.Errorf("panic %v", err)
		}
	}()
	conduit.NewFileServer(filepath.Join(t.TempDir(), "none"), "/static")
}

func TestStaticFilesAreServed(t *testing.T) {
	page, text := "<!doctype html><p>hello", strings.Repeat("some text\n", 30)
	dir := staticTree(t, map[string]string{"index.html": page, "docs/index.html": page + "docs", "a/b/text.txt": text, "empty.txt": ""})
	eachProtocol(t, func(t *testing.T, p protocol) {
		files := staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static"})
		mux := http.NewServeMux()
		mux.Handle("/static/", files)
		url := p.serve(t, p.server(t, &conduit.Config{Handler: mux}))
		client := p.client(t)
		for _, test := range []struct{ path, body, contentType, cacheControl string }{
			{"/static/", page, "text/html; charset=utf-8", "no-cache"},
			{"/static/index.html", page, "text/html; charset=utf-8", "no-cache"},
			{"/static/docs/", page + "docs", "text/html; charset=utf-8", "no-cache"},
			{"/static/a/b/text.txt", text, "text/plain; charset=utf-8", "public, max-age=31536000"},
			{"/static/empty.txt", "", "text/plain; charset=utf-8", "public, max-age=31536000"},
		} {
			for range 2 { // from the file, from the cache
				for _, method := range []string{"GET", "HEAD"} {
					req, _ := http.NewRequest(method, url+test.path, nil)
					req.Header.Set("Accept-Encoding", "identity")
					got := do(t, client, req)
					want := test.body
					if method == "HEAD" {
						want = ""
					}
					if got.status != 200 || got.body != want {
						t.Errorf("%s %s: %d %q, want 200 %q", method, test.path, got.status, got.body, want)
					}
					got.header.Del("Date")
					wantHeader := http.Header{
						"Accept-Ranges": {"bytes"}, "Cache-Control": {test.cacheControl}, "Content-Length": {strconv.Itoa(len(test.body))},
						"Content-Type": {test.contentType}, "Etag": {staticTag(test.body)}, "Last-Modified": {staticModified},
						"Vary": {"Accept-Encoding"}, "X-Content-Type-Options": {"nosniff"},
					}
					if !maps.EqualFunc(got.header, wantHeader, slices.Equal) {
						t.Errorf("%s %s: header %v, want %v", method, test.path, got.header, wantHeader)
					}
				}
			}
		}
	})
}

func TestStaticRefusesOtherMethods(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get"} {
		for _, target := range []string{"/a.txt", "/none", "/"} {
			rec := staticAsk(files, method, target)
			if rec.Code != 405 || rec.Header().Get("Allow") != "GET, HEAD" || rec.Header().Get("Cache-Control") != "" {
				t.Errorf("%s %s: %d %v", method, target, rec.Code, rec.Header())
			}
		}
	}
}

func TestStaticRefusesPaths(t *testing.T) {
	outside := staticTree(t, map[string]string{"secret.txt": "secret", "dir/index.html": "secret"})
	dir := staticTree(t, map[string]string{
		"a.txt": "a", "sub/b.txt": "b", ".env": "secret", ".git/config": "secret", "sub/.hidden/x.txt": "secret",
		".well-known/security.txt": "contact", ".well-known/.secret": "secret", "empty/file.txt": "x",
		`back\slash.txt`: "secret", "dot.": "secret",
	})
	for name, target := range map[string]string{
		"out.txt": filepath.Join(outside, "secret.txt"), "outdir": outside, "up": "../../../../../../etc", "in.txt": "a.txt", "loop": "loop",
		"null": "/dev/null", "zero": "/dev/zero",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := net.Listen("unix", filepath.Join(dir, "socket")); err == nil {
		defer l.Close()
	}
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static", Precompressed: true})
	addr := strings.TrimPrefix(serve(t, newServer(t, &conduit.Config{Handler: files})), "http://")
	for _, test := range []struct {
		target string
		status int
	}{
		{"/static/a.txt", 200},
		{"/static/in.txt", 200},
		{"/static/sub/b.txt", 200},
		{"/static/.well-known/security.txt", 200},
		{"/static/%61.txt", 200},
		{"/", 404},
		{"/a.txt", 404},
		{"/statica.txt", 404},
		{"/static../a.txt", 404},
		{"/static/none", 404},
		{"/static/a.txt/", 404},
		{"/static/a.txt/x", 404},
		{"/static/../static/a.txt", 404},
		{"/static/../../etc/passwd", 404},
		{"/static/%2e%2e/%2e%2e/etc/passwd", 404},
		{"/static/sub/../a.txt", 404},
		{"/static/./a.txt", 404},
		{"/static//a.txt", 404},
		{"/static//etc/passwd", 404},
		{"/static/sub%2fb.txt", 404},
		{"/static/sub%2Fb.txt", 404},
		{"/static/..%2f..%2fetc%2fpasswd", 404},
		{`/static/..%5c..%5ca.txt`, 404},
		{`/static/sub%5cb.txt`, 404},
		{`/static/back%5cslash.txt`, 404},
		{"/static/a.txt%00", 404},
		{"/static/a.txt%00.html", 404},
		{"/static/%0a", 404},
		{"/static/a.txt.", 404},
		{"/static/dot.", 404},
		{"/static/sub./b.txt", 404},
		{"/static/...", 404},
		{"/static/%ff", 404},
		{"/static/" + strings.Repeat("x", 300), 404},
		{"/static/" + strings.Repeat("x/", 3000), 404},
		{"/static/" + strings.Repeat("x", 5000), 404},
		{"/static/.env", 404},
		{"/static/.git/config", 404},
		{"/static/.git/", 404},
		{"/static/.git", 404},
		{"/static/sub/.hidden/x.txt", 404},
		{"/static/.well-known/.secret", 404},
		{"/static/out.txt", 404},
		{"/static/outdir/secret.txt", 404},
		{"/static/outdir/dir/", 404},
		{"/static/outdir", 404},
		{"/static/up/passwd", 404},
		{"/static/loop", 404},
		{"/static/null", 404},
		{"/static/zero", 404},
		{"/static/fifo", 404},
		{"/static/socket", 404},
		{"/static/empty/", 404},
		{"/static/empty", 404},
		{"/static/fifo/", 404},
		{"*", 404},
	} {
		for range 2 {
			conn, br := rawDial(t, addr)
			conn.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", test.target)
			res, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatalf("%.60s: %v", test.target, err)
			}
			body, _ := io.ReadAll(res.Body)
			conn.Close()
			if res.StatusCode != test.status && !(test.status == 404 && res.StatusCode == 400) || strings.Contains(string(body), "secret") {
				t.Errorf("GET %.60s: %d %q, want %d", test.target, res.StatusCode, body, test.status)
			}
			if res.StatusCode != 200 && res.Header.Get("Cache-Control") != "" {
				t.Errorf("GET %.60s: %d with Cache-Control %q", test.target, res.StatusCode, res.Header.Get("Cache-Control"))
			}
		}
	}

	open := staticServer(t, conduit.FileServerConfig{Dir: dir, Dotfiles: true})
	if rec := staticAsk(open, "GET", "/.env"); rec.Code != 200 {
		t.Errorf("with Dotfiles: %d", rec.Code)
	}
}

func FuzzStaticPath(f *testing.F) {
	for _, path := range []string{"/", "/a.txt", "/../x", "//x", "/sub", "/sub/", "/a%2fb", "/\x00", `/..\x`, "/.env", "/out", "/a:b", "/sub/%2e%2e/", "/fifo", "/out/secret.txt"} {
		f.Add(path, path, "")
	}
	f.Add("/sub", "", "x=//evil")
	outside := staticTree(f, map[string]string{"secret.txt": "secret"})
	dir := staticTree(f, map[string]string{"a.txt": "a", "sub/index.html": "b", "a:b/index.html": "c", ".env": "secret", "index.html": "d"})
	os.Symlink(outside, filepath.Join(dir, "out"))
	syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	files := staticServer(f, conduit.FileServerConfig{Dir: dir, Fallback: "a.txt"})
	f.Fuzz(func(t *testing.T, path, raw, query string) {
		if _, err := url.Parse("/?" + query); err != nil {
			t.Skip("net/http refuses the query")
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.URL = &url.URL{Path: path, RawPath: raw, RawQuery: query}
		rec := httptest.NewRecorder()
		files.ServeHTTP(rec, r)
		if rec.Code != 200 && rec.Code != 301 && rec.Code != 404 && rec.Code != 400 || strings.Contains(rec.Body.String(), "secret") {
			t.Errorf("%q: %d %q", path, rec.Code, rec.Body)
		}
		if location := rec.Header().Get("Location"); rec.Code == 301 {
			to, err := url.Parse(location)
			if err != nil || to.Host != "" || to.Scheme != "" || strings.HasPrefix(location, "/") || !strings.HasSuffix(to.Path, "/") {
				t.Errorf("%q redirects to %q, %v", path, location, err)
			}
		}
		if got := files.URL(path); !strings.HasPrefix(got, "/") {
			t.Errorf("URL(%q) = %q", path, got)
		}
	})
}

func TestStaticDirectoriesRedirect(t *testing.T) {
	dir := staticTree(t, map[string]string{"index.html": "i", "sub/index.html": "s", "a:b/index.html": "c", "sp ace/index.html": "d"})
	mux := http.NewServeMux()
	mux.Handle("/static/", staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static"}))
	mux.Handle("/static", staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static"}))
	mux.Handle("/stripped/", http.StripPrefix("/stripped", staticServer(t, conduit.FileServerConfig{Dir: dir})))
	base := serve(t, newServer(t, &conduit.Config{Handler: mux}))
	client := newClient(t, &http.Transport{})
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for _, test := range []struct{ target, location string }{
		{"/static/sub", "/static/sub/"},
		{"/static/sub?a=b&c=//d", "/static/sub/?a=b&c=//d"},
		{"/static/a:b", "/static/a:b/"},
		{"/static/sp%20ace", "/static/sp%20ace/"},
		{"/static?x=1", "/static/?x=1"},
		{"/stripped/sub?q", "/stripped/sub/?q"},
	} {
		res, err := client.Get(base + test.target)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		location, err := res.Location()
		if res.StatusCode != 301 || err != nil || location.String() != base+test.location {
			t.Errorf("%s: %d to %v, want %s", test.target, res.StatusCode, location, test.location)
		}
		if res.Header.Get("Cache-Control") != "" || res.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: header %v", test.target, res.Header)
		}
	}
}

func TestStaticFallbackIsForNavigations(t *testing.T) {
	dir := staticTree(t, map[string]string{"app.html": "<p>app", "real.txt": "real", "dir/x.txt": "x"})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Fallback: "app.html", Prefix: "/app"})
	const browser = "Accept: text/html,application/xhtml+xml,*/*;q=0.8"
	for _, test := range []struct {
		method, target, accept string
		status                 int
		body                   string
	}{
		{"GET", "/app/users/17", browser, 200, "<p>app"},
		{"HEAD", "/app/users/17", browser, 200, ""},
		{"GET", "/app/users/17?v=1", browser, 200, "<p>app"},
		{"GET", "/app/dir", browser, 200, "<p>app"},
		{"GET", "/app/dir/", browser, 200, "<p>app"},
		{"GET", "/app/", browser, 200, "<p>app"},
		{"GET", "/app/real.txt", browser, 200, "real"},
		{"GET", "/app/missing.js", browser, 404, ""},
		{"GET", "/app/users/17", "Accept: */*", 404, ""},
		{"GET", "/app/users/17", "Accept: application/json", 404, ""},
		{"GET", "/app/.env", browser, 404, ""},
		{"GET", "/app/../x", browser, 404, ""},
		{"GET", "/other", browser, 404, ""},
		{"POST", "/app/users/17", browser, 405, ""},
	} {
		rec := staticAsk(files, test.method, test.target, test.accept)
		if rec.Code != test.status || test.status == 200 && rec.Body.String() != test.body {
			t.Errorf("%s %s: %d %q, want %d %q", test.method, test.target, rec.Code, rec.Body, test.status, test.body)
		}
		if strings.Contains(test.body, "app") {
			if cc := rec.Header().Get("Cache-Control"); cc != "no-cache" {
				t.Errorf("%s: Cache-Control %q", test.target, cc)
			}
			if rec = staticAsk(files, test.method, test.target, test.accept, "If-None-Match: "+staticTag("<p>app")); rec.Code != 304 {
				t.Errorf("%s again: %d", test.target, rec.Code)
			}
		}
	}
}

func TestStaticNotFoundHandler(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: t.TempDir(), NotFound: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		io.WriteString(w, "nothing at "+r.URL.Path)
	})})
	for _, target := range []string{"/x", "/.env", "/"} {
		if rec := staticAsk(files, "GET", target); rec.Code != 418 || rec.Body.String() != "nothing at "+target {
			t.Errorf("%s: %d %q", target, rec.Code, rec.Body)
		}
	}
}

func TestStaticMediaTypes(t *testing.T) {
	want := map[string]string{
		"a.js": "text/javascript; charset=utf-8", "a.mjs": "text/javascript; charset=utf-8", "a.css": "text/css; charset=utf-8",
		"a.HTML": "text/html; charset=utf-8", "a.json": "application/json", "a.svg": "image/svg+xml", "a.wasm": "application/wasm",
		"a.woff2": "font/woff2", "a.webp": "image/webp", "a.avif": "image/avif", "a.webmanifest": "application/manifest+json",
		"a.map": "application/json", "a.txt": "text/plain; charset=utf-8", "a.md": "text/markdown; charset=utf-8",
		"a.pdf": "application/pdf", "a.mp4": "video/mp4", "a.xml": "text/xml; charset=utf-8", "a.ico": "image/x-icon",
		"text": "text/plain; charset=utf-8", "a.unknown-extension": "text/plain; charset=utf-8",
	}
	files := make(map[string]string)
	for name := range want {
		files[name] = "content"
	}
	files["picture"] = "\x89PNG\r\n\x1a\n"
	want["picture"] = "image/png"
	h := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, files)})
	for name, contentType := range want {
		rec := staticAsk(h, "GET", "/"+name)
		if got := rec.Header().Get("Content-Type"); got != contentType || rec.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %q, want %q", name, got, contentType)
		}
	}
}

func TestStaticVersions(t *testing.T) {
	text, large := "body{}", strings.Repeat("large", 1000)
	dir := staticTree(t, map[string]string{"app.css": text, "sp ace.txt": text, "sub/index.html": "<p>", "large.bin": large})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static", MaxCachedFile: 4000})
	for _, test := range []struct{ name, url string }{
		{"app.css", "/static/app.css?v=" + staticHash(text)},
		{"/app.css", "/static/app.css?v=" + staticHash(text)},
		{"sp ace.txt", "/static/sp%20ace.txt?v=" + staticHash(text)},
		{"sub/", "/static/sub/?v=" + staticHash("<p>")},
		{"large.bin", "/static/large.bin?v=" + staticHash(large)},
		{"none.css", "/static/none.css"},
		{"../x", "/static/../x"},
		{".env", "/static/.env"},
	} {
		for range 2 {
			if got := files.URL(test.name); got != test.url {
				t.Errorf("URL(%q) = %q, want %q", test.name, got, test.url)
			}
		}
	}
	const year, immutable = "public, max-age=31536000", "public, max-age=31536000, immutable"
	for _, test := range []struct{ target, cacheControl string }{
		{files.URL("app.css"), immutable},
		{files.URL("app.css") + "&x=1", immutable},
		{files.URL("large.bin"), immutable},
		{files.URL("sub/"), immutable},
		{"/static/app.css", year},
		{"/static/app.css?x=1", year},
		{"/static/app.css?vv=1", year},
		{"/static/app.css?v=old", "no-cache"},
		{"/static/app.css?v=", "no-cache"},
		{"/static/large.bin?v=old", "no-cache"},
		{"/static/large.bin", year},
	} {
		rec := staticAsk(files, "GET", test.target)
		if got := rec.Header().Get("Cache-Control"); rec.Code != 200 || got != test.cacheControl {
			t.Errorf("%s: %d %q, want %q", test.target, rec.Code, got, test.cacheControl)
		}
		again := staticAsk(files, "GET", test.target, "If-None-Match: "+rec.Header().Get("Etag"))
		if got := again.Header().Get("Cache-Control"); again.Code != 304 || got != test.cacheControl {
			t.Errorf("%s again: %d %q, want %q", test.target, again.Code, got, test.cacheControl)
		}
	}
	if tag := staticAsk(files, "GET", files.URL("large.bin")).Header().Get("Etag"); tag != staticTag(large) {
		t.Errorf("a large file under its version has the tag %s, want that of its content", tag)
	}

	own := staticServer(t, conduit.FileServerConfig{Dir: dir, CacheControl: "max-age=60", HTMLCacheControl: "max-age=5"})
	for target, want := range map[string]string{"/app.css": "max-age=60", "/sub/": "max-age=5"} {
		if got := staticAsk(own, "GET", target).Header().Get("Cache-Control"); got != want {
			t.Errorf("%s: Cache-Control %q, want %q", target, got, want)
		}
	}
}

// staticSizes are a file in memory, one of which only the gzip form is, and a
// large one.
var staticSizes = []struct {
	name string
	body string
}{
	{"/small.txt", strings.Repeat("0123456789", 200)},
	{"/middle.txt", strings.Repeat("0123456789", 40000)},
	{"/large.txt", strings.Repeat("0123456789", 120000)},
}

func staticSizesServer(t *testing.T) *conduit.FileServer {
	files := make(map[string]string)
	for _, size := range staticSizes {
		files[size.name[1:]] = size.body
	}
	return staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, files)})
}

func TestStaticConditions(t *testing.T) {
	files := staticSizesServer(t)
	for _, size := range staticSizes {
		t.Run(size.name[1:], func(t *testing.T) {
			whole := staticAsk(files, "GET", size.name)
			tag := whole.Header().Get("Etag")
			coded := staticAsk(files, "GET", size.name, "Accept-Encoding: gzip").Header().Get("Etag")
			if whole.Code != 200 || whole.Body.String() != size.body || tag == "" || tag[0] != '"' {
				t.Fatalf("%d, %d bytes, tag %s", whole.Code, whole.Body.Len(), tag)
			}
			const before, same, after = "Mon, 06 May 2024 07:08:08 GMT", staticModified, "Mon, 06 May 2024 07:08:10 GMT"
			for _, test := range []struct {
				lines  string
				status int
			}{
				{"If-None-Match: TAG", 304},
				{"If-None-Match: W/TAG", 304},
				{"If-None-Match: *", 304},
				{`If-None-Match: "x", W/"y" ,TAG`, 304},
				{"If-None-Match: \"x\"\nIf-None-Match: TAG", 304},
				{`If-None-Match: "x,TAG`, 200},
				{`If-None-Match: "x"`, 200},
				{"If-None-Match: ", 200},
				{"If-None-Match: garbage, TAG", 200},
				{"If-Modified-Since: " + same, 304},
				{"If-Modified-Since: " + after, 304},
				{"If-Modified-Since: Monday, 06-May-24 07:08:09 GMT", 304},
				{"If-Modified-Since: Mon May  6 07:08:09 2024", 304},
				{"If-Modified-Since: " + before, 200},
				{"If-Modified-Since: yesterday", 200},
				{"If-None-Match: \"x\"\nIf-Modified-Since: " + after, 200}, // the tag wins
				{"If-None-Match: TAG\nIf-Modified-Since: " + before, 304},
				{"If-Match: TAG", 200},
				{"If-Match: *", 200},
				{`If-Match: "x", TAG`, 200},
				{"If-Match: W/TAG", 412}, // strong comparison
				{`If-Match: "x"`, 412},
				{"If-Match: \"x\"\nIf-None-Match: TAG", 412},
				{"If-Match: TAG\nIf-None-Match: TAG", 304},
				{"If-Unmodified-Since: " + same, 200},
				{"If-Unmodified-Since: " + after, 200},
				{"If-Unmodified-Since: " + before, 412},
				{"If-Unmodified-Since: yesterday", 200},
				{"If-Match: TAG\nIf-Unmodified-Since: " + before, 200}, // the tag wins
				{"If-Match: \"x\"\nIf-Unmodified-Since: " + after, 412},
				{"If-Unmodified-Since: " + same + "\nIf-Modified-Since: " + same, 304},
				{"Range: bytes=0-4\nIf-None-Match: TAG", 304},
				{"Range: bytes=0-4\nIf-Match: \"x\"", 412},
				{"Range: bytes=0-4\nIf-Range: TAG", 206},
				{"Range: bytes=0-4\nIf-Range: W/TAG", 200},
				{"Range: bytes=0-4\nIf-Range: \"x\"", 200},
				{"Range: bytes=0-4\nIf-Range: CODED", 200},
				{"Range: bytes=0-4\nIf-Range: " + same, 206},
				{"Range: bytes=0-4\nIf-Range: " + after, 200},
				{"Range: bytes=0-4\nIf-Range: " + before, 200},
				{"Range: bytes=0-4\nIf-Range: garbage", 200},
				{"Range: bytes=9999999-\nIf-Range: \"x\"", 200},
				{"If-Range: TAG", 200},
				{"Accept-Encoding: gzip\nIf-None-Match: CODED", 304},
			} {
				lines := strings.ReplaceAll(strings.ReplaceAll(test.lines, "TAG", tag), "CODED", coded)
				if size.name == "/large.txt" && strings.Contains(test.lines, "CODED") {
					continue // there is only one form of it
				}
				for _, method := range []string{"GET", "HEAD"} {
					want := test.status
					if want == 206 && method == "HEAD" {
						want = 200 // RFC 9110, Section 14.2
					}
					rec := staticAsk(files, method, size.name, strings.Split(lines, "\n")...)
					h := rec.Header()
					if rec.Code != want {
						t.Errorf("%s %q: %d, want %d", method, lines, rec.Code, want)
						continue
					}
					switch want {
					case 304:
						for _, field := range []string{"Etag", "Last-Modified", "Cache-Control", "Vary", "X-Content-Type-Options"} {
							if want := whole.Header().Get(field); h.Get(field) != want && !(field == "Etag" && h.Get(field) == coded) {
								t.Errorf("%s %q: 304 with %s %q, want %q", method, lines, field, h.Get(field), want)
							}
						}
						if rec.Body.Len() != 0 || h.Get("Content-Length") != "" {
							t.Errorf("%s %q: 304 with a body", method, lines)
						}
					case 412:
						if h.Get("Cache-Control") != "" || h.Get("Content-Length") != "" || h.Get("Etag") != "" {
							t.Errorf("%s %q: 412 with %v", method, lines, h)
						}
					case 200:
						if method == "GET" && rec.Body.String() != size.body || h.Get("Content-Range") != "" {
							t.Errorf("%s %q: 200 with %d bytes, %v", method, lines, rec.Body.Len(), h)
						}
					case 206:
						if rec.Body.String() != size.body[:5] {
							t.Errorf("%s %q: body %q", method, lines, rec.Body)
						}
					}
				}
			}
		})
	}
}

func TestStaticRanges(t *testing.T) {
	files := staticSizesServer(t)
	for _, size := range staticSizes {
		t.Run(size.name[1:], func(t *testing.T) {
			n := len(size.body)
			whole := staticAsk(files, "GET", size.name).Header()
			for _, test := range []struct {
				value  string
				status int
				from   int
				to     int
			}{
				{"bytes=0-0", 206, 0, 0},
				{"bytes=0-499", 206, 0, 499},
				{"bytes=500-999", 206, 500, 999},
				{"bytes=500-", 206, 500, n - 1},
				{"bytes=-500", 206, n - 500, n - 1},
				{"bytes=-99999999", 206, 0, n - 1},
				{"bytes=0-", 206, 0, n - 1},
				{"bytes=5-99999999", 206, 5, n - 1},
				{"bytes=5-99999999999999999999999", 206, 5, n - 1},
				{"bytes= 5-6 ", 206, 5, 6},
				{"BYTES=5-6", 206, 5, 6},
				{"bytes=,5-6,,", 206, 5, 6},
				{"bytes=5-6,99999999-", 206, 5, 6},
				{"bytes=" + strconv.Itoa(n-1) + "-", 206, n - 1, n - 1},
				{"bytes=" + strconv.Itoa(n) + "-", 416, 0, 0},
				{"bytes=99999999-99999999", 416, 0, 0},
				{"bytes=-0", 416, 0, 0},
				{"bytes=99999999999999999999999-", 416, 0, 0},
				{"bytes=", 416, 0, 0},
				{"bytes=5-2", 416, 0, 0},
				{"bytes=a-b", 416, 0, 0},
				{"bytes=+1-2", 416, 0, 0},
				{"bytes=--1", 416, 0, 0},
				{"bytes=1", 416, 0, 0},
				{"bytes=0x1-2", 416, 0, 0},
				{"bytes=1-2;3", 416, 0, 0},
				{"lines=1-2", 200, 0, 0},
				{"1-2", 200, 0, 0},
				{"", 200, 0, 0},
				{"bytes=0-,0-", 200, 0, 0},
				{"bytes=" + strings.Repeat("0-0,", 1000), 200, 0, 0},
			} {
				rec := staticAsk(files, "GET", size.name, "Range: "+test.value, "Accept-Encoding: gzip")
				h := rec.Header()
				if rec.Code != test.status {
					t.Errorf("%.40q: %d, want %d", test.value, rec.Code, test.status)
					continue
				}
				if h.Get("Content-Encoding") != "" || h.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("%.40q: %v", test.value, h)
				}
				switch test.status {
				case 200:
					if rec.Body.String() != size.body {
						t.Errorf("%.40q: %d bytes", test.value, rec.Body.Len())
					}
				case 206:
					want := size.body[test.from : test.to+1]
					if rec.Body.String() != want || h.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", test.from, test.to, n) ||
						h.Get("Content-Length") != strconv.Itoa(len(want)) {
						t.Errorf("%.40q: %d bytes, %v", test.value, rec.Body.Len(), h)
					}
					for _, field := range []string{"Etag", "Last-Modified", "Cache-Control", "Vary", "Content-Type", "Accept-Ranges"} {
						if h.Get(field) != whole.Get(field) {
							t.Errorf("%.40q: %s is %q, and %q on a 200", test.value, field, h.Get(field), whole.Get(field))
						}
					}
				case 416:
					if h.Get("Content-Range") != fmt.Sprintf("bytes */%d", n) || h.Get("Cache-Control") != "" || h.Get("Etag") != "" {
						t.Errorf("%.40q: %v", test.value, h)
					}
				}
			}

			rec := staticAsk(files, "GET", size.name, "Range: bytes=0-4, 1000-1009, -3, 99999999-")
			media, params, err := mime.ParseMediaType(rec.Header().Get("Content-Type"))
			if rec.Code != 206 || media != "multipart/byteranges" || err != nil || rec.Header().Get("Content-Range") != "" {
				t.Fatalf("several ranges: %d %v", rec.Code, rec.Header())
			}
			if rec.Header().Get("Content-Length") != strconv.Itoa(rec.Body.Len()) {
				t.Errorf("several ranges: Content-Length %s, %d bytes", rec.Header().Get("Content-Length"), rec.Body.Len())
			}
			parts := multipart.NewReader(rec.Body, params["boundary"])
			for _, want := range [][2]int{{0, 5}, {1000, 1010}, {n - 3, n}} {
				part, err := parts.NextPart()
				if err != nil {
					t.Fatal(err)
				}
				body, _ := io.ReadAll(part)
				if string(body) != size.body[want[0]:want[1]] || part.Header.Get("Content-Type") != "text/plain; charset=utf-8" ||
					part.Header.Get("Content-Range") != fmt.Sprintf("bytes %d-%d/%d", want[0], want[1]-1, n) {
					t.Errorf("part %v: %q %v", want, body, part.Header)
				}
			}
			if _, err := parts.NextPart(); err != io.EOF {
				t.Errorf("after the last part: %v", err)
			}
		})
	}
}

func TestStaticRangesOfAnEmptyFile(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"empty.txt": ""})})
	for value, want := range map[string]int{"bytes=0-": 200, "bytes=-1": 200, "bytes=0-0": 200, "bytes=5-": 200, "bytes=-0": 416, "bytes=x": 416} {
		if rec := staticAsk(files, "GET", "/empty.txt", "Range: "+value); rec.Code != want || rec.Code == 200 && rec.Body.Len() != 0 {
			t.Errorf("%s: %d %v, want %d", value, rec.Code, rec.Header(), want)
		}
	}
}

// What http.FileServer answers to the same requests on the same tree. Where
// conduit differs, the difference is named.
func TestStaticDiffersFromNetHTTPOnlyWhereItSaysSo(t *testing.T) {
	files := make(map[string]string)
	for _, size := range staticSizes {
		files[size.name[1:]] = size.body
	}
	files["index.html"], files["sub/index.html"], files["sub/a.txt"] = "<p>", "<b>", "a"
	dir := staticTree(t, files)
	std := http.FileServer(http.Dir(dir))
	ours := staticServer(t, conduit.FileServerConfig{Dir: dir})
	targets := []string{"/", "/sub/", "/sub", "/sub?a=b", "/sub/a.txt", "/none", "/none/", "/small.txt", "/middle.txt", "/large.txt", "/small.txt/x"}
	conditions := []string{
		"", "Range: bytes=0-4", "Range: bytes=-1", "Range: bytes=5-", "Range: bytes=5-2", "Range: bytes=x", "Range: bytes=0-0,2-3",
		"Range: bytes=99999999-", "Range: bytes=0-,0-", "If-Modified-Since: " + staticModified, "If-Modified-Since: Mon, 06 May 2024 07:08:08 GMT",
		"If-Unmodified-Since: Mon, 06 May 2024 07:08:08 GMT", "If-Unmodified-Since: " + staticModified, "If-Match: *", `If-Match: "x"`,
		`If-None-Match: "x"`, "Range: bytes=0-1\nIf-Range: " + staticModified, "Range: bytes=0-1\nIf-Range: Mon, 06 May 2024 07:08:08 GMT",
	}
	for _, method := range []string{"GET", "HEAD"} {
		for _, target := range targets {
			for _, condition := range conditions {
				var lines []string
				if condition != "" {
					lines = strings.Split(condition, "\n")
				}
				if method == "HEAD" && strings.HasPrefix(condition, "Range") {
					continue // net/http answers as to a GET
				}
				got, want := staticAsk(ours, method, target, lines...), staticAsk(std, method, target, lines...)
				where := fmt.Sprintf("%s %s %q", method, target, lines)
				if got.Code != want.Code {
					t.Errorf("%s: %d, net/http %d", where, got.Code, want.Code)
					continue
				}
				for _, field := range []string{"Content-Length", "Content-Range", "Last-Modified", "Accept-Ranges", "Content-Type"} {
					g, w := got.Header().Get(field), want.Header().Get(field)
					switch {
					case field == "Content-Type" && strings.HasPrefix(w, "multipart/"), // a random boundary
						field == "Content-Length" && strings.HasPrefix(want.Header().Get("Content-Type"), "multipart/"):
						g, w = "", ""
					case got.Code == 404, got.Code == 412, field == "Content-Range" && got.Code == 416 && w == "": // texts, and 416 without the size
						continue
					}
					if g != w {
						t.Errorf("%s: %s is %q, net/http's %q", where, field, g, w)
					}
				}
				if got.Code < 400 && !strings.HasPrefix(want.Header().Get("Content-Type"), "multipart/") && got.Body.String() != want.Body.String() {
					t.Errorf("%s: body of %d bytes, net/http's of %d", where, got.Body.Len(), want.Body.Len())
				}
				if g, w := got.Header().Get("Location"), want.Header().Get("Location"); g != w {
					t.Errorf("%s: Location %q, net/http's %q", where, g, w)
				}
			}
		}
	}
	for _, test := range []struct {
		why, method, target, line string
		ours, std                 int
	}{
		{"an index is a file like others", "GET", "/index.html", "", 200, 301},
		{"a path must be in its shortest form", "GET", "/sub//a.txt", "", 404, 200},
		{"a file is no directory", "GET", "/sub/a.txt/", "", 404, 301},
		{"only GET and HEAD are answered", "POST", "/sub/a.txt", "", 405, 200},
		{"an encoded slash is no separator", "GET", "/sub%2fa.txt", "", 404, 200},
		{"a suffix of no bytes cannot be satisfied", "GET", "/small.txt", "Range: bytes=-0", 416, 206},
		{"unknown units are ignored", "GET", "/small.txt", "Range: lines=1-2", 200, 416},
		{"a HEAD has no ranges", "HEAD", "/small.txt", "Range: bytes=0-1", 200, 206},
	} {
		var lines []string
		if test.line != "" {
			lines = []string{test.line}
		}
		got, want := staticAsk(ours, test.method, test.target, lines...), staticAsk(std, test.method, test.target, lines...)
		if got.Code != test.ours || want.Code != test.std {
			t.Errorf("%s: %s %s: %d and net/http %d, want %d and %d", test.why, test.method, test.target, got.Code, want.Code, test.ours, test.std)
		}
	}
}

func TestStaticGzip(t *testing.T) {
	script := string(staticText(20000))
	middle := string(staticText(500000))
	random := make([]byte, 4000)
	for i := range random {
		random[i] = byte(uint32(i*i*i) * 2654435761 >> 13)
	}
	dir := staticTree(t, map[string]string{
		"a.js": script, "middle.js": middle, "tiny.js": "let a", "a.png": script, "random.txt": string(random),
	})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir})
	for _, test := range []struct {
		target, accept string
		coded, vary    bool
		body           string
	}{
		{"/a.js", "gzip", true, true, script},
		{"/a.js", "gzip, deflate, br, zstd", true, true, script},
		{"/a.js", "br", false, true, script},
		{"/a.js", "", false, true, script},
		{"/a.js", "gzip;q=0", false, true, script},
		{"/a.js", "*", true, true, script},
		{"/middle.js", "gzip", true, true, middle},
		{"/middle.js", "identity", false, true, middle},
		{"/tiny.js", "gzip", false, true, "let a"},
		{"/a.png", "gzip", false, false, script},
	} {
		for range 2 {
			var lines []string
			if test.accept != "" {
				lines = []string{"Accept-Encoding: " + test.accept}
			}
			rec := staticAsk(files, "GET", test.target, lines...)
			h, body := rec.Header(), rec.Body.String()
			if h.Get("Content-Length") != strconv.Itoa(len(body)) {
				t.Errorf("%s %q: Content-Length %s of %d", test.target, test.accept, h.Get("Content-Length"), len(body))
			}
			wantTag := staticTag(test.body)
			if test.coded {
				if h.Get("Content-Encoding") != "gzip" || h.Get("Accept-Ranges") != "" || len(body) > len(test.body)*2/5 {
					t.Errorf("%s %q: %d bytes, %v", test.target, test.accept, len(body), h)
					continue
				}
				body = staticGunzip(t, body)
				wantTag = wantTag[:len(wantTag)-1] + `-gzip"`
			}
			if body != test.body || h.Get("Etag") != wantTag || (h.Get("Vary") == "Accept-Encoding") != test.vary {
				t.Errorf("%s %q: %d bytes, %v, want tag %s", test.target, test.accept, len(body), h, wantTag)
			}
			head := staticAsk(files, "HEAD", test.target, lines...)
			if !maps.EqualFunc(head.Header(), h, slices.Equal) {
				t.Errorf("%s %q: HEAD %v, GET %v", test.target, test.accept, head.Header(), h)
			}
		}
	}
}

func TestStaticIsLeftAloneByCompression(t *testing.T) {
	script, large := string(staticText(20000)), string(staticText(50000))
	dir := staticTree(t, map[string]string{"a.js": script, "large.js": large})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, MaxCachedFile: 30000})
	url := serve(t, newServer(t, &conduit.Config{Handler: conduit.Compression()(files)}))
	client := newClient(t, &http.Transport{DisableCompression: true})
	for _, test := range []struct{ target, body, tag string }{
		{"/a.js", script, `"` + staticHash(script) + `-gzip"`},
		{"/large.js", large, ""}, // coded by Compression, with a tag that it has made weak
	} {
		req, _ := http.NewRequest("GET", url+test.target, nil)
		req.Header.Set("Accept-Encoding", "gzip")
		got := do(t, client, req)
		tag := got.header.Get("Etag")
		if got.header.Get("Content-Encoding") != "gzip" || staticGunzip(t, got.body) != test.body || strings.Join(got.header.Values("Vary"), ",") != "Accept-Encoding" {
			t.Errorf("%s: %d, %d bytes, %v", test.target, got.status, len(got.body), got.header)
		}
		if test.tag != "" && tag != test.tag || test.tag == "" && !strings.HasPrefix(tag, "W/") {
			t.Errorf("%s: tag %s, want %s", test.target, tag, test.tag)
		}
		req.Header.Set("If-None-Match", tag)
		if got := do(t, client, req); got.status != 304 || got.header.Get("Etag") != tag {
			t.Errorf("%s again: %d %v", test.target, got.status, got.header)
		}
	}
}

// Vary may have values already, and ready header values may not be written to.
func TestStaticAddsToVary(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Vary", "Origin")
		files.ServeHTTP(w, r)
		for field := range w.Header() {
			w.Header()[field] = append(w.Header()[field], "spoiled")
		}
	})
	for range 3 {
		rec := staticAsk(h, "GET", "/a.txt")
		if got := rec.Result().Header.Values("Vary"); strings.Join(got, ", ") != "Origin, Accept-Encoding" {
			t.Errorf("Vary %q", got)
		}
		if got := rec.Result().Header.Values("Etag"); len(got) != 1 {
			t.Errorf("Etag %q", got)
		}
	}
}

func TestStaticPrecompressed(t *testing.T) {
	text := strings.Repeat("text ", 1000)
	dir := staticTree(t, map[string]string{
		"all.js": text, "all.js.br": "BR", "all.js.zst": "ZST", "all.js.gz": "GZ",
		"some.bin": text, "some.bin.zst": "ZST",
		"old.js": text, "old.js.br": "BR",
		"gone.js.br": "BR",
		"dir.js":     text, "dir.js.br/x": "",
	})
	past := staticTime.Add(-time.Second)
	if err := os.Chtimes(filepath.Join(dir, "old.js.br"), past, past); err != nil {
		t.Fatal(err)
	}
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Precompressed: true})
	for _, test := range []struct{ target, accept, coding, body string }{
		{"/all.js", "gzip, deflate, br, zstd", "br", "BR"},
		{"/all.js", "gzip, br;q=0.5", "gzip", "GZ"},
		{"/all.js", "zstd, gzip;q=0.9", "zstd", "ZST"},
		{"/all.js", "br;q=0, zstd;q=0.1", "zstd", "ZST"},
		{"/all.js", "identity", "", text},
		{"/some.bin", "gzip, br, zstd", "zstd", "ZST"},
		{"/some.bin", "gzip, br", "", text},
		{"/old.js", "br", "", text},
	} {
		rec := staticAsk(files, "GET", test.target, "Accept-Encoding: "+test.accept)
		h := rec.Header()
		if h.Get("Content-Encoding") != test.coding || rec.Body.String() != test.body || h.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%s %q: %.20q %v, want %q", test.target, test.accept, rec.Body, h, test.coding)
		}
		if strings.HasSuffix(test.target, ".js") && h.Get("Content-Type") != "text/javascript; charset=utf-8" {
			t.Errorf("%s %q: Content-Type %q", test.target, test.accept, h.Get("Content-Type"))
		}
		if tag := h.Get("Etag"); test.coding != "" && tag != `"`+staticHash(test.body)+"-"+test.coding+`"` {
			t.Errorf("%s %q: tag %s", test.target, test.accept, tag)
		}
		if again := staticAsk(files, "GET", test.target, "Accept-Encoding: "+test.accept, "If-None-Match: "+h.Get("Etag")); again.Code != 304 {
			t.Errorf("%s %q again: %d", test.target, test.accept, again.Code)
		}
	}
	if rec := staticAsk(files, "GET", "/gone.js", "Accept-Encoding: br"); rec.Code != 404 {
		t.Errorf("a sidecar without its original: %d", rec.Code)
	}
	if rec := staticAsk(files, "GET", "/dir.js", "Accept-Encoding: br"); rec.Code != 200 || rec.Body.String() != text {
		t.Errorf("a directory as sidecar: %d", rec.Code)
	}
	if off := staticServer(t, conduit.FileServerConfig{Dir: dir}); staticAsk(off, "GET", "/all.js", "Accept-Encoding: br").Header().Get("Content-Encoding") != "" {
		t.Error("sidecars are served without Precompressed")
	}

	// The original changes under a sidecar, and a new sidecar comes.
	quick := staticServer(t, conduit.FileServerConfig{Dir: dir, Precompressed: true, Recheck: time.Nanosecond})
	ask := func() string { return staticAsk(quick, "GET", "/all.js", "Accept-Encoding: br").Body.String() }
	if got := ask(); got != "BR" {
		t.Fatalf("%q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "all.js"), []byte("new text"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "new text" {
		t.Errorf("with an outdated sidecar: %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "all.js.br"), []byte("NEW BR"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "NEW BR" {
		t.Errorf("with a new sidecar: %q", got)
	}
}

func TestStaticFromAFileSystem(t *testing.T) {
	large := strings.Repeat("large file ", 1000)
	for name, fsys := range map[string]fs.FS{
		"seekable":   fstest.MapFS{"index.html": {Data: []byte("<p>")}, "sub/a.txt": {Data: []byte("a")}, "large": {Data: []byte(large)}},
		"unseekable": staticUnseekable{fstest.MapFS{"index.html": {Data: []byte("<p>")}, "sub/a.txt": {Data: []byte("a")}, "large": {Data: []byte(large)}}},
	} {
		t.Run(name, func(t *testing.T) {
			files := staticServer(t, conduit.FileServerConfig{FS: fsys, MaxCachedFile: 5000})
			for target, body := range map[string]string{"/": "<p>", "/sub/a.txt": "a", "/large": large} {
				rec := staticAsk(files, "GET", target)
				if rec.Code != 200 || rec.Body.String() != body || rec.Header().Get("Etag") != staticTag(body) || rec.Header().Get("Last-Modified") != "" {
					t.Errorf("%s: %d, %d bytes, %v", target, rec.Code, rec.Body.Len(), rec.Header())
				}
				if rec := staticAsk(files, "GET", target, "If-None-Match: "+staticTag(body)); rec.Code != 304 {
					t.Errorf("%s again: %d", target, rec.Code)
				}
				rec = staticAsk(files, "GET", target, "If-Modified-Since: "+staticModified, "If-Unmodified-Since: "+staticModified)
				if rec.Code != 200 {
					t.Errorf("%s by date: %d", target, rec.Code)
				}
			}
			want, body := 206, large[5:10]
			if name == "unseekable" {
				want, body = 200, large
			}
			if rec := staticAsk(files, "GET", "/large", "Range: bytes=5-9"); rec.Code != want || rec.Body.String() != body {
				t.Errorf("range: %d %.20q, want %d", rec.Code, rec.Body, want)
			}
			if rec := staticAsk(files, "GET", "/sub/a.txt", "Range: bytes=0-0"); rec.Code != 206 {
				t.Errorf("range of a file in memory: %d", rec.Code)
			}
			for _, target := range []string{"/none", "/sub/", "/../x"} {
				if rec := staticAsk(files, "GET", target); rec.Code != 404 {
					t.Errorf("%s: %d", target, rec.Code)
				}
			}
		})
	}
}

// staticUnseekable hides the Seek of its files.
type staticUnseekable struct{ fs.FS }

func (u staticUnseekable) Open(name string) (fs.File, error) {
	f, err := u.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return struct{ fs.File }{f}, nil
}

// staticFS counts, holds up or spoils what is done to a file system.
type staticFS struct {
	fs.FS
	opens, stats atomic.Int64
	hold         chan struct{} // when set, Open waits for it
	mu           sync.Mutex
	err          error
	panics       bool
}

func (c *staticFS) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *staticFS) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *staticFS) Open(name string) (fs.File, error) {
	c.opens.Add(1)
	if c.hold != nil {
		<-c.hold
	}
	if c.panics {
		panic("the file system is broken")
	}
	return c.FS.Open(name)
}

func (c *staticFS) Stat(name string) (fs.FileInfo, error) {
	c.stats.Add(1)
	if err := c.failure(); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return fs.Stat(c.FS, name)
}

func TestStaticReadsOnceForConcurrentMisses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counted := &staticFS{FS: fstest.MapFS{"a.txt": {Data: []byte("a"), ModTime: staticTime}}, hold: make(chan struct{})}
		files := staticServer(t, conduit.FileServerConfig{FS: counted})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if rec := staticAsk(files, "GET", "/a.txt"); rec.Body.String() != "a" {
					t.Errorf("%d %q", rec.Code, rec.Body)
				}
			})
		}
		synctest.Wait()
		close(counted.hold)
		wg.Wait()
		if n := counted.opens.Load(); n != 1 {
			t.Errorf("read %d times for 50 requests", n)
		}
	})
}

func TestStaticRechecksOncePerInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counted := &staticFS{FS: fstest.MapFS{"a.txt": {Data: []byte("a"), ModTime: time.Now().Add(-time.Hour)}}}
		for _, recheck := range []time.Duration{0, 10 * time.Second, -1} {
			files := staticServer(t, conduit.FileServerConfig{FS: counted, Recheck: recheck})
			staticAsk(files, "GET", "/a.txt")
			opens, stats := counted.opens.Load(), counted.stats.Load()
			for range 100 {
				staticAsk(files, "GET", "/a.txt")
				time.Sleep(100 * time.Millisecond)
			}
			want := map[time.Duration]int64{0: 9, 10 * time.Second: 0, -1: 0}[recheck]
			if n := counted.stats.Load() - stats; n != want {
				t.Errorf("Recheck %v: %d looks in ten seconds, want %d", recheck, n, want)
			}
			if n := counted.opens.Load() - opens; n != 0 {
				t.Errorf("Recheck %v: an unchanged file was read again", recheck)
			}
		}
	})
}

func TestStaticErrorsOfTheFileSystem(t *testing.T) {
	var log logBuffer
	broken := &staticFS{FS: fstest.MapFS{"a.txt": {Data: []byte("a")}}}
	files := staticServer(t, conduit.FileServerConfig{FS: broken})
	url := serve(t, newServer(t, &conduit.Config{Handler: conduit.Recovery()(files), Logger: log.logger()}))
	client := newClient(t, &http.Transport{})
	for _, test := range []struct {
		err    error
		status int
		logged bool
	}{
		{syscall.EMFILE, 500, true},
		{syscall.EIO, 500, true},
		{fs.ErrPermission, 404, true},
		{fs.ErrNotExist, 404, false},
		{syscall.ENAMETOOLONG, 404, false},
		{errors.New("path escapes from parent"), 404, false},
	} {
		broken.fail(test.err)
		before := len(log.find("file cannot be read"))
		got := get(t, client, url+"/a.txt")
		if got.status != test.status || strings.Contains(got.body, test.err.Error()) {
			t.Errorf("%v: %d %q, want %d", test.err, got.status, got.body, test.status)
		}
		if logged := len(log.find("file cannot be read")) > before; logged != test.logged {
			t.Errorf("%v: logged %v, want %v", test.err, logged, test.logged)
		}
	}
	broken.fail(nil)
	broken.panics = true
	for range 2 {
		if got := get(t, client, url+"/a.txt"); got.status != 500 {
			t.Errorf("a file system that panics: %d", got.status)
		}
	}
}

// A walk over many names must not push out those in demand, nor outgrow the
// bound.
func TestStaticCacheWithstandsAScan(t *testing.T) {
	const size, limit, names = 2000, 1 << 20, 5000
	many := make(fstest.MapFS)
	body := bytes.Repeat([]byte("x"), size)
	for i := range names {
		many["scan/"+strconv.Itoa(i)] = &fstest.MapFile{Data: body, ModTime: staticTime}
	}
	for i := range 20 {
		many["hot/"+strconv.Itoa(i)] = &fstest.MapFile{Data: body, ModTime: staticTime}
	}
	counted := &staticFS{FS: many}
	files := staticServer(t, conduit.FileServerConfig{FS: counted, CacheBytes: limit, Recheck: -1})
	hot := func() int64 {
		before := counted.opens.Load()
		for i := range 20 {
			staticAsk(files, "GET", "/hot/"+strconv.Itoa(i))
		}
		return counted.opens.Load() - before
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	hot()
	hot()
	before := heap()
	for i := range names {
		staticAsk(files, "GET", "/scan/"+strconv.Itoa(i))
		staticAsk(files, "GET", "/none/"+strconv.Itoa(i))
		if i%500 == 499 {
			if n := hot(); n != 0 {
				t.Fatalf("after %d names of a scan %d of 20 hot files had to be read again", i, n)
			}
		}
	}
	if grown := heap() - before; grown > 2*limit {
		t.Errorf("the heap grew by %d for a cache of %d", grown, limit)
	}
	opens := counted.opens.Load()
	for i := range names {
		staticAsk(files, "GET", "/scan/"+strconv.Itoa(i))
	}
	if kept := names - (counted.opens.Load() - opens); kept > limit/size {
		t.Errorf("%d files of %d bytes were kept in %d", kept, size, limit)
	}
	runtime.KeepAlive(files)

	// What becomes hot later gets in.
	for range 3 {
		for i := range 20 {
			staticAsk(files, "GET", "/scan/"+strconv.Itoa(i))
		}
	}
	opens = counted.opens.Load()
	for i := range 20 {
		staticAsk(files, "GET", "/scan/"+strconv.Itoa(i))
	}
	if n := counted.opens.Load() - opens; n != 0 {
		t.Errorf("%d of 20 newly hot files were read again", n)
	}
}

func TestStaticWithoutACache(t *testing.T) {
	text := string(staticText(5000))
	dir := staticTree(t, map[string]string{"a.txt": text, "index.html": "<p>"})
	for _, cfg := range []conduit.FileServerConfig{{CacheBytes: -1}, {MaxCachedFile: -1}, {CacheBytes: 1}} {
		cfg.Dir = dir
		files := staticServer(t, cfg)
		for range 2 {
			rec := staticAsk(files, "GET", "/a.txt", "Accept-Encoding: gzip")
			if rec.Code != 200 || rec.Body.String() != text || !strings.HasPrefix(rec.Header().Get("Etag"), `"`) {
				t.Errorf("%+v: %d %v", cfg, rec.Code, rec.Header())
			}
			if rec := staticAsk(files, "GET", "/"); rec.Body.String() != "<p>" {
				t.Errorf("%+v: %d %q", cfg, rec.Code, rec.Body)
			}
			if rec := staticAsk(files, "GET", "/a.txt", "If-None-Match: "+rec.Header().Get("Etag")); rec.Code != 304 {
				t.Errorf("%+v: %d", cfg, rec.Code)
			}
			if rec := staticAsk(files, "GET", files.URL("a.txt")); !strings.HasSuffix(rec.Header().Get("Cache-Control"), "immutable") {
				t.Errorf("%+v: %v", cfg, rec.Header())
			}
		}
	}
}

// Whatever is done to a file, the body is that of the tag.
func TestStaticBodiesMatchTheirTags(t *testing.T) {
	for _, size := range []int{2000, 300 << 10} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			dir := staticTree(t, map[string]string{"a.txt": ""})
			file := filepath.Join(dir, "a.txt")
			files := staticServer(t, conduit.FileServerConfig{Dir: dir, Recheck: time.Nanosecond})
			url := serve(t, newServer(t, &conduit.Config{Handler: files}))
			content := func(i int) []byte {
				return bytes.Repeat([]byte{byte('a' + i%26)}, size)
			}
			stop := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					switch i % 5 {
					case 0: // a new file under the name
						os.WriteFile(file+".new", content(i), 0o600)
						os.Rename(file+".new", file)
					case 1: // the same size, and the time set back
						info, err := os.Stat(file)
						os.WriteFile(file, content(i), 0o600)
						if err == nil {
							os.Chtimes(file, info.ModTime(), info.ModTime())
						}
					case 2:
						os.Truncate(file, int64(size/2))
					case 3:
						if f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0); err == nil {
							f.Write(content(i))
							f.Close()
						}
					case 4: // in place, without a truncation, and long ago
						if f, err := os.OpenFile(file, os.O_WRONLY, 0); err == nil {
							f.Write(content(i))
							f.Close()
							os.Chtimes(file, staticTime, staticTime)
						}
					}
					time.Sleep(time.Duration(i%7) * time.Millisecond)
				}
			})
			var whole, cut atomic.Int64
			for range 3 {
				wg.Go(func() {
					client := newClient(t, &http.Transport{DisableCompression: true})
					for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); {
						res, err := client.Get(url + "/a.txt")
						if err != nil {
							cut.Add(1)
							continue
						}
						body, err := io.ReadAll(res.Body)
						res.Body.Close()
						if err != nil {
							cut.Add(1)
							continue
						}
						if res.StatusCode != 200 {
							continue
						}
						whole.Add(1)
						if tag := res.Header.Get("Etag"); tag != staticTag(string(body)) {
							t.Errorf("tag %s over %d bytes of %.1q", tag, len(body), body)
						}
					}
				})
			}
			time.Sleep(1600 * time.Millisecond)
			close(stop)
			wg.Wait()
			if whole.Load() < 20 {
				t.Errorf("%d whole replies, %d cut", whole.Load(), cut.Load())
			}
		})
	}
}

// A file may be rewritten so soon that its size and time are as they were.
func TestStaticRacyRewriteIsSeen(t *testing.T) {
	for _, size := range []int{2000, 300 << 10} {
		dir := staticTree(t, nil)
		file := filepath.Join(dir, "a.txt")
		files := staticServer(t, conduit.FileServerConfig{Dir: dir, Recheck: time.Nanosecond})
		now := time.Now()
		for i := range 4 {
			content := strings.Repeat(strconv.Itoa(i), size)
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(file, now, now); err != nil {
				t.Fatal(err)
			}
			rec := staticAsk(files, "GET", "/a.txt")
			if rec.Body.String() != content || rec.Header().Get("Etag") != staticTag(content) {
				t.Errorf("size %d, rewrite %d: got %.1q, tag %s", size, i, rec.Body, rec.Header().Get("Etag"))
			}
		}
	}
}

func TestStaticLargeFilesHaveWeakTagsWhileYoung(t *testing.T) {
	dir := staticTree(t, map[string]string{"old": strings.Repeat("x", 5000), "young": strings.Repeat("x", 5000)})
	now := time.Now()
	if err := os.Chtimes(filepath.Join(dir, "young"), now, now); err != nil {
		t.Fatal(err)
	}
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, MaxCachedFile: 4000, Recheck: time.Nanosecond})
	if tag := staticAsk(files, "GET", "/old").Header().Get("Etag"); !strings.HasPrefix(tag, `"`) {
		t.Errorf("tag of an old file: %s", tag)
	}
	tag := staticAsk(files, "GET", "/young").Header().Get("Etag")
	if !strings.HasPrefix(tag, `W/"`) {
		t.Errorf("tag of a young file: %s", tag)
	}
	if rec := staticAsk(files, "GET", "/young", "Range: bytes=0-1", "If-Range: "+tag); rec.Code != 200 {
		t.Errorf("If-Range with a weak tag: %d", rec.Code)
	}
	past := now.Add(-2 * time.Second)
	if err := os.Chtimes(filepath.Join(dir, "young"), past, past); err != nil {
		t.Fatal(err)
	}
	if tag := staticAsk(files, "GET", "/young").Header().Get("Etag"); !strings.HasPrefix(tag, `"`) {
		t.Errorf("tag two seconds later: %s", tag)
	}
}

func TestStaticFollowsAReplacedDirectory(t *testing.T) {
	base := t.TempDir()
	for _, release := range []string{"one", "two"} {
		staticWrite(t, filepath.Join(base, release), map[string]string{"a.txt": release, "only-" + release + ".txt": release})
	}
	current := filepath.Join(base, "current")
	turn := func(to string) {
		if err := os.Symlink(to, current+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(current+".new", current); err != nil {
			t.Fatal(err)
		}
	}
	turn("one")
	var log logBuffer
	files := staticServer(t, conduit.FileServerConfig{Dir: current, Recheck: 50 * time.Millisecond})
	url := serve(t, newServer(t, &conduit.Config{Handler: files, Logger: log.logger()}))
	client := newClient(t, &http.Transport{})
	for _, release := range []string{"one", "two", "one"} {
		turn(release)
		time.Sleep(60 * time.Millisecond)
		if got := get(t, client, url+"/a.txt"); got.body != release {
			t.Errorf("turned to %s: %d %q", release, got.status, got.body)
		}
		if got := get(t, client, url+"/only-"+release+".txt"); got.status != 200 {
			t.Errorf("a file of %s only: %d", release, got.status)
		}
	}

	if err := os.Rename(current, current+".away"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(60 * time.Millisecond)
	for range 3 {
		for _, name := range []string{"/a.txt", "/other.txt"} {
			if got := get(t, client, url+name); got.status != 404 {
				t.Errorf("%s of a missing directory: %d", name, got.status)
			}
		}
	}
	if lines := log.find("directory is missing"); len(lines) != 1 {
		t.Errorf("%d lines about the missing directory, want 1:\n%s", len(lines), log.String())
	}
	if err := os.Rename(current+".away", current); err != nil {
		t.Fatal(err)
	}
	if got := get(t, client, url+"/a.txt"); got.body != "one" {
		t.Errorf("the directory is back: %d %q", got.status, got.body)
	}
}

func TestStaticKeepsNoFilesOpen(t *testing.T) {
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("no /proc")
		}
		return len(entries)
	}
	before := fds()
	files := staticSizesServer(t)
	for range 20 {
		for _, size := range staticSizes {
			staticAsk(files, "GET", size.name)
			staticAsk(files, "GET", size.name, "Range: bytes=0-1,3-4")
			staticAsk(files, "GET", size.name+"?v=x")
			staticAsk(files, "GET", "/none")
		}
	}
	if n := fds(); n > before+1 {
		t.Errorf("%d descriptors, %d before, and one for the directory", n, before)
	}
	for range 2 {
		if err := files.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := fds(); n != before {
		t.Errorf("%d descriptors after Close, %d before", n, before)
	}
	for _, size := range staticSizes {
		if rec := staticAsk(files, "GET", size.name); rec.Code != 404 {
			t.Errorf("%s after Close: %d", size.name, rec.Code)
		}
	}
}

func TestStaticServesAndClosesSideBySide(t *testing.T) {
	dir := staticTree(t, map[string]string{"a.txt": "a", "b.js": string(staticText(3000))})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Recheck: time.Nanosecond, CacheBytes: 20000})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 200 {
				staticAsk(files, "GET", []string{"/a.txt", "/b.js", "/none", "/"}[(i+j)%4], "Accept-Encoding: gzip")
				files.URL("b.js")
			}
			files.Close()
		})
	}
	wg.Wait()
}

// staticSlow is a file that does not fit the buffers between here and a client
// on loopback.
const staticSlow = 24 << 20

func TestStaticSlowClients(t *testing.T) {
	dir := t.TempDir()
	file, err := os.Create(filepath.Join(dir, "large.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if err := file.Truncate(staticSlow); err != nil {
		t.Fatal(err)
	}
	file.Close()
	files := staticServer(t, conduit.FileServerConfig{Dir: dir})
	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(500*time.Millisecond))
	fast := conduit.FastTimeout(500 * time.Millisecond)
	eachProtocol(t, func(t *testing.T, p protocol) {
		var wg sync.WaitGroup
		for _, h := range []http.Handler{files, chain(files), fast(files)} {
			wg.Go(func() { staticSlowClient(t, p, h, 1<<20) })
		}
		if p.http1 { // the others see each piece, by flow control or by encrypting it
			wg.Go(func() { staticSlowClient(t, p, files, 80<<10) })
		}
		wg.Go(func() { staticStalledClient(t, p, chain(files)) })
		wg.Wait()
	})
}

// staticSlowClient takes a piece every 100 ms, for 5 seconds, and then the rest.
func staticSlowClient(t *testing.T, p protocol, h http.Handler, piece int) {
	url := p.serve(t, p.server(t, &conduit.Config{WriteTimeout: time.Second, Handler: h}))
	res, err := p.client(t).Get(url + "/large.bin")
	if err != nil {
		t.Error(err)
		return
	}
	defer res.Body.Close()
	start := time.Now()
	buf := make([]byte, piece)
	var n int
	for err == nil {
		var m int
		m, err = io.ReadFull(res.Body, buf)
		n += m
		if time.Since(start) < 5*time.Second {
			time.Sleep(100 * time.Millisecond)
		}
	}
	if took := time.Since(start); n != staticSlow || took < 2*time.Second {
		t.Errorf("%d bytes at a time: %d bytes of %d in %v: %v", piece, n, staticSlow, took, err)
	}
}

func staticStalledClient(t *testing.T, p protocol, h http.Handler) {
	ended := make(chan time.Duration, 1)
	url := p.serve(t, p.server(t, &conduit.Config{WriteTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		defer func() { ended <- time.Since(start) }()
		h.ServeHTTP(w, r)
	})}))
	res, err := p.client(t).Get(url + "/large.bin")
	if err != nil {
		t.Error(err)
		return
	}
	defer res.Body.Close()
	select {
	case took := <-ended:
		if took < 2*time.Second {
			t.Errorf("let go after %v, which is how long a live client may seem to stop", took)
		}
	case <-time.After(30 * time.Second):
		t.Error("not let go")
	}
}

// Over a pipe every byte that a client takes shows at once.
func TestStaticClientsThatStopAreLetGo(t *testing.T) {
	body := strings.Repeat("0123456789", 20000)
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		files := staticServer(t, conduit.FileServerConfig{FS: fstest.MapFS{"a.bin": {Data: []byte(body)}}})
		ended := make(chan time.Time, 1)
		srv := newServer(t, &conduit.Config{WriteTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer func() { ended <- time.Now() }()
			conduit.Timeout(5*time.Second)(files).ServeHTTP(w, r)
		})})
		serveBubble(t, srv, l)

		conn := l.dial()
		fmt.Fprint(conn, "GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
		start := time.Now()
		buf := make([]byte, 8<<10)
		var got bytes.Buffer
		for got.Len() < len(body) {
			n, err := conn.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				t.Fatalf("after %v and %d bytes: %v", time.Since(start), got.Len(), err)
			}
			time.Sleep(time.Second)
		}
		if took := time.Since(start); took < 20*time.Second || !strings.Contains(got.String(), body[:1000]) {
			t.Errorf("%d bytes in %v", got.Len(), took)
		}
		conn.Close()
		<-ended

		conn = l.dial()
		defer conn.Close()
		fmt.Fprint(conn, "GET /a.bin HTTP/1.1\r\nHost: x\r\n\r\n")
		conn.Read(buf)
		start = time.Now()
		if took := (<-ended).Sub(start); took != 10*time.Second {
			t.Errorf("let go after %v, want WriteTimeout", took)
		}
	})
}

// Without a WriteTimeout nobody resets the deadline that a file has moved.
func TestStaticLeavesNoDeadlineBehind(t *testing.T) {
	body := strings.Repeat("0123456789", 20000)
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		mux := http.NewServeMux()
		mux.Handle("/", staticServer(t, conduit.FileServerConfig{FS: fstest.MapFS{"a.bin": {Data: []byte(body)}}}))
		mux.HandleFunc("/late", func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(time.Minute)
			io.WriteString(w, "late")
		})
		serveBubble(t, newServer(t, &conduit.Config{WriteTimeout: -1, IdleTimeout: -1, Handler: mux}), l)
		client := l.client(t)
		if got := get(t, client, "http://x/a.bin"); got.body != body {
			t.Errorf("%d bytes", len(got.body))
		}
		if got := get(t, client, "http://x/late"); got.body != "late" {
			t.Errorf("%q", got.body)
		}
	})
}

func TestStaticAfterATimeoutWritesNothing(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	h := conduit.Timeout(20 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		files.ServeHTTP(w, r)
	}))
	if got := get(t, newClient(t, &http.Transport{}), serve(t, newServer(t, &conduit.Config{Handler: h}))+"/a.txt"); got.status != 503 {
		t.Errorf("%d %q", got.status, got.body)
	}
}

// A large file that changes on its way must not be taken for whole.
func TestStaticCutsAFileThatChangesOnItsWay(t *testing.T) {
	for _, change := range []struct {
		name string
		do   func(name string) error
	}{
		{"truncate", func(name string) error { return os.Truncate(name, 100) }},
		{"rewrite", func(name string) error { return os.WriteFile(name, make([]byte, staticSlow), 0o600) }},
	} {
		t.Run(change.name, func(t *testing.T) {
			dir := staticTree(t, map[string]string{"large.bin": ""})
			file := filepath.Join(dir, "large.bin")
			if err := os.Truncate(file, staticSlow); err != nil {
				t.Fatal(err)
			}
			os.Chtimes(file, staticTime, staticTime)
			var log logBuffer
			files := staticServer(t, conduit.FileServerConfig{Dir: dir})
			url := serve(t, newServer(t, &conduit.Config{Handler: conduit.Logging()(files), Logger: log.logger()}))
			res, err := newClient(t, &http.Transport{}).Get(url + "/large.bin")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if err := change.do(file); err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, res.Body); err == nil {
				t.Errorf("%d bytes without an error", n)
			}
			if line := log.request(t); line["aborted"] != true {
				t.Errorf("the log says %v", line)
			}
		})
	}
}

func TestStaticBehindStockServerAndForeignWrappers(t *testing.T) {
	files := staticSizesServer(t)
	srv := httptest.NewServer(foreign(conduit.Timeout(time.Minute)(foreign(files))))
	defer srv.Close()
	client := newClient(t, &http.Transport{DisableCompression: true})
	for _, size := range staticSizes {
		if got := get(t, client, srv.URL+size.name); got.status != 200 || got.body != size.body {
			t.Errorf("%s: %d, %d bytes", size.name, got.status, len(got.body))
		}
		req, _ := http.NewRequestWithContext(context.Background(), "GET", srv.URL+size.name, nil)
		req.Header.Set("Range", "bytes=3-5,7-8")
		if got := do(t, client, req); got.status != 206 || !strings.Contains(got.body, "\r\n\r\n345\r\n") {
			t.Errorf("%s: %d %q", size.name, got.status, got.body)
		}
	}
}

// Small files from memory, conditions and versions cost no allocation.
func TestStaticHitsDoNotAllocate(t *testing.T) {
	dir := staticTree(t, map[string]string{"a.txt": strings.Repeat("x", 4096)})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Recheck: -1})
	tag := staticAsk(files, "GET", "/a.txt").Header().Get("Etag")
	coded := staticAsk(files, "GET", "/a.txt", "Accept-Encoding: gzip").Header().Get("Etag")
	for name, r := range map[string]*http.Request{
		"hit":      httptest.NewRequest("GET", "/a.txt", nil),
		"head":     httptest.NewRequest("HEAD", "/a.txt", nil),
		"version":  httptest.NewRequest("GET", files.URL("a.txt"), nil),
		"gzip":     {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"Accept-Encoding": {"gzip, deflate, br"}}},
		"304":      {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"If-None-Match": {tag}}},
		"304 gzip": {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"If-None-Match": {coded}, "Accept-Encoding": {"gzip"}}},
	} {
		w := &staticDiscard{header: make(http.Header)}
		if n := testing.AllocsPerRun(100, func() {
			clear(w.header)
			files.ServeHTTP(w, r)
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
