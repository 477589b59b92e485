//! The mesh in the words of one dialect, as one peer sees it.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest as sha256};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::{Any, Value, value};
use envoy_types::util::pack_any;
use sheetbend_control_plane_client::model::{
    AppProtocol, Cluster, Destination, InboundPolicy, Mesh, ServiceName, ServicePort, Target,
};
use sheetbend_control_plane_client::xds::{INBOUND, Kind, MESH, ROOT_CA, encode};

use super::{envoy, grpc};
use crate::trust::Trust;
use crate::world::{ClusterEntry, World};

/// Whose words a stream speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Ours.
    Sheetbend,
    /// gRPC's own client. It may name the provider of its certificates, and then speaks mutual TLS itself.
    Grpc { certificates: Option<Arc<str>> },
    /// Envoy, and whoever else takes clusters and routes.
    Envoy,
}

/// In a gRPC client's node metadata: which of its certificate providers to use.
const CERTIFICATE_PROVIDER: &str = "sheetbend.io/certificate-provider";

impl Dialect {
    /// By how the node calls itself.
    pub(crate) fn of(node: &Node) -> Self {
        let agent = node.user_agent_name.to_ascii_lowercase();
        match agent.as_str() {
            agent if agent.starts_with("sheetbend") => Self::Sheetbend,
            agent if agent.starts_with("grpc") => {
                let field = node.metadata.as_ref().and_then(|m| m.fields.get(CERTIFICATE_PROVIDER));
                let certificates = match field {
                    Some(Value { kind: Some(value::Kind::StringValue(name)) }) => Some(name.as_str().into()),
                    _ => None,
                };
                Self::Grpc { certificates }
            }
            _ => Self::Envoy,
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Sheetbend => "sheetbend",
            Self::Grpc { .. } => "grpc",
            Self::Envoy => "envoy",
        }
    }
}

/// What a resource is made from. Equal pointers mean that nothing changed.
#[derive(Clone, Debug)]
pub(crate) enum Basis {
    Destination(Arc<Destination>),
    Cluster(ClusterEntry),
    Mesh(Arc<Mesh>),
    Inbound(Arc<InboundPolicy>),
    Trust(Arc<Trust>),
    /// Every destination, for an Envoy that wants one table of routes.
    Everything(Arc<World>),
}

impl Basis {
    pub(crate) fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Destination(a), Self::Destination(b)) => Arc::ptr_eq(a, b),
            (Self::Cluster(a), Self::Cluster(b)) => Arc::ptr_eq(&a.cluster, &b.cluster) && a.protocol == b.protocol,
            (Self::Mesh(a), Self::Mesh(b)) => Arc::ptr_eq(a, b),
            (Self::Inbound(a), Self::Inbound(b)) => Arc::ptr_eq(a, b),
            (Self::Trust(a), Self::Trust(b)) => Arc::ptr_eq(a, b),
            (Self::Everything(a), Self::Everything(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// The mesh as one stream sees it now.
pub(crate) struct View<'a> {
    pub(crate) dialect: &'a Dialect,
    /// Of the peer: the bare names it uses are its own namespace's first.
    pub(crate) namespace: &'a str,
    /// The service beside it, where its identity is one's.
    pub(crate) service: Option<ServiceName>,
    pub(crate) world: &'a Arc<World>,
    pub(crate) trust: &'a Arc<Trust>,
    pub(crate) number: u64,
}

impl View<'_> {
    /// Which world this is, counted from the start; for the operator's eyes.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// What stands behind a name, if anything does.
    pub(crate) fn find(&self, kind: Kind, name: &str) -> Option<Basis> {
        match kind {
            Kind::Secret => (name == ROOT_CA).then(|| Basis::Trust(self.trust.clone())),
            Kind::Listener if name == MESH => Some(Basis::Mesh(self.world.mesh.clone())),
            Kind::Listener if name == INBOUND => {
                self.service.as_ref().map(|service| Basis::Inbound(self.world.inbound(service)))
            }
            Kind::Listener => self.target(name).map(Basis::Destination),
            Kind::Routes if self.dialect == &Dialect::Envoy && name == envoy::ALL_ROUTES => {
                Some(Basis::Everything(self.world.clone()))
            }
            Kind::Routes => {
                let named = self.world.routes(name);
                let target = || if self.dialect == &Dialect::Sheetbend { None } else { self.target(name) };
                named.or_else(target).map(Basis::Destination)
            }
            Kind::Cluster | Kind::Endpoints => self.world.cluster(name).map(Basis::Cluster),
        }
    }

    /// `web:80`; for others than us also `web`, which means port 80.
    fn target(&self, name: &str) -> Option<Arc<Destination>> {
        let target = name.parse::<Target>();
        let target = match self.dialect {
            Dialect::Sheetbend => target,
            Dialect::Grpc { .. } | Dialect::Envoy => target.or_else(|_| Target::new(name, 80)),
        };
        self.world.resolve(&target.ok()?, self.namespace)
    }

    /// What state-of-the-world peers are told about a name behind which nothing stands.
    pub(crate) fn nothing(&self, kind: Kind, name: &str) -> Option<Basis> {
        if kind != Kind::Endpoints {
            return None;
        }
        let service = ServiceName { service: "".into(), namespace: "".into() };
        let service = ServicePort { service, port: 0 };
        let cluster = Arc::new(Cluster {
            name: name.into(),
            service,
            endpoints: Vec::new(),
            external: None,
            policy: Arc::default(),
        });
        Some(Basis::Cluster(ClusterEntry { cluster, protocol: AppProtocol::Detect }))
    }

    /// Everything of a kind. Our own proxies and gRPC's name what they want.
    pub(crate) fn all(&self, kind: Kind) -> Vec<Arc<str>> {
        match kind {
            Kind::Cluster if self.dialect == &Dialect::Envoy => {
                let mut names: Vec<Arc<str>> = self.world.clusters().map(|entry| entry.cluster.name.clone()).collect();
                names.sort_unstable();
                names
            }
            _ => Vec::new(),
        }
    }

    /// Changes when, and only when, the resource does; the same after a restart.
    pub(crate) fn version(&self, kind: Kind, basis: &Basis) -> String {
        match (kind, basis) {
            (_, Basis::Trust(trust)) => trust.version.clone(),
            (_, Basis::Mesh(mesh)) => encode::version(&**mesh),
            (_, Basis::Inbound(policy)) => encode::version(&**policy),
            (Kind::Listener, Basis::Destination(d)) => {
                encode::version(&(&d.name, &d.trust_domain, d.protocol, &d.connections, &d.default_cluster))
            }
            (_, Basis::Destination(d)) => encode::version(&(&d.name, &d.rules, &d.default_cluster)),
            (Kind::Cluster, Basis::Cluster(entry)) => {
                // Whom to expect is part of a cluster, where they are is not.
                let mut transports: Vec<String> =
                    entry.cluster.endpoints.iter().map(|e| format!("{:?}", e.transport)).collect();
                transports.sort_unstable();
                transports.dedup();
                let cluster = &entry.cluster;
                encode::version(&(
                    &cluster.name,
                    &cluster.service,
                    &cluster.policy,
                    &cluster.external,
                    entry.protocol,
                    transports,
                ))
            }
            (_, Basis::Cluster(entry)) => encode::version(&(&entry.cluster.name, &entry.cluster.endpoints)),
            (_, Basis::Everything(world)) => {
                let all: Vec<_> = world.destinations().map(|d| (&d.name, &d.rules, &d.default_cluster)).collect();
                encode::version(&all)
            }
        }
    }

    /// The resource in this dialect.
    pub(crate) fn encode(&self, kind: Kind, name: &str, basis: &Basis) -> Any {
        match (kind, basis, self.dialect) {
            (_, Basis::Trust(trust), _) => pack_any(encode::root_ca(&trust.pem)),
            (_, Basis::Mesh(mesh), _) => pack_any(encode::mesh(mesh)),
            (_, Basis::Inbound(policy), _) => pack_any(encode::inbound(policy)),
            (Kind::Listener, Basis::Destination(d), Dialect::Grpc { .. }) => pack_any(grpc::listener(name, d)),
            (Kind::Listener, Basis::Destination(d), _) => match name.parse::<Target>() {
                Ok(target) => pack_any(envoy::listener(&target, d)),
                Err(_) => Any::default(),
            },
            (_, Basis::Destination(d), Dialect::Grpc { .. }) => pack_any(grpc::routes(name, d)),
            (_, Basis::Destination(d), Dialect::Sheetbend | Dialect::Envoy) => pack_any(envoy::routes(name, d)),
            (_, Basis::Everything(world), _) => pack_any(envoy::all_routes(world)),
            (Kind::Cluster, Basis::Cluster(entry), dialect) => {
                let cluster = encode::cluster(&entry.cluster, &self.world.mesh.trust_domain, entry.protocol);
                pack_any(match dialect {
                    Dialect::Sheetbend => cluster,
                    Dialect::Envoy => envoy::cluster(cluster),
                    Dialect::Grpc { certificates } => grpc::cluster(cluster, &entry.cluster, certificates.as_deref()),
                })
            }
            (_, Basis::Cluster(entry), _) => pack_any(encode::load_assignment(&entry.cluster)),
        }
    }
}

/// 24 hex digits of a text's SHA-256.
pub(crate) fn digest(text: &str) -> String {
    sha256(&SHA256, text.as_bytes()).as_ref().iter().take(12).map(|b| format!("{b:02x}")).collect()
}
