//! Why a request went the way it did, asked of real sidecars afterwards, or before it is sent.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;

use http::{Request, Response};
use http_body_util::Full;
use serde_json::Value;
use sheetbend_tests::http::{Answer, http1, read, send};
use sheetbend_tests::{App, Mesh, START, Sidecar, eventually, free_port, full, service};

/// An HTTPRoute of `web` with these rules, which begin on its seventh line.
fn route(rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: split}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: '', name: web}}]\n  rules:\n{rules}"
    )
}

/// Sends a request that has an id.
async fn ask(proxy: SocketAddr, method: &str, id: &str) -> Answer {
    let request = Request::builder().method(method).uri("http://web/buy?secret=1").header("host", "web");
    let request = request.header("x-request-id", id).body(Full::default()).expect("a request");
    let mut sender = http1(proxy).await.expect("a connection to the sidecar");
    read(sender.send_request(request).await.expect("an answer")).await.expect("a whole answer")
}

async fn record(sidecar: &Sidecar, id: &str) -> Value {
    eventually(&format!("{} tells of {id}", sidecar.service), START, || async {
        let page = sidecar.page(&format!("/explain/{id}")).await;
        page.status.is_success().then(|| page.json()["records"][0].clone())
    })
    .await
}

async fn keep_one_in(sidecar: &Sidecar, number: u32) {
    let url = format!("/explain?keep_one_in={number}");
    assert!(send(sidecar.admin(), "POST", &url, "").await.expect("an answer").status.is_success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_is_told_by_its_id_with_rule_candidates_attempts_and_verdicts() {
    let nobody = [free_port(), free_port()];
    let rules = "  - backendRefs: [{name: web, port: 80}]\n    matches: [{path: {value: /buy}}]\n";
    let mesh = Mesh::with_resources(&format!("{}{}", route(rules), service("web", &nobody)), &[]);
    let caller = mesh.caller("caller");
    // Known, and without an endpoint that answers.
    eventually("the sidecar knows the service", START, || async {
        (ask(caller.proxy(), "GET", "before").await.text().contains("cannot connect")).then_some(())
    })
    .await;
    keep_one_in(&caller, 0).await;
    assert_eq!(ask(caller.proxy(), "POST", "story-1").await.status, 502);
    let told = record(&caller, "story-1").await;
    assert_eq!((&told["method"], &told["path"], &told["status"]), (&"POST".into(), &"/buy".into(), &502.into()));
    assert_eq!(told["caught"], "sent to this proxy by the app (http_proxy)");
    assert_eq!((&told["detected"], &told["target"]), (&"HTTP/1.1".into(), &"web:80".into()));
    assert_eq!(told["rule"]["name"], "default/split#0");
    assert!(told["rule"]["place"].as_str().is_some_and(|place| place.ends_with("/mesh.yaml:7")), "{told:#}");
    let attempts = told["attempts"].as_array().expect("attempts");
    assert!(attempts.len() >= 2, "a connection that failed is tried once more: {told:#}");
    for attempt in attempts {
        assert!(attempt["outcome"].as_str().is_some_and(|outcome| outcome.contains("cannot connect")), "{told:#}");
        assert!(attempt["ms"].is_number() && attempt["endpoint"].is_string(), "{told:#}");
        assert_eq!((&attempt["candidates"]["total"], &attempt["connection"]), (&2.into(), &"new".into()), "{told:#}");
        assert!(attempt["candidates"]["endpoints"][0]["state"].is_string(), "{told:#}");
    }
    assert!(attempts[0]["retry"]["verdict"].as_str().is_some_and(|verdict| verdict.starts_with("another attempt")));
    assert_eq!(attempts[0]["retry"]["reason"], "connect");
    assert_eq!(attempts.last().expect("one")["retry"]["verdict"], "no other attempt");
    assert!(told["ended_by"].as_str().is_some_and(|by| by.starts_with("this proxy: cannot connect")), "{told:#}");

    let said = mesh.finish(["explain", "story-1"]).ok();
    for part in ["caller.default (outbound): story-1 POST /buy", "/mesh.yaml:7)", "attempt 2", "retry ", "ended by "] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("secret"), "{said}");
    let said: Value = serde_json::from_str(&mesh.finish(["explain", "story-1", "-o", "json"]).ok()).expect("JSON");
    assert_eq!(said[0]["said"]["records"][0]["request_id"], "story-1");
    let unknown = mesh.finish(["explain", "nobody"]);
    assert!(!unknown.status.success() && unknown.stderr.contains("nothing is kept of nobody"), "{}", unknown.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sidecars_tell_their_part() {
    let app = App::start(|_| async { Response::builder().status(500).body(full("no\n")).expect("an answer") }).await;
    let mesh = Mesh::local();
    let web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    let url = format!("http://web:{}/", app.port());
    eventually("the app's answer", START, || async {
        let request = Request::post(&url).header("host", "web").header("x-request-id", "both").body(Full::default());
        let mut sender = http1(caller.proxy()).await.ok()?;
        let answer = read(sender.send_request(request.expect("a request")).await.ok()?).await.ok()?;
        (answer.status == 500).then_some(())
    })
    .await;
    let (out, into) = (record(&caller, "both").await, record(&web, "both").await);
    assert_eq!((&out["side"], &into["side"]), (&"outbound".into(), &"inbound".into()));
    assert_eq!(into["caught"], "from a proxy of the mesh, by mutual TLS");
    assert_eq!(into["source"], "spiffe://cluster.local/ns/default/sa/caller");
    assert_eq!(into["attempts"][0]["endpoint"], app.address.to_string());
    assert_eq!((&out["ended_by"], &into["ended_by"]), (&"the answer's end".into(), &"the answer's end".into()));
    let said = mesh.finish(["explain", "both"]).ok();
    assert!(said.contains("(inbound): both") && said.contains("(outbound): both"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_successes_are_told_as_are_asked_for() {
    let app = App::saying("well\n").await;
    let mesh = Mesh::with_resources(&service("web", &[app.port()]), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    keep_one_in(&caller, 1).await;
    assert_eq!(ask(caller.proxy(), "GET", "kept").await.status, 200);
    let told = record(&caller, "kept").await;
    assert_eq!((&told["status"], &told["ended_by"]), (&200.into(), &"the answer's end".into()), "{told:#}");
    let attempt = &told["attempts"][0];
    assert_eq!(attempt["outcome"], "status 200", "{told:#}");
    // Each worker has connections of its own.
    eventually("a request over a connection that was there", START, || async {
        ask(caller.proxy(), "GET", "again").await;
        let told = caller.page("/explain/again").await.json();
        (told["records"][0]["attempts"][0]["connection"] == "reused").then_some(())
    })
    .await;
    assert_eq!(attempt["candidates"]["seen"], "at the pick");
    assert!(attempt["candidates"]["endpoints"][0]["score"].is_number(), "{told:#}");
    keep_one_in(&caller, 0).await;
    assert_eq!(ask(caller.proxy(), "GET", "not-kept").await.status, 200);
    assert_eq!(ask(caller.proxy(), "GET", "kept").await.status, 200);
    let list = caller.page("/explain").await.json();
    let of =
        |id: &str| list["requests"].as_array().expect("a list").iter().filter(|one| one["request_id"] == id).count();
    assert_eq!((of("kept"), of("not-kept")), (1, 0), "{list:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_timer_that_ended_a_request_is_told() {
    let app = App::start(|request: Request<hyper::body::Incoming>| async move {
        if request.uri().path() == "/buy" {
            std::future::pending::<()>().await;
        }
        Response::new(full("well\n"))
    })
    .await;
    let rules = "  - backendRefs: [{name: web, port: 80}]\n    matches: [{path: {value: /buy}}]\n    \
                 timeouts: {request: 300ms}\n  - backendRefs: [{name: web, port: 80}]\n";
    let mesh = Mesh::with_resources(&format!("{}{}", route(rules), service("web", &[app.port()])), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    assert_eq!(ask(caller.proxy(), "POST", "slow").await.status, 504);
    let told = record(&caller, "slow").await;
    let by = told["ended_by"].as_str().expect("words");
    assert!(by.contains("deadline") || by.contains("time"), "{told:#}");
    assert_eq!(told["flags"], "UT");
    assert_eq!(told["attempts"][0]["endpoint"], app.address.to_string(), "{told:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_be_decided_is_told_and_nothing_is_sent() {
    let (app, canary) = (App::saying("web\n").await, App::saying("canary\n").await);
    let rules = "  - matches: [{headers: [{name: x-user, value: tester}]}]\n    \
                 backendRefs: [{name: web, port: 80, weight: 1}, {name: canary, port: 80, weight: 3}]\n";
    let services = format!("{}{}", service("web", &[app.port()]), service("canary", &[canary.port()]));
    let mesh = Mesh::with_resources(&format!("{}{services}", route(rules)), &[]);
    let _caller = mesh.caller("caller");
    let explain = |more: &[&str]| {
        let words = [&["explain", "--to", "web:80", "-o", "json"], more].concat();
        let said: Value = serde_json::from_str(&mesh.finish(words).ok()).expect("JSON");
        said[0]["said"]["decided"].clone()
    };
    let tester = explain(&["--header", "x-user=tester", "--method", "POST", "--path", "/a?b"]);
    assert_eq!(tester["rule"]["name"], "default/split#0", "{tester:#}");
    assert!(tester["rule"]["place"].as_str().is_some_and(|place| place.ends_with("/mesh.yaml:7")), "{tester:#}");
    let share = |at: usize| (tester["backends"][at]["backend"].clone(), tester["backends"][at]["percent"].clone());
    assert_eq!(share(0), ("web.default:80".into(), 25.0.into()));
    assert_eq!(share(1), ("canary.default:80".into(), 75.0.into()));
    let candidate = &tester["backends"][1]["candidates"]["endpoints"][0];
    assert_eq!((&candidate["endpoint"], &candidate["state"]), (&canary.address.to_string().into(), &"Serving".into()));
    let other = explain(&[]);
    assert_eq!(other["rule"]["name"], "default/split#no-rule", "{other:#}");
    assert_eq!(other["backends"], serde_json::json!([]));
    let text = mesh.finish(["explain", "--to", "web:80", "--header", "x-user=tester"]).ok();
    assert!(text.contains("rule default/split#0 (") && text.contains("canary.default:80 gets 75"), "{text}");
    assert_eq!((app.seen.load(Relaxed), canary.seen.load(Relaxed)), (0, 0));
}
