//! Filters of routes, and faults, as they are written.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Meta, Reference, ValueMatch};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Filter {
    pub(in crate::resources) r#type: Spanned<String>,
    pub(in crate::resources) request_header_modifier: Option<HeaderModifier>,
    pub(in crate::resources) response_header_modifier: Option<HeaderModifier>,
    pub(in crate::resources) request_redirect: Option<RequestRedirect>,
    pub(in crate::resources) url_rewrite: Option<UrlRewrite>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct HeaderModifier {
    #[serde(default)]
    pub(in crate::resources) set: Vec<NamedValue>,
    #[serde(default)]
    pub(in crate::resources) add: Vec<NamedValue>,
    #[serde(default)]
    pub(in crate::resources) remove: Vec<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct NamedValue {
    pub(in crate::resources) name: Spanned<String>,
    pub(in crate::resources) value: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct RequestRedirect {
    pub(in crate::resources) scheme: Option<String>,
    pub(in crate::resources) hostname: Option<String>,
    pub(in crate::resources) path: Option<PathModifier>,
    pub(in crate::resources) port: Option<u16>,
    pub(in crate::resources) status_code: Option<u16>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct UrlRewrite {
    pub(in crate::resources) hostname: Option<String>,
    pub(in crate::resources) path: Option<PathModifier>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct PathModifier {
    pub(in crate::resources) r#type: Spanned<String>,
    pub(in crate::resources) replace_full_path: Option<Spanned<String>>,
    pub(in crate::resources) replace_prefix_match: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct FaultInjection {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(in crate::resources) metadata: Meta,
    pub(in crate::resources) spec: FaultInjectionSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct FaultInjectionSpec {
    pub(in crate::resources) target_refs: Spanned<Vec<Reference>>,
    #[serde(default)]
    pub(in crate::resources) headers: Vec<ValueMatch>,
    pub(in crate::resources) delay: Option<Spanned<Delay>>,
    pub(in crate::resources) abort: Option<Spanned<Abort>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Delay {
    pub(in crate::resources) percentage: Option<Percentage>,
    pub(in crate::resources) fixed_delay: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Abort {
    pub(in crate::resources) percentage: Option<Percentage>,
    pub(in crate::resources) http_status: Option<u16>,
    /// A number, or its name: `UNAVAILABLE`.
    pub(in crate::resources) grpc_status: Option<NumberOrName>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(in crate::resources) enum NumberOrName {
    Number(u16),
    Name(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Percentage {
    pub(in crate::resources) value: f64,
}
