package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// serve is what a process that was started for one peer does, with the site
// below dir: it says where it serves, in a line with two addresses and the number of the process, and then
// answers questions, a line each, until they end.
func serve(p *peer, dir string, in io.Reader, out io.Writer) error {
	// An interrupt at the terminal, or its end, comes to all processes. This one
	// ends when the runner has no more questions.
	signal.Ignore(os.Interrupt, syscall.SIGHUP)
	l, secure, err := listen()
	if err != nil {
		return err
	}
	svc, err := p.serve(openSite(dir), l, secure)
	if err != nil {
		return err
	}
	pid := svc.pid
	if pid == 0 {
		pid = os.Getpid()
	}
	fmt.Fprintln(out, l.Addr(), secure.Addr(), pid)

	questions := bufio.NewScanner(in)
	for questions.Scan() {
		switch questions.Text() {
		case "cpu":
			used, err := processorTime(svc.pid)
			if err != nil {
				return errors.Join(err, svc.stop())
			}
			fmt.Fprintln(out, used.Nanoseconds())
		case "collect":
			// Twice: what is in a sync.Pool survives the first one.
			runtime.GC()
			debug.FreeOSMemory()
			fmt.Fprintln(out, "done")
		}
	}
	return svc.stop()
}

// listen returns listeners on two free ports of the loopback address.
func listen() (l, secure net.Listener, err error) {
	if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, nil, err
	}
	if secure, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, secure, nil
}

// processorTime returns how long a process has run, in user and in system
// mode: this one, or the only thread of another one.
func processorTime(pid int) (time.Duration, error) {
	if pid == 0 {
		var usage syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
			return 0, err
		}
		return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
	}
	// In /proc/PID/stat it is only to a hundredth of a second.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), " ")
	ns, err := strconv.ParseInt(first, 10, 64)
	return time.Duration(ns), err
}
