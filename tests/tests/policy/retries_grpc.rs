//! gRPC calls that fail, behind a real sidecar: where their status is read, and which of them are made again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::{HeaderMap, Request};
use sheetbend_tests::http::{Answer, http2_of_any, read};
use sheetbend_tests::planned::{ORDER, PLAN, Planned, route, service};
use sheetbend_tests::{Mesh, Sidecar, full};
use tokio::net::TcpStream;

/// Conditions with the statuses that they name.
const CONDITIONS: [(&str, u16); 5] =
    [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)];
const ALLOWED: &str = "sheetbend.io/retry-non-idempotent: \"true\"";

/// A call over a connection of its own: its answer, and how many attempts of it were heard.
async fn call(caller: &Sidecar, servers: &Planned, service: &str, plan: &str, before: Option<&str>) -> (Answer, usize) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let order = NEXT.fetch_add(1, Relaxed).to_string();
    let request = Request::post(format!("http://{service}/shop.Cart/Pay")).header("content-type", "application/grpc");
    let request = request.header("te", "trailers").header(ORDER, &order).header(PLAN, plan);
    let request = before.into_iter().fold(request, |request, n| request.header("grpc-previous-rpc-attempts", n));
    let stream = TcpStream::connect(caller.proxy()).await.expect("it accepts");
    let mut sender = http2_of_any(stream).await.expect("HTTP/2");
    let request = request.body(full(&b"\0\0\0\0\x02hi"[..])).expect("a request");
    let answer = read(sender.send_request(request).await.expect("an answer")).await.expect("a whole answer");
    (answer, servers.heard(&order).len())
}

/// The status of a call, wherever it stands.
fn status(answer: &Answer) -> &str {
    let stands = |headers: &HeaderMap| headers.contains_key("grpc-status");
    let headers = if stands(&answer.headers) { &answer.headers } else { &answer.trailers };
    headers["grpc-status"].to_str().expect("text")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_in_the_head_or_in_the_trailers_of_an_empty_answer_is_retried_where_its_route_says_so() {
    let servers = Planned::start(2).await;
    let mut resources = service("plain", &servers.ports);
    for (word, _) in CONDITIONS {
        let annotations = format!("sheetbend.io/retry-on: {word}, {ALLOWED}");
        resources += &service(word, &servers.ports);
        resources += &route("GRPCRoute", word, &annotations, "");
    }
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    let mut retried = 0.0;
    for (word, named) in CONDITIONS {
        caller.first_answer(&format!("http://{word}/")).await;
        for (_, number) in CONDITIONS {
            let again = number == named;
            for at in ["grpc", "ends"] {
                let (answer, heard) = call(&caller, &servers, word, &format!("{at}-{number},ends-0"), None).await;
                assert_eq!(heard, 1 + usize::from(again), "{word} with {at}-{number}: {answer:?}");
                assert_eq!(status(&answer), if again { "0".to_string() } else { number.to_string() });
                retried += f64::from(u8::from(again));
            }
        }
        // Whoever has had a message has had an answer.
        let (answer, heard) = call(&caller, &servers, word, &format!("says-{named},ends-0"), None).await;
        assert_eq!((heard, &answer.body[..], status(&answer)), (1, &b"\0\0\0\0\x02hi"[..], &*named.to_string()));
    }
    assert_eq!(caller.counter("sheetbend_retries_total", &["reason=\"grpc_status\""]).await, retried);

    caller.first_answer("http://plain/").await;
    for plan in ["grpc-14,ends-0", "ends-14,ends-0", "503,ends-0", "reset,ends-0"] {
        let (answer, heard) = call(&caller, &servers, "plain", plan, None).await;
        assert_eq!(heard, 1, "no call is made twice where nobody asked for it: {plan}: {answer:?}");
    }
    let (answer, heard) = call(&caller, &servers, "plain", "refused,ends-0", None).await;
    assert_eq!((heard, status(&answer)), (2, "0"), "but for one that had no effect");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_its_client_repeats_is_repeated_by_nobody_else_and_the_server_is_told_of_each_attempt() {
    let servers = Planned::start(2).await;
    let annotations = format!("sheetbend.io/retry-on: unavailable, sheetbend.io/retry-attempts: \"2\", {ALLOWED}");
    let resources = service("web", &servers.ports) + &route("GRPCRoute", "web", &annotations, "");
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let (answer, heard) = call(&caller, &servers, "web", "grpc-14,ends-0", Some("1")).await;
    assert_eq!((heard, status(&answer)), (1, "14"));
    assert_eq!(caller.counter("sheetbend_not_retried_total", &["reason=\"caller_retries\""]).await, 1.0);
    let (answer, heard) = call(&caller, &servers, "web", "ends-14,grpc-14,ends-0", None).await;
    assert_eq!((heard, status(&answer)), (3, "0"));
    let told = |n: &str| servers.any(|one| one.headers.get("grpc-previous-rpc-attempts").is_some_and(|told| told == n));
    assert!(told("1") && told("2") && !told("0") && !told("3"));
}
