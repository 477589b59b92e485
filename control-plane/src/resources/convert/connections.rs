//! Routes of connections: which of them a route takes, and where they go.

use std::sync::Arc;

use serde_saphyr::Spanned;
use sheetbend_control_plane_client::model::{RulePolicy, ServiceName, is_hostname};

use super::routes::{at_most, created};
use super::{MOST_BACKENDS, backend_refs, parents_of};
use crate::resources::kinds::{ConnectionRoute, ConnectionRule};
use crate::resources::parse::{Checked, both, every, mistake};
use crate::resources::{Route, RouteRule, TCP_ROUTE, TLS_ROUTE};

/// What the Gateway API allows.
const MOST_HOSTNAMES: usize = 16;

pub(in crate::resources) fn tcp_route(raw: ConnectionRoute) -> Checked<Route> {
    if let Some(hostname) = raw.spec.hostnames.first() {
        let hint = "only a ClientHello names one: write kind: TLSRoute, or take them out";
        return mistake(hostname.referenced, "a TCPRoute has no hostnames", hint);
    }
    route(TCP_ROUTE, &raw, Vec::new())
}

pub(in crate::resources) fn tls_route(raw: ConnectionRoute) -> Checked<Route> {
    let at = raw.metadata.name.referenced;
    if raw.spec.hostnames.is_empty() {
        let hint = "name some in hostnames, or write kind: TCPRoute for all connections";
        return mistake(at, "a TLSRoute without hostnames takes no connection", hint);
    }
    at_most("hostnames", raw.spec.hostnames.len(), MOST_HOSTNAMES, at)?;
    let mut hostnames: Vec<Arc<str>> = Vec::new();
    for text in &raw.spec.hostnames {
        let name: Arc<str> = text.value.to_ascii_lowercase().into();
        if !is_hostname(&name) {
            let hint = "write one like db.example or *.db.example; a ClientHello never names an address";
            return mistake(text.referenced, format!("`{}` is not a hostname", text.value), hint);
        }
        if hostnames.contains(&name) {
            return mistake(text.referenced, format!("`{name}` is there twice"), "take one of the two out");
        }
        hostnames.push(name);
    }
    route(TLS_ROUTE, &raw, hostnames)
}

fn route(kind: &'static str, raw: &ConnectionRoute, hostnames: Vec<Arc<str>>) -> Checked<Route> {
    let (name, parents) = parents_of(&raw.metadata, &[], &raw.spec.parent_refs)?;
    let Some(first) = raw.spec.rules.first() else {
        let hint = "add one with backendRefs";
        return mistake(raw.metadata.name.referenced, format!("a {kind} without a rule leads nowhere"), hint);
    };
    let only = match raw.spec.rules.get(1) {
        Some(second) => {
            let hint = "put all backends into one rule, each with its weight";
            mistake(second.referenced, format!("of the rules of a {kind} only the first could ever hold"), hint)
        }
        None => Ok(()),
    };
    let (rule, ()) = both(rule(first, &name), only)?;
    Ok(Route { kind, name, created: created(&raw.metadata)?, parents, hostnames, rules: vec![rule] })
}

/// Weights that sum to zero are well: whoever writes them wants connections refused.
fn rule(raw: &Spanned<ConnectionRule>, route: &ServiceName) -> Checked<RouteRule> {
    let (at, refs) = (raw.referenced, &raw.value.backend_refs);
    at_most("backends", refs.len(), MOST_BACKENDS, at)?;
    every(refs.iter().flat_map(|backend| &backend.filters).map(|filter| {
        mistake::<()>(filter.r#type.referenced, "nothing filters bytes that nobody looks into", "take the filters out")
    }))?;
    let backends = backend_refs(refs, route)?;
    Ok(RouteRule { at: at.into(), matches: Vec::new(), backends, policy: RulePolicy::default().into() })
}
