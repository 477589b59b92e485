//! A pair of sidecars under load, beside the same path through nginx, HAProxy and Envoy: on this machine, in one run,
//! interleaved, proxies on one core, load and origin on the other. `make bench` builds what it needs and runs it.
//!
//! What is compared is CPU time a unit of work, which other work on the machine disturbs least, as the kernel counts
//! it for every thread of a pair. Where time itself is the question (a single connection's latency, a start), the
//! median of interleaved rounds stands.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

mod frames;
mod late;
mod load;
mod machine;
mod mesh;
mod origin;
mod pki;
mod procs;
mod report;
mod rows;
mod systems;

use procs::LOAD;
use rows::{Plan, Row};
use systems::{Bench, Make, Programs};

/// Measure a pair of sidecars beside its peers
#[derive(Parser)]
#[command(name = "sheetbend-bench", disable_help_subcommand = true)]
struct Args {
    /// Fewer and shorter rounds: a minute or two in all
    #[arg(long)]
    quick: bool,
    /// Measure these rows alone, and write no results
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Row>,
    /// Measure these makes alone, and write no results
    #[arg(long, value_enum, value_delimiter = ',', default_value = "nginx,haproxy,envoy,sheetbend")]
    makes: Vec<Make>,
    /// Rounds, where the plan's own number is not wanted
    #[arg(long)]
    rounds: Option<usize>,
    /// The program to measure
    #[arg(long, default_value = "target/release/sheetbend-proxy")]
    proxy: PathBuf,
    /// Another build of ours to measure beside it, row by row: what a change costs. Writes no results
    #[arg(long)]
    before: Option<PathBuf>,
    /// Envoy's binary
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// Where the results go
    #[arg(long, default_value = "benches/RESULTS.md")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("sheetbend-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// False when requests failed, or the run is not to be trusted. A missed target is a finding, not a failure.
fn run(args: &Args) -> io::Result<bool> {
    procs::pin(LOAD)?;
    raise_open_files()?;
    // As the programs do that are measured: a sidecar and the control plane run within this one.
    sheetbend_proxy::listen::make_room_for_descriptors();
    let scratch = tempfile::Builder::new().prefix("sheetbend-bench").tempdir()?;
    let pki = pki::Pki::make(scratch.path())?;
    let programs = Programs {
        nginx: "nginx".into(),
        haproxy: "haproxy".into(),
        envoy: args.envoy.clone(),
        sheetbend: std::path::absolute(&args.proxy)?,
        before: args.before.as_ref().map(std::path::absolute).transpose()?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let origin = runtime.block_on(origin::serve())?;
    let mesh = mesh::Mesh::start(&scratch.path().join("ca"), origin.port())?;
    let outcome = runtime.block_on(async {
        let scratch = scratch.path();
        let bench = Bench { programs: &programs, pki: &pki, mesh: &mesh, scratch, origin };
        let before = args.before.as_ref().map(|_| Make::Before);
        let makes: Vec<_> = args.makes.iter().copied().chain(before).collect();
        let plan = Plan::new(args.quick, args.rounds, &makes);
        rows::measure(&bench, &plan, &args.only).await
    })?;
    let text = report::render(&outcome, &machine::describe(&programs), args.quick);
    println!("{text}");
    if args.only.is_empty() && args.makes.len() == 4 && args.before.is_none() {
        std::fs::write(&args.out, text)?;
        println!("written to {}", args.out.display());
    }
    Ok(outcome.is_trustworthy())
}

/// 5,000 clients with a connection each, and the proxies' two ends of each.
fn raise_open_files() -> io::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}
