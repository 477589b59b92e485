//! Limits as they are written.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Meta, Reference};

/// `connectionPool` of a BackendPolicy, in the words of Istio's DestinationRule.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct ConnectionPool {
    pub(in crate::resources) tcp: Option<Tcp>,
    pub(in crate::resources) http: Option<Http>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Tcp {
    pub(in crate::resources) max_connections: Option<Spanned<u32>>,
    pub(in crate::resources) connect_timeout: Option<Spanned<String>>,
    pub(in crate::resources) idle_timeout: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Http {
    pub(in crate::resources) http1_max_pending_requests: Option<Spanned<u32>>,
    pub(in crate::resources) http2_max_requests: Option<Spanned<u32>>,
    pub(in crate::resources) max_requests_per_connection: Option<Spanned<u32>>,
    pub(in crate::resources) max_retries: Option<Spanned<u32>>,
    pub(in crate::resources) idle_timeout: Option<Spanned<String>>,
}

/// A TrafficLimit.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct TrafficLimit {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(in crate::resources) metadata: Meta,
    pub(in crate::resources) spec: TrafficLimitSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct TrafficLimitSpec {
    pub(in crate::resources) target_refs: Spanned<Vec<Reference>>,
    #[serde(default)]
    pub(in crate::resources) rates: Vec<Spanned<Rate>>,
    pub(in crate::resources) concurrency: Option<Spanned<Concurrency>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Rate {
    pub(in crate::resources) requests: u32,
    pub(in crate::resources) interval: Spanned<String>,
    pub(in crate::resources) burst: Option<u32>,
    pub(in crate::resources) for_each: Option<Spanned<String>>,
    pub(in crate::resources) header: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Concurrency {
    pub(in crate::resources) max_requests: u32,
    pub(in crate::resources) max_pending: Option<u32>,
    pub(in crate::resources) max_retries: Option<u32>,
    /// Understood, to say where it belongs.
    pub(in crate::resources) max_connections: Option<Spanned<u32>>,
    pub(in crate::resources) pending_timeout: Option<Spanned<String>>,
    pub(in crate::resources) stall_timeout: Option<Spanned<String>>,
    #[serde(default)]
    pub(in crate::resources) exempt_paths: Vec<Spanned<String>>,
}
