//! The service graph as an operator reads it: JSON from an admin port.

use std::net::SocketAddr;

use serde_json::Value;

/// An edge of the graph, with what stories look at.
#[derive(Clone, Debug)]
pub struct Edge {
    /// The caller, `web.default`.
    pub source: String,
    /// Who is called, `web.default` or `web.default:8000`.
    pub destination: String,
    /// `http`, `http2`, `grpc` or `tcp`.
    pub protocol: String,
    /// Whether mutual TLS holds.
    pub mtls: bool,
    /// Requests (or connections) since the start.
    pub requests: u64,
    /// Failed ones since the start.
    pub errors: u64,
    /// All that was said about it.
    pub json: Value,
}

impl Edge {
    /// Whether it is the edge between these two services (of the namespace `default`) over that protocol.
    pub fn is(&self, source: &str, destination: &str, protocol: &str) -> bool {
        let named = |id: &str, service: &str| id.strip_prefix(service).is_some_and(|rest| rest.starts_with(".default"));
        named(&self.source, source) && named(&self.destination, destination) && self.protocol == protocol
    }

    fn read(json: &Value) -> Self {
        let text = |key: &str| json[key].as_str().unwrap_or_default().to_string();
        let number = |key: &str| json["since_start"][key].as_u64().unwrap_or_default();
        Self {
            source: text("source"),
            destination: text("destination"),
            protocol: text("protocol"),
            mtls: json["mtls"] == true,
            requests: if text("protocol") == "tcp" { number("connections") } else { number("requests") },
            errors: number("errors"),
            json: json.clone(),
        }
    }
}

/// The edges that the graph of an admin port has.
pub async fn edges(admin: SocketAddr) -> Vec<Edge> {
    let answer = crate::http::get(admin, "/graph?format=json").await;
    read_edges(&answer.unwrap_or_else(|e| panic!("the graph of {admin}: {e}")).json())
}

/// The edges of a graph as an admin port gives it.
pub fn read_edges(graph: &Value) -> Vec<Edge> {
    graph["edges"].as_array().map(|edges| edges.iter().map(Edge::read).collect()).unwrap_or_default()
}
