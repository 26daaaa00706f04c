package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"

	"github.com/gin-contrib/gzip"
	"github.com/gin-contrib/requestid"
	"github.com/gin-contrib/sse"
	"github.com/gin-gonic/gin"
)

// serveGin has gin's own Logger and Recovery, and gin-contrib's request ids and
// compression. For a timeout it has what costs least, a context that ends:
// gin-contrib's own holds the response back.
func serveGin(s *site, l, secure net.Listener) (*service, error) {
	gin.SetMode(gin.ReleaseMode)
	r := gin.New()
	r.GET("/text", func(c *gin.Context) { c.String(http.StatusOK, helloText) })
	r.GET("/json", func(c *gin.Context) { c.JSON(http.StatusOK, s.item) })
	r.GET("/items", func(c *gin.Context) { c.JSON(http.StatusOK, s.items) })
	r.POST("/items", func(c *gin.Context) {
		var received item
		if err := c.ShouldBindJSON(&received); err != nil {
			c.JSON(http.StatusBadRequest, gin.H{"error": err.Error()})
			return
		}
		received.ID++
		c.JSON(http.StatusOK, received)
	})
	r.GET("/users/:id/posts/:post", func(c *gin.Context) {
		c.String(http.StatusOK, c.Param("id")+" "+c.Param("post"))
	})
	r.GET("/chain", requestid.New(), gin.LoggerWithWriter(discard{}), gin.Recovery(), ginTimeout, gzip.Gzip(gzip.DefaultCompression),
		func(c *gin.Context) { c.String(http.StatusOK, helloText) })
	r.GET("/document", gzip.Gzip(gzip.DefaultCompression), func(c *gin.Context) { c.Data(http.StatusOK, jsonType, s.document) })
	r.Group("/static", gzip.Gzip(gzip.DefaultCompression)).Static("/", s.dir)
	r.GET("/stream", s.ginStream)
	r.GET("/sse", s.ginSSE)
	return serveHandler(s, l, secure, r)
}

func ginTimeout(c *gin.Context) {
	ctx, cancel := context.WithTimeout(c.Request.Context(), handlerTimeout)
	defer cancel()
	c.Request = c.Request.WithContext(ctx)
	c.Next()
}

func (s *site) ginStream(c *gin.Context) {
	c.Header("Content-Type", jsonType)
	encoder := json.NewEncoder(c.Writer)
	i := 0
	c.Stream(func(w io.Writer) bool {
		separator := ","
		if i == 0 {
			separator = "["
		}
		io.WriteString(w, separator)
		encoder.Encode(&s.elements[i])
		i++
		if i == len(s.elements) {
			io.WriteString(w, "]")
		}
		return i < len(s.elements)
	})
}

func (s *site) ginSSE(c *gin.Context) {
	events := source(c.Request.Context(), s.events)
	c.Stream(func(io.Writer) bool {
		e, ok := <-events
		if ok {
			c.Render(-1, sse.Event{Id: e.id, Event: e.name, Data: e.data})
		}
		return ok
	})
}
