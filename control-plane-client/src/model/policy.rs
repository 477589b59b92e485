//! What an operator wants of traffic, beyond where it goes.
//!
//! [`RulePolicy`] belongs to an HTTP rule, [`BackendPolicy`] to a service that is called, [`InboundPolicy`] to the service
//! beside a proxy. All of them are checked where they are written and, by `check`, again where they arrive: a proxy never
//! acts on half of one.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::access::Access;
use super::balancing::LoadBalancer;
use super::health_check::HealthCheck;
use super::limits::{ConnectionPool, TrafficLimits};
use super::{CircuitBreaker, Fault, Filters, OutlierDetection, Retry, RetryConstraint, duration};

/// What a rule wants of the requests that it takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct RulePolicy {
    /// Where the rule is written: `resources/web.yaml:12`. Empty where nobody said.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub place: Arc<str>,
    /// How long a request and its attempts may take.
    #[serde(skip_serializing_if = "Timeouts::is_default")]
    pub timeouts: Timeouts,
    /// How much of what it takes passes.
    #[serde(skip_serializing_if = "TrafficLimits::is_default")]
    pub limits: TrafficLimits,
    /// What it does to requests and answers.
    #[serde(skip_serializing_if = "Filters::is_none")]
    pub filters: Filters,
    /// What goes wrong on purpose.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<Fault>,
    /// What is sent again.
    #[serde(skip_serializing_if = "Retry::is_default")]
    pub retry: Retry,
}

/// `timeouts` of a Gateway API rule. Zero means none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Timeouts {
    /// From the request's arrival to the last byte of its answer.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub request: Option<Duration>,
    /// For each attempt, until the head of its answer.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub backend_request: Option<Duration>,
    /// For so long nothing may move, of a request and of its answer.
    #[serde(with = "duration::option", skip_serializing_if = "Option::is_none")]
    pub stream_idle: Option<Duration>,
}

impl Timeouts {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl RulePolicy {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.limits.check().and_then(|()| self.limits.check_of_route())?;
        self.filters.check()?;
        self.faults.iter().try_for_each(Fault::check)?;
        match (self.timeouts.request, self.timeouts.backend_request) {
            (Some(all), Some(one)) if one > all && !all.is_zero() => {
                Err(Unusable::new("timeouts.backendRequest", "it is longer than timeouts.request"))
            }
            (Some(all), _) if !all.is_zero() && self.retry.backoff.is_some_and(|backoff| backoff >= all) => {
                Err(Unusable::new("retry.backoff", "it leaves no time for a retry within timeouts.request"))
            }
            _ => self.retry.check(),
        }
    }
}

/// What callers of a service keep to: the `spec` of a BackendPolicy, in the words of Istio's DestinationRule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct BackendPolicy {
    /// Where it is written: `resources/web.yaml:12`. Empty where nobody said.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub place: Arc<str>,
    /// When an endpoint is left alone for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// Which endpoint a request goes to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// How endpoints are asked whether they are well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// How much may be under way to it at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_pool: Option<ConnectionPool>,
    /// How many of the requests to it may be retries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_constraint: Option<RetryConstraint>,
    /// When the whole destination is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
}

impl BackendPolicy {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.load_balancer.as_ref().map_or(Ok(()), LoadBalancer::check)?;
        self.health_check.as_ref().map_or(Ok(()), HealthCheck::check)?;
        self.connection_pool.as_ref().map_or(Ok(()), ConnectionPool::check)?;
        self.retry_constraint.map_or(Ok(()), |constraint| constraint.check())?;
        self.outlier_detection.as_ref().map_or(Ok(()), OutlierDetection::check)?;
        self.circuit_breaker.as_ref().map_or(Ok(()), CircuitBreaker::check)
    }
}

/// What holds for those who call the service beside a proxy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct InboundPolicy {
    /// Who may call.
    #[serde(skip_serializing_if = "Access::is_default")]
    pub access: Access,
    /// How much of what they ask for passes.
    #[serde(skip_serializing_if = "TrafficLimits::is_default")]
    pub limits: TrafficLimits,
}

impl InboundPolicy {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.access.check()?;
        self.limits.check().and_then(|()| self.limits.check_of_service())
    }
}

/// A policy that cannot be obeyed as it stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Unusable {
    /// The field, as it is written: `outlierDetection.maxEjectionTime`.
    pub field: String,
    /// Why, and what would be better.
    pub reason: String,
}

impl Unusable {
    /// A field and a reason.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}
