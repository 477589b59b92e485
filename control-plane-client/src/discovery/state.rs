//! PURE: what was asked, what was answered, and what follows from both. Time comes in as an argument.
//!
//! A target leads to a Listener, that to routes, those to clusters, and those to endpoints. The names can not form a circle,
//! because each kind names only the next. A destination is published when all its parts are there; until then the one
//! before stays, with its endpoints kept fresh (make before break).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use envoy_types::pb::google::rpc;

use super::assemble::{Built, Parts, refresh};
use super::snapshot::{Entry, Snapshot, Used};
use super::store::{Content, Stores};
use super::{MAX_TARGETS, PATIENCE};
use crate::model::{ClusterName, Resolution, Target};
use crate::xds::decode::Decoded;
use crate::xds::{INBOUND, Kind, MESH, ROOT_CA, shown};

/// A destination that nobody asked for this long is forgotten.
const IDLE: Duration = Duration::from_secs(10 * 60);
/// The same for "no part of the mesh", and for what has no answer.
const IDLE_OUTSIDE: Duration = Duration::from_secs(60);
/// Clusters known at once, four for each target.
const MAX_CLUSTERS: usize = 4 * MAX_TARGETS;
/// How many reasons a refusal names.
const MAX_REASONS: usize = 5;

/// Everything discovery knows.
#[derive(Default)]
pub(super) struct State {
    targets: HashMap<Target, Wanted>,
    stores: Stores,
    built: Built,
    /// The subscriptions may no longer be what is wanted.
    replan: bool,
}

/// One target that somebody asked for.
struct Wanted {
    /// The Listener's name.
    name: Arc<str>,
    used: Used,
    last_used: Instant,
    /// The newest part that `answer` is made of.
    generation: u64,
    answer: Option<Resolution>,
}

/// What came of an answer.
pub(super) struct Verdict {
    /// What to send back. It names no node.
    pub(super) reply: DeltaDiscoveryRequest,
    /// Why it was refused, if it was.
    pub(super) refused: Option<String>,
    /// It said what the mesh is.
    pub(super) told_mesh: bool,
}

/// Too many targets.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

impl State {
    /// Somebody asks for a target.
    pub(super) fn want(&mut self, target: &Target, now: Instant) -> Result<(), Full> {
        if let Some(wanted) = self.targets.get(target) {
            wanted.used.mark();
            return Ok(());
        }
        if self.targets.len() >= MAX_TARGETS && !self.make_room(now) {
            return Err(Full);
        }
        let wanted = Wanted {
            name: target.to_string().into(),
            used: Used::default(),
            last_used: now,
            generation: 0,
            answer: None,
        };
        self.targets.insert(target.clone(), wanted);
        self.replan = true;
        Ok(())
    }

    /// What is known about a target.
    pub(super) fn answer(&self, target: &Target) -> Option<&Resolution> {
        self.targets.get(target)?.answer.as_ref()
    }

    /// The first requests of a new stream: everything wanted, and what of it is held already.
    pub(super) fn begin(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.replan = false;
        let wanted = self.wanted();
        let mut requests = Vec::new();
        for (kind, names) in Kind::ALL.into_iter().zip(wanted) {
            self.stores.keep_only(kind, &names);
            let store = self.stores.of_mut(kind);
            store.subscribed = names;
            if store.subscribed.is_empty() {
                continue;
            }
            requests.push(DeltaDiscoveryRequest {
                type_url: kind.type_url().to_string(),
                resource_names_subscribe: store.subscribed.iter().map(|name| name.to_string()).collect(),
                // The bundle is always told anew: its acknowledgement is how the control plane knows that we hold it,
                // and the one before may have been lost with its stream.
                initial_resource_versions: if kind == Kind::Secret { HashMap::new() } else { store.versions() },
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// What to subscribe to and to let go of, on a stream that is up.
    pub(super) fn plan(&mut self) -> Vec<DeltaDiscoveryRequest> {
        if !std::mem::take(&mut self.replan) {
            return Vec::new();
        }
        let wanted = self.wanted();
        let mut requests = Vec::new();
        for (kind, names) in Kind::ALL.into_iter().zip(wanted) {
            let store = self.stores.of_mut(kind);
            let text = |names: Vec<&Arc<str>>| names.into_iter().map(|name| name.to_string()).collect::<Vec<_>>();
            let subscribe = text(names.difference(&store.subscribed).collect());
            let unsubscribe = text(store.subscribed.difference(&names).collect());
            if subscribe.is_empty() && unsubscribe.is_empty() {
                continue;
            }
            self.stores.keep_only(kind, &names);
            self.stores.of_mut(kind).subscribed = names;
            requests.push(DeltaDiscoveryRequest {
                type_url: kind.type_url().to_string(),
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                ..DeltaDiscoveryRequest::default()
            });
        }
        requests
    }

    /// Takes in an answer. What is good in it is kept, what is not is named in the refusal, and the last good one stays.
    ///
    /// `install` puts a trust bundle in force, or says why it can not.
    pub(super) fn receive(
        &mut self,
        response: DeltaDiscoveryResponse,
        install: &mut dyn FnMut(&str) -> Result<(), String>,
    ) -> Verdict {
        let mut reply = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        let mut told_mesh = false;
        let mut wrong = Vec::new();
        match Kind::of_type_url(&response.type_url) {
            Some(kind) => {
                told_mesh = kind == Kind::Listener && response.resources.iter().any(|resource| resource.name == MESH);
                self.take_in(kind, response, install, &mut wrong);
            }
            None => wrong.push(format!("`{}` was not asked for", shown(&response.type_url, 80))),
        }
        let refused = (!wrong.is_empty()).then(|| summary(&wrong));
        reply.error_detail = refused.as_ref().map(|reason| rpc::Status {
            code: tonic::Code::InvalidArgument as i32,
            message: reason.clone(),
            ..rpc::Status::default()
        });
        Verdict { reply, refused, told_mesh }
    }

    fn take_in(
        &mut self,
        kind: Kind,
        response: DeltaDiscoveryResponse,
        install: &mut dyn FnMut(&str) -> Result<(), String>,
        wrong: &mut Vec<String>,
    ) {
        for resource in &response.resources {
            let outcome = self.stores.take(kind, resource);
            let outcome = outcome.map_err(|error| error.to_string()).and_then(|decoded| match decoded {
                Some(Decoded::RootCa(pem)) => install(&pem),
                _ => Ok(()),
            });
            if let Err(reason) = outcome {
                wrong.push(format!("{}: {reason}", shown(&resource.name, 120)));
            }
        }
        let not_found = response.resource_errors.iter().filter(|error| {
            error.error_detail.as_ref().is_some_and(|detail| detail.code == tonic::Code::NotFound as i32)
        });
        let not_found = not_found.filter_map(|error| error.resource_name.as_ref()).map(|name| name.name.as_str());
        let removed = response.removed_resources.iter().map(String::as_str);
        let removed = removed.chain(response.removed_resource_names.iter().map(|name| name.name.as_str()));
        for name in removed.chain(not_found) {
            self.stores.remove(kind, name);
        }
        // Endpoints lead nowhere further.
        self.replan |= kind != Kind::Endpoints;
    }

    /// Puts together what can be. Says whether any answer changed, or what the mesh is.
    pub(super) fn assemble(&mut self) -> bool {
        let mut changed = std::mem::take(&mut self.stores.mesh_changed);
        for wanted in self.targets.values_mut() {
            let (stores, built) = (&self.stores, &mut self.built);
            let next = match stores.content(Kind::Listener, &wanted.name) {
                None => None,
                Some(Content::Absent) => Some((stores.generation(Kind::Listener, &wanted.name), Resolution::NotMesh)),
                Some(Content::Value(Decoded::Listener(listener))) => match Parts::of(stores, &wanted.name, listener) {
                    Some(parts) => parts.build(built, stores, wanted.generation),
                    None => match &wanted.answer {
                        Some(Resolution::Mesh(published)) => refresh(published, built, stores, wanted.generation),
                        Some(Resolution::NotMesh) | None => None,
                    },
                },
                Some(Content::Value(_)) => None,
            };
            let Some((generation, resolution)) = next else { continue };
            wanted.generation = generation;
            if wanted.answer.as_ref() != Some(&resolution) {
                // Clusters that were held only for what is replaced now can be let go of.
                self.replan |= leads_elsewhere(wanted.answer.as_ref(), &resolution);
                wanted.answer = Some(resolution);
                changed = true;
            }
        }
        changed
    }

    /// Forgets what nobody asked for lately. Says whether that changed anything.
    pub(super) fn sweep(&mut self, now: Instant) -> bool {
        let before = self.targets.len();
        self.targets.retain(|_, wanted| {
            if wanted.used.take() {
                wanted.last_used = now;
            }
            let patience = match wanted.answer {
                Some(Resolution::Mesh(_)) => IDLE,
                Some(Resolution::NotMesh) | None => IDLE_OUTSIDE,
            };
            now.saturating_duration_since(wanted.last_used) < patience
        });
        let changed = self.targets.len() != before;
        self.replan |= changed;
        self.built.forget_unused(&self.stores);
        changed
    }

    /// Everything known, to be read.
    pub(super) fn snapshot(&self) -> Snapshot {
        let since = tokio::time::Instant::now();
        let known = self.targets.iter().filter_map(|(target, wanted)| {
            let resolution = wanted.answer.clone()?;
            Some((target.clone(), Entry { resolution, used: wanted.used.clone(), since }))
        });
        Snapshot { entries: known.collect(), mesh: self.stores.mesh(), inbound: self.stores.inbound() }
    }

    /// "Not in the mesh" gives way to a newcomer, and so does what nobody waits for any more: an app that talks to
    /// thousands of strangers must not lose the mesh.
    fn make_room(&mut self, now: Instant) -> bool {
        let outside = |wanted: &Wanted| match wanted.answer {
            Some(Resolution::Mesh(_)) => false,
            Some(Resolution::NotMesh) => true,
            None => now.saturating_duration_since(wanted.last_used) > PATIENCE,
        };
        let mut ages: Vec<Instant> = self.targets.values().filter(|w| outside(w)).map(|w| w.last_used).collect();
        if ages.is_empty() {
            return false;
        }
        // An eighth at a time, so that the search is not paid for by every newcomer.
        let most = (MAX_TARGETS / 8).min(ages.len());
        let (_, youngest, _) = ages.select_nth_unstable(most - 1);
        let (youngest, mut left) = (*youngest, most);
        self.targets.retain(|_, wanted| {
            let goes = left > 0 && outside(wanted) && wanted.last_used <= youngest;
            left -= usize::from(goes);
            !goes
        });
        self.replan = true;
        true
    }

    /// The names of each kind that what is wanted leads to, in the order of [`Kind::ALL`].
    fn wanted(&self) -> [BTreeSet<Arc<str>>; 5] {
        let listeners =
            self.targets.values().map(|wanted| wanted.name.clone()).chain([MESH.into(), INBOUND.into()]).collect();
        let mut routes = BTreeSet::new();
        let mut clusters: BTreeSet<ClusterName> = BTreeSet::new();
        for wanted in self.targets.values() {
            let Some(listener) = self.stores.listener(&wanted.name) else { continue };
            clusters.extend(listener.clusters().cloned());
            if let Some(name) = &listener.routes {
                routes.insert(name.clone());
                clusters.extend(self.stores.routes(name).into_iter().flat_map(|routes| routes.clusters()).cloned());
            }
            // What is published stays fresh until what comes after it is complete.
            if let Some(Resolution::Mesh(published)) = &wanted.answer
                && Parts::of(&self.stores, &wanted.name, listener).is_none()
            {
                clusters.extend(published.clusters.keys().cloned());
            }
        }
        if clusters.len() > MAX_CLUSTERS {
            tracing::warn!(clusters = clusters.len(), most = MAX_CLUSTERS, "destinations lead to too many clusters");
            clusters = clusters.into_iter().take(MAX_CLUSTERS).collect();
        }
        [BTreeSet::from([ROOT_CA.into()]), listeners, routes, clusters.clone(), clusters]
    }
}

fn leads_elsewhere(before: Option<&Resolution>, now: &Resolution) -> bool {
    match (before, now) {
        (Some(Resolution::Mesh(before)), Resolution::Mesh(now)) => !before.clusters.keys().eq(now.clusters.keys()),
        (Some(Resolution::Mesh(_)), Resolution::NotMesh) => true,
        (Some(Resolution::NotMesh) | None, _) => false,
    }
}

fn summary(wrong: &[String]) -> String {
    let mut text = wrong.iter().take(MAX_REASONS).cloned().collect::<Vec<_>>().join("; ");
    if wrong.len() > MAX_REASONS {
        text.push_str(&format!("; and {} more", wrong.len() - MAX_REASONS));
    }
    text
}
