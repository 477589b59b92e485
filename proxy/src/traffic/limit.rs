//! PURE: how much may be under way to a destination at once (a bulkhead). All workers count together, without a lock: a
//! slot is taken by compare-exchange before anything is let through, so that two cannot both take the last one.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use sheetbend_control_plane_client::model::{Concurrency, ConnectionPool};

/// Requests under way to one destination, unless a policy says otherwise.
const REQUESTS: u64 = 100_000;
/// Requests that wait for a connection to it.
const PENDING: u64 = 10_000;
/// As many as there are.
const ANY: u64 = u64::MAX;

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Connections to a destination.
    Connections,
    /// Requests that wait for one.
    Pending,
    /// Requests under way to a destination.
    Requests,
    /// Retries among them.
    Retries,
    /// Requests under way by a route.
    Route,
}

impl Limit {
    /// The word for it in metrics and on the admin port.
    pub fn word(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Pending => "pending",
            Self::Requests => "requests",
            Self::Retries => "retries",
            Self::Route => "route",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Pending => "requests that wait for a connection",
            Self::Requests | Self::Route => "requests under way",
            Self::Retries => "retries under way",
        })
    }
}

/// So many at once, and no more.
#[derive(Debug)]
pub struct Slots {
    taken: AtomicU64,
    most: AtomicU64,
}

impl Slots {
    /// None taken yet.
    pub fn new(most: u64) -> Self {
        Self { taken: AtomicU64::new(0), most: AtomicU64::new(most) }
    }

    /// Takes one, if one is free.
    pub fn take(&self) -> bool {
        let most = self.most.load(Relaxed);
        let mut taken = self.taken.load(Relaxed);
        // Relaxed: nothing but the count itself is read by it.
        while taken < most {
            match self.taken.compare_exchange_weak(taken, taken + 1, Relaxed, Relaxed) {
                Ok(_) => return true,
                Err(now) => taken = now,
            }
        }
        false
    }

    /// Gives one back that was taken.
    pub fn free(&self) {
        self.taken.fetch_sub(1, Relaxed);
    }

    /// How many there may be from now on. Those beyond it stay until they end.
    pub fn allow(&self, most: u64) {
        self.most.store(most, Relaxed);
    }

    /// How many are taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Whether none is free.
    pub fn is_full(&self) -> bool {
        self.taken() >= self.most.load(Relaxed)
    }

    /// How many there may be; `None` when any number may.
    pub fn most(&self) -> Option<u64> {
        Some(self.most.load(Relaxed)).filter(|most| *most != ANY)
    }
}

/// The limits of one destination, or of one route.
#[derive(Debug)]
pub struct Limits {
    connections: Slots,
    pending: Slots,
    requests: Slots,
    retries: Slots,
    /// Requests on one connection; 0 is any number.
    per_connection: AtomicU64,
    /// Milliseconds, and 0 where nobody said so: to connect, and for which nothing may move.
    connect: AtomicU64,
    tcp_idle: AtomicU64,
    http_idle: AtomicU64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: Slots::new(ANY),
            pending: Slots::new(PENDING),
            requests: Slots::new(REQUESTS),
            retries: Slots::new(ANY),
            per_connection: AtomicU64::new(0),
            connect: AtomicU64::new(0),
            tcp_idle: AtomicU64::new(0),
            http_idle: AtomicU64::new(0),
        }
    }
}

impl Limits {
    /// Does as a policy says from now on; what was taken stays counted.
    pub fn follow(&self, policy: Option<&ConnectionPool>) {
        let (tcp, http) = policy.map(|policy| (policy.tcp.clone(), policy.http.clone())).unwrap_or_default();
        let or = |said: Option<u32>, usual| said.map_or(usual, u64::from);
        self.connections.allow(or(tcp.max_connections, ANY));
        self.pending.allow(or(http.http1_max_pending_requests, PENDING));
        self.requests.allow(or(http.http2_max_requests, REQUESTS));
        self.retries.allow(or(http.max_retries, ANY));
        self.per_connection.store(or(http.max_requests_per_connection, 0), Relaxed);
        let millis = |time: Option<Duration>| time.map_or(0, |time| time.as_millis().clamp(1, ANY.into()) as u64);
        self.connect.store(millis(tcp.connect_timeout), Relaxed);
        self.tcp_idle.store(millis(tcp.idle_timeout.filter(|time| !time.is_zero())), Relaxed);
        let never = |time: Duration| if time.is_zero() { Duration::MAX } else { time };
        self.http_idle.store(millis(http.idle_timeout.map(never)), Relaxed);
    }

    /// The same of a route: connections are its destination's.
    pub fn follow_route(&self, policy: &Concurrency) {
        let or_any = |said: Option<u32>| said.map_or(ANY, u64::from);
        self.requests.allow(policy.max_requests.into());
        self.pending.allow(or_any(policy.max_pending));
        self.retries.allow(or_any(policy.max_retries));
    }

    /// How long a connection may take to be there, if a policy says so.
    pub fn connect_timeout(&self) -> Option<Duration> {
        time(&self.connect)
    }

    /// For how long nothing may move on an opaque connection, if a policy says so.
    pub fn tcp_idle(&self) -> Option<Duration> {
        time(&self.tcp_idle)
    }

    /// For how long a connection stays without a request, if a policy says so.
    pub fn http_idle(&self) -> Option<Duration> {
        time(&self.http_idle)
    }

    /// The slots of one of them.
    pub fn of(&self, limit: Limit) -> &Slots {
        match limit {
            Limit::Connections => &self.connections,
            Limit::Pending => &self.pending,
            Limit::Requests | Limit::Route => &self.requests,
            Limit::Retries => &self.retries,
        }
    }

    /// Whether a connection that has carried so many requests takes no more.
    pub fn is_used_up(&self, carried: u64) -> bool {
        let most = self.per_connection.load(Relaxed);
        most != 0 && carried >= most
    }
}

fn time(millis: &AtomicU64) -> Option<Duration> {
    Some(millis.load(Relaxed)).filter(|millis| *millis != 0).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    /// Two threads and more fight over few slots: at no moment do they hold more than there are, and none is lost.
    #[test]
    fn workers_together_never_exceed_a_limit() {
        for most in [1, 2, 5] {
            let (slots, holding, exceeded) = (Slots::new(most), AtomicU64::new(0), AtomicBool::new(false));
            let worked = || {
                let mut taken = 0;
                for _ in 0..100_000 {
                    if slots.take() {
                        exceeded.fetch_or(holding.fetch_add(1, Relaxed) >= most, Relaxed);
                        taken += 1;
                        std::hint::spin_loop();
                        holding.fetch_sub(1, Relaxed);
                        slots.free();
                    }
                }
                taken
            };
            let taken: u64 = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(worked)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert!(!exceeded.load(Relaxed), "more than {most} at once");
            assert!(taken >= 100_000 / 4, "{taken} of 400,000 passed");
            assert_eq!(slots.taken(), 0);
        }
    }

    /// Nobody gives back: of all who ask, exactly as many get one as there are.
    #[test]
    fn the_last_slot_is_taken_once() {
        let slots = Slots::new(1_000);
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..10_000).filter(|_| slots.take()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 1_000);
    }

    #[test]
    fn without_a_policy_the_usual_limits_hold_again() {
        let limits = Limits::default();
        let policy: ConnectionPool = serde_json::from_value(serde_json::json!({
            "tcp": {"maxConnections": 1},
            "http": {"http1MaxPendingRequests": 2, "http2MaxRequests": 3, "maxRequestsPerConnection": 4, "maxRetries": 0},
        }))
        .unwrap();
        let kinds = [Limit::Connections, Limit::Pending, Limit::Requests, Limit::Retries];
        let all = |limits: &Limits| kinds.map(|kind| limits.of(kind).most());
        limits.follow(Some(&policy));
        assert_eq!(all(&limits), [Some(1), Some(2), Some(3), Some(0)]);
        assert!(limits.is_used_up(4) && !limits.is_used_up(3));
        limits.follow(None);
        assert_eq!(all(&limits), [None, Some(10_000), Some(100_000), None]);
        assert!(!limits.is_used_up(u64::MAX));
    }

    #[test]
    fn a_route_limits_what_it_says_and_nothing_else() {
        let limits = Limits::default();
        let policy = |words| serde_json::from_value::<Concurrency>(words).unwrap();
        let all = |limits: &Limits| [Limit::Route, Limit::Pending, Limit::Retries].map(|kind| limits.of(kind).most());
        limits.follow_route(&policy(serde_json::json!({"maxRequests": 3, "maxPending": 2, "maxRetries": 0})));
        assert_eq!(all(&limits), [Some(3), Some(2), Some(0)]);
        limits.follow_route(&policy(serde_json::json!({"maxRequests": 4})));
        assert_eq!(all(&limits), [Some(4), None, None]);
    }

    proptest! {
        /// Whatever is taken, given back and allowed meanwhile: a slot is granted only below the limit of that moment.
        #[test]
        fn nothing_is_granted_beyond_the_limit_of_the_moment(
            steps in proptest::collection::vec((0u8..3, 0u64..6), 1..200)
        ) {
            let slots = Slots::new(3);
            let (mut held, mut most) = (0, 3);
            for (step, number) in steps {
                match step {
                    0 => {
                        let granted = slots.take();
                        prop_assert_eq!(granted, held < most);
                        held += u64::from(granted);
                    }
                    1 if held > 0 => {
                        slots.free();
                        held -= 1;
                    }
                    1 => {}
                    _ => {
                        slots.allow(number);
                        most = number;
                    }
                }
                prop_assert_eq!(slots.taken(), held);
            }
        }
    }
}
