//! `sheetbend run` without a control plane: a mesh of its own for this user on this machine.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sheetbend_tests::{
    Mesh, START, Sidecar, eventually, finish, free_port, http, loopback, need, program, python, until,
};
use tokio::task::JoinHandle;

/// Python's own web server in `folder`, on loopback.
fn file_server(python: &Path, port: u16, folder: &Path) -> Vec<String> {
    let (python, folder) = (python.display().to_string(), folder.display().to_string());
    let words =
        [python.as_str(), "-m", "http.server", "--bind", "127.0.0.1", "--directory", &folder, &port.to_string()];
    words.iter().map(ToString::to_string).collect()
}

/// The sidecar's explicit listener, as its program would find it in `http_proxy`.
fn outbound(sidecar: &Sidecar) -> SocketAddr {
    let state = sidecar.state();
    state["outbound"].as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no outbound in {state}"))
}

/// Nothing of what is asked is borrowed: the future outlives the words it was made of.
fn says<'a>(from: &'a Sidecar, url: &str, expected: &str) -> impl Future<Output = Option<()>> + use<'a> {
    let (url, expected) = (url.to_string(), expected.to_string());
    async move {
        let answer = http::get(outbound(from), &url).await.ok()?;
        (answer.status == 200 && answer.text().contains(&expected)).then_some(())
    }
}

fn folder_with(mesh: &Mesh, name: &str) -> std::path::PathBuf {
    let folder = mesh.folder().join(format!("files-{name}"));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("index.html"), format!("this is {name}\n")).unwrap();
    folder
}

#[test]
fn two_terminals_with_one_run_each_are_a_mesh() {
    let python = need!(python(&[]));
    let curl = need!(program("curl"));
    let mesh = Mesh::local();
    let port = free_port();
    let _web = mesh.run("web").port(port).start(file_server(&python, port, &folder_with(&mesh, "web")));
    let call = |url: &str| {
        let curl = curl.to_str().unwrap();
        mesh.run("caller").until_ok([curl, "-sS", "--fail-with-body", "--max-time", "10", url])
    };
    for url in [
        "http://web/".to_string(),
        format!("http://web:{port}/"),
        format!("http://web.default:{port}/"),
        format!("http://web.default.svc.cluster.local:{port}/"),
    ] {
        assert_eq!(call(&url), "this is web\n", "{url}");
    }
}

#[test]
fn a_local_port_leads_any_client_to_a_service() {
    let python = need!(python(&[]));
    let curl = need!(program("curl"));
    let mesh = Mesh::local();
    let (port, local) = (free_port(), free_port());
    let _web = mesh.run("web").port(port).start(file_server(&python, port, &folder_with(&mesh, "web")));
    let url = format!("http://127.0.0.1:{local}/");
    let words = [curl.to_str().unwrap(), "-sS", "--fail", "--noproxy", "*", "--max-time", "10", &url];
    assert_eq!(mesh.run("caller").upstream(local, "web").until_ok(words), "this is web\n");
}

#[test]
fn an_upstream_whose_port_is_taken_is_told_before_the_program_starts() {
    let mesh = Mesh::local();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let refused = mesh.run("caller").upstream(port, "web").finish(["echo", "started"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(refused.stdout, "");
    assert!(refused.stderr.contains(&port.to_string()), "{}", refused.stderr);
}

#[test]
fn a_program_that_others_can_reach_past_its_sidecar_is_warned_of() {
    let python = need!(python(&[]));
    let mesh = Mesh::local();
    let port = free_port();
    let words = ["-m", "http.server", "--bind", "0.0.0.0"].map(String::from);
    let words = [python.display().to_string()].into_iter().chain(words).chain([port.to_string()]);
    let mut web = mesh.run("web").port(port).start(words);
    web.process.wait_for(&format!("the program listens on 0.0.0.0:{port}"), START);
}

#[test]
fn a_port_is_registered_only_once_the_program_accepts_on_it() {
    let python = need!(python(&[]));
    let mesh = Mesh::local();
    let (port, go) = (free_port(), mesh.folder().join("go"));
    let server = file_server(&python, port, &folder_with(&mesh, "late")).join(" ");
    let script = format!("while [ ! -e {} ]; do sleep 0.02; done; exec {server}", go.display());
    let command = mesh.run("late").port(port).command(["sh", "-c", &script]);
    let _late = sheetbend_tests::Process::spawn("run-late", mesh.folder(), command);
    let caller = mesh.run("caller").caller();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        // Without an answer from whoever serves the mesh within a second, that is the reason.
        eventually("it is known that late has no endpoint", START, || async {
            let before = http::get(caller.proxy(), "http://late/").await.unwrap();
            assert_eq!(before.status, 503, "{}", before.text());
            let why = before.headers.get("proxy-status").and_then(|value| value.to_str().ok()).unwrap_or_default();
            why.contains("late:80 has no endpoint").then_some(())
        })
        .await;
        // Nobody else can have a name of this form: nothing is looked up for it.
        let whole = http::get(caller.proxy(), "http://late.default.svc.cluster.local/").await.unwrap();
        assert_eq!(whole.status, 503, "{}", whole.text());
        std::fs::write(&go, "").unwrap();
        eventually("late answers", START, || says(&caller, "http://late/", "this is late")).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mesh_outlives_the_run_that_served_it() {
    let python = need!(python(&[]));
    let mesh = Mesh::local();
    let start = |name: &str| {
        let port = free_port();
        mesh.run(name).port(port).start(file_server(&python, port, &folder_with(&mesh, name)))
    };
    let mut first = start("first");
    let (second, third) = (start("second"), start("third"));
    let all = [("first", &first), ("second", &second), ("third", &third)];
    for (from, sidecar) in all {
        for (to, _) in all.iter().filter(|(to, _)| *to != from) {
            let what = format!("{from} reaches {to}");
            eventually(&what, START, || says(sidecar, &format!("http://{to}/"), &format!("this is {to}"))).await;
        }
    }
    let root = std::fs::read(mesh.ca().join("bundle.pem")).unwrap();

    // From here on, no request between those that live may fail.
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let steady = |from: SocketAddr, url: &'static str| {
        let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let answer = http::get(from, url).await.unwrap_or_else(|e| panic!("{url}: {e}"));
                assert_eq!(answer.status, 200, "{url}: {}", answer.text());
                done.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
    };
    let steady = [steady(outbound(&second), "http://third/"), steady(outbound(&third), "http://second/")];
    first.process.kill();
    let fourth = start("fourth");
    for (from, sidecar, to) in [
        ("fourth", &fourth, "second"),
        ("fourth", &fourth, "third"),
        ("second", &second, "fourth"),
        ("third", &third, "fourth"),
    ] {
        let what = format!("{from} reaches {to}");
        eventually(&what, START, || says(sidecar, &format!("http://{to}/"), &format!("this is {to}"))).await;
    }
    let enough = || async {
        let failed = steady.iter().any(JoinHandle::is_finished);
        (failed || done.load(Ordering::Relaxed) > 20).then_some(())
    };
    eventually("there are enough requests to mean anything", START, enough).await;
    stop.store(true, Ordering::Relaxed);
    for task in steady {
        task.await.expect("no request fails");
    }
    assert_eq!(std::fs::read(mesh.ca().join("bundle.pem")).unwrap(), root, "another root");
}

#[test]
fn a_service_is_withdrawn_before_its_program_is_told_to_stop() {
    let python = need!(python(&[]));
    let mesh = Mesh::local();
    let port = free_port();
    let told = mesh.folder().join("told");
    // It serves on for as long as it is let, a minute at most, and writes down when it was told to stop.
    let script = format!(
        "trap 'echo told > {}' TERM; timeout 60 {} & while :; do wait $! && exit; kill -0 $! || exit; done",
        told.display(),
        file_server(&python, port, &folder_with(&mesh, "web")).join(" ")
    );
    let web = mesh.run("web").port(port).start(["sh", "-c", &script]);
    // Another one holds the mesh, so that it is still there to ask.
    let caller = mesh.run("caller").caller();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        eventually("web answers", START, || says(&caller, "http://web/", "this is web")).await;
        web.process.signal(rustix::process::Signal::TERM);
        until("the program is told", START, || told.exists().then_some(()));
        // A new sidecar asks afresh: there is no such service any more, although its program still runs.
        let late = mesh.run("late").caller();
        let answer = http::get(late.proxy(), "http://web/").await.unwrap();
        assert_ne!(answer.status, 200, "still registered: {}", answer.text());
    });
}

#[test]
fn a_control_plane_that_is_not_there_is_named() {
    let mesh = Mesh::local();
    let port = free_port();
    let token = mesh.folder().join("token");
    let ca = mesh.folder().join("other-ca");
    mesh.finish(["certs", "init", "--dir", ca.to_str().unwrap()]).ok();
    let made = mesh.finish(["token", "create", "--dir", ca.to_str().unwrap(), "--service", "web"]).ok();
    std::fs::write(&token, made).unwrap();
    let url = format!("https://{}", loopback(port));
    let mut command = mesh.sheetbend(["run", "--service", "web", "--control-plane", &url, "--token-file"]);
    command.arg(&token).args(["--", "echo", "started"]);
    let refused = finish(command, START);
    assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
    assert!(refused.stderr.contains(&url), "{}", refused.stderr);
}
