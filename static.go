package conduit

import (
	"bytes"
	"cmp"
	"container/list"
	"crypto/rand"
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
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// FileServer serves the files of a directory or an [fs.FS]: small ones from
// memory, with their headers, their ETag and their gzip form made once per
// content, large ones by sendfile.
//
// It answers GET and HEAD, and 405 to anything else. A directory is answered
// with its index file, never with a listing. Conditions and ranges are those
// of [RFC 9110], Sections 13 and 14. Text of 1 KiB and more goes out as gzip to
// clients that accept it, except in answer to a Range; [Compression] around a
// FileServer leaves that alone.
//
// Caching: a reply may be kept for a year, which is CacheControl's default, and
// HTML must be asked for again, so that a page knows of its new scripts. To
// have those fetched, give them new names, or let [FileServer.URL] add the hash
// of the content: a URL with the right hash is immutable, and one with another
// must be asked for again.
//
// Files may change at any time. They are looked at again when Recheck has
// passed, and replies never mix two contents: an ETag of what is cached is the
// hash of the very bytes sent, and a large file that changes on its way is cut
// short. A file should be replaced by renaming all the same: of one above 256
// KiB that is written into, a client may get a mixture, since what the kernel
// has yet to send is the file itself. The directory itself may be replaced too,
// such as a link that is turned to the next release.
//
// Nothing outside the directory is served: a path is refused unless it is in
// its shortest form, without backslashes, control characters, encoded slashes
// and names that end in a dot, and [os.Root] sees to links. Names that begin
// with a dot are refused, except .well-known, and so are devices, pipes and
// sockets. What is refused gets the 404 of a file that is not there.
//
// A client that takes nothing for the server's WriteTimeout, or 15 seconds where
// there is none, is let go, at the latest when twice that has passed. One that
// goes on taking is never cut, neither by WriteTimeout nor by a [Timeout] around
// the FileServer. What a client has taken shows only when a third of the kernel's
// buffer has drained: 64 KiB where the buffer is small, as it is for a client that
// is slow across a network, and over a megabyte on loopback. That much has to be
// taken within that time, which is never less than 3 seconds.
//
// Its methods may be called from any goroutine.
//
// [RFC 9110]: https://www.rfc-editor.org/rfc/rfc9110
type FileServer struct {
	config FileServerConfig
	tree   fileTree
	cache  *fileCache
	start  time.Time   // what instants are counted from
	gone   atomic.Bool // the directory is missing, and that has been logged
	closed atomic.Bool

	cacheControl, htmlCacheControl []string

	mu      sync.Mutex // guards flights
	flights map[string]*fileFlight
}

// FileServerConfig configures [NewFileServerWith]. A zero field means the
// default that its comment gives.
type FileServerConfig struct {
	// Dir is the directory to serve. One of Dir and FS is required.
	Dir string

	// FS is the file system to serve, such as an embed.FS. Files without
	// modification times, which an embed.FS has, get no Last-Modified, and
	// must not change: only their size would tell.
	FS fs.FS

	// Prefix is what the paths of URLs begin with, such as "/static". "" and
	// "/" are the root. Register the FileServer at the prefix with a slash, and
	// do not strip it.
	Prefix string

	// Index is the file that stands for its directory, "index.html" by default.
	Index string

	// Fallback, when set, is the file that answers for unknown paths without an
	// extension, if the client accepts text/html: the page of a single-page
	// application.
	Fallback string

	// NotFound, when set, answers where there is no file. Its status is the
	// reply's: 404, as a rule.
	NotFound http.Handler

	// CacheControl is the Cache-Control of files, "public, max-age=31536000" by
	// default. One with private or no-store also holds for what is fetched by
	// [FileServer.URL], which is not immutable then.
	CacheControl string

	// HTMLCacheControl is that of HTML, index files and the fallback,
	// "no-cache" by default.
	HTMLCacheControl string

	// Dotfiles allows names that begin with a dot.
	Dotfiles bool

	// Precompressed serves name.br, name.zst or name.gz for name to clients
	// that prefer the coding, if the file is not older than name.
	Precompressed bool

	// CacheBytes bounds the memory for cached files, 64 MiB by default.
	// Negative: all files are sent as large ones are, and what is known of them
	// takes 1 MiB at most.
	CacheBytes int64

	// MaxCachedFile is the size up to which a file is cached, 1 MiB by default
	// and at most a quarter of CacheBytes. Of files above 256 KiB only the gzip
	// form is kept. Files above MaxCachedFile are sent as they are, with an ETag
	// made of size and modification time. Negative: none is cached.
	MaxCachedFile int64

	// Recheck is how long a cached file is served before the next look whether
	// it has changed, 1 second by default. Negative: for ever.
	Recheck time.Duration
}

const (
	residentFile = 256 << 10 // up to this size a file's own bytes are kept
	fileGzipMin  = 1 << 10   // from this size on text is coded
	fileGzip     = 6         // the level, paid once per content

	// racyWindow is how old a change must be for the next one to be certain
	// to have another time. Kernels and file systems that count in full
	// seconds are the coarsest in use.
	racyWindow = time.Second
)

// earliestTime is later than the times that stand for none: the zero ones of
// package time, of Unix and of DOS, which zip files have, and the 1 of Nix.
var earliestTime = time.Date(1980, 1, 2, 0, 0, 0, 0, time.UTC)

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
	d.MaxCachedFile = min(d.MaxCachedFile, d.CacheBytes/4)
	d.Recheck = cmp.Or(d.Recheck, time.Second)

	var faults faultList
	switch {
	case d.Dir == "" && d.FS == nil:
		faults.add("Dir: is required, or FS")
	case d.Dir != "" && d.FS != nil:
		faults.add("FS: is set, and Dir too")
	}
	if d.Prefix != "" && (d.Prefix[0] != '/' || path.Clean(d.Prefix) != strings.TrimSuffix(d.Prefix, "/") && d.Prefix != "/") {
		faults.add("Prefix: %q is not a path that begins with a slash and is in its shortest form", d.Prefix)
	}
	d.Prefix = strings.TrimSuffix(d.Prefix, "/")
	for _, s := range []struct{ field, name string }{{"Index", d.Index}, {"Fallback", d.Fallback}} {
		if s.name != "" && (!validFileName(s.name) || s.name == ".") {
			faults.add("%s: %q is not the name of a file below the root", s.field, s.name)
		}
	}
	if validFileName(d.Index) && strings.Contains(d.Index, "/") {
		faults.add("Index: %q has a slash, and stands for the directory that it is in", d.Index)
	}
	if d.Fallback != "" && !d.Dotfiles && validFileName(d.Fallback) && hasDotfile(d.Fallback) {
		faults.add("Fallback: %q begins with a dot, and Dotfiles is not set", d.Fallback)
	}
	return d, errors.Join(faults...)
}

// NewFileServer serves the directory dir at URLs that begin with prefix, with
// the defaults of [FileServerConfig]. It panics if dir cannot be opened, so
// that a service without its files does not start.
func NewFileServer(dir, prefix string) *FileServer {
	f, err := NewFileServerWith(&FileServerConfig{Dir: dir, Prefix: prefix})
	if err != nil {
		panic(err)
	}
	return f
}

// NewFileServerWith returns a FileServer for cfg, which it copies. The error
// names every faulty field: neither or both of Dir and FS, a directory that
// cannot be opened, a Prefix without a slash, an Index or a Fallback that is
// outside the root.
func NewFileServerWith(cfg *FileServerConfig) (*FileServer, error) {
	c, err := cfg.withDefaults()
	f := &FileServer{
		config:           c,
		tree:             fsTree{c.FS},
		cache:            newFileCache(c.CacheBytes),
		start:            time.Now(),
		cacheControl:     []string{c.CacheControl},
		htmlCacheControl: []string{c.HTMLCacheControl},
		flights:          make(map[string]*fileFlight),
	}
	if c.Dir != "" {
		tree, dirErr := newDirTree(c.Dir, c.Recheck >= 0)
		if err = errors.Join(err, dirErr); err != nil && dirErr == nil {
			tree.close()
		}
		f.tree = tree
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ServeHTTP answers a request for a file.
func (f *FileServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.RawPath == "" && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
		if e := f.cache.get(r.URL.Path); e != nil && f.isFresh(e) {
			f.serve(w, r, e, 0)
			return
		}
	}
	f.serveUncached(w, r)
}

func (f *FileServer) now() int64 { return int64(time.Since(f.start)) }

func (f *FileServer) isFresh(e *fileEntry) bool {
	return f.config.Recheck < 0 || f.now()-e.checked.Load() < int64(f.config.Recheck)
}

// These are shared by replies and never written to.
var (
	acceptRangesValue = []string{"bytes"}
	immutableValue    = []string{"public, max-age=31536000, immutable"}
	staleVersionValue = []string{"no-cache"}
)

// serve answers with a file that is there. With an entry whose bytes are in
// memory it allocates nothing, unless the request has conditions other than
// the tag of that very entry, or ranges. It is attempted again when a file turns
// out to have changed since the entry was made.
func (f *FileServer) serve(w http.ResponseWriter, r *http.Request, e *fileEntry, attempt int) {
	e, cacheControl := f.versioned(e, r.URL.RawQuery)
	ranges := r.Method == http.MethodGet && r.Header["Range"] != nil
	v := &e.identity
	if len(e.coded) != 0 && !ranges {
		v = e.coding(negotiate(r.Header, e.codings...))
	}

	switch precondition(r.Header, e, v) {
	case http.StatusPreconditionFailed:
		fileError(w, http.StatusPreconditionFailed)
		return
	case http.StatusNotModified:
		e.setHeader(w.Header(), v, cacheControl)
		w.WriteHeader(http.StatusNotModified)
		return
	}
	switch {
	case r.Method == http.MethodHead:
		e.setBodyHeader(w.Header(), v, cacheControl)
		w.WriteHeader(http.StatusOK)
	case ranges || v.body == nil:
		f.serveParts(w, r, e, v, cacheControl, attempt)
	case releaseTimeout(w):
		e.setBodyHeader(w.Header(), v, cacheControl)
		srv, ok := r.Context().Value(http.ServerContextKey).(*http.Server)
		if len(v.body) <= directWrite && !(ok && srv.WriteTimeout <= 0) {
			w.Write(v.body)
			return
		}
		s := fileSender{w: w, variant: v}
		s.begin(r)
		s.send(fileRange{0, v.size})
	}
}

// directWrite is up to what size a body is sent under the server's WriteTimeout,
// where it has one, instead of a deadline that moves.
const directWrite = 16 << 10

// versioned returns what answers a request with this query, and its
// Cache-Control. That is e, with the hash where the query asks for a version.
func (f *FileServer) versioned(e *fileEntry, query string) (*fileEntry, []string) {
	if query == "" || e.private {
		return e, e.cacheControl
	}
	if query == e.query {
		return e, immutableValue
	}
	version, ok := versionOf(query)
	if !ok {
		return e, e.cacheControl
	}
	if !e.identity.isWeak() { // or the hash would be made again and again
		e = f.hashed(e)
	}
	if version == e.hash && e.hash != "" && !e.identity.isWeak() {
		return e, immutableValue
	}
	return e, staleVersionValue
}

// versionOf returns the value of v in a query.
func versionOf(query string) (string, bool) {
	if !strings.Contains(query, "v=") {
		return "", false
	}
	values, _ := url.ParseQuery(query)
	return values.Get("v"), values.Has("v")
}

// setHeader sets what a 200, a 206 and a 304 have in common.
func (e *fileEntry) setHeader(h http.Header, v *fileVariant, cacheControl []string) {
	h["Cache-Control"] = cacheControl
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
func (e *fileEntry) setBodyHeader(h http.Header, v *fileVariant, cacheControl []string) {
	e.setHeader(h, v, cacheControl)
	h["Content-Type"] = e.contentType
	h["Content-Length"] = v.length
	if v.coding != "" {
		h["Content-Encoding"] = v.encoding
	} else if !e.sequential {
		h["Accept-Ranges"] = acceptRangesValue
	}
}

// precondition evaluates the conditions of a request in the order of RFC 9110,
// Section 13.2.2, and returns the status that they make, 0 for none.
func precondition(h http.Header, e *fileEntry, v *fileVariant) int {
	if !matches(h, e, v) {
		return http.StatusPreconditionFailed
	}
	if tags := h["If-None-Match"]; len(tags) != 0 {
		if tags[0] == v.etag[0] || listsTag(tags, v.etag[0], false) {
			return http.StatusNotModified
		}
		return 0
	}
	if since := h["If-Modified-Since"]; len(since) == 1 && e.lastModified != nil {
		if since[0] == e.lastModified[0] {
			return http.StatusNotModified
		}
		if t, err := http.ParseTime(since[0]); err == nil && !e.modified.After(t) {
			return http.StatusNotModified
		}
	}
	return 0
}

// matches evaluates If-Match, or else If-Unmodified-Since. Without either it is
// true.
func matches(h http.Header, e *fileEntry, v *fileVariant) bool {
	if tags := h["If-Match"]; len(tags) != 0 {
		return listsTag(tags, v.etag[0], true)
	}
	since := h["If-Unmodified-Since"]
	if len(since) != 1 || e.lastModified == nil {
		return true
	}
	t, err := http.ParseTime(since[0])
	return err != nil || !e.modified.After(t)
}

// listsTag reports whether a list of entity tags has this one, or is a *. The
// strong comparison takes only equal strong tags for the same.
func listsTag(lines []string, tag string, strong bool) bool {
	if strong && tag[0] == 'W' {
		return len(lines) == 1 && strings.Trim(lines[0], " \t") == "*"
	}
	for _, rest := range lines {
		for {
			rest = strings.TrimLeft(rest, " \t,")
			if rest == "" {
				break
			}
			if rest[0] == '*' {
				return true
			}
			opaque, weak := strings.CutPrefix(rest, "W/")
			if opaque == "" || opaque[0] != '"' {
				break
			}
			end := strings.IndexByte(opaque[1:], '"')
			if end < 0 {
				break
			}
			if opaque[:end+2] == strings.TrimPrefix(tag, "W/") && !(strong && weak) {
				return true
			}
			rest = opaque[end+2:]
		}
	}
	return false
}

// serveUncached finds the file of a request that the cache has no fresh answer
// for, and says what to do where there is none.
func (f *FileServer) serveUncached(w http.ResponseWriter, r *http.Request) {
	if !onlyReads(w, r) {
		return
	}
	name, ok := f.nameOf(r.URL)
	if !ok {
		f.notFound(w, r)
		return
	}
	isDir := name == "" || strings.HasSuffix(name, "/")
	file := name
	if isDir {
		file += f.config.Index
	}
	e, err := f.entry(r.URL.Path, file)
	if err == nil {
		f.serve(w, r, e, 0)
		return
	}
	if !isDir && errors.Is(err, errIsDirectory) {
		// The index decides: a directory without one is not there.
		if _, err = f.tree.stat(path.Join(name, f.config.Index)); err == nil {
			redirectToDirectory(w, r)
			return
		}
	}
	if f.isUnavailable(r, err) {
		fileError(w, http.StatusInternalServerError)
		return
	}
	if f.config.Fallback != "" && (path.Ext(name) == "" || name == ".") {
		addVary(w.Header(), "Accept")
		if !acceptsHTML(r.Header) {
			f.notFound(w, r)
			return
		}
		if e, err := f.entry(f.config.Prefix+"/"+f.config.Fallback, f.config.Fallback); err == nil {
			addVary(w.Header(), "Accept-Encoding")
			u := *r.URL
			u.RawQuery = "" // it is the application's, and no version of the page
			r = r.WithContext(r.Context())
			r.URL = &u
			f.serve(w, r, e, 0)
			return
		}
	}
	f.notFound(w, r)
}

// nameOf returns the name of the file that a URL asks for, which ends in a
// slash if it is a directory and is "" for the root. It is false where no file
// can be meant.
func (f *FileServer) nameOf(u *url.URL) (string, bool) {
	if strings.Contains(u.RawPath, "%2f") || strings.Contains(u.RawPath, "%2F") {
		return "", false
	}
	name, ok := strings.CutPrefix(u.Path, f.config.Prefix)
	if !ok {
		return "", false
	}
	if name == "" && f.config.Prefix != "" {
		return ".", true // a directory without its slash
	}
	if name, ok = strings.CutPrefix(name, "/"); !ok && f.config.Prefix != "" {
		return "", false
	}
	if name == "" {
		return "", true
	}
	bare := strings.TrimSuffix(name, "/")
	if bare == "." || !validFileName(bare) || !f.config.Dotfiles && hasDotfile(bare) {
		return "", false
	}
	return name, true
}

// validFileName reports whether a name is in its shortest form and means the
// same on every system.
func validFileName(name string) bool {
	if !fs.ValidPath(name) {
		return false
	}
	for i := range len(name) {
		switch c := name[i]; {
		case c < ' ', c == '\\', c == 0x7f:
			return false
		case c == '.' && len(name) > 1 && (i == len(name)-1 || name[i+1] == '/'):
			return false // Windows drops it
		}
	}
	return true
}

func hasDotfile(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part[0] == '.' && part != ".well-known" { // RFC 8615
			return true
		}
	}
	return false
}

// redirectToDirectory adds the slash. The location is relative, which keeps it
// on this host and below whatever a router in between has stripped.
func redirectToDirectory(w http.ResponseWriter, r *http.Request) {
	location := url.URL{Path: path.Base(r.URL.Path) + "/", RawQuery: r.URL.RawQuery}
	h := w.Header()
	h["Location"] = []string{location.String()}
	h["X-Content-Type-Options"] = nosniffValue
	w.WriteHeader(http.StatusMovedPermanently)
}

// acceptsHTML reports whether a request asks for HTML by name, as the
// navigations of browsers do and the requests of scripts do not.
func acceptsHTML(h http.Header) bool {
	for _, line := range h["Accept"] {
		for member := range strings.SplitSeq(line, ",") {
			t, params, err := mime.ParseMediaType(member)
			if q, weighted := params["q"]; err == nil && t == "text/html" && !(weighted && parseWeight("q="+q) == 0) {
				return true
			}
		}
	}
	return false
}

func (f *FileServer) notFound(w http.ResponseWriter, r *http.Request) {
	if f.config.NotFound != nil {
		f.config.NotFound.ServeHTTP(w, r)
		return
	}
	fileError(w, http.StatusNotFound)
}

// isUnavailable reports whether an error is this machine's fault and not that
// of the request, and logs it then. A directory that has gone missing is logged
// once.
func (f *FileServer) isUnavailable(r *http.Request, err error) bool {
	unavailable := errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM) ||
		errors.Is(err, syscall.EIO) || errors.Is(err, errLoadPanicked) || errors.Is(err, errFileOverflows)
	if !unavailable && errors.Is(err, errDirectoryGone) {
		if f.gone.CompareAndSwap(false, true) {
			Logger(r.Context()).LogAttrs(r.Context(), slog.LevelError, "directory is missing", slog.String("err", err.Error()))
		}
		return false
	}
	f.gone.Store(false)
	if unavailable || errors.Is(err, fs.ErrPermission) {
		Logger(r.Context()).LogAttrs(r.Context(), slog.LevelError, "file cannot be read",
			slog.String("path", r.URL.Path), slog.String("err", err.Error()))
	}
	return unavailable
}

// fileError answers with an error that nobody keeps as if it were the file,
// though middleware may have said that of every reply. net/http's own file
// server does the same.
func fileError(w http.ResponseWriter, status int) {
	clearRepresentation(w.Header())
	statusError(w, status)
}

func statusError(w http.ResponseWriter, status int) {
	http.Error(w, strconv.Itoa(status)+" "+http.StatusText(status), status)
}

// URL returns the path at which the file is served, with the hash of its
// content: "/static/app.js?v=HASH". What is fetched from there may be kept for
// ever, for a changed file has another URL. Templates are where it belongs. For
// a name without a file it returns the path alone.
//
// A hash that is known costs a look at the cache; that of a file above
// MaxCachedFile is made by reading the whole file, once.
func (f *FileServer) URL(name string) string {
	name = strings.TrimLeft(name, "/") // a second one would begin a host
	u := url.URL{Path: f.config.Prefix + "/" + name}
	e := f.cache.get(u.Path)
	if e == nil || !f.isFresh(e) {
		file, ok := f.nameOf(&u)
		if !ok {
			return u.String()
		}
		if file == "" || strings.HasSuffix(file, "/") {
			file += f.config.Index
		}
		var err error
		if e, err = f.entry(u.Path, file); err != nil {
			return u.String()
		}
	}
	u.RawQuery = f.hashed(e).query
	return u.String()
}

// Close frees the cache and the directory. Requests get 404 afterwards. More
// than once is nil.
func (f *FileServer) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	f.cache.clear()
	return f.tree.close()
}

// fileEntry is a file as it was when it was read. It does not change, but for
// what is atomic.
type fileEntry struct {
	key, name  string
	sidecars   [len(sidecarCodings)]fileStamp // zero: not there, or too old
	settled    bool                           // the next change is certain to be seen in the stamps
	private    bool                           // its Cache-Control has private or no-store, and stays for a version
	sequential bool                           // to be sent from a file that cannot seek
	hash       string                         // "" for a large file nobody has asked the hash of
	query      string                         // "v=" and the hash
	modified   time.Time                      // in full seconds

	identity fileVariant
	coded    []fileVariant
	codings  []string // theirs, in order of preference
	varies   bool

	contentType, lastModified, cacheControl []string

	checked  atomic.Int64              // when the file was last looked at
	withHash atomic.Pointer[fileEntry] // of a large file: the same with the hash

	// The cache's.
	visits atomic.Int32
	cost   int64
	place  *list.Element
	proven bool
}

// fileVariant is a file in one coding, ready to be sent.
type fileVariant struct {
	coding string // "" is identity
	name   string // the file that has the bytes
	stamp  fileStamp
	size   int64
	body   []byte // nil if the bytes are to be sent from the file

	etag, length, encoding []string
}

func (v *fileVariant) isWeak() bool { return v.etag[0][0] == 'W' }

func (e *fileEntry) coding(coding string) *fileVariant {
	for i := range e.coded {
		if e.coded[i].coding == coding {
			return &e.coded[i]
		}
	}
	return &e.identity
}

// fileStamp tells one state of a file from another.
type fileStamp struct {
	info    fs.FileInfo
	changed time.Time // of the inode, where the system has it
}

func stampOf(info fs.FileInfo) fileStamp { return fileStamp{info, changeTime(info)} }

// same reports whether nothing suggests that the file was replaced or written
// to.
func (s fileStamp) same(t fileStamp) bool {
	return sameFile(s.info, t.info) && s.changed.Equal(t.changed)
}

// changeTime returns when an inode last changed, which, unlike the
// modification time, no program can set back. The name of the field differs
// between systems, and some have none.
func changeTime(info fs.FileInfo) time.Time {
	for _, name := range []string{"Ctim", "Ctimespec"} {
		if field := systemField(info, name); field.IsValid() {
			if ts, ok := reflect.TypeAssert[syscall.Timespec](field); ok {
				return time.Unix(ts.Unix())
			}
		}
	}
	return time.Time{}
}

// systemField returns a field of what the system says of a file, which is
// invalid where it has none by that name.
func systemField(info fs.FileInfo, name string) reflect.Value {
	v := reflect.Indirect(reflect.ValueOf(info.Sys()))
	if v.Kind() != reflect.Struct {
		return reflect.Value{}
	}
	return v.FieldByName(name)
}

// settled reports whether a file that was in this state at a time, and is in
// it later, has not changed in between: not if its last change was so recent
// that another one could have had the same time.
func (s fileStamp) settled(at time.Time) bool {
	limit := at.Add(-racyWindow)
	return s.info == nil || !s.info.ModTime().After(limit) && !s.changed.After(limit)
}

// fileFlight is one look at a file, which all who want the file wait for.
type fileFlight struct {
	done  chan struct{}
	entry *fileEntry
	err   error
}

var (
	errIsDirectory   = errors.New("is a directory")
	errNotRegular    = errors.New("is not a regular file")
	errFileChanged   = errors.New("changed while it was read")
	errFileOverflows = errors.New("is larger than it says")
	errLoadPanicked  = errors.New("the file system panicked")
	errDirectoryGone = errors.New("conduit: Dir")
)

// entry returns the fresh entry of a file for a key, reading the file if need
// be. Whoever asks for the same key meanwhile waits and shares it.
func (f *FileServer) entry(key, name string) (*fileEntry, error) {
	return f.fly(key, func() (*fileEntry, error) { return f.refresh(key, name) })
}

func (f *FileServer) fly(key string, do func() (*fileEntry, error)) (*fileEntry, error) {
	f.mu.Lock()
	if flight, ok := f.flights[key]; ok {
		f.mu.Unlock()
		<-flight.done
		return flight.entry, flight.err
	}
	flight := &fileFlight{done: make(chan struct{}), err: errLoadPanicked}
	f.flights[key] = flight
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.flights, key)
		f.mu.Unlock()
		close(flight.done)
	}()
	flight.entry, flight.err = do()
	return flight.entry, flight.err
}

func (f *FileServer) refresh(key, name string) (*fileEntry, error) {
	old := f.cache.get(key)
	if old != nil && f.isFresh(old) {
		return old, nil
	}
	now := f.now()
	if old != nil && old.settled && f.unchanged(old) {
		old.checked.Store(now)
		return old, nil
	}
	return f.replace(key, name, old)
}

// replace reads a file whatever the cache has.
func (f *FileServer) replace(key, name string, old *fileEntry) (*fileEntry, error) {
	now := f.now()
	// What is kept must not keep the request line that it is a part of.
	e, err := f.load(strings.Clone(key), strings.Clone(name), old)
	if err != nil && !errors.Is(err, errFileChanged) {
		if old != nil {
			f.cache.remove(old)
		}
		return nil, err
	}
	if err != nil {
		e.cacheControl = staleVersionValue // what was read may be half written
	}
	e.checked.Store(now)
	if err == nil && !f.closed.Load() {
		f.cache.put(e)
	}
	f.gone.Store(false)
	return e, nil
}

// unchanged looks whether the files of an entry are as they were.
func (f *FileServer) unchanged(e *fileEntry) bool {
	info, err := f.tree.stat(e.name)
	if err != nil || !stampOf(info).same(e.identity.stamp) {
		return false
	}
	for i, s := range f.findSidecars(e.name, info) {
		if !s.same(e.sidecars[i]) {
			return false
		}
	}
	return true
}

// hashed returns e with its hash, or as it is if it cannot be read.
func (f *FileServer) hashed(e *fileEntry) *fileEntry {
	if e.hash != "" {
		return e
	}
	if h := e.withHash.Load(); h != nil {
		return h
	}
	// No path that is served begins with a NUL.
	h, err := f.fly("\x00"+e.key, func() (*fileEntry, error) {
		if h := e.withHash.Load(); h != nil {
			return h, nil
		}
		h, err := f.read(e.key, e.name, e, true)
		if err == nil && h.identity.stamp.same(e.identity.stamp) {
			e.withHash.Store(h)
		}
		return h, err
	})
	if err != nil {
		return e
	}
	return h
}

// load reads a file until it has found it the same before and after. The error
// is errFileChanged, beside an entry, if it has not: what was read is then good
// for one reply.
func (f *FileServer) load(key, name string, old *fileEntry) (*fileEntry, error) {
	if f.closed.Load() {
		return nil, fs.ErrClosed
	}
	for attempt := 0; ; attempt++ {
		e, err := f.read(key, name, old, false)
		if attempt == 2 || !errors.Is(err, errFileChanged) {
			return e, err
		}
	}
}

func (f *FileServer) read(key, name string, old *fileEntry, hash bool) (*fileEntry, error) {
	now := time.Now()
	file, info, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()

	modified := info.ModTime()
	e := &fileEntry{key: key, name: name, modified: modified.Truncate(time.Second)}
	if !modified.Before(earliestTime) && !modified.After(now) { // RFC 9110, Section 8.8.2.1
		e.lastModified = []string{modified.UTC().Format(http.TimeFormat)}
	}
	v := &e.identity
	v.name = name
	content, err := f.readVariant(v, file, info, hash, now)
	if content == nil {
		return nil, err
	}
	if content.hash != "" {
		e.hash, e.query = content.hash, "v="+content.hash
	}
	e.settled = v.stamp.settled(now)
	_, seeks := file.(io.Seeker)
	e.sequential = v.body == nil && !seeks

	e.contentType = []string{contentTypeOf(name, content.head())}
	e.cacheControl = f.cacheControl
	if strings.HasPrefix(e.contentType[0], "text/html") || path.Base(name) == f.config.Index || name == f.config.Fallback {
		e.cacheControl = f.htmlCacheControl
	}
	e.private = hasMember(e.cacheControl, "private") || hasMember(e.cacheControl, "no-store")
	compresses := compressible(e.contentType[0])
	f.addSidecars(e, info, now)
	if compresses && v.size >= fileGzipMin && !content.large && e.coding("gzip") == v {
		e.addGzip(content.data, old)
	}
	e.varies = compresses || len(e.coded) != 0
	for i := range e.coded {
		e.codings = append(e.codings, e.coded[i].coding)
	}
	return e, err
}

// open opens a regular file.
func (f *FileServer) open(name string) (fs.File, fs.FileInfo, error) {
	file, err := f.tree.open(name)
	if err != nil {
		return nil, nil, err
	}
	info, err := file.Stat()
	if err == nil {
		err = checkRegular(name, info)
	}
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, info, nil
}

func checkRegular(name string, info fs.FileInfo) error {
	switch {
	case info.IsDir():
		return &fs.PathError{Op: "open", Path: name, Err: errIsDirectory}
	case !info.Mode().IsRegular():
		return &fs.PathError{Op: "open", Path: name, Err: errNotRegular}
	}
	return nil
}

// readVariant reads the file of a variant, which has its name and coding, and
// completes it. The error is errFileChanged, beside a content, if the file
// changed meanwhile.
func (f *FileServer) readVariant(v *fileVariant, file fs.File, info fs.FileInfo, hash bool, now time.Time) (*fileContent, error) {
	content, err := f.readContent(file, info, hash || info.ModTime().Before(earliestTime))
	if content == nil {
		return nil, err
	}
	v.stamp, v.size = stampOf(info), content.size
	v.length = []string{strconv.FormatInt(v.size, 10)}
	suffix := ""
	if v.coding != "" {
		v.encoding = []string{v.coding}
		suffix = "-" + v.coding
	}
	v.etag = []string{fileTag(content.hash, info, suffix, content.large, now)}
	if _, ok := file.(*os.File); !content.large && (!ok || err != nil || v.size <= residentFile || !v.stamp.settled(now)) {
		v.body = content.data
	}
	return content, err
}

// fileContent is what was read of a file: all of it, or the first bytes of a
// large one, and the hash where it is wanted.
type fileContent struct {
	data  []byte
	size  int64
	large bool // above MaxCachedFile
	hash  string
}

func (c *fileContent) head() []byte { return c.data[:min(len(c.data), 512)] }

// readContent reads a file and looks whether it changed meanwhile. The error
// is errFileChanged if it did. A size may be wrong, as those in /proc are: what
// counts is what there is to read.
func (f *FileServer) readContent(file fs.File, before fs.FileInfo, hash bool) (*fileContent, error) {
	c := &fileContent{size: before.Size(), large: before.Size() > f.config.MaxCachedFile}
	limit := f.config.MaxCachedFile + 1
	if c.large {
		limit = 512
	}
	var buf bytes.Buffer
	buf.Grow(int(min(limit, max(c.size, 0))) + bytes.MinRead)
	if _, err := buf.ReadFrom(io.LimitReader(file, limit)); err != nil {
		return nil, err
	}
	if !c.large && int64(buf.Len()) == limit {
		return nil, errFileOverflows
	}
	c.data = bytes.Clone(buf.Bytes())
	if len(c.data) == 0 {
		c.data = []byte{} // nil would mean that it is in the file
	}
	read := int64(len(c.data))
	switch {
	case !c.large:
		c.size = read
		c.hash = fileHash(sha256.Sum256(c.data))
	case hash:
		sum := sha256.New()
		sum.Write(c.data)
		n, err := io.Copy(sum, file)
		if err != nil {
			return nil, err
		}
		read += n
		c.hash = fileHash([sha256.Size]byte(sum.Sum(nil)))
	default:
		read = c.size
	}
	after, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if read != before.Size() || !stampOf(after).same(stampOf(before)) {
		return c, errFileChanged
	}
	return c, nil
}

// fileHash is 120 bits of a hash, in characters that fit tags and queries.
func fileHash(sum [sha256.Size]byte) string {
	return base64.RawURLEncoding.EncodeToString(sum[:15])
}

// fileTag returns an entity tag: of the hash if there is one, or else of time
// and size. That of a large file, which is not kept in memory, is weak while
// another change could have the same time.
func fileTag(hash string, info fs.FileInfo, suffix string, large bool, now time.Time) string {
	if hash == "" {
		hash = strconv.FormatInt(info.ModTime().UnixNano(), 36) + "-" + strconv.FormatInt(info.Size(), 36)
	}
	weak := ""
	if large && info.ModTime().After(now.Add(-racyWindow)) {
		weak = "W/"
	}
	return weak + `"` + hash + suffix + `"`
}

// addGzip adds the gzip form, if it is smaller, taking it from the entry that
// went before if the content is the same.
func (e *fileEntry) addGzip(data []byte, old *fileEntry) {
	var coded []byte
	if old != nil && old.hash == e.hash {
		if v := old.coding("gzip"); v.name == "" {
			coded = v.body
		}
	}
	if coded == nil {
		var buf bytes.Buffer
		z := gzipWriter(&buf, fileGzip)
		z.Write(data)
		z.Close()
		putGzipWriter(z, fileGzip)
		coded = bytes.Clone(buf.Bytes())
	}
	if len(coded) >= len(data) {
		return
	}
	e.coded = append(e.coded, fileVariant{
		coding:   "gzip",
		size:     int64(len(coded)),
		body:     coded,
		etag:     []string{`"` + e.hash + `-gzip"`},
		length:   []string{strconv.Itoa(len(coded))},
		encoding: gzipEncoding,
	})
}

// sidecarCodings are in the order of preference at equal quality.
var sidecarCodings = [...]struct{ suffix, coding string }{{".br", "br"}, {".zst", "zstd"}, {".gz", "gzip"}}

// findSidecars returns the state of the files beside a file that have it in
// another coding and are not older. It is zero where there is none.
func (f *FileServer) findSidecars(name string, original fs.FileInfo) (found [len(sidecarCodings)]fileStamp) {
	if !f.config.Precompressed {
		return found
	}
	for i, s := range sidecarCodings {
		info, err := f.tree.stat(name + s.suffix)
		if err == nil && info.Mode().IsRegular() && !info.ModTime().Before(original.ModTime()) {
			found[i] = stampOf(info)
		}
	}
	return found
}

// addSidecars adds the forms that files beside the original have. One that
// cannot be read, or changes meanwhile, is left out until the next look.
func (f *FileServer) addSidecars(e *fileEntry, original fs.FileInfo, now time.Time) {
	e.sidecars = f.findSidecars(e.name, original)
	for i, s := range e.sidecars {
		if s.info == nil {
			continue
		}
		v := fileVariant{coding: sidecarCodings[i].coding, name: e.name + sidecarCodings[i].suffix}
		if !s.settled(now) {
			e.settled = false
		}
		if f.readSidecar(&v, s, now) != nil {
			e.settled = false
			continue
		}
		e.coded = append(e.coded, v)
	}
}

func (f *FileServer) readSidecar(v *fileVariant, expected fileStamp, now time.Time) error {
	file, info, err := f.open(v.name)
	if err != nil {
		return err
	}
	defer file.Close()
	if !stampOf(info).same(expected) {
		return errFileChanged
	}
	_, err = f.readVariant(v, file, info, false, now)
	return err
}

// contentTypeOf returns the media type of a file. The common ones are not
// left to the host, whose tables differ.
func contentTypeOf(name string, head []byte) string {
	ext := strings.ToLower(path.Ext(name))
	if t, ok := contentTypes[ext]; ok {
		return t
	}
	if t := mime.TypeByExtension(ext); t != "" {
		return t
	}
	return http.DetectContentType(head)
}

var contentTypes = map[string]string{
	".atom":        "application/atom+xml",
	".avif":        "image/avif",
	".css":         "text/css; charset=utf-8",
	".csv":         "text/csv; charset=utf-8",
	".gif":         "image/gif",
	".gz":          "application/gzip",
	".htm":         "text/html; charset=utf-8",
	".html":        "text/html; charset=utf-8",
	".ico":         "image/x-icon",
	".jpeg":        "image/jpeg",
	".jpg":         "image/jpeg",
	".js":          "text/javascript; charset=utf-8",
	".json":        "application/json",
	".map":         "application/json",
	".md":          "text/markdown; charset=utf-8",
	".mjs":         "text/javascript; charset=utf-8",
	".mp3":         "audio/mpeg",
	".mp4":         "video/mp4",
	".ogg":         "audio/ogg",
	".pdf":         "application/pdf",
	".png":         "image/png",
	".svg":         "image/svg+xml",
	".ttf":         "font/ttf",
	".txt":         "text/plain; charset=utf-8",
	".vtt":         "text/vtt; charset=utf-8",
	".wasm":        "application/wasm",
	".wav":         "audio/wav",
	".webm":        "video/webm",
	".webmanifest": "application/manifest+json",
	".webp":        "image/webp",
	".woff":        "font/woff",
	".woff2":       "font/woff2",
	".xml":         "text/xml; charset=utf-8",
	".zip":         "application/zip",
	".zst":         "application/zstd",
}

// serveParts answers where ranges are asked for, or where the bytes are in a
// file and not in memory.
func (f *FileServer) serveParts(w http.ResponseWriter, r *http.Request, e *fileEntry, v *fileVariant, cacheControl []string, attempt int) {
	s := fileSender{w: w, variant: v, grows: e.hash == "" && v.isWeak()}
	if v.body == nil {
		file, info, err := f.open(v.name)
		if err != nil || !stampOf(info).same(v.stamp) {
			if err == nil {
				file.Close()
			}
			f.serveChanged(w, r, e, attempt)
			return
		}
		defer file.Close()
		s.file = file
	}
	var ranges []fileRange
	if r.Header["Range"] != nil && !e.sequential { // v is identity then
		var satisfiable bool
		if ranges, satisfiable = rangesOf(r.Header, e, v); !satisfiable {
			h := w.Header()
			clearRepresentation(h)
			h["Content-Range"] = []string{"bytes */" + v.length[0]}
			statusError(w, http.StatusRequestedRangeNotSatisfiable)
			return
		}
	}
	if !releaseTimeout(w) {
		return
	}

	s.begin(r)
	h := w.Header()
	e.setBodyHeader(h, v, cacheControl)
	switch len(ranges) {
	case 0:
		w.WriteHeader(http.StatusOK) // now, so that Compression lets all of it go by sendfile
		s.send(fileRange{0, v.size})
	case 1:
		h["Content-Range"] = []string{ranges[0].contentRange(v.size)}
		h["Content-Length"] = []string{strconv.FormatInt(ranges[0].length, 10)}
		w.WriteHeader(http.StatusPartialContent)
		s.send(ranges[0])
	default:
		s.sendMultipart(ranges, e.contentType[0])
	}
}

// serveChanged reads a file that has just changed and answers again, from
// memory if the file is not too large for it. One that never stays the same for
// the time it takes to open it has no representation to speak of.
func (f *FileServer) serveChanged(w http.ResponseWriter, r *http.Request, e *fileEntry, attempt int) {
	if attempt == 8 {
		fileError(w, http.StatusServiceUnavailable)
		return
	}
	e, err := f.fly(e.key, func() (*fileEntry, error) { return f.replace(e.key, e.name, e) })
	switch {
	case err == nil:
		f.serve(w, r, e, attempt+1)
	case f.isUnavailable(r, err):
		fileError(w, http.StatusInternalServerError)
	default:
		f.notFound(w, r)
	}
}

type fileRange struct{ start, length int64 }

func (p fileRange) contentRange(size int64) string {
	return fmt.Sprintf("bytes %d-%d/%d", p.start, p.start+p.length-1, size)
}

// maxRanges is more than any honest client asks for at once.
const maxRanges = 64

// rangesOf returns the ranges of a file that a request asks for, none for all
// of it. It is false if none of them can be satisfied, or they are malformed.
// See RFC 9110, Section 14.
func rangesOf(h http.Header, e *fileEntry, v *fileVariant) ([]fileRange, bool) {
	unit, set, _ := strings.Cut(strings.Trim(h["Range"][0], " \t"), "=")
	if len(h["Range"]) != 1 || !strings.EqualFold(unit, "bytes") || !rangeApplies(h["If-Range"], e, v) {
		return nil, true
	}
	ranges, total, valid := parseRanges(set, v.size)
	switch {
	case !valid:
		return nil, false
	case v.size == 0:
		return nil, true // no range can be told of, and clients that always ask for one want the file
	case len(ranges) == 0:
		return nil, false
	case len(ranges) > maxRanges || total > v.size:
		return nil, true // the whole is less work
	}
	return ranges, true
}

// rangeApplies evaluates If-Range, which takes a strong tag, or a date that is
// old enough for the next change to have another (RFC 9110, Section 13.1.5).
func rangeApplies(lines []string, e *fileEntry, v *fileVariant) bool {
	if len(lines) == 0 {
		return true
	}
	value := strings.Trim(lines[0], " \t")
	if len(lines) > 1 || value == "" || value[0] == 'W' && strings.HasPrefix(value, "W/") {
		return false
	}
	if value[0] == '"' {
		return value == v.etag[0]
	}
	t, err := http.ParseTime(value)
	return err == nil && e.lastModified != nil && e.modified.Equal(t) && time.Since(e.identity.stamp.info.ModTime()) >= racyWindow
}

// parseRanges returns the ranges that overlap a file and their sum. It is
// false if the set is malformed, or asks for no byte at all.
func parseRanges(set string, size int64) (ranges []fileRange, total int64, valid bool) {
	for spec := range strings.SplitSeq(set, ",") {
		spec = strings.Trim(spec, " \t")
		if spec == "" {
			continue
		}
		from, to, ok := strings.Cut(spec, "-")
		first, hasFirst := parsePosition(from)
		last, hasLast := parsePosition(to)
		switch {
		case !ok, from != "" && !hasFirst, to != "" && !hasLast, !hasFirst && !hasLast, hasFirst && hasLast && last < first:
			return nil, 0, false
		case !hasFirst && last == 0 && size == 0: // "-0" of an empty file
			return nil, 0, false
		case !hasFirst:
			first, last = max(size-last, 0), size-1
		case !hasLast:
			last = size - 1
		}
		valid = true
		if first >= size {
			continue
		}
		p := fileRange{first, min(last, size-1) - first + 1}
		if total += p.length; total < 0 {
			total = math.MaxInt64
		}
		if len(ranges) <= maxRanges {
			ranges = append(ranges, p)
		}
	}
	return ranges, total, valid
}

// parsePosition takes digits only. Numbers beyond int64 are beyond any file.
func parsePosition(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		n = math.MaxInt64
	}
	return n, true
}

// fileSender sends bytes under a write deadline that moves as they are taken.
// The last one stays, for net/http's own last flush, and net/http takes it away.
// Where it cannot go on, the reply is cut, so that no client takes a part for
// the whole.
type fileSender struct {
	w        http.ResponseWriter
	variant  *fileVariant
	file     fs.File // nil: the bytes are variant.body
	deadline rollingDeadline
	chunk    int64
	grows    bool // a file that has grown is as good as it was
}

const (
	// sendfileChunk is how much goes out in one call where a call that was
	// interrupted can be taken up again: a file of a usual size, for each call is
	// one more for the client too. sendfileMax goes to fast clients.
	sendfileChunk = 1 << 20
	sendfileMax   = 2 << 20

	// minAllowance is the least time that a client gets. A live one shows no
	// progress while the kernel's buffer drains by a third or so, which over
	// loopback is a megabyte.
	minAllowance = 3 * time.Second
)

func (s *fileSender) begin(r *http.Request) {
	allowance := cmp.Or(writeTimeoutOf(r.Context()), writeAllowance)
	s.deadline = rollingDeadline{s.w, max(allowance, minAllowance)}
	s.chunk = writePiece
	if _, ok := s.file.(*os.File); ok && r.ProtoMajor == 1 && r.TLS == nil && readsFrom(s.w) {
		s.chunk = sendfileChunk
	}
}

// readsFrom reports whether sendfile goes through all that is around the
// connection. Otherwise a write that the deadline has interrupted is the last.
func readsFrom(w http.ResponseWriter) bool {
	for ; w != nil; w = unwrap(w) {
		if _, ok := w.(io.ReaderFrom); !ok {
			return false
		}
	}
	return true
}

func (s *fileSender) send(p fileRange) {
	if s.file != nil {
		s.sendFile(p)
		return
	}
	s.write(s.variant.body[p.start : p.start+p.length])
}

func (s *fileSender) write(p []byte) {
	if _, err := s.deadline.write(p); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// sendFile sends a part of the file, the last piece of it only if the file is
// still as it was. sendfile needs the limit to be directly around the file,
// which is what io.CopyN does.
func (s *fileSender) sendFile(p fileRange) {
	if seeker, ok := s.file.(io.Seeker); ok {
		if _, err := seeker.Seek(p.start, io.SeekStart); err != nil {
			panic(http.ErrAbortHandler)
		}
	}
	for left := p.length; left > 0; {
		n := min(left, s.chunk)
		switch {
		case left <= writePiece:
			s.verify()
		case n == left:
			n -= writePiece
		}
		start := time.Now()
		s.deadline.arm()
		sent, err := io.CopyN(s.w, s.file, n)
		left -= sent
		if seeker, ok := s.file.(io.Seeker); err != nil && ok {
			// What is copied in memory, not by sendfile, was read ahead.
			if _, err := seeker.Seek(p.start+p.length-left, io.SeekStart); err != nil {
				panic(http.ErrAbortHandler)
			}
		}
		if err != nil && !(sent >= writePiece && errors.Is(err, os.ErrDeadlineExceeded)) {
			panic(http.ErrAbortHandler)
		}
		// Interrupted, sendfile can go on. Chunks grow only for the fast.
		if took := time.Since(start); took > time.Second {
			s.chunk = writePiece
		} else if s.chunk > writePiece && took < 20*time.Millisecond {
			s.chunk = min(2*s.chunk, sendfileMax)
		}
	}
}

// verify cuts the reply if the file has changed, unless it has only grown, as a
// log does, under a weak tag that is made of its time.
func (s *fileSender) verify() {
	info, err := s.file.Stat()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	grows := s.grows && info.Size() >= s.variant.size
	now, was := stampOf(info), s.variant.stamp
	if linksOf(info) != linksOf(was.info) {
		now.changed = was.changed // replaced by a rename, or removed: what is open is what it was
	}
	if !grows && !now.same(was) {
		panic(http.ErrAbortHandler)
	}
}

// linksOf returns how many names an inode has, where the system tells.
func linksOf(info fs.FileInfo) uint64 {
	if n := systemField(info, "Nlink"); n.IsValid() && n.CanUint() {
		return n.Uint()
	}
	return 0
}

// sendMultipart sends several ranges as multipart/byteranges, RFC 9110,
// Section 14.6.
func (s *fileSender) sendMultipart(ranges []fileRange, contentType string) {
	boundary := rand.Text()
	end := "\r\n--" + boundary + "--\r\n"
	total := int64(len(end))
	heads := make([]string, len(ranges))
	for i, p := range ranges {
		heads[i] = "\r\n--" + boundary + "\r\nContent-Type: " + contentType +
			"\r\nContent-Range: " + p.contentRange(s.variant.size) + "\r\n\r\n"
		total += int64(len(heads[i])) + p.length
	}
	h := s.w.Header()
	h["Content-Type"] = []string{"multipart/byteranges; boundary=" + boundary}
	h["Content-Length"] = []string{strconv.FormatInt(total, 10)}
	s.w.WriteHeader(http.StatusPartialContent)
	for i, p := range ranges {
		s.write([]byte(heads[i]))
		s.send(p)
	}
	s.write([]byte(end))
}

// fileTree is where files come from. Names are valid ones of package fs. A pipe
// or a device is not even opened, which may block or have effects.
type fileTree interface {
	stat(name string) (fs.FileInfo, error)
	open(name string) (fs.File, error)
	close() error
}

type fsTree struct{ fs.FS }

func (t fsTree) stat(name string) (fs.FileInfo, error) {
	if stat, ok := t.FS.(fs.StatFS); ok {
		return stat.Stat(name)
	}
	if err := t.refusePipe(name); err != nil {
		return nil, err
	}
	return fs.Stat(t.FS, name) // which opens it
}

func (t fsTree) open(name string) (fs.File, error) {
	if stat, ok := t.FS.(fs.StatFS); ok {
		info, err := stat.Stat(name)
		if err == nil {
			err = checkRegular(name, info)
		}
		if err != nil {
			return nil, err
		}
	} else if err := t.refusePipe(name); err != nil {
		return nil, err
	}
	return t.FS.Open(name)
}

func (t fsTree) close() error { return nil }

// refusePipe refuses what is no file, as far as a file system without Stat can
// tell before it opens it: a link that leads nowhere known is refused too.
func (t fsTree) refusePipe(name string) error {
	link, ok := t.FS.(fs.ReadLinkFS)
	if !ok {
		return nil
	}
	refused := &fs.PathError{Op: "open", Path: name, Err: errNotRegular}
	for range 8 {
		info, err := link.Lstat(name)
		if err != nil {
			return nil // Open says what it is
		}
		switch info.Mode().Type() {
		case 0, fs.ModeDir:
			return nil
		case fs.ModeSymlink:
		default:
			return refused
		}
		target, err := link.ReadLink(name)
		if name = path.Join(path.Dir(name), target); err != nil || path.IsAbs(target) || !fs.ValidPath(name) {
			return refused
		}
	}
	return refused
}

// dirTree is a directory, which may be replaced by another one: an [os.Root]
// stays with the one that it has opened.
type dirTree struct {
	dir     string
	recheck bool

	mu   sync.RWMutex // guards root and info; held for reading while root is used
	root *os.Root
	info fs.FileInfo
}

func newDirTree(dir string, recheck bool) (*dirTree, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("conduit: Dir: %w", err)
	}
	t := &dirTree{dir: dir, recheck: recheck}
	if err := t.reopen(); err != nil {
		return nil, fmt.Errorf("conduit: Dir: %w", err)
	}
	return t, nil
}

// reopen opens what dir is now. It is called with mu held, or before t is
// shared.
func (t *dirTree) reopen() error {
	root, err := os.OpenRoot(t.dir)
	if err != nil {
		return err
	}
	info, err := root.Stat(".")
	if err != nil {
		root.Close()
		return err
	}
	if t.root != nil {
		t.root.Close()
	}
	t.root, t.info = root, info
	return nil
}

// follow makes sure that root is what dir is now.
func (t *dirTree) follow() error {
	if !t.recheck {
		return nil
	}
	info, err := os.Stat(t.dir)
	if err != nil {
		return fmt.Errorf("%w: %w", errDirectoryGone, err)
	}
	t.mu.RLock()
	same := t.root == nil || os.SameFile(info, t.info)
	t.mu.RUnlock()
	if same {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.root == nil {
		return fs.ErrClosed
	}
	if err := t.reopen(); err != nil {
		return fmt.Errorf("%w: %w", errDirectoryGone, err)
	}
	return nil
}

func (t *dirTree) stat(name string) (fs.FileInfo, error) {
	if err := t.follow(); err != nil {
		return nil, err
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.root == nil {
		return nil, fs.ErrClosed
	}
	return t.root.Stat(filepath.FromSlash(name))
}

// open does not wait for the other end of a pipe that has just taken the place
// of a file.
func (t *dirTree) open(name string) (fs.File, error) {
	info, err := t.stat(name)
	if err == nil {
		err = checkRegular(name, info)
	}
	if err != nil {
		return nil, err
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.root == nil {
		return nil, fs.ErrClosed
	}
	file, err := t.root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err // and no *os.File that is nil in an interface that is not
	}
	return file, nil
}

func (t *dirTree) close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.root == nil {
		return nil
	}
	err := t.root.Close()
	t.root = nil
	return err
}

// fileCache keeps entries by path, as many as fit. A new one is on probation:
// it goes first when room is needed, unless it has been asked for again, so
// that a walk over every file there is does not push out what is in demand.
// What has passed goes when a hand that sweeps around has found it unused since
// its last visits (S3-FIFO, without its ghosts).
type fileCache struct {
	mu        sync.RWMutex // guards what follows
	entries   map[string]*fileEntry
	limit     int64
	bytes     int64
	onTrial   int64 // of them in probation
	probation list.List
	proven    list.List
}

func newFileCache(limit int64) *fileCache {
	return &fileCache{limit: limit, entries: make(map[string]*fileEntry)}
}

// get returns the entry of a key, fresh or not, and notes the visit.
func (c *fileCache) get(key string) *fileEntry {
	c.mu.RLock()
	e := c.entries[key]
	c.mu.RUnlock()
	if e != nil {
		if n := e.visits.Load(); n < 3 {
			e.visits.Store(n + 1)
		}
	}
	return e
}

// put adds an entry in the place of an older one with its key.
func (c *fileCache) put(e *fileEntry) {
	e.cost = e.memory()
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.entries[e.key]; old != nil {
		e.proven = old.proven
		e.visits.Store(old.visits.Load())
		c.drop(old)
	}
	if e.cost > c.limit/2 {
		return // it would push out all others, or the cache is cleared
	}
	c.entries[e.key] = e
	c.enqueue(e)
	c.evict()
}

func (c *fileCache) enqueue(e *fileEntry) {
	c.bytes += e.cost
	if e.proven {
		e.place = c.proven.PushBack(e)
		return
	}
	c.onTrial += e.cost
	e.place = c.probation.PushBack(e)
}

func (c *fileCache) dequeue(e *fileEntry) {
	c.bytes -= e.cost
	if e.proven {
		c.proven.Remove(e.place)
	} else {
		c.onTrial -= e.cost
		c.probation.Remove(e.place)
	}
	e.place = nil
}

// evict makes room. Visits that come in meanwhile do not hold it up: after
// enough rounds it takes what comes first.
func (c *fileCache) evict() {
	patience := 4 * (c.probation.Len() + c.proven.Len())
	for c.bytes > c.limit {
		from := &c.proven
		if from.Len() == 0 || c.onTrial > c.limit/10 {
			from = &c.probation
		}
		e := from.Front().Value.(*fileEntry)
		visits := e.visits.Load()
		if patience--; visits == 0 || patience < 0 {
			c.drop(e)
			continue
		}
		c.dequeue(e)
		e.visits.Store(visits - 1)
		if !e.proven {
			e.proven = true
			e.visits.Store(0)
		}
		c.enqueue(e)
	}
}

// drop removes an entry that is in the cache. It is called with mu held.
func (c *fileCache) drop(e *fileEntry) {
	c.dequeue(e)
	delete(c.entries, e.key)
}

// remove drops an entry, unless another has taken its place.
func (c *fileCache) remove(e *fileEntry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.place != nil {
		c.drop(e)
	}
}

// clear empties the cache for good.
func (c *fileCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = 0
	for _, queue := range []*list.List{&c.probation, &c.proven} {
		for queue.Len() > 0 {
			c.drop(queue.Front().Value.(*fileEntry))
		}
	}
}

// entryOverhead is what an entry takes beside its bytes: itself, the header
// values, its place in a map and a queue.
const entryOverhead = 2 << 10

func (e *fileEntry) memory() int64 {
	n := int64(entryOverhead + 2*len(e.key) + 2*len(e.name) + len(e.identity.body))
	for i := range e.coded {
		n += int64(len(e.coded[i].body) + len(e.coded[i].name) + 768)
	}
	return n
}
