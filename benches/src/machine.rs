//! What a run was made on, and with.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::systems::Programs;

/// Lines for the head of the results.
pub(crate) fn describe(programs: &Programs) -> Vec<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let model = field("model name").unwrap_or_else(|| "unknown processor".into());
    let family =
        format!("family {} model {}", field("cpu family").unwrap_or_default(), field("model\t").unwrap_or_default());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let commit = first_line(Path::new("git"), &["describe", "--always", "--dirty", "--abbrev=12"]);
    let date = first_line(Path::new("date"), &["-u", "+%F %H:%M UTC"]);
    let nginx = first_line(&programs.nginx, &["-v"]);
    let haproxy = first_line(&programs.haproxy, &["-v"]);
    let envoy = first_line(&programs.envoy, &["--version"]);
    vec![
        format!("- Machine: {model} ({family}), {cores} cores, Linux {}", kernel.trim()),
        format!("- Commit: {commit}, {date}"),
        format!("- {}; {}; Envoy {}", nginx, haproxy.split(" - ").next().unwrap_or_default(), envoy_version(&envoy)),
    ]
}

/// `…  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL` → `1.40.0`.
fn envoy_version(line: &str) -> &str {
    line.split('/').rev().nth(3).unwrap_or(line)
}

/// What a program says first, on stdout or stderr.
fn first_line(program: &Path, args: &[&str]) -> String {
    let Ok(output) = Command::new(program).args(args).output() else {
        return format!("{} not found", program.display());
    };
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().to_string()
}
