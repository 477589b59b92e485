//! What holds for those who call, service by service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sheetbend_control_plane_client::model::{
    Access, DefaultAccess, InboundPolicy, ServiceName, ServicePort, TrafficLimits,
};

use super::parts::{Parts, PortParts};
use super::reuse;
use crate::resources::Limit;

/// Every service's policy. One that is not named here has that of its namespace, and of everybody.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    services: BTreeMap<ServiceName, Arc<InboundPolicy>>,
    everybody: Arc<InboundPolicy>,
}

impl Inbound {
    /// What equals its counterpart in `former` is taken from there.
    pub(super) fn build(parts: &Parts<'_>, ports: &BTreeMap<ServicePort, PortParts>, former: &Self) -> Self {
        let names: BTreeSet<&ServiceName> = ports.keys().map(|name| &name.service).collect();
        let services = names.into_iter().map(|name| {
            let policy = reuse(parts.inbound(name), former.services.get(name));
            (name.clone(), policy)
        });
        let everybody =
            InboundPolicy { access: Access { default: parts.default_access() }, ..InboundPolicy::default() };
        Self { services: services.collect(), everybody: reuse(everybody, Some(&former.everybody)) }
    }

    pub(super) fn of(&self, service: &ServiceName) -> Arc<InboundPolicy> {
        self.services.get(service).unwrap_or(&self.everybody).clone()
    }
}

impl Parts<'_> {
    /// What holds for those who call a service.
    fn inbound(&self, service: &ServiceName) -> InboundPolicy {
        InboundPolicy { access: Access { default: self.default_access() }, limits: self.limits_of(service) }
    }

    /// All TrafficLimits of a service, which must all be kept.
    fn limits_of(&self, service: &ServiceName) -> TrafficLimits {
        let of = |limit: &&&Limit| limit.services.iter().any(|target| target.service == *service);
        self.limits.iter().filter(of).fold(TrafficLimits::default(), |all, limit| all.and(&limit.limits))
    }

    /// The strictest of what is said wins.
    fn default_access(&self) -> DefaultAccess {
        self.settings.iter().filter_map(|settings| settings.default_inbound_policy).max().unwrap_or_default()
    }
}
