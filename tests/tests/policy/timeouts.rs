//! How long a request may take, with real servers behind real sidecars: who ends it, when, and what the caller is told.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use sheetbend_tests::http::{get, http1, send};
use sheetbend_tests::{AnyBody, App, Mesh, Sidecar, breaker, eventually, full};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;

/// Whatever takes so long has not been ended by a timer of a second or less.
const FAR: Duration = Duration::from_secs(20);

/// A body of which the first half comes at once and the second never.
fn half() -> AnyBody {
    let first = tokio_stream::once(Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"half"))));
    StreamBody::new(first.chain(tokio_stream::pending())).boxed()
}

/// A server that takes its time: `/hangs` has no answer, `/half` half of one, and `/told` is what it was told of the
/// time left.
async fn slow() -> App {
    App::start(|request: Request<Incoming>| async move {
        match request.uri().path() {
            "/hangs" => std::future::pending().await,
            "/half" => Response::new(half()),
            _ => {
                let told = request.headers().get("x-envoy-expected-rq-timeout-ms");
                Response::new(full(told.map_or(Bytes::new(), |told| Bytes::copy_from_slice(told.as_bytes()))))
            }
        }
    })
    .await
}

/// Services with their endpoints, and a route of which each rule takes what is below a path of its own.
fn route(ports: &[u16], rule: &str) -> String {
    let mut text = String::from("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n");
    for port in ports {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: web-{port}, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        );
    }
    text + &format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: web}}]\n  rules:\n  - backendRefs: [{{name: web, port: 80}}]\n    {rule}\n"
    )
}

async fn caller(app: &App, rule: &str) -> (Mesh, Sidecar) {
    let mesh = Mesh::with_resources(&route(&[app.port()], rule), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    (mesh, caller)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_takes_longer_than_its_route_gives_it_ends_and_says_why() {
    let app = slow().await;
    let (_mesh, mut caller) = caller(&app, "timeouts: {request: 300ms}").await;
    let asked = Instant::now();
    let answer = get(caller.proxy(), "http://web/hangs").await.expect("an answer");
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert!((Duration::from_millis(300)..FAR).contains(&asked.elapsed()));
    let why = answer.headers["proxy-status"].to_str().expect("text");
    assert!(why.contains("error=http_response_timeout") && why.contains("(timeouts.request)"), "{why}");
    let line = caller.process.wait_for("/hangs", FAR);
    assert!(line.contains("UT"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_not_whole_when_its_time_is_over_breaks_off() {
    let app = slow().await;
    let (_mesh, caller) = caller(&app, "timeouts: {request: 300ms}").await;
    let mut sender = http1(caller.proxy()).await.expect("a connection");
    let request = Request::get("http://web/half").header("host", "web").body(full_request()).expect("a request");
    let mut answer = sender.send_request(request).await.expect("a head");
    assert_eq!(answer.status(), StatusCode::OK);
    let first = answer.body_mut().frame().await.expect("a frame").expect("data");
    assert_eq!(first.data_ref().map(|data| &data[..]), Some(&b"half"[..]));
    let rest = tokio::time::timeout(FAR, answer.body_mut().frame()).await.expect("the deadline ends it");
    assert!(rest.is_some_and(|frame| frame.is_err()), "an answer that broke off is no whole one");
}

fn full_request() -> http_body_util::Full<Bytes> {
    http_body_util::Full::default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_takes_too_long_is_made_again_elsewhere_but_for_what_may_be_done_by_then() {
    let servers = [slow().await, slow().await];
    let ports = servers.each_ref().map(App::port);
    let mesh = Mesh::with_resources(&route(&ports, "timeouts: {backendRequest: 300ms}"), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let asked = async |method: &str| {
        let before = servers.each_ref().map(|server| server.seen.load(Relaxed));
        let answer = send(caller.proxy(), method, "http://web/hangs", "").await.expect("an answer");
        assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
        let why = answer.headers["proxy-status"].to_str().expect("text").to_string();
        assert!(why.contains("(timeouts.backendRequest)"), "{why}");
        let mut asked = [0, 1].map(|at: usize| servers[at].seen.load(Relaxed) - before[at]);
        asked.sort_unstable();
        asked
    };
    assert_eq!(asked("GET").await, [1, 1], "one attempt at each of the two");
    assert_eq!(asked("POST").await, [0, 1], "no POST is sent twice");
    assert_eq!(caller.counter("sheetbend_retries_total", &["reason=\"per_try_timeout\""]).await, 1.0);
    assert_eq!(caller.counter("sheetbend_not_retried_total", &["reason=\"unsafe\""]).await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_of_the_caller_is_kept_and_told_as_what_is_left_of_it() {
    let app = slow().await;
    let (_mesh, caller) = caller(&app, "timeouts: {request: 1h}").await;
    let ask = |path: &str, millis: &str| {
        let request = Request::get(format!("http://web{path}")).header("host", "web");
        let request = request.header("x-envoy-expected-rq-timeout-ms", millis).body(full_request()).expect("a request");
        let proxy = caller.proxy();
        async move {
            let answer = http1(proxy).await.expect("a connection").send_request(request).await.expect("an answer");
            sheetbend_tests::http::read(answer).await.expect("a whole answer")
        }
    };
    let told: u64 = ask("/told", "60000").await.text().parse().expect("milliseconds");
    assert!((1..=60_000).contains(&told), "{told}");
    // Without its own, it is the route's.
    let told: u64 = get(caller.proxy(), "http://web/told").await.expect("an answer").text().parse().expect("a number");
    assert!((3_000_000..=3_600_000).contains(&told), "{told}");
    let late = ask("/hangs", "300").await;
    assert_eq!(late.status, StatusCode::GATEWAY_TIMEOUT);
    let why = late.headers["proxy-status"].to_str().expect("text");
    assert!(why.contains("set by x-envoy-expected-rq-timeout-ms"), "{why}");
}

/// A way to a server on which nothing passes for the first second of each connection.
async fn slow_to_connect(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let mut server = TcpStream::connect(server).await.ok()?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await.ok()
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_in_haste_let_the_connection_be_made_and_hold_it_against_nobody_who_waited() {
    let app = slow().await;
    let name = "apiVersion: v1\nkind: Service\nmetadata: {name: far}\nspec: {ports: [{port: 80}]}\n";
    let mesh = Mesh::with_resources(name, &[]);
    let web = mesh.run("web").port(app.port()).serve();
    let far = slow_to_connect(web.inbound()).await;
    let rule = "timeouts: {backendRequest: 300ms}\n    retry: {attempts: 0}";
    let resources = route(&[far.port()], rule).replace("name: web", "name: far").replace(
        "service-name: far}",
        "service-name: far}, annotations: {sheetbend.io/identity: 'spiffe://cluster.local/ns/default/sa/web'}",
    );
    mesh.write_resources(&resources);
    let caller = mesh.caller("caller");
    let ask = || async { get(caller.proxy(), "http://far/").await.map(|answer| answer.status.as_u16()) };
    // All of them wait for one connection, and none for so long.
    let proxy = caller.proxy();
    let asked: Vec<_> = (0..20).map(|_| tokio::spawn(get(proxy, "http://far/"))).collect();
    let mut first = Vec::new();
    for asked in asked {
        first.push(asked.await.expect("no panic").map(|answer| answer.status.as_u16()));
    }
    assert!(!first.iter().any(|status| matches!(status, Ok(200))), "{first:?}");
    eventually("the connection serves the next one", FAR, || async { matches!(ask().await, Ok(200)).then_some(()) })
        .await;
    let endpoint = breaker(&caller, far).await;
    let failures = endpoint["failures"].as_u64().expect("a number");
    assert!((1..=5).contains(&failures), "one failure for each connection that was too slow: {endpoint}");
}
