//! All endpoints by what they are, in parts: while one of them grows, those who need another wait for nothing.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheetbend_control_plane_client::model::{ClusterName, Transport};

use super::{EndpointState, Place};

/// Of two backends, the same place is two endpoints: what the one's callers meet is not what the other's do.
pub(super) type Key = (Place, Transport, Option<ClusterName>);

/// Of ten thousand endpoints each part has some 160: it doubles within microseconds.
const PARTS: usize = 64;

/// How long an endpoint is remembered that nobody uses: one that comes back before is as it was.
const KEPT: Duration = Duration::from_secs(60);

pub(super) struct Table {
    chooses: RandomState,
    parts: [Mutex<HashMap<Key, Remembered>>; PARTS],
}

struct Remembered {
    endpoint: Arc<EndpointState>,
    /// Since when nothing leads there any more.
    unused: Option<Duration>,
}

impl Remembered {
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.endpoint) > 1
    }

    /// Whether it is remembered still.
    fn stays(&mut self, now: Duration) -> bool {
        if self.is_used() {
            self.unused = None;
            return true;
        }
        now < *self.unused.get_or_insert(now) + KEPT
    }
}

impl Default for Table {
    fn default() -> Self {
        Self { chooses: RandomState::new(), parts: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl Table {
    /// The endpoint of a key, made if it is new.
    pub(super) fn get_or_insert(&self, key: Key, new: impl FnOnce() -> EndpointState) -> Arc<EndpointState> {
        let part = usize::try_from(self.chooses.hash_one(&key)).unwrap_or_default() % PARTS;
        let Some(part) = self.parts.get(part) else { return Arc::new(new()) };
        let mut part = lock(part);
        let remembered = part.entry(key).or_insert_with(|| Remembered { endpoint: Arc::new(new()), unused: None });
        Arc::clone(&remembered.endpoint)
    }

    /// Lets go of what nobody has used for a while.
    pub(super) fn sweep(&self, now: Duration) {
        for part in &self.parts {
            let gone: Vec<_> = lock(part).extract_if(|_, remembered| !remembered.stays(now)).collect();
            // Taken apart when nobody has to wait for it any more.
            drop(gone);
        }
    }

    /// Those that somebody uses.
    pub(super) fn used(&self) -> Vec<Arc<EndpointState>> {
        let mut used = Vec::new();
        for part in &self.parts {
            let part = lock(part);
            used.extend(part.values().filter(|known| known.is_used()).map(|known| Arc::clone(&known.endpoint)));
        }
        used
    }
}

fn lock<T>(part: &Mutex<T>) -> MutexGuard<'_, T> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u16) -> Key {
        (Place::Address(([127, 0, 0, 1], n).into()), Transport::Plain, None)
    }

    fn endpoint(n: u16) -> EndpointState {
        EndpointState::new(key(n).0, Transport::Plain, None)
    }

    #[test]
    fn an_endpoint_that_comes_back_within_a_minute_is_as_it_was() {
        let table = Table::default();
        let first = table.get_or_insert(key(1), || endpoint(1));
        let number = first.number();
        assert!(Arc::ptr_eq(&first, &table.get_or_insert(key(1), || endpoint(1))));
        table.sweep(Duration::ZERO);
        drop(first);
        table.sweep(Duration::from_secs(10));
        table.sweep(Duration::from_secs(69));
        assert_eq!(table.get_or_insert(key(1), || endpoint(1)).number(), number);
        table.sweep(Duration::from_secs(70));
        assert_ne!(table.get_or_insert(key(1), || endpoint(1)).number(), number, "a minute after it was used last");
    }

    #[test]
    fn those_in_use_are_all_that_somebody_holds() {
        let table = Table::default();
        let mut held: Vec<_> = (0..1_000).map(|n| table.get_or_insert(key(n), || endpoint(n))).collect();
        assert_eq!(table.used().len(), 1_000);
        held.truncate(10);
        let mut used: Vec<_> = table.used().iter().map(|endpoint| endpoint.number()).collect();
        used.sort_unstable();
        assert_eq!(used, held.iter().map(|endpoint| endpoint.number()).collect::<Vec<_>>());
    }
}
