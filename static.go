// SPDX-License-Identifier: MIT

package conduit

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// FileServer serves the files of a directory or an [fs.FS], small ones from
// memory, large ones by sendfile.
//
// A directory gets its index file, never a listing. Conditions and ranges are
// those of [http.ServeContent], but more than 64 ranges get the whole file.
// Text from 1 KiB to MaxCachedFile is compressed, once per content, for clients
// that accept gzip and ask for no Range; [Compression] leaves it as it is.
// Methods other than GET and HEAD get 405.
//
// # Caching
//
// By default clients may keep a file for a year, but must ask for HTML each
// time. To have a changed file fetched, rename it or link to its
// [FileServer.URL]: the current version may be kept for ever, any other must be
// asked for again.
//
// # Changes
//
// A new file is seen at once, a change of a cached one after Recheck. A file
// modified less than a second ago may change again with no new time or size. It
// is sent with "no-cache", whatever its URL, and read again at the next look.
//
// The entity tag of a file up to MaxCachedFile is a hash of the bytes sent.
// That of a larger one is made of modification time and size, and weak while
// the file is younger than a second. Replace large files by renaming, or a
// client gets a mixture of old and new. The directory may be replaced too, such
// as a link to the current release.
//
// # Refusals
//
// Nothing outside the directory is served: [os.Root] follows no link that leads
// out, and no absolute one. An FS of [os.DirFS] follows all. Refused links get
// 404, like a missing file, and so do paths not in their shortest form,
// backslashes, control characters, encoded slashes, names that end in a dot,
// names that begin with one except .well-known, devices, pipes, sockets, and
// files without permission (logged). Other errors are logged and get 500.
//
// # Slow clients
//
// A client that takes less than 64 KiB in the server's WriteTimeout is
// disconnected within twice that time. The time is at least 3 seconds, and 15
// without a WriteTimeout. Neither WriteTimeout nor a [Timeout] ends the
// response of a client that goes on taking.
type FileServer struct {
	config     FileServerConfig
	start      time.Time // what fileEntry.freshUntil counts from
	cache      fileCache
	pending    sync.Map    // the looks at files under way, by key
	dirMissing atomic.Bool // and logged
}

// FileServerConfig configures [NewFileServerWith].
type FileServerConfig struct {
	// Dir is the directory to serve. Set either Dir or FS.
	Dir string

	// FS is the file system to serve. Files without times, as in an embed.FS, get
	// no Last-Modified and must not change: only their size would tell.
	FS fs.FS

	// Prefix is what URL paths begin with, such as "/static"; "" and "/" are the
	// root. Register the FileServer at the prefix and a slash; do not strip it.
	Prefix string

	// Index is the file of a directory, "index.html" by default.
	Index string

	// Fallback is the file for unknown paths if the client accepts text/html, for a
	// single-page application; none by default. Paths with an extension or of a
	// refused form still get 404, or a page from NotFound.
	Fallback string

	// NotFound responds for missing files, with any status; 404 by default.
	NotFound http.Handler

	// CacheControl is for files, "public, max-age=31536000" by default. Unless it
	// has private or no-store, URLs of [FileServer.URL] are immutable.
	CacheControl string

	// HTMLCacheControl is for HTML, indexes and Fallback, "no-cache" by default.
	HTMLCacheControl string

	// Dotfiles allows names that begin with a dot.
	Dotfiles bool

	// Precompressed serves name.br, name.zst or name.gz for name to clients that
	// accept it. Such a file must be a second old, not empty, and at most a second
	// older than name. If writing takes longer, rename it when done.
	Precompressed bool

	// CacheBytes bounds the memory for cached files, 64 MiB by default. Negative:
	// no contents, and at most 1 MiB for the rest.
	CacheBytes int64

	// MaxCachedFile is the largest file to keep in memory, 1 MiB by default, at
	// most an eighth of CacheBytes, negative for none. Of a file above 256 KiB in
	// Dir only the gzip form is kept. A larger file in FS that cannot seek is sent
	// without ranges.
	MaxCachedFile int64

	// Recheck is how long a cached file is served before the next look at it, 1
	// second by default. Negative: for ever, once it is a second old, with the
	// precompressed files of that time.
	Recheck time.Duration
}

func (c *FileServerConfig) withDefaults() (FileServerConfig, error) {
	var d FileServerConfig
	if c != nil {
		d = *c
	}

	d.Index = cmp.Or(d.Index, "index.html")
	d.CacheControl = cmp.Or(d.CacheControl, "public, max-age=31536000")
	d.HTMLCacheControl = cmp.Or(d.HTMLCacheControl, "no-cache")
	d.CacheBytes = cmp.Or(d.CacheBytes, 64<<20)
	d.MaxCachedFile = cmp.Or(d.MaxCachedFile, 1<<20)
	if d.CacheBytes < 0 {
		d.CacheBytes, d.MaxCachedFile = 1<<20, -1
	}
	d.MaxCachedFile = min(d.MaxCachedFile, d.CacheBytes/8)
	d.Recheck = cmp.Or(d.Recheck, time.Second)

	var errs errorList
	switch {
	case d.Dir == "" && d.FS == nil:
		errs.add("Dir: is required, or FS")
	case d.Dir != "" && d.FS != nil:
		errs.add("FS: is set, and Dir too")
	case d.Dir != "":
		dir, err := filepath.Abs(d.Dir) // the process may change its directory
		if err == nil {
			d.FS = dirFS(dir)
			_, err = fs.Stat(d.FS, ".")
		}
		if err != nil {
			errs.add("Dir: %w", err)
		}
	}

	prefix := strings.TrimSuffix(d.Prefix, "/")
	if prefix != "" && (prefix[0] != '/' || path.Clean(prefix) != prefix) {
		errs.add("Prefix: %q is not a path that begins with a slash and is in its shortest form", d.Prefix)
	}
	d.Prefix = prefix

	for _, file := range []struct{ field, name string }{{"Index", d.Index}, {"Fallback", d.Fallback}} {
		switch {
		case file.name == "":
		case !validFileName(file.name), file.field == "Index" && strings.Contains(file.name, "/"):
			errs.add("%s: %q is not the name of a file", file.field, file.name)
		case !d.Dotfiles && isHidden(file.name):
			errs.add("%s: %q begins with a dot, and Dotfiles is not set", file.field, file.name)
		}
	}
	return d, errors.Join(errs...)
}

// NewFileServer serves dir at URLs that begin with prefix. Clients keep files
// other than HTML for a year: link to them by [FileServer.URL], or set
// CacheControl of [FileServerConfig]. NewFileServer panics if dir cannot be
// opened.
func NewFileServer(dir, prefix string) *FileServer {
	f, err := NewFileServerWith(&FileServerConfig{Dir: dir, Prefix: prefix})
	if err != nil {
		panic(err)
	}
	return f
}

// NewFileServerWith returns a FileServer for cfg, or an error if Dir cannot be
// opened or Prefix, Index or Fallback is not a valid path.
func NewFileServerWith(cfg *FileServerConfig) (*FileServer, error) {
	c, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	f := &FileServer{config: c, start: time.Now()}
	f.cache.limit, f.cache.entries = c.CacheBytes, make(map[string]*fileEntry)
	return f, nil
}

// ServeHTTP serves a file.
func (f *FileServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// serve responds from memory, or with a 304. Ranges, other conditions and
	// large files go on to serveContent. revalidate finds out that a file has
	// changed, serveContent that it has since the last look.
	if !requireGetOrHead(w, r) {
		return
	}
	if r.URL.RawPath == "" {
		if e := f.fresh(r.URL.Path); e != nil {
			f.serve(w, r, e)
			return
		}
	}

	name, ok := f.nameOf(r.URL)
	if !ok {
		f.serveError(w, r, fs.ErrNotExist)
		return
	}

	e, err := f.lookup(r.Context(), r.URL.Path, name)
	if errors.Is(err, errIsDirectory) {
		index := path.Join(name, f.config.Index)
		if _, err = f.stat(index); err == nil {
			redirectToDirectory(w, r)
			return
		}
		f.logError(r.Context(), index, err)
	}

	if e == nil && isNotFound(err) && f.config.Fallback != "" && path.Ext(r.URL.Path) == "" {
		addVary(w.Header(), "Accept")
		if strings.Contains(strings.ToLower(r.Header.Get("Accept")), "text/html") {
			e, err = f.lookup(r.Context(), f.config.Prefix+"/"+f.config.Fallback, f.config.Fallback)
		}
	}
	if e == nil {
		f.serveError(w, r, err)
		return
	}
	f.serve(w, r, e)
}

// URL returns the path of a file with its version, for templates:
// "/static/app.js?v=VERSION" for the name "app.js". Without a file it returns
// the path alone.
func (f *FileServer) URL(name string) string {
	u := url.URL{Path: f.config.Prefix + "/" + strings.TrimLeft(name, "/")} // a second slash would start a host
	if file, ok := f.nameOf(&u); ok {
		if e, _ := f.lookup(context.Background(), u.Path, file); e != nil {
			u.RawQuery = e.versionQuery
		}
	}
	return u.String()
}

// Close returns nil. A FileServer keeps no file open.
func (f *FileServer) Close() error { return nil }

// nameOf returns the name of the file that a URL asks for, which is the index
// if the path ends in a slash. It returns false if the path has a form that is
// refused.
func (f *FileServer) nameOf(u *url.URL) (string, bool) {
	name, ok := strings.CutPrefix(u.Path, f.config.Prefix)
	if f.config.Prefix != "" && ok {
		if name == "" {
			return ".", true // the directory without its slash
		}
		ok = name[0] == '/'
	}
	name = strings.TrimPrefix(name, "/")
	if name == "" || strings.HasSuffix(name, "/") {
		name += f.config.Index
	}

	encoded := strings.Contains(strings.ToLower(u.RawPath), "%2f")
	return name, ok && validFileName(name) && !encoded && (f.config.Dotfiles || !isHidden(name))
}

// isHidden reports whether a part of a name begins with a dot, except
// .well-known (RFC 8615).
func isHidden(name string) bool {
	return strings.Contains(strings.ReplaceAll("/"+name+"/", "/.well-known/", "/"), "/.")
}

// validFileName reports whether a name is in its shortest form and means the
// same on every system. Windows drops a dot at the end.
func validFileName(name string) bool {
	return fs.ValidPath(name) && !strings.Contains(name+"/", "./") &&
		!strings.ContainsFunc(name, func(c rune) bool { return c < ' ' || c == '\\' || c == 0x7f })
}

// redirectToDirectory adds the slash. The location is relative, which keeps it
// on this host, and below what a router has stripped.
func redirectToDirectory(w http.ResponseWriter, r *http.Request) {
	location := url.URL{Path: path.Base(r.URL.Path) + "/", RawQuery: r.URL.RawQuery}
	w.Header().Set("Location", location.String())
	w.Header()["X-Content-Type-Options"] = nosniffValue
	w.WriteHeader(http.StatusMovedPermanently)
}

// serveError responds for a file that is missing or cannot be read. It removes
// what a middleware has set for every file, so that nobody caches the error as
// the file.
func (f *FileServer) serveError(w http.ResponseWriter, r *http.Request, err error) {
	status := http.StatusInternalServerError
	if isNotFound(err) {
		status = http.StatusNotFound
		if f.config.NotFound != nil {
			f.config.NotFound.ServeHTTP(w, r)
			return
		}
	}

	clearRepresentation(w.Header())
	http.Error(w, http.StatusText(status), status)
}

// fileEntry is a file as it was read once, in each of its codings, with its
// header ready. It does not change, but for what is atomic.
//
// An entry comes about in steps, a method each: lookup joins all who want the
// same path; revalidate keeps an entry whose files have not changed; buildEntry
// reads the file and those beside it; readFile reads one, and makes its tag;
// openRegular opens it.
type fileEntry struct {
	key          string        // the path of the URL
	variants     []fileVariant // the first is the file itself
	codings      []string      // of the others, in order of preference
	sidecars     []fs.FileInfo // of each of sidecarCodings, nil if there is none
	stable       bool          // older than youngAge, and the same before and after it was read
	private      bool          // Cache-Control has private or no-store, and stays for a version
	varies       bool          // with Accept-Encoding
	versionQuery string        // "v=" and the version
	modified     time.Time     // zero if it is not known

	contentType, lastModified, cacheControl []string

	freshUntil atomic.Int64 // nanoseconds after FileServer.start

	// The cache uses these.
	lives atomic.Int32
	cost  int64
	place *list.Element
}

// fileVariant is a file in one coding, ready to be sent.
type fileVariant struct {
	name   string // of the file that has the bytes
	info   fs.FileInfo
	stable bool
	tag    string // without quotes and coding: the version
	ranges bool   // can be sent in parts
	size   int64
	body   []byte // nil if the bytes are to be sent from the file

	etag, length, encoding []string
}

// fresh returns the entry of a key unless it is time to look at its file.
func (f *FileServer) fresh(key string) *fileEntry {
	e := f.cache.get(key)
	if e == nil || int64(time.Since(f.start)) >= e.freshUntil.Load() {
		return nil
	}
	return e
}

// lookup returns the fresh entry of a file for a key, and reads the file if
// need be. All who ask for the same key meanwhile share one look. An error
// beside an entry says why the entry is an old one.
func (f *FileServer) lookup(ctx context.Context, key, name string) (*fileEntry, error) {
	if e := f.fresh(key); e != nil {
		return e, nil
	}
	look, _ := f.pending.LoadOrStore(key, sync.OnceValues(func() (*fileEntry, error) {
		defer f.pending.Delete(key)
		return f.revalidate(ctx, key, name)
	}))
	return look.(func() (*fileEntry, error))()
}

func (f *FileServer) revalidate(ctx context.Context, key, name string) (*fileEntry, error) {
	now, old := time.Now(), f.cache.get(key)
	info, err := f.stat(name)
	if !errors.Is(err, errNoDirectory) {
		f.dirMissing.Store(false)
	}

	e := old
	unchanged := err == nil && old != nil && old.stable && fileUnchanged(info, old.variants[0].info) &&
		slices.EqualFunc(f.sidecarsOf(name, info), old.sidecars, fileUnchanged)
	if err == nil && !unchanged {
		// A substring would keep the whole request line in memory.
		e, err = f.buildEntry(strings.Clone(key), strings.Clone(name))
	}
	if err != nil {
		f.logError(ctx, name, err)
		e = old // which is still good if the machine failed
		if isNotFound(err) {
			e = nil
		}
	}

	if e != nil {
		f.keepFresh(e, now)
	}
	if e != old {
		f.cache.put(key, e)
	}
	return e, err
}

var (
	errIsDirectory = errors.New("is a directory")
	errNoDirectory = errors.New("the directory cannot be opened") // Dir
)

// isNotFound reports whether an error means that the client has no such file.
// Any other error is one of the machine or the file system.
func isNotFound(err error) bool {
	for _, target := range []error{
		fs.ErrNotExist, fs.ErrPermission, fs.ErrInvalid, errIsDirectory,
		syscall.ENOTDIR, syscall.ENAMETOOLONG, syscall.ELOOP,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return strings.HasSuffix(err.Error(), "path escapes from parent") // package os exports no value for it
}

// logError logs every error but a missing file. A missing directory is logged
// once, until it is back.
func (f *FileServer) logError(ctx context.Context, name string, err error) {
	switch {
	case !isNotFound(err):
		// The machine or the file system failed.
	case errors.Is(err, errNoDirectory):
		if f.dirMissing.Swap(true) {
			return
		}
	case !errors.Is(err, fs.ErrPermission):
		return
	}
	Logger(ctx).LogAttrs(ctx, slog.LevelError, "file cannot be read",
		slog.String("path", name), slog.String("err", err.Error()))
}

// keepFresh sets the time of the next look at a file.
func (f *FileServer) keepFresh(e *fileEntry, now time.Time) {
	until := int64(math.MaxInt64)
	switch {
	case f.config.Recheck >= 0:
		until = int64(now.Add(f.config.Recheck).Sub(f.start))
	case !e.stable:
		until = int64(now.Add(youngAge).Sub(f.start))
	}
	e.freshUntil.Store(until)
}

// serve responds with a file. It allocates nothing for a file in memory, unless
// the request has a Range, or a condition other than the tag or date of that
// very entry.
func (f *FileServer) serve(w http.ResponseWriter, r *http.Request, e *fileEntry) {
	ranged := r.Header["Range"] != nil
	v := &e.variants[0]
	if len(e.codings) != 0 && !ranged {
		v = &e.variants[1+slices.Index(e.codings, negotiate(r.Header, e.codings...))]
	}

	switch e.status(r, v, ranged) {
	case http.StatusNotModified:
		e.setHeader(w.Header(), v, r.URL.RawQuery)
		w.WriteHeader(http.StatusNotModified)
	case http.StatusOK:
		if r.Method == http.MethodGet && !releaseTimeout(w) {
			return
		}
		e.setBodyHeader(w.Header(), v, r.URL.RawQuery)
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusOK)
			return
		}
		srv, ok := r.Context().Value(http.ServerContextKey).(*http.Server)
		if len(v.body) <= 16<<10 && !(ok && srv.WriteTimeout <= 0) {
			w.Write(v.body) // WriteTimeout is enough
			return
		}
		if _, err := fileDeadline(w, r).write(v.body); err != nil {
			panic(http.ErrAbortHandler)
		}
	default:
		f.serveContent(w, r, e, v)
	}
}

// status returns the status of a response from memory, and 0 if only
// [http.ServeContent] can tell.
func (e *fileEntry) status(r *http.Request, v *fileVariant, ranged bool) int {
	tags, since := r.Header["If-None-Match"], r.Header["If-Modified-Since"]
	switch {
	case r.Header["If-Match"] != nil, r.Header["If-Unmodified-Since"] != nil:
		return 0
	case tags == nil && since == nil:
		if ranged && v.size > 0 || v.body == nil && r.Method != http.MethodHead {
			return 0
		}
		return http.StatusOK
	case slices.Equal(tags, v.etag), tags == nil && slices.Equal(since, e.lastModified):
		return http.StatusNotModified
	}
	return 0
}

// These are shared by responses and never written to.
var (
	acceptRangesValue = []string{"bytes"}
	immutableValue    = []string{"public, max-age=31536000, immutable"}
	noCacheValue      = []string{"no-cache"}
	noStoreValue      = []string{"no-store"}
)

// setHeader sets what a 200, a 206 and a 304 have in common.
func (e *fileEntry) setHeader(h http.Header, v *fileVariant, query string) {
	h["Cache-Control"] = e.cacheControlFor(query)
	h["Etag"] = v.etag
	h["X-Content-Type-Options"] = nosniffValue
	if e.lastModified != nil {
		h["Last-Modified"] = e.lastModified
	}
	if e.varies {
		addVary(h, "Accept-Encoding")
	}
}

// setBodyHeader sets the header of a 200.
func (e *fileEntry) setBodyHeader(h http.Header, v *fileVariant, query string) {
	e.setHeader(h, v, query)
	h["Content-Type"] = e.contentType
	h["Content-Length"] = v.length
	if v.encoding != nil {
		h["Content-Encoding"] = v.encoding
	}
	if v.ranges {
		h["Accept-Ranges"] = acceptRangesValue
	}
}

// cacheControlFor returns the Cache-Control for a URL with this query.
func (e *fileEntry) cacheControlFor(query string) []string {
	switch {
	case query == "", e.private, !e.stable:
		return e.cacheControl
	case query == e.versionQuery:
		return immutableValue
	case strings.Contains("&"+query, "&v="):
		return noCacheValue
	}
	return e.cacheControl
}

// youngCacheControl returns the Cache-Control of what may change at once.
func (e *fileEntry) youngCacheControl() []string {
	if e.private {
		return noStoreValue
	}
	return noCacheValue
}

// maxRanges is more than any honest client asks for at once. The header of each
// part is longer than a short range.
const maxRanges = 64

// serveContent lets net/http decide on conditions and ranges, and serves bytes
// that are not in memory.
func (f *FileServer) serveContent(w http.ResponseWriter, r *http.Request, e *fileEntry, v *fileVariant) {
	var content io.ReadSeeker = bytes.NewReader(v.body)
	info := v.info
	if v.body == nil {
		file, opened, err := f.openRegular(v.name)
		if err == nil {
			defer file.Close()
		}
		if err != nil || !fileUnchanged(opened, v.info) {
			f.cache.put(e.key, nil) // the next request looks again
			if original := &e.variants[0]; v != original {
				f.serveContent(w, r, e, original)
				return
			}
		}
		if err != nil {
			f.logError(r.Context(), v.name, err)
			f.serveError(w, r, err)
			return
		}
		info = opened
		if content, _ = file.(io.ReadSeeker); content == nil {
			content = wholeFile{file, info.Size()}
		}
	}

	if !releaseTimeout(w) {
		return
	}

	h, modified := w.Header(), e.modified
	e.setBodyHeader(h, v, r.URL.RawQuery)
	if !fileUnchanged(info, v.info) { // it has just changed, and has no validators yet
		delete(h, "Etag")
		delete(h, "Last-Modified")
		modified = time.Time{}
		h["Content-Length"] = []string{strconv.FormatInt(info.Size(), 10)}
		h["Cache-Control"] = e.youngCacheControl()
	}

	if ranges := r.Header.Get("Range"); ranges != "" && !v.ranges || strings.Count(ranges, ",") >= maxRanges {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
	}
	sendfile := r.ProtoMajor == 1 && r.TLS == nil
	http.ServeContent(&fileWriter{w, fileDeadline(w, r), sendfile, v.ranges}, r, "", modified, content)
}

// wholeFile is a file that cannot seek, for [http.ServeContent], which then
// seeks only to learn the size.
type wholeFile struct {
	fs.File
	size int64
}

func (f wholeFile) Seek(_ int64, whence int) (int64, error) {
	if whence == io.SeekEnd {
		return f.size, nil
	}
	return 0, nil
}

// fileWriter is what [http.ServeContent] writes to. It moves the write deadline
// along, and aborts a response that cannot go on, so that no client takes a
// part for the whole.
type fileWriter struct {
	http.ResponseWriter
	deadline rollingDeadline
	sendfile bool // HTTP/1 without TLS
	ranges   bool // of the variant
}

// fileDeadline gives a client at least 3 seconds for each write: the kernel
// shows its progress only when a third of the buffer is free, which over
// loopback is a megabyte.
func fileDeadline(w http.ResponseWriter, r *http.Request) rollingDeadline {
	return rollingDeadline{w, max(cmp.Or(writeTimeoutOf(r.Context()), writeAllowance), 3*time.Second)}
}

// WriteHeader removes from the header what describes a file that is not sent.
// net/http leaves some of it in a 412, and offers ranges in every 200.
func (w *fileWriter) WriteHeader(status int) {
	h := w.Header()
	if status >= http.StatusBadRequest {
		contentRange, ok := h["Content-Range"] // of a 416
		clearRepresentation(h)
		if ok {
			h["Content-Range"] = contentRange
		}
	}
	if !w.ranges {
		delete(h, "Accept-Ranges")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *fileWriter) Write(p []byte) (int, error) {
	n, err := w.deadline.write(p)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	return n, nil
}

// ReadFrom keeps sendfile, which needs the limit directly around the file, as
// io.CopyN has it. If the deadline interrupts a file after a piece was taken,
// ReadFrom goes on: the header is out by then. No other source can be read
// twice.
func (w *fileWriter) ReadFrom(src io.Reader) (int64, error) {
	limited, ok := src.(*io.LimitedReader)
	if !ok {
		return io.Copy(struct{ io.Writer }{w}, src)
	}

	size, piece := limited.N, int64(writePiece)
	file, _ := limited.R.(*os.File)
	if !w.sendfile {
		file = nil
	}

	var start int64
	if file != nil {
		piece *= 4 // sendfile is slow in small pieces
		var err error
		if start, err = file.Seek(0, io.SeekCurrent); err != nil {
			panic(http.ErrAbortHandler)
		}
	}

	for limited.N > 0 {
		w.deadline.arm()
		n, err := io.CopyN(w.ResponseWriter, limited.R, min(limited.N, piece))
		limited.N -= n
		if err == nil {
			continue
		}
		if file == nil || n < writePiece || !errors.Is(err, os.ErrDeadlineExceeded) {
			panic(http.ErrAbortHandler)
		}
		if _, err := file.Seek(start+size-limited.N, io.SeekStart); err != nil { // a copy in memory has read ahead
			panic(http.ErrAbortHandler)
		}
	}
	return size, nil
}

// youngAge is the age from which on the next change is certain to have another
// time. The coarsest file systems, except FAT, count in full seconds.
const youngAge = time.Second

func isYoung(info fs.FileInfo) bool { return time.Since(info.ModTime()).Abs() <= youngAge }

// buildEntry reads a file, with those beside it, and makes its header.
func (f *FileServer) buildEntry(key, name string) (*fileEntry, error) {
	v, data, err := f.readFile(name)
	if err != nil {
		return nil, err
	}

	ext := strings.ToLower(path.Ext(name))
	e := &fileEntry{
		key:          key,
		stable:       v.stable,
		versionQuery: "v=" + v.tag,
		contentType:  []string{cmp.Or(contentTypes[ext], mime.TypeByExtension(ext), http.DetectContentType(data))},
		cost:         int64(2<<10 + 4*len(key)), // beside the bytes
	}
	e.add(v, "")

	e.sidecars = f.sidecarsOf(name, v.info)
	compresses := compressible(e.contentType[0])
	if ext == ".svgz" { // is gzip by its name
		e.variants[0].encoding, compresses = fileGzip.header, false
	} else {
		f.addSidecars(e, name)
	}

	if compresses && len(data) >= 1<<10 && !slices.Contains(e.codings, "gzip") {
		if compressed := gzipped(data); len(compressed) < len(data) {
			e.add(fileVariant{tag: v.tag, size: int64(len(compressed)), body: compressed}, "gzip")
		}
	}
	e.varies = compresses || len(e.codings) != 0

	// The date of a young file may also be that of its next content, and one after
	// that of the response is not allowed (RFC 9110, Section 8.8.2.1).
	if modified := v.info.ModTime(); v.stable && modified.After(earliestTime) && modified.Before(time.Now()) {
		e.modified = modified
		e.lastModified = []string{modified.UTC().Format(http.TimeFormat)}
	}

	cacheControl := f.config.CacheControl
	if strings.HasPrefix(e.contentType[0], "text/html") || path.Base(name) == f.config.Index || name == f.config.Fallback {
		cacheControl = f.config.HTMLCacheControl
	}
	e.cacheControl = []string{cacheControl}
	e.private = hasMember(e.cacheControl, "private") || hasMember(e.cacheControl, "no-store")
	if !e.stable {
		e.cacheControl = e.youngCacheControl()
	}
	return e, nil
}

// add adds the file in a coding, with its part of the header.
func (e *fileEntry) add(v fileVariant, coding string) {
	tag := `"` + v.tag + `"`
	if coding != "" {
		v.encoding = []string{coding}
		e.codings = append(e.codings, coding)
		tag = `"` + v.tag + "-" + coding + `"`
	}
	if !v.stable && v.body == nil { // the tag is made of the time
		tag = "W/" + tag
	}
	v.etag = []string{tag}
	v.length = []string{strconv.FormatInt(v.size, 10)}
	e.variants = append(e.variants, v)
	e.cost += int64(len(v.body))
}

func gzipped(data []byte) []byte {
	var buf bytes.Buffer
	z := fileGzip.get(&buf)
	z.Write(data)
	z.Close()
	fileGzip.pool.Put(z)
	return bytes.Clone(buf.Bytes())
}

// fileGzip is gzip at a level that is paid once per content. Level 8 comes
// within 1 percent of level 9 on Go 1.26 and 1.27, and takes some 20 ms for 1
// MiB of text.
var fileGzip = encoding{
	Encoder: Encoder{"gzip", func() EncodingWriter {
		z, _ := gzip.NewWriterLevel(nil, 8)
		return z
	}},
	header: []string{"gzip"},
}

// earliestTime is later than the times that stand for none: the zero ones of
// package time, of Unix and of DOS, which zip files have, and the 1 of Nix.
var earliestTime = time.Date(1980, 1, 2, 0, 0, 0, 0, time.UTC)

// readFile reads a file and makes its tag. Of a file above MaxCachedFile it
// reads the first bytes, which tell the media type. It reads the rest only if
// the file has no time to tell one content from the next.
func (f *FileServer) readFile(name string) (v fileVariant, data []byte, err error) {
	file, info, err := f.openRegular(name)
	if err != nil {
		return v, nil, err
	}
	defer file.Close()

	young, timeless := isYoung(info), info.ModTime().Before(earliestTime)

	limit := f.config.MaxCachedFile + 1
	if info.Size() >= limit {
		limit = sniffLen
	}
	if data, err = io.ReadAll(io.LimitReader(file, limit)); err != nil {
		return v, nil, err
	}

	large := max(info.Size(), int64(len(data))) > f.config.MaxCachedFile
	hash := sha256.New()
	hash.Write(data)
	if large && timeless {
		if _, err = io.Copy(hash, file); err != nil {
			return v, nil, err
		}
	}

	after, err := file.Stat()
	if err != nil {
		return v, nil, err
	}

	_, seeks := file.(io.Seeker)
	v = fileVariant{
		name:   name,
		info:   info,
		stable: !young && fileUnchanged(info, after),
		tag:    base64.RawURLEncoding.EncodeToString(hash.Sum(nil)[:15]), // 120 bits
		ranges: seeks,
		size:   info.Size(),
	}
	if large {
		if !timeless {
			v.tag = strconv.FormatInt(info.ModTime().UnixNano(), 36) + "-" + strconv.FormatInt(v.size, 36)
			if !v.stable {
				v.tag += "-young" // and not that of the next content
			}
		}
		return v, data[:min(len(data), sniffLen)], nil
	}
	v.size = int64(len(data)) // that of a file in /proc is not what Stat says
	v.stable = v.stable && v.size == info.Size()
	if _, ok := file.(*os.File); !ok || !v.stable || v.size <= 256<<10 { // sendfile is faster for a larger one
		v.body, v.ranges = bytes.Clone(data), true
	}
	return v, data, nil
}

// openRegular opens a regular file.
func (f *FileServer) openRegular(name string) (fs.File, fs.FileInfo, error) {
	file, err := f.config.FS.Open(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := regular(file.Stat())
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

// stat looks at a regular file. It comes before the first openRegular, and
// opens nothing if the file system has a way: opening a pipe may block, and
// opening a device may have effects.
func (f *FileServer) stat(name string) (fs.FileInfo, error) {
	if links, ok := f.config.FS.(fs.ReadLinkFS); ok { // such as fs.Sub of os.DirFS, which has no Stat
		if info, err := links.Lstat(name); err != nil || info.Mode()&fs.ModeSymlink == 0 {
			return regular(info, err)
		}
	}
	return regular(fs.Stat(f.config.FS, name))
}

// regular returns an error for everything but a regular file.
func regular(info fs.FileInfo, err error) (fs.FileInfo, error) {
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, errIsDirectory
	case !info.Mode().IsRegular():
		return nil, fs.ErrNotExist
	}
	return info, nil
}

// addSidecars adds the variants of a file that are in files beside it. It
// leaves out one that has changed since it was found, until the next look.
func (f *FileServer) addSidecars(e *fileEntry, name string) {
	for i, info := range e.sidecars {
		if info == nil {
			continue
		}
		v, _, err := f.readFile(name + sidecarCodings[i].suffix)
		if err != nil || !v.stable || !fileUnchanged(v.info, info) {
			e.sidecars[i] = nil
			continue
		}
		v.ranges = false // a Range is of the file itself
		e.add(v, sidecarCodings[i].coding)
	}
}

// sidecarCodings are in the order of preference at equal weight.
var sidecarCodings = [...]struct{ suffix, coding string }{{".br", "br"}, {".zst", "zstd"}, {".gz", "gzip"}}

// sidecarsOf returns, for each of sidecarCodings, the file beside name that has
// it in that coding, nil without one that counts. Tools create the file empty,
// fill it for seconds, and copy the original's time, some in full seconds.
func (f *FileServer) sidecarsOf(name string, original fs.FileInfo) []fs.FileInfo {
	if !f.config.Precompressed {
		return nil
	}
	found := make([]fs.FileInfo, len(sidecarCodings))
	for i, s := range sidecarCodings {
		info, err := f.stat(name + s.suffix)
		if err == nil && info.Size() > 0 && !isYoung(info) && original.ModTime().Sub(info.ModTime()) <= time.Second {
			found[i] = info
		}
	}
	return found
}

// contentTypes are not left to the host, whose tables differ.
var contentTypes = map[string]string{
	".html": "text/html; charset=utf-8", ".htm": "text/html; charset=utf-8",
	".xhtml": "application/xhtml+xml", ".css": "text/css; charset=utf-8",
	".js": "text/javascript; charset=utf-8", ".mjs": "text/javascript; charset=utf-8", ".cjs": "text/javascript; charset=utf-8",
	".txt": "text/plain; charset=utf-8", ".md": "text/markdown; charset=utf-8",
	".csv": "text/csv; charset=utf-8", ".vtt": "text/vtt; charset=utf-8", ".xml": "text/xml; charset=utf-8",
	".json": "application/json", ".map": "application/json", ".webmanifest": "application/manifest+json",
	".atom": "application/atom+xml", ".rss": "application/rss+xml", ".yaml": "application/yaml", ".yml": "application/yaml",
	".wasm": "application/wasm", ".pdf": "application/pdf",
	".zip": "application/zip", ".gz": "application/gzip", ".zst": "application/zstd", ".tar": "application/x-tar",
	".png": "image/png", ".apng": "image/apng", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif",
	".webp": "image/webp", ".avif": "image/avif", ".svg": "image/svg+xml", ".svgz": "image/svg+xml", ".ico": "image/x-icon",
	".woff": "font/woff", ".woff2": "font/woff2", ".ttf": "font/ttf", ".otf": "font/otf",
	".mp3": "audio/mpeg", ".m4a": "audio/mp4", ".wav": "audio/wav", ".flac": "audio/flac",
	".ogg": "audio/ogg", ".opus": "audio/ogg",
	".mp4": "video/mp4", ".m4v": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime",
}

// dirFS is the directory of this name. Each look opens it anew: an [os.Root]
// stays with the directory that it has opened when a link is turned to another.
type dirFS string

func (d dirFS) Open(name string) (fs.File, error) {
	root, err := d.openRoot()
	if err != nil {
		return nil, err
	}
	defer root.Close()

	file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // waits for no pipe
	if err != nil {
		return nil, err // and no nil *os.File in an interface that is not nil
	}
	return file, nil
}

func (d dirFS) Stat(name string) (fs.FileInfo, error) {
	root, err := d.openRoot()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.Stat(name)
}

func (d dirFS) openRoot() (*os.Root, error) {
	root, err := os.OpenRoot(string(d))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoDirectory, err)
	}
	return root, nil
}

// fileCache keeps entries by key, as many as fit. It drops the oldest when it
// needs room. One that was asked for again goes to the end of the queue
// instead, up to three times, so that a walk over every file does not push out
// what is in demand (CLOCK).
type fileCache struct {
	mu      sync.RWMutex // guards what follows
	entries map[string]*fileEntry
	queue   list.List
	bytes   int64
	limit   int64
}

// get returns the entry of a key, and renews its lives.
func (c *fileCache) get(key string) *fileEntry {
	c.mu.RLock()
	e := c.entries[key]
	c.mu.RUnlock()
	if e != nil && e.lives.Load() < 3 {
		e.lives.Store(3)
	}
	return e
}

// put replaces the entry of a key. With nil it only drops the old one.
func (c *fileCache) put(key string, e *fileEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.entries[key]; old != nil {
		c.dropLocked(old)
	}
	if e == nil || e.cost > c.limit {
		return
	}

	c.entries[e.key] = e
	e.place = c.queue.PushBack(e)
	for c.bytes += e.cost; c.bytes > c.limit; {
		oldest := c.queue.Front().Value.(*fileEntry)
		if oldest.lives.Add(-1) < 0 {
			c.dropLocked(oldest)
		} else {
			c.queue.MoveToBack(oldest.place)
		}
	}
}

func (c *fileCache) dropLocked(e *fileEntry) {
	c.queue.Remove(e.place)
	delete(c.entries, e.key)
	c.bytes -= e.cost
}
