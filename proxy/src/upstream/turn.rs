//! Who may dial a shared connection: one at a time, so that a burst of requests does not dial one each. The others wait, not
//! for long, and a failure is theirs too: they do not fail one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tokio::time::timeout;

use super::DialError;

/// How long one waits at most: for somebody else's TCP connection (1 s) and handshake (2 s), and then some.
pub(super) const WAITS: Duration = Duration::from_secs(5);

/// The turns of one endpoint.
#[derive(Default)]
pub(super) struct Turns {
    /// How many dials have failed, and how the last one did.
    failures: AtomicUsize,
    last: Arc<tokio::sync::Mutex<Option<Failure>>>,
}

/// How a dial failed.
struct Failure {
    error: Arc<DialError>,
    /// Somebody was told who tells what it says of the endpoint.
    told: bool,
}

/// One's turn, until this is dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    last: OwnedMutexGuard<Option<Failure>>,
    /// Failures when the wait began.
    before: usize,
}

impl Turns {
    /// Waits for one's turn. `Err` when it takes too long.
    pub(super) async fn take(self: &Arc<Self>) -> Result<Turn, DialError> {
        let before = self.failures.load(Relaxed);
        let last = timeout(WAITS, Arc::clone(&self.last).lock_owned()).await.map_err(|_| DialError::NoTurn)?;
        Ok(Turn { turns: Arc::clone(self), last, before })
    }
}

impl Turn {
    /// How somebody failed while this one waited: what it would find too.
    pub(super) fn failed_meanwhile(&mut self) -> Option<DialError> {
        let failed = self.turns.failures.load(Relaxed) != self.before;
        let last = self.last.as_mut().filter(|_| failed)?;
        let error = Arc::clone(&last.error);
        Some(match std::mem::replace(&mut last.told, true) {
            true => DialError::Shared(error),
            false => DialError::First(error),
        })
    }

    /// Tells those who wait how this one failed. Unless who asked for it is there to be `told`, it is theirs.
    pub(super) fn fail(mut self, error: DialError, told: bool) -> DialError {
        let error = Arc::new(error);
        self.turns.failures.fetch_add(1, Relaxed);
        *self.last = Some(Failure { error: Arc::clone(&error), told });
        DialError::First(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_one_that_fails_fails_with_it_and_who_comes_later_tries_anew() {
        let turns = Arc::new(Turns::default());
        let mut first = turns.take().await.unwrap();
        assert!(first.failed_meanwhile().is_none());
        let waits = || async { turns.take().await.unwrap().failed_meanwhile().map(|error| error.to_string()) };
        let (second, third, ()) = tokio::join!(waits(), waits(), async {
            tokio::task::yield_now().await;
            first.fail(DialError::HandshakeTimeout(WAITS), true);
        });
        let failure = Some(DialError::HandshakeTimeout(WAITS).to_string());
        assert_eq!((second, third), (failure.clone(), failure));
        assert_eq!(waits().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_that_nobody_was_told_is_the_first_ones_who_waits() {
        let turns = Arc::new(Turns::default());
        let held = turns.take().await.unwrap();
        let waits = || async { turns.take().await.unwrap().failed_meanwhile() };
        let (second, third, ()) = tokio::join!(waits(), waits(), async {
            tokio::task::yield_now().await;
            held.fail(DialError::HandshakeTimeout(WAITS), false);
        });
        assert!(matches!((second, third), (Some(DialError::First(_)), Some(DialError::Shared(_)))));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let turns = Arc::new(Turns::default());
        let held = turns.take().await.unwrap();
        let began = tokio::time::Instant::now();
        let waited = turns.take().await.err().map(|error| error.to_string());
        assert_eq!(waited, Some(DialError::NoTurn.to_string()));
        assert_eq!(began.elapsed().as_secs(), WAITS.as_secs());
        drop(held);
        assert!(turns.take().await.is_ok());
    }
}
