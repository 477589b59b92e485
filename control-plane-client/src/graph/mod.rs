//! The service graph: who calls whom, how often, how well, and whether mutual TLS holds.
//!
//! A proxy keeps the edges it sees and reports what was added every 5 s ([`crate::proto::v1::EdgeReport`]); the control
//! plane merges the reports into a [`MergedGraph`]. A proxy's own graph is one too, with itself as the only reporter.
//! What either of them shows is a [`Graph`], as JSON (the types here are its schema), DOT, Mermaid, a table, or drawn
//! live by a page.
//!
//! - [`buckets`]: the fixed buckets of latencies.
//! - `window`: counts since the start and over the last minute. PURE: time is an argument.
//! - `merge`: reports in, a graph out. PURE.
//! - `render`: a graph as text. `page`: a graph over HTTP.

pub mod buckets;
mod merge;
mod page;
mod render;
mod union;
mod window;

use serde::{Deserialize, Serialize};

pub use merge::{Arrival, MAX_EDGES, MergedGraph};
pub use page::{Format, UnknownFormat, body, content_security_policy};
pub use render::{dot, json, mermaid, table};
pub use window::Totals;

/// Which end of an edge tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporter {
    /// The caller's proxy.
    Source,
    /// The proxy of the one who is called.
    Destination,
}

/// What an edge speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1 (and 1.0).
    Http,
    /// HTTP/2 that is not gRPC.
    Http2,
    /// gRPC.
    Grpc,
    /// Bytes nobody looks into.
    Tcp,
}

impl Protocol {
    /// `http`, `http2`, `grpc` or `tcp`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }

    /// The protocol of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Http, Self::Http2, Self::Grpc, Self::Tcp].into_iter().find(|p| p.as_str() == name)
    }
}

/// The graph at one moment. Its JSON is stable: fields are added, never renamed or removed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    /// Whose view it is: `mesh`, or the name of one proxy's workload.
    pub scope: String,
    /// How long the one who shows it has been counting, in seconds: what `since_start` covers.
    pub uptime_seconds: f64,
    /// Every name that an edge mentions, in the order of their names.
    pub nodes: Vec<Node>,
    /// Who calls whom, ordered by source, destination, port and protocol.
    pub edges: Vec<Edge>,
}

/// A service, or something that is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// `web.default`; what edges call it.
    pub id: String,
    /// What it is.
    pub kind: NodeKind,
    /// Its SPIFFE id, where a certificate showed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
}

/// What a node stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// A service or workload of the mesh.
    Service,
    /// Callers that showed no certificate.
    Unknown,
    /// Whatever is called outside the mesh.
    External,
    /// Stands in for what no longer fits.
    Other,
}

/// Calls of one service port by one caller, in one protocol.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Edge {
    /// The caller: a node's id.
    pub source: String,
    /// The service called: a node's id.
    pub destination: String,
    /// The service's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What is spoken.
    pub protocol: Protocol,
    /// Whether all of it was under mutual TLS (over the last minute, or ever if the last minute was quiet).
    pub mtls: bool,
    /// Whose numbers these are: the source's wherever it reports, otherwise the destination's. Never a sum of both.
    pub reporter: Reporter,
    /// Connections open now; opaque TCP and tunnels only.
    pub open_connections: u64,
    /// The last minute.
    pub last_minute: Figures,
    /// Since the one who shows the graph began to count.
    pub since_start: Figures,
    /// What the destination saw of the same edge, beside the source's numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_destination: Option<Seen>,
}

/// One end's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The last minute.
    pub last_minute: Figures,
    /// Since the one who shows the graph began to count.
    pub since_start: Figures,
}

/// Numbers of an edge over a stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// How long the stretch is.
    pub seconds: f64,
    /// Requests that ended. Opaque TCP has none.
    pub requests: u64,
    /// Connections opened; opaque TCP and tunnels only.
    pub connections: u64,
    /// Requests or connections that failed.
    pub errors: u64,
    /// Requests a second; for opaque TCP, connections a second.
    pub rate: f64,
    /// Errors among requests (for opaque TCP, among connections tried): 0 to 1.
    pub error_rate: f64,
    /// Half of the requests took no longer, in milliseconds; exact to 1/16.
    pub p50_ms: Option<f64>,
    /// Nine tenths of the requests took no longer.
    pub p90_ms: Option<f64>,
    /// All but one in a hundred took no longer.
    pub p99_ms: Option<f64>,
    /// Bytes from source to destination.
    pub bytes_sent: u64,
    /// Bytes from destination to source.
    pub bytes_received: u64,
}
