//! Timeouts and retries of a rule, out of what the Gateway API has a word for and of annotations for the rest.

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{self, RetryConstraint, RetryOn, RulePolicy, Unusable};

use super::policy::{refused, span, targets};
use super::{Backend, kinds, name_of};
use crate::resources::BACKEND_TRAFFIC;
use crate::resources::kinds::Meta;
use crate::resources::parse::{Checked, mistake};

/// What holds for all rules of a route that say nothing else themselves.
const RETRY_ON: &str = "sheetbend.io/retry-on";
const ATTEMPTS: &str = "sheetbend.io/retry-attempts";
const BACKOFF: &str = "sheetbend.io/retry-backoff";
const NON_IDEMPOTENT: &str = "sheetbend.io/retry-non-idempotent";
const REQUEST: &str = "sheetbend.io/request-timeout";
const BACKEND_REQUEST: &str = "sheetbend.io/backend-request-timeout";
const STREAM_IDLE: &str = "sheetbend.io/stream-idle-timeout";
pub(super) const ANNOTATIONS: [&str; 7] =
    [RETRY_ON, ATTEMPTS, BACKOFF, NON_IDEMPOTENT, REQUEST, BACKEND_REQUEST, STREAM_IDLE];

/// What a rule says of timeouts and retries, within its route. `start` is where it begins.
pub(super) fn rule(
    meta: &Meta,
    start: Location,
    timeouts: Option<&kinds::Timeouts>,
    retry: Option<&kinds::Retry>,
) -> Checked<RulePolicy> {
    let annotation = |name: &str| meta.annotations.get(name);
    let request = timeouts.and_then(|timeouts| timeouts.request.as_ref()).or(annotation(REQUEST));
    let backend_request =
        timeouts.and_then(|timeouts| timeouts.backend_request.as_ref()).or(annotation(BACKEND_REQUEST));
    let attempts = match (retry.and_then(|retry| retry.attempts.as_ref()), annotation(ATTEMPTS)) {
        (Some(attempts), _) => Some((attempts.value, attempts.referenced)),
        (None, Some(text)) => match text.value.parse() {
            Ok(attempts) => Some((attempts, text.referenced)),
            Err(_) => return mistake(text.referenced, format!("`{}` is no number of attempts", text.value), None),
        },
        (None, None) => None,
    };
    let backoff = retry.and_then(|retry| retry.backoff.as_ref()).or(annotation(BACKOFF));
    let codes = retry.map_or(&[][..], |retry| &retry.codes);
    let on = annotation(RETRY_ON).map(conditions).transpose()?.unwrap_or_default();
    let non_idempotent = annotation(NON_IDEMPOTENT).map(yes_or_no).transpose()?.unwrap_or_default();
    let policy = RulePolicy {
        timeouts: model::Timeouts {
            request: span(request)?,
            backend_request: span(backend_request)?,
            stream_idle: span(annotation(STREAM_IDLE))?,
        },
        retry: model::Retry {
            attempts: attempts.map(|(attempts, _)| attempts),
            codes: codes.iter().map(|code| code.value).collect(),
            backoff: span(backoff)?,
            on,
            non_idempotent,
        },
        ..RulePolicy::default()
    };
    let place = |text: Option<&Spanned<String>>| text.map(|text| text.referenced);
    let at = |error: &Unusable| match &*error.field {
        "timeouts.backendRequest" => place(backend_request),
        "retry.attempts" => attempts.map(|(_, at)| at),
        "retry.codes" => codes.iter().find(|code| !(400..=599).contains(&code.value)).map(|code| code.referenced),
        "retry.backoff" => place(backoff),
        "retry.on" => place(annotation(RETRY_ON)),
        _ => None,
    };
    policy.check().or_else(|error| refused(&error, at(&error).unwrap_or(start)))?;
    Ok(policy)
}

fn conditions(text: &Spanned<String>) -> Checked<Vec<RetryOn>> {
    let mut on = Vec::new();
    for word in text.value.split(',').map(str::trim) {
        let Some((_, condition)) = RetryOn::ALL.iter().find(|(known, _)| *known == word) else {
            let words: Vec<&str> = RetryOn::ALL.iter().map(|(word, _)| *word).collect();
            let reason = format!("`{word}` is nothing to retry on; known are {}", words.join(", "));
            return mistake(text.referenced, reason, None);
        };
        if !on.contains(condition) {
            on.push(*condition);
        }
    }
    Ok(on)
}

fn yes_or_no(text: &Spanned<String>) -> Checked<bool> {
    match &*text.value {
        "true" => Ok(true),
        "false" => Ok(false),
        other => mistake(text.referenced, format!("`{other}` is neither"), "write \"true\" or \"false\""),
    }
}

/// How many of the requests to some services may be retries.
pub(in crate::resources) fn backend_traffic(raw: kinds::BackendTraffic) -> Checked<Backend> {
    let object = name_of(&raw.metadata)?;
    let targets = targets(&raw.spec.target_refs, &object)?;
    let mut at: Location = raw.metadata.name.referenced;
    let mut policy = model::BackendPolicy::default();
    if let Some(found) = &raw.spec.retry_constraint {
        at = found.referenced;
        let (budget, rate) = (found.value.budget.as_ref(), found.value.min_retry_rate.as_ref());
        let default = RetryConstraint::DEFAULT;
        policy.retry_constraint = Some(RetryConstraint {
            percent: budget.and_then(|budget| budget.percent).unwrap_or(default.percent),
            interval: span(budget.and_then(|budget| budget.interval.as_ref()))?.unwrap_or(default.interval),
            min_count: rate.and_then(|rate| rate.count).unwrap_or(default.min_count),
            min_interval: span(rate.and_then(|rate| rate.interval.as_ref()))?.unwrap_or(default.min_interval),
        });
    }
    policy.check().or_else(|error| refused(&error, at))?;
    Ok(Backend { kind: BACKEND_TRAFFIC, object, targets, policy: policy.into() })
}
