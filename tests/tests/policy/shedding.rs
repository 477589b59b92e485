//! An app that can do some requests at once, and more callers than that.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt;
use serde_json::json;
use sheetbend_tests::http::{self as client, Answer};
use sheetbend_tests::{App, Line, Mesh, START, Scripted, Sidecar, Slow, eventually, full, hear, long};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

fn concurrency(words: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: web}}\n\
         spec: {{targetRefs: [{{kind: Service, group: \"\", name: web}}], concurrency: {words}}}\n"
    )
}

fn callers(caller: &Sidecar, count: usize) -> JoinSet<Answer> {
    let proxy = caller.proxy();
    (0..count).map(|_| async move { client::get(proxy, "http://web/").await.expect("an answer") }).collect()
}

/// How full the app is, as its sidecar shows it.
async fn level(web: &Sidecar, limit: &str) -> serde_json::Value {
    let page = web.page("/clusters").await.json();
    let found = page["limits"].as_array().into_iter().flatten().find(|one| one["of"] == "the app");
    found.map(|one| one[limit].clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_can_do_ten_at_once_has_ten_and_goes_on_answering() {
    let slow = Slow::start().await;
    let words = "{maxRequests: 10, maxPending: 5, pendingTimeout: 300ms, exemptPaths: [/healthz]}";
    let mesh = Mesh::with_resources(&concurrency(words), &[]);
    let web = mesh.run("web").port(slow.app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/healthz").await;

    let mut all = callers(&caller, 60);
    // The app answers none of them; whoever waited for their turn has given up by the end.
    for _ in 0..50 {
        let answer = all.join_next().await.expect("a caller").expect("an answer");
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert_eq!(answer.headers["retry-after"], "1");
    }
    slow.has(10).await;
    assert_eq!(level(&web, "requests").await, json!({"taken": 10, "most": 10}));
    assert_eq!(level(&web, "pending").await, json!({"taken": 0, "most": 5}));
    // Whoever looks after its health finds it well.
    let health = client::get(caller.proxy(), "http://web/healthz").await.expect("an answer");
    assert_eq!(health.text(), "well\n");
    slow.open.send_replace(true);
    for answer in all.join_all().await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(slow.most.load(SeqCst), 10);
    for reason in ["full", "waited"] {
        assert!(web.counter("sheetbend_shed_total", &[reason]).await >= 1.0, "{reason}");
    }
    let flagged = web.counter("istio_requests_total", &["response_flags=\"UO\"", "response_code=\"503\""]).await;
    assert!(flagged >= 50.0, "{flagged}");
    // It is well, and its callers do not hold against it that it had enough to do.
    let breakers = caller.page("/breakers").await.json();
    assert_eq!(breakers["endpoints"][0]["state"], "Serving", "{breakers:#}");
    assert_eq!(breakers["endpoints"][0]["failures"], 0, "{breakers:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_has_their_turn_and_a_higher_limit_lets_them_in_at_once() {
    let slow = Slow::start().await;
    let words = |most: u32| concurrency(&format!("{{maxRequests: {most}, maxPending: 10, pendingTimeout: 10m}}"));
    let mesh = Mesh::with_resources(&words(2), &[]);
    let web = mesh.run("web").port(slow.app.port()).serve();
    let caller = mesh.caller("caller");
    slow.open.send_replace(true);
    caller.first_answer("http://web/").await;
    slow.open.send_replace(false);
    slow.most.store(0, SeqCst);

    let all = callers(&caller, 8);
    slow.has(2).await;
    eventually("six wait", START, || async { (level(&web, "pending").await["taken"] == 6).then_some(()) }).await;
    mesh.write_resources(&words(5));
    slow.has(5).await;
    eventually("three wait", START, || async { (level(&web, "pending").await["taken"] == 3).then_some(()) }).await;
    // Fewer from now on: those that are there stay.
    mesh.write_resources(&words(1));
    eventually("one may come", START, || async { (level(&web, "requests").await["most"] == 1).then_some(()) }).await;
    slow.has(5).await;
    slow.open.send_replace(true);
    for answer in all.join_all().await {
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(slow.most.load(SeqCst), 5);
    eventually("nobody is there", START, || async {
        (level(&web, "requests").await == json!({"taken": 0, "most": 1})).then_some(())
    })
    .await;
    caller.first_answer("http://web/").await;
}

/// A server that hears the whole of what it is sent, and has an answer without an end.
async fn patient() -> App {
    App::start(async |request: Request<hyper::body::Incoming>| match request.uri().path() {
        "/upload" => match request.into_body().collect().await {
            Ok(_) => Response::new(full("all of it\n")),
            Err(_) => Response::new(full("half of it\n")),
        },
        "/endless" => Response::new(long(u64::MAX)),
        _ => Response::new(full("web\n")),
    })
    .await
}

/// Says something on a connection of its own.
async fn says(to: SocketAddr, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.expect("a connection");
    stream.write_all(text.as_bytes()).await.expect("somebody hears it");
    stream
}

/// Sends a byte now and then until nobody wants more; what was said to that.
async fn dribbles(to: SocketAddr, url: &str) -> String {
    let head = format!("POST {url}/upload HTTP/1.1\r\nHost: web\r\nContent-Length: 1000000\r\n\r\n");
    let mut stream = says(to, &head).await;
    let mut heard = Vec::new();
    loop {
        tokio::select! {
            read = stream.read_buf(&mut heard) => match read {
                Ok(1..) => {}
                Ok(0) | Err(_) => return String::from_utf8_lossy(&heard).into_owned(),
            },
            () = tokio::time::sleep(Duration::from_millis(50)) => {
                let _ = stream.write_all(b"x").await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_keeps_the_app_waiting_keeps_nobody_else_out_for_long() {
    let app = patient().await;
    let mesh = Mesh::with_resources(&concurrency("{maxRequests: 2, stallTimeout: 3s}"), &[]);
    let web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    // By way of a sidecar, and without one.
    for (to, url) in [(caller.proxy(), "http://web"), (web.inbound(), "")] {
        let sends = {
            let url = url.to_string();
            tokio::spawn(async move { dribbles(to, &url).await })
        };
        let mut reads_nothing = says(to, &format!("GET {url}/endless HTTP/1.1\r\nHost: web\r\n\r\n")).await;
        eventually("both are with the app", START, || async {
            (level(&web, "requests").await["taken"] == 2).then_some(())
        })
        .await;
        caller.first_answer("http://web/").await;
        let told = sends.await.expect("an answer");
        assert!(told.starts_with("HTTP/1.1 408 ") && told.contains("stallTimeout"), "{told}");
        eventually("nobody is with the app", START, || async {
            (level(&web, "requests").await["taken"] == 0).then_some(())
        })
        .await;
        // Whoever reads after all finds that it ends too soon, and that no more comes.
        let mut heard = Vec::new();
        let read = tokio::time::timeout(START, reads_nothing.read_to_end(&mut heard)).await;
        read.expect("an end").ok();
        assert!(heard.starts_with(b"HTTP/1.1 200 ") && !heard.ends_with(b"\r\n0\r\n\r\n"), "{}", heard.len());
    }
    for reason in ["request", "answer"] {
        let stalled = web.counter("sheetbend_stalled_total", &[reason]).await;
        assert_eq!(stalled, 2.0, "{reason}");
    }
    let shown = caller.page("/breakers").await.json();
    for kind in ["failures", "consecutive_failures"] {
        assert_eq!(shown["endpoints"][0][kind], 0, "what a proxy ends itself is held against nobody: {shown:#}");
    }
    for line in ["\"POST /upload HTTP/2\" 408 SI ", "\"GET /endless HTTP/1.1\" 200 SI "] {
        eventually(line, START, || async { web.process.stderr().contains(line).then_some(()) }).await;
    }
}

/// Answers once it is told to, in one of three ways.
async fn talks(mut line: Line, mut open: watch::Receiver<bool>) {
    let Some(asked) = line.hear("\r\n\r\n").await else { return };
    let begins = match asked.split(' ').nth(1) {
        Some("/events") => "HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello\n",
        Some("/chat") => "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\nhello\n",
        Some("/call") => "",
        _ => return line.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await,
    };
    line.say(begins).await;
    let _ = open.wait_for(|open| *open).await;
    if begins.is_empty() {
        line.say("HTTP/1.1 200 OK\r\nContent-Type: application/grpc\r\nContent-Length: 5\r\n\r\n").await;
    }
    line.say("more\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_in_which_nobody_says_anything_goes_on_and_no_longer_counts() {
    let open = watch::Sender::new(false);
    let gate = open.subscribe();
    let app = Scripted::start(move |line| talks(line, gate.clone())).await;
    let mesh = Mesh::with_resources(&concurrency("{maxRequests: 1, stallTimeout: 1s}"), &[]);
    let web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let streams = [
        ("GET /events HTTP/1.1\r\nHost: web\r\n\r\n", "hello\n"),
        ("GET /chat HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: chat\r\n\r\n", "hello\n"),
        // Its caller has not said all, and need not.
        (
            "POST /call HTTP/1.1\r\nHost: web\r\nContent-Type: application/grpc\r\nTransfer-Encoding: chunked\r\n\r\n\
             5\r\nhello\r\n",
            "",
        ),
    ];
    let mut open_streams = Vec::new();
    for (count, (ask, first)) in streams.into_iter().enumerate() {
        // There is room for one, and each of them takes it.
        let mut stream = says(web.inbound(), ask).await;
        if !first.is_empty() {
            hear(&mut stream, first).await.expect("its beginning");
        }
        eventually("its room is free", START, || async {
            let given_back = web.counter("sheetbend_stalled_total", &["\"stream\""]).await;
            (given_back > count as f64).then_some(())
        })
        .await;
        caller.first_answer("http://web/").await;
        open_streams.push(stream);
    }
    open.send_replace(true);
    for mut stream in open_streams {
        hear(&mut stream, "more\n").await.expect("the rest");
    }
    for reason in ["request", "answer"] {
        let stalled = web.counter("sheetbend_stalled_total", &[reason]).await;
        assert_eq!(stalled, 0.0, "{reason}");
    }
}
