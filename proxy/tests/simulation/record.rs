//! What happened in a run, and the questions that are asked of it.

use std::ops::Range;
use std::time::Duration;

use super::proxy::Proxy;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Status(u16),
    Reset,
    Unreached,
    CallerLeft,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Ended {
    begun: Duration,
    at: Duration,
    attempts: u32,
    end: End,
}

/// Everything that happened.
#[derive(Debug, PartialEq)]
pub(crate) struct Record {
    calls: Vec<Ended>,
    /// When each server was reached.
    reached: Vec<Vec<Duration>>,
    /// What must never be, and was.
    wrong: Vec<String>,
}

impl Record {
    pub(crate) fn new(servers: usize) -> Self {
        Self { calls: Vec::new(), reached: vec![Vec::new(); servers], wrong: Vec::new() }
    }

    pub(crate) fn ended(&mut self, begun: Duration, at: Duration, attempts: u32, end: End) {
        self.calls.push(Ended { begun, at, attempts, end });
    }

    pub(crate) fn reached(&mut self, server: usize, at: Duration) {
        self.reached[server].push(at);
    }

    /// A retry was granted: those under way are a fifth and three of all at most.
    pub(crate) fn retried(&mut self, proxy: &Proxy) {
        let in_flight = proxy.budget.in_flight();
        if (proxy.retrying - 1) * 100 >= in_flight * 20 + 300 {
            self.wrong(format!("{} of {in_flight} requests under way are retries", proxy.retrying));
        }
    }

    pub(crate) fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    /// At the end nothing counts as under way any more.
    pub(crate) fn nobody_left(&mut self, proxies: &[Proxy]) {
        for proxy in proxies {
            let in_flight: u32 = (0..self.reached.len()).map(|server| proxy.in_flight(server)).sum();
            if (u64::from(in_flight), proxy.budget.in_flight(), proxy.retrying) != (0, 0, 0) {
                self.wrong.push(format!("{in_flight} attempts are under way for ever"));
            }
        }
    }

    /// What must hold of every run.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.wrong.first().map_or(Ok(()), |first| Err(format!("{first} ({} in all)", self.wrong.len())))
    }

    /// Calls that began in a span of time.
    pub(crate) fn calls(&self, when: Range<Duration>) -> usize {
        self.within(when).count()
    }

    /// Attempts of calls that began then, a call.
    pub(crate) fn attempts(&self, when: Range<Duration>) -> f64 {
        let attempts: u64 = self.within(when.clone()).map(|call| u64::from(call.attempts)).sum();
        attempts as f64 / self.calls(when).max(1) as f64
    }

    /// How long calls that began then took: so large a share of them no longer than this.
    pub(crate) fn quantile(&self, share: f64, when: Range<Duration>) -> Duration {
        let mut all: Vec<Duration> = self.within(when).map(|call| call.at - call.begun).collect();
        all.sort_unstable();
        let at = (all.len() as f64 * share) as usize;
        all.get(at.min(all.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    /// How many attempts each server saw.
    pub(crate) fn loads(&self, when: Range<Duration>) -> Vec<usize> {
        self.reached.iter().map(|times| times.iter().filter(|at| when.contains(*at)).count()).collect()
    }

    fn within(&self, when: Range<Duration>) -> impl Iterator<Item = &Ended> {
        self.calls.iter().filter(move |call| when.contains(&call.begun))
    }
}
