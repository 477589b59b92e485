//! What happens when something is missing: no row of this table fails open.

use std::time::Duration;

use rustix::process::Signal;
use sheetbend_tests::{App, Impostor, Load, Mesh, START, Sidecar, eventually, free_port, http, service};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_name_without_an_answer_is_503_after_a_second_and_never_sent_in_plain() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("never in plain\n").await;
    let server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    mesh.kill_control_plane();
    // The caller has never asked for it, and nobody can tell it now.
    let answer = http::get(caller.proxy(), "http://server.default.svc.cluster.local/").await.expect("an answer");
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(answer.headers.contains_key("proxy-status"), "{:?}", answer.headers);
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), 0);
    mesh.start_control_plane();
    eventually("the answer comes with the control plane", START, || async {
        let answer = http::get(caller.proxy(), "http://server.default.svc.cluster.local/").await.ok()?;
        answer.status.is_success().then_some(())
    })
    .await;
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_died_without_a_word_is_gone_after_its_ttl() {
    let mesh = Mesh::with_control_plane(&[]);
    // Two sidecars before one program are two endpoints of its service.
    let app = App::saying("one\n").await;
    let dying = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    caller.first_answer("http://server/").await;
    let _other = mesh.run("server").port(app.port()).serve();
    let endpoints = || async {
        let page = caller.page("/clusters").await.text();
        page.matches("127.0.0.1:").count()
    };
    eventually("the caller knows both endpoints", START, || async { (endpoints().await >= 2).then_some(()) }).await;
    let load = Load::start(caller.proxy(), "http://server/", 2, 20.0);
    eventually("the load is under way", START, || async { (load.so_far().good.len() >= 20).then_some(()) }).await;
    dying.process.signal(Signal::KILL);
    eventually("the dead endpoint is gone", START, || async { (endpoints().await < 2).then_some(()) }).await;
    load.stop().await.assert_none_failed(20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_nobody_can_connect_to_is_ejected_and_no_request_fails_for_it() {
    let (app, dead) = (App::saying("one\n").await, free_port());
    let mesh = Mesh::with_resources(&service("web", &[app.port(), dead]), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let load = Load::start(caller.proxy(), "http://web/", 2, 20.0);
    let dead = format!("127.0.0.1:{dead}");
    eventually("the dead endpoint is ejected", START, || async {
        let breakers = caller.page("/breakers").await.json();
        let one = breakers["endpoints"].as_array()?.iter().find(|one| one["endpoint"] == *dead)?;
        (one["state"] == "Ejected" && one["reason"].is_string()).then_some(())
    })
    .await;
    eventually("the load went on", START, || async { (load.so_far().good.len() >= 100).then_some(()) }).await;
    load.stop().await.assert_none_failed(100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_gets_no_certificate_starts_nothing_and_says_why() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let program = ["sh", "-c", "echo the program runs"];
    let command = mesh.run("late").command(program);
    mesh.kill_control_plane();
    let late = sheetbend_tests::finish(command, Duration::from_secs(60));
    assert_eq!(late.status.code(), Some(1), "{}", late.stderr);
    assert!(late.stderr.contains("control plane"), "{}", late.stderr);
    assert!(!late.stdout.contains("the program runs"), "the program waits for its sidecar");
    mesh.start_control_plane();
    assert_eq!(mesh.run("late").finish(program).ok(), "the program runs\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_outside_the_mesh_passes_while_the_control_plane_is_away_and_is_counted() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let outside = App::saying("outside\n").await;
    let caller = mesh.caller("caller");
    mesh.kill_control_plane();
    let url = format!("http://{}/", outside.address);
    let answer = http::get(caller.proxy(), &url).await.expect("an answer");
    assert_eq!(answer.text(), "outside\n");
    let metrics = caller.page("/metrics").await.text();
    assert!(metrics.contains("unresolved"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_leads_to_an_address_of_the_mesh_is_not_called_in_plain() {
    let app = App::saying("never in plain\n").await;
    let outside = App::saying("outside\n").await;
    let resources = tempfile::tempdir().expect("a folder");
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: ledger}}\nspec: {{clusterIP: 127.0.0.1, ports: [{{port: {}}}]}}\n",
        app.port()
    );
    std::fs::write(resources.path().join("mesh.yaml"), service).expect("the resources are written");
    let mesh = Mesh::with_control_plane(&["--resources", &resources.path().display().to_string()]);
    let caller = mesh.caller("caller");
    let get =
        async |port: u16| http::get(caller.proxy(), &format!("http://localhost:{port}/")).await.expect("an answer");
    // Without an answer from the control plane within a second it is refused as well, but not for that reason.
    eventually("it is refused as one of the mesh", START, || async {
        let refused = get(app.port()).await;
        assert!(refused.status.is_server_error(), "{}: {}", refused.status, refused.text());
        (refused.status == 502 && refused.text().contains("of the mesh")).then_some(())
    })
    .await;
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(get(outside.port()).await.text(), "outside\n", "another port of that address is nobody's");
}

/// A meshed endpoint whose port somebody else can take, and a caller that has it in mind, for as long as it takes: there is
/// no control plane any more to say that the endpoint is gone.
async fn taken_over(mesh: &mut Mesh) -> (Sidecar, std::net::SocketAddr) {
    let app = App::saying("the real one\n").await;
    let mut server = mesh.run("server").port(app.port()).serve();
    let caller = mesh.caller("caller");
    let answer = caller.first_answer("http://server/").await;
    assert_eq!(answer.text(), "the real one\n");
    let inbound = server.inbound();
    mesh.kill_control_plane();
    server.process.kill();
    (caller, inbound)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_meshed_endpoint_that_has_no_tls_is_never_spoken_to_in_plain() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let (caller, inbound) = taken_over(&mut mesh).await;
    let impostor = Impostor::in_plain(inbound).await;
    let answer = http::send(caller.proxy(), "POST", "http://server/path", "a-secret-body").await.expect("an answer");
    assert!(answer.status.is_server_error(), "{}: {}", answer.status, answer.text());
    assert!(answer.headers.contains_key("proxy-status"), "{:?}", answer.headers);
    impostor.assert_never_told(&["a-secret-body", "POST", "/path", "HTTP/"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_another_root_is_refused_and_both_roots_are_named() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let (caller, inbound) = taken_over(&mut mesh).await;
    let text = |path: std::path::PathBuf| path.to_str().expect("a path in UTF-8").to_string();
    let (other_ca, stranger) = (text(mesh.folder().join("other-ca")), text(mesh.folder().join("stranger")));
    mesh.finish(["certs", "init", "--dir", &other_ca]).ok();
    mesh.finish(["certs", "issue", "--dir", &other_ca, "--service", "server", "--out", &stranger]).ok();
    let impostor = Impostor::with_certificate(inbound, std::path::Path::new(&stranger)).await;
    let root = |ca: &str| {
        let said = mesh.finish(["certs", "inspect", &format!("{ca}/bundle.pem")]).ok();
        let at = said.find("cluster.local root ").expect("the root's name") + "cluster.local root ".len();
        said[at..].split_whitespace().next().expect("its id").to_string()
    };
    let (ours, theirs) = (root(&text(mesh.ca())), root(&other_ca));
    // The access log is written a moment after the answer; a stranger that is held up is not met in time.
    eventually(&format!("ours, {ours}, and theirs, {theirs}, are named"), START, || async {
        let sent = http::send(caller.proxy(), "POST", "http://server/path", "a-secret-body").await;
        let answer = sent.expect("an answer");
        assert!(answer.status.is_server_error(), "{}: {}", answer.status, answer.text());
        let said = caller.process.stderr();
        (said.contains(&ours) && said.contains(&theirs)).then_some(())
    })
    .await;
    assert!(impostor.told().is_empty(), "{:?}", String::from_utf8_lossy(&impostor.told()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_cannot_record_what_it_signs_signs_nothing_and_says_so() {
    let mut mesh = Mesh::with_control_plane(&[]);
    let log = mesh.ca().join("issued.log");
    let _ = std::fs::remove_file(&log);
    std::fs::create_dir(&log).expect("a folder where the log should be");
    let command = mesh.run("late").command(["sh", "-c", "echo the program runs; exec sleep 3600"]);
    let mut late = sheetbend_tests::Process::spawn("late", mesh.folder(), command);
    late.wait_for("nothing was signed", START);
    assert!(!late.stdout().contains("the program runs"), "{}", late.told());
    mesh.control_plane().wait_for("issued.log", START);
}
