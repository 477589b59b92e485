use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use super::*;

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/default/sa/{account}").parse().unwrap()
}

fn telemetry_with(access_log: AccessLogSettings) -> Arc<Telemetry> {
    let service = ServiceName { service: "web".into(), namespace: "default".into() };
    Telemetry::new(Settings { identity: id("web"), service, access_log })
}

fn telemetry() -> Arc<Telemetry> {
    telemetry_with(AccessLogSettings::default())
}

fn outbound(destination: &str) -> EdgeKey {
    EdgeKey {
        reporter: Reporter::Source,
        peer: Peer::Known(id("cart")),
        destination: destination.into(),
        protocol: Protocol::Http,
        mtls: true,
    }
}

fn outcome(status: u16) -> Outcome {
    Outcome {
        status,
        grpc_status: None,
        latency: Duration::from_micros(2400),
        request_bytes: 120,
        response_bytes: 4096,
        flags: Flags::NONE,
    }
}

/// An edge of each kind with some traffic.
fn busy() -> Arc<Telemetry> {
    let telemetry = telemetry();
    let http = telemetry.edge(outbound("cart.default:80"));
    for _ in 0..3 {
        http.request(&outcome(200));
    }
    http.request(&Outcome { flags: Flags::NO_HEALTHY_UPSTREAM, ..outcome(503) });
    let grpc = telemetry.edge(EdgeKey {
        reporter: Reporter::Destination,
        peer: Peer::Unknown,
        destination: "web.default:8000".into(),
        protocol: Protocol::Grpc,
        mtls: false,
    });
    grpc.request(&Outcome { grpc_status: Some(14), ..outcome(200) });
    let tcp = telemetry.edge(EdgeKey { protocol: Protocol::Tcp, ..outbound("db.default:5432") });
    drop(tcp.connection());
    let _open = tcp.connection();
    tcp.bytes(100, 2000);
    telemetry.count(Counter::RetriedConnect);
    telemetry
}

/// Without what differs from run to run.
fn stable(metrics: &str) -> String {
    metrics.lines().filter(|l| !l.starts_with("process_")).map(|l| format!("{l}\n")).collect()
}

#[test]
fn the_metrics_are_istios_where_istio_has_them() {
    insta::assert_snapshot!(stable(&busy().render_metrics()));
}

#[test]
fn promtool_finds_nothing_but_istios_own_unit() {
    let mut promtool = match Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    {
        Ok(promtool) => promtool,
        Err(error) => {
            assert!(std::env::var_os("SHEETBEND_TEST_STRICT").is_none(), "promtool is missing: {error}");
            eprintln!("left out: promtool is not installed (Debian's package prometheus): {error}");
            return;
        }
    };
    promtool.stdin.take().unwrap().write_all(busy().render_metrics().as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<_> =
        said.lines().filter(|l| !l.starts_with("istio_request_duration_milliseconds use base unit")).collect();
    assert_eq!(complaints, Vec::<&str>::new());
}

#[test]
fn a_flood_of_destinations_spends_no_more_than_the_budget() {
    let telemetry = telemetry();
    for n in 0..2000 {
        for status in [200, 404, 503] {
            telemetry.edge(outbound(&format!("s{n}.default:80"))).request(&outcome(status));
        }
    }
    let metrics = telemetry.render_metrics();
    let series = metrics.lines().filter(|l| !l.is_empty() && !l.starts_with('#')).count();
    assert!(series <= series::MAX_SERIES, "{series} series");
    let total: f64 = metrics
        .lines()
        .filter(|l| l.starts_with("istio_requests_total{"))
        .map(|l| l.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum();
    assert_eq!(total, 6000.0, "every request is counted somewhere");
    assert!(metrics.contains("istio_requests_total{reporter=\"source\",overflow=\"true\"}"));
    let graph = telemetry.graph();
    assert!(graph.edges.len() <= MAX_EDGES + 1);
    assert_eq!(graph.edges.iter().map(|e| e.since_start.requests).sum::<u64>(), 6000);
    assert!(graph.edges.iter().any(|e| e.destination == "other"));
}

#[test]
fn an_endpoint_that_invents_outcomes_gets_no_series_for_each() {
    let telemetry = telemetry();
    let edge = telemetry.edge(outbound("cart.default:80"));
    for status in 0..1000 {
        for grpc in [None, Some(0), Some(17), Some(u16::MAX)] {
            edge.request(&Outcome { grpc_status: grpc, ..outcome(status) });
        }
    }
    let metrics = telemetry.render_metrics();
    let sets = metrics.lines().filter(|l| l.starts_with("istio_requests_total{")).count();
    assert_eq!(sets, 17, "16 kinds of outcome, and the overflow");
    assert_eq!(telemetry.graph().edges[0].since_start.requests, 4000);
}

#[test]
fn no_count_is_lost_when_many_threads_meet_a_new_kind_of_outcome() {
    let telemetry = telemetry();
    let edge = telemetry.edge(outbound("cart.default:80"));
    std::thread::scope(|scope| {
        for thread in 0..8u16 {
            let edge = &edge;
            scope.spawn(move || (0..1000).for_each(|n| edge.request(&outcome(200 + (n + thread) % 20))));
        }
    });
    let metrics = telemetry.render_metrics();
    let total: u64 = metrics
        .lines()
        .filter(|l| l.starts_with("istio_request_duration_milliseconds_count"))
        .map(|l| l.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(total, 8000);
}

#[test]
fn two_ports_of_a_service_share_their_series() {
    let telemetry = telemetry();
    telemetry.edge(outbound("cart.default:80")).request(&outcome(200));
    telemetry.edge(outbound("cart.default:81")).request(&outcome(200));
    let metrics = telemetry.render_metrics();
    let lines: Vec<_> = metrics.lines().filter(|l| l.starts_with("istio_requests_total{")).collect();
    assert_eq!(lines.len(), 1);
    assert!(lines[0].ends_with(" 2"), "{lines:?}");
}

#[test]
fn a_delta_is_told_once_and_adds_up_at_the_control_plane() {
    let telemetry = telemetry();
    let edge = telemetry.edge(outbound("cart.default:80"));
    let mut mesh = MergedGraph::new("cluster.local", "mesh", Arrival::Reported);
    for round in 1..=3u64 {
        edge.request(&outcome(200));
        edge.request(&outcome(500));
        let deltas = telemetry.take_deltas();
        assert_eq!((deltas.len(), deltas[0].requests, deltas[0].errors), (1, 2, 1));
        mesh.apply(Duration::from_secs(5 * round), id("web").as_str(), &EdgeReport { deltas, instance: "1".into() });
    }
    assert_eq!(telemetry.take_deltas(), [], "nothing new, nothing told");
    let graph = mesh.snapshot(Duration::from_secs(16));
    let [edge] = graph.edges.as_slice() else { panic!("{graph:?}") };
    assert_eq!((edge.last_minute.requests, edge.since_start.errors), (6, 3));
    let p99 = edge.last_minute.p99_ms.unwrap();
    assert!((p99 - 2.4).abs() <= 2.4 / 16.0, "{p99}");
}

#[test]
fn both_ends_of_an_edge_agree_on_the_direction_of_bytes() {
    let telemetry = telemetry();
    let key = EdgeKey { protocol: Protocol::Tcp, ..outbound("db.default:5432") };
    telemetry.edge(key.clone()).bytes(10, 20);
    let inbound = EdgeKey { reporter: Reporter::Destination, destination: "web.default:8000".into(), ..key };
    telemetry.edge(inbound).bytes(10, 20);
    let mut graph = telemetry.graph();
    graph.edges.sort_by_key(|e| e.reporter);
    let bytes: Vec<_> = graph.edges.iter().map(|e| (e.since_start.bytes_sent, e.since_start.bytes_received)).collect();
    assert_eq!(bytes, [(10, 20), (20, 10)]);
}

fn entry() -> AccessEntry<'static> {
    AccessEntry {
        start: SystemTime::UNIX_EPOCH + Duration::from_millis(1_786_400_000_123),
        reporter: Reporter::Source,
        method: "GET",
        path: "/cart/42?token=secret",
        authority: "cart",
        protocol: "HTTP/1.1",
        status: 503,
        grpc_status: None,
        flags: Flags::UPSTREAM_CONNECT_FAILURE | Flags::RETRIES_EXHAUSTED,
        detail: "",
        duration: Duration::from_micros(12_345),
        upstream_duration: None,
        request_bytes: 0,
        response_bytes: 91,
        upstream: Some(SocketAddr::from(([127, 0, 0, 1], 8000))),
        downstream: Some(SocketAddr::from(([127, 0, 0, 1], 40000))),
        destination: "cart.default:80",
        source_identity: "spiffe://cluster.local/ns/default/sa/web",
        destination_identity: "spiffe://cluster.local/ns/default/sa/cart",
        request_id: "6c8d4a3e-6b0d-4a8e-9d6c-0f2b7a1c5e90",
        attempts: 2,
        audit: "",
        dry_run: "",
    }
}

/// What the log says of these entries.
fn logged(format: AccessLogFormat, entries: &[AccessEntry<'_>]) -> String {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let output = AccessLogOutput::Writer(Box::new(writer));
    let telemetry = telemetry_with(AccessLogSettings { all: false, format, output });
    entries.iter().for_each(|e| telemetry.access_log().write(e));
    telemetry.access_log().flush(Duration::from_secs(10));
    drop(telemetry);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut reader, &mut said).unwrap();
    said
}

#[test]
fn an_access_log_line_reads_well() {
    let opaque = AccessEntry {
        method: "",
        path: "",
        authority: "",
        protocol: "TCP",
        status: 0,
        detail: "connection reset by peer",
        request_id: "",
        attempts: 1,
        audit: "default/watched#0",
        dry_run: "rbac_access_denied_matched_policy[default/soon#0]",
        ..entry()
    };
    insta::assert_snapshot!(logged(AccessLogFormat::Text, &[entry(), opaque]));
    insta::assert_snapshot!(logged(AccessLogFormat::Json, &[entry()]));
}

#[test]
fn a_stranger_cannot_forge_a_line() {
    let evil = "/a\" 200 -\n2026-01-01T00:00:00.000Z outbound \"GET /forged\u{1b}[2J\u{202e}\\";
    let entry = AccessEntry { path: evil, authority: evil, method: evil, request_id: evil, detail: evil, ..entry() };
    let text = logged(AccessLogFormat::Text, std::slice::from_ref(&entry));
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'), "{text:?}");
    assert!(text.contains(r#"/a\" 200 -\u{a}2026"#), "{text}");
    let json = logged(AccessLogFormat::Json, &[entry]);
    assert_eq!(json.lines().count(), 1, "{json}");
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["authority"], evil);
}

#[test]
fn a_query_string_and_a_book_of_a_path_stay_out_of_the_log() {
    let long = "x".repeat(100_000);
    let text = logged(AccessLogFormat::Text, &[entry(), AccessEntry { path: &long, ..entry() }]);
    assert!(!text.contains("secret") && text.len() < 4000, "{} bytes", text.len());
}

#[test]
fn a_writer_that_stands_still_costs_lines_and_no_time() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let output = AccessLogOutput::Writer(Box::new(writer));
    let telemetry = telemetry_with(AccessLogSettings { output, ..AccessLogSettings::default() });
    for _ in 0..20_000 {
        telemetry.access_log().write(&entry());
    }
    let metrics = telemetry.render_metrics();
    let line = metrics.lines().find(|l| l.starts_with("sheetbend_access_log_dropped_total")).unwrap();
    assert!(line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap() > 0, "{line}");
}
