package main

import (
	"crypto/sha256"
	"encoding/base64"
	"io"
	"net/http"
)

const pageStyle = `
:root { color-scheme: light dark; }
body { max-width: 42rem; margin: 0 auto; padding: 1.5rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
dt { margin-top: 1rem; font-family: ui-monospace, monospace; }
dd { margin: 0; }
pre { white-space: pre-wrap; padding: .75rem; border: 1px solid; border-radius: .25rem; }
`

const page = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Posts</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>` + pageStyle + `</style>
</head>
<body>
<main>
<h1>Posts</h1>
<p>A small JSON API. It keeps the newest 10,000 posts in memory.</p>
<dl>
<dt><a href="/api/posts">GET /api/posts</a></dt>
<dd>The posts, newest first: <code>?limit=</code> of them (1 to 100), those older than <code>?before=</code> an id.</dd>
<dt><a href="/api/posts/1">GET /api/posts/{id}</a></dt>
<dd>One post.</dd>
<dt>POST /api/posts</dt>
<dd>A new post, from a JSON object with a title and a body.</dd>
<dt><a href="/health">GET /health</a></dt>
<dd>Whether the service is well.</dd>
</dl>
<pre><code>curl localhost:8080/api/posts --json '{"title": "Hello"}'</code></pre>
</main>
</body>
</html>
`

// pagePolicy lets the page have its own style and the empty icon, which keeps
// browsers from asking for another, and nothing else.
var pagePolicy = func() string {
	sum := sha256.Sum256([]byte(pageStyle))
	return "default-src 'none'; img-src data:; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}()

func servePage(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	io.WriteString(w, page)
}
