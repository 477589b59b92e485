//! The control plane and the proxies' own clients, end to end: join, register, resolve, rotate, restart.

mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Ca, IdentityStore, Material};
use sheetbend_control_plane::{Config, ControlPlane};
use sheetbend_control_plane_client::channel::Connector;
use sheetbend_control_plane_client::discovery::{Discovery, DiscoveryConfig, NodeInfo};
use sheetbend_control_plane_client::identity::{IdentityClient, IdentityConfig, Proof};
use sheetbend_control_plane_client::model::{AppProtocol, Destination, Resolution, Target, Transport};
use sheetbend_control_plane_client::registration::{RegisteredPort, Registration};
use support::{SOON, config, id, new_ca, port};
use tokio::sync::watch;

/// A proxy as far as the control plane sees it.
struct Proxy {
    store: Arc<IdentityStore>,
    discovery: Discovery,
    registration: watch::Sender<Option<Registration>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Proxy {
    async fn start(control_plane: &ControlPlane, service: &str) -> Self {
        let token = control_plane.token(service, "default", Duration::from_secs(60)).unwrap();
        let store = Arc::new(IdentityStore::new());
        let proof = Proof::Join(token.parse().unwrap());
        let config = IdentityConfig::new(control_plane.url(), proof);
        let (identity, renewals) = IdentityClient::start(config, store.clone()).unwrap();
        let renewals = tokio::spawn(renewals);
        identity.first(SOON).await.unwrap();
        let (registration, watched) = watch::channel(None);
        let (discovery, task) = Discovery::start(DiscoveryConfig {
            connector: Connector::mesh(control_plane.url(), store.clone()).unwrap(),
            node: NodeInfo { id: format!("{service}-1"), cluster: service.to_string() },
            registration: watched,
        });
        Self { store, discovery, registration, tasks: vec![renewals, tokio::spawn(task)] }
    }

    fn serve(&self, port: u16, inbound: u16) {
        let port = RegisteredPort { port, inbound, protocol: AppProtocol::Http };
        self.registration.send_replace(Some(Registration {
            address: [127, 0, 0, 1].into(),
            ports: vec![port],
            also: Vec::new(),
            standing: Default::default(),
        }));
    }

    /// Waits until a target stands for what it should.
    async fn sees(&self, target: &str, what: impl Fn(&Resolution) -> bool) {
        let target: Target = target.parse().unwrap();
        let mut changes = self.discovery.subscribe();
        let _ = self.discovery.resolve(&target).await;
        let seen = changes.wait_for(|snapshot| snapshot.get(&target).is_some_and(&what));
        let seen = tokio::time::timeout(SOON, seen).await;
        assert!(seen.is_ok(), "{target} is {:?}", self.discovery.lookup(&target));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

fn endpoints(resolution: &Resolution) -> Vec<SocketAddr> {
    match resolution {
        Resolution::Mesh(destination) => {
            destination.clusters.values().flat_map(|c| &c.endpoints).map(|e| e.address).collect()
        }
        Resolution::NotMesh => Vec::new(),
    }
}

fn at(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

async fn started(dir: &Path) -> ControlPlane {
    ControlPlane::start(config(dir)).await.unwrap()
}

#[tokio::test]
async fn a_service_that_joins_and_registers_is_resolved_by_another_and_gone_when_it_withdraws() {
    let dir = tempfile::tempdir().unwrap();
    new_ca(dir.path());
    let control_plane = started(dir.path()).await;
    let (web, caller) = (Proxy::start(&control_plane, "web").await, Proxy::start(&control_plane, "caller").await);
    caller.sees("web:8000", |found| *found == Resolution::NotMesh).await;
    web.serve(8000, 41000);
    caller.sees("web:8000", |found| endpoints(found) == [at(41000)]).await;
    caller.sees("web.default.svc.cluster.local:8000", |found| endpoints(found) == [at(41000)]).await;
    let Some(Resolution::Mesh(destination)) = caller.discovery.lookup(&"web:8000".parse().unwrap()) else { panic!() };
    let Destination { name, protocol, .. } = &*destination;
    assert_eq!((name.to_string().as_str(), *protocol), ("web.default:8000", AppProtocol::Http));
    let endpoint = &destination.clusters[&destination.default_cluster].endpoints[0];
    assert_eq!(endpoint.transport, Transport::Sheetbend(id("web")));
    assert!(caller.discovery.snapshot().mesh().is_some());

    web.discovery.withdraw().await;
    caller.sees("web:8000", |found| endpoints(found).is_empty()).await;
}

#[tokio::test]
async fn roots_are_rotated_and_the_old_one_dropped_while_proxies_stay_connected() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = started(dir.path()).await;
    let (web, caller) = (Proxy::start(&control_plane, "web").await, Proxy::start(&control_plane, "caller").await);
    web.serve(8000, 41000);
    caller.sees("web:8000", |found| endpoints(found) == [at(41000)]).await;

    let old = ca.active_root().unwrap().sha256();
    ca.rotate(SystemTime::now()).unwrap();
    let new = Ca::open(dir.path(), SystemTime::now()).unwrap().active_root().unwrap().sha256();
    for proxy in [&web, &caller] {
        has(proxy, |material| material.bundle.contains(old) && material.bundle.contains(new)).await;
        // The leaf of the new root comes with that root signed by the old one.
        has(proxy, |material| material.identity.chain.len() == 3).await;
    }
    ca.drop_old().unwrap();
    for proxy in [&web, &caller] {
        has(proxy, |material| !material.bundle.contains(old) && material.bundle.contains(new)).await;
    }
    web.serve(8000, 41001);
    caller.sees("web:8000", |found| endpoints(found) == [at(41001)]).await;
}

async fn has(proxy: &Proxy, condition: impl Fn(&Material) -> bool) {
    let mut changes = proxy.store.subscribe();
    let found = changes.wait_for(|material| material.as_ref().is_some_and(|material| condition(material)));
    assert!(tokio::time::timeout(SOON, found).await.is_ok(), "the proxy does not follow the rotation");
}

#[tokio::test]
async fn a_restart_is_noticed_by_nobody_who_knows_already() {
    let dir = tempfile::tempdir().unwrap();
    new_ca(dir.path());
    let (_held, listen) = port();
    let control_plane = ControlPlane::start(Config { listen, ..config(dir.path()) }).await.unwrap();
    let (web, caller) = (Proxy::start(&control_plane, "web").await, Proxy::start(&control_plane, "caller").await);
    web.serve(8000, 41000);
    caller.sees("web:8000", |found| endpoints(found) == [at(41000)]).await;
    let mut status = caller.discovery.status();
    control_plane.shutdown().await;
    tokio::time::timeout(SOON, status.wait_for(|status| !status.connected)).await.unwrap().unwrap();
    assert_eq!(endpoints(&caller.discovery.lookup(&"web:8000".parse().unwrap()).unwrap()), [at(41000)]);

    let _again = ControlPlane::start(Config { listen, ..config(dir.path()) }).await.unwrap();
    tokio::time::timeout(SOON, status.wait_for(|status| status.connected)).await.unwrap().unwrap();
    assert_eq!(endpoints(&caller.discovery.lookup(&"web:8000".parse().unwrap()).unwrap()), [at(41000)]);
    web.serve(8000, 41002);
    caller.sees("web:8000", |found| endpoints(found) == [at(41002)]).await;
}
