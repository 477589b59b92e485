//! Limits as they are written.

use serde::Deserialize;
use serde_saphyr::Spanned;

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
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Http {
    pub(in crate::resources) http1_max_pending_requests: Option<Spanned<u32>>,
    pub(in crate::resources) http2_max_requests: Option<Spanned<u32>>,
    pub(in crate::resources) max_requests_per_connection: Option<Spanned<u32>>,
    pub(in crate::resources) max_retries: Option<Spanned<u32>>,
}
