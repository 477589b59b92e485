//! What is seen of processes from outside.

use std::net::SocketAddr;

use serde_json::Value;

/// How many ports of a service are served, by the sidecar of a process id or by any, as a control plane's admin shows it.
pub fn registered(admin: SocketAddr, service: &str, sidecar: Option<u32>) -> Option<usize> {
    let page: Value = serde_json::from_str(&crate::http::page(admin, "/registrations").ok()?).ok()?;
    // The name of an instance: its service, its process, and a random number.
    let name = sidecar.map_or(format!("{service}-"), |id| format!("{service}-{id}-"));
    let own = |one: &&Value| one["state"] == "live" && one["node"].as_str().is_some_and(|node| node.starts_with(&name));
    let ports = page["registrations"].as_array()?.iter().filter(own).filter_map(|one| one["ports"].as_array());
    Some(ports.map(Vec::len).sum())
}

/// The sum of a counter of a `/metrics` page over all of its labels that contain each of `labels`.
pub(crate) fn counter(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let lines = metrics.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// The IPv4 addresses on which a process listens.
pub(crate) fn listening(pid: u32) -> Vec<SocketAddr> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let inodes: Vec<String> = links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_string()))
        .collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let address = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
        let (ip, port) = local.split_once(':')?;
        let ip = u32::from_str_radix(ip, 16).ok()?.swap_bytes();
        let address = SocketAddr::from((std::net::Ipv4Addr::from(ip), u16::from_str_radix(port, 16).ok()?));
        (*state == "0A" && inodes.iter().any(|mine| mine == inode)).then_some(address)
    };
    table.lines().filter_map(address).collect()
}
