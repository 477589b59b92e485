//! The graph page in a real Chromium: ten services, light and dark, wide and narrow.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sheetbend_control_plane_client::admin_http::{self, Answer};
use sheetbend_control_plane_client::graph::{Arrival, MergedGraph};
use sheetbend_control_plane_client::proto::v1::{BucketCount, EdgeDelta, EdgeReport, Reporter};
use sheetbend_tests::{need, program, tools, workspace};

/// Who calls whom in the shop: source, destination, protocol, requests in 5 s (connections for tcp), errors, latency
/// bucket.
const SHOP: [(&str, &str, &str, u64, u64, u32); 12] = [
    ("gateway", "web.default:8080", "http", 1062, 0, 125),
    ("web", "catalog.default:50051", "grpc", 901, 0, 100),
    ("web", "cart.default:80", "http2", 320, 1, 108),
    ("web", "recommend.default:80", "http", 205, 17, 137),
    ("web", "checkout.default:80", "http", 42, 0, 126),
    ("cart", "redis.default:6379", "tcp", 12, 0, 0),
    ("catalog", "postgres.default:5432", "tcp", 8, 0, 0),
    ("recommend", "catalog.default:50051", "grpc", 203, 0, 101),
    ("checkout", "cart.default:80", "http2", 41, 0, 106),
    ("checkout", "payment.default:50051", "grpc", 41, 0, 134),
    ("checkout", "mail.default:25", "tcp", 2, 0, 0),
    ("payment", "external", "tcp", 2, 0, 0),
];

/// The graph of a shop that has been at work for two minutes.
fn shop() -> MergedGraph {
    let mut graph = MergedGraph::new("cluster.local", "mesh", Arrival::Reported);
    let edge = |(_, destination, protocol, n, errors, bucket): (&str, &str, &str, u64, u64, u32)| {
        let opaque = protocol == "tcp";
        EdgeDelta {
            reporter: Reporter::Source.into(),
            destination: destination.into(),
            protocol: protocol.into(),
            mtls: destination != "external",
            requests: if opaque { 0 } else { n },
            errors,
            connections_opened: if opaque { n } else { 0 },
            connections_closed: if opaque { n - 1 } else { 0 },
            bytes_sent: n * 300,
            bytes_received: n * 2_000,
            latency: if opaque { Vec::new() } else { vec![BucketCount { bucket, count: n }] },
            ..EdgeDelta::default()
        }
    };
    for round in 1..=24 {
        let now = Duration::from_secs(5 * round);
        for line in SHOP {
            let identity = format!("spiffe://cluster.local/ns/default/sa/{}", line.0);
            // An instance an edge, so that one report of many edges and many reports of one are both told.
            graph.apply(now, &identity, &EdgeReport { deltas: vec![edge(line)], instance: line.1.into() });
        }
        let browser = EdgeDelta {
            reporter: Reporter::Destination.into(),
            mtls: false,
            ..edge(("", "gateway.default:8080", "http", 1062, 0, 126))
        };
        let gateway = "spiffe://cluster.local/ns/default/sa/gateway";
        graph.apply(now, gateway, &EdgeReport { deltas: vec![browser], instance: "inbound".into() });
    }
    graph
}

#[test]
fn ten_services_are_drawn_with_no_label_over_another_and_no_complaint_in_the_console() {
    let node = need!(program("node"));
    let chromium = need!(program("chromium"));
    let playwright = tools().join("node/node_modules/playwright-core");
    let playwright = need!(
        playwright
            .exists()
            .then_some(playwright)
            .ok_or("no playwright-core; `make test` installs it into target/tools".to_string())
    );

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let url = format!("http://{}/graph", listener.local_addr().unwrap());
    let (graph, now) = (shop(), Duration::from_secs(121));
    let (nodes, edges) = (graph.snapshot(now).nodes.len(), graph.snapshot(now).edges.len());
    runtime.spawn(admin_http::serve(listener, true, move |asked| Answer::graph(&asked, &graph.snapshot(now))));

    let mut command = Command::new("timeout");
    command.arg("300").arg(node).arg(workspace().join("tests/programs/graph_page.mjs"));
    command.arg(playwright).arg(chromium).arg(&url).arg((nodes + edges).to_string());
    if let Some(screenshot) = std::env::var_os("SHEETBEND_SCREENSHOT") {
        command.arg(screenshot);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();

    assert_eq!(seen["errors"], Value::Array(Vec::new()), "the console is silent");
    let requests = seen["requests"].as_array().unwrap();
    let own = |r: &Value| r.as_str().is_some_and(|r| r.starts_with(&url) || r.starts_with("data:"));
    assert!(requests.iter().all(own), "nothing is loaded from elsewhere: {requests:?}");
    assert_eq!(nodes, 12, "ten services, unknown callers, and what is outside");
    let looks = seen["looks"].as_array().unwrap();
    assert_eq!(looks.len(), 4, "light and dark, wide and narrow");
    for look in looks {
        let labels = look["labels"].as_array().unwrap();
        for (i, a) in labels.iter().enumerate() {
            for b in &labels[i + 1..] {
                assert!(!overlap(a, b), "{} lies over {}", a["text"], b["text"]);
            }
        }
        for text in look["texts"].as_array().unwrap() {
            assert!(within(text, &text["around"]), "{} stands out of its box", text["text"]);
        }
        assert_eq!(look["locks"], 11, "a lock on every edge under mutual TLS");
        let first_paint = look["first_paint"].as_f64().expect("a first paint");
        assert!(first_paint < 1000.0, "first paint after {first_paint} ms");
        assert_eq!(look["asks_again"], true);
        assert!(look["detail"].as_str().unwrap().contains("last minute"), "{look}");
        assert!(look["node"].as_str().is_some_and(|node| !node.is_empty()));
    }
    let texts = looks[0]["labels"].to_string();
    for said in ["web", "212/s", "8.3% err", "p99", "grpc", "redis"] {
        assert!(texts.contains(said), "{said} in {texts}");
    }
}

fn side(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap()
}

fn overlap(a: &Value, b: &Value) -> bool {
    side(a, "left") < side(b, "right")
        && side(b, "left") < side(a, "right")
        && side(a, "top") < side(b, "bottom")
        && side(b, "top") < side(a, "bottom")
}

fn within(a: &Value, b: &Value) -> bool {
    side(a, "left") >= side(b, "left") && side(a, "right") <= side(b, "right")
}
