//! Endpoints that are this proxy itself: handed to its inbound side in process, and never dialed.

use std::net::SocketAddr;
use std::sync::Arc;

use sheetbend_certs::MeshAlpn;
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{Resolution, Target};
use tokio::sync::mpsc;

use super::{BoxIo, EndpointState};
use crate::here::Here;
use crate::in_process;
use crate::inbound::Port;

/// A connection of this proxy to itself, at the end that the app is behind. Who is at the other end needs no proof.
pub(crate) struct Entering {
    pub(crate) io: BoxIo,
    pub(crate) port: Arc<Port>,
    /// The service port that was called, `web.default:80`.
    pub(crate) destination: Option<Arc<str>>,
    /// What a handshake would have agreed on.
    pub(crate) alpn: MeshAlpn,
}

/// One worker's way to what this proxy itself serves.
pub(crate) struct Own {
    here: Arc<Here>,
    discovery: Discovery,
    /// Weak, since the worker ends when nobody else can give it work.
    entrance: mpsc::WeakUnboundedSender<Entering>,
}

impl Own {
    pub(crate) fn new(here: Arc<Here>, discovery: Discovery, entrance: &mpsc::UnboundedSender<Entering>) -> Self {
        Self { here, discovery, entrance: entrance.downgrade() }
    }

    /// Whether a connection to `address` would only come back.
    pub(super) fn is_listener(&self, address: SocketAddr) -> bool {
        self.here.is_listener(address)
    }

    /// Whether `address` is one of the mesh's, as far as the control plane has not said otherwise: it is asked where it has
    /// said nothing.
    pub(super) async fn is_of_mesh(&self, address: SocketAddr) -> bool {
        let target = Target::from(address);
        let claimed = self.discovery.snapshot().claims(&target);
        claimed && !matches!(self.discovery.resolve(&target).await, Ok(Resolution::NotMesh))
    }

    /// A connection to the app of an endpoint, if that is the one beside this proxy.
    pub(super) fn enter(&self, endpoint: &EndpointState, alpn: MeshAlpn) -> Option<BoxIo> {
        let port = self.here.port_at(endpoint.socket_address()?)?;
        let destination = endpoint.service.as_ref().map(|(name, _)| name.to_string().into());
        let (ours, theirs) = in_process::connection();
        // Unbounded as the connections of a worker are: each is one that the app asked for.
        self.entrance.upgrade()?.send(Entering { io: Box::new(theirs), port, destination, alpn }).ok()?;
        Some(Box::new(ours))
    }
}
