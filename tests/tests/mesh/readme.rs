//! Every console block of the README does what it shows.
//!
//! The blocks run in their order, in one folder, on a host of their own (a network namespace: the ports are those that
//! the README names). `…` stands for anything: within a line, or, as a line, for any lines. A block marked `console runs`
//! goes on running while the blocks after it do.

use std::path::Path;
use std::process::Command;

use sheetbend_tests::{
    Host, Process, START, binary, finish, namespaces, need, program, registered, two_hosts, until, workspace,
};

/// A command of the README and what it prints.
struct Step {
    line: usize,
    command: String,
    expected: String,
    runs_on: bool,
}

impl Step {
    /// The service of which the command runs a server.
    fn serves(&self) -> Option<&str> {
        let mut words = self.command.split_whitespace();
        let service = words.find(|word| *word == "--service").and_then(|_| words.next());
        service.filter(|_| self.command.contains("--port "))
    }

    /// Whether it may be typed again, when whoever it asks was held up.
    fn only_looks(&self) -> bool {
        self.command.starts_with("sheetbend graph") || self.command.contains(" curl ")
    }

    /// Whether it needs what another one writes: a join token, which is good for one sidecar.
    fn needs(&self, other: &Step) -> bool {
        let file = other.command.rsplit_once("> ").map(|(_, file)| file);
        file.is_some_and(|file| self.command.contains(&format!("--token-file {file} ")))
    }
}

/// Whether a control plane that the README has started knows of a server of that name.
fn is_registered(folder: &Path, service: &str) -> bool {
    let known = |ca: &str| {
        let said = std::fs::read(folder.join(ca).join("control-plane.json")).ok()?;
        let said: serde_json::Value = serde_json::from_slice(&said).ok()?;
        let admin = said["admin"].as_str()?.trim_start_matches("http://").parse().ok()?;
        registered(admin, service, None)
    };
    [".local/state/sheetbend/ca", "mesh-ca"].into_iter().filter_map(known).any(|ports| ports > 0)
}

fn steps(readme: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut block = None;
    for (number, line) in readme.lines().enumerate() {
        match (block, line) {
            (None, "```console" | "```console runs") => block = Some(line == "```console runs"),
            (Some(_), "```") => block = None,
            (Some(runs_on), line) => match line.strip_prefix("$ ") {
                Some(command) => {
                    steps.push(Step { line: number + 1, command: command.into(), expected: String::new(), runs_on });
                }
                None => {
                    let step = steps.last_mut().expect("a block begins with a command");
                    let continued = step.expected.is_empty() && step.command.ends_with('\\');
                    let text = if continued { &mut step.command } else { &mut step.expected };
                    text.push_str(if continued { "\n" } else { "" });
                    text.push_str(line);
                    text.push_str(if continued { "" } else { "\n" });
                }
            },
            (None, _) => {}
        }
    }
    steps
}

/// Whether a line is as shown: `…` stands for any run of characters.
fn line_is(shown: &str, line: &str) -> bool {
    let mut rest = line;
    let mut parts = shown.split('…').map(str::trim_end).peekable();
    let Some(first) = parts.next() else { return rest.is_empty() };
    let Some(after) = rest.strip_prefix(first) else { return false };
    rest = after;
    if parts.peek().is_none() {
        return rest.trim().is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.trim_end().ends_with(part);
        }
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    true
}

/// Whether an output is as shown. With `more`, it may go on.
fn is(shown: &[&str], said: &[&str], more: bool) -> bool {
    match (shown.split_first(), said.split_first()) {
        (None, None) => true,
        (None, Some(_)) => more,
        (Some((&"…", rest)), _) => (0..=said.len()).any(|skipped| is(rest, &said[skipped..], more)),
        (Some(_), None) => false,
        (Some((first, rest)), Some((line, lines))) => line_is(first, line) && is(rest, lines, more),
    }
}

fn as_shown(shown: &str, said: &str, more: bool) -> bool {
    let lines = |text: &str| text.trim_end().lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>();
    let (shown, said) = (lines(shown), lines(said));
    let shown: Vec<&str> = shown.iter().map(String::as_str).collect();
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    is(&shown, &said, more)
}

fn shell(host: &Host, folder: &Path, command: &str) -> Command {
    let programs = binary("sheetbend").parent().expect("a binary lies in a folder").to_path_buf();
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = host.command("bash");
    // Both outputs in the order in which they come, as a terminal shows them.
    shell.args(["-c", &format!("exec 2>&1\n{command}")]).current_dir(folder);
    shell.env("PATH", format!("{}:{path}", programs.display()));
    shell.env("HOME", folder).env_remove("XDG_STATE_HOME").env("TERM", "dumb");
    shell
}

#[test]
fn every_console_block_of_the_readme_prints_what_it_shows() {
    need!(namespaces());
    need!(program("python3"));
    need!(program("curl"));
    need!(program("nft"));
    let readme = std::fs::read_to_string(workspace().join("README.md")).expect("the README");
    let folder = tempfile::tempdir().expect("a temporary folder");
    // With an address, as hosts have one: `intercept check` tries to call it.
    let (host, _peer) = two_hosts();
    let mut running = Vec::new();
    let steps = steps(&readme);
    assert!(!steps.is_empty(), "the README shows commands");
    for step in &steps {
        let command = shell(&host, folder.path(), &step.command);
        let place = format!("README.md:{}: $ {}", step.line, step.command);
        if step.runs_on {
            let process = Process::spawn(&format!("line-{}", step.line), folder.path(), command);
            until(&format!("{place}\nto print\n{}", step.expected), START, || {
                as_shown(&step.expected, &process.stdout(), true).then_some(())
            });
            // Whoever reads this types the next command some seconds later; by then it is registered.
            if let Some(service) = step.serves() {
                let look = || is_registered(folder.path(), service).then_some(());
                until(&format!("{place}\nto be registered"), START, || host.within(look));
            }
            running.push(process);
            continue;
        }
        let mut said = finish(command, START).stdout;
        // Twice more at most: what fails again and again is not what the README shows.
        let mut more = 2;
        while step.only_looks() && !as_shown(&step.expected, &said, false) && more > 0 {
            more -= 1;
            for again in steps.iter().filter(|other| step.needs(other)).chain([step]) {
                said = finish(shell(&host, folder.path(), &again.command), START).stdout;
            }
        }
        let shown = as_shown(&step.expected, &said, false);
        assert!(shown, "{place}\n--- shows\n{}--- prints\n{said}", step.expected);
    }
    // The last started ends first: who depends on another goes before it.
    while let Some(process) = running.pop() {
        drop(process);
    }
}

#[test]
fn the_wildcard_of_a_console_block_stands_for_anything() {
    assert!(as_shown("a\n…\nz\n", "a\nb\nc\nz", false));
    assert!(as_shown("from … to … end", "from 1 to 2 end", false));
    assert!(as_shown("a …", "a b c", false));
    assert!(as_shown("a\n", "a\nb\n", true));
    assert!(!as_shown("a\n", "a\nb\n", false));
    assert!(!as_shown("a\n…\nz\n", "a\nb\n", false));
    assert!(!as_shown("from … to 3", "from 1 to 2", false));
}
