//! Where connections come in: bind, accept, and what a redirected connection was on its way to.
//!
//! Options that a connection needs are set once on the listening socket; Linux copies them into every accepted one, so
//! that accepting costs a single system call.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SocketFlags;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::time::sleep;

/// Connections that the kernel may hold for us between two accepts; `net.core.somaxconn` caps it (4,096 by default).
const BACKLOG: i32 = 4096;

/// Descriptors that a process has room for from the start: 64 KiB of the kernel's memory.
const ROOM: u64 = 8192;

/// How long to let the process and the machine recover when neither has a file descriptor or memory left.
const BREATHER: Duration = Duration::from_millis(50);

/// Makes room for many descriptors. To be called before there is a second thread: from then on each growth of the table,
/// at 64, 128, 256 and so on, keeps whoever opens one waiting until all CPUs have passed through the scheduler (an RCU
/// grace period, 5 to 30 ms on a busy machine), and with it every connection of a worker.
pub fn make_room_for_descriptors() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(ROOM);
    let highest = i32::try_from(limit.min(ROOM)).unwrap_or(i32::MAX) - 1;
    // The table stays as large as the highest descriptor ever made it. Without room it grows as it must.
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), highest));
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<Socket>,
    local: SocketAddr,
    /// A descriptor kept for the moment when there are no others: given up, it lets us accept a connection in order to
    /// close it, where otherwise its client would hang in the backlog.
    spare: Option<File>,
    /// How many connections were closed as soon as they came, because no file descriptor was left.
    turned_away: u64,
    counter: metrics::Counter,
}

/// A connection as the kernel gave it, not yet tied to a runtime: it may be handed to another thread.
#[derive(Debug)]
pub struct Accepted {
    /// The connection, non-blocking.
    pub stream: std::net::TcpStream,
    /// Who connected.
    pub peer: SocketAddr,
}

impl Accepted {
    /// Ties the connection to the runtime of the thread that calls this.
    pub fn register(self) -> io::Result<TcpStream> {
        TcpStream::from_std(self.stream)
    }
}

/// Why an address cannot be listened on, in words for whoever chose it.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens there already.
    #[error("{0} is in use; `ss -ltnp 'sport = :{port}'` shows by whom", port = .0.port())]
    InUse(SocketAddr),
    /// A privileged port, and no privilege.
    #[error(
        "no permission to listen on {0}: ports below {lowest} need CAP_NET_BIND_SERVICE; take a higher port",
        lowest = lowest_free_port()
    )]
    NoPermission(SocketAddr),
    /// The address belongs to no interface.
    #[error("no interface here has the address {ip}; `ip address` shows those there are", ip = .0.ip())]
    NoSuchAddress(SocketAddr),
    /// No IPv6 in this kernel, or it is switched off.
    #[error("cannot listen on {0}: this machine has no IPv6; take an IPv4 address, 0.0.0.0 for all of them")]
    NoIpv6(SocketAddr),
    /// The limit of open files is used up.
    #[error("cannot listen on {0}: no file descriptor is left; raise the limit (`ulimit -n`)")]
    NoDescriptors(SocketAddr),
    /// Anything else.
    #[error("cannot listen on {addr}: {source}")]
    Other {
        /// The address.
        addr: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Listens on `addr`. `[::]` takes IPv4 connections too, which then show as v4-mapped addresses.
///
/// Must be called within a tokio runtime, whose thread accepts.
pub fn bind(addr: SocketAddr) -> Result<Listener, BindError> {
    listening_socket(addr).and_then(Listener::new).map_err(|source| BindError::of(addr, source))
}

/// [`bind`] for a port of the operator's: tokio's own listener, on IPv4 alone in place of `[::]` where there is no IPv6.
pub async fn bind_admin(addr: SocketAddr) -> Result<tokio::net::TcpListener, BindError> {
    match tokio::net::TcpListener::bind(addr).await.map_err(|source| BindError::of(addr, source)) {
        Err(BindError::NoIpv6(_)) if addr.ip().is_unspecified() => {
            let addr = SocketAddr::from((Ipv4Addr::UNSPECIFIED, addr.port()));
            tokio::net::TcpListener::bind(addr).await.map_err(|source| BindError::of(addr, source))
        }
        bound => bound,
    }
}

impl BindError {
    fn of(addr: SocketAddr, source: io::Error) -> Self {
        match Errno::from_io_error(&source) {
            Some(Errno::ADDRINUSE) => Self::InUse(addr),
            Some(Errno::ACCESS | Errno::PERM) => Self::NoPermission(addr),
            Some(Errno::AFNOSUPPORT) if addr.is_ipv6() => Self::NoIpv6(addr),
            // What the kernel says of an IPv6 address when the protocol is there and switched off.
            Some(Errno::ADDRNOTAVAIL) if is_everywhere(addr.ip()) => Self::NoIpv6(addr),
            Some(Errno::ADDRNOTAVAIL) => Self::NoSuchAddress(addr),
            Some(Errno::MFILE | Errno::NFILE) => Self::NoDescriptors(addr),
            _ => Self::Other { addr, source },
        }
    }
}

/// IPv6 addresses that are there wherever IPv6 is.
fn is_everywhere(ip: IpAddr) -> bool {
    ip.is_ipv6() && (ip.is_unspecified() || ip.is_loopback())
}

/// Listens on every one of `addresses`, but on IPv6 only where there is IPv6; on all of IPv4 in place of `[::]`.
pub fn bind_each(addresses: &[SocketAddr]) -> Result<Vec<Listener>, BindError> {
    let mut listeners = Vec::new();
    for address in addresses {
        match bind(*address) {
            Ok(listener) => listeners.push(listener),
            Err(BindError::NoIpv6(_)) if address.ip().is_unspecified() => {
                listeners.push(bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))?);
            }
            Err(BindError::NoIpv6(_)) if addresses.iter().any(SocketAddr::is_ipv4) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(listeners)
}

fn listening_socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?; // A restart need not wait for TIME_WAIT; two listeners still exclude each other.
    if addr.is_ipv6() {
        // Said, not left to net.ipv6.bindv6only. It means something for [::] alone.
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    tune(&socket)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// What every connection gets, accepted or dialed: no Nagle, and a keepalive that finds a lost peer of an idle
/// connection within 40 s (10 s of silence, then three probes 10 s apart). On a listening socket, for all it accepts.
pub fn tune(socket: &impl AsFd) -> io::Result<()> {
    let every = Duration::from_secs(10);
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(every).with_interval(every).with_retries(3))
}

/// Lets a connection break when what we sent stays unacknowledged for 30 s (TCP_USER_TIMEOUT, RFC 5482).
///
/// For connections whose peer always reads, such as HTTP/2 between our proxies. Linux counts a closed window as silence, so
/// anywhere else this would cut off a reader who merely pauses.
pub fn expect_steady_reader(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_user_timeout(Some(Duration::from_secs(30)))
}

impl Listener {
    #[allow(unsafe_code)]
    fn new(socket: Socket) -> io::Result<Self> {
        let local = socket.local_addr()?.as_socket().ok_or(ErrorKind::InvalidInput)?;
        // tokio's own listener ties every connection to the runtime that accepts, which costs three calls of epoll_ctl to
        // undo for one that another worker serves; and there is no safe way to wait for a socket of one's own.
        // SAFETY: the socket owns its descriptor, is moved in here, and is neither replaced nor closed before the drop.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket, local, spare: spare(), turned_away: 0, counter: metrics::Counter::noop() })
    }

    /// Where it listens, with the port that the kernel chose if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Counts those whom it turns away because no file descriptor is left.
    pub fn counting(mut self, turned_away: metrics::Counter) -> Self {
        self.counter = turned_away;
        self
    }

    /// The next connection. Waits for as long as it takes, and outlives whatever goes wrong with single connections or
    /// with the machine's resources.
    ///
    /// Cancel safe: a connection is taken from the kernel and returned without a wait in between.
    pub async fn accept(&mut self) -> Accepted {
        loop {
            let mut ready = match self.socket.readable().await {
                Ok(ready) => ready,
                Err(error) => {
                    self.recover(&error).await;
                    continue;
                }
            };
            match ready.try_io(|socket| accept_now(socket.get_ref())) {
                Ok(Ok(accepted)) => return accepted,
                Ok(Err(error)) if is_full(&error) => {
                    // Linux takes the descriptor before it looks whether somebody waits: there may be nobody.
                    self.spare = None;
                    let turned_away = ready.try_io(|socket| accept_now(socket.get_ref()).map(drop));
                    drop(ready);
                    self.spare = spare();
                    match turned_away {
                        Ok(Ok(())) => self.count(),
                        Ok(Err(error)) => self.recover(&error).await,
                        Err(_would_block) => {}
                    }
                    match self.spare {
                        // Connections that end give descriptors back; let them.
                        Some(_) => tokio::task::yield_now().await,
                        // Another thread took the descriptor, or the whole machine has none.
                        None => sleep(BREATHER).await,
                    }
                }
                Ok(Err(error)) => self.recover(&error).await,
                Err(_would_block) => {}
            }
        }
    }

    /// After this, another accept makes sense.
    async fn recover(&self, error: &io::Error) {
        match Errno::from_io_error(error) {
            // Trouble of one connection that is gone by now; accept(2) says to treat these like EAGAIN.
            Some(
                Errno::CONNABORTED
                | Errno::PROTO
                | Errno::INTR
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NOPROTOOPT
                | Errno::NONET
                | Errno::OPNOTSUPP,
            ) => {}
            // The descriptor that was kept is gone too.
            Some(Errno::MFILE | Errno::NFILE) => sleep(BREATHER).await,
            // No memory, or what we cannot imagine: neither may become a busy loop.
            _ => {
                tracing::warn!(listener = %self.local, %error, "cannot accept; trying again");
                sleep(BREATHER).await;
            }
        }
    }

    /// The oldest waiting connection was closed, with the descriptor that was kept for it.
    fn count(&mut self) {
        self.counter.increment(1);
        self.turned_away += 1;
        if self.turned_away.is_power_of_two() {
            let count = self.turned_away;
            tracing::warn!(listener = %self.local, count, "no file descriptor left: connection closed");
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

fn accept_now(socket: &Socket) -> io::Result<Accepted> {
    let (fd, peer) = rustix::net::acceptfrom_with(socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    // A peer that is already gone may have no address left.
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).ok_or(Errno::CONNABORTED)?;
    Ok(Accepted { stream: std::net::TcpStream::from(fd), peer })
}

fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// `net.ipv4.ip_unprivileged_port_start`.
fn lowest_free_port() -> u16 {
    let setting = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok();
    setting.and_then(|port| port.trim().parse().ok()).unwrap_or(1024)
}

/// Where a connection was going before it was redirected here; `None` when it was not redirected, so that it was meant
/// for the very address that accepted it.
///
/// An IPv6 socket may carry an IPv4 connection (`::ffff:a.b.c.d`), whose destination only the IPv4 side of the kernel
/// knows; the answer is then a plain IPv4 address.
pub fn original_destination(socket: &impl AsFd) -> io::Result<Option<SocketAddr>> {
    let local = SockRef::from(socket).local_addr()?.as_socket().ok_or(ErrorKind::InvalidInput)?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    let original = match local.ip() {
        IpAddr::V4(_) => rustix::net::sockopt::ip_original_dst(socket).map(SocketAddr::V4),
        IpAddr::V6(_) => rustix::net::sockopt::ipv6_original_dst(socket).map(SocketAddr::V6),
    };
    match original {
        Ok(original) => {
            Ok(Some(original).filter(|original| (original.ip(), original.port()) != (local.ip(), local.port())))
        }
        // The kernel does not track this connection, or tracks none at all.
        Err(Errno::NOENT | Errno::NOPROTOOPT | Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
