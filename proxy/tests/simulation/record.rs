//! What happened in a run, and the questions that are asked of it.

use std::ops::Range;
use std::time::Duration;

use sheetbend_proxy::traffic::outlier::State;

use super::proxy::Proxy;
use super::server::Server;

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Status(u16),
    Reset,
    Unreached,
    TimedOut,
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
    /// When something was sent to each server.
    asked: Vec<Vec<Duration>>,
    /// When each server was reached.
    reached: Vec<Vec<Duration>>,
    /// When each server was ejected by somebody.
    ejected: Vec<Vec<Duration>>,
    /// Seconds of endpoints of which a proxy saw enough: how often it judged them, and how often wrongly; the bad ones, and
    /// the good ones.
    verdicts: [(usize, usize); 2],
    /// What must never be, and was.
    wrong: Vec<String>,
}

impl Record {
    pub(crate) fn new(servers: usize) -> Self {
        let each = vec![Vec::new(); servers];
        let (asked, reached) = (each.clone(), each.clone());
        Self { calls: Vec::new(), asked, reached, ejected: each, verdicts: [(0, 0); 2], wrong: Vec::new() }
    }

    pub(crate) fn ended(&mut self, begun: Duration, at: Duration, attempts: u32, end: End) {
        self.calls.push(Ended { begun, at, attempts, end });
    }

    pub(crate) fn asked(&mut self, server: usize, at: Duration) {
        self.asked[server].push(at);
    }

    pub(crate) fn reached(&mut self, server: usize, at: Duration) {
        self.reached[server].push(at);
    }

    /// A retry was granted: those under way are a fifth and three of all at most, and those of ten seconds a fifth and a
    /// hundred.
    pub(crate) fn retried(&mut self, proxy: &Proxy) {
        let in_flight = proxy.budget.in_flight();
        if (proxy.retrying - 1) * 100 >= in_flight * 20 + 300 {
            self.wrong(format!("{} of {in_flight} requests under way are retries", proxy.retrying));
        }
        let (requests, retries) = proxy.recent();
        if retries * 100 > requests * 20 + 10_000 {
            self.wrong(format!("{retries} retries of {requests} requests in ten seconds"));
        }
    }

    /// An endpoint was ejected: half of them, and never nobody, stay in use.
    pub(crate) fn ejected(&mut self, server: usize, at: Duration, proxy: &Proxy) {
        self.ejected[server].push(at);
        self.check_floor(at, proxy);
    }

    pub(crate) fn check_floor(&mut self, at: Duration, proxy: &Proxy) {
        let (all, in_use) = proxy.in_use();
        if in_use < all.div_ceil(2).max(1) {
            self.wrong(format!("at {at:?} {in_use} of {all} endpoints are in use"));
        }
    }

    /// Holds each proxy's view of each server against the truth.
    pub(crate) fn look(&mut self, now: Duration, proxies: &[Proxy], servers: &[Server]) {
        for proxy in proxies {
            self.check_floor(now, proxy);
            let servers =
                servers.iter().enumerate().filter(|(_, server)| now >= server.since + server.conduct.seen_within());
            for (at, server) in servers.filter(|(at, _)| proxy.seen(*at, now) >= 20) {
                let Some(good) = server.conduct.truly() else { continue };
                let wrong = match proxy.state(at) {
                    State::Serving => !good,
                    State::Ejected { .. } => good,
                    State::Probing | State::Ramping { .. } => false,
                };
                let verdicts = &mut self.verdicts[usize::from(good)];
                verdicts.0 += 1;
                verdicts.1 += usize::from(wrong);
            }
        }
    }

    pub(crate) fn wrong(&mut self, what: String) {
        self.wrong.push(what);
    }

    /// At the end nothing counts as under way any more.
    pub(crate) fn nobody_left(&mut self, proxies: &[Proxy]) {
        for proxy in proxies {
            let in_flight = proxy.in_flight();
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

    /// The share of calls that began then and had what they asked for.
    pub(crate) fn success(&self, when: Range<Duration>) -> f64 {
        let good = self.within(when.clone()).filter(|call| matches!(call.end, End::Status(200..500))).count();
        good as f64 / self.calls(when).max(1) as f64
    }

    /// How often somebody ejected a server.
    pub(crate) fn ejections(&self, when: Range<Duration>) -> usize {
        (0..self.ejected.len()).map(|server| self.ejections_of(server, when.clone())).sum()
    }

    /// How often somebody ejected this server.
    pub(crate) fn ejections_of(&self, server: usize, when: Range<Duration>) -> usize {
        self.ejected[server].iter().filter(|at| when.contains(*at)).count()
    }

    /// When somebody sent something to a server for the first time from then on.
    pub(crate) fn first_asked(&self, server: usize, from: Duration) -> Option<Duration> {
        self.asked[server].iter().copied().find(|at| *at >= from)
    }

    /// Verdicts about endpoints that are bad, and about those that are good: all, and the wrong ones.
    pub(crate) fn verdicts(&self) -> [(usize, usize); 2] {
        self.verdicts
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

    /// How long calls that began then took, on average.
    pub(crate) fn mean(&self, when: Range<Duration>) -> Duration {
        let all: Duration = self.within(when.clone()).map(|call| call.at - call.begun).sum();
        all.div_f64(self.calls(when).max(1) as f64)
    }

    /// How many attempts each server saw.
    pub(crate) fn loads(&self, when: Range<Duration>) -> Vec<usize> {
        let before = |times: &[Duration], end| times.partition_point(|at| *at < end);
        self.reached.iter().map(|times| before(times, when.end) - before(times, when.start)).collect()
    }

    fn within(&self, when: Range<Duration>) -> impl Iterator<Item = &Ended> {
        self.calls.iter().filter(move |call| when.contains(&call.begun))
    }
}
