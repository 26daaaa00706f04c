package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// process is a peer that serves in a process of its own.
type process struct {
	peer   *peer
	addr   string // of HTTP/1.1
	secure string // of TLS
	pid    int

	cmd       *exec.Cmd
	questions io.WriteCloser
	answers   *bufio.Reader
	stderr    bytes.Buffer
}

// startProcess starts a program to serve p, which is this one unless p says so, on the processor cpu if
// that is not "", with the site that p has below dir.
func startProcess(p *peer, dir, cpu string) (*process, error) {
	program := p.program
	if program == "" {
		var err error
		if program, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	name, _, _ := strings.Cut(p.name, "@")
	args := []string{program, "-serve", name, "-dir", filepath.Join(dir, p.name)}
	if cpu != "" {
		args = append([]string{"taskset", "-c", cpu}, args...)
	}
	proc := &process{peer: p, cmd: exec.Command(args[0], args[1:]...)}
	proc.cmd.Stderr = &proc.stderr
	var err error
	if proc.questions, err = proc.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := proc.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	proc.answers = bufio.NewReader(out)
	if err := proc.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := proc.answers.ReadString('\n')
	if err == nil {
		_, err = fmt.Sscan(line, &proc.addr, &proc.secure, &proc.pid)
	}
	if err != nil {
		proc.stop()
		if strings.Contains(proc.stderr.String(), errNoNginx.Error()) {
			return nil, errNoNginx
		}
		return nil, fmt.Errorf("%s does not start: %s", p.name, firstLine(proc.stderr.String()))
	}
	return proc, nil
}

// stop ends the process, which has no more questions to wait for.
func (p *process) stop() {
	p.questions.Close()
	end := time.AfterFunc(5*time.Second, func() { p.cmd.Process.Kill() })
	defer end.Stop()
	p.cmd.Wait()
}

func (p *process) ask(question string) (string, error) {
	if _, err := fmt.Fprintln(p.questions, question); err != nil {
		return "", p.hasGone()
	}
	answer, err := p.answers.ReadString('\n')
	if err != nil {
		return "", p.hasGone()
	}
	return strings.TrimSpace(answer), nil
}

// hasGone waits for the process, because only then all that it said is there.
func (p *process) hasGone() error {
	p.stop()
	return fmt.Errorf("%s has gone: %s", p.peer.name, firstLine(p.stderr.String()))
}

// processorTime returns how long the server has run until now.
func (p *process) processorTime() (time.Duration, error) {
	answer, err := p.ask("cpu")
	if err != nil {
		return 0, err
	}
	ns, err := strconv.ParseInt(answer, 10, 64)
	return time.Duration(ns), err
}

// memory returns the bytes that the server has resident, when its garbage is
// collected and given back.
func (p *process) memory() (int64, error) {
	if _, err := p.ask("collect"); err != nil {
		return 0, err
	}
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.pid), "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var kB int64
			_, err := fmt.Sscan(value, &kB)
			return kB << 10, err
		}
	}
	return 0, fmt.Errorf("no VmRSS of process %d", p.pid)
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return line
}
