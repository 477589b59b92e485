//! Graphs of several proxies put together, where there is no control plane to ask.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::{Edge, Figures, Graph, Node, Reporter, Seen};

impl Graph {
    /// One graph of several proxies' own. Two instances of a caller add up; of their latencies the larger is shown.
    /// What both ends of an edge say is never added: the source's is the edge's, the destination's stands beside it.
    pub fn union(graphs: Vec<Self>) -> Self {
        let uptime_seconds = graphs.iter().map(|g| g.uptime_seconds).fold(0.0, f64::max);
        let scopes: Vec<String> = graphs.iter().map(|g| g.scope.clone()).collect();
        let mut nodes: BTreeMap<String, Node> = BTreeMap::new();
        let mut edges = BTreeMap::new();
        for graph in graphs {
            for node in graph.nodes {
                let known = nodes.entry(node.id.clone()).or_insert_with(|| node.clone());
                known.identity = known.identity.take().or(node.identity);
            }
            for edge in graph.edges {
                let key = (edge.source.clone(), edge.destination.clone(), edge.port, edge.protocol);
                match edges.entry(key) {
                    Entry::Vacant(free) => drop(free.insert(edge)),
                    Entry::Occupied(mut known) => known.get_mut().join(edge),
                }
            }
        }
        let scope = scopes.join(", ");
        Self { scope, uptime_seconds, nodes: nodes.into_values().collect(), edges: edges.into_values().collect() }
    }
}

impl Edge {
    fn join(&mut self, mut other: Self) {
        if self.reporter == Reporter::Destination && other.reporter == Reporter::Source {
            std::mem::swap(self, &mut other);
        }
        if self.reporter == other.reporter {
            self.mtls &= other.mtls;
            self.open_connections = self.open_connections.saturating_add(other.open_connections);
            self.last_minute.add(&other.last_minute);
            self.since_start.add(&other.since_start);
        }
        let beside = match (self.reporter, other.reporter) {
            (Reporter::Source, Reporter::Destination) => {
                Some(Seen { last_minute: other.last_minute, since_start: other.since_start })
            }
            _ => other.at_destination,
        };
        match (&mut self.at_destination, beside) {
            (Some(seen), Some(more)) => {
                seen.last_minute.add(&more.last_minute);
                seen.since_start.add(&more.since_start);
            }
            (none @ None, Some(more)) => *none = Some(more),
            (_, None) => {}
        }
    }
}

impl Figures {
    fn add(&mut self, other: &Self) {
        let events = |f: &Self| if f.requests > 0 { f.requests } else { f.connections } as f64;
        let (mine, others) = (events(self), events(other));
        if mine + others > 0.0 {
            self.error_rate = (self.error_rate * mine + other.error_rate * others) / (mine + others);
        }
        self.seconds = self.seconds.max(other.seconds);
        self.requests = self.requests.saturating_add(other.requests);
        self.connections = self.connections.saturating_add(other.connections);
        self.errors = self.errors.saturating_add(other.errors);
        self.rate += other.rate;
        let larger = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (one, None) | (None, one) => one,
        };
        self.p50_ms = larger(self.p50_ms, other.p50_ms);
        self.p90_ms = larger(self.p90_ms, other.p90_ms);
        self.p99_ms = larger(self.p99_ms, other.p99_ms);
        self.bytes_sent = self.bytes_sent.saturating_add(other.bytes_sent);
        self.bytes_received = self.bytes_received.saturating_add(other.bytes_received);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Protocol;

    fn graph(reporter: Reporter, requests: u64, p99: f64) -> Graph {
        let figures = Figures { requests, rate: requests as f64, p99_ms: Some(p99), ..Figures::default() };
        let edge = Edge {
            source: "web.default".into(),
            destination: "cart.default".into(),
            port: Some(80),
            protocol: Protocol::Http,
            mtls: true,
            reporter,
            open_connections: 0,
            last_minute: figures.clone(),
            since_start: figures,
            at_destination: None,
        };
        Graph { scope: "x".into(), uptime_seconds: 1.0, nodes: Vec::new(), edges: vec![edge] }
    }

    #[test]
    fn instances_add_up_and_ends_do_not() {
        let (source, destination) = (Reporter::Source, Reporter::Destination);
        let together = Graph::union(vec![graph(destination, 14, 3.0), graph(source, 10, 2.0), graph(source, 5, 9.0)]);
        let [edge] = together.edges.as_slice() else { panic!("{together:?}") };
        assert_eq!((edge.reporter, edge.last_minute.requests, edge.last_minute.rate), (source, 15, 15.0));
        assert_eq!(edge.last_minute.p99_ms, Some(9.0));
        assert_eq!(edge.at_destination.as_ref().map(|seen| seen.since_start.requests), Some(14));
    }
}
