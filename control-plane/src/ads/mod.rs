//! Discovery: the aggregated stream, state of the world and incremental, in three dialects.
//!
//! - `session.rs`: PURE, what one stream subscribed to and was told. `view.rs`: the mesh in one dialect's words.
//! - `pace.rs`: PURE, how often a stream may change its registration.
//! - `envoy.rs`, `grpc.rs`: what those two want to hear differently. Our own words are in the client's crate.
//!
//! A stream is one task: it waits for a request or for a new world, and says what differs.

mod envoy;
mod grpc;
mod pace;
mod session;
mod view;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use rustls::pki_types::CertificateDer;
use sheetbend_certs::{VerifiedPeer, format_time};
use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_control_plane_client::registration::Registration;
use sheetbend_control_plane_client::xds::Kind;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use self::pace::Pace;
use self::session::Excess;
pub(crate) use self::session::{Session, Told};
pub(crate) use self::view::digest;
use self::view::{Dialect, View};
use crate::listen::{Certificate, Peer, Who};
use crate::registry::{Instance, StreamId};
use crate::state::{Shared, StreamState, Worlds, stopped};
use crate::trust::{Shown, Trust};

/// Responses under way on one stream; the next change waits, and melts into those after it.
const UNDER_WAY: usize = 8;
/// How often a stream looks whether its peer's certificate still holds.
const LOOK: Duration = Duration::from_secs(5);
/// How long a peer may leave what it was told unread while more waits for it.
const READS_WITHIN: Duration = Duration::from_secs(10);
const MAX_NODE_ID: usize = 256;

/// The discovery service.
#[derive(Clone)]
pub(crate) struct Discovery {
    pub(crate) shared: Arc<Shared>,
}

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        self.open::<DiscoveryRequest>(request)
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.open::<DeltaDiscoveryRequest>(request)
    }
}

impl Discovery {
    fn open<W: Wire>(&self, request: Request<Streaming<W>>) -> Result<Response<Responses<W::Answer>>, Status> {
        let (peer, Certificate { leaf, chain }) = workload(&request)?;
        let id = self.shared.open_stream(&leaf.id)?;
        let (answers, receiver) = mpsc::channel(UNDER_WAY);
        let task = StreamTask::<W> {
            shared: self.shared.clone(),
            peer,
            leaf,
            chain,
            held_against: None,
            id,
            requests: request.into_inner(),
            answers,
            session: Session::default(),
            node: None,
            pace: Pace::default(),
            withdrew: false,
        };
        tokio::spawn(task.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// The peer of a request, if it is a workload whose certificate holds.
pub(crate) fn workload<T>(request: &Request<T>) -> Result<(Peer, Certificate), Status> {
    let peer = request.extensions().get::<Peer>().ok_or_else(|| Status::internal("a request without a peer"))?;
    match &peer.who {
        Who::Workload(certificate) => Ok((peer.clone(), certificate.clone())),
        Who::Expired { id, since } => Err(Status::unauthenticated(format!(
            "the certificate of {id} expired at {}: it is good for renewal, and for nothing else",
            format_time(*since)
        ))),
        Who::Stranger => Err(Status::unauthenticated("this needs a certificate of this mesh")),
    }
}

/// The two kinds of streams, as far as they differ.
trait Wire: Send + 'static {
    type Answer: Send + 'static;
    fn node(&self) -> Option<&Node>;
    fn type_url(&self) -> &str;
    fn error(&self) -> Option<&str>;
    fn take_in(self, kind: Kind, session: &mut Session, view: &View<'_>) -> Result<Vec<Self::Answer>, Excess>;
    fn changes(session: &mut Session, view: &View<'_>) -> Vec<Self::Answer>;
}

impl Wire for DeltaDiscoveryRequest {
    type Answer = DeltaDiscoveryResponse;
    fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }
    fn type_url(&self) -> &str {
        &self.type_url
    }
    fn error(&self) -> Option<&str> {
        self.error_detail.as_ref().map(|e| e.message.as_str())
    }
    fn take_in(self, kind: Kind, session: &mut Session, view: &View<'_>) -> Result<Vec<Self::Answer>, Excess> {
        session.on_delta(kind, self, view)
    }
    fn changes(session: &mut Session, view: &View<'_>) -> Vec<Self::Answer> {
        session.changes_delta(view)
    }
}

impl Wire for DiscoveryRequest {
    type Answer = DiscoveryResponse;
    fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }
    fn type_url(&self) -> &str {
        &self.type_url
    }
    fn error(&self) -> Option<&str> {
        self.error_detail.as_ref().map(|e| e.message.as_str())
    }
    fn take_in(self, kind: Kind, session: &mut Session, view: &View<'_>) -> Result<Vec<Self::Answer>, Excess> {
        Ok(session.on_world(kind, self, view)?.into_iter().collect())
    }
    fn changes(session: &mut Session, view: &View<'_>) -> Vec<Self::Answer> {
        session.changes_world(view)
    }
}

/// Who is at the other end, once it has said so.
struct Named {
    instance: Instance,
    dialect: Dialect,
    /// Whether loopback addresses mean the same to it as to us.
    near: bool,
}

struct StreamTask<W: Wire> {
    shared: Arc<Shared>,
    peer: Peer,
    leaf: VerifiedPeer,
    chain: Arc<[CertificateDer<'static>]>,
    /// The roots that the chain was last held against, if it was since the handshake.
    held_against: Option<Arc<Trust>>,
    id: StreamId,
    requests: Streaming<W>,
    answers: mpsc::Sender<Result<W::Answer, Status>>,
    session: Session,
    node: Option<Named>,
    pace: Pace,
    /// It withdrew what it served: it is about to end, and nothing of it is left to wait for.
    withdrew: bool,
}

impl<W: Wire> StreamTask<W> {
    async fn run(mut self) {
        let ended = self.serve().await;
        self.shared.close_stream(self.id);
        if let Some(node) = &self.node {
            self.shared.note_silence(&node.instance);
        }
        // A stream that ends in peace, or after a withdrawal, was said goodbye to: when roots change, nobody waits for it.
        if let Some(node) = self.node.as_ref().filter(|_| ended.is_ok() || self.withdrew) {
            self.shared.goodbye(&node.instance, self.id);
        }
        if let Err(status) = ended {
            tracing::debug!(peer = %self.leaf.id, code = ?status.code(), reason = status.message(), "a stream ended");
            // Nobody listens any more if the peer is gone.
            let _ = self.answers.try_send(Err(status));
        }
    }

    async fn serve(&mut self) -> Result<(), Status> {
        let mut worlds = self.shared.worlds();
        let mut stopping = self.shared.stopping();
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // In no order. Losing a branch is safe: a request stays in its stream, a change in its channel.
            tokio::select! {
                request = self.requests.next() => match request {
                    Some(request) => {
                        let now = worlds.borrow().clone();
                        self.on_request(request?, &now).await?;
                    }
                    None => return Ok(()),
                },
                Ok(()) = worlds.changed() => {
                    let now = worlds.borrow_and_update().clone();
                    self.check_leaf(&now.trust)?;
                    let changes = self.view(&now).map(|(session, view)| W::changes(session, &view));
                    self.answer(changes.unwrap_or_default()).await?;
                }
                _ = look.tick() => {
                    let now = worlds.borrow().clone();
                    self.check_leaf(&now.trust)?;
                }
                () = stopped(&mut stopping) => return Err(Status::unavailable("the control plane is stopping")),
            }
        }
    }

    async fn on_request(&mut self, request: W, now: &Worlds) -> Result<(), Status> {
        if let Some(node) = request.node() {
            let registration = Registration::of_node(node).map_err(|e| Status::invalid_argument(e.to_string()))?;
            self.name(node)?;
            if let Some(registration) = registration {
                self.register(registration).await?;
            }
        }
        if self.node.is_none() {
            return Err(Status::invalid_argument("the first request of a stream names no node"));
        }
        // Kinds that we have no word for are never answered, as xDS wants it.
        let Some(kind) = Kind::of_type_url(request.type_url()) else { return Ok(()) };
        if let Some(error) = request.error() {
            let error: String = error.chars().take(500).collect();
            tracing::warn!(peer = %self.leaf.id, ?kind, %error, "a proxy refused what it was told");
        }
        let answers = match self.view(now) {
            Some((session, view)) => request.take_in(kind, session, &view),
            None => Ok(Vec::new()),
        };
        let answers = answers.map_err(|excess| Status::resource_exhausted(excess.to_string()))?;
        self.note(kind);
        self.answer(answers).await
    }

    /// A node may say who it is more than once, but never become another one.
    fn name(&mut self, node: &Node) -> Result<(), Status> {
        if node.id.len() > MAX_NODE_ID {
            return Err(Status::invalid_argument(format!(
                "a node id of {} bytes; {MAX_NODE_ID} are the most",
                node.id.len()
            )));
        }
        match &self.node {
            Some(named) if *named.instance.node != *node.id => {
                Err(Status::invalid_argument("a stream's node cannot change its id"))
            }
            Some(_) => Ok(()),
            None => {
                let instance = Instance { identity: self.leaf.id.clone(), node: node.id.as_str().into() };
                let dialect = Dialect::of(node);
                let near = self.peer.address.ip().is_loopback();
                let state = StreamState::new(instance.clone(), dialect.name(), self.peer.address);
                self.shared.name_stream(self.id, state);
                self.node = Some(Named { instance, dialect, near });
                self.note_roots();
                Ok(())
            }
        }
    }

    async fn register(&mut self, registration: Registration) -> Result<(), Status> {
        let Some(node) = &self.node else { return Ok(()) };
        self.withdrew = registration.ports.is_empty();
        let peer = self.peer.address.ip();
        for address in registration.also.iter().chain([&registration.address]) {
            self.shared.may_register(*address, peer).map_err(Status::permission_denied)?;
        }
        if self.shared.knows(&node.instance, &registration, self.id) {
            return Ok(());
        }
        let wait = self.pace.turn(Instant::now());
        // Not waiting at all: the timer's shortest wait is a millisecond.
        if !wait.is_zero() {
            sleep(wait).await;
        }
        let registered = self.shared.register(node.instance.clone(), registration, self.id, self.peer.last.clone());
        registered.map_err(|error| Status::resource_exhausted(error.to_string()))
    }

    fn view<'a>(&'a mut self, now: &'a Worlds) -> Option<(&'a mut Session, View<'a>)> {
        let node = self.node.as_ref()?;
        let view = View {
            dialect: &node.dialect,
            namespace: self.leaf.id.workload().map_or("default", |(namespace, _)| namespace),
            service: self
                .leaf
                .id
                .workload()
                .map(|(namespace, service)| ServiceName { service: service.into(), namespace: namespace.into() }),
            world: if node.near { &now.near } else { &now.far },
            trust: &now.trust,
            number: now.number,
        };
        Some((&mut self.session, view))
    }

    /// Keeps the admin's picture, and who holds which roots.
    fn note(&self, kind: Kind) {
        if self.node.is_none() {
            return;
        }
        self.shared.note_stream(self.id, kind, &self.session);
        if kind == Kind::Secret {
            self.note_roots();
        }
    }

    /// From the first request on: even a peer that never asks for the bundle shows a certificate.
    fn note_roots(&self) {
        let Some(node) = &self.node else { return };
        // Ours always ask; of others it shows when they do.
        let asks = node.dialect == Dialect::Sheetbend || self.session.asks_for(Kind::Secret);
        let version = self.session.holds_roots.as_deref();
        self.shared.note_roots(&node.instance, &Shown { stream: self.id, leaf: &self.leaf, asks, version });
    }

    /// A stream must not outlive what it rests on, and what that is, is asked anew of other roots: a leaf below the newest
    /// one was held against those before it, if it came before we had heard of a rotation.
    fn check_leaf(&mut self, trust: &Arc<Trust>) -> Result<(), Status> {
        let now = SystemTime::now();
        if now > self.leaf.not_after {
            return Err(Status::unauthenticated(
                "the certificate of this connection has expired; connect with its successor",
            ));
        }
        if self.held_against.as_ref().is_some_and(|former| Arc::ptr_eq(former, trust)) {
            return Ok(());
        }
        let leaf = trust.bundle.verify(&self.chain, now).map_err(|error| {
            Status::unauthenticated(format!("the certificate of this connection is no longer trusted: {error}"))
        })?;
        self.held_against = Some(trust.clone());
        if leaf != self.leaf {
            self.leaf = leaf;
            self.note_roots();
        }
        Ok(())
    }

    async fn answer(&mut self, answers: Vec<W::Answer>) -> Result<(), Status> {
        tell(&self.answers, answers, READS_WITHIN).await
    }
}

/// A reader that does not read holds up its own stream alone, and that not for long: while it does, nobody looks
/// whether its certificate still holds.
async fn tell<T>(to: &mpsc::Sender<Result<T, Status>>, answers: Vec<T>, within: Duration) -> Result<(), Status> {
    for answer in answers {
        let told = timeout(within, to.send(Ok(answer))).await;
        let told = told.map_err(|_| Status::deadline_exceeded("the peer does not read what it is told"))?;
        told.map_err(|_| Status::cancelled("the peer is gone"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_stops_reading_loses_its_stream() {
        let (to, mut reader) = mpsc::channel(UNDER_WAY);
        let full = vec![(); UNDER_WAY];
        tell(&to, full, Duration::from_secs(60)).await.unwrap();
        let ended = tell(&to, vec![()], Duration::from_millis(20)).await.unwrap_err();
        assert!(ended.message().contains("does not read"), "{ended}");
        reader.recv().await.unwrap().unwrap();
        tell(&to, vec![()], Duration::from_secs(60)).await.unwrap();
    }
}
