package main

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"example.com/conduit"
)

const (
	maxDocument  = 64 << 10 // bytes of a post that is created
	maxTitle     = 200      // characters
	defaultLimit = 20       // posts in a list
	maxLimit     = 100
)

// api is the JSON API. Its queries end with their request: when the client
// disconnects, or when the time is up.
type api struct {
	posts *store
	feed  *feed
}

// serveList responds with a page of posts, newest first. The next page starts
// before the last id of this one. The last page is not full.
func (a *api) serveList(w http.ResponseWriter, r *http.Request) {
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
	if err := conduit.StreamJSON(w, r, a.posts.list(r.Context(), before, int(limit))); err != nil {
		a.fail(w, r, err)
	}
}

// serveStream responds with every post, in one array or, with ?format=ndjson, one
// on a line.
func (a *api) serveStream(w http.ResponseWriter, r *http.Request) {
	stream := conduit.StreamJSON[post]
	switch format := r.FormValue("format"); format {
	case "", "json":
	case "ndjson":
		stream = conduit.StreamNDJSON[post]
	default:
		writeError(w, http.StatusBadRequest, "format must be json or ndjson")
		return
	}
	if err := stream(w, r, a.posts.all(r.Context())); err != nil {
		a.fail(w, r, err)
	}
}

func parameter(query url.Values, name string, fallback int64) (int64, error) {
	if !query.Has(name) {
		return fallback, nil
	}
	return strconv.ParseInt(query.Get(name), 10, 64)
}

func (a *api) serveOne(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // a number out of range is one of no post
		writeError(w, http.StatusBadRequest, "the id must be a number")
		return
	}
	switch p, err := a.posts.get(r.Context(), id); {
	case errors.Is(err, sql.ErrNoRows):
		writeError(w, http.StatusNotFound, "no such post")
	case err != nil:
		a.fail(w, r, err)
	default:
		writeJSON(w, http.StatusOK, p)
	}
}

func (a *api) serveCreate(w http.ResponseWriter, r *http.Request) {
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
	if strings.Contains(in.Title+in.Body, "\x00") { // Postgres has no text with a NUL
		writeError(w, http.StatusBadRequest, "the title and the body must have no NUL")
		return
	}

	p, err := a.posts.add(r.Context(), in.Title, in.Body)
	a.feed.notify() // also after an error, which may come after the commit
	if err != nil {
		a.fail(w, r, err)
		return
	}
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

// fail responds to a request whose query failed. The error is for the log and not
// for the client. If the response has started, the stream has aborted it, and
// this one goes nowhere.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	level := slog.LevelError
	if r.Context().Err() != nil { // the client has disconnected, or the time was up
		level = slog.LevelInfo
	}
	conduit.Logger(r.Context()).Log(r.Context(), level, "query failed", "method", r.Method, "path", r.URL.Path, "err", err)
	writeError(w, http.StatusInternalServerError, "internal error")
}

// writeJSON responds with v. It encodes first, so that the response has a length.
// net/http sends no chunks then, which spares a system call.
func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // a type that cannot be encoded: Recovery responds and logs it
	}
	body = append(body, '\n')
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(body)
}

// apiError is the body of each response of the API that is an error.
type apiError struct {
	Error string `json:"error"`
}

func writeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, apiError{message})
}

// unmatched responds to requests below its own pattern that no other route of mux
// matches. The mux would respond in plain text, unmatched does in JSON: with 405
// and Allow if there is a route for another method, with 404 if there is none.
func unmatched(mux *http.ServeMux) http.Handler {
	methods := []string{
		http.MethodGet, http.MethodHead, http.MethodPost,
		http.MethodPut, http.MethodPatch, http.MethodDelete,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var allowed []string
		for _, method := range methods {
			probe := &http.Request{Method: method, Host: r.Host, URL: r.URL}
			if _, pattern := mux.Handler(probe); pattern != r.Pattern {
				allowed = append(allowed, method)
			}
		}
		if allowed == nil {
			writeError(w, http.StatusNotFound, "not found")
			return
		}
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		writeError(w, http.StatusMethodNotAllowed, "method not allowed")
	})
}
