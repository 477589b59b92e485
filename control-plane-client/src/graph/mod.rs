//! The service graph: who calls whom, how often, how well, and whether mutual TLS holds.
//!
//! A proxy keeps the edges it sees and reports what was added every 5 s ([`crate::proto::v1::EdgeReport`]); the control
//! plane merges the reports. Both show their graph in the same ways.

pub mod buckets;

use serde::{Deserialize, Serialize};

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
