//! A small HTTP client: says exactly what it is told, over a connection that the story made.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::app::AnyBody;

/// What may go wrong with a call: only printed.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// How long an answer may take: who waits for it wants it, not its speed.
pub(crate) const WITHIN: Duration = Duration::from_secs(30);

/// A whole response.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// What came after the body.
    pub trailers: HeaderMap,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("not JSON: {e}: {}", self.text()))
    }
}

/// An HTTP/1.1 connection.
pub async fn http1(to: SocketAddr) -> Result<http1::SendRequest<Full<Bytes>>, Error> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

/// An HTTP/2 connection with prior knowledge over any stream.
pub async fn http2(stream: TcpStream) -> Result<http2::SendRequest<Full<Bytes>>, Error> {
    stream.set_nodelay(true)?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// The same, for bodies of any kind.
pub async fn http2_of_any(stream: TcpStream) -> Result<http2::SendRequest<AnyBody>, Error> {
    stream.set_nodelay(true)?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Reads a response to its end.
pub async fn read(response: http::Response<hyper::body::Incoming>) -> Result<Answer, Error> {
    let (head, body) = response.into_parts();
    let body = body.collect().await?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    Ok(Answer { status: head.status, headers: head.headers, body: body.to_bytes(), trailers })
}

/// One request over a connection of its own: `to` is where to connect, `url` what to ask for. An absolute `url` is what
/// a client says to a proxy; a path is what it says to a server. Half a minute at most.
pub async fn send(to: SocketAddr, method: &str, url: &str, body: impl Into<Bytes>) -> Result<Answer, Error> {
    let host = url.split_once("://").map_or(to.to_string(), |(_, rest)| rest.split('/').next().unwrap_or("").into());
    let request = Request::builder().method(method).uri(url).header("host", host).body(Full::from(body.into()))?;
    let call = async { read(http1(to).await?.send_request(request).await?).await };
    tokio::time::timeout(WITHIN, call).await?
}

/// `GET` of [`send`].
pub async fn get(to: SocketAddr, url: &str) -> Result<Answer, Error> {
    send(to, "GET", url, "").await
}

/// The body of a page, for who waits on this very thread. Five seconds at most.
pub(crate) fn page(of: SocketAddr, path: &str) -> std::io::Result<String> {
    let within = Duration::from_secs(5);
    let mut stream = std::net::TcpStream::connect_timeout(&of, within)?;
    stream.set_read_timeout(Some(within))?;
    // HTTP/1.0: the answer ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {of}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.into()).unwrap_or_default())
}

/// A tunnel through a proxy: `CONNECT target`.
pub async fn tunnel(proxy: SocketAddr, target: &str) -> Result<TcpStream, Error> {
    let mut stream = TcpStream::connect(proxy).await?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    match head.split(' ').nth(1) {
        Some("200") => Ok(stream),
        _ => Err(format!("no tunnel to {target}: {head}").into()),
    }
}
