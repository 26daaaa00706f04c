// This file starts a slow client over plain TCP that takes a large file from a FileServer.
// It proves that one that is slow gets every byte, long after WriteTimeout, and that
// one that stops is disconnected.

package conformance

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"example.com/conduit"
)

const largeFile = 24 << 20

func TestFileServerKeepsASlowClientAndDisconnectsOneThatStops(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	content := make([]byte, largeFile)
	rand.Read(content)
	if err := os.WriteFile(filepath.Join(dir, "large.bin"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	files := conduit.NewFileServer(dir, "/")
	t.Cleanup(func() { files.Close() })
	ended := make(chan struct{}, 2)
	cfg := conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery == "stops" {
			defer func() { ended <- struct{}{} }() // it panics
		}
		files.ServeHTTP(w, r)
	}))
	cfg.WriteTimeout = time.Second
	srv := serve(t, cfg)

	t.Run("slow", func(t *testing.T) {
		t.Parallel()
		body := getSlowly(t, srv, "/large.bin")
		sum := sha256.New()
		// 64 KiB a second, while the write deadline, which FileServer makes 3 seconds,
		// passes twice: less than a piece under each.
		for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
			if n, err := io.CopyN(sum, body, 16<<10); err != nil {
				t.Fatalf("read: %v after %d bytes of a piece", err, n)
			}
		}
		if _, err := io.Copy(sum, body); err != nil {
			t.Fatalf("read: %v", err)
		}
		if got, want := [32]byte(sum.Sum(nil)), sha256.Sum256(content); got != want {
			t.Errorf("hash of the content: %x, want %x", got, want)
		}
	})

	t.Run("stops", func(t *testing.T) {
		t.Parallel()
		body := getSlowly(t, srv, "/large.bin?stops")
		if _, err := io.CopyN(io.Discard, body, 100<<10); err != nil {
			t.Fatal(err)
		}
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatalf("the handler has not ended within %v", patience)
		}
		if n, err := io.Copy(io.Discard, body); err == nil {
			t.Errorf("read on: the end after %d bytes, want an error", n)
		}
	})
}

// getSlowly returns the body of a response that comes over a connection with a
// small buffer.
func getSlowly(t *testing.T, srv *server, path string) io.Reader {
	t.Helper()
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10)
		}); e != nil {
			return e
		}
		return err
	}}
	conn, err := dialer.DialContext(t.Context(), "tcp", srv.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(4 * patience))
	if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: files\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 4<<10), nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK || resp.ContentLength != largeFile {
		t.Fatalf("GET %s: %s, Content-Length %d, want 200 and %d", path, resp.Status, resp.ContentLength, largeFile)
	}
	return resp.Body
}
