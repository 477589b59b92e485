//! PURE: which level of endpoints a request goes to. The first takes everything until too few of it serve; what it cannot
//! take goes to the next, and so on. Priorities make levels, and so does the zone, where near endpoints are preferred.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A level is whole while so much of it serves that this makes it whole: 5 of 7. Envoy's overprovisioning factor.
pub const OVERPROVISIONING: f64 = 1.4;
/// How old may be what is known of levels.
pub const FRESH: Duration = Duration::from_millis(100);

/// The loads of levels as running sums of `0.0..=1.0`, of which level it has how many endpoints and how many of them serve:
/// one whose share grows as much as that has grown.
/// Where no level serves at all, the first gets everything.
pub fn loads(levels: impl Iterator<Item = (usize, f64)>) -> Vec<f64> {
    let able: Vec<f64> = levels
        .map(|(all, serving)| match all {
            0 => 0.0,
            all => (OVERPROVISIONING * serving / all as f64).min(1.0),
        })
        .collect();
    let sum: f64 = able.iter().sum();
    if sum <= 0.0 {
        return vec![1.0; able.len()];
    }
    let scale = if sum < 1.0 { 1.0 / sum } else { 1.0 };
    let running = able.iter().scan(0.0, |sum: &mut f64, able| {
        *sum = (*sum + able * scale).min(1.0);
        Some(*sum)
    });
    running.collect()
}

/// What [`loads`] said last, for many threads.
#[derive(Debug)]
pub struct Shares {
    /// f64 bits.
    sums: Box<[AtomicU64]>,
    /// When it was said, in nanoseconds; 0 before.
    at: AtomicU64,
}

impl Shares {
    /// Of so many levels; the first has everything until something is known.
    pub fn new(levels: usize) -> Self {
        Self { sums: (0..levels).map(|_| AtomicU64::new(1f64.to_bits())).collect(), at: AtomicU64::new(0) }
    }

    /// The level for a request; `chance` is in `0.0..1.0`. `count` says of each level how many there are and how many
    /// serve, and is asked where what is known is old.
    pub fn pick(&self, now: Duration, chance: f64, count: impl Fn(usize) -> (usize, f64)) -> usize {
        let (known, now) = (self.at.load(Relaxed), (now.as_nanos() as u64).max(1));
        let old = known == 0 || now.saturating_sub(known) >= FRESH.as_nanos() as u64;
        if old && self.at.compare_exchange(known, now, Relaxed, Relaxed).is_ok() {
            for (slot, sum) in self.sums.iter().zip(loads((0..self.sums.len()).map(count))) {
                slot.store(sum.to_bits(), Relaxed);
            }
        }
        let found = self.sums.iter().position(|sum| chance < f64::from_bits(sum.load(Relaxed)));
        found.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_level_has_everything_while_five_of_seven_serve_and_the_next_what_it_cannot_take() {
        assert_eq!(loads([(7, 5.0), (7, 7.0)].into_iter()), [1.0, 1.0]);
        let half = loads([(2, 1.0), (2, 2.0)].into_iter());
        assert!((half[0] - 0.7).abs() < 1e-9 && half[1] == 1.0, "{half:?}");
        assert_eq!(loads([(3, 0.0), (3, 3.0)].into_iter()), [0.0, 1.0]);
        assert_eq!(loads([(3, 0.0), (3, 0.0)].into_iter()), [1.0, 1.0]);
    }

    #[test]
    fn what_no_level_can_take_is_shared_by_what_they_can() {
        let sums = loads([(10, 1.0), (10, 3.0)].into_iter());
        assert!((sums[0] - 0.25).abs() < 1e-9 && (sums[1] - 1.0).abs() < 1e-9, "{sums:?}");
    }

    #[test]
    fn what_is_known_of_levels_is_looked_at_again_after_a_moment() {
        let shares = Shares::new(2);
        let at = |millis, serving| {
            shares.pick(Duration::from_millis(millis), 0.5, |level| if level == 0 { (4, serving) } else { (4, 4.0) })
        };
        assert_eq!(at(1_000, 4.0), 0);
        assert_eq!(at(1_050, 0.0), 0);
        assert_eq!(at(1_101, 0.0), 1);
        assert_eq!(at(1_202, 4.0), 0);
    }

    proptest! {
        #[test]
        fn every_request_has_a_level_and_none_that_serves_nobody(
            levels in proptest::collection::vec((1usize..20, 0usize..20), 1..5), chance in 0.0..1.0f64
        ) {
            let count = |level: usize| (levels[level].0, levels[level].1.min(levels[level].0) as f64);
            let at = Shares::new(levels.len()).pick(Duration::from_secs(1), chance, count);
            prop_assert!(at < levels.len());
            let any = (0..levels.len()).any(|level| count(level).1 > 0.0);
            prop_assert!(!any || count(at).1 > 0.0 || chance > 0.999_999);
        }
    }
}
