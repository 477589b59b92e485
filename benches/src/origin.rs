//! The app behind the proxies: cheap, and the same for every system. One port speaks HTTP/1.1 and HTTP/2 with prior
//! knowledge. `/small` is answered with 128 bytes, `/large` with 1 MiB; over HTTP/2 every answer is the small one.

use std::io;
use std::net::SocketAddr;
use std::sync::LazyLock;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::frames::{self, Frames};

/// Bytes of a small answer's body.
pub(crate) const SMALL: usize = 128;
/// Bytes of a large answer's body.
pub(crate) const LARGE: usize = 1 << 20;

/// The two answers. Made once: to make the large one takes longer than a request.
static ANSWERS: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| [SMALL, LARGE].map(answer));

/// Listens on loopback, and answers there as long as the current runtime lives.
pub(crate) async fn serve() -> io::Result<SocketAddr> {
    LazyLock::force(&ANSWERS);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A connection that ends badly is the proxy's affair: the load generator sees and counts it.
            tokio::spawn(async move { serve_connection(stream).await.ok() });
        }
    });
    Ok(address)
}

async fn serve_connection(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(64 * 1024);
    if stream.read_buf(&mut buffer).await? == 0 {
        return Ok(());
    }
    match buffer.starts_with(b"PRI ") {
        true => serve_http2(stream, buffer).await,
        false => serve_http1(stream, buffer).await,
    }
}

async fn serve_http1(mut stream: TcpStream, mut buffer: Vec<u8>) -> io::Result<()> {
    let [small, large] = &*ANSWERS;
    loop {
        while let Some(end) = head_end(&buffer) {
            let wants_large = buffer.starts_with(b"GET /large");
            buffer.drain(..end);
            stream.write_all(if wants_large { large } else { small }).await?;
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

/// Where the first head in `bytes` ends, its empty line included.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

fn answer(length: usize) -> Vec<u8> {
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\nserver: origin\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\ncontent-type: text/plain\r\n\
         content-length: {length}\r\n\r\n"
    )
    .into_bytes();
    answer.resize(answer.len() + length, b'x');
    answer
}

async fn serve_http2(mut stream: TcpStream, buffer: Vec<u8>) -> io::Result<()> {
    let mut frames = Frames::after_preface(buffer);
    let mut out = Vec::with_capacity(64 * 1024);
    // MAX_CONCURRENT_STREAMS 1000; our own window is never a limit, as no request has a body.
    frames::push(&mut out, frames::SETTINGS, 0, 0, &[0, 3, 0, 0, 3, 232]);
    let mut first = true;
    loop {
        while let Some(frame) = frames.next_frame() {
            match frame.kind {
                frames::HEADERS if frame.flags & frames::END_STREAM != 0 => {
                    push_answer(&mut out, frame.stream, std::mem::take(&mut first));
                }
                _ => frames::acknowledge(&mut out, &frame),
            }
        }
        if !out.is_empty() {
            stream.write_all(&out).await?;
            out.clear();
        }
        if !frames.read_from(&mut stream).await? {
            return Ok(());
        }
    }
}

/// The peer's windows are far larger than what is in flight here: 128 bytes a stream.
fn push_answer(out: &mut Vec<u8>, stream: u32, first: bool) {
    let mut head = vec![0x88];
    match first {
        // content-type, content-length and server enter the peer's table at first, and are one byte each from then on.
        true => {
            head.extend_from_slice(b"\x5f\x0atext/plain\x5c\x03128\x76\x06origin");
        }
        false => head.extend_from_slice(&[0x80 | 64, 0x80 | 63, 0x80 | 62]),
    }
    head.extend_from_slice(b"\x0f\x12\x1dThu, 01 Jan 2026 00:00:00 GMT");
    frames::push(out, frames::HEADERS, frames::END_HEADERS, stream, &head);
    frames::push(out, frames::DATA, frames::END_STREAM, stream, &[b'x'; SMALL]);
}
