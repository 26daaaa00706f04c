package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// Two pages of two instances on one Postgres: what is sent from one is shown by
// both.
func TestPagesOfTwoInstancesShowTheSamePosts(t *testing.T) {
	s := service{url: newDatabase(t), replay: 256}
	a, b := start(t, s), start(t, s)
	browser := newBrowser(t)
	atA, atB := browser.open(t, a.url), browser.open(t, b.url)

	atA.send(t, "From A", "<b>not bold</b>")
	atA.shows(t, "From A")
	atB.shows(t, "From A")
	atB.send(t, "From B", "")
	atA.shows(t, "From B")
	atB.shows(t, "From B")
	for name, tab := range map[string]*tab{"a": atA, "b": atB} {
		want := "From B\nFrom A <b>not bold</b>"
		if got := tab.list(t); got != want {
			t.Errorf("page at %s: %q, want %q", name, got, want)
		}
	}

	// What the service refuses, the page says.
	atA.send(t, "   ", "")
	atA.waitFor(t, `//*[@id="sent"][contains(., "the title must have")]`)
}

// A load balancer takes a page to another instance, which has posts that the
// page missed: with few the page goes on, with more than are kept it loads the
// list anew.
func TestPageThatIsMovedToAnotherInstanceShowsWhatItMissed(t *testing.T) {
	for _, tt := range []struct {
		name   string
		replay int
		missed int
		want   string
	}{
		{"a few", 256, 2, "missed 2\nmissed 1\nseen"},
		// Of 3 that are kept none is the oldest that is shown.
		{"more than are kept", 3, 20, "missed 20\nmissed 19\nmissed 18\nmissed 17\nmissed 16"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := service{url: newDatabase(t), replay: tt.replay}
			a, b := start(t, s), start(t, s)
			balancer := newBalancer(t)
			balancer.send(a)
			tab := newBrowser(t).open(t, balancer.url)
			tab.send(t, "seen", "")
			tab.shows(t, "seen")

			balancer.cut()
			for i := range tt.missed {
				a.create(t, fmt.Sprint("missed ", i+1))
			}
			balancer.send(b)
			first, _, _ := strings.Cut(tt.want, "\n")
			tab.shows(t, first)
			// The events of the replay may be there before the list is.
			for _, title := range strings.Split(tt.want, "\n") {
				tab.shows(t, title)
			}
			if got := tab.list(t); got != tt.want {
				t.Errorf("the page shows %q, want %q", got, tt.want)
			}
		})
	}
}

// A page that lost its connection before the first event has no id to come
// back with, and nobody to tell it of a gap.
func TestPageThatSawNoEventLoadsTheListAgain(t *testing.T) {
	eachEngine(t, func(t *testing.T, s service) {
		in := start(t, s)
		balancer := newBalancer(t)
		balancer.send(in)
		tab := newBrowser(t).open(t, balancer.url)
		balancer.cut()
		in.create(t, "missed")
		balancer.send(in)
		tab.shows(t, "missed")
	})
}

// Any status but 200 is final to an EventSource. A proxy answers 502 while the
// service restarts: the page connects anew, and shows what it missed.
func TestPageComesBackAfterA502(t *testing.T) {
	in := start(t, engines[0].newService(t))
	target, err := url.Parse(in.url)
	if err != nil {
		t.Fatal(err)
	}
	pass := httputil.NewSingleHostReverseProxy(target)
	var down atomic.Bool
	refused := make(chan bool, 100)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if down.Load() {
			w.WriteHeader(http.StatusBadGateway)
			refused <- true
			return
		}
		pass.ServeHTTP(w, r)
	}))
	t.Cleanup(proxy.Close)
	tab := newBrowser(t).open(t, proxy.URL)
	down.Store(true)
	proxy.CloseClientConnections()
	<-refused
	in.create(t, "missed")
	down.Store(false)
	tab.shows(t, "missed")
}

// browser is a headless Chromium.
type browser struct{ ctx context.Context }

func newBrowser(t *testing.T) browser {
	t.Helper()
	path := findChromium(t)
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox,
		chromedp.Flag("disable-dev-shm-usage", true)) // of containers, which is small
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil { // before any context with a timeout, which would end it
		t.Fatalf("%s: %v", path, err)
	}
	return browser{ctx}
}

func findChromium(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatal("this test needs Chromium: apt-get install chromium")
	return ""
}

// tab is a page of the service that is open.
type tab struct{ ctx context.Context }

// open visits the page of an instance and waits until it says that it is
// connected.
func (b browser) open(t *testing.T, url string) *tab {
	t.Helper()
	tab := b.visit(t, url)
	tab.waitFor(t, `//*[@id="state"][. = "New posts appear as they are made."]`)
	return tab
}

// visit opens any page. Whatever it complains of on the console until the end is
// a failure, but for connections, which the tests cut.
func (b browser) visit(t *testing.T, url string) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(b.ctx)
	t.Cleanup(cancel)
	var (
		mu       sync.Mutex // guards what follows
		messages []string
	)
	if err := chromedp.Listen(ctx, func(event any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := event.(type) {
		case *runtime.EventExceptionThrown:
			messages = append(messages, e.ExceptionDetails.Text)
		case *cdplog.EventEntryAdded:
			if e.Entry.Source != cdplog.EntrySourceNetwork {
				messages = append(messages, e.Entry.Text)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, message := range messages {
			t.Errorf("%s: console: %s", url, message)
		}
	})
	ctx, cancel = context.WithTimeout(ctx, time.Minute)
	t.Cleanup(cancel)
	tab := &tab{ctx}
	tab.run(t, chromedp.Navigate(url))
	return tab
}

func (tab *tab) run(t *testing.T, actions ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(tab.ctx, actions...); err != nil {
		t.Fatal(err)
	}
}

func (tab *tab) waitFor(t *testing.T, xpath string) {
	t.Helper()
	if err := chromedp.Do(tab.ctx, chromedp.WaitVisible(xpath)); err != nil {
		t.Fatalf("%s: %v", xpath, err)
	}
}

// send fills in the form, key by key.
func (tab *tab) send(t *testing.T, title, body string) {
	t.Helper()
	tab.run(t,
		chromedp.SendKeys(chromedp.CSS("input[name=title]"), title),
		chromedp.SendKeys(chromedp.CSS("textarea[name=body]"), body),
		chromedp.Click(chromedp.CSS("#new button")),
	)
}

// shows waits until the page shows a post.
func (tab *tab) shows(t *testing.T, title string) {
	t.Helper()
	tab.waitFor(t, fmt.Sprintf(`//ul[@id="newest"]/li/strong[. = %q]`, title))
}

// list returns what is listed, a line for each post.
func (tab *tab) list(t *testing.T) string {
	t.Helper()
	text, err := chromedp.Run(tab.ctx, chromedp.Text(chromedp.CSS("#newest")))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

// balancer passes connections on to an instance, another one every now and
// then.
type balancer struct {
	url string

	mu    sync.Mutex // guards what follows
	to    string     // none: connections are refused
	conns []net.Conn
}

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{url: "http://" + l.Addr().String()}
	t.Cleanup(func() {
		l.Close()
		b.cut()
	})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			b.pass(conn)
		}
	}()
	return b
}

func (b *balancer) send(in *instance) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.to = strings.TrimPrefix(in.url, "http://")
}

// cut ends every connection, and refuses new ones.
func (b *balancer) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.to = ""
	for _, conn := range b.conns {
		conn.Close()
	}
	b.conns = nil
}

func (b *balancer) pass(client net.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.to == "" {
		client.Close()
		return
	}
	server, err := net.Dial("tcp", b.to)
	if err != nil {
		client.Close()
		return
	}
	b.conns = append(b.conns, client, server)
	for _, way := range [][2]net.Conn{{client, server}, {server, client}} {
		go func() {
			io.Copy(way[0], way[1])
			way[0].Close()
		}()
	}
}
