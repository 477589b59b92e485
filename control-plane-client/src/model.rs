//! The mesh as a proxy sees it: decoded once, validated, then only read.
//!
//! Nothing here knows about xDS, files or Kubernetes; those are translated *into* this model.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheetbend_certs::SpiffeId;

pub mod access;
mod balancing;
mod breaker;
mod connections;
pub mod duration;
mod faults;
mod filters;
mod health_check;
pub mod jwt;
mod limits;
mod matching;
mod outlier;
mod policy;
mod retry;

pub use access::{Access, AccessRule, Action, AuthorizationPolicy, Condition, DefaultAccess, Glob, Operation, Source};
pub use balancing::{ConsistentHash, HttpCookie, LoadBalancer, LocalityLbSetting, MAX_RING, Simple, Standing, Warmup};
pub use breaker::CircuitBreaker;
pub use connections::{ConnectionBackend, ConnectionRule, is_hostname};
pub use faults::{Abort, Delay, Fault};
pub use filters::{Filters, HeaderEdit, HeaderEdits, PathEdit, REDIRECTS, Redirect, Rewrite};
pub use health_check::{GrpcCheck, HealthCheck, HttpCheck, Statuses, TcpCheck};
pub use jwt::{KeyMaterial, Octets, PublicKey, TokenIssuer};
pub use limits::{Concurrency, ConnectionPool, ForEach, HttpPool, RateLimit, TcpPool, TrafficLimits};
pub use matching::{BadPattern, MAX_PATTERN, Match, PathMatch, Pattern, TextMatch};
pub use outlier::OutlierDetection;
pub use policy::{BackendPolicy, InboundPolicy, RulePolicy, Timeouts, Unusable};
pub use retry::{MOST_ATTEMPTS, Retry, RetryConstraint, RetryOn};

/// What traffic asked for: a host (or an address) and a port.
///
/// `web:80`, `web.default.svc.cluster.local:8000`, `10.1.2.3:5432` or `[fd00::1]:80`. Hosts are lower case, without
/// a trailing dot; addresses are in their shortest form, so that equal targets are equal values.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Target {
    host: Arc<str>,
    port: u16,
}

impl Target {
    /// A target from a host name or an address without brackets, and a port.
    pub fn new(host: &str, port: u16) -> Result<Self, TargetError> {
        let trimmed = host.strip_suffix('.').unwrap_or(host);
        if let Ok(ip) = trimmed.parse::<std::net::IpAddr>() {
            return Ok(Self::from(SocketAddr::new(ip.to_canonical(), port)));
        }
        let well_formed = !trimmed.is_empty()
            && trimmed.len() <= 253
            && trimmed.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if !well_formed || ends_in_number(trimmed) {
            return Err(TargetError(host.to_string()));
        }
        Ok(Self { host: trimmed.to_ascii_lowercase().into(), port })
    }

    /// The host: a name, or an address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address, where the host is one.
    pub fn address(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.host.parse().ok()?, self.port))
    }
}

/// Whether a host can only be an IPv4 address, in a form that some look-ups take (`0x7f.1`, `127.1`) and this does not
/// (WHATWG URL, "ends in a number").
fn ends_in_number(host: &str) -> bool {
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
    match hex {
        Some(hex) => hex.bytes().all(|b| b.is_ascii_hexdigit()),
        None => last.bytes().all(|b| b.is_ascii_digit()),
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_canonical().to_string().into(), port: address.port() }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl TryFrom<String> for Target {
    type Error = TargetError;
    fn try_from(text: String) -> Result<Self, TargetError> {
        text.parse()
    }
}

impl FromStr for Target {
    type Err = TargetError;
    fn from_str(text: &str) -> Result<Self, TargetError> {
        let wrong = || TargetError(text.to_string());
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').ok_or_else(wrong)?,
            None if host.contains(':') => return Err(wrong()),
            None => host,
        };
        Self::new(host, port.parse().map_err(|_| wrong())?)
    }
}

/// Not a `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a target: write HOST:PORT, for example web:80 or [fd00::1]:80")]
pub struct TargetError(pub String);

/// A service of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServiceName {
    /// `web`.
    pub service: Arc<str>,
    /// `default`.
    pub namespace: Arc<str>,
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.service, self.namespace)
    }
}

/// A service's port: the name of an edge's far end, `web.default:8000`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// The service.
    pub service: ServiceName,
    /// The service's port, not the pod's.
    pub port: u16,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// What a port speaks, as far as someone said so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AppProtocol {
    /// Nobody said; the first bytes decide.
    #[default]
    Detect,
    /// HTTP/1.1. Callers may speak HTTP/2: the app gets HTTP/1.1, but for gRPC.
    Http,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// Bytes nobody looks into, server-first protocols included.
    Tcp,
    /// The app's own TLS: bytes nobody looks into.
    Tls,
}

impl FromStr for AppProtocol {
    type Err = String;

    /// As an operator says it of a port: `8000/http`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "http" => Ok(Self::Http),
            "http2" => Ok(Self::Http2),
            "grpc" => Ok(Self::Grpc),
            "tcp" => Ok(Self::Tcp),
            "tls" => Ok(Self::Tls),
            other => Err(format!("`{other}` is none of http, http2, grpc, tcp, tls")),
        }
    }
}

/// What a target stands for.
#[derive(Clone, Debug, PartialEq)]
pub enum Resolution {
    /// A destination of the mesh.
    Mesh(Arc<Destination>),
    /// The control plane said: no part of the mesh.
    NotMesh,
}

/// What the control plane says about the mesh as a whole, once, at start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    /// The trust domain.
    pub trust_domain: Arc<str>,
    /// Addresses that belong to the mesh: without an answer about one of them, nothing passes in plain.
    #[serde(default)]
    pub ranges: Vec<ipnet::IpNet>,
    /// Endings of the mesh's names, lower case and without a leading dot (`svc.cluster.local`). A name without any
    /// dot is always the mesh's.
    #[serde(default)]
    pub domains: Vec<Arc<str>>,
    /// What happens to the rest.
    #[serde(default)]
    pub outbound_policy: OutboundPolicy,
}

/// What happens to traffic that is for no part of the mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutboundPolicy {
    /// It passes, untouched.
    #[default]
    Allow,
    /// It is refused.
    Deny,
}

impl Mesh {
    /// Whether a name can only be a service of the mesh, so that nobody else is asked for it: one below `svc`.
    pub fn owns(&self, target: &Target) -> bool {
        let of_services = self.domains.iter().filter(|domain| domain.split('.').next() == Some("svc"));
        target.address().is_none() && of_services.into_iter().any(|domain| is_below(target.host(), domain))
    }

    /// Whether a target is the mesh's by its name or address alone, before anybody answered.
    pub fn claims(&self, target: &Target) -> bool {
        match target.address() {
            Some(address) => self.ranges.iter().any(|range| range.contains(&address.ip())),
            None => !target.host().contains('.') || self.domains.iter().any(|d| is_below(target.host(), d)),
        }
    }
}

/// Whether `host` is `domain` or a name below it.
fn is_below(host: &str, domain: &str) -> bool {
    host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A service port with its rules and backends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Destination {
    /// The service and its port.
    pub name: ServicePort,
    /// The trust domain of the mesh it is in; the last part of the SNI.
    pub trust_domain: Arc<str>,
    /// What the port speaks.
    #[serde(default)]
    pub protocol: AppProtocol,
    /// HTTP rules in the order in which they are tried. The first that matches decides; none: `default_cluster`.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Rules for connections as a whole, in the order in which they are tried. Where there are some, what none of them takes
    /// is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<ConnectionRule>,
    /// Where everything goes that no rule claims.
    pub default_cluster: ClusterName,
    /// Every cluster that `rules`, `connections` and `default_cluster` name; decoding guarantees it.
    pub clusters: BTreeMap<ClusterName, Arc<Cluster>>,
}

/// `web.default:8000`, unique in the mesh.
pub type ClusterName = Arc<str>;

/// One HTTP rule of a Gateway API `HTTPRoute` or `GRPCRoute`, indexed for reading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// `namespace/route#rule`, for logs.
    pub name: Arc<str>,
    /// Any of these; none means every request.
    pub matches: Vec<Match>,
    /// Weighted backends; the weights' sum is above zero and fits in u32. None: it redirects, or else there is nothing for
    /// its requests, which is answered with 404.
    pub backends: Vec<Backend>,
    /// What it wants of its requests beside.
    #[serde(default)]
    pub policy: Arc<RulePolicy>,
}

/// A weighted choice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Backend {
    /// A key of [`Destination::clusters`].
    pub cluster: ClusterName,
    /// Its share among the rule's backends.
    pub weight: u32,
    /// Edits for what goes to this one.
    #[serde(default)]
    pub headers: HeaderEdits,
}

/// A set of endpoints among which a request is balanced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Unique in the mesh.
    pub name: ClusterName,
    /// The service port behind it: the graph's name of the edge, and the first part of the SNI.
    pub service: ServicePort,
    /// Its endpoints; empty when none is ready.
    pub endpoints: Vec<Endpoint>,
    /// A host outside the mesh whose addresses are endpoints besides, as DNS says: plain, and looked up by the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<Target>,
    /// What its callers keep to.
    #[serde(default)]
    pub policy: Arc<BackendPolicy>,
}

/// One place that can answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Where to connect.
    pub address: SocketAddr,
    /// How to speak to it.
    pub transport: Transport,
    /// Its place among the others.
    #[serde(default)]
    pub standing: Standing,
    /// Name of the workload instance (a pod's name, a process's run id), for logs.
    #[serde(default)]
    pub workload: Arc<str>,
}

/// How an endpoint is reached. A meshed endpoint is never dialed in plain, whatever fails.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A Sheetbend peer with this identity: mutual TLS, ALPN `sheetbend/*`.
    Sheetbend(SpiffeId),
    /// Another proxy or an app with this identity: mutual TLS, ALPN `h2` and `http/1.1`.
    MutualTls(SpiffeId),
    /// Outside the mesh.
    Plain,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_a_look_up_would_take_for_an_address_is_no_name() {
        for host in ["10.66051", "167838211", "0x0a010203", "0XA.1", "0x", "10.1.2.0x3", "010.1.2.3", "10.1.515."] {
            assert!(Target::new(host, 80).is_err(), "{host}");
        }
        for host in ["10.1.2.3", "fd00::1", "web-1", "1.example", "v1.0xyz", "0xa.example", "localhost"] {
            assert!(Target::new(host, 80).is_ok(), "{host}");
        }
    }
}
