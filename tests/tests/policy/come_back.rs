//! Servers that hang, reset, fail and slow down, and come back, each behind a real sidecar of its own: what the simulation
//! promises, as far as a busy machine shows it.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde_json::Value;
use sheetbend_tests::{Load, Mesh, Mood, Moody, START, Sidecar, breaker, eventually, http};
use tokio::task::JoinSet;

/// What hangs is noticed where a route says how long an attempt may take: long enough for a busy machine. All else is as it
/// is without a policy.
const RESOURCES: &str = "apiVersion: v1
kind: Service
metadata: {name: web}
spec: {ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web}
spec:
  parentRefs: [{kind: Service, group: '', name: web}]
  rules:
  - backendRefs: [{name: web, port: 80}]
    timeouts: {backendRequest: 2s}
";

/// Instances of one service, each a server behind its own sidecar, and one who calls them.
struct Story<const N: usize> {
    servers: [Moody; N],
    /// By which `/breakers` knows them.
    places: Vec<SocketAddr>,
    caller: Sidecar,
    _sidecars: Vec<Sidecar>,
    _mesh: Mesh,
}

impl<const N: usize> Story<N> {
    async fn start() -> Self {
        let servers = Moody::some::<N>().await;
        let mesh = Mesh::with_resources(RESOURCES, &[]);
        let beside = |server: &Moody| {
            mesh.run("web").flag(&["--strict", "--port", &format!("{}:80", server.address.port())]).serve()
        };
        let sidecars: Vec<Sidecar> = servers.iter().map(beside).collect();
        let places = sidecars.iter().map(Sidecar::inbound).collect();
        let caller = mesh.caller("caller");
        caller.first_answer("http://web/").await;
        Self { servers, places, caller, _sidecars: sidecars, _mesh: mesh }
    }

    async fn breaker(&self, at: usize) -> Value {
        breaker(&self.caller, self.places[at]).await
    }

    async fn becomes(&self, at: usize, state: &str) -> Value {
        sheetbend_tests::becomes(&self.caller, self.places[at], state).await
    }

    /// Clients that ask again and again, once everybody is known and has been asked.
    async fn load(&self, clients: u32, rate: f64) -> Load {
        let load = Load::start(self.caller.proxy(), "http://web/", clients, rate);
        for at in 0..N {
            self.becomes(at, "Serving").await;
        }
        eventually("all are asked", START, || async {
            self.servers.iter().all(|server| server.seen() > 0).then_some(())
        })
        .await;
        load
    }

    /// How many requests each gets of some hundred.
    async fn next(&self, load: &Load, hundreds: usize) -> [u64; N] {
        let (before, good) = (self.seen(), load.so_far().good.len());
        eventually("more answers", START, || async {
            (load.so_far().good.len() >= good + hundreds * 100).then_some(())
        })
        .await;
        let after = self.seen();
        std::array::from_fn(|at| after[at] - before[at])
    }

    fn seen(&self) -> [u64; N] {
        self.servers.each_ref().map(Moody::seen)
    }

    /// Waits until, of a hundred requests, one gets a share like this.
    async fn share(&self, load: &Load, at: usize, what: &str, like: impl Fn(u64, u64) -> bool) {
        let deadline = tokio::time::Instant::now() + START;
        loop {
            let asked = self.next(load, 1).await;
            if like(asked[at], asked.iter().sum()) {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "it never {what}: {asked:?} lately");
        }
    }
}

/// How often it was ejected, of the turns that are remembered.
fn ejections(said: &Value) -> usize {
    said["history"].as_array().into_iter().flatten().filter(|turn| turn["state"] == "Ejected").count()
}

/// One in a thousand may be unlucky, and one on a machine that is busy.
fn hardly_any_failed(good: usize, failed: &[(Duration, String)]) {
    let all = good + failed.len();
    assert!(failed.len() <= 1 + all / 1_000, "{} of {all} failed: {failed:#?}", failed.len());
}

/// One of five fares ill until it is ejected, and has its usual share soon after it is well.
async fn one_of_five(mood: Mood) {
    let story = Story::<5>::start().await;
    let load = story.load(8, 12.5).await;
    story.servers[0].becomes(mood);
    let ejected = story.becomes(0, "Ejected").await;
    assert!(ejected["reason"].is_string() && ejected["next_probe"].is_string(), "{ejected:#}");
    let asked = story.next(&load, 3).await;
    assert!(asked[0] * 20 <= asked.iter().sum(), "it is tried by one at a time: {asked:?}");
    let ill = story.breaker(0).await;
    assert!(ill["state"] == "Ejected" || ill["state"] == "Probing", "{ill:#}");
    for other in 1..5 {
        let said = story.breaker(other).await;
        assert_eq!(said["state"], "Serving", "{said:#}");
    }

    // Right after a turn, so that the history below begins with it.
    let before = story.becomes(0, "Ejected").await;
    story.servers[0].becomes(Mood::Well);
    // Nobody rushes to it.
    let asked = story.next(&load, 1).await;
    assert!(asked[0] * 2 <= asked.iter().sum(), "{asked:?}");
    let well = story.becomes(0, "Serving").await;
    // The ejection that was under way, and one more at most, if it was being tried at that moment.
    assert!(ejections(&well) <= ejections(&before) + 1, "{before:#}{well:#}");
    story.share(&load, 0, "gets half its usual share", |its, all| its * 10 >= all).await;
    let tally = load.stop().await;
    hardly_any_failed(tally.good.len(), &tally.failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_five_that_resets_is_ejected_and_has_its_share_again_once_it_is_well() {
    one_of_five(Mood::Resets).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_five_that_hangs_is_ejected_and_has_its_share_again_once_it_is_well() {
    one_of_five(Mood::Hangs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_five_that_fails_is_ejected_and_has_its_share_again_once_it_is_well() {
    one_of_five(Mood::Fails).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_that_is_ten_times_slower_is_asked_seldom_not_ejected_and_has_its_share_again_once_it_is_not() {
    const USUAL: Mood = Mood::Slow(Duration::from_millis(30));
    let story = Story::<3>::start().await;
    story.servers.iter().for_each(|server| server.becomes(USUAL));
    let load = story.load(8, 8.0).await;
    story.servers[0].becomes(Mood::Slow(Duration::from_millis(300)));
    story.share(&load, 0, "gets less than a tenth", |its, all| its * 10 <= all).await;
    let asked = story.next(&load, 3).await;
    assert!(asked[0] * 6 <= asked.iter().sum(), "half of its usual share: {asked:?}");
    // Slow is not ill.
    let said = story.breaker(0).await;
    assert_eq!((&said["state"], ejections(&said)), (&"Serving".into(), 0), "{said:#}");
    story.servers[0].becomes(USUAL);
    story.share(&load, 0, "gets half its usual share", |its, all| its * 6 >= all).await;
    let tally = load.stop().await;
    hardly_any_failed(tally.good.len(), &tally.failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_post_is_sent_twice_whatever_becomes_of_it() {
    let story = Story::<5>::start().await;
    let (stop, sent, failed) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let (stop, sent, failed, proxy) = (stop.clone(), sent.clone(), failed.clone(), story.caller.proxy());
        clients.spawn(async move {
            while !stop.load(Relaxed) {
                let url = format!("http://web/order-{}", sent.fetch_add(1, Relaxed));
                let answer = http::send(proxy, "POST", &url, "one").await;
                failed.fetch_add(u64::from(!answer.is_ok_and(|answer| answer.status.is_success())), Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    for at in 0..5 {
        story.becomes(at, "Serving").await;
    }
    for (at, mood) in [(0, Mood::Resets), (1, Mood::Hangs)] {
        story.servers[at].becomes(mood);
        story.becomes(at, "Ejected").await;
        story.servers[at].becomes(Mood::Well);
        story.becomes(at, "Serving").await;
    }
    stop.store(true, Relaxed);
    while clients.join_next().await.is_some() {}

    // It takes five failures of twenty requests to be ejected, or seven in a row, and each was told to its caller.
    assert!(failed.load(Relaxed) >= 10, "{failed:?}");
    let heard: Vec<String> = story.servers.iter().flat_map(Moody::posts).collect();
    let mut once = HashSet::new();
    let twice: Vec<_> = heard.iter().filter(|path| !once.insert(*path)).collect();
    assert!(twice.is_empty(), "{twice:?}");
    assert!(story.servers.iter().all(|server| !server.posts().is_empty()));
}
