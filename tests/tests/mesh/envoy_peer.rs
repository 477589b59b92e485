//! Envoy behind mutual TLS, called by a sidecar: a peer that is not ours, with a certificate of our CA.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use sheetbend_tests::http::{get, send};
use sheetbend_tests::{
    App, Mesh, Process, START, Sidecar, envoy, eventually, free_port, loopback, need, until_accepts,
};

/// An Envoy that takes mutual TLS on a port of its own, from `caller` alone, and hands it to `app`.
fn start(mesh: &Mesh, envoy: &Path, certificate: &Path, alpn: &[&str], app: SocketAddr) -> (Process, SocketAddr) {
    let file = |name: &str| serde_json::json!({ "filename": certificate.join(name) });
    let socket = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let address = loopback(free_port());
    let tls = serde_json::json!({ "name": "tls", "typed_config": {
        "@type": typed("transport_sockets.tls.v3.DownstreamTlsContext"),
        "require_client_certificate": true,
        "common_tls_context": {
            "alpn_protocols": alpn,
            "tls_certificates": [{ "certificate_chain": file("cert.pem"), "private_key": file("key.pem") }],
            "validation_context": {
                "trusted_ca": file("bundle.pem"),
                "match_typed_subject_alt_names": [{
                    "san_type": "URI",
                    "matcher": { "exact": "spiffe://cluster.local/ns/default/sa/caller" },
                }],
            },
        },
    }});
    let manager = serde_json::json!({ "name": "http", "typed_config": {
        "@type": typed("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "in",
        "codec_type": "AUTO",
        "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [{
            "match": { "prefix": "/" },
            "route": { "cluster": "app" },
            "response_headers_to_add": [{ "header": { "key": "x-spoken", "value": "%PROTOCOL%" } }],
        }]}]},
        "http_filters": [{ "name": "router", "typed_config": { "@type": typed("filters.http.router.v3.Router") } }],
    }});
    let bootstrap = serde_json::json!({ "static_resources": {
        "listeners": [{
            "name": "in",
            "address": socket(address),
            "filter_chains": [{ "transport_socket": tls, "filters": [manager] }],
        }],
        "clusters": [{ "name": "app", "type": "STATIC", "load_assignment": { "cluster_name": "app", "endpoints": [{
            "lb_endpoints": [{ "endpoint": { "address": socket(app) } }],
        }]}}],
    }});
    let name = format!("envoy-{}", address.port());
    let file = mesh.folder().join(format!("{name}.json"));
    std::fs::write(&file, bootstrap.to_string()).expect("its configuration is written");
    let mut command = Command::new(envoy);
    command.arg("-c").arg(&file).args([
        "--base-id",
        &address.port().to_string(),
        "-l",
        "warning",
        "--concurrency",
        "1",
    ]);
    let process = Process::spawn(&name, mesh.folder(), command);
    until_accepts(address, START);
    (process, address)
}

/// A Service whose one endpoint is a peer that is not ours.
fn write(folder: &Path, name: &str, at: SocketAddr) {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  \
         labels: {{kubernetes.io/service-name: {name}}}\n  annotations:\n    \
         sheetbend.io/identity: spiffe://cluster.local/ns/default/sa/{name}\n    sheetbend.io/peer: mtls\n\
         addressType: IPv4\nports: [{{name: http, port: {}}}]\nendpoints: [{{addresses: [{}]}}]\n",
        at.port(),
        at.ip()
    );
    std::fs::write(folder.join(format!("{name}.yaml")), text).expect("a resource is written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_calls_an_envoy_that_ends_mutual_tls_in_the_http_that_it_chooses() {
    let envoy = need!(envoy());
    let app = App::saying("behind Envoy").await;
    let resources = tempfile::tempdir().expect("a folder");
    let mesh = Mesh::with_control_plane(&["--resources", resources.path().to_str().expect("UTF-8")]);
    let caller = mesh.caller("caller");
    let spoken: [(&str, &[&str], &str); 4] = [
        ("chooses", &["h2", "http/1.1"], "HTTP/2"),
        ("newer", &["h2"], "HTTP/2"),
        ("older", &["http/1.1"], "HTTP/1.1"),
        ("silent", &[], "HTTP/1.1"),
    ];
    let mut running = Vec::new();
    for (name, alpn, expected) in spoken {
        let certificate = mesh.certificate(name, &["--service", name]);
        let (process, address) = start(&mesh, &envoy, &certificate, alpn, app.address);
        write(resources.path(), name, address);
        let url = format!("http://{name}/");
        let answer = caller.first_answer(&url).await;
        assert_eq!(answer.text(), "behind Envoy", "{name}");
        assert_eq!(answer.headers["x-spoken"], expected, "{name}");
        // Over connections that are kept by now, with and without a body.
        for _ in 0..10 {
            assert_eq!(get(caller.proxy(), &url).await.expect("an answer").status, 200, "{name}");
            assert_eq!(send(caller.proxy(), "POST", &url, "text").await.expect("an answer").status, 200, "{name}");
        }
        running.push((name, process));
    }
    for (name, process) in &mut running {
        assert!(process.is_alive(), "{}", process.told());
        let edge = eventually("the edge is on the graph", START, || async {
            mesh.edges().await.into_iter().find(|edge| edge.is("caller", name, "http") && edge.requests >= 21)
        })
        .await;
        assert!(edge.mtls && edge.errors == 0, "{edge:?}");
    }
}

/// Asks until it is known that the answer will not be a good one.
async fn is_refused(caller: &Sidecar, url: &str) -> String {
    let answer = eventually("an answer that is none of a missing endpoint", START, || async {
        let answer = send(caller.proxy(), "POST", url, "a secret").await.expect("an answer");
        assert!(answer.status.is_server_error(), "{}: {}", answer.status, answer.text());
        // Until the control plane has told of it, it is a name that nobody knows.
        let status = answer.headers.get("proxy-status")?.to_str().ok()?.to_string();
        (status.contains("tls") || status.contains("connection_terminated")).then_some(status)
    });
    answer.await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_an_envoy_that_is_another_nor_a_caller_that_envoy_does_not_expect_is_served() {
    let envoy = need!(envoy());
    let app = App::saying("behind Envoy").await;
    let resources = tempfile::tempdir().expect("a folder");
    let mesh = Mesh::with_control_plane(&["--resources", resources.path().to_str().expect("UTF-8")]);
    // It says that it is `web`, and has the certificate of `other`.
    let other = mesh.certificate("other", &["--service", "other"]);
    let (_impostor, address) = start(&mesh, &envoy, &other, &["h2", "http/1.1"], app.address);
    write(resources.path(), "web", address);
    let status = is_refused(&mesh.caller("caller"), "http://web/").await;
    assert!(status.contains("tls_certificate_error"), "{status}");
    // Envoy expects `caller`, and `stranger` is of this mesh, but another.
    write(resources.path(), "other", address);
    is_refused(&mesh.caller("stranger"), "http://other/").await;
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), 0, "nothing reached the program");
}
