//! Faults that are injected on purpose: the waits and the answers that `policy` decided about.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::http::error::Error;
use crate::http::exchange::Exchange;
use crate::policy::Injected;
use crate::telemetry::{Counter, Flags, Telemetry};

/// Requests of one worker that wait on purpose at once: a fault costs its callers patience, not this proxy its memory.
const MOST_DELAYED: usize = 1_000;

/// How many wait now.
#[derive(Debug, Default)]
pub(crate) struct Delayed(AtomicUsize);

/// One that waits.
struct Waiting<'a>(&'a Delayed);

impl Delayed {
    fn begin(&self) -> Option<Waiting<'_>> {
        let more = |now| (now < MOST_DELAYED).then_some(now + 1);
        self.0.fetch_update(Relaxed, Relaxed, more).ok().map(|_| Waiting(self))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Relaxed);
    }
}

/// Waits, and answers in the destination's place, as was decided. Whoever calls this ends it at the request's deadline.
pub(crate) async fn suffer(
    injected: Injected,
    delayed: &Delayed,
    telemetry: &Telemetry,
    exchange: &mut Exchange,
) -> Result<(), Error> {
    if !injected.delay.is_zero() {
        match delayed.begin() {
            Some(_waiting) => {
                telemetry.count(Counter::FaultDelay);
                exchange.flags |= Flags::DELAY_INJECTED;
                tokio::time::sleep(injected.delay).await;
            }
            None => telemetry.count(Counter::FaultOverflow),
        }
    }
    match injected.abort {
        Some(abort) => Err(Error::Injected(Box::new(abort))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_bound_wait_at_once() {
        let delayed = Delayed::default();
        let mut waiting: Vec<_> = (0..MOST_DELAYED).filter_map(|_| delayed.begin()).collect();
        assert_eq!(waiting.len(), MOST_DELAYED);
        assert!(delayed.begin().is_none());
        waiting.pop();
        assert!(delayed.begin().is_some());
    }
}
