//! Policies as they are written, made into what a proxy obeys.

use std::time::Duration;

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{self, ServiceName, Unusable, duration};

use super::{Backend, Parent, balancing, kinds, limits, name_of, whole_service};
use crate::resources::parse::{Checked, mistake};

pub(in crate::resources) fn backend_policy(raw: kinds::BackendPolicy) -> Checked<Backend> {
    let object = name_of(&raw.metadata)?;
    let spec = &raw.spec;
    let targets = targets(&spec.target_refs, &object)?;
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
    Ok(Backend { kind: "BackendPolicy", object, targets, policy: policy.into() })
}

/// The Services that a policy is about.
pub(super) fn targets(refs: &Spanned<Vec<kinds::Reference>>, object: &ServiceName) -> Checked<Vec<Parent>> {
    if refs.value.is_empty() {
        return mistake(refs.referenced, "no targetRef: this policy is about nothing", "name a Service");
    }
    let mut targets = Vec::new();
    for target in &refs.value {
        let service = whole_service(target, object)?;
        if service.namespace != object.namespace {
            let hint = "put the policy into the namespace of its Service";
            return mistake(target.name.referenced, "a policy is about Services of its own namespace", hint);
        }
        targets.push(Parent { at: target.name.referenced.into(), service, port: None });
    }
    Ok(targets)
}

pub(super) fn refused<T>(error: &Unusable, at: Location) -> Checked<T> {
    mistake(at, error.to_string(), None)
}

pub(super) fn span(text: Option<&Spanned<String>>) -> Checked<Option<Duration>> {
    let Some(text) = text else { return Ok(None) };
    duration::parse(&text.value).map(Some).or_else(|error| mistake(text.referenced, error.to_string(), None))
}
