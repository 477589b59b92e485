//! A destination made ready for requests: its endpoints with what is known of them. One per worker and target, made anew
//! when the control plane says something new.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::request;
use serde_json::{Value, json};
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{
    Backend, Cluster, ClusterName, Destination, HeaderEdits, Resolution, RetryConstraint, Rule, Target, TrafficLimits,
    Transport,
};
use tokio::time::Instant;

mod candidates;
mod renewal;

pub use candidates::{Caller, Candidates};

use crate::admission::RouteLimits;
use crate::faults::Delayed;
use crate::http::error::Error;
use crate::policy::{Changes, Fault, Rules, connect};
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::breaker::IsOpen;
use crate::upstream::names::Hosts;
use crate::upstream::{Bounded, EndpointState, Endpoints, Lease, Place};

/// A destination made ready.
pub struct Route {
    target: Target,
    destination: Option<Arc<Destination>>,
    rules: Rules,
    clusters: BTreeMap<ClusterName, Arc<Candidates>>,
    /// Where it goes when it is no part of the mesh, and where it goes when there is nowhere to go.
    elsewhere: Candidates,
    /// What is limited of its rules, by their names; empty where nothing is.
    limits: HashMap<Arc<str>, Arc<RouteLimits>>,
    /// Hosts outside the mesh that it leads to, and where they are.
    hosts: Hosts,
    #[cfg(test)]
    made_by: std::thread::ThreadId,
}

/// Requests go on with a route that something newer was said of, until its successor is ready, and no longer than this
/// after it was said.
/// Usually that is a few milliseconds.
const HELD: Duration = Duration::from_millis(50);

/// What is to be done with a request.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// The rule that takes it, if one does.
    pub rule: Option<&'a Rule>,
    /// Who may answer it; `None` where there is nothing for it.
    pub endpoints: Option<&'a Candidates>,
    /// What is done to it and to its answer.
    pub changes: Changes<'a>,
    /// What may go wrong on purpose.
    pub faults: &'a [Fault],
}

impl Route {
    /// Of what did not change since `old` was made, that is used again. `is_current` says whether nothing newer was heard of
    /// a cluster meanwhile: another worker may be ahead.
    fn mesh(
        target: Target,
        destination: Arc<Destination>,
        endpoints: &Endpoints,
        old: Option<&Self>,
        is_current: impl Fn(&Arc<Cluster>) -> bool,
    ) -> Self {
        let hosts = endpoints.names.of(&destination);
        let clusters = destination.clusters.iter().map(|(name, told)| {
            let cluster = &endpoints.names.fill(told);
            let known = old.and_then(|old| old.clusters.get(name)).filter(|known| known.are_of(cluster));
            let new = || {
                let candidates = candidates(name, cluster, &destination.trust_domain, endpoints);
                candidates.follow(cluster, endpoints.epoch.elapsed(), || {
                    is_current(told) && endpoints.names.is_current(cluster)
                });
                let check = cluster.policy.health_check.as_ref();
                endpoints.checks.follow(name, check, &endpoints.floor(name), candidates.endpoints());
                Arc::new(candidates)
            };
            (name.clone(), known.map_or_else(new, Arc::clone))
        });
        let clusters = clusters.collect();
        let rules = Rules::new(&destination.rules);
        let limits = limits(&destination.rules, endpoints);
        let elsewhere = Candidates::default();
        Self {
            target,
            rules,
            clusters,
            destination: Some(destination),
            elsewhere,
            limits,
            hosts,
            #[cfg(test)]
            made_by: std::thread::current().id(),
        }
    }

    fn elsewhere(target: Target, endpoints: &Endpoints) -> Self {
        let place = target.address().map_or_else(|| Place::Name(target.clone()), Place::Address);
        let budget = endpoints.budget(Bounded::Elsewhere(target.clone()), RetryConstraint::DEFAULT);
        Self {
            target,
            destination: None,
            rules: Rules::default(),
            clusters: BTreeMap::new(),
            elsewhere: Candidates::alone(endpoints.at(place, Transport::Plain, None, None), budget),
            limits: HashMap::new(),
            hosts: Box::default(),
            #[cfg(test)]
            made_by: std::thread::current().id(),
        }
    }

    /// What the control plane says of it; `None` outside the mesh.
    pub fn destination(&self) -> Option<&Arc<Destination>> {
        self.destination.as_ref()
    }

    /// What is said of it where nobody is there.
    fn nobody(&self) -> String {
        match self.hosts.iter().find(|(_, addresses)| addresses.is_empty()) {
            Some((name, _)) => format!("{} (DNS knows no address of {})", self.target, name.host()),
            None => self.target.to_string(),
        }
    }

    /// Whether that is where it leads, and is as it was when it was made.
    fn leads_to(&self, destination: &Arc<Destination>) -> bool {
        self.destination.as_ref().is_some_and(|then| Arc::ptr_eq(then, destination)) && self.leads_there()
    }

    /// Whether requests may go on with it though something newer was said of it, `since` then.
    fn may_stay(&self, since: Option<Instant>) -> bool {
        self.destination.is_some() && since.is_some_and(|since| since.elapsed() < HELD)
    }

    /// Whether all of its hosts are where they were when it was made.
    fn leads_there(&self) -> bool {
        self.hosts.iter().all(|(name, addresses)| name.is_at(addresses))
    }

    /// What leads here.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What is to be done with a request.
    pub fn choose(&self, head: &request::Parts) -> Choice<'_> {
        let Some(destination) = &self.destination else {
            return Choice { rule: None, endpoints: Some(&self.elsewhere), changes: Changes::default(), faults: &[] };
        };
        if !destination.connections.is_empty() {
            // Requests for a port whose connections are routed go where those go that name no server.
            let endpoints = self.opaque(None).ok();
            return Choice { rule: None, endpoints, changes: Changes::default(), faults: &[] };
        }
        let chosen = self.rules.choose(destination, head, rand::random());
        let endpoints = chosen.cluster.map(|cluster| self.of(cluster));
        Choice { rule: chosen.rule, endpoints, changes: chosen.changes, faults: chosen.faults }
    }

    /// What is limited of the requests that a rule takes.
    pub(crate) fn limits(&self, rule: Option<&Rule>) -> Option<&RouteLimits> {
        if self.limits.is_empty() {
            return None;
        }
        self.limits.get(&rule?.name).map(|limits| &**limits)
    }

    /// The endpoints of an opaque connection; chosen anew for each. `server_name` is what its ClientHello names.
    pub fn opaque(&self, server_name: Option<&str>) -> Result<&Candidates, Error> {
        match self.destination.as_deref() {
            None => Ok(&self.elsewhere),
            Some(destination) if destination.connections.is_empty() => Ok(self.of(&destination.default_cluster)),
            Some(destination) => connect(&destination.connections, server_name, rand::random())
                .map(|cluster| self.of(cluster))
                .map_err(|why| Error::Unrouted(self.target.clone(), why)),
        }
    }

    /// Whether it takes a ClientHello to tell where an opaque connection goes.
    pub fn asks_server_name(&self) -> bool {
        let rules = self.destination.iter().flat_map(|destination| &destination.connections);
        rules.into_iter().any(|rule| rule.hostname.is_some())
    }

    /// What would be decided for a request, without sending it.
    pub fn preview(
        target: Target,
        destination: Arc<Destination>,
        endpoints: &Endpoints,
        head: &request::Parts,
    ) -> Value {
        let now = endpoints.epoch.elapsed();
        // Whoever only asks changes nothing for the others.
        let route = Self::mesh(target, Arc::clone(&destination), endpoints, None, |_| false);
        let rule = route.rules.choose(&destination, head, 0).rule;
        let headers = HeaderEdits::default();
        let whole = [Backend { cluster: destination.default_cluster.clone(), weight: 1, headers }];
        let backends = rule.map_or(&whole[..], |rule| &rule.backends);
        let weights: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
        let backend = |backend: &Backend| {
            json!({
                "backend": &*backend.cluster,
                "percent": (10_000.0 * f64::from(backend.weight) / weights.max(1) as f64).round() / 100.0,
                "policy": destination.clusters.get(&backend.cluster).map(|cluster| &*cluster.policy),
                "candidates": route.of(&backend.cluster).as_json(now),
            })
        };
        json!({
            "destination": destination.name.to_string(),
            "connections": destination.connections,
            "rule": rule.map(|rule| json!({ "name": &*rule.name, "place": &*rule.policy.place, "policy": &*rule.policy })),
            "backends": backends.iter().map(backend).collect::<Vec<_>>(),
        })
    }

    /// Those of a cluster. Of the mesh, and therefore never elsewhere: that is empty here.
    fn of(&self, cluster: &ClusterName) -> &Candidates {
        self.clusters.get(cluster).map_or(&self.elsewhere, |candidates| candidates)
    }

    /// Picks one of those that may answer `caller`, another one than those `tried` where there is another. A request that may
    /// be sent again may be the one that tries an ejected endpoint. `now` is the time on the endpoints' clock.
    pub fn pick(
        &self,
        candidates: &Candidates,
        caller: &Caller,
        tried: &[Arc<EndpointState>],
        retryable: bool,
        now: Duration,
    ) -> Result<Lease, Error> {
        let admitted = candidates.admit(now).map_err(|IsOpen(wait)| Error::CircuitOpen(self.target.clone(), wait))?;
        let picked = candidates.pick(caller, tried, retryable && tried.is_empty(), now);
        let Some((picked, endpoint)) = picked else {
            candidates.forgo(admitted, now);
            return Err(Error::NoEndpoint(self.nobody()));
        };
        Ok(Lease::of(endpoint, picked, admitted, now))
    }
}

fn candidates(
    name: &ClusterName,
    cluster: &Arc<Cluster>,
    trust_domain: &Arc<str>,
    endpoints: &Endpoints,
) -> Candidates {
    let service = Some((cluster.service.clone(), Arc::clone(trust_domain)));
    let all = cluster.endpoints.iter().map(|endpoint| {
        let place = Place::Address(endpoint.address);
        endpoints.at(place, endpoint.transport.clone(), service.clone(), Some(name))
    });
    let floor = endpoints.floor(name);
    let bounds = endpoints.bounds(Bounded::Service(cluster.service.clone()));
    bounds.follow(cluster.policy.connection_pool.as_ref());
    let constraint = cluster.policy.retry_constraint.unwrap_or_default();
    let shared = (bounds, endpoints.budget(Bounded::Service(cluster.service.clone()), constraint));
    let all = all.collect();
    Candidates::new(cluster, all, floor, shared, &endpoints.zone)
}

/// The limits of rules that have some; those of one route share them.
fn limits(rules: &[Rule], endpoints: &Endpoints) -> HashMap<Arc<str>, Arc<RouteLimits>> {
    let mut of_routes: HashMap<&str, Arc<RouteLimits>> = HashMap::new();
    let limited = rules.iter().filter(|rule| rule.policy.limits != TrafficLimits::default());
    let each = limited.map(|rule| {
        let route = rule.name.rsplit_once('#').map_or(&*rule.name, |(route, _)| route);
        let new = || Arc::new(RouteLimits::new(route, &rule.policy.limits, endpoints));
        (Arc::clone(&rule.name), Arc::clone(of_routes.entry(route).or_insert_with(new)))
    });
    each.collect()
}

/// The routes of one worker. The lock is hardly ever contended: one thread uses it, or one that makes a large route ready.
#[derive(Default)]
pub struct Routes {
    /// How many requests wait on purpose.
    pub(crate) delayed: Delayed,
    known: Arc<Mutex<HashMap<Target, Arc<Route>>>>,
    /// Held by who makes a large route ready.
    making: tokio::sync::Mutex<()>,
}

/// Whether a destination takes long to be made ready: for its endpoints, or for the places that they have on a ring.
fn is_large(destination: &Destination) -> bool {
    let hashed =
        |cluster: &Arc<Cluster>| cluster.policy.load_balancer.as_ref().is_some_and(|b| b.consistent_hash.is_some());
    let size: usize = destination.clusters.values().map(|cluster| cluster.endpoints.len()).sum();
    size > LARGE || destination.clusters.values().any(hashed)
}

/// A destination with more endpoints is made ready aside, since that takes a millisecond or more: nobody else on this worker
/// waits for it.
const LARGE: usize = 500;

/// Routes that carry nothing go when there are this many.
const MOST: usize = 4_096;

/// Makes room for one more: what leads outside the mesh goes first. What carries requests stays, and however many those
/// are, they are bounded.
fn make_room(known: &mut HashMap<Target, Arc<Route>>) {
    let busy = |route: &Arc<Route>| Arc::strong_count(route) > 1;
    if known.len() >= MOST {
        known.retain(|_, route| route.destination.is_some() || busy(route));
    }
    if known.len() >= MOST {
        known.retain(|_, route| busy(route));
    }
}

fn insert(known: &mut HashMap<Target, Arc<Route>>, route: Route) -> Arc<Route> {
    make_room(known);
    let route = Arc::new(route);
    known.insert(route.target.clone(), Arc::clone(&route));
    route
}

impl Routes {
    /// The route to a target of which nothing new was heard since it was made; the usual case, and waits for nothing.
    pub fn known(&self, target: &Target, discovery: &Discovery, deny_unknown: bool) -> Option<Arc<Route>> {
        let resolution = discovery.lookup(target)?;
        let known = self.lock();
        let route = known.get(target)?;
        let holds = match (&resolution, &route.destination) {
            (Resolution::Mesh(now), Some(then)) => {
                Arc::ptr_eq(now, then) && route.leads_there() && !route.hosts.iter().any(|(name, _)| name.is_over())
            }
            (Resolution::NotMesh, None) => !deny_unknown,
            _ => false,
        };
        holds.then(|| Arc::clone(route))
    }

    /// The route to a target; asks the control plane where nothing is known yet.
    pub async fn to(
        &self,
        target: &Target,
        discovery: &Discovery,
        endpoints: &Arc<Endpoints>,
        deny_unknown: bool,
        telemetry: &Arc<Telemetry>,
    ) -> Result<Arc<Route>, Error> {
        let resolution = match discovery.lookup(target) {
            Some(known) => known,
            None => match discovery.resolve(target).await {
                Ok(answer) => {
                    telemetry.count(match answer {
                        Resolution::Mesh(_) => Counter::ResolvedMesh,
                        Resolution::NotMesh => Counter::ResolvedNotMesh,
                    });
                    answer
                }
                // The mesh's own names are never called in plain for want of an answer.
                Err(_) if discovery.snapshot().claims(target) => return Err(Error::NoAnswer(target.clone())),
                Err(_) => {
                    telemetry.count(Counter::Unresolved);
                    Resolution::NotMesh
                }
            },
        };
        let resolution = match resolution {
            Resolution::NotMesh if !deny_unknown && !self.led_elsewhere(target) => outside(target, discovery).await?,
            resolution => resolution,
        };
        let destination = match resolution {
            Resolution::NotMesh if deny_unknown => return Err(Error::NotAllowed(target.clone())),
            Resolution::NotMesh => {
                let mut known = self.lock();
                if let Some(route) = known.get(target).filter(|route| route.destination.is_none()) {
                    return Ok(Arc::clone(route));
                }
                return Ok(insert(&mut known, Route::elsewhere(target.clone(), endpoints)));
            }
            Resolution::Mesh(destination) => destination,
        };
        endpoints.names.look_up(&destination, discovery, telemetry).await;
        let old = self.lock().get(target).cloned();
        if let Some(old) = &old {
            if old.leads_to(&destination) {
                return Ok(Arc::clone(old));
            }
            // Where a name leads is looked up by whoever asks, who then goes there.
            if old.leads_there() && old.may_stay(discovery.snapshot().since(target)) {
                return Ok(Arc::clone(old));
            }
        }
        let current = renewal::is_current(discovery.clone(), target.clone());
        if !is_large(&destination) {
            let route = Route::mesh(target.clone(), destination, endpoints, old.as_deref(), current);
            return Ok(insert(&mut self.lock(), route));
        }
        let _making = self.making.lock().await;
        if let Some(known) = self.lock().get(target).filter(|known| known.leads_to(&destination)) {
            return Ok(Arc::clone(known));
        }
        let (known, endpoints, target) = (Arc::clone(&self.known), Arc::clone(endpoints), target.clone());
        let making = tokio::task::spawn_blocking(move || {
            let route = Route::mesh(target, destination, &endpoints, old.as_deref(), current);
            insert(&mut known.lock().unwrap_or_else(PoisonError::into_inner), route)
        });
        // Nothing but a worker that ends cancels it.
        making.await.map_err(|_| Error::NoEndpoint("a worker that ends".to_string()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Target, Arc<Route>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn led_elsewhere(&self, target: &Target) -> bool {
        let known = self.lock();
        known.get(target).is_some_and(|route| route.destination.is_none())
    }
}

/// What follows from "no part of the mesh". A name that looks like one of the mesh's (`web`) may be somebody else's, of
/// `/etc/hosts` say, and then passes; if nobody has it, it is a service without an endpoint. One that registers meanwhile
/// ends the wait: look-ups of names that nobody has can take seconds.
async fn outside(target: &Target, discovery: &Discovery) -> Result<Resolution, Error> {
    if target.address().is_some() || !discovery.snapshot().claims(target) {
        return Ok(Resolution::NotMesh);
    }
    let nobody = || Error::NoEndpoint(target.to_string());
    if discovery.snapshot().owns(target) {
        return Err(nobody());
    }
    let mut changes = discovery.subscribe();
    let registered = async {
        loop {
            if let Some(mesh @ Resolution::Mesh(_)) = discovery.lookup(target) {
                return mesh;
            }
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    // Either may be lost: the one looks at what is kept elsewhere, the other's answer would come too late.
    tokio::select! {
        mesh = registered => Ok(mesh),
        found = tokio::net::lookup_host((target.host(), target.port())) => match found {
            Ok(_) => Ok(Resolution::NotMesh),
            Err(_) => Err(nobody()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(number: usize) -> Target {
        Target::new(&format!("host-{number}.example"), 80).unwrap()
    }

    fn many() -> HashMap<Target, Arc<Route>> {
        let endpoints = Endpoints::default();
        (0..MOST).map(target).map(|t| (t.clone(), Arc::new(Route::elsewhere(t, &endpoints)))).collect()
    }

    fn in_mesh(known: &mut HashMap<Target, Arc<Route>>, numbers: std::ops::Range<usize>) {
        let destination: Destination = serde_json::from_value(serde_json::json!({
            "name": {"service": {"service": "web", "namespace": "default"}, "port": 80},
            "trust_domain": "cluster.local", "default_cluster": "web.default:80", "clusters": {},
        }))
        .unwrap();
        let destination = Arc::new(destination);
        for target in numbers.map(target) {
            let route = Route::mesh(target.clone(), Arc::clone(&destination), &Endpoints::default(), None, |_| true);
            known.insert(target, Arc::new(route));
        }
    }

    #[test]
    fn what_carries_requests_stays_however_many_targets_come() {
        let mut known = many();
        let held = Arc::clone(&known[&target(8)]);
        make_room(&mut known);
        assert_eq!(known.len(), 1);
        assert!(Arc::ptr_eq(&known[&target(8)], &held));
    }

    #[test]
    fn workers_share_one_budget_and_a_new_answer_does_not_refill_it() {
        let endpoints = Endpoints::default();
        let budget = || Route::elsewhere(target(1), &endpoints).elsewhere.budget;
        let (one, other) = (budget(), budget());
        assert!(Arc::ptr_eq(&one, &other));
        // What 20 % and 3 at once leave of a hundred retries, of both together.
        assert_eq!((0..100).filter(|at| [&one, &other][at % 2].take(Duration::ZERO)).count(), 3);
        let less = RetryConstraint { percent: 0, ..RetryConstraint::DEFAULT };
        assert!(!Arc::ptr_eq(&one, &endpoints.budget(Bounded::Elsewhere(target(1)), less)));
    }

    #[test]
    fn what_leads_outside_the_mesh_goes_first() {
        let mut known = many();
        in_mesh(&mut known, 0..MOST - 1);
        make_room(&mut known);
        assert_eq!(known.len(), MOST - 1);
        in_mesh(&mut known, 0..MOST);
        make_room(&mut known);
        assert!(known.is_empty());
    }
}
