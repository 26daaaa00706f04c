package main

import (
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// someResults has four routes: Conduit reaches its targets on text, on 304 as
// far as net/http lets it, and misses them on static. On JSON nothing says what
// the best router does.
func someResults() *results {
	var list []route
	for _, r := range routes() {
		if slices.Contains([]string{"text", "static", "not_modified", "json"}, r.name) {
			list = append(list, r)
		}
	}
	res := newResults(list, append(peers(), builtWith("go1.2.3", "")...))
	for i := range list {
		for p, costs := range map[string][]float64{
			"net_http":         {10, 30, 20},
			"conduit":          {10, 30, 20},
			"net_http@go1.2.3": {10, 30, 20},
			"conduit@go1.2.3":  {5, 15, 10},
			"chi":              {15, 60, 10}, // 1.5 in the median round, and 0.75 of the medians
			"ready":            {10, 30, 20},
		} {
			if p == "chi" && list[i].name == "json" || p == "ready" && list[i].name != "not_modified" {
				continue
			}
			if p == "chi" && list[i].name == "not_modified" {
				costs = []float64{20, 60, 40}
			}
			for _, cost := range costs {
				res.add(&list[i], &peer{name: p}, sample{cost: cost * 1e-6, rate: 1000})
			}
		}
	}
	return res
}

func TestTablesMarkWhatIsMissed(t *testing.T) {
	var text strings.Builder
	someResults().writeTables(&text)
	for _, want := range []string{
		"| JSON | 20.0 µs | 20.0 µs | 1.00 (≥ 0.98) | 2.00 | - | - | not all measured |\n",
		"| text | 20.0 µs | 20.0 µs | 1.00 (≥ 0.98) | 2.00 | 1.50 chi (≥ 0.97) | - | ok |\n",
		"| static 4 KB | 20.0 µs | 20.0 µs | 1.00 (≥ 1.50) | 2.00 | 1.50 chi (≥ 1.50) | - | **missed**: 1.00 of 1.50 to net/http by hand |\n",
		"| 304 | 20.0 µs | 20.0 µs | 1.00 (≥ 1.70) | 2.00 | 2.00 chi (≥ 1.70) | 1.00 ready bytes | ok: 1.00 of net/http's limit |\n",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("got\n%s\nwant in it\n%s", text.String(), want)
		}
	}
}

// TestPictureShowsEachRatio has a router that is 20 times as fast on text. It reads the picture as XML, as a browser does.
func TestPictureShowsEachRatio(t *testing.T) {
	res := someResults()
	for i := range res.routes {
		if res.routes[i].name == "text" {
			for range 3 {
				res.add(&res.routes[i], &peer{name: "gin"}, sample{cost: 1e-6})
			}
		}
	}
	file := filepath.Join(t.TempDir(), "ratios.svg")
	if err := res.writePicture(file); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Texts []struct {
			Class string `xml:"class,attr"`
			Text  string `xml:",chardata"`
		} `xml:"text"`
		Lines []struct {
			Class string `xml:"class,attr"`
			X     string `xml:"x1,attr"`
		} `xml:"line"`
		Long []struct {
			Class string `xml:"class,attr"`
		} `xml:"path"`
		Style string `xml:"style"`
	}
	if err := xml.Unmarshal(svg, &got); err != nil {
		t.Fatal(err)
	}
	var texts, limits []string
	for _, text := range got.Texts {
		texts = append(texts, text.Class+": "+text.Text)
	}
	for _, line := range got.Lines {
		if line.Class == "limit" {
			limits = append(limits, line.X)
		}
	}
	for _, want := range []string{": text", ": 304", "figure: 1.00", "figure: 0.67", "figure: 20"} {
		if !slices.Contains(texts, want) {
			t.Errorf("the picture has the texts %q, want %q among them", texts, want)
		}
	}
	if len(got.Long) != 1 || got.Long[0].Class != "router" {
		t.Errorf("these bars do not fit: %v, want that of a router", got.Long)
	}
	if want := fmt.Sprintf("%d.0", barsStart+unit); len(limits) != 2 || limits[1] != want {
		t.Errorf("limits at %q, want that of the legend and %s", limits, want)
	}
	if !strings.Contains(got.Style, "prefers-color-scheme: dark") {
		t.Error("the picture has no colours for a dark page")
	}
}

func TestFaultyFlags(t *testing.T) {
	for _, args := range [][]string{
		{"-rounds", "0"},
		{"-seconds", "0"},
		{"-seconds", "x"},
		{"-seconds", "NaN"},
		{"-routes", "("},
		{"-routes", "^none$"},
		{"-peers", "("},
		{"more"},
	} {
		var out, stderr strings.Builder
		if got := run(args, strings.NewReader(""), &out, &stderr); got != 2 || stderr.Len() == 0 || out.Len() > 0 {
			t.Errorf("%q: status %d, %q on stderr, %q on stdout, want 2 and a reason", args, got, stderr.String(), out.String())
		}
	}
}
