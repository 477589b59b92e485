//! Routes are made anew ahead of the requests that need them: apart from those, on a thread that rests often, and put in
//! their place by the worker whose they are. A request takes what is there.

use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{Cluster, Destination, Resolution, Target};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{Route, Routes};
use crate::upstream::Endpoints;

/// How long routes are made at a stretch, and the rest after it: a worker that has to share its core with that waits no
/// longer for it, and whatever is said is in force after one and a half times the work.
const BURST: Duration = Duration::from_micros(200);
const REST: Duration = Duration::from_micros(100);

/// How often it is looked for what nobody uses any more, and how soon after something was replaced.
const TIDY: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_secs(1);

/// A route and its successor.
type Renewed = (Arc<Route>, Arc<Route>);

impl Routes {
    /// Keeps the routes to the mesh as the control plane has them. Ends with the worker, or with discovery.
    pub async fn follow(self: Arc<Self>, discovery: Discovery, endpoints: Arc<Endpoints>) {
        let mut changes = discovery.subscribe();
        // What requests may still hold: the last of them is not to be who takes a route apart.
        let mut replaced = Vec::new();
        loop {
            let (sender, mut renewed) = mpsc::unbounded_channel();
            let known = self.in_mesh();
            let job = (discovery.clone(), Arc::clone(&endpoints), mem::take(&mut replaced));
            let renewing = spawn_blocking(move || {
                let (discovery, endpoints, mut replaced) = job;
                renew(known, &discovery, &endpoints, &sender);
                drop(sender);
                replaced.retain(|route: &Arc<Route>| Arc::strong_count(route) > 1);
                endpoints.sweep();
                replaced
            });
            while let Some(mut batch) = renewed.recv().await {
                self.put(&mut batch);
                replaced.extend(batch.into_iter().map(|(_, replaced)| replaced));
            }
            let pause = if replaced.is_empty() { TIDY } else { SOON };
            match renewing.await {
                Ok(still_held) => replaced.extend(still_held),
                // The worker ends.
                Err(error) if error.is_cancelled() => return,
                Err(error) => {
                    tracing::error!(%error, "routes are made ready by the requests that need them, this time")
                }
            }
            if let Ok(Err(_ended)) = timeout(pause, changes.changed()).await {
                return;
            }
        }
    }

    fn in_mesh(&self) -> Vec<Arc<Route>> {
        self.lock().values().filter(|route| route.destination.is_some()).cloned().collect()
    }

    /// Puts each successor in its place, unless something else is there by now. Leaves what is of no use any more.
    fn put(&self, batch: &mut [Renewed]) {
        let mut known = self.lock();
        for (old, new) in batch {
            if let Some(place) = known.get_mut(&old.target).filter(|place| Arc::ptr_eq(place, old)) {
                mem::swap(place, new);
            }
        }
    }
}

/// Makes anew what is not as the control plane has it, a few at a time.
fn renew(
    known: Vec<Arc<Route>>,
    discovery: &Discovery,
    endpoints: &Endpoints,
    renewed: &mpsc::UnboundedSender<Vec<Renewed>>,
) {
    let stale: Vec<_> = known.into_iter().filter(|route| successor(route, discovery).is_some()).collect();
    let (mut batch, mut begun) = (Vec::new(), Instant::now());
    for old in stale {
        // What is said last counts, and that may be that there is no such thing any more.
        let Some(destination) = successor(&old, discovery) else { continue };
        let target = old.target.clone();
        let current = is_current(discovery.clone(), target.clone());
        let new = Route::mesh(target, destination, endpoints, Some(&old), current);
        batch.push((old, Arc::new(new)));
        if begun.elapsed() >= BURST {
            // Fails only when nobody routes any more.
            let _ = renewed.send(mem::take(&mut batch));
            thread::sleep(REST);
            begun = Instant::now();
        }
    }
    let _ = renewed.send(batch);
}

/// What a route is to lead to, if that is another than it does.
fn successor(route: &Route, discovery: &Discovery) -> Option<Arc<Destination>> {
    match discovery.snapshot().peek(&route.target)? {
        Resolution::Mesh(now) => (!route.leads_to(now)).then(|| Arc::clone(now)),
        Resolution::NotMesh => None,
    }
}

/// Whether nothing newer was heard of a cluster meanwhile.
pub(super) fn is_current(discovery: Discovery, target: Target) -> impl Fn(&Arc<Cluster>) -> bool {
    move |cluster| match discovery.snapshot().peek(&target) {
        Some(Resolution::Mesh(now)) => now.clusters.get(&cluster.name).is_some_and(|now| Arc::ptr_eq(now, cluster)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sheetbend_control_plane_client::model::ServiceName;
    use tokio::task::yield_now;
    use tokio::time::{advance, timeout};

    use super::*;
    use crate::route::{HELD, LARGE};
    use crate::telemetry::{AccessLogSettings, Settings, Telemetry};

    /// A worker's thread, as far as it routes.
    struct Worker {
        routes: Arc<Routes>,
        discovery: Discovery,
        endpoints: Arc<Endpoints>,
        telemetry: Arc<Telemetry>,
    }

    impl Worker {
        fn told() -> (Self, impl Fn(Vec<(Target, Resolution)>)) {
            let (discovery, tell) = Discovery::told();
            let telemetry = Telemetry::new(Settings {
                identity: "spiffe://cluster.local/ns/default/sa/caller".parse().unwrap(),
                service: ServiceName { service: "caller".into(), namespace: "default".into() },
                access_log: AccessLogSettings::default(),
            });
            (Self { routes: Arc::default(), discovery, endpoints: Arc::default(), telemetry }, tell)
        }

        fn follow(&self) {
            tokio::spawn(Arc::clone(&self.routes).follow(self.discovery.clone(), Arc::clone(&self.endpoints)));
        }

        async fn ask(&self, target: &Target) -> Arc<Route> {
            match self.routes.known(target, &self.discovery, false) {
                Some(known) => known,
                None => self.routes.to(target, &self.discovery, &self.endpoints, false, &self.telemetry).await.unwrap(),
            }
        }
    }

    fn target(n: usize) -> Target {
        Target::new(&format!("web-{n}.example"), 80).unwrap()
    }

    /// `web-N` with so many endpoints, of which the last is at that port.
    fn web(n: usize, endpoints: u16, port: u16) -> (Target, Resolution) {
        let endpoint = |at: u16| serde_json::json!({ "address": format!("127.0.0.1:{at}"), "transport": "plain" });
        let (name, service) = (format!("web-{n}.default:80"), format!("web-{n}"));
        let service = serde_json::json!({ "service": { "service": service, "namespace": "default" }, "port": 80 });
        let endpoints: Vec<_> = (port + 1 - endpoints..=port).map(endpoint).collect();
        let cluster = serde_json::json!({ "name": name, "service": service, "endpoints": endpoints });
        let destination = serde_json::json!({
            "name": service, "trust_domain": "cluster.local", "default_cluster": name, "clusters": { &name: cluster },
        });
        (target(n), Resolution::Mesh(Arc::new(serde_json::from_value(destination).unwrap())))
    }

    /// Where the last of its endpoints is.
    fn leads_to(route: &Route) -> Option<u16> {
        let candidates = route.opaque(None).ok()?;
        candidates.endpoints().last()?.socket_address().map(|address| address.port())
    }

    fn is_made_here(route: &Route) -> bool {
        route.made_by == thread::current().id()
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_said_anew_is_made_ready_by_another_thread_and_then_taken_by_every_request() {
        const SERVICES: usize = 200;
        let (worker, tell) = Worker::told();
        let all = |port| (0..SERVICES).map(|n| web(n, 3, port)).collect::<Vec<_>>();
        tell(all(8_001));
        for n in 0..SERVICES {
            let first = worker.ask(&target(n)).await;
            assert!(is_made_here(&first), "nobody else knows of it before it is asked for");
        }
        worker.follow();
        let kept = worker.ask(&target(7)).await;
        tell(all(8_002));
        // The clock stands still: nobody tires of waiting, however slow the machine is.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut new = 0;
            for n in 0..SERVICES {
                let route = worker.ask(&target(n)).await;
                assert_eq!(is_made_here(&route), leads_to(&route) == Some(8_001));
                new += usize::from(leads_to(&route) == Some(8_002));
                yield_now().await;
            }
            if new == SERVICES {
                break;
            }
            assert!(Instant::now() < deadline, "every route is made anew");
        }
        assert_eq!(leads_to(&kept), Some(8_001), "a request under way goes on where it began");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_makes_a_route_itself_when_its_successor_does_not_come() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, 1, 8_001)]);
        let first = worker.ask(&target(1)).await;
        tell(vec![web(1, 1, 8_002)]);
        let meanwhile = worker.ask(&target(1)).await;
        assert!(Arc::ptr_eq(&first, &meanwhile));
        advance(HELD - Duration::from_millis(1)).await;
        assert!(Arc::ptr_eq(&first, &worker.ask(&target(1)).await));
        advance(Duration::from_millis(1)).await;
        assert_eq!(leads_to(&*worker.ask(&target(1)).await), Some(8_002));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_a_while_ago_holds_for_the_first_who_asks_whatever_was_said_of_others_since() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, 1, 8_001)]);
        assert_eq!(leads_to(&*worker.ask(&target(1)).await), Some(8_001));
        let changed = web(1, 1, 8_002);
        tell(vec![changed.clone()]);
        advance(HELD - Duration::from_millis(1)).await;
        tell(vec![changed, web(2, 1, 8_001)]);
        advance(Duration::from_millis(1)).await;
        assert_eq!(leads_to(&*worker.ask(&target(1)).await), Some(8_002));
    }

    #[tokio::test]
    async fn a_destination_that_is_gone_from_the_mesh_is_gone_for_the_next_request() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, 1, 8_001), web(2, 1, 8_001)]);
        for n in [1, 2] {
            assert!(worker.ask(&target(n)).await.destination().is_some());
        }
        worker.follow();
        tell(vec![(target(1), Resolution::NotMesh), web(2, 1, 8_002)]);
        assert!(worker.ask(&target(1)).await.destination().is_none());
        let settled = async {
            while leads_to(&*worker.ask(&target(2)).await) != Some(8_002) {
                yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), settled).await.expect("the other one is made anew");
        assert!(worker.ask(&target(1)).await.destination().is_none(), "no successor comes in its place");
    }

    #[tokio::test]
    async fn a_successor_that_was_overtaken_comes_to_nothing() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, 1, 8_001)]);
        let old = worker.ask(&target(1)).await;
        let late = |worker: &Worker| {
            let Some(Resolution::Mesh(now)) = worker.discovery.lookup(&target(1)) else { panic!("of the mesh") };
            Arc::new(Route::mesh(target(1), now, &worker.endpoints, Some(&old), |_| true))
        };
        tell(vec![web(1, 1, 8_002)]);
        let overtaken = late(&worker);
        tell(vec![(target(1), Resolution::NotMesh)]);
        worker.ask(&target(1)).await;
        worker.routes.put(&mut [(Arc::clone(&old), overtaken)]);
        assert!(worker.routes.in_mesh().is_empty());
        assert!(worker.ask(&target(1)).await.destination().is_none());
    }

    #[tokio::test]
    async fn a_large_destination_is_made_ready_aside_and_once_however_many_ask_for_it_first() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, LARGE as u16 + 1, 8_001)]);
        let (at, other) = (target(1), target(1));
        let (one, two) = tokio::join!(worker.ask(&at), worker.ask(&other));
        assert!(Arc::ptr_eq(&one, &two) && !is_made_here(&one));
    }

    #[tokio::test]
    async fn an_endpoint_is_ejected_on_its_new_route_as_on_the_old_one() {
        let (worker, tell) = Worker::told();
        tell(vec![web(1, 3, 8_003)]);
        let old = worker.ask(&target(1)).await;
        let ejected = Arc::clone(&old.opaque(None).ok().unwrap().endpoints()[2]);
        ejected.eject(Duration::from_secs(60)).unwrap();
        worker.follow();
        tell(vec![web(1, 3, 8_004)]);
        let settled = async {
            loop {
                let route = worker.ask(&target(1)).await;
                if leads_to(&route) == Some(8_004) {
                    return route;
                }
                yield_now().await;
            }
        };
        let new = timeout(Duration::from_secs(20), settled).await.expect("it is made anew");
        let same = Arc::clone(&new.opaque(None).ok().unwrap().endpoints()[1]);
        assert!(Arc::ptr_eq(&same, &ejected));
        assert_eq!(crate::breakers::name(same.vitals.state()), crate::breakers::name(ejected.vitals.state()));
    }
}
