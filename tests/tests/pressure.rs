//! One caller's bad manners are nobody else's trouble.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::http::{Request, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use sheetbend_tests::{AnyBody, App, Load, Mesh, START, Sidecar, eventually, full, http, long};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LARGE: u64 = 100 * 1024 * 1024;

async fn answer(request: Request<Incoming>) -> Response<AnyBody> {
    match request.uri().path() {
        "/large" => Response::new(long(LARGE)),
        "/slow" => {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Response::new(full("slow\n"))
        }
        _ => Response::new(full("small\n")),
    }
}

/// A server and a caller, each beside its sidecar, with the server's port.
async fn pair(mesh: &Mesh) -> (App, Sidecar, Sidecar) {
    let app = App::start(answer).await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    let first = caller.first_answer("http://server/").await;
    assert_eq!(first.text(), "small\n");
    (app, server, caller)
}

/// Runs a load of small requests for `length`, and again while `trouble` is under way: none fails in either.
async fn unmoved_by<T: Send + 'static>(
    proxy: SocketAddr,
    length: Duration,
    trouble: impl Future<Output = T> + Send + 'static,
) -> T {
    let quiet = Load::start(proxy, "http://server/", 8, 25.0);
    tokio::time::sleep(length).await;
    let quiet = quiet.stop().await;
    quiet.assert_none_failed(50);
    let load = Load::start(proxy, "http://server/", 8, 25.0);
    let trouble = tokio::spawn(trouble);
    tokio::time::sleep(length).await;
    let during = load.stop().await;
    let kept = trouble.await.expect("the trouble itself goes well");
    during.assert_none_failed(50);
    // Not a measurement, but a hung neighbour would be seen: the quantile is compared with room for a busy machine.
    let bound = quiet.quantile(0.99) * 2 + Duration::from_secs(2);
    assert!(during.quantile(0.99) < bound, "{:?} became {:?}", quiet.quantile(0.99), during.quantile(0.99));
    kept
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stops_reading_100_mib_delays_nobody_and_gets_all_of_it_in_the_end() {
    let mesh = Mesh::local();
    let (_app, server, caller) = pair(&mesh).await;
    let proxy = caller.proxy();
    let stopped = async move {
        let mut sender = http::http1(proxy).await.expect("a connection");
        let request = Request::get("http://server/large").header("host", "server").body(Full::<Bytes>::default());
        let response = sender.send_request(request.expect("a request")).await.expect("an answer's head");
        assert_eq!(response.status(), 200);
        (sender, response)
    };
    let (_sender, response) = unmoved_by(proxy, Duration::from_secs(3), stopped).await;
    for sidecar in [&server, &caller] {
        let resident = sidecar.process.resident();
        assert!(resident < 64 << 20, "{} holds {} MiB", sidecar.service, resident >> 20);
    }
    let mut body = response.into_body();
    let mut read = 0;
    while let Some(frame) = body.frame().await {
        read += frame.expect("a frame").into_data().map_or(0, |data| data.len() as u64);
    }
    assert_eq!(read, LARGE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_ten_thousand_tiny_messages_unread_delays_nobody() {
    let mesh = Mesh::local();
    let tiny = |request: Request<Incoming>| async move {
        match request.uri().path() {
            "/tiny.Tiny/Messages" => {
                // Ten thousand gRPC messages of one byte each, every one in a frame of its own.
                let messages = tokio_stream::iter((0..10_000u32).map(|_| {
                    Ok::<_, std::convert::Infallible>(hyper::body::Frame::data(Bytes::from_static(&[0, 0, 0, 0, 1, 7])))
                }));
                let mut response = Response::new(http_body_util::StreamBody::new(messages).boxed());
                response.headers_mut().insert("content-type", ::http::HeaderValue::from_static("application/grpc"));
                response
            }
            _ => Response::new(full("small\n")),
        }
    };
    let app = App::start(tiny).await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    let (proxy, target) = (caller.proxy(), format!("server:{}", app.port()));
    caller.first_answer("http://server/").await;
    let unread = async move {
        let tunnel = http::tunnel(proxy, &target).await.expect("a tunnel");
        let mut sender = http::http2(tunnel).await.expect("HTTP/2");
        let request = Request::post(format!("http://{target}/tiny.Tiny/Messages"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::<Bytes>::default());
        let response = sender.send_request(request.expect("a request")).await.expect("an answer's head");
        (sender, response)
    };
    let (_sender, response) = unmoved_by(proxy, Duration::from_secs(3), unread).await;
    let body = response.into_body().collect().await.expect("the messages, read late").to_bytes();
    assert_eq!(body.len(), 60_000);
    for sidecar in [&server, &caller] {
        assert!(sidecar.process.resident() < 64 << 20, "{} MiB", sidecar.process.resident() >> 20);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_clients_that_hang_up_at_once_end_nobody_else_s_request() {
    sheetbend_tests::raise_file_limit();
    let mesh = Mesh::local();
    let (_app, _server, caller) = pair(&mesh).await;
    let proxy = caller.proxy();
    let hang_up = async move {
        let mut clients = Vec::new();
        for _ in 0..2000 {
            let mut stream = tokio::net::TcpStream::connect(proxy).await.expect("a connection");
            stream.write_all(b"GET http://server/slow HTTP/1.1\r\nHost: server\r\n\r\n").await.expect("a request");
            clients.push(stream);
        }
        // All of them go at once, their requests unanswered.
        drop(clients);
    };
    unmoved_by(proxy, Duration::from_secs(4), hang_up).await;
    let after = http::get(proxy, "http://server/").await.expect("an answer afterwards");
    assert_eq!(after.text(), "small\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_requests_are_answered_in_order() {
    let mesh = Mesh::local();
    let (_app, _server, caller) = pair(&mesh).await;
    let mut stream = tokio::net::TcpStream::connect(caller.proxy()).await.expect("a connection");
    let one = "GET http://server/ HTTP/1.1\r\nHost: server\r\n\r\n";
    let last = "GET http://server/ HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n";
    stream.write_all(format!("{one}{one}{last}").as_bytes()).await.expect("three requests at once");
    let mut said = String::new();
    stream.read_to_string(&mut said).await.expect("answers to the end");
    assert_eq!(said.matches("HTTP/1.1 200 OK").count(), 3, "{said}");
    assert_eq!(said.matches("small\n").count(), 3, "{said}");
}

/// Counts what is under way, for as long as it lives.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_who_give_up_on_a_server_that_hangs_leave_nothing_behind() {
    const CALLERS: usize = 60;
    let mesh = Mesh::with_control_plane(&[]);
    let under_way = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&under_way);
    let app = App::start(move |request: Request<Incoming>| {
        let mine = (request.uri().path() == "/hang").then(|| UnderWay::begin(&count));
        async move {
            if mine.is_some() {
                std::future::pending::<()>().await;
            }
            Response::new(full("small\n"))
        }
    })
    .await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let open_before = [&server, &caller].map(|sidecar| sidecar.process.open_files());
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let mut stream = tokio::net::TcpStream::connect(caller.proxy()).await.expect("a connection");
        stream.write_all(b"GET http://server/hang HTTP/1.1\r\nHost: server\r\n\r\n").await.expect("a request");
        callers.push(stream);
    }
    eventually("all of them wait", START, || async { (under_way.load(Ordering::Relaxed) == CALLERS).then_some(()) })
        .await;
    // Half of them close, half of them reset.
    for stream in callers.iter().step_by(2) {
        socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("an option");
    }
    drop(callers);
    eventually("the server's requests are given up too", START, || async {
        (under_way.load(Ordering::Relaxed) == 0).then_some(())
    })
    .await;
    for (sidecar, before) in [&server, &caller].into_iter().zip(open_before) {
        eventually("their connections are closed", START, || async {
            (sidecar.process.open_files() < before + CALLERS / 2).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_impatient_callers_ends_no_other_request_on_their_connection() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::start(answer).await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let (proxy, before) = (caller.proxy(), app.seen.load(Ordering::Relaxed));
    let mut patient = tokio::task::JoinSet::new();
    for _ in 0..8 {
        patient.spawn(async move {
            http::send(proxy, "POST", "http://server/slow", "once").await.map_err(|e| e.to_string())
        });
    }
    eventually("they are under way", START, || async {
        (app.seen.load(Ordering::Relaxed) == before + 8).then_some(())
    })
    .await;
    // While the other side is held up, so many come and go that it finds them all at once.
    server.process.signal(rustix::process::Signal::STOP);
    for _ in 0..3 {
        let mut impatient = Vec::new();
        for _ in 0..30 {
            let mut stream = tokio::net::TcpStream::connect(proxy).await.expect("a connection");
            stream.write_all(b"GET http://server/slow HTTP/1.1\r\nHost: server\r\n\r\n").await.expect("a request");
            impatient.push(stream);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(impatient);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    server.process.signal(rustix::process::Signal::CONT);
    while let Some(answer) = patient.join_next().await {
        let answer = answer.expect("a task").unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((answer.status.as_u16(), answer.text().as_str()), (200, "slow\n"));
    }
}
