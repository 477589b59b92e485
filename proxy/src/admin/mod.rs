//! The admin port: what an operator may ask a proxy.
//!
//! On loopback: `/ready /live /metrics /config_dump /clusters /breakers /explain /certs /logging /server_info /graph`. A second listener
//! that others can reach (15120) has `/ready /live /metrics` alone. Nothing here is on the way of a request.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use sheetbend_control_plane_client::admin_http::{self, Answer, Asked, EVENT_STREAM};
pub use sheetbend_control_plane_client::logging;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
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
    /// `/breakers?watch`: the whole, and then every change.
    pub watch: Watch,
    /// `POST /breakers/ENDPOINT/eject` and `…/restore`: does as an operator says, and shows the endpoint.
    pub operate: Operate,
    /// `POST /explain`: what would be decided for a request, described in JSON.
    pub preview: Preview,
    /// `/certs`: the certificate chain, the trust bundle, when each expires.
    pub certs: Document,
    /// `/server_info`: version, uptime, state.
    pub server_info: Document,
    /// The log filter in use, as `RUST_LOG` writes it.
    pub log_filter: Box<dyn Fn() -> String + Send + Sync>,
    /// Replaces the log filter, or says what is wrong with the new one.
    pub set_log_filter: SetLogFilter,
}

/// Says what would be decided for a request that is described.
pub type Preview = Box<dyn Fn(&[u8]) -> Result<serde_json::Value, Refused> + Send + Sync>;

/// Gives what somebody who watches hears first, and what comes later.
pub type Watch = Box<dyn Fn() -> Result<(Bytes, mpsc::Receiver<Bytes>), Refused> + Send + Sync>;

/// Does as an operator says.
pub type Operate = Box<dyn Fn(&Asked) -> Result<serde_json::Value, Refused> + Send + Sync>;

/// Why an operator's wish is not obeyed: a status, and the reason.
pub type Refused = (StatusCode, String);

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

const EVERYTHING: &str = "/ready /live /metrics /config_dump /clusters /breakers[?watch][/ENDPOINT/eject|restore] /explain[/REQUEST-ID][?format=text] /certs /logging /server_info /graph[?format=json|dot|mermaid|table|html]";

fn answer(state: &AdminState, scope: Scope, rendered: &Rendered, asked: &Asked) -> Answer {
    let get = asked.method == Method::GET;
    match (asked.path.as_str(), scope) {
        ("/logging", Scope::Everything) => logging::answer(asked, &state.log_filter, &state.set_log_filter),
        (path, Scope::Everything) if path == "/explain" || path.starts_with("/explain/") => explain(state, asked),
        (path, Scope::Everything) if path.starts_with("/breakers/") => operate(state, asked),
        _ if !get => Answer::text(
            StatusCode::METHOD_NOT_ALLOWED,
            "Only /logging, /explain and /breakers/ENDPOINT/eject or /restore take a POST.\n",
        ),
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
        ("/breakers", _) if wants_events(asked) => watch(state),
        ("/breakers", _) => Answer::json(&(state.breakers)()),
        ("/certs", _) => Answer::json(&(state.certs)()),
        ("/server_info", _) => Answer::json(&(state.server_info)()),
        ("/graph", _) => Answer::graph(asked, &state.telemetry.graph()),
        ("/", _) => Answer::text(StatusCode::OK, format!("{EVERYTHING}\n")),
        _ => Answer::not_found(EVERYTHING),
    }
}

/// Whether somebody wants a document that goes on.
fn wants_events(asked: &Asked) -> bool {
    let mut parameters = asked.query.as_deref().unwrap_or_default().split('&');
    parameters.any(|one| one == "watch") || asked.accept.as_deref().is_some_and(|types| types.contains(EVENT_STREAM))
}

fn watch(state: &AdminState) -> Answer {
    match (state.watch)() {
        Ok((body, events)) => {
            Answer { body, events: Some(events), content_type: EVENT_STREAM, ..Answer::text(StatusCode::OK, "") }
        }
        Err((status, why)) => Answer::text(status, format!("{why}\n")),
    }
}

/// `/breakers/ENDPOINT/eject` and `…/restore`.
fn operate(state: &AdminState, asked: &Asked) -> Answer {
    if asked.method != Method::POST {
        return Answer::text(StatusCode::METHOD_NOT_ALLOWED, "This changes something, and takes a POST.\n");
    }
    said((state.operate)(asked))
}

fn said(answer: Result<serde_json::Value, Refused>) -> Answer {
    match answer {
        Ok(document) => Answer::json(&document),
        Err((status, why)) => Answer::text(status, format!("{why}\n")),
    }
}

/// `/explain` lists the requests that are told, `/explain/REQUEST-ID` tells one. A POST to `/explain?keep_one_in=N` sets how
/// many successes are kept; one with a request in its body says what would be decided for it.
fn explain(state: &AdminState, asked: &Asked) -> Answer {
    let explained = state.telemetry.explained();
    let id = asked.path.strip_prefix("/explain/");
    if asked.method == Method::POST {
        return match (id, asked.parameter("keep_one_in")) {
            (None, Some(number)) => match number.parse() {
                Ok(number) => {
                    explained.keep_one_in(number);
                    Answer::text(StatusCode::OK, format!("one success in {number} is kept\n"))
                }
                Err(_) => Answer::text(StatusCode::BAD_REQUEST, "keep_one_in takes a number; 0 keeps no success\n"),
            },
            (None, None) => said((state.preview)(&asked.body)),
            (Some(_), _) => Answer::text(StatusCode::METHOD_NOT_ALLOWED, "What was decided cannot be changed.\n"),
        };
    }
    let Some(id) = id else { return Answer::json(&explained.list()) };
    let records = explained.of(id);
    match records.is_empty() {
        true => {
            let of_successes = match explained.one_in() {
                0 => "none".to_string(),
                1 => "all".to_string(),
                number => format!("one in {number}, ten a second at most of each worker"),
            };
            let why = "all failures are kept for a while, and of successes";
            Answer::text(StatusCode::NOT_FOUND, format!("nothing is kept of {id}: {why} {of_successes}\n"))
        }
        false if asked.parameter("format") == Some("text") => {
            Answer::text(StatusCode::OK, records.iter().map(crate::telemetry::explain::text).collect::<String>())
        }
        false => Answer::json(&serde_json::json!({ "request_id": id, "records": records })),
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
