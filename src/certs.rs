//! `sheetbend certs`: make and look at certificates.

use std::process::ExitCode;

use crate::Failure;

#[derive(clap::Subcommand)]
pub(crate) enum Verb {}

pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {}
}
