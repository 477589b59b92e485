//! A caller and an app that speak different versions of HTTP.

use std::convert::Infallible;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use sheetbend_tests::http::{self as client, Answer};
use sheetbend_tests::{Mesh, START, Scripted, Sidecar, eventually, full, loopback};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const NO: &str = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A server that knows HTTP/1.1 alone.
async fn of_old() -> Scripted {
    Scripted::start(async |mut line| {
        while let Some(head) = line.hear("\r\n\r\n").await {
            if head.starts_with("PRI ") {
                return line.say(NO).await;
            }
            line.say("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nweb\n").await;
        }
    })
    .await
}

/// HTTP/2 to `web`, by way of a sidecar.
async fn http2_to_web(caller: &Sidecar) -> http2::SendRequest<Full<Bytes>> {
    let tunnel = client::tunnel(caller.proxy(), "web:80").await.expect("a tunnel");
    client::http2(tunnel).await.expect("a connection")
}

async fn ask(sender: &mut http2::SendRequest<Full<Bytes>>) -> Answer {
    let request = Request::get("http://web/").body(Full::default()).expect("a request");
    client::read(sender.send_request(request).await.expect("an answer")).await.expect("a whole answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_knows_no_http2_is_not_blamed_for_it_and_its_caller_hears_how_to_mend_it() {
    let app = of_old().await;
    let mesh = Mesh::with_control_plane(&[]);
    let web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let mut sender = http2_to_web(&caller).await;
    for _ in 0..10 {
        let answer = ask(&mut sender).await;
        assert_eq!(answer.status, 502, "{}", answer.text());
        for said in [&app.address.to_string(), "is HTTP/2", "--port PORT/http"] {
            assert!(answer.text().contains(said), "{}", answer.text());
        }
        let why = answer.headers["proxy-status"].to_str().expect("text");
        assert!(why.contains("error=http_protocol_error"), "{why}");
        assert!(!answer.headers.contains_key("sheetbend-unsent"), "{:?}", answer.headers);
    }
    assert_eq!(web.counter("sheetbend_rejected_requests_total", &["not_http2"]).await, 10.0);
    assert_eq!(caller.counter("sheetbend_retries_total", &[]).await, 0.0);
    let breakers = caller.page("/breakers").await.json();
    assert_eq!(breakers["endpoints"][0]["failures"], 0, "{breakers:#}");
    assert_eq!(breakers["endpoints"][0]["state"], "Serving", "{breakers:#}");
    let flagged = "\"GET / HTTP/2\" 502 UPE \"the request is HTTP/2";
    eventually(flagged, START, || async { web.process.stderr().contains(flagged).then_some(()) }).await;
    assert_eq!(client::get(caller.proxy(), "http://web/").await.expect("an answer").text(), "web\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_whose_port_is_said_to_speak_http1_gets_http1() {
    let app = of_old().await;
    let mesh = Mesh::with_control_plane(&[]);
    let _web = mesh.run("web").flag(&["--port", &format!("{}/http", app.port())]).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let answer = ask(&mut http2_to_web(&caller).await).await;
    assert_eq!((answer.status.as_u16(), answer.text()), (200, "web\n".to_string()));
}

/// Speaks HTTP/2 until it is told not to know it any more.
async fn serve(mut stream: TcpStream, mut mad: watch::Receiver<bool>) {
    if *mad.borrow() {
        let mut preface = [0; 24];
        let _ = stream.read_exact(&mut preface).await;
        let _ = stream.write_all(NO.as_bytes()).await;
        return;
    }
    let service = service_fn(async |_| Ok::<_, Infallible>(Response::new(full("web\n"))));
    let http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    tokio::select! {
        _ = http2.serve_connection(TokioIo::new(stream), service) => {}
        _ = mad.wait_for(|mad| *mad) => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_app_that_has_spoken_http2_and_forgot_it_fails() {
    let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let mad = watch::Sender::new(false);
    let is_mad = mad.subscribe();
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            tokio::spawn(serve(stream, is_mad.clone()));
        }
    });
    let mesh = Mesh::with_control_plane(&[]);
    let _web = mesh.run("web").port(port).serve();
    let caller = mesh.caller("caller");
    let mut sender = eventually("web is known", START, || async {
        let mut sender = http2_to_web(&caller).await;
        (ask(&mut sender).await.status == 200).then_some(sender)
    })
    .await;
    mad.send_replace(true);
    let answer = eventually("it fails", START, || {
        let mut sender = sender.clone();
        async move { Some(ask(&mut sender).await).filter(|answer| answer.status == 502) }
    });
    assert!(!answer.await.text().contains("does not speak"));
    let _ = ask(&mut sender).await;
    let breakers = caller.page("/breakers").await.json();
    assert!(breakers["endpoints"][0]["failures"].as_u64() >= Some(1), "{breakers:#}");
}
