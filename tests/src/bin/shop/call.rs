//! How the parts of the shop call each other, as programs that honour `http_proxy` and `grpc_proxy` do.

use std::sync::Mutex;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::Error;

/// `127.0.0.1:PORT` of `http://127.0.0.1:PORT` in an environment variable.
fn proxy(variable: &str) -> Result<String, Error> {
    let url =
        std::env::var(variable).map_err(|_| format!("{variable} is not set: the shop runs under `sheetbend run`"))?;
    let authority = url.strip_prefix("http://").unwrap_or(&url);
    Ok(authority.trim_end_matches('/').to_string())
}

/// An HTTP/1.1 client with keep-alive, through `http_proxy`.
#[derive(Default)]
pub(crate) struct Http {
    idle: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
}

impl Http {
    pub(crate) async fn call(&self, method: Method, url: &str, body: &str) -> Result<(StatusCode, Bytes), Error> {
        let idle = self.idle.lock().expect("no panic holds this lock").pop();
        let mut sender = match idle.filter(|sender| sender.is_ready()) {
            Some(sender) => sender,
            None => Self::connect().await?,
        };
        let authority = url.split('/').nth(2).ok_or("an absolute URL")?;
        let request = Request::builder().method(method).uri(url).header("host", authority);
        let response = sender.send_request(request.body(Full::from(body.to_string()))?).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if sender.ready().await.is_ok() {
            self.idle.lock().expect("no panic holds this lock").push(sender);
        }
        Ok((status, body))
    }

    async fn connect() -> Result<http1::SendRequest<Full<Bytes>>, Error> {
        let stream = TcpStream::connect(proxy("http_proxy")?).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// Asks the proxy for a tunnel to `target`, `pay:9000`.
pub(crate) async fn tunnel(variable: &str, target: &str) -> Result<TcpStream, Error> {
    let mut stream = TcpStream::connect(proxy(variable)?).await?;
    stream.set_nodelay(true)?;
    stream.write_all(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // Byte by byte: what follows the head belongs to whoever uses the tunnel.
        head.push(stream.read_u8().await?);
        if head.len() > 8192 {
            return Err("an endless answer to CONNECT".into());
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    match head.split(' ').nth(1) {
        Some("200") => Ok(stream),
        _ => Err(format!("no tunnel to {target}: {}", head.lines().next().unwrap_or_default()).into()),
    }
}

/// An HTTP/2 client with one connection, through a tunnel.
pub(crate) struct Http2 {
    target: String,
    sender: tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
}

impl Http2 {
    pub(crate) fn new(target: String) -> Self {
        Self { target, sender: tokio::sync::Mutex::new(None) }
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Result<(StatusCode, Bytes), Error> {
        let mut sender = self.sender().await?;
        let uri = format!("http://{}{path}", self.target);
        let response = sender.send_request(Request::post(uri).body(Full::from(body.to_string()))?).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    async fn sender(&self) -> Result<http2::SendRequest<Full<Bytes>>, Error> {
        let mut slot = self.sender.lock().await;
        if let Some(sender) = slot.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = tunnel("http_proxy", &self.target).await?;
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        *slot = Some(sender.clone());
        Ok(sender)
    }
}

/// A client that sends a line and reads a line, over a local port.
pub(crate) struct Lines {
    port: u16,
    connection: tokio::sync::Mutex<Option<BufReader<TcpStream>>>,
}

impl Lines {
    pub(crate) fn new(port: u16) -> Self {
        Self { port, connection: tokio::sync::Mutex::new(None) }
    }

    pub(crate) async fn ask(&self, question: &str) -> Result<String, Error> {
        let mut slot = self.connection.lock().await;
        // Taken out while in use: a call that fails leaves no half-used connection behind.
        let mut stream = match slot.take() {
            Some(stream) => stream,
            None => BufReader::new(TcpStream::connect(("127.0.0.1", self.port)).await?),
        };
        stream.write_all(format!("{question}\n").as_bytes()).await?;
        let mut answer = String::new();
        if stream.read_line(&mut answer).await? == 0 {
            return Err("stock closed the connection".into());
        }
        *slot = Some(stream);
        Ok(answer.trim_end().to_string())
    }
}
