//! What holds for those who call, service by service.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sheetbend_control_plane_client::model::{
    Access, AuthorizationPolicy, DefaultAccess, InboundPolicy, ServiceName, ServicePort, TokenIssuer, TrafficLimits,
    Transport,
};

use super::parts::{Parts, PortParts, service_of};
use super::reuse;
use crate::resources::Parent;

/// Every service's policy. One that is not named here has that of its namespace, or of everybody.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    services: BTreeMap<ServiceName, Arc<InboundPolicy>>,
    namespaces: BTreeMap<Arc<str>, Arc<InboundPolicy>>,
    everybody: Arc<InboundPolicy>,
    accounts: Accounts,
}

impl Inbound {
    /// What equals its counterpart in `former` is taken from there.
    pub(super) fn build(parts: &Parts<'_>, ports: &BTreeMap<ServicePort, PortParts>, former: &Self) -> Self {
        let mut names: BTreeSet<&ServiceName> = ports.keys().map(|name| &name.service).collect();
        let accounts = accounts(parts, ports, &former.accounts);
        let (policies, issuers) = (About::policies(parts, &accounts), About::issuers(parts, &accounts));
        names.extend(policies.services.keys().chain(issuers.services.keys()));
        let limits = About::limits(parts, &accounts);
        names.extend(limits.services.keys());
        let default = parts.default_access();
        let of = |name: Option<&ServiceName>, namespace: &Arc<str>| {
            let mut access = Access { default, ..Access::default() };
            access.policies = policies.of(name, namespace).cloned().collect();
            access.policies.sort_by(|a, b| a.name.cmp(&b.name));
            access.policies.dedup_by(|a, b| a.name == b.name);
            access.issuers = issuers.nearest(name, namespace);
            access
        };
        let services = names.into_iter().map(|name| {
            let access = of(Some(name), &name.namespace);
            let mut limits: Vec<_> = limits.services.get(name).into_iter().flatten().copied().collect();
            // Two of its targets may have proxies under one name: it is one limit still.
            limits.dedup_by(|a, b| std::ptr::eq(*a, *b));
            let limits = limits.into_iter().fold(TrafficLimits::default(), |all, limit| all.and(limit));
            let policy = InboundPolicy { access, limits };
            (name.clone(), reuse(policy, former.services.get(name)))
        });
        let services = services.collect();
        let everywhere: BTreeSet<&Arc<str>> =
            policies.namespaces.keys().chain(issuers.namespaces.keys()).copied().collect();
        let namespaces = everywhere.into_iter().map(|namespace| {
            let policy = InboundPolicy { access: of(None, namespace), ..InboundPolicy::default() };
            (namespace.clone(), reuse(policy, former.namespaces.get(namespace)))
        });
        let namespaces = namespaces.collect();
        let everybody = InboundPolicy { access: Access { default, ..Access::default() }, ..InboundPolicy::default() };
        Self { services, namespaces, everybody: reuse(everybody, Some(&former.everybody)), accounts }
    }

    pub(super) fn of(&self, service: &ServiceName) -> Arc<InboundPolicy> {
        let named = self.services.get(service).or_else(|| self.namespaces.get(&service.namespace));
        named.unwrap_or(&self.everybody).clone()
    }
}

/// What speaks of services, and of whole namespaces.
struct About<'a, T> {
    services: BTreeMap<&'a ServiceName, Vec<T>>,
    namespaces: BTreeMap<&'a Arc<str>, Vec<T>>,
}

impl<'a> About<'a, &'a Arc<AuthorizationPolicy>> {
    fn policies(parts: &Parts<'a>, accounts: &'a Accounts) -> Self {
        let all = parts.authorizations.iter();
        Self::collect(accounts, all.map(|one| (&one.object, &*one.targets, &one.policy)))
    }
}

impl<'a> About<'a, &'a TrafficLimits> {
    /// Of services alone: what routes' callers keep is none of their business.
    fn limits(parts: &Parts<'a>, accounts: &'a Accounts) -> Self {
        let all = parts.limits.iter().filter(|limit| !limit.services.is_empty());
        Self::collect(accounts, all.map(|one| (&one.object, &*one.services, &one.limits)))
    }
}

impl<'a> About<'a, &'a Vec<TokenIssuer>> {
    fn issuers(parts: &Parts<'a>, accounts: &'a Accounts) -> Self {
        Self::collect(accounts, parts.tokens.iter().map(|one| (&one.object, &*one.targets, &one.issuers)))
    }
}

impl About<'_, &Vec<TokenIssuer>> {
    /// What is said of a service's issuers, and what is said in its namespace of those of which it says nothing itself.
    fn nearest(&self, name: Option<&ServiceName>, namespace: &Arc<str>) -> Vec<TokenIssuer> {
        let own = name.and_then(|name| self.services.get(name)).into_iter().flatten().copied().flatten();
        let mut all: Vec<TokenIssuer> = own.cloned().collect();
        let of_service = all.len();
        for issuer in self.namespaces.get(namespace).into_iter().flatten().copied().flatten() {
            if all.iter().take(of_service).all(|own| own.issuer != issuer.issuer) {
                all.push(issuer.clone());
            }
        }
        all
    }
}

impl<'a, T: Copy> About<'a, T> {
    fn collect(accounts: &'a Accounts, all: impl Iterator<Item = (&'a ServiceName, &'a [Parent], T)>) -> Self {
        let mut about = Self { services: BTreeMap::new(), namespaces: BTreeMap::new() };
        for (object, targets, what) in all {
            for target in targets.iter().map(|target| &target.service) {
                for name in accounts.get(target).into_iter().flatten().chain([target]) {
                    about.services.entry(name).or_default().push(what);
                }
            }
            if targets.is_empty() {
                about.namespaces.entry(&object.namespace).or_default().push(what);
                // Proxies of its Services may be known by names of other namespaces.
                let of_here = accounts.iter().filter(|(service, _)| service.namespace == object.namespace);
                let elsewhere = of_here.flat_map(|(_, names)| names).filter(|name| name.namespace != object.namespace);
                for name in elsewhere.collect::<BTreeSet<_>>() {
                    about.services.entry(name).or_default().push(what);
                }
            }
        }
        about
    }

    fn of(&self, name: Option<&ServiceName>, namespace: &Arc<str>) -> impl Iterator<Item = T> {
        let own = name.and_then(|name| self.services.get(name));
        own.into_iter().chain(self.namespaces.get(namespace)).flatten().copied()
    }
}

/// By Service, the other names under which its proxies are known.
type Accounts = BTreeMap<ServiceName, BTreeSet<ServiceName>>;

/// A proxy is told by its identity, which may have another name than the Service whose endpoint it is beside. What was seen
/// once stays for as long as there is the Service: a pod is held to its policies before it is an endpoint, and after.
fn accounts(parts: &Parts<'_>, ports: &BTreeMap<ServicePort, PortParts>, former: &Accounts) -> Accounts {
    let mut accounts = former.clone();
    let known: BTreeSet<&ServiceName> = ports.keys().map(|port| &port.service).collect();
    accounts.retain(|service, _| known.contains(service));
    for slice in &parts.slices {
        let (Transport::Sheetbend(id) | Transport::MutualTls(id)) = &slice.transport else { continue };
        if let Some(account) = service_of(id).filter(|account| *account != slice.service) {
            accounts.entry(slice.service.clone()).or_default().insert(account);
        }
    }
    accounts
}

impl Parts<'_> {
    /// The strictest of what is said wins.
    fn default_access(&self) -> DefaultAccess {
        self.settings.iter().filter_map(|settings| settings.default_inbound_policy).max().unwrap_or_default()
    }
}
