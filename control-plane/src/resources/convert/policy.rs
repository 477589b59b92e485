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
    let mut policy = model::BackendPolicy::default();
    let mut at = raw.metadata.name.referenced;
    if let Some(found) = &spec.outlier_detection {
        at = found.referenced;
        policy.outlier_detection = Some(model::OutlierDetection {
            consecutive_5xx_errors: found.value.consecutive_5xx_errors,
            base_ejection_time: span(found.value.base_ejection_time.as_ref())?,
            max_ejection_time: span(found.value.max_ejection_time.as_ref())?,
        });
    }
    policy.load_balancer = spec.load_balancer.as_ref().map(balancing::load_balancer).transpose()?;
    policy.health_check = spec.health_check.as_ref().map(balancing::health_check).transpose()?;
    policy.connection_pool = spec.connection_pool.as_ref().map(limits::connection_pool).transpose()?;
    policy.check().or_else(|error| refused(&error, at))?;
    Ok(Backend { object, targets, policy: policy.into() })
}

pub(super) fn refused<T>(error: &Unusable, at: Location) -> Checked<T> {
    mistake(at, error.to_string(), None)
}

pub(super) fn span(text: Option<&Spanned<String>>) -> Checked<Option<Duration>> {
    let Some(text) = text else { return Ok(None) };
    duration::parse(&text.value).map(Some).or_else(|error| mistake(text.referenced, error.to_string(), None))
}
