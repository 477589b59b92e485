//! The mesh as it stands: registrations and resources put together, indexed for answers. PURE: built, then only read.
//!
//! A new world is built whole whenever anything changed. Destinations and clusters that did not change keep their
//! `Arc`, so that a stream sees by a pointer's comparison what it need not send again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{
    AppProtocol, Backend, Cluster, ClusterName, Destination, Endpoint, Match, Mesh, OutboundPolicy, PathMatch, Rule,
    ServiceName, ServicePort, Target, Transport,
};

use crate::registry::Registered;
use crate::resources::{Resource, Route, Service, Settings, Slice};

/// A cluster, and what its service port speaks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ClusterEntry {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) protocol: AppProtocol,
}

/// The mesh as it stands.
#[derive(Debug, Default)]
pub(crate) struct World {
    pub(crate) mesh: Arc<Mesh>,
    /// By service port.
    destinations: BTreeMap<ServicePort, Arc<Destination>>,
    /// By `web.default:8000`.
    clusters: HashMap<ClusterName, ClusterEntry>,
    /// Cluster IPs.
    virtual_addresses: HashMap<SocketAddr, ServicePort>,
    /// Where an endpoint is reached, which stands for that one alone.
    endpoints: HashMap<SocketAddr, (ServicePort, Endpoint)>,
    trust_domain: Arc<str>,
}

/// What a world is built from.
pub(crate) struct Inputs<'a> {
    pub(crate) trust_domain: Arc<str>,
    /// Oldest first.
    pub(crate) registered: &'a [Registered],
    pub(crate) resources: &'a [Resource],
    /// Whether loopback addresses mean something to the one who asks.
    pub(crate) same_machine: bool,
}

impl World {
    /// Puts everything together. What equals its counterpart in `former` is taken from there.
    pub(crate) fn build(inputs: &Inputs<'_>, former: &World) -> World {
        let parts = Parts::sort(inputs.resources);
        let ports = parts.ports(inputs);
        let clusters = clusters(&ports, &parts, former);
        let mut world = World {
            mesh: reuse(parts.mesh(inputs, &ports), Some(&former.mesh)),
            trust_domain: inputs.trust_domain.clone(),
            ..World::default()
        };
        let owners = parts.owners(inputs);
        for (name, port) in &ports {
            let rules = parts.rules(name);
            let default_cluster: ClusterName = name.to_string().into();
            let mut named: BTreeMap<ClusterName, Arc<Cluster>> = BTreeMap::new();
            let wanted = rules.iter().flat_map(|rule| rule.backends.iter().map(|b| &b.cluster));
            for wanted in wanted.chain([&default_cluster]) {
                if let Some(entry) = clusters.get(wanted) {
                    named.insert(wanted.clone(), entry.cluster.clone());
                }
            }
            let destination = Destination {
                name: name.clone(),
                trust_domain: inputs.trust_domain.clone(),
                protocol: port.protocol,
                rules,
                default_cluster,
                clusters: named,
            };
            world.destinations.insert(name.clone(), reuse(destination, former.destinations.get(name)));
            let own = |endpoint: &&Endpoint| owners.get(&endpoint.address) == Some(&name.service);
            for endpoint in port.endpoints.values().chain(port.also.values()).filter(own) {
                world.endpoints.entry(endpoint.address).or_insert_with(|| (name.clone(), endpoint.clone()));
            }
        }
        for service in parts.services.values() {
            for (ip, port) in service.cluster_ips.iter().flat_map(|ip| service.ports.iter().map(move |port| (ip, port)))
            {
                let name = ServicePort { service: service.name.clone(), port: port.port };
                world.virtual_addresses.entry(SocketAddr::new(*ip, port.port)).or_insert(name);
            }
        }
        world.clusters = clusters;
        world
    }

    /// What a target stands for, to someone in `namespace`. `None`: no part of the mesh.
    pub(crate) fn resolve(&self, target: &Target, namespace: &str) -> Option<Arc<Destination>> {
        match target.address() {
            Some(address) => self.resolve_address(address),
            None => self.resolve_name(target.host(), target.port(), namespace),
        }
    }

    fn resolve_address(&self, address: SocketAddr) -> Option<Arc<Destination>> {
        if let Some(name) = self.virtual_addresses.get(&address) {
            return self.destinations.get(name).cloned();
        }
        let (name, endpoint) = self.endpoints.get(&address)?;
        let whole = self.destinations.get(name)?;
        // Who calls one instance by its address means that one, as clients of StatefulSets do.
        let cluster = pinned_cluster(name, endpoint);
        Some(Arc::new(Destination {
            rules: Vec::new(),
            default_cluster: cluster.name.clone(),
            clusters: BTreeMap::from([(cluster.name.clone(), Arc::new(cluster))]),
            ..Destination::clone(whole)
        }))
    }

    fn resolve_name(&self, host: &str, port: u16, namespace: &str) -> Option<Arc<Destination>> {
        self.names(host, namespace).into_iter().find_map(|service| self.service_port(service, port))
    }

    /// The services that a host may mean: `web`, `web.default`, `web.default.svc`, `web.default.svc.cluster.local`.
    fn names(&self, host: &str, namespace: &str) -> Vec<ServiceName> {
        let host = ["cluster.local", &*self.trust_domain]
            .iter()
            .find_map(|domain| host.strip_suffix(domain)?.strip_suffix(".svc."))
            .or_else(|| host.strip_suffix(".svc"))
            .unwrap_or(host);
        let own = ServiceName { service: host.into(), namespace: namespace.into() };
        let apart = host.rsplit_once('.').map(|(s, n)| ServiceName { service: s.into(), namespace: n.into() });
        let mut names: Vec<ServiceName> = apart.into_iter().collect();
        if !host.contains('.') {
            names.push(own);
            names.push(ServiceName { service: host.into(), namespace: "default".into() });
        }
        names
    }

    /// The port, or the only port of a service that is asked for port 80.
    fn service_port(&self, service: ServiceName, port: u16) -> Option<Arc<Destination>> {
        let exact = ServicePort { service, port };
        if let Some(destination) = self.destinations.get(&exact) {
            return Some(destination.clone());
        }
        if port != 80 {
            return None;
        }
        let mut ports = self.ports_of(&exact.service);
        match (ports.next(), ports.next()) {
            (Some((_, only)), None) => Some(only.clone()),
            _ => None,
        }
    }

    /// Whether the service has this port alone.
    pub(crate) fn is_only_port(&self, name: &ServicePort) -> bool {
        self.ports_of(&name.service).count() == 1
    }

    fn ports_of(&self, service: &ServiceName) -> impl Iterator<Item = (&ServicePort, &Arc<Destination>)> {
        let port = |port| ServicePort { service: service.clone(), port };
        self.destinations.range(port(0)..=port(u16::MAX))
    }

    /// The destination whose routes have this name: `web.default:8000`, or `web.default:8000@10.0.0.7:15106`.
    pub(crate) fn routes(&self, name: &str) -> Option<Arc<Destination>> {
        match name.split_once('@') {
            Some((_, address)) => self.pinned(name, address.parse().ok()?),
            None => self.destinations.get(&parse_service_port(name)?).cloned(),
        }
    }

    /// The cluster of this name.
    pub(crate) fn cluster(&self, name: &str) -> Option<ClusterEntry> {
        if let Some(entry) = self.clusters.get(name) {
            return Some(entry.clone());
        }
        let destination = self.pinned(name, name.split_once('@')?.1.parse().ok()?)?;
        let cluster = destination.clusters.get(name)?.clone();
        Some(ClusterEntry { cluster, protocol: destination.protocol })
    }

    fn pinned(&self, name: &str, address: SocketAddr) -> Option<Arc<Destination>> {
        self.resolve_address(address).filter(|destination| *destination.default_cluster == *name)
    }

    /// Every service port, for those who want all.
    pub(crate) fn destinations(&self) -> impl Iterator<Item = &Arc<Destination>> {
        self.destinations.values()
    }

    /// Every cluster that is not of a single address.
    pub(crate) fn clusters(&self) -> impl Iterator<Item = &ClusterEntry> {
        self.clusters.values()
    }
}

/// `web.default:8000`. The namespace is what follows the last dot.
fn parse_service_port(text: &str) -> Option<ServicePort> {
    let (service, port) = text.rsplit_once(':')?;
    let (service, namespace) = service.rsplit_once('.')?;
    let service = ServiceName { service: service.into(), namespace: namespace.into() };
    Some(ServicePort { service, port: port.parse().ok()? })
}

fn pinned_cluster(name: &ServicePort, endpoint: &Endpoint) -> Cluster {
    let cluster: ClusterName = format!("{name}@{}", endpoint.address).into();
    Cluster { name: cluster, service: name.clone(), endpoints: vec![endpoint.clone()] }
}

fn reuse<T: PartialEq>(new: T, former: Option<&Arc<T>>) -> Arc<T> {
    match former {
        Some(former) if **former == new => former.clone(),
        _ => Arc::new(new),
    }
}

/// A service port while it is being put together.
#[derive(Default)]
struct PortParts {
    protocol: AppProtocol,
    /// By where the app is: an address that is both registered and in a slice is one endpoint, the registered.
    endpoints: BTreeMap<SocketAddr, Endpoint>,
    /// Endpoints by their other addresses: for those who call these, and for nobody else.
    also: BTreeMap<SocketAddr, Endpoint>,
}

/// Resources by kind.
struct Parts<'a> {
    services: BTreeMap<&'a ServiceName, &'a Service>,
    slices: Vec<&'a Slice>,
    routes: Vec<&'a Route>,
    settings: Vec<&'a Settings>,
}

impl<'a> Parts<'a> {
    fn sort(resources: &'a [Resource]) -> Self {
        let mut parts =
            Self { services: BTreeMap::new(), slices: Vec::new(), routes: Vec::new(), settings: Vec::new() };
        for resource in resources {
            match resource {
                Resource::Service(service) => drop(parts.services.insert(&service.name, service)),
                Resource::Slice(slice) => parts.slices.push(slice),
                Resource::Route(route) => parts.routes.push(route),
                Resource::Settings(settings) => parts.settings.push(settings),
            }
        }
        parts
    }

    fn ports(&self, inputs: &Inputs<'_>) -> BTreeMap<ServicePort, PortParts> {
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
                        weight: 1,
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
    fn port_of_slice(&self, slice: &Slice, port: &crate::resources::SlicePort) -> u16 {
        let Some(service) = self.services.get(&slice.service) else { return port.port };
        let by_name = service.ports.iter().find(|p| p.name == port.name && !p.name.is_empty());
        let by_target = service.ports.iter().find(|p| p.target == port.port);
        by_name.or(by_target).or(service.ports.iter().find(|p| p.name == port.name)).map_or(port.port, |p| p.port)
    }

    fn add_registered(
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
                    weight: 1,
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
    fn owners(&self, inputs: &Inputs<'_>) -> HashMap<SocketAddr, ServiceName> {
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

    fn rules(&self, name: &ServicePort) -> Vec<Rule> {
        let mut rules: Vec<Rule> = Vec::new();
        for route in &self.routes {
            let attached =
                |p: &crate::resources::Parent| p.service == name.service && p.port.is_none_or(|port| port == name.port);
            if !route.parents.iter().any(attached) {
                continue;
            }
            for (number, rule) in route.rules.iter().enumerate() {
                rules.extend(expand(route, number, rule));
            }
        }
        // Gateway API: of the matches of all routes the most specific one decides. A stable sort keeps their order.
        rules.sort_by_key(|rule| std::cmp::Reverse(rule.matches.first().map(specificity)));
        rules
    }

    fn mesh(&self, inputs: &Inputs<'_>, ports: &BTreeMap<ServicePort, PortParts>) -> Mesh {
        let mut ranges: Vec<ipnet::IpNet> = self.settings.iter().flat_map(|s| s.mesh_ranges.iter().copied()).collect();
        ranges.extend(self.services.values().flat_map(|s| s.cluster_ips.iter().map(|ip| ipnet::IpNet::from(*ip))));
        ranges.sort_unstable();
        ranges.dedup();
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

/// Beside a local process the service account is the service.
pub(crate) fn service_of(identity: &SpiffeId) -> Option<ServiceName> {
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

/// One rule a match, so that the matches of several routes can be put in order.
fn expand(route: &Route, number: usize, rule: &crate::resources::RouteRule) -> Vec<Rule> {
    let backends: Vec<Backend> = rule
        .backends
        .iter()
        .filter(|b| b.weight > 0)
        .map(|b| {
            let name = ServicePort { service: b.service.clone(), port: b.port };
            Backend { cluster: name.to_string().into(), weight: b.weight }
        })
        .collect();
    let name: Arc<str> = format!("{}/{}#{number}", route.name.namespace, route.name.service).into();
    let one = |matches| Rule { name: name.clone(), matches, backends: backends.clone() };
    match rule.matches.is_empty() {
        true => vec![one(Vec::new())],
        false => rule.matches.iter().map(|m| one(vec![m.clone()])).collect(),
    }
}

/// HTTPRouteMatch, "Proxy or Load Balancer routing configuration generated from HTTPRoutes MUST prioritize".
fn specificity(one: &Match) -> (bool, usize, bool, usize) {
    let (exact, length) = match &one.path {
        Some(PathMatch::Exact(path)) => (true, path.len()),
        Some(PathMatch::Prefix(path)) => (false, path.len()),
        None => (false, 0),
    };
    (exact, length, one.method.is_some(), one.headers.len())
}

/// The cluster of every service port, and an empty one for whatever a route names that is not there: it answers 503,
/// and the rest of the route works.
fn clusters(
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
        .map(|(service, (endpoints, protocol))| {
            let name: ClusterName = service.to_string().into();
            let cluster = Cluster { name: name.clone(), service, endpoints };
            let cluster = reuse(cluster, former.clusters.get(&name).map(|entry| &entry.cluster));
            (name, ClusterEntry { cluster, protocol })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Instance;
    use crate::resources::{Parent, RouteBackend, RouteRule};
    use sheetbend_control_plane_client::registration::RegisteredPort;

    fn registered(service: &str, ip: [u8; 4], port: u16, inbound: u16) -> Registered {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{service}").parse().unwrap();
        Registered {
            instance: Instance { identity, node: format!("{service}-{inbound}").into() },
            address: ip.into(),
            ports: vec![RegisteredPort { port, inbound, protocol: AppProtocol::Detect }],
            also: Vec::new(),
        }
    }

    fn world(registered: &[Registered], resources: &[Resource]) -> World {
        build(registered, resources, true, &World::default())
    }

    fn build(registered: &[Registered], resources: &[Resource], same_machine: bool, former: &World) -> World {
        let inputs = Inputs { trust_domain: "cluster.local".into(), registered, resources, same_machine };
        World::build(&inputs, former)
    }

    fn ask(world: &World, target: &str) -> Option<String> {
        let destination = world.resolve(&target.parse().unwrap(), "default")?;
        Some(destination.default_cluster.to_string())
    }

    fn name(service: &str) -> ServiceName {
        ServiceName { service: service.into(), namespace: "default".into() }
    }

    #[test]
    fn a_service_is_reached_by_every_one_of_its_names() {
        let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[]);
        let web = Some("web.default:8000".to_string());
        for host in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
            assert_eq!(ask(&world, &format!("{host}:8000")), web, "{host}");
            assert_eq!(ask(&world, &format!("{host}:80")), web, "{host} has one port");
        }
        for other in ["web:81", "web.other:8000", "db:8000", "example.org:80", "127.0.0.1:8000"] {
            assert_eq!(ask(&world, other), None, "{other}");
        }
        assert_eq!(ask(&world, "127.0.0.1:41000").unwrap(), "web.default:8000@127.0.0.1:41000");
        assert!(world.cluster("web.default:8000@127.0.0.1:41000").is_some());
        assert!(world.routes("web.default:8000@127.0.0.1:41000").is_some());
        assert!(world.cluster("db.default:8000@127.0.0.1:41000").is_none());
    }

    #[test]
    fn a_proxy_is_meant_by_each_of_its_addresses_and_reached_for_others_by_the_first() {
        let mut one = registered("web", [192, 0, 2, 7], 8000, 8000);
        one.also = vec!["2001:db8::7".parse().unwrap()];
        let world = world(&[one], &[]);
        assert_eq!(ask(&world, "[2001:db8::7]:8000").unwrap(), "web.default:8000@[2001:db8::7]:8000");
        let cluster = world.cluster("web.default:8000").unwrap().cluster;
        let addresses: Vec<_> = cluster.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!(addresses, ["192.0.2.7:8000"]);
        assert!(world.cluster("web.default:8000@[2001:db8::7]:8000").is_some());
    }

    #[test]
    fn an_address_that_two_claim_is_of_who_was_first() {
        let claims = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("a-thief", [127, 0, 0, 1], 1, 41000)];
        assert_eq!(ask(&world(&claims, &[]), "127.0.0.1:41000").unwrap(), "web.default:8000@127.0.0.1:41000");
    }

    #[test]
    fn port_80_is_ambiguous_when_there_are_two() {
        let two = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("web", [127, 0, 0, 1], 9000, 41001)];
        assert_eq!(ask(&world(&two, &[]), "web:80"), None);
    }

    #[test]
    fn loopback_endpoints_are_told_on_their_own_machine_only() {
        let both = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("web", [192, 0, 2, 7], 8000, 15106)];
        let far = build(&both, &[], false, &World::default());
        let cluster = far.cluster("web.default:8000").unwrap().cluster;
        assert_eq!(cluster.endpoints.len(), 1);
        assert_eq!(cluster.endpoints[0].address.to_string(), "192.0.2.7:15106");
    }

    #[test]
    fn what_did_not_change_keeps_its_place_in_memory() {
        let mut all = vec![registered("web", [127, 0, 0, 1], 8000, 41000)];
        let first = world(&all, &[]);
        all.push(registered("db", [127, 0, 0, 1], 5432, 41001));
        let second = build(&all, &[], true, &first);
        let of = |world: &World| world.routes("web.default:8000").unwrap();
        assert!(Arc::ptr_eq(&of(&first), &of(&second)));
        assert!(Arc::ptr_eq(
            &first.cluster("web.default:8000").unwrap().cluster,
            &second.cluster("web.default:8000").unwrap().cluster
        ));
    }

    #[test]
    fn a_service_resource_names_the_port_of_what_registers_behind_it() {
        let service = Service {
            name: name("web"),
            cluster_ips: vec![[10, 9, 8, 7].into()],
            ports: vec![crate::resources::ServicePort {
                name: "http".into(),
                port: 80,
                target: 8000,
                protocol: AppProtocol::Http,
            }],
        };
        let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[Resource::Service(service)]);
        assert_eq!(ask(&world, "10.9.8.7:80").unwrap(), "web.default:80");
        assert_eq!(world.cluster("web.default:80").unwrap().cluster.endpoints.len(), 1);
        assert_eq!(world.mesh.ranges.len(), 1);
    }

    #[test]
    fn the_most_specific_match_comes_first_and_missing_backends_are_empty_clusters() {
        let path = |path| Match { path: Some(path), ..Match::default() };
        let to = |service: &str| vec![RouteBackend { service: name(service), port: 8000, weight: 1 }];
        let route = Route {
            kind: "HTTPRoute",
            name: name("split"),
            parents: vec![Parent { service: name("web"), port: None }],
            rules: vec![
                RouteRule { matches: vec![path(PathMatch::Prefix("/a".into()))], backends: to("a") },
                RouteRule { matches: Vec::new(), backends: to("rest") },
                RouteRule { matches: vec![path(PathMatch::Exact("/a".into()))], backends: to("exact") },
            ],
        };
        let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[Resource::Route(route)]);
        let web = world.routes("web.default:8000").unwrap();
        let order: Vec<&str> = web.rules.iter().map(|r| &*r.backends[0].cluster).collect();
        assert_eq!(order, ["exact.default:8000", "a.default:8000", "rest.default:8000"]);
        assert!(web.clusters["a.default:8000"].endpoints.is_empty());
        assert_eq!(web.clusters.len(), 4);
    }
}
