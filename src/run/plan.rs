//! What the operator typed, made into what will be done: every value checked before anything is started.

use std::ffi::OsString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{AppProtocol, Standing, Target};

use super::Args;
use super::command::{self, Program};
use crate::Failure;

/// A `run` that can be carried out, as far as can be known before starting.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) service: String,
    pub(super) namespace: String,
    pub(super) ports: Vec<AppPort>,
    pub(super) upstreams: Vec<Upstream>,
    pub(super) mesh: Mesh,
    /// The program's place among the instances of its service.
    pub(super) standing: Standing,
    pub(super) strict: bool,
    /// Who may call; empty is every identity of the mesh.
    pub(super) allow: Vec<SpiffeId>,
    /// Who is asked for the addresses of external services.
    pub(super) dns_servers: Vec<SocketAddr>,
    pub(super) deny_unknown: bool,
    pub(super) access_log: AccessLog,
    pub(super) state: PathBuf,
    pub(super) program: Program,
    pub(super) arguments: Vec<OsString>,
}

/// Which mesh this is part of.
#[derive(Debug)]
pub(super) enum Mesh {
    /// The one of this user on this machine.
    Local,
    /// Another machine's.
    ///
    /// `advertise` is the address by which others reach this machine; `None`: the one that the control plane sees.
    Remote { control_plane: ControlPlane, token: String, advertise: Option<IpAddr> },
}

/// `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlPlane {
    pub(super) host: String,
    pub(super) port: u16,
}

impl std::fmt::Display for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "https://[{}]:{}", self.host, self.port),
            false => write!(f, "https://{}:{}", self.host, self.port),
        }
    }
}

/// A port that the program listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AppPort {
    /// The program's.
    pub(super) local: u16,
    /// The service's, by which others call it.
    pub(super) port: u16,
    pub(super) protocol: AppProtocol,
    pub(super) mesh_tls: bool,
}

/// A local port that stands for a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Upstream {
    pub(super) local: u16,
    pub(super) service: String,
    /// `None`: the service's only port.
    pub(super) port: Option<u16>,
}

/// Which requests are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AccessLog {
    /// None
    Off,
    /// Those that failed
    Failures,
    /// Every request, as a line of text
    All,
    /// Every request, as a line of JSON
    Json,
}

impl Plan {
    /// Checks everything and says all that is wrong at once.
    pub(super) fn new(args: Args) -> Result<Self, Failure> {
        let mut wrong = Vec::new();
        let mut note = |message: String| wrong.push(message);

        if let Err(why) = dns_label(&args.service) {
            note(format!("--service `{}`: {why}", args.service));
        }
        if let Err(why) = dns_label(&args.namespace) {
            note(format!("--namespace `{}`: {why}", args.namespace));
        }
        let ports = parse_all("--port", &args.port, app_port, &mut note);
        let upstreams = parse_all("--upstream", &args.upstream, upstream, &mut note);
        twice(&ports, &upstreams, &mut note);
        let allow = parse_all("--allow", &args.allow, |text| text.parse().map_err(|why| format!("{why}")), &mut note);
        let standing = Standing { weight: args.weight, priority: args.priority, zone: args.zone.as_str().into() };
        if let Err(why) = standing.check() {
            note(format!("--{why}"));
        }
        let mesh = mesh(&args, &mut note);
        let state = match args.state_dir.clone().or_else(default_state_dir) {
            Some(dir) => dir,
            None => {
                note("no place for the state: set HOME or XDG_STATE_HOME, or give --state-dir DIR".to_string());
                PathBuf::new()
            }
        };
        let mut words = args.command.into_iter();
        // clap lets nothing through without a command.
        let name = words.next().unwrap_or_default();
        let Some(mesh) = mesh.filter(|_| wrong.is_empty()) else {
            return Err(Failure::usage(wrong.join("\n       ")));
        };
        let path = std::env::var_os("PATH");
        let program = command::find(&name, path.as_deref())
            .map_err(|why| Failure::with_status(why.exit_status(), why.to_string()))?;

        Ok(Self {
            service: args.service,
            namespace: args.namespace,
            ports,
            upstreams,
            mesh,
            standing,
            strict: args.strict,
            allow,
            dns_servers: args.dns_server,
            deny_unknown: args.outbound_policy == super::OutboundPolicy::Deny,
            access_log: args.access_log,
            state,
            program,
            arguments: words.collect(),
        })
    }
}

/// Every value of a flag that can be read; the others are noted.
fn parse_all<T>(
    flag: &str,
    values: &[String],
    parse: impl Fn(&str) -> Result<T, String>,
    note: &mut impl FnMut(String),
) -> Vec<T> {
    let mut parsed = Vec::new();
    for text in values {
        match parse(text) {
            Ok(value) => parsed.push(value),
            Err(why) => note(format!("{flag} `{text}`: {why}")),
        }
    }
    parsed
}

/// A port of this machine can stand for one thing only.
fn twice(ports: &[AppPort], upstreams: &[Upstream], note: &mut impl FnMut(String)) {
    for (at, port) in ports.iter().enumerate() {
        // Two ports of the service may lead to the same of the program's.
        if ports.iter().take(at).any(|other| other.port == port.port) {
            note(format!("--port: port {} of the service is given twice", port.port));
        }
    }
    for (at, upstream) in upstreams.iter().enumerate() {
        if upstreams.iter().take(at).any(|other| other.local == upstream.local) {
            note(format!("--upstream: local port {} is given to two services", upstream.local));
        }
        if ports.iter().any(|port| port.local == upstream.local) {
            note(format!("--upstream: local port {} is the program's own (--port)", upstream.local));
        }
    }
}

/// `None`: something was noted.
fn mesh(args: &Args, note: &mut impl FnMut(String)) -> Option<Mesh> {
    let Some(address) = &args.control_plane else {
        for (given, flag) in [(args.token_file.is_some(), "--token-file"), (args.advertise.is_some(), "--advertise")] {
            if given {
                note(format!("{flag} belongs to --control-plane https://HOST:15112, which is not given"));
            }
        }
        return Some(Mesh::Local);
    };
    let control_plane = control_plane(address).map_err(|why| note(format!("--control-plane `{address}`: {why}"))).ok();
    let token = token(args.token_file.as_deref()).map_err(&mut *note).ok();
    let advertise = match args.advertise.as_deref().map(|text| (text, text.parse::<IpAddr>())) {
        None => None,
        Some((_, Ok(ip))) if !ip.is_unspecified() => Some(ip),
        Some((text, _)) => {
            note(format!("--advertise `{text}`: give the IP address by which others reach this machine"));
            None
        }
    };
    Some(Mesh::Remote { control_plane: control_plane?, token: token?, advertise })
}

fn token(file: Option<&Path>) -> Result<String, String> {
    let Some(file) = file else {
        return Err("--control-plane needs --token-file FILE: make one where the control plane runs, with \
                    `sheetbend token create --dir DIR --service NAME`"
            .to_string());
    };
    match fs::read_to_string(file) {
        Ok(text) if text.trim().is_empty() => Err(format!("--token-file {}: the file is empty", file.display())),
        Ok(text) => Ok(text.trim().to_string()),
        Err(why) => Err(format!("--token-file {}: cannot be read: {why}", file.display())),
    }
}

/// `$XDG_STATE_HOME/sheetbend`, by default `~/.local/state/sheetbend`.
pub(crate) fn default_state_dir() -> Option<PathBuf> {
    // The XDG base directory specification: a relative path is to be ignored.
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(base.join("sheetbend"))
}

/// A service's and a namespace's name is a DNS label (RFC 1123 §2.1), lower case.
pub(crate) fn dns_label(text: &str) -> Result<(), String> {
    let edge = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    let inner = bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
    match edge(bytes.first()) && edge(bytes.last()) && inner && bytes.len() <= 63 {
        true => Ok(()),
        false => Err("a name has 1 to 63 of a-z, 0-9 and -, and begins and ends with a letter or a digit".to_string()),
    }
}

/// `8000`, or `8001:8000` where the program's own port is not the service's; `8000/tcp` where the operator knows what is
/// spoken; `8000,tls=mesh` where TLS that comes in is the mesh's, whoever the peer is.
pub(super) fn app_port(text: &str) -> Result<AppPort, String> {
    let (text, mesh_tls) = match text.split_once(',') {
        None => (text, false),
        Some((text, "tls=mesh")) => (text, true),
        Some((_, other)) => return Err(format!("`{other}` is not tls=mesh")),
    };
    let (port, protocol) = text.split_once('/').map_or((text, None), |(port, protocol)| (port, Some(protocol)));
    let protocol = protocol.map_or(Ok(AppProtocol::Detect), str::parse)?;
    if mesh_tls && protocol == AppProtocol::Tls {
        return Err("`tls` is the app's own TLS, and tls=mesh is not".to_string());
    }
    let (local, port) = port.split_once(':').unwrap_or((port, port));
    Ok(AppPort { local: port_number(local)?, port: port_number(port)?, protocol, mesh_tls })
}

/// `LOCALPORT:SERVICE[:PORT]`.
pub(super) fn upstream(text: &str) -> Result<Upstream, String> {
    let mut parts = text.splitn(3, ':');
    let (Some(local), Some(service)) = (parts.next(), parts.next()) else {
        return Err("write LOCALPORT:SERVICE[:PORT], for example 5432:postgres".to_string());
    };
    let local = port_number(local)?;
    let port = parts.next().map(port_number).transpose()?;
    let target = Target::new(service, port.unwrap_or(1)).map_err(|_| format!("`{service}` is not a service's name"))?;
    Ok(Upstream { local, service: target.host().to_string(), port })
}

fn port_number(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is not a port: give a number from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

/// `https://HOST:PORT`; 15112 where no port is given.
pub(super) fn control_plane(text: &str) -> Result<ControlPlane, String> {
    /// Where a control plane listens unless it was told otherwise.
    const USUAL_PORT: u16 = 15112;
    let wrong = || format!("write https://HOST:{USUAL_PORT}");
    let rest = text.strip_prefix("https://").ok_or_else(wrong)?;
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if let Ok(address) = rest.parse::<SocketAddr>() {
        return Ok(ControlPlane { host: address.ip().to_string(), port: address.port() });
    }
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => (host, port_number(port)?),
        _ => (rest.trim_matches(['[', ']']), USUAL_PORT),
    };
    let target = Target::new(host, port).map_err(|_| wrong())?;
    Ok(ControlPlane { host: target.host().to_string(), port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_dns_label() {
        for good in ["web", "a", "web-2", "0", &"a".repeat(63)] {
            assert_eq!(dns_label(good), Ok(()), "{good}");
        }
        for bad in ["", "Web", "-web", "web-", "we_b", "web.default", "wéb", &"a".repeat(64)] {
            assert!(dns_label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_upstream_is_a_local_port_a_service_and_perhaps_its_port() {
        let postgres = |port| Upstream { local: 5432, service: "postgres".to_string(), port };
        assert_eq!(upstream("5432:postgres"), Ok(postgres(None)));
        assert_eq!(upstream("5432:postgres:5433"), Ok(postgres(Some(5433))));
        for bad in ["5432", "postgres:5432", "0:postgres", "5432:", "5432:postgres:", "5432:postgres:x", "70000:a"] {
            assert!(upstream(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_may_say_what_it_speaks() {
        let same = |port, protocol, mesh_tls| Ok(AppPort { local: port, port, protocol, mesh_tls });
        assert_eq!(app_port("8000"), same(8000, AppProtocol::Detect, false));
        assert_eq!(app_port("5432/tcp,tls=mesh"), same(5432, AppProtocol::Tcp, true));
        assert!(app_port("8000,tls=app").is_err() && app_port("8000/tls,tls=mesh").is_err());
        for bad in ["", "0", "65536", "8000/udp"] {
            assert!(app_port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_of_the_program_may_stand_for_another_of_the_service() {
        let mapped = AppPort { local: 8001, port: 80, protocol: AppProtocol::Http, mesh_tls: false };
        assert_eq!(app_port("8001:80/http"), Ok(mapped));
        for bad in [":80", "8001:", "8001:0", "8001:80:80", "8001/http:80"] {
            assert!(app_port(bad).is_err(), "{bad}");
        }
        let told = |ports: &[&str], upstreams: &[&str]| {
            let ports: Vec<_> = ports.iter().map(|text| app_port(text).unwrap()).collect();
            let upstreams: Vec<_> = upstreams.iter().map(|text| upstream(text).unwrap()).collect();
            let mut notes = Vec::new();
            twice(&ports, &upstreams, &mut |note| notes.push(note));
            notes
        };
        assert_eq!(told(&["8001:80", "8001:81", "81:82"], &["80:web", "82:web"]), Vec::<String>::new());
        assert_eq!(told(&["8001:80", "8002:80"], &[]), ["--port: port 80 of the service is given twice"]);
        assert_eq!(told(&["8001:80"], &["8001:web"]).len(), 1);
    }

    #[test]
    fn a_control_plane_is_an_https_address() {
        let at = |host: &str, port| Ok(ControlPlane { host: host.to_string(), port });
        assert_eq!(control_plane("https://mesh.example:15112"), at("mesh.example", 15112));
        assert_eq!(control_plane("https://mesh.example/"), at("mesh.example", 15112));
        assert_eq!(control_plane("https://[fd00::1]:99"), at("fd00::1", 99));
        assert_eq!(control_plane("https://[fd00::1]"), at("fd00::1", 15112));
        for bad in ["http://mesh.example", "mesh.example:15112", "https://", "https://a b", "https://h:0"] {
            assert!(control_plane(bad).is_err(), "{bad}");
        }
        assert_eq!(control_plane("https://[fd00::1]").unwrap().to_string(), "https://[fd00::1]:15112");
    }
}
