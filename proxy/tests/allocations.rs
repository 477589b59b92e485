//! How often the parts of a request's way allocate. The numbers stand in `benches/allocations.txt`; one that rises
//! needs a reason in the same change, one that falls is written down. The whole of a request is `request.rs`'s.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Duration;

use http::{Request, Version, request};
use sheetbend_control_plane_client::model::{Match, PathMatch, Rule, ServiceName, TextMatch};
use sheetbend_proxy::detect::detect;
use sheetbend_proxy::http::headers;
use sheetbend_proxy::http::known::Known;
use sheetbend_proxy::policy::Index;
use sheetbend_proxy::telemetry::{
    AccessLogSettings, EdgeKey, Flags, Outcome, Peer, Protocol, Reporter, Settings, Telemetry,
};
use sheetbend_proxy::traffic::balance::{self, Load};

/// Allocations of the second and later calls: what the first one sets up is not counted.
fn allocations(mut work: impl FnMut()) -> u64 {
    work();
    allocation_counter::measure(work).count_total
}

fn request_head() -> request::Parts {
    let request = Request::get("/cart/items?page=2")
        .version(Version::HTTP_11)
        .header("host", "web.default:8000")
        .header("accept", "*/*")
        .header("connection", "keep-alive")
        .header("x-request-id", "0197f8a2-6c1e-7d3a-9f51-2b7c4e8d0a13");
    request.body(()).unwrap().into_parts().0
}

fn measured() -> BTreeMap<&'static str, u64> {
    let loads: Vec<Load> = std::iter::repeat_with(Load::default).take(3).collect();
    let telemetry = Telemetry::new(Settings {
        identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
        service: ServiceName { service: "web".into(), namespace: "default".into() },
        access_log: AccessLogSettings::default(),
    });
    let edge = telemetry.edge(EdgeKey {
        reporter: Reporter::Source,
        peer: Peer::Unknown,
        destination: "web.default:8000".into(),
        protocol: Protocol::Http,
        mtls: true,
    });
    let outcome = Outcome {
        status: 200,
        grpc_status: None,
        latency: Duration::from_micros(800),
        request_bytes: 0,
        response_bytes: 128,
        flags: Flags::NONE,
    };
    let one = |path: PathMatch| Match {
        path: Some(path),
        headers: vec![("accept".into(), TextMatch::Regex(".*/.*".parse().unwrap()))],
        query: vec![("page".into(), TextMatch::Exact("2".into()))],
        ..Match::default()
    };
    let paths = [PathMatch::Exact("/cart".into()), PathMatch::Prefix("/cart".into())];
    let rules = paths.map(|path| Rule {
        name: "default/web#0".into(),
        matches: vec![one(path)],
        backends: vec![],
        policy: Default::default(),
    });
    let (index, asking) = (Index::new(&rules), request_head());
    assert_eq!(index.find(&asking).map(|found| found.rule), Some(1));
    let mut heads = vec![request_head(), request_head()];
    BTreeMap::from([
        (
            "detect",
            allocations(|| {
                black_box(detect(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n"));
            }),
        ),
        (
            "balance",
            allocations(|| {
                let cost = |at: usize| loads[at].cost(Duration::from_secs(1));
                black_box(balance::pick(loads.len(), black_box(7 << 32), cost));
            }),
        ),
        (
            "match",
            allocations(|| {
                black_box(index.find(&asking));
            }),
        ),
        ("telemetry", allocations(|| edge.request(black_box(&outcome)))),
        (
            "headers",
            allocations(|| {
                let mut head = heads.pop().unwrap();
                let known = Known::of(&head.headers);
                headers::check_framing(&head, known).unwrap();
                headers::strip_ours(&mut head.headers, known);
                headers::strip_hop_by_hop(&mut head.headers, known);
                let authority = headers::authority(&head).unwrap();
                headers::to_h2(&mut head, authority.clone()).unwrap();
                headers::to_h1(&mut head, &authority).unwrap();
                black_box(head);
            }),
        ),
    ])
}

#[test]
fn no_part_of_a_requests_way_allocates_more_than_is_written_down() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/allocations.txt");
    let written: BTreeMap<String, u64> = std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .filter(|line| !line.starts_with('#') && !line.starts_with("request "))
        .filter_map(|line| line.split_once(' '))
        .map(|(name, count)| (name.to_string(), count.trim().parse().unwrap()))
        .collect();
    let measured: BTreeMap<String, u64> = measured().into_iter().map(|(name, n)| (name.to_string(), n)).collect();
    assert_eq!(measured, written, "left: measured now, right: {path}");
}
