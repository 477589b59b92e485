//! `sheetbend-proxy`: the sidecar alone, for a pod or a host whose traffic is redirected to it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::identity::{JoinToken, Proof};
use sheetbend_control_plane_client::model::{AppProtocol, Standing, Target};
use sheetbend_proxy::app::{AppPort, Config, Proxy};
use sheetbend_proxy::telemetry::{AccessLogOutput, AccessLogSettings};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Sheetbend sidecar: mutual TLS, discovery and the service graph for the app beside it.
#[derive(Parser)]
#[command(name = "sheetbend-proxy", version, arg_required_else_help = true)]
struct Args {
    /// The control plane
    #[arg(long, value_name = "https://HOST:PORT", env = "SHEETBEND_CONTROL_PLANE")]
    control_plane: String,

    /// The join token, as `sheetbend token create` printed it
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,

    /// Where the identity is kept over restarts; by default in memory alone
    #[arg(long, value_name = "DIR")]
    identity_dir: Option<PathBuf>,

    /// The address by which others reach this proxy. Those after the first are addresses that stand for it when they are
    /// called, such as a pod's of the other family
    #[arg(long, value_name = "IP,…", value_delimiter = ',', default_value = "127.0.0.1")]
    advertise: Vec<IpAddr>,

    /// A port of the app, and what it speaks if that is known (http, http2, grpc, tcp, tls). Registered at once: whoever
    /// starts this proxy knows that the app is there. May be repeated
    #[arg(long, value_name = "PORT[/PROTOCOL]", value_parser = app_port)]
    port: Vec<(u16, AppProtocol)>,

    /// Where connections of the app that were redirected come in. May be repeated
    #[arg(long, value_name = "ADDRESS", default_values = ["127.0.0.1:15101", "[::1]:15101"])]
    outbound: Vec<SocketAddr>,

    /// Where connections for the app that were redirected come in
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15106")]
    inbound: SocketAddr,

    /// Where the app is, if nothing is redirected to --inbound: peers then connect to --inbound itself, for the one --port
    #[arg(long, value_name = "IP")]
    app: Option<IpAddr>,

    /// A listener for apps that name this proxy themselves (http_proxy)
    #[arg(long, value_name = "ADDRESS")]
    explicit: Option<SocketAddr>,

    /// A local port that leads to a service: 5432=postgres:5432. May be repeated
    #[arg(long, value_name = "PORT=SERVICE:PORT", value_parser = upstream)]
    upstream: Vec<(SocketAddr, Target)>,

    /// The admin port, on loopback
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15100")]
    admin: SocketAddr,

    /// Where others may ask for /ready, /live and /metrics, and for nothing else
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:15120")]
    health: SocketAddr,

    /// Where this proxy is. Callers may prefer their own zone
    #[arg(long, value_name = "ZONE", env = "SHEETBEND_ZONE", default_value = "")]
    zone: String,

    /// The share of this instance among those of its service
    #[arg(long, value_name = "N", default_value_t = 1)]
    weight: u32,

    /// This instance is called as too few of those with a lower number serve
    #[arg(long, value_name = "N", default_value_t = 0)]
    priority: u32,

    /// Take nothing but mutual TLS from others
    #[arg(long)]
    strict: bool,

    /// Only this identity may call the app. May be repeated; by default every identity of the mesh
    #[arg(long, value_name = "SPIFFE-ID")]
    allow: Vec<SpiffeId>,

    /// A DNS server that is asked for the addresses of external services (`type: ExternalName`) instead of those of
    /// /etc/resolv.conf. May be repeated
    #[arg(long, value_name = "IP:PORT", env = "SHEETBEND_DNS_SERVER", value_delimiter = ',')]
    dns_server: Vec<SocketAddr>,

    /// Refuse what is no part of the mesh, even where its MeshSettings allow it
    #[arg(long)]
    deny_unknown: bool,

    /// Log every request, not only those that failed
    #[arg(long)]
    access_log: bool,

    /// Threads that carry traffic; by default one a CPU, 2 at most
    #[arg(long, value_name = "N")]
    workers: Option<usize>,

    /// What is logged to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "SHEETBEND_LOG")]
    log: String,
}

fn upstream(text: &str) -> Result<(SocketAddr, Target), String> {
    let wrong = || "write PORT=SERVICE:PORT, for example 5432=postgres:5432".to_string();
    let (local, target) = text.split_once('=').ok_or_else(wrong)?;
    let local = local.parse::<u16>().map_err(|_| wrong())?;
    let target = target.parse().map_err(|_| wrong())?;
    Ok((SocketAddr::from((Ipv4Addr::LOCALHOST, local)), target))
}

fn app_port(text: &str) -> Result<(u16, AppProtocol), String> {
    let (port, protocol) = text.split_once('/').map_or((text, None), |(port, protocol)| (port, Some(protocol)));
    let port = port.parse().map_err(|_| format!("`{port}` is not a port"))?;
    Ok((port, protocol.map_or(Ok(AppProtocol::Detect), str::parse)?))
}

fn main() -> ExitCode {
    sheetbend_proxy::listen::make_room_for_descriptors();
    // Huge pages make buffers resident that idle connections never used: 20 KiB a connection instead of 12, 25 MiB for an
    // idle pair instead of 14, in a bare pair built alike. Nothing was slower without them. A kernel without the call has
    // none.
    rustix::thread::disable_transparent_huge_pages(true).ok();
    let args = Args::parse();
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err((status, why)) => {
            eprintln!("error: {why}");
            ExitCode::from(status)
        }
    }
}

/// A failure: the exit status (2 for a wrong flag) and what to say.
type Failure = (u8, String);

fn run(args: Args) -> Result<(), Failure> {
    sheetbend_proxy::admin::logging::install(&args.log).map_err(|why| (2, format!("--log: {why}")))?;
    let file = args.token_file.display();
    let token = std::fs::read_to_string(&args.token_file).map_err(|why| (2, format!("--token-file {file}: {why}")))?;
    let token: JoinToken = token.trim().parse().map_err(|why| (2, format!("--token-file {file}: {why}")))?;
    if args.app.is_some() && args.port.len() != 1 {
        return Err((2, format!("--app needs one --port, here are {}: --inbound leads to that one", args.port.len())));
    }
    let app = args.app;
    let ports = args.port.iter().map(|(port, _)| *port).collect();
    let Some(&advertise) = args.advertise.first() else { return Err((2, "--advertise: name an address".into())) };
    let standing = Standing { weight: args.weight, priority: args.priority, zone: args.zone.into() };
    standing.check().map_err(|why| (2, format!("--{why}")))?;
    let config = Config {
        control_plane: args.control_plane,
        proof: Proof::Join(token),
        identity_dir: args.identity_dir,
        patience: Duration::from_secs(60),
        advertise,
        standing,
        also: args.advertise.into_iter().skip(1).collect(),
        explicit: args.explicit,
        transparent: args.outbound,
        redirected_inbound: app.is_none().then_some(args.inbound),
        upstreams: args.upstream,
        ports: args
            .port
            .iter()
            .map(|(port, protocol)| AppPort {
                port: *port,
                local: *port,
                protocol: *protocol,
                mesh_tls: false,
                listen: app.map(|_| args.inbound),
            })
            .collect(),
        admin: args.admin,
        health: Some(args.health),
        same_user_only: false,
        strict: args.strict,
        allow: args.allow,
        dns_servers: args.dns_server,
        deny_unknown: args.deny_unknown,
        access_log: AccessLogSettings { all: args.access_log, output: AccessLogOutput::Stdout, ..Default::default() },
        workers: args.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from).min(2)),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|why| (1, format!("cannot start: {why}")))?;
    runtime.block_on(serve(config, ports, app.unwrap_or(Ipv4Addr::LOCALHOST.into())))
}

async fn serve(config: Config, ports: Vec<u16>, app: IpAddr) -> Result<(), Failure> {
    /// How long others may still connect after the registration is withdrawn.
    const STILL_ACCEPTS: Duration = Duration::from_secs(5);
    /// When inbound is gone.
    const GONE: Duration = Duration::from_secs(25);
    let listen = |kind| signal(kind).map_err(|why| (1, format!("cannot listen for signals: {why}")));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let proxy = tokio::select! {
        started = Proxy::start(config) => started.map_err(|why| (1, why.to_string()))?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    for port in ports {
        proxy.register(port, SocketAddr::new(app, port));
    }
    tracing::info!(admin = %proxy.admin(), "ready");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    proxy.withdraw().await;
    proxy.drain();
    // A second signal is impatient.
    tokio::select! {
        () = tokio::time::sleep(STILL_ACCEPTS) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    proxy.shutdown(GONE - STILL_ACCEPTS).await;
    Ok(())
}
