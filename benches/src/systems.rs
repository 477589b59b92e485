//! The pairs under test, and how each is started.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::load::http1::{Client, get};
use crate::load::{self, http2};
use crate::mesh::{self, Mesh};
use crate::pki::{self, Pki};
use crate::procs::Proc;

/// A version of HTTP on one stretch of the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Http {
    /// HTTP/1.1.
    One,
    /// HTTP/2.
    Two,
}

/// Whose proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Make {
    Nginx,
    Haproxy,
    Envoy,
    Sheetbend,
    /// Another build of Sheetbend.
    #[value(skip)]
    Before,
    /// Sheetbend, with every policy switched off that can be.
    #[value(skip)]
    Bare,
}

/// A pair of proxies in one of its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct System {
    /// Whose.
    pub(crate) make: Make,
    /// What its clients speak.
    pub(crate) client: Http,
    /// What the two speak between them.
    pub(crate) between: Http,
    /// What the inbound proxy speaks to the app. Sheetbend decides by what the client spoke.
    pub(crate) origin: Http,
}

impl System {
    /// The service that is called.
    fn service(self) -> &'static str {
        if self.make == Make::Bare { mesh::BARE } else { "web" }
    }

    /// How the table calls it.
    pub(crate) fn name(self) -> &'static str {
        match (self.make, self.between) {
            (Make::Nginx, _) => "nginx",
            (Make::Haproxy, Http::One) => "HAProxy, HTTP/1.1 between",
            (Make::Haproxy, Http::Two) => "HAProxy, HTTP/2 between",
            (Make::Envoy, Http::One) => "Envoy, HTTP/1.1 between",
            (Make::Envoy, Http::Two) => "Envoy, HTTP/2 between",
            (Make::Sheetbend, _) => "Sheetbend",
            (Make::Before, _) => "Sheetbend before",
            (Make::Bare, _) => "Sheetbend without policies",
        }
    }
}

/// Every setting, where clients and app speak `spoken`. nginx speaks HTTP/1.1 to whatever is behind it.
pub(crate) fn systems(spoken: Http) -> Vec<System> {
    let system = |make, between, origin| System { make, client: spoken, between, origin };
    vec![
        system(Make::Nginx, Http::One, Http::One),
        system(Make::Haproxy, Http::One, spoken),
        system(Make::Haproxy, Http::Two, spoken),
        system(Make::Envoy, Http::One, spoken),
        system(Make::Envoy, Http::Two, spoken),
        system(Make::Before, Http::Two, spoken),
        system(Make::Sheetbend, Http::Two, spoken),
    ]
}

/// Ours as it is, and ours without policies.
pub(crate) fn with_and_without_policies() -> [System; 2] {
    [Make::Sheetbend, Make::Bare].map(|make| System { make, client: Http::One, between: Http::Two, origin: Http::One })
}

/// The programs.
pub(crate) struct Programs {
    pub(crate) nginx: PathBuf,
    pub(crate) haproxy: PathBuf,
    pub(crate) envoy: PathBuf,
    pub(crate) sheetbend: PathBuf,
    /// Another build of ours.
    pub(crate) before: Option<PathBuf>,
}

/// What every pair shares.
pub(crate) struct Bench<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) pki: &'a Pki,
    pub(crate) mesh: &'a Mesh,
    pub(crate) scratch: &'a Path,
    pub(crate) origin: SocketAddr,
}

impl Bench<'_> {
    /// What requests name.
    pub(crate) fn authority(&self, system: System) -> String {
        load::authority(system.service(), self.origin.port())
    }
}

/// Two running proxies, with a path from `outbound` to the origin.
pub(crate) struct Pair {
    pub(crate) system: System,
    pub(crate) inbound: Proc,
    pub(crate) outbound: Proc,
    /// Where clients connect.
    pub(crate) entry: SocketAddr,
    /// Where the outbound proxy connects.
    pub(crate) middle: SocketAddr,
    /// From the first process's start to the first answer.
    pub(crate) started_in: Duration,
}

impl Pair {
    /// Starts both, and waits for the first answer.
    pub(crate) async fn start(bench: &Bench<'_>, system: System) -> io::Result<Self> {
        let dir = tempfile::tempdir_in(bench.scratch)?.keep();
        let (entry, middle) = (free_port()?, free_port()?);
        let sides = sides(bench, system, &dir, entry, middle)?;
        let start = Instant::now();
        let [inbound, outbound] = sides.map(|(name, mut command)| Proc::start(&mut command, &dir.join(name)));
        let mut pair =
            Self { system, inbound: inbound?, outbound: outbound?, entry, middle, started_in: Duration::ZERO };
        pair.first_answer(start, &bench.authority(system)).await.map_err(|error| {
            let said = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
            let name = system.name();
            io::Error::other(format!("{name}: {error}\n{}{}", said("inbound.log"), said("outbound.log")))
        })?;
        Ok(pair)
    }

    async fn first_answer(&mut self, start: Instant, authority: &str) -> io::Result<()> {
        let request = get("/small", authority);
        loop {
            let ask = async {
                match self.system.client {
                    Http::One => Client::connect(self.entry).await?.ask(&request).await.map(drop),
                    Http::Two => http2::once(self.entry, authority).await,
                }
            };
            let answer = tokio::time::timeout(Duration::from_millis(100), ask).await;
            match answer {
                Ok(Ok(_)) => {
                    self.started_in = start.elapsed();
                    return Ok(());
                }
                _ if self.inbound.has_ended() || self.outbound.has_ended() => {
                    return Err(io::Error::other("a proxy ended at its start"));
                }
                Ok(Err(error)) if start.elapsed() > Duration::from_secs(10) => return Err(error),
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    /// Nanoseconds of CPU that both have used.
    pub(crate) fn cpu(&self) -> u64 {
        self.inbound.cpu() + self.outbound.cpu()
    }

    /// Resident bytes of both.
    pub(crate) fn resident(&self) -> u64 {
        self.inbound.resident() + self.outbound.resident()
    }
}

/// Not one of those that the kernel gives to clients (32,768 and up): who asks for such a port until somebody listens there
/// meets itself sooner or later, and then keeps the port from whoever was to listen.
fn free_port() -> io::Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && port < 32_000 => {}
            bound => return bound?.local_addr(),
        }
    }
}

type Sides = [(&'static str, Command); 2];

fn sides(bench: &Bench<'_>, system: System, dir: &Path, entry: SocketAddr, middle: SocketAddr) -> io::Result<Sides> {
    let options = |http| if http == Http::Two { "http2_protocol_options" } else { "http_protocol_options" };
    let alpn = |http| if http == Http::Two { "h2" } else { "http/1.1" };
    let words = BTreeMap::from([
        ("dir", dir.display().to_string()),
        ("pki", bench.pki.path("").display().to_string().trim_end_matches('/').to_string()),
        ("nofile", "19000".to_string()),
        ("outbound", entry.to_string()),
        ("outbound_ip", entry.ip().to_string()),
        ("outbound_port", entry.port().to_string()),
        ("inbound", middle.to_string()),
        ("inbound_ip", middle.ip().to_string()),
        ("inbound_port", middle.port().to_string()),
        ("origin", bench.origin.to_string()),
        ("origin_ip", bench.origin.ip().to_string()),
        ("origin_port", bench.origin.port().to_string()),
        // Without TLS, nginx serves HTTP/2 on ports that serve nothing else.
        ("listen_http2", if system.client == Http::Two { "http2".into() } else { String::new() }),
        ("between_alpn", alpn(system.between).to_string()),
        ("between_options", options(system.between).to_string()),
        ("origin_options", options(system.origin).to_string()),
        ("origin_proto", if system.origin == Http::Two { "proto h2".into() } else { String::new() }),
    ]);
    let write = |name: &str| {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(name))?;
        let text = words.iter().fold(text, |text, (word, value)| text.replace(&format!("{{{{{word}}}}}"), value));
        let path = dir.join(name);
        fs::write(&path, text)?;
        io::Result::Ok(path)
    };
    let programs = bench.programs;
    let command = |side: &str| {
        let mut command;
        match system.make {
            Make::Nginx => {
                command = Command::new(&programs.nginx);
                command.arg("-p").arg(dir).arg("-c").arg(write(&format!("nginx.{side}.conf"))?);
            }
            Make::Haproxy => {
                command = Command::new(&programs.haproxy);
                command.arg("-f").arg(write(&format!("haproxy.{side}.conf"))?);
            }
            Make::Envoy => {
                command = Command::new(&programs.envoy);
                command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"]);
                command.arg(write(&format!("envoy.{side}.yaml"))?);
            }
            Make::Sheetbend | Make::Before | Make::Bare => {
                if side == "inbound" {
                    command = sheetbend(bench, system.make, dir, system.service(), &middle.to_string())?;
                    command.args(["--port", &bench.origin.port().to_string(), "--app", "127.0.0.1"]);
                    command.args(["--allow", pki::CALLER]);
                } else {
                    command = sheetbend(bench, system.make, dir, "caller", "127.0.0.1:0")?;
                    command.args(["--explicit", &entry.to_string()]);
                }
            }
        }
        io::Result::Ok(command)
    };
    Ok([("inbound.log", command("inbound")?), ("outbound.log", command("outbound")?)])
}

/// One sidecar of ours. Everything is on as usual: identity and discovery from a control plane, reports to it, metrics.
fn sheetbend(bench: &Bench<'_>, make: Make, dir: &Path, service: &str, inbound: &str) -> io::Result<Command> {
    let before = bench.programs.before.as_ref().filter(|_| make == Make::Before);
    let mut command = Command::new(before.unwrap_or(&bench.programs.sheetbend));
    command.args(["--control-plane", &bench.mesh.url, "--admin", "127.0.0.1:0", "--health", "127.0.0.1:0"]);
    command.arg("--strict");
    command.args(["--outbound", "127.0.0.1:0", "--inbound", inbound]);
    command.arg("--token-file").arg(bench.mesh.token(service, dir)?);
    Ok(command)
}

/// A sidecar of ours that calls others, and where its clients connect.
pub(crate) fn start_caller(bench: &Bench<'_>) -> io::Result<(Proc, SocketAddr)> {
    let dir = tempfile::tempdir_in(bench.scratch)?.keep();
    let entry = free_port()?;
    let mut command = sheetbend(bench, Make::Sheetbend, &dir, "caller", "127.0.0.1:0")?;
    // Whoever is not registered yet is not looked for elsewhere.
    command.args(["--explicit", &entry.to_string(), "--deny-unknown"]);
    Ok((Proc::start(&mut command, &dir.join("caller.log"))?, entry))
}
