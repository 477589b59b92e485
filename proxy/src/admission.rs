//! Limits as they are kept: who has passed too often. Decided in [`crate::traffic`].

use std::hash::RandomState;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, request};
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{Concurrency, ForEach, RateLimit, TrafficLimits};

use crate::http::deadline::Deadline;
use crate::http::error::Error;
use crate::http::headers;
use crate::room::{Gate, Room};
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::limit::Limit;
use crate::traffic::rate::Rate;
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
                None => Arc::new(Gate::new()),
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
        telemetry: &Arc<Telemetry>,
    ) -> Result<Option<Room>, Error> {
        /// How gRPC servers are asked whether they are well.
        const GRPC_HEALTH: &str = "/grpc.health.v1.Health/Check";
        let path = head.uri.path();
        let grpc = headers::is_grpc(&head.headers);
        let health = path == GRPC_HEALTH && head.method == Method::POST && grpc;
        let exempt = |of: &Concurrency| health || of.exempt_paths.iter().any(|exempt| **exempt == *path);
        self.rates.pass(head, caller, Counter::RateLimitedInbound, self.epoch.elapsed())?;
        match &self.gate {
            Some((of, _)) if exempt(of) => Ok(None),
            Some((of, gate)) => gate.enter(of.pending_timeout, deadline, grpc, telemetry).await.map(Some),
            None => Ok(None),
        }
    }
}

/// What holds for the requests of one route.
pub(crate) struct RouteLimits {
    name: Arc<str>,
    rates: Rates,
    /// How many may be under way, wait for a connection and be retried, where that is limited.
    bounds: Option<Arc<Bounds>>,
}

impl RouteLimits {
    /// `name` is that of the route, `default/web`.
    pub(crate) fn new(name: &str, limits: &TrafficLimits, endpoints: &Endpoints) -> Self {
        let name: Arc<str> = name.into();
        let bounds = limits.concurrency.as_ref().map(|concurrency| {
            let bounds = endpoints.bounds(Bounded::Route(Arc::clone(&name)));
            bounds.limits.follow_route(concurrency);
            bounds
        });
        let now = endpoints.epoch.elapsed();
        Self { name, rates: Rates::new(&limits.rates, |one| Some(endpoints.rate(one, now)), now), bounds }
    }

    /// Lets a request pass, which takes up what this gives.
    pub(crate) fn admit(&self, head: &request::Parts, now: Duration) -> Result<Option<Permit>, Error> {
        self.rates.pass(head, None, Counter::RateLimitedOutbound, now)?;
        self.take(Limit::Route)
    }

    /// One of what the route limits, where it limits anything.
    pub(crate) fn take(&self, limit: Limit) -> Result<Option<Permit>, Error> {
        let Some(bounds) = &self.bounds else { return Ok(None) };
        let full = || Error::overflow(limit, format_args!("route {}", self.name));
        bounds.take(limit).map(Some).ok_or_else(full)
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
