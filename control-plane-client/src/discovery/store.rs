//! PURE: the resources of one stream, by kind and name, each with the moment it last changed.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::Resource;

use crate::model::{Endpoint, InboundPolicy, Mesh};
use crate::xds::decode::{self, ClusterHead, Decoded, Listener, Routes};
use crate::xds::{DecodeError, INBOUND, Kind, MESH};

/// What is held at once, as it came over the wire: more than 200,000 endpoints of 150 bytes.
const MAX_BYTES: usize = 32 << 20;

/// All kinds.
#[derive(Default)]
pub(super) struct Stores {
    /// In the order of [`Kind::ALL`].
    stores: [Store; 5],
    /// Counts changes, so that "newer" has a meaning.
    clock: u64,
    /// What all that is held measured on the wire.
    bytes: usize,
    /// Another mesh was told since somebody looked, or other rules for those who call.
    pub(super) mesh_changed: bool,
}

/// One kind.
#[derive(Default)]
pub(super) struct Store {
    /// The names asked for on this stream.
    pub(super) subscribed: BTreeSet<Arc<str>>,
    held: HashMap<Arc<str>, Held>,
}

struct Held {
    version: String,
    content: Content,
    generation: u64,
    bytes: usize,
}

/// What was said of a name.
pub(super) enum Content {
    /// This.
    Value(Decoded),
    /// There is no such thing.
    Absent,
}

/// A cluster's two halves.
pub(super) struct ClusterParts<'a> {
    pub(super) head: &'a ClusterHead,
    pub(super) endpoints: &'a [Endpoint],
    pub(super) generation: u64,
}

impl Stores {
    pub(super) fn of_mut(&mut self, kind: Kind) -> &mut Store {
        &mut self.stores[kind as usize]
    }

    fn held(&self, kind: Kind, name: &str) -> Option<&Held> {
        self.stores[kind as usize].held.get(name)
    }

    /// What was said of a name; `None`: nothing yet.
    pub(super) fn content(&self, kind: Kind, name: &str) -> Option<&Content> {
        self.held(kind, name).map(|held| &held.content)
    }

    /// When that was. 0: never.
    pub(super) fn generation(&self, kind: Kind, name: &str) -> u64 {
        self.held(kind, name).map_or(0, |held| held.generation)
    }

    pub(super) fn listener(&self, name: &str) -> Option<&Listener> {
        match self.content(Kind::Listener, name)? {
            Content::Value(Decoded::Listener(listener)) => Some(listener),
            _ => None,
        }
    }

    pub(super) fn routes(&self, name: &str) -> Option<&Routes> {
        match self.content(Kind::Routes, name)? {
            Content::Value(Decoded::Routes(routes)) => Some(routes),
            _ => None,
        }
    }

    pub(super) fn mesh(&self) -> Option<Arc<Mesh>> {
        match self.content(Kind::Listener, MESH)? {
            Content::Value(Decoded::Mesh(mesh)) => Some(mesh.clone()),
            _ => None,
        }
    }

    pub(super) fn inbound(&self) -> Option<Arc<InboundPolicy>> {
        match self.content(Kind::Listener, INBOUND)? {
            Content::Value(Decoded::Inbound(policy)) => Some(policy.clone()),
            _ => None,
        }
    }

    /// A cluster and its endpoints, once both were told. Endpoints said to be absent are none.
    pub(super) fn cluster(&self, name: &str) -> Option<ClusterParts<'_>> {
        let (cluster, endpoints) = (self.held(Kind::Cluster, name)?, self.held(Kind::Endpoints, name)?);
        let Content::Value(Decoded::Cluster(head)) = &cluster.content else { return None };
        let endpoints_now: &[Endpoint] = match &endpoints.content {
            Content::Value(Decoded::Endpoints(found)) => found,
            _ => &[],
        };
        let generation = cluster.generation.max(endpoints.generation);
        Some(ClusterParts { head, endpoints: endpoints_now, generation })
    }

    /// Takes in one resource, and gives it back when it is new. What nobody asked for is not kept.
    pub(super) fn take(&mut self, kind: Kind, resource: &Resource) -> Result<Option<Decoded>, DecodeError> {
        let Some(name) = self.stores[kind as usize].subscribed.get(resource.name.as_str()).cloned() else {
            return Ok(None);
        };
        let payload = resource.resource.as_ref().ok_or(DecodeError::Missing("resource"))?;
        let decoded = decode::resource(kind, &name, payload)?;
        let before = self.held(kind, &name).map_or(0, |held| held.bytes);
        let all = self.bytes - before + payload.value.len();
        if all > MAX_BYTES {
            return Err(DecodeError::TooMany { what: "bytes in all", count: all, most: MAX_BYTES });
        }
        self.bytes = all;
        self.clock += 1;
        self.mesh_changed |= matches!(decoded, Decoded::Mesh(_) | Decoded::Inbound(_));
        let held = Held {
            version: resource.version.clone(),
            content: Content::Value(decoded.clone()),
            generation: self.clock,
            bytes: payload.value.len(),
        };
        self.stores[kind as usize].held.insert(name, held);
        Ok(Some(decoded))
    }

    /// A name that stands for nothing, or no longer. What the mesh is, whom it trusts and who may call is never taken back.
    pub(super) fn remove(&mut self, kind: Kind, name: &str) {
        if kind == Kind::Secret || (kind == Kind::Listener && [MESH, INBOUND].contains(&name)) {
            return;
        }
        let Some(name) = self.stores[kind as usize].subscribed.get(name).cloned() else { return };
        self.bytes -= self.held(kind, &name).map_or(0, |held| held.bytes);
        self.clock += 1;
        let held = Held { version: String::new(), content: Content::Absent, generation: self.clock, bytes: 0 };
        self.stores[kind as usize].held.insert(name, held);
    }

    /// Forgets what is not in `names`.
    pub(super) fn keep_only(&mut self, kind: Kind, names: &BTreeSet<Arc<str>>) {
        let bytes = &mut self.bytes;
        self.stores[kind as usize].held.retain(|name, held| {
            let stays = names.contains(name);
            if !stays {
                *bytes -= held.bytes;
            }
            stays
        });
    }
}

impl Store {
    /// The versions held, by name.
    pub(super) fn versions(&self) -> HashMap<String, String> {
        let held = self.held.iter().filter(|(_, held)| matches!(held.content, Content::Value(_)));
        held.map(|(name, held)| (name.to_string(), held.version.clone())).collect()
    }
}
