//! PURE: when to renew, and how loudly to say that it fails.

use std::time::{Duration, SystemTime};

use sheetbend_certs::{Alarm, BACKDATE, renew_at};

/// A renewal is not tried again sooner than this after one that worked.
const SOONEST: Duration = Duration::from_secs(1);
/// A bundle that changed means a CA that rotates: its peers wait for leaves of the new one. Spread, so that a whole
/// mesh does not ask in the same instant.
const AFTER_ROTATION: Duration = Duration::from_secs(5);

/// How long to wait before renewing a certificate: two thirds of its life ±10 %, counted from its issue. `chance` is
/// uniform in `0.0..1.0`.
pub(super) fn until_renewal(not_before: SystemTime, not_after: SystemTime, now: SystemTime, chance: f64) -> Duration {
    // The first moment is dated back, for the sake of clocks that are behind.
    let issued = (not_before + BACKDATE).min(now.max(not_before));
    renew_at(issued, not_after, chance).duration_since(now).unwrap_or_default().max(SOONEST)
}

/// How long to wait before renewing because the bundle changed.
pub(super) fn after_rotation(chance: f64) -> Duration {
    AFTER_ROTATION.mul_f64(chance.clamp(0.0, 1.0))
}

/// How loudly to say that a renewal failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Loudness {
    /// Said already; nothing changed.
    Quiet,
    /// There is time.
    Warn,
    /// There is little time left, or none.
    Error,
}

/// Attempts come every few seconds and a life is a day: the 1st, 2nd, 4th, 8th failure is said, later every 64th, and
/// near the end every 8th.
pub(super) fn loudness(failures: u32, alarm: Alarm) -> Loudness {
    match alarm {
        Alarm::Quiet | Alarm::Notice if failures.is_power_of_two() => Loudness::Warn,
        Alarm::Warning if failures.is_power_of_two() || failures.is_multiple_of(64) => Loudness::Error,
        Alarm::Critical | Alarm::Expired if failures.is_power_of_two() || failures.is_multiple_of(8) => Loudness::Error,
        _ => Loudness::Quiet,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    proptest! {
        #[test]
        fn renewal_comes_between_sixty_and_seventy_four_percent_of_a_life(chance in 0.0..1.0, life in 60u64..1_000_000) {
            let now = SystemTime::UNIX_EPOCH + 1000 * DAY;
            let life = Duration::from_secs(life);
            let wait = until_renewal(now - BACKDATE, now + life, now, chance);
            prop_assert!(wait >= life.mul_f64(0.599) && wait <= life.mul_f64(0.734), "{wait:?} of {life:?}");
        }

        #[test]
        fn no_clock_makes_it_panic(before in 0u64..1 << 33, after in 0u64..1 << 33, now in 0u64..1 << 33) {
            let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            prop_assert!(until_renewal(at(before), at(after), at(now), 0.5) >= SOONEST);
        }
    }

    #[test]
    fn a_certificate_that_was_kept_over_a_restart_is_renewed_when_it_would_have_been() {
        let issued = SystemTime::UNIX_EPOCH + 1000 * DAY;
        let wait = until_renewal(issued - BACKDATE, issued + DAY, issued + DAY / 3, 0.5);
        assert_eq!(wait.as_secs(), (DAY / 3).as_secs());
    }

    #[test]
    fn the_less_time_is_left_the_louder_it_is_said() {
        assert_eq!(loudness(1, Alarm::Quiet), Loudness::Warn);
        assert_eq!(loudness(3, Alarm::Notice), Loudness::Quiet);
        assert_eq!(loudness(64, Alarm::Warning), Loudness::Error);
        assert_eq!(loudness(72, Alarm::Warning), Loudness::Quiet);
        assert_eq!(loudness(72, Alarm::Expired), Loudness::Error);
    }
}
