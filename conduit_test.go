package conduit_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

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
	case "sendfile":
		sendfileProgram()
	}
}

// Server

func TestNewReportsEveryFault(t *testing.T) {
	certFile, keyFile := writeCertificate(t, t.TempDir(), newCertificate(t, "a.test"))
	otherCert, _ := writeCertificate(t, t.TempDir(), newCertificate(t, "b.test"))
	h := http.NotFoundHandler()
	tests := []struct {
		name string
		cfg  *conduit.Config
		want []string // prefixes of the lines of the error
	}{
		{"nil", nil, []string{"conduit: Handler: "}},
		{"no handler", &conduit.Config{}, []string{"conduit: Handler: "}},
		{"address without port", &conduit.Config{Handler: h, Address: "localhost"}, []string{"conduit: Address: "}},
		{"address with unknown port", &conduit.Config{Handler: h, Address: ":no-such-service"}, []string{"conduit: Address: "}},
		{"negative header", &conduit.Config{Handler: h, MaxHeaderBytes: -1}, []string{"conduit: MaxHeaderBytes: "}},
		{"old TLS", &conduit.Config{Handler: h, MinTLSVersion: tls.VersionTLS11}, []string{"conduit: MinTLSVersion: "}},
		{"unknown TLS", &conduit.Config{Handler: h, MinTLSVersion: 0x0999}, []string{"conduit: MinTLSVersion: "}},
		{"cert alone", &conduit.Config{Handler: h, CertFile: certFile}, []string{"conduit: KeyFile: "}},
		{"key alone", &conduit.Config{Handler: h, KeyFile: keyFile}, []string{"conduit: CertFile: "}},
		{"missing files", &conduit.Config{Handler: h, CertFile: "no/cert", KeyFile: "no/key"}, []string{"conduit: CertFile: ", "conduit: KeyFile: "}},
		{"mismatched files", &conduit.Config{Handler: h, CertFile: otherCert, KeyFile: keyFile}, []string{"conduit: CertFile, KeyFile: "}},
		{"TLS without certificate", &conduit.Config{Handler: h, TLSConfig: &tls.Config{}}, []string{"conduit: TLSConfig: "}},
		{"old TLSConfig", &conduit.Config{Handler: h, CertFile: certFile, KeyFile: keyFile, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS10}}, []string{"conduit: TLSConfig: MinVersion"}},
		{"unknown TLSConfig", &conduit.Config{Handler: h, CertFile: certFile, KeyFile: keyFile, TLSConfig: &tls.Config{MinVersion: 0x9999}}, []string{"conduit: TLSConfig: MinVersion"}},
		{"empty certificate", &conduit.Config{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{{}}}}, []string{"conduit: TLSConfig: certificate 1"}},
		{"suites without HTTP/2's", &conduit.Config{Handler: h, EnableHTTP2: true, CertFile: certFile, KeyFile: keyFile, TLSConfig: &tls.Config{CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}}}, []string{"conduit: TLSConfig: CipherSuites"}},
		{"TLSConfig upside down", &conduit.Config{Handler: h, CertFile: certFile, KeyFile: keyFile, MinTLSVersion: tls.VersionTLS13, TLSConfig: &tls.Config{MaxVersion: tls.VersionTLS12}}, []string{"conduit: TLSConfig: MaxVersion"}},
		{"database without DB", &conduit.Config{Handler: h, Database: &conduit.DatabaseConfig{}}, []string{"conduit: DB: "}},
		{
			"all at once",
			&conduit.Config{Address: "x", MaxHeaderBytes: -1, MinTLSVersion: 1, CertFile: "no/cert", KeyFile: "no/key", Database: &conduit.DatabaseConfig{MaxOpenConns: 1, MaxIdleConns: 2}},
			[]string{"conduit: Handler: ", "conduit: Address: ", "conduit: MaxHeaderBytes: ", "conduit: MinTLSVersion: ", "conduit: DB: ", "conduit: MaxIdleConns: ", "conduit: CertFile: ", "conduit: KeyFile: "},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv, err := conduit.New(tt.cfg)
			if err == nil || srv != nil {
				t.Fatalf("New = %v, %v; want nil and an error", srv, err)
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(tt.want) {
				t.Fatalf("got %d faults, want %d:\n%v", len(lines), len(tt.want), err)
			}
			for i, want := range tt.want {
				if !strings.HasPrefix(lines[i], want) {
					t.Errorf("fault %d = %q, want it to begin with %q", i, lines[i], want)
				}
			}
		})
	}
}

func TestNewFillsInDefaultsAndKeepsNegatives(t *testing.T) {
	h := http.NotFoundHandler()
	tests := []struct {
		name                            string
		cfg                             *conduit.Config
		read, readHeader, write, idle   time.Duration
		maxHeaderBytes                  int
		http2, unencryptedHTTP2, http11 bool
	}{
		{"zero", &conduit.Config{Handler: h}, 15 * time.Second, 10 * time.Second, 15 * time.Second, time.Minute, 1 << 20, false, false, true},
		{"DefaultConfig", conduit.DefaultConfig(h), 15 * time.Second, 10 * time.Second, 15 * time.Second, time.Minute, 1 << 20, true, false, true},
		{
			"negative",
			&conduit.Config{Handler: h, ReadTimeout: -1, ReadHeaderTimeout: -1, WriteTimeout: -1, IdleTimeout: -1, EnableH2C: true},
			-1, -1, -1, -1, 1 << 20, false, true, true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv, err := conduit.New(tt.cfg)
			if err != nil {
				t.Fatal(err)
			}
			hs := srv.HTTPServer()
			if hs.ReadTimeout != tt.read || hs.ReadHeaderTimeout != tt.readHeader || hs.WriteTimeout != tt.write || hs.IdleTimeout != tt.idle {
				t.Errorf("timeouts = %v %v %v %v, want %v %v %v %v", hs.ReadTimeout, hs.ReadHeaderTimeout, hs.WriteTimeout, hs.IdleTimeout, tt.read, tt.readHeader, tt.write, tt.idle)
			}
			if hs.MaxHeaderBytes != tt.maxHeaderBytes {
				t.Errorf("MaxHeaderBytes = %d, want %d", hs.MaxHeaderBytes, tt.maxHeaderBytes)
			}
			if p := hs.Protocols; p.HTTP1() != tt.http11 || p.HTTP2() != tt.http2 || p.UnencryptedHTTP2() != tt.unencryptedHTTP2 {
				t.Errorf("Protocols = %v", p)
			}
			if hs.Addr != ":8080" {
				t.Errorf("Addr = %q, want :8080", hs.Addr)
			}
		})
	}
}

func TestNewCopiesItsConfig(t *testing.T) {
	cfg := conduit.DefaultConfig(textHandler("before"))
	srv, err := conduit.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Handler = textHandler("after")
	url := serve(t, srv)
	if got := get(t, http.DefaultClient, url).body; got != "before" {
		t.Errorf("body = %q, want the handler that New was given", got)
	}
}

func TestServerSpeaksEachProtocol(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		srv := p.server(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, r.Proto)
		})})
		url := p.serve(t, srv)
		if got := get(t, p.client(t), url).body; got != p.proto {
			t.Errorf("server saw %s, want %s", got, p.proto)
		}
	})
}

func TestHTTP2IsOffWhereItIsNotEnabled(t *testing.T) {
	t.Run("TLS", func(t *testing.T) {
		srv := newServer(t, &conduit.Config{Handler: http.NotFoundHandler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{testCertificate().pair}}})
		addr := strings.TrimPrefix(serve(t, srv), "http://")
		conn, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: testCertificate().pool, ServerName: "conduit.test", NextProtos: []string{"h2", "http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
			t.Errorf("negotiated %q, want http/1.1", got)
		}
	})
	t.Run("cleartext", func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		url := serve(t, srv)
		if res, err := h2cProtocol.client(t).Get(url); err == nil {
			t.Errorf("an h2c client got %s, want an error", res.Status)
		}
	})
}

func TestAddrIsTheRealPort(t *testing.T) {
	srv := newServer(t, &conduit.Config{Address: "127.0.0.1:0", Handler: textHandler("ok")})
	if got := srv.Addr(); got != nil {
		t.Fatalf("Addr before serving = %v, want nil", got)
	}
	served := make(chan error, 1)
	listening := make(chan struct{})
	srv.HTTPServer().BaseContext = func(net.Listener) context.Context { close(listening); return context.Background() }
	go func() { served <- srv.ListenAndServe() }()
	<-listening
	if got := get(t, http.DefaultClient, "http://"+srv.Addr().String()).body; got != "ok" {
		t.Errorf("body = %q", got)
	}
	if err := srv.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Errorf("ListenAndServe = %v, want nil", err)
	}
}

func TestListenAndServeNamesATakenAddress(t *testing.T) {
	l := listen(t)
	srv := newServer(t, &conduit.Config{Address: l.Addr().String(), Handler: http.NotFoundHandler()})
	err := srv.ListenAndServe()
	if err == nil || !strings.HasPrefix(err.Error(), "conduit: Address: ") || !strings.Contains(err.Error(), l.Addr().String()) || !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("ListenAndServe = %v, want an error that names %v", err, l.Addr())
	}
	if srv.Addr() != nil {
		t.Errorf("Addr = %v, want nil", srv.Addr())
	}
}

// net/http fails for want of a certificate before it accepts, and leaves the
// listener open.
func TestServeClosesItsListener(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
	srv.HTTPServer().TLSConfig = &tls.Config{}
	l := listen(t)
	if err := srv.Serve(l); err == nil {
		t.Error("Serve without a certificate returned nil")
	}
	if conn, err := net.Dial("tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("the listener was left open")
	}
	if err := srv.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestServeReportsAListenerThatFails(t *testing.T) {
	l := listen(t)
	srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
	l.Close()
	if err := srv.Serve(l); err == nil || !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve = %v, want net.ErrClosed", err)
	}
}

// net/http gives a server without TLS a TLSConfig as soon as it serves.
func TestServeOnSeveralListeners(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
	first := serve(t, srv)
	for range 2 {
		if got := get(t, http.DefaultClient, first); got.body != "ok" {
			t.Errorf("first listener: %+v", got)
		}
		if got := get(t, http.DefaultClient, serve(t, srv)); got.body != "ok" {
			t.Errorf("another listener: %+v", got)
		}
	}
	if got, want := "http://"+srv.Addr().String(), first; got != want {
		t.Errorf("Addr = %s, want the first, %s", got, want)
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
		served := make(chan error, 1)
		go func() { served <- srv.Serve(l) }()
		replied := make(chan reply, 1)
		client := l.client(t)
		go func() { replied <- get(t, client, "http://conduit.test/") }()
		<-started
		stopped := make(chan error, 1)
		go func() { stopped <- srv.Shutdown(context.Background()) }()
		time.Sleep(5 * time.Second) // of the bubble's time: the shutdown now waits for the handler alone
		synctest.Wait()
		select {
		case err := <-served:
			t.Fatalf("Serve returned %v while a request was being served", err)
		case err := <-stopped:
			t.Fatalf("Shutdown returned %v while a request was being served", err)
		default:
		}
		close(finish)
		if got := <-replied; got.body != "done" || !got.close {
			t.Errorf("reply = %+v, want done with Connection: close", got)
		}
		if err := <-stopped; err != nil {
			t.Errorf("Shutdown = %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("Serve = %v, want nil", err)
		}
	})
}

func TestStoppingOutOfOrderIsHarmless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Errorf("Shutdown before Serve = %v", err)
		}
		l := newPipeListener()
		if err := srv.Serve(l); err != nil {
			t.Errorf("Serve after Shutdown = %v, want nil", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the listener was left open: %v", err)
		}
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Errorf("second Shutdown = %v", err)
		}
		if err := srv.Close(); err != nil {
			t.Errorf("Close after Shutdown = %v", err)
		}
		srv.Drain()
		srv.Drain()
	})
}

func TestShutdownAndCloseTogether(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			release := make(chan struct{})
			srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				select {
				case <-r.Context().Done():
				case <-release:
				}
			})))
			l := newPipeListener()
			var all sync.WaitGroup
			all.Go(func() {
				if err := srv.Serve(l); err != nil {
					t.Errorf("Serve = %v", err)
				}
			})
			conn := l.dial()
			defer conn.Close()
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: conduit.test\r\n\r\n")
			for range 3 {
				all.Go(func() { srv.Shutdown(context.Background()) })
				all.Go(func() { srv.Close() })
			}
			all.Wait()
			close(release)
		})
	}
}

func TestHTTPServerHooksAreCalledNotReplaced(t *testing.T) {
	type key struct{}
	srv := newServer(t, conduit.DefaultConfig(textHandler("from Config")))
	hs := srv.HTTPServer()
	var states atomic.Int64
	hs.ConnState = func(net.Conn, http.ConnState) { states.Add(1) }
	hs.BaseContext = func(net.Listener) context.Context { return context.WithValue(context.Background(), key{}, "value") }
	hs.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Context().Value(key{}), " ", conduit.Draining(r.Context()) != nil)
	})
	if got, want := get(t, http.DefaultClient, serve(t, srv)).body, "value true"; got != want {
		t.Errorf("body = %q, want %q", got, want)
	}
	if states.Load() == 0 {
		t.Error("ConnState was not called")
	}
}

func TestTLSRefusesWhatIsWeak(t *testing.T) {
	cert := testCertificate()
	srv := newServer(t, &conduit.Config{Handler: http.NotFoundHandler(), TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert.pair}}})
	addr := strings.TrimPrefix(serve(t, srv), "http://")
	tests := []struct {
		name   string
		client *tls.Config
		ok     bool
	}{
		{"TLS 1.1", &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		{"TLS 1.2 with GCM", &tls.Config{MaxVersion: tls.VersionTLS12}, true},
		{"TLS 1.2 with CBC alone", &tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA}}, false},
		{"TLS 1.3", &tls.Config{MinVersion: tls.VersionTLS13}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.client.Clone()
			c.RootCAs, c.ServerName = cert.pool, "conduit.test"
			conn, err := tls.Dial("tcp", addr, c)
			if err == nil {
				conn.Close()
			}
			if (err == nil) != tt.ok {
				t.Errorf("handshake: %v, want success %v", err, tt.ok)
			}
		})
	}
}

func TestMinTLSVersionIsKept(t *testing.T) {
	cert := testCertificate()
	certFile, keyFile := writeCertificate(t, t.TempDir(), cert)
	other := newCertificate(t, "other.test")
	tests := []struct {
		name string
		cfg  *conduit.Config
	}{
		{"MinTLSVersion", &conduit.Config{MinTLSVersion: tls.VersionTLS13}},
		{"TLSConfig.MinVersion", &conduit.Config{TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13}}},
		{"GetConfigForClient", &conduit.Config{MinTLSVersion: tls.VersionTLS13, TLSConfig: &tls.Config{
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
				return &tls.Config{MinVersion: tls.VersionTLS10, Certificates: []tls.Certificate{other.pair}}, nil
			},
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.Handler, tt.cfg.CertFile, tt.cfg.KeyFile = http.NotFoundHandler(), certFile, keyFile
			addr := strings.TrimPrefix(serve(t, newServer(t, tt.cfg)), "http://")
			client := &tls.Config{RootCAs: cert.pool, ServerName: "conduit.test"}
			conn, err := tls.Dial("tcp", addr, client)
			if err != nil {
				t.Fatal(err) // CertFile's certificate has to be the one
			}
			conn.Close()
			client.MaxVersion = tls.VersionTLS12
			if conn, err := tls.Dial("tcp", addr, client); err == nil {
				conn.Close()
				t.Error("a TLS 1.2 client was let in")
			}
		})
	}
}

func TestCertificateFilesWinAndAreReadAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second, third := newCertificate(t, "first.test"), newCertificate(t, "second.test"), newCertificate(t, "third.test")
		dir := t.TempDir()
		certFile, keyFile := writeCertificate(t, dir, first)
		var logs logBuffer
		srv := newServer(t, &conduit.Config{
			Handler: http.NotFoundHandler(), CertFile: certFile, KeyFile: keyFile, Logger: logs.logger(),
			TLSConfig: &tls.Config{Certificates: []tls.Certificate{third.pair}},
		})
		l := newPipeListener()
		serveBubble(t, srv, l)
		served := func() string {
			t.Helper()
			conn := tls.Client(l.dial(), &tls.Config{InsecureSkipVerify: true}) // no server name: there Certificates would win
			defer conn.Close()
			if err := conn.Handshake(); err != nil {
				t.Fatal(err)
			}
			return conn.ConnectionState().PeerCertificates[0].DNSNames[0]
		}
		want := func(name string) {
			t.Helper()
			if got := served(); got != name {
				t.Fatalf("served the certificate of %s, want %s", got, name)
			}
		}
		want("first.test")
		writeCertificate(t, dir, second)
		want("first.test") // not looked at twice in a second
		time.Sleep(time.Second)
		want("second.test")
		if n := len(logs.find("certificate reloaded")); n != 1 {
			t.Errorf("%d lines say that the certificate was reloaded, want 1", n)
		}

		os.WriteFile(certFile, []byte("half a cert"), 0o600)
		for range 5 {
			time.Sleep(2 * time.Second)
			want("second.test")
		}
		if n := len(logs.find("certificate not reloaded, the old one stays in service")); n != 1 {
			t.Errorf("%d lines about one broken pair, want 1", n)
		}
		os.Remove(keyFile)
		time.Sleep(2 * time.Second)
		want("second.test")
		if n := len(logs.find("certificate not reloaded, the old one stays in service")); n != 2 {
			t.Errorf("%d lines about two broken pairs, want 2", n)
		}
		writeCertificate(t, dir, third)
		time.Sleep(2 * time.Second)
		want("third.test")
	})
}

func TestErrorLogHasLevels(t *testing.T) {
	var logs logBuffer
	srv := newServer(t, &conduit.Config{
		Logger:    logs.logger(),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{testCertificate().pair}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/panic":
				panic("for the log")
			case "/twice":
				w.WriteHeader(http.StatusOK)
				w.WriteHeader(http.StatusAccepted)
			}
		}),
	})
	url := strings.Replace(serve(t, srv), "http://", "https://", 1)
	client := tlsClient(t, false)

	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if res, err := client.Get(url + "/panic"); err == nil {
		t.Errorf("a handler that panicked was answered %s", res.Status)
	}
	get(t, client, url+"/twice")
	if _, err := http.Get(strings.Replace(url, "https://", "http://", 1)); err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct{ text, level string }{
		{"TLS handshake error from 127.0.0.1", "DEBUG"},
		{"http: panic serving", "ERROR"},
		{"superfluous response.WriteHeader", "WARN"},
		{"client sent an HTTP request to an HTTPS server", "WARN"},
	} {
		line := logs.wait(t, func(line map[string]any) bool {
			text, _ := line["err"].(string)
			return line["msg"] == "net/http" && strings.Contains(text, tt.text) && line["level"] == tt.level
		})
		if line == nil {
			t.Errorf("no line at level %s says %q:\n%s", tt.level, tt.text, logs.String())
		}
	}
}

func TestErrorLogLevelsByPrefix(t *testing.T) {
	tests := []struct{ text, level string }{
		{"http: TLS handshake error from 1.2.3.4:5: EOF", "DEBUG"},
		{"http: TLS handshake error from 1.2.3.4:5: read tcp 1.1.1.1:443->1.2.3.4:5: read: connection reset by peer", "DEBUG"},
		{"http: TLS handshake error from 1.2.3.4:5: read tcp 1.1.1.1:443->1.2.3.4:5: i/o timeout", "DEBUG"},
		{"http: TLS handshake error from 1.2.3.4:5: tls: no cipher suite supported by both client and server", "WARN"},
		{"http: Accept error: accept tcp: too many open files; retrying in 5ms", "ERROR"},
		{"http: panic serving 1.2.3.4:5: boom\ngoroutine 1 [running]:", "ERROR"},
		{"http2: panic serving 1.2.3.4:5: boom\ngoroutine 1 [running]:", "ERROR"},
		{"http: superfluous response.WriteHeader call from main.f", "WARN"},
	}
	for _, tt := range tests {
		var logs logBuffer
		srv := newServer(t, &conduit.Config{Handler: http.NotFoundHandler(), Logger: logs.logger()})
		srv.HTTPServer().ErrorLog.Print(tt.text)
		if lines := logs.lines(); len(lines) != 1 || lines[0]["level"] != tt.level || lines[0]["err"] != tt.text || lines[0]["msg"] != "net/http" {
			t.Errorf("%q was logged as %v, want level %s", tt.text, lines, tt.level)
		}
	}
}

func TestSlowHeadersAreCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		l := newPipeListener()
		serveBubble(t, srv, l)
		var clients sync.WaitGroup
		for range 100 {
			clients.Go(func() {
				conn := l.dial()
				defer conn.Close()
				go io.Copy(io.Discard, conn)
				start := time.Now()
				for _, b := range []byte("GET / HTTP/1.1\r\nHost: conduit.test\r\nX-Slow: yes\r\n") {
					if _, err := conn.Write([]byte{b}); err != nil {
						break
					}
					time.Sleep(time.Second)
				}
				if open := time.Since(start); open > 12*time.Second {
					t.Errorf("a slow header held its connection for %v, want about 10 s", open)
				}
			})
		}
		clients.Wait()
	})
}

func TestHeadersThatAreTooLargeGet431(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		srv := p.server(t, &conduit.Config{Handler: textHandler("ok"), MaxHeaderBytes: 8 << 10})
		url := p.serve(t, srv)
		req, _ := http.NewRequest("GET", url, nil)
		size := 13 << 10 // HTTP/1 lets 4096 bytes more through
		if !p.http1 {
			size = 8<<10 + 100 // far more than the limit gets a GOAWAY
		}
		req.Header.Set("X-Large", strings.Repeat("x", size))
		res, err := p.client(t).Do(req)
		switch {
		case err == nil:
			res.Body.Close()
			if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
				t.Errorf("status = %d, want 431", res.StatusCode)
			}
		case p.http1 || !strings.Contains(err.Error(), "larger than peer's advertised limit"):
			// An HTTP/2 client that has the server's settings by now does not ask.
			t.Error(err)
		}
		if got := get(t, p.client(t), url); got.body != "ok" {
			t.Errorf("afterwards %+v, want ok", got)
		}
	})
}

// A write that comes too late would land in a buffer that net/http has given
// to another request, and on HTTP/2 it would crash the process.
func TestLateWritesHarmNobody(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		returned, done := make(chan struct{}), make(chan []error, 1)
		srv := p.server(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/late" {
				io.WriteString(w, "ok")
				return
			}
			go func() {
				<-returned
				w.Header().Set("X-Late", "1")
				w.WriteHeader(http.StatusTeapot)
				var errs []error
				_, err := w.Write([]byte("late"))
				errs = append(errs, err)
				_, err = io.WriteString(w, "late")
				errs = append(errs, err)
				_, err = w.(io.ReaderFrom).ReadFrom(strings.NewReader("late"))
				rc := http.NewResponseController(w)
				errs = append(errs, err, rc.Flush(), rc.SetWriteDeadline(time.Unix(1, 0)), rc.SetReadDeadline(time.Unix(1, 0)), rc.EnableFullDuplex())
				_, _, err = http.NewResponseController(w).Hijack()
				done <- append(errs, err)
			}()
		})})
		url, client := p.serve(t, srv), p.client(t)
		get(t, client, url+"/late")
		close(returned)
		for i, err := range <-done {
			if err == nil {
				t.Errorf("late use %d was let through", i)
			}
		}
		if got := get(t, client, url); got.body != "ok" {
			t.Errorf("the next reply = %+v, want ok", got)
		}
	})
}

func TestInformationalRepliesPass(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, limit := range timeouts {
			t.Run(limit.name, func(t *testing.T) {
				var logs logBuffer
				chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(time.Minute))
				srv := p.server(t, &conduit.Config{Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Link", "</style.css>; rel=preload")
					w.WriteHeader(http.StatusEarlyHints)
					w.WriteHeader(http.StatusNotFound)
				}))})
				var hints []string
				url := p.serve(t, srv)
				req, _ := http.NewRequestWithContext(traceInformational(t.Context(), &hints), "GET", url, nil)
				res, err := p.client(t).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				res.Body.Close()
				if res.StatusCode != http.StatusNotFound || !slices.Equal(hints, []string{"103 </style.css>; rel=preload"}) {
					t.Errorf("status %d after %q, want 404 after the hint", res.StatusCode, hints)
				}
				if line := logs.request(t); line["status"] != 404.0 {
					t.Errorf("logged status %v, want 404", line["status"])
				}
			})
		}
	})
}

// A source that fails before its first byte leaves the status to the handler.
func TestReadFromLeavesTheStatusOpen(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, limit := range append(timeouts, noTimeout) {
		t.Run(limit.name, func(t *testing.T) {
			var logs logBuffer
			srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.Logging(), limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				unreadable, err := os.OpenFile(name, os.O_WRONLY, 0)
				if err != nil {
					panic(err)
				}
				defer unreadable.Close()
				w.Header().Set("X-Handler", "1")
				for _, src := range []io.Reader{unreadable, struct{ io.Reader }{unreadable}} {
					if _, err := io.Copy(w, src); err == nil {
						t.Error("a file opened for writing was read")
					}
				}
				http.Error(w, "gone", http.StatusBadGateway)
			}))})
			if got := get(t, http.DefaultClient, serve(t, srv)); got.status != http.StatusBadGateway {
				t.Errorf("status = %d, want 502", got.status)
			}
			if line := logs.request(t); line["status"] != 502.0 {
				t.Errorf("logged status %v, want 502", line["status"])
			}
		})
	}
}

func TestFlushErrorIsReported(t *testing.T) {
	want := errors.New("flush")
	for _, limit := range append(timeouts, noTimeout) {
		t.Run(limit.name, func(t *testing.T) {
			var got error
			h := conduit.Chain(conduit.RequestID(), conduit.Logging(), limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got = http.NewResponseController(w).Flush()
				w.(http.Flusher).Flush()
			}))
			h.ServeHTTP(flushErrorWriter{httptest.NewRecorder(), want}, httptest.NewRequest("GET", "/", nil))
			if got != want {
				t.Errorf("Flush = %v, want %v", got, want)
			}
		})
	}
}

type flushErrorWriter struct {
	http.ResponseWriter
	err error
}

func (w flushErrorWriter) FlushError() error { return w.err }

// A wrapper that does not forward ReadFrom turns one sendfile into hundreds of
// writes.
func TestSendfileSurvivesTheChain(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace is not installed")
	}
	trace := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command(strace, "-f", "-e", "trace=sendfile", "-o", trace, os.Args[0])
	cmd.Env = append(os.Environ(), "CONDUIT_TEST_PROGRAM=sendfile")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	calls, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	var sent int
	for _, m := range regexp.MustCompile(`(?m)sendfile.* = (\d+)$`).FindAllSubmatch(calls, -1) {
		n, _ := strconv.Atoi(string(m[1]))
		sent += n
	}
	if sent < sendfileSize*9/10 {
		t.Errorf("sendfile sent %d bytes of %d:\n%s", sent, sendfileSize, calls)
	}
}

const sendfileSize = 8 << 20

// sendfileProgram sends one large file through the whole chain.
func sendfileProgram() {
	f, err := os.CreateTemp("", "conduit-sendfile-")
	if err != nil {
		panic(err)
	}
	os.Remove(f.Name())
	if err := f.Truncate(sendfileSize); err != nil {
		panic(err)
	}
	chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute), conduit.FastTimeout(time.Minute))
	srv, err := conduit.New(conduit.DefaultConfig(chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "large", time.Time{}, f)
	}))))
	if err != nil {
		panic(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go srv.Serve(l)
	res, err := http.Get("http://" + l.Addr().String())
	if err != nil {
		panic(err)
	}
	if n, err := io.Copy(io.Discard, res.Body); n != sendfileSize || err != nil {
		panic(fmt.Sprint(n, err))
	}
	srv.Close()
	os.Exit(0)
}

// Draining

func TestRepliesSayCloseOnceTheServerDrains(t *testing.T) {
	handlers := []struct {
		name  string
		reply func(w http.ResponseWriter)
	}{
		{"nothing", func(w http.ResponseWriter) {}},
		{"status", func(w http.ResponseWriter) { w.WriteHeader(http.StatusNoContent) }},
		{"header and text", func(w http.ResponseWriter) { w.Header().Set("X", "1"); io.WriteString(w, "text") }},
		{"flush", func(w http.ResponseWriter) { w.(http.Flusher).Flush() }},
		{"reader", func(w http.ResponseWriter) { io.Copy(w, strings.NewReader("text")) }},
		{"long", func(w http.ResponseWriter) { w.Write(make([]byte, 100_000)) }},
	}
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, tt := range handlers {
			t.Run(tt.name, func(t *testing.T) {
				started, proceed := make(chan struct{}, 1), make(chan struct{})
				srv := p.server(t, &conduit.Config{Handler: conduit.Chain(conduit.RequestID(), conduit.Logging(), conduit.Timeout(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path == "/wait" {
						started <- struct{}{}
						<-proceed
					}
					tt.reply(w)
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
				replied := make(chan reply, 1)
				go func() { replied <- get(t, client, url+"/wait") }()
				<-started
				srv.Drain()
				close(proceed)
				got := <-replied // begun before the drain
				if p.http1 && !got.close {
					t.Error("no Connection: close on a request from before the drain")
				}
				got = get(t, client, url)
				if p.http1 && !got.close {
					t.Error("no Connection: close on a request from during the drain")
				}
				// HTTP/2 says it with a GOAWAY: the next request dials.
				if n := conns.Load(); n < 2 {
					t.Errorf("%d connections, want a new one after the drain began", n)
				}
			})
		}
	})
}

func TestAnUpgradeIsNotToldToClose(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "test")
		w.WriteHeader(http.StatusSwitchingProtocols)
	})))
	url := serve(t, srv)
	srv.Drain()
	conn, br := rawDial(t, strings.TrimPrefix(url, "http://"))
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n")
	res, err := http.ReadResponse(br, nil)
	if err != nil || res.StatusCode != 101 || res.Header.Get("Connection") != "Upgrade" {
		t.Errorf("got %v, %v; want 101 with Connection: Upgrade", res, err)
	}
}

// A writer that cannot flush has begun nothing.
func TestFlushThatIsNotSupportedLeavesTheStatusOpen(t *testing.T) {
	var logs logBuffer
	old := slog.Default()
	slog.SetDefault(logs.logger())
	defer slog.SetDefault(old)
	rec := httptest.NewRecorder()
	h := conduit.Chain(conduit.Recovery(), conduit.Logging())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("Flush = %v, want http.ErrNotSupported", err)
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	h.ServeHTTP(struct{ http.ResponseWriter }{rec}, httptest.NewRequest("GET", "/", nil))
	if line := logs.request(t); rec.Code != 404 || line["status"] != 404.0 {
		t.Errorf("replied %d, logged %v; want 404", rec.Code, line)
	}
}

func TestDrainingAndLoggerOutsideAServer(t *testing.T) {
	if c := conduit.Draining(t.Context()); c != nil {
		t.Errorf("Draining = %v, want nil", c)
	}
	if l := conduit.Logger(t.Context()); l != slog.Default() {
		t.Errorf("Logger = %v, want slog.Default()", l)
	}
	if id := conduit.RequestIDFrom(t.Context()); id != "" {
		t.Errorf("RequestIDFrom = %q, want none", id)
	}
}

func TestDrainingCloses(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-conduit.Draining(r.Context()):
			t.Error("Draining was closed before the drain")
		default:
		}
		close(started)
		<-conduit.Draining(r.Context())
		close(ended)
	})))
	url := serve(t, srv)
	go get(t, http.DefaultClient, url)
	<-started
	srv.Drain()
	<-ended
}

func TestLoggerIsTheServersWithTheID(t *testing.T) {
	var logs logBuffer
	srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conduit.Logger(r.Context()).Info("hello")
	}))})
	req, _ := http.NewRequest("GET", serve(t, srv), nil)
	req.Header.Set("X-Request-ID", "abc")
	do(t, http.DefaultClient, req)
	if lines := logs.find("hello"); len(lines) != 1 || lines[0]["request_id"] != "abc" {
		t.Errorf("logged %v, want one line with request_id abc", lines)
	}
}

func TestHealth(t *testing.T) {
	failing := func(context.Context) error { return errors.New("secret: disk full") }
	ok := func(context.Context) error { return nil }
	tests := []struct {
		name   string
		method string
		drain  bool
		checks []func(context.Context) error
		status int
		body   string
		logged int
	}{
		{"no checks", "GET", false, nil, 200, `{"status":"ok"}`, 0},
		{"passing", "GET", false, []func(context.Context) error{ok, ok}, 200, `{"status":"ok"}`, 0},
		{"failing", "GET", false, []func(context.Context) error{ok, failing}, 503, `{"status":"failing"}`, 1},
		{"draining", "GET", true, []func(context.Context) error{failing}, 503, `{"status":"draining"}`, 0},
		{"HEAD", "HEAD", false, nil, 200, "", 0},
		{"HEAD failing", "HEAD", false, []func(context.Context) error{failing}, 503, "", 1},
		{"POST", "POST", false, nil, 405, "Method Not Allowed\n", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var logs logBuffer
			srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Health(tt.checks...)})
			url := serve(t, srv)
			if tt.drain {
				srv.Drain()
			}
			req, _ := http.NewRequest(tt.method, url, nil)
			got := do(t, http.DefaultClient, req)
			if got.status != tt.status || got.body != tt.body {
				t.Errorf("%s = %d %q, want %d %q", tt.method, got.status, got.body, tt.status, tt.body)
			}
			if tt.status == 405 {
				if allow := got.header.Get("Allow"); allow != "GET, HEAD" {
					t.Errorf("Allow = %q", allow)
				}
			} else if got.header.Get("Cache-Control") != "no-store" || got.header.Get("Content-Type") != "application/json" {
				t.Errorf("header = %v, want no-store and application/json", got.header)
			}
			lines := logs.find("health check failed")
			if len(lines) != tt.logged {
				t.Errorf("%d lines about failing checks, want %d", len(lines), tt.logged)
			}
			for _, line := range lines {
				if !strings.Contains(line["err"].(string), "disk full") {
					t.Errorf("the log does not say why: %v", line)
				}
			}
		})
	}
}

func TestHealthGivesUpOnChecksThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := conduit.Health(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		rec := httptest.NewRecorder()
		start := time.Now()
		h.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", "/health", nil))
		if took := time.Since(start); rec.Code != 503 || took != 5*time.Second {
			t.Errorf("%d after %v, want 503 after 5s", rec.Code, took)
		}
	})
}

func TestProgrammersMistakesPanic(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
	tests := []struct {
		name string
		want string
		call func()
	}{
		{"nil check", "conduit: Health: check 2", func() { conduit.Health(func(context.Context) error { return nil }, nil) }},
		{"nil middleware", "conduit: Chain: middleware 1", func() { conduit.Chain(nil) }},
		{"no duration", "conduit: Duration: ", func() { conduit.Timeout(0) }},
		{"negative duration", "conduit: Duration: ", func() { conduit.FastTimeout(-1) }},
		{"nil timeout", "conduit: Duration: ", func() { conduit.TimeoutWith(nil) }},
		{"status that is no error", "conduit: Status: ", func() { conduit.TimeoutWith(&conduit.TimeoutConfig{Duration: 1, Status: 200}) }},
		{"nil hook", "conduit: RegisterHook: ", func() { conduit.NewGracefulShutdown(srv, nil).RegisterHook(nil) }},
		{"nil server", "conduit: NewGracefulShutdown: ", func() { conduit.NewGracefulShutdown(nil, nil) }},
		{"no time to drain", "conduit: Timeout: 1s leaves no time to drain beside Delay, 600ms, and HookTimeout, 400ms", func() {
			conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Timeout: time.Second, Delay: 600 * time.Millisecond, HookTimeout: 400 * time.Millisecond})
		}},
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
	h := conduit.Chain(mark("a"), conduit.Chain(mark("b"), mark("c")), mark("d"))(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { order = append(order, "h") }))
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if got := strings.Join(order, ""); got != "abcdh" {
		t.Errorf("order = %s, want abcdh", got)
	}
	if h := conduit.Chain()(textHandler("bare")); h == nil {
		t.Error("an empty chain lost its handler")
	}
}

func TestRequestIDKeepsWhatIsSane(t *testing.T) {
	long := strings.Repeat("a", 128)
	tests := []struct {
		name string
		in   []string
		keep bool
	}{
		{"none", nil, false},
		{"sane", []string{"A-z_0.9"}, true},
		{"longest", []string{long}, true},
		{"too long", []string{long + "a"}, false},
		{"empty", []string{""}, false},
		{"newline", []string{"a\nlevel=ERROR"}, false},
		{"space", []string{"a b"}, false},
		{"quote", []string{`a"b`}, false},
		{"not ASCII", []string{"ä"}, false},
		{"NUL", []string{"a\x00"}, false},
		{"two", []string{"a", "b"}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var inContext string
			h := conduit.RequestID()(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { inContext = conduit.RequestIDFrom(r.Context()) }))
			req := httptest.NewRequest("GET", "/", nil)
			if tt.in != nil {
				req.Header["X-Request-Id"] = tt.in
			}
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, req)
			got := rec.Header()["X-Request-Id"]
			if len(got) != 1 || got[0] != inContext {
				t.Fatalf("reply has %q, context %q; want the same one", got, inContext)
			}
			if kept := len(tt.in) > 0 && got[0] == tt.in[0]; kept != tt.keep {
				t.Errorf("%q became %q, want kept %v", tt.in, got[0], tt.keep)
			}
			if !tt.keep && !regexp.MustCompile(`^[A-Z2-7]{26}$`).MatchString(got[0]) {
				t.Errorf("new id %q, want 26 letters and digits", got[0])
			}
		})
	}
}

func TestRequestIDsDifferAndNest(t *testing.T) {
	seen := map[string]bool{}
	h := conduit.Chain(conduit.RequestID(), conduit.RequestID())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := conduit.RequestIDFrom(r.Context())
		if seen[id] {
			t.Errorf("id %q twice", id)
		}
		seen[id] = true
	}))
	for range 100 {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		if id := rec.Header().Get("X-Request-ID"); !seen[id] {
			t.Errorf("the reply's id %q is not the context's", id)
		}
	}
}

func FuzzRequestID(f *testing.F) {
	for _, seed := range []string{"", "abc", "a\nb", "a b", strings.Repeat("x", 129), "\x00", "é", "._-"} {
		f.Add(seed)
	}
	sane := regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)
	h := conduit.RequestID()(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	f.Fuzz(func(t *testing.T, in string) {
		req := httptest.NewRequest("GET", "/", nil)
		req.Header.Set("X-Request-ID", in)
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		got := rec.Header().Get("X-Request-ID")
		if !sane.MatchString(got) {
			t.Errorf("%q became %q, which is not sane", in, got)
		}
		if sane.MatchString(in) != (got == in) {
			t.Errorf("%q became %q", in, got)
		}
	})
}

// A context that outlives its request must still answer.
func TestRequestContextOutlivesItsRequest(t *testing.T) {
	type key struct{}
	var kept context.Context
	h := conduit.Chain(conduit.RequestID(), conduit.Timeout(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kept = context.WithValue(context.WithoutCancel(r.Context()), key{}, "v")
	}))
	for _, id := range []string{"first", "second"} {
		req := httptest.NewRequest("GET", "/", nil)
		req.Header.Set("X-Request-ID", id)
		before := kept
		h.ServeHTTP(httptest.NewRecorder(), req)
		if before != nil && conduit.RequestIDFrom(before) != "first" {
			t.Errorf("the first request's context now says %q", conduit.RequestIDFrom(before))
		}
	}
}

// net/http removes a form's temporary files, and whoever logs reads the
// pattern, on the request that they know (golang/go#58809).
func TestWhatTheHandlerSetsOnItsRequestIsCopiedBack(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	for _, limit := range append(timeouts, noTimeout) {
		t.Run(limit.name, func(t *testing.T) {
			var logs logBuffer
			mux := http.NewServeMux()
			var files int
			mux.HandleFunc("POST /upload/{name}", func(w http.ResponseWriter, r *http.Request) {
				if err := r.ParseMultipartForm(1); err != nil {
					t.Error(err)
				}
				entries, _ := os.ReadDir(dir)
				files = len(entries)
				if r.PathValue("name") == "panic" {
					panic("after parsing")
				}
			})
			h := conduit.Chain(conduit.Logging(), conduit.Recovery(), conduit.RequestID(), limit.new(time.Minute))(mux)
			url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
			for _, name := range []string{"ok", "panic"} {
				body, contentType := multipartBody(t)
				req, _ := http.NewRequest("POST", url+"/upload/"+name, body)
				req.Header.Set("Content-Type", contentType)
				do(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, req)
				if files != 1 {
					t.Fatalf("%d temporary files while the handler ran, want 1", files)
				}
				line := logs.wait(t, func(line map[string]any) bool { return line["path"] == "/upload/"+name && line["msg"] == "request" })
				if line == nil || line["pattern"] != "POST /upload/{name}" {
					t.Errorf("logged %v, want the pattern", line)
				}
				// The files go right after the reply.
				for deadline := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
					entries, _ := os.ReadDir(dir)
					if len(entries) == 0 {
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("%s: temporary files are left: %v", name, entries)
					}
				}
			}
		})
	}
}

func TestRecoveryAnswers500(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, tt := range []struct {
			name    string
			message string
			end     func()
		}{
			{"panic", "panic", func() { endByPanic("secret") }},
			{"error", "panic", func() { endByPanic(errors.New("secret")) }},
			{"nil", "panic", func() { endByPanic(nil) }},
			{"Goexit", "handler ended its goroutine", runtime.Goexit},
		} {
			for _, limit := range append(timeouts, noTimeout) {
				t.Run(tt.name+"/"+limit.name, func(t *testing.T) {
					var logs logBuffer
					h := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						w.Header().Set("Cache-Control", "max-age=3600")
						w.Header().Set("Etag", `"x"`)
						w.Header().Set("Content-Encoding", "gzip")
						w.Header().Set("Content-Length", "5000")
						tt.end()
					}))
					url := p.serve(t, p.server(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
					res, err := p.client(t).Get(url + "/path?token=secret")
					if err != nil {
						t.Fatal(err)
					}
					defer res.Body.Close()
					body, err := io.ReadAll(res.Body)
					if err != nil && !(tt.name == "Goexit" && !p.http1) { // HTTP/2 resets the stream after it
						t.Error(err)
					}
					if res.StatusCode != 500 || string(body) != "Internal Server Error\n" {
						t.Errorf("got %d %q, want a plain 500", res.StatusCode, body)
					}
					for _, field := range []string{"Cache-Control", "Etag", "Content-Encoding"} {
						if v := res.Header.Get(field); v != "" {
							t.Errorf("%s: %s is left of the reply that never was", field, v)
						}
					}
					lines := logs.find(tt.message)
					if len(lines) != 1 {
						t.Fatalf("%d lines %q, want 1:\n%s", len(lines), tt.message, logs.String())
					}
					line := lines[0]
					if line["level"] != "ERROR" || line["path"] != "/path" || line["request_id"] == nil {
						t.Errorf("logged %v", line)
					}
					if stack, _ := line["stack"].(string); tt.message == "panic" && !strings.Contains(stack, "endByPanic") {
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

func endByPanic(value any) { panic(value) }

func TestRecoveryCutsAReplyThatHasBegun(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		for _, value := range []any{"late panic", http.ErrAbortHandler} {
			for _, limit := range append(timeouts, noTimeout) {
				t.Run(fmt.Sprint(value)+"/"+limit.name, func(t *testing.T) {
					var logs logBuffer
					h := conduit.Chain(conduit.Recovery(), conduit.Logging(), limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						io.WriteString(w, "half")
						w.(http.Flusher).Flush()
						panic(value)
					}))
					url := p.serve(t, p.server(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
					res, err := p.client(t).Get(url)
					if err != nil {
						t.Fatal(err)
					}
					defer res.Body.Close()
					if body, err := io.ReadAll(res.Body); err == nil {
						t.Errorf("read %q as a whole reply, want an error", body)
					}
					if line := logs.request(t); line["status"] != 200.0 || line["aborted"] != true {
						t.Errorf("logged %v, want status 200, aborted", line)
					}
					want := 1
					if value == http.ErrAbortHandler {
						want = 0
					}
					if n := len(logs.find("panic")); n != want {
						t.Errorf("%d panics logged, want %d", n, want)
					}
					if n := len(logs.find("net/http")); n != 0 {
						t.Errorf("net/http logged too:\n%s", logs.String())
					}
				})
			}
		}
	})
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
			h := conduit.Chain(conduit.RequestID(), logging, limit.new(time.Minute))(mux)
			url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h}))
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
			if d, _ := line["duration"].(float64); d <= 0 {
				t.Errorf("duration = %v", line["duration"])
			}
			if remote, _ := line["remote"].(string); !strings.HasPrefix(remote, "127.0.0.1:") {
				t.Errorf("remote = %v", line["remote"])
			}
			if len(line) != len(want)+3 { // time, duration, remote
				t.Errorf("attributes %v, want no others than %v", line, want)
			}
			if strings.Contains(logs.String(), "secret") || len(logs.find("request")) != 1 {
				t.Errorf("logged:\n%s", logs.String())
			}
		})
	}
}

func TestLogLineStaysOneLine(t *testing.T) {
	var buf syncBuffer
	h := conduit.Chain(conduit.RequestID(), conduit.Logging())(http.NotFoundHandler())
	srv := newServer(t, &conduit.Config{Logger: slog.New(slog.NewTextHandler(&buf, nil)), Handler: h})
	addr := strings.TrimPrefix(serve(t, srv), "http://")
	conn, br := rawDial(t, addr)
	fmt.Fprint(conn, "GET /a%0alevel=ERROR%20msg=forged%0d%1b[31m HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\tb\r\n\r\n")
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 404 {
		t.Fatal(res, err)
	}
	srv.Shutdown(t.Context())
	for line := range strings.Lines(buf.String()) {
		if !strings.HasPrefix(line, "time=") || strings.ContainsAny(strings.TrimSuffix(line, "\n"), "\n\r\x1b") {
			t.Errorf("log line %q", line)
		}
		if strings.Contains(line, "msg=forged") && !strings.Contains(line, `path="/a\nlevel=ERROR msg=forged`) {
			t.Errorf("forged line %q", line)
		}
	}
	if !strings.Contains(buf.String(), "msg=request") {
		t.Errorf("no line for the request:\n%s", buf.String())
	}
}

func TestLogOfWhatHasNoReply(t *testing.T) {
	tests := []struct {
		name    string
		chain   []conduit.Middleware
		handler http.HandlerFunc
		status  float64
		aborted any
	}{
		{"nothing written", []conduit.Middleware{conduit.Logging()}, func(http.ResponseWriter, *http.Request) {}, 200, nil},
		{"panic without Recovery", []conduit.Middleware{conduit.Logging()}, func(http.ResponseWriter, *http.Request) { panic("x") }, 0, true},
		{"abort in Recovery", []conduit.Middleware{conduit.Recovery(), conduit.Logging()}, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, true},
		{"Recovery inside", []conduit.Middleware{conduit.Logging(), conduit.Recovery()}, func(http.ResponseWriter, *http.Request) { panic("x") }, 500, nil},
		{"panic beside Recovery", []conduit.Middleware{conduit.Logging(), panicAfter, conduit.Recovery()}, func(http.ResponseWriter, *http.Request) {}, 0, true},
		{"invalid status", []conduit.Middleware{conduit.Recovery(), conduit.Logging()}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(1000) }, 500, nil},
		{"hijacked", []conduit.Middleware{conduit.Recovery(), conduit.Logging()}, func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			conn.Close()
		}, 101, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var logs logBuffer
			srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(tt.chain...)(tt.handler)})
			if res, err := http.Get(serve(t, srv)); err == nil {
				res.Body.Close()
			}
			if line := logs.request(t); line["status"] != tt.status || line["aborted"] != tt.aborted {
				t.Errorf("logged %v, want status %v, aborted %v", line, tt.status, tt.aborted)
			}
		})
	}
}

func panicAfter(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r)
		panic("after the handler")
	})
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
		t.Run(name, func(t *testing.T) {
			var logs logBuffer
			h := conduit.Chain(conduit.RequestID(), conduit.Recovery(), between, conduit.RequestID(), conduit.Logging())(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { endByPanic("x") }))
			got := get(t, http.DefaultClient, serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: h})))
			ids := got.header["X-Request-Id"]
			if line := logs.request(t); got.status != 500 || line["status"] != 500.0 || len(ids) != 1 || line["request_id"] != ids[0] {
				t.Errorf("replied %d with id %v, logged %v; want the same", got.status, ids, line)
			}
		})
	}
}

func TestPartsWorkBetweenForeignWrappers(t *testing.T) {
	var logs logBuffer
	chain := conduit.Chain(foreign, conduit.RequestID(), foreign, conduit.Recovery(), foreign, conduit.Logging(), foreign, conduit.Timeout(time.Minute), foreign)
	flushed := make(chan struct{})
	h := chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if conduit.RequestIDFrom(r.Context()) != "id" {
			t.Errorf("RequestIDFrom = %q", conduit.RequestIDFrom(r.Context()))
		}
		io.Copy(w, strings.NewReader("first "))
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Error(err)
		}
		<-flushed
		io.WriteString(w, "second")
	}))
	old := slog.Default()
	slog.SetDefault(logs.logger())
	defer slog.SetDefault(old)
	plain := httptest.NewServer(h) // no conduit Server
	defer plain.Close()
	req, _ := http.NewRequest("GET", plain.URL, nil)
	req.Header.Set("X-Request-ID", "id")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 6)
	if _, err := io.ReadFull(res.Body, first); err != nil {
		t.Fatal(err)
	}
	close(flushed)
	rest, err := io.ReadAll(res.Body)
	if string(first)+string(rest) != "first second" || err != nil {
		t.Errorf("body %q%q, %v", first, rest, err)
	}
	if line := logs.request(t); line["status"] != 200.0 || line["bytes"] != 12.0 {
		t.Errorf("logged %v, want status 200 and 12 bytes", line)
	}
}

// Shutdown

// Four servers in turn serve one listening socket, under load from clients
// that send a request only once, on connections that they keep.
func TestRollingRestartLosesNoRequest(t *testing.T) {
	base := listen(t).(*net.TCPListener)
	share := func() net.Listener {
		f, err := base.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	var logs logBuffer
	cfg := &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), conduit.Timeout(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(w, r.Body)
	}))}
	run := func() (*conduit.GracefulShutdown, chan error) {
		g := conduit.NewGracefulShutdown(newServer(t, cfg), &conduit.ShutdownConfig{Delay: 250 * time.Millisecond, Signals: []os.Signal{}})
		done := make(chan error, 1)
		go func() { done <- g.Run(context.Background(), share()) }()
		return g, done
	}

	current, ended := run()
	var answered, lost atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 48 {
		clients.Go(func() {
			var conn net.Conn
			var br *bufio.Reader
			for n := 0; ; n++ {
				select {
				case <-stop:
					if conn != nil {
						conn.Close()
					}
					return
				default:
				}
				if conn == nil {
					var err error
					if conn, err = net.Dial("tcp", base.Addr().String()); err != nil {
						t.Error(err)
						return
					}
					br = bufio.NewReader(conn)
				}
				body := strconv.Itoa(n)
				_, err := fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				var res *http.Response
				if err == nil {
					res, err = http.ReadResponse(br, nil)
				}
				var got []byte
				if err == nil {
					got, err = io.ReadAll(res.Body)
				}
				if err != nil || string(got) != body {
					lost.Add(1)
					conn.Close()
					conn = nil
					continue
				}
				answered.Add(1)
				if res.Close {
					conn.Close()
					conn = nil
				}
			}
		})
	}
	for range 3 {
		for before := answered.Load(); answered.Load() < before+500; {
			runtime.Gosched()
		}
		next, nextEnded := run()
		current.Shutdown()
		if err := <-ended; err != nil {
			t.Errorf("Run = %v", err)
		}
		current, ended = next, nextEnded
	}
	close(stop)
	clients.Wait()
	current.Shutdown()
	if err := <-ended; err != nil {
		t.Errorf("Run = %v", err)
	}
	if lost.Load() != 0 {
		t.Errorf("%d of %d requests lost in three restarts", lost.Load(), lost.Load()+answered.Load())
	}
	t.Logf("%d requests answered, %d lost", answered.Load(), lost.Load())
}

// Connections that wait in the listener's queue when it is closed are reset,
// and with them the requests that they carry.
func TestQueuedConnectionsAreAnswered(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
	accepting, hold := make(chan struct{}, 100), make(chan struct{})
	srv.HTTPServer().ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew { // on the goroutine that accepts
			accepting <- struct{}{}
			<-hold
		}
	}
	l := &observedListener{TCPListener: listen(t).(*net.TCPListener), stopping: make(chan struct{})}
	go srv.Serve(l)
	addr := l.Addr().String()
	var conns []net.Conn
	var readers []*bufio.Reader
	for range 20 {
		conn, br := rawDial(t, addr)
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

func TestShutdownGoesThroughItsPhases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		mux := http.NewServeMux()
		mux.Handle("/health", conduit.Health())
		mux.Handle("/", textHandler("ok"))
		srv := newServer(t, &conduit.Config{Handler: mux, Logger: logs.logger()})
		g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: 5 * time.Second, Timeout: time.Minute, Signals: []os.Signal{}})
		l := newPipeListener()
		done := make(chan error, 1)
		go func() { done <- g.Run(context.Background(), l) }()
		client := l.client(t)
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
		case <-l.closed:
		default:
			t.Error("the listener is open after Delay")
		}
		check(time.Since(start), "/", 200, true)
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
		if took := time.Since(start); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("took %v, want Delay and at most 250 ms more", took)
		}
		line := logs.find("shutdown")
		if len(line) != 1 || line[0]["level"] != "INFO" || line[0]["delay"] != float64(5*time.Second) || line[0]["cut"] != 0.0 || line[0]["drained"].(float64) < 50 {
			t.Errorf("logged %v", line)
		}
	})
}

// A client that was just told to close is dialling again at that moment, so
// the delay is kept even when nobody is connected.
func TestDelayIsKeptWithoutConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Signals: []os.Signal{}})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		start := time.Now()
		if err := g.Run(ctx, newPipeListener()); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != 500*time.Millisecond {
			t.Errorf("took %v, want the 500ms of Delay", took)
		}
	})
}

func TestSilentConnectionsDoNotHoldAShutdown(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		srv := p.server(t, &conduit.Config{Handler: textHandler("ok")})
		var opened sync.WaitGroup
		opened.Add(3)
		srv.HTTPServer().ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				opened.Done()
			}
		}
		url := p.serve(t, srv)
		addr := url[strings.Index(url, "//")+2:]
		for _, sent := range []string{"", "GET / HTT", "GET / HTTP/1.1\r\nHost: x\r\nX-Half"} {
			conn, _ := rawDial(t, addr)
			io.WriteString(conn, sent)
		}
		opened.Wait()
		start := time.Now()
		if err := srv.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		// net/http alone takes more than five seconds.
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func TestShutdownCutsAtItsDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		causes := make(chan error, 2)
		srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			causes <- context.Cause(r.Context())
		})})
		g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Signals: []os.Signal{}})
		hooked := false
		g.RegisterHook(func(ctx context.Context) error {
			hooked = true
			if deadline, _ := ctx.Deadline(); time.Until(deadline) != 5*time.Second {
				t.Errorf("the hook has %v, want 5s", time.Until(deadline))
			}
			return nil
		})
		l := newPipeListener()
		done := make(chan error, 1)
		go func() { done <- g.Run(context.Background(), l) }()
		for range 2 {
			conn := l.dial()
			defer conn.Close()
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		synctest.Wait()
		start := time.Now()
		g.Shutdown()
		err := <-done
		if err == nil || !strings.Contains(err.Error(), "2 connections cut") || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run = %v, want 2 connections cut", err)
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
		if line := logs.find("shutdown"); len(line) != 1 || line[0]["level"] != "ERROR" || line[0]["cut"] != 2.0 {
			t.Errorf("logged %v", line)
		}
	})
}

func TestServerShutdownCutsWhenAnyContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })))
		l := newPipeListener()
		serveBubble(t, srv, l)
		conn := l.dial()
		defer conn.Close()
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		synctest.Wait()
		first := make(chan error, 1)
		go func() { first <- srv.Shutdown(context.Background()) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		second := srv.Shutdown(ctx)
		for _, err := range []error{<-first, second} {
			if err == nil || !strings.Contains(err.Error(), "1 connections cut, 1 requests unfinished") || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Shutdown = %v, want 1 connection cut", err)
			}
		}
	})
}

// Whatever the first one waits for, another that is out of time ends it.
func TestNobodyWaitsForAShutdownWithoutEnd(t *testing.T) {
	ends := map[string]func(*conduit.Server){
		"Shutdown": func(srv *conduit.Server) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if err := srv.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 of them hijacked") {
				t.Errorf("second Shutdown = %v, want one hijacked left", err)
			}
		},
		"Close": func(srv *conduit.Server) { srv.Close() },
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				forever := make(chan struct{})
				defer close(forever)
				srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					<-forever
				})))
				l := newPipeListener()
				served, first := make(chan error, 1), make(chan error, 1)
				go func() { served <- srv.Serve(l) }()
				conn := l.dial()
				defer conn.Close()
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				synctest.Wait()
				go func() { first <- srv.Shutdown(context.Background()) }()
				synctest.Wait()
				end(srv)
				if err := <-first; err == nil {
					t.Error("the first Shutdown = nil, want an error")
				}
				if err := <-served; err != nil {
					t.Errorf("Serve = %v", err)
				}
			})
		})
	}
}

func TestCloseCancelsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := make(chan error, 1)
		srv := newServer(t, conduit.DefaultConfig(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			cause <- context.Cause(r.Context())
		})))
		l := newPipeListener()
		serveBubble(t, srv, l)
		conn := l.dial()
		defer conn.Close()
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		synctest.Wait()
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		if err := <-cause; err != http.ErrServerClosed {
			t.Errorf("cause = %v, want http.ErrServerClosed", err)
		}
	})
}

// On HTTP/2 a connection that is gone does not end its handlers. Hooks must not
// close what they use.
func TestHandlersOfClientsThatLeftAreWaitedFor(t *testing.T) {
	eachProtocol(t, func(t *testing.T, p protocol) {
		started, left, cleanedUp := make(chan struct{}), make(chan struct{}), make(chan struct{})
		var done atomic.Bool
		srv := p.server(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(started)
			<-r.Context().Done()
			close(left)
			<-cleanedUp
			done.Store(true)
		})})
		url, client := p.serve(t, srv), p.client(t)
		ctx, cancel := context.WithCancel(t.Context())
		req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
		go func() {
			<-started
			cancel()
		}()
		if res, err := client.Do(req); err == nil {
			t.Fatalf("got %s", res.Status)
		}
		client.CloseIdleConnections()
		<-left
		srv.Drain()
		time.AfterFunc(300*time.Millisecond, func() { close(cleanedUp) }) // after the linger
		if err := srv.Shutdown(t.Context()); err != nil || !done.Load() {
			t.Errorf("Shutdown = %v, the handler has returned: %v", err, done.Load())
		}
	})
}

// A listener that limits its connections may wait for one to be closed before
// it accepts, and net/http for the listener.
func TestShutdownKeepsItsDeadlineWithAStuckListener(t *testing.T) {
	srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
	l := &limitListener{TCPListener: listen(t).(*net.TCPListener), free: make(chan struct{}, 1), waiting: make(chan struct{}, 1)}
	l.free <- struct{}{}
	serveOn(t, srv, l)
	client := http1Protocol.client(t)
	get(t, client, "http://"+l.Addr().String()) // and stay connected
	<-l.waiting
	<-l.waiting
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	start := time.Now()
	srv.Shutdown(ctx)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("took %v, as long as an idle connection may last", took)
	}
}

type limitListener struct {
	*net.TCPListener
	free, waiting chan struct{}
}

func (l *limitListener) Accept() (net.Conn, error) {
	l.waiting <- struct{}{}
	<-l.free
	c, err := l.TCPListener.Accept()
	if err != nil {
		l.free <- struct{}{}
		return nil, err
	}
	return &limitConn{Conn: c, free: l.free}, nil
}

type limitConn struct {
	net.Conn
	once sync.Once
	free chan struct{}
}

func (c *limitConn) Close() error {
	c.once.Do(func() { c.free <- struct{}{} })
	return c.Conn.Close()
}

func TestHijackedConnectionsAreWaitedFor(t *testing.T) {
	for _, heeds := range []bool{true, false} {
		t.Run(fmt.Sprintf("heeds Draining %v", heeds), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var logs logBuffer
				forever := make(chan struct{})
				srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					if heeds {
						<-conduit.Draining(r.Context())
						time.Sleep(3 * time.Second)
					} else {
						<-forever
					}
				})})
				g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Signals: []os.Signal{}})
				l := newPipeListener()
				done := make(chan error, 1)
				go func() { done <- g.Run(context.Background(), l) }()
				conn := l.dial()
				defer conn.Close()
				io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				synctest.Wait()
				start := time.Now()
				g.Shutdown()
				err := <-done
				close(forever)
				took, line := time.Since(start), logs.find("shutdown")
				if len(line) != 1 {
					t.Fatalf("logged %v", line)
				}
				if heeds {
					if err != nil || took != 3*time.Second || line[0]["hijacked_waited"] != 1.0 || line[0]["hijacked_left"] != 0.0 {
						t.Errorf("%v after %v, logged %v; want one waited for", err, took, line)
					}
				} else if err == nil || took != 25*time.Second || line[0]["hijacked_waited"] != 0.0 || line[0]["hijacked_left"] != 1.0 {
					t.Errorf("%v after %v, logged %v; want one left", err, took, line)
				}
			})
		})
	}
}

func TestHTTP2RequestsAreDrained(t *testing.T) {
	for _, p := range []protocol{tlsProtocol, h2cProtocol} {
		t.Run(p.name, func(t *testing.T) {
			started, finish := make(chan struct{}, 10), make(chan struct{})
			srv := p.server(t, &conduit.Config{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				started <- struct{}{}
				<-finish
				io.WriteString(w, "done")
			})})
			url, client := p.serve(t, srv), p.client(t)
			replies := make(chan reply, 10)
			for range 10 {
				go func() { replies <- get(t, client, url) }()
			}
			for range 10 {
				<-started
			}
			srv.Drain()
			stopped := make(chan error, 1)
			go func() { stopped <- srv.Shutdown(context.Background()) }()
			close(finish)
			for range 10 {
				if got := <-replies; got.body != "done" {
					t.Errorf("reply %+v, want done", got)
				}
			}
			if err := <-stopped; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestHooksRunLastInFirstOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := newServer(t, conduit.DefaultConfig(http.NotFoundHandler()))
		g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{HookTimeout: 8 * time.Second, Signals: []os.Signal{}})
		var order nameList
		failed := errors.New("cannot close")
		// The one of six that hangs takes its sixth and the grace.
		left := 8*time.Second - 8*time.Second/6 - 50*time.Millisecond
		budget := func(name string, want time.Duration) func(context.Context) {
			return func(ctx context.Context) {
				order.add(name)
				if deadline, _ := ctx.Deadline(); time.Until(deadline) != want {
					t.Errorf("%s has %v, want %v", name, time.Until(deadline), want)
				}
			}
		}
		g.RegisterHook(func(ctx context.Context) error { budget("first", left-2*time.Second)(ctx); return nil })
		g.RegisterHook(func(ctx context.Context) error {
			budget("registers", left/2)(ctx)
			time.Sleep(2 * time.Second)
			g.RegisterHook(func(context.Context) error { order.add("registered"); return nil })
			return nil
		})
		g.RegisterHook(func(ctx context.Context) error { order.add("panics"); panic("boom") })
		g.RegisterHook(func(ctx context.Context) error { order.add("exits"); runtime.Goexit(); return nil })
		g.RegisterHook(failingHook(&order, failed))
		never := make(chan struct{})
		g.RegisterHook(func(ctx context.Context) error { order.add("hangs"); <-never; return nil })
		g.Shutdown()
		err := g.Run(context.Background(), newPipeListener())
		close(never)
		if got, want := order.String(), "hangs fails exits panics registers registered first"; got != want {
			t.Errorf("order %q, want %q", got, want)
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

func failingHook(order *nameList, err error) func(context.Context) error {
	return func(context.Context) error { order.add("fails"); return err }
}

// nameList collects names from goroutines that know nothing of each other.
type nameList struct {
	mu    sync.Mutex
	names []string
}

func (l *nameList) add(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names = append(l.names, name)
}

func (l *nameList) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.names, " ")
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

func TestRunEndsInEveryWay(t *testing.T) {
	ways := []struct {
		name string
		end  func(srv *conduit.Server, g *conduit.GracefulShutdown, cancel context.CancelFunc)
	}{
		{"context", func(_ *conduit.Server, _ *conduit.GracefulShutdown, cancel context.CancelFunc) { cancel() }},
		{"Shutdown", func(_ *conduit.Server, g *conduit.GracefulShutdown, _ context.CancelFunc) {
			for range 5 {
				g.Shutdown()
			}
		}},
		{"Server.Shutdown", func(srv *conduit.Server, _ *conduit.GracefulShutdown, _ context.CancelFunc) {
			srv.Shutdown(context.Background())
		}},
		{"Server.Close", func(srv *conduit.Server, _ *conduit.GracefulShutdown, _ context.CancelFunc) { srv.Close() }},
	}
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv := newServer(t, conduit.DefaultConfig(textHandler("ok")))
				g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Signals: []os.Signal{}})
				hooks := 0
				g.RegisterHook(func(ctx context.Context) error { hooks++; return ctx.Err() })
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				l := newPipeListener()
				done := make(chan error, 1)
				go func() { done <- g.Run(ctx, l) }()
				if got := get(t, l.client(t), "http://conduit.test/"); got.body != "ok" {
					t.Errorf("reply %+v", got)
				}
				way.end(srv, g, cancel)
				if err := <-done; err != nil || hooks != 1 {
					t.Errorf("Run = %v with %d hooks run; want nil and 1", err, hooks)
				}
				if err := g.Run(ctx, newPipeListener()); err == nil {
					t.Error("a second Run returned nil")
				}
			})
		})
	}
}

func TestNoSignalsMeansNone(t *testing.T) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP) // which would end the process otherwise
	defer signal.Stop(hangups)
	var logs logBuffer
	srv := newServer(t, &conduit.Config{Logger: logs.logger(), Handler: textHandler("ok")})
	g := conduit.NewGracefulShutdown(srv, &conduit.ShutdownConfig{Delay: -1, Signals: []os.Signal{}})
	l := listen(t)
	done := make(chan error, 1)
	go func() { done <- g.Run(context.Background(), l) }()
	get(t, http.DefaultClient, "http://"+l.Addr().String())
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	<-hangups
	g.Shutdown()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if lines := logs.find("draining"); len(lines) != 1 || lines[0]["cause"] != "Shutdown" {
		t.Errorf("logged %v, want Shutdown as the cause", lines)
	}
}

func TestShutdownDefaultsShrink(t *testing.T) {
	tests := []struct {
		name        string
		cfg         *conduit.ShutdownConfig
		delay, hook time.Duration
	}{
		{"defaults", nil, 500 * time.Millisecond, 5 * time.Second},
		{"small Timeout", &conduit.ShutdownConfig{Timeout: time.Second}, 250 * time.Millisecond, 250 * time.Millisecond},
		{"long Delay", &conduit.ShutdownConfig{Timeout: 2 * time.Second, Delay: 1900 * time.Millisecond}, 1900 * time.Millisecond, 50 * time.Millisecond},
		{"none", &conduit.ShutdownConfig{Delay: -1, HookTimeout: time.Second}, 0, time.Second},
		{"no Timeout", &conduit.ShutdownConfig{Timeout: -1}, 500 * time.Millisecond, 5 * time.Second},
		{"nothing kept", &conduit.ShutdownConfig{HookTimeout: -1}, 500 * time.Millisecond, 30*time.Second - 500*time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := conduit.ShutdownConfig{}
				if tt.cfg != nil {
					cfg = *tt.cfg
				}
				cfg.Signals = []os.Signal{}
				g := conduit.NewGracefulShutdown(newServer(t, conduit.DefaultConfig(http.NotFoundHandler())), &cfg)
				start := time.Now()
				g.RegisterHook(func(ctx context.Context) error {
					if got := time.Since(start); got != tt.delay {
						t.Errorf("the hook ran after %v, want %v", got, tt.delay)
					}
					deadline, _ := ctx.Deadline()
					if got := time.Until(deadline); got != tt.hook {
						t.Errorf("the hook has %v, want %v", got, tt.hook)
					}
					return nil
				})
				g.Shutdown()
				if err := g.Run(context.Background(), newPipeListener()); err != nil {
					t.Error(err)
				}
			})
		})
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
		{"SIGTERM drains", []syscall.Signal{syscall.SIGTERM}, false, 0, []string{"cause=terminated", "msg=shutdown", "returned <nil>"}, "hurried"},
		{"SIGINT drains", []syscall.Signal{syscall.SIGINT}, false, 0, []string{"cause=interrupt", "msg=shutdown", "returned <nil>"}, "hurried"},
		{"a second cuts", []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}, true, 0, []string{"cause=terminated", "hurried", "hook", "msg=shutdown", "1 connections cut"}, "given up"},
		{"a third kills", []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGINT}, true, 130, []string{"hurried", "hook", "given up"}, "msg=shutdown"},
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
	g := conduit.NewGracefulShutdown(srv, nil)
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

func TestTimeoutAnswersForALateHandler(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		for _, method := range []string{"GET", "HEAD", "POST"} {
			t.Run(method, func(t *testing.T) {
				var logs logBuffer
				release, ended := make(chan struct{}), make(chan error, 1)
				chain := conduit.Chain(conduit.RequestID(), conduit.Recovery(), conduit.Logging(), limit.new(50*time.Millisecond))
				url := p.serve(t, p.server(t, &conduit.Config{Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Cache-Control", "max-age=3600")
					w.Header().Set("Content-Length", "7")
					<-r.Context().Done()
					if limit.fast {
						// The client must have the reply while the handler runs on.
						<-release
					}
					_, err := io.WriteString(w, "too late")
					w.WriteHeader(http.StatusTeapot)
					w.Header().Set("X-Late", "1")
					ended <- err
				}))}))
				req, _ := http.NewRequest(method, url, strings.NewReader("body"))
				res, err := p.client(t).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				want := "Service Unavailable\n"
				if method == "HEAD" {
					want = ""
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(res.Body, got); err != nil || res.StatusCode != 503 || string(got) != want {
					t.Errorf("got %d %q, %v; want 503 %q", res.StatusCode, got, err, want)
				}
				close(release)
				if rest, err := io.ReadAll(res.Body); err != nil || len(rest) != 0 {
					t.Errorf("then %q, %v; want the end", rest, err)
				}
				if ct := res.Header.Get("Content-Type"); ct != "text/plain; charset=utf-8" || res.Header.Get("X-Request-ID") == "" || res.Header.Get("Cache-Control") != "" {
					t.Errorf("header %v, want text/plain, an id and nothing of the handler's", res.Header)
				}
				if err := <-ended; !errors.Is(err, conduit.ErrTimeout) || !errors.Is(err, http.ErrHandlerTimeout) {
					t.Errorf("a late write returned %v, want ErrTimeout", err)
				}
				if line := logs.request(t); line["status"] != 503.0 || line["level"] != "ERROR" || line["aborted"] != nil {
					t.Errorf("logged %v, want 503", line)
				}
			})
		}
	})
}

func TestTimeoutReplyIsConfigurable(t *testing.T) {
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
	t.Run("HTTP/1", func(t *testing.T) {
		for _, limit := range timeouts {
			t.Run(limit.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					srv := newServer(t, conduit.DefaultConfig(limit.new(30*time.Second)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))))
					l := newPipeListener()
					serveBubble(t, srv, l)
					start := time.Now()
					if got := get(t, l.client(t), "http://conduit.test/"); got.status != 503 || time.Since(start) != 30*time.Second {
						t.Errorf("%d after %v, want 503 after 30s", got.status, time.Since(start))
					}
				})
			})
		}
	})
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		srv := p.server(t, &conduit.Config{
			WriteTimeout: 50 * time.Millisecond,
			Handler: conduit.Chain(limit.new(time.Minute), limit.new(200*time.Millisecond))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				<-r.Context().Done()
			})),
		})
		if got := get(t, p.client(t), p.serve(t, srv)); got.status != 503 {
			t.Errorf("status %d, want 503", got.status)
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

func TestTimeoutCutsAReplyThatHasBegun(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		for _, stuck := range []bool{false, true} {
			t.Run(fmt.Sprintf("in a write %v", stuck), func(t *testing.T) {
				var logs logBuffer
				ended := make(chan error, 1)
				chain := conduit.Chain(conduit.Recovery(), conduit.Logging(), limit.new(200*time.Millisecond))
				url := p.serve(t, p.server(t, &conduit.Config{Logger: logs.logger(), Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
				}))}))
				res, err := p.client(t).Get(url)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				if err := <-ended; err == nil {
					t.Error("the handler's last write was let through")
				}
				if body, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("read %d bytes as a whole reply, want an error", len(body))
				}
				if line := logs.request(t); line["status"] != 200.0 || line["aborted"] != true {
					t.Errorf("logged %v, want 200, aborted", line)
				}
				if n := len(logs.find("panic")); n != 0 {
					t.Errorf("%d panics logged, want none", n)
				}
			})
		}
	})
}

// net/http reads what is left of the body before it replies, which waits for
// the handler that is stuck in Read.
func TestTimeoutFreesAHandlerStuckInTheBody(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		freed := make(chan error, 1)
		srv := p.server(t, &conduit.Config{
			ReadTimeout: time.Minute, WriteTimeout: time.Minute,
			Handler: limit.new(50 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				r.Body = http.MaxBytesReader(w, r.Body, 1<<20)
				_, err := io.ReadAll(r.Body)
				freed <- err
			})),
		})
		url := p.serve(t, srv)
		body, writer := io.Pipe()
		defer writer.Close()
		go writer.Write([]byte("a part"))
		req, _ := http.NewRequest("POST", url, body)
		start := time.Now()
		got := do(t, p.client(t), req)
		if got.status != 503 {
			t.Errorf("status %d, want 503", got.status)
		}
		if p.http1 && !got.close {
			t.Error("the connection was kept with half a body on it")
		}
		if err := <-freed; err == nil {
			t.Error("the handler read a whole body")
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("took %v, as long as ReadTimeout", took)
		}
	})
}

// A wrapper without Unwrap hides the deadlines. The client is answered even so,
// while the handler waits on for a body that does not come.
func TestTimeoutAnswersWithoutDeadlines(t *testing.T) {
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
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		var conns atomic.Int64
		srv := p.server(t, &conduit.Config{Handler: limit.new(20 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))})
		srv.HTTPServer().ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				conns.Add(1)
			}
		}
		url, client := p.serve(t, srv), p.client(t)
		for range 3 {
			if got := get(t, client, url); got.status != 503 || got.close != (p.http1 && limit.fast) {
				t.Errorf("got %+v", got)
			}
		}
		if want := int64(1); !(p.http1 && limit.fast) && conns.Load() != want {
			t.Errorf("%d connections, want %d", conns.Load(), want)
		}
	})
}

func TestStreamsPassATimeoutUnbuffered(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		read := make(chan struct{})
		url := p.serve(t, p.server(t, &conduit.Config{Handler: limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "first")
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			<-read
			io.WriteString(w, "second")
		}))}))
		res, err := p.client(t).Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		buf := make([]byte, 5)
		if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != "first" {
			t.Fatalf("%q, %v", buf, err)
		}
		close(read)
		if rest, err := io.ReadAll(res.Body); err != nil || string(rest) != "second" {
			t.Errorf("%q, %v", rest, err)
		}
	})
}

// The router marks the handler's copy of the request, which after a timeout
// only the handler may read. The log has the route even so.
func TestLogOfATimeoutHasTheRoute(t *testing.T) {
	for _, limit := range timeouts {
		t.Run(limit.name, func(t *testing.T) {
			var logs logBuffer
			mux := http.NewServeMux()
			mux.HandleFunc("GET /posts/{id}", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
			url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Chain(conduit.RequestID(), conduit.Logging(), limit.new(20*time.Millisecond))(mux)}))
			get(t, http.DefaultClient, url+"/posts/7")
			if line := logs.request(t); line["status"] != 503.0 || line["pattern"] != "GET /posts/{id}" {
				t.Errorf("logged %v, want 503 and the pattern", line)
			}
		})
	}
}

// A source that blocks must not keep other writes of the handler waiting.
func TestTimeoutReadFromDoesNotHoldTheLock(t *testing.T) {
	for _, limit := range timeouts {
		synctest.Test(t, func(t *testing.T) {
			rec := httptest.NewRecorder()
			src, feed := io.Pipe()
			limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				copied := make(chan struct{})
				go func() {
					defer close(copied)
					io.Copy(w, src)
				}()
				synctest.Wait() // it now waits for the source
				io.WriteString(w, "not held ")
				io.WriteString(feed, "up")
				feed.Close()
				<-copied
			})).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
			if rec.Body.String() != "not held up" {
				t.Errorf("%s: body %q", limit.name, rec.Body)
			}
		})
	}
}

func TestTimeoutSendsFilesWhole(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	content := make([]byte, 5<<20)
	rand.Read(content)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		for _, n := range []int64{0, 10, 512, 513, 4<<20 + 512, 5 << 20, 6 << 20} {
			for _, limited := range []bool{false, true} {
				url := p.serve(t, p.server(t, &conduit.Config{Handler: limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					f, err := os.Open(name)
					if err != nil {
						panic(err)
					}
					defer f.Close()
					w.Header().Set("X-Handler", "1")
					var src io.Reader = f
					if limited {
						src = io.LimitReader(f, n)
					}
					if copied, err := io.Copy(w, src); err != nil || limited && copied != min(n, int64(len(content))) {
						t.Errorf("copied %d, %v", copied, err)
					}
				}))}))
				want := content
				if limited {
					want = content[:min(n, int64(len(content)))]
				}
				if got := get(t, p.client(t), url); got.body != string(want) || got.header.Get("X-Handler") != "1" {
					t.Errorf("limit %d: %d bytes with %v, want %d and the handler's header", n, len(got.body), got.header, len(want))
				}
			}
		}
	})
}

func TestPanicsCrossTheTimeoutWithTheirStack(t *testing.T) {
	t.Run("to net/http", func(t *testing.T) {
		var logs logBuffer
		url := serve(t, newServer(t, &conduit.Config{Logger: logs.logger(), Handler: conduit.Timeout(time.Minute)(http.HandlerFunc(panickingHandler))}))
		if res, err := http.Get(url); err == nil {
			t.Errorf("got %s, want a cut connection", res.Status)
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
				gone := errors.New("client gone")
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

// What the contexts of a handler hold is freed when it returns.
func TestTimeoutFreesDerivedContexts(t *testing.T) {
	for _, limit := range timeouts {
		synctest.Test(t, func(t *testing.T) {
			parent, cancel := context.WithCancel(t.Context())
			defer cancel()
			var kept context.Context
			var cancelKept context.CancelFunc
			defer func() { cancelKept() }()
			limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				kept, cancelKept = context.WithCancel(r.Context())
			})).ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(parent, "GET", "/", nil))
			synctest.Wait()
			if kept.Err() != context.Canceled {
				t.Errorf("%s: a derived context lives on: %v", limit.name, kept.Err())
			}
		})
	}
}

func TestTimeoutAfterAnInformationalReply(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		chain := conduit.Chain(conduit.RequestID(), limit.new(50*time.Millisecond))
		url := p.serve(t, p.server(t, &conduit.Config{Handler: chain(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			<-r.Context().Done()
		}))}))
		var hints []string
		req, _ := http.NewRequestWithContext(traceInformational(t.Context(), &hints), "GET", url, nil)
		got := do(t, p.client(t), req)
		if got.status != 503 || len(hints) != 1 {
			t.Errorf("status %d after %q, want 503 after one hint", got.status, hints)
		}
		if got.header.Get("Link") != "" || got.header.Get("X-Request-ID") == "" {
			t.Errorf("header %v, want the middleware's without the handler's", got.header)
		}
	})
}

func TestTrailersPassATimeout(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		url := p.serve(t, p.server(t, &conduit.Config{Handler: limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/declared" {
				w.Header().Set("Trailer", "X-Sum")
				w.Header().Set("X-Sum", "not yet")
				io.WriteString(w, "body")
				w.Header().Set("X-Sum", "42")
				return
			}
			io.WriteString(w, "body")
			w.(http.Flusher).Flush()
			w.Header().Set(http.TrailerPrefix+"X-Sum", "42")
		}))}))
		for _, path := range []string{"/declared", "/prefixed"} {
			res, err := p.client(t).Get(url + path)
			if err != nil {
				t.Fatal(err)
			}
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if got := res.Trailer.Get("X-Sum"); got != "42" {
				t.Errorf("%s: trailer %q, want 42", path, got)
			}
		}
	})
}

func TestHeadersOfTheMiddlewareReachTheHandler(t *testing.T) {
	outer := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Vary", "Accept-Encoding")
			w.Header().Set("X-Frame-Options", "DENY")
			next.ServeHTTP(w, r)
		})
	}
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		url := p.serve(t, p.server(t, &conduit.Config{Handler: conduit.Chain(outer, limit.new(time.Minute))(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Add("Vary", "Origin")
			w.Header().Del("X-Frame-Options")
			if r.URL.Path == "/body" {
				io.WriteString(w, "body")
			}
		}))}))
		for _, path := range []string{"/body", "/nothing"} {
			got := get(t, p.client(t), url+path)
			if vary := got.header["Vary"]; !slices.Equal(vary, []string{"Accept-Encoding", "Origin"}) || got.header.Get("X-Frame-Options") != "" {
				t.Errorf("%s: header %v", path, got.header)
			}
		}
	})
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
				t.Errorf("the next reply %+v, want ok", got)
			}
		}
	})
}

func TestWritesAfterAHandlerInTimeAreRefused(t *testing.T) {
	for _, limit := range timeouts {
		rec := httptest.NewRecorder()
		var kept http.ResponseWriter
		limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			kept = w
			io.WriteString(w, "ok")
		})).ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
		if _, err := kept.Write([]byte("late")); err == nil || rec.Body.String() != "ok" {
			t.Errorf("%s: late write = %v, body %q", limit.name, err, rec.Body)
		}
	}
}

func TestDeadlinesPassATimeout(t *testing.T) {
	eachTimeout(t, func(t *testing.T, p protocol, limit limiter) {
		url := p.serve(t, p.server(t, &conduit.Config{Handler: limit.new(time.Minute)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rc := http.NewResponseController(w)
			if err := errors.Join(rc.SetWriteDeadline(time.Now().Add(time.Hour)), rc.SetReadDeadline(time.Now().Add(time.Hour)), rc.EnableFullDuplex()); err != nil {
				t.Error(err)
			}
			io.WriteString(w, "ok")
		}))}))
		if got := get(t, p.client(t), url); got.body != "ok" {
			t.Errorf("reply %+v", got)
		}
	})
}

// On HTTP/2 the stream ends with the handler; one that ignores its context
// must not leave the client waiting.
func TestFastTimeoutEndsAnHTTP2Stream(t *testing.T) {
	for _, p := range []protocol{tlsProtocol, h2cProtocol} {
		t.Run(p.name, func(t *testing.T) {
			release := make(chan struct{})
			defer close(release)
			url := p.serve(t, p.server(t, &conduit.Config{WriteTimeout: -1, Handler: conduit.FastTimeout(20 * time.Millisecond)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))}))
			res, err := p.client(t).Get(url)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			hung := time.AfterFunc(20*time.Second, func() {
				t.Error("the stream does not end")
				res.Body.Close()
			})
			body, _ := io.ReadAll(res.Body) // ends, if only with a reset
			hung.Stop()
			if res.StatusCode != 503 || string(body) != "Service Unavailable\n" {
				t.Errorf("got %d %q, want the 503 whole", res.StatusCode, body)
			}
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

// Handlers and timers that race for the reply: one of them has it whole.
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
		var whole, late, cut atomic.Int64
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for range 50 {
					res, err := client.Get(url)
					if err != nil {
						cut.Add(1)
						continue
					}
					body, err := io.ReadAll(res.Body)
					res.Body.Close()
					switch {
					case err != nil:
						cut.Add(1)
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
			t.Errorf("%d whole, %d late, %d cut; want some of the first two", whole.Load(), late.Load(), cut.Load())
		}
	})
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
		{"no limit", conduit.DatabaseConfig{MaxOpenConns: -1, MaxIdleConns: 15}, 0, 15},
		{"no limit, default idle", conduit.DatabaseConfig{MaxOpenConns: -1}, 0, 10},
		{"none idle", conduit.DatabaseConfig{MaxIdleConns: -1}, 100, 0},
		{"idle up to open", conduit.DatabaseConfig{MaxOpenConns: 20, MaxIdleConns: 20}, 20, 20},
		{"negative times", conduit.DatabaseConfig{ConnMaxLifetime: -1, ConnMaxIdleTime: -1}, 100, 10},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			db := sql.OpenDB(fakeConnector{})
			defer db.Close()
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
			var conns []*sql.Conn
			for range n {
				c, err := db.Conn(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				conns = append(conns, c)
			}
			for _, c := range conns {
				c.Close()
			}
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
				tt.cfg.DB = sql.OpenDB(fakeConnector{})
				defer tt.cfg.DB.Close()
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

func TestDatabaseConfigIsRefused(t *testing.T) {
	db := sql.OpenDB(fakeConnector{})
	defer db.Close()
	tests := []struct {
		name string
		cfg  *conduit.DatabaseConfig
		want string
	}{
		{"nil", nil, "conduit: DB: "},
		{"no DB", &conduit.DatabaseConfig{}, "conduit: DB: "},
		{"idle above open", &conduit.DatabaseConfig{DB: db, MaxOpenConns: 5, MaxIdleConns: 6}, "conduit: MaxIdleConns: 6 is more than MaxOpenConns, 5"},
		{"idle above default open", &conduit.DatabaseConfig{DB: db, MaxIdleConns: 101}, "conduit: MaxIdleConns: 101 is more than MaxOpenConns, 100"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.cfg.Apply(); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("Apply = %v, want %q", err, tt.want)
			}
			if got := db.Stats().MaxOpenConnections; got != 0 {
				t.Errorf("MaxOpenConnections = %d, want it left alone", got)
			}
		})
	}
}

func TestNewAppliesTheDatabaseConfig(t *testing.T) {
	db := sql.OpenDB(fakeConnector{})
	defer db.Close()
	cfg := conduit.DefaultConfig(http.NotFoundHandler())
	cfg.Database = conduit.DefaultDatabaseConfig(db)
	cfg.Database.MaxOpenConns = 7
	cfg.Database.MaxIdleConns = 7
	bad := *cfg
	bad.Handler = nil
	if _, err := conduit.New(&bad); err == nil || db.Stats().MaxOpenConnections != 0 {
		t.Errorf("a faulty config: %v, with the pool at %d; want an error and the pool left alone", err, db.Stats().MaxOpenConnections)
	}
	if _, err := conduit.New(cfg); err != nil || db.Stats().MaxOpenConnections != 7 {
		t.Errorf("New = %v with the pool at %d, want 7", err, db.Stats().MaxOpenConnections)
	}
}

// fakeConnector opens connections to nothing.
type fakeConnector struct{}

func (fakeConnector) Connect(context.Context) (driver.Conn, error) { return fakeConn{}, nil }
func (fakeConnector) Driver() driver.Driver                        { return nil }

type fakeConn struct{}

func (fakeConn) Prepare(string) (driver.Stmt, error) { return nil, errors.New("not implemented") }
func (fakeConn) Close() error                        { return nil }
func (fakeConn) Begin() (driver.Tx, error)           { return nil, errors.New("not implemented") }

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

// reply is a response that has been read whole.
type reply struct {
	status int
	header http.Header
	body   string
	close  bool
}

func get(t *testing.T, client *http.Client, url string) reply {
	t.Helper()
	req, err := http.NewRequest("GET", url, nil)
	if err != nil {
		t.Error(err)
		return reply{}
	}
	return do(t, client, req)
}

func do(t *testing.T, client *http.Client, req *http.Request) reply {
	t.Helper()
	res, err := client.Do(req)
	if err != nil {
		t.Error(err)
		return reply{}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%s %s: %d, then %v after %d bytes", req.Method, req.URL, res.StatusCode, err, len(body))
	}
	return reply{res.StatusCode, res.Header, string(body), res.Close}
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

// traceInformational notes the informational replies to a request.
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
// reply may not be there when the client has it; nil means it never came.
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
