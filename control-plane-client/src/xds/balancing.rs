//! How requests are spread, in Envoy's own words, for a foreign Envoy. What it has no word for it does its own way.

use envoy_types::pb::envoy::config::cluster::v3 as cds;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3::{Int64Range, Percent};
use envoy_types::pb::google::protobuf::{Duration, UInt32Value, UInt64Value};

use crate::model::{BackendPolicy, HealthCheck, LoadBalancer, Simple, Warmup};

/// A cluster with what its policy says of balancing and health checks.
pub(super) fn say(policy: &BackendPolicy, cluster: cds::Cluster) -> cds::Cluster {
    use cds::cluster::{LbConfig, LbPolicy, LeastRequestLbConfig, RingHashLbConfig, RoundRobinLbConfig};
    let usual = LoadBalancer::default();
    let balancer = policy.load_balancer.as_ref().unwrap_or(&usual);
    let slow_start_config = balancer.warmup.as_ref().map(slow_start);
    let (lb_policy, lb_config) = match (&balancer.consistent_hash, balancer.simple.unwrap_or_default()) {
        (Some(hash), _) => {
            let minimum_ring_size = hash.minimum_ring_size.map(|size| UInt64Value { value: size.into() });
            let ring = RingHashLbConfig { minimum_ring_size, ..RingHashLbConfig::default() };
            (LbPolicy::RingHash, Some(LbConfig::RingHashLbConfig(ring)))
        }
        (None, Simple::RoundRobin) => {
            let config = RoundRobinLbConfig { slow_start_config };
            (LbPolicy::RoundRobin, Some(LbConfig::RoundRobinLbConfig(config)))
        }
        (None, Simple::Random) => (LbPolicy::Random, None),
        (None, Simple::PeakEwma | Simple::LeastRequest) => {
            let config = LeastRequestLbConfig { slow_start_config, ..LeastRequestLbConfig::default() };
            (LbPolicy::LeastRequest, Some(LbConfig::LeastRequestLbConfig(config)))
        }
    };
    let health_checks = policy.health_check.iter().map(health_check).collect();
    cds::Cluster { lb_policy: lb_policy as i32, lb_config, health_checks, ..cluster }
}

fn slow_start(warmup: &Warmup) -> cds::cluster::SlowStartConfig {
    let aggression = warmup.aggression.map(|aggression| core::RuntimeDouble {
        default_value: aggression,
        runtime_key: "sheetbend.io/aggression".into(),
    });
    cds::cluster::SlowStartConfig {
        slow_start_window: Some(duration(warmup.duration)),
        aggression,
        min_weight_percent: warmup.minimum_percent.map(|value| Percent { value }),
    }
}

fn health_check(check: &HealthCheck) -> core::HealthCheck {
    use core::health_check::{GrpcHealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck};
    let checker = match (&check.http, &check.grpc) {
        (Some(http), _) => HealthChecker::HttpHealthCheck(HttpHealthCheck {
            path: http.path.to_string(),
            // Of Envoy's ranges, the end is the first that is not of it.
            expected_statuses: http
                .expected_statuses
                .iter()
                .map(|statuses| Int64Range { start: statuses.start.into(), end: i64::from(statuses.end) + 1 })
                .collect(),
            ..HttpHealthCheck::default()
        }),
        (None, Some(grpc)) => HealthChecker::GrpcHealthCheck(GrpcHealthCheck {
            service_name: grpc.service.to_string(),
            ..GrpcHealthCheck::default()
        }),
        (None, None) => HealthChecker::TcpHealthCheck(TcpHealthCheck::default()),
    };
    let threshold = |said: Option<u32>, usual| Some(UInt32Value { value: said.unwrap_or(usual) });
    core::HealthCheck {
        timeout: Some(duration(check.timeout.unwrap_or(HealthCheck::TIMEOUT))),
        interval: Some(duration(check.interval.unwrap_or(HealthCheck::INTERVAL))),
        interval_jitter: check.jitter.map(duration),
        healthy_threshold: threshold(check.healthy_threshold, HealthCheck::HEALTHY_THRESHOLD),
        unhealthy_threshold: threshold(check.unhealthy_threshold, HealthCheck::UNHEALTHY_THRESHOLD),
        health_checker: Some(checker),
        ..core::HealthCheck::default()
    }
}

fn duration(ours: std::time::Duration) -> Duration {
    Duration { seconds: ours.as_secs().min(i64::MAX as u64) as i64, nanos: ours.subsec_nanos() as i32 }
}
