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
	fmt.Fprint(w, "\nReplies or events per second, with the server on one processor. The client has the other one, and can be what limits them.\n\n")
	res.writePeers(w, func(r *route, p *peer) string {
		if rate, ok := res.rate(r, p.name); ok && rate > 0 {
			return fmt.Sprintf("%.0f", rate)
		}
		return "-"
	})
}

// writeTargets writes a row for each route with what Conduit is to reach.
func (res *results) writeTargets(w io.Writer) {
	fmt.Fprint(w, "| route | net/http by hand | Conduit | ratio (target) | to the best of chi, echo, gin (target) | others (target) | |\n")
	fmt.Fprint(w, "|---|---|---|---|---|---|---|\n")
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
		cells := []string{
			res.formatAgainst(r, []string{"net_http"}),
			res.formatAgainst(r, []string{"chi", "echo", "gin"}),
			strings.Trim(res.formatAgainst(r, []string{"ready"})+"; "+res.formatAgainst(r, []string{"go_sse"}), "-; "),
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", r.title, byHand, r.formatCost(ours), strings.Join(cells, " | "), res.verdict(r))
	}
}

// formatAgainst returns Conduit's ratio to the best of against, and the target
// if there is one.
func (res *results) formatAgainst(r *route, against []string) string {
	ratio, best, ok := res.worst(r, "conduit", against)
	if !ok {
		return "-"
	}
	text := formatRatio(ratio)
	if len(against) > 1 || best != "net_http" {
		text += " " + res.title(best)
	}
	for _, t := range r.targets {
		if slices.Equal(t.against, against) {
			text += fmt.Sprintf(" (≥ %s)", formatRatio(t.atLeast))
		}
	}
	return text
}

// verdict says whether Conduit has reached what it should on r, and what not.
func (res *results) verdict(r *route) string {
	verdict := ""
	if len(r.targets) > 0 {
		verdict = "ok"
	}
	var missed []string
	for _, t := range r.targets {
		ratio, best, ok := res.worst(r, "conduit", t.against)
		if !ok {
			verdict = "not all measured"
			continue
		}
		// As precise as the table is.
		if math.Round(100*ratio) < math.Round(100*t.atLeast) {
			missed = append(missed, fmt.Sprintf("%s of %s to %s", formatRatio(ratio), formatRatio(t.atLeast), res.title(best)))
		}
	}
	if len(missed) > 0 {
		verdict = "**missed**: " + strings.Join(missed, ", ")
	}
	return verdict
}

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
