//! What may be under way at once: to a destination, by a route, and what happens beyond it.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use sheetbend_tests::http::{self as client, Answer};
use sheetbend_tests::{App, Mesh, START, Sidecar, Slow, eventually, full, long, service};
use tokio::task::JoinSet;

/// The service, its one endpoint in plain, and what an operator says of it.
fn resources(app: &App, more: &str) -> String {
    format!("{}---\n{more}", service("web", &[app.port()]))
}

fn connection_pool(words: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: web}}\n\
         spec: {{targetRefs: [{{kind: Service, group: \"\", name: web}}], connectionPool: {words}}}\n"
    )
}

/// A route of the reports, to which these limits apply, and one of all the rest.
fn two_routes(limits: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: reports}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: web}}]\n  rules:\n  \
         - matches: [{{path: {{type: PathPrefix, value: /reports}}}}]\n    \
         backendRefs: [{{name: web, port: 80}}]\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: rest}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: web}}]\n  rules: [{{backendRefs: [{{name: web, port: 80}}]}}]\n---\n\
         apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: reports}}\nspec:\n  \
         targetRefs: [{{kind: HTTPRoute, group: gateway.networking.k8s.io, name: reports}}]\n  \
         concurrency: {{{limits}}}\n"
    )
}

/// So many callers at once, each over a connection of its own.
fn callers(caller: &Sidecar, count: usize, url: &'static str) -> JoinSet<Answer> {
    let proxy = caller.proxy();
    (0..count).map(|_| async move { client::get(proxy, url).await.expect("an answer") }).collect()
}

/// How full a limit is, as `/clusters` shows it.
async fn level(sidecar: &Sidecar, of: &str, limit: &str) -> Value {
    let page = sidecar.page("/clusters").await.json();
    let found = page["limits"].as_array().into_iter().flatten().find(|one| one["of"] == of);
    found.map(|one| one[limit].clone()).unwrap_or_default()
}

/// Waits until the limits are known, without a request.
async fn known(caller: &Sidecar, most: u64, limit: &str) {
    // The first request asks for the destination; it is none of the app's, since nobody listens for it there.
    eventually("the limit is known", START, || async {
        let _ = tokio::time::timeout(Duration::from_millis(200), client::get(caller.proxy(), "http://web/")).await;
        (level(caller, "web.default:80", limit).await["most"] == most).then_some(())
    })
    .await;
    eventually("nothing is under way", START, || async {
        (level(caller, "web.default:80", "requests").await["taken"] == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_requests_are_with_a_slow_server_and_the_other_forty_five_are_told_at_once() {
    let slow = Slow::start().await;
    let mesh = Mesh::with_resources(&resources(&slow.app, &connection_pool("{http: {http2MaxRequests: 5}}")), &[]);
    let caller = mesh.caller("caller");
    known(&caller, 5, "requests").await;
    slow.has(0).await;
    slow.most.store(0, SeqCst);

    let mut all = callers(&caller, 50, "http://web/");
    // The server answers nobody: whoever has an answer has it from the sidecar.
    for _ in 0..45 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
        let why = answer.headers["proxy-status"].to_str().expect("text");
        assert!(why.starts_with("sheetbend; error=connection_limit_reached"), "{why}");
    }
    slow.has(5).await;
    assert_eq!(level(&caller, "web.default:80", "requests").await, serde_json::json!({"taken": 5, "most": 5}));
    slow.open.send_replace(true);
    while let Some(answer) = all.join_next().await {
        assert_eq!(answer.expect("an answer").status, 200);
    }
    assert_eq!(slow.most.load(SeqCst), 5);
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"requests\""]).await, 45.0);
    let flagged = caller.counter("istio_requests_total", &["response_flags=\"UO\"", "response_code=\"503\""]).await;
    assert_eq!(flagged, 45.0);
    let breakers = caller.page("/breakers").await.json();
    assert_eq!(breakers["endpoints"][0]["state"], "Serving", "{breakers:#}");
    assert_eq!(breakers["endpoints"][0]["consecutive_failures"], 0, "{breakers:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_requests_share_as_many_connections_as_there_may_be_and_no_more_wait_than_may() {
    let slow = Slow::start().await;
    let limits = "{tcp: {maxConnections: 2}, http: {http1MaxPendingRequests: 3}}";
    let mesh = Mesh::with_resources(&resources(&slow.app, &connection_pool(limits)), &[]);
    let caller = mesh.caller("caller");
    known(&caller, 2, "connections").await;
    slow.has(0).await;
    slow.most.store(0, SeqCst);

    let mut all = callers(&caller, 20, "http://web/");
    for _ in 0..15 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
    }
    slow.has(2).await;
    slow.open.send_replace(true);
    let mut passed = 0;
    while let Some(answer) = all.join_next().await {
        let answer = answer.expect("an answer");
        assert!(matches!(answer.status.as_u16(), 200 | 503), "{}", answer.text());
        passed += u32::from(answer.status == 200);
    }
    // Two on the connections and three that waited; or fewer, since who dials waits too.
    assert!((3..=5).contains(&passed), "{passed}");
    assert_eq!(slow.most.load(SeqCst), 2);
    let refused = caller.counter("sheetbend_overflow_total", &["limit=\"pending\""]).await;
    assert_eq!(refused, f64::from(20 - passed));
    // A worker whose connections are idle gives them up for the other's requests, and for those that want fresh ones.
    for number in 0..20 {
        let method = if number % 2 == 0 { "GET" } else { "POST" };
        let answer = client::send(caller.proxy(), method, "http://web/", "").await.expect("an answer");
        assert_eq!(answer.status, 200, "{number}: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_has_a_limit_of_its_own_and_others_go_on() {
    let slow = Slow::start().await;
    let mesh = Mesh::with_resources(&resources(&slow.app, &two_routes("maxRequests: 2")), &[]);
    let caller = mesh.caller("caller");
    known(&caller, 100_000, "requests").await;
    slow.has(0).await;

    let mut all = callers(&caller, 10, "http://web/reports");
    for _ in 0..8 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert!(answer.text().contains("route default/reports"), "{}", answer.text());
    }
    slow.has(2).await;
    let others = callers(&caller, 5, "http://web/");
    slow.has(7).await;
    slow.open.send_replace(true);
    for answer in all.join_all().await.into_iter().chain(others.join_all().await) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"route\""]).await, 8.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_of_a_route_s_requests_wait_for_a_connection_than_may_and_others_wait_on() {
    let slow = Slow::start().await;
    let more = format!(
        "{}---\n{}",
        connection_pool("{tcp: {maxConnections: 2}}"),
        two_routes("maxRequests: 100, maxPending: 3")
    );
    let mesh = Mesh::with_resources(&resources(&slow.app, &more), &[]);
    let caller = mesh.caller("caller");
    known(&caller, 2, "connections").await;
    slow.has(0).await;

    // They keep both connections, and more of them wait for one.
    let others = callers(&caller, 7, "http://web/");
    slow.has(2).await;
    eventually("the others wait", START, || async {
        (level(&caller, "web.default:80", "pending").await["taken"] == 5).then_some(())
    })
    .await;
    let mut all = callers(&caller, 10, "http://web/reports");
    for _ in 0..7 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert!(answer.text().contains("route default/reports"), "{}", answer.text());
        let why = answer.headers["proxy-status"].to_str().expect("text");
        assert!(why.starts_with("sheetbend; error=connection_limit_reached"), "{why}");
    }
    assert_eq!(level(&caller, "route default/reports", "pending").await, serde_json::json!({"taken": 3, "most": 3}));
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"pending\""]).await, 7.0);
    let flagged = caller.counter("istio_requests_total", &["response_flags=\"UO\"", "response_code=\"503\""]).await;
    assert_eq!(flagged, 7.0);
    slow.open.send_replace(true);
    for answer in all.join_all().await.into_iter().chain(others.join_all().await) {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(level(&caller, "route default/reports", "pending").await["taken"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_may_retry_nothing_gets_its_failures_while_others_are_retried() {
    let app =
        App::start(|_| async { Response::builder().status(503).body(full("failed\n")).expect("an answer") }).await;
    let mesh = Mesh::with_resources(&resources(&app, &two_routes("maxRequests: 100, maxRetries: 0")), &[]);
    let caller = mesh.caller("caller");
    known(&caller, 100_000, "requests").await;
    let attempts = async |url: &str| {
        let before = app.seen.load(SeqCst);
        let answer = client::get(caller.proxy(), url).await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.text().as_str()), (503, "failed\n"));
        app.seen.load(SeqCst) - before
    };
    assert_eq!(attempts("http://web/reports").await, 1);
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"retries\""]).await, 1.0);
    assert_eq!(attempts("http://web/").await, 2);
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"retries\""]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_is_free_again_however_a_request_ends() {
    let app = App::start(|request: Request<hyper::body::Incoming>| async move {
        match request.uri().path() {
            "/never" => std::future::pending().await,
            "/long" => Response::new(long(1 << 40)),
            "/fails" => Response::builder().status(500).body(full("")).expect("an answer"),
            _ => Response::new(full("well\n")),
        }
    })
    .await;
    let pool = connection_pool("{tcp: {maxConnections: 6}, http: {http2MaxRequests: 6}}");
    let mesh = Mesh::with_resources(&resources(&app, &pool), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    for _ in 0..10 {
        let mut gone = JoinSet::new();
        for path in ["/never", "/long", "/fails", "/"] {
            let proxy = caller.proxy();
            gone.spawn(async move {
                let mut sender = client::http1(proxy).await.expect("a connection");
                let uri = format!("http://web{path}");
                let request = Request::get(uri).header("host", "web").body(Full::default()).expect("a request");
                let answer = tokio::time::timeout(Duration::from_millis(100), sender.send_request(request)).await;
                if let Ok(Ok(answer)) = answer {
                    // One frame of it, and gone.
                    let _ = answer.into_body().frame().await;
                }
            });
        }
        gone.join_all().await;
    }
    for limit in ["requests", "pending", "retries"] {
        eventually(&format!("no {limit} are under way"), START, || async {
            (level(&caller, "web.default:80", limit).await["taken"] == 0).then_some(())
        })
        .await;
    }
    eventually("no more connections are held than are idle", START, || async {
        let held = level(&caller, "web.default:80", "connections").await["taken"].as_u64()?;
        (held <= 2).then_some(())
    })
    .await;
    caller.first_answer("http://web/").await;
}
