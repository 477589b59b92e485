//! A connection that takes a request, and what a failure says about the request's fate.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures_util::TryFutureExt;
use futures_util::future::Either;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};

use super::windows::Windows;
use super::{DialError, Dialed};

use crate::http::body::RequestBody;
use crate::http::error::{Processed, h2_error};
use crate::rest::Rest;
use crate::telemetry::Counter;

/// What we take in one frame. A 1 MiB answer costs a tenth less CPU than in frames of 16 KiB, and a frame of this size
/// still keeps others on the connection waiting for far less than a millisecond.
const FRAME: u32 = 256 * 1024;
/// Headers within the mesh.
pub(crate) const HEADERS: u32 = 96 * 1024;

/// What is spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wire {
    /// HTTP/2, shared by many requests.
    Http2,
    /// HTTP/1.1, one request at a time.
    Http1,
}

/// A connection that takes a request.
pub enum Sender {
    /// One of many streams.
    Http2(http2::SendRequest<RequestBody>),
    /// All of it.
    Http1(http1::SendRequest<RequestBody>),
}

/// A request that got no answer.
pub struct SendError {
    /// What broke.
    pub source: hyper::Error,
    /// Whether the request may have had an effect.
    pub processed: Processed,
}

impl Sender {
    /// What is spoken on it.
    pub fn wire(&self) -> Wire {
        match self {
            Self::Http2(_) => Wire::Http2,
            Self::Http1(_) => Wire::Http1,
        }
    }

    /// Sends a request; what it returns waits for the head of the answer.
    ///
    /// Not an async function, which would keep room for the request until then.
    pub fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, SendError>> + use<> {
        let answer = match self {
            Self::Http2(sender) => Either::Left(sender.try_send_request(request)),
            Self::Http1(sender) => Either::Right(sender.try_send_request(request)),
        };
        answer.map_err(|mut failed| {
            let unsent = failed.take_message().is_some();
            let source = failed.into_error();
            let processed = if unsent { Processed::No(Counter::RetriedUnsent) } else { processed(&source) };
            SendError { source, processed }
        })
    }
}

/// What a broken stream says about its request (RFC 9113 §8.7).
fn processed(error: &hyper::Error) -> Processed {
    let Some(error) = h2_error(error) else { return Processed::Maybe };
    match error.reason() {
        Some(h2::Reason::REFUSED_STREAM) if error.is_remote() && error.is_reset() => {
            Processed::No(Counter::RetriedRefused)
        }
        // A graceful goodbye ends only the streams above its last id; those below it go on.
        Some(h2::Reason::NO_ERROR) if error.is_remote() && error.is_go_away() => Processed::No(Counter::RetriedGoAway),
        _ => Processed::Maybe,
    }
}

/// A shared connection, and how many streams its peer allows, kept up to date.
pub(super) async fn connect_h2(
    dialed: Dialed,
    ours: bool,
) -> Result<(http2::SendRequest<RequestBody>, Arc<AtomicUsize>), DialError> {
    let window = Windows::of_peers().give();
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(window.stream)
        .initial_connection_window_size(window.connection)
        .max_frame_size(FRAME)
        .max_header_list_size(HEADERS)
        .max_send_buf_size(window.stream as usize);
    if ours {
        // gRPC servers punish pings; our own proxies do not.
        builder.keep_alive_interval(Duration::from_secs(10)).keep_alive_timeout(Duration::from_secs(10));
        // However many callers give up at once, and however often: the connection is others' too.
        builder.max_concurrent_reset_streams(256).max_local_error_reset_streams(None);
    }
    let (sender, connection) = builder.handshake(TokioIo::new(dialed.io)).await.map_err(DialError::Http)?;
    let permit = dialed.permit;
    let allowed = Arc::new(AtomicUsize::new(connection.current_max_send_streams()));
    let told = Arc::clone(&allowed);
    let connection = async move {
        let _window = (window, permit);
        let mut connection = std::pin::pin!(connection);
        std::future::poll_fn(|cx| {
            let ended = connection.as_mut().poll(cx);
            told.store(connection.current_max_send_streams(), Relaxed);
            ended
        })
        .await
    };
    tokio::spawn(until_over(connection, dialed.rest));
    Ok((sender, allowed))
}

/// Drives a connection to its end, and no longer than what it rests on allows.
pub(super) async fn until_over<T>(connection: impl Future<Output = T>, rest: Option<Rest>) {
    let Some(rest) = rest else {
        let _ = connection.await;
        return;
    };
    tokio::select! {
        // The connection first: its own end is the common one.
        biased;
        _ = connection => {}
        () = rest.over() => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn what_a_connection_hands_back_was_not_sent() {
        let (ours, _theirs) = duplex(1024);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        let mut sender = Sender::Http1(sender);
        let answer = sender.send(Request::post("/").body(RequestBody::Empty).unwrap());
        // It ends with the request in its queue.
        drop(connection);
        let failed = answer.await.err().unwrap();
        assert_eq!(failed.processed, Processed::No(Counter::RetriedUnsent));
    }

    #[tokio::test]
    async fn what_was_sent_may_have_been_processed() {
        let (ours, mut theirs) = duplex(1024);
        let (sender, connection) = http1::handshake(TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let mut sender = Sender::Http1(sender);
        let answer = tokio::spawn(sender.send(Request::post("/").body(RequestBody::Empty).unwrap()));
        tokio::io::AsyncReadExt::read_u8(&mut theirs).await.unwrap();
        drop(theirs);
        assert_eq!(answer.await.unwrap().err().unwrap().processed, Processed::Maybe);
    }
}
