//! What gRPC's own client understands (gRFC A27, A28, A29): an `api_listener`, routes by path and prefix, clusters that
//! are balanced round robin.
//!
//! It speaks plain text, or mutual TLS if its bootstrap has a provider of certificates and its node names it. Which
//! endpoints it reaches in plain is their own decision: a permissive inbound takes it, a strict one does not.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher};
use envoy_types::util::pack_any;
use sheetbend_control_plane_client::model::{Cluster, Destination, Endpoint, Transport};
use sheetbend_control_plane_client::xds::encode;

use super::envoy::over_ads;

/// The listener of a target: who asks for it asks next for the routes that it names.
pub(super) fn listener(name: &str, destination: &Destination) -> lds::Listener {
    let routes =
        hcm::Rds { config_source: Some(over_ads()), route_config_name: destination.default_cluster.to_string() };
    let router = hcm::HttpFilter {
        name: "router".to_string(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(pack_any(Router::default()))),
        ..hcm::HttpFilter::default()
    };
    let manager = hcm::HttpConnectionManager {
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(routes)),
        http_filters: vec![router],
        ..hcm::HttpConnectionManager::default()
    };
    lds::Listener {
        name: name.to_string(),
        api_listener: Some(lds::ApiListener { api_listener: Some(pack_any(manager)) }),
        ..lds::Listener::default()
    }
}

/// The routes, with what it does not know put in other words.
pub(super) fn routes(name: &str, destination: &Destination) -> rds::RouteConfiguration {
    use rds::route_match::PathSpecifier;
    let mut config = encode::route_configuration(destination);
    config.name = name.to_string();
    for route in config.virtual_hosts.iter_mut().flat_map(|host| &mut host.routes) {
        let path = route.r#match.as_mut().and_then(|m| m.path_specifier.as_mut());
        // Its paths are always /SERVICE/METHOD, so that a whole path element ends with a slash.
        if let Some(PathSpecifier::PathSeparatedPrefix(prefix)) = path {
            let prefix = format!("{prefix}/");
            route.r#match.iter_mut().for_each(|m| m.path_specifier = Some(PathSpecifier::Prefix(prefix.clone())));
        }
    }
    config
}

/// The cluster. `certificates` names the provider in the client's own bootstrap. gRPC knows one way to all endpoints of a
/// cluster: as soon as one is meshed, none is spoken to in plain.
pub(super) fn cluster(ours: cds::Cluster, cluster: &Cluster, certificates: Option<&str>) -> cds::Cluster {
    let is_plain = |endpoint: &Endpoint| endpoint.transport == Transport::Plain;
    let plain = !cluster.endpoints.is_empty() && cluster.endpoints.iter().all(is_plain);
    let socket = certificates.filter(|_| !plain).map(|provider| core::TransportSocket {
        name: "envoy.transport_sockets.tls".to_string(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(pack_any(upstream_tls(cluster, provider)))),
    });
    cds::Cluster {
        name: ours.name,
        cluster_discovery_type: ours.cluster_discovery_type,
        eds_cluster_config: ours.eds_cluster_config,
        lb_policy: cds::cluster::LbPolicy::RoundRobin as i32,
        transport_socket: socket,
        ..cds::Cluster::default()
    }
}

/// gRFC A29: certificates by provider, and whom to expect.
fn upstream_tls(cluster: &Cluster, provider: &str) -> tls::UpstreamTlsContext {
    let identities: BTreeSet<String> = cluster
        .endpoints
        .iter()
        .filter_map(|endpoint| match &endpoint.transport {
            Transport::Sheetbend(id) | Transport::MutualTls(id) => Some(id.to_string()),
            Transport::Plain => None,
        })
        .collect();
    let exactly =
        |id| StringMatcher { match_pattern: Some(string_matcher::MatchPattern::Exact(id)), ignore_case: false };
    #[allow(deprecated)] // The only field of the two that every gRPC client reads.
    let expected = tls::CertificateValidationContext {
        match_subject_alt_names: identities.into_iter().map(exactly).collect(),
        ca_certificate_provider_instance: Some(instance(provider)),
        ..tls::CertificateValidationContext::default()
    };
    tls::UpstreamTlsContext {
        common_tls_context: Some(tls::CommonTlsContext {
            tls_certificate_provider_instance: Some(instance(provider)),
            validation_context_type: Some(tls::common_tls_context::ValidationContextType::ValidationContext(expected)),
            ..tls::CommonTlsContext::default()
        }),
        ..tls::UpstreamTlsContext::default()
    }
}

fn instance(provider: &str) -> tls::CertificateProviderPluginInstance {
    tls::CertificateProviderPluginInstance { instance_name: provider.to_string(), certificate_name: String::new() }
}
