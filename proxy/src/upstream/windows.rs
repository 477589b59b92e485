//! How much peers may send before we have read it: the receive windows of all HTTP/2 connections of this process, out of
//! one budget. A connection gets its window when it begins and gives it back when it ends, so that the bound holds without
//! anything being counted on a request's way.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Streams of a connection at once. The window of a connection has room for all of them, so that readers who stop never
/// starve another.
pub(crate) const STREAMS: u32 = 128;
/// What a peer may send, on one stream or on many, before it has read our windows (RFC 9113 §6.9.2).
const FIRST: u64 = 65_535;
/// The largest window of a connection: its streams have 512 KiB each.
const LARGEST: u64 = STREAMS as u64 * (512 << 10) + FIRST;
/// The smallest: its streams have 8 KiB each. Given even where the budget is spent, so that newcomers are served slowly
/// rather than not at all.
const SMALLEST: u64 = STREAMS as u64 * (8 << 10) + FIRST;
/// The budget of a process whose memory is not limited.
const BUDGET: u64 = 1 << 30;

/// A budget of windows.
pub(crate) struct Windows {
    budget: u64,
    given: AtomicU64,
}

/// The windows of one connection, until this is dropped.
pub(crate) struct Window<'a> {
    of: &'a Windows,
    /// Of the connection, in bytes.
    pub(crate) connection: u32,
    /// Of each stream.
    pub(crate) stream: u32,
}

/// This process's: a quarter of what memory it may have, 1 GiB at most.
static OF_PROCESS: LazyLock<(Windows, Windows)> = LazyLock::new(|| {
    let quarter = memory_limit().map_or(BUDGET, |limit| limit / 4);
    let budget = quarter.clamp(16 * SMALLEST, BUDGET);
    (Windows::new(budget - budget / 4), Windows::new(budget / 4))
});

impl Windows {
    const fn new(budget: u64) -> Self {
        Self { budget, given: AtomicU64::new(0) }
    }

    /// Those for peers who have shown who they are, and for endpoints.
    pub(crate) fn of_peers() -> &'static Self {
        &OF_PROCESS.0
    }

    /// Those for callers who have not, the app among them: a quarter, which is all that they can take from anybody.
    pub(crate) fn of_others() -> &'static Self {
        &OF_PROCESS.1
    }

    /// What is given out now in this process, in bytes.
    pub(crate) fn given_in_all() -> u64 {
        Self::of_peers().given() + Self::of_others().given()
    }

    /// A window for a connection that begins: a quarter of what is left, within bounds.
    pub(crate) fn give(&self) -> Window<'_> {
        let size = |given: u64| (self.budget.saturating_sub(given) / 4).clamp(SMALLEST, LARGEST);
        // Never fails: the closure always gives a value.
        let (Ok(before) | Err(before)) = self.given.fetch_update(Relaxed, Relaxed, |given| Some(given + size(given)));
        let connection = size(before);
        let stream = (connection - FIRST) / u64::from(STREAMS);
        // Both are below 2^31, the most that HTTP/2 allows.
        Window { of: self, connection: connection as u32, stream: stream as u32 }
    }

    fn given(&self) -> u64 {
        self.given.load(Relaxed)
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        self.of.given.fetch_sub(u64::from(self.connection), Relaxed);
    }
}

/// The memory limit of this process's cgroup, version 2 or 1; `None` where there is none.
fn memory_limit() -> Option<u64> {
    let files = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    files.iter().find_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::time::Duration;

    use bytes::Bytes;
    use http::{Request, Response};
    use http_body_util::{BodyExt, Empty, Full};
    use hyper::server::conn::http2;
    use hyper::service::service_fn;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_few_connections_get_all_they_can_use() {
        let windows = Windows::new(BUDGET);
        let given: Vec<_> = (0..8).map(|_| windows.give()).collect();
        assert!(given.iter().all(|window| (window.connection, window.stream) == ((64 << 20) + 65_535, 512 << 10)));
        drop(given);
        assert_eq!(windows.given(), 0);
    }

    #[test]
    fn callers_who_have_not_shown_who_they_are_take_nothing_from_peers() {
        let _taken: Vec<_> = (0..1_000).map(|_| Windows::of_others().give()).collect();
        assert!(Windows::of_peers().give().connection > 2 * SMALLEST as u32);
    }

    #[tokio::test]
    async fn a_hundred_readers_who_stop_delay_no_other_on_the_smallest_connection() {
        let windows = Windows::new(0);
        let window = windows.give();
        assert_eq!(u64::from(window.connection), SMALLEST);
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let answer = |_| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![0; 100_000])))) };
        let server = http2::Builder::new(TokioExecutor::new());
        tokio::spawn(server.serve_connection(TokioIo::new(theirs), service_fn(answer)));
        let mut client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        client.initial_stream_window_size(window.stream).initial_connection_window_size(window.connection);
        let (mut sender, connection) = client.handshake(TokioIo::new(ours)).await.unwrap();
        tokio::spawn(connection);
        let mut get = async || sender.send_request(Request::new(Empty::<Bytes>::new())).await.unwrap();
        let mut stopped = Vec::new();
        for _ in 0..100 {
            stopped.push(get().await);
        }
        let whole = async { get().await.into_body().collect().await.unwrap().to_bytes().len() };
        assert_eq!(tokio::time::timeout(Duration::from_secs(20), whole).await, Ok(100_000));
    }

    proptest! {
        #[test]
        fn streams_that_nobody_reads_leave_room_for_every_other(
            budget in (16u64 << 20)..(2 << 30), connections in 1usize..200
        ) {
            let windows = Windows::new(budget);
            for window in (0..connections).map(|_| windows.give()).collect::<Vec<_>>() {
                let stopped = u64::from(STREAMS - 1) * u64::from(window.stream) + FIRST;
                prop_assert!(stopped + u64::from(window.stream) <= u64::from(window.connection));
                prop_assert!(window.stream >= 8 << 10);
            }
        }

        #[test]
        fn what_is_given_stays_within_the_budget_but_for_the_smallest(
            budget in (16u64 << 20)..(2 << 30), connections in 1usize..2_000
        ) {
            let windows = Windows::new(budget);
            let given: Vec<_> = (0..connections).map(|_| windows.give()).collect();
            let smallest = given.iter().filter(|window| u64::from(window.connection) == SMALLEST).count() as u64;
            let sum: u64 = given.iter().map(|window| u64::from(window.connection)).sum();
            prop_assert_eq!(sum, windows.given());
            prop_assert!(sum <= budget + smallest * SMALLEST);
            drop(given);
            prop_assert_eq!(windows.given(), 0);
        }
    }
}
