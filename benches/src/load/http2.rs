//! HTTP/2 with prior knowledge: connections with a fixed number of streams always in flight.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::Shared;
use crate::frames::{self, Frames};
use crate::origin::SMALL;

/// One connection with `streams` requests to `authority` in flight.
pub(crate) async fn kept(to: SocketAddr, authority: Arc<str>, streams: usize, shared: Arc<Shared>) {
    shared.note(run(to, &authority, streams, &shared).await);
}

/// One request on a connection of its own.
pub(crate) async fn once(to: SocketAddr, authority: &str) -> io::Result<()> {
    let shared = Shared::default();
    tokio::select! {
        // Losing `run` closes its connection, which is all that is left of it.
        outcome = run(to, authority, 1, &shared) => outcome,
        () = async {
            while shared.done.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
        } => Ok(()),
    }
}

async fn run(to: SocketAddr, authority: &str, streams: usize, shared: &Shared) -> io::Result<()> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut requests = Requests { authority, next: 1 };
    let mut out = frames::PREFACE.to_vec();
    // ENABLE_PUSH 0, INITIAL_WINDOW_SIZE 1 MiB; the connection's window of 2^30 outlasts any load here.
    frames::push(&mut out, frames::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 0, 0, 4, 0, 16, 0, 0]);
    frames::push(&mut out, frames::WINDOW_UPDATE, 0, 0, &(1u32 << 30).to_be_bytes());
    for _ in 0..streams {
        requests.push(&mut out);
    }
    let mut frames = Frames::new();
    let (mut bytes, mut answers) = (0, 0);
    while !shared.stopped() {
        stream.write_all(&out).await?;
        out.clear();
        while out.is_empty() {
            if !frames.read_from(&mut stream).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            while let Some(frame) = frames.next_frame() {
                match frame.kind {
                    frames::HEADERS => expect_ok(frame.payload)?,
                    frames::DATA => bytes += frame.payload.len(),
                    frames::RST_STREAM | frames::GOAWAY => {
                        return Err(io::Error::other(format!("frame {}: {:?}", frame.kind, frame.payload)));
                    }
                    _ => frames::acknowledge(&mut out, &frame),
                }
                if matches!(frame.kind, frames::DATA | frames::HEADERS) && frame.flags & frames::END_STREAM != 0 {
                    shared.count();
                    answers += 1;
                    requests.push(&mut out);
                }
            }
        }
    }
    // Streams in flight may have had parts of theirs.
    match bytes < answers * SMALL || bytes > (answers + streams) * SMALL {
        true => Err(io::Error::other(format!("{answers} answers had {bytes} bytes"))),
        false => Ok(()),
    }
}

/// `:status: 200` is one byte of the static table; table size updates (RFC 7541 §6.3) may stand before it.
fn expect_ok(block: &[u8]) -> io::Result<()> {
    let mut rest = block;
    while let [size, after @ ..] = rest
        && size & 0xe0 == 0x20
    {
        let more = if *size == 0x3f { after.iter().position(|b| *b < 0x80).map_or(0, |at| at + 1) } else { 0 };
        rest = after.get(more..).unwrap_or_default();
    }
    match rest.first() {
        Some(0x88) => Ok(()),
        _ => Err(io::Error::other(format!("unexpected header block {block:02x?}"))),
    }
}

struct Requests<'a> {
    authority: &'a str,
    next: u32,
}

impl Requests<'_> {
    /// GET http, the path in full; authority, user-agent and accept enter the peer's table with the first request.
    fn push(&mut self, out: &mut Vec<u8>) {
        let mut block = b"\x82\x86\x04\x06/small".to_vec();
        match self.next {
            1 => {
                block.extend_from_slice(&[0x41, self.authority.len() as u8]);
                block.extend_from_slice(self.authority.as_bytes());
                block.extend_from_slice(b"\x7a\x11sheetbend-bench/1\x53\x03*/*");
            }
            _ => block.extend_from_slice(&[0x80 | 64, 0x80 | 63, 0x80 | 62]),
        }
        frames::push(out, frames::HEADERS, frames::END_HEADERS | frames::END_STREAM, self.next, &block);
        self.next += 2;
    }
}
