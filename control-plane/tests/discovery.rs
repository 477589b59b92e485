//! What subscribers are told, and when.

use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::rpc;
use prost::Message;
use sheetbend_control_plane::ControlPlane;
use sheetbend_control_plane_client::registration::Registration;
use sheetbend_control_plane_client::xds::{Kind, MESH, ROOT_CA};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

mod support;
use support::*;

const WEB: &str = "web.default:8000";

fn endpoints(resource: &envoy_types::pb::envoy::service::discovery::v3::Resource) -> usize {
    let any = resource.resource.as_ref().unwrap();
    let assignment = ClusterLoadAssignment::decode(&*any.value).unwrap();
    assignment.endpoints.iter().map(|locality| locality.lb_endpoints.len()).sum()
}

#[tokio::test]
async fn a_registration_reaches_who_asked_and_its_withdrawal_too() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let caller = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(caller, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Listener, &[MESH, "web:8000", "web:80"]).await;
    let answer = caller.take().await;
    assert_eq!(answer.resources.len(), 1, "what the mesh is");
    assert_eq!(answer.removed_resources, ["web:8000", "web:80"], "no part of the mesh is an answer");

    let web = workload(&control_plane, &ca, "web").await;
    let web = Delta::open(web, node("web-1", "sheetbend-proxy", Some(serves(8000, 41000)))).await.unwrap();
    let answer = caller.take().await;
    let names: Vec<&str> = answer.resources.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["web:80", "web:8000"]);
    caller.subscribe(Kind::Cluster, &[WEB]).await;
    assert_eq!(caller.take().await.resources.len(), 1);
    caller.subscribe(Kind::Endpoints, &[WEB]).await;
    assert_eq!(endpoints(&caller.take().await.resources[0]), 1);

    let second = workload(&control_plane, &ca, "web").await;
    let second = Delta::open(second, node("web-2", "sheetbend-proxy", Some(serves(8000, 41001)))).await.unwrap();
    let answer = caller.take().await;
    assert_eq!(answer.type_url, Kind::Endpoints.type_url(), "nothing but the endpoints changed");
    assert_eq!(endpoints(&answer.resources[0]), 2);

    let nothing = Registration { ports: Vec::new(), ..serves(8000, 0) };
    for (stream, name) in [(&second, "web-2"), (&web, "web-1")] {
        let node = Some(node(name, "sheetbend-proxy", Some(nothing.clone())));
        stream.send(DeltaDiscoveryRequest { node, type_url: "none".into(), ..Default::default() }).await;
    }
    let mut gone = Vec::new();
    while gone.len() < 4 {
        let answer = caller.take().await;
        gone.extend(answer.removed_resources.into_iter().map(|name| (answer.type_url.clone(), name)));
    }
    assert_eq!(gone[0].0, Kind::Listener.type_url(), "clusters go after what points at them: {gone:?}");
}

#[tokio::test]
async fn after_a_reconnect_only_what_changed_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let web = workload(&control_plane, &ca, "web").await;
    let _web = Delta::open(web, node("web-1", "sheetbend-proxy", Some(serves(8000, 41000)))).await.unwrap();
    admin_until(&control_plane, "/config_dump", |dump| dump.contains("41000")).await;
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut first = Delta::open(channel.clone(), node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    first.subscribe(Kind::Cluster, &[WEB]).await;
    let version = first.take().await.resources[0].version.clone();
    drop(first);
    let mut again = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    again
        .send(DeltaDiscoveryRequest {
            type_url: Kind::Cluster.type_url().into(),
            resource_names_subscribe: vec![WEB.into(), "gone.default:1".into()],
            initial_resource_versions: [(WEB.to_string(), version), ("gone.default:1".into(), "old".into())].into(),
            ..Default::default()
        })
        .await;
    let answer = again.take().await;
    assert!(answer.resources.is_empty(), "the version is the same");
    assert_eq!(answer.removed_resources, ["gone.default:1"]);
}

#[tokio::test]
async fn what_was_refused_is_shown_and_not_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Secret, &[ROOT_CA]).await;
    let answer = caller.next().await;
    let error = rpc::Status { message: "I do not like it".into(), ..Default::default() };
    caller
        .send(DeltaDiscoveryRequest {
            type_url: answer.type_url,
            response_nonce: answer.nonce,
            error_detail: Some(error),
            ..Default::default()
        })
        .await;
    admin_until(&control_plane, "/config_dump", |dump| dump.contains("I do not like it")).await;
    let roots = admin(&control_plane, "/roots").await;
    assert!(roots.contains("\"lacks_new_root\": true"), "a refused bundle is not held: {roots}");
    // The next answer is of the next question: nothing was sent again in between.
    caller.subscribe(Kind::Listener, &["web:80"]).await;
    assert_eq!(caller.take().await.removed_resources, ["web:80"]);
}

#[tokio::test]
async fn the_roots_that_a_proxy_holds_follow_its_acknowledgements_through_a_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Secret, &[ROOT_CA]).await;
    caller.take().await;
    admin_until(&control_plane, "/roots", |r| {
        r.contains("\"lacks_new_root\": false") && r.contains("\"old_leaf\": false")
    })
    .await;
    ca.rotate(std::time::SystemTime::now()).unwrap();
    let rotated = caller.next().await;
    admin_until(&control_plane, "/roots", |r| {
        r.contains("\"lacks_new_root\": true") && r.contains("\"old_leaf\": true")
    })
    .await;
    caller
        .send(DeltaDiscoveryRequest { type_url: rotated.type_url, response_nonce: rotated.nonce, ..Default::default() })
        .await;
    admin_until(&control_plane, "/roots", |r| {
        r.contains("\"lacks_new_root\": false") && r.contains("\"old_leaf\": true")
    })
    .await;
    // It comes back with a certificate below the new root, as our proxies do.
    let renewed = workload(&control_plane, &ca, "caller").await;
    let mut renewed = Delta::open(renewed, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    renewed.subscribe(Kind::Secret, &[ROOT_CA]).await;
    renewed.take().await;
    admin_until(&control_plane, "/roots", |r| r.contains("\"old_leaf\": false")).await;
    ca.drop_old().unwrap();
    let ended = caller.end().await;
    assert_eq!(ended.code(), Code::Unauthenticated, "a stream that rests on a dropped root ends: {ended}");
    renewed.take().await;
}

#[tokio::test]
async fn an_address_that_is_not_ones_own_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let channel = workload(&control_plane, &ca, "web").await;
    let lie = Registration { address: [192, 0, 2, 77].into(), ..serves(8000, 41000) };
    let ended = match Delta::open(channel, node("web-1", "sheetbend-proxy", Some(lie))).await {
        Ok(mut stream) => stream.end().await,
        Err(status) => status,
    };
    assert_eq!(ended.code(), Code::PermissionDenied);
    assert!(ended.message().contains("192.0.2.77") && ended.message().contains("--allow-address"), "{ended}");
    assert!(!admin(&control_plane, "/registrations").await.contains("192.0.2.77"));
}

#[tokio::test]
async fn too_many_subscriptions_end_the_stream_that_made_them() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let channel = workload(&control_plane, &ca, "greedy").await;
    let mut greedy = Delta::open(channel, node("greedy-1", "sheetbend-proxy", None)).await.unwrap();
    let names: Vec<String> = (0..5_001).map(|n| format!("s{n}:80")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    greedy.subscribe(Kind::Listener, &names).await;
    assert_eq!(greedy.end().await.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_restart_keeps_registrations_and_says_no_removal() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let web = workload(&control_plane, &ca, "web").await;
    let web = Delta::open(web, node("web-1", "sheetbend-proxy", Some(serves(8000, 41000)))).await.unwrap();
    admin_until(&control_plane, "/registrations", |r| r.contains("web-1")).await;
    control_plane.shutdown().await;
    drop(web);
    let mut after = config(dir.path());
    // Longer than it takes to ask, on a machine that stands still for a while too.
    after.restart_grace = Duration::from_secs(10);
    let control_plane = ControlPlane::start(after).await.unwrap();
    let caller = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(caller, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Endpoints, &[WEB]).await;
    assert_eq!(endpoints(&caller.take().await.resources[0]), 1, "it is there though it has not come back yet");
    assert_eq!(caller.take().await.removed_resources, [WEB], "and gone when the time is over");
}

#[tokio::test]
async fn a_damaged_state_file_stops_the_start_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    new_ca(dir.path());
    std::fs::create_dir(dir.path().join("state")).unwrap();
    std::fs::write(dir.path().join("state/registrations.json"), "[{").unwrap();
    let error = ControlPlane::start(config(dir.path())).await.err().unwrap().to_string();
    assert!(error.contains("registrations.json:1:2") && error.contains("damaged"), "{error}");
}

#[tokio::test]
async fn a_resource_file_is_read_again_when_it_changes_and_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let mut config = config(dir.path());
    config.resources = Some(mesh.path().into());
    let control_plane = ControlPlane::start(config).await.unwrap();
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Listener, &["db:5432"]).await;
    assert_eq!(caller.take().await.removed_resources, ["db:5432"]);
    let file = mesh.path().join("db.yaml");
    // Whole at once: a file that is being written is read as far as it goes.
    let write = |text: &str| {
        let draft = dir.path().join("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, &file).unwrap();
    };
    let good = "apiVersion: v1\nkind: Service\nmetadata: {name: db}\nspec: {ports: [{name: tcp, port: 5432}]}\n";
    write(good);
    assert_eq!(caller.take().await.resources[0].name, "db:5432");
    write(&good.replace("5432", "x"));
    let told = admin_until(&control_plane, "/resources", |r| r.contains("db.yaml:4:")).await;
    assert!(told.contains("Service default/db"), "the last good state stays: {told}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(caller.take().await.removed_resources, ["db:5432"]);
}

#[tokio::test]
async fn an_envoy_is_told_every_cluster_and_its_changes_state_of_the_world() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let web = workload(&control_plane, &ca, "web").await;
    let web = Delta::open(web, node("web-1", "sheetbend-proxy", Some(serves(8000, 41000)))).await.unwrap();
    admin_until(&control_plane, "/config_dump", |dump| dump.contains("41000")).await;
    let (requests, receiver) = mpsc::channel(8);
    let first = DiscoveryRequest {
        node: Some(node("envoy-1", "envoy", None)),
        type_url: Kind::Cluster.type_url().into(),
        ..Default::default()
    };
    requests.send(first.clone()).await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(workload(&control_plane, &ca, "edge").await);
    let answers = client.stream_aggregated_resources(ReceiverStream::new(receiver)).await.unwrap();
    let mut answers = answers.into_inner();
    let answer = answers.next().await.unwrap().unwrap();
    let cluster = Cluster::decode(&*answer.resources[0].value).unwrap();
    assert_eq!((answer.resources.len(), cluster.name.as_str()), (1, WEB));
    // An acknowledgement is answered by nothing; a withdrawal by a world without the cluster.
    let ack = DiscoveryRequest { node: None, version_info: answer.version_info, response_nonce: answer.nonce, ..first };
    requests.send(ack).await.unwrap();
    let nothing = Registration { ports: Vec::new(), ..serves(8000, 0) };
    let node = Some(node("web-1", "sheetbend-proxy", Some(nothing)));
    web.send(DeltaDiscoveryRequest { node, type_url: "none".into(), ..Default::default() }).await;
    let answer = tokio::time::timeout(SOON, answers.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((answer.type_url.as_str(), answer.resources.len()), (Kind::Cluster.type_url(), 0));
}

#[tokio::test]
async fn who_calls_one_instance_by_its_address_is_led_to_that_one() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let web = workload(&control_plane, &ca, "web").await;
    let _a = Delta::open(web.clone(), node("web-1", "sheetbend-proxy", Some(serves(8000, 41000)))).await.unwrap();
    let _b = Delta::open(web, node("web-2", "sheetbend-proxy", Some(serves(8000, 41001)))).await.unwrap();
    admin_until(&control_plane, "/config_dump", |d| d.contains("41000") && d.contains("41001")).await;
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    let one = "web.default:8000@127.0.0.1:41001";
    caller.subscribe(Kind::Listener, &["127.0.0.1:41001"]).await;
    let listener = caller.take().await.resources.remove(0).resource.unwrap();
    let value = String::from_utf8_lossy(&listener.value).into_owned();
    assert!(value.contains(one), "its routes are its own: {value}");
    caller.subscribe(Kind::Routes, &[one]).await;
    assert_eq!(caller.take().await.resources[0].name, one);
    caller.subscribe(Kind::Endpoints, &[one]).await;
    assert_eq!(endpoints(&caller.take().await.resources[0]), 1);
}

#[tokio::test]
async fn a_peer_that_reads_nothing_loses_its_stream_and_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let deaf = workload(&control_plane, &ca, "deaf").await;
    let deaf = Delta::open(deaf, node("deaf-1", "sheetbend-proxy", None)).await.unwrap();
    admin_until(&control_plane, "/config_dump", |dump| dump.contains("deaf-1")).await;
    // Asked for again and again, and each time answered: more than all windows and buffers on the way hold.
    let names: Vec<String> = (0..4_000).map(|n| format!("nobody-{n:0200}:80")).collect();
    let again = DeltaDiscoveryRequest {
        type_url: Kind::Listener.type_url().to_string(),
        resource_names_subscribe: names,
        ..Default::default()
    };
    let requests = deaf.requests.clone();
    let asking = tokio::spawn(async move { while requests.send(again.clone()).await.is_ok() {} });

    let hears = workload(&control_plane, &ca, "hears").await;
    let mut hears = Delta::open(hears, node("hears-1", "sheetbend-proxy", None)).await.unwrap();
    let deadline = Instant::now() + 3 * SOON;
    while admin(&control_plane, "/config_dump").await.contains("deaf-1") {
        assert!(Instant::now() < deadline, "its stream is there still");
        hears.subscribe(Kind::Listener, &["nobody:80"]).await;
        assert_eq!(hears.next().await.removed_resources, ["nobody:80"]);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    asking.abort();
}

#[tokio::test]
async fn a_proxy_that_joins_right_after_a_rotation_is_known_to_need_the_old_root_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    ca.rotate(std::time::SystemTime::now()).unwrap();
    // Before the control plane has looked: the handshake is held against the old root, which signed the new one.
    let channel = workload(&control_plane, &ca, "caller").await;
    let mut caller = Delta::open(channel, node("caller-1", "sheetbend-proxy", None)).await.unwrap();
    caller.subscribe(Kind::Secret, &[ROOT_CA]).await;
    caller.take().await;
    admin_until(&control_plane, "/roots", |r| r.contains("caller-1") && r.contains("\"old_leaf\": false")).await;
}
