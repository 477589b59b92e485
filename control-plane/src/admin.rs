//! The admin port: loopback, plain HTTP/1.1, reading only but for what is POST.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use sheetbend_certs::format_time;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::report::Reports;
use crate::state::{Shared, lock, stopped};

/// Connections at once; a page and a few tools.
const MAX_CONNECTIONS: usize = 64;

/// What the admin shows.
pub(crate) struct Admin {
    pub(crate) shared: Arc<Shared>,
    pub(crate) reports: Reports,
    pub(crate) started: Instant,
}

/// Serves until it is told to stop.
pub(crate) async fn serve(listener: TcpListener, admin: Admin) {
    let mut stopping = admin.shared.stopping();
    let admin = Arc::new(admin);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            // Losing either is safe: a connection stays in the listener's queue.
            accepted = listener.accept() => accepted,
            () = stopped(&mut stopping) => return,
        };
        let Ok((socket, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (admin, mut stopping) = (admin.clone(), admin.shared.stopping());
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let admin = admin.clone();
                async move { Ok::<_, Infallible>(admin.answer(&request)) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(60)).max_headers(64);
            let connection = http.serve_connection(TokioIo::new(socket), answer);
            tokio::select! {
                // A connection that ends badly is its client's business.
                _ = connection => {}
                () = stopped(&mut stopping) => {}
            }
            drop(place);
        });
    }
}

type Answer = Response<Full<Bytes>>;

impl Admin {
    fn answer(&self, request: &Request<Incoming>) -> Answer {
        if !is_local(request) {
            return text(StatusCode::FORBIDDEN, "the admin answers to loopback names only\n");
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "nothing here changes by being asked: use GET\n");
        }
        match request.uri().path() {
            "/" | "/graph" => self.graph(request),
            "/live" => text(StatusCode::OK, "live\n"),
            "/ready" => text(StatusCode::OK, "ready\n"),
            "/roots" => pretty(&json!({ "proxies": self.shared.roots() })),
            "/registrations" => pretty(&self.registrations()),
            "/resources" => pretty(&self.resources()),
            "/certs" => pretty(&self.certs()),
            "/config_dump" => pretty(&self.config_dump()),
            "/server_info" => pretty(&json!({
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "uptime_seconds": self.started.elapsed().as_secs(),
            })),
            _ => text(
                StatusCode::NOT_FOUND,
                "/ready /live /graph /registrations /roots /resources /certs /config_dump /server_info\n",
            ),
        }
    }

    fn graph(&self, _request: &Request<Incoming>) -> Answer {
        let _ = &self.reports;
        pretty(&json!({ "nodes": [], "edges": [] }))
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
        let folder = lock(&self.shared.folder);
        let Some(folder) = folder.as_ref() else { return json!({ "folder": null, "files": [] }) };
        let files = folder.files().iter().map(|(path, state)| {
            json!({
                "file": path,
                "resources": state.resources().map(|r| r.key()).collect::<Vec<_>>(),
                "refused": state.refusal().map(ToString::to_string),
            })
        });
        json!({ "folder": folder.path(), "files": files.collect::<Vec<_>>() })
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
            "outbound_policy": self.shared.written().outbound_policy,
            "destinations": worlds.near.destinations().map(|d| json!(&**d)).collect::<Vec<_>>(),
            "streams": streams.collect::<Vec<_>>(),
        })
    }
}

/// A page elsewhere can make a browser ask loopback, but not under a loopback name (DNS rebinding).
fn is_local<T>(request: &Request<T>) -> bool {
    let Some(host) = request.headers().get(header::HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn pretty(value: &Value) -> Answer {
    let mut body = serde_json::to_vec_pretty(value).unwrap_or_default();
    body.push(b'\n');
    respond(StatusCode::OK, "application/json", body)
}

fn text(status: StatusCode, body: &str) -> Answer {
    respond(status, "text/plain; charset=utf-8", body.as_bytes().to_vec())
}

fn respond(status: StatusCode, kind: &'static str, body: Vec<u8>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    answer.headers_mut().insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    answer
}
