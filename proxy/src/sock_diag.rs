//! Questions about sockets that the kernel answers by netlink (sock_diag(7)), without a walk through its whole table: a
//! busy machine has tens of thousands of sockets in TIME_WAIT, and its table takes tens of milliseconds to read.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

use crate::proc_net::Socket;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
/// NLM_F_ROOT and NLM_F_MATCH: all that match.
const NLM_F_DUMP: u16 = 0x300;
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// TCP_LISTEN of the kernel's `tcp_states.h`.
const LISTEN: u8 = 10;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_msg`.
const ANSWER: usize = 72;
/// The kernel answers at once; a filter that swallows the question does not.
const PATIENCE: Duration = Duration::from_millis(200);

/// What listens on a port.
pub(crate) fn listeners(port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let question = question(family, NLM_F_DUMP, 1 << LISTEN, any(family, port), any(family, 0));
        let sockets = ask(&question)?;
        // Kernels filter by the port; it costs nothing to look again.
        found.extend(sockets.iter().filter(|s| s.listens && s.local.port() == port).map(|s| s.local));
    }
    Ok(found)
}

/// The socket at `local` that is connected to `remote`, if a process holds it.
pub(crate) fn connected(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Socket>> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    // Where there is no such connection, the kernel gives the listener at `local`, or an error.
    let matches = |s: &Socket| s.local == local && s.remote == remote && s.inode != 0;
    match ask(&question(family, 0, u32::MAX, local, remote)) {
        Ok(sockets) => Ok(sockets.into_iter().find(matches)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn any(family: u8, port: u16) -> SocketAddr {
    match family {
        AF_INET => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        _ => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
    }
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2`.
fn question(family: u8, flags: u16, states: u32, local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    const LENGTH: u32 = 72;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]); // Sequence number and port.
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets().into_iter().chain([0; 12])),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend([0; 4]); // Any interface.
    bytes.extend([0xff; 8]); // INET_DIAG_NOCOOKIE.
    bytes
}

thread_local! {
    /// Kept from question to question: a new one each would cost more than the answer, and be missing on the very day that
    /// the file table is full.
    static KERNEL: Cell<Option<OwnedFd>> = const { Cell::new(None) };
}

fn ask(question: &[u8]) -> io::Result<Vec<Socket>> {
    let kernel = match KERNEL.take() {
        Some(kernel) => kernel,
        None => {
            let kernel =
                socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
            set_socket_timeout(&kernel, Timeout::Recv, Some(PATIENCE))?;
            kernel
        }
    };
    // Dropped when the conversation breaks: what it still brings would be taken for the next question's answer.
    let answer = converse(&kernel, question)?;
    KERNEL.set(Some(kernel));
    answer
}

/// Puts one question and takes in all of its answer, which may be an error of the kernel's.
fn converse(kernel: &OwnedFd, question: &[u8]) -> io::Result<io::Result<Vec<Socket>>> {
    send(kernel, question, SendFlags::empty())?;
    let mut sockets = Vec::new();
    // The most that the kernel puts into one datagram for a reader who never asked with more room (NLMSG_GOODSIZE).
    let mut buffer = [0; 8 * 1024];
    loop {
        let (_, length) = recv(kernel, &mut buffer[..], RecvFlags::empty())?;
        match read(buffer.get(..length).unwrap_or_default(), &mut sockets)? {
            Answer::More => {}
            Answer::Whole => return Ok(Ok(sockets)),
            Answer::Refused(error) => return Ok(Err(error)),
        }
    }
}

/// What a datagram means for the question.
#[derive(Debug)]
enum Answer {
    More,
    Whole,
    Refused(io::Error),
}

/// Takes in one datagram.
fn read(mut datagram: &[u8], sockets: &mut Vec<Socket>) -> io::Result<Answer> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "an answer of sock_diag is cut short");
    while !datagram.is_empty() {
        let length = u32::from_ne_bytes(array(datagram, 0).ok_or_else(short)?) as usize;
        let kind = u16::from_ne_bytes(array(datagram, 4).ok_or_else(short)?);
        let flags = u16::from_ne_bytes(array(datagram, 6).ok_or_else(short)?);
        let body = datagram.get(HEADER..length).ok_or_else(short)?;
        match kind {
            NLMSG_DONE => return Ok(Answer::Whole),
            NLMSG_ERROR => {
                let code = i32::from_ne_bytes(array(body, 0).ok_or_else(short)?);
                return Ok(Answer::Refused(io::Error::from_raw_os_error(-code)));
            }
            _ => sockets.extend(socket(body)),
        }
        /// NLM_F_MULTI: a part of several.
        const MULTI: u16 = 0x2;
        if flags & MULTI == 0 {
            return Ok(Answer::Whole);
        }
        // NLMSG_ALIGN: the next begins at a multiple of four.
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Answer::More)
}

/// `struct inet_diag_msg`.
fn socket(body: &[u8]) -> Option<Socket> {
    let body = body.get(..ANSWER)?;
    let (family, state) = (body[0], body[1]);
    let address = |port: usize, ip: usize| {
        let port = u16::from_be_bytes(array(body, port)?);
        let ip = match family {
            AF_INET => IpAddr::from(array::<4>(body, ip)?),
            _ => IpAddr::from(array::<16>(body, ip)?),
        };
        Some(SocketAddr::new(ip.to_canonical(), port))
    };
    Some(Socket {
        local: address(4, 8)?,
        remote: address(6, 24)?,
        listens: state == LISTEN,
        uid: u32::from_ne_bytes(array(body, 64)?),
        inode: u64::from(u32::from_ne_bytes(array(body, 68)?)),
    })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn what_listens_is_found_by_its_port_and_nothing_else_is() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let local = listener.local_addr().unwrap();
            let _client = TcpStream::connect(local).unwrap();
            // On another address, the port may be another's.
            let listening = || {
                let mut found = listeners(local.port()).unwrap();
                assert!(found.iter().all(|at| at.port() == local.port()), "{found:?}");
                found.retain(|at| at.ip() == local.ip());
                found
            };
            assert_eq!(listening(), [local]);
            drop(listener);
            // A child that another test starts at this moment holds a copy until it has become another program.
            let deadline = Instant::now() + Duration::from_secs(30);
            while !listening().is_empty() {
                assert!(Instant::now() < deadline, "nobody listens there any more");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn a_connection_is_found_by_its_two_ends_and_a_listener_is_not_taken_for_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let client = TcpStream::connect(at).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let found = connected(local, remote).unwrap().unwrap();
        assert_eq!((found.local, found.remote, found.uid), (local, remote, rustix::process::getuid().as_raw()));
        let nobody: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(connected(at, nobody).unwrap(), None);
        assert_eq!(connected(nobody, nobody).unwrap(), None);
    }

    #[test]
    fn an_answer_that_is_cut_short_is_an_error_and_never_a_panic() {
        let mut whole = question(AF_INET, 0, 0, any(AF_INET, 80), any(AF_INET, 0));
        for length in 1..HEADER {
            assert!(read(&whole[..length], &mut Vec::new()).is_err());
        }
        whole[..4].copy_from_slice(&3u32.to_ne_bytes());
        assert!(read(&whole, &mut Vec::new()).is_err());
    }
}
