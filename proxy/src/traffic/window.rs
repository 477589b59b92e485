//! PURE: what went well and what failed in the last ten seconds, counted by many threads without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Ten seconds, each with a count. A second that two threads begin at the same moment may lose a request or two.
#[derive(Debug, Default)]
pub struct Window {
    /// The second (24 bits), all requests in it (20 bits), the failed ones (20 bits).
    seconds: [AtomicU64; Self::SECONDS as usize],
}

const COUNT_BITS: u32 = 20;
const MOST: u64 = (1 << COUNT_BITS) - 1;

impl Window {
    /// How far it reaches back.
    pub const SECONDS: u64 = 10;

    /// Counts a request that ended now.
    pub fn count(&self, bad: bool, now: Duration) {
        let second = Self::second(now);
        let slot = &self.seconds[(now.as_secs() % Self::SECONDS) as usize];
        let one = 1 << COUNT_BITS | u64::from(bad);
        let counted = |packed: u64| {
            let former = packed >> (2 * COUNT_BITS) == second;
            match (former, packed >> COUNT_BITS & MOST) {
                (true, MOST) => None,
                (true, _) => Some(packed + one),
                (false, _) => Some(second << (2 * COUNT_BITS) | one),
            }
        };
        // At a million a second the rest goes uncounted, which changes no share.
        let _ = slot.fetch_update(Relaxed, Relaxed, counted);
    }

    /// All requests within the window, and the failed ones.
    pub fn sum(&self, now: Duration) -> (u32, u32) {
        self.sum_of_last(Self::SECONDS, now)
    }

    /// The same of this second and those before it, so many in all.
    pub fn sum_of_last(&self, seconds: u64, now: Duration) -> (u32, u32) {
        let second = Self::second(now);
        let recent = self.seconds.iter().map(|slot| slot.load(Relaxed)).filter(|packed| {
            let age = second.wrapping_sub(packed >> (2 * COUNT_BITS)) & Self::SECOND_MASK;
            age < seconds
        });
        recent.fold((0, 0), |(all, bad), packed| {
            (all + (packed >> COUNT_BITS & MOST) as u32, bad + (packed & MOST) as u32)
        })
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.seconds.iter().for_each(|slot| slot.store(0, Relaxed));
    }

    const SECOND_MASK: u64 = (1 << 24) - 1;

    /// Never 0, which is what an unused slot says: 24 bits are 194 days, and a slot is written anew long before.
    fn second(now: Duration) -> u64 {
        (now.as_secs() + Self::SECONDS) & Self::SECOND_MASK
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_older_than_ten_seconds_is_forgotten_and_nothing_else(
            events in proptest::collection::vec((0u64..60, any::<bool>()), 0..300), at in 0u64..70, last in 1u64..11
        ) {
            let window = Window::default();
            let mut events = events;
            events.sort_unstable();
            events.retain(|(second, _)| *second <= at);
            for (second, bad) in &events {
                window.count(*bad, Duration::from_secs(*second));
            }
            let recent = events.iter().filter(|(second, _)| second + last > at);
            let (all, bad) = recent.fold((0, 0), |sum, (_, bad)| (sum.0 + 1, sum.1 + u32::from(*bad)));
            prop_assert_eq!(window.sum_of_last(last, Duration::from_secs(at)), (all, bad));
        }
    }
}
