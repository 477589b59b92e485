//! A running control plane: opens everything, binds both ports, keeps the tasks, stops them.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use sheetbend_certs::{Ca, CaError, SpiffeId, control_plane_file};
use sheetbend_control_plane_client::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use sheetbend_control_plane_client::proto::v1::report_server::ReportServer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

use crate::ads::Discovery;
use crate::ca_service::CaService;
use crate::config::{Config, StartError};
use crate::ledger::Ledger;
use crate::listen;
use crate::own::Own;
use crate::persist;
use crate::registry::Registry;
use crate::report::Reports;
use crate::resources::Folder;
use crate::state::{Parts, Shared, stopped};
use crate::token::TokenKey;
use crate::trust::{Holdings, Trust};
use crate::{admin, keep};

/// Accepted connections that the server has not taken over yet.
const HANDED_OVER: usize = 64;
/// PINGs make silence measurable: a live proxy answers each, and the TTL is a few of them.
const PING: Duration = Duration::from_secs(2);
/// How long open requests may take at the end.
const GOODBYE: Duration = Duration::from_secs(2);

/// A running control plane. Several may run in one process, each with its own folders and ports.
pub struct ControlPlane {
    listen: SocketAddr,
    admin: SocketAddr,
    url: String,
    ca: Arc<Ca>,
    tokens: Arc<TokenKey>,
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
    /// Gone when dropped: `DIR/control-plane.json`.
    announcement: Announcement,
    /// Last, so that nobody takes the folder over while we still write into it.
    lock: File,
}

impl ControlPlane {
    /// Opens the CA, binds both ports and serves on the current tokio runtime.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(StartError::Invalid(problems));
        }
        let ca = Ca::open(&config.dir, SystemTime::now()).map_err(ca_error)?;
        let trust = Trust::of(&ca).map_err(ca_error)?;
        let lock = hold(&config.state)?;
        let tokens = Arc::new(TokenKey::open_or_create(&config.dir)?);
        let ledger = Arc::new(Ledger::open(config.state.join("spent-tokens.json"))?);
        let (ca, started) = (Arc::new(ca), Instant::now());
        let folder = open_folder(&config, &ca)?;
        let own = Own::issue(&ca, &config.names).map_err(ca_error)?;

        let listener = bind(config.listen, "discovery and certificates", "--listen").await?;
        let admin_listener = bind(config.admin, "the admin and the graph page", "--admin").await?;
        let (listen, admin) = (address(&listener, config.listen)?, address(&admin_listener, config.admin)?);

        let registrations_file = config.state.join("registrations.json");
        let mut registry = Registry::new(config.ttl);
        registry.restore(persist::read_json(&registrations_file)?.unwrap_or_default(), config.restart_grace);
        let shared = Arc::new(Shared::new(Parts {
            started,
            ca: ca.clone(),
            trust,
            registry,
            registrations_file,
            holdings: Holdings::open(config.state.join("proxies.json"))?,
            folder,
            allowed_addresses: config.allowed_addresses.clone(),
        }));
        let trust_domain = ca.trust_domain().map_err(ca_error)?;
        let reports = Reports::new(trust_domain.as_str(), started);
        let url = url_of(listen);
        let announcement = Announcement::write(&config.dir, admin, &url)?;

        let mut tasks = JoinSet::new();
        let door = Arc::new(ArcSwap::from(own.door()));
        let (connections, incoming) = mpsc::channel(HANDED_OVER);
        tasks.spawn(listen::accept(listener, door.clone(), started, connections, listen::Limits::default()));
        tasks.spawn(serve(services(&shared, &ca, &tokens, &ledger, &reports), incoming, shared.clone()));
        tasks.spawn(admin::serve(
            admin_listener,
            admin::Admin { shared: shared.clone(), reports: reports.clone(), started },
        ));
        tasks.spawn(keep::building(shared.clone()));
        tasks.spawn(keep::certificates(shared.clone(), own, door));
        tasks.spawn(keep::registrations(shared.clone()));
        tasks.spawn(keep::resources(shared.clone()));
        tasks.spawn(keep::graph(shared.clone(), reports));
        tracing::info!(%listen, %admin, ca = %config.dir.display(), "the control plane serves");
        Ok(Self { listen, admin, url, ca, tokens, shared, tasks, announcement, lock })
    }

    /// Where discovery and the CA service are served.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Where the admin is served.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// `https://127.0.0.1:15112`: what a proxy on this machine connects to.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A join token for a service, good for `ttl` from now.
    pub fn token(&self, service: &str, namespace: &str, ttl: Duration) -> Result<String, StartError> {
        token_for(&self.ca, &self.tokens, service, namespace, ttl)
    }

    /// Stops serving: ends every stream with a word, writes the state, frees the ports.
    pub async fn shutdown(mut self) {
        self.shared.stop();
        let ended = tokio::time::timeout(GOODBYE, async { while self.tasks.join_next().await.is_some() {} });
        if ended.await.is_err() {
            self.tasks.shutdown().await;
        }
        let shared = self.shared.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || shared.save_last()).await {
            tracing::error!(%error, "the registrations could not be written at the end");
        }
        drop(self.announcement);
        drop(self.lock);
    }
}

/// Makes a join token with the CA in `dir`, whether or not a control plane serves it now.
pub fn create_token(dir: &Path, service: &str, namespace: &str, ttl: Duration) -> Result<String, StartError> {
    let ca = Ca::open(dir, SystemTime::now()).map_err(ca_error)?;
    token_for(&ca, &TokenKey::open_or_create(dir)?, service, namespace, ttl)
}

fn token_for(ca: &Ca, key: &TokenKey, service: &str, namespace: &str, ttl: Duration) -> Result<String, StartError> {
    let trust_domain = ca.trust_domain().map_err(ca_error)?;
    let id = SpiffeId::for_workload(&trust_domain, namespace, service)
        .map_err(|error| StartError::Invalid(vec![error.to_string()]))?;
    let root = ca.active_root().map_err(ca_error)?;
    Ok(key.issue(id, root.sha256().to_string(), SystemTime::now(), ttl))
}

fn ca_error(error: CaError) -> StartError {
    StartError::Ca(error.to_string())
}

/// The state folder is one control plane's at a time.
fn hold(state: &Path) -> Result<File, StartError> {
    let failed =
        |what, path: &Path, source| StartError::State(persist::StateError::Io { path: path.into(), what, source });
    sheetbend_certs::files::make_private_dir(state).map_err(|e| failed("make it", state, e))?;
    let path = state.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| failed("open it", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StartError::Held(state.into())),
        Err(std::fs::TryLockError::Error(error)) => Err(failed("lock it", &path, error)),
    }
}

fn open_folder(config: &Config, ca: &Ca) -> Result<Option<Folder>, StartError> {
    let Some(path) = config.resources.clone() else { return Ok(None) };
    let trust_domain = ca.trust_domain().map_err(ca_error)?;
    let mut folder = Folder::new(path.clone(), trust_domain.as_str());
    let (_, refusals) = folder
        .reload(Instant::now())
        .map_err(|source| StartError::State(persist::StateError::Io { path, what: "read this folder", source }))?;
    // There is no last good state yet to fall back to: whoever starts us is there to mend it.
    match refusals.is_empty() {
        true => Ok(Some(folder)),
        false => Err(StartError::Invalid(refusals.iter().map(ToString::to_string).collect())),
    }
}

async fn bind(address: SocketAddr, what: &'static str, flag: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::bind(address, what, flag, error))
}

fn address(listener: &TcpListener, asked: SocketAddr) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|error| StartError::bind(asked, "anything", "--listen", error))
}

/// What a proxy on this machine connects to.
fn url_of(listen: SocketAddr) -> String {
    let ip = match listen.ip() {
        ip if !ip.is_unspecified() => ip,
        std::net::IpAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        std::net::IpAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    format!("https://{}", SocketAddr::new(ip, listen.port()))
}

type Services = tonic::service::Routes;

fn services(
    shared: &Arc<Shared>,
    ca: &Arc<Ca>,
    tokens: &Arc<TokenKey>,
    ledger: &Arc<Ledger>,
    reports: &Reports,
) -> Services {
    let certificates = CaService { ca: ca.clone(), tokens: tokens.clone(), ledger: ledger.clone() };
    let discovery = Discovery { shared: shared.clone() };
    Services::new(IstioCertificateServiceServer::new(certificates).max_decoding_message_size(64 << 10))
        .add_service(AggregatedDiscoveryServiceServer::new(discovery))
        .add_service(ReportServer::new(reports.service(shared.clone())))
}

async fn serve(services: Services, incoming: mpsc::Receiver<std::io::Result<listen::Connection>>, shared: Arc<Shared>) {
    let mut stopping = shared.stopping();
    let stop = async move { stopped(&mut stopping).await };
    let served = Server::builder()
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(64)
        .http2_max_header_list_size(16 << 10)
        .http2_max_pending_accept_reset_streams(Some(32))
        .add_routes(services)
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "discovery and certificates are no longer served");
    }
}

/// `DIR/control-plane.json`, there while we serve.
struct Announcement(PathBuf);

impl Announcement {
    fn write(dir: &Path, admin: SocketAddr, url: &str) -> Result<Self, StartError> {
        let path = control_plane_file(dir);
        let content = serde_json::json!({
            "pid": std::process::id(),
            "admin": format!("http://{admin}"),
            "url": url,
        });
        persist::write_json(&path, &content)?;
        Ok(Self(path))
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
