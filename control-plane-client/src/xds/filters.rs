//! Filters in Envoy's own words. Ours read those of backends from there; what a rule does travels whole beside them.

use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::route::v3 as rds;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatchAndSubstitute, RegexMatcher};

use super::DecodeError;
use super::decode::{MAX_TEXT, at_most};
use crate::model::{HeaderEdit, Match, PathEdit, PathMatch, Redirect, Rewrite};

type Options = Vec<core::HeaderValueOption>;

/// What Envoy adds or sets, and what it removes.
pub(super) fn edit(edit: &HeaderEdit) -> (Options, Vec<String>) {
    use core::header_value_option::HeaderAppendAction::{AppendIfExistsOrAdd, OverwriteIfExistsOrAdd};
    let option = |(name, value): &(Arc<str>, Arc<str>), action| core::HeaderValueOption {
        header: Some(core::HeaderValue {
            key: name.to_string(),
            // Envoy reads `%START_TIME%` and the like in these.
            value: value.replace('%', "%%"),
            ..core::HeaderValue::default()
        }),
        append_action: action as i32,
        ..core::HeaderValueOption::default()
    };
    let set = edit.set.iter().map(|one| option(one, OverwriteIfExistsOrAdd));
    let add = edit.add.iter().map(|one| option(one, AppendIfExistsOrAdd));
    (set.chain(add).collect(), edit.remove.iter().map(|name| name.to_string()).collect())
}

/// The same, back.
pub(super) fn edit_of(options: &Options, remove: &[String]) -> Result<HeaderEdit, DecodeError> {
    use core::header_value_option::HeaderAppendAction::{AppendIfExistsOrAdd, OverwriteIfExistsOrAdd};
    at_most("header edits", options.len() + remove.len(), 64)?;
    let mut edit =
        HeaderEdit { remove: remove.iter().map(|name| name.as_str().into()).collect(), ..HeaderEdit::default() };
    for option in options {
        let header = option.header.as_ref().ok_or(DecodeError::Missing("headers_to_add.header"))?;
        if header.value.len() > MAX_TEXT {
            return Err(DecodeError::invalid("headers_to_add.header", "its value is too long"));
        }
        let pair = (header.key.as_str().into(), header.value.replace("%%", "%").into());
        match core::header_value_option::HeaderAppendAction::try_from(option.append_action) {
            Ok(OverwriteIfExistsOrAdd) => edit.set.push(pair),
            Ok(AppendIfExistsOrAdd) => edit.add.push(pair),
            _ => return Err(DecodeError::invalid("headers_to_add.append_action", "it is not known here")),
        }
    }
    Ok(edit)
}

/// What Envoy answers in a redirect's place.
pub(super) fn redirect(redirect: &Redirect, condition: &Match) -> rds::RedirectAction {
    use rds::redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier};
    let code = match redirect.status_code {
        301 => RedirectResponseCode::MovedPermanently,
        303 => RedirectResponseCode::SeeOther,
        307 => RedirectResponseCode::TemporaryRedirect,
        308 => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::Found,
    };
    let path = redirect.path.as_ref().map(|path| match path {
        PathEdit::ReplaceFullPath(path) => PathRewriteSpecifier::PathRedirect(path.to_string()),
        edit => PathRewriteSpecifier::RegexRewrite(substitute(edit, condition)),
    });
    rds::RedirectAction {
        host_redirect: redirect.hostname.as_deref().unwrap_or_default().to_string(),
        port_redirect: redirect.port.map_or(0, u32::from),
        response_code: code as i32,
        scheme_rewrite_specifier: redirect
            .scheme
            .as_ref()
            .map(|scheme| SchemeRewriteSpecifier::SchemeRedirect(scheme.to_string())),
        path_rewrite_specifier: path,
        ..rds::RedirectAction::default()
    }
}

/// Has Envoy rewrite what goes to a backend. `condition` is the one that the route is for.
pub(super) fn rewrite(action: &mut rds::RouteAction, rewrite: &Rewrite, condition: &Match) {
    let host = rewrite
        .hostname
        .as_ref()
        .map(|host| rds::route_action::HostRewriteSpecifier::HostRewriteLiteral(host.to_string()));
    action.host_rewrite_specifier = host;
    action.regex_rewrite = rewrite.path.as_ref().map(|path| substitute(path, condition));
}

/// How Envoy makes one path of another.
fn substitute(path: &PathEdit, condition: &Match) -> RegexMatchAndSubstitute {
    let prefix = match &condition.path {
        Some(PathMatch::Prefix(prefix)) => prefix.trim_end_matches('/'),
        _ => "",
    };
    let (pattern, by) = match path {
        PathEdit::ReplaceFullPath(path) => ("^/.*$".to_string(), &**path),
        PathEdit::ReplacePrefixMatch(by) => match by.trim_end_matches('/') {
            // What is left begins with the slash that follows, or is nothing but a slash.
            "" => (format!("^{}/?", regex::escape(prefix)), "/"),
            by => (format!("^{}", regex::escape(prefix)), by),
        },
    };
    RegexMatchAndSubstitute {
        pattern: Some(RegexMatcher { regex: pattern, ..RegexMatcher::default() }),
        substitution: by.replace('\\', r"\\"),
    }
}
