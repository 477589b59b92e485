//! A destination's limits as they are taken and given back, and the wait for a connection where no more may be dialed.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::Notify;

use super::Pool;
use crate::traffic::limit::{Limit, Limits};

/// The limits of one destination or route, for all workers.
#[derive(Default)]
pub struct Bounds {
    /// How much there is and may be.
    pub limits: Limits,
    /// Who waits for a connection.
    waiting: AtomicUsize,
    freed: Notify,
    /// Those that dial it: what they keep idle is given up for others. Locked when a connection is dialed.
    pools: Mutex<Vec<Weak<Pool>>>,
}

impl Bounds {
    /// One of what is limited, if one is free.
    pub fn take(self: &Arc<Self>, limit: Limit) -> Option<Permit> {
        self.limits.of(limit).take().then(|| Permit { of: Arc::clone(self), limit })
    }

    /// A pool is about to dial.
    pub(super) fn dialed_by(&self, pool: &Arc<Pool>) {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if !pools.iter().any(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(pool))) {
            pools.retain(|known| known.strong_count() > 0);
            pools.push(Arc::downgrade(pool));
        }
    }

    /// Those that may keep an idle connection.
    pub(super) fn pools(&self) -> Vec<Arc<Pool>> {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.iter().filter_map(Weak::upgrade).collect()
    }

    /// Something is free again: a connection, or room on one.
    pub(super) fn tell_waiting(&self) {
        if self.limits.of(Limit::Connections).most().is_none() {
            return;
        }
        // What was freed before is seen by whoever waits from now on, or that one is seen here.
        fence(SeqCst);
        if self.waiting.load(Relaxed) > 0 {
            self.freed.notify_waiters();
        }
    }

    /// Waits until `found` finds something. Woken in the order in which they came.
    pub(super) async fn until<T>(&self, mut found: impl FnMut() -> Option<T>) -> T {
        let _waiting = Waiting::begin(&self.waiting);
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // Before the look: what is freed after it is not missed.
            freed.as_mut().enable();
            if let Some(found) = found() {
                return found;
            }
            freed.await;
        }
    }
}

/// One who waits, until this is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Relaxed);
        fence(SeqCst);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// One of what is limited, until this is dropped.
pub struct Permit {
    of: Arc<Bounds>,
    limit: Limit,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.of.limits.of(self.limit).free();
        if self.limit == Limit::Connections {
            self.of.tell_waiting();
        }
    }
}
