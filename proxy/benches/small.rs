//! The small decisions that every connection or request makes. `cargo bench -p sheetbend-proxy`.

#[path = "../tests/mesh/mod.rs"]
mod mesh;
#[path = "small/snapshot.rs"]
mod snapshot;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, criterion_group, criterion_main};
use http::{Request, Version, request};
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{
    Backend, ConsistentHash, LoadBalancer, Match, PathMatch, Resolution, Rule, ServiceName, Simple, Target,
};
use sheetbend_proxy::detect::detect;
use sheetbend_proxy::http::headers;
use sheetbend_proxy::http::known::Known;
use sheetbend_proxy::policy::Index;
use sheetbend_proxy::route::{Caller, Routes};
use sheetbend_proxy::telemetry::{
    AccessLogSettings, EdgeKey, Flags, Outcome, Peer, Protocol, Reporter, Settings, Telemetry,
};
use sheetbend_proxy::traffic::balance::{self, Load, Member};
use sheetbend_proxy::traffic::choice::Choice;
use sheetbend_proxy::traffic::outlier::{Detection, Floor, Vitals};
use sheetbend_proxy::traffic::retry::Budget;

use self::mesh::{Mesh, PATIENCE};

/// As in the program.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

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

/// Waits until `target` is known to have so many endpoints.
async fn known(discovery: &Discovery, target: &Target, endpoints: usize) {
    let registered = async {
        let mut changes = discovery.subscribe();
        loop {
            if let Ok(Resolution::Mesh(mesh)) = discovery.resolve(target).await
                && mesh.clusters.values().map(|cluster| cluster.endpoints.len()).sum::<usize>() == endpoints
            {
                return;
            }
            changes.changed().await.expect("discovery goes on");
        }
    };
    tokio::time::timeout(PATIENCE, registered).await.expect("the service registers");
}

/// The promise: a thousand rules, matched in less than a microsecond.
fn matching(c: &mut Criterion) {
    let rule = |path| Rule {
        name: "default/web#0".into(),
        matches: vec![Match { path: Some(path), ..Match::default() }],
        backends: vec![Backend { cluster: "web.default:80".into(), weight: 1, headers: Default::default() }],
        policy: Arc::default(),
    };
    let path = |n: usize| format!("/shop/{}/products/{n}", n % 7);
    let exact: Vec<Rule> = (0..1_000).map(|n| rule(PathMatch::Exact(path(n).into()))).collect();
    let prefixes: Vec<Rule> = (0..1_000).map(|n| rule(PathMatch::Prefix(path(n).into()))).collect();
    let mut group = c.benchmark_group("match");
    for (name, rules, below) in [("1,000 exact paths", exact, ""), ("1,000 prefixes", prefixes, "/reviews/12?page=2")] {
        let index = Index::new(&rules);
        let head = Request::get(format!("{}{below}", path(997))).body(()).expect("a request").into_parts().0;
        assert_eq!(index.find(&head).map(|found| found.rule), Some(997));
        group.bench_function(name, |b| b.iter(|| index.find(black_box(&head))));
    }
}

fn routing(c: &mut Criterion) {
    const ENDPOINTS: usize = 3;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let target = Target::new("web", 8000).expect("a target");
    let (routes, discovery, _running) = runtime.block_on(async {
        let mesh = Mesh::start().await;
        let mut servers = Vec::new();
        for _ in 0..ENDPOINTS {
            servers.push(mesh.sidecar("web", Some(([127, 0, 0, 1], target.port()).into())).await);
        }
        let discovery = mesh.discovery("caller").await;
        known(&discovery, &target, ENDPOINTS).await;
        let routes = Routes::default();
        let first = routes.to(&target, &discovery, &Arc::default(), false, &telemetry()).await;
        assert!(first.is_ok_and(|route| route.destination().is_some()), "a route in the mesh");
        (routes, discovery, (mesh, servers))
    });
    let head = typical_request();
    let mut group = c.benchmark_group("route");
    group.bench_function("to a known target", |b| {
        b.iter(|| routes.known(black_box(&target), &discovery, false));
    });
    let route = routes.known(&target, &discovery, false).expect("a known target");
    group.bench_function(format!("endpoint of {ENDPOINTS}"), |b| {
        b.iter(|| {
            let choice = route.choose(black_box(&head));
            route
                .pick(choice.endpoints.expect("endpoints"), &Caller::default(), &[], true, Duration::from_secs(5))
                .map(drop)
        });
    });
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
                balance::pick(len, black_box(chance), |at| loads.get(at).map_or(f64::MAX, |load| load.cost(now)))
            });
        });
    }
    kinds_of_ten_thousand(&mut group);
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

/// Each kind of balancer, through the floor as a request's way has it, with 10,000 endpoints of two weights.
fn kinds_of_ten_thousand(group: &mut BenchmarkGroup<'_, WallTime>) {
    const ENDPOINTS: u32 = 10_000;
    let hash = ConsistentHash { use_source_ip: Some(true), ..ConsistentHash::default() };
    let kind = |simple| LoadBalancer { simple: Some(simple), ..LoadBalancer::default() };
    let kinds = [
        ("peak EWMA", kind(Simple::PeakEwma)),
        ("least request", kind(Simple::LeastRequest)),
        ("round robin", kind(Simple::RoundRobin)),
        ("random", kind(Simple::Random)),
        ("ring hash", LoadBalancer { consistent_hash: Some(hash), ..LoadBalancer::default() }),
    ];
    let now = Duration::from_secs(5);
    let vitals: Arc<[Arc<Vitals>]> = (0..ENDPOINTS).map(|_| Arc::default()).collect();
    let floor = Floor::default();
    floor.follow(&vitals, &Detection::DEFAULT, now, || true);
    for (name, policy) in kinds {
        let address = |number: u32| ([127, 1, (number >> 8) as u8, number as u8], 80).into();
        let members = (0..ENDPOINTS).map(|number| Member { number, address: address(number), weight: 1 + number % 2 });
        let mut chance = 1u64;
        let mut next = || {
            chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            chance.rotate_left(24) ^ chance
        };
        let choice = Choice::new(Arc::clone(&vitals), vec![members.collect()], &policy, &mut next);
        group.bench_function(format!("pick of {ENDPOINTS} by {name}"), |b| {
            b.iter(|| {
                let place = black_box(next());
                floor.pick(&vitals, true, now, || choice.pick(Some(place), |_| false, now, &mut next))
            });
        });
    }
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
                let known = Known::of(&head.headers);
                headers::check_framing(&head, known).ok();
                headers::strip_ours(&mut head.headers, known);
                headers::strip_hop_by_hop(&mut head.headers, known);
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

fn telemetry() -> Arc<Telemetry> {
    Telemetry::new(Settings {
        identity: "spiffe://cluster.local/ns/default/sa/web".parse().expect("a SPIFFE id"),
        service: ServiceName { service: "web".into(), namespace: "default".into() },
        access_log: AccessLogSettings::default(),
    })
}

fn counting(c: &mut Criterion) {
    let edge = telemetry().edge(EdgeKey {
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

criterion_group!(small, detection, matching, snapshot::swapping, routing, balancing, header_handling, counting);
criterion_main!(small);
