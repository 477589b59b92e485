//! What an operator writes: a folder of YAML files, checked whole, file by file.
//!
//! - `kinds.rs`: the files' shape. `parse.rs`: one file to resources, or the place and reason of its refusal.
//! - `folder.rs`: the folder as it stands; the last good state of a file stays while the file is bad.
//!
//! A resource that got through is already checked: the types below hold nothing that would have to be doubted again.

mod convert;
mod folder;
mod kinds;
mod parse;
mod precedence;
mod without;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;
use serde_saphyr::Location;
use sheetbend_control_plane_client::model::{
    AppProtocol, BackendPolicy, Fault, HeaderEdits, OutboundPolicy, RulePolicy, ServiceName, Standing, TrafficLimits,
    Transport,
};

pub(crate) use folder::{Folder, GONE};
pub use parse::Problem;
pub(crate) use parse::suggestion;
pub(crate) use precedence::{Rank, Ranked, in_order_of_age};

/// One resource, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Resource {
    Service(Service),
    Slice(Slice),
    Route(Route),
    Backend(Backend),
    Limit(Limit),
    Faults(Faults),
    Settings(Settings),
    Authorization(Authorization),
    Tokens(Tokens),
}

/// A Kubernetes Service.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Service {
    pub(crate) name: ServiceName,
    pub(crate) cluster_ips: Vec<IpAddr>,
    /// Of `type: ExternalName`: a host outside the mesh, lower case.
    pub(crate) external_name: Option<Arc<str>>,
    pub(crate) ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ServicePort {
    pub(crate) name: Arc<str>,
    pub(crate) port: u16,
    pub(crate) target: u16,
    pub(crate) protocol: AppProtocol,
}

/// A Kubernetes EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Slice {
    pub(crate) object: ServiceName,
    pub(crate) service: ServiceName,
    pub(crate) transport: Transport,
    pub(crate) ports: Vec<SlicePort>,
    pub(crate) endpoints: Vec<SliceEndpoint>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SlicePort {
    pub(crate) name: Arc<str>,
    pub(crate) port: u16,
    pub(crate) protocol: AppProtocol,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    pub(crate) workload: Arc<str>,
    pub(crate) standing: Standing,
}

impl Slice {
    /// Every address of one of its ports.
    pub(crate) fn addresses<'a>(
        &'a self,
        port: &'a SlicePort,
    ) -> impl Iterator<Item = (SocketAddr, &'a SliceEndpoint)> + 'a {
        self.endpoints.iter().map(|e| (SocketAddr::new(e.address, port.port), e))
    }
}

/// The Gateway API's kinds for connections as a whole.
pub(crate) const TCP_ROUTE: &str = "TCPRoute";
pub(crate) const TLS_ROUTE: &str = "TLSRoute";

/// A route of requests, or of connections.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    /// `HTTPRoute`, `GRPCRoute`, [`TLS_ROUTE`] or [`TCP_ROUTE`].
    pub(crate) kind: &'static str,
    pub(crate) name: ServiceName,
    pub(crate) created: Option<jiff::Timestamp>,
    pub(crate) parents: Vec<Parent>,
    /// Of a TLSRoute: the server names of the connections that it takes, lower case.
    pub(crate) hostnames: Vec<Arc<str>>,
    /// Of connections: one.
    pub(crate) rules: Vec<RouteRule>,
}

/// Where something stands in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At {
    pub(crate) line: u64,
    pub(crate) column: u64,
}

impl From<Location> for At {
    fn from(at: Location) -> Self {
        Self { line: at.line().max(1), column: at.column().max(1) }
    }
}

/// A Service, or one port of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parent {
    pub(crate) at: At,
    pub(crate) service: ServiceName,
    pub(crate) port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RouteRule {
    pub(crate) at: At,
    /// None means every request.
    pub(crate) matches: Vec<Ranked>,
    pub(crate) backends: Vec<RouteBackend>,
    pub(crate) policy: Arc<RulePolicy>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RouteBackend {
    pub(crate) at: At,
    pub(crate) service: ServiceName,
    pub(crate) port: u16,
    pub(crate) weight: u32,
    pub(crate) headers: HeaderEdits,
}

/// A FaultInjection.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Faults {
    pub(crate) object: ServiceName,
    pub(crate) targets: Vec<FaultTarget>,
    pub(crate) fault: Fault,
}

/// Where faults happen: on every request to a Service (or one port of it), or on those that a route takes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum FaultTarget {
    Service(Parent),
    Route(RouteTarget),
}

/// The Gateway API's kind for what callers of a service keep to.
pub(crate) const BACKEND_TRAFFIC: &str = "XBackendTrafficPolicy";

/// A BackendPolicy or an XBackendTrafficPolicy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Backend {
    /// Which.
    pub(crate) kind: &'static str,
    pub(crate) object: ServiceName,
    /// The Services that it is about.
    pub(crate) targets: Vec<Parent>,
    pub(crate) policy: Arc<BackendPolicy>,
}

/// A TrafficLimit.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Limit {
    pub(crate) object: ServiceName,
    /// The Services whose proxies keep it.
    pub(crate) services: Vec<Parent>,
    /// The routes whose callers' proxies keep it.
    pub(crate) routes: Vec<RouteTarget>,
    pub(crate) limits: TrafficLimits,
}

/// A route that a policy is about.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RouteTarget {
    pub(crate) at: At,
    /// `HTTPRoute` or `GRPCRoute`.
    pub(crate) kind: &'static str,
    pub(crate) name: ServiceName,
}

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Authorization {
    pub(crate) object: ServiceName,
    /// The Services that it is about; none: every one of its namespace.
    pub(crate) targets: Vec<Parent>,
    pub(crate) policy: Arc<sheetbend_control_plane_client::model::AuthorizationPolicy>,
}

/// A RequestAuthentication.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tokens {
    pub(crate) object: ServiceName,
    /// The Services that it is about; none: every one of its namespace.
    pub(crate) targets: Vec<Parent>,
    pub(crate) issuers: Vec<sheetbend_control_plane_client::model::TokenIssuer>,
    /// Where keys are that do not stand here.
    pub(crate) files: Vec<KeyFile>,
}

/// A file with an issuer's keys.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KeyFile {
    /// Which of the issuers.
    pub(crate) issuer: usize,
    /// As it is written; from the resource's own folder.
    pub(crate) path: PathBuf,
    pub(crate) at: At,
}

/// A MeshSettings.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settings {
    pub(crate) object: ServiceName,
    pub(crate) trust_domain: Option<Arc<str>>,
    pub(crate) mesh_ranges: Vec<IpNet>,
    pub(crate) allowed_addresses: Vec<IpNet>,
    pub(crate) outbound_policy: Option<OutboundPolicy>,
    pub(crate) default_inbound_policy: Option<sheetbend_control_plane_client::model::DefaultAccess>,
}

impl Resource {
    /// Puts it into its file, `before` lines below where it was read, and tells its policies where they are written.
    fn place(&mut self, file: &Path, before: u64) {
        let place = |line: u64| format!("{}:{line}", file.display()).into();
        match self {
            Self::Route(route) => {
                route.parents.iter_mut().for_each(|parent| parent.at.line += before);
                for rule in &mut route.rules {
                    rule.at.line += before;
                    rule.backends.iter_mut().for_each(|backend| backend.at.line += before);
                    Arc::make_mut(&mut rule.policy).place = place(rule.at.line);
                }
            }
            Self::Faults(faults) => {
                for target in &mut faults.targets {
                    let (FaultTarget::Service(Parent { at, .. }) | FaultTarget::Route(RouteTarget { at, .. })) = target;
                    at.line += before;
                }
                faults.fault.place = place(before + 1);
            }
            Self::Backend(backend) => {
                backend.targets.iter_mut().for_each(|target| target.at.line += before);
                Arc::make_mut(&mut backend.policy).place = place(before + 1);
            }
            Self::Limit(limit) => {
                limit.services.iter_mut().for_each(|target| target.at.line += before);
                limit.routes.iter_mut().for_each(|target| target.at.line += before);
            }
            Self::Tokens(tokens) => {
                tokens.targets.iter_mut().for_each(|target| target.at.line += before);
                tokens.files.iter_mut().for_each(|file| file.at.line += before);
            }
            Self::Authorization(one) => one.targets.iter_mut().for_each(|target| target.at.line += before),
            Self::Service(_) | Self::Slice(_) | Self::Settings(_) => {}
        }
    }

    /// `HTTPRoute default/web`: two files must not both say it.
    pub(crate) fn key(&self) -> String {
        let (kind, name) = match self {
            Self::Service(service) => ("Service", &service.name),
            Self::Slice(slice) => ("EndpointSlice", &slice.object),
            Self::Route(route) => (route.kind, &route.name),
            Self::Faults(faults) => ("FaultInjection", &faults.object),
            Self::Backend(backend) => (backend.kind, &backend.object),
            Self::Limit(limit) => ("TrafficLimit", &limit.object),
            Self::Tokens(tokens) => ("RequestAuthentication", &tokens.object),
            Self::Authorization(authorization) => ("AuthorizationPolicy", &authorization.object),
            Self::Settings(settings) => ("MeshSettings", &settings.object),
        };
        format!("{kind} {}/{}", name.namespace, name.service)
    }
}
