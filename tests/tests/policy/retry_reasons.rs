//! Every reason for which something is sent again, or is not, as `/metrics` counts it. Those that other stories of retries
//! and timeouts bring about are not brought about here once more.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{Request, StatusCode};
use sheetbend_tests::http::{get, http2_of_any, read, send};
use sheetbend_tests::planned::{ORDER, PLAN, Planned, service};
use sheetbend_tests::{App, Mesh, START, Sidecar, eventually, full, loopback, workspace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

async fn retried(caller: &Sidecar, reason: &str) -> f64 {
    caller.counter("sheetbend_retries_total", &[&format!("reason=\"{reason}\"")]).await
}

async fn not_retried(caller: &Sidecar, reason: &str) -> f64 {
    caller.counter("sheetbend_not_retried_total", &[&format!("reason=\"{reason}\"")]).await
}

fn policy(name: &str, pool: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: {name}}}]\n  connectionPool: {{{pool}}}\n---\n"
    )
}

/// A request over HTTP/2, and the status of its answer.
async fn ask(proxy: SocketAddr, method: &str, service: &str, order: &str, plan: &str) -> StatusCode {
    let request = Request::builder().method(method).uri(format!("http://{service}/")).header(ORDER, order);
    let request = request.header(PLAN, plan).body(full("")).expect("a request");
    let stream = TcpStream::connect(proxy).await.expect("it accepts");
    let mut sender = http2_of_any(stream).await.expect("HTTP/2");
    read(sender.send_request(request).await.expect("an answer")).await.expect("a whole answer").status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_about_retries_lists_each_reason_that_is_counted_and_no_other() {
    let mesh = Mesh::local();
    let caller = mesh.caller("caller");
    let metrics = caller.page("/metrics").await.text();
    let page = std::fs::read_to_string(workspace().join("docs/policies/retries.md")).expect("the page");
    let page = page.split_once("## Metrics").expect("its part about metrics").1;
    for name in ["sheetbend_retries_total", "sheetbend_not_retried_total"] {
        let labels =
            metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix("{reason=\"")?.split('"').next());
        let counted: BTreeSet<&str> = labels.collect();
        let after = page.split_once(&format!("`{name}{{reason}}`")).expect("a table for each").1;
        let rows = after.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
        let cells = rows.filter_map(|row| row.split('|').nth(1));
        let listed: BTreeSet<&str> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
        assert_eq!(listed, counted, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_goodbye_excludes_is_sent_elsewhere_whatever_its_method() {
    /// GOAWAY without an error, and no stream below it (RFC 9113 §6.8), after SETTINGS.
    const GOODBYE: &[u8] = b"\0\0\0\x04\0\0\0\0\0\0\0\x08\x07\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
    let leaving = listener.local_addr().expect("a bound socket has an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                // The client's preface, its SETTINGS, and the beginning of its request.
                let mut heard = Vec::new();
                while !heard.windows(5).any(|bytes| bytes[3] == 1 && bytes[4] & 4 != 0 && heard.len() > 60) {
                    if stream.read_buf(&mut heard).await.is_ok_and(|length| length > 0) {
                        continue;
                    }
                    return;
                }
                let _ = stream.write_all(GOODBYE).await;
                while stream.read_buf(&mut heard).await.is_ok_and(|length| length > 0) {}
            });
        }
    });
    let servers = Planned::start(1).await;
    let mesh = Mesh::with_resources(&service("web", &[servers.ports[0], leaving]), &[]);
    let caller = mesh.caller("caller");
    eventually("web is known", START, || async {
        (ask(caller.proxy(), "POST", "web", "first", "200").await == StatusCode::OK).then_some(())
    })
    .await;
    eventually("a stream is left out", START, || async {
        assert_eq!(ask(caller.proxy(), "POST", "web", "next", "200").await, StatusCode::OK);
        (retried(&caller, "goaway").await >= 1.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_did_not_reach_the_app_says_its_sidecar_and_is_sent_again_whatever_its_method() {
    let open = watch::Sender::new(false);
    let gate = open.subscribe();
    let app = App::start(move |request: Request<hyper::body::Incoming>| {
        let mut gate = gate.clone();
        async move {
            if request.uri().path() == "/slow" {
                let _ = gate.wait_for(|open| *open).await;
            }
            http::Response::new(full("here\n"))
        }
    })
    .await;
    let limit = "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {name: web}\n\
                 spec: {targetRefs: [{kind: Service, group: \"\", name: web}], concurrency: {maxRequests: 1}}\n";
    let mesh = Mesh::with_resources(limit, &[]);
    let _web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    // Full: the one that there may be is with the app.
    let seen = app.seen.load(std::sync::atomic::Ordering::Relaxed);
    let proxy = caller.proxy();
    let slow = tokio::spawn(async move { get(proxy, "http://web/slow").await.expect("an answer").status });
    eventually("the app has a request", START, || async {
        (app.seen.load(std::sync::atomic::Ordering::Relaxed) > seen).then_some(())
    })
    .await;
    let shed = send(caller.proxy(), "POST", "http://web/", "pay").await.expect("an answer");
    assert_eq!(shed.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(retried(&caller, "shed").await, 1.0);
    open.send_replace(true);
    assert_eq!(slow.await.expect("no panic"), StatusCode::OK);
    // Gone: its sidecar is still there.
    drop(app);
    eventually("the app is gone", START, || async {
        let gone = send(caller.proxy(), "POST", "http://web/", "pay").await.ok()?;
        (gone.status == StatusCode::BAD_GATEWAY).then_some(())
    })
    .await;
    assert!(retried(&caller, "peer_connect").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_and_requests_beyond_a_limit_are_counted_as_not_retried() {
    let servers = Arc::new(Planned::start(1).await);
    let resources = service("never", &servers.ports) + &policy("never", "http: {maxRetries: 0}");
    let full = "tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}";
    let resources = resources + &service("full", &servers.ports) + &policy("full", full);
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    for name in ["never", "full"] {
        caller.first_answer(&format!("http://{name}/")).await;
    }
    let status = ask(caller.proxy(), "GET", "never", "never", "503,200").await;
    assert_eq!((status, servers.heard("never").len()), (StatusCode::SERVICE_UNAVAILABLE, 1));
    assert_eq!(not_retried(&caller, "max_retries").await, 1.0);
    assert_eq!(retried(&caller, "status").await, 0.0, "what was not done is not counted");
    assert_eq!(caller.counter("sheetbend_overflow_total", &["limit=\"retries\""]).await, 1.0);

    let hold = |order: &'static str| {
        let proxy = caller.proxy();
        tokio::spawn(async move {
            let request = Request::get("http://full/").header("host", "full").header(ORDER, order).header(PLAN, "hang");
            let request = request.body(http_body_util::Full::default()).expect("a request");
            let mut sender = sheetbend_tests::http::http1(proxy).await.expect("a connection");
            sender.send_request(request).await.map(|answer| answer.status())
        })
    };
    let first = hold("held");
    eventually("it has the only connection", START, || async { (servers.heard("held").len() == 1).then_some(()) })
        .await;
    let others = [hold("waits"), hold("waits")];
    eventually("one of them is too many", START, || async {
        (not_retried(&caller, "refused_here").await >= 1.0).then_some(())
    })
    .await;
    first.abort();
    others.into_iter().for_each(|other| other.abort());
}
