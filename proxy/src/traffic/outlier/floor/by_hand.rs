//! What an operator says of an endpoint. The floor holds for an operator, too.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::{Floor, Reason, State, Vitals};

/// Why an operator's word does not eject an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotEjected {
    /// Too few would be left.
    Floor {
        /// So many others are ejected.
        ejected: usize,
        /// Of so many.
        all: usize,
    },
    /// It is none of the backend's endpoints any more.
    Gone,
}

impl Floor {
    /// Leaves an endpoint alone for so long. Then it is tried like any other that was ejected.
    pub fn eject_by_hand(&self, vitals: &Arc<Vitals>, time: Duration, now: Duration) -> Result<(), NotEjected> {
        let mut turning = self.lock();
        if !vitals.present.load(Relaxed) {
            return Err(NotEjected::Gone);
        }
        let is_out = matches!(vitals.state(), State::Ejected { .. });
        if !is_out && !turning.has_room() {
            return Err(NotEjected::Floor { ejected: turning.ejected.len(), all: turning.members.len() });
        }
        vitals.spare(Duration::ZERO);
        vitals.runs.end();
        vitals.take(self.detection.load().base_ejection_time);
        turning.eject(vitals, now + time, Some(Reason::Operator), now);
        turning.tally.ejected(Reason::Operator);
        self.want(&mut turning);
        Ok(())
    }

    /// Takes an endpoint into use, and ejects it not again for so long, whatever comes of requests and checks.
    pub fn restore_by_hand(&self, vitals: &Arc<Vitals>, time: Duration, now: Duration) {
        let mut turning = self.lock();
        turning.leave(vitals);
        vitals.spare(now + time);
        vitals.forget();
        vitals.turn(State::Serving, Some(Reason::Operator), now);
        self.want(&mut turning);
    }
}

impl Vitals {
    /// Whether it is ejected because an operator said so, and will be for a while.
    pub(super) fn is_out_by_hand(&self, now: Duration) -> bool {
        let out = matches!(self.state(), State::Ejected { until } if now < until);
        out && self.history().last().is_some_and(|turn| turn.reason == Some(Reason::Operator))
    }
}
