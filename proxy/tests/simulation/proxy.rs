//! One proxy's decisions, all of them made by the code that makes them in production.

use std::time::Duration;

use sheetbend_proxy::traffic::balance::{self, FAILURE_COST, Load};
use sheetbend_proxy::traffic::retry::{self, Attempt, Budget, Failure, Verdict};

pub(crate) struct Proxy {
    loads: Vec<Load>,
    pub(crate) budget: Budget,
    pub(crate) retrying: u64,
}

impl Proxy {
    pub(crate) fn new(servers: usize) -> Self {
        Self { loads: (0..servers).map(|_| Load::default()).collect(), budget: Budget::default(), retrying: 0 }
    }

    /// A request begins.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.budget.begin(now);
    }

    /// It has ended.
    pub(crate) fn end(&mut self) {
        self.budget.end();
    }

    /// An attempt begins, at another server than the one tried before.
    pub(crate) fn pick(&mut self, tried: Option<usize>, chance: u64, now: Duration) -> usize {
        let at = balance::pick(self.loads.len(), tried, chance, |at| self.loads[at].cost(now));
        let at = at.expect("a script has servers");
        self.loads[at].begin();
        at
    }

    pub(crate) fn end_attempt(&mut self, server: usize) {
        self.loads[server].end();
    }

    pub(crate) fn answered(&mut self, server: usize, after: Duration, now: Duration) {
        self.loads[server].sample(after, now);
    }

    pub(crate) fn failed(&mut self, server: usize, now: Duration) {
        self.loads[server].sample(FAILURE_COST, now);
    }

    pub(crate) fn again(
        &mut self,
        failure: Failure,
        before: u32,
        idempotent: bool,
        chance: f64,
        now: Duration,
    ) -> Verdict {
        let attempt = Attempt { failure, before, idempotent, replayable: true, left: None };
        let verdict = retry::decide(&attempt, chance, || self.budget.take(now));
        self.retrying += u64::from(matches!(verdict, Verdict::Retry { .. }));
        verdict
    }

    pub(crate) fn end_retry(&mut self, retrying: bool) {
        if retrying {
            self.retrying -= 1;
            self.budget.retried();
        }
    }

    pub(crate) fn in_flight(&self, server: usize) -> u32 {
        self.loads[server].in_flight()
    }
}
