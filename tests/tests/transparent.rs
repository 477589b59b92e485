//! Pods whose traffic is redirected: the app knows nothing of the mesh, and its neighbours' sidecars meet each other.

use std::net::IpAddr;

use sheetbend_tests::{Cable, Host, Mesh, START, assert_secret, need, pods, program, two_pods, until};

/// `web`, with an address of its own in both families.
const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIPs: [10.96.0.10, "fd96::10"]
  ports:
    - {name: first, port: 80, targetPort: 8000}
    - {name: greets, port: 2500, targetPort: 2500}
    - {name: bytes, port: 7000, targetPort: 7000}
"#;

/// The mesh with the control plane on `node` and these resources.
fn mesh_on(node: &Host, resources: &str) -> Mesh {
    Mesh::with_resources_on(node, resources, &["--allow-address", "fd77::/64"])
}

fn url(host: impl Into<IpAddr>, port: u16, path: &str) -> String {
    format!("http://{}{path}", std::net::SocketAddr::new(host.into(), port))
}

/// The pod's address and the service's, of one family.
fn families(web: &Host) -> [(IpAddr, IpAddr); 2] {
    let [v4, v6] = web.addresses();
    [(v4, [10, 96, 0, 10].into()), (v6, "fd96::10".parse().expect("an address"))]
}

#[test]
fn pods_call_each_other_by_name_and_by_address_and_the_cable_carries_no_plain_text() {
    need!(pods());
    need!(program("tcpdump"));
    let (left, right, node) = two_pods();
    for (address, service) in families(&right) {
        let mesh = mesh_on(&node, SERVICE);
        let caller = mesh.pod("caller", &left).start();
        let web = mesh.pod("web", &right).port(address, 8000).flag(&["--port", "2500", "--port", "7000"]).start();
        let everywhere = if address.is_ipv4() { "0.0.0.0" } else { "::" };
        let _apps = [
            web.http(everywhere, 8000),
            web.lines(everywhere, 2500, "plain-text-of-the-greeting"),
            web.lines(everywhere, 7000, ""),
        ];
        let cable = Cable::record(&node, &right.interface(), mesh.folder());

        let resolve = format!("web:80:{service}");
        let by_name = ["--resolve", &resolve, "http://web/by-name?plain-text-of-the-request"];
        assert!(caller.first_answer(&by_name).starts_with("plain-text-of-the-answer /by-name"));
        let by_address = url(address, 8000, "/by-address");
        assert!(caller.first_answer(&[&by_address]).starts_with("plain-text-of-the-answer /by-address"));
        for to in [service, address] {
            let said = caller.listens_then_says(to, 2500, "plain-text-of-the-client").ok();
            assert_eq!(said, "plain-text-of-the-greeting\nheard: plain-text-of-the-client\n", "{to}");
            assert_eq!(
                caller.says(to, 7000, "plain-text-of-the-client").ok(),
                "heard: plain-text-of-the-client\n",
                "{to}"
            );
        }

        assert_secret(&cable.stop(), &["plain-text", "GET /", "HTTP/1.1"]);
        for (edges, side) in [(caller.edges(), "the caller's"), (web.edges(), "web's")] {
            for protocol in ["http", "tcp"] {
                let edge = edges.iter().find(|edge| edge.is("caller", "web", protocol));
                assert!(edge.is_some_and(|edge| edge.mtls), "{side} {protocol} edge: {edges:#?}");
            }
        }
    }
}

#[test]
fn a_pod_that_calls_itself_through_its_service_is_served_in_process_with_its_own_identity() {
    need!(pods());
    let (_left, right, node) = two_pods();
    for (address, service) in families(&right) {
        let mesh = mesh_on(&node, SERVICE);
        let web = mesh.pod("web", &right).port(address, 8000).flag(&["--port", "2500", "--strict"]).start();
        let _apps = [web.http(&address.to_string(), 8000), web.lines(&address.to_string(), 2500, "hello")];
        let resolve = format!("web:80:{service}");
        let answer = web.first_answer(&["--resolve", &resolve, "http://web/to-myself"]);
        assert!(answer.starts_with("plain-text-of-the-answer /to-myself"), "{answer}");
        let by_address = url(address, 8000, "/to-myself-by-address");
        assert!(web.first_answer(&[&by_address]).starts_with("plain-text-of-the-answer"));
        assert_eq!(web.listens_then_says(service, 2500, "x").ok(), "hello\nheard: x\n");
        for protocol in ["http", "tcp"] {
            let edges = web.edges();
            let edge = edges.iter().find(|edge| edge.is("web", "web", protocol));
            assert!(edge.is_some_and(|edge| edge.mtls), "{protocol}: {edges:#?}");
        }
        assert!(web.counter("sheetbend_dials_total", &["self"]) >= 2.0);
        assert_eq!(web.counter("sheetbend_dials_total", &["mesh"]), 0.0, "it never dials itself");
    }
}

#[test]
fn a_pod_whose_own_identity_may_not_call_it_is_refused_by_itself() {
    need!(pods());
    let (_left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let (address, service) = families(&right)[0];
    let only = ["--allow", "spiffe://cluster.local/ns/default/sa/caller", "--port", "2500"];
    let web = mesh.pod("web", &right).port(address, 8000).flag(&only).start();
    let _apps = [web.http("0.0.0.0", 8000), web.lines("0.0.0.0", 2500, "hello")];
    let resolve = format!("web:80:{service}");
    let status = || web.curl(&["--resolve", &resolve, "-o", "/dev/null", "-w", "%{http_code}", "http://web/"]).stdout;
    until("the service is known", START, || (status() != "503").then_some(()));
    assert_eq!(status(), "403");
    let said = web.listens_then_says(service, 2500, "x");
    assert!(!said.status.success() && !said.stdout.contains("hello"), "{said:?}");
    assert!(web.counter("sheetbend_refused_total", &["not_allowed"]) >= 2.0);
}

#[test]
fn an_app_on_the_pods_address_is_reached_and_one_on_loopback_stays_private() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let caller = mesh.pod("caller", &left).start();
    for (address, loopback) in right.addresses().into_iter().zip(["127.0.0.1", "::1"]) {
        let ports = ["--port", "8001", "--port", "2500", "--port", "2501"];
        let web = mesh.pod("web", &right).port(address, 8000).flag(&ports).start();
        let apps = [
            web.http(&address.to_string(), 8000),
            web.http(loopback, 8001),
            web.lines(&address.to_string(), 2500, "hello"),
            web.lines(loopback, 2501, "private"),
        ];
        caller.first_answer(&[&url(address, 8000, "/")]);
        assert_eq!(caller.listens_then_says(address, 2500, "x").ok(), "hello\nheard: x\n");
        let private = url(address, 8001, "/");
        let refused = caller.curl(&["-i", &private]).ok();
        assert!(refused.starts_with("HTTP/1.1 502") && refused.contains("refused"), "{refused}");
        assert!(!refused.contains("plain-text-of-the-answer"), "{refused}");
        let said = caller.listens_then_says(address, 2501, "x");
        assert!(!said.stdout.contains("private"), "{said:?}");
        // Beside it, within the pod, it is there.
        let own = url(loopback.parse::<IpAddr>().expect("an address"), 8001, "/");
        assert!(web.curl(&[&own]).ok().starts_with("plain-text-of-the-answer"));
        drop(apps);
    }
}
