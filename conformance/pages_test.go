// This file starts the examples optimized and database, the latter on SQLite, and
// Chromium, with nginx in between. It proves that their page shows posts as they are
// made, as text, that it shows those that were made while its connection was lost,
// few or more than are kept, and that it comes back by itself after a restart behind
// nginx, whose 502 ends an EventSource for good.

package conformance

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
)

// example is one of the examples, built.
type example struct {
	t       *testing.T
	address string
	args    []string
}

// eachExample runs a test with each of these, in parallel.
func eachExample(t *testing.T, names []string, test func(t *testing.T, e *example)) {
	t.Parallel()
	gotool := program(t, "go")
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := filepath.Abs("../examples/" + name)
			if err != nil {
				t.Fatal(err)
			}
			binary := filepath.Join(t.TempDir(), name)
			if _, stderr, status := run(t, nil, gotool, "build", "-C", dir, "-o", binary, "."); status != 0 {
				t.Fatalf("go build: exit status %d\n%s", status, stderr)
			}
			e := &example{t: t, address: freeAddress(t)}
			e.args = []string{binary, "-addr", e.address}
			if name == "database" {
				e.args = append(e.args, "-db", filepath.Join(t.TempDir(), "posts.db"))
			}
			test(t, e)
		})
	}
}

func (e *example) start() (stop func()) {
	e.t.Helper()
	return startServer(e.t, e.address, e.args...)
}

// post makes a post, past nginx.
func (e *example) post(title string) {
	e.t.Helper()
	resp, err := http.Post("http://"+e.address+"/api/posts", "application/json", strings.NewReader(fmt.Sprintf(`{"title":%q}`, title)))
	if err != nil {
		e.t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		e.t.Fatalf("POST /api/posts: status %d, want 201", resp.StatusCode)
	}
}

func (e *example) proxy(log string) string {
	return `server { listen ADDRESS; access_log ` + log + `; location / { proxy_pass http://` + e.address + `; } }`
}

// openPage opens the page and waits until it says that it is connected.
func openPage(t *testing.T, address string) *tab {
	t.Helper()
	tab := newTab(t, "http://"+address)
	eventually(t, "the page is connected", func() bool {
		return evaluate[string](t, tab, `document.querySelector("#state").textContent`) == "New posts appear as they are made."
	})
	return tab
}

// shows waits until the page shows these posts above all others.
func shows(t *testing.T, tab *tab, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the page shows %q", want), func() bool {
		got := evaluate[[]string](t, tab, `[...document.querySelectorAll("#newest > li")].map((li) => li.innerText.trim())`)
		return len(got) >= len(want) && slices.Equal(got[:len(want)], want)
	})
}

func TestPageShowsWhatItMissed(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		e.start()
		for _, tt := range []struct {
			name   string
			post   string   // before the connection is lost
			seen   []string // then
			missed int
			want   []string
		}{
			{"before the first event", "", nil, 1, []string{"missed 1"}},
			{"a few", "seen", []string{"seen", "missed 1"}, 2, []string{"missed 2", "missed 1", "seen", "missed 1"}},
			{"more than are kept", "seen again", []string{"seen again"}, 300, []string{"missed 300", "missed 299", "missed 298", "missed 297", "missed 296"}},
		} {
			t.Run(tt.name, func(t *testing.T) {
				nginx, config := freeAddress(t), e.proxy("off")
				stop := startNginxOn(t, nginx, config)
				tab := openPage(t, nginx)
				if tt.post != "" {
					e.post(tt.post)
				}
				shows(t, tab, tt.seen...)
				stop()
				for i := range tt.missed {
					e.post(fmt.Sprint("missed ", i+1))
				}
				startNginxOn(t, nginx, config)
				shows(t, tab, tt.want...)
			})
		}
	})
}

func TestPageComesBackAfterARestartBehindNginx(t *testing.T) {
	eachExample(t, []string{"optimized", "database"}, func(t *testing.T, e *example) {
		stop := e.start()
		log := filepath.Join(t.TempDir(), "log")
		tab := openPage(t, startNginx(t, e.proxy(log)))
		e.post("before")
		stop()
		eventually(t, "nginx has responded with 502", func() bool {
			text, _ := os.ReadFile(log)
			return strings.Contains(string(text), `" 502 `)
		})
		e.start()
		e.post("after")
		shows(t, tab, "after")
	})
}

func TestPageSendsPosts(t *testing.T) {
	eachExample(t, []string{"database"}, func(t *testing.T, e *example) {
		e.start()
		one, other := openPage(t, e.address), openPage(t, e.address)
		send := func(title, body string) {
			t.Helper()
			one.do(t,
				chromedp.SendKeys(chromedp.CSS("input[name=title]"), title),
				chromedp.SendKeys(chromedp.CSS("textarea[name=body]"), body),
				chromedp.Click(chromedp.CSS("#new button")),
			)
		}
		send("first", "<b>not bold</b>")
		shows(t, one, "first <b>not bold</b>")
		shows(t, other, "first <b>not bold</b>")
		send("   ", "")
		eventually(t, "the page says what the service refuses", func() bool {
			return strings.Contains(evaluate[string](t, one, `document.querySelector("#sent").textContent`), "the title must have")
		})
	})
}
