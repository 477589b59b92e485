//! What proxies report of the edges they see, merged into one graph.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sheetbend_control_plane_client::graph::{Arrival, Graph, MergedGraph};
use sheetbend_control_plane_client::proto::v1::report_server::Report;
use sheetbend_control_plane_client::proto::v1::{EdgeReport, EdgeReportSummary};
use tokio::sync::Semaphore;
use tokio::time::sleep_until;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use crate::ads::workload;
use crate::state::{Shared, lock, stopped};

/// Report streams together.
const MAX_STREAMS: usize = 8_192;
/// Proxies report every 5 s, and once more when they stop. Faster ones wait.
const PAUSE: Duration = Duration::from_millis(200);
/// Longer than any instance's name of ours.
const MAX_INSTANCE: usize = 256;

/// The merged graph.
#[derive(Clone)]
pub(crate) struct Reports {
    graph: Arc<Mutex<MergedGraph>>,
    places: Arc<Semaphore>,
    started: Instant,
}

impl Reports {
    pub(crate) fn new(trust_domain: &str, started: Instant) -> Self {
        let graph = MergedGraph::new(trust_domain, "mesh", Arrival::Reported);
        Self { graph: Arc::new(Mutex::new(graph)), places: Arc::new(Semaphore::new(MAX_STREAMS)), started }
    }

    /// The mesh's graph as it is now.
    pub(crate) fn snapshot(&self) -> Graph {
        lock(&self.graph).snapshot(self.started.elapsed())
    }

    /// Lets go of what nobody reports any more.
    pub(crate) fn forget(&self) {
        lock(&self.graph).forget(self.started.elapsed());
    }

    pub(crate) fn service(&self, shared: Arc<Shared>) -> ReportService {
        ReportService { reports: self.clone(), shared }
    }
}

/// Takes reports in.
#[derive(Clone)]
pub(crate) struct ReportService {
    reports: Reports,
    shared: Arc<Shared>,
}

/// The instance that a stream is about, forgotten when the stream ends, however it ends.
struct Reporting {
    reports: Reports,
    identity: String,
    instance: String,
}

impl Drop for Reporting {
    fn drop(&mut self) {
        let now = self.reports.started.elapsed();
        lock(&self.reports.graph).instance_gone(now, &self.identity, &self.instance);
    }
}

impl ReportService {
    async fn take_in(&self, identity: String, mut reports: Streaming<EdgeReport>) -> Result<(), Status> {
        let mut reporting: Option<Reporting> = None;
        while let Some(report) = reports.next().await {
            let report = report?;
            if report.instance.len() > MAX_INSTANCE {
                return Err(Status::invalid_argument(format!("an instance's name has {MAX_INSTANCE} bytes at most")));
            }
            let about = reporting.get_or_insert_with(|| Reporting {
                reports: self.reports.clone(),
                identity: identity.clone(),
                instance: report.instance.clone(),
            });
            // Many names on one stream would be many reporters, and their number is what bounds the memory.
            if about.instance != report.instance {
                return Err(Status::invalid_argument("a report stream is about one instance"));
            }
            lock(&self.reports.graph).apply(self.reports.started.elapsed(), &identity, &report);
            sleep_until((Instant::now() + PAUSE).into()).await;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Report for ReportService {
    async fn edges(&self, request: Request<Streaming<EdgeReport>>) -> Result<Response<EdgeReportSummary>, Status> {
        let leaf = workload(&request)?.1.leaf;
        let Ok(_place) = self.reports.places.clone().try_acquire_owned() else {
            return Err(Status::resource_exhausted("too many report streams are open"));
        };
        let mut stopping = self.shared.stopping();
        tokio::select! {
            // A report that is lost at the end is one of many.
            outcome = self.take_in(leaf.id.to_string(), request.into_inner()) => outcome?,
            () = stopped(&mut stopping) => return Err(Status::unavailable("the control plane is stopping")),
        }
        Ok(Response::new(EdgeReportSummary {}))
    }
}
