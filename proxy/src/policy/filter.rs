//! PURE: what a rule's filters make of a request and of its answer. Made ready once; a request pays for what it uses.

use http::header::HeaderMap;
use http::uri::{Authority, PathAndQuery, Uri};
use http::{HeaderName, HeaderValue, StatusCode, request};
use sheetbend_control_plane_client::model::{self, Filters, HeaderEdits, PathEdit};

/// A rule's filters, made ready.
#[derive(Debug, Default)]
pub struct RuleFilters {
    request: HeaderEdit,
    response: HeaderEdit,
    redirect: Option<model::Redirect>,
    path: Option<PathEdit>,
    host: Option<Authority>,
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Filtered {
    /// It goes on, changed.
    Continue,
    /// This is the answer: a status and a Location.
    Answer(StatusCode, HeaderValue),
}

/// Edits of headers, made ready.
#[derive(Debug, Default)]
pub(crate) struct HeaderEdit {
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
}

/// Edits for what goes to one backend.
#[derive(Debug, Default)]
pub struct BackendEdits {
    pub(crate) request: HeaderEdit,
    pub(crate) response: HeaderEdit,
}

impl BackendEdits {
    /// Nothing, where there is nothing to edit.
    pub fn new(edits: &HeaderEdits) -> Option<Self> {
        let made = || Self { request: HeaderEdit::new(&edits.request), response: HeaderEdit::new(&edits.response) };
        (!edits.is_none()).then(made)
    }
}

impl RuleFilters {
    /// Nothing, where there is nothing to do.
    pub fn new(filters: &Filters) -> Option<Self> {
        if *filters == Filters::default() {
            return None;
        }
        let host = filters.rewrite.as_ref().and_then(|rewrite| rewrite.hostname.as_ref());
        Some(Self {
            request: HeaderEdit::new(&filters.headers.request),
            response: HeaderEdit::new(&filters.headers.response),
            redirect: filters.redirect.clone(),
            path: filters.rewrite.as_ref().and_then(|rewrite| rewrite.path.clone()),
            host: host.and_then(|host| host.parse().ok()),
        })
    }

    /// Does to a request what the rule says. `prefix` is how much of its path the rule matched; `authority` is the one
    /// that the next hop is told.
    pub fn apply(&self, head: &mut request::Parts, authority: &mut Authority, prefix: usize) -> Filtered {
        if let Some(redirect) = &self.redirect {
            // A Location that no header can hold comes of no request that a server takes.
            return match location(redirect, &head.uri, authority, prefix) {
                Some((status, location)) => Filtered::Answer(status, location),
                None => Filtered::Continue,
            };
        }
        if let Some(path) = self.path.as_ref().and_then(|edit| with_path(&head.uri, edit, prefix)) {
            head.uri = path;
        }
        if let Some(host) = &self.host {
            *authority = host.clone();
        }
        self.request.apply(&mut head.headers);
        Filtered::Continue
    }

    /// Does to the answer what the rule says.
    pub fn answer(&self, headers: &mut HeaderMap) {
        self.response.apply(headers);
    }
}

impl HeaderEdit {
    fn new(edit: &model::HeaderEdit) -> Self {
        let pair = |(name, value): &(std::sync::Arc<str>, std::sync::Arc<str>)| {
            Some((name.parse().ok()?, HeaderValue::from_str(value).ok()?))
        };
        // What is no header was refused before it came here.
        Self {
            set: edit.set.iter().filter_map(pair).collect(),
            add: edit.add.iter().filter_map(pair).collect(),
            remove: edit.remove.iter().filter_map(|name| name.parse().ok()).collect(),
        }
    }

    pub(crate) fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name.clone(), value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

/// HTTPRequestRedirectFilter. What reaches a proxy is plain HTTP: its callers are on this side of mutual TLS.
fn location(
    redirect: &model::Redirect,
    uri: &Uri,
    authority: &Authority,
    prefix: usize,
) -> Option<(StatusCode, HeaderValue)> {
    let scheme = redirect.scheme.as_deref().unwrap_or("http");
    let host = redirect.hostname.as_deref().unwrap_or(authority.host());
    // "If no port is specified … If redirect scheme is not-empty, the redirect port MUST be the well-known port associated
    // with the redirect scheme. … If redirect scheme is empty", the port that was asked.
    let port = redirect.port.or(if redirect.scheme.is_some() { None } else { authority.port_u16() });
    let well_known = if scheme == "https" { 443 } else { 80 };
    let port = port.filter(|port| *port != well_known).map(|port| format!(":{port}")).unwrap_or_default();
    let path = match &redirect.path {
        // The server as a whole has no path.
        _ if uri.path() == "*" => String::new(),
        Some(edit) => edited(uri.path(), edit, prefix),
        None => uri.path().to_string(),
    };
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let location = HeaderValue::try_from(format!("{scheme}://{host}{port}{path}{query}")).ok()?;
    Some((StatusCode::from_u16(redirect.status_code).ok()?, location))
}

/// The same target with another path; nothing of `OPTIONS *`, which has none (RFC 9110 §9.3.7).
fn with_path(uri: &Uri, edit: &PathEdit, prefix: usize) -> Option<Uri> {
    if uri.path() == "*" {
        return None;
    }
    let mut target = edited(uri.path(), edit, prefix);
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(target).ok()?);
    Uri::from_parts(parts).ok()
}

/// HTTPPathModifier, with its table of prefixes and slashes.
fn edited(path: &str, edit: &PathEdit, prefix: usize) -> String {
    match edit {
        PathEdit::ReplaceFullPath(new) => new.to_string(),
        PathEdit::ReplacePrefixMatch(new) => {
            let rest = path.get(prefix..).unwrap_or_default();
            match (new.trim_end_matches('/'), rest) {
                ("", "") => "/".to_string(),
                (new, rest) => format!("{new}{rest}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http::Request;
    use sheetbend_control_plane_client::model::{Redirect, Rewrite};

    use super::*;

    fn head(uri: &str) -> request::Parts {
        Request::get(uri).header("x-old", "1").header("x-keep", "1").body(()).unwrap().into_parts().0
    }

    fn prefix(new: &str) -> Option<PathEdit> {
        Some(PathEdit::ReplacePrefixMatch(new.into()))
    }

    fn full(new: &str) -> Option<PathEdit> {
        Some(PathEdit::ReplaceFullPath(new.into()))
    }

    #[test]
    fn a_prefix_is_replaced_as_the_table_of_the_specification_says() {
        for (path, matched, new, wanted) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/foo", "", "/xyz", "/xyz/foo"),
        ] {
            let rewrite = Rewrite { path: prefix(new), hostname: None };
            let filters = RuleFilters::new(&Filters { rewrite: Some(rewrite), ..Filters::default() }).unwrap();
            let mut head = head(&format!("http://web{path}?a=b"));
            let mut authority = "web:80".parse().unwrap();
            assert_eq!(filters.apply(&mut head, &mut authority, matched.len()), Filtered::Continue);
            assert_eq!(head.uri.to_string(), format!("http://web{wanted}?a=b"), "{path} {matched} {new}");
            assert_eq!(authority, "web:80");
        }
    }

    #[test]
    fn a_rewrite_changes_host_and_path_and_keeps_the_query() {
        let rewrite = Rewrite { path: full("/new"), hostname: Some("other.example".into()) };
        let filters = RuleFilters::new(&Filters { rewrite: Some(rewrite), ..Filters::default() }).unwrap();
        let (mut head, mut authority) = (head("/old?a=b"), "web:80".parse().unwrap());
        assert_eq!(filters.apply(&mut head, &mut authority, 0), Filtered::Continue);
        assert_eq!((head.uri.to_string(), authority.as_str()), ("/new?a=b".to_string(), "other.example"));
    }

    #[test]
    fn a_redirect_says_where_to_go_instead_and_leaves_out_a_port_that_everybody_knows() {
        let none = Redirect { scheme: None, hostname: None, path: None, port: None, status_code: 302 };
        let https = || Redirect { scheme: Some("https".into()), ..none.clone() };
        for (redirect, authority, wanted) in [
            (none.clone(), "web:8080", "http://web:8080/shop/a?b=c"),
            (none.clone(), "web:80", "http://web/shop/a?b=c"),
            (none.clone(), "[fd00::1]:81", "http://[fd00::1]:81/shop/a?b=c"),
            (https(), "web:8080", "https://web/shop/a?b=c"),
            (Redirect { port: Some(443), ..https() }, "web:8080", "https://web/shop/a?b=c"),
            (Redirect { port: Some(444), ..https() }, "web", "https://web:444/shop/a?b=c"),
            (
                Redirect { hostname: Some("a.example".into()), ..none.clone() },
                "web:81",
                "http://a.example:81/shop/a?b=c",
            ),
            (Redirect { path: prefix("/market"), ..none.clone() }, "web", "http://web/market/a?b=c"),
            (Redirect { path: full("/gone"), ..none.clone() }, "web", "http://web/gone?b=c"),
        ] {
            for status_code in model::REDIRECTS {
                let redirect = Redirect { status_code, ..redirect.clone() };
                let filters =
                    RuleFilters::new(&Filters { redirect: Some(redirect.clone()), ..Filters::default() }).unwrap();
                let mut asked = authority.parse().unwrap();
                let filtered = filters.apply(&mut head("/shop/a?b=c"), &mut asked, "/shop".len());
                let status = StatusCode::from_u16(status_code).unwrap();
                assert_eq!(filtered, Filtered::Answer(status, wanted.parse().unwrap()), "{redirect:?} {authority}");
            }
        }
    }

    #[test]
    fn what_asks_of_the_server_as_a_whole_has_no_path_to_edit() {
        let mut authority = Authority::from_static("web");
        for path in [prefix("/xyz"), full("/xyz")] {
            let filters =
                Filters { rewrite: Some(Rewrite { path: path.clone(), hostname: None }), ..Filters::default() };
            let mut head = head("*");
            let rewritten = RuleFilters::new(&filters).unwrap().apply(&mut head, &mut authority, 0);
            assert_eq!((rewritten, head.uri.path()), (Filtered::Continue, "*"));
            let redirect =
                Redirect { path, hostname: Some("a.example".into()), scheme: None, port: None, status_code: 302 };
            let filters = Filters { redirect: Some(redirect), ..Filters::default() };
            let answered = RuleFilters::new(&filters).unwrap().apply(&mut head, &mut authority, 0);
            let location = HeaderValue::from_static("http://a.example");
            assert_eq!(answered, Filtered::Answer(StatusCode::FOUND, location));
        }
    }

    #[test]
    fn headers_are_set_added_and_removed() {
        let pair = |name: &str, value: &str| (name.into(), value.into());
        let edit = model::HeaderEdit {
            set: vec![pair("x-new", "2"), pair("x-keep", "2")],
            add: vec![pair("x-keep-2", "3")],
            remove: vec!["x-old".into()],
        };
        let headers = HeaderEdits { request: edit.clone(), response: edit };
        let filters = RuleFilters::new(&Filters { headers, ..Filters::default() }).unwrap();
        let mut head = head("/");
        head.headers.append("x-keep-2", HeaderValue::from_static("1"));
        let mut response = head.headers.clone();
        filters.apply(&mut head, &mut "web".parse().unwrap(), 0);
        filters.answer(&mut response);
        for found in [&head.headers, &response] {
            let all: Vec<(&str, &str)> = found.iter().map(|(n, v)| (n.as_str(), v.to_str().unwrap())).collect();
            assert_eq!(all.len(), 4, "{all:?}");
            for wanted in [("x-new", "2"), ("x-keep", "2"), ("x-keep-2", "1"), ("x-keep-2", "3")] {
                assert!(all.contains(&wanted), "{all:?} {wanted:?}");
            }
        }
    }

    #[test]
    fn a_rule_without_filters_has_none_to_apply() {
        assert!(RuleFilters::new(&Filters::default()).is_none());
        assert!(BackendEdits::new(&HeaderEdits::default()).is_none());
    }
}
