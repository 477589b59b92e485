//! What is bounded, what has a deadline, and what is counted of it.

use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame};
use sheetbend_tests::http as client;
use sheetbend_tests::{App, Mesh, Process, START, eventually, free_port, full, loopback, until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A relay that carries the first connection and holds all others back until it is told to carry them too.
struct Gate {
    address: std::net::SocketAddr,
    held: Arc<AtomicU64>,
    open: Arc<AtomicBool>,
}

impl Gate {
    async fn before(target: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind(loopback(free_port())).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (held, open) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (waiting, may_pass) = (Arc::clone(&held), Arc::clone(&open));
        tokio::spawn(async move {
            for number in 0.. {
                let Ok((mut client, _)) = listener.accept().await else { continue };
                let (waiting, may_pass) = (Arc::clone(&waiting), Arc::clone(&may_pass));
                tokio::spawn(async move {
                    if number > 0 {
                        waiting.fetch_add(1, Ordering::Relaxed);
                        while !may_pass.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    }
                    let mut server = TcpStream::connect(target).await?;
                    tokio::io::copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
        Self { address, held, open }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_does_not_start_before_its_sidecar_knows_what_the_mesh_is() {
    let mesh = Mesh::with_control_plane(&[]);
    // The first connection asks for the certificate; discovery comes after it.
    let gate = Gate::before(mesh.control_plane_address()).await;
    let (ca, token) = (mesh.ca(), mesh.folder().join("token"));
    let made = mesh.finish(["token", "create", "--service", "late", "--dir", ca.to_str().expect("a path in UTF-8")]);
    std::fs::write(&token, made.ok()).expect("the token is written");
    let url = format!("https://{}", gate.address);
    let mut command: Command = mesh.sheetbend(["run", "--service", "late", "--control-plane", &url, "--token-file"]);
    command.arg(&token).args(["--", "sh", "-c", "echo the program runs; exec sleep 3600"]);
    let mut late = Process::spawn("late", mesh.folder(), command);
    until("discovery is asked for", START, || (gate.held.load(Ordering::Relaxed) > 0).then_some(()));
    // Nothing more can happen before the gate opens. A sidecar that does not wait starts its program within milliseconds.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!late.stdout().contains("the program runs"), "{}", late.told());
    gate.open.store(true, Ordering::Relaxed);
    late.wait_for("the program runs", START);
}

/// Sends `first`, then a byte of `then` a second, and gives how long it took until the other end closed.
async fn dribble(to: std::net::SocketAddr, first: &[u8], then: u8) -> Duration {
    let began = std::time::Instant::now();
    let (mut reader, mut writer) = TcpStream::connect(to).await.expect("it accepts").into_split();
    writer.write_all(first).await.expect("the beginning is taken");
    let sending = tokio::spawn(async move {
        while writer.write_all(&[then]).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let mut said = Vec::new();
    // An answer or none, a FIN or a reset: closed is closed.
    let _ = tokio::time::timeout(Duration::from_secs(60), reader.read_to_end(&mut said)).await.expect("it is closed");
    sending.abort();
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_head_that_never_ends_is_cut_after_ten_seconds_and_nobody_else_notices() {
    let mesh = Mesh::local();
    let app = App::saying("hello\n").await;
    let _server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    // Idle all the while, which is its right.
    let mut idle = client::http1(caller.proxy()).await.expect("a connection");
    let get = || Request::get("http://server/").header("host", "server").body(Full::<Bytes>::default()).expect("valid");
    client::read(idle.send_request(get()).await.expect("an answer")).await.expect("a whole answer");

    // HTTP/1.1: past the first line. HTTP/2: HEADERS without END_HEADERS, then a CONTINUATION that never ends.
    let http1 = b"GET http://server/ HTTP/1.1\r\nHost: server\r\nX-Slow: ";
    let mut http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00".to_vec();
    http2.extend(b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82\x00\x10\x00\x09\x00\x00\x00\x00\x01");
    let proxy = caller.proxy();
    let slow = async { tokio::join!(dribble(proxy, http1, b'x'), dribble(proxy, &http2, 0x86)) };
    let others = async {
        loop {
            let answer = client::get(proxy, "http://server/").await.expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (over_http1, over_http2) = tokio::select! {
        took = slow => took,
        never = others => never,
    };
    for took in [over_http1, over_http2] {
        assert!(took.as_secs() >= 9, "{took:?}");
    }
    eventually("both are counted", START, || async {
        let counted = caller.counter("sheetbend_rejected_requests_total", &["headers_too_slow"]).await;
        (counted == 2.0).then_some(())
    })
    .await;
    idle.ready().await.expect("the idle one lives");
    let answer = client::read(idle.send_request(get()).await.expect("the idle one lives")).await.expect("an answer");
    assert_eq!(answer.text(), "hello\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_do_not_end_after_the_first_few() {
    let mesh = Mesh::local();
    // Leaves every other request without a word, however politely it was asked.
    let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
    let port = listener.local_addr().expect("a bound socket has an address").port();
    tokio::spawn(async move {
        let mut asked = 0u64;
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            let mut request = [0; 4096];
            // Whoever only looks whether somebody is there does not count.
            asked += u64::from(stream.read(&mut request).await.is_ok_and(|length| length > 0));
            if asked.is_multiple_of(2) {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nok\n";
                let _ = stream.write_all(answer).await;
            }
        }
    });
    let _server = mesh.run("server").port(port).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    for number in 0..30 {
        let answer = client::get(caller.proxy(), "http://server/").await.expect("an answer");
        assert_eq!(answer.status, 200, "{number}: {}", answer.text());
    }
    let retried = caller.counter("sheetbend_retries_total", &[]).await;
    assert!(retried >= 15.0, "{retried}");
}

/// A body that begins and never ends.
struct Begun {
    said: bool,
}

impl Body for Begun {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        match std::mem::replace(&mut self.said, true) {
            false => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"begun"))))),
            true => Poll::Pending,
        }
    }
}

/// A gRPC call over HTTP/2 with prior knowledge: its headers, what came of the body, and its trailers.
async fn grpc(to: std::net::SocketAddr, path: &str, timeout: &str) -> (http::HeaderMap, Bytes, http::HeaderMap) {
    let stream = TcpStream::connect(to).await.expect("it accepts");
    let mut sender = client::http2(stream).await.expect("HTTP/2");
    let request = Request::post(format!("http://server{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", timeout)
        .body(Full::<Bytes>::default())
        .expect("a request");
    let call = async {
        let (head, body) = sender.send_request(request).await.expect("an answer").into_parts();
        (head, body.collect().await.expect("a whole answer"))
    };
    let (head, body) = tokio::time::timeout(START, call).await.expect("the call ends");
    let trailers = body.trailers().cloned().unwrap_or_default();
    (head.headers, body.to_bytes(), trailers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grpc_deadline_ends_a_call_wherever_it_is_and_shrinks_on_its_way() {
    let mesh = Mesh::local();
    let app = App::start(|request: Request<hyper::body::Incoming>| async move {
        let told = request.headers().get("grpc-timeout").cloned();
        let told = told.unwrap_or(http::HeaderValue::from_static("nothing"));
        match request.uri().path() {
            "/never" => std::future::pending().await,
            "/begins" => {
                let mut response = Response::new(Begun { said: false }.boxed());
                response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
                response
            }
            _ => {
                let mut response = Response::new(full("done"));
                response.headers_mut().insert("content-type", "application/grpc".parse().expect("a value"));
                response.headers_mut().insert("told", told);
                response
            }
        }
    })
    .await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/now").await;
    let proxy = caller.proxy();

    let (headers, body, _) = grpc(proxy, "/now", "10S").await;
    assert_eq!(body, "done");
    let told = headers["told"].to_str().expect("text").to_string();
    let (left, unit) = told.split_at(told.len() - 1);
    assert_eq!(unit, "u", "{told}");
    assert!(left.parse::<u64>().expect("a number") < 10_000_000, "{told}");

    let (headers, ..) = grpc(proxy, "/never", "300m").await;
    assert_eq!(headers["grpc-status"], "4", "{headers:?}");
    // As long as it takes that the beginning arrives in time.
    for timeout in ["300m", "1S", "3S", "10S", "30S"] {
        let (headers, body, trailers) = grpc(proxy, "/begins", timeout).await;
        if !headers.contains_key("grpc-status") || timeout == "30S" {
            assert_eq!((body.as_ref(), trailers["grpc-status"].as_bytes()), (&b"begun"[..], &b"4"[..]));
            break;
        }
    }
    drop(server);
}

/// The values of a metric whose labels contain `label`, added up.
fn value(metrics: &str, name: &str, label: &str) -> f64 {
    let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    let lines = metrics.lines().filter(of_name).filter(|line| line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_say_what_happened_in_the_units_of_their_names() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let app = App::start(|_| async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        Response::new(full("hello\n"))
    })
    .await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let mut open = client::http1(caller.proxy()).await.expect("a connection");
    let callers = [
        ("sheetbend_detected_total", "http1"),
        ("sheetbend_resolved_total", "result=\"mesh\""),
        ("sheetbend_connections_total", "outbound"),
        ("sheetbend_open_connections", "outbound"),
        ("sheetbend_dials_total", "mesh"),
        ("sheetbend_pooled_connections", "mesh"),
        ("sheetbend_tls_handshakes_total", "full"),
        ("sheetbend_certificate_renewals_total", "ok"),
        ("sheetbend_control_plane_connections_total", "ok"),
        ("sheetbend_control_plane_connected", ""),
        ("sheetbend_destinations", ""),
        ("sheetbend_receive_window_bytes", ""),
        ("sheetbend_series", ""),
        ("sheetbend_edges", ""),
        ("process_resident_memory_bytes", ""),
        ("process_open_fds", ""),
        ("process_max_fds", ""),
    ];
    let servers = [
        ("sheetbend_connections_total", "inbound"),
        ("sheetbend_open_connections", "inbound"),
        ("sheetbend_detected_total", "tls"),
        ("sheetbend_dials_total", "app"),
        ("sheetbend_pooled_connections", "plain"),
    ];
    let deadline = std::time::Instant::now() + START;
    let of_caller = loop {
        let request = Request::get("http://server/").header("host", "server").body(Full::<Bytes>::default());
        client::read(open.send_request(request.expect("valid")).await.expect("an answer")).await.expect("a whole one");
        open.ready().await.expect("a connection that is kept");
        // At once: connections to the app are kept for 3 s. On a machine that was slower than that, once more.
        let (of_server, of_caller) = (server.page("/metrics").await.text(), caller.page("/metrics").await.text());
        let of_each = callers.map(|row| (row, &of_caller)).into_iter().chain(servers.map(|row| (row, &of_server)));
        let missing = of_each.into_iter().find(|((name, labels), page)| value(page, name, labels) <= 0.0);
        let Some(((name, labels), page)) = missing else { break of_caller.clone() };
        assert!(std::time::Instant::now() < deadline, "{name} {labels}: {page}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let expiry = value(&of_caller, "sheetbend_certificate_expiry_timestamp_seconds", "") - now;
    assert!((20.0 * 3600.0..25.0 * 3600.0).contains(&expiry), "{expiry}");
    let started = now - value(&of_caller, "process_start_time_seconds", "");
    assert!((0.0..600.0).contains(&started), "{started}");
    let took = value(&of_caller, "istio_request_duration_milliseconds_sum", "response_code=\"200\"");
    let requests = value(&of_caller, "istio_requests_total", "response_code=\"200\"");
    // In microseconds it would be 50,000 at least.
    assert!(requests >= 2.0 && (50.0..50_000.0).contains(&(took / requests)), "{took} ms for {requests}");

    mesh.kill_control_plane();
    eventually("that the control plane is away is told", START, || async {
        let connected = caller.counter("sheetbend_control_plane_connected", &[]).await;
        let failed = caller.counter("sheetbend_control_plane_connections_total", &["failed"]).await;
        (connected == 0.0 && failed > 0.0).then_some(())
    })
    .await;
    drop(open);
    eventually("a connection that ended is open no longer", START, || async {
        (caller.counter("sheetbend_open_connections", &["outbound"]).await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_says_what_it_holds_and_changes_what_it_logs() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("hello\n").await;
    let _server = mesh.run("server").port(app.port()).serve();
    let admin = mesh.control_plane_admin();
    let page = |path: &'static str| async move { client::get(admin, path).await.expect("an answer").text() };
    eventually("the registration is counted", START, || async {
        let metrics = page("/metrics").await;
        let live = value(&metrics, "sheetbend_registrations", "live");
        let streams = value(&metrics, "sheetbend_discovery_streams", "sheetbend");
        (live == 1.0 && streams == 1.0).then_some(())
    })
    .await;
    let metrics = page("/metrics").await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    assert!(value(&metrics, "sheetbend_root_expiry_timestamp_seconds", "sha256") > now, "{metrics}");
    assert!(value(&metrics, "process_resident_memory_bytes", "") > 1e6, "{metrics}");
    assert_eq!(page("/logging").await, "info\n");
    let changed = client::send(admin, "POST", "/logging", "debug").await.expect("an answer");
    assert_eq!((changed.status.as_u16(), changed.text().as_str()), (200, "debug\n"));
    let refused = client::send(admin, "POST", "/logging", "loud").await.expect("an answer");
    assert_eq!(refused.status, 400, "{}", refused.text());
}
