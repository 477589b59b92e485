//! Two machines made of network namespaces, and what a listener on the cable between them hears.

use std::time::Duration;

use sheetbend_tests::{
    Cable, Mesh, START, assert_secret, eventually, namespaces, need, program, python, two_hosts, until,
};

#[tokio::test]
async fn two_machines_run_one_mesh_and_the_cable_between_them_carries_no_plain_text() {
    need!(namespaces());
    need!(program("tcpdump"));
    let (python, curl) = (need!(python(&[])), need!(program("curl")));
    let (left, right) = two_hosts();
    let mesh = Mesh::with_control_plane_on(&left, &[]);
    std::fs::write(mesh.folder().join("hello.txt"), "plain-text-of-the-answer\n").expect("a file to serve");
    let cable = Cable::record(&left, &left.interface(), mesh.folder());

    let folder = mesh.folder().to_str().expect("a path in UTF-8").to_string();
    let python = python.to_str().expect("a path in UTF-8").to_string();
    let server = [&python, "-m", "http.server", "8000", "--bind", "127.0.0.1", "--directory", &folder];
    let _web = mesh.run("web").port(8000).on(&right, right.v4.into()).start(server);
    let curl = curl.to_str().expect("a path in UTF-8").to_string();
    let url = "http://web/hello.txt?plain-text-of-the-request";
    let ask = || mesh.run("caller").on(&left, left.v4.into()).finish([&curl, "-sS", "--fail", url]);
    let said = until("the other machine's service answers", START, || {
        let out = ask();
        out.status.success().then_some(out.stdout)
    });
    assert_eq!(said, "plain-text-of-the-answer\n");

    let texts = ["plain-text-of-the-answer", "plain-text-of-the-request", "GET /", "HTTP/1.1"];
    assert_secret(&cable.stop(), &texts);
}

#[tokio::test]
async fn a_pulled_cable_is_an_answer_and_the_service_returns_with_it() {
    need!(namespaces());
    let (python, curl) = (need!(python(&[])), need!(program("curl")));
    let (left, right) = two_hosts();
    let mesh = Mesh::with_control_plane_on(&left, &[]);
    let text = |path: &std::path::Path| path.to_str().expect("a path in UTF-8").to_string();
    let (python, curl) = (text(&python), text(&curl));
    let server = [&python, "-m", "http.server", "8000", "--bind", "127.0.0.1"];
    let _web = mesh.run("web").port(8000).on(&right, right.v4.into()).start(server);
    let caller = mesh.run("caller").on(&left, left.v4.into()).caller();
    let proxy = format!("http://{}", caller.proxy());
    let ask = || {
        let mut command = left.command(&curl);
        command.args(["-sS", "-o", "/dev/null", "-w", "%{http_code}", "-m", "20", "-x", &proxy, "http://web/"]);
        sheetbend_tests::finish(command, Duration::from_secs(30)).stdout
    };
    until("the other machine's service answers", START, || (ask() == "200").then_some(()));
    right.cable(false);
    until("a pulled cable ends in an answer", 2 * START, || ask().starts_with('5').then_some(()));
    right.cable(true);
    eventually("the service is back with the cable", 2 * START, || async { (ask() == "200").then_some(()) }).await;
}
