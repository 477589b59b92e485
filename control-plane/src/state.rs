//! What all parts of one control plane share, and the task that turns changes into a new world.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use sheetbend_certs::{Ca, CaError, SpiffeId};
use sheetbend_control_plane_client::registration::Registration;
use sheetbend_control_plane_client::xds::Kind;
use tokio::sync::{Notify, watch};
use tonic::Status;

use crate::ads::Told;
use crate::check::{Known, between};
use crate::persist::{self, StateError};
use crate::registry::{Instance, LastHeard, Registered, Registry, RegistryError, StreamId};
use crate::resources::{Folder, Problem, Resource};
use crate::trust::{Holdings, ProxyRoots, Shown, Trust};
use crate::world::{Inputs, World};

/// Discovery streams together.
const MAX_STREAMS: usize = 8_192;
/// Discovery streams of one identity: its instances, each in the middle of reconnecting.
const MAX_STREAMS_OF_ONE: usize = 2_000;

/// The mesh at one moment, as seen from this machine and from others.
pub(crate) struct Worlds {
    pub(crate) number: u64,
    /// With loopback addresses.
    pub(crate) near: Arc<World>,
    /// Without.
    pub(crate) far: Arc<World>,
    pub(crate) trust: Arc<Trust>,
}

/// What the admin shows of a stream.
#[derive(Clone, Debug)]
pub(crate) struct StreamState {
    pub(crate) instance: Option<Instance>,
    pub(crate) dialect: &'static str,
    pub(crate) address: Option<SocketAddr>,
    pub(crate) since: SystemTime,
    pub(crate) kinds: BTreeMap<Kind, Told>,
}

impl StreamState {
    pub(crate) fn new(instance: Instance, dialect: &'static str, address: SocketAddr) -> Self {
        let since = SystemTime::now();
        Self { instance: Some(instance), dialect, address: Some(address), since, kinds: BTreeMap::new() }
    }
}

/// What an operator wrote, merged.
#[derive(Default)]
pub(crate) struct Written {
    pub(crate) resources: Vec<Resource>,
    pub(crate) allowed_addresses: Vec<IpNet>,
}

#[derive(Default)]
struct Streams {
    open: HashMap<StreamId, StreamState>,
    owners: HashMap<StreamId, SpiffeId>,
    of_one: HashMap<SpiffeId, usize>,
}

/// One control plane's state.
pub(crate) struct Shared {
    pub(crate) started: Instant,
    pub(crate) ca: Arc<Ca>,
    allowed_addresses: Vec<IpNet>,
    registrations_file: PathBuf,
    registry: Mutex<Registry>,
    changed: Notify,
    worlds: watch::Sender<Arc<Worlds>>,
    holdings: Mutex<Holdings>,
    pub(crate) folder: Mutex<Option<Folder>>,
    written: ArcSwap<Written>,
    streams: Mutex<Streams>,
    next_stream: AtomicU64,
    stopping: watch::Sender<bool>,
    /// Whether nothing more is to be written, since another control plane may have begun. One writes at a time.
    saved_last: Mutex<bool>,
}

/// Where [`Shared`] starts from.
pub(crate) struct Parts {
    pub(crate) started: Instant,
    pub(crate) ca: Arc<Ca>,
    pub(crate) trust: Trust,
    pub(crate) registry: Registry,
    pub(crate) registrations_file: PathBuf,
    pub(crate) holdings: Holdings,
    pub(crate) folder: Option<Folder>,
    pub(crate) allowed_addresses: Vec<IpNet>,
}

/// A panic elsewhere leaves maps that are still whole: each change of ours is one insertion or removal.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns once the control plane is told to stop, or is gone.
pub(crate) async fn stopped(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stop| *stop).await);
}

impl Shared {
    pub(crate) fn new(mut parts: Parts) -> Self {
        parts.holdings.told(&parts.trust);
        let none = Arc::new(World::default());
        let worlds = Worlds { number: 0, near: none.clone(), far: none, trust: Arc::new(parts.trust) };
        let shared = Self {
            started: parts.started,
            ca: parts.ca,
            allowed_addresses: parts.allowed_addresses,
            registrations_file: parts.registrations_file,
            registry: Mutex::new(parts.registry),
            changed: Notify::new(),
            worlds: watch::Sender::new(Arc::new(worlds)),
            holdings: Mutex::new(parts.holdings),
            written: ArcSwap::from_pointee(Written::of(parts.folder.as_ref())),
            folder: Mutex::new(parts.folder),
            streams: Mutex::default(),
            next_stream: AtomicU64::new(1),
            stopping: watch::Sender::new(false),
            saved_last: Mutex::new(false),
        };
        shared.rebuild();
        shared
    }

    pub(crate) fn worlds(&self) -> watch::Receiver<Arc<Worlds>> {
        self.worlds.subscribe()
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    pub(crate) fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Publishes a new world whenever something changed, as soon as it did; while one is being built, changes collect.
    pub(crate) async fn keep_building(&self) {
        loop {
            self.changed.notified().await;
            let begun = Instant::now();
            self.rebuild();
            // Half of a core at most, however fast changes come. A usual world takes well below a millisecond.
            tokio::time::sleep(begun.elapsed().min(Duration::from_millis(200))).await;
        }
    }

    fn rebuild(&self) {
        let registered = lock(&self.registry).live();
        let written = self.written.load_full();
        let former = self.worlds.borrow().clone();
        let trust_domain: Arc<str> = match self.ca.trust_domain() {
            Ok(domain) => domain.as_str().into(),
            Err(_) => former.near.mesh.trust_domain.clone(),
        };
        let inputs = |same_machine| Inputs {
            trust_domain: trust_domain.clone(),
            registered: &registered,
            resources: &written.resources,
            same_machine,
        };
        let near = Arc::new(World::build(&inputs(true), &former.near));
        let far = Arc::new(World::build(&inputs(false), &former.far));
        self.worlds.send_modify(|worlds| {
            *worlds = Arc::new(Worlds { number: worlds.number + 1, near, far, trust: worlds.trust.clone() });
        });
    }

    /// A new bundle is told to everybody at once.
    pub(crate) fn set_trust(&self, trust: Trust) {
        lock(&self.holdings).told(&trust);
        let trust = Arc::new(trust);
        self.worlds.send_modify(|worlds| {
            let (near, far) = (worlds.near.clone(), worlds.far.clone());
            *worlds = Arc::new(Worlds { number: worlds.number + 1, near, far, trust });
        });
    }

    /// Takes over what an operator wrote.
    pub(crate) fn set_written(&self, written: Written) {
        self.written.store(Arc::new(written));
        self.changed.notify_one();
    }

    /// What is wrong between resources, with whoever is registered now.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let mut known = Known::default();
        let worlds = self.worlds.borrow().clone();
        worlds
            .near
            .destinations()
            .for_each(|one| known.add(one.name.service.clone(), Some((one.name.port, one.protocol))));
        let folder = lock(&self.folder);
        folder.as_ref().map(|folder| between(folder, known)).unwrap_or_default()
    }

    // Registrations.

    /// Whether a peer may register an address.
    pub(crate) fn may_register(&self, address: IpAddr, peer: IpAddr) -> Result<(), String> {
        let written = self.written.load();
        let allowed = self.allowed_addresses.iter().chain(&written.allowed_addresses);
        may_register(address, peer, allowed, is_of_this_machine)
    }

    /// Whether a registration is there already, word for word, by this stream.
    pub(crate) fn knows(&self, instance: &Instance, registration: &Registration, stream: StreamId) -> bool {
        lock(&self.registry).knows(instance, registration, stream)
    }

    pub(crate) fn register(
        &self,
        instance: Instance,
        registration: Registration,
        stream: StreamId,
        last: Arc<LastHeard>,
    ) -> Result<(), RegistryError> {
        let (what, ports) = (registration.address, registration.ports.len());
        let changed = lock(&self.registry).register(instance.clone(), registration, stream, last)?;
        if changed {
            match ports {
                0 => tracing::info!(identity = %instance.identity, node = %instance.node, "withdrawn"),
                _ => {
                    tracing::info!(identity = %instance.identity, node = %instance.node, address = %what, ports, "registered")
                }
            }
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Looks who has gone silent.
    pub(crate) fn sweep(&self) {
        let open: std::collections::HashSet<StreamId> = lock(&self.streams).open.keys().copied().collect();
        if lock(&self.registry).sweep(self.started.elapsed(), |stream| open.contains(&stream)) {
            tracing::info!("a proxy went silent, or was heard again");
            self.changed.notify_one();
        }
    }

    pub(crate) fn registrations(&self) -> BTreeMap<Instance, (Registered, &'static str, Duration)> {
        lock(&self.registry).states(self.started.elapsed())
    }

    /// What a restart would need, if it differs from what was written last.
    pub(crate) fn save(&self, last: &mut Option<Vec<Registered>>) -> Result<(), StateError> {
        // Held until it is on disk: what is known later is written later.
        let saved_last = lock(&self.saved_last);
        if *saved_last { Ok(()) } else { self.write(last) }
    }

    /// Saves for the last time. Whoever still means to save comes too late: the next control plane may have begun.
    pub(crate) fn save_last(&self) -> Result<(), StateError> {
        let mut saved_last = lock(&self.saved_last);
        *saved_last = true;
        self.write(&mut None)
    }

    fn write(&self, last: &mut Option<Vec<Registered>>) -> Result<(), StateError> {
        let live = lock(&self.registry).live();
        if last.as_ref() != Some(&live) {
            persist::write_json(&self.registrations_file, &live)?;
            *last = Some(live);
        }
        let unsaved = lock(&self.holdings).unsaved(SystemTime::now());
        unsaved.map_or(Ok(()), |saving| saving.write())
    }

    // Streams.

    /// A place for a stream of this identity.
    pub(crate) fn open_stream(&self, identity: &SpiffeId) -> Result<StreamId, Status> {
        let mut streams = lock(&self.streams);
        let of_one = streams.of_one.get(identity).copied().unwrap_or(0);
        if streams.open.len() >= MAX_STREAMS || of_one >= MAX_STREAMS_OF_ONE {
            return Err(Status::resource_exhausted("too many discovery streams are open"));
        }
        let id = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        streams.of_one.insert(identity.clone(), of_one + 1);
        streams.owners.insert(id, identity.clone());
        let unnamed = StreamState {
            instance: None,
            dialect: "",
            address: None,
            since: SystemTime::now(),
            kinds: BTreeMap::new(),
        };
        streams.open.insert(id, unnamed);
        Ok(id)
    }

    pub(crate) fn name_stream(&self, id: StreamId, state: StreamState) {
        lock(&self.streams).open.insert(id, state);
    }

    pub(crate) fn note_stream(&self, id: StreamId, kind: Kind, session: &crate::ads::Session) {
        let told = session.told(kind);
        if let Some(state) = lock(&self.streams).open.get_mut(&id) {
            state.kinds.insert(kind, told);
        }
    }

    pub(crate) fn close_stream(&self, id: StreamId) {
        let mut streams = lock(&self.streams);
        streams.open.remove(&id);
        let Some(owner) = streams.owners.remove(&id) else { return };
        if let Some(count) = streams.of_one.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                streams.of_one.remove(&owner);
            }
        }
    }

    pub(crate) fn streams(&self) -> Vec<StreamState> {
        let streams = lock(&self.streams);
        let mut all: Vec<(StreamId, StreamState)> = streams.open.iter().map(|(id, s)| (*id, s.clone())).collect();
        all.sort_unstable_by_key(|(id, _)| id.0);
        all.into_iter().map(|(_, state)| state).collect()
    }

    // Roots.

    pub(crate) fn note_roots(&self, instance: &Instance, shown: &Shown<'_>) {
        lock(&self.holdings).seen(instance, shown, SystemTime::now());
    }

    /// A proxy's stream ended, in whatever way.
    pub(crate) fn note_silence(&self, instance: &Instance) {
        lock(&self.holdings).silent(instance, SystemTime::now());
    }

    /// A proxy said goodbye on this stream, which is closed by now. It is gone for good if nothing of it is registered any
    /// more and it has not come back on another stream.
    pub(crate) fn goodbye(&self, instance: &Instance, stream: StreamId) {
        let back = lock(&self.streams).open.values().any(|other| other.instance.as_ref() == Some(instance));
        if !back && !lock(&self.registry).holds(instance, stream) {
            lock(&self.holdings).forget(instance);
        }
    }

    /// Who holds which roots, and the digest of the one that everybody is to have. Held against what the CA says at this
    /// moment: what was told last may be older than a rotation that was just made.
    pub(crate) fn roots(&self) -> Result<(String, Vec<ProxyRoots>), CaError> {
        let trust = Trust::of(&self.ca)?;
        let connected: Vec<Instance> = self.streams().into_iter().filter_map(|stream| stream.instance).collect();
        let proxies = lock(&self.holdings).report(&trust, &connected, SystemTime::now());
        Ok((trust.active, proxies))
    }
}

impl Written {
    pub(crate) fn of(folder: Option<&Folder>) -> Self {
        let resources: Vec<Resource> = folder.into_iter().flat_map(|f| f.resources()).cloned().collect();
        let mut written = Self::default();
        for resource in &resources {
            if let Resource::Settings(settings) = resource {
                written.allowed_addresses.extend(&settings.allowed_addresses);
            }
        }
        Self { resources, ..written }
    }
}

/// A proxy registers the address from which it connects. One on this machine may connect over loopback and register any
/// address of this machine. Everything else has to be allowed by the operator: it would lead others astray.
fn may_register<'a>(
    address: IpAddr,
    peer: IpAddr,
    mut allowed: impl Iterator<Item = &'a IpNet>,
    is_of_this_machine: impl Fn(IpAddr) -> bool,
) -> Result<(), String> {
    let (address, peer) = (address.to_canonical(), peer.to_canonical());
    let unusable = address.is_unspecified() || address.is_multicast();
    let own = address == peer || (peer.is_loopback() && is_of_this_machine(address));
    match !unusable && (own || allowed.any(|range| range.contains(&address))) {
        true => Ok(()),
        false => Err(format!(
            "{address} cannot be registered by a proxy that connects from {peer}; register {peer}, or allow the address \
             with `allowedAddresses` of a MeshSettings or with --allow-address"
        )),
    }
}

/// Only an address of this machine can be bound.
fn is_of_this_machine(address: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_registers_its_own_address_and_no_other() {
        let allowed: [IpNet; 1] = ["10.1.0.0/16".parse().unwrap()];
        let check = |address: &str, peer: &str| {
            let local = |a: IpAddr| a.is_loopback() || a.to_string() == "192.0.2.1";
            may_register(address.parse().unwrap(), peer.parse().unwrap(), allowed.iter(), local)
        };
        assert!(check("192.0.2.7", "192.0.2.7").is_ok());
        assert!(check("192.0.2.7", "::ffff:192.0.2.7").is_ok());
        assert!(check("192.0.2.1", "127.0.0.1").is_ok(), "this machine's own address, over loopback");
        assert!(check("10.1.2.3", "192.0.2.7").is_ok(), "allowed by the operator");
        for (address, peer) in
            [("192.0.2.8", "192.0.2.7"), ("127.0.0.1", "192.0.2.7"), ("192.0.2.8", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")]
        {
            let refused = check(address, peer).unwrap_err();
            assert!(refused.contains(address) && refused.contains("--allow-address"), "{refused}");
        }
    }
}
