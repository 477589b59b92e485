//! Nobody scrapes, and nothing grows. In a process of its own, so that no other test's memory is measured.

use std::time::Duration;

use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_proxy::telemetry::{
    AccessLogSettings, EdgeKey, Flags, Outcome, Peer, Protocol, Reporter, Settings, Telemetry,
};

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

#[test]
fn five_million_requests_that_nobody_scrapes_take_no_more_memory_than_a_hundred_thousand() {
    let telemetry = Telemetry::new(Settings {
        identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
        service: ServiceName { service: "web".into(), namespace: "default".into() },
        access_log: AccessLogSettings::default(),
    });
    let edges: Vec<_> = (0..8)
        .map(|n| {
            telemetry.edge(EdgeKey {
                reporter: Reporter::Source,
                peer: Peer::Unknown,
                destination: format!("s{n}.default:80").into(),
                protocol: Protocol::Http,
                mtls: true,
            })
        })
        .collect();
    let run = |requests: u64| {
        for n in 0..requests {
            edges[(n % 8) as usize].request(&Outcome {
                status: if n % 100 == 0 { 503 } else { 200 },
                grpc_status: None,
                latency: Duration::from_micros(n * 7919 % 5_000_000),
                request_bytes: n % 1000,
                response_bytes: n % 100_000,
                flags: Flags::NONE,
            });
            if n % 50_000 == 0 {
                telemetry.tick();
            }
        }
    };
    run(100_000);
    let before = resident_kib();
    run(4_900_000);
    let after = resident_kib();
    assert!(after <= before + 5 * 1024, "{before} KiB after 100,000 requests, {after} KiB after 5,000,000");
    assert_eq!(telemetry.graph().edges.iter().map(|e| e.since_start.requests).sum::<u64>(), 5_000_000);
}
