//! What is under the floor's lock: who is ejected, tried or in doubt, and whether one more may be ejected.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::super::detection::Everybody;
use super::{Detection, Reason, State, Tally, Vitals};
use crate::traffic::balance::levels::OVERPROVISIONING;

#[derive(Debug, Default)]
pub(super) struct Turning {
    pub(super) members: Arc<[Arc<Vitals>]>,
    /// In how many levels.
    pub(super) levels: usize,
    /// How they are judged.
    pub(super) detection: Arc<Detection>,
    /// The oldest first.
    pub(super) ejected: Vec<Arc<Vitals>>,
    /// Those that are being tried.
    pub(super) probing: Vec<Arc<Vitals>>,
    /// Whose turn it is to be tried next, and from when on: of those lists.
    next: Option<(Duration, Arc<Vitals>)>,
    /// Those in use of which the last that was heard was a failure, and some of which it no longer is.
    doubted: Vec<Arc<Vitals>>,
    /// How all of them fare, where they are compared.
    pub(super) everybody: Everybody,
    /// Until then nobody is ejected: most failed at once.
    pub(super) common_cause: Duration,
    /// What was decided so far.
    pub(super) tally: Tally,
}

/// Why an endpoint fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// Its own cause: most others do well.
    Own,
    /// Most fail.
    Common,
    /// A level has just begun to get requests, and its answers will tell.
    Unknown,
}

/// How a level fares.
#[derive(Clone, Copy, Default)]
struct Fares {
    all: usize,
    /// Of whom anything was heard lately, or who is ejected.
    known: usize,
    suspects: usize,
    /// How many of them take their share.
    serving: f64,
}

impl Turning {
    /// Whether enough is left when one more is ejected.
    pub(super) fn has_room(&self) -> bool {
        self.ejected.len() < self.detection.allowed(self.members.len())
    }

    /// How many ejections are too many.
    pub(super) fn excess(&self) -> usize {
        self.ejected.len().saturating_sub(self.detection.allowed(self.members.len()))
    }

    /// Why somebody fails. The first level speaks for the others while those get nothing; when it can no longer take
    /// everything, each of them has to speak for itself, and one that does well is enough.
    pub(super) fn cause(&self, now: Duration) -> Cause {
        let mut levels = vec![Fares::default(); self.levels.max(1)];
        for vitals in self.members.iter() {
            let Some(level) = levels.get_mut(vitals.level() as usize) else { continue };
            let suspect = vitals.is_suspect(&self.detection, now);
            level.all += 1;
            level.suspects += usize::from(suspect);
            level.known += usize::from(suspect || vitals.recent(self.detection.interval, now).0 > 0);
            level.serving += vitals.share(now);
        }
        let (mut cause, mut taken) = (Cause::Common, 0.0);
        for (level, nth) in levels.iter().zip(0..).filter(|(level, _)| level.all > 0) {
            // Of one that gets requests now and then, only few are known.
            let most_of = if nth == 0 { level.all } else { level.known };
            if level.suspects * 2 <= most_of {
                if nth == 0 || level.known > 0 || taken >= 1.0 {
                    return Cause::Own;
                }
                cause = Cause::Unknown;
            }
            taken += OVERPROVISIONING * level.serving / level.all as f64;
        }
        cause
    }

    pub(super) fn leave(&mut self, vitals: &Arc<Vitals>) {
        for list in [&mut self.ejected, &mut self.probing] {
            list.retain(|other| !Arc::ptr_eq(other, vitals));
        }
    }

    /// Finds out whose turn is next, after anybody turned or began or ended to be tried: of all, so that no request has to.
    pub(super) fn settle(&mut self) {
        let ejected = self.ejected.iter().filter_map(|vitals| match vitals.state() {
            State::Ejected { until } => Some((until, vitals)),
            _ => None,
        });
        let unheard = self.probing.iter().filter(|vitals| !vitals.probed.load(Relaxed));
        let all = ejected.chain(unheard.map(|vitals| (Duration::ZERO, vitals)));
        self.next = all.min_by_key(|(at, _)| *at).map(|(at, vitals)| (at, Arc::clone(vitals)));
    }

    /// Whose turn it is to be tried, and from when on.
    pub(super) fn wanted(&self) -> Option<(Duration, &Arc<Vitals>)> {
        self.next.as_ref().map(|(at, vitals)| (*at, vitals))
    }

    /// Who is to be asked on purpose, and from when on.
    pub(super) fn questioned(&self) -> Option<(Duration, &Arc<Vitals>)> {
        // To no end where nobody may be ejected, or where so many fail that nobody would be.
        if !self.has_room() || self.doubted.len() * 2 > self.members.len() {
            return None;
        }
        let alone = |vitals: &&Arc<Vitals>| vitals.is_doubted() && !vitals.probed.load(Relaxed);
        let from = |vitals: &Arc<Vitals>| self.common_cause.max(vitals.spared());
        let doubted = self.doubted.iter().filter(alone);
        doubted.map(|vitals| (from(vitals), vitals)).min_by_key(|(from, _)| *from)
    }

    /// The last that was heard of it was a failure.
    pub(super) fn doubt(&mut self, vitals: &Arc<Vitals>) {
        /// Where more than so many are in doubt, the others wait for their turn.
        const MOST: usize = 16;
        self.doubted.retain(|other| other.is_doubted() && !Arc::ptr_eq(other, vitals));
        if self.doubted.len() < MOST && vitals.is_doubted() {
            self.doubted.push(Arc::clone(vitals));
        }
    }

    pub(super) fn eject(&mut self, vitals: &Arc<Vitals>, until: Duration, reason: Option<Reason>, now: Duration) {
        self.leave(vitals);
        vitals.turn(State::Ejected { until }, reason, now);
        self.ejected.push(Arc::clone(vitals));
    }
}
