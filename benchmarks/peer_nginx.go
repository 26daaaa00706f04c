package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

var errNoNginx = errors.New("nginx is not installed (on Debian: apt-get install nginx)")

// serveNginx starts an nginx in one process, set up for speed: sendfile, open
// files cached, the script compressed before.
func serveNginx(s *site, l, secure net.Listener) (*service, error) {
	program, err := exec.LookPath("nginx")
	if err != nil { // Debian has it where not everybody's PATH leads
		program, err = exec.LookPath("/usr/sbin/nginx")
	}
	if err != nil {
		return nil, errNoNginx
	}
	// It has to listen by itself.
	addr, secureAddr := l.Addr().String(), secure.Addr().String()
	l.Close()
	secure.Close()
	dir, err := filepath.Abs(filepath.Dir(s.dir))
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "nginx.conf")
	text := strings.NewReplacer("DIR", dir, "SECURE", secureAddr, "ADDR", addr).Replace(nginxConfig)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	// A child gets the soft limit of files that this process was started with,
	// 1,024 as a rule, unless it is set here.
	var files syscall.Rlimit
	if err := errors.Join(syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files), syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files)); err != nil {
		return nil, err
	}
	var stderr strings.Builder
	cmd := exec.Command(program, "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", config)
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for range 100 {
		select {
		case err := <-exited:
			return nil, fmt.Errorf("nginx: %w: %s", err, strings.TrimSpace(stderr.String()))
		case <-time.After(50 * time.Millisecond):
		}
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return &service{pid: cmd.Process.Pid, stop: func() error {
				err := cmd.Process.Kill()
				<-exited
				return err
			}}, nil
		}
	}
	cmd.Process.Kill()
	return nil, errors.New("nginx: does not listen after 5 s")
}

const nginxConfig = `
daemon off;
master_process off;
pid DIR/nginx.pid;
error_log DIR/error.log;
events { worker_connections 20000; }
http {
	types { text/plain txt; text/javascript js; application/pdf pdf; }
	access_log off;
	client_body_temp_path DIR/nginx-body;
	proxy_temp_path DIR/nginx-proxy;
	fastcgi_temp_path DIR/nginx-fastcgi;
	uwsgi_temp_path DIR/nginx-uwsgi;
	scgi_temp_path DIR/nginx-scgi;
	sendfile on;
	tcp_nopush on;
	keepalive_timeout 60s;
	keepalive_requests 100000000;
	open_file_cache max=100;
	server {
		listen ADDR;
		listen SECURE ssl http2;
		ssl_certificate DIR/cert.pem;
		ssl_certificate_key DIR/key.pem;
		charset utf-8;
		charset_types text/plain text/javascript;
		location /static/ {
			alias DIR/files/;
			gzip_static on;
			gzip_vary on;
			add_header Cache-Control "public, max-age=31536000";
			add_header X-Content-Type-Options nosniff;
		}
		location = /text {
			default_type text/plain;
			return 200 "hello, gopher\n";
		}
	}
}
`
