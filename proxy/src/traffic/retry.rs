//! PURE: whether a failed request may be sent once more. The rule is that nothing is ever paid twice.

use std::time::Duration;

use sheetbend_control_plane_client::model::Retry;

use crate::telemetry::Counter;

mod budget;

pub use budget::{Budget, Retrying};

/// Shortest and longest ceiling of the wait before another attempt; the wait is drawn evenly between none and a ceiling
/// that doubles (full jitter, AWS "Exponential Backoff and Jitter").
pub const BACKOFF: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(250));
/// A route's own backoff is waited at least, and this many times as much at most.
pub const LONGEST_BACKOFF: u32 = 10;
/// Bytes of a body that are kept for another attempt.
pub const BODY_COPY: usize = 64 * 1024;
/// A `Retry-After` up to this long is waited for.
pub const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(1);
/// What holds for a request that no rule takes.
pub static DEFAULT: Retry = Retry::DEFAULT;

/// How an attempt failed, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The request provably had no effect; why.
    Unprocessed(Counter),
    /// The stream or the connection broke while the request may have been in the app's hands.
    Reset,
    /// There was no answer within the time of one attempt.
    TooSlow,
    /// Nothing moved for as long as its route allows.
    Idle,
    /// The answer was a failure; how long it asks us to wait, in whole seconds.
    Status {
        /// From 400 on.
        status: u16,
        /// `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// The call ended with this status before there was anything else of its answer.
    Grpc(u16),
    /// It was refused here, and would be again.
    Refused,
}

/// What is known when an attempt has failed.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// What its route wants.
    pub policy: &'a Retry,
    /// How it failed.
    pub failure: Failure,
    /// Attempts before it.
    pub before: u32,
    /// Whether a second effect is no harm: the method, or an Idempotency-Key.
    pub idempotent: bool,
    /// Whether the whole request is still at hand.
    pub replayable: bool,
    /// Whether its caller sends it again itself: then nobody else does, but for what had no effect.
    pub caller_retries: bool,
    /// Whether what followed from it was tried again already, further on.
    pub in_vain: bool,
    /// Time left until the request's deadline, if there is one.
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
pub fn decide(attempt: &Attempt<'_>, chance: f64, budget: impl FnOnce() -> bool) -> Verdict {
    let policy = attempt.policy;
    let reason = match attempt.failure {
        Failure::Unprocessed(reason) => reason,
        Failure::Reset => Counter::RetriedReset,
        Failure::TooSlow => Counter::RetriedTimeout,
        Failure::Status { status, .. } if policy.wants_status(status) => Counter::RetriedStatus,
        Failure::Grpc(status) if policy.wants_grpc(status) => Counter::RetriedGrpc,
        Failure::Status { .. } | Failure::Grpc(_) => return Verdict::GiveUp(Counter::NotRetriedPolicy),
        Failure::Idle => return Verdict::GiveUp(Counter::NotRetriedDeadline),
        Failure::Refused => return Verdict::GiveUp(Counter::NotRetriedRefused),
    };
    // The one gate that keeps whatever may have been paid from being paid again.
    let harmless = matches!(attempt.failure, Failure::Unprocessed(_)) || attempt.idempotent;
    if !harmless && !policy.non_idempotent {
        return Verdict::GiveUp(Counter::NotRetriedUnsafe);
    }
    let unprocessed = matches!(attempt.failure, Failure::Unprocessed(_));
    if attempt.caller_retries && !unprocessed {
        return Verdict::GiveUp(Counter::NotRetriedCaller);
    }
    if attempt.in_vain && !unprocessed {
        return Verdict::GiveUp(Counter::NotRetriedInVain);
    }
    if attempt.before >= policy.attempts() {
        return Verdict::GiveUp(Counter::NotRetriedAttempts);
    }
    if !attempt.replayable {
        return Verdict::GiveUp(Counter::NotRetriedBody);
    }
    let after = match attempt.failure {
        Failure::Status { retry_after: Some(wait), .. } if wait > LONGEST_RETRY_AFTER => {
            return Verdict::GiveUp(Counter::NotRetriedDeadline);
        }
        Failure::Status { retry_after: Some(wait), .. } => wait.max(policy.backoff.unwrap_or_default()),
        _ => backoff(policy.backoff, attempt.before, chance),
    };
    if attempt.left.is_some_and(|left| after >= left) {
        return Verdict::GiveUp(Counter::NotRetriedDeadline);
    }
    if !budget() {
        return Verdict::GiveUp(Counter::NotRetriedBudget);
    }
    Verdict::Retry { after, reason }
}

/// The wait before another attempt. What a route asks for is the least of it (HTTPRouteRetry, `backoff`).
fn backoff(asked: Option<Duration>, before: u32, chance: f64) -> Duration {
    let doubled = 1 << before.min(8);
    let (least, ceiling) = match asked {
        None => (Duration::ZERO, BACKOFF.0.saturating_mul(doubled).min(BACKOFF.1)),
        Some(least) => {
            let longest = least.saturating_mul(LONGEST_BACKOFF);
            (least, least.saturating_mul(doubled).saturating_mul(2).min(longest))
        }
    };
    least + ceiling.saturating_sub(least).mul_f64(chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sheetbend_control_plane_client::model::RetryOn;

    use super::*;

    fn attempt(failure: Failure, idempotent: bool) -> Attempt<'static> {
        Attempt {
            policy: &DEFAULT,
            failure,
            before: 0,
            idempotent,
            replayable: true,
            caller_retries: false,
            in_vain: false,
            left: None,
        }
    }

    #[test]
    fn a_post_that_may_have_been_processed_is_never_sent_again() {
        for failure in [Failure::Reset, Failure::TooSlow, UNAVAILABLE] {
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
        let failed = attempt(Failure::Status { status: 503, retry_after: Some(wait) }, true);
        assert_eq!(decide(&failed, 0.0, || true), Verdict::Retry { after: wait, reason: Counter::RetriedStatus });
        let longer = attempt(Failure::Status { status: 503, retry_after: Some(Duration::from_secs(2)) }, true);
        assert_eq!(decide(&longer, 0.0, || true), Verdict::GiveUp(Counter::NotRetriedDeadline));
    }

    const UNAVAILABLE: Failure = Failure::Status { status: 503, retry_after: None };

    fn with(policy: &Retry, failure: Failure, idempotent: bool, before: u32) -> Verdict {
        decide(&Attempt { policy, before, ..attempt(failure, idempotent) }, 0.0, || true)
    }

    #[test]
    fn a_route_widens_what_is_retried() {
        let own = |status| Failure::Status { status, retry_after: None };
        assert_eq!(with(&DEFAULT, own(500), true, 0), Verdict::GiveUp(Counter::NotRetriedPolicy));
        let codes = Retry { codes: vec![500, 429], ..Retry::DEFAULT };
        for status in [429, 500, 503] {
            assert!(matches!(with(&codes, own(status), true, 0), Verdict::Retry { .. }), "{status}");
        }
        let all = Retry { on: vec![RetryOn::ServerError], ..Retry::DEFAULT };
        assert!(matches!(with(&all, own(599), true, 0), Verdict::Retry { .. }));
        assert_eq!(with(&all, own(404), true, 0), Verdict::GiveUp(Counter::NotRetriedPolicy));
        let none = Retry { attempts: Some(0), ..Retry::DEFAULT };
        assert_eq!(with(&none, UNAVAILABLE, true, 0), Verdict::GiveUp(Counter::NotRetriedAttempts));
    }

    #[test]
    fn a_call_is_retried_for_the_grpc_statuses_that_its_route_names_and_in_so_many_words() {
        let asked = Retry { on: vec![RetryOn::Unavailable], non_idempotent: true, ..Retry::DEFAULT };
        assert!(matches!(with(&asked, Failure::Grpc(14), false, 0), Verdict::Retry { .. }));
        assert_eq!(with(&asked, Failure::Grpc(13), false, 0), Verdict::GiveUp(Counter::NotRetriedPolicy));
        let half = Retry { non_idempotent: false, ..asked };
        assert_eq!(with(&half, Failure::Grpc(14), false, 0), Verdict::GiveUp(Counter::NotRetriedUnsafe));
    }

    #[test]
    fn whoever_retries_itself_is_not_helped_but_with_what_had_no_effect() {
        let of = |failure| decide(&Attempt { caller_retries: true, ..attempt(failure, true) }, 0.0, || true);
        assert_eq!(of(UNAVAILABLE), Verdict::GiveUp(Counter::NotRetriedCaller));
        assert!(matches!(of(Failure::Unprocessed(Counter::RetriedConnect)), Verdict::Retry { .. }));
    }

    #[test]
    fn what_was_tried_again_in_vain_further_on_is_not_tried_again_here() {
        let of = |failure| decide(&Attempt { in_vain: true, ..attempt(failure, true) }, 0.0, || true);
        assert_eq!(of(UNAVAILABLE), Verdict::GiveUp(Counter::NotRetriedInVain));
        assert!(matches!(of(Failure::Unprocessed(Counter::RetriedPeerConnect)), Verdict::Retry { .. }));
    }

    #[test]
    fn waits_double_and_never_fall_below_what_the_route_asks_for() {
        let ceiling = |asked, before| backoff(asked, before, 1.0).as_millis();
        assert_eq!([0, 1, 2, 3, 9].map(|before| ceiling(None, before)), [25, 50, 100, 200, 250]);
        let asked = Some(Duration::from_millis(100));
        assert_eq!([0, 1, 2, 3, 9].map(|before| ceiling(asked, before)), [200, 400, 800, 1000, 1000]);
        assert_eq!(backoff(asked, 5, 0.0), Duration::from_millis(100));
    }

    fn any_policy() -> impl Strategy<Value = Retry> {
        let words = proptest::collection::vec(proptest::sample::select(RetryOn::ALL.to_vec()), 0..11);
        let codes = proptest::collection::vec(400u16..600, 0..5);
        (proptest::option::of(0u32..11), codes, words).prop_map(|(attempts, codes, words)| Retry {
            attempts,
            codes,
            on: words.into_iter().map(|(_, on)| on).collect(),
            backoff: None,
            non_idempotent: false,
        })
    }

    fn any_failure() -> impl Strategy<Value = Failure> {
        prop_oneof![
            Just(Failure::Reset),
            Just(Failure::TooSlow),
            Just(Failure::Refused),
            (400u16..600).prop_map(|status| Failure::Status { status, retry_after: None }),
            (0u16..17).prop_map(Failure::Grpc),
        ]
    }

    proptest! {
        #[test]
        fn no_policy_sends_a_post_twice_that_does_not_say_so_in_so_many_words(
            policy in any_policy(), failure in any_failure(), before in 0u32..3
        ) {
            prop_assert!(matches!(with(&policy, failure, false, before), Verdict::GiveUp(_)));
        }

        #[test]
        fn no_policy_makes_more_attempts_than_it_says(policy in any_policy(), failure in any_failure()) {
            prop_assert!(matches!(with(&policy, failure, true, policy.attempts()), Verdict::GiveUp(_)));
        }
    }
}
