//! The program as a process: started, watched, and never left behind.
//!
//! **It dies with us.** The kernel sends it SIGKILL when `run` is gone, however that came about (`PR_SET_PDEATHSIG`).
//! That is asked for by the process itself, so what is started first is `sheetbend __program`, which asks and then
//! becomes the program: same process id, nothing in between afterwards.
//!
//! **Its process group.** In the foreground of a terminal it shares ours: the terminal sees one job, and its Ctrl-C
//! reaches both. Everywhere else it leads a group of its own, so that what is sent to our whole group is passed on
//! exactly once.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ExitCode, ExitStatus};

use rustix::process::{Pid, Signal};

use super::command::Program;
use super::environment::Environment;
use super::signals::Group;
use crate::Failure;

/// A running program.
#[derive(Debug)]
pub(super) struct Child {
    process: tokio::process::Child,
    pid: Pid,
    pub(super) group: Group,
}

impl Child {
    /// Must be called on the main thread: the program dies with the thread that started it.
    pub(super) fn start(program: &Program, arguments: &[OsString], environment: Environment) -> Result<Self, Failure> {
        let failed = |why: String| Failure::with_status(126, format!("{}: {why}", program.name.display()));
        let group = match in_foreground() {
            true => Group::Shared,
            false => Group::Own,
        };
        let mut command = tokio::process::Command::new("/proc/self/exe");
        command.arg("__program").arg(std::process::id().to_string()).arg(&program.file).arg("--").arg(&program.name);
        command.args(arguments).envs(environment.set);
        if group == Group::Own {
            command.process_group(0);
        }
        let process = command.spawn().map_err(|why| failed(why.to_string()))?;
        let pid = process.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let pid = pid.ok_or_else(|| failed("ended at once".to_string()))?;
        Ok(Self { process, pid, group })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits for its end. Losing this future loses nothing: the next call goes on waiting.
    pub(super) async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        self.process.wait().await
    }

    /// Sends a signal to the program alone.
    pub(super) fn signal(&self, signal: Signal) {
        // Gone already: its status is about to be read.
        let _ = rustix::process::kill_process(self.pid, signal);
    }

    /// Sends a signal to the program's whole group, where that is its own.
    pub(super) fn signal_group(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }
}

/// Whether our process group is the one that the terminal talks to.
fn in_foreground() -> bool {
    let Ok(terminal) = File::open("/dev/tty") else { return false };
    rustix::termios::tcgetpgrp(terminal).is_ok_and(|foreground| foreground == rustix::process::getpgrp())
}

/// A program's end as shells tell it: its status, or 128 and the signal's number.
pub(super) fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// `sheetbend __program PARENT FILE -- NAME ARGS…`
#[derive(clap::Args)]
pub(crate) struct ProgramArgs {
    parent: i32,
    file: OsString,
    #[arg(last = true, required = true)]
    words: Vec<OsString>,
}

/// Becomes the program, after asking the kernel to end it with `run`.
pub(crate) fn become_program(args: ProgramArgs) -> Result<ExitCode, Failure> {
    let mut words = args.words.into_iter();
    let name = words.next().unwrap_or_default();
    let asked = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    asked.map_err(|why| Failure::new(format!("cannot tie {} to this command: {why}", name.display())))?;
    if rustix::process::getppid() != Pid::from_raw(args.parent) {
        // `run` died before the line above.
        return Ok(ExitCode::from(137));
    }
    let why = std::process::Command::new(args.file).arg0(&name).args(words).exec();
    Err(Failure::with_status(126, format!("{}: cannot be executed: {why}", name.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_as_a_shell_tells_it() {
        let code = |raw| exit_code(ExitStatus::from_raw(raw));
        assert_eq!(code(0), ExitCode::SUCCESS);
        assert_eq!(code(7 << 8), ExitCode::from(7));
        assert_eq!(code(15), ExitCode::from(143));
        assert_eq!(code(9), ExitCode::from(137));
    }
}
