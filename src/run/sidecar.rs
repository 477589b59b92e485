//! The sidecar of one program, and the mesh it is part of.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use sheetbend_control_plane::LocalMesh;
use sheetbend_control_plane_client::identity::{JoinToken, Proof};
use sheetbend_control_plane_client::model::Target;
use sheetbend_proxy::app::{self, Config, Proxy};
use sheetbend_proxy::telemetry::{AccessLogFormat, AccessLogOutput, AccessLogSettings};

use super::plan::{AccessLog, AppPort, ControlPlane, Mesh, Plan};
use crate::Failure;

/// How long to wait for the first certificate. A control plane that was started at the same time has these to come up.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long what has been begun may go on when the program has ended.
const LINGER: Duration = Duration::from_secs(5);

/// A sidecar that is ready: it has an identity, listens and knows its control plane.
pub(super) struct Sidecar {
    proxy: Proxy,
    /// Serves this user's mesh, or stands by to do so.
    mesh: Option<LocalMesh>,
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
        let (mesh, token, control_plane, advertise) = match &plan.mesh {
            Mesh::Local => {
                let failed = |why| Failure::new(format!("this user's mesh in {}: {why}", plan.state.display()));
                let mesh = LocalMesh::join_or_hold(&plan.state).await.map_err(failed)?;
                let joined = mesh.join(&plan.service, &plan.namespace).await.map_err(failed)?;
                (Some(mesh), joined.token, joined.control_plane, IpAddr::V4(Ipv4Addr::LOCALHOST))
            }
            Mesh::Remote { control_plane, token, advertise } => {
                let advertise = match advertise {
                    Some(ip) => *ip,
                    None => seen_by(control_plane)?,
                };
                (None, token.clone(), control_plane.to_string(), advertise)
            }
        };
        let config = config(plan, parse_token(&token, plan)?, control_plane.clone(), advertise);
        let proxy = Proxy::start(config).await.map_err(|why| unready(&why))?;
        let outbound = proxy.explicit().ok_or_else(|| Failure::new("the sidecar has no way out"))?;
        let host = super::plan::control_plane(&control_plane).map(|parsed| parsed.host);
        let control_plane_host = host.unwrap_or_else(|_| "127.0.0.1".to_string());
        Ok(Self { admin: proxy.admin(), proxy, mesh, outbound, control_plane, control_plane_host })
    }

    /// Tells the mesh that a port is served, at `app`.
    pub(super) fn register(&self, port: AppPort, app: SocketAddr) {
        self.proxy.register(port.port, app);
    }

    /// Tells the mesh that nothing is served here any more, and waits a moment for that to be heard.
    pub(super) async fn withdraw(&self) {
        self.proxy.withdraw().await;
        self.proxy.drain();
    }

    /// Finishes what has been begun, and ends.
    pub(super) async fn end(self) {
        self.proxy.shutdown(LINGER).await;
        if let Some(mesh) = self.mesh {
            mesh.shutdown().await;
        }
    }
}

fn parse_token(text: &str, plan: &Plan) -> Result<JoinToken, Failure> {
    let token: JoinToken = text.parse().map_err(|why| Failure::usage(format!("--token-file: {why}")))?;
    match token.id.workload() {
        Some((namespace, service)) if namespace == plan.namespace && service == plan.service => Ok(token),
        _ => Err(Failure::usage(format!(
            "--token-file: the token is for {}, not for service {} in namespace {}; make one with `sheetbend token \
             create --service {} --namespace {}`",
            token.id, plan.service, plan.namespace, plan.service, plan.namespace
        ))),
    }
}

fn config(plan: &Plan, token: JoinToken, control_plane: String, advertise: IpAddr) -> Config {
    let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // The machine's own mesh stays on loopback; others must reach what is advertised.
    let inbound = match plan.mesh {
        Mesh::Local => loopback(0),
        Mesh::Remote { .. } if advertise.is_loopback() => SocketAddr::new(advertise, 0),
        // What is advertised may be another machine's address that leads here.
        Mesh::Remote { .. } if advertise.is_ipv4() => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        Mesh::Remote { .. } => SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, 0)),
    };
    let ports = plan.ports.iter().map(|port| app::AppPort {
        port: port.port,
        local: port.local,
        protocol: port.protocol,
        mesh_tls: port.mesh_tls,
        listen: Some(inbound),
    });
    let upstreams = plan.upstreams.iter().filter_map(|upstream| {
        // Port 80 of a service with a single port is that port.
        let target = Target::new(&upstream.service, upstream.port.unwrap_or(80)).ok()?;
        Some((loopback(upstream.local), target))
    });
    Config {
        control_plane,
        proof: Proof::Join(token),
        identity_dir: None,
        patience: PATIENCE,
        advertise,
        also: Vec::new(),
        standing: plan.standing.clone(),
        explicit: Some(loopback(0)),
        transparent: Vec::new(),
        redirected_inbound: None,
        upstreams: upstreams.collect(),
        ports: ports.collect(),
        admin: loopback(0),
        health: None,
        same_user_only: true,
        strict: plan.strict,
        allow: plan.allow.clone(),
        dns_servers: plan.dns_servers.clone(),
        deny_unknown: plan.deny_unknown,
        access_log: access_log(plan.access_log),
        workers: std::thread::available_parallelism().map_or(1, usize::from).min(2),
    }
}

fn access_log(which: AccessLog) -> AccessLogSettings {
    let format = match which {
        AccessLog::Json => AccessLogFormat::Json,
        AccessLog::Off | AccessLog::Failures | AccessLog::All => AccessLogFormat::Text,
    };
    let output = match which {
        AccessLog::Off => AccessLogOutput::Writer(Box::new(std::io::sink())),
        AccessLog::Failures | AccessLog::All | AccessLog::Json => AccessLogOutput::Stderr,
    };
    AccessLogSettings { all: matches!(which, AccessLog::All | AccessLog::Json), format, output }
}

/// The address of this machine from which the control plane is reached. Nothing is sent: connecting a datagram socket
/// only looks the way up.
fn seen_by(control_plane: &ControlPlane) -> Result<IpAddr, Failure> {
    use std::net::ToSocketAddrs;
    let unknown = |why: std::io::Error| {
        Failure::new(format!(
            "no way to {control_plane} from here: {why}; check --control-plane, or give --advertise IP"
        ))
    };
    let address = (control_plane.host.as_str(), control_plane.port).to_socket_addrs().map_err(unknown)?.next();
    let address = address.ok_or_else(|| unknown(std::io::ErrorKind::NotFound.into()))?;
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).map_err(unknown)?;
    socket.connect(address).map_err(unknown)?;
    Ok(socket.local_addr().map_err(unknown)?.ip())
}

fn unready(why: &app::StartError) -> Failure {
    match why {
        app::StartError::Identity { control_plane, .. } => Failure::new(format!(
            "{why}; check that a control plane listens on {control_plane} and that the token is fresh"
        )),
        other => Failure::new(other),
    }
}
