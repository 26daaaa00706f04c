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

// newFiles returns what serves the embedded files below /static/.
func newFiles() (*conduit.FileServer, error) {
	site, err := fs.Sub(embedded, "static")
	if err != nil {
		return nil, err
	}
	return conduit.NewFileServerWith(&conduit.FileServerConfig{FS: site, Prefix: "/static"})
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
<form id="new">
<label>Title <input name="title" required maxlength="200" autocomplete="off"></label>
<label>Body <textarea name="body" rows="3" maxlength="10000"></textarea></label>
<p><button>Post</button> <span id="sent" role="status"></span></p>
</form>
<h2>The newest</h2>
<p id="state" role="status">Connecting.</p>
<ul id="newest" aria-live="polite"></ul>
<h2>The API</h2>
<dl>
<dt><a href="/api/posts">GET /api/posts</a></dt>
<dd>The posts, newest first: <code>?limit=</code> of them (1 to 100), those older than <code>?before=</code> an id.</dd>
<dt><code>GET /api/posts/{id}</code></dt>
<dd>One post.</dd>
<dt><a href="/api/posts/stream">GET /api/posts/stream</a></dt>
<dd>All posts as they are found, in one array or, with <code>?format=ndjson</code>, one a line.</dd>
<dt><a href="/api/events">GET /api/events</a></dt>
<dd>New posts as they are made, by any instance: server-sent events.</dd>
<dt><code>POST /api/posts</code></dt>
<dd>A new post, from a JSON object with a title and a body.</dd>
<dt><a href="/health">GET /health</a></dt>
<dd>Whether the service and its database are well.</dd>
<dt><a href="/debug/pprof/live">GET /debug/pprof/live</a></dt>
<dd>The service and its pool at work, for whoever is on its machine.</dd>
</dl>
<pre><code>curl localhost:8080/api/posts --json '{"title": "Hello"}'</code></pre>
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
