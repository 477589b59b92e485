//! What ejects an endpoint, and for how long.

use std::time::Duration;

use sheetbend_control_plane_client::model::OutlierDetection;

/// When an endpoint is ejected: `outlierDetection`, with what holds where nobody says otherwise. A number of 0 switches its
/// rule off.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    /// Failures in a row.
    pub errors: u32,
    /// 502, 503 and 504 in a row.
    pub gateway_errors: u32,
    /// Failures without an answer in a row, where those count apart.
    pub local_failures: u32,
    /// Whether they do.
    pub split: bool,
    /// What rates are the rates of: the time until now, so long.
    pub interval: Duration,
    /// The least share of requests that must go well.
    pub success_rate: f64,
    /// Below so many requests their share says nothing.
    pub request_volume: u32,
    /// Against the success rates of the others.
    pub deviation: Against,
    /// How far below their mean is too far, in standard deviations.
    pub deviations: f64,
    /// Against a share of failures that is too large.
    pub failures: Against,
    /// That share.
    pub failure_share: f64,
    /// How long the first ejection takes; each further one takes twice as long as that before.
    pub base_ejection_time: Duration,
    /// No ejection takes longer.
    pub max_ejection_time: Duration,
    /// The percentage of endpoints that may be ejected at once, and one at least.
    pub max_ejection_percent: u32,
    /// The percentage of endpoints that stay; half of them stay in any case.
    pub min_health_percent: u32,
}

/// What it takes to compare an endpoint with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Against {
    /// So many endpoints with enough requests.
    pub hosts: u32,
    /// Enough requests.
    pub volume: u32,
}

impl Detection {
    /// Where nobody says otherwise. Comparisons with the others are off; their numbers are Envoy's.
    pub const DEFAULT: Self = Self {
        errors: 7,
        gateway_errors: 0,
        local_failures: 7,
        split: false,
        interval: Duration::from_secs(10),
        success_rate: 0.8,
        request_volume: 20,
        deviation: Against { hosts: 5, volume: 100 },
        deviations: 0.0,
        failures: Against { hosts: 5, volume: 50 },
        failure_share: 0.0,
        base_ejection_time: OutlierDetection::BASE_EJECTION_TIME,
        max_ejection_time: OutlierDetection::MAX_EJECTION_TIME,
        max_ejection_percent: 100,
        min_health_percent: 0,
    };

    /// What a policy says.
    pub fn of(policy: &OutlierDetection) -> Self {
        let usual = Self::DEFAULT;
        let share = |percent: Option<u32>, usual| percent.map_or(usual, |percent| f64::from(percent) / 100.0);
        let base = policy.base_ejection_time.unwrap_or(usual.base_ejection_time);
        Self {
            errors: policy.consecutive_5xx_errors.unwrap_or(usual.errors),
            gateway_errors: policy.consecutive_gateway_errors.unwrap_or(usual.gateway_errors),
            local_failures: policy.consecutive_local_origin_failures.unwrap_or(usual.local_failures),
            split: policy.split_external_local_origin_errors.unwrap_or(usual.split),
            interval: policy.interval.unwrap_or(usual.interval),
            success_rate: share(policy.success_rate_threshold, usual.success_rate),
            request_volume: policy.success_rate_request_volume.unwrap_or(usual.request_volume),
            deviation: Against {
                hosts: policy.success_rate_minimum_hosts.unwrap_or(usual.deviation.hosts),
                volume: policy.success_rate_request_volume.unwrap_or(usual.deviation.volume),
            },
            deviations: policy.success_rate_stdev_factor.map_or(usual.deviations, |factor| f64::from(factor) / 1000.0),
            failures: Against {
                hosts: policy.failure_percentage_minimum_hosts.unwrap_or(usual.failures.hosts),
                volume: policy.failure_percentage_request_volume.unwrap_or(usual.failures.volume),
            },
            failure_share: share(policy.failure_percentage_threshold, usual.failure_share),
            base_ejection_time: base,
            max_ejection_time: policy.max_ejection_time.unwrap_or(usual.max_ejection_time).max(base),
            max_ejection_percent: policy.max_ejection_percent.unwrap_or(usual.max_ejection_percent),
            min_health_percent: policy.min_health_percent.unwrap_or(usual.min_health_percent),
        }
    }

    /// How many of `n` may be ejected at once. Whatever a policy says, half stay, rounded up, and never nobody.
    pub fn allowed(&self, n: usize) -> usize {
        let percent = |percent: u32| n * percent.min(100) as usize;
        let least = n.div_ceil(2).max(1).max(percent(self.min_health_percent).div_ceil(100));
        let most = match self.max_ejection_percent {
            0 => 0,
            some => (percent(some) / 100).max(1),
        };
        n.saturating_sub(least).min(most)
    }

    /// How long an ejection takes that follows one of this length soon.
    pub(super) fn lengthened(&self, period: Duration) -> Duration {
        (period * 2).clamp(self.base_ejection_time, self.max_ejection_time.max(self.base_ejection_time))
    }

    /// Whether an endpoint is compared with the others.
    pub(super) fn compares(&self) -> bool {
        self.deviations > 0.0 || self.failure_share > 0.0
    }
}

impl Default for Detection {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What is known of all endpoints together, for a tenth of the interval.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Everybody {
    /// Until then.
    pub(super) until: Duration,
    /// How many have requests enough for their success rates.
    rated: u32,
    /// The mean of those rates less the deviations that are allowed.
    least: f64,
    /// How many have requests enough for their failures' share.
    counted: u32,
}

impl Everybody {
    /// Of what each has seen: requests, and the failed ones.
    pub(super) fn of(seen: impl Iterator<Item = (u32, u32)>, detection: &Detection, now: Duration) -> Self {
        let (mut rated, mut counted, mut sum, mut squares) = (0u32, 0, 0.0, 0.0);
        for (all, bad) in seen {
            counted += u32::from(all >= detection.failures.volume);
            if all >= detection.deviation.volume {
                let rate = f64::from(all - bad) / f64::from(all);
                rated += 1;
                sum += rate;
                squares += rate * rate;
            }
        }
        let hosts = f64::from(rated.max(1));
        let mean = sum / hosts;
        let deviation = (squares / hosts - mean * mean).max(0.0).sqrt();
        let until = now + detection.interval / 10;
        Self { until, rated, least: mean - detection.deviations * deviation, counted }
    }

    /// Whether so many successes are too few beside those of the others.
    pub(super) fn deviates(&self, (all, bad): (u32, u32), detection: &Detection) -> bool {
        let enough = all >= detection.deviation.volume && self.rated >= detection.deviation.hosts;
        detection.deviations > 0.0 && enough && f64::from(all - bad) < self.least * f64::from(all)
    }

    /// Whether so many failures are too many.
    pub(super) fn fails(&self, (all, bad): (u32, u32), detection: &Detection) -> bool {
        let enough = all >= detection.failures.volume && self.counted >= detection.failures.hosts;
        detection.failure_share > 0.0 && enough && f64::from(bad) >= detection.failure_share * f64::from(all)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn percentages_lower_how_many_may_be_ejected_and_never_raise_it() {
        let allowed = |n, most, least| {
            Detection { max_ejection_percent: most, min_health_percent: least, ..Detection::DEFAULT }.allowed(n)
        };
        assert_eq!([1, 2, 3, 5, 10].map(|n| allowed(n, 100, 0)), [0, 1, 1, 2, 5], "half stay");
        assert_eq!([1, 2, 3, 10, 25].map(|n| allowed(n, 10, 0)), [0, 1, 1, 1, 2], "one at least");
        assert_eq!([1, 2, 10].map(|n| allowed(n, 0, 0)), [0, 0, 0], "nobody");
        assert_eq!([2, 3, 10].map(|n| allowed(n, 100, 75)), [0, 0, 2], "three quarters stay");
    }

    proptest! {
        #[test]
        fn half_stay_whatever_a_policy_says(n in 0usize..1_000, most in 0u32..200, least in 0u32..200) {
            let detection = Detection { max_ejection_percent: most, min_health_percent: least, ..Detection::DEFAULT };
            prop_assert!(n - detection.allowed(n) >= n.div_ceil(2));
        }
    }

    #[test]
    fn what_a_policy_does_not_say_stays_as_it_is_without_one() {
        assert_eq!(Detection::of(&OutlierDetection::default()), Detection::DEFAULT);
        let long = OutlierDetection { base_ejection_time: Some(Duration::from_secs(90)), ..Default::default() };
        assert_eq!(Detection::of(&long).max_ejection_time, Duration::from_secs(90));
    }
}
