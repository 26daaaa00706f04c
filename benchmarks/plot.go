package main

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"os"
	"regexp"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The colours are such that they can be read on white and on black. Where a
// viewer knows of dark pages, the ink and the grid get those that suit better.
var (
	ink     = color.RGBA{0x6e, 0x77, 0x81, 0xff}
	grid    = color.RGBA{0xc8, 0xcc, 0xd2, 0xff}
	blue    = color.RGBA{0x2f, 0x81, 0xf7, 0xff}
	grey    = color.RGBA{0x8c, 0x95, 0x9f, 0xff}
	orange  = color.RGBA{0xd2, 0x82, 0x1e, 0xff}
	inDark  = map[color.RGBA]string{ink: "#c9d1d9", grid: "#30363d"}
	barSize = vg.Points(7)
)

// writePlot draws the ratios to net/http by hand, by route: those of Conduit,
// of the best of chi, echo and gin, and the targets.
func (res *results) writePlot(file string) error {
	var ours, routers plotter.Values
	var targets plotter.XYs
	var titles []string
	least, most := 0.5, 2.0
	for i := len(res.routes) - 1; i >= 0; i-- { // the first is to be at the top
		r := &res.routes[i]
		ratio, ok := res.ratio(r, "conduit", "net_http")
		if !ok {
			continue
		}
		best := 1.0 // no bar
		for _, name := range []string{"chi", "echo", "gin"} {
			if q, ok := res.ratio(r, name, "net_http"); ok && (best == 1 || q > best) {
				best = q
			}
		}
		for _, t := range r.targets {
			if t.against[0] == "net_http" {
				targets = append(targets, plotter.XY{X: math.Log2(t.atLeast), Y: float64(len(titles))})
				most = max(most, t.atLeast)
			}
		}
		ours = append(ours, math.Log2(ratio))
		routers = append(routers, math.Log2(best))
		titles = append(titles, r.title)
		least, most = min(least, ratio, best), max(most, ratio, best)
	}
	if len(ours) == 0 {
		return fmt.Errorf("no ratio of Conduit to net/http to draw")
	}
	p, err := newPlot(ours, routers, targets)
	if err != nil {
		return err
	}
	p.NominalY(titles...)
	p.X.Padding = 0
	p.X.Min, p.X.Max = math.Floor(math.Log2(least)), math.Ceil(math.Log2(most))
	p.X.Tick.Marker = powersOfTwo{}
	p.Y.Min, p.Y.Max = -0.7, float64(len(titles))-0.3
	return savePlot(p, file, vg.Points(100+24*float64(len(titles))))
}

func newPlot(ours, routers plotter.Values, targets plotter.XYs) (*plot.Plot, error) {
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
	p := plot.New()
	p.BackgroundColor = nil // that of the page
	p.Title.Text = "Requests per processor second, net/http by hand = 1: more is better"
	p.Title.Padding = vg.Points(10)
	for _, style := range []*draw.TextStyle{&p.Title.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Color = ink
	}
	for _, line := range []*draw.LineStyle{&p.X.LineStyle, &p.Y.LineStyle, &p.X.Tick.LineStyle, &p.Y.Tick.LineStyle} {
		line.Color = grid
	}
	p.Legend.Top = true
	p.Legend.Padding = vg.Points(3)

	lines := plotter.NewGrid()
	lines.Horizontal.Width = 0
	lines.Vertical = draw.LineStyle{Color: grid, Width: vg.Points(0.5)}
	p.Add(lines)
	for _, bars := range []struct {
		values plotter.Values
		color  color.Color
		offset vg.Length
		title  string
	}{
		{ours, blue, barSize / 2, "Conduit"},
		{routers, grey, -barSize / 2, "best of chi, echo, gin"},
	} {
		chart, err := plotter.NewBarChart(bars.values, barSize)
		if err != nil {
			return nil, err
		}
		chart.Horizontal = true
		chart.Color = bars.color
		chart.LineStyle.Width = 0
		chart.Offset = bars.offset
		p.Add(chart)
		p.Legend.Add(bars.title, chart)
	}
	if len(targets) > 0 {
		marks, err := plotter.NewScatter(targets)
		if err != nil {
			return nil, err
		}
		marks.GlyphStyle = draw.GlyphStyle{Color: orange, Radius: vg.Points(3.5), Shape: draw.PyramidGlyph{}}
		p.Add(marks)
		p.Legend.Add("Conduit's target", marks)
	}
	return p, nil
}

// powersOfTwo labels an axis of logarithms with what they are of.
type powersOfTwo struct{}

func (powersOfTwo) Ticks(low, high float64) []plot.Tick {
	var ticks []plot.Tick
	for e := math.Ceil(low); e <= high; e++ {
		label := fmt.Sprint(math.Exp2(e))
		if e < 0 {
			label = fmt.Sprint("1/", math.Exp2(-e))
		}
		ticks = append(ticks, plot.Tick{Value: e, Label: label})
	}
	return ticks
}

// savePlot writes p as SVG, with a style for dark pages.
func savePlot(p *plot.Plot, file string, height vg.Length) error {
	const margin = vg.Length(10)
	canvas := vgsvg.New(vg.Points(640), height)
	p.Draw(draw.Crop(draw.New(canvas), margin, -margin, margin, -margin))
	var buf bytes.Buffer
	if _, err := canvas.WriteTo(&buf); err != nil {
		return err
	}
	var style strings.Builder
	style.WriteString("<style>@media (prefers-color-scheme: dark) {")
	for light, dark := range inDark {
		hex := fmt.Sprintf("#%02X%02X%02X", light.R, light.G, light.B)
		fmt.Fprintf(&style, ` [style*="fill:%s"] { fill: %s !important; } [style*="stroke:%s"] { stroke: %[2]s !important; }`, hex, dark, hex)
	}
	style.WriteString(" }</style>\n")
	svg := regexp.MustCompile(`(?s)<svg[^>]*>\n?`).ReplaceAllStringFunc(buf.String(), func(tag string) string { return tag + style.String() })
	svg = strings.ReplaceAll(svg, "font-family:Liberation Sans", "font-family:'Liberation Sans',Helvetica,Arial,sans-serif")
	return os.WriteFile(file, []byte(svg), 0o644)
}
