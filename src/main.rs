//! The operator's command line: a thin face over the crates below it.
//!
//! One file a verb. Each takes parsed arguments and gives back an exit status or a [`Failure`], which is printed as
//! what went wrong, where, and how to mend it. Exit status 2 is a wrong use of the command line, 1 a failure.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod breakers;
mod certs;
mod check;
mod control_plane;
mod explain;
mod failure;
mod graph;
mod intercept;
mod run;
mod token;

pub(crate) use failure::Failure;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A sidecar service mesh in one binary.
#[derive(Parser)]
#[command(name = "sheetbend", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make and look at certificates
    #[command(subcommand)]
    Certs(certs::Verb),
    /// Serve certificates, discovery and the merged graph
    ControlPlane(control_plane::Args),
    /// Make join tokens
    #[command(subcommand)]
    Token(token::Verb),
    /// Run a program beside its own sidecar
    Run(run::Args),
    /// What `run` starts: becomes the program, which dies with it
    #[command(name = "__program", hide = true)]
    Program(run::ProgramArgs),
    /// Redirect a pod's traffic to its sidecar
    #[command(subcommand)]
    Intercept(intercept::Verb),
    /// Show who calls whom
    Graph(graph::Args),
    /// Show which endpoints are ejected, and why
    Breakers(breakers::Args),
    /// Tell why a request went the way it did, or would go
    Explain(explain::Args),
    /// Find what is wrong in a folder of resources
    Check(check::Args),
}

fn main() -> ExitCode {
    // Before there is a second thread.
    sheetbend_proxy::listen::make_room_for_descriptors();
    let outcome = match Cli::parse().verb {
        Verb::Certs(verb) => certs::run(verb),
        Verb::ControlPlane(args) => control_plane::run(args),
        Verb::Token(verb) => token::run(verb),
        Verb::Run(args) => run::run(args),
        Verb::Program(args) => run::become_program(args),
        Verb::Intercept(verb) => intercept::run(verb),
        Verb::Graph(args) => graph::run(args),
        Verb::Breakers(args) => breakers::run(args),
        Verb::Explain(args) => explain::run(args),
        Verb::Check(args) => check::run(args),
    };
    outcome.unwrap_or_else(|failure| failure.report())
}
