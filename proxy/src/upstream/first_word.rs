//! What an endpoint says first on a connection of HTTP/2 by prior knowledge: its SETTINGS (RFC 9113 §3.4), or something that
//! is no HTTP/2, as servers do that know HTTP/1.1 alone.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::EndpointState;
use crate::tcp::Abort;

/// Whether an endpoint speaks HTTP/2, as far as it was ever asked to without being asked whether it does.
#[derive(Debug, Default)]
pub(super) struct SpeaksHttp2(AtomicU8);

const NEVER_HEARD: u8 = 0;
const YES: u8 = 1;
const NO: u8 = 2;

impl SpeaksHttp2 {
    /// Whether it never did, and answered with something else. One that did before has no such excuse.
    pub(super) fn never(&self) -> bool {
        self.0.load(Relaxed) == NO
    }

    /// It began with these bytes.
    fn heard(&self, first: [u8; 4]) -> bool {
        /// The type of a frame comes after three bytes of its length (RFC 9113 §4.1).
        const SETTINGS: u8 = 4;
        let yes = first[3] == SETTINGS;
        if yes {
            self.0.store(YES, Relaxed);
        } else {
            let _ = self.0.compare_exchange(NEVER_HEARD, NO, Relaxed, Relaxed);
        }
        yes
    }
}

/// A connection of which the first bytes are looked at.
pub(super) struct FirstWord<T> {
    io: T,
    endpoint: Arc<EndpointState>,
    first: [u8; 4],
    heard: usize,
}

impl<T> FirstWord<T> {
    pub(super) fn new(io: T, endpoint: Arc<EndpointState>) -> Self {
        Self { io, endpoint, first: [0; 4], heard: 0 }
    }

    /// Whether what comes next may still be HTTP/2.
    fn listen(&mut self, said: &[u8]) -> bool {
        let wanted = self.first.get_mut(self.heard..).unwrap_or_default();
        if wanted.is_empty() {
            return true;
        }
        for (place, byte) in wanted.iter_mut().zip(said) {
            *place = *byte;
            self.heard += 1;
        }
        self.heard < self.first.len() || self.endpoint.speaks_http2.heard(self.first)
    }
}

impl<T: AsyncRead + Unpin> FirstWord<T> {
    /// Who has answered and hung up resets what is still sent: its answer is there to be read all the same.
    fn written<W>(&mut self, written: Poll<io::Result<W>>, cx: &mut Context<'_>) -> Poll<io::Result<W>> {
        if self.heard < self.first.len() && matches!(written, Poll::Ready(Err(_))) {
            let mut room = [0; 64];
            let mut room = ReadBuf::new(&mut room);
            // Of a broken connection there is something to read at once, its end at least; the runtime may have yet to hear
            // of it. Writing then fails again.
            let _ = ready!(Pin::new(&mut self.io).poll_read(cx, &mut room));
            self.listen(room.filled());
        }
        written
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for FirstWord<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        match this.listen(buf.filled().get(before..).unwrap_or_default()) {
            true => Poll::Ready(Ok(())),
            false => Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "this is not HTTP/2"))),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for FirstWord<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, buf);
        self.written(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.written(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = Pin::new(&mut self.io).poll_flush(cx);
        self.written(written, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<T: Abort> Abort for FirstWord<T> {
    fn abort(&mut self) {
        self.io.abort();
    }

    fn is_gone(&self) -> bool {
        self.io.is_gone()
    }

    fn expect_steady_reader(&self) {
        self.io.expect_steady_reader();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_never_spoke_it_has_an_excuse_and_one_that_did_has_none() {
        let speaks = SpeaksHttp2::default();
        assert!(!speaks.never());
        assert!(!speaks.heard(*b"HTTP"));
        assert!(speaks.never());
        assert!(speaks.heard([0, 0, 18, 4]));
        assert!(!speaks.heard(*b"HTTP"));
        assert!(!speaks.never());
    }
}
