//! What an Envoy gets whose listeners are in its own bootstrap: routes, clusters, endpoints, and the trust bundle. Also
//! what we say beside the client crate's own encoding where one instance is meant and not its service.
//!
//! Its certificate and key are its own: a static secret named `default` in its bootstrap (`sheetbend certs issue` makes
//! them). No private key ever comes from here.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{TlsParameters, UpstreamTlsContext};
use envoy_types::util::pack_any;
use prost::Message;
use sheetbend_control_plane_client::model::{Destination, Target};
use sheetbend_control_plane_client::xds::{OWN_CERTIFICATE, encode};

use crate::world::World;

/// The one table of routes of the whole mesh: a virtual host a service port.
pub(super) const ALL_ROUTES: &str = "mesh";

/// Our cluster, under TLS 1.3 and with its own certificate taken from the bootstrap instead of from us.
pub(super) fn cluster(mut cluster: cds::Cluster) -> cds::Cluster {
    for socket in cluster.transport_socket_matches.iter_mut().filter_map(|m| m.transport_socket.as_mut()) {
        let Some(core::transport_socket::ConfigType::TypedConfig(config)) = &mut socket.config_type else { continue };
        if !config.type_url.ends_with(".UpstreamTlsContext") {
            continue;
        }
        let Ok(mut context) = UpstreamTlsContext::decode(&*config.value) else { continue };
        if let Some(common) = &mut context.common_tls_context {
            // As a client Envoy stops at TLS 1.2 unless it is told, and the mesh speaks nothing below 1.3.
            common.tls_params = Some(TlsParameters {
                tls_minimum_protocol_version: TlsProtocol::TlSv13 as i32,
                tls_maximum_protocol_version: TlsProtocol::TlSv13 as i32,
                ..TlsParameters::default()
            });
        }
        let secrets = context.common_tls_context.iter_mut().flat_map(|c| &mut c.tls_certificate_sds_secret_configs);
        secrets.filter(|secret| secret.name == OWN_CERTIFICATE).for_each(|secret| secret.sds_config = None);
        *config = pack_any(context);
    }
    cluster
}

/// The listener of a target. One instance that is called by its own address has routes apart from its service's.
pub(super) fn listener(target: &Target, destination: &Destination) -> lds::Listener {
    use hcm::http_connection_manager::RouteSpecifier;
    let mut listener = encode::listener(target, destination);
    if *destination.default_cluster == *destination.name.to_string() {
        return listener;
    }
    let chains = listener.filter_chains.iter_mut().chain(&mut listener.default_filter_chain);
    for filter in chains.flat_map(|chain| &mut chain.filters) {
        let Some(lds::filter::ConfigType::TypedConfig(config)) = &mut filter.config_type else { continue };
        if !config.type_url.ends_with(".HttpConnectionManager") {
            continue;
        }
        let Ok(mut manager) = hcm::HttpConnectionManager::decode(&*config.value) else { continue };
        if let Some(RouteSpecifier::Rds(rds)) = &mut manager.route_specifier {
            rds.route_config_name = destination.default_cluster.to_string();
        }
        *config = pack_any(manager);
    }
    listener
}

/// One service port's routes, under the name they were asked for.
pub(super) fn routes(name: &str, destination: &Destination) -> rds::RouteConfiguration {
    rds::RouteConfiguration { name: name.to_string(), ..encode::route_configuration(destination) }
}

/// Every service port as a virtual host with all of its names.
pub(super) fn all_routes(world: &World) -> rds::RouteConfiguration {
    // A domain may stand in one virtual host only: whoever is first by name keeps a bare name that two could have.
    let mut taken = BTreeSet::new();
    let hosts = world.destinations().filter_map(|destination| {
        let mut host = encode::route_configuration(destination).virtual_hosts.pop()?;
        host.domains = names(destination, world).into_iter().filter(|name| taken.insert(name.clone())).collect();
        (!host.domains.is_empty()).then_some(host)
    });
    rds::RouteConfiguration {
        name: ALL_ROUTES.to_string(),
        virtual_hosts: hosts.collect(),
        ..rds::RouteConfiguration::default()
    }
}

fn names(destination: &Destination, world: &World) -> Vec<String> {
    let (service, namespace) = (&destination.name.service.service, &destination.name.service.namespace);
    let port = destination.name.port;
    let mut hosts = vec![
        format!("{service}.{namespace}"),
        format!("{service}.{namespace}.svc"),
        format!("{service}.{namespace}.svc.{}", destination.trust_domain),
    ];
    if &**namespace == "default" {
        hosts.push(service.to_string());
    }
    let bare = port == 80 || world.is_only_port(&destination.name);
    let with_port = hosts.iter().map(|host| format!("{host}:{port}"));
    let without = hosts.iter().filter(|_| bare).flat_map(|host| [host.clone(), format!("{host}:80")]);
    let mut names: Vec<String> = with_port.chain(without).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// "From the stream that this came on."
pub(super) fn over_ads() -> core::ConfigSource {
    core::ConfigSource {
        resource_api_version: core::ApiVersion::V3 as i32,
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource::default(),
        )),
        ..core::ConfigSource::default()
    }
}
