//! A request that is not safe to repeat, against a server that breaks at every moment.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheetbend_tests::{Mesh, http, loopback};
use socket2::SockRef;

/// When the server breaks a connection, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    AfterAccept,
    AfterHead,
    AfterHalfTheBody,
    AfterTheBody,
    InTheStatusLine,
    InTheAnswersHead,
    InTheAnswersBody,
    AfterTheAnswer,
    Never,
}

const MOMENTS: [Break; 9] = [
    Break::AfterAccept,
    Break::AfterHead,
    Break::AfterHalfTheBody,
    Break::AfterTheBody,
    Break::InTheStatusLine,
    Break::InTheAnswersHead,
    Break::InTheAnswersBody,
    Break::AfterTheAnswer,
    Break::Never,
];

const BODY: usize = 4096;

/// How often the server has seen the head of each order, and how often all of it.
#[derive(Default)]
struct Seen {
    heads: BTreeMap<String, u32>,
    whole: BTreeMap<String, u32>,
}

/// Serves one connection; every request says in `x-break` when to break, and in `x-order` what to count.
fn serve(mut stream: TcpStream, seen: &Mutex<Seen>) -> std::io::Result<()> {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if stream.read(&mut byte)? == 0 {
                return Ok(());
            }
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let header = |name: &str| {
            let line = head.lines().find(|l| l.to_ascii_lowercase().starts_with(&format!("{name}:")));
            line.and_then(|l| l.split_once(':')).map(|(_, value)| value.trim().to_string()).unwrap_or_default()
        };
        let (order, moment, reset) = (header("x-order"), header("x-break"), header("x-reset") == "yes");
        let moment = MOMENTS.into_iter().find(|m| format!("{m:?}") == moment).unwrap_or(Break::Never);
        *seen.lock().expect("no panic").heads.entry(order.clone()).or_default() += 1;
        let close = |stream: &TcpStream| {
            if reset {
                let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
        };
        if moment == Break::AfterHead {
            close(&stream);
            return Ok(());
        }
        let length = header("content-length").parse().unwrap_or(0);
        let mut body = vec![0; length];
        if moment == Break::AfterHalfTheBody {
            stream.read_exact(&mut body[..length / 2])?;
            close(&stream);
            return Ok(());
        }
        stream.read_exact(&mut body)?;
        *seen.lock().expect("no panic").whole.entry(order).or_default() += 1;
        let answer: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\nx-served: yes\r\n\r\ncounted\n";
        let said = match moment {
            Break::AfterTheBody => 0,
            Break::InTheStatusLine => 7,
            Break::InTheAnswersHead => 30,
            Break::InTheAnswersBody => answer.len() - 4,
            _ => answer.len(),
        };
        stream.write_all(&answer[..said])?;
        if moment != Break::Never {
            close(&stream);
            return Ok(());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_post_is_never_counted_twice_whenever_the_server_breaks() {
    let listener = TcpListener::bind(loopback(0)).expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let counting = seen.clone();
    // The connection that follows this many accepted ones is broken at once.
    let breaks_at_accept = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let at_accept = breaks_at_accept.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            use std::sync::atomic::Ordering::Relaxed;
            if at_accept.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)).is_ok() {
                let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                continue;
            }
            let seen = counting.clone();
            std::thread::spawn(move || serve(stream, &seen));
        }
    });

    let mesh = Mesh::local();
    let _server = mesh.run("counter").port(port).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://counter/").await;
    let mut answered = Vec::new();
    for round in 0..6 {
        for moment in MOMENTS {
            let order = format!("{moment:?}-{round}");
            if moment == Break::AfterAccept {
                breaks_at_accept.store(1, std::sync::atomic::Ordering::Relaxed);
            }
            let request = ::http::Request::post("http://counter/order")
                .header("host", "counter")
                .header("x-order", &order)
                .header("x-break", format!("{moment:?}"))
                .header("x-reset", if round % 2 == 0 { "yes" } else { "no" })
                .body(http_body_util::Full::from(bytes::Bytes::from(vec![b'o'; BODY])))
                .expect("a request");
            let call = async {
                let answer = http::http1(caller.proxy()).await?.send_request(request).await?;
                http::read(answer).await
            };
            let outcome = tokio::time::timeout(Duration::from_secs(20), call).await.expect("an answer within 20 s");
            if let Ok(answer) = &outcome
                && answer.status.is_success()
            {
                answered.push(order);
            }
            breaks_at_accept.store(0, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let seen = seen.lock().expect("no panic");
    let twice: Vec<_> = seen.heads.iter().filter(|(order, times)| !order.is_empty() && **times > 1).collect();
    assert!(twice.is_empty(), "the server saw these more than once: {twice:?}");
    for order in &answered {
        assert_eq!(seen.whole.get(order), Some(&1), "{order} was answered well, and counted once");
    }
    for moment in [Break::Never, Break::AfterTheAnswer] {
        let good = answered.iter().filter(|order| order.starts_with(&format!("{moment:?}-"))).count();
        assert_eq!(good, 6, "{moment:?}: {answered:?}");
    }
}
