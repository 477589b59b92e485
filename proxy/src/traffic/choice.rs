//! PURE: which endpoint a request goes to: first in which level, then who in it. A few draws find one that may be picked;
//! where they do not, since hardly anybody may, all are looked at.

use std::sync::Arc;
use std::time::Duration;

use sheetbend_control_plane_client::model::{LoadBalancer, Warmup};

use super::balance::levels::Shares;
use super::balance::{Level, Load, Member, warmup};
use super::outlier::{State, Vitals};

/// The endpoints of a backend, ready for picks.
#[derive(Debug, Default)]
pub struct Choice {
    vitals: Arc<[Arc<Vitals>]>,
    /// The first is asked first; none has nobody in it.
    levels: Box<[Level]>,
    /// How much goes to which level, where there are several.
    shares: Option<Shares>,
    warmup: Option<Warmup>,
}

impl Choice {
    /// Among `vitals`, whose numbers `levels` hold. `chance` gives random bits.
    pub fn new(
        vitals: Arc<[Arc<Vitals>]>,
        levels: Vec<Vec<Member>>,
        policy: &LoadBalancer,
        mut chance: impl FnMut() -> u64,
    ) -> Self {
        for (members, level) in levels.iter().zip(0..) {
            members.iter().filter_map(|member| vitals.get(member.number as usize)).for_each(|one| one.put_into(level));
        }
        let levels: Box<[Level]> = levels.into_iter().map(|one| Level::new(one, policy, &mut chance)).collect();
        let shares = (levels.len() > 1).then(|| Shares::new(levels.len()));
        Self { vitals, levels, shares, warmup: policy.warmup.clone() }
    }

    /// What is known of each of them.
    pub fn vitals(&self) -> &Arc<[Arc<Vitals>]> {
        &self.vitals
    }

    /// Picks one, another than those `tried` where there is another; `None` of none. `place` is the caller's on the ring,
    /// `chances` gives random bits.
    pub fn pick(
        &self,
        place: Option<u64>,
        tried: impl Fn(usize) -> bool,
        now: Duration,
        mut chances: impl FnMut() -> u64,
    ) -> Option<usize> {
        /// Half are in use at least: where weights are alike, all of these miss them once in 2^16 times.
        const DRAWS: usize = 16;
        let chance = unit(chances());
        let load = |at: usize| if tried(at) { None } else { self.load(at, chance, now) };
        let mut from = 0;
        for _ in 0..DRAWS {
            from = self.level(now, &mut chances);
            let level = self.levels.get(from)?;
            let picked = level.pick(place, chances(), now, load);
            if picked.is_some_and(|at| load(at).is_some()) {
                return picked;
            }
            if level.is_ring() {
                break;
            }
        }
        let find = |good: &dyn Fn(usize) -> bool, bits| self.find(from, place, bits, good);
        let state = |at: usize| self.vitals.get(at).map(|vitals| vitals.state());
        find(&|at| load(at).is_some(), chances())
            .or_else(|| find(&|at| self.load(at, chance, now).is_some(), chances()))
            .or_else(|| find(&|at| matches!(state(at), Some(State::Serving | State::Ramping { .. })), chances()))
            .or_else(|| find(&|at| state(at) == Some(State::Probing), chances()))
            .or_else(|| find(&|_| true, chances()))
    }

    /// What is known of the load of one, unless it should not be picked. `chance`, in `0.0..1.0`, is drawn once a pick, and
    /// decides about those whose share grows.
    pub fn load(&self, at: usize, chance: f64, now: Duration) -> Option<&Load> {
        let vitals = self.vitals.get(at)?;
        (vitals.admits(chance, now) && self.warmup.as_ref().is_none_or(|warmup| chance < warmed(warmup, vitals, now)))
            .then_some(&vitals.load)
    }

    /// One that is `good`, in a level from that one on: O(n).
    fn find(&self, from: usize, place: Option<u64>, chance: u64, good: &dyn Fn(usize) -> bool) -> Option<usize> {
        let others = (0..self.levels.len()).filter(|level| *level != from);
        let mut levels = std::iter::once(from).chain(others).filter_map(|level| self.levels.get(level));
        levels.find_map(|level| level.find(place, chance, good))
    }

    /// The level for a request.
    fn level(&self, now: Duration, mut chances: impl FnMut() -> u64) -> usize {
        let Some(shares) = &self.shares else { return 0 };
        let serving = |level: &Level| level.numbers().map(|at| self.serving(at, now)).sum();
        let count = |level: usize| self.levels.get(level).map_or((0, 0.0), |level| (level.len(), serving(level)));
        shares.pick(now, unit(chances()), count)
    }

    /// How much of its share one can take, in `0.0..=1.0`.
    fn serving(&self, at: usize, now: Duration) -> f64 {
        let Some(vitals) = self.vitals.get(at) else { return 0.0 };
        self.warmup.as_ref().map_or(1.0, |warmup| warmed(warmup, vitals, now)).min(vitals.share(now))
    }
}

/// How much of its share one gets that joined the others lately.
fn warmed(warmup: &Warmup, vitals: &Vitals, now: Duration) -> f64 {
    vitals.joined().map_or(1.0, |joined| warmup::share(warmup, now.saturating_sub(joined)))
}

/// An even number in `0.0..1.0`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use sheetbend_control_plane_client::model::{ConsistentHash, Simple};

    use super::super::outlier::{Detection, Fault, Floor, Outcome, Sent};
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    struct Backend {
        choice: Choice,
        floor: Floor,
        chance: StdRng,
    }

    impl Backend {
        /// Endpoints with these weights, level by level.
        fn of(levels: &[&[u32]], policy: &LoadBalancer) -> Self {
            let mut numbers = 0..;
            let member = |weight: &u32| {
                let number = numbers.next().unwrap();
                Member { number, address: ([127, 0, 0, number as u8], 80).into(), weight: *weight }
            };
            let mut member = member;
            let levels: Vec<Vec<Member>> = levels.iter().map(|level| level.iter().map(&mut member).collect()).collect();
            let vitals: Arc<[_]> = levels.iter().flatten().map(|_| Arc::<Vitals>::default()).collect();
            let mut chance = StdRng::seed_from_u64(7);
            let choice = Choice::new(vitals, levels, policy, || chance.random());
            let floor = Floor::default();
            floor.follow(choice.vitals(), &Detection::DEFAULT, Duration::ZERO, || true);
            Self { choice, floor, chance }
        }

        fn eject(&self, at: usize) {
            self.floor.eject_by_hand(&self.choice.vitals()[at], Duration::from_secs(1), NOW).unwrap();
        }

        /// Lets a request try an endpoint whose ejection is over.
        fn probe(&self, at: usize, now: Duration) -> Sent {
            let picked = self.floor.pick(self.choice.vitals(), true, now, || None).unwrap();
            assert_eq!((picked.at, picked.probe), (at, true));
            Sent { probe: true, turn: self.choice.vitals()[at].turns(), at: now }
        }

        fn report(&self, at: usize, sent: Sent, outcome: Outcome, now: Duration) {
            self.floor.report(&self.choice.vitals()[at], sent, outcome, now, || 1.0);
        }

        /// The share of picks that each gets.
        fn shares(&mut self, tried: &[usize], now: Duration) -> Vec<f64> {
            const PICKS: u32 = 2_000;
            let Self { choice, chance, .. } = self;
            let mut counts = vec![0; choice.vitals().len()];
            for _ in 0..PICKS {
                counts[choice.pick(None, |at| tried.contains(&at), now, || chance.random()).unwrap()] += 1;
            }
            counts.into_iter().map(|count| f64::from(count) / f64::from(PICKS)).collect()
        }
    }

    fn policies() -> Vec<LoadBalancer> {
        let simple = [Simple::PeakEwma, Simple::LeastRequest, Simple::RoundRobin, Simple::Random];
        let hash = ConsistentHash { use_source_ip: Some(true), ..ConsistentHash::default() };
        let ring = LoadBalancer { consistent_hash: Some(hash), ..LoadBalancer::default() };
        let simple = simple.map(|simple| LoadBalancer { simple: Some(simple), ..LoadBalancer::default() });
        simple.into_iter().chain([ring]).collect()
    }

    #[test]
    fn one_that_is_tried_gets_nothing_however_heavy_it_is_and_the_others_what_their_weights_say() {
        for policy in policies() {
            let mut backend = Backend::of(&[&[1, 100, 1, 3]], &policy);
            backend.eject(1);
            let of = |shares: Vec<f64>| {
                assert_eq!(shares[1], 0.0, "{policy:?}");
                // On a ring places are few where weights are as far apart.
                let even = (shares[0] - shares[2]).abs() < 0.05 && (shares[3] - 0.6).abs() < 0.1;
                assert!(even || policy.consistent_hash.is_some(), "{shares:?} by {policy:?}");
            };
            of(backend.shares(&[], NOW));
            backend.probe(1, NOW + Duration::from_secs(1));
            of(backend.shares(&[], NOW + Duration::from_secs(1)));
            let Backend { choice, chance, .. } = &mut backend;
            let again = choice.pick(None, |at| at != 1, NOW + Duration::from_secs(1), || chance.random());
            assert_ne!(again, Some(1), "another request tries it");
        }
    }

    #[test]
    fn a_level_that_comes_back_with_one_endpoint_gets_no_more_than_has_grown_of_its_share() {
        for policy in policies() {
            let mut backend = Backend::of(&[&[1], &[1]], &policy);
            backend.eject(0);
            assert_eq!(backend.shares(&[], NOW), [0.0, 1.0]);
            let back = NOW + Duration::from_secs(1);
            let sent = backend.probe(0, back);
            assert_eq!(backend.shares(&[], back)[0], 0.0);
            backend.report(0, sent, Outcome::Good, back);
            // It was ejected for 1 s: its share grows for half a second.
            for tenths in 0..5 {
                let now = back + Duration::from_millis(100) * tenths;
                let share = backend.shares(&[], now)[0];
                let grown = f64::from(tenths) / 5.0;
                assert!(share <= grown + 0.04, "{share} after {tenths} tenths of a second");
            }
            let later = back + Duration::from_millis(600);
            assert_eq!(backend.shares(&[], later)[0], 1.0);
        }
    }

    #[test]
    fn a_first_level_that_is_new_warms_up_while_the_next_goes_on() {
        let warmup = Warmup { duration: Duration::from_secs(10), ..Warmup::default() };
        let mut backend = Backend::of(&[&[1], &[1]], &LoadBalancer { warmup: Some(warmup), ..LoadBalancer::default() });
        let vitals = Arc::clone(backend.choice.vitals());
        backend.floor.follow(&[Arc::clone(&vitals[1])].into(), &Detection::DEFAULT, NOW, || true);
        backend.floor.follow(&vitals, &Detection::DEFAULT, NOW, || true);
        let share = backend.shares(&[], NOW + Duration::from_secs(5))[0];
        assert!((0.3..0.52).contains(&share), "{share}");
    }

    #[test]
    fn one_alone_is_picked_whatever_is_known_of_it() {
        let mut backend = Backend::of(&[&[1]], &LoadBalancer::default());
        assert_eq!(backend.shares(&[0], NOW), [1.0]);
        assert_eq!(Choice::default().pick(None, |_| false, NOW, || 0), None);
    }

    #[test]
    fn another_attempt_goes_to_another_endpoint_of_any_level() {
        for policy in policies() {
            let mut backend = Backend::of(&[&[1], &[1_000, 1]], &policy);
            let shares = backend.shares(&[0, 1], NOW);
            assert_eq!(shares, [0.0, 0.0, 1.0], "{policy:?}");
        }
    }

    /// What fails in the first level is kept for the floor alone, and the second does well.
    #[test]
    fn where_the_first_level_fails_the_next_gets_everything_and_half_of_all_stay_in_use() {
        let mut backend = Backend::of(&[&[1; 4], &[1]], &LoadBalancer::default());
        let mut now = NOW;
        for _ in 0..2_000 {
            now += Duration::from_millis(2);
            let Backend { choice, floor, chance } = &mut backend;
            let choose = || choice.pick(None, |_| false, now, || chance.random());
            let picked = floor.pick(choice.vitals(), true, now, choose).unwrap();
            let sent = Sent { probe: picked.probe, turn: choice.vitals()[picked.at].turns(), at: now };
            let outcome = if picked.at < 4 { Outcome::Bad(Fault::Gateway) } else { Outcome::Good };
            backend.report(picked.at, sent, outcome, now);
            assert!(backend.floor.ejected().0 <= 2);
        }
        assert_eq!(backend.floor.ejected(), (2, 2));
        assert_eq!(backend.shares(&[], now)[4], 1.0);
        // Whoever was passed over is asked again after a while.
        let later = backend.shares(&[], now + Duration::from_secs(11));
        assert!(later[4] < 0.5, "{later:?}");
    }
}
