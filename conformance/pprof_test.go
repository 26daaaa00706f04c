// This file starts go tool pprof and go tool trace. It proves that they read what
// Profiler serves, that what the process does is in it, and that they say why they
// get nothing.

package conformance

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"example.com/conduit"
)

func TestGoToolReadsProfiles(t *testing.T) {
	t.Parallel()
	gotool := program(t, "go")
	url := newProfiles(t, &conduit.ProfilingConfig{FlightRecorder: time.Minute})
	contend(t)
	kept := keep()
	defer runtime.KeepAlive(kept)
	tools := []string{"PPROF_TMPDIR=" + t.TempDir(), gotool, "tool"}
	for _, tt := range []struct {
		path   string
		status int
		want   []string
	}{
		{"profile?seconds=1", 0, []string{"Type: cpu", "conformance.contend"}},
		{"heap?gc=1", 0, []string{"Type: inuse_space", "conformance.keep"}},
		{"allocs", 0, []string{"Type: alloc_space", "conformance.keep"}},
		{"goroutine", 0, []string{"Type: goroutine", "conformance.contend"}},
		{"threadcreate", 0, []string{"Type: threadcreate"}},
		{"block?seconds=1", 0, []string{"Type: delay", "conformance.contend"}},
		{"mutex?seconds=1", 0, []string{"Type: delay", "conformance.contend"}},
		{"heap?seconds=3", 1, []string{"400 Bad Request - heap"}},
		{"profile?seconds=301", 1, []string{"400 Bad Request - seconds: 301"}},
		{"nothing", 1, []string{`404 Not Found - unknown profile "nothing"`}},
	} {
		args := append(tools, "pprof", "-top", "-nodecount=500", "-nodefraction=0", url+tt.path)
		stdout, stderr, status := run(t, nil, program(t, "env"), args...)
		if status != 0 {
			status = 1
		}
		for _, want := range tt.want {
			if status != tt.status || !strings.Contains(stdout+stderr, want) {
				t.Errorf("go tool pprof -top %s: exit status %d, want %d and %q in\n%s%s", tt.path, status, tt.status, want, stdout, stderr)
			}
		}
	}
	for _, path := range []string{"trace?seconds=1", "flight"} {
		file := filepath.Join(t.TempDir(), "trace")
		if err := os.WriteFile(file, fetch(t, url+path), 0o600); err != nil {
			t.Fatal(err)
		}
		stdout, stderr, status := run(t, nil, gotool, "tool", "trace", "-d=parsed", file)
		if status != 0 || !strings.Contains(stdout, "conformance.contend") {
			t.Errorf("go tool trace of %s: exit status %d, want 0 and conformance.contend in\n%.1000s%s", path, status, stdout, stderr)
		}
	}
}

// newProfiles serves the profiles of this process and returns their URL.
func newProfiles(t *testing.T, cfg *conduit.ProfilingConfig) string {
	t.Helper()
	p, err := conduit.NewProfiler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	mux := http.NewServeMux()
	p.Enable(mux)
	return serve(t, conduit.DefaultConfig(mux)).url + "/debug/pprof/"
}

// contend has goroutines work, and wait for each other, until the test ends.
func contend(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range 2 {
		workers.Go(func() {
			// A queue that never empties would hide from a rate that was turned on
			// later.
			for sleep(ctx, time.Millisecond) {
				mu.Lock()
				time.Sleep(time.Millisecond)
				mu.Unlock()
			}
		})
	}
	workers.Go(func() {
		for sleep(ctx, 4*time.Millisecond) {
			for end := time.Now().Add(time.Millisecond); time.Now().Before(end); {
				// It works.
			}
		}
	})
	t.Cleanup(func() {
		cancel()
		workers.Wait()
	})
}

// keep returns more than the heap profile can miss.
//
//go:noinline
func keep() []byte { return make([]byte, 8<<20) }

func fetch(t *testing.T, url string) []byte {
	t.Helper()
	status, body, _ := ask(t, url)
	if status != http.StatusOK {
		t.Fatalf("GET %s: status %d, %.200q", url, status, body)
	}
	return []byte(body)
}
