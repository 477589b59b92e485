//! The mesh that `sheetbend run` makes by itself: one user, one machine, no file.

use sheetbend_tests::{App, Load, Mesh, START, eventually, http};

/// Waits for so many more good answers.
async fn answers(load: &Load, more: usize) {
    let enough = load.so_far().good.len() + more;
    let look = || async { (load.so_far().good.len() >= enough).then_some(()) };
    eventually(&format!("{enough} answers"), START, look).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_runs_outlive_the_one_that_served_the_mesh_and_take_in_a_fourth_under_the_same_root() {
    let mesh = Mesh::local();
    let app = App::saying("tied\n").await;
    let other = App::saying("other\n").await;
    // The first to start serves the mesh.
    let mut first = mesh.run("first").port(other.port()).serve();
    let _web = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let bundle = mesh.ca().join("bundle.pem");
    let root = std::fs::read_to_string(&bundle).expect("the mesh's roots");

    let load = Load::start(caller.proxy(), "http://web/", 4, 25.0);
    answers(&load, 50).await;
    first.process.kill();
    answers(&load, 100).await;
    let late_app = App::saying("late\n").await;
    let _late = mesh.run("late").port(late_app.port()).serve();
    let newcomer = mesh.caller("newcomer");
    for (from, to, text) in [
        (&newcomer, "web", "tied\n"),
        (&newcomer, "late", "late\n"),
        (&caller, "late", "late\n"),
        (&caller, "web", "tied\n"),
    ] {
        let answer = eventually(&format!("{} reaches {to}", from.service), START, || async {
            http::get(from.proxy(), &format!("http://{to}/")).await.ok().filter(|answer| answer.status.is_success())
        })
        .await;
        assert_eq!(answer.text(), text);
    }
    load.stop().await.assert_none_failed(100);
    assert_eq!(std::fs::read_to_string(&bundle).expect("the mesh's roots"), root, "the root is the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_is_withdrawn_before_its_program_is_told_to_stop() {
    let mesh = Mesh::local();
    let app = App::saying("tied\n").await;
    let _holder = mesh.caller("holder");
    let mut leaving = mesh.run("web").port(app.port()).serve();
    let _staying = mesh.run("web").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 4, 50.0);
    answers(&load, 200).await;
    leaving.process.stop();
    answers(&load, 200).await;
    load.stop().await.assert_none_failed(400);
}
