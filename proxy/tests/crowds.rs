//! More requests to one destination than may wait for a connection.

mod mesh;

use std::convert::Infallible;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper::client::conn::http2::{self, SendRequest};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use sheetbend_proxy::app::Proxy;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::mesh::Mesh;

/// Requests that wait for a connection to one destination, and how long they wait.
const MAY_WAIT: usize = 10_000;
const WAITS: Duration = Duration::from_secs(5);

/// An address where nobody answers, neither yes nor no: a listener whose queue is full.
struct Deaf {
    address: SocketAddr,
    _socket: Socket,
    _queue: Vec<TcpStream>,
}

impl Deaf {
    fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok();
        Self { address, _queue: std::iter::from_fn(connect).collect(), _socket: socket }
    }
}

async fn http2(proxy: &Proxy) -> SendRequest<Empty<Bytes>> {
    let stream = tokio::net::TcpStream::connect(proxy.explicit().unwrap()).await.unwrap();
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

/// Asks for `/` of an address; gives the status, all that was said beside it, and how long it took.
async fn ask(mut sender: SendRequest<Empty<Bytes>>, of: SocketAddr) -> (StatusCode, String, Duration) {
    let asked = Instant::now();
    let answer = sender.send_request(Request::get(format!("http://{of}/")).body(Empty::new()).unwrap()).await.unwrap();
    let (head, body) = answer.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status, format!("{:?} {}", head.headers, String::from_utf8_lossy(&body)), asked.elapsed())
}

/// A server that says `well` to whoever speaks HTTP/2 to it.
async fn well() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let well = service_fn(|_| async { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("well"))) });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(stream), well));
        }
    });
    address
}

/// So many more requests at once.
async fn crowd(proxy: &Proxy, size: usize, of: SocketAddr, asking: &mut JoinSet<(StatusCode, String, Duration)>) {
    /// Of the 128 streams that a sidecar takes on one connection.
    const STREAMS: usize = 100;
    for _ in 0..size / STREAMS {
        let sender = http2(proxy).await;
        (0..STREAMS).for_each(|_| drop(asking.spawn(ask(sender.clone(), of))));
    }
}

/// How many waited of a crowd of requests that came to a worker at once; one more dials, in vain, and the rest were
/// refused before that long. All were told why, or this says what one was told instead; and a request to somebody else
/// has its answer meanwhile.
async fn waited(proxy: &Proxy, size: usize, others: SocketAddr) -> Result<usize, String> {
    let deaf = Deaf::new();
    let mut asking = JoinSet::new();
    crowd(proxy, size, deaf.address, &mut asking).await;
    let mut waited = 0;
    for number in 1..size {
        let (status, said, took) = asking.join_next().await.unwrap().unwrap();
        let right = said.contains("connection_limit_reached") && said.contains("requests that wait for a connection");
        if status != StatusCode::SERVICE_UNAVAILABLE || !right {
            return Err(format!("{status} after {took:?}: {said}"));
        }
        waited += usize::from(took >= WAITS);
        if number == 1 {
            let (status, said, _) = ask(http2(proxy).await, others).await;
            assert_eq!(status, StatusCode::OK, "{said}");
        }
    }
    Ok(waited)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_requests_as_may_wait_for_a_connection_and_the_rest_are_told_at_once() {
    let mesh = Mesh::start().await;
    let caller = mesh.sidecar("caller", None).await;
    let others = well().await;
    let mut seen = Vec::new();
    // Where a machine is so slow that the last come when the first have waited for long enough, more have waited; where it
    // is slower still, the one who dials is told of that before all who wait are told of theirs.
    for _ in 0..5 {
        seen.push(waited(&caller, MAY_WAIT + 500, others).await);
        if seen.ends_with(&[Ok(MAY_WAIT)]) {
            return;
        }
    }
    panic!("not {MAY_WAIT} waited, but {seen:?}");
}
