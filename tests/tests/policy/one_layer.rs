//! Retries in a chain of services: a calls b, b calls c, both through sidecars, and c is out of order.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use sheetbend_tests::http::{Answer, http1, read};
use sheetbend_tests::planned::{ORDER, PLAN, Planned, service};
use sheetbend_tests::{App, Mesh, Sidecar, full};

/// What b passes on, as far as it is told to in [`PASSES`].
const KNOWN_BY: [&str; 2] = ["x-request-id", "traceparent"];
const PASSES: &str = "x-passes";
/// So many times b fails by itself, before it asks c.
const FAILS: &str = "x-fails";

/// Asks for what a request plans, as an app does that knows nothing of sidecars.
async fn ask(proxy: SocketAddr, url: &str, headers: &[(&str, &str)]) -> Answer {
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let request = Request::get(url).header("host", host);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let request = request.body(Full::default()).expect("a request");
    let answer = http1(proxy).await.expect("a connection").send_request(request).await.expect("an answer");
    read(answer).await.expect("a whole answer")
}

/// The app of b: answers as c does.
async fn middle(way_out: Arc<OnceLock<SocketAddr>>) -> App {
    let failed = Arc::new(AtomicU64::new(0));
    App::start(move |request: Request<Incoming>| {
        let (way_out, failed) = (Arc::clone(&way_out), Arc::clone(&failed));
        async move {
            let said = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
            let fails: u64 = said(FAILS).parse().unwrap_or(0);
            let status = match (fails, way_out.get()) {
                (1.., _) if failed.fetch_add(1, Relaxed) < fails => StatusCode::SERVICE_UNAVAILABLE,
                (_, Some(proxy)) if !said(ORDER).is_empty() => {
                    let passed = KNOWN_BY.into_iter().filter(|name| said(PASSES).contains(name));
                    let plan = [(ORDER, said(ORDER)), (PLAN, said(PLAN))];
                    let headers: Vec<_> = plan.into_iter().chain(passed.map(|name| (name, said(name)))).collect();
                    ask(*proxy, "http://c/", &headers).await.status
                }
                _ => StatusCode::OK,
            };
            let answer = Response::builder().status(status);
            answer.body(full("b\n")).expect("an answer")
        }
    })
    .await
}

async fn counted(sidecar: &Sidecar, name: &str, reason: &str) -> f64 {
    sidecar.counter(name, &[&format!("reason=\"{reason}\"")]).await
}

const RETRIED: &str = "sheetbend_retries_total";
const NOT_RETRIED: &str = "sheetbend_not_retried_total";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_at_the_end_of_a_chain_is_retried_by_one_sidecar_alone() {
    let way_out = Arc::new(OnceLock::new());
    let servers = Planned::start(2).await;
    let app = middle(Arc::clone(&way_out)).await;
    let mesh = Mesh::with_resources(&service("c", &servers.ports), &[]);
    let b = mesh.run("b").port(app.port()).serve();
    way_out.set(b.outbound()).expect("set once");
    let a = mesh.caller("a");
    a.first_answer("http://b/").await;
    let asked = async |order: &str, more: &[(&str, &str)]| {
        // Each of a trace of its own.
        let trace = format!("00-{:0>32x}-b7ad6b7169203331-01", order.bytes().map(u128::from).sum::<u128>());
        let known = [(ORDER, order), (PLAN, "503"), ("traceparent", &*trace)];
        let answer = ask(a.proxy(), "http://b/", &[&known, more].concat()).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        for name in ["sheetbend-retried", "sheetbend-unsent", "sheetbend-attempts-before"] {
            assert!(!answer.headers.contains_key(name), "{name} leaves the mesh");
        }
        servers.heard(order).len()
    };
    // Without a word of b's, nobody knows that the two have to do with each other.
    assert_eq!(asked("unknown", &[]).await, 4);
    assert_eq!(counted(&a, RETRIED, "status").await, 1.0);

    // b has retried: a does not.
    for (turn, known_by) in KNOWN_BY.into_iter().enumerate() {
        assert_eq!(asked(known_by, &[(PASSES, known_by)]).await, 2);
        assert_eq!(counted(&a, RETRIED, "status").await, 1.0);
        assert_eq!(counted(&a, NOT_RETRIED, "retried_further_on").await, 1.0 + turn as f64);
        assert_eq!(counted(&b, RETRIED, "status").await, 3.0 + turn as f64);
    }

    // a has retried: b does not.
    assert_eq!(asked("told", &[(PASSES, "x-request-id"), (FAILS, "1"), ("x-request-id", "told")]).await, 1);
    assert_eq!(counted(&a, RETRIED, "status").await, 2.0);
    assert_eq!(counted(&b, NOT_RETRIED, "caller_retries").await, 1.0);

    // What an app says of it in our own words is not believed.
    let lies = [("sheetbend-attempts-before", "1"), ("sheetbend-retried", "?1"), ("x-request-id", "liar")];
    assert_eq!(asked("liar", &[&lies[..], &[(PASSES, "x-request-id")]].concat()).await, 2);
    // Nor what a stranger says who comes without a sidecar.
    let order = [(ORDER, "stranger"), (PLAN, "503"), (PASSES, "x-request-id"), ("x-request-id", "stranger")];
    let answer = ask(b.inbound(), "http://b/", &[&order[..], &lies[..2]].concat()).await;
    assert_eq!((answer.status, servers.heard("stranger").len()), (StatusCode::SERVICE_UNAVAILABLE, 2));
    assert!(!answer.headers.contains_key("sheetbend-retried"), "{answer:?}");
    assert_eq!(counted(&b, NOT_RETRIED, "caller_retries").await, 1.0);
}
