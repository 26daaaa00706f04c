package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"
)

// serveEcho has echo's own middleware: its RequestLogger with slog, as its
// README has it, and ContextTimeout, which cancels the request's context; its
// Timeout is deprecated. Streams are those of its cookbook.
func serveEcho(s *site, l, secure net.Listener) (*service, error) {
	e := echo.New()
	e.GET("/text", func(c echo.Context) error { return c.String(http.StatusOK, helloText) })
	e.GET("/json", func(c echo.Context) error { return c.JSON(http.StatusOK, s.item) })
	e.GET("/items", func(c echo.Context) error { return c.JSON(http.StatusOK, s.items) })
	e.POST("/items", func(c echo.Context) error {
		var received item
		if err := c.Bind(&received); err != nil {
			return err
		}
		received.ID++
		return c.JSON(http.StatusOK, received)
	})
	e.GET("/users/:id/posts/:post", func(c echo.Context) error {
		return c.String(http.StatusOK, c.Param("id")+" "+c.Param("post"))
	})
	e.GET("/chain", func(c echo.Context) error { return c.String(http.StatusOK, helloText) },
		middleware.RequestID(), s.echoLogger(), middleware.Recover(), middleware.ContextTimeout(handlerTimeout), middleware.Gzip())
	e.GET("/document", func(c echo.Context) error { return c.Blob(http.StatusOK, jsonType, s.document) }, middleware.Gzip())
	e.Group("/static", middleware.Gzip()).Static("/", s.dir)
	e.GET("/stream", s.echoStream)
	e.GET("/sse", s.echoSSE)
	return serveHandler(s, l, secure, e)
}

func (s *site) echoLogger() echo.MiddlewareFunc {
	return middleware.RequestLoggerWithConfig(middleware.RequestLoggerConfig{
		LogMethod: true, LogURIPath: true, LogRoutePath: true, LogStatus: true, LogResponseSize: true,
		LogLatency: true, LogRemoteIP: true, LogRequestID: true, HandleError: true,
		LogValuesFunc: func(c echo.Context, v middleware.RequestLoggerValues) error {
			level := slog.LevelInfo
			if v.Status >= 500 {
				level = slog.LevelError
			}
			s.log.LogAttrs(c.Request().Context(), level, "request",
				slog.String("method", v.Method),
				slog.String("path", v.URIPath),
				slog.String("pattern", v.RoutePath),
				slog.Int("status", v.Status),
				slog.Int64("bytes", v.ResponseSize),
				slog.Duration("duration", v.Latency),
				slog.String("remote", v.RemoteIP),
				slog.String("request_id", v.RequestID),
			)
			return nil
		},
	})
}

func (s *site) echoStream(c echo.Context) error {
	w := c.Response()
	w.Header().Set(echo.HeaderContentType, echo.MIMEApplicationJSON)
	w.WriteHeader(http.StatusOK)
	w.Write([]byte("["))
	encoder := json.NewEncoder(w)
	for i := range s.elements {
		if i > 0 {
			w.Write([]byte(","))
		}
		if err := encoder.Encode(&s.elements[i]); err != nil {
			return err
		}
		w.Flush()
	}
	w.Write([]byte("]"))
	w.Flush()
	return nil
}

func (s *site) echoSSE(c echo.Context) error {
	w := c.Response()
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	for e := range source(c.Request().Context(), s.events) {
		if _, err := fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.id, e.name, e.data); err != nil {
			return err
		}
		w.Flush()
	}
	return nil
}
