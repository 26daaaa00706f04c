// This file starts node with npm's eventsource, which it installs. It proves that
// this client sees every event once and in order, over HTTP/1.1 and behind nginx,
// comes back with the last ID after a drain and after an abort, as soon as it is told
// to, and sees the gap after a restart that has forgotten the events.

package conformance

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"sync"
	"testing"
)

const (
	nodePackage = "eventsource@3.0.7" // for node 18 and later
	nodeScript  = `
		const { EventSource } = require("eventsource");
		const events = new EventSource(process.argv[1]);
		for (const type of ["message", "tick", "gap"]) {
			events.addEventListener(type, (event) => console.log(JSON.stringify([event.type, event.data])));
		}`
)

func TestNodeFollowsEvents(t *testing.T) {
	t.Parallel()
	node, npm := program(t, "node"), program(t, "npm")
	dir := t.TempDir()
	if _, stderr, status := run(t, nil, npm, "install", "--prefix", dir, "--ignore-scripts", "--no-audit", "--no-fund", nodePackage); status != 0 {
		t.Fatalf("npm install %s: exit status %d, %s", nodePackage, status, stderr)
	}
	for _, way := range []struct {
		name  string
		nginx bool
		proto string
	}{
		{"HTTP/1.1", false, "HTTP/1.1"},
		{"nginx", true, "HTTP/1.0"},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			f := newFeed(t, nil, "")
			url := f.server.url
			if way.nginx {
				url = "http://" + startNginx(t, `server { listen ADDRESS; location / { proxy_pass `+url+`; } }`)
			}
			cmd := exec.Command(node, "-e", nodeScript, url+"/events")
			cmd.Dir = dir
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var saw transcript
			var reading sync.WaitGroup
			t.Cleanup(reading.Wait) // until node has ended
			start(t, cmd)
			reading.Go(func() {
				for lines := bufio.NewScanner(out); lines.Scan(); {
					var event [2]string
					if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
						t.Errorf("node has printed %q", lines.Text())
						return
					}
					saw.add(event[0], event[1])
				}
			})
			f.live(t, way.proto, saw.seen)
		})
	}
}
