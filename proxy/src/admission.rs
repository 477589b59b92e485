//! Limits as they are kept: who has passed too often, and who may come to the app now. Decided in [`crate::traffic`].

use std::hash::RandomState;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{Method, request};
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{Concurrency, ForEach, RateLimit, TrafficLimits};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::http::deadline::Deadline;
use crate::http::error::Error;
use crate::http::headers;
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::limit::{Limit, Slots};
use crate::traffic::rate::Rate;
use crate::traffic::shed::{self, Shed};
use crate::upstream::{Bounded, Bounds, Endpoints, Permit};

/// How often, of a service or of a route.
#[derive(Default)]
pub(crate) struct Rates(Vec<Arc<Rate>>);

impl Rates {
    /// What did not change goes on as it was; the rest begins with full buckets.
    pub(crate) fn new(
        wanted: &[RateLimit],
        mut known: impl FnMut(&RateLimit) -> Option<Arc<Rate>>,
        now: Duration,
    ) -> Self {
        let rate =
            |one: &RateLimit| known(one).unwrap_or_else(|| Arc::new(Rate::new(one.clone(), RandomState::new(), now)));
        Self(wanted.iter().map(rate).collect())
    }

    /// Those of them that are the same still.
    pub(crate) fn known(&self, wanted: &RateLimit) -> Option<Arc<Rate>> {
        self.0.iter().find(|rate| rate.policy() == wanted).map(Arc::clone)
    }

    /// Whether a request may pass now; one that may not counts as `side`.
    pub(crate) fn pass(
        &self,
        head: &request::Parts,
        caller: Option<&SpiffeId>,
        side: Counter,
        now: Duration,
    ) -> Result<(), Error> {
        for rate in &self.0 {
            let taken = match &rate.policy().for_each {
                ForEach::Everybody => rate.take(&(), now),
                ForEach::Caller => rate.take(&caller, now),
                ForEach::Header(name) => rate.take(&head.headers.get(&**name).map(|value| value.as_bytes()), now),
            };
            taken.map_err(|after| {
                let by = Arc::clone(&rate.policy().name);
                Error::RateLimited { by, after, side }
            })?;
        }
        Ok(())
    }
}

/// How many requests may be with the app at once, and how many wait for that.
pub(crate) struct Gate {
    /// First come, first served.
    room: Arc<Semaphore>,
    most: Mutex<usize>,
    /// Room that is taken and will not be there any more once it is given back: the limit was lowered meanwhile.
    owed: AtomicUsize,
    pending: Slots,
}

/// Room at the app, until this is dropped.
pub(crate) struct Room {
    gate: Arc<Gate>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Room {
    fn drop(&mut self) {
        let repaid = self.gate.owed.fetch_update(Relaxed, Relaxed, |owed| owed.checked_sub(1)).is_ok();
        if let Some(permit) = self.permit.take().filter(|_| repaid) {
            permit.forget();
        }
    }
}

/// A place in the queue. Given up for the deadline's sake, it counts as that, however it came to be given up.
struct Place<'a> {
    gate: &'a Gate,
    telemetry: &'a Telemetry,
    deadline: Option<Deadline>,
    served: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.gate.pending.free();
        if !self.served && self.deadline.is_some_and(|deadline| deadline.left().is_zero()) {
            self.telemetry.count(Counter::ShedLate);
        }
    }
}

impl Gate {
    fn new(most: usize) -> Self {
        Self {
            room: Arc::new(Semaphore::new(most)),
            most: Mutex::new(most),
            owed: AtomicUsize::new(0),
            pending: Slots::new(0),
        }
    }

    /// Keeps to another limit from now on. Whoever is with the app already stays.
    fn follow(&self, wanted: &Concurrency) {
        let wanted_most = usize::try_from(wanted.max_requests).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        self.pending.allow(wanted.max_pending.into());
        let mut most = self.most.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted_most > *most {
            let more = wanted_most - *most;
            let owed = self.owed.fetch_update(Relaxed, Relaxed, |owed| Some(owed.saturating_sub(more))).unwrap_or(0);
            self.room.add_permits(more - owed.min(more));
        } else {
            let fewer = *most - wanted_most;
            self.owed.fetch_add(fewer - self.room.forget_permits(fewer), Relaxed);
        }
        *most = wanted_most;
    }

    fn room(self: &Arc<Self>, permit: OwnedSemaphorePermit) -> Room {
        Room { gate: Arc::clone(self), permit: Some(permit) }
    }

    /// Room at the app, at once or after a wait.
    async fn enter(
        self: &Arc<Self>,
        pending_timeout: Duration,
        deadline: Option<Deadline>,
        telemetry: &Telemetry,
    ) -> Result<Room, Error> {
        // Free room means that nobody waits for it.
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            return Ok(self.room(permit));
        }
        let left = deadline.map(Deadline::left);
        let within = shed::queue(&self.pending, pending_timeout, left).map_err(Error::Shed)?;
        let mut place = Place { gate: self, telemetry, deadline, served: false };
        match timeout(within, Arc::clone(&self.room).acquire_owned()).await {
            Ok(Ok(permit)) => {
                place.served = true;
                Ok(self.room(permit))
            }
            // It counts where the place is given up, or where the caller hears of it.
            Err(_) if deadline.is_some_and(|deadline| deadline.left().is_zero()) => {
                place.served = true;
                Err(Error::Shed(Shed::Late))
            }
            Ok(Err(_)) | Err(_) => Err(Error::Shed(Shed::Waited)),
        }
    }

    /// With the app now, and how many may be; waiting now, and how many may.
    pub(crate) fn levels(&self) -> [(u64, Option<u64>); 2] {
        let most = *self.most.lock().unwrap_or_else(PoisonError::into_inner);
        let with_the_app = (most + self.owed.load(Relaxed)).saturating_sub(self.room.available_permits());
        [(with_the_app as u64, Some(most as u64)), (self.pending.taken(), self.pending.most())]
    }
}

/// What holds for all who call the app.
pub(crate) struct Admission {
    /// The start of the clock by which buckets fill.
    epoch: Instant,
    rates: Rates,
    gate: Option<(Concurrency, Arc<Gate>)>,
}

impl Default for Admission {
    /// Open to everybody.
    fn default() -> Self {
        Self { epoch: Instant::now(), rates: Rates::default(), gate: None }
    }
}

impl Admission {
    /// What is counted in `former` goes on.
    pub(crate) fn new(limits: &TrafficLimits, former: &Self) -> Self {
        let epoch = former.epoch;
        let gate = limits.concurrency.as_ref().map(|wanted| {
            let gate = match &former.gate {
                Some((_, gate)) => Arc::clone(gate),
                None => Arc::new(Gate::new(0)),
            };
            gate.follow(wanted);
            (wanted.clone(), gate)
        });
        Self { epoch, rates: Rates::new(&limits.rates, |one| former.rates.known(one), epoch.elapsed()), gate }
    }

    /// Whether everybody may pass at any time.
    pub(crate) fn is_open(&self) -> bool {
        self.rates.0.is_empty() && self.gate.is_none()
    }

    /// Where the app's room is kept.
    pub(crate) fn gate(&self) -> Option<&Arc<Gate>> {
        self.gate.as_ref().map(|(_, gate)| gate)
    }

    /// Lets a request through to the app, at once or after a wait.
    pub(crate) async fn admit(
        &self,
        head: &request::Parts,
        caller: Option<&SpiffeId>,
        deadline: Option<Deadline>,
        telemetry: &Telemetry,
    ) -> Result<Option<Room>, Error> {
        /// How gRPC servers are asked whether they are well.
        const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";
        let path = head.uri.path();
        let health = path == GRPC_HEALTH && head.method == Method::POST && headers::is_grpc(&head.headers);
        let exempt = |of: &Concurrency| health || of.exempt_paths.iter().any(|exempt| **exempt == *path);
        self.rates.pass(head, caller, Counter::RateLimitedInbound, self.epoch.elapsed())?;
        match &self.gate {
            Some((of, _)) if exempt(of) => Ok(None),
            Some((of, gate)) => gate.enter(of.pending_timeout, deadline, telemetry).await.map(Some),
            None => Ok(None),
        }
    }
}

/// What holds for the requests of one route.
pub(crate) struct RouteLimits {
    name: Arc<str>,
    rates: Rates,
    /// How many may be under way, where that is limited.
    bounds: Option<Arc<Bounds>>,
}

impl RouteLimits {
    /// `name` is that of the route, `default/web`.
    pub(crate) fn new(name: &str, limits: &TrafficLimits, endpoints: &Endpoints) -> Self {
        let name: Arc<str> = name.into();
        let bounds = limits.concurrency.as_ref().map(|concurrency| {
            let bounds = endpoints.bounds(Bounded::Route(Arc::clone(&name)));
            bounds.limits.of(Limit::Route).allow(concurrency.max_requests.into());
            bounds
        });
        let now = endpoints.epoch.elapsed();
        Self { name, rates: Rates::new(&limits.rates, |one| Some(endpoints.rate(one, now)), now), bounds }
    }

    /// Lets a request pass, which takes up what this gives.
    pub(crate) fn admit(&self, head: &request::Parts, now: Duration) -> Result<Option<Permit>, Error> {
        self.rates.pass(head, None, Counter::RateLimitedOutbound, now)?;
        let Some(bounds) = &self.bounds else { return Ok(None) };
        let full = || Error::overflow(Limit::Route, format_args!("route {}", self.name));
        bounds.take(Limit::Route).map(Some).ok_or_else(full)
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use sheetbend_control_plane_client::model::ServiceName;

    use super::*;
    use crate::telemetry::{AccessLogSettings, Settings};

    #[tokio::test]
    async fn whoever_looks_after_the_apps_health_has_no_need_of_room_but_is_counted() {
        let limits = r#"{"rates": [{"name": "r", "requests": 3, "interval": "1h"}],
            "concurrency": {"maxRequests": 1, "exemptPaths": ["/healthz"]}}"#;
        let limits: TrafficLimits = serde_json::from_str(limits).unwrap();
        let admission = Admission::new(&limits, &Admission::default());
        let telemetry = Telemetry::new(Settings {
            identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
            service: ServiceName { service: "web".into(), namespace: "default".into() },
            access_log: AccessLogSettings::default(),
        });
        let ask = async |path: &str, content: &str| {
            let request = Request::post(path).header("content-type", content).body(()).unwrap();
            admission.admit(&request.into_parts().0, None, None, &telemetry).await
        };
        let grpc = "application/grpc";
        assert!(matches!(ask("/healthz", "text/plain").await, Ok(None)));
        assert!(matches!(ask("/grpc.health.v1.Health/Check", grpc).await, Ok(None)));
        assert!(matches!(ask("/grpc.health.v1.Health/Check", "text/plain").await, Ok(Some(_))), "it is no gRPC call");
        assert!(matches!(ask("/healthz", "text/plain").await, Err(Error::RateLimited { .. })));
    }
}
