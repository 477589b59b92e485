//! Who may call: what an operator writes, obeyed by the sidecar beside the one who is called.

use ::http::Request;
use aws_lc_rs::hmac;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http_body_util::Full;
use sheetbend_tests::http::{self, http1};
use sheetbend_tests::{App, Mesh, START, Sidecar, eventually, free_port, loopback};

/// `defaultInboundPolicy`, as an operator writes it.
fn by_default(policy: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {{name: mesh}}\n\
         spec: {{defaultInboundPolicy: {policy}}}\n---\n"
    )
}

/// A web server that says `web`, beside a sidecar of its own.
async fn web(mesh: &Mesh) -> (App, Sidecar) {
    let app = App::saying("web\n").await;
    let sidecar = mesh.run("web").port(app.port()).serve();
    (app, sidecar)
}

/// Asks until the answer is the one that is waited for.
async fn until_answered(caller: &Sidecar, url: &str, status: u16) -> http::Answer {
    eventually(&format!("{} is answered {status} by {url}", caller.service), START, || async {
        http::get(caller.proxy(), url).await.ok().filter(|answer| answer.status == status)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_meshs_default_holds_for_the_next_request_on_a_connection_that_is_open() {
    let mesh = Mesh::with_resources(&by_default("Allow"), &[]);
    let (app, web) = web(&mesh).await;
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let mut open = http1(caller.proxy()).await.expect("a connection");
    let mut ask = async || {
        let request = Request::get("http://web/").header("host", "web").body(Full::default()).expect("a request");
        open.ready().await.expect("still open");
        let answer = http::read(open.send_request(request).await.expect("still open")).await.expect("an answer");
        (answer.status.as_u16(), answer.text())
    };
    assert_eq!(ask().await, (200, "web\n".into()));

    mesh.write_resources(&by_default("Deny"));
    let deadline = tokio::time::Instant::now() + START;
    let said = loop {
        match ask().await {
            (200, _) => assert!(tokio::time::Instant::now() < deadline, "nobody is refused"),
            refused => break refused,
        }
    };
    assert_eq!(said, (403, "sheetbend: the caller is not allowed\n".into()));
    assert!(web.counter("sheetbend_refused_total", &["authorization_policy"]).await >= 1.0);
    let seen = app.seen.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(ask().await.0, 403);
    assert_eq!(app.seen.load(std::sync::atomic::Ordering::Relaxed), seen, "the app hears nothing of it");

    // Somebody without an identity is no member of the mesh.
    mesh.write_resources(&by_default("MeshOnly"));
    until_answered(&caller, "http://web/", 200).await;
    let plain = http::get(web.inbound(), "/").await.expect("an answer");
    assert_eq!(plain.status, 403, "{}", plain.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_may_not_pass_is_reset_and_the_app_hears_nothing_of_it() {
    let mesh = Mesh::with_resources(&by_default("Deny"), &[]);
    let app = sheetbend_tests::Scripted::start(|mut line| async move { line.say("hello\n").await }).await;
    let _db = mesh.run("db").port(app.port()).serve();
    let local = free_port();
    let caller = mesh.run("caller").upstream(local, &format!("db:{}", app.port())).caller();
    let _ = caller.proxy();
    let said = eventually("the connection ends", START, || async {
        Some(sheetbend_tests::dialogue(loopback(local), "select 1\n", "hello\n").await)
    })
    .await;
    assert!(said.is_err(), "{said:?}");
    assert_eq!(app.heard(), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_requests_are_held_to_something_nothing_passes_that_only_a_lenient_server_takes_for_one() {
    let once_a_day = "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {name: web}\n\
                      spec: {targetRefs: [{group: \"\", kind: Service, name: web}], rates: [{requests: 1000, interval: 1s}]}\n";
    for (port, resources, passes) in
        [("", once_a_day, false), ("/http", "", false), ("", "", true), ("/tcp", once_a_day, true)]
    {
        let mesh = Mesh::with_resources(&format!("{}{resources}", by_default("Allow")), &[]);
        let app = sheetbend_tests::Scripted::start(|mut line| async move {
            if line.hear("web\r\n\r\n").await.is_some() {
                line.say("HTTP/1.1 200 OK\r\n\r\n").await;
            }
        })
        .await;
        let web = mesh.run("web").flag(&["--port", &format!("{}{port}", app.address.port())]).serve();
        for odd in ["GET  /x HTTP/1.1\r\nHost: web\r\n\r\n", "\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: web\r\n\r\n"] {
            let said = sheetbend_tests::dialogue(web.inbound(), odd, "HTTP/1.1 200 OK\r\n\r\n").await;
            assert_eq!(said.is_ok(), passes, "{port} {odd:?}: {said:?}");
        }
        assert_eq!(app.heard().contains("HTTP"), passes, "{port}");
        let refused = web.counter("sheetbend_refused_total", &["\"opaque\""]).await;
        assert_eq!(refused >= 2.0, !passes, "{port}");
    }
}

/// An AuthorizationPolicy of `service`.
fn authorization(name: &str, service: &str, spec: &str) -> String {
    format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         targetRefs: [{{group: \"\", kind: Service, name: {service}}}]\n{spec}---\n"
    )
}

async fn asked(caller: &Sidecar, method: &str, path: &str, headers: &[(&str, &str)]) -> http::Answer {
    let mut request = Request::builder().method(method).uri(format!("http://web{path}")).header("host", "web");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut sender = http1(caller.proxy()).await.expect("a connection");
    let sent = sender.send_request(request.body(Full::default()).expect("a request"));
    http::read(sent.await.expect("an answer")).await.expect("a whole answer")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_what_is_decided_by_policies_and_no_spelling_of_a_path_opens_a_door() {
    let callers = "  rules:\n  - from: [{source: {principals: [cluster.local/ns/default/sa/shop]}}]\n  \
                   - from: [{source: {namespaces: [default], notPrincipals: [\"*/sa/stranger\"]}}]\n    \
                   to: [{operation: {methods: [GET], paths: [/public/*]}}]\n";
    let admin = "  action: DENY\n  rules: [{to: [{operation: {paths: [/admin, /admin/*]}}]}]\n";
    let soon = "  action: DENY\n  dryRun: true\n  rules: [{to: [{operation: {paths: [/public/old]}}]}]\n";
    let watched = "  action: AUDIT\n  rules: [{to: [{operation: {methods: [DELETE]}}]}]\n";
    let policies: String = [("callers", callers), ("admin", admin), ("soon", soon), ("watched", watched)]
        .map(|(name, spec)| authorization(name, "web", spec))
        .concat();
    let mesh = Mesh::with_resources(&format!("{}{policies}", by_default("MeshOnly")), &[]);
    let (app, web) = web(&mesh).await;
    let [shop, guest, stranger] = ["shop", "guest", "stranger"].map(|name| mesh.caller(name));
    shop.first_answer("http://web/").await;

    for (caller, method, path, status) in [
        (&shop, "GET", "/", 200),
        (&shop, "POST", "/anything", 200),
        (&guest, "GET", "/public/a", 200),
        (&guest, "GET", "/", 403),
        (&guest, "POST", "/public/a", 403),
        (&guest, "GET", "/publicity", 403),
        (&stranger, "GET", "/public/a", 403),
        (&guest, "GET", "/public/old", 200),
        (&shop, "DELETE", "/a", 200),
        (&shop, "GET", "/admin", 403),
        (&shop, "GET", "/admin/users", 403),
    ] {
        let answer = asked(caller, method, path, &[]).await;
        assert_eq!(answer.status, status, "{} {method} {path}: {}", caller.service, answer.text());
    }
    let seen = || app.seen.load(std::sync::atomic::Ordering::Relaxed);
    let before = seen();
    for path in ["//admin", "/%61dmin", "/admin;v=1", "/x/../admin", "/x/%2e%2e/admin", "/admin%2fusers", "/%2561dmin"]
    {
        let answer = asked(&shop, "GET", path, &[]).await;
        assert!(matches!(answer.status.as_u16(), 400 | 403), "{path}: {}", answer.status);
    }
    assert_eq!(seen(), before, "the app hears nothing of them");

    let refused =
        asked(&shop, "POST", "/admin/Users", &[("content-type", "application/grpc"), ("te", "trailers")]).await;
    assert_eq!(refused.headers.get("grpc-status").map(|status| status.as_bytes()), Some(&b"7"[..]), "{refused:?}");
    let said = asked(&shop, "GET", "/admin", &[]).await;
    assert!(!format!("{:?}{}", said.headers, said.text()).contains("default/admin"), "{said:?}");
    eventually("the log names the policy", START, || async {
        web.process.stderr().contains("rbac_access_denied_matched_policy[default/admin#0]").then_some(())
    })
    .await;
    assert!(web.counter("sheetbend_authorization_dry_run_total", &["result=\"denied\""]).await >= 1.0);
    let would = "\"GET /public/old HTTP/2\" 200 - ";
    let why = "dry_run=\"rbac_access_denied_matched_policy[default/soon#0]\"";
    eventually("the log says what would have been", START, || async { (lines(&web, would, why) == 1).then_some(()) })
        .await;

    // Each of them, however many there are in a second, and whatever became of them.
    for (path, status) in [("/b", 200), ("/b", 200), ("/b", 200), ("/admin", 403)] {
        let answer = asked(&shop, "DELETE", path, &[]).await;
        assert_eq!(answer.status, status);
        assert!(!format!("{:?}{}", answer.headers, answer.text()).contains("watched"), "{answer:?}");
    }
    for (line, times) in [("\"DELETE /b HTTP/2\" 200 - ", 3), ("\"DELETE /admin HTTP/2\" 403 UAEX ", 1)] {
        eventually(&format!("{line} is logged {times} times"), START, || async {
            (lines(&web, line, "audit=\"default/watched#0\"") == times).then_some(())
        })
        .await;
    }
    assert_eq!(web.counter("sheetbend_authorization_audited_total", &[]).await, 5.0);
    assert_eq!(lines(&web, "\"GET ", "audit="), 0);
}

/// Lines of a sidecar's log that have both of these.
fn lines(sidecar: &Sidecar, one: &str, other: &str) -> usize {
    sidecar.process.stderr().lines().filter(|line| line.contains(one) && line.contains(other)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_lets_one_callers_connections_pass_and_resets_anothers() {
    let only_shop = "  rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/shop]}}]}]\n";
    let watched = authorization("watched", "db", "  action: AUDIT\n  rules: [{}]\n");
    let mesh = Mesh::with_resources(&format!("{}{watched}", authorization("callers", "db", only_shop)), &[]);
    let app = sheetbend_tests::Scripted::start(|mut line| async move {
        if line.hear("select 1\n").await.is_some() {
            line.say("hello\n").await;
        }
    })
    .await;
    let db = mesh.run("db").port(app.port()).serve();
    let target = format!("db:{}", app.port());
    let caller = |name: &'static str| {
        let local = free_port();
        let sidecar = mesh.run(name).upstream(local, &target).caller();
        let _ = sidecar.proxy();
        (sidecar, loopback(local))
    };
    let ((_shop, let_in), (_guest, kept_out)) = (caller("shop"), caller("guest"));
    eventually("the shop is let in", START, || async {
        sheetbend_tests::dialogue(let_in, "select 1\n", "hello\n").await.ok()
    })
    .await;
    let heard = app.heard();
    let said = sheetbend_tests::dialogue(kept_out, "select 1\n", "hello\n").await;
    assert!(said.is_err(), "{said:?}");
    assert_eq!(app.heard(), heard, "the app hears nothing of it");
    for line in ["\"TCP\" 0 - ", "\"TCP\" 0 UAEX "] {
        eventually("the log has what is audited", START, || async {
            (lines(&db, line, "audit=\"default/watched#0\"") >= 1).then_some(())
        })
        .await;
    }
}

/// Signs tokens of one issuer.
struct Issuer(Ed25519KeyPair);

impl Issuer {
    fn new() -> Self {
        Self(Ed25519KeyPair::generate().expect("a key"))
    }

    fn keys(&self) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.0.public_key());
        serde_json::json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]}).to_string()
    }

    /// A token with this header, and what is signed of it by `sign`.
    fn token(algorithm: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let claims = serde_json::json!({"iss": "login", "sub": "a", "exp": now + 3_600, "scope": "read write"});
        let part = |json: serde_json::Value| URL_SAFE_NO_PAD.encode(json.to_string());
        let message = format!("{}.{}", part(serde_json::json!({"alg": algorithm})), part(claims));
        format!("Bearer {message}.{}", URL_SAFE_NO_PAD.encode(sign(message.as_bytes())))
    }

    fn good(&self) -> String {
        Self::token("EdDSA", |message| self.0.sign(message).as_ref().to_vec())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_believed_by_the_keys_in_a_file_and_no_longer_once_it_has_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("login.jwks");
    let (first, second) = (Issuer::new(), Issuer::new());
    std::fs::write(&file, first.keys()).expect("the keys are written");
    let believes = format!(
        "apiVersion: sheetbend.io/v1alpha1\nkind: RequestAuthentication\nmetadata: {{name: tokens}}\nspec:\n  \
         targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  \
         jwtRules: [{{issuer: login, jwksFile: {}}}]\n---\n",
        file.display()
    );
    let writers = "  rules:\n  - from: [{source: {requestPrincipals: [login/*]}}]\n    \
                   when: [{key: \"request.auth.claims[scope]\", values: [write]}]\n";
    let mesh = Mesh::with_resources(&format!("{believes}{}", authorization("writers", "web", writers)), &[]);
    let (_app, _web) = web(&mesh).await;
    let caller = mesh.caller("caller");
    until_answered(&caller, "http://web/", 403).await;
    let ask = async |token: &str| asked(&caller, "GET", "/", &[("authorization", token)]).await.status.as_u16();
    assert_eq!(ask(&first.good()).await, 200);
    assert_eq!(ask(&second.good()).await, 401);
    assert_eq!(ask(&Issuer::token("none", |_| Vec::new())).await, 401);
    let public = hmac::Key::new(hmac::HMAC_SHA256, first.0.public_key().as_ref());
    let confused = Issuer::token("HS256", |message| hmac::sign(&public, message).as_ref().to_vec());
    assert_eq!(ask(&confused).await, 401);

    std::fs::write(&file, second.keys()).expect("the keys are written");
    eventually("the new key is believed", START, || async { (ask(&second.good()).await == 200).then_some(()) }).await;
    assert_eq!(ask(&first.good()).await, 401);
}
