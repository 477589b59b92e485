//! A destination made ready for requests: its endpoints with what is known of them. One per worker and target, made anew
//! when the control plane says something new.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::request;
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{ClusterName, Destination, Resolution, Rule, Target, Transport};

use crate::http::error::Error;
use crate::policy::{self, Index};
use crate::telemetry::{Counter, Telemetry};
use crate::traffic::balance;
use crate::traffic::outlier::{Floor, Picked, Vitals};
use crate::traffic::retry::Budget;
use crate::upstream::{Bounded, Bounds, EndpointState, Endpoints, Lease, Place};

/// A destination made ready.
pub struct Route {
    target: Target,
    destination: Option<Arc<Destination>>,
    index: Index,
    clusters: BTreeMap<ClusterName, Candidates>,
    /// Where it goes when it is no part of the mesh, and where it goes when there is nowhere to go.
    elsewhere: Candidates,
    /// How many retries there may be.
    pub budget: Arc<Budget>,
}

/// Endpoints that may answer a request.
#[derive(Default)]
pub struct Candidates {
    endpoints: Vec<Arc<EndpointState>>,
    vitals: Arc<[Arc<Vitals>]>,
    /// Who of them is ejected; nobody outside the mesh.
    floor: Option<Arc<Floor>>,
    /// Running sums of their weights, where those differ.
    shares: Option<Vec<u64>>,
    /// How much may be under way to all of them.
    pub bounds: Arc<Bounds>,
}

impl Candidates {
    fn new(
        endpoints: Vec<Arc<EndpointState>>,
        weights: &[u32],
        floor: Option<Arc<Floor>>,
        bounds: Arc<Bounds>,
        now: Duration,
    ) -> Self {
        let differ = weights.windows(2).any(|pair| pair[0] != pair[1]);
        let sums = weights.iter().scan(0, |sum, weight| {
            *sum += u64::from(*weight);
            Some(*sum)
        });
        let shares = differ.then(|| sums.collect());
        let vitals: Arc<[_]> = endpoints.iter().map(|endpoint| Arc::clone(&endpoint.vitals)).collect();
        if let Some(floor) = &floor {
            floor.follow(Arc::clone(&vitals), now);
        }
        Self { endpoints, vitals, floor, shares, bounds }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }
}

impl Route {
    fn mesh(target: Target, destination: Arc<Destination>, endpoints: &Endpoints, budget: Arc<Budget>) -> Self {
        let clusters = destination.clusters.iter().map(|(name, cluster)| {
            let service = Some((cluster.service.clone(), destination.trust_domain.clone()));
            let all = cluster.endpoints.iter().map(|endpoint| {
                let place = Place::Address(endpoint.address);
                endpoints.at(place, endpoint.transport.clone(), service.clone(), Some(name))
            });
            let weights: Vec<u32> = cluster.endpoints.iter().map(|endpoint| endpoint.standing.weight).collect();
            let bounds = endpoints.bounds(Bounded::Service(cluster.service.clone()));
            bounds.limits.follow(cluster.policy.connection_pool.as_ref());
            let (floor, now) = (Some(endpoints.floor(name)), endpoints.epoch.elapsed());
            (name.clone(), Candidates::new(all.collect(), &weights, floor, bounds, now))
        });
        let clusters = clusters.collect();
        let index = Index::new(&destination.rules);
        Self { target, index, clusters, destination: Some(destination), elsewhere: Candidates::default(), budget }
    }

    fn elsewhere(target: Target, endpoints: &Endpoints) -> Self {
        let place = target.address().map_or_else(|| Place::Name(target.clone()), Place::Address);
        let endpoint = endpoints.at(place, Transport::Plain, None, None);
        let bounds = Arc::clone(&endpoint.bounds);
        let elsewhere = Candidates::new(vec![endpoint], &[1], None, bounds, Duration::ZERO);
        Self {
            target,
            destination: None,
            index: Index::default(),
            clusters: BTreeMap::new(),
            elsewhere,
            budget: Arc::default(),
        }
    }

    /// What the control plane says of it; `None` outside the mesh.
    pub fn destination(&self) -> Option<&Arc<Destination>> {
        self.destination.as_ref()
    }

    /// What leads here.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The rule that takes a request, if one does, and the endpoints that may answer it.
    pub fn choose(&self, head: &request::Parts) -> (Option<&Rule>, &Candidates) {
        let Some(destination) = &self.destination else { return (None, &self.elsewhere) };
        let chosen = policy::choose(destination, &self.index, head, rand::random());
        (chosen.rule, self.of(chosen.cluster))
    }

    /// The endpoints of an opaque connection.
    pub fn opaque(&self) -> &Candidates {
        self.destination.as_ref().map_or(&self.elsewhere, |destination| self.of(&destination.default_cluster))
    }

    /// Those of a cluster. Of the mesh, and therefore never elsewhere: that is empty here.
    fn of(&self, cluster: &ClusterName) -> &Candidates {
        self.clusters.get(cluster).unwrap_or(&self.elsewhere)
    }

    /// Picks one of those that may answer, another one than `tried` where there is another. A request that may be sent
    /// again may be the one that tries an ejected endpoint. `now` is the time on the endpoints' clock.
    pub fn pick(
        &self,
        candidates: &Candidates,
        tried: Option<&Arc<EndpointState>>,
        retryable: bool,
        now: Duration,
    ) -> Result<Lease, Error> {
        let Candidates { endpoints, vitals, floor, shares, .. } = candidates;
        let excluded = tried.and_then(|tried| endpoints.iter().position(|endpoint| Arc::ptr_eq(endpoint, tried)));
        let balance = |bits, chance| {
            let cost = |at: usize| vitals.get(at).map_or(f64::INFINITY, |vitals| vitals.cost(chance, now));
            match shares {
                None => balance::pick(endpoints.len(), excluded, bits, cost),
                Some(shares) => balance::pick_weighted(shares, excluded, bits, cost),
            }
        };
        let picked = match floor {
            Some(floor) => floor.pick(vitals, retryable && tried.is_none(), now, rand::random, balance),
            None => balance(rand::random(), 1.0).map(|at| Picked { at, probe: false }),
        };
        let found = picked.and_then(|picked| Some((picked, Arc::clone(endpoints.get(picked.at)?))));
        let (picked, endpoint) = found.ok_or_else(|| Error::NoEndpoint(self.target.to_string()))?;
        Ok(Lease::of(endpoint, picked, now))
    }
}

/// The routes of one worker. The lock is never contended: one thread uses it.
#[derive(Default)]
pub struct Routes {
    known: Mutex<HashMap<Target, Arc<Route>>>,
}

/// Routes that carry nothing go when there are this many.
const MOST: usize = 4_096;

/// Makes room for one more: what leads outside the mesh goes first. What carries requests stays, since its budget counts
/// them, and however many those are, they are bounded.
fn make_room(known: &mut HashMap<Target, Arc<Route>>) {
    let busy = |route: &Arc<Route>| Arc::strong_count(route) > 1 || route.budget.in_flight() > 0;
    if known.len() >= MOST {
        known.retain(|_, route| route.destination.is_some() || busy(route));
    }
    if known.len() >= MOST {
        known.retain(|_, route| busy(route));
    }
}

impl Routes {
    /// The route to a target of which nothing new was heard since it was made; the usual case, and waits for nothing.
    pub fn known(&self, target: &Target, discovery: &Discovery, deny_unknown: bool) -> Option<Arc<Route>> {
        let resolution = discovery.lookup(target)?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let route = known.get(target)?;
        let holds = match (&resolution, &route.destination) {
            (Resolution::Mesh(now), Some(then)) => Arc::ptr_eq(now, then),
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
        endpoints: &Endpoints,
        deny_unknown: bool,
        telemetry: &Telemetry,
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
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let old = known.get(target);
        let route = match resolution {
            Resolution::NotMesh if deny_unknown => return Err(Error::NotAllowed(target.clone())),
            Resolution::NotMesh => match old.filter(|route| route.destination.is_none()) {
                Some(route) => return Ok(Arc::clone(route)),
                None => Route::elsewhere(target.clone(), endpoints),
            },
            Resolution::Mesh(destination) => match old {
                Some(route) if route.destination.as_ref().is_some_and(|d| Arc::ptr_eq(d, &destination)) => {
                    return Ok(Arc::clone(route));
                }
                old => {
                    let budget = old.map(|route| Arc::clone(&route.budget)).unwrap_or_default();
                    Route::mesh(target.clone(), destination, endpoints, budget)
                }
            },
        };
        make_room(&mut known);
        let route = Arc::new(route);
        known.insert(target.clone(), Arc::clone(&route));
        Ok(route)
    }

    fn led_elsewhere(&self, target: &Target) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
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
            let route = Route::mesh(target.clone(), Arc::clone(&destination), &Endpoints::default(), Arc::default());
            known.insert(target, Arc::new(route));
        }
    }

    #[test]
    fn what_carries_requests_keeps_its_budget_however_many_targets_come() {
        let mut known = many();
        let budget = Arc::clone(&known[&target(7)].budget);
        budget.begin(Duration::ZERO);
        let held = Arc::clone(&known[&target(8)]);
        make_room(&mut known);
        assert_eq!(known.len(), 2);
        assert!(Arc::ptr_eq(&known[&target(7)].budget, &budget));
        assert!(Arc::ptr_eq(&known[&target(8)], &held));
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
