//! The kernel's table of TCP sockets, `/proc/net/tcp` and `/proc/net/tcp6`.
//!
//! Two questions are asked of it: whose is the other end of a loopback connection, and who listens on a port. The kernel is
//! asked for just that; the whole table is read only where it takes no such questions (a seccomp filter).

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::sock_diag;

/// One socket of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Its own address; a v4-mapped one is given as IPv4.
    pub local: SocketAddr,
    /// The address it is connected to; unspecified with port 0 while it listens.
    pub remote: SocketAddr,
    /// Whether it waits for connections.
    pub listens: bool,
    /// Whose it is. 0 also where no process holds it any more (closed, still sending; TIME_WAIT).
    pub uid: u32,
    /// What `/proc/PID/fd` calls it (`socket:[INODE]`); 0 where no process holds it any more.
    pub inode: u64,
}

/// The sockets that a table names. A line in a form that we do not know is left out.
pub fn parse(table: &str) -> impl Iterator<Item = Socket> + '_ {
    table.lines().skip(1).filter_map(socket)
}

/// All TCP sockets of this network namespace.
pub fn sockets() -> io::Result<Vec<Socket>> {
    let mut all: Vec<Socket> = parse(&fs::read_to_string("/proc/net/tcp")?).collect();
    // Where IPv6 is switched off there is no such file.
    if let Ok(table) = fs::read_to_string("/proc/net/tcp6") {
        all.extend(parse(&table));
    }
    Ok(all)
}

/// The user at the other end of a connection within this machine: `ours` is our address of it, `peer` the other end's.
///
/// `None`: the peer's socket is not in this network namespace, or no process holds it any more.
pub fn owner_of_peer(ours: SocketAddr, peer: SocketAddr) -> io::Result<Option<u32>> {
    let (ours, peer) = (canonical(ours), canonical(peer));
    match sock_diag::connected(peer, ours) {
        Ok(socket) => Ok(socket.map(|socket| socket.uid)),
        Err(_) => owner_in_table(ours, peer),
    }
}

/// What listens on a port in this network namespace.
pub fn listeners(port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(listeners) = sock_diag::listeners(port) {
        return Ok(listeners);
    }
    let listens = |socket: &Socket| socket.listens && socket.local.port() == port;
    Ok(sockets()?.into_iter().filter(listens).map(|socket| socket.local).collect())
}

/// The same where the kernel takes no questions about single sockets.
fn owner_in_table(ours: SocketAddr, peer: SocketAddr) -> io::Result<Option<u32>> {
    let is_peer = |s: &Socket| s.local == peer && s.remote == ours && s.inode != 0;
    let v4 = fs::read_to_string("/proc/net/tcp")?;
    if let Some(socket) = parse(&v4).find(is_peer) {
        return Ok(Some(socket.uid));
    }
    // An IPv6 socket speaks IPv4 too (v4-mapped), so this table is asked in both cases.
    let v6 = fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    Ok(parse(&v6).find(is_peer).map(|socket| socket.uid))
}

/// `  sl  local_address rem_address   st tx_queue:rx_queue tr:tm->when retrnsmt   uid  timeout inode …`
fn socket(line: &str) -> Option<Socket> {
    /// TCP_LISTEN of the kernel's `tcp_states.h`.
    const LISTEN: u8 = 0x0A;
    let mut fields = line.split_ascii_whitespace();
    let local = address(fields.nth(1)?)?;
    let remote = address(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Socket { local, remote, listens: state == LISTEN, uid, inode })
}

/// `0100007F:1F90`: the address as 32-bit words in the machine's byte order, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let ip = match ip.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut bytes = [0; 16];
            for (place, at) in bytes.chunks_exact_mut(4).zip([0, 8, 16, 24]) {
                place.copy_from_slice(&word(at)?);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether an address that something listens on is reached from other machines.
pub fn reached_from_elsewhere(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) | IpAddr::V6(Ipv6Addr::UNSPECIFIED) => true,
        ip => !ip.is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    // Written by a little-endian machine.
    #[cfg(target_endian = "little")]
    const V4: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 83124 1 0000000000000000 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1F40 01 00000000:00000000 00:00000000 00000000  1001        0 83125 1 0000000000000000 20 4 30 10 -1
   2: a line of another kind
   3: 0100007F:9C41 0100007F:1F40 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0000000000000000
";
    #[cfg(target_endian = "little")]
    const V6: &str = "\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 9 1 0 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:9C42 0000000000000000FFFF00000100007F:1F40 01 00000000:00000000 00:00000000 00000000  1002        0 7 1 0 20 4 30 10 -1
   2: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 8 1 0 100 0 0 10 0
";

    #[cfg(target_endian = "little")]
    #[test]
    fn a_table_gives_addresses_states_and_owners_and_skips_what_it_cannot_read() {
        let sockets: Vec<Socket> = parse(V4).collect();
        assert_eq!(sockets.len(), 3);
        assert_eq!(sockets[0].local, "127.0.0.1:8000".parse().unwrap());
        assert!(sockets[0].listens && sockets[0].uid == 1000 && sockets[0].inode == 83124);
        assert_eq!((sockets[1].local.port(), sockets[1].remote.port(), sockets[1].uid), (40000, 8000, 1001));
        assert_eq!(sockets[2].inode, 0);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_v4_mapped_socket_reads_as_ipv4_and_a_wildcard_is_reached_from_elsewhere() {
        let sockets: Vec<Socket> = parse(V6).collect();
        assert_eq!(sockets[1].local, "127.0.0.1:40002".parse().unwrap());
        assert_eq!(sockets[2].local, "[::1]:8081".parse().unwrap());
        let elsewhere: Vec<bool> = sockets.iter().map(|s| reached_from_elsewhere(s.local.ip())).collect();
        assert_eq!(elsewhere, [true, false, false]);
    }

    #[test]
    fn the_peer_of_a_loopback_connection_is_this_user_over_ipv4_ipv6_and_mapped() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, peer) = listener.accept().unwrap();
            let (ours, me) = (accepted.local_addr().unwrap(), Some(rustix::process::getuid().as_raw()));
            assert_eq!(sock_diag::connected(peer, ours).unwrap().map(|s| s.uid), me, "{address}");
            assert_eq!(owner_in_table(ours, peer).unwrap(), me, "{address}");
            drop((client, accepted));
        }
    }

    #[test]
    fn a_connection_that_nobody_holds_has_no_owner() {
        let nobody: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(sock_diag::connected(nobody, nobody).unwrap(), None);
        assert_eq!(owner_in_table(nobody, nobody).unwrap(), None);
    }

    #[test]
    fn a_listener_is_nobody_s_peer_and_a_v4_mapped_socket_is_found_by_its_ipv4_addresses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let here = listener.local_addr().unwrap();
        let nobody: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(sock_diag::connected(here, nobody).unwrap(), None);
        let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{}", here.port()).parse().unwrap();
        let Ok(_client) = TcpStream::connect(mapped) else { return };
        let (accepted, peer) = listener.accept().unwrap();
        let owner = owner_of_peer(accepted.local_addr().unwrap(), peer).unwrap();
        assert_eq!(owner, Some(rustix::process::getuid().as_raw()));
    }

    #[test]
    fn who_has_hung_up_is_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (accepted, peer) = listener.accept().unwrap();
        let ours = accepted.local_addr().unwrap();
        // A child that another test starts at this moment holds a copy until it has become another program.
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Some(owner) = owner_of_peer(ours, peer).unwrap() {
            assert!(Instant::now() < deadline, "{owner} holds it still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
