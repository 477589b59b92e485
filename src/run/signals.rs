//! Which signal reaches the program, and how often: once.
//!
//! What the kernel sends (Ctrl-C, Ctrl-\, a terminal that hangs up) goes to the whole foreground group, so a program
//! that shares our group has it already. What a process sends is passed on.

use std::io;

use rustix::process::Signal;
use signal_hook::consts;
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::origin::WithOrigin;
use signal_hook::low_level::siginfo::{Cause, Origin};
use tokio::sync::mpsc;

/// Whose process group the program is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    /// Ours: in the foreground of a terminal.
    Shared,
    /// One of its own.
    Own,
}

/// A signal that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) signal: Signal,
    /// Sent by the kernel on a terminal's behalf, hence to all of the foreground group.
    pub(super) by_terminal: bool,
}

/// Who is to get a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassOn {
    /// Nobody: it has been delivered.
    Nobody,
    /// The program alone.
    Program,
    /// The program and all that it started.
    Group,
}

impl Received {
    pub(super) fn pass_on(self, group: Group) -> PassOn {
        let keyboard = [Signal::INT, Signal::QUIT].contains(&self.signal);
        match (group, self.by_terminal) {
            (Group::Shared, true) => PassOn::Nobody,
            (Group::Shared, false) => PassOn::Program,
            // A terminal would have sent these to all of them.
            (Group::Own, _) if keyboard => PassOn::Group,
            (Group::Own, _) => PassOn::Program,
        }
    }

    /// Whether the program is being told to stop for good.
    pub(super) fn ends(self) -> bool {
        [Signal::TERM, Signal::INT, Signal::QUIT].contains(&self.signal)
    }
}

const LISTENED_TO: [(i32, Signal); 6] = [
    (consts::SIGTERM, Signal::TERM),
    (consts::SIGINT, Signal::INT),
    (consts::SIGQUIT, Signal::QUIT),
    (consts::SIGHUP, Signal::HUP),
    (consts::SIGUSR1, Signal::USR1),
    (consts::SIGUSR2, Signal::USR2),
];

/// Listens from now on. A signal that was ignored when we were started (nohup, a script's `&`) stays ignored, and the
/// program inherits that.
pub(super) fn listen() -> io::Result<mpsc::UnboundedReceiver<Received>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let heard = LISTENED_TO.iter().map(|(number, _)| *number).filter(|number| !is_ignored(&status, *number));
    let mut signals = SignalsInfo::<WithOrigin>::new(heard)?;
    // Signals are few: whoever may send us one may also end us.
    let (sender, receiver) = mpsc::unbounded_channel();
    std::thread::Builder::new().name("signals".to_string()).spawn(move || {
        for origin in signals.forever() {
            let Some(received) = received(&origin) else { continue };
            if sender.send(received).is_err() {
                return;
            }
        }
    })?;
    Ok(receiver)
}

fn received(origin: &Origin) -> Option<Received> {
    let (_, signal) = LISTENED_TO.iter().find(|(number, _)| *number == origin.signal)?;
    Some(Received { signal: *signal, by_terminal: matches!(origin.cause, Cause::Kernel) })
}

/// `SigIgn:` of `/proc/self/status`: a mask in hexadecimal, signal 1 in its lowest bit.
fn is_ignored(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal - 1)) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(signal: Signal, by_terminal: bool) -> Received {
        Received { signal, by_terminal }
    }

    #[test]
    fn the_terminal_s_ctrl_c_is_not_passed_on_to_a_program_that_had_it() {
        assert_eq!(received(Signal::INT, true).pass_on(Group::Shared), PassOn::Nobody);
        assert_eq!(received(Signal::HUP, true).pass_on(Group::Shared), PassOn::Nobody);
    }

    #[test]
    fn what_was_sent_to_us_alone_is_passed_on() {
        for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::USR1] {
            assert_eq!(received(signal, false).pass_on(Group::Shared), PassOn::Program, "{signal:?}");
        }
    }

    #[test]
    fn a_group_of_its_own_gets_the_keyboard_s_signals_as_a_whole_and_others_at_its_head() {
        for by_terminal in [true, false] {
            assert_eq!(received(Signal::INT, by_terminal).pass_on(Group::Own), PassOn::Group);
            assert_eq!(received(Signal::TERM, by_terminal).pass_on(Group::Own), PassOn::Program);
        }
    }

    #[test]
    fn an_ignored_signal_is_read_from_the_mask() {
        let status = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000000\n";
        assert!(is_ignored(status, 1) && is_ignored(status, 13));
        assert!(!is_ignored(status, 2) && !is_ignored("", 1));
    }
}
