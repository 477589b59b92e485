//! PURE: one layer of retries in a chain of services. Where a calls b and b calls c, an outage of c must not be answered
//! by retries of b for each retry of a: with every layer their number would double.
//!
//! A proxy sees both what comes to its app and what its app asks for because of it, and knows the one by the other as far
//! as the app passes on `x-request-id` or `traceparent`. So it learns two things, both only when something has failed:
//! that a request is itself a retry (then what follows from it is not retried again), and that what followed from a
//! request was retried in vain (then its caller is told so).

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::HeaderValue;

/// How long something is remembered: what follows from a request follows soon.
const FOR: u64 = 10;
/// How much is remembered. What is forgotten too early costs one retry more.
const SLOTS: usize = 1024;

/// By what a request is known again in those that follow from it. Nobody else can guess either.
#[derive(Clone, Copy, Debug, Default)]
pub struct Call<'a> {
    /// `x-request-id`.
    pub request_id: Option<&'a HeaderValue>,
    /// `traceparent`, of which the trace id matters (W3C Trace Context §3.2.2.3).
    pub trace: Option<&'a HeaderValue>,
}

/// What is known of the chain that requests are part of. Shared by all workers, without a lock.
#[derive(Debug, Default)]
pub struct Layers {
    /// A stranger who chooses its ids meets nobody else's.
    hasher: RandomState,
    again: Recent,
    in_vain: Recent,
}

impl Layers {
    /// A request that came is a retry of its caller's.
    pub fn comes_again(&self, call: Call<'_>, now: Duration) {
        self.note(&self.again, call, now);
    }

    /// Whether a request follows from one that was a retry.
    pub fn follows_a_retry(&self, call: Call<'_>, now: Duration) -> bool {
        self.knows(&self.again, call, now)
    }

    /// A request failed for good, after all the retries that there may be.
    pub fn in_vain(&self, call: Call<'_>, now: Duration) {
        self.note(&self.in_vain, call, now);
    }

    /// Whether what followed from a request was retried in vain.
    pub fn was_in_vain(&self, call: Call<'_>, now: Duration) -> bool {
        self.knows(&self.in_vain, call, now)
    }

    fn note(&self, recent: &Recent, call: Call<'_>, now: Duration) {
        self.keys(call).into_iter().flatten().for_each(|key| recent.note(key, now));
    }

    fn knows(&self, recent: &Recent, call: Call<'_>, now: Duration) -> bool {
        recent.has_any(now) && self.keys(call).into_iter().flatten().any(|key| recent.has(key, now))
    }

    fn keys(&self, call: Call<'_>) -> [Option<u64>; 2] {
        let trace = call.trace.and_then(|trace| trace.as_bytes().get(3..35));
        [call.request_id.map(|id| self.hasher.hash_one(id.as_bytes())), trace.map(|id| self.hasher.hash_one(id))]
    }
}

/// A set that forgets: by age, and where another one comes into the same slot.
#[derive(Debug)]
struct Recent {
    /// When something was noted last, in seconds and one more.
    last: AtomicU64,
    /// The upper 48 bits of a key, and the lower 16 of the second at which it was noted, and one more.
    slots: Box<[AtomicU64]>,
}

impl Default for Recent {
    fn default() -> Self {
        Self { last: AtomicU64::new(0), slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect() }
    }
}

const AGE: u64 = 0xffff;

fn second(now: Duration) -> u64 {
    now.as_secs() + 1
}

impl Recent {
    fn slot(&self, key: u64) -> Option<&AtomicU64> {
        self.slots.get(key as usize % SLOTS)
    }

    fn note(&self, key: u64, now: Duration) {
        if let Some(slot) = self.slot(key) {
            slot.store(key & !AGE | second(now) & AGE, Relaxed);
            self.last.store(second(now), Relaxed);
        }
    }

    /// Whether there is anything to look for: all that a request pays while nothing fails.
    fn has_any(&self, now: Duration) -> bool {
        let last = self.last.load(Relaxed);
        last != 0 && second(now).saturating_sub(last) <= FOR
    }

    fn has(&self, key: u64, now: Duration) -> bool {
        let Some(kept) = self.slot(key).map(|slot| slot.load(Relaxed)) else { return false };
        kept != 0 && kept & !AGE == key & !AGE && second(now).wrapping_sub(kept) & AGE <= FOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static TRACE: HeaderValue = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    static CHILD: HeaderValue = HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01");
    static OTHER: HeaderValue = HeaderValue::from_static("00-1af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");

    #[test]
    fn a_call_is_known_by_its_id_or_its_trace_for_a_while_and_no_other_is() {
        let (id, strange) = (HeaderValue::from_static("one"), HeaderValue::from_static("two"));
        let (layers, now) = (Layers::default(), Duration::from_secs(100_000));
        let call = |id, trace| Call { request_id: id, trace };
        assert!(!layers.follows_a_retry(call(Some(&id), Some(&TRACE)), now));
        layers.comes_again(call(Some(&id), Some(&TRACE)), now);
        for known in [call(Some(&id), None), call(Some(&strange), Some(&CHILD))] {
            assert!(layers.follows_a_retry(known, now) && !layers.was_in_vain(known, now));
            assert!(layers.follows_a_retry(known, now + Duration::from_secs(FOR)));
            assert!(!layers.follows_a_retry(known, now + Duration::from_secs(FOR + 1)));
        }
        for unknown in [call(None, None), call(Some(&strange), Some(&OTHER))] {
            assert!(!layers.follows_a_retry(unknown, now));
        }
        let short = HeaderValue::from_static("00-0af7");
        layers.in_vain(call(None, Some(&short)), now);
        assert!(!layers.was_in_vain(call(None, Some(&short)), now), "no trace id");
    }

    #[test]
    fn at_most_so_many_are_remembered_and_the_latest_are() {
        let recent = Recent::default();
        (0..10 * SLOTS as u64).for_each(|key| recent.note((key << 16) | (key % SLOTS as u64), Duration::ZERO));
        let known = (0..10 * SLOTS as u64).filter(|key| recent.has((key << 16) | (key % SLOTS as u64), Duration::ZERO));
        assert_eq!(known.count(), SLOTS);
    }
}
