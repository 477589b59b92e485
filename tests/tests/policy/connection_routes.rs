//! Where connections go as a whole: TCPRoutes by weight, TLSRoutes by the server that the client names. Real servers behind
//! real sidecars.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use sheetbend_tests::http::{self, tunnel};
use sheetbend_tests::{Mesh, START, Scripted, Sidecar, eventually, hear, loopback, tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// A server that says who it is, before its client has said a word.
async fn saying(name: &'static str) -> Scripted {
    Scripted::start(move |mut line| async move {
        line.say(name).await;
        line.fall_silent().await;
        // Until the client is done, too.
        line.hear("\0").await;
    })
    .await
}

/// A Service with one endpoint on this machine, or with none.
fn service(name: &str, port: Option<u16>) -> String {
    let service =
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 5432}}]}}\n---\n");
    let slice = port.map(|port| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]}}]\n---\n"
        )
    });
    service + &slice.unwrap_or_default()
}

fn route(kind: &str, name: &str, rest: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1alpha2\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n  \
         parentRefs: [{{kind: Service, group: \"\", name: db, port: 5432}}]\n{rest}---\n"
    )
}

/// The first words of whoever answers for `db`.
async fn who(caller: &Sidecar) -> Result<String, http::Error> {
    hear(&mut tunnel(caller.proxy(), "db:5432").await?, "").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_shared_by_weight_and_a_changed_route_holds_for_the_next_one() {
    const ALL: usize = 400;
    let (old, new) = (saying("old").await, saying("new").await);
    let services = service("db", None) + &service("db-old", Some(old.port())) + &service("db-new", Some(new.port()));
    let split = |old: u32, new: u32| {
        let backends =
            format!("[{{name: db-old, port: 5432, weight: {old}}}, {{name: db-new, port: 5432, weight: {new}}}]");
        services.clone() + &route("TCPRoute", "db", &format!("  rules: [{{backendRefs: {backends}}}]\n"))
    };
    let mesh = Mesh::with_resources(&split(1, 3), &[]);
    let caller = mesh.caller("caller");
    eventually("somebody answers for db", START, || async { who(&caller).await.ok() }).await;
    let mut at_old = 0;
    for _ in 0..ALL {
        at_old += usize::from(who(&caller).await.expect("an answer") == "old");
    }
    // 100 are expected, and the standard deviation is √(400 · 0.25 · 0.75) = 8.7: seven of them are less than 61.
    assert!((39..=161).contains(&at_old), "{at_old} of {ALL}");

    mesh.write_resources(&split(0, 1));
    eventually("all go to the new one", START, || async {
        for _ in 0..20 {
            if who(&caller).await.ok()? != "new" {
                return None;
            }
        }
        Some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_backend_has_any_weight_connections_are_reset_logged_and_counted() {
    let old = saying("old").await;
    let services = service("db", Some(old.port()));
    let closed = route("TCPRoute", "db", "  rules: [{backendRefs: [{name: db, port: 5432, weight: 0}]}]\n");
    let mesh = Mesh::with_resources(&services, &[]);
    let caller = mesh.caller("caller");
    eventually("db answers while no route is there", START, || async { who(&caller).await.ok() }).await;
    let before = tunnel(caller.proxy(), "db:5432").await.expect("a connection");
    mesh.write_resources(&(services + &closed));
    let refused = eventually("db is closed", START, || async { who(&caller).await.err() }).await;
    assert!(refused.to_string().contains("reset"), "{refused}");
    // Whatever is spoken.
    let mut stream = tunnel(caller.proxy(), "db:5432").await.expect("a tunnel");
    let refused = match stream.write_all(b"GET / HTTP/1.1\r\nhost: db\r\n\r\n").await {
        Ok(()) => hear(&mut stream, "").await.expect_err("no answer").to_string(),
        // The reset came first. A socket tells of it once: whoever read now would hear a plain end.
        Err(error) => error.to_string(),
    };
    assert!(refused.contains("reset"), "{refused}");
    assert!(!refused.contains("after") || refused.ends_with("after \"\""), "something was heard before it: {refused}");
    assert!(caller.counter("sheetbend_refused_total", &["reason=\"no_route\""]).await >= 2.0);
    let told = caller.process.told();
    assert!(told.contains("a connection to db:5432 goes nowhere: the rule default/db#0 ("), "{told}");
    assert!(told.contains("mesh.yaml:"), "{told}");
    // One that was open stays open.
    let mut before = before;
    assert_eq!(hear(&mut before, "").await.expect("what was said before"), "old");
}

/// A TLS server that says who it is, and keeps its certificate to itself as far as any proxy is concerned.
struct Secret {
    port: u16,
    accepting: JoinHandle<()>,
}

impl Secret {
    async fn start(name: &'static str, identity: &Path) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS12, &TLS13]);
        let chain = CertificateDer::pem_file_iter(identity.join("cert.pem")).expect("a certificate file");
        let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
        let key = PrivateKeyDer::from_pem_file(identity.join("key.pem")).expect("a key");
        let config = builder.expect("two versions").with_no_client_auth().with_single_cert(chain, key);
        let acceptor = TlsAcceptor::from(Arc::new(config.expect("a key that belongs to its certificate")));
        let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let _ = stream.write_all(name.as_bytes()).await;
                    let _ = stream.shutdown().await;
                    let _ = stream.read_to_end(&mut Vec::new()).await;
                });
            }
        });
        Self { port, accepting }
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Who answers a client of `db` that names this server in its hello.
async fn who_is(
    caller: &Sidecar,
    name: &str,
    version: &'static rustls::SupportedProtocolVersion,
) -> Result<String, http::Error> {
    let stream = tunnel(caller.proxy(), "db:5432").await?;
    let mut stream = tls::shake(stream, tls::config(None, &[], &[version]), name).await?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await?;
    Ok(said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_that_a_client_names_decides_and_its_tls_goes_through_untouched() {
    let tls_route = |name: &str, hostnames: &str, to: &str| {
        route("TLSRoute", name, &format!("  hostnames: [{hostnames}]\n  rules: [{{backendRefs: [{to}]}}]\n"))
    };
    let to = |name: &str| format!("{{name: {name}, port: 5432}}");
    let mesh = Mesh::with_resources("", &[]);
    let identity = mesh.certificate("server", &["--service", "server"]);
    let (rest, us) = (Secret::start("rest", &identity).await, Secret::start("us", &identity).await);
    let eu = Secret::start("eu", &identity).await;
    let resources = [
        service("db", None),
        service("rest", Some(rest.port)),
        service("us", Some(us.port)),
        // Behind a sidecar of its own: its TLS travels within the mesh's.
        service("eu", None).replace("port: 5432", &format!("port: 5432, targetPort: {}", eu.port)),
        tls_route("rest", "\"*.db.example\"", &to("rest")),
        tls_route("us", "\"*.us.db.example\"", &to("us")),
        tls_route("eu", "eu.db.example, eu.other.example", &to("eu")),
        tls_route("gone", "gone.db.example", &to("gone")),
    ];
    mesh.write_resources(&resources.concat());
    let _sidecar = mesh.run("eu").port(eu.port).serve();
    let caller = mesh.caller("caller");
    eventually("eu is reached", START, || async { who_is(&caller, "eu.db.example", &TLS13).await.ok() }).await;
    for version in [&TLS12, &TLS13] {
        for (name, server) in [
            ("eu.db.example", "eu"),
            ("EU.other.example", "eu"),
            ("a.us.db.example", "us"),
            ("b.a.us.db.example", "us"),
            ("us.db.example", "rest"),
            ("x.eu.db.example", "rest"),
        ] {
            assert_eq!(who_is(&caller, name, version).await.expect(name), server, "{name}");
        }
        for name in ["db.example", "other.example", "127.0.0.1", "gone.db.example"] {
            let refused = who_is(&caller, name, version).await.expect_err(name).to_string();
            assert!(refused.contains("reset") || refused.contains("eof"), "{name}: {refused}");
        }
    }
    // What is no TLS names nobody.
    let mut plain = tunnel(caller.proxy(), "db:5432").await.expect("a tunnel");
    let _ = plain.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await;
    let refused = hear(&mut plain, "").await.expect_err("no answer").to_string();
    assert!(refused.contains("reset"), "{refused}");
    let told = caller.process.told();
    assert!(told.contains("no TLSRoute takes connections to the server `db.example`"), "{told}");
    let edges = caller.edges().await;
    assert!(edges.iter().any(|edge| edge.is("caller", "eu", "tcp") && edge.mtls), "{edges:#?}");
}
