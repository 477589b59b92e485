//! Filters as they are written, made into what a proxy does.

use std::sync::Arc;

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model::{Filters, HeaderEdit, HeaderEdits, PathEdit, Redirect, Rewrite, Unusable};

use crate::resources::kinds::{self, Filter, NamedValue, PathModifier};
use crate::resources::parse::{Checked, mistake};

/// The filters of a rule. `forwards` is where its first backend stands, if it has one.
pub(super) fn of_rule(raw: &[Filter], matches: &[kinds::HttpMatch], forwards: Option<Location>) -> Checked<Filters> {
    let filters = read(raw, &HTTP)?;
    let Some(last) = raw.last().map(|filter| filter.r#type.referenced) else { return Ok(filters) };
    let place = |kind: &str| raw.iter().find(|f| f.r#type.value == kind).map_or(last, |f| f.r#type.referenced);
    if let Some(at) = forwards.filter(|_| filters.redirect.is_some()) {
        return mistake(at, "a redirected request is not forwarded", "take the backendRefs or the RequestRedirect out");
    }
    if filters.redirect.is_some() && filters.rewrite.is_some() {
        let hint = "write the other path and host into the RequestRedirect";
        return mistake(place("URLRewrite"), "RequestRedirect and URLRewrite cannot both be obeyed", hint);
    }
    // HTTPPathModifier: "ReplacePrefixMatch is only compatible with a PathPrefix HTTPRouteMatch".
    let is_prefix = |path: &kinds::Path| path.r#type.as_ref().is_none_or(|kind| kind.value == "PathPrefix");
    let one_prefix = matches!(matches, [only] if only.path.as_ref().is_some_and(is_prefix));
    if filters.replaces_prefix() && !one_prefix {
        let hint = "write one match with a path of type PathPrefix, in a rule of its own";
        return mistake(last, "ReplacePrefixMatch, and no single prefix that the rule matches", hint);
    }
    filters.check().or_else(|error| refused(&error, last))?;
    Ok(filters)
}

/// The filters of a GRPCRoute's rule, or of a backend: edits of headers alone.
pub(super) fn edits(raw: &[Filter]) -> Checked<HeaderEdits> {
    read(raw, &HTTP[..2]).map(|filters| filters.headers)
}

const HTTP: [&str; 4] = ["RequestHeaderModifier", "ResponseHeaderModifier", "RequestRedirect", "URLRewrite"];

fn read(raw: &[Filter], known: &[&'static str]) -> Checked<Filters> {
    let mut filters = Filters::default();
    let mut seen: Vec<&str> = Vec::new();
    for filter in raw {
        let Spanned { value: kind, referenced: at, .. } = &filter.r#type;
        if !known.contains(&kind.as_str()) {
            let hint = match known.len() {
                2 => "here may be RequestHeaderModifier and ResponseHeaderModifier",
                _ => "here may be RequestHeaderModifier, ResponseHeaderModifier, RequestRedirect and URLRewrite",
            };
            return mistake(*at, format!("a filter of type `{kind}` is not obeyed here"), hint);
        }
        if seen.contains(&kind.as_str()) {
            return mistake(*at, format!("two filters of type {kind}"), "write what both say into one");
        }
        seen.push(kind);
        // Checked by itself, so that a mistake is where it stands.
        let found = one(filter)?;
        found.check().or_else(|error| refused(&error, *at))?;
        let (request, response) = (&found.headers.request, &found.headers.response);
        filters.headers.request = if request.is_none() { filters.headers.request } else { request.clone() };
        filters.headers.response = if response.is_none() { filters.headers.response } else { response.clone() };
        filters.redirect = found.redirect.or(filters.redirect);
        filters.rewrite = found.rewrite.or(filters.rewrite);
    }
    Ok(filters)
}

fn one(raw: &Filter) -> Checked<Filters> {
    let mut filters = Filters::default();
    let Spanned { value: kind, referenced: at, .. } = &raw.r#type;
    let found = (&raw.request_header_modifier, &raw.response_header_modifier, &raw.request_redirect, &raw.url_rewrite);
    match (kind.as_str(), found) {
        ("RequestHeaderModifier", (Some(edit), None, None, None)) => filters.headers.request = header_edit(edit)?,
        ("ResponseHeaderModifier", (None, Some(edit), None, None)) => filters.headers.response = header_edit(edit)?,
        ("RequestRedirect", (None, None, Some(redirect), None)) => {
            filters.redirect = Some(Redirect {
                scheme: text(&redirect.scheme),
                hostname: text(&redirect.hostname),
                path: redirect.path.as_ref().map(path).transpose()?,
                port: redirect.port,
                status_code: redirect.status_code.unwrap_or(302),
            });
        }
        ("URLRewrite", (None, None, None, Some(rewrite))) => {
            let path = rewrite.path.as_ref().map(path).transpose()?;
            filters.rewrite = Some(Rewrite { hostname: text(&rewrite.hostname), path });
        }
        (kind, _) => {
            let hint = "a filter has its type, and the one field that belongs to it";
            return mistake(*at, format!("this filter of type {kind} has not its own field, or another one's"), hint);
        }
    }
    Ok(filters)
}

fn header_edit(raw: &kinds::HeaderModifier) -> Checked<HeaderEdit> {
    let mut edit = HeaderEdit::default();
    let lower = |name: &Spanned<String>| Arc::<str>::from(name.value.to_ascii_lowercase());
    let pair = |one: &NamedValue| (lower(&one.name), Arc::from(one.value.value.as_str()));
    for (list, to) in [(&raw.set, &mut edit.set), (&raw.add, &mut edit.add)] {
        for one in list {
            to.push(pair(one));
            check(&HeaderEdit { set: vec![pair(one)], ..HeaderEdit::default() }, one.name.referenced)?;
        }
    }
    for name in &raw.remove {
        edit.remove.push(lower(name));
        check(&HeaderEdit { remove: vec![lower(name)], ..HeaderEdit::default() }, name.referenced)?;
    }
    Ok(edit)
}

fn check(edit: &HeaderEdit, at: Location) -> Checked<()> {
    let edits = HeaderEdits { request: edit.clone(), ..HeaderEdits::default() };
    edits.check().or_else(|error| mistake(at, error.reason, None))
}

fn path(raw: &PathModifier) -> Checked<PathEdit> {
    let Spanned { value: kind, referenced: at, .. } = &raw.r#type;
    match (kind.as_str(), &raw.replace_full_path, &raw.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), None) => Ok(PathEdit::ReplaceFullPath(path.value.as_str().into())),
        ("ReplacePrefixMatch", None, Some(prefix)) => Ok(PathEdit::ReplacePrefixMatch(prefix.value.as_str().into())),
        ("ReplaceFullPath" | "ReplacePrefixMatch", ..) => {
            let hint = "write replaceFullPath or replacePrefixMatch, as the type says";
            mistake(*at, format!("a path of type {kind} has not its own field, or another one's"), hint)
        }
        (other, ..) => {
            mistake(*at, format!("`{other}` is no type of path"), "write ReplaceFullPath or ReplacePrefixMatch")
        }
    }
}

fn text(text: &Option<String>) -> Option<Arc<str>> {
    text.as_deref().map(Arc::from)
}

fn refused<T>(error: &Unusable, at: Location) -> Checked<T> {
    mistake(at, error.to_string(), None)
}
