//! Who serves what, outside Kubernetes: the registrations of live proxies. PURE: time comes in as an argument.
//!
//! One rule decides whether a registration counts: something was heard of its proxy within the TTL. An open stream that
//! has gone silent and a stream that broke are the same to it, so a short break of the connection costs nothing, and a
//! host that lost its power is gone in time. What was read back after a restart counts until the grace ends.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::Standing;
use sheetbend_control_plane_client::registration::{RegisteredPort, Registration};

/// Registered ports of all proxies together.
pub(crate) const MAX_PORTS: usize = 50_000;
/// Registered ports of one identity: two ports of a thousand instances, say.
pub(crate) const MAX_PER_IDENTITY: usize = 2_000;

/// A moment: time since the control plane started.
pub(crate) type Moment = Duration;

/// When something was last heard of a connection; shared between its socket and the registry.
#[derive(Debug, Default)]
pub(crate) struct LastHeard(AtomicU64);

impl LastHeard {
    pub(crate) fn set(&self, now: Moment) {
        self.0.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Moment {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// One discovery stream, unique for the life of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StreamId(pub(crate) u64);

/// One instance of a workload: whom its certificate names, and how it calls itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub(crate) identity: SpiffeId,
    pub(crate) node: Arc<str>,
}

/// A registration as the rest of the control plane reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registered {
    pub(crate) instance: Instance,
    pub(crate) address: IpAddr,
    pub(crate) ports: Vec<RegisteredPort>,
    #[serde(default)]
    pub(crate) also: Vec<IpAddr>,
    #[serde(default)]
    pub(crate) standing: Standing,
}

#[derive(Debug)]
enum Heard {
    /// By the proxy's connection, open or not.
    Over { stream: StreamId, last: Arc<LastHeard> },
    /// Read from the state file; counts until then.
    BeforeRestart { until: Moment },
}

#[derive(Debug)]
struct Entry {
    registered: Registered,
    heard: Heard,
    /// Kept, so that a proxy that wakes up need not register again, but told to nobody.
    silent: bool,
    /// Who was first keeps an address that two claim.
    since: u64,
}

/// Why a registration is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("this control plane would hold more than {MAX_PORTS} registered ports, its limit; withdraw some")]
    Full,
    #[error("this identity would have more than {MAX_PER_IDENTITY} registered ports, the limit of one identity")]
    TooManyOfOne,
}

/// The registrations.
#[derive(Debug)]
pub(crate) struct Registry {
    ttl: Duration,
    entries: HashMap<Instance, Entry>,
    /// Registered ports of each identity.
    counts: HashMap<SpiffeId, usize>,
    /// Registered ports of all.
    total: usize,
    order: u64,
}

impl Registry {
    pub(crate) fn new(ttl: Duration) -> Self {
        Self { ttl, entries: HashMap::new(), counts: HashMap::new(), total: 0, order: 0 }
    }

    /// Takes back what was written before a restart.
    pub(crate) fn restore(&mut self, saved: Vec<Registered>, until: Moment) {
        for registered in saved {
            if self.room_for(&registered, &[]).is_ok() {
                self.insert(registered, Heard::BeforeRestart { until });
            }
        }
    }

    /// Accepts a registration; no ports withdraw it. Gives whether anything changed for others.
    pub(crate) fn register(
        &mut self,
        instance: Instance,
        registration: Registration,
        stream: StreamId,
        last: Arc<LastHeard>,
    ) -> Result<bool, RegistryError> {
        if registration.ports.is_empty() {
            return Ok(self.remove(&instance));
        }
        let Registration { address, ports, also, standing } = registration;
        let registered = Registered { instance, address, ports, also, standing };
        let heard = Heard::Over { stream, last };
        // A process that came back on its old port under a new name is the same endpoint, not a second one.
        let replaced = self.same_place(&registered);
        self.room_for(&registered, &replaced)?;
        for instance in replaced.iter().filter(|instance| **instance != registered.instance) {
            self.remove(instance);
        }
        Ok(self.insert(registered, heard) || replaced.len() > 1)
    }

    /// Whether this is said already, word for word, by this stream.
    pub(crate) fn knows(&self, instance: &Instance, registration: &Registration, stream: StreamId) -> bool {
        match self.entries.get(instance) {
            Some(Entry { registered, .. }) => {
                self.holds(instance, stream)
                    && registered.address == registration.address
                    && registered.ports == registration.ports
                    && registered.also == registration.also
            }
            None => registration.ports.is_empty(),
        }
    }

    /// Whether the instance is registered by this stream.
    pub(crate) fn holds(&self, instance: &Instance, stream: StreamId) -> bool {
        matches!(self.entries.get(instance), Some(Entry { heard: Heard::Over { stream: own, .. }, .. }) if *own == stream)
    }

    /// Looks at who has gone silent, and who woke up. Gives whether anything changed for others. `open` says whether a
    /// stream is still there: what is silent and has no stream is forgotten.
    pub(crate) fn sweep(&mut self, now: Moment, open: impl Fn(StreamId) -> bool) -> bool {
        let mut changed = false;
        let mut gone = Vec::new();
        for (instance, entry) in &mut self.entries {
            let (silent, forget) = match &entry.heard {
                Heard::Over { stream, last } => {
                    let silent = now.saturating_sub(last.get()) > self.ttl;
                    (silent, silent && !open(*stream))
                }
                Heard::BeforeRestart { until } => (now >= *until, now >= *until),
            };
            changed |= silent != entry.silent;
            entry.silent = silent;
            if forget {
                gone.push(instance.clone());
            }
        }
        for instance in gone {
            self.remove(&instance);
        }
        changed
    }

    /// Those that count, oldest first.
    pub(crate) fn live(&self) -> Vec<Registered> {
        let mut live: Vec<&Entry> = self.entries.values().filter(|entry| !entry.silent).collect();
        live.sort_unstable_by_key(|entry| entry.since);
        live.into_iter().map(|entry| entry.registered.clone()).collect()
    }

    /// For the admin: every registration and its state.
    pub(crate) fn states(&self, now: Moment) -> BTreeMap<Instance, (Registered, &'static str, Duration)> {
        let state = |entry: &Entry| match (&entry.heard, entry.silent) {
            (Heard::Over { last, .. }, false) => ("live", now.saturating_sub(last.get())),
            (Heard::Over { last, .. }, true) => ("silent", now.saturating_sub(last.get())),
            (Heard::BeforeRestart { until }, _) => ("from before the restart", until.saturating_sub(now)),
        };
        self.entries
            .iter()
            .map(|(instance, entry)| {
                let (name, since) = state(entry);
                (instance.clone(), (entry.registered.clone(), name, since))
            })
            .collect()
    }

    fn room_for(&self, new: &Registered, replaced: &[Instance]) -> Result<(), RegistryError> {
        let of_one = |instance: &Instance| self.entries.get(instance).map_or(0, |e| e.registered.ports.len());
        let freed: usize = replaced.iter().map(of_one).sum();
        let more = new.ports.len();
        let own = self.counts.get(&new.instance.identity).copied().unwrap_or(0);
        // Whatever is replaced has the same identity.
        if own.saturating_sub(freed) + more > MAX_PER_IDENTITY {
            return Err(RegistryError::TooManyOfOne);
        }
        match self.total.saturating_sub(freed) + more > MAX_PORTS {
            true => Err(RegistryError::Full),
            false => Ok(()),
        }
    }

    /// Puts an entry in place of its former self. Gives whether anything changed for others.
    fn insert(&mut self, registered: Registered, heard: Heard) -> bool {
        let former = self.take(&registered.instance);
        let same = former.as_ref().is_some_and(|old| old.registered == registered && !old.silent);
        let since = former.map_or_else(
            || {
                self.order += 1;
                self.order
            },
            |old| old.since,
        );
        self.total += registered.ports.len();
        *self.counts.entry(registered.instance.identity.clone()).or_default() += registered.ports.len();
        self.entries.insert(registered.instance.clone(), Entry { registered, heard, silent: false, since });
        !same
    }

    /// Gives whether anything changed for others.
    fn remove(&mut self, instance: &Instance) -> bool {
        self.take(instance).is_some_and(|entry| !entry.silent)
    }

    fn take(&mut self, instance: &Instance) -> Option<Entry> {
        let entry = self.entries.remove(instance)?;
        let ports = entry.registered.ports.len();
        self.total = self.total.saturating_sub(ports);
        if let Some(count) = self.counts.get_mut(&instance.identity) {
            *count = count.saturating_sub(ports);
            if *count == 0 {
                self.counts.remove(&instance.identity);
            }
        }
        Some(entry)
    }

    /// The registration of this instance, and others of its identity that claim one of the same inbound addresses.
    fn same_place(&self, new: &Registered) -> Vec<Instance> {
        if !self.counts.contains_key(&new.instance.identity) {
            return Vec::new();
        }
        let overlaps = |old: &Registered| {
            old.instance == new.instance
                || (old.instance.identity == new.instance.identity
                    && old.address == new.address
                    && old.ports.iter().any(|a| new.ports.iter().any(|b| a.inbound == b.inbound)))
        };
        self.entries
            .values()
            .map(|entry| &entry.registered)
            .filter(|r| overlaps(r))
            .map(|r| r.instance.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheetbend_control_plane_client::model::AppProtocol;

    const TTL: Duration = Duration::from_secs(10);

    fn seconds(n: u64) -> Moment {
        Duration::from_secs(n)
    }

    fn instance(service: &str, node: &str) -> Instance {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{service}").parse().unwrap();
        Instance { identity, node: node.into() }
    }

    fn at(port: u16) -> Registration {
        let port = RegisteredPort { port: 8000, inbound: port, protocol: AppProtocol::Detect };
        Registration {
            address: [127, 0, 0, 1].into(),
            ports: vec![port],
            also: Vec::new(),
            standing: Standing::default(),
        }
    }

    fn heard(now: Moment) -> Arc<LastHeard> {
        let last = LastHeard::default();
        last.set(now);
        Arc::new(last)
    }

    fn saved(service: &str, node: &str, inbound: u16) -> Registered {
        let at = at(inbound);
        Registered {
            instance: instance(service, node),
            address: at.address,
            ports: at.ports,
            also: at.also,
            standing: at.standing,
        }
    }

    #[test]
    fn a_withdrawal_takes_effect_at_once() {
        let mut registry = Registry::new(TTL);
        registry.register(instance("web", "a"), at(1), StreamId(1), heard(seconds(0))).unwrap();
        assert_eq!(registry.live().len(), 1);
        let nothing = Registration { ports: Vec::new(), ..at(1) };
        assert_eq!(registry.register(instance("web", "a"), nothing, StreamId(1), heard(seconds(0))), Ok(true));
        assert!(registry.live().is_empty());
    }

    #[test]
    fn a_silent_proxy_is_gone_after_the_ttl_and_back_when_it_is_heard_again() {
        let mut registry = Registry::new(TTL);
        let last = heard(seconds(0));
        registry.register(instance("web", "a"), at(1), StreamId(1), last.clone()).unwrap();
        assert!(!registry.sweep(seconds(10), |_| true));
        assert!(registry.sweep(seconds(11), |_| true), "11 s of silence end it");
        assert!(registry.live().is_empty());
        last.set(seconds(12));
        assert!(registry.sweep(seconds(12), |_| true));
        assert_eq!(registry.live().len(), 1);
    }

    #[test]
    fn a_broken_stream_costs_nothing_when_its_proxy_is_back_in_time() {
        let mut registry = Registry::new(TTL);
        registry.register(instance("web", "a"), at(1), StreamId(1), heard(seconds(0))).unwrap();
        assert!(!registry.sweep(seconds(9), |_| false));
        let back = registry.register(instance("web", "a"), at(1), StreamId(2), heard(seconds(9)));
        assert_eq!(back, Ok(false), "nothing changed for anybody");
        assert!(!registry.sweep(seconds(19), |_| true));
        assert!(registry.sweep(seconds(20), |_| false));
        assert!(registry.live().is_empty());
    }

    #[test]
    fn what_was_registered_before_a_restart_counts_for_sixty_seconds() {
        let mut registry = Registry::new(TTL);
        registry.restore(vec![saved("web", "a", 1), saved("db", "b", 2)], seconds(60));
        assert!(!registry.sweep(seconds(59), |_| false));
        assert_eq!(registry.live().len(), 2);
        registry.register(instance("web", "a"), at(1), StreamId(1), heard(seconds(59))).unwrap();
        assert!(registry.sweep(seconds(60), |_| true));
        let left = registry.live();
        assert_eq!(left.len(), 1, "the one that came back stays");
        assert_eq!(left[0].instance, instance("web", "a"));
    }

    #[test]
    fn a_restarted_process_on_its_old_port_replaces_its_former_self() {
        let mut registry = Registry::new(TTL);
        registry.restore(vec![saved("web", "old", 1)], seconds(60));
        registry.register(instance("web", "new"), at(1), StreamId(1), heard(seconds(1))).unwrap();
        assert_eq!(registry.live().len(), 1);
        registry.register(instance("db", "thief"), at(1), StreamId(2), heard(seconds(1))).unwrap();
        assert_eq!(registry.live().len(), 2, "another identity replaces nobody");
    }

    #[test]
    fn one_identity_cannot_fill_the_registry() {
        let mut registry = Registry::new(TTL);
        for n in 0..MAX_PER_IDENTITY {
            let port = u16::try_from(n + 1).unwrap();
            registry.register(instance("web", &n.to_string()), at(port), StreamId(1), heard(seconds(0))).unwrap();
        }
        let one_more = registry.register(instance("web", "more"), at(60_000), StreamId(1), heard(seconds(0)));
        assert_eq!(one_more, Err(RegistryError::TooManyOfOne));
        assert_eq!(registry.register(instance("db", "a"), at(1), StreamId(1), heard(seconds(0))), Ok(true));
    }
}
