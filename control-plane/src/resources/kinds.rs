//! The kinds of resources as they are written, for serde alone. What they mean is in `meaning.rs`.
//!
//! Kubernetes' own kinds may say more than we read; the Gateway API's and our own may not: a filter that is not obeyed,
//! or a setting with a typo, must not look as if it worked.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;
use sheetbend_control_plane_client::model;

pub(super) mod access;
pub(super) mod balancing;
mod connections;
mod filters;
pub(super) mod limits;
mod retries;
mod routes;

pub(super) use connections::*;
pub(super) use filters::*;
pub(super) use retries::*;
pub(super) use routes::*;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Header {
    pub(super) api_version: Option<Spanned<String>>,
    pub(super) kind: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Meta {
    pub(super) name: Spanned<String>,
    pub(super) namespace: Option<Spanned<String>>,
    pub(super) creation_timestamp: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, Spanned<String>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Service {
    pub(super) metadata: Meta,
    pub(super) spec: ServiceSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    pub(super) r#type: Option<Spanned<String>>,
    pub(super) external_name: Option<Spanned<String>>,
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<Spanned<String>>,
    #[serde(rename = "clusterIPs", default)]
    pub(super) cluster_ips: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) ports: Vec<Port>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Port {
    pub(super) name: Option<String>,
    pub(super) port: Option<Spanned<u16>>,
    pub(super) target_port: Option<IntOrName>,
    pub(super) protocol: Option<String>,
    pub(super) app_protocol: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum IntOrName {
    Int(u16),
    // A named port is a container's, which no file of ours has; endpoints carry the number.
    Name(#[serde(deserialize_with = "name")] ()),
}

/// A text that nobody looks at.
fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    String::deserialize(deserializer).map(drop)
}

#[derive(Debug, Deserialize)]
pub(super) struct EndpointSlice {
    pub(super) metadata: Meta,
    #[serde(default)]
    pub(super) endpoints: Vec<SliceEndpoint>,
    #[serde(default)]
    pub(super) ports: Vec<Port>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SliceEndpoint {
    #[serde(default)]
    pub(super) addresses: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) conditions: Conditions,
    pub(super) target_ref: Option<TargetRef>,
    pub(super) zone: Option<Spanned<String>>,
    pub(super) hints: Option<Hints>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hints {
    #[serde(default)]
    pub(super) for_zones: Vec<ForZone>,
}

#[derive(Debug, Deserialize)]
pub(super) struct ForZone {
    pub(super) name: Spanned<String>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
}

#[derive(Debug, Deserialize)]
pub(super) struct TargetRef {
    pub(super) name: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Route<R> {
    pub(super) metadata: Meta,
    pub(super) spec: RouteSpec<R>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RouteSpec<R> {
    pub(super) parent_refs: Spanned<Vec<Reference>>,
    // A mesh route has no use for them: the destination is chosen before (GEP-1426).
    #[serde(default, rename = "hostnames")]
    _hostnames: Vec<String>,
    #[serde(default = "Vec::new")]
    pub(super) rules: Vec<Spanned<R>>,
}

/// A parentRef or a backendRef.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Reference {
    pub(super) group: Option<Spanned<String>>,
    pub(super) kind: Option<Spanned<String>>,
    pub(super) name: Spanned<String>,
    pub(super) namespace: Option<Spanned<String>>,
    pub(super) port: Option<Spanned<u16>>,
    pub(super) weight: Option<Spanned<u32>>,
    /// Of a backendRef.
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct HttpRule {
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(default)]
    pub(super) matches: Vec<HttpMatch>,
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
    #[serde(default)]
    pub(super) backend_refs: Vec<Reference>,
    pub(super) timeouts: Option<Timeouts>,
    pub(super) retry: Option<Retry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GrpcRule {
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(default)]
    pub(super) matches: Vec<GrpcMatch>,
    #[serde(default)]
    pub(super) filters: Vec<Filter>,
    #[serde(default)]
    pub(super) backend_refs: Vec<Reference>,
    // Not in the Gateway API yet; annotations say the same where its schema is enforced.
    pub(super) timeouts: Option<Timeouts>,
    pub(super) retry: Option<Retry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MeshSettings {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(super) metadata: Meta,
    pub(super) spec: MeshSettingsSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MeshSettingsSpec {
    pub(super) trust_domain: Option<Spanned<String>>,
    #[serde(default)]
    pub(super) mesh_ranges: Vec<Spanned<String>>,
    #[serde(default)]
    pub(super) allowed_addresses: Vec<Spanned<String>>,
    pub(super) outbound_policy: Option<Spanned<String>>,
    pub(super) default_inbound_policy: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BackendPolicy {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(super) metadata: Meta,
    pub(super) spec: BackendPolicySpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BackendPolicySpec {
    pub(super) target_refs: Spanned<Vec<Reference>>,
    pub(super) outlier_detection: Option<Spanned<model::OutlierDetection>>,
    pub(super) circuit_breaker: Option<Spanned<model::CircuitBreaker>>,
    pub(super) load_balancer: Option<Spanned<balancing::LoadBalancer>>,
    pub(super) health_check: Option<Spanned<balancing::HealthCheck>>,
    pub(super) connection_pool: Option<Spanned<limits::ConnectionPool>>,
}
