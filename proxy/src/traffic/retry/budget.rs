//! How many requests may be retries. One budget per destination, shared by all workers: it is not multiplied by them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sheetbend_control_plane_client::model::RetryConstraint;

/// So many parts of the interval are counted each for itself, and forgotten as a whole.
const PARTS: usize = 10;
/// Retries at once, however few requests are under way; more where more are allowed a second.
const AT_ONCE: f64 = 3.0;

/// How many requests may be retries: 20 % of those in the last 10 s and 10 more a second, as Gateway API's
/// `retryConstraint` words it; at most 20 % and 3 of those under way.
#[derive(Debug)]
pub struct Budget {
    constraint: RetryConstraint,
    /// Requests of each part of the interval: counted by every request, so without a lock.
    requests: [Slot; PARTS],
    /// (part, retries) of the same. Locked only when a request has failed.
    retries: Mutex<[(u64, u64); PARTS]>,
    in_flight: AtomicU64,
    retrying: AtomicU64,
}

#[derive(Debug, Default)]
struct Slot {
    part: AtomicU64,
    count: AtomicU64,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(RetryConstraint::DEFAULT)
    }
}

impl Budget {
    /// Nothing has happened yet.
    pub fn new(constraint: RetryConstraint) -> Self {
        Self {
            constraint,
            requests: Default::default(),
            retries: Mutex::default(),
            in_flight: AtomicU64::new(0),
            retrying: AtomicU64::new(0),
        }
    }

    /// What it keeps to.
    pub fn constraint(&self) -> &RetryConstraint {
        &self.constraint
    }

    fn part(&self, now: Duration) -> u64 {
        let each = (self.constraint.interval.as_millis() as u64 / PARTS as u64).max(1);
        now.as_millis() as u64 / each
    }

    /// Counts a request that begins at `now` on the caller's clock. Undone by [`Budget::end`].
    pub fn begin(&self, now: Duration) {
        let part = self.part(now);
        let slot = &self.requests[part as usize % PARTS];
        // Two workers may both see the part turn; a request or two is then not counted, which errs to fewer retries.
        if slot.part.load(Relaxed) != part && slot.part.swap(part, Relaxed) != part {
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
        let part = self.part(now);
        let recent = |at: u64| part.saturating_sub(at) < PARTS as u64;
        let share = f64::from(self.constraint.percent) / 100.0;
        let a_second = f64::from(self.constraint.min_count) / self.constraint.min_interval.as_secs_f64();
        let mut retries = self.retries.lock().unwrap_or_else(PoisonError::into_inner);
        let at_once = self.in_flight.load(Relaxed) as f64 * share + AT_ONCE.max((a_second * 0.3).floor());
        if self.retrying.load(Relaxed) as f64 >= at_once {
            return false;
        }
        let requests: u64 = self
            .requests
            .iter()
            .filter(|slot| recent(slot.part.load(Relaxed)))
            .map(|slot| slot.count.load(Relaxed))
            .sum();
        let spent: u64 = retries.iter().filter(|slot| recent(slot.0)).map(|slot| slot.1).sum();
        if (spent + 1) as f64 > requests as f64 * share + self.constraint.floor() {
            return false;
        }
        let slot = &mut retries[part as usize % PARTS];
        // A worker that comes late with an earlier time does not undo what has been counted since.
        if slot.0 < part {
            *slot = (part, 0);
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
pub struct Retrying(pub Arc<Budget>);

impl Drop for Retrying {
    fn drop(&mut self) {
        self.0.retried();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    /// Workers take and give back over and over: at no moment are more under way than may be, and none is lost.
    #[test]
    fn workers_together_never_have_more_retries_under_way_than_may_be() {
        let budget = Budget::default();
        // Enough has happened for any number of retries, and nothing is under way: that makes three at once.
        (0..2_000_000).for_each(|_| budget.begin(Duration::ZERO));
        (0..2_000_000).for_each(|_| budget.end());
        let (retrying, exceeded) = (AtomicU64::new(0), std::sync::atomic::AtomicBool::new(false));
        let worker = || {
            for _ in 0..50_000 {
                if budget.take(Duration::ZERO) {
                    exceeded.fetch_or(retrying.fetch_add(1, Relaxed) >= 3, Relaxed);
                    std::thread::yield_now();
                    retrying.fetch_sub(1, Relaxed);
                    budget.retried();
                }
            }
        };
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(worker))));
        assert!(!exceeded.into_inner(), "more than three at once");
        assert_eq!(budget.retrying.load(Relaxed), 0);
    }

    /// Time goes on while workers take what they can: no more is granted than the parts of that time allow.
    #[test]
    fn workers_together_never_exceed_the_budget_of_any_interval() {
        let budget = Budget::default();
        let (clock, granted) = (AtomicU64::new(0), AtomicU64::new(0));
        (0..1_000).for_each(|_| budget.begin(Duration::ZERO));
        let worker = || {
            for _ in 0..50_000 {
                let now = Duration::from_millis(clock.fetch_add(1, Relaxed) / 5);
                if budget.take(now) {
                    granted.fetch_add(1, Relaxed);
                    budget.retried();
                }
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(worker))));
        // 40 s: a hundred in ten of them, and a fifth of the thousand requests in the first. Where a part turns, each worker
        // but the first may come late by one.
        let granted = granted.into_inner();
        assert!((300..=4 * 100 + 200 + 4 * 3).contains(&granted), "{granted} retries");
    }

    /// What a policy may ask for.
    fn any_constraint() -> impl Strategy<Value = RetryConstraint> {
        (0u32..=100, 1u64..60, 1u32..50, 1u64..20).prop_map(|(percent, interval, min_count, min_interval)| {
            let (interval, min_interval) = (Duration::from_secs(interval), Duration::from_secs(min_interval));
            RetryConstraint { percent, interval, min_count, min_interval }
        })
    }

    proptest! {
        #[test]
        fn retries_never_exceed_their_share_of_requests_and_the_least_rate(
            constraint in any_constraint(),
            steps in proptest::collection::vec((0u64..200, 0u64..200), 1..40)
        ) {
            let budget = Budget::new(constraint);
            let mut history = Vec::new();
            for (part, (requests, wanted)) in steps.into_iter().enumerate() {
                let now = constraint.interval / PARTS as u32 * part as u32;
                (0..requests).for_each(|_| budget.begin(now));
                let granted = (0..wanted).filter(|_| budget.take(now)).map(|_| budget.retried()).count() as u64;
                history.push((requests, granted));
                let from = history.len().saturating_sub(PARTS);
                let (requests, retries) = history[from..].iter().fold((0, 0), |sum, s| (sum.0 + s.0, sum.1 + s.1));
                // Of the moment of a grant: later, the window forgets requests whose retries it still holds.
                let most = requests as f64 * f64::from(constraint.percent) / 100.0 + constraint.floor();
                prop_assert!(granted == 0 || retries as f64 <= most, "{retries} of {requests}, {most} are the most");
            }
        }
    }
}
