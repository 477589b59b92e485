//! What a policy changes, and what an operator's word does.

use std::sync::Arc;

use super::tests::{BAD, Backend, secs};
use super::*;

const GATEWAY: Outcome = Outcome::Bad(Fault::Gateway);
const LOCAL: Outcome = Outcome::Bad(Fault::LocalOrigin);

fn judged(endpoints: usize, detection: Detection) -> Backend {
    let backend = Backend::of(endpoints);
    backend.judge(&detection, secs(0));
    backend
}

/// So many requests in a second, of which so many fail; the failures come last.
fn requests(backend: &Backend, at: usize, good: u32, bad: u32) -> Option<Reason> {
    for _ in 0..good {
        backend.report(at, Outcome::Good, secs(1));
    }
    (0..bad).map(|_| backend.report(at, BAD, secs(1))).fold(None, Option::or)
}

#[test]
fn gateway_errors_in_a_row_eject_and_another_error_between_them_does_not() {
    let backend = judged(3, Detection { errors: 0, gateway_errors: 3, success_rate: 0.0, ..Detection::DEFAULT });
    let outcomes = [GATEWAY, GATEWAY, BAD, GATEWAY, GATEWAY];
    assert!(outcomes.iter().all(|outcome| backend.report(0, *outcome, secs(1)).is_none()));
    assert_eq!(backend.report(0, GATEWAY, secs(1)), Some(Reason::GatewayErrors));
}

#[test]
fn failures_without_an_answer_count_apart_only_where_a_policy_splits_them() {
    let split = Detection { errors: 2, local_failures: 3, split: true, ..Detection::DEFAULT };
    let backend = judged(3, split);
    assert!([BAD, LOCAL, LOCAL].iter().all(|outcome| backend.report(0, *outcome, secs(1)).is_none()));
    assert_eq!(backend.report(0, LOCAL, secs(1)), Some(Reason::LocalFailures));
    let backend = judged(3, Detection { errors: 2, local_failures: 3, ..Detection::DEFAULT });
    assert_eq!(backend.report(0, BAD, secs(1)), None);
    assert_eq!(backend.report(0, LOCAL, secs(1)), Some(Reason::Errors));
}

#[test]
fn a_success_rate_far_below_those_of_the_others_ejects_where_a_policy_asks_for_it() {
    let compared = Detection { errors: 0, success_rate: 0.0, deviations: 1.9, ..Detection::DEFAULT };
    for (detection, others, expected) in [
        (compared.clone(), 5, Some(Reason::Deviation)),
        // Too few to speak of a mean.
        (compared.clone(), 3, None),
        (Detection { deviations: 0.0, ..compared.clone() }, 5, None),
        (Detection { deviation: Against { hosts: 5, volume: 150 }, ..compared }, 5, None),
    ] {
        let backend = judged(others + 1, detection);
        (1..=others).for_each(|at| assert_eq!(requests(&backend, at, 100, 0), None));
        assert_eq!(requests(&backend, 0, 99, 10), expected);
    }
}

#[test]
fn a_share_of_failures_ejects_where_a_policy_asks_for_it() {
    let counted = Detection { errors: 0, success_rate: 0.0, failure_share: 0.1, ..Detection::DEFAULT };
    for (detection, others, expected) in [
        (counted.clone(), 5, Some(Reason::FailureShare)),
        (counted.clone(), 3, None),
        (Detection { failure_share: 0.2, ..counted.clone() }, 5, None),
        (Detection { failures: Against { hosts: 5, volume: 80 }, ..counted }, 5, None),
    ] {
        let backend = judged(others + 1, detection);
        (1..=others).for_each(|at| assert_eq!(requests(&backend, at, 60, 0), None));
        assert_eq!(requests(&backend, 0, 59, 7), expected);
    }
}

#[test]
fn a_rule_that_is_switched_off_ejects_nobody() {
    let backend = judged(3, Detection { errors: 0, success_rate: 0.0, ..Detection::DEFAULT });
    assert_eq!(backend.fails(0, 1_000, secs(1)), None);
}

#[test]
fn no_more_are_ejected_than_a_policy_allows() {
    let backend = judged(10, Detection { max_ejection_percent: 20, ..Detection::DEFAULT });
    let ejected = (0..10).filter(|at| backend.fails(*at, 7, secs(1)).is_some()).count();
    assert_eq!(ejected, 2);
    assert!(backend.floor.tally().floor > 0);
}

#[test]
fn a_policy_that_changes_resets_nothing_and_holds_for_the_next_request() {
    let backend = Backend::of(4);
    backend.fails(0, 7, secs(1));
    backend.fails(1, 4, secs(1));
    let before = backend.members[0].history();
    backend.judge(&Detection { errors: 5, ..Detection::DEFAULT }, secs(1));
    assert_eq!(backend.members[0].history(), before);
    assert_eq!(backend.members[1].in_a_row().errors, 4);
    assert_eq!(backend.fails(1, 1, secs(1)), Some(Reason::Errors));
    // Fewer may be ejected now: the oldest comes back.
    backend.judge(&Detection { max_ejection_percent: 1, ..Detection::DEFAULT }, secs(1));
    assert_eq!(backend.members[0].state(), State::Serving);
    assert!(matches!(backend.members[1].state(), State::Ejected { .. }));
}

#[test]
fn who_has_heard_of_new_endpoints_first_and_comes_last_changes_nothing() {
    let backend = Backend::of(4);
    backend.fails(0, 7, secs(1));
    let two: Arc<[_]> = backend.members[..2].iter().cloned().collect();
    backend.floor.follow(&two, &Detection { errors: 1, ..Detection::DEFAULT }, secs(1), || false);
    assert_eq!((backend.floor.ejected(), backend.floor.detection()), ((1, 2), Arc::default()));
    assert_eq!(backend.fails(3, 7, secs(1)), Some(Reason::Errors));
}

#[test]
fn an_operators_word_ejects_for_as_long_as_it_says_and_then_the_endpoint_is_tried() {
    let backend = Backend::of(2);
    assert_eq!(backend.floor.eject_by_hand(&backend.members[0], secs(30), secs(1)), Ok(()));
    assert_eq!(backend.members[0].state(), State::Ejected { until: secs(31) });
    assert_eq!(backend.members[0].history().last().unwrap().reason, Some(Reason::Operator));
    assert!((0..50).all(|_| backend.pick(true, secs(30)).at == 1));
    assert_eq!(backend.pick(true, secs(31)), Picked { at: 0, probe: true });
    backend.probed(0, Outcome::Good, secs(31));
    assert!(matches!(backend.members[0].state(), State::Ramping { .. }));
}

#[test]
fn an_operators_word_ejects_nobody_below_the_floor_and_nobody_who_is_gone() {
    let backend = Backend::of(3);
    assert_eq!(backend.floor.eject_by_hand(&backend.members[0], secs(30), secs(1)), Ok(()));
    let refused = backend.floor.eject_by_hand(&backend.members[1], secs(30), secs(1));
    assert_eq!(refused, Err(NotEjected::Floor { ejected: 1, all: 3 }));
    assert_eq!(backend.in_use(), 2);
    assert_eq!(backend.floor.eject_by_hand(&backend.members[0], secs(60), secs(1)), Ok(()), "longer than before");
    assert_eq!(backend.floor.ejected(), (1, 1));
    assert_eq!(backend.floor.eject_by_hand(&Arc::default(), secs(30), secs(1)), Err(NotEjected::Gone));
}

#[test]
fn an_operators_word_restores_and_nothing_ejects_for_as_long_as_it_says() {
    let backend = Backend::of(2);
    backend.fails(0, 7, secs(1));
    backend.floor.restore_by_hand(&backend.members[0], secs(30), secs(1));
    assert_eq!((backend.members[0].state(), backend.floor.ejected()), (State::Serving, (0, 1)));
    assert_eq!(backend.fails(0, 100, secs(30)), None);
    assert_eq!(backend.fails(0, 1, secs(31)), Some(Reason::Errors));
}

#[test]
fn one_that_is_held_restored_is_asked_on_purpose_by_nobody_however_it_fails() {
    let backend = Backend::of(3);
    backend.floor.restore_by_hand(&backend.members[0], secs(30), secs(1));
    assert_eq!(backend.members[0].history().last().unwrap().reason, Some(Reason::Operator));
    backend.fails(0, 20, secs(2));
    assert!((0..100).all(|_| !backend.pick(true, secs(2)).probe));
    assert!((0..10).any(|_| backend.pick(true, secs(31)) == Picked { at: 0, probe: true }));
}

#[test]
fn whoever_an_operator_ejected_comes_back_where_too_few_others_are_left() {
    let backend = Backend::of(4);
    backend.floor.eject_by_hand(&backend.members[0], secs(300), secs(1)).unwrap();
    backend.floor.eject_by_hand(&backend.members[1], secs(300), secs(2)).unwrap();
    let three: Arc<[_]> = backend.members[..3].iter().cloned().collect();
    backend.floor.follow(&three, &Detection::DEFAULT, secs(3), || true);
    assert_eq!(backend.members[0].state(), State::Serving, "the oldest first");
    assert!(matches!(backend.members[1].state(), State::Ejected { .. }));
}
