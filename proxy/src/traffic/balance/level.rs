//! PURE: a pick among equals. Each kind takes its endpoints' loads, chance and time as arguments, allocates nothing, and
//! looks at O(1) endpoints; a weighted choice or a place on a ring is found in O(log n).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sheetbend_control_plane_client::model::{LoadBalancer, Simple};

use super::Load;
use super::ring::{self, Ring};

/// An endpoint as a balancer sees it.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its number among all endpoints.
    pub number: u32,
    /// Where it is: its places on a ring.
    pub address: SocketAddr,
    /// Its share.
    pub weight: u32,
}

/// Endpoints among which one is picked.
#[derive(Debug)]
pub struct Level {
    /// Their numbers among all endpoints; in a row of chance, so that two proxies do not call them in step, and those that
    /// are ejected do not stand together.
    numbers: Box<[u32]>,
    /// Running sums of their weights, where those differ.
    shares: Option<Box<[u64]>>,
    how: How,
}

#[derive(Debug)]
enum How {
    PeakEwma,
    /// With what each was given so far: of two that are alike, the one that had less.
    LeastRequest(Box<[AtomicU32]>),
    /// With the number of the next turn.
    RoundRobin(AtomicU64),
    Random,
    Ring(Ring),
}

/// Draws, where one endpoint may not be used.
const DRAWS: usize = 4;
/// How far one that had less may be behind: what it missed while it was away is not made up for.
const BEHIND: f64 = 8.0;

impl Level {
    /// Ready for picks. `chance` gives random bits.
    pub fn new(mut members: Vec<Member>, policy: &LoadBalancer, mut chance: impl FnMut() -> u64) -> Self {
        // Fisher and Yates.
        for at in (1..members.len()).rev() {
            members.swap(at, scale(chance(), at + 1));
        }
        let differ = members.windows(2).any(|pair| pair[0].weight != pair[1].weight);
        let sums = members.iter().scan(0, |sum, member| {
            *sum += u64::from(member.weight);
            Some(*sum)
        });
        let shares = differ.then(|| sums.collect());
        let how = match (&policy.consistent_hash, policy.simple.unwrap_or_default()) {
            (Some(hash), _) => {
                let places = members.iter().zip(0..).map(|(member, at)| (at, member.address, member.weight));
                How::Ring(Ring::new(places, hash.minimum_ring_size.unwrap_or(ring::MINIMUM_SIZE)))
            }
            (None, Simple::PeakEwma) => How::PeakEwma,
            (None, Simple::LeastRequest) => How::LeastRequest(members.iter().map(|_| AtomicU32::new(0)).collect()),
            (None, Simple::RoundRobin) => How::RoundRobin(AtomicU64::new(chance() >> 32)),
            (None, Simple::Random) => How::Random,
        };
        Self { numbers: members.iter().map(|member| member.number).collect(), shares, how }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Whether a pick looks at as many as it takes to find one.
    pub fn is_ring(&self) -> bool {
        matches!(self.how, How::Ring(_))
    }

    /// Their numbers among all endpoints.
    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.numbers.iter().map(|number| *number as usize)
    }

    /// Picks one, by its number among all; `None` of none. `load` has nothing to say of those that should not be picked,
    /// and they are where there is hardly anybody else. `place` is the caller's on the ring.
    pub fn pick<'a>(
        &self,
        place: Option<u64>,
        chance: u64,
        now: Duration,
        load: impl Fn(usize) -> Option<&'a Load>,
    ) -> Option<usize> {
        let load = |at: usize| load(*self.numbers.get(at)? as usize);
        let cost = |at: usize| load(at).map_or(f64::INFINITY, |load| load.cost(now));
        let at = match &self.how {
            How::PeakEwma => self.of_two(chance, cost),
            How::LeastRequest(given) => self.least_request(given, chance, |at| load(at).map(Load::in_flight)),
            How::RoundRobin(turn) => self.draw(|| self.turn(turn.fetch_add(1, Relaxed)), |at| load(at).is_some()),
            How::Random => {
                let mut chance = chance;
                self.draw(|| self.at_random(next(&mut chance)), |at| load(at).is_some())
            }
            How::Ring(ring) => ring.pick(place.unwrap_or(chance), |at| load(at).is_some()),
        }?;
        self.numbers.get(at).map(|number| *number as usize)
    }

    /// One of those that are `good`, by their weights, or by the caller's place: looks at all of them.
    pub fn find(&self, place: Option<u64>, chance: u64, good: impl Fn(usize) -> bool) -> Option<usize> {
        let good = |at: &usize| self.numbers.get(*at).is_some_and(|number| good(*number as usize));
        let at = match &self.how {
            How::Ring(ring) => ring.pick(place.unwrap_or(chance), |at| good(&at)).filter(good),
            _ => {
                let weights = || (0..self.len()).filter(good).map(|at| (at, self.weight(at) as u64));
                let all: u64 = weights().map(|(_, weight)| weight).sum();
                let mut left = ((u128::from(chance) * u128::from(all)) >> 64) as u64;
                let found = weights().find(|(_, weight)| {
                    let is_it = left < *weight;
                    left = left.saturating_sub(*weight);
                    is_it
                });
                found.map(|(at, _)| at)
            }
        }?;
        self.numbers.get(at).map(|number| *number as usize)
    }

    fn two(&self, chance: u64) -> Option<(usize, usize)> {
        match &self.shares {
            None => super::two(self.len(), chance),
            Some(shares) => super::two_weighted(shares, chance),
        }
    }

    fn of_two(&self, chance: u64, cost: impl Fn(usize) -> f64) -> Option<usize> {
        let (first, second) = self.two(chance)?;
        Some(if cost(second) < cost(first) { second } else { first })
    }

    /// Of two random ones the one that has less under way for its weight; where they have alike, the one that was given
    /// less so far, which keeps all within a few requests of their share (Azar et al., "Balanced Allocations").
    fn least_request(
        &self,
        given: &[AtomicU32],
        chance: u64,
        in_flight: impl Fn(usize) -> Option<u32>,
    ) -> Option<usize> {
        let (first, second) = self.two(chance)?;
        let of = |at: usize| given.get(at).map_or(0.0, |count| f64::from(count.load(Relaxed))) / self.weight(at);
        let cost = |at: usize| {
            let busy = in_flight(at).map_or(f64::INFINITY, |busy| f64::from(busy) / self.weight(at));
            (busy, of(at))
        };
        let (at, other) = if cost(second) < cost(first) { (second, first) } else { (first, second) };
        // Two workers at once count one pick less, which costs nothing but that.
        let count = (of(at).max(of(other) - BEHIND) * self.weight(at)) as u32 + 1;
        if let Some(slot) = given.get(at) {
            slot.store(count, Relaxed);
        }
        // Long before the counts are too large, all of them begin anew.
        if count >= 1 << 30 {
            given.iter().for_each(|slot| slot.store(0, Relaxed));
        }
        Some(at)
    }

    fn weight(&self, at: usize) -> f64 {
        let Some(shares) = &self.shares else { return 1.0 };
        let below = at.checked_sub(1).and_then(|before| shares.get(before)).copied().unwrap_or(0);
        shares.get(at).map_or(1.0, |sum| (sum - below).max(1) as f64)
    }

    /// The endpoint whose turn it is. Where weights differ, turns are points of a Weyl sequence by the golden ratio: of any
    /// n of them in a row, each endpoint gets its share but for O(log n), evenly spread.
    fn turn(&self, turn: u64) -> Option<usize> {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / φ
        match &self.shares {
            None => turn.checked_rem(self.len() as u64).map(|at| at as usize),
            Some(shares) => weighted(shares, turn.wrapping_mul(GOLDEN)),
        }
    }

    fn at_random(&self, chance: u64) -> Option<usize> {
        match &self.shares {
            None if self.is_empty() => None,
            None => Some(scale(chance, self.len())),
            Some(shares) => weighted(shares, chance),
        }
    }

    fn draw(&self, mut one: impl FnMut() -> Option<usize>, good: impl Fn(usize) -> bool) -> Option<usize> {
        let mut last = None;
        for _ in 0..DRAWS {
            last = Some(one()?);
            if last.is_some_and(&good) {
                break;
            }
        }
        last
    }
}

/// The one into whose share `point`, of all u64, falls.
fn weighted(shares: &[u64], point: u64) -> Option<usize> {
    let all = *shares.last()?;
    let at = ((u128::from(point) * u128::from(all)) >> 64) as u64;
    Some(shares.partition_point(|sum| *sum <= at)).filter(|at| *at < shares.len())
}

/// Random bits to `0..below`, without a division (Lemire).
fn scale(bits: u64, below: usize) -> usize {
    ((u128::from(bits) * below as u128) >> 64) as usize
}

/// More random bits from those that there are (SplitMix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sheetbend_control_plane_client::model::ConsistentHash;

    use super::*;

    const KINDS: [Simple; 4] = [Simple::PeakEwma, Simple::LeastRequest, Simple::RoundRobin, Simple::Random];

    fn policies() -> Vec<LoadBalancer> {
        let hash = ConsistentHash { use_source_ip: Some(true), ..ConsistentHash::default() };
        let ring = LoadBalancer { consistent_hash: Some(hash), ..LoadBalancer::default() };
        KINDS.into_iter().map(simple).chain([ring]).collect()
    }

    fn simple(simple: Simple) -> LoadBalancer {
        LoadBalancer { simple: Some(simple), ..LoadBalancer::default() }
    }

    fn level(policy: &LoadBalancer, weights: &[u32]) -> Level {
        let members = weights.iter().zip(0..).map(|(weight, number)| Member {
            number,
            address: ([127, 0, (number >> 8) as u8, number as u8], 80).into(),
            weight: *weight,
        });
        let mut state = 7;
        Level::new(members.collect(), policy, move || next(&mut state))
    }

    /// How many of so many picks each gets, where all are idle.
    fn counts(policy: &LoadBalancer, weights: &[u32], picks: usize) -> Vec<usize> {
        let (level, idle) = (level(policy, weights), Load::default());
        idle.sample(Duration::from_millis(1), Duration::ZERO);
        let mut counts = vec![0; weights.len()];
        let mut state = 42;
        (0..picks).for_each(|_| {
            let chance = next(&mut state);
            counts[level.pick(None, chance, Duration::from_secs(1), |_| Some(&idle)).unwrap()] += 1;
        });
        counts
    }

    #[test]
    fn turns_are_equal_and_weighted_ones_within_a_few_of_their_share() {
        let turns = simple(Simple::RoundRobin);
        assert_eq!(counts(&turns, &[1; 7], 700), [100; 7]);
        for (count, share) in counts(&turns, &[1, 2, 3, 4], 1_000).into_iter().zip([100, 200, 300, 400]) {
            assert!(count.abs_diff(share) <= 5, "{count} instead of {share}");
        }
    }

    #[test]
    fn idle_endpoints_get_what_their_weights_say() {
        for (kind, off) in [(Simple::LeastRequest, 2_000), (Simple::Random, 1_000), (Simple::PeakEwma, 1_000)] {
            for (count, share) in counts(&simple(kind), &[1, 2, 3, 4], 100_000).into_iter().zip(1..) {
                assert!(count.abs_diff(share * 10_000) <= off, "{kind:?}: {count} of weight {share}");
            }
        }
    }

    #[test]
    fn least_requests_differ_by_a_handful_between_idle_endpoints() {
        let counts = counts(&simple(Simple::LeastRequest), &[1; 50], 10_000);
        assert!(counts.iter().all(|count| (190..=210).contains(count)), "{counts:?}");
    }

    #[test]
    fn one_that_was_away_is_not_given_at_once_what_it_missed() {
        let (level, idle) = (level(&simple(Simple::LeastRequest), &[1; 10]), Load::default());
        let mut state = 3;
        let mut picked = |away: bool| {
            let load = |number| (!away || number != 0).then_some(&idle);
            level.pick(None, next(&mut state), Duration::ZERO, load) == Some(0)
        };
        assert_eq!((0..10_000).filter(|_| picked(true)).count(), 0);
        let back = (0..1_000).filter(|_| picked(false)).count();
        assert!((90..=125).contains(&back), "{back} of 1000");
    }

    #[test]
    fn least_request_goes_to_the_one_that_has_less_under_way() {
        let (level, busy, idle) = (level(&simple(Simple::LeastRequest), &[1; 2]), Load::default(), Load::default());
        busy.begin();
        let mut state = 9;
        for _ in 0..100 {
            let load = |number| Some(if number == 0 { &busy } else { &idle });
            assert_eq!(level.pick(None, next(&mut state), Duration::ZERO, load), Some(1));
        }
    }

    #[test]
    fn a_caller_with_a_place_stays_where_it_is_and_one_without_goes_anywhere() {
        let ring = policies().pop().unwrap();
        let (level, idle) = (level(&ring, &[1; 10]), Load::default());
        let pick = |place, chance| level.pick(place, chance, Duration::ZERO, |_| Some(&idle)).unwrap();
        let mut state = 1;
        let places: std::collections::BTreeSet<usize> = (0..100).map(|_| pick(Some(99), next(&mut state))).collect();
        assert_eq!(places.len(), 1);
        let anywhere: std::collections::BTreeSet<usize> = (0..200).map(|_| pick(None, next(&mut state))).collect();
        assert_eq!(anywhere.len(), 10);
    }

    proptest! {
        #[test]
        fn whatever_the_kind_a_pick_is_one_of_them_and_avoids_the_one_that_must_not_be(
            weights in proptest::collection::vec(1u32..1_000, 0..60), kind in 0usize..5,
            out in any::<usize>(), chance in any::<u64>(), place in proptest::option::of(any::<u64>()),
        ) {
            let (level, idle) = (level(&policies()[kind], &weights), Load::default());
            let out = out.checked_rem(weights.len()).unwrap_or(0);
            // One draw of two may find it twice, where shares are not alike: whoever asks draws again.
            let mut state = chance;
            let mut pick = || {
                level.pick(place, next(&mut state), Duration::ZERO, |number| (number != out).then_some(&idle))
            };
            match pick() {
                None => prop_assert!(weights.is_empty()),
                Some(at) => prop_assert!(at < weights.len()),
            }
            if weights.len() > 1 {
                let others: u32 = weights.iter().enumerate().filter(|(at, _)| *at != out).map(|(_, w)| w).sum();
                prop_assume!(others >= weights[out]);
                prop_assert!((0..64).any(|_| pick().is_some_and(|at| at != out)));
            }
        }
    }
}
