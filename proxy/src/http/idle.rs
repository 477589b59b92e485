//! How long nothing may move of a request and its answer, where a route says so.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use super::body::Passed;

/// Looks whether something moves, in either direction.
pub struct Idle {
    time: Duration,
    /// A gRPC call ends with a status.
    grpc: bool,
    request: Option<Arc<Passed>>,
    /// Bytes of the request when it was looked at last.
    seen: u64,
    moved: Instant,
    passed: Pin<Box<Sleep>>,
}

impl Idle {
    /// From now on. What passes of the request is seen in `request`.
    pub fn new(time: Duration, request: Option<Arc<Passed>>, grpc: bool) -> Self {
        Self { time, grpc, request, seen: 0, moved: Instant::now(), passed: Box::pin(sleep(time)) }
    }

    /// How long.
    pub fn time(&self) -> Duration {
        self.time
    }

    /// Whether what it looks at is a gRPC call.
    pub fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// Something moved.
    pub fn moved(&mut self) {
        self.moved = Instant::now();
    }

    /// Ready once nothing has moved for so long; twice as long at most, where it was the request that moved last.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.passed.as_mut().poll(cx));
            let now = Instant::now();
            let sent = self.request.as_ref().map_or(0, |passed| passed.bytes());
            if sent != self.seen {
                (self.seen, self.moved) = (sent, now);
            }
            let over = self.moved + self.time;
            if over <= now {
                return Poll::Ready(());
            }
            self.passed.as_mut().reset(over);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_moves_is_not_idle_and_what_has_stopped_is() {
        let began = Instant::now();
        let mut idle = Idle::new(Duration::from_secs(10), None, false);
        for _ in 0..5 {
            advance(Duration::from_secs(9)).await;
            assert!(timeout(Duration::ZERO, poll_fn(|cx| idle.poll(cx))).await.is_err());
            idle.moved();
        }
        poll_fn(|cx| idle.poll(cx)).await;
        assert_eq!(began.elapsed().as_secs(), 5 * 9 + 10);
    }
}
