//! PURE: which endpoint gets the next request. Two random choices, the cheaper one wins; the cost is a peak EWMA of
//! latency times what is in flight (Finagle's "Peak EWMA", Mitzenmacher's "power of two choices").
//!
//! That is what holds where nobody says otherwise. [`Level`] knows the other ways, [`levels`] which endpoints come first,
//! [`warmup`] how newcomers get their share, [`ring`] how a caller keeps its endpoint.

mod level;
pub mod levels;
pub mod ring;
pub mod warmup;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

pub use level::{Level, Member};

/// What an endpoint is taken to need from its first request on, until that is answered.
pub const FIRST_GUESS: Duration = Duration::from_millis(30);
/// After this long without a sample, a sample's weight has fallen to 1/e.
pub const DECAY: Duration = Duration::from_secs(10);
/// How much dearer an endpoint is that has just failed: fast errors must not look like a fast endpoint.
pub const FAILURE_COST: f64 = 8.0;
/// After this long without another failure, all but 1/e of that is forgotten: whoever recovers is soon asked again.
pub const FAILURE_DECAY: Duration = Duration::from_secs(1);

/// Load of one endpoint. Workers write it without a lock: a lost update costs one sample's worth of accuracy.
#[derive(Debug)]
pub struct Load {
    /// f64 bits: nanoseconds.
    latency: AtomicU64,
    /// Nanoseconds on the caller's clock when `latency` was last written, 0 before the first sample.
    stamp: AtomicU64,
    /// Nanoseconds on the same clock when it last failed, or nothing.
    failed: AtomicU64,
    in_flight: AtomicU32,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            latency: AtomicU64::new((FIRST_GUESS.as_nanos() as f64).to_bits()),
            stamp: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
        }
    }
}

impl Load {
    /// Counts a request in. Undone by [`Load::end`].
    pub fn begin(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// Counts a request out.
    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Takes a latency in. The first counts as it is, a slower one at once (that is the peak), a faster one by and by. `now`
    /// is the time since any fixed moment.
    pub fn sample(&self, latency: Duration, now: Duration) {
        let sample = latency.as_nanos() as f64;
        let old = f64::from_bits(self.latency.load(Relaxed));
        let new = if self.is_unknown() || sample > old {
            sample
        } else {
            let kept = self.weight_of_the_past(now);
            old * kept + sample * (1.0 - kept)
        };
        self.latency.store(new.to_bits(), Relaxed);
        self.stamp.store((now.as_nanos() as u64).max(1), Relaxed);
    }

    /// It failed. How long that took says nothing of its latency, which does not fade meanwhile: one that fails on and on
    /// must not become the cheapest for want of an answer.
    pub fn failed(&self, now: Duration) {
        let now = (now.as_nanos() as u64).max(1);
        self.failed.store(now, Relaxed);
        if !self.is_unknown() {
            self.stamp.store(now, Relaxed);
        }
    }

    /// Somebody gave up waiting after this long: it would have taken longer.
    pub fn longer_than(&self, waited: Duration, now: Duration) {
        let expected = f64::from_bits(self.latency.load(Relaxed)) * self.weight_of_the_past(now);
        if waited.as_nanos() as f64 > expected {
            self.sample(waited, now);
        }
    }

    /// What the next request is expected to cost, in nanoseconds times requests. An endpoint nobody has asked for long
    /// gets cheaper, so that it is tried again. Of a new one, one request finds out; the others do not pile up behind it.
    pub fn cost(&self, now: Duration) -> f64 {
        if self.is_unknown() && self.in_flight() == 0 && self.failed.load(Relaxed) == 0 {
            return 1.0;
        }
        let latency = f64::from_bits(self.latency.load(Relaxed)) * self.weight_of_the_past(now);
        latency.max(1.0) * f64::from(self.in_flight() + 1) * self.penalty(now)
    }

    /// Nothing is known of its latency and its failures any more.
    pub fn forget(&self) {
        self.failed.store(0, Relaxed);
        self.stamp.store(0, Relaxed);
        self.latency.store((FIRST_GUESS.as_nanos() as f64).to_bits(), Relaxed);
    }

    fn penalty(&self, now: Duration) -> f64 {
        let failed = self.failed.load(Relaxed);
        if failed == 0 {
            return 1.0;
        }
        let passed = (now.as_nanos() as u64).saturating_sub(failed);
        1.0 + (FAILURE_COST - 1.0) * (-(passed as f64) / FAILURE_DECAY.as_nanos() as f64).exp()
    }

    fn is_unknown(&self) -> bool {
        self.stamp.load(Relaxed) == 0
    }

    fn weight_of_the_past(&self, now: Duration) -> f64 {
        if self.is_unknown() {
            return 1.0;
        }
        let passed = (now.as_nanos() as u64).saturating_sub(self.stamp.load(Relaxed));
        (-(passed as f64) / DECAY.as_nanos() as f64).exp()
    }
}

/// Picks the cheaper of two. `chance` is 64 random bits; each choice takes half of them.
pub fn pick(len: usize, chance: u64, cost: impl Fn(usize) -> f64) -> Option<usize> {
    let (first, second) = two(len, chance)?;
    Some(if cost(second) < cost(first) { second } else { first })
}

/// Two random ones of `len`, different ones where there are two.
fn two(len: usize, chance: u64) -> Option<(usize, usize)> {
    match len {
        0 => None,
        1 => Some((0, 0)),
        _ => {
            // Multiply-shift maps 32 random bits to 0..choices without a division (Lemire).
            let scale = |bits: u64, below: usize| (((bits & 0xffff_ffff) * below as u64) >> 32) as usize;
            let first = scale(chance, len);
            let other = scale(chance >> 32, len - 1);
            Some((first, if other >= first { other + 1 } else { other }))
        }
    }
}

/// Two where shares differ; they are running sums of weights. Each of the two falls on an endpoint as often as its share
/// says, on the same one twice too: shares hold when all cost the same, and give way when one costs more.
fn two_weighted(shares: &[u64], chance: u64) -> Option<(usize, usize)> {
    let all = u128::from(shares.last().copied().filter(|all| *all > 0)?);
    let choose = |bits: u64| {
        let at = ((u128::from(bits & 0xffff_ffff) * all) >> 32) as u64;
        shares.partition_point(|sum| *sum <= at)
    };
    Some((choose(chance), choose(chance >> 32)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_slow_answer_counts_at_once_and_fades() {
        let load = Load::default();
        load.sample(Duration::from_millis(500), Duration::from_secs(1));
        let slow = load.cost(Duration::from_secs(1));
        assert_eq!(slow, 500e6);
        assert!(load.cost(Duration::from_secs(31)) < slow / 10.0);
    }

    #[test]
    fn one_request_finds_out_about_a_new_endpoint_and_the_others_wait_for_its_answer() {
        let (new, known, now) = (Load::default(), Load::default(), Duration::from_secs(86_400));
        known.sample(Duration::from_millis(5), now);
        assert!(new.cost(now) < known.cost(now));
        new.begin();
        assert!(new.cost(now) > 5.0 * known.cost(now));
        new.sample(Duration::from_millis(5), now);
        new.end();
        assert_eq!(new.cost(now), known.cost(now));
    }

    #[test]
    fn who_gives_up_waiting_makes_an_endpoint_dearer_and_never_cheaper() {
        let (load, now) = (Load::default(), Duration::from_secs(60));
        load.sample(Duration::from_millis(50), now);
        let before = load.cost(now);
        load.longer_than(Duration::from_millis(1), now);
        assert_eq!(load.cost(now), before);
        load.longer_than(Duration::from_secs(1), now);
        assert_eq!(load.cost(now), 1e9);
        // What it took once fades, and whoever waits in vain again renews it.
        load.longer_than(Duration::from_millis(500), now + DECAY);
        assert!(load.cost(now + DECAY) > 5e8, "{}", load.cost(now + DECAY));
    }

    #[test]
    fn what_is_in_flight_makes_an_endpoint_dearer() {
        let load = Load::default();
        load.sample(Duration::from_millis(5), Duration::ZERO);
        let idle = load.cost(Duration::ZERO);
        load.begin();
        assert_eq!(load.cost(Duration::ZERO), 2.0 * idle);
        load.end();
        assert_eq!(load.cost(Duration::ZERO), idle);
    }

    #[test]
    fn equal_endpoints_get_what_their_weights_say_and_a_dear_one_gets_less() {
        let count = |cost: fn(usize) -> f64| {
            let mut chance = 1u64;
            let picks = (0..100_000).filter(|_| {
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // The low bits of such a generator are poor.
                let chance = chance.rotate_left(24) ^ chance;
                let (first, second) = two_weighted(&[9, 10], chance).unwrap();
                (if cost(second) < cost(first) { second } else { first }) == 0
            });
            picks.count()
        };
        assert!((88_000..92_000).contains(&count(|_| 1.0)), "{}", count(|_| 1.0));
        let dear = count(|at| if at == 0 { 2.0 } else { 1.0 });
        assert!((79_000..83_000).contains(&dear), "{dear}");
    }

    proptest! {
        #[test]
        fn two_are_in_range_and_different_where_there_are_two(len in 0usize..50, chance in any::<u64>()) {
            match two(len, chance) {
                None => prop_assert_eq!(len, 0),
                Some((first, second)) => {
                    prop_assert!(first < len && second < len);
                    prop_assert!(len == 1 || first != second);
                }
            }
        }

        #[test]
        fn weighted_ones_have_a_share(weights in proptest::collection::vec(0u32..5, 0..20), chance in any::<u64>()) {
            let sums = weights.iter().scan(0, |sum, weight| { *sum += u64::from(*weight); Some(*sum) });
            let shares: Vec<u64> = sums.collect();
            match two_weighted(&shares, chance) {
                None => prop_assert!(weights.iter().all(|weight| *weight == 0)),
                Some((first, second)) => prop_assert!(weights[first] > 0 && weights[second] > 0),
            }
        }

        #[test]
        fn of_two_endpoints_the_cheaper_one_is_always_picked(chance in any::<u64>(), dear in 0usize..2) {
            let at = pick(2, chance, |at| if at == dear { 2.0 } else { 1.0 });
            prop_assert_eq!(at, Some(1 - dear));
        }
    }
}
