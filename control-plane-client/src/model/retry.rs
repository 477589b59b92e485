//! What is sent again after it failed, and how much of it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Unusable, duration};

/// `retry` of a rule: it widens what holds without one, and never narrows it but by `attempts`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Retry {
    /// Attempts after the first; 1 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// Statuses that are retried, beside 502, 503 and 504.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub codes: Vec<u16>,
    /// The shortest wait before another attempt.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Duration>,
    /// What else is retried.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub on: Vec<RetryOn>,
    /// Requests that may have been processed are sent again even where their method says that this does harm.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub non_idempotent: bool,
}

/// A failure that is retried: Envoy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryOn {
    /// Every status from 500 on, and whatever ends without one.
    #[serde(rename = "5xx")]
    ServerError,
    /// 502, 503 and 504.
    GatewayError,
    /// The connection or the stream broke before an answer.
    Reset,
    /// No connection.
    ConnectFailure,
    /// The endpoint refused the stream.
    RefusedStream,
    /// The statuses of `codes`.
    RetriableStatusCodes,
    /// gRPC's status 1.
    Cancelled,
    /// gRPC's status 4.
    DeadlineExceeded,
    /// gRPC's status 13.
    Internal,
    /// gRPC's status 8.
    ResourceExhausted,
    /// gRPC's status 14.
    Unavailable,
}

impl RetryOn {
    /// Each with its word.
    pub const ALL: [(&str, Self); 11] = [
        ("5xx", Self::ServerError),
        ("gateway-error", Self::GatewayError),
        ("reset", Self::Reset),
        ("connect-failure", Self::ConnectFailure),
        ("refused-stream", Self::RefusedStream),
        ("retriable-status-codes", Self::RetriableStatusCodes),
        ("cancelled", Self::Cancelled),
        ("deadline-exceeded", Self::DeadlineExceeded),
        ("internal", Self::Internal),
        ("resource-exhausted", Self::ResourceExhausted),
        ("unavailable", Self::Unavailable),
    ];

    /// Its word.
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, on)| *on == self).map_or("", |(word, _)| word)
    }

    /// The gRPC status that it names, if it names one.
    pub fn grpc_status(self) -> Option<u16> {
        match self {
            Self::Cancelled => Some(1),
            Self::DeadlineExceeded => Some(4),
            Self::ResourceExhausted => Some(8),
            Self::Internal => Some(13),
            Self::Unavailable => Some(14),
            Self::ServerError
            | Self::GatewayError
            | Self::Reset
            | Self::ConnectFailure
            | Self::RefusedStream
            | Self::RetriableStatusCodes => None,
        }
    }
}

/// More attempts than this after the first are no help to anybody.
pub const MOST_ATTEMPTS: u32 = 10;

impl Retry {
    /// What holds without a rule.
    pub const DEFAULT: Self =
        Self { attempts: None, codes: Vec::new(), backoff: None, on: Vec::new(), non_idempotent: false };

    pub(super) fn is_default(&self) -> bool {
        *self == Self::DEFAULT
    }

    /// Attempts after the first.
    pub fn attempts(&self) -> u32 {
        self.attempts.unwrap_or(1)
    }

    /// Whether an answer with this status is retried.
    pub fn wants_status(&self, status: u16) -> bool {
        matches!(status, 502..=504)
            || self.codes.contains(&status)
            || status >= 500 && self.on.contains(&RetryOn::ServerError)
    }

    /// Whether a call that ends with this gRPC status is retried.
    pub fn wants_grpc(&self, status: u16) -> bool {
        self.on.iter().any(|on| on.grpc_status() == Some(status))
    }

    /// Whether it matters how a gRPC call ends.
    pub fn heeds_grpc(&self) -> bool {
        self.on.iter().any(|on| on.grpc_status().is_some())
    }

    /// Whether it can be obeyed; if not, the field and the reason.
    pub(super) fn check(&self) -> Result<(), Unusable> {
        let unusable = |field: &str, reason: String| Err(Unusable::new(format!("retry.{field}"), reason));
        if let Some(attempts) = self.attempts.filter(|attempts| *attempts > MOST_ATTEMPTS) {
            return unusable("attempts", format!("{attempts} are too many: {MOST_ATTEMPTS} are the most"));
        }
        if let Some(code) = self.codes.iter().find(|code| !(400..=599).contains(*code)) {
            return unusable("codes", format!("{code} is no failure: statuses from 400 to 599 are"));
        }
        if self.on.contains(&RetryOn::RetriableStatusCodes) && self.codes.is_empty() {
            return unusable("on", "retriable-status-codes names no status: write them in `retry.codes`".into());
        }
        if self.heeds_grpc() && !self.non_idempotent {
            let reason = "gRPC calls are POSTs, which are sent twice only where the annotation \
                          sheetbend.io/retry-non-idempotent: \"true\" says so";
            return unusable("on", reason.into());
        }
        Ok(())
    }
}

/// `retryConstraint` of an XBackendTrafficPolicy: how many of the requests to a service may be retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RetryConstraint {
    /// So many of a hundred requests.
    pub percent: u32,
    /// Within so long.
    #[serde(with = "duration")]
    pub interval: Duration,
    /// And so many more, however few requests there are,
    pub min_count: u32,
    /// each time so long has passed.
    #[serde(with = "duration")]
    pub min_interval: Duration,
}

impl Default for RetryConstraint {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl RetryConstraint {
    /// What holds without a policy: 20 % and 10 a second, over 10 s.
    pub const DEFAULT: Self =
        Self { percent: 20, interval: Duration::from_secs(10), min_count: 10, min_interval: Duration::from_secs(1) };

    /// Retries within the interval that need no requests.
    pub fn floor(&self) -> f64 {
        f64::from(self.min_count) * self.interval.as_secs_f64() / self.min_interval.as_secs_f64()
    }

    /// Whether it can be obeyed; if not, the field and the reason. The bounds are the Gateway API's.
    pub(super) fn check(&self) -> Result<(), Unusable> {
        let unusable = |field: &str, reason: &str| Err(Unusable::new(format!("retryConstraint.{field}"), reason));
        let bounds = Duration::from_secs(1)..=Duration::from_secs(3600);
        match self {
            _ if self.percent > 100 => unusable("budget.percent", "there are 100 of a hundred at most"),
            _ if !bounds.contains(&self.interval) => unusable("budget.interval", "1s is the shortest, 1h the longest"),
            _ if !(1..=1_000_000).contains(&self.min_count) => {
                unusable("minRetryRate.count", "1 is the least, 1000000 the most")
            }
            _ if !bounds.contains(&self.min_interval) => {
                unusable("minRetryRate.interval", "1s is the shortest, 1h the longest")
            }
            _ => Ok(()),
        }
    }
}
