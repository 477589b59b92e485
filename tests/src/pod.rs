//! A pod of a story's own: a host whose traffic is redirected to a real sidecar, and an app, each under its own user.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::graph::{Edge, read_edges};
use crate::mesh::{Mesh, START};
use crate::need::{namespaces, program};
use crate::netns::Host;
use crate::process::{Finished, Process, finish};
use crate::wait::until;

mod scripts;

/// The user of the sidecar.
const PROXY: u32 = 1515;
/// The user of the app.
const APP: u32 = 2000;
/// A Python that every user may run; the one that is first on the PATH may be root's own.
pub const PYTHON: &str = "/usr/bin/python3";

/// What pods need of the machine.
pub fn pods() -> Result<(), String> {
    namespaces()?;
    ["nft", "curl", "setpriv"].into_iter().try_for_each(|name| program(name).map(drop))?;
    match Path::new(PYTHON).exists() {
        true => Ok(()),
        false => Err(format!("no {PYTHON} on this machine; as root, `make test` installs it")),
    }
}

/// How a pod is to be made.
#[derive(Debug)]
pub struct PodBuilder<'a> {
    mesh: &'a Mesh,
    host: &'a Host,
    service: String,
    flags: Vec<String>,
    intercept: Vec<String>,
    user: u32,
}

/// A pod. Dropping it ends its sidecar.
#[derive(Debug)]
pub struct Pod<'a> {
    /// Its network namespace.
    pub host: &'a Host,
    /// The sidecar.
    pub proxy: Process,
    folder: TempDir,
}

impl Mesh {
    /// A pod of `service` on a host made of a network namespace, which must reach the control plane.
    pub fn pod<'a>(&'a self, service: &str, host: &'a Host) -> PodBuilder<'a> {
        PodBuilder { mesh: self, host, service: service.into(), flags: Vec::new(), intercept: Vec::new(), user: PROXY }
    }
}

impl<'a> PodBuilder<'a> {
    /// A port of the app, known to others by `address`.
    pub fn port(self, address: IpAddr, port: u16) -> Self {
        self.flag(&["--advertise", &address.to_string(), "--port", &port.to_string()])
    }

    /// Flags of `sheetbend-proxy`.
    pub fn flag(mut self, words: &[&str]) -> Self {
        self.flags.extend(words.iter().map(ToString::to_string));
        self
    }

    /// Flags of `sheetbend intercept install`.
    pub fn intercept(mut self, words: &[&str]) -> Self {
        self.intercept.extend(words.iter().map(ToString::to_string));
        self
    }

    /// The user that the sidecar runs as, in place of the one whom the rules let through.
    pub fn user(mut self, user: u32) -> Self {
        self.user = user;
        self
    }

    /// Redirects the host's traffic, starts the sidecar and waits until it is ready.
    pub fn start(self) -> Pod<'a> {
        let mut install = self.host.command(crate::binary("sheetbend"));
        install.args(["intercept", "install"]).args(&self.intercept);
        finish(install, START).ok();
        let folder = readable_folder();
        let token = folder.path().join("token");
        fs::write(&token, self.mesh.token(&self.service)).expect("the token is written");
        let mut command = self.host.command_as(self.user, copy_of_the_proxy(folder.path()));
        command.args(["--control-plane", &format!("https://{}", self.mesh.control_plane_address()), "--token-file"]);
        command.arg(&token).args(&self.flags);
        let mut proxy = Process::spawn(&format!("proxy-{}", self.service), folder.path(), command);
        proxy.wait_for("ready", START);
        let ports = self.flags.iter().filter(|flag| *flag == "--port").count();
        self.mesh.until_registered(&self.service, &mut proxy, ports);
        Pod { host: self.host, proxy, folder }
    }
}

impl Pod<'_> {
    /// A command of the app's user.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.host.command_as(APP, program)
    }

    /// An HTTP server on an address and a port. It answers with `plain-text-of-the-answer PATH from CLIENT on NUMBER`, where
    /// the number is that of its own connection.
    pub fn http(&self, address: &str, port: u16) -> Process {
        serve(self.host, self.folder.path(), scripts::HTTP, &[address, &port.to_string()], port)
    }

    /// A TCP server that greets first, unless the greeting is empty, and then says back each line as `heard: LINE`.
    pub fn lines(&self, address: &str, port: u16, greeting: &str) -> Process {
        serve(self.host, self.folder.path(), scripts::LINES, &[address, &port.to_string(), greeting], port)
    }

    /// Connects and says a line as [`Pod::says`] does, or waits for a greeting first, until the answer is this one: for
    /// what was registered just now, or is asked of somebody who is held up.
    pub fn until_hears(&self, to: IpAddr, port: u16, greeting: bool, line: &str, answer: &str) {
        let how = if greeting { "listen" } else { "speak" };
        until(&format!("{to}:{port} answers {answer:?}"), START, || {
            (self.speak(to, port, how, line).stdout == answer).then_some(())
        });
    }

    /// What the app hears when it connects, says a line, and reads to the end.
    pub fn says(&self, to: IpAddr, port: u16, line: &str) -> Finished {
        self.speak(to, port, "speak", line)
    }

    /// The same, when it waits for the server's first line before it says anything.
    pub fn listens_then_says(&self, to: IpAddr, port: u16, line: &str) -> Finished {
        self.speak(to, port, "listen", line)
    }

    fn speak(&self, to: IpAddr, port: u16, how: &str, line: &str) -> Finished {
        let mut command = self.command(PYTHON);
        command.args(["-c", scripts::SPEAK, &to.to_string(), &port.to_string(), how, line]);
        finish(command, START)
    }

    /// Runs `curl` as the app, with what a script wants of it: no progress, but errors; 20 s at most.
    pub fn curl(&self, args: &[&str]) -> Finished {
        let mut command = self.command("curl");
        command.args(["-sS", "-m", "20"]).args(args);
        finish(command, START)
    }

    /// One of the sidecar's admin pages.
    pub fn page(&self, path: &str) -> String {
        self.curl(&[&format!("http://127.0.0.1:15100{path}")]).ok()
    }

    /// The edges that the sidecar has seen.
    pub fn edges(&self) -> Vec<Edge> {
        read_edges(&serde_json::from_str(&self.page("/graph?format=json")).expect("JSON"))
    }

    /// The sum of a counter of the sidecar over all of its labels that contain each of `labels`.
    pub fn counter(&self, name: &str, labels: &[&str]) -> f64 {
        crate::look::counter(&self.page("/metrics"), name, labels)
    }

    /// Waits until the app gets a good answer for these arguments of `curl`, and gives it: what was registered just now is
    /// known a moment later.
    pub fn first_answer(&self, args: &[&str]) -> String {
        let args = [&["--fail"], args].concat();
        let mut last = String::new();
        let answer = (0..600).find_map(|_| {
            let said = self.curl(&args);
            if said.status.success() {
                return Some(said.stdout);
            }
            last = said.stderr;
            std::thread::sleep(Duration::from_millis(50));
            None
        });
        answer.unwrap_or_else(|| panic!("no good answer for {args:?}: {last}\n{}", self.proxy.told()))
    }
}

/// A server outside the mesh, as [`Pod::lines`] makes one.
pub fn lines_on(host: &Host, folder: &Path, port: u16, greeting: &str) -> Process {
    serve(host, folder, scripts::LINES, &["::", &port.to_string(), greeting], port)
}

/// Runs a script as the app's user for as long as the value lives, and waits until it accepts on `port`.
fn serve(host: &Host, folder: &Path, script: &str, args: &[&str], port: u16) -> Process {
    let mut command = host.command_as(APP, PYTHON);
    command.args(["-u", "-c", script]).args(args);
    let process = Process::spawn(&format!("app-{port}"), folder, command);
    until(&format!("the app accepts on {port}"), START, || host.listens(port).then_some(()));
    process
}

/// A folder that every user may look into.
fn readable_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("sheetbend-pod-").tempdir().expect("a temporary folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a folder of ours");
    folder
}

/// The workspace may lie where the sidecar's user cannot go.
fn copy_of_the_proxy(folder: &Path) -> std::path::PathBuf {
    let (from, to) = (crate::binary("sheetbend-proxy"), folder.join("sheetbend-proxy"));
    if fs::hard_link(&from, &to).is_err() {
        // By another process: a child that another story starts meanwhile would hold the open file until it is itself, and
        // what is open for writing cannot be executed.
        let copied = Command::new("cp").args([&from, &to]).status();
        assert!(copied.is_ok_and(|status| status.success()), "a copy of the sidecar's program");
    }
    to
}
