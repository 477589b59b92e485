//! Pods whose traffic is redirected: the app knows nothing of the mesh, and its neighbours' sidecars meet each other.

use std::net::IpAddr;

use sheetbend_tests::{
    Cable, Edge, Finished, Host, Mesh, Pod, START, assert_secret, finish, lines_on, need, pods, program, two_pods,
    until,
};

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

/// Waits until a pod's sidecar shows an edge with mutual TLS.
fn shows_edge(pod: &Pod<'_>, source: &str, destination: &str, protocol: &str) {
    until(&format!("a {protocol} edge from {source} to {destination} with mutual TLS"), START, || {
        pod.edges().into_iter().find(|edge| edge.is(source, destination, protocol) && edge.mtls)
    });
}

/// Waits until a counter of a pod's sidecar is as high as this.
fn counts(pod: &Pod<'_>, name: &str, labels: &[&str], least: f64) {
    let what = format!("{name}{labels:?} reaches {least}");
    until(&what, START, || (pod.counter(name, labels) >= least).then_some(()));
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
            let (line, heard) = ("plain-text-of-the-client", "heard: plain-text-of-the-client\n");
            caller.until_hears(to, 2500, true, line, &format!("plain-text-of-the-greeting\n{heard}"));
            caller.until_hears(to, 7000, false, line, heard);
        }

        assert_secret(&cable.stop(), &["plain-text", "GET /", "HTTP/1.1"]);
        for pod in [&caller, &web] {
            for protocol in ["http", "tcp"] {
                shows_edge(pod, "caller", "web", protocol);
            }
            // By the service's port, at both ends, though the app has another one.
            until("an edge by the service's port", START, || {
                pod.edges().into_iter().find(|edge| edge.json["port"] == 80)
            });
        }
    }
}

#[test]
fn a_pod_with_two_addresses_is_called_over_mutual_tls_by_either() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let caller = mesh.pod("caller", &left).start();
    let both = ["--advertise", "10.77.0.2,fd77::2", "--port", "8000", "--strict"];
    let web = mesh.pod("web", &right).flag(&both).start();
    let _app = web.http("::", 8000);
    for ip in right.addresses() {
        assert!(caller.first_answer(&[&url(ip, 8000, "/")]).contains(&format!("{ip} on ")), "{ip}");
    }
    assert!(caller.edges().iter().all(|edge| edge.mtls), "{:#?}", caller.edges());
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
        web.until_hears(service, 2500, true, "x", "hello\nheard: x\n");
        for protocol in ["http", "tcp"] {
            shows_edge(&web, "web", "web", protocol);
        }
        counts(&web, "sheetbend_dials_total", &["self"], 2.0);
        assert_eq!(web.counter("sheetbend_dials_total", &["mesh"]), 0.0, "it never dials itself");
    }
}

#[test]
fn a_pod_whose_own_identity_may_not_call_it_is_refused_by_itself() {
    need!(pods());
    let (_left, right, node) = two_pods();
    let (mesh, (address, service)) = (mesh_on(&node, SERVICE), families(&right)[0]);
    let only = ["--allow", "spiffe://cluster.local/ns/default/sa/caller", "--port", "2500"];
    let web = mesh.pod("web", &right).port(address, 8000).flag(&only).start();
    let _apps = [web.http("0.0.0.0", 8000), web.lines("0.0.0.0", 2500, "hello")];
    let resolve = format!("web:80:{service}");
    let status = || web.curl(&["--resolve", &resolve, "-o", "/dev/null", "-w", "%{http_code}", "http://web/"]).stdout;
    until("it is refused by its own rules", START, || {
        let status = status();
        assert_ne!(status, "200");
        (status == "403").then_some(())
    });
    let said = web.listens_then_says(service, 2500, "x");
    assert!(!said.status.success() && !said.stdout.contains("hello"), "{said:?}");
    counts(&web, "sheetbend_refused_total", &["not_allowed"], 2.0);
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
        caller.until_hears(address, 2500, true, "x", "hello\nheard: x\n");
        let private = url(address, 8001, "/");
        until("the private one is refused", START, || {
            let refused = caller.curl(&["-i", &private]).stdout;
            assert!(!refused.contains("plain-text-of-the-answer"), "{refused}");
            (refused.starts_with("HTTP/1.1 502") && refused.contains("refused")).then_some(())
        });
        let said = caller.listens_then_says(address, 2501, "x");
        assert!(!said.stdout.contains("private"), "{said:?}");
        // Beside it, within the pod, it is there.
        let own = url(loopback.parse::<IpAddr>().expect("an address"), 8001, "/");
        assert!(web.curl(&[&own]).ok().starts_with("plain-text-of-the-answer"));
        drop(apps);
    }
}

#[test]
fn a_proxy_told_to_dial_itself_answers_508_and_nothing_goes_round() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, &looping(&left));
    let caller = mesh.pod("caller", &left).port(left.v4.into(), 8000).flag(&["--explicit", "127.0.0.1:15102"]).start();
    let peer = mesh.pod("peer", &right).start();
    let _app = caller.http("0.0.0.0", 8000);
    let told = |who: &dyn Fn(&[&str]) -> Finished, args: &[&str]| {
        let said = who(&[&["-i", "-m", "20"], args].concat()).ok();
        assert!(said.starts_with("HTTP/1.1 508") && said.contains("error=proxy_loop_detected"), "{args:?}: {said}");
        said
    };
    let (own, other) = (|args: &[&str]| caller.curl(args), |args: &[&str]| peer.curl(args));
    let outside = |args: &[&str]| {
        let mut curl = node.command("curl");
        curl.arg("-sS").args(args);
        finish(curl, START)
    };
    // Its listeners, asked directly: from the pod itself, from another one, and from outside the mesh.
    for ip in left.addresses().into_iter().chain(["127.0.0.1", "::1"].map(|ip| ip.parse().expect("an address"))) {
        for port in [15101, 15106] {
            told(&own, &[&url(ip, port, "/")]);
        }
    }
    let said = told(&own, &["http://127.0.0.1:15101/"]);
    assert!(said.contains("takes redirected connections only"), "{said}");
    for ip in left.addresses() {
        for port in [15101, 15106] {
            told(&other, &[&url(ip, port, "/")]);
            told(&outside, &[&url(ip, port, "/")]);
        }
    }
    // Endpoints that an operator wrote, each a listener of this very proxy.
    until("the service is known", START, || {
        let said = caller.curl(&["-o", "/dev/null", "-w", "%{http_code}", "http://10.96.0.20/"]);
        (said.stdout == "508").then_some(())
    });
    for service in ["http://10.96.0.20/", "http://10.96.0.21/"] {
        told(&own, &[service]);
    }
    // Clients that name the proxy as their proxy, and then as what they want; by address and by a name for it.
    let explicit = ["-x", "http://127.0.0.1:15102"];
    for target in ["127.0.0.1:15102", "localhost:15102", "10.77.0.1:15101", "127.0.0.1:15100"] {
        told(&own, &[&explicit[..], &[&format!("http://{target}/")]].concat());
    }
    told(&own, &["http://127.0.0.1:15102/"]);
    let tunnel = caller.curl(&[&explicit[..], &["-p", "http://127.0.0.1:15102/"]].concat());
    assert!(!tunnel.status.success() && tunnel.stderr.contains("508"), "{tunnel:?}");
    // What cannot be told why is closed at once.
    for port in [15101, 15106] {
        let said = caller.listens_then_says(left.v4.into(), port, "x");
        assert!(said.stdout.is_empty(), "{said:?}");
    }
    counts(&caller, "sheetbend_refused_total", &["loop"], 10.0);
    counts(&caller, "sheetbend_refused_total", &["not_redirected"], 4.0);
    assert!(caller.counter("sheetbend_dials_total", &["external"]) <= 2.0, "nothing went round");
}

/// Services whose only endpoint is a listener of the proxy on `host`: inbound, outbound.
fn looping(host: &Host) -> String {
    let ip = host.v4;
    let service = |(number, port): (u8, u16)| {
        format!(
            r#"---
apiVersion: v1
kind: Service
metadata: {{name: loop{number}}}
spec: {{clusterIP: 10.96.0.{number}, ports: [{{port: 80, targetPort: {port}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: loop{number}, labels: {{kubernetes.io/service-name: loop{number}}}}}
addressType: IPv4
ports: [{{port: {port}}}]
endpoints: [{{addresses: ["{ip}"]}}]
"#
        )
    };
    [(20, 15106), (21, 15101)].map(service).concat()
}

#[test]
fn a_plain_client_from_outside_is_served_under_permissive_and_refused_under_strict_but_for_what_is_excluded() {
    need!(pods());
    let (_left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let get = |url: &str| {
        let mut curl = node.command("curl");
        curl.args(["-sS", "-m", "20", url]);
        finish(curl, START)
    };
    let ask = |ip: IpAddr, port: u16| get(&url(ip, port, "/"));
    for (flags, permissive) in [(&[][..], true), (&["--strict"], false)] {
        let probes = ["--exclude-inbound-ports", "8081"];
        let web = mesh.pod("web", &right).port(right.v4.into(), 8000).flag(flags).intercept(&probes).start();
        let _apps = [web.http("::", 8000), web.http("::", 8081)];
        for ip in right.addresses() {
            let said = ask(ip, 8000);
            match permissive {
                true => assert!(said.ok().starts_with("plain-text-of-the-answer"), "{ip}"),
                false => assert!(!said.status.success() && said.stdout.is_empty(), "{ip}: {said:?}"),
            }
            assert!(ask(ip, 8081).ok().starts_with("plain-text-of-the-answer"), "a probe of {ip}");
            assert_eq!(get(&url(ip, 15120, "/ready")).ok(), "ready\n");
            assert!(get(&url(ip, 15120, "/metrics")).ok().contains("sheetbend_connections_total"));
            assert!(!get(&url(ip, 15120, "/config_dump")).ok().contains("known"), "that is for this host alone");
            assert!(!ask(ip, 15100).status.success(), "the admin port is on loopback");
        }
        let refused = if permissive { 0.0 } else { 2.0 };
        counts(&web, "sheetbend_refused_total", &["plain"], refused);
        assert_eq!(web.counter("sheetbend_refused_total", &["plain"]), refused);
        assert_eq!(web.counter("sheetbend_connections_total", &["inbound"]), 2.0, "probes go past the sidecar");
    }
}

#[test]
fn what_the_app_sends_to_excluded_ports_and_ranges_goes_past_the_sidecar() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let _outside = [9000, 9001].map(|port| lines_on(&node, mesh.folder(), port, ""));
    let excluded = ["--exclude-outbound-ports", "9001", "--exclude-outbound-cidrs", "10.77.0.2/32,fd77::2/128"];
    let caller = mesh.pod("caller", &left).intercept(&excluded).start();
    let _other = lines_on(&right, mesh.folder(), 9000, "");
    let taken = || caller.counter("sheetbend_connections_total", &["outbound"]);
    for (host, port, through) in [(&node, 9000, 1.0), (&node, 9001, 0.0), (&right, 9000, 0.0)] {
        for ip in host.addresses() {
            let before = taken();
            assert_eq!(caller.says(ip, port, "word").ok(), "heard: word\n", "{ip}:{port}");
            assert_eq!(taken() - before, through, "{ip}:{port}");
        }
    }
}

#[test]
fn what_is_no_mesh_service_passes_untouched_until_the_mesh_denies_it() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let caller = mesh.pod("caller", &left).start();
    let web = mesh.pod("web", &right).port(right.v4.into(), 8000).start();
    let _app = web.http("0.0.0.0", 8000);
    let _outside = [lines_on(&node, mesh.folder(), 9000, ""), lines_on(&node, mesh.folder(), 9001, "greeting")];
    let service = ["--resolve", "web:80:10.96.0.10", "http://web/"];
    caller.first_answer(&service);
    // Byte for byte, even where it looks like HTTP that no proxy would let pass.
    let odd = "GET  /odd HTTP/1.1 ";
    for ip in node.addresses() {
        caller.until_hears(ip, 9000, false, odd, &format!("heard: {odd}\n"));
        caller.until_hears(ip, 9001, true, "x", "greeting\nheard: x\n");
    }
    until("what is outside is on the graph, as it is", START, || {
        let external = |edge: &Edge| edge.destination.starts_with("external") && edge.protocol == "tcp" && !edge.mtls;
        caller.edges().into_iter().find(external)
    });

    let policy = |policy: &str| {
        let settings = "---\napiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {name: mesh}\n";
        mesh.write_resources(&format!("{SERVICE}{settings}spec: {{outboundPolicy: {policy}}}\n"));
    };
    policy("Deny");
    let outside = url(node.v4, 9000, "/");
    let refused = until("what is outside is refused", START, || {
        let said = caller.curl(&["-i", "--http0.9", &outside]).stdout;
        said.starts_with("HTTP/1.1 502").then_some(said)
    });
    for part in ["outboundPolicy Deny", "destination_ip_prohibited", "10.77.0.3:9000"] {
        assert!(refused.contains(part), "{refused}");
    }
    for ip in node.addresses() {
        let said = caller.listens_then_says(ip, 9001, "x");
        assert!(!said.stdout.contains("greeting"), "{said:?}");
    }
    counts(&caller, "sheetbend_refused_total", &["outbound_policy"], 3.0);
    assert!(caller.curl(&service).ok().starts_with("plain-text-of-the-answer"), "the mesh itself goes on");

    policy("Allow");
    until("what is outside passes again", START, || {
        (caller.says(node.v6.into(), 9000, "x").stdout == "heard: x\n").then_some(())
    });
}

#[test]
fn requests_share_connections_to_the_app_whoever_sends_them_and_each_address_has_its_own() {
    need!(pods());
    let (left, right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let caller = mesh.pod("caller", &left).start();
    let web = mesh.pod("web", &right).port(right.v4.into(), 8000).flag(&["--workers", "1"]).start();
    let _app = web.http("::", 8000);
    caller.first_answer(&[&url(right.v4, 8000, "/")]);
    // Over mutual TLS, and from outside in plain, where each request comes on a connection of its own.
    let many = |ip: IpAddr| vec![url(ip, 8000, "/"); 20];
    let plain = |urls: Vec<String>| {
        let mut curl = node.command("curl");
        curl.args(["-sS", "-H", "Connection: close"]).args(urls);
        finish(curl, START).ok()
    };
    let meshed = |urls: Vec<String>| caller.curl(&urls.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    let before = web.counter("sheetbend_dials_total", &["app"]);
    let mut seen = Vec::new();
    for ip in right.addresses() {
        let said = meshed(many(ip)) + &plain(many(ip));
        assert_eq!(said.lines().count(), 40, "{said}");
        // The app sees each come from the address that it was meant for.
        assert!(said.lines().all(|line| line.contains(&format!("{ip} on "))), "{said}");
        let mut connections: Vec<String> =
            said.lines().filter_map(|line| Some(line.rsplit_once(' ')?.1.to_string())).collect();
        connections.dedup();
        // One is enough; a pause of this machine may cost another.
        assert!(connections.len() <= 4, "40 requests over {connections:?}");
        seen.push(connections);
    }
    assert!(seen[0].iter().all(|number| !seen[1].contains(number)), "{seen:?}");
    let dialed = web.counter("sheetbend_dials_total", &["app"]) - before;
    assert!((1.0..=8.0).contains(&dialed), "{dialed} connections to the app");
}

#[test]
fn a_proxy_that_is_caught_itself_says_so_instead_of_dialing_itself_for_ever() {
    need!(pods());
    let (left, _right, node) = two_pods();
    let mesh = mesh_on(&node, SERVICE);
    let _outside = lines_on(&node, mesh.folder(), 9000, "");
    // The control plane can be reached, so that it starts.
    let caller = mesh.pod("caller", &left).user(1600).intercept(&["--exclude-outbound-ports", "15112"]).start();
    for ip in node.addresses() {
        let said = caller.curl(&["-i", &url(ip, 9000, "/")]).ok();
        for part in ["HTTP/1.1 508", "proxy_loop_detected", "--proxy-uid", "runs as user 1600"] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
    }
    assert_eq!(caller.counter("sheetbend_dials_total", &["external"]), 2.0);
    assert_eq!(caller.counter("sheetbend_refused_total", &["loop"]), 2.0);
}
