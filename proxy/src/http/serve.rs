//! Serving HTTP on a connection that is known to speak it.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use hyper::body::{Body, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::timeout;

use super::body::{Passing, ResponseBody};
use super::error::h2_error;
use super::head_clock::{self, HEAD_TIME, HeadClock};
use super::turns::Turns;
use crate::rest::{LAST, Rest};
use crate::rewind::Rewind;
use crate::telemetry::Counter;
use crate::upstream::{BoxIo, HEADERS, STREAMS, Windows};

/// How long a connection waits for its next request before its buffers are given up.
const IDLE: Duration = Duration::from_secs(1);
/// How long a client may take for the end of an idle connection to reach it.
const GOODBYE: Duration = Duration::from_secs(1);
/// Headers of an app's request.
const HEADER_BYTES: usize = 60 * 1024;

/// Serves until the connection ends. When `drain` turns true, or what the connection rests on is no longer believed, it
/// says goodbye (GOAWAY, `connection: close`) and ends after what has been begun.
///
/// # Errors
///
/// Why it ended before its time; [`fault`] says whether the peer is to blame.
pub async fn serve<F, R>(
    io: BoxIo,
    http2: bool,
    mut drain: watch::Receiver<bool>,
    rest: Option<Rest>,
    handle: F,
) -> Result<(), hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    // Whoever stops this proxy waits until the last of these is gone.
    let _under_way = drain.clone();
    // Who has shown who it is has something to rest on.
    let from_mesh = rest.is_some();
    let draining = async move {
        // An error means that the proxy itself is gone; the connection then ends with it.
        let _ = drain.wait_for(|drain| *drain).await;
    };
    let told = match rest {
        None => draining.boxed(),
        Some(rest) => async move {
            tokio::select! {
                () = draining => {}
                () = rest.dropped() => {}
            }
        }
        .boxed(),
    };
    // Each kind in a box of its own: a connection that idles holds no room for the other.
    match http2 {
        true => serve_http2(io, from_mesh, told, handle).boxed().await,
        false => serve_http1(io, told, handle).boxed().await,
    }
}

async fn serve_http2<F, R>(
    io: BoxIo,
    from_mesh: bool,
    told: BoxFuture<'static, ()>,
    handle: F,
) -> Result<(), hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    // Allocates once a request, and spares it several copies: hyper hands its future on by value.
    let service = service_fn(move |request| handle(request).map(Ok::<_, Infallible>).boxed());
    // Until the connection ends.
    let windows = if from_mesh { Windows::of_peers() } else { Windows::of_others() };
    let window = windows.give();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        // A burst of impatient callers, all of those that there is room for, ends no connection.
        .max_pending_accept_reset_streams(2 * STREAMS as usize)
        .initial_stream_window_size(window.stream)
        .initial_connection_window_size(window.connection)
        .max_header_list_size(HEADERS)
        .max_send_buf_size(window.stream as usize);
    if from_mesh {
        // h2 counts frames for streams that it has forgotten over a connection's whole life; between ours that may be long.
        builder.max_local_error_reset_streams(None);
    }
    let io = TokioIo::new(HeadClock::new(io, true, Arc::default()));
    let mut connection = pin!(builder.serve_connection(io, service));
    tokio::select! {
        // The connection first: whatever it still has to say comes before the goodbye.
        biased;
        ended = connection.as_mut() => ended,
        () = told => {
            connection.as_mut().graceful_shutdown();
            timeout(LAST, connection).boxed().await.unwrap_or(Ok(()))
        }
    }
}

/// A connection of HTTP/1 as hyper reads and writes it.
pub(super) type Clocked = TokioIo<HeadClock<Rewind<BoxIo>>>;

/// Serves, and keeps an idle connection in little room: hyper's buffers, 16 KiB a connection, go when it has been idle for
/// a while, and come back with the next byte.
async fn serve_http1<F, R>(mut io: BoxIo, mut told: BoxFuture<'static, ()>, handle: F) -> Result<(), hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    let handle = Arc::new(handle);
    let mut read = Bytes::new();
    while let Some((rest, idle)) = until_idle(Rewind::new(read, io), &mut told, &handle).boxed().await? {
        (read, io) = (rest, idle);
        if read.is_empty() {
            read = tokio::select! {
                biased;
                read = some_bytes(&mut io) => read,
                () = told.as_mut() => Bytes::new(),
            };
        }
        if read.is_empty() {
            // TLS has a goodbye of its own, without which its client takes the end for a break.
            let _ = timeout(GOODBYE, io.shutdown()).await;
            break;
        }
    }
    Ok(())
}

/// The next bytes, none at the connection's end.
async fn some_bytes(io: &mut BoxIo) -> Bytes {
    poll_fn(|cx| {
        // On the stack, so that whoever waits holds no room.
        let mut room = [MaybeUninit::uninit(); 4096];
        let mut room = ReadBuf::uninit(&mut room);
        let read = ready!(Pin::new(&mut *io).poll_read(cx, &mut room));
        Poll::Ready(read.map_or_else(|_broken| Bytes::new(), |()| Bytes::copy_from_slice(room.filled())))
    })
    .await
}

/// Serves until the connection ends, or has been idle for [`IDLE`] and is given back, with what was read of a next request.
async fn until_idle<F, R>(
    io: Rewind<BoxIo>,
    told: &mut BoxFuture<'static, ()>,
    handle: &Arc<F>,
) -> Result<Option<(Bytes, BoxIo)>, hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    let turns = Arc::new(Turns::default());
    let io = TokioIo::new(HeadClock::new(io, false, Arc::clone(&turns)));
    // Allocates once a request: hyper keeps room for a request's future as long as the connection is open.
    let service = service_fn({
        let (turns, handle) = (Arc::clone(&turns), Arc::clone(handle));
        move |mut request: Request<Incoming>| {
            let turn = turns.begin();
            if !request.body().is_end_stream() {
                request.extensions_mut().insert(Passing::read_from(turns.body()));
            }
            let tunnel = request.method() == Method::CONNECT;
            let turns = Arc::clone(&turns);
            let answered = move |answer: Response<ResponseBody>| {
                if answer.status() == StatusCode::SWITCHING_PROTOCOLS || (tunnel && answer.status().is_success()) {
                    turns.leave();
                }
                Ok::<_, Infallible>(answer.map(|body| body.taking(turn)))
            };
            handle(request).map(answered).boxed()
        }
    });
    let mut builder = http1::Builder::new();
    // No pipeline_flush: with it hyper keeps all of a response for a client that does not read.
    // Not half-closed: a caller who hangs up while an answer is waited for would go unnoticed for as long as that takes.
    // No timer: hyper's counts from the end of the request before, and would cut idle connections.
    builder
        .max_headers(100)
        .max_buf_size(HEADER_BYTES)
        .half_close(false)
        .timer(TokioTimer::new())
        .header_read_timeout(None);
    let mut connection = builder.serve_connection(io, service).with_upgrades();
    tokio::select! {
        biased;
        ended = &mut connection => return ended.map(|()| None),
        () = told.as_mut() => {
            Pin::new(&mut connection).graceful_shutdown();
            return timeout(LAST, connection).boxed().await.unwrap_or(Ok(())).map(|()| None);
        }
        () = idle(&turns) => {}
    }
    Ok(connection.into_parts().map(|parts| {
        let (unread, io) = parts.io.into_inner().into_inner().into_inner();
        let read = match (parts.read_buf.is_empty(), unread.is_empty()) {
            (true, _) => unread,
            (_, true) => parts.read_buf,
            _ => [parts.read_buf, unread].concat().into(),
        };
        (read, io)
    }))
}

/// Until a connection has been idle for [`IDLE`] or twice that; for longer, where its last request took long.
async fn idle(turns: &Turns) {
    let (mut begun, mut wait) = (turns.begun(), IDLE);
    loop {
        tokio::time::sleep(wait).await;
        let before = std::mem::replace(&mut begun, turns.begun());
        wait = match before == begun {
            true if turns.is_idle() => return,
            // Whoever takes long is not asked every second.
            true => (2 * wait).min(16 * IDLE),
            false => IDLE,
        };
    }
}

/// What to count when a connection ended because of what its peer sent; none where it merely went away.
pub fn fault(error: &hyper::Error) -> Option<Counter> {
    let too_large = |error: &h2::Error| error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM);
    match h2_error(error) {
        _ if head_clock::is_too_slow(error) => Some(Counter::HeadersTooSlow),
        _ if error.is_parse_too_large() => Some(Counter::HeadersTooLarge),
        _ if error.is_parse() => Some(Counter::MalformedRequest),
        Some(error) if too_large(error) => Some(Counter::RefusedOverload),
        Some(error) if error.is_library() && error.is_go_away() => Some(Counter::MalformedRequest),
        _ => None,
    }
}

/// How long a first byte's sender may take for a whole head.
pub const PATIENCE: crate::first_bytes::Patience =
    crate::first_bytes::Patience { first_byte: None, decision: HEAD_TIME };

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http::HeaderValue;
    use http_body_util::BodyExt;
    use hyper::client::conn::http2 as http2_client;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// A connection whose requests are answered so.
    async fn answered<F, R>(answer: F) -> TcpStream
    where
        F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
        R: Future<Output = Response<ResponseBody>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let io: BoxIo = Box::new(listener.accept().await.unwrap().0);
        tokio::spawn(async move {
            let (_not_yet, drain) = watch::channel(false);
            serve(io, false, drain, None, answer).await
        });
        client
    }

    /// A connection whose requests are answered with their paths.
    async fn served() -> TcpStream {
        answered(|request: Request<Incoming>| async move {
            let path = HeaderValue::from_str(request.uri().path()).unwrap();
            if path == "/early" {
                // The answer does not wait for the body, which somebody else goes on reading.
                tokio::spawn(request.into_body().collect());
            } else {
                request.into_body().collect().await.unwrap();
            }
            let mut answer = Response::new(ResponseBody::empty());
            answer.headers_mut().insert("path", path);
            answer
        })
        .await
    }

    /// Sends, and expects answers to these paths, in their order.
    async fn asks(client: &mut TcpStream, bytes: &str, paths: &[&str]) {
        client.write_all(bytes.as_bytes()).await.unwrap();
        for path in paths {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await.expect("an answer"));
            }
            let head = String::from_utf8(head).unwrap();
            assert!(head.starts_with("HTTP/1.1 200") && head.contains(&format!("path: {path}\r\n")), "{path}: {head}");
        }
    }

    async fn long_idle() {
        tokio::time::sleep(2 * IDLE + IDLE / 4).await;
    }

    #[tokio::test]
    async fn a_connection_that_was_idle_goes_on_where_it_was() {
        let mut client = served().await;
        for _ in 0..2 {
            long_idle().await;
            asks(&mut client, "GET /1 HTTP/1.1\r\nhost: a\r\n\r\n", &["/1"]).await;
        }
        long_idle().await;
        asks(&mut client, "GET /2 HTTP/1.1\r\nhost: a\r\n\r\nGET /3 HTTP/1.1\r\nhost: a\r\n\r\n", &["/2", "/3"]).await;
        long_idle().await;
        asks(&mut client, "G", &[]).await;
        long_idle().await;
        asks(&mut client, "ET /4 HTTP/1.1\r\nhost: a\r\n\r\n", &["/4"]).await;
        long_idle().await;
        asks(&mut client, "POST /p HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n123", &["/p"]).await;
        long_idle().await;
        asks(&mut client, "GET /5 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", &["/5"]).await;
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_was_read_of_the_next_request_and_of_a_body_outlasts_an_answer() {
        let mut client = served().await;
        asks(&mut client, "GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HT", &["/1"]).await;
        long_idle().await;
        asks(&mut client, "TP/1.1\r\nhost: a\r\n\r\n", &["/2"]).await;
        let early = "POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n123";
        asks(&mut client, early, &["/early"]).await;
        long_idle().await;
        asks(&mut client, "{56789GET /3 HTTP/1.1\r\nhost: a\r\n\r\n", &["/3"]).await;
    }

    /// An answer over HTTP/2, all of which came at once: a head, a piece of the body, and a reset.
    async fn broken_off() -> Incoming {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (mut sender, connection) = http2_client::handshake(TokioExecutor::new(), TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let answer = tokio::spawn(sender.send_request(Request::get("http://a/").body(String::new()).unwrap()));
        // All that the client has to say.
        let mut said = [0; 1024];
        while timeout(Duration::from_millis(200), theirs.read(&mut said)).await.is_ok() {}
        let settings = b"\0\0\0\x04\0\0\0\0\0";
        let head = b"\0\0\x01\x01\x04\0\0\0\x01\x88";
        let data = b"\0\0\x05\0\0\0\0\0\x01well\n";
        let reset = b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x02";
        theirs.write_all(&[&settings[..], head, data, reset].concat()).await.unwrap();
        answer.await.unwrap().unwrap().into_body()
    }

    #[tokio::test]
    async fn what_came_of_an_answer_is_passed_on_before_its_end_is() {
        let body = Mutex::new(Some(broken_off().await));
        let mut client = answered(move |_request| {
            let body = body.lock().unwrap().take().unwrap();
            async { Response::new(ResponseBody::of_anybody(body)) }
        })
        .await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut heard = Vec::new();
        // Whether the end is orderly does not matter here.
        let _ = client.read_to_end(&mut heard).await;
        let heard = String::from_utf8(heard).unwrap();
        assert!(heard.starts_with("HTTP/1.1 200 OK\r\n") && heard.contains("well\n"), "{heard:?}");
        assert!(!heard.ends_with("0\r\n\r\n"), "{heard:?}");
    }
}
