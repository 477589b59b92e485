//! Trouble on purpose: one caller, a few endpoints that do as they are told, and what the caller was promised.
//!
//! The caller's sidecar is a real one, and reads its policy from a control plane that reads a folder. The servers run in
//! this process, so that they can be made to fail.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use http::Response;
use serde_json::{Value, json};
use sheetbend_tests::{App, Load, Mesh, Sidecar, Tally, full};

use crate::{Output, STOP};

mod plays;

/// What can be played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// One of five endpoints fails, and comes back
    Outage,
    /// One of three endpoints answers 25 times slower than the others
    SlowEndpoint,
    /// Every endpoint fails at once, while every caller would try again
    RetryStorm,
    /// A new version takes over: a tenth, half, then all of the requests
    Canary,
}

/// How it is played.
pub(crate) struct Settings {
    pub(crate) length: Duration,
    /// Requests a second, of all clients together.
    pub(crate) rate: u32,
    pub(crate) output: Output,
}

/// Connections of the caller.
const CLIENTS: u32 = 20;

/// Plays one; the status is 0 only if every promise was kept.
pub(crate) fn play(scenario: Scenario, settings: &Settings) -> Result<ExitCode, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start threads: {error}"))?;
    let (promises, tally) = runtime.block_on(async {
        match scenario {
            Scenario::Outage => plays::outage(settings).await,
            Scenario::SlowEndpoint => plays::slow_endpoint(settings).await,
            Scenario::RetryStorm => plays::retry_storm(settings).await,
            Scenario::Canary => plays::canary(settings).await,
        }
    });
    if STOP.load(Relaxed) {
        return Ok(ExitCode::from(130));
    }
    let kept = promises.iter().all(|promise| promise.kept);
    for promise in &promises {
        let word = if promise.kept { "kept  " } else { "BROKEN" };
        settings.say(&format!("{word} {}: {}", promise.what, promise.measured));
    }
    let (good, failed) = (tally.good.len(), tally.failed.len());
    settings.say(&format!("{} requests, {good} answered well, {failed} failed", good + failed));
    if settings.output == Output::Json {
        let told =
            |promise: &Promise| json!({ "what": promise.what, "measured": promise.measured, "kept": promise.kept });
        let name = scenario.to_possible_value().map(|value| value.get_name().to_string());
        let promises: Vec<Value> = promises.iter().map(told).collect();
        let answered = json!({ "sent": good + failed, "answered": good, "failed": failed });
        println!("{}", json!({ "scenario": name, "kept": kept, "promises": promises, "requests": answered }));
    }
    Ok(if kept { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Settings {
    fn say(&self, text: &str) {
        match self.output {
            Output::Table => println!("{text}"),
            Output::Json => eprintln!("{text}"),
        }
    }
}

/// What callers were promised, and what they got.
struct Promise {
    what: String,
    measured: String,
    kept: bool,
}

impl Promise {
    fn new(what: impl Into<String>, measured: impl Into<String>, kept: bool) -> Self {
        Self { what: what.into(), measured: measured.into(), kept }
    }
}

/// A server that does as it is told.
struct Server {
    app: App,
    status: Arc<AtomicU16>,
    delay: Arc<AtomicU64>,
}

impl Server {
    /// One that takes `delay` for each answer, and says `name`.
    async fn start(name: &'static str, delay: Duration) -> Self {
        let status = Arc::new(AtomicU16::new(200));
        let delay = Arc::new(AtomicU64::new(delay.as_millis() as u64));
        let (says, takes) = (Arc::clone(&status), Arc::clone(&delay));
        let app = App::start(move |_| {
            let (status, delay) = (says.load(Relaxed), Duration::from_millis(takes.load(Relaxed)));
            async move {
                tokio::time::sleep(delay).await;
                Response::builder().status(status).body(full(name)).expect("an answer")
            }
        });
        Self { app: app.await, status, delay }
    }

    fn fails(&self, fails: bool) {
        self.status.store(if fails { 503 } else { 200 }, Relaxed);
    }

    fn takes(&self, delay: Duration) {
        self.delay.store(delay.as_millis() as u64, Relaxed);
    }

    fn place(&self) -> String {
        self.app.address.to_string()
    }
}

fn seen(servers: &[Server]) -> u64 {
    servers.iter().map(|server| server.app.seen.load(Relaxed)).sum()
}

/// A Service and its endpoints, as an operator writes them down.
fn service(name: &str, servers: &[Server]) -> String {
    let ports: Vec<u16> = servers.iter().map(|server| server.app.port()).collect();
    sheetbend_tests::service(name, &ports)
}

/// What is played on: a mesh with one caller, and its requests.
struct Stage<'a> {
    settings: &'a Settings,
    mesh: Mesh,
    caller: Sidecar,
    began: Instant,
    /// State of each endpoint when it was last looked at.
    states: Vec<(String, String)>,
    live: bool,
}

impl<'a> Stage<'a> {
    /// Starts everything, and waits until the caller has had an answer.
    async fn set(settings: &'a Settings, what: &str, resources: &str) -> Self {
        settings.say(what);
        let mesh = Mesh::with_resources(resources, &[]);
        let caller = mesh.caller("caller");
        caller.first_answer("http://web/").await;
        let live = settings.output == Output::Table && std::io::stdout().is_terminal();
        settings.say(&format!("The caller's breakers: http://{}/breakers", caller.admin()));
        Self { settings, mesh, caller, began: Instant::now(), states: Vec::new(), live }
    }

    fn load(&self) -> Load {
        Load::start(self.caller.proxy(), "http://web/", CLIENTS, f64::from(self.settings.rate) / f64::from(CLIENTS))
    }

    /// This part of the whole length.
    fn part(&self, of_a_hundred: u32) -> Duration {
        self.settings.length * of_a_hundred / 100
    }

    /// Says what happens now, and lets it happen for so long while the breakers are shown.
    async fn act(&mut self, what: &str, length: Duration, load: &Load) {
        self.settings.say(&format!("{:>6.1} s  {what}", self.began.elapsed().as_secs_f32()));
        let end = Instant::now() + length;
        while Instant::now() < end && !STOP.load(Relaxed) {
            self.look(what, load).await;
            let left = end.saturating_duration_since(Instant::now());
            tokio::time::sleep(left.min(Duration::from_millis(250))).await;
        }
    }

    /// Waits until an endpoint is in a state, and says how long that took; not for ever.
    async fn becomes(&mut self, place: &str, state: &str, load: &Load) -> Option<Duration> {
        const PATIENCE: Duration = Duration::from_secs(30);
        let began = Instant::now();
        while began.elapsed() < PATIENCE && !STOP.load(Relaxed) {
            self.look("waiting for the endpoint to serve again", load).await;
            if self.states.iter().any(|(known, now)| known == place && now == state) {
                return Some(began.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        None
    }

    /// Shows the breakers: on a terminal all of them, elsewhere what changed.
    async fn look(&mut self, what: &str, load: &Load) {
        let Ok(page) = sheetbend_tests::http::get(self.caller.admin(), "/breakers").await else { return };
        let page: Value = serde_json::from_slice(&page.body).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or("-").to_string();
        let mut states = Vec::new();
        let mut table = format!("{:<24}{:<12}{:<24}{}\n", "ENDPOINT", "STATE", "REASON", "FAILED LATELY");
        for one in page["endpoints"].as_array().into_iter().flatten() {
            let (place, state) = (text(&one["endpoint"]), text(&one["state"]));
            let failed = format!("{} of {}", one["failures"], one["requests"]);
            let _ = writeln!(table, "{place:<24}{state:<12}{:<24}{failed}", text(&one["reason"]));
            let before = self.states.iter().find(|(known, _)| *known == place).map(|(_, state)| state.as_str());
            if !self.live && before.is_some_and(|before| before != state) {
                let at = self.began.elapsed().as_secs_f32();
                self.settings.say(&format!("{at:>6.1} s  {place} is {state} ({})", text(&one["reason"])));
            }
            states.push((place, state));
        }
        self.states = states;
        if self.live {
            let tally = load.so_far();
            let mut out = std::io::stdout().lock();
            // Home, then clear what is below: no flicker.
            let _ = write!(out, "\x1b[H\x1b[J{:.1} s  {what}\n\n{table}", self.began.elapsed().as_secs_f32());
            let _ = writeln!(out, "\n{} answered well, {} failed", tally.good.len(), tally.failed.len());
            let _ = out.flush();
        }
    }
}

/// In percent.
fn success(tally: &Tally) -> f64 {
    let (good, all) = (tally.good.len(), tally.good.len() + tally.failed.len());
    100.0 * good as f64 / all.max(1) as f64
}
