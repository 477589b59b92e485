//! PURE: who may call. Compiled once for each thing that the control plane says; a decision allocates nothing, unless a
//! path comes in an odd form.
//!
//! Whom a caller is said to be comes from the mutual TLS of its connection, and from nowhere else. Where a request could be
//! read in more than one way, a rule that lets in matches only if it does in all of them, and one that keeps out if it does
//! in any.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, Method};
use ipnet::IpNet;
use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::access::{Key, range};
use sheetbend_control_plane_client::model::{
    Access, AccessRule, Action, AuthorizationPolicy, Condition, DefaultAccess, Glob, Operation, Source,
};

use super::paths::{self, Path};
use super::tokens::Claims;

/// Who calls, and where.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// By its certificate; `None` where the connection is plain.
    pub id: Option<&'a SpiffeId>,
    /// From where the connection came.
    pub address: IpAddr,
    /// The app's port that is called.
    pub port: u16,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The method.
    pub method: &'a Method,
    /// The authority that the app will be told, its port included.
    pub authority: &'a str,
    /// The path without its query.
    pub path: &'a str,
    /// All headers.
    pub headers: &'a HeaderMap,
    /// What a verified token says.
    pub claims: Option<&'a Claims>,
}

/// Why a caller may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It is not on the proxy's own list, `--allow`.
    NotListed,
    /// No policy speaks of it, and the mesh's default is not to let it in.
    Default(DefaultAccess),
    /// This rule says so: `default/web-readers#0`.
    By(Arc<str>),
    /// There are policies that let others in: `default/web-readers`.
    ByNone(Arc<str>),
}

/// In the words of Envoy's `response_code_details`, for the log. A caller never sees it.
impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotListed => f.write_str("rbac_access_denied: the caller is not one of --allow"),
            Self::Default(default) => write!(f, "rbac_access_denied: defaultInboundPolicy is {default:?}"),
            Self::By(rule) => write!(f, "rbac_access_denied_matched_policy[{rule}]"),
            Self::ByNone(policies) => {
                write!(f, "rbac_access_denied_matched_policy[none]: no rule of {policies} lets it in")
            }
        }
    }
}

/// What was decided.
#[derive(Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// Whether the caller may.
    pub verdict: Result<(), Denied>,
    /// Whether it might if what runs dry were obeyed; `None` where nothing runs dry.
    pub dry_run: Option<Result<(), Denied>>,
    /// The rule because of which the call is logged.
    pub audit: Option<&'a Arc<str>>,
}

/// Why a request cannot be held against the policies at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambiguous {
    /// Its path has this.
    Path(&'static str),
    /// Its authority is no host.
    Host,
    /// Its method is not in upper case, which some servers make it.
    Method,
}

impl fmt::Display for Ambiguous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(what) => write!(f, "its path has {what}, and servers read that in several ways"),
            Self::Host => f.write_str("its authority is not a plain host"),
            Self::Method => f.write_str("its method is not in upper case"),
        }
    }
}

/// Every policy that is about the service beside this proxy.
#[derive(Debug, Default)]
pub struct Authz {
    default: DefaultAccess,
    policies: Vec<Policy>,
    /// Names of the policies that let somebody in, and of those among them that do not run dry.
    admitting: Arc<str>,
    admitting_now: Arc<str>,
    any_dry: bool,
    /// What those that are obeyed look at.
    looks: Looks,
    /// Some policy, obeyed or not, looks at a path.
    reads_paths: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Looks {
    paths: bool,
    hosts: bool,
    methods: bool,
}

#[derive(Debug)]
struct Policy {
    action: Action,
    dry_run: bool,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    /// `default/web-readers#0`.
    name: Arc<str>,
    from: Vec<Source>,
    to: Vec<Operation>,
    when: Vec<Requirement>,
    /// It says something that only requests have.
    of_requests: bool,
}

#[derive(Debug)]
enum Requirement {
    Texts { key: Key, values: Vec<Glob>, not_values: Vec<Glob> },
    Source(Source),
    Ports { values: Vec<u16>, not_values: Vec<u16> },
}

/// Of which kind a rule is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bias {
    /// It lets in: it matches only who matches for sure.
    LetIn,
    /// It keeps out: it matches whoever may match.
    KeepOut,
}

/// What a rule is held against.
struct Subject<'a> {
    caller: Caller<'a>,
    /// `None`: a connection of which nothing is read.
    asked: Option<(Asked<'a>, Option<Path<'a>>)>,
}

impl Authz {
    /// Made ready.
    pub fn new(access: &Access) -> Self {
        let policies: Vec<Policy> = access.policies.iter().map(|policy| Policy::new(policy)).collect();
        let names = |dry: bool| -> Arc<str> {
            let admitting = access.policies.iter().filter(|p| p.action == Action::Allow && (dry || !p.dry_run));
            admitting.map(|policy| &*policy.name).collect::<Vec<_>>().join(", ").into()
        };
        let obeyed = |policy: &&Arc<AuthorizationPolicy>| !policy.dry_run && policy.action != Action::Audit;
        let operations = |obeyed_only: bool| {
            let policies = access.policies.iter().filter(move |policy| !obeyed_only || obeyed(policy));
            policies.flat_map(|policy| &policy.rules).flat_map(|rule| &rule.to)
        };
        let looks = Looks {
            paths: operations(true).any(looks_at_paths),
            hosts: operations(true).any(|to| !to.hosts.is_empty() || !to.not_hosts.is_empty()),
            methods: operations(true).any(|to| !to.methods.is_empty() || !to.not_methods.is_empty()),
        };
        Self {
            default: access.default,
            admitting: names(true),
            admitting_now: names(false),
            any_dry: policies.iter().any(|policy| policy.dry_run),
            looks,
            reads_paths: operations(false).any(looks_at_paths),
            policies,
        }
    }

    /// Whether a connection of which nothing is read may pass to the app.
    pub fn connection<'a>(&'a self, caller: &Caller<'a>) -> Decision<'a> {
        self.decide(&Subject { caller: *caller, asked: None })
    }

    /// Whether a request may.
    ///
    /// # Errors
    ///
    /// A policy looks at what could be read in several ways.
    pub fn request<'a>(&'a self, caller: &Caller<'a>, asked: &Asked<'a>) -> Result<Decision<'a>, Ambiguous> {
        let path = self.reads_paths.then(|| paths::read(asked.path));
        if let Some(Path::Ambiguous(why)) = &path
            && self.looks.paths
        {
            return Err(Ambiguous::Path(why));
        }
        if self.looks.hosts && host(asked.authority).is_none() {
            return Err(Ambiguous::Host);
        }
        if self.looks.methods && method(asked.method).is_none() {
            return Err(Ambiguous::Method);
        }
        Ok(self.decide(&Subject { caller: *caller, asked: Some((*asked, path)) }))
    }

    fn decide(&self, subject: &Subject<'_>) -> Decision<'_> {
        if self.policies.is_empty() {
            return Decision { verdict: self.by_default(subject), dry_run: None, audit: None };
        }
        Decision {
            verdict: self.verdict(subject, false),
            dry_run: self.any_dry.then(|| self.verdict(subject, true)),
            audit: self.matching(subject, Action::Audit, false),
        }
    }

    /// DENY wins; where there are ALLOW policies, one of them must match; else the default decides.
    fn verdict(&self, subject: &Subject<'_>, dry: bool) -> Result<(), Denied> {
        if let Some(rule) = self.matching(subject, Action::Deny, dry) {
            return Err(Denied::By(Arc::clone(rule)));
        }
        let admitting = if dry { &self.admitting } else { &self.admitting_now };
        match self.matching(subject, Action::Allow, dry) {
            Some(_) => Ok(()),
            None if !admitting.is_empty() => Err(Denied::ByNone(Arc::clone(admitting))),
            None => self.by_default(subject),
        }
    }

    fn matching(&self, subject: &Subject<'_>, action: Action, dry: bool) -> Option<&Arc<str>> {
        let bias = if action == Action::Allow { Bias::LetIn } else { Bias::KeepOut };
        let policies = self.policies.iter().filter(|policy| policy.action == action && (dry || !policy.dry_run));
        policies.flat_map(|policy| &policy.rules).find(|rule| rule.matches(subject, bias)).map(|rule| &rule.name)
    }

    fn by_default(&self, subject: &Subject<'_>) -> Result<(), Denied> {
        match self.default {
            DefaultAccess::Allow => Ok(()),
            DefaultAccess::MeshOnly if subject.caller.id.is_some() => Ok(()),
            DefaultAccess::MeshOnly | DefaultAccess::Deny => Err(Denied::Default(self.default)),
        }
    }
}

fn looks_at_paths(to: &Operation) -> bool {
    !to.paths.is_empty() || !to.not_paths.is_empty()
}

impl Policy {
    fn new(policy: &AuthorizationPolicy) -> Self {
        let rules = policy.rules.iter().enumerate();
        let rules = rules.map(|(number, rule)| Rule::new(format!("{}#{number}", policy.name).into(), rule)).collect();
        Self { action: policy.action, dry_run: policy.dry_run, rules }
    }
}

impl Rule {
    fn new(name: Arc<str>, rule: &AccessRule) -> Self {
        let of_requests =
            rule.from.iter().any(|from| !from.request_principals.is_empty() || !from.not_request_principals.is_empty())
                || rule.to.iter().any(|to| *to != ports_of(to))
                || rule.when.iter().any(|when| when.key.starts_with("request."));
        let when = rule.when.iter().map(Requirement::new).collect();
        Self { name, from: rule.from.clone(), to: rule.to.clone(), when, of_requests }
    }

    /// Of a connection nothing is known but who calls which port. A rule that wants more lets none in; if it keeps out, it
    /// does so by what is known.
    fn matches(&self, subject: &Subject<'_>, bias: Bias) -> bool {
        if subject.asked.is_none() && self.of_requests && bias == Bias::LetIn {
            return false;
        }
        (self.from.is_empty() || self.from.iter().any(|from| subject.comes_from(from, bias)))
            && (self.to.is_empty() || self.to.iter().any(|to| subject.goes_to(to, bias)))
            && self.when.iter().all(|when| subject.meets(when, bias))
    }
}

/// What an operation says of connections.
fn ports_of(to: &Operation) -> Operation {
    Operation { ports: to.ports.clone(), not_ports: to.not_ports.clone(), ..Operation::default() }
}

impl Requirement {
    fn new(condition: &Condition) -> Self {
        let globs = |values: &[Arc<str>]| -> Vec<Glob> {
            values.iter().filter_map(|value| Glob::try_from(value.to_string()).ok()).collect()
        };
        let principals = |values: &[Arc<str>]| -> Vec<Glob> {
            let bare = values.iter().map(|value| value.strip_prefix("spiffe://").unwrap_or(value));
            bare.filter_map(|value| Glob::try_from(value.to_string()).ok()).collect()
        };
        let blocks = |values: &[Arc<str>]| -> Vec<IpNet> { values.iter().filter_map(|value| range(value)).collect() };
        let ports = |values: &[Arc<str>]| -> Vec<u16> { values.iter().filter_map(|port| port.parse().ok()).collect() };
        let (values, not_values) = (&condition.values[..], &condition.not_values[..]);
        match condition.key() {
            Ok(Key::SourceIp) => Self::Source(Source {
                ip_blocks: blocks(values),
                not_ip_blocks: blocks(not_values),
                ..Source::default()
            }),
            Ok(Key::SourceNamespace) => Self::Source(Source {
                namespaces: globs(values),
                not_namespaces: globs(not_values),
                ..Source::default()
            }),
            Ok(Key::SourcePrincipal) => Self::Source(Source {
                principals: principals(values),
                not_principals: principals(not_values),
                ..Source::default()
            }),
            Ok(Key::RequestPrincipal) => Self::Source(Source {
                request_principals: globs(values),
                not_request_principals: globs(not_values),
                ..Source::default()
            }),
            Ok(Key::DestinationPort) => Self::Ports { values: ports(values), not_values: ports(not_values) },
            Ok(key) => Self::Texts { key, values: globs(values), not_values: globs(not_values) },
            // Checked when it was written and when it came; nothing has this header's name.
            Err(_) => Self::Texts { key: Key::Claim(Vec::new()), values: vec![Glob::Present], not_values: Vec::new() },
        }
    }
}

/// Whether one of `values` holds and none of `not_values` does, each where it says anything.
fn holds<T>(values: &[T], not_values: &[T], matches: impl Fn(&T) -> bool) -> bool {
    (values.is_empty() || values.iter().any(&matches)) && !not_values.iter().any(&matches)
}

fn is(glob: &Glob, text: Option<&str>) -> bool {
    text.is_some_and(|text| glob.matches(text))
}

impl Subject<'_> {
    fn comes_from(&self, from: &Source, bias: Bias) -> bool {
        let Caller { id, address, .. } = self.caller;
        let principal = id.map(|id| id.as_str().strip_prefix("spiffe://").unwrap_or(id.as_str()));
        let namespace = id.and_then(SpiffeId::workload).map(|(namespace, _)| namespace);
        let trust_domain = principal.and_then(|principal| principal.split('/').next());
        holds(&from.principals, &from.not_principals, |glob| is(glob, principal))
            && holds(&from.namespaces, &from.not_namespaces, |glob| is(glob, namespace))
            && holds(&from.trust_domains, &[], |glob| is(glob, trust_domain))
            && holds(&from.ip_blocks, &from.not_ip_blocks, |block| block.contains(&address))
            && self.shows(&from.request_principals, &from.not_request_principals, bias)
    }

    /// Whether a token's `ISSUER/SUBJECT` is one of these.
    fn shows(&self, values: &[Glob], not_values: &[Glob], bias: Bias) -> bool {
        if values.is_empty() && not_values.is_empty() {
            return true;
        }
        match &self.asked {
            None => bias == Bias::KeepOut,
            Some((asked, _)) => {
                let principal = asked.claims.and_then(Claims::principal);
                holds(values, not_values, |glob| principal.is_some_and(|text| glob.matches(text)))
            }
        }
    }

    fn goes_to(&self, to: &Operation, bias: Bias) -> bool {
        if !holds(&to.ports, &to.not_ports, |port| *port == self.caller.port) {
            return false;
        }
        let Some((asked, path)) = &self.asked else { return bias == Bias::KeepOut || *to == ports_of(to) };
        let host = host(asked.authority);
        let method = method(asked.method);
        one(&to.hosts, &to.not_hosts, host, bias, Glob::matches_in_any_case)
            && one(&to.methods, &to.not_methods, method, bias, Glob::matches)
            && path.as_ref().is_none_or(|path| path_holds(to, path, bias))
    }

    fn meets(&self, when: &Requirement, bias: Bias) -> bool {
        match when {
            Requirement::Source(source) => self.comes_from(source, bias),
            Requirement::Ports { values, not_values } => holds(values, not_values, |port| *port == self.caller.port),
            Requirement::Texts { key, values, not_values } => match &self.asked {
                None => bias == Bias::KeepOut,
                Some((asked, _)) => asked.has(key, values, not_values, bias),
            },
        }
    }
}

/// A text that every request has, or that nobody can be sure of (`None`).
fn one(
    values: &[Glob],
    not_values: &[Glob],
    text: Option<&str>,
    bias: Bias,
    matches: impl Fn(&Glob, &str) -> bool,
) -> bool {
    match text {
        Some(text) => holds(values, not_values, |glob| matches(glob, text)),
        None => (values.is_empty() && not_values.is_empty()) || bias == Bias::KeepOut,
    }
}

fn path_holds(to: &Operation, path: &Path<'_>, bias: Bias) -> bool {
    let is = |globs: &[Glob], path: &str| globs.iter().any(|glob| glob.matches(path));
    let surely = |globs: &[Glob]| path.in_all(|path| is(globs, path));
    let perhaps = |globs: &[Glob]| path.in_any(|path| is(globs, path));
    match bias {
        Bias::LetIn => (to.paths.is_empty() || surely(&to.paths)) && !perhaps_any(&to.not_paths, perhaps),
        Bias::KeepOut => {
            (to.paths.is_empty() || perhaps(&to.paths)) && (to.not_paths.is_empty() || !surely(&to.not_paths))
        }
    }
}

fn perhaps_any(globs: &[Glob], perhaps: impl Fn(&[Glob]) -> bool) -> bool {
    !globs.is_empty() && perhaps(globs)
}

impl Asked<'_> {
    fn has(&self, key: &Key, values: &[Glob], not_values: &[Glob], bias: Bias) -> bool {
        match key {
            Key::Header(name) => {
                let is = |globs: &[Glob], value: &http::HeaderValue| {
                    std::str::from_utf8(value.as_bytes()).ok().map(|text| globs.iter().any(|glob| glob.matches(text)))
                };
                let all = || self.headers.get_all(&**name).iter();
                // Of several lines, a server may read any.
                let surely = |globs| all().next().is_some() && all().all(|value| is(globs, value) == Some(true));
                let perhaps = |globs| all().any(|value| is(globs, value) != Some(false));
                let (good, bad) = match bias {
                    Bias::LetIn => (values.is_empty() || surely(values), !not_values.is_empty() && perhaps(not_values)),
                    Bias::KeepOut => {
                        (values.is_empty() || perhaps(values), !not_values.is_empty() && surely(not_values))
                    }
                };
                good && !bad
            }
            Key::Claim(name) => self.says(name, values, not_values, bias),
            Key::Audiences => self.says(&["aud".into()], values, not_values, bias),
            // These are made into others before.
            Key::RequestPrincipal
            | Key::SourceIp
            | Key::SourceNamespace
            | Key::SourcePrincipal
            | Key::DestinationPort => false,
        }
    }
}

impl Asked<'_> {
    /// Whether a claim is one of these; one that nobody can be sure of is where that keeps out, and is not where it lets in.
    fn says(&self, claim: &[Arc<str>], values: &[Glob], not_values: &[Glob], bias: Bias) -> bool {
        let said = |glob: &Glob| self.claims.map_or(Some(false), |claims| claims.say(claim, glob));
        let keeps_out = bias == Bias::KeepOut;
        (values.is_empty() || values.iter().any(|glob| said(glob).unwrap_or(keeps_out)))
            && !not_values.iter().any(|glob| said(glob).unwrap_or(!keeps_out))
    }
}

/// A host without its port and without a dot at its end; `None` where there is more to it, which servers read differently.
fn host(authority: &str) -> Option<&str> {
    let host = match authority.strip_prefix('[') {
        Some(rest) => authority.get(..rest.find(']')? + 2)?,
        None => authority.split(':').next()?,
    };
    let port = authority.get(host.len()..)?;
    let plain = port.is_empty() || port.strip_prefix(':')?.bytes().all(|b| b.is_ascii_digit());
    let odd = |b: u8| !(b.is_ascii_alphanumeric() || b"-._~[]:".contains(&b));
    let host = host.strip_suffix('.').unwrap_or(host);
    (plain && !host.is_empty() && !host.ends_with('.') && !host.bytes().any(odd)).then_some(host)
}

/// Methods are upper case (RFC 9110 §9.1 knows no other), and some servers make them so.
fn method(method: &Method) -> Option<&str> {
    Some(method.as_str()).filter(|text| !text.bytes().any(|b| b.is_ascii_lowercase()))
}

#[cfg(test)]
#[path = "authz_tests.rs"]
mod tests;
