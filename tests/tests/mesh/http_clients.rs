//! Programs people have, beside their sidecars, with nothing changed in them.

use std::path::PathBuf;

use sheetbend_tests::{Mesh, START, eventually, free_port, need, program, python, workspace};

fn script(name: &str) -> PathBuf {
    workspace().join("tests/programs").join(name)
}

#[tokio::test]
async fn curl_reaches_a_python_server_by_its_service_s_name_with_two_plain_runs() {
    let curl = need!(program("curl"));
    let python = need!(python(&[]));
    let mesh = Mesh::local();
    let port = free_port();
    std::fs::write(mesh.folder().join("hello.txt"), "hello from python\n").expect("a file to serve");
    let folder = mesh.folder().as_os_str().to_owned();
    let words = ["-m".into(), "http.server".into(), port.to_string().into(), "--bind".into(), "127.0.0.1".into()];
    let server = [python.clone().into_os_string()].into_iter().chain(words).chain(["--directory".into(), folder]);
    let web = mesh.run("web").port(port).start(server);

    for url in [
        "http://web/hello.txt".to_string(),
        format!("http://web:{port}/hello.txt"),
        format!("http://web.default.svc.cluster.local:{port}/hello.txt"),
    ] {
        let command = [curl.clone().into_os_string(), "-sS".into(), "--fail".into(), url.clone().into()];
        assert_eq!(mesh.run("caller").until_ok(command), "hello from python\n", "{url}");
    }
    eventually("the edge is on the graph, with mutual TLS", START, || async {
        web.edges().await.into_iter().find(|e| e.is("caller", "web", "http") && e.mtls && e.requests >= 3)
    })
    .await;
}

#[tokio::test]
async fn the_exit_status_of_run_is_its_child_s() {
    let mesh = Mesh::local();
    for code in [0, 3, 77] {
        let out = mesh.run("caller").finish(["sh", "-c", &format!("exit {code}")]);
        assert_eq!(out.status.code(), Some(code), "{out:?}");
    }
}

#[tokio::test]
async fn grpcio_makes_all_four_kinds_of_calls_under_run_and_shows_as_grpc() {
    let python = need!(python(&["grpc"])).into_os_string();
    let mesh = Mesh::local();
    let port = free_port();
    let echo = script("grpc_echo.py").into_os_string();
    let server =
        mesh.run("greeter").port(port).start([python.clone(), echo.clone(), "serve".into(), port.to_string().into()]);
    let client = [python, echo, "call".into(), format!("greeter:{port}").into()];
    let said = mesh.run("caller").until_ok(client);
    assert_eq!(
        said.lines().collect::<Vec<_>>(),
        [
            "unary hello kept",
            "0 x,1 x,2 x,3 x,4 x",
            "got 3",
            "echo one,echo two,echo three",
            "FAILED_PRECONDITION as asked",
        ]
    );
    eventually("the edge is on the graph as gRPC, with mutual TLS", START, || async {
        server.edges().await.into_iter().find(|e| e.is("caller", "greeter", "grpc") && e.mtls && e.requests >= 5)
    })
    .await;
}

#[tokio::test]
async fn a_websocket_works_under_run() {
    let python = need!(python(&["websockets"])).into_os_string();
    let mesh = Mesh::local();
    let port = free_port();
    let echo = script("websocket_echo.py").into_os_string();
    let _server =
        mesh.run("chat").port(port).start([python.clone(), echo.clone(), "serve".into(), port.to_string().into()]);
    let client = [python, echo, "call".into(), format!("ws://chat:{port}/").into()];
    assert_eq!(mesh.run("caller").until_ok(client), "one\ntwo\nTrue\n");
}
