//! `proxies/PID.json`: what `graph` and its like need in order to find the sidecars that run here.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One running sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The process of `run`.
    pub(crate) pid: u32,
    /// When that process started, in the kernel's ticks since boot: tells it from a later one of the same id.
    pub(crate) started: u64,
    /// `web.default`.
    pub(crate) service: String,
    /// `http://127.0.0.1:PORT`.
    pub(crate) admin: String,
    /// The explicit outbound listener.
    pub(crate) outbound: String,
    /// `https://HOST:PORT`.
    pub(crate) control_plane: String,
}

/// A record on disk; it goes when this value does.
#[derive(Debug)]
pub(super) struct Written(PathBuf);

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Record {
    /// Writes it whole or not at all; readable by this user only.
    pub(super) fn write(&self, state: &Path) -> io::Result<Written> {
        let folder = state.join("proxies");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        sweep(&folder);
        let (whole, part) = (folder.join(format!("{}.json", self.pid)), folder.join(format!("{}.part", self.pid)));
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        serde_json::to_writer(file, self)?;
        fs::rename(part, &whole)?;
        Ok(Written(whole))
    }
}

/// The sidecars that run now. Files of processes that are gone are passed over.
pub(crate) fn running(state: &Path) -> Vec<Record> {
    let mut records: Vec<Record> = files(&state.join("proxies")).into_iter().filter_map(|file| live(&file)).collect();
    records.sort_by(|a, b| (&a.service, a.pid).cmp(&(&b.service, b.pid)));
    records
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json")).collect()
}

fn live(file: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (started(record.pid) == Some(record.started)).then_some(record)
}

/// Takes away what a `kill -9` left behind.
fn sweep(folder: &Path) {
    for file in files(folder) {
        if live(&file).is_none() {
            let _ = fs::remove_file(file);
        }
    }
}

/// When a process started; `None` when there is none of that id.
pub(super) fn started(pid: u32) -> Option<u64> {
    start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of proc_pid_stat(5). The second field is a name in parentheses that may hold anything, parentheses too.
fn start_time(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(pid: u32, started: u64) -> Record {
        let text = String::from;
        let (admin, outbound) = (text("http://127.0.0.1:1"), text("127.0.0.1:2"));
        Record {
            pid,
            started,
            service: text("web.default"),
            admin,
            outbound,
            control_plane: text("https://127.0.0.1:3"),
        }
    }

    #[test]
    fn a_running_sidecar_is_found_and_one_that_is_gone_is_not() {
        let state = tempfile::tempdir().unwrap();
        let me = std::process::id();
        let now = started(me).unwrap();
        // The same id, an earlier life.
        let stale = record(me, now - 1).write(state.path()).unwrap();
        assert_eq!(running(state.path()), []);
        let written = record(me, now).write(state.path()).unwrap();
        assert_eq!(running(state.path()), [record(me, now)]);
        drop((written, stale));
        assert_eq!(running(state.path()), []);
    }

    #[test]
    fn what_a_killed_process_left_behind_is_swept_by_the_next() {
        let state = tempfile::tempdir().unwrap();
        // Ids end at 2^22 on Linux.
        std::mem::forget(record(u32::MAX, 1).write(state.path()).unwrap());
        let me = std::process::id();
        let _written = record(me, started(me).unwrap()).write(state.path()).unwrap();
        assert_eq!(fs::read_dir(state.path().join("proxies")).unwrap().count(), 1);
    }

    #[test]
    fn a_name_full_of_parentheses_does_not_hide_the_start_time() {
        let rest = (3..=22).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_time(&format!("7 (a) S) {rest} 23")), Some(22));
        assert_eq!(start_time("7 (a"), None);
    }
}
