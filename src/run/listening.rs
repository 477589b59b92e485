//! When the program's port first accepts, and who can reach it past the sidecar.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use sheetbend_proxy::proc_net;
use tokio::net::TcpStream;

/// The first pause between two looks, and the longest: most programs serve soon after their start.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// Looking takes one part in so many of a CPU at most, should the kernel's whole table have to be read.
const SHARE: u32 = 20;
/// How often a connection is tried too: a port that packet filters lead elsewhere (a container's) is in no table of ours.
const TRY: Duration = Duration::from_secs(1);

/// Waits until something accepts on `port`, and gives the addresses to call it by and to judge it by.
pub(super) async fn accepts(port: u16) -> Vec<SocketAddr> {
    let (mut pause, mut tried) = (PAUSES.0, Instant::now());
    loop {
        let looked = Instant::now();
        let listeners = proc_net::listeners(port).unwrap_or_default();
        if !listeners.is_empty() {
            return listeners;
        }
        let took = looked.elapsed();
        if tried.elapsed() >= TRY {
            tried = Instant::now();
            if let Some(address) = connects(port).await {
                return vec![address];
            }
        }
        tokio::time::sleep(pause.max(took * SHARE)).await;
        pause = longer(pause);
    }
}

/// The pause after a look that found nothing: 2 % more, so that the longest is reached after some 2 s.
fn longer(pause: Duration) -> Duration {
    (pause + pause / 50).min(PAUSES.1)
}

/// Who listens on a port already, before the program is started.
pub(super) fn taken(port: u16) -> bool {
    !proc_net::listeners(port).unwrap_or_default().is_empty()
}

async fn connects(port: u16) -> Option<SocketAddr> {
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let address = SocketAddr::new(ip, port);
        let attempt = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await;
        if matches!(attempt, Ok(Ok(_))) {
            return Some(address);
        }
    }
    None
}

/// Where the sidecar calls the program: on loopback if that works, else on the address that it chose.
pub(super) fn call_at(listeners: &[SocketAddr]) -> Option<SocketAddr> {
    let loopback = |of: &SocketAddr| match of.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Some(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), of.port())),
        // An IPv6 wildcard takes IPv4 too, unless it was told not to; ::1 is right either way.
        IpAddr::V6(ip) if ip.is_unspecified() => Some(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), of.port())),
        ip if ip.is_loopback() => Some(*of),
        _ => None,
    };
    listeners.iter().find_map(loopback).or_else(|| listeners.first().copied())
}

/// What the operator should know about a program that others can call directly.
pub(super) fn warning(port: u16, listeners: &[SocketAddr]) -> Option<String> {
    let open = listeners.iter().find(|address| proc_net::reached_from_elsewhere(address.ip()))?;
    Some(format!(
        "the program listens on {open}, which other machines can reach: they can go round mutual TLS; let it listen on \
         127.0.0.1:{port}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_program_is_called_on_loopback_where_it_listens_there() {
        let at = |texts: &[&str]| call_at(&addresses(texts)).unwrap().to_string();
        assert_eq!(at(&["0.0.0.0:80"]), "127.0.0.1:80");
        assert_eq!(at(&["[::]:80"]), "[::1]:80");
        assert_eq!(at(&["192.0.2.7:80", "127.0.0.5:80"]), "127.0.0.5:80");
        assert_eq!(at(&["192.0.2.7:80"]), "192.0.2.7:80");
        assert_eq!(call_at(&[]), None);
    }

    #[test]
    fn a_program_that_listens_beyond_loopback_is_told_of() {
        assert!(warning(80, &addresses(&["127.0.0.1:80", "[::1]:80"])).is_none());
        assert!(warning(80, &addresses(&["127.0.0.1:80", "0.0.0.0:80"])).unwrap().contains("0.0.0.0:80"));
        assert!(warning(80, &addresses(&["192.0.2.7:80"])).unwrap().contains("127.0.0.1:80"));
    }

    #[test]
    fn looks_are_close_together_for_two_seconds_and_twenty_a_second_from_then_on() {
        let mut pauses = std::iter::successors(Some(PAUSES.0), |pause| Some(longer(*pause)));
        let quick: Duration = pauses.by_ref().take_while(|pause| *pause < PAUSES.1).sum();
        assert!((2.0..3.0).contains(&quick.as_secs_f64()), "{quick:?}");
        assert_eq!(pauses.nth(1_000), Some(PAUSES.1));
    }

    #[tokio::test]
    async fn a_port_accepts_from_the_moment_it_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = tokio::time::timeout(Duration::from_secs(30), accepts(address.port())).await.unwrap();
        assert_eq!(found, [address]);
    }
}
