//! What a control plane is started with, and why it does not start.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::persist::StateError;

/// The port of the CA service and of discovery.
pub const DEFAULT_PORT: u16 = 15112;
/// The port of the admin and graph page, on loopback only.
pub const DEFAULT_ADMIN_PORT: u16 = 15110;

/// What a control plane is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// The CA's folder, as `sheetbend certs init` makes it.
    pub dir: PathBuf,
    /// Where registrations and spent tokens are kept. By default `state` in [`Config::dir`].
    pub state: PathBuf,
    /// Where the CA service and discovery are served. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the admin and the graph page are served; a loopback address. Port 0 takes a free one.
    pub admin: SocketAddr,
    /// A folder of resources, read again whenever it changes.
    pub resources: Option<PathBuf>,
    /// DNS names and addresses, beside localhost, under which proxies reach this control plane.
    pub names: Vec<String>,
    /// Addresses that a proxy may register although it does not connect from them.
    pub allowed_addresses: Vec<IpNet>,
    /// How long a registration outlives the last byte heard of its proxy.
    pub ttl: Duration,
    /// How long registrations of before a restart count as live.
    pub restart_grace: Duration,
}

impl Config {
    /// The defaults for a CA in `dir`: everything on the usual ports, no resources.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self {
            state: dir.join("state"),
            dir,
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), DEFAULT_PORT),
            admin: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_ADMIN_PORT),
            resources: None,
            names: Vec::new(),
            allowed_addresses: Vec::new(),
            ttl: Duration::from_secs(10),
            restart_grace: Duration::from_secs(60),
        }
    }

    /// Every bad value at once, each with its mending.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.dir.is_dir() {
            problems.push(format!(
                "{}: there is no such folder; make a CA with `sheetbend certs init --dir {}`",
                self.dir.display(),
                self.dir.display()
            ));
        }
        if !self.admin.ip().is_loopback() {
            problems.push(format!(
                "admin address {}: the admin is served on loopback only; use 127.0.0.1:{} or [::1]:{}",
                self.admin,
                self.admin.port(),
                self.admin.port()
            ));
        }
        if self.listen == self.admin && self.listen.port() != 0 {
            problems.push(format!("{}: discovery and admin cannot share one address", self.listen));
        }
        if let Some(folder) = self.resources.as_ref().filter(|folder| !folder.is_dir()) {
            problems.push(format!("{}: the resources folder does not exist; create it", folder.display()));
        }
        problems.extend(self.names.iter().filter(|name| !is_name(name)).map(|name| {
            format!("`{name}` is neither a DNS name nor an address; write for example mesh.example.org or 192.0.2.7")
        }));
        problems
    }
}

/// A DNS name (RFC 1123 letters, digits, hyphens) or an IP address.
fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.parse::<IpAddr>().is_ok() || (text.len() <= 253 && text.split('.').all(label))
}

/// Why a control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Values that cannot be used, all of them.
    #[error("{}", .0.join("\n       "))]
    Invalid(Vec<String>),
    /// Someone else listens there.
    #[error(
        "{address} is in use by another process, so {what} cannot be served there; stop that process or choose another \
         address with {flag}"
    )]
    PortInUse {
        /// The address.
        address: SocketAddr,
        /// What was to be served.
        what: &'static str,
        /// The flag that changes it.
        flag: &'static str,
    },
    /// The address cannot be bound.
    #[error("cannot serve {what} on {address}: {source}; choose another address with {flag}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What was to be served.
        what: &'static str,
        /// The flag that changes it.
        flag: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The CA cannot be used.
    #[error("{0}")]
    Ca(String),
    /// A state file cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// Another control plane serves the same folder.
    #[error("another control plane already serves {}; two would lose each other's registrations", .0.display())]
    Held(PathBuf),
}

impl StartError {
    pub(crate) fn bind(address: SocketAddr, what: &'static str, flag: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::PortInUse { address, what, flag },
            _ => Self::Bind { address, what, flag, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bad_value_is_told_at_once() {
        let mut config = Config::new("/nowhere/ca");
        config.admin = "192.0.2.1:15110".parse().unwrap();
        config.resources = Some("/nowhere/mesh".into());
        config.names = vec!["ok.example".into(), "not ok".into(), "::1".into()];
        let problems = config.problems();
        assert_eq!(problems.len(), 4, "{problems:#?}");
        assert!(problems[0].contains("sheetbend certs init --dir /nowhere/ca"));
        assert!(problems[3].contains("not ok"));
    }
}
