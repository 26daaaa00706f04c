package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"example.com/conduit"
)

const (
	maxPosts     = 10_000   // kept
	maxTextBytes = 64 << 20 // of the titles and bodies of those that are kept
	maxDocument  = 64 << 10 // bytes of a post that is created
	maxTitle     = 200      // characters
	defaultLimit = 20       // posts in a list
	maxLimit     = 100
)

// post is one entry. It never changes once it is stored.
type post struct {
	ID        int64     `json:"id"`
	Title     string    `json:"title"`
	Body      string    `json:"body"`
	CreatedAt time.Time `json:"created_at"`
}

func (p *post) size() int { return len(p.Title) + len(p.Body) }

// store keeps the newest posts in memory: at most maxPosts of them, with at most
// maxTextBytes of text. It drops the oldest beyond either, so that no number of
// requests can exhaust the memory.
type store struct {
	events *conduit.SSEBroker // sends new posts to every open page

	mu    sync.RWMutex // guards what follows
	ring  []post       // the post with this id is at id % maxPosts
	first int64        // the oldest post that is kept
	next  int64        // the id of the next one
	bytes int          // the sum of the sizes of those that are kept
}

// newStore returns a store with a few posts to look at.
func newStore() *store {
	s := &store{events: conduit.NewSSEBroker(nil), ring: make([]post, maxPosts), first: 1, next: 1}
	s.add("Welcome", "A conduit is a pipe that does not leak.")
	s.add("Timeouts", "Two layers: the server guards its connections, the middleware its handlers.")
	s.add("Shutting down", "Say it, wait, stop to accept, finish, and only then leave.")
	return s
}

func (s *store) add(title, body string) post {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := post{ID: s.next, Title: title, Body: body, CreatedAt: time.Now().UTC()}
	s.next++
	s.bytes += p.size()
	for s.next-s.first > maxPosts || s.bytes > maxTextBytes {
		oldest := &s.ring[s.first%maxPosts]
		s.bytes -= oldest.size()
		*oldest = post{}
		s.first++
	}
	s.ring[p.ID%maxPosts] = p
	s.announce(&p)
	return p
}

// announce publishes a post. The caller holds the lock, so that posts are
// published in their order; Publish does not wait for clients. The event gets its
// id from the broker. Ids of posts start at 1 in each process, and a browser that
// reconnects would take another post for one that it knows.
func (s *store) announce(p *post) {
	data, err := json.Marshal(p)
	if err == nil {
		err = s.events.Publish(&conduit.SSEEvent{Event: "post", Data: string(data)})
	}
	if err != nil {
		slog.Error("post not announced", "id", p.ID, "err", err)
	}
}

func (s *store) get(id int64) (p post, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if id < s.first || id >= s.next {
		return post{}, false
	}
	return s.ring[id%maxPosts], true
}

// list returns up to limit posts with an id below before, newest first, and
// whether there are older ones. The slice is a copy: no lock is held while it is
// encoded, or sent to a slow client.
func (s *store) list(before int64, limit int) (posts []post, more bool) {
	posts = make([]post, 0, limit) // not nil, which would be null in JSON
	s.mu.RLock()
	defer s.mu.RUnlock()
	id := min(before, s.next) - 1
	for ; id >= s.first && len(posts) < limit; id-- {
		posts = append(posts, s.ring[id%maxPosts])
	}
	return posts, id >= s.first
}

// all yields every post, newest first. It reads a page at a time, so that no lock
// is held while a slow client receives them.
func (s *store) all() iter.Seq2[post, error] {
	return func(yield func(post, error) bool) {
		for before, more := int64(math.MaxInt64), true; more; {
			var posts []post
			posts, more = s.list(before, maxLimit)
			for _, p := range posts {
				if !yield(p, nil) {
					return
				}
				before = p.ID
			}
		}
	}
}

func (s *store) len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return int(s.next - s.first)
}

// serveList responds with a page of posts, and with a Link to the next page if
// there is one (RFC 8288). A page starts at an id and not at an offset, so that
// posts which are made meanwhile shift nothing.
func (s *store) serveList(w http.ResponseWriter, r *http.Request) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		writeError(w, http.StatusBadRequest, "malformed query")
		return
	}
	limit, err := parameter(query, "limit", defaultLimit)
	if err != nil || limit < 1 || limit > maxLimit {
		writeError(w, http.StatusBadRequest, fmt.Sprintf("limit must be a number from 1 to %d", maxLimit))
		return
	}
	before, err := parameter(query, "before", math.MaxInt64)
	if err != nil || before < 1 {
		writeError(w, http.StatusBadRequest, "before must be the id of a post")
		return
	}

	posts, more := s.list(before, int(limit))
	if more {
		last := posts[len(posts)-1].ID
		w.Header().Set("Link", fmt.Sprintf(`</api/posts?before=%d&limit=%d>; rel="next"`, last, limit))
	}
	writeJSON(w, http.StatusOK, posts)
}

// serveStream responds with every post, in one array or, with ?format=ndjson, one
// on a line.
func (s *store) serveStream(w http.ResponseWriter, r *http.Request) {
	stream := conduit.StreamJSON[post]
	switch format := r.FormValue("format"); format {
	case "", "json":
	case "ndjson":
		stream = conduit.StreamNDJSON[post]
	default:
		writeError(w, http.StatusBadRequest, "format must be json or ndjson")
		return
	}
	if err := stream(w, r, s.all()); err != nil {
		conduit.Logger(r.Context()).Info("stream failed", "path", r.URL.Path, "err", err)
		writeError(w, http.StatusInternalServerError, "internal error") // goes nowhere once the array has started
	}
}

func parameter(query url.Values, name string, fallback int64) (int64, error) {
	if !query.Has(name) {
		return fallback, nil
	}
	return strconv.ParseInt(query.Get(name), 10, 64)
}

func (s *store) serveOne(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // a number out of range is one of no post
		writeError(w, http.StatusBadRequest, "the id must be a number")
		return
	}
	p, ok := s.get(id)
	if !ok {
		writeError(w, http.StatusNotFound, "no such post")
		return
	}
	writeJSON(w, http.StatusOK, p)
}

func (s *store) serveCreate(w http.ResponseWriter, r *http.Request) {
	// A page of another site can make a browser send a form or plain text, but
	// not this type: the browser asks first, with a preflight request.
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" {
		writeError(w, http.StatusUnsupportedMediaType, "the Content-Type must be application/json")
		return
	}

	var in struct {
		Title string `json:"title"`
		Body  string `json:"body"`
	}
	if err := decode(http.MaxBytesReader(w, r.Body, maxDocument), &in); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			writeError(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("a post may have %d bytes", maxDocument))
			return
		}
		// The error may name addresses, which are not for the client.
		writeError(w, http.StatusBadRequest, `the body must be one JSON object with a "title" and a "body"`)
		return
	}
	if strings.TrimSpace(in.Title) == "" || utf8.RuneCountInString(in.Title) > maxTitle {
		writeError(w, http.StatusBadRequest, fmt.Sprintf("the title must have 1 to %d characters", maxTitle))
		return
	}

	p := s.add(in.Title, in.Body)
	w.Header().Set("Location", fmt.Sprintf("/api/posts/%d", p.ID))
	writeJSON(w, http.StatusCreated, p)
}

// decode reads one JSON document into v. It is an error if more follows.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	switch _, err := d.Token(); err {
	case io.EOF:
		return nil
	case nil:
		return errors.New("data after the document")
	default:
		return err
	}
}
