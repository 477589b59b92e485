//! Services that register while somebody asks for them: how long until the first answer.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use sheetbend_control_plane_client::identity::Proof;
use sheetbend_control_plane_client::model::AppProtocol;
use sheetbend_proxy::app::{AppPort, Config, Proxy};
use sheetbend_proxy::telemetry::AccessLogSettings;

use crate::load::authority;
use crate::load::http1::{Client, get};
use crate::systems::{Bench, start_caller};

/// Ports that register one after another: enough for a p99, and fewer than one proxy may register.
const PORTS: std::ops::Range<u16> = 10_000..10_200;
/// Longer than any of them should take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between one and the next: whoever changes its registration more than 50 times a second for long is made to wait before
/// a change is accepted, and what follows the acceptance is the question here.
const REST: Duration = Duration::from_millis(21);

/// From just before a port is registered, so a little more than from the moment at which the control plane accepts it,
/// to the answer of the first request that a sidecar routes there; sorted. That sidecar knows beforehand that nobody is
/// there, and has no connection to reuse.
pub(crate) async fn registrations(bench: &Bench<'_>) -> io::Result<Vec<Duration>> {
    let (_caller, entry) = start_caller(bench)?;
    let late = Proxy::start(config(bench)?).await.map_err(io::Error::other)?;
    let mut client = connect(entry).await?;
    let mut taken = Vec::new();
    for port in PORTS {
        let request = get("/small", &authority("late", port));
        if client.ask(&request).await.is_ok() {
            return Err(io::Error::other(format!("port {port} answers before it is registered")));
        }
        let start = Instant::now();
        late.register(port, bench.origin);
        while let Err(error) = client.ask(&request).await {
            if start.elapsed() > PATIENCE {
                return Err(error);
            }
        }
        taken.push(start.elapsed());
        tokio::time::sleep(REST).await;
    }
    taken.sort_unstable();
    Ok(taken)
}

/// Waits for the sidecar's start.
async fn connect(to: SocketAddr) -> io::Result<Client> {
    let start = Instant::now();
    loop {
        match Client::connect(to).await {
            Err(_) if start.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(1)).await,
            outcome => return outcome,
        }
    }
}

/// The sidecar of `late`, within this process: a program registers its ports at its start.
fn config(bench: &Bench<'_>) -> io::Result<Config> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let token = std::fs::read_to_string(bench.mesh.token("late", bench.scratch)?)?;
    let port =
        |port| AppPort { port, local: port, protocol: AppProtocol::Detect, mesh_tls: false, listen: Some(loopback) };
    Ok(Config {
        control_plane: bench.mesh.url.clone(),
        proof: Proof::Join(token.trim().parse().map_err(io::Error::other)?),
        identity_dir: None,
        patience: PATIENCE,
        advertise: loopback.ip(),
        also: Vec::new(),
        standing: Default::default(),
        explicit: None,
        transparent: Vec::new(),
        redirected_inbound: None,
        upstreams: Vec::new(),
        ports: PORTS.map(port).collect(),
        admin: loopback,
        health: None,
        same_user_only: false,
        strict: true,
        allow: Vec::new(),
        dns_servers: Vec::new(),
        deny_unknown: false,
        access_log: AccessLogSettings::default(),
        workers: 1,
    })
}
