//! The mesh as it stands: registrations and resources put together, indexed for answers. PURE: built, then only read.
//!
//! A new world is built whole whenever anything changed. Destinations and clusters that did not change keep their
//! `Arc`, so that a stream sees by a pointer's comparison what it need not send again.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use sheetbend_control_plane_client::model::{
    AppProtocol, Cluster, ClusterName, ConnectionRule, Destination, Endpoint, InboundPolicy, Mesh, ServiceName,
    ServicePort, Target,
};

use self::inbound::Inbound;
pub(crate) use self::parts::Parts;
use self::parts::clusters;
use crate::registry::Registered;
use crate::resources::Resource;

mod connections;
mod inbound;
mod parts;
#[cfg(test)]
mod tests;

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
    /// Hosts outside the mesh that services stand for; of several, the first by name.
    external: HashMap<Target, ServicePort>,
    trust_domain: Arc<str>,
    /// What holds for those who call.
    inbound: Inbound,
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
            inbound: Inbound::build(&parts, &ports, &former.inbound),
            ..World::default()
        };
        for (host, name) in ports.keys().filter_map(|name| Some((parts.external(name)?, name))) {
            world.external.entry(host).or_insert_with(|| name.clone());
        }
        let owners = parts.owners(inputs);
        for (name, port) in &ports {
            let (rules, connections) = (parts.rules(name), parts.connections(name));
            let default_cluster: ClusterName = name.to_string().into();
            let mut named: BTreeMap<ClusterName, Arc<Cluster>> = BTreeMap::new();
            let wanted = rules.iter().flat_map(|rule| rule.backends.iter().map(|b| &b.cluster));
            let of_connections = connections.iter().flat_map(|rule| rule.backends.iter().map(|b| &b.cluster));
            for wanted in wanted.chain(of_connections).chain([&default_cluster]) {
                if let Some(entry) = clusters.get(wanted) {
                    named.insert(wanted.clone(), entry.cluster.clone());
                }
            }
            let destination = Destination {
                name: name.clone(),
                trust_domain: inputs.trust_domain.clone(),
                protocol: protocol(port.protocol, &connections),
                rules,
                connections,
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
            None => self.resolve_name(target.host(), target.port(), namespace).or_else(|| {
                let name = self.external.get(target)?;
                self.destinations.get(name).cloned()
            }),
        }
    }

    fn resolve_address(&self, address: SocketAddr) -> Option<Arc<Destination>> {
        if let Some(name) = self.virtual_addresses.get(&address) {
            return self.destinations.get(name).cloned();
        }
        let (name, endpoint) = self.endpoints.get(&address)?;
        let whole = self.destinations.get(name)?;
        // Who calls one instance by its address means that one, as clients of StatefulSets do.
        let policy = whole.clusters.get(&whole.default_cluster).map(|whole| whole.policy.clone());
        let cluster = Cluster { policy: policy.unwrap_or_default(), ..pinned_cluster(name, endpoint) };
        Some(Arc::new(Destination {
            rules: Vec::new(),
            connections: Vec::new(),
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

    /// What holds for those who call a service.
    pub(crate) fn inbound(&self, service: &ServiceName) -> Arc<InboundPolicy> {
        self.inbound.of(service)
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

/// What a port speaks: where its connections are routed as a whole, nobody looks into them.
fn protocol(said: AppProtocol, connections: &[ConnectionRule]) -> AppProtocol {
    match connections.first() {
        Some(rule) if rule.hostname.is_some() => AppProtocol::Tls,
        Some(_) => AppProtocol::Tcp,
        None => said,
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
    Cluster {
        name: cluster,
        service: name.clone(),
        endpoints: vec![endpoint.clone()],
        external: None,
        policy: Arc::default(),
    }
}

fn reuse<T: PartialEq>(new: T, former: Option<&Arc<T>>) -> Arc<T> {
    match former {
        Some(former) if **former == new => former.clone(),
        _ => Arc::new(new),
    }
}
