use super::*;
use proptest::prelude::*;

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
const CART: &str = "spiffe://cluster.local/ns/default/sa/cart";

fn mesh() -> MergedGraph {
    MergedGraph::new("cluster.local", "mesh", Arrival::Reported)
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn delta(reporter: v1::Reporter, source: &str, destination: &str, requests: u64) -> EdgeDelta {
    EdgeDelta {
        reporter: reporter.into(),
        source: source.into(),
        destination: destination.into(),
        protocol: "http".into(),
        mtls: true,
        requests,
        latency: vec![v1::BucketCount { bucket: 100, count: requests }],
        ..EdgeDelta::default()
    }
}

fn report(instance: &str, deltas: Vec<EdgeDelta>) -> EdgeReport {
    EdgeReport { deltas, instance: instance.into() }
}

#[test]
fn the_sources_numbers_are_the_edges_and_the_destinations_stand_beside_them() {
    let mut graph = mesh();
    graph.apply(at(5), WEB, &report("w", vec![delta(v1::Reporter::Source, "", "cart.default:80", 50)]));
    graph.apply(at(5), CART, &report("c", vec![delta(v1::Reporter::Destination, WEB, "cart.default:80", 49)]));
    let graph = graph.snapshot(at(6));
    let [edge] = graph.edges.as_slice() else { panic!("one edge, not {:?}", graph.edges) };
    assert_eq!((edge.source.as_str(), edge.destination.as_str(), edge.port), ("web.default", "cart.default", Some(80)));
    assert_eq!((edge.reporter, edge.mtls), (Reporter::Source, true));
    assert_eq!((edge.last_minute.requests, edge.last_minute.rate), (50, 10.0));
    assert_eq!(edge.at_destination.as_ref().map(|d| d.last_minute.requests), Some(49));
    assert_eq!(graph.nodes.iter().map(|n| n.id.as_str()).collect::<Vec<_>>(), ["cart.default", "web.default"]);
}

#[test]
fn an_edge_only_the_destination_reports_is_shown_with_its_numbers() {
    let mut graph = mesh();
    graph.apply(at(5), CART, &report("c", vec![delta(v1::Reporter::Destination, "", "cart.default:80", 3)]));
    let graph = graph.snapshot(at(6));
    assert_eq!(graph.edges[0].source, "unknown");
    assert_eq!((graph.edges[0].reporter, graph.edges[0].since_start.requests), (Reporter::Destination, 3));
}

#[test]
fn nobody_reports_in_anothers_name() {
    let mut graph = mesh();
    let lies = vec![
        delta(v1::Reporter::Source, CART, "db.default:5432", 1),
        delta(v1::Reporter::Destination, CART, "ledger.bank:443", 1_000_000),
    ];
    graph.apply(at(5), WEB, &report("w", lies));
    let graph = graph.snapshot(at(6));
    assert_eq!(graph.edges.len(), 1);
    assert_eq!(graph.edges[0].source, "web.default");
}

#[test]
fn what_an_instance_had_open_is_closed_when_it_goes_away() {
    let mut graph = mesh();
    let opened = EdgeDelta {
        connections_opened: 7,
        connections_closed: 2,
        protocol: "tcp".into(),
        ..delta(v1::Reporter::Source, "", "db.default:5432", 0)
    };
    graph.apply(at(5), WEB, &report("w1", vec![opened.clone()]));
    graph.apply(at(5), WEB, &report("w2", vec![opened]));
    assert_eq!(graph.snapshot(at(6)).edges[0].open_connections, 10);
    graph.instance_gone(at(7), WEB, "w1");
    graph.instance_gone(at(7), WEB, "w2");
    graph.apply(at(10), WEB, &report("w2", Vec::new()));
    assert_eq!(graph.snapshot(at(10)).edges[0].open_connections, 10, "a stream may be made anew");
    graph.forget(at(23));
    assert_eq!(graph.snapshot(at(23)).edges[0].open_connections, 5);
    graph.forget(at(41));
    assert_eq!(graph.snapshot(at(41)).edges[0].open_connections, 0);
    graph.forget(at(400));
    assert_eq!(graph.snapshot(at(400)).edges, []);
}

#[test]
fn a_flood_of_edges_ends_in_other() {
    let mut graph = mesh();
    let deltas = (0..2000).map(|n| delta(v1::Reporter::Source, "", &format!("s{n}.default:80"), 1)).collect();
    graph.apply(at(5), WEB, &report("w", deltas));
    let graph = graph.snapshot(at(6));
    assert_eq!(graph.edges.len(), MAX_EDGES_AN_INSTANCE + 1);
    assert!(graph.edges.iter().any(|e| e.source == "other" && e.last_minute.requests == 544));
}

#[test]
fn an_account_that_serves_one_service_is_shown_under_its_name() {
    let mut graph = mesh();
    let account = "spiffe://cluster.local/ns/shop/sa/cart-account";
    graph.apply(
        at(5),
        account,
        &report(
            "c",
            vec![
                delta(v1::Reporter::Destination, WEB, "cart.shop:80", 1),
                delta(v1::Reporter::Source, "", "db.shop:5432", 1),
            ],
        ),
    );
    let ids: Vec<_> = graph.snapshot(at(6)).nodes.into_iter().map(|n| n.id).collect();
    assert_eq!(ids, ["cart.shop", "db.shop", "web.default"]);
}

#[test]
fn an_address_outside_is_external_and_garbage_too() {
    for outside in ["10.1.2.3:443", "[fd00::1]:443", "external", "", "<script>:80", "a b.c:1", "\u{1b}[31m.x:2"] {
        assert_eq!(destination_of(outside), EXTERNAL, "{outside:?}");
    }
    assert_eq!(destination_of("web.default:80"), "web.default:80");
}

proptest! {
    #[test]
    fn no_report_breaks_the_graph(
        texts in proptest::collection::vec((".{0,30}", ".{0,30}", "(http|tcp|x)", 0i32..4, any::<u64>(), any::<u32>()), 0..20),
    ) {
        let mut graph = mesh();
        let deltas = texts.iter().map(|(source, destination, protocol, reporter, n, bucket)| EdgeDelta {
            reporter: *reporter,
            source: source.clone(),
            destination: destination.clone(),
            protocol: protocol.clone(),
            requests: *n,
            connections_closed: *n,
            latency: vec![v1::BucketCount { bucket: *bucket, count: *n }; 3],
            ..EdgeDelta::default()
        }).collect();
        graph.apply(at(5), WEB, &report("w", deltas));
        graph.snapshot(at(6));
    }
}
