//! Stories about Sheetbend, told against real processes.
//!
//! A story is a file of `tests/`: it starts the real binaries beside real programs, does what a user does and looks at
//! what a user sees. This library is what stories share.

mod binaries;

pub use binaries::{binary, workspace};
