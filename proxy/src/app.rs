//! Wires the parts together; owns the order of start and stop.
//!
//! Start: identity, then discovery, then listeners; nothing is accepted before there is a certificate. Stop: withdraw,
//! say goodbye on inbound, keep outbound until the app is gone, end.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use sheetbend_certs::{IdentityStore, SpiffeId};
use sheetbend_control_plane_client::channel::{ConnectError, Connector};
use sheetbend_control_plane_client::discovery::{Discovery, DiscoveryConfig, NodeInfo};
use sheetbend_control_plane_client::identity::{self, IdentityClient, IdentityConfig, NoIdentity, Proof};
use sheetbend_control_plane_client::model::{AppProtocol, ServiceName, Standing, Target};
use sheetbend_control_plane_client::registration::{RegisteredPort, Registration};
use sheetbend_control_plane_client::report::{self, ReportConfig, Reporter};
use tokio::sync::watch;

use crate::admin::{Admin, Scope};
use crate::here::{Here, PortNames, Redirected};
use crate::inbound::Port;
use crate::inbound_rules::{self, InboundRules};
use crate::listen::{BindError, Listener, bind, bind_admin, bind_each};
use crate::observe::admin_state;
use crate::proc_net;
use crate::telemetry::{AccessLogSettings, Counter, Settings, Telemetry};
use crate::traffic::layers::Layers;
use crate::upstream::Endpoints;
use crate::worker::{Job, Worker, Workers};

/// What a proxy is started with.
#[derive(Debug)]
pub struct Config {
    /// `https://HOST:PORT`.
    pub control_plane: String,
    /// How the first certificate is asked for.
    pub proof: Proof,
    /// Where the identity is kept over restarts; `None`: in memory alone.
    pub identity_dir: Option<PathBuf>,
    /// How long to wait for the first certificate.
    pub patience: Duration,
    /// The address by which others reach this proxy.
    pub advertise: IpAddr,
    /// Other addresses of this host, under which its app is called and served as well.
    pub also: Vec<IpAddr>,
    /// Its place among the instances of its service; its zone is also the one that it prefers when it calls.
    pub standing: Standing,
    /// The explicit listener: absolute-form and CONNECT.
    pub explicit: Option<SocketAddr>,
    /// The listeners of redirected outbound connections. IPv6 is left out where there is none.
    pub transparent: Vec<SocketAddr>,
    /// The listener of redirected connections for the app. `[::]` is 0.0.0.0 where there is no IPv6.
    pub redirected_inbound: Option<SocketAddr>,
    /// Local ports that lead to one destination each.
    pub upstreams: Vec<(SocketAddr, Target)>,
    /// The app's ports, each with a listener of its own for what is meant for it.
    pub ports: Vec<AppPort>,
    /// The admin port; loopback.
    pub admin: SocketAddr,
    /// Where others may ask for readiness and metrics, and for nothing else.
    pub health: Option<SocketAddr>,
    /// Explicit and upstream listeners take connections of this process's user only.
    pub same_user_only: bool,
    /// Inbound takes nothing but mutual TLS.
    pub strict: bool,
    /// Who may call; empty is every identity of the mesh.
    pub allow: Vec<SpiffeId>,
    /// Who is asked for the addresses of external services; nobody: those of `/etc/resolv.conf`.
    pub dns_servers: Vec<SocketAddr>,
    /// What is no part of the mesh is refused.
    pub deny_unknown: bool,
    /// The access log.
    pub access_log: AccessLogSettings,
    /// Worker threads.
    pub workers: usize,
}

/// A port of the app.
#[derive(Clone, Copy, Debug)]
pub struct AppPort {
    /// The service's port.
    pub port: u16,
    /// The app's own, which is the same unless somebody says otherwise.
    pub local: u16,
    /// What it speaks.
    pub protocol: AppProtocol,
    /// TLS that comes in is the mesh's even where the peer is not ours. Strict takes it for that anyway.
    pub mesh_tls: bool,
    /// Where its own inbound listener binds; port 0 takes a free one. `None`: peers connect to the app's own address, and
    /// what they send there is redirected.
    pub listen: Option<SocketAddr>,
}

/// Why a proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener.
    #[error("{what}: {source}")]
    Bind {
        /// Which.
        what: String,
        /// Why.
        source: BindError,
    },
    /// The control plane's address.
    #[error(transparent)]
    ControlPlane(#[from] ConnectError),
    /// No certificate.
    #[error("no certificate from the control plane at {control_plane}: {source}")]
    Identity {
        /// Who was asked.
        control_plane: String,
        /// Why.
        source: NoIdentity,
    },
    /// Nobody said what the mesh is.
    #[error(
        "the control plane at {control_plane} has not said within {} s what the mesh is and who may call{}", patience.as_secs(),
        why.as_ref().map(|why| format!(": {why}")).unwrap_or_default()
    )]
    NoDiscovery {
        /// Who was asked.
        control_plane: String,
        /// How long.
        patience: Duration,
        /// What went wrong last, if anything did.
        why: Option<Arc<str>>,
    },
    /// The identity names no service.
    #[error("{0} names no workload: expected spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE")]
    NoWorkload(SpiffeId),
    /// The system.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// What every part of a running proxy reads.
pub(crate) struct Shared {
    pub(crate) identity: Arc<IdentityStore>,
    pub(crate) discovery: Discovery,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) epoch: Instant,
    pub(crate) layers: Layers,
    pub(crate) deny_unknown: bool,
    pub(crate) strict: bool,
    pub(crate) same_user_only: bool,
    pub(crate) allow: Vec<SpiffeId>,
    /// What the control plane says of those who call.
    pub(crate) inbound_rules: Arc<ArcSwap<InboundRules>>,
    pub(crate) inbound_drain: watch::Sender<bool>,
    pub(crate) outbound_drain: watch::Sender<bool>,
    pub(crate) here: Arc<Here>,
    pub(crate) workers: Vec<Arc<Worker>>,
    pub(crate) reporter: Reporter,
    pub(crate) renewal: watch::Receiver<identity::Status>,
}

impl Shared {
    /// Whether a connection may come in on an explicit listener.
    pub(crate) fn takes(&self, ours: SocketAddr, peer: SocketAddr) -> bool {
        if !self.same_user_only {
            return true;
        }
        let me = rustix::process::getuid().as_raw();
        let owner = match proc_net::owner_of_peer(ours, peer) {
            Ok(owner) if owner == Some(me) => return true,
            Ok(owner) => owner,
            Err(error) => {
                if let Some(left_out) = self.telemetry.refused(Counter::RefusedOverload) {
                    tracing::warn!(%peer, %error, left_out, "the kernel does not say whose a connection is: closed");
                }
                return false;
            }
        };
        match (owner, self.telemetry.refused(Counter::RefusedOwner)) {
            (Some(owner), Some(left_out)) => {
                tracing::warn!(%peer, owner, left_out, "a connection of another user is refused");
            }
            (Some(_), None) => {}
            (None, _) => tracing::debug!(%peer, "a connection that nobody holds any more is closed"),
        }
        false
    }
}

/// A running proxy. Dropping it ends it.
pub struct Proxy {
    shared: Arc<Shared>,
    explicit: Option<SocketAddr>,
    admin: SocketAddr,
    inbound: HashMap<u16, Served>,
    registration: watch::Sender<Option<Registration>>,
    /// What is registered before there is a port.
    portless: Registration,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// A port of the app, as others reach it.
struct Served {
    at: SocketAddr,
    protocol: AppProtocol,
    /// Whose app has a place of its own; `None` where it is at `at` itself.
    app: Option<Arc<Port>>,
}

impl Proxy {
    /// Starts everything; waits for the first certificate, and until it is known what the mesh is. Ready when it returns.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let what = |what: &str| {
            let what = what.to_string();
            move |source| StartError::Bind { what, source }
        };
        // Ports first: one that is taken is told before anybody is asked for anything.
        let explicit = config.explicit.map(bind).transpose().map_err(what("the outbound listener"))?;
        let transparent = bind_each(&config.transparent).map_err(what("the redirected traffic's listener"))?;
        let mut upstreams = Vec::new();
        for (address, target) in &config.upstreams {
            let listener = bind(*address).map_err(what(&format!("the local port for {target}")))?;
            upstreams.push((listener, target.clone()));
        }
        let mut ports = Vec::new();
        for port in &config.ports {
            let bound = port.listen.map(bind).transpose();
            let listener = bound.map_err(what(&format!("the inbound listener of port {}", port.port)))?;
            ports.push((listener, *port));
        }
        let redirected = bind_each(config.redirected_inbound.as_slice()).map_err(what("the inbound listener"))?;
        let admin = bind_admin(config.admin).await.map_err(what("the admin port"))?;
        let health = match config.health {
            Some(address) => Some(bind_admin(address).await.map_err(what("the health port"))?),
            None => None,
        };

        let identity = Arc::new(IdentityStore::new());
        let mut wanted = IdentityConfig::new(config.control_plane.clone(), config.proof.clone());
        wanted.directory = config.identity_dir.clone();
        let (client, renewing) = IdentityClient::start(wanted, Arc::clone(&identity))?;
        let ending = Arc::clone(&identity);
        let mut tasks = vec![tokio::spawn(renewing), tokio::spawn(async move { ending.tell_ends().await })];
        let material = client
            .first(config.patience)
            .await
            .map_err(|source| StartError::Identity { control_plane: config.control_plane.clone(), source })?;
        let id = material.identity.id.clone();
        let Some((namespace, service)) = id.workload() else { return Err(StartError::NoWorkload(id)) };
        let service = ServiceName { service: service.into(), namespace: namespace.into() };

        let settings = Settings { identity: id.clone(), service: service.clone(), access_log: config.access_log };
        let telemetry = Telemetry::new(settings);
        let connector = Connector::mesh(&config.control_plane, Arc::clone(&identity))?;
        let (registration, registered) = watch::channel(None);
        let instance = format!("{}-{}-{:08x}", service.service, std::process::id(), rand::random::<u32>());
        let node = NodeInfo { id: instance.clone(), cluster: service.to_string() };
        let (discovery, discovering) =
            Discovery::start(DiscoveryConfig { connector: connector.clone(), node, registration: registered });
        tasks.push(tokio::spawn(discovering));
        // Without it, names of the mesh would be taken for those of strangers, and anybody for one who may call.
        let known = tokio::time::timeout(config.patience, discovery.mesh_known()).await;
        let Some(rules) = known.ok().and_then(|()| InboundRules::of(&discovery.snapshot())) else {
            let why = discovery.status().borrow().last_error.clone();
            let (control_plane, patience) = (config.control_plane, config.patience);
            return Err(StartError::NoDiscovery { control_plane, patience, why });
        };
        let inbound_rules = Arc::new(ArcSwap::from_pointee(rules));
        tasks.push(tokio::spawn(inbound_rules::follow(discovery.clone(), Arc::clone(&inbound_rules))));
        let reported = Arc::clone(&telemetry);
        let (reporter, reporting) = Reporter::start(ReportConfig {
            connector,
            instance,
            every: report::EVERY,
            source: Box::new(move || reported.take_deltas()),
        });
        tasks.push(tokio::spawn(reporting));

        let admin_address = admin.local_addr()?;
        let mut listeners = vec![admin_address];
        listeners.extend(health.iter().filter_map(|listener| listener.local_addr().ok()));
        listeners.extend(explicit.iter().chain(&redirected).map(Listener::local_addr));
        listeners.extend(upstreams.iter().map(|(listener, _)| listener.local_addr()));
        // Redirection leads every address of this host to these, whatever they are bound to.
        let everywhere = |listener: &Listener| SocketAddr::from((Ipv6Addr::UNSPECIFIED, listener.local_addr().port()));
        listeners.extend(transparent.iter().map(everywhere));
        let mut inbound = HashMap::new();
        let mut feeds = Vec::new();
        let mut protocols = HashMap::new();
        for (listener, port) in ports {
            let served = match listener {
                Some(listener) => {
                    let app = ArcSwap::new(Port::app_at(SocketAddr::from((Ipv4Addr::LOCALHOST, port.local))));
                    let name = format!("{service}:{}", port.port).into();
                    let AppPort { port, protocol, mesh_tls, .. } = port;
                    let app = Arc::new(Port { port, protocol, mesh_tls, name, app });
                    let at = listener.local_addr();
                    feeds.push((listener, Arc::clone(&app)));
                    Served { at, protocol, app: Some(app) }
                }
                None => {
                    protocols.insert(port.port, port.protocol);
                    let at = SocketAddr::new(config.advertise, port.port);
                    Served { at, protocol: port.protocol, app: None }
                }
            };
            inbound.insert(port.port, served);
        }
        let names = Arc::new(PortNames::new(service.to_string(), inbound.keys().copied()));
        let here = Arc::new(Here {
            listeners,
            advertise: config.advertise,
            ports: feeds.iter().map(|(listener, port)| (listener.local_addr(), Arc::clone(port))).collect(),
            redirected: (!redirected.is_empty()).then(|| Redirected::new(Arc::clone(&names), protocols)),
            names,
        });
        let endpoints = Arc::new(Endpoints::in_zone(Arc::clone(&config.standing.zone)).asking(config.dns_servers));
        let shared = Arc::new(Shared {
            identity,
            discovery,
            telemetry,
            epoch: endpoints.epoch,
            endpoints,
            layers: Layers::default(),
            deny_unknown: config.deny_unknown,
            strict: config.strict,
            same_user_only: config.same_user_only,
            allow: config.allow,
            inbound_rules,
            inbound_drain: watch::Sender::new(false),
            outbound_drain: watch::Sender::new(false),
            here,
            workers: std::iter::repeat_with(Arc::default).take(config.workers.max(1)).collect(),
            reporter,
            renewal: client.status(),
        });
        let state = Arc::new(admin_state(&shared));
        if let Some(listener) = health {
            tasks.push(tokio::spawn(Admin::serve(listener, Arc::clone(&state), Scope::Health)));
        }
        tasks.push(tokio::spawn(Admin::serve(admin, state, Scope::Everything)));

        tasks.push(tokio::spawn(crate::upstream::health::run(Arc::clone(&shared))));
        let workers = Workers::start(&shared)?;
        let explicit_address = explicit.as_ref().map(Listener::local_addr);
        if let Some(listener) = explicit {
            tasks.push(workers.feed(listener, Job::Explicit));
        }
        for listener in transparent {
            tasks.push(workers.feed(listener, Job::Transparent));
        }
        for (listener, target) in upstreams {
            tasks.push(workers.feed(listener, move |accepted| Job::Fixed(accepted, target.clone())));
        }
        for (listener, port) in feeds {
            tasks.push(workers.feed(listener, move |accepted| Job::Inbound(accepted, Arc::clone(&port))));
        }
        for listener in redirected {
            tasks.push(workers.feed(listener, Job::Redirected));
        }
        let portless =
            Registration { address: config.advertise, ports: Vec::new(), also: config.also, standing: config.standing };
        Ok(Self { shared, explicit: explicit_address, admin: admin_address, inbound, registration, portless, tasks })
    }

    /// The explicit outbound listener.
    pub fn explicit(&self) -> Option<SocketAddr> {
        self.explicit
    }

    /// The admin port.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Where traffic for a port of the app comes in.
    pub fn inbound(&self, port: u16) -> Option<SocketAddr> {
        self.inbound.get(&port).map(|served| served.at)
    }

    /// Tells the mesh that a port is served from now on, by the app at `app`. What is redirected goes to the address that
    /// its caller meant instead.
    pub fn register(&self, port: u16, app: SocketAddr) {
        let Some(served) = self.inbound.get(&port) else { return };
        if let Some(port) = &served.app {
            port.app.store(Port::app_at(app));
        }
        let added = RegisteredPort { port, inbound: served.at.port(), protocol: served.protocol };
        self.registration.send_modify(|registration| {
            let registration = registration.get_or_insert_with(|| self.portless.clone());
            registration.ports.retain(|known| known.port != port);
            registration.ports.push(added);
        });
    }

    /// Tells the mesh that nothing is served here any more, and waits until it has heard, 1 s at most. One who never served
    /// anything says goodbye by it too: nobody then waits for it when roots change.
    pub async fn withdraw(&self) {
        self.registration.send_if_modified(|registration| {
            let silent = registration.is_none();
            registration.get_or_insert_with(|| self.portless.clone());
            silent
        });
        self.shared.discovery.withdraw().await;
    }

    /// Says goodbye to those who call; what has been begun goes on, and so does outbound.
    pub fn drain(&self) {
        self.shared.inbound_drain.send_replace(true);
    }

    /// Ends: at once where nothing is under way, and within `deadline` in any case.
    pub async fn shutdown(mut self, deadline: Duration) {
        self.drain();
        self.shared.outbound_drain.send_replace(true);
        let idle = async {
            // One guard for each connection, held by its receiver of the drain.
            self.shared.inbound_drain.closed().await;
            self.shared.outbound_drain.closed().await;
        };
        let _ = tokio::time::timeout(deadline, idle).await;
        // What happened since the last report: a process may be shorter than the pause between two.
        self.shared.reporter.flush().await;
        self.shared.telemetry.access_log().flush(Duration::from_millis(500));
        self.tasks.drain(..).for_each(|task| task.abort());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tasks.drain(..).for_each(|task| task.abort());
    }
}
