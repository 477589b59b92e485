//! A real CA behind real TLS, whose answers a test can spoil.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use sheetbend_certs::{
    Ca, Csr, Identity, IssueRequest, KeyAndCsr, SpiffeId, TrustBundle, control_plane_server, encode_certificates,
    verify_peer_for_renewal,
};
use sheetbend_control_plane_client::identity::JoinToken;
use sheetbend_control_plane_client::proto::ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use sheetbend_control_plane_client::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, Router};
use tonic::{Request, Response, Status};

/// The CA and its server. Dropping it kills it.
pub struct Authority {
    pub address: SocketAddr,
    pub ca: Arc<Ca>,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    spoil: Arc<Mutex<VecDeque<Spoil>>>,
    ttl: Arc<Mutex<Duration>>,
    _dir: tempfile::TempDir,
    server: JoinHandle<()>,
}

/// One request, as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub bearer: Option<String>,
    pub certificate: Option<SpiffeId>,
    pub key: String,
}

/// What goes wrong with an answer.
pub enum Spoil {
    /// It is signed, and lost on its way.
    Lose,
    /// It is a refusal.
    Refuse(Status),
    /// The certificate is somebody else's.
    Other(&'static str),
    /// The bundle is another mesh's.
    Bundle(String),
}

struct Service {
    ca: Arc<Ca>,
    id: SpiffeId,
    asked: Arc<Mutex<Vec<Asked>>>,
    spoil: Arc<Mutex<VecDeque<Spoil>>>,
    ttl: Arc<Mutex<Duration>>,
}

pub fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/default/sa/web".parse().unwrap()
}

impl Authority {
    /// With the CA service alone.
    pub async fn start() -> Self {
        Self::with(|router| router).await
    }

    /// With more services beside it.
    pub async fn with(more: impl FnOnce(Router) -> Router) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::init(&dir.path().join("ca"), &"cluster.local".parse().unwrap(), SystemTime::now()).unwrap();
        let ca = Arc::new(ca);
        let (asked, spoil) = (Arc::default(), Arc::default());
        let ttl = Arc::new(Mutex::new(Duration::from_secs(3600)));
        let service = Service {
            ca: ca.clone(),
            id: web(),
            asked: Arc::clone(&asked),
            spoil: Arc::clone(&spoil),
            ttl: ttl.clone(),
        };
        let router = tonic::transport::Server::builder().add_service(IstioCertificateServiceServer::new(service));
        let router = more(router);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, incoming) = mpsc::channel(16);
        let server = tokio::spawn({
            let ca = ca.clone();
            async move {
                tokio::join!(accept(listener, ca, accepted), async {
                    router.serve_with_incoming(ReceiverStream::new(incoming)).await.unwrap();
                });
            }
        });
        Self { address, ca, asked, spoil, ttl, _dir: dir, server }
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub fn spoil_next(&self, spoil: Spoil) {
        self.spoil.lock().unwrap().push_back(spoil);
    }

    pub fn sign_for(&self, ttl: Duration) {
        *self.ttl.lock().unwrap() = ttl;
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// A token for `web`; nobody checks the signature here.
    pub fn token(&self) -> JoinToken {
        token(&self.ca.active_root().unwrap().sha256().0)
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub fn token(root: &[u8; 32]) -> JoinToken {
    use base64::Engine;
    let root: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
    let claims = serde_json::json!({"id": web(), "expires": 1u64 << 40, "nonce": "n", "root_sha256": root});
    let claims = base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(claims.to_string());
    format!("v1.{claims}.c2ln").parse().unwrap()
}

/// An identity straight from the CA.
pub fn issue(ca: &Ca, id: &SpiffeId, ttl: Duration, now: SystemTime) -> Identity {
    let key = KeyAndCsr::generate().unwrap();
    let request = IssueRequest { ttl, ..IssueRequest::new(id.clone(), Csr::parse(key.csr_der()).unwrap()) };
    key.into_identity(ca.issue(&request, now).unwrap().chain).unwrap()
}

/// A fresh server certificate and the bundle of now for each connection.
async fn accept(listener: TcpListener, ca: Arc<Ca>, accepted: mpsc::Sender<io::Result<Io>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let key = KeyAndCsr::generate().unwrap();
        let id = "spiffe://cluster.local/ns/sheetbend-system/sa/control-plane".parse().unwrap();
        let csr = Csr::parse(key.csr_der()).unwrap();
        let request = IssueRequest { ips: vec![[127, 0, 0, 1].into()], ..IssueRequest::new(id, csr) };
        let identity = key.into_identity(ca.issue(&request, SystemTime::now()).unwrap().chain).unwrap();
        let bundle = ca.bundle().unwrap();
        let acceptor = TlsAcceptor::from(control_plane_server(&identity, bundle.clone()).unwrap());
        let accepted = accepted.clone();
        tokio::spawn(async move {
            if let Ok(tls) = acceptor.accept(stream).await {
                let who = who(&tls, &bundle);
                let _ = accepted.send(Ok(Io { tls, who })).await;
            }
        });
    }
}

fn who(tls: &TlsStream<TcpStream>, bundle: &TrustBundle) -> Option<SpiffeId> {
    let shown = tls.get_ref().1.peer_certificates();
    verify_peer_for_renewal(shown, bundle, SystemTime::now()).ok().map(|renewing| renewing.id)
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let certificate = request.extensions().get::<Option<SpiffeId>>().cloned().flatten();
        let bearer = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_string());
        let csr = Csr::parse(request.get_ref().csr.as_bytes()).unwrap();
        let key = format!("{:?}", csr.key_sha256());
        self.asked.lock().unwrap().push(Asked { bearer, certificate, key });
        let spoil = self.spoil.lock().unwrap().pop_front();
        if let Some(Spoil::Refuse(status)) = spoil {
            return Err(status);
        }
        let id = match spoil {
            Some(Spoil::Other(id)) => id.parse().unwrap(),
            _ => self.id.clone(),
        };
        let ttl = *self.ttl.lock().unwrap();
        let issued = self.ca.issue(&IssueRequest { ttl, ..IssueRequest::new(id, csr) }, SystemTime::now()).unwrap();
        let mut cert_chain: Vec<String> = issued.chain.iter().map(|der| encode_certificates([der])).collect();
        cert_chain.push(self.ca.bundle().unwrap().to_pem());
        match spoil {
            Some(Spoil::Lose) => return Err(Status::unavailable("lost on its way")),
            Some(Spoil::Bundle(other)) => *cert_chain.last_mut().unwrap() = other,
            _ => {}
        }
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// A TLS connection that knows who is at its other end.
pub struct Io {
    tls: TlsStream<TcpStream>,
    who: Option<SpiffeId>,
}

impl Connected for Io {
    type ConnectInfo = Option<SpiffeId>;
    fn connect_info(&self) -> Option<SpiffeId> {
        self.who.clone()
    }
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
