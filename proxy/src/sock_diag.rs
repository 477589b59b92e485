//! One socket of the kernel, asked for by its two addresses: `sock_diag(7)`.
//!
//! The kernel finds it in its hash table, so that the price does not grow with the number of connections, as that of
//! reading `/proc/net/tcp` does.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`.
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
const IPPROTO_TCP: u8 = 6;
/// `TCP_LISTEN` of the kernel's `tcp_states.h`.
const LISTEN: u8 = 10;

/// The user who holds the TCP socket with these addresses, in this network namespace. Both are of one family, and never
/// v4-mapped: the kernel finds an IPv6 socket that speaks IPv4 by its IPv4 addresses.
///
/// `None`: there is no such socket, or no process holds it any more.
///
/// # Errors
///
/// The kernel has no `tcp_diag`, or does not let us ask.
pub(crate) fn owner(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    let kind = SocketType::DGRAM;
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, kind, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    // The kernel answers while we send; should it ever not, we do not wait for it.
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(100)))?;
    rustix::net::sendto(&socket, &question(local, remote), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 1024];
    let (length, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    read(answer.get(..length).unwrap_or_default())
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2`.
fn question(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut body = vec![family.as_raw() as u8, IPPROTO_TCP, 0, 0];
    body.extend(u32::MAX.to_ne_bytes()); // In any state.
    body.extend(local.port().to_be_bytes());
    body.extend(remote.port().to_be_bytes());
    for address in [local.ip(), remote.ip()] {
        let mut bytes = [0; 16];
        match address {
            IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes = ip.octets(),
        }
        body.extend(bytes);
    }
    body.extend(0u32.to_ne_bytes()); // On any interface.
    body.extend([0xff; 8]); // We know no cookie of it.
    let mut message = Vec::with_capacity(NLMSG_HEADER + body.len());
    message.extend(((NLMSG_HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(BY_FAMILY.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]); // Sequence and port: one question, one answer.
    message.extend(body);
    message
}

/// A `struct inet_diag_msg`, or an error.
fn read(answer: &[u8]) -> io::Result<Option<u32>> {
    let number = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(u32::from_ne_bytes).ok_or(io::Error::from(ErrorKind::UnexpectedEof))
    };
    // The type is the first half of a word whose other half holds flags.
    if number(4)?.to_ne_bytes()[..2] == NLMSG_ERROR.to_ne_bytes() {
        let error = io::Error::from_raw_os_error((number(NLMSG_HEADER)? as i32).wrapping_neg());
        return if error.kind() == ErrorKind::NotFound { Ok(None) } else { Err(error) };
    }
    let state = answer.get(NLMSG_HEADER + 1).copied();
    let (uid, inode) = (number(NLMSG_HEADER + 64)?, number(NLMSG_HEADER + 68)?);
    // Where no connection fits, the kernel names a listener that would take one.
    Ok(Some(uid).filter(|_| inode != 0 && state != Some(LISTEN)))
}
