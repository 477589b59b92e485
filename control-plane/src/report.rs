//! What proxies report of the edges they see.

use std::sync::Arc;

use sheetbend_control_plane_client::proto::v1::report_server::Report;
use sheetbend_control_plane_client::proto::v1::{EdgeReport, EdgeReportSummary};
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use crate::ads::workload;
use crate::state::{Shared, stopped};

/// The merged graph.
#[derive(Clone, Default)]
pub(crate) struct Reports {}

impl Reports {
    pub(crate) fn service(&self, shared: Arc<Shared>) -> ReportService {
        ReportService { shared }
    }
}

/// Takes reports in.
#[derive(Clone)]
pub(crate) struct ReportService {
    shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Report for ReportService {
    async fn edges(&self, request: Request<Streaming<EdgeReport>>) -> Result<Response<EdgeReportSummary>, Status> {
        let (_peer, _leaf) = workload(&request)?;
        let mut reports = request.into_inner();
        let mut stopping = self.shared.stopping();
        loop {
            tokio::select! {
                report = reports.next() => match report {
                    Some(report) => drop(report?),
                    None => return Ok(Response::new(EdgeReportSummary {})),
                },
                () = stopped(&mut stopping) => return Err(Status::unavailable("the control plane is stopping")),
            }
        }
    }
}
