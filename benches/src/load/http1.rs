//! HTTP/1.1: kept connections, and a new connection for each request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Shared;
use crate::origin::head_end;

/// One connection of a client.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects.
    pub(crate) async fn connect(to: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends `request` and reads the whole answer, which must have a `content-length`. Gives the body's length, or an
    /// error for anything but a 200.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> io::Result<usize> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(end) = head_end(&self.buffer) {
                break end;
            }
        };
        let text = String::from_utf8_lossy(&self.buffer[..head]);
        let length = body_length(&text).ok_or_else(|| io::Error::other(format!("no content-length: {text}")))?;
        let unexpected = (!text.starts_with("HTTP/1.1 200")).then(|| text.into_owned());
        let mut got = self.buffer.len() - head;
        if got < length && self.buffer.capacity() < 256 * 1024 {
            self.buffer.reserve(256 * 1024);
        }
        while got < length {
            self.buffer.clear();
            match self.stream.read_buf(&mut self.buffer).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => got += n,
            }
        }
        match unexpected {
            None => Ok(length),
            Some(head) => Err(io::Error::other(format!("unexpected answer: {head}"))),
        }
    }
}

fn body_length(head: &str) -> Option<usize> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
}

/// A GET as an ordinary client sends it.
pub(crate) fn get(path: &str, authority: &str) -> Arc<[u8]> {
    format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: sheetbend-bench/1\r\nAccept: */*\r\n\r\n")
        .into_bytes()
        .into()
}

/// One kept connection that asks on and on.
pub(crate) async fn kept(to: SocketAddr, request: Arc<[u8]>, shared: Arc<Shared>) {
    let run = async || {
        let mut client = Client::connect(to).await?;
        while !shared.stopped() {
            client.ask(&request).await?;
            shared.count();
        }
        Ok(())
    };
    shared.note(run().await);
}

/// A new connection for each request, closed by the client.
pub(crate) async fn fresh(to: SocketAddr, request: Arc<[u8]>, shared: Arc<Shared>) {
    while !shared.stopped() {
        let run = async || {
            Client::connect(to).await?.ask(&request).await?;
            shared.count();
            Ok(())
        };
        shared.note(run().await);
    }
}

/// The latencies of requests one after another on one connection, sorted.
pub(crate) async fn latencies(to: SocketAddr, request: &[u8], warm: usize, within: Duration) -> io::Result<Vec<u64>> {
    let mut client = Client::connect(to).await?;
    for _ in 0..warm {
        client.ask(request).await?;
    }
    let mut taken = Vec::with_capacity(1 << 16);
    let end = Instant::now() + within;
    while Instant::now() < end {
        let start = Instant::now();
        client.ask(request).await?;
        taken.push(start.elapsed().as_nanos() as u64);
    }
    taken.sort_unstable();
    Ok(taken)
}
