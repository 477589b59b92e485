//! The endpoints of a cluster, ready for picks: which of them come first, how one is chosen, and who may not be.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};
use sheetbend_control_plane_client::model::{Cluster, ConsistentHash, HttpCookie, LoadBalancer, Standing};

use crate::telemetry::{Edge, Protocol, Telemetry};
use crate::traffic::balance::{Member, ring};
use crate::traffic::breaker::{Admitted, IsOpen};
use crate::traffic::choice::Choice;
use crate::traffic::outlier::{Detection, Floor, Outcome, Picked};
use crate::traffic::retry::Budget;
use crate::upstream::{Bounds, EndpointState};

/// Endpoints that may answer a request.
#[derive(Default)]
pub struct Candidates {
    endpoints: Arc<[Arc<EndpointState>]>,
    choice: Choice,
    /// Who of them is ejected; nobody outside the mesh.
    floor: Option<Arc<Floor>>,
    hash: Option<ConsistentHash>,
    /// How much may be under way to all of them.
    pub bounds: Arc<Bounds>,
    /// How many retries there may be, of all workers together.
    pub budget: Arc<Budget>,
    /// What they were made of.
    cluster: Option<Arc<Cluster>>,
}

/// What a caller is known by, where it keeps its endpoint.
#[derive(Debug, Default, Clone)]
pub struct Caller {
    /// Its place on the ring.
    hash: Option<u64>,
    /// A cookie that the caller is to know it by from now on.
    pub cookie: Option<Box<HeaderValue>>,
}

impl Candidates {
    /// Those of a cluster, in its order, for a caller in `zone`.
    pub(super) fn new(
        cluster: &Arc<Cluster>,
        endpoints: Vec<Arc<EndpointState>>,
        floor: Arc<Floor>,
        (bounds, budget): (Arc<Bounds>, Arc<Budget>),
        zone: &str,
    ) -> Self {
        let usual = LoadBalancer::default();
        let policy = cluster.policy.load_balancer.as_ref().unwrap_or(&usual);
        let prefers = policy.locality_lb_setting.as_ref().is_some_and(|setting| setting.enabled.unwrap_or(true));
        let levels = levels(cluster.endpoints.iter().map(|endpoint| &endpoint.standing), zone, prefers);
        let mut members: Vec<Vec<Member>> = Vec::new();
        for (endpoint, (level, number)) in cluster.endpoints.iter().zip(levels.zip(0..)) {
            if members.len() <= level {
                members.resize_with(level + 1, Vec::new);
            }
            members[level].push(Member { number, address: endpoint.address, weight: endpoint.standing.weight });
        }
        let vitals = endpoints.iter().map(|endpoint| Arc::clone(&endpoint.vitals)).collect();
        Self {
            endpoints: endpoints.into(),
            choice: Choice::new(vitals, members, policy, rand::random),
            floor: Some(floor),
            hash: policy.consistent_hash.clone(),
            bounds,
            budget,
            cluster: Some(Arc::clone(cluster)),
        }
    }

    /// Lets its floor know of them, and how they are judged, if that is the newest that was heard of them.
    pub(super) fn follow(&self, cluster: &Cluster, now: Duration, is_current: impl FnOnce() -> bool) {
        let Some(floor) = &self.floor else { return };
        let detection = cluster.policy.outlier_detection.as_ref().map_or(Detection::DEFAULT, Detection::of);
        floor.follow(self.choice.vitals(), &detection, now, || {
            let current = is_current();
            if current {
                floor.breaker.follow(cluster.policy.circuit_breaker.as_ref());
            }
            current
        });
    }

    /// Whether their breaker lets a request pass, and as what.
    pub(super) fn admit(&self, now: Duration) -> Result<Option<Admitted>, IsOpen> {
        self.floor.as_ref().map_or(Ok(None), |floor| floor.breaker.admit(now))
    }

    /// A request that might have passed is not sent.
    pub(super) fn forgo(&self, admitted: Option<Admitted>, now: Duration) {
        if let (Some(floor), Some(admitted)) = (&self.floor, admitted) {
            floor.breaker.report(admitted, Outcome::Unknown, now);
        }
    }

    /// One alone, which nobody ejects.
    pub(super) fn alone(endpoint: Arc<EndpointState>, budget: Arc<Budget>) -> Self {
        let bounds = Arc::clone(&endpoint.bounds);
        Self { endpoints: [endpoint].into(), bounds, budget, ..Self::default() }
    }

    /// Whether nothing was said of the cluster since they were made of it.
    pub(super) fn are_of(&self, cluster: &Arc<Cluster>) -> bool {
        self.cluster.as_ref().is_some_and(|ours| Arc::ptr_eq(ours, cluster))
    }

    pub(super) fn endpoints(&self) -> &Arc<[Arc<EndpointState>]> {
        &self.endpoints
    }

    /// Where a request counts that comes to nobody.
    pub fn edge(&self, telemetry: &Telemetry, protocol: Protocol) -> Option<Arc<Edge>> {
        self.endpoints.first().map(|endpoint| Arc::clone(endpoint.edge(telemetry, protocol)))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// Who they are and how they stand, for `/explain`; of very many the first few.
    #[cold]
    pub fn as_json(&self, now: Duration) -> Value {
        const SHOWN: usize = 16;
        let one = |(at, endpoint): (usize, &Arc<EndpointState>)| {
            let cost = self.choice.load(at, 0.0, now).map(|load| load.cost(now) / 1e6);
            json!({
                "endpoint": endpoint.place.to_string(),
                "state": crate::breakers::name(endpoint.vitals.state()),
                // Expected milliseconds times requests, with one more; nothing where it may not be picked.
                "score": cost.map(|cost| (cost * 100.0).round() / 100.0),
            })
        };
        let shown: Vec<Value> = self.endpoints.iter().enumerate().take(SHOWN).map(one).collect();
        json!({ "total": self.len(), "endpoints": shown })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }

    /// The place of the caller of a request, or of an opaque connection, which has no headers.
    pub fn caller(&self, headers: Option<&HeaderMap>, peer: SocketAddr) -> Caller {
        let Some(hash) = &self.hash else { return Caller::default() };
        let known = |key: &[u8]| Caller { hash: Some(ring::hash(key)), cookie: None };
        if hash.use_source_ip == Some(true) {
            return match peer.ip().to_canonical() {
                std::net::IpAddr::V4(ip) => known(&ip.octets()),
                std::net::IpAddr::V6(ip) => known(&ip.octets()),
            };
        }
        let Some(headers) = headers else { return Caller::default() };
        if let Some(name) = &hash.http_header_name {
            return headers.get(&**name).map_or_else(Caller::default, |value| known(value.as_bytes()));
        }
        let Some(cookie) = &hash.http_cookie else { return Caller::default() };
        match cookie_of(headers, &cookie.name) {
            Some(value) => known(value),
            None => new_cookie(cookie).unwrap_or_default(),
        }
    }

    /// Picks one, another one than those `tried` where there is another. `probes` says whether the request may be the one
    /// that tries an ejected endpoint.
    pub(super) fn pick(
        &self,
        caller: &Caller,
        tried: &[Arc<EndpointState>],
        probes: bool,
        now: Duration,
    ) -> Option<(Picked, Arc<EndpointState>)> {
        let was_tried = |at: usize| {
            let endpoint = self.endpoints.get(at);
            endpoint.is_some_and(|one| tried.iter().any(|tried| Arc::ptr_eq(&tried.vitals, &one.vitals)))
        };
        let choose = || self.choice.pick(caller.hash, was_tried, now, rand::random);
        let picked = match &self.floor {
            Some(floor) => floor.pick(self.choice.vitals(), probes, now, choose),
            None => (!self.is_empty()).then_some(Picked { at: 0, probe: false }),
        }?;
        Some((picked, Arc::clone(self.endpoints.get(picked.at)?)))
    }
}

/// The level of each endpoint: by priority, and within one by whether it is in the caller's zone, where that counts.
/// Numbered without a gap.
fn levels<'a>(
    standings: impl Iterator<Item = &'a Standing> + Clone,
    zone: &str,
    prefers: bool,
) -> impl Iterator<Item = usize> {
    let prefers = prefers && !zone.is_empty();
    let rank = move |standing: &Standing| (standing.priority, prefers && *standing.zone != *zone);
    let mut ranks: Vec<(u32, bool)> = standings.clone().map(rank).collect();
    let of_each = ranks.clone();
    ranks.sort_unstable();
    ranks.dedup();
    of_each.into_iter().map(move |rank| ranks.binary_search(&rank).unwrap_or_default())
}

/// A cookie's value (RFC 6265 §5.4).
fn cookie_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    let pairs = headers.get_all(header::COOKIE).into_iter().flat_map(|line| line.as_bytes().split(|b| *b == b';'));
    let value = |pair: &'a [u8]| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"=");
    pairs.into_iter().find_map(value).filter(|value| !value.is_empty())
}

/// One for a caller that has none. Allocates: once a caller.
fn new_cookie(cookie: &HttpCookie) -> Option<Caller> {
    let ttl = cookie.ttl?;
    let value = format!("{:016x}", rand::random::<u64>());
    let mut text = format!("{}={value}; HttpOnly", cookie.name);
    if !ttl.is_zero() {
        text.push_str(&format!("; Max-Age={}", ttl.as_secs().max(1)));
    }
    if let Some(path) = &cookie.path {
        text.push_str(&format!("; Path={path}"));
    }
    let set = HeaderValue::try_from(text).ok()?;
    Some(Caller { hash: Some(ring::hash(value.as_bytes())), cookie: Some(set.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(priority: u32, zone: &str) -> Standing {
        Standing { priority, zone: zone.into(), ..Standing::default() }
    }

    #[test]
    fn a_level_is_a_priority_and_within_it_ones_own_zone_comes_first() {
        let all = [of(0, "a"), of(0, "b"), of(2, "b"), of(2, "a"), of(0, "")];
        let levels = |zone, prefers| super::levels(all.iter(), zone, prefers).collect::<Vec<_>>();
        assert_eq!(levels("a", true), [0, 1, 3, 2, 1]);
        assert_eq!(levels("a", false), [0, 0, 1, 1, 0]);
        assert_eq!(levels("", true), [0, 0, 1, 1, 0]);
        assert_eq!(levels("c", true), [0, 0, 1, 1, 0]);
    }

    #[test]
    fn a_cookie_is_found_by_its_whole_name_in_any_line() {
        let mut headers = HeaderMap::new();
        headers.append(header::COOKIE, HeaderValue::from_static("xuser=1; theme=dark"));
        headers.append(header::COOKIE, HeaderValue::from_static("empty=; user=me"));
        assert_eq!(cookie_of(&headers, "user"), Some(&b"me"[..]));
        assert_eq!(cookie_of(&headers, "theme"), Some(&b"dark"[..]));
        assert_eq!(cookie_of(&headers, "empty"), None);
        assert_eq!(cookie_of(&headers, "use"), None);
    }

    #[test]
    fn a_cookie_is_set_only_where_its_ttl_says_so() {
        let cookie = HttpCookie { name: "user".into(), path: Some("/".into()), ttl: None };
        assert!(new_cookie(&cookie).is_none());
        let set = |seconds| {
            let ttl = Some(Duration::from_secs(seconds));
            let caller = new_cookie(&HttpCookie { ttl, ..cookie.clone() }).unwrap();
            caller.cookie.unwrap().to_str().unwrap().to_string()
        };
        assert!(set(0).starts_with("user=") && set(0).ends_with("; HttpOnly; Path=/"), "{}", set(0));
        assert!(set(60).contains("; Max-Age=60"), "{}", set(60));
    }
}
