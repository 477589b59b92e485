//! The HTTP connections of one worker: shared HTTP/2 between our proxies, kept HTTP/1.1 elsewhere.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use sheetbend_certs::{IdentityStore, MeshAlpn};

use super::{DialError, EndpointState, Own, dial};
use crate::http::body::RequestBody;
use crate::http::error::{Processed, h2_error};
use crate::telemetry::{Counter, Telemetry};

/// Streams on one shared connection before another is dialed: 80 % of the 128 that our proxies allow.
const FULL: usize = 128 * 80 / 100;
/// Shared connections to one endpoint that one worker keeps though nothing is under way on them. While something is,
/// there are as many as it takes: a request that waits for another's stream would be coupled to a stranger.
const IDLE_SHARED: usize = 2;
/// Kept connections to one endpoint, for one worker.
const MOST_KEPT: usize = 64;
/// How long a kept connection is trusted to be open at the other end.
const KEPT_FOR: Duration = Duration::from_secs(3);
/// A stream's window, a small part of its connection's: no reader who stops starves another.
pub(crate) const STREAM_WINDOW: u32 = 512 * 1024;
/// A connection's window: 128 streams of 512 KiB.
pub(crate) const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;
/// What we take in one frame. A 1 MiB answer costs a tenth less CPU than in frames of 16 KiB, and a frame of this size
/// still keeps others on the connection waiting for far less than a millisecond.
pub(crate) const FRAME: u32 = 256 * 1024;
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
    /// Sends a request and waits for the head of its answer.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, SendError> {
        let failed = match self {
            Self::Http2(sender) => sender.try_send_request(request).await,
            Self::Http1(sender) => sender.try_send_request(request).await,
        };
        failed.map_err(|mut failed| {
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

#[derive(Default)]
struct Connections {
    shared: Vec<(http2::SendRequest<RequestBody>, Arc<AtomicUsize>)>,
    kept: Vec<(http1::SendRequest<RequestBody>, Instant)>,
    /// Held while a shared connection is dialed, so that a burst does not dial one each.
    dialing: Arc<tokio::sync::Mutex<()>>,
}

type Key = (u64, Wire);

/// The connections of one worker. The lock is never contended: one thread uses it.
pub struct Pool {
    connections: Mutex<HashMap<Key, Connections>>,
    /// What this proxy itself serves.
    pub(crate) own: Own,
}

/// One use of a connection.
pub struct Checkout {
    pool: Arc<Pool>,
    endpoint: Arc<EndpointState>,
    /// Taken back only when the exchange ended well.
    sender: Option<http1::SendRequest<RequestBody>>,
    streams: Option<Arc<AtomicUsize>>,
}

impl Checkout {
    /// The exchange has ended well: the connection may serve another.
    pub fn give_back(mut self) {
        if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
            let mut all = self.pool.connections.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = &mut all.entry(key(&self.endpoint, Wire::Http1)).or_default().kept;
            if kept.len() < MOST_KEPT {
                kept.push((sender, Instant::now()));
            }
        }
    }

    /// Keeps the sender of an HTTP/1.1 connection until the answer has been read.
    pub fn holding(mut self, sender: Sender) -> Self {
        if let Sender::Http1(sender) = sender {
            self.sender = Some(sender);
        }
        self
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        if let Some(streams) = &self.streams {
            streams.fetch_sub(1, Relaxed);
        }
        self.endpoint.load.end();
    }
}

fn key(endpoint: &Arc<EndpointState>, wire: Wire) -> Key {
    (endpoint.number, wire)
}

impl Pool {
    /// Without a connection yet.
    pub(crate) fn new(own: Own) -> Self {
        Self { connections: Mutex::default(), own }
    }

    /// A connection to `endpoint`, kept or new. `fresh` asks for one on which nothing was sent before.
    pub async fn checkout(
        self: &Arc<Self>,
        endpoint: &Arc<EndpointState>,
        wire: Wire,
        fresh: bool,
        identity: &IdentityStore,
        telemetry: &Telemetry,
    ) -> Result<(Sender, Checkout), DialError> {
        endpoint.load.begin();
        let mut checkout =
            Checkout { pool: Arc::clone(self), endpoint: Arc::clone(endpoint), sender: None, streams: None };
        self.sweep();
        if wire == Wire::Http1 {
            let kept = if fresh { None } else { self.take_kept(endpoint) };
            let sender = match kept {
                Some(sender) => sender,
                None => connect_h1(dial(endpoint, MeshAlpn::Http1, identity, telemetry, &self.own).await?).await?,
            };
            return Ok((Sender::Http1(sender), checkout));
        }
        if let Some((sender, streams)) = self.take_shared(endpoint) {
            checkout.streams = Some(streams);
            return Ok((Sender::Http2(sender), checkout));
        }
        let dialing = {
            let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&all.entry(key(endpoint, wire)).or_default().dialing)
        };
        let _turn = dialing.lock().await;
        // Whoever had the turn before may have dialed what serves us too.
        if let Some((sender, streams)) = self.take_shared(endpoint) {
            checkout.streams = Some(streams);
            return Ok((Sender::Http2(sender), checkout));
        }
        let sender =
            connect_h2(dial(endpoint, MeshAlpn::H2, identity, telemetry, &self.own).await?, endpoint.is_ours()).await?;
        let streams = Arc::new(AtomicUsize::new(1));
        checkout.streams = Some(Arc::clone(&streams));
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(key(endpoint, wire)).or_default().shared.push((sender.clone(), streams));
        Ok((Sender::Http2(sender), checkout))
    }

    /// Lets go of endpoints that are gone, once there are many.
    fn sweep(&self) {
        const MANY: usize = 1024;
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MANY {
            all.retain(|_, connections| {
                connections.kept.retain(|(sender, since)| !sender.is_closed() && since.elapsed() < KEPT_FOR);
                connections.shared.retain(|(sender, _)| !sender.is_closed());
                !connections.kept.is_empty() || !connections.shared.is_empty()
            });
        }
    }

    fn take_kept(&self, endpoint: &Arc<EndpointState>) -> Option<http1::SendRequest<RequestBody>> {
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = &mut all.get_mut(&key(endpoint, Wire::Http1))?.kept;
        kept.retain(|(sender, since)| sender.is_ready() && since.elapsed() < KEPT_FOR);
        // The one used last is the likeliest to be open still.
        kept.pop().map(|(sender, _)| sender)
    }

    /// The shared connection with the fewest streams, if it has room.
    fn take_shared(
        &self,
        endpoint: &Arc<EndpointState>,
    ) -> Option<(http2::SendRequest<RequestBody>, Arc<AtomicUsize>)> {
        let mut all = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &mut all.get_mut(&key(endpoint, Wire::Http2))?.shared;
        let mut idle = 0;
        shared.retain(|(sender, streams)| {
            idle += usize::from(streams.load(Relaxed) == 0);
            !sender.is_closed() && (streams.load(Relaxed) > 0 || idle <= IDLE_SHARED)
        });
        let (sender, streams) = shared.iter().min_by_key(|(_, streams)| streams.load(Relaxed))?;
        if streams.load(Relaxed) >= FULL {
            return None;
        }
        streams.fetch_add(1, Relaxed);
        Some((sender.clone(), Arc::clone(streams)))
    }
}

pub(crate) async fn connect_h1(io: super::BoxIo) -> Result<http1::SendRequest<RequestBody>, DialError> {
    let (sender, connection) =
        http1::Builder::new().max_headers(100).handshake(TokioIo::new(io)).await.map_err(DialError::Http)?;
    tokio::spawn(async move {
        // Its end is told to whoever has a request on it.
        let _ = connection.with_upgrades().await;
    });
    Ok(sender)
}

pub(crate) async fn connect_h2(io: super::BoxIo, ours: bool) -> Result<http2::SendRequest<RequestBody>, DialError> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_header_list_size(HEADERS)
        .max_send_buf_size(STREAM_WINDOW as usize);
    if ours {
        // gRPC servers punish pings; our own proxies do not.
        builder.keep_alive_interval(Duration::from_secs(10)).keep_alive_timeout(Duration::from_secs(10));
    }
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(DialError::Http)?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(sender)
}
