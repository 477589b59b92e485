//! Resources that change while requests pass: what is new holds for the next request, and nothing else notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use serde_json::Value;
use sheetbend_tests::http::{self as client, get, read, send, tunnel};
use sheetbend_tests::{App, Load, Mesh, START, Sidecar, eventually, full, service};

/// Services with endpoints on these ports.
fn services(services: &[(&str, &[u16])]) -> String {
    services.iter().map(|(name, ports)| service(name, ports)).collect()
}

/// An HTTPRoute of `web` that leads to `backend`.
fn route(backend: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: switch}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: '', name: web}}]\n  rules:\n  - backendRefs: [{{name: {backend}, port: 80}}]\n"
    )
}

/// Connections that are made once, one of each version.
struct Kept {
    http1: http1::SendRequest<Full<Bytes>>,
    http2: http2::SendRequest<Full<Bytes>>,
}

impl Kept {
    async fn to(caller: &Sidecar) -> Self {
        let http1 = client::http1(caller.proxy()).await.expect("a connection");
        let tunnel = tunnel(caller.proxy(), "web:80").await.expect("a tunnel");
        Self { http1, http2: client::http2(tunnel).await.expect("a connection within it") }
    }

    /// Who answers over each; whatever is no answer fails the story.
    async fn ask(&mut self) -> [String; 2] {
        let request = || Request::get("http://web/").header("host", "web").body(Full::default()).expect("a request");
        self.http1.ready().await.expect("the HTTP/1.1 connection lives");
        let one = read(self.http1.send_request(request()).await.expect("an answer")).await.expect("all of it");
        self.http2.ready().await.expect("the HTTP/2 connection lives");
        let two = read(self.http2.send_request(request()).await.expect("an answer")).await.expect("all of it");
        assert!(one.status.is_success() && two.status.is_success(), "{one:?} {two:?}");
        [one.text(), two.text()]
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_route_holds_for_the_next_request_and_no_connection_request_or_verdict_is_lost() {
    let (blue, green) = (App::saying("blue").await, App::saying("green").await);
    let fails = Arc::new(AtomicBool::new(true));
    let says = Arc::clone(&fails);
    let moody = App::start(move |_| {
        let status = if says.load(Relaxed) { 503 } else { 200 };
        async move { Response::builder().status(status).body(full("blue")).expect("an answer") }
    })
    .await;
    let patient = "---\napiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: patient}\nspec:\n  \
                   targetRefs: [{kind: Service, name: blue}]\n  outlierDetection: {baseEjectionTime: 300s, maxEjectionTime: 300s}\n";
    let all = services(&[("web", &[]), ("blue", &[blue.port(), moody.port()]), ("green", &[green.port()])]) + patient;
    let resources = |backend: &str| route(backend) + &all;
    let mesh = Mesh::with_resources(&resources("blue"), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    let verdict = || async {
        let page = caller.page("/breakers").await.json();
        let place = moody.address.to_string();
        let found = page["endpoints"].as_array().into_iter().flatten().find(|one| one["endpoint"] == place.as_str());
        found.cloned().unwrap_or(Value::Null)
    };
    let ejected = eventually("the endpoint that fails is ejected", START, || async {
        Some(verdict().await).filter(|said| said["state"] == "Ejected")
    })
    .await;

    let mut kept = Kept::to(&caller).await;
    let mut took: Vec<Duration> = Vec::new();
    for round in 0..20 {
        let wanted = if round % 2 == 0 { "green" } else { "blue" };
        mesh.write_resources(&resources(wanted));
        let written = Instant::now();
        while kept.ask().await.iter().any(|said| said != wanted) {
            assert!(written.elapsed() < START, "{wanted} never answers");
        }
        took.push(written.elapsed());
    }
    took.sort();
    println!(
        "from the file to the first request: median {:?}, slowest {:?}",
        took[took.len() / 2],
        took[took.len() - 1]
    );
    assert!(took[0] < Duration::from_millis(100), "not even once within 100 ms: {took:?}");
    let still = verdict().await;
    assert_ne!(still["state"], "Serving", "{still:#}");
    assert_eq!(still["history"][0], ejected["history"][0], "{still:#}");
    load.stop().await.assert_none_failed(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_file_is_refused_with_its_place_while_what_it_last_said_holds() {
    let (blue, green) = (App::saying("blue").await, App::saying("green").await);
    let all = services(&[("web", &[]), ("blue", &[blue.port()]), ("green", &[green.port()])]);
    let mesh = Mesh::with_resources(&(route("blue") + &all), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 2, 20.0);
    let mut kept = Kept::to(&caller).await;
    let refused = || async {
        let page = get(mesh.control_plane_admin(), "/resources").await.expect("an answer").json();
        page["files"][0]["refused"].as_str().map(str::to_string)
    };

    mesh.write_resources(&(route("green").replace("backendRefs", "bakcendRefs") + &all));
    let why = eventually("the file is refused", START, refused).await;
    assert!(why.ends_with("/mesh.yaml:7:5: unknown field `bakcendRefs`; did you mean `backendRefs`?"), "{why}");
    let metrics = get(mesh.control_plane_admin(), "/metrics").await.expect("an answer").text();
    assert!(metrics.contains("sheetbend_resource_files{state=\"refused\"} 1"), "{metrics}");
    for _ in 0..20 {
        assert_eq!(kept.ask().await, ["blue", "blue"], "what was last said well holds");
    }

    mesh.write_resources(&(route("green") + &all));
    let written = Instant::now();
    while kept.ask().await != ["green", "green"] {
        assert!(written.elapsed() < START, "what was mended never holds");
    }
    assert_eq!(refused().await, None);
    load.stop().await.assert_none_failed(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_is_nowhere_is_told_by_the_running_mesh_and_the_rest_works() {
    let blue = App::saying("blue").await;
    let rules = "  - matches: [{path: {value: /nowhere}}]\n    backendRefs: [{name: gone, port: 80}]\n";
    let all = services(&[("web", &[]), ("blue", &[blue.port()])]);
    let mut mesh = Mesh::with_resources(&(route("blue") + rules + &all), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let answer = send(caller.proxy(), "GET", "http://web/nowhere", "").await.expect("an answer");
    assert_eq!(answer.status, 503, "{}", answer.text());
    let page = get(mesh.control_plane_admin(), "/resources").await.expect("an answer").json();
    let (problem, none) = (&page["problems"][0], &page["problems"][1]);
    assert_eq!((&problem["line"], &problem["column"], none), (&9.into(), &26.into(), &Value::Null), "{page:#}");
    assert_eq!(problem["reason"], "missing backend: there is no Service default/gone");
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.starts_with("add the Service")), "{page:#}");
    mesh.control_plane().wait_for("mesh.yaml:9:26: missing backend: there is no Service default/gone", START);
}
