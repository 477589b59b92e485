//! Deltas in, a graph out.
//!
//! An edge's key is (source identity, service:port, protocol). Both its ends report; the source's numbers are the
//! edge's, the destination's stand beside them. The reporter is whom its certificate says: a source's report is about
//! its own calls whatever it writes, and a destination's about services of its own namespace only.
//!
//! Everything a reporter can grow is bounded, and nothing it writes is shown unless it is made of a name's characters.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::window::{Side, Totals};
use super::{Edge, Figures, Graph, Node, NodeKind, Protocol, Reporter, Seen, buckets};
use crate::proto::v1::{self, EdgeDelta, EdgeReport};

#[cfg(test)]
mod tests;

/// Edges a merged graph keeps; further ones are merged into `other`.
pub const MAX_EDGES: usize = 20_000;
/// Edges one instance may report on: the 512 a proxy keeps, and room for those named `other`.
const MAX_EDGES_AN_INSTANCE: usize = 544;
/// Instances known at a time.
const MAX_INSTANCES: usize = 20_000;
/// Six reports missed.
const INSTANCE_GONE_AFTER: Duration = Duration::from_secs(30);
/// A stream that ends may be a certificate's rotation: the instance is back at once, or it has gone.
const BACK_WITHIN: Duration = Duration::from_secs(15);
/// How long an edge is shown after the last one who reported it has gone.
const EDGE_GONE_AFTER: Duration = Duration::from_secs(300);

const UNKNOWN: &str = "unknown";
const EXTERNAL: &str = "external";
const OTHER: &str = "other";

/// How deltas come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// As things happen: a proxy's own graph.
    Live,
    /// Every 5 s, about the 5 s before: a control plane's.
    Reported,
}

/// What is known of all edges. Times are given by the caller, counted from when the graph was made.
#[derive(Debug)]
pub struct MergedGraph {
    trust_domain: Arc<str>,
    scope: String,
    arrival: Arrival,
    edges: HashMap<Key, Merged>,
    instances: HashMap<(Arc<str>, Arc<str>), Instance>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// A SPIFFE id, `unknown` or `other`.
    source: Arc<str>,
    /// `web.default:8000`, `external` or `other`.
    destination: Arc<str>,
    protocol: Protocol,
}

#[derive(Debug, Default)]
struct Merged {
    source: Option<Side>,
    destination: Option<Side>,
    principal: Option<Arc<str>>,
    reporters: usize,
    orphaned_at: Option<Duration>,
}

#[derive(Debug, Default)]
struct Instance {
    last_report: Duration,
    left_at: Option<Duration>,
    /// Connections it has open, by edge: closed when it goes away.
    edges: HashMap<(Key, Reporter), u64>,
}

impl MergedGraph {
    /// An empty graph. `scope` is `mesh`, or the name of the one workload it is about.
    pub fn new(trust_domain: &str, scope: &str, arrival: Arrival) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            scope: scope.into(),
            arrival,
            edges: HashMap::new(),
            instances: HashMap::new(),
        }
    }

    /// Adds a report of the one whose certificate has `identity`.
    pub fn apply(&mut self, now: Duration, identity: &str, report: &EdgeReport) {
        let instance = if is_name(&report.instance) { report.instance.as_str() } else { "" };
        let reporter = (Arc::<str>::from(identity), Arc::<str>::from(instance));
        if !self.instances.contains_key(&reporter) && self.instances.len() >= MAX_INSTANCES {
            return;
        }
        let mut instance = self.instances.remove(&reporter).unwrap_or_default();
        instance.last_report = now;
        instance.left_at = None;
        for delta in report.deltas.iter().take(2 * MAX_EDGES_AN_INSTANCE) {
            self.add(now, &reporter.0, &mut instance, delta);
        }
        self.instances.insert(reporter, instance);
        self.forget(now);
    }

    /// The stream of an instance has ended: it is forgotten unless it reports again within 15 s.
    pub fn instance_gone(&mut self, now: Duration, identity: &str, instance: &str) {
        if let Some(instance) = self.instances.get_mut(&(identity.into(), instance.into())) {
            instance.left_at = Some(now);
        }
    }

    /// Forgets instances that have been silent for 30 s, and edges that nobody has reported for 5 min since.
    pub fn forget(&mut self, now: Duration) {
        if self.arrival == Arrival::Live {
            return;
        }
        let silent = |i: &Instance| {
            now.saturating_sub(i.last_report) > INSTANCE_GONE_AFTER
                || i.left_at.is_some_and(|at| now.saturating_sub(at) > BACK_WITHIN)
        };
        let gone: Vec<_> = self.instances.iter().filter(|(_, i)| silent(i)).map(|(k, _)| k.clone()).collect();
        for key in gone {
            if let Some(instance) = self.instances.remove(&key) {
                self.close(now, instance);
            }
        }
        self.edges.retain(|_, e| e.orphaned_at.is_none_or(|at| now.saturating_sub(at) < EDGE_GONE_AFTER));
    }

    fn close(&mut self, now: Duration, instance: Instance) {
        for ((key, reporter), open) in instance.edges {
            let Some(edge) = self.edges.get_mut(&key) else { continue };
            let side = match reporter {
                Reporter::Source => &mut edge.source,
                Reporter::Destination => &mut edge.destination,
            };
            if let Some(side) = side {
                side.since_start.closed = side.since_start.closed.saturating_add(open);
            }
            edge.reporters = edge.reporters.saturating_sub(1);
            if edge.reporters == 0 {
                edge.orphaned_at = Some(now);
            }
        }
    }

    fn add(&mut self, now: Duration, identity: &Arc<str>, instance: &mut Instance, delta: &EdgeDelta) {
        let Some(protocol) = Protocol::from_name(&delta.protocol) else { return };
        let reporter = match v1::Reporter::try_from(delta.reporter) {
            Ok(v1::Reporter::Source) => Reporter::Source,
            Ok(v1::Reporter::Destination) => Reporter::Destination,
            Ok(v1::Reporter::Unspecified) | Err(_) => return,
        };
        let destination = destination_of(&delta.destination);
        let source = match reporter {
            Reporter::Source => Arc::clone(identity),
            Reporter::Destination if !same_namespace(identity, destination) => return,
            Reporter::Destination if delta.source.is_empty() => UNKNOWN.into(),
            Reporter::Destination if is_identity(&delta.source) => delta.source.as_str().into(),
            Reporter::Destination => return,
        };
        let mut key = Key { source, destination: destination.into(), protocol };
        if !self.edges.contains_key(&key)
            && (self.edges.len() >= MAX_EDGES || instance.edges.len() >= MAX_EDGES_AN_INSTANCE)
        {
            key = Key { source: OTHER.into(), destination: OTHER.into(), protocol };
        }
        let edge = self.edges.entry(key.clone()).or_default();
        let principal = match reporter {
            Reporter::Source => Some(delta.destination_principal.as_str()).filter(|id| is_identity(id)),
            Reporter::Destination => Some(identity.as_ref()),
        };
        if let Some(principal) = principal
            && edge.principal.as_deref() != Some(principal)
        {
            edge.principal = Some(principal.into());
        }
        let open = instance.edges.entry((key, reporter)).or_insert_with(|| {
            edge.reporters += 1;
            edge.orphaned_at = None;
            0
        });
        let totals = totals_of(delta);
        *open = open.saturating_add(totals.opened).saturating_sub(totals.closed);
        let side = match reporter {
            Reporter::Source => &mut edge.source,
            Reporter::Destination => &mut edge.destination,
        };
        side.get_or_insert_default().add(now, &totals, delta.mtls);
    }

    /// The graph as it is now.
    pub fn snapshot(&self, now: Duration) -> Graph {
        let names = self.names();
        let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
        let mut note = |id: String, identity: Option<&str>| -> String {
            let node = nodes.entry(id.clone()).or_insert_with(|| Node { kind: kind_of(&id), id, identity: None });
            if let Some(identity) = identity.filter(|id| is_identity(id)) {
                node.identity.get_or_insert_with(|| identity.to_string());
            }
            node.id.clone()
        };
        let mut edges = Vec::with_capacity(self.edges.len());
        for (key, merged) in &self.edges {
            let Some((reporter, main)) = merged.main() else { continue };
            let source = note(self.name(&key.source, &names), Some(&key.source));
            let (service, port) = split_port(&key.destination);
            let destination = note(service.to_string(), merged.principal.as_deref());
            let (last_minute, since_start) = self.figures(main, key.protocol, now);
            let beside = merged.destination.as_ref().filter(|_| reporter == Reporter::Source);
            edges.push(Edge {
                source,
                destination,
                port,
                protocol: key.protocol,
                mtls: main.mtls(now),
                reporter,
                open_connections: main.since_start.opened.saturating_sub(main.since_start.closed),
                last_minute,
                since_start,
                at_destination: beside.map(|side| {
                    let (last_minute, since_start) = self.figures(side, key.protocol, now);
                    Seen { last_minute, since_start }
                }),
            });
        }
        edges.sort_by(|a, b| {
            (&a.source, &a.destination, a.port, a.protocol).cmp(&(&b.source, &b.destination, b.port, b.protocol))
        });
        Graph {
            scope: self.scope.clone(),
            uptime_seconds: (now.as_secs_f64() * 1000.0).round() / 1000.0,
            nodes: nodes.into_values().collect(),
            edges,
        }
    }

    fn figures(&self, side: &Side, protocol: Protocol, now: Duration) -> (Figures, Figures) {
        let (totals, over) = match self.arrival {
            Arrival::Live => side.last_minute_live(now),
            Arrival::Reported => side.last_minute_reported(now),
        };
        (totals.figures(protocol, over), side.since_start.figures(protocol, now))
    }

    /// Identities that serve exactly one service are shown under its name, so that a workload whose account is called
    /// otherwise is one node, not two.
    fn names(&self) -> HashMap<&str, &str> {
        let mut services: HashMap<&str, HashSet<&str>> = HashMap::new();
        for (key, merged) in &self.edges {
            let (service, port) = split_port(&key.destination);
            if let (Some(principal), Some(_)) = (merged.principal.as_deref(), port) {
                services.entry(principal).or_default().insert(service);
            }
        }
        services
            .into_iter()
            .filter(|(_, s)| s.len() == 1)
            .filter_map(|(id, s)| Some((id, s.into_iter().next()?)))
            .collect()
    }

    fn name(&self, identity: &str, names: &HashMap<&str, &str>) -> String {
        if let Some(service) = names.get(identity) {
            return (*service).to_string();
        }
        match workload(identity) {
            Some((domain, namespace, account)) if *domain == *self.trust_domain => format!("{account}.{namespace}"),
            Some((domain, namespace, account)) => format!("{account}.{namespace}.{domain}"),
            None => identity.to_string(),
        }
    }
}

impl Merged {
    fn main(&self) -> Option<(Reporter, &Side)> {
        let source = self.source.as_ref().map(|side| (Reporter::Source, side));
        source.or(self.destination.as_ref().map(|side| (Reporter::Destination, side)))
    }
}

fn totals_of(delta: &EdgeDelta) -> Totals {
    let mut totals = Totals::default();
    let mut latency: Vec<(u16, u64)> = delta
        .latency
        .iter()
        .take(buckets::COUNT)
        .filter(|b| b.count > 0 && (b.bucket as usize) < buckets::COUNT)
        .map(|b| (b.bucket as u16, b.count))
        .collect();
    latency.sort_unstable();
    totals.add(&Totals {
        requests: delta.requests,
        errors: delta.errors,
        bytes_sent: delta.bytes_sent,
        bytes_received: delta.bytes_received,
        opened: delta.connections_opened,
        closed: delta.connections_closed,
        latency,
    });
    totals
}

/// `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT` in its three parts.
fn workload(identity: &str) -> Option<(&str, &str, &str)> {
    let mut parts = identity.strip_prefix("spiffe://")?.split('/');
    let found = match (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?) {
        (domain, "ns", namespace, "sa", account) => (domain, namespace, account),
        _ => return None,
    };
    parts.next().is_none().then_some(found)
}

fn is_identity(text: &str) -> bool {
    text.len() <= 2048 && text.strip_prefix("spiffe://").is_some_and(|rest| rest.split('/').all(is_name))
}

/// Characters of DNS names, SPIFFE path segments and addresses, and not too many.
fn is_name(text: &str) -> bool {
    (1..=300).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':'))
}

/// A service port as it is; whatever else is called is outside the mesh.
fn destination_of(text: &str) -> &str {
    match split_port(text) {
        (OTHER, None) => OTHER,
        (service, Some(_)) if is_name(service) && service.contains('.') && !service.contains(':') => {
            // An address and a port is no service.
            if service.parse::<std::net::IpAddr>().is_ok() { EXTERNAL } else { text }
        }
        _ => EXTERNAL,
    }
}

fn split_port(destination: &str) -> (&str, Option<u16>) {
    match destination.rsplit_once(':').map(|(service, port)| (service, port.parse())) {
        Some((service, Ok(port))) => (service, Some(port)),
        _ => (destination, None),
    }
}

fn same_namespace(identity: &str, destination: &str) -> bool {
    let of_service = split_port(destination).0.rsplit_once('.').map(|(_, namespace)| namespace);
    destination == OTHER || workload(identity).is_some_and(|(_, namespace, _)| Some(namespace) == of_service)
}

fn kind_of(id: &str) -> NodeKind {
    match id {
        UNKNOWN => NodeKind::Unknown,
        EXTERNAL => NodeKind::External,
        OTHER => NodeKind::Other,
        _ => NodeKind::Service,
    }
}
