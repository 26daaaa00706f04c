package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"text/template"
)

// pictured are the routes that the picture shows, which fit on a page and say
// what each part is for.
var pictured = []string{"text", "chain", "chain_gzip", "gzip", "static", "not_modified", "script", "large", "stream", "sse"}

// The picture's measures, in pixels. Its scale ends at most; a longer bar ends in
// a point, and its figure says how long it is.
const (
	pictureWidth = 700
	labelsEnd    = 214
	barsStart    = 222
	unit         = 140 // the length of a ratio of 1
	most         = 3
	rowsStart    = 78
	rowHeight    = 38
	barHeight    = 13
)

// bar is a bar of the picture. Its figure is in its end, or beside it if it is
// short, so that no mark of a limit crosses it.
type bar struct {
	Class  string
	Y      int
	Length float64
	Long   bool // it does not fit
	Short  bool
	Figure string
}

// pictureRow is a route in the picture.
type pictureRow struct {
	Title string
	Y     int
	Bars  []bar
	Limit float64 // where the mark of net/http's limit is, 0 if there is none
}

// writePicture draws the ratios to net/http by hand as SVG: those of Conduit, of
// the best router and of the ready response.
func (res *results) writePicture(file string) error {
	var rows []pictureRow
	for i := range res.routes {
		r := &res.routes[i]
		ratio, ok := res.ratio(r, "conduit", "net_http")
		if !ok || !slices.Contains(pictured, r.name) {
			continue
		}
		row := pictureRow{Title: r.title, Y: rowsStart + rowHeight*len(rows)}
		row.Bars = append(row.Bars, newBar("conduit", row.Y, ratio))
		best := 0.0
		for _, router := range routers {
			if q, ok := res.ratio(r, router, "net_http"); ok {
				best = max(best, q)
			}
		}
		if best > 0 {
			row.Bars = append(row.Bars, newBar("router", row.Y+barHeight+1, best))
		}
		if limit, ok := res.ratio(r, "ready", "net_http"); ok && limit <= most {
			row.Limit = barsStart + limit*unit
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return errors.New("no ratio of Conduit to net/http to draw")
	}
	end := rowsStart + rowHeight*len(rows)
	var buf bytes.Buffer
	err := pictureTemplate.Execute(&buf, map[string]any{
		"Width": pictureWidth, "Height": end + 48, "LabelsEnd": labelsEnd, "Start": barsStart,
		"One": barsStart + unit, "Top": rowsStart - 8, "End": end, "Rows": rows, "BarHeight": barHeight,
		"Ticks": ticks(), "Middle": barsStart + most*unit/2,
	})
	if err != nil {
		return err
	}
	return os.WriteFile(file, buf.Bytes(), 0o644)
}

func newBar(class string, y int, ratio float64) bar {
	return bar{Class: class, Y: y, Length: min(ratio, most) * unit, Long: ratio > most, Short: ratio < 0.3, Figure: formatRatio(ratio)}
}

type tick struct {
	X     int
	Label string
}

func ticks() []tick {
	var list []tick
	for half := range 2*most + 1 {
		list = append(list, tick{barsStart + half*unit/2, fmt.Sprint(float64(half) / 2)})
	}
	return list
}

// Labels are aligned by text-anchor, so that the browser's font makes no
// difference. The colours can be read on white and on black.
var pictureTemplate = template.Must(template.New("picture").Funcs(template.FuncMap{
	"add": func(a int, b ...float64) float64 {
		sum := float64(a)
		for _, n := range b {
			sum += n
		}
		return sum
	},
	"half": func(n int) float64 { return float64(n) / 2 },
}).Parse(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{.Width}} {{.Height}}" width="{{.Width}}" role="img" aria-label="Requests per processor second by route, net/http by hand is 1">
<style>
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px }
.small { font-size: 11.5px; fill: #57606a }
.conduit { fill: #1f6feb } .router { fill: #6e7781 }
.figure { font-size: 11px; font-weight: 600; fill: #fff }
.limit { stroke: #d2821e; stroke-width: 2 }
.grid { stroke: #d8dee4 } .one { stroke: #57606a; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9da7b1 } .grid { stroke: #30363d } .one { stroke: #9da7b1 }
}
</style>
<text class="title" x="12" y="20">Requests per processor second</text>
<rect class="conduit" x="12" y="34" width="13" height="13"/><text x="30" y="45">Conduit</text>
<rect class="router" x="104" y="34" width="13" height="13"/><text x="122" y="45">best of chi, echo, gin</text>
<line class="limit" x1="285" y1="33" x2="285" y2="48"/><text x="294" y="45">limit of net/http: ready bytes, no router</text>
{{range .Ticks}}<line class="grid" x1="{{.X}}" y1="{{$.Top}}" x2="{{.X}}" y2="{{$.End}}"/><text class="small" text-anchor="middle" x="{{.X}}" y="{{add $.End 16}}">{{.Label}}</text>
{{end}}<line class="one" x1="{{.One}}" y1="{{.Top}}" x2="{{.One}}" y2="{{.End}}"/>
<text class="small" text-anchor="middle" x="{{.Middle}}" y="{{add .End 36}}">times as many as net/http by hand, which is 1</text>
{{range .Rows}}<text text-anchor="end" x="{{$.LabelsEnd}}" y="{{add .Y 18}}">{{.Title}}</text>
{{range .Bars}}{{if .Long}}<path class="{{.Class}}" d="M{{$.Start}} {{.Y}}h{{.Length}}l9 {{half $.BarHeight}}l-9 {{half $.BarHeight}}h-{{.Length}}z"/>{{else}}<rect class="{{.Class}}" x="{{$.Start}}" y="{{.Y}}" width="{{printf "%.1f" .Length}}" height="{{$.BarHeight}}"/>{{end}}
{{if .Short}}<text class="small" x="{{printf "%.1f" (add $.Start .Length 4)}}" y="{{add .Y 11}}">{{.Figure}}</text>
{{else}}<text class="figure" text-anchor="end" x="{{printf "%.1f" (add $.Start .Length -4)}}" y="{{add .Y 11}}">{{.Figure}}</text>
{{end}}{{end}}{{if .Limit}}<line class="limit" x1="{{printf "%.1f" .Limit}}" y1="{{add .Y -2}}" x2="{{printf "%.1f" .Limit}}" y2="{{add .Y 29}}"/>
{{end}}{{end}}</svg>
`))
