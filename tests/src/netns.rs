//! Hosts made of network namespaces: two of them and a cable are two machines, two on a third are pods on a node.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace with its loopback up. Gone when dropped.
#[derive(Debug)]
pub struct Host {
    name: String,
    /// Its address on the cable.
    pub v4: Ipv4Addr,
    /// Its IPv6 address on the cable.
    pub v6: Ipv6Addr,
}

/// Two hosts and a cable between them: 10.77.0.1/24 and .2, fd77::1/64 and ::2. Needs [`crate::namespaces`].
pub fn two_hosts() -> (Host, Host) {
    let left = Host::new(1);
    let right = Host::new(2);
    let (a, b) = (left.interface(), right.interface());
    ip(&["link", "add", &a, "netns", &left.name, "type", "veth", "peer", "name", &b, "netns", &right.name]);
    left.give_addresses(&a);
    right.give_addresses(&b);
    (left, right)
}

/// Two pods on a node: each has a cable to the node's bridge, whose end there is called as the pod's own, and its default
/// route leads to the node. 10.77.0.1 and .2, and .3 is the node; fd77::1 to ::3. Needs [`crate::namespaces`].
pub fn two_pods() -> (Host, Host, Host) {
    const BRIDGE: &str = "pods";
    let node = Host::new(3);
    ip(&["-n", &node.name, "link", "add", BRIDGE, "type", "bridge"]);
    node.give_addresses(BRIDGE);
    let pods = [1, 2].map(Host::new);
    for pod in &pods {
        let end = pod.interface();
        ip(&["link", "add", &end, "netns", &pod.name, "type", "veth", "peer", "name", &end, "netns", &node.name]);
        ip(&["-n", &node.name, "link", "set", &end, "master", BRIDGE, "up"]);
        pod.give_addresses(&end);
        ip(&["-n", &pod.name, "route", "add", "default", "via", &node.v4.to_string()]);
        ip(&["-n", &pod.name, "route", "add", "default", "via", &node.v6.to_string()]);
    }
    let [one, other] = pods;
    (one, other, node)
}

impl Host {
    /// A namespace of its own, with nothing but loopback; `number` is the last part of its addresses.
    pub fn new(number: u8) -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("sbt{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self { name, v4: Ipv4Addr::new(10, 77, 0, number), v6: Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()) }
    }

    fn give_addresses(&self, interface: &str) {
        ip(&["-n", &self.name, "addr", "add", &format!("{}/24", self.v4), "dev", interface]);
        // Duplicate address detection would keep the address unusable for a second or two.
        ip(&["-n", &self.name, "addr", "add", &format!("{}/64", self.v6), "dev", interface, "nodad"]);
        ip(&["-n", &self.name, "link", "set", interface, "up"]);
    }

    /// The name of its namespace, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its two addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// A command that runs on this host.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program.as_ref());
        command
    }

    /// A command that runs on this host as the sidecar's user, with no capability left.
    pub fn command_as(&self, uid: u32, program: impl AsRef<Path>) -> Command {
        let mut command = self.command("setpriv");
        command.args([format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".into()]);
        command.arg(program.as_ref());
        command
    }

    /// Runs `work` here, where the sockets that it makes stay.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.name, work)
    }

    /// Whether anything listens on a TCP port here; from outside one cannot tell by connecting.
    pub fn listens(&self, port: u16) -> bool {
        listens(&self.name, port)
    }

    /// The name of its end of the cable.
    pub fn interface(&self) -> String {
        // Interface names are at most 15 bytes long.
        format!("v{}", &self.name[3..])
    }

    /// Takes the cable out (or puts it back): the other host is gone without a word.
    pub fn cable(&self, plugged: bool) {
        ip(&["-n", &self.name, "link", "set", &self.interface(), if plugged { "up" } else { "down" }]);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

/// Runs `work` in a namespace, on a thread of its own.
pub(crate) fn within<T: Send>(netns: &str, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            let namespace = File::open(format!("/run/netns/{netns}")).expect("a namespace");
            let moved = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
            moved.expect("whoever made it may enter it");
            work()
        });
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether anything listens on a TCP port in a namespace; from outside one cannot connect.
pub(crate) fn listens(netns: &str, port: u16) -> bool {
    let out = Command::new("ip").args(["netns", "exec", netns, "cat", "/proc/net/tcp", "/proc/net/tcp6"]).output();
    let table = out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    let (port, listen) = (format!(":{port:04X}"), "0A");
    table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some(listen)
    })
}

#[track_caller]
fn ip(args: &[&str]) {
    let out = Command::new("ip").args(args).output().expect("`ip` runs");
    assert!(out.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
}
