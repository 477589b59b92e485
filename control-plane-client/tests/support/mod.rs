//! A control plane that says exactly what a test tells it to say.
#![allow(dead_code, unreachable_pub)]

pub mod authority;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use sheetbend_control_plane_client::channel::Connector;
use sheetbend_control_plane_client::discovery::{Discovery, DiscoveryConfig, NodeInfo, Unresolved};
use sheetbend_control_plane_client::model::*;
use sheetbend_control_plane_client::registration::Registration;
use sheetbend_control_plane_client::xds::{Kind, MESH, encode};
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here takes longer than this unless it hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The fake. Dropping it kills it.
pub struct Fake {
    pub address: SocketAddr,
    streams: mpsc::Receiver<Conn>,
    server: JoinHandle<()>,
}

/// One discovery stream, seen from the control plane.
pub struct Conn {
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    /// The node of the first request.
    pub node: Option<envoy_types::pb::envoy::config::core::v3::Node>,
    nonces: u64,
}

struct Service(mpsc::Sender<Conn>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state of the world"))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (responses, outgoing) = mpsc::channel(16);
        let conn = Conn { requests: request.into_inner(), responses, node: None, nonces: 0 };
        self.0.send(conn).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// The fake's discovery service alone; its streams come out of the other end of `accepted`.
pub fn discovery_service(
    accepted: mpsc::Sender<Conn>,
) -> AggregatedDiscoveryServiceServer<impl AggregatedDiscoveryService> {
    AggregatedDiscoveryServiceServer::new(Service(accepted))
}

impl Fake {
    pub async fn start() -> Self {
        Self::on("127.0.0.1:0".parse().unwrap()).await
    }

    /// On a port that may just have been another fake's: see [`port`].
    pub async fn on(address: SocketAddr) -> Self {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4().unwrap(),
            SocketAddr::V6(_) => TcpSocket::new_v6().unwrap(),
        };
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        let listener = socket.listen(16).unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, streams) = mpsc::channel(16);
        let server = tonic::transport::Server::builder().add_service(discovery_service(accepted));
        let server = tokio::spawn(async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Self { address, streams, server }
    }

    /// The next stream that a proxy opens.
    pub async fn stream(&mut self) -> Conn {
        within(self.streams.recv()).await.expect("the server lives")
    }

    /// Discovery against this fake, on a task of its own.
    pub fn discovery(&self) -> Discovery {
        self.registering(watch::channel(None).1)
    }

    pub fn registering(&self, registration: watch::Receiver<Option<Registration>>) -> Discovery {
        let (discovery, task) = Discovery::start(DiscoveryConfig {
            connector: Connector::plain(&format!("http://{}", self.address)).unwrap(),
            node: NodeInfo { id: "web-1".into(), cluster: "web".into() },
            registration,
        });
        tokio::spawn(task);
        discovery
    }

    /// Ends the server and every connection of it.
    pub async fn kill(self) {
        self.server.abort();
        let _ = (&mut { self }.server).await;
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Conn {
    /// The next message.
    pub async fn request(&mut self) -> DeltaDiscoveryRequest {
        let request = within(self.requests.message()).await.unwrap().expect("the proxy keeps its stream");
        if let Some(node) = &request.node {
            self.node = Some(node.clone());
        }
        request
    }

    /// The next message that subscribes to, or lets go of, something of this kind.
    pub async fn subscription(&mut self, kind: Kind) -> DeltaDiscoveryRequest {
        loop {
            let request = self.request().await;
            let changes =
                !request.resource_names_subscribe.is_empty() || !request.resource_names_unsubscribe.is_empty();
            if request.type_url == kind.type_url() && changes {
                return request;
            }
        }
    }

    /// The next acknowledgement or refusal of this answer.
    pub async fn reply(&mut self, nonce: &str) -> DeltaDiscoveryRequest {
        loop {
            let request = self.request().await;
            if request.response_nonce == nonce {
                return request;
            }
        }
    }

    /// The reply to something, or `None` where the proxy ends this stream before it has come.
    pub async fn try_ask(&mut self, kind: Kind, resource: Resource) -> Option<DeltaDiscoveryRequest> {
        let nonce = self.try_say(kind.type_url(), vec![resource], &[]).await?;
        while let Ok(Some(request)) = within(self.requests.message()).await {
            if request.response_nonce == nonce {
                return Some(request);
            }
        }
        None
    }

    /// Says something; gives back its nonce.
    pub async fn say(&mut self, kind: Kind, resources: Vec<Resource>, removed: &[&str]) -> String {
        self.say_as(kind.type_url(), resources, removed).await
    }

    pub async fn say_as(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> String {
        self.try_say(type_url, resources, removed).await.expect("the proxy keeps its stream")
    }

    async fn try_say(&mut self, type_url: &str, resources: Vec<Resource>, removed: &[&str]) -> Option<String> {
        self.nonces += 1;
        let nonce = format!("n{}", self.nonces);
        let response = DeltaDiscoveryResponse {
            type_url: type_url.to_string(),
            resources,
            removed_resources: removed.iter().map(|name| name.to_string()).collect(),
            nonce: nonce.clone(),
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.ok()?;
        Some(nonce)
    }

    /// Everything about a destination under one target, as the real one would say it, step by step.
    pub async fn tell(&mut self, target: &str, destination: &Destination) {
        let listener = encode::listener(&target.parse().unwrap(), destination);
        self.say(Kind::Listener, vec![encode::resource(target, "1", listener)], &[]).await;
        self.subscription(Kind::Routes).await;
        let name = destination.name.to_string();
        let routes = encode::route_configuration(destination);
        self.say(Kind::Routes, vec![encode::resource(&name, "1", routes)], &[]).await;
        self.subscription(Kind::Endpoints).await;
        for cluster in destination.clusters.values() {
            self.tell_cluster(cluster, "1").await;
        }
    }

    pub async fn tell_cluster(&mut self, cluster: &Cluster, version: &str) {
        let encoded = encode::cluster(cluster, "cluster.local", AppProtocol::Http);
        self.say(Kind::Cluster, vec![encode::resource(&cluster.name, version, encoded)], &[]).await;
        self.tell_endpoints(cluster, version).await;
    }

    pub async fn tell_endpoints(&mut self, cluster: &Cluster, version: &str) -> String {
        let resource = encode::resource(&cluster.name, version, encode::load_assignment(cluster));
        self.say(Kind::Endpoints, vec![resource], &[]).await
    }

    pub async fn tell_mesh(&mut self) {
        let mesh = Mesh {
            trust_domain: "cluster.local".into(),
            ranges: vec!["127.7.0.0/16".parse().unwrap()],
            domains: vec!["svc.cluster.local".into()],
            outbound_policy: OutboundPolicy::Allow,
        };
        self.say(Kind::Listener, vec![encode::resource(MESH, "1", encode::mesh(&mesh))], &[]).await;
    }
}

/// A port that is nobody else's for as long as the socket is held. Nobody listens there, and one after the other may.
pub fn port() -> (TcpSocket, SocketAddr) {
    let held = TcpSocket::new_v4().unwrap();
    held.set_reuseaddr(true).unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = held.local_addr().unwrap();
    (held, address)
}

/// What a target stands for, however long this machine takes: a proxy asks once, and waits for a second.
pub async fn resolved(discovery: &Discovery, target: &Target) -> Resolution {
    within(async {
        loop {
            match discovery.resolve(target).await {
                Ok(found) => return found,
                Err(Unresolved::NoAnswer) => {}
                Err(refused) => panic!("{target}: {refused}"),
            }
        }
    })
    .await
}

pub async fn within<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(DEADLINE, what).await.expect("this hangs")
}

/// Waits until what is known satisfies a condition.
pub async fn until(discovery: &Discovery, condition: impl Fn(&Discovery) -> bool) {
    let mut changes = discovery.subscribe();
    within(async {
        while !condition(discovery) {
            changes.changed().await.unwrap();
        }
    })
    .await;
}

pub fn target(text: &str) -> Target {
    text.parse().unwrap()
}

pub fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        transport: Transport::Sheetbend("spiffe://cluster.local/ns/default/sa/web".parse().unwrap()),
        standing: Default::default(),
        workload: "web-1".into(),
    }
}

pub fn cluster(name: &str, endpoints: &[&str]) -> Arc<Cluster> {
    let service = ServiceName { service: name.split('.').next().unwrap().into(), namespace: "default".into() };
    let endpoints = endpoints.iter().map(|address| endpoint(address)).collect();
    Arc::new(Cluster {
        name: name.into(),
        service: ServicePort { service, port: 80 },
        endpoints,
        external: None,
        policy: Arc::default(),
    })
}

/// `web.default:80`, HTTP, all to one cluster.
pub fn web(cluster: &Arc<Cluster>) -> Destination {
    Destination {
        name: ServicePort { service: ServiceName { service: "web".into(), namespace: "default".into() }, port: 80 },
        trust_domain: "cluster.local".into(),
        protocol: AppProtocol::Http,
        rules: vec![],
        connections: vec![],
        default_cluster: cluster.name.clone(),
        clusters: BTreeMap::from([(cluster.name.clone(), cluster.clone())]),
    }
}
