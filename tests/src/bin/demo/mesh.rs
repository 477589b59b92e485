//! The control plane of the demo, and how a program joins it: what a user would type, typed for him.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sheetbend_tests::{Process, finish, free_port, loopback, registered};
use tempfile::TempDir;

use crate::STOP;
use crate::graph::Graph;

/// How long a part of the demo may take to start: a busy machine is slow, not broken.
const START: Duration = Duration::from_secs(30);

/// A control plane in a folder of its own.
pub(crate) struct Mesh {
    programs: PathBuf,
    folder: TempDir,
    control_plane: Process,
    port: u16,
    admin: u16,
}

impl Mesh {
    pub(crate) fn start() -> Result<Self, String> {
        let me = std::env::current_exe().map_err(|e| format!("where am I? {e}"))?;
        let programs = me.parent().ok_or("an executable lies in a folder")?.to_path_buf();
        let folder = tempfile::Builder::new().prefix("sheetbend-demo-").tempdir().map_err(|e| e.to_string())?;
        let ca = folder.path().join("ca");
        let mut init = Command::new(programs.join("sheetbend"));
        init.args(["certs", "init", "--dir"]).arg(&ca);
        done(init)?;

        let (port, admin) = (free_port(), free_port());
        let mut command = Command::new(programs.join("sheetbend"));
        command.args(["control-plane", "--dir"]).arg(&ca);
        command.args(["--listen", &loopback(port).to_string(), "--admin", &loopback(admin).to_string()]);
        let mut mesh = Self {
            control_plane: Process::spawn("control-plane", folder.path(), command),
            programs,
            folder,
            port,
            admin,
        };
        for port in [port, admin] {
            accepts(&mut mesh.control_plane, port)?;
        }
        Ok(mesh)
    }

    /// Where the graph is.
    pub(crate) fn admin(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin)
    }

    /// The folder of the binaries.
    pub(crate) fn programs(&self) -> &Path {
        &self.programs
    }

    /// Starts `shop PART …` beside its own sidecar, as the service of that name, and waits until others can call it.
    pub(crate) fn run(
        &mut self,
        service: &str,
        port: Option<u16>,
        flags: &[String],
        part: &[String],
    ) -> Result<Process, String> {
        let token = self.folder.path().join(format!("{service}.token"));
        let mut create = Command::new(self.programs.join("sheetbend"));
        create
            .args(["token", "create", "--ttl", "10m", "--service", service, "--dir"])
            .arg(self.folder.path().join("ca"));
        std::fs::write(&token, done(create)?).map_err(|e| format!("{}: {e}", token.display()))?;

        let mut command = Command::new(self.programs.join("sheetbend"));
        command.env("XDG_STATE_HOME", self.folder.path());
        command.args(["run", "--service", service]);
        command.args(["--control-plane", &format!("https://127.0.0.1:{}", self.port), "--token-file"]).arg(&token);
        if let Some(port) = port {
            command.args(["--port", &port.to_string()]);
        }
        command.args(flags).arg("--").arg(self.programs.join("shop")).args(part);
        let mut process = Process::spawn(service, self.folder.path(), command);
        if let Some(port) = port {
            accepts(&mut process, port)?;
            let (admin, id) = (loopback(self.admin), process.id());
            until(&mut process, "is not registered", || registered(admin, service, Some(id)) == Some(1))?;
        }
        Ok(process)
    }

    /// The merged graph as it is now.
    pub(crate) fn graph(&self) -> Result<Graph, String> {
        Graph::parse(&self.show("json")?)
    }

    /// The merged graph as a table.
    pub(crate) fn table(&self) -> String {
        self.show("table").unwrap_or_else(|why| why)
    }

    fn show(&self, format: &str) -> Result<String, String> {
        let mut command = Command::new(self.programs.join("sheetbend"));
        command.args(["graph", "--proxy", &self.admin(), "-o", format]);
        done(command)
    }

    pub(crate) fn end(&mut self) -> Result<(), String> {
        let status = self.control_plane.stop();
        match status.success() {
            true => Ok(()),
            false => Err(format!("the control plane ended with {status}\n{}", self.control_plane.told())),
        }
    }
}

/// The stdout of a command that ends well.
fn done(command: Command) -> Result<String, String> {
    let words = format!("{command:?}");
    let finished = finish(command, START);
    match finished.status.success() {
        true => Ok(finished.stdout),
        false => Err(format!("{words}: {}\n{}{}", finished.status, finished.stdout, finished.stderr)),
    }
}

/// Waits until `process` accepts on a loopback port.
fn accepts(process: &mut Process, port: u16) -> Result<(), String> {
    until(process, &format!("does not accept on port {port}"), || {
        std::net::TcpStream::connect_timeout(&loopback(port), Duration::from_secs(1)).is_ok()
    })
}

/// Waits until something is so that a process has to bring about, and says what is wrong when that does not come.
fn until(process: &mut Process, wrong: &str, mut look: impl FnMut() -> bool) -> Result<(), String> {
    let deadline = Instant::now() + START;
    while !look() {
        if STOP.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
        if !process.is_alive() || Instant::now() > deadline {
            return Err(format!("a part {wrong}\n{}", process.told()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
