//! A server that is well, or fails in one of the ways in which servers do, as a story tells it.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use socket2::{SockRef, Socket};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::app::{AnyBody, full};
use crate::mesh::{START, Sidecar};
use crate::wait::{eventually, loopback};

/// How a server fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// It answers.
    Well,
    /// It answers 503.
    Fails,
    /// It takes requests, and answers none until it fares otherwise.
    Hangs,
    /// It takes requests, and resets their connections.
    Resets,
    /// It answers after so long.
    Slow(Duration),
}

/// An HTTP/1.1 server on a free loopback port, well at first. Dropping it ends it.
#[derive(Debug)]
pub struct Moody {
    /// Where it listens.
    pub address: SocketAddr,
    seen: Arc<AtomicU64>,
    posts: Arc<Mutex<Vec<String>>>,
    mood: watch::Sender<Mood>,
    accepting: JoinHandle<()>,
}

impl Moody {
    /// Starts one.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (mood, told) = watch::channel(Mood::Well);
        let seen = Arc::<AtomicU64>::default();
        let posts = Arc::<Mutex<Vec<String>>>::default();
        let (count, paths) = (Arc::clone(&seen), Arc::clone(&posts));
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let _ = stream.set_nodelay(true);
                let Ok(socket) = SockRef::from(&stream).try_clone().map(Arc::new) else { continue };
                let (told, count, paths) = (told.clone(), Arc::clone(&count), Arc::clone(&paths));
                let service = service_fn(move |request: Request<Incoming>| {
                    count.fetch_add(1, Ordering::Relaxed);
                    if request.method() == Method::POST {
                        paths.lock().unwrap_or_else(PoisonError::into_inner).push(request.uri().path().into());
                    }
                    answer(told.clone(), Arc::clone(&socket))
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, seen, posts, mood, accepting }
    }

    /// So many of them.
    pub async fn some<const N: usize>() -> [Self; N] {
        let mut started = Vec::new();
        for _ in 0..N {
            started.push(Self::start().await);
        }
        started.try_into().expect("as many as were started")
    }

    /// From now on, requests that hang included.
    pub fn becomes(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    /// Requests that it has seen.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// The paths of all POSTs that it has seen.
    pub fn posts(&self) -> Vec<String> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A service `web` of these endpoints, as an operator writes them down.
    pub fn service(endpoints: &[Self]) -> String {
        let mut text =
            String::from("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n");
        for port in endpoints.iter().map(|endpoint| endpoint.address.port()) {
            let _ = write!(
                text,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: web-{port}, labels: {{kubernetes.io/service-name: web}}}}\n\
                 addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
            );
        }
        text
    }
}

impl Drop for Moody {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn answer(mut told: watch::Receiver<Mood>, socket: Arc<Socket>) -> std::io::Result<Response<AnyBody>> {
    let mood = *told.borrow_and_update();
    match mood {
        Mood::Well => {}
        Mood::Slow(after) => tokio::time::sleep(after).await,
        Mood::Hangs => drop(told.wait_for(|mood| *mood != Mood::Hangs).await),
        Mood::Fails => {
            let mut answer = Response::new(full("failed\n"));
            *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            return Ok(answer);
        }
        Mood::Resets => {
            // Whoever closes a socket that lingers for no time resets its connection.
            let _ = socket.set_linger(Some(Duration::ZERO));
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
    }
    Ok(Response::new(full("well\n")))
}

/// What `/breakers` of a sidecar says of an endpoint, or null.
pub async fn breaker(caller: &Sidecar, endpoint: SocketAddr) -> Value {
    let page = caller.page("/breakers").await.json();
    let place = endpoint.to_string();
    let found = page["endpoints"].as_array().into_iter().flatten().find(|one| one["endpoint"] == place.as_str());
    found.cloned().unwrap_or(Value::Null)
}

/// Waits until `/breakers` of a sidecar shows an endpoint in a state, and gives what it says.
pub async fn becomes(caller: &Sidecar, endpoint: SocketAddr, state: &str) -> Value {
    eventually(&format!("{endpoint} is {state}"), START, || async {
        Some(breaker(caller, endpoint).await).filter(|said| said["state"] == state)
    })
    .await
}
