//! `outlierDetection` in Envoy's own words, for peers that do not read ours.

use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::google::protobuf::UInt32Value;

use super::encode::duration;
use crate::model::OutlierDetection;

/// What Envoy has no word for is left out. What is not said is as Envoy has it, but for what only ours would switch on.
pub(super) fn encode(ours: &OutlierDetection) -> cds::OutlierDetection {
    let number = |value: Option<u32>| value.map(|value| UInt32Value { value });
    // A rule is followed always or never.
    let enforced = |on: bool| Some(UInt32Value { value: if on { 100 } else { 0 } });
    let said = |value: Option<u32>| value.is_some_and(|value| value > 0);
    cds::OutlierDetection {
        consecutive_5xx: number(ours.consecutive_5xx_errors),
        enforcing_consecutive_5xx: enforced(ours.consecutive_5xx_errors != Some(0)),
        consecutive_gateway_failure: number(ours.consecutive_gateway_errors),
        enforcing_consecutive_gateway_failure: enforced(said(ours.consecutive_gateway_errors)),
        split_external_local_origin_errors: ours.split_external_local_origin_errors.unwrap_or_default(),
        consecutive_local_origin_failure: number(ours.consecutive_local_origin_failures),
        enforcing_consecutive_local_origin_failure: enforced(ours.consecutive_local_origin_failures != Some(0)),
        interval: ours.interval.map(duration),
        base_ejection_time: ours.base_ejection_time.map(duration),
        max_ejection_time: ours.max_ejection_time.map(duration),
        max_ejection_percent: number(ours.max_ejection_percent),
        enforcing_success_rate: enforced(said(ours.success_rate_stdev_factor)),
        success_rate_minimum_hosts: number(ours.success_rate_minimum_hosts),
        success_rate_request_volume: number(ours.success_rate_request_volume),
        success_rate_stdev_factor: number(ours.success_rate_stdev_factor.filter(|factor| *factor > 0)),
        enforcing_failure_percentage: enforced(said(ours.failure_percentage_threshold)),
        failure_percentage_threshold: number(ours.failure_percentage_threshold.filter(|percent| *percent > 0)),
        failure_percentage_minimum_hosts: number(ours.failure_percentage_minimum_hosts),
        failure_percentage_request_volume: number(ours.failure_percentage_request_volume),
        ..cds::OutlierDetection::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn envoy_is_told_in_its_own_words_and_follows_no_rule_that_nobody_asked_for() {
        let ours = OutlierDetection {
            consecutive_5xx_errors: Some(3),
            base_ejection_time: Some(Duration::from_millis(1_500)),
            success_rate_stdev_factor: Some(1900),
            ..OutlierDetection::default()
        };
        let theirs = encode(&ours);
        assert_eq!(theirs.consecutive_5xx.map(|number| number.value), Some(3));
        assert_eq!(theirs.base_ejection_time.map(|time| (time.seconds, time.nanos)), Some((1, 500_000_000)));
        assert_eq!(theirs.enforcing_success_rate.map(|percent| percent.value), Some(100));
        assert_eq!(theirs.enforcing_failure_percentage.map(|percent| percent.value), Some(0));
        let off = encode(&OutlierDetection { consecutive_5xx_errors: Some(0), ..OutlierDetection::default() });
        assert_eq!(off.enforcing_consecutive_5xx.map(|percent| percent.value), Some(0));
        assert_eq!(off.enforcing_success_rate.map(|percent| percent.value), Some(0));
    }
}
