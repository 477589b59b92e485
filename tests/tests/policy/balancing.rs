//! Which endpoint a request goes to, with real servers behind a real sidecar.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use sheetbend_tests::http::{Answer, http1, read};
use sheetbend_tests::{App, Load, Mesh, START, Sidecar, eventually, full};

/// A server that says its name, or 503 while it is told to.
struct Named {
    app: App,
    name: String,
    fails: Arc<AtomicBool>,
}

async fn named(name: &str) -> Named {
    let fails = Arc::<AtomicBool>::default();
    let (name, told) = (name.to_string(), Arc::clone(&fails));
    let says = name.clone();
    let app = App::start(move |_| {
        let status = if told.load(Relaxed) { 503 } else { 200 };
        let answer = Response::builder().status(status).body(full(says.clone())).expect("an answer");
        async move { answer }
    });
    Named { app: app.await, name, fails }
}

async fn all(names: &[&str]) -> Vec<Named> {
    let mut servers = Vec::new();
    for name in names {
        servers.push(named(name).await);
    }
    servers
}

/// A slice of one endpoint; `more` is added to its metadata, `place` to the endpoint.
fn slice(server: &Named, more: &str, place: &str) -> String {
    let (port, name) = (server.app.port(), &server.name);
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web-{name}, labels: {{kubernetes.io/service-name: web}}{more}}}\n\
         addressType: IPv4\nports: [{{port: {port}}}]\nendpoints: [{{addresses: [127.0.0.1]{place}}}]\n"
    )
}

fn service(balancer: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{ports: [{{port: 80}}]}}\n---\n\
         apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: web}}\nspec:\n  \
         targetRefs: [{{kind: Service, group: \"\", name: web}}]\n  loadBalancer: {balancer}\n"
    )
}

fn with_slices<'a>(balancer: &str, servers: impl IntoIterator<Item = &'a Named>) -> String {
    servers.into_iter().fold(service(balancer), |text, server| text + &slice(server, "", ""))
}

/// A GET with one more header.
async fn ask(caller: &Sidecar, header: (&str, &str)) -> Answer {
    let request = Request::get("http://web/").header("host", "web").header(header.0, header.1);
    let request = request.body(Full::<Bytes>::default()).expect("a request");
    let call = async { read(http1(caller.proxy()).await?.send_request(request).await?).await };
    tokio::time::timeout(START, call).await.expect("an answer in time").expect("an answer")
}

/// Who answers so many requests.
async fn who(caller: &Sidecar, requests: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..requests {
        *counts.entry(ask(caller, ("x-nobody", "")).await.text()).or_default() += 1;
    }
    counts
}

/// Who answers each of the users.
async fn homes(caller: &Sidecar) -> Vec<String> {
    let mut homes = Vec::new();
    for user in 0..24 {
        homes.push(ask(caller, ("x-user", &format!("user-{user}"))).await.text());
    }
    homes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_known_by_a_header_keeps_its_endpoint_also_when_another_one_goes() {
    let servers = all(&["a", "b", "c", "d"]).await;
    let balancer = "{consistentHash: {httpHeaderName: X-User}}";
    let mesh = Mesh::with_resources(&with_slices(balancer, &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let before = homes(&caller).await;
    assert!(before.iter().collect::<BTreeSet<_>>().len() >= 3, "{before:?}");
    assert_eq!(homes(&caller).await, before);

    let gone = servers.iter().position(|server| server.name == before[0]).expect("one of them");
    let left: Vec<&Named> = servers.iter().filter(|server| server.name != before[0]).collect();
    mesh.write_resources(&with_slices(balancer, left));
    let after = eventually("nobody is led to who is gone", START, || async {
        Some(homes(&caller).await).filter(|homes| homes.iter().all(|home| *home != servers[gone].name))
    })
    .await;
    for (was, is) in before.iter().zip(&after) {
        assert!(was == is || *was == servers[gone].name, "{before:?} became {after:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_cookie_is_given_one_that_leads_back_to_who_answered() {
    let servers = all(&["a", "b", "c", "d"]).await;
    let balancer = "{consistentHash: {httpCookie: {name: home, path: /, ttl: 10m}}}";
    let mesh = Mesh::with_resources(&with_slices(balancer, &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let mut homes = BTreeSet::new();
    for _ in 0..12 {
        let first = ask(&caller, ("x-nobody", "")).await;
        let set = first.headers["set-cookie"].to_str().expect("text").to_string();
        assert!(set.contains("Max-Age=600") && set.contains("Path=/") && set.contains("HttpOnly"), "{set}");
        let cookie = format!("theme=dark; {}", set.split(';').next().unwrap_or_default());
        for _ in 0..4 {
            let again = ask(&caller, ("cookie", &cookie)).await;
            assert_eq!(again.text(), first.text());
            assert!(!again.headers.contains_key("set-cookie"), "{:?}", again.headers);
        }
        homes.insert(first.text());
    }
    assert!(homes.len() >= 2, "{homes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_keeps_its_endpoint() {
    let servers = all(&["a", "b", "c", "d"]).await;
    let balancer = "{consistentHash: {useSourceIp: true}}";
    let mesh = Mesh::with_resources(&with_slices(balancer, &servers), &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    assert_eq!(who(&caller, 30).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_gets_the_share_that_its_weight_says() {
    let servers = all(&["a", "b"]).await;
    let weight = |weight| format!(", annotations: {{sheetbend.io/weight: \"{weight}\"}}");
    let resources =
        service("{simple: ROUND_ROBIN}") + &slice(&servers[0], &weight(3), "") + &slice(&servers[1], "", "");
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let counts = who(&caller, 80).await;
    // Each worker counts its own turns, and is off by a few at most.
    assert!((54..=66).contains(&counts["a"]), "{counts:?}");
}

/// Waits until all of many answers in a row come from one of `names`.
async fn becomes(caller: &Sidecar, names: &[&str]) {
    eventually(&format!("{names:?} answer alone"), START, || async {
        let counts = who(caller, 20).await;
        counts.keys().all(|name| names.contains(&name.as_str())).then_some(())
    })
    .await;
}

/// `near` come first, `far` take over when these fail, and give back when they are well.
async fn fails_over_and_back(mesh: &Mesh, flags: &[&str], servers: &[Named], near: &[&str], far: &[&str]) {
    let caller = mesh.run("caller").flag(flags).caller();
    caller.first_answer("http://web/").await;
    let counts = who(&caller, 40).await;
    assert!(counts.keys().all(|name| near.contains(&name.as_str())), "{counts:?}");

    let load = Load::start(caller.proxy(), "http://web/", 4, 25.0);
    let of_near = || servers.iter().filter(|server| near.contains(&server.name.as_str()));
    of_near().for_each(|server| server.fails.store(true, Relaxed));
    becomes(&caller, far).await;
    of_near().for_each(|server| server.fails.store(false, Relaxed));
    becomes(&caller, near).await;
    load.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ones_own_zone_comes_first_and_the_others_take_over_when_it_fails() {
    let servers = all(&["a1", "a2", "a3", "b1", "b2"]).await;
    let zoned = |server: &Named| slice(server, "", &format!(", zone: zone-{}", &server.name[..1]));
    let resources = servers.iter().fold(service("{localityLbSetting: {enabled: true}}"), |all, one| all + &zoned(one));
    let mesh = Mesh::with_resources(&resources, &[]);
    fails_over_and_back(&mesh, &["--zone", "zone-a"], &servers, &["a1", "a2", "a3"], &["b1", "b2"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_priority_is_called_when_the_first_fails_and_not_before() {
    let servers = all(&["main", "reserve"]).await;
    let priority = ", annotations: {sheetbend.io/priority: \"7\"}";
    let resources =
        service("{simple: LEAST_REQUEST}") + &slice(&servers[0], "", "") + &slice(&servers[1], priority, "");
    let mesh = Mesh::with_resources(&resources, &[]);
    fails_over_and_back(&mesh, &["--zone", "any"], &servers, &["main"], &["reserve"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_to_ten_thousand_endpoints_connects_to_those_that_are_asked_and_to_no_others() {
    // All of 127.0.0.0/8 leads here.
    let listener = tokio::net::TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], 0))).await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let accepted = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&accepted);
    let serving = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Relaxed);
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                let mut request = vec![0; 4096];
                while stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    let mut resources = service("{simple: PEAK_EWMA}");
    let _ = write!(
        resources,
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: web, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{port: {port}}}]\nendpoints:\n"
    );
    for number in 0..10_000 {
        let _ = writeln!(resources, "- {{addresses: [127.1.{}.{}]}}", number / 250, number % 250 + 1);
    }
    let mesh = Mesh::with_resources(&resources, &[]);
    let caller = mesh.caller("caller");
    caller.first_answer("http://web/").await;
    let asked = 20;
    let counts = who(&caller, asked - 1).await;
    assert_eq!(counts.values().sum::<usize>(), asked - 1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let known = caller.page("/breakers").await.json();
    assert_eq!(known["endpoints"].as_array().map(Vec::len), Some(10_000));
    // A first answer may have been asked for more than once.
    let accepted = accepted.load(Relaxed);
    assert!((1..=asked + 5).contains(&accepted), "{accepted} connections for {asked} requests");
    serving.abort();
}
