//! Endpoints that fail their health checks get no traffic, and come back: real servers behind real sidecars.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use serde_json::Value;
use sheetbend_tests::{App, Load, Mesh, START, Sidecar, eventually, full};

/// A server that answers every request well, and its health check as it is told to.
struct Patient {
    app: App,
    unwell: Arc<AtomicBool>,
    /// Requests that were no checks.
    asked: Arc<AtomicU64>,
}

/// An answer of `grpc.health.v1.Health/Check`.
fn grpc_health(serving: bool) -> Response<sheetbend_tests::AnyBody> {
    let message = Bytes::from_static(if serving { &[0, 0, 0, 0, 2, 8, 1] } else { &[0, 0, 0, 0, 2, 8, 2] });
    let trailers = HeaderMap::from_iter([("grpc-status".parse().expect("a name"), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(message), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
    let body = StreamBody::new(tokio_stream::iter(frames)).boxed();
    Response::builder().header("content-type", "application/grpc").body(body).expect("an answer")
}

async fn patient() -> Patient {
    let (unwell, asked) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
    let (told, count) = (Arc::clone(&unwell), Arc::clone(&asked));
    let app = App::start(move |request: Request<Incoming>| {
        let unwell = told.load(Relaxed);
        let answer = match request.uri().path() {
            "/healthz" => {
                let status = if unwell { 500 } else { 204 };
                Response::builder().status(status).body(full("")).expect("an answer")
            }
            "/grpc.health.v1.Health/Check" => grpc_health(!unwell),
            _ => {
                count.fetch_add(1, Relaxed);
                Response::new(full("fine"))
            }
        };
        async move { answer }
    });
    Patient { app: app.await, unwell, asked }
}

fn policy(check: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: web}}\nspec:\n  \
         targetRefs: [{{kind: Service, group: \"\", name: web}}]\n  healthCheck: \
         {{{check}, interval: 200ms, timeout: 10s, healthyThreshold: 2, unhealthyThreshold: 2, jitter: 50ms}}\n"
    )
}

fn resources(check: &str, endpoints: &[Patient]) -> String {
    let mut text =
        policy(check) + "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";
    for port in endpoints.iter().map(|endpoint| endpoint.app.port()) {
        let _ = write!(
            text,
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: web-{port}, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        );
    }
    text
}

async fn breaker(caller: &Sidecar, place: &str) -> Value {
    let page = caller.page("/breakers").await.json();
    let found = page["endpoints"].as_array().into_iter().flatten().find(|one| one["endpoint"] == place);
    found.cloned().unwrap_or(Value::Null)
}

async fn becomes(caller: &Sidecar, place: &str, state: &str) -> Value {
    eventually(&format!("{place} is {state}"), START, || async {
        Some(breaker(caller, place).await).filter(|said| said["state"] == state)
    })
    .await
}

async fn an_unwell_one_gets_nothing_and_comes_back(check: &str) {
    let servers = [patient().await, patient().await, patient().await];
    let mesh = Mesh::with_resources(&resources(check, &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 25.0);
    let place = servers[0].app.address.to_string();
    eventually("all are asked", START, || async {
        servers.iter().all(|server| server.asked.load(Relaxed) > 0).then_some(())
    })
    .await;

    servers[0].unwell.store(true, Relaxed);
    let ejected = becomes(&caller, &place, "Ejected").await;
    assert_eq!(ejected["reason"], "health_check", "{ejected:#}");
    assert_eq!(ejected["next_probe"], Value::Null, "{ejected:#}");
    assert!(caller.counter("sheetbend_ejections_total", &["reason=\"health_check\""]).await >= 1.0);
    // What was on its way by then has arrived once others have answered a hundred more.
    let others = || servers[1..].iter().map(|server| server.asked.load(Relaxed)).sum::<u64>();
    let hundred_more = |from: u64| async move {
        eventually("a hundred more", START, || async { (others() >= from + 100).then_some(()) }).await
    };
    hundred_more(others()).await;
    let before = servers[0].asked.load(Relaxed);
    hundred_more(others()).await;
    assert_eq!(servers[0].asked.load(Relaxed), before);

    servers[0].unwell.store(false, Relaxed);
    becomes(&caller, &place, "Serving").await;
    eventually("it is asked again", START, || async { (servers[0].asked.load(Relaxed) > before + 20).then_some(()) })
        .await;
    load.stop().await.assert_none_failed(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_fails_its_http_checks_gets_no_traffic_and_comes_back() {
    an_unwell_one_gets_nothing_and_comes_back("http: {path: /healthz, expectedStatuses: [{start: 204, end: 204}]}")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_not_serving_by_grpcs_health_protocol_gets_no_traffic_and_comes_back() {
    an_unwell_one_gets_nothing_and_comes_back("grpc: {service: shop.Cart}").await;
}

/// The check of [`patient`] servers, under a path that they answer in whichever way.
fn check_of(path: &str) -> String {
    format!("http: {{path: {path}, expectedStatuses: [{{start: 204, end: 204}}]}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_found_unwell_is_found_well_again_though_it_was_away_or_its_check_has_changed() {
    let mut servers = vec![patient().await, patient().await, patient().await];
    let check = check_of("/healthz");
    let mesh = Mesh::with_resources(&resources(&check, &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let _load = Load::start(caller.proxy(), "http://web/", 2, 20.0);
    let place = servers[0].app.address.to_string();

    servers[0].unwell.store(true, Relaxed);
    becomes(&caller, &place, "Ejected").await;
    let away = servers.remove(0);
    mesh.write_resources(&resources(&check, &servers));
    eventually("it is away", START, || async { (breaker(&caller, &place).await == Value::Null).then_some(()) }).await;
    away.unwell.store(false, Relaxed);
    servers.insert(0, away);
    mesh.write_resources(&resources(&check, &servers));
    becomes(&caller, &place, "Serving").await;

    servers[0].unwell.store(true, Relaxed);
    becomes(&caller, &place, "Ejected").await;
    mesh.write_resources(&resources(&check_of("/healthz?edited"), &servers));
    let checks = || caller.counter("sheetbend_health_checks_total", &["result=\"unwell\""]);
    let before = checks().await;
    eventually("it is checked as the policy says now", START, || async {
        (checks().await > before + 2.0).then_some(())
    })
    .await;
    assert_eq!(
        breaker(&caller, &place).await["state"],
        "Ejected",
        "what was found holds until its checks say otherwise"
    );
    servers[0].unwell.store(false, Relaxed);
    becomes(&caller, &place, "Serving").await;

    servers[0].unwell.store(true, Relaxed);
    becomes(&caller, &place, "Ejected").await;
    let unchecked = resources(&check, &servers).replace("  healthCheck:", "  # healthCheck:");
    mesh.write_resources(&unchecked);
    becomes(&caller, &place, "Serving").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_that_was_wrong_of_all_leaves_no_trace_once_it_is_right() {
    let servers = [patient().await, patient().await, patient().await];
    let mesh = Mesh::with_resources(&resources(&check_of("/wrong"), &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let _load = Load::start(caller.proxy(), "http://web/", 2, 20.0);
    let checks = || caller.counter("sheetbend_health_checks_total", &["result=\"unwell\""]);
    eventually("all are unwell", START, || async { (checks().await >= 12.0).then_some(()) }).await;
    let place = |at: usize| servers[at].app.address.to_string();
    for at in 0..3 {
        becomes(&caller, &place(at), "Serving").await;
    }

    mesh.write_resources(&resources(&check_of("/healthz"), &servers));
    servers[0].unwell.store(true, Relaxed);
    becomes(&caller, &place(0), "Ejected").await;
    servers[0].unwell.store(false, Relaxed);
    for at in 0..3 {
        becomes(&caller, &place(at), "Serving").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_takes_no_connection_is_left_alone_before_any_request_meets_it() {
    let mut servers = vec![patient().await, patient().await, patient().await];
    let mesh = Mesh::with_resources(&resources("tcp: {}", &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let dead = servers.swap_remove(0);
    let place = dead.app.address.to_string();
    drop(dead);
    let ejected = becomes(&caller, &place, "Ejected").await;
    assert_eq!(ejected["reason"], "health_check", "{ejected:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_behind_a_sidecar_is_checked_over_mutual_tls() {
    let server = patient().await;
    let checks = ["http: {path: /healthz}", "grpc: {}", "tcp: {}"];
    for check in checks {
        let mesh = Mesh::with_resources(&policy(check), &[]);
        let _web = mesh.run("web").port(server.app.port()).flag(&["--strict"]).serve();
        let caller = mesh.caller("caller");
        caller.first_answer("http://web/").await;
        let result = |word: &'static str| {
            let caller = &caller;
            async move {
                let label = format!("result=\"{word}\"");
                caller.counter("sheetbend_health_checks_total", &[&label]).await
            }
        };
        eventually(&format!("{check} passes"), START, || async { (result("well").await >= 3.0).then_some(()) }).await;
        server.unwell.store(true, Relaxed);
        if !check.starts_with("tcp") {
            eventually(&format!("{check} fails"), START, || async { (result("unwell").await >= 2.0).then_some(()) })
                .await;
            // It is the only one, and serves on.
            caller.first_answer("http://web/").await;
        }
        server.unwell.store(false, Relaxed);
    }
}
