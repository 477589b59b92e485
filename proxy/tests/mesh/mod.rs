//! A mesh within this process: a control plane, and sidecars with one worker each. Everything but the workers stands still
//! while the runtime that it was made on is not polled.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Ca, IdentityStore, TrustDomain};
use sheetbend_control_plane::ControlPlane;
use sheetbend_control_plane_client::channel::Connector;
use sheetbend_control_plane_client::discovery::{Discovery, DiscoveryConfig, NodeInfo};
use sheetbend_control_plane_client::identity::{IdentityClient, IdentityConfig, Proof};
use sheetbend_control_plane_client::model::AppProtocol;
use sheetbend_proxy::app::{AppPort, Config, Proxy};
use sheetbend_proxy::telemetry::{AccessLogOutput, AccessLogSettings};
use tempfile::TempDir;
use tokio::sync::watch;

/// How long anything may take: a busy machine is slow, not broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A CA and a control plane on loopback.
pub(crate) struct Mesh {
    control_plane: ControlPlane,
    _folder: TempDir,
}

impl Mesh {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        Ca::init(folder.path(), &domain, SystemTime::now()).unwrap();
        let config = sheetbend_control_plane::Config {
            listen: LOOPBACK,
            admin: LOOPBACK,
            ..sheetbend_control_plane::Config::new(folder.path())
        };
        Self { control_plane: ControlPlane::start(config).await.unwrap(), _folder: folder }
    }

    fn proof(&self, service: &str) -> Proof {
        let token = self.control_plane.token(service, "default", PATIENCE).unwrap();
        Proof::Join(token.parse().unwrap())
    }

    /// A sidecar of `service`, whose app, where it has one, is at `app`.
    pub(crate) async fn sidecar(&self, service: &str, app: Option<SocketAddr>) -> Proxy {
        let port = app.map(|app| AppPort {
            port: app.port(),
            local: app.port(),
            protocol: AppProtocol::Detect,
            mesh_tls: false,
            listen: Some(LOOPBACK),
        });
        let proxy = Proxy::start(Config {
            control_plane: self.control_plane.url().into(),
            proof: self.proof(service),
            identity_dir: None,
            patience: PATIENCE,
            advertise: LOOPBACK.ip(),
            also: Vec::new(),
            standing: Default::default(),
            explicit: Some(LOOPBACK),
            transparent: Vec::new(),
            redirected_inbound: None,
            upstreams: Vec::new(),
            ports: port.into_iter().collect(),
            admin: LOOPBACK,
            health: None,
            same_user_only: true,
            strict: false,
            allow: Vec::new(),
            dns_servers: Vec::new(),
            deny_unknown: false,
            access_log: AccessLogSettings {
                output: AccessLogOutput::Writer(Box::new(std::io::sink())),
                ..AccessLogSettings::default()
            },
            workers: 1,
        })
        .await
        .unwrap();
        if let Some(app) = app {
            proxy.register(app.port(), app);
        }
        proxy
    }

    /// Discovery alone, as `service` has it.
    #[allow(dead_code, reason = "not every program that has this module wants it")]
    pub(crate) async fn discovery(&self, service: &str) -> Discovery {
        let (url, identity) = (self.control_plane.url(), Arc::new(IdentityStore::new()));
        let config = IdentityConfig::new(url, self.proof(service));
        let (client, renewing) = IdentityClient::start(config, Arc::clone(&identity)).unwrap();
        tokio::spawn(renewing);
        client.first(PATIENCE).await.unwrap();
        let connector = Connector::mesh(url, identity).unwrap();
        let node = NodeInfo { id: service.into(), cluster: service.into() };
        let registration = watch::channel(None).1;
        let (discovery, discovering) = Discovery::start(DiscoveryConfig { connector, node, registration });
        tokio::spawn(discovering);
        tokio::time::timeout(PATIENCE, discovery.mesh_known()).await.unwrap();
        discovery
    }
}
