//! An edge of the service graph as one side of it sees it, and what a request does to it.
//!
//! [`Edge::request`] is on the way of every request: a dozen relaxed atomic additions, no lock, no allocation, no
//! hashing of labels. Readers (the graph, the report, `/metrics`) take what the atomics say at the time; a request that
//! is being counted meanwhile may be in one number and not yet in another.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::graph::buckets;
pub use sheetbend_control_plane_client::graph::{Protocol, Reporter};

use super::Flags;
use super::labels::{self, Code};
use super::series::{Labels, Requests, Series, Tcp};

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
    series: Arc<Series>,
    labels: Labels,
    tcp: Option<Arc<Tcp>>,
    codes: [Slot; CODES],
    overflow: OnceLock<Arc<Requests>>,
}

/// Kinds of outcome (status, gRPC status, flags) an edge tells apart; any further one counts as overflow.
const CODES: usize = 16;

/// An outcome's kind and its series. A slot is claimed once, by setting `code`, and never given up. Between that and the
/// setting of `series` another thread asks the table of all series, and is given the same.
#[derive(Default)]
struct Slot {
    code: AtomicU64,
    series: OnceLock<Arc<Requests>>,
}

/// What happened on an edge since it was first seen. Every number only grows.
pub(super) struct Totals {
    pub(super) requests: AtomicU64,
    pub(super) errors: AtomicU64,
    /// From source to destination, whichever end this proxy is.
    pub(super) bytes_sent: AtomicU64,
    /// From destination to source.
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
    pub(super) fn new(key: EdgeKey, own: &SpiffeId, series: Arc<Series>) -> Self {
        let labels = labels::of_edge(&key, own);
        let tcp = (key.protocol == Protocol::Tcp).then(|| {
            let mut labels = labels.clone();
            labels.push(("response_flags", "-".to_string()));
            series.tcp(labels)
        });
        let codes = std::array::from_fn(|_| Slot::default());
        Self { key, totals: Totals::new(), series, labels, tcp, codes, overflow: OnceLock::new() }
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
        totals.bytes_sent.fetch_add(outcome.request_bytes, Relaxed);
        totals.bytes_received.fetch_add(outcome.response_bytes, Relaxed);
        self.record(outcome);
    }

    fn record(&self, outcome: &Outcome) {
        let code = Code::new(outcome.status, outcome.grpc_status, outcome.flags);
        for slot in &self.codes {
            let taken = slot.code.load(Acquire);
            if taken == code.0 {
                match slot.series.get() {
                    Some(series) => series.record(outcome),
                    None => self.resolve(code, outcome.flags).record(outcome),
                }
                return;
            }
            if taken != 0 {
                continue;
            }
            // The first of its kind on this edge: the one time that labels are made and looked up.
            match slot.code.compare_exchange(0, code.0, Acquire, Acquire) {
                Ok(_) => slot.series.get_or_init(|| self.resolve(code, outcome.flags)).record(outcome),
                Err(other) if other == code.0 => self.resolve(code, outcome.flags).record(outcome),
                Err(_) => continue,
            }
            return;
        }
        self.overflow.get_or_init(|| self.series.overflow(labels::reporter(self.key.reporter))).record(outcome);
    }

    fn resolve(&self, code: Code, flags: Flags) -> Arc<Requests> {
        let mut labels = self.labels.clone();
        labels.extend(code.labels(flags));
        self.series.requests(labels)
    }

    /// Counts bytes outside any request: of an opaque connection, or of a tunnel after its upgrade.
    ///
    /// `sent` went from this proxy's side of the edge to the other.
    pub fn bytes(&self, sent: u64, received: u64) {
        let (to_destination, to_source) = match self.key.reporter {
            Reporter::Source => (sent, received),
            Reporter::Destination => (received, sent),
        };
        self.totals.bytes_sent.fetch_add(to_destination, Relaxed);
        self.totals.bytes_received.fetch_add(to_source, Relaxed);
        if let Some(tcp) = &self.tcp {
            // Istio names them as the destination sees them.
            tcp.received.increment(to_destination);
            tcp.sent.increment(to_source);
        }
    }

    /// Counts a connection as open until the guard is dropped. For opaque TCP; HTTP counts requests.
    pub fn connection(self: &Arc<Self>) -> ConnectionGuard {
        self.totals.connections_opened.fetch_add(1, Relaxed);
        if let Some(tcp) = &self.tcp {
            tcp.opened.increment(1);
        }
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
        if let Some(tcp) = &self.edge.tcp {
            tcp.closed.increment(1);
        }
    }
}
