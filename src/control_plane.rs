//! `sheetbend control-plane`: the tiny control plane.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use sheetbend_control_plane::{Config, ControlPlane, StartError};
use sheetbend_control_plane_client::logging;
use tokio::signal::unix::{SignalKind, signal};

use crate::Failure;

// Texts, not typed values: every bad one is reported at once, not the first alone.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The CA's folder, as `sheetbend certs init` makes it
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// A folder of resources, read again whenever it changes
    #[arg(long, value_name = "DIR")]
    resources: Option<PathBuf>,
    /// Where certificates and discovery are served
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15112")]
    listen: String,
    /// Where the admin and the graph page are served: loopback only
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15110")]
    admin: String,
    /// A DNS name or address under which proxies reach this control plane; may be repeated
    #[arg(long = "dns", visible_alias = "advertise", value_name = "NAME")]
    names: Vec<String>,
    /// An address, or a range, that a proxy may register without connecting from it; may be repeated
    #[arg(long = "allow-address", value_name = "RANGE")]
    allowed: Vec<String>,
    /// Where registrations and spent tokens are kept (default: `state` in the CA's folder)
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let config = config(args)?;
    log_to_stderr();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot start threads: {error}")))?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<ExitCode, Failure> {
    let asked = |error| Failure::new(format!("cannot listen for signals: {error}"));
    // Before anything is served: whoever starts us may stop us at any moment.
    let mut terminate = signal(SignalKind::terminate()).map_err(asked)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(asked)?;
    let control_plane = ControlPlane::start(config).await.map_err(|error| match error {
        StartError::Invalid(_) => Failure::usage(error),
        error => Failure::new(error),
    })?;
    eprintln!("certificates and discovery on {}", control_plane.url());
    eprintln!("admin and graph page on http://{}/graph", control_plane.admin());
    tokio::select! {
        // Both mean the same.
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    control_plane.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

fn config(args: Args) -> Result<Config, Failure> {
    let mut problems = Vec::new();
    let mut config = Config::new(args.dir);
    let hint = "write ADDRESS:PORT, for example 127.0.0.1:15112 or [::]:15112";
    config.listen = read::<SocketAddr>("--listen", &args.listen, hint, &mut problems).unwrap_or(config.listen);
    config.admin = read::<SocketAddr>("--admin", &args.admin, hint, &mut problems).unwrap_or(config.admin);
    for text in &args.allowed {
        let range = match text.contains('/') {
            true => text.clone(),
            false => format!("{text}/{}", if text.contains(':') { 128 } else { 32 }),
        };
        let hint = "write one like 192.0.2.7 or 10.0.0.0/8";
        config.allowed_addresses.extend(read::<ipnet::IpNet>("--allow-address", &range, hint, &mut problems));
    }
    config.resources = args.resources;
    config.names = args.names;
    config.state = args.state.unwrap_or(config.state);
    problems.extend(config.problems());
    match problems.is_empty() {
        true => Ok(config),
        false => Err(Failure::usage(problems.join("\n       "))),
    }
}

fn read<T: FromStr>(flag: &str, text: &str, hint: &str, problems: &mut Vec<String>) -> Option<T>
where
    T::Err: Display,
{
    match text.parse() {
        Ok(value) => Some(value),
        Err(error) => {
            problems.push(format!("{flag} {text}: {error}; {hint}"));
            None
        }
    }
}

fn log_to_stderr() {
    let told = std::env::var("RUST_LOG").ok();
    // What is no filter is told, and does not keep the mesh from its control plane.
    let wrong = told.as_deref().and_then(|told| logging::install(told).err());
    if told.is_none() || wrong.is_some() {
        let _ = logging::install("info");
    }
    wrong.iter().for_each(|why| tracing::warn!("RUST_LOG: {why}"));
}
