//! The way to the control plane: one HTTP/2 connection inside TLS that notices when the other end is gone.
//!
//! The control plane is known by its DNS name or address, as written in its certificate, and by a root: that of the
//! trust bundle, or before there is one, the root that a join token pins. A workload's certificate has neither name nor
//! address, so no workload can pass for the control plane.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sheetbend_certs::{
    Identity, IdentityStore, Material, Sha256, TrustBundle, control_plane_client, first_trust_client,
};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A dead control plane is noticed within 5 s + 5 s, the TTL after which it would have given us up too.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_PATIENCE: Duration = Duration::from_secs(5);

/// Makes channels to one control plane.
#[derive(Clone)]
pub struct Connector {
    url: Arc<str>,
    endpoint: Endpoint,
    tls: Tls,
}

#[derive(Clone)]
enum Tls {
    None,
    /// For one purpose: a first certificate, or a renewal.
    Fixed(Host, Arc<ClientConfig>),
    /// With whatever identity and bundle are in force when it connects.
    Mesh(Host, Arc<IdentityStore>),
}

/// Where to, and under which name the other end must prove itself.
#[derive(Clone)]
struct Host {
    host: Arc<str>,
    port: u16,
    name: ServerName<'static>,
}

/// Why a control plane is not reached.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not a URL of a control plane.
    #[error("`{url}` is not a control plane's address: write https://HOST:PORT ({reason})")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no certificate to connect with yet.
    #[error("{url}: there is no certificate of our own yet to connect with")]
    NoIdentity {
        /// Which control plane.
        url: String,
    },
    /// No TLS configuration can be made.
    #[error("{url}: {reason}")]
    Tls {
        /// Which control plane.
        url: String,
        /// What the TLS library says.
        reason: String,
    },
    /// Nobody there, or not whom we trust.
    #[error("{url}: {reason}")]
    Unreachable {
        /// Which control plane.
        url: String,
        /// The chain of causes.
        reason: String,
    },
}

impl Connector {
    /// Without TLS, `http://HOST:PORT`: for tests, and for a control plane behind something that does TLS itself.
    pub fn plain(url: &str) -> Result<Self, ConnectError> {
        let endpoint = Endpoint::from_shared(url.to_string());
        let endpoint = endpoint.map_err(|error| wrong_url(url, error.to_string()))?;
        Ok(Self { url: url.into(), endpoint: tuned(endpoint), tls: Tls::None })
    }

    /// With the identity and the bundle that are in force: discovery and reports.
    pub fn mesh(url: &str, store: Arc<IdentityStore>) -> Result<Self, ConnectError> {
        let (endpoint, host) = parse(url)?;
        Ok(Self { url: url.into(), endpoint, tls: Tls::Mesh(host, store) })
    }

    /// For a first certificate: only the digest of the root is known, and nothing proves who we are.
    pub fn first_trust(url: &str, root: Sha256) -> Result<Self, ConnectError> {
        Self::fixed(url, first_trust_client(root))
    }

    /// For a first certificate where the bundle is known already.
    pub fn known_bundle(url: &str, bundle: Arc<TrustBundle>) -> Result<Self, ConnectError> {
        Self::fixed(url, control_plane_client(None, bundle))
    }

    /// With one identity, even one that has expired: renewals.
    pub fn renewal(url: &str, identity: &Identity, bundle: Arc<TrustBundle>) -> Result<Self, ConnectError> {
        Self::fixed(url, control_plane_client(Some(identity), bundle))
    }

    fn fixed(url: &str, config: Result<Arc<ClientConfig>, rustls::Error>) -> Result<Self, ConnectError> {
        let (endpoint, host) = parse(url)?;
        let config = config.map_err(|error| tls_failed(url, &error))?;
        Ok(Self { url: url.into(), endpoint, tls: Tls::Fixed(host, config) })
    }

    /// Connects, within 3 s.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        let (host, config) = match &self.tls {
            Tls::None => return self.endpoint.connect().await.map_err(|error| self.unreachable(&error)),
            Tls::Fixed(host, config) => (host, config.clone()),
            Tls::Mesh(host, store) => {
                let material = store.current().ok_or_else(|| ConnectError::NoIdentity { url: self.url.to_string() })?;
                let config = control_plane_client(Some(&material.identity), material.bundle.clone());
                (host, config.map_err(|error| tls_failed(&self.url, &error))?)
            }
        };
        let host = host.clone();
        let dial = move |_: Uri| dial(host.clone(), config.clone());
        let channel = self.endpoint.connect_with_connector(tower::service_fn(dial)).await;
        channel.map_err(|error| self.unreachable(&error))
    }

    /// When to connect anew.
    pub(crate) fn rotations(&self) -> Rotations {
        match &self.tls {
            Tls::None | Tls::Fixed(..) => Rotations(None),
            Tls::Mesh(_, store) => Rotations(Some(store.subscribe())),
        }
    }

    /// Puts the bundle that the control plane told in force, or says why not. The one in force already is left alone.
    pub(crate) fn install_bundle(&self, pem: &str) -> Result<(), String> {
        let Tls::Mesh(_, store) = &self.tls else { return Ok(()) };
        let bundle = TrustBundle::from_pem(pem).map_err(|error| error.to_string())?;
        let material = store.current().ok_or("there is no certificate of our own yet")?;
        if same_roots(&bundle, &material.bundle) {
            return Ok(());
        }
        tracing::info!(roots = ?names(&bundle), "the trust bundle changed");
        // A renewal may come at the same time: whatever identity is in force by then stays.
        let bundle = Arc::new(bundle);
        let identity = |current: Option<&Material>| current.unwrap_or(&material).identity.clone();
        let installed = store.update(SystemTime::now(), |current| (identity(current), bundle));
        installed.map(|_| ()).map_err(|error| error.to_string())
    }

    fn unreachable(&self, error: &tonic::transport::Error) -> ConnectError {
        ConnectError::Unreachable { url: self.url.to_string(), reason: causes(error) }
    }
}

impl fmt::Display for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

/// Whether two bundles have the same roots, in any order.
pub(crate) fn same_roots(one: &TrustBundle, other: &TrustBundle) -> bool {
    // A bundle has each root once.
    one.roots().len() == other.roots().len() && one.roots().iter().all(|root| other.contains(root.sha256()))
}

fn names(bundle: &TrustBundle) -> Vec<String> {
    bundle.roots().iter().map(|root| format!("{} ({})", root.subject(), root.sha256().short())).collect()
}

/// Tells when new channels would rest on another certificate or bundle.
pub(crate) struct Rotations(Option<watch::Receiver<Option<Arc<Material>>>>);

impl Rotations {
    /// The next one. Never, where there is nothing to rotate. Safe to drop and call again.
    pub(crate) async fn next(&mut self) {
        let changed = match &mut self.0 {
            Some(changes) => changes.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            // No store, or nobody holds it any more.
            std::future::pending().await
        }
    }
}

type Dialed = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;

/// TCP, then TLS. All addresses of a name are tried in turn.
fn dial(host: Host, config: Arc<ClientConfig>) -> Pin<Box<dyn Future<Output = std::io::Result<Dialed>> + Send>> {
    Box::pin(async move {
        let stream = TcpStream::connect((&*host.host, host.port)).await?;
        stream.set_nodelay(true)?;
        let stream = TlsConnector::from(config).connect(host.name, stream).await?;
        match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Ok(TokioIo::new(stream)),
            _ => Err(std::io::Error::other("the other end speaks no HTTP/2 (ALPN h2)")),
        }
    })
}

fn parse(url: &str) -> Result<(Endpoint, Host), ConnectError> {
    let uri: Uri = url.parse().map_err(|error| wrong_url(url, format!("{error}")))?;
    if uri.scheme_str() != Some("https") {
        return Err(wrong_url(url, "it does not begin with https://".to_string()));
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err(wrong_url(url, "nothing may follow the port".to_string()));
    }
    let host = uri.host().unwrap_or_default();
    let host = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let name = ServerName::try_from(host.to_string()).map_err(|error| wrong_url(url, error.to_string()))?;
    let host = Host { host: host.into(), port: uri.port_u16().unwrap_or(443), name };
    Ok((tuned(Endpoint::from(uri)), host))
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_PATIENCE)
        .keep_alive_while_idle(true)
}

fn wrong_url(url: &str, reason: String) -> ConnectError {
    ConnectError::Url { url: url.to_string(), reason }
}

fn tls_failed(url: &str, error: &rustls::Error) -> ConnectError {
    ConnectError::Tls { url: url.to_string(), reason: error.to_string() }
}

/// An error and its causes in one line: the outermost alone says "transport error".
pub(crate) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> String {
        match Connector::first_trust(url, Sha256([0; 32])) {
            Ok(_) => panic!("{url} was taken"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn an_address_that_is_no_control_planes_is_refused_with_what_to_write() {
        assert!(refused("http://127.0.0.1:15112").contains("does not begin with https://"));
        assert!(refused("127.0.0.1:15112").contains("write https://HOST:PORT"));
        assert!(refused("https://127.0.0.1:15112/graph").contains("nothing may follow the port"));
        assert!(refused("https://:15112").contains("write https://HOST:PORT"));
    }

    #[test]
    fn names_and_addresses_of_both_families_are_taken() {
        for url in ["https://mesh.example:15112", "https://127.0.0.1:15112", "https://[::1]:15112"] {
            assert!(Connector::first_trust(url, Sha256([0; 32])).is_ok(), "{url}");
        }
    }
}
