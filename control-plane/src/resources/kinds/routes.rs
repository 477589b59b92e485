//! Conditions of routes, as they are written.

use serde::Deserialize;
use serde_saphyr::Spanned;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct HttpMatch {
    pub(in crate::resources) path: Option<Path>,
    pub(in crate::resources) method: Option<Spanned<String>>,
    #[serde(default)]
    pub(in crate::resources) headers: Vec<ValueMatch>,
    #[serde(default)]
    pub(in crate::resources) query_params: Vec<ValueMatch>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct Path {
    pub(in crate::resources) r#type: Option<Spanned<String>>,
    pub(in crate::resources) value: Option<Spanned<String>>,
}

/// A header or a parameter of the query.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct ValueMatch {
    pub(in crate::resources) r#type: Option<Spanned<String>>,
    pub(in crate::resources) name: Spanned<String>,
    pub(in crate::resources) value: Spanned<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct GrpcMatch {
    pub(in crate::resources) method: Option<GrpcMethod>,
    #[serde(default)]
    pub(in crate::resources) headers: Vec<ValueMatch>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct GrpcMethod {
    pub(in crate::resources) r#type: Option<Spanned<String>>,
    pub(in crate::resources) service: Option<Spanned<String>>,
    pub(in crate::resources) method: Option<Spanned<String>>,
}
