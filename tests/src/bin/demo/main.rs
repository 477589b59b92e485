//! A small shop on loopback, every part beside its own sidecar, and a live table of who calls whom.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};

mod graph;
mod mesh;
mod scenario;
mod shop;

use graph::Graph;
use mesh::Mesh;
use scenario::Scenario;
use shop::Shop;

/// Set by Ctrl-C and by SIGTERM; looked at wherever the demo waits.
static STOP: AtomicBool = AtomicBool::new(false);

/// How long a scenario takes where nobody says.
const SCENARIO: Duration = Duration::from_secs(30);

/// A small shop on loopback: five services and their customers, each beside its own sidecar.
#[derive(Parser)]
#[command(name = "demo")]
struct Args {
    /// End after this long (`10s`, `2m`), with status 0 only if every expected edge was seen with mutual TLS and no request failed
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    length: Option<Duration>,
    /// Play one of these instead: what the mesh does when something is wrong. Status 0 only if callers got what it promises
    #[arg(long, value_enum)]
    scenario: Option<Scenario>,
    /// Requests a second [default: 50, in a scenario 200]
    #[arg(long)]
    rate: Option<u32>,
    /// With `json`, the last line is one JSON document: the final graph, or what a scenario came to
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    let args = Args::parse();
    listen_for_signals();
    let outcome = match args.scenario {
        None => demo(&args),
        Some(scenario) => scenario::play(
            scenario,
            &scenario::Settings {
                length: args.length.unwrap_or(SCENARIO),
                rate: args.rate.unwrap_or(200),
                output: args.output,
            },
        ),
    };
    match outcome {
        Ok(code) => code,
        Err(_) if STOP.load(Ordering::Relaxed) => ExitCode::from(130),
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args) -> Result<ExitCode, String> {
    let began = Instant::now();
    let say = |text: &str| match args.output {
        Output::Table => println!("{text}"),
        Output::Json => eprintln!("{text}"),
    };
    say("Starting the control plane, and five services with a sidecar each …");
    let mut mesh = Mesh::start()?;
    let mut shop = Shop::open(&mut mesh, args.rate.unwrap_or(50))?;
    say(&format!("The shop is open after {:.1} s. Its graph: {}/graph", began.elapsed().as_secs_f32(), mesh.admin()));

    let live = args.output == Output::Table && std::io::stdout().is_terminal();
    let end = args.length.map(|length| Instant::now() + length);
    while !STOP.load(Ordering::Relaxed) && end.is_none_or(|end| Instant::now() < end) {
        pause(Duration::from_secs(1), end);
        shop.check()?;
        if live {
            show(&mesh, &mut shop, args.length.is_none());
        }
    }

    let tally = shop.close()?;
    let graph = settled(&mesh);
    let table = mesh.table();
    let missing = graph.missing();
    shop.end();
    mesh.end()?;

    if !live {
        say(table.trim_end());
    }
    say(&format!("{} requests sent, {} answered, {} failed", tally.sent, tally.answered, tally.failed));
    for line in &missing {
        say(line);
    }
    say(&format!("To use it yourself: export PATH=\"{}:$PATH\"", mesh.programs().display()));
    if args.output == Output::Json {
        println!("{}", graph.json());
    }
    let good = missing.is_empty() && tally.failed == 0 && tally.answered > 0;
    // Who ended the demo by hand saw what there was to see; `--for` is a verdict.
    Ok(if good || args.length.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The graph once it has every expected edge, or as it is when that takes too long: proxies report every 5 s.
fn settled(mesh: &Mesh) -> Graph {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let graph = mesh.graph().unwrap_or_default();
        if graph.missing().is_empty() || Instant::now() > deadline {
            return graph;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn show(mesh: &Mesh, shop: &mut Shop, by_hand: bool) {
    let table = mesh.table();
    let tally = shop.tally();
    let mut out = std::io::stdout().lock();
    // Home, then clear what is below: no flicker.
    let _ = write!(out, "\x1b[H\x1b[JThe knot shop                                graph: {}/graph\n\n", mesh.admin());
    let _ = writeln!(out, "{}", table.trim_end());
    let _ = writeln!(out, "\n{} requests sent, {} answered, {} failed", tally.sent, tally.answered, tally.failed);
    let _ = writeln!(
        out,
        "From another terminal: {} graph --proxy {}",
        mesh.programs().join("sheetbend").display(),
        mesh.admin()
    );
    if by_hand {
        let _ = writeln!(out, "Ctrl-C ends it.");
    }
    let _ = out.flush();
}

/// Waits for `length`, or less when the demo ends before that.
fn pause(length: Duration, end: Option<Instant>) {
    let wake = Instant::now() + length;
    let wake = end.map_or(wake, |end| wake.min(end));
    while !STOP.load(Ordering::Relaxed) && Instant::now() < wake {
        std::thread::sleep(Duration::from_millis(50).min(wake.saturating_duration_since(Instant::now())));
    }
}

fn listen_for_signals() {
    use tokio::signal::unix::{SignalKind, signal};
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt()).expect("a handler for SIGINT");
            let mut terminate = signal(SignalKind::terminate()).expect("a handler for SIGTERM");
            loop {
                // Either ends the demo; it does not matter which is seen first.
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                STOP.store(true, Ordering::Relaxed);
            }
        });
    });
}

/// `10s`, `2m`, `1h`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is not a duration: write 10s or 2m"))?;
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        unit => return Err(format!("`{unit}` is not a unit: write s, m or h")),
    };
    Ok(Duration::from_secs(number.saturating_mul(unit)))
}
