//! Our own words in xDS metadata, both ways.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheetbend_certs::SpiffeId;

use crate::model::{AppProtocol, BackendPolicy, ClusterName, ConnectionRule, ServiceName, ServicePort, Target};

/// What a Listener of ours says beyond xDS.
#[derive(Serialize, Deserialize)]
pub(super) struct ListenerWords {
    #[serde(flatten)]
    pub(super) service: ServiceWords,
    pub(super) trust_domain: Arc<str>,
    #[serde(default)]
    pub(super) protocol: AppProtocol,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<ConnectionWords>,
}

/// Rules for connections as a whole. A chain of filters says the same as far as Envoy can obey it.
#[derive(Serialize, Deserialize)]
pub(super) struct ConnectionWords {
    pub(super) rules: Vec<ConnectionRule>,
    pub(super) default_cluster: ClusterName,
}

/// A service port, spelled out, so that no name has to be taken apart.
#[derive(Serialize, Deserialize)]
pub(super) struct ServiceWords {
    pub(super) service: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) port: u16,
}

impl From<&ServicePort> for ServiceWords {
    fn from(name: &ServicePort) -> Self {
        Self { service: name.service.service.clone(), namespace: name.service.namespace.clone(), port: name.port }
    }
}

impl From<ServiceWords> for ServicePort {
    fn from(words: ServiceWords) -> Self {
        Self { service: ServiceName { service: words.service, namespace: words.namespace }, port: words.port }
    }
}

/// What a Cluster of ours says beyond xDS.
#[derive(Serialize, Deserialize)]
pub(super) struct ClusterWords {
    #[serde(flatten)]
    pub(super) service: ServiceWords,
    #[serde(default)]
    pub(super) policy: Arc<BackendPolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) external: Option<Target>,
}

/// What an endpoint of ours says beyond xDS.
#[derive(Serialize, Deserialize)]
pub(super) struct EndpointWords {
    pub(super) transport: Wire,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) identity: Option<SpiffeId>,
    #[serde(default)]
    pub(super) workload: Arc<str>,
}

/// How an endpoint is spoken to, without the identity.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Wire {
    Sheetbend,
    Mtls,
    Plain,
}

/// The last route's name: where everything goes that no rule claims.
pub(super) const DEFAULT_ROUTE: &str = "sheetbend.io/default";
