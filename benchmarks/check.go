package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

// An exchange is a route's request as it is sent to one peer, and what the
// response was when it was checked.
type exchange struct {
	method, path string
	header       http.Header
	body         string

	status int
	length int // of the body as it was sent
}

// header returns what the request to p says, but for validators.
func (r *route) header(p *peer) http.Header {
	h := make(http.Header)
	if r.gzip {
		h.Set("Accept-Encoding", p.accepts())
	}
	if r.body != "" {
		h.Set("Content-Type", jsonType)
	}
	return h
}

// addValidators makes header that of a request of one who has a response with
// the header received.
func addValidators(header, received http.Header) {
	if tag := received.Get("ETag"); tag != "" {
		header.Set("If-None-Match", tag)
	}
	if modified := received.Get("Last-Modified"); modified != "" {
		header.Set("If-Modified-Since", modified)
	}
}

// check sends r to p at base, such as http://127.0.0.1:8080, and returns an error
// that says what in the response is not as it must be. It is for routes of the
// kind requests.
func check(ctx context.Context, base string, p *peer, r *route, s *site) (*exchange, error) {
	transport := newTransport()
	defer transport.CloseIdleConnections()
	x := &exchange{method: r.method, path: r.path, header: r.header(p), body: r.body}
	if r.conditional {
		_, received, err := x.do(ctx, transport, base)
		if err != nil {
			return nil, err
		}
		addValidators(x.header, received.Header)
		if len(x.header) == 0 {
			return nil, fmt.Errorf("%s: no ETag and no Last-Modified", r.path)
		}
	}
	body, res, err := x.do(ctx, transport, base)
	if err != nil {
		return nil, err
	}
	if err := r.checkResponse(res, p, body, s); err != nil {
		return nil, fmt.Errorf("%s %s: %w", r.method, r.path, err)
	}
	x.status, x.length = res.StatusCode, len(body)
	return x, nil
}

func newTransport() *http.Transport {
	return &http.Transport{
		DisableCompression:  true,
		MaxIdleConnsPerHost: 1000,
		ForceAttemptHTTP2:   true,
		// The certificate is the peer's own, made when it started, and the
		// connection never leaves the machine.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
}

func (x *exchange) do(ctx context.Context, transport *http.Transport, base string) ([]byte, *http.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, x.method, base+x.path, strings.NewReader(x.body))
	if err != nil {
		return nil, nil, err
	}
	req.Header = x.header
	res, err := transport.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, nil, fmt.Errorf("%s %s: %w", x.method, x.path, err)
	}
	return body, res, nil
}

// checkResponse compares what matters in a response: status, protocol, the header
// that a client or a cache goes by, and every byte of the body.
func (r *route) checkResponse(res *http.Response, p *peer, body []byte, s *site) error {
	if res.StatusCode != r.status {
		return fmt.Errorf("status %d, want %d", res.StatusCode, r.status)
	}
	if want := map[bool]int{false: 1, true: 2}[r.http2]; res.ProtoMajor != want {
		return fmt.Errorf("came by %s, want HTTP/%d", res.Proto, want)
	}
	if r.mime != "" {
		got, _, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
		if err != nil || got != r.mime {
			return fmt.Errorf("Content-Type %q, want %s", res.Header.Get("Content-Type"), r.mime)
		}
	}
	if r.path == "/chain" && res.Header.Get("X-Request-Id") == "" {
		return errors.New("no X-Request-Id")
	}
	switch coding := cmp.Or(res.Header.Get("Content-Encoding"), "identity"); {
	case coding == "identity" && !r.compressed:
	case !r.gzip || coding != p.accepts():
		return fmt.Errorf("Content-Encoding %s", coding)
	case !strings.Contains(res.Header.Get("Vary"), "Accept-Encoding"):
		return fmt.Errorf("compressed, but Vary is %q", res.Header.Get("Vary"))
	default:
		var err error
		if body, err = decode(coding, body); err != nil {
			return err
		}
	}
	return r.same(body, r.want(s))
}

func decode(coding string, body []byte) ([]byte, error) {
	if coding == "zstd" {
		z, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer z.Close()
		return z.DecodeAll(body, nil)
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}
