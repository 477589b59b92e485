//! Routes, decoded: which conditions and backends a proxy takes, and which it refuses.

use std::sync::Arc;

use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};

use super::WORDS;
use super::decode::{MAX_TEXT, at_most, text, unusable};
use super::metadata::from_struct;
use super::words::DEFAULT_ROUTE;
use super::{DecodeError, filters};
use crate::model::{Backend, ClusterName, HeaderEdits, Match, PathMatch, Pattern, Rule, RulePolicy, TextMatch};

/// Routes of one destination: conditions, counted over all its rules.
pub const MAX_ROUTES: usize = 2_000;
/// Header conditions of one route, the Gateway API's own limit.
pub const MAX_HEADERS: usize = 16;
/// Backends of one rule; the Gateway API stops at 16.
pub const MAX_BACKENDS: usize = 64;

/// A destination's HTTP rules.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes {
    /// In the order in which they are tried.
    pub rules: Vec<Rule>,
    /// Where everything else goes.
    pub default_cluster: ClusterName,
}

impl Routes {
    /// Every cluster that the rules and the default name, some more than once.
    pub fn clusters(&self) -> impl Iterator<Item = &ClusterName> {
        let backends = self.rules.iter().flat_map(|rule| &rule.backends).map(|backend| &backend.cluster);
        backends.chain([&self.default_cluster])
    }
}

/// A destination's routes: one virtual host, and a last route that takes everything.
pub fn routes(message: &rds::RouteConfiguration) -> Result<Routes, DecodeError> {
    let [host] = &message.virtual_hosts[..] else {
        return Err(DecodeError::invalid("virtual_hosts", "there must be exactly one"));
    };
    at_most("routes", host.routes.len(), MAX_ROUTES)?;
    let Some((last, before)) = host.routes.split_last() else { return Err(DecodeError::Missing("routes")) };
    if last.name != DEFAULT_ROUTE || condition(last)? != Match::default() {
        return Err(DecodeError::invalid("routes", format!("the last must be `{DEFAULT_ROUTE}` and take everything")));
    }
    let default_cluster = match &backends(last)?[..] {
        [only] => only.cluster.clone(),
        _ => return Err(DecodeError::invalid("routes", "the default must have one cluster")),
    };
    let mut rules: Vec<Rule> = Vec::new();
    for route in before {
        add_route(&mut rules, route)?;
    }
    for rule in &mut rules {
        // Among "any of these", one that takes everything leaves nothing to the others.
        if rule.matches.contains(&Match::default()) {
            rule.matches.clear();
        }
    }
    Ok(Routes { rules, default_cluster })
}

/// Routes of one rule stand together: same name, same backends, one condition each.
fn add_route(rules: &mut Vec<Rule>, route: &rds::Route) -> Result<(), DecodeError> {
    let name = text("routes.name", &route.name)?;
    let (condition, backends, policy) = (condition(route)?, backends(route)?, policy(route)?);
    let redirects = matches!(route.action, Some(rds::route::Action::Redirect(_)));
    if redirects != policy.filters.redirect.is_some() {
        return Err(DecodeError::invalid("routes.redirect", "a redirect is said in our own words too, or not at all"));
    }
    match rules.last_mut() {
        Some(rule) if rule.name == name && rule.backends == backends && *rule.policy == policy => {
            rule.matches.push(condition);
        }
        _ => rules.push(Rule { name, matches: vec![condition], backends, policy: policy.into() }),
    }
    Ok(())
}

/// What our own words beside a route say; nothing, where there are none.
fn policy(route: &rds::Route) -> Result<RulePolicy, DecodeError> {
    let found = route.metadata.as_ref().and_then(|metadata| metadata.filter_metadata.get(WORDS));
    let policy = found.map(|words| from_struct::<RulePolicy>(words, "routes.metadata")).transpose()?;
    let policy = policy.unwrap_or_default();
    policy.check().map_err(unusable)?;
    Ok(policy)
}

fn condition(route: &rds::Route) -> Result<Match, DecodeError> {
    use rds::route_match::PathSpecifier;
    let found = route.r#match.as_ref().ok_or(DecodeError::Missing("routes.match"))?;
    let unknown = !found.cookies.is_empty()
        || !found.dynamic_metadata.is_empty()
        || !found.filter_state.is_empty()
        || found.grpc.is_some()
        || found.tls_context.is_some()
        || found.runtime_fraction.is_some()
        || found.case_sensitive.is_some_and(|sensitive| !sensitive.value);
    if unknown {
        return Err(DecodeError::invalid(
            "routes.match",
            "only path, method, header and query conditions are known here",
        ));
    }
    at_most("header conditions", found.headers.len(), MAX_HEADERS + 1)?; // and the method
    at_most("query conditions", found.query_parameters.len(), MAX_HEADERS)?;
    let path = match &found.path_specifier {
        Some(PathSpecifier::Prefix(prefix)) if prefix.is_empty() => None,
        Some(PathSpecifier::Prefix(prefix)) if prefix == "/" => Some(PathMatch::Prefix(prefix.as_str().into())),
        Some(PathSpecifier::Path(path)) => Some(PathMatch::Exact(text("routes.match.path", path)?)),
        Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
            Some(PathMatch::Prefix(text("routes.match.path_separated_prefix", prefix)?))
        }
        Some(PathSpecifier::SafeRegex(regex)) => Some(PathMatch::Regex(pattern(regex)?)),
        _ => {
            return Err(DecodeError::invalid(
                "routes.match",
                "only whole paths, patterns and prefixes of whole elements are known here",
            ));
        }
    };
    let query = found.query_parameters.iter().map(query_parameter).collect::<Result<_, _>>()?;
    let mut found_match = Match { path, query, ..Match::default() };
    for header in &found.headers {
        let (name, value) = header_condition(header)?;
        match (&*name, &value) {
            (":method", TextMatch::Exact(method)) if found_match.method.is_none() => {
                found_match.method = Some(method.clone());
            }
            (name, _) if name.starts_with(':') => {
                return Err(DecodeError::invalid("routes.match.headers", format!("`{name}` can not be matched")));
            }
            _ => found_match.headers.push((name, value)),
        }
    }
    Ok(found_match)
}

fn header_condition(header: &rds::HeaderMatcher) -> Result<(Arc<str>, TextMatch), DecodeError> {
    use rds::header_matcher::HeaderMatchSpecifier::StringMatch;
    let name = text("routes.match.headers.name", &header.name)?;
    match &header.header_match_specifier {
        Some(StringMatch(matcher)) if !header.invert_match && !name.bytes().any(|b| b.is_ascii_uppercase()) => {
            Ok((name, value(matcher, "routes.match.headers")?))
        }
        _ => Err(DecodeError::invalid("routes.match.headers", format!("`{name}`: {KNOWN_VALUES}"))),
    }
}

fn query_parameter(found: &rds::QueryParameterMatcher) -> Result<(Arc<str>, TextMatch), DecodeError> {
    use rds::query_parameter_matcher::QueryParameterMatchSpecifier::StringMatch;
    let name = text("routes.match.query_parameters.name", &found.name)?;
    match &found.query_parameter_match_specifier {
        Some(StringMatch(matcher)) => Ok((name, value(matcher, "routes.match.query_parameters")?)),
        _ => Err(DecodeError::invalid("routes.match.query_parameters", format!("`{name}`: {KNOWN_VALUES}"))),
    }
}

const KNOWN_VALUES: &str = "only exact values and patterns are known here";

fn value(found: &StringMatcher, field: &'static str) -> Result<TextMatch, DecodeError> {
    match &found.match_pattern {
        Some(MatchPattern::Exact(value)) if !found.ignore_case && value.len() <= MAX_TEXT => {
            Ok(TextMatch::Exact(value.as_str().into()))
        }
        Some(MatchPattern::SafeRegex(regex)) if !found.ignore_case => Ok(TextMatch::Regex(pattern(regex)?)),
        _ => Err(DecodeError::invalid(field, KNOWN_VALUES)),
    }
}

fn pattern(found: &RegexMatcher) -> Result<Pattern, DecodeError> {
    found.regex.parse().map_err(|error| DecodeError::invalid("routes.match.safe_regex", error))
}

fn backends(route: &rds::Route) -> Result<Vec<Backend>, DecodeError> {
    use rds::route_action::ClusterSpecifier;
    let action = match &route.action {
        Some(rds::route::Action::Route(action)) => action,
        // Where to, our own words say.
        Some(rds::route::Action::Redirect(_)) => return Ok(Vec::new()),
        Some(rds::route::Action::DirectResponse(answer)) if answer.status == 404 => return Ok(Vec::new()),
        _ => return Err(DecodeError::invalid("routes.action", "only forwarding, redirects and 404 are known here")),
    };
    let backends = match &action.cluster_specifier {
        Some(ClusterSpecifier::Cluster(cluster)) => {
            let cluster = text("routes.cluster", cluster)?;
            vec![Backend { cluster, weight: 1, headers: HeaderEdits::default() }]
        }
        Some(ClusterSpecifier::WeightedClusters(weighted)) => {
            at_most("backends of a rule", weighted.clusters.len(), MAX_BACKENDS)?;
            weighted.clusters.iter().map(backend).collect::<Result<_, _>>()?
        }
        _ => return Err(DecodeError::invalid("routes.action", "only named clusters are known here")),
    };
    let sum: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    match sum {
        0 => Err(DecodeError::invalid("routes.weighted_clusters", "no backend has any weight")),
        sum if sum > u64::from(u32::MAX) => {
            Err(DecodeError::invalid("routes.weighted_clusters", "the weights are too large"))
        }
        _ => Ok(backends),
    }
}

fn backend(found: &rds::weighted_cluster::ClusterWeight) -> Result<Backend, DecodeError> {
    let weight = found.weight.as_ref().ok_or(DecodeError::Missing("routes.weighted_clusters.weight"))?;
    let headers = HeaderEdits {
        request: filters::edit_of(&found.request_headers_to_add, &found.request_headers_to_remove)?,
        response: filters::edit_of(&found.response_headers_to_add, &found.response_headers_to_remove)?,
    };
    headers.check().map_err(unusable)?;
    Ok(Backend { cluster: text("routes.weighted_clusters.name", &found.name)?, weight: weight.value, headers })
}
