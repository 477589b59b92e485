//! Databases and mail through sidecars: protocols in which the client speaks first, and ones in which the server does.

use std::ffi::OsString;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sheetbend_tests::{Mesh, START, Sidecar, eventually, finish, free_port, need, program, python, until};

/// Waits until the server's sidecar shows the edge `caller → service` over TCP with mutual TLS.
async fn shows_tcp_edge(server: &Sidecar) {
    eventually("the edge is on the graph as tcp, with mutual TLS", START, || async {
        server.edges().await.into_iter().find(|e| e.is("caller", &server.service, "tcp") && e.mtls)
    })
    .await;
}

/// A folder that a daemon may use which refuses to run as root, and how to start a program as that daemon's user.
struct Daemon {
    folder: tempfile::TempDir,
    user: Vec<OsString>,
}

impl Daemon {
    fn of(user: &str) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { folder, user: Vec::new() });
        }
        let passwd = std::fs::read_to_string("/etc/passwd").map_err(|e| e.to_string())?;
        let line = passwd.lines().find_map(|line| line.strip_prefix(&format!("{user}:")));
        let mut ids = line.ok_or(format!("no user `{user}` on this machine"))?.split(':').skip(1);
        let mut id = || ids.next().and_then(|id| id.parse::<u32>().ok()).ok_or("a user without an id");
        let (uid, gid) = (id()?, id()?);
        chown(folder.path(), Some(uid), Some(gid)).map_err(|e| e.to_string())?;
        let setpriv = program("setpriv")?;
        let words = [format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".into()];
        let user = [setpriv.into_os_string()].into_iter().chain(words.map(OsString::from)).collect();
        Ok(Self { folder, user })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn words(&self, program: &Path, args: &[&str]) -> Vec<OsString> {
        let program = [program.as_os_str().to_owned()].into_iter();
        self.user.iter().cloned().chain(program).chain(args.iter().map(OsString::from)).collect()
    }

    fn finish(&self, program: &Path, args: &[&str]) -> String {
        let words = self.words(program, args);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(self.folder.path());
        finish(command, Duration::from_secs(120)).ok()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[tokio::test]
async fn redis_answers_through_two_sidecars() {
    let (server, cli) = (need!(program("redis-server")), need!(program("redis-cli")));
    let mesh = Mesh::local();
    let (port, local) = (free_port(), free_port());
    let words = [text(&server), "--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"];
    let redis = mesh.run("redis").port(port).start(words.into_iter().chain([text(mesh.folder())]));
    let ask = |args: &[&str]| {
        let words = [text(&cli), "-p", &local.to_string()].map(str::to_string).into_iter();
        let words = words.chain(args.iter().map(ToString::to_string));
        mesh.run("caller").upstream(local, "redis").until_ok(words)
    };
    assert_eq!(ask(&["SET", "knot", "sheet bend"]).trim(), "OK");
    assert_eq!(ask(&["GET", "knot"]).trim(), "sheet bend");
    shows_tcp_edge(&redis).await;
}

#[tokio::test]
async fn postgresql_answers_through_two_sidecars() {
    let (initdb, server) = (need!(program("initdb")), need!(program("postgres")));
    let psql = need!(program("psql"));
    let daemon = need!(Daemon::of("postgres"));
    let data = daemon.path("data");
    daemon.finish(&initdb, &["-D", text(&data), "-A", "trust", "-U", "app", "--no-sync"]);
    let mesh = Mesh::local();
    let (port, local) = (free_port(), free_port());
    let folder = text(daemon.folder.path());
    let port_text = port.to_string();
    let args = ["-D", text(&data), "-p", &port_text, "-c", "listen_addresses=127.0.0.1", "-k", folder];
    let postgres = mesh.run("postgres").port(port).start(daemon.words(&server, &args));
    let ask = |query: &str| {
        let url = format!("postgresql://app@127.0.0.1:{local}/postgres");
        mesh.run("caller").upstream(local, "postgres").finish([text(&psql), &url, "-AtXc", query])
    };
    // `the database system is starting up` is an answer too; wait for a better one.
    until("PostgreSQL answers", START, || (ask("select 6 * 7").stdout.trim() == "42").then_some(()));
    let rows = ask("select string_agg(n::text, '') from generate_series(1, 100000) n").ok();
    assert_eq!(rows.trim().len(), 488_895, "a long answer arrives whole");
    shows_tcp_edge(&postgres).await;
}

#[tokio::test]
async fn mariadb_which_speaks_first_answers_through_two_sidecars() {
    let (install, server) = (need!(program("mariadb-install-db")), need!(program("mariadbd")));
    let client = need!(program("mariadb"));
    let daemon = need!(Daemon::of("mysql"));
    let data = format!("--datadir={}", text(&daemon.path("data")));
    daemon.finish(&install, &["--no-defaults", &data, "--skip-test-db"]);
    let init = daemon.path("init.sql");
    std::fs::write(&init, "create user app@'%' identified by 'knot';\n").expect("the first statements");
    let mesh = Mesh::local();
    let (port, local) = (free_port(), free_port());
    let args = [
        "--no-defaults".to_string(),
        data,
        format!("--port={port}"),
        "--bind-address=127.0.0.1".into(),
        format!("--socket={}", text(&daemon.path("socket"))),
        format!("--init-file={}", text(&init)),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mariadb = mesh.run("mariadb").port(port).start(daemon.words(&server, &args));
    let flags = ["--no-defaults", "--host=127.0.0.1", "--user=app", "--password=knot", "-BN", "-e", "select 6 * 7"];
    let words = [text(&client).to_string(), flags[0].into(), format!("--port={local}")];
    let words: Vec<_> = words.into_iter().chain(flags[1..].iter().map(ToString::to_string)).collect();
    assert_eq!(mesh.run("caller").upstream(local, "mariadb").until_ok(words).trim(), "42");
    shows_tcp_edge(&mariadb).await;
}

#[tokio::test]
async fn a_mail_is_delivered_through_two_sidecars_although_the_server_speaks_first() {
    let python = need!(python(&["aiosmtpd"]));
    let swaks = need!(program("swaks"));
    let mesh = Mesh::local();
    let (port, local) = (free_port(), free_port());
    let listen = format!("127.0.0.1:{port}");
    let server =
        [text(&python), "-u", "-m", "aiosmtpd", "-n", "-l", &listen, "-c", "aiosmtpd.handlers.Debugging", "stdout"];
    let mut mail = mesh.run("mail").port(port).start(server);
    let server = format!("127.0.0.1:{local}");
    let words =
        [text(&swaks), "--server", &server, "--from", "a@example.org", "--to", "b@example.org", "--body", "tied well"];
    mesh.run("caller").upstream(local, "mail").until_ok(words);
    mail.process.wait_for("tied well", START);
    shows_tcp_edge(&mail).await;
}
