//! What is learned of one endpoint.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{Detection, Fault, Reason, State, Turn};
use crate::traffic::balance::Load;
use crate::traffic::window::Window;

/// The last turns of an endpoint that are remembered.
const HISTORY: usize = 16;

/// What is learned of one endpoint.
#[derive(Debug, Default)]
pub struct Vitals {
    /// How loaded it is.
    pub load: Load,
    state: AtomicU64,
    /// How often that changed.
    turns: AtomicU32,
    pub(super) runs: Runs,
    /// When the newest of the requests was sent of which anything was heard, in nanoseconds; the lowest bit says that it
    /// failed.
    newest: AtomicU64,
    window: Window,
    /// Whether somebody is trying it.
    pub(super) probed: AtomicBool,
    /// Whether it is one of its floor's endpoints now.
    pub(super) present: AtomicBool,
    /// Nanoseconds that its current or last ejection takes.
    period: AtomicU64,
    /// When it last became `Serving` again, in nanoseconds.
    restored: AtomicU64,
    /// Until then nothing ejects it, in nanoseconds.
    spared: AtomicU64,
    /// Since when it serves, where others served before it, in nanoseconds.
    joined: AtomicU64,
    /// Which of its backend's levels it is in.
    level: AtomicU32,
    /// Until then its level is taken to do without it, in nanoseconds.
    passed_over: AtomicU64,
    /// What its checks say.
    pub(super) unwell: AtomicBool,
    history: Mutex<VecDeque<Turn>>,
}

impl Vitals {
    /// How it is used now.
    pub fn state(&self) -> State {
        State::unpack(self.state.load(Relaxed))
    }

    /// How often its state changed so far.
    pub fn turns(&self) -> u32 {
        self.turns.load(Relaxed)
    }

    /// Requests of the last `interval`, and those of them that failed.
    pub fn recent(&self, interval: Duration, now: Duration) -> (u32, u32) {
        self.window.sum(interval, now)
    }

    /// Failures since anything went well, of each kind.
    pub fn in_a_row(&self) -> InARow {
        self.runs.get()
    }

    /// How long its current or last ejection takes.
    pub fn period(&self) -> Duration {
        Duration::from_nanos(self.period.load(Relaxed))
    }

    /// Whether it is one of its backend's endpoints now.
    pub fn is_present(&self) -> bool {
        self.present.load(Relaxed)
    }

    /// Until when nothing ejects it, because an operator said so.
    pub fn spared(&self) -> Duration {
        Duration::from_nanos(self.spared.load(Relaxed))
    }

    /// How it came to be what it is, the newest turn at the end.
    pub fn history(&self) -> Vec<Turn> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// Whether it may be chosen. `chance`, in `0.0..1.0`, is drawn once a pick, and decides about those whose share grows.
    pub fn admits(&self, chance: f64, now: Duration) -> bool {
        match self.state() {
            State::Serving => true,
            State::Ejected { .. } | State::Probing => false,
            State::Ramping { since } => chance < self.grown(since, now),
        }
    }

    /// How much of what its level may get it can take, in `0.0..=1.0`.
    pub fn share(&self, now: Duration) -> f64 {
        match self.state() {
            // It fails, and is in use for the floor alone: where another level does well, that gets more.
            _ if self.unwell.load(Relaxed) || (now.as_nanos() as u64) < self.passed_over.load(Relaxed) => 0.0,
            State::Serving => 1.0,
            State::Ejected { .. } | State::Probing => 0.0,
            State::Ramping { since } => self.grown(since, now),
        }
    }

    /// How much of its share it has back that has grown since then.
    fn grown(&self, since: Duration, now: Duration) -> f64 {
        let (passed, ramp) = (now.saturating_sub(since), self.ramp());
        if passed >= ramp { 1.0 } else { passed.as_secs_f64() / ramp.as_secs_f64() }
    }

    /// Since when it serves, where others served before: as a newcomer, or again after an ejection.
    pub fn joined(&self) -> Option<Duration> {
        Some(Duration::from_nanos(self.joined.load(Relaxed))).filter(|joined| !joined.is_zero())
    }

    /// It serves from now on, where others served before.
    pub(super) fn join(&self, now: Duration) {
        self.joined.store(now.as_nanos() as u64, Relaxed);
    }

    /// Says which of its backend's levels it is in; those get requests one after the other.
    pub fn put_into(&self, level: u32) {
        self.level.store(level, Relaxed);
    }

    /// Which of its backend's levels it is in.
    pub(super) fn level(&self) -> u32 {
        self.level.load(Relaxed)
    }

    /// Under the lock of its floor. Whoever tried it before has nothing more to say.
    pub(super) fn turn(&self, state: State, reason: Option<Reason>, at: Duration) {
        self.probed.store(false, Relaxed);
        self.state.store(state.pack(), Relaxed);
        if let State::Ramping { since } = state {
            self.join(since);
        }
        self.turns.fetch_add(1, Relaxed);
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(Turn { at, state, reason });
    }

    /// A request that was sent then went well.
    pub(super) fn went_well(&self, sent: Duration, detection: &Detection, now: Duration) {
        self.window.count(false, detection.interval, now);
        self.heard(sent, false);
        self.runs.end();
    }

    /// A request that was sent then failed: how many have in a row now.
    pub(super) fn failed(&self, sent: Duration, fault: Fault, detection: &Detection, now: Duration) -> InARow {
        self.window.count(true, detection.interval, now);
        self.heard(sent, true);
        self.runs.extend(fault, detection.split)
    }

    /// What it did before is no news, and its former latency is that of its failures.
    pub(super) fn forget(&self) {
        self.window.clear();
        self.load.forget();
        self.runs.end();
        self.newest.store(0, Relaxed);
        self.pass_over(Duration::ZERO);
    }

    /// How long an ejection takes from now on.
    pub(super) fn take(&self, period: Duration) -> Duration {
        self.period.store(period.as_nanos() as u64, Relaxed);
        period
    }

    /// Its level is taken to do without it until then.
    pub(super) fn pass_over(&self, until: Duration) {
        self.passed_over.store(until.as_nanos() as u64, Relaxed);
    }

    pub(super) fn spare(&self, until: Duration) {
        self.spared.store(until.as_nanos() as u64, Relaxed);
    }

    pub(super) fn restored(&self, now: Duration) {
        self.restored.store(now.as_nanos() as u64, Relaxed);
    }

    /// Whether a failure now comes soon after it came back.
    pub(super) fn is_soon_again(&self, detection: &Detection, now: Duration) -> bool {
        let restored = Duration::from_nanos(self.restored.load(Relaxed));
        !restored.is_zero() && now < restored + self.period() * 2 + detection.interval
    }

    /// How long its share grows.
    pub(super) fn ramp(&self) -> Duration {
        self.period() / 2
    }

    /// An answer to what was sent earlier than something that was heard of is no news.
    fn heard(&self, sent: Duration, bad: bool) {
        let newest = (sent.as_nanos() as u64 & !1) | u64::from(bad);
        // Two at once may lose one of them, which the next mends.
        if newest > self.newest.load(Relaxed) {
            self.newest.store(newest, Relaxed);
        }
    }

    /// Whether the newest request of which anything was heard failed.
    fn has_failed_last(&self) -> bool {
        self.newest.load(Relaxed) & 1 == 1
    }

    /// Whether it is in use though the last that was heard of it was a failure.
    pub(super) fn is_doubted(&self) -> bool {
        let in_use = matches!(self.state(), State::Serving | State::Ramping { .. });
        in_use && self.has_failed_last() && self.present.load(Relaxed)
    }

    /// Whether it looks as if it failed, which says less than that it is ejected: the last that was heard of it was a
    /// failure, or it is halfway to the least share.
    pub(super) fn is_suspect(&self, detection: &Detection, now: Duration) -> bool {
        if self.state() != State::Serving || self.has_failed_last() {
            return true;
        }
        let (all, bad) = self.recent(detection.interval, now);
        all >= 5 && f64::from(all - bad) < f64::from(all) * f64::midpoint(detection.success_rate, 1.0)
    }

    /// What speaks against it after so many failures in a row, by itself.
    pub(super) fn verdict(&self, in_a_row: InARow, detection: &Detection, now: Duration) -> Option<Reason> {
        let reached = |number, threshold| threshold > 0 && number >= threshold;
        if reached(in_a_row.errors, detection.errors) {
            return Some(Reason::Errors);
        }
        if reached(in_a_row.gateway_errors, detection.gateway_errors) {
            return Some(Reason::GatewayErrors);
        }
        if detection.split && reached(in_a_row.local_failures, detection.local_failures) {
            return Some(Reason::LocalFailures);
        }
        let (all, bad) = self.recent(detection.interval, now);
        let ramping = matches!(self.state(), State::Ramping { .. });
        let enough = if ramping { detection.request_volume / 2 } else { detection.request_volume };
        (all >= enough.max(1) && f64::from(all - bad) < f64::from(all) * detection.success_rate)
            .then_some(Reason::SuccessRate)
    }
}

/// Failures since anything went well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InARow {
    /// All of them, or those with an answer, where the others count apart.
    pub errors: u32,
    /// Those that a gateway would answer with.
    pub gateway_errors: u32,
    /// Those without an answer, where they count apart.
    pub local_failures: u32,
}

impl InARow {
    /// Whether nothing failed before.
    pub(super) fn is_first(self) -> bool {
        self.errors + self.local_failures == 1
    }
}

/// The same, counted by many threads: 20 bits each.
#[derive(Debug, Default)]
pub(super) struct Runs(AtomicU64);

const RUN_BITS: u32 = 20;
const LONGEST: u64 = (1 << RUN_BITS) - 1;

impl Runs {
    fn get(&self) -> InARow {
        Self::unpack(self.0.load(Relaxed))
    }

    fn unpack(packed: u64) -> InARow {
        let nth = |n: u32| (packed >> (n * RUN_BITS) & LONGEST) as u32;
        InARow { errors: nth(0), gateway_errors: nth(1), local_failures: nth(2) }
    }

    /// Something went well, or is judged anew.
    pub(super) fn end(&self) {
        if self.0.load(Relaxed) != 0 {
            self.0.store(0, Relaxed);
        }
    }

    /// A failure more. An error that is no gateway's ends the run of those that are, as an answer of any kind ends that of
    /// failures without one.
    fn extend(&self, fault: Fault, split: bool) -> InARow {
        let longer = |run: u32| (u64::from(run) + 1).min(LONGEST);
        let extended = |packed: u64| {
            let InARow { errors, gateway_errors, local_failures } = Self::unpack(packed);
            let pack = |errors, gateway, local| errors | gateway << RUN_BITS | local << (2 * RUN_BITS);
            match (fault, split) {
                (Fault::LocalOrigin, true) => pack(errors.into(), gateway_errors.into(), longer(local_failures)),
                (Fault::Answer, _) => pack(longer(errors), 0, 0),
                (Fault::Gateway | Fault::LocalOrigin, _) => pack(longer(errors), longer(gateway_errors), 0),
            }
        };
        let before = self.0.fetch_update(Relaxed, Relaxed, |packed| Some(extended(packed)));
        Self::unpack(extended(before.unwrap_or_else(|packed| packed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_failures_count_apart_where_they_are_split_and_together_where_not() {
        let extended = |split, faults: &[Fault]| {
            let runs = Runs::default();
            let InARow { errors, gateway_errors, local_failures } =
                faults.iter().map(|fault| runs.extend(*fault, split)).last().unwrap();
            assert_eq!(runs.get(), InARow { errors, gateway_errors, local_failures });
            [errors, gateway_errors, local_failures]
        };
        use Fault::{Answer, Gateway, LocalOrigin};
        assert_eq!(extended(false, &[LocalOrigin, Gateway, Answer]), [3, 0, 0]);
        assert_eq!(extended(false, &[Answer, Gateway, LocalOrigin]), [3, 2, 0]);
        assert_eq!(extended(true, &[Gateway, LocalOrigin, LocalOrigin]), [1, 1, 2]);
        assert_eq!(extended(true, &[LocalOrigin, LocalOrigin, Answer]), [1, 0, 0]);
        assert_eq!(extended(true, &[Answer, Gateway]), [2, 1, 0]);
    }

    #[test]
    fn a_run_that_is_longer_than_anybody_counts_spills_into_no_other() {
        let runs = Runs::default();
        runs.0.store(LONGEST, Relaxed);
        assert_eq!(runs.extend(Fault::Answer, false), InARow { errors: LONGEST as u32, ..InARow::default() });
    }
}
