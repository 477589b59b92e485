//! Endpoints that fail and come back, behind a real sidecar.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use http::Response;
use serde_json::Value;
use sheetbend_tests::{App, Load, Mesh, START, Sidecar, eventually, full};

/// A server that answers, or says 503 while it is told to.
struct Moody {
    app: App,
    fails: Arc<AtomicBool>,
}

impl Moody {
    async fn start() -> Self {
        let fails = Arc::<AtomicBool>::default();
        let says = Arc::clone(&fails);
        let app = App::start(move |_| {
            let status = if says.load(Relaxed) { 503 } else { 200 };
            async move { Response::builder().status(status).body(full("moody\n")).expect("an answer") }
        });
        Self { app: app.await, fails }
    }
}

/// A service with its endpoints, as an operator writes them down.
fn service(endpoints: &[Moody]) -> String {
    let mut text = String::from("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n");
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

/// What `/breakers` says of an endpoint.
async fn breaker(caller: &Sidecar, endpoint: &Moody) -> Value {
    let page = caller.page("/breakers").await.json();
    let place = endpoint.app.address.to_string();
    let found = page["endpoints"].as_array().into_iter().flatten().find(|one| one["endpoint"] == place.as_str());
    found.cloned().unwrap_or(Value::Null)
}

async fn becomes(caller: &Sidecar, endpoint: &Moody, state: &str) -> Value {
    eventually(&format!("{} is {state}", endpoint.app.address), START, || async {
        Some(breaker(caller, endpoint).await).filter(|said| said["state"] == state)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_fails_is_ejected_unnoticed_and_serves_again_once_it_is_well() {
    let servers = [Moody::start().await, Moody::start().await, Moody::start().await];
    let mesh = Mesh::with_resources(&service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    for server in &servers {
        becomes(&caller, server, "Serving").await;
    }

    servers[0].fails.store(true, Relaxed);
    let ejected = becomes(&caller, &servers[0], "Ejected").await;
    assert!(ejected["reason"].is_string() && ejected["next_probe"].is_string(), "{ejected:#}");
    for other in &servers[1..] {
        assert_eq!(breaker(&caller, other).await["state"], "Serving");
    }
    // It is asked now and then, and not as often as the others are.
    let before = servers.each_ref().map(|server| server.app.seen.load(Relaxed));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let asked: Vec<u64> =
        servers.iter().zip(before).map(|(server, before)| server.app.seen.load(Relaxed) - before).collect();
    assert!(asked[0] * 10 < asked[1] + asked[2], "{asked:?}");

    servers[0].fails.store(false, Relaxed);
    let well = becomes(&caller, &servers[0], "Serving").await;
    let history: Vec<_> = well["history"].as_array().expect("a history").iter().map(|turn| &turn["state"]).collect();
    assert!(history.ends_with(&[&"Probing".into(), &"Probing".into(), &"Serving".into()]), "{well:#}");
    load.stop().await.assert_none_failed(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_circuit_breaker_answers_at_once_while_it_is_open_and_closes_once_the_service_is_well() {
    let server = [Moody::start().await];
    let policy = "---\napiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: web}\nspec:\n  \
                  targetRefs: [{kind: Service, name: web}]\n  circuitBreaker: {failureThreshold: 3, recoveryTimeout: 2s}\n";
    let mesh = Mesh::with_resources(&format!("{}{policy}", service(&server)), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    server[0].fails.store(true, Relaxed);
    let open = eventually("the circuit is open", START, || async {
        let answer = sheetbend_tests::http::get(caller.proxy(), "http://web/").await.ok()?;
        let said = answer.headers.get("proxy-status")?.to_str().ok()?;
        said.contains("the circuit breaker of web:80 is open").then_some(answer)
    });
    let open = open.await;
    assert_eq!(open.status, 503);
    assert!(open.headers.get("retry-after").is_some_and(|wait| wait == "1" || wait == "2"), "{open:?}");
    let shown = caller.page("/breakers").await.json();
    assert_eq!(shown["circuit_breakers"][0]["backend"], "web.default:80", "{shown:#}");
    assert!(caller.counter("sheetbend_circuit_opened_total", &[]).await >= 1.0);
    assert!(caller.counter("sheetbend_circuit_rejected_total", &[]).await >= 1.0);

    server[0].fails.store(false, Relaxed);
    caller.first_answer("http://web/").await;
    let shown = caller.page("/breakers").await.json();
    assert_eq!(shown["circuit_breakers"][0]["state"], "Closed", "{shown:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_endpoints_fail_none_is_ejected() {
    let servers = [Moody::start().await, Moody::start().await, Moody::start().await];
    let mesh = Mesh::with_resources(&service(&servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    for server in &servers {
        becomes(&caller, server, "Serving").await;
    }
    servers.iter().for_each(|server| server.fails.store(true, Relaxed));
    eventually("a hundred failures", START, || async { (load.so_far().failed.len() >= 100).then_some(()) }).await;
    assert_eq!(caller.counter("sheetbend_ejections_total", &[]).await, 0.0);
    servers.iter().for_each(|server| server.fails.store(false, Relaxed));
    let good = load.so_far().good.len();
    eventually("a hundred answers", START, || async { (load.so_far().good.len() >= good + 100).then_some(()) }).await;
    load.stop().await;
}
