//! Limits as they are written, made into what a proxy obeys.

use std::sync::Arc;

use http::HeaderName;
use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{self, ForEach, ServiceName, TrafficLimits, Unusable};

use super::kinds::{Reference, limits as kinds};
use super::policy::{refused, span};
use super::{label, name_of, unweighted, whole_service};
use crate::resources::parse::{Checked, mistake};
use crate::resources::{Limit, Parent, RouteTarget};

/// `connectionPool` of a BackendPolicy.
pub(super) fn connection_pool(raw: &Spanned<kinds::ConnectionPool>) -> Checked<model::ConnectionPool> {
    let (tcp, http) = (raw.value.tcp.as_ref(), raw.value.http.as_ref());
    let connections = tcp.and_then(|tcp| tcp.max_connections.as_ref());
    let pending = http.and_then(|http| http.http1_max_pending_requests.as_ref());
    let requests = http.and_then(|http| http.http2_max_requests.as_ref());
    let connect = tcp.and_then(|tcp| tcp.connect_timeout.as_ref());
    let pool = model::ConnectionPool {
        tcp: model::TcpPool {
            max_connections: number(connections),
            connect_timeout: span(connect)?,
            idle_timeout: span(tcp.and_then(|tcp| tcp.idle_timeout.as_ref()))?,
        },
        http: model::HttpPool {
            http1_max_pending_requests: number(pending),
            http2_max_requests: number(requests),
            max_requests_per_connection: number(http.and_then(|http| http.max_requests_per_connection.as_ref())),
            max_retries: number(http.and_then(|http| http.max_retries.as_ref())),
            idle_timeout: span(http.and_then(|http| http.idle_timeout.as_ref()))?,
        },
    };
    pool.check().or_else(|error| {
        let at = match error.field.rsplit('.').next() {
            Some("connectTimeout") => connect.map(|found| found.referenced),
            Some("maxConnections") => place(connections),
            Some("http1MaxPendingRequests") => place(pending),
            _ => place(requests),
        };
        refused(&error, at.unwrap_or(raw.referenced))
    })?;
    Ok(pool)
}

fn number(found: Option<&Spanned<u32>>) -> Option<u32> {
    found.map(|found| found.value)
}

fn place(found: Option<&Spanned<u32>>) -> Option<Location> {
    found.map(|found| found.referenced)
}

/// A TrafficLimit.
pub(in crate::resources) fn traffic_limit(raw: kinds::TrafficLimit) -> Checked<Limit> {
    let object = name_of(&raw.metadata)?;
    let spec = &raw.spec;
    if spec.target_refs.value.is_empty() {
        let hint = "name a Service, an HTTPRoute or a GRPCRoute";
        return mistake(spec.target_refs.referenced, "no targetRef: this policy is about nothing", hint);
    }
    if spec.rates.is_empty() && spec.concurrency.is_none() {
        return mistake(raw.metadata.name.referenced, "this policy limits nothing", "write rates, concurrency or both");
    }
    let rates = spec.rates.iter().enumerate().map(|(number, rate)| self::rate(&object, number, rate));
    let limits = TrafficLimits {
        rates: rates.collect::<Checked<_>>()?,
        concurrency: spec.concurrency.as_ref().map(concurrency).transpose()?,
    };
    let place = |error: &Unusable| {
        let number = error.field.strip_prefix("rates[").and_then(|rest| rest.split(']').next()?.parse::<usize>().ok());
        let rate = number.and_then(|number| spec.rates.get(number)).map(|rate| rate.referenced);
        rate.or(spec.concurrency.as_ref().map(|found| found.referenced)).unwrap_or(raw.metadata.name.referenced)
    };
    limits.check().or_else(|error| refused(&error, place(&error)))?;
    let (mut services, mut routes) = (Vec::new(), Vec::new());
    for target in &spec.target_refs.value {
        let namespace = match route_kind(target) {
            Some(kind) => {
                limits.check_of_route().or_else(|error| refused(&error, place(&error)))?;
                if let Some(timeout) = spec.concurrency.as_ref().and_then(|of| of.value.pending_timeout.as_ref()) {
                    let hint = "take it out, or target the Service";
                    return mistake(timeout.referenced, "a connection is waited for as long as it may take", hint);
                }
                let name = route_name(target, &object)?;
                let namespace = name.namespace.clone();
                routes.push(RouteTarget { at: target.name.referenced.into(), kind, name });
                namespace
            }
            None => {
                limits.check_of_service().or_else(|error| refused(&error, place(&error)))?;
                let service = whole_service(target, &object)?;
                let namespace = service.namespace.clone();
                services.push(Parent { at: target.name.referenced.into(), service, port: None });
                namespace
            }
        };
        if namespace != object.namespace {
            let hint = "put the policy into the namespace of its target";
            return mistake(target.name.referenced, "a policy is about what is in its own namespace", hint);
        }
    }
    Ok(Limit { object, services, routes, limits })
}

fn route_kind(target: &Reference) -> Option<&'static str> {
    let kind = target.kind.as_ref()?.value.as_str();
    ["HTTPRoute", "GRPCRoute"].into_iter().find(|known| *known == kind)
}

fn route_name(target: &Reference, object: &ServiceName) -> Checked<ServiceName> {
    const GROUP: &str = "gateway.networking.k8s.io";
    unweighted(target, "targetRef")?;
    if let Some(port) = &target.port {
        return mistake(port.referenced, "a route has no port", "take `port` out: the route's own parentRefs say it");
    }
    match target.group.as_ref() {
        Some(group) if group.value == GROUP => {}
        Some(group) => {
            let hint = "write group: gateway.networking.k8s.io";
            return mistake(group.referenced, format!("a route is not in group `{}`", group.value), hint);
        }
        None => {
            return mistake(
                target.name.referenced,
                "a route needs its group",
                "write group: gateway.networking.k8s.io",
            );
        }
    }
    let namespace = target.namespace.as_ref().map(label).transpose()?;
    Ok(ServiceName { service: label(&target.name)?, namespace: namespace.unwrap_or_else(|| object.namespace.clone()) })
}

fn rate(object: &ServiceName, number: usize, raw: &Spanned<kinds::Rate>) -> Checked<model::RateLimit> {
    let written = &raw.value;
    let for_each = match (written.for_each.as_ref().map(|found| found.value.as_str()), &written.header) {
        (None, None) => ForEach::Everybody,
        (Some("Caller"), None) => ForEach::Caller,
        (Some("Header"), Some(header)) => match header.value.parse::<HeaderName>() {
            Ok(name) => ForEach::Header(name.as_str().into()),
            Err(_) => return mistake(header.referenced, format!("`{}` is not a header's name", header.value), None),
        },
        (Some("Header"), None) => {
            return mistake(raw.referenced, "forEach: Header without its `header`", "name the header");
        }
        (Some(other), _) if !matches!(other, "Caller" | "Header") => {
            let at = written.for_each.as_ref().map_or(raw.referenced, |found| found.referenced);
            return mistake(at, format!("forEach `{other}`"), "write Caller or Header, or leave it out");
        }
        (_, header) => {
            let at = header.as_ref().map_or(raw.referenced, |found| found.referenced);
            return mistake(at, "`header` belongs to forEach: Header", "write forEach: Header");
        }
    };
    Ok(model::RateLimit {
        name: format!("{}/{}#{number}", object.namespace, object.service).into(),
        requests: written.requests,
        interval: span(Some(&written.interval))?.unwrap_or_default(),
        burst: written.burst,
        for_each,
    })
}

fn concurrency(raw: &Spanned<kinds::Concurrency>) -> Checked<model::Concurrency> {
    let written = &raw.value;
    if let Some(connections) = &written.max_connections {
        let hint = "write a BackendPolicy's connectionPool.tcp.maxConnections";
        let why = "connections are a destination's, shared by the requests of all of its routes";
        return mistake(connections.referenced, why, hint);
    }
    let path = |path: &Spanned<String>| match path.value.starts_with('/') {
        true => Ok(Arc::from(path.value.as_str())),
        false => mistake(path.referenced, format!("the path `{}` does not begin with /", path.value), None),
    };
    Ok(model::Concurrency {
        max_requests: written.max_requests,
        max_pending: written.max_pending,
        max_retries: written.max_retries,
        pending_timeout: span(written.pending_timeout.as_ref())?.unwrap_or(std::time::Duration::from_secs(1)),
        stall_timeout: span(written.stall_timeout.as_ref())?,
        exempt_paths: written.exempt_paths.iter().map(path).collect::<Checked<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::resources::Resource;
    use crate::resources::parse::parse;

    fn limit(targets: &str, rest: &str) -> Result<Limit, String> {
        let text = format!(
            "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: web}}\nspec:\n  \
             targetRefs: [{targets}]\n{rest}"
        );
        let read = parse(Path::new("web.yaml"), &text);
        match read.resources.into_iter().next() {
            Some((_, Resource::Limit(limit))) => Ok(limit),
            _ => Err(read.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        }
    }

    const SERVICE: &str = "{kind: Service, group: \"\", name: web}";
    const ROUTE: &str = "{kind: HTTPRoute, group: gateway.networking.k8s.io, name: web}";

    #[test]
    fn a_traffic_limit_is_of_services_and_of_routes() {
        let both = format!("{SERVICE}, {ROUTE}");
        let read = limit(&both, "  rates: [{requests: 10, interval: 1s}]\n  concurrency: {maxRequests: 5}\n").unwrap();
        assert_eq!((read.services.len(), read.routes.len()), (1, 1));
        assert_eq!(read.limits.rates[0].burst(), 10);
        assert_eq!(read.limits.concurrency.unwrap().max_requests, 5);
        let read = limit(ROUTE, "  concurrency: {maxRequests: 5, maxPending: 4, maxRetries: 0}\n").unwrap();
        let concurrency = read.limits.concurrency.unwrap();
        assert_eq!((concurrency.max_pending, concurrency.max_retries), (Some(4), Some(0)));
        let header = "  rates: [{requests: 10, interval: 1m, burst: 20, forEach: Header, header: X-Key}]\n";
        let read = limit(SERVICE, header).unwrap();
        assert_eq!(read.limits.rates[0].for_each, ForEach::Header("x-key".into()));
    }

    fn pool(words: &str) -> Result<model::ConnectionPool, String> {
        let text = format!(
            "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: web}}\nspec:\n  \
             targetRefs: [{{kind: Service, group: \"\", name: web}}]\n  connectionPool: {{{words}}}\n"
        );
        let read = parse(Path::new("web.yaml"), &text);
        match read.resources.into_iter().next() {
            Some((_, Resource::Backend(backend))) => Ok(backend.policy.connection_pool.clone().unwrap()),
            _ => Err(read.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")),
        }
    }

    #[test]
    fn a_pool_bounds_connects_and_what_stands_still() {
        let read = pool("tcp: {connectTimeout: 500ms, idleTimeout: 1h}, http: {idleTimeout: 0s}").unwrap();
        let millis = [read.tcp.connect_timeout, read.tcp.idle_timeout, read.http.idle_timeout]
            .map(|time| time.map(|time| time.as_millis()));
        assert_eq!(millis, [Some(500), Some(3_600_000), Some(0)]);
        let refused = pool("tcp: {connectTimeout: 0s}").unwrap_err();
        assert!(refused.contains("web.yaml:6:42: connectionPool.tcp.connectTimeout"), "{refused}");
        assert!(pool("tcp: {idleTimeout: soon}").is_err());
    }

    #[test]
    fn what_cannot_be_kept_is_refused_with_its_place_and_a_reason() {
        let cases = [
            (SERVICE, "  rates: [{requests: 0, interval: 1s}]", "web.yaml:6:11: rates[0].requests: with 0 nothing"),
            (SERVICE, "  rates: [{requests: 1, interval: 0s}]", "rates[0].interval"),
            (SERVICE, "  rates: [{requests: 1, interval: 1s, forEach: Header}]", "without its `header`"),
            (SERVICE, "  rates: [{requests: 1, interval: 1s, header: x}]", "belongs to forEach: Header"),
            (SERVICE, "  rates: [{requests: 1, interval: 1s, forEach: Path}]", "write Caller or Header"),
            (SERVICE, "  concurrency: {maxRequests: 0}", "concurrency.maxRequests"),
            (SERVICE, "  concurrency: {maxRequests: 1, maxPending: 1, pendingTimeout: 0s}", "pendingTimeout"),
            (SERVICE, "  concurrency: {maxRequests: 1, exemptPaths: [health]}", "does not begin with /"),
            (SERVICE, "", "limits nothing"),
            (ROUTE, "  rates: [{requests: 1, interval: 1s, forEach: Caller}]", "target the Service"),
            (ROUTE, "  concurrency: {maxRequests: 1, maxPending: 0}", "waits for no connection"),
            (ROUTE, "  concurrency: {maxRequests: 1, pendingTimeout: 1s}", "web.yaml:6:49: a connection is waited for"),
            (ROUTE, "  concurrency: {maxRequests: 1, exemptPaths: [/a]}", "write another route"),
            (ROUTE, "  concurrency: {maxRequests: 1, maxConnections: 1}", "connectionPool.tcp.maxConnections"),
            (
                SERVICE,
                "  concurrency: {maxRequests: 1, maxConnections: 1}",
                "web.yaml:6:49: connections are a destination's",
            ),
            (SERVICE, "  concurrency: {maxRequests: 1, maxRetries: 1}", "connectionPool.http.maxRetries"),
            (ROUTE, "  concurrency: {maxRequests: 1, stallTimeout: 1s}", "target the Service"),
            (SERVICE, "  concurrency: {maxRequests: 1, stallTimeout: soon}", "web.yaml:6:47: `soon`"),
            ("{kind: HTTPRoute, name: web}", "  concurrency: {maxRequests: 1}", "needs its group"),
        ];
        for (targets, rest, reason) in cases {
            let refused = limit(targets, rest).unwrap_err();
            assert!(refused.contains(reason), "{rest}: {refused}");
        }
    }
}
