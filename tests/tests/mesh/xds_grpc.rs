//! gRPC's own xDS client, driven by our control plane: no proxy on its side.

use std::path::Path;
use std::process::Command;

use sheetbend_tests::{Mesh, Process, START, eventually, free_port, need, python};

/// A server, or a client that calls `xds:///TARGET` until it has been told to stop, and says what came of each call.
const PROGRAM: &str = r#"
import sys, time
from concurrent import futures
import grpc, grpc.experimental

def serve(port, name):
    def say(request, context):
        return name.encode() + b" heard " + request
    handler = grpc.method_handlers_generic_handler("t.Echo", {"Say": grpc.unary_unary_rpc_method_handler(say)})
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    assert server.add_insecure_port("127.0.0.1:" + port)
    server.start()
    print("serving", flush=True)
    server.wait_for_termination()

def call(target):
    # By mutual TLS where the control plane says so and there are certificates, in plain otherwise.
    credentials = grpc.xds_channel_credentials(grpc.experimental.insecure_channel_credentials())
    channel = grpc.secure_channel("xds:///" + target, credentials)
    say = channel.unary_unary("/t.Echo/Say")
    for n in range(100000):
        try:
            print(n, say(b"me", timeout=25).decode(), flush=True)
        except grpc.RpcError as error:
            print(n, error.code(), error.details(), flush=True)
        time.sleep(0.1)

if sys.argv[1] == "serve":
    serve(sys.argv[2], sys.argv[3])
else:
    call(sys.argv[2])
"#;

/// A Service with its endpoints, as an operator writes them down.
fn write_endpoints(folder: &Path, ports: &[u16]) {
    let mut text = String::from(
        "apiVersion: v1\nkind: Service\nmetadata: {name: echo}\nspec: {ports: [{name: grpc, port: 50051}]}\n",
    );
    for port in ports {
        text += &format!(
            "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: echo-{port}, labels: {{kubernetes.io/service-name: echo}}}}\n\
             addressType: IPv4\nports: [{{name: grpc, port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n"
        );
    }
    // Written beside and renamed, as a careful editor does.
    std::fs::write(folder.join("echo.new"), text).unwrap();
    std::fs::rename(folder.join("echo.new"), folder.join("echo.yaml")).unwrap();
}

/// The program, with a certificate of `edge` for talking to the control plane and to its peers.
fn program(mesh: &Mesh, python: &Path, arguments: &[&str]) -> Command {
    let certificate = mesh.certificate("edge", &["--service", "edge"]);
    let file = |name: &str| certificate.join(name).display().to_string();
    let files = serde_json::json!({
        "ca_certificate_file": file("bundle.pem"),
        "certificate_file": file("cert.pem"),
        "private_key_file": file("key.pem"),
    });
    let bootstrap = serde_json::json!({
        "xds_servers": [{
            "server_uri": mesh.control_plane_address().to_string(),
            "channel_creds": [{"type": "tls", "config": files}],
            "server_features": ["xds_v3"],
        }],
        "certificate_providers": { "files": { "plugin_name": "file_watcher", "config": files } },
        "node": { "id": "grpc-1", "metadata": { "sheetbend.io/certificate-provider": "files" } },
    });
    let mut command = Command::new(python);
    command.args(["-c", PROGRAM]).args(arguments).env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap.to_string());
    command.env_remove("http_proxy").env_remove("https_proxy").env_remove("grpc_proxy");
    command
}

fn serve(mesh: &Mesh, python: &Path, port: u16, name: &str) -> Process {
    let command = program(mesh, python, &["serve", &port.to_string(), name]);
    let mut server = Process::spawn(name, mesh.folder(), command);
    server.wait_for("serving", START);
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_s_own_client_calls_a_strict_sidecar_by_mutual_tls_and_follows_its_endpoints() {
    let python = need!(python(&["grpc"]));
    let mesh = Mesh::with_control_plane(&[]);
    let port = free_port();
    let _server = serve(&mesh, &python, port, "one");
    // Two sidecars before one server are two endpoints of its service.
    let sidecar = || mesh.run("echo").flag(&["--strict", "--port", &format!("{port}/grpc")]).serve();
    let mut first = sidecar();
    let mut caller =
        Process::spawn("caller", mesh.folder(), program(&mesh, &python, &["call", &format!("echo:{port}")]));
    caller.wait_for("one heard me", START);
    let edge = eventually("the edge is on the mesh's graph", START, || async {
        mesh.edges().await.into_iter().find(|edge| edge.is("edge", "echo", "grpc") && edge.requests > 0)
    })
    .await;
    assert!(edge.mtls, "{edge:?}");

    // Another takes over: calls reach it, and none fails when the first leaves in peace.
    let mut second = sidecar();
    let served = async || {
        let edges = second.edges().await;
        edges.iter().filter(|edge| edge.is("edge", "echo", "grpc")).map(|edge| edge.requests).sum::<u64>()
    };
    let calls_reach_it = async |after: u64| {
        eventually("calls reach the second one", START, || async { (served().await > after).then_some(()) }).await;
    };
    calls_reach_it(0).await;
    first.process.stop();
    calls_reach_it(served().await + 20).await;
    assert!(!caller.stdout().contains("StatusCode"), "no call failed while it moved: {}", caller.told());
    second.process.stop();
    caller.wait_for("StatusCode.UNAVAILABLE", START);
}

#[test]
fn grpc_s_own_client_follows_our_control_plane() {
    let python = need!(python(&["grpc"]));
    let resources = tempfile::tempdir().unwrap();
    let (first, second) = (free_port(), free_port());
    write_endpoints(resources.path(), &[first]);
    let mesh = Mesh::with_control_plane(&["--resources", resources.path().to_str().unwrap()]);
    let _servers = [(first, "one"), (second, "two")].map(|(port, name)| serve(&mesh, &python, port, name));

    let mut caller = Process::spawn("caller", mesh.folder(), program(&mesh, &python, &["call", "echo:50051"]));
    caller.wait_for("one heard me", START);
    assert!(!caller.stdout().contains("two heard me"), "{}", caller.told());
    write_endpoints(resources.path(), &[second]);
    caller.wait_for("two heard me", START);
    assert!(!caller.stdout().contains("StatusCode"), "no call failed while it moved: {}", caller.told());
    write_endpoints(resources.path(), &[]);
    caller.wait_for("StatusCode.UNAVAILABLE", START);
}
