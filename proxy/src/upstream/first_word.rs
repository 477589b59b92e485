//! What an endpoint says first on a connection of HTTP/2 by prior knowledge: its SETTINGS (RFC 9113 §3.4), or something that
//! is no HTTP/2, as servers do that know HTTP/1.1 alone.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::tcp::Abort;

/// What an endpoint said first on one connection, on which nobody has asked it whether it speaks HTTP/2.
#[derive(Debug)]
pub(super) struct Word {
    /// Whether it ever spoke HTTP/2, on whichever connection.
    ever: Arc<AtomicBool>,
    /// It said something else on this one.
    foreign: AtomicBool,
}

impl Word {
    /// Of an endpoint that spoke HTTP/2 at some time, or did not.
    pub(super) fn of(ever: &Arc<AtomicBool>) -> Arc<Self> {
        Arc::new(Self { ever: Arc::clone(ever), foreign: AtomicBool::new(false) })
    }

    /// Whether it answered with something else, and never did in HTTP/2. One that did has no such excuse.
    pub(super) fn knows_no_http2(&self) -> bool {
        self.foreign.load(Relaxed) && !self.ever.load(Relaxed)
    }

    /// It began with these bytes.
    fn heard(&self, first: [u8; 4]) -> bool {
        /// The type of a frame comes after three bytes of its length (RFC 9113 §4.1).
        const SETTINGS: u8 = 4;
        let yes = first[3] == SETTINGS;
        if yes { &self.ever } else { &self.foreign }.store(true, Relaxed);
        yes
    }
}

/// A connection of which the first bytes are looked at.
pub(super) struct FirstWord<T> {
    io: T,
    word: Arc<Word>,
    first: [u8; 4],
    heard: usize,
}

impl<T> FirstWord<T> {
    pub(super) fn new(io: T, word: Arc<Word>) -> Self {
        Self { io, word, first: [0; 4], heard: 0 }
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
        self.heard < self.first.len() || self.word.heard(self.first)
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
        let ever = Arc::default();
        let (first, second) = (Word::of(&ever), Word::of(&ever));
        assert!(!first.heard(*b"HTTP"));
        assert!(first.knows_no_http2());
        assert!(!second.knows_no_http2(), "nothing was said there yet");
        assert!(second.heard([0, 0, 18, 4]));
        let third = Word::of(&ever);
        assert!(!third.heard(*b"HTTP"));
        assert!(!third.knows_no_http2() && !first.knows_no_http2());
    }
}
