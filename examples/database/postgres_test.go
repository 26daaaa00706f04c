package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) {
	time.Local = time.FixedZone("anywhere", 3*60*60) // responses are in UTC on any machine
	status := m.Run()
	stopPostgres()
	os.Exit(status)
}

// newDatabase returns the URL of an empty database. The first call starts the
// Postgres that it is on.
func newDatabase(t *testing.T) string {
	t.Helper()
	admin := administrate(t, "postgres")
	name := fmt.Sprintf("test%d", databases.Add(1))
	execute(t, admin, "CREATE DATABASE "+name)
	return databaseURL(name)
}

var databases atomic.Int64

func databaseURL(name string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%s/%s?sslmode=disable", postgresPort, name)
}

// databaseName returns the name in a URL of databaseURL.
func databaseName(url string) string {
	_, path, _ := strings.Cut(url, "127.0.0.1:"+postgresPort+"/")
	name, _, _ := strings.Cut(path, "?")
	return name
}

// administrate returns a connection to a database of the server.
func administrate(t *testing.T, name string) *pgx.Conn {
	t.Helper()
	if err := startPostgres(); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), databaseURL(name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func execute(t *testing.T, conn *pgx.Conn, statement string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), statement, args...); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

var (
	postgresPort string
	stopPostgres = func() {}
)

// startPostgres starts a server in a temporary directory, on a free port of
// this machine.
var startPostgres = sync.OnceValue(func() error {
	bin, err := findPostgres()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "postgres")
	if err != nil {
		return err
	}
	stopPostgres = func() { os.RemoveAll(dir) }
	as := new(syscall.SysProcAttr)
	if os.Geteuid() == 0 { // Postgres refuses to run as root
		if as.Credential, err = own(dir, "postgres"); err != nil {
			return err
		}
	}

	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
	initdb.SysProcAttr = as
	initdb.Dir = dir
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	if postgresPort, err = freePort(); err != nil {
		return err
	}
	// The shell ends the server when its own input ends, so that nothing is left
	// however this process ends.
	server := exec.Command("sh", "-c", `"$@" </dev/null & read -r end; kill -INT $!; wait; rm -rf "$0"`, dir,
		filepath.Join(bin, "postgres"), "-D", data, "-k", dir, "-p", postgresPort, "-F",
		"-c", "listen_addresses=127.0.0.1", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")
	server.SysProcAttr = as
	server.Dir = dir
	input, err := server.StdinPipe()
	if err != nil {
		return err
	}
	logs, err := server.StderrPipe()
	if err != nil {
		return err
	}
	if err := server.Start(); err != nil {
		return err
	}
	stopPostgres = func() {
		input.Close()
		server.Wait()
		os.RemoveAll(dir)
	}
	var said strings.Builder
	for lines := bufio.NewScanner(logs); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		if strings.Contains(lines.Text(), "ready to accept connections") {
			go io.Copy(io.Discard, logs)
			return nil
		}
	}
	return fmt.Errorf("postgres did not start:\n%s", &said)
})

// findPostgres returns the directory of the programs: the newest, where Debian has
// several.
func findPostgres() (string, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) > 0 {
		return filepath.Dir(found[len(found)-1]), nil
	}
	path, err := exec.LookPath("initdb")
	if err != nil {
		return "", errors.New("these tests need Postgres: apt-get install postgresql, or put initdb and postgres in PATH")
	}
	return filepath.Dir(path), nil
}

// own gives the directory to a user and returns the credential to run programs as.
func own(dir, name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("Postgres does not run as root, and there is no other user to run it: %w", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, os.Chown(dir, uid, gid)
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, err
}
