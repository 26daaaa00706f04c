package main

import (
	"io"
	"net"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"example.com/conduit"
)

// These compress the document with the encoders of klauspost/compress, which
// Conduit takes as Encoders and chi by SetEncoder. Each has its own level.

func newGzip(w io.Writer) conduit.EncodingWriter { return gzip.NewWriter(w) }

func newZstd(w io.Writer) conduit.EncodingWriter {
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		panic(err) // the options are wrong
	}
	return z
}

func serveConduitEncoder(coding string, encoder func(io.Writer) conduit.EncodingWriter) func(*site, net.Listener, net.Listener) (*service, error) {
	return func(s *site, l, secure net.Listener) (*service, error) {
		compress := conduit.CompressionWith(&conduit.CompressionConfig{Encoders: []conduit.Encoder{
			{Coding: coding, New: func() conduit.EncodingWriter { return encoder(nil) }},
		}})
		mux := http.NewServeMux()
		mux.Handle("GET /document", compress(http.HandlerFunc(s.serveDocument)))
		return serveConduitHandler(s, l, secure, mux, func() error { return nil })
	}
}

func serveChiEncoder(coding string, encoder func(io.Writer) conduit.EncodingWriter) func(*site, net.Listener, net.Listener) (*service, error) {
	return func(s *site, l, secure net.Listener) (*service, error) {
		compressor := middleware.NewCompressor(5)
		compressor.SetEncoder(coding, func(w io.Writer, _ int) io.Writer { return encoder(w) })
		r := chi.NewRouter()
		r.Use(compressor.Handler)
		r.Get("/document", s.serveDocument)
		return serveHandler(s, l, secure, r)
	}
}
