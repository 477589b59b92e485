//! Limits in Envoy's words, for peers that know no others.

use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, circuit_breakers::Thresholds};
use envoy_types::pb::google::protobuf::UInt32Value;

use super::encode::duration;
use crate::model::BackendPolicy;

/// Adds `connectionPool`.
pub(super) fn say(policy: &BackendPolicy, cluster: Cluster) -> Cluster {
    let Some(pool) = &policy.connection_pool else { return cluster };
    let number = |limit: Option<u32>| limit.map(|value| UInt32Value { value });
    let thresholds = Thresholds {
        max_connections: number(pool.tcp.max_connections),
        max_pending_requests: number(pool.http.http1_max_pending_requests),
        max_requests: number(pool.http.http2_max_requests),
        max_retries: number(pool.http.max_retries),
        ..Thresholds::default()
    };
    let breakers = CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() };
    let connect_timeout = pool.tcp.connect_timeout.map(duration).or(cluster.connect_timeout);
    Cluster { circuit_breakers: Some(breakers), connect_timeout, ..cluster }
}
