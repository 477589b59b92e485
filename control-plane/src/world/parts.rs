//! Resources and registrations on their way to a world: sorted, matched, and put together port by port.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{
    AppProtocol, Backend, BackendPolicy, Cluster, ClusterName, Endpoint, Fault, HeaderEdits, Match, Mesh,
    OutboundPolicy, Rule, RulePolicy, ServiceName, ServicePort, Target, TrafficLimits, Transport,
};

use super::connections::is_of_connections;
use super::{ClusterEntry, Inputs, World, reuse};
use crate::registry::Registered;
use crate::resources::{
    Authorization, BACKEND_TRAFFIC, FaultTarget, Faults, Limit, Parent, Rank, Ranked, Resource, Route, RouteRule,
    RouteTarget, Service, Settings, Slice, TCP_ROUTE, TLS_ROUTE, Tokens, in_order_of_age,
};

/// A service port while it is being put together.
#[derive(Default)]
pub(crate) struct PortParts {
    pub(super) protocol: AppProtocol,
    /// By where the app is: an address that is both registered and in a slice is one endpoint, the registered.
    pub(super) endpoints: BTreeMap<SocketAddr, Endpoint>,
    /// Endpoints by their other addresses: for those who call these, and for nobody else.
    pub(super) also: BTreeMap<SocketAddr, Endpoint>,
}

impl PortParts {
    pub(crate) fn protocol(&self) -> AppProtocol {
        self.protocol
    }
}

/// Resources by kind.
pub(crate) struct Parts<'a> {
    pub(super) services: BTreeMap<&'a ServiceName, &'a Service>,
    pub(super) slices: Vec<&'a Slice>,
    pub(super) routes: Vec<&'a Route>,
    /// By name.
    pub(super) faults: BTreeMap<&'a ServiceName, &'a Faults>,
    /// By the Service that it is about.
    pub(crate) policies: BTreeMap<&'a ServiceName, &'a Arc<BackendPolicy>>,
    pub(super) limits: Vec<&'a Limit>,
    pub(super) authorizations: Vec<&'a Authorization>,
    /// How many retries there may be, by the same.
    pub(crate) retry_constraints: BTreeMap<&'a ServiceName, &'a Arc<BackendPolicy>>,
    pub(super) tokens: Vec<&'a Tokens>,
    pub(super) settings: Vec<&'a Settings>,
}

impl<'a> Parts<'a> {
    pub(crate) fn sort(resources: &'a [Resource]) -> Self {
        let mut parts = Self {
            services: BTreeMap::new(),
            slices: Vec::new(),
            routes: Vec::new(),
            faults: BTreeMap::new(),
            policies: BTreeMap::new(),
            limits: Vec::new(),
            authorizations: Vec::new(),
            retry_constraints: BTreeMap::new(),
            tokens: Vec::new(),
            settings: Vec::new(),
        };
        for resource in resources {
            match resource {
                Resource::Service(service) => drop(parts.services.insert(&service.name, service)),
                Resource::Slice(slice) => parts.slices.push(slice),
                Resource::Route(route) => parts.routes.push(route),
                Resource::Faults(faults) => drop(parts.faults.insert(&faults.object, faults)),
                Resource::Backend(backend) => {
                    let of = parts.of_kind(backend.kind);
                    of.extend(backend.targets.iter().map(|target| (&target.service, &backend.policy)));
                }
                Resource::Limit(limit) => parts.limits.push(limit),
                Resource::Tokens(one) => parts.tokens.push(one),
                Resource::Authorization(one) => parts.authorizations.push(one),
                Resource::Settings(settings) => parts.settings.push(settings),
            }
        }
        parts
    }

    fn of_kind(&mut self, kind: &str) -> &mut BTreeMap<&'a ServiceName, &'a Arc<BackendPolicy>> {
        match kind {
            BACKEND_TRAFFIC => &mut self.retry_constraints,
            _ => &mut self.policies,
        }
    }

    /// What holds for callers of a service: how many retries there may be is one kind's, all else another's.
    fn policy(&self, service: &ServiceName) -> Arc<BackendPolicy> {
        let policy = self.policies.get(service).map(|policy| Arc::clone(policy)).unwrap_or_default();
        match self.retry_constraints.get(service) {
            None => policy,
            Some(found) => {
                BackendPolicy { retry_constraint: found.retry_constraint, ..BackendPolicy::clone(&policy) }.into()
            }
        }
    }

    /// The host outside the mesh that a service port stands for.
    pub(super) fn external(&self, name: &ServicePort) -> Option<Target> {
        let service = self.services.get(&name.service)?;
        let port = service.ports.iter().find(|port| port.port == name.port)?;
        Target::new(service.external_name.as_deref()?, port.target).ok()
    }

    pub(crate) fn ports(&self, inputs: &Inputs<'_>) -> BTreeMap<ServicePort, PortParts> {
        let mut ports: BTreeMap<ServicePort, PortParts> = BTreeMap::new();
        for service in self.services.values() {
            for port in &service.ports {
                let name = ServicePort { service: service.name.clone(), port: port.port };
                ports.entry(name).or_default().protocol = port.protocol;
            }
        }
        let reachable = |address: SocketAddr| inputs.same_machine || !address.ip().is_loopback();
        for slice in &self.slices {
            for port in &slice.ports {
                let number = self.port_of_slice(slice, port);
                let parts = ports.entry(ServicePort { service: slice.service.clone(), port: number }).or_default();
                set_protocol(parts, port.protocol);
                for (address, endpoint) in slice.addresses(port).filter(|(address, _)| reachable(*address)) {
                    let endpoint = Endpoint {
                        address,
                        transport: slice.transport.clone(),
                        standing: endpoint.standing.clone(),
                        workload: endpoint.workload.clone(),
                    };
                    parts.endpoints.insert(address, endpoint);
                }
            }
        }
        for one in inputs.registered {
            self.add_registered(one, reachable, &mut ports);
        }
        ports
    }

    /// A slice's port is the Service's of the same name, or of the same target; without one it is itself.
    pub(super) fn port_of_slice(&self, slice: &Slice, port: &crate::resources::SlicePort) -> u16 {
        let Some(service) = self.services.get(&slice.service) else { return port.port };
        let by_name = service.ports.iter().find(|p| p.name == port.name && !p.name.is_empty());
        let by_target = service.ports.iter().find(|p| p.target == port.port);
        by_name.or(by_target).or(service.ports.iter().find(|p| p.name == port.name)).map_or(port.port, |p| p.port)
    }

    pub(super) fn add_registered(
        &self,
        one: &Registered,
        reachable: impl Fn(SocketAddr) -> bool,
        ports: &mut BTreeMap<ServicePort, PortParts>,
    ) {
        let Some(service) = service_of(&one.instance.identity) else { return };
        for registered in &one.ports {
            let address = SocketAddr::new(one.address, registered.inbound);
            if !reachable(address) {
                continue;
            }
            let declared = self.services.get(&service).into_iter().flat_map(|s| &s.ports);
            let mut numbers: Vec<u16> = declared.filter(|p| p.target == registered.port).map(|p| p.port).collect();
            if numbers.is_empty() {
                numbers.push(registered.port);
            }
            for number in numbers {
                let parts = ports.entry(ServicePort { service: service.clone(), port: number }).or_default();
                set_protocol(parts, registered.protocol);
                parts.endpoints.remove(&SocketAddr::new(one.address, registered.port));
                let endpoint = Endpoint {
                    address,
                    transport: Transport::Sheetbend(one.instance.identity.clone()),
                    standing: one.standing.clone(),
                    workload: one.instance.node.clone(),
                };
                for ip in &one.also {
                    let address = SocketAddr::new(*ip, registered.inbound);
                    parts.also.entry(address).or_insert(Endpoint { address, ..endpoint.clone() });
                }
                // Who was first keeps an address that two claim.
                parts.endpoints.entry(address).or_insert(endpoint);
            }
        }
    }

    /// Whom an address stands for, if more than one claims it: what the operator wrote, then who was first.
    pub(super) fn owners(&self, inputs: &Inputs<'_>) -> HashMap<SocketAddr, ServiceName> {
        let mut owners = HashMap::new();
        for slice in &self.slices {
            for (address, _) in slice.ports.iter().flat_map(|port| slice.addresses(port)) {
                owners.entry(address).or_insert_with(|| slice.service.clone());
            }
        }
        for one in inputs.registered {
            let Some(service) = service_of(&one.instance.identity) else { continue };
            for (port, ip) in
                one.ports.iter().flat_map(|port| one.also.iter().chain([&one.address]).map(move |ip| (port, ip)))
            {
                owners.entry(SocketAddr::new(*ip, port.inbound)).or_insert_with(|| service.clone());
            }
        }
        owners
    }

    /// What is asked of requests to a port, in order.
    pub(crate) fn rules(&self, name: &ServicePort) -> Vec<Rule> {
        let routes = self.routes_of(name);
        if routes.first().is_some_and(|route| is_of_connections(route)) {
            return Vec::new();
        }
        let mut rules = Vec::new();
        for route in &routes {
            let limits = self.limits_of_route(route);
            let faults = self.faults(|target| match target {
                FaultTarget::Service(_) => is_for(target, name),
                FaultTarget::Route(target) => target.kind == route.kind && target.name == route.name,
            });
            for (number, rule) in route.rules.iter().enumerate() {
                rules.extend(expand(route, number, rule, &limits, &faults));
            }
        }
        // A stable sort: what is alike stays in the order of routes and of their rules.
        rules.sort_by_key(|(order, _)| *order);
        let mut rules: Vec<Rule> = rules.into_iter().map(|(_, rule)| rule).collect();
        let everything = |rule: &Rule| rule.matches.is_empty() || rule.matches.contains(&Match::default());
        match routes.first() {
            // HTTPRouteRule: "When no rules matching a request have been successfully attached to the parent a request is
            // coming from, a HTTP 404 status code MUST be returned."
            Some(route) if !rules.last().is_some_and(everything) => {
                let name = format!("{}/{}#no-rule", route.name.namespace, route.name.service).into();
                let place = route.rules.first().map_or_else(Arc::default, |rule| rule.policy.place.clone());
                let policy = RulePolicy { place, ..RulePolicy::default() }.into();
                rules.push(Rule { name, matches: Vec::new(), backends: Vec::new(), policy });
            }
            Some(_) => {}
            None => rules.extend(self.only_faults(name)),
        }
        rules
    }

    /// The routes of a port, in order. GEP-1426: of routes of different kinds, the most specific kind alone counts.
    pub(crate) fn routes_of(&self, name: &ServicePort) -> Vec<&'a Route> {
        let attached = |p: &Parent| p.service == name.service && p.port.is_none_or(|port| port == name.port);
        let here: Vec<&Route> = self.routes.iter().copied().filter(|r| r.parents.iter().any(attached)).collect();
        let kind = KINDS.into_iter().find(|kind| here.iter().any(|route| route.kind == *kind));
        in_order_of_age(here.into_iter().filter(|route| Some(route.kind) == kind))
    }

    /// Of a port that no route is about: all of its requests, where some of them fail on purpose.
    fn only_faults(&self, name: &ServicePort) -> Option<Rule> {
        let faults = self.faults(|target| is_for(target, name));
        let first = faults.first()?;
        let (first, place) = (first.name.clone(), first.place.clone());
        let own = Backend { cluster: name.to_string().into(), weight: 1, headers: HeaderEdits::default() };
        let policy = RulePolicy { place, faults, ..RulePolicy::default() }.into();
        Some(Rule { name: first, matches: Vec::new(), backends: vec![own], policy })
    }

    /// Faults with one target that is meant.
    fn faults(&self, meant: impl Fn(&FaultTarget) -> bool) -> Vec<Fault> {
        let here = self.faults.values().filter(|faults| faults.targets.iter().any(&meant));
        here.map(|faults| faults.fault.clone()).collect()
    }

    /// All TrafficLimits of a route, which must all be kept. Its buckets are its own: another route that the same policy
    /// is about has others.
    fn limits_of_route(&self, route: &Route) -> TrafficLimits {
        let is_it = |target: &RouteTarget| target.kind == route.kind && target.name == route.name;
        let here = self.limits.iter().filter(|limit| limit.routes.iter().any(is_it));
        let mut all = here.fold(TrafficLimits::default(), |all, limit| all.and_of_route(&limit.limits));
        for rate in &mut all.rates {
            rate.name =
                format!("{} of {} {}/{}", rate.name, route.kind, route.name.namespace, route.name.service).into();
        }
        all
    }

    pub(super) fn mesh(&self, inputs: &Inputs<'_>, ports: &BTreeMap<ServicePort, PortParts>) -> Mesh {
        let mut ranges: Vec<ipnet::IpNet> = self.settings.iter().flat_map(|s| s.mesh_ranges.iter().copied()).collect();
        ranges.extend(self.services.values().flat_map(|s| s.cluster_ips.iter().map(|ip| ipnet::IpNet::from(*ip))));
        // Those within another one add nothing, and neighbours are one: proxies take so many and no more.
        let ranges = ipnet::IpNet::aggregate(&ranges);
        let namespaces: HashSet<&str> = ports.keys().map(|name| &*name.service.namespace).collect();
        let mut domains: Vec<Arc<str>> = vec!["svc".into(), "svc.cluster.local".into(), "default".into()];
        domains.push(format!("svc.{}", inputs.trust_domain).into());
        domains.extend(namespaces.into_iter().map(Arc::from));
        domains.sort_unstable();
        domains.dedup();
        // The stricter of two wins.
        let denied = self.settings.iter().any(|s| s.outbound_policy == Some(OutboundPolicy::Deny));
        let outbound_policy = if denied { OutboundPolicy::Deny } else { OutboundPolicy::Allow };
        Mesh { trust_domain: inputs.trust_domain.clone(), ranges, domains, outbound_policy }
    }
}

/// From the most specific to the least.
const KINDS: [&str; 4] = ["GRPCRoute", "HTTPRoute", TLS_ROUTE, TCP_ROUTE];

/// Beside a local process the service account is the service.
pub(super) fn service_of(identity: &SpiffeId) -> Option<ServiceName> {
    let (namespace, account) = identity.workload()?;
    // With a dot in the namespace, `a.b.c` could be two services.
    if namespace.contains('.') {
        return None;
    }
    Some(ServiceName { service: account.into(), namespace: namespace.into() })
}

fn set_protocol(parts: &mut PortParts, said: AppProtocol) {
    if parts.protocol == AppProtocol::Detect {
        parts.protocol = said;
    }
}

fn is_for(target: &FaultTarget, name: &ServicePort) -> bool {
    let holds = |at: &Parent| at.service == name.service && at.port.is_none_or(|port| port == name.port);
    matches!(target, FaultTarget::Service(service) if holds(service))
}

/// One rule a match, so that the matches of several routes can be put in order.
fn expand(
    route: &Route,
    number: usize,
    rule: &RouteRule,
    limits: &TrafficLimits,
    faults: &[Fault],
) -> Vec<(Reverse<Rank>, Rule)> {
    let backends: Vec<Backend> = rule
        .backends
        .iter()
        .filter(|b| b.weight > 0)
        .map(|b| {
            let name = ServicePort { service: b.service.clone(), port: b.port };
            Backend { cluster: name.to_string().into(), weight: b.weight, headers: b.headers.clone() }
        })
        .collect();
    let name: Arc<str> = format!("{}/{}#{number}", route.name.namespace, route.name.service).into();
    let mut policy = rule.policy.clone();
    if policy.limits != *limits || *policy.faults != *faults {
        let policy = Arc::make_mut(&mut policy);
        (policy.limits, policy.faults) = (limits.clone(), faults.to_vec());
    }
    let one = |matches| Rule { name: name.clone(), matches, backends: backends.clone(), policy: policy.clone() };
    match rule.matches.is_empty() {
        true => vec![(Reverse(Ranked::EVERYTHING), one(Vec::new()))],
        false => rule.matches.iter().map(|m| (m.order(), one(vec![m.condition.clone()]))).collect(),
    }
}

/// Priorities without a gap, as Envoy and gRPC want them: those of which nobody is there are left out.
fn close_ranks(endpoints: &mut [Endpoint]) {
    let ranks: BTreeSet<u32> = endpoints.iter().map(|endpoint| endpoint.standing.priority).collect();
    if ranks.last().is_none_or(|last| *last == 0) {
        return;
    }
    let ranks: BTreeMap<u32, u32> = ranks.into_iter().zip(0..).collect();
    for standing in endpoints.iter_mut().map(|endpoint| &mut endpoint.standing) {
        standing.priority = ranks.get(&standing.priority).copied().unwrap_or_default();
    }
}

/// The cluster of every service port, and an empty one for whatever a route names that is not there: it answers 503,
/// and the rest of the route works.
pub(super) fn clusters(
    ports: &BTreeMap<ServicePort, PortParts>,
    parts: &Parts<'_>,
    former: &World,
) -> HashMap<ClusterName, ClusterEntry> {
    let mut all: BTreeMap<ServicePort, (Vec<Endpoint>, AppProtocol)> = BTreeMap::new();
    for (name, port) in ports {
        all.insert(name.clone(), (port.endpoints.values().cloned().collect(), port.protocol));
    }
    for backend in parts.routes.iter().flat_map(|r| &r.rules).flat_map(|r| &r.backends) {
        all.entry(ServicePort { service: backend.service.clone(), port: backend.port }).or_default();
    }
    all.into_iter()
        .map(|(service, (mut endpoints, protocol))| {
            close_ranks(&mut endpoints);
            let name: ClusterName = service.to_string().into();
            let policy = parts.policy(&service.service);
            let external = parts.external(&service);
            let cluster = Cluster { name: name.clone(), service, endpoints, external, policy };
            let cluster = reuse(cluster, former.clusters.get(&name).map(|entry| &entry.cluster));
            (name, ClusterEntry { cluster, protocol })
        })
        .collect()
}
