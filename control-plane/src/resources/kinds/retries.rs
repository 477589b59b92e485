//! Timeouts, retries and their budget, as they are written.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Meta, Reference};

/// `timeouts` of a rule.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Timeouts {
    pub(in crate::resources) request: Option<Spanned<String>>,
    pub(in crate::resources) backend_request: Option<Spanned<String>>,
}

/// `retry` of a rule.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Retry {
    #[serde(default)]
    pub(in crate::resources) codes: Vec<Spanned<u16>>,
    pub(in crate::resources) attempts: Option<Spanned<u32>>,
    pub(in crate::resources) backoff: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct BackendTraffic {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(in crate::resources) metadata: Meta,
    pub(in crate::resources) spec: BackendTrafficSpec,
    // Kubernetes' own, and nothing that anybody writes.
    #[serde(default, rename = "status")]
    _status: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct BackendTrafficSpec {
    pub(in crate::resources) target_refs: Spanned<Vec<Reference>>,
    pub(in crate::resources) retry_constraint: Option<Spanned<RetryConstraint>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct RetryConstraint {
    pub(in crate::resources) budget: Option<Budget>,
    pub(in crate::resources) min_retry_rate: Option<Rate>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Budget {
    pub(in crate::resources) percent: Option<u32>,
    pub(in crate::resources) interval: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Rate {
    pub(in crate::resources) count: Option<u32>,
    pub(in crate::resources) interval: Option<Spanned<String>>,
}
