//! Faults that are injected on purpose, to see what callers make of them: the words are those of Istio's `fault`.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{TextMatch, Unusable, duration};

/// One FaultInjection, as it stands at a rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Fault {
    /// `namespace/name`, for logs.
    pub name: Arc<str>,
    /// Where it is written: file and line.
    #[serde(default)]
    pub place: Arc<str>,
    /// Requests with these headers alone; names are lower case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(Arc<str>, TextMatch)>,
    /// Some are made to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<Delay>,
    /// Some are answered with a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<Abort>,
}

/// `delay`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Delay {
    /// Of a hundred requests.
    pub percentage: f64,
    /// How long each of them waits before it is sent.
    #[serde(with = "duration")]
    pub fixed_delay: Duration,
}

/// `abort`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Abort {
    /// Of a hundred requests.
    pub percentage: f64,
    /// The status of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_status: Option<u16>,
    /// The answer to a gRPC call; it is sent nowhere else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u16>,
}

impl Fault {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let of_hundred = |field: &str, percentage: f64| match (0.0..=100.0).contains(&percentage) {
            true => Ok(()),
            false => Err(Unusable::new(field, format!("{percentage} is not between 0 and 100"))),
        };
        if self.delay.is_none() && self.abort.is_none() {
            return Err(Unusable::new("spec", "neither a delay nor an abort: nothing would happen"));
        }
        if let Some(delay) = &self.delay {
            of_hundred("delay.percentage.value", delay.percentage)?;
            if delay.fixed_delay.is_zero() || delay.fixed_delay > Duration::from_secs(3_600) {
                return Err(Unusable::new("delay.fixedDelay", "write one between 1ms and 1h"));
            }
        }
        let Some(abort) = &self.abort else { return Ok(()) };
        of_hundred("abort.percentage.value", abort.percentage)?;
        match (abort.http_status, abort.grpc_status) {
            (None, None) => Err(Unusable::new("abort", "no status: write httpStatus or grpcStatus")),
            (Some(_), Some(_)) => Err(Unusable::new("abort", "two statuses: write httpStatus or grpcStatus, not both")),
            (Some(status), _) if !(200..=599).contains(&status) => {
                Err(Unusable::new("abort.httpStatus", format!("{status} is not a status between 200 and 599")))
            }
            (_, Some(status)) if !(1..=16).contains(&status) => {
                Err(Unusable::new("abort.grpcStatus", format!("{status} is no gRPC error: they go from 1 to 16")))
            }
            _ => Ok(()),
        }
    }
}
