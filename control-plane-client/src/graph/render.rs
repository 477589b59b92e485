//! A graph as text: JSON, DOT, Mermaid, and a table for terminals.

use std::collections::HashMap;
use std::fmt::Write;

use super::{Edge, Graph, NodeKind, Protocol};

/// The graph as JSON, indented; its schema is [`Graph`].
pub fn json(graph: &Graph) -> String {
    // Plain data with text keys: there is nothing in it that JSON cannot hold.
    serde_json::to_string_pretty(graph).unwrap_or_default()
}

/// The graph for Graphviz.
pub fn dot(graph: &Graph) -> String {
    let mut out = String::from(
        "digraph mesh {\n  rankdir=LR;\n  node [shape=box, style=rounded, fontname=\"sans-serif\"];\n  \
         edge [fontname=\"sans-serif\", fontsize=10];\n",
    );
    for node in &graph.nodes {
        let shape = if node.kind == NodeKind::Service { "" } else { " [style=\"rounded,dashed\"]" };
        let _ = writeln!(out, "  \"{}\"{shape};", quoted(&node.id));
    }
    for edge in &graph.edges {
        let color = if edge.last_minute.errors > 0 { ", color=\"#c62828\"" } else { "" };
        let style = if edge.mtls { "solid" } else { "dashed" };
        let (from, to, label) = (quoted(&edge.source), quoted(&edge.destination), quoted(&label(edge)));
        let _ = writeln!(out, "  \"{from}\" -> \"{to}\" [label=\"{label}\", style={style}{color}];");
    }
    out.push_str("}\n");
    out
}

/// The graph for Mermaid.
pub fn mermaid(graph: &Graph) -> String {
    let mut out = String::from("flowchart LR\n");
    let ids: HashMap<&str, usize> = graph.nodes.iter().enumerate().map(|(i, n)| (n.id.as_str(), i)).collect();
    for (i, node) in graph.nodes.iter().enumerate() {
        let _ = writeln!(out, "  n{i}[\"{}\"]", entities(&node.id));
    }
    for edge in &graph.edges {
        let (Some(from), Some(to)) = (ids.get(edge.source.as_str()), ids.get(edge.destination.as_str())) else {
            continue;
        };
        let arrow = if edge.mtls { "-->" } else { "-.->" };
        let _ = writeln!(out, "  n{from} {arrow}|\"{}\"| n{to}", entities(&label(edge)));
    }
    out
}

/// `http · 12.3/s · 0.5 % errors · p99 4.2 ms · mTLS`.
fn label(edge: &Edge) -> String {
    let figures = &edge.last_minute;
    let mut label = format!("{} · {}", edge.protocol.as_str(), rate(edge));
    if figures.errors > 0 {
        let _ = write!(label, " · {} errors", percent(figures.error_rate));
    }
    if let Some(p99) = figures.p99_ms {
        let _ = write!(label, " · p99 {}", millis(p99));
    }
    label.push_str(if edge.mtls { " · mTLS" } else { " · plain" });
    label
}

fn quoted(text: &str) -> String {
    clean(text).replace('\\', "\\\\").replace('"', "\\\"")
}

fn entities(text: &str) -> String {
    clean(text).replace('#', "#35;").replace('"', "#quot;").replace('<', "#lt;").replace('>', "#gt;")
}

/// No control character reaches a terminal or ends a line.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The graph as a table of `width` columns at most: the least important columns go first, then names are cut.
/// Ends with a new line.
pub fn table(graph: &Graph, width: usize) -> String {
    if graph.edges.is_empty() {
        return "No traffic yet.\n".to_string();
    }
    let mut columns = columns(graph);
    let total = |columns: &[Column]| columns.iter().map(|c| c.width() + 2).sum::<usize>().saturating_sub(2);
    while total(&columns) > width
        && let Some(least) = columns.iter().map(|c| c.keep).min().filter(|keep| *keep < ALWAYS)
    {
        columns.retain(|c| c.keep > least);
    }
    let over = total(&columns).saturating_sub(width);
    if over > 0 {
        cut_names(&mut columns, over);
    }
    let rows = columns.iter().map(|c| c.cells.len()).max().unwrap_or(0);
    let mut out = String::new();
    for row in 0..=rows {
        let mut line = String::new();
        for column in &columns {
            let cell = match row.checked_sub(1) {
                None => column.title,
                Some(n) => column.cells.get(n).map_or("", String::as_str),
            };
            let pad = " ".repeat(column.width().saturating_sub(cell.chars().count()));
            match column.left {
                true => line.extend([cell, &pad, "  "]),
                false => line.extend([&pad, cell, "  "]),
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// A column with this much importance is never left out.
const ALWAYS: u8 = 9;

struct Column {
    title: &'static str,
    keep: u8,
    left: bool,
    cells: Vec<String>,
}

impl Column {
    fn width(&self) -> usize {
        self.cells.iter().map(|c| c.chars().count()).chain([self.title.len()]).max().unwrap_or(0)
    }
}

fn columns(graph: &Graph) -> Vec<Column> {
    let column = |title, keep, left, cell: &dyn Fn(&Edge) -> String| Column {
        title,
        keep,
        left,
        cells: graph.edges.iter().map(cell).collect(),
    };
    let quantile = |q: Option<f64>| q.map_or_else(|| "-".to_string(), millis);
    let to =
        |e: &Edge| e.port.map_or_else(|| clean(&e.destination), |port| format!("{}:{port}", clean(&e.destination)));
    vec![
        column("SOURCE", ALWAYS, true, &|e| clean(&e.source)),
        column("DESTINATION", ALWAYS, true, &to),
        column("PROTOCOL", 6, true, &|e| e.protocol.as_str().to_string()),
        column("MTLS", 7, true, &|e| if e.mtls { "yes" } else { "no" }.to_string()),
        column("RATE", ALWAYS, false, &rate),
        column("ERRORS", 8, false, &|e| percent(e.last_minute.error_rate)),
        column("P50", 3, false, &|e| quantile(e.last_minute.p50_ms)),
        column("P90", 2, false, &|e| quantile(e.last_minute.p90_ms)),
        column("P99", 5, false, &|e| quantile(e.last_minute.p99_ms)),
        column("SENT", 1, false, &|e| size(e.last_minute.bytes_sent)),
        column("RECEIVED", 1, false, &|e| size(e.last_minute.bytes_received)),
        column("TOTAL", 4, false, &|e| match e.protocol {
            Protocol::Tcp => e.since_start.connections.to_string(),
            _ => e.since_start.requests.to_string(),
        }),
    ]
}

fn cut_names(columns: &mut [Column], mut over: usize) {
    for column in columns.iter_mut().filter(|c| c.left && c.keep == ALWAYS) {
        let wide = column.width();
        let limit = wide.saturating_sub(over).max(12);
        for cell in &mut column.cells {
            if cell.chars().count() > limit {
                *cell = cell.chars().take(limit - 1).chain(['…']).collect();
            }
        }
        over = over.saturating_sub(wide.saturating_sub(column.width()));
    }
}

/// `12.3/s`; connections for opaque TCP.
fn rate(edge: &Edge) -> String {
    let rate = edge.last_minute.rate;
    let unit = if edge.protocol == Protocol::Tcp { " conn/s" } else { "/s" };
    match rate {
        0.0 => format!("0{unit}"),
        r if r < 0.1 => format!("<0.1{unit}"),
        r if r < 100.0 => format!("{r:.1}{unit}"),
        r => format!("{r:.0}{unit}"),
    }
}

fn percent(part: f64) -> String {
    match part * 100.0 {
        0.0 => "0 %".to_string(),
        p if p < 0.1 => "<0.1 %".to_string(),
        p if p < 10.0 => format!("{p:.1} %"),
        p => format!("{p:.0} %"),
    }
}

fn millis(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1000.0),
    }
}

fn size(bytes: u64) -> String {
    let mut scaled = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if scaled < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{scaled:.1} {unit}") };
        }
        scaled /= 1024.0;
    }
    format!("{scaled:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Figures, Node, Reporter};

    fn edge(source: &str, destination: &str, protocol: Protocol, mtls: bool) -> Edge {
        let figures = Figures {
            seconds: 60.0,
            requests: 750,
            errors: 3,
            rate: 12.5,
            error_rate: 0.004,
            p50_ms: Some(1.2),
            p90_ms: Some(3.4),
            p99_ms: Some(45.6),
            bytes_sent: 2048,
            bytes_received: 3 << 20,
            connections: 0,
        };
        Edge {
            source: source.into(),
            destination: destination.into(),
            port: Some(80),
            protocol,
            mtls,
            reporter: Reporter::Source,
            open_connections: 0,
            last_minute: figures.clone(),
            since_start: figures,
            at_destination: None,
        }
    }

    fn shop() -> Graph {
        let node = |id: &str| Node { id: id.into(), kind: NodeKind::Service, identity: None };
        Graph {
            scope: "mesh".into(),
            uptime_seconds: 60.0,
            nodes: vec![node("cart.default"), node("web.default")],
            edges: vec![edge("web.default", "cart.default", Protocol::Http, true)],
        }
    }

    #[test]
    fn the_json_has_nodes_and_edges_under_their_stable_names() {
        let value: serde_json::Value = serde_json::from_str(&json(&shop())).unwrap();
        assert_eq!(value["nodes"][1]["id"], "web.default");
        let edge = &value["edges"][0];
        assert_eq!(edge["source"], "web.default");
        assert_eq!(edge["destination"], "cart.default");
        assert_eq!((&edge["protocol"], &edge["mtls"]), (&"http".into(), &true.into()));
        for period in ["last_minute", "since_start"] {
            for field in ["requests", "errors", "rate", "error_rate", "p50_ms", "p90_ms", "p99_ms", "bytes_sent"] {
                assert!(edge[period][field].is_number(), "{period}.{field}");
            }
        }
    }

    #[test]
    fn dot_and_mermaid_quote_what_could_end_a_label() {
        let mut graph = shop();
        graph.nodes[0].id = "a\"]\n<b>".into();
        assert!(dot(&graph).contains("\"a\\\"]\u{fffd}<b>\";"));
        assert!(mermaid(&graph).contains("[\"a#quot;]\u{fffd}#lt;b#gt;\"]"));
        assert!(mermaid(&shop()).contains("n1 -->|\"http · 12.5/s · 0.4 % errors · p99 46 ms · mTLS\"| n0"));
    }

    #[test]
    fn a_table_fits_the_terminal_by_leaving_out_what_matters_least() {
        let wide = table(&shop(), 200);
        assert_eq!(
            wide.lines().next().unwrap().split_whitespace().collect::<Vec<_>>(),
            [
                "SOURCE",
                "DESTINATION",
                "PROTOCOL",
                "MTLS",
                "RATE",
                "ERRORS",
                "P50",
                "P90",
                "P99",
                "SENT",
                "RECEIVED",
                "TOTAL"
            ],
        );
        assert!(wide.contains("web.default  cart.default:80  http      yes   12.5/s   0.4 %"), "{wide}");
        for width in [40, 60, 80, 100] {
            let table = table(&shop(), width);
            assert!(table.lines().all(|l| l.chars().count() <= width), "at {width}:\n{table}");
            assert!(table.contains("12.5/s"), "at {width}:\n{table}");
        }
    }
}
