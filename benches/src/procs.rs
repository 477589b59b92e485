//! Processes on a core of their own: started there, their CPU and memory read from /proc, ended by their own pid.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

/// The core that the proxies run on.
pub(crate) const PROXIES: usize = 0;
/// The core that load and origin run on.
pub(crate) const LOAD: usize = 1;

/// Keeps the calling thread, and what it starts from now on, on one core.
pub(crate) fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// A process and its children; ended when dropped.
pub(crate) struct Proc {
    child: Child,
}

impl Proc {
    /// Starts `command` on the proxies' core. Its stderr goes to `log`.
    pub(crate) fn start(command: &mut Command, log: &Path) -> io::Result<Self> {
        let log = fs::File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        pin(PROXIES)?;
        let child = command.spawn();
        pin(LOAD)?;
        Ok(Self { child: child? })
    }

    /// The process and all below it.
    fn tree(&self) -> Vec<u32> {
        let mut tree = vec![self.child.id()];
        let mut at = 0;
        while let Some(pid) = tree.get(at) {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            let children = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
            let children: Vec<u32> =
                children.flat_map(|c| c.split_whitespace().map(str::parse).collect::<Vec<_>>()).flatten().collect();
            tree.extend(children);
            at += 1;
        }
        tree
    }

    /// Nanoseconds on a CPU since the start, of all threads of the tree.
    pub(crate) fn cpu(&self) -> u64 {
        let threads = |pid: u32| fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let read = |path: std::path::PathBuf| fs::read_to_string(path.join("schedstat")).ok();
        let first = |text: String| text.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
        self.tree().into_iter().flat_map(threads).filter_map(|t| first(read(t.path())?)).sum()
    }

    /// Resident bytes of the tree.
    pub(crate) fn resident(&self) -> u64 {
        let rss = |pid: u32| {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = text.lines().find_map(|l| l.strip_prefix("Rss:"))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        self.tree().into_iter().filter_map(rss).sum::<u64>() * 1024
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // A failure here means that it has ended already.
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            kill_process(pid, Signal::TERM).ok();
        }
        let end = Instant::now() + Duration::from_secs(1);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        for pid in self.tree().into_iter().rev().filter_map(|pid| Pid::from_raw(pid as i32)) {
            if matches!(self.child.try_wait(), Ok(None)) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
        self.child.wait().ok();
    }
}
