//! What the admin port shows, on loopback only. All that it changes is what is logged.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use sheetbend_certs::format_time;
use sheetbend_control_plane_client::admin_http::{self, Answer, Asked};
use sheetbend_control_plane_client::logging;
use tokio::net::TcpListener;

use crate::metrics;
use crate::report::Reports;
use crate::state::{Shared, lock, stopped};

/// What the admin shows.
pub(crate) struct Admin {
    pub(crate) shared: Arc<Shared>,
    pub(crate) reports: Reports,
    pub(crate) started: Instant,
}

/// Serves until it is told to stop.
pub(crate) async fn serve(listener: TcpListener, admin: Admin) {
    let mut stopping = admin.shared.stopping();
    tokio::select! {
        // Who asks while we stop gets no answer.
        () = admin_http::serve(listener, true, move |asked| admin.answer(&asked)) => {}
        () = stopped(&mut stopping) => {}
    }
}

impl Admin {
    fn answer(&self, asked: &Asked) -> Answer {
        if asked.path == "/logging" {
            return logging::answer(asked, logging::filter, logging::set_filter);
        }
        if asked.method != Method::GET {
            return Answer::text(StatusCode::METHOD_NOT_ALLOWED, "Only /logging takes a POST.\n");
        }
        match asked.path.as_str() {
            "/" | "/graph" => Answer::graph(asked, &self.reports.snapshot()),
            "/live" => Answer::text(StatusCode::OK, "live\n"),
            "/ready" => Answer::text(StatusCode::OK, "ready\n"),
            "/metrics" => Answer {
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                ..Answer::text(StatusCode::OK, metrics::render(&self.shared, self.started))
            },
            "/roots" => match self.shared.roots() {
                Ok((active, proxies)) => Answer::json(&json!({ "active": active, "proxies": proxies })),
                Err(error) => {
                    Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("the CA cannot be read: {error}\n"))
                }
            },
            "/registrations" => Answer::json(&self.registrations()),
            "/resources" => Answer::json(&self.resources()),
            "/certs" => Answer::json(&self.certs()),
            "/config_dump" => Answer::json(&self.config_dump()),
            "/server_info" => Answer::json(&json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "uptime_seconds": self.started.elapsed().as_secs(),
            })),
            _ => Answer::not_found(
                "/graph /ready /live /metrics /logging /registrations /roots /resources /certs /config_dump /server_info",
            ),
        }
    }

    fn registrations(&self) -> Value {
        let all = self.shared.registrations();
        let one = |(registered, state, since): &(crate::registry::Registered, &'static str, Duration)| {
            json!({
                "identity": registered.instance.identity,
                "node": registered.instance.node,
                "address": registered.address,
                "ports": registered.ports,
                "state": state,
                "seconds": since.as_secs(),
            })
        };
        json!({ "registrations": all.values().map(one).collect::<Vec<_>>() })
    }

    fn resources(&self) -> Value {
        let between = self.shared.problems();
        let folder = lock(&self.shared.folder);
        let Some(folder) = folder.as_ref() else { return json!({ "folder": null, "files": [] }) };
        let files = folder.files().iter().map(|(path, state)| {
            json!({
                "file": path,
                "resources": state.resources().map(|r| r.key()).collect::<Vec<_>>(),
                "refused": state.problems().first().map(ToString::to_string),
                "problems": state.problems(),
            })
        });
        json!({ "folder": folder.path(), "files": files.collect::<Vec<_>>(), "problems": between })
    }

    fn certs(&self) -> Value {
        let trust = self.shared.worlds().borrow().trust.clone();
        let now = SystemTime::now();
        let roots = trust.bundle.roots().iter().map(|root| {
            let digest = root.sha256().to_string();
            json!({
                "subject": root.subject(),
                "not_after": format_time(root.not_after()),
                "seconds_left": root.not_after().duration_since(now).unwrap_or_default().as_secs(),
                "active": digest == trust.active,
                "sha256": digest,
            })
        });
        json!({ "roots": roots.collect::<Vec<_>>() })
    }

    /// What every stream was told, and what the mesh is.
    fn config_dump(&self) -> Value {
        let worlds = self.shared.worlds().borrow().clone();
        let streams = self.shared.streams().into_iter().map(|stream| {
            let kinds: serde_json::Map<String, Value> =
                stream.kinds.iter().map(|(kind, told)| (format!("{kind:?}"), json!(told))).collect();
            json!({
                "identity": stream.instance.as_ref().map(|i| i.identity.to_string()),
                "node": stream.instance.as_ref().map(|i| i.node.clone()),
                "dialect": stream.dialect,
                "address": stream.address,
                "since": format_time(stream.since),
                "kinds": kinds,
            })
        });
        json!({
            "world": worlds.number,
            "mesh": &*worlds.near.mesh,
            "destinations": worlds.near.destinations().map(|d| json!(&**d)).collect::<Vec<_>>(),
            "streams": streams.collect::<Vec<_>>(),
        })
    }
}
