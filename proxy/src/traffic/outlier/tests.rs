use std::sync::Arc;

use proptest::prelude::*;

use super::*;

/// A failure like any other.
pub(super) const BAD: Outcome = Outcome::Bad(Fault::Answer);

pub(super) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub(super) struct Backend {
    pub(super) floor: Floor,
    pub(super) members: Arc<[Arc<Vitals>]>,
}

impl Backend {
    pub(super) fn of(endpoints: usize) -> Self {
        let members: Arc<[Arc<Vitals>]> = (0..endpoints).map(|_| Arc::default()).collect();
        let floor = Floor::default();
        floor.follow(&members, &Detection::DEFAULT, Duration::ZERO, || true);
        Self { floor, members }
    }

    pub(super) fn judge(&self, detection: &Detection, now: Duration) {
        self.floor.follow(&self.members, detection, now, || true);
    }

    fn follow(&self, members: &Arc<[Arc<Vitals>]>, now: Duration) {
        self.floor.follow(members, &self.floor.detection(), now, || true);
    }

    pub(super) fn report(&self, at: usize, outcome: Outcome, now: Duration) -> Option<Reason> {
        let sent = Sent { probe: false, turn: self.members[at].turns(), at: now };
        self.floor.report(&self.members[at], sent, outcome, now, || 1.0)
    }

    pub(super) fn probed(&self, at: usize, outcome: Outcome, now: Duration) -> Option<Reason> {
        let sent = Sent { probe: true, turn: self.members[at].turns(), at: now };
        self.floor.report(&self.members[at], sent, outcome, now, || 1.0)
    }

    /// What came of the last of so many failures in a row.
    pub(super) fn fails(&self, at: usize, times: u32, now: Duration) -> Option<Reason> {
        (0..times).map(|_| self.report(at, BAD, now)).last().flatten()
    }

    /// Picks by turns, as long as nobody is tried.
    pub(super) fn pick(&self, retryable: bool, now: Duration) -> Picked {
        let n = self.members.len();
        let choose = || (1..=n).map(|at| at % n).find(|at| self.members[*at].admits(0.999_999, now)).or(Some(0));
        self.floor.pick(&self.members, retryable, now, choose).unwrap()
    }

    pub(super) fn in_use(&self) -> usize {
        self.members.iter().filter(|vitals| !matches!(vitals.state(), State::Ejected { .. })).count()
    }
}

#[test]
fn seven_failures_in_a_row_eject_and_six_do_not() {
    let backend = Backend::of(3);
    assert_eq!(backend.fails(0, 6, secs(1)), None);
    backend.report(0, Outcome::Good, secs(1));
    assert_eq!(backend.fails(0, 6, secs(1)), None);
    assert_eq!(backend.fails(0, 1, secs(1)), Some(Reason::Errors));
    assert_eq!(backend.members[0].state(), State::Ejected { until: secs(2) });
    assert_eq!(backend.members[0].history().last().unwrap().reason, Some(Reason::Errors));
}

#[test]
fn less_than_four_in_five_of_twenty_requests_eject() {
    let backend = Backend::of(3);
    for at in 0..19 {
        let outcome = if at % 3 == 0 { BAD } else { Outcome::Good };
        assert_eq!(backend.report(0, outcome, secs(at / 4)), None);
    }
    assert_eq!(backend.report(0, BAD, secs(5)), Some(Reason::SuccessRate));
}

#[test]
fn whoever_gave_up_and_what_we_refused_ourselves_says_nothing() {
    let backend = Backend::of(3);
    assert!((0..100).all(|_| backend.report(0, Outcome::Unknown, secs(1)).is_none()));
    assert_eq!(backend.members[0].recent(secs(10), secs(1)), (0, 0));
}

#[test]
fn an_ejected_endpoint_returns_after_one_good_probe_and_a_ramp() {
    let backend = Backend::of(2);
    backend.fails(0, 7, secs(1));
    assert_eq!(backend.pick(true, secs(1)), Picked { at: 1, probe: false });
    let probe = backend.pick(true, secs(2));
    assert_eq!(probe, Picked { at: 0, probe: true });
    assert_eq!(backend.pick(true, secs(2)), Picked { at: 1, probe: false }, "one at a time");
    backend.probed(0, Outcome::Good, secs(2));
    assert_eq!(backend.members[0].state(), State::Ramping { since: secs(2) });
    assert_eq!(backend.pick(true, secs(2)).at, 1, "a share that has only begun to grow");
    backend.report(0, Outcome::Good, secs(3));
    assert_eq!(backend.members[0].state(), State::Serving);
}

#[test]
fn a_probe_that_fails_doubles_the_time_up_to_a_minute() {
    let backend = Backend::of(2);
    backend.fails(0, 7, secs(1));
    let mut now = secs(1);
    for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
        let State::Ejected { until } = backend.members[0].state() else { panic!("{:?}", backend.members[0].state()) };
        assert_eq!(until - now, secs(expected));
        now = until;
        assert!(backend.pick(true, now).probe);
        let failed = backend.probed(0, BAD, now);
        assert_eq!(failed, Some(Reason::Probe));
    }
}

#[test]
fn a_probe_waits_for_a_request_that_may_be_sent_again_until_ten_others_have_passed() {
    let backend = Backend::of(2);
    backend.fails(0, 7, secs(1));
    assert!((0..10).all(|_| !backend.pick(false, secs(2)).probe));
    assert!(backend.pick(false, secs(2)).probe);
}

#[test]
fn a_caller_who_leaves_a_probe_makes_room_for_another_a_little_later() {
    let backend = Backend::of(2);
    backend.fails(0, 7, secs(1));
    for quarter in 0..3 {
        let now = secs(2) + Duration::from_millis(250) * quarter;
        assert!(backend.pick(true, now).probe);
        assert!(!backend.pick(true, now).probe, "one at a time");
        backend.probed(0, Outcome::Unknown, now);
        assert!(!backend.pick(true, now).probe, "not at once");
    }
}

#[test]
fn a_probe_that_fails_where_no_more_may_be_ejected_is_no_target_for_every_request() {
    let backend = Backend::of(4);
    backend.fails(0, 7, secs(1));
    assert!(backend.pick(true, secs(2)).probe);
    backend.fails(1, 7, secs(2));
    let three: Arc<[_]> = backend.members[..3].iter().cloned().collect();
    backend.follow(&three, secs(2));
    backend.probed(0, BAD, secs(2));
    assert_eq!(backend.members[0].state(), State::Serving);
    assert_eq!(backend.floor.tally().floor, 1);
}

#[test]
fn one_that_has_just_failed_is_asked_by_every_fourth_request_until_it_answers_well() {
    let backend = Backend::of(3);
    let asked = |retryable| backend.pick(retryable, secs(1)) == Picked { at: 0, probe: true };
    assert!((0..100).all(|_| !asked(true)), "nobody has failed");
    backend.report(0, BAD, secs(1));
    assert_eq!([asked(true), asked(true), asked(true), asked(true)], [false, false, false, true]);
    assert!((0..100).all(|_| !asked(true)), "one at a time");
    backend.probed(0, BAD, secs(1));
    assert_eq!((0..11).filter(|_| asked(false)).count(), 1, "seldom by what may not be sent again");
    backend.probed(0, Outcome::Good, secs(2));
    assert!((0..100).all(|_| !asked(true)), "it is well");
}

#[test]
fn nobody_is_asked_on_purpose_where_nobody_may_be_ejected() {
    for (endpoints, failing) in [(1, 1), (4, 3)] {
        let backend = Backend::of(endpoints);
        for at in 0..failing {
            backend.report(at, BAD, secs(1));
        }
        assert!((0..100).all(|_| !backend.pick(true, secs(1)).probe), "{failing} of {endpoints} fail");
    }
}

#[test]
fn an_answer_to_what_was_sent_before_it_failed_clears_nobody_of_a_common_cause() {
    let backend = Backend::of(2);
    backend.report(1, BAD, secs(2));
    let before = Sent { probe: false, turn: 0, at: secs(1) };
    backend.floor.report(&backend.members[1], before, Outcome::Good, secs(2), || 1.0);
    assert_eq!(backend.fails(0, 7, secs(2)), None);
    assert_eq!(backend.floor.tally().common_cause, 1);
}

#[test]
fn where_most_fail_at_once_nobody_is_ejected() {
    let backend = Backend::of(4);
    for _ in 0..20 {
        for at in 0..4 {
            assert_eq!(backend.report(at, BAD, secs(1)), None);
        }
    }
}

#[test]
fn where_a_first_level_fails_a_reserve_that_nobody_has_asked_does_not_leave_it_to_one() {
    let backend = Backend::of(11);
    backend.members[10].put_into(1);
    backend.judge(&Detection::DEFAULT, Duration::ZERO);
    for _ in 0..20 {
        let _ = (0..10).filter_map(|at| backend.report(at, BAD, secs(1))).count();
    }
    // Then the reserve begins to get something, and what comes of that decides.
    assert_eq!(backend.floor.ejected().0, 3);
    backend.report(10, BAD, secs(2));
    let _ = (0..10).filter_map(|at| backend.fails(at, 7, secs(2))).count();
    assert_eq!((backend.floor.ejected().0, backend.floor.tally().common_cause), (3, 1));
    backend.report(10, Outcome::Good, secs(4));
    let _ = (0..10).filter_map(|at| backend.fails(at, 7, secs(4))).count();
    assert_eq!((backend.floor.ejected(), backend.in_use()), ((5, 5), 6), "half of all stay");
}

#[test]
fn one_that_was_gone_for_a_while_is_still_ejected_and_counts() {
    let backend = Backend::of(4);
    backend.fails(0, 7, secs(1));
    let rest: Arc<[_]> = backend.members[1..].iter().cloned().collect();
    backend.follow(&rest, secs(1));
    backend.fails(1, 7, secs(1));
    assert_eq!(backend.floor.ejected(), (1, 1));
    backend.follow(&backend.members, secs(1));
    assert_eq!((backend.floor.ejected(), backend.in_use()), ((2, 2), 2));
}

#[test]
fn fewer_endpoints_call_the_oldest_back() {
    let backend = Backend::of(5);
    backend.fails(0, 7, secs(1));
    backend.fails(1, 7, secs(2));
    let three: Arc<[_]> = backend.members[..3].iter().cloned().collect();
    backend.follow(&three, secs(2));
    assert_eq!(backend.members[0].state(), State::Serving);
    assert!(matches!(backend.members[1].state(), State::Ejected { .. }));
}

#[test]
fn two_threads_never_take_the_last_place_below_the_floor_both() {
    for _ in 0..200 {
        let backend = Backend::of(8);
        std::thread::scope(|scope| {
            for half in 0..2 {
                let backend = &backend;
                scope.spawn(move || {
                    for at in (0..8).filter(|at| at % 2 == half) {
                        backend.fails(at, 7, secs(1));
                        // Not a common cause: the others do well.
                        (0..8).filter(|other| *other != at).for_each(|other| {
                            backend.report(other, Outcome::Good, secs(1));
                        });
                    }
                });
            }
        });
        assert_eq!(backend.floor.ejected().0, 8 - backend.in_use());
        assert!(backend.in_use() >= 4, "{} in use", backend.in_use());
    }
}

proptest! {
    #[test]
    fn half_are_in_use_whatever_happens(
        endpoints in 1usize..10, first in 0usize..10,
        events in proptest::collection::vec((0usize..10, 0u8..4, 0u64..3_000), 0..300)
    ) {
        let backend = Backend::of(endpoints);
        backend.members.iter().skip(first).for_each(|vitals| vitals.put_into(1));
        backend.follow(&backend.members, Duration::ZERO);
        let mut now = secs(1);
        let mut probes = Vec::new();
        for (at, what, passed) in events {
            now += Duration::from_millis(passed / 10);
            let at = at % endpoints;
            match what {
                0 => drop(backend.fails(at, 7, now)),
                1 => drop(backend.report(at, Outcome::Good, now)),
                2 => {
                    let picked = backend.pick(true, now);
                    probes.extend(picked.probe.then_some(picked.at));
                }
                _ => if let Some(at) = probes.pop() {
                    let outcome = if passed % 2 == 0 { Outcome::Good } else { BAD };
                    backend.probed(at, outcome, now);
                },
            }
            prop_assert!(backend.in_use() >= endpoints.div_ceil(2).max(1));
            prop_assert_eq!(backend.floor.ejected().0, endpoints - backend.in_use());
        }
    }

    #[test]
    fn a_state_survives_its_packing(kind in 0u8..4, nanos in 0u64..u64::MAX / 2) {
        let at = Duration::from_nanos(nanos & !3);
        let state = match kind {
            0 => State::Serving,
            1 => State::Ejected { until: at },
            2 => State::Probing,
            _ => State::Ramping { since: at },
        };
        prop_assert_eq!(State::unpack(state.pack()), state);
    }
}
