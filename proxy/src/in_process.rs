//! A connection within this process: two ends that behave as the two ends of a TCP connection do, and cost no socket.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};

use crate::tcp::Abort;

/// What either end may write before the other reads, as much as [`crate::tcp::splice`] moves at a time.
const BUFFER: usize = 64 * 1024;

/// One end.
pub(crate) struct InProcess {
    io: DuplexStream,
    /// One of the ends was reset, not closed.
    reset: Arc<AtomicBool>,
}

/// Both ends.
pub(crate) fn connection() -> (InProcess, InProcess) {
    let (a, b) = duplex(BUFFER);
    let reset = Arc::new(AtomicBool::new(false));
    (InProcess { io: a, reset: Arc::clone(&reset) }, InProcess { io: b, reset })
}

impl Abort for InProcess {
    fn abort(&mut self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    fn is_gone(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }
}

impl AsyncRead for InProcess {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        // The other end's drop looks like its orderly close; the reset was noted before.
        let ended = buf.filled().len() == before && buf.remaining() > 0;
        match ended && self.is_gone() {
            true => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            false => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for InProcess {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_close_is_an_end_and_half_of_it_leaves_the_other_half() {
        let (mut a, mut b) = connection();
        a.write_all(b"question").await.unwrap();
        a.shutdown().await.unwrap();
        let mut heard = String::new();
        b.read_to_string(&mut heard).await.unwrap();
        b.write_all(b"answer").await.unwrap();
        drop(b);
        a.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "questionanswer");
    }

    #[tokio::test]
    async fn a_reset_is_never_an_orderly_end() {
        let (mut a, mut b) = connection();
        a.write_all(b"half of it").await.unwrap();
        a.abort();
        drop(a);
        let error = b.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
