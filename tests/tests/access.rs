//! Who may call: what an operator writes, obeyed by the sidecar beside the one who is called.

use ::http::Request;
use http_body_util::Full;
use sheetbend_tests::http::{self, http1};
use sheetbend_tests::{App, Mesh, START, Sidecar, eventually, free_port, loopback};

/// `defaultInboundPolicy`, as an operator writes it.
fn by_default(policy: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {{name: mesh}}\n\
         spec: {{defaultInboundPolicy: {policy}}}\n---\n"
    )
}

/// A web server that says `web`, beside a sidecar of its own.
async fn web(mesh: &Mesh) -> (App, Sidecar) {
    let app = App::saying("web\n").await;
    let sidecar = mesh.run("web").port(app.port()).serve();
    (app, sidecar)
}

/// Asks until the answer is the one that is waited for.
async fn until_answered(caller: &Sidecar, url: &str, status: u16) -> http::Answer {
    eventually(&format!("{} is answered {status} by {url}", caller.service), START, || async {
        http::get(caller.proxy(), url).await.ok().filter(|answer| answer.status == status)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_meshs_default_holds_for_the_next_request_on_a_connection_that_is_open() {
    let mesh = Mesh::with_resources(&by_default("Allow"), &[]);
    let (app, web) = web(&mesh).await;
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let mut open = http1(caller.proxy()).await.expect("a connection");
    let mut ask = async || {
        let request = Request::get("http://web/").header("host", "web").body(Full::default()).expect("a request");
        open.ready().await.expect("still open");
        let answer = http::read(open.send_request(request).await.expect("still open")).await.expect("an answer");
        (answer.status.as_u16(), answer.text())
    };
    assert_eq!(ask().await, (200, "web\n".into()));

    mesh.write_resources(&by_default("Deny"));
    let deadline = tokio::time::Instant::now() + START;
    let said = loop {
        match ask().await {
            (200, _) => assert!(tokio::time::Instant::now() < deadline, "nobody is refused"),
            refused => break refused,
        }
    };
    assert_eq!(said, (403, "sheetbend: the caller is not allowed\n".into()));
    assert!(web.counter("sheetbend_refused_total", &["authorization_policy"]).await >= 1.0);
    let seen = app.seen.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(ask().await.0, 403);
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), seen, "the app hears nothing of it");

    // Somebody without an identity is no member of the mesh.
    mesh.write_resources(&by_default("MeshOnly"));
    until_answered(&caller, "http://web/", 200).await;
    let plain = http::get(web.inbound(), "/").await.expect("an answer");
    assert_eq!(plain.status, 403, "{}", plain.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_may_not_pass_is_reset_and_the_app_hears_nothing_of_it() {
    let mesh = Mesh::with_resources(&by_default("Deny"), &[]);
    let app = sheetbend_tests::Scripted::start(|mut line| async move { line.say("hello\n").await }).await;
    let _db = mesh.run("db").port(app.port()).serve();
    let local = free_port();
    let caller = mesh.run("caller").upstream(local, &format!("db:{}", app.port())).caller();
    let _ = caller.proxy();
    let said = eventually("the connection ends", START, || async {
        Some(sheetbend_tests::dialogue(loopback(local), "select 1\n", "hello\n").await)
    })
    .await;
    assert!(said.is_err(), "{said:?}");
    assert_eq!(app.heard(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_requests_are_held_to_something_nothing_passes_that_only_a_lenient_server_takes_for_one() {
    let once_a_day = "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {name: web}\n\
                      spec: {targetRefs: [{group: \"\", kind: Service, name: web}], rates: [{requests: 1000, interval: 1s}]}\n";
    for (port, resources, passes) in
        [("", once_a_day, false), ("/http", "", false), ("", "", true), ("/tcp", once_a_day, true)]
    {
        let mesh = Mesh::with_resources(&format!("{}{resources}", by_default("Allow")), &[]);
        let app = sheetbend_tests::Scripted::start(|mut line| async move {
            if line.hear("web\r\n\r\n").await.is_some() {
                line.say("HTTP/1.1 200 OK\r\n\r\n").await;
            }
        })
        .await;
        let web = mesh.run("web").flag(&["--port", &format!("{}{port}", app.address.port())]).serve();
        for odd in ["GET  /x HTTP/1.1\r\nHost: web\r\n\r\n", "\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: web\r\n\r\n"] {
            let said = sheetbend_tests::dialogue(web.inbound(), odd, "HTTP/1.1 200 OK\r\n\r\n").await;
            assert_eq!(said.is_ok(), passes, "{port} {odd:?}: {said:?}");
        }
        assert_eq!(app.heard().contains("HTTP"), passes, "{port}");
        let refused = web.counter("sheetbend_refused_total", &["\"opaque\""]).await;
        assert_eq!(refused >= 2.0, !passes, "{port}");
    }
}
