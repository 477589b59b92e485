//! PURE: one switch for a whole destination. Closed, everything passes; after too many failures it opens, and everything is
//! answered at once; after a while it is half open, and one request at a time finds out whether it may close again.
//!
//! Ejection does the same for each endpoint, and keeps half of them in use. This is for those who want the classic one: it
//! exists where a policy asks for it, and costs nothing where none does.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheetbend_control_plane_client::model::CircuitBreaker;

use super::outlier::Outcome;
use super::window::Window;

/// Whether requests pass. Times are on the caller's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Circuit {
    /// All of them.
    #[default]
    Closed,
    /// None, until then.
    Open {
        /// When the first one may try.
        until: Duration,
    },
    /// One at a time, or one more for each recovery timeout that none of them ends within.
    HalfOpen {
        /// How many went well since.
        successes: u32,
        /// Whether one is under way.
        busy: bool,
    },
}

impl Circuit {
    /// When the first one may try, of an open one.
    pub fn next_trial(self) -> Option<Duration> {
        match self {
            Self::Open { until } => Some(until),
            Self::Closed | Self::HalfOpen { .. } => None,
        }
    }
}

/// A request that may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Admitted {
    /// It finds out whether the circuit may close. Its number.
    trial: Option<u32>,
    /// Of which state it is; what comes later than the next one says nothing.
    turn: u32,
}

impl Admitted {
    /// Whether it finds out if the circuit may close.
    pub fn is_trial(self) -> bool {
        self.trial.is_some()
    }
}

/// A request that may not pass, and how long nothing will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IsOpen(pub Duration);

/// What is shown of a breaker.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shown {
    /// Its policy.
    pub policy: CircuitBreaker,
    /// Its state.
    pub circuit: Circuit,
    /// Failures within the monitoring period.
    pub failures: u32,
    /// How often it has opened.
    pub opened: u64,
    /// How many requests it has turned away.
    pub rejected: u64,
    /// When it turned into what, the newest at the end.
    pub history: Vec<(Duration, Circuit)>,
}

/// A destination's breaker, shared by all workers.
#[derive(Debug, Default)]
pub struct Breaker {
    /// Whether a policy asks for it.
    on: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    policy: CircuitBreaker,
    circuit: Circuit,
    turn: u32,
    /// Trials so far, and when the latest began.
    trials: u32,
    tried: Duration,
    failures: Window,
    opened: u64,
    rejected: u64,
    history: VecDeque<(Duration, Circuit)>,
}

impl Breaker {
    /// Nothing waits while it is held.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The policy is this one from now on; its state stays as it is. Without one everything passes.
    pub fn follow(&self, policy: Option<&CircuitBreaker>) {
        if policy.is_none() && !self.on.load(Relaxed) {
            return;
        }
        let mut inner = self.lock();
        self.on.store(policy.is_some(), Relaxed);
        match policy {
            Some(policy) => inner.policy = policy.clone(),
            None => {
                let (opened, rejected, trials) = (inner.opened, inner.rejected, inner.trials);
                // What was admitted before has nothing to say to whatever comes later.
                let turn = inner.turn.wrapping_add(2);
                *inner = Inner { opened, rejected, trials, turn, ..Inner::default() };
            }
        }
    }

    /// Whether a request may pass; `None` without a policy.
    pub fn admit(&self, now: Duration) -> Result<Option<Admitted>, IsOpen> {
        if !self.on.load(Relaxed) {
            return Ok(None);
        }
        let mut inner = self.lock();
        let overdue = inner.tried + inner.policy.recovery_timeout;
        let wait = match inner.circuit {
            Circuit::Closed => return Ok(Some(Admitted { trial: None, turn: inner.turn })),
            Circuit::Open { until } if now >= until => {
                inner.turns(Circuit::HalfOpen { successes: 0, busy: true }, now);
                return Ok(Some(inner.tries(now)));
            }
            Circuit::HalfOpen { successes, busy } if !busy || now >= overdue => {
                inner.circuit = Circuit::HalfOpen { successes, busy: true };
                return Ok(Some(inner.tries(now)));
            }
            Circuit::Open { until } => until - now,
            Circuit::HalfOpen { .. } => Duration::ZERO,
        };
        inner.rejected += 1;
        Err(IsOpen(wait))
    }

    /// What came of a request. Gives whether the breaker has opened because of it.
    pub fn report(&self, admitted: Admitted, outcome: Outcome, now: Duration) -> bool {
        let mut inner = self.lock();
        if !self.on.load(Relaxed) || !inner.heeds(admitted) {
            return false;
        }
        // Of several trials, the latest is the one that is waited for.
        let busy = admitted.trial != Some(inner.trials);
        match (inner.circuit, outcome) {
            (Circuit::Closed, Outcome::Bad(_)) => {
                let period = inner.policy.monitoring_period;
                inner.failures.count(true, period, now);
                let opens = inner.failures.sum(period, now).1 >= inner.policy.failure_threshold;
                if opens {
                    inner.open(now);
                }
                opens
            }
            (Circuit::HalfOpen { .. }, Outcome::Bad(_)) if admitted.is_trial() => {
                inner.open(now);
                true
            }
            (Circuit::HalfOpen { successes, busy: was }, Outcome::Good) if admitted.is_trial() => {
                match successes + 1 >= inner.policy.success_threshold {
                    true => inner.turns(Circuit::Closed, now),
                    false => {
                        inner.circuit = Circuit::HalfOpen { successes: successes + 1, busy: was && busy };
                    }
                }
                false
            }
            // Whoever gave up found out nothing.
            (Circuit::HalfOpen { successes, busy: was }, Outcome::Unknown) if admitted.is_trial() => {
                inner.circuit = Circuit::HalfOpen { successes, busy: was && busy };
                false
            }
            _ => false,
        }
    }

    /// How often it has opened.
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    /// What is to be shown; `None` without a policy.
    pub fn shown(&self, now: Duration) -> Option<Shown> {
        if !self.on.load(Relaxed) {
            return None;
        }
        let inner = self.lock();
        Some(Shown {
            policy: inner.policy.clone(),
            circuit: inner.circuit,
            failures: inner.failures.sum(inner.policy.monitoring_period, now).1,
            opened: inner.opened,
            rejected: inner.rejected,
            history: inner.history.iter().copied().collect(),
        })
    }
}

impl Inner {
    fn tries(&mut self, now: Duration) -> Admitted {
        self.trials = self.trials.wrapping_add(1);
        self.tried = now;
        Admitted { trial: Some(self.trials), turn: self.turn }
    }

    /// Whether what came of a request says something now: of this state, or, of the trial that closed it, how it went on.
    fn heeds(&self, admitted: Admitted) -> bool {
        let closed_it = admitted.is_trial() && self.circuit == Circuit::Closed;
        self.turn == admitted.turn || closed_it && self.turn == admitted.turn.wrapping_add(1)
    }

    fn turns(&mut self, circuit: Circuit, now: Duration) {
        /// The last turns that are remembered.
        const HISTORY: usize = 16;
        self.circuit = circuit;
        self.turn = self.turn.wrapping_add(1);
        self.failures.clear();
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((now, circuit));
    }

    fn open(&mut self, now: Duration) {
        self.opened += 1;
        self.turns(Circuit::Open { until: now + self.policy.recovery_timeout }, now);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, AtomicU64};

    use proptest::prelude::*;

    use super::super::outlier::Fault;
    use super::*;

    const BAD: Outcome = Outcome::Bad(Fault::Gateway);

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn policy() -> CircuitBreaker {
        CircuitBreaker {
            failure_threshold: 3,
            recovery_timeout: secs(30),
            monitoring_period: secs(10),
            success_threshold: 2,
        }
    }

    fn breaker() -> Breaker {
        let breaker = Breaker::default();
        breaker.follow(Some(&policy()));
        breaker
    }

    /// A request from beginning to end, if it may pass.
    fn ask(breaker: &Breaker, outcome: Outcome, now: Duration) -> bool {
        let Ok(admitted) = breaker.admit(now) else { return false };
        breaker.report(admitted.unwrap(), outcome, now);
        true
    }

    fn opened(now: Duration) -> Breaker {
        let breaker = breaker();
        assert!((0..3).all(|_| ask(&breaker, BAD, now)));
        breaker
    }

    #[test]
    fn as_many_failures_as_the_threshold_within_the_period_open_it_and_what_is_older_counts_no_more() {
        let breaker = breaker();
        assert!([1, 2, 13].iter().all(|at| ask(&breaker, BAD, secs(*at))));
        assert!((0..100).all(|_| ask(&breaker, Outcome::Good, secs(13))), "successes neither clear nor count");
        assert!(ask(&breaker, BAD, secs(14)));
        assert!(ask(&breaker, BAD, secs(14)));
        assert_eq!(breaker.admit(secs(15)), Err(IsOpen(secs(29))));
        assert_eq!(breaker.shown(secs(15)).unwrap().circuit, Circuit::Open { until: secs(44) });
    }

    #[test]
    fn half_open_it_lets_one_request_through_at_a_time_and_closes_after_enough_went_well() {
        let breaker = opened(secs(1));
        assert!(!ask(&breaker, Outcome::Good, secs(30)));
        let first = breaker.admit(secs(31)).unwrap().unwrap();
        assert_eq!(breaker.admit(secs(31)), Err(IsOpen(Duration::ZERO)), "one at a time");
        breaker.report(first, Outcome::Good, secs(31));
        assert_eq!(breaker.shown(secs(31)).unwrap().circuit, Circuit::HalfOpen { successes: 1, busy: false });
        assert!(ask(&breaker, Outcome::Good, secs(31)));
        assert_eq!(breaker.shown(secs(31)).unwrap().circuit, Circuit::Closed);
    }

    #[test]
    fn a_failure_while_it_is_half_open_opens_it_again() {
        let breaker = opened(secs(1));
        assert!(ask(&breaker, BAD, secs(31)));
        assert_eq!(breaker.admit(secs(60)), Err(IsOpen(secs(1))));
        assert_eq!(breaker.shown(secs(60)).unwrap().opened, 2);
    }

    #[test]
    fn whoever_gives_up_makes_room_for_the_next_and_decides_nothing() {
        let breaker = opened(secs(1));
        assert!(ask(&breaker, Outcome::Unknown, secs(31)));
        assert_eq!(breaker.shown(secs(31)).unwrap().circuit, Circuit::HalfOpen { successes: 0, busy: false });
    }

    #[test]
    fn a_trial_that_takes_long_lets_another_one_try_and_what_comes_of_either_counts() {
        let breaker = opened(secs(1));
        let slow = breaker.admit(secs(31)).unwrap().unwrap();
        assert_eq!(breaker.admit(secs(60)), Err(IsOpen(Duration::ZERO)));
        let next = breaker.admit(secs(61)).unwrap().unwrap();
        breaker.report(slow, Outcome::Good, secs(62));
        let shown = |now| breaker.shown(now).unwrap().circuit;
        assert_eq!(shown(secs(62)), Circuit::HalfOpen { successes: 1, busy: true }, "the other is under way");
        assert_eq!(breaker.admit(secs(62)), Err(IsOpen(Duration::ZERO)));
        breaker.report(next, Outcome::Good, secs(63));
        assert_eq!(shown(secs(63)), Circuit::Closed);
    }

    #[test]
    fn a_trial_that_breaks_off_after_it_closed_the_circuit_is_one_failure() {
        let breaker = opened(secs(1));
        assert!(ask(&breaker, Outcome::Good, secs(31)));
        let trial = breaker.admit(secs(32)).unwrap().unwrap();
        breaker.report(trial, Outcome::Good, secs(32));
        assert_eq!(breaker.shown(secs(32)).unwrap().circuit, Circuit::Closed);
        breaker.report(trial, BAD, secs(33));
        assert_eq!(breaker.shown(secs(33)).unwrap().failures, 1);
        assert!(ask(&breaker, BAD, secs(33)) && ask(&breaker, BAD, secs(33)));
        assert!(!ask(&breaker, Outcome::Good, secs(34)), "it is the third");
    }

    #[test]
    fn what_was_admitted_under_a_policy_that_is_gone_says_nothing_under_the_next() {
        let breaker = opened(secs(1));
        let old = breaker.admit(secs(31)).unwrap().unwrap();
        breaker.follow(None);
        breaker.follow(Some(&policy()));
        assert!((0..3).all(|_| ask(&breaker, BAD, secs(32))));
        let trial = breaker.admit(secs(62)).unwrap().unwrap();
        breaker.report(old, Outcome::Good, secs(62));
        breaker.report(old, BAD, secs(62));
        assert_eq!(breaker.shown(secs(62)).unwrap().circuit, Circuit::HalfOpen { successes: 0, busy: true });
        breaker.report(trial, Outcome::Good, secs(62));
    }

    #[test]
    fn what_was_sent_before_it_opened_changes_nothing_afterwards() {
        let breaker = breaker();
        let before = breaker.admit(secs(1)).unwrap().unwrap();
        assert!((0..3).all(|_| ask(&breaker, BAD, secs(1))));
        let trial = breaker.admit(secs(31)).unwrap().unwrap();
        assert!(!breaker.report(before, BAD, secs(31)));
        breaker.report(before, Outcome::Good, secs(31));
        assert_eq!(breaker.shown(secs(31)).unwrap().circuit, Circuit::HalfOpen { successes: 0, busy: true });
        breaker.report(trial, Outcome::Good, secs(31));
    }

    #[test]
    fn a_policy_that_changes_resets_nothing_and_one_that_goes_lets_everything_pass() {
        let breaker = opened(secs(1));
        breaker.follow(Some(&CircuitBreaker { success_threshold: 1, ..policy() }));
        assert!(!ask(&breaker, Outcome::Good, secs(2)));
        breaker.follow(None);
        assert_eq!(breaker.admit(secs(2)), Ok(None));
        assert_eq!(breaker.shown(secs(2)), None);
    }

    /// Four workers fail, wait and try: of each opening there is one trial at a time, whoever wins it, and one verdict.
    #[test]
    fn workers_together_open_it_once_and_never_try_twice_at_once() {
        let breaker = breaker();
        let (trying, twice, opened) = (Mutex::new(Vec::new()), AtomicBool::new(false), AtomicU32::new(0));
        let clock = AtomicU64::new(1);
        let worker = || {
            for _ in 0..50_000 {
                let now = Duration::from_millis(clock.fetch_add(1, Relaxed));
                let Ok(Some(admitted)) = breaker.admit(now) else { continue };
                let is_trial = admitted.is_trial();
                if is_trial {
                    // Whoever sleeps through the others' whole time in its trial makes room for one more.
                    let soon = |other: &Duration| other.abs_diff(now) < policy().recovery_timeout;
                    let mut all = trying.lock().unwrap();
                    twice.fetch_or(all.iter().any(soon), Relaxed);
                    all.push(now);
                    drop(all);
                    std::thread::yield_now();
                    trying.lock().unwrap().retain(|other| *other != now);
                }
                let well = is_trial && now.as_millis().is_multiple_of(3);
                let opens = breaker.report(admitted, if well { Outcome::Good } else { BAD }, now);
                opened.fetch_add(u32::from(opens), Relaxed);
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(worker))));
        assert!(!twice.into_inner(), "two at once");
        let told = u64::from(opened.into_inner());
        // How often depends on who is let run: a worker may sleep through the others' whole time in its trial.
        assert!(told > 0, "it never opened");
        assert_eq!(breaker.opened(), told);
    }

    proptest! {
        #[test]
        fn nothing_passes_while_it_is_open_and_one_at_a_time_or_in_a_recovery_timeout_while_it_is_half_open(
            events in proptest::collection::vec((0u8..4, 0u64..5_000), 0..300)
        ) {
            let breaker = breaker();
            let (mut now, mut under_way, mut tried) = (secs(1), Vec::new(), secs(0));
            for (what, passed) in events {
                now += Duration::from_millis(passed);
                let before = breaker.shown(now).unwrap().circuit;
                match what {
                    0 | 1 => match breaker.admit(now) {
                        Ok(admitted) => {
                            let passes = match before {
                                Circuit::Closed => true,
                                Circuit::Open { until } => now >= until,
                                Circuit::HalfOpen { busy, .. } => !busy || now >= tried + secs(30),
                            };
                            prop_assert!(passes, "{before:?}");
                            if admitted.is_some_and(Admitted::is_trial) {
                                tried = now;
                            }
                            under_way.extend(admitted.map(|admitted| (admitted, now)));
                        }
                        Err(IsOpen(_)) => prop_assert_ne!(before, Circuit::Closed),
                    },
                    _ => if !under_way.is_empty() {
                        let (admitted, _) = under_way.remove(passed as usize % under_way.len());
                        let outcome = [BAD, Outcome::Good, Outcome::Unknown][passed as usize % 3];
                        breaker.report(admitted, outcome, now);
                    },
                }
                let current = breaker.lock().turn;
                let soon = |(one, at): &&(Admitted, Duration)| {
                    one.is_trial() && one.turn == current && now < *at + secs(30)
                };
                prop_assert!(under_way.iter().filter(soon).count() <= 1);
            }
        }
    }
}
