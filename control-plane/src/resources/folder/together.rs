//! What no file alone can know: resources that stand in two of them, and more matches than proxies take.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_control_plane_client::xds::MAX_ROUTES;

use super::{Folder, Looked};
use crate::resources::{Problem, Resource, Route};

/// A proxy takes one more for what no rule takes, and one for the Service itself.
const MOST_MATCHES: usize = MAX_ROUTES - 2;

/// A resource that counts, or is to.
struct Held<'a> {
    file: &'a Path,
    line: u64,
    resource: &'a Resource,
    /// Its file is looked at: it may be refused.
    new: bool,
}

impl Folder {
    /// What of these files cannot hold beside all others. Each is held against what every file says by then, so that what
    /// moves from one file to another is never without a home, in whatever order they are read.
    pub(super) fn beside_others(&self, looked_at: &BTreeMap<PathBuf, Looked>) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut refused: BTreeSet<PathBuf> = BTreeSet::new();
        if !self.piecemeal {
            let wrong = looked_at.iter().filter(|(_, looked)| !looked.parsed.problems.is_empty());
            refused.extend(wrong.map(|(path, _)| path.clone()));
        }
        loop {
            let all = self.in_order(looked_at, &refused);
            let wrong: Vec<Problem> = twice(&all).into_iter().chain(too_many(&all)).collect();
            let done = wrong.is_empty() || self.piecemeal;
            refused.extend(wrong.iter().map(|problem| problem.file.clone()));
            problems.extend(wrong);
            // What a refused file last said stays, and may be in the way of yet another.
            if done {
                return problems;
            }
        }
    }

    /// Everything that is to count: first what stays as it is, then what has changed where it was, then what is new there.
    fn in_order<'a>(&'a self, looked_at: &'a BTreeMap<PathBuf, Looked>, refused: &BTreeSet<PathBuf>) -> Vec<Held<'a>> {
        let (mut all, mut changed, mut added) = (Vec::new(), Vec::new(), Vec::new());
        for (file, state) in &self.files {
            let Some(looked) = looked_at.get(file).filter(|_| !refused.contains(file)) else {
                all.extend(state.good.iter().map(|(line, resource)| Held { file, line: *line, resource, new: false }));
                continue;
            };
            let had: BTreeSet<String> = state.resources().map(Resource::key).collect();
            for (line, resource) in &looked.parsed.resources {
                let held = Held { file, line: *line, resource, new: true };
                if had.contains(&resource.key()) { changed.push(held) } else { added.push(held) }
            }
        }
        all.extend(changed.into_iter().chain(added));
        all
    }
}

/// Resources that another one is already.
fn twice(all: &[Held<'_>]) -> Vec<Problem> {
    let (mut problems, mut first) = (Vec::new(), BTreeMap::new());
    for held in all {
        let key = held.resource.key();
        let holder: &Held<'_> = first.entry(key.clone()).or_insert(held);
        if held.new && !std::ptr::eq(holder, held) {
            problems.push(Problem {
                file: held.file.into(),
                line: held.line,
                column: 1,
                reason: format!("{key} is already in {}:{}", holder.file.display(), holder.line),
                hint: Some("take one of the two out".to_string()),
            });
        }
    }
    problems
}

/// Matches of one port; without one, of every port.
type OfPorts = BTreeMap<Option<u16>, usize>;

/// Routes with which a port has more matches than a proxy takes: it would refuse all of them.
fn too_many(all: &[Held<'_>]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut matches: BTreeMap<(&str, &ServiceName), OfPorts> = BTreeMap::new();
    for held in all {
        let Resource::Route(route) = held.resource else { continue };
        let count = matches_of(route);
        let attached: BTreeSet<_> = route.parents.iter().map(|parent| (&parent.service, parent.port)).collect();
        for (service, port) in attached.iter().copied() {
            if port.is_some() && attached.contains(&(service, None)) {
                continue;
            }
            let of_ports = matches.entry((route.kind, service)).or_default();
            *of_ports.entry(port).or_default() += count;
            let most = most_of(of_ports, port);
            if most > MOST_MATCHES && held.new {
                let at =
                    route.parents.iter().find(|parent| parent.service == *service).map(|p| p.at).unwrap_or_default();
                problems.push(Problem {
                    file: held.file.into(),
                    line: at.line,
                    column: at.column,
                    reason: format!(
                        "with this {} a port of Service {}/{} has {most} matches, and proxies take {MOST_MATCHES}",
                        route.kind, service.namespace, service.service
                    ),
                    hint: Some(
                        "put several into one with a prefix or a pattern, or name a port in parentRefs".to_string(),
                    ),
                });
            }
        }
    }
    problems
}

fn matches_of(route: &Route) -> usize {
    let matches: usize = route.rules.iter().map(|rule| rule.matches.len().max(1)).sum();
    matches * route.hostnames.len().max(1)
}

/// How many matches a port has; without one, the port that has most.
fn most_of(of_ports: &OfPorts, port: Option<u16>) -> usize {
    let of = |port| of_ports.get(&port).copied().unwrap_or_default();
    let own = match port {
        Some(_) => of(port),
        None => of_ports.iter().filter(|(port, _)| port.is_some()).map(|(_, count)| *count).max().unwrap_or_default(),
    };
    own + of(None)
}
