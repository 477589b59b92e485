//! How long to wait before the next attempt.

use std::time::Duration;

/// The first ceiling.
const FIRST: Duration = Duration::from_millis(100);
/// The ceiling never rises above this, so that a control plane that is back is found within 5 s.
pub const MOST: Duration = Duration::from_secs(5);

/// The wait before the next attempt, after `failures` in a row. `chance` is uniform in `0.0..1.0`.
///
/// The ceiling doubles from 100 ms to 5 s. The wait is between half the ceiling and the ceiling: thousands of proxies that lost
/// their control plane together do not come back together, and none of them comes back at once.
pub fn wait(failures: u32, chance: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(6); // 100 ms * 2^6 is above 5 s already
    let ceiling = FIRST.saturating_mul(1 << doublings).min(MOST);
    ceiling.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_wait_never_exceeds_five_seconds_and_never_vanishes(failures in any::<u32>(), chance in 0.0..1.0) {
            let wait = wait(failures, chance);
            prop_assert!(wait <= MOST && wait >= FIRST / 2);
        }

        #[test]
        fn the_wait_grows_with_the_failures(failures in 1u32..20, chance in 0.0..1.0) {
            prop_assert!(wait(failures + 1, chance) >= wait(failures, chance));
        }
    }

    #[test]
    fn two_proxies_with_other_luck_wait_for_another_time() {
        assert_eq!(wait(1, 0.0), Duration::from_millis(50));
        assert_eq!(wait(1, 1.0), Duration::from_millis(100));
        assert_eq!(wait(9, 0.0), Duration::from_millis(2500));
    }
}
