//! `sheetbend graph`: who calls whom.

use std::process::ExitCode;

use crate::Failure;

#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> Result<ExitCode, Failure> {
    Err(Failure::new("not built yet"))
}
