//! An app that can do some requests at once, and more callers than that.

use std::sync::atomic::Ordering::SeqCst;

use serde_json::json;
use sheetbend_tests::http::{self as client, Answer};
use sheetbend_tests::{Mesh, START, Sidecar, Slow, eventually};
use tokio::task::JoinSet;

fn concurrency(words: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: web}}\n\
         spec: {{targetRefs: [{{kind: Service, group: \"\", name: web}}], concurrency: {words}}}\n"
    )
}

fn callers(caller: &Sidecar, count: usize) -> JoinSet<Answer> {
    let proxy = caller.proxy();
    (0..count).map(|_| async move { client::get(proxy, "http://web/").await.expect("an answer") }).collect()
}

/// How full the app is, as its sidecar shows it.
async fn level(web: &Sidecar, limit: &str) -> serde_json::Value {
    let page = web.page("/clusters").await.json();
    let found = page["limits"].as_array().into_iter().flatten().find(|one| one["of"] == "the app");
    found.map(|one| one[limit].clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_can_do_ten_at_once_has_ten_and_goes_on_answering() {
    let slow = Slow::start().await;
    let words = "{maxRequests: 10, maxPending: 5, pendingTimeout: 300ms, exemptPaths: [/healthz]}";
    let mesh = Mesh::with_resources(&concurrency(words), &[]);
    let web = mesh.run("web").port(slow.app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/healthz").await;

    let mut all = callers(&caller, 60);
    // The app answers none of them; whoever waited for their turn has given up by the end.
    for _ in 0..50 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert_eq!(answer.headers["retry-after"], "1");
    }
    slow.has(10).await;
    assert_eq!(level(&web, "requests").await, json!({"taken": 10, "most": 10}));
    assert_eq!(level(&web, "pending").await, json!({"taken": 0, "most": 5}));
    // Whoever looks after its health finds it well.
    let health = client::get(caller.proxy(), "http://web/healthz").await.expect("an answer");
    assert_eq!(health.text(), "well\n");
    slow.open.send_replace(true);
    for answer in all.join_all().await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(slow.most.load(SeqCst), 10);
    for reason in ["full", "waited"] {
        assert!(web.counter("sheetbend_shed_total", &[reason]).await >= 1.0, "{reason}");
    }
    let flagged = web.counter("istio_requests_total", &["response_flags=\"UO\"", "response_code=\"503\""]).await;
    assert!(flagged >= 50.0, "{flagged}");
    // It is well, and its callers do not hold against it that it had enough to do.
    let breakers = caller.page("/breakers").await.json();
    assert_eq!(breakers["endpoints"][0]["state"], "Serving", "{breakers:#}");
    assert_eq!(breakers["endpoints"][0]["failures"], 0, "{breakers:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_has_their_turn_and_a_higher_limit_lets_them_in_at_once() {
    let slow = Slow::start().await;
    let words = |most: u32| concurrency(&format!("{{maxRequests: {most}, maxPending: 10, pendingTimeout: 10m}}"));
    let mesh = Mesh::with_resources(&words(2), &[]);
    let web = mesh.run("web").port(slow.app.port()).serve();
    let caller = mesh.caller("caller");
    slow.open.send_replace(true);
    caller.first_answer("http://web/").await;
    slow.open.send_replace(false);
    slow.most.store(0, SeqCst);

    let all = callers(&caller, 8);
    slow.has(2).await;
    eventually("six wait", START, || async { (level(&web, "pending").await["taken"] == 6).then_some(()) }).await;
    mesh.write_resources(&words(5));
    slow.has(5).await;
    eventually("three wait", START, || async { (level(&web, "pending").await["taken"] == 3).then_some(()) }).await;
    // Fewer from now on: those that are there stay.
    mesh.write_resources(&words(1));
    eventually("one may come", START, || async { (level(&web, "requests").await["most"] == 1).then_some(()) }).await;
    slow.has(5).await;
    slow.open.send_replace(true);
    for answer in all.join_all().await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(slow.most.load(SeqCst), 5);
    eventually("nobody is there", START, || async {
        (level(&web, "requests").await == json!({"taken": 0, "most": 1})).then_some(())
    })
    .await;
    caller.first_answer("http://web/").await;
}
