//! What the program finds in its environment: the way out through its sidecar. Pure.

use std::net::SocketAddr;

/// The variables to set, and what the operator should know about those that were set already.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Environment {
    pub(super) set: Vec<(&'static str, String)>,
    pub(super) warnings: Vec<String>,
}

/// Where the program's own traffic goes in any case: to itself and its neighbours on this machine. Names, addresses
/// and a network, since each client library understands another of these forms.
const LOOPBACK: [&str; 4] = ["localhost", "127.0.0.1", "127.0.0.0/8", "::1"];

/// `outbound` is the sidecar's explicit listener, `control_plane` the host that is never reached through it.
pub(super) fn environment(
    outbound: SocketAddr,
    control_plane: &str,
    existing: impl Fn(&str) -> Option<String>,
) -> Environment {
    let proxy = format!("http://{outbound}");
    let mut warnings = Vec::new();
    let mut set = Vec::new();
    for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy"] {
        if let Some(before) = existing(name).filter(|value| !value.is_empty()) {
            warnings.push(format!(
                "{name}={before} is replaced for the program: what is no part of the mesh is reached directly from here"
            ));
        }
        set.push((name, proxy.clone()));
    }
    let no_proxy = no_proxy(control_plane, [existing("no_proxy"), existing("NO_PROXY")]);
    if no_proxy.iter().any(|entry| entry == "*") {
        warnings.push("no_proxy holds `*`: the program's traffic will go round its sidecar".to_string());
    }
    let no_proxy = no_proxy.join(",");
    set.push(("no_proxy", no_proxy.clone()));
    set.push(("NO_PROXY", no_proxy));
    // Node's fetch and http follow the variables above only when they are told to.
    set.push(("NODE_USE_ENV_PROXY", "1".to_string()));
    set.push(("JAVA_TOOL_OPTIONS", java_options(outbound, control_plane, existing("JAVA_TOOL_OPTIONS"))));
    Environment { set, warnings }
}

/// The entries that were there first, each once.
fn no_proxy(control_plane: &str, existing: [Option<String>; 2]) -> Vec<String> {
    let mut entries: Vec<String> = Vec::new();
    let kept = existing.iter().flatten().flat_map(|list| list.split([',', ' ']));
    for entry in kept.chain(LOOPBACK).chain([control_plane]) {
        let entry = entry.trim();
        if !entry.is_empty() && !entries.iter().any(|known| known == entry) {
            entries.push(entry.to_string());
        }
    }
    entries
}

/// A JVM reads none of the variables; it takes its proxies from properties. What was there stays, and comes last, so
/// that it wins.
fn java_options(outbound: SocketAddr, control_plane: &str, existing: Option<String>) -> String {
    let (host, port) = (outbound.ip(), outbound.port());
    let mut direct = vec!["localhost", "127.*", "[::1]"];
    if !LOOPBACK.contains(&control_plane) {
        direct.push(control_plane);
    }
    let mut options = format!(
        "-Dhttp.proxyHost={host} -Dhttp.proxyPort={port} -Dhttps.proxyHost={host} -Dhttps.proxyPort={port} \
         -Dhttp.nonProxyHosts={}",
        direct.join("|")
    );
    if let Some(before) = existing.filter(|text| !text.trim().is_empty()) {
        options.push(' ');
        options.push_str(&before);
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(existing: &[(&str, &str)]) -> Environment {
        let find = |name: &str| existing.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        environment("127.0.0.1:40001".parse().unwrap(), "mesh.example", find)
    }

    fn value<'a>(environment: &'a Environment, name: &str) -> &'a str {
        let found = environment.set.iter().find(|(n, _)| *n == name);
        &found.unwrap_or_else(|| panic!("{name} is not set")).1
    }

    #[test]
    fn every_client_is_shown_the_sidecar_in_the_spelling_it_reads() {
        let environment = with(&[]);
        for name in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "grpc_proxy"] {
            assert_eq!(value(&environment, name), "http://127.0.0.1:40001", "{name}");
        }
        assert_eq!(value(&environment, "no_proxy"), "localhost,127.0.0.1,127.0.0.0/8,::1,mesh.example");
        assert_eq!(value(&environment, "no_proxy"), value(&environment, "NO_PROXY"));
        assert!(value(&environment, "JAVA_TOOL_OPTIONS").contains("-Dhttp.proxyPort=40001"));
        assert_eq!(environment.warnings, Vec::<String>::new());
    }

    #[test]
    fn what_the_operator_had_excepted_stays_excepted() {
        let environment = with(&[("no_proxy", "intra.example, ::1"), ("NO_PROXY", "10.0.0.0/8,intra.example")]);
        let expected = "intra.example,::1,10.0.0.0/8,localhost,127.0.0.1,127.0.0.0/8,mesh.example";
        assert_eq!(value(&environment, "no_proxy"), expected);
        let java = with(&[("JAVA_TOOL_OPTIONS", "-Xmx64m")]);
        assert!(value(&java, "JAVA_TOOL_OPTIONS").ends_with("|mesh.example -Xmx64m"));
    }

    #[test]
    fn a_proxy_that_is_replaced_and_an_exception_for_everything_are_told() {
        let environment = with(&[("http_proxy", "http://proxy.example:3128"), ("NO_PROXY", "*")]);
        assert_eq!(environment.warnings.len(), 2);
        assert!(environment.warnings[0].starts_with("http_proxy=http://proxy.example:3128 is replaced"));
        assert!(environment.warnings[1].contains("no_proxy holds `*`"));
    }
}
