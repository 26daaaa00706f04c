// This file starts strace, and under it this test binary as a server of one large
// file. It proves that the file goes out by sendfile through the whole chain of
// middleware.

package conformance

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"example.com/conduit"
)

const sendfileSize = 8 << 20

// A wrapper that does not forward ReadFrom turns one sendfile into hundreds of
// writes.
func TestSendfileSurvivesTheChain(t *testing.T) {
	t.Parallel()
	trace := filepath.Join(t.TempDir(), "trace")
	_, stderr, status := run(t, nil, program(t, "strace"), "-f", "-E", sendfileVariable+"=1", "-e", "trace=sendfile", "-o", trace, os.Args[0])
	if status != 0 {
		t.Fatalf("exit status %d:\n%s", status, stderr)
	}
	calls, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	sent := 0
	for _, m := range regexp.MustCompile(`(?m)sendfile.* = (\d+)$`).FindAllSubmatch(calls, -1) {
		n, _ := strconv.Atoi(string(m[1]))
		sent += n
	}
	if sent < sendfileSize*9/10 {
		t.Errorf("sendfile sent %d bytes of %d:\n%s", sent, sendfileSize, calls)
	}
}

// sendfileVariable is set in the environment of the server that strace watches.
const sendfileVariable = "CONFORMANCE_SENDFILE"

// sendfileProgram sends a file to itself.
func sendfileProgram() error {
	f, err := os.CreateTemp("", "conduit-sendfile-")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if err := f.Truncate(sendfileSize); err != nil {
		return err
	}
	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.FastTimeout(time.Minute), conduit.Compression())
	srv, err := conduit.New(conduit.DefaultConfig(chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "large", time.Time{}, f)
	}))))
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go srv.Serve(l)
	defer srv.Close()
	res, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if n, err := io.Copy(io.Discard, res.Body); n != sendfileSize || err != nil {
		return fmt.Errorf("got %d bytes of %d, %w", n, sendfileSize, err)
	}
	return nil
}
