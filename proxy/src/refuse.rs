//! Connections that go nowhere: an HTTP client is told why, any other sees its connection break.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::sync::watch;

use crate::app::Shared;
use crate::detect::Detected;
use crate::first_bytes::{FirstBytes, Patience, read_first};
use crate::http::error::Error;
use crate::http::exchange::Exchange;
use crate::http::headers::is_grpc;
use crate::http::known::Known;
use crate::http::serve::serve;
use crate::rewind::Rewind;
use crate::tcp::Abort;
use crate::telemetry::Reporter;
use crate::upstream::BoxIo;

/// Ends a connection for the reason in `error`. `bytes` are those that were read from it already.
pub(crate) async fn refuse(
    shared: &Shared,
    side: Reporter,
    mut io: BoxIo,
    mut bytes: BytesMut,
    error: Error,
    peer: SocketAddr,
) {
    let first = match error {
        // Whatever is spoken: nobody looks into it.
        Error::Unrouted(..) => Ok(FirstBytes::Closed),
        _ => read_first(&mut io, &mut bytes, Patience::default()).await,
    };
    let http2 = match first {
        Ok(FirstBytes::Detected(Detected::Http1)) => false,
        Ok(FirstBytes::Detected(Detected::Http2)) => true,
        // Whoever waits for the server to speak first, or speaks what we do not, cannot be told.
        _ => {
            let said = match error.counter() {
                Some(counter) => shared.telemetry.refused(counter),
                None => shared.telemetry.sparingly("a connection is refused"),
            };
            if let Some(left_out) = said {
                tracing::warn!(%peer, %error, left_out, "a connection is refused");
            }
            io.abort();
            return;
        }
    };
    let (error, telemetry) = (Arc::new(error), Arc::clone(&shared.telemetry));
    // The first answer is the last one: another connection may find things changed.
    let (goodbye, told) = watch::channel(false);
    let handle = move |request: http::Request<hyper::body::Incoming>| {
        let (error, telemetry) = (Arc::clone(&error), Arc::clone(&telemetry));
        goodbye.send_replace(true);
        async move {
            let (head, _) = request.into_parts();
            let mut exchange = Exchange::begin(&telemetry, side, &head, Known::of(&head.headers), (peer, None));
            exchange.failed(&error);
            error.respond_to(&head.method, is_grpc(&head.headers), false).map(|body| body.reporting(exchange))
        }
    };
    // However it ends: its end was refused anyway.
    let _ = serve(Box::new(Rewind::new(bytes.freeze(), io)), http2, told, None, handle).await;
}
