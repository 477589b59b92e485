//! An edge of the service graph as one side of it sees it, and what a request does to it.
//!
//! [`Edge::request`] is on the way of every request: a dozen relaxed atomic additions, no lock, no allocation, no
//! hashing of labels. Readers (the graph, the report, `/metrics`) take what the atomics say at the time; a request that
//! is being counted meanwhile may be in one number and not yet in another.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::graph::buckets;
pub use sheetbend_control_plane_client::graph::{Protocol, Reporter};

use super::Flags;

/// The other end of an edge.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// Mutual TLS showed who it is.
    Known(SpiffeId),
    /// Nobody showed a certificate.
    Unknown,
}

impl From<Option<SpiffeId>> for Peer {
    fn from(id: Option<SpiffeId>) -> Self {
        id.map_or(Self::Unknown, Self::Known)
    }
}

/// What tells one edge of this proxy from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EdgeKey {
    /// Which end this proxy is.
    pub reporter: Reporter,
    /// The other end: for the source the workload it calls, for the destination its caller.
    pub peer: Peer,
    /// What is called: `web.default:8000`, or `external`.
    pub destination: Arc<str>,
    /// What it speaks.
    pub protocol: Protocol,
    /// Whether mutual TLS holds.
    pub mtls: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The response's status, or 0 when there was none.
    pub status: u16,
    /// `grpc-status` of a gRPC call, from trailers or headers.
    pub grpc_status: Option<u16>,
    /// From the first byte of the request's head to the last of the response.
    pub latency: Duration,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the response's body.
    pub response_bytes: u64,
    /// Why the response is what it is.
    pub flags: Flags,
}

impl Outcome {
    /// Whether the request failed by the destination's doing or on the way to it.
    ///
    /// gRPC codes as OpenTelemetry's conventions for servers count them: UNKNOWN (2), DEADLINE_EXCEEDED (4),
    /// UNIMPLEMENTED (12), INTERNAL (13), UNAVAILABLE (14), DATA_LOSS (15).
    pub fn is_error(&self) -> bool {
        self.status >= 500
            || self.flags.is_failure()
            || (self.status == 0 && self.flags.is_empty())
            || matches!(self.grpc_status, Some(2 | 4 | 12 | 13 | 14 | 15))
    }
}

/// One edge, shared by all that count on it.
pub struct Edge {
    pub(super) key: EdgeKey,
    pub(super) totals: Totals,
}

/// What happened on an edge since it was first seen. Every number only grows.
pub(super) struct Totals {
    pub(super) requests: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    pub(super) connections_opened: AtomicU64,
    pub(super) connections_closed: AtomicU64,
    /// 240 buckets × 8 B: 2 KiB an edge, 1 MiB for all that a proxy may have.
    pub(super) latency: Box<[AtomicU64; buckets::COUNT]>,
}

impl Totals {
    fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            connections_opened: AtomicU64::new(0),
            connections_closed: AtomicU64::new(0),
            latency: Box::new([const { AtomicU64::new(0) }; buckets::COUNT]),
        }
    }
}

impl Edge {
    pub(super) fn new(key: EdgeKey) -> Self {
        Self { key, totals: Totals::new() }
    }

    /// What tells this edge from others. The one that stands in for too many has the destination `other`.
    pub fn key(&self) -> &EdgeKey {
        &self.key
    }

    /// Counts a request that has ended.
    pub fn request(&self, outcome: &Outcome) {
        let totals = &self.totals;
        totals.requests.fetch_add(1, Relaxed);
        if outcome.is_error() {
            totals.errors.fetch_add(1, Relaxed);
        }
        if let Some(bucket) = totals.latency.get(buckets::index(outcome.latency)) {
            bucket.fetch_add(1, Relaxed);
        }
        let (sent, received) = match self.key.reporter {
            Reporter::Source => (outcome.request_bytes, outcome.response_bytes),
            Reporter::Destination => (outcome.response_bytes, outcome.request_bytes),
        };
        totals.bytes_sent.fetch_add(sent, Relaxed);
        totals.bytes_received.fetch_add(received, Relaxed);
    }

    /// Counts bytes outside any request: of an opaque connection, or of a tunnel after its upgrade.
    ///
    /// `sent` went from this proxy's side of the edge to the other.
    pub fn bytes(&self, sent: u64, received: u64) {
        self.totals.bytes_sent.fetch_add(sent, Relaxed);
        self.totals.bytes_received.fetch_add(received, Relaxed);
    }

    /// Counts a connection as open until the guard is dropped. For opaque TCP; HTTP counts requests.
    pub fn connection(self: &Arc<Self>) -> ConnectionGuard {
        self.totals.connections_opened.fetch_add(1, Relaxed);
        ConnectionGuard { edge: Arc::clone(self) }
    }

    /// Counts a connection that could not be made, or that broke. For opaque TCP; HTTP says it by [`Edge::request`].
    pub fn connection_failed(&self) {
        self.totals.errors.fetch_add(1, Relaxed);
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Edge").field("key", &self.key).finish_non_exhaustive()
    }
}

/// A connection on an edge: opened when it is made, closed when it is dropped.
#[derive(Debug)]
pub struct ConnectionGuard {
    edge: Arc<Edge>,
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.edge.totals.connections_closed.fetch_add(1, Relaxed);
    }
}
