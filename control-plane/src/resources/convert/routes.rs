//! Routes: conditions as they are written, made into what a proxy matches.

use std::sync::Arc;

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{Filters, Match, PathMatch, Pattern, RulePolicy, TextMatch};

use super::{backends, filters, parents_of, retries};
use crate::resources::kinds::{self, ValueMatch};
use crate::resources::parse::{Checked, both, every, mistake};
use crate::resources::precedence::Ranked;
use crate::resources::{Route, RouteRule};

/// What the Gateway API allows of each.
const MOST_RULES: usize = 16;
const MOST_MATCHES: usize = 64;
const MOST_VALUES: usize = 16;
const MOST_PATH: usize = 1_024;
const MOST_VALUE: usize = 4_096;

pub(in crate::resources) fn http_route(raw: kinds::Route<kinds::HttpRule>) -> Checked<Route> {
    let (name, parents) = parents_of(&raw.metadata, &retries::ANNOTATIONS, &raw.spec.parent_refs)?;
    let at = raw.metadata.name.referenced;
    rules_of("HTTPRoute", raw.spec.rules.len(), at)?;
    let rules = raw.spec.rules.iter().map(|rule| {
        let (at, rule) = (rule.referenced, &rule.value);
        at_most("matches", rule.matches.len(), MOST_MATCHES, at)?;
        let matches = every(rule.matches.iter().map(|one| http_match(one).map(Ranked::http)));
        let policy = retries::rule(&raw.metadata, at, rule.timeouts.as_ref(), rule.retry.as_ref());
        let forwards = rule.backend_refs.first().map(|first| first.name.referenced);
        let filters = filters::of_rule(&rule.filters, &rule.matches, forwards);
        let backends = match &filters {
            Ok(filters) if filters.redirect.is_some() => Ok(Vec::new()),
            Err(_) if rule.backend_refs.is_empty() => Ok(Vec::new()),
            _ => backends(&rule.backend_refs, &name, at),
        };
        let ((matches, filters), (mut policy, backends)) = both(both(matches, filters), both(policy, backends))?;
        policy.filters = filters;
        Ok(RouteRule { at: at.into(), matches, backends, policy: policy.into() })
    });
    let rules = every(rules)?;
    Ok(Route { kind: "HTTPRoute", name, created: created(&raw.metadata)?, parents, hostnames: Vec::new(), rules })
}

pub(in crate::resources) fn grpc_route(raw: kinds::Route<kinds::GrpcRule>) -> Checked<Route> {
    let (name, parents) = parents_of(&raw.metadata, &retries::ANNOTATIONS, &raw.spec.parent_refs)?;
    let at = raw.metadata.name.referenced;
    rules_of("GRPCRoute", raw.spec.rules.len(), at)?;
    let rules = raw.spec.rules.iter().map(|rule| {
        let (at, rule) = (rule.referenced, &rule.value);
        at_most("matches", rule.matches.len(), MOST_MATCHES, at)?;
        let matches = every(rule.matches.iter().map(grpc_match));
        let headers = filters::edits(&rule.filters);
        let policy = retries::rule(&raw.metadata, at, rule.timeouts.as_ref(), rule.retry.as_ref());
        let backends = backends(&rule.backend_refs, &name, at);
        let ((matches, headers), (policy, backends)) = both(both(matches, headers), both(policy, backends))?;
        let filters = Filters { headers, ..Filters::default() };
        let policy = RulePolicy { filters, ..policy }.into();
        Ok(RouteRule { at: at.into(), matches, backends, policy })
    });
    let rules = every(rules)?;
    Ok(Route { kind: "GRPCRoute", name, created: created(&raw.metadata)?, parents, hostnames: Vec::new(), rules })
}

/// Without any, a route would answer 404 to everything: nobody means that.
fn rules_of(kind: &str, rules: usize, at: Location) -> Checked<()> {
    match rules {
        0 => mistake(at, format!("no rule in this {kind}: it leads nowhere"), "add one with backendRefs"),
        _ => at_most("rules", rules, MOST_RULES, at),
    }
}

/// When Kubernetes made it; nothing in a file that a person wrote.
pub(super) fn created(meta: &kinds::Meta) -> Checked<Option<jiff::Timestamp>> {
    let Some(text) = &meta.creation_timestamp else { return Ok(None) };
    let wrong = |_| mistake(text.referenced, format!("`{}` is no time", text.value), "write 2026-01-31T12:00:00Z");
    text.value.parse().map(Some).or_else(wrong)
}

fn http_match(raw: &kinds::HttpMatch) -> Checked<Match> {
    let path = raw.path.as_ref().map(path_match).transpose()?.flatten();
    let method = match &raw.method {
        Some(method) if !method.value.bytes().all(|b| b.is_ascii_uppercase()) || method.value.is_empty() => {
            return mistake(method.referenced, format!("`{}` is not a method", method.value), "write it in upper case");
        }
        method => method.as_ref().map(|m| m.value.as_str().into()),
    };
    Ok(Match { path, method, headers: headers(&raw.headers)?, query: query(&raw.query_params)? })
}

fn path_match(raw: &kinds::Path) -> Checked<Option<PathMatch>> {
    let value = raw.value.as_ref().map_or("/", |value| value.value.as_str());
    let kind = raw.r#type.as_ref().map_or("PathPrefix", |kind| kind.value.as_str());
    let at = raw.value.as_ref().map_or(Location::UNKNOWN, |value| value.referenced);
    if kind == "RegularExpression" {
        return pattern(value, at).map(|pattern| Some(PathMatch::Regex(pattern)));
    }
    at_most("bytes in a path", value.len(), MOST_PATH, at)?;
    if !value.starts_with('/') {
        return mistake(at, format!("the path `{value}` does not begin with /"), None);
    }
    if value.contains(['?', '#']) || value.bytes().any(|b| b.is_ascii_control() || b == b' ') {
        return mistake(at, format!("`{value}` is more than a path"), "match the query with queryParams");
    }
    // The Gateway API refuses these too: no client sends them, and what they would mean is not clear.
    if value.contains("//") || value.split('/').any(|element| element == "." || element == "..") {
        return mistake(at, format!("the path `{value}` is not in its normal form"), "leave out `//`, `.` and `..`");
    }
    match kind {
        "Exact" => Ok(Some(PathMatch::Exact(value.into()))),
        "PathPrefix" if value == "/" => Ok(None),
        // A slash at the end means nothing there.
        "PathPrefix" => Ok(Some(PathMatch::Prefix(value.trim_end_matches('/').into()))),
        other => {
            let at = raw.r#type.as_ref().map_or(at, |kind| kind.referenced);
            mistake(at, format!("`{other}` is no type of path"), "write Exact, PathPrefix or RegularExpression")
        }
    }
}

pub(super) fn headers(raw: &[ValueMatch]) -> Checked<Vec<(Arc<str>, TextMatch)>> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let mut headers = Vec::new();
    for one in raw {
        let name = &one.name;
        if name.value.is_empty() || name.value.len() > 256 || !name.value.bytes().all(token) {
            return mistake(name.referenced, format!("`{}` is not a header's name", name.value), None);
        }
        add(&mut headers, name.value.to_ascii_lowercase(), one)?;
    }
    Ok(headers)
}

fn query(raw: &[ValueMatch]) -> Checked<Vec<(Arc<str>, TextMatch)>> {
    let mut query = Vec::new();
    for one in raw {
        let name = &one.name;
        let good = |b: u8| b.is_ascii_graphic() && !b"&=#".contains(&b);
        if name.value.is_empty() || name.value.len() > 256 || !name.value.bytes().all(good) {
            let hint = "write it as it stands in the request's query";
            return mistake(name.referenced, format!("`{}` is not a query parameter's name", name.value), hint);
        }
        add(&mut query, name.value.clone(), one)?;
    }
    Ok(query)
}

/// Of two conditions on one name the first holds (HTTPHeaderMatch, HTTPQueryParamMatch); here that is a mistake, as it is
/// to the Kubernetes API where the names are alike to the letter.
fn add(all: &mut Vec<(Arc<str>, TextMatch)>, name: String, raw: &ValueMatch) -> Checked<()> {
    if all.iter().any(|(other, _)| **other == name) {
        let hint = "write one condition, with type RegularExpression if need be";
        return mistake(raw.name.referenced, format!("two conditions on `{}`", raw.name.value), hint);
    }
    at_most("conditions of a kind", all.len() + 1, MOST_VALUES, raw.name.referenced)?;
    let Spanned { value, referenced: at, .. } = &raw.value;
    at_most("bytes in a value", value.len(), MOST_VALUE, *at)?;
    let condition = match raw.r#type.as_ref().map(|kind| (kind.value.as_str(), kind.referenced)) {
        None | Some(("Exact", _)) if value.bytes().any(|b| b.is_ascii_control()) => {
            return mistake(*at, "no request carries control characters in a value", None);
        }
        None | Some(("Exact", _)) => TextMatch::Exact(value.as_str().into()),
        Some(("RegularExpression", _)) => TextMatch::Regex(pattern(value, *at)?),
        Some((other, at)) => {
            return mistake(at, format!("`{other}` is no type of match"), "write Exact or RegularExpression");
        }
    };
    all.push((name.into(), condition));
    Ok(())
}

fn pattern(text: &str, at: Location) -> Checked<Pattern> {
    let hint = "patterns are RE2's, for the whole value, without look-around and back-references";
    text.parse().or_else(|error| mistake(at, format!("bad regular expression `{}`: {error}", short(text)), hint))
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// gRPC's method is the path `/SERVICE/METHOD`.
fn grpc_match(raw: &kinds::GrpcMatch) -> Checked<Ranked> {
    let headers = headers(&raw.headers)?;
    let condition = |path| Match { path, headers, ..Match::default() };
    let Some(method) = &raw.method else { return Ok(Ranked::grpc(false, "", "", condition(None))) };
    let regex = match method.r#type.as_ref().map(|kind| (kind.value.as_str(), kind.referenced)) {
        None | Some(("Exact", _)) => false,
        Some(("RegularExpression", _)) => true,
        Some((other, at)) => {
            return mistake(at, format!("`{other}` is no type of match"), "write Exact or RegularExpression");
        }
    };
    let written = |text: &Option<Spanned<String>>| text.as_ref().map_or("", |t| t.value.as_str()).to_string();
    let (service, name) = (written(&method.service), written(&method.method));
    let spanned = method.service.iter().chain(&method.method);
    for text in spanned.clone() {
        match regex {
            true => drop(pattern(&text.value, text.referenced)?),
            false => check_grpc_name(text)?,
        }
    }
    let at = spanned.map(|text| text.referenced).next().unwrap_or(Location::UNKNOWN);
    let any = |text: &str| match text {
        "" => "[^/]+".to_string(),
        text => format!("(?:{text})"),
    };
    let path = match (regex, &*service, &*name) {
        (_, "", "") => return mistake(at, "neither a service nor a method", "name one of them, or leave `method` out"),
        (true, service, name) => PathMatch::Regex(pattern(&format!("/{}/{}", any(service), any(name)), at)?),
        (false, "", name) => PathMatch::Regex(pattern(&format!("/[^/]+/{name}"), at)?),
        (false, service, "") => PathMatch::Prefix(format!("/{service}").into()),
        (false, service, name) => PathMatch::Exact(format!("/{service}/{name}").into()),
    };
    Ok(Ranked::grpc(regex, &service, &name, condition(Some(path))))
}

/// Letters, digits, `_`, and `.` in a service's name: nothing that would mean something else in a path or a pattern.
fn check_grpc_name(text: &Spanned<String>) -> Checked<()> {
    match text.value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.')) {
        true => Ok(()),
        false => {
            let hint = "write it as it stands in the .proto file, with its package";
            mistake(text.referenced, format!("`{}` is not a gRPC service or method", text.value), hint)
        }
    }
}

pub(super) fn at_most(what: &str, count: usize, most: usize, at: Location) -> Checked<()> {
    match count > most {
        true => mistake(at, format!("{count} {what}: the Gateway API allows {most}"), None),
        false => Ok(()),
    }
}
