//! What a proxy says to a control plane, and what it makes of the answers.
//!
//! - [`model`]: destinations, clusters and endpoints as a proxy uses them. Whatever the wire said, a value of
//!   these types is already checked.
//! - [`xds`]: the model to and from xDS, our dialect of it.
//! - [`identity`]: the first certificate, and all that follow it.
//! - [`discovery`]: what a target stands for, asked on demand and kept up to date.
//! - [`channel`], [`backoff`]: how the control plane is reached, and how long to wait when it is not.
//! - [`registration`]: what a proxy says of itself.
//! - [`admin_http`]: the server behind admin ports, and the client that asks one.
//! - [`graph`]: the edges of the service graph, merged and shown.
//! - [`report`]: what edges this proxy saw, told every 5 s.
//! - [`logging`]: the log filter that an operator changes while a process runs.
//! - [`local`]: how processes of one user find their own control plane.
//! - [`proto`]: the generated messages and gRPC stubs of our own services.

pub mod admin_http;
pub mod backoff;
pub mod channel;
pub mod discovery;
pub mod graph;
pub mod identity;
pub mod local;
pub mod logging;
pub mod model;
pub mod registration;
pub mod report;
pub mod xds;

/// Generated messages and gRPC stubs.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod proto {
    /// `istio.v1.auth`: the certificate service.
    pub mod ca {
        tonic::include_proto!("istio.v1.auth");
    }
    /// `sheetbend.v1`: reports and the local join service.
    pub mod v1 {
        tonic::include_proto!("sheetbend.v1");
    }
}
