//! What happens when something is missing, on a cable between two machines with a listener on it: whatever it is, the
//! app's plain text is not what goes over the cable.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Ca, Csr, IssueRequest, KeyAndCsr};
use sheetbend_tests::{
    Cable, Finished, Host, Mesh, Process, START, assert_secret, binary, finish, namespaces, need, program, python,
    two_hosts, until,
};

/// What the app says, and what it is asked.
const SECRETS: [&str; 4] = ["plain-text-of-the-answer", "plain-text-of-the-request", "GET /", "Host:"];
const PATH: &str = "hello.txt?plain-text-of-the-request";

/// From now on a sidecar of `service` has an identity on disk that ends after `ttl`.
fn keep_identity(mesh: &Mesh, service: &str, ttl: Duration, directory: &Path) {
    let ca = Ca::open(&mesh.ca(), SystemTime::now()).expect("the CA");
    let key = KeyAndCsr::generate().expect("a key");
    let id = format!("spiffe://cluster.local/ns/default/sa/{service}").parse().expect("an id");
    let request = IssueRequest { ttl, ..IssueRequest::new(id, Csr::parse(key.csr_der()).expect("a request")) };
    let issued = ca.issue(&request, SystemTime::now()).expect("a certificate");
    let kept = serde_json::json!({
        "key": key.key_pem(), "chain": issued.chain_pem(), "bundle": issued.bundle.to_pem(),
    });
    std::fs::create_dir_all(directory).expect("a folder");
    std::fs::write(directory.join("identity.json"), kept.to_string()).expect("the identity is written");
}

/// A sidecar by itself on a host, with an identity that ends after `ttl`, an app on port 9000 and an explicit listener on
/// port 3128.
fn short_lived(mesh: &Mesh, host: &Host, ttl: Duration) -> Process {
    let identity = mesh.folder().join("identity");
    let token = mesh.folder().join("token");
    std::fs::write(&token, mesh.token("short")).expect("the token is written");
    keep_identity(mesh, "short", ttl, &identity);
    let mut command = host.command(binary("sheetbend-proxy"));
    command.args(["--control-plane", &format!("https://{}", mesh.control_plane_address()), "--token-file"]).arg(token);
    command.arg("--identity-dir").arg(identity).args(["--advertise", &host.v4.to_string(), "--port", "9000"]);
    command.args(["--inbound", &format!("{}:15106", host.v4), "--app", "127.0.0.1", "--explicit", "127.0.0.1:3128"]);
    let mut process = Process::spawn("short", mesh.folder(), command);
    process.wait_for("ready", START);
    process
}

/// A GET by way of a sidecar's explicit listener; the status is the last line.
fn ask(host: &Host, curl: &Path, proxy: &str, url: &str) -> Finished {
    let mut command = host.command(curl);
    command.args(["-sS", "-m", "20", "-w", "\\n%{http_code}", "-x", &format!("http://{proxy}"), url]);
    finish(command, Duration::from_secs(30))
}

#[track_caller]
fn assert_refused(said: &Finished, status: &str) {
    let last = said.stdout.lines().last().unwrap_or_default();
    assert!(last.starts_with(status), "{}{}", said.stdout, said.stderr);
    assert!(!said.stdout.contains("plain-text-of-the-answer"), "{}", said.stdout);
}

#[tokio::test]
async fn whatever_is_missing_the_cable_carries_no_plain_text() {
    need!(namespaces());
    need!(program("tcpdump"));
    let (python, curl, openssl) = (need!(python(&[])), need!(program("curl")), need!(program("openssl")));
    let (left, right) = two_hosts();
    let mut mesh = Mesh::with_control_plane_on(&left, &[]);
    std::fs::write(mesh.folder().join("hello.txt"), "plain-text-of-the-answer\n").expect("a file to serve");
    let folder = mesh.folder().to_str().expect("a path in UTF-8").to_string();
    let serve = |host: &Host, address: &str, port: u16| -> Command {
        let mut command = host.command(&python);
        command.args(["-m", "http.server", &port.to_string(), "--bind", address, "--directory", &folder]);
        command
    };
    let cable = Cable::record(&left, &left.interface(), mesh.folder());
    let _app = Process::spawn("short-app", mesh.folder(), serve(&left, "127.0.0.1", 9000));
    let _web_app = Process::spawn("web-app", mesh.folder(), serve(&right, "127.0.0.1", 8000));
    let mut web = mesh.run("web").port(8000).on(&right, right.v4.into()).serve();
    let left_caller = mesh.run("caller").on(&left, left.v4.into()).caller();
    let right_caller = mesh.run("caller").on(&right, right.v4.into()).caller();
    let (near, far) = (left_caller.proxy().to_string(), right_caller.proxy().to_string());
    let (web_url, short_url) = (format!("http://web/{PATH}"), format!("http://short:9000/{PATH}"));
    let answers = |host: &Host, proxy: &str, url: &str| {
        until(&format!("{url} answers by way of {proxy}"), START, || {
            ask(host, &curl, proxy, url).stdout.contains("plain-text-of-the-answer").then_some(())
        });
    };
    answers(&left, &near, &web_url);
    // Last: it would renew its certificate after two thirds of its life, were the control plane still there by then.
    let short = short_lived(&mesh, &left, Duration::from_secs(60));
    answers(&left, "127.0.0.1:3128", &web_url);
    answers(&right, &far, &short_url);

    // The control plane: what is known goes on, what is not is no answer, and a newcomer starts nothing.
    mesh.kill_control_plane();
    let newcomer = Process::spawn("newcomer", mesh.folder(), {
        mesh.run("newcomer").on(&left, left.v4.into()).command(["sh", "-c", "echo the program runs"])
    });
    assert!(ask(&left, &curl, &near, &web_url).stdout.contains("plain-text-of-the-answer"));
    let unknown = ask(&left, &curl, &near, &format!("http://other.default.svc.cluster.local/{PATH}"));
    assert_refused(&unknown, "503");

    // One's own certificate, expired: it neither sends nor takes anything, also over connections that it has, and says
    // since when.
    let said = until("its certificate has ended", Duration::from_secs(120), || {
        let said = ask(&left, &curl, "127.0.0.1:3128", &web_url);
        said.stdout.contains("expired at").then_some(said)
    });
    assert_refused(&said, "503");
    assert_refused(&ask(&right, &curl, &far, &short_url), "50");
    until("it has said so", START, || short.stderr().contains("own certificate has expired").then_some(()));
    assert!(ask(&left, &curl, &near, &web_url).stdout.contains("plain-text-of-the-answer"), "others go on");

    // TLS towards a meshed endpoint: somebody in plain has taken its port.
    let inbound = web.inbound().port();
    web.process.kill();
    let mut impostor = Process::spawn("impostor", mesh.folder(), serve(&right, &right.v4.to_string(), inbound));
    assert_refused(&until_taken(&left, &curl, &near, &web_url), "50");
    impostor.kill();

    // The peer's root: now somebody of another CA has. Both roots are named.
    let (ca, stranger) = (format!("{folder}/other-ca"), format!("{folder}/stranger"));
    mesh.finish(["certs", "init", "--dir", &ca]).ok();
    mesh.finish(["certs", "issue", "--dir", &ca, "--service", "web", "--out", &stranger]).ok();
    let mut command = right.command(&openssl);
    command.args(["s_server", "-quiet", "-www", "-alpn", "sheetbend/h2,sheetbend/http1.1", "-accept"]);
    command.args([&format!("{}:{inbound}", right.v4), "-cert", &format!("{stranger}/cert.pem")]);
    command.args(["-cert_chain", &format!("{stranger}/cert.pem"), "-key", &format!("{stranger}/key.pem")]);
    let _impostor = Process::spawn("other-root", mesh.folder(), command);
    let said = until("the other root is refused", START, || {
        let said = ask(&left, &curl, &near, &web_url);
        assert_refused(&said, "50");
        said.stdout.contains("is not in our bundle").then_some(said.stdout)
    });
    for ca in [mesh.ca().to_str().expect("UTF-8"), &ca] {
        let shown = mesh.finish(["certs", "inspect", &format!("{ca}/bundle.pem")]).ok();
        let name = shown.lines().next().and_then(|line| line.rsplit(' ').next()).expect("the root's name");
        assert!(said.contains(name), "{name}: {said}");
    }

    // A certificate of one's own, yet: the newcomer has given up, and its program never ran.
    let mut newcomer = newcomer;
    let status = newcomer.wait(Duration::from_secs(60));
    assert_eq!(
        (status.code(), newcomer.stdout().contains("the program runs")),
        (Some(1), false),
        "{}",
        newcomer.told()
    );
    assert_secret(&cable.stop(), &SECRETS);
}

/// Asks until the answer shows that somebody was met at the endpoint's address who is not the endpoint.
fn until_taken(host: &Host, curl: &Path, proxy: &str, url: &str) -> Finished {
    until("the impostor is met", START, || {
        let said = ask(host, curl, proxy, url);
        assert_refused(&said, "50");
        said.stdout.contains("TLS handshake").then_some(said)
    })
}
