//! What becomes of connections to a port as a whole: TCPRoutes and TLSRoutes, put in order.

use std::cmp::Reverse;
use std::sync::Arc;

use sheetbend_control_plane_client::model::{ConnectionBackend, ConnectionRule, ServicePort};

use super::parts::Parts;
use crate::resources::{Route, RouteBackend, RouteRule, TCP_ROUTE, TLS_ROUTE};

impl Parts<'_> {
    /// What becomes of connections to a port as a whole, in order: exact names, the longest wildcards, then the oldest route.
    pub(crate) fn connections(&self, name: &ServicePort) -> Vec<ConnectionRule> {
        let routes = self.routes_of(name).into_iter().filter(|route| is_of_connections(route));
        let mut rules: Vec<ConnectionRule> = routes.flat_map(connection_rules).collect();
        let order = |rule: &ConnectionRule| match &rule.hostname {
            Some(name) => (name.starts_with('*'), Reverse(name.len())),
            None => (true, Reverse(0)),
        };
        rules.sort_by_key(order);
        rules
    }
}

/// Whether it takes connections as a whole, and no requests.
pub(super) fn is_of_connections(route: &Route) -> bool {
    matches!(route.kind, TLS_ROUTE | TCP_ROUTE)
}

/// One for every hostname of a route.
fn connection_rules(route: &Route) -> Vec<ConnectionRule> {
    let rule = |hostname: Option<Arc<str>>| {
        route.rules.iter().enumerate().map(move |(number, rule)| ConnectionRule {
            name: format!("{}/{}#{number}", route.name.namespace, route.name.service).into(),
            place: rule.policy.place.clone(),
            hostname: hostname.clone(),
            backends: connection_backends(rule),
        })
    };
    match route.hostnames.is_empty() {
        true => rule(None).collect(),
        false => route.hostnames.iter().flat_map(|name| rule(Some(name.clone()))).collect(),
    }
}

fn connection_backends(rule: &RouteRule) -> Vec<ConnectionBackend> {
    let backend = |b: &RouteBackend| {
        let name = ServicePort { service: b.service.clone(), port: b.port };
        ConnectionBackend { cluster: name.to_string().into(), weight: b.weight }
    };
    rule.backends.iter().filter(|b| b.weight > 0).map(backend).collect()
}
