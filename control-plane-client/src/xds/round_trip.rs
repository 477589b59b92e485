//! Whatever the control plane says, the proxy understands exactly that.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::google::protobuf::{Any, UInt32Value};
use envoy_types::util::pack_any;
use proptest::prelude::*;
use prost::{Message, Name};
use serde_json::json;

use super::decode::{self, Decoded};
use super::{DecodeError, INBOUND, Kind, MESH, ROOT_CA, encode};
use crate::model::*;

fn name() -> impl Strategy<Value = Arc<str>> {
    "[a-z][a-z0-9-]{0,8}".prop_map(Arc::from)
}

fn service_port() -> impl Strategy<Value = ServicePort> {
    (name(), name(), 1..=u16::MAX)
        .prop_map(|(service, namespace, port)| ServicePort { service: ServiceName { service, namespace }, port })
}

fn transport() -> impl Strategy<Value = Transport> {
    let id = |name: Arc<str>| format!("spiffe://cluster.local/ns/default/sa/{name}").parse().unwrap();
    prop_oneof![
        name().prop_map(move |n| Transport::Sheetbend(id(n))),
        name().prop_map(move |n| Transport::MutualTls(id(n))),
        Just(Transport::Plain),
    ]
}

fn endpoints() -> impl Strategy<Value = Vec<Endpoint>> {
    let address = (any::<[u8; 3]>(), 1..=u16::MAX, any::<bool>()).prop_map(|([a, b, c], port, v6)| match v6 {
        true => SocketAddr::new(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 1, u16::from(a)).into(), port),
        false => SocketAddr::new(std::net::Ipv4Addr::new(127, a, b, c).into(), port),
    });
    let standing = (1..=u32::MAX, 0..3u32, prop_oneof![Just(Arc::from("")), name()])
        .prop_map(|(weight, priority, zone)| Standing { weight, priority, zone });
    let one = (transport(), standing, prop_oneof![Just(Arc::from("")), name()]);
    prop::collection::btree_map(address, one, 0..6).prop_map(|found| {
        let endpoint = |(address, (transport, standing, workload))| Endpoint { address, transport, standing, workload };
        found.into_iter().map(endpoint).collect()
    })
}

fn pattern() -> impl Strategy<Value = Pattern> {
    "/[a-z]{0,4}(\\.\\*|\\[0-9\\]\\+|\\\\d)?".prop_map(|text| text.parse().unwrap())
}

fn condition() -> impl Strategy<Value = Match> {
    let path = prop_oneof![
        "/[a-z/.]{0,10}".prop_map(|p| PathMatch::Exact(p.into())),
        Just(PathMatch::Prefix("/".into())),
        "/[a-z/]{0,8}[a-z]".prop_map(|p| PathMatch::Prefix(p.into())),
        pattern().prop_map(PathMatch::Regex),
    ];
    let method = prop::option::of(prop::sample::select(vec!["GET", "POST"]).prop_map(Arc::from));
    let value =
        || prop_oneof!["[ -~]{0,8}".prop_map(|v| TextMatch::Exact(v.into())), pattern().prop_map(TextMatch::Regex)];
    let header = ("x-[a-z]{1,6}".prop_map(Arc::from), value());
    let query = ("[a-zA-Z]{1,6}".prop_map(Arc::from), value());
    (prop::option::of(path), method, prop::collection::vec(header, 0..3), prop::collection::vec(query, 0..3))
        .prop_map(|(path, method, headers, query)| Match { path, method, headers, query })
        .prop_filter("a condition that takes everything is written as none", |m| *m != Match::default())
}

/// One that says something for every second rule.
fn rule_policy(at: usize) -> Arc<RulePolicy> {
    let request = (at % 2 == 1).then_some(Duration::from_millis(1_500));
    let rate = RateLimit {
        name: "default/web#0".into(),
        requests: 10,
        interval: Duration::from_secs(1),
        burst: Some(20),
        for_each: ForEach::Header("x-key".into()),
    };
    let concurrency = Concurrency {
        max_requests: 5,
        max_pending: Some(4),
        max_retries: Some(0),
        pending_timeout: Duration::from_secs(1),
        stall_timeout: None,
        exempt_paths: Vec::new(),
    };
    let limits = match at.is_multiple_of(2) {
        true => TrafficLimits { rates: vec![rate], concurrency: Some(concurrency) },
        false => TrafficLimits::default(),
    };
    let timeouts = Timeouts { request, stream_idle: request, ..Timeouts::default() };
    let retry = Retry {
        attempts: request.map(|_| 3),
        codes: vec![500; at % 3],
        on: vec![RetryOn::Unavailable; at % 2],
        non_idempotent: at % 2 == 1,
        ..Retry::DEFAULT
    };
    Arc::new(RulePolicy {
        place: "web.yaml:1".into(),
        timeouts,
        limits,
        filters: filters(at),
        faults: faults(at),
        retry,
    })
}

fn edits(at: usize) -> HeaderEdits {
    let pair = |name: &str| vec![(name.into(), "50% of it".into())];
    let edit = HeaderEdit { set: pair("x-set"), add: pair("x-add"), remove: vec!["x-remove".into()] };
    HeaderEdits { request: if at.is_multiple_of(2) { edit.clone() } else { HeaderEdit::default() }, response: edit }
}

fn filters(at: usize) -> Filters {
    let path = match at.is_multiple_of(2) {
        true => PathEdit::ReplaceFullPath("/new".into()),
        false => PathEdit::ReplacePrefixMatch("/".into()),
    };
    let rewrite = Rewrite { hostname: Some("other.example".into()), path: Some(path.clone()) };
    let redirect =
        Redirect { scheme: Some("https".into()), hostname: None, path: Some(path), port: Some(444), status_code: 308 };
    match at % 3 {
        0 => Filters::default(),
        1 => Filters { headers: edits(at), rewrite: Some(rewrite), redirect: None },
        _ => Filters { headers: edits(at), rewrite: None, redirect: Some(redirect) },
    }
}

fn faults(at: usize) -> Vec<Fault> {
    let fault = Fault {
        name: "default/chaos".into(),
        place: "chaos.yaml:1".into(),
        headers: vec![("x-chaos".into(), TextMatch::Regex("a.*".parse().unwrap()))],
        delay: Some(Delay { percentage: 12.5, fixed_delay: Duration::from_millis(1_500) }),
        abort: Some(Abort { percentage: 0.1, http_status: Some(418), grpc_status: None }),
    };
    if at.is_multiple_of(2) { vec![fault] } else { Vec::new() }
}

fn backend_policy(at: usize) -> Arc<BackendPolicy> {
    let http = HttpPool { http2_max_requests: Some(7), max_retries: Some(0), ..HttpPool::default() };
    let (connect_timeout, idle_timeout) = (Some(Duration::from_millis(300)), Some(Duration::ZERO));
    let tcp = TcpPool { max_connections: Some(3), connect_timeout, idle_timeout };
    let pool = ConnectionPool { tcp, http };
    let detection = OutlierDetection { consecutive_5xx_errors: Some(3), ..OutlierDetection::default() };
    let hash = ConsistentHash { http_header_name: Some("x-user".into()), ..ConsistentHash::default() };
    let warmup = Warmup { duration: Duration::from_secs(30), minimum_percent: Some(12.5), aggression: None };
    let balancer = match at % 3 {
        0 => LoadBalancer { consistent_hash: Some(hash), ..LoadBalancer::default() },
        _ => LoadBalancer { simple: Some(Simple::RoundRobin), warmup: Some(warmup), ..LoadBalancer::default() },
    };
    let check = HealthCheck { grpc: Some(GrpcCheck::default()), ..HealthCheck::default() };
    Arc::new(BackendPolicy {
        place: "web.yaml:9".into(),
        outlier_detection: (at % 2 == 1).then_some(detection),
        load_balancer: Some(balancer),
        health_check: at.is_multiple_of(2).then_some(check),
        connection_pool: at.is_multiple_of(2).then_some(pool),
        circuit_breaker: (at % 3 == 1).then(CircuitBreaker::default),
        retry_constraint: (at % 3 == 1).then_some(RetryConstraint::DEFAULT),
    })
}

/// With edits for some; and none at all for some rules, which answer 404.
fn to(cluster: &ClusterName, weight: u32) -> Backend {
    let headers = if weight.is_multiple_of(2) { edits(1) } else { HeaderEdits::default() };
    Backend { cluster: cluster.clone(), weight, headers }
}

/// Which of the clusters, and its weight.
type Choice = (prop::sample::Index, u32);

fn destination() -> impl Strategy<Value = Destination> {
    use AppProtocol::*;
    let protocol = prop::sample::select(vec![Detect, Http, Http2, Grpc, Tcp, Tls]);
    let clusters = prop::collection::btree_map(name(), (service_port(), endpoints()), 1..4);
    let choices = prop::collection::vec((any::<prop::sample::Index>(), 1..=u32::MAX / 8), 0..4);
    let rules = prop::collection::vec((prop::collection::vec(condition(), 0..3), choices), 0..4);
    (service_port(), name(), protocol, rules, clusters).prop_map(|(name, trust_domain, protocol, rules, clusters)| {
        let names: Vec<ClusterName> = clusters.keys().cloned().collect();
        let opaque = matches!(protocol, Tcp | Tls);
        let rule = |(at, (matches, backends)): (usize, (Vec<Match>, Vec<Choice>))| Rule {
            name: format!("default/route#{at}").into(),
            matches,
            backends: match filters(at).redirect {
                Some(_) => Vec::new(),
                None => backends.into_iter().map(|(which, weight)| to(which.get(&names), weight)).collect(),
            },
            policy: rule_policy(at),
        };
        let cluster = |(name, (service, endpoints)): (ClusterName, (ServicePort, Vec<Endpoint>))| {
            let external = (endpoints.len() % 2 == 1).then(|| "api.example.com:443".parse().unwrap());
            let policy = backend_policy(endpoints.len());
            (name.clone(), Arc::new(Cluster { name, service, policy, endpoints, external }))
        };
        let connection = |at: usize| ConnectionRule {
            name: format!("default/tls#{at}").into(),
            place: "tls.yaml:7".into(),
            hostname: [None, Some("*.db.example".into()), Some("db.example".into())][at % 3].clone(),
            backends: names
                .iter()
                .take(at)
                .map(|name| ConnectionBackend { cluster: name.clone(), weight: 7 })
                .collect(),
        };
        Destination {
            name,
            trust_domain,
            protocol,
            connections: if opaque { (0..rules.len()).map(connection).collect() } else { Vec::new() },
            rules: if opaque { Vec::new() } else { rules.into_iter().enumerate().map(rule).collect() },
            default_cluster: names[0].clone(),
            clusters: clusters.into_iter().map(cluster).collect(),
        }
    })
}

/// Over the wire and back: bytes, not values.
fn over<M: Message + Name + Default>(kind: Kind, name: &str, message: M) -> Result<Decoded, DecodeError> {
    let packed = encode::resource(name, "1", message).resource.unwrap();
    decode::resource(kind, name, &Any::decode(&packed.encode_to_vec()[..]).unwrap())
}

/// All the resources of a destination, decoded and put together again.
fn there_and_back(target: &Target, sent: &Destination) -> Result<Destination, DecodeError> {
    let Decoded::Listener(listener) = over(Kind::Listener, &target.to_string(), encode::listener(target, sent))? else {
        panic!("a listener decodes to a listener");
    };
    let (rules, default_cluster) = match &listener.routes {
        None => (Vec::new(), listener.opaque.clone().unwrap()),
        Some(name) => match over(Kind::Routes, name, encode::route_configuration(sent))? {
            Decoded::Routes(routes) => (routes.rules.clone(), routes.default_cluster.clone()),
            other => panic!("routes decode to routes, not {other:?}"),
        },
    };
    let mut clusters = BTreeMap::new();
    for (name, cluster) in &sent.clusters {
        let packed = encode::cluster(cluster, &sent.trust_domain, sent.protocol);
        let Decoded::Cluster(head) = over(Kind::Cluster, name, packed)? else { panic!("a cluster") };
        let decode::ClusterHead { service, policy, external } = decode::ClusterHead::clone(&head);
        let packed = encode::load_assignment(cluster);
        let Decoded::Endpoints(endpoints) = over(Kind::Endpoints, name, packed)? else { panic!("endpoints") };
        let cluster = Cluster { name: name.clone(), service, endpoints: endpoints.to_vec(), external, policy };
        clusters.insert(name.clone(), Arc::new(cluster));
    }
    Ok(Destination {
        name: listener.name.clone(),
        trust_domain: listener.trust_domain.clone(),
        protocol: listener.protocol,
        rules,
        connections: listener.connections.clone(),
        default_cluster,
        clusters,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_destination_survives_the_wire(destination in destination()) {
        let target: Target = "web:80".parse().unwrap();
        prop_assert_eq!(there_and_back(&target, &destination).unwrap(), destination);
    }

    #[test]
    fn equal_content_has_equal_versions(destination in destination()) {
        let text = serde_json::to_string(&destination).unwrap();
        let again: Destination = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(encode::version(&destination), encode::version(&again));
        let other = Destination { default_cluster: "other".into(), ..again };
        prop_assert_ne!(encode::version(&destination), encode::version(&other));
    }

    #[test]
    fn no_bytes_crash_the_decoder(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for kind in Kind::ALL {
            let payload = Any { type_url: kind.type_url().to_string(), value: bytes.clone() };
            let _ = decode::resource(kind, "web:80", &payload);
        }
    }
}

#[test]
fn what_the_mesh_is_survives_the_wire() {
    let sent = Mesh {
        trust_domain: "cluster.local".into(),
        ranges: vec!["127.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        domains: vec!["svc.cluster.local".into()],
        outbound_policy: OutboundPolicy::Deny,
    };
    assert_eq!(over(Kind::Listener, MESH, encode::mesh(&sent)), Ok(Decoded::Mesh(sent.into())));
}

#[test]
fn what_holds_for_callers_survives_the_wire() {
    let policy = json!({
        "name": "default/web", "action": "DENY", "dryRun": true,
        "rules": [{
            "from": [{"principals": ["cluster.local/ns/a/sa/b", "*/sa/c"], "notNamespaces": ["d*"],
                "trustDomains": ["*"], "notIpBlocks": ["10.0.0.0/8", "fd00::/8"]}],
            "to": [{"hosts": ["*.example"], "ports": [80], "methods": ["GET"], "notPaths": ["/a/*"]}],
            "when": [{"key": "request.headers[x-team]", "values": ["a", "b*"]},
                {"key": "request.auth.claims[orgs][role]", "notValues": ["c"]}],
        }],
    });
    let key = json!({"kid": "a", "key": {"EdDSA": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}}); // RFC 8037 A.2
    let sent: InboundPolicy = serde_json::from_value(json!({
        "access": {
            "default": "MeshOnly",
            "policies": [policy],
            "issuers": [{"issuer": "https://issuer", "audiences": ["web"], "keys": [key]}],
        },
        "limits": {
            "rates": [{"name": "default/web#0", "requests": 5, "interval": "1s", "burst": 9, "forEach": "Caller"}],
            "concurrency": {"maxRequests": 7, "maxPending": 2, "pendingTimeout": "100ms", "exemptPaths": ["/live"]},
        },
    }))
    .unwrap();
    assert_ne!(sent, InboundPolicy::default());
    assert_eq!(over(Kind::Listener, INBOUND, encode::inbound(&sent)), Ok(Decoded::Inbound(sent.into())));
    let mut wrong: InboundPolicy = InboundPolicy::default();
    wrong.access.issuers.push(TokenIssuer { issuer: "https://issuer".into(), ..TokenIssuer::default() });
    let refused = over(Kind::Listener, INBOUND, encode::inbound(&wrong)).unwrap_err();
    assert!(refused.to_string().contains("jwks"), "{refused}");
}

#[test]
fn a_policy_that_cannot_be_obeyed_is_refused_where_it_arrives() {
    let (request, backend_request) = (Some(Duration::from_secs(1)), Some(Duration::from_secs(2)));
    let timeouts = Timeouts { request, backend_request, ..Timeouts::default() };
    let policy = Arc::new(RulePolicy { timeouts, ..RulePolicy::default() });
    let rule = Rule { name: "default/r#0".into(), matches: vec![], backends: to_web(), policy };
    let sent = Destination { rules: vec![rule], ..web() };
    let refused = over(Kind::Routes, "web.default:80", encode::route_configuration(&sent)).unwrap_err();
    assert!(refused.to_string().contains("timeouts.backendRequest"), "{refused}");
}

#[test]
fn the_bundle_survives_the_wire() {
    let sent = "-----BEGIN CERTIFICATE-----\n";
    assert_eq!(over(Kind::Secret, ROOT_CA, encode::root_ca(sent)), Ok(Decoded::RootCa(sent.into())));
}

#[test]
fn a_cluster_with_meshed_endpoints_alone_offers_a_foreign_peer_no_plain_socket() {
    let cluster = Cluster { endpoints: vec![sheetbend_endpoint("127.0.0.1:80")], ..empty_cluster() };
    let encoded = encode::cluster(&cluster, "cluster.local", AppProtocol::Http);
    let names: Vec<_> = encoded.transport_socket_matches.iter().map(|socket| socket.name.as_str()).collect();
    assert_eq!(names, ["mtls"]);
}

#[test]
fn a_payload_of_another_name_is_refused() {
    let error = over(Kind::Endpoints, "other.default:80", encode::load_assignment(&empty_cluster())).unwrap_err();
    assert_eq!(error.to_string(), "`name`: `web.default:80` inside");
}

#[test]
fn a_payload_of_another_type_is_refused() {
    let payload = pack_any(encode::load_assignment(&empty_cluster()));
    let error = decode::resource(Kind::Cluster, "web.default:80", &payload).unwrap_err();
    assert!(matches!(error, DecodeError::WrongType { .. }), "{error}");
}

#[test]
fn a_meshed_endpoint_without_an_identity_is_refused_rather_than_dialed_in_plain() {
    let cluster = Cluster { endpoints: vec![sheetbend_endpoint("127.0.0.1:80")], ..empty_cluster() };
    let mut assignment = encode::load_assignment(&cluster);
    let metadata = assignment.endpoints[0].lb_endpoints[0].metadata.as_mut().unwrap();
    metadata.filter_metadata.get_mut(super::WORDS).unwrap().fields.remove("identity");
    assert_eq!(decode::endpoints(&assignment), Err(DecodeError::Missing("endpoint.metadata.identity")));
}

#[test]
fn an_endpoint_without_our_words_is_refused_rather_than_dialed_in_plain() {
    let cluster = Cluster { endpoints: vec![sheetbend_endpoint("127.0.0.1:80")], ..empty_cluster() };
    let mut assignment = encode::load_assignment(&cluster);
    assignment.endpoints[0].lb_endpoints[0].metadata = None;
    assert!(matches!(decode::endpoints(&assignment), Err(DecodeError::Missing(_))));
}

#[test]
fn more_endpoints_than_a_proxy_takes_are_refused() {
    let endpoint = |n: u32| sheetbend_endpoint(&format!("127.{}.{}.1:80", n >> 8, n & 255));
    let cluster = Cluster { endpoints: (0..=decode::MAX_ENDPOINTS as u32).map(endpoint).collect(), ..empty_cluster() };
    let error = decode::endpoints(&encode::load_assignment(&cluster)).unwrap_err();
    assert_eq!(error.to_string(), "10001 endpoints, at most 10000 are taken");
}

#[test]
fn a_condition_that_is_not_known_is_refused_rather_than_left_out() {
    let destination = Destination {
        rules: vec![Rule { name: "default/r#0".into(), matches: vec![], backends: to_web(), policy: Arc::default() }],
        ..web()
    };
    let mut routes = encode::route_configuration(&destination);
    let condition = routes.virtual_hosts[0].routes[0].r#match.as_mut().unwrap();
    condition.cookies.push(rds::CookieMatcher { name: "c".into(), ..Default::default() });
    let error = decode::routes(&routes).unwrap_err();
    assert!(error.to_string().contains("only path, method, header and query"), "{error}");
    let condition = routes.virtual_hosts[0].routes[0].r#match.as_mut().unwrap();
    condition.cookies.clear();
    condition.query_parameters.push(rds::QueryParameterMatcher { name: "q".into(), ..Default::default() });
    let error = decode::routes(&routes).unwrap_err();
    assert!(error.to_string().contains("only exact values and patterns"), "{error}");
}

#[test]
fn weights_that_are_all_zero_are_refused() {
    let backends = vec![to(&"web.default:80".into(), 0)];
    let rule = Rule { name: "default/r#0".into(), matches: vec![], backends, policy: Arc::default() };
    let error = decode::routes(&encode::route_configuration(&Destination { rules: vec![rule], ..web() })).unwrap_err();
    assert!(error.to_string().contains("no backend has any weight"), "{error}");
}

#[test]
fn a_listener_without_any_way_on_is_refused() {
    let target: Target = "web:80".parse().unwrap();
    let bare = lds::Listener {
        filter_chains: vec![],
        ..encode::listener(&target, &Destination { protocol: AppProtocol::Http, ..web() })
    };
    assert_eq!(decode::listener(&bare), Err(DecodeError::Missing("filter_chains")));
}

fn sheetbend_endpoint(address: &str) -> Endpoint {
    let id = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
    Endpoint {
        address: address.parse().unwrap(),
        transport: Transport::Sheetbend(id),
        standing: Standing::default(),
        workload: "".into(),
    }
}

fn web_port() -> ServicePort {
    ServicePort { service: ServiceName { service: "web".into(), namespace: "default".into() }, port: 80 }
}

fn to_web() -> Vec<Backend> {
    vec![to(&"web.default:80".into(), 1)]
}

fn empty_cluster() -> Cluster {
    Cluster {
        name: "web.default:80".into(),
        service: web_port(),
        endpoints: vec![],
        external: None,
        policy: Arc::default(),
    }
}

fn web() -> Destination {
    Destination {
        name: web_port(),
        trust_domain: "cluster.local".into(),
        protocol: AppProtocol::Detect,
        rules: vec![],
        connections: vec![],
        default_cluster: "web.default:80".into(),
        clusters: BTreeMap::from([("web.default:80".into(), Arc::new(empty_cluster()))]),
    }
}

#[test]
fn an_envoy_is_told_the_limits_in_its_own_words() {
    let cluster = Cluster {
        name: "web.default:80".into(),
        service: ServicePort { service: ServiceName { service: "web".into(), namespace: "default".into() }, port: 80 },
        endpoints: Vec::new(),
        external: None,
        policy: backend_policy(0),
    };
    let breakers = encode::cluster(&cluster, "cluster.local", AppProtocol::Http).circuit_breakers.unwrap();
    let threshold = &breakers.thresholds[0];
    let number = |found: &Option<_>| found.as_ref().map(|found: &UInt32Value| found.value);
    assert_eq!(number(&threshold.max_connections), Some(3));
    assert_eq!(number(&threshold.max_requests), Some(7));
    assert_eq!(number(&threshold.max_retries), Some(0));
    assert_eq!(number(&threshold.max_pending_requests), None);
}
