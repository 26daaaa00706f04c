// This file type-checks the package. It proves that no exported name, and nothing
// that its users depend on, changes by accident.

package conformance

import (
	"fmt"
	"go/importer"
	"go/token"
	"go/types"
	"slices"
	"strings"
	"testing"
)

func TestExportedNamesChangeByDecision(t *testing.T) {
	t.Parallel()
	got, want := exportedNames(t), strings.Split(strings.TrimSpace(exported), "\n")
	for _, line := range got {
		if !slices.Contains(want, line) {
			t.Errorf("new:  %s", line)
		}
	}
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("gone: %s", line)
		}
	}
}

// exportedNames returns a line for each function, type, field, method and variable.
func exportedNames(t *testing.T) (lines []string) {
	t.Helper()
	pkg, err := importer.ForCompiler(token.NewFileSet(), "source", nil).Import("example.com/conduit")
	if err != nil {
		t.Fatal(err)
	}
	name := func(p *types.Package) string {
		if p == pkg {
			return ""
		}
		return p.Path()
	}
	for _, top := range pkg.Scope().Names() {
		object := pkg.Scope().Lookup(top)
		if !object.Exported() {
			continue
		}
		structure, ok := object.Type().Underlying().(*types.Struct)
		if _, isType := object.(*types.TypeName); !ok || !isType {
			lines = append(lines, types.ObjectString(object, name))
			continue
		}
		lines = append(lines, "type "+top+" struct")
		for i := range structure.NumFields() {
			if f := structure.Field(i); f.Exported() {
				lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s.%s %s %s", top, f.Name(), types.TypeString(f.Type(), name), structure.Tag(i))))
			}
		}
		methods := types.NewMethodSet(types.NewPointer(object.Type()))
		for i := range methods.Len() {
			if m := methods.At(i); m.Obj().Exported() {
				lines = append(lines, "func (*"+top+") "+m.Obj().Name()+strings.TrimPrefix(types.TypeString(m.Type(), name), "func"))
			}
		}
	}
	return lines
}

const exported = `
const Version untyped string
func Chain(mw ...Middleware) Middleware
func Compression() Middleware
type CompressionConfig struct
CompressionConfig.Level int
CompressionConfig.MinSize int
CompressionConfig.Types []string
CompressionConfig.Encoders []Encoder
func CompressionWith(cfg *CompressionConfig) Middleware
type Config struct
Config.Address string
Config.Handler net/http.Handler
Config.ReadTimeout time.Duration
Config.ReadHeaderTimeout time.Duration
Config.WriteTimeout time.Duration
Config.IdleTimeout time.Duration
Config.MaxHeaderBytes int
Config.EnableHTTP2 bool
Config.EnableH2C bool
Config.CertFile string
Config.KeyFile string
Config.TLSConfig *crypto/tls.Config
Config.MinTLSVersion uint16
Config.Database *DatabaseConfig
Config.Logger *log/slog.Logger
type DatabaseConfig struct
DatabaseConfig.DB *database/sql.DB
DatabaseConfig.MaxOpenConns int
DatabaseConfig.MaxIdleConns int
DatabaseConfig.ConnMaxLifetime time.Duration
DatabaseConfig.ConnMaxIdleTime time.Duration
func (*DatabaseConfig) Apply() error
func (*DatabaseConfig) Warm(ctx context.Context, n int) error
func DatabaseHealth(db *database/sql.DB) func(context.Context) error
func DefaultConfig(h net/http.Handler) *Config
func DefaultDatabaseConfig(db *database/sql.DB) *DatabaseConfig
func DefaultShutdownConfig() *ShutdownConfig
func Draining(ctx context.Context) <-chan struct{}
func EnableDefaultProfiling(mux *net/http.ServeMux)
type Encoder struct
Encoder.Coding string
Encoder.New func() EncodingWriter
type EncodingWriter interface{Flush() error; Reset(io.Writer); io.WriteCloser}
var ErrPoolSaturated error
var ErrTimeout error
func FastTimeout(d time.Duration) Middleware
type FileServer struct
func (*FileServer) Close() error
func (*FileServer) ServeHTTP(w net/http.ResponseWriter, r *net/http.Request)
func (*FileServer) URL(name string) string
type FileServerConfig struct
FileServerConfig.Dir string
FileServerConfig.FS io/fs.FS
FileServerConfig.Prefix string
FileServerConfig.Index string
FileServerConfig.Fallback string
FileServerConfig.NotFound net/http.Handler
FileServerConfig.CacheControl string
FileServerConfig.HTMLCacheControl string
FileServerConfig.Dotfiles bool
FileServerConfig.Precompressed bool
FileServerConfig.CacheBytes int64
FileServerConfig.MaxCachedFile int64
FileServerConfig.Recheck time.Duration
type GracefulShutdown struct
func (*GracefulShutdown) RegisterHook(hook func(context.Context) error)
func (*GracefulShutdown) Run(ctx context.Context, l net.Listener) error
func (*GracefulShutdown) Shutdown()
func (*GracefulShutdown) Start() error
func Health(checks ...func(context.Context) error) net/http.Handler
func JSONHandler[T any](items func(*net/http.Request) iter.Seq2[T, error]) net/http.Handler
type JSONStream struct
func (*JSONStream) Abort()
func (*JSONStream) Close() error
func (*JSONStream) Done() <-chan struct{}
func (*JSONStream) Write(v any) error
func (*JSONStream) WriteJSONArray(items <-chan any) error
func Logger(ctx context.Context) *log/slog.Logger
func Logging() Middleware
type LoggingConfig struct
LoggingConfig.Skip func(*net/http.Request) bool
LoggingConfig.Attrs func(*net/http.Request) []log/slog.Attr
func LoggingWith(cfg *LoggingConfig) Middleware
type Middleware = func(net/http.Handler) net/http.Handler
func New(cfg *Config) (*Server, error)
func NewBinaryStream(w net/http.ResponseWriter, r *net/http.Request) (*Stream, error)
func NewFileServer(dir string, prefix string) *FileServer
func NewFileServerWith(cfg *FileServerConfig) (*FileServer, error)
func NewGracefulShutdown(srv *Server, cfg *ShutdownConfig) *GracefulShutdown
func NewJSONStream(w net/http.ResponseWriter, r *net/http.Request) (*JSONStream, error)
func NewNDJSONStream(w net/http.ResponseWriter, r *net/http.Request) (*JSONStream, error)
func NewProfiler(cfg *ProfilingConfig) (*Profiler, error)
func NewProfilingServer(addr string, cfg *ProfilingConfig) (*Server, error)
func NewSSEBroker(cfg *SSEBrokerConfig) *SSEBroker
func NewSSEStream(w net/http.ResponseWriter, r *net/http.Request) (*SSEStream, error)
func NewTextStream(w net/http.ResponseWriter, r *net/http.Request) (*Stream, error)
type Profiler struct
func (*Profiler) Close() error
func (*Profiler) Enable(mux *net/http.ServeMux)
func (*Profiler) ServeHTTP(w net/http.ResponseWriter, r *net/http.Request)
func (*Profiler) SlowRequests(threshold time.Duration, dir string) Middleware
type ProfilingConfig struct
ProfilingConfig.Allow func(*net/http.Request) bool
ProfilingConfig.MaxDuration time.Duration
ProfilingConfig.MutexFraction int
ProfilingConfig.BlockRate int
ProfilingConfig.FlightRecorder time.Duration
ProfilingConfig.DB *database/sql.DB
func ReadRuntimeStats() RuntimeStats
func Receive[T any](ctx context.Context, ch <-chan T) iter.Seq2[T, error]
func Recovery() Middleware
func RequestID() Middleware
func RequestIDFrom(ctx context.Context) string
type RuntimeStats struct
RuntimeStats.GoVersion string json:"go_version"
RuntimeStats.UptimeSeconds float64 json:"uptime_seconds"
RuntimeStats.GOMAXPROCS uint64 json:"gomaxprocs"
RuntimeStats.Goroutines uint64 json:"goroutines"
RuntimeStats.HeapBytes uint64 json:"heap_bytes"
RuntimeStats.HeapLiveBytes uint64 json:"heap_live_bytes"
RuntimeStats.HeapGoalBytes uint64 json:"heap_goal_bytes"
RuntimeStats.HeapObjects uint64 json:"heap_objects"
RuntimeStats.StackBytes uint64 json:"stack_bytes"
RuntimeStats.MemoryBytes uint64 json:"memory_bytes"
RuntimeStats.AllocatedBytesTotal uint64 json:"allocated_bytes_total"
RuntimeStats.GCCyclesTotal uint64 json:"gc_cycles_total"
RuntimeStats.GCPausesTotal uint64 json:"gc_pauses_total"
RuntimeStats.GCPauseSecondsTotal float64 json:"gc_pause_seconds_total"
RuntimeStats.GCPauseP50Seconds float64 json:"gc_pause_p50_seconds"
RuntimeStats.GCPauseP99Seconds float64 json:"gc_pause_p99_seconds"
RuntimeStats.SchedulerLatencyP50Seconds float64 json:"scheduler_latency_p50_seconds"
RuntimeStats.SchedulerLatencyP99Seconds float64 json:"scheduler_latency_p99_seconds"
RuntimeStats.MutexWaitSecondsTotal float64 json:"mutex_wait_seconds_total"
RuntimeStats.CPUUserSecondsTotal float64 json:"cpu_user_seconds_total"
RuntimeStats.CPUGCSecondsTotal float64 json:"cpu_gc_seconds_total"
type SSEBroker struct
func (*SSEBroker) Clients() int
func (*SSEBroker) Close() error
func (*SSEBroker) Publish(e *SSEEvent) error
func (*SSEBroker) ServeHTTP(w net/http.ResponseWriter, r *net/http.Request)
type SSEBrokerConfig struct
SSEBrokerConfig.Replay int
SSEBrokerConfig.Queue int
SSEBrokerConfig.MaxClients int
type SSEEvent struct
SSEEvent.ID string
SSEEvent.Event string
SSEEvent.Data string
SSEEvent.Retry time.Duration
func SSEHandler(serve func(s *SSEStream, r *net/http.Request) error) net/http.Handler
type SSEStream struct
func (*SSEStream) Comment(text string) error
func (*SSEStream) Done() <-chan struct{}
func (*SSEStream) LastEventID() string
func (*SSEStream) Serve(events <-chan *SSEEvent) error
func (*SSEStream) WriteSSE(e *SSEEvent) error
type Server struct
func (*Server) Addr() net.Addr
func (*Server) Close() error
func (*Server) Drain()
func (*Server) Draining() <-chan struct{}
func (*Server) HTTPServer() *net/http.Server
func (*Server) ListenAndServe() error
func (*Server) Serve(l net.Listener) error
func (*Server) Shutdown(ctx context.Context) error
type ShutdownConfig struct
ShutdownConfig.Timeout time.Duration
ShutdownConfig.HookTimeout time.Duration
ShutdownConfig.Delay time.Duration
ShutdownConfig.Signals []os.Signal
func StartWithGracefulShutdown(srv *Server, cfg *ShutdownConfig) error
type Stream struct
func (*Stream) Done() <-chan struct{}
func (*Stream) ReadFrom(src io.Reader) (int64, error)
func (*Stream) Write(p []byte) (int, error)
func StreamJSON[T any](w net/http.ResponseWriter, r *net/http.Request, items iter.Seq2[T, error]) error
func StreamNDJSON[T any](w net/http.ResponseWriter, r *net/http.Request, items iter.Seq2[T, error]) error
func Timeout(d time.Duration) Middleware
type TimeoutConfig struct
TimeoutConfig.Duration time.Duration
TimeoutConfig.Status int
TimeoutConfig.Message string
TimeoutConfig.ContentType string
TimeoutConfig.Fast bool
TimeoutConfig.Skip func(*net/http.Request) bool
func TimeoutWith(cfg *TimeoutConfig) Middleware
`
