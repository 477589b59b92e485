//! `sheetbend certs` as it is typed: exit status, what goes to which stream, and files that openssl agrees with.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sheetbend_tests::{binary, need, program};

struct Said {
    status: i32,
    out: String,
    err: String,
}

fn said(output: Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { status: output.status.code().unwrap_or(-1), out: text(&output.stdout), err: text(&output.stderr) }
}

fn certs(dir: &Path, line: &str) -> Said {
    let mut command = Command::new(binary("sheetbend"));
    command.arg("certs").args(line.split_whitespace()).current_dir(dir).stdin(Stdio::null());
    said(command.output().expect("sheetbend runs"))
}

fn ok(dir: &Path, line: &str) -> String {
    let said = certs(dir, line);
    assert_eq!((said.status, said.err.as_str()), (0, ""), "certs {line}");
    said.out
}

#[test]
fn what_is_issued_by_hand_is_accepted_by_openssl() {
    let openssl = need!(program("openssl"));
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), "init --dir ca");
    let request = "req -new -newkey rsa:2048 -nodes -keyout own.key -out own.csr -subj /CN=admin -addext subjectAltName=URI:spiffe://cluster.local/ns/default/sa/admin";
    let made = said(Command::new(&openssl).args(request.split(' ')).current_dir(dir.path()).output().unwrap());
    assert_eq!(made.status, 0, "{}", made.err);
    ok(dir.path(), "issue --dir ca --service web --out web");
    ok(dir.path(), "issue --dir ca --service own --csr own.csr --out own");
    assert!(!dir.path().join("own/key.pem").exists(), "whoever sends a request has the key already");
    assert_eq!(dir.path().join("web/key.pem").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    for name in ["web", "own"] {
        let line = format!("verify -x509_strict -CAfile ca/bundle.pem -untrusted {name}/cert.pem {name}/cert.pem");
        let verified = said(Command::new(&openssl).args(line.split(' ')).current_dir(dir.path()).output().unwrap());
        assert_eq!((verified.status, verified.out.trim()), (0, format!("{name}/cert.pem: OK").as_str()));
        let inspected = ok(dir.path(), &format!("inspect {name}/cert.pem"));
        assert!(inspected.starts_with(&format!("1. name      spiffe://cluster.local/ns/default/sa/{name}\n")));
        assert!(!inspected.contains("admin"), "the names in a request are ignored: {inspected}");
    }
}

#[test]
fn a_wrong_command_line_exits_2_and_a_failure_exits_1_and_both_say_why_on_stderr() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), "init --dir ca");
    for (line, status, why) in [
        ("issue --dir ca", 2, "--service"),
        ("issue --dir ca --service we/b", 2, "is not the name of a service"),
        ("issue --dir ca --service web --ttl soon", 2, "no time span"),
        ("rotate --dir ca --offline", 2, "--drop-old"),
        ("init --dir ca", 1, "already has a CA"),
        ("issue --dir none --service web", 1, "sheetbend certs init --dir none"),
        ("rotate --dir ca --drop-old", 1, "no control plane runs on ca"),
        ("inspect none.pem", 1, "cannot read none.pem"),
    ] {
        let said = certs(dir.path(), line);
        assert_eq!((said.status, said.out.as_str()), (status, ""), "certs {line}: {}", said.err);
        assert!(said.err.starts_with("error: ") && said.err.contains(why), "certs {line}: {}", said.err);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["ca"], "what was refused left nothing behind");
}

#[test]
fn a_root_is_rotated_by_hand_and_at_no_step_does_a_certificate_stop_to_verify() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), "init --dir ca");
    ok(dir.path(), "issue --dir ca --service old --out old");
    ok(dir.path(), "rotate --dir ca");
    ok(dir.path(), "issue --dir ca --service new --out new");
    for (cert, bundle) in [("old", "old"), ("old", "new"), ("new", "old"), ("new", "new")] {
        ok(dir.path(), &format!("verify {cert}/cert.pem --bundle {bundle}/bundle.pem"));
    }
    ok(dir.path(), "rotate --dir ca --drop-old --offline");
    ok(dir.path(), "verify new/cert.pem --bundle ca/bundle.pem");
    let refused = certs(dir.path(), "verify old/cert.pem --bundle ca/bundle.pem");
    assert_eq!(refused.status, 1);
    assert!(refused.err.contains("the peer's root `CN=cluster.local root "), "{}", refused.err);
    assert!(refused.err.contains("is not in our bundle [`CN=cluster.local root "), "{}", refused.err);
}
