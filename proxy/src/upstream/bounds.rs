//! A destination's limits as they are taken and given back, and the wait for a connection where no more may be dialed.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use sheetbend_control_plane_client::model::ConnectionPool;
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

    /// Does as a policy says from now on. Whoever waits looks whether that makes room.
    pub fn follow(&self, policy: Option<&ConnectionPool>) {
        self.limits.follow(policy);
        self.tell(Notify::notify_waiters);
    }

    /// There is room again on a connection that some of those who wait may share.
    pub(super) fn tell_waiting(&self) {
        if self.limits.of(Limit::Connections).most().is_some() {
            self.tell(Notify::notify_waiters);
        }
    }

    /// A connection has ended, or nobody uses it, which is as good for whoever is next.
    pub(super) fn tell_next(&self) {
        if self.limits.of(Limit::Connections).most().is_some() {
            self.tell(Notify::notify_one);
        }
    }

    fn tell(&self, notify: impl FnOnce(&Notify)) {
        // What was freed before is seen by whoever waits from now on, or that one is seen here.
        fence(SeqCst);
        if self.waiting.load(Relaxed) > 0 {
            notify(&self.freed);
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
            self.of.tell_next();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use super::*;

    fn at_most(connections: u32) -> ConnectionPool {
        serde_json::from_value(serde_json::json!({"tcp": {"maxConnections": connections}})).unwrap()
    }

    /// One who waits for a connection, and counts how often it looks.
    async fn connection(bounds: &Arc<Bounds>, looks: &AtomicUsize) -> Permit {
        let look = || {
            looks.fetch_add(1, Relaxed);
            bounds.take(Limit::Connections)
        };
        bounds.until(look).await
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_a_connection_has_one_as_soon_as_the_limit_is_lifted() {
        for lifted in [None, Some(at_most(2))] {
            let bounds = Arc::<Bounds>::default();
            bounds.follow(Some(&at_most(1)));
            let (_held, looks) = (bounds.take(Limit::Connections).unwrap(), AtomicUsize::new(0));
            let lift = async {
                tokio::time::sleep(WAIT).await;
                bounds.follow(lifted.as_ref());
            };
            let both = async { tokio::join!(connection(&bounds, &looks), lift).0 };
            tokio::time::timeout(WAIT * 10, both).await.expect("it is told");
        }
    }

    const WAIT: std::time::Duration = std::time::Duration::from_secs(1);

    #[tokio::test]
    async fn a_connection_that_ends_wakes_one_of_those_who_wait() {
        let (bounds, looks) = (Arc::<Bounds>::default(), AtomicUsize::new(0));
        bounds.follow(Some(&at_most(1)));
        let held = bounds.take(Limit::Connections);
        let waiting = (0..100).map(|_| async {
            connection(&bounds, &looks).await;
        });
        let mut all = pin!(futures_util::future::join_all(waiting));
        poll_fn(|cx| {
            assert!(all.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        assert_eq!(looks.load(Relaxed), 100);
        drop(held);
        all.await;
        // Each has it in turn, and is woken when it is free.
        assert_eq!(looks.load(Relaxed), 200);
    }
}
