//! Servers that do with each request what the request itself plans: fail, hang, break off, and answer well in the end.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::app::{AnyBody, full};
use crate::wait::loopback;

/// Names a request, whichever attempt of it a server hears.
pub const ORDER: &str = "x-order";
/// What is done with its first attempt, with its second, and so on, with commas between; the last word holds for all
/// further ones.
///
/// A number is a status; `early-503` a status before the body is read. `reset` and `refused` break the connection
/// (HTTP/1.1) or the stream, `hang` never answers. `grpc-14` is a gRPC status in the head of an answer without a body,
/// `ends-14` one in the trailers of an answer without a message, `says-14` one after a message.
pub const PLAN: &str = "x-plan";

/// An attempt as a server heard it.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Which of the servers.
    pub server: usize,
    /// When its head came.
    pub at: Instant,
    /// Its headers.
    pub headers: HeaderMap,
    /// As much of its body as has come.
    pub body: Vec<u8>,
    /// What came after the body.
    pub trailers: HeaderMap,
}

/// Some servers that know of each other's attempts. Dropping it ends them.
#[derive(Debug)]
pub struct Planned {
    /// Where they listen.
    pub ports: Vec<u16>,
    heard: Arc<Mutex<HashMap<String, Vec<Heard>>>>,
    accepting: Vec<JoinHandle<()>>,
}

impl Planned {
    /// So many servers, each on a free loopback port, of HTTP/1.1 and HTTP/2 by the first bytes.
    pub async fn start(servers: usize) -> Self {
        let heard = Arc::default();
        let mut planned = Self { ports: Vec::new(), heard, accepting: Vec::new() };
        for server in 0..servers {
            let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
            planned.ports.push(listener.local_addr().expect("a bound socket has an address").port());
            planned.accepting.push(tokio::spawn(accept(listener, server, Arc::clone(&planned.heard))));
        }
        planned
    }

    /// The attempts that were heard of a request.
    pub fn heard(&self, order: &str) -> Vec<Heard> {
        self.lock().get(order).cloned().unwrap_or_default()
    }

    /// How many attempts were heard of all requests.
    pub fn all(&self) -> usize {
        self.lock().values().map(Vec::len).sum()
    }

    /// Whether an attempt was heard that is like this.
    pub fn any(&self, like: impl Fn(&Heard) -> bool) -> bool {
        self.lock().values().flatten().any(like)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Vec<Heard>>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Planned {
    fn drop(&mut self) {
        self.accepting.iter().for_each(JoinHandle::abort);
    }
}

async fn accept(listener: TcpListener, server: usize, heard: Arc<Mutex<HashMap<String, Vec<Heard>>>>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let heard = Arc::clone(&heard);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, server, Arc::clone(&heard)));
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error resets a stream with its reason, and breaks a connection of HTTP/1.1.
async fn answer(
    request: Request<Incoming>,
    server: usize,
    heard: Arc<Mutex<HashMap<String, Vec<Heard>>>>,
) -> Result<Response<AnyBody>, h2::Error> {
    let said = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_string();
    let (order, plan) = (said(ORDER), said(PLAN));
    let (head, mut body) = request.into_parts();
    let attempt = {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        let attempts = heard.entry(order.clone()).or_default();
        let (body, trailers) = (Vec::new(), HeaderMap::new());
        attempts.push(Heard { server, at: Instant::now(), headers: head.headers, body, trailers });
        attempts.len() - 1
    };
    let words: Vec<&str> = plan.split(',').collect();
    let word = words.get(attempt).or(words.last()).copied().unwrap_or_default();
    if let Some(status) = word.strip_prefix("early-") {
        return Ok(status_of(status));
    }
    while let Some(Ok(frame)) = body.frame().await {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(this) = heard.get_mut(&order).and_then(|attempts| attempts.get_mut(attempt)) else { break };
        match frame.into_data() {
            Ok(data) => this.body.extend_from_slice(&data),
            Err(frame) => this.trailers = frame.into_trailers().unwrap_or_default(),
        }
    }
    let number = |word: &str| word.rsplit('-').next().unwrap_or_default().to_string();
    match word {
        "hang" => std::future::pending().await,
        "reset" => Err(h2::Reason::INTERNAL_ERROR.into()),
        "refused" => Err(h2::Reason::REFUSED_STREAM.into()),
        word if word.starts_with("grpc-") => Ok(grpc(full(""), Some(number(word)))),
        word if word.starts_with("ends-") => Ok(grpc(ending("", number(word)), None)),
        word if word.starts_with("says-") => Ok(grpc(ending("\0\0\0\0\x02hi", number(word)), None)),
        status => Ok(status_of(status)),
    }
}

/// With what our proxies tell each other, and nobody believes from a server.
fn status_of(status: &str) -> Response<AnyBody> {
    let answer = Response::builder().status(status).header("sheetbend-unsent", "?1").header("sheetbend-retried", "?1");
    answer.body(full("planned\n")).unwrap_or_else(|_| Response::new(full("planned\n")))
}

fn grpc(body: AnyBody, status: Option<String>) -> Response<AnyBody> {
    let answer = Response::builder().header("content-type", "application/grpc");
    let answer = status.into_iter().fold(answer, |answer, status| answer.header("grpc-status", status));
    answer.body(body).expect("a valid answer")
}

/// A message, if there is one, and trailers.
fn ending(message: &'static str, status: String) -> AnyBody {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.parse().expect("a number"));
    let message = (!message.is_empty()).then(|| Frame::data(Bytes::from_static(message.as_bytes())));
    let frames = message.into_iter().chain([Frame::trailers(trailers)]).map(Ok::<_, Infallible>);
    StreamBody::new(tokio_stream::iter(frames)).boxed()
}

/// A service with its endpoints on loopback, as an operator writes them down. Ends with a separator.
pub fn service(name: &str, ports: &[u16]) -> String {
    let mut text =
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n");
    for port in ports {
        let _ = write!(
            text,
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-{port}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n"
        );
    }
    text
}

/// A route of a service with one rule for everything: `annotations` of it in the form `a: b, c: d`, and what the rule says
/// beside its backend. Ends with a separator.
pub fn route(kind: &str, service: &str, annotations: &str, rule: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\n\
         metadata: {{name: {service}, annotations: {{{annotations}}}}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: {service}}}]\n  \
         rules:\n  - backendRefs: [{{name: {service}, port: 80}}]\n    {rule}\n---\n"
    )
}
