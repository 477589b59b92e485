//! Discovery against a control plane that says exactly what a test wants.

mod support;

use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::Resource;
use envoy_types::pb::google::protobuf::Any;
use sheetbend_control_plane_client::discovery::Unresolved;
use sheetbend_control_plane_client::model::*;
use sheetbend_control_plane_client::registration::{RegisteredPort, Registration};
use sheetbend_control_plane_client::xds::{INBOUND, Kind, MESH, ROOT_CA, encode};
use support::*;
use tokio::sync::watch;

#[tokio::test]
async fn a_target_is_followed_to_its_endpoints_and_every_answer_is_acknowledged() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let mut conn = fake.stream().await;
    let first = conn.subscription(Kind::Secret).await;
    assert_eq!(first.resource_names_subscribe, [ROOT_CA]);
    let node = first.node.expect("the first message says who it is");
    assert_eq!((node.id.as_str(), node.user_agent_name.as_str()), ("web-1", "sheetbend-proxy"));
    assert_eq!(conn.subscription(Kind::Listener).await.resource_names_subscribe, [INBOUND, MESH]);

    let asked = tokio::spawn({
        let discovery = discovery.clone();
        async move { resolved(&discovery, &target("web:80")).await }
    });
    assert_eq!(conn.subscription(Kind::Listener).await.resource_names_subscribe, ["web:80"]);
    let sent = web(&cluster("web.default:80", &["127.0.0.1:8000"]));
    let nonce = conn
        .say(Kind::Listener, vec![encode::resource("web:80", "1", encode::listener(&target("web:80"), &sent))], &[])
        .await;
    let ack = conn.reply(&nonce).await;
    assert_eq!((ack.type_url.as_str(), ack.error_detail), (Kind::Listener.type_url(), None));
    assert_eq!(conn.subscription(Kind::Routes).await.resource_names_subscribe, ["web.default:80"]);
    let routes = encode::resource("web.default:80", "1", encode::route_configuration(&sent));
    conn.say(Kind::Routes, vec![routes], &[]).await;
    assert_eq!(conn.subscription(Kind::Cluster).await.resource_names_subscribe, ["web.default:80"]);
    assert_eq!(conn.subscription(Kind::Endpoints).await.resource_names_subscribe, ["web.default:80"]);
    conn.tell_cluster(&sent.clusters["web.default:80"], "1").await;
    assert_eq!(asked.await.unwrap(), Resolution::Mesh(Arc::new(sent)));
    assert!(discovery.status().borrow().connected);
}

#[tokio::test]
async fn not_in_the_mesh_is_an_answer_and_no_answer_is_none() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let mut conn = fake.stream().await;
    let outside = target("example.com:443");
    let (answer, _) = tokio::join!(resolved(&discovery, &outside), async {
        conn.subscription(Kind::Listener).await;
        conn.subscription(Kind::Listener).await;
        conn.say(Kind::Listener, vec![], &["example.com:443"]).await
    });
    assert_eq!(answer, Resolution::NotMesh);
    assert_eq!(discovery.lookup(&outside), Some(Resolution::NotMesh), "it is kept");
    assert_eq!(discovery.resolve(&target("silence:80")).await, Err(Unresolved::NoAnswer));
}

#[tokio::test]
async fn what_is_not_valid_is_refused_with_its_reason_while_the_last_good_one_stays() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let (web80, sent) = (target("web:80"), web(&cluster("web.default:80", &["127.0.0.1:8000"])));
    let mut conn = fake.stream().await;
    let (answer, ()) = tokio::join!(resolved(&discovery, &web80), conn.tell("web:80", &sent));
    assert_eq!(answer, Resolution::Mesh(Arc::new(sent.clone())));

    let mut bad = encode::load_assignment(&cluster("web.default:80", &["127.0.0.1:9000"]));
    bad.endpoints[0].lb_endpoints[0].metadata = None;
    let nonce = conn.say(Kind::Endpoints, vec![encode::resource("web.default:80", "2", bad)], &[]).await;
    let refusal = conn.reply(&nonce).await.error_detail.expect("it is refused");
    assert!(refusal.message.starts_with("web.default:80: `metadata"), "{}", refusal.message);
    assert_eq!(discovery.lookup(&web80), Some(Resolution::Mesh(Arc::new(sent))));
    let status = discovery.status().borrow().clone();
    assert_eq!((status.connected, status.refused), (true, 1));

    let better = cluster("web.default:80", &["127.0.0.1:9000"]);
    let nonce = conn.tell_endpoints(&better, "3").await;
    assert_eq!(conn.reply(&nonce).await.error_detail, None, "what is good again is taken again");
    let expected = Some(Resolution::Mesh(Arc::new(web(&better))));
    until(&discovery, |discovery| discovery.lookup(&web80) == expected).await;
}

#[tokio::test]
async fn one_bad_resource_does_not_keep_out_the_good_ones_beside_it() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let mut conn = fake.stream().await;
    let (bad, good) = (target("bad:80"), target("good:80"));
    let (_, answer, ()) = tokio::join!(discovery.resolve(&bad), resolved(&discovery, &good), async {
        let mut names = Vec::new();
        while names.len() < 3 {
            names.extend(conn.subscription(Kind::Listener).await.resource_names_subscribe);
        }
        let sent = web(&cluster("web.default:80", &["127.0.0.1:8000"]));
        let broken =
            Resource { resource: Some(Any::default()), ..encode::resource("bad:80", "1", encode::root_ca("")) };
        let listener = encode::resource("good:80", "1", encode::listener(&good, &sent));
        let nonce = conn.say(Kind::Listener, vec![broken, listener], &[]).await;
        let refusal = conn.reply(&nonce).await.error_detail.expect("it is refused");
        assert!(refusal.message.starts_with("bad:80: it is a ``"), "{}", refusal.message);
        let routes = encode::resource("web.default:80", "1", encode::route_configuration(&sent));
        conn.say(Kind::Routes, vec![routes], &[]).await;
        conn.subscription(Kind::Endpoints).await;
        conn.tell_cluster(&sent.clusters["web.default:80"], "1").await;
    });
    assert!(matches!(answer, Resolution::Mesh(_)), "{answer:?}");
}

#[tokio::test]
async fn a_new_stream_says_what_is_held_and_nothing_is_lost_meanwhile() {
    let (_held, address) = port();
    let mut fake = Fake::on(address).await;
    let discovery = fake.discovery();
    let (web80, sent) = (target("web:80"), web(&cluster("web.default:80", &["127.0.0.1:8000"])));
    let mut conn = fake.stream().await;
    let (answer, ()) = tokio::join!(resolved(&discovery, &web80), conn.tell("web:80", &sent));
    drop(conn);
    fake.kill().await;
    let mut status = discovery.status();
    within(status.wait_for(|status| !status.connected)).await.unwrap();
    assert_eq!(discovery.resolve(&web80).await, Ok(answer.clone()), "what is known goes on");

    let mut fake = Fake::on(address).await;
    let mut conn = fake.stream().await;
    let first = conn.subscription(Kind::Secret).await;
    assert!(first.node.is_some() && first.initial_resource_versions.is_empty());
    let listeners = conn.subscription(Kind::Listener).await;
    assert_eq!(listeners.resource_names_subscribe, [INBOUND, MESH, "web:80"]);
    assert_eq!(listeners.initial_resource_versions, [("web:80".to_string(), "1".to_string())].into());
    for kind in [Kind::Routes, Kind::Cluster, Kind::Endpoints] {
        let request = conn.subscription(kind).await;
        assert_eq!(request.resource_names_subscribe, ["web.default:80"]);
        assert_eq!(request.initial_resource_versions["web.default:80"], "1");
    }
    conn.tell_mesh().await;
    within(status.wait_for(|status| status.connected)).await.unwrap();
    assert_eq!(discovery.lookup(&web80), Some(answer));
    assert_eq!(status.borrow().streams, 2);
}

#[tokio::test]
async fn a_target_that_leaves_the_mesh_is_told_and_may_come_back() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let (web80, sent) = (target("web:80"), web(&cluster("web.default:80", &["127.0.0.1:8000"])));
    let mut conn = fake.stream().await;
    tokio::join!(resolved(&discovery, &web80), conn.tell("web:80", &sent));
    conn.say(Kind::Listener, vec![], &["web:80"]).await;
    until(&discovery, |discovery| discovery.lookup(&web80) == Some(Resolution::NotMesh)).await;
    let gone = conn.subscription(Kind::Routes).await;
    assert_eq!(gone.resource_names_unsubscribe, ["web.default:80"], "what it led to is let go of");
    conn.tell("web:80", &sent).await;
    until(&discovery, |discovery| matches!(discovery.lookup(&web80), Some(Resolution::Mesh(_)))).await;
}

#[tokio::test]
async fn a_change_is_published_when_all_its_parts_are_there_and_what_it_replaces_stays_fresh() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let old = cluster("web.default:80", &["127.0.0.1:8000"]);
    let (web80, sent) = (target("web:80"), web(&old));
    let mut conn = fake.stream().await;
    tokio::join!(resolved(&discovery, &web80), conn.tell("web:80", &sent));

    let new = cluster("next.default:80", &["127.0.0.1:9000"]);
    let next = web(&new);
    let routes = encode::resource("web.default:80", "2", encode::route_configuration(&next));
    conn.say(Kind::Routes, vec![routes], &[]).await;
    assert_eq!(conn.subscription(Kind::Cluster).await.resource_names_subscribe, ["next.default:80"]);
    let moved = cluster("web.default:80", &["127.0.0.1:8001"]);
    conn.tell_endpoints(&moved, "2").await;
    let expected = Some(Resolution::Mesh(Arc::new(web(&moved))));
    until(&discovery, |discovery| discovery.lookup(&web80) == expected).await;

    conn.tell_cluster(&new, "1").await;
    let expected = Some(Resolution::Mesh(Arc::new(next)));
    until(&discovery, |discovery| discovery.lookup(&web80) == expected).await;
    assert_eq!(conn.subscription(Kind::Cluster).await.resource_names_unsubscribe, ["web.default:80"]);
}

#[tokio::test]
async fn two_targets_of_one_service_share_one_destination() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let sent = web(&cluster("web.default:80", &["127.0.0.1:8000"]));
    let mut conn = fake.stream().await;
    let (short, long) = (target("web:80"), target("web.default.svc.cluster.local:80"));
    let (first, ()) = tokio::join!(resolved(&discovery, &short), conn.tell("web:80", &sent));
    let (second, _) = tokio::join!(resolved(&discovery, &long), async {
        conn.subscription(Kind::Listener).await;
        let listener = encode::listener(&long, &sent);
        conn.say(Kind::Listener, vec![encode::resource(&long.to_string(), "1", listener)], &[]).await
    });
    let (Resolution::Mesh(first), Resolution::Mesh(second)) = (first, second) else { panic!("both are mesh") };
    assert!(Arc::ptr_eq(&first, &second));
}

#[tokio::test]
async fn what_was_not_asked_for_is_not_kept() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let mut conn = fake.stream().await;
    let sent = web(&cluster("web.default:80", &["127.0.0.1:8000"]));
    let flood = (0..500).map(|n| {
        let name = format!("flood-{n}:80");
        encode::resource(&name, "1", encode::listener(&target(&name), &sent))
    });
    let nonce = conn.say(Kind::Listener, flood.collect(), &[]).await;
    assert_eq!(conn.reply(&nonce).await.error_detail, None);
    assert!(discovery.snapshot().is_empty());
    let nonce = conn.say_as("type.googleapis.com/envoy.service.runtime.v3.Runtime", vec![], &[]).await;
    let refusal = conn.reply(&nonce).await.error_detail.expect("a kind that nobody asked for is refused");
    assert!(refusal.message.contains("was not asked for"), "{}", refusal.message);
}

#[tokio::test]
async fn a_message_too_large_ends_the_stream_and_not_the_proxy() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    let mut conn = fake.stream().await;
    conn.request().await;
    let huge = Any { type_url: Kind::Listener.type_url().to_string(), value: vec![0; 17 << 20] };
    let huge = Resource { name: MESH.to_string(), resource: Some(huge), ..Resource::default() };
    conn.say(Kind::Listener, vec![huge], &[]).await;
    let mut conn = fake.stream().await;
    conn.tell_mesh().await;
    until(&discovery, |discovery| discovery.snapshot().mesh().is_some()).await;
}

#[tokio::test]
async fn the_mesh_is_known_by_its_ranges_and_its_names_before_any_answer() {
    let mut fake = Fake::start().await;
    let discovery = fake.discovery();
    assert!(discovery.snapshot().claims(&target("web:80")), "a name without a dot is the mesh's");
    let mut conn = fake.stream().await;
    conn.tell_mesh().await;
    until(&discovery, |discovery| discovery.snapshot().mesh().is_some()).await;
    let snapshot = discovery.snapshot();
    assert!(snapshot.claims(&target("127.7.1.2:80")) && snapshot.claims(&target("web.default.svc.cluster.local:80")));
    assert!(!snapshot.claims(&target("127.8.1.2:80")) && !snapshot.claims(&target("example.com:80")));
}

#[tokio::test]
async fn a_registration_and_its_changes_travel_on_the_same_stream() {
    let mut fake = Fake::start().await;
    let (register, registration) = watch::channel(None);
    let discovery = fake.registering(registration);
    let mut conn = fake.stream().await;
    let node = conn.request().await.node.unwrap();
    assert_eq!(Registration::of_node(&node), Ok(None));
    conn.tell_mesh().await;

    let port = RegisteredPort { port: 8000, inbound: 15106, protocol: AppProtocol::Http };
    let registered = Registration {
        address: [127, 0, 0, 1].into(),
        ports: vec![port],
        also: Vec::new(),
        standing: Default::default(),
    };
    register.send_replace(Some(registered.clone()));
    assert_eq!(next_registration(&mut conn).await, Some(registered.clone()));

    let ((), withdrawn) = tokio::join!(discovery.withdraw(), async {
        let withdrawn = next_registration(&mut conn).await;
        conn.tell_mesh().await;
        withdrawn
    });
    assert_eq!(withdrawn, Some(registered.withdrawn()));
    register.send_replace(Some(registered.clone()));
    drop(conn);
    let mut conn = fake.stream().await;
    let node = conn.request().await.node.unwrap();
    assert_eq!(Registration::of_node(&node), Ok(Some(registered.withdrawn())), "gone is gone");
}

async fn next_registration(conn: &mut Conn) -> Option<Registration> {
    loop {
        if let Some(node) = conn.request().await.node {
            return Registration::of_node(&node).unwrap();
        }
    }
}

#[tokio::test]
async fn withdrawing_from_nobody_ends_in_time() {
    let fake = Fake::start().await;
    let discovery = fake.discovery();
    fake.kill().await;
    within(discovery.withdraw()).await; // It gives up after a second.
}

#[tokio::test]
async fn a_control_plane_that_comes_late_is_found() {
    let (_held, address) = port();
    let early = Fake::on(address).await;
    let discovery = early.discovery();
    early.kill().await;
    let mut status = discovery.status();
    within(status.wait_for(|status| status.failures > 1)).await.unwrap();
    let mut fake = Fake::on(address).await;
    let mut conn = fake.stream().await;
    conn.tell_mesh().await;
    within(status.wait_for(|status| status.connected)).await.unwrap();
}
