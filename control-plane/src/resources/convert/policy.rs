//! Policies as they are written, made into what a proxy obeys.

use std::time::Duration;

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{self, RulePolicy, Unusable, duration};

use super::{Backend, Parent, balancing, kinds, limits, name_of, to_service};
use crate::resources::parse::{Checked, mistake};

/// What an HTTPRoute's rule says beyond where its requests go. `at` is where it begins.
pub(super) fn http_rule(raw: &kinds::HttpRule, at: Location) -> Checked<RulePolicy> {
    let mut policy = RulePolicy::default();
    if let Some(timeouts) = &raw.timeouts {
        policy.timeouts.request = span(timeouts.request.as_ref())?;
        policy.timeouts.backend_request = span(timeouts.backend_request.as_ref())?;
    }
    let places = [("timeouts.backendRequest", raw.timeouts.as_ref().and_then(|t| t.backend_request.as_ref()))];
    let place = |field: &str| places.iter().find(|(name, _)| *name == field).and_then(|(_, found)| *found);
    policy.check().or_else(|error| refused(&error, place(&error.field).map_or(at, |found| found.referenced)))?;
    Ok(policy)
}

pub(in crate::resources) fn backend_policy(raw: kinds::BackendPolicy) -> Checked<Backend> {
    let object = name_of(&raw.metadata)?;
    let spec = &raw.spec;
    if spec.target_refs.value.is_empty() {
        return mistake(spec.target_refs.referenced, "no targetRef: this policy is about nothing", "name a Service");
    }
    let mut targets = Vec::new();
    for target in &spec.target_refs.value {
        let (service, _) = to_service(target, &object, "targetRef")?;
        if service.namespace != object.namespace {
            let hint = "put the policy into the namespace of its Service";
            return mistake(target.name.referenced, "a policy is about Services of its own namespace", hint);
        }
        targets.push(Parent { at: target.name.referenced.into(), service, port: None });
    }
    let policy = model::BackendPolicy {
        outlier_detection: spec.outlier_detection.as_ref().map(|found| found.value.clone()),
        circuit_breaker: spec.circuit_breaker.as_ref().map(|found| found.value.clone()),
        load_balancer: spec.load_balancer.as_ref().map(balancing::load_balancer).transpose()?,
        health_check: spec.health_check.as_ref().map(balancing::health_check).transpose()?,
        connection_pool: spec.connection_pool.as_ref().map(limits::connection_pool).transpose()?,
        ..model::BackendPolicy::default()
    };
    let places = [
        ("outlierDetection", spec.outlier_detection.as_ref().map(|found| found.referenced)),
        ("circuitBreaker", spec.circuit_breaker.as_ref().map(|found| found.referenced)),
    ];
    let part = |field: &str| places.iter().find(|(name, _)| field.starts_with(name)).and_then(|(_, found)| *found);
    policy.check().or_else(|error| refused(&error, part(&error.field).unwrap_or(raw.metadata.name.referenced)))?;
    Ok(Backend { object, targets, policy: policy.into() })
}

pub(super) fn refused<T>(error: &Unusable, at: Location) -> Checked<T> {
    mistake(at, error.to_string(), None)
}

pub(super) fn span(text: Option<&Spanned<String>>) -> Checked<Option<Duration>> {
    let Some(text) = text else { return Ok(None) };
    duration::parse(&text.value).map(Some).or_else(|error| mistake(text.referenced, error.to_string(), None))
}
