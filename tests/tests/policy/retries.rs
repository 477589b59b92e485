//! What is sent again and what is not, with servers that fail as they are told to, behind a real sidecar.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use sheetbend_tests::http::{Answer, http1, http2_of_any, read};
use sheetbend_tests::planned::{Heard, ORDER, PLAN, Planned, route, service};
use sheetbend_tests::{AnyBody, App, Mesh, START, Sidecar, eventually, free_port, full, hear};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

/// A sidecar, and the servers behind every service that it can call.
struct Story {
    servers: Planned,
    caller: Sidecar,
    _mesh: Mesh,
}

/// Services by their names, each with two servers and a route with annotations and a rule.
async fn story(services: &[(&str, &str, &str)]) -> Story {
    let servers = Planned::start(2).await;
    let mut resources = String::new();
    for (name, annotations, rule) in services {
        resources += &service(name, &servers.ports);
        resources += &route("HTTPRoute", name, annotations, rule);
    }
    begin(servers, &resources).await
}

async fn begin(servers: Planned, resources: &str) -> Story {
    let mesh = Mesh::with_resources(resources, &[]);
    let caller = mesh.caller("caller");
    Story { servers, caller, _mesh: mesh }
}

/// What a request came to: its answer, and on which servers its attempts were heard.
struct Came {
    answer: Answer,
    order: String,
    servers: Vec<usize>,
}

impl Story {
    /// A request over a connection of its own.
    async fn ask(&self, method: &str, service: &str, plan: &str) -> Came {
        let order = next_order();
        let request = Request::builder().method(method).uri(format!("http://{service}/")).header("host", service);
        let request = request.header(ORDER, &order).header(PLAN, plan).body(Full::from("body"));
        let mut sender = http1(self.caller.proxy()).await.expect("a connection");
        let answer = sender.send_request(request.expect("a request")).await.expect("an answer");
        self.came(order, read(answer).await.expect("a whole answer"))
    }

    /// The same over HTTP/2, with a body of any kind.
    async fn send(&self, request: http::request::Builder, plan: &str, body: AnyBody) -> Came {
        let order = next_order();
        let request = request.header(ORDER, &order).header(PLAN, plan).body(body).expect("a request");
        let stream = TcpStream::connect(self.caller.proxy()).await.expect("it accepts");
        let mut sender = http2_of_any(stream).await.expect("HTTP/2");
        let answer = sender.send_request(request).await.expect("an answer");
        self.came(order, read(answer).await.expect("a whole answer"))
    }

    fn came(&self, order: String, answer: Answer) -> Came {
        let servers = self.servers.heard(&order).iter().map(|heard| heard.server).collect();
        Came { answer, order, servers }
    }

    async fn retried(&self, reason: &str) -> f64 {
        self.caller.counter("sheetbend_retries_total", &[&format!("reason=\"{reason}\"")]).await
    }

    async fn not_retried(&self, reason: &str) -> f64 {
        self.caller.counter("sheetbend_not_retried_total", &[&format!("reason=\"{reason}\"")]).await
    }
}

fn next_order() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Relaxed).to_string()
}

const ALLOWED: &str = "sheetbend.io/retry-non-idempotent: \"true\"";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_condition_retries_what_it_names_and_no_post_unless_that_is_asked_for() {
    let on = |words: &str| format!("sheetbend.io/retry-on: \"{words}\"");
    let (any, reset) = (format!("{}, {ALLOWED}", on("5xx")), on("reset"));
    let (server, gateway, named) = (on("5xx"), on("gateway-error"), on("retriable-status-codes"));
    let (connect, refused) = (on("connect-failure"), on("refused-stream"));
    let story = story(&[
        ("plain", "", ""),
        ("server-error", &server, ""),
        ("gateway-error", &gateway, ""),
        ("reset", &reset, ""),
        ("connect", &connect, ""),
        ("refused", &refused, ""),
        ("named", &named, "retry: {codes: [429, 500]}"),
        ("codes", "", "retry: {codes: [404]}"),
        ("any", &any, ""),
    ])
    .await;
    for service in ["plain", "server-error", "gateway-error", "reset", "connect", "refused", "named", "codes", "any"] {
        story.caller.first_answer(&format!("http://{service}/")).await;
    }
    // A service, a method, what its first attempt meets, and whether there is another.
    let cases = [
        ("plain", "GET", "503", true),
        ("plain", "GET", "502", true),
        ("plain", "GET", "504", true),
        ("plain", "GET", "reset", true),
        ("plain", "PUT", "503", true),
        ("plain", "DELETE", "reset", true),
        ("plain", "GET", "500", false),
        ("plain", "GET", "429", false),
        ("plain", "GET", "404", false),
        ("plain", "POST", "503", false),
        ("plain", "POST", "reset", false),
        ("plain", "PATCH", "reset", false),
        ("server-error", "GET", "500", true),
        ("server-error", "GET", "507", true),
        ("server-error", "GET", "reset", true),
        ("server-error", "GET", "429", false),
        ("server-error", "POST", "500", false),
        ("server-error", "POST", "reset", false),
        ("gateway-error", "GET", "502", true),
        ("gateway-error", "GET", "500", false),
        ("gateway-error", "POST", "502", false),
        ("reset", "GET", "reset", true),
        ("reset", "POST", "reset", false),
        ("connect", "POST", "reset", false),
        ("connect", "POST", "503", false),
        ("refused", "POST", "reset", false),
        ("named", "GET", "429", true),
        ("named", "GET", "500", true),
        ("named", "GET", "501", false),
        ("named", "POST", "429", false),
        ("codes", "GET", "404", true),
        ("codes", "GET", "400", false),
        ("codes", "POST", "404", false),
        ("any", "POST", "500", true),
        ("any", "POST", "reset", true),
        ("any", "PATCH", "503", true),
        ("any", "POST", "429", false),
    ];
    for (service, method, meets, again) in cases {
        let came = story.ask(method, service, &format!("{meets},200")).await;
        let what = format!("{method} {service} that meets {meets}: {:?}", came.answer);
        assert_eq!(came.servers.len(), 1 + usize::from(again), "{what}");
        let status = if meets == "reset" { "502" } else { meets };
        assert_eq!(came.answer.status.as_str(), if again { "200" } else { status }, "{what}");
    }
    let resets = cases.iter().filter(|(.., meets, again)| *again && *meets == "reset").count();
    let again = cases.iter().filter(|(.., again)| *again).count();
    assert_eq!(story.retried("reset").await, resets as f64);
    assert_eq!(story.retried("status").await, (again - resets) as f64);
    assert_eq!((story.not_retried("unsafe").await, story.not_retried("not_asked_for").await), (12.0, 3.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_says_how_often_and_how_long_to_wait_and_another_server_is_asked() {
    let never = "retry: {attempts: 0}";
    let thrice = "retry: {attempts: 3, backoff: 200ms}";
    let mut story = story(&[("plain", "", ""), ("never", "", never), ("thrice", "", thrice)]).await;
    for service in ["plain", "never", "thrice"] {
        story.caller.first_answer(&format!("http://{service}/")).await;
    }
    let came = story.ask("GET", "plain", "503,200").await;
    assert!(came.servers.len() == 2 && came.servers[0] != came.servers[1], "{:?}", came.servers);
    let came = story.ask("GET", "plain", "503").await;
    assert_eq!((came.servers.len(), came.answer.status), (2, StatusCode::SERVICE_UNAVAILABLE));
    let came = story.ask("GET", "never", "503,200").await;
    assert_eq!((came.servers.len(), came.answer.status), (1, StatusCode::SERVICE_UNAVAILABLE));
    let came = story.ask("GET", "thrice", "503,503,503,200").await;
    assert_eq!((came.servers.len(), came.answer.status), (4, StatusCode::OK));
    let times: Vec<_> = story.servers.heard(&came.order).iter().map(|heard| heard.at).collect();
    for (turn, pair) in times.windows(2).enumerate() {
        let waited = pair[1] - pair[0];
        assert!(waited >= Duration::from_millis(200), "{waited:?} before attempt {}", turn + 2);
    }
    let came = story.ask("GET", "thrice", "503").await;
    assert_eq!(came.servers.len(), 4, "one and three more");
    assert_eq!(story.not_retried("attempts").await, 3.0);
    let line = story.caller.process.wait_for("attempts=4", START);
    assert!(line.contains("503 URX"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_reached_nobody_is_sent_again_whatever_its_method() {
    let servers = Planned::start(1).await;
    let mut resources = service("half", &[servers.ports[0], free_port()]) + &service("streams", &servers.ports);
    resources += &route("HTTPRoute", "streams", "", "");
    let story = begin(servers, &resources).await;
    for service in ["half", "streams"] {
        story.caller.first_answer(&format!("http://{service}/")).await;
    }
    // Nobody listens on one of the two ports; sooner or later it is tried.
    eventually("a connection fails", START, || async {
        let came = story.ask("POST", "half", "200").await;
        assert_eq!((came.answer.status, came.servers.len()), (StatusCode::OK, 1), "{:?}", came.answer);
        (story.retried("connect").await >= 1.0).then_some(())
    })
    .await;
    let refused = story.send(Request::post("http://streams/"), "refused,200", full("pay")).await;
    assert_eq!((refused.answer.status, refused.servers.len()), (StatusCode::OK, 2), "{:?}", refused.answer);
    assert_eq!(story.retried("refused_stream").await, 1.0);
    let reset = story.send(Request::post("http://streams/"), "reset,200", full("pay")).await;
    assert_eq!((reset.answer.status, reset.servers.len()), (StatusCode::BAD_GATEWAY, 1));
}

/// A body in pieces of at most 16 KiB, with trailers.
fn with_trailers(length: usize) -> AnyBody {
    let mut frames = Vec::new();
    let whole = Bytes::from(vec![b'b'; length]);
    for at in (0..length).step_by(16 * 1024) {
        frames.push(Frame::data(whole.slice(at..length.min(at + 16 * 1024))));
    }
    let sum = (HeaderName::from_static("x-sum"), HeaderValue::from_static("7"));
    frames.push(Frame::trailers(HeaderMap::from_iter([sum])));
    StreamBody::new(tokio_stream::iter(frames.into_iter().map(Ok::<_, Infallible>))).boxed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_sent_again_with_its_trailers_up_to_64_kib_and_once_beyond() {
    const KEPT: usize = 64 * 1024;
    let story = story(&[("plain", "", "")]).await;
    story.caller.first_answer("http://plain/").await;
    for length in [1, KEPT] {
        let came = story.send(Request::put("http://plain/"), "503,200", with_trailers(length)).await;
        assert_eq!(came.answer.status, StatusCode::OK, "{length} bytes");
        let heard = story.servers.heard(&came.order);
        assert_eq!(heard.len(), 2);
        for attempt in heard {
            assert_eq!(attempt.body.len(), length);
            assert_eq!(attempt.trailers["x-sum"], "7", "{length} bytes");
        }
    }
    let came = story.send(Request::put("http://plain/"), "503,200", with_trailers(KEPT + 1)).await;
    assert_eq!((came.answer.status, came.servers.len()), (StatusCode::SERVICE_UNAVAILABLE, 1));
    assert_eq!(story.not_retried("body_too_large").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_body_streams_and_goes_elsewhere_whole_while_nothing_of_it_was_sent() {
    const LONG: usize = 1024 * 1024;
    let servers = Planned::start(1).await;
    let resources = service("half", &[servers.ports[0], free_port()]);
    let story = begin(servers, &resources).await;
    story.caller.first_answer("http://half/").await;
    eventually("a connection fails", START, || async {
        let came = story.send(Request::post("http://half/"), "200", with_trailers(LONG)).await;
        assert_eq!((came.answer.status, came.servers.len()), (StatusCode::OK, 1), "{:?}", came.answer);
        assert_eq!(story.servers.heard(&came.order)[0].body.len(), LONG);
        (story.retried("connect").await >= 1.0).then_some(())
    })
    .await;
    // The end is sent once the beginning has been heard.
    let (sender, pieces) = tokio::sync::mpsc::channel(1);
    let body = StreamBody::new(ReceiverStream::new(pieces).map(Ok::<_, Infallible>)).boxed();
    let sending = story.send(Request::post("http://half/").header("x-streams", "yes"), "200", body);
    let feeding = async {
        sender.send(Frame::data(Bytes::from(vec![b'b'; LONG / 2]))).await.expect("it is wanted");
        let heard = |one: &Heard| one.headers.contains_key("x-streams") && one.body.len() == LONG / 2;
        eventually("the beginning is heard", START, || async { story.servers.any(heard).then_some(()) }).await;
        sender.send(Frame::data(Bytes::from_static(b"end"))).await.expect("it is wanted");
        drop(sender);
    };
    let (came, ()) = tokio::join!(sending, feeding);
    assert_eq!(story.servers.heard(&came.order)[0].body.len(), LONG / 2 + 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_are_no_more_than_the_policy_of_the_service_allows() {
    let servers = Planned::start(2).await;
    // One in an hour, and a tenth of the requests of an hour.
    let resources = service("web", &servers.ports)
        + "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\nmetadata: {name: web}\nspec:\n  \
           targetRefs: [{group: \"\", kind: Service, name: web}]\n  retryConstraint:\n    \
           budget: {percent: 10, interval: 1h}\n    minRetryRate: {count: 1, interval: 1h}\n";
    let story = begin(servers, &resources).await;
    story.caller.first_answer("http://web/").await;
    let before = story.servers.all();
    for _ in 0..100 {
        story.ask("GET", "web", "503,200").await;
    }
    let retries = story.servers.all() - before - 100;
    // The first answer took a request or a few more.
    assert!((11..=11 + before).contains(&retries), "{retries} retries of 100 requests");
    assert_eq!(story.retried("status").await, retries as f64);
    assert_eq!(story.not_retried("budget").await, (100 - retries) as f64);
}

/// What a server has heard of, and of how much of that it will never hear the end.
#[derive(Clone, Default)]
struct Bodies {
    begun: Arc<AtomicU64>,
    broken: Arc<AtomicU64>,
}

impl Bodies {
    /// Answers at once and reads on.
    async fn busy(&self) -> App {
        let this = self.clone();
        let answer = move |request: Request<Incoming>| {
            let this = this.clone();
            async move {
                this.begun.fetch_add(1, SeqCst);
                tokio::spawn(async move {
                    if request.into_body().collect().await.is_err() {
                        this.broken.fetch_add(1, SeqCst);
                    }
                });
                let mut answer = Response::new(full("busy\n"));
                *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                answer
            }
        };
        App::start(answer).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_answered_before_its_end_leaves_nothing_behind() {
    let bodies = Bodies::default();
    let busy = bodies.busy().await;
    let reads = Arc::new(AtomicU64::new(0));
    let begins = Arc::clone(&reads);
    let whole = App::start(move |request: Request<Incoming>| {
        begins.fetch_add(1, SeqCst);
        async {
            let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            Response::new(full(body))
        }
    })
    .await;
    let mesh = Mesh::with_resources(&service("web", &[busy.port(), whole.port()]), &[]);
    let caller = mesh.caller("caller");
    let mut asked = 0;
    while bodies.begun.load(SeqCst) == 0 {
        asked += 1;
        assert!(asked < 50, "one of two is asked first now and then");
        let mut line = TcpStream::connect(caller.proxy()).await.expect("it accepts");
        let head = "PUT http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
        line.write_all(head.as_bytes()).await.expect("it reads");
        eventually("the other one reads", START, || async { (reads.load(SeqCst) == asked).then_some(()) }).await;
        line.write_all(b"0\r\n\r\n").await.expect("it reads on");
        let answer = hear(&mut line, "hello").await.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let begun = bodies.begun.load(SeqCst);
        let what = "the server that has answered hears that no more is to come";
        eventually(what, START, || async { (bodies.broken.load(SeqCst) == begun).then_some(()) }).await;
    }
}
