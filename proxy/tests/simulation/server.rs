//! A server that does what it was told to.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;

use super::script::Conduct;

pub(crate) struct Server {
    pub(crate) conduct: Conduct,
    /// Since when.
    pub(crate) since: Duration,
    /// When each of those under way is done.
    busy_until: BinaryHeap<Reverse<Duration>>,
    /// Calls that hang here, with their attempt.
    held: Vec<(usize, u32)>,
}

/// What comes of a request, and after how long.
pub(crate) enum Reply {
    Answer { after: Duration, status: u16, has_effect: bool },
    Reset { after: Duration },
    Nothing,
}

impl Reply {
    /// Whether a server has done what the request asks for. One that hangs may have, and so may one that says it failed.
    pub(crate) fn has_effect(&self) -> bool {
        match self {
            Self::Answer { has_effect, .. } => *has_effect,
            Self::Reset { .. } | Self::Nothing => true,
        }
    }
}

impl Server {
    pub(crate) fn new(conduct: &Conduct) -> Self {
        Self { conduct: conduct.clone(), since: Duration::ZERO, busy_until: BinaryHeap::new(), held: Vec::new() }
    }

    /// From now on otherwise: gives the calls that hung here, whose connections end.
    pub(crate) fn becomes(&mut self, conduct: Conduct, now: Duration) -> Vec<(usize, u32)> {
        (self.conduct, self.since) = (conduct, now);
        std::mem::take(&mut self.held)
    }

    pub(crate) fn take(&mut self, call: usize, attempt: u32, now: Duration, chance: &mut StdRng) -> Reply {
        match self.conduct {
            Conduct::Answers { median, spread, errors, at_once } => {
                let after = median.mul_f64((spread * normal(chance)).exp());
                let (fails, has_effect) = (chance.random_bool(errors), chance.random());
                let status = if fails { [502, 503, 504][chance.random_range(0..3)] } else { 200 };
                Reply::Answer { after: self.queue(now, after, at_once), status, has_effect: !fails || has_effect }
            }
            Conduct::Resets => Reply::Reset { after: Duration::from_millis(1) },
            // It changed its ways while this was on its way: nobody is there any more.
            Conduct::Refuses | Conduct::Silent { .. } => Reply::Reset { after: Duration::ZERO },
            Conduct::Hangs => {
                self.held.push((call, attempt));
                Reply::Nothing
            }
        }
    }

    /// How long a request stays that takes `work` once it has its turn.
    fn queue(&mut self, now: Duration, work: Duration, at_once: usize) -> Duration {
        while self.busy_until.peek().is_some_and(|done| done.0 <= now) {
            self.busy_until.pop();
        }
        let begins =
            if self.busy_until.len() < at_once { now } else { self.busy_until.pop().map_or(now, |done| done.0) };
        self.busy_until.push(Reverse(begins + work));
        begins + work - now
    }
}

/// Box and Muller's transform.
fn normal(chance: &mut StdRng) -> f64 {
    let (a, b): (f64, f64) = (chance.random_range(f64::MIN_POSITIVE..1.0), chance.random());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}
