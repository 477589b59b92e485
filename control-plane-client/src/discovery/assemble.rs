//! PURE: destinations, put together of what was told.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::store::Stores;
use crate::model::{Cluster, ClusterName, Destination, Resolution, ServicePort};
use crate::xds::Kind;
use crate::xds::decode::{Listener, Routes};

/// What was put together of the parts, kept so that what is equal stays one value.
#[derive(Default)]
pub(super) struct Built {
    clusters: HashMap<ClusterName, (u64, Arc<Cluster>)>,
    destinations: HashMap<ServicePort, Arc<Destination>>,
}

/// All that a destination is made of.
pub(super) struct Parts<'a> {
    listener: &'a Listener,
    routes: Option<&'a Routes>,
    default_cluster: &'a ClusterName,
    /// The newest of them.
    generation: u64,
}

impl<'a> Parts<'a> {
    /// `None`: something is missing yet.
    ///
    /// Looked up for every target whenever anything is told, and therefore without an allocation.
    pub(super) fn of(stores: &'a Stores, name: &str, listener: &'a Listener) -> Option<Self> {
        let mut generation = stores.generation(Kind::Listener, name);
        let (routes, default_cluster) = match (&listener.routes, &listener.opaque) {
            (Some(name), _) => {
                let routes = stores.routes(name)?;
                generation = generation.max(stores.generation(Kind::Routes, name));
                (Some(routes), &routes.default_cluster)
            }
            (None, Some(cluster)) => (None, cluster),
            (None, None) => return None,
        };
        let mut parts = Self { listener, routes, default_cluster, generation };
        for name in parts.clusters() {
            generation = generation.max(stores.cluster(name)?.generation);
        }
        parts.generation = generation;
        Some(parts)
    }

    /// Some more than once.
    fn clusters(&self) -> impl Iterator<Item = &'a ClusterName> {
        self.listener.clusters().chain(self.routes.into_iter().flat_map(Routes::clusters))
    }

    /// `None`: nothing is newer than `generation`.
    pub(super) fn build(&self, built: &mut Built, stores: &Stores, generation: u64) -> Option<(u64, Resolution)> {
        if self.generation <= generation {
            return None;
        }
        let clusters = self.clusters().filter_map(|name| Some((name.clone(), built.cluster(stores, name)?)));
        let destination = Destination {
            name: self.listener.name.clone(),
            trust_domain: self.listener.trust_domain.clone(),
            protocol: self.listener.protocol,
            rules: self.routes.map(|routes| routes.rules.clone()).unwrap_or_default(),
            connections: self.listener.connections.clone(),
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
        let cluster = Cluster {
            name: name.clone(),
            service: parts.head.service.clone(),
            endpoints: parts.endpoints.to_vec(),
            external: parts.head.external.clone(),
            policy: parts.head.policy.clone(),
        };
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
