//! What apps in pods run, in Python.

/// An HTTP server on an address and a port, which says who asks, and on which of its connections.
pub(super) const HTTP: &str = r#"
import http.server, itertools, socket, socketserver, sys
connections = itertools.count(1)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def setup(self):
        super().setup()
        self.number = next(connections)
    def do_GET(self):
        said = f"plain-text-of-the-answer {self.path} from {self.client_address[0]} on {self.number}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    def server_bind(self):
        # HTTPServer's own looks for its name in DNS, which nobody answers here.
        socketserver.TCPServer.server_bind(self)
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    allow_reuse_address = True
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// A TCP server that greets first, if it has a greeting, and then says back each line.
pub(super) const LINES: &str = r#"
import socket, socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        if sys.argv[3]:
            self.wfile.write(sys.argv[3].encode() + b"\n")
        for line in self.rfile:
            self.wfile.write(b"heard: " + line)
class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
    allow_reuse_address = True
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// Connects, reads a line first where there is a greeting, says a line, reads one, and prints what was read.
pub(super) const SPEAK: &str = r#"
import socket, sys
at = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
lines = at.makefile("rb")
if sys.argv[3] == "listen":
    print(lines.readline().decode(), end="")
at.sendall(sys.argv[4].encode() + b"\n")
at.shutdown(socket.SHUT_WR)
print(lines.read().decode(), end="")
"#;
