//! PURE: which endpoints are left alone for a while, and how they come back. Envoy calls it outlier detection.
//!
//! An endpoint is `Serving`, `Ejected` until a moment, or `Probing`: one request at a time, then a growing share of them.
//! [`Floor`] holds all endpoints of one backend: what is serving or probing never falls below half of them, and where most
//! fail at once, the cause is a common one and nobody more is ejected for it.
//!
//! The balancer keeps away from whoever has just failed, and so would seldom learn more of it. Such an endpoint is asked
//! on purpose, by one request at a time that may be sent again, until it has answered well or is ejected. Most requests go
//! to the others meanwhile: they tell whether it is alone with its failures.
//!
//! Reading is free of locks, and so is whatever goes well. Turning from one state into another takes the floor's lock, so
//! that two workers never both take the last place below it.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::balance::Load;
use super::window::Window;

#[cfg(test)]
mod tests;

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
    /// What the success rate is the rate of.
    pub const INTERVAL: Duration = Duration::from_secs(Window::SECONDS);

    /// Where nobody says otherwise.
    pub const DEFAULT: Self = Self {
        consecutive_failures: 7,
        success_rate: 0.8,
        request_volume: 20,
        base_ejection_time: Duration::from_secs(1),
        max_ejection_time: Duration::from_secs(60),
    };
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
    /// Failures since anything went well.
    consecutive: AtomicU32,
    /// When the newest of the requests was sent of which anything was heard, in nanoseconds; the lowest bit says that it
    /// failed.
    newest: AtomicU64,
    window: Window,
    /// Whether somebody is trying it.
    probed: AtomicBool,
    /// Whether it is one of its floor's endpoints now.
    present: AtomicBool,
    /// Nanoseconds that its current or last ejection takes.
    period: AtomicU64,
    /// When it last became `Serving` again, in nanoseconds.
    restored: AtomicU64,
    /// Since when it serves, where others served before it, in nanoseconds.
    joined: AtomicU64,
    /// Which of its backend's levels it is in.
    level: AtomicU32,
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

    /// Requests of the last [`Detection::INTERVAL`], and those of them that failed.
    pub fn recent(&self, now: Duration) -> (u32, u32) {
        self.window.sum(now)
    }

    /// Failures since anything went well.
    pub fn consecutive_failures(&self) -> u32 {
        self.consecutive.load(Relaxed)
    }

    /// How long its current or last ejection takes.
    pub fn period(&self) -> Duration {
        Duration::from_nanos(self.period.load(Relaxed))
    }

    /// How it came to be what it is, the newest turn at the end.
    pub fn history(&self) -> Vec<Turn> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// What a balancer takes it to cost: everything, where it may not be chosen.
    pub fn cost(&self, chance: f64, now: Duration) -> f64 {
        if self.admits(chance, now) { self.load.cost(now) } else { f64::INFINITY }
    }

    /// Whether it may be chosen. `chance`, in `0.0..1.0`, is drawn once a pick, and decides about those whose share grows.
    pub fn admits(&self, chance: f64, now: Duration) -> bool {
        match self.state() {
            State::Serving => true,
            State::Ejected { .. } | State::Probing => false,
            State::Ramping { since } => now.saturating_sub(since).as_secs_f64() >= chance * self.ramp().as_secs_f64(),
        }
    }

    /// Since when it serves, where others served before: as a newcomer, or again after an ejection.
    pub fn joined(&self) -> Option<Duration> {
        Some(Duration::from_nanos(self.joined.load(Relaxed))).filter(|joined| !joined.is_zero())
    }

    /// Says which of its backend's levels it is in; those are filled one after the other.
    pub fn put_into(&self, level: u32) {
        self.level.store(level, Relaxed);
    }

    /// Under the lock of its floor. Whoever tried it before has nothing more to say.
    fn turn(&self, state: State, reason: Option<Reason>, at: Duration) {
        self.probed.store(false, Relaxed);
        self.state.store(state.pack(), Relaxed);
        if let State::Ramping { since } = state {
            self.joined.store(since.as_nanos() as u64, Relaxed);
        }
        self.turns.fetch_add(1, Relaxed);
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(Turn { at, state, reason });
    }

    fn ramp(&self) -> Duration {
        self.period() / 2
    }

    /// A request that was sent then ended like this. An answer to what was sent earlier is no news.
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
    fn is_doubted(&self) -> bool {
        let in_use = matches!(self.state(), State::Serving | State::Ramping { .. });
        in_use && self.has_failed_last() && self.present.load(Relaxed)
    }

    /// Whether it looks as if it failed, which says less than that it is ejected: the last that was heard of it was a
    /// failure, or it is halfway to the least share.
    fn is_suspect(&self, detection: &Detection, now: Duration) -> bool {
        if self.state() != State::Serving || self.has_failed_last() {
            return true;
        }
        let (all, bad) = self.window.sum(now);
        all >= 5 && f64::from(all - bad) < f64::from(all) * f64::midpoint(detection.success_rate, 1.0)
    }

    /// What speaks against it after so many failures in a row.
    fn verdict(&self, consecutive: u32, detection: &Detection, now: Duration) -> Option<Reason> {
        if consecutive >= detection.consecutive_failures {
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

/// Who sent a request to an endpoint, for when something is heard of it.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// It was a probe.
    pub probe: bool,
    /// [`Vitals::turns`] at that time.
    pub turn: u32,
    /// When.
    pub at: Duration,
}

/// Who is ejected among the endpoints of one backend, shared by all workers.
#[derive(Debug, Default)]
pub struct Floor {
    turning: Mutex<Turning>,
    /// From then on somebody wants a probe, in nanoseconds; 0 before the first look.
    wanted: AtomicU64,
}

#[derive(Debug, Default)]
struct Turning {
    members: Arc<[Arc<Vitals>]>,
    /// In how many levels.
    levels: usize,
    /// The oldest first.
    ejected: Vec<Arc<Vitals>>,
    /// Those that are being tried.
    probing: Vec<Arc<Vitals>>,
    /// Requests since somebody was tried, while somebody is to be.
    passed: usize,
    /// Those in use of which the last that was heard was a failure, and some of which it no longer is.
    doubted: Vec<Arc<Vitals>>,
    /// Until then nobody is ejected: most failed at once.
    common_cause: Duration,
    /// What was decided so far.
    tally: Tally,
}

/// How often what was decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Ejections for failures in a row.
    pub consecutive: u64,
    /// Ejections for too small a share of successes.
    pub success_rate: u64,
    /// Ejections after a probe that failed.
    pub probe: u64,
    /// Endpoints that would have been ejected, had enough others been left.
    pub floor: u64,
    /// The same, had not most failed at once.
    pub common_cause: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.consecutive += other.consecutive;
        self.success_rate += other.success_rate;
        self.probe += other.probe;
        self.floor += other.floor;
        self.common_cause += other.common_cause;
    }
}

impl Turning {
    /// How many may be ejected: what stays is half, rounded up, and never nobody.
    fn allowed(&self) -> usize {
        allowed(self.members.len())
    }

    /// How many there are in each level, and how many of them are `out`.
    fn levels<'a>(&'a self, out: impl Iterator<Item = &'a Vitals>) -> Vec<(usize, usize)> {
        let mut levels = vec![(0, 0); self.levels];
        for vitals in self.members.iter() {
            if let Some(level) = levels.get_mut(vitals.level.load(Relaxed) as usize) {
                level.0 += 1;
            }
        }
        for vitals in out {
            if let Some(level) = levels.get_mut(vitals.level.load(Relaxed) as usize) {
                level.1 += 1;
            }
        }
        levels
    }

    /// How many ejections are too many, with one more, and in which level. Of several levels, one that is whole is enough:
    /// what the others cannot take goes there.
    fn excess(&self, more: Option<&Vitals>) -> (usize, u32) {
        if self.levels <= 1 {
            return ((self.ejected.len() + usize::from(more.is_some())).saturating_sub(self.allowed()), 0);
        }
        let levels = self.levels(self.ejected.iter().map(|vitals| &**vitals).chain(more));
        let levels = levels.into_iter().zip(0..).filter(|((all, _), _)| *all > 0);
        levels.map(|((all, out), level)| (out.saturating_sub(allowed(all)), level)).min().unwrap_or((0, 0))
    }

    /// Whether most fail: of several levels, most of each.
    fn is_common_cause(&self, detection: &Detection, now: Duration) -> bool {
        let suspects = self.members.iter().filter(|member| member.is_suspect(detection, now)).map(|member| &**member);
        if self.levels <= 1 {
            return suspects.count() * 2 > self.members.len();
        }
        self.levels(suspects).into_iter().all(|(all, suspects)| suspects * 2 > all || all == 0)
    }

    /// Whether enough is left when that one is ejected.
    fn has_room_for(&self, vitals: &Vitals) -> bool {
        self.excess(Some(vitals)).0 == 0
    }

    fn leave(&mut self, vitals: &Arc<Vitals>) {
        for list in [&mut self.ejected, &mut self.probing] {
            list.retain(|other| !Arc::ptr_eq(other, vitals));
        }
    }

    /// Whose turn it is to be tried, and since or from when.
    fn wanted(&self) -> Option<(Duration, &Arc<Vitals>)> {
        let ejected = self.ejected.iter().filter_map(|vitals| match vitals.state() {
            State::Ejected { until } => Some((until, vitals)),
            _ => None,
        });
        let unheard = self.probing.iter().filter(|vitals| !vitals.probed.load(Relaxed));
        ejected.chain(unheard.map(|vitals| (Duration::ZERO, vitals))).min_by_key(|(at, _)| *at)
    }

    /// Who is to be asked on purpose, and from when on.
    fn questioned(&self) -> Option<(Duration, &Arc<Vitals>)> {
        // To no end where nobody may be ejected, or where so many fail that nobody would be.
        if self.ejected.len() >= self.allowed() || self.doubted.len() * 2 > self.members.len() {
            return None;
        }
        let alone = |vitals: &&Arc<Vitals>| vitals.is_doubted() && !vitals.probed.load(Relaxed);
        self.doubted.iter().find(alone).map(|vitals| (self.common_cause, vitals))
    }

    /// Who is to be tried by this request.
    fn due(&mut self, retryable: bool, now: Duration) -> Option<Arc<Vitals>> {
        /// A request that may not be sent again tries somebody only when none came for long that may.
        const UNSURE: usize = 10;
        /// As many have gone elsewhere between two that question the same endpoint, and more where there are many.
        const OTHERS: usize = 3;
        let waited = if retryable { 0 } else { UNSURE };
        let elsewhere = OTHERS.max(self.members.len() / 2);
        let tried = self.wanted().map(|found| (waited, found));
        let questioned = self.questioned().map(|found| (waited.max(elsewhere), found));
        let is_due = |(passed, (at, _)): &(usize, (Duration, _))| self.passed >= *passed && now >= *at;
        let due = tried.filter(is_due).or(questioned.filter(is_due)).map(|(_, (_, vitals))| Arc::clone(vitals));
        self.passed = if due.is_some() { 0 } else { self.passed + 1 };
        due
    }

    /// The last that was heard of it was a failure.
    fn doubt(&mut self, vitals: &Arc<Vitals>) {
        /// Where more than so many are in doubt, the others wait for their turn.
        const MOST: usize = 16;
        self.doubted.retain(|other| other.is_doubted() && !Arc::ptr_eq(other, vitals));
        if self.doubted.len() < MOST && vitals.is_doubted() {
            self.doubted.push(Arc::clone(vitals));
        }
    }

    fn eject(&mut self, vitals: &Arc<Vitals>, until: Duration, reason: Option<Reason>, now: Duration) {
        self.leave(vitals);
        vitals.turn(State::Ejected { until }, reason, now);
        self.ejected.push(Arc::clone(vitals));
    }
}

impl Floor {
    /// Never held across anything that waits; a panic while it is held leaves lists that are still whole.
    fn lock(&self) -> MutexGuard<'_, Turning> {
        self.turning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, turning: &Turning) {
        let wanted = turning.wanted().into_iter().chain(turning.questioned()).map(|(at, _)| at).min();
        let wanted = wanted.unwrap_or(Duration::MAX);
        self.wanted.store(u64::try_from(wanted.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The endpoints are these from now on. Where too many of them are ejected, the oldest ejections end.
    pub fn follow(&self, members: Arc<[Arc<Vitals>]>, now: Duration) {
        let mut turning = self.lock();
        let former = std::mem::replace(&mut turning.members, Arc::clone(&members));
        let new = |vitals: &&Arc<Vitals>| !former.is_empty() && !vitals.present.load(Relaxed);
        members.iter().filter(new).for_each(|vitals| vitals.joined.store(now.as_nanos() as u64, Relaxed));
        former.iter().for_each(|vitals| vitals.present.store(false, Relaxed));
        members.iter().for_each(|vitals| vitals.present.store(true, Relaxed));
        let Turning { ejected, probing, .. } = &mut *turning;
        ejected.retain(|vitals| vitals.present.load(Relaxed));
        probing.retain(|vitals| vitals.present.load(Relaxed));
        // One that was gone in between is as it was.
        let known: HashSet<*const Vitals> = ejected.iter().chain(probing.iter()).map(Arc::as_ptr).collect();
        for vitals in members.iter().filter(|vitals| !known.contains(&Arc::as_ptr(vitals))) {
            match vitals.state() {
                State::Ejected { .. } => ejected.push(Arc::clone(vitals)),
                State::Probing => probing.push(Arc::clone(vitals)),
                State::Serving | State::Ramping { .. } => {}
            }
        }
        turning.levels = 1 + members.iter().map(|vitals| vitals.level.load(Relaxed)).max().unwrap_or(0) as usize;
        let (mut excess, level) = turning.excess(None);
        turning.ejected.retain(|vitals| {
            let restored = excess > 0 && vitals.level.load(Relaxed) == level;
            if restored {
                excess -= 1;
                vitals.turn(State::Serving, None, now);
            }
            !restored
        });
        self.want(&turning);
    }

    /// Picks for a request: a probe where one is wanted, or what `balance` says of those that are in use. `balance` is
    /// asked with 64 random bits and the chance that [`Vitals::cost`] asks for.
    pub fn pick(
        &self,
        members: &[Arc<Vitals>],
        retryable: bool,
        now: Duration,
        mut chances: impl FnMut() -> u64,
        mut balance: impl FnMut(u64, f64) -> Option<usize>,
    ) -> Option<Picked> {
        /// Half are in use at least, so that all of these draw two that are not once in 2^32 times.
        const DRAWS: usize = 16;
        if now.as_nanos() as u64 >= self.wanted.load(Relaxed)
            && let Some(at) = self.probe(members, retryable, now)
        {
            return Some(Picked { at, probe: true });
        }
        let chance = unit(chances());
        let mut last = None;
        for _ in 0..DRAWS {
            let at = balance(chances(), chance)?;
            if members.get(at).is_some_and(|vitals| vitals.cost(chance, now).is_finite()) {
                return Some(Picked { at, probe: false });
            }
            last = Some(at);
        }
        // Bad luck, or nobody serves but those that are tried: they are in use, too.
        let in_use = |at: &usize| members.get(*at).is_some_and(|v| !matches!(v.state(), State::Ejected { .. }));
        let from = last?;
        let at = (from..members.len()).chain(0..from).find(in_use).unwrap_or(from);
        Some(Picked { at, probe: false })
    }

    /// Whose ejection is over, or who is being tried or in doubt and has nobody.
    fn probe(&self, members: &[Arc<Vitals>], retryable: bool, now: Duration) -> Option<usize> {
        let mut turning = self.lock();
        let due = turning.due(retryable, now);
        let at = due.as_ref().and_then(|vitals| members.iter().position(|member| Arc::ptr_eq(member, vitals)));
        if let Some(vitals) = due.filter(|_| at.is_some()) {
            if matches!(vitals.state(), State::Ejected { .. }) {
                turning.leave(&vitals);
                vitals.turn(State::Probing, None, now);
                turning.probing.push(Arc::clone(&vitals));
            }
            vitals.probed.store(true, Relaxed);
        }
        self.want(&turning);
        at
    }

    /// What came of a request to one of the endpoints. `chance` gives a number in `0.0..1.0`.
    pub fn report(
        &self,
        vitals: &Arc<Vitals>,
        sent: Sent,
        outcome: Outcome,
        detection: &Detection,
        now: Duration,
        chance: impl FnOnce() -> f64,
    ) -> Option<Reason> {
        let consecutive = match outcome {
            Outcome::Unknown => 0,
            Outcome::Good => {
                vitals.window.count(false, now);
                vitals.heard(sent.at, false);
                if vitals.consecutive.load(Relaxed) != 0 {
                    vitals.consecutive.store(0, Relaxed);
                }
                0
            }
            Outcome::Bad => {
                vitals.window.count(true, now);
                vitals.heard(sent.at, true);
                vitals.consecutive.fetch_add(1, Relaxed).saturating_add(1)
            }
        };
        // What was sent before the last turn is a request like any other.
        let probe = sent.probe && sent.turn == vitals.turns();
        if probe && vitals.state() == State::Probing {
            return self.probed(vitals, outcome, detection, now, chance());
        }
        let ejected = self.judge(vitals, sent, outcome, consecutive, detection, now, chance);
        if probe || consecutive == 1 {
            let mut turning = self.lock();
            if probe {
                vitals.probed.store(false, Relaxed);
            }
            turning.doubt(vitals);
            self.want(&turning);
        }
        ejected
    }

    /// What comes of a request that was no probe.
    #[expect(clippy::too_many_arguments, reason = "all that is known of a request")]
    fn judge(
        &self,
        vitals: &Arc<Vitals>,
        sent: Sent,
        outcome: Outcome,
        consecutive: u32,
        detection: &Detection,
        now: Duration,
        chance: impl FnOnce() -> f64,
    ) -> Option<Reason> {
        match (outcome, vitals.state()) {
            (Outcome::Good, State::Ramping { since }) if now >= since + vitals.ramp() => {
                self.restore(vitals, now);
                None
            }
            (Outcome::Bad, State::Serving) => {
                let reason = vitals.verdict(consecutive, detection, now)?;
                self.eject(vitals, reason, detection, now, chance())
            }
            // What was sent before it was ejected says nothing new.
            (Outcome::Bad, State::Ramping { .. }) if sent.turn == vitals.turns() => {
                let reason = vitals.verdict(consecutive, detection, now)?;
                self.eject(vitals, reason, detection, now, chance())
            }
            _ => None,
        }
    }

    /// What came of a probe.
    fn probed(
        &self,
        vitals: &Arc<Vitals>,
        outcome: Outcome,
        detection: &Detection,
        now: Duration,
        chance: f64,
    ) -> Option<Reason> {
        let mut turning = self.lock();
        vitals.probed.store(false, Relaxed);
        if vitals.state() != State::Probing || !vitals.present.load(Relaxed) {
            self.want(&turning);
            return None;
        }
        let room = turning.has_room_for(vitals);
        let reason = match outcome {
            Outcome::Good => {
                // What it did before is no news, and its former latency is that of its failures.
                vitals.window.clear();
                vitals.load.forget();
                turning.leave(vitals);
                vitals.turn(State::Ramping { since: now }, None, now);
                None
            }
            Outcome::Bad if room => {
                vitals.consecutive.store(0, Relaxed);
                let period = lengthened(vitals, detection);
                turning.eject(vitals, now + shortened(period, chance), Some(Reason::Probe), now);
                turning.tally.probe += 1;
                Some(Reason::Probe)
            }
            // Not at once again: whatever hindered it may hinder the next one too.
            Outcome::Unknown if room => {
                let wait = vitals.period() / 4;
                turning.eject(vitals, now + wait, None, now);
                None
            }
            // It is needed, and gets what the balancer gives it rather than every request that may be a probe.
            Outcome::Bad | Outcome::Unknown => {
                turning.leave(vitals);
                vitals.turn(State::Serving, None, now);
                turning.tally.floor += 1;
                None
            }
        };
        self.want(&turning);
        reason
    }

    fn restore(&self, vitals: &Arc<Vitals>, now: Duration) {
        let _turning = self.lock();
        if matches!(vitals.state(), State::Ramping { .. }) {
            vitals.restored.store(now.as_nanos() as u64, Relaxed);
            vitals.turn(State::Serving, None, now);
        }
    }

    /// Ejects if that leaves enough, and if it is not most of them that fail.
    fn eject(
        &self,
        vitals: &Arc<Vitals>,
        reason: Reason,
        detection: &Detection,
        now: Duration,
        chance: f64,
    ) -> Option<Reason> {
        /// How long nobody is ejected after most failed at once.
        const PAUSE: Duration = Duration::from_secs(1);
        let mut turning = self.lock();
        let again = match vitals.state() {
            State::Ejected { .. } | State::Probing => return None,
            State::Ramping { .. } => true,
            State::Serving => is_soon_again(vitals, now),
        };
        if now < turning.common_cause || !vitals.present.load(Relaxed) {
            return None;
        }
        if !turning.has_room_for(vitals) {
            // Judged anew after as many failures as the first time.
            vitals.consecutive.store(0, Relaxed);
            turning.tally.floor += 1;
            return None;
        }
        if turning.is_common_cause(detection, now) {
            turning.common_cause = now + PAUSE;
            turning.tally.common_cause += 1;
            return None;
        }
        let period = match again {
            true => lengthened(vitals, detection),
            false => begun(vitals, detection),
        };
        vitals.consecutive.store(0, Relaxed);
        turning.eject(vitals, now + shortened(period, chance), Some(reason), now);
        match reason {
            Reason::Consecutive => turning.tally.consecutive += 1,
            Reason::SuccessRate => turning.tally.success_rate += 1,
            Reason::Probe => turning.tally.probe += 1,
        }
        self.want(&turning);
        Some(reason)
    }

    /// How many are ejected, and how many may be.
    pub fn ejected(&self) -> (usize, usize) {
        let turning = self.lock();
        (turning.ejected.len(), turning.allowed())
    }

    /// What was decided so far.
    pub fn tally(&self) -> Tally {
        self.lock().tally
    }
}

/// How many of so many may be ejected.
fn allowed(n: usize) -> usize {
    n - n.div_ceil(2).max(1).min(n)
}

/// Whether it has failed again soon after it came back.
fn is_soon_again(vitals: &Vitals, now: Duration) -> bool {
    let restored = Duration::from_nanos(vitals.restored.load(Relaxed));
    !restored.is_zero() && now < restored + vitals.period() * 2 + Detection::INTERVAL
}

fn begun(vitals: &Vitals, detection: &Detection) -> Duration {
    vitals.period.store(detection.base_ejection_time.as_nanos() as u64, Relaxed);
    detection.base_ejection_time
}

fn lengthened(vitals: &Vitals, detection: &Detection) -> Duration {
    let longest = detection.max_ejection_time.max(detection.base_ejection_time);
    let period = (vitals.period() * 2).clamp(detection.base_ejection_time, longest);
    vitals.period.store(period.as_nanos() as u64, Relaxed);
    period
}

/// Those that were ejected together do not come back together.
fn shortened(period: Duration, chance: f64) -> Duration {
    period.mul_f64(0.75 + 0.25 * chance)
}

/// An even number in `0.0..1.0`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
