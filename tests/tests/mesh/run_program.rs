//! `sheetbend run` and its program: how it starts, which signals it gets, how its end is told.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use sheetbend_tests::{Finished, Mesh, Process, START, finish, until};

/// Waits until a file holds `text`, and gives all of it.
#[track_caller]
fn file_says(file: &Path, text: &str) -> String {
    until(&format!("{} says {text}", file.display()), START, || {
        std::fs::read_to_string(file).ok().filter(|content| content.contains(text))
    })
}

/// A program that writes down each signal it gets, and ends by itself with status 7 on SIGTERM and 9 on SIGINT, a
/// moment after the first so that a second would be seen.
const COUNTS_SIGNALS: &str = r#"
trap 'echo INT >> "$0"; code=9' INT
trap 'echo TERM >> "$0"; code=7' TERM
trap 'echo HUP >> "$0"' HUP
code=
echo ready >> "$0"
while [ -z "$code" ]; do sleep 0.05; done
i=0; while [ $i -lt 10 ]; do sleep 0.05; i=$((i+1)); done
exit $code
"#;

struct Counting {
    run: Process,
    file: PathBuf,
}

impl Counting {
    fn start(mesh: &Mesh) -> Self {
        let file = mesh.folder().join("signals");
        let command = mesh.run("counts").command(["sh", "-c", COUNTS_SIGNALS, file.to_str().unwrap()]);
        let run = Process::spawn("run-counts", mesh.folder(), command);
        file_says(&file, "ready");
        Self { run, file }
    }

    fn heard(&self, signal: &str) -> usize {
        let said = std::fs::read_to_string(&self.file).unwrap();
        said.lines().filter(|line| *line == signal).count()
    }
}

#[test]
fn run_ends_with_its_program_s_exit_status() {
    let mesh = Mesh::local();
    for (script, expected) in [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)] {
        let ended = mesh.run("ends").finish(["sh", "-c", script]);
        assert_eq!(ended.status.code(), Some(expected), "{script}: {}", ended.stderr);
    }
}

#[test]
fn a_program_that_is_not_there_is_127_and_one_that_cannot_be_executed_126() {
    let mesh = Mesh::local();
    let missing = mesh.run("ends").finish(["no-such-program-anywhere"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(missing.stderr.contains("no-such-program-anywhere: command not found"), "{}", missing.stderr);
    let folder = mesh.run("ends").finish([mesh.folder()]);
    assert_eq!(folder.status.code(), Some(126));
    assert!(folder.stderr.contains("cannot be executed"), "{}", folder.stderr);
}

#[test]
fn sigterm_to_run_reaches_the_program_once() {
    let mesh = Mesh::local();
    let mut counting = Counting::start(&mesh);
    counting.run.signal(Signal::TERM);
    assert_eq!(counting.run.wait(START).code(), Some(7));
    assert_eq!(counting.heard("TERM"), 1);
}

#[test]
fn sigint_to_run_alone_reaches_the_program_once() {
    let mesh = Mesh::local();
    let mut counting = Counting::start(&mesh);
    counting.run.signal(Signal::INT);
    assert_eq!(counting.run.wait(START).code(), Some(9));
    assert_eq!(counting.heard("INT"), 1);
}

#[test]
fn sigint_to_the_whole_group_reaches_the_program_once() {
    let mesh = Mesh::local();
    let mut counting = Counting::start(&mesh);
    counting.run.signal_group(Signal::INT);
    assert_eq!(counting.run.wait(START).code(), Some(9));
    assert_eq!(counting.heard("INT"), 1);
}

#[test]
fn sighup_reaches_the_program_and_ends_nothing_by_itself() {
    let mesh = Mesh::local();
    let mut counting = Counting::start(&mesh);
    counting.run.signal(Signal::HUP);
    file_says(&counting.file, "HUP");
    assert!(counting.run.is_alive());
    counting.run.signal(Signal::TERM);
    assert_eq!(counting.run.wait(START).code(), Some(7));
    assert_eq!(counting.heard("HUP"), 1);
}

/// Runs its arguments on a terminal of their own, types Ctrl-C once the file says `ready`, and ends as they end.
const TERMINAL: &str = r#"
import os, pty, sys, time
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
deadline = time.time() + 30
while time.time() < deadline:
    if os.path.exists(sys.argv[1]) and "ready" in open(sys.argv[1]).read():
        break
    time.sleep(0.02)
os.write(terminal, b"\x03")
try:
    while os.read(terminal, 4096):
        pass
except OSError:
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)
"#;

#[test]
fn ctrl_c_on_a_terminal_reaches_the_program_once() {
    let python = sheetbend_tests::need!(sheetbend_tests::python(&[]));
    let mesh = Mesh::local();
    let file = mesh.folder().join("signals");
    let run = mesh.run("counts").command(["sh", "-c", COUNTS_SIGNALS, file.to_str().unwrap()]);
    let mut command = Command::new(python);
    command.args(["-c", TERMINAL]).arg(&file).arg(run.get_program()).args(run.get_args());
    command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let ended = finish(command, START * 2);
    assert_eq!(ended.status.code(), Some(9), "{ended:?}");
    let said = std::fs::read_to_string(&file).unwrap();
    assert_eq!(said.lines().filter(|line| *line == "INT").count(), 1);
}

#[test]
fn a_program_dies_with_a_run_that_is_killed() {
    let mesh = Mesh::local();
    let file = mesh.folder().join("pid");
    let script = r#"echo $$ > "$0"; exec sleep 600"#;
    let command = mesh.run("dies").command(["sh", "-c", script, file.to_str().unwrap()]);
    let mut run = Process::spawn("run-dies", mesh.folder(), command);
    let pid = file_says(&file, "\n").trim().to_string();
    run.kill();
    until("the program is gone", START, || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        stat.is_none_or(|stat| stat.contains(") Z ")).then_some(())
    });
}

#[test]
fn a_signal_that_was_ignored_stays_ignored_in_the_program() {
    let mesh = Mesh::local();
    let run = mesh.run("nohup").command(["sh", "-c", "kill -HUP $$; echo survived"]);
    let mut command = Command::new("sh");
    command.args(["-c", r#"trap "" HUP; exec "$@""#, "sh"]).arg(run.get_program()).args(run.get_args());
    command.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    assert_eq!(finish(command, START).ok().trim(), "survived");
}

#[test]
fn a_program_finds_its_sidecar_in_its_environment_and_what_it_prints_is_its_own() {
    let mesh = Mesh::local();
    let run = mesh.run("looks").env("no_proxy", "intra.example").env("HTTP_PROXY", "");
    let script =
        r#"echo "$http_proxy $https_proxy $HTTP_PROXY $HTTPS_PROXY $grpc_proxy"; echo "$no_proxy"; echo "$NO_PROXY""#;
    let ended = run.finish(["sh", "-c", script]);
    let stdout = ended.ok();
    let lines: Vec<&str> = stdout.lines().collect();
    let proxies: Vec<&str> = lines[0].split(' ').collect();
    assert_eq!(proxies.len(), 5);
    assert!(proxies.iter().all(|p| *p == proxies[0] && p.starts_with("http://127.0.0.1:")), "{stdout}");
    assert!(lines[1].starts_with("intra.example,localhost,127.0.0.1,") && lines[1] == lines[2], "{stdout}");
    assert_eq!(lines.len(), 3, "{stdout}");
}

#[test]
fn every_wrong_flag_is_told_at_once_with_status_2() {
    let mesh = Mesh::local();
    let wrong = [
        "run",
        "--service",
        "Web",
        "--port",
        "0",
        "--upstream",
        "5432",
        "--allow",
        "http://x",
        "--control-plane",
        "http://h",
        "--",
        "true",
    ];
    let Finished { status, stderr, .. } = mesh.finish(wrong);
    assert_eq!(status.code(), Some(2), "{stderr}");
    for told in
        ["--service `Web`", "--port `0`", "--upstream `5432`", "--allow `http://x`", "https://HOST", "--token-file"]
    {
        assert!(stderr.contains(told), "no word of {told} in: {stderr}");
    }
    let none = mesh.finish(["run", "--service", "web"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(none.stderr.contains("CMD"), "{}", none.stderr);
}

#[test]
fn a_token_file_that_cannot_be_read_is_named() {
    let mesh = Mesh::local();
    let args = ["run", "--service", "web", "--control-plane", "https://192.0.2.1:15112", "--token-file", "/no/such"];
    let refused = mesh.finish(args.into_iter().chain(["--", "true"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("/no/such: cannot be read: No such file"), "{}", refused.stderr);
}

#[test]
fn a_sidecar_leaves_nothing_behind_in_the_state_folder() {
    let mesh = Mesh::local();
    mesh.run("brief").finish(["true"]).ok();
    let left = std::fs::read_dir(mesh.folder().join("sheetbend/proxies")).unwrap().count();
    assert_eq!(left, 0);
}
