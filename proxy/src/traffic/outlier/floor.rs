//! Who is ejected among the endpoints of one backend.

use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::detection::Everybody;
use super::{Detection, InARow, Outcome, Picked, Reason, Sent, State, Tally, Vitals};
use crate::traffic::balance::levels::FRESH;
use crate::traffic::breaker::Breaker;

mod by_hand;
mod checked;
mod due;
#[cfg(test)]
mod threads;
mod turning;

pub use by_hand::NotEjected;
use due::Due;
use turning::{Cause, Turning};

/// Who is ejected among the endpoints of one backend, shared by all workers.
#[derive(Debug, Default)]
pub struct Floor {
    turning: Mutex<Turning>,
    /// The switch for all of them at once, where a policy asks for one.
    pub breaker: Breaker,
    /// Written under the lock.
    detection: ArcSwap<Detection>,
    /// Who is to be tried when. Written under the lock.
    due: Due,
}

impl Floor {
    /// Never held across anything that waits; a panic while it is held leaves lists that are still whole.
    fn lock(&self) -> MutexGuard<'_, Turning> {
        self.turning.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody turned, or is tried no longer.
    fn want(&self, turning: &mut Turning) {
        turning.settle();
        self.due.follow(turning);
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
        let excess = turning.excess();
        turning.ejected.drain(..excess).for_each(|oldest| oldest.turn(State::Serving, None, now));
        self.want(&mut turning);
    }

    /// Picks for a request: a probe where one is wanted, or whom `choose` finds among those that are in use.
    pub fn pick(
        &self,
        members: &[Arc<Vitals>],
        retryable: bool,
        now: Duration,
        choose: impl FnOnce() -> Option<usize>,
    ) -> Option<Picked> {
        if self.due.is(retryable, now)
            && let Some(at) = self.probe(members, now)
        {
            return Some(Picked { at, probe: true });
        }
        choose().map(|at| Picked { at, probe: false })
    }

    /// Whose ejection is over, or who is being tried or in doubt and has nobody.
    fn probe(&self, members: &[Arc<Vitals>], now: Duration) -> Option<usize> {
        let mut turning = self.lock();
        let next = turning.wanted().filter(|(from, _)| now >= *from).or(turning.questioned());
        let due = next.filter(|(from, _)| now >= *from).map(|(_, vitals)| Arc::clone(vitals));
        let at = due.as_ref().and_then(|vitals| members.iter().position(|member| Arc::ptr_eq(member, vitals)));
        if let Some(vitals) = due.filter(|_| at.is_some()) {
            if matches!(vitals.state(), State::Ejected { .. }) {
                turning.leave(&vitals);
                vitals.turn(State::Probing, None, now);
                turning.probing.push(Arc::clone(&vitals));
            }
            vitals.probed.store(true, Relaxed);
            turning.settle();
        }
        self.due.begin();
        self.due.follow(&turning);
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
            self.due.follow(&turning);
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
            self.want(&mut turning);
            return None;
        }
        let room = turning.has_room();
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
        self.want(&mut turning);
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
        /// How long the next levels get what one should that is needed for the floor alone.
        const PASSED_OVER: Duration = Duration::from_secs(10);
        let mut turning = self.lock();
        let again = match vitals.state() {
            State::Ejected { .. } | State::Probing => return None,
            State::Ramping { .. } => true,
            State::Serving => vitals.is_soon_again(detection, now),
        };
        if now < turning.common_cause.max(vitals.spared()) || !vitals.present.load(Relaxed) {
            return None;
        }
        let (room, cause) = (turning.has_room(), turning.cause(now));
        if !room {
            // Judged anew after as many failures as the first time.
            vitals.runs.end();
            turning.tally.floor += 1;
            vitals.pass_over(if cause == Cause::Own { now + PASSED_OVER } else { Duration::ZERO });
            return None;
        }
        match cause {
            Cause::Own => {}
            Cause::Unknown => {
                turning.common_cause = now + FRESH;
                return None;
            }
            Cause::Common => {
                turning.common_cause = now + PAUSE;
                turning.tally.common_cause += 1;
                turning.members.iter().for_each(|member| member.pass_over(Duration::ZERO));
                return None;
            }
        }
        let period = vitals.take(match again {
            true => detection.lengthened(vitals.period()),
            false => detection.base_ejection_time,
        });
        vitals.runs.end();
        turning.eject(vitals, now + shortened(period, chance), Some(reason), now);
        turning.tally.ejected(reason);
        self.want(&mut turning);
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
