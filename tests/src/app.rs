//! A program of a story's own: an HTTP server in the test's process, for what no ordinary server does.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::wait::loopback;

/// A body of any kind.
pub type AnyBody = BoxBody<Bytes, Infallible>;

/// An HTTP server (1.1 or 2 by its first bytes) on a free loopback port. Dropping it ends it.
#[derive(Debug)]
pub struct App {
    /// Where it listens.
    pub address: SocketAddr,
    /// Requests that it has seen.
    pub seen: Arc<AtomicU64>,
    accepting: JoinHandle<()>,
}

impl App {
    /// A server that answers every request with `answer`.
    pub async fn start<A, F>(answer: A) -> Self
    where
        A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        Self::on(TcpListener::bind(loopback(0)).await.expect("a free port"), answer)
    }

    /// The same on a listener that is there already.
    pub fn on<A, F>(listener: TcpListener, answer: A) -> Self
    where
        A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let address = listener.local_addr().expect("a bound socket has an address");
        let seen = Arc::new(AtomicU64::new(0));
        let count = seen.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let _ = stream.set_nodelay(true);
                let (answer, count) = (answer.clone(), count.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        count.fetch_add(1, Ordering::Relaxed);
                        let answer = answer(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, seen, accepting }
    }

    /// A server that answers every request with `text`.
    pub async fn saying(text: &'static str) -> Self {
        Self::start(move |_| async move { Response::new(full(text)) }).await
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A body that is there already.
pub fn full(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).boxed()
}

/// A body of `length` bytes that is made as it is read.
pub fn long(length: u64) -> AnyBody {
    Long { left: length }.boxed()
}

struct Long {
    left: u64,
}

impl Body for Long {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        static PIECE: [u8; 16 * 1024] = [b'k'; 16 * 1024];
        if self.left == 0 {
            return std::task::Poll::Ready(None);
        }
        let length = PIECE.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= length as u64;
        std::task::Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&PIECE[..length])))))
    }
}
