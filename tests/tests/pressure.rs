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
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

const LARGE: u64 = 100 * 1024 * 1024;

/// Held by stories that compare times: they would disturb each other.
static ALONE: Mutex<()> = Mutex::const_new(());

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

/// How long others' small requests take that begin while `what` happens, or soon after. None of them fails.
async fn beside<T>(proxy: SocketAddr, what: impl Future<Output = T>) -> (Vec<Duration>, T) {
    let others = Load::start(proxy, "http://server/", 32, 10.0);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let from = Instant::now();
    let kept = what.await;
    tokio::time::sleep_until(from + Duration::from_secs(2)).await;
    let tally = others.stop().await;
    tally.assert_none_failed(50);
    let took = tally.good.iter().filter(|good| good.asked >= from).map(|good| good.took).collect();
    (took, kept)
}

/// Others' requests beside trouble take no longer than twice the time that they take beside callers who want as much and
/// know how to behave, but for one in a hundred of either. The two take turns, and whatever else this machine does may hit
/// one of them: the best of five attempts counts.
async fn unmoved(behaved: impl AsyncFn() -> Vec<Duration>, trouble: impl AsyncFn() -> Vec<Duration>) {
    let mut seen = Vec::new();
    for _ in 0..5 {
        let (mut beside_behaved, mut beside_trouble) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            beside_behaved.extend(behaved().await);
            beside_trouble.extend(trouble().await);
        }
        let quantiles = [beside_behaved, beside_trouble].map(p99);
        seen.push(quantiles);
        if quantiles[1] <= quantiles[0] * 2 {
            return;
        }
    }
    panic!("others wait longer than twice the time, (beside the behaved, beside trouble): {seen:?}");
}

fn p99(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stops_reading_100_mib_delays_nobody_and_gets_all_of_it_in_the_end() {
    let _alone = ALONE.lock().await;
    let mesh = Mesh::local();
    let (_app, server, caller) = pair(&mesh).await;
    let proxy = caller.proxy();
    let ask = async || {
        let mut sender = http::http1(proxy).await.expect("a connection");
        let request = Request::get("http://server/large").header("host", "server").body(Full::<Bytes>::default());
        let response = sender.send_request(request.expect("a request")).await.expect("an answer's head");
        assert_eq!(response.status(), 200);
        (sender, response)
    };
    let quiet = async || beside(proxy, async {}).await.0;
    let stopped = async || beside(proxy, ask()).await.0;
    unmoved(quiet, stopped).await;

    let (_, (_sender, response)) = beside(proxy, ask()).await;
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
    let _alone = ALONE.lock().await;
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
    let ask = async || {
        let tunnel = http::tunnel(proxy, &target).await.expect("a tunnel");
        let mut sender = http::http2(tunnel).await.expect("HTTP/2");
        let request = Request::post(format!("http://{target}/tiny.Tiny/Messages"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::<Bytes>::default());
        let response = sender.send_request(request.expect("a request")).await.expect("an answer's head");
        (sender, response)
    };
    let read = async |response: Response<Incoming>| {
        let body = response.into_body().collect().await.expect("the messages").to_bytes();
        assert_eq!(body.len(), 60_000);
    };
    let reads = async || beside(proxy, async { read(ask().await.1).await }).await.0;
    let leaves = async || beside(proxy, ask()).await.0;
    unmoved(reads, leaves).await;

    let (_, (_sender, response)) = beside(proxy, ask()).await;
    read(response).await;
    for sidecar in [&server, &caller] {
        assert!(sidecar.process.resident() < 64 << 20, "{} MiB", sidecar.process.resident() >> 20);
    }
}

/// An app whose answers to `/held` wait until it lets them go.
struct Holding {
    app: App,
    under_way: Arc<AtomicUsize>,
    let_go: watch::Sender<bool>,
}

impl Holding {
    async fn start() -> Self {
        let (under_way, let_go) = (Arc::<AtomicUsize>::default(), watch::Sender::new(false));
        let (count, gate) = (Arc::clone(&under_way), let_go.clone());
        let app = App::start(move |request: Request<Incoming>| {
            let held = (request.uri().path() == "/held").then(|| (UnderWay::begin(&count), gate.subscribe()));
            async move {
                if let Some((_under_way, mut gate)) = held {
                    gate.wait_for(|open| *open).await.expect("the gate stays");
                }
                Response::new(full("small\n"))
            }
        })
        .await;
        Self { app, under_way, let_go }
    }

    /// Waits until so many requests are held.
    async fn holds(&self, expected: usize) {
        let what = format!("{expected} requests are held");
        let look = || async { (self.under_way.load(Ordering::Relaxed) == expected).then_some(()) };
        eventually(&what, 2 * START, look).await;
    }

    /// Clients who wait for their answers.
    async fn clients(&self, proxy: SocketAddr, number: usize) -> Vec<TcpStream> {
        let mut clients = Vec::new();
        for _ in 0..number {
            let mut stream = TcpStream::connect(proxy).await.expect("a connection");
            stream.write_all(b"GET http://server/held HTTP/1.1\r\nHost: server\r\n\r\n").await.expect("a request");
            clients.push(stream);
        }
        self.holds(number).await;
        clients
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_clients_that_hang_up_at_once_are_no_more_to_others_than_as_many_who_get_their_answers() {
    const CLIENTS: usize = 2000;
    let _alone = ALONE.lock().await;
    sheetbend_tests::raise_file_limit();
    let mesh = Mesh::local();
    let holding = Holding::start().await;
    let _server = mesh.run("server").port(holding.app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let proxy = caller.proxy();
    let answered = async || {
        let clients = holding.clients(proxy, CLIENTS).await;
        let all = async {
            holding.let_go.send_replace(true);
            for mut client in clients {
                let mut said = Vec::new();
                while !said.ends_with(b"small\n") {
                    assert!(client.read_buf(&mut said).await.expect("an answer") > 0, "an answer");
                }
            }
        };
        let (took, ()) = beside(proxy, all).await;
        holding.holds(0).await;
        holding.let_go.send_replace(false);
        took
    };
    let hang_up = async || {
        let clients = holding.clients(proxy, CLIENTS).await;
        let (took, ()) = beside(proxy, async { drop(clients) }).await;
        // Nobody waits for their answers any more.
        holding.holds(0).await;
        took
    };
    unmoved(answered, hang_up).await;
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
