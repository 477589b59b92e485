//! When to renew, and how loudly to complain while it fails. Values in, decisions out: no clock, no chance of its own.

use std::time::SystemTime;

/// When to ask for the next certificate: at two thirds of what was left of this one when it came, give or take a tenth,
/// so that proxies which started together do not ask together.
///
/// `came` is when it was received, not its `not_before`: that lies in the past by design, and for a short-lived
/// certificate two thirds from there may be over before it is used. `chance` is uniform in `0.0..1.0`.
pub fn renew_at(came: SystemTime, not_after: SystemTime, chance: f64) -> SystemTime {
    let left = not_after.duration_since(came).unwrap_or_default();
    let around_one = 0.9 + 0.2 * chance.clamp(0.0, 1.0);
    came + left.mul_f64(2.0 / 3.0 * around_one)
}

/// How bad it is that a certificate has not been renewed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// Renewal is not due, or has just become so.
    Quiet,
    /// Below a quarter of its life: every renewal should have been done (the latest is due at 27 %).
    Notice,
    /// Below 15 %.
    Warning,
    /// Below 5 %.
    Critical,
    /// Over: peers refuse us.
    Expired,
}

impl Alarm {
    /// How bad it is now, for a certificate that came at `came` and ends at `not_after`.
    pub fn at(came: SystemTime, not_after: SystemTime, now: SystemTime) -> Self {
        let life = not_after.duration_since(came).unwrap_or_default();
        let Ok(left) = not_after.duration_since(now) else { return Self::Expired };
        match left.as_secs_f64() / life.as_secs_f64().max(f64::MIN_POSITIVE) {
            _ if left.is_zero() => Self::Expired,
            share if share < 0.05 => Self::Critical,
            share if share < 0.15 => Self::Warning,
            share if share < 0.25 => Self::Notice,
            _ => Self::Quiet,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_day_is_renewed_after_sixteen_hours_give_or_take_a_tenth() {
        let end = UNIX_EPOCH + 24 * HOUR;
        let after =
            |chance| renew_at(UNIX_EPOCH, end, chance).duration_since(UNIX_EPOCH).unwrap().as_secs_f64() / 3600.0;
        assert!((after(0.5) - 16.0).abs() < 0.01);
        assert!((after(0.0) - 14.4).abs() < 0.01);
        assert!((after(1.0) - 17.6).abs() < 0.01);
    }

    #[test]
    fn the_less_is_left_the_worse_it_is() {
        let end = UNIX_EPOCH + 24 * HOUR;
        let at = |hours: f64| Alarm::at(UNIX_EPOCH, end, UNIX_EPOCH + HOUR.mul_f64(hours));
        assert_eq!(at(17.6), Alarm::Quiet, "the latest renewal is due here");
        assert_eq!(at(18.5), Alarm::Notice);
        assert_eq!(at(21.0), Alarm::Warning);
        assert_eq!(at(23.0), Alarm::Critical);
        assert_eq!(at(24.0), Alarm::Expired);
        assert!(Alarm::Notice < Alarm::Warning && Alarm::Warning < Alarm::Critical);
    }

    proptest! {
        #[test]
        fn renewal_is_due_within_the_life_and_before_anybody_complains(life in 1u64..400 * 86_400, chance in 0.0..1.0) {
            let end = UNIX_EPOCH + Duration::from_secs(life);
            let due = renew_at(UNIX_EPOCH, end, chance);
            prop_assert!(UNIX_EPOCH < due && due < end);
            prop_assert_eq!(Alarm::at(UNIX_EPOCH, end, due), Alarm::Quiet);
        }

        #[test]
        fn no_clock_however_wrong_makes_it_panic(came in 0u64..1 << 40, end in 0u64..1 << 40, now in 0u64..1 << 40) {
            let [came, end, now] = [came, end, now].map(|s| UNIX_EPOCH + Duration::from_secs(s));
            renew_at(came, end, 0.5);
            Alarm::at(came, end, now);
        }
    }
}
