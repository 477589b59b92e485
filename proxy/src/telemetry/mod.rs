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
mod flags;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_control_plane_client::proto::v1::EdgeDelta;

pub use access_log::{AccessEntry, AccessLog, AccessLogFormat, AccessLogOutput, AccessLogSettings};
pub use counters::{Counter, Gauge};
pub use edge::{ConnectionGuard, Edge, EdgeKey, Outcome, Peer, Protocol, Reporter};
pub use flags::Flags;

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

/// Everything this process counts. Shared by all its threads.
pub struct Telemetry {
    identity: SpiffeId,
    service: ServiceName,
    edges: Mutex<HashMap<EdgeKey, Arc<Edge>>>,
    counters: Vec<metrics::Counter>,
    gauges: Vec<metrics::Gauge>,
    prometheus: PrometheusHandle,
    access_log: AccessLog,
}

impl Telemetry {
    /// Starts counting. The access log's writer thread ends when the last handle is dropped.
    pub fn new(settings: Settings) -> Arc<Self> {
        let recorder = PrometheusBuilder::new().build_recorder();
        let counters: Vec<_> = Counter::ALL.iter().map(|c| c.register(&recorder)).collect();
        let gauges = Gauge::ALL.iter().map(|g| g.register(&recorder)).collect();
        let dropped = counters[Counter::AccessLogDropped as usize].clone();
        Arc::new(Self {
            identity: settings.identity,
            service: settings.service,
            edges: Mutex::default(),
            counters,
            gauges,
            prometheus: recorder.handle(),
            access_log: AccessLog::new(settings.access_log, dropped),
        })
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
        Arc::clone(edges.entry(key.clone()).or_insert_with(|| Arc::new(Edge::new(key))))
    }

    /// The access log.
    pub fn access_log(&self) -> &AccessLog {
        &self.access_log
    }

    /// Counts one event.
    pub fn count(&self, counter: Counter) {
        self.count_by(counter, 1);
    }

    /// Counts `n` events.
    pub fn count_by(&self, counter: Counter, n: u64) {
        if let Some(counter) = self.counters.get(counter as usize) {
            counter.increment(n);
        }
    }

    /// Moves a level by `by`.
    pub fn gauge_add(&self, gauge: Gauge, by: f64) {
        if let Some(gauge) = self.gauges.get(gauge as usize) {
            gauge.increment(by);
        }
    }

    /// Sets a level.
    pub fn gauge_set(&self, gauge: Gauge, to: f64) {
        if let Some(gauge) = self.gauges.get(gauge as usize) {
            gauge.set(to);
        }
    }

    /// What happened on every edge since this was asked last, for the report to the control plane.
    pub fn take_deltas(&self) -> Vec<EdgeDelta> {
        Vec::new()
    }

    /// All metrics, in Prometheus' text format.
    pub fn render_metrics(&self) -> String {
        self.prometheus.render()
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
