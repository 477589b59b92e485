//! Waiting for something to become true, with a deadline.

use std::net::{SocketAddr, TcpListener, TcpStream};
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

/// A loopback port that nobody listens on now.
pub fn free_port() -> u16 {
    // The kernel does not give the same port twice in a row, so that two stories seldom meet.
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// An address on loopback.
pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
