package main

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestTallyTellsWhatBecameOfOrders(t *testing.T) {
	dir := t.TempDir()
	executed := make(map[int]int)
	for name, numbers := range map[string]string{"first": "1\n3\n5\n", "second": "2\n5\n"} {
		i := &instance{executed: filepath.Join(dir, name)}
		if err := os.WriteFile(i.executed, []byte(numbers), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := i.count(executed); err != nil {
			t.Fatal(err)
		}
	}
	o := &orders{last: 6, failures: map[int]string{3: "502", 4: "502"}}
	got := o.tally(executed)
	if got.sent != 6 || got.failed != 2 || got.failedExecuted != 1 || got.phantom != 1 || got.twice != 1 {
		t.Errorf("got %+v, want 6 sent, 2 failed, 1 of them executed, 1 answered without, 1 executed twice", *got)
	}
	if want := map[string]int{"502": 2}; !maps.Equal(got.reasons, want) {
		t.Errorf("reasons: got %v, want %v", got.reasons, want)
	}
}
