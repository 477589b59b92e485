//! `outlierDetection` of a BackendPolicy: Istio's words where it has them, Envoy's otherwise.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Unusable, duration};

/// When an endpoint is left alone for a while. What is not said is as it is without a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct OutlierDetection {
    /// Failures in a row; 0 switches this off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_5xx_errors: Option<u32>,
    /// The same of 502, 503 and 504 alone; 0, the default, switches this off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_gateway_errors: Option<u32>,
    /// The same of what happened without an answer: no connection, a reset, a timeout. Needs
    /// `splitExternalLocalOriginErrors`; 0 switches it off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_local_origin_failures: Option<u32>,
    /// Failures without an answer count apart from those with one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split_external_local_origin_errors: Option<bool>,
    /// What rates are the rates of: the time until now, so long.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// How long the first ejection takes; each further one takes twice as long as that before.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub base_ejection_time: Option<Duration>,
    /// No ejection takes longer.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub max_ejection_time: Option<Duration>,
    /// The share of endpoints that may be ejected at once, and one at least unless it is 0. Half of them stay in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ejection_percent: Option<u32>,
    /// The share of endpoints that stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_health_percent: Option<u32>,
    /// The percentage of requests that must go well; 0 switches this off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_threshold: Option<u32>,
    /// Thousandths of the standard deviation that an endpoint's success rate may be below the mean of all; 0, the default,
    /// switches this off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_stdev_factor: Option<u32>,
    /// So many endpoints need enough requests for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_minimum_hosts: Option<u32>,
    /// Requests within the interval that are enough to speak of a success rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_request_volume: Option<u32>,
    /// The percentage of requests from which on failures eject; 0, the default, switches this off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_percentage_threshold: Option<u32>,
    /// So many endpoints need enough requests for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_percentage_minimum_hosts: Option<u32>,
    /// Requests within the interval that are enough to speak of a percentage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_percentage_request_volume: Option<u32>,
}

impl OutlierDetection {
    /// Where nobody says otherwise.
    pub const BASE_EJECTION_TIME: Duration = Duration::from_secs(1);
    /// Where nobody says otherwise, and `baseEjectionTime` is not longer.
    pub const MAX_EJECTION_TIME: Duration = Duration::from_secs(60);

    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        const SECOND: Duration = Duration::from_secs(1);
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let wrong = |field: &str, reason: &str| Err(Unusable::new(format!("outlierDetection.{field}"), reason));
        let percentages = [
            ("maxEjectionPercent", self.max_ejection_percent),
            ("minHealthPercent", self.min_health_percent),
            ("successRateThreshold", self.success_rate_threshold),
            ("failurePercentageThreshold", self.failure_percentage_threshold),
        ];
        if let Some((field, _)) = percentages.iter().find(|(_, percent)| percent.is_some_and(|percent| percent > 100)) {
            return wrong(field, "it is a percentage: write 0 to 100");
        }
        let volumes = [
            ("successRateMinimumHosts", self.success_rate_minimum_hosts),
            ("successRateRequestVolume", self.success_rate_request_volume),
            ("failurePercentageMinimumHosts", self.failure_percentage_minimum_hosts),
            ("failurePercentageRequestVolume", self.failure_percentage_request_volume),
        ];
        if let Some((field, _)) = volumes.iter().find(|(_, number)| *number == Some(0)) {
            return wrong(field, "nothing can be said of no request and of no endpoint: write 1 or more");
        }
        if self.consecutive_local_origin_failures.is_some() && self.split_external_local_origin_errors != Some(true) {
            let reason = "it counts nothing without splitExternalLocalOriginErrors: true";
            return wrong("consecutiveLocalOriginFailures", reason);
        }
        if self.interval.is_some_and(|interval| !(SECOND..=DAY).contains(&interval)) {
            return wrong("interval", "write 1s to 24h");
        }
        match (self.base_ejection_time, self.max_ejection_time) {
            (Some(base), _) if base.is_zero() => {
                wrong("baseEjectionTime", "an ejection takes some time: write 1s or more")
            }
            (base, Some(most)) if most < base.unwrap_or(Self::BASE_EJECTION_TIME) => {
                wrong("maxEjectionTime", "it is shorter than baseEjectionTime, which is 1s where it is not said")
            }
            (base, most) if base.max(most).is_some_and(|longest| longest > DAY) => {
                wrong(if base > most { "baseEjectionTime" } else { "maxEjectionTime" }, "write 24h or less")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(yaml: serde_json::Value) -> String {
        let detection: OutlierDetection = serde_json::from_value(yaml).unwrap();
        detection.check().map_or_else(|error| error.to_string(), |()| "fine".to_string())
    }

    #[test]
    fn what_cannot_be_obeyed_is_refused_with_its_field_and_a_reason() {
        use serde_json::json;
        for (written, field) in [
            (json!({"maxEjectionPercent": 101}), "maxEjectionPercent"),
            (json!({"minHealthPercent": 200}), "minHealthPercent"),
            (json!({"failurePercentageThreshold": 101}), "failurePercentageThreshold"),
            (json!({"successRateRequestVolume": 0}), "successRateRequestVolume"),
            (json!({"consecutiveLocalOriginFailures": 5}), "consecutiveLocalOriginFailures"),
            (json!({"interval": "500ms"}), "interval"),
            (json!({"baseEjectionTime": "0s"}), "baseEjectionTime"),
            (json!({"maxEjectionTime": "500ms"}), "maxEjectionTime"),
            (json!({"baseEjectionTime": "2m", "maxEjectionTime": "1m"}), "maxEjectionTime"),
            (json!({"baseEjectionTime": "48h"}), "baseEjectionTime"),
        ] {
            let said = refused(written);
            assert!(said.starts_with(&format!("outlierDetection.{field}: ")), "{said}");
        }
        assert_eq!(refused(json!({"baseEjectionTime": "2m", "maxEjectionPercent": 100, "interval": "30s"})), "fine");
    }
}
