//! Pods whose traffic is redirected: the app knows nothing of the mesh, and its neighbours' sidecars meet each other.

use std::net::IpAddr;

use sheetbend_tests::{Cable, Host, Mesh, PYTHON, Pod, assert_secret, need, pods, program, two_pods};

/// An HTTP server on an address and a port, which says who asks, and on which of its connections.
const HTTP: &str = r#"
import http.server, itertools, socket, sys
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
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// A TCP server that greets first, if it has a greeting, and then says back each line.
const LINES: &str = r#"
import socket, socketserver, sys
class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        if sys.argv[3]:
            self.wfile.write(sys.argv[3].encode() + b"\n")
        for line in self.rfile:
            self.wfile.write(b"heard: " + line)
class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// Connects, reads a line first where there is a greeting, says a line, reads one, and prints what was read.
const SPEAK: &str = r#"
import socket, sys
at = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
lines = at.makefile("rb")
if sys.argv[3] == "listen":
    print(lines.readline().decode(), end="")
at.sendall(sys.argv[4].encode() + b"\n")
at.shutdown(socket.SHUT_WR)
print(lines.read().decode(), end="")
"#;

/// `web`, with an address of its own in both families.
const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIPs: [10.96.0.10, "fd96::10"]
  ports:
    - {name: first, port: 80, targetPort: 8000}
    - {name: greets, port: 2500, targetPort: 2500}
    - {name: bytes, port: 7000, targetPort: 7000}
"#;

/// The mesh with the control plane on `node` and these resources.
fn mesh_on(node: &Host, resources: &str) -> Mesh {
    Mesh::with_resources_on(node, resources, &["--allow-address", "fd77::/64"])
}

fn speak(from: &Pod<'_>, to: IpAddr, port: u16, how: &str) -> String {
    let mut command = from.command(PYTHON);
    command.args(["-c", SPEAK, &to.to_string(), &port.to_string(), how, "plain-text-of-the-client"]);
    sheetbend_tests::finish(command, std::time::Duration::from_secs(30)).ok()
}

fn url(host: impl Into<IpAddr>, port: u16, path: &str) -> String {
    format!("http://{}{path}", std::net::SocketAddr::new(host.into(), port))
}

/// The pod's address and the service's, of one family.
fn families(web: &Host) -> [(IpAddr, IpAddr); 2] {
    let [v4, v6] = web.addresses();
    [(v4, [10, 96, 0, 10].into()), (v6, "fd96::10".parse().expect("an address"))]
}

#[test]
fn pods_call_each_other_by_name_and_by_address_and_the_cable_carries_no_plain_text() {
    need!(pods());
    need!(program("tcpdump"));
    let (left, right, node) = two_pods();
    for (address, service) in families(&right) {
        let mesh = mesh_on(&node, SERVICE);
        let caller = mesh.pod("caller", &left).start();
        let web = mesh.pod("web", &right).port(address, 8000).flag(&["--port", "2500", "--port", "7000"]).start();
        let everywhere = if address.is_ipv4() { "0.0.0.0" } else { "::" };
        let _apps = [
            web.serve(HTTP, &[everywhere, "8000"], 8000),
            web.serve(LINES, &[everywhere, "2500", "plain-text-of-the-greeting"], 2500),
            web.serve(LINES, &[everywhere, "7000", ""], 7000),
        ];
        let cable = Cable::record(&node, &right.interface(), mesh.folder());

        let resolve = format!("web:80:{service}");
        let by_name = ["--resolve", &resolve, "http://web/by-name?plain-text-of-the-request"];
        assert!(caller.first_answer(&by_name).starts_with("plain-text-of-the-answer /by-name"));
        let by_address = url(address, 8000, "/by-address");
        assert!(caller.first_answer(&[&by_address]).starts_with("plain-text-of-the-answer /by-address"));
        for to in [service, address] {
            let said = speak(&caller, to, 2500, "listen");
            assert_eq!(said, "plain-text-of-the-greeting\nheard: plain-text-of-the-client\n", "{to}");
            assert_eq!(speak(&caller, to, 7000, "speak"), "heard: plain-text-of-the-client\n", "{to}");
        }

        assert_secret(&cable.stop(), &["plain-text", "GET /", "HTTP/1.1"]);
        for (edges, side) in [(caller.edges(), "the caller's"), (web.edges(), "web's")] {
            for protocol in ["http", "tcp"] {
                let edge = edges.iter().find(|edge| edge.is("caller", "web", protocol));
                assert!(edge.is_some_and(|edge| edge.mtls), "{side} {protocol} edge: {edges:#?}");
            }
        }
    }
}
