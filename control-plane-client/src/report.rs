//! Reports: the edges that this proxy saw, told every 5 s. Nothing ever waits for it.
//!
//! A delta is told at most once. What was not handed to the connection yet when that ended is kept, merged with what
//! comes after, and told on the next one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::backoff;
use crate::channel::Connector;
use crate::proto::v1::report_client::ReportClient;
use crate::proto::v1::{BucketCount, EdgeDelta, EdgeReport};
use crate::xds::shown;

/// How often edges are told.
pub const EVERY: Duration = Duration::from_secs(5);
/// How long the end of a process waits for its last report.
const FLUSH: Duration = Duration::from_secs(1);
/// Edges kept while the control plane is away: four times what a proxy has at any one time.
const MAX_EDGES: usize = 2_048;

/// What reporting needs to know.
pub struct ReportConfig {
    /// How the control plane is reached.
    pub connector: Connector,
    /// Unique among the reporters alive; a restart is another one.
    pub instance: String,
    /// How often.
    pub every: Duration,
    /// Gives the deltas since it was last called.
    pub source: Box<dyn FnMut() -> Vec<EdgeDelta> + Send>,
}

/// A handle to reporting.
#[derive(Clone)]
pub struct Reporter {
    flushes: mpsc::Sender<oneshot::Sender<()>>,
    failures: Arc<AtomicU64>,
}

impl Reporter {
    /// Starts reporting: a handle, and a task to spawn that reports for as long as it is polled.
    pub fn start(config: ReportConfig) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (flushes, asked) = mpsc::channel(1);
        let failures = Arc::new(AtomicU64::new(0));
        (Self { flushes, failures: Arc::clone(&failures) }, run_until_flushed(config, asked, failures))
    }

    /// How often reports could not be delivered since the start.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Tells what happened since the last report, and waits until it was read, 1 s at most. For the end of a process.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        let told = async {
            self.flushes.send(done).await.ok()?;
            flushed.await.ok()
        };
        // The control plane is away: these edges are lost with the process.
        let _ = tokio::time::timeout(FLUSH, told).await;
    }
}

/// Reports for as long as it is polled. To be spawned.
pub async fn run(config: ReportConfig) {
    let (_reporter, task) = Reporter::start(config);
    task.await;
}

async fn run_until_flushed(
    mut config: ReportConfig,
    flushes: mpsc::Receiver<oneshot::Sender<()>>,
    failed: Arc<AtomicU64>,
) {
    let connector = config.connector.clone();
    let mut rotations = connector.rotations();
    let mut failures = 0u32;
    let mut feed = Feed { pending: Pending::default(), flushes, flushing: None };
    loop {
        let slot = Arc::new(Slot::default());
        // In no order. A rotation ends the stream in mid-air; what was not taken from the slot is told on the next one.
        let ended = tokio::select! {
            reason = stream(&connector, slot.clone()) => Some(reason),
            never = feed.run(&mut config, &slot) => match never {},
            () = rotations.next() => None,
        };
        if slot.took() {
            failures = 0;
        }
        let unsent = slot.close();
        if unsent.is_none()
            && ended.is_some()
            && let Some(done) = feed.flushing.take()
        {
            let _ = done.send(());
            continue;
        }
        feed.pending.put_back(unsent);
        let Some(reason) = ended else { continue };
        failures = failures.saturating_add(1);
        failed.fetch_add(1, Ordering::Relaxed);
        let wait = backoff::wait(failures, rand::random());
        tracing::debug!(
            reason,
            ?wait,
            edges = feed.pending.edges.len(),
            "edges can not be reported now; they are kept"
        );
        tokio::time::sleep(wait).await;
    }
}

/// Sends what appears in the slot, until the connection ends.
async fn stream(connector: &Connector, slot: Arc<Slot>) -> String {
    let channel = match connector.connect().await {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    match ReportClient::new(channel).edges(reports(slot)).await {
        Ok(_) => "the control plane ended the stream".to_string(),
        Err(status) => format!("{}: {}", status.code(), shown(status.message(), 300)),
    }
}

/// What is not told yet, and who wants it told now.
struct Feed {
    pending: Pending,
    flushes: mpsc::Receiver<oneshot::Sender<()>>,
    flushing: Option<oneshot::Sender<()>>,
}

impl Feed {
    /// Looks at the source every `every`, and puts into the slot what there is, once what was there is gone. When
    /// somebody wants everything told, that is the stream's last report: its end is answered once all of it was read.
    async fn run(&mut self, config: &mut ReportConfig, slot: &Slot) -> std::convert::Infallible {
        loop {
            if self.flushing.is_none() {
                // In no order: both lead to the same.
                tokio::select! {
                    () = tokio::time::sleep(config.every) => {}
                    Some(done) = self.flushes.recv() => self.flushing = Some(done),
                }
            }
            self.pending.merge((config.source)());
            if self.flushing.is_some() {
                slot.emptied().await;
            }
            if slot.is_empty() && !self.pending.edges.is_empty() {
                slot.put(EdgeReport { deltas: self.pending.take(), instance: config.instance.clone() });
            }
            if self.flushing.is_some() {
                slot.finish();
                std::future::pending::<()>().await;
            }
        }
    }
}

fn reports(slot: Arc<Slot>) -> impl Stream<Item = EdgeReport> {
    futures_util::stream::unfold(slot, |slot| async move {
        loop {
            // `notify_one` leaves a permit when nobody waits: nothing is missed between the two lines.
            match slot.hand_over() {
                Handed::Report(report) => return Some((report, slot)),
                Handed::Closed => return None,
                Handed::Nothing => slot.changed.notified().await,
            }
        }
    })
}

/// Holds one report until the connection takes it.
#[derive(Default)]
struct Slot {
    inside: Mutex<Inside>,
    changed: Notify,
    taken: Notify,
}

#[derive(Default)]
struct Inside {
    report: Option<EdgeReport>,
    /// The connection took one at some time: it lives.
    took: bool,
    /// The connection is over. The HTTP library goes on polling a request's body even then, so that has to end.
    closed: bool,
}

enum Handed {
    Report(EdgeReport),
    Nothing,
    Closed,
}

impl Slot {
    /// A lock of a few instructions, never held across an await, and never by a worker.
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, report: EdgeReport) {
        self.lock().report = Some(report);
        self.changed.notify_one();
    }

    fn hand_over(&self) -> Handed {
        let mut inside = self.lock();
        match inside.report.take() {
            Some(report) => {
                inside.took = true;
                self.taken.notify_one();
                Handed::Report(report)
            }
            None if inside.closed => Handed::Closed,
            None => Handed::Nothing,
        }
    }

    /// Nothing comes after what is there.
    fn finish(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Ends it, and gives back what was not taken.
    fn close(&self) -> Option<EdgeReport> {
        self.finish();
        self.lock().report.take()
    }

    /// Waits until the connection took what was there.
    async fn emptied(&self) {
        while !self.is_empty() {
            self.taken.notified().await;
        }
    }

    fn is_empty(&self) -> bool {
        self.lock().report.is_none()
    }

    fn took(&self) -> bool {
        self.lock().took
    }
}

/// Deltas that nobody was told yet, each edge once.
#[derive(Default)]
struct Pending {
    edges: BTreeMap<Edge, EdgeDelta>,
}

/// What tells two edges apart.
type Edge = (i32, String, String, String, String, bool);

impl Pending {
    fn merge(&mut self, deltas: Vec<EdgeDelta>) {
        for mut delta in deltas {
            if self.edges.len() >= MAX_EDGES && !self.edges.contains_key(&edge(&delta)) {
                // The sums stay right; which far end it was is lost.
                delta.destination = "other".to_string();
                delta.destination_principal.clear();
            }
            match self.edges.entry(edge(&delta)) {
                std::collections::btree_map::Entry::Vacant(free) => drop(free.insert(delta)),
                std::collections::btree_map::Entry::Occupied(mut sum) => add(sum.get_mut(), delta),
            }
        }
    }

    fn put_back(&mut self, report: Option<EdgeReport>) {
        self.merge(report.map(|report| report.deltas).unwrap_or_default());
    }

    fn take(&mut self) -> Vec<EdgeDelta> {
        std::mem::take(&mut self.edges).into_values().collect()
    }
}

fn edge(delta: &EdgeDelta) -> Edge {
    (
        delta.reporter,
        delta.source.clone(),
        delta.destination.clone(),
        delta.destination_principal.clone(),
        delta.protocol.clone(),
        delta.mtls,
    )
}

fn add(sum: &mut EdgeDelta, delta: EdgeDelta) {
    sum.requests = sum.requests.saturating_add(delta.requests);
    sum.errors = sum.errors.saturating_add(delta.errors);
    sum.bytes_sent = sum.bytes_sent.saturating_add(delta.bytes_sent);
    sum.bytes_received = sum.bytes_received.saturating_add(delta.bytes_received);
    sum.connections_opened = sum.connections_opened.saturating_add(delta.connections_opened);
    sum.connections_closed = sum.connections_closed.saturating_add(delta.connections_closed);
    let mut buckets: BTreeMap<u32, u64> = sum.latency.iter().map(|b| (b.bucket, b.count)).collect();
    for bucket in delta.latency {
        let count = buckets.entry(bucket.bucket).or_default();
        *count = count.saturating_add(bucket.count);
    }
    sum.latency = buckets.into_iter().map(|(bucket, count)| BucketCount { bucket, count }).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(destination: &str, requests: u64) -> EdgeDelta {
        EdgeDelta {
            destination: destination.to_string(),
            requests,
            latency: vec![BucketCount { bucket: 3, count: requests }],
            ..EdgeDelta::default()
        }
    }

    #[test]
    fn deltas_that_wait_are_one_sum_an_edge() {
        let mut pending = Pending::default();
        pending.merge(vec![delta("web.default:80", 2), delta("db.default:5432", 1)]);
        pending.put_back(Some(EdgeReport { deltas: vec![delta("web.default:80", 40)], instance: String::new() }));
        let told = pending.take();
        assert_eq!(told, [delta("db.default:5432", 1), delta("web.default:80", 42)]);
        assert_eq!(pending.take(), []);
    }

    #[test]
    fn what_waits_is_bounded_and_no_request_is_lost_from_the_sum() {
        let mut pending = Pending::default();
        pending.merge((0..3 * MAX_EDGES).map(|n| delta(&format!("s{n}.default:80"), 1)).collect());
        let told = pending.take();
        assert_eq!(told.len(), MAX_EDGES + 1);
        assert_eq!(told.iter().map(|delta| delta.requests).sum::<u64>(), 3 * MAX_EDGES as u64);
    }
}
