//! External services by name: a real DNS server, real servers at the addresses that it tells, and a sidecar that follows.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use ::http::{Response, StatusCode};
use rustix::process::Signal;
use sheetbend_tests::http::{self, tunnel};
use sheetbend_tests::{App, Mesh, Process, START, Sidecar, becomes, eventually, free_port, full, hear, need, program};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;

/// A DNS server on loopback that knows a file of hosts, for a second at a time.
struct Dns {
    process: Process,
    hosts: PathBuf,
    address: String,
}

impl Dns {
    fn start(mesh: &Mesh, dnsmasq: &std::path::Path, hosts: &str) -> Self {
        let file = mesh.folder().join("hosts");
        std::fs::write(&file, hosts).expect("the hosts are written");
        let port = free_port();
        let mut command = Command::new(dnsmasq);
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
        ]);
        command.args(["--listen-address=127.0.0.1", "--pid-file=", "--log-facility=-", "--local-ttl=1", "--neg-ttl=1"]);
        command.args([&format!("--port={port}"), &format!("--addn-hosts={}", file.display())]);
        if rustix::process::geteuid().is_root() {
            command.args(["--user=root", "--group=root"]);
        }
        let mut process = Process::spawn("dnsmasq", mesh.folder(), command);
        process.wait_for("read ", START);
        Self { process, hosts: file, address: format!("127.0.0.1:{port}") }
    }

    /// From now on it knows these.
    fn says(&self, hosts: &str) {
        std::fs::write(&self.hosts, hosts).expect("the hosts are written");
        self.process.signal(Signal::HUP);
    }
}

/// Servers on one port of several addresses, each of which says its own. One address is left without a server.
async fn servers(addresses: &[&str], nobody: &str) -> (u16, Vec<App>) {
    let bound = eventually("a port that is free at every address", START, || async {
        let port = free_port();
        TcpListener::bind((nobody, port)).await.ok()?;
        let mut all = Vec::new();
        for address in addresses {
            all.push(TcpListener::bind((*address, port)).await.ok()?);
        }
        Some((port, all))
    });
    let (port, listeners) = bound.await;
    let start = |listener: TcpListener| {
        let own = listener.local_addr().expect("an address").ip();
        App::on(listener, move |_| async move { Response::new(full(own.to_string())) })
    };
    (port, listeners.into_iter().map(start).collect())
}

/// The external service `api`, on port 80.
fn api(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: api}}\nspec:\n  type: ExternalName\n  \
         externalName: api.example.test\n  ports: [{{port: 80, targetPort: {port}}}]\n---\n"
    )
}

fn caller(mesh: &Mesh, dns: &Dns) -> Sidecar {
    mesh.run("caller").flag(&["--dns-server", &dns.address]).caller()
}

async fn who(caller: &Sidecar, url: &str) -> Option<String> {
    let answer = http::get(caller.proxy(), url).await.ok()?;
    answer.status.is_success().then(|| answer.text())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_whose_address_changes_is_followed_and_while_dns_is_silent_the_last_answer_holds() {
    let dnsmasq = need!(program("dnsmasq"));
    let (port, _servers) = servers(&["127.0.0.2", "127.0.0.3"], "127.0.0.4").await;
    let mesh = Mesh::with_resources(&api(port), &[]);
    let mut dns = Dns::start(&mesh, &dnsmasq, "127.0.0.2 api.example.test\n");
    let caller = caller(&mesh, &dns);
    caller.first_answer("http://api/").await;
    let own_name = format!("http://api.example.test:{port}/");
    for url in ["http://api/", "http://api.default.svc.cluster.local/", &own_name] {
        assert_eq!(who(&caller, url).await.as_deref(), Some("127.0.0.2"), "{url}");
    }
    let edges = caller.edges().await;
    assert!(edges.iter().any(|edge| edge.is("caller", "api", "http") && !edge.mtls), "{edges:#?}");

    dns.says("127.0.0.3 api.example.test\n");
    let moved = || async { who(&caller, "http://api/").await.filter(|said| said == "127.0.0.3") };
    eventually("the new address is called", START, moved).await;
    assert_eq!(who(&caller, &own_name).await.as_deref(), Some("127.0.0.3"));

    dns.process.kill();
    let silent = || async {
        // Each of them is answered, from the first that finds DNS gone.
        assert_eq!(who(&caller, "http://api/").await.as_deref(), Some("127.0.0.3"));
        let failed = caller.counter("sheetbend_dns_lookups_total", &["result=\"not_found\""]).await;
        (failed >= 2.0).then_some(())
    };
    eventually("DNS was asked again, in vain", START, silent).await;
    assert_eq!(who(&caller, &own_name).await.as_deref(), Some("127.0.0.3"));
    let told = caller.process.told();
    assert!(told.contains("a name is not found: what was known of it stays"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_name_with_several_addresses_the_one_that_fails_is_ejected() {
    let dnsmasq = need!(program("dnsmasq"));
    let (port, _servers) = servers(&["127.0.0.2", "127.0.0.3", "::1"], "127.0.0.4").await;
    let mesh = Mesh::with_resources(&api(port), &[]);
    let hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4", "::1"].map(|ip| format!("{ip} api.example.test\n")).concat();
    let dns = Dns::start(&mesh, &dnsmasq, &hosts);
    let caller = caller(&mesh, &dns);
    caller.first_answer("http://api/").await;
    let answered = Mutex::new(BTreeSet::new());
    let all = ["127.0.0.2", "127.0.0.3", "::1"];
    let is_ejected = async {
        let nobody = SocketAddr::new("127.0.0.4".parse::<IpAddr>().expect("an address"), port);
        becomes(&caller, nobody, "Ejected").await
    };
    let calls = async {
        loop {
            let said = who(&caller, "http://api/").await.expect("an answer, whoever is down");
            answered.lock().expect("no panic").insert(said);
        }
    };
    tokio::select! {
        _ = is_ejected => {}
        () = calls => {}
    }
    // However the calls fell before, every other address is one of those that are called.
    eventually("every address answers", START, || async {
        let said = who(&caller, "http://api/").await.expect("an answer");
        let mut answered = answered.lock().expect("no panic");
        answered.insert(said);
        (answered.len() == all.len()).then_some(())
    })
    .await;
    let answered = answered.lock().expect("no panic");
    assert!(answered.iter().all(|said| all.contains(&said.as_str())), "{answered:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_else_is_refused_declared_services_are_let_through() {
    let dnsmasq = need!(program("dnsmasq"));
    let (port, _servers) = servers(&["127.0.0.2"], "127.0.0.4").await;
    let deny =
        "apiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {name: mesh}\nspec: {outboundPolicy: Deny}\n";
    let mesh = Mesh::with_resources(&(api(port) + deny), &[]);
    let dns = Dns::start(&mesh, &dnsmasq, "127.0.0.2 other.example.test\n");
    let caller = caller(&mesh, &dns);
    // Nobody knows the name yet: that is said, and not remembered for long.
    let unknown = eventually("the name is asked for", START, || async {
        let answer = http::get(caller.proxy(), "http://api/").await.ok()?;
        (answer.status == StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    });
    let unknown = unknown.await.text();
    assert!(unknown.contains("api:80 (DNS knows no address of api.example.test) has no endpoint"), "{unknown}");
    dns.says("127.0.0.2 api.example.test other.example.test\n");
    caller.first_answer("http://api/").await;
    caller.first_answer(&format!("http://api.example.test:{port}/")).await;
    // What is tunnelled, too.
    let mut stream = tunnel(caller.proxy(), &format!("api.example.test:{port}")).await.expect("a tunnel");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: api\r\n\r\n").await.expect("the request is sent");
    assert!(hear(&mut stream, "127.0.0.2").await.expect("an answer").starts_with("HTTP/1.1 200 OK"));

    let other = format!("other.example.test:{port}");
    let refused = http::get(caller.proxy(), &format!("http://{other}/")).await.expect("an answer");
    assert_eq!(refused.status, StatusCode::BAD_GATEWAY);
    let (said, status) = (refused.text(), refused.headers["proxy-status"].to_str().expect("text").to_string());
    assert!(
        said.contains(&format!("{other} is not in the mesh, and outboundPolicy Deny allows nothing else")),
        "{said}"
    );
    assert!(status.starts_with("sheetbend; error=destination_ip_prohibited"), "{status}");
    assert!(caller.counter("sheetbend_refused_total", &["reason=\"outbound_policy\""]).await >= 1.0);
    let mut refused = tunnel(caller.proxy(), &other).await.expect("a tunnel");
    let _ = refused.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await;
    let error = hear(&mut refused, "").await.expect_err("no answer").to_string();
    assert!(error.contains("reset"), "{error}");
}
