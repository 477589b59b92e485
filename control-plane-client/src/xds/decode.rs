//! From xDS to the model: what a proxy makes of what it is told.
//!
//! Nothing is trusted. Whatever a proxy could not act on exactly as it was said is refused, rather than read in some
//! other way: a condition that is dropped would send requests where nobody wanted them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as eds;
use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::google::protobuf::{Any, Struct};
use prost::{Message, Name};
use serde::de::DeserializeOwned;

use super::metadata::from_struct;
pub use super::routes::{MAX_BACKENDS, MAX_HEADERS, MAX_ROUTES, Routes, routes};
use super::words::{ClusterWords, EndpointWords, ListenerWords, ServiceWords, Wire};
use super::{DecodeError, Kind, ROOT_CA, WORDS, shown};
use crate::model::{
    AppProtocol, BackendPolicy, ClusterName, ConnectionRule, Endpoint, InboundPolicy, Mesh, ServicePort, Standing,
    Target, Transport, Unusable,
};

/// Endpoints of one cluster. At 150 bytes each this is 1.5 MiB on the wire.
pub const MAX_ENDPOINTS: usize = 10_000;
/// The longest name, path or value that is kept.
pub const MAX_TEXT: usize = 4_096;
/// Address ranges of a mesh, and its domains. Every Service may have an address of its own that is in no other range; all are
/// looked through for a destination that nobody knows, and for no other.
pub const MAX_RANGES: usize = 10_000;

/// One resource of our stream, decoded.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoded {
    /// A target's Listener.
    Listener(Arc<Listener>),
    /// The Listener that tells what the mesh is.
    Mesh(Arc<Mesh>),
    /// A destination's routes.
    Routes(Arc<Routes>),
    /// What holds for those who call the service beside this proxy.
    Inbound(Arc<InboundPolicy>),
    /// A cluster without its endpoints.
    Cluster(Arc<ClusterHead>),
    /// A cluster's endpoints.
    Endpoints(Arc<[Endpoint]>),
    /// The trust bundle, PEM.
    RootCa(Arc<str>),
}

/// What is told of a cluster beside its endpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct ClusterHead {
    /// The service port behind it.
    pub service: ServicePort,
    /// What its callers keep to.
    pub policy: Arc<BackendPolicy>,
    /// A host outside the mesh whose addresses are endpoints besides.
    pub external: Option<Target>,
}

/// What a target's Listener says. At least one of `routes` and `opaque` is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// The service port that the target stands for.
    pub name: ServicePort,
    /// Its mesh.
    pub trust_domain: Arc<str>,
    /// What it speaks.
    pub protocol: AppProtocol,
    /// The name of the routes for HTTP.
    pub routes: Option<Arc<str>>,
    /// The cluster for bytes that nobody looks into.
    pub opaque: Option<ClusterName>,
    /// Rules for connections as a whole; where there are some, there are no routes.
    pub connections: Vec<ConnectionRule>,
}

impl Listener {
    /// Every cluster that it names itself, some more than once.
    pub fn clusters(&self) -> impl Iterator<Item = &ClusterName> {
        let backends = self.connections.iter().flat_map(|rule| &rule.backends).map(|backend| &backend.cluster);
        self.opaque.iter().chain(backends)
    }
}

/// Decodes one resource of a response. `name` is the resource's name on the stream, and must be the payload's own.
pub fn resource(kind: Kind, name: &str, payload: &Any) -> Result<Decoded, DecodeError> {
    match kind {
        Kind::Listener => {
            let message: lds::Listener = unpack(payload, kind.type_url())?;
            same_name(name, &message.name)?;
            match name {
                super::MESH => mesh(&message).map(|mesh| Decoded::Mesh(mesh.into())),
                super::INBOUND => inbound(&message).map(|policy| Decoded::Inbound(policy.into())),
                _ => listener(&message).map(|listener| Decoded::Listener(listener.into())),
            }
        }
        Kind::Routes => {
            let message: rds::RouteConfiguration = unpack(payload, kind.type_url())?;
            same_name(name, &message.name)?;
            routes(&message).map(|routes| Decoded::Routes(routes.into()))
        }
        Kind::Cluster => {
            let message: cds::Cluster = unpack(payload, kind.type_url())?;
            same_name(name, &message.name)?;
            cluster(&message).map(|cluster| Decoded::Cluster(cluster.into()))
        }
        Kind::Endpoints => {
            let message: eds::ClusterLoadAssignment = unpack(payload, kind.type_url())?;
            same_name(name, &message.cluster_name)?;
            endpoints(&message).map(|endpoints| Decoded::Endpoints(endpoints.into()))
        }
        Kind::Secret => {
            let message: tls::Secret = unpack(payload, kind.type_url())?;
            same_name(name, &message.name)?;
            root_ca(&message).map(|pem| Decoded::RootCa(pem.into()))
        }
    }
}

/// A target's Listener.
pub fn listener(message: &lds::Listener) -> Result<Listener, DecodeError> {
    let words: ListenerWords = typed_words(message.metadata.as_ref(), "metadata")?;
    let name = service_port(words.service)?;
    let trust_domain = text("trust_domain", &words.trust_domain)?;
    let mut found =
        Listener { name, trust_domain, protocol: words.protocol, routes: None, opaque: None, connections: Vec::new() };
    if let Some(connections) = words.connections {
        at_most("rules for connections", connections.rules.len(), MAX_ROUTES)?;
        connections.rules.iter().try_for_each(ConnectionRule::check).map_err(unusable)?;
        found.opaque = Some(text("default_cluster", &connections.default_cluster)?);
        return Ok(Listener { connections: connections.rules, ..found });
    }
    for chain in message.filter_chains.iter().chain(&message.default_filter_chain) {
        // The last filter is the one that ends a chain; those before it are for peers that know them.
        let filter = chain.filters.last().ok_or(DecodeError::Missing("filter_chains.filters"))?;
        let Some(lds::filter::ConfigType::TypedConfig(config)) = &filter.config_type else {
            return Err(DecodeError::Missing("filter_chains.filters.typed_config"));
        };
        if is::<hcm::HttpConnectionManager>(config) {
            found.routes = Some(routes_of_manager(config)?);
        } else {
            found.opaque = Some(cluster_of_tcp_proxy(config)?);
        }
    }
    if found.routes.is_none() && found.opaque.is_none() {
        return Err(DecodeError::Missing("filter_chains"));
    }
    Ok(found)
}

/// What the mesh is.
pub fn mesh(message: &lds::Listener) -> Result<Mesh, DecodeError> {
    let mesh: Mesh = typed_words(message.metadata.as_ref(), "metadata")?;
    at_most("address ranges", mesh.ranges.len(), MAX_RANGES)?;
    at_most("domains", mesh.domains.len(), MAX_RANGES)?;
    Ok(mesh)
}

/// What holds for those who call.
pub fn inbound(message: &lds::Listener) -> Result<InboundPolicy, DecodeError> {
    let policy: InboundPolicy = typed_words(message.metadata.as_ref(), "metadata")?;
    policy.check().map_err(unusable)?;
    Ok(policy)
}

/// A cluster, without its endpoints.
pub fn cluster(message: &cds::Cluster) -> Result<ClusterHead, DecodeError> {
    use cds::cluster::{ClusterDiscoveryType, DiscoveryType};
    let eds = Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32));
    if message.cluster_discovery_type != eds {
        return Err(DecodeError::invalid("type", "only EDS clusters are known here"));
    }
    let config = message.eds_cluster_config.as_ref().ok_or(DecodeError::Missing("eds_cluster_config"))?;
    if !config.service_name.is_empty() && config.service_name != message.name {
        return Err(DecodeError::invalid("eds_cluster_config.service_name", "it must be the cluster's name"));
    }
    let words: ClusterWords = from_struct(words(message.metadata.as_ref())?, "metadata")?;
    words.policy.check().map_err(unusable)?;
    if words.external.as_ref().is_some_and(|host| host.address().is_some() || host.port() == 0) {
        return Err(DecodeError::invalid("external", "it is no host that DNS could know"));
    }
    Ok(ClusterHead { service: service_port(words.service)?, policy: words.policy, external: words.external })
}

/// A cluster's endpoints, those that do not take traffic left out.
pub fn endpoints(message: &eds::ClusterLoadAssignment) -> Result<Vec<Endpoint>, DecodeError> {
    let all = message.endpoints.iter().map(|locality| locality.lb_endpoints.len()).sum();
    at_most("endpoints", all, MAX_ENDPOINTS)?;
    let found = message.endpoints.iter().flat_map(|group| group.lb_endpoints.iter().map(move |found| (group, found)));
    let found = found.filter(|(_, found)| takes_traffic(found));
    let found: Result<Vec<_>, _> = found.map(|(group, found)| endpoint(group, found)).collect();
    let mut found = found?;
    // Places apart on the wire, since they are of different zones, are told in one order.
    found.sort_by_key(|endpoint| endpoint.address);
    let mut seen = BTreeSet::new();
    match found.iter().find(|endpoint| !seen.insert(endpoint.address)) {
        Some(twice) => Err(DecodeError::invalid("endpoints", format!("{} is there twice", twice.address))),
        None => Ok(found),
    }
}

/// The trust bundle, PEM. Whether it parses is for its store to say.
pub fn root_ca(message: &tls::Secret) -> Result<String, DecodeError> {
    use core::data_source::Specifier;
    if message.name != ROOT_CA {
        return Err(DecodeError::invalid("name", format!("`{}` was not asked for", shown(&message.name, 80))));
    }
    let Some(tls::secret::Type::ValidationContext(context)) = &message.r#type else {
        return Err(DecodeError::Missing("validation_context"));
    };
    match context.trusted_ca.as_ref().and_then(|source| source.specifier.as_ref()) {
        Some(Specifier::InlineString(pem)) => Ok(pem.clone()),
        Some(Specifier::InlineBytes(pem)) => {
            String::from_utf8(pem.clone()).map_err(|error| DecodeError::invalid("trusted_ca", error))
        }
        // A file or variable named by the other end is nothing that a proxy reads.
        Some(_) | None => Err(DecodeError::invalid("trusted_ca", "it must be inline")),
    }
}

fn unpack<M: Message + Name + Default>(payload: &Any, wanted: &'static str) -> Result<M, DecodeError> {
    if payload.type_url != wanted {
        return Err(DecodeError::WrongType { found: shown(&payload.type_url, 80), wanted });
    }
    M::decode(&payload.value[..]).map_err(|error| DecodeError::Malformed(error.to_string()))
}

fn is<M: Name>(payload: &Any) -> bool {
    payload.type_url == M::type_url()
}

/// A resource that answers to two names could slip into a place that nobody asked it for.
fn same_name(outside: &str, inside: &str) -> Result<(), DecodeError> {
    match outside == inside {
        true => Ok(()),
        false => Err(DecodeError::invalid("name", format!("`{}` inside", shown(inside, 80)))),
    }
}

fn routes_of_manager(config: &Any) -> Result<Arc<str>, DecodeError> {
    use hcm::http_connection_manager::RouteSpecifier;
    let manager = hcm::HttpConnectionManager::decode(&config.value[..])
        .map_err(|error| DecodeError::Malformed(error.to_string()))?;
    match manager.route_specifier {
        Some(RouteSpecifier::Rds(rds)) => text("rds.route_config_name", &rds.route_config_name),
        _ => Err(DecodeError::Missing("http_connection_manager.rds")),
    }
}

fn cluster_of_tcp_proxy(config: &Any) -> Result<ClusterName, DecodeError> {
    use tcp::tcp_proxy::ClusterSpecifier;
    let proxy: tcp::TcpProxy =
        unpack(config, "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy")?;
    match &proxy.cluster_specifier {
        Some(ClusterSpecifier::Cluster(cluster)) => text("tcp_proxy.cluster", cluster),
        _ => Err(DecodeError::Missing("tcp_proxy.cluster")),
    }
}

fn takes_traffic(endpoint: &eds::LbEndpoint) -> bool {
    use core::HealthStatus::*;
    match core::HealthStatus::try_from(endpoint.health_status) {
        Ok(Unknown | Healthy | Degraded) => true,
        Ok(Unhealthy | Draining | Timeout) | Err(_) => false,
    }
}

fn endpoint(group: &eds::LocalityLbEndpoints, found: &eds::LbEndpoint) -> Result<Endpoint, DecodeError> {
    let Some(eds::lb_endpoint::HostIdentifier::Endpoint(place)) = &found.host_identifier else {
        return Err(DecodeError::Missing("endpoint"));
    };
    let address = address(place.address.as_ref())?;
    let words: EndpointWords = from_struct(words(found.metadata.as_ref())?, "endpoint.metadata")?;
    let transport = match (words.transport, words.identity) {
        (Wire::Sheetbend, Some(id)) => Transport::Sheetbend(id),
        (Wire::Mtls, Some(id)) => Transport::MutualTls(id),
        (Wire::Plain, None) => Transport::Plain,
        (Wire::Plain, Some(_)) => {
            return Err(DecodeError::invalid("endpoint.metadata", "an endpoint with an identity is not plain"));
        }
        (Wire::Sheetbend | Wire::Mtls, None) => return Err(DecodeError::Missing("endpoint.metadata.identity")),
    };
    let weight = found.load_balancing_weight.as_ref().map_or(1, |weight| weight.value);
    if weight == 0 {
        return Err(DecodeError::invalid("endpoint.load_balancing_weight", "it must not be 0"));
    }
    at_most("bytes in a workload's name", words.workload.len(), MAX_TEXT)?;
    let zone = group.locality.as_ref().map_or("", |locality| locality.zone.as_str());
    if group.priority > Standing::MAX_PRIORITY {
        return Err(DecodeError::invalid("endpoints.priority", "127 is the last"));
    }
    at_most("bytes in a zone's name", zone.len(), MAX_TEXT)?;
    let standing = Standing { weight, priority: group.priority, zone: zone.into() };
    Ok(Endpoint { address, transport, standing, workload: words.workload })
}

fn address(found: Option<&core::Address>) -> Result<SocketAddr, DecodeError> {
    let wrong = |reason: &str| DecodeError::invalid("endpoint.address", reason);
    let Some(core::address::Address::SocketAddress(found)) = found.and_then(|found| found.address.as_ref()) else {
        return Err(DecodeError::Missing("endpoint.address"));
    };
    let ip: IpAddr = found.address.parse().map_err(|_| wrong("it is no IP address"))?;
    let Some(core::socket_address::PortSpecifier::PortValue(port)) = found.port_specifier else {
        return Err(DecodeError::Missing("endpoint.address.port_value"));
    };
    match u16::try_from(port) {
        Ok(port) if port != 0 && !ip.is_unspecified() && !ip.is_multicast() => {
            Ok(SocketAddr::new(ip.to_canonical(), port))
        }
        _ => Err(wrong("nothing can be reached there")),
    }
}

fn typed_words<T: DeserializeOwned>(metadata: Option<&core::Metadata>, field: &'static str) -> Result<T, DecodeError> {
    let packed = metadata.and_then(|metadata| metadata.typed_filter_metadata.get(WORDS));
    let packed = packed.ok_or(DecodeError::Missing("metadata.typed_filter_metadata[\"sheetbend.io\"]"))?;
    let fields: Struct = unpack(packed, "type.googleapis.com/google.protobuf.Struct")?;
    from_struct(&fields, field)
}

pub(super) fn unusable(error: Unusable) -> DecodeError {
    DecodeError::invalid("policy", error)
}

fn words(metadata: Option<&core::Metadata>) -> Result<&Struct, DecodeError> {
    let found = metadata.and_then(|metadata| metadata.filter_metadata.get(WORDS));
    found.ok_or(DecodeError::Missing("metadata.filter_metadata[\"sheetbend.io\"]"))
}

fn service_port(words: ServiceWords) -> Result<ServicePort, DecodeError> {
    text("service", &words.service)?;
    text("namespace", &words.namespace)?;
    match words.port {
        0 => Err(DecodeError::invalid("port", "it must not be 0")),
        _ => Ok(words.into()),
    }
}

/// A name, path or value of a sane length; never empty.
pub(super) fn text(field: &'static str, found: &str) -> Result<Arc<str>, DecodeError> {
    match found.len() {
        0 => Err(DecodeError::Missing(field)),
        // A name with a line break in it would write its own log lines.
        _ if found.chars().any(char::is_control) => Err(DecodeError::invalid(field, "it has control characters")),
        1..=MAX_TEXT => Ok(found.into()),
        _ => Err(DecodeError::invalid(field, format!("longer than {MAX_TEXT} bytes"))),
    }
}

pub(super) fn at_most(what: &'static str, count: usize, most: usize) -> Result<(), DecodeError> {
    if count > most { Err(DecodeError::TooMany { what, count, most }) } else { Ok(()) }
}
