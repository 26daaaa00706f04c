// This file starts promtool. It proves that it finds nothing to say of the
// statistics that Profiler serves to Prometheus, with those of a database's pool.

package conformance

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"strings"
	"testing"

	"example.com/conduit"
)

func TestPromtoolAcceptsTheStatistics(t *testing.T) {
	t.Parallel()
	promtool := program(t, "promtool")
	db := sql.OpenDB(noDatabase{})
	defer db.Close()
	text := fetch(t, newProfiles(t, &conduit.ProfilingConfig{DB: db})+"stats?format=prometheus")
	stdout, stderr, status := run(t, text, promtool, "check", "metrics")
	if status != 0 || stdout+stderr != "" {
		t.Errorf("promtool check metrics: exit status %d, want 0 and no word:\n%s%s\nof\n%s", status, stdout, stderr, text)
	}
	for _, want := range []string{"go_goroutines ", "go_gc_", "max_open"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// noDatabase has a pool and no connection.
type noDatabase struct{}

func (noDatabase) Connect(context.Context) (driver.Conn, error) { return nil, errors.New("on purpose") }
func (noDatabase) Driver() driver.Driver                        { return nil }
