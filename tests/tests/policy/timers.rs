//! What ends when it takes too long or stands still, and says so: connections, calls, streams, and bytes that nobody reads.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use sheetbend_tests::http::{Answer, get, http1, http2_of_any, read, tunnel};
use sheetbend_tests::planned::{route, service};
use sheetbend_tests::{AnyBody, App, Mesh, START, Scripted, Sidecar, eventually, full, loopback};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// Whatever takes so long has not been ended by a timer of a second or less.
const FAR: Duration = Duration::from_secs(20);

fn policy(name: &str, pool: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: {name}}}]\n  connectionPool: {{{pool}}}\n---\n"
    )
}

/// A body of which the first piece comes at once and the next never.
fn half() -> AnyBody {
    let first = tokio_stream::once(Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"\0\0\0\0\x02hi"))));
    StreamBody::new(first.chain(tokio_stream::pending())).boxed()
}

/// A body that goes on for four seconds, with a piece every 100 ms.
fn moving() -> AnyBody {
    let (sender, pieces) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        for _ in 0..40 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let _ = sender.send(Ok::<_, Infallible>(Frame::data(Bytes::from_static(b".")))).await;
        }
    });
    StreamBody::new(ReceiverStream::new(pieces)).boxed()
}

/// A body of which everything comes after more than a second.
fn late() -> AnyBody {
    let (sender, pieces) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        let _ = sender.send(Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"late")))).await;
    });
    StreamBody::new(ReceiverStream::new(pieces)).boxed()
}

/// A server that hangs, stands still in the middle, or moves; `/told` is what it was told of the time left, and `/length`
/// how long the request's body was.
async fn slow() -> App {
    App::start(|request: Request<Incoming>| async move {
        let grpc = request.headers().contains_key("grpc-timeout") || request.headers().contains_key("te");
        let answer = Response::builder().header("content-type", if grpc { "application/grpc" } else { "text/plain" });
        let body = match request.uri().path() {
            "/hangs" => std::future::pending().await,
            "/half" => half(),
            "/moves" => moving(),
            "/late" => {
                tokio::time::sleep(Duration::from_millis(1_200)).await;
                late()
            }
            "/length" => {
                let body = request.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or(0);
                full(body.to_string())
            }
            _ => full(
                request.headers().get("grpc-timeout").map_or(Bytes::new(), |v| Bytes::copy_from_slice(v.as_bytes())),
            ),
        };
        answer.body(body).expect("an answer")
    })
    .await
}

async fn timeouts(caller: &Sidecar, timer: &str) -> f64 {
    caller.counter("sheetbend_timeouts_total", &[&format!("timer=\"{timer}\"")]).await
}

/// A call of gRPC, with a message and perhaps with a deadline: the head and the body of its answer as they come.
async fn call(caller: &Sidecar, url: &str, deadline: Option<&str>) -> Response<Incoming> {
    let request = Request::post(url).header("content-type", "application/grpc").header("te", "trailers");
    let request = deadline.into_iter().fold(request, |request, time| request.header("grpc-timeout", time));
    let request = request.body(full(&b"\0\0\0\0\0"[..])).expect("a request");
    let stream = TcpStream::connect(caller.proxy()).await.expect("it accepts");
    http2_of_any(stream).await.expect("HTTP/2").send_request(request).await.expect("an answer")
}

/// The status with which a call ended, wherever it stands.
fn ends(answer: &Answer) -> &str {
    let status = answer.headers.get("grpc-status").or(answer.trailers.get("grpc-status"));
    status.and_then(|status| status.to_str().ok()).unwrap_or("none")
}

/// An address at which nobody ever answers: the kernel has no room for another connection there, nor for one that begins.
fn silent() -> (u16, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    listener.bind(&loopback(0).into()).expect("a free port");
    listener.listen(0).expect("it listens");
    let address = listener.local_addr().expect("a bound socket has an address");
    let port = address.as_socket().expect("an address of IP").port();
    let mut held = vec![listener];
    for _ in 0..16 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        let _ = socket.connect(&address);
        held.push(socket);
    }
    (port, held)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_not_there_in_time_is_given_up_and_the_caller_is_told() {
    let (port, _held) = silent();
    let resources = service("web", &[port]) + &policy("web", "tcp: {connectTimeout: 300ms}");
    let mesh = Mesh::with_resources(&resources, &[]);
    let mut caller = mesh.caller("caller");
    let asked = Instant::now();
    let answer = eventually("web is known", START, || async {
        let answer = get(caller.proxy(), "http://web/").await.ok()?;
        let why = answer.headers.get("proxy-status")?.to_str().ok()?.to_string();
        why.contains("connection_timeout").then_some((answer.status, why))
    })
    .await;
    // Twice: nothing was sent.
    assert!(asked.elapsed() >= Duration::from_millis(600), "{:?}", asked.elapsed());
    assert_eq!(answer.0, StatusCode::GATEWAY_TIMEOUT);
    assert!(answer.1.contains("no answer within 300ms"), "{}", answer.1);
    assert!(timeouts(&caller, "connect").await >= 2.0);
    let line = caller.process.wait_for("no answer within 300ms", FAR);
    assert!(line.contains("UF"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_ends_with_its_grpc_timeout_wherever_it_is_and_the_server_is_told_what_is_left() {
    let app = slow().await;
    let resources = service("web", &[app.port()]);
    let mesh = Mesh::with_resources(&resources, &[]);
    let mut caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;

    let told = read(call(&caller, "http://web/told", Some("60S")).await).await.expect("a whole answer").text();
    let left: u64 = told.trim_end_matches('u').parse().unwrap_or_else(|e| panic!("{e}: {told}"));
    assert!((1..60_000_000).contains(&left), "{told}");
    let told = read(call(&caller, "http://web/told", None).await).await.expect("a whole answer").text();
    assert_eq!(told, "", "who has no deadline tells of none");

    let late = read(call(&caller, "http://web/hangs", Some("300m")).await).await.expect("a whole answer");
    assert_eq!((late.status, ends(&late)), (StatusCode::OK, "4"));
    let why = late.headers["proxy-status"].to_str().expect("text");
    assert!(why.contains("http_response_timeout") && why.contains("set by grpc-timeout"), "{why}");
    let line = caller.process.wait_for("/hangs", FAR);
    assert!(line.contains("UT"), "{line}");

    let late = read(call(&caller, "http://web/half", Some("300m")).await).await.expect("an answer that ends in order");
    assert_eq!((&late.body[..], ends(&late)), (&b"\0\0\0\0\x02hi"[..], "4"));
    let line = caller.process.wait_for("/half", FAR);
    assert!(line.contains("UT"), "{line}");
    assert_eq!(timeouts(&caller, "callers_deadline").await, 2.0);
    let not_retried = async |reason: &str| caller.counter("sheetbend_not_retried_total", &[reason]).await;
    assert_eq!(not_retried("reason=\"deadline\"").await, 1.0);
    assert_eq!(not_retried("reason=\"answer_begun\"").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_stands_still_is_ended_and_one_that_moves_is_not() {
    let app = slow().await;
    let idle = "sheetbend.io/stream-idle-timeout: 2s";
    let resources = service("web", &[app.port()]) + &route("HTTPRoute", "web", idle, "");
    let mesh = Mesh::with_resources(&resources, &[]);
    let mut caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;

    let moved = get(caller.proxy(), "http://web/moves").await.expect("a whole answer");
    assert_eq!(moved.body.len(), 40);
    // The head of an answer moves it, too.
    let late = get(caller.proxy(), "http://web/late").await.expect("a whole answer");
    assert_eq!(late.text(), "late");
    // An upload moves, too: four seconds of it, before there is anything of an answer.
    let request = Request::post("http://web/length").body(moving()).expect("a request");
    let stream = TcpStream::connect(caller.proxy()).await.expect("it accepts");
    let answer = http2_of_any(stream).await.expect("HTTP/2").send_request(request).await.expect("an answer");
    assert_eq!(read(answer).await.expect("a whole answer").text(), "40");
    assert_eq!(timeouts(&caller, "stream_idle").await, 0.0);

    let asked = Instant::now();
    let late = get(caller.proxy(), "http://web/hangs").await.expect("an answer");
    assert!((Duration::from_secs(2)..FAR).contains(&asked.elapsed()));
    assert_eq!(late.status, StatusCode::GATEWAY_TIMEOUT);
    let why = late.headers["proxy-status"].to_str().expect("text");
    assert!(why.contains("error=connection_read_timeout") && why.contains("nothing moved for 2s"), "{why}");
    let line = caller.process.wait_for("/hangs", FAR);
    assert!(line.contains(" SI "), "{line}");

    let request = Request::get("http://web/half").header("host", "web").body(Full::default()).expect("a request");
    let mut answer = http1(caller.proxy()).await.expect("a connection").send_request(request).await.expect("a head");
    assert!(answer.body_mut().frame().await.is_some_and(|first| first.is_ok()));
    let rest = tokio::time::timeout(FAR, answer.body_mut().frame()).await.expect("it is ended");
    assert!(rest.is_some_and(|frame| frame.is_err()), "an answer that broke off is no whole one");
    let line = caller.process.wait_for("/half", FAR);
    assert!(line.contains(" SI "), "{line}");

    let ended = read(call(&caller, "http://web/half", None).await).await.expect("a call ends in order");
    assert_eq!((&ended.body[..], ends(&ended)), (&b"\0\0\0\0\x02hi"[..], "14"));
    assert_eq!(timeouts(&caller, "stream_idle").await, 3.0);
    let deadline = caller.counter("sheetbend_not_retried_total", &["reason=\"deadline\""]).await;
    assert_eq!(deadline, 1.0, "nothing that stands still is tried again");
}

/// A server that says back what it hears, on a port of its own.
async fn echo() -> u16 {
    let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
    let port = listener.local_addr().expect("a bound socket has an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                tokio::io::copy(&mut reader, &mut writer).await
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opaque_connection_that_stands_still_is_ended_and_one_that_moves_is_not() {
    let resources = service("echo", &[echo().await]) + &policy("echo", "tcp: {idleTimeout: 2s}");
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    let mut stream = eventually("echo is known", START, || async {
        let mut stream = tunnel(caller.proxy(), "echo:80").await.ok()?;
        stream.write_all(b"?").await.ok()?;
        (stream.read_u8().await.ok()? == b'?').then_some(stream)
    })
    .await;
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(b"!").await.expect("it is open");
        assert_eq!(stream.read_u8().await.expect("it answers"), b'!');
    }
    assert_eq!(timeouts(&caller, "tcp_idle").await, 0.0);
    let end = tokio::time::timeout(FAR, stream.read(&mut [0])).await.expect("it is ended");
    assert_eq!(end.expect("in order"), 0);
    eventually("it is counted", START, || async { (timeouts(&caller, "tcp_idle").await == 1.0).then_some(()) }).await;
}

/// A server that counts the connections it was given and those that were ended by who made them.
async fn counting() -> (Scripted, Arc<[AtomicU64; 2]>) {
    let counts = Arc::<[AtomicU64; 2]>::default();
    let counted = Arc::clone(&counts);
    let server = Scripted::start(move |mut line| {
        let counted = Arc::clone(&counted);
        async move {
            counted[0].fetch_add(1, Relaxed);
            while line.hear("\r\n\r\n").await.is_some() {
                line.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
            }
            counted[1].fetch_add(1, Relaxed);
        }
    });
    (server.await, counts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_without_a_request_is_ended_when_its_time_is_over_and_not_before() {
    let ((short, ended), (long, kept)) = (counting().await, counting().await);
    let resources = service("short", &[short.port()]) + &policy("short", "http: {idleTimeout: 1s}");
    let resources = resources + &service("long", &[long.port()]) + &policy("long", "http: {idleTimeout: 1h}");
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    for name in ["short", "long"] {
        caller.first_answer(&format!("http://{name}/")).await;
    }
    eventually("the short one is ended", START, || async {
        (ended[1].load(Relaxed) > 0 && ended[1].load(Relaxed) == ended[0].load(Relaxed)).then_some(())
    })
    .await;
    let mut sender = http1(caller.proxy()).await.expect("a connection");
    let mut ask = async || {
        sender.ready().await.expect("the caller's own connection stays");
        let request = Request::get("http://long/").header("host", "long").body(Full::default()).expect("a request");
        read(sender.send_request(request).await.expect("a head")).await.expect("an answer").text()
    };
    assert_eq!(ask().await, "hi");
    let before = kept[0].load(Relaxed);
    // Longer than connections are kept without a policy.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(ask().await, "hi");
    assert_eq!([&kept[0], &kept[1]].map(|count| count.load(Relaxed)), [before, 0]);
}
