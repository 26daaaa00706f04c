package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// someResults has three routes: Conduit reaches its targets on text and misses
// them on static, and on json nothing says what the best router does.
func someResults() *results {
	var list []route
	for _, r := range routes() {
		if r.name == "text" || r.name == "static" || r.name == "json" {
			list = append(list, r)
		}
	}
	res := newResults(list, peers())
	for i := range list {
		for p, costs := range map[string][]float64{
			"net_http": {10, 30, 20},
			"conduit":  {10, 30, 20},
			"chi":      {15, 60, 10}, // 1.5 in the median round, and 0.75 of the medians
		} {
			if p == "chi" && list[i].name == "json" {
				continue
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
		"| JSON | 20.0 µs | 20.0 µs | 1.00 (≥ 0.97) | - |  | not all measured |\n",
		"| text | 20.0 µs | 20.0 µs | 1.00 (≥ 0.97) | 1.50 chi (≥ 0.97) |  | ok |\n",
		"| static 4 KB | 20.0 µs | 20.0 µs | 1.00 (≥ 1.50) | 1.50 chi (≥ 2.00) |  | **missed**: 1.00 of 1.50 to net/http by hand, 1.50 of 2.00 to chi |\n",
	} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("got\n%s\nwant in it\n%s", text.String(), want)
		}
	}
}

func TestPictureIsReadableInTheDark(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ratios.svg")
	if err := someResults().writePlot(file); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<svg", "prefers-color-scheme: dark", ">static 4 KB<", ">Conduit<"} {
		if !strings.Contains(string(svg), want) {
			t.Errorf("%q is not in the picture", want)
		}
	}
	if strings.Contains(strings.ToLower(string(svg)), "fill:#000000") {
		t.Error("something is black, which a dark page hides")
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
