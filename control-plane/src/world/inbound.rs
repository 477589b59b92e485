//! What holds for those who call, service by service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sheetbend_control_plane_client::model::{
    Access, AuthorizationPolicy, DefaultAccess, InboundPolicy, ServiceName, ServicePort, TrafficLimits, Transport,
};

use super::parts::{Parts, PortParts, service_of};
use super::reuse;
use crate::resources::Limit;

/// Every service's policy. One that is not named here has that of its namespace, or of everybody.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    services: BTreeMap<ServiceName, Arc<InboundPolicy>>,
    namespaces: BTreeMap<Arc<str>, Arc<InboundPolicy>>,
    everybody: Arc<InboundPolicy>,
}

impl Inbound {
    /// What equals its counterpart in `former` is taken from there.
    pub(super) fn build(parts: &Parts<'_>, ports: &BTreeMap<ServicePort, PortParts>, former: &Self) -> Self {
        let mut names: BTreeSet<&ServiceName> = ports.keys().map(|name| &name.service).collect();
        let (mut about, mut everywhere): (BTreeMap<_, Vec<_>>, BTreeMap<_, Vec<_>>) = Default::default();
        let accounts = accounts(parts);
        for one in &parts.authorizations {
            for target in one.targets.iter().map(|target| &target.service) {
                let stand_for = accounts.get(target).into_iter().flatten();
                for name in stand_for.chain([target]) {
                    names.insert(name);
                    about.entry(name).or_default().push(&one.policy);
                }
            }
            if one.targets.is_empty() {
                everywhere.entry(&one.object.namespace).or_default().push(&one.policy);
            }
        }
        names.extend(parts.limits.iter().flat_map(|limit| &limit.services).map(|target| &target.service));
        let default = parts.default_access();
        let of = |own: Option<&Vec<&Arc<AuthorizationPolicy>>>, namespace: &Arc<str>| {
            let all = own.into_iter().chain(everywhere.get(namespace)).flatten();
            let mut policies: Vec<Arc<AuthorizationPolicy>> = all.map(|policy| Arc::clone(policy)).collect();
            policies.sort_by(|a, b| a.name.cmp(&b.name));
            policies.dedup_by(|a, b| a.name == b.name);
            Access { default, policies }
        };
        let services = names.into_iter().map(|name| {
            let access = of(about.get(name), &name.namespace);
            let policy = InboundPolicy { access, limits: parts.limits_of(name) };
            (name.clone(), reuse(policy, former.services.get(name)))
        });
        let namespaces = everywhere.keys().map(|namespace| {
            let policy = InboundPolicy { access: of(None, namespace), ..InboundPolicy::default() };
            ((*namespace).clone(), reuse(policy, former.namespaces.get(*namespace)))
        });
        let everybody = InboundPolicy { access: Access { default, ..Access::default() }, ..InboundPolicy::default() };
        Self {
            services: services.collect(),
            namespaces: namespaces.collect(),
            everybody: reuse(everybody, Some(&former.everybody)),
        }
    }

    pub(super) fn of(&self, service: &ServiceName) -> Arc<InboundPolicy> {
        let named = self.services.get(service).or_else(|| self.namespaces.get(&service.namespace));
        named.unwrap_or(&self.everybody).clone()
    }
}

/// A proxy is told by its identity, which may have another name than the Service whose endpoint it is beside.
fn accounts(parts: &Parts<'_>) -> BTreeMap<ServiceName, BTreeSet<ServiceName>> {
    let mut accounts: BTreeMap<ServiceName, BTreeSet<ServiceName>> = BTreeMap::new();
    for slice in &parts.slices {
        let (Transport::Sheetbend(id) | Transport::MutualTls(id)) = &slice.transport else { continue };
        if let Some(account) = service_of(id).filter(|account| *account != slice.service) {
            accounts.entry(slice.service.clone()).or_default().insert(account);
        }
    }
    accounts
}

impl Parts<'_> {
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
