//! `loadBalancer` and `healthCheck` of a BackendPolicy, as they are written. The enums of the model are read as they are:
//! a word that is none is refused at its place.

use serde::Deserialize;
use serde_saphyr::Spanned;
use sheetbend_control_plane_client::model::{LocalityLbSetting, Simple, Statuses, TcpCheck};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct LoadBalancer {
    pub(in crate::resources) simple: Option<Simple>,
    pub(in crate::resources) consistent_hash: Option<Spanned<ConsistentHash>>,
    pub(in crate::resources) warmup: Option<Spanned<Warmup>>,
    pub(in crate::resources) locality_lb_setting: Option<LocalityLbSetting>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct ConsistentHash {
    pub(in crate::resources) http_header_name: Option<String>,
    pub(in crate::resources) http_cookie: Option<HttpCookie>,
    pub(in crate::resources) use_source_ip: Option<bool>,
    pub(in crate::resources) minimum_ring_size: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct HttpCookie {
    pub(in crate::resources) name: String,
    pub(in crate::resources) path: Option<String>,
    pub(in crate::resources) ttl: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Warmup {
    pub(in crate::resources) duration: Spanned<String>,
    pub(in crate::resources) minimum_percent: Option<f64>,
    pub(in crate::resources) aggression: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct HealthCheck {
    pub(in crate::resources) http: Option<HttpCheck>,
    pub(in crate::resources) grpc: Option<GrpcCheck>,
    pub(in crate::resources) tcp: Option<TcpCheck>,
    pub(in crate::resources) interval: Option<Spanned<String>>,
    pub(in crate::resources) timeout: Option<Spanned<String>>,
    pub(in crate::resources) healthy_threshold: Option<u32>,
    pub(in crate::resources) unhealthy_threshold: Option<u32>,
    pub(in crate::resources) jitter: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct HttpCheck {
    pub(in crate::resources) path: String,
    #[serde(default)]
    pub(in crate::resources) expected_statuses: Vec<Statuses>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct GrpcCheck {
    pub(in crate::resources) service: Option<String>,
}
