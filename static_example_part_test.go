package conduit_test

import (
	"fmt"
	"html/template"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing/fstest"

	"example.com/conduit"
)

// A directory at /static/. Register it at the prefix and do not strip that.
func ExampleNewFileServer() {
	dir, err := os.MkdirTemp("", "public")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "hello.txt"), []byte("hello\n"), 0o600); err != nil {
		log.Fatal(err)
	}

	files := conduit.NewFileServer(dir, "/static")
	defer files.Close()
	mux := http.NewServeMux()
	mux.Handle("/static/", files)

	srv := httptest.NewServer(mux)
	defer srv.Close()
	res, err := http.Get(srv.URL + "/static/hello.txt")
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	fmt.Print(string(body))
	fmt.Println(res.Header.Get("Content-Type"))
	fmt.Println(res.Header.Get("Cache-Control"))
	// Output:
	// hello
	// text/plain; charset=utf-8
	// public, max-age=31536000
}

// A single-page application in the binary. The map stands for the embed.FS that
// a service would have.
func ExampleNewFileServerWith() {
	site := fstest.MapFS{
		"index.html": {Data: []byte("<!doctype html><script src=app.js></script>")},
		"app.js":     {Data: []byte("render()")},
	}
	files, err := conduit.NewFileServerWith(&conduit.FileServerConfig{
		FS:       site,
		Fallback: "index.html", // /users/17 is a route of the application
	})
	if err != nil {
		log.Fatal(err)
	}
	defer files.Close()

	for _, path := range []string{"/app.js", "/users/17", "/missing.js"} {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Accept", "text/html")
		w := httptest.NewRecorder()
		files.ServeHTTP(w, r)
		fmt.Println(path, w.Code, w.Header().Get("Content-Type"))
	}
	// Output:
	// /app.js 200 text/javascript; charset=utf-8
	// /users/17 200 text/html; charset=utf-8
	// /missing.js 404 text/plain; charset=utf-8
}

// A page names its files with the hash of their content, so that browsers may
// keep them for ever and still see a new one at once.
func ExampleFileServer_URL() {
	files, err := conduit.NewFileServerWith(&conduit.FileServerConfig{
		FS:     fstest.MapFS{"app.js": {Data: []byte("render()")}},
		Prefix: "/static",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer files.Close()

	page := template.Must(template.New("page").Funcs(template.FuncMap{"static": files.URL}).Parse(
		`<script src="{{static "app.js"}}"></script>` + "\n"))
	if err := page.Execute(os.Stdout, nil); err != nil {
		log.Fatal(err)
	}

	w := httptest.NewRecorder()
	files.ServeHTTP(w, httptest.NewRequest("GET", files.URL("app.js"), nil))
	fmt.Println(w.Header().Get("Cache-Control"))
	// Output:
	// <script src="/static/app.js?v=MuEi4PRmqADeF7hg05ue"></script>
	// public, max-age=31536000, immutable
}
