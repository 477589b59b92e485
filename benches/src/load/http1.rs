//! HTTP/1.1: kept connections, and a new connection for each request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{AUTHORITY, Shared};
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

    /// Sends `request` and reads the whole answer, which must be a 200 with a `content-length`. Gives the body's length.
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
        let length = body_length(&self.buffer[..head])?;
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
        Ok(length)
    }
}

fn body_length(head: &[u8]) -> io::Result<usize> {
    let wrong = || io::Error::other(format!("unexpected answer: {}", String::from_utf8_lossy(head)));
    if !head.starts_with(b"HTTP/1.1 200") {
        return Err(wrong());
    }
    let text = std::str::from_utf8(head).map_err(|_| wrong())?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .ok_or_else(wrong)
}

/// A GET as an ordinary client sends it.
pub(crate) fn get(path: &str) -> Arc<[u8]> {
    format!("GET {path} HTTP/1.1\r\nHost: {AUTHORITY}\r\nUser-Agent: sheetbend-bench/1\r\nAccept: */*\r\n\r\n")
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
