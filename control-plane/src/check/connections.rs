//! Routes that take nothing, since another kind of route is there; and rules for connections that take none.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use sheetbend_control_plane_client::model::{ConnectionRule, ServicePort};

use super::Known;
use crate::resources::{Folder, Problem, Resource, Route};
use crate::world::Parts;

/// Routes to a port that has one of a more specific kind, which alone is obeyed there.
pub(super) fn overruled_kinds(folder: &Folder, parts: &Parts<'_>, known: &Known) -> Vec<Problem> {
    let mut problems = Vec::new();
    let routes = folder.placed().filter_map(|(file, _, resource)| match resource {
        Resource::Route(route) => Some((file, route)),
        _ => None,
    });
    for (file, route) in routes {
        for parent in &route.parents {
            let ports = parent.port.map_or_else(|| known.ports(&parent.service), |port| vec![port]);
            let obeyed = ports.into_iter().find_map(|port| {
                let name = ServicePort { service: parent.service.clone(), port };
                let first = *parts.routes_of(&name).first()?;
                (first.kind != route.kind).then_some((name, first))
            });
            let Some((port, Route { kind, name, .. })) = obeyed else { continue };
            problems.push(Problem {
                file: file.to_path_buf(),
                line: parent.at.line,
                column: parent.at.column,
                reason: format!(
                    "this {} takes nothing of {port}: {kind} {}/{} is there, and of different kinds of routes the most \
                     specific alone counts",
                    route.kind, name.namespace, name.service
                ),
                hint: Some("name another port in parentRefs, or take one out".to_string()),
            });
        }
    }
    problems
}

/// Rules for connections that another one takes before them, and those that refuse all that they take.
pub(super) fn rules(parts: &Parts<'_>, known: &Known) -> Vec<Problem> {
    let (mut problems, mut told) = (Vec::new(), HashSet::new());
    for name in known.all_ports() {
        let rules = parts.connections(&name);
        let mut first: HashMap<_, &ConnectionRule> = HashMap::new();
        for rule in &rules {
            let winner = *first.entry(&rule.hostname).or_insert(rule);
            let reason = match std::ptr::eq(winner, rule) {
                true if rule.backends.is_empty() => format!(
                    "the rule {} has no backend with any weight: every connection that it takes is refused",
                    rule.name
                ),
                true => continue,
                false => format!(
                    "the rule {} cannot hold beside {} ({}): both take {}, and that one wins",
                    rule.name,
                    winner.name,
                    winner.place,
                    rule.hostname.as_ref().map_or("every connection".into(), |name| format!("`{name}`")),
                ),
            };
            let Some((file, line)) = rule.place.rsplit_once(':') else { continue };
            if !told.insert(reason.clone()) {
                continue;
            }
            let hint = match std::ptr::eq(winner, rule) {
                true => "give a backend a weight of 1 or more, unless nobody is to connect",
                false => "put both into one, each backend with its weight, or take one out",
            };
            problems.push(Problem {
                file: PathBuf::from(file),
                line: line.parse().unwrap_or(1),
                column: 1,
                reason,
                hint: Some(hint.to_string()),
            });
        }
    }
    problems
}
