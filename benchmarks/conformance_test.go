package main

import (
	"maps"
	"net/url"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
)

// TestHTTP2IsThatOfNetHTTP runs h2spec against a server of Conduit's with the
// whole chain. It fails what net/http fails, and nothing else.
func TestHTTP2IsThatOfNetHTTP(t *testing.T) {
	theirs, _ := conformance(t, "net_http")
	ours, c := conformance(t, "conduit")
	t.Logf("of %d cases net/http fails %d: %q", len(theirs), len(failures(theirs)), failures(theirs))
	if len(ours) < 140 || len(ours) != len(theirs) {
		t.Errorf("%d cases, and %d for net/http; want at least 140, and as many", len(ours), len(theirs))
	}
	for _, name := range failures(ours) {
		// A few cases race against the reply, and lose if that is quick.
		for i := 0; i < 10 && ours[name].Result.Failed && !theirs[name].Result.Failed; i++ {
			if err := ours[name].Test(c, 0); err != nil {
				t.Fatal(err)
			}
		}
		if ours[name].Result.Failed && !theirs[name].Result.Failed {
			t.Errorf("Conduit fails %s: %v", name, ours[name].Result.Error)
		}
	}
}

// conformance returns the cases that were run against a peer.
func conformance(t *testing.T, name string) (map[string]*spec.TestCase, *config.Config) {
	t.Helper()
	i := slices.IndexFunc(peers(), func(p peer) bool { return p.name == name })
	_, _, secure := startPeer(t, &peers()[i])
	u, err := url.Parse(secure)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	c := &config.Config{Host: u.Hostname(), Port: port, Path: "/chain", TLS: true, Insecure: true, Timeout: 2 * time.Second, MaxHeaderLen: 4000}
	cases := make(map[string]*spec.TestCase)
	var collect func(g *spec.TestGroup)
	collect = func(g *spec.TestGroup) {
		for i, test := range g.Tests {
			if test.Result != nil { // or it is not part of the run
				cases[g.ID()+"/"+strconv.Itoa(i+1)+" "+test.Desc] = test
			}
		}
		for _, g := range g.Groups {
			collect(g)
		}
	}
	for _, g := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		g.Test(c)
		collect(g)
	}
	return cases, c
}

func failures(cases map[string]*spec.TestCase) []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(cases)) {
		if cases[name].Result.Failed || cases[name].Result.Skipped {
			names = append(names, name)
		}
	}
	return names
}
