//! Waiting for something to become true, with a deadline.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Polls until `look` gives a value; panics with `what` after `within`.
#[track_caller]
pub fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        std::thread::sleep(LOOK);
    }
}

/// [`until`] for a condition that has to be awaited.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = look().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until something accepts connections there.
#[track_caller]
pub fn until_accepts(address: SocketAddr, within: Duration) {
    until(&format!("{address} accepts connections"), within, || {
        TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()
    });
}

/// A loopback port that nobody listens on now, and that the kernel gives to nobody who asks for just any port.
pub fn free_port() -> u16 {
    // Below the range of ephemeral ports (32768 and up), where every connection and every listener on port 0 takes one.
    const LOWEST: u16 = 16_000;
    const PORTS: u16 = 16_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Two processes begin at different places, so that they seldom meet.
    let begin = (std::process::id() % 1000) as u16 * 16;
    for _ in 0..PORTS {
        let port = LOWEST + (begin + NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {LOWEST} and {}", LOWEST + PORTS);
}

/// An address on loopback.
pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
