//! Rules for connections as a whole, as Envoy knows them: a chain of filters for each server name.

use envoy_types::pb::envoy::config::listener::v3 as lds;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;

use super::encode::{chain, network_filter};
use crate::model::ConnectionRule;

/// A rule without backends has no chain: Envoy, too, closes what no chain takes.
pub(super) fn chains(rules: &[ConnectionRule]) -> Vec<lds::FilterChain> {
    let with_backends = rules.iter().filter(|rule| rule.backends.iter().any(|backend| backend.weight > 0));
    let chain = |rule: &ConnectionRule| lds::FilterChain {
        filter_chain_match: rule.hostname.as_ref().map(|name| lds::FilterChainMatch {
            server_names: vec![name.to_string()],
            ..lds::FilterChainMatch::default()
        }),
        name: rule.name.to_string(),
        ..chain(network_filter("envoy.filters.network.tcp_proxy", proxy(rule)))
    };
    with_backends.map(chain).collect()
}

fn proxy(rule: &ConnectionRule) -> tcp::TcpProxy {
    use tcp::tcp_proxy::weighted_cluster::ClusterWeight;
    let backends = rule.backends.iter().filter(|backend| backend.weight > 0);
    let clusters = backends.map(|backend| ClusterWeight {
        name: backend.cluster.to_string(),
        weight: backend.weight,
        ..ClusterWeight::default()
    });
    tcp::TcpProxy {
        stat_prefix: rule.name.to_string(),
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::WeightedClusters(tcp::tcp_proxy::WeightedCluster {
            clusters: clusters.collect(),
        })),
        ..tcp::TcpProxy::default()
    }
}
