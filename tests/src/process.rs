//! Real processes: started with their output kept, and ended by their own id.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A process of this story. It leads a process group of its own; dropping it ends the whole group.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// Sees to it that processes of a story get their signals, where the tests themselves run under `nohup` or in a shell's
/// background: what is ignored stays ignored in a child, while what has a handler goes back to the default.
fn hear_signals() {
    static HEARD: Once = Once::new();
    HEARD.call_once(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
        for signal in [Signal::HUP, Signal::INT] {
            if ignored & (1 << (signal.as_raw() - 1)) != 0 {
                let nobody_asks = Arc::new(AtomicBool::new(false));
                signal_hook::flag::register(signal.as_raw(), nobody_asks).expect("a handler");
            }
        }
    });
}

impl Process {
    /// Starts `command`, with what it prints kept in `folder` as `NAME.out` and `NAME.err`.
    pub fn spawn(name: &str, folder: &Path, mut command: Command) -> Self {
        hear_signals();
        let out = folder.join(format!("{name}.out"));
        let err = folder.join(format!("{name}.err"));
        let open = |path: &Path| File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        command.stdin(Stdio::null()).stdout(open(&out)).stderr(open(&err)).process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{name} does not start: {e}: {command:?}"));
        Self { name: name.into(), child, out, err }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has printed to stdout.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.out).unwrap_or_default()).into_owned()
    }

    /// What it has printed to stderr.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.err).unwrap_or_default()).into_owned()
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid(), signal);
    }

    /// Sends a signal to the process and all of its group, as a terminal does.
    pub fn signal_group(&self, signal: Signal) {
        let _ = kill_process_group(self.pid(), signal);
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end; panics with its output when that does not come in time.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                return status;
            }
            if Instant::now() > deadline {
                panic!("{} has not ended within {within:?}\n{}", self.name, self.told());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to end, waits, and gives its status.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(Duration::from_secs(40))
    }

    /// Ends it at once, as `kill -9` does. What it started lives on until this value is dropped.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Waits until it has printed `text` to stdout or stderr.
    pub fn wait_for(&mut self, text: &str, within: Duration) -> String {
        let deadline = Instant::now() + within;
        loop {
            let alive = self.is_alive();
            let said = format!("{}{}", self.stdout(), self.stderr());
            if let Some(line) = said.lines().find(|line| line.contains(text)) {
                return line.to_string();
            }
            if !alive || Instant::now() > deadline {
                panic!("{} did not say `{text}` (running: {alive})\n{}", self.name, self.told());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All that it said, for a failure's message.
    pub fn told(&self) -> String {
        format!("--- {0} stdout\n{1}\n--- {0} stderr\n{2}", self.name, self.stdout(), self.stderr())
    }

    /// How many files it has open.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.id())).map_or(0, Iterator::count)
    }

    /// Resident memory in bytes, from `/proc`.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_alive() {
            self.signal(Signal::TERM);
            let deadline = Instant::now() + Duration::from_millis(1500);
            while self.is_alive() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.signal_group(Signal::KILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.told());
        }
    }
}

/// Lets this process, and those it starts from now on, have as many open files as the system permits.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Runs a command to its end and gives its output; panics when it takes longer than `within`.
pub fn finish(mut command: Command, within: Duration) -> Finished {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let name = Path::new(command.get_program()).file_name().and_then(OsStr::to_str).unwrap_or("command").to_string();
    command.stdin(Stdio::null());
    let mut process = Process::spawn(&name, folder.path(), command);
    let status = process.wait(within);
    Finished { status, stdout: process.stdout(), stderr: process.stderr() }
}

/// How a command ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed to stdout.
    pub stdout: String,
    /// What it printed to stderr.
    pub stderr: String,
}

impl Finished {
    /// Its stdout, where it ended well; panics otherwise.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr);
        self.stdout
    }
}
