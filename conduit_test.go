package conduit_test

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"database/sql/driver"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"runtime/pprof"
	"runtime/trace"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"
	"weak"

	"example.com/conduit"
)

// TestMain runs the test binary as the program that a test started it as.
func TestMain(m *testing.M) {
	switch os.Getenv("CONDUIT_TEST_PROGRAM") {
	case "":
		slog.SetDefault(slog.New(slog.DiscardHandler))
		os.Exit(m.Run())
	case "graceful":
		gracefulProgram()
	}
}

// Server

func TestNewReportsEveryInvalidField(t *testing.T) {
	type config = conduit.Config
	certFile, keyFile := writeCertificate(t, t.TempDir(), newCertificate(t, "a.test"))
	otherCert, _ := writeCertificate(t, t.TempDir(), newCertificate(t, "b.test"))
	h := http.NotFoundHandler()
	withTLS := func(c *tls.Config) *config {
		return &config{Handler: h, EnableHTTP2: true, CertFile: certFile, KeyFile: keyFile, MinTLSVersion: tls.VersionTLS12, TLSConfig: c}
	}
	tests := []struct {
		name string
		cfg  *config
		want []string // prefixes of the lines of the error
	}{
		{"nil", nil, []string{"conduit: Handler: "}},
		{"nil HandlerFunc", &config{Handler: http.HandlerFunc(nil)}, []string{"conduit: Handler: "}},
		{"nil ServeMux", &config{Handler: (*http.ServeMux)(nil)}, []string{"conduit: Handler: "}},
		{"address that is a port", &config{Handler: h, Address: "8080"}, []string{`conduit: Address: "8080" is a port alone: ":8080" is`}},
		{"address without port", &config{Handler: h, Address: "localhost"}, []string{"conduit: Address: "}},
		{"address with unknown port", &config{Handler: h, Address: ":no-such-service"}, []string{"conduit: Address: "}},
		{"durations without a unit", &config{Handler: h, ReadTimeout: 15, ReadHeaderTimeout: 10, WriteTimeout: 15, IdleTimeout: 60}, []string{
			"conduit: ReadTimeout: 15ns: too short; is a unit such as time.Second missing?", "conduit: ReadHeaderTimeout: 10ns: ", "conduit: WriteTimeout: 15ns: ", "conduit: IdleTimeout: 60ns: ",
		}},
		{"old TLS", &config{Handler: h, MinTLSVersion: tls.VersionTLS11}, []string{"conduit: MinTLSVersion: "}},
		{"cert alone", &config{Handler: h, CertFile: certFile}, []string{"conduit: KeyFile: "}},
		{"key alone", &config{Handler: h, KeyFile: keyFile}, []string{"conduit: CertFile: "}},
		{"mismatched files", &config{Handler: h, CertFile: otherCert, KeyFile: keyFile}, []string{"conduit: CertFile, KeyFile: "}},
		{"TLS without certificate", &config{Handler: h, TLSConfig: &tls.Config{}}, []string{"conduit: TLSConfig: has no certificate"}},
		{"empty certificate", &config{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{{}}}}, []string{"conduit: TLSConfig: certificate 1"}},
		{"old TLSConfig", withTLS(&tls.Config{MinVersion: tls.VersionTLS10}), []string{"conduit: TLSConfig: MinVersion"}},
		{"unknown TLSConfig", withTLS(&tls.Config{MinVersion: 0x9999}), []string{"conduit: TLSConfig: MinVersion"}},
		{"TLSConfig upside down", withTLS(&tls.Config{MaxVersion: tls.VersionTLS11}), []string{"conduit: TLSConfig: MaxVersion"}},
		{"suites without HTTP/2's", withTLS(&tls.Config{CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}}), []string{"conduit: TLSConfig: CipherSuites"}},
		{
			"all at once",
			&config{Address: "x", MaxHeaderBytes: -1, MinTLSVersion: 1, CertFile: "no/cert", KeyFile: "no/key", Database: &conduit.DatabaseConfig{MaxOpenConns: 1, MaxIdleConns: 2}},
			[]string{"conduit: Handler: ", "conduit: Address: ", "conduit: MaxHeaderBytes: ", "conduit: MinTLSVersion: ", "conduit: Database.DB: ", "conduit: Database.MaxIdleConns: ", "conduit: CertFile: ", "conduit: KeyFile: "},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv, err := conduit.New(tt.cfg)
			if err == nil || srv != nil {
				t.Fatalf("New = %v, %v; want nil and an error", srv, err)
			}
			lines := strings.Split(err.Error(), "\n")
			if !slices.EqualFunc(lines, tt.want, strings.HasPrefix) {
				t.Errorf("got %d errors:\n%v\nwant %d that begin with %q", len(lines), err, len(tt.want), tt.want)
			}
		})
	}
}

func TestNewFillsInDefaultsAndKeepsNegatives(t *testing.T) {
	h := http.NotFoundHandler()
	const second = time.Second
	for _, tt := range []struct {
		name                          string
		cfg                           *conduit.Config
		read, readHeader, write, idle time.Duration
		protocols                     string
	}{
		{"zero", &conduit.Config{Handler: h}, 15 * second, 10 * second, 15 * second, 60 * second, "{HTTP1}"},
		{"DefaultConfig", conduit.DefaultConfig(h), 15 * second, 10 * second, 15 * second, 60 * second, "{HTTP1,HTTP2}"},
		{"negative", &conduit.Config{Handler: h, ReadTimeout: -1, ReadHeaderTimeout: -1, WriteTimeout: -1, IdleTimeout: -1, EnableH2C: true}, -1, -1, -1, -1, "{HTTP1,UnencryptedHTTP2}"},
	} {
		hs := newServer(t, tt.cfg).HTTPServer()
		if hs.ReadTimeout != tt.read || hs.ReadHeaderTimeout != tt.readHeader || hs.WriteTimeout != tt.write || hs.IdleTimeout != tt.idle {
			t.Errorf("%s: timeouts %v %v %v %v, want %v %v %v %v", tt.name, hs.ReadTimeout, hs.ReadHeaderTimeout, hs.WriteTimeout, hs.IdleTimeout, tt.read, tt.readHeader, tt.write, tt.idle)
		}
		if hs.MaxHeaderBytes != 1<<20 || hs.Protocols.String() != tt.protocols || hs.Addr != ":8080" {
			t.Errorf("%s: MaxHeaderBytes %d, protocols %v, address %q; want 1 MiB, %s, :8080", tt.name, hs.MaxHeaderBytes, hs.Protocols, hs.Addr, tt.protocols)
		}
	}
}

func TestNewCopiesItsConfigAndTakesTheDefaultLogger(t *testing.T) {
	var logs logBuffer
	old := slog.Default()
	slog.SetDefault(logs.logger())
	cfg := conduit.DefaultConfig(textHandler("before"))
	srv, err := conduit.New(cfg)
	slog.SetDefault(old)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Handler = textHandler("after")
	url := serve(t, srv)
	if got := get(t, http.DefaultClient, url).body; got != "before" {
		t.Errorf("body = %q, want the handler that New was given", got)
	}
	if lines := logs.find("listening"); len(lines) != 1 || "http://"+fmt.Sprint(lines[0]["addr"]) != url {
		t.Errorf("the logger that was the default got %s, want one line that says listening on %s", logs.String(), url)
	}
}

func TestTLSAndHTTP2AreAsConfigured(t *testing.T) {
	certFile, keyFile := writeCertificate(t, t.TempDir(), testCertificate())
	other := []tls.Certificate{newCertificate(t, "other.test").pair} // CertFile wins over it
	forClient := func(cfg *tls.Config) *tls.Config {
		return &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			cfg.Certificates = other
			return cfg.Clone(), nil
		}}
	}
	own := &tls.Config{Certificates: other}
	min12, min13 := &tls.Config{MinVersion: tls.VersionTLS12}, &tls.Config{MinVersion: tls.VersionTLS13}
	tls11 := &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	tls12, tls13 := &tls.Config{MaxVersion: tls.VersionTLS12}, &tls.Config{MinVersion: tls.VersionTLS13}
	cbc := &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA}}
	for _, tt := range []struct {
		name   string
		min    uint16 // MinTLSVersion
		http2  bool
		cfg    *tls.Config
		client *tls.Config
		want   string // what is negotiated
	}{
		{"TLS 1.1", 0, false, own, tls11, "refused"},
		{"TLS 1.2 with GCM", 0, false, own, tls12, "http/1.1"},
		{"TLS 1.2 with CBC alone", 0, false, own, cbc, "refused"},
		{"TLS 1.3", 0, false, own, tls13, "http/1.1"},
		{"TLS 1.2 below MinTLSVersion", tls.VersionTLS13, false, min12, tls12, "refused"},
		{"TLS 1.3, MinTLSVersion", tls.VersionTLS13, false, nil, tls13, "http/1.1"},
		{"TLS 1.2 below TLSConfig.MinVersion", 0, false, min13, tls12, "refused"},
		{"TLS 1.3, TLSConfig.MinVersion", 0, false, min13, tls13, "http/1.1"},
		{"TLS 1.2 of GetConfigForClient", tls.VersionTLS13, false, forClient(&tls.Config{MinVersion: tls.VersionTLS10}), tls12, "refused"},
		{"TLS 1.3, GetConfigForClient", tls.VersionTLS13, false, forClient(&tls.Config{MinVersion: tls.VersionTLS10}), tls13, ""},
		{"HTTP/2", 0, true, own, tls12, "h2"},
		{"HTTP/2, GetConfigForClient", 0, true, forClient(&tls.Config{}), tls13, "h2"},
		{"HTTP/2, GetConfigForClient with protocols", 0, true, forClient(&tls.Config{NextProtos: []string{"http/1.1"}}), tls13, "http/1.1"},
	} {
		srv := newServer(t, &conduit.Config{Handler: http.NotFoundHandler(), CertFile: certFile, KeyFile: keyFile, MinTLSVersion: tt.min, EnableHTTP2: tt.http2, TLSConfig: tt.cfg})
		client := tt.client.Clone()
		client.RootCAs, client.ServerName, client.NextProtos = testCertificate().pool, "conduit.test", []string{"h2", "http/1.1"}
		got := "refused"
		conn, err := tls.Dial("tcp", strings.TrimPrefix(serve(t, srv), "http://"), client)
		if err == nil {
			got = conn.ConnectionState().NegotiatedProtocol
			conn.Close()
		}
		if got != tt.want {
			t.Errorf("%s: negotiated %q, %v; want %q", tt.name, got, err, tt.want)
		}
	}
	url := serve(t, newServer(t, conduit.DefaultConfig(http.NotFoundHandler())))
	if res, err := h2cProtocol.client(t).Get(url); err == nil {
		t.Errorf("without EnableH2C an h2c client got %s, want an error", res.Status)
	}
}

func TestCertificateFilesWinAndAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	// A server that reads the pipe would wait for ever.
	rescue := time.AfterFunc(20*time.Second, func() {
		if f, err := os.OpenFile(pipe, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	})
	defer rescue.Stop()
	synctest.Test(t, func(t *testing.T) {
		first, second, third := newCertificate(t, "first.test"), newCertificate(t, "second.test"), newCertificate(t, "third.test")
		certFile, keyFile := writeCertificate(t, dir, first)
		var logs logBuffer
		l := newPipeListener()
		serveBubble(t, newServer(t, &conduit.Config{
			Handler: http.NotFoundHandler(), CertFile: certFile, KeyFile: keyFile, Logger: logs.logger(),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{third.pair}}, // the files win, for a client that names no server too
		}), l)
		steps := []struct {
			name     string
			change   func() error
			after    time.Duration
			served   string
			reloaded int // lines so far
			refused  int
			reason   string // in the last line of the refused
		}{
			{"at first", func() error { return nil }, 0, "first.test", 0, 0, ""},
			{"renewed within a second", func() error { writeCertificate(t, dir, second); return nil }, 0, "first.test", 0, 0, ""},
			{"renewed", func() error { return nil }, time.Second, "second.test", 1, 0, ""},
			{"half written", func() error { return os.WriteFile(certFile, []byte("half a cert"), 0o600) }, 2 * time.Second, "second.test", 1, 1, "CertFile, KeyFile"},
			{"still half written", func() error { return nil }, 2 * time.Second, "second.test", 1, 1, "CertFile, KeyFile"},
			{"key removed", func() error { return os.Remove(keyFile) }, 2 * time.Second, "second.test", 1, 2, "KeyFile: open"},
			{"a pipe", func() error {
				writeCertificate(t, dir, second)
				return errors.Join(syscall.Mkfifo(pipe, 0o600), os.Remove(certFile), os.Symlink(pipe, certFile))
			}, 2 * time.Second, "second.test", 1, 3, "not a regular file"},
			{"well again", func() error { writeCertificate(t, dir, third); return nil }, 2 * time.Second, "third.test", 2, 3, ""},
		}
		for _, step := range steps {
			if err := step.change(); err != nil {
				t.Fatal(step.name, err)
			}
			time.Sleep(step.after)
			conn := tls.Client(l.dial(), &tls.Config{InsecureSkipVerify: true})
			if err := conn.Handshake(); err != nil {
				t.Fatal(step.name, err)
			}
			if got := conn.ConnectionState().PeerCertificates[0].DNSNames[0]; got != step.served {
				t.Errorf("%s: the certificate of %s, want %s", step.name, got, step.served)
			}
			conn.Close()
			refused := logs.find("certificate not reloaded, the old one stays in service")
			if n := len(logs.find("certificate reloaded")); n != step.reloaded || len(refused) != step.refused {
				t.Fatalf("%s: %d lines say reloaded, %d refused; want %d, %d", step.name, n, len(refused), step.reloaded, step.refused)
			}
			if step.reason != "" && !strings.Contains(fmt.Sprint(refused[step.refused-1]["err"]), step.reason) {
				t.Errorf("%s: refused for %v, want %q", step.name, refused[step.refused-1]["err"], step.reason)
			}
		}
	})
}

func TestListenAndServe(t *testing.T) {
	srv := newServer(t, &conduit.Config{Address: "127.0.0.1:0", Handler: textHandler("ok")})
	if got := srv.Addr(); got != nil {
		t.Fatalf("Addr before serving = %v, want nil", got)
	}
	served, listening := make(chan error, 1), make(chan struct{})
	srv.HTTPServer().BaseContext = func(net.Listener) context.Context { close(listening); return context.Background() }
	go func() { served <- srv.ListenAndServe() }()
	<-listening
	address := srv.Addr().String() // with the real port
	if got := get(t, http.DefaultClient, "http://"+address).body; got != "ok" {
		t.Errorf("body = %q, want ok", got)
	}
	second := newServer(t, &conduit.Config{Address: address, Handler: http.NotFoundHandler()})
	err := second.ListenAndServe()
	if err == nil || !strings.HasPrefix(err.Error(), "conduit: Address: ") || !strings.Contains(err.Error(), address) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("ListenAndServe on a port that is taken = %v, want an error that names %s", err, address)
	}
	if got := second.Addr(); got != nil {
		t.Errorf("Addr of a port that was taken = %v, want nil", got)
	}
	if err := errors.Join(srv.Close(), <-served); err != nil {
		t.Errorf("Close and ListenAndServe = %v, want nil", err)
	}
}

func TestServeReportsWhatEndedItAndClosesItsListener(t *testing.T) {
	l := listen(t)
	srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
	srv.HTTPServer().TLSConfig = &tls.Config{} // without a certificate net/http fails before it accepts
	if err := srv.Serve(l); err == nil || !strings.HasPrefix(err.Error(), "conduit: Serve: ") {
		t.Errorf("Serve without a certificate = %v, want an error", err)
	}
	if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("the listener was left open")
	}
	if err := srv.Shutdown(t.Context()); err != nil {
		t.Errorf("Shutdown = %v, want nil", err)
	}
	if err := newServer(t, conduit.DefaultConfig(http.NotFoundHandler())).Serve(l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve on a closed listener = %v, want net.ErrClosed", err)
	}
}

// net/http gives a server without TLS a TLSConfig as soon as it serves.
func TestServeOnSeveralListeners(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
	first := serve(t, srv)
	for range 2 {
		if got := get(t, http.DefaultClient, first); got.body != "ok" {
			t.Errorf("first listener: %+v, want ok", got)
		}
		if got := get(t, http.DefaultClient, serve(t, srv)); got.body != "ok" {
			t.Errorf("another listener: %+v, want ok", got)
		}
	}
	if got := "http://" + srv.Addr().String(); got != first {
		t.Errorf("Addr = %s, want the first, %s", got, first)
	}
}

func TestServeReturnsWhenTheShutdownIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		started, finish := make(chan struct{}), make(chan struct{})
		srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(started)
			<-finish
			io.WriteString(w, "done")
		})))
		l := newPipeListener()
		client, ended, responded := l.client(t), make(chan error, 2), make(chan response, 1)
		go func() { ended <- srv.Serve(l) }()
		go func() { responded <- get(t, client, "http://conduit.test/") }()
		<-started
		go func() { ended <- srv.Shutdown(context.Background()) }()
		time.Sleep(5 * time.Second) // of the bubble's time: the shutdown now waits for the handler alone
		select {
		case err := <-ended:
			t.Fatalf("Serve or Shutdown returned %v while a request was being served", err)
		default:
		}
		close(finish)
		if got := <-responded; got.body != "done" || !got.close {
			t.Errorf("response = %+v, want done with Connection: close", got)
		}
		if err := errors.Join(<-ended, <-ended); err != nil {
			t.Errorf("Serve and Shutdown = %v, want nil", err)
		}
	})
}

func TestStoppingOutOfOrderIsHarmless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		l := newPipeListener()
		if err := errors.Join(srv.Shutdown(t.Context()), srv.Serve(l), srv.Shutdown(t.Context()), srv.Close()); err != nil {
			t.Errorf("Shutdown, Serve, Shutdown, Close = %v, want nil", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the listener was left open: %v", err)
		}
		srv.Drain()
	})
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			srv, client, url := serveInBubble(t, http1Protocol, conduit.DefaultConfig(h))
			var all sync.WaitGroup
			all.Go(func() { client.Get(url) })
			synctest.Wait()
			for range 3 {
				all.Go(func() { srv.Shutdown(context.Background()) })
				all.Go(func() { srv.Close() })
			}
			all.Wait()
		})
	}
}

func TestHTTPServerHooksAreCalledNotReplaced(t *testing.T) {
	type key struct{}
	srv := newServer(t, conduit.DefaultConfig(textHandler("from Config")))
	hs, l := srv.HTTPServer(), listen(t)
	var states atomic.Int64
	hs.ConnState = func(net.Conn, http.ConnState) { states.Add(1) }
	hs.BaseContext = func(got net.Listener) context.Context {
		return context.WithValue(context.Background(), key{}, got == l)
	}
	hs.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Context().Value(key{}), " ", conduit.Draining(r.Context()) != nil)
	})
	serveOn(t, srv, l)
	if got := get(t, http.DefaultClient, "http://"+l.Addr().String()).body; got != "true true" || states.Load() == 0 {
		t.Errorf("body %q, ConnState called %d times; want the listener and the server in the context", got, states.Load())
	}
}

func TestH2CIsSpokenWithPriorKnowledgeOnly(t *testing.T) {
	url := serve(t, newServer(t, &conduit.Config{EnableH2C: true, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.Proto)
	})}))
	req, _ := http.NewRequest("GET", url, nil)
	req.Header = http.Header{"Connection": {"Upgrade, HTTP2-Settings"}, "Upgrade": {"h2c"}, "Http2-Settings": {"AAMAAABkAAQAAP__"}}
	if got := do(t, http.DefaultClient, req); got.status != http.StatusOK || got.body != "HTTP/1.1" {
		t.Errorf("asked for an upgrade: %d %q, want 200 over HTTP/1.1", got.status, got.body)
	}
}

func TestErrorLogHasLevels(t *testing.T) {
	const handshake = "http: TLS handshake error from 1.2.3.4:5: "
	for text, level := range map[string]string{
		handshake + "EOF": "DEBUG",
		handshake + "read tcp 1.1.1.1:443->1.2.3.4:5: read: connection reset by peer": "DEBUG",
		handshake + "read tcp 1.1.1.1:443->1.2.3.4:5: i/o timeout":                    "DEBUG",
		handshake + "tls: no cipher suite supported by both client and server":        "WARN",
		"http: Accept error: accept tcp: too many open files; retrying in 5ms":        "ERROR",
		"http: panic serving 1.2.3.4:5: boom\ngoroutine 1 [running]:":                 "ERROR",
		"http2: panic serving 1.2.3.4:5: boom\ngoroutine 1 [running]:":                "ERROR",
		"http: superfluous response.WriteHeader call from main.f":                     "WARN",
	} {
		var logs logBuffer
		srv := newServer(t, &conduit.Config{Handler: http.NotFoundHandler(), Logger: logs.logger()})
		srv.HTTPServer().ErrorLog.Print(text)
		if lines := logs.lines(); len(lines) != 1 || lines[0]["level"] != level || lines[0]["err"] != text || lines[0]["msg"] != "net/http" {
			t.Errorf("%q was logged as %v, want level %s", text, lines, level)
		}
	}
}

func TestHeadersThatAreTooLargeGet431(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		url := p.serve(t, p.server(t, &conduit.Config{Handler: textHandler("ok"), MaxHeaderBytes: 8 << 10}))
		req, _ := http.NewRequest("GET", url, nil)
		size := 13 << 10 // HTTP/1 lets 4096 bytes more through
		if !p.http1 {
			size = 8<<10 + 100 // far more than the limit gets a GOAWAY
		}
		req.Header.Set("X-Large", strings.Repeat("x", size))
		got, err := try(p.client(t), req)
		// An HTTP/2 client that has the server's settings by now does not ask.
		refused := err != nil && !p.http1 && strings.Contains(err.Error(), "larger than peer's advertised limit")
		if got.status != http.StatusRequestHeaderFieldsTooLarge && !refused {
			t.Errorf("a header of %d bytes: %d, %v; want 431", size, got.status, err)
		}
		if got := get(t, p.client(t), url); got.body != "ok" {
			t.Errorf("afterwards %+v, want ok", got)
		}
	})
}

// A write that comes too late would land in a buffer that net/http has given
// to another request, and on HTTP/2 it would crash the process.
func TestLateUsesOfAResponseWriterAreRefused(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		returned, done := make(chan struct{}), make(chan map[string]error, 1)
		url := serveHandler(t, p, nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/late" {
				io.WriteString(w, "ok")
				return
			}
			go func() {
				<-returned
				w.Header().Set("X-Late", "1")
				w.WriteHeader(http.StatusTeapot)
				rc := http.NewResponseController(w)
				_, write := w.Write([]byte("late"))
				_, text := io.WriteString(w, "late")
				_, readFrom := w.(io.ReaderFrom).ReadFrom(strings.NewReader("late"))
				_, _, hijack := rc.Hijack()
				done <- map[string]error{
					"Write": write, "WriteString": text, "ReadFrom": readFrom, "Flush": rc.Flush(), "Hijack": hijack,
					"SetWriteDeadline": rc.SetWriteDeadline(time.Unix(1, 0)), "SetReadDeadline": rc.SetReadDeadline(time.Unix(1, 0)),
					"EnableFullDuplex": rc.EnableFullDuplex(), "Push": w.(http.Pusher).Push("/x", nil),
				}
			}()
		}))
		client := p.client(t)
		get(t, client, url+"/late")
		close(returned)
		for use, err := range <-done {
			if err == nil || err.Error() != "conduit: write after the handler has returned" {
				t.Errorf("late %s = %v, want it refused", use, err)
			}
		}
		if got := get(t, client, url); got.body != "ok" {
			t.Errorf("the next response = %+v, want ok", got)
		}
	})
}

// HTTP/1.0 ends a body by the end of its connection: only a reset says that it
// came too soon.
func TestHTTP10AbortIsAReset(t *testing.T) {
	large := strings.Repeat("0123456789", 2000)
	started := func(then func(w http.ResponseWriter, r *http.Request)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, large)
			w.(http.Flusher).Flush()
			then(w, r)
		}
	}
	panics := started(func(http.ResponseWriter, *http.Request) { panic("boom") })
	waits := started(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	items := func(yield func(string, error) bool) { _ = yield(large, nil) && yield("", errors.New("no more")) }
	tests := []struct {
		name    string
		chain   conduit.Middleware
		handler http.HandlerFunc
		whole   bool
	}{
		{"panic", conduit.Recovery(), panics, false},
		{"panic without Recovery", conduit.Chain(), panics, false},
		{"ErrAbortHandler", conduit.Compression(), started(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), false},
		{"Timeout", conduit.Timeout(20 * time.Millisecond), waits, false},
		{"FastTimeout", conduit.FastTimeout(20 * time.Millisecond), waits, false},
		{"failing stream", conduit.Timeout(time.Minute), func(w http.ResponseWriter, r *http.Request) { conduit.StreamJSON(w, r, items) }, false},
		{"WriteTimeout", conduit.Chain(), started(func(w http.ResponseWriter, _ *http.Request) {
			http.NewResponseController(w).SetWriteDeadline(time.Now())
			io.WriteString(w, "the end")
		}), false},
		{"Shutdown", conduit.Chain(), waits, false},
		{"whole", conduit.Recovery(), started(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, large) }), true},
		{"whole and small", conduit.Timeout(time.Minute), func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "small") }, true},
		{"500", conduit.Recovery(), func(http.ResponseWriter, *http.Request) { panic("boom") }, true},
	}
	for _, tt := range tests {
		for _, secure := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/TLS %v", tt.name, secure), func(t *testing.T) {
				srv := protocol{secure: secure, http1: true}.server(t, &conduit.Config{Handler: tt.chain(tt.handler)})
				var conn net.Conn
				conn, _ = rawDial(t, strings.TrimPrefix(serve(t, srv), "http://"))
				if secure {
					conn = tls.Client(conn, &tls.Config{RootCAs: testCertificate().pool, ServerName: "conduit.test"})
				}
				io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
				if tt.name == "Shutdown" {
					io.ReadFull(conn, make([]byte, len(large)))
					ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
					defer cancel()
					srv.Shutdown(ctx)
				}
				got, err := io.ReadAll(conn)
				if tt.whole && err != nil || !tt.whole && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%d bytes and %v, want a reset: %v", len(got), err, !tt.whole)
				}
			})
		}
	}
}

// wrappers are the parts that put a ResponseWriter of their own around another.
var wrappers = map[string]conduit.Middleware{
	"Server":      conduit.Chain(),
	"RequestID":   conduit.RequestID(),
	"Compression": conduit.Compression(),
	"Timeout":     conduit.Timeout(time.Minute),
	"FastTimeout": conduit.FastTimeout(time.Minute),
	"chain":       conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression()),
}

// eachWrapper runs a test with each of them around its handler, in a conduit
// Server and in a plain one.
func eachWrapper(t *testing.T, p protocol, test func(t *testing.T, serve func(h http.HandlerFunc) (url string), logs *logBuffer)) {
	for name, mw := range wrappers {
		t.Run(name, func(t *testing.T) {
			var logs logBuffer
			test(t, func(h http.HandlerFunc) string { return serveHandler(t, p, &logs, mw(h)) }, &logs)
		})
		t.Run(name+"/plain", func(t *testing.T) {
			var logs logBuffer
			old := slog.Default()
			slog.SetDefault(logs.logger())
			defer slog.SetDefault(old)
			test(t, func(h http.HandlerFunc) string {
				l, hs := listen(t), p.server(t, &conduit.Config{Handler: mw(h)}).HTTPServer()
				t.Cleanup(func() { hs.Close() })
				if p.secure {
					go hs.ServeTLS(l, "", "")
					return "https://" + l.Addr().String()
				}
				go hs.Serve(l)
				return "http://" + l.Addr().String()
			}, &logs)
		})
	}
}

func TestInformationalResponsesPassAndAreNotTheStatus(t *testing.T) {
	text := compressionJSON(4 << 10)
	eachProtocol(t, func(t *testing.T, p protocol) {
		eachWrapper(t, p, func(t *testing.T, serve func(http.HandlerFunc) string, logs *logBuffer) {
			url := serve(conduit.Logging()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Link", "</style.css>; rel=preload")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusNotFound)
				io.WriteString(w, text)
			})).ServeHTTP)
			var hints []string
			req, _ := http.NewRequestWithContext(traceInformational(t.Context(), &hints), "GET", url, nil)
			got := do(t, p.client(t), req)
			if got.status != http.StatusNotFound || got.body != text || !slices.Equal(hints, []string{"103 </style.css>; rel=preload"}) {
				t.Errorf("status %d with %d bytes after %q, want 404 with %d after the hint", got.status, len(got.body), hints, len(text))
			}
			if line := logs.request(t); line["status"] != 404.0 {
				t.Errorf("logged status %v, want 404", line["status"])
			}
		})
	})
}

// gin and others take every ResponseWriter for an http.CloseNotifier.
func TestCloseNotifyTellsThatTheClientHasLeft(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		eachWrapper(t, p, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
			told := make(chan bool, 1)
			ctx, leave := context.WithCancel(t.Context())
			url := serve(func(w http.ResponseWriter, r *http.Request) {
				left := w.(interface{ CloseNotify() <-chan bool }).CloseNotify()
				leave()
				told <- <-left
			})
			req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
			if res, err := p.client(t).Do(req); err == nil {
				t.Errorf("got %s, want no response", res.Status)
			}
			if !<-told {
				t.Error("the channel was closed, want a value")
			}
		})
	})
	for _, limit := range timeouts {
		limit.new(time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-w.(interface{ CloseNotify() <-chan bool }).CloseNotify() // for a handler that looks at nothing else
		})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	}
}

func TestPushIsForwarded(t *testing.T) {
	for _, p := range []protocol{http1Protocol, h2cProtocol} {
		eachWrapper(t, p, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
			url := serve(func(w http.ResponseWriter, r *http.Request) {
				pusher, ok := w.(http.Pusher)
				if !ok {
					return // net/http's own on HTTP/1
				}
				const want = "feature not supported" // its client takes no push
				if err := pusher.Push("/style.css", nil); err == nil || err.Error() != want {
					t.Errorf("Push = %v, want %s", err, want)
				}
			})
			get(t, p.client(t), url)
		})
	}
}

// net/http gets the signal of its MaxBytesReader through no wrapper.
func TestA413EndsARequestThatStalls(t *testing.T) {
	eachWrapper(t, http1Protocol, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
		url := serve(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1000)); err != nil {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
			}
		})
		// Within the 10 seconds of sendRaw, which is before ReadTimeout.
		res, _ := sendRaw(t, url, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 2000))
		if res.StatusCode != 413 || !res.Close {
			t.Errorf("got %d, close %v; want 413 with Connection: close", res.StatusCode, res.Close)
		}
	})
}

func TestTrailersOfARequestArrive(t *testing.T) {
	eachWrapper(t, http1Protocol, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
		url := serve(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(w, r.Body)
			fmt.Fprint(w, r.Trailer)
		})
		for _, announced := range []string{"", "Trailer: X-Sum\r\n"} {
			const want = "bodymap[X-Sum:[42]]"
			_, body := sendRaw(t, url, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"+announced+"\r\n4\r\nbody\r\n0\r\nX-Sum: 42\r\n\r\n")
			if body != want {
				t.Errorf("announced %q: got %q, want %q", announced, body, want)
			}
		}
	})
}

// sendRaw sends a request as it is on a connection of its own.
func sendRaw(t *testing.T, url, request string) (res *http.Response, body string) {
	t.Helper()
	conn, br := rawDial(t, strings.TrimPrefix(url, "http://"))
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, request)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%q: %d, then %v after %d bytes", request, res.StatusCode, err, len(text))
	}
	return res, string(text)
}

// Routers respond to an error that a handler has returned when the middleware
// in them has ended.
func TestWritesAfterAMiddlewareHasEndedPass(t *testing.T) {
	for name, inner := range wrappers {
		for _, tt := range []struct {
			method, written, body, late string
			status                      int
		}{
			{"GET", "", "not found", "1", 404},
			{"HEAD", "", "", "1", 404},
			{"GET", "found, ", "found, not found", "", 200},
			{"HEAD", "found, ", "", "", 200},
		} {
			url := serveHandler(t, http1Protocol, nil, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				inner(http.HandlerFunc(func(inside http.ResponseWriter, r *http.Request) {
					w = inside
					w.Header().Set("X-Early", "1")
					if tt.written != "" {
						io.WriteString(w, tt.written)
					}
				})).ServeHTTP(w, r)
				w.Header().Set("X-Late", "1")
				w.WriteHeader(http.StatusNotFound)
				io.WriteString(w, "not ")
				w.(io.ReaderFrom).ReadFrom(strings.NewReader("fou"))
				w.Write([]byte("nd"))
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Errorf("%s: Flush = %v, want nil", name, err)
				}
			}))
			got := compressionGet(t, http.DefaultClient, url, tt.method, nil)
			if got.status != tt.status || got.body != tt.body || got.header.Get("X-Early") != "1" || got.header.Get("X-Late") != tt.late {
				t.Errorf("%s, %s, written before %q: %d %q %v, want %d %q", name, tt.method, tt.written, got.status, got.body, got.header, tt.status, tt.body)
			}
		}
	}
}

func TestASecondWriteHeaderIsLoggedWithItsCaller(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		eachWrapper(t, p, func(t *testing.T, serve func(http.HandlerFunc) string, logs *logBuffer) {
			url := serve(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/plain")
				w.WriteHeader(http.StatusAccepted)
				w.WriteHeader(http.StatusTeapot)
				http.Error(w, "late", http.StatusTeapot)
				w.WriteHeader(http.StatusEarlyHints)
			})
			get(t, p.client(t), url)
			lines := logs.find("superfluous WriteHeader")
			for _, line := range lines {
				if caller, _ := line["caller"].(string); line["level"] != "WARN" || !strings.Contains(caller, "conduit_test.TestASecond") || !strings.Contains(caller, "(conduit_test.go:") {
					t.Errorf("logged %v, want this function", line)
				}
			}
			if !strings.Contains(t.Name(), "/Server/plain") && (len(lines) != 3 || len(logs.find("net/http")) > 0) {
				t.Errorf("logged %s, want three lines of ours", logs.String())
			}
		})
	})
}

func TestWritesToAHijackedConnectionFail(t *testing.T) {
	eachWrapper(t, http1Protocol, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
		url := serve(func(w http.ResponseWriter, r *http.Request) {
			conn := hijack(w)
			defer conn.Close()
			io.WriteString(conn, "HTTP/1.1 204 No Content\r\n\r\n")
			w.WriteHeader(http.StatusTeapot)
			if _, err := io.WriteString(w, "text"); !errors.Is(err, http.ErrHijacked) {
				t.Errorf("Write = %v, want ErrHijacked", err)
			}
		})
		if got := get(t, http.DefaultClient, url); got.status != 204 {
			t.Errorf("status %d, want the handler's own 204", got.status)
		}
	})
}

func hijack(w http.ResponseWriter) net.Conn {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	return conn
}

func TestASourceThatFailsAtOnceLeavesTheStatusOpen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	eachWrapper(t, http1Protocol, func(t *testing.T, serve func(http.HandlerFunc) string, _ *logBuffer) {
		for _, header := range []http.Header{nil, {"Content-Type": {"text/plain"}, "Content-Length": {"5000"}}, {"Content-Type": {"image/png"}}} {
			got := get(t, http.DefaultClient, serve(func(w http.ResponseWriter, r *http.Request) {
				unreadable, err := os.OpenFile(name, os.O_WRONLY, 0)
				if err != nil {
					panic(err)
				}
				defer unreadable.Close()
				maps.Copy(w.Header(), header)
				for _, src := range []io.Reader{unreadable, struct{ io.Reader }{unreadable}} {
					if n, err := io.Copy(w, src); n != 0 || err == nil {
						t.Errorf("copied %d bytes of a file opened for writing, %v", n, err)
					}
				}
				http.Error(w, "gone", http.StatusBadGateway)
			}))
			if got.status != http.StatusBadGateway || got.body != "gone\n" {
				t.Errorf("%v: %d %q, want 502 gone", header, got.status, got.body)
			}
		}
	})
}

// What could not be flushed at all leaves the status to the handler.
func TestFlushReportsItsError(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		wrap   func(http.ResponseWriter) http.ResponseWriter
		err    error
		status int
	}{
		{func(w http.ResponseWriter) http.ResponseWriter { return flushErrorWriter{w, broken} }, broken, 200},
		{func(w http.ResponseWriter) http.ResponseWriter { return struct{ http.ResponseWriter }{w} }, http.ErrNotSupported, 404},
	} {
		for name, mw := range wrappers {
			for _, contentType := range []string{"", "text/plain", "image/png"} {
				rec := httptest.NewRecorder()
				h := conduit.Chain(conduit.Recovery(), mw)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if contentType != "" {
						w.Header().Set("Content-Type", contentType)
					}
					if err := http.NewResponseController(w).Flush(); !errors.Is(err, tt.err) {
						t.Errorf("%s, %q: Flush = %v, want %v", name, contentType, err, tt.err)
					}
					w.(http.Flusher).Flush()
					w.WriteHeader(http.StatusNotFound)
				}))
				h.ServeHTTP(tt.wrap(rec), compressionRequest("GET", "/", nil))
				if rec.Code != tt.status {
					t.Errorf("%s, %q, %v: status %d, want %d", name, contentType, tt.err, rec.Code, tt.status)
				}
			}
		}
	}
}

type flushErrorWriter struct {
	http.ResponseWriter
	err error
}

func (w flushErrorWriter) FlushError() error { return w.err }

// Draining

func TestResponsesSayCloseOnceTheServerDrains(t *testing.T) {
	handlers := map[string]func(w http.ResponseWriter){
		"nothing":         func(w http.ResponseWriter) {},
		"status":          func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) },
		"header and text": func(w http.ResponseWriter) { w.Header().Set("X", "1"); io.WriteString(w, "text") },
		"flush":           func(w http.ResponseWriter) { w.(http.Flusher).Flush() },
		"reader":          func(w http.ResponseWriter) { io.Copy(w, strings.NewReader("text")) },
		"long":            func(w http.ResponseWriter) { w.Write(make([]byte, 100_000)) },
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		for name, respond := range handlers {
			t.Run(name, func(t *testing.T) {
				started, proceed := make(chan struct{}, 1), make(chan struct{})
				chain := conduit.Chain(conduit.RequestID(), conduit.Logging(), conduit.Timeout(time.Minute))
				srv := p.server(t, &conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/wait" {
						started <- struct{}{}
						<-proceed
					}
					respond(w)
				}))})
				var conns atomic.Int64
				srv.HTTPServer().ConnState = func(_ net.Conn, state http.ConnState) {
					if state == http.StateNew {
						conns.Add(1)
					}
				}
				url, client := p.serve(t, srv), p.client(t)
				if got := get(t, client, url); got.close {
					t.Fatal("Connection: close before the drain")
				}
				responded := make(chan response, 1)
				go func() { responded <- get(t, client, url+"/wait") }()
				<-started
				srv.Drain()
				close(proceed)
				before, during := <-responded, get(t, client, url)
				if p.http1 && (!before.close || !during.close) {
					t.Errorf("Connection: close for a request from before the drain %v, from during it %v; want both", before.close, during.close)
				}
				// HTTP/2 says it with a GOAWAY: the next request dials.
				if n := conns.Load(); n < 2 {
					t.Errorf("%d connections, want a new one after the drain began", n)
				}
			})
		}
	})
}

// net/http would respond to it before the server's own handler.
func TestOptionsOfTheServerAreARequest(t *testing.T) {
	for _, own := range []bool{false, true} {
		srv := newServer(t, conduit.DefaultConfig(textHandler("handler")))
		srv.HTTPServer().DisableGeneralOptionsHandler = own
		url := serve(t, srv)
		for _, draining := range []bool{false, true} {
			if draining {
				srv.Drain()
			}
			res, body := sendRaw(t, url, "OPTIONS * HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody")
			if res.StatusCode != 200 || res.Close != draining || (body == "handler") != own {
				t.Errorf("draining %v, own %v: %d %q, close %v", draining, own, res.StatusCode, body, res.Close)
			}
		}
	}
}

func TestAnUpgradeIsNotToldToClose(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "test")
		w.WriteHeader(http.StatusSwitchingProtocols)
	}))))
	url := serve(t, srv)
	srv.Drain()
	res, _ := sendRaw(t, url, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: test\r\nAccept-Encoding: gzip\r\n\r\n")
	if res.StatusCode != 101 || res.Header.Get("Connection") != "Upgrade" {
		t.Errorf("got %d %v, want 101 with Connection: Upgrade", res.StatusCode, res.Header)
	}
}

func TestDrainClosesDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		srv, client, url := serveInBubble(t, http1Protocol, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-conduit.Draining(r.Context())
			close(ended)
		})))
		var all sync.WaitGroup
		all.Go(func() { get(t, client, url) })
		synctest.Wait()
		select {
		case <-srv.Draining():
			t.Error("Server.Draining was closed before the drain")
		case <-ended:
			t.Error("Draining was closed before the drain")
		default:
		}
		srv.Drain()
		<-srv.Draining()
		<-ended
		all.Wait()
	})
}

func TestLoggerIsTheServersWithTheID(t *testing.T) {
	var logs logBuffer
	url := serveHandler(t, http1Protocol, &logs, conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conduit.Logger(r.Context()).Info("hello")
	})))
	req, _ := http.NewRequest("GET", url, nil)
	req.Header.Set("X-Request-ID", "abc")
	do(t, http.DefaultClient, req)
	if lines := logs.find("hello"); len(lines) != 1 || lines[0]["request_id"] != "abc" {
		t.Errorf("logged %v, want one line with request_id abc", lines)
	}
	if c, l, id := conduit.Draining(t.Context()), conduit.Logger(t.Context()), conduit.RequestIDFrom(t.Context()); c != nil || l != slog.Default() || id != "" {
		t.Errorf("outside a Server: Draining %v, Logger %v, RequestIDFrom %q; want nil, slog.Default and none", c, l, id)
	}
}

func TestHealth(t *testing.T) {
	type checks = []func(context.Context) error
	failing := func(context.Context) error { return errors.New("secret: disk full") }
	ok := func(context.Context) error { return nil }
	own := http.Header{"Cache-Control": {"no-store"}, "Content-Type": {"application/json"}}
	for _, tt := range []struct {
		name   string
		method string
		drain  bool
		checks checks
		status int
		body   string
		header http.Header
		logged int
	}{
		{"no checks", "GET", false, nil, 200, `{"status":"ok"}`, own, 0},
		{"passing", "GET", false, checks{ok, ok}, 200, `{"status":"ok"}`, own, 0},
		{"failing", "GET", false, checks{ok, failing, ok}, 503, `{"status":"failing"}`, own, 1},
		{"draining", "GET", true, checks{failing}, 503, `{"status":"draining"}`, own, 0},
		{"HEAD", "HEAD", false, checks{failing}, 503, "", own, 1},
		{"POST", "POST", false, nil, 405, "Method Not Allowed\n", http.Header{"Allow": {"GET, HEAD"}}, 0},
	} {
		var logs logBuffer
		srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Health(tt.checks...)})
		req, _ := http.NewRequest(tt.method, serve(t, srv), nil)
		if tt.drain {
			srv.Drain()
		}
		got := do(t, http.DefaultClient, req)
		if got.status != tt.status || got.body != tt.body {
			t.Errorf("%s: %d %q, want %d %q", tt.name, got.status, got.body, tt.status, tt.body)
		}
		for field, values := range tt.header {
			if !slices.Equal(got.header[field], values) {
				t.Errorf("%s: %s %q, want %q", tt.name, field, got.header[field], values)
			}
		}
		lines := logs.find("health check failed")
		if len(lines) != tt.logged || tt.logged > 0 && !strings.Contains(fmt.Sprint(lines[0]["err"]), "disk full") {
			t.Errorf("%s: logged %v, want %d lines that say why", tt.name, lines, tt.logged)
		}
	}
}

func TestHealthRespondsInTimeWhateverACheckDoes(t *testing.T) {
	for _, tt := range []struct {
		err          string // of the check
		check        func(ctx context.Context, forever chan struct{}) error
		first, again time.Duration // how long a request takes
		runs         int64         // of the checks, at most
	}{
		{"check 2", func(ctx context.Context, _ chan struct{}) error { <-ctx.Done(); return ctx.Err() }, 5 * time.Second, 5 * time.Second, 2},
		{"check 2 has not returned in time", func(_ context.Context, forever chan struct{}) error { <-forever; return nil }, 5 * time.Second, 0, 1},
		{"check 2: panic: boom", func(context.Context, chan struct{}) error { panic("boom") }, 0, 0, 6},
		{"check 2: ended its goroutine", func(context.Context, chan struct{}) error { runtime.Goexit(); return nil }, 0, 0, 6},
	} {
		synctest.Test(t, func(t *testing.T) {
			var logs logBuffer
			var runs atomic.Int64
			forever := make(chan struct{})
			defer close(forever)
			first := func(ctx context.Context) error {
				if runs.Add(1); conduit.Draining(ctx) == nil {
					t.Error("the context has no values of the request")
				}
				return nil
			}
			h := conduit.Health(first, func(ctx context.Context) error { return tt.check(ctx, forever) })
			_, client, url := serveInBubble(t, http1Protocol, &conduit.Config{Logger: logs.logger(), Handler: h})
			for _, want := range []time.Duration{tt.first, tt.again} {
				start := time.Now()
				var probes sync.WaitGroup
				for range 3 { // at the same time
					probes.Go(func() {
						if got := get(t, client, url); got.status != 503 || time.Since(start) != want {
							t.Errorf("%s: %d after %v, want 503 after %v", tt.err, got.status, time.Since(start), want)
						}
					})
				}
				probes.Wait()
				synctest.Wait()
			}
			if n := runs.Load(); n > tt.runs {
				t.Errorf("%s: the checks ran %d times, want at most %d", tt.err, n, tt.runs)
			}
			for _, line := range logs.find("health check failed") {
				if err := fmt.Sprint(line["err"]); !strings.HasPrefix(err, "conduit: Health: "+tt.err) {
					t.Errorf("logged %q, want %q", err, tt.err)
				}
			}
		})
	}
}

// serveInBubble serves over net.Pipe in a bubble of testing/synctest.
func serveInBubble(t *testing.T, p protocol, cfg *conduit.Config) (srv *conduit.Server, client *http.Client, url string) {
	t.Helper()
	srv, client, url = p.server(t, cfg), p.client(t), "http://conduit.test/"
	if p.secure {
		url = "https://conduit.test/"
	}
	l := newPipeListener()
	client.Transport.(*http.Transport).DialContext = func(context.Context, string, string) (net.Conn, error) { return l.dial(), nil }
	serveBubble(t, srv, l)
	return srv, client, url
}

// Neither a shutdown nor the log suffers from a prober that gives up.
func TestHealthOfAProberThatGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		block := make(chan struct{})
		defer close(block)
		h := conduit.Logging()(conduit.Health(func(context.Context) error { <-block; return nil }))
		srv, client, url := serveInBubble(t, http1Protocol, &conduit.Config{Logger: logs.logger(), Handler: h})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
		if res, err := client.Do(req); err == nil {
			t.Errorf("got %s, want no response", res.Status)
		}
		synctest.Wait()
		if line := logs.request(t); line["level"] != "INFO" || line["aborted"] != true || strings.Contains(logs.String(), "ERROR") {
			t.Errorf("logged %s, want one line at level info", logs.String())
		}
		start := time.Now()
		if err := srv.Shutdown(t.Context()); err != nil || time.Since(start) > time.Second {
			t.Errorf("Shutdown took %v, %v", time.Since(start), err)
		}
	})
}

// A timeout is not a prober that gives up: its 503 is whole.
func TestHealthInsideATimeout(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		var logs logBuffer
		slow := conduit.Health(func(context.Context) error { time.Sleep(3 * time.Second); return nil })
		_, client, url := serveInBubble(t, p, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.Logging(), limit.new(time.Second))(slow)})
		if got := get(t, client, url); got.status != 503 || got.body != "Service Unavailable\n" {
			t.Errorf("got %+v, want the 503 of the timeout", got)
		}
		synctest.Wait()
		if line := logs.request(t); line["status"] != 503.0 || line["aborted"] != nil {
			t.Errorf("logged %v, want a whole 503", line)
		}
		time.Sleep(5 * time.Second) // the check has ended
	})
}

func TestProgrammersMistakesPanic(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
	const notMade, tooShort = "conduit: Server: was not made by New", "too short; is a unit such as time.Second missing?"
	newEncoder := func() conduit.EncodingWriter { return gzip.NewWriter(nil) }
	compression := func(cfg conduit.CompressionConfig) func() { return func() { conduit.CompressionWith(&cfg) } }
	encoder := func(encoders ...conduit.Encoder) func() {
		return compression(conduit.CompressionConfig{Encoders: encoders})
	}
	shutdown := func(cfg conduit.ShutdownConfig) func() { return func() { conduit.NewGracefulShutdown(srv, &cfg) } }
	noHandler := func(http.Handler) http.Handler { return nil }
	invalidStatus := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(1000) })
	tests := []struct {
		name string
		want string
		call func()
	}{
		{"zero Server", notMade, func() { new(conduit.Server).Serve(newPipeListener()) }},
		{"zero Server that listens", notMade, func() { new(conduit.Server).ListenAndServe() }},
		{"zero Server that stops", notMade, func() { new(conduit.Server).Shutdown(t.Context()) }},
		{"zero Server that closes", notMade, func() { new(conduit.Server).Close() }},
		{"zero Server that drains", notMade, func() { new(conduit.Server).Drain() }},
		{"zero Server in a shutdown", notMade, func() { conduit.NewGracefulShutdown(new(conduit.Server), nil) }},
		{"nil check", "conduit: Health: check 2", func() { conduit.Health(func(context.Context) error { return nil }, nil) }},
		{"nil middleware", "conduit: Chain: middleware 1", func() { conduit.Chain(nil) }},
		{"middleware that returns nil", "conduit: Chain: middleware 2 returns no handler", func() { conduit.Chain(conduit.RequestID(), noHandler)(invalidStatus) }},
		{"Chain of nil", "conduit: Chain: the handler is nil", func() { conduit.Chain()(nil) }},
		{"RequestID of nil", "conduit: RequestID: the handler is nil", func() { conduit.RequestID()(nil) }},
		{"Recovery of nil", "conduit: Recovery: the handler is nil", func() { conduit.Recovery()(http.HandlerFunc(nil)) }},
		{"Logging of nil", "conduit: Logging: the handler is nil", func() { conduit.Logging()(nil) }},
		{"Compression of nil", "conduit: Compression: the handler is nil", func() { conduit.Compression()((*http.ServeMux)(nil)) }},
		{"invalid status", "invalid WriteHeader code 1000", func() { compressionRecord(t, conduit.Compression()(invalidStatus), "GET", nil) }},
		{"two errors", "conduit: Level: 10 is not between 1 and 9\nconduit: Types: \"[\": ", compression(conduit.CompressionConfig{Level: 10, Types: []string{"["}})},
		{"negative level", "conduit: Level: -1 ", compression(conduit.CompressionConfig{Level: -1})},
		{"malformed type", `conduit: Types: "text/[": `, compression(conduit.CompressionConfig{Types: []string{"text/*", "text/["}})},
		{"half a type", `conduit: Types: "json": a media type has a slash`, compression(conduit.CompressionConfig{Types: []string{"json"}})},
		{"coding without a name", `conduit: Encoders: 1: Coding: "" is not `, encoder(conduit.Encoder{New: newEncoder})},
		{"coding in capitals", `conduit: Encoders: 1: Coding: "BR" is not `, encoder(conduit.Encoder{Coding: "BR", New: newEncoder})},
		{"identity as a coding", `conduit: Encoders: 1: Coding: "identity" is not `, encoder(conduit.Encoder{Coding: "identity", New: newEncoder})},
		{"coding without New", `conduit: Encoders: 1: New: is required for "br"`, encoder(conduit.Encoder{Coding: "br"})},
		{"coding twice", `conduit: Encoders: 2: Coding: "br" is there twice`, encoder(conduit.Encoder{Coding: "br", New: newEncoder}, conduit.Encoder{Coding: "br", New: newEncoder})},
		{"Timeout of nil", "conduit: Timeout: the handler is nil", func() { conduit.Timeout(time.Second)(nil) }},
		{"duration without a unit", "conduit: Duration: 20ns: " + tooShort, func() { conduit.Timeout(20) }},
		{"no duration", "conduit: Duration: ", func() { conduit.Timeout(0) }},
		{"negative duration", "conduit: Duration: ", func() { conduit.FastTimeout(-1) }},
		{"nil timeout", "conduit: Duration: ", func() { conduit.TimeoutWith(nil) }},
		{"status that is no error", "conduit: Status: ", func() { conduit.TimeoutWith(&conduit.TimeoutConfig{Duration: time.Second, Status: 200}) }},
		{"nil server", "conduit: NewGracefulShutdown: ", func() { conduit.NewGracefulShutdown(nil, nil) }},
		{"shutdown without units", "conduit: Timeout: 30ns: " + tooShort + "\nconduit: HookTimeout: 5ns: ", shutdown(conduit.ShutdownConfig{Timeout: 30, HookTimeout: 5})},
		{"no time to drain", "conduit: Timeout: 1s leaves no time to drain beside Delay, 600ms, and HookTimeout, 400ms", shutdown(conduit.ShutdownConfig{Timeout: time.Second, Delay: 600 * time.Millisecond, HookTimeout: 400 * time.Millisecond})},
		{"zero GracefulShutdown", "conduit: GracefulShutdown: was not made by NewGracefulShutdown", func() { new(conduit.GracefulShutdown).Start() }},
		{"zero GracefulShutdown that stops", "conduit: GracefulShutdown: was not made by NewGracefulShutdown", func() { new(conduit.GracefulShutdown).Shutdown() }},
		{"nil hook", "conduit: RegisterHook: ", func() { conduit.NewGracefulShutdown(srv, nil).RegisterHook(nil) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			defer func() {
				if got := fmt.Sprint(recover()); !strings.HasPrefix(got, tt.want) {
					t.Errorf("panic %q, want it to begin with %q", got, tt.want)
				}
			}()
			tt.call()
		})
	}
}

// Middleware

func TestChainRunsTheFirstOutermost(t *testing.T) {
	var order []string
	mark := func(name string) conduit.Middleware {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				order = append(order, name)
				next.ServeHTTP(w, r)
			})
		}
	}
	h := http.Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { order = append(order, "h") }))
	conduit.Chain(mark("a"), conduit.Chain(mark("b"), conduit.Chain(), mark("c")), mark("d"))(h).ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if got := strings.Join(order, ""); got != "abcdh" {
		t.Errorf("order = %s, want abcdh", got)
	}
}

var madeRequestID = regexp.MustCompile(`^[A-Z2-7]{26}$`)

func TestRequestIDMakesOneIfThereIsNotExactlyOne(t *testing.T) {
	seen := map[string]bool{}
	var inContext string
	h := conduit.Chain(conduit.RequestID(), conduit.RequestID())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		inContext = conduit.RequestIDFrom(r.Context())
	}))
	for range 50 {
		for _, in := range [][]string{nil, {"a", "b"}} {
			req, rec := httptest.NewRequest("GET", "/", nil), httptest.NewRecorder()
			req.Header["X-Request-Id"] = in
			h.ServeHTTP(rec, req)
			if got := rec.Header()["X-Request-Id"]; len(got) != 1 || got[0] != inContext || seen[got[0]] || !madeRequestID.MatchString(got[0]) {
				t.Fatalf("%q became %q, in the context %q; want a new one", in, got, inContext)
			}
			seen[inContext] = true
		}
	}
}

func FuzzRequestID(f *testing.F) {
	for _, seed := range []string{"A-z_0.9", strings.Repeat("a", 128), strings.Repeat("a", 129), "", "a\nlevel=ERROR", "a b", `a"b`, "ä", "a\x00"} {
		f.Add(seed)
	}
	sane := regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	h := conduit.RequestID()(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	f.Fuzz(func(t *testing.T, in string) {
		req, rec := httptest.NewRequest("GET", "/", nil), httptest.NewRecorder()
		req.Header.Set("X-Request-ID", in)
		h.ServeHTTP(rec, req)
		got := rec.Header().Get("X-Request-ID")
		if kept := got == in; kept != sane.MatchString(in) || !kept && !madeRequestID.MatchString(got) {
			t.Errorf("%q became %q, want it kept if it is sane, and a new one if not", in, got)
		}
	})
}

// A context that outlives its request must still have its values.
func TestRequestContextOutlivesItsRequest(t *testing.T) {
	type key struct{}
	var kept []context.Context
	h := conduit.Chain(conduit.RequestID(), conduit.Timeout(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kept = append(kept, context.WithValue(context.WithoutCancel(r.Context()), key{}, "v"))
	}))
	ids := []string{"first", "second"}
	for _, id := range ids {
		req := httptest.NewRequest("GET", "/", nil)
		req.Header.Set("X-Request-ID", id)
		h.ServeHTTP(httptest.NewRecorder(), req)
	}
	for i, id := range ids {
		if got := conduit.RequestIDFrom(kept[i]); got != id {
			t.Errorf("the context of %s now says %q", id, got)
		}
	}
}

// net/http removes the temporary files of a form that it finds on its own request
// (golang/go#58809). For the pattern, which the log has, see TestLogLine.
func TestTemporaryFilesOfAFormAreRemoved(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	count := func() int {
		entries, _ := os.ReadDir(dir)
		return len(entries)
	}
	for _, limit := range append(timeouts, noTimeout) {
		for _, path := range []string{"/returns", "/panics"} {
			var files int
			chain := conduit.Chain(conduit.Recovery(), conduit.RequestID(), limit.new(time.Minute))
			url := serveHandler(t, http1Protocol, nil, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if err := r.ParseMultipartForm(1); err != nil {
					t.Error(err)
				}
				if files = count(); r.URL.Path == "/panics" {
					panic("after parsing")
				}
			})))
			body, contentType := multipartBody(t)
			req, _ := http.NewRequest("POST", url+path, body)
			req.Header.Set("Content-Type", contentType)
			do(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, req)
			if files != 1 {
				t.Fatalf("%s, %s: %d temporary files while the handler ran, want 1", limit.name, path, files)
			}
			// They go right after the response.
			for deadline := time.Now().Add(5 * time.Second); count() > 0; runtime.Gosched() {
				if time.Now().After(deadline) {
					t.Fatalf("%s, %s: %d temporary files are left", limit.name, path, count())
				}
			}
		}
	}
}

func TestRecoveryResponds500(t *testing.T) {
	const goexit = "handler ended its goroutine"
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, tt := range []struct {
			name, message string
			end           func()
		}{
			{"panic", "panic", func() { endByPanic("secret") }},
			{"error", "panic", func() { endByPanic(errors.New("secret")) }},
			{"nil", "panic", func() { endByPanic(nil) }},
			{"Goexit", goexit, runtime.Goexit},
		} {
			for _, limit := range append(timeouts, noTimeout) {
				t.Run(tt.name+"/"+limit.name, func(t *testing.T) {
					var logs logBuffer
					chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(time.Minute))
					url := serveHandler(t, p, &logs, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("Content-Type", "image/png")
						for _, field := range representationFields {
							w.Header().Set(field, "1")
						}
						tt.end()
					})))
					req, _ := http.NewRequest("GET", url+"/path?token=secret", nil)
					got, err := try(p.client(t), req)
					if err != nil && !(tt.message == goexit && !p.http1) { // HTTP/2 resets the stream after it
						t.Error(err)
					}
					if got.status != 500 || got.body != "Internal Server Error\n" || got.header.Get("Content-Type") != "text/plain; charset=utf-8" || got.header.Get("X-Content-Type-Options") != "nosniff" {
						t.Errorf("got %d %v %q, want a plain 500", got.status, got.header, got.body)
					}
					nothingIsLeft(t, got.header)

					lines := logs.find(tt.message)
					if len(lines) != 1 || lines[0]["level"] != "ERROR" || lines[0]["path"] != "/path" || lines[0]["request_id"] == nil {
						t.Fatalf("logged %v, want one line %q with the path alone", lines, tt.message)
					}
					if stack, _ := lines[0]["stack"].(string); tt.message == "panic" && !strings.Contains(stack, "endByPanic") {
						t.Errorf("the stack does not lead to the handler:\n%s", stack)
					}
					if line := logs.request(t); line["status"] != 500.0 || line["aborted"] != nil || line["level"] != "ERROR" {
						t.Errorf("logged %v, want status 500", line)
					}
				})
			}
		}
	})
}

// representationFields say something of a body and its keeping.
var representationFields = []string{
	"Accept-Ranges", "Cache-Control", "CDN-Cache-Control", "Content-Digest", "Content-Disposition", "Content-Encoding",
	"Content-Language", "Content-Length", "Content-Location", "Content-Range", "ETag", "Expires", "Last-Modified", "Repr-Digest", "Trailer",
}

// nothingIsLeft fails the test if an error has a field of the response that it
// takes the place of.
func nothingIsLeft(t *testing.T, h http.Header) {
	t.Helper()
	for _, field := range representationFields {
		if v := h.Get(field); v == "1" {
			t.Errorf("%s is left of the response that never was: %v", field, h)
		}
	}
}

func endByPanic(value any) { panic(value) }

func TestRecoveryAbortsAResponseThatHasStarted(t *testing.T) {
	flushed := func(value any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "half")
			w.(http.Flusher).Flush()
			panic(value)
		}
	}
	recovery := conduit.Chain(conduit.Recovery(), conduit.Logging())
	chains := map[string]conduit.Middleware{
		"alone":               recovery,
		"outside Timeout":     conduit.Chain(recovery, conduit.Timeout(time.Minute)),
		"outside FastTimeout": conduit.Chain(recovery, conduit.FastTimeout(time.Minute)),
		"outside Compression": conduit.Chain(recovery, conduit.Compression()),
		"inside Timeout":      conduit.Chain(conduit.Timeout(time.Minute), recovery),
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, tt := range []struct {
			name    string
			handler http.HandlerFunc
			panics  int // in the log
		}{
			{"panic", flushed("late"), 1},
			{"ErrAbortHandler", flushed(http.ErrAbortHandler), 0},
			// Any number of bytes may have been sent.
			{"source that panics", func(w http.ResponseWriter, r *http.Request) { io.Copy(w, &panicReader{reads: 4}) }, 1},
		} {
			for name, chain := range chains {
				var logs logBuffer
				req, _ := http.NewRequest("GET", serveHandler(t, p, &logs, chain(tt.handler)), nil)
				if got, err := try(p.client(t), req); err == nil {
					t.Errorf("%s, %s: read %d bytes as a whole response, want an error", tt.name, name, len(got.body))
				}
				if line := logs.request(t); line["status"] != 200.0 || line["aborted"] != true {
					t.Errorf("%s, %s: logged %v, want status 200, aborted", tt.name, name, line)
				}
				if n, others := len(logs.find("panic")), len(logs.find("net/http")); n != tt.panics || others != 0 {
					t.Errorf("%s, %s: logged %s, want %d panics", tt.name, name, logs.String(), tt.panics)
				}
			}
		}
	})
}

func TestRecoveryRespondsForASourceThatPanicsAtOnce(t *testing.T) {
	h := conduit.Recovery()(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, &panicReader{}) }))
	eachProtocol(t, func(t *testing.T, p protocol) {
		if got := get(t, p.client(t), serveHandler(t, p, nil, h)); got.status != 500 {
			t.Errorf("got %+v, want 500", got)
		}
	})
}

type panicReader struct{ reads int }

func (r *panicReader) Read(p []byte) (int, error) {
	if r.reads--; r.reads < 0 {
		panic("out of data")
	}
	return copy(p, strings.Repeat("abcdefgh", len(p)/8)), nil
}

func TestLogLine(t *testing.T) {
	for _, limit := range append(timeouts, noTimeout) {
		t.Run(limit.name, func(t *testing.T) {
			var logs logBuffer
			mux := http.NewServeMux()
			mux.HandleFunc("GET /posts/{id}", func(w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(http.StatusAccepted)
				io.WriteString(w, "12345")
				w.Write([]byte("678"))
			})
			logging := conduit.LoggingWith(&conduit.LoggingConfig{
				Skip:  func(r *http.Request) bool { return r.URL.Path == "/health" },
				Attrs: func(r *http.Request) []slog.Attr { return []slog.Attr{slog.String("agent", r.UserAgent())} },
			})
			url := serveHandler(t, http1Protocol, &logs, conduit.Chain(logging, conduit.RequestID(), limit.new(time.Minute))(mux))
			get(t, http.DefaultClient, url+"/health")
			req, _ := http.NewRequest("GET", url+"/posts/7?token=secret", nil)
			req.Header.Set("User-Agent", "test")
			got := do(t, http.DefaultClient, req)
			line := logs.request(t)
			want := map[string]any{
				"msg": "request", "level": "INFO", "method": "GET", "path": "/posts/7", "pattern": "GET /posts/{id}",
				"status": 202.0, "bytes": 8.0, "agent": "test", "request_id": got.header.Get("X-Request-ID"),
			}
			for name, value := range want {
				if line[name] != value {
					t.Errorf("%s = %v, want %v", name, line[name], value)
				}
			}
			duration, _ := line["duration"].(float64)
			remote, _ := line["remote"].(string)
			if duration <= 0 || !strings.HasPrefix(remote, "127.0.0.1:") || len(line) != len(want)+3 { // time, duration, remote
				t.Errorf("logged %v, want a duration, a remote address and no others than %v", line, want)
			}
			if strings.Contains(logs.String(), "secret") || len(logs.find("request")) != 1 {
				t.Errorf("logged:\n%s\nwant one line without the query", logs.String())
			}
		})
	}
}

func TestLogTellsWhatWasAborted(t *testing.T) {
	type step = http.HandlerFunc
	large := strings.Repeat("x", 100_000)
	text := func(text string) step {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }
	}
	declare := func(n int) step {
		return func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Length", strconv.Itoa(n)) }
	}
	deadline := func(d time.Duration) step { // 0: none
		return func(w http.ResponseWriter, _ *http.Request) {
			at := time.Time{}
			if d != 0 {
				at = time.Now().Add(d)
			}
			http.NewResponseController(w).SetWriteDeadline(at)
		}
	}
	status := func(status int) step {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }
	}
	flush := func(w http.ResponseWriter, _ *http.Request) { http.NewResponseController(w).Flush() }
	copied := func(text string) step { // as a file
		return func(w http.ResponseWriter, _ *http.Request) {
			io.Copy(w, struct{ io.Reader }{strings.NewReader(text)})
		}
	}
	disconnected := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	drained := func(_ http.ResponseWriter, r *http.Request) { <-conduit.Draining(r.Context()) }
	short := func(http.ResponseWriter, *http.Request) { time.Sleep(time.Second) }
	long := func(http.ResponseWriter, *http.Request) { time.Sleep(20 * time.Second) } // beyond WriteTimeout
	for _, tt := range []struct {
		name    string
		method  string
		client  string // what it does once it has the first byte
		handler []step
		status  int
		bytes   int
		aborted bool
	}{
		{"client disconnects before the response", "GET", "leave at once", []step{disconnected}, 0, 0, true},
		{"client disconnects in the middle", "GET", "leave", []step{text(large), flush, disconnected}, 200, len(large), true},
		{"client disconnects after the declared end", "GET", "leave", []step{declare(len(large)), text(large), flush, disconnected}, 200, len(large), false},
		{"out of time to shut down", "GET", "shut down", []step{text("some"), flush, disconnected}, 200, 4, true},
		{"waited for by a drain", "GET", "drain", []step{flush, drained, text("all")}, 200, 3, false},
		{"WriteTimeout", "GET", "", []step{text("some"), flush, long}, 200, 4, true},
		{"within WriteTimeout", "GET", "", []step{text("some"), flush, short}, 200, 4, false},
		{"WriteTimeout after the declared end", "GET", "", []step{declare(4), text("some"), flush, long}, 200, 4, false},
		{"WriteTimeout after a declared copy", "GET", "speak HTTP/1", []step{declare(len(large)), copied(large), long}, 200, len(large), false},
		{"WriteTimeout after a copy", "GET", "", []step{copied("some"), long}, 200, 4, true},
		{"WriteTimeout lifted", "GET", "", []step{deadline(0), long, text("all")}, 200, 3, false},
		{"no WriteTimeout", "GET", "no WriteTimeout", []step{text("some"), long}, 200, 4, false},
		{"its own write deadline", "GET", "", []step{text("some"), deadline(-1)}, 200, 4, true},
		{"less than declared", "GET", "", []step{declare(5), text("some")}, 200, 4, true},
		{"more than declared", "GET", "", []step{declare(4), text("some"), flush, text("more")}, 200, 4, false},
		{"HEAD", "HEAD", "", []step{declare(len(large)), text(large), flush, text(large), flush}, 200, 0, false},
		{"HEAD with a length alone", "HEAD", "", []step{declare(len(large))}, 200, 0, false},
		{"304 with a body", "GET", "", []step{declare(len(large)), status(304), text(large)}, 304, 0, false},
		{"nothing", "GET", "", nil, 200, 0, false},
	} {
		eachProtocol(t, func(t *testing.T, p protocol) {
			if tt.client == "speak HTTP/1" && !p.http1 {
				return // net/http keeps the last bytes for the handler's end
			}
			synctest.Test(t, func(t *testing.T) {
				var logs logBuffer
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				ended := make(chan struct{})
				h := conduit.Logging()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer close(ended)
					if tt.client == "leave at once" {
						leave()
					}
					for _, step := range tt.handler {
						step(w, r)
					}
				}))
				cfg := &conduit.Config{Logger: logs.logger(), Handler: h}
				if tt.client == "no WriteTimeout" {
					cfg.WriteTimeout = -1
				}
				srv, client, url := serveInBubble(t, p, cfg)
				req, _ := http.NewRequestWithContext(ctx, tt.method, url, nil)
				if res, err := client.Do(req); err == nil {
					switch tt.client {
					case "leave":
						io.ReadFull(res.Body, make([]byte, len(large)))
						leave()
						synctest.Wait()
						client.CloseIdleConnections() // one that has brought a whole response is kept
					case "drain":
						go srv.Shutdown(ctx)
					case "shut down":
						now, cancel := context.WithTimeout(ctx, time.Millisecond)
						defer cancel()
						go srv.Shutdown(now)
					}
					io.Copy(io.Discard, res.Body)
					res.Body.Close()
				}
				<-ended
				synctest.Wait()
				if line := logs.request(t); line["status"] != float64(tt.status) || line["bytes"] != float64(tt.bytes) || (line["aborted"] == true) != tt.aborted {
					t.Errorf("%s: logged %v, want status %d, bytes %d, aborted %v", tt.name, line, tt.status, tt.bytes, tt.aborted)
				}
			})
		})
	}
}

func TestLogStatusOfWhatHasNoResponse(t *testing.T) {
	recovery := conduit.Chain(conduit.Recovery(), conduit.Logging())
	panicAfter := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next.ServeHTTP(w, r)
			panic("after the handler")
		})
	}
	for _, tt := range []struct {
		name    string
		chain   conduit.Middleware
		handler http.HandlerFunc
		status  float64
		aborted any
		late    int // WriteHeaders that are logged as superfluous
	}{
		{"panic without Recovery", conduit.Logging(), func(http.ResponseWriter, *http.Request) { panic("x") }, 0, true, 0},
		{"abort in Recovery", recovery, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, true, 0},
		{"Recovery inside", conduit.Chain(conduit.Logging(), conduit.Recovery()), func(http.ResponseWriter, *http.Request) { panic("x") }, 500, nil, 0},
		{"panic beside Recovery", conduit.Chain(conduit.Logging(), panicAfter, conduit.Recovery()), func(http.ResponseWriter, *http.Request) {}, 0, true, 0},
		{"invalid status", recovery, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(1000) }, 500, nil, 0},
		{"hijacked", recovery, func(w http.ResponseWriter, _ *http.Request) { hijack(w).Close() }, 101, nil, 0},
		{"panic after a hijack", recovery, func(w http.ResponseWriter, _ *http.Request) { hijack(w).Close(); panic("x") }, 101, true, 0},
		{"error after a hijack", recovery, func(w http.ResponseWriter, _ *http.Request) { hijack(w).Close(); http.Error(w, "nowhere", 500) }, 101, nil, 1},
	} {
		var logs logBuffer
		req, _ := http.NewRequest("GET", serveHandler(t, http1Protocol, &logs, tt.chain(tt.handler)), nil)
		try(http.DefaultClient, req)
		line, late := logs.request(t), len(logs.find("superfluous WriteHeader"))
		if line["status"] != tt.status || line["aborted"] != tt.aborted || late != tt.late {
			t.Errorf("%s: logged %v, want status %v, aborted %v, %d superfluous", tt.name, logs.String(), tt.status, tt.aborted, tt.late)
		}
	}
}

func TestLogLineStaysOneLine(t *testing.T) {
	var buf syncBuffer
	h := conduit.Chain(conduit.RequestID(), conduit.Logging())(http.NotFoundHandler())
	url := serve(t, newServer(t, &conduit.Config{Logger: slog.New(slog.NewTextHandler(&buf, nil)), Handler: h}))
	sendRaw(t, url, "GET /a%0alevel=ERROR%20msg=forged%0d%1b[31m HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\tb\r\n\r\n")
	for line := range strings.Lines(buf.String()) {
		if !strings.HasPrefix(line, "time=") || strings.ContainsAny(strings.TrimSuffix(line, "\n"), "\n\r\x1b") {
			t.Errorf("log line %q", line)
		}
	}
	if want := `msg=request method=GET path="/a\nlevel=ERROR msg=forged\r\x1b[31m"`; !strings.Contains(buf.String(), want) {
		t.Errorf("logged %s, want %s", buf.String(), want)
	}
}

// foreign is somebody else's middleware, whose wrapper has only Unwrap.
func foreign(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(unwrapOnly{w}, r) })
}

type unwrapOnly struct{ w http.ResponseWriter }

func (u unwrapOnly) Header() http.Header         { return u.w.Header() }
func (u unwrapOnly) Write(p []byte) (int, error) { return u.w.Write(p) }
func (u unwrapOnly) WriteHeader(status int)      { u.w.WriteHeader(status) }
func (u unwrapOnly) Unwrap() http.ResponseWriter { return u.w }

func TestLoggingKnowsWhatIsFurtherOut(t *testing.T) {
	for name, between := range map[string]conduit.Middleware{"Timeout": conduit.Timeout(time.Minute), "FastTimeout": conduit.FastTimeout(time.Minute), "foreign": foreign} {
		var logs logBuffer
		chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), between, conduit.RequestID(), conduit.Logging())
		url := serveHandler(t, http1Protocol, &logs, chain(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("x") })))
		got := get(t, http.DefaultClient, url)
		ids := got.header["X-Request-Id"]
		if line := logs.request(t); got.status != 500 || line["status"] != 500.0 || len(ids) != 1 || line["request_id"] != ids[0] {
			t.Errorf("%s: got %d with id %v, logged %v; want the same", name, got.status, ids, line)
		}
	}
}

func TestPartsWorkBetweenForeignWrappersWithoutAServer(t *testing.T) {
	var logs logBuffer
	old := slog.Default()
	slog.SetDefault(logs.logger())
	defer slog.SetDefault(old)
	chain := conduit.Chain(foreign, conduit.RequestID(), foreign, conduit.Recovery(), foreign, conduit.Compression(), foreign, conduit.Logging(), foreign, conduit.Timeout(time.Minute), foreign)
	plain := httptest.NewServer(chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if id := conduit.RequestIDFrom(r.Context()); id != "id" {
			t.Errorf("RequestIDFrom = %q, want id", id)
		}
		io.Copy(w, strings.NewReader("first "))
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Errorf("Flush = %v, want nil", err)
		}
		io.WriteString(w, "second")
	})))
	defer plain.Close()
	got := compressionGet(t, http.DefaultClient, plain.URL, "GET", http.Header{"X-Request-Id": {"id"}})
	if got.header.Get("Content-Encoding") != "gzip" || compressionText(t, got) != "first second" {
		t.Errorf("got %v %q, want first second in gzip", got.header, got.body)
	}
	if line := logs.request(t); line["status"] != 200.0 || line["bytes"] != 12.0 || line["request_id"] != "id" {
		t.Errorf("logged %v, want status 200, 12 bytes and the id", line)
	}
}

// Compression

func TestCompressionWithOtherEncoders(t *testing.T) {
	var made atomic.Int64
	encoder := func(coding string) conduit.Encoder {
		return conduit.Encoder{Coding: coding, New: func() conduit.EncodingWriter {
			made.Add(1)
			return gzip.NewWriter(nil) // under another name
		}}
	}
	text := strings.Repeat("text ", 400)
	for _, tt := range []struct {
		encoders     []string
		accept, want string
	}{
		{[]string{"zstd", "br"}, "gzip, deflate, br, zstd", "zstd"},
		{[]string{"br", "zstd"}, "gzip, deflate, br, zstd", "br"},
		{[]string{"zstd", "br"}, "gzip, deflate, br", "br"},
		{[]string{"zstd", "br"}, "gzip", "gzip"},
		{[]string{"zstd", "br"}, "gzip, zstd;q=0.9, br;q=0.5", "gzip"},
		{[]string{"zstd", "br"}, "zstd;q=0.5, br;q=0.8, gzip;q=0.3", "br"},
		{[]string{"zstd", "br"}, "zstd;q=0.5, br;q=0.5", "zstd"},
		{[]string{"zstd", "br"}, "zstd;q=0, *", "br"},
		{[]string{"zstd", "br"}, "identity, br;q=0.9", ""},
		{[]string{"zi"}, "gzip", "gzip"}, // a part of a name is no name
		{[]string{"gzip", "zstd"}, "gzip, zstd", "gzip"},
		{[]string{"zstd", "gzip"}, "gzip, zstd", "zstd"},
	} {
		var cfg conduit.CompressionConfig
		for _, coding := range tt.encoders {
			cfg.Encoders = append(cfg.Encoders, encoder(coding))
		}
		mw := conduit.CompressionWith(&cfg)
		clear(cfg.Encoders) // they were copied
		url := serveHandler(t, http1Protocol, nil, mw(compressionHandler("text/plain", text)))
		made.Store(0)
		for range 20 {
			got := compressionGet(t, http.DefaultClient, url, "GET", http.Header{"Accept-Encoding": {tt.accept}})
			body := got.body
			if tt.want != "" {
				body = compressionDecode(t, body)
			}
			if coding := got.header.Get("Content-Encoding"); coding != tt.want || body != text || got.header.Get("Vary") != "Accept-Encoding" {
				t.Fatalf("%q for %q: %q, body %.40q; want %q", tt.encoders, tt.accept, coding, body, tt.want)
			}
		}
		if got := compressionRecord(t, mw(compressionHandler("text/plain", text)), "GET", http.Header{"Accept-Encoding": nil}); got.body != text {
			t.Errorf("%q without Accept-Encoding: %v, want no encoding", tt.encoders, got.header)
		}
		if own := slices.Contains(tt.encoders, tt.want); made.Load() == 20 || (made.Load() > 0) != own {
			t.Errorf("%q for %q: %d writers made for 20 responses", tt.encoders, tt.accept, made.Load())
		}
	}
}

// FuzzAcceptEncoding holds the negotiation against one that is slow and plain. A
// line is a field.
func FuzzAcceptEncoding(f *testing.F) {
	for _, seed := range []string{
		"", "gzip", "gzip, deflate, br, zstd", "GZip", "x-gzip", "X-GZIP;q=0.5", ",, gzip ,", "*", "*;q=0, gzip", "br", "deflate, br;q=0.1",
		"br;q=0.5\ngzip", "gzip\ngzip;q=0", "gzip;q=0\n*", "gzip, gzip;q=0", "gzip;q=0, x-gzip", "gzip;q=0, *", "*;q=0",
		"gzip;q=0", "gzip;q=0.000", "gzip;q=0.", "gzip;q=0.001", "gzip;Q=1", "gzip;q=1.000", "gzip \t; \tq=0.5 ",
		"identity", "identity;q=0", "identity;q=0, gzip;q=0.1", "identity, gzip;q=0.5", "identity;q=0.6, *;q=0.5", "identity;q=0.5, gzip;q=0.5",
		// Malformed, and so ignored.
		"gzip;q=2", "gzip;q=1.001", "gzip;q=0.1234", "gzip;q=-1", "gzip;q", "gzip;q=", "gzip;", "gzip;q=a", "gzip;q=0a1", "gzip;q =1",
		"gzip;level=9", "gzip;q=1;q=1", "gzip deflate", "gzipx, xgzip", "gzip;q=2, gzip;q=0.5", "gzip;q=2, *;q=0.5",
	} {
		f.Add(seed)
	}
	offers := []string{"zstd", "br", "gzip"} // in the server's order
	var cfg conduit.CompressionConfig
	for _, coding := range offers[:2] {
		cfg.Encoders = append(cfg.Encoders, conduit.Encoder{Coding: coding, New: func() conduit.EncodingWriter { return gzip.NewWriter(nil) }})
	}
	h := conduit.CompressionWith(&cfg)(compressionHandler("text/plain", strings.Repeat("text ", 400)))
	f.Fuzz(func(t *testing.T, value string) {
		lines := strings.Split(value, "\n")
		got := compressionRecord(t, h, "HEAD", http.Header{"Accept-Encoding": lines}).header.Get("Content-Encoding")
		if want := compressionOracle(lines, offers); got != want {
			t.Errorf("Accept-Encoding %q: got %q, want %q", lines, got, want)
		}
	})
}

var acceptMember = regexp.MustCompile(`^[ \t\r]*([^;]*?)[ \t\r]*(?:;[ \t\r]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t\r]*)?$`)

// compressionOracle returns the one of offers that lines prefer, "" for none.
func compressionOracle(lines, offers []string) string {
	weights := make(map[string]float64)
	for member := range strings.SplitSeq(strings.Join(lines, ","), ",") {
		m := acceptMember.FindStringSubmatch(member)
		if m == nil {
			continue
		}
		name, q := strings.ToLower(m[1]), 1.0
		if m[2] != "" {
			q, _ = strconv.ParseFloat(m[2], 64)
		}
		if name == "x-gzip" {
			name = "gzip"
		}
		if old, ok := weights[name]; !ok || q < old {
			weights[name] = q
		}
	}
	best, most := "", weights["identity"]
	for _, offer := range offers {
		q, ok := weights[offer]
		if !ok {
			q = weights["*"]
		}
		if q > most || q > 0 && q == most && best == "" {
			best, most = offer, q
		}
	}
	return best
}

func TestCompressionShrinksText(t *testing.T) {
	text := compressionJSON(40 << 10)
	eachProtocol(t, func(t *testing.T, p protocol) {
		var logs logBuffer
		chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression())
		url := serveHandler(t, p, &logs, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h.Set("Content-Type", "application/json")
			h.Set("Content-Length", strconv.Itoa(len(text)))
			h.Set("Accept-Ranges", "bytes")
			h.Set("Etag", `"v1"`)
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, text)
		})))
		got := compressionGet(t, p.client(t), url, "GET", nil)
		want := http.Header{"Content-Encoding": {"gzip"}, "Content-Type": {"application/json"}, "Etag": {`W/"v1"`}, "Vary": {"Accept-Encoding"}}
		delete(got.header, "Date")
		delete(got.header, "X-Request-Id")
		if got.status != 202 || !maps.EqualFunc(got.header, want, slices.Equal) {
			t.Errorf("got %d %v, want 202 %v", got.status, got.header, want)
		}
		if len(got.body) > len(text)*4/10 || compressionText(t, got) != text {
			t.Errorf("%d bytes became %d", len(text), len(got.body))
		}
		if line := logs.request(t); line["status"] != 202.0 || line["bytes"] != float64(len(got.body)) {
			t.Errorf("logged %v, want the %d bytes that were sent", line, len(got.body))
		}
	})
}

func TestCompressionIsByTypeAndSize(t *testing.T) {
	text := strings.Repeat("some text ", 500)
	test := func(cfg *conduit.CompressionConfig, contentType, text string, want bool) {
		t.Helper()
		got := compressionRecord(t, conduit.CompressionWith(cfg)(compressionHandler(contentType, text)), "GET", nil)
		if compressed := got.header.Get("Content-Encoding") == "gzip"; compressed != want || compressionText(t, got) != text {
			t.Errorf("%+v: %d bytes of %q: compressed %t, want %t", cfg, len(text), contentType, compressed, want)
		}
	}
	for _, contentType := range []string{
		"", "text/plain", "TEXT/HTML; Charset=UTF-8", "text/css", "text/javascript", "application/json", "application/javascript",
		"application/xml", "application/wasm", "application/problem+json", "application/atom+xml", "image/svg+xml", "application/a+yaml",
		"application/x-ndjson", "font/ttf", "font/otf", "image/x-icon",
	} {
		test(nil, contentType, text, true)
	}
	for _, contentType := range []string{
		"image/png", "image/webp", "font/woff2", "video/mp4", "application/zip", "application/pdf", "application/octet-stream",
		"text/event-stream", "Text/Event-Stream ; charset=utf-8", "application/grpc", "nonsense",
	} {
		test(nil, contentType, text, false)
	}
	test(nil, "text/plain", text[:1024], true)
	test(nil, "text/plain", text[:1023], false)
	test(&conduit.CompressionConfig{MinSize: 10}, "text/plain", text[:10], true)
	test(&conduit.CompressionConfig{MinSize: 10}, "text/plain", text[:9], false)
	test(&conduit.CompressionConfig{MinSize: -1}, "text/plain", "x", true)
	test(&conduit.CompressionConfig{MinSize: -1}, "text/plain", "", false)

	own := &conduit.CompressionConfig{Types: []string{"*/*+JSON", "application/x-own", "text/event-*"}}
	test(own, "application/x-own", text, true)
	test(own, "Application/A+json; x=y", text, true)
	test(own, "text/plain", text, false)
	test(own, "text/event-stream; charset=utf-8", text, false)
	mw := conduit.CompressionWith(own)
	own.Types[1] = "image/*"
	if got := compressionRecord(t, mw(compressionHandler("application/x-own", text)), "GET", nil); got.header.Get("Content-Encoding") != "gzip" {
		t.Error("changing the configuration later changed the middleware")
	}
}

func TestCompressionLevelCounts(t *testing.T) {
	text := compressionJSON(40 << 10)
	var sizes []int
	for _, level := range []int{1, 0, 9} {
		h := conduit.CompressionWith(&conduit.CompressionConfig{Level: level})(compressionHandler("text/plain", text))
		sizes = append(sizes, len(compressionRecord(t, h, "GET", nil).body))
	}
	if !(sizes[0] > sizes[1] && sizes[1] > sizes[2]) {
		t.Errorf("levels 1, the default and 9 make %d bytes, want fewer with each", sizes)
	}
}

func TestCompressionLeavesAlone(t *testing.T) {
	text := compressionJSON(4 << 10)
	small, png := text[:1023], "\x89PNG\r\n\x1a\n"+text
	with := func(body string, header http.Header) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), header)
			io.WriteString(w, body)
		}
	}
	plain := func(field, value string) http.HandlerFunc {
		return with(text, http.Header{"Content-Type": {"text/plain"}, field: {value}})
	}
	status := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(status)
		}
	}
	content := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.json", time.Unix(1e9, 0), strings.NewReader(text))
	}
	textType, onlyBrotli := http.Header{"Content-Type": {"text/plain"}}, http.Header{"Accept-Encoding": {"br"}}
	tests := []struct {
		name    string
		request http.Header
		handler http.HandlerFunc
		status  int
		body    string
		vary    bool
	}{
		{"image", nil, with(text, http.Header{"Content-Type": {"image/png"}}), 200, text, false},
		{"image found out", nil, with(png, nil), 200, png, false},
		{"type withheld", nil, with(text, http.Header{"Content-Type": nil}), 200, text, false},
		{"event stream", nil, with(text, http.Header{"Content-Type": {"text/event-stream"}}), 200, text, false},
		{"encoded", nil, plain("Content-Encoding", "br"), 200, text, false},
		{"no-transform", nil, plain("Cache-Control", "public, No-Transform"), 200, text, false},
		{"digest of RFC 9530", nil, plain("Content-Digest", "sha-256=:x:"), 200, text, false},
		{"digest of the representation", nil, plain("Repr-Digest", "sha-256=:x:"), 200, text, false},
		{"digest of RFC 3230", nil, plain("Digest", "sha-256=x"), 200, text, false},
		{"digest of RFC 1864", nil, plain("Content-Md5", "x"), 200, text, false},
		{"digest in a trailer", nil, plain("Trailer", "Expires, repr-digest"), 200, text, false},
		{"part", http.Header{"Range": {"bytes=0-2047"}}, content, 206, text[:2048], true},
		{"range not satisfiable", http.Header{"Range": {"bytes=9999999-"}}, content, 416, "invalid range: failed to overlap\n", false},
		{"204", nil, status(204), 204, "", false},
		{"205", nil, status(205), 205, "", false},
		{"304", nil, status(304), 304, "", true},
		{"304 of net/http", http.Header{"If-Modified-Since": {"Mon, 06 May 2024 07:08:09 GMT"}}, content, 304, "", true},
		{"empty", nil, status(200), 200, "", true},
		{"small", nil, with(small, textType), 200, small, true},
		{"small, found out", nil, with(small, nil), 200, small, true},
		{"small, of known length", nil, with(small, http.Header{"Content-Type": {"text/plain"}, "Content-Length": {"1023"}}), 200, small, true},
		{"small, found out, of known length", nil, with(small, http.Header{"Content-Length": {"1023"}}), 200, small, true},
		{"not accepted", onlyBrotli, with(text, textType), 200, text, true},
		{"not accepted, found out", onlyBrotli, with(text, nil), 200, text, true},
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		client := p.client(t)
		for _, tt := range tests {
			want := compressionGet(t, client, serveHandler(t, p, nil, tt.handler), "GET", tt.request)
			got := compressionGet(t, client, serveHandler(t, p, nil, conduit.Compression()(tt.handler)), "GET", tt.request)
			if got.status != tt.status || got.body != tt.body {
				t.Errorf("%s: got %d %.80q, want %d %.80q", tt.name, got.status, got.body, tt.status, tt.body)
			}
			if vary := got.header.Get("Vary") == "Accept-Encoding"; vary != tt.vary {
				t.Errorf("%s: Vary = %q, want it %t", tt.name, got.header["Vary"], tt.vary)
			}
			if !sameHeader(got, want, "Date", "Vary") {
				t.Errorf("%s: header %v, without Compression %v", tt.name, got.header, want.header)
			}
		}
	})
}

// Identity is no content coding: the response is that of a handler which did not
// ask for it (RFC 9110, Section 8.4).
func TestCompressionOptOut(t *testing.T) {
	twice := conduit.Chain(conduit.Compression(), conduit.Compression())
	for name, text := range map[string]string{"small": "{}", "large": strings.Repeat("<p>text", 400), "image": "\x89PNG\r\n\x1a\n"} {
		handler := textHandler(text)
		optOut := twice(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "identity")
			handler.ServeHTTP(w, r)
		}))
		want := compressionGet(t, http.DefaultClient, serveHandler(t, http1Protocol, nil, handler), "GET", nil)
		got := compressionGet(t, http.DefaultClient, serveHandler(t, http1Protocol, nil, optOut), "GET", nil)
		if got.body != text || !sameHeader(got, want, "Date", "Vary") { // an outer Compression knows nothing of the wish
			t.Errorf("%s: %q %v, without Compression %v", name, got.body, got.header, want.header)
		}
	}
}

// sameHeader reports whether two responses have the same header but for some
// fields.
func sameHeader(a, b response, but ...string) bool {
	for _, field := range but {
		delete(a.header, field)
		delete(b.header, field)
	}
	return maps.EqualFunc(a.header, b.header, slices.Equal)
}

// net/http would find application/x-gzip in compressed bytes, and in few bytes of
// text something else than in many.
func TestCompressionFindsOutTheType(t *testing.T) {
	page := "   <!DOCTYPE html><title>x</title>" + strings.Repeat("<p>text", 500)
	for _, size := range []int{1, 7, 600, 5000} {
		for _, minSize := range []int{-1, 5, 0, 2000} {
			mw := conduit.CompressionWith(&conduit.CompressionConfig{MinSize: minSize})
			got := get(t, http.DefaultClient, serveHandler(t, http1Protocol, nil, mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for part := range slices.Chunk([]byte(page), size) {
					w.Write(part)
				}
			}))))
			if got.header.Get("Content-Type") != "text/html; charset=utf-8" || got.body != page {
				t.Errorf("in parts of %d, MinSize %d: type %q", size, minSize, got.header["Content-Type"])
			}
		}
	}
}

func TestCompressionAddsToVary(t *testing.T) {
	shared := append(make([]string, 0, 4), "Origin")
	for _, c := range []struct{ have, want []string }{
		{nil, []string{"Accept-Encoding"}},
		{shared, []string{"Origin", "Accept-Encoding"}},
		{[]string{"Origin, accept-encoding"}, []string{"Origin, accept-encoding"}},
		{[]string{"*"}, []string{"*"}},
		{[]string{"X-Accept-Encoding"}, []string{"X-Accept-Encoding", "Accept-Encoding"}},
	} {
		h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.have != nil {
				w.Header()["Vary"] = c.have
			}
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "small")
			w.(http.Flusher).Flush()
			w.Header().Add("Vary", "Late") // must not reach the next response
		}))
		for range 2 {
			if got := compressionRecord(t, h, "GET", nil).header["Vary"]; !slices.Equal(got, c.want) {
				t.Errorf("%q became %q, want %q", c.have, got, c.want)
			}
		}
	}
	if beyond := shared[:2][1]; beyond != "" {
		t.Errorf("%q was written into a shared slice", beyond)
	}
}

func TestCompressedHEADHasTheHeaderOfGET(t *testing.T) {
	text := compressionJSON(4 << 10)
	content := func(name, tag string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Etag", tag)
			http.ServeContent(w, r, name, time.Unix(1e9, 0), strings.NewReader(text))
		}
	}
	parts := func(size, all int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			for part := range slices.Chunk([]byte(text[:all]), size) {
				w.Write(part)
			}
		}
	}
	handlers := map[string]http.HandlerFunc{
		"ServeContent": content("x.json", `"v1"`), "ServeContent of an image": content("x.png", `"v1"`),
		"large": parts(len(text), len(text)), "medium": parts(1500, 1500), "small": parts(100, 200), "in parts": parts(100, len(text)),
		"only the header": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			w.Header().Set("Content-Length", strconv.Itoa(len(text)))
			if r.Method != http.MethodHead {
				io.WriteString(w, text)
			}
		},
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		client := p.client(t)
		for name, handler := range handlers {
			url := serveHandler(t, p, nil, conduit.Compression()(handler))
			want, got := compressionGet(t, client, url, "GET", nil), compressionGet(t, client, url, "HEAD", nil)
			if want.header.Get("Content-Encoding") != "" {
				delete(want.header, "Content-Length") // net/http's, of compressed bytes that fit its buffer
			}
			if got.status != want.status || got.body != "" || !sameHeader(got, want, "Date") {
				t.Errorf("%s: HEAD: %d %v %q, GET: %d %v", name, got.status, got.header, got.body, want.status, want.header)
			}
		}
	})
	// The length of a GET is that of its gzip form, which is not known.
	url := serveHandler(t, http1Protocol, nil, conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "5000")
	})))
	for accept, want := range map[string]string{"gzip": "", "br": "5000"} {
		got := compressionGet(t, http.DefaultClient, url, "HEAD", http.Header{"Accept-Encoding": {accept}})
		if length := got.header.Get("Content-Length"); length != want {
			t.Errorf("without a type, %s: Content-Length %q, want %q", accept, length, want)
		}
	}
}

func TestCompressionRevisesThe304ToAWeakTag(t *testing.T) {
	text := compressionJSON(4 << 10)
	var tag string
	url := serveHandler(t, http1Protocol, nil, conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Etag", tag)
		http.ServeContent(w, r, "x.json", time.Time{}, strings.NewReader(text))
	})))
	for _, tt := range []struct {
		accept, match, tag, want string
		status                   int
	}{
		{"gzip", "", `"v1"`, `W/"v1"`, 200},
		{"gzip", `W/"v1"`, `"v1"`, `W/"v1"`, 304},
		{"gzip", `"v0", W/"v1"`, `"v1"`, `W/"v1"`, 304},
		{"gzip", `"v1"`, `"v1"`, `"v1"`, 304},
		{"br", `W/"v1"`, `"v1"`, `"v1"`, 304},
		{"gzip", `W/"v1"`, `W/"v1"`, `W/"v1"`, 304},
		{"gzip", `W/"v0"`, `"v1"`, `W/"v1"`, 200},
	} {
		tag = tt.tag
		got := compressionGet(t, http.DefaultClient, url, "GET", http.Header{"Accept-Encoding": {tt.accept}, "If-None-Match": {tt.match}})
		if got.status != tt.status || got.header.Get("Etag") != tt.want || got.header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("%s, If-None-Match %s, ETag %s: got %d %v, want %d with ETag %s and Vary", tt.accept, tt.match, tt.tag, got.status, got.header, tt.status, tt.want)
		}
	}
}

// No client takes a part for the whole, and a body that is only held back is not
// in the way of a 500.
func TestCompressionEndsNothingThatFailed(t *testing.T) {
	text := compressionJSON(40 << 10)
	for _, tt := range []struct {
		name     string
		head     string // written before
		declared int    // more than that
		end      func(w http.ResponseWriter)
		want     int // 0: aborted
	}{
		{"panic", text, 0, func(http.ResponseWriter) { panic("boom") }, 0},
		{"abort", text, 0, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 0},
		{"Goexit", text, 0, func(http.ResponseWriter) { runtime.Goexit() }, 0},
		{"flushed, then panic", text[:10], 0, func(w http.ResponseWriter) { w.(http.Flusher).Flush(); panic("boom") }, 0},
		{"held back, then panic", text[:10], 0, func(http.ResponseWriter) { panic("boom") }, 500},
		{"held back, then abort", text[:10], 0, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 0},
		{"less than declared", text, 1, func(w http.ResponseWriter) {}, 0},
	} {
		eachProtocol(t, func(t *testing.T, p protocol) {
			chain := conduit.Chain(conduit.Recovery(), conduit.Compression())
			url := serveHandler(t, p, nil, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				if tt.declared > 0 {
					w.Header().Set("Content-Length", strconv.Itoa(len(tt.head)+tt.declared))
				}
				w.WriteHeader(http.StatusOK)
				io.WriteString(w, tt.head)
				tt.end(w)
			})))
			got, err := try(p.client(t), compressionRequest("GET", url, nil))
			if tt.want != 0 {
				if got.status != tt.want || got.body != "Internal Server Error\n" || got.header.Get("Content-Encoding") != "" || err != nil {
					t.Errorf("%s: got %d %v %.80q, %v; want %d", tt.name, got.status, got.header, got.body, err, tt.want)
				}
				return
			}
			if err == nil {
				t.Errorf("%s: got %d with %d bytes and no error", tt.name, got.status, len(got.body))
			}
			if z, err := gzip.NewReader(strings.NewReader(got.body)); err == nil {
				if _, err := io.ReadAll(z); err == nil {
					t.Errorf("%s: the %d bytes that came are valid", tt.name, len(got.body))
				}
			}
		})
	}
}

// A file that grows while it is sent yields more than was declared: the client
// gets that much, as it does without Compression.
func TestCompressionSendsNoMoreThanWasDeclared(t *testing.T) {
	text := compressionJSON(8 << 10)
	for _, tt := range []struct {
		name, contentType, accept string
		parts                     []string
		declared, last            int // what the last write reports
	}{
		{"after the end", "text/plain", "gzip", []string{text[:4096], "more"}, 4096, 0},
		{"across writes", "text/plain", "gzip", []string{text[:4096], text[4096:]}, 5000, 5000 - 4096},
		{"while held back", "", "gzip", []string{"hello", "\n"}, 5, 0},
		{"not accepted, while held back", "", "br", []string{"hello", "\n"}, 5, 0},
	} {
		h := conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if tt.contentType != "" {
				w.Header().Set("Content-Type", tt.contentType)
			}
			w.Header().Set("Content-Length", strconv.Itoa(tt.declared))
			io.WriteString(w, tt.parts[0])
			if n, err := io.WriteString(w, tt.parts[1]); n != tt.last || err != http.ErrContentLength {
				t.Errorf("%s: the last write = %d, %v; want %d, ErrContentLength", tt.name, n, err, tt.last)
			}
		}))
		got := compressionGet(t, http.DefaultClient, serveHandler(t, http1Protocol, nil, h), "GET", http.Header{"Accept-Encoding": {tt.accept}})
		want := strings.Join(tt.parts, "")[:tt.declared]
		if body := compressionText(t, got); got.status != 200 || body != want {
			t.Errorf("%s: %d with %d bytes, want %d", tt.name, got.status, len(body), len(want))
		}
	}
}

// A handler may see to the length itself.
func TestCompressionLeavesTheLengthAlone(t *testing.T) {
	for _, header := range []http.Header{{"Transfer-Encoding": {"chunked"}}, {"Content-Length": nil}} {
		for _, size := range []int{10, 1500, 10_000} {
			for _, accept := range []string{"gzip", "br"} {
				var logs logBuffer
				url := serveHandler(t, http1Protocol, &logs, conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "text/plain")
					maps.Copy(w.Header(), header)
					io.WriteString(w, strings.Repeat("x", size))
				})))
				got := compressionGet(t, http.DefaultClient, url, "GET", http.Header{"Accept-Encoding": {accept}})
				if got.header.Get("Content-Length") != "" || len(compressionText(t, got)) != size || len(logs.find("net/http")) > 0 {
					t.Errorf("%v, %d bytes: %v, logged %s", header, size, got.header, logs.String())
				}
			}
		}
	}
}

// compressionChains have Compression alone, and inside and outside of Timeout.
var compressionChains = map[string]conduit.Middleware{
	"alone":           conduit.Compression(),
	"inside Timeout":  conduit.Chain(conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression()),
	"outside Timeout": conduit.Chain(conduit.Compression(), conduit.Timeout(time.Minute)),
}

func TestCompressionFlushes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for name, chain := range compressionChains {
			for _, lines := range [][]string{nil, {"{\"line\":1}\n", "{\"line\":2}\n"}} {
				next := make(chan string)
				url := serveHandler(t, p, nil, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Content-Type", "application/x-ndjson")
					for line, more := "", true; more; line, more = <-next {
						io.WriteString(w, line)
						if err := http.NewResponseController(w).Flush(); err != nil { // the first one without a byte
							t.Error(err)
						}
					}
				})))
				res, err := p.client(t).Get(url) // and decompress
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				for _, line := range lines {
					next <- line
					got := make([]byte, len(line))
					if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != line {
						t.Fatalf("%s: got %q, %v, want %q", name, got, err, line)
					}
				}
				close(next)
				if rest, err := io.ReadAll(res.Body); len(rest) != 0 || err != nil || !res.Uncompressed {
					t.Errorf("%s: at the end %q, %v, compressed %v; want nothing", name, rest, err, res.Uncompressed)
				}
			}
		}
	})
}

func TestCompressionDropsWhatItHoldsBackAtAHijack(t *testing.T) {
	var logs logBuffer
	chain := conduit.Chain(conduit.Logging(), conduit.Compression())
	url := serveHandler(t, http1Protocol, &logs, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		io.WriteString(w, "held back")
		conn := hijack(w)
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello")
	})))
	if got := compressionGet(t, http.DefaultClient, url, "GET", nil); got.body != "hello" {
		t.Errorf("got %q, want hello", got.body)
	}
	if line := logs.request(t); line["status"] != 101.0 || len(logs.find("net/http")) != 0 {
		t.Errorf("logged %s, want status 101", logs.String())
	}
}

// What is not compressed reaches the ReadFrom below with the source that the
// handler had, which is what sendfile needs.
func TestCompressionKeepsSendfile(t *testing.T) {
	content := "\x89PNG\r\n\x1a\n" + strings.Repeat("\x00", 100<<10)
	length := []string{strconv.Itoa(len(content))}
	for _, tt := range []struct {
		header   http.Header
		accept   string
		explicit bool // WriteHeader
		most     int  // bytes that may be read by other means
	}{
		{http.Header{"Content-Type": {"image/png"}}, "gzip", false, 4096},
		{http.Header{"Content-Type": {"image/png"}}, "gzip", true, 0},
		{http.Header{"Content-Type": {"image/png"}, "Content-Length": length}, "gzip", false, 4096},
		{http.Header{"Content-Type": {"text/plain"}}, "br", false, 4096},
		{http.Header{"Content-Type": {"text/plain"}}, "br", true, 0},
		{http.Header{}, "gzip", false, 4096},
		{http.Header{}, "gzip", true, 4096},
		{http.Header{"Content-Length": length}, "gzip", true, 4096},
	} {
		src := io.LimitReader(strings.NewReader(content), int64(len(content)))
		w := &compressionReaderFrom{ResponseRecorder: httptest.NewRecorder()}
		conduit.Chain(conduit.Logging(), conduit.Compression())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), tt.header)
			if tt.explicit {
				w.WriteHeader(http.StatusOK)
			}
			if n, err := io.Copy(w, src); n != int64(len(content)) || err != nil {
				t.Errorf("%v: Copy = %d, %v", tt.header, n, err)
			}
		})).ServeHTTP(w, compressionRequest("GET", "/", http.Header{"Accept-Encoding": {tt.accept}}))
		if w.src != src || w.n < int64(len(content)-tt.most) || w.Body.String() != content {
			t.Errorf("%v, %s, WriteHeader %v: ReadFrom got %T and %d bytes of %d, %d in all", tt.header, tt.accept, tt.explicit, w.src, w.n, len(content), w.Body.Len())
		}
	}
}

// compressionReaderFrom notes what its ReadFrom was given last.
type compressionReaderFrom struct {
	*httptest.ResponseRecorder
	src io.Reader
	n   int64
}

func (w *compressionReaderFrom) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(struct{ io.Writer }{w.ResponseRecorder}, src)
	w.src, w.n = src, w.n+n
	return n, err
}

// The header is the one that was there when the handler began to respond, and
// trailers are trailers, however long the body is held back.
func TestCompressionKeepsHeadersAndTrailersApart(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for name, chain := range compressionChains {
			for _, size := range []int{100, 5000} {
				text := strings.Repeat("x", size)
				url := serveHandler(t, p, nil, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					h := w.Header()
					h.Set("Content-Type", "text/plain")
					h.Set("Trailer", "X-Sum")
					h.Set("X-Early", "1")
					w.WriteHeader(http.StatusCreated)
					h.Set("X-Late", "1")
					h.Set("X-Early", "2")
					io.WriteString(w, text)
					h.Set("X-Sum", "sum")
					h.Set(http.TrailerPrefix+"X-More", "more")
				})))
				res, err := p.client(t).Get(url) // and decompress
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				if h := res.Header; res.StatusCode != 201 || string(body) != text || err != nil || h.Get("X-Early") != "1" || h.Get("X-Late")+h.Get("X-Sum") != "" {
					t.Errorf("%s, %d bytes: got %d %v %.80q, %v", name, size, res.StatusCode, h, body, err)
				}
				if res.Trailer.Get("X-Sum") != "sum" || res.Trailer.Get("X-More") != "more" {
					t.Errorf("%s, %d bytes: trailer %v", name, size, res.Trailer)
				}
			}
		}
	})
}

func TestCompressionHeedsNoLengthOrCodingThatComesAfterTheBody(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		url := serveHandler(t, p, nil, conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "hello")
			w.Header().Set("Content-Length", "3")
			w.Header().Set("Content-Encoding", "br")
		})))
		if got := get(t, p.client(t), url); got.body != "hello" || got.header.Get("Content-Encoding") != "" {
			t.Errorf("got %q, Content-Encoding %q, want hello as it is", got.body, got.header.Get("Content-Encoding"))
		}
	})
}

func TestCompressionInsideAndOutsideTimeout(t *testing.T) {
	text := compressionJSON(4 << 10)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/held":
			io.WriteString(w, text[:10])
		case "/started":
			io.WriteString(w, text[:2000])
			w.(http.Flusher).Flush()
		case "/quick":
			io.WriteString(w, text)
			return
		}
		<-r.Context().Done()
		io.WriteString(w, text)
		w.(http.Flusher).Flush()
	})
	const late = "Service Unavailable\n"
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		timeout := limit.new(time.Second)
		for _, tt := range []struct {
			chain conduit.Middleware
			path  string
			body  string // "": aborted
		}{
			{conduit.Chain(timeout, conduit.Compression()), "quick", text},
			{conduit.Chain(timeout, conduit.Compression()), "late", late},
			{conduit.Chain(timeout, conduit.Compression()), "held", late}, // outside, it has started for Timeout
			{conduit.Chain(timeout, conduit.Compression()), "started", ""},
			{conduit.Chain(conduit.Compression(), timeout), "quick", text},
			{conduit.Chain(conduit.Compression(), timeout), "late", late},
			{conduit.Chain(conduit.Compression(), timeout), "started", ""},
		} {
			synctest.Test(t, func(t *testing.T) {
				_, client, url := serveInBubble(t, p, &conduit.Config{Handler: conduit.Recovery()(tt.chain(handler))})
				got, err := try(client, compressionRequest("GET", url+tt.path, nil))
				switch compressed := got.header.Get("Content-Encoding") != ""; {
				case (err != nil) != (tt.body == ""):
					t.Errorf("%s: %d with %d bytes, %v", tt.path, got.status, len(got.body), err)
				case err == nil && ((got.status == 503) != (tt.body == late) || compressed != (tt.body == text) || compressionText(t, got) != tt.body):
					t.Errorf("%s: got %d %v %.80q, want %.80q", tt.path, got.status, got.header, got.body, tt.body)
				}
			})
		}
	})
}

// The response of a FastTimeout ends by its Content-Length while the handler
// hangs on.
func TestFastTimeoutInsideCompressionEndsItsResponse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		message := strings.Repeat("<p>timed out</p>", 200)
		const hang = 10 * time.Second
		timeout := conduit.TimeoutWith(&conduit.TimeoutConfig{Duration: time.Second, Fast: true, Message: message, ContentType: "text/html"})
		h := conduit.Compression()(timeout(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { time.Sleep(hang) })))
		_, client, url := serveInBubble(t, http1Protocol, &conduit.Config{Handler: h})
		start := time.Now()
		got := compressionGet(t, client, url, "GET", nil)
		if took := time.Since(start); got.status != 503 || compressionText(t, got) != message || took != time.Second {
			t.Errorf("%d, %.40q after %v, want 503 after 1s", got.status, got.body, took)
		}
		time.Sleep(hang) // until the handler has returned
	})
}

func TestCompressionHoldsBackNoMoreThanMinSize(t *testing.T) {
	text, image := []string{"text/plain"}, []string{"image/png"}
	for _, tt := range []struct {
		minSize, want int
		header        http.Header
	}{
		{0, 1024, http.Header{"Content-Type": text}},
		{0, 1024, nil},
		{100, 100, http.Header{"Content-Type": text}},
		{100, 512, nil},
		{-1, 1, http.Header{"Content-Type": text}},
		{0, 0, http.Header{"Content-Type": image}},
		{0, 0, http.Header{"Content-Type": text, "Content-Length": {"5000"}}},
		{0, 512, http.Header{"Content-Length": {"5000"}}},
	} {
		rec, held := httptest.NewRecorder(), 0
		conduit.CompressionWith(&conduit.CompressionConfig{MinSize: tt.minSize})(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			maps.Copy(w.Header(), tt.header)
			w.WriteHeader(http.StatusTeapot)
			for range 5000 {
				if rec.Code != http.StatusTeapot {
					held++
				}
				w.Write([]byte("x"))
			}
		})).ServeHTTP(rec, compressionRequest("GET", "/", nil))
		if held != tt.want {
			t.Errorf("MinSize %d, %v: the response began after %d bytes, want %d", tt.minSize, tt.header, held, tt.want)
		}
	}
}

// However a body is written, it comes out as it would without Compression.
func TestCompressionIsTransparent(t *testing.T) {
	text := compressionJSON(10 << 10)
	ways := []func(w http.ResponseWriter, part string) (int64, error){
		func(w http.ResponseWriter, part string) (int64, error) {
			n, err := w.Write([]byte(part))
			return int64(n), err
		},
		func(w http.ResponseWriter, part string) (int64, error) {
			n, err := io.WriteString(w, part)
			return int64(n), err
		},
		func(w http.ResponseWriter, part string) (int64, error) { return io.Copy(w, strings.NewReader(part)) },
		func(w http.ResponseWriter, part string) (int64, error) {
			return io.Copy(w, struct{ io.Reader }{strings.NewReader(part)})
		},
	}
	headers := []http.Header{{}, {"Content-Type": {"application/json"}}, {"Content-Type": {"image/png"}}, {"Content-Length": {strconv.Itoa(len(text))}}}
	for first := range ways {
		for _, size := range []int{100, 512, 1024, 4097, len(text)} { // of a part
			for _, header := range headers {
				for _, flushed := range []int{-1, 0, 3} { // the part after which there is a flush
					got := compressionRecord(t, conduit.Compression()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						maps.Copy(w.Header(), header)
						i := 0
						for part := range slices.Chunk([]byte(text), size) {
							if n, err := ways[(first+i)%len(ways)](w, string(part)); n != int64(len(part)) || err != nil {
								t.Errorf("part %d: wrote %d of %d, %v", i, n, len(part), err)
							}
							if i == flushed {
								w.(http.Flusher).Flush()
							}
							i++
						}
					})), "GET", nil)
					if got.status != 200 || compressionText(t, got) != text {
						t.Errorf("way %d, parts of %d, %v, flush after %d: got %d %v with %d bytes", first, size, header, flushed, got.status, got.header, len(got.body))
					}
				}
			}
		}
	}
}

// Encoders and buffers are shared by requests: no byte may get from one to
// another, whatever becomes of either.
func TestCompressionMixesNoResponses(t *testing.T) {
	chain := conduit.Chain(conduit.Recovery(), conduit.Timeout(time.Minute), conduit.Compression())
	url := serveHandler(t, http1Protocol, nil, chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		n, _ := strconv.Atoi(r.URL.Path[1:])
		for range 20 {
			io.WriteString(w, strings.Repeat(r.URL.Path, n%50))
			if n%7 == 1 {
				w.(http.Flusher).Flush()
			}
		}
		if n%5 == 3 {
			panic(http.ErrAbortHandler)
		}
	})))
	client := newClient(t, &http.Transport{}) // which decompresses
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for n := worker; n < 320; n += 8 {
				req, _ := http.NewRequest("GET", fmt.Sprint(url, "/", n), nil)
				got, err := try(client, req)
				want, aborted := strings.Repeat(req.URL.Path, 20*(n%50)), n%5 == 3
				if (err != nil) != aborted || !strings.HasPrefix(want, got.body) || !aborted && got.body != want {
					t.Errorf("%d: got %d bytes, want %d; %v", n, len(got.body), len(want), err)
				}
			}
		})
	}
	all.Wait()
}

// compressionHandler responds with a text of a type, which may be none.
func compressionHandler(contentType, text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if contentType != "" {
			w.Header().Set("Content-Type", contentType)
		}
		io.WriteString(w, text)
	})
}

// compressionRequest accepts gzip unless header says otherwise. Clients and
// recorders take it.
func compressionRequest(method, url string, header http.Header) *http.Request {
	r := httptest.NewRequestWithContext(context.Background(), method, url, nil)
	r.RequestURI = ""
	r.Header.Set("Accept-Encoding", "gzip")
	maps.Copy(r.Header, header)
	return r
}

func compressionGet(t *testing.T, client *http.Client, url, method string, header http.Header) response {
	t.Helper()
	return do(t, client, compressionRequest(method, url, header))
}

func compressionRecord(t *testing.T, h http.Handler, method string, header http.Header) response {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, compressionRequest(method, "/", header))
	res := w.Result()
	return response{res.StatusCode, res.Header, w.Body.String(), res.Close}
}

// compressionText returns the text of a body, compressed or not.
func compressionText(t *testing.T, r response) string {
	t.Helper()
	if r.header.Get("Content-Encoding") != "gzip" {
		return r.body
	}
	return compressionDecode(t, r.body)
}

func compressionDecode(t testing.TB, body string) string {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(body))
	if err != nil {
		t.Errorf("%v: %.80q", err, body)
		return ""
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Errorf("%v after %d bytes", err, len(text))
	}
	return string(text)
}

// serveHandler serves a handler over a protocol until the test ends and returns
// the URL. The server logs to logs, unless that is nil.
func serveHandler(t *testing.T, p protocol, logs *logBuffer, h http.Handler) (url string) {
	t.Helper()
	cfg := &conduit.Config{Handler: h}
	if logs != nil {
		cfg.Logger = logs.logger()
	}
	return p.serve(t, p.server(t, cfg))
}

// try is do for a request that may fail, or a response.
func try(client *http.Client, req *http.Request) (response, error) {
	res, err := client.Do(req)
	if err != nil {
		return response{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return response{res.StatusCode, res.Header, string(body), res.Close}, err
}

// Shutdown

// graceful is a GracefulShutdown that runs in a bubble, over pipes.
type graceful struct {
	*conduit.GracefulShutdown
	srv  *conduit.Server
	l    *pipeListener
	logs *logBuffer
	done chan error // gets what Run returns
}

// newGraceful does not wait for signals. It runs when start is called.
func newGraceful(t *testing.T, cfg conduit.ShutdownConfig, h http.Handler) *graceful {
	t.Helper()
	cfg.Signals = []os.Signal{}
	g := &graceful{l: newPipeListener(), logs: new(logBuffer), done: make(chan error, 1)}
	g.srv = newServer(t, &conduit.Config{Handler: h, Logger: g.logs.logger()})
	g.GracefulShutdown = conduit.NewGracefulShutdown(g.srv, &cfg)
	return g
}

func (g *graceful) start(ctx context.Context) {
	go func() { g.done <- g.Run(ctx, g.l) }()
}

// open sends a request and returns when the handler waits.
func (l *pipeListener) open(t *testing.T) {
	conn := l.dial()
	t.Cleanup(func() { conn.Close() })
	io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	synctest.Wait()
}

// hijacking returns a handler that takes the connection and closes it after wait.
func hijacking(t *testing.T, wait func(context.Context)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		wait(r.Context())
	}
}

func waitForContext(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func TestShutdownDefaultsShrink(t *testing.T) {
	edited := func(timeout, delay time.Duration) *conduit.ShutdownConfig {
		cfg := conduit.DefaultShutdownConfig()
		cfg.Timeout = timeout
		cfg.Delay = cmp.Or(delay, cfg.Delay)
		return cfg
	}
	tests := []struct {
		name        string
		cfg         *conduit.ShutdownConfig
		delay, hook time.Duration
	}{
		// The delay is kept even when nobody is connected: a client that was just
		// told to close is dialling again at that moment.
		{"defaults", &conduit.ShutdownConfig{}, 500 * time.Millisecond, 5 * time.Second},
		{"small Timeout", &conduit.ShutdownConfig{Timeout: time.Second}, 250 * time.Millisecond, 250 * time.Millisecond},
		{"small Timeout beside the defaults", edited(time.Second, 0), 250 * time.Millisecond, 250 * time.Millisecond},
		{"Timeout that the defaults fit", edited(10*time.Second, 0), 500 * time.Millisecond, 5 * time.Second},
		{"Timeout and Delay beside the defaults", edited(10*time.Second, 5*time.Second), 5 * time.Second, 2500 * time.Millisecond},
		{"long Delay", &conduit.ShutdownConfig{Timeout: 2 * time.Second, Delay: 1900 * time.Millisecond}, 1900 * time.Millisecond, 50 * time.Millisecond},
		{"none", &conduit.ShutdownConfig{Delay: -1, HookTimeout: time.Second}, 0, time.Second},
		{"no Timeout", &conduit.ShutdownConfig{Timeout: -1}, 500 * time.Millisecond, 5 * time.Second},
		{"nothing kept", &conduit.ShutdownConfig{HookTimeout: -1}, 500 * time.Millisecond, 30*time.Second - 500*time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGraceful(t, *tt.cfg, http.NotFoundHandler())
				start := time.Now()
				g.RegisterHook(func(ctx context.Context) error {
					deadline, _ := ctx.Deadline()
					if after, left := time.Since(start), time.Until(deadline); after != tt.delay || left != tt.hook {
						t.Errorf("the hook ran after %v and has %v, want %v and %v", after, left, tt.delay, tt.hook)
					}
					return nil
				})
				g.Shutdown() // also before Run
				g.start(t.Context())
				if err := <-g.done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestShutdownGoesThroughItsPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mux := http.NewServeMux()
		mux.Handle("/health", conduit.Health())
		mux.Handle("/", textHandler("ok"))
		g := newGraceful(t, conduit.ShutdownConfig{Delay: 5 * time.Second, Timeout: time.Minute}, mux)
		g.start(context.Background())
		client := g.l.client(t)
		check := func(after time.Duration, path string, status int, wantClose bool) {
			t.Helper()
			if got := get(t, client, "http://conduit.test"+path); got.status != status || got.close != wantClose {
				t.Errorf("%v after the signal %s = %d, close %v; want %d, %v", after, path, got.status, got.close, status, wantClose)
			}
		}
		check(-1, "/", 200, false)
		check(-1, "/health", 200, false)
		g.Shutdown()
		start := time.Now()
		for _, phase := range []struct {
			until time.Duration
			close bool
		}{{3900 * time.Millisecond, true}, {4900 * time.Millisecond, false}} {
			for ; time.Since(start) < phase.until; time.Sleep(100 * time.Millisecond) {
				synctest.Wait()
				check(time.Since(start), "/", 200, phase.close)
				check(time.Since(start), "/health", 503, phase.close)
			}
			time.Sleep(150 * time.Millisecond)
		}
		// The listener is closed by now; the connection that phase 3 has kept
		// is still served, and told to close.
		select {
		case <-g.l.closed:
		default:
			t.Error("the listener is open after Delay")
		}
		check(time.Since(start), "/", 200, true)
		if err := <-g.done; err != nil {
			t.Errorf("Run = %v", err)
		}
		if took := time.Since(start); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("took %v, want Delay and at most 250 ms more", took)
		}
		line := g.logs.find("shutdown")
		if len(line) != 1 || line[0]["level"] != "INFO" || line[0]["delay"] != float64(5*time.Second) || line[0]["aborted_connections"] != 0.0 || line[0]["drained"].(float64) < 50 {
			t.Errorf("logged %v", line)
		}
	})
}

// Connections that wait in the listener's queue when it is closed are reset,
// and with them the requests that they carry.
func TestQueuedConnectionsAreServed(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
	accepting, hold := make(chan struct{}, 100), make(chan struct{})
	srv.HTTPServer().ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew { // on the goroutine that accepts
			accepting <- struct{}{}
			<-hold
		}
	}
	l := &observedListener{TCPListener: listen(t).(*net.TCPListener), stopping: make(chan struct{})}
	serveOn(t, srv, l)
	var conns []net.Conn
	var readers []*bufio.Reader
	for range 20 {
		conn, br := rawDial(t, l.Addr().String())
		fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
		conns, readers = append(conns, conn), append(readers, br)
	}
	<-accepting
	stopped := make(chan error, 1)
	go func() { stopped <- srv.Shutdown(context.Background()) }()
	<-l.stopping
	close(hold)
	for i, br := range readers {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Errorf("queued request %d: %v", i, err)
			continue
		}
		res.Body.Close()
		if !res.Close {
			t.Errorf("queued request %d was not told to close", i)
		}
		conns[i].Close()
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// observedListener tells when the server begins to stop it.
type observedListener struct {
	*net.TCPListener
	stopping chan struct{}
	once     sync.Once
}

func (l *observedListener) SetDeadline(deadline time.Time) error {
	l.once.Do(func() { close(l.stopping) })
	return l.TCPListener.SetDeadline(deadline)
}

func TestRunningRequestsAreWaitedFor(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		finish := make(chan struct{})
		srv, client, url := streamBubble(t, p, conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-finish
			io.WriteString(w, "done")
		})})
		responses := make(chan response, 10)
		for range 10 {
			go func() { responses <- get(t, client, url) }()
		}
		synctest.Wait()
		srv.Drain()
		stopped := make(chan error, 1)
		go func() { stopped <- srv.Shutdown(context.Background()) }()
		time.Sleep(10 * time.Second)
		close(finish)
		for range 10 {
			if got := <-responses; got.body != "done" {
				t.Errorf("response %+v, want done", got)
			}
		}
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
}

// On HTTP/2 a connection that is closed does not end its handlers. Hooks must not
// close what they use.
func TestHandlersOfClientsThatLeftAreWaitedFor(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		var done atomic.Bool
		srv, client, url := streamBubble(t, p, conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			time.Sleep(5 * time.Second) // longer than the linger
			done.Store(true)
		})})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
		if res, err := client.Do(req); err == nil {
			t.Fatalf("got %s", res.Status)
		}
		client.CloseIdleConnections()
		synctest.Wait()
		srv.Drain()
		if err := srv.Shutdown(t.Context()); err != nil || !done.Load() {
			t.Errorf("Shutdown = %v, the handler has returned: %v", err, done.Load())
		}
	})
}

// A handler that a Timeout has responded for may still use what is closed after
// the shutdown.
func TestShutdownWaitsForAHandlerThatATimeoutLeftBehind(t *testing.T) {
	for _, limit := range timeouts {
		for _, patience := range []time.Duration{time.Minute, 2 * time.Second} {
			t.Run(fmt.Sprint(limit.name, patience), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					returned := make(chan struct{})
					srv, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: limit.new(time.Second)(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
						defer close(returned)
						time.Sleep(10 * time.Second) // and heeds no context
					}))})
					if got := get(t, client, url); got.status != 503 {
						t.Errorf("status %d, want 503", got.status)
					}
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					err := srv.Shutdown(ctx)
					select {
					case <-returned:
						if err != nil {
							t.Errorf("Shutdown = %v, want nil", err)
						}
					default:
						if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 requests unfinished") {
							t.Errorf("Shutdown = %v while a handler runs, want one unfinished", err)
						}
					}
					<-returned
				})
			})
		}
	}
}

func TestHijackedConnectionsAreWaitedFor(t *testing.T) {
	for _, heeds := range []bool{true, false} {
		t.Run(fmt.Sprintf("heeds Draining %v", heeds), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				forever := make(chan struct{})
				g := newGraceful(t, conduit.ShutdownConfig{}, hijacking(t, func(ctx context.Context) {
					if !heeds {
						<-forever
						return
					}
					<-conduit.Draining(ctx)
					time.Sleep(3 * time.Second)
				}))
				g.start(context.Background())
				g.l.open(t)
				start := time.Now()
				g.Shutdown()
				err := <-g.done
				close(forever)
				took, line := time.Since(start), g.logs.find("shutdown")
				wantTook, waited, left := 3*time.Second, 1.0, 0.0
				if !heeds {
					wantTook, waited, left = 25*time.Second, 0.0, 1.0
				}
				if (err == nil) != heeds || took != wantTook {
					t.Errorf("Run = %v after %v, want an error %v after %v", err, took, !heeds, wantTook)
				}
				if len(line) != 1 || line[0]["hijacked_waited"] != waited || line[0]["hijacked_left"] != left {
					t.Errorf("logged %v, want %v waited for and %v left", line, waited, left)
				}
			})
		})
	}
}

func TestSilentConnectionsDoNotHoldAShutdown(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		srv, l := p.server(t, &conduit.Config{Handler: textHandler("ok")}), newPipeListener()
		serveBubble(t, srv, l)
		for _, sent := range []string{"", "GET / HTT", "GET / HTTP/1.1\r\nHost: x\r\nX-Half", "\x16\x03\x01"} {
			conn := l.dial()
			go io.Copy(io.Discard, conn)
			io.WriteString(conn, sent)
		}
		synctest.Wait()
		start := time.Now()
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		// net/http alone takes more than five seconds.
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %v, want at most a second", took)
		}
	})
}

func TestShutdownClosesConnectionsAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		causes := make(chan error, 2)
		g := newGraceful(t, conduit.ShutdownConfig{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			causes <- context.Cause(r.Context())
		}))
		hooked := false
		g.RegisterHook(func(ctx context.Context) error {
			hooked = true
			if deadline, _ := ctx.Deadline(); time.Until(deadline) != 5*time.Second {
				t.Errorf("the hook has %v, want 5s", time.Until(deadline))
			}
			return nil
		})
		g.start(context.Background())
		g.l.open(t)
		g.l.open(t)
		start := time.Now()
		g.Shutdown()
		err := <-g.done
		if err == nil || !strings.Contains(err.Error(), "2 connections aborted") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run = %v, want 2 connections aborted", err)
		}
		if took := time.Since(start); took != 25*time.Second {
			t.Errorf("took %v, want 30s less the hooks' 5s", took)
		}
		for range 2 {
			if cause := <-causes; cause == nil || !strings.Contains(cause.Error(), "conduit: Shutdown: ") {
				t.Errorf("cause = %v, want conduit's", cause)
			}
		}
		if !hooked {
			t.Error("the hook did not run")
		}
		if line := g.logs.find("shutdown"); len(line) != 1 || line[0]["level"] != "ERROR" || line[0]["aborted_connections"] != 2.0 {
			t.Errorf("logged %v", line)
		}
	})
}

// Not that of a connection which has been closed.
func TestShutdownOutOfTimeIsTheCauseBehindABaseContext(t *testing.T) {
	for range 20 {
		running, cause := make(chan struct{}), make(chan error, 1)
		srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			close(running)
			<-r.Context().Done()
			cause <- context.Cause(r.Context())
		})))
		srv.HTTPServer().BaseContext = func(net.Listener) context.Context { return context.WithValue(t.Context(), t, t) }
		conn, _ := rawDial(t, strings.TrimPrefix(serve(t, srv), "http://"))
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		<-running
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := srv.Shutdown(ctx); err == nil {
			t.Error("Shutdown = nil, want one request that had to be cancelled")
		}
		if got := <-cause; !strings.Contains(got.Error(), "conduit: Shutdown: ") {
			t.Fatalf("the cause is %v, want Shutdown's", got)
		}
	}
}

// Whatever the first one waits for, another that is out of time ends it.
func TestASecondShutdownOrCloseEndsTheFirst(t *testing.T) {
	shutdown := func(srv *conduit.Server) error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		return srv.Shutdown(ctx)
	}
	tests := []struct {
		name     string
		hijacked bool
		end      func(*conduit.Server) error
		want     string // in the error; end returns none if it is empty
	}{
		{"request, Shutdown", false, shutdown, "1 connections aborted, 1 requests unfinished"},
		{"request, Close", false, (*conduit.Server).Close, ""},
		{"hijacked, Shutdown", true, shutdown, "1 of them hijacked"},
		{"hijacked, Close", true, (*conduit.Server).Close, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				forever := make(chan struct{})
				defer close(forever)
				h := hijacking(t, func(context.Context) { <-forever })
				if !tt.hijacked {
					h = waitForContext
				}
				srv, l := newServer(t, conduit.DefaultConfig(h)), newPipeListener()
				serveBubble(t, srv, l)
				l.open(t)
				first := make(chan error, 1)
				go func() { first <- srv.Shutdown(context.Background()) }()
				synctest.Wait()
				err := tt.end(srv)
				switch {
				case tt.want == "" && err != nil:
					t.Errorf("the second = %v, want nil", err)
				case tt.want != "" && (!errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), tt.want)):
					t.Errorf("the second = %v, want %s", err, tt.want)
				}
				if err := <-first; err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("the first = %v, want an error with %q", err, tt.want)
				}
			})
		})
	}
}

func TestCloseCancelsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := make(chan error, 1)
		srv, l := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			cause <- context.Cause(r.Context())
		}))), newPipeListener()
		serveBubble(t, srv, l)
		l.open(t)
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		if err := <-cause; err != http.ErrServerClosed {
			t.Errorf("cause = %v, want http.ErrServerClosed", err)
		}
	})
}

// A listener that limits its connections may wait for one to be closed before
// it accepts, and net/http for the listener.
func TestShutdownKeepsItsDeadlineWithAStuckListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, l := newServer(t, conduit.DefaultConfig(textHandler("ok"))), &limitListener{newPipeListener(), make(chan struct{}, 1)}
		l.free <- struct{}{}
		serveOn(t, srv, l)
		get(t, l.client(t), "http://conduit.test/") // and stay connected
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		srv.Shutdown(ctx)
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %v, want at most the second of its context", took)
		}
	})
}

type limitListener struct {
	*pipeListener
	free chan struct{}
}

func (l *limitListener) Accept() (net.Conn, error) {
	<-l.free
	c, err := l.pipeListener.Accept()
	if err != nil {
		l.free <- struct{}{}
		return nil, err
	}
	return &limitConn{Conn: c, free: sync.OnceFunc(func() { l.free <- struct{}{} })}, nil
}

type limitConn struct {
	net.Conn
	free func()
}

func (c *limitConn) Close() error {
	c.free()
	return c.Conn.Close()
}

func TestHooksRunLastInFirstOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGraceful(t, conduit.ShutdownConfig{HookTimeout: 8 * time.Second}, http.NotFoundHandler())
		var mu sync.Mutex // a hook that was abandoned goes on
		var order []string
		note := func(name string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, name)
		}
		noteBudget := func(ctx context.Context, name string, want time.Duration) {
			note(name)
			if deadline, _ := ctx.Deadline(); time.Until(deadline) != want {
				t.Errorf("%s has %v, want %v", name, time.Until(deadline), want)
			}
		}
		// The one of six that hangs takes its sixth and the grace.
		left := 8*time.Second - 8*time.Second/6 - 50*time.Millisecond
		failed := errors.New("cannot close")
		never := make(chan struct{})
		g.RegisterHook(func(ctx context.Context) error { noteBudget(ctx, "first", left-2*time.Second); return nil })
		g.RegisterHook(func(ctx context.Context) error {
			noteBudget(ctx, "registers", left/2)
			time.Sleep(2 * time.Second)
			g.RegisterHook(func(context.Context) error { note("registered"); return nil })
			return nil
		})
		g.RegisterHook(func(context.Context) error { note("panics"); panic("boom") })
		g.RegisterHook(func(context.Context) error { note("exits"); runtime.Goexit(); return nil })
		g.RegisterHook(failingHook(failed))
		g.RegisterHook(func(context.Context) error { note("hangs"); <-never; return nil })
		g.Shutdown()
		g.start(context.Background())
		err := <-g.done
		close(never)
		if want := []string{"hangs", "exits", "panics", "registers", "registered", "first"}; !slices.Equal(order, want) {
			t.Errorf("order %q, want %q", order, want)
		}
		if !errors.Is(err, failed) {
			t.Errorf("the error %v does not wrap the hook's", err)
		}
		for _, want := range []string{"TestHooksRunLastInFirstOut.", "failingHook", "panic: boom", "did not return", "ended its goroutine"} {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("the error does not say %q:\n%v", want, err)
			}
		}
	})
}

func failingHook(err error) func(context.Context) error {
	return func(context.Context) error { return err }
}

func TestHooksRunWhenTheServerCannotStart(t *testing.T) {
	taken := listen(t)
	var logs logBuffer
	srv := newServer(t, &conduit.Config{Address: taken.Addr().String(), Handler: http.NotFoundHandler(), Logger: logs.logger()})
	g := conduit.NewGracefulShutdown(srv, nil)
	hooked := false
	g.RegisterHook(func(context.Context) error { hooked = true; return nil })
	err := g.Start()
	if err == nil || !strings.Contains(err.Error(), taken.Addr().String()) || strings.Contains(err.Error(), "\n") {
		t.Errorf("Start = %v, want one line that names the address", err)
	}
	if !hooked {
		t.Error("the hook did not run")
	}
	if logs.String() != "" {
		t.Errorf("logged %s, want nothing beside the error", logs.String())
	}
}

func TestRunEndsInEveryWayOnce(t *testing.T) {
	ways := map[string]func(g *graceful, cancel context.CancelFunc){
		"context": func(_ *graceful, cancel context.CancelFunc) { cancel() },
		"Shutdown": func(g *graceful, _ context.CancelFunc) {
			for range 5 {
				g.Shutdown()
			}
		},
		"Server.Shutdown": func(g *graceful, _ context.CancelFunc) { g.srv.Shutdown(context.Background()) },
		"Server.Close":    func(g *graceful, _ context.CancelFunc) { g.srv.Close() },
	}
	for name, end := range ways {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGraceful(t, conduit.ShutdownConfig{}, textHandler("ok"))
				hooks := 0
				g.RegisterHook(func(ctx context.Context) error { hooks++; return ctx.Err() })
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				g.start(ctx)
				if got := get(t, g.l.client(t), "http://conduit.test/"); got.body != "ok" {
					t.Errorf("response %+v", got)
				}
				end(g, cancel)
				if err := <-g.done; err != nil || hooks != 1 {
					t.Errorf("Run = %v with %d hooks run; want nil and 1", err, hooks)
				}
				l := newPipeListener()
				if err := g.Run(ctx, l); err == nil || !strings.Contains(err.Error(), "was called before") {
					t.Errorf("a second Run = %v, want an error", err)
				}
				select {
				case <-l.closed:
				default:
					t.Error("a second Run has left its listener open")
				}
			})
		})
	}
}

func TestNoSignalsMeansNone(t *testing.T) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP) // which would end the process otherwise
	defer signal.Stop(hangups)
	g := newGraceful(t, conduit.ShutdownConfig{Delay: -1}, textHandler("ok"))
	g.start(context.Background())
	client := g.l.client(t)
	get(t, client, "http://conduit.test/")
	client.CloseIdleConnections()
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-hangups
	g.Shutdown()
	if err := <-g.done; err != nil {
		t.Error(err)
	}
	if lines := g.logs.find("draining"); len(lines) != 1 || lines[0]["cause"] != "Shutdown" {
		t.Errorf("logged %v, want Shutdown as the cause", lines)
	}
}

func TestSignals(t *testing.T) {
	tests := []struct {
		name    string
		signals []syscall.Signal
		stuck   bool
		status  int
		output  []string // in this order
		not     string
	}{
		{"SIGTERM drains", []syscall.Signal{syscall.SIGTERM}, false, 0, []string{"cause=terminated", "msg=shutdown", "returned <nil>"}, "drain aborted"},
		{"SIGINT drains", []syscall.Signal{syscall.SIGINT}, false, 0, []string{"cause=interrupt", "msg=shutdown", "returned <nil>"}, "drain aborted"},
		{"a second aborts", []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, true, 0, []string{"cause=terminated", "drain aborted", "hook", "msg=shutdown", "1 connections aborted"}, "shutdown aborted"},
		{"a third kills", []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGINT}, true, 130, []string{"drain aborted", "hook", "shutdown aborted"}, "msg=shutdown"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			hang := ""
			if len(tt.signals) > 2 {
				hang = "1" // in the hook, for the third to interrupt
			}
			cmd.Env = append(os.Environ(), "CONDUIT_TEST_PROGRAM=graceful", "CONDUIT_TEST_HANG="+hang)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Kill()
			lines := bufio.NewScanner(out)
			var output strings.Builder
			until := func(part string) string {
				for lines.Scan() {
					fmt.Fprintln(&output, lines.Text())
					if strings.Contains(lines.Text(), part) {
						return lines.Text()
					}
				}
				t.Fatalf("the program never said %q:\n%s", part, output.String())
				return ""
			}
			_, addr, _ := strings.Cut(until("msg=listening"), "addr=")
			addr, _, _ = strings.Cut(addr, " ")
			if tt.stuck {
				conn, _ := rawDial(t, addr)
				fmt.Fprint(conn, "GET /stuck HTTP/1.1\r\nHost: x\r\n\r\n")
				until("stuck")
			}
			for i, sig := range tt.signals {
				switch i {
				case 1:
					until("msg=draining")
				case 2:
					until("hook")
				}
				if err := cmd.Process.Signal(sig); err != nil {
					t.Fatal(err)
				}
			}
			for lines.Scan() {
				fmt.Fprintln(&output, lines.Text())
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); got != tt.status {
				t.Errorf("exit status %d, want %d:\n%s", got, tt.status, output.String())
			}
			rest := output.String()
			for _, want := range tt.output {
				_, after, ok := strings.Cut(rest, want)
				if !ok {
					t.Fatalf("no %q in\n%s", want, output.String())
				}
				rest = after
			}
			if strings.Contains(output.String(), tt.not) {
				t.Errorf("%q in\n%s", tt.not, output.String())
			}
		})
	}
}

// gracefulProgram serves until it is told to stop.
func gracefulProgram() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, nil))
	srv, err := conduit.New(&conduit.Config{Address: "127.0.0.1:0", Logger: logger, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("stuck")
		<-r.Context().Done()
		select {}
	})})
	if err != nil {
		panic(err)
	}
	g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: -1})
	g.RegisterHook(func(ctx context.Context) error {
		fmt.Println("hook")
		if os.Getenv("CONDUIT_TEST_HANG") != "" {
			select {}
		}
		return nil
	})
	fmt.Println("returned", g.Start())
	os.Exit(0)
}

// Timeout

// limiter is a way to make a Timeout.
type limiter struct {
	name string
	fast bool
	new  func(time.Duration) conduit.Middleware
}

var (
	timeouts  = []limiter{{"Timeout", false, conduit.Timeout}, {"FastTimeout", true, conduit.FastTimeout}}
	noTimeout = limiter{"without", false, func(time.Duration) conduit.Middleware { return conduit.Chain() }}
)

// eachTimeout runs a test for both variants over each protocol.
func eachTimeout(t *testing.T, test func(t *testing.T, p protocol, limit limiter)) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, limit := range timeouts {
			t.Run(limit.name, func(t *testing.T) { test(t, p, limit) })
		}
	})
}

// eachTimeoutBubble is eachTimeout with a bubble for each.
func eachTimeoutBubble(t *testing.T, test func(t *testing.T, p protocol, limit limiter)) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		synctest.Test(t, func(t *testing.T) { test(t, p, limit) })
	})
}

func TestTimeoutRespondsForALateHandler(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		for _, method := range []string{"GET", "HEAD", "POST"} {
			var logs logBuffer
			release, ended := make(chan struct{}), make(chan error, 1)
			chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(time.Second))
			_, client, url := streamBubble(t, p, conduit.Config{Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Cache-Control", "max-age=3600")
				w.Header().Set("Content-Length", "7")
				<-r.Context().Done()
				if limit.fast {
					// The client must have the response while the handler runs on.
					<-release
				}
				_, err := io.WriteString(w, "too late")
				w.WriteHeader(http.StatusTeapot)
				w.Header().Set("X-Late", "1")
				ended <- err
			}))})
			req, _ := http.NewRequest(method, url, strings.NewReader("body"))
			start := time.Now()
			res, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			want := "Service Unavailable\n"
			if method == "HEAD" {
				want = ""
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(res.Body, got); err != nil || res.StatusCode != 503 || string(got) != want || time.Since(start) != time.Second {
				t.Errorf("%s: got %d %q, %v after %v; want 503 %q after 1s", method, res.StatusCode, got, err, time.Since(start), want)
			}
			close(release)
			if rest, err := io.ReadAll(res.Body); err != nil || len(rest) != 0 {
				t.Errorf("%s: then %q, %v; want the end", method, rest, err)
			}
			if ct := res.Header.Get("Content-Type"); ct != "text/plain; charset=utf-8" || res.Header.Get("X-Request-ID") == "" || res.Header.Get("Cache-Control") != "" {
				t.Errorf("%s: header %v, want text/plain, an id and nothing of the handler's", method, res.Header)
			}
			if err := <-ended; !errors.Is(err, conduit.ErrTimeout) || !errors.Is(err, http.ErrHandlerTimeout) {
				t.Errorf("%s: a late write returned %v, want ErrTimeout", method, err)
			}
			synctest.Wait()
			if line := logs.find("request"); len(line) != 1 || line[0]["status"] != 503.0 || line[0]["level"] != "ERROR" || line[0]["aborted"] != nil {
				t.Errorf("%s: logged %v, want one 503", method, line)
			}
		}
	})
}

func TestTimeoutResponseIsConfigurable(t *testing.T) {
	tests := []struct {
		name              string
		cfg               conduit.TimeoutConfig
		status            int
		body, contentType string
	}{
		{"default", conduit.TimeoutConfig{}, 503, "Service Unavailable\n", "text/plain; charset=utf-8"},
		{"status", conduit.TimeoutConfig{Status: 504}, 504, "Gateway Timeout\n", "text/plain; charset=utf-8"},
		{"text", conduit.TimeoutConfig{Message: "slow"}, 503, "slow", "text/plain; charset=utf-8"},
		{"JSON", conduit.TimeoutConfig{Message: `{"error":"slow"}`}, 503, `{"error":"slow"}`, "application/json"},
		{"type", conduit.TimeoutConfig{Message: "<p>slow", ContentType: "text/html"}, 503, "<p>slow", "text/html"},
	}
	for _, tt := range tests {
		for _, fast := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/fast=%v", tt.name, fast), func(t *testing.T) {
				cfg := tt.cfg
				cfg.Duration, cfg.Fast = time.Millisecond, fast
				cfg.Skip = func(r *http.Request) bool { return r.URL.Path == "/skip" }
				h := conduit.TimeoutWith(&cfg)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if _, ok := r.Context().Deadline(); !ok {
						io.WriteString(w, "no limit")
						return
					}
					<-r.Context().Done()
				}))
				cfg.Status, cfg.Message, cfg.Skip = 599, "changed", nil // it was copied
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
				if rec.Code != tt.status || rec.Body.String() != tt.body || rec.Header().Get("Content-Type") != tt.contentType {
					t.Errorf("got %d %q %q, want %d %q %q", rec.Code, rec.Body, rec.Header().Get("Content-Type"), tt.status, tt.body, tt.contentType)
				}
				rec = httptest.NewRecorder()
				h.ServeHTTP(rec, httptest.NewRequest("GET", "/skip", nil))
				if rec.Body.String() != "no limit" {
					t.Errorf("skipped request got %q", rec.Body)
				}
			})
		}
	}
}

// The usual configuration: Timeout(30s) behind a WriteTimeout of 15 s.
func TestTimeoutIsDeliveredBeyondWriteTimeout(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		for _, outer := range []limiter{noTimeout, limit} {
			h := conduit.Chain(outer.new(time.Minute), limit.new(30*time.Second))(http.HandlerFunc(waitForContext))
			_, client, url := streamBubble(t, p, conduit.Config{Handler: h})
			start := time.Now()
			if got := get(t, client, url); got.status != 503 || time.Since(start) != 30*time.Second {
				t.Errorf("inside %s: %d after %v, want 503 after 30s", outer.name, got.status, time.Since(start))
			}
		}
	})
}

// A timeout inside another must not take the time that the outer one has.
func TestInnerTimeoutLeavesTheOuterOnesDeadline(t *testing.T) {
	for _, limit := range timeouts {
		synctest.Test(t, func(t *testing.T) {
			slow := func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					next.ServeHTTP(w, r)
					time.Sleep(50 * time.Second)
					io.WriteString(w, "slow")
				})
			}
			h := conduit.Chain(limit.new(time.Minute), slow, limit.new(20*time.Second))(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
			l := newPipeListener()
			serveBubble(t, newServer(t, conduit.DefaultConfig(h)), l)
			if got := get(t, l.client(t), "http://conduit.test/"); got.body != "slow" {
				t.Errorf("%s: %+v, want slow", limit.name, got)
			}
		})
	}
}

func TestTimeoutAbortsAStartedResponse(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		for _, stuck := range []bool{false, true} { // in a write
			var logs logBuffer
			ended := make(chan error, 1)
			chain := conduit.Chain(conduit.Recovery(), conduit.Logging(), limit.new(time.Second))
			_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: time.Minute, Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, err := io.WriteString(w, "half")
				w.(http.Flusher).Flush()
				for stuck && err == nil { // until the client's window is full
					_, err = w.Write(make([]byte, 1<<20))
				}
				if !stuck {
					<-r.Context().Done()
					_, err = io.WriteString(w, "more")
				}
				ended <- err
			}))})
			start := time.Now()
			res, err := client.Get(url)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if err := <-ended; err == nil {
				t.Errorf("stuck %v: the handler's last write was let through", stuck)
			}
			if took := time.Since(start); took != time.Second {
				t.Errorf("stuck %v: took %v, want 1s", stuck, took)
			}
			if body, err := io.ReadAll(res.Body); err == nil {
				t.Errorf("stuck %v: read %d bytes as a whole response, want an error", stuck, len(body))
			}
			synctest.Wait()
			if line := logs.find("request"); len(line) != 1 || line[0]["status"] != 200.0 || line[0]["aborted"] != true {
				t.Errorf("stuck %v: logged %v, want 200, aborted", stuck, line)
			}
			if n := len(logs.find("panic")); n != 0 {
				t.Errorf("stuck %v: %d panics logged, want none", stuck, n)
			}
		}
	})
}

// net/http reads what is left of the body before it responds, which waits for
// the handler that is stuck in Read.
func TestTimeoutFreesAHandlerStuckInTheBody(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		freed := make(chan error, 1)
		_, client, url := streamBubble(t, p, conduit.Config{
			ReadTimeout: time.Minute, WriteTimeout: time.Minute,
			Handler: limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
				_, err := io.ReadAll(r.Body)
				freed <- err
			})),
		})
		body, writer := io.Pipe()
		defer writer.Close()
		go writer.Write([]byte("a part"))
		req, _ := http.NewRequest("POST", url, body)
		start := time.Now()
		got := do(t, client, req)
		if got.status != 503 {
			t.Errorf("status %d, want 503", got.status)
		}
		if p.http1 && !got.close {
			t.Error("the connection was kept with half a body on it")
		}
		if err := <-freed; err == nil {
			t.Error("the handler read a whole body")
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("took %v, want about 1s", took)
		}
	})
}

// A connection that is closed with data unread is reset, and the response may
// be lost with it.
func TestTimeoutRespondsToAClientThatIsStillSending(t *testing.T) {
	handlers := map[string]http.HandlerFunc{
		"waits":  func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"sleeps": func(w http.ResponseWriter, r *http.Request) { time.Sleep(100 * time.Millisecond) },
		"reads":  func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) },
	}
	for name, h := range handlers {
		for _, limit := range timeouts {
			for _, header := range []string{"Content-Length: 100000", "Transfer-Encoding: chunked", "Connection: close\r\nContent-Length: 100000"} {
				t.Run(name+"/"+limit.name+"/"+header, func(t *testing.T) {
					t.Parallel()
					var logs logBuffer
					srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.Logging(), limit.new(20*time.Millisecond))(h)})
					conn, br := rawDial(t, strings.TrimPrefix(serve(t, srv), "http://"))
					piece := "3e8\r\n" + strings.Repeat("x", 1000) + "\r\n"
					send := func() {
						if _, err := io.WriteString(conn, piece); err != nil {
							t.Errorf("the client may not send: %v", err)
						}
					}
					fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n", header)
					send()
					res, err := http.ReadResponse(br, nil)
					if err != nil {
						t.Fatal(err)
					}
					body, err := io.ReadAll(res.Body)
					if res.StatusCode != 503 || !res.Close || string(body) != "Service Unavailable\n" || err != nil {
						t.Errorf("got %d %q, close %v, %v; want the 503, and close", res.StatusCode, body, res.Close, err)
					}
					send()
					if rest, err := io.ReadAll(br); len(rest) > 0 || err != nil {
						t.Errorf("then %q, %v; want the end", rest, err)
					}
					send()
					if line := logs.request(t); line["status"] != 503.0 || line["aborted"] != nil {
						t.Errorf("logged %v, want a whole 503", line)
					}
				})
			}
		}
	}
}

// A wrapper without Unwrap hides the deadlines. The client gets a response even so,
// while the handler waits on for a body that does not come.
func TestTimeoutRespondsWithoutDeadlines(t *testing.T) {
	opaque := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next.ServeHTTP(struct{ http.ResponseWriter }{w}, r)
		})
	}
	synctest.Test(t, func(t *testing.T) {
		h := conduit.Chain(opaque, conduit.Timeout(time.Second))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.ReadAll(r.Body)
		}))
		l := newPipeListener()
		serveBubble(t, newServer(t, &conduit.Config{ReadTimeout: time.Minute, WriteTimeout: time.Minute, Handler: h}), l)
		conn := l.dial()
		defer conn.Close()
		start := time.Now()
		io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if took := time.Since(start); res.StatusCode != 503 || took != time.Second {
			t.Errorf("%d after %v, want 503 after 1s", res.StatusCode, took)
		}
	})
}

func TestTimeoutKeepsTheConnectionWhereItCan(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		_, client, url := streamBubble(t, p, conduit.Config{Handler: limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}))})
		var dials int
		ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
			if !info.Reused {
				dials++
			}
		}})
		closes := p.http1 && limit.fast
		for range 3 {
			req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
			if got := do(t, client, req); got.status != 503 || got.close != closes {
				t.Errorf("got %+v, want 503 and close %v", got, closes)
			}
		}
		if !closes && dials != 1 {
			t.Errorf("%d connections, want 1", dials)
		}
	})
}

func TestWhatIsInTimePassesATimeout(t *testing.T) {
	outer := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Vary", "Accept-Encoding")
			w.Header().Set("X-Frame-Options", "DENY")
			next.ServeHTTP(w, r)
		})
	}
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		read := make(chan struct{})
		mux := http.NewServeMux()
		mux.HandleFunc("GET /header/{body...}", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Add("Vary", "Origin")
			w.Header().Del("X-Frame-Options")
			io.WriteString(w, r.PathValue("body"))
		})
		mux.HandleFunc("GET /nothing", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Add("Vary", "Origin")
			w.Header().Del("X-Frame-Options")
		})
		mux.HandleFunc("GET /flushed", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "first")
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			<-read
			io.WriteString(w, "second")
		})
		mux.HandleFunc("GET /trailer/declared", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "X-Sum")
			w.Header().Set("X-Sum", "not yet")
			io.WriteString(w, "body")
			w.Header().Set("X-Sum", "42")
		})
		mux.HandleFunc("GET /trailer/prefixed", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Other", "1")
			io.WriteString(w, "body")
			w.(http.Flusher).Flush()
			w.Header().Del("X-Other") // as many fields as before
			w.Header().Set(http.TrailerPrefix+"X-Sum", "42")
		})
		mux.HandleFunc("GET /deadlines", func(w http.ResponseWriter, _ *http.Request) {
			rc := http.NewResponseController(w)
			if err := errors.Join(rc.SetWriteDeadline(time.Now().Add(time.Hour)), rc.SetReadDeadline(time.Now().Add(time.Hour)), rc.EnableFullDuplex()); err != nil {
				t.Error(err)
			}
			io.WriteString(w, "ok")
		})
		url := p.serve(t, p.server(t, &conduit.Config{Handler: conduit.Chain(outer, limit.new(time.Minute))(mux)}))
		client := p.client(t)

		for _, path := range []string{"/header/body", "/nothing"} {
			got := get(t, client, url+path)
			if vary := got.header["Vary"]; !slices.Equal(vary, []string{"Accept-Encoding", "Origin"}) || got.header.Get("X-Frame-Options") != "" {
				t.Errorf("%s: header %v, want that of the middleware as the handler changed it", path, got.header)
			}
		}
		if got := get(t, client, url+"/deadlines"); got.body != "ok" {
			t.Errorf("/deadlines: %+v, want ok", got)
		}
		for _, path := range []string{"/trailer/declared", "/trailer/prefixed", "/flushed"} {
			res, err := client.Get(url + path)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if path == "/flushed" {
				buf := make([]byte, 5)
				if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != "first" {
					t.Fatalf("%s: %q, %v, want the first part", path, buf, err)
				}
				close(read)
				if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "second" {
					t.Errorf("%s: %q, %v, want the second part", path, rest, err)
				}
				continue
			}
			io.Copy(io.Discard, res.Body)
			if got := res.Trailer.Get("X-Sum"); got != "42" {
				t.Errorf("%s: trailer %q, want 42", path, got)
			}
		}
	})
}

// The router marks the handler's copy of the request, which after a timeout only
// the handler may read, and the URL is one for both. The log is right even so.
func TestLogOfATimeoutHasTheRoute(t *testing.T) {
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			var logs logBuffer
			ended := make(chan struct{})
			mux := http.NewServeMux()
			mux.HandleFunc("GET /posts/{id}", func(w http.ResponseWriter, r *http.Request) {
				defer close(ended)
				<-r.Context().Done()
				if !limit.fast {
					r.URL.Path, r.URL.RawPath = "/changed", "/changed"
				}
			})
			h := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(20*time.Millisecond), conduit.Compression())(mux)
			url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
			get(t, http.DefaultClient, url+"/posts/7")
			<-ended
			if line := logs.request(t); line["status"] != 503.0 || line["path"] != "/posts/7" || line["pattern"] != "GET /posts/{id}" {
				t.Errorf("logged %v, want 503, the path and the pattern", line)
			}
		})
	}
}

// A source that blocks must not keep other writes of the handler waiting.
func TestTimeoutReadFromDoesNotHoldTheLock(t *testing.T) {
	for _, limit := range timeouts {
		synctest.Test(t, func(t *testing.T) {
			rec := httptest.NewRecorder()
			readerFrom := struct {
				http.ResponseWriter
				io.ReaderFrom
			}{rec, rec.Body}
			src, feed := io.Pipe()
			limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				copied := make(chan struct{})
				go func() {
					defer close(copied)
					io.Copy(w, src)
				}()
				io.WriteString(feed, strings.Repeat("x", 1000)) // more than is read ahead
				synctest.Wait()                                 // it now waits for the source
				io.WriteString(w, " not held ")
				io.WriteString(feed, "up")
				feed.Close()
				<-copied
			})).ServeHTTP(readerFrom, httptest.NewRequest("GET", "/", nil))
			if got := strings.TrimLeft(rec.Body.String(), "x"); got != " not held up" {
				t.Errorf("%s: body %q after the first bytes, want not held up", limit.name, got)
			}
		})
	}
}

func TestTimeoutSendsFilesWhole(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := make([]byte, 1<<20)
	rand.Read(content)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		url := p.serve(t, p.server(t, &conduit.Config{Handler: limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			f, err := os.Open(name)
			if err != nil {
				panic(err)
			}
			defer f.Close()
			w.Header().Set("X-Handler", "1")
			var src io.Reader = f
			want := int64(len(content))
			if n, err := strconv.ParseInt(r.FormValue("limit"), 10, 64); err == nil {
				src, want = io.LimitReader(f, n), min(n, want)
			}
			if r.FormValue("begun") != "" {
				w.WriteHeader(http.StatusOK)
			}
			if copied, err := io.Copy(w, src); err != nil || copied != want {
				t.Errorf("%s: copied %d, %v; want %d", r.URL.RawQuery, copied, err, want)
			}
		}))}))
		client := p.client(t)
		for query, want := range map[string][]byte{
			"": content, "begun=1": content,
			"limit=0": nil, "limit=0&begun=1": nil, "limit=10": content[:10],
			"limit=512": content[:512], "limit=513": content[:513], "limit=2000000": content,
		} {
			if got := get(t, client, url+"/?"+query); got.body != string(want) || got.header.Get("X-Handler") != "1" {
				t.Errorf("%s: %d bytes with %v, want %d and the handler's header", query, len(got.body), got.header, len(want))
			}
		}
	})
}

func TestPanicsCrossTheTimeoutWithTheirStack(t *testing.T) {
	t.Run("to net/http", func(t *testing.T) {
		var logs logBuffer
		url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Timeout(time.Minute)(http.HandlerFunc(panickingHandler))}))
		if res, err := http.Get(url); err == nil {
			t.Errorf("got %s, want a closed connection", res.Status)
		}
		line := logs.wait(t, func(line map[string]any) bool { return line["msg"] == "net/http" })
		if text, _ := line["err"].(string); !strings.Contains(text, "boom") || !strings.Contains(text, "panickingHandler") {
			t.Errorf("net/http printed %q, want the value and the handler's stack", text)
		}
	})
	t.Run("to a foreign recovery", func(t *testing.T) {
		for _, value := range []any{errors.New("boom"), http.ErrAbortHandler} {
			var got any
			func() {
				defer func() { got = recover() }()
				conduit.Chain(conduit.Timeout(time.Minute), conduit.Timeout(time.Minute))(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(value) })).
					ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
			}()
			if value == http.ErrAbortHandler {
				if got != value {
					t.Errorf("ErrAbortHandler arrived as %v", got)
				}
				continue
			}
			err, ok := got.(error)
			if !ok || !errors.Is(err, value.(error)) || strings.Count(err.Error(), "boom") != 1 {
				t.Errorf("got %v, want an error that wraps %v", got, value)
			}
		}
	})
	t.Run("late", func(t *testing.T) {
		var logs logBuffer
		release := make(chan struct{})
		mux := http.NewServeMux()
		mux.HandleFunc("GET /late/{x}", func(w http.ResponseWriter, r *http.Request) {
			<-release
			panickingHandler(w, r)
		})
		h := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(20*time.Millisecond))(mux)
		url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
		if got := get(t, http.DefaultClient, url+"/late/1"); got.status != 503 {
			t.Errorf("status %d, want 503", got.status)
		}
		close(release)
		line := logs.wait(t, func(line map[string]any) bool { return line["msg"] == "panic after a timeout" })
		if line == nil || line["err"] != "boom" || line["pattern"] != "GET /late/{x}" || line["request_id"] == nil || !strings.Contains(line["stack"].(string), "panickingHandler") {
			t.Errorf("logged %v", line)
		}
	})
}

func panickingHandler(http.ResponseWriter, *http.Request) { panic("boom") }

func TestTimeoutOfTheContext(t *testing.T) {
	type key struct{}
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				parent, cancelParent := context.WithCancelCause(context.WithValue(t.Context(), key{}, "kept"))
				defer cancelParent(nil)
				type result struct {
					after time.Duration
					errs  [4]error // Err and cause of the context and of a child
				}
				results := make(chan result, 1)
				var wait time.Duration
				h := limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					ctx := r.Context()
					start := time.Now()
					if deadline, ok := ctx.Deadline(); !ok || deadline.Sub(start) != time.Second {
						t.Errorf("Deadline = %v, %v", deadline, ok)
					}
					if ctx.Value(key{}) != "kept" || ctx.Err() != nil || context.Cause(ctx) != nil {
						t.Errorf("Value %v, Err %v, Cause %v", ctx.Value(key{}), ctx.Err(), context.Cause(ctx))
					}
					child, cancel := context.WithTimeout(context.WithValue(ctx, key{}, "child"), time.Hour)
					defer cancel()
					ran := make(chan struct{})
					context.AfterFunc(child, func() { close(ran) })
					if wait > 0 {
						time.Sleep(wait)
					} else {
						<-child.Done()
						<-ran
						<-ctx.Done()
					}
					if ctx.Value(key{}) != "kept" {
						t.Error("the value was lost")
					}
					results <- result{time.Since(start), [4]error{ctx.Err(), context.Cause(ctx), child.Err(), context.Cause(child)}}
				}))
				run := func() result {
					h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(parent, "GET", "/", nil))
					return <-results
				}
				want := result{time.Second, [4]error{context.DeadlineExceeded, conduit.ErrTimeout, context.DeadlineExceeded, conduit.ErrTimeout}}
				if got := run(); got != want {
					t.Errorf("after a timeout %v, want %v", got, want)
				}
				wait = 2 * time.Second // nobody asks before it is over
				want.after = wait
				if got := run(); got != want {
					t.Errorf("asked late %v, want %v", got, want)
				}
				wait = 0
				gone := errors.New("client disconnected")
				time.AfterFunc(time.Second/2, func() { cancelParent(gone) })
				want = result{time.Second / 2, [4]error{context.Canceled, gone, context.Canceled, gone}}
				if got := run(); got != want {
					t.Errorf("after the client went %v, want %v", got, want)
				}
			})
		})
	}
}

func TestErrTimeoutIsWhatPeopleLookFor(t *testing.T) {
	for _, target := range []error{context.DeadlineExceeded, http.ErrHandlerTimeout, conduit.ErrTimeout} {
		if !errors.Is(fmt.Errorf("query: %w", conduit.ErrTimeout), target) {
			t.Errorf("ErrTimeout is not %v", target)
		}
	}
	var timeout interface{ Timeout() bool }
	if !errors.As(conduit.ErrTimeout, &timeout) || !timeout.Timeout() || errors.Is(conduit.ErrTimeout, context.Canceled) {
		t.Error("ErrTimeout is no timeout")
	}
}

// What the contexts of a handler hold is freed when it returns, whether somebody has
// asked for their end before or asks later.
func TestTimeoutEndsTheContextWithTheHandler(t *testing.T) {
	for _, limit := range timeouts {
		synctest.Test(t, func(t *testing.T) {
			parent, cancel := context.WithCancel(t.Context())
			defer cancel()
			for _, derive := range []bool{false, true} {
				var kept context.Context
				cancelKept := func() {}
				limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if kept = r.Context(); derive {
						kept, cancelKept = context.WithCancel(kept)
					}
				})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(parent, "GET", "/", nil))
				synctest.Wait()
				if !derive {
					<-kept.Done()
				}
				if kept.Err() != context.Canceled {
					t.Errorf("%s, derived %v: Err = %v, want context.Canceled", limit.name, derive, kept.Err())
				}
				cancelKept()
			}
		})
	}
}

func TestTimeoutAfterAnInformationalResponse(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		chain := conduit.Chain(conduit.RequestID(), limit.new(time.Second))
		_, client, url := streamBubble(t, p, conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			<-r.Context().Done()
		}))})
		var hints []string
		req, _ := http.NewRequestWithContext(traceInformational(t.Context(), &hints), "GET", url, nil)
		got := do(t, client, req)
		if got.status != 503 || len(hints) != 1 {
			t.Errorf("status %d after %q, want 503 after one hint", got.status, hints)
		}
		if got.header.Get("Link") != "" || got.header.Get("X-Request-ID") == "" {
			t.Errorf("header %v, want the middleware's without the handler's", got.header)
		}
	})
}

// After a reset net/http may still be reading the header of an informational
// response when WriteHeader has returned.
func TestInformationalResponsesSurviveResets(t *testing.T) {
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			url := h2cProtocol.serve(t, h2cProtocol.server(t, &conduit.Config{Handler: conduit.Chain(conduit.RequestID(), limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for i := range 20 {
					w.Header().Set(fmt.Sprint("X-Hint-", i), "value")
				}
				w.WriteHeader(http.StatusEarlyHints)
				w.WriteHeader(http.StatusEarlyHints)
			}))}))
			client := h2cProtocol.client(t)
			var clients sync.WaitGroup
			for i := range 16 {
				clients.Go(func() {
					for n := range 25 {
						ctx, cancel := context.WithTimeout(t.Context(), time.Duration((i*25+n)%20)*100*time.Microsecond)
						req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
						if res, err := client.Do(req); err == nil {
							res.Body.Close()
						}
						cancel()
					}
				})
			}
			clients.Wait()
			if got := get(t, client, url); got.status != 200 {
				t.Errorf("afterwards %+v, want 200", got)
			}
		})
	}
}

func TestAHijackThatFailsLeavesTheTimeout(t *testing.T) {
	eachTimeoutBubble(t, func(t *testing.T, p protocol, limit limiter) {
		if p.http1 {
			return // it does not fail
		}
		_, client, url := streamBubble(t, p, conduit.Config{Handler: limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, _, err := w.(http.Hijacker).Hijack(); err == nil {
				t.Error("HTTP/2 was hijacked")
			}
			<-r.Context().Done()
		}))})
		if got := get(t, client, url); got.status != 503 {
			t.Errorf("status %d, want 503", got.status)
		}
	})
}

func TestTimeoutResponseHasNothingOfAnother(t *testing.T) {
	outer := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for _, field := range representationFields {
				w.Header().Set(field, "1")
			}
			w.Header().Set("Set-Cookie", "kept=1")
			next.ServeHTTP(w, r)
		})
	}
	for _, limit := range timeouts {
		rec := httptest.NewRecorder()
		conduit.Chain(outer, limit.new(time.Millisecond))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })).
			ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		if rec.Code != 503 || rec.Header().Get("Set-Cookie") == "" {
			t.Errorf("%s: %d %v, want 503 with the middleware's cookie", limit.name, rec.Code, rec.Header())
		}
		nothingIsLeft(t, rec.Header())
	}
}

// The timer's goroutine, where no Recovery is, writes through whatever is
// around the timeout.
func TestAWriterThatPanicsUnderATimeoutIsRecovered(t *testing.T) {
	bad := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(panicWriter{w}, r) })
	}
	for _, limit := range timeouts {
		var logs logBuffer
		h := conduit.Chain(conduit.Recovery(), bad, limit.new(10*time.Millisecond))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		got := get(t, http.DefaultClient, serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h})))
		if lines := logs.find("panic"); got.status != 500 || len(lines) != 1 || !strings.Contains(lines[0]["stack"].(string), "panicWriter") {
			t.Errorf("%s: status %d, logged %v; want 500 and the panic", limit.name, got.status, lines)
		}
	}
}

type panicWriter struct{ http.ResponseWriter }

func (panicWriter) WriteHeader(int) { panic("from a writer") }

func TestTimeoutFlushThatIsNotSupported(t *testing.T) {
	for _, limit := range timeouts {
		for _, late := range []bool{false, true} {
			rec := httptest.NewRecorder()
			h := limit.new(20 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("X-Before", "1")
				if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
					t.Errorf("Flush = %v, want http.ErrNotSupported", err)
				}
				w.Header().Set("X-After", "1")
				if late {
					<-r.Context().Done()
					return
				}
				w.WriteHeader(http.StatusNotFound)
			}))
			h.ServeHTTP(struct{ http.ResponseWriter }{rec}, httptest.NewRequest("GET", "/", nil))
			want, fields := http.StatusNotFound, "11"
			if late {
				want, fields = http.StatusServiceUnavailable, ""
			}
			if got := rec.Header().Get("X-Before") + rec.Header().Get("X-After"); rec.Code != want || got != fields {
				t.Errorf("%s: %d with %v, want %d", limit.name, rec.Code, rec.Header(), want)
			}
		}
	}
}

func TestHijackEndsTheTimeout(t *testing.T) {
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctxErr := make(chan error, 1)
				srv := newServer(t, conduit.DefaultConfig(conduit.Chain(conduit.RequestID(), conduit.Logging(), limit.new(time.Second), limit.new(2*time.Second))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					hijacker, ok := w.(http.Hijacker) // as older WebSocket packages look for it
					if !ok {
						t.Error("not an http.Hijacker")
						return
					}
					conn, _, err := hijacker.Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					time.Sleep(time.Minute)
					ctxErr <- r.Context().Err()
					io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\nlate")
				}))))
				l := newPipeListener()
				serveBubble(t, srv, l)
				conn := l.dial()
				defer conn.Close()
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				if got, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(got), "\r\n\r\nlate") {
					t.Errorf("read %q, %v", got, err)
				}
				if err := <-ctxErr; err != nil {
					t.Errorf("the context ended: %v", err)
				}
			})
		})
	}
}

// After a timeout the connection serves other requests: nothing that the
// handler still does may reach it.
func TestALateHandlerTouchesNothing(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		release, done := make(chan struct{}), make(chan []error, 1)
		url := p.serve(t, p.server(t, &conduit.Config{Handler: conduit.Chain(conduit.RequestID(), conduit.Timeout(20*time.Millisecond))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/late" {
				io.WriteString(w, "ok")
				return
			}
			<-release
			rc := http.NewResponseController(w)
			past := time.Unix(1, 0)
			_, _, hijack := rc.Hijack()
			_, write := w.Write([]byte("late"))
			_, writeString := io.WriteString(w, "late")
			file, _ := os.Open(os.Args[0])
			defer file.Close()
			_, readFrom := io.Copy(w, file)
			w.WriteHeader(http.StatusTeapot)
			w.Header().Set("X-Late", "1")
			done <- []error{rc.SetWriteDeadline(past), rc.SetReadDeadline(past), rc.EnableFullDuplex(), rc.Flush(), hijack, write, writeString, readFrom}
		}))}))
		client := p.client(t)
		if got := get(t, client, url+"/late"); got.status != 503 {
			t.Fatalf("status %d, want 503", got.status)
		}
		close(release)
		for i, err := range <-done {
			if !errors.Is(err, conduit.ErrTimeout) {
				t.Errorf("use %d = %v, want ErrTimeout", i, err)
			}
		}
		for range 3 {
			if got := get(t, client, url); got.body != "ok" || got.header.Get("X-Late") != "" {
				t.Errorf("the next response %+v, want ok", got)
			}
		}
	})
}

// On HTTP/2 the stream ends with the handler; one that ignores its context
// must not leave the client waiting.
func TestFastTimeoutEndsAnHTTP2Stream(t *testing.T) {
	for _, p := range []protocol{tlsProtocol, h2cProtocol} {
		t.Run(p.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				defer close(release)
				h := conduit.FastTimeout(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))
				_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: -1, Handler: h})
				start := time.Now()
				res, err := client.Get(url)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				body, _ := io.ReadAll(res.Body) // ends, if only with a reset
				if took := time.Since(start); res.StatusCode != 503 || string(body) != "Service Unavailable\n" || took != 2*time.Second {
					t.Errorf("got %d %q after %v, want the 503 whole after 2s", res.StatusCode, body, took)
				}
			})
		})
	}
}

// Timers and channels of one testing/synctest bubble crash the next, so a
// Timeout that several tests share must not pass them on.
func TestTimeoutIsFitForBubbles(t *testing.T) {
	for _, limit := range timeouts {
		h := limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/late" {
				<-r.Context().Done()
			}
		}))
		run := func(t *testing.T, path string, want int) {
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
			if rec.Code != want {
				t.Errorf("%s: %s = %d, want %d", limit.name, path, rec.Code, want)
			}
		}
		for range 3 {
			run(t, "/", 200)
			synctest.Test(t, func(t *testing.T) {
				for range 3 {
					run(t, "/", 200)
					run(t, "/late", 503)
				}
			})
		}
	}
}

func TestLateMultipartFilesAreRemoved(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	files := func() int {
		entries, _ := os.ReadDir(dir)
		return len(entries)
	}
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				mux := http.NewServeMux()
				mux.HandleFunc("POST /", func(w http.ResponseWriter, r *http.Request) {
					if err := r.ParseMultipartForm(1); err != nil {
						t.Error(err)
					}
					<-release
				})
				l := newPipeListener()
				serveBubble(t, newServer(t, conduit.DefaultConfig(conduit.Chain(conduit.RequestID(), limit.new(time.Second))(mux))), l)
				body, contentType := multipartBody(t)
				req, _ := http.NewRequest("POST", "http://conduit.test/", body)
				req.Header.Set("Content-Type", contentType)
				if got := do(t, l.client(t), req); got.status != 503 {
					t.Errorf("status %d, want 503", got.status)
				}
				if n := files(); n != 1 {
					t.Errorf("%d files while the handler runs, want 1", n)
				}
				close(release)
				synctest.Wait()
				if n := files(); n != 0 {
					t.Errorf("%d files are left", n)
				}
			})
		})
	}
}

// Handlers and timers that race for the response: one of them has it whole.
func TestTimeoutRaces(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(2*time.Millisecond))
		srv := p.server(t, &conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			timer := time.NewTimer(time.Duration(time.Now().UnixNano() % int64(4*time.Millisecond)))
			defer timer.Stop()
			<-timer.C
			w.Header().Set("Content-Length", "3000")
			w.Write(make([]byte, 1000))
			w.Write(make([]byte, 1000))
			w.Write(make([]byte, 1000))
		}))})
		url, client := p.serve(t, srv), p.client(t)
		var whole, late, aborted atomic.Int64
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for range 10 {
					res, err := client.Get(url)
					if err != nil {
						aborted.Add(1)
						continue
					}
					body, err := io.ReadAll(res.Body)
					res.Body.Close()
					switch {
					case err != nil:
						aborted.Add(1)
					case res.StatusCode == 200 && len(body) == 3000:
						whole.Add(1)
					case res.StatusCode == 503 && string(body) == "Service Unavailable\n":
						late.Add(1)
					default:
						t.Errorf("%d with %d bytes", res.StatusCode, len(body))
					}
				}
			})
		}
		clients.Wait()
		if whole.Load() == 0 || late.Load() == 0 {
			t.Errorf("%d whole, %d late, %d aborted; want some of the first two", whole.Load(), late.Load(), aborted.Load())
		}
	})
}

// Static files

var staticTime = time.Date(2024, 5, 6, 7, 8, 9, 500e6, time.UTC)

const staticModified = "Mon, 06 May 2024 07:08:09 GMT"

// staticWrite writes files whose last change is long ago.
func staticWrite(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		file := filepath.Join(dir, filepath.FromSlash(name))
		if err := errors.Join(
			os.MkdirAll(filepath.Dir(file), 0o755),
			os.WriteFile(file, []byte(content), 0o600),
			os.Chtimes(file, staticTime, staticTime),
		); err != nil {
			t.Fatal(err)
		}
	}
}

// staticTree is a directory with these files.
func staticTree(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	staticWrite(t, dir, files)
	return dir
}

func staticServer(t testing.TB, cfg conduit.FileServerConfig) *conduit.FileServer {
	t.Helper()
	f, err := conduit.NewFileServerWith(&cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// staticAsk asks h in process. Header lines are "Field: value".
func staticAsk(h http.Handler, method, target string, lines ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	for _, line := range lines {
		field, value, _ := strings.Cut(line, ": ")
		r.Header.Add(field, value)
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	return rec
}

// staticGet asks for a target, and compares the status and the body with what they
// should be.
func staticGet(t testing.TB, h http.Handler, target string, status int, body string, lines ...string) http.Header {
	t.Helper()
	rec := staticAsk(h, "GET", target, lines...)
	if rec.Code != status || rec.Body.String() != body {
		t.Errorf("GET %s %q: %d with %d bytes %.40q, want %d with %d bytes %.40q",
			target, lines, rec.Code, rec.Body.Len(), rec.Body, status, len(body), body)
	}
	return rec.Header()
}

// staticHeader compares fields with what they should be, each as "Field: value". The
// value of one that is absent is empty.
func staticHeader(t testing.TB, what string, h http.Header, lines ...string) {
	t.Helper()
	for _, line := range lines {
		field, want, _ := strings.Cut(line, ": ")
		if got := strings.Join(h.Values(field), ", "); got != want {
			t.Errorf("%s: %s is %q, want %q", what, field, got, want)
		}
	}
}

// staticHash is the hash that tags and versions are made of.
func staticHash(content string) string {
	sum := sha256.Sum256([]byte(content))
	return base64.RawURLEncoding.EncodeToString(sum[:15])
}

func staticTag(content string) string { return `"` + staticHash(content) + `"` }

func staticGunzip(t testing.TB, compressed string) string {
	t.Helper()
	z, err := gzip.NewReader(strings.NewReader(compressed))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

// staticSizes are a file in memory, one of which only the gzip form is in memory,
// and one above staticMaxCached.
var staticSizes = map[string]string{
	"small.txt":  strings.Repeat("0123456789", 200),
	"middle.txt": strings.Repeat("0123456789", 27000),
	"large.txt":  strings.Repeat("0123456789", 31000),
}

const staticMaxCached = 300000

// staticFS counts, holds up or spoils what is done to a file system.
type staticFS struct {
	fs.FS
	opens, stats, bytes atomic.Int64
	hold                chan struct{}                      // when set, Open waits for it
	statErr, readErr    error                              // when set, what Stat and Read return
	info                func(info fs.FileInfo) fs.FileInfo // when set, what Stat returns
	unseekable          bool
}

func (s *staticFS) Open(name string) (fs.File, error) {
	s.opens.Add(1)
	if s.hold != nil {
		<-s.hold
	}
	file, err := s.FS.Open(name)
	if err == nil && s.unseekable {
		return struct{ fs.File }{staticFile{file, s}}, nil
	}
	return staticFile{file, s}, err
}

func (s *staticFS) Stat(name string) (fs.FileInfo, error) {
	s.stats.Add(1)
	if s.statErr != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: s.statErr}
	}
	info, err := fs.Stat(s.FS, name)
	if err == nil && s.info != nil {
		info = s.info(info)
	}
	return info, err
}

type staticFile struct {
	fs.File
	fs *staticFS
}

func (f staticFile) Stat() (fs.FileInfo, error) {
	info, err := f.File.Stat()
	if err == nil && f.fs.info != nil {
		info = f.fs.info(info)
	}
	return info, err
}

func (f staticFile) Read(p []byte) (int, error) {
	if f.fs.readErr != nil {
		return 0, f.fs.readErr
	}
	n, err := f.File.Read(p)
	f.fs.bytes.Add(int64(n))
	return n, err
}

func (f staticFile) Seek(offset int64, whence int) (int64, error) {
	return f.File.(io.Seeker).Seek(offset, whence)
}

// staticInfo is a fs.FileInfo with another size or time.
type staticInfo struct {
	fs.FileInfo
	size     int64
	modified time.Time
}

func (i staticInfo) Size() int64        { return i.size }
func (i staticInfo) ModTime() time.Time { return i.modified }

func TestFileServerReportsEveryFault(t *testing.T) {
	dir := staticTree(t, map[string]string{"file": ""})
	for name, test := range map[string]struct {
		cfg  *conduit.FileServerConfig
		want string // the fields of the errors
	}{
		"nil":                {nil, "Dir"},
		"both":               {&conduit.FileServerConfig{Dir: dir, FS: os.DirFS(dir)}, "FS"},
		"missing":            {&conduit.FileServerConfig{Dir: filepath.Join(dir, "none")}, "Dir"},
		"a file":             {&conduit.FileServerConfig{Dir: filepath.Join(dir, "file")}, "Dir"},
		"prefix up":          {&conduit.FileServerConfig{Dir: dir, Prefix: "/a/../b"}, "Prefix"},
		"several":            {&conduit.FileServerConfig{Prefix: "x", Index: "../i", Fallback: "/etc/passwd"}, "Dir Prefix Index Fallback"},
		"index below":        {&conduit.FileServerConfig{Dir: dir, Index: "pages/index.html"}, "Index"},
		"fallback backslash": {&conduit.FileServerConfig{Dir: dir, Fallback: `..\x`}, "Fallback"},
		"hidden":             {&conduit.FileServerConfig{Dir: dir, Index: ".i.html", Fallback: "a/.f.html"}, "Index Fallback"},
	} {
		f, err := conduit.NewFileServerWith(test.cfg)
		var got []string
		for line := range strings.Lines(fmt.Sprint(err)) {
			_, rest, _ := strings.Cut(line, "conduit: ")
			field, _, _ := strings.Cut(rest, ": ")
			got = append(got, field)
		}
		if f != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%s: %v, want the errors of %s", name, err, test.want)
		}
	}
	for _, prefix := range []string{"", "/", "/static/", "/a/b"} {
		staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: prefix})
	}

	defer func() {
		if err, ok := recover().(error); !ok || !strings.HasPrefix(err.Error(), "conduit: Dir: ") {
			t.Errorf("NewFileServer without its directory: panic %v", err)
		}
	}()
	conduit.NewFileServer(filepath.Join(dir, "none"), "/static")
}

func TestStaticFilesAreServed(t *testing.T) {
	page, text := "<!doctype html><p>hello", strings.Repeat("some text\n", 30)
	dir := staticTree(t, map[string]string{"index.html": page, "docs/index.html": page + "docs", "a/b/text.txt": text, "empty.txt": ""})
	const html, plain, year = "text/html; charset=utf-8", "text/plain; charset=utf-8", "public, max-age=31536000"
	eachProtocol(t, func(t *testing.T, p protocol) {
		mux := http.NewServeMux()
		mux.Handle("/static/", staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static"}))
		url := p.serve(t, p.server(t, &conduit.Config{Handler: mux}))
		client := p.client(t)
		for _, test := range []struct{ path, body, contentType, cacheControl string }{
			{"/static/", page, html, "no-cache"},
			{"/static/docs/", page + "docs", html, "no-cache"},
			{"/static/a/b/text.txt", text, plain, year},
			{"/static/a/b/text.txt", text, plain, year}, // from the cache
			{"/static/empty.txt", "", plain, year},
		} {
			for method, body := range map[string]string{"GET": test.body, "HEAD": ""} {
				req, _ := http.NewRequest(method, url+test.path, nil)
				req.Header.Set("Accept-Encoding", "identity")
				got := do(t, client, req)
				got.header.Del("Date")
				want := http.Header{
					"Accept-Ranges": {"bytes"}, "Cache-Control": {test.cacheControl}, "Content-Length": {strconv.Itoa(len(test.body))},
					"Content-Type": {test.contentType}, "Etag": {staticTag(test.body)}, "Last-Modified": {staticModified},
					"Vary": {"Accept-Encoding"}, "X-Content-Type-Options": {"nosniff"},
				}
				if got.status != 200 || got.body != body || !maps.EqualFunc(got.header, want, slices.Equal) {
					t.Errorf("%s %s: %d %q %v, want 200 %q %v", method, test.path, got.status, got.body, got.header, body, want)
				}
			}
		}
	})
}

func TestStaticRefusesOtherMethods(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	for _, method := range []string{"POST", "DELETE", "OPTIONS", "PROPFIND", "get"} {
		rec := staticAsk(files, method, "/a.txt")
		if staticHeader(t, method, rec.Header(), "Allow: GET, HEAD", "Cache-Control: "); rec.Code != 405 {
			t.Errorf("%s: %d, want 405", method, rec.Code)
		}
	}
}

func TestStaticRefusesPaths(t *testing.T) {
	outside := staticTree(t, map[string]string{"secret.txt": "secret", "dir/index.html": "secret"})
	dir := staticTree(t, map[string]string{
		"a.txt": "a", "sub/b.txt": "b", ".env": "secret", ".git/config": "secret", "sub/.hidden/x.txt": "secret",
		".well-known/security.txt": "contact", ".well-known/.secret": "secret", "empty/file.txt": "x",
		`back\slash.txt`: "secret", "dot.": "secret",
	})
	for name, target := range map[string]string{
		"out.txt": filepath.Join(outside, "secret.txt"), "outdir": outside, "up": "../../../../../../etc", "in.txt": "a.txt",
		"absolute.txt": filepath.Join(dir, "a.txt"), "loop": "loop", "null": "/dev/null",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := net.Listen("unix", filepath.Join(dir, "socket")); err == nil {
		defer l.Close()
	}
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static", Precompressed: true})
	addr := strings.TrimPrefix(serve(t, newServer(t, &conduit.Config{Handler: files})), "http://")
	for _, tt := range []struct {
		status  int
		targets []string
	}{
		{200, []string{"/a.txt", "/in.txt", "/sub/b.txt", "/.well-known/security.txt", "/%61.txt"}}, // they are in memory then
		{404, []string{
			"a.txt", "../a.txt", "/none", "/a.txt/", "/a.txt/x", "/socket", "/fifo", "/fifo/", "/empty/", "/empty",
			"/../static/a.txt", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/sub/../a.txt", "/./a.txt", "//a.txt", "//etc/passwd",
			"/sub%2fb.txt", "/sub%2Fb.txt", "/..%2f..%2fetc%2fpasswd", "/..%5c..%5ca.txt", "/sub%5cb.txt", "/back%5cslash.txt",
			"/a.txt%00", "/a.txt%00.html", "/%0a", "/%7f", "/%ff", "/a.txt.", "/dot.", "/sub./b.txt", "/...",
			"/" + strings.Repeat("x", 300), "/" + strings.Repeat("x/", 3000), "/" + strings.Repeat("x", 5000),
			"/.env", "/.git/config", "/.git/", "/.git", "/sub/.hidden/x.txt", "/.well-known/.secret",
			"/out.txt", "/outdir/secret.txt", "/outdir/dir/", "/outdir", "/up/passwd", "/absolute.txt", "/loop", "/null",
		}},
	} {
		for _, target := range tt.targets {
			for range 2 {
				conn, br := rawDial(t, addr)
				conn.SetDeadline(time.Now().Add(10 * time.Second))
				fmt.Fprintf(conn, "GET /static%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", target)
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatalf("%.60s: %v", target, err)
				}
				body, _ := io.ReadAll(res.Body)
				conn.Close()
				if res.StatusCode != tt.status && !(tt.status == 404 && res.StatusCode == 400) || strings.Contains(string(body), "secret") {
					t.Errorf("GET %.60s: %d %q, want %d", target, res.StatusCode, body, tt.status)
				}
				if tt.status != 200 {
					staticHeader(t, target, res.Header, "Cache-Control: ")
				}
			}
		}
	}
	staticGet(t, files, "/a.txt", 404, "Not Found\n")
	staticGet(t, files, "*", 404, "Not Found\n")

	staticGet(t, staticServer(t, conduit.FileServerConfig{Dir: dir, Dotfiles: true}), "/.env", 200, "secret")
	// os.DirFS follows absolute links.
	staticGet(t, staticServer(t, conduit.FileServerConfig{FS: os.DirFS(dir)}), "/absolute.txt", 200, "a")
}

func FuzzStaticPath(f *testing.F) {
	for _, path := range []string{"/", "/a.txt", "/../x", "//x", "/sub", "/sub/", "/a%2fb", "/\x00", `/..\x`, "/.env", "/out", "/a:b", "/sub/%2e%2e/", "/fifo", "/out/secret.txt"} {
		f.Add(path, path, "")
	}
	f.Add("/sub", "", "x=//evil")
	outside := staticTree(f, map[string]string{"secret.txt": "secret"})
	dir := staticTree(f, map[string]string{"a.txt": "a", "sub/index.html": "b", "a:b/index.html": "c", ".env": "secret", "index.html": "d"})
	os.Symlink(outside, filepath.Join(dir, "out"))
	syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	files := staticServer(f, conduit.FileServerConfig{Dir: dir, Fallback: "a.txt"})
	f.Fuzz(func(t *testing.T, path, raw, query string) {
		if _, err := url.Parse("/?" + query); err != nil {
			return // net/http refuses the query
		}
		r := httptest.NewRequest("GET", "/", nil)
		r.URL = &url.URL{Path: path, RawPath: raw, RawQuery: query}
		rec := httptest.NewRecorder()
		files.ServeHTTP(rec, r)
		if !slices.Contains([]int{200, 301, 400, 404}, rec.Code) || strings.Contains(rec.Body.String(), "secret") {
			t.Errorf("%q: %d %q", path, rec.Code, rec.Body)
		}
		if location := rec.Header().Get("Location"); rec.Code == 301 {
			to, err := url.Parse(location)
			if err != nil || to.Host != "" || to.Scheme != "" || strings.HasPrefix(location, "/") || !strings.HasSuffix(to.Path, "/") {
				t.Errorf("%q redirects to %q, %v", path, location, err)
			}
		}
		if got := files.URL(path); !strings.HasPrefix(got, "/") {
			t.Errorf("URL(%q) = %q", path, got)
		}
	})
}

func TestStaticDirectoriesRedirect(t *testing.T) {
	dir := staticTree(t, map[string]string{"index.html": "i", "sub/index.html": "s", "a:b/index.html": "c", "sp ace/index.html": "d"})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Prefix: "/static"})
	mux := http.NewServeMux()
	mux.Handle("/static/", files)
	mux.Handle("/static", files)
	mux.Handle("/stripped/", http.StripPrefix("/stripped", staticServer(t, conduit.FileServerConfig{Dir: dir})))
	for target, location := range map[string]string{
		"/static/sub?a=b&c=//d": "/static/sub/?a=b&c=//d",
		"/static/a:b":           "/static/a:b/",
		"/static/sp%20ace":      "/static/sp%20ace/",
		"/static?x=1":           "/static/?x=1",
		"/stripped/sub?q":       "/stripped/sub/?q",
	} {
		h := staticGet(t, mux, target, 301, "")
		base, _ := url.Parse(target)
		if to, err := base.Parse(h.Get("Location")); err != nil || to.String() != location {
			t.Errorf("%s: to %v, %v, want %s", target, to, err, location)
		}
		staticHeader(t, target, h, "Cache-Control: ", "X-Content-Type-Options: nosniff")
	}
}

func TestStaticFallbackIsForNavigations(t *testing.T) {
	dir := staticTree(t, map[string]string{"app.html": "<p>app", "real.txt": "real", "dir/x.txt": "x"})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Fallback: "app.html", Prefix: "/app", HTMLCacheControl: "max-age=7"})
	const browser, refused = "text/html,application/xhtml+xml,*/*;q=0.8", "Not Found\n"
	for _, test := range []struct{ target, accept, body string }{
		{"/app/users/17?x=1", browser, "<p>app"},
		{"/app/dir", browser, "<p>app"},
		{"/app/dir/", browser, "<p>app"},
		{"/app", browser, "<p>app"},
		{"/app/users/17", "application/json, TEXT/HTML;charset=utf-8;Q=0.1", "<p>app"},
		{"/app/users/17", "*/*", refused},
		{"/app/missing.js", browser, refused},
		{"/app/.env", browser, refused},
		{"/app/search/etc.", browser, refused},
		{"/other", browser, refused},
	} {
		if test.body == refused {
			staticGet(t, files, test.target, 404, refused, "Accept: "+test.accept)
			continue
		}
		h := staticGet(t, files, test.target, 200, test.body, "Accept: "+test.accept)
		staticHeader(t, test.target, h, "Cache-Control: max-age=7", "Vary: Accept, Accept-Encoding")
		staticGet(t, files, test.target, 304, "", "Accept: "+test.accept, "If-None-Match: "+staticTag("<p>app"))
	}
	staticGet(t, files, "/app/real.txt", 200, "real", "Accept: "+browser)
}

// A middleware may let every response be kept, and does not mean errors.
func TestStaticErrorsAreNotKeptAsTheFile(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "public, max-age=600")
		w.Header().Set("Expires", "Fri, 31 Dec 2060 00:00:00 GMT")
		files.ServeHTTP(w, r)
	})
	for _, test := range []struct {
		target, line string
		status       int
		contentRange string
	}{
		{"/missing.txt", "Range: bytes=9-", 404, ""},
		{"/a.txt", "Range: bytes=9-", 416, "bytes */1"},
		{"/a.txt", `If-Match: "other"`, 412, ""},
	} {
		rec := staticAsk(h, "GET", test.target, test.line)
		if rec.Code != test.status {
			t.Errorf("%s %s: %d, want %d", test.target, test.line, rec.Code, test.status)
		}
		staticHeader(t, test.line, rec.Header(), "Cache-Control: ", "Expires: ", "Content-Range: "+test.contentRange)
	}

	// NotFound says itself what may be kept.
	files = staticServer(t, conduit.FileServerConfig{Dir: t.TempDir(), NotFound: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "nothing at "+r.URL.Path, http.StatusTeapot)
	})})
	for _, target := range []string{"/x", "/.env", "/"} {
		staticGet(t, files, target, 418, "nothing at "+target+"\n")
	}
}

func TestStaticMediaTypes(t *testing.T) {
	want := map[string]string{
		"a.js": "text/javascript; charset=utf-8", "a.mjs": "text/javascript; charset=utf-8", "a.css": "text/css; charset=utf-8",
		"a.HTML": "text/html; charset=utf-8", "a.json": "application/json", "a.svg": "image/svg+xml", "a.wasm": "application/wasm",
		"a.woff2": "font/woff2", "a.webp": "image/webp", "a.avif": "image/avif", "a.webmanifest": "application/manifest+json",
		"a.map": "application/json", "a.txt": "text/plain; charset=utf-8", "a.md": "text/markdown; charset=utf-8",
		"a.pdf": "application/pdf", "a.mp4": "video/mp4", "a.xml": "text/xml; charset=utf-8", "a.ico": "image/x-icon",
		"a.cjs": "text/javascript; charset=utf-8", "a.otf": "font/otf", "a.svgz": "image/svg+xml",
		"text": "text/plain; charset=utf-8", "a.unknown-extension": "text/plain; charset=utf-8", "picture": "image/png",
	}
	tree := make(fstest.MapFS)
	for name := range want {
		tree[name] = &fstest.MapFile{Data: []byte("content")}
	}
	tree["picture"].Data = []byte("\x89PNG\r\n\x1a\n")
	files := staticServer(t, conduit.FileServerConfig{FS: tree})
	for name, contentType := range want {
		h := staticGet(t, files, "/"+name, 200, string(tree[name].Data))
		coding := map[bool]string{true: "gzip"}[name == "a.svgz"]
		staticHeader(t, name, h, "Content-Type: "+contentType, "X-Content-Type-Options: nosniff", "Content-Encoding: "+coding)
	}
}

// The response of http.ServeContent to the same request for the same bytes, with
// the same header. The cases that do not reach it are among these.
func TestStaticRespondsAsServeContent(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, staticSizes), MaxCachedFile: staticMaxCached})
	const before, same, after = "Mon, 06 May 2024 07:08:08 GMT", staticModified, "Mon, 06 May 2024 07:08:10 GMT"
	var requests []string
	for _, condition := range []string{
		"", "If-None-Match: TAG", "If-None-Match: W/TAG", "If-None-Match: *", `If-None-Match: "x", W/"y" ,TAG`, `If-None-Match: "x,TAG`,
		`If-None-Match: "x"`, "If-None-Match: ", "If-Modified-Since: " + same, "If-Modified-Since: " + after, "If-Modified-Since: " + before,
		"If-Modified-Since: Monday, 06-May-24 07:08:09 GMT", "If-Modified-Since: yesterday", "If-None-Match: \"x\"\nIf-Modified-Since: " + same,
		"If-None-Match: TAG\nIf-Modified-Since: " + before, "If-Match: TAG", "If-Match: *", `If-Match: "x", TAG`, "If-Match: W/TAG",
		`If-Match: "x"`, "If-Match: \"x\"\nIf-None-Match: TAG", "If-Match: TAG\nIf-None-Match: TAG", "If-Unmodified-Since: " + same,
		"If-Unmodified-Since: " + before, "If-Unmodified-Since: " + before + "\nIf-None-Match: TAG", "If-Unmodified-Since: " + before + "\nIf-Modified-Since: " + same,
	} {
		requests = append(requests, condition, condition+"\nRange: bytes=5-9")
	}
	for _, ranges := range []string{
		"", "bytes=0-0", "bytes=500-999", "bytes=500-", "bytes=-500", "bytes=-99999999", "bytes=0-", "bytes=5-99999999", "bytes=99999999-",
		"bytes=5-2", "bytes=a-b", "bytes=", "bytes=-0", "lines=1-2", "bytes=0-,0-", "bytes=0-4, 1000-1009, -3, 99999999-",
	} {
		requests = append(requests, "Range: "+ranges, "Range: "+ranges+"\nIf-Range: TAG", "Range: "+ranges+"\nIf-Range: W/TAG",
			"Range: "+ranges+"\nIf-Range: "+same, "Range: "+ranges+"\nIf-Range: "+before)
	}
	// common is what both are to send, whatever the boundary between parts.
	common := func(rec *httptest.ResponseRecorder) (header, body string) {
		h := rec.Header()
		header, body = fmt.Sprint(rec.Code, h["Content-Range"]), rec.Body.String()
		switch {
		case rec.Code == 412:
			return header, ""
		case rec.Code < 300:
			header += fmt.Sprint(h["Content-Length"], h["Content-Type"], h["Accept-Ranges"], h["Last-Modified"], h["Etag"])
		}
		if _, boundary, ok := strings.Cut(h.Get("Content-Type"), "boundary="); ok {
			header, body = strings.ReplaceAll(header, boundary, "B"), strings.ReplaceAll(body, boundary, "B")
		}
		return header, body
	}
	for name, body := range staticSizes {
		tag := staticAsk(files, "GET", "/"+name).Header().Get("Etag")
		std := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Etag", tag)
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			http.ServeContent(w, r, "", staticTime, strings.NewReader(body))
		})
		for _, request := range requests {
			for _, method := range []string{"GET", "HEAD"} {
				what := fmt.Sprintf("%s %s %q", method, name, request)
				lines := strings.Split(strings.ReplaceAll(strings.TrimPrefix(request, "\n"), "TAG", tag), "\n")
				rec := staticAsk(files, method, "/"+name, lines...)
				gotHeader, got := common(rec)
				wantHeader, want := common(staticAsk(std, method, "/"+name, lines...))
				if gotHeader != wantHeader || got != want {
					t.Errorf("%s: %s with %d bytes, want %s with %d", what, gotHeader, len(got), wantHeader, len(want))
				}
				if rec.Code >= 400 {
					staticHeader(t, what, rec.Header(), "Cache-Control: ", "Etag: ", "Last-Modified: ", "Content-Length: ")
				} else {
					staticHeader(t, what, rec.Header(), "Cache-Control: public, max-age=31536000", "Vary: Accept-Encoding", "Etag: "+tag)
				}
			}
		}
	}
}

func TestStaticRanges(t *testing.T) {
	text := string(staticText(20000))
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.js": text, "empty.js": ""})})
	many := "Range: bytes=0-0" + strings.Repeat(",2-2", 63)
	compressed := staticAsk(files, "GET", "/a.js", "Accept-Encoding: gzip").Header().Get("Etag")
	staticGet(t, files, "/a.js", 206, text[3:10], "Range: bytes=3-9", "Accept-Encoding: gzip") // is of the file itself
	staticGet(t, files, "/a.js", 200, text, "Range: bytes=3-9", "Accept-Encoding: gzip", "If-Range: "+compressed)
	staticGet(t, files, "/empty.js", 200, "", "Range: bytes=-1")
	if rec := staticAsk(files, "GET", "/a.js", many); rec.Code != 206 {
		t.Errorf("64 ranges: %d, want 206", rec.Code)
	}
	staticGet(t, files, "/a.js", 200, text, many+",4-4")

	// This one reaches http.ServeContent, which lets ranges be asked of every 200.
	h := staticAsk(files, "GET", "/a.js", "Accept-Encoding: gzip", `If-None-Match: "x"`).Header()
	staticHeader(t, "the gzip form", h, "Content-Encoding: gzip", "Accept-Ranges: ")
}

func TestStaticFileOfMaxCachedFileIsCached(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"exact.txt": "1234", "over.txt": "12345"}), MaxCachedFile: 4})
	staticHeader(t, "exact.txt", staticGet(t, files, "/exact.txt", 200, "1234"), "Etag: "+staticTag("1234"))
	if tag := staticGet(t, files, "/over.txt", 200, "12345").Get("Etag"); tag == "" || tag == staticTag("12345") {
		t.Errorf("over.txt: the tag is %s, want that of its time and size", tag)
	}
}

func TestStaticVersions(t *testing.T) {
	text, large := "body{}", strings.Repeat("large", 1000)
	counted := &staticFS{FS: os.DirFS(staticTree(t, map[string]string{"app.css": text, "sp ace.txt": text, "sub/index.html": "<p>", "large.bin": large}))}
	files := staticServer(t, conduit.FileServerConfig{FS: counted, Prefix: "/static", MaxCachedFile: 4000})
	for name, want := range map[string]string{
		"app.css":    "/static/app.css?v=" + staticHash(text),
		"/app.css":   "/static/app.css?v=" + staticHash(text),
		"sp ace.txt": "/static/sp%20ace.txt?v=" + staticHash(text),
		"sub/":       "/static/sub/?v=" + staticHash("<p>"),
		"none.css":   "/static/none.css",
		"../x":       "/static/../x",
		".env":       "/static/.env",
	} {
		if got := files.URL(name); got != want {
			t.Errorf("URL(%q) = %q, want %q", name, got, want)
		}
	}
	const year, immutable = "public, max-age=31536000", "public, max-age=31536000, immutable"
	for target, want := range map[string]string{
		files.URL("app.css"):        immutable,
		files.URL("large.bin"):      immutable,
		files.URL("sub/"):           immutable,
		"/static/app.css?vv=1":      year,
		"/static/app.css?x=1&v=old": "no-cache",
		"/static/app.css?v=":        "no-cache",
		"/static/large.bin?v=old":   "no-cache",
		"/static/large.bin":         year,
	} {
		h := staticAsk(files, "GET", target).Header()
		staticHeader(t, target, h, "Cache-Control: "+want)
		staticHeader(t, target, staticGet(t, files, target, 304, "", "If-None-Match: "+h.Get("Etag")), "Cache-Control: "+want)
	}

	// The version of a large file is not worth reading all of it.
	before := counted.bytes.Load()
	fresh := staticServer(t, conduit.FileServerConfig{FS: counted, MaxCachedFile: 4000})
	staticGet(t, fresh, "/large.bin?v=1.2.3", 206, "l", "Range: bytes=0-0")
	if n := counted.bytes.Load() - before; n > 1000 {
		t.Errorf("%d bytes were read for one of %d", n, len(large))
	}
}

func TestStaticCacheControl(t *testing.T) {
	small, large := &fstest.MapFile{Data: []byte("a"), ModTime: staticTime}, &fstest.MapFile{Data: make([]byte, 2<<20), ModTime: staticTime}
	tree := fstest.MapFS{"a.pdf": small, "large.pdf": large, "a.html": small}
	for _, cacheControl := range []string{"max-age=60", "private, max-age=60", "No-Store"} {
		files := staticServer(t, conduit.FileServerConfig{FS: tree, CacheControl: cacheControl, HTMLCacheControl: "max-age=5"})
		targets := []string{"/a.pdf"}
		if cacheControl != "max-age=60" { // and has no immutable versions
			targets = append(targets, "/a.pdf?v=1", files.URL("a.pdf"), "/large.pdf?v=1", files.URL("large.pdf"))
		}
		for _, target := range targets {
			staticHeader(t, target, staticAsk(files, "GET", target).Header(), "Cache-Control: "+cacheControl)
		}
		staticHeader(t, "HTML", staticAsk(files, "GET", "/a.html").Header(), "Cache-Control: max-age=5")
	}

	// HTMLCacheControl is also that of an index and a fallback of other types.
	files := staticServer(t, conduit.FileServerConfig{FS: fstest.MapFS{"i.svg": small, "f.svg": small}, Index: "i.svg", Fallback: "f.svg"})
	for _, target := range []string{"/", "/unknown"} {
		staticHeader(t, target, staticGet(t, files, target, 200, "a", "Accept: text/html"), "Cache-Control: no-cache")
	}
}

// The next write may leave a young file's time and size as they are. Nobody may
// keep what is perhaps half written.
func TestStaticYoungFilesAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, recheck := range []time.Duration{0, -1} {
			tree := fstest.MapFS{"small.css": {Data: []byte("a{}")}, "large.bin": {Data: make([]byte, 2<<20)}}
			for _, file := range tree {
				file.ModTime = time.Now()
			}
			time.Sleep(500 * time.Millisecond) // the time itself is past, and may come again
			files := staticServer(t, conduit.FileServerConfig{FS: tree, Recheck: recheck})
			for name, weak := range map[string]string{"small.css": "", "large.bin": "W/"} {
				for _, target := range []string{"/" + name, files.URL(name)} {
					h := staticGet(t, files, target, 200, string(tree[name].Data))
					staticHeader(t, target+", young", h, "Cache-Control: no-cache", "Last-Modified: ")
					if tag := h.Get("Etag"); !strings.HasPrefix(tag, weak+`"`) {
						t.Errorf("%s, young: tag %s", target, tag)
					}
				}
			}
			large := staticAsk(files, "GET", "/large.bin").Header().Get("Etag")
			tree["small.css"].Data = []byte("b{}") // with the same time and size
			time.Sleep(1100 * time.Millisecond)
			staticGet(t, files, "/large.bin", 200, string(tree["large.bin"].Data), "If-None-Match: "+large)
			staticGet(t, files, "/small.css", 200, "b{}")
			for name := range tree {
				h := staticAsk(files, "GET", files.URL(name)).Header()
				staticHeader(t, name+", a second old", h, "Cache-Control: public, max-age=31536000, immutable")
				if tag := h.Get("Etag"); h.Get("Last-Modified") == "" || !strings.HasPrefix(tag, `"`) {
					t.Errorf("%s, a second old: %v", name, h)
				}
			}
		}

		private := staticServer(t, conduit.FileServerConfig{
			FS: fstest.MapFS{"a.pdf": {Data: []byte("a"), ModTime: time.Now()}}, CacheControl: "private, max-age=60",
		})
		staticHeader(t, "young and private", staticAsk(private, "GET", "/a.pdf").Header(), "Cache-Control: no-store")
	})
}

// An entry may be as old as Recheck allows when its file is opened to be sent.
func TestStaticFileThatChangedSinceItWasLookedAt(t *testing.T) {
	text := strings.Repeat("old ", 1000)
	tree := fstest.MapFS{"changed.txt": {Data: []byte(text), ModTime: staticTime}, "gone.txt": {Data: []byte(text), ModTime: staticTime}}
	files := staticServer(t, conduit.FileServerConfig{FS: tree, MaxCachedFile: 100, Recheck: -1})
	for name := range tree {
		staticGet(t, files, "/"+name, 200, text)
	}
	delete(tree, "gone.txt")
	staticHeader(t, "gone", staticGet(t, files, "/gone.txt", 404, "Not Found\n"), "Cache-Control: ")
	tree["gone.txt"] = &fstest.MapFile{Data: []byte("back"), ModTime: staticTime}
	staticGet(t, files, "/gone.txt", 200, "back")

	tree["changed.txt"] = &fstest.MapFile{Data: []byte(text + "new"), ModTime: staticTime.Add(time.Hour)}
	h := staticGet(t, files, "/changed.txt", 200, text+"new")
	staticHeader(t, "changed", h, "Etag: ", "Last-Modified: ", "Cache-Control: no-cache", "Content-Length: 4003")
	if h := staticGet(t, files, "/changed.txt", 200, text+"new"); h.Get("Etag") == "" || h.Get("Cache-Control") == "no-cache" {
		t.Errorf("the next request: %v", h)
	}
}

func TestStaticGzip(t *testing.T) {
	script, middle, large := string(staticText(20000)), string(staticText(500000)), string(staticText(1<<20+1))
	random := make([]byte, 4000)
	for i := range random {
		random[i] = byte(uint32(i*i*i) * 2654435761 >> 13)
	}
	bodies := map[string]string{"a.js": script, "middle.js": middle, "large.js": large, "tiny.js": strings.Repeat("let a;", 170), "a.png": script, "random.txt": string(random)}
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, bodies)})
	for _, test := range []struct {
		name, accept string
		compressed   bool
	}{
		{"a.js", "gzip, deflate, br, zstd", true},
		{"a.js", "br", false},
		{"a.js", "gzip;q=0", false},
		{"a.js", "*", true},
		{"middle.js", "gzip", true},
		{"middle.js", "identity", false},
		{"large.js", "gzip", false}, // and not its first bytes, which have been read
		{"tiny.js", "gzip", false},
		{"a.png", "gzip", false},
		{"random.txt", "gzip", false},
	} {
		for range 2 {
			what, line := test.name+" for "+test.accept, "Accept-Encoding: "+test.accept
			rec := staticAsk(files, "GET", "/"+test.name, line)
			h, body, want := rec.Header(), rec.Body.String(), bodies[test.name]
			vary := map[bool]string{false: "Accept-Encoding"}[test.name == "a.png"]
			staticHeader(t, what, h, "Content-Length: "+strconv.Itoa(len(body)), "Vary: "+vary)
			if test.compressed {
				staticHeader(t, what, h, "Content-Encoding: gzip", "Accept-Ranges: ", `Etag: "`+staticHash(want)+`-gzip"`)
				if len(body) > len(want)*2/5 {
					t.Errorf("%s: %d bytes of %d", what, len(body), len(want))
				}
				body = staticGunzip(t, body)
			} else {
				staticHeader(t, what, h, "Content-Encoding: ", "Accept-Ranges: bytes")
			}
			if body != want {
				t.Errorf("%s: %d bytes, want %d", what, len(body), len(want))
			}
			if head := staticAsk(files, "HEAD", "/"+test.name, line).Header(); !maps.EqualFunc(head, h, slices.Equal) {
				t.Errorf("%s: HEAD %v, GET %v", what, head, h)
			}
		}
	}
}

func TestStaticPrecompressed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		text := strings.Repeat("text ", 1000)
		old := time.Now().Add(-time.Hour)
		tree := make(fstest.MapFS)
		for name, file := range map[string]struct {
			body string
			age  time.Duration
		}{
			"all.js": {text, 0}, "all.js.br": {"BR", 0}, "all.js.zst": {"ZST", 0}, "all.js.gz": {"GZ", 0},
			"some.bin": {text, 0}, "some.bin.zst": {"ZST", 0},
			"coarse.js": {text, 0}, "coarse.js.br": {"BR", time.Second},
			"old.js": {text, 0}, "old.js.br": {"BR", 1100 * time.Millisecond},
			"empty.js": {text, 0}, "empty.js.br": {"", 0},
			"young.js": {text, 0}, "young.js.br": {"BR", -time.Hour},
			"dir.js": {text, 0}, "dir.js.br/x": {"", 0}, "gone.js.br": {"BR", 0},
		} {
			tree[name] = &fstest.MapFile{Data: []byte(file.body), ModTime: old.Add(-file.age)}
		}
		files := staticServer(t, conduit.FileServerConfig{FS: tree, Precompressed: true})
		for _, test := range []struct{ why, target, accept, coding, body string }{
			{"the server's order", "/all.js", "gzip, deflate, br, zstd", "br", "BR"},
			{"the client's order", "/all.js", "gzip, br;q=0.5", "gzip", "GZ"},
			{"refused", "/all.js", "br;q=0, zstd;q=0.1", "zstd", "ZST"},
			{"refused", "/all.js", "identity", "", text},
			{"any type", "/some.bin", "gzip, br, zstd", "zstd", "ZST"},
			{"not there", "/some.bin", "gzip, br", "", text},
			{"its time is in full seconds", "/coarse.js", "br", "br", "BR"},
			{"it is older", "/old.js", "br", "", text},
			{"it has just been created", "/empty.js", "br", "", text},
			{"it may still be being written", "/young.js", "br", "", text},
			{"it is a directory", "/dir.js", "br", "", text},
		} {
			h := staticGet(t, files, test.target, 200, test.body, "Accept-Encoding: "+test.accept)
			staticHeader(t, test.why, h, "Content-Encoding: "+test.coding, "Vary: Accept-Encoding")
			if strings.HasSuffix(test.target, ".js") {
				staticHeader(t, test.why, h, "Content-Type: text/javascript; charset=utf-8")
			}
			tag := h.Get("Etag")
			if test.coding != "" && tag != `"`+staticHash(test.body)+"-"+test.coding+`"` {
				t.Errorf("%s: %s: tag %s", test.why, test.target, tag)
			}
			staticGet(t, files, test.target, 304, "", "Accept-Encoding: "+test.accept, "If-None-Match: "+tag)
		}
		staticGet(t, files, "/gone.js", 404, "Not Found\n", "Accept-Encoding: br")
		staticGet(t, staticServer(t, conduit.FileServerConfig{FS: tree}), "/some.bin", 200, text, "Accept-Encoding: zstd")

		// The original changes under a sidecar, and then a new sidecar is built.
		ask := func(want string) {
			t.Helper()
			time.Sleep(1500 * time.Millisecond) // longer than Recheck
			staticGet(t, files, "/all.js", 200, want, "Accept-Encoding: br")
		}
		ask("BR")
		tree["all.js"] = &fstest.MapFile{Data: []byte("new text"), ModTime: time.Now()}
		ask("new text")
		tree["all.js.br"] = &fstest.MapFile{Data: []byte("NEW BR"), ModTime: time.Now().Add(time.Second)}
		ask("new text")
		ask("NEW BR")
	})
}

// A sidecar that is not kept in memory is opened when it is sent.
func TestStaticLargeSidecar(t *testing.T) {
	text, compressed := strings.Repeat("text ", 1000), strings.Repeat("packed", 600)
	tree := fstest.MapFS{"a.js": {Data: []byte(text), ModTime: staticTime}, "a.js.br": {Data: []byte(compressed), ModTime: staticTime}}
	files := staticServer(t, conduit.FileServerConfig{FS: tree, Precompressed: true, MaxCachedFile: 1000, Recheck: -1})
	h := staticGet(t, files, "/a.js", 200, compressed, "Accept-Encoding: br")
	staticHeader(t, "a large sidecar", h, "Content-Encoding: br", "Accept-Ranges: ")
	for range 2 {
		tree["a.js.br"] = &fstest.MapFile{ModTime: staticTime} // is being written again
		h := staticGet(t, files, "/a.js", 200, text, "Accept-Encoding: br")
		staticHeader(t, "without the sidecar", h, "Content-Encoding: ")
		delete(tree, "a.js.br")
	}
}

func TestStaticIsLeftAloneByCompression(t *testing.T) {
	script, large := string(staticText(20000)), string(staticText(50000))
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.js": script, "large.js": large}), MaxCachedFile: 30000})
	h := conduit.Compression()(files)
	for target, test := range map[string]struct{ body, tag string }{
		"/a.js":     {script, `"` + staticHash(script) + `-gzip"`},
		"/large.js": {large, "W/"}, // compressed by Compression
	} {
		rec := staticAsk(h, "GET", target, "Accept-Encoding: gzip")
		tag := rec.Header().Get("Etag")
		staticHeader(t, target, rec.Header(), "Content-Encoding: gzip", "Vary: Accept-Encoding")
		if got := staticGunzip(t, rec.Body.String()); got != test.body || !strings.HasPrefix(tag, test.tag) {
			t.Errorf("%s: %d bytes, tag %s, want %d, %s", target, len(got), tag, len(test.body), test.tag)
		}
		again := staticGet(t, h, target, 304, "", "Accept-Encoding: gzip", "If-None-Match: "+tag)
		staticHeader(t, target, again, "Etag: "+tag)
	}
}

// Vary may have values already, and ready header values may not be written to.
func TestStaticAddsToVary(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.txt": "a"})})
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Vary", "Origin")
		files.ServeHTTP(w, r)
		for field := range w.Header() {
			w.Header()[field] = append(w.Header()[field], "spoiled")
		}
	})
	for range 3 {
		sent := staticAsk(h, "GET", "/a.txt").Result().Header
		staticHeader(t, "/a.txt", sent, "Vary: Origin, Accept-Encoding", "Etag: "+staticTag("a"))
	}
}

func TestStaticFromAFileSystem(t *testing.T) {
	large := strings.Repeat("large file ", 1000)
	bodies := map[string]string{"/": "<p>", "/sub/a.txt": "a", "/large": large}
	tree := fstest.MapFS{"index.html": {Data: []byte("<p>")}, "sub/a.txt": {Data: []byte("a")}, "large": {Data: []byte(large)}}
	for _, seeks := range []bool{true, false} {
		files := staticServer(t, conduit.FileServerConfig{FS: &staticFS{FS: tree, unseekable: !seeks}, MaxCachedFile: 5000})
		for target, body := range bodies {
			tag := staticTag(body)
			staticHeader(t, target, staticGet(t, files, target, 200, body), "Etag: "+tag, "Last-Modified: ")
			staticGet(t, files, target, 304, "", `If-None-Match: "x", `+tag)
			staticGet(t, files, target, 412, "", `If-Match: "x"`)
			staticGet(t, files, target, 200, body, "If-Modified-Since: "+staticModified)
		}
		status, body, acceptRanges := 206, large[5:10], "bytes"
		if !seeks {
			status, body, acceptRanges = 200, large, ""
		}
		staticGet(t, files, "/large", status, body, "Range: bytes=5-9")
		staticHeader(t, "/large", staticAsk(files, "HEAD", "/large").Header(), "Accept-Ranges: "+acceptRanges)
		staticHeader(t, "/large", staticGet(t, files, "/large", 200, large, `If-None-Match: "x"`), "Accept-Ranges: "+acceptRanges)
		staticGet(t, files, "/sub/a.txt", 206, "a", "Range: bytes=0-0") // is in memory
	}
}

func TestStaticReadsOnceForConcurrentMisses(t *testing.T) {
	counted := &staticFS{FS: fstest.MapFS{"a.txt": {Data: []byte("a"), ModTime: staticTime}}, hold: make(chan struct{})}
	files := staticServer(t, conduit.FileServerConfig{FS: counted})
	var started, ended sync.WaitGroup
	started.Add(50)
	for range 50 {
		ended.Go(func() {
			started.Done()
			staticGet(t, files, "/a.txt", 200, "a")
		})
	}
	started.Wait()
	close(counted.hold)
	ended.Wait()
	if n := counted.opens.Load(); n != 1 {
		t.Errorf("read %d times for 50 requests", n)
	}
}

func TestStaticRechecksOncePerInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for recheck, want := range map[time.Duration]int64{0: 9, 10 * time.Second: 0, -1: 0} {
			counted := &staticFS{FS: fstest.MapFS{"a.txt": {Data: []byte("a"), ModTime: time.Now().Add(-time.Hour)}}}
			files := staticServer(t, conduit.FileServerConfig{FS: counted, Recheck: recheck})
			staticAsk(files, "GET", "/a.txt")
			opens, stats := counted.opens.Load(), counted.stats.Load()
			for range 100 {
				staticAsk(files, "GET", "/a.txt")
				time.Sleep(100 * time.Millisecond)
			}
			looks, reads := counted.stats.Load()-stats, counted.opens.Load()-opens
			if looks != want || reads != 0 {
				t.Errorf("Recheck %v: %d looks at an unchanged file in ten seconds, %d reads, want %d and none", recheck, looks, reads, want)
			}
		}
	})
}

func TestStaticFollowsAReplacedDirectory(t *testing.T) {
	base := t.TempDir()
	for _, release := range []string{"one", "two"} {
		staticWrite(t, filepath.Join(base, release), map[string]string{"a.txt": release, "only-" + release + ".txt": release})
	}
	current := filepath.Join(base, "current")
	turn := func(to string) {
		if err := errors.Join(os.Symlink(to, current+".new"), os.Rename(current+".new", current)); err != nil {
			t.Fatal(err)
		}
	}
	turn("one")
	var log logBuffer
	files := staticServer(t, conduit.FileServerConfig{Dir: current, Recheck: time.Nanosecond})
	url := serve(t, newServer(t, &conduit.Config{Handler: files, Logger: log.logger()}))
	client := newClient(t, &http.Transport{})
	check := func(name string, status int, body string) {
		t.Helper()
		if got := get(t, client, url+name); got.status != status || got.body != body {
			t.Errorf("%s: %d %q, want %d %q", name, got.status, got.body, status, body)
		}
	}
	for _, release := range []string{"one", "two", "one"} {
		turn(release)
		check("/a.txt", 200, release)
		check("/only-"+release+".txt", 200, release)
	}

	// A directory that is missing is logged once, until it is back.
	for times := 1; times <= 2; times++ {
		if err := os.Rename(current, current+".away"); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			check("/a.txt", 404, "Not Found\n")
			check("/other.txt", 404, "Not Found\n")
		}
		if lines := log.find("file cannot be read"); len(lines) != times {
			t.Errorf("%d lines about the missing directory, want %d:\n%s", len(lines), times, log.String())
		}
		if err := os.Rename(current+".away", current); err != nil {
			t.Fatal(err)
		}
		check("/a.txt", 200, "one")
	}
}

func TestStaticKeepsNoFilesOpen(t *testing.T) {
	dir := staticTree(t, staticSizes)
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, MaxCachedFile: staticMaxCached})
	for name := range staticSizes {
		staticAsk(files, "GET", "/"+name)
		staticAsk(files, "GET", "/"+name, "Range: bytes=0-1,3-4")
		staticAsk(files, "GET", "/none")
	}
	open, _ := os.ReadDir("/proc/self/fd") // which not every system has
	for _, entry := range open {
		if name, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && strings.HasPrefix(name, dir) {
			t.Errorf("%s is open", name)
		}
	}
}

// What leaves the bytes alone leaves a download alone. A file that ends too
// early must not be taken for whole.
func TestStaticDownloadsOfFilesThatChange(t *testing.T) {
	const size = 24 << 20 // more than fits the buffers between here and the client
	for name, change := range map[string]func(file string) error{
		"chmod":  func(file string) error { return os.Chmod(file, 0o644) },
		"touch":  func(file string) error { return os.Chtimes(file, time.Now(), time.Now()) },
		"rename": func(file string) error { return os.Rename(file, file+".old") },
		"replace": func(file string) error {
			return errors.Join(os.WriteFile(file+".new", []byte("new"), 0o600), os.Rename(file+".new", file))
		},
		"truncate": func(file string) error { return os.Truncate(file, 100) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := staticTree(t, map[string]string{"large.bin": ""})
			file := filepath.Join(dir, "large.bin")
			if err := errors.Join(os.Truncate(file, size), os.Chtimes(file, staticTime, staticTime)); err != nil {
				t.Fatal(err)
			}
			var log logBuffer
			files := staticServer(t, conduit.FileServerConfig{Dir: dir})
			url := serve(t, newServer(t, &conduit.Config{Handler: conduit.Logging()(files), Logger: log.logger()}))
			res, err := newClient(t, &http.Transport{}).Get(url + "/large.bin")
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if err := change(file); err != nil {
				t.Fatal(err)
			}
			n, err := io.Copy(io.Discard, res.Body)
			whole, line := err == nil && n == size, log.request(t)
			if want := name != "truncate"; whole != want || (line["aborted"] == true) == want {
				t.Errorf("%d bytes of %d, %v, want whole %v; the log says %v", n, size, err, want, line)
			}
		})
	}
}

func TestStaticErrorsOfTheFileSystem(t *testing.T) {
	tree := fstest.MapFS{"a": {Data: []byte("a"), ModTime: staticTime}, "page.html": {Data: []byte("page"), ModTime: staticTime}}
	for _, test := range []struct {
		err    error
		status int
		logged bool
	}{
		{syscall.EIO, 500, true},
		{errors.New("backend: 503"), 500, true},
		{context.DeadlineExceeded, 500, true},
		{fs.ErrPermission, 404, true},
		{fs.ErrNotExist, 404, false},
		{fs.ErrInvalid, 404, false},
		{syscall.ENOTDIR, 404, false},
		{syscall.ENAMETOOLONG, 404, false},
		{syscall.ELOOP, 404, false},
		{errors.New("path escapes from parent"), 404, false},
	} {
		for _, where := range []string{"Stat", "Read"} {
			for _, fallback := range []string{"", "page.html"} {
				what := fmt.Sprintf("%s: %v, Fallback %q", where, test.err, fallback)
				var log logBuffer
				broken := &staticFS{FS: tree}
				files := staticServer(t, conduit.FileServerConfig{FS: broken, Fallback: fallback, Recheck: time.Nanosecond})
				cached := staticServer(t, conduit.FileServerConfig{FS: broken, Recheck: time.Nanosecond})
				staticAsk(files, "GET", "/page.html")
				staticAsk(cached, "GET", "/a")
				if where == "Stat" {
					broken.statErr = test.err
				} else {
					broken.readErr = test.err
				}
				url := serve(t, newServer(t, &conduit.Config{Handler: files, Logger: log.logger()}))
				req, _ := http.NewRequest("GET", url+"/a", nil)
				req.Header.Set("Accept", "text/html")
				got := do(t, newClient(t, &http.Transport{}), req)
				want, body, cacheControl := test.status, http.StatusText(test.status)+"\n", ""
				if want == 404 && where == "Read" && fallback != "" {
					want, body, cacheControl = 200, "page", "no-cache" // the page is in memory
				}
				if got.status != want || got.body != body {
					t.Errorf("%s: %d %q, want %d %q", what, got.status, got.body, want, body)
				}
				staticHeader(t, what, got.header, "Cache-Control: "+cacheControl)
				if logged := len(log.find("file cannot be read")) > 0; logged != test.logged {
					t.Errorf("%s: logged %v, want %v", what, logged, test.logged)
				}
				// What is in memory outlives a fault of the machine.
				if where == "Stat" && test.status == 500 {
					staticGet(t, cached, "/a", 200, "a")
				}
			}
		}
	}
}

// A directory whose index cannot be looked at is not one without.
func TestStaticErrorOfAnIndex(t *testing.T) {
	broken := &staticFS{FS: fstest.MapFS{"sub/index.html": {Data: []byte("a")}, "page.html": {Data: []byte("page")}}}
	broken.info = func(info fs.FileInfo) fs.FileInfo {
		if info.IsDir() { // the next look is at the index
			broken.statErr = syscall.EIO
		}
		return info
	}
	files := staticServer(t, conduit.FileServerConfig{FS: broken, Fallback: "page.html"})
	staticGet(t, files, "/sub", 500, "Internal Server Error\n", "Accept: text/html")
}

func TestStaticFileSystemThatPanics(t *testing.T) {
	broken := &staticFS{FS: fstest.MapFS{"a": {}}, info: func(fs.FileInfo) fs.FileInfo { panic("the file system is broken") }}
	files := conduit.Recovery()(staticServer(t, conduit.FileServerConfig{FS: broken}))
	for range 2 { // the second does not wait for the first
		staticGet(t, files, "/a", 500, "Internal Server Error\n")
	}
}

// interruptedWriter is net/http's writer when the deadline interrupts it. It has
// read more than it sent.
type interruptedWriter struct {
	*httptest.ResponseRecorder
	sends []int64
}

func (w *interruptedWriter) ReadFrom(src io.Reader) (int64, error) {
	data, err := io.ReadAll(src)
	n := int64(len(data))
	if len(w.sends) > 0 {
		n, err = min(w.sends[0], n), os.ErrDeadlineExceeded
		w.sends = w.sends[1:]
	}
	w.Body.Write(data[:n])
	return n, err
}

func TestStaticGoesOnAfterTheDeadline(t *testing.T) {
	body := string(staticText(2 << 20))
	inDir := conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"large.bin": body})}
	inFS := conduit.FileServerConfig{FS: fstest.MapFS{"large.bin": {Data: []byte(body)}}, MaxCachedFile: 1000}
	for _, test := range []struct {
		name   string
		cfg    conduit.FileServerConfig
		ranges string
		sends  []int64
		want   string // "" if the response is aborted
	}{
		{"a client that takes some", inDir, "", []int64{70 << 10, 100 << 10}, body},
		{"and a part", inDir, "bytes=1000-999999", []int64{70 << 10}, body[1000:1000000]},
		{"too little", inDir, "", []int64{70 << 10, 60 << 10}, ""},
		{"nothing but what net/http holds back", inDir, "", []int64{512}, ""},
		{"several parts", inDir, "bytes=0-999999,1000000-1500000", []int64{63 << 10}, ""},
		{"no file of the system", inFS, "", []int64{63 << 10}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			files := staticServer(t, test.cfg)
			r := httptest.NewRequest("GET", "/large.bin", nil)
			if test.ranges != "" {
				r.Header.Set("Range", test.ranges)
			}
			w := &interruptedWriter{httptest.NewRecorder(), test.sends}
			aborted := func() (aborted bool) {
				defer func() { aborted = recover() == http.ErrAbortHandler }()
				files.ServeHTTP(w, r)
				return false
			}()
			if aborted != (test.want == "") || !aborted && w.Body.String() != test.want {
				t.Errorf("%d bytes, aborted %v, want %d", w.Body.Len(), aborted, len(test.want))
			}
		})
	}
}

// Files in /proc say that they are empty, and one that grows has more than it
// said.
func TestStaticFileWithAnotherSizeThanItSays(t *testing.T) {
	content := string(staticText(5000))
	for _, size := range []int64{0, 10, 10000} {
		tree := &staticFS{
			FS:   fstest.MapFS{"a.txt": {Data: []byte(content), ModTime: staticTime}},
			info: func(info fs.FileInfo) fs.FileInfo { return staticInfo{info, size, info.ModTime()} },
		}
		h := staticGet(t, staticServer(t, conduit.FileServerConfig{FS: tree}), "/a.txt", 200, content)
		staticHeader(t, fmt.Sprint("a file that says ", size), h, "Cache-Control: no-cache")
		// A gzip form would be that of its first bytes.
		staticGet(t, staticServer(t, conduit.FileServerConfig{FS: tree, MaxCachedFile: 2000}), "/a.txt", 200, content, "Accept-Encoding: gzip")
	}
}

// What looks like a time is none, and two files would have the same tag.
func TestStaticTimesThatAreNone(t *testing.T) {
	for _, none := range []time.Time{{}, time.Unix(1, 0), time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)} {
		files := staticServer(t, conduit.FileServerConfig{MaxCachedFile: 100, FS: fstest.MapFS{
			"a.bin": {Data: bytes.Repeat([]byte("a"), 5000), ModTime: none},
			"b.bin": {Data: bytes.Repeat([]byte("b"), 5000), ModTime: none},
		}})
		a, b := staticAsk(files, "HEAD", "/a.bin").Header(), staticAsk(files, "HEAD", "/b.bin").Header()
		if a.Get("Etag") == b.Get("Etag") || a.Get("Last-Modified") != "" {
			t.Errorf("%v: tags %q and %q, Last-Modified %q", none, a.Get("Etag"), b.Get("Etag"), a.Get("Last-Modified"))
		}
	}
}

// A file system may give the time of the call, or one to come.
func TestStaticTimesThatAreAlwaysNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := strings.Repeat("x", 5000)
		tree := &staticFS{FS: fstest.MapFS{"a.bin": {Data: []byte(body)}}, info: func(info fs.FileInfo) fs.FileInfo {
			time.Sleep(time.Millisecond)
			return staticInfo{info, info.Size(), time.Now()}
		}}
		for maxCachedFile, tag := range map[int64]string{0: staticTag(body), 100: ""} {
			files := staticServer(t, conduit.FileServerConfig{FS: tree, MaxCachedFile: maxCachedFile})
			for range 3 {
				h := staticGet(t, files, "/a.bin", 200, body)
				staticHeader(t, fmt.Sprint("MaxCachedFile ", maxCachedFile), h, "Cache-Control: no-cache", "Etag: "+tag)
				time.Sleep(time.Second)
			}
		}
		future := fstest.MapFS{"a.bin": {Data: []byte(body), ModTime: time.Now().Add(time.Hour)}}
		h := staticGet(t, staticServer(t, conduit.FileServerConfig{FS: future}), "/a.bin", 200, body)
		staticHeader(t, "a time to come", h, "Last-Modified: ")
	})
}

// A crawl over many names must neither push out those in demand nor outgrow
// CacheBytes.
func TestStaticCacheWithstandsAScan(t *testing.T) {
	const size, limit, names = 20000, 2 << 20, 800
	many := make(fstest.MapFS)
	body := bytes.Repeat([]byte("x"), size)
	for i := range names {
		many["scan/"+strconv.Itoa(i)] = &fstest.MapFile{Data: body, ModTime: staticTime}
		many["hot/"+strconv.Itoa(i)] = many["scan/"+strconv.Itoa(i)]
	}
	counted := &staticFS{FS: many}
	files := staticServer(t, conduit.FileServerConfig{FS: counted, CacheBytes: limit, Recheck: -1})
	ask := func(folder string, n int) (opened int64) {
		before := counted.opens.Load()
		for i := range n {
			staticAsk(files, "GET", folder+strconv.Itoa(i))
		}
		return counted.opens.Load() - before
	}
	ask("/hot/", 20)
	ask("/hot/", 20)
	before := staticHeap()
	for i := range names {
		staticAsk(files, "GET", "/scan/"+strconv.Itoa(i))
		staticAsk(files, "GET", "/none/"+strconv.Itoa(i))
		if i%200 == 199 {
			if n := ask("/hot/", 20); n != 0 {
				t.Fatalf("after %d names of a scan %d of 20 hot files had to be read again", i, n)
			}
		}
	}
	// All of them would take seven times the limit. Other tests' garbage is in
	// the heap too.
	if grown := staticHeap() - before; grown > 6*limit {
		t.Errorf("the heap grew by %d for a cache of %d", grown, limit)
	}
	if kept := names - ask("/scan/", names); kept > limit/size {
		t.Errorf("%d files of %d bytes were kept in %d", kept, size, limit)
	}
	runtime.KeepAlive(files)

	// What becomes hot later gets in.
	for range 3 {
		ask("/scan/", 20)
	}
	if n := ask("/scan/", 20); n != 0 {
		t.Errorf("%d of 20 newly hot files were read again", n)
	}
}

func staticHeap() int64 {
	runtime.GC()
	runtime.GC() // pools are emptied in two steps
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestStaticWithoutACache(t *testing.T) {
	text := string(staticText(5000))
	dir := staticTree(t, map[string]string{"a.txt": text, "index.html": "<p>"})
	for _, cfg := range []conduit.FileServerConfig{{CacheBytes: -1}, {MaxCachedFile: -1}, {CacheBytes: 1}} {
		cfg.Dir = dir
		files := staticServer(t, cfg)
		for range 2 {
			tag := staticGet(t, files, "/a.txt", 200, text, "Accept-Encoding: gzip").Get("Etag")
			staticGet(t, files, "/", 200, "<p>")
			staticGet(t, files, "/a.txt", 304, "", "If-None-Match: "+tag)
			h := staticGet(t, files, files.URL("a.txt"), 200, text)
			staticHeader(t, fmt.Sprintf("%+v", cfg), h, "Cache-Control: public, max-age=31536000, immutable")
		}
	}
}

// An entry is part of the request that it was made for: with it, a query of
// any length would stay in memory.
func TestStaticKeepsNothingOfTheRequest(t *testing.T) {
	const names, query = 64, 900 << 10
	tree := make(fstest.MapFS)
	for i := range names {
		tree[fmt.Sprintf("f%02d.txt", i)] = &fstest.MapFile{Data: []byte("x"), ModTime: staticTime}
	}
	files := staticServer(t, conduit.FileServerConfig{FS: tree, CacheBytes: 1 << 20})
	before := staticHeap()
	for name := range tree {
		// As net/http does: the path is a part of the request line.
		u, err := url.ParseRequestURI("/" + name + "?" + strings.Repeat("q", query))
		if err != nil {
			t.Fatal(err)
		}
		rec := httptest.NewRecorder()
		files.ServeHTTP(rec, &http.Request{Method: "GET", URL: u})
		if rec.Code != 200 {
			t.Fatalf("%s: %d", name, rec.Code)
		}
	}
	if grown := staticHeap() - before; grown > names*query/4 {
		t.Errorf("%d small files take %d KiB after requests of %d KiB each", names, grown>>10, query>>10)
	}
	runtime.KeepAlive(files)
}

// Over a pipe every byte that a client takes shows at once. A write over TLS that
// was interrupted cannot go on, so none may take longer than its deadline.
func TestStaticOnlyClientsThatStopAreDisconnected(t *testing.T) {
	body := strings.Repeat("0123456789", 40000)
	inFS := conduit.FileServerConfig{FS: fstest.MapFS{"a.bin": {Data: []byte(body)}}}
	inDir := conduit.FileServerConfig{Dir: staticTree(t, map[string]string{"a.bin": body})} // by sendfile, but for TLS
	for _, test := range []struct {
		name               string
		cfg                conduit.FileServerConfig
		tls                *tls.Config
		writeTimeout, want time.Duration
	}{
		{"WriteTimeout", inFS, nil, 10 * time.Second, 10 * time.Second},
		{"3 seconds at least", inFS, nil, time.Second, 3 * time.Second},
		{"no WriteTimeout", inFS, nil, -1, 15 * time.Second},
		// crypto/tls takes 5 seconds more, to say goodbye.
		{"TLS", inDir, &tls.Config{Certificates: []tls.Certificate{testCertificate().pair}, SessionTicketsDisabled: true}, time.Second, 8 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newPipeListener()
				files := conduit.Timeout(5 * time.Second)(staticServer(t, test.cfg))
				ended := make(chan time.Time, 1)
				serveBubble(t, newServer(t, &conduit.Config{TLSConfig: test.tls, WriteTimeout: test.writeTimeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer func() { ended <- time.Now() }()
					files.ServeHTTP(w, r)
				})}), l)
				ask := func() io.Reader {
					conn := l.dial()
					if test.tls != nil {
						conn = tls.Client(conn, &tls.Config{RootCAs: testCertificate().pool, ServerName: "conduit.test"})
					}
					t.Cleanup(func() { conn.Close() })
					fmt.Fprint(conn, "GET /a.bin HTTP/1.1\r\nHost: conduit.test\r\n\r\n")
					res, err := http.ReadResponse(bufio.NewReader(conn), nil)
					if err != nil {
						t.Fatal(err)
					}
					return res.Body
				}

				slow, start := ask(), time.Now()
				var got bytes.Buffer
				for n := int64(1); n > 0; time.Sleep(time.Second) {
					n, _ = io.CopyN(&got, slow, 32<<10)
				}
				if took := time.Since(start); got.String() != body || took < 12*time.Second {
					t.Errorf("a slow client got %d of %d bytes in %v", got.Len(), len(body), took)
				}
				<-ended

				ask()
				start = time.Now()
				if took := (<-ended).Sub(start); took != test.want {
					t.Errorf("a client that takes nothing is disconnected after %v, want %v", took, test.want)
				}
			})
		})
	}
}

func TestStaticAfterATimeoutWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		files := staticServer(t, conduit.FileServerConfig{FS: fstest.MapFS{"a.txt": {Data: []byte("a")}}})
		for _, limit := range timeouts {
			_, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				<-r.Context().Done()
				files.ServeHTTP(w, r)
			}))})
			if got := get(t, client, url+"a.txt"); got.status != 503 {
				t.Errorf("%s: %d %q, want the Timeout's 503", limit.name, got.status, got.body)
			}
		}
	})
}

func TestStaticBehindStockServerAndForeignWrappers(t *testing.T) {
	files := staticServer(t, conduit.FileServerConfig{Dir: staticTree(t, staticSizes), MaxCachedFile: staticMaxCached})
	srv := httptest.NewServer(foreign(conduit.Timeout(time.Minute)(foreign(files))))
	defer srv.Close()
	client := newClient(t, &http.Transport{DisableCompression: true})
	for name, body := range staticSizes {
		if got := get(t, client, srv.URL+"/"+name); got.status != 200 || got.body != body {
			t.Errorf("%s: %d, %d bytes", name, got.status, len(got.body))
		}
		req, _ := http.NewRequest("GET", srv.URL+"/"+name, nil)
		req.Header.Set("Range", "bytes=3-5,7-8")
		if got := do(t, client, req); got.status != 206 || !strings.Contains(got.body, "\r\n\r\n345\r\n") {
			t.Errorf("%s: %d %q", name, got.status, got.body)
		}
	}
}

// Small files from memory, conditions and versions cost no allocation.
func TestStaticHitsDoNotAllocate(t *testing.T) {
	dir := staticTree(t, map[string]string{"a.txt": strings.Repeat("x", 4096)})
	files := staticServer(t, conduit.FileServerConfig{Dir: dir, Recheck: -1})
	tag := staticAsk(files, "GET", "/a.txt").Header().Get("Etag")
	compressed := staticAsk(files, "GET", "/a.txt", "Accept-Encoding: gzip").Header().Get("Etag")
	for name, r := range map[string]*http.Request{
		"hit":      httptest.NewRequest("GET", "/a.txt", nil),
		"head":     httptest.NewRequest("HEAD", "/a.txt", nil),
		"version":  httptest.NewRequest("GET", files.URL("a.txt"), nil),
		"gzip":     {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"Accept-Encoding": {"gzip, deflate, br"}}},
		"304":      {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"If-None-Match": {tag}}},
		"304 gzip": {Method: "GET", URL: &url.URL{Path: "/a.txt"}, Header: http.Header{"If-None-Match": {compressed}, "Accept-Encoding": {"gzip"}}},
	} {
		w := &staticDiscard{header: make(http.Header)}
		r = r.WithContext(context.WithValue(context.Background(), http.ServerContextKey, &http.Server{WriteTimeout: time.Second}))
		if n := testing.AllocsPerRun(100, func() {
			clear(w.header)
			files.ServeHTTP(w, r)
		}); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// Streams

// streamKind is one of the ways to write a response bit by bit.
type streamKind struct {
	name        string
	contentType string
	document    bool // ends when it is closed; what is written is flushed soon, not at once
}

var streamKinds = []streamKind{
	{"text", "text/plain; charset=utf-8", false},
	{"binary", "application/octet-stream", false},
	{"JSON", "application/json", true},
	{"NDJSON", "application/x-ndjson", true},
	{"SSE", "text/event-stream", false},
}

// streamWriter is the common part of the three types of stream.
type streamWriter struct {
	send func(text string) error
	end  func() error
	done <-chan struct{}
}

func (kind streamKind) open(w http.ResponseWriter, r *http.Request) (*streamWriter, error) {
	never := func() error { return nil }
	switch kind.name {
	case "JSON", "NDJSON":
		open := conduit.NewJSONStream
		if kind.name == "NDJSON" {
			open = conduit.NewNDJSONStream
		}
		s, err := open(w, r)
		if err != nil {
			return nil, err
		}
		return &streamWriter{func(text string) error { return s.Write(text) }, s.Close, s.Done()}, nil
	case "SSE":
		s, err := conduit.NewSSEStream(w, r)
		if err != nil {
			return nil, err
		}
		send := func(text string) error { return s.WriteSSE(&conduit.SSEEvent{Data: text}) }
		return &streamWriter{send, never, s.Done()}, nil
	}
	open := conduit.NewTextStream
	if kind.name == "binary" {
		open = conduit.NewBinaryStream
	}
	s, err := open(w, r)
	if err != nil {
		return nil, err
	}
	send := func(text string) error { _, err := io.WriteString(s, text); return err }
	return &streamWriter{send, never, s.Done()}, nil
}

// handler opens a stream for each request and has serve write it.
func (kind streamKind) handler(t *testing.T, serve func(r *http.Request, s *streamWriter)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := kind.open(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		serve(r, s)
	})
}

// check compares a body with the texts that it should be made of, joined.
func (kind streamKind) check(t *testing.T, body, want string) {
	t.Helper()
	text, err := "", error(nil)
	switch kind.name {
	case "JSON", "NDJSON":
		var texts []string
		if kind.name == "NDJSON" {
			body = "[" + strings.ReplaceAll(strings.TrimSuffix(body, "\n"), "\n", ",") + "]"
		}
		err = json.Unmarshal([]byte(body), &texts)
		text = strings.Join(texts, "")
	case "SSE":
		var events []sseEvent
		_, events, err = sseReadAll(strings.NewReader(body))
		for _, e := range events {
			text += e.data
		}
	default:
		text = body
	}
	if text != want || err != nil {
		t.Errorf("the body %.200q has the text %.200q, %v, want %.200q", body, text, err, want)
	}
}

// eachStream runs a test for each kind over each protocol, in a bubble of its own.
func eachStream(t *testing.T, test func(t *testing.T, p protocol, kind streamKind)) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, kind := range streamKinds {
			t.Run(kind.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { test(t, p, kind) })
			})
		}
	})
}

// eachBubble runs a test over each protocol, in a bubble of its own.
func eachBubble(t *testing.T, test func(t *testing.T, p protocol)) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		synctest.Test(t, func(t *testing.T) { test(t, p) })
	})
}

// streamChains are what may be around a stream.
var streamChains = []struct {
	name string
	mw   conduit.Middleware
}{
	{"alone", conduit.Chain()},
	{"Timeout", conduit.Timeout(time.Minute)},
	{"FastTimeout", conduit.FastTimeout(time.Minute)},
	{"Compression", conduit.Compression()},
	{"whole", conduit.Chain(foreign, conduit.RequestID(), conduit.Recovery(), conduit.Timeout(time.Minute), foreign, conduit.Compression(), foreign)},
}

// streamBubble serves in a testing/synctest bubble, over pipes.
func streamBubble(t *testing.T, p protocol, cfg conduit.Config) (*conduit.Server, *http.Client, string) {
	t.Helper()
	l := newPipeListener()
	transport := &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return l.dial(), nil },
	}
	url := "http://conduit.test/"
	switch {
	case p.secure:
		// Over a pipe a session ticket would wait for a client that waits to
		// write.
		cfg.EnableHTTP2 = true
		cfg.TLSConfig = &tls.Config{Certificates: []tls.Certificate{testCertificate().pair}, SessionTicketsDisabled: true}
		transport.TLSClientConfig = &tls.Config{RootCAs: testCertificate().pool, ServerName: "conduit.test"}
		transport.ForceAttemptHTTP2 = true
		url = "https://conduit.test/"
	case !p.http1:
		cfg.EnableH2C = true
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	srv := newServer(t, &cfg)
	serveBubble(t, srv, l)
	client := newClient(t, transport)
	t.Cleanup(synctest.Wait) // for handlers that still have to return
	return srv, client, url
}

// streamBare serves h in a bubble over HTTP/1, by an http.Server, which keeps
// nothing off its ResponseWriter.
func streamBare(t *testing.T, h http.Handler) (client *http.Client, url string) {
	l := newPipeListener()
	srv := &http.Server{Handler: h}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return l.client(t), "http://conduit.test/"
}

// streamOpen starts a request whose response goes on until the test ends.
func streamOpen(t *testing.T, client *http.Client, url string, header ...string) (*http.Response, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res, cancel
}

// streamUntil reads until what has been read contains text.
func streamUntil(t *testing.T, body io.Reader, text string) string {
	t.Helper()
	var got []byte
	for buf := make([]byte, 1); !bytes.Contains(got, []byte(text)); {
		n, err := body.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil && !bytes.Contains(got, []byte(text)) {
			t.Fatalf("got %q and then %v, want %q", got, err, text)
		}
	}
	return string(got)
}

// streamSeq is an iterator over items that then fails with err, if that is not
// nil.
func streamSeq[T any](err error, items ...T) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, item := range items {
			if !yield(item, nil) {
				return
			}
		}
		if err != nil {
			var zero T
			yield(zero, err)
		}
	}
}

// streamStuck is a value that json cannot encode.
var streamStuck = make(chan int)

// streamPanics panics when it is encoded.
type streamPanics struct{}

func (streamPanics) MarshalJSON() ([]byte, error) { panic("secret") }

func TestStreamHeader(t *testing.T) {
	eachStream(t, func(t *testing.T, p protocol, kind streamKind) {
		for _, own := range []string{"", "application/vnd.conduit+x; a=b"} {
			got := streamGet(t, p, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if own != "" {
					w.Header().Set("Content-Type", own)
				}
				if kind.document || kind.name == "SSE" {
					w.Header().Set("Content-Length", "7") // of something else, by a middleware
				}
				s, err := kind.open(w, r)
				if err == nil {
					err = s.send("one")
					time.Sleep(time.Second) // it is sent
					err = errors.Join(err, s.send("two"), s.end())
				}
				if err != nil {
					t.Error(err)
				}
			}))
			h, want := got.header, cmp.Or(own, kind.contentType)
			if ct := h["Content-Type"]; got.status != 200 || len(ct) != 1 || ct[0] != want {
				t.Errorf("got %d, Content-Type %q, want 200 and %q", got.status, ct, want)
			}
			if h.Get("X-Accel-Buffering") != "no" || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Connection") != "" {
				t.Errorf("header %v, want no buffering, no sniffing and no Connection", h)
			}
			if cc := h.Get("Cache-Control"); kind.name == "SSE" && cc != "no-cache, no-transform" {
				t.Errorf("Cache-Control %q, want no-cache, no-transform", cc)
			}
			kind.check(t, got.body, "onetwo")
		}
	})
}

// The client has what was written before anything else is. A drain is told, and
// ends nothing.
func TestStreamWritesAreDelivered(t *testing.T) {
	eachStream(t, func(t *testing.T, p protocol, kind streamKind) {
		for _, chain := range streamChains {
			next := make(chan string)
			srv, client, url := streamBubble(t, p, conduit.Config{Handler: chain.mw(kind.handler(t, func(r *http.Request, s *streamWriter) {
				err := s.send("first")
				for text := range next {
					select {
					case <-s.done:
						t.Errorf("%s: Done is closed before the drain", chain.name)
					default:
					}
					err = errors.Join(err, s.send(text))
				}
				<-s.done
				if err := errors.Join(err, s.send("last"), s.end()); err != nil {
					t.Errorf("%s: %v", chain.name, err)
				}
			}))})
			res, _ := streamOpen(t, client, url)
			body := streamUntil(t, res.Body, "first")
			for _, text := range []string{"second", "third"} {
				next <- text
				body += streamUntil(t, res.Body, text)
			}
			close(next)
			srv.Drain()
			rest, err := io.ReadAll(res.Body)
			if err != nil {
				t.Errorf("%s: %v", chain.name, err)
			}
			kind.check(t, body+string(rest), "firstsecondthirdlast")
		}
	})
}

// A plain http.Server does what conduit's does. A stream whose handler has
// returned adds nothing to the next response, whoever still writes to it.
func TestStreamOnABareServer(t *testing.T) {
	for _, kind := range streamKinds {
		t.Run(kind.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				left := make(chan *streamWriter, 1)
				mux := http.NewServeMux()
				mux.Handle("/", foreign(foreign(kind.handler(t, func(r *http.Request, s *streamWriter) {
					if err := errors.Join(s.send("one"), s.send("two"), s.end()); err != nil {
						t.Error(err)
					}
				}))))
				mux.Handle("/left", kind.handler(t, func(r *http.Request, s *streamWriter) {
					s.send("left")
					left <- s
				}))
				mux.HandleFunc("/next", func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(time.Minute)
					io.WriteString(w, "next")
				})
				client, url := streamBare(t, mux)
				kind.check(t, get(t, client, url).body, "onetwo")
				res, _ := streamOpen(t, client, url+"left")
				io.Copy(io.Discard, res.Body)
				time.Sleep(time.Second)
				s := <-left
				if s.send("late") == nil || kind.document && s.end() == nil {
					t.Error("a late use returned nil")
				}
				if got := get(t, client, url+"next"); got.status != 200 || got.body != "next" {
					t.Errorf("next: got %d %q", got.status, got.body)
				}
			})
		})
	}
}

// The server's WriteTimeout, a Timeout and the deadline of an earlier write pass
// while a stream is quiet, and afterwards it goes on.
func TestStreamOutlivesItsTimeouts(t *testing.T) {
	large := strings.Repeat("x", 20<<10) // which a document sends before it flushes
	for _, limit := range append(timeouts, noTimeout) {
		t.Run(limit.name, func(t *testing.T) {
			eachStream(t, func(t *testing.T, p protocol, kind streamKind) {
				h := conduit.Chain(conduit.Logging(), limit.new(10*time.Second), foreign)(kind.handler(t, func(r *http.Request, s *streamWriter) {
					time.Sleep(9 * time.Second) // later than WriteTimeout, and in time
					for _, text := range []string{"one", large, "two"} {
						if err := s.send(text); err != nil {
							t.Errorf("%.10s: %v", text, err)
						}
						time.Sleep(time.Minute)
					}
					select {
					case <-s.done:
						t.Error("Done is closed")
					default:
					}
					if err := r.Context().Err(); err != nil {
						t.Errorf("context: %v", err)
					}
					if err := s.end(); err != nil {
						t.Error(err)
					}
				}))
				_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: 5 * time.Second, Handler: h})
				kind.check(t, get(t, client, url).body, "one"+large+"two")
			})
		})
	}
}

// Until its first byte a stream is as limited as any response.
func TestStreamAfterItsTimeoutWritesNothing(t *testing.T) {
	for _, limit := range timeouts {
		for _, late := range []string{"opened late", "written late"} {
			t.Run(limit.name+"/"+late, func(t *testing.T) {
				eachStream(t, func(t *testing.T, p protocol, kind streamKind) {
					if kind.name == "SSE" && late == "written late" {
						return // its header is its first byte
					}
					errs := make(chan error, 1)
					pause := func(when string) {
						if late == when { // after a second more FastTimeout resets an HTTP/2 stream
							time.Sleep(1500 * time.Millisecond)
						}
					}
					_, client, url := streamBubble(t, p, conduit.Config{Handler: limit.new(time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						pause("opened late")
						s, err := kind.open(w, r)
						pause("written late")
						if err == nil {
							err = s.send("late")
						}
						if err == nil {
							err = s.end()
						}
						errs <- err
					}))})
					if got := get(t, client, url); got.status != 503 || got.body != "Service Unavailable\n" {
						t.Errorf("got %d %q, want the Timeout's 503", got.status, got.body)
					}
					if err := <-errs; !errors.Is(err, conduit.ErrTimeout) {
						t.Errorf("the stream says %v, want ErrTimeout", err)
					}
				})
			})
		}
	}
}

// A client that takes nothing is disconnected 15 seconds after it stopped.
func TestStreamDisconnectsAClientThatStops(t *testing.T) {
	text := strings.Repeat("0123456789abcdef", 2<<10) // 32 KiB
	eachStream(t, func(t *testing.T, p protocol, kind streamKind) {
		ended := make(chan time.Duration, 1)
		var logs logBuffer
		_, client, url := streamBubble(t, p, conduit.Config{Logger: logs.logger(), WriteTimeout: -1, Handler: conduit.Logging()(kind.handler(t, func(r *http.Request, s *streamWriter) {
			for {
				start := time.Now()
				if err := s.send(text); err != nil {
					took := time.Since(start)
					if again := s.send(text); again == nil || again.Error() != err.Error() || time.Since(start) != took {
						t.Errorf("the next write = %v after %v, want %v at once", again, time.Since(start)-took, err)
					}
					ended <- took
					return
				}
			}
		}))})
		res, _ := streamOpen(t, client, url)
		io.ReadFull(res.Body, make([]byte, 10))
		if got := <-ended; got != 15*time.Second {
			t.Errorf("the write ended after %v, want 15s", got)
		}
		synctest.Wait()
		if lines := logs.find("request"); len(lines) != 1 || lines[0]["aborted"] != true {
			t.Errorf("logged %v, want one response, aborted", lines)
		}
	})
}

// The deadline moves along within a write: it takes 40 seconds, and no 64 KiB of
// it take 15.
func TestStreamOneLargeWriteToASlowClient(t *testing.T) {
	text := strings.Repeat("0123456789abcdef", 32<<10) // 512 KiB
	synctest.Test(t, func(t *testing.T) {
		_, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: streamHandler(t, conduit.NewTextStream, func(s *conduit.Stream) error {
			n, err := s.Write([]byte(text))
			if n != len(text) {
				t.Errorf("wrote %d of %d bytes", n, len(text))
			}
			return err
		})})
		res, _ := streamOpen(t, client, url)
		start := time.Now()
		var got bytes.Buffer
		for n := int64(1); n > 0; time.Sleep(5 * time.Second) {
			n, _ = io.CopyN(&got, res.Body, 64<<10)
		}
		if took := time.Since(start); got.String() != text || took < 30*time.Second {
			t.Errorf("%d of %d bytes in %v", got.Len(), len(text), took)
		}
	})
}

// When the client disconnects, everything that works for it ends.
func TestStreamNoticesThatTheClientHasDisconnected(t *testing.T) {
	text := strings.Repeat("x", 1000)
	serves := make(map[string]func(w http.ResponseWriter, r *http.Request) error)
	for _, kind := range streamKinds {
		serves[kind.name] = func(w http.ResponseWriter, r *http.Request) error {
			s, err := kind.open(w, r)
			if err == nil {
				err = s.send(text)
			}
			<-s.done
			for err == nil { // the first may fit into a buffer
				err = s.send(strings.Repeat(text, 32))
			}
			return err
		}
	}
	for _, busy := range []bool{false, true} {
		serves[fmt.Sprint("StreamJSON, busy=", busy)] = func(w http.ResponseWriter, r *http.Request) error {
			return conduit.StreamJSON(w, r, conduit.Receive(r.Context(), streamProducer(r, busy, text)))
		}
		serves[fmt.Sprint("WriteJSONArray, busy=", busy)] = func(w http.ResponseWriter, r *http.Request) error {
			s, _ := conduit.NewJSONStream(w, r)
			return s.WriteJSONArray(streamProducer[any](r, busy, text))
		}
		serves[fmt.Sprint("Serve, busy=", busy)] = func(w http.ResponseWriter, r *http.Request) error {
			s, _ := conduit.NewSSEStream(w, r)
			return s.Serve(streamProducer(r, busy, &conduit.SSEEvent{Data: text}))
		}
	}
	for name, serve := range serves {
		t.Run(name, func(t *testing.T) {
			eachBubble(t, func(t *testing.T, p protocol) { // which panics if a goroutine is left
				ended := make(chan error, 1)
				h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { ended <- serve(w, r) })
				_, client, url := streamBubble(t, p, conduit.Config{Handler: conduit.Timeout(time.Minute)(h)})
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				req, _ := http.NewRequestWithContext(ctx, "POST", url, strings.NewReader("a small body that the handler does not read"))
				res, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				io.ReadFull(res.Body, make([]byte, 500))
				cancel()
				if err := <-ended; !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want it to wrap context.Canceled", err)
				}
			})
		})
	}
}

// HEAD gets the header. What would be taken from its source for GET is left there.
func TestStreamHEAD(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		events := make(chan *conduit.SSEEvent, 1)
		events <- &conduit.SSEEvent{Data: "secret"}
		items := make(chan any, 1)
		items <- "secret"
		pulled := func(yield func(string, error) bool) { t.Error("the iterator was called"); yield("secret", nil) }
		handlers := map[string]http.Handler{
			"Serve": streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error { return s.Serve(events) }),
			"SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
				t.Error("serve was called")
				return nil
			}),
			"ReadFrom": streamHandler(t, conduit.NewBinaryStream, func(s *conduit.Stream) error {
				s.ReadFrom(streamReader(func([]byte) (int, error) { t.Error("the reader was read"); return 0, io.EOF }))
				return nil
			}),
			"WriteJSONArray": streamHandler(t, conduit.NewJSONStream, func(s *conduit.JSONStream) error { return s.WriteJSONArray(items) }),
			"StreamNDJSON": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if err := conduit.StreamNDJSON(w, r, pulled); err != nil {
					t.Error(err)
				}
			}),
			"JSONHandler": conduit.JSONHandler(func(*http.Request) iter.Seq2[string, error] {
				t.Error("items was called")
				return pulled
			}),
			"SSEBroker": conduit.NewSSEBroker(nil),
		}
		for _, kind := range streamKinds {
			handlers[kind.contentType] = kind.handler(t, func(r *http.Request, s *streamWriter) {
				<-s.done
				if err := s.send("text"); !errors.Is(err, http.ErrBodyNotAllowed) {
					t.Errorf("%s: a write to HEAD = %v, want ErrBodyNotAllowed", kind.name, err)
				}
				if err := s.end(); err != nil {
					t.Errorf("%s: %v", kind.name, err)
				}
			})
		}
		for name, h := range handlers {
			for _, chain := range streamChains {
				_, client, url := streamBubble(t, p, conduit.Config{Handler: chain.mw(h)})
				req, _ := http.NewRequest("HEAD", url, nil)
				got := do(t, client, req)
				contentType := got.header.Get("Content-Type")
				if got.status != 200 || got.body != "" || contentType == "" || strings.Contains(name, "/") && contentType != name {
					t.Errorf("%s, %s: got %d %q, %v; want the header of GET", name, chain.name, got.status, got.body, got.header)
				}
			}
		}
		if len(events) != 1 || len(items) != 1 {
			t.Errorf("%d events and %d items are left, want 1 of each", len(events), len(items))
		}
	})
}

// streamHandler opens a stream and has serve, which is to return nil, write it.
func streamHandler[S any](t *testing.T, open func(http.ResponseWriter, *http.Request) (S, error), serve func(s S) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := open(w, r)
		if err == nil {
			err = serve(s)
		}
		if err != nil {
			t.Error(err)
		}
	})
}

// streamNoFlush is a writer that cannot flush.
type streamNoFlush struct{ unwrapped http.ResponseWriter }

func (w streamNoFlush) Header() http.Header         { return w.unwrapped.Header() }
func (w streamNoFlush) Write(p []byte) (int, error) { return w.unwrapped.Write(p) }
func (w streamNoFlush) WriteHeader(status int)      { w.unwrapped.WriteHeader(status) }

func TestStreamNeedsAFlusher(t *testing.T) {
	handlers := map[string]http.Handler{
		"JSONHandler": conduit.JSONHandler(func(*http.Request) iter.Seq2[int, error] { return streamSeq(nil, 1) }),
		"SSEHandler":  conduit.SSEHandler(func(*conduit.SSEStream, *http.Request) error { t.Error("serve was called"); return nil }),
		"SSEBroker":   conduit.NewSSEBroker(nil),
	}
	refuse := func(name string, open func(w http.ResponseWriter, r *http.Request) error) {
		handlers[name] = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := open(w, r); !errors.Is(err, http.ErrNotSupported) || len(w.Header()) != 0 {
				t.Errorf("%s: got %v and the header %v, want ErrNotSupported and nothing", name, err, w.Header())
			}
			http.Error(w, "no streams here", http.StatusInternalServerError)
		})
	}
	for _, kind := range streamKinds {
		refuse(kind.name, func(w http.ResponseWriter, r *http.Request) error { _, err := kind.open(w, r); return err })
	}
	refuse("StreamJSON", func(w http.ResponseWriter, r *http.Request) error { return conduit.StreamJSON(w, r, streamSeq(nil, 1)) })
	for name, h := range handlers {
		rec := httptest.NewRecorder()
		conduit.Timeout(time.Minute)(foreign(h)).ServeHTTP(streamNoFlush{rec}, httptest.NewRequest("GET", "/", nil))
		if h := rec.Header(); rec.Code != 500 || !strings.HasPrefix(h.Get("Content-Type"), "text/plain") || h.Get("X-Accel-Buffering") != "" {
			t.Errorf("%s: got %d %q, %v; want 500", name, rec.Code, rec.Body, h)
		}
	}
}

// flushOnly is a wrapper from before Unwrap.
type flushOnly struct{ w http.ResponseWriter }

func (f flushOnly) Header() http.Header         { return f.w.Header() }
func (f flushOnly) Write(p []byte) (int, error) { return f.w.Write(p) }
func (f flushOnly) WriteHeader(status int)      { f.w.WriteHeader(status) }
func (f flushOnly) Flush()                      { f.w.(http.Flusher).Flush() }

// After an early error the handler has the server's WriteTimeout again, or the
// time of a Timeout around it.
func TestStreamEarlyErrorLeavesTheHandlerItsTime(t *testing.T) {
	fail := func(w http.ResponseWriter, r *http.Request) {
		if err := conduit.StreamJSON(w, r, streamSeq[int](errors.New("the first store is down"))); err == nil {
			t.Error("StreamJSON returned nil")
		}
	}
	eachBubble(t, func(t *testing.T, p protocol) {
		ended := make(chan time.Duration, 1)
		_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fail(w, r)
			start := time.Now()
			for err := error(nil); err == nil && time.Since(start) < time.Hour; {
				_, err = w.Write(make([]byte, 32<<10))
			}
			ended <- time.Since(start)
		})})
		streamOpen(t, client, url) // and take nothing
		if got := <-ended; got != 5*time.Second {
			t.Errorf("a client that takes nothing held the handler for %v, want 5s", got)
		}
		for _, limit := range timeouts {
			_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: 15 * time.Second, Handler: limit.new(30 * time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				fail(w, r)
				time.Sleep(20 * time.Second)
				io.WriteString(w, "from the second store")
			}))})
			if got := get(t, client, url); got.body != "from the second store" {
				t.Errorf("%s: got %d %q", limit.name, got.status, got.body)
			}
		}
	})
}

// The header, and on a bare server the last chunk too, are under a deadline.
func TestStreamHandlersBeginAndEndUnderADeadline(t *testing.T) {
	for last, h := range map[string]http.Handler{ // by the last that the client reads
		"": conduit.SSEHandler(func(*conduit.SSEStream, *http.Request) error { t.Error("serve was called"); return nil }),
		"data: text\n\n\r\n": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			return s.WriteSSE(&conduit.SSEEvent{Data: "text"})
		}),
		"]\r\n": conduit.JSONHandler(func(*http.Request) iter.Seq2[string, error] {
			return func(yield func(string, error) bool) {
				yield("text", nil)
				time.Sleep(time.Second) // it is sent, and so the response chunked
			}
		}),
	} {
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			closed := make(chan time.Time, 1)
			srv := &http.Server{Handler: h, WriteTimeout: 5 * time.Second, ConnState: func(_ net.Conn, state http.ConnState) {
				if state == http.StateClosed {
					closed <- time.Now()
				}
			}}
			go srv.Serve(l)
			defer srv.Close()
			c := l.dial()
			defer c.Close()
			fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: conduit.test\r\n\r\n")
			streamUntil(t, c, last) // and no further
			start := time.Now()
			if took := (<-closed).Sub(start); took != 15*time.Second {
				t.Errorf("the connection of a client that reads no further than %q was closed after %v, want 15s", last, took)
			}
		})
	}
}

// streamSources make a response of stamps.
var streamSources = []struct {
	name string
	json bool
	make func(t *testing.T, stamps iter.Seq[string]) http.Handler
}{
	{"Write", true, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		return streamHandler(t, conduit.NewJSONStream, func(s *conduit.JSONStream) error {
			for stamp := range stamps {
				if err := s.Write(stamp); err != nil {
					return err
				}
			}
			return s.Close()
		})
	}},
	{"WriteJSONArray", true, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		return streamHandler(t, conduit.NewJSONStream, func(s *conduit.JSONStream) error {
			return s.WriteJSONArray(streamChannel(stamps, func(stamp string) any { return stamp }))
		})
	}},
	{"StreamJSON", true, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		return conduit.JSONHandler(func(*http.Request) iter.Seq2[string, error] {
			return func(yield func(string, error) bool) {
				stamps(func(stamp string) bool { return yield(stamp, nil) })
			}
		})
	}},
	{"ReadFrom", false, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		return streamHandler(t, conduit.NewTextStream, func(s *conduit.Stream) error {
			next, stop := iter.Pull(stamps)
			defer stop()
			_, err := s.ReadFrom(streamReader(func(p []byte) (int, error) {
				stamp, ok := next()
				if !ok {
					return 0, io.EOF
				}
				return copy(p, stamp), nil
			}))
			return err
		})
	}},
	{"Serve", false, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		return streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
			return s.Serve(streamChannel(stamps, func(stamp string) *conduit.SSEEvent { return &conduit.SSEEvent{Data: stamp} }))
		})
	}},
	{"SSEBroker", false, func(t *testing.T, stamps iter.Seq[string]) http.Handler {
		b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Queue: 4096})
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			go func() {
				time.Sleep(time.Second) // the client is there
				for stamp := range stamps {
					ssePublish(t, b, stamp)
				}
				b.Close()
			}()
			b.ServeHTTP(w, r)
		})
	}},
}

// streamStamps yields what says when it was made, and ends a second later.
func streamStamps(pauses []time.Duration) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, pause := range pauses {
			time.Sleep(pause)
			if !yield(fmt.Sprint(time.Now().UnixMicro(), "!")) {
				return
			}
		}
		time.Sleep(time.Second)
	}
}

// streamChannel sends an item for each stamp.
func streamChannel[T any](stamps iter.Seq[string], item func(stamp string) T) chan T {
	items := make(chan T)
	go func() {
		defer close(items)
		for stamp := range stamps {
			items <- item(stamp)
		}
	}()
	return items
}

func streamRepeat(pause time.Duration, n int) []time.Duration {
	return slices.Repeat([]time.Duration{pause}, n)
}

// streamMeter counts flushes.
type streamMeter struct {
	http.ResponseWriter
	flushes *atomic.Int64
}

func (m streamMeter) Unwrap() http.ResponseWriter { return m.ResponseWriter }

func (m streamMeter) FlushError() error {
	m.flushes.Add(1)
	return http.NewResponseController(m.ResponseWriter).Flush()
}

// Nothing waits longer than 20 ms, the last item neither. What comes to an idle
// stream is sent at once, or an element within a millisecond. Yet a busy source of
// items has them sent together.
func TestStreamItemsAreDeliveredInTime(t *testing.T) {
	for _, source := range streamSources {
		for _, test := range []struct {
			name    string
			pauses  []time.Duration
			flushes int64 // at most
		}{
			{"idle", streamRepeat(time.Second, 20), 25},
			{"steady", streamRepeat(5*time.Millisecond, 200), 205},
			{"busy", streamRepeat(100*time.Microsecond, 5000), 550},
			{"bursts", slices.Repeat(append(streamRepeat(0, 49), 100*time.Millisecond), 10), 40},
			{"ready", streamRepeat(0, 2000), 10},
		} {
			t.Run(source.name+"/"+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var flushes atomic.Int64
					h := source.make(t, streamStamps(test.pauses))
					srv, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						h.ServeHTTP(streamMeter{w, &flushes}, r)
					})})
					res, _ := streamOpen(t, client, url)
					if source.json || source.name == "ReadFrom" { // which a drain does not end
						time.AfterFunc(time.Second, srv.Drain)
					}
					n, worst := 0, time.Duration(0)
					for in := bufio.NewReader(res.Body); ; n++ {
						text, err := in.ReadString('!')
						if err != nil {
							break
						}
						text = text[:len(text)-1]
						micros, err := strconv.ParseInt(text[strings.LastIndexAny(text, `" `)+1:], 10, 64)
						if err != nil {
							t.Fatal(err)
						}
						worst = max(worst, time.Since(time.UnixMicro(micros)))
					}
					late := 20 * time.Millisecond
					if test.name == "idle" && source.json {
						late = time.Millisecond
					} else if test.name == "idle" {
						late = 0
					}
					if n != len(test.pauses) || worst > late || flushes.Load() > test.flushes && source.name != "ReadFrom" {
						t.Errorf("%d items of %d, up to %v late, with %d flushes; want %v and %d", n, len(test.pauses), worst, flushes.Load(), late, test.flushes)
					}
				})
			})
		}
	}
}

// JSON streams

// streamPoint encodes itself through a pointer receiver.
type streamPoint struct{ x, y int }

func (p *streamPoint) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "[%d,\n%d]", p.x, p.y), nil
}

func TestJSONDocuments(t *testing.T) {
	type opener = func(http.ResponseWriter, *http.Request) (*conduit.JSONStream, error)
	written := func(open opener, values ...any) http.Handler {
		return streamHandler(t, open, func(s *conduit.JSONStream) error {
			defer s.Abort() // which is nothing after Close
			for _, v := range values {
				if err := s.Write(v); err != nil {
					t.Errorf("%v: %v", v, err)
				}
			}
			err := s.Close()
			s.Abort()
			if late := s.Write("late"); late == nil {
				t.Error("a write after Close returned nil")
			}
			<-s.Done()
			return errors.Join(err, s.Close())
		})
	}
	pulled := func(open opener, values ...string) http.Handler {
		return streamHandler(t, open, func(s *conduit.JSONStream) error {
			return s.WriteJSONArray(streamChannel(slices.Values(values), func(value string) any { return value }))
		})
	}
	handled := func(items ...streamPoint) http.Handler {
		return conduit.JSONHandler(func(*http.Request) iter.Seq2[streamPoint, error] { return streamSeq(nil, items...) })
	}
	points := []streamPoint{{1, 2}, {3, 4}}
	mixed := []any{1, "a\n<b>", nil, map[string]any{"b": []int{1}, "a": true}, json.RawMessage("{\n\t\"raw\":\n1}"), &streamPoint{5, 6}}
	tests := []struct {
		name string
		h    http.Handler
		want string
	}{
		{"nothing", written(conduit.NewJSONStream), `[]`},
		{"one", written(conduit.NewJSONStream, 1), `[1]`},
		{"mixed", written(conduit.NewJSONStream, mixed...), `[1,"a\n\u003cb\u003e",null,{"a":true,"b":[1]},{"raw":1},[5,6]]`},
		{"NDJSON nothing", written(conduit.NewNDJSONStream), ""},
		{"NDJSON mixed", written(conduit.NewNDJSONStream, mixed...), "1\n\"a\\n\\u003cb\\u003e\"\nnull\n{\"a\":true,\"b\":[1]}\n{\"raw\":1}\n[5,6]\n"},
		{"channel closed", pulled(conduit.NewJSONStream), `[]`},
		{"channel", pulled(conduit.NewJSONStream, "a", "b"), `["a","b"]`},
		{"NDJSON channel", pulled(conduit.NewNDJSONStream, "a", "b"), "\"a\"\n\"b\"\n"},
		{"iterator of nothing", handled(), `[]`},
		{"iterator", handled(points...), `[[1,2],[3,4]]`},
		{"NDJSON iterator", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := conduit.StreamNDJSON(w, r, streamSeq(nil, points...)); err != nil {
				t.Error(err)
			}
		}), "[1,2]\n[3,4]\n"},
		{"trailer", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "Digest")
			conduit.StreamJSON(w, r, streamSeq(nil, 1))
			w.Header().Set("Digest", "x")
		}), "[1]"},
	}
	for _, p := range []protocol{http1Protocol, h2cProtocol} {
		for _, test := range tests {
			t.Run(p.name+"/"+test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { // in which no time passes
					_, client, url := streamBubble(t, p, conduit.Config{Handler: test.h})
					res, _ := streamOpen(t, client, url)
					body, err := io.ReadAll(res.Body)
					synctest.Wait() // or the server would find its end of the pipe closed
					length, trailer := int64(len(test.want)), ""
					if test.name == "trailer" { // on HTTP/1 the two do not go together
						length, trailer = -1, "x"
					}
					if string(body) != test.want || err != nil || res.ContentLength != length || res.Trailer.Get("Digest") != trailer {
						t.Errorf("got %q, %v, Content-Length %d, trailer %v; want %q and %d", body, err, res.ContentLength, res.Trailer, test.want, length)
					}
				})
			})
		}
	}
}

// What fails before its first byte is out leaves the response to its caller. What
// fails later aborts it, whatever is written then. A panic is a failure as any
// other: no timer writes beside the one who recovers.
func TestStreamErrors(t *testing.T) {
	type serve = func(w http.ResponseWriter, r *http.Request, late bool) error
	secret := errors.New("secret")
	wait := func(late bool) {
		if late {
			time.Sleep(time.Second) // what was written goes out
		}
	}
	fails := func(yield func(any, error) bool) { yield(nil, secret) }
	panics := func(func(any, error) bool) { panic(secret) }
	// written writes an element, which goes out if last is late, and calls last.
	written := func(last func(s *conduit.JSONStream) error) serve {
		return func(w http.ResponseWriter, r *http.Request, late bool) error {
			s, err := conduit.NewJSONStream(w, r)
			if err == nil {
				err = s.Write("one")
			}
			if err != nil {
				t.Error(err)
			}
			done := s.Done()
			wait(late)
			err = last(s)
			items := make(chan any, 1)
			items <- "secret"
			for _, again := range []error{s.Write("secret"), s.WriteJSONArray(items), s.Close(), s.Close()} {
				if again == nil || len(items) != 1 {
					t.Errorf("a use after %v returned nil, or took what nobody sends", err)
				}
			}
			s.Abort()
			<-done
			return err
		}
	}
	pulled := func(last func(yield func(any, error) bool), stream func(http.ResponseWriter, *http.Request, iter.Seq2[any, error]) error) serve {
		return func(w http.ResponseWriter, r *http.Request, late bool) error {
			return stream(w, r, func(yield func(any, error) bool) {
				if yield("one", nil) {
					wait(late)
					last(yield)
				}
			})
		}
	}
	// read copies from a reader that fails at once, or after its first byte.
	read := func(last func() error) serve {
		return func(w http.ResponseWriter, r *http.Request, late bool) error {
			s, err := conduit.NewTextStream(w, r)
			if err != nil {
				return err
			}
			var src io.Reader = streamReader(func([]byte) (int, error) { return 0, last() })
			if late {
				src = io.MultiReader(strings.NewReader("one"), src)
			}
			_, err = s.ReadFrom(src)
			return err
		}
	}
	for _, test := range []struct {
		name  string
		serve serve
		want  string // in the error
	}{
		{"StreamJSON", pulled(fails, conduit.StreamJSON), "secret"},
		{"StreamNDJSON", pulled(fails, conduit.StreamNDJSON), "secret"},
		{"panic of an iterator", pulled(panics, conduit.StreamJSON), "secret"},
		{"panic of an item", pulled(func(yield func(any, error) bool) { yield(streamPanics{}, nil) }, conduit.StreamJSON), "secret"},
		{"unencodable", written(func(s *conduit.JSONStream) error { return s.Write(map[string]any{"a": streamStuck}) }), "chan int"},
		{"nil channel", written(func(s *conduit.JSONStream) error { return s.WriteJSONArray(nil) }), "channel is nil"},
		{"Abort", written(func(s *conduit.JSONStream) error { s.Abort(); return s.Close() }), "aborted"},
		{"panic of an element", written(func(s *conduit.JSONStream) error { return s.Write(streamPanics{}) }), "secret"},
		{"ReadFrom", read(func() error { return secret }), "secret"},
		{"panic of a reader", read(func() error { panic(secret) }), "secret"},
		{"nil iterator", func(w http.ResponseWriter, r *http.Request, late bool) error {
			return conduit.StreamJSON[int](w, r, nil)
		}, "iterator is nil"},
		{"status of the handler's", func(w http.ResponseWriter, r *http.Request, late bool) error {
			w.WriteHeader(http.StatusCreated)
			return conduit.StreamJSON(w, r, streamSeq[int](secret))
		}, "secret"},
	} {
		for _, late := range []bool{false, true} {
			if late && test.name == "nil iterator" {
				continue
			}
			t.Run(fmt.Sprint(test.name, "/late=", late), func(t *testing.T) {
				eachBubble(t, func(t *testing.T, p protocol) {
					for _, chain := range streamChains {
						recovered := func(w http.ResponseWriter, r *http.Request) (err error) {
							defer func() {
								if v := recover(); v != nil {
									err = fmt.Errorf("conduit: %v", v)
								}
							}()
							return test.serve(w, r, late)
						}
						h := chain.mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
							if err := recovered(w, r); err == nil || !strings.HasPrefix(err.Error(), "conduit: ") || !strings.Contains(err.Error(), test.want) {
								t.Errorf("%s: got %v, want an error with %q", chain.name, err, test.want)
							}
							time.Sleep(time.Second) // a timer has had its time
							http.Error(w, "sorry", http.StatusInternalServerError)
						}))
						got := streamGet(t, p, h)
						if aborted := late || test.name == "status of the handler's"; aborted && (got.err == nil || strings.Contains(got.body, "sorry") || got.line["aborted"] != true) {
							t.Errorf("%s: got %+v, want it aborted", chain.name, got)
						} else if !aborted && (got.status != 500 || got.body != "sorry\n" || got.header.Get("Content-Type") != "text/plain; charset=utf-8" || got.line["aborted"] != nil) {
							t.Errorf("%s: got %+v, want the caller's 500", chain.name, got)
						}
						if strings.Contains(got.body, "secret") || len(got.logs.find("net/http")) > 0 {
							t.Errorf("%s: got %q, and the log\n%s", chain.name, got.body, got.logs)
						}
					}
				})
			})
		}
	}
}

type streamReader func(p []byte) (int, error)

func (f streamReader) Read(p []byte) (int, error) { return f(p) }

// streamGot is a response with its log.
type streamGot struct {
	response
	err  error // of the request, or the body's
	line map[string]any
	logs *logBuffer
}

// streamGet asks for / in a bubble, behind Logging.
func streamGet(t *testing.T, p protocol, h http.Handler) (got streamGot) {
	t.Helper()
	got.logs = new(logBuffer)
	_, client, url := streamBubble(t, p, conduit.Config{Handler: conduit.Logging()(h), Logger: got.logs.logger()})
	res, err := client.Get(url)
	if err == nil {
		var body []byte
		body, err = io.ReadAll(res.Body)
		res.Body.Close()
		got.response = response{status: res.StatusCode, header: res.Header, body: string(body)}
	}
	got.err = err
	time.Sleep(time.Minute) // for a handler that goes on
	synctest.Wait()
	lines := got.logs.find("request")
	if len(lines) != 1 {
		t.Fatalf("logged %v, want one request", lines)
	}
	got.line = lines[0]
	return got
}

// A panic of the writer ends the stream too, and no other panic replaces one,
// even where nothing else would abort the response, as it is without deadlines.
func TestStreamEndsWithAPanic(t *testing.T) {
	large := strings.Repeat("x", 20<<10)
	panicking := func(w http.ResponseWriter) http.ResponseWriter {
		first := true
		return streamFaultyWriter{w, func() error {
			if first {
				first = false
				panic("secret")
			}
			return nil
		}}
	}
	noDeadlines := func(w http.ResponseWriter) http.ResponseWriter { return flushOnly{w} }
	for _, test := range []struct {
		name  string
		wrap  func(w http.ResponseWriter) http.ResponseWriter
		h     http.Handler
		value any    // of the panic
		want  string // the body, "" if the response is to be aborted
	}{
		{"Write", panicking, streamHandler(t, conduit.NewJSONStream, func(s *conduit.JSONStream) error {
			return errors.Join(s.Write("one"), s.Write(large))
		}), "secret", ""},
		{"Serve", panicking, streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
			events := make(chan *conduit.SSEEvent, 2)
			events <- &conduit.SSEEvent{Data: "due"}
			events <- &conduit.SSEEvent{Data: large}
			return s.Serve(events)
		}), "secret", ""},
		{"no deadlines", noDeadlines, streamHandler(t, conduit.NewNDJSONStream, func(s *conduit.JSONStream) error {
			return errors.Join(s.Write(large), s.Write(streamPanics{}))
		}), "secret", `"` + large + "\"\nsorry\n"},
		{"Abort without deadlines", noDeadlines, streamHandler(t, conduit.NewNDJSONStream, func(s *conduit.JSONStream) error {
			err := s.Write(large) // is sent at once
			s.Abort()
			return err
		}), http.ErrAbortHandler, `"` + large + "\"\nsorry\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, url := streamBare(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer func() {
						if value := recover(); value != test.value {
							t.Errorf("recovered from %v, want %v", value, test.value)
						}
						time.Sleep(time.Second) // the timer has had its time
						http.Error(w, "sorry", http.StatusInternalServerError)
					}()
					test.h.ServeHTTP(test.wrap(w), r)
				}))
				res, err := client.Get(url)
				var body []byte
				if err == nil {
					body, err = io.ReadAll(res.Body)
					res.Body.Close()
				}
				if string(body) != test.want || (err != nil) != (test.want == "") {
					t.Errorf("got %.100q, %v, want %.100q", body, err, test.want)
				}
			})
		})
	}
}

// streamFaultyWriter fails as fault does.
type streamFaultyWriter struct {
	http.ResponseWriter
	fault func() error
}

func (w streamFaultyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w streamFaultyWriter) Write(p []byte) (int, error) {
	if err := w.fault(); err != nil {
		return 0, err
	}
	return w.ResponseWriter.Write(p)
}

// What the timer's write meets is what the next one of the handler returns.
func TestJSONKeepsTheFaultOfItsTimer(t *testing.T) {
	for name, fault := range map[string]func() error{
		"error": func() error { return errors.New("broken") },
		"panic": func() error { panic("broken") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := conduit.NewJSONStream(streamFaultyWriter{httptest.NewRecorder(), fault}, httptest.NewRequest("GET", "/", nil))
				if err == nil {
					err = s.Write(1)
				}
				if err != nil {
					t.Fatal(err)
				}
				<-s.Done() // which the timer's fault closes
				for i, err := range []error{s.Write(2), s.Write(3), s.Close()} {
					if err == nil || !strings.Contains(err.Error(), "broken") {
						t.Errorf("use %d = %v, want the fault of the timer", i, err)
					}
				}
			})
		})
	}
}

// What goes wrong in a handler is for the log, at debug if the client has
// disconnected, and not for the client.
func TestStreamHandlersLogErrors(t *testing.T) {
	items := func(seq iter.Seq2[any, error]) http.Handler {
		return conduit.JSONHandler(func(*http.Request) iter.Seq2[any, error] { return seq })
	}
	for _, test := range []struct {
		name   string
		h      http.Handler
		status int
		want   string // the body
	}{
		{"iterator", items(streamSeq[any](errors.New("secret"))), 500, "Internal Server Error\n"},
		{"unencodable", items(streamSeq[any](nil, map[string]any{"secret": streamStuck})), 500, "Internal Server Error\n"},
		{"nil iterator", items(nil), 500, "Internal Server Error\n"},
		{"late", items(func(yield func(any, error) bool) {
			yield("one", nil)
			time.Sleep(time.Second)
			yield(nil, errors.New("secret"))
		}), 200, `["one"`},
		{"SSEHandler", conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			return errors.Join(s.WriteSSE(&conduit.SSEEvent{Data: "event"}), errors.New("secret"))
		}), 200, "data: event\n\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachBubble(t, func(t *testing.T, p protocol) {
				for _, chain := range streamChains {
					got := streamGet(t, p, chain.mw(test.h))
					if aborted := got.err != nil && got.line["aborted"] == true; got.status != test.status || got.body != test.want || aborted != (test.name == "late") {
						t.Errorf("%s: got %+v, want %d %q", chain.name, got, test.status, test.want)
					}
					if lines := got.logs.find("stream failed"); len(lines) != 1 || lines[0]["level"] != "ERROR" || lines[0]["method"] != "GET" || lines[0]["path"] != "/" {
						t.Errorf("%s: logged %v, want the error", chain.name, lines)
					}
				}
			})
		})
	}

	for name, h := range map[string]http.Handler{
		"JSONHandler": items(func(yield func(any, error) bool) {
			for yield(strings.Repeat("x", 20<<10), nil) {
				time.Sleep(time.Second)
			}
		}),
		"SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			<-r.Context().Done()
			return s.WriteSSE(&conduit.SSEEvent{Data: "x"})
		}),
		"SSEBroker": sseBroker,
	} {
		for _, started := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " of a client that has disconnected, started=", started), func(t *testing.T) {
				eachBubble(t, func(t *testing.T, p protocol) {
					var logs logBuffer
					_, client, url := streamBubble(t, p, conduit.Config{Logger: logs.logger(), Handler: conduit.Logging()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						if !started {
							<-r.Context().Done()
						}
						h.ServeHTTP(w, r)
					}))})
					client.Timeout = time.Second
					if res, err := client.Get(url); err == nil {
						io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
					time.Sleep(2 * time.Second)
					lines := append(logs.find("request"), logs.find("stream failed")...)
					if len(lines) != 2 || lines[0]["level"] != "INFO" || lines[0]["aborted"] != true || !started && lines[0]["status"] != 0.0 || lines[1]["level"] != "DEBUG" {
						t.Errorf("logged %v, want an aborted response at level info, and the error at level debug", lines)
					}
				})
			})
		}
	}
}

// A server outlives its streams, and keeps nothing of them.
func TestStreamLeavesNothingWithItsServer(t *testing.T) {
	type key struct{}
	marked := make(chan weak.Pointer[[64]byte], 1)
	client := http1Protocol.client(t)
	get(t, client, serve(t, newServer(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mark := new([64]byte)
		if s, err := conduit.NewSSEStream(w, r.WithContext(context.WithValue(r.Context(), key{}, mark))); err != nil || s.Done() == nil {
			t.Error(err)
		}
		marked <- weak.Make(mark)
	})})))
	client.CloseIdleConnections()
	mark := <-marked
	for deadline := time.Now().Add(10 * time.Second); mark.Value() != nil; runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatal("the context of a request that has ended is still there")
		}
	}
}

// streamProducer sends until the request ends: after a few without a pause, if
// not busy.
func streamProducer[T any](r *http.Request, busy bool, item T) <-chan T {
	ch := make(chan T)
	go func() {
		for i := 0; busy || i < 4; i++ {
			select {
			case ch <- item:
			case <-r.Context().Done():
				return
			}
		}
	}()
	return ch
}

func TestReceiveYieldsTheCause(t *testing.T) {
	cause := errors.New("cause")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	ch := make(chan int, 2)
	ch <- 1
	var got []any
	for v, err := range conduit.Receive(ctx, ch) {
		got = append(got, v, err)
		ch <- 2 // which comes too late
		cancel(cause)
	}
	if want := []any{1, nil, 0, cause}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A programmer's mistake is named where it is made.
func TestStreamMistakesAreNamed(t *testing.T) {
	for name, mistake := range map[string]func(){
		"JSONHandler":   func() { conduit.JSONHandler[int](nil) },
		"SSEHandler":    func() { conduit.SSEHandler(nil) },
		"MaxClients":    func() { conduit.NewSSEBroker(&conduit.SSEBrokerConfig{MaxClients: -1}) },
		"Queue":         func() { conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Queue: -1}) },
		"NewTextStream": func() { new(conduit.Stream).Write(nil) },
		"NewJSONStream": func() { new(conduit.JSONStream).Close() },
		"NewSSEStream":  func() { new(conduit.SSEStream).WriteSSE(&conduit.SSEEvent{}) },
	} {
		func() {
			defer func() {
				if value := recover(); !strings.Contains(fmt.Sprint(value), name) {
					t.Errorf("%s: the panic is %v, want the name", name, value)
				}
			}()
			mistake()
		}()
	}
}

// Server-sent events

// sseReader reads an event stream as the HTML standard has it
// (https://html.spec.whatwg.org/multipage/server-sent-events.html), but for CR, which
// is never sent.
type sseReader struct {
	in       *bufio.Reader
	id       string // the last event id buffer
	comments []string
	retries  []string // the values of valid retry fields
	lines    []string // all of them, as they came
}

// sseEvent is what a browser dispatches. Its id is the stream's last one.
type sseEvent struct{ id, event, data string }

func newSSEReader(in io.Reader) *sseReader { return &sseReader{in: bufio.NewReader(in)} }

func sseReadAll(in io.Reader) (*sseReader, []sseEvent, error) {
	s := newSSEReader(in)
	var events []sseEvent
	for {
		e, err := s.next()
		if err == io.EOF {
			return s, events, nil
		}
		if err != nil {
			return s, events, err
		}
		events = append(events, e)
	}
}

// line returns the next line. One without an end is none.
func (s *sseReader) line() (string, error) {
	text, err := s.in.ReadString('\n')
	if err != nil {
		return "", err
	}
	text = strings.TrimSuffix(text, "\n")
	s.lines = append(s.lines, text)
	return text, nil
}

// next returns the next event that is dispatched. What is unfinished when the
// stream ends is discarded.
func (s *sseReader) next() (sseEvent, error) {
	var event, data string
	for {
		line, err := s.line()
		if err != nil {
			return sseEvent{}, err
		}
		if line == "" {
			if data == "" {
				event = ""
				continue
			}
			return sseEvent{s.id, cmp.Or(event, "message"), strings.TrimSuffix(data, "\n")}, nil
		}
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "":
			s.comments = append(s.comments, value)
		case "event":
			event = value
		case "data":
			data += value + "\n"
		case "id":
			if !strings.Contains(value, "\x00") {
				s.id = value
			}
		case "retry":
			if strings.Trim(value, "0123456789") == "" {
				s.retries = append(s.retries, value)
			}
		}
	}
}

// sseWritten returns what write sends, the header aside.
func sseWritten(t *testing.T, write func(s *conduit.SSEStream) error) string {
	t.Helper()
	rec := httptest.NewRecorder()
	streamHandler(t, conduit.NewSSEStream, write).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
	return rec.Body.String()
}

func TestSSEFormat(t *testing.T) {
	for _, test := range []struct {
		event conduit.SSEEvent
		want  string
	}{
		{conduit.SSEEvent{}, "data:\n\n"},
		{conduit.SSEEvent{ID: "7", Event: "tick", Data: "{}", Retry: 2500 * time.Millisecond}, "id: 7\nevent: tick\nretry: 2500\ndata: {}\n\n"},
		{conduit.SSEEvent{Retry: 3 * time.Second}, "retry: 3000\n\n"},
		{conduit.SSEEvent{Retry: time.Microsecond}, "retry: 1\n\n"},
		{conduit.SSEEvent{Event: "x", Retry: time.Millisecond}, "event: x\nretry: 1\ndata:\n\n"},
		{conduit.SSEEvent{Data: "a\rb\r\nc\nd"}, "data: a\ndata: b\ndata: c\ndata: d\n\n"},
		{conduit.SSEEvent{Data: "a\n\r"}, "data: a\ndata:\ndata:\n\n"},
		{conduit.SSEEvent{Data: "\n\ndata: injected\n\n"}, "data:\ndata:\ndata: data: injected\ndata:\ndata:\n\n"},
		{conduit.SSEEvent{ID: " 1 ", Event: " ü: ", Data: " leading"}, "id:  1 \nevent:  ü: \ndata:  leading\n\n"},
		{conduit.SSEEvent{ID: strings.Repeat("~", 256)}, "id: " + strings.Repeat("~", 256) + "\ndata:\n\n"},
	} {
		event := test.event
		if got := sseWritten(t, func(s *conduit.SSEStream) error { return s.WriteSSE(&event) }); got != test.want || event != test.event {
			t.Errorf("%+v was sent as %q, want %q, and is %+v then", test.event, got, test.want, event)
		}
	}
}

// What cannot be said in the format, or cannot come back as Last-Event-ID, is
// refused, by name, and leaves no trace.
func TestSSERefusesFields(t *testing.T) {
	b := conduit.NewSSEBroker(nil)
	for _, test := range []struct {
		event *conduit.SSEEvent
		name  string // in the error
	}{
		{nil, "nil"},
		{&conduit.SSEEvent{ID: "a\nb", Data: "x"}, "ID"},
		{&conduit.SSEEvent{ID: "\x7f"}, "ID"},
		{&conduit.SSEEvent{ID: "日本-1"}, "ID"},
		{&conduit.SSEEvent{ID: strings.Repeat("x", 257)}, "ID"},
		{&conduit.SSEEvent{Event: "a\nb", Data: "x"}, "Event"},
		{&conduit.SSEEvent{Event: "a\rdata: x", Data: "x"}, "Event"},
		{&conduit.SSEEvent{Retry: -1}, "Retry"},
	} {
		check := func(what string, err error) {
			if err == nil || !strings.HasPrefix(err.Error(), "conduit: ") || !strings.Contains(err.Error(), test.name) {
				t.Errorf("%s %+v: %v, want an error that names %s", what, test.event, err, test.name)
			}
		}
		got := sseWritten(t, func(s *conduit.SSEStream) error {
			check("WriteSSE", s.WriteSSE(test.event))
			events := make(chan *conduit.SSEEvent, 3)
			events <- &conduit.SSEEvent{Data: "before"}
			events <- test.event
			events <- &conduit.SSEEvent{Data: "after"}
			check("Serve", s.Serve(events))
			if len(events) != 1 {
				t.Errorf("%d events are left, want the one that came after", len(events))
			}
			return s.WriteSSE(&conduit.SSEEvent{Data: "usable"})
		})
		if got != "data: before\n\ndata: usable\n\n" {
			t.Errorf("%+v: the stream was %q", test.event, got)
		}
		check("Publish", b.Publish(test.event))
	}

	sseWritten(t, func(s *conduit.SSEStream) error {
		if err := s.Serve(nil); err == nil || !strings.Contains(err.Error(), "channel is nil") {
			t.Errorf("Serve(nil) = %v, want an error", err)
		}
		return nil
	})
}

// A comment cannot become anything else.
func TestSSEComment(t *testing.T) {
	for text, want := range map[string]string{
		"":                                ":\n\n",
		"a\r\ndata: injected\r\n\r\n":     ": a\n: data: injected\n:\n:\n\n",
		"\n\rretry: 10\n\ndata: injected": ":\n:\n: retry: 10\n:\n: data: injected\n\n",
	} {
		got := sseWritten(t, func(s *conduit.SSEStream) error { return s.Comment(text) })
		if got != want {
			t.Errorf("%q was sent as %q, want %q", text, got, want)
		}
	}
}

// The header is there before there is any event, and nobody compresses it.
func TestSSEHeaderGoesOutAtOnce(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		for _, chain := range streamChains {
			responded := make(chan struct{})
			_, client, url := streamBubble(t, p, conduit.Config{Handler: chain.mw(streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
				<-responded
				return nil
			}))})
			res, _ := streamOpen(t, client, url, "Accept-Encoding", "gzip, br")
			close(responded)
			body, err := io.ReadAll(res.Body)
			if coding := res.Header.Get("Content-Encoding"); coding != "" || len(body) != 0 || err != nil {
				t.Errorf("%s: got %q as %q, %v, want nothing", chain.name, body, coding, err)
			}
		}
	})
}

func TestSSELastEventID(t *testing.T) {
	for _, test := range []struct{ query, field, want string }{
		{"", "", ""},
		{"", "42", "42"},
		{"?lastEventId=4%202&x=y", "", "4 2"},
		{"?lastEventId=old", "new", "new"},
	} {
		r := httptest.NewRequest("GET", "/"+test.query, nil)
		r.Header.Set("Last-Event-ID", test.field)
		s, err := conduit.NewSSEStream(httptest.NewRecorder(), r)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.LastEventID(); got != test.want {
			t.Errorf("query %q, field %q: got %q, want %q", test.query, test.field, got, test.want)
		}
	}
}

// There is nothing to respond with once the header may be out.
func TestSSEHandlerWhoseHeaderFailsRespondsOnce(t *testing.T) {
	var log logBuffer
	h := conduit.Timeout(time.Minute)(conduit.SSEHandler(func(*conduit.SSEStream, *http.Request) error {
		t.Error("serve is called")
		return nil
	}))
	url := serve(t, newServer(t, &conduit.Config{Logger: log.logger(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(flushErrorWriter{w, errors.New("broken pipe")}, r)
	})}))
	if got := get(t, newClient(t, &http.Transport{}), url); got.body != "" {
		t.Errorf("%d %q, want nothing of a second response", got.status, got.body)
	}
	if lines := log.find("superfluous WriteHeader"); len(lines) != 0 {
		t.Errorf("a second response: %v", lines)
	}
}

// A comment comes 15 seconds after whatever was written last, until Serve ends,
// which it does with its events, and with no retry.
func TestSSEHeartbeats(t *testing.T) {
	serves := func(t *testing.T, events chan *conduit.SSEEvent) map[string]http.Handler {
		b := conduit.NewSSEBroker(nil)
		return map[string]http.Handler{
			"Serve": streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
				defer time.Sleep(time.Minute)
				return s.Serve(events)
			}),
			"SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) (err error) {
				for e := range events {
					err = errors.Join(err, s.WriteSSE(e))
				}
				return err
			}),
			"Serve in SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error { return s.Serve(events) }),
			"SSEBroker": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				go func() {
					defer b.Close()
					for e := range events {
						b.Publish(e)
					}
				}()
				b.ServeHTTP(w, r)
			}),
		}
	}
	for _, name := range []string{"Serve", "SSEHandler", "Serve in SSEHandler", "SSEBroker"} {
		t.Run(name, func(t *testing.T) {
			eachBubble(t, func(t *testing.T, p protocol) {
				events := make(chan *conduit.SSEEvent)
				h := conduit.Chain(conduit.Timeout(5*time.Second), conduit.Compression())(serves(t, events)[name])
				_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: 5 * time.Second, Handler: h})
				start := time.Now()
				go func() {
					defer close(events)
					for _, pause := range []time.Duration{10, 32} {
						time.Sleep(pause * time.Second)
						events <- &conduit.SSEEvent{Data: "event"}
					}
					time.Sleep(50 * time.Second)
				}()
				res, _ := streamOpen(t, client, url)
				in := newSSEReader(res.Body)
				var got []string
				for {
					line, err := in.line()
					if err != nil {
						break
					}
					if line != "" && !strings.HasPrefix(line, "id") {
						got = append(got, fmt.Sprint(time.Since(start).Seconds(), line[:1]))
					}
				}
				want := []string{"10d", "25:", "40:", "42d", "57:", "72:", "87:"}
				if name == "SSEBroker" {
					want = append(want, "92r") // when to come back
				}
				if !slices.Equal(got, want) {
					t.Errorf("got %q (seconds, d for data, r for retry), want %q", got, want)
				}
			})
		})
	}
}

// A drain ends event streams cleanly, those that are opened during it too, and
// says when to come back.
func TestSSEEndsAtADrain(t *testing.T) {
	for name, h := range map[string]http.Handler{
		"Serve": streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
			return s.Serve(make(chan *conduit.SSEEvent))
		}),
		"SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			<-s.Done()
			return nil
		}),
		"Serve in SSEHandler": conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			return s.Serve(make(chan *conduit.SSEEvent))
		}),
		"SSEBroker": sseBroker,
	} {
		for _, early := range []bool{false, true} {
			t.Run(fmt.Sprint(name, "/early=", early), func(t *testing.T) {
				eachBubble(t, func(t *testing.T, p protocol) {
					var logs logBuffer
					chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression())
					srv, client, url := streamBubble(t, p, conduit.Config{Handler: chain(h), Logger: logs.logger()})
					if early {
						srv.Drain()
					} else {
						time.AfterFunc(time.Second, srv.Drain)
					}
					res, _ := streamOpen(t, client, url)
					s, events, err := sseReadAll(res.Body)
					if err != nil || len(events) != 0 || !sseRetries(s.retries) {
						t.Errorf("got %q, %v; want a clean end with one retry of 2 to 10 s", s.lines, err)
					}
					synctest.Wait()
					if lines := logs.find("request"); len(lines) != 1 || lines[0]["aborted"] != nil || len(logs.find("stream failed")) != 0 {
						t.Errorf("logged %s, want a clean end", logs.String())
					}
				})
			})
		}
	}
}

// sseRetries reports whether there is one, of two to ten seconds.
func sseRetries(retries []string) bool {
	if len(retries) != 1 {
		return false
	}
	ms, err := strconv.Atoi(retries[0])
	return err == nil && 2000 <= ms && ms <= 10000
}

// Browsers that are sent away together come back over the whole of eight seconds.
func TestSSERetriesAreSpread(t *testing.T) {
	b := conduit.NewSSEBroker(nil)
	b.Close()
	counts := make([]int, 8)
	for range 200 {
		rec := httptest.NewRecorder()
		b.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		s, _, err := sseReadAll(rec.Body)
		if err != nil || !sseRetries(s.retries) {
			t.Fatalf("got %q, %v", s.lines, err)
		}
		ms, _ := strconv.Atoi(s.retries[0])
		counts[(ms-2000)*8/8001]++
	}
	if slices.Min(counts) < 5 || slices.Max(counts) > 60 { // 25 on the average
		t.Errorf("retries by the second: %v of 200", counts)
	}
}

// Before Serve ends at a drain it takes what is ready, and a channel that is never
// empty does not keep it from ending.
func TestSSEServeTakesWhatIsReadyAtADrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := make(chan *conduit.SSEEvent, 100)
		text := strings.Repeat("x", 4<<10)
		fill := func() {
			for len(events) < cap(events) {
				events <- &conduit.SSEEvent{Data: text}
			}
		}
		fill()
		srv, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: streamHandler(t, conduit.NewSSEStream, func(s *conduit.SSEStream) error {
			return s.Serve(events)
		})})
		s, _ := sseSubscribe(t, client, url)
		synctest.Wait() // the first batch waits for the client
		fill()
		srv.Drain()
		synctest.Wait()
		n := sseRest(t, s, func(_ int, data string) bool {
			fill() // never empty
			return data == text
		})
		if n < cap(events) || n > 10*cap(events) {
			t.Errorf("%d events came, of %d that were ready", n, cap(events))
		}
	})
}

// A goroutine that SSEHandler's serve has abandoned writes nothing, nor does a
// heartbeat.
func TestSSEHandlerEndsItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := make(chan error, 1)
		rec := httptest.NewRecorder() // whose request does not end
		conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
			go func() {
				<-s.Done()
				late <- s.WriteSSE(&conduit.SSEEvent{Data: "late"})
			}()
			return s.WriteSSE(&conduit.SSEEvent{Data: "in time"})
		}).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		if err := <-late; err == nil {
			t.Error("a late write returned nil")
		}
		time.Sleep(time.Minute)
		if got := rec.Body.String(); got != "data: in time\n\n" {
			t.Errorf("got %q", got)
		}
	})
}

// Events and comments come from different goroutines.
func TestSSEWritersSideBySide(t *testing.T) {
	const writers, each = 4, 50
	url := serve(t, newServer(t, &conduit.Config{Handler: conduit.SSEHandler(func(s *conduit.SSEStream, r *http.Request) error {
		var wg sync.WaitGroup
		events := make(chan *conduit.SSEEvent)
		for i := range writers {
			wg.Go(func() {
				for j := range each {
					e := &conduit.SSEEvent{Data: fmt.Sprint(i, "\n", j)}
					if i%2 == 0 {
						events <- e
					} else if err := s.WriteSSE(e); err != nil {
						t.Error(err)
					}
					if err := s.Comment("comment"); err != nil {
						t.Error(err)
					}
				}
			})
		}
		go func() {
			wg.Wait()
			close(events)
		}()
		return s.Serve(events)
	})}))
	s, events, err := sseReadAll(strings.NewReader(get(t, http1Protocol.client(t), url).body))
	slices.SortFunc(events, func(a, b sseEvent) int { return strings.Compare(a.data, b.data) })
	if n := len(slices.Compact(events)); err != nil || n != writers*each || len(s.comments) != writers*each {
		t.Errorf("%d different events, %d comments, %v, want %d of each", n, len(s.comments), err, writers*each)
	}
}

// sseSubscribe opens an event stream and returns what reads it.
func sseSubscribe(t *testing.T, client *http.Client, url string, header ...string) (*sseReader, context.CancelFunc) {
	t.Helper()
	res, cancel := streamOpen(t, client, url, header...)
	if ct := res.Header.Get("Content-Type"); res.StatusCode != 200 || ct != "text/event-stream" {
		t.Errorf("got %d of type %q, want an event stream", res.StatusCode, ct)
	}
	return newSSEReader(res.Body), cancel
}

// sseWant reads the next events, and compares what they are: the data, behind the
// name and a colon for those that have one.
func sseWant(t *testing.T, s *sseReader, want ...string) {
	t.Helper()
	for i, want := range want {
		e, err := s.next()
		if got := strings.TrimPrefix(e.event+":"+e.data, "message:"); err != nil || got != want {
			t.Fatalf("event %d is %.40q, %v, want %.40q", i, got, err, want)
		}
	}
}

// sseRest reads to the end of a stream, which is to be clean, with one retry, and
// returns how many events there were. Each is to be as check has it.
func sseRest(t *testing.T, s *sseReader, check func(n int, data string) bool) int {
	t.Helper()
	for n := 0; ; n++ {
		e, err := s.next()
		if err == io.EOF {
			if !sseRetries(s.retries) {
				t.Errorf("retries %q after %d events, want one of 2 to 10 s", s.retries, n)
			}
			return n
		}
		if err != nil || n == 2000 || !check(n, e.data) {
			t.Fatalf("event %d is %.20q, %v", n, e.data, err)
		}
	}
}

// sseBroker is a broker for each request: one must not be another bubble's.
var sseBroker = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { conduit.NewSSEBroker(nil).ServeHTTP(w, r) })

func ssePublish(t *testing.T, b *conduit.SSEBroker, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if err := b.Publish(&conduit.SSEEvent{Data: text}); err != nil {
			t.Errorf("Publish(%q) = %v", text, err)
		}
	}
}

func TestSSEBrokerReachesEverybody(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		b := new(conduit.SSEBroker) // the zero value works
		chain := conduit.Chain(foreign, conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(5*time.Second), conduit.Compression(), foreign)
		_, client, url := streamBubble(t, p, conduit.Config{WriteTimeout: 5 * time.Second, Handler: chain(b)})
		ssePublish(t, b, "before anybody came")
		one, cancel := sseSubscribe(t, client, url)
		two, _ := sseSubscribe(t, client, url) // whoever has the header misses nothing
		if n := b.Clients(); n != 2 {
			t.Errorf("%d clients, want 2", n)
		}
		event := &conduit.SSEEvent{Event: "tick", Data: "a\nb"}
		if err := b.Publish(event); err != nil {
			t.Error(err)
		}
		event.Data = "changed after Publish"
		ssePublish(t, b, "second")
		for _, s := range []*sseReader{one, two} {
			sseWant(t, s, "tick:a\nb", "second")
		}
		time.Sleep(14 * time.Second) // beyond the timeouts, before a heartbeat that nobody reads
		cancel()
		synctest.Wait()
		if n := b.Clients(); n != 1 {
			t.Errorf("%d clients after one has disconnected, want 1", n)
		}
		// Retry alone is no event: it has no ID, and pages do not see it.
		if err := b.Publish(&conduit.SSEEvent{Retry: time.Minute}); err != nil {
			t.Error(err)
		}
		ssePublish(t, b, "third")
		sseWant(t, two, "third")
		if !slices.Equal(two.retries, []string{"60000"}) {
			t.Errorf("retries %q, want the one that was published", two.retries)
		}

		// Close ends the others, and nobody can publish any more.
		if err := errors.Join(b.Close(), b.Close()); err != nil {
			t.Error(err)
		}
		if e, err := two.next(); err != io.EOF || !sseRetries(two.retries[1:]) {
			t.Errorf("at Close: %q, %v, retries %q; want a clean end with one retry", e, err, two.retries)
		}
		synctest.Wait()
		if err := b.Publish(&conduit.SSEEvent{Data: "late"}); err == nil || b.Clients() != 0 {
			t.Errorf("Publish after Close = %v, with %d clients", err, b.Clients())
		}
		late, _ := sseSubscribe(t, client, url, "Last-Event-ID", "x")
		if e, err := late.next(); err != io.EOF || !sseRetries(late.retries) {
			t.Errorf("after Close: %q, %v, retries %q; want a clean end with one retry", e, err, late.retries)
		}
	})
}

// A client that comes back gets what it has missed, also one that was disconnected
// before its first event. A gap has no ID, comes first, and does not come again.
func TestSSEBrokerReplays(t *testing.T) {
	for _, test := range []struct {
		name    string
		replay  int
		before  []string // published before the client comes
		seen    []string // published while it is there
		away    []string // published while it is away
		id      string   // that it comes back with, if not the one that it was told
		restart bool     // and the broker is another one when it comes back
		want    []string // what it gets then, before "live"
	}{
		{name: "missed nothing, nothing there yet"},
		{name: "missed nothing", before: []string{"old"}},
		{name: "missed one", before: []string{"old"}, away: []string{"missed"}, want: []string{"missed"}},
		{name: "missed one after a retry", before: []string{"old", "retry"}, away: []string{"missed"}, want: []string{"missed"}},
		{name: "missed the first there is", away: []string{"1", "2"}, want: []string{"1", "2"}},
		{name: "missed one of the broker's ID", seen: []string{"1", "2"}, away: []string{"3"}, want: []string{"3"}},
		{name: "missed one after an ID with blanks", seen: []string{"1", "own"}, away: []string{"3"}, want: []string{"3"}},
		{name: "saw an ID with blanks last", seen: []string{"1", "own"}},
		{name: "missed as much as is kept", replay: 2, seen: []string{"1"}, away: []string{"2", "3"}, want: []string{"gap:", "2", "3"}},
		{name: "missed less than is kept", replay: 2, seen: []string{"1"}, away: []string{"2"}, want: []string{"2"}},
		{name: "unknown", seen: []string{"1"}, away: []string{"2"}, id: "unknown", want: []string{"gap:", "1", "2"}},
		{name: "restarted", before: []string{"old"}, restart: true, want: []string{"gap:"}},
		{name: "restarted, and more came", seen: []string{"1"}, away: []string{"2"}, restart: true, want: []string{"gap:", "2"}},
		{name: "no replay, missed nothing", replay: -1, before: []string{"old"}},
		{name: "no replay, missed one", replay: -1, before: []string{"old"}, away: []string{"missed"}, want: []string{"gap:"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachBubble(t, func(t *testing.T, p protocol) {
				cfg := &conduit.SSEBrokerConfig{Replay: test.replay, Queue: 10}
				var current atomic.Pointer[conduit.SSEBroker]
				current.Store(conduit.NewSSEBroker(cfg))
				_, client, address := streamBubble(t, p, conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					current.Load().ServeHTTP(w, r)
				})})
				publish := func(texts ...string) {
					for _, text := range texts {
						e := &conduit.SSEEvent{Data: text}
						switch text {
						case "own":
							e.ID = " own "
						case "retry": // alone, which has no ID
							e = &conduit.SSEEvent{Retry: time.Minute}
						}
						if err := current.Load().Publish(e); err != nil {
							t.Errorf("Publish(%q) = %v", text, err)
						}
					}
				}
				publish(test.before...)
				s, leave := sseSubscribe(t, client, address)
				for line := "-"; line != ""; { // the ID alone
					line, _ = s.line()
					s.id = cmp.Or(strings.TrimPrefix(line, "id: "), s.id)
				}
				for _, text := range test.seen {
					publish(text)
					last := s.id
					sseWant(t, s, text)
					_, number, _ := strings.Cut(s.id, "-")
					if _, err := strconv.ParseUint(number, 10, 64); text != "own" && (err != nil || s.id == last) || text == "own" && s.id != " own " {
						t.Errorf("event %q has the ID %q", text, s.id)
					}
				}
				leave()
				synctest.Wait()
				if test.restart {
					current.Store(conduit.NewSSEBroker(cfg))
				}
				publish(test.away...)

				id, want := cmp.Or(test.id, s.id), test.want
				for range 2 {
					inField, leaveField := sseSubscribe(t, client, address, "Last-Event-ID", id)
					inQuery, leaveQuery := sseSubscribe(t, client, address+"?lastEventId="+url.QueryEscape(id))
					synctest.Wait()
					publish("live")
					for _, s := range []*sseReader{inField, inQuery} {
						sseWant(t, s, append(slices.Clip(want), "live")...)
						if len(want) > 0 && want[0] == "gap:" && strings.Join(s.lines[:3], "|") != "event: gap|data:|" {
							t.Errorf("got %q, want no more than a gap first", s.lines)
						}
					}
					leaveField()
					leaveQuery()
					synctest.Wait()
					id, want = inField.id, nil
				}
			})
		})
	}
}

// A client may lag by Queue events, and by no more: it is told of the gap, and its
// response ends. It holds up neither the publisher nor the others.
func TestSSEBrokerQueue(t *testing.T) {
	for _, test := range []struct {
		name string
		cfg  conduit.SSEBrokerConfig
		lag  int // that is allowed
	}{
		{"Queue", conduit.SSEBrokerConfig{Replay: 100, Queue: 10}, 10},
		{"more than Replay", conduit.SSEBrokerConfig{Replay: 10, Queue: 100}, 100},
		{"Replay by default", conduit.SSEBrokerConfig{Replay: 10}, 10},
		{"the default", conduit.SSEBrokerConfig{}, 256},
		{"no Replay", conduit.SSEBrokerConfig{Replay: -1}, 256},
	} {
		for beyond := range 2 {
			t.Run(fmt.Sprint(test.name, "/beyond=", beyond), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := conduit.NewSSEBroker(&test.cfg)
					_, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: b})
					slow, _ := sseSubscribe(t, client, url)
					slow.line() // of the ID to come back with
					quick, _ := sseSubscribe(t, client, url)
					want := []string{strings.Repeat("x", 20<<10)} // on which the slow one waits
					for i := range test.lag + beyond {
						want = append(want, strconv.Itoa(i))
					}
					for i, text := range want {
						ssePublish(t, b, text)
						sseWant(t, quick, text)
						if i == 0 {
							time.Sleep(time.Second)
						}
					}
					b.Close() // once the client has what was published
					if beyond > 0 {
						want = []string{want[0], "gap:"}
					}
					sseWant(t, slow, want...)
					if e, err := slow.next(); err != io.EOF {
						t.Errorf("then %q, %v", e, err)
					}
				})
			})
		}
	}
}

func TestSSEBrokerMaxClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{MaxClients: 2})
		_, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: b})
		_, leave := sseSubscribe(t, client, url)
		two, _ := sseSubscribe(t, client, url)
		got := get(t, client, url)
		if after, err := strconv.Atoi(got.header.Get("Retry-After")); got.status != 503 || err != nil || after < 1 || b.Clients() != 2 {
			t.Errorf("the third got %d, Retry-After %q, of %d clients; want 503", got.status, got.header.Get("Retry-After"), b.Clients())
		}
		leave()
		synctest.Wait()
		three, _ := sseSubscribe(t, client, url)
		synctest.Wait()
		ssePublish(t, b, "room")
		sseWant(t, two, "room")
		sseWant(t, three, "room")
	})
}

func TestSSEBrokerRefusesOtherMethods(t *testing.T) {
	for _, method := range []string{"POST", "OPTIONS"} {
		rec := httptest.NewRecorder()
		sseBroker(rec, httptest.NewRequest(method, "/", nil))
		if allow := rec.Header().Get("Allow"); rec.Code != 405 || allow != "GET, HEAD" {
			t.Errorf("%s: got %d, Allow %q, want 405 and GET, HEAD", method, rec.Code, allow)
		}
	}
}

// Clients come and go while somebody publishes.
func TestSSEBrokerRaces(t *testing.T) {
	b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: 8, Queue: 4})
	url := serve(t, newServer(t, &conduit.Config{Handler: conduit.Chain(conduit.Logging(), conduit.Timeout(time.Minute), conduit.Compression())(b)}))
	client := http1Protocol.client(t)
	var clients, publishers sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			var id string
			for range 5 {
				s, leave := sseSubscribe(t, client, url, "Last-Event-ID", id)
				for range 20 {
					e, err := s.next()
					if err == io.EOF {
						break // it has lagged
					}
					if err != nil || e.event != "message" && e.event != "gap" {
						t.Errorf("got %q, %v", e, err)
					}
					id = e.id
				}
				leave()
			}
		})
	}
	for range 2 {
		publishers.Go(func() {
			for b.Publish(&conduit.SSEEvent{Data: "x"}) == nil {
			}
		})
	}
	clients.Wait()
	b.Close()
	publishers.Wait()
}

// A client that takes a long replay slowly does not hold up a drain.
func TestSSEBrokerEndsAReplayAtADrain(t *testing.T) {
	eachBubble(t, func(t *testing.T, p protocol) {
		b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: 1000})
		srv, client, url := streamBubble(t, p, conduit.Config{Handler: b})
		for i := range 1000 {
			ssePublish(t, b, fmt.Sprint(i, strings.Repeat("x", 20<<10)))
		}
		s, _ := sseSubscribe(t, client, url, "Last-Event-ID", "old")
		synctest.Wait()
		srv.Drain()
		synctest.Wait()
		sseWant(t, s, "gap:")
		got := sseRest(t, s, func(n int, data string) bool { return strings.HasPrefix(data, fmt.Sprint(n, "x")) })
		if got > 400 || p.http1 && got > 3 { // HTTP/2 has 4 MB under way
			t.Errorf("%d events after the drain", got)
		}
	})
}

// At a drain a client gets what is published by then, however much follows.
func TestSSEBrokerDrainEndsABusyClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Queue: 1 << 20})
		srv, client, url := streamBubble(t, http1Protocol, conduit.Config{Handler: b})
		s, _ := sseSubscribe(t, client, url)
		time.Sleep(time.Second)
		text := strings.Repeat("x", 20<<10)
		ssePublish(t, b, text, text, text)
		synctest.Wait()
		srv.Drain()
		if n := sseRest(t, s, func(int, string) bool { ssePublish(t, b, text); return true }); n < 3 {
			t.Errorf("%d events, want the three that were published before", n)
		}
	})
}

// FuzzSSEEvent writes an event, which must come out as it was or be refused.
func FuzzSSEEvent(f *testing.F) {
	f.Add("", "", "", int64(0))
	f.Add("1", "tick", "data", int64(time.Second))
	f.Add("", "", "a\nb\rc\r\nd\n", int64(0))
	f.Add("a\nb", "", "x", int64(0))
	f.Add("\x10", "0", "0", int64(1000000060))
	f.Add("\x7f", "", "x", int64(0))
	f.Add("", "e\rdata: x", "x", int64(0))
	f.Add(" ", " ", " ", int64(-1))
	f.Add("", "", "", int64(10*time.Second))
	f.Add("id", "event", "\n\nid: injected\ndata: x\n\n", int64(0))
	f.Add("\ufeff", ":", "\ufeff\u2028\u0085", int64(1500*time.Microsecond))
	f.Fuzz(func(t *testing.T, id, event, data string, retry int64) {
		e := conduit.SSEEvent{ID: id, Event: event, Data: data, Retry: time.Duration(retry)}
		var err error
		written := sseWritten(t, func(s *conduit.SSEStream) error {
			err = s.WriteSSE(&e)
			return s.WriteSSE(&conduit.SSEEvent{Data: "next"})
		})
		in, events, readErr := sseReadAll(strings.NewReader(written))
		unfit := func(c rune) bool { return c < ' ' || c > '~' }
		invalid := len(id) > 256 || strings.ContainsFunc(id, unfit) || strings.ContainsAny(event, "\r\n") || retry < 0
		var want []sseEvent
		if invalid {
			id, retry = "", 0
		} else if id != "" || event != "" || data != "" || retry == 0 {
			want = append(want, sseEvent{id, cmp.Or(event, "message"), strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(data)})
		}
		want = append(want, sseEvent{id, "message", "next"})
		if invalid != (err != nil) || readErr != nil || !slices.Equal(events, want) || len(in.comments) > 0 {
			t.Errorf("%+q, invalid %t: %v, written as %q, which is %q, %v; want %q", e, invalid, err, written, events, readErr, want)
		}
		retries := ""
		if retry > 0 {
			retries = strconv.FormatInt(max(retry/1e6, 1), 10)
		}
		if got := strings.Join(in.retries, ","); got != retries {
			t.Errorf("%+q was written as %q, with the retries %q, want %q", e, written, got, retries)
		}
	})
}

// FuzzLastEventID comes back with any id to a broker that knows three.
func FuzzLastEventID(f *testing.F) {
	for _, id := range []string{"", "one", "two", "four", "One", " one", "one ", "\x00", "one\x00", "one\ndata: x", "-1", "00000000-1", "18446744073709551616", strings.Repeat("9", 1000), "\xff"} {
		f.Add(id, false)
		f.Add(id, true)
	}
	f.Fuzz(func(t *testing.T, id string, query bool) {
		b := conduit.NewSSEBroker(&conduit.SSEBrokerConfig{Replay: 8})
		known := []string{"one", "two", "end"}
		for _, id := range known {
			if err := b.Publish(&conduit.SSEEvent{ID: id, Data: "data of " + id}); err != nil {
				t.Fatal(err)
			}
		}
		trimmed := strings.Trim(id, " ")
		if trimmed == "end" {
			return // it gets nothing
		}
		r := httptest.NewRequest("GET", "/", nil)
		if query {
			r.URL.RawQuery = "lastEventId=" + url.QueryEscape(id)
		} else {
			r.Header["Last-Event-Id"] = []string{id}
		}
		rec := httptest.NewRecorder()
		// Closed at the first event, the broker still sends what was published.
		b.ServeHTTP(streamFaultyWriter{rec, b.Close}, r)
		_, events, err := sseReadAll(rec.Body)
		var got []string
		for _, e := range events {
			got = append(got, strings.TrimPrefix(e.event+":"+e.data, "message:data of "))
		}
		want := append([]string{"gap:"}, known...)
		if i := slices.Index(known, trimmed); i >= 0 {
			want = known[i+1:]
		} else if trimmed == "" {
			want = nil
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: got %q, %v, want %q", id, got, err, want)
		}
	})
}

// Profiling

func TestProfilingConfigIsCheckedAndCopied(t *testing.T) {
	cfg := &conduit.ProfilingConfig{MaxDuration: -1, MutexFraction: -1, BlockRate: -1, FlightRecorder: -1}
	const errs = "conduit: MaxDuration: -1ns is negative\nconduit: MutexFraction: -1 is negative\nconduit: BlockRate: -1 is negative\nconduit: FlightRecorder: -1ns is negative"
	if p, err := conduit.NewProfiler(cfg); p != nil || err == nil || err.Error() != errs {
		t.Errorf("NewProfiler = %v, %v; want nil and\n%s", p, err, errs)
	}
	for _, addr := range []string{"", "127.0.0.1", ":no-such-service", "127.0.0.1:99999"} {
		srv, err := conduit.NewProfilingServer(addr, cfg)
		if srv != nil || err == nil || !strings.HasPrefix(err.Error(), "conduit: addr: ") || !strings.HasSuffix(err.Error(), "\n"+errs) {
			t.Errorf("NewProfilingServer(%q) = %v, %v; want nil, addr and\n%s", addr, srv, err, errs)
		}
	}
	profilingPanics(t, "conduit: mux: is nil", func() { conduit.EnableDefaultProfiling(nil) })

	cfg = &conduit.ProfilingConfig{MaxDuration: time.Minute}
	url := profilingServe(t, cfg)
	cfg.MaxDuration = time.Millisecond
	if r := get(t, http.DefaultClient, url+"mutex?seconds=0.01"); r.status != 200 {
		t.Errorf("after a change of the config: %d %q, want 200", r.status, r.body)
	}
}

// A pattern without a method conflicts with GET /, and one for symbol without a
// method with GET /debug/pprof/{name}.
func TestProfilingTouchesNoOtherRoutes(t *testing.T) {
	for _, pattern := range []string{"GET /", "/", "POST /", "GET /debug/pprof/{name}", "GET /debug/", "example.com/debug/pprof/", "/{any...}"} {
		mux := http.NewServeMux()
		mux.Handle(pattern, textHandler("own"))
		conduit.EnableDefaultProfiling(mux)
		for method, path := range map[string]string{"GET": "/debug/pprof/a/b", "POST": "/debug/pprof/symbol"} {
			if _, got := mux.Handler(httptest.NewRequest(method, "http://localhost"+path, nil)); !strings.HasPrefix(got, method+" /debug/pprof/") {
				t.Errorf("beside %q: %s %s goes to %q", pattern, method, path, got)
			}
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/vars"} {
		if _, pattern := http.DefaultServeMux.Handler(httptest.NewRequest("GET", path, nil)); pattern != "" {
			t.Errorf("http.DefaultServeMux has %q", pattern)
		}
	}
}

func TestProfilingEndpoints(t *testing.T) {
	custom := pprof.Lookup("example.com/conduit_test/a <b>")
	if custom == nil { // -count runs the test again in one process
		custom = pprof.NewProfile("example.com/conduit_test/a <b>")
	}
	custom.Add(t, 0)
	defer custom.Remove(t)
	url := profilingServe(t, &conduit.ProfilingConfig{MaxDuration: 100 * time.Millisecond})
	pc, _, _, _ := runtime.Caller(0)
	symbols := fmt.Sprintf("0x1+%#x+zzz", pc)
	named := fmt.Sprintf("num_symbols: 1\n%#x example.com/conduit_test.TestProfilingEndpoints\n", pc)
	const text, binary, page, gzipped = "text/plain; charset=utf-8", "application/octet-stream", "text/html; charset=utf-8", "\x1f\x8b"
	for _, tt := range []struct {
		method, path, body string
		status             int
		contentType, want  string // what is in the body
	}{
		{"GET", "", "", 200, page, `href="heap?debug=1"`},
		{"GET", "live", "", 200, page, "<title>Live</title>"},
		{"GET", "stats", "", 200, "application/json", `"goroutines":`},
		{"GET", "cmdline", "", 200, text, strings.Join(os.Args, "\x00")},
		{"GET", "heap", "", 200, binary, gzipped},
		{"GET", "heap?debug=1", "", 200, text, "heap profile:"},
		{"GET", "heap?gc=1&debug=0", "", 200, binary, gzipped},
		{"GET", "goroutine?debug=1", "", 200, text, "goroutine profile: total"},
		{"GET", "mutex?seconds=0.01&debug=1", "", 200, text, "--- mutex:"},
		{"GET", "block?seconds=0.01&debug=1", "", 200, text, "--- contention:"},
		{"GET", "example.com/conduit_test/a%20%3Cb%3E?debug=1", "", 200, text, "profile: total 1"},
		{"GET", "profile?seconds=0.01", "", 200, binary, gzipped},
		{"GET", "trace?seconds=0.01", "", 200, binary, "go 1."},
		{"GET", "trace?seconds=", "", 200, binary, "go 1."},
		{"GET", "symbol?" + symbols, "", 200, text, named},
		{"POST", "symbol", symbols + "\n", 200, text, named},

		{"GET", "nothing", "", 404, text, `unknown profile "nothing"`},
		{"GET", "../other", "", 404, text, "unknown profile"},
		{"GET", "profile?seconds=2.5", "", 400, text, "seconds: 2.5 is more than 100ms"},
		{"GET", "profile?seconds=1e400", "", 400, text, "seconds:"},
		{"GET", "profile?seconds=-1", "", 400, text, `seconds: "-1" is not a positive number`},
		{"GET", "profile?seconds=NaN", "", 400, text, "seconds:"},
		{"GET", "profile?seconds=ten", "", 400, text, `seconds: "ten" is not a positive number`},
		{"GET", "profile?seconds=%zz", "", 400, text, "invalid URL escape"},
		{"GET", "heap?seconds=0.1", "", 400, text, "go tool pprof -base"},
		{"GET", "goroutine?seconds=0.1", "", 400, text, "go tool pprof -base"},
		{"GET", "heap?debug=x", "", 400, text, `debug: "x" is not a number`},
		{"GET", "stats?format=xml", "", 400, text, `format: "xml"`},
		{"GET", "flight", "", 400, text, "set ProfilingConfig.FlightRecorder"},
		{"POST", "symbol", strings.Repeat("0x1+", 1<<19), 413, text, "symbol: "},
		{"POST", "heap", "", 405, text, ""},
		{"PUT", "symbol", "", 405, text, ""},
		{"get", "heap", "", 405, text, ""}, // methods are case-sensitive
	} {
		req, err := http.NewRequest(tt.method, url+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		r := do(t, http.DefaultClient, req)
		what := tt.method + " " + tt.path
		if r.status != tt.status || !strings.Contains(r.body, tt.want) {
			t.Errorf("%s: %d %.300q, want %d and %q", what, r.status, r.body, tt.status, tt.want)
		}
		name, _, _ := strings.Cut(tt.path, "?")
		disposition := ""
		if tt.contentType == binary {
			disposition = fmt.Sprintf("attachment; filename=%q", name)
		}
		shown := "" // go tool pprof shows the text of an error that says so
		if tt.status >= 400 && tt.status != 405 {
			shown = "1"
		}
		for field, want := range map[string]string{
			"Content-Type": tt.contentType, "Content-Disposition": disposition, "X-Go-Pprof": shown,
			"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
		} {
			if got := strings.Join(r.header[field], ", "); got != want {
				t.Errorf("%s: %s %q, want %q", what, field, got, want)
			}
		}
	}
	before := conduit.ReadRuntimeStats().GCCyclesTotal
	get(t, http.DefaultClient, url+"heap?gc=1")
	if conduit.ReadRuntimeStats().GCCyclesTotal == before {
		t.Error("?gc=1 has collected nothing")
	}
}

// On HTTP/2 a flush would end the response to HEAD, and nobody wants to wait for
// a profile that is not sent.
func TestProfilingRespondsToHeadAtOnce(t *testing.T) {
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})
	eachProtocol(t, func(t *testing.T, proto protocol) {
		var logs logBuffer
		url := proto.serve(t, proto.server(t, &conduit.Config{Handler: conduit.Logging()(p), Logger: logs.logger()})) + "/debug/pprof/"
		client := proto.client(t)
		client.Timeout = 20 * time.Second
		for _, path := range []string{"", "live", "stats", "cmdline", "symbol", "heap", "goroutine?debug=2", "flight", "profile?seconds=60", "trace?seconds=60", "mutex?seconds=60"} {
			req, _ := http.NewRequest("HEAD", url+path, nil)
			if r := do(t, client, req); r.status != 200 || r.body != "" || r.header.Get("Content-Type") == "" {
				t.Errorf("HEAD %s: %d %q %q", path, r.status, r.body, r.header)
			}
		}
		for _, line := range logs.lines() {
			if line["aborted"] != nil || line["level"] != "INFO" {
				t.Errorf("logged %v", line)
			}
		}
	})
}

func TestProfilingIsForThisMachine(t *testing.T) {
	var logs logBuffer
	slog.SetDefault(logs.logger())
	defer slog.SetDefault(slog.New(slog.DiscardHandler))
	p := profilingNew(t, nil)
	for _, tt := range []struct {
		minor                int // of HTTP/1.x
		remote, host, header string
		status               int
	}{
		{1, "127.0.0.1:1", "127.0.0.1:8080", "", 200},
		{1, "[::1]:1", "[::1]:8080", "", 200},
		{1, "[::ffff:127.0.0.1]:1", "localhost", "", 200},
		{1, "127.0.0.1:1", "LocalHost.:8080", "", 200},
		{1, "127.0.0.1:1", "localhost", "Sec-Fetch-Site: none", 200},
		{1, "127.0.0.1:1", "localhost", "X-Anything: 192.0.2.1", 200},

		{1, "192.0.2.1:1", "localhost", "", 403},
		{1, "0.0.0.0:1", "localhost", "", 403},
		{1, "127.0.0.1", "localhost", "", 403}, // as a middleware has it from a field
		{1, "localhost:1", "localhost", "", 403},
		{1, "", "localhost", "", 403},
		{1, "127.0.0.1:1", "evil.example:8080", "", 403},
		{1, "127.0.0.1:1", "localhost.evil.example", "", 403},
		{1, "127.0.0.1:1", "localhost:80.evil.example", "", 403},
		{1, "127.0.0.1:1", "192.0.2.1:8080", "", 403},
		{1, "127.0.0.1:1", "", "", 403},
		{1, "127.0.0.1:1", "localhost", "Sec-Fetch-Site: cross-site", 403},
		{1, "127.0.0.1:1", "localhost", "Forwarded: for=127.0.0.1", 403},
		{1, "127.0.0.1:1", "localhost", "X-Forwarded-For: 127.0.0.1", 403},
		{1, "127.0.0.1:1", "localhost", "x-forwarded-anything: ", 403},
		{1, "127.0.0.1:1", "localhost", "via: 1.1 proxy", 403},
		{1, "127.0.0.1:1", "localhost", "X-Real-IP: 127.0.0.1", 403},
		{1, "127.0.0.1:1", "localhost", "X-Client-IP: 127.0.0.1", 403},
		{1, "127.0.0.1:1", "localhost", "True-Client-IP: 127.0.0.1", 403},
		{1, "127.0.0.1:1", "localhost", "CF-Connecting-IP: 127.0.0.1", 403},
		{0, "127.0.0.1:1", "localhost", "", 403},                                                       // nginx's default
		{1, "127.0.0.1:1", "localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-User: ?1", 200},       // a link
		{1, "127.0.0.1:1", "localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: document", 403}, // a script that navigates
	} {
		for _, path := range []string{"", "live", "stats", "cmdline", "symbol", "heap", "profile?seconds=0.001", "flight", "nothing"} {
			text := fmt.Sprintf("GET /debug/pprof/%s HTTP/1.%d\r\nHost: %s\r\n%s\r\n\r\n", path, tt.minor, tt.host, tt.header)
			r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(text)))
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			r.RemoteAddr = tt.remote
			w := httptest.NewRecorder()
			before := len(logs.lines())
			p.ServeHTTP(w, r)
			lines := logs.lines()[before:]
			if refused := w.Code == 403; refused != (tt.status == 403) {
				t.Errorf("%q of %+v: %d, want %d", path, tt, w.Code, tt.status)
			} else if !refused && len(lines) > 0 {
				t.Errorf("%q of %+v: logged %v", path, tt, lines)
			} else if refused && (len(lines) != 1 || lines[0]["msg"] != "profiling refused" || lines[0]["remote"] != tt.remote || lines[0]["err"] == "") {
				t.Errorf("%q of %+v: logged %v, want one line", path, tt, lines)
			} else if refused && (w.Body.String() != "Forbidden\n" || len(w.Header()) != 3) {
				t.Errorf("%q of %+v: %q with %v tells too much", path, tt, w.Body, w.Header())
			}
		}
	}
}

func TestProfilingRespondsOverAUnixSocket(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, newServer(t, &conduit.Config{Handler: profilingNew(t, nil)}), l)
	local := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "c"), Net: "unix"} // named, it is not "@"
	client := newClient(t, &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.DialUnix("unix", local, l.Addr().(*net.UnixAddr))
	}})
	if r := get(t, client, "http://localhost/debug/pprof/"); r.status != 200 {
		t.Errorf("over a Unix socket: %d, want 200", r.status)
	}
}

func TestAllowAloneDecides(t *testing.T) {
	url := profilingServe(t, &conduit.ProfilingConfig{Allow: func(r *http.Request) bool { return r.Header.Get("Authorization") != "" }})
	req, _ := http.NewRequest("GET", url, nil)
	req.Host = "profiles.example"
	req.Header = http.Header{"Authorization": {"Bearer secret"}, "X-Forwarded-For": {"192.0.2.1"}}
	if got, want := [2]int{get(t, http.DefaultClient, url).status, do(t, http.DefaultClient, req).status}, [2]int{403, 200}; got != want {
		t.Errorf("from here but not allowed, from elsewhere but allowed: %d, want %d", got, want)
	}
}

func TestTimedProfilesOutliveTheTimeouts(t *testing.T) {
	p := profilingNew(t, &conduit.ProfilingConfig{Allow: func(*http.Request) bool { return true }}) // a pipe too
	record := func(t *testing.T, client *http.Client, url string) {
		t.Helper()
		if r := get(t, client, url); r.status != 200 || len(r.body) < 100 {
			t.Errorf("%s: %d with %d bytes, want 200 and a profile", url, r.status, len(r.body))
		}
	}
	whole := func(limit time.Duration) conduit.Middleware {
		return conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(limit), conduit.Compression())
	}
	for _, mw := range []conduit.Middleware{conduit.Chain(), conduit.FastTimeout(time.Second), whole(time.Second)} {
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			serveBubble(t, newServer(t, &conduit.Config{Handler: mw(p), WriteTimeout: time.Second}), l)
			for _, name := range []string{"mutex", "block"} {
				record(t, l.client(t), "http://localhost/debug/pprof/"+name+"?seconds=20")
			}
		})
	}

	const limit = 200 * time.Millisecond // the runtime records these two in real time
	var clients sync.WaitGroup
	for _, tt := range []struct {
		name  string
		proto protocol
		mw    conduit.Middleware
	}{
		{"profile", http1Protocol, whole(limit)},
		{"trace", h2cProtocol, whole(limit)},
		{"mutex", h2cProtocol, conduit.Chain()}, // HTTP/2 resets the stream when WriteTimeout has passed
	} {
		client := tt.proto.client(t)
		url := tt.proto.serve(t, tt.proto.server(t, &conduit.Config{Handler: tt.mw(p), WriteTimeout: limit}))
		clients.Go(func() { record(t, client, url+"/debug/pprof/"+tt.name+"?seconds=0.3") })
	}
	clients.Wait()
}

// A client that takes nothing is disconnected, one that is slow is not.
func TestProfileWaitsForASlowClientOnly(t *testing.T) {
	p := profilingNew(t, &conduit.ProfilingConfig{Allow: func(*http.Request) bool { return true }})
	pc, _, _, _ := runtime.Caller(0)
	text := strings.Repeat(fmt.Sprintf("%#x+", pc), 20_000) // the response is a megabyte
	for pause, whole := range map[time.Duration]bool{10 * time.Second: true, 20 * time.Second: false} {
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			serveBubble(t, newServer(t, &conduit.Config{Handler: p}), l)
			res, err := l.client(t).Post("http://localhost/debug/pprof/symbol", "", strings.NewReader(text))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var n int64
			for err == nil {
				time.Sleep(pause)
				var m int64
				m, err = io.CopyN(io.Discard, res.Body, 64<<10)
				n += m
			}
			if (n == res.ContentLength) != whole {
				t.Errorf("64 KiB each %v: got %d bytes of %d, want all of them: %t", pause, n, res.ContentLength, whole)
			}
		})
	}
}

// A second one would be empty. It may begin when the client of the first has
// disconnected.
func TestSecondProfileAtTheSameTimeIsRefused(t *testing.T) {
	url := profilingServe(t, nil)
	for _, name := range []string{"profile", "trace"} {
		end := profilingRecord(t, url, name)
		r := get(t, http.DefaultClient, url+name+"?seconds=1")
		if r.status != http.StatusConflict || r.header.Get("X-Go-Pprof") != "1" || !strings.HasPrefix(r.body, name+": ") || r.header.Get("Content-Disposition") != "" {
			t.Errorf("%s: %d %q, want 409 and the reason", name, r.status, r.body)
		}
		end()
		if r := get(t, http.DefaultClient, url+name+"?seconds=0.01"); r.status != 200 {
			t.Errorf("%s after the first: %d %q, want 200", name, r.status, r.body)
		}
	}
}

// A drain, or a context that ends, as other routers' timeouts have it, ends
// profiles early, and what there is by then is whole.
func TestProfilesEndEarly(t *testing.T) {
	p := profilingNew(t, nil)
	ctx, timeout := context.WithCancel(t.Context())
	timed := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.ServeHTTP(w, r.WithContext(ctx)) })
	drained := newServer(t, &conduit.Config{Handler: p})
	for url, end := range map[string]func() error{
		serve(t, newServer(t, &conduit.Config{Handler: timed})): func() error { timeout(); return nil },
		serve(t, drained): func() error { return drained.Shutdown(t.Context()) },
	} {
		var clients sync.WaitGroup
		for name, want := range map[string]string{"profile": "\x1f\x8b", "trace": "go 1.", "mutex": "\x1f\x8b", "block": "\x1f\x8b"} {
			clients.Go(func() {
				if r := get(t, http.DefaultClient, url+"/debug/pprof/"+name+"?seconds=250"); r.status != 200 || !strings.HasPrefix(r.body, want) || len(r.body) < 16 {
					t.Errorf("%s: %d with %d bytes, want 200 and a profile", name, r.status, len(r.body))
				}
			})
		}
		profilingEventually(t, "all are recording", func() bool { return profilingRecordings() == 4 })
		if err := end(); err != nil {
			t.Errorf("Shutdown = %v, want nil", err)
		}
		clients.Wait()
	}
}

func TestTraceEndsWhereItGrowsTooLarge(t *testing.T) {
	url := profilingServe(t, nil)
	got := make(chan response, 1)
	go func() { got <- get(t, http.DefaultClient, url+"trace?seconds=120") }()
	profilingEventually(t, "the trace begins", trace.IsEnabled)
	pad := strings.Repeat("x", 1000)
	for i := range 40_000 {
		trace.Log(t.Context(), "pad", strconv.Itoa(i)+pad) // each is kept, for it is another
	}
	r := <-got
	if size := len(r.body); r.status != 200 || size < 32<<20 || size > 64<<20 || !strings.HasPrefix(r.body, "go 1.") {
		t.Errorf("got %d, %d bytes: %.20q", r.status, size, r.body)
	}
}

// A mutex profile is scaled by the rate at the time it is written, so it must be
// written before that is off again.
func TestMutexAndBlockAreRecordedOnDemand(t *testing.T) {
	url := profilingServe(t, nil)
	defer profilingContend(t)()
	if rate := runtime.SetMutexProfileFraction(-1); rate != 0 {
		t.Fatalf("the mutex rate is %d before", rate)
	}
	for name, want := range map[string]string{"mutex": "sampling period=1\n", "block": "--- contention:"} {
		text := get(t, http.DefaultClient, url+name+"?seconds=0.1&debug=1").body
		if !strings.Contains(text, "profilingContend") || !strings.Contains(text, want) {
			t.Errorf("%s: no contention or no %q in\n%s", name, want, text)
		}
		packed, err := gzip.NewReader(strings.NewReader(get(t, http.DefaultClient, url+name+"?seconds=0.05").body))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if profile, err := io.ReadAll(packed); err != nil || !bytes.Contains(profile, []byte("profilingContend")) {
			t.Errorf("%s for go tool pprof: %v, and no contention in %d bytes", name, err, len(profile))
		}
	}
	profilingRatesAre(t, url, 0, false)
}

// The rates belong to the process: whoever holds one last decides, and when
// nobody does it is again what it was before.
func TestSamplingRates(t *testing.T) {
	defer runtime.SetMutexProfileFraction(0)
	defer profilingContend(t)()
	url := profilingServe(t, nil)
	other := profilingServe(t, nil)
	record := func(url string) (end func()) {
		mutex, block := profilingRecord(t, url, "mutex"), profilingRecord(t, url, "block")
		return func() { mutex(); block() }
	}

	runtime.SetMutexProfileFraction(7) // somebody else
	first := profilingNew(t, &conduit.ProfilingConfig{MutexFraction: 3, BlockRate: 1})
	profilingRatesAre(t, url, 3, true)
	record(url)()
	profilingRatesAre(t, url, 3, true) // left as it was
	second := profilingNew(t, &conduit.ProfilingConfig{MutexFraction: 5})
	first.Close()
	first.Close()
	profilingRatesAre(t, url, 5, false)
	second.Close()
	profilingRatesAre(t, url, 7, false)
	record(url)()
	profilingRatesAre(t, url, 7, false)

	runtime.SetMutexProfileFraction(0)
	end, endOther := record(url), record(other)
	profilingRatesAre(t, url, 1, true)
	end() // its clients disconnect
	profilingRatesAre(t, other, 1, true)
	endOther()
	profilingRatesAre(t, url, 0, false)

	third := profilingNew(t, &conduit.ProfilingConfig{MutexFraction: 3, BlockRate: 1})
	end = record(url)
	third.Close()
	profilingRatesAre(t, url, 3, true) // the recordings still need it
	end()
	profilingRatesAre(t, url, 0, false)
	runtime.SetMutexProfileFraction(9)
	third.Close() // again
	profilingRatesAre(t, url, 9, false)
}

func TestOneFlightRecorder(t *testing.T) {
	cfg := &conduit.ProfilingConfig{FlightRecorder: time.Second, MutexFraction: 5}
	first := profilingNew(t, cfg)
	if _, err := conduit.NewProfiler(&conduit.ProfilingConfig{FlightRecorder: time.Second, MutexFraction: 9}); err == nil || !strings.HasPrefix(err.Error(), "conduit: FlightRecorder: ") {
		t.Errorf("a second one: %v, want an error that names FlightRecorder", err)
	}
	if rate := runtime.SetMutexProfileFraction(-1); rate != 5 {
		t.Errorf("one that failed has set the mutex rate to %d", rate)
	}
	first.Close()
	closed := serve(t, newServer(t, &conduit.Config{Handler: first})) + "/debug/pprof/"
	for url, want := range map[string]int{profilingServe(t, cfg) + "flight": 200, closed + "flight": 400, closed + "heap": 200} {
		if r := get(t, http.DefaultClient, url); r.status != want || strings.HasPrefix(r.body, "go 1.") != (strings.HasSuffix(url, "flight") && want == 200) {
			t.Errorf("%s: %d %.50q, want %d", url, r.status, r.body, want)
		}
	}
}

// Start, Stop and WriteTo race with each other, and a trace is allowed beside.
func TestFlightRecorderIsSafeToShare(t *testing.T) {
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})
	url := serve(t, newServer(t, &conduit.Config{Handler: p})) + "/debug/pprof/"
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			status := 200
			for status == 200 { // 400 is the end
				r := get(t, http.DefaultClient, url+"flight")
				if status = r.status; status != 400 && !strings.HasPrefix(r.body, "go 1.") {
					t.Errorf("flight: %d %.50q", r.status, r.body)
				}
			}
		})
	}
	if r := get(t, http.DefaultClient, url+"trace?seconds=0.1"); r.status != 200 {
		t.Errorf("trace beside: %d %q", r.status, r.body)
	}
	for range 4 {
		clients.Go(func() { p.Close() })
	}
	clients.Wait()
}

// WriteTo holds the recorder at the client's speed, and the runtime serves a
// trace with the recorder's goroutine, so both go to memory first.
func TestSlowClientDoesNotHoldTheFlightRecorder(t *testing.T) {
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Minute})
	for _, name := range []string{"flight", "trace?seconds=0.01"} {
		stuck := &profilingStuckWriter{ResponseRecorder: httptest.NewRecorder(), entered: make(chan struct{}), leave: make(chan struct{})}
		ask := func(w http.ResponseWriter, name string) {
			r := httptest.NewRequest("GET", "/debug/pprof/"+name, nil)
			r.RemoteAddr, r.Host = "127.0.0.1:1", "localhost"
			p.ServeHTTP(w, r)
		}
		var client sync.WaitGroup
		client.Go(func() { ask(stuck, name) })
		<-stuck.entered
		beside := httptest.NewRecorder()
		if ask(beside, "flight"); beside.Code != 200 {
			t.Errorf("beside a slow client of %s: %d %q, want 200", name, beside.Code, beside.Body)
		}
		close(stuck.leave)
		client.Wait()
	}
}

func TestSlowRequestsPanics(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	profilingPanics(t, "conduit: FlightRecorder: SlowRequests needs one\nconduit: threshold: 0s is not positive\nconduit: dir: open "+missing+": no such file or directory",
		func() { profilingNew(t, nil).SlowRequests(0, missing) })
}

func TestSlowRequestIsRecorded(t *testing.T) {
	dir := t.TempDir()
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second}) // its goroutine waits for the runtime: no bubble
	var logs logBuffer
	mux := http.NewServeMux()
	mux.HandleFunc("GET /wait/{for}", func(w http.ResponseWriter, r *http.Request) {
		d, _ := time.ParseDuration(r.PathValue("for"))
		time.Sleep(d)
		r.URL.Path = "/elsewhere"
		panic(http.ErrAbortHandler)
	})
	mw := conduit.Chain(conduit.RequestID(), p.SlowRequests(50*time.Millisecond, dir), conduit.Timeout(time.Minute))
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		serveBubble(t, newServer(t, &conduit.Config{Handler: mw(mux), Logger: logs.logger()}), l)
		for _, wait := range []string{"49ms", "100ms"} {
			req, _ := http.NewRequest("GET", "http://localhost/wait/"+wait, nil)
			req.Header.Set("X-Request-ID", "..a-1")
			if res, err := l.client(t).Do(req); err == nil {
				res.Body.Close()
				t.Errorf("%s: %d, want an abort", wait, res.StatusCode)
			}
		}
		p.Close() // it waits for the recording
	})

	lines := logs.find("slow request recorded")
	if len(lines) != 1 {
		t.Fatalf("logged %v, want one recording", logs.lines())
	}
	line := lines[0]
	file, _ := line["file"].(string)
	if line["path"] != "/wait/100ms" || line["pattern"] != "GET /wait/{for}" || line["method"] != "GET" || line["request_id"] != "..a-1" ||
		line["duration"].(float64) < 100e6 || filepath.Dir(file) != dir ||
		!regexp.MustCompile(`^slow-\d{8}T\d{6}\.\d{3}Z-\.\.a-1\.trace$`).MatchString(filepath.Base(file)) {
		t.Errorf("logged %v", line)
	}
	if names := profilingFiles(t, dir); len(names) != 1 || names[0] != filepath.Base(file) {
		t.Errorf("recorded %q, want %q", names, filepath.Base(file))
	}
	if text, err := os.ReadFile(file); err != nil || !bytes.HasPrefix(text, []byte("go 1.")) {
		t.Errorf("the file has %.20q, %v; want a trace", text, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v, want it for its owner alone", info.Mode(), err)
	}
}

func TestSlowRequestsAreRecordedOnceAMinute(t *testing.T) {
	dir := t.TempDir()
	want := []string{"notes.trace", "slow-1.txt", "slow-20000101T000001.000Z.trace", "slow-20000101T000101.000Z.trace", "slow-20000101T000201.000Z.trace"}
	for i := range 10 {
		name := fmt.Sprintf("slow-1999010%dT000000.000Z.trace", i)
		if i > 2 { // the newest ten are kept
			want = append(want, name)
		}
		for _, name := range []string{name, want[0], want[1]} {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Outside of the bubble, for its goroutine waits for the runtime.
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})
	synctest.Test(t, func(t *testing.T) {
		h := p.SlowRequests(time.Second, dir)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { time.Sleep(time.Second) }))
		for range 13 { // one each 10 s: the 1st, 7th and 13th
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
			time.Sleep(9 * time.Second)
		}
		p.Close()
		time.Sleep(time.Minute)
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)) // and nothing after
	})
	slices.Sort(want)
	if names := profilingFiles(t, dir); !slices.Equal(names, want) {
		t.Errorf("got %q, want %q", names, want)
	}
}

// A request that lasts by nature ends with its first byte, or when its
// connection is hijacked.
func TestSlowRequestsLetStreamsLast(t *testing.T) {
	const threshold = time.Second
	stream := func(w http.ResponseWriter, r *http.Request) {
		s, err := conduit.NewTextStream(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		s.Write([]byte("a"))
		time.Sleep(threshold)
		s.Write([]byte("b"))
	}
	hijack := func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		time.Sleep(threshold)
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab")
		conn.Close()
	}
	for _, tt := range []struct {
		name    string
		before  time.Duration
		handler http.HandlerFunc
		files   int
	}{
		{"quick to begin", 0, stream, 0},
		{"slow to begin", threshold, stream, 1},
		{"hijacked", 0, hijack, 0},
		{"hijacked late", threshold, hijack, 1},
	} {
		dir := t.TempDir()
		p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})
		mw := conduit.Chain(conduit.Timeout(time.Minute), p.SlowRequests(threshold, dir), conduit.Timeout(time.Minute))
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			serveBubble(t, newServer(t, &conduit.Config{Handler: mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				time.Sleep(tt.before)
				tt.handler(w, r)
			}))}), l)
			if r := get(t, l.client(t), "http://localhost/"); r.body != "ab" {
				t.Errorf("%s: %d %q, want ab", tt.name, r.status, r.body)
			}
			p.Close()
		})
		if names := profilingFiles(t, dir); len(names) != tt.files {
			t.Errorf("%s: recorded %q, want %d", tt.name, names, tt.files)
		}
	}
}

// The response is the client's before the recording is written, and whether or
// not it can be. Close waits for it.
func TestSlowRequestIsNotHeldUp(t *testing.T) {
	dir := t.TempDir()
	p := profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})
	h := p.SlowRequests(time.Nanosecond, dir)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { time.Sleep(time.Nanosecond) }))
	// A folder that has something in it is in the way.
	if err := os.MkdirAll(filepath.Join(dir, "slow-20000101T000000.000Z.trace", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		held, closed := make(chan struct{}), make(chan struct{})
		slog.SetDefault(slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Value.String() == "slow request not recorded" {
				<-held
			}
			return a
		}})))
		defer slog.SetDefault(slog.New(slog.DiscardHandler))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
		go func() {
			p.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close does not wait for the recording")
		default:
		}
		held <- struct{}{}
		<-closed
	})
	if names := profilingFiles(t, dir); len(names) != 1 {
		t.Errorf("left behind %q", names)
	}
}

func TestProfilingServer(t *testing.T) {
	for _, tt := range []struct {
		addr, listens string
		serves        bool
		stop          func(*conduit.Server) error
	}{
		{":0", "127.0.0.1:0", true, func(srv *conduit.Server) error { return srv.Shutdown(t.Context()) }},
		{"0.0.0.0:0", "0.0.0.0:0", true, (*conduit.Server).Close},
		{"[::1]:0", "[::1]:0", false, func(srv *conduit.Server) error { return srv.Shutdown(t.Context()) }},
		{"localhost:0", "localhost:0", false, (*conduit.Server).Close},
	} {
		srv, err := conduit.NewProfilingServer(tt.addr, &conduit.ProfilingConfig{FlightRecorder: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if got := srv.HTTPServer(); got.Addr != tt.listens || got.WriteTimeout > 0 {
			t.Errorf("%s: listens on %s with a WriteTimeout of %v, want %s without", tt.addr, got.Addr, got.WriteTimeout, tt.listens)
		}
		if tt.serves {
			url := serve(t, srv) + "/debug/pprof/"
			for path, want := range map[string]string{"": "<title>Profiles</title>", "flight": "go 1.", "stats": `"goroutines":`} {
				if r := get(t, http.DefaultClient, url+path); r.status != 200 || !strings.Contains(r.body, want) || strings.Contains(r.body, `"server":`) {
					t.Errorf("%s: %q: %d %.100q, want %q and nothing of a server", tt.addr, path, r.status, r.body, want)
				}
			}
			req, _ := http.NewRequest("GET", url, nil)
			req.Host = "profiles.example"
			if r := do(t, http.DefaultClient, req); r.status != http.StatusForbidden {
				t.Errorf("%s: a foreign Host gets %d, want 403", tt.addr, r.status)
			}
		}
		if err := tt.stop(srv); err != nil {
			t.Errorf("%s: the end is %v", tt.addr, err)
		}
		// Its Profiler has closed, or there could not be another recorder.
		profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second}).Close()
	}
}

func TestRuntimeStatsAreTheRuntimes(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // no collection but these
	runtime.GC()
	before := conduit.ReadRuntimeStats()
	ballast := make([]byte, 32<<20)
	stop, block := profilingContend(t), make(chan struct{})
	for range 1000 {
		go func() { <-block }()
	}
	profilingEventually(t, "a wait for the mutex counts", func() bool { return conduit.ReadRuntimeStats().MutexWaitSecondsTotal > before.MutexWaitSecondsTotal })
	runtime.GC()
	s := conduit.ReadRuntimeStats()
	pauses := []metrics.Sample{{Name: "/sched/pauses/total/gc:seconds"}}
	metrics.Read(pauses)
	close(block)
	stop()
	runtime.KeepAlive(ballast)

	count, sum, all := uint64(0), 0.0, []float64{} // the upper bound of each pause's bucket
	for i, h := 0, pauses[0].Value.Float64Histogram(); i < len(h.Counts); i++ {
		count += h.Counts[i]
		all = append(all, slices.Repeat([]float64{h.Buckets[i+1]}, int(h.Counts[i]))...)
		if h.Counts[i] > 0 {
			sum += float64(h.Counts[i]) * (h.Buckets[i] + h.Buckets[i+1]) / 2
		}
	}
	for what, ok := range map[string]bool{
		"version":           s.GoVersion == runtime.Version(),
		"GOMAXPROCS":        s.GOMAXPROCS == uint64(runtime.GOMAXPROCS(0)),
		"uptime":            s.UptimeSeconds > before.UptimeSeconds && s.UptimeSeconds < 3600,
		"goroutines":        s.Goroutines >= before.Goroutines+500, // others may end meanwhile
		"heap":              s.HeapBytes >= 32<<20 && s.HeapLiveBytes >= 32<<20 && s.HeapObjects > 0,
		"goal":              s.HeapGoalBytes > s.HeapLiveBytes,
		"stacks":            s.StackBytes > before.StackBytes,
		"memory":            s.MemoryBytes > s.HeapBytes,
		"allocated":         s.AllocatedBytesTotal >= before.AllocatedBytesTotal+32<<20,
		"collections":       s.GCCyclesTotal == before.GCCyclesTotal+1,
		"pauses":            s.GCPausesTotal == count && math.Abs(s.GCPauseSecondsTotal-sum) < 1e-9,
		"pauses' median":    s.GCPauseP50Seconds == all[(len(all)+1)/2-1],
		"pauses' p99":       s.GCPauseP99Seconds == all[(len(all)*99+99)/100-1],
		"scheduler latency": 0 < s.SchedulerLatencyP50Seconds && s.SchedulerLatencyP50Seconds <= s.SchedulerLatencyP99Seconds && s.SchedulerLatencyP99Seconds < 10,
		"CPU":               s.CPUUserSecondsTotal > 0 && s.CPUGCSecondsTotal > 0,
	} {
		if !ok {
			t.Errorf("%s: before %+v, after %+v; %d pauses of %v", what, before, s, count, sum)
		}
	}
}

// runtime.ReadMemStats would stop the world, once each time.
func TestReadRuntimeStatsNeitherAllocatesNorStopsTheWorld(t *testing.T) {
	stops := []metrics.Sample{{Name: "/sched/pauses/total/other:seconds"}}
	count := func() (n uint64) {
		metrics.Read(stops)
		for _, c := range stops[0].Value.Float64Histogram().Counts {
			n += c
		}
		return n
	}
	before := count()
	for range 200 {
		conduit.ReadRuntimeStats()
	}
	if n := count() - before; n >= 100 {
		t.Errorf("200 readings stopped the world %d times", n)
	}
	fewest := math.Inf(1)
	for range 100 { // the race detector empties a sync.Pool now and then
		fewest = min(fewest, testing.AllocsPerRun(1, func() { conduit.ReadRuntimeStats() }))
	}
	if fewest > 0 {
		t.Errorf("ReadRuntimeStats makes %v allocations, want none", fewest)
	}
}

func TestStatsAreJSONOrForPrometheus(t *testing.T) {
	url := profilingServe(t, nil) + "stats"
	const prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
	for _, tt := range []struct {
		query, accept string
		prometheus    bool
	}{
		{"", "", false},
		{"", "*/*", false},
		{"", "application/json", false},
		{"", "application/json, text/plain, */*", false}, // axios
		{"", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", false},
		{"", prometheus, true},
		{"", "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6," + prometheus, true},
		{"", "Text/Plain; version=0.0.4", true},
		{"?format=prometheus", "application/json", true},
		{"?format=json", prometheus, false},
	} {
		req, _ := http.NewRequest("GET", url+tt.query, nil)
		req.Header.Set("Accept", tt.accept)
		r := do(t, http.DefaultClient, req)
		want := "application/json"
		if tt.prometheus {
			want = "text/plain; version=0.0.4; charset=utf-8"
		}
		if got := r.header.Get("Content-Type"); got != want || r.header.Get("Vary") != "Accept" || json.Valid([]byte(r.body)) == tt.prometheus {
			t.Errorf("%q, Accept %q: Content-Type %q, Vary %q: %.100q, want %q", tt.query, tt.accept, got, r.header.Get("Vary"), r.body, want)
		}
	}
}

// The statistics are those of the server that is asked, but for the request
// that asks, and of the pool.
func TestStatsCountConnectionsRequestsAndThePool(t *testing.T) {
	db := sql.OpenDB(new(scriptedDatabase))
	defer db.Close()
	db.SetMaxOpenConns(9)
	conn, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p := profilingNew(t, &conduit.ProfilingConfig{DB: db})
	eachProtocol(t, func(t *testing.T, proto protocol) {
		mux := http.NewServeMux()
		p.Enable(mux)
		entered, leave := make(chan struct{}), make(chan struct{})
		mux.HandleFunc("GET /wait", func(http.ResponseWriter, *http.Request) {
			entered <- struct{}{}
			<-leave
		})
		url := proto.serve(t, proto.server(t, &conduit.Config{Handler: mux}))
		var clients sync.WaitGroup
		for range 3 {
			clients.Go(func() { get(t, proto.client(t), url+"/wait") })
			<-entered
		}
		var s struct {
			Server   struct{ Connections, Requests int }
			Database map[string]float64
		}
		r := get(t, proto.client(t), url+"/debug/pprof/stats")
		if err := json.Unmarshal([]byte(r.body), &s); err != nil || s.Server.Connections != 4 || s.Server.Requests != 3 ||
			s.Database["max_open"] != 9 || s.Database["open"] != 1 || s.Database["in_use"] != 1 || len(s.Database) != 9 {
			t.Errorf("%v in %s, want 4 connections, 3 requests and a pool with 1 of 9 in use", err, r.body)
		}
		text := get(t, proto.client(t), url+"/debug/pprof/stats?format=prometheus").body
		for _, want := range []string{"\nconduit_open_connections 5\n", "\nconduit_requests_in_flight 3\n", "\ngo_sql_max_open_connections 9\n", "\ngo_sql_in_use_connections 1\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
		close(leave)
		clients.Wait()
	})

	plain := httptest.NewServer(profilingNew(t, nil))
	defer plain.Close()
	if r := get(t, http.DefaultClient, plain.URL+"/debug/pprof/stats"); strings.Contains(r.body, `"server"`) || strings.Contains(r.body, `"database"`) {
		t.Errorf("without a conduit Server and a pool: %s", r.body)
	}
}

// The names are those of Prometheus' client for Go, which dashboards ask for.
func TestPrometheusText(t *testing.T) {
	runtime.GC()
	text := get(t, http.DefaultClient, profilingServe(t, nil)+"stats?format=prometheus").body
	values := make(map[string]float64) // of each sample
	family := regexp.MustCompile(`# HELP (\w+) [^\n]+\n# TYPE (\w+) (gauge|counter|histogram|summary)\n((?:\w+(?:{\w+="[^"\n]*"})? \S+\n)+)`)
	rest := text
	for _, m := range family.FindAllStringSubmatch(text, -1) {
		name, kind, last := m[1], m[3], 0.0
		rest = strings.Replace(rest, m[0], "", 1)
		for line := range strings.Lines(m[4]) {
			sample, number, _ := strings.Cut(strings.TrimSpace(line), " ")
			v, err := strconv.ParseFloat(number, 64)
			_, twice := values[sample]
			bucket := strings.Contains(sample, "_bucket{")
			if err != nil || twice || v < 0 || !strings.HasPrefix(sample, name) || bucket && v < last {
				t.Errorf("bad sample %q, after %v", line, last)
			}
			if values[sample] = v; bucket {
				last = v
			}
		}
		if m[2] != name || (kind == "counter") != strings.HasSuffix(name, "_total") || kind == "histogram" && (values[name+`_bucket{le="+Inf"}`] != last || values[name+"_count"] != last || values[name+"_sum"] == 0 || last == 0) {
			t.Errorf("bad family %s", m[0])
		}
	}
	if rest != "" {
		t.Errorf("not of Prometheus' format: %q", rest)
	}

	names := `go_info{version="` + runtime.Version() + `"} process_start_time_seconds go_goroutines go_threads go_sched_gomaxprocs_threads go_gc_gogc_percent
		go_memstats_alloc_bytes go_memstats_alloc_bytes_total go_memstats_frees_total go_memstats_heap_alloc_bytes go_memstats_heap_inuse_bytes go_memstats_heap_idle_bytes
		go_memstats_heap_objects go_memstats_last_gc_time_seconds go_memstats_stack_inuse_bytes go_memstats_mspan_inuse_bytes go_memstats_mcache_inuse_bytes
		go_memstats_gc_sys_bytes go_gc_duration_seconds{quantile="0.75"} go_gc_duration_seconds_sum go_gc_duration_seconds_count
		go_gc_pauses_seconds_count go_sched_pauses_total_gc_seconds_count go_sched_latencies_seconds_count conduit_open_connections`
	if runtime.GOOS == "linux" {
		names += " process_cpu_seconds_total process_virtual_memory_bytes process_resident_memory_bytes process_open_fds"
	}
	for _, name := range strings.Fields(names) {
		if values[name] == 0 {
			t.Errorf("no %s in\n%s", name, text)
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	for name, want := range map[string]uint64{"go_memstats_sys_bytes": m.Sys, "go_memstats_heap_sys_bytes": m.HeapSys, "go_memstats_mallocs_total": m.Mallocs, "go_memstats_next_gc_bytes": m.NextGC} {
		if got := values[name]; got < float64(want)/2 || got > float64(want)*2 {
			t.Errorf("%s %v, want about %d", name, got, want)
		}
	}
}

// The pages have all they need in them, and their policy forbids anything else.
// Their links are relative, so that they work below a prefix.
func TestProfilingPagesAreSelfContained(t *testing.T) {
	srv := httptest.NewServer(http.StripPrefix("/admin", profilingNew(t, &conduit.ProfilingConfig{FlightRecorder: time.Second})))
	defer srv.Close()
	base := srv.URL + "/admin/debug/pprof/"
	nonces := make(map[string]bool)
	for _, path := range []string{"", "live", "live"} {
		r := get(t, http.DefaultClient, base+path)
		policy := r.header.Get("Content-Security-Policy")
		nonce := regexp.MustCompile(`'nonce-(\w{20,})'`).FindStringSubmatch(policy)
		if nonce == nil || nonces[nonce[1]] {
			t.Fatalf("%q: the policy %q has no nonce of its own", path, policy)
		}
		nonces[nonce[1]] = true
		want := "default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-N'; style-src 'nonce-N'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
		if got := strings.ReplaceAll(policy, nonce[1], "N"); got != want {
			t.Errorf("%q: policy %q, want %q", path, got, want)
		}
		for _, tag := range regexp.MustCompile(`<(script|style)\b[^>]*>`).FindAllString(r.body, -1) {
			if !strings.Contains(tag, `nonce="`+nonce[1]+`"`) {
				t.Errorf("%q: %s is not allowed by its policy", path, tag)
			}
		}
		if bad := regexp.MustCompile(`(?i)https?:|//[a-z]|@import|url\(|\son\w+=|\sstyle=|javascript:|NONCE|OTHERS`).FindString(strings.ReplaceAll(r.body, "'nonce-", "")); bad != "" && bad != "nonce" {
			t.Errorf("%q has %q in it", path, bad)
		}
		links := make(map[string]bool)
		for _, link := range regexp.MustCompile(`href="([^"?]*)`).FindAllStringSubmatch(r.body, -1) {
			links[link[1]] = true
			if req, _ := http.NewRequest("HEAD", base+link[1], nil); link[1] != "data:," && do(t, http.DefaultClient, req).status != 200 {
				t.Errorf("%q has a dead link to %q", path, link[1])
			}
		}
		for _, profile := range pprof.Profiles() {
			if !links[(&url.URL{Path: profile.Name()}).String()] {
				t.Errorf("%q has no link to %s", path, profile.Name())
			}
		}
		// T7: the two never begin anew.
		if !strings.Contains(r.body, "adds to what was recorded before") || !strings.Contains(r.body, "go tool pprof -base") {
			t.Errorf("%q does not say that block and mutex add up", path)
		}
	}
}

// Profiling helpers

func profilingNew(t testing.TB, cfg *conduit.ProfilingConfig) *conduit.Profiler {
	t.Helper()
	p, err := conduit.NewProfiler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// profilingServe serves a Profiler and returns the URL of its index.
func profilingServe(t *testing.T, cfg *conduit.ProfilingConfig) string {
	t.Helper()
	return serve(t, newServer(t, &conduit.Config{Handler: profilingNew(t, cfg)})) + "/debug/pprof/"
}

func profilingEventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

// profilingRecordings returns how many recordings run in the process.
func profilingRecordings() int {
	var stacks bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&stacks, 2)
	return strings.Count(stacks.String(), "conduit.record(")
}

// profilingRecord begins a recording of a profile. With end its client
// disconnects, and it returns when the recording has ended.
func profilingRecord(t *testing.T, url, name string) (end func()) {
	t.Helper()
	before := profilingRecordings()
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, "GET", url+name+"?seconds=250", nil)
	go func() {
		if _, err := http.DefaultClient.Do(req); err == nil {
			t.Errorf("%s: a response came", name)
		}
	}()
	profilingEventually(t, name+" is recording", func() bool { return profilingRecordings() == before+1 })
	return func() {
		t.Helper()
		before := profilingRecordings()
		cancel()
		profilingEventually(t, name+" has ended", func() bool { return profilingRecordings() < before })
	}
}

// profilingContend has one goroutine after the other wait for a mutex until stop
// is called. A queue that never empties would hide from a rate that was turned on
// later.
func profilingContend(t *testing.T) (stop func()) {
	t.Helper()
	var mu sync.Mutex
	ctx, cancel := context.WithCancel(t.Context())
	var worker sync.WaitGroup
	worker.Go(func() {
		for ctx.Err() == nil {
			mu.Lock()
			waited := make(chan struct{})
			go func() {
				mu.Lock()
				close(waited)
				mu.Unlock()
			}()
			time.Sleep(200 * time.Microsecond)
			mu.Unlock()
			<-waited
		}
	})
	return func() {
		cancel()
		worker.Wait()
	}
}

// profilingRatesAre fails the test unless the mutex rate is this, and blocking
// is recorded or not. There must be some.
func profilingRatesAre(t *testing.T, url string, mutex int, block bool) {
	t.Helper()
	if rate := runtime.SetMutexProfileFraction(-1); rate != mutex {
		t.Errorf("the mutex rate is %d, want %d", rate, mutex)
	}
	blocked := func() string {
		lines := regexp.MustCompile(`(?m)^\d+ \d+ @`).FindAllString(get(t, http.DefaultClient, url+"block?debug=1").body, -1)
		return strings.Join(lines, "\n")
	}
	before := blocked()
	if block {
		profilingEventually(t, "blocking is recorded", func() bool { return blocked() != before })
		return
	}
	time.Sleep(20 * time.Millisecond)
	if after := blocked(); before != after {
		t.Errorf("blocking is recorded: first\n%s\nthen\n%s", before, after)
	}
}

// profilingPanics fails the test unless f panics with this text.
func profilingPanics(t *testing.T, want string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if got := fmt.Sprint(recover()); got != want {
			t.Errorf("panicked with %q, want %q", got, want)
		}
	}()
	f()
}

func profilingFiles(t *testing.T, dir string) (names []string) {
	t.Helper()
	names, err := fs.Glob(os.DirFS(dir), "*")
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// profilingStuckWriter takes nothing until it is told to.
type profilingStuckWriter struct {
	*httptest.ResponseRecorder
	entered, leave chan struct{}
	once           sync.Once
}

func (w *profilingStuckWriter) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.entered) })
	<-w.leave
	return len(p), nil
}

// Database pool

func TestDatabaseConfigBoundsThePool(t *testing.T) {
	tests := []struct {
		name       string
		cfg        conduit.DatabaseConfig
		open, idle int // connections that stay idle of 20 used at once, where allowed
	}{
		{"defaults", conduit.DatabaseConfig{}, 100, 10},
		{"idle follows open", conduit.DatabaseConfig{MaxOpenConns: 4}, 4, 4},
		{"idle of the defaults follows open", conduit.DatabaseConfig{MaxOpenConns: 4, MaxIdleConns: conduit.DefaultDatabaseConfig(nil).MaxIdleConns}, 4, 4},
		{"no limit", conduit.DatabaseConfig{MaxOpenConns: -1, MaxIdleConns: 15}, 0, 15},
		{"no limit, default idle", conduit.DatabaseConfig{MaxOpenConns: -1}, 0, 10},
		{"none idle", conduit.DatabaseConfig{MaxIdleConns: -1}, 100, 0},
		{"idle up to open", conduit.DatabaseConfig{MaxOpenConns: 20, MaxIdleConns: 20}, 20, 20},
		{"negative times", conduit.DatabaseConfig{ConnMaxLifetime: -1, ConnMaxIdleTime: -1}, 100, 10},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			db := new(scriptedDatabase).open(t)
			db.SetMaxOpenConns(2) // an earlier, lower bound must not lower idle for good
			tt.cfg.DB = db
			if err := tt.cfg.Apply(); err != nil {
				t.Fatal(err)
			}
			if got := db.Stats().MaxOpenConnections; got != tt.open {
				t.Errorf("MaxOpenConnections = %d, want %d", got, tt.open)
			}
			n := 20
			if tt.open > 0 {
				n = min(n, tt.open)
			}
			holdConns(t, db, n)()
			if got := db.Stats().Idle; got != tt.idle {
				t.Errorf("%d of %d connections stay idle, want %d", got, n, tt.idle)
			}
		})
	}
}

func TestDatabaseConfigTimes(t *testing.T) {
	tests := []struct {
		name                   string
		cfg                    conduit.DatabaseConfig
		sleep                  time.Duration
		idleClosed, lifeClosed int64
	}{
		{"idle in time", conduit.DatabaseConfig{}, 9 * time.Minute, 0, 0},
		{"idle too long", conduit.DatabaseConfig{}, 21 * time.Minute, 1, 0},
		{"old", conduit.DatabaseConfig{ConnMaxIdleTime: -1}, 2 * time.Hour, 0, 1},
		{"for ever", conduit.DatabaseConfig{ConnMaxIdleTime: -1, ConnMaxLifetime: -1}, 1000 * time.Hour, 0, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tt.cfg.DB = new(scriptedDatabase).open(t)
				if err := tt.cfg.Apply(); err != nil {
					t.Fatal(err)
				}
				if err := tt.cfg.DB.Ping(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(tt.sleep)
				synctest.Wait()
				if got := tt.cfg.DB.Stats(); got.MaxIdleTimeClosed != tt.idleClosed || got.MaxLifetimeClosed != tt.lifeClosed {
					t.Errorf("closed %d for idling and %d for age, want %d and %d", got.MaxIdleTimeClosed, got.MaxLifetimeClosed, tt.idleClosed, tt.lifeClosed)
				}
			})
		})
	}
}

func TestNewAppliesTheDatabaseConfig(t *testing.T) {
	db := new(scriptedDatabase).open(t)
	cfg := conduit.DefaultConfig(http.NotFoundHandler())
	cfg.Database = conduit.DefaultDatabaseConfig(db)
	cfg.Database.MaxOpenConns = 7
	cfg.Database.MaxIdleConns = 7
	bad := *cfg
	bad.Handler = nil
	if _, err := conduit.New(&bad); err == nil || db.Stats().MaxOpenConnections != 0 {
		t.Errorf("an invalid config: %v, with the pool at %d; want an error and the pool left alone", err, db.Stats().MaxOpenConnections)
	}
	if _, err := conduit.New(cfg); err != nil || db.Stats().MaxOpenConnections != 7 {
		t.Errorf("New = %v with the pool at %d, want 7", err, db.Stats().MaxOpenConnections)
	}
}

func TestWarmOpensConnectionsSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d scriptedDatabase
		db := d.open(t)
		holdConns(t, db, 3)() // there already
		d.dial = func(context.Context, int64) error { time.Sleep(time.Second); return nil }
		cfg := &conduit.DatabaseConfig{DB: db, MaxIdleConns: 10} // not applied: without, 2 stay idle
		start := time.Now()
		if err := cfg.Warm(t.Context(), 10); err != nil {
			t.Fatal(err)
		}
		if got := time.Since(start); got != time.Second {
			t.Errorf("7 dials of a second each took %v, want a second", got)
		}
		if got := db.Stats(); got.Idle != 10 || got.InUse != 0 || got.MaxOpenConnections != 100 {
			t.Errorf("%d idle and %d in use of %d, want 10, 0 and 100", got.Idle, got.InUse, got.MaxOpenConnections)
		}
		holdConns(t, db, 10)()
		if got := d.dials.Load(); got != 11 { // database/sql kept 2 of the 3
			t.Errorf("%d dials, want 11: 10 requests find a connection each", got)
		}
	})
}

func TestWarmThatFailsGivesEverythingBack(t *testing.T) {
	refused := errors.New("too many clients already")
	tests := []struct {
		name  string
		dial  func(ctx context.Context, n int64) error
		want  error
		after time.Duration
		idle  int
	}{
		{"one is refused", func(ctx context.Context, n int64) error {
			switch {
			case n <= 4:
				return nil
			case n == 5:
				time.Sleep(time.Second)
				return refused
			}
			<-ctx.Done() // not before one has failed
			return ctx.Err()
		}, refused, time.Second, 4},
		{"all are refused", func(context.Context, int64) error { return refused }, refused, 0, 0},
		{"no response", func(ctx context.Context, n int64) error { <-ctx.Done(); return ctx.Err() }, context.DeadlineExceeded, time.Minute, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := scriptedDatabase{dial: tt.dial}
				db := d.open(t)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				start := time.Now()
				err := conduit.DefaultDatabaseConfig(db).Warm(ctx, 8)
				if !errors.Is(err, tt.want) || !strings.HasPrefix(err.Error(), "conduit: Warm: ") {
					t.Errorf("Warm = %v, want %v", err, tt.want)
				}
				if got := time.Since(start); got != tt.after {
					t.Errorf("Warm took %v, want %v", got, tt.after)
				}
				if got := db.Stats(); got.InUse != 0 || got.Idle != tt.idle || d.live.Load() != int64(tt.idle) {
					t.Errorf("%d idle, %d in use, %d open, want %d, 0 and %d", got.Idle, got.InUse, d.live.Load(), tt.idle, tt.idle)
				}
			})
		})
	}
}

func TestDatabaseConfigIsRefused(t *testing.T) {
	var d scriptedDatabase
	db := d.open(t)
	db.SetMaxOpenConns(77)
	for _, tt := range []struct {
		name string
		cfg  *conduit.DatabaseConfig
		warm int    // 0: Apply is called, not Warm
		want string // all of it
	}{
		{"nil", nil, 0, "conduit: DB: is required"},
		{"no DB", &conduit.DatabaseConfig{}, 0, "conduit: DB: is required"},
		{"idle above open", &conduit.DatabaseConfig{DB: db, MaxOpenConns: 5, MaxIdleConns: 6}, 0, "conduit: MaxIdleConns: 6 is more than MaxOpenConns, 5"},
		{"idle above default open", &conduit.DatabaseConfig{DB: db, MaxIdleConns: 101}, 0, "conduit: MaxIdleConns: 101 is more than MaxOpenConns, 100"},
		{
			"no unit", &conduit.DatabaseConfig{DB: db, ConnMaxLifetime: 60, ConnMaxIdleTime: 10}, 0,
			"conduit: ConnMaxLifetime: 60ns: too short; is a unit such as time.Hour missing?\nconduit: ConnMaxIdleTime: 10ns: too short; is a unit such as time.Minute missing?",
		},

		{"nil, warm", nil, 1, "conduit: DB: is required"},
		{"idle above open, warm", &conduit.DatabaseConfig{DB: db, MaxOpenConns: 5, MaxIdleConns: 6}, 1, "conduit: MaxIdleConns: 6 is more than MaxOpenConns, 5"},
		{"beyond the default", &conduit.DatabaseConfig{DB: db}, 11, "conduit: n: 11 is more than MaxIdleConns, 10"},
		{"beyond what open leaves of the default", &conduit.DatabaseConfig{DB: db, MaxOpenConns: 4}, 5, "conduit: n: 5 is more than MaxIdleConns, 4"},
		{"none may be idle", &conduit.DatabaseConfig{DB: db, MaxIdleConns: -1}, 1, "conduit: n: 1 is more than MaxIdleConns, 0"},
		{"negative", &conduit.DatabaseConfig{DB: db}, -1, "conduit: n: -1 is negative"},
	} {
		var err error
		if tt.warm == 0 {
			err = tt.cfg.Apply()
		} else {
			err = tt.cfg.Warm(t.Context(), tt.warm)
		}
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		if got := db.Stats().MaxOpenConnections; got != 77 {
			t.Errorf("%s: MaxOpenConnections = %d, want it left alone", tt.name, got)
		}
	}

	none := &conduit.DatabaseConfig{DB: db, MaxIdleConns: -1}
	if err := none.Warm(t.Context(), 0); err != nil || d.dials.Load() != 0 {
		t.Errorf("Warm with no connections: %v after %d dials, want neither", err, d.dials.Load())
	}
}

func TestDatabaseHealthTellsASaturatedPoolFromADatabaseThatIsDown(t *testing.T) {
	down := errors.New("connection refused")
	hang := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	dialTimeout := func(context.Context, int64) error { return timeoutOfADriver{} }
	from := func(first int64, then func(context.Context, int64) error) func(context.Context, int64) error {
		return func(ctx context.Context, n int64) error {
			if n < first {
				return nil
			}
			return then(ctx, n)
		}
	}
	slow := func(ctx context.Context, _ int64) error {
		select {
		case <-time.After(time.Second):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	tests := []struct {
		name      string
		db        *scriptedDatabase
		open      int           // MaxOpenConns
		held      int           // connections in use
		free      time.Duration // when one of them is given back; 0: never
		budget    time.Duration // of the context, 5 s
		want      error
		saturated bool
		after     time.Duration
	}{
		{name: "well", open: 2},
		{name: "well without a limit", held: 20},
		{name: "well with the last connection", open: 2, held: 1},
		{name: "full", open: 2, held: 2, saturated: true, after: 250 * time.Millisecond},
		{name: "full, for a moment", open: 2, held: 2, free: 200 * time.Millisecond, after: 200 * time.Millisecond},
		{name: "full, and little time", open: 2, held: 2, budget: 100 * time.Millisecond, saturated: true, after: 50 * time.Millisecond},
		{name: "slow to dial", db: &scriptedDatabase{dial: slow}, open: 2, after: time.Second},
		{name: "slow to dial beside one in use", db: &scriptedDatabase{dial: from(2, slow)}, open: 2, held: 1, after: time.Second},
		{name: "a dial that times out", db: &scriptedDatabase{dial: from(1, dialTimeout)}, open: 1, want: timeoutOfADriver{}},
		{name: "a dial that times out beside some in use", db: &scriptedDatabase{dial: from(3, dialTimeout)}, open: 3, held: 2, want: timeoutOfADriver{}},
		{name: "refuses", db: &scriptedDatabase{dial: func(context.Context, int64) error { return down }}, open: 2, want: down},
		{name: "silent when dialled", db: &scriptedDatabase{dial: func(ctx context.Context, _ int64) error { return hang(ctx) }}, open: 1, want: context.DeadlineExceeded, after: 5 * time.Second},
		{name: "silent when asked", db: &scriptedDatabase{ping: hang}, open: 1, want: context.DeadlineExceeded, after: 5 * time.Second},
		{name: "does not respond to a ping", db: &scriptedDatabase{ping: func(context.Context) error { return down }}, open: 2, want: down},
		{name: "well without Ping", db: &scriptedDatabase{query: func() error { return nil }}, open: 2},
		{name: "down without Ping", db: &scriptedDatabase{query: func() error { return down }}, open: 2, want: down},
		{name: "nothing but bad connections", db: &scriptedDatabase{ping: func(context.Context) error { return driver.ErrBadConn }}, open: 2, want: driver.ErrBadConn},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := tt.db
				if d == nil {
					d = new(scriptedDatabase)
				}
				db := d.open(t)
				db.SetMaxOpenConns(tt.open)
				giveBack := holdConns(t, db, tt.held)
				defer giveBack()
				if tt.free > 0 {
					time.AfterFunc(tt.free, giveBack)
				}
				budget := tt.budget
				if budget == 0 {
					budget = 5 * time.Second
				}
				ctx, cancel := context.WithTimeout(t.Context(), budget)
				defer cancel()

				start := time.Now()
				err := conduit.DatabaseHealth(db)(ctx)
				if got := errors.Is(err, conduit.ErrPoolSaturated); got != tt.saturated {
					t.Errorf("saturated = %v, want %v: %v", got, tt.saturated, err)
				}
				if !tt.saturated && !errors.Is(err, tt.want) {
					t.Errorf("%v, want %v", err, tt.want)
				}
				if err != nil && !strings.HasPrefix(err.Error(), "conduit: DatabaseHealth: ") {
					t.Errorf("%v, want conduit: DatabaseHealth: before it", err)
				}
				if got := time.Since(start); got != tt.after {
					t.Errorf("it took %v, want %v", got, tt.after)
				}
				if got := db.Stats().InUse; !tt.saturated && tt.free == 0 && got != tt.held {
					t.Errorf("%d connections in use, want %d", got, tt.held)
				}
			})
		})
	}
}

// The context of a client that has disconnected says nothing about the pool.
func TestDatabaseHealthOfACancelledContext(t *testing.T) {
	var d scriptedDatabase
	db := d.open(t)
	db.SetMaxOpenConns(1)
	defer holdConns(t, db, 1)()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := conduit.DatabaseHealth(db)(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, conduit.ErrPoolSaturated) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// A database that was restarted is well, however many dead connections are
// left of the time before.
func TestDatabaseHealthGoesPastDeadConnections(t *testing.T) {
	var restarted atomic.Bool
	var d scriptedDatabase
	d.alive = func(born int64) bool { return !restarted.Load() || born > 10 }
	db := d.open(t)
	db.SetMaxIdleConns(10)
	holdConns(t, db, 10)()
	restarted.Store(true)
	if err := conduit.DatabaseHealth(db)(t.Context()); err != nil {
		t.Errorf("%v, want nil", err)
	}
	if got := db.Stats(); got.OpenConnections != 1 || got.Idle != 1 {
		t.Errorf("%d open and %d idle, want the new one alone", got.OpenConnections, got.Idle)
	}
}

func TestDatabaseHealthOfNothing(t *testing.T) {
	profilingPanics(t, "conduit: DatabaseHealth: DB: is required", func() { conduit.DatabaseHealth(nil) })
}

// holdConns takes n connections and returns what gives them back.
func holdConns(t *testing.T, db *sql.DB, n int) func() {
	t.Helper()
	var conns []*sql.Conn
	for range n {
		c, err := db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	return func() {
		for _, c := range conns {
			c.Close()
		}
	}
}

// timeoutOfADriver is an error as net.Dialer's Timeout makes it.
type timeoutOfADriver struct{}

func (timeoutOfADriver) Error() string        { return "i/o timeout" }
func (timeoutOfADriver) Is(target error) bool { return target == context.DeadlineExceeded }

// scriptedDatabase is a driver whose connections do as they are told.
type scriptedDatabase struct {
	dial  func(ctx context.Context, n int64) error // the nth dial
	ping  func(context.Context) error
	query func() error          // instead of ping: the driver has no Ping
	alive func(born int64) bool // whether the connection of that dial is

	dials, live atomic.Int64
}

func (d *scriptedDatabase) open(t *testing.T) *sql.DB {
	db := sql.OpenDB(d)
	t.Cleanup(func() { db.Close() })
	return db
}

func (d *scriptedDatabase) Driver() driver.Driver { return nil }

func (d *scriptedDatabase) Connect(ctx context.Context) (driver.Conn, error) {
	n := d.dials.Add(1)
	if d.dial != nil {
		if err := d.dial(ctx, n); err != nil {
			return nil, err
		}
	}
	d.live.Add(1)
	c := scriptedConn{d, n}
	if d.query != nil {
		return c, nil
	}
	return scriptedPinger{c}, nil
}

type scriptedConn struct {
	d    *scriptedDatabase
	born int64
}

func (c scriptedConn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("not implemented") }

func (c scriptedConn) Begin() (driver.Tx, error) { return nil, errors.New("not implemented") }
func (c scriptedConn) Close() error              { c.d.live.Add(-1); return nil }

func (c scriptedConn) QueryContext(_ context.Context, query string, _ []driver.NamedValue) (driver.Rows, error) {
	if query != "SELECT 1" {
		return nil, errors.New("syntax error")
	}
	return &oneRow{}, c.d.query()
}

type scriptedPinger struct{ scriptedConn }

func (c scriptedPinger) Ping(ctx context.Context) error {
	switch {
	case c.d.alive != nil && !c.d.alive(c.born):
		return driver.ErrBadConn
	case c.d.ping != nil:
		return c.d.ping(ctx)
	}
	return nil
}

type oneRow struct{ read bool }

func (r *oneRow) Columns() []string { return []string{"1"} }
func (r *oneRow) Close() error      { return nil }

func (r *oneRow) Next(dest []driver.Value) error {
	if r.read {
		return io.EOF
	}
	r.read = true
	dest[0] = int64(1)
	return nil
}

// Helpers

// protocol is a way to speak to a server.
type protocol struct {
	name   string
	proto  string // as the server sees it
	http1  bool
	secure bool
	client func(t *testing.T) *http.Client
}

var (
	http1Protocol = protocol{"HTTP1", "HTTP/1.1", true, false, func(t *testing.T) *http.Client { return newClient(t, &http.Transport{}) }}
	tlsProtocol   = protocol{"HTTP2", "HTTP/2.0", false, true, func(t *testing.T) *http.Client { return tlsClient(t, true) }}
	h2cProtocol   = protocol{"h2c", "HTTP/2.0", false, false, func(t *testing.T) *http.Client {
		p := new(http.Protocols)
		p.SetUnencryptedHTTP2(true)
		return newClient(t, &http.Transport{Protocols: p})
	}}
)

func eachProtocol(t *testing.T, test func(t *testing.T, p protocol)) {
	for _, p := range []protocol{http1Protocol, tlsProtocol, h2cProtocol} {
		t.Run(p.name, func(t *testing.T) { test(t, p) })
	}
}

// server returns a server of cfg that speaks the protocol.
func (p protocol) server(t *testing.T, cfg *conduit.Config) *conduit.Server {
	t.Helper()
	c := *cfg
	c.EnableH2C = !p.http1 && !p.secure
	if p.secure {
		c.EnableHTTP2 = true
		c.TLSConfig = &tls.Config{Certificates: []tls.Certificate{testCertificate().pair}}
	}
	return newServer(t, &c)
}

// serve serves on a loopback port and returns the URL.
func (p protocol) serve(t *testing.T, srv *conduit.Server) string {
	t.Helper()
	url := serve(t, srv)
	if p.secure {
		url = strings.Replace(url, "http://", "https://", 1)
	}
	return url
}

func newClient(t *testing.T, transport *http.Transport) *http.Client {
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func tlsClient(t *testing.T, http2 bool) *http.Client {
	return newClient(t, &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: testCertificate().pool, ServerName: "conduit.test"},
		ForceAttemptHTTP2: http2,
	})
}

// newServer is New with a logger that says nothing, unless cfg has one.
func newServer(t *testing.T, cfg *conduit.Config) *conduit.Server {
	t.Helper()
	c := *cfg
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	srv, err := conduit.New(&c)
	if err != nil {
		t.Fatal(err)
	}
	return srv
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serve serves on a loopback port until the test ends and returns the URL.
func serve(t *testing.T, srv *conduit.Server) string {
	t.Helper()
	l := listen(t)
	serveOn(t, srv, l)
	return "http://" + l.Addr().String()
}

func serveOn(t *testing.T, srv *conduit.Server, l net.Listener) {
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
}

func serveBubble(t *testing.T, srv *conduit.Server, l *pipeListener) {
	// net/http may wait for half a second before it closes a connection, and a
	// bubble whose test has ended has no time.
	t.Cleanup(func() { time.Sleep(time.Second) })
	serveOn(t, srv, l)
}

// pipeListener accepts the other ends of in-memory connections, which work in
// a testing/synctest bubble.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

func (l *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	select {
	case l.conns <- server:
	case <-l.closed:
		client.Close()
	}
	return client
}

func (l *pipeListener) client(t *testing.T) *http.Client {
	return newClient(t, &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return l.dial(), nil }})
}

func rawDial(t *testing.T, addr string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, bufio.NewReader(conn)
}

// response is a response that has been read whole.
type response struct {
	status int
	header http.Header
	body   string
	close  bool
}

func get(t *testing.T, client *http.Client, url string) response {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Error(err)
		return response{}
	}
	return do(t, client, req)
}

func do(t *testing.T, client *http.Client, req *http.Request) response {
	t.Helper()
	res, err := client.Do(req)
	if err != nil {
		t.Error(err)
		return response{}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%s %s: %d, then %v after %d bytes", req.Method, req.URL, res.StatusCode, err, len(body))
	}
	return response{res.StatusCode, res.Header, string(body), res.Close}
}

func textHandler(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, text) })
}

// multipartBody has a file that is large enough to go to disk.
func multipartBody(t *testing.T) (io.Reader, string) {
	t.Helper()
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	file, err := form.CreateFormFile("file", "name")
	if err != nil {
		t.Fatal(err)
	}
	file.Write(make([]byte, 11<<20)) // ParseMultipartForm adds 10 MB to its limit
	form.Close()
	return &body, form.FormDataContentType()
}

// traceInformational notes the informational responses to a request.
func traceInformational(ctx context.Context, hints *[]string) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
		*hints = append(*hints, fmt.Sprint(code, " ", header.Get("Link")))
		return nil
	}})
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// logBuffer keeps what is logged, a JSON object a line.
type logBuffer struct{ syncBuffer }

func (b *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (b *logBuffer) lines() []map[string]any {
	var lines []map[string]any
	for text := range strings.Lines(b.String()) {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			panic(fmt.Sprintf("log line %q: %v", text, err))
		}
		lines = append(lines, line)
	}
	return lines
}

// find returns the lines with a message.
func (b *logBuffer) find(msg string) []map[string]any {
	return slices.DeleteFunc(b.lines(), func(line map[string]any) bool { return line["msg"] != msg })
}

// wait returns the first line that match accepts. What is logged after the
// response may not be there when the client has it; nil means it never came.
func (b *logBuffer) wait(t *testing.T, match func(map[string]any) bool) map[string]any {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		lines := b.lines()
		if i := slices.IndexFunc(lines, match); i >= 0 {
			return lines[i]
		}
	}
	return nil
}

// request returns the line of the one request.
func (b *logBuffer) request(t *testing.T) map[string]any {
	t.Helper()
	line := b.wait(t, func(line map[string]any) bool { return line["msg"] == "request" })
	if line == nil {
		t.Fatalf("no line for the request:\n%s", b.String())
	}
	return line
}

// certificate is a self-signed one.
type certificate struct {
	pair         tls.Certificate
	pool         *x509.CertPool
	certPEM, key []byte
}

// testCertificate is for the name conduit.test, made once.
var testCertificate = sync.OnceValue(func() *certificate {
	c, err := makeCertificate("conduit.test")
	if err != nil {
		panic(err)
	}
	return c
})

func newCertificate(t *testing.T, name string) *certificate {
	t.Helper()
	c, err := makeCertificate(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func makeCertificate(name string) (*certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	// In a testing/synctest bubble it is the year 2000.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	c := &certificate{
		pool:    x509.NewCertPool(),
		certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:     pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
	}
	c.pool.AppendCertsFromPEM(c.certPEM)
	c.pair, err = tls.X509KeyPair(c.certPEM, c.key)
	return c, err
}

// writeCertificate puts the pair where an earlier one may be, as renewal does.
func writeCertificate(t *testing.T, dir string, c *certificate) (certFile, keyFile string) {
	t.Helper()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for name, data := range map[string][]byte{certFile: c.certPEM, keyFile: c.key} {
		if err := os.WriteFile(name+".new", data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}
