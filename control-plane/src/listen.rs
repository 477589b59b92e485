//! The door: TCP, TLS 1.3, and who came in. Everything is bounded, strangers most of all.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, MaybeDone, maybe_done};
use rustls::ServerConfig;
use sheetbend_certs::{SpiffeId, TrustBundle, VerifiedPeer, verify_peer_for_renewal};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use crate::places::{Place, Places};
use crate::registry::LastHeard;

/// Connections of peers with a certificate.
const MAX_CONNECTIONS: usize = 8_192;
/// Handshakes under way. They end by themselves within 5 s; when all places are held, the oldest goes.
const MAX_HANDSHAKES: usize = 512;
/// Connections that have not shown a valid certificate: asking for a first one takes a second. When all places are held,
/// the oldest goes, and nobody who has a certificate ever waits for them.
const MAX_STRANGERS: usize = 256;
/// What a handshake, or a stranger's request, takes on a machine that is busy with many.
const GRACE: Duration = Duration::from_secs(1);
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a peer without a valid certificate may stay: for one request, whose proof others may have to look at.
const STRANGER_STAYS: Duration = Duration::from_secs(10);

/// What the handshake proved.
#[derive(Clone, Debug)]
pub(crate) enum Who {
    /// A workload of this mesh.
    Workload(VerifiedPeer),
    /// A workload whose certificate ended: good for renewal, and for nothing else.
    Expired { id: SpiffeId, since: SystemTime },
    /// Nothing at all.
    Stranger,
}

/// The peer of a connection, in the extensions of each of its requests.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    pub(crate) who: Who,
    pub(crate) last: Arc<LastHeard>,
}

/// What the door needs to know: replaced whole when the certificate or the bundle changes.
pub(crate) struct Door {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) bundle: Arc<TrustBundle>,
}

/// Accepts until the receiver is gone.
pub(crate) async fn accept(
    listener: TcpListener,
    door: Arc<ArcSwap<Door>>,
    started: Instant,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let strangers = Places::new(MAX_STRANGERS, GRACE);
    let everybody = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let handshakes = Places::new(MAX_HANDSHAKES, GRACE);
    loop {
        // The listener's own queue holds whoever waits here.
        handshakes.room().await;
        let Ok(place) = everybody.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            // Whoever started us has gone: no order matters, nothing is lost but a connection nobody would serve.
            () = connections.closed() => return,
            accepted = listener.accept() => accepted,
        };
        let (socket, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: it passes, and asking again at once would burn the CPU.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(handshake) = handshakes.take(address.ip()) else {
            tracing::debug!(%address, "too many handshakes with this address are under way");
            continue;
        };
        let (door, connections, strangers) = (door.load_full(), connections.clone(), strangers.clone());
        tokio::spawn(async move {
            let entered = timeout(HANDSHAKE, async {
                // In no order: nobody else counts on a handshake that is dropped.
                tokio::select! {
                    entered = enter(socket, address, &door, started, &strangers, place) => entered,
                    () = handshake.lost() => Err(io::Error::other("others needed its place")),
                }
            });
            let entered = entered.await;
            drop(handshake);
            match entered {
                Ok(Ok(connection)) => drop(connections.send(Ok(connection)).await),
                Ok(Err(error)) => tracing::debug!(%address, %error, "a handshake failed"),
                Err(_) => tracing::debug!(%address, "a handshake took longer than 5 s"),
            }
        });
    }
}

async fn enter(
    socket: TcpStream,
    address: SocketAddr,
    door: &Door,
    started: Instant,
    strangers: &Arc<Places>,
    place: OwnedSemaphorePermit,
) -> io::Result<Connection> {
    socket.set_nodelay(true)?;
    let tls = TlsAcceptor::from(door.config.clone()).accept(socket).await?;
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    let who = identify(&tls, &door.bundle, SystemTime::now());
    let last = Arc::new(LastHeard::default());
    last.set(started.elapsed());
    let leaves = match who {
        Who::Workload(_) => None,
        Who::Expired { .. } | Who::Stranger => {
            let place = strangers.take(address.ip());
            let place =
                place.ok_or_else(|| io::Error::other("too many peers without a certificate are here already"))?;
            Some(maybe_done(leaves(place).boxed()))
        }
    };
    let peer = Peer { address, who, last };
    Ok(Connection { tls, peer, started, leaves, _place: place })
}

/// Returns once a stranger has to go.
async fn leaves(place: Place) {
    // An error is the end of its time, success that of its place.
    let _ = timeout(STRANGER_STAYS, place.lost()).await;
}

/// After every handshake, resumed ones too: the library does not look again.
fn identify(tls: &TlsStream<TcpStream>, bundle: &TrustBundle, now: SystemTime) -> Who {
    let Some(chain) = tls.get_ref().1.peer_certificates() else { return Who::Stranger };
    if let Ok(peer) = bundle.verify(chain, now) {
        return Who::Workload(peer);
    }
    match verify_peer_for_renewal(Some(chain), bundle, now) {
        Ok(renewing) => match renewing.expired_since {
            Some(since) => Who::Expired { id: renewing.id, since },
            None => Who::Stranger,
        },
        Err(error) => {
            tracing::debug!(%error, "a certificate was shown that proves nothing");
            Who::Stranger
        }
    }
}

/// A connection with its peer. Reading notes when something was heard.
pub(crate) struct Connection {
    tls: TlsStream<TcpStream>,
    peer: Peer,
    started: Instant,
    /// Of a stranger, with its place among them.
    leaves: Option<MaybeDone<BoxFuture<'static, ()>>>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(leaves) = &mut self.leaves
            && leaves.poll_unpin(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "a stranger stayed for too long")));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.tls).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.peer.last.set(self.started.elapsed());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }
}
