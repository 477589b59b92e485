//! Envoy, with a listener of its own, taking routes, clusters, endpoints and the trust bundle from our control plane.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sheetbend_tests::http::{get, send};
use sheetbend_tests::{App, Mesh, Process, START, envoy, eventually, free_port, loopback, need};

fn bootstrap(mesh: &Mesh, certificate: &Path, port: u16) -> String {
    let file = |name: &str| serde_json::json!({ "filename": certificate.join(name) });
    let pair = serde_json::json!({ "certificate_chain": file("cert.pem"), "private_key": file("key.pem") });
    let socket = |address: SocketAddr| serde_json::json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let over_ads = serde_json::json!({ "ads": {}, "resource_api_version": "V3" });
    let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let control = serde_json::json!({
        "name": "control",
        "type": "STATIC",
        "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": typed("upstreams.http.v3.HttpProtocolOptions"),
            "explicit_http_config": { "http2_protocol_options": {} },
        }},
        "load_assignment": { "cluster_name": "control", "endpoints": [{ "lb_endpoints": [{
            "endpoint": { "address": socket(mesh.control_plane_address()) },
        }]}]},
        "transport_socket": { "name": "tls", "typed_config": {
            "@type": typed("transport_sockets.tls.v3.UpstreamTlsContext"),
            "common_tls_context": {
                "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
                "alpn_protocols": ["h2"],
                "tls_certificates": [pair],
                "validation_context": { "trusted_ca": file("bundle.pem") },
            },
        }},
    });
    let listener = serde_json::json!({
        "name": "out",
        "address": socket(loopback(port)),
        "filter_chains": [{ "filters": [{ "name": "http", "typed_config": {
            "@type": typed("filters.network.http_connection_manager.v3.HttpConnectionManager"),
            "stat_prefix": "out",
            "rds": { "route_config_name": "mesh", "config_source": over_ads },
            "http_filters": [{ "name": "router", "typed_config": { "@type": typed("filters.http.router.v3.Router") } }],
        }}]}],
    });
    let ads = serde_json::json!({
        "api_type": "GRPC",
        "transport_api_version": "V3",
        "grpc_services": [{ "envoy_grpc": { "cluster_name": "control" } }],
    });
    serde_json::json!({
        "node": { "id": "envoy-1", "cluster": "edge" },
        "dynamic_resources": { "ads_config": ads, "cds_config": over_ads },
        "static_resources": {
            "secrets": [{ "name": "default", "tls_certificate": pair }],
            "clusters": [control],
            "listeners": [listener],
        },
    })
    .to_string()
}

fn start(mesh: &Mesh, envoy: &Path) -> (Process, SocketAddr) {
    let certificate = mesh.certificate("edge", &["--service", "edge"]);
    let port = free_port();
    let file = mesh.folder().join("envoy.json");
    std::fs::write(&file, bootstrap(mesh, &certificate, port)).unwrap();
    let mut command = Command::new(envoy);
    command.arg("-c").arg(&file).args(["--base-id", &port.to_string(), "-l", "warning", "--concurrency", "1"]);
    (Process::spawn("envoy", mesh.folder(), command), loopback(port))
}

/// Asks until the answer is what was waited for.
async fn until_says(envoy: SocketAddr, host: &str, good: impl Fn(u16, &str) -> bool + Copy) {
    let url = format!("http://{host}/");
    eventually(&format!("{host} answers through Envoy as it should"), START, || async {
        let answer = send(envoy, "GET", &url, "").await.ok()?;
        good(answer.status.as_u16(), &answer.text()).then_some(())
    })
    .await;
}

fn write_endpoints(folder: &Path, ports: &[u16]) {
    let mut text =
        String::from("apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{name: http, port: 80}]}\n");
    for port in ports {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: web-{port}, labels: {{kubernetes.io/service-name: web}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        );
    }
    std::fs::write(folder.join("web.new"), text).unwrap();
    std::fs::rename(folder.join("web.new"), folder.join("web.yaml")).unwrap();
}

#[tokio::test]
async fn envoy_follows_a_service_s_endpoints_as_they_come_and_go() {
    let envoy = need!(envoy());
    let resources = tempfile::tempdir().unwrap();
    let (one, two) = (App::saying("one").await, App::saying("two").await);
    write_endpoints(resources.path(), &[one.port()]);
    let mesh = Mesh::with_control_plane(&["--resources", resources.path().to_str().unwrap()]);
    let (_envoy, address) = start(&mesh, &envoy);
    until_says(address, "web", |status, text| status == 200 && text == "one").await;
    until_says(address, "web.default.svc.cluster.local", |_, text| text == "one").await;
    write_endpoints(resources.path(), &[two.port()]);
    until_says(address, "web", |status, text| status == 200 && text == "two").await;
    write_endpoints(resources.path(), &[]);
    until_says(address, "web", |status, _| status == 503).await;
    std::fs::remove_file(resources.path().join("web.yaml")).unwrap();
    until_says(address, "web", |status, _| status == 404).await;
}

#[tokio::test]
async fn envoy_refuses_nothing_of_what_it_is_told() {
    let envoy = need!(envoy());
    let resources = tempfile::tempdir().unwrap();
    let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: split}\nspec:\n  \
                 parentRefs: [{kind: Service, group: \"\", name: web}]\n  rules:\n  \
                 - matches: [{path: {type: PathPrefix, value: /a}, headers: [{name: x-test, value: yes}]}, \
                 {path: {type: Exact, value: /b}, method: GET}]\n    \
                 backendRefs: [{name: web, port: 80, weight: 3}, {name: gone, port: 80}]\n  \
                 - matches: [{path: {type: RegularExpression, value: '/v[0-9]+/.*'}, \
                 queryParams: [{name: q, type: RegularExpression, value: 'a+'}]}]\n    \
                 filters:\n    - {type: URLRewrite, urlRewrite: {hostname: other, path: {type: ReplaceFullPath, replaceFullPath: /x}}}\n    \
                 - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-a, value: b}], remove: [x-c]}}\n    \
                 backendRefs: [{name: web, port: 80}]\n  \
                 - matches: [{path: {type: PathPrefix, value: /old}}]\n    \
                 filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: new, statusCode: 308, \
                 path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}]\n  \
                 - timeouts: {request: 10s, backendRequest: 2s}\n    \
                 retry: {codes: [503], attempts: 2, backoff: 100ms}\n    \
                 backendRefs: [{name: web, port: 80}]\n---\n\
                 apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: web}\nspec:\n  \
                 targetRefs: [{kind: Service, group: \"\", name: web}]\n  \
                 outlierDetection: {consecutive5xxErrors: 5, interval: 5s, baseEjectionTime: 2s, successRateStdevFactor: 1900}\n  \
                 connectionPool: {tcp: {maxConnections: 100}, http: {http2MaxRequests: 200, maxRetries: 3, maxRequestsPerConnection: 10}}\n  \
                 loadBalancer: {consistentHash: {httpHeaderName: x-user}}\n  \
                 healthCheck: {interval: 1s, timeout: 1s, http: {path: /}}\n";
    let route = route.replace("value: yes", "value: \"yes\"");
    let one = App::saying("one").await;
    write_endpoints(resources.path(), &[one.port()]);
    std::fs::write(resources.path().join("route.yaml"), route).unwrap();
    let mesh = Mesh::with_control_plane(&["--resources", resources.path().to_str().unwrap()]);
    let (mut process, address) = start(&mesh, &envoy);
    until_says(address, "web", |status, _| status == 200).await;
    let dump = eventually("Envoy has one stream", START, || async {
        let dump = get(mesh.control_plane_admin(), "/config_dump").await.unwrap().json();
        (dump["streams"].as_array().unwrap().len() == 1).then_some(dump)
    })
    .await;
    for kind in dump["streams"][0]["kinds"].as_object().unwrap().values() {
        assert_eq!(kind["refused"], 0, "{dump}");
    }
    assert!(process.is_alive(), "{}", process.told());
    // What goes on without the control plane.
    let mut mesh = mesh;
    mesh.kill_control_plane();
    for _ in 0..20 {
        let answer = send(address, "GET", "http://web/", "").await.unwrap();
        assert_eq!(answer.status, 200);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_calls_a_strict_sidecar_by_mutual_tls_and_follows_its_endpoints_as_they_change_and_go() {
    let envoy = need!(envoy());
    let app = App::saying("behind mutual TLS").await;
    let mesh = Mesh::with_control_plane(&[]);
    // Two sidecars before one program are two endpoints of its service.
    let sidecar = || mesh.run("web").port(app.port()).flag(&["--strict"]).serve();
    let mut first = sidecar();
    let (_envoy, address) = start(&mesh, &envoy);
    until_says(address, "web", |status, text| status == 200 && text == "behind mutual TLS").await;
    let edge = eventually("the edge is on the mesh's graph", START, || async {
        let edges = mesh.edges().await;
        edges.into_iter().find(|edge| edge.is("edge", "web", "http") && edge.requests > 0)
    })
    .await;
    assert!(edge.mtls, "{edge:?}");

    // Another takes over, and Envoy follows: the first leaves in peace and no request fails.
    let mut second = sidecar();
    let served = |sidecar: &'_ sheetbend_tests::Sidecar| {
        let admin = sidecar.admin();
        async move {
            let graph = sheetbend_tests::edges(admin).await;
            graph.iter().filter(|edge| edge.is("edge", "web", "http")).map(|edge| edge.requests).sum::<u64>()
        }
    };
    eventually("Envoy calls the second one too", START, || async {
        send(address, "GET", "http://web/", "").await.expect("an answer");
        (served(&second).await > 0).then_some(())
    })
    .await;
    first.process.stop();
    for _ in 0..20 {
        let answer = send(address, "GET", "http://web/", "").await.expect("an answer");
        assert_eq!((answer.status.as_u16(), answer.text().as_str()), (200, "behind mutual TLS"));
    }
    eventually("the second one has served them", START, || async { (served(&second).await >= 20).then_some(()) }).await;
    second.process.stop();
    until_says(address, "web", |status, _| status == 404 || status == 503).await;
}
