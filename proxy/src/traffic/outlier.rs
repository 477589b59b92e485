//! PURE: which endpoints are left alone for a while, and how they come back. Envoy calls it outlier detection.
//!
//! An endpoint is `Serving`, `Ejected` until a moment, or `Probing`: one request at a time, then a growing share of them.
//! [`Floor`] holds all endpoints of one backend: what is serving or probing never falls below half of them, and where most
//! fail at once, the cause is a common one and nobody more is ejected for it.
//!
//! Reading is free of locks, and so is whatever goes well. Turning from one state into another takes the floor's lock, so
//! that two workers never both take the last place below it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::balance::Load;
use super::window::Window;

/// When an endpoint is ejected, and for how long. The words are those of Istio's `outlierDetection`.
#[derive(Clone, Debug, PartialEq)]
pub struct Detection {
    /// Failures in a row.
    pub consecutive_failures: u32,
    /// The least share of requests within [`Detection::INTERVAL`] that must go well.
    pub success_rate: f64,
    /// Below so many requests within the interval their share says nothing.
    pub request_volume: u32,
    /// How long the first ejection takes; each further one takes twice as long as that before.
    pub base_ejection_time: Duration,
    /// No ejection takes longer.
    pub max_ejection_time: Duration,
}

impl Detection {
    /// Where nobody says otherwise.
    pub const DEFAULT: Self = Self {
        consecutive_failures: 7,
        success_rate: 0.8,
        request_volume: 20,
        base_ejection_time: Duration::from_secs(1),
        max_ejection_time: Duration::from_secs(60),
    };
    /// What the success rate is the rate of.
    pub const INTERVAL: Duration = Duration::from_secs(Window::SECONDS);
}

impl Default for Detection {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How an endpoint is used. Times are on the caller's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As the balancer likes.
    Serving,
    /// Not at all, until then.
    Ejected {
        /// When it may be tried again.
        until: Duration,
    },
    /// One request at a time, to see.
    Probing,
    /// A share of what it would get that has grown since then.
    Ramping {
        /// When the first probe came back well.
        since: Duration,
    },
}

impl State {
    /// The kind in the two lowest bits: nobody misses four nanoseconds.
    fn pack(self) -> u64 {
        let (kind, at) = match self {
            Self::Serving => (0, Duration::ZERO),
            Self::Ejected { until } => (1, until),
            Self::Probing => (2, Duration::ZERO),
            Self::Ramping { since } => (3, since),
        };
        (at.as_nanos() as u64 & !3) | kind
    }

    fn unpack(packed: u64) -> Self {
        let at = Duration::from_nanos(packed & !3);
        match packed & 3 {
            0 => Self::Serving,
            1 => Self::Ejected { until: at },
            2 => Self::Probing,
            _ => Self::Ramping { since: at },
        }
    }
}

/// What a request said about the endpoint that it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered, be it to say that the caller is wrong.
    Good,
    /// The endpoint failed.
    Bad,
    /// Nothing: the caller gave up, or we refused the request ourselves.
    Unknown,
}

/// Why an endpoint was ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Failures in a row.
    Consecutive,
    /// Too small a share of requests went well.
    SuccessRate,
    /// It was tried again, and failed again.
    Probe,
}

/// A turn from one state into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// When.
    pub at: Duration,
    /// Into what.
    pub state: State,
    /// Why, where it was ejected for its own sake.
    pub reason: Option<Reason>,
}

/// The last turns of an endpoint, the newest at the end.
const HISTORY: usize = 16;

/// What is learned of one endpoint.
#[derive(Debug, Default)]
pub struct Vitals {
    /// How loaded it is.
    pub load: Load,
    state: AtomicU64,
    /// Failures since anything went well.
    consecutive: AtomicU32,
    window: Window,
    /// Whether somebody is trying it.
    probed: AtomicBool,
    /// Nanoseconds that its current or last ejection takes.
    period: AtomicU64,
    /// When it last became `Serving` again, in nanoseconds.
    restored: AtomicU64,
    history: Mutex<VecDeque<Turn>>,
}

impl Vitals {
    /// How it is used now.
    pub fn state(&self) -> State {
        State::unpack(self.state.load(Relaxed))
    }

    /// Requests of the last [`Detection::INTERVAL`], and those of them that failed.
    pub fn recent(&self, now: Duration) -> (u32, u32) {
        self.window.sum(now)
    }

    /// Failures since anything went well.
    pub fn consecutive_failures(&self) -> u32 {
        self.consecutive.load(Relaxed)
    }

    /// How it came to be what it is, the newest turn at the end.
    pub fn history(&self) -> Vec<Turn> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// Under the lock of its floor.
    fn turn(&self, state: State, reason: Option<Reason>, at: Duration) {
        self.state.store(state.pack(), Relaxed);
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(Turn { at, state, reason });
    }

    fn ramp(&self) -> Duration {
        Duration::from_nanos(self.period.load(Relaxed) / 2)
    }

    /// How long its current or last ejection takes.
    pub fn period(&self) -> Duration {
        Duration::from_nanos(self.period.load(Relaxed))
    }

    /// Whether the balancer may choose it.
    fn admits(&self, chances: impl FnOnce() -> u64, now: Duration) -> bool {
        match self.state() {
            State::Serving => true,
            State::Ejected { .. } | State::Probing => false,
            State::Ramping { since } => {
                now.saturating_sub(since).as_secs_f64() >= unit(chances()) * self.ramp().as_secs_f64()
            }
        }
    }

    /// Whether the last that was heard of it was a failure, which says less than that it is ejected.
    fn is_suspect(&self, detection: &Detection, now: Duration) -> bool {
        if self.state() != State::Serving || self.consecutive.load(Relaxed) > 0 {
            return true;
        }
        let (all, bad) = self.window.sum_of_last(2, now);
        all >= 5 && f64::from(all - bad) < f64::from(all) * detection.success_rate
    }

    /// What speaks against it after a failure.
    fn verdict(&self, detection: &Detection, now: Duration) -> Option<Reason> {
        let consecutive = self.consecutive.load(Relaxed);
        if consecutive > 0 && consecutive.is_multiple_of(detection.consecutive_failures.max(1)) {
            return Some(Reason::Consecutive);
        }
        let (all, bad) = self.window.sum(now);
        let ramping = matches!(self.state(), State::Ramping { .. });
        let enough = if ramping { detection.request_volume / 2 } else { detection.request_volume };
        (all >= enough.max(1) && f64::from(all - bad) < f64::from(all) * detection.success_rate)
            .then_some(Reason::SuccessRate)
    }
}

/// A place that was picked, and whether the request is a probe of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Picked {
    /// Its number among the endpoints.
    pub at: usize,
    /// To be handed back with what came of it.
    pub probe: bool,
}

/// Who is ejected among the endpoints of one backend, shared by all workers.
#[derive(Debug, Default)]
pub struct Floor {
    turning: Mutex<Turning>,
    /// From then on somebody wants a probe, in nanoseconds.
    wanted: AtomicU64,
}

#[derive(Debug, Default)]
struct Turning {
    members: Arc<[Arc<Vitals>]>,
    /// The oldest first.
    ejected: Vec<Arc<Vitals>>,
    /// Until then nobody is ejected: most failed at once.
    common_cause: Duration,
}

impl Turning {
    /// How many may be ejected: what stays is half, rounded up, and never nobody.
    fn allowed(&self) -> usize {
        let n = self.members.len();
        n - n.div_ceil(2).max(1).min(n)
    }

    fn take_back(&mut self, vitals: &Arc<Vitals>) {
        self.ejected.retain(|ejected| !Arc::ptr_eq(ejected, vitals));
    }

    /// When somebody next wants a probe.
    fn wanted(&self) -> Duration {
        let until = self.members.iter().filter_map(|vitals| match vitals.state() {
            State::Ejected { until } => Some(until),
            State::Probing if !vitals.probed.load(Relaxed) => Some(Duration::ZERO),
            _ => None,
        });
        until.min().unwrap_or(Duration::MAX)
    }
}

impl Floor {
    /// Never held across anything that waits; a panic while it is held leaves lists that are still whole.
    fn lock(&self) -> MutexGuard<'_, Turning> {
        self.turning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, turning: &Turning) {
        self.wanted.store(u64::try_from(turning.wanted().as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The endpoints are these from now on. Where too many of them are ejected, the oldest ejections end.
    pub fn follow(&self, members: Arc<[Arc<Vitals>]>, now: Duration) {
        let mut turning = self.lock();
        turning.members = members;
        let Turning { members, ejected, .. } = &mut *turning;
        ejected.retain(|ejected| members.iter().any(|member| Arc::ptr_eq(member, ejected)));
        // One that was gone in between is as it was.
        let back = members.iter().filter(|member| matches!(member.state(), State::Ejected { .. }));
        let back: Vec<_> = back.filter(|member| !ejected.iter().any(|other| Arc::ptr_eq(other, member))).collect();
        ejected.extend(back.into_iter().map(Arc::clone));
        let excess = turning.ejected.len().saturating_sub(turning.allowed());
        turning.ejected.drain(..excess).for_each(|vitals| vitals.turn(State::Serving, None, now));
        self.want(&turning);
    }

    /// Picks for a request: a probe where one is wanted, or what `balance` says of those that are in use. `balance` is
    /// asked with numbers to avoid, and gives any other.
    ///
    /// `chances` are 64 random bits each time.
    pub fn pick(
        &self,
        members: &[Arc<Vitals>],
        retryable: bool,
        now: Duration,
        mut chances: impl FnMut() -> u64,
        mut balance: impl FnMut(u64) -> Option<usize>,
    ) -> Option<Picked> {
        /// Half are in use at least, so that as many draws all miss once in 65,536 times.
        const DRAWS: usize = 16;
        /// How long a probe waits for a request that may be sent again.
        const PATIENCE: Duration = Duration::from_secs(1);
        let wanted = Duration::from_nanos(self.wanted.load(Relaxed));
        if now >= wanted
            && (retryable || now >= wanted + PATIENCE)
            && let Some(at) = self.probe(members, now)
        {
            return Some(Picked { at, probe: true });
        }
        let mut last = None;
        for _ in 0..DRAWS {
            let at = balance(chances())?;
            let admitted = members.get(at).is_some_and(|vitals| vitals.admits(&mut chances, now));
            if admitted {
                return Some(Picked { at, probe: false });
            }
            last = Some(at);
        }
        // Bad luck, or nobody serves but those that are tried: they are in use, too.
        let in_use = |state| !matches!(state, State::Ejected { .. });
        let at = members.iter().position(|vitals| in_use(vitals.state())).or(last)?;
        Some(Picked { at, probe: false })
    }

    /// Whose ejection is over, or who is being tried and has nobody.
    fn probe(&self, members: &[Arc<Vitals>], now: Duration) -> Option<usize> {
        let mut turning = self.lock();
        let at = members.iter().position(|vitals| match vitals.state() {
            State::Ejected { until } => now >= until,
            State::Probing => !vitals.probed.load(Relaxed),
            State::Serving | State::Ramping { .. } => false,
        });
        if let Some(vitals) = at.and_then(|at| members.get(at)) {
            vitals.probed.store(true, Relaxed);
            vitals.turn(State::Probing, None, now);
            turning.take_back(vitals);
        }
        self.want(&turning);
        at
    }

    /// What came of a request to one of the endpoints. Called once for each that was picked. `chance` gives a number in
    /// `0.0..1.0`.
    pub fn report(
        &self,
        vitals: &Arc<Vitals>,
        probe: bool,
        outcome: Outcome,
        detection: &Detection,
        now: Duration,
        chance: impl FnOnce() -> f64,
    ) -> Option<Reason> {
        let reason = match outcome {
            Outcome::Unknown => None,
            Outcome::Good => {
                vitals.window.count(false, now);
                if vitals.consecutive.load(Relaxed) != 0 {
                    vitals.consecutive.store(0, Relaxed);
                }
                if let State::Ramping { since } = vitals.state()
                    && now >= since + vitals.ramp()
                {
                    self.restore(vitals, now);
                }
                None
            }
            Outcome::Bad => {
                vitals.window.count(true, now);
                vitals.consecutive.fetch_add(1, Relaxed);
                match vitals.state() {
                    State::Serving | State::Ramping { .. } => vitals.verdict(detection, now),
                    // It was sent before, and says nothing new.
                    State::Ejected { .. } => None,
                    State::Probing => probe.then_some(Reason::Probe),
                }
            }
        };
        if probe {
            self.probed(vitals, outcome, now);
        }
        let reason = reason?;
        self.eject(vitals, reason, detection, now, chance()).then_some(reason)
    }

    fn probed(&self, vitals: &Arc<Vitals>, outcome: Outcome, now: Duration) {
        let turning = self.lock();
        vitals.probed.store(false, Relaxed);
        if outcome == Outcome::Good && vitals.state() == State::Probing {
            // What it did before is no news, and its former latency is that of its failures.
            vitals.window.clear(now);
            vitals.load.forget();
            vitals.turn(State::Ramping { since: now }, None, now);
        }
        self.want(&turning);
    }

    fn restore(&self, vitals: &Arc<Vitals>, now: Duration) {
        let _turning = self.lock();
        if matches!(vitals.state(), State::Ramping { .. }) {
            vitals.restored.store(now.as_nanos() as u64, Relaxed);
            vitals.turn(State::Serving, None, now);
        }
    }

    /// Ejects if that leaves enough, and if it is not most of them that fail.
    fn eject(&self, vitals: &Arc<Vitals>, reason: Reason, detection: &Detection, now: Duration, chance: f64) -> bool {
        /// How long nobody is ejected after most failed at once.
        const PAUSE: Duration = Duration::from_millis(200);
        let mut turning = self.lock();
        let is_member = turning.members.iter().any(|member| Arc::ptr_eq(member, vitals));
        if !is_member || turning.ejected.len() >= turning.allowed() {
            return false;
        }
        let again = match vitals.state() {
            State::Ejected { .. } => return false,
            State::Probing | State::Ramping { .. } => true,
            State::Serving => {
                if now < turning.common_cause {
                    return false;
                }
                let suspects = turning.members.iter().filter(|member| member.is_suspect(detection, now)).count();
                if suspects * 2 > turning.members.len() {
                    turning.common_cause = now + PAUSE;
                    return false;
                }
                // It has failed again soon after the last time.
                let restored = Duration::from_nanos(vitals.restored.load(Relaxed));
                let period = Duration::from_nanos(vitals.period.load(Relaxed));
                !restored.is_zero() && now < restored + period * 2 + Detection::INTERVAL
            }
        };
        let former = Duration::from_nanos(vitals.period.load(Relaxed));
        let period = if again { former * 2 } else { detection.base_ejection_time };
        let period = period.clamp(detection.base_ejection_time, detection.max_ejection_time);
        vitals.period.store(period.as_nanos() as u64, Relaxed);
        // Those that were ejected together do not come back together.
        let until = now + period.mul_f64(0.75 + 0.25 * chance);
        vitals.turn(State::Ejected { until }, Some(reason), now);
        vitals.consecutive.store(0, Relaxed);
        turning.ejected.push(Arc::clone(vitals));
        self.want(&turning);
        true
    }

    /// How many are ejected, and how many may be.
    pub fn ejected(&self) -> (usize, usize) {
        let turning = self.lock();
        (turning.ejected.len(), turning.allowed())
    }
}

/// An even number in `0.0..1.0`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
