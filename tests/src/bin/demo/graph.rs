//! The merged graph, and what the demo expects of it.

use serde_json::Value;

/// Source, destination and protocol of each edge that the shop makes.
const EXPECTED: [(&str, &str, &str); 6] = [
    ("customers", "frontend", "http"),
    ("frontend", "cart", "http"),
    ("frontend", "catalog", "grpc"),
    ("catalog", "stock", "tcp"),
    ("cart", "stock", "tcp"),
    ("cart", "pay", "http2"),
];

/// A graph as JSON.
#[derive(Default)]
pub(crate) struct Graph {
    document: Value,
}

impl Graph {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map(|document| Self { document }).map_err(|e| format!("not a graph: {e}: {text}"))
    }

    /// The document on one line.
    pub(crate) fn json(&self) -> String {
        self.document.to_string()
    }

    /// What should be there and is not, in words.
    pub(crate) fn missing(&self) -> Vec<String> {
        let none = Vec::new();
        let edges = self.document["edges"].as_array().unwrap_or(&none);
        let mut missing = Vec::new();
        for (source, destination, protocol) in EXPECTED {
            let edge = edges.iter().find(|edge| {
                is(&edge["source"], source) && is(&edge["destination"], destination) && edge["protocol"] == protocol
            });
            match edge {
                None => missing.push(format!("missing: {source} → {destination} over {protocol}")),
                Some(edge) if edge["mtls"] != true => {
                    missing.push(format!("without mutual TLS: {source} → {destination} over {protocol}"));
                }
                Some(_) => {}
            }
        }
        missing
    }
}

/// Whether a node's id, `web.default` or `web.default:8000`, is that of a service.
fn is(id: &Value, service: &str) -> bool {
    id.as_str().and_then(|id| id.strip_prefix(service)).is_some_and(|rest| rest.starts_with('.'))
}
