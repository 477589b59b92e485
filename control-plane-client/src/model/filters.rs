//! What a rule does to requests and answers beside forwarding them: the Gateway API's filters.

use std::sync::Arc;

use http::{HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use super::Unusable;

/// The filters of a rule.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Filters {
    /// `RequestHeaderModifier` and `ResponseHeaderModifier`.
    #[serde(skip_serializing_if = "HeaderEdits::is_none")]
    pub headers: HeaderEdits,
    /// `RequestRedirect`: the answer is where to go instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirect: Option<Redirect>,
    /// `URLRewrite`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewrite: Option<Rewrite>,
}

/// Edits of headers, of a rule or of one of its backends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HeaderEdits {
    /// Of the request, before it is sent.
    #[serde(skip_serializing_if = "HeaderEdit::is_none")]
    pub request: HeaderEdit,
    /// Of an endpoint's answer.
    #[serde(skip_serializing_if = "HeaderEdit::is_none")]
    pub response: HeaderEdit,
}

/// Names are lower case, and each stands in one of the three lists, once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HeaderEdit {
    /// In place of whatever was there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(Arc<str>, Arc<str>)>,
    /// Beside what was there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<(Arc<str>, Arc<str>)>,
    /// Taken away.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<Arc<str>>,
}

/// What is not said stays as it is in the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Redirect {
    /// `http` or `https`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<Arc<str>>,
    /// A host without a port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// The path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathEdit>,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// 301, 302, 303, 307 or 308.
    pub status_code: u16,
}

/// What is not said stays as it is in the request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Rewrite {
    /// In place of the Host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// In place of the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathEdit>,
}

/// How a path changes. Its query stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PathEdit {
    /// All of it.
    ReplaceFullPath(Arc<str>),
    /// The prefix that the rule matched.
    ReplacePrefixMatch(Arc<str>),
}

/// The statuses that send someone elsewhere.
pub const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];
/// Entries of each list, the Gateway API's limit.
const MOST_EDITS: usize = 16;

impl Filters {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.headers.check()?;
        if self.redirect.is_some() && self.rewrite.is_some() {
            return Err(Unusable::new("filters", "a redirected request is not forwarded: there is nothing to rewrite"));
        }
        if let Some(redirect) = &self.redirect {
            redirect.check()?;
        }
        if let Some(Rewrite { hostname, path }) = &self.rewrite {
            check_host("urlRewrite.hostname", hostname.as_deref())?;
            check_path("urlRewrite.path", path.as_ref())?;
        }
        Ok(())
    }

    /// The prefix's replacement, where there is one.
    pub fn replaces_prefix(&self) -> bool {
        let paths = [self.redirect.as_ref().map(|r| &r.path), self.rewrite.as_ref().map(|r| &r.path)];
        paths.into_iter().flatten().any(|path| matches!(path, Some(PathEdit::ReplacePrefixMatch(_))))
    }

    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl Redirect {
    fn check(&self) -> Result<(), Unusable> {
        if !REDIRECTS.contains(&self.status_code) {
            let reason = format!("{} sends nobody elsewhere: write 301, 302, 303, 307 or 308", self.status_code);
            return Err(Unusable::new("requestRedirect.statusCode", reason));
        }
        if self.scheme.as_deref().is_some_and(|scheme| !["http", "https"].contains(&scheme)) {
            return Err(Unusable::new("requestRedirect.scheme", "write http or https"));
        }
        if self.port == Some(0) {
            return Err(Unusable::new("requestRedirect.port", "ports go from 1 to 65535"));
        }
        check_host("requestRedirect.hostname", self.hostname.as_deref())?;
        check_path("requestRedirect.path", self.path.as_ref())
    }
}

impl HeaderEdits {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.request.check("requestHeaderModifier")?;
        self.response.check("responseHeaderModifier")
    }

    /// Whether nothing changes.
    pub fn is_none(&self) -> bool {
        self.request.is_none() && self.response.is_none()
    }
}

impl HeaderEdit {
    /// Whether nothing changes.
    pub fn is_none(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    fn check(&self, of: &str) -> Result<(), Unusable> {
        let lists = [("set", self.set.len()), ("add", self.add.len()), ("remove", self.remove.len())];
        if let Some((list, count)) = lists.into_iter().find(|(_, count)| *count > MOST_EDITS) {
            return Err(Unusable::new(format!("{of}.{list}"), format!("{count} headers, the Gateway API allows 16")));
        }
        for (name, value) in self.set.iter().chain(&self.add) {
            if HeaderValue::from_str(value).is_err() {
                return Err(Unusable::new(of, format!("the value of `{name}` cannot stand in a header")));
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        for name in self.set.iter().chain(&self.add).map(|(name, _)| name).chain(&self.remove) {
            check_name(name).map_err(|reason| Unusable::new(of, reason))?;
            if !seen.insert(name) {
                return Err(Unusable::new(of, format!("`{name}` is there twice: once is enough")));
            }
        }
        Ok(())
    }
}

/// Headers of one hop, those that frame or route a message, and those by which proxies speak to each other are nobody's
/// to edit: two hops would disagree about the message.
fn check_name(name: &str) -> Result<(), String> {
    const NOT_EDITED: [&str; 14] = [
        "connection",
        "content-length",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "proxy-status",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "grpc-status",
    ];
    match name {
        "host" => Err("`host` is not edited as a header: write a filter URLRewrite with `hostname`".to_string()),
        name if NOT_EDITED.contains(&name) || name.starts_with("sheetbend-") => {
            Err(format!("`{name}` is of the connection, not of the message: it is not edited"))
        }
        name if HeaderName::from_lowercase(name.as_bytes()).is_err() || name.len() > 256 => {
            Err(format!("`{name}` is not a header's name"))
        }
        _ => Ok(()),
    }
}

fn check_host(field: &str, host: Option<&str>) -> Result<(), Unusable> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
    match host {
        Some(host) if host.is_empty() || host.len() > 253 || !host.bytes().all(good) || host.starts_with('.') => {
            Err(Unusable::new(field, format!("`{host}` is not a host: write a name in lower case, without a port")))
        }
        _ => Ok(()),
    }
}

fn check_path(field: &str, path: Option<&PathEdit>) -> Result<(), Unusable> {
    let (PathEdit::ReplaceFullPath(text) | PathEdit::ReplacePrefixMatch(text)) = match path {
        Some(path) => path,
        None => return Ok(()),
    };
    let may_be_empty = matches!(path, Some(PathEdit::ReplacePrefixMatch(_)));
    let absolute = text.starts_with('/') || (may_be_empty && text.is_empty());
    let good = |b: u8| b.is_ascii_graphic() && !matches!(b, b'?' | b'#');
    match absolute && text.len() <= 1_024 && text.bytes().all(good) {
        true => Ok(()),
        false => Err(Unusable::new(field, format!("`{text}` is not a path: it begins with / and has no query"))),
    }
}
