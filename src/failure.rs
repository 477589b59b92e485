//! How a verb fails: in words for whoever typed the command.

use std::fmt;
use std::process::ExitCode;

/// What went wrong, where, and how to mend it.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    /// The command was right and could not be carried out: exit status 1.
    pub(crate) fn new(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), status: 1 }
    }

    /// The command itself was wrong: exit status 2.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), status: 2 }
    }

    /// A status of the caller's choice, where another convention rules: 126 and 127 of env(1).
    pub(crate) fn with_status(status: u8, message: impl fmt::Display) -> Self {
        Self { message: message.to_string(), status }
    }

    /// Prints the message to stderr and gives the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        eprintln!("error: {}", self.message);
        ExitCode::from(self.status)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
