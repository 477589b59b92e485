//! A server on a loopback port: HTTP/1.1 or HTTP/2 by its first bytes.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

use crate::Error;

/// Answers each request with what `answer` makes of its method, path and body; an error is a 500 with its words.
pub(crate) async fn http<S, F>(port: u16, shop: S, answer: fn(Arc<S>, Method, String, Bytes) -> F) -> Result<(), Error>
where
    S: Send + Sync + 'static,
    F: Future<Output = Result<(StatusCode, String), Error>> + Send + 'static,
{
    let shop = Arc::new(shop);
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let shop = shop.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let shop = shop.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let (status, text) = match answer(shop, head.method, head.uri.path().to_string(), body).await {
                    Ok(answer) => answer,
                    Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
                };
                let mut response = Response::new(Full::<Bytes>::from(text));
                *response.status_mut() = status;
                Ok::<_, hyper::Error>(response)
            }
        });
        tokio::spawn(async move {
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
