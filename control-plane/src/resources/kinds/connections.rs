//! Routes of connections as they are written: TCPRoute and TLSRoute.

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::{Meta, Reference};

#[derive(Debug, Deserialize)]
pub(in crate::resources) struct ConnectionRoute {
    pub(in crate::resources) metadata: Meta,
    pub(in crate::resources) spec: ConnectionRouteSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct ConnectionRouteSpec {
    pub(in crate::resources) parent_refs: Spanned<Vec<Reference>>,
    /// Of a TLSRoute.
    #[serde(default)]
    pub(in crate::resources) hostnames: Vec<Spanned<String>>,
    #[serde(default)]
    pub(in crate::resources) rules: Vec<Spanned<ConnectionRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct ConnectionRule {
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(default)]
    pub(in crate::resources) backend_refs: Vec<Reference>,
}
