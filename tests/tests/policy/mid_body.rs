//! Answers that begin well and do not end: whose fault that is, behind a real sidecar.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use sheetbend_tests::http::{http1, read};
use sheetbend_tests::planned::{route, service};
use sheetbend_tests::{App, Mesh, START, Scripted, becomes, breaker, eventually, hear, long};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Clients that ask over and over, whatever comes of it, and say how long they would wait: a minute.
fn asking(proxy: SocketAddr) -> JoinSet<()> {
    let ask = move || async move {
        let request =
            Request::get("http://web/").header("host", "web").header("x-envoy-expected-rq-timeout-ms", "60000");
        let request = request.body(Full::<Bytes>::default()).expect("a request");
        let Ok(mut sender) = http1(proxy).await else { return };
        let Ok(answer) = sender.send_request(request).await else { return };
        let _ = read(answer).await;
    };
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        clients.spawn(async move {
            loop {
                ask().await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }
    clients
}

const HALF: &str = "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf";

/// A server that says half of each answer, and then waits or hangs up.
async fn half(waits: bool) -> Scripted {
    Scripted::start(move |mut line| async move {
        if line.hear("\r\n\r\n").await.is_some() {
            line.say(HALF).await;
        }
        if waits {
            line.hear("nothing that anybody says").await;
        }
    })
    .await
}

/// Whether a server of the other half is ejected among two that are well.
async fn is_ejected(broken: Scripted, annotations: &str, rule: &str) {
    let well = [App::saying("well").await, App::saying("well").await];
    let ports = [well[0].port(), broken.port(), well[1].port()];
    let mesh = Mesh::with_resources(&(service("web", &ports) + &route("HTTPRoute", "web", annotations, rule)), &[]);
    let caller = mesh.caller("caller");
    eventually("web is known", START, || async {
        let answer = sheetbend_tests::http::get(caller.proxy(), "http://web/").await.ok()?;
        answer.status.is_success().then_some(())
    })
    .await;
    let _clients = asking(caller.proxy());
    becomes(&caller, broken.address, "Ejected").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_breaks_off_its_answers_is_ejected() {
    is_ejected(half(false).await, "", "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_whose_answers_are_not_whole_when_their_time_is_over_is_ejected() {
    is_ejected(half(true).await, "", "timeouts: {request: 1500ms}").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_whose_answers_stand_still_is_ejected_whatever_time_its_callers_give_it() {
    is_ejected(half(true).await, "sheetbend.io/stream-idle-timeout: 1s", "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_its_caller_does_not_read_in_time_is_held_against_nobody() {
    let app = App::start(|_| async { http::Response::new(long(u64::MAX)) }).await;
    let resources = service("web", &[app.port()]) + &route("HTTPRoute", "web", "", "timeouts: {request: 1s}");
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    let request = "GET http://web/ HTTP/1.1\r\nhost: web\r\n\r\n";
    let mut reader = eventually("web is known", START, || async {
        let mut stream = TcpStream::connect(caller.proxy()).await.ok()?;
        stream.write_all(request.as_bytes()).await.ok()?;
        hear(&mut stream, "\r\n\r\n").await.ok()?.starts_with("HTTP/1.1 200 ").then_some(stream)
    })
    .await;
    // The time of the request passes while nobody reads.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let rest = tokio::time::timeout(START, reader.read_to_end(&mut Vec::new())).await;
    rest.expect("it is ended").ok();
    eventually("its end is counted", START, || async {
        (caller.counter("sheetbend_timeouts_total", &["timer=\"request\""]).await >= 1.0).then_some(())
    })
    .await;
    let shown = breaker(&caller, app.address).await;
    assert_eq!((&shown["failures"], &shown["consecutive_failures"]), (&0.into(), &0.into()), "{shown:#}");
}
