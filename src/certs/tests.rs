//! The verbs as an operator types them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::Parser;

use sheetbend_certs::control_plane_file;

use super::*;

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    verb: Verb,
}

/// Runs `certs ARGS` in a directory: paths that begin with `./` are taken from there.
fn certs(dir: &Path, line: &str) -> Result<String, String> {
    certs_at(dir, line, SystemTime::now())
}

fn certs_at(dir: &Path, line: &str, now: SystemTime) -> Result<String, String> {
    let words = line.split_whitespace().map(|word| match word.strip_prefix("./") {
        Some(name) => dir.join(name).display().to_string(),
        None => word.to_owned(),
    });
    let line = Line::try_parse_from(std::iter::once("certs".to_owned()).chain(words)).map_err(|e| e.to_string())?;
    carry_out(line.verb, now).map_err(|failure| failure.to_string())
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn with_ca() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    certs(dir.path(), "init --dir ./ca").unwrap();
    dir
}

#[test]
fn init_issue_inspect_verify_as_in_the_readme() {
    let dir = with_ca();
    let said = certs(dir.path(), "issue --dir ./ca --service web --out ./web").unwrap();
    assert!(said.starts_with("issued spiffe://cluster.local/ns/default/sa/web\n"), "{said}");
    let said = certs(dir.path(), "inspect ./web/cert.pem").unwrap();
    assert!(said.starts_with("1. name      spiffe://cluster.local/ns/default/sa/web\n"), "{said}");
    assert!(said.contains("\n2. subject   CN=cluster.local issuing "), "{said}");
    let said = certs(dir.path(), "verify ./web/cert.pem --bundle ./ca/bundle.pem").unwrap();
    assert!(said.contains("cert.pem: OK\nname      spiffe://cluster.local/ns/default/sa/web\n"), "{said}");
    let json: serde_json::Value = certs(dir.path(), "inspect ./web/cert.pem -o json").unwrap().parse().unwrap();
    assert_eq!(json[0]["uris"][0], "spiffe://cluster.local/ns/default/sa/web");
}

#[test]
fn keys_are_for_their_owner_alone() {
    let dir = with_ca();
    certs(dir.path(), "issue --dir ./ca --service web --out ./web").unwrap();
    let ca = dir.path().join("ca");
    assert_eq!(mode(&ca), 0o700);
    assert_eq!(mode(&dir.path().join("web/key.pem")), 0o600);
    let keys: Vec<_> = std::fs::read_dir(&ca)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "key"))
        .collect();
    assert_eq!(keys.len(), 2, "a root's and an issuing CA's");
    assert!(keys.iter().all(|key| mode(key) == 0o600));
}

#[test]
fn nothing_is_overwritten() {
    let dir = with_ca();
    let before = std::fs::read(dir.path().join("ca/ca.json")).unwrap();
    let said = certs(dir.path(), "init --dir ./ca").unwrap_err();
    assert!(said.contains("already has a CA"), "{said}");
    assert_eq!(std::fs::read(dir.path().join("ca/ca.json")).unwrap(), before);
    certs(dir.path(), "issue --dir ./ca --service web --out ./web").unwrap();
    let key = std::fs::read(dir.path().join("web/key.pem")).unwrap();
    let said = certs(dir.path(), "issue --dir ./ca --service web --out ./web").unwrap_err();
    assert!(said.contains("is there already") && said.contains("--out"), "{said}");
    assert_eq!(std::fs::read(dir.path().join("web/key.pem")).unwrap(), key);
    let recorded = std::fs::read_to_string(dir.path().join("ca/issued.log")).unwrap();
    assert_eq!(recorded.lines().count(), 1, "nothing was signed in vain");
}

#[test]
fn a_csr_gets_a_certificate_and_no_key() {
    let dir = with_ca();
    std::fs::write(dir.path().join("web.csr"), KeyAndCsr::generate().unwrap().csr_pem()).unwrap();
    certs(dir.path(), "issue --dir ./ca --spiffe-id spiffe://cluster.local/ns/a/sa/b --csr ./web.csr --out ./web")
        .unwrap();
    assert!(!dir.path().join("web/key.pem").exists());
    let said = certs(dir.path(), "verify ./web/cert.pem --bundle ./web/bundle.pem").unwrap();
    assert!(said.contains("spiffe://cluster.local/ns/a/sa/b"), "{said}");
}

#[test]
fn a_control_plane_gets_dns_names_and_addresses() {
    let dir = with_ca();
    certs(dir.path(), "issue --dir ./ca --service cp --out ./cp --dns mesh.example,127.0.0.1 --dns ::1").unwrap();
    let said = certs(dir.path(), "inspect ./cp/cert.pem").unwrap();
    assert!(said.contains("   dns       mesh.example\n   ip        127.0.0.1, ::1\n"), "{said}");
}

#[test]
fn every_refusal_says_what_and_how_to_mend_it() {
    let dir = with_ca();
    std::fs::write(dir.path().join("no.csr"), "hello").unwrap();
    std::fs::write(dir.path().join("no.pem"), "hello").unwrap();
    let cert = certs(dir.path(), "issue --dir ./ca --service web --out ./web").map(|_| "./web/cert.pem").unwrap();
    certs(dir.path(), "init --dir ./other").unwrap();
    for (line, what, mend) in [
        ("issue --dir ./none --service web", "has no CA", "sheetbend certs init"),
        ("issue --dir ./ca --service we/b --out ./x", "`we/b` is not the name of a service", "letters, digits"),
        ("issue --dir ./ca --spiffe-id http://x --out ./x", "not a SPIFFE id", "spiffe://TRUST-DOMAIN"),
        (
            "issue --dir ./ca --spiffe-id spiffe://td/ns/a/sa/b --out ./x",
            "not of this CA's trust domain",
            "cluster.local",
        ),
        ("issue --dir ./ca --service web --csr ./no.csr --out ./x", "not a certificate signing request", "openssl req"),
        ("issue --dir ./ca --service web --csr ./none.csr --out ./x", "cannot read", "none.csr"),
        (
            &format!("issue --dir ./ca --service web --csr {cert} --out ./x"),
            "this PEM holds a CERTIFICATE",
            "openssl req",
        ),
        ("issue --dir ./ca --service web --ttl 400d --out ./x", "too long", "ask for less"),
        ("issue --dir ./ca --service web --ttl soon --out ./x", "no time span", "1h30m"),
        ("issue --dir ./ca --service web --dns a..b --out ./x", "`a..b` is no DNS name", "a..b"),
        ("issue --dir ./ca", "--service", "Usage"),
        ("init --dir ./third --trust-domain Upper", "not a trust domain", "cluster.local"),
        ("inspect ./no.pem", "no certificate in it", "BEGIN CERTIFICATE"),
        (
            "verify ./web/cert.pem --bundle ./other/bundle.pem",
            "is not in our bundle [`CN=cluster.local root",
            "CN=cluster.local root",
        ),
        ("verify ./web/cert.pem --bundle ./no.pem", "not a trust bundle", "no.pem"),
        ("rotate --dir ./none", "has no CA", "sheetbend certs init"),
        ("rotate --dir ./ca --drop-old", "no control plane runs", "--offline"),
        ("rotate --dir ./ca --drop-old --offline", "no old one to drop", "sheetbend certs rotate"),
    ] {
        let said = certs(dir.path(), line).expect_err(line);
        assert!(said.contains(what) && said.contains(mend), "{line}: {said}");
    }
    assert!(!dir.path().join("x").exists(), "what was refused left nothing behind");
}

#[test]
fn a_clock_that_is_off_and_an_expired_ca_have_their_own_words() {
    let dir = with_ca();
    let past = SystemTime::now() - Duration::from_secs(86_400);
    let said = certs_at(dir.path(), "issue --dir ./ca --service web --out ./x", past).unwrap_err();
    assert!(said.contains("is not valid before") && said.contains("clock is off"), "{said}");
    let future = SystemTime::now() + Duration::from_secs(11 * 365 * 86_400);
    let said = certs_at(dir.path(), "issue --dir ./ca --service web --out ./x", future).unwrap_err();
    assert!(said.contains("expired at") && said.contains("certs init"), "{said}");
}

#[test]
fn a_rotation_goes_from_one_root_to_two_to_one() {
    let dir = with_ca();
    certs(dir.path(), "issue --dir ./ca --service web --out ./old").unwrap();
    let said = certs(dir.path(), "rotate --dir ./ca").unwrap();
    assert!(said.contains("new root  ") && said.contains("old root  "), "{said}");
    certs(dir.path(), "issue --dir ./ca --service web --out ./new").unwrap();
    for (cert, bundle) in [("old", "ca"), ("new", "ca"), ("new", "old")] {
        certs(dir.path(), &format!("verify ./{cert}/cert.pem --bundle ./{bundle}/bundle.pem")).unwrap();
    }
    let said = certs(dir.path(), "rotate --dir ./ca").unwrap_err();
    assert!(said.contains("a rotation is under way") && said.contains("--drop-old"), "{said}");
    certs(dir.path(), "rotate --dir ./ca --drop-old --offline").unwrap();
    certs(dir.path(), "verify ./new/cert.pem --bundle ./ca/bundle.pem").unwrap();
    let said = certs(dir.path(), "verify ./old/cert.pem --bundle ./ca/bundle.pem").unwrap_err();
    assert!(said.contains("is not in our bundle"), "{said}");
}

/// A control plane's admin port that answers once, with this status and body.
fn control_plane(dir: &Path, status: &'static str, body: String) -> std::thread::JoinHandle<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = format!("http://{}", listener.local_addr().unwrap());
    let file = format!(r#"{{"pid":{},"admin":"{admin}","url":"https://127.0.0.1:1"}}"#, std::process::id());
    std::fs::write(control_plane_file(dir), file).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = BufReader::new(stream.try_clone().unwrap()).lines();
        assert_eq!(head.next().unwrap().unwrap(), "GET /roots HTTP/1.0");
        head.find(|line| line.as_ref().unwrap().is_empty());
        write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    })
}

#[test]
fn the_old_root_stays_while_a_proxy_needs_it_and_the_proxy_is_named() {
    let dir = with_ca();
    let ca = dir.path().join("ca");
    certs(dir.path(), "rotate --dir ./ca").unwrap();
    let active = Ca::open(&ca, SystemTime::now()).unwrap().active_root().unwrap().sha256().to_string();
    let proxy = |name: &str, lacks: bool, old: bool, connected: bool| {
        serde_json::json!({
            "identity": format!("spiffe://cluster.local/ns/default/sa/{name}"),
            "lacks_new_root": lacks, "old_leaf": old, "connected": connected, "last_seen_seconds_ago": 7200,
        })
    };
    let roots = |active: &str, proxies: &[serde_json::Value]| {
        serde_json::json!({ "active": active, "proxies": proxies }).to_string()
    };
    let (a, b, c) = (proxy("a", true, false, true), proxy("b", false, true, false), proxy("c", false, false, true));
    let answers = control_plane(&ca, "200 OK", roots(&active, &[a.clone(), b.clone(), c.clone()]));
    let said = certs(dir.path(), "rotate --dir ./ca --drop-old --offline").unwrap_err();
    assert!(said.contains("2 of 3 proxies still need it"), "{said}");
    assert!(said.contains("sa/a has not got the new root yet\n") && said.contains("sa/b still shows"), "{said}");
    assert!(said.contains("nobody has heard of it for 2h") && said.contains("--leave-behind"), "{said}");
    assert!(!said.contains("sa/c"), "{said}");
    answers.join().unwrap();

    // Only who is silent for long enough is left behind.
    for (flag, waits) in [("1h", "1 of 3"), ("3h", "2 of 3")] {
        let answers = control_plane(&ca, "200 OK", roots(&active, &[a.clone(), b.clone(), c.clone()]));
        let said = certs(dir.path(), &format!("rotate --dir ./ca --drop-old --leave-behind {flag}")).unwrap_err();
        assert!(said.contains(waits), "{said}");
        answers.join().unwrap();
    }

    // What it says is of no use while it holds them against a root that is not the newest.
    let answers = control_plane(&ca, "200 OK", roots("another", std::slice::from_ref(&c)));
    let said = certs(dir.path(), "rotate --dir ./ca --drop-old").unwrap_err();
    assert!(said.contains("has not taken up the new one yet"), "{said}");
    answers.join().unwrap();

    let answers = control_plane(&ca, "500 Internal Server Error", "no".to_owned());
    let said = certs(dir.path(), "rotate --dir ./ca --drop-old").unwrap_err();
    assert!(said.contains("cannot say who needs the old root") && said.contains("500"), "{said}");
    answers.join().unwrap();

    let answers = control_plane(&ca, "200 OK", roots(&active, &[b, c]));
    certs(dir.path(), "rotate --dir ./ca --drop-old --leave-behind 1h").unwrap();
    answers.join().unwrap();
}

#[test]
fn a_control_plane_that_is_gone_counts_as_none() {
    let dir = with_ca();
    certs(dir.path(), "rotate --dir ./ca").unwrap();
    let _held = control_plane_gone(&dir.path().join("ca"));
    let said = certs(dir.path(), "rotate --dir ./ca --drop-old").unwrap_err();
    assert!(said.contains("no control plane runs"), "{said}");
    certs(dir.path(), "rotate --dir ./ca --drop-old --offline").unwrap();
}

/// Nobody listens where it was, and nobody will as long as the socket is held.
fn control_plane_gone(dir: &Path) -> tokio::net::TcpSocket {
    let held = tokio::net::TcpSocket::new_v4().unwrap();
    held.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let admin = held.local_addr().unwrap();
    std::fs::write(control_plane_file(dir), format!(r#"{{"pid":1,"admin":"http://{admin}"}}"#)).unwrap();
    held
}

#[test]
fn time_spans_are_read_as_written() {
    for (text, seconds) in [("90s", 90), ("10m", 600), ("24h", 86_400), ("1h30m", 5400), ("7d", 604_800)] {
        assert_eq!(parse_ttl(text), Ok(Duration::from_secs(seconds)));
    }
    for bad in ["", "0s", "h", "10", "-1h", "1w", "99999999999999999999s", "1000000d", "١h"] {
        assert!(parse_ttl(bad).is_err(), "{bad}");
    }
}
