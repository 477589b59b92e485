//! How many requests in which time: of a service, of each caller, of each value of a header, of a route.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::Request;
use http_body_util::Full;
use sheetbend_tests::http::{self as client, Answer};
use sheetbend_tests::{App, Mesh, START, Sidecar, eventually};

/// A limit of the service `web`, as its own sidecar keeps it.
fn limit(rates: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: web}}\n\
         spec: {{targetRefs: [{{kind: Service, group: \"\", name: web}}], rates: [{rates}]}}\n"
    )
}

async fn web(mesh: &Mesh) -> (App, Sidecar) {
    let app = App::saying("web\n").await;
    let sidecar = mesh.run("web").port(app.port()).serve();
    (app, sidecar)
}

async fn ask(caller: &Sidecar, headers: &[(&str, &str)]) -> Answer {
    let mut sender = client::http1(caller.proxy()).await.expect("a connection");
    let request = Request::get("http://web/").header("host", "web");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let answer = sender.send_request(request.body(Full::default()).expect("a request")).await.expect("an answer");
    client::read(answer).await.expect("a whole answer")
}

/// Asks until it is told to wait: how often it passed before.
async fn until_limited(caller: &Sidecar, headers: &[(&str, &str)]) -> (usize, Answer) {
    for passed in 0..1_000 {
        let answer = ask(caller, headers).await;
        match answer.status.as_u16() {
            200 => {}
            429 => return (passed, answer),
            other => panic!("{other}: {}", answer.text()),
        }
    }
    panic!("a thousand requests passed");
}

/// Waits until the mesh knows `web`, of which the sidecar is asked nothing.
async fn registered(caller: &Sidecar) {
    eventually("web is known", START, || async {
        let answer = client::get(caller.proxy(), "http://web/").await.ok()?;
        matches!(answer.status.as_u16(), 200 | 429).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_too_often_is_told_how_long_to_wait_and_passes_then() {
    let mesh = Mesh::with_resources(&limit("{requests: 1, interval: 3s, burst: 4}"), &[]);
    let (_app, web) = web(&mesh).await;
    let caller = mesh.caller("caller");
    registered(&caller).await;
    let (_, refused) = until_limited(&caller, &[]).await;
    let seconds: u64 = refused.headers["retry-after"].to_str().expect("text").parse().expect("seconds");
    assert!((1..=3).contains(&seconds), "{seconds}");
    assert_eq!(refused.headers["ratelimit"], format!("\"limit\";r=0;t={seconds}"));
    // Which limit it was is the operator's to know.
    assert!(!format!("{:?}{}", refused.headers, refused.text()).contains("default/web"), "{refused:?}");
    eventually("the log names the limit", START, || async {
        web.process.stderr().contains("\"the rate limit is reached: default/web#0\"").then_some(())
    })
    .await;
    assert!(refused.headers["proxy-status"].to_str().is_ok_and(|why| why.contains("error=http_request_denied")));
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert_eq!(ask(&caller, &[]).await.status, 200);
    assert!(web.counter("sheetbend_rate_limited_total", &["side=\"inbound\""]).await >= 1.0);
    assert!(web.counter("istio_requests_total", &["response_flags=\"RL\"", "response_code=\"429\""]).await >= 1.0);
    // It says nothing against the endpoint.
    let breakers = caller.page("/breakers").await.json();
    assert_eq!(breakers["endpoints"][0]["failures"], 0, "{breakers:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_caller_and_each_value_of_a_header_has_a_bucket_of_its_own() {
    let mesh = Mesh::with_resources(&limit("{requests: 5, interval: 1h, forEach: Caller}"), &[]);
    let (app, _web) = web(&mesh).await;
    let (one, two) = (mesh.caller("one"), mesh.caller("two"));
    registered(&one).await;
    until_limited(&one, &[]).await;
    assert_eq!(app.seen.load(Relaxed), 5);
    registered(&two).await;
    until_limited(&two, &[]).await;
    assert_eq!(app.seen.load(Relaxed), 10);

    mesh.write_resources(&limit("{requests: 2, interval: 1h, forEach: Header, header: x-key}"));
    // Everybody without the header shares one bucket.
    eventually("the new limit holds", START, || async { (ask(&one, &[]).await.status == 200).then_some(()) }).await;
    assert_eq!(until_limited(&two, &[("x-key", "a")]).await.0, 2);
    assert_eq!(until_limited(&one, &[("x-key", "b")]).await.0, 2);
    assert_eq!(ask(&one, &[("x-key", "a")]).await.status, 429);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grpc_call_is_told_in_its_own_words() {
    let mesh = Mesh::with_resources(&limit("{requests: 1, interval: 1h}"), &[]);
    let (_app, _web) = web(&mesh).await;
    let caller = mesh.caller("caller");
    registered(&caller).await;
    until_limited(&caller, &[]).await;
    let answer = ask(&caller, &[("content-type", "application/grpc"), ("te", "trailers")]).await;
    assert_eq!((answer.status.as_u16(), &answer.headers["grpc-status"]), (200, &"8".parse().expect("a value")));
    assert!(answer.headers.contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_routes_limit_is_kept_by_the_callers_sidecar() {
    let rates = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  \
                 parentRefs: [{kind: Service, group: \"\", name: web}]\n  rules:\n  - backendRefs: [{name: web, port: 80}]\n\
                 ---\napiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {name: web}\nspec:\n  \
                 targetRefs: [{kind: HTTPRoute, group: gateway.networking.k8s.io, name: web}]\n  \
                 rates: [{requests: 4, interval: 1h}]\n";
    let app = App::saying("web\n").await;
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{ports: [{{port: 80, targetPort: {}}}]}}\n---\n",
        app.port()
    );
    let mesh = Mesh::with_resources(&(service + rates), &[]);
    let web = mesh.run("web").port(app.port()).serve();
    let (one, two) = (mesh.caller("one"), mesh.caller("two"));
    for caller in [&one, &two] {
        let before = app.seen.load(Relaxed);
        registered(caller).await;
        until_limited(caller, &[]).await;
        assert_eq!(app.seen.load(Relaxed) - before, 4);
        assert!(caller.counter("sheetbend_rate_limited_total", &["side=\"outbound\""]).await >= 1.0);
    }
    assert_eq!(web.counter("sheetbend_rate_limited_total", &[]).await, 0.0);
}
