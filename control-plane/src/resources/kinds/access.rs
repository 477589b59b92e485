//! An AuthorizationPolicy as it is written.

use std::ops::Deref;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

use super::{Meta, Reference};

/// Some words. A list that is written and empty is refused: left out it means everything, and none of that was meant.
#[derive(Debug)]
pub(in crate::resources) struct Listed<T>(Vec<T>);

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

type Words = Listed<Spanned<String>>;

impl<T> Deref for Listed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Listed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Vec::deserialize(deserializer)?;
        match all.is_empty() {
            true => Err(D::Error::custom("an empty list: leave it out if everything is meant, or say what is")),
            false => Ok(Self(all)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct AuthorizationPolicy {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(in crate::resources) metadata: Meta,
    #[serde(default)]
    pub(in crate::resources) spec: AuthorizationPolicySpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct RequestAuthentication {
    #[serde(rename = "apiVersion")]
    _api_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    pub(in crate::resources) metadata: Meta,
    pub(in crate::resources) spec: RequestAuthenticationSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct RequestAuthenticationSpec {
    /// None: every Service of the namespace.
    pub(in crate::resources) target_refs: Option<Spanned<Vec<Reference>>>,
    pub(in crate::resources) jwt_rules: Spanned<Vec<JwtRule>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct JwtRule {
    pub(in crate::resources) issuer: Spanned<String>,
    #[serde(default)]
    pub(in crate::resources) audiences: Words,
    /// The keys themselves, or the file that has them.
    pub(in crate::resources) jwks: Option<Spanned<String>>,
    pub(in crate::resources) jwks_file: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct AuthorizationPolicySpec {
    /// None: every Service of the namespace.
    pub(in crate::resources) target_refs: Option<Spanned<Vec<Reference>>>,
    pub(in crate::resources) action: Option<Spanned<String>>,
    #[serde(default)]
    pub(in crate::resources) dry_run: bool,
    #[serde(default)]
    pub(in crate::resources) rules: Vec<Spanned<Rule>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct Rule {
    #[serde(default)]
    pub(in crate::resources) from: Listed<Spanned<From>>,
    #[serde(default)]
    pub(in crate::resources) to: Listed<Spanned<To>>,
    #[serde(default)]
    pub(in crate::resources) when: Listed<Condition>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct From {
    pub(in crate::resources) source: Source,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::resources) struct To {
    pub(in crate::resources) operation: Operation,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[derive(Default)]
pub(in crate::resources) struct Source {
    pub(in crate::resources) principals: Words,
    pub(in crate::resources) not_principals: Words,
    pub(in crate::resources) request_principals: Words,
    pub(in crate::resources) not_request_principals: Words,
    pub(in crate::resources) namespaces: Words,
    pub(in crate::resources) not_namespaces: Words,
    pub(in crate::resources) trust_domains: Words,
    pub(in crate::resources) ip_blocks: Words,
    pub(in crate::resources) not_ip_blocks: Words,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub(in crate::resources) struct Operation {
    pub(in crate::resources) hosts: Words,
    pub(in crate::resources) not_hosts: Words,
    pub(in crate::resources) ports: Words,
    pub(in crate::resources) not_ports: Words,
    pub(in crate::resources) methods: Words,
    pub(in crate::resources) not_methods: Words,
    pub(in crate::resources) paths: Words,
    pub(in crate::resources) not_paths: Words,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(in crate::resources) struct Condition {
    pub(in crate::resources) key: Spanned<String>,
    #[serde(default)]
    pub(in crate::resources) values: Words,
    #[serde(default)]
    pub(in crate::resources) not_values: Words,
}
