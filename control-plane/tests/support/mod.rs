//! A control plane on loopback, and peers that speak to it over real TLS.
#![allow(dead_code, unreachable_pub)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use hyper_util::rt::TokioIo;
use sheetbend_certs::{
    Ca, Csr, Identity, IssueRequest, KeyAndCsr, SpiffeId, TrustDomain, control_plane_client, first_trust_client,
};
use sheetbend_control_plane::{Config, ControlPlane};
use sheetbend_control_plane_client::model::AppProtocol;
use sheetbend_control_plane_client::proto::ca::IstioCertificateRequest;
use sheetbend_control_plane_client::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use sheetbend_control_plane_client::registration::{RegisteredPort, Registration};
use sheetbend_control_plane_client::xds::Kind;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

/// Nothing here takes longer than this unless it hangs.
pub const SOON: Duration = Duration::from_secs(60);

pub fn new_ca(dir: &Path) -> Ca {
    Ca::init(dir, &TrustDomain::default(), SystemTime::now()).unwrap()
}

pub fn config(dir: &Path) -> Config {
    let mut config = Config::new(dir);
    config.listen = "127.0.0.1:0".parse().unwrap();
    config.admin = "127.0.0.1:0".parse().unwrap();
    config
}

/// A port that is nobody else's for as long as the socket is held. Nobody listens there, and one after the other may.
pub fn port() -> (tokio::net::TcpSocket, SocketAddr) {
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.set_reuseaddr(true).unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = held.local_addr().unwrap();
    (held, address)
}

pub fn id(service: &str) -> SpiffeId {
    SpiffeId::for_workload(&TrustDomain::default(), "default", service).unwrap()
}

pub fn identity(ca: &Ca, service: &str, ttl: Duration, now: SystemTime) -> Identity {
    let key = KeyAndCsr::generate().unwrap();
    let csr = Csr::parse(key.csr_pem().as_bytes()).unwrap();
    let issued = ca.issue(&IssueRequest { ttl, ..IssueRequest::new(id(service), csr) }, now).unwrap();
    key.into_identity(issued.chain).unwrap()
}

pub async fn channel(address: SocketAddr, tls: Arc<rustls::ClientConfig>) -> Result<Channel, tonic::transport::Error> {
    let connect = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move {
            let socket = tokio::net::TcpStream::connect(address).await?;
            let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
            tokio_rustls::TlsConnector::from(tls).connect(name, socket).await.map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://control-plane").connect_with_connector(connect).await
}

/// A channel, however long the machine takes: the control plane gives a handshake 5 s.
async fn entered(control_plane: &ControlPlane, tls: Arc<rustls::ClientConfig>) -> Channel {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        match channel(control_plane.listen(), tls.clone()).await {
            Ok(channel) => return channel,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
    }
}

/// A channel of a workload of this CA.
pub async fn workload(control_plane: &ControlPlane, ca: &Ca, service: &str) -> Channel {
    let identity = identity(ca, service, Duration::from_secs(3600), SystemTime::now());
    let tls = control_plane_client(Some(&identity), ca.bundle().unwrap()).unwrap();
    entered(control_plane, tls).await
}

/// A channel of someone who knows the root's digest alone.
pub async fn stranger(control_plane: &ControlPlane, ca: &Ca) -> Channel {
    let tls = first_trust_client(ca.active_root().unwrap().sha256()).unwrap();
    entered(control_plane, tls).await
}

pub async fn ask_for_certificate(channel: Channel, csr: &str, token: Option<&str>) -> Result<Vec<String>, Status> {
    let mut request =
        Request::new(IstioCertificateRequest { csr: csr.to_string(), validity_duration: 0, metadata: None });
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await?;
    Ok(answer.into_inner().cert_chain)
}

pub fn node(name: &str, agent: &str, registration: Option<Registration>) -> Node {
    let mut node = Node { id: name.to_string(), user_agent_name: agent.to_string(), ..Node::default() };
    if let Some(registration) = registration {
        registration.put_into(&mut node);
    }
    node
}

pub fn serves(port: u16, inbound: u16) -> Registration {
    let ports = vec![RegisteredPort { port, inbound, protocol: AppProtocol::Http }];
    Registration { address: [127, 0, 0, 1].into(), ports, also: Vec::new(), standing: Default::default() }
}

/// One incremental stream.
pub struct Delta {
    pub requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub answers: Streaming<DeltaDiscoveryResponse>,
}

impl Delta {
    /// Opens a stream whose first request says who is there and asks for nothing that is ever answered.
    pub async fn open(channel: Channel, node: Node) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let first = DeltaDiscoveryRequest { node: Some(node), type_url: "none".into(), ..Default::default() };
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let answers = client.delta_aggregated_resources(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, answers })
    }

    pub async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub async fn subscribe(&self, kind: Kind, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: kind.type_url().to_string(),
            resource_names_subscribe: names.iter().map(|name| name.to_string()).collect(),
            ..Default::default()
        })
        .await;
    }

    pub async fn next(&mut self) -> DeltaDiscoveryResponse {
        tokio::time::timeout(SOON, self.answers.next()).await.expect("an answer").expect("a stream").unwrap()
    }

    /// The next answer, acknowledged.
    pub async fn take(&mut self) -> DeltaDiscoveryResponse {
        let answer = self.next().await;
        self.send(DeltaDiscoveryRequest {
            type_url: answer.type_url.clone(),
            response_nonce: answer.nonce.clone(),
            ..Default::default()
        })
        .await;
        answer
    }

    /// Waits for the end of the stream.
    pub async fn end(&mut self) -> Status {
        loop {
            match tokio::time::timeout(SOON, self.answers.next()).await.expect("an end") {
                Some(Ok(_)) => {}
                Some(Err(status)) => return status,
                None => return Status::new(Code::Ok, "ended"),
            }
        }
    }
}

/// Asks until the admin's answer is what was waited for.
pub async fn admin_until(control_plane: &ControlPlane, path: &str, good: impl Fn(&str) -> bool) -> String {
    let deadline = tokio::time::Instant::now() + SOON;
    loop {
        let answer = admin(control_plane, path).await;
        if good(&answer) {
            return answer;
        }
        assert!(tokio::time::Instant::now() < deadline, "{path} still says:\n{answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The body of `GET path`.
pub async fn admin(control_plane: &ControlPlane, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(control_plane.admin()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default()
}
