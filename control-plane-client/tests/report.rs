//! Reports against a control plane that breaks off when a test wants.

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheetbend_control_plane_client::channel::Connector;
use sheetbend_control_plane_client::proto::v1::report_server::{Report, ReportServer};
use sheetbend_control_plane_client::proto::v1::{EdgeDelta, EdgeReport, EdgeReportSummary};
use sheetbend_control_plane_client::report::{self, ReportConfig, Reporter};
use support::{port, within};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// Hands each stream to the test.
struct Collector(mpsc::Sender<(Streaming<EdgeReport>, mpsc::Sender<()>)>);

#[tonic::async_trait]
impl Report for Collector {
    async fn edges(&self, request: Request<Streaming<EdgeReport>>) -> Result<Response<EdgeReportSummary>, Status> {
        let (end, mut ended) = mpsc::channel(1);
        let _ = self.0.send((request.into_inner(), end)).await;
        ended.recv().await;
        Err(Status::unavailable("the test breaks off"))
    }
}

const OFTEN: Duration = Duration::from_millis(20);

type Streams = mpsc::Receiver<(Streaming<EdgeReport>, mpsc::Sender<()>)>;

async fn collector(address: &str) -> (String, Streams, tokio::task::JoinHandle<()>) {
    let socket = TcpListener::bind(address).await.unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let (sender, streams) = mpsc::channel(4);
    let server = tonic::transport::Server::builder().add_service(ReportServer::new(Collector(sender)));
    let server = tokio::spawn(async move {
        let _ = server.serve_with_incoming(TcpListenerStream::new(socket)).await;
    });
    (address, streams, server)
}

/// One request on one edge each time it is asked.
fn reporter(address: &str, every: Duration) -> (Arc<Mutex<u64>>, tokio::task::JoinHandle<()>) {
    let counted = Arc::new(Mutex::new(0));
    let counter = counted.clone();
    let source = move || {
        *counter.lock().unwrap() += 1;
        vec![EdgeDelta { destination: "web.default:80".into(), requests: 1, ..EdgeDelta::default() }]
    };
    let config = ReportConfig {
        connector: Connector::plain(&format!("http://{address}")).unwrap(),
        instance: "web-1".into(),
        every,
        source: Box::new(source),
    };
    (counted, tokio::spawn(report::run(config)))
}

async fn next(stream: &mut Streaming<EdgeReport>) -> u64 {
    let report = within(stream.message()).await.unwrap().expect("the stream goes on");
    assert_eq!((report.instance.as_str(), report.deltas.len()), ("web-1", 1));
    report.deltas[0].requests
}

#[tokio::test]
async fn edges_are_told_again_and_again_on_one_stream() {
    let (address, mut streams, _server) = collector("127.0.0.1:0").await;
    let (counted, _reporter) = reporter(&address, OFTEN);
    let (mut stream, _end) = within(streams.recv()).await.unwrap();
    let mut told = 0;
    for _ in 0..5 {
        told += next(&mut stream).await;
    }
    assert!(told >= 5 && told <= *counted.lock().unwrap());
}

#[tokio::test]
async fn nothing_is_told_twice_when_a_stream_breaks_and_what_was_not_told_comes_on_the_next() {
    let (address, mut streams, _server) = collector("127.0.0.1:0").await;
    // So long that what is under way at a time is one report, of one request, however busy the machine is.
    let (counted, reporter) = reporter(&address, Duration::from_millis(200));
    let mut told = 0;
    for _ in 0..4 {
        let (mut stream, end) = within(streams.recv()).await.unwrap();
        for _ in 0..3 {
            told += next(&mut stream).await;
        }
        end.send(()).await.unwrap();
        // What was under way when it broke.
        while let Ok(Some(report)) = within(stream.message()).await {
            told += report.deltas[0].requests;
        }
    }
    reporter.abort();
    let counted = *counted.lock().unwrap();
    assert!(told <= counted, "{told} told of {counted}");
    // At most one report is lost with each connection that breaks, and one waits.
    assert!(told + 8 >= counted, "{told} told of {counted}");
}

#[tokio::test]
async fn a_control_plane_that_is_away_costs_nothing_and_is_told_everything_later() {
    let (_held, address) = port();
    let address = address.to_string();
    let (counted, _reporter) = reporter(&address, OFTEN);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (_, mut streams, _server) = collector(&address).await;
    let (mut stream, _end) = within(streams.recv()).await.unwrap();
    let mut told = 0;
    // But for what waits and what is under way; where the machine is busy, the stream catches up.
    let everything = async {
        while told < 3 || told + 2 < *counted.lock().unwrap() {
            told += next(&mut stream).await;
        }
    };
    within(everything).await;
    let counted = *counted.lock().unwrap();
    assert!(told <= counted, "{told} told of {counted}");
}

#[tokio::test]
async fn what_happened_last_is_told_before_the_process_ends() {
    let (address, mut streams, _server) = collector("127.0.0.1:0").await;
    let source = || vec![EdgeDelta { destination: "web.default:80".into(), requests: 7, ..EdgeDelta::default() }];
    let (reporter, task) = Reporter::start(ReportConfig {
        connector: Connector::plain(&format!("http://{address}")).unwrap(),
        instance: "web-1".into(),
        every: Duration::from_secs(3600),
        source: Box::new(source),
    });
    tokio::spawn(task);
    let (mut stream, end) = within(streams.recv()).await.unwrap();
    let flushing = tokio::spawn(async move { reporter.flush().await });
    assert_eq!(next(&mut stream).await, 7);
    assert_eq!(within(stream.message()).await.unwrap(), None, "the stream ends by itself");
    end.send(()).await.unwrap();
    within(flushing).await.unwrap();
}
