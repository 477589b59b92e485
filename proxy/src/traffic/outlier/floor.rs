//! Who is ejected among the endpoints of one backend.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::detection::Everybody;
use super::{Detection, InARow, Outcome, Picked, Reason, Sent, State, Tally, Vitals};
use crate::traffic::breaker::Breaker;

mod by_hand;
mod checked;
#[cfg(test)]
mod threads;

pub use by_hand::NotEjected;

/// Who is ejected among the endpoints of one backend, shared by all workers.
#[derive(Debug, Default)]
pub struct Floor {
    turning: Mutex<Turning>,
    /// The switch for all of them at once, where a policy asks for one.
    pub breaker: Breaker,
    /// Written under the lock.
    detection: ArcSwap<Detection>,
    /// From then on somebody wants a probe, in nanoseconds; 0 before the first look.
    wanted: AtomicU64,
}

#[derive(Debug, Default)]
struct Turning {
    members: Arc<[Arc<Vitals>]>,
    /// In how many levels.
    levels: usize,
    /// How they are judged.
    detection: Arc<Detection>,
    /// The oldest first.
    ejected: Vec<Arc<Vitals>>,
    /// Those that are being tried.
    probing: Vec<Arc<Vitals>>,
    /// Requests since somebody was tried, while somebody is to be.
    passed: usize,
    /// Those in use of which the last that was heard was a failure, and some of which it no longer is.
    doubted: Vec<Arc<Vitals>>,
    /// How all of them fare, where they are compared.
    everybody: Everybody,
    /// Until then nobody is ejected: most failed at once.
    common_cause: Duration,
    /// What was decided so far.
    tally: Tally,
}

impl Turning {
    /// How many there are in each level, and how many of them are `out`.
    fn levels<'a>(&'a self, out: impl Iterator<Item = &'a Vitals>) -> Vec<(usize, usize)> {
        let mut levels = vec![(0, 0); self.levels];
        for vitals in self.members.iter() {
            if let Some(level) = levels.get_mut(vitals.level() as usize) {
                level.0 += 1;
            }
        }
        for vitals in out {
            if let Some(level) = levels.get_mut(vitals.level() as usize) {
                level.1 += 1;
            }
        }
        levels
    }

    /// How many ejections are too many, with one more, and in which level. Of several levels, one that is whole is enough:
    /// what the others cannot take goes there.
    fn excess(&self, more: Option<&Vitals>) -> (usize, u32) {
        let allowed = |n| self.detection.allowed(n);
        if self.levels <= 1 {
            let out = self.ejected.len() + usize::from(more.is_some());
            return (out.saturating_sub(allowed(self.members.len())), 0);
        }
        let levels = self.levels(self.ejected.iter().map(|vitals| &**vitals).chain(more));
        let levels = levels.into_iter().zip(0..).filter(|((all, _), _)| *all > 0);
        levels.map(|((all, out), level)| (out.saturating_sub(allowed(all)), level)).min().unwrap_or((0, 0))
    }

    /// Whether most fail: of several levels, most of each.
    fn is_common_cause(&self, now: Duration) -> bool {
        let is_suspect = |member: &&Arc<Vitals>| member.is_suspect(&self.detection, now);
        let suspects = self.members.iter().filter(is_suspect).map(|member| &**member);
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
        if self.doubted.len() * 2 > self.members.len() {
            return None;
        }
        let alone = |vitals: &&Arc<Vitals>| vitals.is_doubted() && !vitals.probed.load(Relaxed);
        let from = |vitals: &Arc<Vitals>| self.common_cause.max(vitals.spared());
        let doubted = self.doubted.iter().filter(|vitals| alone(vitals) && self.has_room_for(vitals));
        doubted.map(|vitals| (from(vitals), vitals)).min_by_key(|(from, _)| *from)
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

    /// The endpoints are these from now on, and are judged like this. Where too many of them are ejected, the oldest
    /// ejections end. `is_current` says whether that still holds: who has heard of it first may come last.
    pub fn follow(
        &self,
        members: &Arc<[Arc<Vitals>]>,
        detection: &Detection,
        now: Duration,
        is_current: impl FnOnce() -> bool,
    ) {
        let mut turning = self.lock();
        if !is_current() {
            return;
        }
        if **self.detection.load() != *detection {
            turning.detection = Arc::new(detection.clone());
            self.detection.store(Arc::clone(&turning.detection));
            turning.everybody = Everybody::default();
        }
        let former = std::mem::replace(&mut turning.members, Arc::clone(members));
        let new = |vitals: &&Arc<Vitals>| !former.is_empty() && !vitals.present.load(Relaxed);
        members.iter().filter(new).for_each(|vitals| vitals.join(now));
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
        turning.levels = 1 + members.iter().map(|vitals| vitals.level()).max().unwrap_or(0) as usize;
        let (mut excess, level) = turning.excess(None);
        turning.ejected.retain(|vitals| {
            let restored = excess > 0 && vitals.level() == level;
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
        now: Duration,
        chance: impl FnOnce() -> f64,
    ) -> Option<Reason> {
        let detection = &self.detection.load();
        let in_a_row = match outcome {
            Outcome::Unknown => InARow::default(),
            Outcome::Good => {
                vitals.went_well(sent.at, detection, now);
                InARow::default()
            }
            Outcome::Bad(fault) => vitals.failed(sent.at, fault, detection, now),
        };
        // What was sent before the last turn is a request like any other.
        let probe = sent.probe && sent.turn == vitals.turns();
        if probe && vitals.state() == State::Probing {
            return self.probed(vitals, outcome, detection, now, chance());
        }
        let reason = match (outcome, vitals.state()) {
            (Outcome::Good, State::Ramping { since }) if now >= since + vitals.ramp() => {
                self.restore(vitals, now);
                None
            }
            (Outcome::Bad(_), State::Serving) => self.against(vitals, in_a_row, detection, now),
            // What was sent before it was ejected says nothing new.
            (Outcome::Bad(_), State::Ramping { .. }) if sent.turn == vitals.turns() => {
                self.against(vitals, in_a_row, detection, now)
            }
            _ => None,
        };
        let ejected = reason.and_then(|reason| self.eject(vitals, reason, detection, now, chance()));
        if probe || in_a_row.is_first() {
            let mut turning = self.lock();
            if probe {
                vitals.probed.store(false, Relaxed);
            }
            turning.doubt(vitals);
            self.want(&turning);
        }
        ejected
    }

    /// What speaks against an endpoint that has just failed.
    fn against(&self, vitals: &Arc<Vitals>, in_a_row: InARow, detection: &Detection, now: Duration) -> Option<Reason> {
        let alone = vitals.verdict(in_a_row, detection, now);
        if alone.is_some() || !detection.compares() {
            return alone;
        }
        let seen = vitals.recent(detection.interval, now);
        let mut turning = self.lock();
        if now >= turning.everybody.until {
            let all = turning.members.iter().map(|member| member.recent(detection.interval, now));
            turning.everybody = Everybody::of(all, detection, now);
        }
        let deviates = turning.everybody.deviates(seen, detection).then_some(Reason::Deviation);
        deviates.or_else(|| turning.everybody.fails(seen, detection).then_some(Reason::FailureShare))
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
                vitals.forget();
                turning.leave(vitals);
                vitals.turn(State::Ramping { since: now }, None, now);
                None
            }
            Outcome::Bad(_) if room => {
                vitals.runs.end();
                let period = vitals.take(detection.lengthened(vitals.period()));
                turning.eject(vitals, now + shortened(period, chance), Some(Reason::Probe), now);
                turning.tally.ejected(Reason::Probe);
                Some(Reason::Probe)
            }
            // Not at once again: whatever hindered it may hinder the next one too.
            Outcome::Unknown if room => {
                let wait = vitals.period() / 4;
                turning.eject(vitals, now + wait, None, now);
                None
            }
            // It is needed, and gets what the balancer gives it rather than every request that may be a probe.
            Outcome::Bad(_) | Outcome::Unknown => {
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
            vitals.restored(now);
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
            State::Serving => vitals.is_soon_again(detection, now),
        };
        if now < turning.common_cause.max(vitals.spared()) || !vitals.present.load(Relaxed) {
            return None;
        }
        if !turning.has_room_for(vitals) {
            // Judged anew after as many failures as the first time.
            vitals.runs.end();
            turning.tally.floor += 1;
            return None;
        }
        if turning.is_common_cause(now) {
            turning.common_cause = now + PAUSE;
            turning.tally.common_cause += 1;
            return None;
        }
        let period = vitals.take(match again {
            true => detection.lengthened(vitals.period()),
            false => detection.base_ejection_time,
        });
        vitals.runs.end();
        turning.eject(vitals, now + shortened(period, chance), Some(reason), now);
        turning.tally.ejected(reason);
        self.want(&turning);
        Some(reason)
    }

    /// How endpoints are judged.
    pub fn detection(&self) -> Arc<Detection> {
        self.detection.load_full()
    }

    /// How many are ejected, and how many may be.
    pub fn ejected(&self) -> (usize, usize) {
        let turning = self.lock();
        (turning.ejected.len(), turning.detection.allowed(turning.members.len()))
    }

    /// What was decided so far.
    pub fn tally(&self) -> Tally {
        Tally { opened: self.breaker.opened(), ..self.lock().tally }
    }
}

/// Those that were ejected together do not come back together.
fn shortened(period: Duration, chance: f64) -> Duration {
    period.mul_f64(0.75 + 0.25 * chance)
}

/// An even number in `0.0..1.0`.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 53) as f64
}
