package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"html/template"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// BenchmarkLevels is each level of compress/gzip on what services send: how
// long it takes and how many bytes are left. The default of
// CompressionConfig.Level follows from it. To compare two releases of Go:
//
//	GOMAXPROCS=1 GOTOOLCHAIN=go1.26.8 go test -run '^$' -bench Levels
//	GOMAXPROCS=1 GOTOOLCHAIN=go1.27.3 go test -run '^$' -bench Levels
func BenchmarkLevels(b *testing.B) {
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	// Scripts of Go's own tools, as large as one could wish.
	script, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(root)), "src/internal/trace/traceviewer/static/trace_viewer_full.html"))
	if err != nil {
		b.Fatal(err)
	}
	for _, kind := range []struct {
		name string
		text []byte
	}{
		{"json", document(500e3)},
		{"html", page(500e3)},
		{"script", script},
	} {
		for _, size := range []int{4, 40, 400} {
			text := kind.text[:size*1000]
			for level := gzip.BestSpeed; level <= gzip.BestCompression; level++ {
				b.Run(fmt.Sprintf("kind=%s/kilobytes=%d/level=%d", kind.name, size, level), func(b *testing.B) {
					var left counter
					z, err := gzip.NewWriterLevel(&left, level)
					if err != nil {
						b.Fatal(err)
					}
					for b.Loop() {
						left.n = 0
						z.Reset(&left)
						z.Write(text)
						if err := z.Close(); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric(float64(left.n), "bytes")
				})
			}
		}
	}
}

// page returns a page of at least size bytes with a list, as a service would
// make it of what document returns.
func page(size int) []byte {
	var items []item
	if err := json.Unmarshal(document(size/2), &items); err != nil {
		panic(err)
	}
	var buf bytes.Buffer
	err := template.Must(template.New("").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Items</title><link rel="stylesheet" href="/static/style.css"></head>
<body><header><nav><a href="/">Home</a> <a href="/items">Items</a> <a href="/orders">Orders</a></nav></header>
<main><h1>Items</h1>
{{range .}}<article class="item" id="item-{{.ID}}">
  <h2><a href="/items/{{.ID}}">{{.Name}}</a></h2>
  <p class="price">{{.Price}}</p>
  <ul class="tags">{{range .Tags}}<li>{{.}}</li>{{end}}</ul>
  <button type="button" data-id="{{.ID}}">Add to basket</button>
</article>
{{end}}</main></body></html>
`)).Execute(&buf, items)
	if err != nil {
		panic(err)
	}
	return buf.Bytes()
}
