//! What is measured, row by row, and what is asked of Sheetbend in each.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::late;
use crate::load::{self, handshake, http1, http2, idle};
use crate::origin::LARGE;
use crate::systems::{Bench, Http, Make, Pair, System, systems, with_and_without_policies};

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Row {
    /// HTTP/1.1 small GET, 64 connections.
    Small,
    /// Added p50 at 1 connection.
    Latency,
    /// HTTP/2 small GET, 16 connections × 32 streams.
    Http2,
    /// 1 MiB GET.
    Large,
    /// A new client connection a request.
    Fresh,
    /// A full mTLS handshake at the inbound proxy.
    Handshake,
    /// RSS of the pair, idle.
    Idle,
    /// RSS of each of 5,000 idle connections.
    IdleConnection,
    /// Start of both to the first answer.
    Start,
    /// Size of the binary.
    Size,
    /// A registration to the first request that it routes.
    Registered,
    /// What policies cost where nobody wrote one.
    Policies,
}

/// Idle connections opened for [`Row::IdleConnection`].
const IDLE: usize = 5_000;

/// How much is measured.
pub(crate) struct Plan {
    rounds: usize,
    warm: Duration,
    window: Duration,
    makes: Vec<Make>,
}

impl Plan {
    /// The usual plan, or a quick one.
    pub(crate) fn new(quick: bool, rounds: Option<usize>, makes: &[Make]) -> Self {
        let (usual, window) = if quick { (2, 500) } else { (5, 1000) };
        Self {
            rounds: rounds.unwrap_or(usual),
            warm: Duration::from_millis(300),
            window: Duration::from_millis(window),
            makes: makes.to_vec(),
        }
    }
}

/// What was measured.
#[derive(Default)]
pub(crate) struct Outcome {
    samples: BTreeMap<(Row, Make, Http), Vec<f64>>,
    failures: BTreeMap<(Row, Make, Http), u64>,
    /// p50 of one connection straight to the origin, a sample a round.
    direct: Vec<f64>,
    /// Remarks for the reader, such as what key exchange each agreed to.
    pub(crate) notes: Vec<String>,
}

impl Outcome {
    fn add(&mut self, row: Row, system: System, value: f64) {
        self.samples.entry((row, system.make, system.between)).or_default().push(value);
    }

    fn add_window(&mut self, row: Row, system: System, window: load::Window, unit: f64) {
        match window.done {
            0 => *self.failures.entry((row, system.make, system.between)).or_default() += 1,
            done => self.add(row, system, window.cpu as f64 / done as f64 / unit),
        }
        if window.failed > 0 {
            *self.failures.entry((row, system.make, system.between)).or_default() += window.failed;
        }
    }

    /// The median of a cell.
    pub(crate) fn median(&self, row: Row, make: Make, between: Http) -> Option<f64> {
        median(self.samples.get(&(row, make, between))?)
    }

    /// The better of a make's settings.
    pub(crate) fn best(&self, row: Row, make: Make) -> Option<f64> {
        let both = [Http::One, Http::Two].into_iter().filter_map(|between| self.median(row, make, between));
        both.min_by(f64::total_cmp)
    }

    /// CPU a request with policies, as a part of what it is without.
    pub(crate) fn policies(&self) -> Option<f64> {
        let of = |make| self.median(Row::Policies, make, Http::Two);
        Some(of(Make::Sheetbend)? / of(Make::Bare)?)
    }

    /// A cell of ours as a part of what it is with the other build: the median of the rounds, each with its own.
    pub(crate) fn beside_before(&self, row: Row) -> Option<f64> {
        let of = |make| self.samples.get(&(row, make, Http::Two));
        let rounds = of(Make::Sheetbend)?.iter().zip(of(Make::Before)?);
        median(&rounds.map(|(now, before)| now / before).collect::<Vec<_>>())
    }

    /// Failed requests of a cell.
    pub(crate) fn failed(&self, row: Row, make: Make, between: Http) -> u64 {
        self.failures.get(&(row, make, between)).copied().unwrap_or(0)
    }

    /// The median of p50 without proxies, in nanoseconds.
    pub(crate) fn direct(&self) -> Option<f64> {
        median(&self.direct)
    }

    /// nginx ÷ Envoy with HTTP/1.1 between: what says whether the machine behaved.
    pub(crate) fn yardstick(&self) -> Option<f64> {
        Some(self.median(Row::Small, Make::Nginx, Http::One)? / self.median(Row::Small, Make::Envoy, Http::One)?)
    }

    /// Whether nothing failed and the yardstick is as usual.
    pub(crate) fn is_trustworthy(&self) -> bool {
        self.failures.is_empty() && self.yardstick().is_none_or(|ratio| (0.35..=0.75).contains(&ratio))
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

/// Measures `only` these rows, or all.
pub(crate) async fn measure(bench: &Bench<'_>, plan: &Plan, only: &[Row]) -> io::Result<Outcome> {
    let wanted = |row: Row| only.is_empty() || only.contains(&row);
    let mut outcome = Outcome::default();
    let loaded = [Row::Small, Row::Latency, Row::Large, Row::Fresh, Row::Handshake];
    if loaded.into_iter().any(wanted) {
        let pairs = start_all(bench, plan, Http::One).await?;
        for row in loaded.into_iter().filter(|row| wanted(*row)) {
            measure_row(bench, plan, row, &pairs, &mut outcome).await?;
        }
    }
    if wanted(Row::Http2) {
        let pairs = start_all(bench, plan, Http::Two).await?;
        measure_row(bench, plan, Row::Http2, &pairs, &mut outcome).await?;
    }
    if wanted(Row::Policies) && plan.makes.contains(&Make::Sheetbend) {
        let mut pairs = Vec::new();
        for system in with_and_without_policies() {
            pairs.push(Pair::start(bench, system).await?);
        }
        measure_row(bench, plan, Row::Policies, &pairs, &mut outcome).await?;
    }
    if wanted(Row::Start) || wanted(Row::Idle) || wanted(Row::IdleConnection) {
        measure_starts(bench, plan, wanted(Row::IdleConnection), &mut outcome).await?;
    }
    if wanted(Row::Registered) && plan.makes.contains(&Make::Sheetbend) {
        eprintln!("{:?}", Row::Registered);
        let taken = late::registrations(bench).await?;
        let p99 = taken.get(taken.len() * 99 / 100).map(Duration::as_nanos);
        if let (Some(p99), Some(system)) = (p99, systems(Http::One).last()) {
            outcome.add(Row::Registered, *system, p99 as f64);
        }
        if let Some(p50) = taken.get(taken.len() / 2) {
            outcome.notes.push(format!(
                "Registration to the first request that it routes, p50: {:.1} ms.",
                p50.as_secs_f64() * 1e3
            ));
        }
    }
    if wanted(Row::Size) {
        let program = &bench.programs;
        let ours = [(Make::Envoy, &program.envoy), (Make::Sheetbend, &program.sheetbend)];
        for (make, path) in ours.into_iter().chain(program.before.as_ref().map(|path| (Make::Before, path))) {
            if let Ok(file) = fs::metadata(path) {
                let system = System { make, client: Http::One, between: Http::Two, origin: Http::One };
                outcome.add(Row::Size, system, file.len() as f64);
            }
        }
    }
    Ok(outcome)
}

fn wanted_systems(plan: &Plan, spoken: Http) -> Vec<System> {
    systems(spoken).into_iter().filter(|system| plan.makes.contains(&system.make)).collect()
}

async fn start_all(bench: &Bench<'_>, plan: &Plan, spoken: Http) -> io::Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    for system in wanted_systems(plan, spoken) {
        pairs.push(Pair::start(bench, system).await?);
    }
    Ok(pairs)
}

/// All rounds of one row; each round begins with another system.
async fn measure_row(
    bench: &Bench<'_>,
    plan: &Plan,
    row: Row,
    pairs: &[Pair],
    outcome: &mut Outcome,
) -> io::Result<()> {
    eprintln!("{row:?}");
    // The first round is thrown away: those that open a connection a stream do it there.
    for pair in pairs {
        measure_cell(bench, plan, row, pair, &mut Outcome::default()).await?;
    }
    for round in 0..plan.rounds {
        for at in 0..pairs.len() {
            if let Some(pair) = pairs.get((at + round) % pairs.len()) {
                measure_cell(bench, plan, row, pair, outcome).await?;
            }
        }
    }
    Ok(())
}

async fn measure_cell(bench: &Bench<'_>, plan: &Plan, row: Row, pair: &Pair, outcome: &mut Outcome) -> io::Result<()> {
    let (entry, system) = (pair.entry, pair.system);
    let authority = bench.authority(system);
    let small = http1::get("/small", &authority);
    let both = || pair.cpu();
    match row {
        Row::Small | Row::Policies => {
            let load = |shared| http1::kept(entry, small.clone(), shared);
            let window = load::measure(64, plan.warm, plan.window, both, load).await;
            outcome.add_window(row, system, window, 1.0);
        }
        Row::Large => {
            let request = http1::get("/large", &authority);
            let load = |shared| http1::kept(entry, request.clone(), shared);
            let window = load::measure(8, plan.warm, plan.window, both, load).await;
            outcome.add_window(row, system, window, LARGE as f64);
        }
        Row::Fresh => {
            let load = |shared| http1::fresh(entry, small.clone(), shared);
            let window = load::measure(16, plan.warm, plan.window, both, load).await;
            outcome.add_window(row, system, window, 1.0);
        }
        Row::Http2 => {
            let authority: Arc<str> = authority.into();
            let load = |shared| http2::kept(entry, authority.clone(), 32, shared);
            let window = load::measure(16, plan.warm, plan.window, both, load).await;
            outcome.add_window(row, system, window, 1.0);
        }
        Row::Handshake if system.between == Http::Two || system.make == Make::Nginx => {
            let ours = matches!(system.make, Make::Sheetbend | Make::Before);
            let (name, alpn) = match ours {
                true => (format!("{}.web.default.cluster.local", bench.origin.port()), "sheetbend/h2"),
                false => ("web.default".to_string(), "h2"),
            };
            let path = |file: &str| if ours { bench.mesh.path(file) } else { bench.pki.path(file) };
            let caller = handshake::Caller::new(path, &name, alpn)?;
            let group = caller.shake(pair.middle).await?;
            let note = format!("Key exchange of a handshake with {:?}: {group}.", system.make);
            if !outcome.notes.contains(&note) {
                outcome.notes.push(note);
            }
            let load = |shared| handshake::again_and_again(caller.clone(), pair.middle, shared);
            let window = load::measure(8, plan.warm, plan.window, || pair.inbound.cpu(), load).await;
            outcome.add_window(row, system, window, 1.0);
        }
        Row::Latency => {
            let p50 = async |to| {
                let taken = http1::latencies(to, &small, 200, plan.window).await?;
                taken.get(taken.len() / 2).map(|ns| *ns as f64).ok_or_else(|| io::Error::other("no answer in time"))
            };
            let direct = p50(bench.origin).await?;
            outcome.direct.push(direct);
            outcome.add(row, system, p50(entry).await? - direct);
        }
        _ => {}
    }
    Ok(())
}

/// Pairs started one at a time: how long it takes, what they hold idle, and what each idle connection adds.
async fn measure_starts(bench: &Bench<'_>, plan: &Plan, with_idle: bool, outcome: &mut Outcome) -> io::Result<()> {
    eprintln!("{:?}", Row::Start);
    for round in 0..plan.rounds {
        for system in wanted_systems(plan, Http::One) {
            let pair = Pair::start(bench, system).await?;
            outcome.add(Row::Start, system, pair.started_in.as_nanos() as f64);
            tokio::time::sleep(Duration::from_millis(200)).await;
            let idle = pair.resident() as f64;
            outcome.add(Row::Idle, system, idle);
            if round == 0 && with_idle {
                let clients = idle::open(pair.entry, &http1::get("/small", &bench.authority(system)), IDLE).await?;
                outcome.add(Row::IdleConnection, system, (pair.resident() as f64 - idle) / IDLE as f64);
                drop(clients);
            }
        }
    }
    Ok(())
}
