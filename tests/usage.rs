//! The command line itself: what every verb promises.

use std::process::{Command, Output};

fn sheetbend(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sheetbend")).args(args).output().expect("sheetbend runs")
}

#[test]
fn a_wrong_command_line_ends_with_status_2_and_says_what_is_wrong() {
    for args in [&["no-such-verb"][..], &["graph", "--no-such-flag"], &["--no-such-flag"]] {
        let out = sheetbend(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("no-such"), "{args:?} is answered with: {said}");
    }
}

#[test]
fn every_verb_explains_itself() {
    for verb in ["certs", "control-plane", "token", "run", "intercept", "graph"] {
        let out = sheetbend(&[verb, "--help"]);
        assert_eq!(out.status.code(), Some(0), "{verb} --help");
        assert!(String::from_utf8_lossy(&out.stdout).contains("Usage: sheetbend"), "{verb} --help");
    }
}

#[test]
fn the_version_is_the_package_s() {
    let out = sheetbend(&["--version"]);
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), concat!("sheetbend ", env!("CARGO_PKG_VERSION")));
}
