//! PURE: destinations, put together of what was told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::store::Stores;
use crate::model::{Cluster, ClusterName, Destination, Resolution, Rule, ServicePort};
use crate::xds::Kind;
use crate::xds::decode::Listener;

/// What was put together of the parts, kept so that what is equal stays one value.
#[derive(Default)]
pub(super) struct Built {
    clusters: HashMap<ClusterName, (u64, Arc<Cluster>)>,
    destinations: HashMap<ServicePort, Arc<Destination>>,
}

/// All that a destination is made of.
pub(super) struct Parts<'a> {
    listener: &'a Listener,
    rules: &'a [Rule],
    default_cluster: &'a ClusterName,
    clusters: BTreeSet<&'a ClusterName>,
    /// The newest of them.
    generation: u64,
}

impl<'a> Parts<'a> {
    /// `None`: something is missing yet.
    pub(super) fn of(stores: &'a Stores, name: &str, listener: &'a Listener) -> Option<Self> {
        let mut generation = stores.generation(Kind::Listener, name);
        let mut clusters: BTreeSet<&ClusterName> = listener.opaque.iter().collect();
        let (rules, default_cluster) = match (&listener.routes, &listener.opaque) {
            (Some(name), _) => {
                let routes = stores.routes(name)?;
                generation = generation.max(stores.generation(Kind::Routes, name));
                clusters.extend(routes.clusters());
                (&routes.rules[..], &routes.default_cluster)
            }
            (None, Some(cluster)) => (&[][..], cluster),
            (None, None) => return None,
        };
        for name in &clusters {
            generation = generation.max(stores.cluster(name)?.generation);
        }
        Some(Self { listener, rules, default_cluster, clusters, generation })
    }

    /// `None`: nothing is newer than `generation`.
    pub(super) fn build(&self, built: &mut Built, stores: &Stores, generation: u64) -> Option<(u64, Resolution)> {
        if self.generation <= generation {
            return None;
        }
        let clusters = self.clusters.iter().filter_map(|name| Some(((*name).clone(), built.cluster(stores, name)?)));
        let destination = Destination {
            name: self.listener.name.clone(),
            trust_domain: self.listener.trust_domain.clone(),
            protocol: self.listener.protocol,
            rules: self.rules.to_vec(),
            default_cluster: self.default_cluster.clone(),
            clusters: clusters.collect(),
        };
        Some((self.generation, Resolution::Mesh(built.destination(destination))))
    }
}

impl Built {
    /// Forgets what is in nobody's snapshot any more, and what nobody is told of.
    pub(super) fn forget_unused(&mut self, stores: &Stores) {
        self.destinations.retain(|_, destination| Arc::strong_count(destination) > 1);
        self.clusters.retain(|name, _| stores.content(Kind::Cluster, name).is_some());
    }

    fn cluster(&mut self, stores: &Stores, name: &ClusterName) -> Option<Arc<Cluster>> {
        let parts = stores.cluster(name)?;
        if let Some((generation, cluster)) = self.clusters.get(name)
            && *generation == parts.generation
        {
            return Some(cluster.clone());
        }
        let cluster =
            Cluster { name: name.clone(), service: parts.service.clone(), endpoints: parts.endpoints.to_vec() };
        let cluster = match self.clusters.get(name) {
            Some((_, same)) if **same == cluster => same.clone(),
            _ => Arc::new(cluster),
        };
        self.clusters.insert(name.clone(), (parts.generation, cluster.clone()));
        Some(cluster)
    }

    fn destination(&mut self, destination: Destination) -> Arc<Destination> {
        match self.destinations.get(&destination.name) {
            Some(same) if **same == destination => same.clone(),
            _ => {
                let destination = Arc::new(destination);
                self.destinations.insert(destination.name.clone(), destination.clone());
                destination
            }
        }
    }
}

/// What is published, with the endpoints of now: its successor is not complete yet. `None`: none is newer than `generation`.
pub(super) fn refresh(
    published: &Destination,
    built: &mut Built,
    stores: &Stores,
    generation: u64,
) -> Option<(u64, Resolution)> {
    let newest =
        published.clusters.keys().filter_map(|name| stores.cluster(name)).map(|parts| parts.generation).max()?;
    if newest <= generation {
        return None;
    }
    let now = |(name, old): (&ClusterName, &Arc<Cluster>)| {
        (name.clone(), built.cluster(stores, name).unwrap_or_else(|| old.clone()))
    };
    let clusters: BTreeMap<_, _> = published.clusters.iter().map(now).collect();
    let destination = Destination { clusters, ..published.clone() };
    Some((newest, Resolution::Mesh(built.destination(destination))))
}
