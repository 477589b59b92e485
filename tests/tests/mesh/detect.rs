//! What real clients say first, and what the proxy takes it for.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use sheetbend_proxy::client_hello::{ClientHello, Hello};
use sheetbend_proxy::detect::Detected;
use sheetbend_proxy::first_bytes::{FirstBytes, Patience, read_first, read_hello};
use sheetbend_tests::{App, Mesh, START, Scripted, eventually, hear, http, need, program, python, tls};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// Longer than in production: a client that is to speak has all the time that a busy machine takes to start it.
const PATIENCE: Patience = Patience { first_byte: Some(START), decision: START };

#[tokio::test]
async fn curl_speaks_http1_http2_and_tls() {
    let curl = need!(program("curl"));
    let url = |scheme: &str, at: SocketAddr| format!("{scheme}://127.0.0.1:{}/", at.port());
    let methods = [&["-X", "PROPFIND"][..], &["-X", "WHATEVER-IT-IS"], &["-I"], &["-d", "a=b"], &["-0"]];
    for flags in methods {
        let first = greeting(|at| with(&curl, flags, &[&url("http", at)])).await.0;
        assert_eq!(first, FirstBytes::Detected(Detected::Http1), "{flags:?}");
    }
    let first = greeting(|at| with(&curl, &["--http2-prior-knowledge"], &[&url("http", at)])).await.0;
    assert_eq!(first, FirstBytes::Detected(Detected::Http2));
    let first = greeting(|at| with(&curl, &["-k"], &[&url("https", at)])).await.0;
    assert_eq!(first, FirstBytes::Detected(Detected::Tls));
}

#[tokio::test]
async fn the_name_and_protocols_in_the_hello_of_openssl_are_read() {
    let openssl = need!(program("openssl"));
    let flags = ["s_client", "-servername", "Web.Example", "-alpn", "h2,sheetbend/tcp"];
    let (first, mut client, mut buf) = greeting(|at| with(&openssl, &flags, &["-connect", &at.to_string()])).await;
    assert_eq!(first, FirstBytes::Detected(Detected::Tls));
    let hello = read_hello(&mut client, &mut buf, START).await.unwrap();
    let alpn = vec![b"h2".to_vec(), b"sheetbend/tcp".to_vec()];
    assert_eq!(hello, Hello::Parsed(ClientHello { sni: Some("web.example".into()), alpn }));
}

#[tokio::test]
async fn postgresql_which_asks_for_tls_in_its_own_words_is_opaque() {
    let psql = need!(program("psql"));
    for mode in ["require", "disable"] {
        let uri = |at: SocketAddr| format!("postgresql://me@127.0.0.1:{}/db?sslmode={mode}", at.port());
        let first = greeting(|at| with(&psql, &["-w"], &[&uri(at)])).await.0;
        assert_eq!(first, FirstBytes::Detected(Detected::Opaque), "sslmode={mode}");
    }
}

#[tokio::test]
async fn redis_is_opaque() {
    let redis = need!(program("redis-cli"));
    let first = greeting(|at| with(&redis, &["-p", &at.port().to_string()], &["PING"])).await.0;
    assert_eq!(first, FirstBytes::Detected(Detected::Opaque));
}

#[tokio::test]
async fn a_redis_command_typed_by_hand_is_opaque() {
    let python = need!(python(&[]));
    let script = "import socket,sys\ns=socket.create_connection(('127.0.0.1',int(sys.argv[1])))\n\
                  s.sendall(b'SET / HTTP/9\\r\\n')\ns.recv(1)";
    let first = greeting(|at| with(&python, &["-c", script], &[&at.port().to_string()])).await.0;
    assert_eq!(first, FirstBytes::Detected(Detected::Opaque));
}

#[tokio::test]
async fn clients_that_wait_for_their_server_are_not_waited_for() {
    let python = need!(python(&[]));
    let mail = "import smtplib,sys; smtplib.SMTP('127.0.0.1', int(sys.argv[1]), timeout=20)";
    let (first, ..) = silence(|at| with(&python, &["-c", mail], &[&at.port().to_string()])).await;
    assert_eq!(first, FirstBytes::ServerFirst);
    let mariadb = need!(program("mariadb"));
    let (first, ..) = silence(|at| with(&mariadb, &["-h127.0.0.1", "-P"], &[&at.port().to_string()])).await;
    assert_eq!(first, FirstBytes::ServerFirst);
}

fn with(program: &std::path::Path, flags: &[&str], rest: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(flags).args(rest);
    command
}

async fn greeting(client: impl FnOnce(SocketAddr) -> Command) -> (FirstBytes, TcpStream, BytesMut) {
    first_of(client, PATIENCE).await
}

async fn silence(client: impl FnOnce(SocketAddr) -> Command) -> (FirstBytes, TcpStream, BytesMut) {
    first_of(client, Patience::default()).await
}

/// Starts a client against a server that never answers, and says what its connection began with.
async fn first_of(client: impl FnOnce(SocketAddr) -> Command, patience: Patience) -> (FirstBytes, TcpStream, BytesMut) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut command = tokio::process::Command::from(client(listener.local_addr().unwrap()));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let _client = command.spawn().unwrap();
    let (mut stream, _) = timeout(START, listener.accept()).await.expect("the client connects").unwrap();
    let mut buf = BytesMut::new();
    let first = read_first(&mut stream, &mut buf, patience).await.unwrap();
    (first, stream, buf)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_whose_hello_is_late_is_a_peer_all_the_same() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("inside\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.certificate("caller", &["--service", "caller"]);
    for late in [Duration::ZERO, Duration::from_millis(300)] {
        let ask = async || {
            let stream = TcpStream::connect(server.inbound()).await?;
            // By now a permissive sidecar has dialed the program, to hear whether that speaks first.
            tokio::time::sleep(late).await;
            let config = tls::config(Some(&caller), &["sheetbend/http1.1"], &[&rustls::version::TLS13]);
            let sni = format!("{}.server.default.cluster.local", app.port());
            tls::ask_over(tls::shake(stream, config, &sni).await?).await
        };
        // Whoever is held up for two seconds in the middle of a handshake is sent away.
        let said = eventually(&format!("late by {late:?}"), START, || async { ask().await.ok() }).await;
        assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("inside\n"), "{said}");
    }
    eventually("the edge is on the graph, with mutual TLS", START, || async {
        server.edges().await.into_iter().find(|edge| edge.is("caller", "server", "http") && edge.mtls)
    })
    .await;
}

/// A program that waits to be spoken to, and how many connections it has.
struct Patient {
    program: Scripted,
    open: Arc<AtomicUsize>,
}

impl Patient {
    async fn start() -> Self {
        let open = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&open);
        let program = Scripted::start(move |mut line| {
            let open = Arc::clone(&count);
            async move {
                open.fetch_add(1, Ordering::Relaxed);
                if line.hear("\r\n\r\n").await.is_some() {
                    line.say("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 5\r\n\r\nwell\n").await;
                }
                open.fetch_sub(1, Ordering::Relaxed);
            }
        });
        Self { program: program.await, open }
    }

    async fn has(&self, connections: usize) {
        let look = || async { (self.open.load(Ordering::Relaxed) == connections).then_some(()) };
        eventually(&format!("{connections} connections to the program"), START, look).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_was_asked_whether_it_speaks_first_is_let_go_once_its_caller_has_spoken() {
    let app = Patient::start().await;
    let mesh = Mesh::with_control_plane(&[]);
    let server = mesh.run("server").port(app.program.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let target = format!("server:{}", app.program.port());
    for beside_a_sidecar in [false, true] {
        let mut late = match beside_a_sidecar {
            false => TcpStream::connect(server.inbound()).await.unwrap(),
            true => http::tunnel(caller.proxy(), &target).await.unwrap(),
        };
        app.has(1).await;
        late.write_all(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n").await.unwrap();
        hear(&mut late, "well\n").await.unwrap();
        // The caller stays; nothing is left at the program's side.
        app.has(0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_that_was_asked_whether_it_speaks_first_is_let_go_once_mutual_tls_begins() {
    let app = Patient::start().await;
    let mesh = Mesh::with_control_plane(&[]);
    let server = mesh.run("server").port(app.program.port()).serve();
    let caller = mesh.certificate("caller", &["--service", "caller"]);
    let late = TcpStream::connect(server.inbound()).await.unwrap();
    app.has(1).await;
    let config = tls::config(Some(&caller), &["sheetbend/http1.1"], &[&rustls::version::TLS13]);
    let _inside = tls::shake(late, config, "server").await.unwrap();
    app.has(0).await;
}
