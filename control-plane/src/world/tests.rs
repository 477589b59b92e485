use sheetbend_control_plane_client::model::{
    Abort, Action, AuthorizationPolicy, DefaultAccess, Fault, Match, PathMatch, TokenIssuer, TrafficLimits, Transport,
};

use super::*;
use crate::registry::Instance;
use crate::resources::{
    Authorization, FaultTarget, Faults, Limit, Parent, Ranked, Route, RouteBackend, RouteRule, RouteTarget, Service,
    Settings, Slice, TCP_ROUTE, TLS_ROUTE, Tokens,
};
use sheetbend_control_plane_client::registration::RegisteredPort;

fn registered(service: &str, ip: [u8; 4], port: u16, inbound: u16) -> Registered {
    let identity = format!("spiffe://cluster.local/ns/default/sa/{service}").parse().unwrap();
    Registered {
        instance: Instance { identity, node: format!("{service}-{inbound}").into() },
        address: ip.into(),
        ports: vec![RegisteredPort { port, inbound, protocol: AppProtocol::Detect }],
        also: Vec::new(),
        standing: Default::default(),
    }
}

fn world(registered: &[Registered], resources: &[Resource]) -> World {
    build(registered, resources, true, &World::default())
}

fn build(registered: &[Registered], resources: &[Resource], same_machine: bool, former: &World) -> World {
    let inputs = Inputs { trust_domain: "cluster.local".into(), registered, resources, same_machine };
    World::build(&inputs, former)
}

fn ask(world: &World, target: &str) -> Option<String> {
    let destination = world.resolve(&target.parse().unwrap(), "default")?;
    Some(destination.default_cluster.to_string())
}

fn name(service: &str) -> ServiceName {
    ServiceName { service: service.into(), namespace: "default".into() }
}

fn backend(service: &str, port: u16) -> RouteBackend {
    RouteBackend { at: Default::default(), service: name(service), port, weight: 1, headers: Default::default() }
}

#[test]
fn a_service_is_reached_by_every_one_of_its_names() {
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[]);
    let web = Some("web.default:8000".to_string());
    for host in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
        assert_eq!(ask(&world, &format!("{host}:8000")), web, "{host}");
        assert_eq!(ask(&world, &format!("{host}:80")), web, "{host} has one port");
    }
    for other in ["web:81", "web.other:8000", "db:8000", "example.org:80", "127.0.0.1:8000"] {
        assert_eq!(ask(&world, other), None, "{other}");
    }
    assert_eq!(ask(&world, "127.0.0.1:41000").unwrap(), "web.default:8000@127.0.0.1:41000");
    assert!(world.cluster("web.default:8000@127.0.0.1:41000").is_some());
    assert!(world.routes("web.default:8000@127.0.0.1:41000").is_some());
    assert!(world.cluster("db.default:8000@127.0.0.1:41000").is_none());
}

#[test]
fn a_proxy_is_meant_by_each_of_its_addresses_and_reached_for_others_by_the_first() {
    let mut one = registered("web", [192, 0, 2, 7], 8000, 8000);
    one.also = vec!["2001:db8::7".parse().unwrap()];
    let world = world(&[one], &[]);
    assert_eq!(ask(&world, "[2001:db8::7]:8000").unwrap(), "web.default:8000@[2001:db8::7]:8000");
    let cluster = world.cluster("web.default:8000").unwrap().cluster;
    let addresses: Vec<_> = cluster.endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect();
    assert_eq!(addresses, ["192.0.2.7:8000"]);
    assert!(world.cluster("web.default:8000@[2001:db8::7]:8000").is_some());
}

#[test]
fn an_address_that_two_claim_is_of_who_was_first() {
    let claims = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("a-thief", [127, 0, 0, 1], 1, 41000)];
    assert_eq!(ask(&world(&claims, &[]), "127.0.0.1:41000").unwrap(), "web.default:8000@127.0.0.1:41000");
}

#[test]
fn port_80_is_ambiguous_when_there_are_two() {
    let two = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("web", [127, 0, 0, 1], 9000, 41001)];
    assert_eq!(ask(&world(&two, &[]), "web:80"), None);
}

#[test]
fn loopback_endpoints_are_told_on_their_own_machine_only() {
    let both = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("web", [192, 0, 2, 7], 8000, 15106)];
    let far = build(&both, &[], false, &World::default());
    let cluster = far.cluster("web.default:8000").unwrap().cluster;
    assert_eq!(cluster.endpoints.len(), 1);
    assert_eq!(cluster.endpoints[0].address.to_string(), "192.0.2.7:15106");
}

#[test]
fn what_did_not_change_keeps_its_place_in_memory() {
    let mut all = vec![registered("web", [127, 0, 0, 1], 8000, 41000)];
    let first = world(&all, &[]);
    all.push(registered("db", [127, 0, 0, 1], 5432, 41001));
    let second = build(&all, &[], true, &first);
    let of = |world: &World| world.routes("web.default:8000").unwrap();
    assert!(Arc::ptr_eq(&of(&first), &of(&second)));
    assert!(Arc::ptr_eq(
        &first.cluster("web.default:8000").unwrap().cluster,
        &second.cluster("web.default:8000").unwrap().cluster
    ));
}

#[test]
fn a_service_resource_names_the_port_of_what_registers_behind_it() {
    let service = Service {
        name: name("web"),
        cluster_ips: vec![[10, 9, 8, 7].into()],
        external_name: None,
        ports: vec![crate::resources::ServicePort {
            name: "http".into(),
            port: 80,
            target: 8000,
            protocol: AppProtocol::Http,
        }],
    };
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[Resource::Service(service)]);
    assert_eq!(ask(&world, "10.9.8.7:80").unwrap(), "web.default:80");
    assert_eq!(world.cluster("web.default:80").unwrap().cluster.endpoints.len(), 1);
    assert_eq!(world.mesh.ranges.len(), 1);
}

#[test]
fn the_most_specific_match_comes_first_and_missing_backends_are_empty_clusters() {
    let path = |path| Ranked::http(Match { path: Some(path), ..Match::default() });
    let to = |service: &str| vec![backend(service, 8000)];
    let route = Route {
        kind: "HTTPRoute",
        name: name("split"),
        created: None,
        parents: vec![Parent { at: Default::default(), service: name("web"), port: None }],
        hostnames: vec![],
        rules: vec![
            RouteRule {
                at: Default::default(),
                matches: vec![path(PathMatch::Prefix("/a".into()))],
                backends: to("a"),
                policy: Arc::default(),
            },
            RouteRule { at: Default::default(), matches: Vec::new(), backends: to("rest"), policy: Arc::default() },
            RouteRule {
                at: Default::default(),
                matches: vec![path(PathMatch::Exact("/a".into()))],
                backends: to("exact"),
                policy: Arc::default(),
            },
        ],
    };
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[Resource::Route(route)]);
    let web = world.routes("web.default:8000").unwrap();
    let order: Vec<&str> = web.rules.iter().map(|r| &*r.backends[0].cluster).collect();
    assert_eq!(order, ["exact.default:8000", "a.default:8000", "rest.default:8000"]);
    assert!(web.clusters["a.default:8000"].endpoints.is_empty());
    assert_eq!(web.clusters.len(), 4);
}

#[test]
fn a_grpc_route_keeps_http_routes_away_from_its_port_and_from_no_other() {
    let route = |kind, to: &str, port| {
        let backends = vec![backend(to, 8000)];
        Resource::Route(Route {
            kind,
            name: name(to),
            created: None,
            parents: vec![Parent { at: Default::default(), service: name("web"), port }],
            hostnames: vec![],
            rules: vec![RouteRule { at: Default::default(), matches: Vec::new(), backends, policy: Arc::default() }],
        })
    };
    let two = [registered("web", [127, 0, 0, 1], 8000, 41000), registered("web", [127, 0, 0, 1], 9000, 41001)];
    let world = world(&two, &[route("HTTPRoute", "http", None), route("GRPCRoute", "grpc", Some(8000))]);
    let names = |port: &str| -> Vec<String> {
        world.routes(port).unwrap().rules.iter().map(|rule| rule.name.to_string()).collect()
    };
    assert_eq!(names("web.default:8000"), ["default/grpc#0"]);
    assert_eq!(names("web.default:9000"), ["default/http#0"]);
}

#[test]
fn who_may_call_is_told_anew_only_where_it_changed() {
    let settings = |default| {
        Resource::Settings(Settings {
            object: name("mesh"),
            trust_domain: None,
            mesh_ranges: Vec::new(),
            allowed_addresses: Vec::new(),
            outbound_policy: None,
            default_inbound_policy: Some(default),
        })
    };
    let web = [registered("web", [127, 0, 0, 1], 8000, 41000)];
    let allow = build(&web, &[settings(DefaultAccess::Allow)], true, &World::default());
    let again = build(&web, &[settings(DefaultAccess::Allow)], true, &allow);
    let deny = build(&web, &[settings(DefaultAccess::Allow), settings(DefaultAccess::Deny)], true, &again);
    for service in [name("web"), name("not-here-yet")] {
        assert!(Arc::ptr_eq(&allow.inbound(&service), &again.inbound(&service)), "{service}");
        assert_eq!(deny.inbound(&service).access.default, DefaultAccess::Deny, "{service}: the strictest wins");
    }
}

#[test]
fn requests_that_no_rule_takes_find_nothing_there() {
    let matches = vec![Ranked::http(Match { method: Some("GET".into()), ..Match::default() })];
    let backends = vec![backend("web", 8000)];
    let route = Route {
        kind: "HTTPRoute",
        name: name("get"),
        created: None,
        parents: vec![Parent { at: Default::default(), service: name("web"), port: None }],
        hostnames: vec![],
        rules: vec![RouteRule { at: Default::default(), matches, backends, policy: Arc::default() }],
    };
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &[Resource::Route(route)]);
    let web = world.routes("web.default:8000").unwrap();
    let last = web.rules.last().unwrap();
    assert_eq!((web.rules.len(), &*last.name, last.backends.len()), (2, "default/get#no-rule", 0));
}

#[test]
fn a_fault_happens_at_the_routes_of_its_service_or_where_there_is_none_to_all_of_it() {
    let abort = Some(Abort { percentage: 1.0, http_status: Some(503), grpc_status: None });
    let fault = Fault { name: "default/chaos".into(), place: "".into(), headers: vec![], delay: None, abort };
    let targets = vec![
        FaultTarget::Service(Parent { at: Default::default(), service: name("web"), port: Some(8000) }),
        FaultTarget::Route(RouteTarget { at: Default::default(), kind: "HTTPRoute", name: name("nine") }),
    ];
    let faults = Resource::Faults(Faults { object: name("chaos"), targets, fault: fault.clone() });
    let backends = vec![backend("web", 9000)];
    let route = Resource::Route(Route {
        kind: "HTTPRoute",
        name: name("nine"),
        created: None,
        parents: vec![Parent { at: Default::default(), service: name("web"), port: Some(9000) }],
        hostnames: vec![],
        rules: vec![RouteRule { at: Default::default(), matches: Vec::new(), backends, policy: Arc::default() }],
    });
    let web = |port: u16| registered("web", [127, 0, 0, 1], port, 32000 + port);
    let world = world(&[web(8000), web(9000), web(7000)], &[faults, route]);
    let rules = |port: &str| -> Vec<(String, usize)> {
        let rules = world.routes(port).unwrap().rules.clone();
        rules.iter().map(|rule| (rule.name.to_string(), rule.policy.faults.len())).collect()
    };
    assert_eq!(rules("web.default:8000"), [("default/chaos".to_string(), 1)]);
    assert_eq!(rules("web.default:9000"), [("default/nine#0".to_string(), 1)]);
    assert_eq!(rules("web.default:7000"), []);
}

fn connections(kind: &'static str, to: &str, hostnames: &[&str]) -> Resource {
    let backends = vec![backend(to, 5432)];
    Resource::Route(Route {
        kind,
        name: name(to),
        created: None,
        parents: vec![Parent { at: Default::default(), service: name("db"), port: Some(5432) }],
        hostnames: hostnames.iter().map(|name| Arc::from(*name)).collect(),
        rules: vec![RouteRule { at: Default::default(), matches: Vec::new(), backends, policy: Arc::default() }],
    })
}

#[test]
fn server_names_are_asked_from_the_most_specific_to_the_least() {
    let routes = [
        connections(TLS_ROUTE, "rest", &["*.example"]),
        connections(TLS_ROUTE, "below", &["*.db.example", "short.x"]),
        connections(TLS_ROUTE, "exact", &["a.db.example"]),
        connections(TCP_ROUTE, "tcp", &[]),
    ];
    let world = world(&[registered("db", [127, 0, 0, 1], 5432, 41000)], &routes);
    let db = world.routes("db.default:5432").unwrap();
    let order: Vec<_> = db.connections.iter().map(|rule| rule.hostname.as_deref().unwrap_or("-")).collect();
    assert_eq!(order, ["a.db.example", "short.x", "*.db.example", "*.example"]);
    assert_eq!(db.protocol, AppProtocol::Tls);
    assert!(db.rules.is_empty());
    let clusters: Vec<_> = db.clusters.keys().map(|name| &**name).collect();
    assert_eq!(clusters, ["below.default:5432", "db.default:5432", "exact.default:5432", "rest.default:5432"]);
}

#[test]
fn a_tcp_route_takes_all_connections_of_its_port_unless_a_route_of_requests_is_there() {
    let db = [registered("db", [127, 0, 0, 1], 5432, 41000)];
    let tcp = connections(TCP_ROUTE, "tcp", &[]);
    let alone = world(&db, std::slice::from_ref(&tcp)).routes("db.default:5432").unwrap();
    assert_eq!((alone.connections.len(), alone.protocol), (1, AppProtocol::Tcp));
    let both = world(&db, &[tcp, connections("HTTPRoute", "http", &[])]).routes("db.default:5432").unwrap();
    assert_eq!((both.connections.len(), both.rules.len()), (0, 1));
}

fn about(service: &str) -> Parent {
    Parent { at: Default::default(), service: name(service), port: None }
}

#[test]
fn a_service_is_held_to_its_limits_by_the_name_of_its_account_and_once_its_endpoints_are_gone_too() {
    let ports =
        vec![crate::resources::ServicePort { name: "".into(), port: 80, target: 8000, protocol: AppProtocol::Detect }];
    let service = Resource::Service(Service { name: name("web"), cluster_ips: vec![], ports, external_name: None });
    let limits: TrafficLimits =
        serde_json::from_str(r#"{"rates": [{"name": "default/web#0", "requests": 1, "interval": "1s"}]}"#).unwrap();
    let limit = Limit { object: name("web"), services: vec![about("web")], routes: vec![], limits: limits.clone() };
    let account = "spiffe://cluster.local/ns/default/sa/shop".parse().unwrap();
    let slice = Resource::Slice(Slice {
        object: name("web-x"),
        service: name("web"),
        transport: Transport::Sheetbend(account),
        ports: vec![],
        endpoints: vec![],
    });
    let resources = [service, Resource::Limit(limit), slice];
    let seen = build(&[], &resources, true, &World::default());
    assert_eq!(seen.inbound(&name("shop")).limits, limits);
    assert_eq!(seen.inbound(&name("web")).limits, limits);
    assert_eq!(seen.inbound(&name("other")).limits, TrafficLimits::default());
    let gone = build(&[], &resources[..2], true, &seen);
    assert_eq!(gone.inbound(&name("shop")).limits, limits, "a pod is held to it before it is an endpoint again");
    let forgotten = build(&[], &resources[1..2], true, &gone);
    assert_eq!(forgotten.inbound(&name("shop")).limits, TrafficLimits::default(), "there is no such Service any more");
}

#[test]
fn what_a_service_says_of_an_issuer_hides_what_its_namespace_says_of_the_same() {
    let issuer = |issuer: &str, audiences: &[&str]| TokenIssuer {
        issuer: issuer.into(),
        audiences: audiences.iter().map(|audience| Arc::from(*audience)).collect(),
        keys: vec![],
    };
    let tokens = |object: &str, targets: Vec<Parent>, issuers: Vec<TokenIssuer>| {
        Resource::Tokens(Tokens { object: name(object), targets, issuers, files: vec![] })
    };
    let (weak, other, own) = (issuer("https://i", &[]), issuer("https://j", &[]), issuer("https://i", &["web"]));
    let resources = [
        tokens("all", vec![], vec![weak.clone(), other.clone()]),
        tokens("web", vec![about("web")], vec![own.clone()]),
    ];
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &resources);
    assert_eq!(world.inbound(&name("web")).access.issuers, [own, other.clone()]);
    assert_eq!(world.inbound(&name("api")).access.issuers, [weak, other]);
}

fn authorization(object: &str, namespace: &str, targets: Vec<Parent>) -> Resource {
    let object = ServiceName { namespace: namespace.into(), ..name(object) };
    let policy = AuthorizationPolicy {
        name: format!("{namespace}/{}", object.service).into(),
        action: Action::Deny,
        ..AuthorizationPolicy::default()
    };
    Resource::Authorization(Authorization { object, targets, policy: policy.into() })
}

/// The names of the policies that a service's proxies are told.
fn policies(world: &World, service: &str, namespace: &str) -> Vec<String> {
    let service = ServiceName { namespace: namespace.into(), ..name(service) };
    world.inbound(&service).access.policies.iter().map(|policy| policy.name.to_string()).collect()
}

#[test]
fn a_policy_holds_for_its_targets_or_for_all_of_its_namespace_and_for_nobody_else() {
    let resources = [
        authorization("of-web", "default", vec![about("web")]),
        authorization("of-both", "default", vec![about("web"), about("api"), about("web")]),
        authorization("of-all", "default", vec![]),
        authorization("elsewhere", "other", vec![]),
    ];
    let world = world(&[registered("web", [127, 0, 0, 1], 8000, 41000)], &resources);
    assert_eq!(policies(&world, "web", "default"), ["default/of-all", "default/of-both", "default/of-web"]);
    assert_eq!(policies(&world, "api", "default"), ["default/of-all", "default/of-both"]);
    assert_eq!(policies(&world, "new", "default"), ["default/of-all"], "before anybody knows of it");
    assert_eq!(policies(&world, "web", "other"), ["other/elsewhere"]);
    assert_eq!(policies(&world, "web", "third"), [""; 0]);
}

#[test]
fn a_proxy_is_held_to_what_its_service_is_held_to_whatever_its_identity_is_called() {
    let slice = |account: &str| {
        Resource::Slice(Slice {
            object: name(&account.replace('/', "-")),
            service: name("web"),
            transport: Transport::Sheetbend(format!("spiffe://cluster.local/ns/{account}").parse().unwrap()),
            ports: vec![crate::resources::SlicePort { name: "".into(), port: 80, protocol: AppProtocol::Detect }],
            endpoints: vec![],
        })
    };
    let resources = [
        slice("default/sa/shop"),
        slice("pods/sa/runner"),
        authorization("of-web", "default", vec![about("web")]),
        authorization("of-all", "default", vec![]),
        authorization("of-pods", "pods", vec![]),
    ];
    let world = world(&[], &resources);
    assert_eq!(policies(&world, "shop", "default"), ["default/of-all", "default/of-web"]);
    let all = ["default/of-all", "default/of-web", "pods/of-pods"];
    assert_eq!(policies(&world, "runner", "pods"), all, "its identity is in another namespace than its Service");
    assert_eq!(policies(&world, "other", "pods"), ["pods/of-pods"]);
}

#[test]
fn services_with_addresses_within_the_ranges_of_the_mesh_add_none() {
    let service = |number: u8| {
        let cluster_ips = vec![[10, 96, number, 1].into(), [192, 0, 2, number].into()];
        Resource::Service(Service {
            name: name(&format!("s{number}")),
            cluster_ips,
            ports: vec![],
            external_name: None,
        })
    };
    let mut resources: Vec<Resource> = (0..=255).map(service).collect();
    resources.push(Resource::Settings(Settings {
        object: name("mesh"),
        trust_domain: None,
        mesh_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        allowed_addresses: Vec::new(),
        outbound_policy: None,
        default_inbound_policy: None,
    }));
    let ranges: Vec<String> = world(&[], &resources).mesh.ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.96.0.0/12", "192.0.2.0/24"]);
}
