//! Reading a connection just far enough to know what to do with it. What was read stays in the caller's buffer, to be
//! replayed (see [`crate::rewind`]).

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::client_hello::{self, Hello};
use crate::detect::{self, Detected, detect};

/// Room for one read: most request heads, and a post-quantum ClientHello, come whole.
const ROOM: usize = 4 * 1024;

/// How long to wait for a client that says nothing, or too little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For the first byte. After it, the server is given its chance to speak first. `None` waits for as long as the
    /// client likes, where it is known that the client speaks first.
    pub first_byte: Option<Duration>,
    /// From the first byte to a decision. After it the connection is opaque.
    pub decision: Duration,
}

impl Default for Patience {
    /// 50 ms for the first byte. A request line has as long as its headers have, 10 s, since whoever sends it by hand is
    /// slow, while no protocol that we know pauses after bytes that could still become a request line.
    fn default() -> Self {
        Self { first_byte: Some(Duration::from_millis(50)), decision: Duration::from_secs(10) }
    }
}

/// What the beginning of a connection told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstBytes {
    /// The client spoke. Never [`Detected::NeedMore`].
    Detected(Detected),
    /// The client has not said a byte: perhaps the server speaks first.
    ServerFirst,
    /// The client closed without a byte.
    Closed,
}

/// Reads from `io` into `buf` until it is known what the client speaks. What `buf` already holds counts.
///
/// Cancel safe: bytes that were read are in `buf`.
pub async fn read_first<R>(io: &mut R, buf: &mut BytesMut, patience: Patience) -> io::Result<FirstBytes>
where
    R: AsyncRead + Unpin,
{
    if buf.is_empty() {
        buf.reserve(ROOM);
        let read = match patience.first_byte {
            Some(wait) => match timeout(wait, io.read_buf(buf)).await {
                Ok(read) => read?,
                Err(_) => return Ok(FirstBytes::ServerFirst),
            },
            None => io.read_buf(buf).await?,
        };
        if read == 0 {
            return Ok(FirstBytes::Closed);
        }
    }
    let deadline = Instant::now() + patience.decision;
    loop {
        match detect(buf) {
            Detected::NeedMore => {}
            decided => return Ok(FirstBytes::Detected(decided)),
        }
        // The limit is detect's own: past it there is no NeedMore, so the buffer stays within it and one read.
        debug_assert!(buf.len() < detect::MOST_BYTES);
        buf.reserve(ROOM);
        match timeout_at(deadline, io.read_buf(buf)).await {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) => return Err(error),
            // Ended or fell silent within the ambiguous part: whatever it is, it is no request.
            Ok(Ok(0)) | Err(_) => return Ok(FirstBytes::Detected(Detected::Opaque)),
        }
    }
}

/// Reads from `io` into `buf` until the ClientHello is complete. What `buf` already holds counts. A client that ends, or
/// is not done `within` this time, sent no hello that can be read.
///
/// Cancel safe: bytes that were read are in `buf`. Never gives [`Hello::NeedMore`].
pub async fn read_hello<R>(io: &mut R, buf: &mut BytesMut, within: Duration) -> io::Result<Hello>
where
    R: AsyncRead + Unpin,
{
    let deadline = Instant::now() + within;
    loop {
        match client_hello::parse(buf) {
            Hello::NeedMore => {}
            decided => return Ok(decided),
        }
        buf.reserve(ROOM);
        match timeout_at(deadline, io.read_buf(buf)).await {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(0)) | Err(_) => return Ok(Hello::NotParseable),
        }
    }
}

/// Who broke the silence of a connection whose server was dialed before its client had said a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// The client did. Its bytes are in the client's buffer, for [`read_first`] to go on with.
    Client,
    /// The server did, so the connection is opaque. Its bytes are in the server's buffer.
    Server,
    /// The client closed, or closed its half, without a byte.
    ClientClosed,
    /// The server did.
    ServerClosed,
}

/// Listens to both ends until one of them speaks or closes. An error is told together with the end it came from.
///
/// Cancel safe: bytes that were read are in the buffers.
pub async fn who_speaks_first<C, S>(
    client: &mut C,
    client_bytes: &mut BytesMut,
    server: &mut S,
    server_bytes: &mut BytesMut,
) -> Result<Speaker, Broken>
where
    C: AsyncRead + Unpin,
    S: AsyncRead + Unpin,
{
    client_bytes.reserve(ROOM);
    server_bytes.reserve(ROOM);
    // Biased: when both have spoken, the client's bytes decide, and the server's wait in its socket. The losing branch
    // has read nothing, since `read_buf` is cancel safe.
    tokio::select! {
        biased;
        read = client.read_buf(client_bytes) => match read {
            Ok(0) => Ok(Speaker::ClientClosed),
            Ok(_) => Ok(Speaker::Client),
            Err(error) => Err(Broken::Client(error)),
        },
        read = server.read_buf(server_bytes) => match read {
            Ok(0) => Ok(Speaker::ServerClosed),
            Ok(_) => Ok(Speaker::Server),
            Err(error) => Err(Broken::Server(error)),
        },
    }
}

/// Which end of a pair of connections failed.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The end towards the client.
    #[error("the client's connection broke: {0}")]
    Client(#[source] io::Error),
    /// The end towards the server.
    #[error("the server's connection broke: {0}")]
    Server(#[source] io::Error),
}
