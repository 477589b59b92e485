//! PURE: whether a failed request may be sent once more. The rule is that nothing is ever paid twice.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::telemetry::Counter;

/// Attempts after the first.
pub const RETRIES: u32 = 1;
/// Shortest and longest wait before the second attempt; it is drawn evenly between none and these (full jitter, AWS
/// "Exponential Backoff and Jitter").
pub const BACKOFF: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(250));
/// Bytes of a body that are kept for the second attempt.
pub const BODY_COPY: usize = 64 * 1024;
/// A `Retry-After` up to this long is waited for.
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(1);

/// How an attempt failed, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The request provably had no effect; why.
    Unprocessed(Counter),
    /// The stream or the connection broke while the request may have been in the app's hands.
    Reset,
    /// There was no answer within the time of one attempt.
    TooSlow,
    /// The answer was 502, 503 or 504; how long it asks us to wait, in whole seconds.
    Status {
        /// `Retry-After`.
        retry_after: Option<Duration>,
    },
}

/// What is known when an attempt has failed.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// How it failed.
    pub failure: Failure,
    /// Attempts before it.
    pub before: u32,
    /// Whether a second effect is no harm: the method, or an Idempotency-Key.
    pub idempotent: bool,
    /// Whether the whole request is still at hand.
    pub replayable: bool,
    /// Time left until the caller's deadline, if there is one.
    pub left: Option<Duration>,
}

/// Once more, or why not; either way with the counter that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Wait, then send it again.
    Retry {
        /// How long.
        after: Duration,
        /// What it counts as.
        reason: Counter,
    },
    /// The caller gets what there is.
    GiveUp(Counter),
}

/// Decides. `chance` is in `0.0..1.0`; the budget is asked last, so that it is spent on nothing else.
pub fn decide(attempt: &Attempt, chance: f64, budget: impl FnOnce() -> bool) -> Verdict {
    let reason = match attempt.failure {
        Failure::Unprocessed(reason) => reason,
        _ if !attempt.idempotent => return Verdict::GiveUp(Counter::NotRetriedUnsafe),
        Failure::Reset => Counter::RetriedReset,
        Failure::TooSlow => Counter::RetriedTimeout,
        Failure::Status { .. } => Counter::RetriedStatus,
    };
    if attempt.before >= RETRIES {
        return Verdict::GiveUp(Counter::NotRetriedAttempts);
    }
    if !attempt.replayable {
        return Verdict::GiveUp(Counter::NotRetriedBody);
    }
    let after = match attempt.failure {
        Failure::Status { retry_after: Some(wait) } if wait > LONGEST_RETRY_AFTER => {
            return Verdict::GiveUp(Counter::NotRetriedDeadline);
        }
        Failure::Status { retry_after: Some(wait) } => wait,
        _ => backoff(attempt.before, chance),
    };
    if attempt.left.is_some_and(|left| after >= left) {
        return Verdict::GiveUp(Counter::NotRetriedDeadline);
    }
    if !budget() {
        return Verdict::GiveUp(Counter::NotRetriedBudget);
    }
    Verdict::Retry { after, reason }
}

fn backoff(before: u32, chance: f64) -> Duration {
    let ceiling = BACKOFF.0.saturating_mul(1 << before.min(8)).min(BACKOFF.1);
    ceiling.mul_f64(chance.clamp(0.0, 1.0))
}

/// How many requests may be retries: 20 % of those in the last 10 s and 10 more a second, as Gateway API's
/// `retryConstraint` words it; at most 20 % and 3 of those under way.
#[derive(Debug, Default)]
pub struct Budget {
    /// Requests of each of the last ten seconds: counted by every request, so without a lock.
    requests: [Slot; 10],
    /// (second, retries) of the same. Locked only when a request has failed.
    retries: Mutex<[(u64, u64); 10]>,
    in_flight: AtomicU64,
    retrying: AtomicU64,
}

#[derive(Debug, Default)]
struct Slot {
    second: AtomicU64,
    count: AtomicU64,
}

const PERCENT: u64 = 20;
const PER_SECOND: u64 = 10;

impl Budget {
    /// Counts a request that begins at `now` on the caller's clock. Undone by [`Budget::end`].
    pub fn begin(&self, now: Duration) {
        let second = now.as_secs();
        let slot = &self.requests[(second % 10) as usize];
        // Two workers may both see the second turn; a request or two is then not counted, which errs to fewer retries.
        if slot.second.swap(second, Relaxed) != second {
            slot.count.store(0, Relaxed);
        }
        slot.count.fetch_add(1, Relaxed);
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// The request has ended.
    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// Takes one retry out of the budget, if it has one left. The retry ends with [`Budget::retried`].
    pub fn take(&self, now: Duration) -> bool {
        let second = now.as_secs();
        let recent = |at: u64| second.saturating_sub(at) < 10;
        let mut retries = self.retries.lock().unwrap_or_else(PoisonError::into_inner);
        let in_flight = self.in_flight.load(Relaxed);
        if self.retrying.load(Relaxed) * 100 >= in_flight * PERCENT + 3 * 100 {
            return false;
        }
        let requests: u64 = self
            .requests
            .iter()
            .filter(|slot| recent(slot.second.load(Relaxed)))
            .map(|slot| slot.count.load(Relaxed))
            .sum();
        let spent: u64 = retries.iter().filter(|slot| recent(slot.0)).map(|slot| slot.1).sum();
        if (spent + 1) * 100 > requests * PERCENT + PER_SECOND * 10 * 100 {
            return false;
        }
        let slot = &mut retries[(second % 10) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 += 1;
        self.retrying.fetch_add(1, Relaxed);
        true
    }

    /// A retry that was taken out of the budget has ended.
    pub fn retried(&self) {
        self.retrying.fetch_sub(1, Relaxed);
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }
}

/// A retry that was taken out of a budget; it has ended when this is dropped.
pub struct Retrying<'a>(pub &'a Budget);

impl Drop for Retrying<'_> {
    fn drop(&mut self) {
        self.0.retried();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attempt(failure: Failure, idempotent: bool) -> Attempt {
        Attempt { failure, before: 0, idempotent, replayable: true, left: None }
    }

    #[test]
    fn a_post_that_may_have_been_processed_is_never_sent_again() {
        for failure in [Failure::Reset, Failure::TooSlow, Failure::Status { retry_after: None }] {
            let verdict = decide(&attempt(failure, false), 0.5, || true);
            assert_eq!(verdict, Verdict::GiveUp(Counter::NotRetriedUnsafe));
        }
    }

    #[test]
    fn a_post_that_was_provably_not_processed_is_sent_again() {
        let failed = attempt(Failure::Unprocessed(Counter::RetriedConnect), false);
        assert!(matches!(decide(&failed, 0.5, || true), Verdict::Retry { .. }));
    }

    #[test]
    fn there_is_one_retry_and_none_past_the_budget_the_body_copy_or_the_deadline() {
        let failed = attempt(Failure::Reset, true);
        let again = Attempt { before: 1, ..failed };
        assert_eq!(decide(&again, 0.0, || true), Verdict::GiveUp(Counter::NotRetriedAttempts));
        assert_eq!(decide(&failed, 0.0, || false), Verdict::GiveUp(Counter::NotRetriedBudget));
        let large = Attempt { replayable: false, ..failed };
        assert_eq!(decide(&large, 0.0, || true), Verdict::GiveUp(Counter::NotRetriedBody));
        let late = Attempt { left: Some(Duration::from_millis(1)), ..failed };
        assert_eq!(decide(&late, 0.9, || true), Verdict::GiveUp(Counter::NotRetriedDeadline));
    }

    #[test]
    fn retry_after_is_waited_for_up_to_a_second() {
        let wait = Duration::from_secs(1);
        let failed = attempt(Failure::Status { retry_after: Some(wait) }, true);
        assert_eq!(decide(&failed, 0.0, || true), Verdict::Retry { after: wait, reason: Counter::RetriedStatus });
        let longer = attempt(Failure::Status { retry_after: Some(Duration::from_secs(2)) }, true);
        assert_eq!(decide(&longer, 0.0, || true), Verdict::GiveUp(Counter::NotRetriedDeadline));
    }

    #[test]
    fn at_most_a_fifth_and_three_of_those_under_way_are_retries() {
        let budget = Budget::default();
        (0..10).for_each(|_| budget.begin(Duration::ZERO));
        assert_eq!((0..100).filter(|_| budget.take(Duration::ZERO)).count(), 5);
        budget.retried();
        assert!(budget.take(Duration::ZERO));
    }

    #[test]
    fn two_threads_cannot_both_take_the_last_retry() {
        let budget = Budget::default();
        (0..1000).for_each(|_| budget.begin(Duration::ZERO));
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..1000).filter(|_| budget.take(Duration::ZERO)).count();
            let threads = [scope.spawn(take), scope.spawn(take)];
            threads.into_iter().map(|thread| thread.join().unwrap_or_default()).sum()
        });
        assert_eq!(taken, 203);
    }

    proptest! {
        #[test]
        fn retries_never_exceed_a_fifth_of_requests_and_ten_a_second(
            steps in proptest::collection::vec((0u64..200, 0u64..200), 1..40)
        ) {
            let budget = Budget::default();
            let mut history = Vec::new();
            for (second, (requests, wanted)) in steps.into_iter().enumerate() {
                let now = Duration::from_secs(second as u64);
                (0..requests).for_each(|_| budget.begin(now));
                let granted = (0..wanted).filter(|_| budget.take(now)).map(|_| budget.retried()).count() as u64;
                history.push((requests, granted));
                let from = history.len().saturating_sub(10);
                let sums = history[from..].iter().fold((0, 0), |sum, s| (sum.0 + s.0, sum.1 + s.1));
                // Of the moment of a grant: later, the window forgets requests whose retries it still holds.
                prop_assert!(granted == 0 || sums.1 * 100 <= sums.0 * PERCENT + PER_SECOND * 10 * 100);
            }
        }
    }
}
