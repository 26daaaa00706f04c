package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/valyala/fasthttp"
)

// A proxy stands in front of two instances.
type proxy struct {
	title   string
	program string
	args    []string // DIR is where its files are
	config  string   // DIR, PROXY, FIRST and SECOND are to be replaced
}

// restartProxies returns the proxies, set up as their documentation has it:
// connections to the instances are kept, a POST that was sent is not sent again.
func restartProxies() []proxy {
	return []proxy{
		{"nginx", "nginx", []string{"-p", "DIR", "-e", "DIR/proxy.log", "-c", "DIR/proxy.conf"}, restartNginx},
		{"HAProxy", "haproxy", []string{"-db", "-f", "DIR/proxy.conf"}, restartHAProxy},
	}
}

// It has passive checks only: whoever refuses a connection is left alone for
// fail_timeout.
const restartNginx = `
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log DIR/proxy.log;
events { worker_connections 4096; }
http {
	access_log off;
` + nginxTempPaths + `	upstream instances {
		server FIRST fail_timeout=1s;
		server SECOND fail_timeout=1s;
		keepalive 64;
	}
	server {
		listen PROXY;
		location / {
			proxy_pass http://instances;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
		}
	}
}
`

const restartHAProxy = `
global
	log stdout format raw local0
defaults
	mode http
	log global
	option httplog
	option dontlog-normal
	option redispatch
	timeout connect 1s
	timeout client 60s
	timeout server 60s
	default-server inter 500ms fall 2 rise 1
listen instances
	bind PROXY
	option httpchk GET /health
	http-check expect status 200
	server first FIRST check
	server second SECOND check
`

// measureRestarts writes a table of what becomes of POSTs while two instances
// behind a proxy are restarted in turn, as often as times says.
func measureRestarts(ctx context.Context, times int, stdout io.Writer) error {
	fmt.Fprintf(stdout, "%s.\n%d clients behind a proxy, two instances, each restarted %d times.\n\n", machine(), clients, times)
	fmt.Fprint(stdout, "| proxy | server | POSTs | failed | of them executed | answered, not executed | executed twice |\n|---|---|---|---|---|---|---|\n")
	for _, p := range restartProxies() {
		program, err := findProgram(p.program)
		if err != nil {
			fmt.Fprintf(os.Stderr, "without %s: it is not installed\n", p.title)
			continue
		}
		p.program = program
		for _, s := range stoppables() {
			t, err := p.restart(ctx, &s, times)
			if err != nil {
				return fmt.Errorf("%s behind %s: %w", s.name, p.title, err)
			}
			fmt.Fprintf(stdout, "| %s | %s | %d | %d | %d | %d | %d |\n", p.title, s.title, t.sent, t.failed, t.failedExecuted, t.phantom, t.twice)
			for _, reason := range slices.Sorted(maps.Keys(t.reasons)) {
				fmt.Fprintf(os.Stderr, "%s behind %s: %d times %s\n", s.name, p.title, t.reasons[reason], reason)
			}
		}
	}
	return nil
}

// restart measures one server behind p.
func (p *proxy) restart(ctx context.Context, s *stoppable, times int) (*tally, error) {
	dir, err := os.MkdirTemp("", "conduit-restart-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	addresses, err := freeAddresses(3)
	if err != nil {
		return nil, err
	}
	instances := []*instance{newInstance(s, addresses[0], dir), newInstance(s, addresses[1], dir)}
	for _, i := range instances {
		if err := i.start(); err != nil {
			return nil, err
		}
		defer i.kill()
	}
	stop, err := p.start(dir, strings.NewReplacer("DIR", dir, "PROXY", addresses[2], "FIRST", addresses[0], "SECOND", addresses[1]))
	if err != nil {
		return nil, err
	}
	defer stop()

	o := &orders{address: addresses[2]}
	loadCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	var group sync.WaitGroup
	group.Go(func() { o.post(loadCtx) })
	err = roll(ctx, instances, times)
	cancel()
	group.Wait()
	if err != nil {
		return nil, err
	}
	executed := make(map[int]int)
	for _, i := range instances {
		if err := i.count(executed); err != nil {
			return nil, err
		}
	}
	return o.tally(executed), nil
}

// freeAddresses returns n addresses that nobody listens on.
func freeAddresses(n int) ([]string, error) {
	var addresses []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // later, or the next one may be the same
		addresses = append(addresses, l.Addr().String())
	}
	return addresses, nil
}

// start starts the proxy, which listens when start returns.
func (p *proxy) start(dir string, names *strings.Replacer) (stop func(), err error) {
	if err := os.WriteFile(filepath.Join(dir, "proxy.conf"), []byte(names.Replace(p.config)), 0o644); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(dir, "proxy.log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	var args []string
	for _, arg := range p.args {
		args = append(args, names.Replace(arg))
	}
	cmd := exec.Command(p.program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if err := waitFor(context.Background(), func() bool { return answers(names.Replace("PROXY")) }); err != nil {
		stop()
		text, _ := os.ReadFile(log.Name())
		return nil, fmt.Errorf("it does not listen: %s", firstLine(string(text)))
	}
	return stop, nil
}

// roll restarts one instance after the other. One has its turn when the
// proxy gives orders to the one before again.
func roll(ctx context.Context, instances []*instance, times int) error {
	for _, i := range instances {
		if err := waitFor(ctx, i.working()); err != nil {
			return fmt.Errorf("gets no orders: %w", err)
		}
	}
	told := newProgress(times * len(instances))
	defer told.clear()
	for range times {
		for _, i := range instances {
			told.step("restarting " + i.address)
			if err := i.stop(ctx); err != nil {
				return err
			}
			if err := i.start(); err != nil {
				return err
			}
			if err := waitFor(ctx, i.working()); err != nil {
				return fmt.Errorf("gets no orders after its restart: %w", err)
			}
		}
	}
	return nil
}

// waitFor returns an error if done does not report true for 20 seconds.
func waitFor(ctx context.Context, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for !done() {
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	return nil
}

func answers(address string) bool {
	conn, err := net.Dial("tcp", address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// instance is one of the two processes behind the proxy.
type instance struct {
	server, address string
	dir, executed   string
	cmd             *exec.Cmd
}

func newInstance(s *stoppable, address, dir string) *instance {
	return &instance{server: s.name, address: address, dir: dir, executed: executedFile(dir, address)}
}

// executedFile is where an instance notes what it has executed, before and after
// its restarts.
func executedFile(dir, address string) string { return filepath.Join(dir, address) }

func (i *instance) start() error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(i.executed+".log", os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	i.cmd = exec.Command(program, "-serve", i.server, "-address", i.address, "-dir", i.dir)
	i.cmd.Stderr = log
	if err := i.cmd.Start(); err != nil {
		return err
	}
	return waitFor(context.Background(), func() bool { return answers(i.address) })
}

// stop sends a SIGTERM and waits until the process has ended of itself.
func (i *instance) stop(ctx context.Context) error {
	if err := i.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	end := time.AfterFunc(40*time.Second, i.kill)
	defer end.Stop()
	defer context.AfterFunc(ctx, i.kill)()
	if err := i.cmd.Wait(); err != nil {
		log, _ := os.ReadFile(i.executed + ".log")
		return fmt.Errorf("shutdown: %w: %s", err, log)
	}
	return nil
}

func (i *instance) kill() { i.cmd.Process.Kill() }

// working returns a function that reports whether orders have been executed
// since now.
func (i *instance) working() func() bool {
	size := func() int64 {
		info, err := os.Stat(i.executed)
		if err != nil {
			return 0
		}
		return info.Size()
	}
	before := size()
	return func() bool { return size() > before }
}

// count adds to times how often each order was executed.
func (i *instance) count(times map[int]int) error {
	file, err := os.Open(i.executed)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		number, err := strconv.Atoi(lines.Text())
		if err != nil {
			return err
		}
		times[number]++
	}
	return lines.Err()
}

// orders are POSTs with a number each, none of which is sent twice by the
// client.
type orders struct {
	address string

	mu       sync.Mutex // guards what follows
	last     int
	failures map[int]string // why, by number
}

// post sends orders until ctx ends, and returns when all are answered.
func (o *orders) post(ctx context.Context) {
	host := &fasthttp.HostClient{
		Addr:                      o.address,
		MaxConns:                  clients,
		MaxIdemponentCallAttempts: 1,
		ReadTimeout:               30 * time.Second,
		WriteTimeout:              30 * time.Second,
	}
	defer host.CloseIdleConnections()
	o.failures = make(map[int]string)
	filler := strings.Repeat(" and so on", 2000)
	var group sync.WaitGroup
	for range clients {
		group.Go(func() {
			var req fasthttp.Request
			var res fasthttp.Response
			req.SetRequestURI("http://" + o.address + "/orders")
			req.Header.SetMethod(http.MethodPost)
			for ctx.Err() == nil {
				o.mu.Lock()
				o.last++
				number := o.last
				o.mu.Unlock()
				want := strconv.Itoa(number)
				// Some are more than a proxy reads at once, or keeps in memory.
				req.SetBodyString(want + filler[:10+number%3*9990])
				err := host.Do(&req, &res)
				if err == nil && (res.StatusCode() != http.StatusOK || string(res.Body()) != want) {
					err = errors.New(strconv.Itoa(res.StatusCode()))
				}
				if err != nil {
					o.mu.Lock()
					o.failures[number] = err.Error()
					o.mu.Unlock()
				}
			}
		})
	}
	group.Wait()
}

// tally is what became of the orders.
type tally struct {
	sent           int
	failed         int // as the client sees it: an error, or another status
	failedExecuted int // of them, those that were executed
	phantom        int // answered, but not executed
	twice          int // executed more than once
	reasons        map[string]int
}

// tally counts, with how often each order was executed.
func (o *orders) tally(executed map[int]int) *tally {
	t := &tally{sent: o.last, failed: len(o.failures), reasons: make(map[string]int)}
	for number := 1; number <= o.last; number++ {
		reason, failed := o.failures[number]
		if failed {
			t.reasons[reason]++
		}
		switch {
		case failed && executed[number] > 0:
			t.failedExecuted++
		case !failed && executed[number] == 0:
			t.phantom++
		}
		if executed[number] > 1 {
			t.twice++
		}
	}
	return t
}
