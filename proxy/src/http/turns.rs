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
    /// The request whose turn began last has a body, of which nobody here sees the end.
    body: AtomicBool,
    /// It is no longer HTTP.
    left: AtomicBool,
}

impl Turns {
    /// A request whose head is complete, until its response has ended.
    pub(crate) fn begin(self: &Arc<Self>, body: bool) -> Turn {
        self.begun.fetch_add(1, Relaxed);
        self.body.store(body, Relaxed);
        Turn(Arc::clone(self))
    }

    /// From now on the connection carries something else.
    pub(crate) fn leave(&self) {
        self.left.store(true, Relaxed);
    }

    /// Bytes came in.
    pub(super) fn read(&self) {
        let begun = self.begun();
        if begun == self.ended.load(Relaxed) {
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
        let open = [&self.unflushed, &self.body, &self.left].iter().any(|open| open.load(Relaxed));
        between && !open
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
