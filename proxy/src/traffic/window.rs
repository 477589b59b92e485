//! PURE: what went well and what failed in the time until now, counted by many threads without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A span of time that ends now, in ten slots, each with a count. A slot that two threads begin at the same moment may lose
/// a request or two. All that is asked of one window is asked with the same span: after another one it begins anew.
#[derive(Debug, Default)]
pub struct Window {
    /// The slot's number (24 bits), all requests in it (20 bits), the failed ones (20 bits).
    slots: [AtomicU64; Self::SLOTS as usize],
}

const COUNT_BITS: u32 = 20;
const MOST: u64 = (1 << COUNT_BITS) - 1;

impl Window {
    /// Parts of a span that are forgotten one after the other.
    pub const SLOTS: u64 = 10;

    /// Counts a request that ended now.
    pub fn count(&self, bad: bool, span: Duration, now: Duration) {
        let number = Self::number(span, now);
        let slot = &self.slots[(number % Self::SLOTS) as usize];
        let mark = Self::mark(number);
        let one = 1 << COUNT_BITS | u64::from(bad);
        let counted = |packed: u64| {
            let former = packed >> (2 * COUNT_BITS) == mark;
            match (former, packed >> COUNT_BITS & MOST) {
                (true, MOST) => None,
                (true, _) => Some(packed + one),
                (false, _) => Some(mark << (2 * COUNT_BITS) | one),
            }
        };
        // At a million a slot the rest goes uncounted, which changes no share.
        let _ = slot.fetch_update(Relaxed, Relaxed, counted);
    }

    /// All requests within the span, and the failed ones.
    pub fn sum(&self, span: Duration, now: Duration) -> (u32, u32) {
        let mark = Self::mark(Self::number(span, now));
        let recent = self.slots.iter().map(|slot| slot.load(Relaxed)).filter(|packed| {
            let age = mark.wrapping_sub(packed >> (2 * COUNT_BITS)) & Self::MARKS;
            age < Self::SLOTS
        });
        recent.fold((0, 0), |(all, bad), packed| {
            (all + (packed >> COUNT_BITS & MOST) as u32, bad + (packed & MOST) as u32)
        })
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.slots.iter().for_each(|slot| slot.store(0, Relaxed));
    }

    fn number(span: Duration, now: Duration) -> u64 {
        now.as_nanos() as u64 / (span.as_nanos() as u64 / Self::SLOTS).max(1)
    }

    const MARKS: u64 = (1 << 24) - 1;

    /// Comes again after 2^24 slots, 19 days at the least; a slot is written anew long before, where there is traffic.
    fn mark(number: u64) -> u64 {
        number & Self::MARKS
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_older_than_the_span_is_forgotten_and_nothing_else(
            events in proptest::collection::vec((0u64..60, any::<bool>()), 0..300), at in 0u64..70, tenth in 1u64..4
        ) {
            let (window, span) = (Window::default(), Duration::from_secs(10 * tenth));
            let mut events = events;
            events.sort_unstable();
            events.retain(|(second, _)| *second <= at);
            for (second, bad) in &events {
                window.count(*bad, span, Duration::from_secs(*second));
            }
            let recent = events.iter().filter(|(second, _)| second / tenth + 10 > at / tenth);
            let (all, bad) = recent.fold((0, 0), |sum, (_, bad)| (sum.0 + 1, sum.1 + u32::from(*bad)));
            prop_assert_eq!(window.sum(span, Duration::from_secs(at)), (all, bad));
        }
    }
}
