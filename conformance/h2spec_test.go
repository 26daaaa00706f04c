// This file starts h2spec. It proves that Conduit's HTTP/2, behind a whole chain of
// middleware, fails those of its cases that net/http fails, and no other.

package conformance

import (
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"

	"example.com/conduit"
)

func TestHTTP2IsThatOfNetHTTP(t *testing.T) {
	t.Parallel()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello\n") })
	bare := httptest.NewUnstartedServer(handler)
	bare.EnableHTTP2 = true
	bare.StartTLS()
	defer bare.Close()
	cfg := conduit.DefaultConfig(conduit.Chain(
		conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(30*time.Second), conduit.Compression(),
	)(handler))
	cfg.TLSConfig = testTLS()

	theirs, _ := h2spec(t, bare.Listener.Addr().String())
	ours, c := h2spec(t, serve(t, cfg).address)
	t.Logf("of %d cases net/http fails %d: %q", len(theirs), len(failures(theirs)), failures(theirs))
	if len(ours) < 140 || len(ours) != len(theirs) {
		t.Errorf("%d cases, and %d for net/http; want at least 140, and as many", len(ours), len(theirs))
	}
	for _, name := range failures(ours) {
		// A few cases race against the response, and lose if that is quick.
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

// h2spec returns the cases that were run against a server.
func h2spec(t *testing.T, address string) (map[string]*spec.TestCase, *config.Config) {
	t.Helper()
	host, digits, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(digits)
	if err != nil {
		t.Fatal(err)
	}
	c := &config.Config{Host: host, Port: port, Path: "/", TLS: true, Insecure: true, Timeout: 2 * time.Second, MaxHeaderLen: 4000}
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
