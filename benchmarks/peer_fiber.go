package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"

	"github.com/gofiber/fiber/v3"
	"github.com/gofiber/fiber/v3/middleware/compress"
	"github.com/gofiber/fiber/v3/middleware/logger"
	recovery "github.com/gofiber/fiber/v3/middleware/recover"
	"github.com/gofiber/fiber/v3/middleware/requestid"
	"github.com/gofiber/fiber/v3/middleware/static"
	"github.com/gofiber/fiber/v3/middleware/timeout"
)

// serveFiber has fiber's own middleware. It is no net/http: it has a server of
// its own, which speaks HTTP/1.1 alone and whose requests are no
// http.Request, so what is written for either does not run on the other.
func serveFiber(s *site, l, secure net.Listener) (*service, error) {
	app := fiber.New(fiber.Config{ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout})
	text := func(c fiber.Ctx) error { return c.SendString(helloText) }
	app.Get("/text", text)
	app.Get("/json", func(c fiber.Ctx) error { return c.JSON(s.item) })
	app.Get("/items", func(c fiber.Ctx) error { return c.JSON(s.items) })
	app.Post("/items", func(c fiber.Ctx) error {
		var received item
		if err := c.Bind().JSON(&received); err != nil {
			return err
		}
		received.ID++
		return c.JSON(received)
	})
	app.Get("/users/:id/posts/:post", func(c fiber.Ctx) error {
		return c.SendString(c.Params("id") + " " + c.Params("post"))
	})
	app.Get("/chain", requestid.New(), logger.New(logger.Config{Stream: discard{}}), recovery.New(), compress.New(),
		timeout.New(text, timeout.Config{Timeout: handlerTimeout}))
	app.Get("/document", compress.New(), func(c fiber.Ctx) error {
		c.Set("Content-Type", jsonType)
		return c.Send(s.document)
	})
	app.Use("/static", static.New(s.dir, static.Config{Compress: true}))
	app.Get("/stream", s.fiberStream)
	app.Get("/sse", s.fiberSSE)

	secure.Close()
	go app.Listener(l, fiber.ListenConfig{DisableStartupMessage: true})
	return &service{fasthttp: app.Handler(), stop: app.Shutdown}, nil
}

func (s *site) fiberStream(c fiber.Ctx) error {
	c.Set("Content-Type", jsonType)
	return c.SendStreamWriter(func(w *bufio.Writer) {
		encoder := json.NewEncoder(w)
		io.WriteString(w, "[")
		for i := range s.elements {
			if i > 0 {
				io.WriteString(w, ",")
			}
			if encoder.Encode(&s.elements[i]) != nil || w.Flush() != nil {
				return
			}
		}
		io.WriteString(w, "]")
	})
}

func (s *site) fiberSSE(c fiber.Ctx) error {
	c.Set("Content-Type", "text/event-stream")
	c.Set("Cache-Control", "no-cache")
	return c.SendStreamWriter(func(w *bufio.Writer) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		for e := range source(ctx, s.events) {
			fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", e.id, e.name, e.data)
			if w.Flush() != nil {
				return
			}
		}
	})
}
