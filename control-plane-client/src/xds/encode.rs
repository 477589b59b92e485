//! From the model to xDS: what the control plane says.
//!
//! Everything here is also meaningful to a peer that ignores our own words: an Envoy finds clusters with TLS contexts
//! that name the SPIFFE ids to expect, and routes that forward to them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use aws_lc_rs::digest::{SHA256, digest};
use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as eds;
use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream;
use envoy_types::pb::envoy::service::discovery::v3::Resource;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher};
use envoy_types::pb::google::protobuf::{Any, Duration, Struct, UInt32Value};
use envoy_types::util::pack_any;
use prost::{Message, Name};
use serde::Serialize;
use sheetbend_certs::SpiffeId;

use super::metadata::to_struct;
use super::words::{ClusterWords, ConnectionWords, DEFAULT_ROUTE, EndpointWords, ListenerWords, Wire};
use super::{OWN_CERTIFICATE, ROOT_CA, WORDS, connections, filters};
use crate::model::{
    AppProtocol, Cluster, Destination, Endpoint, InboundPolicy, Match, Mesh, PathMatch, Pattern, Rule, RulePolicy,
    ServicePort, Target, TextMatch, Transport,
};

/// The weights of all zones of a priority fit in 32 bits, for so many of them.
const MAX_GROUP_WEIGHT: u64 = u32::MAX as u64 / 64;

/// What Envoy looks at to choose a transport socket for an endpoint.
const SOCKET_MATCH: &str = "envoy.transport_socket_match";

/// A resource with its name and version, packed for a response.
pub fn resource<M: Name + Message>(name: &str, version: &str, message: M) -> Resource {
    Resource {
        name: name.to_string(),
        version: version.to_string(),
        resource: Some(pack_any(message)),
        ..Resource::default()
    }
}

/// A version that follows from the content alone, so that it means the same after a restart.
///
/// Taken from the model, not from the encoded bytes: protobuf maps come out in any order.
pub fn version<T: Serialize>(content: &T) -> String {
    // Our types have no maps with keys that are not strings, the only thing that fails here.
    let json = serde_json::to_vec(content).unwrap_or_default();
    // 12 of 32 bytes: versions are compared within one name only.
    digest(&SHA256, &json).as_ref().iter().take(12).map(|b| format!("{b:02x}")).collect()
}

/// The Listener for one target.
///
/// HTTP protocols get an HTTP connection manager, opaque ones a TCP proxy. A port of which nobody said what it speaks
/// gets both: the manager where the first bytes are HTTP, the TCP proxy otherwise.
pub fn listener(target: &Target, destination: &Destination) -> lds::Listener {
    use AppProtocol::*;
    let name = destination.name.to_string();
    let http = || network_filter("envoy.filters.network.http_connection_manager", http_manager(&name));
    let opaque = || {
        let proxy = tcp::TcpProxy {
            stat_prefix: name.clone(),
            cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster(destination.default_cluster.to_string())),
            ..tcp::TcpProxy::default()
        };
        network_filter("envoy.filters.network.tcp_proxy", proxy)
    };
    let (filter_chains, default_filter_chain) = match destination.protocol {
        _ if !destination.connections.is_empty() => (connections::chains(&destination.connections), None),
        Http | Http2 | Grpc => (vec![chain(http())], None),
        Tcp | Tls => (vec![chain(opaque())], None),
        Detect => {
            let only_http = lds::FilterChainMatch {
                application_protocols: vec!["http/1.0".into(), "http/1.1".into(), "h2c".into()],
                ..lds::FilterChainMatch::default()
            };
            (vec![lds::FilterChain { filter_chain_match: Some(only_http), ..chain(http()) }], Some(chain(opaque())))
        }
    };
    let connections = (!destination.connections.is_empty()).then(|| ConnectionWords {
        rules: destination.connections.clone(),
        default_cluster: destination.default_cluster.clone(),
    });
    lds::Listener {
        name: target.to_string(),
        address: target.address().map(socket_address),
        filter_chains,
        default_filter_chain,
        traffic_direction: core::TrafficDirection::Outbound as i32,
        metadata: Some(typed_words(&ListenerWords {
            service: (&destination.name).into(),
            trust_domain: destination.trust_domain.clone(),
            protocol: destination.protocol,
            connections,
        })),
        ..lds::Listener::default()
    }
}

pub(super) fn chain(filter: lds::Filter) -> lds::FilterChain {
    lds::FilterChain { filters: vec![filter], ..lds::FilterChain::default() }
}

/// The Listener that tells what the mesh is.
pub fn mesh(mesh: &Mesh) -> lds::Listener {
    lds::Listener { name: super::MESH.to_string(), metadata: Some(typed_words(mesh)), ..lds::Listener::default() }
}

/// The Listener that tells what holds for those who call.
pub fn inbound(policy: &InboundPolicy) -> lds::Listener {
    lds::Listener { name: super::INBOUND.to_string(), metadata: Some(typed_words(policy)), ..lds::Listener::default() }
}

/// The Secret with the trust bundle, PEM.
pub fn root_ca(bundle: &str) -> tls::Secret {
    let context = tls::CertificateValidationContext {
        trusted_ca: Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineBytes(bundle.as_bytes().to_vec())),
            ..core::DataSource::default()
        }),
        ..tls::CertificateValidationContext::default()
    };
    tls::Secret { name: ROOT_CA.to_string(), r#type: Some(tls::secret::Type::ValidationContext(context)) }
}

/// The routes of a destination: its rules in order, then the default.
pub fn route_configuration(destination: &Destination) -> rds::RouteConfiguration {
    let name = destination.name.to_string();
    let mut routes: Vec<rds::Route> = destination.rules.iter().flat_map(routes_of_rule).collect();
    let to_default = forward_to(rds::route_action::ClusterSpecifier::Cluster(destination.default_cluster.to_string()));
    routes.push(route(DEFAULT_ROUTE, route_match(&Match::default()), to_default));
    let everything =
        rds::VirtualHost { name: name.clone(), domains: vec!["*".to_string()], routes, ..rds::VirtualHost::default() };
    rds::RouteConfiguration { name, virtual_hosts: vec![everything], ..rds::RouteConfiguration::default() }
}

/// The Cluster without its endpoints, which travel in [`load_assignment`].
///
/// `protocol` is what its service port speaks: a foreign Envoy must be told when that is HTTP/2.
pub fn cluster(cluster: &Cluster, trust_domain: &str, protocol: AppProtocol) -> cds::Cluster {
    use cds::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig};
    let said = cds::Cluster {
        name: cluster.name.to_string(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(over_ads()), service_name: String::new() }),
        connect_timeout: Some(Duration { seconds: 1, nanos: 0 }),
        outlier_detection: cluster.policy.outlier_detection.as_ref().map(super::outlier::encode),
        transport_socket_matches: transport_sockets(cluster, trust_domain, protocol),
        typed_extension_protocol_options: http_options(protocol),
        metadata: Some(words(to_struct(&ClusterWords {
            service: (&cluster.service).into(),
            policy: cluster.policy.clone(),
            external: cluster.external.clone(),
        }))),
        ..cds::Cluster::default()
    };
    super::limits::say(&cluster.policy, super::balancing::say(&cluster.policy, said))
}

/// The endpoints of a cluster.
pub fn load_assignment(cluster: &Cluster) -> eds::ClusterLoadAssignment {
    let mut groups: BTreeMap<(u32, &str), Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in &cluster.endpoints {
        groups.entry((endpoint.standing.priority, &endpoint.standing.zone)).or_default().push(endpoint);
    }
    let endpoints = groups.into_iter().map(|((priority, zone), endpoints)| {
        let weight: u64 = endpoints.iter().map(|endpoint| u64::from(endpoint.standing.weight)).sum();
        eds::LocalityLbEndpoints {
            lb_endpoints: endpoints.into_iter().map(lb_endpoint).collect(),
            // gRPC's own client skips endpoints without a locality and a weight, and shares by the latter.
            locality: Some(core::Locality { zone: zone.to_string(), ..core::Locality::default() }),
            load_balancing_weight: Some(UInt32Value { value: weight.clamp(1, MAX_GROUP_WEIGHT) as u32 }),
            priority,
            ..eds::LocalityLbEndpoints::default()
        }
    });
    eds::ClusterLoadAssignment {
        cluster_name: cluster.name.to_string(),
        endpoints: endpoints.collect(),
        ..eds::ClusterLoadAssignment::default()
    }
}

/// xDS routes have one condition each, so a rule with three matches is three routes of the same name.
fn routes_of_rule(rule: &Rule) -> Vec<rds::Route> {
    let every_request = [Match::default()];
    let matches = if rule.matches.is_empty() { &every_request[..] } else { &rule.matches[..] };
    let metadata = (*rule.policy != RulePolicy::default()).then(|| words(to_struct(&rule.policy)));
    let headers = &rule.policy.filters.headers;
    let (request_headers_to_add, request_headers_to_remove) = filters::edit(&headers.request);
    let (response_headers_to_add, response_headers_to_remove) = filters::edit(&headers.response);
    let edited = rds::Route {
        metadata,
        request_headers_to_add,
        request_headers_to_remove,
        response_headers_to_add,
        response_headers_to_remove,
        ..rds::Route::default()
    };
    let one = |condition: &Match| rds::Route {
        name: rule.name.to_string(),
        r#match: Some(route_match(condition)),
        action: Some(action(rule, condition)),
        ..edited.clone()
    };
    matches.iter().map(one).collect()
}

/// What becomes of a rule's requests.
fn action(rule: &Rule, condition: &Match) -> rds::route::Action {
    let nothing = rds::DirectResponseAction { status: 404, ..rds::DirectResponseAction::default() };
    match &rule.policy.filters.redirect {
        Some(redirect) => rds::route::Action::Redirect(filters::redirect(redirect, condition)),
        None if rule.backends.is_empty() => rds::route::Action::DirectResponse(nothing),
        None => rds::route::Action::Route(forward(rule, condition)),
    }
}

fn route(name: &str, condition: rds::RouteMatch, action: rds::RouteAction) -> rds::Route {
    rds::Route {
        name: name.to_string(),
        r#match: Some(condition),
        action: Some(rds::route::Action::Route(action)),
        ..rds::Route::default()
    }
}

fn route_match(condition: &Match) -> rds::RouteMatch {
    use rds::route_match::PathSpecifier;
    let path = match &condition.path {
        None => PathSpecifier::Prefix(String::new()),
        Some(PathMatch::Exact(path)) => PathSpecifier::Path(path.to_string()),
        // Envoy wants a separated prefix without the slash at its end, and a bare slash is every path.
        Some(PathMatch::Prefix(path)) => match path.trim_end_matches('/') {
            "" => PathSpecifier::Prefix("/".to_string()),
            path => PathSpecifier::PathSeparatedPrefix(path.to_string()),
        },
        Some(PathMatch::Regex(pattern)) => PathSpecifier::SafeRegex(safe_regex(pattern)),
    };
    let method = condition.method.iter().map(|method| header(":method", exactly(method)));
    let headers = condition.headers.iter().map(|(name, value)| header(name, string_match(value)));
    let query = condition.query.iter().map(|(name, value)| rds::QueryParameterMatcher {
        name: name.to_string(),
        query_parameter_match_specifier: Some(rds::query_parameter_matcher::QueryParameterMatchSpecifier::StringMatch(
            string_match(value),
        )),
    });
    rds::RouteMatch {
        path_specifier: Some(path),
        headers: method.chain(headers).collect(),
        query_parameters: query.collect(),
        ..rds::RouteMatch::default()
    }
}

fn header(name: &str, value: StringMatcher) -> rds::HeaderMatcher {
    rds::HeaderMatcher {
        name: name.to_string(),
        header_match_specifier: Some(rds::header_matcher::HeaderMatchSpecifier::StringMatch(value)),
        ..rds::HeaderMatcher::default()
    }
}

fn string_match(value: &TextMatch) -> StringMatcher {
    match value {
        TextMatch::Exact(value) => exactly(value),
        TextMatch::Regex(pattern) => StringMatcher {
            match_pattern: Some(string_matcher::MatchPattern::SafeRegex(safe_regex(pattern))),
            ignore_case: false,
        },
    }
}

fn safe_regex(pattern: &Pattern) -> RegexMatcher {
    RegexMatcher { regex: pattern.as_str().to_string(), ..RegexMatcher::default() }
}

fn exactly(value: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(string_matcher::MatchPattern::Exact(value.to_string())), ignore_case: false }
}

fn forward(rule: &Rule, condition: &Match) -> rds::RouteAction {
    let clusters = rule.backends.iter().map(|backend| {
        let (request_headers_to_add, request_headers_to_remove) = filters::edit(&backend.headers.request);
        let (response_headers_to_add, response_headers_to_remove) = filters::edit(&backend.headers.response);
        rds::weighted_cluster::ClusterWeight {
            name: backend.cluster.to_string(),
            weight: Some(UInt32Value { value: backend.weight }),
            request_headers_to_add,
            request_headers_to_remove,
            response_headers_to_add,
            response_headers_to_remove,
            ..rds::weighted_cluster::ClusterWeight::default()
        }
    });
    let clusters = rds::WeightedCluster { clusters: clusters.collect(), ..rds::WeightedCluster::default() };
    let mut action = forward_to(rds::route_action::ClusterSpecifier::WeightedClusters(clusters));
    action.timeout = rule.policy.timeouts.request.map(duration).or(action.timeout);
    action.idle_timeout = rule.policy.timeouts.stream_idle.map(duration).or(action.idle_timeout);
    if let Some(rewrite) = &rule.policy.filters.rewrite {
        filters::rewrite(&mut action, rewrite, condition);
    }
    action
}

pub(super) fn duration(ours: std::time::Duration) -> Duration {
    Duration { seconds: ours.as_secs().min(i64::MAX as u64) as i64, nanos: ours.subsec_nanos() as i32 }
}

fn forward_to(clusters: rds::route_action::ClusterSpecifier) -> rds::RouteAction {
    rds::RouteAction {
        cluster_specifier: Some(clusters),
        // Envoy's own default is 15 s; ours is none, and 0 says so.
        timeout: Some(Duration::default()),
        ..rds::RouteAction::default()
    }
}

fn http_manager(routes: &str) -> hcm::HttpConnectionManager {
    let rds = hcm::Rds { config_source: Some(over_ads()), route_config_name: routes.to_string() };
    let router = hcm::HttpFilter {
        name: "envoy.filters.http.router".to_string(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(pack_any(Router::default()))),
        ..hcm::HttpFilter::default()
    };
    hcm::HttpConnectionManager {
        stat_prefix: routes.to_string(),
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(rds)),
        http_filters: vec![router],
        ..hcm::HttpConnectionManager::default()
    }
}

pub(super) fn network_filter<M: Name + Message>(name: &str, config: M) -> lds::Filter {
    lds::Filter { name: name.to_string(), config_type: Some(lds::filter::ConfigType::TypedConfig(pack_any(config))) }
}

/// One transport socket for meshed endpoints, one for the others; an endpoint's metadata chooses.
fn transport_sockets(
    cluster: &Cluster,
    trust_domain: &str,
    protocol: AppProtocol,
) -> Vec<cds::cluster::TransportSocketMatch> {
    let socket = |name: &str, config: Any| core::TransportSocket {
        name: name.to_string(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(config)),
    };
    let choice = |wire: Wire, socket| cds::cluster::TransportSocketMatch {
        name: socket_label(wire).to_string(),
        r#match: Some(socket_choice(wire)),
        transport_socket: Some(socket),
    };
    let tls = pack_any(upstream_tls(cluster, trust_domain, protocol));
    let mut sockets = vec![choice(Wire::Mtls, socket("envoy.transport_sockets.tls", tls))];
    // Only where such an endpoint exists: no meshed endpoint can fall through to plain by a mistake in its metadata.
    if cluster.endpoints.iter().any(|e| e.transport == Transport::Plain) {
        sockets.push(choice(Wire::Plain, socket("envoy.transport_sockets.raw_buffer", pack_any(RawBuffer::default()))));
    }
    sockets
}

fn upstream_tls(cluster: &Cluster, trust_domain: &str, protocol: AppProtocol) -> tls::UpstreamTlsContext {
    let identities: BTreeSet<&SpiffeId> = cluster.endpoints.iter().filter_map(|e| identity(&e.transport)).collect();
    let names = identities.into_iter().map(|id| tls::SubjectAltNameMatcher {
        san_type: tls::subject_alt_name_matcher::SanType::Uri as i32,
        matcher: Some(exactly(&id.to_string())),
        ..tls::SubjectAltNameMatcher::default()
    });
    let expected = tls::CertificateValidationContext {
        match_typed_subject_alt_names: names.collect(),
        ..tls::CertificateValidationContext::default()
    };
    let sds = |name: &str| tls::SdsSecretConfig { name: name.to_string(), sds_config: Some(over_ads()) };
    let validation = tls::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(expected),
        validation_context_sds_secret_config: Some(sds(ROOT_CA)),
        ..tls::common_tls_context::CombinedCertificateValidationContext::default()
    };
    let service = &cluster.service;
    tls::UpstreamTlsContext {
        sni: sni(service, trust_domain),
        common_tls_context: Some(tls::CommonTlsContext {
            alpn_protocols: vec![if speaks_http2(protocol) { "h2" } else { "http/1.1" }.to_string()],
            tls_certificate_sds_secret_configs: vec![sds(OWN_CERTIFICATE)],
            validation_context_type: Some(tls::common_tls_context::ValidationContextType::CombinedValidationContext(
                validation,
            )),
            ..tls::CommonTlsContext::default()
        }),
        ..tls::UpstreamTlsContext::default()
    }
}

/// `PORT.SERVICE.NAMESPACE.TRUST-DOMAIN`: both ends name an edge alike.
pub fn sni(service: &ServicePort, trust_domain: &str) -> String {
    format!("{}.{}.{}.{}", service.port, service.service.service, service.service.namespace, trust_domain)
}

/// Without this a foreign Envoy speaks HTTP/1.1 to the cluster.
fn http_options(protocol: AppProtocol) -> HashMap<String, Any> {
    use upstream::http_protocol_options::explicit_http_config::ProtocolConfig;
    use upstream::http_protocol_options::{ExplicitHttpConfig, UpstreamProtocolOptions};
    if !speaks_http2(protocol) {
        return HashMap::new();
    }
    let http2 = ProtocolConfig::Http2ProtocolOptions(core::Http2ProtocolOptions::default());
    let options = upstream::HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(http2),
        })),
        ..upstream::HttpProtocolOptions::default()
    };
    HashMap::from([("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_string(), pack_any(options))])
}

fn speaks_http2(protocol: AppProtocol) -> bool {
    matches!(protocol, AppProtocol::Http2 | AppProtocol::Grpc)
}

fn lb_endpoint(endpoint: &Endpoint) -> eds::LbEndpoint {
    let ours = EndpointWords {
        transport: wire(&endpoint.transport),
        identity: identity(&endpoint.transport).cloned(),
        workload: endpoint.workload.clone(),
    };
    let mut metadata = words(to_struct(&ours));
    metadata.filter_metadata.insert(SOCKET_MATCH.to_string(), socket_choice(ours.transport));
    let address = eds::Endpoint { address: Some(socket_address(endpoint.address)), ..eds::Endpoint::default() };
    eds::LbEndpoint {
        health_status: core::HealthStatus::Healthy as i32,
        metadata: Some(metadata),
        load_balancing_weight: Some(UInt32Value { value: endpoint.standing.weight.max(1) }),
        host_identifier: Some(eds::lb_endpoint::HostIdentifier::Endpoint(address)),
    }
}

fn wire(transport: &Transport) -> Wire {
    match transport {
        Transport::Sheetbend(_) => Wire::Sheetbend,
        Transport::MutualTls(_) => Wire::Mtls,
        Transport::Plain => Wire::Plain,
    }
}

fn identity(transport: &Transport) -> Option<&SpiffeId> {
    match transport {
        Transport::Sheetbend(id) | Transport::MutualTls(id) => Some(id),
        Transport::Plain => None,
    }
}

/// Envoy has one kind of mutual TLS; only ours has two.
fn socket_label(wire: Wire) -> &'static str {
    match wire {
        Wire::Sheetbend | Wire::Mtls => "mtls",
        Wire::Plain => "plain",
    }
}

fn socket_choice(wire: Wire) -> Struct {
    to_struct(&serde_json::json!({ "transport": socket_label(wire) }))
}

fn socket_address(address: SocketAddr) -> core::Address {
    let socket = core::SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(address.port().into())),
        ..core::SocketAddress::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
}

/// "From the stream that this came on."
fn over_ads() -> core::ConfigSource {
    core::ConfigSource {
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource::default(),
        )),
        ..core::ConfigSource::default()
    }
}

fn words(ours: Struct) -> core::Metadata {
    core::Metadata { filter_metadata: HashMap::from([(WORDS.to_string(), ours)]), ..core::Metadata::default() }
}

fn typed_words<T: Serialize>(ours: &T) -> core::Metadata {
    let packed = pack_any(to_struct(ours));
    core::Metadata { typed_filter_metadata: HashMap::from([(WORDS.to_string(), packed)]), ..core::Metadata::default() }
}
