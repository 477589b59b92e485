//! New certificates and new roots under load: no request notices.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::process::Signal;
use sheetbend_tests::{App, Load, Mesh, START, eventually, free_port, loopback};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a sidecar shows on `/certs`.
async fn certs(sidecar: &sheetbend_tests::Sidecar) -> String {
    sidecar.page("/certs").await.text()
}

/// A server that sends every byte back.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind(loopback(0)).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

/// A question over a connection that stays open, and its answer.
async fn says(stream: &mut TcpStream, what: &[u8]) -> std::io::Result<()> {
    let mut answer = vec![0; what.len()];
    stream.write_all(what).await?;
    stream.read_exact(&mut answer).await?;
    assert_eq!(answer, what);
    Ok(())
}

/// The ports from which others are connected to a listener of ours.
fn connected_to(listener: SocketAddr) -> BTreeSet<u16> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the kernel's table");
    let port = |word: &str| u16::from_str_radix(word.split(':').nth(1)?, 16).ok();
    let established = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, remote, state) = (words.get(1)?, words.get(2)?, words.get(3)?);
        (*state == "01" && port(local) == Some(listener.port())).then(|| port(remote)).flatten()
    });
    established.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_root_and_the_end_of_the_old_one_fail_no_request() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("tied\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let echo = echo().await;
    let echoing = mesh.run("echo").flag(&["--port", &format!("{}/tcp", echo.port())]).serve();
    let local = free_port();
    let caller = mesh.run("caller").upstream(local, &format!("echo:{}", echo.port())).caller();
    caller.first_answer("http://server/").await;
    let before = [certs(&server).await, certs(&caller).await];
    let load = Load::start(caller.proxy(), "http://server/", 4, 25.0);
    let answers = async |more: usize| {
        let enough = load.so_far().good.len() + more;
        let look = || async { (load.so_far().good.len() >= enough).then_some(()) };
        eventually(&format!("{enough} answers"), START, look).await;
    };
    let mut tunnel = eventually("the echo answers through a tunnel", START, || async {
        let mut tunnel = TcpStream::connect(loopback(local)).await.ok()?;
        says(&mut tunnel, b"hello").await.ok().map(|()| tunnel)
    })
    .await;
    answers(50).await;
    let inbound = [server.inbound(), echoing.inbound()];
    let made_before = inbound.map(connected_to);
    assert!(made_before.iter().all(|ports| !ports.is_empty()), "{made_before:?}");

    let ca = mesh.ca();
    let ca = ca.to_str().expect("a path in UTF-8");
    // One is held up: however late this is asked, it still needs the old root, and is named.
    echoing.process.signal(Signal::STOP);
    mesh.finish(["certs", "rotate", "--dir", ca]).ok();
    let early = mesh.finish(["certs", "rotate", "--drop-old", "--dir", ca]);
    assert_eq!(early.status.code(), Some(1), "{}", early.stdout);
    assert!(early.stderr.contains("the old root stays") && early.stderr.contains("sa/echo"), "{}", early.stderr);
    echoing.process.signal(Signal::CONT);
    eventually("both sidecars show new certificates", START, || async {
        let now = [certs(&server).await, certs(&caller).await];
        (now[0] != before[0] && now[1] != before[1]).then_some(())
    })
    .await;
    // New certificates alone end no connection.
    says(&mut tunnel, b"still there").await.expect("an answer over the same tunnel");
    assert!(!made_before[0].is_disjoint(&connected_to(inbound[0])), "HTTP goes on over the same connection");

    // The old root may go only when nobody shows a leaf of it and everybody holds the new one; until then it is refused.
    eventually("the old root can be dropped", Duration::from_secs(90), || async {
        let drop = mesh.finish(["certs", "rotate", "--drop-old", "--dir", ca]);
        if !drop.status.success() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        drop.status.success().then_some(())
    })
    .await;
    // What rests on it ends: the tunnel in order, between two questions, and what HTTP has made new connections for.
    let end = tokio::time::timeout(START, tunnel.read(&mut [0])).await.expect("the tunnel ends");
    assert_eq!(end.expect("an orderly end"), 0);
    for (listener, before) in inbound.iter().zip(&made_before) {
        eventually("no connection of before is left", START, || async {
            before.is_disjoint(&connected_to(*listener)).then_some(())
        })
        .await;
    }
    answers(50).await;
    load.stop().await.assert_none_failed(100);
    eventually("an answer over a new tunnel", START, || async {
        let mut tunnel = TcpStream::connect(loopback(local)).await.ok()?;
        says(&mut tunnel, b"hello again").await.ok()
    })
    .await;

    // And a newcomer, who knows only the new root, calls and is called.
    let answer = mesh.caller("newcomer").first_answer("http://server/").await;
    assert_eq!(answer.text(), "tied\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_died_is_waited_for_by_name_and_can_be_left_behind() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("tied\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let mut dead = mesh.caller("dead");
    let mut stopped = mesh.caller("stopped");
    for sidecar in [&dead, &stopped] {
        sidecar.first_answer("http://server/").await;
    }
    stopped.process.stop();
    dead.process.kill();
    let ca = mesh.ca().display().to_string();
    mesh.finish(["certs", "rotate", "--dir", &ca]).ok();
    let drop = |more: &[&str]| mesh.finish([&["certs", "rotate", "--drop-old", "--dir", &ca], more].concat());
    let said = eventually("nobody but the dead one needs the old root", Duration::from_secs(90), || async {
        let said = drop(&[]);
        assert_eq!(said.status.code(), Some(1), "{}", said.stdout);
        // That the dead one's connection has ended is noticed a moment after its death.
        let alone = said.stderr.contains("1 of 2 proxies") && said.stderr.contains("nobody has heard of it for");
        alone.then_some(said.stderr)
    })
    .await;
    // One that said goodbye is not waited for; of one that did not, nobody can know whether it comes back.
    assert!(said.contains("sa/dead"), "{said}");
    assert!(said.contains("--leave-behind") && !said.contains("sa/stopped"), "{said}");
    assert_eq!(drop(&["--leave-behind", "1h"]).status.code(), Some(1), "it is not silent for so long");
    eventually("it has been silent for a second and is left behind", START, || async {
        drop(&["--leave-behind", "1s"]).status.success().then_some(())
    })
    .await;
    let roots = || async { server.page("/certs").await.json()["roots"].as_array().map_or(0, Vec::len) };
    eventually("the old root is gone", START, || async { (roots().await == 1).then_some(()) }).await;
    mesh.caller("newcomer").first_answer("http://server/").await;
}
