//! A mesh of a story's own: `sheetbend run` beside each program, in a state folder of its own.

use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::graph::{Edge, edges};
use crate::look::{counter, listening, registered};
use crate::netns::Host;
use crate::process::{Finished, Process, finish};
use crate::wait::{free_port, loopback, until, until_accepts};

/// How long a process may take to become ready, or anything else to happen: a busy machine is slow, not broken.
pub const START: Duration = Duration::from_secs(60);

/// A mesh. Dropping it ends nothing that [`Run::start`] gave away; those end themselves.
#[derive(Debug)]
pub struct Mesh {
    control_plane: Option<ControlPlane>,
    folder: TempDir,
}

#[derive(Debug)]
struct ControlPlane {
    process: Option<Process>,
    listen: SocketAddr,
    admin: SocketAddr,
    netns: Option<String>,
    flags: Vec<String>,
}

impl Mesh {
    /// A mesh without a control plane of its own: the first `run` serves one.
    pub fn local() -> Self {
        let folder = tempfile::Builder::new().prefix("sheetbend-story-").tempdir().expect("a temporary folder");
        Self { control_plane: None, folder }
    }

    /// A mesh with a CA and a control plane process on loopback; `flags` are added to `sheetbend control-plane`.
    pub fn with_control_plane(flags: &[&str]) -> Self {
        Self::start(flags, None, None, loopback(free_port()))
    }

    /// The same, with resources for the control plane to read (YAML); [`Mesh::write_resources`] changes them.
    pub fn with_resources(resources: &str, flags: &[&str]) -> Self {
        Self::start(flags, Some(resources), None, loopback(free_port()))
    }

    /// The same on a host made of a network namespace, on 15112 of its IPv4 address.
    pub fn with_control_plane_on(host: &Host, flags: &[&str]) -> Self {
        Self::on(host, None, flags)
    }

    /// The same, with resources for the control plane to read (YAML); [`Mesh::write_resources`] changes them.
    pub fn with_resources_on(host: &Host, resources: &str, flags: &[&str]) -> Self {
        Self::on(host, Some(resources), flags)
    }

    fn on(host: &Host, resources: Option<&str>, flags: &[&str]) -> Self {
        let address = host.v4.to_string();
        let flags = [flags, &["--dns", &address]].concat();
        Self::start(&flags, resources, Some(host.name().into()), SocketAddr::new(host.v4.into(), 15112))
    }

    fn start(flags: &[&str], resources: Option<&str>, netns: Option<String>, listen: SocketAddr) -> Self {
        let mut mesh = Self::local();
        let ca = mesh.ca();
        mesh.finish(&[OsStr::new("certs"), "init".as_ref(), "--dir".as_ref(), ca.as_ref()]).ok();
        let mut flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        if let Some(resources) = resources {
            mesh.write_resources(resources);
            flags.extend(["--resources".into(), mesh.resources().display().to_string()]);
        }
        let admin = loopback(free_port());
        mesh.control_plane = Some(ControlPlane { process: None, listen, admin, netns, flags });
        mesh.start_control_plane();
        mesh
    }

    /// Replaces what the control plane reads, which it notices by itself.
    pub fn write_resources(&self, yaml: &str) {
        let folder = self.resources();
        std::fs::create_dir_all(&folder).expect("a folder for resources");
        // Whole or not at all, as a careful editor does.
        let (whole, part) = (folder.join("mesh.yaml"), folder.join("mesh.new"));
        std::fs::write(&part, yaml).and_then(|()| std::fs::rename(part, whole)).expect("the resources are written");
    }

    fn resources(&self) -> PathBuf {
        self.folder.path().join("resources")
    }

    /// Starts the control plane (again), and waits until it serves.
    pub fn start_control_plane(&mut self) {
        let folder = self.folder.path().to_path_buf();
        let ca = self.ca();
        let control_plane = self.control_plane.as_mut().expect("a mesh with a control plane");
        let mut command = in_namespace(control_plane.netns.as_deref(), &crate::binary("sheetbend"));
        command.args(["control-plane", "--dir"]).arg(ca);
        command.args(["--listen", &control_plane.listen.to_string(), "--admin", &control_plane.admin.to_string()]);
        command.args(&control_plane.flags).env("XDG_STATE_HOME", &folder);
        let process = control_plane.process.insert(Process::spawn("control-plane", &folder, command));
        match control_plane.netns.as_deref() {
            None => {
                until_accepts(control_plane.admin, START);
                until_accepts(control_plane.listen, START);
            }
            Some(netns) => until("the control plane accepts", START, || {
                assert!(process.is_alive(), "{}", process.told());
                crate::netns::listens(netns, control_plane.listen.port()).then_some(())
            }),
        }
    }

    /// Ends the control plane as `kill -9` does.
    pub fn kill_control_plane(&mut self) {
        let control_plane = self.control_plane.as_mut().expect("a mesh with a control plane");
        control_plane.process.take().expect("a control plane that runs").kill();
    }

    /// The control plane's process.
    pub fn control_plane(&mut self) -> &mut Process {
        self.control_plane.as_mut().and_then(|c| c.process.as_mut()).expect("a control plane that runs")
    }

    /// Where the control plane's admin and graph page are.
    pub fn control_plane_admin(&self) -> SocketAddr {
        self.control_plane.as_ref().expect("a mesh with a control plane").admin
    }

    /// The edges of the merged graph.
    pub async fn edges(&self) -> Vec<Edge> {
        edges(self.control_plane_admin()).await
    }

    /// Where the control plane serves certificates and discovery.
    pub fn control_plane_address(&self) -> SocketAddr {
        self.control_plane.as_ref().expect("a mesh with a control plane").listen
    }

    /// The CA's folder: that of the control plane, or the one that `run` made.
    pub fn ca(&self) -> PathBuf {
        match self.control_plane {
            Some(_) => self.folder.path().join("ca"),
            None if self.folder.path().join("sheetbend/ca").exists() => self.folder.path().join("sheetbend/ca"),
            None => self.folder.path().join("ca"),
        }
    }

    /// A folder for the story's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// `sheetbend ARGS…` for this mesh.
    pub fn sheetbend<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Command {
        let mut command = Command::new(crate::binary("sheetbend"));
        command.args(args).env("XDG_STATE_HOME", self.folder.path());
        command
    }

    /// Runs `sheetbend ARGS…` to its end.
    pub fn finish<I: IntoIterator<Item: AsRef<OsStr>>>(&self, args: I) -> Finished {
        finish(self.sheetbend(args), START)
    }

    /// A join token for a service.
    pub fn token(&self, service: &str) -> String {
        let mut create = self.sheetbend(["token", "create", "--ttl", "10m", "--service", service]);
        create.arg("--dir").arg(self.ca());
        finish(create, START).ok()
    }

    /// Waits until the control plane knows that a sidecar serves so many ports: whoever asks from then on is told of it.
    pub(crate) fn until_registered(&self, service: &str, sidecar: &mut Process, ports: usize) {
        until(&format!("{service} is registered"), START, || {
            assert!(sidecar.is_alive(), "{}", sidecar.told());
            // It says so itself, whoever serves it at the moment.
            let said: Value =
                serde_json::from_slice(&std::fs::read(self.ca().join("control-plane.json")).ok()?).ok()?;
            let admin = said["admin"].as_str()?.trim_start_matches("http://").parse().ok()?;
            let look = || registered(admin, service, Some(sidecar.id()));
            let found = match self.control_plane.as_ref().and_then(|c| c.netns.as_deref()) {
                None => look(),
                Some(netns) => crate::netns::within(netns, look),
            };
            (found? >= ports).then_some(())
        });
    }

    /// A program beside its own sidecar, as `service`.
    pub fn run(&self, service: &str) -> Run<'_> {
        Run {
            mesh: self,
            service: service.into(),
            port: None,
            flags: Vec::new(),
            netns: None,
            environment: Vec::new(),
            files: None,
        }
    }

    /// A sidecar with no program of its own: the story itself calls through it.
    pub fn caller(&self, service: &str) -> Sidecar {
        self.run(service).caller()
    }

    /// Issues a certificate by hand and gives the folder with `cert.pem`, `key.pem` and `bundle.pem`.
    pub fn certificate(&self, name: &str, flags: &[&str]) -> PathBuf {
        let out = self.folder.path().join(format!("cert-{name}"));
        if out.exists() {
            return out;
        }
        let mut command = self.sheetbend(["certs", "issue", "--dir"]);
        command.arg(self.ca()).args(flags).arg("--out").arg(&out);
        finish(command, START).ok();
        out
    }
}

/// How a program is to be run beside its sidecar.
#[derive(Debug)]
pub struct Run<'a> {
    mesh: &'a Mesh,
    service: String,
    port: Option<u16>,
    flags: Vec<String>,
    netns: Option<String>,
    environment: Vec<(String, String)>,
    files: Option<u32>,
}

impl Run<'_> {
    /// The port on which the program serves.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// A flag of `sheetbend run`, with its value where it has one.
    pub fn flag(mut self, words: &[&str]) -> Self {
        self.flags.extend(words.iter().map(ToString::to_string));
        self
    }

    /// A local port that leads to `target` (`postgres` or `postgres:5432`).
    pub fn upstream(self, local: u16, target: &str) -> Self {
        self.flag(&["--upstream", &format!("{local}:{target}")])
    }

    /// A variable of the program's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// With room for so many open files.
    pub fn files(mut self, files: u32) -> Self {
        self.files = Some(files);
        self
    }

    /// On a host made of a network namespace, known to others by `address`.
    pub fn on(mut self, host: &Host, address: IpAddr) -> Self {
        self.netns = Some(host.name().into());
        self.flag(&["--advertise", &address.to_string()])
    }

    /// The whole command.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, program: I) -> Command {
        let mut command = match self.files {
            None => in_namespace(self.netns.as_deref(), &crate::binary("sheetbend")),
            Some(files) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {files}; exec \"$@\""), "sh"]).arg(crate::binary("sheetbend"));
                shell
            }
        };
        command.env("XDG_STATE_HOME", self.mesh.folder.path()).envs(self.environment.iter().cloned());
        command.args(["run", "--service", &self.service]).args(&self.flags);
        if let Some(port) = self.port {
            command.args(["--port", &port.to_string()]);
        }
        if let Some(control_plane) = &self.mesh.control_plane {
            let token = self.mesh.token(&self.service);
            let file = tempfile::Builder::new().prefix("token-").tempfile_in(self.mesh.folder.path());
            let (_, file) = file.and_then(|f| Ok(f.keep()?)).expect("a file for the token");
            std::fs::write(&file, token).expect("the token is written");
            command.args(["--control-plane", &format!("https://{}", control_plane.listen), "--token-file"]).arg(file);
        }
        command.arg("--").args(program);
        command
    }

    /// How many ports the program serves.
    fn ports(&self) -> usize {
        usize::from(self.port.is_some()) + self.flags.iter().filter(|flag| *flag == "--port").count()
    }

    /// Starts it, and waits until the program accepts on its port and others can call it.
    pub fn start<I: IntoIterator<Item: AsRef<OsStr>>>(self, program: I) -> Sidecar {
        let command = self.command(program);
        let mut sidecar = self.spawn(command);
        if let Some(port) = self.port {
            until(&format!("{} accepts on {port}", self.service), START, || {
                assert!(sidecar.process.is_alive(), "{}", sidecar.process.told());
                match &self.netns {
                    None => std::net::TcpStream::connect(loopback(port)).is_ok().then_some(()),
                    Some(netns) => crate::netns::listens(netns, port).then_some(()),
                }
            });
        }
        self.mesh.until_registered(&self.service, &mut sidecar.process, self.ports());
        sidecar
    }

    /// A sidecar for a server that the story itself runs, on the port given before.
    pub fn serve(self) -> Sidecar {
        self.start(["sleep", "3600"])
    }

    /// Runs it to its end.
    pub fn finish<I: IntoIterator<Item: AsRef<OsStr>>>(self, program: I) -> Finished {
        finish(self.command(program), Duration::from_secs(60))
    }

    /// Runs it, and twice more at most until it ends well, and gives what it printed then. A control plane that is held up
    /// for a second, or a server for some, is an error to who asks just then; one that fails again and again is broken.
    pub fn until_ok<I: IntoIterator<Item: AsRef<OsStr>> + Clone>(self, program: I) -> String {
        for _ in 0..2 {
            let said = finish(self.command(program.clone()), START);
            if said.status.success() {
                return said.stdout;
            }
        }
        finish(self.command(program), START).ok()
    }

    /// A sidecar with no program of its own: the story itself calls through [`Sidecar::proxy`].
    pub fn caller(self) -> Sidecar {
        let command = self.command(["sh", "-c", "echo proxy=$http_proxy; exec sleep 3600"]);
        let mut sidecar = self.spawn(command);
        let line = sidecar.process.wait_for("proxy=", START);
        let address = line.rsplit("//").next().unwrap_or_default().trim_end_matches('/');
        sidecar.proxy = Some(address.parse().unwrap_or_else(|e| panic!("{e}: {line}")));
        sidecar
    }

    fn spawn(&self, command: Command) -> Sidecar {
        let process = Process::spawn(&format!("run-{}-{}", self.service, free_port()), self.mesh.folder(), command);
        Sidecar {
            process,
            service: self.service.clone(),
            proxies: self.mesh.folder.path().join("sheetbend/proxies"),
            proxy: None,
        }
    }
}

/// A running `sheetbend run`. Dropping it ends it and its program.
#[derive(Debug)]
pub struct Sidecar {
    /// The process of `sheetbend run`.
    pub process: Process,
    /// The service it stands for.
    pub service: String,
    proxies: PathBuf,
    proxy: Option<SocketAddr>,
}

impl Sidecar {
    /// What its program would find in `http_proxy`; only of a [`Mesh::caller`].
    pub fn proxy(&self) -> SocketAddr {
        self.proxy.expect("a sidecar made by `caller`")
    }

    /// What it has written about itself for `sheetbend graph` to find.
    pub fn state(&self) -> Value {
        let file = self.proxies.join(format!("{}.json", self.process.id()));
        until(&format!("{} is written", file.display()), START, || {
            serde_json::from_slice(&std::fs::read(&file).ok()?).ok()
        })
    }

    /// Where its program's calls go, for a server that the story itself runs.
    pub fn outbound(&self) -> SocketAddr {
        let state = self.state();
        let url = state["outbound"].as_str().unwrap_or_default();
        let address = url.trim_start_matches("http://").trim_end_matches('/');
        address.parse().unwrap_or_else(|e| panic!("{e}: {state}"))
    }

    /// Its admin port.
    pub fn admin(&self) -> SocketAddr {
        let state = self.state();
        let url = state["admin"].as_str().unwrap_or_default().to_string();
        let address = url.trim_start_matches("http://").trim_end_matches('/');
        address.parse().unwrap_or_else(|e| panic!("{e}: {state}"))
    }

    /// Where other sidecars connect to it: where its process listens beside its admin and its explicit listener. Only
    /// where it serves no control plane too.
    pub fn inbound(&self) -> SocketAddr {
        let state = self.state();
        let known = ["admin", "outbound"].map(|key| state[key].as_str().unwrap_or_default().to_string());
        until(&format!("{} listens for others", self.service), START, || {
            let mut others = listening(self.process.id());
            others.retain(|address| !known.iter().any(|url| url.trim_start_matches("http://") == address.to_string()));
            others.first().copied().filter(|_| others.len() == 1)
        })
    }

    /// The edges that it has seen.
    pub async fn edges(&self) -> Vec<Edge> {
        edges(self.admin()).await
    }

    /// Asks for `url` through its explicit listener until the answer is a good one: a service that has just started is
    /// known a moment later.
    pub async fn first_answer(&self, url: &str) -> crate::http::Answer {
        let what = format!("{} gets a first answer from {url}", self.service);
        crate::wait::eventually(&what, START, || async {
            crate::http::get(self.proxy(), url).await.ok().filter(|answer| answer.status.is_success())
        })
        .await
    }

    /// One of its admin's pages.
    pub async fn page(&self, path: &str) -> crate::http::Answer {
        crate::http::get(self.admin(), path).await.unwrap_or_else(|e| panic!("{path} of {}: {e}", self.service))
    }

    /// The sum of a counter over all of its labels that contain each of `labels` (`response_code="200"`).
    pub async fn counter(&self, name: &str, labels: &[&str]) -> f64 {
        counter(&self.page("/metrics").await.text(), name, labels)
    }
}

fn in_namespace(netns: Option<&str>, program: &Path) -> Command {
    let Some(netns) = netns else { return Command::new(program) };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns]).arg(program);
    command
}
