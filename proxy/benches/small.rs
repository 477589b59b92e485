//! The small decisions that every connection or request makes. `cargo bench -p sheetbend-proxy`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use http::{Request, Version, request};
use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_proxy::detect::detect;
use sheetbend_proxy::http::headers;
use sheetbend_proxy::telemetry::{
    AccessLogSettings, EdgeKey, Flags, Outcome, Peer, Protocol, Reporter, Settings, Telemetry,
};
use sheetbend_proxy::traffic::balance::{self, Load};
use sheetbend_proxy::traffic::retry::Budget;

fn detection(c: &mut Criterion) {
    let http1 = b"GET /cart/items?page=2 HTTP/1.1\r\nHost: web:8000\r\nAccept: */*\r\n\r\n";
    let http2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00";
    let tls = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 506]].concat();
    let opaque = b"\x00\x00\x00\x08\x04\xd2\x16\x2f";
    let mut group = c.benchmark_group("detect");
    for (name, bytes) in [("http1", &http1[..]), ("http2", http2), ("tls", &tls), ("opaque", opaque)] {
        group.bench_function(name, |b| b.iter(|| detect(black_box(bytes))));
    }
}

fn balancing(c: &mut Criterion) {
    let mut group = c.benchmark_group("balance");
    for len in [1usize, 3, 100] {
        let loads: Vec<Load> = std::iter::repeat_with(Load::default).take(len).collect();
        let mut chance = 1u64;
        group.bench_function(format!("pick of {len}"), |b| {
            b.iter(|| {
                // A linear congruential generator (Knuth's MMIX): chance is an argument of `pick`, not its cost.
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let now = Duration::from_secs(5);
                balance::pick(len, None, black_box(chance), |at| loads.get(at).map_or(f64::MAX, |load| load.cost(now)))
            });
        });
    }
    let load = Load::default();
    group.bench_function("a request's sample", |b| {
        b.iter(|| {
            load.begin();
            load.sample(black_box(Duration::from_micros(800)), Duration::from_secs(5));
            load.end();
        });
    });
    let budget = Budget::default();
    group.bench_function("a request's budget", |b| {
        b.iter(|| {
            budget.begin(black_box(Duration::from_secs(5)));
            budget.end();
        });
    });
}

fn typical_request() -> request::Parts {
    let builder = Request::get("/cart/items?page=2").version(Version::HTTP_11);
    let fields = [
        ("host", "web.default:8000"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"),
        ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("accept-encoding", "gzip, deflate, br"),
        ("connection", "keep-alive"),
        ("cookie", "session=5f0b8a3e6d"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("x-request-id", "0197f8a2-6c1e-7d3a-9f51-2b7c4e8d0a13"),
    ];
    let request = fields.into_iter().fold(builder, |builder, (name, value)| builder.header(name, value)).body(());
    request.expect("a valid request").into_parts().0
}

fn header_handling(c: &mut Criterion) {
    let parts = typical_request();
    c.bench_function("headers/HTTP/1.1 to HTTP/2 and back", |b| {
        b.iter_batched(
            || parts.clone(),
            |mut head| {
                headers::check_framing(&head).ok();
                headers::strip_ours(&mut head.headers);
                headers::strip_hop_by_hop(&mut head.headers);
                if let Some(authority) = headers::authority(&head) {
                    headers::to_h2(&mut head, authority.clone()).ok();
                    headers::to_h1(&mut head, &authority).ok();
                }
                head
            },
            BatchSize::SmallInput,
        );
    });
}

fn counting(c: &mut Criterion) {
    let telemetry = Telemetry::new(Settings {
        identity: "spiffe://cluster.local/ns/default/sa/web".parse().expect("a SPIFFE id"),
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
    c.bench_function("telemetry/a request", |b| b.iter(|| edge.request(black_box(&outcome))));
}

criterion_group!(small, detection, balancing, header_handling, counting);
criterion_main!(small);
