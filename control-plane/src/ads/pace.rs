//! PURE: how often one stream may change what everybody is told. Time comes in as an argument.

use std::time::{Duration, Instant};

/// One change in so long, over time.
const PAUSE: Duration = Duration::from_millis(20);
/// Changes that wait for nothing after a rest: the ports of one app open one after another within a moment.
const AT_ONCE: u32 = 16;

/// The pace of one stream's registrations: each change means work for everybody.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When the newest change would have had its turn, had each waited for its own.
    newest: Option<Instant>,
}

impl Pace {
    /// Takes the next turn, and gives how long to wait for it.
    pub(crate) fn turn(&mut self, now: Instant) -> Duration {
        let own = self.newest.map_or(now, |newest| now.max(newest + PAUSE));
        self.newest = Some(own);
        own.saturating_duration_since(now).saturating_sub(PAUSE * (AT_ONCE - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_open_together_are_registered_together() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        assert!((0..AT_ONCE).all(|_| pace.turn(now).is_zero()));
    }

    #[test]
    fn who_changes_without_end_has_one_turn_a_pause() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut now = start;
        for _ in 0..1_000 {
            now += pace.turn(now);
        }
        assert_eq!(now - start, PAUSE * (1_000 - AT_ONCE));
    }

    #[test]
    fn a_rest_gives_the_turns_back() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        assert!((0..10 * AT_ONCE).any(|_| !pace.turn(now).is_zero()));
        let later = now + PAUSE * 10 * AT_ONCE;
        assert!((0..AT_ONCE).all(|_| pace.turn(later).is_zero()));
        assert_eq!(pace.turn(later), PAUSE);
    }
}
