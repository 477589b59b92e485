//! The whole of discovery in one thread, from one seed: a mesh that changes, a control plane that tells it truthfully
//! but in any order and with broken streams in between, and what the proxy makes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use proptest::prelude::*;

use super::MAX_TARGETS;
use super::state::{Full, State};
use crate::model::*;
use crate::xds::{Kind, encode};

/// Three services, each of which is a target, has routes, and may lead to any cluster of the three.
const SERVICES: [&str; 3] = ["a", "b", "c"];

/// What is true.
#[derive(Clone, Default)]
struct World {
    /// Which clusters each service leads to; a service that is not there is no part of the mesh.
    services: BTreeMap<&'static str, Vec<&'static str>>,
    /// How many endpoints each cluster has.
    endpoints: BTreeMap<&'static str, u8>,
}

#[derive(Clone, Debug)]
enum Step {
    Service(usize, Vec<usize>),
    NoService(usize),
    Endpoints(usize, u8),
    Want(usize),
    /// Some of what the control plane has to say arrives.
    Deliver(usize),
    /// The stream breaks, and another is opened.
    Reconnect,
    Sweep(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..SERVICES.len();
    prop_oneof![
        1 => (which.clone(), prop::collection::vec(which.clone(), 1..4)).prop_map(|(s, to)| Step::Service(s, to)),
        1 => which.clone().prop_map(Step::NoService),
        1 => (which.clone(), 0u8..3).prop_map(|(s, n)| Step::Endpoints(s, n)),
        3 => which.prop_map(Step::Want),
        4 => (1usize..6).prop_map(Step::Deliver),
        1 => Just(Step::Reconnect),
        1 => (1u64..700).prop_map(Step::Sweep),
    ]
}

impl World {
    fn cluster(&self, service: &str) -> Cluster {
        let endpoint = |n: u8| Endpoint {
            address: ([127, 0, 0, n + 1], 80).into(),
            transport: Transport::Plain,
            standing: Standing::default(),
            workload: service.into(),
        };
        let count = self.endpoints.get(service).copied().unwrap_or_default();
        Cluster {
            name: format!("{service}.default:80").into(),
            service: port(service),
            endpoints: (0..count).map(endpoint).collect(),
            external: None,
            policy: Arc::default(),
        }
    }

    fn destination(&self, service: &str) -> Option<Destination> {
        let leads_to = self.services.get(service)?;
        let clusters: BTreeMap<ClusterName, Arc<Cluster>> =
            leads_to.iter().map(|to| self.cluster(to)).map(|c| (c.name.clone(), Arc::new(c))).collect();
        let backends =
            clusters.keys().map(|name| Backend { cluster: name.clone(), weight: 1, headers: HeaderEdits::default() });
        Some(Destination {
            name: port(service),
            trust_domain: "cluster.local".into(),
            protocol: AppProtocol::Http,
            rules: vec![Rule {
                name: "default/r#0".into(),
                matches: vec![],
                backends: backends.collect(),
                policy: Arc::default(),
            }],
            connections: vec![],
            default_cluster: clusters.keys().next().unwrap().clone(),
            clusters,
        })
    }

    /// The truth about one name.
    fn resource(&self, kind: Kind, name: &str) -> Option<Resource> {
        let service = name.split(['.', ':']).next().unwrap();
        match kind {
            Kind::Listener => {
                let destination = self.destination(service)?;
                Some(encode::resource(name, service, encode::listener(&name.parse().ok()?, &destination)))
            }
            Kind::Routes => {
                let destination = self.destination(service)?;
                let version = encode::version(&destination.rules);
                Some(encode::resource(name, &version, encode::route_configuration(&destination)))
            }
            Kind::Cluster => {
                let encoded = encode::cluster(&self.cluster(service), "cluster.local", AppProtocol::Http);
                Some(encode::resource(name, "1", encoded))
            }
            Kind::Endpoints => {
                let cluster = self.cluster(service);
                let version = encode::version(&cluster);
                Some(encode::resource(name, &version, encode::load_assignment(&cluster)))
            }
            Kind::Secret => None,
        }
    }
}

/// One stream, seen from the control plane: what each subscribed name was last told.
#[derive(Default)]
struct Server {
    told: BTreeMap<(Kind, String), Option<String>>,
}

impl Server {
    fn hear(&mut self, requests: Vec<DeltaDiscoveryRequest>) {
        for request in requests {
            let kind = Kind::of_type_url(&request.type_url).unwrap();
            for name in request.resource_names_subscribe {
                let held = request.initial_resource_versions.get(&name).cloned();
                self.told.insert((kind, name), held);
            }
            for name in request.resource_names_unsubscribe {
                assert!(self.told.remove(&(kind, name.clone())).is_some(), "{name} was never subscribed to");
            }
        }
    }

    /// What is not told yet, in an order that depends on nothing but the names.
    fn untold(&self, world: &World) -> Vec<(Kind, String, Option<Resource>)> {
        let now = self.told.iter().map(|((kind, name), told)| (*kind, name.clone(), told, world.resource(*kind, name)));
        now.filter(|(_, _, told, now)| {
            told.as_deref() != Some(now.as_ref().map_or("absent", |now| now.version.as_str()))
        })
        .map(|(kind, name, _, now)| (kind, name, now))
        .collect()
    }

    fn tell(&mut self, state: &mut State, (kind, name, now): (Kind, String, Option<Resource>)) {
        let version = now.as_ref().map_or("absent".to_string(), |now| now.version.clone());
        let response = DeltaDiscoveryResponse {
            type_url: kind.type_url().to_string(),
            removed_resources: if now.is_none() { vec![name.clone()] } else { Vec::new() },
            resources: now.into_iter().collect(),
            ..DeltaDiscoveryResponse::default()
        };
        let verdict = state.receive(response, &mut |_| Ok(()));
        assert_eq!(verdict.refused, None, "the truth is never refused");
        self.told.insert((kind, name), Some(version));
    }
}

fn port(service: &str) -> ServicePort {
    ServicePort { service: ServiceName { service: service.into(), namespace: "default".into() }, port: 80 }
}

fn target(service: &str) -> Target {
    Target::new(service, 80).unwrap()
}

/// Whatever is published can be acted on.
fn is_complete(state: &State) {
    for (target, resolution) in state.snapshot().iter() {
        let Resolution::Mesh(destination) = resolution else { continue };
        let named = destination.rules.iter().flat_map(|rule| &rule.backends).map(|backend| &backend.cluster);
        for name in named.chain([&destination.default_cluster]) {
            assert!(destination.clusters.contains_key(name), "{target} leads to {name}, which is not there");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_happens_what_is_published_is_complete_and_in_the_end_it_is_the_truth(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (mut world, mut state, mut server) = (World::default(), State::default(), Server::default());
        let mut now = Instant::now();
        server.hear(state.begin());
        for step in steps {
            match step {
                Step::Service(which, to) => {
                    let to = to.into_iter().map(|to| SERVICES[to]).collect();
                    drop(world.services.insert(SERVICES[which], to));
                }
                Step::NoService(which) => drop(world.services.remove(SERVICES[which])),
                Step::Endpoints(which, count) => drop(world.endpoints.insert(SERVICES[which], count)),
                Step::Want(which) => state.want(&target(SERVICES[which]), now).unwrap(),
                Step::Deliver(most) => {
                    for told in server.untold(&world).into_iter().rev().take(most) {
                        server.tell(&mut state, told);
                    }
                }
                Step::Reconnect => {
                    server = Server::default();
                    server.hear(state.begin());
                }
                Step::Sweep(seconds) => {
                    now += Duration::from_secs(seconds);
                    state.sweep(now);
                }
            }
            state.assemble();
            server.hear(state.plan());
            is_complete(&state);
        }
        for _ in 0..20 {
            for told in server.untold(&world) {
                // It may have been let go of since.
                if !server.told.contains_key(&(told.0, told.1.clone())) {
                    continue;
                }
                server.tell(&mut state, told);
                state.assemble();
                server.hear(state.plan());
                is_complete(&state);
            }
        }
        prop_assert!(server.untold(&world).is_empty(), "there is an end to it");
        let subscribed = server.told.keys().filter(|(kind, _)| *kind == Kind::Cluster).map(|(_, name)| name.clone());
        prop_assert_eq!(subscribed.collect::<BTreeSet<_>>(), clusters(&state), "nothing is held for nobody");
        for (target, resolution) in state.snapshot().iter() {
            let truth = match world.destination(target.host()) {
                Some(destination) => Resolution::Mesh(Arc::new(destination)),
                None => Resolution::NotMesh,
            };
            prop_assert_eq!(resolution, &truth);
        }
    }
}

fn clusters(state: &State) -> BTreeSet<String> {
    let snapshot = state.snapshot();
    let destinations = snapshot.iter().filter_map(|(_, resolution)| match resolution {
        Resolution::Mesh(destination) => Some(destination),
        Resolution::NotMesh => None,
    });
    destinations.flat_map(|destination| destination.clusters.keys()).map(|name| name.to_string()).collect()
}

/// A mesh of one service, known to a proxy.
fn settled() -> (World, State, Server) {
    let mut world = World::default();
    world.services.insert("a", vec!["a"]);
    world.endpoints.insert("a", 1);
    let (mut state, mut server) = (State::default(), Server::default());
    server.hear(state.begin());
    (world, state, server)
}

fn settle(world: &World, state: &mut State, server: &mut Server) {
    for _ in 0..5 {
        server.hear(state.plan());
        for told in server.untold(world) {
            server.tell(state, told);
        }
        state.assemble();
    }
}

#[test]
fn a_destination_is_forgotten_after_ten_minutes_without_use_and_a_stranger_after_one() {
    let (world, mut state, mut server) = settled();
    let start = Instant::now();
    let (used, unused, stranger) = (target("a"), target("a.default.svc.cluster.local"), target("example.com"));
    for target in [&used, &unused, &stranger] {
        state.want(target, start).unwrap();
    }
    settle(&world, &mut state, &mut server);
    assert_eq!(state.snapshot().len(), 3);

    state.sweep(start + Duration::from_secs(59));
    assert_eq!(state.answer(&stranger), Some(&Resolution::NotMesh));
    state.sweep(start + Duration::from_secs(61));
    assert_eq!(state.answer(&stranger), None);

    assert!(state.snapshot().get(&used).is_some(), "this is a use");
    state.sweep(start + Duration::from_secs(599));
    state.sweep(start + Duration::from_secs(601));
    let left = state.snapshot();
    let left: Vec<&Target> = left.iter().map(|(target, _)| target).collect();
    assert_eq!(left, [&used]);
}

#[test]
fn strangers_make_room_for_the_mesh_and_the_mesh_for_nobody() {
    let (mut world, mut state, mut server) = settled();
    let start = Instant::now();
    for n in 0..MAX_TARGETS {
        state.want(&target(&format!("stranger-{n}.com")), start).unwrap();
    }
    let waiting = state.want(&target("a"), start);
    assert_eq!(waiting, Err(Full), "somebody still waits for each of them");
    settle(&world, &mut state, &mut server);
    state.want(&target("a"), start).unwrap();
    assert!(state.snapshot().len() < MAX_TARGETS);

    let names: Vec<String> = (0..MAX_TARGETS).map(|n| format!("svc{n}")).collect();
    let (mut state, mut server) = (State::default(), Server::default());
    server.hear(state.begin());
    for name in &names {
        world.services.insert(Box::leak(name.clone().into_boxed_str()), vec!["a"]);
        state.want(&target(name), start).unwrap();
    }
    settle(&world, &mut state, &mut server);
    assert_eq!(state.want(&target("a"), start + Duration::from_secs(5)), Err(Full));
}

#[test]
fn what_did_not_change_keeps_its_place_in_memory() {
    let (mut world, mut state, mut server) = settled();
    world.services.insert("b", vec!["b"]);
    for service in ["a", "b"] {
        state.want(&target(service), Instant::now()).unwrap();
    }
    settle(&world, &mut state, &mut server);
    let before = pointers(&state);
    world.endpoints.insert("b", 2);
    settle(&world, &mut state, &mut server);
    let after = pointers(&state);
    assert_eq!(before["a"], after["a"]);
    assert_ne!(before["b"], after["b"]);
}

fn pointers(state: &State) -> HashMap<String, *const Destination> {
    let snapshot = state.snapshot();
    let pointer = |(target, resolution): (&Target, &Resolution)| match resolution {
        Resolution::Mesh(destination) => Some((target.host().to_string(), Arc::as_ptr(destination))),
        Resolution::NotMesh => None,
    };
    snapshot.iter().filter_map(pointer).collect()
}
