//! Who a sidecar does not talk to.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use rustls::version::{TLS12, TLS13};
use sheetbend_certs::{Ca, Csr, IssueRequest, KeyAndCsr};
use sheetbend_tests::{App, Impostor, Mesh, Sidecar, http, need, program, tls};

const HTTP1: &str = "sheetbend/http1.1";

/// A server beside a strict sidecar that only `caller` may call.
struct Server {
    mesh: Mesh,
    app: App,
    sidecar: Sidecar,
    sni: String,
}

impl Server {
    async fn start() -> Self {
        let mesh = Mesh::with_control_plane(&[]);
        let app = App::saying("inside\n").await;
        let allowed = ["--allow", "spiffe://cluster.local/ns/default/sa/caller", "--strict"];
        let sidecar = mesh.run("server").port(app.port()).flag(&allowed).serve();
        let sni = format!("{}.server.default.cluster.local", app.port());
        Self { mesh, app, sidecar, sni }
    }

    fn inbound(&self) -> SocketAddr {
        self.sidecar.inbound()
    }

    async fn ask(&self, identity: Option<&Path>) -> Result<String, http::Error> {
        tls::ask(self.inbound(), tls::config(identity, &[HTTP1], &[&TLS13]), &self.sni).await
    }

    /// The caller who is allowed is answered: what is refused is refused for its own sake.
    async fn answers_its_caller(&self) {
        let caller = self.mesh.certificate("caller", &["--service", "caller"]);
        let said = self.ask(Some(&caller)).await.expect("an answer");
        assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("inside\n"), "{said}");
        assert_eq!(self.app.seen.swap(0, std::sync::atomic::Ordering::Relaxed), 1);
    }

    /// No request got to the program.
    fn app_saw_nothing(&self) {
        assert_eq!(self.app.seen.load(std::sync::atomic::Ordering::Relaxed), 0, "the program was asked");
    }
}

/// A certificate of the CA in `dir` for `caller` that ends a second from now.
fn short_lived(dir: &Path, out: PathBuf) -> PathBuf {
    let ca = Ca::open(dir, SystemTime::now()).expect("the CA");
    let key = KeyAndCsr::generate().expect("a key");
    let id = "spiffe://cluster.local/ns/default/sa/caller".parse().expect("an id");
    let mut request = IssueRequest::new(id, Csr::parse(key.csr_der()).expect("a request"));
    request.ttl = Duration::from_secs(1);
    let issued = ca.issue(&request, SystemTime::now()).expect("a certificate");
    std::fs::create_dir_all(&out).expect("a folder");
    std::fs::write(out.join("cert.pem"), issued.chain_pem()).expect("the certificate is written");
    std::fs::write(out.join("key.pem"), key.key_pem()).expect("the key is written");
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_sidecar_refuses_every_caller_but_the_allowed_one() {
    let server = Server::start().await;
    server.answers_its_caller().await;

    let refused = server.ask(None).await;
    assert!(refused.is_err(), "without a certificate: {refused:?}");

    let other_ca = server.mesh.folder().join("other-ca");
    let text = |path: &Path| path.to_str().expect("a path in UTF-8").to_string();
    server.mesh.finish(["certs", "init", "--dir", &text(&other_ca)]).ok();
    let stranger = text(&server.mesh.folder().join("stranger"));
    let issue = ["certs", "issue", "--dir", &text(&other_ca), "--service", "caller", "--out", &stranger];
    server.mesh.finish(issue).ok();
    let refused = server.ask(Some(Path::new(&stranger))).await;
    assert!(refused.is_err(), "of another CA: {refused:?}");

    let expired = short_lived(&server.mesh.ca(), server.mesh.folder().join("expired"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let refused = server.ask(Some(&expired)).await;
    assert!(refused.is_err(), "expired: {refused:?}");

    let other = server.mesh.certificate("other", &["--service", "other"]);
    match server.ask(Some(&other)).await {
        Err(_) => {}
        Ok(said) => assert!(said.starts_with("HTTP/1.1 403"), "not on --allow: {said}"),
    }

    let caller = server.mesh.certificate("caller-12", &["--service", "caller"]);
    let old = tls::config(Some(&caller), &[HTTP1], &[&TLS12]);
    let refused = tls::ask(server.inbound(), old, &server.sni).await;
    assert!(refused.is_err(), "TLS 1.2: {refused:?}");

    let plain = http::get(server.inbound(), "/").await;
    match plain {
        Err(_) => {}
        Ok(answer) => assert!(!answer.status.is_success(), "in plain: {}", answer.status),
    }
    server.app_saw_nothing();
    server.answers_its_caller().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_s_client_is_refused_with_tls_1_2_and_without_a_certificate() {
    let openssl = need!(program("openssl"));
    let server = Server::start().await;
    let caller = server.mesh.certificate("caller", &["--service", "caller"]);
    let talk = |flags: &[&str]| {
        let mut command = Command::new(&openssl);
        command.args(["s_client", "-quiet", "-verify_quiet", "-connect", &server.inbound().to_string()]);
        command.args(["-servername", &server.sni, "-alpn", HTTP1]).args(flags);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.as_mut().expect("openssl runs");
        use std::io::{Read, Write};
        let mut stdin = child.stdin.take().expect("a pipe");
        let _ = stdin.write_all(b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n");
        let mut said = String::new();
        let _ = child.stdout.take().expect("a pipe").read_to_string(&mut said);
        drop(stdin);
        let _ = child.wait();
        said
    };
    let (cert, key) = (caller.join("cert.pem"), caller.join("key.pem"));
    let identity = [
        "-cert",
        cert.to_str().expect("UTF-8"),
        "-cert_chain",
        cert.to_str().expect("UTF-8"),
        "-key",
        key.to_str().expect("UTF-8"),
    ];
    let said = talk(&identity);
    assert!(said.starts_with("HTTP/1.1 200"), "with its certificate: {said}");
    let said = talk(&[]);
    assert!(!said.contains("200"), "without a certificate: {said}");
    let said = talk(&[&identity[..], &["-tls1_2"]].concat());
    assert!(!said.contains("200"), "TLS 1.2: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_of_the_mesh_that_is_not_the_one_asked_for_is_told_nothing() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("the real one\n").await;
    let mut server = mesh.run("server").port(app.port()).serve();
    let other = mesh.certificate("other", &["--service", "other"]);
    let caller = mesh.caller("caller");
    let answer = caller.first_answer("http://server/").await;
    assert_eq!(answer.text(), "the real one\n");
    // It goes without a word, and somebody with a good certificate of this mesh, but for another service, takes its port.
    let inbound = server.inbound();
    server.process.kill();
    let impostor = Impostor::with_certificate(inbound, &other).await;
    let answer = http::send(caller.proxy(), "POST", "http://server/", "a secret").await.expect("an answer");
    assert!(answer.status.is_server_error(), "{}", answer.status);
    let told = impostor.told();
    assert!(told.is_empty(), "the impostor was told {:?}", String::from_utf8_lossy(&told));
}
