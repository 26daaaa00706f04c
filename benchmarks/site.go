package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	helloText = "hello, gopher\n"
	jsonType  = "application/json"
	textType  = "text/plain; charset=utf-8"

	streamLength = 1000 // elements of the JSON stream, events of the SSE one
	eventData    = `{"price":19.99}`
)

// site is what all peers serve: the values behind the responses, and a directory
// of files. Each peer has one of its own, because fiber leaves compressed
// copies beside the files; the bytes are the same in all of them.
type site struct {
	item     item
	items    []item
	elements []element
	events   []event
	document []byte // JSON of 40 KB

	dir      string // small.txt, script.js, script.js.gz and large.pdf
	certFile string
	keyFile  string
	log      *slog.Logger
}

type item struct {
	ID    int      `json:"id"`
	Name  string   `json:"name"`
	Price float64  `json:"price"`
	Tags  []string `json:"tags"`
}

type element struct {
	ID    int     `json:"id"`
	Name  string  `json:"name"`
	Price float64 `json:"price"`
}

// event is a server-sent event, before a peer has made its own type of it.
type event struct{ id, name, data string }

// newSite writes the files of a site below dir, and opens it.
func newSite(dir string) (*site, error) {
	s := openSite(dir)
	if err := s.writeFiles(); err != nil {
		return nil, err
	}
	return s, s.writeCertificate()
}

// openSite returns the site whose files are below dir.
func openSite(dir string) *site {
	s := &site{
		item:     item{ID: 42, Name: "item 42", Price: 19.99, Tags: []string{"new", "sale"}},
		document: document(40 << 10),
		dir:      filepath.Join(dir, "files"),
		certFile: filepath.Join(dir, "cert.pem"),
		keyFile:  filepath.Join(dir, "key.pem"),
		log:      slog.New(slog.NewTextHandler(discard{}, nil)),
	}
	for i := range 100 {
		s.items = append(s.items, item{ID: i, Name: "item " + strconv.Itoa(i), Price: 19.99, Tags: s.item.Tags})
	}
	for i := range streamLength {
		s.elements = append(s.elements, element{ID: i, Name: "item " + strconv.Itoa(i), Price: 19.99})
		s.events = append(s.events, event{id: strconv.Itoa(i), name: "tick", data: eventData})
	}
	return s
}

func (s *site) writeFiles() error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	script := script(131 << 10)
	var compressed bytes.Buffer
	z := gzip.NewWriter(&compressed)
	z.Write(script)
	z.Close()
	large := make([]byte, 1<<20)
	random := mathrand.NewChaCha8([32]byte{})
	random.Read(large)

	for name, content := range map[string][]byte{
		"small.txt":    script[:4<<10],
		"script.js":    script,
		"script.js.gz": compressed.Bytes(),
		"large.pdf":    large,
	} {
		if err := s.writeFile(name, content); err != nil {
			return err
		}
	}
	return nil
}

// writeFile writes a file of an hour ago: a young one may still change.
func (s *site) writeFile(name string, content []byte) error {
	path, written := filepath.Join(s.dir, name), time.Now().Add(-time.Hour)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	return os.Chtimes(path, written, written)
}

// writeCertificate makes a certificate for the loopback address that lasts a
// day.
func (s *site) writeCertificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "benchmarks"},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	keyBytes, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), 0o644); err != nil {
		return err
	}
	return os.WriteFile(s.keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyBytes}), 0o600)
}

func (s *site) file(name string) []byte {
	content, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		panic(err) // newSite has written it
	}
	return content
}

// source sends values through a channel of 16 places, as something that
// happens would come to a handler, and ends with ctx.
func source[T any](ctx context.Context, values []T) <-chan T {
	ch := make(chan T, 16)
	go func() {
		defer close(ch)
		for _, v := range values {
			select {
			case ch <- v:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ch
}

// document returns a JSON array of about size bytes, which shrinks as much as
// JSON that services send.
func document(size int) []byte {
	words := strings.Fields("amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge meadow north ocean prairie quarry ridge shore tundra upland valley willow yonder")
	rng := mathrand.New(mathrand.NewPCG(1, 2))
	word := func() string { return words[rng.IntN(len(words))] }
	var items []item
	for n := 0; n < size; n += 85 {
		items = append(items, item{ID: rng.IntN(1e6), Name: word() + " " + word() + " " + word(), Price: float64(rng.IntN(1e5)) / 100, Tags: []string{word(), word()}})
	}
	text, err := json.Marshal(items)
	if err != nil {
		panic(err)
	}
	return text
}

// script returns text that gzip shrinks about as much as a script.
func script(size int) []byte {
	var buf bytes.Buffer
	for i := 0; buf.Len() < size; i++ {
		fmt.Fprintf(&buf, "function f%d(a, b) { return a * %d + b[%q]; }\n", i, i*7919%10007, fmt.Sprint("key", i*31%97))
	}
	return buf.Bytes()[:size]
}

// discard takes the log lines. It is not io.Discard, which package log knows
// and does not even format for.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
