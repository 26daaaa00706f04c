package main

import (
	"slices"
)

// results are the samples of all rounds, by route and peer.
type results struct {
	routes  []route
	peers   []peer
	samples map[string]map[string][]sample
}

func newResults(routes []route, peers []peer) *results {
	res := &results{routes: routes, peers: peers, samples: make(map[string]map[string][]sample)}
	for _, r := range routes {
		res.samples[r.name] = make(map[string][]sample)
	}
	return res
}

func (res *results) add(r *route, p *peer, s sample) {
	res.samples[r.name][p.name] = append(res.samples[r.name][p.name], s)
}

// cost returns the median of what p costs on r.
func (res *results) cost(r *route, peer string) (float64, bool) {
	return res.median(r, peer, func(s sample) float64 { return s.cost })
}

// rate returns the median of how many responses or events p gave in a second.
func (res *results) rate(r *route, peer string) (float64, bool) {
	return res.median(r, peer, func(s sample) float64 { return s.rate })
}

func (res *results) median(r *route, peer string, of func(sample) float64) (float64, bool) {
	var values []float64
	for _, s := range res.samples[r.name][peer] {
		values = append(values, of(s))
	}
	return median(values)
}

// ratio returns how many responses peer gives for the same processor time in
// which against gives one: the median over the rounds, each of which compares
// what was measured one after the other.
func (res *results) ratio(r *route, peer, against string) (float64, bool) {
	ours, theirs := res.samples[r.name][peer], res.samples[r.name][against]
	var ratios []float64
	for i := range min(len(ours), len(theirs)) {
		ratios = append(ratios, theirs[i].cost/ours[i].cost)
	}
	return median(ratios)
}

// worst returns the least ratio of peer to those of against: that to the best
// of them, and its name.
func (res *results) worst(r *route, peer string, against []string) (ratio float64, best string, ok bool) {
	for _, other := range against {
		if q, there := res.ratio(r, peer, other); there && (!ok || q < ratio) {
			ratio, best, ok = q, other, true
		}
	}
	return ratio, best, ok
}

func median(values []float64) (float64, bool) {
	n := len(values)
	if n == 0 {
		return 0, false
	}
	values = slices.Sorted(slices.Values(values))
	return (values[(n-1)/2] + values[n/2]) / 2, true
}
