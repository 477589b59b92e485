//! The Sheetbend dialect of xDS v3, both ways.
//!
//! | resource | name | says |
//! |---|---|---|
//! | Listener | the target, `web:80` | which service port it is; its routes, its cluster for opaque bytes, or both; or rules for whole connections |
//! | RouteConfiguration | the service port, `web.default:8000` | the HTTP rules, and last the default cluster |
//! | Cluster | `web.default:8000` | the service port behind it; TLS for peers that are not ours |
//! | ClusterLoadAssignment | the cluster's name | endpoints, with identity and transport in their metadata |
//! | Listener | [`MESH`] | the mesh's trust domain, address ranges and domains |
//! | Listener | [`INBOUND`] | what holds for those who call the service beside the proxy |
//! | Secret | [`ROOT_CA`] | the trust bundle |
//!
//! What xDS has no word for is a `google.protobuf.Struct` under [`WORDS`], in `typed_filter_metadata` of a Listener and
//! in `filter_metadata` elsewhere. A target that is not in the mesh is a Listener in `removed_resources`.
//!
//! [`encode`] is what the control plane says, [`decode`] what a proxy makes of it. Decoding trusts nothing: what does
//! not fit is a [`DecodeError`], which the stream sends back as a refusal while the last good resource stays.

mod balancing;
mod connections;
pub mod decode;
pub mod encode;
mod error;
mod filters;
mod limits;
pub mod metadata;
mod outlier;
#[cfg(test)]
mod round_trip;
mod routes;
mod words;

pub use error::DecodeError;
pub(crate) use error::shown;
pub use routes::{MAX_BACKENDS, MAX_ROUTES};

/// Under which name our own words stand in any metadata.
pub const WORDS: &str = "sheetbend.io";
/// The Listener that tells what the mesh is.
pub const MESH: &str = "sheetbend.io/mesh";
/// The Listener that tells what holds for those who call the service beside the proxy that asks.
pub const INBOUND: &str = "sheetbend.io/inbound";
/// The Secret that holds the trust bundle.
pub const ROOT_CA: &str = "ROOTCA";
/// The Secret under which a foreign Envoy is told its own certificate, from its own bootstrap.
pub const OWN_CERTIFICATE: &str = "default";

/// The kinds of resources on our stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Trust bundles.
    Secret,
    /// Targets.
    Listener,
    /// HTTP rules.
    Routes,
    /// Clusters.
    Cluster,
    /// Endpoints.
    Endpoints,
}

impl Kind {
    /// All of them, in the order in which subscriptions are sent.
    pub const ALL: [Self; 5] = [Self::Secret, Self::Listener, Self::Routes, Self::Cluster, Self::Endpoints];

    /// `type.googleapis.com/…`.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Routes => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
        }
    }

    /// The kind with this type URL, if it is one of ours.
    pub fn of_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }
}
