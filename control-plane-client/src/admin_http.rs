//! A small HTTP server for admin ports, and the client that asks one.
//!
//! What is served is for the machine's operator, so the server guards against everybody else who can make a browser
//! or a process talk to it: a `Host` that is no loopback name is refused (DNS rebinding), what another site's page
//! asks is refused, and what changes something takes a POST that no browser sends by itself. It is bounded: 64
//! connections,
//! of which the oldest goes when one more comes, 8 of another host; a minute each, unless something goes on; 5 s and 16 KiB
//! for a head, 4 KiB for a body.

mod events;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use events::Spoken;
pub use events::{EVENT_STREAM, Event, Events, watch};

/// Connections at a time; `/ready` of a kubelet and a few people need few.
const MAX_CONNECTIONS: usize = 64;
/// Of them, those of one host that is not this one.
const MAX_OF_ANOTHER: usize = 8;
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// However busy, a connection ends after this; a page that polls makes another.
const CONNECTION_ENDS_AFTER: Duration = Duration::from_secs(60);
const MAX_HEAD: usize = 16 << 10;
const MAX_BODY: usize = 4 << 10;

/// A request that has passed the guards.
#[derive(Debug)]
pub struct Asked {
    /// GET, HEAD (answered as GET is) or POST.
    pub method: Method,
    /// The path, `/graph`.
    pub path: String,
    /// What follows the `?`.
    pub query: Option<String>,
    /// `Accept`.
    pub accept: Option<String>,
    /// Of a POST, 4 KiB at most.
    pub body: Bytes,
}

impl Asked {
    /// The value of a query parameter, as it stands.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let pairs = self.query.as_deref()?.split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

/// What is answered.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// `content-type`.
    pub content_type: &'static str,
    /// `content-security-policy`, for pages.
    pub content_security_policy: Option<&'static str>,
    /// The body.
    pub body: Bytes,
    /// What is said after it, for as long as the client is there.
    pub events: Option<mpsc::Receiver<Bytes>>,
}

impl Answer {
    /// Text.
    pub fn text(status: StatusCode, text: impl Into<String>) -> Self {
        let body = Bytes::from(text.into());
        Self { status, content_type: "text/plain; charset=utf-8", content_security_policy: None, body, events: None }
    }

    /// A JSON document.
    pub fn json(document: &serde_json::Value) -> Self {
        let body = Bytes::from(format!("{document:#}\n"));
        Self {
            status: StatusCode::OK,
            content_type: "application/json",
            content_security_policy: None,
            body,
            events: None,
        }
    }

    /// The graph in the form that was asked for.
    pub fn graph(asked: &Asked, graph: &crate::graph::Graph) -> Self {
        use crate::graph::{Format, body, content_security_policy};
        match Format::of_request(asked.query.as_deref(), asked.accept.as_deref()) {
            Ok(format) => Self {
                status: StatusCode::OK,
                content_type: format.content_type(),
                content_security_policy: (format == Format::Html).then(content_security_policy),
                body: Bytes::from(body(format, graph)),
                events: None,
            },
            Err(unknown) => Self::text(StatusCode::BAD_REQUEST, format!("{unknown}\n")),
        }
    }

    /// Nothing here, and what there is instead.
    pub fn not_found(paths: &str) -> Self {
        Self::text(StatusCode::NOT_FOUND, format!("There is no such path. There is: {paths}\n"))
    }
}

/// Serves until the future is dropped. `guarded` asks of every request to come from this machine by a loopback name:
/// set for a listener on loopback, not for one that shows health and metrics to others.
pub async fn serve<F>(listener: TcpListener, guarded: bool, answer: F)
where
    F: Fn(Asked) -> Answer + Send + Sync + 'static,
{
    let answer = Arc::new(answer);
    let mut open: VecDeque<(IpAddr, AbortHandle)> = VecDeque::new();
    let mut connections = JoinSet::new(); // Dropped with this future, and ends them all.
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of files, most likely: others free some, and a busy loop would not help them.
                tracing::warn!(%error, "the admin port cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        open.retain(|(_, connection)| !connection.is_finished());
        let hosts: Vec<IpAddr> = open.iter().map(|(host, _)| *host).collect();
        if let Some((_, oldest)) = goes_for(peer.ip(), &hosts).and_then(|place| open.remove(place)) {
            oldest.abort();
        }
        let answer = Arc::clone(&answer);
        let connection = connections.spawn(async move {
            let goes_on = AtomicBool::new(false);
            lives(connection(socket, peer, guarded, answer, &goes_on), CONNECTION_ENDS_AFTER, &goes_on).await;
        });
        open.push_back((peer.ip(), connection));
    }
}

/// Ends a connection after so long, unless something goes on in it by then.
async fn lives(connection: impl Future, long: Duration, goes_on: &AtomicBool) {
    let mut connection = std::pin::pin!(connection);
    while tokio::time::timeout(long, &mut connection).await.is_err() && goes_on.load(Relaxed) {}
}

/// Which connection goes when one of `host` comes: the oldest, of its own if it has as many as it may.
fn goes_for(host: IpAddr, open: &[IpAddr]) -> Option<usize> {
    let own = open.iter().filter(|other| **other == host).count();
    match open.len() {
        _ if own >= MAX_OF_ANOTHER && !host.to_canonical().is_loopback() => {
            open.iter().position(|other| *other == host)
        }
        MAX_CONNECTIONS.. => Some(0),
        _ => None,
    }
}

/// `goes_on` is set once something is said that has no end of its own: hyper ends it with its client.
async fn connection<F>(
    socket: TcpStream,
    peer: SocketAddr,
    guarded: bool,
    answer: Arc<F>,
    goes_on: &AtomicBool,
) -> Result<(), hyper::Error>
where
    F: Fn(Asked) -> Answer + Send + Sync + 'static,
{
    let service = service_fn(move |request| {
        let answer = Arc::clone(&answer);
        async move {
            let response = respond(request, peer, guarded, &*answer).await;
            goes_on.fetch_or(response.body().more.is_some(), Relaxed);
            Ok::<_, Infallible>(response)
        }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .await
}

async fn respond<F>(request: Request<Incoming>, peer: SocketAddr, guarded: bool, answer: &F) -> Response<Spoken>
where
    F: Fn(Asked) -> Answer,
{
    let (head, body) = request.into_parts();
    let allowed = match guarded {
        true => guard(&head.method, &head.headers, peer),
        false if head.method == Method::POST => Err("Changes are taken on loopback only."),
        false => Ok(()),
    };
    let answered = match allowed {
        Err(why) => Answer::text(StatusCode::FORBIDDEN, format!("{why}\n")),
        Ok(()) if !matches!(head.method, Method::GET | Method::HEAD | Method::POST) => {
            Answer::text(StatusCode::METHOD_NOT_ALLOWED, "GET, or POST for what changes something.\n")
        }
        Ok(()) => match tokio::time::timeout(HEAD_WITHIN, Limited::new(body, MAX_BODY).collect()).await {
            Ok(Ok(body)) => answer(Asked {
                method: if head.method == Method::HEAD { Method::GET } else { head.method },
                path: head.uri.path().to_string(),
                query: head.uri.query().map(str::to_string),
                accept: head.headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).map(str::to_string),
                body: body.to_bytes(),
            }),
            Ok(Err(_)) => Answer::text(StatusCode::PAYLOAD_TOO_LARGE, "4 KiB of body at most.\n"),
            Err(_) => Answer::text(StatusCode::REQUEST_TIMEOUT, "The body took too long.\n"),
        },
    };
    let mut response = Response::new(Spoken { whole: answered.body, more: answered.events });
    *response.status_mut() = answered.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(answered.content_type));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, header::HeaderValue::from_static("no-referrer"));
    let policy = answered.content_security_policy.unwrap_or("default-src 'none'; frame-ancestors 'none'");
    headers.insert(header::CONTENT_SECURITY_POLICY, header::HeaderValue::from_static(policy));
    response
}

/// Who may ask on loopback: this machine, by a loopback name, and no page of another site.
fn guard(method: &Method, headers: &HeaderMap, peer: SocketAddr) -> Result<(), &'static str> {
    if !peer.ip().to_canonical().is_loopback() {
        return Err("Only this machine may ask.");
    }
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    // A page that rebinds its name to 127.0.0.1 still sends its own name.
    if !text("host").is_none_or(is_loopback_name) {
        return Err("The Host must be localhost or a loopback address.");
    }
    if !text("sec-fetch-site").is_none_or(|site| matches!(site, "same-origin" | "none")) {
        return Err("Pages of other sites may not ask.");
    }
    // A browser puts one of these on every POST; curl and `sheetbend` do not.
    if *method == Method::POST && (headers.contains_key("origin") || headers.contains_key("sec-fetch-mode")) {
        return Err("A browser may not change anything here; use curl.");
    }
    Ok(())
}

fn is_loopback_name(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Why an admin port gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Not `http://HOST:PORT`.
    #[error("`{0}` is no address of an admin port: write http://HOST:PORT, for example http://127.0.0.1:15100")]
    Url(String),
    /// Nobody there.
    #[error("cannot reach {0}: {1}")]
    Connect(String, io::Error),
    /// It does not speak HTTP.
    #[error("{0} does not answer as an admin port does: {1}")]
    Http(String, hyper::Error),
    /// It refuses.
    #[error("{0} answered {1}: {2}")]
    Status(String, StatusCode, String),
    /// It takes too long.
    #[error("{0} did not answer within 5 s")]
    Timeout(String),
}

/// Asks `http://HOST:PORT` for a path; gives the body of a 200, 64 MiB at most. Takes 5 s at most.
pub async fn get(base: &str, path: &str) -> Result<Bytes, AskError> {
    ask(base, Method::GET, path, Bytes::new()).await
}

/// The same by a POST, with a body.
pub async fn post(base: &str, path: &str, body: impl Into<Bytes>) -> Result<Bytes, AskError> {
    ask(base, Method::POST, path, body.into()).await
}

async fn ask(base: &str, method: Method, path: &str, body: Bytes) -> Result<Bytes, AskError> {
    let authority = authority(base)?;
    within(authority.as_str(), ask_once(authority.as_str(), method, path, body)).await
}

fn authority(base: &str) -> Result<http::uri::Authority, AskError> {
    let wrong = || AskError::Url(base.to_string());
    let authority = base.strip_prefix("http://").unwrap_or(base).trim_end_matches('/');
    let parsed: http::uri::Authority = authority.parse().map_err(|_| wrong())?;
    if parsed.port_u16().is_none() || parsed.as_str().contains('@') {
        return Err(wrong());
    }
    Ok(parsed)
}

async fn within<T>(who: &str, ask: impl Future<Output = Result<T, AskError>>) -> Result<T, AskError> {
    tokio::time::timeout(Duration::from_secs(5), ask).await.unwrap_or_else(|_| Err(AskError::Timeout(who.to_string())))
}

async fn ask_once(authority: &str, method: Method, path: &str, body: Bytes) -> Result<Bytes, AskError> {
    let mut tasks = JoinSet::new();
    let response = begin(authority, method, path, body, None, &mut tasks).await?;
    Ok(whole(response.into_body()).await)
}

/// Asks, over a connection that `tasks` keeps; gives the head of a 200.
async fn begin(
    authority: &str,
    method: Method,
    path: &str,
    body: Bytes,
    accept: Option<&str>,
    tasks: &mut JoinSet<Result<(), hyper::Error>>,
) -> Result<Response<Incoming>, AskError> {
    let http = |error| AskError::Http(authority.to_string(), error);
    let stream = TcpStream::connect(authority).await.map_err(|e| AskError::Connect(authority.to_string(), e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    tasks.spawn(connection);
    let request = Request::builder().method(method).uri(path).header(header::HOST, authority);
    let request = accept.into_iter().fold(request, |request, accept| request.header(header::ACCEPT, accept));
    let request = request.body(Full::new(body)).map_err(|_| AskError::Url(authority.to_string()))?;
    let response = sender.send_request(request).await.map_err(http)?;
    let status = response.status();
    if status != StatusCode::OK {
        let body = whole(response.into_body()).await;
        let said: String = String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(2_000).collect();
        return Err(AskError::Status(authority.to_string(), status, said));
    }
    Ok(response)
}

async fn whole(body: Incoming) -> Bytes {
    const MAX_ANSWER: usize = 64 << 20;
    Limited::new(body, MAX_ANSWER).collect().await.map(|body| body.to_bytes()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn started(guarded: bool) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, guarded, |asked| {
            Answer::text(StatusCode::OK, format!("{} {}", asked.method, asked.path))
        }));
        address
    }

    /// Asked again where the machine takes longer than an operator's tools wait.
    async fn told(base: &str, path: &str) -> Bytes {
        let mut tries = 10;
        loop {
            tries -= 1;
            match get(base, path).await {
                Err(AskError::Timeout(_)) if tries > 0 => {}
                answer => return answer.unwrap(),
            }
        }
    }

    async fn raw(address: SocketAddr, head: &str) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(format!("{head}\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut said = String::new();
        socket.read_to_string(&mut said).await.unwrap();
        said
    }

    #[tokio::test]
    async fn this_machine_gets_an_answer() {
        let address = started(true).await;
        assert_eq!(told(&format!("http://{address}"), "/graph").await, "GET /graph");
        for host in ["localhost", "localhost:15100", "127.0.0.1:1", "[::1]:1"] {
            assert!(
                raw(address, &format!("GET / HTTP/1.1\r\nhost: {host}")).await.starts_with("HTTP/1.1 200"),
                "{host}"
            );
        }
        assert!(
            raw(address, "POST /logging HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0")
                .await
                .contains("POST /logging")
        );
    }

    #[tokio::test]
    async fn a_page_of_another_site_gets_none() {
        let address = started(true).await;
        let refused = [
            "GET / HTTP/1.1\r\nhost: evil.example",
            "GET / HTTP/1.1\r\nhost: localhost.evil.example",
            "GET / HTTP/1.1\r\nhost: 192.0.2.1",
            "GET / HTTP/1.1\r\nhost: localhost\r\nsec-fetch-site: cross-site",
            "POST /logging HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost\r\ncontent-length: 0",
            "POST /logging HTTP/1.1\r\nhost: localhost\r\nsec-fetch-mode: cors\r\ncontent-length: 0",
        ];
        for head in refused {
            assert!(raw(address, head).await.starts_with("HTTP/1.1 403"), "{head}");
        }
    }

    #[tokio::test]
    async fn a_listener_that_others_reach_changes_nothing() {
        let address = started(false).await;
        assert!(raw(address, "GET /ready HTTP/1.1\r\nhost: 10.1.2.3:15120").await.starts_with("HTTP/1.1 200"));
        let post = "POST /logging HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0";
        assert!(raw(address, post).await.starts_with("HTTP/1.1 403"));
    }

    #[tokio::test]
    async fn clients_that_send_nothing_do_not_keep_others_out() {
        let address = started(true).await;
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(b"GET / HT").await.unwrap();
            silent.push(socket);
        }
        assert_eq!(told(&format!("http://{address}"), "/ready").await, "GET /ready");
    }

    #[test]
    fn one_host_that_comes_too_often_ends_its_own_connections_and_no_others() {
        let (this, other, third) = ([127, 0, 0, 1].into(), [192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let mut open = vec![third];
        open.resize(1 + MAX_OF_ANOTHER, other);
        assert_eq!(goes_for(other, &open), Some(1));
        assert_eq!(goes_for(third, &open), None);
        open.resize(MAX_CONNECTIONS - 1, this);
        assert_eq!(goes_for(this, &open), None);
        open.push(this);
        assert_eq!(goes_for(this, &open), Some(0));
    }

    #[tokio::test]
    async fn too_large_a_head_or_body_is_refused() {
        let address = started(true).await;
        let large = format!("GET /{} HTTP/1.1\r\nhost: localhost", "x".repeat(2 * MAX_HEAD));
        assert!(!raw(address, &large).await.contains(" 200 "));
        let body = "x".repeat(MAX_BODY + 1);
        let mut socket = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all((head + &body).as_bytes()).await.unwrap();
        let mut said = String::new();
        let _ = socket.read_to_string(&mut said).await;
        assert!(said.starts_with("HTTP/1.1 413"), "{said}");
    }

    #[tokio::test]
    async fn what_is_no_admin_port_is_said_clearly() {
        for wrong in ["", "http://", "127.0.0.1", "https://127.0.0.1:1/x y", "http://user@127.0.0.1:1"] {
            assert!(matches!(get(wrong, "/graph").await, Err(AskError::Url(_))), "{wrong:?}");
        }
        // Held, so that it becomes nobody else's meanwhile.
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let silent = held.local_addr().unwrap();
        assert!(matches!(get(&silent.to_string(), "/graph").await, Err(AskError::Connect(..))));
    }
}
