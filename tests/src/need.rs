//! What a story needs from the machine, and how it is left out where that is missing.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Takes what a story needs, or leaves the story out and says why.
///
/// `let psql = need!(program("psql"));` With `SHEETBEND_TEST_STRICT=1` (as `make test` runs) what is missing is a failure.
#[macro_export]
macro_rules! need {
    ($what:expr) => {
        match $what {
            Ok(found) => found,
            Err(why) => {
                $crate::leave_out(&why);
                return;
            }
        }
    };
}

/// A program on the PATH, in the system's folders for daemons, or among PostgreSQL's.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        folders.extend(versions.flatten().map(|version| version.path().join("bin")));
    }
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
    found.ok_or_else(|| format!("no program `{name}` on this machine; as root, `make test` installs it"))
}

/// The Python of the tests' own environment, where these modules can be imported.
pub fn python(modules: &[&str]) -> Result<PathBuf, String> {
    let own = tools().join("venv/bin/python");
    let python = if own.exists() { own } else { program("python3")? };
    let imports = modules.join(", ");
    if modules.is_empty() {
        return Ok(python);
    }
    let out = Command::new(&python).args(["-c", &format!("import {imports}")]).output();
    match out {
        Ok(out) if out.status.success() => Ok(python),
        _ => Err(format!("no Python module of {imports}; `make test` installs them into target/tools/venv")),
    }
}

/// The Envoy that `make test` installs, or the system's.
pub fn envoy() -> Result<PathBuf, String> {
    let own = tools().join("venv/bin/envoy");
    if own.exists() { Ok(own) } else { program("envoy") }
}

/// Where `make test` keeps programs that are not the system's.
pub fn tools() -> PathBuf {
    match std::env::var_os("SHEETBEND_TEST_TOOLS") {
        Some(folder) => folder.into(),
        None => crate::workspace().join("target/tools"),
    }
}

/// Being root.
pub fn root() -> Result<(), String> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err("not root".into()),
    }
}

/// Being allowed to make network namespaces, with the program `ip` to do it.
pub fn namespaces() -> Result<(), String> {
    root()?;
    let ip = program("ip")?;
    // Stories of one process ask at the same time.
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let probe = format!("sbt-probe-{}-{}", std::process::id(), ASKED.fetch_add(1, Ordering::Relaxed));
    let add = Command::new(&ip).args(["netns", "add", &probe]).output();
    match add {
        Ok(out) if out.status.success() => {}
        Ok(out) => return Err(format!("no network namespaces here: {}", String::from_utf8_lossy(&out.stderr).trim())),
        Err(error) => return Err(format!("`ip` does not run: {error}")),
    }
    let _ = Command::new(&ip).args(["netns", "delete", &probe]).output();
    Ok(())
}

/// Says that this story is left out and why; under `SHEETBEND_TEST_STRICT=1` it fails instead. Called by [`need!`].
pub fn leave_out(why: &str) {
    let thread = std::thread::current();
    let story = thread.name().unwrap_or("a story").to_string();
    if std::env::var_os("SHEETBEND_TEST_STRICT").is_some_and(|v| v == "1") {
        panic!("`{story}` cannot be told, and nothing may be left out: {why}");
    }
    let line = format!("left out: {story}: {why}\n");
    // Past the capturing of `print!`: a story that was not told must not look like one that was.
    let _ = std::io::stderr().write_all(line.as_bytes());
    let file = list();
    if let Some(folder) = file.parent() {
        let _ = std::fs::create_dir_all(folder);
    }
    if let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(file) {
        let _ = file.write_all(line.as_bytes());
    }
}

/// Prints what the run of `cargo test` that this process belongs to has left out, and forgets it.
pub fn print_left_out() {
    let lines = std::fs::read_to_string(list()).unwrap_or_default();
    let _ = std::fs::remove_file(list());
    let summary = format!("left out ({}):\n{lines}", lines.lines().count());
    let _ = std::io::stderr().write_all(summary.as_bytes());
}

/// One file for each `cargo test`: all its test processes have the same parent.
fn list() -> PathBuf {
    let cargo = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/left-out/{cargo}"))
}
