//! What a proxy says about the traffic it carries: metrics, its part of the service graph, the access log.
//!
//! [`Telemetry`] is one per process. Whoever carries traffic asks it once a connection or endpoint for an [`Edge`],
//! and then tells the edge how each request ended. Everything that reads (the admin port, the report to the control
//! plane) does so off the way of requests.
//!
//! Everything is bounded: 512 edges, 2,000 time series, 4,096 waiting access log lines. What does not fit is counted
//! as such, never dropped silently, and no label can be chosen by a stranger.

mod access_log;
mod counters;
mod edge;
pub mod explain;
mod flags;
mod labels;
mod local_graph;
mod process;
mod series;
mod sparingly;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::graph::{Arrival, Graph, MergedGraph};
use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_control_plane_client::proto::v1::{EdgeDelta, EdgeReport};

use crate::detect::Detected;
use crate::first_bytes::FirstBytes;

pub use access_log::{AccessEntry, AccessLog, AccessLogFormat, AccessLogOutput, AccessLogSettings};
pub use counters::{Counter, Gauge};
pub use edge::{ConnectionGuard, Edge, EdgeKey, Outcome, Peer, Protocol, Reporter};
use explain::Explained;
pub use flags::{Flags, Words};
use local_graph::Cursors;
use series::Series;
use sparingly::Sparingly;

/// Edges a proxy keeps; traffic on any further one counts on an edge named `other`.
pub const MAX_EDGES: usize = 512;

/// Who this proxy is, and how it logs.
#[derive(Debug)]
pub struct Settings {
    /// The workload's own identity.
    pub identity: SpiffeId,
    /// The workload's own service, `web.default`.
    pub service: ServiceName,
    /// The access log.
    pub access_log: AccessLogSettings,
}

/// A kind of log line that strangers can cause. There are as many as the code has.
#[derive(PartialEq, Eq, Hash)]
enum Line {
    Refused(Counter),
    Other(&'static str),
}

/// Everything this process counts. Shared by all its threads.
pub struct Telemetry {
    identity: SpiffeId,
    service: ServiceName,
    edges: Mutex<HashMap<EdgeKey, Arc<Edge>>>,
    counters: Vec<metrics::Counter>,
    /// What strangers can cause to be logged. Locked for such lines alone.
    lines: Mutex<HashMap<Line, Sparingly>>,
    gauges: Vec<metrics::Gauge>,
    prometheus: PrometheusHandle,
    series: Arc<Series>,
    access_log: AccessLog,
    explained: Explained,
    started: Instant,
    graph: Mutex<OwnGraph>,
    reported: Mutex<Cursors>,
}

/// The graph of this proxy alone.
struct OwnGraph {
    merged: MergedGraph,
    read: Cursors,
}

impl Telemetry {
    /// Starts counting. The access log's writer thread ends when the last handle is dropped.
    pub fn new(settings: Settings) -> Arc<Self> {
        let recorder = PrometheusBuilder::new().build_recorder();
        let counters: Vec<_> = Counter::ALL.iter().map(|c| c.register(&recorder)).collect();
        let gauges = Gauge::ALL.iter().map(|g| g.register(&recorder)).collect();
        let dropped = counters[Counter::AccessLogDropped as usize].clone();
        let overflowed = counters[Counter::SeriesOverflowed as usize].clone();
        let prometheus = recorder.handle();
        let series = Arc::new(Series::new(recorder, Counter::ALL.len() + Gauge::ALL.len(), overflowed));
        let trust_domain = settings.identity.trust_domain();
        let scope = settings.service.to_string();
        let merged = MergedGraph::new(trust_domain.as_str(), &scope, Arrival::Live);
        let telemetry = Self {
            identity: settings.identity,
            service: settings.service,
            edges: Mutex::default(),
            counters,
            lines: Mutex::default(),
            gauges,
            prometheus,
            series,
            access_log: AccessLog::new(settings.access_log, dropped),
            explained: Explained::default(),
            started: Instant::now(),
            graph: Mutex::new(OwnGraph { merged, read: Cursors::default() }),
            reported: Mutex::default(),
        };
        telemetry.gauge_set(Gauge::StartTime, process::unix_time_now());
        Arc::new(telemetry)
    }

    /// The edge with this key, made if it is new. Asked for once a connection or endpoint, not once a request.
    pub fn edge(&self, key: EdgeKey) -> Arc<Edge> {
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(edge) = edges.get(&key) {
            return Arc::clone(edge);
        }
        let key = if edges.len() < MAX_EDGES {
            key
        } else {
            self.count(Counter::EdgesOverflowed);
            EdgeKey { peer: Peer::Unknown, destination: "other".into(), ..key }
        };
        let new = || Arc::new(Edge::new(key.clone(), &self.identity, Arc::clone(&self.series)));
        Arc::clone(edges.entry(key.clone()).or_insert_with(new))
    }

    fn all_edges(&self) -> Vec<Arc<Edge>> {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The access log.
    pub fn access_log(&self) -> &AccessLog {
        &self.access_log
    }

    /// Why requests went the way they did.
    pub fn explained(&self) -> &Explained {
        &self.explained
    }

    /// Counts one event.
    pub fn count(&self, counter: Counter) {
        self.count_by(counter, 1);
    }

    /// A counter for whoever counts after this has gone out of reach.
    pub fn handle(&self, counter: Counter) -> metrics::Counter {
        self.counters.get(counter as usize).cloned().unwrap_or_else(metrics::Counter::noop)
    }

    /// Counts a refusal, and says whether to log it: `Some` of how many of its kind were left out since the last line.
    pub fn refused(&self, reason: Counter) -> Option<u64> {
        self.count(reason);
        self.said(Line::Refused(reason))
    }

    /// Whether to log a line that others can cause: `Some` of how many of its kind were left out since the last.
    pub fn sparingly(&self, line: &'static str) -> Option<u64> {
        self.said(Line::Other(line))
    }

    fn said(&self, line: Line) -> Option<u64> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.entry(line).or_default().at(self.started.elapsed())
    }

    /// Counts `n` events.
    pub fn count_by(&self, counter: Counter, n: u64) {
        if let Some(counter) = self.counters.get(counter as usize) {
            counter.increment(n);
        }
    }

    /// Counts what a connection's first bytes were.
    pub fn detected(&self, first: FirstBytes) {
        self.count(match first {
            FirstBytes::Detected(Detected::Http1) => Counter::DetectedHttp1,
            FirstBytes::Detected(Detected::Http2) => Counter::DetectedHttp2,
            FirstBytes::Detected(Detected::Tls) => Counter::DetectedTls,
            FirstBytes::Detected(Detected::Opaque | Detected::NeedMore) => Counter::DetectedOpaque,
            FirstBytes::ServerFirst | FirstBytes::Closed => Counter::DetectedSilent,
        });
    }

    /// Takes over a count that is kept elsewhere.
    pub fn count_is(&self, counter: Counter, total: u64) {
        if let Some(counter) = self.counters.get(counter as usize) {
            counter.absolute(total);
        }
    }

    /// Sets a level.
    pub fn gauge_set(&self, gauge: Gauge, to: f64) {
        if let Some(gauge) = self.gauges.get(gauge as usize) {
            gauge.set(to);
        }
    }

    /// What happened on every edge since this was asked last, for the report to the control plane every 5 s.
    pub fn take_deltas(&self) -> Vec<EdgeDelta> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner).advance(&self.all_edges())
    }

    /// This proxy's own graph.
    pub fn graph(&self) -> Graph {
        let now = self.started.elapsed();
        let mut own = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        let deltas = own.read.advance(&self.all_edges());
        own.merged.apply(now, self.identity.as_str(), &EdgeReport { deltas, instance: String::new() });
        own.merged.snapshot(now)
    }

    /// Files what was counted under the time at which it happened. The admin server calls this every 5 s, so that the
    /// last minute is the last minute even when nobody looks at the graph.
    pub fn tick(&self) {
        let now = self.started.elapsed();
        let mut own = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        let deltas = own.read.advance(&self.all_edges());
        own.merged.apply(now, self.identity.as_str(), &EdgeReport { deltas, instance: String::new() });
    }

    /// All metrics, in Prometheus' text format, always in the same order.
    pub fn render_metrics(&self) -> String {
        self.gauge_set(Gauge::SeriesInUse, self.series.used() as f64);
        self.gauge_set(Gauge::EdgesInUse, self.edges.lock().unwrap_or_else(PoisonError::into_inner).len() as f64);
        for (gauge, value) in process::measure() {
            self.gauge_set(gauge, value);
        }
        let histograms = self.series.render();
        in_order(&self.prometheus.render()) + &histograms
    }

    /// The workload's own identity.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The workload's own service.
    pub fn service(&self) -> &ServiceName {
        &self.service
    }
}

/// The exporter's families and lines come in no order; a reader, and a test, like one.
fn in_order(text: &str) -> String {
    let mut families: Vec<String> = text
        .split("\n\n")
        .filter(|family| !family.trim().is_empty())
        .map(|family| {
            let (comments, mut lines): (Vec<&str>, Vec<&str>) = family.lines().partition(|line| line.starts_with('#'));
            lines.sort_unstable();
            comments.into_iter().chain(lines).map(|line| format!("{line}\n")).collect()
        })
        .collect();
    families.sort_unstable();
    families.join("\n") + "\n"
}
