//! As much of HTTP/2 framing (RFC 9113 §4) as a load generator and an origin need; header blocks are never decoded.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;

pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// What a client says first.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One whole frame.
pub(crate) struct Frame<'a> {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: &'a [u8],
}

/// Bytes that came, cut into frames.
pub(crate) struct Frames {
    buffer: Vec<u8>,
    taken: usize,
}

impl Frames {
    /// A client's side: nothing read yet.
    pub(crate) fn new() -> Self {
        Self { buffer: Vec::with_capacity(64 * 1024), taken: 0 }
    }

    /// A server's side: `buffer` starts with a preface, or a part of it.
    pub(crate) fn after_preface(buffer: Vec<u8>) -> Self {
        Self { buffer, taken: PREFACE.len() }
    }

    /// Reads once. False at the end of the stream.
    pub(crate) async fn read_from(&mut self, from: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
        if self.taken >= self.buffer.len() {
            self.taken -= self.buffer.len();
            self.buffer.clear();
        } else if self.taken > 32 * 1024 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        Ok(from.read_buf(&mut self.buffer).await? > 0)
    }

    /// The next frame, once it is whole.
    pub(crate) fn next_frame(&mut self) -> Option<Frame<'_>> {
        let rest = self.buffer.get(self.taken..)?;
        let (head, rest) = rest.split_first_chunk::<9>()?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = rest.get(..length)?;
        self.taken += 9 + length;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }
}

/// Appends one frame; `payload` is below 16 KiB.
pub(crate) fn push(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = (payload.len() as u32).to_be_bytes();
    out.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Answers what must be acknowledged: SETTINGS and PING.
pub(crate) fn acknowledge(out: &mut Vec<u8>, frame: &Frame<'_>) {
    match frame.kind {
        SETTINGS if frame.flags & ACK == 0 => push(out, SETTINGS, ACK, 0, &[]),
        PING if frame.flags & ACK == 0 => push(out, PING, ACK, 0, frame.payload),
        _ => {}
    }
}
