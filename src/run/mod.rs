//! `sheetbend run`: a program beside its own sidecar, in one command.
//!
//! The sidecar lives in this process, the program is its child. Order of events: join the mesh, start the sidecar, start
//! the program once the sidecar is ready, register each port when the program first accepts on it; at the end withdraw,
//! tell the program to stop, let the sidecar finish what it has begun, and end with the program's status.
//!
//! - [`plan`]: the flags, checked.  [`command`]: which file the program is.
//! - [`environment`]: what the program finds in its environment.
//! - [`child`], [`signals`]: the program as a process, and who gets which signal.
//! - [`sidecar`]: the proxy and the mesh it is part of.  [`listening`]: when a port accepts, and who reaches it.
//! - [`record`]: the file by which other verbs find this sidecar.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::Failure;

mod child;
mod command;
mod environment;
mod listening;
mod plan;
pub(crate) mod record;
mod sidecar;
mod signals;
mod supervise;

pub(crate) use child::{ProgramArgs, become_program};
pub(crate) use plan::default_state_dir;
use plan::{AccessLog, Plan};

const EXAMPLES: &str = "\
Examples:
  sheetbend run --service web --port 8000 -- python3 -m http.server 8000
  sheetbend run --service caller -- curl http://web/
  sheetbend run --service caller --upstream 5432:postgres -- psql -h 127.0.0.1

Without --control-plane the mesh is this user's own on this machine: every `sheetbend run` of the same user is in it,
one of them serves it, and another takes over when that one ends.

The program finds http_proxy, https_proxy (both cases), grpc_proxy and no_proxy in its environment; clients that follow
them reach a service by its name: http://web/, http://web:8000/, http://web.default.svc.cluster.local:8000/. Any other
client uses a local port given with --upstream.

Exit status: the program's own; 128+n when signal n ended it; 127 when the program is not found, 126 when it cannot be
executed; 2 for a wrong flag; 1 when the sidecar could not be started. SIGTERM withdraws the service first and then
reaches the program; the terminal's Ctrl-C reaches it once.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES, override_usage = "sheetbend run --service NAME [--port PORT] [FLAGS] -- CMD [ARGS]…")]
pub(crate) struct Args {
    /// The service that the program is part of, and its identity in the mesh
    #[arg(long, value_name = "NAME")]
    service: String,

    /// A port on which the program serves; registered when it first accepts. `8001:8000` serves port 8000 of the service
    /// on port 8001 of the program, so that several instances of a service share a machine. `8000/tcp` says what it speaks
    /// (http, http2, grpc, tcp, tls), otherwise that is detected. `8000,tls=mesh` takes mutual TLS from peers that are no
    /// sidecar too, as --strict does. May be repeated
    #[arg(long, value_name = "PORT[:SERVICEPORT]")]
    port: Vec<String>,

    /// A local port that leads to a service, for clients that know nothing of proxies: `5432:postgres`, or
    /// `5432:postgres:5433` where the service has several ports. May be repeated
    #[arg(long, value_name = "LOCALPORT:SERVICE[:PORT]")]
    upstream: Vec<String>,

    /// The namespace of the service
    #[arg(long, value_name = "NAME", default_value = "default")]
    namespace: String,

    /// Join the mesh of this control plane instead of this user's own
    #[arg(long, value_name = "https://HOST:PORT")]
    control_plane: Option<String>,

    /// The join token, as `sheetbend token create` printed it
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// The address by which others reach this machine; by default the one that the control plane sees
    #[arg(long, value_name = "IP")]
    advertise: Option<String>,

    /// Where this machine is. Callers may prefer their own zone
    #[arg(long, value_name = "ZONE", env = "SHEETBEND_ZONE", default_value = "")]
    zone: String,

    /// The share of this instance among those of its service
    #[arg(long, value_name = "N", default_value_t = 1)]
    weight: u32,

    /// This instance is called as too few of those with a lower number serve
    #[arg(long, value_name = "N", default_value_t = 0)]
    priority: u32,

    /// Only this identity may call the program: spiffe://cluster.local/ns/default/sa/web. May be repeated; by default
    /// every identity of the mesh
    #[arg(long, value_name = "SPIFFE-ID")]
    allow: Vec<String>,

    /// Take nothing but mutual TLS from others
    #[arg(long, conflicts_with = "permissive")]
    strict: bool,

    /// Take plain connections from others too (the default)
    #[arg(long)]
    permissive: bool,

    /// A DNS server that is asked for the addresses of external services (`type: ExternalName`) instead of those of
    /// /etc/resolv.conf. May be repeated
    #[arg(long, value_name = "IP:PORT")]
    dns_server: Vec<std::net::SocketAddr>,

    /// What happens to traffic for what is no part of the mesh
    #[arg(long, value_name = "POLICY", default_value = "allow")]
    outbound_policy: OutboundPolicy,

    /// Which requests are logged to stderr
    #[arg(long, value_name = "WHICH", default_value = "failures", num_args = 0..=1, default_missing_value = "all")]
    access_log: AccessLog,

    /// What the sidecar logs to stderr: error, warn, info, debug, trace, or directives such as
    /// `warn,sheetbend_proxy=debug`
    #[arg(long, value_name = "LEVEL", default_value = "warn", env = "SHEETBEND_LOG")]
    log: String,

    /// Where the mesh of this user lives [default: $XDG_STATE_HOME/sheetbend, ~/.local/state/sheetbend]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum OutboundPolicy {
    /// It passes through untouched
    Allow,
    /// It is refused
    Deny,
}

pub(crate) fn run(args: Args) -> Result<ExitCode, Failure> {
    let log = args.log.clone();
    let plan = Plan::new(args)?;
    log_to_stderr(&log)?;
    // Current-thread: the program dies with the thread that started it (see `child`), and that must be the main one.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|why| Failure::new(format!("cannot start: {why}")))?;
    let status = runtime.block_on(supervise::supervise(plan));
    // What is still running (a look-up in a thread, say) has nothing left to wait for.
    runtime.shutdown_background();
    status
}

/// What the sidecar says goes to stderr; stdout is the program's.
fn log_to_stderr(directives: &str) -> Result<(), Failure> {
    sheetbend_proxy::admin::logging::install(directives).map_err(|why| Failure::usage(format!("--log: {why}")))
}
