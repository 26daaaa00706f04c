package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// writeTables writes what was found as Markdown: Conduit and its targets, the
// ratios of all peers, and their rates.
func (res *results) writeTables(w io.Writer) {
	res.writeTargets(w)
	fmt.Fprint(w, "\nAll peers: requests per processor second of the server, as ratios to net/http by hand.\n\n")
	res.writePeers(w, func(r *route, p *peer) string {
		if ratio, ok := res.ratio(r, p.name, "net_http"); ok {
			return formatRatio(ratio)
		}
		return "-"
	})
	fmt.Fprint(w, "\nResponses or events per second, with the server on one processor. The client has the other one, and can be what limits them.\n\n")
	res.writePeers(w, func(r *route, p *peer) string {
		if rate, ok := res.rate(r, p.name); ok && rate > 0 {
			return fmt.Sprintf("%.0f", rate)
		}
		return "-"
	})
}

// writeTargets writes a row for each route with what Conduit is to reach.
func (res *results) writeTargets(w io.Writer) {
	also := res.also()
	header, line := "| route | net/http by hand | Conduit | ratio (target) |", "|---|---|---|---|"
	if also != "" {
		header, line = header+" with "+also+" |", line+"---|"
	}
	fmt.Fprintf(w, "%s to the best of chi, echo, gin (target) | others (target) | |\n%s---|---|---|\n", header, line)
	for i := range res.routes {
		r := &res.routes[i]
		ours, ok := res.cost(r, "conduit")
		if !ok {
			continue
		}
		byHand := "-"
		if cost, ok := res.cost(r, "net_http"); ok {
			byHand = r.formatCost(cost)
		}
		cells := []string{r.title, byHand, r.formatCost(ours), res.formatRatios(r, []target{{"conduit", []string{"net_http"}, 0}})}
		if also != "" {
			cells = append(cells, "-")
			if ratio, ok := res.ratio(r, "conduit@"+also, "net_http@"+also); ok {
				cells[len(cells)-1] = formatRatio(ratio)
			}
		}
		others := slices.DeleteFunc(slices.Clone(r.targets), func(t target) bool { return t.of == "conduit" })
		others = append(others, target{"conduit", []string{"ready"}, 0}, target{"conduit", []string{"go_sse"}, 0})
		cells = append(cells, res.formatRatios(r, []target{{"conduit", routers, 0}}), res.formatRatios(r, others), res.verdict(r))
		fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
	}
}

// also returns the other release of Go that Conduit was measured with, "" if
// there is none.
func (res *results) also() string {
	for _, p := range res.peers {
		if toolchain, ok := strings.CutPrefix(p.name, "conduit@"); ok {
			return toolchain
		}
	}
	return ""
}

// formatRatios returns the ratios that were measured of those in list, each with
// its target if r has one.
func (res *results) formatRatios(r *route, list []target) string {
	var texts []string
	for _, t := range list {
		ratio, best, ok := res.worst(r, t.of, t.against)
		if !ok {
			continue
		}
		text := formatRatio(ratio)
		switch {
		case best != "net_http":
			text += " " + res.title(best)
		case t.of != "conduit":
			text = res.title(t.of) + " " + text
		}
		for _, wanted := range r.targets {
			if wanted.of == t.of && slices.Equal(wanted.against, t.against) {
				text += fmt.Sprintf(" (≥ %s)", formatRatio(wanted.atLeast))
			}
		}
		texts = append(texts, text)
	}
	if len(texts) == 0 {
		return "-"
	}
	return strings.Join(texts, "; ")
}

// verdict says whether Conduit has reached what it should on r, and what not.
func (res *results) verdict(r *route) string {
	verdict := ""
	if len(r.targets) > 0 {
		verdict = "ok"
	}
	var missed []string
	for _, t := range r.targets {
		ratio, best, ok := res.worst(r, t.of, t.against)
		if !ok {
			verdict = "not all measured"
			continue
		}
		if reaches(ratio, t.atLeast) {
			continue
		}
		if limit, ok := res.ratio(r, t.of, "ready"); ok && reaches(limit, readyLimit) {
			verdict = "ok: " + formatRatio(limit) + " of net/http's limit"
			continue
		}
		missed = append(missed, fmt.Sprintf("%s of %s to %s", formatRatio(ratio), formatRatio(t.atLeast), res.title(best)))
	}
	if len(missed) > 0 {
		verdict = "**missed**: " + strings.Join(missed, ", ")
	}
	return verdict
}

// reaches compares as precisely as the table is.
func reaches(ratio, target float64) bool { return math.Round(100*ratio) >= math.Round(100*target) }

// writePeers writes a row for each route and a column for each peer.
func (res *results) writePeers(w io.Writer, cell func(*route, *peer) string) {
	header, line := "| route |", "|---|"
	for _, p := range res.peers {
		header += " " + p.title + " |"
		line += "---|"
	}
	fmt.Fprintf(w, "%s\n%s\n", header, line)
	for i := range res.routes {
		r := &res.routes[i]
		row := "| " + r.title + " |"
		for j := range res.peers {
			row += " " + cell(r, &res.peers[j]) + " |"
		}
		fmt.Fprintln(w, row)
	}
}

func (res *results) title(name string) string {
	for _, p := range res.peers {
		if p.name == name {
			return p.title
		}
	}
	return name
}

func (r *route) formatCost(cost float64) string {
	switch {
	case r.kind == connections:
		return fmt.Sprintf("%.1f KiB", cost/1024)
	case r.kind == fanOut:
		return fmt.Sprintf("%.2f µs an event", cost*1e6)
	case cost < 100e-6:
		return fmt.Sprintf("%.1f µs", cost*1e6)
	}
	return fmt.Sprintf("%.0f µs", cost*1e6)
}

func formatRatio(ratio float64) string {
	if ratio >= 20 {
		return fmt.Sprintf("%.0f", ratio)
	}
	if ratio >= 5 {
		return fmt.Sprintf("%.1f", ratio)
	}
	return fmt.Sprintf("%.2f", ratio)
}
