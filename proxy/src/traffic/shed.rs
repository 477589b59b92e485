//! PURE: who may come to the app now, who waits for their turn, and who is sent away before the app drowns.

use std::time::Duration;

use super::limit::Slots;

/// Why a request is not let through to the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shed {
    /// As many as may are with the app, and as many as may wait.
    Full,
    /// It has waited for as long as it may.
    Waited,
    /// Nobody cares for its answer any more.
    Late,
}

impl Shed {
    /// The word for it in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Waited => "waited",
            Self::Late => "late",
        }
    }
}

/// How long a request may wait that finds no room: `timeout`, and no longer than until its deadline. Takes a place in the
/// queue, which [`Slots::free`] gives back.
pub fn queue(pending: &Slots, timeout: Duration, left: Option<Duration>) -> Result<Duration, Shed> {
    match left {
        Some(left) if left.is_zero() => Err(Shed::Late),
        _ if !pending.take() => Err(Shed::Full),
        left => Ok(left.unwrap_or(timeout).min(timeout)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn nobody_waits_beyond_their_deadline_and_no_more_wait_than_may() {
        let pending = Slots::new(2);
        assert_eq!(queue(&pending, SECOND, None), Ok(SECOND));
        assert_eq!(queue(&pending, SECOND, Some(SECOND / 4)), Ok(SECOND / 4));
        assert_eq!(queue(&pending, SECOND, Some(SECOND * 4)), Err(Shed::Full));
        pending.free();
        assert_eq!(queue(&pending, SECOND, Some(Duration::ZERO)), Err(Shed::Late));
        assert_eq!(queue(&pending, SECOND, Some(SECOND * 4)), Ok(SECOND));
        assert_eq!(pending.taken(), 2);
    }
}
