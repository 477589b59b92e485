//! PURE: how many requests in which time. Token buckets of `governor` (GCRA), with the time passed in, and a bounded
//! number of them: whoever calls chooses the header values by which they are kept.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed, StateStore};
use governor::{Quota, RateLimiter};
use sheetbend_control_plane_client::model::{ForEach, RateLimit};

/// Buckets of one limit at once, of some 50 bytes each. Whoever comes while that many are in use shares one with all others
/// who do.
pub const MOST_KEYS: usize = 10_000;

/// One limit, with its buckets.
pub struct Rate {
    policy: RateLimit,
    clock: Given,
    buckets: Buckets,
    /// By chance: nobody can choose two keys that share a bucket.
    hasher: RandomState,
}

enum Buckets {
    One(RateLimiter<NotKeyed, InMemoryState, Given, NoOpMiddleware<Nanos>>),
    Each(RateLimiter<u64, Bounded, Given, NoOpMiddleware<Nanos>>),
}

impl Rate {
    /// With full buckets, at `now`. `hasher` makes keys of callers and header values.
    pub fn new(policy: RateLimit, hasher: RandomState, now: Duration) -> Self {
        let one = NonZeroU32::MIN;
        let period = (policy.interval / policy.requests.max(1)).max(Duration::from_nanos(1));
        let quota = Quota::with_period(period).unwrap_or_else(|| Quota::per_second(one));
        let quota = quota.allow_burst(NonZeroU32::new(policy.burst()).unwrap_or(one));
        let clock = Given::default();
        clock.is(now);
        let buckets = match policy.for_each {
            ForEach::Everybody => Buckets::One(RateLimiter::direct_with_clock(quota, clock.clone())),
            ForEach::Caller | ForEach::Header(_) => {
                let bounded = Bounded { clock: clock.clone(), start: nanos(now), kept: Mutex::default() };
                Buckets::Each(RateLimiter::new(quota, bounded, clock.clone()))
            }
        };
        Self { policy, clock, buckets, hasher }
    }

    /// What it was made for.
    pub fn policy(&self) -> &RateLimit {
        &self.policy
    }

    /// Takes a token out of the bucket of `key`, where there is one for each. `Err` when it is empty: how long until it
    /// holds one again.
    pub fn take(&self, key: &impl Hash, now: Duration) -> Result<(), Duration> {
        self.clock.is(now);
        let at = self.clock.now();
        match &self.buckets {
            Buckets::One(limiter) => limiter.check().map_err(|until| until.wait_time_from(at)),
            Buckets::Each(limiter) => {
                limiter.check_key(&self.hasher.hash_one(key)).map_err(|until| until.wait_time_from(at))
            }
        }
    }
}

/// The time as it was last told. Never goes back: two workers look at the same clock, one a moment later.
#[derive(Clone, Default)]
struct Given(Arc<AtomicU64>);

impl Given {
    fn is(&self, now: Duration) {
        self.0.fetch_max(nanos(now), Relaxed);
    }
}

impl Clock for Given {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.0.load(Relaxed).into()
    }
}

/// 584 years of them.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Buckets by key, and no more than [`MOST_KEYS`] of them.
struct Bounded {
    clock: Given,
    start: u64,
    /// Locked for each request under this very limit, for some 50 ns.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// When each will be full again, on governor's own clock.
    full_at: HashMap<u64, u64>,
    /// The bucket of all who came when there were too many.
    others: Option<u64>,
    swept: u64,
}

impl Kept {
    /// Where the bucket of `key` is; that of all others where there is no room for it.
    fn bucket(&mut self, key: u64, now: u64) -> Bucket<'_> {
        const EVERY: u64 = 1_000_000_000;
        let known = self.full_at.contains_key(&key);
        if !known && self.full_at.len() >= MOST_KEYS && now >= self.swept.saturating_add(EVERY) {
            self.swept = now;
            // A full bucket is as good as none.
            self.full_at.retain(|_, full_at| *full_at > now);
        }
        match known || self.full_at.len() < MOST_KEYS {
            true => Bucket::Own(&mut self.full_at, key),
            false => Bucket::Others(&mut self.others),
        }
    }
}

enum Bucket<'a> {
    Own(&'a mut HashMap<u64, u64>, u64),
    Others(&'a mut Option<u64>),
}

impl StateStore for Bounded {
    type Key = u64;

    fn measure_and_replace<T, F, E>(&self, key: &u64, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let now = self.clock.now().as_u64().saturating_sub(self.start);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        match kept.bucket(*key, now) {
            Bucket::Own(all, key) => {
                let (passed, full_at) = decide(all.get(&key).map(|at| (*at).into()))?;
                all.insert(key, full_at.as_u64());
                Ok(passed)
            }
            Bucket::Others(others) => {
                let (passed, full_at) = decide(others.map(Nanos::from))?;
                *others = Some(full_at.as_u64());
                Ok(passed)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(requests: u32, burst: Option<u32>, for_each: ForEach) -> Rate {
        let interval = Duration::from_secs(1);
        let policy = RateLimit { name: "default/web#0".into(), requests, interval, burst, for_each };
        Rate::new(policy, RandomState::new(), Duration::from_secs(7))
    }

    const START: Duration = Duration::from_secs(7);

    fn passed(rate: &Rate, key: &str, asked: usize, now: Duration) -> usize {
        (0..asked).filter(|_| rate.take(&key, now).is_ok()).count()
    }

    #[test]
    fn a_burst_passes_and_then_as_many_as_come_back() {
        let rate = rate(10, Some(20), ForEach::Everybody);
        assert_eq!(passed(&rate, "", 100, START), 20);
        assert_eq!(passed(&rate, "", 100, START + Duration::from_secs(1)), 10);
        assert_eq!(passed(&rate, "", 100, START + Duration::from_secs(60)), 20);
    }

    #[test]
    fn who_is_refused_is_told_how_long_to_wait_and_passes_then() {
        let rate = rate(2, None, ForEach::Everybody);
        assert_eq!(passed(&rate, "", 2, START), 2);
        let wait = rate.take(&"", START).unwrap_err();
        assert_eq!(wait, Duration::from_millis(500));
        assert!(rate.take(&"", START + wait - Duration::from_millis(1)).is_err());
        assert!(rate.take(&"", START + wait).is_ok());
    }

    #[test]
    fn each_has_a_bucket_of_their_own() {
        let rate = rate(3, None, ForEach::Caller);
        assert_eq!(passed(&rate, "a", 10, START), 3);
        assert_eq!(passed(&rate, "b", 10, START), 3);
    }

    #[test]
    fn whoever_makes_up_keys_gets_one_bucket_for_all_of_them_and_costs_nobody_theirs() {
        let rate = rate(2, None, ForEach::Header("x-key".into()));
        assert_eq!(passed(&rate, "known", 1, START), 1);
        let made_up = (0..3 * MOST_KEYS).filter(|number| rate.take(number, START).is_ok()).count();
        // One each for those that had room, and the two of the bucket that all the others share.
        assert_eq!(made_up, MOST_KEYS - 1 + 2);
        assert_eq!(passed(&rate, "known", 10, START), 1, "what was there keeps its bucket");
        // Once they are full again, there is room.
        let later = START + Duration::from_secs(2);
        assert_eq!(passed(&rate, "new", 10, later), 2);
    }

    #[test]
    fn workers_together_take_no_token_twice() {
        for for_each in [ForEach::Everybody, ForEach::Caller] {
            let rate = rate(1_000, None, for_each);
            let passed: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| passed(&rate, "a", 10_000, START))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(passed, 1_000);
        }
    }

    proptest! {
        /// In any stretch of time, no more than the burst and what came back meanwhile.
        #[test]
        fn never_more_than_the_burst_and_what_came_back(
            requests in 1u32..50, burst in 1u32..50, pauses in proptest::collection::vec(0u64..300, 1..300)
        ) {
            let rate = rate(requests, Some(burst), ForEach::Everybody);
            let mut now = START;
            let mut times = Vec::new();
            for pause in pauses {
                now += Duration::from_millis(pause);
                if rate.take(&"", now).is_ok() {
                    times.push(now);
                }
            }
            for (from, begin) in times.iter().enumerate() {
                for (to, end) in times.iter().enumerate().skip(from) {
                    let came_back = (*end - *begin).as_secs_f64() * f64::from(requests);
                    prop_assert!((to - from + 1) as f64 <= f64::from(burst) + came_back + 1e-6);
                }
            }
        }
    }
}
