//! What checks say of endpoints, besides what requests meet. One that is unwell is ejected until it is well, as far as the
//! floor lets it be; where all are unwell, the checks are taken to be wrong, and say nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::{Floor, Reason, State, Vitals};

/// As long as it is unwell: no request tries it before. 317 years.
const UNTIL_WELL: Duration = Duration::from_secs(10_000_000_000);

impl State {
    /// Whether nobody but its checks can end this.
    pub fn is_until_well(self) -> bool {
        self == Self::Ejected { until: UNTIL_WELL }
    }
}

impl Vitals {
    /// Whether its checks say so.
    pub fn is_unwell(&self) -> bool {
        self.unwell.load(Relaxed)
    }

    /// Whether it is out of use, or may be, until its checks say otherwise.
    pub fn awaits_checks(&self) -> bool {
        self.is_unwell() || self.state().is_until_well()
    }
}

impl Floor {
    /// Its checks say from now on that an endpoint is well, or that it is not.
    pub fn checked(&self, vitals: &Arc<Vitals>, well: bool, now: Duration) {
        vitals.unwell.store(!well, Relaxed);
        self.follow_checks(now);
    }

    /// Whoever is there has no checks any more.
    pub fn unchecked(&self, now: Duration) {
        self.lock().members.iter().for_each(|vitals| vitals.unwell.store(false, Relaxed));
        self.follow_checks(now);
    }

    /// Brings everybody's state in line with what checks say: after a verdict, and after others have come or gone.
    pub fn follow_checks(&self, now: Duration) {
        let mut turning = self.lock();
        let members = Arc::clone(&turning.members);
        let all = !members.is_empty() && members.iter().all(|vitals| vitals.is_unwell());
        if all && members.iter().any(|vitals| vitals.state().is_until_well()) {
            turning.tally.common_cause += 1;
        }
        // Who is well first: that makes room.
        for vitals in members.iter().filter(|vitals| all || !vitals.is_unwell()) {
            if vitals.state().is_until_well() {
                turning.leave(vitals);
                vitals.forget();
                if vitals.period().is_zero() {
                    vitals.take(turning.detection.base_ejection_time);
                }
                vitals.turn(if all { State::Serving } else { State::Ramping { since: now } }, None, now);
            }
        }
        for vitals in members.iter().filter(|vitals| !all && vitals.is_unwell()) {
            let state = vitals.state();
            if state.is_until_well() || now < vitals.spared() || vitals.is_out_by_hand(now) {
                continue;
            }
            if !matches!(state, State::Ejected { .. }) && !turning.has_room() {
                turning.tally.floor += 1;
                continue;
            }
            vitals.probed.store(false, Relaxed);
            turning.eject(vitals, UNTIL_WELL, Some(Reason::HealthCheck), now);
            turning.tally.ejected(Reason::HealthCheck);
        }
        self.want(&mut turning);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Detection, Picked};
    use super::*;

    fn floor(n: usize) -> (Floor, Vec<Arc<Vitals>>) {
        let members: Vec<Arc<Vitals>> = (0..n).map(|_| Arc::default()).collect();
        let floor = Floor::default();
        floor.follow(&members.clone().into(), &Detection::DEFAULT, Duration::ZERO, || true);
        (floor, members)
    }

    const NOW: Duration = Duration::from_secs(1);

    #[test]
    fn one_that_is_unwell_is_left_alone_until_it_is_well_and_no_request_tries_it() {
        let (floor, members) = floor(3);
        floor.checked(&members[1], false, NOW);
        assert!(members[1].state().is_until_well());
        assert_eq!(members[1].history().last().and_then(|turn| turn.reason), Some(Reason::HealthCheck));
        let later = NOW + Duration::from_secs(86_400);
        for at in 0..100 {
            let picked = floor.pick(&members, true, later, || Some(at));
            assert_eq!(picked, Some(Picked { at, probe: false }));
        }
        floor.checked(&members[1], true, later);
        assert_eq!(members[1].state(), State::Ramping { since: later });
    }

    #[test]
    fn where_all_are_unwell_all_serve() {
        let (floor, members) = floor(2);
        floor.checked(&members[0], false, NOW);
        assert!(members[0].state().is_until_well());
        floor.checked(&members[1], false, NOW);
        assert_eq!([members[0].state(), members[1].state()], [State::Serving; 2]);
        floor.checked(&members[1], true, NOW);
        assert!(members[0].state().is_until_well());
    }

    #[test]
    fn who_has_no_checks_any_more_serves() {
        let (floor, members) = floor(3);
        floor.checked(&members[0], false, NOW);
        floor.unchecked(NOW);
        assert!(!members[0].state().is_until_well());
    }

    #[test]
    fn what_an_operator_says_holds_whatever_checks_say_until_its_time_is_over() {
        let (floor, members) = floor(3);
        let (minute, later) = (Duration::from_secs(60), NOW + Duration::from_secs(61));
        floor.eject_by_hand(&members[0], minute, NOW).unwrap();
        floor.checked(&members[0], false, NOW);
        floor.checked(&members[0], true, NOW);
        assert_eq!(members[0].state(), State::Ejected { until: NOW + minute });
        floor.checked(&members[0], false, NOW);
        floor.follow_checks(later);
        assert!(members[0].state().is_until_well());
        floor.restore_by_hand(&members[0], minute, later);
        floor.follow_checks(later + minute / 2);
        assert_eq!(members[0].state(), State::Serving);
        floor.follow_checks(later + minute);
        assert!(members[0].state().is_until_well());
    }

    #[test]
    fn a_whole_level_may_be_unwell_while_half_of_all_are_well() {
        let members: Vec<Arc<Vitals>> = (0..6).map(|_| Arc::default()).collect();
        members[3..].iter().for_each(|vitals: &Arc<Vitals>| vitals.put_into(1));
        let floor = Floor::default();
        floor.follow(&members.clone().into(), &Detection::DEFAULT, Duration::ZERO, || true);
        members[..3].iter().for_each(|vitals| floor.checked(vitals, false, NOW));
        assert!(members[..3].iter().all(|vitals| vitals.state().is_until_well()));
        floor.checked(&members[3], false, NOW);
        assert_eq!(members[3].state(), State::Serving, "it is needed");
        assert_eq!(members[3].share(NOW), 0.0, "and its level gets no more than the others can take");
        floor.checked(&members[4], false, NOW);
        floor.checked(&members[5], false, NOW);
        assert!(members.iter().all(|vitals| !vitals.state().is_until_well()), "all are unwell");
    }

    proptest! {
        #[test]
        fn half_of_them_serve_whatever_checks_say(
            n in 1usize..12, verdicts in proptest::collection::vec((0usize..12, any::<bool>()), 0..60)
        ) {
            let (floor, members) = floor(n);
            members[n.div_ceil(3)..].iter().for_each(|vitals| vitals.put_into(1));
            floor.follow(&members.clone().into(), &Detection::DEFAULT, NOW, || true);
            for (at, well) in verdicts {
                floor.checked(&members[at % n], well, NOW);
                let out = members.iter().filter(|vitals| matches!(vitals.state(), State::Ejected { .. })).count();
                prop_assert!(n - out >= n.div_ceil(2).max(1));
            }
        }
    }
}
