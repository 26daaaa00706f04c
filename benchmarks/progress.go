package main

import (
	"fmt"
	"os"
	"time"
)

// progress tells how far a run has come: in one line that changes on a
// terminal, elsewhere in a line every ten seconds.
type progress struct {
	total, done int
	begun       time.Time
	told        time.Time
	terminal    bool
}

func newProgress(total int) *progress {
	info, err := os.Stderr.Stat()
	return &progress{
		total:    total,
		begun:    time.Now(),
		told:     time.Now(),
		terminal: err == nil && info.Mode()&os.ModeCharDevice != 0,
	}
}

// step tells what is measured next.
func (p *progress) step(what string) {
	left := "?"
	if p.done > 0 {
		each := time.Since(p.begun) / time.Duration(p.done)
		left = (each * time.Duration(p.total-p.done)).Round(time.Second).String()
	}
	line := fmt.Sprintf("[%d/%d, %s left] %s", p.done+1, p.total, left, what)
	p.done++
	if p.terminal {
		fmt.Fprintf(os.Stderr, "\r\x1b[K%s", line)
	} else if time.Since(p.told) > 10*time.Second {
		p.told = time.Now()
		fmt.Fprintln(os.Stderr, line)
	}
}

// clear leaves the line of a terminal empty.
func (p *progress) clear() {
	if p.terminal {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
