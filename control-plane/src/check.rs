//! What is wrong with resources: in each file, and between them.
//!
//! A file with a mistake is refused, and what it last said well stays. What is wrong *between* files (a backend that is
//! nowhere, two rules of which one can never hold) refuses nothing in a running mesh, where it may be mended by whatever
//! starts next: it is told, and the rest works.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use sheetbend_control_plane_client::model::{AppProtocol, ServiceName, ServicePort};

use crate::resources::{
    At, Authorization, BACKEND_TRAFFIC, Backend, FaultTarget, Folder, Problem, Resource, RouteTarget, Tokens,
    suggestion,
};
use crate::world::{Inputs, Parts};

mod connections;
mod requests;

/// A folder that was checked.
#[derive(Debug, serde::Serialize)]
pub struct Checked {
    /// How many files it has.
    pub files: usize,
    /// How many good resources are in them.
    pub resources: usize,
    /// Everything that is wrong, in the order of files and lines.
    pub problems: Vec<Problem>,
}

/// Looks at a folder of resources, or at one file, as a control plane would. `registered` are services that no resource
/// declares, since sidecars register them; without a port, any port of theirs.
///
/// # Errors
///
/// The folder cannot be read.
pub fn check(
    path: &Path,
    registered: &[(ServiceName, Option<u16>)],
    trust_domain: Option<&str>,
) -> io::Result<Checked> {
    let mut folder = Folder::looked_at(path.into(), trust_domain);
    folder.reload(Instant::now())?;
    let resources: Vec<Resource> = folder.resources().cloned().collect();
    let inputs = Inputs { trust_domain: "".into(), registered: &[], resources: &resources, same_machine: true };
    let mut known = Known::default();
    for (port, parts) in Parts::sort(&resources).ports(&inputs) {
        known.add(port.service, Some((port.port, parts.protocol())));
    }
    for (service, port) in registered {
        known.add(service.clone(), port.map(|port| (port, AppProtocol::Detect)));
    }
    let of_files = folder.files().values().flat_map(|file| file.problems()).cloned();
    let problems: BTreeSet<Problem> = of_files.chain(between(&folder, known)).collect();
    Ok(Checked { files: folder.files().len(), resources: resources.len(), problems: problems.into_iter().collect() })
}

/// Services, each with its ports and what they are said to speak; without one, whatever port is asked for.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<ServiceName, Option<BTreeMap<u16, AppProtocol>>>);

impl Known {
    pub(crate) fn add(&mut self, service: ServiceName, port: Option<(u16, AppProtocol)>) {
        let ports = self.0.entry(service).or_insert_with(|| Some(BTreeMap::new()));
        match (port, ports.as_mut()) {
            // What is written says more than a command line.
            (Some((port, protocol)), Some(ports)) => drop(ports.entry(port).or_insert(protocol)),
            (None, _) => *ports = None,
            (Some(_), None) => {}
        }
    }

    /// The ports of a service; 0, where any may be there.
    fn ports(&self, service: &ServiceName) -> Vec<u16> {
        let ports = self.0.get(service).and_then(Option::as_ref);
        ports.map_or(vec![0], |ports| ports.keys().copied().collect())
    }

    /// Every service port; port 0 of a service that may have any.
    fn all_ports(&self) -> impl Iterator<Item = ServicePort> {
        self.0.keys().flat_map(|service| {
            self.ports(service).into_iter().map(|port| ServicePort { service: service.clone(), port })
        })
    }

    /// Whether nobody looks for requests in what comes to a port.
    fn is_opaque(&self, name: &ServicePort) -> bool {
        let protocol = self.0.get(&name.service).and_then(Option::as_ref).and_then(|ports| ports.get(&name.port));
        matches!(protocol, Some(AppProtocol::Tcp | AppProtocol::Tls))
    }

    /// Why there is no such service port, and a hint.
    fn lacks(&self, service: &ServiceName, port: Option<u16>) -> Option<(String, String)> {
        match (self.0.get(service), port) {
            (None, _) => {
                let near = self.0.keys().filter(|other| other.namespace == service.namespace).map(|s| &*s.service);
                let hint = suggestion(&service.service, near).unwrap_or_else(|| {
                    "add the Service, or start what registers it (`sheetbend check --service NAME` knows of it)".into()
                });
                Some((format!("there is no Service {}/{}", service.namespace, service.service), hint))
            }
            (Some(Some(ports)), Some(port)) if !ports.contains_key(&port) => {
                let all: Vec<String> = ports.keys().map(u16::to_string).collect();
                let reason = format!("Service {}/{} has no port {port}", service.namespace, service.service);
                let hint = match all.is_empty() {
                    true => "it has none at all".to_string(),
                    false => format!("it has {}", all.join(", ")),
                };
                Some((reason, hint))
            }
            _ => None,
        }
    }
}

/// What no file alone can know: everything that names what is not there, and what cannot hold beside something else.
pub(crate) fn between(folder: &Folder, mut known: Known) -> Vec<Problem> {
    // What cannot be read is not missing besides.
    folder.unread().for_each(|service| known.add(service.clone(), None));
    let mut problems = missing(folder, &known);
    let resources: Vec<Resource> = folder.resources().cloned().collect();
    let parts = Parts::sort(&resources);
    problems.extend(overruled_policies(folder, &parts));
    problems.extend(overruled_rules(&parts, &known));
    problems.extend(connections::overruled_kinds(folder, &parts, &known));
    problems.extend(connections::rules(&parts, &known));
    problems.extend(requests::unread(folder, &parts, &known));
    problems.extend(requests::overruled_limits(folder));
    problems
}

fn missing(folder: &Folder, known: &Known) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (file, _, resource) in folder.placed() {
        let mut lacks = |what: &str, service: &ServiceName, port: Option<u16>, at: At| {
            let Some((reason, hint)) = known.lacks(service, port) else { return };
            let (At { line, column }, reason) = (at, format!("{what}: {reason}"));
            problems.push(Problem { file: file.into(), line, column, reason, hint: Some(hint) });
        };
        match resource {
            Resource::Route(route) => {
                for parent in &route.parents {
                    lacks("this route is attached to nothing", &parent.service, parent.port, parent.at);
                }
                for backend in route.rules.iter().flat_map(|rule| &rule.backends) {
                    lacks("missing backend", &backend.service, Some(backend.port), backend.at);
                }
            }
            Resource::Backend(backend) => {
                for target in &backend.targets {
                    lacks("this policy is about nothing", &target.service, None, target.at);
                }
            }
            Resource::Limit(limit) => {
                for target in &limit.services {
                    lacks("this policy is about nothing", &target.service, None, target.at);
                }
                problems.extend(limit.routes.iter().filter_map(|target| lost_route(folder, file, target)));
            }
            Resource::Faults(faults) => {
                for target in &faults.targets {
                    match target {
                        FaultTarget::Service(of) => lacks("this fault happens nowhere", &of.service, of.port, of.at),
                        FaultTarget::Route(_) => {}
                    }
                }
                let routes = faults.targets.iter().filter_map(|target| match target {
                    FaultTarget::Route(route) => Some(route),
                    FaultTarget::Service(_) => None,
                });
                problems.extend(routes.filter_map(|target| lost_route(folder, file, target)));
            }
            Resource::Tokens(Tokens { targets, .. }) | Resource::Authorization(Authorization { targets, .. }) => {
                for target in targets {
                    lacks("this policy is about nothing", &target.service, None, target.at);
                }
            }
            Resource::Service(_) | Resource::Slice(_) | Resource::Settings(_) => {}
        }
    }
    problems
}

/// A route that a policy is about and nobody wrote.
fn lost_route(folder: &Folder, file: &Path, target: &RouteTarget) -> Option<Problem> {
    let is_it = |resource: &Resource| match resource {
        Resource::Route(route) => route.kind == target.kind && route.name == target.name,
        _ => false,
    };
    let ServiceName { service, namespace } = &target.name;
    (!folder.resources().any(is_it)).then(|| Problem {
        file: file.into(),
        line: target.at.line,
        column: target.at.column,
        reason: format!("this policy is about nothing: there is no {} {namespace}/{service}", target.kind),
        hint: Some("add the route, or name another".to_string()),
    })
}

/// Policies about a Service that another one of their kind is about, too.
fn overruled_policies(folder: &Folder, parts: &Parts<'_>) -> Vec<Problem> {
    let policies: Vec<(&Path, &Backend)> = folder
        .placed()
        .filter_map(|(file, _, resource)| match resource {
            Resource::Backend(backend) => Some((file, backend)),
            _ => None,
        })
        .collect();
    let mut problems = Vec::new();
    for (file, backend) in &policies {
        for target in &backend.targets {
            let all = if backend.kind == BACKEND_TRAFFIC { &parts.retry_constraints } else { &parts.policies };
            let Some(holds) = all.get(&target.service).filter(|holds| holds.place != backend.policy.place) else {
                continue;
            };
            let Some((_, winner)) = policies
                .iter()
                .find(|(_, other)| Arc::ptr_eq(&other.policy, holds))
                .or_else(|| policies.iter().find(|(_, other)| other.policy.place == holds.place))
            else {
                continue;
            };
            let (of, name) = (&target.service, &winner.object.service);
            problems.push(Problem {
                file: file.to_path_buf(),
                line: target.at.line,
                column: target.at.column,
                reason: format!(
                    "Service {}/{} has another {}, {name} ({}), which holds instead of this one",
                    of.namespace, of.service, backend.kind, holds.place
                ),
                hint: Some("put both into one".to_string()),
            });
        }
    }
    problems
}

/// Rules that take nothing, since another one of the same Service takes just that before them.
fn overruled_rules(parts: &Parts<'_>, known: &Known) -> Vec<Problem> {
    let (mut problems, mut told) = (Vec::new(), HashSet::new());
    for name in known.all_ports() {
        let rules = parts.rules(&name);
        let mut first = HashMap::new();
        for rule in &rules {
            let matches = match rule.matches.is_empty() {
                true => "everything".to_string(),
                false => format!("{:?}", rule.matches),
            };
            let winner = *first.entry(matches).or_insert(rule);
            let (place, wins) = (&rule.policy.place, &winner.policy.place);
            if std::ptr::eq(winner, rule) || !told.insert((place.clone(), wins.clone())) {
                continue;
            }
            let Some((file, line)) = place.rsplit_once(':') else { continue };
            problems.push(Problem {
                file: PathBuf::from(file),
                line: line.parse().unwrap_or(1),
                column: 1,
                reason: format!(
                    "the rule {} cannot hold beside {} ({wins}): both match the same, and that one wins",
                    rule.name, winner.name
                ),
                hint: Some("let them match different requests, or take one out".to_string()),
            });
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";

    /// What is wrong with these files, without the folder's name.
    fn problems(files: &[(&str, &str)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let checked = check(dir.path(), &[], None).unwrap();
        let folder = format!("{}/", dir.path().display());
        checked.problems.iter().map(|problem| problem.to_string().replace(&folder, "")).collect()
    }

    fn route(name: &str, rules: &str) -> String {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}}}\nspec:\n  \
             parentRefs: [{{kind: Service, group: '', name: web}}]\n  rules:\n{rules}"
        )
    }

    fn policy(name: &str, of: &str) -> String {
        format!(
            "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
             targetRefs: [{{kind: Service, name: {of}}}]\n"
        )
    }

    #[test]
    fn what_fits_together_has_no_problem() {
        let route = route("split", "  - backendRefs: [{name: web, port: 80}]\n");
        assert_eq!(problems(&[("a.yaml", WEB), ("b.yaml", &route), ("c.yaml", &policy("p", "web"))]), [""; 0]);
    }

    #[test]
    fn every_mistake_of_every_document_is_told() {
        let wrong = route(
            "split",
            "  - bakcendRefs: []\n    timeouts: {request: -1s, wrong: 1, backendRequest: 1x}\n    \
             backendRefs: [{name: web, port: 80, weight: 0}]\n",
        );
        let other = "---\napiVersion: v1\nkind: Service\nmetadata: {name: two}\nspec: {ports: [{port: 0}]}\n";
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &format!("{wrong}{other}"))]);
        let begin = [
            "b.yaml:7:5: unknown field `bakcendRefs`; did you mean `backendRefs`?",
            "b.yaml:8:30: unknown field `wrong`",
        ];
        assert!(begin.iter().all(|begin| told.iter().any(|told| told.starts_with(begin))), "{told:#?}");
        assert!(told.iter().any(|told| told.starts_with("b.yaml:8:25: `-1s` is not a duration")), "{told:#?}");
        assert!(
            told.iter().any(|told| told.starts_with("b.yaml:9:26: the weights of this rule's backends sum to zero")),
            "{told:#?}"
        );
        assert!(told.iter().any(|told| told.starts_with("b.yaml:14:23: port 0 cannot be reached")), "{told:#?}");
    }

    #[test]
    fn a_backend_that_is_nowhere_is_told_with_its_place_and_what_was_probably_meant() {
        let rules =
            "  - backendRefs:\n    - {name: weeb, port: 80}\n    - {name: web, port: 81}\n    - {name: db, port: 80}\n";
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &route("split", rules))]);
        assert_eq!(told[0], "b.yaml:8:14: missing backend: there is no Service default/weeb; did you mean `web`?");
        assert_eq!(told[1], "b.yaml:9:14: missing backend: Service default/web has no port 81; it has 80");
        assert!(told[2].contains("there is no Service default/db; add the Service"), "{}", told[2]);
        assert_eq!(told.len(), 3);
    }

    #[test]
    fn a_route_or_a_policy_that_is_about_nothing_is_told() {
        let route = route("split", "  - backendRefs: [{name: db, port: 80}]\n");
        let db = WEB.replace("web", "db");
        let told = problems(&[("a.yaml", &db), ("b.yaml", &route), ("c.yaml", &policy("p", "web"))]);
        assert!(told[0].starts_with("b.yaml:5:49: this route is attached to nothing: there is no"), "{told:?}");
        assert!(told[1].starts_with("c.yaml:5:38: this policy is about nothing: there is no"), "{told:?}");
        assert_eq!(told.len(), 2);
    }

    #[test]
    fn a_service_that_cannot_be_read_is_not_missing_besides() {
        let route = route("split", "  - backendRefs: [{name: web, port: 80}]\n");
        let told = problems(&[("a.yaml", &WEB.replace("80", "0")), ("b.yaml", &route)]);
        assert_eq!(told, ["a.yaml:4:23: port 0 cannot be reached; ports go from 1 to 65535"]);
    }

    #[test]
    fn two_policies_of_one_service_are_told_and_which_holds() {
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &policy("p", "web")), ("c.yaml", &policy("q", "web"))]);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("b.yaml:5:38: Service default/web has another BackendPolicy, q (c.yaml:1)"),
            "{told:?}"
        );
    }

    #[test]
    fn of_two_rules_that_cannot_both_hold_the_one_that_does_not_is_told() {
        let rule = "  - matches: [{path: {value: /a}}]\n    backendRefs: [{name: web, port: 80}]\n";
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &route("one", rule)), ("c.yaml", &route("two", rule))]);
        assert_eq!(
            told,
            [
                "c.yaml:7:1: the rule default/two#0 cannot hold beside default/one#0 (b.yaml:7): both match the same, and \
              that one wins; let them match different requests, or take one out"
            ]
        );
    }

    fn connections(kind: &str, name: &str, spec: &str) -> String {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1alpha2\nkind: {kind}\nmetadata: {{name: {name}}}\nspec:\n  \
             parentRefs: [{{kind: Service, group: '', name: web, port: 80}}]\n{spec}"
        )
    }

    #[test]
    fn rules_for_connections_that_take_none_are_told() {
        let rule = "  rules: [{backendRefs: [{name: web, port: 80}]}]\n";
        let tls = |name: &str| connections("TLSRoute", name, &format!("  hostnames: [a.example]\n{rule}"));
        let closed = "  hostnames: [b.example]\n  rules: [{backendRefs: [{name: web, port: 80, weight: 0}]}]\n";
        let told = problems(&[
            ("a.yaml", WEB),
            ("b.yaml", &tls("one")),
            ("c.yaml", &tls("two")),
            ("d.yaml", &connections("TCPRoute", "tcp", rule)),
            ("e.yaml", &connections("TLSRoute", "closed", closed)),
        ]);
        assert_eq!(
            told,
            [
                "c.yaml:7:1: the rule default/two#0 cannot hold beside default/one#0 (b.yaml:7): both take `a.example`, \
                 and that one wins; put both into one, each backend with its weight, or take one out",
                "d.yaml:5:49: this TCPRoute takes nothing of web.default:80: TLSRoute default/closed is there, and of \
                 different kinds of routes the most specific alone counts; name another port in parentRefs, or take one out",
                "e.yaml:7:1: the rule default/closed#0 has no backend with any weight: every connection that it takes is \
                 refused; give a backend a weight of 1 or more, unless nobody is to connect",
            ]
        );
    }

    #[test]
    fn what_a_route_of_connections_does_not_obey_is_refused() {
        let to_web = "  rules: [{backendRefs: [{name: web, port: 80}]}]\n";
        let mistakes = [
            ("TCPRoute", "  hostnames: [a]\n", to_web, "6:15: a TCPRoute has no hostnames"),
            ("TLSRoute", "", to_web, "3:18: a TLSRoute without hostnames takes no connection"),
            ("TLSRoute", "  hostnames: [127.0.0.1]\n", to_web, "6:15: `127.0.0.1` is not a hostname"),
            ("TLSRoute", "  hostnames: [a.x, A.x]\n", to_web, "6:20: `a.x` is there twice"),
            ("TCPRoute", "", "", "3:18: a TCPRoute without a rule leads nowhere"),
            ("TCPRoute", "", "  rules: [{matches: []}]\n", "6:12: unknown field `matches`"),
            (
                "TCPRoute",
                "",
                "  rules: [{backendRefs: [{name: web, port: 80}]}, {backendRefs: []}]\n",
                "6:51: of the rules of a TCPRoute only the first could ever hold",
            ),
            (
                "TCPRoute",
                "",
                "  rules: [{backendRefs: [{name: web, port: 80, filters: [{type: RequestHeaderModifier}]}]}]\n",
                "nothing filters bytes that nobody looks into",
            ),
            ("TCPRoute", "", "  rules: [{backendRefs: [{name: web}]}]\n", "this backendRef has no `port`"),
            (
                "TCPRoute",
                "",
                "  rules: [{backendRefs: [{name: wob, port: 80}]}]\n",
                "missing backend: there is no Service default/wob; did you mean `web`?",
            ),
        ];
        for (kind, hostnames, rules, wanted) in mistakes {
            let route = connections(kind, "r", &format!("{hostnames}{rules}"));
            let told = problems(&[("a.yaml", WEB), ("b.yaml", &route)]);
            assert!(told.len() == 1 && told[0].contains(wanted), "{wanted}: {told:#?}");
        }
    }

    #[test]
    fn an_external_service_that_leads_nowhere_is_refused() {
        let api = |spec: &str| {
            problems(&[(
                "a.yaml",
                &format!("apiVersion: v1\nkind: Service\nmetadata: {{name: api}}\nspec: {{{spec}}}\n"),
            )])
        };
        let (kind, ports) = ("type: ExternalName", "ports: [{port: 443}]");
        assert_eq!(api(&format!("{kind}, externalName: api.example.com, {ports}")), [""; 0]);
        for (spec, wanted) in [
            (format!("{kind}, externalName: api.example.com"), "3:18: an ExternalName without ports leads nowhere"),
            (format!("{kind}, {ports}"), "4:14: no externalName: this Service stands for nothing"),
            (format!("{kind}, externalName: 192.0.2.1, {ports}"), "4:42: `192.0.2.1` is not a host's name"),
            (format!("externalName: api.example.com, {ports}"), "4:22: only a Service of type ExternalName has"),
        ] {
            let told = api(&spec);
            assert!(told.len() == 1 && told[0].contains(wanted), "{wanted}: {told:#?}");
        }
    }

    #[test]
    fn an_annotation_with_a_typo_does_not_look_as_if_it_worked() {
        let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s\n  labels: \
                     {kubernetes.io/service-name: web}\n  annotations: {NAME: x}\nendpoints: [{addresses: \
                     [127.0.0.1]}]\nports: [{port: 80}]\n";
        let route = route("r", "  - backendRefs: [{name: web, port: 80}]\n");
        let tcp = connections("TCPRoute", "r", "  rules: [{backendRefs: [{name: web, port: 80}]}]\n");
        let named = |text: &str| text.replacen("{name: ", "{annotations: {NAME: x}, name: ", 1);
        for (resource, name, wanted) in [
            (
                slice,
                "sheetbend.io/identiy",
                "6:39: `sheetbend.io/identiy` is not an annotation that is obeyed here; did",
            ),
            (slice, "sheetbend.io/wieght", "did you mean `sheetbend.io/weight`?"),
            (slice, "sheetbend.io/request-timeout", "known here are sheetbend.io/identity, sheetbend.io/peer"),
            (&named(&route), "sheetbend.io/retry-no", "did you mean `sheetbend.io/retry-on`?"),
            (&named(&route), "sheetbend.io/weight", "is not an annotation that is obeyed here; known here are"),
            (&named(&tcp), "sheetbend.io/request-timeout", "known here is none"),
            (&named(&policy("p", "web")), "sheetbend.io/dryrun", "is not an annotation that is obeyed here"),
        ] {
            let told = problems(&[("a.yaml", WEB), ("b.yaml", &resource.replacen("NAME", name, 1))]);
            assert!(told.len() == 1 && told[0].contains(wanted), "{wanted}: {told:#?}");
            let others = resource.replacen("NAME", "example.org/x", 1);
            assert_eq!(problems(&[("a.yaml", WEB), ("b.yaml", &others)]), [""; 0]);
        }
    }

    fn fault(target: &str) -> String {
        format!(
            "apiVersion: sheetbend.io/v1alpha1\nkind: FaultInjection\nmetadata: {{name: chaos}}\nspec:\n  targetRefs: \
             [{{kind: Service, name: web{target}}}]\n  abort: {{percentage: {{value: 1}}, httpStatus: 503}}\n"
        )
    }

    #[test]
    fn what_is_about_requests_where_nobody_reads_any_is_told() {
        let web = |ports: &str| {
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{ports: [{ports}]}}\n")
        };
        let (tcp, tls) = (web("{port: 80, appProtocol: tcp}"), web("{port: 80, name: tls-x}"));
        let both = web("{port: 80, name: http}, {port: 81, name: tcp-x}");
        let route = route("r", "  - backendRefs: [{name: web, port: 80}]\n");
        let to_81 = route.replacen("name: web}", "name: web, port: 81}", 1);
        let route_told =
            "b.yaml:5:49: this route takes nothing: web.default:80 is declared to speak something else than HTTP, so";
        for (service, resource, wanted) in [
            (&tcp, &route, Some(route_told)),
            (&tls, &route, Some(route_told)),
            (&both, &route, None),
            (&both, &to_81, Some("this route takes nothing: web.default:81 is declared to speak something else")),
            (&tcp, &fault(""), Some("b.yaml:5:38: this fault happens nowhere: web.default:80 is declared")),
            (&both, &fault(", port: 81"), Some("this fault happens nowhere: web.default:81 is declared")),
            (&both, &fault(""), None),
        ] {
            let told = problems(&[("a.yaml", service), ("b.yaml", resource)]);
            assert_eq!(told.len(), usize::from(wanted.is_some()), "{told:#?}");
            assert!(wanted.is_none_or(|wanted| told[0].contains(wanted)), "{told:#?}");
        }
        let connections = connections("TCPRoute", "bytes", "  rules: [{backendRefs: [{name: web, port: 80}]}]\n");
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &connections), ("c.yaml", &fault(""))]);
        assert_eq!(told.len(), 1, "{told:#?}");
        assert!(
            told[0].contains("c.yaml:5:38: this fault happens nowhere: web.default:80 has TCPRoute default/bytes, so")
        );
    }

    #[test]
    fn of_two_limits_of_a_service_the_one_that_does_not_hold_is_told() {
        let limit = |name: &str, spec: &str| {
            format!(
                "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: {name}}}\nspec:\n  targetRefs: \
                 [{{kind: Service, name: web}}]\n  {spec}\n"
            )
        };
        let (wide, narrow) =
            (limit("wide", "concurrency: {maxRequests: 9}"), limit("narrow", "concurrency: {maxRequests: 3}"));
        let rates = limit("rates", "rates: [{requests: 1, interval: 1s}]");
        let told = problems(&[("a.yaml", WEB), ("b.yaml", &wide), ("c.yaml", &narrow), ("d.yaml", &rates)]);
        assert_eq!(told.len(), 1, "{told:#?}");
        assert!(told[0].starts_with("b.yaml:5:38: Service default/web has another TrafficLimit with"), "{told:#?}");
    }

    #[test]
    fn a_reference_that_says_more_than_is_obeyed_is_refused() {
        let route = route("r", "  - backendRefs: [{name: web, port: 80}]\n");
        let backends = vec!["{name: web, port: 80}"; 17].join(", ");
        let of_route = "targetRefs: [{kind: HTTPRoute, group: gateway.networking.k8s.io, name: r";
        let limit = |target: &str| {
            format!(
                "apiVersion: sheetbend.io/v1alpha1\nkind: TrafficLimit\nmetadata: {{name: l}}\nspec:\n  {target}}}]\n  \
                 rates: [{{requests: 1, interval: 1s}}]\n"
            )
        };
        let of_service = "targetRefs: [{kind: Service, name: web";
        for (resource, wanted) in [
            (route.replacen("name: web}", "name: web, weight: 2}", 1), "b.yaml:5:62: a parentRef has no weight"),
            (
                route.replace("[{name: web, port: 80}]", &format!("[{backends}]")),
                "17 backendRefs: the Gateway API allows 16",
            ),
            (route.replace("  rules:\n  - backendRefs: [{name: web, port: 80}]\n", ""), "no rule in this HTTPRoute"),
            (
                policy("p", "web, port: 80"),
                "b.yaml:5:49: this policy holds for all ports of a Service; take `port` out",
            ),
            (limit(&format!("{of_service}, port: 80")), "this policy holds for all ports of a Service"),
            (limit(&format!("{of_service}, weight: 1")), "a targetRef has no weight"),
            (limit(&format!("{of_route}, port: 80")), "a route has no port"),
            (limit(&format!("{of_route}, weight: 80")), "a targetRef has no weight"),
            (fault(", weight: 1"), "a targetRef has no weight"),
        ] {
            let told = problems(&[("a.yaml", WEB), ("b.yaml", &resource)]);
            let told: Vec<_> = told.iter().filter(|told| !told.contains("there is no HTTPRoute")).collect();
            assert!(told.len() == 1 && told[0].contains(wanted), "{wanted}: {told:#?}");
        }
    }

    #[test]
    fn the_same_resource_twice_is_told() {
        let told = problems(&[("a.yaml", WEB), ("b.yaml", WEB)]);
        assert_eq!(told, ["b.yaml:1:1: Service default/web is already in a.yaml:1; take one of the two out"]);
    }
}
