//! Opaque bytes, both ways, until both sides are done.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_rustls::{client, server};

use crate::rewind::Rewind;

/// A connection whose coming close can be turned into a reset.
pub trait Abort {
    /// From now on, dropping the connection tells the peer that it broke (RST), not that it ended (FIN). What has been
    /// written and not yet sent is thrown away.
    fn abort(&mut self);

    /// Whether the peer is known to have reset the connection, or to be unreachable. For the time when nobody reads
    /// from it any more, because it has closed its half: a read would no longer tell.
    fn is_gone(&self) -> bool;

    /// Says that the peer always reads, so that one who does not is gone ([`crate::listen::expect_steady_reader`]). Means
    /// nothing where there is no socket underneath.
    fn expect_steady_reader(&self) {}
}

impl Abort for TcpStream {
    fn abort(&mut self) {
        // Fails only for a socket that is no longer connected, whose close tells nobody anything.
        let _ = self.set_zero_linger();
    }

    fn is_gone(&self) -> bool {
        // ENOTCONN is how Linux tells that a socket has left every connected state.
        self.peer_addr().is_err()
    }

    fn expect_steady_reader(&self) {
        // Without it a lost peer is noticed later; nothing else depends on it.
        let _ = crate::listen::expect_steady_reader(self);
    }
}

impl<T: ?Sized + Abort> Abort for Box<T> {
    fn abort(&mut self) {
        (**self).abort();
    }

    fn is_gone(&self) -> bool {
        (**self).is_gone()
    }

    fn expect_steady_reader(&self) {
        (**self).expect_steady_reader();
    }
}

impl<T: Abort> Abort for Rewind<T> {
    fn abort(&mut self) {
        self.get_mut().abort();
    }

    fn is_gone(&self) -> bool {
        self.get_ref().is_gone()
    }

    fn expect_steady_reader(&self) {
        self.get_ref().expect_steady_reader();
    }
}

impl<T: Abort> Abort for client::TlsStream<T> {
    fn abort(&mut self) {
        self.get_mut().0.abort();
    }

    fn is_gone(&self) -> bool {
        self.get_ref().0.is_gone()
    }
}

impl<T: Abort> Abort for server::TlsStream<T> {
    fn abort(&mut self) {
        self.get_mut().0.abort();
    }

    fn is_gone(&self) -> bool {
        self.get_ref().0.is_gone()
    }

    fn expect_steady_reader(&self) {
        self.get_ref().0.expect_steady_reader();
    }
}

impl<T: Abort> Abort for tokio_rustls::TlsStream<T> {
    fn abort(&mut self) {
        self.get_mut().0.abort();
    }

    fn is_gone(&self) -> bool {
        self.get_ref().0.is_gone()
    }
}

/// Bytes that were written to the other side since the last report.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transferred {
    /// From the client to the server.
    pub client_to_server: u64,
    /// From the server to the client.
    pub server_to_client: u64,
}

/// How a pair of connections ended.
#[derive(Debug)]
pub struct SpliceOutcome {
    /// Bytes that reached the server's socket.
    pub client_to_server: u64,
    /// Bytes that reached the client's socket.
    pub server_to_client: u64,
    /// Whose doing the end was.
    pub ended_by: EndedBy,
}

/// Whose doing it was that a pair of connections ended.
#[derive(Debug)]
pub enum EndedBy {
    /// Both sides closed in order, the client first.
    Client,
    /// Both sides closed in order, the server first.
    Server,
    /// The client's connection broke; the server's gets a reset.
    ClientBroke(io::Error),
    /// The server's connection broke; the client's gets a reset.
    ServerBroke(io::Error),
}

/// Carries bytes between `client` and `server` until both directions have ended, and says how.
///
/// The end of one direction is passed on at once (FIN, or close_notify over TLS) and the other goes on for as long as
/// it likes: half-close lasts, and no timer ends anything. A connection that breaks is a reset on the other side, never
/// an orderly end that would make half a message look whole; what came before it is passed on, and the reset leaves when
/// the caller drops the connection. A side that does not read stops the other from being read.
///
/// `progress` hears about bytes soon after they were written, for metrics of connections that last for days.
pub async fn splice<A, B>(client: &mut A, server: &mut B, progress: impl Fn(Transferred)) -> SpliceOutcome
where
    A: AsyncRead + AsyncWrite + Abort + Unpin,
    B: AsyncRead + AsyncWrite + Abort + Unpin,
{
    let mut up = Half::default();
    let mut down = Half::default();
    let mut watch = Watch::default();
    let mut first = None;
    let mut reported = Transferred::default();

    // Both halves are polled in one task without being joined by `try_join!`: when one ends, even badly, the other must
    // still deliver what its side had sent before.
    let ended_by = poll_fn(|cx| {
        let up_now = up.poll(cx, client, server);
        let down_now = down.poll(cx, server, client);
        let moved = Transferred { client_to_server: up.moved, server_to_client: down.moved };
        if moved != reported {
            progress(Transferred {
                client_to_server: moved.client_to_server - reported.client_to_server,
                server_to_client: moved.server_to_client - reported.server_to_client,
            });
            reported = moved;
        }
        match (up_now, down_now) {
            // Nobody is left to write to, or nobody to read from: neither half can go on.
            (Poll::Ready(End::Source), _) => Poll::Ready(Side::Client.broke(up.error.take())),
            (_, Poll::Ready(End::Source)) => Poll::Ready(Side::Server.broke(down.error.take())),
            (Poll::Ready(End::Sink), Poll::Ready(_)) => Poll::Ready(Side::Server.broke(up.error.take())),
            (Poll::Ready(_), Poll::Ready(End::Sink)) => Poll::Ready(Side::Client.broke(down.error.take())),
            (Poll::Ready(End::Orderly), Poll::Ready(End::Orderly)) => Poll::Ready(match first {
                Some(Side::Server) => EndedBy::Server,
                Some(Side::Client) | None => EndedBy::Client,
            }),
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            // One direction is over. Its source, which nobody reads any more, is looked at now and then.
            (Poll::Ready(_), Poll::Pending) => {
                first.get_or_insert(Side::Client);
                watch.poll(cx, || client.is_gone()).map(|()| Side::Client.broke(None))
            }
            (Poll::Pending, Poll::Ready(_)) => {
                first.get_or_insert(Side::Server);
                watch.poll(cx, || server.is_gone()).map(|()| Side::Server.broke(None))
            }
        }
    })
    .await;

    // A side that had said all it wanted, and only then reset what it was still being sent (a server's early refusal of an
    // upload), has yet to be delivered in full: a reset could throw away what waits in the other's socket.
    match &ended_by {
        EndedBy::ClientBroke(_) if !up.is_orderly() => server.abort(),
        EndedBy::ServerBroke(_) if !down.is_orderly() => client.abort(),
        EndedBy::Client | EndedBy::Server | EndedBy::ClientBroke(_) | EndedBy::ServerBroke(_) => {}
    }
    SpliceOutcome { client_to_server: up.moved, server_to_client: down.moved, ended_by }
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Client,
    Server,
}

impl Side {
    fn broke(self, error: Option<io::Error>) -> EndedBy {
        let error = error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
        match self {
            Side::Client => EndedBy::ClientBroke(error),
            Side::Server => EndedBy::ServerBroke(error),
        }
    }
}

/// How one direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The source closed, and the sink has been told.
    Orderly,
    /// Reading failed.
    Source,
    /// Writing failed.
    Sink,
}

/// One direction. It owns memory only while its sink pushes back: bytes are read into a buffer that the whole thread
/// shares and are written from there, so an idle connection costs no buffer, and a busy one uses warm cache.
#[derive(Debug, Default)]
struct Half {
    /// Read, and not taken by the sink yet.
    waiting: Bytes,
    /// The source has closed; once `waiting` is out, so does the sink.
    closing: bool,
    /// The source has broken; once `waiting` is out, that is how this direction ends.
    broken: Option<io::Error>,
    /// The sink may hold bytes back until it is flushed (TLS records).
    unflushed: bool,
    /// Bytes taken by the sink.
    moved: u64,
    end: Option<End>,
    error: Option<io::Error>,
}

/// Four TLS records of the largest size, and what fits a second-level cache together with the rest of a worker.
const SCRATCH: usize = 64 * 1024;

/// After this many buffers in a row (1 MiB) it is somebody else's turn on this thread.
const ROUNDS: usize = 16;

thread_local! {
    static SPARE: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

impl Half {
    fn is_orderly(&self) -> bool {
        self.end == Some(End::Orderly)
    }

    fn poll<R, W>(&mut self, cx: &mut Context<'_>, source: &mut R, sink: &mut W) -> Poll<End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if let Some(end) = self.end {
            return Poll::Ready(end);
        }
        let (end, error) = match ready!(self.poll_copy(cx, source, sink)) {
            Ok(()) => (End::Orderly, None),
            Err((end, error)) => (end, Some(error)),
        };
        self.waiting = Bytes::new();
        self.end = Some(end);
        self.error = error;
        Poll::Ready(end)
    }

    fn poll_copy<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut R,
        sink: &mut W,
    ) -> Poll<Result<(), (End, io::Error)>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let broken_sink = |error| (End::Sink, error);
        for _ in 0..ROUNDS {
            while !self.waiting.is_empty() {
                let written = ready!(poll_write(cx, sink, &self.waiting)).map_err(broken_sink)?;
                self.waiting.advance(written);
                self.wrote(written);
            }
            self.waiting = Bytes::new(); // An empty view would keep the whole buffer alive.
            if self.closing {
                return Pin::new(sink).poll_shutdown(cx).map_err(broken_sink);
            }
            if self.broken.is_some() && self.unflushed {
                ready!(Pin::new(&mut *sink).poll_flush(cx)).map_err(broken_sink)?;
            }
            if let Some(error) = self.broken.take() {
                return Poll::Ready(Err((End::Source, error)));
            }

            // Taken, not borrowed: should one splice ever run inside another, the inner one makes a buffer of its own.
            let mut scratch = SPARE.take().unwrap_or_else(|| vec![0; SCRATCH].into_boxed_slice());
            let filled = fill(cx, source, &mut scratch);
            let result = match filled.bytes {
                0 => Poll::Ready(Ok(())),
                bytes => self.write_or_keep(cx, sink, &scratch[..bytes]),
            };
            SPARE.set(Some(scratch));
            self.closing = filled.closed;
            self.broken = filled.broken;
            ready!(result).map_err(broken_sink)?;
            if filled.dry {
                if self.unflushed {
                    ready!(Pin::new(sink).poll_flush(cx)).map_err(broken_sink)?;
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes as much of `bytes` as the sink takes, and keeps a copy of the rest.
    fn write_or_keep<W>(&mut self, cx: &mut Context<'_>, sink: &mut W, mut bytes: &[u8]) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !bytes.is_empty() {
            match poll_write(cx, sink, bytes) {
                Poll::Ready(Ok(written)) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    self.wrote(written);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    // Allocates, since the sink pushes back: at most SCRATCH bytes, freed once they are taken.
                    self.waiting = Bytes::copy_from_slice(bytes);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, bytes: usize) {
        self.moved += bytes as u64;
        self.unflushed = true;
    }
}

/// What one round of reading gave.
struct Filled {
    bytes: usize,
    /// There is no more for now; the task will be woken.
    dry: bool,
    /// There will never be more.
    closed: bool,
    /// There will never be more, and the end is not there: what was read came before that.
    broken: Option<io::Error>,
}

/// Reads until `buffer` is full or `source` has no more for now. TLS gives a record at a time: several of them make one
/// write.
fn fill<R>(cx: &mut Context<'_>, source: &mut R, buffer: &mut [u8]) -> Filled
where
    R: AsyncRead + Unpin,
{
    let mut read = ReadBuf::new(buffer);
    let (mut dry, mut closed, mut broken) = (false, false, None);
    while read.remaining() > 0 && !dry && !closed && broken.is_none() {
        let before = read.filled().len();
        match Pin::new(&mut *source).poll_read(cx, &mut read) {
            Poll::Ready(Ok(())) => closed = read.filled().len() == before,
            Poll::Ready(Err(error)) => broken = Some(error),
            Poll::Pending => dry = true,
        }
    }
    Filled { bytes: read.filled().len(), dry, closed, broken }
}

fn poll_write<W>(cx: &mut Context<'_>, sink: &mut W, bytes: &[u8]) -> Poll<io::Result<usize>>
where
    W: AsyncWrite + Unpin,
{
    match ready!(Pin::new(sink).poll_write(cx, bytes))? {
        0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        written => Poll::Ready(Ok(written)),
    }
}

/// Looks now and then whether a side that has closed its half was reset afterwards. A timer of its own per connection,
/// and only while half-closed.
#[derive(Debug, Default)]
struct Watch {
    timer: Option<Pin<Box<Sleep>>>,
}

impl Watch {
    const EVERY: Duration = Duration::from_secs(5);

    fn poll(&mut self, cx: &mut Context<'_>, is_gone: impl Fn() -> bool) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(Self::EVERY)));
        while timer.as_mut().poll(cx).is_ready() {
            if is_gone() {
                return Poll::Ready(());
            }
            timer.as_mut().reset(Instant::now() + Self::EVERY);
        }
        Poll::Pending
    }
}
