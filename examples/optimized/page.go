package main

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"strconv"

	"example.com/conduit"
)

//go:embed static
var embedded embed.FS

// newFiles returns what serves the embedded site below /static/.
func newFiles() (*conduit.FileServer, error) {
	site, err := fs.Sub(embedded, "static")
	if err != nil {
		return nil, err
	}
	return conduit.NewFileServerWith(&conduit.FileServerConfig{
		FS:     site,
		Prefix: "/static",
		// index.html links its files by their bare names, so browsers must
		// check them. Those linked through URL are kept all the same.
		CacheControl: "no-cache",
	})
}

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Posts</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="{{.URL "icon.svg"}}" type="image/svg+xml">
<link rel="stylesheet" href="{{.URL "style.css"}}">
<script type="module" src="{{.URL "posts.js"}}"></script>
</head>
<body>
<main>
<header>
<img src="{{.URL "icon.svg"}}" alt="">
<h1>Posts</h1>
</header>
<p>A small service on Conduit: a JSON API, and this page, which shows new posts as they are made. It keeps the newest 10,000 posts in memory: a restart forgets them.</p>
<form id="new">
<label>Title <input name="title" required maxlength="200" autocomplete="off"></label>
<label>Body <textarea name="body" rows="3" maxlength="10000"></textarea></label>
<p><button>Post</button> <span id="sent" role="status"></span></p>
</form>
<p>The same from a shell:</p>
<pre><code id="curl">curl <span class="origin">http://localhost:8080</span>/api/posts \
  -H 'Content-Type: application/json' \
  -d '{"title": "Hello"}'</code></pre>
<h2>Newest posts</h2>
<p id="state" role="status">Connecting.</p>
<ul id="newest" aria-live="polite" aria-busy="true"></ul>
<h2>Routes</h2>
<dl id="routes">
<dt><a href="/api/posts">GET /api/posts</a></dt>
<dd>The newest 20 posts. <code>?limit=50</code> returns 50, <code>?before=7</code> those before post 7.</dd>
<dt><a href="#new">POST /api/posts</a></dt>
<dd>A new post: a JSON object with a title and a body.</dd>
<dt><a id="one" href="/api/posts/1">GET /api/posts/{id}</a></dt>
<dd>One post.</dd>
<dt><a href="/api/posts/stream">GET /api/posts/stream</a></dt>
<dd>Every post, in one array. <code>?format=ndjson</code> puts one on a line.</dd>
<dt><a href="/api/events">GET /api/events</a></dt>
<dd>New posts as they are made, as server-sent events.</dd>
<dt><a href="/static/">GET /static/</a></dt>
<dd>Static files: a page on how long requests wait.</dd>
<dt><a href="/health">GET /health</a></dt>
<dd>For load balancers: whether the service is ready.</dd>
<dt><a href="/debug/pprof/live">GET /debug/pprof/live</a></dt>
<dd>Live charts of the service, for its own machine only.</dd>
<dt><a href="/debug/pprof/">GET /debug/pprof/</a></dt>
<dd>Profiles of the service, for its own machine only.</dd>
</dl>
</main>
</body>
</html>
`))

// pagePolicy lets the page load from the service itself, and from nowhere else.
const pagePolicy = "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// newPage returns the home page. It is made once: its files are embedded, so their
// URLs stay the same as long as the service runs.
func newPage(files *conduit.FileServer) http.Handler {
	var page bytes.Buffer
	if err := pageTemplate.Execute(&page, files); err != nil {
		panic(fmt.Sprintf("page: %v", err)) // the template is a constant
	}
	length := strconv.Itoa(page.Len())
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-cache")
		h.Set("Content-Length", length)
		h.Set("Content-Security-Policy", pagePolicy)
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("X-Content-Type-Options", "nosniff")
		w.Write(page.Bytes())
	})
}
