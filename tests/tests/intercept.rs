//! `sheetbend intercept`, in network namespaces of its own: what is caught, what passes, and what is left behind.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};

use sheetbend_proxy::listen::{self, Listener, original_destination};
use sheetbend_tests::{Host, START, binary, namespaces, need, program, root, two_hosts, until};
use tokio::runtime::Runtime;
use tokio::time::timeout;

const BACKENDS: [&str; 2] = ["nft", "iptables"];
const OUTBOUND: u16 = 15101;
const INBOUND: u16 = 15106;
const PROXY: u32 = 1515;

#[test]
fn both_tools_install_check_and_remove_and_leave_nothing() {
    need!(namespaces());
    need!(program("nft"));
    need!(program("iptables"));
    for backend in BACKENDS {
        let (host, _peer) = two_hosts();
        let before = rules(&host);
        assert_fails(&intercept(&host, &["check"]), 1, "no rules of Sheetbend");

        succeeds(&intercept(&host, &["install", "--backend", backend]));
        let installed = rules(&host);
        assert_ne!(before, installed);
        let checked = succeeds(&intercept(&host, &["check"]));
        for family in ["IPv4", "IPv6"] {
            assert!(checked.contains(&format!("outbound {family}: caught, on its way to")), "{checked}");
        }

        // Again, as an init container that is restarted does.
        succeeds(&intercept(&host, &["install", "--backend", backend]));
        assert_eq!(rules(&host), installed);
        succeeds(&intercept(&host, &["remove"]));
        assert!(!rules(&host).to_lowercase().contains("sheetbend"), "{}", rules(&host));
        assert!(reaches(&host, (host.v4, listener(&host, 0)).into()), "nothing is caught any more");
        let again = intercept(&host, &["remove"]);
        succeeds(&again);
        assert!(text(&again.stderr).contains("there were no rules"));
    }
}

#[test]
fn an_install_with_the_other_tool_takes_the_place_of_the_first() {
    need!(namespaces());
    need!(program("nft"));
    need!(program("iptables"));
    let (host, _peer) = two_hosts();
    for backend in ["iptables", "nft", "iptables"] {
        succeeds(&intercept(&host, &["install", "--backend", backend]));
        let checked = succeeds(&intercept(&host, &["check"]));
        assert!(checked.contains(if backend == "nft" { "nftables" } else { "iptables" }), "{checked}");
    }
    assert!(!rules(&host).contains("table inet sheetbend"), "{}", rules(&host));
}

#[test]
fn what_print_shows_is_what_install_does() {
    need!(namespaces());
    need!(program("nft"));
    let (host, _peer) = two_hosts();
    let flags = ["--exclude-outbound-ports", "22,53", "--exclude-outbound-cidrs", "203.0.113.0/24,2001:db8::/32"];
    let script = succeeds(&intercept(&host, &[&["print", "--backend", "nft"], &flags[..]].concat()));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), script).unwrap();
    assert!(host.command("nft").arg("-f").arg(file.path()).status().unwrap().success());
    succeeds(&intercept(&host, &[&["check"], &flags[..]].concat()));
}

#[test]
fn check_names_each_rule_that_is_not_as_the_flags_say() {
    need!(namespaces());
    need!(program("nft"));
    need!(program("iptables"));
    let (host, _peer) = two_hosts();
    for backend in BACKENDS {
        succeeds(&intercept(&host, &["install", "--backend", backend, "--exclude-inbound-ports", "8081"]));
        let checked = intercept(&host, &["check", "--proxy-uid", "1999"]);
        for part in ["missing", "1999", "not expected", "1515", "8081"] {
            assert_fails(&checked, 1, part);
        }
    }
}

#[test]
fn check_notices_when_other_rules_take_the_traffic_first() {
    need!(namespaces());
    need!(program("nft"));
    let (host, _peer) = two_hosts();
    succeeds(&intercept(&host, &["install", "--backend", "nft"]));
    let rule = "table ip other { chain c { type nat hook output priority -110; tcp dport != 0 redirect to :9; }; }";
    assert!(host.command("nft").arg(rule).status().unwrap().success());
    assert_fails(&intercept(&host, &["check"]), 1, "other rules of this namespace");
}

#[test]
fn the_original_destination_is_read_right_in_both_families_and_directions() {
    need!(namespaces());
    for backend in BACKENDS {
        need!(program(backend));
        let (host, peer) = two_hosts();
        succeeds(&intercept(&host, &["install", "--backend", backend]));
        let runtime = Runtime::new().unwrap();
        let bind = |ip: &str, port| {
            // A program that another test starts at this moment may hold what was closed here until it is itself.
            until("the port is free", START, || {
                host.within(|| {
                    let _within = runtime.enter();
                    listen::bind(SocketAddr::new(ip.parse().unwrap(), port)).ok()
                })
            })
        };
        // One listener for both families: IPv4 arrives v4-mapped. Then one for each.
        for sockets in [vec!["::"], vec!["0.0.0.0", "::1"]] {
            let mut outbound: Vec<_> = sockets.iter().map(|ip| bind(ip, OUTBOUND)).collect();
            for to in peer.addresses().map(|ip| SocketAddr::new(ip, 80)) {
                let listener = outbound.iter_mut().rfind(|l| to.is_ipv6() || accepts_v4(l)).unwrap();
                assert_eq!(caught(&runtime, listener, &host, to), Some(to), "{backend}, from the app to {to}");
            }
        }
        let mut inbound = bind("::", INBOUND);
        for to in host.addresses().map(|ip| SocketAddr::new(ip, 8080)) {
            assert_eq!(caught(&runtime, &mut inbound, &peer, to), Some(to), "{backend}, from a peer to {to}");
        }
        // Whoever asks for the inbound port itself was not redirected.
        let itself = SocketAddr::new(host.v4.into(), INBOUND);
        assert_eq!(caught(&runtime, &mut inbound, &peer, itself), None);
        // And the outbound port cannot be had from outside: that leads to the inbound side, which knows.
        let outbound = SocketAddr::new(host.v4.into(), OUTBOUND);
        assert_eq!(caught(&runtime, &mut inbound, &peer, outbound), Some(outbound));
    }
}

#[test]
fn the_proxy_loopback_own_ports_and_exclusions_pass() {
    need!(namespaces());
    for backend in BACKENDS {
        need!(program(backend));
        let (host, peer) = two_hosts();
        let flags = ["--exclude-outbound-ports", "2222", "--exclude-inbound-ports", "8081,8081"];
        succeeds(&intercept(&host, &[&["install", "--backend", backend], &flags[..]].concat()));
        // Nobody listens on the proxy's ports here: what is caught is refused.
        let app = |port| SocketAddr::new(host.v6.into(), listener(&host, port));
        let away = |ip: IpAddr, port| SocketAddr::new(ip, listener(&peer, port));

        assert!(!reaches(&host, away(peer.v4.into(), 0)), "the app is caught");
        assert!(reaches_as_proxy(&host, away(peer.v4.into(), 0)), "the proxy is not");
        assert!(reaches_as_proxy(&host, app(0)), "not even where it dials the app");
        for ip in ["127.0.0.1", "127.8.9.1", "::1"] {
            assert!(reaches(&host, SocketAddr::new(ip.parse().unwrap(), listener(&host, 0))), "{ip} is loopback");
        }
        assert!(reaches(&host, away(peer.v6.into(), 2222)), "2222 is excluded everywhere");
        assert!(!reaches(&host, app(0)), "an app that calls its own pod is caught");

        assert!(!reaches(&peer, app(0)), "whoever calls the app is caught");
        for port in [15100, 15120, 8081] {
            assert!(reaches(&peer, app(port)), "{port} passes");
        }

        let range = format!("{}/16,fd77::/16", peer.v4);
        succeeds(&intercept(&host, &["install", "--backend", backend, "--exclude-outbound-cidrs", &range]));
        succeeds(&intercept(&host, &["check", "--exclude-outbound-cidrs", &range]));
        assert!(peer.addresses().into_iter().all(|ip| reaches(&host, away(ip, 0))), "the range is excluded");
        let known = SocketAddr::new(host.v4.into(), 8081);
        assert!(!reaches(&peer, known), "the new rules have taken the place of the old");
    }
}

#[test]
fn every_wrong_flag_is_told_at_once() {
    let flags = ["--inbound-port", "15101", "--proxy-uid", "0", "--exclude-outbound-cidrs", "0.0.0.0/0"];
    let out = Command::new(binary("sheetbend")).args(["intercept", "print"]).args(flags).output().unwrap();
    for part in ["must differ", "--proxy-uid 0", "0.0.0.0/0"] {
        assert_fails(&out, 2, part);
    }
}

#[test]
fn print_needs_no_privilege_and_no_tool() {
    for (backend, part) in [("nft", "redirect to :15101"), ("iptables", "*nat\n:SHEETBEND_OUTBOUND"), ("auto", "1515")]
    {
        let mut print = Command::new(binary("sheetbend"));
        print.args(["intercept", "print", "--backend", backend]).env_clear();
        assert!(succeeds(&print.output().unwrap()).contains(part));
    }
}

#[test]
fn without_net_admin_the_message_says_how_to_get_it() {
    need!(root());
    need!(program("setpriv"));
    for verb in ["install", "check", "remove"] {
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-net_admin", "--bounding-set=-net_admin"]).arg(binary("sheetbend"));
        assert_fails(&command.args(["intercept", verb]).output().unwrap(), 1, "capabilities.add: [NET_ADMIN]");
    }
}

#[test]
fn without_a_tool_the_message_says_what_to_install() {
    need!(namespaces());
    need!(program("unshare"));
    let host = Host::new(1);
    let me = binary("sheetbend");
    for verb in ["install", "check", "remove"] {
        // A mount namespace in which the folder of both tools is empty.
        let script = format!("mount -t tmpfs none /usr/sbin && exec {} intercept {verb}", me.display());
        let out = host.command("unshare").args(["--mount", "sh", "-c", &script]).env("PATH", "/usr/bin:/bin").output();
        assert_fails(&out.unwrap(), 1, "neither `nft` nor `iptables`");
    }
}

fn intercept(host: &Host, args: &[&str]) -> Output {
    host.command(binary("sheetbend")).arg("intercept").args(args).output().unwrap()
}

#[track_caller]
fn succeeds(out: &Output) -> String {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

#[track_caller]
fn assert_fails(out: &Output, code: i32, says: &str) {
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{said}");
    assert!(said.contains(says), "no {says:?} in: {said}");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Everything that both tools show of a host, without counters.
fn rules(host: &Host) -> String {
    let run = |program: &str, args: &[&str]| text(&host.command(program).args(args).output().unwrap().stdout);
    let nft = run("nft", &["-s", "list", "ruleset"]);
    let nft: String =
        nft.lines().map(|line| line.split("counter").next().unwrap_or_default().to_owned() + "\n").collect();
    nft + &run("iptables", &["-t", "nat", "-S"]) + &run("ip6tables", &["-t", "nat", "-S"])
}

/// Listens on a port of `host` for as long as the namespace lives, and says which.
fn listener(host: &Host, port: u16) -> u16 {
    let listener = host.within(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
    let listener = listener.unwrap_or_else(|error| panic!("port {port} of {}: {error}", host.name()));
    let port = listener.local_addr().unwrap().port();
    // Kept until this process ends: the test asks who can reach it, and never how it ends.
    std::mem::forget(listener);
    port
}

fn dial(from: &Host, to: SocketAddr) -> io::Result<TcpStream> {
    from.within(|| TcpStream::connect_timeout(&to, START))
}

/// Whether a connection is answered. One that is caught is not, as long as nobody listens for the caught.
#[track_caller]
fn reaches(from: &Host, to: SocketAddr) -> bool {
    match dial(from, to) {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => false,
        Err(error) => panic!("{to}: {error}"),
    }
}

fn reaches_as_proxy(from: &Host, to: SocketAddr) -> bool {
    let script = format!("</dev/tcp/{}/{}", to.ip(), to.port());
    from.command_as(PROXY, "bash").args(["-c", &script]).output().unwrap().status.success()
}

fn accepts_v4(listener: &Listener) -> bool {
    let ip = listener.local_addr().ip();
    ip.is_ipv4() || ip.is_unspecified()
}

/// Dials `to` and says what `listener`, which is to catch it, believes about its destination.
fn caught(runtime: &Runtime, listener: &mut Listener, from: &Host, to: SocketAddr) -> Option<SocketAddr> {
    let client = dial(from, to).unwrap_or_else(|error| panic!("{to} is not caught: {error}"));
    let accepted = runtime.block_on(async { timeout(START, listener.accept()).await });
    let accepted = accepted.unwrap_or_else(|_| panic!("{to} was answered by someone else"));
    assert_eq!(accepted.peer.port(), client.local_addr().unwrap().port());
    original_destination(&accepted.stream).unwrap()
}
