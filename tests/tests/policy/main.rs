//! What the proxies decide: stories of every policy, on real sidecars.

mod access;
mod balancing;
mod breakers;
mod bulkheads;
mod check;
mod connection_routes;
mod egress;
mod explain;
mod faults;
mod health;
mod live_policy;
mod missing;
mod missing_wire;
mod one_layer;
mod outlier;
mod policy_docs;
mod rate_limits;
mod refused;
mod retries;
mod retries_grpc;
mod retry_reasons;
mod routing;
mod shedding;
mod timeouts;
mod timers;
mod twice;
