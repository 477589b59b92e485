//! Which rule takes a request, where it goes, and what is done to it on the way: real servers behind real sidecars.

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use sheetbend_tests::http::{Answer, http1, http2, read, tunnel};
use sheetbend_tests::{App, Mesh, Sidecar, full};

/// A server that says who it is and what it was asked.
async fn saying(name: &'static str) -> App {
    App::start(move |request: Request<Incoming>| async move {
        let header = |name: &str| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or("-").to_string();
        let host = request.uri().authority().map_or_else(|| header("host"), |authority| authority.to_string());
        let target = request.uri().path_and_query().map_or("", |target| target.as_str());
        let text = format!("{name} {host} {target} x-new={} x-old={}", header("x-new"), header("x-old"));
        Response::builder().header("x-server", name).header("x-secret", "1").body(full(text)).expect("an answer")
    })
    .await
}

/// A Service on port 80 with one endpoint.
fn service(name: &str, app: &App) -> String {
    let port = app.port();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n"
    )
}

fn route(kind: &str, rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: web}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: web}}]\n  rules:\n{rules}"
    )
}

/// Two versions of a service, a route to them, and one who calls them.
struct Story {
    mesh: Mesh,
    caller: Sidecar,
    _apps: [App; 2],
    services: String,
}

impl Story {
    async fn begin(rules: &str) -> Self {
        Self::with(&route("HTTPRoute", rules)).await
    }

    async fn with(route: &str) -> Self {
        let apps = [saying("v1").await, saying("v2").await];
        let services = service("web", &apps[0]) + &service("web-v2", &apps[1]);
        let mesh = Mesh::with_resources(&format!("{services}{route}"), &[]);
        let caller = mesh.caller("caller");
        caller.first_answer("http://web-v2/").await;
        Self { mesh, caller, _apps: apps, services }
    }

    async fn ask(&self, request: http::request::Builder) -> Answer {
        let mut sender = http1(self.caller.proxy()).await.expect("a connection");
        let request = request.header("host", "web").body(Full::default()).expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        read(answer).await.expect("a whole answer")
    }

    async fn get(&self, target: &str) -> Answer {
        self.ask(Request::get(format!("http://web{target}"))).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_gets_the_share_that_its_weight_says() {
    const ALL: usize = 2_000;
    let story =
        Story::begin("  - backendRefs: [{name: web, port: 80, weight: 90}, {name: web-v2, port: 80, weight: 10}]\n")
            .await;
    let mut sender = http1(story.caller.proxy()).await.expect("a connection");
    let mut canary = 0;
    for _ in 0..ALL {
        sender.ready().await.expect("the connection stays");
        let request = Request::get("http://web/").header("host", "web").body(Full::default()).expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        canary += usize::from(answer.headers()["x-server"] == "v2");
        answer.into_body().collect().await.expect("a whole answer");
    }
    // 200 are expected, and the standard deviation is √(2000 · 0.1 · 0.9) = 13.4: seven of them are less than 100.
    assert!((100..=300).contains(&canary), "{canary} of {ALL}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_most_specific_rule_takes_a_request_and_what_no_rule_takes_is_not_found() {
    let to = "backendRefs: [{name: web, port: 80}]";
    let v2 = "backendRefs: [{name: web-v2, port: 80}]";
    let story = Story::begin(&format!(
        "  - matches: [{{path: {{value: /shop}}}}]\n    {to}\n  \
         - matches:\n    - {{path: {{value: /shop}}, headers: [{{name: x-version, value: \"2\"}}]}}\n    \
         - {{path: {{type: Exact, value: /shop/new}}}}\n    \
         - {{path: {{type: RegularExpression, value: '/shop/items/[0-9]+'}}}}\n    \
         - {{path: {{value: /shop}}, queryParams: [{{name: beta, type: RegularExpression, value: 'yes|on'}}]}}\n    \
         - {{path: {{value: /shop}}, method: DELETE}}\n    {v2}\n"
    ))
    .await;
    for (target, server) in [
        ("/shop", "v1"),
        ("/shop/new", "v2"),
        ("/shop/new/", "v1"),
        ("/shop/items/17", "v2"),
        ("/shop/items/17/a", "v1"),
        ("/shop?beta=on", "v2"),
        ("/shop?beta=once", "v1"),
    ] {
        assert_eq!(story.get(target).await.headers["x-server"], server, "{target}");
    }
    let by_header = story.ask(Request::get("http://web/shop").header("x-version", "2")).await;
    assert_eq!(by_header.headers["x-server"], "v2");
    assert_eq!(story.ask(Request::delete("http://web/shop/a")).await.headers["x-server"], "v2");
    let nothing = story.get("/shopping").await;
    assert_eq!(nothing.status, StatusCode::NOT_FOUND);
    assert!(nothing.headers["proxy-status"].to_str().expect("text").contains("destination_not_found"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_answers_without_an_upstream() {
    let story = Story::begin(
        "  - matches: [{path: {value: /old}}]\n    filters:\n    - type: RequestRedirect\n      \
         requestRedirect: {scheme: https, hostname: shop.example, port: 8443, statusCode: 301, \
         path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}\n  - backendRefs: [{name: web, port: 80}]\n",
    )
    .await;
    let answer = story.get("/old/a?b=c").await;
    assert_eq!(answer.status, StatusCode::MOVED_PERMANENTLY);
    assert_eq!(answer.headers["location"], "https://shop.example:8443/new/a?b=c");
    assert!(answer.headers.contains_key("proxy-status") && !answer.headers.contains_key("x-server"));
    assert_eq!(story.caller.counter("sheetbend_redirects_total", &[]).await, 1.0);
    assert_eq!(story.get("/").await.headers["x-server"], "v1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_rewritten_and_headers_are_edited_both_ways() {
    let story = Story::begin(
        "  - matches: [{path: {value: /api}}]\n    filters:\n    - type: URLRewrite\n      \
         urlRewrite: {hostname: inner.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v2}}\n    \
         - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-New, value: \"1\"}], remove: [X-Old]}}\n    \
         - {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [x-secret], add: [{name: x-seen, value: \"2\"}]}}\n    \
         backendRefs: [{name: web, port: 80}]\n  \
         - matches: [{path: {value: /one}}]\n    backendRefs:\n    - {name: web, port: 80, filters: \
         [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-new, value: of-backend}]}}]}\n",
    )
    .await;
    let answer = story.ask(Request::get("http://web/api/a?b=c").header("x-old", "1")).await;
    assert_eq!(answer.text(), "v1 inner.example /v2/a?b=c x-new=1 x-old=-");
    assert!(!answer.headers.contains_key("x-secret"));
    assert_eq!(answer.headers["x-seen"], "2");
    assert_eq!(story.get("/one").await.text(), "v1 web /one x-new=of-backend x-old=-");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_calls_go_where_their_method_says() {
    let to = |service: &str| format!("backendRefs: [{{name: {service}, port: 80}}]");
    let story = Story::with(&route(
        "GRPCRoute",
        &format!(
            "  - matches: [{{method: {{service: shop.Cart}}}}]\n    {}\n  \
             - matches:\n    - {{method: {{service: shop.Cart, method: Pay}}}}\n    - {{method: {{method: Refund}}}}\n    \
             - {{method: {{type: RegularExpression, service: 'shop[.]V[0-9]+'}}}}\n    {}\n",
            to("web"),
            to("web-v2")
        ),
    ))
    .await;
    let mut sender = http2(tunnel(story.caller.proxy(), "web:80").await.expect("a tunnel")).await.expect("HTTP/2");
    for (method, server) in [
        ("/shop.Cart/Add", "v1"),
        ("/shop.Cart/Pay", "v2"),
        ("/any.Service/Refund", "v2"),
        ("/shop.V12/Anything", "v2"),
        ("/shop.Other/Add", "-"),
    ] {
        let request = Request::post(format!("http://web{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::new()))
            .expect("a call");
        let answer = sender.send_request(request).await.expect("an answer");
        let found = answer.headers().get("x-server").map_or("-", |server| server.to_str().expect("text"));
        assert_eq!(found, server, "{method}");
        if server == "-" {
            assert_eq!(answer.headers()["grpc-status"], "12", "UNIMPLEMENTED");
        }
        answer.into_body().collect().await.expect("a whole answer");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_changes_takes_the_next_requests_elsewhere_and_loses_none() {
    let to = |name: &str| route("HTTPRoute", &format!("  - backendRefs: [{{name: {name}, port: 80}}]\n"));
    let story = Story::with(&to("web")).await;
    assert_eq!(story.get("/").await.headers["x-server"], "v1");
    story.mesh.write_resources(&format!("{}{}", story.services, to("web-v2")));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let answer = story.get("/").await;
        assert_eq!(answer.status, StatusCode::OK);
        if answer.headers["x-server"] == "v2" {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the route changes");
    }
}
