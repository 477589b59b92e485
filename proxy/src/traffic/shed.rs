//! PURE: who may come to the app now, who waits for their turn, who is sent away before the app drowns, and who is with it
//! for so long without need that others may come.

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

/// What a request that is with the app waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The app, which has all that it asked for.
    App,
    /// Its caller, for more of the request.
    Request,
    /// Its caller, who does not read the answer.
    Unread,
    /// Nobody can say: a stream, a conversation, a tunnel, in which either side may be silent for as long as it likes.
    Quiet,
}

/// What becomes of its room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Stays,
    /// It goes on without: whoever is silent drowns nobody.
    GivesBack,
    /// It ends: its caller keeps the app from doing anything else.
    Ends,
}

/// How long one has stood still. A bucket: it fills while somebody is waited for, and bytes empty it, so that neither silence
/// nor a byte now and then holds the app's room for ever.
#[derive(Debug, Default)]
pub struct Patience {
    spent: Duration,
    moved: u64,
    looked: Option<Duration>,
}

impl Patience {
    /// Bytes that bring back a second. What a connection of 2G does is ten times as much.
    const RATE: u64 = 500;

    /// Looks at what one waits for now who may stand still for `most`, when `moved` bytes have passed since it came. Who looks
    /// too seldom blames nobody for more than `seldom`.
    pub fn look(&mut self, wait: Wait, moved: u64, now: Duration, seldom: Duration, most: Duration) -> Verdict {
        let passed = self.looked.map_or(Duration::ZERO, |looked| now.saturating_sub(looked).min(seldom));
        self.looked = Some(now);
        let bytes = moved.saturating_sub(self.moved);
        self.moved = moved;
        let earned = Duration::from_millis(bytes.saturating_mul(1000) / Self::RATE);
        self.spent = self.spent.saturating_sub(earned);
        if wait == Wait::App {
            return Verdict::Stays;
        }
        self.spent = self.spent.saturating_add(passed);
        match wait {
            _ if self.spent < most => Verdict::Stays,
            Wait::Request | Wait::Unread => Verdict::Ends,
            Wait::Quiet | Wait::App => Verdict::GivesBack,
        }
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

    /// What becomes of one who is looked at every second, and of whom so many bytes pass in each: after how many seconds,
    /// within an hour.
    fn ends(wait: Wait, bytes_a_second: u64) -> (Verdict, u64) {
        let mut patience = Patience::default();
        let look =
            |second| patience.look(wait, bytes_a_second * second, SECOND * second as u32, 2 * SECOND, 30 * SECOND);
        let mut looks = (0..3600).map(look).enumerate();
        let over = looks.find(|(_, verdict)| *verdict != Verdict::Stays);
        over.map_or((Verdict::Stays, 3600), |(second, verdict)| (verdict, second as u64))
    }

    #[test]
    fn who_keeps_the_app_waiting_ends_and_who_is_silent_goes_on_without_room() {
        assert_eq!(ends(Wait::Request, 0), (Verdict::Ends, 30));
        assert_eq!(ends(Wait::Unread, 0), (Verdict::Ends, 30));
        assert_eq!(ends(Wait::Quiet, 0), (Verdict::GivesBack, 30));
        assert_eq!(ends(Wait::App, 0).0, Verdict::Stays);
    }

    #[test]
    fn a_byte_now_and_then_wins_no_time_and_a_slow_line_all_of_it() {
        let (verdict, after) = ends(Wait::Request, 1);
        assert_eq!(verdict, Verdict::Ends);
        assert!((30..32).contains(&after), "{after}");
        let (verdict, after) = ends(Wait::Request, Patience::RATE / 2);
        assert_eq!(verdict, Verdict::Ends);
        assert!((59..=60).contains(&after), "{after}");
        assert_eq!(ends(Wait::Request, Patience::RATE).0, Verdict::Stays);
    }

    #[test]
    fn what_went_fast_before_stands_still_no_longer_for_that() {
        let mut patience = Patience::default();
        let mut look = |moved, now| patience.look(Wait::Unread, moved, SECOND * now, 2 * SECOND, 30 * SECOND);
        assert_eq!(look(1 << 40, 0), Verdict::Stays);
        let ended = (1..100).find(|now| look(1 << 40, *now) != Verdict::Stays);
        assert_eq!(ended, Some(30));
    }

    #[test]
    fn a_limit_that_is_changed_holds_for_those_who_are_there() {
        let mut patience = Patience::default();
        let mut look = |now, most| patience.look(Wait::Request, 0, SECOND * now, 2 * SECOND, SECOND * most);
        assert!((0..30).all(|now| look(now, 30) == Verdict::Stays));
        assert!((30..60).all(|now| look(now, 60) == Verdict::Stays));
        assert_eq!(look(60, 60), Verdict::Ends);
        let mut patience = Patience::default();
        let mut look = |now, most| patience.look(Wait::Request, 0, SECOND * now, 2 * SECOND, SECOND * most);
        assert!((0..10).all(|now| look(now, 30) == Verdict::Stays));
        assert_eq!(look(10, 5), Verdict::Ends);
    }

    #[test]
    fn a_proxy_that_stood_still_itself_blames_nobody_for_it() {
        let mut patience = Patience::default();
        let mut look = |now| patience.look(Wait::Request, 0, SECOND * now, 2 * SECOND, 30 * SECOND);
        assert_eq!((look(0), look(3600), look(3601)), (Verdict::Stays, Verdict::Stays, Verdict::Stays));
    }
}
