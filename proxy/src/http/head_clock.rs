//! How long a request's head may take: 10 s, counted from its first byte. hyper's own timer starts at the end of the
//! request before, and would cut idle connections; for HTTP/2 it has none.
//!
//! The connection is looked at as it is read. Whoever sends a head and does not finish it finds the connection closed;
//! what is between two heads, or within a body, takes as long as it likes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::turns::Turns;
use crate::tcp::Abort;

/// To send a head.
pub(crate) const HEAD_TIME: Duration = Duration::from_secs(10);

/// Whether a connection ended because of its clock. The kernel's own time-outs have no words of ours in them.
pub(crate) fn is_too_slow(error: &(dyn std::error::Error + 'static)) -> bool {
    let ours = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut && error.get_ref().is_some();
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.into_iter().any(|cause| {
        let of_h2 = cause.downcast_ref::<h2::Error>().and_then(h2::Error::get_io);
        cause.downcast_ref::<io::Error>().or(of_h2).is_some_and(ours)
    })
}

/// A connection with a clock.
pub(crate) struct HeadClock<T> {
    io: T,
    turns: Arc<Turns>,
    heads: Heads,
    /// Set only while an unfinished head keeps us waiting, which is seldom; for which one.
    deadline: Option<(usize, Pin<Box<Sleep>>)>,
}

/// Where the heads are in what is read.
enum Heads {
    /// Between the turns.
    Http1,
    Http2(Frames),
}

impl<T> HeadClock<T> {
    pub(crate) fn new(io: T, http2: bool, turns: Arc<Turns>) -> Self {
        let heads = if http2 { Heads::Http2(Frames::default()) } else { Heads::Http1 };
        Self { io, turns, heads, deadline: None }
    }

    /// The connection, which is no longer HTTP.
    pub(crate) fn into_inner(self) -> T {
        self.io
    }

    fn look_at(&mut self, bytes: &[u8]) {
        match &mut self.heads {
            Heads::Http1 => self.turns.read(),
            Heads::Http2(frames) => frames.read(bytes),
        }
    }

    /// Which head is begun and not complete, if one is.
    fn unfinished(&self) -> Option<usize> {
        match &self.heads {
            Heads::Http1 => self.turns.unfinished(),
            Heads::Http2(frames) => frames.unfinished(),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for HeadClock<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        if read.is_ready() {
            this.look_at(buf.filled().get(before..).unwrap_or_default());
            return read;
        }
        let Some(head) = this.unfinished() else {
            this.deadline = None;
            return Poll::Pending;
        };
        let deadline = match &mut this.deadline {
            Some((of, deadline)) if *of == head => deadline,
            // Only one who is slow gets here, so that the box costs nobody else anything.
            other => &mut other.insert((head, Box::pin(sleep(HEAD_TIME)))).1,
        };
        if deadline.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the request's head took longer than 10 s")))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for HeadClock<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.turns.writes();
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.turns.writes();
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        if flushed.is_ready() {
            self.turns.flushed();
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // No request will follow, however long this takes.
        self.turns.leave();
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<T: Abort> Abort for HeadClock<T> {
    fn abort(&mut self) {
        self.io.abort();
    }

    fn is_gone(&self) -> bool {
        self.io.is_gone()
    }
}

/// Where the frames of HTTP/2 begin and end (RFC 9113 §4.1), and with them the heads: HEADERS and CONTINUATION up to
/// END_HEADERS. PURE.
struct Frames {
    /// Of the client's preface, and then of the frame's payload.
    left: usize,
    /// As much of the next frame's header as has come.
    header: [u8; 9],
    have: usize,
    /// Bytes of a head, or of what precedes all heads, are awaited.
    of_head: bool,
    /// A head has not seen its END_HEADERS yet.
    open: bool,
    /// Heads that are complete.
    complete: usize,
}

impl Default for Frames {
    fn default() -> Self {
        const PREFACE: usize = 24;
        Self { left: PREFACE, header: [0; 9], have: 0, of_head: true, open: false, complete: 0 }
    }
}

impl Frames {
    fn read(&mut self, mut bytes: &[u8]) {
        const HEADERS: u8 = 1;
        const CONTINUATION: u8 = 9;
        const END_HEADERS: u8 = 4;
        while !bytes.is_empty() {
            if self.left > 0 {
                let passed = self.left.min(bytes.len());
                bytes = bytes.get(passed..).unwrap_or_default();
                self.left -= passed;
                continue;
            }
            if self.have < self.header.len() {
                for (slot, byte) in self.header[self.have..].iter_mut().zip(bytes) {
                    *slot = *byte;
                }
                let taken = bytes.len().min(self.header.len() - self.have);
                bytes = bytes.get(taken..).unwrap_or_default();
                self.have += taken;
                if self.have < self.header.len() {
                    return;
                }
            }
            let [a, b, c, kind, flags, ..] = self.header;
            self.have = 0;
            self.left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            self.of_head = kind == HEADERS || kind == CONTINUATION;
            if self.of_head {
                self.open = flags & END_HEADERS == 0;
                self.complete += usize::from(!self.open);
            }
        }
    }

    /// Which head, counted from the first, is begun and not complete.
    fn unfinished(&self) -> Option<usize> {
        (self.open || self.have > 0 || (self.left > 0 && self.of_head)).then_some(self.complete)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn frame(length: u32, kind: u8, flags: u8) -> Vec<u8> {
        let mut bytes = length.to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.extend(std::iter::repeat_n(0, length as usize));
        bytes
    }

    fn after(pieces: &[&[u8]]) -> bool {
        let mut frames = Frames::default();
        pieces.iter().for_each(|piece| frames.read(piece));
        frames.unfinished().is_some()
    }

    #[test]
    fn a_head_of_http2_is_unfinished_until_its_last_continuation_whatever_the_pieces() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let settings = frame(18, 4, 0);
        let (headers, continuation) = (frame(40, 1, 0), frame(30, 9, 4));
        assert!(after(&[&preface[..5]]));
        assert!(!after(&[&preface, &settings]));
        assert!(after(&[&preface, &settings, &headers[..20]]));
        assert!(after(&[&preface, &settings, &headers]));
        assert!(!after(&[&preface, &settings, &headers, &continuation]));
        // A body may pause in the middle of a frame.
        assert!(!after(&[&preface, &frame(40, 1, 4), &frame(100, 0, 0)[..50]]));
        let all = [preface, settings, headers, continuation, frame(9, 0, 1)].concat();
        let one_by_one: Vec<&[u8]> = all.chunks(1).collect();
        assert!(!after(&one_by_one));
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_dribbles_is_cut_after_ten_seconds_and_an_idle_connection_is_not() {
        let (mut client, server) = duplex(1024);
        let turns = Arc::new(Turns::default());
        let mut clock = HeadClock::new(server, false, Arc::clone(&turns));
        let mut buffer = [0; 64];
        let day = Duration::from_secs(24 * 3600);
        assert!(tokio::time::timeout(day, clock.read(&mut buffer)).await.is_err(), "idle before the first byte");
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        assert_eq!(clock.read(&mut buffer).await.unwrap(), 16);
        let turn = turns.begin();
        let mut reading = turns.body();
        client.write_all(b"a body").await.unwrap();
        assert_eq!(clock.read(&mut buffer).await.unwrap(), 6);
        assert!(tokio::time::timeout(day, clock.read(&mut buffer)).await.is_err(), "a body may pause");
        reading.end();
        drop(turn);
        assert!(tokio::time::timeout(day, clock.read(&mut buffer)).await.is_err(), "idle between two requests");
        let began = tokio::time::Instant::now();
        let dribble = tokio::spawn(async move {
            while client.write_all(b"G").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let cut = loop {
            if let Err(error) = clock.read(&mut buffer).await {
                break error;
            }
        };
        assert_eq!(cut.kind(), io::ErrorKind::TimedOut);
        assert_eq!(began.elapsed().as_secs(), HEAD_TIME.as_secs());
        assert!(is_too_slow(&cut));
        assert!(!is_too_slow(&io::Error::from_raw_os_error(110)));
        drop(clock);
        dribble.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_is_being_closed_is_not_idle() {
        let (_client, server) = duplex(1024);
        let turns = Arc::new(Turns::default());
        let mut clock = HeadClock::new(server, false, Arc::clone(&turns));
        clock.write_all(b"the last answer").await.unwrap();
        assert!(!turns.is_idle(), "not flushed");
        clock.flush().await.unwrap();
        assert!(turns.is_idle());
        clock.shutdown().await.unwrap();
        assert!(!turns.is_idle());
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_has_no_heads() {
        let (mut client, server) = duplex(1024);
        let turns = Arc::new(Turns::default());
        let mut clock = HeadClock::new(server, false, Arc::clone(&turns));
        turns.leave();
        client.write_all(b"x").await.unwrap();
        let mut buffer = [0; 8];
        assert_eq!(clock.read(&mut buffer).await.unwrap(), 1);
        assert!(tokio::time::timeout(Duration::from_secs(3600), clock.read(&mut buffer)).await.is_err());
    }
}
