//! The fixed buckets that latencies are counted in, alike in every proxy and control plane, so that counts can be
//! added wherever they come from.
//!
//! Microseconds, log-linear as in HdrHistogram. 0 to 7 µs have a bucket each. From there every power of two is cut into
//! 8 equal parts, up to 2^32 µs (71 minutes): 8 + (32 − 3) × 8 = 240 buckets. A bucket is at most an eighth as wide as
//! its lower bound; a quantile answers with the middle, so it is off by 1/16 (6.25 %) at most.

use std::time::Duration;

/// Parts of a power of two, as a power of two.
const PART_BITS: u32 = 3;
/// Parts of a power of two.
const PARTS: usize = 1 << PART_BITS;
/// Latencies from 2^32 µs on share the last bucket.
const MAX_BITS: u32 = 32;

/// How many buckets there are.
pub const COUNT: usize = PARTS + (MAX_BITS - PART_BITS) as usize * PARTS;

/// The bucket a latency belongs to, below [`COUNT`].
pub fn index(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    if micros < PARTS as u64 {
        return micros as usize;
    }
    let magnitude = micros.ilog2();
    if magnitude >= MAX_BITS {
        return COUNT - 1;
    }
    let part = (micros >> (magnitude - PART_BITS)) as usize & (PARTS - 1);
    PARTS + (magnitude - PART_BITS) as usize * PARTS + part
}

/// A bucket's bounds in microseconds: the least that belongs to it, and the least that no longer does.
pub fn bounds(index: usize) -> (u64, u64) {
    let index = index.min(COUNT - 1);
    if index < PARTS {
        return (index as u64, index as u64 + 1);
    }
    let (magnitude, part) = ((index - PARTS) / PARTS, (index - PARTS) % PARTS);
    let low = ((PARTS + part) as u64) << magnitude;
    (low, low + (1 << magnitude))
}

/// The `q`-quantile (0 to 1) of counts by bucket, in milliseconds; `None` when nothing was counted.
pub fn quantile(counts: &[u64], q: f64) -> Option<f64> {
    let total: u64 = counts.iter().fold(0, |sum, n| sum.saturating_add(*n));
    if total == 0 {
        return None;
    }
    // The rank of the nearest-rank definition: the least value that at least q of all do not exceed.
    let rank = ((q.clamp(0.0, 1.0) * total as f64).ceil() as u64).max(1);
    let mut seen = 0u64;
    for (i, n) in counts.iter().enumerate() {
        seen = seen.saturating_add(*n);
        if seen >= rank {
            let (low, high) = bounds(i);
            // A bucket of one microsecond holds exactly that.
            let middle = if high - low == 1 { low as f64 } else { (low + high) as f64 / 2.0 };
            return Some(middle / 1000.0);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_latency_is_within_the_bounds_of_its_bucket(micros in 0u64..(1 << 32)) {
            let (low, high) = bounds(index(Duration::from_micros(micros)));
            prop_assert!(low <= micros && micros < high);
            prop_assert!(high - low == 1 || (high - low) * 8 <= low);
        }

        #[test]
        fn a_quantile_is_off_by_a_sixteenth_at_most(micros in proptest::collection::vec(1u64..60_000_000, 1..200), q in 0.0f64..1.0) {
            let mut sorted = micros.clone();
            sorted.sort_unstable();
            let mut counts = vec![0; COUNT];
            for m in &micros {
                counts[index(Duration::from_micros(*m))] += 1;
            }
            let exact = sorted[((q * sorted.len() as f64).ceil() as usize).max(1) - 1] as f64 / 1000.0;
            let told = quantile(&counts, q).unwrap();
            prop_assert!((told - exact).abs() <= exact / 16.0 + 1e-9, "{told} for {exact}");
        }
    }

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        for i in 1..COUNT {
            assert_eq!(bounds(i - 1).1, bounds(i).0, "at bucket {i}");
        }
        assert_eq!(bounds(COUNT - 1).1, 1 << 32);
        assert_eq!(index(Duration::MAX), COUNT - 1);
    }

    #[test]
    fn nothing_counted_has_no_quantile() {
        assert_eq!(quantile(&[0; COUNT], 0.99), None);
    }
}
