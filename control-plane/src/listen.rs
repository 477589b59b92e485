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
use rustls::pki_types::CertificateDer;
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

/// How many may be at the door, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Connections of everybody.
    connections: usize,
    /// Handshakes under way. When all places are held, the oldest goes.
    handshakes: usize,
    /// Connections that have not shown a valid certificate: asking for a first one takes a second. When all places are
    /// held, the oldest goes, and nobody who has a certificate ever waits for them.
    strangers: usize,
    /// What a handshake, or a stranger's request, takes on a machine that is busy with many.
    grace: Duration,
    /// How long a handshake may take.
    handshake: Duration,
    /// How long a peer without a valid certificate may stay: for one request, whose proof others may have to look at.
    stays: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8_192,
            handshakes: 512,
            strangers: 256,
            grace: Duration::from_secs(1),
            handshake: Duration::from_secs(5),
            stays: Duration::from_secs(10),
        }
    }
}

/// What the handshake proved.
#[derive(Clone, Debug)]
pub(crate) enum Who {
    /// A workload of this mesh.
    Workload(Certificate),
    /// A workload whose certificate ended: good for renewal, and for nothing else.
    Expired { id: SpiffeId, since: SystemTime },
    /// Nothing at all.
    Stranger,
}

/// A certificate that holds, with its chain: what it leads to is another question once the mesh has other roots.
#[derive(Clone, Debug)]
pub(crate) struct Certificate {
    pub(crate) leaf: VerifiedPeer,
    pub(crate) chain: Arc<[CertificateDer<'static>]>,
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
    limits: Limits,
) {
    let strangers = Strangers { places: Places::new(limits.strangers, limits.grace), stay: limits.stays };
    let everybody = Arc::new(Semaphore::new(limits.connections));
    let handshakes = Places::new(limits.handshakes, limits.grace);
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
            let entered = timeout(limits.handshake, async {
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
                Err(_) => tracing::debug!(%address, "a handshake took too long"),
            }
        });
    }
}

/// Where strangers are, and for how long.
#[derive(Clone)]
struct Strangers {
    places: Arc<Places>,
    stay: Duration,
}

async fn enter(
    socket: TcpStream,
    address: SocketAddr,
    door: &Door,
    started: Instant,
    strangers: &Strangers,
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
            let place = strangers.places.take(address.ip());
            let place =
                place.ok_or_else(|| io::Error::other("too many peers without a certificate are here already"))?;
            Some(maybe_done(leaves(place, strangers.stay).boxed()))
        }
    };
    let peer = Peer { address, who, last };
    Ok(Connection { tls, peer, started, leaves, _place: place })
}

/// Returns once a stranger has to go.
async fn leaves(place: Place, stay: Duration) {
    // An error is the end of its time, success that of its place.
    let _ = timeout(stay, place.lost()).await;
}

/// After every handshake, resumed ones too: the library does not look again.
fn identify(tls: &TlsStream<TcpStream>, bundle: &TrustBundle, now: SystemTime) -> Who {
    let Some(chain) = tls.get_ref().1.peer_certificates() else { return Who::Stranger };
    if let Ok(leaf) = bundle.verify(chain, now) {
        return Who::Workload(Certificate {
            leaf,
            chain: chain.iter().map(|cert| cert.clone().into_owned()).collect(),
        });
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures_util::FutureExt;
    use rustls::ClientConfig;
    use rustls::pki_types::ServerName;
    use sheetbend_certs::{Ca, Csr, IssueRequest, KeyAndCsr, TrustDomain, control_plane_client, first_trust_client};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::own::Own;

    const SOON: Duration = Duration::from_secs(60);
    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// Nobody goes by the clock, and nobody has a grace.
    const LIMITS: Limits =
        Limits { connections: 100, handshakes: 100, strangers: 100, grace: Duration::ZERO, handshake: DAY, stays: DAY };

    /// A door behind which everybody's bytes are sent back.
    struct House {
        ca: Ca,
        address: SocketAddr,
    }

    type Client = tokio_rustls::client::TlsStream<TcpStream>;

    impl House {
        async fn open(dir: &Path, limits: Limits) -> Self {
            let ca = Ca::init(dir, &TrustDomain::default(), SystemTime::now()).unwrap();
            let door = Arc::new(ArcSwap::from(Own::issue(&ca, &[]).unwrap().door()));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (connections, mut entered) = mpsc::channel::<io::Result<Connection>>(8);
            tokio::spawn(accept(listener, door, Instant::now(), connections, limits));
            tokio::spawn(async move {
                while let Some(Ok(connection)) = entered.recv().await {
                    let (mut from, mut to) = tokio::io::split(connection);
                    tokio::spawn(async move { tokio::io::copy(&mut from, &mut to).await });
                }
            });
            Self { ca, address }
        }

        async fn silent(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        /// Has shaken hands, and is sent away after a while, or when there is no room.
        async fn stranger(&self) -> Client {
            self.enter(first_trust_client(self.ca.active_root().unwrap().sha256()).unwrap()).await
        }

        async fn workload(&self) -> Client {
            let key = KeyAndCsr::generate().unwrap();
            let csr = Csr::parse(key.csr_pem().as_bytes()).unwrap();
            let id = SpiffeId::for_workload(&TrustDomain::default(), "default", "web").unwrap();
            let issued = self.ca.issue(&IssueRequest::new(id, csr), SystemTime::now()).unwrap();
            let identity = key.into_identity(issued.chain).unwrap();
            let mut client =
                self.enter(control_plane_client(Some(&identity), self.ca.bundle().unwrap()).unwrap()).await;
            assert!(is_heard(&mut client).await);
            client
        }

        /// Tried again where there is a clock, and the machine is slower.
        async fn enter(&self, config: Arc<ClientConfig>) -> Client {
            let name = ServerName::IpAddress(self.address.ip().into());
            let entering = async {
                loop {
                    let connector = TlsConnector::from(config.clone());
                    if let Ok(client) = connector.connect(name.clone(), self.silent().await).await {
                        return client;
                    }
                }
            };
            timeout(SOON, entering).await.expect("a handshake")
        }
    }

    /// Whether bytes come back.
    async fn is_heard(client: &mut Client) -> bool {
        let mut byte = [0];
        client.write_all(b"x").await.is_ok()
            && matches!(timeout(SOON, client.read(&mut byte)).await.expect("an answer or an end"), Ok(1))
    }

    async fn ends(client: &mut (impl AsyncRead + Unpin)) {
        let read = timeout(SOON, client.read(&mut [0])).await.expect("the other end closes");
        assert!(!matches!(read, Ok(1)), "nothing was sent");
    }

    fn is_open(client: &mut (impl AsyncRead + Unpin)) -> bool {
        client.read(&mut [0]).now_or_never().is_none()
    }

    #[tokio::test]
    async fn the_longest_silence_makes_room_when_all_handshakes_are_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let house = House::open(dir.path(), Limits { handshakes: 3, ..LIMITS }).await;
        let mut silent = [house.silent().await, house.silent().await, house.silent().await];
        house.workload().await;
        let [longest, others @ ..] = &mut silent;
        ends(longest).await;
        assert!(others.iter_mut().all(is_open));
    }

    #[tokio::test]
    async fn silence_ends_and_gives_its_place_back() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { connections: 1, handshake: Duration::from_secs(3), ..LIMITS };
        let house = House::open(dir.path(), limits).await;
        let mut silent = house.silent().await;
        house.workload().await;
        ends(&mut silent).await;
    }

    #[tokio::test]
    async fn of_strangers_the_one_who_is_there_for_the_longest_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let house = House::open(dir.path(), Limits { strangers: 2, ..LIMITS }).await;
        let mut strangers = Vec::new();
        for _ in 0..3 {
            let mut stranger = house.stranger().await;
            assert!(is_heard(&mut stranger).await);
            strangers.push(stranger);
        }
        ends(&mut strangers[0]).await;
        for stranger in &mut strangers[1..] {
            assert!(is_heard(stranger).await);
        }
    }

    #[tokio::test]
    async fn a_stranger_goes_after_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let house = House::open(dir.path(), Limits { stays: Duration::from_secs(3), ..LIMITS }).await;
        ends(&mut house.stranger().await).await;
    }

    #[tokio::test]
    async fn who_has_a_certificate_stays_whoever_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { strangers: 1, stays: Duration::from_secs(3), ..LIMITS };
        let house = House::open(dir.path(), limits).await;
        let mut workload = house.workload().await;
        let mut strangers = [house.stranger().await, house.stranger().await];
        for stranger in &mut strangers {
            ends(stranger).await;
        }
        assert!(is_heard(&mut workload).await);
    }
}
