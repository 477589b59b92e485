//! Whom the mesh believes now, and which proxy already does.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sheetbend_certs::{Ca, CaError, TrustBundle, VerifiedPeer};

use crate::ads::digest;
use crate::persist::{self, StateError};
use crate::registry::{Instance, StreamId};

/// Bundles whose acknowledgement may still come in. A rotation makes two.
const REMEMBERED: usize = 16;
/// Proxies remembered at once.
const MAX_PROXIES: usize = 50_000;
/// Of one identity: no workload can crowd out the others by calling itself ever new names.
const MAX_OF_ONE: usize = 2_000;

/// The trust bundle as it is told.
#[derive(Debug)]
pub(crate) struct Trust {
    pub(crate) bundle: Arc<TrustBundle>,
    pub(crate) pem: String,
    pub(crate) version: String,
    /// Digest of the root that new certificates lead to.
    pub(crate) active: String,
}

impl Trust {
    pub(crate) fn of(ca: &Ca) -> Result<Self, CaError> {
        let bundle = ca.bundle()?;
        let pem = bundle.to_pem();
        Ok(Self { version: digest(&pem), pem, active: ca.active_root()?.sha256().to_string(), bundle })
    }

    fn roots(&self) -> Vec<String> {
        self.bundle.roots().iter().map(|root| root.sha256().to_string()).collect()
    }
}

/// What a proxy was last seen to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    /// Digests of the roots it acknowledged. `None`: it does not take its roots from us, and brought them with its
    /// certificate.
    roots: Option<Vec<String>>,
    /// Digest of the root that its own certificate leads to.
    leaf_root: String,
    /// Seconds since 1970: from then on nobody believes its certificate anyway.
    leaf_ends: u64,
    /// Seconds since 1970.
    seen: u64,
    /// The stream that said so. A former one, which may still have something unread, does not outweigh it.
    #[serde(skip)]
    stream: u64,
}

/// What a stream shows of its proxy.
pub(crate) struct Shown<'a> {
    pub(crate) stream: StreamId,
    pub(crate) leaf: &'a VerifiedPeer,
    /// Whether it takes its roots from us.
    pub(crate) asks: bool,
    /// The bundle that it acknowledged, if any yet.
    pub(crate) version: Option<&'a str>,
}

/// One line of `/roots`.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ProxyRoots {
    pub(crate) identity: String,
    pub(crate) node: Arc<str>,
    /// It has not acknowledged the root that new certificates lead to.
    pub(crate) lacks_new_root: bool,
    /// Its own certificate still leads to another root.
    pub(crate) old_leaf: bool,
    pub(crate) connected: bool,
    pub(crate) last_seen_seconds_ago: u64,
}

/// Who holds which roots. A proxy that went without saying goodbye is remembered until its certificate ends: it may only
/// be out of reach, and would be locked out for good if the root it holds were dropped.
pub(crate) struct Holdings {
    path: PathBuf,
    held: HashMap<Instance, Held>,
    bundles: VecDeque<(String, Vec<String>)>,
    changed: bool,
}

impl Holdings {
    pub(crate) fn open(path: PathBuf) -> Result<Self, StateError> {
        let saved: Vec<(Instance, Held)> = persist::read_json(&path)?.unwrap_or_default();
        Ok(Self { path, held: saved.into_iter().collect(), bundles: VecDeque::new(), changed: false })
    }

    /// A bundle is about to be told.
    pub(crate) fn told(&mut self, trust: &Trust) {
        if self.bundles.iter().any(|(version, _)| *version == trust.version) {
            return;
        }
        self.bundles.push_back((trust.version.clone(), trust.roots()));
        if self.bundles.len() > REMEMBERED {
            self.bundles.pop_front();
        }
    }

    /// A proxy is there with this certificate, and says that it holds that bundle, if it said anything yet.
    pub(crate) fn seen(&mut self, instance: &Instance, shown: &Shown<'_>, now: SystemTime) {
        let bundle = |version| self.bundles.iter().find(|(known, _)| known == version);
        let roots = shown.version.and_then(bundle).map(|(_, roots)| roots.clone());
        let former = self.held.get(instance);
        if former.is_some_and(|former| former.stream > shown.stream.0) {
            return;
        }
        if former.is_none() && !self.has_room(instance) {
            tracing::warn!(identity = %instance.identity, "too many proxies to remember which roots each holds");
            return;
        }
        let held = Held {
            roots: roots.or_else(|| former?.roots.clone()).or(shown.asks.then(Vec::new)),
            leaf_root: shown.leaf.root.to_string(),
            leaf_ends: seconds(shown.leaf.not_after),
            seen: seconds(now),
            stream: shown.stream.0,
        };
        self.changed |= former.is_none_or(|f| f.roots != held.roots || f.leaf_root != held.leaf_root);
        self.held.insert(instance.clone(), held);
    }

    fn has_room(&self, instance: &Instance) -> bool {
        let of_one = self.held.keys().filter(|known| known.identity == instance.identity).count();
        self.held.len() < MAX_PROXIES && of_one < MAX_OF_ONE
    }

    /// A proxy's stream ended: from now on it is silent.
    pub(crate) fn silent(&mut self, instance: &Instance, now: SystemTime) {
        if let Some(held) = self.held.get_mut(instance) {
            held.seen = seconds(now);
            self.changed = true;
        }
    }

    /// A proxy said goodbye.
    pub(crate) fn forget(&mut self, instance: &Instance) {
        self.changed |= self.held.remove(instance).is_some();
    }

    /// Everyone, with what stands in the way of dropping an old root.
    pub(crate) fn report(&self, trust: &Trust, connected: &[Instance], now: SystemTime) -> Vec<ProxyRoots> {
        let now = seconds(now);
        let sorted: BTreeMap<&Instance, &Held> = self.held.iter().filter(|(_, held)| held.leaf_ends > now).collect();
        sorted
            .into_iter()
            .map(|(instance, held)| ProxyRoots {
                identity: instance.identity.to_string(),
                node: instance.node.clone(),
                lacks_new_root: held.roots.as_ref().is_some_and(|roots| !roots.contains(&trust.active)),
                old_leaf: held.leaf_root != trust.active,
                connected: connected.contains(instance),
                last_seen_seconds_ago: now.saturating_sub(held.seen),
            })
            .collect()
    }

    /// What to write, if anything changed since the last time.
    pub(crate) fn unsaved(&mut self, now: SystemTime) -> Option<Saving> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let now = seconds(now);
        self.held.retain(|_, held| held.leaf_ends > now);
        let all = self.held.iter().map(|(instance, held)| (instance.clone(), held.clone())).collect();
        Some(Saving { path: self.path.clone(), all })
    }
}

/// Content on its way to the disk.
pub(crate) struct Saving {
    path: PathBuf,
    all: Vec<(Instance, Held)>,
}

impl Saving {
    /// Blocks.
    pub(crate) fn write(self) -> Result<(), StateError> {
        persist::write_json(&self.path, &self.all)
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
