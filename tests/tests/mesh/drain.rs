//! A sidecar that is told to stop, as a pod's is at every rollout.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use sheetbend_tests::{Mesh, Process, START, Scripted, binary, dialogue, eventually, free_port, hear};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// Longer than a stopping sidecar still accepts, shorter than it waits for what was begun.
const LONG: Duration = Duration::from_secs(8);

/// A server that takes its time over everything, whatever is spoken.
async fn slow() -> Scripted {
    Scripted::start(|mut line| async move {
        while let Some(head) = line.hear("\r\n\r\n").await {
            let path = head.split(' ').nth(1).unwrap_or_default().to_string();
            if path == "/upgrade" {
                line.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: knots\r\n\r\n").await;
            }
            if path != "/" {
                tokio::time::sleep(LONG).await;
            }
            line.say(match path.as_str() {
                "/" | "/long" => "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nlate\n",
                _ => "late\n",
            })
            .await;
        }
    })
    .await
}

/// The lean sidecar by itself, in front of a program on loopback.
fn sidecar(mesh: &Mesh, app: u16) -> Process {
    let token = mesh.folder().join("server.token");
    std::fs::write(&token, mesh.token("server")).expect("the token is written");
    let mut command = Command::new(binary("sheetbend-proxy"));
    command.args(["--control-plane", &format!("https://{}", mesh.control_plane_address()), "--token-file"]).arg(token);
    command.args(["--admin", "127.0.0.1:0", "--health", "127.0.0.1:0", "--outbound", "127.0.0.1:0"]);
    command.args([
        "--inbound",
        &format!("127.0.0.1:{}", free_port()),
        "--app",
        "127.0.0.1",
        "--port",
        &app.to_string(),
    ]);
    let mut process = Process::spawn("server", mesh.folder(), command);
    process.wait_for("ready", START);
    process
}

/// Says `first` through a sidecar's explicit listener, in a tunnel where there is one to be.
async fn begin(proxy: SocketAddr, tunnel: &str, first: &str) -> TcpStream {
    let mut stream = TcpStream::connect(proxy).await.expect("a connection");
    if !tunnel.is_empty() {
        stream
            .write_all(format!("CONNECT {tunnel} HTTP/1.1\r\nHost: {tunnel}\r\n\r\n").as_bytes())
            .await
            .expect("said");
        hear(&mut stream, "\r\n\r\n").await.expect("a tunnel");
    }
    stream.write_all(first.as_bytes()).await.expect("said");
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_begun_before_a_sidecar_is_told_to_stop_is_brought_to_its_end() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = slow().await;
    let mut server = sidecar(&mesh, app.port());
    let caller = mesh.caller("caller");
    let proxy = caller.proxy();
    caller.first_answer("http://server/").await;

    let mut request = begin(proxy, "", "GET http://server/long HTTP/1.1\r\nHost: server\r\n\r\n").await;
    let upgrade = "GET http://server/upgrade HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\nUpgrade: knots\r\n\r\n";
    let mut upgrade = begin(proxy, "", upgrade).await;
    hear(&mut upgrade, "\r\n\r\n").await.expect("101");
    let mut opaque = begin(proxy, &format!("server:{}", app.port()), "\u{1}\u{2} no HTTP at all\r\n\r\n").await;
    eventually("all three are under way", START, || async {
        let heard = app.heard();
        (heard.contains("/long") && heard.contains("/upgrade") && heard.contains("no HTTP at all\r\n\r\n"))
            .then_some(())
    })
    .await;

    server.signal(Signal::TERM);
    let said = hear(&mut request, "late\n").await.expect("the answer to a request");
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    hear(&mut upgrade, "late\n").await.expect("the rest of an upgrade");
    hear(&mut opaque, "late\n").await.expect("the rest of an opaque connection");
    drop((request, upgrade, opaque));
    assert!(server.wait(2 * START).success(), "{}", server.told());
    eventually("nobody is sent there any more", START, || async {
        let ask = "GET http://server/ HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n";
        let said = dialogue(proxy, ask, "").await.expect("an answer");
        said.starts_with("HTTP/1.1 503").then_some(())
    })
    .await;
}
