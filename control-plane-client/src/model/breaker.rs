//! `circuitBreaker` of a BackendPolicy: one switch for a whole destination, for those who want the classic one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Unusable, duration};

/// When a destination is asked no more for a while. Whoever writes it switches it on; what is not said has its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct CircuitBreaker {
    /// So many requests failing within the monitoring period open it.
    pub failure_threshold: u32,
    /// How long it stays open before it lets single requests through.
    #[serde(with = "duration")]
    pub recovery_timeout: Duration,
    /// Failures count for so long.
    #[serde(with = "duration")]
    pub monitoring_period: Duration,
    /// So many of the single requests must go well, one after the other, to close it.
    pub success_threshold: u32,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            failure_threshold: 5,
            recovery_timeout: Duration::from_secs(30),
            monitoring_period: Duration::from_secs(10),
            success_threshold: 1,
        }
    }
}

impl CircuitBreaker {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        const MOST: Duration = Duration::from_secs(24 * 3600);
        let wrong = |field: &str, reason: &str| Err(Unusable::new(format!("circuitBreaker.{field}"), reason));
        let numbers = [("failureThreshold", self.failure_threshold), ("successThreshold", self.success_threshold)];
        if let Some((field, _)) = numbers.iter().find(|(_, number)| *number == 0) {
            return wrong(field, "write 1 or more");
        }
        if self.recovery_timeout.is_zero() || self.recovery_timeout > MOST {
            return wrong("recoveryTimeout", "write 1ms to 24h");
        }
        if !(Duration::from_secs(1)..=MOST).contains(&self.monitoring_period) {
            return wrong("monitoringPeriod", "write 1s to 24h");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_obeyed_is_refused_with_its_field_and_a_reason() {
        for (written, field) in [
            (json!({"failureThreshold": 0}), "failureThreshold"),
            (json!({"successThreshold": 0}), "successThreshold"),
            (json!({"recoveryTimeout": "0s"}), "recoveryTimeout"),
            (json!({"monitoringPeriod": "25h"}), "monitoringPeriod"),
        ] {
            let breaker: CircuitBreaker = serde_json::from_value(written).unwrap();
            let said = breaker.check().unwrap_err().to_string();
            assert!(said.starts_with(&format!("circuitBreaker.{field}: ")), "{said}");
        }
        assert_eq!(CircuitBreaker::default().check(), Ok(()));
    }
}
