//! What HTTP promises its users, through two sidecars, byte by byte.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use sheetbend_tests::{Mesh, START, Scripted, Sidecar, dialogue, eventually, hear};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A server and a caller, each beside its sidecar.
struct Pair {
    // In the order in which they end: a sidecar takes its leave of the mesh.
    caller: Sidecar,
    server: Sidecar,
    _mesh: Mesh,
}

/// The server is known to its caller once this returns; nothing was asked of it yet.
async fn pair(port: u16) -> Pair {
    let mesh = Mesh::with_control_plane(&[]);
    let server = mesh.run("server").port(port).serve();
    let caller = mesh.caller("caller");
    let inbound = server.inbound().to_string();
    eventually("the server is known", START, || async {
        let connect = "CONNECT server:80 HTTP/1.1\r\nHost: server:80\r\n\r\n";
        dialogue(caller.proxy(), connect, "\r\n\r\n").await.ok()?;
        caller.page("/clusters").await.text().contains(&inbound).then_some(())
    })
    .await;
    Pair { _mesh: mesh, server, caller }
}

impl Pair {
    fn proxy(&self) -> SocketAddr {
        self.caller.proxy()
    }
}

const WELL: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwell\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_kept_heads_have_no_body_and_old_clients_are_served() {
    let app = Scripted::start(|mut line| async move {
        while let Some(head) = line.hear("\r\n\r\n").await {
            match head.starts_with("HEAD") {
                true => line.say("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n").await,
                false => line.say(WELL).await,
            }
        }
    })
    .await;
    let pair = pair(app.port()).await;

    let mut kept = TcpStream::connect(pair.proxy()).await.unwrap();
    for _ in 0..3 {
        kept.write_all(b"GET http://server/ HTTP/1.1\r\nHost: server\r\n\r\n").await.unwrap();
        assert!(hear(&mut kept, "well\n").await.unwrap().starts_with("HTTP/1.1 200"));
        kept.write_all(b"HEAD http://server/ HTTP/1.1\r\nHost: server\r\n\r\n").await.unwrap();
        let head = hear(&mut kept, "\r\n\r\n").await.unwrap();
        assert!(head.to_ascii_lowercase().contains("content-length: 5"), "{head}");
    }

    // HTTP/1.0 knows no chunks and no kept connection unless it asks for one: the answer ends with the connection.
    let old = dialogue(pair.proxy(), "GET http://server/ HTTP/1.0\r\n\r\n", "").await.unwrap();
    assert!(old.ends_with("\r\n\r\nwell\n") && !old.to_ascii_lowercase().contains("transfer-encoding"), "{old}");
    assert!(app.heard().contains("GET / HTTP/1.1\r\n") && !app.heard().contains("HTTP/1.0"), "{}", app.heard());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_and_trailers_pass_both_ways_and_hop_by_hop_headers_end_here() {
    let app = Scripted::start(|mut line| async move {
        while line.hear("\r\n\r\n").await.is_some() {
            line.hear("0\r\n").await;
            line.hear("\r\n\r\n").await;
            line.say(
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\nkeep-alive: timeout=9\r\n\
                 connection: x-theirs\r\nx-theirs: hop\r\nx-end: to-end\r\n\r\n\
                 4\r\nwell\r\n1\r\n\n\r\n0\r\nx-sum: 42\r\n\r\n",
            )
            .await;
        }
    })
    .await;
    let pair = pair(app.port()).await;
    let request = "POST http://server/x?y=z HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\nTE: trailers, deflate\r\n\
                   Trailer: x-check\r\nConnection: keep-alive, TE, X-Mine\r\nX-Mine: hop\r\nKeep-Alive: timeout=5\r\n\
                   Proxy-Connection: keep-alive\r\nX-End: to-end\r\nCookie: a=b\r\nCookie: c=d\r\n\r\n\
                   5\r\nhello\r\n7;ext=1\r\n, world\r\n0\r\nX-Check: 7\r\n\r\n";
    let answer = dialogue(pair.proxy(), request, "x-sum: 42\r\n\r\n").await.unwrap().to_ascii_lowercase();
    assert!(answer.contains("well") && answer.contains("x-end: to-end\r\n"), "{answer}");
    for hop in ["x-theirs", "keep-alive: timeout=9"] {
        assert!(!answer.contains(hop), "{hop} in {answer}");
    }

    let heard = app.heard().to_ascii_lowercase();
    assert!(heard.starts_with("post /x?y=z http/1.1\r\n"), "{heard}");
    for passes in ["\r\nhost: server\r\n", "te: trailers\r\n", "x-end: to-end\r\n", "x-check: 7\r\n", "a=b", "c=d"] {
        assert!(heard.contains(passes), "{passes} not in {heard}");
    }
    for hop in ["x-mine", "proxy-connection", "deflate", "keep-alive: timeout", "sheetbend-"] {
        assert!(!heard.contains(hop), "{hop} in {heard}");
    }
    assert!(heard.contains("hello") && heard.contains(", world"), "{heard}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_keeps_its_body_though_nobody_knows_how_long_that_will_be() {
    let app = Scripted::start(|mut line| async move {
        while line.hear("\r\n\r\n").await.is_some() {
            line.hear("0\r\n\r\n").await;
            line.say(WELL).await;
        }
    })
    .await;
    let pair = pair(app.port()).await;
    for method in ["GET", "DELETE"] {
        let head =
            format!("{method} http://server/{method} HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\n\r\n");
        let mut stream = TcpStream::connect(pair.proxy()).await.unwrap();
        stream.write_all(format!("{head}5\r\nhello\r\n").as_bytes()).await.unwrap();
        eventually("the app hears of it before it is whole", START, || async {
            app.heard().contains(&format!("{method} /{method}")).then_some(())
        })
        .await;
        stream.write_all(b"7\r\n, world\r\n0\r\n\r\n").await.unwrap();
        assert!(hear(&mut stream, "well\n").await.unwrap().starts_with("HTTP/1.1 200"));
        let heard = app.heard();
        let (_, heard) = heard.split_once(&format!("{method} /{method}")).unwrap();
        assert!(heard.contains("hello") && heard.contains(", world"), "{heard}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_takes_a_connection_that_was_used_a_moment_ago_and_none_that_the_server_has_closed() {
    let (accepted, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (opens, closes) = (Arc::clone(&accepted), Arc::clone(&closed));
    let app = Scripted::start(move |mut line| {
        opens.fetch_add(1, SeqCst);
        let closes = Arc::clone(&closes);
        async move {
            while let Some(head) = line.hear("\r\n\r\n").await {
                match head.contains("/impatient") {
                    true => line.say(&WELL.replacen("\r\n", "\r\nkeep-alive: timeout=1\r\n", 1)).await,
                    false => line.say(WELL).await,
                }
                if head.contains("/closes") {
                    // Without a word.
                    break;
                }
            }
            drop(line);
            closes.fetch_add(1, SeqCst);
        }
    })
    .await;
    let pair = pair(app.port()).await;
    let post = async |path: &str| {
        let head = format!("POST http://server{path} HTTP/1.1\r\nHost: server\r\nContent-Length: 0\r\n\r\n");
        let answer = dialogue(pair.proxy(), &head, "well\n").await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    };
    for _ in 0..30 {
        post("/keeps").await;
    }
    let opened = accepted.swap(0, SeqCst);
    assert!(opened <= 10, "{opened} connections for 30 requests one after another");
    for _ in 0..30 {
        let before = closed.load(SeqCst);
        post("/closes").await;
        eventually("the server has hung up", START, || async { (closed.load(SeqCst) > before).then_some(()) }).await;
    }
    accepted.store(0, SeqCst);
    for _ in 0..5 {
        post("/impatient").await;
    }
    assert!(accepted.load(SeqCst) >= 4, "the server would not keep them for as long as it may take to reach it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_expects_100_continue_sends_its_body_only_when_the_server_wants_it() {
    let app = Scripted::start(|mut line| async move {
        while let Some(head) = line.hear("\r\n\r\n").await {
            assert!(head.to_ascii_lowercase().contains("expect: 100-continue"), "{head}");
            if head.contains("/no") {
                line.say("HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n").await;
                continue;
            }
            line.say("HTTP/1.1 100 Continue\r\n\r\n").await;
            line.hear("hello").await;
            line.say(WELL).await;
        }
    })
    .await;
    let pair = pair(app.port()).await;
    let ask = |path: &str| {
        format!("PUT http://server{path} HTTP/1.1\r\nHost: server\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    };

    // A server that is silent for a second gets the body unasked; one that was not, however busy the machine is, does not.
    eventually("no 100 of the proxy's own", START, || async {
        let refused = dialogue(pair.proxy(), &ask("/no"), "\r\n\r\n").await.unwrap();
        refused.starts_with("HTTP/1.1 417").then_some(())
    })
    .await;

    let mut stream = TcpStream::connect(pair.proxy()).await.unwrap();
    stream.write_all(ask("/yes").as_bytes()).await.unwrap();
    assert!(hear(&mut stream, "\r\n\r\n").await.unwrap().starts_with("HTTP/1.1 100"));
    stream.write_all(b"hello").await.unwrap();
    assert!(hear(&mut stream, "well\n").await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_joins_the_two_ends_and_one_that_is_declined_is_an_ordinary_answer() {
    let app = Scripted::start(|mut line| async move {
        while let Some(head) = line.hear("\r\n\r\n").await {
            if head.contains("/declined") {
                line.say(WELL).await;
                continue;
            }
            line.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: knots\r\n\r\nfirst").await;
            line.hear("over").await;
            line.say("and out").await;
            line.fall_silent().await;
            line.hear("unheard").await;
        }
    })
    .await;
    let pair = pair(app.port()).await;
    let ask = |path: &str| {
        format!("GET http://server{path} HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\nUpgrade: knots\r\n\r\n")
    };
    let mut stream = TcpStream::connect(pair.proxy()).await.unwrap();
    stream.write_all(ask("/declined").as_bytes()).await.unwrap();
    assert!(hear(&mut stream, "well\n").await.unwrap().starts_with("HTTP/1.1 200"));

    let mut stream = TcpStream::connect(pair.proxy()).await.unwrap();
    stream.write_all(ask("/").as_bytes()).await.unwrap();
    let head = hear(&mut stream, "\r\n\r\n").await.unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: knots"), "{head}");
    assert_eq!(hear(&mut stream, "first").await.unwrap(), "first");
    stream.write_all(b"over").await.unwrap();
    assert_eq!(hear(&mut stream, "").await.unwrap(), "and out", "and then the end of that direction alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_carries_half_a_close_and_the_rest_of_the_answer() {
    // A server of no known protocol: it counts what it hears until the client has ended, and only then answers.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all).await;
                let _ = stream.write_all(format!("{} bytes", all.len()).as_bytes()).await;
            });
        }
    });
    let pair = pair(port).await;
    let mut stream = TcpStream::connect(pair.proxy()).await.unwrap();
    stream.write_all(b"CONNECT server:80 HTTP/1.1\r\nHost: server:80\r\n\r\n").await.unwrap();
    hear(&mut stream, "\r\n\r\n").await.unwrap();
    stream.write_all(&vec![0x80; 300_000]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(hear(&mut stream, "").await.unwrap(), "300000 bytes");
    serving.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_two_servers_could_read_differently_is_refused_and_reaches_nobody() {
    let app = Scripted::answering(WELL).await;
    let pair = pair(app.port()).await;
    let spoilt = [
        ("two lengths", "Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
        ("a list of lengths", "Content-Length: 5, 6\r\n\r\nhello!"),
        ("a length with a sign", "Content-Length: +5\r\n\r\nhello"),
        ("a length that is no number", "Content-Length: 5x\r\n\r\nhello"),
        ("a coding of another name", "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        ("chunked not last", "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        ("chunked twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("a space before the colon", "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
        ("a folded line", "X-A: b\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("a second host", "Host: other\r\n\r\n"),
        ("a null in a value", "X-A: b\0c\r\n\r\n"),
        ("a bare carriage return", "X-A: b\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ];
    for (what, rest) in spoilt {
        let request = format!("POST http://server/smuggled HTTP/1.1\r\nHost: server\r\n{rest}");
        let answer = dialogue(pair.proxy(), &request, "").await.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(answer.starts_with("HTTP/1.1 400"), "{what}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "one answer, then the end, to {what}: {answer}");
    }
    assert!(!app.heard().contains("smuggled"), "{}", app.heard());
    // Both lengths: RFC 9112 §6.3 lets the coding win, if the length goes and the connection ends. Nothing is left that
    // another server could take for a second request.
    let both = "POST http://server/both HTTP/1.1\r\nHost: server\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n\
                0\r\n\r\nGET http://server/smuggled HTTP/1.1\r\nHost: server\r\n\r\n";
    let answer = dialogue(pair.proxy(), both, "").await.unwrap();
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    let heard = app.heard().to_ascii_lowercase();
    assert!(!heard.contains("smuggled") && !heard.contains("content-length: 5"), "{heard}");
    // A chunk whose size is none is found only once the head has gone on: the request then ends unfinished.
    let request = "POST http://server/unfinished HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello\r\n0\r\n\r\n";
    let answer = dialogue(pair.proxy(), request, "").await.unwrap_or_default();
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 0, "{answer}");
    eventually("all of them are counted", START, || async {
        let counted = pair.caller.counter("sheetbend_rejected_requests_total", &[]).await;
        (counted >= spoilt.len() as f64).then_some(())
    })
    .await;
    // And the door is open to everybody else.
    // Of two lengths that of the chunks is right (RFC 9112 §6.3), and the other goes.
    for path in ["/both", "/"] {
        let request = format!("GET http://server{path} HTTP/1.1\r\nHost: server\r\n\r\n");
        let well = dialogue(pair.proxy(), &request, "well\n").await.unwrap();
        assert!(well.starts_with("HTTP/1.1 200") && !well.contains("content-length: 2\r\n"), "{path}: {well}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_a_sidecar_answers_itself_has_no_body_and_its_caller_stays() {
    let app = Scripted::start(|_| async {}).await;
    let mut pair = pair(app.port()).await;
    // The app hangs up: the sidecar beside it says so, by HTTP/2 to the caller's.
    let asks = "HEAD http://server/gone HTTP/1.1\r\nHost: server\r\n\r\n";
    let answer = dialogue(pair.proxy(), &asks.repeat(2), "\r\n\r\n").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("connection_terminated"), "{answer}");
    assert!(!answer.contains("content-length: 0"), "{answer}");
    for (sidecar, flag) in [(&mut pair.caller, " URX "), (&mut pair.server, " UC ")] {
        let line = sidecar.process.wait_for("/gone", START);
        assert!(line.contains(flag), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_could_be_read_differently_or_breaks_off_is_not_taken_for_a_whole_one() {
    let app = Scripted::start(|mut line| async move {
        while let Some(head) = line.hear("\r\n\r\n").await {
            let path = head.split(' ').nth(1).unwrap_or_default().to_string();
            line.say(match path.as_str() {
                "/lengths" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\nwell\nxx",
                "/noise" => "this is no HTTP\r\n\r\n",
                "/gzip" => "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n5\r\nwell\n\r\n0\r\n\r\n",
                "/switches" => "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: knots\r\n\r\n",
                "/both" => {
                    "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n5\r\nwell\n\r\n0\r\n\r\n"
                }
                "/short" => "HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nwell\n",
                "/chunks" => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nwell\n\r\n",
                _ => WELL,
            })
            .await;
            if path != "/" {
                return;
            }
        }
    })
    .await;
    let pair = pair(app.port()).await;
    for path in ["/lengths", "/noise", "/gzip", "/switches"] {
        let request = format!("GET http://server{path} HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n");
        let answer = dialogue(pair.proxy(), &request, "").await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 502"), "{path}: {answer}");
        assert!(answer.to_ascii_lowercase().contains("proxy-status: "), "{path}: {answer}");
    }
    for path in ["/short", "/chunks"] {
        let request = format!("GET http://server{path} HTTP/1.1\r\nHost: server\r\n\r\n");
        let answer = dialogue(pair.proxy(), &request, "").await.unwrap_or_else(|e| e.to_string());
        // What came before the break arrives; an end that looks like one is never sent.
        let head = answer.split("\r\n\r\n").next().unwrap_or_default().to_ascii_lowercase();
        let promised = head.contains("content-length: 500") || head.contains("transfer-encoding: chunked");
        assert!(promised && answer.contains("well\n") && !answer.ends_with("0\r\n\r\n"), "{path}: {answer}");
    }
    let well = dialogue(pair.proxy(), "GET http://server/ HTTP/1.1\r\nHost: server\r\n\r\n", "well\n").await.unwrap();
    assert!(well.starts_with("HTTP/1.1 200"), "{well}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_breaks_off_is_never_delivered_as_a_whole_one() {
    let app = Scripted::start(|mut line| async move {
        while line.hear("\r\n\r\n").await.is_some() {
            line.hear("0\r\n\r\n").await;
            line.say(WELL).await;
        }
    })
    .await;
    let pair = pair(app.port()).await;
    // A method that may be sent again, and a body that is short enough to be.
    let begins = "PUT http://server/ HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";
    for rest in ["no chunk\r\n", ""] {
        let mut client = TcpStream::connect(pair.proxy()).await.unwrap();
        client.write_all(begins.as_bytes()).await.unwrap();
        eventually("the app has heard the beginning", START, || async {
            app.heard().ends_with("hello\r\n").then_some(())
        })
        .await;
        client.write_all(rest.as_bytes()).await.unwrap();
        client.shutdown().await.unwrap();
        let said = hear(&mut client, "").await.unwrap_or_default();
        assert!(!said.contains("200 OK"), "{said}");
    }
    let whole = dialogue(pair.proxy(), &format!("{begins}0\r\n\r\n"), "well\n").await.unwrap();
    assert!(whole.starts_with("HTTP/1.1 200"), "{whole}");
    assert_eq!(app.heard().matches("0\r\n\r\n").count(), 1, "{}", app.heard());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn informational_answers_are_dropped_and_counted_and_the_final_one_arrives() {
    let app = Scripted::answering(
        "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n\
         HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwell\n",
    )
    .await;
    let pair = pair(app.port()).await;
    let answer = dialogue(pair.proxy(), "GET http://server/ HTTP/1.1\r\nHost: server\r\n\r\n", "well\n").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains("103"), "{answer}");
    assert_eq!(pair.server.counter("sheetbend_informational_dropped_total", &[]).await, 2.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_target_of_the_request_decides_over_its_host_and_ids_and_traces_pass_untouched() {
    let app = Scripted::answering(WELL).await;
    let pair = pair(app.port()).await;
    let trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = format!(
        "GET http://server/first HTTP/1.1\r\nHost: elsewhere.example\r\n{trace}\r\nX-Request-Id: mine\r\n\
         b3: 80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1\r\nSheetbend-Version: 9\r\nSheetbend-Unsent: 1\r\n\r\n"
    );
    dialogue(pair.proxy(), &request, "well\n").await.unwrap();
    let heard = app.heard().to_ascii_lowercase();
    for passes in
        [trace, "x-request-id: mine", "b3: 80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1", "host: server"]
    {
        assert!(heard.contains(&format!("{passes}\r\n")), "{passes} not in {heard}");
    }
    assert!(!heard.contains("elsewhere") && !heard.contains("sheetbend-"), "{heard}");
    assert_eq!(heard.matches("traceparent").count(), 1);

    dialogue(pair.proxy(), "GET http://server/second HTTP/1.1\r\nHost: server\r\n\r\n", "well\n").await.unwrap();
    let second = app.heard();
    let second = &second[second.find("/second").unwrap()..];
    let id = second.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap_or_default();
    assert_eq!(id.len(), 36, "an id is made where there is none: {second}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_heads_are_an_answer_and_a_counter() {
    let app = Scripted::answering(WELL).await;
    let pair = pair(app.port()).await;
    let long = format!("GET http://server/ HTTP/1.1\r\nHost: server\r\nX-Long: {}\r\n\r\n", "x".repeat(100_000));
    let many = "X-Many: 1\r\n".repeat(150);
    let many = format!("GET http://server/ HTTP/1.1\r\nHost: server\r\n{many}\r\n");
    for head in [long, many] {
        let answer = dialogue(pair.proxy(), &head, "\r\n\r\n").await.unwrap_or_else(|e| panic!("{e}"));
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    // What still fits, passes.
    let fits = format!("GET http://server/ HTTP/1.1\r\nHost: server\r\nX-Long: {}\r\n\r\n", "x".repeat(40_000));
    let answer = dialogue(pair.proxy(), &fits, "well\n").await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    eventually("both are counted", START, || async {
        let counted = pair.caller.counter("sheetbend_rejected_requests_total", &["headers_too_large"]).await;
        (counted >= 2.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_without_a_sidecar_that_names_no_host_means_the_one_it_called() {
    let app = Scripted::answering(WELL).await;
    let pair = pair(app.port()).await;
    // What load balancers send to see whether a server is there.
    for probe in ["OPTIONS / HTTP/1.0\r\n\r\n", "GET /probe HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n"] {
        let said = dialogue(pair.server.inbound(), probe, "").await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200") || said.starts_with("HTTP/1.0 200"), "{probe}: {said}");
    }
    assert!(app.heard().contains(&format!("host: 127.0.0.1:{}\r\n", app.port())), "{}", app.heard());
}
