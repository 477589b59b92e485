//! Istio's metrics: time series by labels, resolved once and then only added to.
//!
//! Requests are recorded in histograms of our own, not the exporter's: that one keeps every sample until somebody
//! scrapes. `istio_requests_total` is the count of the duration's histogram, so that a request costs no addition twice.
//!
//! A label set costs as many series as it shows lines. When the budget is spent, what is new is counted under
//! `overflow="true"`. Labels hold the mesh's own names, statuses and flags: nothing that a stranger can choose.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{Key, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::PrometheusRecorder;

use super::Outcome;

/// Time series a proxy shows at most.
pub(super) const MAX_SERIES: usize = 2000;

/// Upper bounds in milliseconds: Istio's, as far as a request is likely to go.
const DURATION_BOUNDS: [f64; 14] =
    [0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 60_000.0];
/// Upper bounds in bytes.
const SIZE_BOUNDS: [f64; 5] = [1e3, 1e4, 1e5, 1e6, 1e7];

/// `istio_requests_total`; of each histogram its buckets, `+Inf`, `_sum` and `_count`: 1 + 17 + 2 × 8 = 34.
const SERIES_OF_REQUESTS: usize = 1 + (DURATION_BOUNDS.len() + 3) + 2 * (SIZE_BOUNDS.len() + 3);
/// Bytes both ways, connections opened and closed.
const SERIES_OF_TCP: usize = 4;
/// Both reporters' overflow of both kinds: 2 × 38 = 76.
const RESERVED: usize = 2 * (SERIES_OF_REQUESTS + SERIES_OF_TCP);

/// Labels in the order in which they are shown.
pub(super) type Labels = Vec<(&'static str, String)>;

/// A histogram with fixed bounds.
pub(super) struct Histogram<const N: usize> {
    bounds: &'static [f64; N],
    buckets: [AtomicU64; N],
    beyond: AtomicU64,
    /// In microseconds or bytes.
    sum: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    fn new(bounds: &'static [f64; N]) -> Self {
        Self { bounds, buckets: [const { AtomicU64::new(0) }; N], beyond: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    fn record(&self, value: f64, raw: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        self.buckets.get(at).unwrap_or(&self.beyond).fetch_add(1, Relaxed);
        self.sum.fetch_add(raw, Relaxed);
    }

    fn count(&self) -> u64 {
        self.buckets.iter().chain([&self.beyond]).map(|b| b.load(Relaxed)).sum()
    }

    fn render(&self, out: &mut String, name: &str, labels: &str, scale: f64) {
        let mut count = 0;
        for (bound, bucket) in self.bounds.iter().zip(&self.buckets) {
            count += bucket.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
        }
        count += self.beyond.load(Relaxed);
        let sum = self.sum.load(Relaxed) as f64 / scale;
        let _ = writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
        let _ = writeln!(out, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}");
    }
}

/// The series of requests with one set of labels.
pub(super) struct Requests {
    labels: String,
    total: metrics::Counter,
    duration: Histogram<14>,
    request_bytes: Histogram<5>,
    response_bytes: Histogram<5>,
}

impl Requests {
    pub(super) fn record(&self, outcome: &Outcome) {
        let micros = u64::try_from(outcome.latency.as_micros()).unwrap_or(u64::MAX);
        self.duration.record(micros as f64 / 1000.0, micros);
        self.request_bytes.record(outcome.request_bytes as f64, outcome.request_bytes);
        self.response_bytes.record(outcome.response_bytes as f64, outcome.response_bytes);
    }
}

/// The series of opaque connections with one set of labels.
pub(super) struct Tcp {
    pub(super) sent: metrics::Counter,
    pub(super) received: metrics::Counter,
    pub(super) opened: metrics::Counter,
    pub(super) closed: metrics::Counter,
}

/// All label sets there are.
pub(super) struct Series {
    recorder: PrometheusRecorder,
    overflowed: metrics::Counter,
    state: Mutex<State>,
}

struct State {
    /// Series shown, those of the process and those reserved for the overflow included.
    used: usize,
    requests: BTreeMap<String, Arc<Requests>>,
    tcp: BTreeMap<String, Arc<Tcp>>,
}

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

impl Series {
    pub(super) fn new(recorder: PrometheusRecorder, of_the_process: usize, overflowed: metrics::Counter) -> Self {
        for (name, help) in [
            ("istio_requests_total", "Requests that ended."),
            ("istio_tcp_sent_bytes_total", "Bytes of opaque connections from destination to source."),
            ("istio_tcp_received_bytes_total", "Bytes of opaque connections from source to destination."),
            ("istio_tcp_connections_opened_total", "Opaque connections opened."),
            ("istio_tcp_connections_closed_total", "Opaque connections closed."),
        ] {
            recorder.describe_counter(name.into(), None, help.into());
        }
        let state = State { used: of_the_process + RESERVED, requests: BTreeMap::new(), tcp: BTreeMap::new() };
        Self { recorder, overflowed, state: Mutex::new(state) }
    }

    fn counter(&self, name: &'static str, labels: &Labels) -> metrics::Counter {
        let labels: Vec<Label> = labels.iter().map(|(name, value)| Label::new(*name, value.clone())).collect();
        self.recorder.register_counter(&Key::from_parts(name, labels), &METADATA)
    }

    /// The series with these labels, or those of the overflow when there is no room.
    pub(super) fn requests(&self, labels: Labels) -> Arc<Requests> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = state.requests.get(&text(&labels)) {
            return Arc::clone(known);
        }
        let labels = self.within_budget(&mut state, labels, SERIES_OF_REQUESTS);
        let key = text(&labels);
        let make = || {
            Arc::new(Requests {
                labels: key.clone(),
                total: self.counter("istio_requests_total", &labels),
                duration: Histogram::new(&DURATION_BOUNDS),
                request_bytes: Histogram::new(&SIZE_BOUNDS),
                response_bytes: Histogram::new(&SIZE_BOUNDS),
            })
        };
        Arc::clone(state.requests.entry(key.clone()).or_insert_with(make))
    }

    /// The series with these labels, or those of the overflow when there is no room.
    pub(super) fn tcp(&self, labels: Labels) -> Arc<Tcp> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = state.tcp.get(&text(&labels)) {
            return Arc::clone(known);
        }
        let labels = self.within_budget(&mut state, labels, SERIES_OF_TCP);
        let make = || {
            Arc::new(Tcp {
                sent: self.counter("istio_tcp_sent_bytes_total", &labels),
                received: self.counter("istio_tcp_received_bytes_total", &labels),
                opened: self.counter("istio_tcp_connections_opened_total", &labels),
                closed: self.counter("istio_tcp_connections_closed_total", &labels),
            })
        };
        Arc::clone(state.tcp.entry(text(&labels)).or_insert_with(make))
    }

    /// The overflow's series of that reporter, which always has room.
    pub(super) fn overflow(&self, reporter: &str) -> Arc<Requests> {
        self.requests(overflow_labels(reporter))
    }

    fn within_budget(&self, state: &mut State, labels: Labels, cost: usize) -> Labels {
        let reporter = labels.first().map_or("", |(_, reporter)| reporter.as_str());
        let overflow = overflow_labels(reporter);
        if labels == overflow {
            return labels; // Paid for by what is reserved.
        }
        if state.used + cost > MAX_SERIES {
            self.overflowed.increment(1);
            return overflow;
        }
        state.used += cost;
        labels
    }

    /// Series that are taken.
    pub(super) fn used(&self) -> usize {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).used
    }

    /// Brings the exporter's counters up to date, and gives the histograms in Prometheus' text format.
    pub(super) fn render(&self) -> String {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = String::new();
        if state.requests.is_empty() {
            return out;
        }
        let mut family = |name: &str, help: &str, one: &dyn Fn(&mut String, &Requests, &str)| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
            state.requests.values().for_each(|requests| one(&mut out, requests, name));
            out.push('\n');
        };
        let help = "Duration of requests, from the first byte of the request to the last of the response.";
        family("istio_request_duration_milliseconds", help, &|out, requests, name| {
            requests.total.absolute(requests.duration.count());
            requests.duration.render(out, name, &requests.labels, 1000.0);
        });
        family("istio_request_bytes", "Size of request bodies.", &|out, requests, name| {
            requests.request_bytes.render(out, name, &requests.labels, 1.0);
        });
        family("istio_response_bytes", "Size of response bodies.", &|out, requests, name| {
            requests.response_bytes.render(out, name, &requests.labels, 1.0);
        });
        out
    }
}

fn overflow_labels(reporter: &str) -> Labels {
    vec![("reporter", reporter.to_string()), ("overflow", "true".to_string())]
}

/// Labels as Prometheus writes them between braces.
fn text(labels: &Labels) -> String {
    let mut out = String::new();
    for (name, value) in labels {
        let comma = if out.is_empty() { "" } else { "," };
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(out, "{comma}{name}=\"{value}\"");
    }
    out
}
