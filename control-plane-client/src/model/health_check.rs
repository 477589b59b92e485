//! How endpoints are asked whether they are well: `healthCheck` of a BackendPolicy.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::duration;
use super::policy::Unusable;

/// `healthCheck`. One of `http`, `grpc` and `tcp` says how it is asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HealthCheck {
    /// By a GET.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// By `grpc.health.v1.Health/Check`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcCheck>,
    /// By a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    /// From one check to the next.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// How long an answer may take.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// Good answers in a row that make it well again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthy_threshold: Option<u32>,
    /// Bad ones in a row that make it unwell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unhealthy_threshold: Option<u32>,
    /// The interval is longer by up to this, so that checks of many callers do not come together.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Duration>,
}

/// `http`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpCheck {
    /// The path, and its query.
    pub path: Arc<str>,
    /// Statuses of one that is well; none means 200 to 299.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub expected_statuses: Vec<Statuses>,
}

/// Statuses from one to another, both among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statuses {
    /// The first.
    pub start: u16,
    /// The last.
    pub end: u16,
}

/// `grpc`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrpcCheck {
    /// Of which service; empty is the server as a whole.
    pub service: Arc<str>,
}

/// `tcp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpCheck {}

impl HealthCheck {
    /// Where nobody says otherwise.
    pub const INTERVAL: Duration = Duration::from_secs(10);
    /// Where nobody says otherwise.
    pub const TIMEOUT: Duration = Duration::from_secs(1);
    /// Where nobody says otherwise.
    pub const HEALTHY_THRESHOLD: u32 = 2;
    /// Where nobody says otherwise.
    pub const UNHEALTHY_THRESHOLD: u32 = 3;

    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let wrong = |field: &str, reason: &str| Err(Unusable::new(format!("healthCheck{field}"), reason));
        let ways = [self.http.is_some(), self.grpc.is_some(), self.tcp.is_some()];
        if ways.iter().filter(|said| **said).count() != 1 {
            return wrong("", "write one of http, grpc and tcp");
        }
        if let Some(http) = &self.http {
            let sound = http.path.starts_with('/') && http.path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
            if !sound || http.path.len() > 2_048 {
                return wrong(".http.path", "a path begins with / and has no spaces");
            }
            let status = |s: &Statuses| (100..600).contains(&s.start) && (s.start..600).contains(&s.end);
            if !http.expected_statuses.iter().all(status) {
                return wrong(".http.expectedStatuses", "statuses go from 100 to 599, the smaller first");
            }
        }
        if self.grpc.as_ref().is_some_and(|grpc| grpc.service.len() > 1_024) {
            return wrong(".grpc.service", "that is no service's name");
        }
        let (interval, timeout) = (self.interval.unwrap_or(Self::INTERVAL), self.timeout.unwrap_or(Self::TIMEOUT));
        if interval < Duration::from_millis(100) {
            return wrong(".interval", "100ms is the least");
        }
        if timeout.is_zero() {
            return wrong(".timeout", "an answer takes some time");
        }
        if [self.healthy_threshold, self.unhealthy_threshold].contains(&Some(0)) {
            return wrong(".healthyThreshold", "thresholds are 1 or more");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_obeyed_is_refused_with_its_field() {
        let refused = |json| serde_json::from_value::<HealthCheck>(json).unwrap().check().unwrap_err().field;
        assert_eq!(refused(json!({})), "healthCheck");
        assert_eq!(refused(json!({"tcp": {}, "grpc": {}})), "healthCheck");
        assert_eq!(refused(json!({"http": {"path": "healthz"}})), "healthCheck.http.path");
        let statuses = json!({"http": {"path": "/", "expectedStatuses": [{"start": 300, "end": 200}]}});
        assert_eq!(refused(statuses), "healthCheck.http.expectedStatuses");
        assert_eq!(refused(json!({"tcp": {}, "interval": "10ms"})), "healthCheck.interval");
        assert_eq!(refused(json!({"tcp": {}, "timeout": "0s"})), "healthCheck.timeout");
        assert_eq!(refused(json!({"tcp": {}, "unhealthyThreshold": 0})), "healthCheck.healthyThreshold");
    }
}
