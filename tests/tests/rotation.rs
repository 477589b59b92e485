//! New certificates and new roots under load: no request notices.

use std::time::Duration;

use sheetbend_tests::{App, Load, Mesh, START, eventually, http};

/// What a sidecar shows on `/certs`.
async fn certs(sidecar: &sheetbend_tests::Sidecar) -> String {
    sidecar.page("/certs").await.text()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_root_and_the_end_of_the_old_one_fail_no_request() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("tied\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let before = [certs(&server).await, certs(&caller).await];
    let load = Load::start(caller.proxy(), "http://server/", 4, 25.0);
    tokio::time::sleep(Duration::from_secs(1)).await;

    let ca = mesh.ca();
    let ca = ca.to_str().expect("a path in UTF-8");
    mesh.finish(["certs", "rotate", "--dir", ca]).ok();
    // Right away everybody still needs the old root, whether or not the control plane has seen the new one.
    let early = mesh.finish(["certs", "rotate", "--drop-old", "--dir", ca]);
    assert_eq!(early.status.code(), Some(1), "{}", early.stdout);
    for name in ["sa/server", "sa/caller"] {
        assert!(early.stderr.contains("the old root stays") && early.stderr.contains(name), "{}", early.stderr);
    }
    // The old root may go only when nobody shows a leaf of it and everybody holds the new one; until then it is refused.
    eventually("the old root can be dropped", Duration::from_secs(90), || async {
        let drop = mesh.finish(["certs", "rotate", "--drop-old", "--dir", ca]);
        if !drop.status.success() {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        drop.status.success().then_some(())
    })
    .await;
    eventually("both sidecars show new certificates", START, || async {
        let now = [certs(&server).await, certs(&caller).await];
        (now[0] != before[0] && now[1] != before[1]).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    load.stop().await.assert_none_failed(100);

    // And a newcomer, who knows only the new root, calls and is called.
    let newcomer = mesh.caller("newcomer");
    let answer = http::get(newcomer.proxy(), "http://server/").await.expect("an answer");
    assert_eq!(answer.text(), "tied\n");
}
