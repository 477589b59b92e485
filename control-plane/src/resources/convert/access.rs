//! Who may call, as it is written, made into what a proxy obeys.

use std::path::PathBuf;
use std::sync::Arc;

use serde_saphyr::Spanned;
use sheetbend_control_plane_client::model::access::Key;
use sheetbend_control_plane_client::model::jwt::read_keys;
use sheetbend_control_plane_client::model::{self, Action, DefaultAccess, Glob, ServiceName, TokenIssuer};

use super::kinds::{Reference, access as kinds};
use super::{name_of, range, to_service};
use crate::resources::parse::{Checked, mistake};
use crate::resources::{Authorization, KeyFile, Parent, Tokens};

/// `defaultInboundPolicy` of a MeshSettings.
pub(super) fn default_access(raw: Option<&Spanned<String>>) -> Checked<Option<DefaultAccess>> {
    let Some(raw) = raw else { return Ok(None) };
    match raw.value.as_str() {
        "Allow" => Ok(Some(DefaultAccess::Allow)),
        "MeshOnly" => Ok(Some(DefaultAccess::MeshOnly)),
        "Deny" => Ok(Some(DefaultAccess::Deny)),
        other => mistake(raw.referenced, format!("defaultInboundPolicy `{other}`"), "write Allow, MeshOnly or Deny"),
    }
}

pub(in crate::resources) fn authorization_policy(raw: kinds::AuthorizationPolicy) -> Checked<Authorization> {
    let object = name_of(&raw.metadata)?;
    let action = match raw.spec.action.as_ref().map(|action| (action.value.as_str(), action.referenced)) {
        None | Some(("ALLOW", _)) => Action::Allow,
        Some(("DENY", _)) => Action::Deny,
        Some(("AUDIT", _)) => Action::Audit,
        Some((other, at)) => return mistake(at, format!("action `{other}`"), "write ALLOW, DENY or AUDIT"),
    };
    if let Some(at) = raw.spec.action.as_ref().filter(|_| action == Action::Audit && raw.spec.dry_run) {
        let hint = "take dryRun out: an AUDIT changes nothing that happens";
        return mistake(at.referenced, "an AUDIT that is a dry run does nothing at all", hint);
    }
    let policy = model::AuthorizationPolicy {
        name: format!("{}/{}", object.namespace, object.service).into(),
        action,
        dry_run: raw.spec.dry_run,
        rules: raw.spec.rules.iter().map(rule).collect::<Checked<_>>()?,
    };
    let targets = targets(raw.spec.target_refs.as_ref(), &object)?;
    policy.check().or_else(|error| mistake(raw.metadata.name.referenced, error.to_string(), None))?;
    Ok(Authorization { object, targets, policy: policy.into() })
}

/// The Services that a policy is about; none where it is about all of its namespace.
pub(super) fn targets(refs: Option<&Spanned<Vec<Reference>>>, object: &ServiceName) -> Checked<Vec<Parent>> {
    let Some(refs) = refs else { return Ok(Vec::new()) };
    if refs.value.is_empty() {
        let hint = "name a Service, or leave targetRefs out for every Service of the namespace";
        return mistake(refs.referenced, "no targetRef: this policy is about nothing", hint);
    }
    let one = |target: &Reference| {
        let (service, port) = to_service(target, object, "targetRef")?;
        match (port, service.namespace == object.namespace) {
            (Some(_), _) => mistake(target.name.referenced, "a targetRef has no port", "write ports in a rule"),
            (None, true) => Ok(Parent { at: target.name.referenced.into(), service, port: None }),
            (None, false) => {
                let hint = "put the policy into the namespace of its Service";
                mistake(target.name.referenced, "a policy is about Services of its own namespace", hint)
            }
        }
    };
    refs.value.iter().map(one).collect()
}

/// Keys that stand in files are read by whoever knows where those are.
pub(in crate::resources) fn request_authentication(raw: kinds::RequestAuthentication) -> Checked<Tokens> {
    let object = name_of(&raw.metadata)?;
    let targets = targets(raw.spec.target_refs.as_ref(), &object)?;
    let rules = &raw.spec.jwt_rules;
    if rules.value.is_empty() {
        return mistake(rules.referenced, "no jwtRule: nobody's tokens are believed", "name an issuer and its keys");
    }
    let (mut issuers, mut files) = (Vec::new(), Vec::new());
    for rule in &rules.value {
        if rule.issuer.value.is_empty() {
            return mistake(rule.issuer.referenced, "an empty issuer", "write what `iss` of its tokens is");
        }
        let keys = match (&rule.jwks, &rule.jwks_file) {
            (Some(keys), None) => read_keys(&keys.value).or_else(|why| mistake(keys.referenced, why, None))?,
            (None, Some(file)) => {
                let (issuer, path) = (issuers.len(), PathBuf::from(&file.value));
                files.push(KeyFile { issuer, path, at: file.referenced.into() });
                Vec::new()
            }
            _ => {
                let hint = "write one of jwks, the keys themselves, and jwksFile, where they are";
                return mistake(rule.issuer.referenced, "this issuer has no keys, or has them twice", hint);
            }
        };
        let audiences = rule.audiences.iter().map(|audience| audience.value.as_str().into()).collect();
        issuers.push(TokenIssuer { issuer: rule.issuer.value.as_str().into(), audiences, keys });
    }
    Ok(Tokens { object, targets, issuers, files })
}

fn rule(raw: &Spanned<kinds::Rule>) -> Checked<model::AccessRule> {
    Ok(model::AccessRule {
        from: raw.value.from.iter().map(source).collect::<Checked<_>>()?,
        to: raw.value.to.iter().map(operation).collect::<Checked<_>>()?,
        when: raw.value.when.iter().map(condition).collect::<Checked<_>>()?,
    })
}

fn source(raw: &Spanned<kinds::From>) -> Checked<model::Source> {
    let from = &raw.value.source;
    let source = model::Source {
        principals: each(&from.principals, principal)?,
        not_principals: each(&from.not_principals, principal)?,
        request_principals: each(&from.request_principals, request_principal)?,
        not_request_principals: each(&from.not_request_principals, request_principal)?,
        namespaces: each(&from.namespaces, namespace)?,
        not_namespaces: each(&from.not_namespaces, namespace)?,
        trust_domains: each(&from.trust_domains, trust_domain)?,
        ip_blocks: each(&from.ip_blocks, range)?,
        not_ip_blocks: each(&from.not_ip_blocks, range)?,
    };
    match source == model::Source::default() {
        true => mistake(raw.referenced, "this source says nothing", "leave `from` out if everybody is meant"),
        false => Ok(source),
    }
}

fn operation(raw: &Spanned<kinds::To>) -> Checked<model::Operation> {
    let to = &raw.value.operation;
    let operation = model::Operation {
        hosts: each(&to.hosts, host)?,
        not_hosts: each(&to.not_hosts, host)?,
        ports: each(&to.ports, port)?,
        not_ports: each(&to.not_ports, port)?,
        methods: each(&to.methods, method)?,
        not_methods: each(&to.not_methods, method)?,
        paths: each(&to.paths, path)?,
        not_paths: each(&to.not_paths, path)?,
    };
    match operation == model::Operation::default() {
        true => mistake(raw.referenced, "this operation says nothing", "leave `to` out if every one is meant"),
        false => Ok(operation),
    }
}

fn condition(raw: &kinds::Condition) -> Checked<model::Condition> {
    if raw.key.value.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let reason = format!("`{}` has a space in it", raw.key.value);
        return mistake(raw.key.referenced, reason, "nothing that is compared has one");
    }
    let mut condition = model::Condition { key: raw.key.value.as_str().into(), ..model::Condition::default() };
    let key = condition.key().or_else(|error| mistake(raw.key.referenced, error.to_string(), None))?;
    condition.values = each(&raw.values, |word| value(&key, word))?;
    condition.not_values = each(&raw.not_values, |word| value(&key, word))?;
    condition.check().or_else(|error| mistake(raw.key.referenced, error.to_string(), None))?;
    Ok(condition)
}

/// What is under `when` is read as the same under `from` and `to` is.
fn value(key: &Key, word: &Spanned<String>) -> Checked<Arc<str>> {
    let text = match key {
        Key::SourceIp => range(word)?.to_string(),
        Key::SourceNamespace => namespace(word)?.to_string(),
        Key::SourcePrincipal => principal(word)?.to_string(),
        Key::RequestPrincipal => request_principal(word)?.to_string(),
        Key::DestinationPort => port(word)?.to_string(),
        Key::Header(_) => header_value(word)?.to_string(),
        Key::Claim(_) | Key::Audiences => checked(word, word.value.clone(), |_| Ok(()))?.to_string(),
    };
    Ok(text.into())
}

/// It may have spaces, but none around it (RFC 9110 §5.5).
fn header_value(word: &Spanned<String>) -> Checked<Glob> {
    let text = &word.value;
    match text.trim() != text || text.contains(|c: char| c.is_control() && c != '\t') {
        true => mistake(word.referenced, format!("no header's value is `{text}`"), "write it with no space around it"),
        false => checked(word, text.clone(), |_| Ok(())),
    }
}

/// Of an identity, as a resource's own is written.
fn namespace(word: &Spanned<String>) -> Checked<Glob> {
    match word.value.contains(|c: char| c.is_uppercase()) {
        true => {
            let hint = "write it in lower case; identities of others go under principals";
            mistake(word.referenced, format!("`{}` is not a namespace", word.value), hint)
        }
        false => glob(word),
    }
}

fn each<T>(words: &[Spanned<String>], read: impl Fn(&Spanned<String>) -> Checked<T>) -> Checked<Vec<T>> {
    words.iter().map(read).collect()
}

fn glob(word: &Spanned<String>) -> Checked<Glob> {
    match word.value.contains(|c: char| c.is_whitespace() || c.is_control()) {
        true => {
            mistake(word.referenced, format!("`{}` has a space in it", word.value), "nothing that is compared has one")
        }
        false => checked(word, word.value.clone(), |_| Ok(())),
    }
}

/// With `spiffe://` or without, as Istio writes them.
fn principal(word: &Spanned<String>) -> Checked<Glob> {
    let text = word.value.strip_prefix("spiffe://").unwrap_or(&word.value);
    let (domain, path) = text.split_once('/').map_or((text, None), |(domain, path)| (domain, Some(path)));
    if !text.contains('*') && path.is_none_or(str::is_empty) {
        let hint = "write one like cluster.local/ns/default/sa/web";
        return mistake(word.referenced, format!("`{}` is not an identity", word.value), hint);
    }
    domain_of(word, domain)?;
    glob(word)?;
    checked(word, text.to_string(), |_| Ok(()))
}

/// SPIFFE ID §2.1: no upper case.
fn domain_of(word: &Spanned<String>, domain: &str) -> Checked<()> {
    match domain.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._*".contains(&b)) {
        true => Ok(()),
        false => {
            let hint = "it has lower-case letters, digits, `-`, `.` and `_`";
            mistake(word.referenced, format!("`{domain}` is not a trust domain"), hint)
        }
    }
}

fn trust_domain(word: &Spanned<String>) -> Checked<Glob> {
    domain_of(word, &word.value)?;
    glob(word)
}

/// `ISSUER/SUBJECT` of a token.
fn request_principal(word: &Spanned<String>) -> Checked<Glob> {
    match word.value.contains(['/', '*']) {
        true => glob(word),
        false => {
            let hint = "write ISSUER/SUBJECT, or ISSUER/* for all of its tokens";
            mistake(word.referenced, format!("`{}` is nobody's token", word.value), hint)
        }
    }
}

fn host(word: &Spanned<String>) -> Checked<Glob> {
    checked(word, word.value.to_ascii_lowercase(), Glob::check_host)
}

fn path(word: &Spanned<String>) -> Checked<Glob> {
    checked(word, word.value.clone(), Glob::check_path)
}

fn method(word: &Spanned<String>) -> Checked<Glob> {
    match word.value.bytes().any(|b| b.is_ascii_lowercase()) {
        true => mistake(word.referenced, format!("`{}` is not a method", word.value), "write it in upper case"),
        false => glob(word),
    }
}

fn checked(word: &Spanned<String>, text: String, check: impl Fn(&Glob) -> Result<(), &'static str>) -> Checked<Glob> {
    let wrong = |why: &str| mistake(word.referenced, format!("`{}`: {why}", word.value), None);
    match Glob::try_from(text) {
        Ok(glob) => match check(&glob) {
            Ok(()) => Ok(glob),
            Err(why) => wrong(why),
        },
        Err(why) => wrong(&why.to_string()),
    }
}

fn port(word: &Spanned<String>) -> Checked<u16> {
    match word.value.parse() {
        Ok(0) | Err(_) => {
            mistake(word.referenced, format!("`{}` is not a port", word.value), "write one from 1 to 65535")
        }
        Ok(port) => Ok(port),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::resources::Resource;
    use crate::resources::parse::parse;

    const HEAD: &str = "apiVersion: sheetbend.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: web}\n";

    fn read(spec: &str) -> Result<Authorization, String> {
        let mut parsed = parse(Path::new("a.yaml"), &format!("{HEAD}{spec}\n"));
        match (parsed.problems.first(), parsed.resources.pop()) {
            (None, Some((_, Resource::Authorization(one)))) => Ok(one),
            (Some(problem), _) => Err(problem.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_policy_is_read_in_istios_words() {
        let spec = "spec:\n  targetRefs: [{kind: Service, name: web}]\n  action: DENY\n  dryRun: true\n  rules:\n  \
                    - from: [{source: {principals: [\"spiffe://cluster.local/ns/default/sa/a\", \"*/sa/b\"]}}]\n    \
                    to: [{operation: {ports: [80, \"81\"], hosts: [WEB.example], paths: [/a/*], methods: [GET]}}]\n    \
                    when: [{key: \"request.auth.claims[iss]\", values: [\"*\"]}]\n";
        let one = read(spec).unwrap();
        assert_eq!((one.targets.len(), one.policy.action, one.policy.dry_run), (1, Action::Deny, true));
        assert_eq!(&*one.policy.name, "default/web");
        let rule = &one.policy.rules[0];
        let principals: Vec<String> = rule.from[0].principals.iter().map(ToString::to_string).collect();
        assert_eq!(principals, ["cluster.local/ns/default/sa/a", "*/sa/b"]);
        assert_eq!(rule.to[0].ports, [80, 81]);
        assert_eq!(rule.to[0].hosts[0].to_string(), "web.example");
        let nobody = read("spec: {}").unwrap();
        assert_eq!((nobody.policy.action, nobody.policy.rules.len(), nobody.targets.len()), (Action::Allow, 0, 0));
    }

    #[test]
    fn a_condition_is_read_as_the_same_source_is() {
        let spec = "spec:\n  rules:\n  - when:\n    - {key: source.ip, values: [\"::ffff:10.0.0.1\"], notValues: \
                    [10.1.2.3/24]}\n    - {key: source.principal, values: [\"spiffe://cluster.local/ns/a/sa/b\"]}\n    \
                    - {key: \"request.headers[user-agent]\", values: [\"a b*\"]}\n";
        let when = &read(spec).unwrap().policy.rules[0].when;
        assert_eq!((&*when[0].values[0], &*when[0].not_values[0]), ("10.0.0.1/32", "10.1.2.0/24"));
        assert_eq!((&*when[1].values[0], &*when[2].values[0]), ("cluster.local/ns/a/sa/b", "a b*"));
    }

    #[test]
    fn what_would_never_match_or_is_not_obeyed_is_refused_at_its_place() {
        for (spec, expected) in [
            ("spec: {action: AUDIT, dryRun: true}", ":4:16: an AUDIT that is a dry run does nothing"),
            ("spec: {rules: [{to: [{operation: {hosts: [\"[::1]:80\"]}}]}]}", "`[::1]:80`: a host has no port here"),
            ("spec: {targetRefs: [{kind: Service, name: web, weight: 1}]}", ":4:56: a targetRef has no weight"),
            ("spec: {action: CUSTOM}", ":4:16: action `CUSTOM`; write ALLOW, DENY or AUDIT"),
            ("spec: {rules: [{to: [{operation: {paths: [/a, //b]}}]}]}", ":4:47: `//b`: slashes are merged"),
            ("spec: {rules: [{to: [{operation: {paths: [/%61]}}]}]}", ":4:43: `/%61`: write it with no escapes"),
            ("spec: {rules: [{to: [{operation: {methods: [get]}}]}]}", ":4:45: `get` is not a method"),
            ("spec: {rules: [{to: [{operation: {hosts: [\"web:80\"]}}]}]}", ":4:43: `web:80`: a host has no port here"),
            ("spec: {rules: [{to: [{operation: {ports: [0]}}]}]}", ":4:43: `0` is not a port"),
            ("spec: {rules: [{to: [{operation: {}}]}]}", "this operation says nothing"),
            ("spec: {rules: [{from: [{source: {}}]}]}", "this source says nothing"),
            (
                "spec: {rules: [{from: [{source: {namespaces: [\"a*b\"]}}]}]}",
                "a `*` stands at the beginning or at the end",
            ),
            (
                "spec: {rules: [{from: [{source: {namespaces: [a], remoteIpBlocks: [10.0.0.1]}}]}]}",
                "unknown field `remoteIpBlocks`",
            ),
            ("spec: {rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}", "`10.0.0.0/99` is not a range"),
            ("spec: {rules: [{when: [{key: \"request.header[x]\", values: [a]}]}]}", ":4:30: key: `request.header[x]`"),
            ("spec: {rules: [{when: [{key: source.ip, values: [a]}]}]}", ":4:50: `a` is not a range of addresses"),
            ("spec: {rules: [{when: [{key: source.ip}]}]}", "a condition has values or notValues"),
            ("spec: {rules: [{from: []}]}", "an empty list: leave it out if everything is meant"),
            ("spec: {rules: [{from: [{source: {principals: []}}]}]}", ":4:46: an empty list"),
            ("spec: {rules: [{to: [{operation: {paths: []}}]}]}", "an empty list"),
            (
                "spec: {rules: [{from: [{source: {principals: [evil]}}]}]}",
                ":4:47: `evil` is not an identity; write one",
            ),
            ("spec: {rules: [{from: [{source: {principals: [Cluster.Local/ns/a/sa/b]}}]}]}", "is not a trust domain"),
            ("spec: {rules: [{from: [{source: {trustDomains: [Cluster.Local]}}]}]}", "is not a trust domain"),
            ("spec: {rules: [{from: [{source: {requestPrincipals: [me]}}]}]}", "`me` is nobody's token"),
            ("spec: {rules: [{from: [{source: {namespaces: [\"a \"]}}]}]}", "`a ` has a space in it"),
            ("spec: {rules: [{from: [{source: {namespaces: [Prod]}}]}]}", "`Prod` is not a namespace"),
            ("spec: {rules: [{when: [{key: source.namespace, values: [Prod]}]}]}", ":4:57: `Prod` is not a namespace"),
            ("spec: {rules: [{when: [{key: source.principal, values: [a/b, evil]}]}]}", "`evil` is not an identity"),
            ("spec: {rules: [{when: [{key: source.principal, notValues: [\"A.b/c\"]}]}]}", "is not a trust domain"),
            ("spec: {rules: [{when: [{key: source.principal, values: [\"a/b \"]}]}]}", "has a space in it"),
            ("spec: {rules: [{when: [{key: request.auth.principal, values: [me]}]}]}", "`me` is nobody's token"),
            ("spec: {rules: [{when: [{key: destination.port, values: [\"0\"]}]}]}", "`0` is not a port"),
            ("spec: {rules: [{when: [{key: \"request.headers[a]\", values: [\"b \"]}]}]}", "no header's value is `b `"),
            ("spec: {rules: [{to: [{operation: {methods: [\"GET \"]}}]}]}", "`GET ` has a space in it"),
            ("spec: {rules: [{when: [{key: \"request.auth.claims[ a]\", values: [x]}]}]}", "has a space in it"),
            ("spec: {targetRefs: []}", "this policy is about nothing"),
            ("spec: {targetRefs: [{kind: Service, name: web, namespace: other}]}", "Services of its own namespace"),
            ("spec: {selector: {}}", "unknown field `selector`"),
        ] {
            let refusal = read(spec).expect_err(spec);
            assert!(refusal.contains(expected), "{spec}: {refusal}");
        }
    }
}
