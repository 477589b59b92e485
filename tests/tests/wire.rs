//! Two machines made of network namespaces, and what a listener on the cable between them hears.

use std::time::Duration;

use sheetbend_tests::{Host, Mesh, Process, START, eventually, namespaces, need, program, python, two_hosts, until};

/// A recording of the cable.
struct Cable {
    process: Process,
    file: std::path::PathBuf,
}

impl Cable {
    fn record(host: &Host, folder: &std::path::Path) -> Self {
        let file = folder.join("cable.pcap");
        let mut command = host.command("tcpdump");
        command.args(["-i", &host.interface(), "-U", "--immediate-mode", "-Z", "root", "-s", "0", "-w"]).arg(&file);
        let mut process = Process::spawn("tcpdump", folder, command);
        process.wait_for("listening on", START);
        Self { process, file }
    }

    /// All that went over the cable.
    fn stop(mut self) -> Vec<u8> {
        self.process.signal(rustix::process::Signal::INT);
        self.process.wait(START);
        std::fs::read(&self.file).expect("the recording")
    }
}

fn shows(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn two_machines_run_one_mesh_and_the_cable_between_them_carries_no_plain_text() {
    need!(namespaces());
    need!(program("tcpdump"));
    let (python, curl) = (need!(python(&[])), need!(program("curl")));
    let (left, right) = two_hosts();
    let mesh = Mesh::with_control_plane_on(&left, &[]);
    std::fs::write(mesh.folder().join("hello.txt"), "plain-text-of-the-answer\n").expect("a file to serve");
    let cable = Cable::record(&left, mesh.folder());

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

    let heard = cable.stop();
    assert!(heard.len() > 4096, "the cable carried something: {} bytes", heard.len());
    for text in ["plain-text-of-the-answer", "plain-text-of-the-request", "GET /", "HTTP/1.1"] {
        assert!(!shows(&heard, text), "`{text}` went over the cable");
    }
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
    until("a pulled cable ends in an answer", Duration::from_secs(60), || ask().starts_with('5').then_some(()));
    right.cable(true);
    eventually("the service is back with the cable", Duration::from_secs(60), || async {
        (ask() == "200").then_some(())
    })
    .await;
}
