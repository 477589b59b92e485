//! Serving HTTP on a connection that is known to speak it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tokio::time::timeout;

use super::body::ResponseBody;
use super::error::h2_error;
use super::head_clock::{self, HEAD_TIME, HeadClock, Turns};
use crate::rest::{LAST, Rest};
use crate::telemetry::Counter;
use crate::upstream::{BoxIo, HEADERS, STREAMS, Windows};

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
    let turns = Arc::new(Turns::default());
    let io = TokioIo::new(HeadClock::new(io, http2, Arc::clone(&turns)));
    // Each kind in a box of its own: a connection that idles holds no room for the other.
    match http2 {
        true => serve_http2(io, from_mesh, told, handle).boxed().await,
        false => serve_http1(io, turns, told, handle).boxed().await,
    }
}

type Clocked = TokioIo<HeadClock<BoxIo>>;

async fn serve_http2<F, R>(
    io: Clocked,
    from_mesh: bool,
    told: BoxFuture<'static, ()>,
    handle: F,
) -> Result<(), hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    let service = service_fn(move |request| handle(request).map(Ok::<_, Infallible>));
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

async fn serve_http1<F, R>(
    io: Clocked,
    turns: Arc<Turns>,
    told: BoxFuture<'static, ()>,
    handle: F,
) -> Result<(), hyper::Error>
where
    F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
    R: Future<Output = Response<ResponseBody>> + Send + 'static,
{
    // Allocates once a request: hyper keeps room for a request's future as long as the connection is open.
    let service = service_fn(move |request: Request<Incoming>| {
        let turn = turns.begin();
        let tunnel = request.method() == Method::CONNECT;
        let turns = Arc::clone(&turns);
        let answered = move |answer: Response<ResponseBody>| {
            if answer.status() == StatusCode::SWITCHING_PROTOCOLS || (tunnel && answer.status().is_success()) {
                turns.leave();
            }
            Ok::<_, Infallible>(answer.map(|body| body.taking(turn)))
        };
        handle(request).map(answered).boxed()
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
    let mut connection = pin!(builder.serve_connection(io, service).with_upgrades());
    tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = told => {
            connection.as_mut().graceful_shutdown();
            timeout(LAST, connection).boxed().await.unwrap_or(Ok(()))
        }
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
