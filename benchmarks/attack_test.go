package main

import (
	"testing"
	"time"
)

func TestAttackedTellsWhatIsLeft(t *testing.T) {
	asked := &others{took: []time.Duration{3 * time.Millisecond, time.Millisecond, 2 * time.Millisecond}, failed: 1}
	for _, c := range []struct {
		name   string
		result attacked
		want   string
	}{
		{"no attack", attacked{others: asked}, "- | - | - | 2.0 ms | 3.0 ms | 1 of 3"},
		{"all gone", attacked{n: 4, half: time.Second, all: 2 * time.Second, memory: 8 << 10, others: asked}, "1.0 s | none after 2.0 s | 2.0 KiB | 2.0 ms | 3.0 ms | 1 of 3"},
		{"some left", attacked{n: 4, left: 1, half: time.Second, memory: 8 << 10, others: &others{}}, "1.0 s | 1 | 2.0 KiB | - | - | 0 of 0"},
		{"all left", attacked{n: 4, left: 4, memory: 8 << 10, others: &others{}}, "more than 40s | 4 | 2.0 KiB | - | - | 0 of 0"},
	} {
		if got := c.result.String(); got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
