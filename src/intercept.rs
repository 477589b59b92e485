//! `sheetbend intercept`: redirect a pod's traffic.

use std::process::ExitCode;

use crate::Failure;

#[derive(clap::Subcommand)]
pub(crate) enum Verb {}

pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {}
}
