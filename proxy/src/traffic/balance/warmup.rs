//! PURE: how an endpoint that is new, or well again, gets its share by and by (Envoy calls it slow start).

use std::time::Duration;

use sheetbend_control_plane_client::model::Warmup;

/// What an endpoint gets of its share, in `0.0..=1.0`, so long after it began to serve.
pub fn share(warmup: &Warmup, passed: Duration) -> f64 {
    if passed >= warmup.duration {
        return 1.0;
    }
    let grown = passed.as_secs_f64() / warmup.duration.as_secs_f64();
    let aggression = warmup.aggression.unwrap_or(Warmup::AGGRESSION);
    let least = warmup.minimum_percent.unwrap_or(Warmup::MINIMUM_PERCENT) / 100.0;
    grown.powf(1.0 / aggression).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_grows_from_the_least_to_all_and_faster_with_more_aggression() {
        let even = Warmup { duration: Duration::from_secs(100), ..Warmup::default() };
        let at = |warmup: &Warmup, seconds| share(warmup, Duration::from_secs(seconds));
        assert_eq!(at(&even, 0), 0.1);
        assert_eq!(at(&even, 50), 0.5);
        assert_eq!(at(&even, 100), 1.0);
        assert_eq!(at(&even, 1_000), 1.0);
        let fast = Warmup { aggression: Some(2.0), minimum_percent: Some(0.0), ..even };
        assert_eq!(at(&fast, 0), 0.0);
        assert_eq!(at(&fast, 25), 0.5);
    }
}
