//! What a sidecar takes does not grow with the requests that it has carried, though nobody ever asks it for metrics.
//!
//! Five million requests are counted on an edge in `proxy/tests/telemetry_memory.rs`; here fewer go all the way.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use sheetbend_tests::{App, Mesh, Sidecar, http as client};

/// Connections at once.
const CONNECTIONS: u64 = 16;
/// What may be added: pages that an allocator keeps come in steps.
const ROOM: u64 = 5 << 20;

/// `requests` requests, no two alike, over connections that are kept.
async fn carry(caller: &Sidecar, round: u64, requests: u64) {
    let to = caller.proxy();
    let each = (0..CONNECTIONS).map(|connection| {
        tokio::spawn(async move {
            let mut sender = client::http1(to).await.expect("a connection");
            for number in 0..requests / CONNECTIONS {
                let request = Request::get(format!("http://server/{round}/{connection}/{number}"))
                    .header("host", "server")
                    .header("x-request-id", format!("{round}-{connection}-{number}"))
                    .body(Full::<Bytes>::default())
                    .expect("a request");
                sender.ready().await.expect("a connection that is kept");
                let answer = client::read(sender.send_request(request).await.expect("an answer")).await;
                assert_eq!(answer.expect("a whole answer").status, 200);
            }
        })
    });
    for connection in each.collect::<Vec<_>>() {
        connection.await.expect("no request fails");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_of_sidecars_takes_no_more_after_many_requests_than_after_some() {
    // Its own process: what is measured are sidecars, not those who serve the mesh.
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("hello\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    carry(&caller, 0, 4_000).await;
    let resident = || [caller.process.resident(), server.process.resident()];
    // What grows with requests grows each time; what a machine that was held up made grow does not grow again.
    let mut seen = vec![resident()];
    for round in 1..=3 {
        carry(&caller, round, 20_000).await;
        seen.push(resident());
        let [.., before, after] = seen[..] else { unreachable!("two by now") };
        if before.into_iter().zip(after).all(|(before, after)| after <= before + ROOM) {
            return;
        }
    }
    panic!("the caller's and the server's bytes after 4,000 requests and after each 20,000 more: {seen:?}");
}
