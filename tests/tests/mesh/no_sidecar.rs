//! A client without a sidecar, with a certificate of the mesh: curl, in either HTTP.

use std::path::{Path, PathBuf};
use std::process::Command;

use sheetbend_tests::{App, Mesh, START, Sidecar, eventually, finish, need, program, until};

/// What curl hears, the status as its last line. It has our certificate, and no way to check a SPIFFE id of the server.
fn ask(curl: &Path, sidecar: &Sidecar, certificate: Option<&PathBuf>, flags: &[&str]) -> String {
    let mut command = Command::new(curl);
    command.args(["-sS", "-k", "--noproxy", "*", "-m", "30", "-w", "\n%{http_version} %{http_code}"]).args(flags);
    if let Some(folder) = certificate {
        command.arg("--cert").arg(folder.join("cert.pem")).arg("--key").arg(folder.join("key.pem"));
    }
    command.arg(format!("https://{}/", sidecar.inbound()));
    finish(command, 2 * START).stdout
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_is_served_by_its_certificate_where_tls_is_the_mesh_s_and_refused_without() {
    let curl = need!(program("curl"));
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("inside\n").await;
    let port = app.port().to_string();
    let allowed = ["--allow", "spiffe://cluster.local/ns/default/sa/edge"];
    let start = |service: &str, port: &str, flags: &[&str]| {
        let flags = [&["--port", port], flags, &allowed].concat();
        mesh.run(service).flag(&flags).serve()
    };
    let strict = start("strict", &port, &["--strict"]);
    let named = start("named", &format!("{port},tls=mesh"), &[]);
    let newer = start("newer", &format!("{port}/http2"), &["--strict"]);
    let edge = mesh.certificate("edge", &["--service", "edge"]);
    let other = mesh.certificate("other", &["--service", "other"]);
    for (sidecar, flags, expected) in [
        (&strict, &["--http1.1"][..], "inside\n\n1.1 200"),
        (&strict, &["--http2"], "inside\n\n1.1 200"), // It offers both, and every app speaks the older one.
        (&strict, &["--no-alpn"], "inside\n\n1.1 200"),
        (&named, &["--http2"], "inside\n\n1.1 200"),
        (&newer, &["--http2"], "inside\n\n2 200"),
    ] {
        // Whoever is held up for two seconds in the middle of a handshake is sent away, and has no answer.
        let what = format!("{} answers {flags:?}", sidecar.service);
        let answered = || Some(ask(&curl, sidecar, Some(&edge), flags)).filter(|said| !said.ends_with(" 000"));
        assert_eq!(until(&what, START, answered), expected, "{what}");
    }
    for service in ["strict", "named", "newer"] {
        let edge = eventually("the edge is on the graph", START, || async {
            let edges = mesh.edges().await;
            edges.into_iter().find(|found| found.source.starts_with("edge.") && found.destination.starts_with(service))
        });
        let edge = edge.await;
        assert!(edge.mtls, "{edge:?}");
    }

    app.seen.store(0, std::sync::atomic::Ordering::Relaxed);
    for sidecar in [&strict, &named, &newer] {
        until(&format!("{} refuses another", sidecar.service), START, || {
            let said = ask(&curl, sidecar, Some(&other), &[]);
            assert!(said.ends_with(" 403") || said.ends_with(" 000"), "{said}");
            said.ends_with(" 403").then_some(())
        });
        let said = ask(&curl, sidecar, None, &[]);
        assert!(said.ends_with(" 000"), "{} without a certificate: {said}", sidecar.service);
    }
    // Where nobody said that TLS is the mesh's, it is the app's own, and passes untouched to whoever may call without a
    // name: here nobody.
    let permissive = start("permissive", &port, &[]);
    let said = ask(&curl, &permissive, Some(&edge), &[]);
    assert!(said.ends_with(" 000"), "{said}");
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), 0);
}
