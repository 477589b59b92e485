//! What one stream subscribed to and what it was last told. PURE: a view of the mesh in, responses out.
//!
//! Nothing is queued here: a slow reader's changes melt into one, because what goes out is the difference between what
//! the mesh is now and what the stream was told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use envoy_types::pb::google::protobuf::Any;
use prost::Message;
use sheetbend_control_plane_client::xds::{Kind, ROOT_CA};

use super::view::{Basis, View};

/// Targets of one proxy, and some to spare: proxies keep 4,096.
const MAX_LISTENERS: usize = 5_000;
/// Clusters of as many targets, four for each.
const MAX_OTHERS: usize = 20_000;
/// Longer than any name of ours: a host of 253 bytes, an address, and what is between.
const MAX_NAME: usize = 512;
/// A response is cut there; gRPC takes 4 MiB by default.
const MAX_RESPONSE: usize = 1 << 20;

/// Make before break: what others point at is told first.
pub(crate) const ORDER: [Kind; 5] = [Kind::Secret, Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Routes];

/// Why a stream is ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Excess {
    #[error("more than {most} subscriptions to {kind:?} on one stream")]
    Names { kind: Kind, most: usize },
    #[error("a resource name of {0} bytes; {MAX_NAME} are the most")]
    Name(usize),
}

/// What a stream was told about one name.
#[derive(Clone, Debug, Default)]
enum Known {
    /// Nothing yet: it waits for its first answer.
    #[default]
    Nothing,
    Absent,
    Present {
        version: String,
        basis: Option<Basis>,
    },
}

/// One kind's subscriptions.
#[derive(Debug, Default)]
struct Subscribed {
    names: BTreeMap<Arc<str>, Known>,
    wildcard: bool,
    asked: bool,
    /// The newest response.
    nonce: String,
    /// The bundle in it, for the trust bundle's ACK.
    pending: Option<String>,
    /// State of the world: what the newest response said.
    world_version: Option<String>,
    acked: u64,
    nacked: u64,
    last_error: Option<String>,
}

/// What the admin shows of one kind on one stream.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(crate) struct Told {
    pub(crate) subscribed: usize,
    pub(crate) acknowledged: u64,
    pub(crate) refused: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_refusal: Option<String>,
}

/// One stream's state.
#[derive(Debug, Default)]
pub(crate) struct Session {
    kinds: BTreeMap<Kind, Subscribed>,
    counter: u64,
    /// The version of the trust bundle that the proxy says it holds.
    pub(crate) holds_roots: Option<String>,
}

impl Session {
    pub(crate) fn told(&self, kind: Kind) -> Told {
        self.kinds.get(&kind).map_or_else(Told::default, |subscribed| Told {
            subscribed: subscribed.names.len(),
            acknowledged: subscribed.acked,
            refused: subscribed.nacked,
            last_refusal: subscribed.last_error.clone(),
        })
    }

    /// Whether anything of this kind was ever asked for.
    pub(crate) fn asks_for(&self, kind: Kind) -> bool {
        self.kinds.contains_key(&kind)
    }

    /// Takes in an incremental request, and gives what it is answered with at once.
    pub(crate) fn on_delta(
        &mut self,
        kind: Kind,
        request: DeltaDiscoveryRequest,
        view: &View<'_>,
    ) -> Result<Vec<DeltaDiscoveryResponse>, Excess> {
        self.acknowledge(kind, &request.response_nonce, request.error_detail.map(|e| e.message));
        let subscribed = self.kinds.entry(kind).or_default();
        let first = !std::mem::replace(&mut subscribed.asked, true);
        // A first request that names nothing means everything (xDS protocol, "wildcard").
        let implied =
            first && request.resource_names_subscribe.is_empty() && matches!(kind, Kind::Listener | Kind::Cluster);
        let mut fresh = Vec::new();
        for name in request.resource_names_subscribe {
            if name == "*" {
                subscribed.wildcard = true;
                continue;
            }
            let name = checked(name)?;
            // Asking again means: say it again.
            subscribed.names.insert(name.clone(), Known::Nothing);
            fresh.push(name);
        }
        if implied || subscribed.wildcard {
            let newly = !subscribed.wildcard || first;
            subscribed.wildcard = true;
            if newly {
                fresh.extend(subscribed.adopt(kind, view));
            }
        }
        for (name, version) in request.initial_resource_versions {
            if let Some(told) = subscribed.names.get_mut(name.as_str()) {
                *told = Known::Present { version, basis: None };
            } else if subscribed.wildcard {
                subscribed.names.insert(checked(name)?, Known::Present { version, basis: None });
            }
        }
        for name in request.resource_names_unsubscribe {
            match name == "*" {
                true => subscribed.wildcard = false,
                false => drop(subscribed.names.remove(name.as_str())),
            }
        }
        let most = if kind == Kind::Listener { MAX_LISTENERS } else { MAX_OTHERS };
        if subscribed.names.len() > most {
            return Err(Excess::Names { kind, most });
        }
        Ok(self.delta(kind, Some(fresh), view, Part::All))
    }

    /// Everything that changed since, in the order in which it is safe to apply.
    pub(crate) fn changes_delta(&mut self, view: &View<'_>) -> Vec<DeltaDiscoveryResponse> {
        let mut responses = Vec::new();
        for kind in ORDER {
            let part = if kind == Kind::Cluster || kind == Kind::Endpoints { Part::Additions } else { Part::All };
            responses.extend(self.delta(kind, None, view, part));
        }
        // Clusters go last: until now a route may have pointed at them.
        for kind in [Kind::Endpoints, Kind::Cluster] {
            responses.extend(self.delta(kind, None, view, Part::Removals));
        }
        responses
    }

    fn delta(
        &mut self,
        kind: Kind,
        fresh: Option<Vec<Arc<str>>>,
        view: &View<'_>,
        part: Part,
    ) -> Vec<DeltaDiscoveryResponse> {
        let Some(subscribed) = self.kinds.get_mut(&kind) else { return Vec::new() };
        if fresh.is_none() && subscribed.wildcard {
            subscribed.adopt(kind, view);
        }
        let names = fresh.unwrap_or_else(|| subscribed.names.keys().cloned().collect());
        let mut batch = Batch::default();
        let mut pending = None;
        for name in names {
            let Some(told) = subscribed.names.get_mut(&name) else { continue };
            match (view.find(kind, &name), &*told) {
                (None, Known::Absent) => {}
                (None, Known::Nothing | Known::Present { .. }) if part != Part::Additions => {
                    batch.removed(name.to_string());
                    // Of a wildcard's names the gone ones are forgotten, or they would pile up.
                    match subscribed.wildcard {
                        true => drop(subscribed.names.remove(&name)),
                        false => *told = Known::Absent,
                    }
                }
                (Some(found), Known::Present { basis: Some(basis), .. }) if found.same(basis) => {}
                (Some(found), before) if part != Part::Removals => {
                    let version = view.version(kind, &found);
                    let known = matches!(before, Known::Present { version: old, .. } if *old == version);
                    if !known {
                        batch.resource(Resource {
                            name: name.to_string(),
                            version: version.clone(),
                            resource: Some(view.encode(kind, &name, &found)),
                            ..Resource::default()
                        });
                    }
                    if kind == Kind::Secret && &*name == ROOT_CA {
                        match known {
                            true => self.holds_roots = Some(version.clone()),
                            false => pending = Some(version.clone()),
                        }
                    }
                    *told = Known::Present { version, basis: Some(found) };
                }
                _ => {}
            }
        }
        let mut responses = batch.responses;
        for response in &mut responses {
            self.counter += 1;
            response.nonce = self.counter.to_string();
            response.type_url = kind.type_url().to_string();
            response.system_version_info = view.number().to_string();
            subscribed.nonce.clone_from(&response.nonce);
        }
        if pending.is_some() {
            subscribed.pending = pending;
        }
        responses
    }

    /// Takes in a state-of-the-world request, and gives what it is answered with at once.
    pub(crate) fn on_world(
        &mut self,
        kind: Kind,
        request: DiscoveryRequest,
        view: &View<'_>,
    ) -> Result<Option<DiscoveryResponse>, Excess> {
        let subscribed = self.kinds.entry(kind).or_default();
        // An answer to something that is no longer the newest says nothing about what is wanted now.
        if !request.response_nonce.is_empty() && request.response_nonce != subscribed.nonce {
            return Ok(None);
        }
        let names: BTreeSet<Arc<str>> =
            request.resource_names.into_iter().filter(|name| name != "*").map(checked).collect::<Result<_, _>>()?;
        let most = if kind == Kind::Listener { MAX_LISTENERS } else { MAX_OTHERS };
        if names.len() > most {
            return Err(Excess::Names { kind, most });
        }
        let first = !std::mem::replace(&mut subscribed.asked, true);
        if first && names.is_empty() {
            subscribed.wildcard = true;
        } else if !names.is_empty() {
            subscribed.wildcard = false;
        }
        let wanted =
            subscribed.names.len() == names.len() && names.iter().all(|name| subscribed.names.contains_key(name));
        if !wanted {
            subscribed.names = names.into_iter().map(|name| (name, Known::Nothing)).collect();
            subscribed.world_version = None;
        }
        self.acknowledge(kind, &request.response_nonce, request.error_detail.map(|e| e.message));
        Ok(self.world(kind, view))
    }

    /// Everything that changed since, in the order in which it is safe to apply.
    pub(crate) fn changes_world(&mut self, view: &View<'_>) -> Vec<DiscoveryResponse> {
        ORDER.into_iter().filter_map(|kind| self.world(kind, view)).collect()
    }

    fn world(&mut self, kind: Kind, view: &View<'_>) -> Option<DiscoveryResponse> {
        let subscribed = self.kinds.get_mut(&kind).filter(|s| s.asked)?;
        let names: Vec<Arc<str>> = match subscribed.wildcard {
            true => view.all(kind),
            false => subscribed.names.keys().cloned().collect(),
        };
        let mut versions = String::new();
        let mut found: Vec<(Arc<str>, Basis)> = Vec::new();
        for name in names {
            // Someone who waits for endpoints must hear that there are none.
            let basis = view.find(kind, &name).or_else(|| view.nothing(kind, &name));
            if let Some(basis) = basis {
                versions.push_str(&format!("{name}={};", view.version(kind, &basis)));
                found.push((name, basis));
            }
        }
        let version = super::view::digest(&versions);
        if subscribed.world_version.as_ref() == Some(&version) {
            return None;
        }
        // Routes and endpoints that are missing are not told by leaving them out; nothing is worth saying.
        if found.is_empty() && subscribed.world_version.is_none() && !matches!(kind, Kind::Listener | Kind::Cluster) {
            return None;
        }
        let resources: Vec<Any> = found.iter().map(|(name, basis)| view.encode(kind, name, basis)).collect();
        if kind == Kind::Secret {
            subscribed.pending =
                found.iter().find(|(name, _)| &**name == ROOT_CA).map(|(_, basis)| view.version(kind, basis));
        }
        subscribed.world_version = Some(version.clone());
        self.counter += 1;
        subscribed.nonce = self.counter.to_string();
        Some(DiscoveryResponse {
            version_info: version,
            resources,
            type_url: kind.type_url().to_string(),
            nonce: subscribed.nonce.clone(),
            ..DiscoveryResponse::default()
        })
    }

    fn acknowledge(&mut self, kind: Kind, nonce: &str, error: Option<String>) {
        if nonce.is_empty() {
            return;
        }
        let subscribed = self.kinds.entry(kind).or_default();
        match error {
            Some(error) => {
                subscribed.nacked += 1;
                subscribed.last_error = Some(error.chars().take(500).collect());
                // What was refused is not held. It is not sent again either until it changes.
                if nonce == subscribed.nonce {
                    subscribed.pending = None;
                }
            }
            None => {
                subscribed.acked += 1;
                if nonce == subscribed.nonce
                    && let Some(roots) = subscribed.pending.take()
                {
                    self.holds_roots = Some(roots);
                }
            }
        }
    }
}

impl Subscribed {
    /// Takes up what a wildcard means now. Gives the new names.
    fn adopt(&mut self, kind: Kind, view: &View<'_>) -> Vec<Arc<str>> {
        let new: Vec<Arc<str>> = view.all(kind).into_iter().filter(|name| !self.names.contains_key(name)).collect();
        self.names.extend(new.iter().map(|name| (name.clone(), Known::Nothing)));
        new
    }
}

/// What of a difference is told now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Additions,
    Removals,
}

/// Responses that are cut before they grow too large.
#[derive(Default)]
struct Batch {
    responses: Vec<DeltaDiscoveryResponse>,
    size: usize,
}

impl Batch {
    fn room_for(&mut self, size: usize) -> Option<&mut DeltaDiscoveryResponse> {
        if self.responses.is_empty() || self.size + size > MAX_RESPONSE {
            self.responses.push(DeltaDiscoveryResponse::default());
            self.size = 0;
        }
        self.size += size;
        self.responses.last_mut()
    }

    fn resource(&mut self, resource: Resource) {
        let size = resource.encoded_len();
        if let Some(response) = self.room_for(size) {
            response.resources.push(resource);
        }
    }

    fn removed(&mut self, name: String) {
        if let Some(response) = self.room_for(name.len()) {
            response.removed_resources.push(name);
        }
    }
}

fn checked(name: String) -> Result<Arc<str>, Excess> {
    match name.len() <= MAX_NAME {
        true => Ok(name.into()),
        false => Err(Excess::Name(name.len())),
    }
}
