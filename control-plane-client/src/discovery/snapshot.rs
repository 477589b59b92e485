//! What is known of the mesh, as it is read on the way of a request.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::Instant;

use crate::model::{InboundPolicy, Mesh, OutboundPolicy, Resolution, Target};

/// Everything known at one moment. Never changes; the next moment is another snapshot.
///
/// Destinations and clusters that did not change keep their `Arc` from one snapshot to the next, so that a reader tells
/// by [`Arc::ptr_eq`] what to index anew.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub(super) entries: HashMap<Target, Entry>,
    pub(super) mesh: Option<Arc<Mesh>>,
    pub(super) inbound: Option<Arc<InboundPolicy>>,
}

/// An answer, and whether anybody cared for it lately.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) resolution: Resolution,
    pub(super) used: Used,
    /// When that was said first.
    pub(super) since: Instant,
}

impl Snapshot {
    /// These, and nothing else.
    pub(super) fn of(all: Vec<(Target, Resolution)>) -> Self {
        let since = Instant::now();
        let entry = |resolution| Entry { resolution, used: Used::default(), since };
        Self { entries: all.into_iter().map(|(target, said)| (target, entry(said))).collect(), ..Self::default() }
    }

    /// What a target stands for, if that is known. Counts as a use: what nobody asks for is forgotten in time.
    pub fn get(&self, target: &Target) -> Option<&Resolution> {
        let entry = self.entries.get(target)?;
        entry.used.mark();
        Some(&entry.resolution)
    }

    /// The same, of one who only keeps up with what is said: does not count as a use.
    pub fn peek(&self, target: &Target) -> Option<&Resolution> {
        self.entries.get(target).map(|entry| &entry.resolution)
    }

    /// Since when a target stands for what it does.
    pub fn since(&self, target: &Target) -> Option<Instant> {
        self.entries.get(target).map(|entry| entry.since)
    }

    /// Of what `former` says too, it was said as long ago as there.
    pub(super) fn follows(&mut self, former: &Self) {
        for (target, entry) in &mut self.entries {
            let same = former.entries.get(target).filter(|former| is_same(&former.resolution, &entry.resolution));
            if let Some(former) = same {
                entry.since = former.since;
            }
        }
    }

    /// What the mesh is; `None` before the first answer of a control plane.
    pub fn mesh(&self) -> Option<&Arc<Mesh>> {
        self.mesh.as_ref()
    }

    /// What holds for those who call the service beside this proxy; `None` before a control plane said so.
    pub fn inbound(&self) -> Option<&Arc<InboundPolicy>> {
        self.inbound.as_ref()
    }

    /// Whether a target is the mesh's by its name or address alone. Before the mesh is known, names without a dot are,
    /// and names below the default domain: a proxy that was never answered must not send those in plain.
    pub fn claims(&self, target: &Target) -> bool {
        match &self.mesh {
            Some(mesh) => mesh.claims(target),
            None => Mesh::default().claims(target) || target.host().ends_with(".svc.cluster.local"),
        }
    }

    /// Whether nobody but the mesh can have this name ([`Mesh::owns`]).
    pub fn owns(&self, target: &Target) -> bool {
        self.mesh.as_ref().is_some_and(|mesh| mesh.owns(target))
    }

    /// What happens to traffic that is for no part of the mesh.
    pub fn outbound_policy(&self) -> OutboundPolicy {
        self.mesh.as_ref().map(|mesh| mesh.outbound_policy).unwrap_or_default()
    }

    /// Everything known, in no order. Does not count as a use.
    pub fn iter(&self) -> impl Iterator<Item = (&Target, &Resolution)> {
        self.entries.iter().map(|(target, entry)| (target, &entry.resolution))
    }

    /// How many targets are known.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

fn is_same(one: &Resolution, other: &Resolution) -> bool {
    match (one, other) {
        (Resolution::Mesh(one), Resolution::Mesh(other)) => Arc::ptr_eq(one, other),
        (Resolution::NotMesh, Resolution::NotMesh) => true,
        _ => false,
    }
}

/// Set by readers, cleared by the sweep. A mark without a clock: reading a time would cost more than the lookup.
#[derive(Clone, Debug, Default)]
pub(super) struct Used(Arc<AtomicBool>);

impl Used {
    /// Written only when it changes: a line of memory that all workers read should stay shared.
    pub(super) fn mark(&self) {
        if !self.0.load(Ordering::Relaxed) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}
