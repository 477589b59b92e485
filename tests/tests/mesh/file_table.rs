//! A sidecar that has no file descriptor left.

use std::time::Duration;

use sheetbend_tests::{App, Mesh, START, eventually, http};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_table_turns_connections_away_hangs_none_and_passes() {
    sheetbend_tests::raise_file_limit();
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("well\n").await;
    let _server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.run("caller").files(100).caller();
    caller.first_answer("http://server/").await;

    // Three times what there is room for. Each is either taken or ended; none is left to wonder.
    let mut taken = Vec::new();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(caller.proxy()).await.expect("the kernel accepts for the sidecar");
        let mut byte = [0];
        if tokio::time::timeout(Duration::from_millis(30), stream.read(&mut byte)).await.is_err() {
            taken.push(stream);
        }
    }
    // Those that were still in the kernel's queue are turned away a moment later.
    eventually("the rest is turned away", START, || {
        taken.retain(|stream| !is_over(stream));
        let many = taken.len();
        async move { (many <= 100).then_some(()) }
    })
    .await;
    let ended = 300 - taken.len();
    drop(taken);

    let answer = eventually("the door is open again", START, || async {
        http::get(caller.proxy(), "http://server/").await.ok().filter(|answer| answer.status == 200)
    })
    .await;
    assert_eq!(answer.text(), "well\n");
    eventually(&format!("{ended} are counted"), START, || async {
        let counted = caller.counter("sheetbend_refused_total", &["overload"]).await;
        (counted >= ended as f64).then_some(())
    })
    .await;
}

/// Whether the other end has closed or reset.
fn is_over(stream: &TcpStream) -> bool {
    let mut byte = [0];
    match stream.try_read(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}
