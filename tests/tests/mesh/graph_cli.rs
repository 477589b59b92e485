//! `sheetbend graph` against what really runs.

use sheetbend_tests::{Mesh, START, eventually, free_port, need, python, read_edges, until, workspace};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graph_shows_a_grpc_call_of_a_client_that_knows_nothing_of_the_mesh() {
    let python = need!(python(&["grpc"])).into_os_string();
    let mesh = Mesh::local();
    let echo = workspace().join("tests/programs/grpc_echo.py").into_os_string();
    let port = free_port();
    let serve = [python.clone(), echo.clone(), "serve".into(), port.to_string().into()];
    let greeter = mesh.run("greeter").port(port).start(serve);
    mesh.run("caller").until_ok([python, echo, "call".into(), format!("greeter:{port}").into()]);

    // Without a flag: whatever of this user's runs here.
    let graph = |flags: &[&str]| {
        until("whoever is asked answers", START, || {
            let said = mesh.finish(["graph"].iter().chain(flags));
            said.status.success().then_some(said.stdout)
        })
    };
    let edges = |flags: &[&str]| read_edges(&serde_json::from_str(&graph(flags)).expect("JSON"));
    let call = until("five calls are on the graph", START, || {
        edges(&["-o", "json"]).into_iter().find(|edge| edge.is("caller", "greeter", "grpc") && edge.requests >= 5)
    });
    assert!(call.mtls, "{call:?}");
    let table = graph(&[]);
    let row = table.lines().find(|line| line.contains("greeter.default") && line.contains("caller.default"));
    assert!(row.is_some_and(|row| row.contains("grpc")), "{table}");
    let dot = graph(&["-o", "dot"]);
    assert!(dot.starts_with("digraph") && dot.contains("\"caller.default\" -> \"greeter.default"), "{dot}");
    let mermaid = graph(&["-o", "mermaid"]);
    assert!(
        (mermaid.starts_with("graph") || mermaid.starts_with("flowchart")) && mermaid.contains("greeter.default"),
        "{mermaid}"
    );

    // Several admin ports, put together.
    let quiet = mesh.caller("quiet");
    let url = |admin: std::net::SocketAddr| format!("http://{admin}");
    let (first, second) = (url(greeter.admin()), url(quiet.admin()));
    let alone = edges(&["--proxy", &second, "-o", "json"]);
    assert!(alone.is_empty(), "{alone:?}");
    eventually("quiet's own edge joins the others", START, || async {
        let _ = sheetbend_tests::http::get(quiet.proxy(), &format!("http://greeter:{port}/")).await;
        let both = edges(&["--proxy", &first, "--proxy", &second, "-o", "json"]);
        let has = |source: &str| {
            both.iter().any(|edge| edge.is(source, "greeter", "grpc") || edge.is(source, "greeter", "http"))
        };
        (has("caller") && has("quiet")).then_some(())
    })
    .await;
    let wrong = mesh.finish(["graph", "--proxy", "greeter"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
}
