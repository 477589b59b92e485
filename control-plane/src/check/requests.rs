//! What is about requests where none are read, and limits beside which another one holds.

use std::collections::BTreeMap;
use std::path::Path;

use sheetbend_control_plane_client::model::{Concurrency, ServiceName, ServicePort};

use super::Known;
use crate::resources::{FaultTarget, Folder, Limit, Parent, Problem, Resource, TCP_ROUTE, TLS_ROUTE};
use crate::world::Parts;

/// Routes of requests, and faults of theirs, on ports whose connections are carried as they are.
pub(super) fn unread(folder: &Folder, parts: &Parts<'_>, known: &Known) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (file, _, resource) in folder.placed() {
        let mut tell = |what: &str, target: &Parent, of_connections: bool| {
            let Some(why) = none_read(target, parts, known, of_connections) else { return };
            problems.push(Problem {
                file: file.to_path_buf(),
                line: target.at.line,
                column: target.at.column,
                reason: format!("{what}: {why}, so that nobody reads requests there"),
                hint: Some("name a port with appProtocol: http, http2 or grpc".to_string()),
            });
        };
        match resource {
            Resource::Route(route) if !matches!(route.kind, TCP_ROUTE | TLS_ROUTE) => {
                // That another kind is there is told already.
                route.parents.iter().for_each(|parent| tell("this route takes nothing", parent, false));
            }
            Resource::Faults(faults) => {
                for target in &faults.targets {
                    if let FaultTarget::Service(service) = target {
                        tell("this fault happens nowhere", service, true);
                    }
                }
            }
            _ => {}
        }
    }
    problems
}

/// Why no request is read on any of the ports that are meant.
fn none_read(target: &Parent, parts: &Parts<'_>, known: &Known, of_connections: bool) -> Option<String> {
    let ports = target.port.map_or_else(|| known.ports(&target.service), |port| vec![port]);
    let why = |port: u16| {
        let name = ServicePort { service: target.service.clone(), port };
        if known.is_opaque(&name) {
            return Some(format!("{name} is declared to speak something else than HTTP"));
        }
        let first = parts.routes_of(&name).first().copied().filter(|_| of_connections)?;
        matches!(first.kind, TCP_ROUTE | TLS_ROUTE)
            .then(|| format!("{name} has {} {}/{}", first.kind, first.name.namespace, first.name.service))
    };
    let all: Option<Vec<String>> = ports.into_iter().map(why).collect();
    all?.into_iter().next()
}

/// Of several policies with a `concurrency` for one Service the narrowest holds, whole.
pub(super) fn overruled_limits(folder: &Folder) -> Vec<Problem> {
    let mut of_services: BTreeMap<&ServiceName, Vec<(&Path, &Parent, &Limit, &Concurrency)>> = BTreeMap::new();
    for (file, _, resource) in folder.placed() {
        let Resource::Limit(limit) = resource else { continue };
        let Some(concurrency) = &limit.limits.concurrency else { continue };
        for target in &limit.services {
            of_services.entry(&target.service).or_default().push((file, target, limit, concurrency));
        }
    }
    let mut problems = Vec::new();
    for (service, all) in of_services {
        let Some((.., holds, _)) = all.iter().min_by_key(|(.., concurrency)| concurrency.max_requests) else {
            continue;
        };
        for (file, target, ..) in all.iter().filter(|(.., limit, _)| limit.object != holds.object) {
            problems.push(Problem {
                file: file.to_path_buf(),
                line: target.at.line,
                column: target.at.column,
                reason: format!(
                    "Service {}/{} has another TrafficLimit with `concurrency`, {}, which is narrower and holds instead",
                    service.namespace, service.service, holds.object.service
                ),
                hint: Some("put both into one, or take `concurrency` out of this one; all `rates` are kept".to_string()),
            });
        }
    }
    problems
}
