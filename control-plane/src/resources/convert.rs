//! What was written, kind by kind, made into what the control plane works with; or the place of the mistake in it.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{self, AppProtocol, OutboundPolicy, ServiceName, Target, Transport};

use super::kinds::{self, Reference};
use super::parse::{Checked, mistake, not_among};
use super::{Backend, Parent, RouteBackend, Service, ServicePort, Settings, Slice, SliceEndpoint, SlicePort};

pub(super) mod access;
mod balancing;
mod connections;
mod faults;
mod filters;
mod limits;
mod policy;
mod retries;
mod routes;

pub(super) use connections::{tcp_route, tls_route};
pub(super) use faults::fault_injection;
pub(super) use limits::traffic_limit;
pub(super) use policy::backend_policy;
pub(super) use retries::backend_traffic;
pub(super) use routes::{grpc_route, http_route};

pub(super) fn service(raw: kinds::Service) -> Checked<Service> {
    let name = name_of(&raw.metadata)?;
    let mut cluster_ips = Vec::new();
    for text in raw.spec.cluster_ip.iter().chain(&raw.spec.cluster_ips) {
        // A headless service says "None".
        if text.value != "None" && !text.value.is_empty() {
            let ip = address(text)?;
            if !cluster_ips.contains(&ip) {
                cluster_ips.push(ip);
            }
        }
    }
    let mut ports = Vec::new();
    for port in raw.spec.ports.iter().filter(|port| is_tcp(port)) {
        let Some(number) = &port.port else {
            return mistake(raw.metadata.name.referenced, "a port of this Service has no `port`", None);
        };
        let number = port_number(number)?;
        let target = match port.target_port {
            Some(kinds::IntOrName::Int(target)) if target != 0 => target,
            _ => number,
        };
        ports.push(ServicePort { name: name_or_empty(port), port: number, target, protocol: protocol(port) });
    }
    let external_name = external_name(&raw.spec)?;
    if external_name.is_some() && ports.is_empty() {
        let hint = "name those that may be called: ports: [{port: 443, appProtocol: tls}]";
        return mistake(raw.metadata.name.referenced, "an ExternalName without ports leads nowhere", hint);
    }
    Ok(Service { name, cluster_ips, external_name, ports })
}

/// The host that a Service of `type: ExternalName` stands for.
fn external_name(spec: &kinds::ServiceSpec) -> Checked<Option<Arc<str>>> {
    let kind = spec.r#type.as_ref().filter(|kind| kind.value == "ExternalName");
    match (kind, &spec.external_name) {
        (None, None) => Ok(None),
        (None, Some(name)) => mistake(
            name.referenced,
            "only a Service of type ExternalName has an externalName",
            "write type: ExternalName",
        ),
        (Some(kind), None) => {
            mistake(kind.referenced, "no externalName: this Service stands for nothing", "name a host: api.example.com")
        }
        (Some(_), Some(name)) => match Target::new(&name.value, 1).ok().filter(|host| host.address().is_none()) {
            Some(host) => Ok(Some(host.host().into())),
            None => {
                let hint = "write a host such as api.example.com; addresses go into an EndpointSlice";
                mistake(name.referenced, format!("`{}` is not a host's name", name.value), hint)
            }
        },
    }
}

pub(super) fn slice(raw: kinds::EndpointSlice) -> Checked<Slice> {
    let object = name_among(&raw.metadata, &SLICE_ANNOTATIONS)?;
    let Some(service) = raw.metadata.labels.get("kubernetes.io/service-name") else {
        let hint = "set it to the Service that these endpoints belong to";
        return mistake(raw.metadata.name.referenced, "the label `kubernetes.io/service-name` is missing", hint);
    };
    let service = ServiceName { service: service.as_str().into(), namespace: object.namespace.clone() };
    let mut ports = Vec::new();
    for port in raw.ports.iter().filter(|port| is_tcp(port)) {
        let Some(number) = &port.port else {
            return mistake(raw.metadata.name.referenced, "a port of this EndpointSlice has no `port`", None);
        };
        ports.push(SlicePort { name: name_or_empty(port), port: port_number(number)?, protocol: protocol(port) });
    }
    let standing = balancing::standing(&raw.metadata)?;
    let mut endpoints = Vec::new();
    for endpoint in raw.endpoints.iter().filter(|endpoint| endpoint.conditions.ready != Some(false)) {
        let workload = endpoint.target_ref.as_ref().and_then(|to| to.name.as_deref()).unwrap_or_default();
        let standing = balancing::zone(endpoint, &standing)?;
        for text in &endpoint.addresses {
            let (address, workload) = (address(text)?, workload.into());
            endpoints.push(SliceEndpoint { address, workload, standing: standing.clone() });
        }
    }
    Ok(Slice { object, service, transport: transport(&raw.metadata)?, ports, endpoints })
}

const IDENTITY: &str = "sheetbend.io/identity";
const PEER: &str = "sheetbend.io/peer";
const SLICE_ANNOTATIONS: [&str; 4] = [IDENTITY, PEER, balancing::WEIGHT, balancing::PRIORITY];

/// [`IDENTITY`] makes the endpoints meshed; `mtls` as [`PEER`] says that they are not ours.
fn transport(meta: &kinds::Meta) -> Checked<Transport> {
    let peer = meta.annotations.get(PEER);
    let Some(identity) = meta.annotations.get(IDENTITY) else {
        return match peer {
            Some(peer) => {
                let hint = "add the annotation sheetbend.io/identity, a SPIFFE id";
                mistake(peer.referenced, "a peer without an identity cannot be verified", hint)
            }
            None => Ok(Transport::Plain),
        };
    };
    let id = identity
        .value
        .parse()
        .or_else(|error: sheetbend_certs::SpiffeIdError| mistake(identity.referenced, error.to_string(), None))?;
    match peer.map(|peer| (peer.value.as_str(), peer.referenced)) {
        None | Some(("sheetbend", _)) => Ok(Transport::Sheetbend(id)),
        Some(("mtls", _)) => Ok(Transport::MutualTls(id)),
        Some((other, at)) => mistake(at, format!("`{other}` is not a kind of peer"), "write sheetbend or mtls"),
    }
}

/// The name of a route that has these annotations, and the Services that it is attached to.
fn parents_of(
    meta: &kinds::Meta,
    annotations: &[&str],
    refs: &Spanned<Vec<Reference>>,
) -> Checked<(ServiceName, Vec<Parent>)> {
    let name = name_among(meta, annotations)?;
    if refs.value.is_empty() {
        return mistake(refs.referenced, "no parentRef: this route is attached to nothing", "name a Service");
    }
    let mut parents = Vec::new();
    for parent in &refs.value {
        let (service, port) = to_service(parent, &name, "parentRef")?;
        if service.namespace != name.namespace {
            let at = parent.namespace.as_ref().map_or(parent.name.referenced, |n| n.referenced);
            let hint = "put the route into the namespace of its Service";
            return mistake(at, "routes of another namespace than their Service's are not obeyed here", hint);
        }
        parents.push(Parent { at: parent.name.referenced.into(), service, port });
    }
    Ok((name, parents))
}

/// What the Gateway API allows of them in a rule.
const MOST_BACKENDS: usize = 16;

/// The backends of a rule. `at` is where the rule is, as far as that is known.
fn backends(refs: &[Reference], route: &ServiceName, at: Location) -> Checked<Vec<RouteBackend>> {
    routes::at_most("backendRefs", refs.len(), MOST_BACKENDS, at)?;
    let backends = backend_refs(refs, route)?;
    if refs.is_empty() {
        return mistake(at, "a rule without a backend answers nothing", "name a Service and its port in backendRefs");
    }
    if let Some(first) = refs.first().filter(|_| backends.iter().all(|backend| backend.weight == 0)) {
        return mistake(
            first.name.referenced,
            "the weights of this rule's backends sum to zero: it answers nothing",
            "give one of them a weight of 1 or more",
        );
    }
    Ok(backends)
}

fn backend_refs(refs: &[Reference], route: &ServiceName) -> Checked<Vec<RouteBackend>> {
    let mut backends = Vec::new();
    for reference in refs {
        let (service, port) = to_service(reference, route, "backendRef")?;
        let Some(port) = port else {
            return mistake(reference.name.referenced, "this backendRef has no `port`", "a Service needs one");
        };
        let weight = reference.weight.as_ref().map_or(1, |w| w.value);
        if let Some(wrong) = reference.weight.as_ref().filter(|w| w.value > 1_000_000) {
            return mistake(wrong.referenced, format!("weight {} is above 1000000", wrong.value), None);
        }
        let (at, headers) = (reference.name.referenced.into(), filters::edits(&reference.filters)?);
        backends.push(RouteBackend { at, service, port, weight, headers });
    }
    Ok(backends)
}

/// A whole Service that a policy is about.
fn whole_service(reference: &Reference, object: &ServiceName) -> Checked<ServiceName> {
    let (service, _) = to_service(reference, object, "targetRef")?;
    match &reference.port {
        Some(port) => mistake(port.referenced, "this policy holds for all ports of a Service", "take `port` out"),
        None => Ok(service),
    }
}

/// Only what is one of several has a share.
fn unweighted(reference: &Reference, what: &str) -> Checked<()> {
    match &reference.weight {
        Some(weight) => mistake(weight.referenced, format!("a {what} has no weight"), "write it at a backendRef"),
        None => Ok(()),
    }
}

fn to_service(reference: &Reference, route: &ServiceName, what: &str) -> Checked<(ServiceName, Option<u16>)> {
    if what != "backendRef" {
        unweighted(reference, what)?;
    }
    if let Some(filter) = reference.filters.first().filter(|_| what != "backendRef") {
        return mistake(filter.r#type.referenced, format!("a {what} has no filters"), "write them at the rule");
    }
    let kind = reference.kind.as_ref();
    // A parentRef without a kind means a Gateway, a backendRef without one a Service.
    let is_service = kind.map_or(what == "backendRef", |kind| kind.value == "Service");
    if !is_service {
        let at = kind.map_or(reference.name.referenced, |kind| kind.referenced);
        return mistake(at, format!("this {what} is no Service"), "write kind: Service and group: \"\"");
    }
    if let Some(group) = reference.group.as_ref().filter(|group| !matches!(group.value.as_str(), "" | "core")) {
        return mistake(group.referenced, format!("a Service is not in group `{}`", group.value), "write group: \"\"");
    }
    let namespace = match &reference.namespace {
        Some(namespace) => label(namespace)?,
        None => route.namespace.clone(),
    };
    let port = reference.port.as_ref().map(port_number).transpose()?;
    Ok((ServiceName { service: label(&reference.name)?, namespace }, port))
}

pub(super) fn settings(raw: kinds::MeshSettings) -> Checked<Settings> {
    let outbound_policy = match raw.spec.outbound_policy.as_ref().map(|p| (p.value.as_str(), p.referenced)) {
        None => None,
        Some(("Allow", _)) => Some(OutboundPolicy::Allow),
        Some(("Deny", _)) => Some(OutboundPolicy::Deny),
        Some((other, at)) => return mistake(at, format!("outboundPolicy `{other}`"), "write Allow or Deny"),
    };
    Ok(Settings {
        object: name_of(&raw.metadata)?,
        trust_domain: raw.spec.trust_domain.map(|t| t.value.as_str().into()),
        mesh_ranges: raw.spec.mesh_ranges.iter().map(range).collect::<Checked<_>>()?,
        allowed_addresses: raw.spec.allowed_addresses.iter().map(range).collect::<Checked<_>>()?,
        outbound_policy,
        default_inbound_policy: access::default_access(raw.spec.default_inbound_policy.as_ref())?,
    })
}

/// The name of a kind that has no annotations of ours.
fn name_of(meta: &kinds::Meta) -> Checked<ServiceName> {
    name_among(meta, &[])
}

/// The name of a kind that has these annotations of ours: one with a typo must not look as if it worked.
fn name_among(meta: &kinds::Meta, annotations: &[&str]) -> Checked<ServiceName> {
    let mut ours = meta.annotations.iter().filter(|(name, _)| name.starts_with("sheetbend.io/"));
    if let Some((name, text)) = ours.find(|(name, _)| !annotations.contains(&name.as_str())) {
        let reason = format!("`{name}` is not an annotation that is obeyed here");
        return not_among(text.referenced, name, reason, annotations);
    }
    let namespace = match &meta.namespace {
        Some(namespace) => label(namespace)?,
        None => "default".into(),
    };
    Ok(ServiceName { service: label(&meta.name)?, namespace })
}

/// A name as SPIFFE ids and DNS can both carry it.
fn label(text: &Spanned<String>) -> Checked<Arc<str>> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
    match (1..=253).contains(&text.value.len()) && text.value.bytes().all(good) {
        true => Ok(text.value.as_str().into()),
        false => {
            let hint = "lower-case letters, digits, `-`, `_` and `.` are all that it may have";
            mistake(text.referenced, format!("`{}` is not a name", text.value), hint)
        }
    }
}

fn address(text: &Spanned<String>) -> Checked<IpAddr> {
    match text.value.parse::<IpAddr>() {
        Ok(ip) => Ok(ip.to_canonical()),
        Err(_) => mistake(text.referenced, format!("`{}` is not an IP address", text.value), None),
    }
}

/// `10.0.0.0/8`, or one address.
fn range(text: &Spanned<String>) -> Checked<IpNet> {
    let hint = "write one like 10.0.0.0/8 or 192.0.2.7";
    model::access::range(&text.value)
        .map_or_else(|| mistake(text.referenced, format!("`{}` is not a range of addresses", text.value), hint), Ok)
}

fn port_number(port: &Spanned<u16>) -> Checked<u16> {
    match port.value {
        0 => mistake(port.referenced, "port 0 cannot be reached", "ports go from 1 to 65535"),
        number => Ok(number),
    }
}

fn is_tcp(port: &kinds::Port) -> bool {
    port.protocol.as_deref().unwrap_or("TCP") == "TCP"
}

fn name_or_empty(port: &kinds::Port) -> Arc<str> {
    port.name.as_deref().unwrap_or_default().into()
}

/// What a port speaks: its `appProtocol`, or else the first part of its name (`http-admin`), as Istio reads it.
fn protocol(port: &kinds::Port) -> AppProtocol {
    let word = port.app_protocol.as_deref().or(port.name.as_deref()).unwrap_or_default();
    match word.split('-').next().unwrap_or_default() {
        "http" => AppProtocol::Http,
        "http2" | "h2c" => AppProtocol::Http2,
        "kubernetes.io/h2c" => AppProtocol::Http2,
        "kubernetes.io/ws" => AppProtocol::Http,
        "grpc" => AppProtocol::Grpc,
        "tcp" | "mysql" | "mongo" | "redis" | "postgres" | "postgresql" | "smtp" => AppProtocol::Tcp,
        "https" | "tls" => AppProtocol::Tls,
        _ => AppProtocol::Detect,
    }
}
