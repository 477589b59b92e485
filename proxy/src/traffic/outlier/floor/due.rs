//! Which request tries or asks somebody on purpose, told without a lock: most do not.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use super::Turning;

/// A request that may not be sent again tries somebody only when none came for long that may.
const UNSURE: usize = 10;
/// As many have gone elsewhere between two that question the same endpoint, and more where there are many.
const OTHERS: usize = 3;

/// When somebody is next, as [`Turning`] said last.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// From then on somebody is to be tried, in nanoseconds; 0 before anything was said.
    tried: AtomicU64,
    /// From then on somebody is to be asked.
    asked: AtomicU64,
    /// Requests that go elsewhere before.
    elsewhere: AtomicUsize,
    /// Requests since somebody was tried, while somebody is to be.
    passed: AtomicUsize,
}

impl Due {
    /// Under the lock.
    pub(super) fn follow(&self, turning: &Turning) {
        let nanos = |from: Option<Duration>| from.and_then(|from| u64::try_from(from.as_nanos()).ok());
        let store = |slot: &AtomicU64, from| slot.store(nanos(from).unwrap_or(u64::MAX), Relaxed);
        store(&self.tried, turning.wanted().map(|(from, _)| from));
        store(&self.asked, turning.questioned().map(|(from, _)| from));
        self.elsewhere.store(OTHERS.max(turning.members.len() / 2), Relaxed);
    }

    /// Whether a request is one that tries or asks somebody. If not, it has passed.
    pub(super) fn is(&self, retryable: bool, now: Duration) -> bool {
        let now = now.as_nanos() as u64;
        let (tried, asked) = (now >= self.tried.load(Relaxed), now >= self.asked.load(Relaxed));
        if !tried && !asked {
            return false;
        }
        let waited = if retryable { 0 } else { UNSURE };
        let passed = self.passed.fetch_add(1, Relaxed);
        (tried && passed >= waited) || (asked && passed >= waited.max(self.elsewhere.load(Relaxed)))
    }

    /// Somebody is tried or asked.
    pub(super) fn begin(&self) {
        self.passed.store(0, Relaxed);
    }
}
