//! The promise: a new snapshot of a thousand services with ten endpoints each is in force within 50 ms, and no request waits
//! for more than 1 ms because of it.
//!
//! A thread takes turns, as a worker does: whatever else there is to do for it, then a route for the next request. Meanwhile
//! another one puts a snapshot in place, until the last of the thousand routes leads where it says. What a turn takes is
//! measured by the clock and by the CPU time of its thread: a wait for a lock or for the system's scheduler counts by the
//! clock alone. As many turns are taken while nothing is said and another thread is as busy with nothing: what the slowest of
//! those take is the machine's doing, and no swap's.

use std::hint::{black_box, spin_loop};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use rustix::time::{ClockId, clock_gettime};
use sheetbend_control_plane_client::discovery::Discovery;
use sheetbend_control_plane_client::model::{
    Cluster, ClusterName, Destination, Endpoint, Resolution, ServiceName, ServicePort, Target, Transport,
};
use sheetbend_proxy::route::{Route, Routes};
use sheetbend_proxy::telemetry::Telemetry;
use sheetbend_proxy::upstream::Endpoints;
use tokio::task::yield_now;

const SERVICES: u16 = 1_000;

/// What one worker routes by.
struct Worker {
    routes: Arc<Routes>,
    discovery: Discovery,
    endpoints: Arc<Endpoints>,
    telemetry: Arc<Telemetry>,
}

/// The slowest of many turns.
#[derive(Default)]
struct Turns {
    count: u64,
    /// Slower ones than was promised, by the clock.
    late: u64,
    by_the_clock: Duration,
    on_the_cpu: Duration,
}

impl Turns {
    async fn take(&mut self, worker: &Worker, target: &Target) -> Arc<Route> {
        let (begun, cpu) = (Instant::now(), cpu_time());
        yield_now().await;
        let route = worker.route(target).await;
        let (on_the_cpu, by_the_clock) = (cpu_time() - cpu, begun.elapsed());
        self.count += 1;
        self.late += u64::from(by_the_clock > Duration::from_millis(1));
        self.by_the_clock = self.by_the_clock.max(by_the_clock);
        self.on_the_cpu = self.on_the_cpu.max(on_the_cpu);
        black_box(route)
    }
}

impl std::fmt::Display for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { count, late, by_the_clock, on_the_cpu } = self;
        write!(f, "{by_the_clock:?} by the clock, {on_the_cpu:?} on the CPU, {late} of {count} turns over 1 ms")
    }
}

impl Worker {
    async fn route(&self, target: &Target) -> Arc<Route> {
        match self.routes.known(target, &self.discovery, false) {
            Some(known) => known,
            None => {
                let asked = self.routes.to(target, &self.discovery, &self.endpoints, false, &self.telemetry).await;
                asked.unwrap_or_else(|error| panic!("no route to {target}: {error}"))
            }
        }
    }

    /// Takes turns until every route leads where the snapshot says.
    async fn settle(&self, all: &[(Target, Resolution)], turns: &mut Turns) {
        let mut left: Vec<_> = all.iter().collect();
        while !left.is_empty() {
            let mut old = Vec::with_capacity(left.len());
            for one @ (target, resolution) in left {
                let route = turns.take(self, target).await;
                let is_new =
                    matches!((resolution, route.destination()), (Resolution::Mesh(a), Some(b)) if Arc::ptr_eq(a, b));
                old.extend((!is_new).then_some(one));
            }
            left = old;
        }
    }
}

pub(crate) fn swapping(c: &mut Criterion) {
    let (discovery, tell) = Discovery::told();
    let worker = Worker { routes: Arc::default(), discovery, endpoints: Arc::default(), telemetry: super::telemetry() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let first = snapshot(1);
    tell(first.clone());
    runtime.block_on(worker.settle(&first, &mut Turns::default()));
    runtime.spawn(Arc::clone(&worker.routes).follow(worker.discovery.clone(), Arc::clone(&worker.endpoints)));

    let (mut version, mut slowest) = (1u8, Duration::ZERO);
    let (mut with, mut without) = (Turns::default(), Turns::default());
    let mut group = c.benchmark_group("snapshot");
    group.sample_size(10);
    group.bench_function("of 1,000 services with 10 endpoints", |b| {
        b.iter_custom(|rounds| {
            let mut all = Duration::ZERO;
            for _ in 0..rounds {
                version = if version == 1 { 2 } else { 1 };
                let next = snapshot(version);
                let said = next.clone();
                let took = std::thread::scope(|scope| {
                    let begun = Instant::now();
                    scope.spawn(|| tell(said));
                    runtime.block_on(worker.settle(&next, &mut with));
                    begun.elapsed()
                });
                (all, slowest) = (all + took, slowest.max(took));
                std::thread::scope(|scope| {
                    let begun = Instant::now();
                    let passed = move || begun.elapsed() >= took;
                    scope.spawn(move || {
                        while !passed() {
                            spin_loop();
                        }
                    });
                    runtime.block_on(async {
                        for (target, _) in next.iter().cycle().take_while(|_| !passed()) {
                            without.take(&worker, target).await;
                        }
                    });
                });
            }
            all
        });
    });
    println!("snapshot: the slowest of {} services was in force after {slowest:?}", SERVICES);
    println!("snapshot: the slowest turn with a swap: {with}");
    println!("snapshot: the slowest turn without one: {without}");
}

fn snapshot(version: u8) -> Vec<(Target, Resolution)> {
    let target = |n: u16| Target::new(&format!("web-{n}"), 80).expect("a target");
    (0..SERVICES).map(|n| (target(n), destination(n, version))).collect()
}

fn destination(n: u16, version: u8) -> Resolution {
    let service = ServiceName { service: format!("web-{n}").into(), namespace: "default".into() };
    let service = ServicePort { service, port: 80 };
    let endpoint = |m: u16| Endpoint {
        address: ([127, version, (n >> 8) as u8, n as u8], 8_000 + m).into(),
        transport: Transport::Plain,
        standing: Default::default(),
        workload: "".into(),
    };
    let name: ClusterName = service.to_string().into();
    let cluster = Cluster {
        name: name.clone(),
        service: service.clone(),
        endpoints: (0..10).map(endpoint).collect(),
        external: None,
        policy: Arc::default(),
    };
    Resolution::Mesh(Arc::new(Destination {
        name: service,
        trust_domain: "cluster.local".into(),
        protocol: Default::default(),
        rules: Vec::new(),
        connections: Vec::new(),
        default_cluster: name.clone(),
        clusters: [(name, Arc::new(cluster))].into(),
    }))
}

fn cpu_time() -> Duration {
    let passed = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(passed.tv_sec as u64, passed.tv_nsec as u32)
}
