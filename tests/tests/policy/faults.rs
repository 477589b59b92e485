//! Faults that are injected on purpose: who gets them, what is logged, and that no endpoint is blamed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use sheetbend_tests::http::{Answer, http1, read};
use sheetbend_tests::{App, Mesh, Sidecar, full};

/// Whatever takes so long has not been ended by a timer of a second or less.
const FAR: Duration = Duration::from_secs(20);

struct Story {
    _mesh: Mesh,
    caller: Sidecar,
    _app: App,
    asked: Arc<AtomicUsize>,
}

impl Story {
    async fn begin(fault: &str) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let app = App::start(move |_: Request<Incoming>| {
            count.fetch_add(1, Relaxed);
            async { Response::new(full("fine")) }
        })
        .await;
        let port = app.port();
        let mesh = Mesh::with_resources(
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{ports: [{{port: 80}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: web, labels: {{kubernetes.io/service-name: web}}}}\n\
                 addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n\
                 apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: slow}}\nspec:\n  \
                 parentRefs: [{{kind: Service, group: \"\", name: web}}]\n  rules:\n  - matches: [{{path: {{value: /timed}}}}]\n    \
                 timeouts: {{request: 300ms}}\n    backendRefs: [{{name: web, port: 80}}]\n  - backendRefs: [{{name: web, port: 80}}]\n---\n\
                 apiVersion: sheetbend.io/v1alpha1\nkind: FaultInjection\nmetadata: {{name: chaos}}\nspec:\n  \
                 targetRefs: [{{kind: Service, name: web}}]\n  {fault}\n"
            ),
            &[],
        );
        let caller = mesh.caller("caller");
        caller.first_answer("http://web/").await;
        asked.store(0, Relaxed);
        Self { _mesh: mesh, caller, _app: app, asked }
    }

    async fn ask(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        let mut sender = http1(self.caller.proxy()).await.expect("a connection");
        let request = headers.iter().fold(Request::get(format!("http://web{path}")), |r, (n, v)| r.header(*n, *v));
        let request = request.header("host", "web").body(Full::default()).expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        read(answer).await.expect("a whole answer")
    }
}

const CHOSEN: [(&str, &str); 1] = [("x-chaos", "yes")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_answers_those_it_is_for_and_no_endpoint_is_asked_or_blamed() {
    let mut story = Story::begin(
        "headers: [{name: x-chaos, value: \"yes\"}]\n  abort: {percentage: {value: 100}, httpStatus: 503}",
    )
    .await;
    for _ in 0..20 {
        let answer = story.ask("/", &CHOSEN).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        let why = answer.headers["proxy-status"].to_str().expect("text");
        assert!(why.contains("proxy_internal_response") && why.contains("default/chaos"), "{why}");
    }
    assert_eq!(story.asked.load(Relaxed), 0, "nothing was sent");
    assert_eq!(story.ask("/", &[]).await.text(), "fine");
    assert_eq!(story.caller.counter("sheetbend_faults_injected_total", &["kind=\"abort\""]).await, 20.0);
    let breakers: serde_json::Value = serde_json::from_str(&story.caller.page("/breakers").await.text()).expect("JSON");
    let endpoints = breakers["endpoints"].as_array().expect("endpoints");
    assert!(!endpoints.is_empty(), "{breakers}");
    for endpoint in endpoints {
        assert_eq!((&endpoint["state"], &endpoint["failures"]), (&"Serving".into(), &0.into()), "{endpoint}");
    }
    let line = story.caller.process.wait_for("FI", FAR);
    assert!(line.contains("503"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grpc_call_is_aborted_with_its_own_status() {
    let story = Story::begin("abort: {percentage: {value: 100}, grpcStatus: RESOURCE_EXHAUSTED}").await;
    let call = story.ask("/shop.Cart/Add", &[("content-type", "application/grpc")]).await;
    assert_eq!((call.status, &call.headers["grpc-status"]), (StatusCode::OK, &http::HeaderValue::from(8)));
    assert_eq!(story.ask("/", &[]).await.text(), "fine", "which is no gRPC call");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_request_waits_and_is_logged_as_delayed_on_purpose() {
    let mut story = Story::begin(
        "headers: [{name: x-chaos, type: RegularExpression, value: 'y.*'}]\n  \
         delay: {percentage: {value: 100}, fixedDelay: 400ms}",
    )
    .await;
    let began = Instant::now();
    let answer = story.ask("/waits", &CHOSEN).await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "fine".to_string()));
    assert!(began.elapsed() >= Duration::from_millis(400));
    assert_eq!(story.caller.counter("sheetbend_faults_injected_total", &["kind=\"delay\""]).await, 1.0);
    let line = story.caller.process.wait_for("/waits", FAR);
    assert!(line.contains("DI"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delay_ends_with_the_requests_deadline() {
    let story =
        Story::begin("headers: [{name: x-chaos, value: \"yes\"}]\n  delay: {percentage: {value: 100}, fixedDelay: 1h}")
            .await;
    let began = Instant::now();
    let answer = story.ask("/timed", &CHOSEN).await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert!(began.elapsed() < FAR);
    assert_eq!(story.asked.load(Relaxed), 0, "nothing was sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_of_the_requests_are_about_half_of_them() {
    const ALL: usize = 400;
    let story =
        Story::begin("headers: [{name: x-chaos, value: \"yes\"}]\n  abort: {percentage: {value: 50}, httpStatus: 418}")
            .await;
    let mut aborted = 0;
    for _ in 0..ALL {
        aborted += usize::from(story.ask("/", &CHOSEN).await.status == StatusCode::IM_A_TEAPOT);
    }
    // 200 are expected, and the standard deviation is √(400 · 0.5 · 0.5) = 10: seven of them are 70.
    assert!((130..=270).contains(&aborted), "{aborted} of {ALL}");
}
