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
		// The page of the site links its files by their bare names, so they
		// are asked for again. What is linked through URL is kept all the same.
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
<p>A small JSON API. It keeps the newest 10,000 posts in memory.</p>
<dl>
<dt><a href="/api/posts">GET /api/posts</a></dt>
<dd>The posts, newest first: <code>?limit=</code> of them (1 to 100), those older than <code>?before=</code> an id.</dd>
<dt><a href="/api/posts/1">GET /api/posts/{id}</a></dt>
<dd>One post.</dd>
<dt><a href="/api/posts/stream">GET /api/posts/stream</a></dt>
<dd>All posts as they are found, in one array or, with <code>?format=ndjson</code>, one a line.</dd>
<dt><a href="/api/events">GET /api/events</a></dt>
<dd>New posts as they are made: server-sent events.</dd>
<dt><code>POST /api/posts</code></dt>
<dd>A new post, from a JSON object with a title and a body.</dd>
<dt><a href="/health">GET /health</a></dt>
<dd>Whether the service is well.</dd>
<dt><a href="/debug/pprof/live">GET /debug/pprof/live</a></dt>
<dd>The service at work, for whoever is on its machine.</dd>
<dt><a href="/static/">GET /static/</a></dt>
<dd>Files: a page on how long requests wait.</dd>
</dl>
<pre><code>curl localhost:8080/api/posts --json '{"title": "Hello"}'</code></pre>
<h2>The newest</h2>
<p id="state" role="status">Connecting.</p>
<ul id="newest" aria-live="polite"></ul>
</main>
</body>
</html>
`))

// pagePolicy lets the page have what comes from the service itself, and
// nothing else.
const pagePolicy = "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// newPage returns the page of the service. It is made once, for its files are
// embedded: their URLs stay the same as long as the service runs.
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
