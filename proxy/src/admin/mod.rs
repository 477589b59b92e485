//! The admin port: what an operator may ask a proxy.
//!
//! On loopback: `/ready /live /metrics /config_dump /clusters /breakers /certs /logging /server_info /graph`. A second listener
//! that others can reach (15120) has `/ready /live /metrics` alone. Nothing here is on the way of a request.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use sheetbend_control_plane_client::admin_http::{self, Answer, Asked};
pub use sheetbend_control_plane_client::logging;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::telemetry::Telemetry;

/// How often counts are filed under the time at which they happened: a slot of the graph's last minute.
const TICK: Duration = Duration::from_secs(5);

/// How old the metrics may be that others are shown. Rendering takes milliseconds of the thread that accepts connections
/// too, and others may ask as often as they like.
const FRESH: Duration = Duration::from_secs(1);

/// Metrics as they were shown last, and when.
type Rendered = Mutex<Option<(Instant, Bytes)>>;

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
    /// Brings levels up to date that are measured only when they are asked for.
    pub measure: Box<dyn Fn() + Send + Sync>,
    /// `/config_dump`: the configuration, and the snapshot in use.
    pub config_dump: Document,
    /// `/clusters`: clusters and the state of their endpoints.
    pub clusters: Document,
    /// `/breakers`: which endpoints are ejected, and why.
    pub breakers: Document,
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
    /// Serves until the future is dropped. The listener with [`Scope::Everything`] keeps the graph's time too.
    pub async fn serve(listener: TcpListener, state: Arc<AdminState>, scope: Scope) {
        let telemetry = Arc::clone(&state.telemetry);
        let rendered = Rendered::default();
        let answer = move |asked| answer(&state, scope, &rendered, &asked);
        let served = admin_http::serve(listener, scope == Scope::Everything, answer);
        if scope == Scope::Health {
            return served.await;
        }
        let ticks = async {
            let mut every = tokio::time::interval(TICK);
            loop {
                every.tick().await;
                telemetry.tick();
            }
        };
        tokio::join!(served, ticks);
    }
}

const EVERYTHING: &str = "/ready /live /metrics /config_dump /clusters /breakers /certs /logging /server_info /graph[?format=json|dot|mermaid|table|html]";

fn answer(state: &AdminState, scope: Scope, rendered: &Rendered, asked: &Asked) -> Answer {
    let get = asked.method == Method::GET;
    match (asked.path.as_str(), scope) {
        ("/logging", Scope::Everything) => logging::answer(asked, &state.log_filter, &state.set_log_filter),
        _ if !get => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "Only /logging takes a POST.\n"),
        ("/live", _) => Answer::text(StatusCode::OK, "live\n"),
        ("/ready", _) => match (state.ready)() {
            Ok(()) => Answer::text(StatusCode::OK, "ready\n"),
            Err(why) => Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        ("/metrics" | "/stats/prometheus", _) => Answer {
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            body: match scope {
                Scope::Everything => metrics(state),
                Scope::Health => recent_metrics(state, rendered),
            },
            ..Answer::text(StatusCode::OK, "")
        },
        (_, Scope::Health) => Answer::not_found("/ready /live /metrics"),
        ("/config_dump", _) => Answer::json(&(state.config_dump)()),
        ("/clusters", _) => Answer::json(&(state.clusters)()),
        ("/breakers", _) => Answer::json(&(state.breakers)()),
        ("/certs", _) => Answer::json(&(state.certs)()),
        ("/server_info", _) => Answer::json(&(state.server_info)()),
        ("/graph", _) => Answer::graph(asked, &state.telemetry.graph()),
        ("/", _) => Answer::text(StatusCode::OK, format!("{EVERYTHING}\n")),
        _ => Answer::not_found(EVERYTHING),
    }
}

fn metrics(state: &AdminState) -> Bytes {
    (state.measure)();
    state.telemetry.render_metrics().into()
}

/// Rendered once a second, however many ask.
fn recent_metrics(state: &AdminState, rendered: &Rendered) -> Bytes {
    let mut rendered = rendered.lock().unwrap_or_else(PoisonError::into_inner);
    match &*rendered {
        Some((at, text)) if at.elapsed() < FRESH => text.clone(),
        _ => rendered.insert((Instant::now(), metrics(state))).1.clone(),
    }
}
