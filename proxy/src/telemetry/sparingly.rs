//! PURE: log lines that a stranger can cause, said sparingly. Whoever wants to know them all has the counters.

use std::time::Duration;

/// Between two lines of one kind.
const APART: Duration = Duration::from_secs(1);

/// One kind of line.
#[derive(Debug, Default)]
pub(super) struct Sparingly {
    said: Option<Duration>,
    left_out: u64,
}

impl Sparingly {
    /// Whether to say it at `now`, on any clock that does not go back: `Some` of how many were left out since the last.
    pub(super) fn at(&mut self, now: Duration) -> Option<u64> {
        if self.said.is_some_and(|said| now.saturating_sub(said) < APART) {
            self.left_out += 1;
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_and_then_one_a_second_with_how_many_were_left_out() {
        let mut line = Sparingly::default();
        let said: Vec<_> = (0..40u64).filter_map(|n| Some((n, line.at(Duration::from_millis(100 * n))?))).collect();
        assert_eq!(said, [(0, 0), (10, 9), (20, 9), (30, 9)]);
        assert_eq!(line.at(Duration::from_secs(60)), Some(9));
        assert_eq!(line.at(Duration::from_secs(120)), Some(0));
    }
}
