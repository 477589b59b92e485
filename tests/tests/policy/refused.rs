//! Who a sidecar does not talk to.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use rustls::version::{TLS12, TLS13};
use sheetbend_certs::{Ca, Csr, IssueRequest, KeyAndCsr};
use sheetbend_tests::{
    App, Impostor, Mesh, START, Sidecar, eventually, http, need, program, tls, until, until_accepts,
};

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
        // Whoever is held up for two seconds in the middle of a handshake is sent away.
        let said = eventually("an answer", START, || async { self.ask(Some(&caller)).await.ok() }).await;
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

/// A certificate for `caller` of a CA that nobody here knows.
fn of_another_ca(mesh: &Mesh) -> PathBuf {
    let (ca, stranger) = (mesh.folder().join("other-ca"), mesh.folder().join("stranger"));
    let text = |path: &Path| path.to_str().expect("a path in UTF-8").to_string();
    mesh.finish(["certs", "init", "--dir", &text(&ca)]).ok();
    mesh.finish(["certs", "issue", "--dir", &text(&ca), "--service", "caller", "--out", &text(&stranger)]).ok();
    stranger
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_sidecar_refuses_every_caller_but_the_allowed_one() {
    let server = Server::start().await;
    server.answers_its_caller().await;

    let refused = server.ask(None).await;
    assert!(refused.is_err(), "without a certificate: {refused:?}");

    let refused = server.ask(Some(&of_another_ca(&server.mesh))).await;
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

/// What `openssl s_client` hears when it asks for `/`.
fn s_client(openssl: &Path, server: &Server, flags: &[&str]) -> String {
    let mut command = Command::new(openssl);
    command.args(["s_client", "-quiet", "-verify_quiet", "-connect", &server.inbound().to_string()]);
    command.args(["-servername", &server.sni, "-alpn", HTTP1]).args(flags);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let child = child.as_mut().expect("openssl runs");
    use std::io::{Read, Write};
    let mut stdin = child.stdin.take().expect("a pipe");
    let _ = stdin.write_all(b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n");
    let mut said = String::new();
    let _ = child.stdout.take().expect("a pipe").read_to_string(&mut said);
    drop(stdin);
    let _ = child.wait();
    said
}

/// Its flags for the certificate in a folder.
fn showing(folder: &Path) -> [String; 6] {
    let (cert, key) = (folder.join("cert.pem").display().to_string(), folder.join("key.pem").display().to_string());
    ["-cert".into(), cert.clone(), "-cert_chain".into(), cert, "-key".into(), key]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_s_client_is_refused_as_everybody_is() {
    let openssl = need!(program("openssl"));
    let server = Server::start().await;
    let mesh = &server.mesh;
    let talk = |identity: Option<&Path>, flags: &[&str]| {
        let identity = identity.map(showing).into_iter().flatten().collect::<Vec<_>>();
        let all: Vec<&str> = identity.iter().map(String::as_str).chain(flags.iter().copied()).collect();
        s_client(&openssl, &server, &all)
    };
    let caller = mesh.certificate("caller", &["--service", "caller"]);
    // Whoever is held up for two seconds in the middle of a handshake is sent away, and asks again.
    let answered = |who: &Path, status: &str| {
        until(&format!("an answer of {status}"), START, || {
            Some(talk(Some(who), &[]))
                .filter(|said| !said.is_empty())
                .map(|said| assert!(said.starts_with(status), "{said}"))
        });
    };
    answered(&caller, "HTTP/1.1 200");
    let refused = async |what: &str, who: Option<&Path>, flags: &[&str], reason: &str| {
        let label = format!("reason=\"{reason}\"");
        let count = async || server.sidecar.counter("sheetbend_refused_total", &[&label]).await;
        let before = count().await;
        eventually(&format!("{what} is counted as {label}"), START, || async {
            let said = talk(who, flags);
            assert!(!said.contains("200") && !said.contains("inside"), "{what}: {said}");
            (count().await > before).then_some(())
        })
        .await;
    };
    refused("no certificate", None, &[], "no_certificate").await;
    let stranger = of_another_ca(mesh);
    refused("another CA", Some(&stranger), &[], "certificate").await;
    let expired = short_lived(&mesh.ca(), mesh.folder().join("expired"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    refused("expired", Some(&expired), &[], "certificate").await;
    refused("TLS 1.2", Some(&caller), &["-tls1_2"], "tls_version").await;
    let other = mesh.certificate("other", &["--service", "other"]);
    // Another SPIFFE id than those on --allow.
    answered(&other, "HTTP/1.1 403");
    let not_told = server.app.seen.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(not_told, 1, "only the first request got to the program");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_root_was_dropped_is_not_resumed() {
    let openssl = need!(program("openssl"));
    let server = Server::start().await;
    let mesh = &server.mesh;
    let old = mesh.certificate("caller", &["--service", "caller"]);
    let resumed = async || server.sidecar.counter("sheetbend_tls_handshakes_total", &["kind=\"resumed\""]).await;
    // Sessions are resumed as a rule: by openssl from its file, and by code from its cache.
    let file = mesh.folder().join("session").display().to_string();
    let identity = showing(&old);
    let openssl = |flags: [&str; 2]| {
        let all: Vec<&str> = identity.iter().map(String::as_str).chain(flags).collect();
        s_client(&openssl, &server, &all)
    };
    let config = tls::config(Some(&old), &[HTTP1], &[&TLS13]);
    let ask = async || tls::ask(server.inbound(), config.clone(), &server.sni).await;
    // Whoever is held up for two seconds in the middle of a handshake is sent away, and asks again.
    let openssl_is_answered = |flags: [&str; 2]| {
        until("openssl is answered", START, || openssl(flags).starts_with("HTTP/1.1 200").then_some(()));
    };
    openssl_is_answered(["-sess_out", &file]);
    openssl_is_answered(["-sess_in", &file]);
    assert_eq!(resumed().await, 1.0, "openssl has resumed its session");
    for _ in 0..2 {
        let said = eventually("code is answered", START, || async { ask().await.ok() }).await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    }
    assert_eq!(resumed().await, 2.0, "and so has code");
    // A ticket for later.
    openssl_is_answered(["-sess_out", &file]);

    let ca = mesh.ca().display().to_string();
    mesh.finish(["certs", "rotate", "--dir", &ca]).ok();
    eventually("the old root is dropped", Duration::from_secs(90), || async {
        mesh.finish(["certs", "rotate", "--drop-old", "--dir", &ca]).status.success().then_some(())
    })
    .await;
    eventually("the sidecar believes the new root alone", START, || async {
        let certs = server.sidecar.page("/certs").await.json();
        (certs["roots"].as_array().map(Vec::len) == Some(1)).then_some(())
    })
    .await;
    let seen = server.app.seen.swap(0, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(seen, 5);
    let said = openssl(["-sess_in", &file]);
    assert!(!said.contains("200"), "{said}");
    let said = ask().await;
    assert!(said.is_err(), "{said:?}");
    server.app_saw_nothing();
    // It is the root that was refused: the same name under the new one is welcome.
    let new = mesh.certificate("caller-anew", &["--service", "caller"]);
    assert!(server.ask(Some(&new)).await.expect("an answer").starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_strangers_is_counted_whole_and_logged_sparingly() {
    const CROWD: usize = 200;
    let server = Server::start().await;
    let began = std::time::Instant::now();
    for _ in 0..CROWD {
        assert!(server.ask(None).await.is_err());
    }
    let took = began.elapsed().as_secs();
    // Whoever is held up for two seconds in the middle of a handshake is sent away for that.
    let counted = async |reasons: &[&str]| server.sidecar.counter("sheetbend_refused_total", reasons).await;
    eventually("every one is counted", START, || async { (counted(&[]).await == CROWD as f64).then_some(()) }).await;
    assert!(counted(&["reason=\"no_certificate\""]).await > CROWD as f64 / 2.0);
    let said = server.sidecar.process.stderr();
    let lines = said.lines().filter(|line| line.contains("a TLS handshake failed")).count() as u64;
    assert!((1..=took + 2).contains(&lines), "{lines} lines in {took} s: {said}");
    server.answers_its_caller().await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strict_sidecar_takes_no_plain_text_for_a_port_whose_tls_is_the_app_s_either() {
    let mesh = Mesh::with_control_plane(&[]);
    let app = App::saying("inside\n").await;
    let port = format!("{}/tls", app.port());
    let strict = mesh.run("server").flag(&["--strict", "--port", &port]).serve();
    until_accepts(strict.inbound(), START);
    let said = http::send(strict.inbound(), "GET", "/", "").await;
    assert!(said.is_err(), "{said:?}");
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), 0, "the program was asked");
    eventually("it is counted", START, || async {
        (strict.counter("sheetbend_refused_total", &["plain"]).await >= 1.0).then_some(())
    })
    .await;
}
