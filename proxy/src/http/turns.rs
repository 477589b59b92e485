//! Whose turn it is on a connection of HTTP/1: what those who read and write it, and those who answer its requests, know
//! of each other. Used by one thread; nothing is ordered by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// The turns of one connection.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    begun: AtomicUsize,
    ended: AtomicUsize,
    /// Which head, counted from 1, a byte came of while it was nobody's turn.
    head: AtomicUsize,
    /// Something was written and is not known to have reached the kernel.
    unflushed: AtomicBool,
    /// Of the request whose turn began last, while somebody reads its body.
    reads: AtomicUsize,
    /// The same, once nobody does any more though its end was not seen: hyper passes over the rest, or closes.
    skips: AtomicUsize,
    /// It is no longer HTTP.
    left: AtomicBool,
}

impl Turns {
    /// A request whose head is complete, until its response has ended.
    pub(crate) fn begin(self: &Arc<Self>) -> Turn {
        self.begun.fetch_add(1, Relaxed);
        Turn(Arc::clone(self))
    }

    /// The body of the request whose turn has just begun is to be read.
    pub(crate) fn body(self: &Arc<Self>) -> Reading {
        let number = self.begun();
        self.reads.store(number, Relaxed);
        Reading { turns: Arc::clone(self), number, ended: false }
    }

    /// From now on the connection carries something else.
    pub(crate) fn leave(&self) {
        self.left.store(true, Relaxed);
    }

    /// Bytes came in.
    pub(super) fn read(&self) {
        let begun = self.begun();
        // A body may go on after its answer.
        if begun == self.ended.load(Relaxed) && !self.is_last(&self.reads) {
            self.head.store(begun + 1, Relaxed);
        }
    }

    /// Bytes are to go out.
    pub(super) fn writes(&self) {
        self.unflushed.store(true, Relaxed);
    }

    /// All of them went.
    pub(super) fn flushed(&self) {
        self.unflushed.store(false, Relaxed);
    }

    /// Requests whose heads are complete.
    pub(super) fn begun(&self) -> usize {
        self.begun.load(Relaxed)
    }

    /// Which head is begun and not complete, if one is known to be.
    pub(super) fn unfinished(&self) -> Option<usize> {
        let begun = self.begun();
        // It is complete once its request has begun.
        (self.head.load(Relaxed) == begun + 1 && !self.left.load(Relaxed)).then_some(begun)
    }

    /// Nothing is under way in either direction, as far as can be told without what is buffered for reading.
    pub(super) fn is_idle(&self) -> bool {
        let between = self.begun() == self.ended.load(Relaxed) && self.unfinished().is_none();
        let open = [&self.unflushed, &self.left].iter().any(|open| open.load(Relaxed));
        let body = self.is_last(&self.reads) || self.is_last(&self.skips);
        between && !open && !body
    }

    /// Whether `number` is that of the request whose turn began last; the first one's is 1.
    fn is_last(&self, number: &AtomicUsize) -> bool {
        let number = number.load(Relaxed);
        number > 0 && number == self.begun()
    }
}

/// One request's body, while it is read. Goes with the request's head to whoever reads it.
#[derive(Debug)]
pub(crate) struct Reading {
    turns: Arc<Turns>,
    number: usize,
    ended: bool,
}

impl Reading {
    /// All of it has come.
    pub(crate) fn end(&mut self) {
        self.ended = true;
        let _ = self.turns.reads.compare_exchange(self.number, 0, Relaxed, Relaxed);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if !self.ended && self.turns.reads.compare_exchange(self.number, 0, Relaxed, Relaxed).is_ok() {
            self.turns.skips.store(self.number, Relaxed);
        }
    }
}

/// One request's turn on its connection.
#[derive(Debug)]
pub(crate) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request has come, with a body of which there may be more.
    fn begun() -> (Arc<Turns>, Turn, Reading) {
        let turns = Arc::new(Turns::default());
        turns.read();
        assert_eq!(turns.unfinished(), Some(0), "its head");
        let turn = turns.begin();
        let reading = turns.body();
        (turns, turn, reading)
    }

    #[test]
    fn a_connection_whose_body_was_read_is_idle_after_the_answer_and_not_before() {
        let (turns, turn, mut reading) = begun();
        reading.end();
        assert!(!turns.is_idle());
        drop(turn);
        assert!(turns.is_idle());
        turns.read();
        assert_eq!((turns.unfinished(), turns.is_idle()), (Some(1), false), "the next head");
    }

    #[test]
    fn a_body_that_outlives_its_answer_is_no_head_and_keeps_the_connection() {
        let (turns, turn, mut reading) = begun();
        drop(turn);
        turns.read();
        assert_eq!((turns.unfinished(), turns.is_idle()), (None, false));
        reading.end();
        assert!(turns.is_idle());
    }

    #[test]
    fn a_body_that_nobody_reads_to_its_end_keeps_the_connection_and_what_follows_has_a_clock() {
        let (turns, turn, reading) = begun();
        drop((turn, reading));
        assert!(!turns.is_idle());
        turns.read();
        assert_eq!(turns.unfinished(), Some(1));
    }

    #[test]
    fn the_end_of_an_earlier_body_says_nothing_of_the_next() {
        let (turns, turn, mut first) = begun();
        drop(turn);
        let (turn, second) = (turns.begin(), turns.body());
        drop(turn);
        first.end();
        assert!(!turns.is_idle());
        drop(second);
        assert!(!turns.is_idle());
    }
}
