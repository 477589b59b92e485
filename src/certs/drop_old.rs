//! `certs rotate --drop-old`: only when no proxy still needs the old root. Who does, the control plane knows.

use std::fmt::Write as _;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use sheetbend_certs::{Ca, control_plane_file, describe_root, format_span};

use crate::Failure;

/// What a control plane writes about itself.
#[derive(Deserialize)]
struct ControlPlane {
    pid: u32,
    admin: String,
}

/// What its admin port says of the proxies that it knows.
#[derive(Deserialize)]
struct Roots {
    /// The digest of the root that it holds them against.
    active: String,
    proxies: Vec<Proxy>,
}

#[derive(Deserialize)]
struct Proxy {
    identity: String,
    lacks_new_root: bool,
    old_leaf: bool,
    connected: bool,
    last_seen_seconds_ago: u64,
}

impl Proxy {
    /// Since when nobody has heard of it; `None` while it is connected.
    fn silent_for(&self) -> Option<Duration> {
        (!self.connected).then(|| Duration::from_secs(self.last_seen_seconds_ago))
    }
}

pub(super) fn drop_old(
    dir: &Path,
    offline: bool,
    leave_behind: Option<Duration>,
    now: SystemTime,
) -> Result<String, Failure> {
    let ca = Ca::open(dir, now).map_err(Failure::new)?;
    let active = ca.active_root().map_err(Failure::new)?.sha256().to_string();
    match (ask(dir)?, offline) {
        (Some(roots), _) if roots.active != active => {
            return Err(Failure::new(
                "the old root stays: the control plane has not taken up the new one yet. Try again in a moment",
            ));
        }
        (Some(roots), _) => refuse_if_needed(dir, &roots, leave_behind)?,
        (None, true) => {}
        (None, false) => {
            return Err(Failure::new(format!(
                "no control plane runs on {}, so nobody can say which proxies still need the old root; start one, or \
                 add --offline if you know that none does",
                dir.display()
            )));
        }
    }
    let dropped = ca.drop_old().map_err(Failure::new)?;
    let mut said = String::new();
    for root in &dropped {
        let _ = writeln!(said, "dropped   {}; its key is deleted", describe_root(root, now));
    }
    let root = ca.active_root().map_err(Failure::new)?;
    let _ = writeln!(said, "root      {}", describe_root(&root, now));
    Ok(said)
}

fn refuse_if_needed(dir: &Path, roots: &Roots, leave_behind: Option<Duration>) -> Result<(), Failure> {
    /// Enough to see what is going on; the rest is a number.
    const NAMED: usize = 20;
    let left_behind =
        |proxy: &Proxy| leave_behind.is_some_and(|after| proxy.silent_for().is_some_and(|silent| silent >= after));
    let needs = |proxy: &&Proxy| (proxy.lacks_new_root || proxy.old_leaf) && !left_behind(proxy);
    let needing: Vec<_> = roots.proxies.iter().filter(needs).collect();
    if needing.is_empty() {
        return Ok(());
    }
    let mut said = format!("the old root stays: {} of {} proxies still need it", needing.len(), roots.proxies.len());
    for proxy in needing.iter().take(NAMED) {
        let why = match (proxy.lacks_new_root, proxy.old_leaf) {
            (true, true) => "has not got the new root yet, and shows a certificate of the old one",
            (true, false) => "has not got the new root yet",
            (false, _) => "still shows a certificate of the old root",
        };
        let _ = write!(said, "\n  {} {why}", proxy.identity.escape_debug());
        if let Some(silent) = proxy.silent_for() {
            let _ = write!(said, "; nobody has heard of it for {}", format_span(silent));
        }
    }
    if needing.len() > NAMED {
        let _ = write!(said, "\n  and {} more", needing.len() - NAMED);
    }
    let again = format!("sheetbend certs rotate --dir {} --drop-old", dir.display());
    let _ = write!(said, "\nA proxy that is connected renews by itself within seconds. Then try again: {again}");
    if needing.iter().any(|proxy| !proxy.connected) {
        let _ = write!(
            said,
            "\nOne that is silent is waited for until its certificate ends. If it is gone for good, do not wait: {again} \
             --leave-behind 10m"
        );
    }
    Err(Failure::new(said))
}

/// `None` when no control plane runs here.
fn ask(dir: &Path) -> Result<Option<Roots>, Failure> {
    let path = control_plane_file(dir);
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Failure::new(format!("cannot read {}: {e}", path.display()))),
        Ok(text) => text,
    };
    let damaged = |why: String| {
        Failure::new(format!("{} is damaged: {why}; start the control plane anew, or remove the file", path.display()))
    };
    let control_plane: ControlPlane = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    let address = control_plane.admin.strip_prefix("http://").unwrap_or(&control_plane.admin).trim_end_matches('/');
    let address: SocketAddr = address.parse().map_err(|_| damaged(format!("`{address}` is no ADDRESS:PORT")))?;
    let unclear = |why: String| {
        let (pid, admin) = (control_plane.pid, &control_plane.admin);
        Failure::new(format!(
            "the control plane (process {pid}) cannot say who needs the old root: {admin}/roots {why}"
        ))
    };
    match get(address, "/roots") {
        // Nobody listens: it left without removing its file.
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(None),
        Err(e) => Err(unclear(format!("does not answer: {e}"))),
        Ok(body) => {
            serde_json::from_str(&body).map(Some).map_err(|e| unclear(format!("answers what is no list of roots: {e}")))
        }
    }
}

/// One GET on loopback, over and done within seconds. HTTP/1.0, so that the answer ends with the connection.
fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    const WITHIN: Duration = Duration::from_secs(5);
    /// 20,000 proxies at 200 bytes each.
    const MAX: u64 = 4 * 1024 * 1024;
    let mut stream = TcpStream::connect_timeout(&address, WITHIN)?;
    stream.set_read_timeout(Some(WITHIN))?;
    stream.set_write_timeout(Some(WITHIN))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX).read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).map_err(|_| std::io::Error::other("its answer is not text"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| std::io::Error::other("its answer is cut short"))?;
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(std::io::Error::other(format!("it says `{}`", status.escape_debug())));
    }
    Ok(body.to_owned())
}
