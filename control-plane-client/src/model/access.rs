//! Who may call the service beside a proxy, in the words of Istio's AuthorizationPolicy.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::{TokenIssuer, Unusable};

/// What decides about those who call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Access {
    /// What holds for a caller of whom no policy speaks.
    #[serde(skip_serializing_if = "DefaultAccess::is_allow")]
    pub default: DefaultAccess,
    /// Every policy that is about the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Arc<AuthorizationPolicy>>,
    /// Whose tokens are believed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub issuers: Vec<TokenIssuer>,
}

/// `defaultInboundPolicy` of a MeshSettings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DefaultAccess {
    /// Everybody may call whom the proxy itself lets in: one that is strict wants mutual TLS of all.
    #[default]
    Allow,
    /// Whoever has an identity of the mesh may call.
    MeshOnly,
    /// Nobody may.
    Deny,
}

impl DefaultAccess {
    fn is_allow(&self) -> bool {
        *self == Self::Allow
    }
}

/// An AuthorizationPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct AuthorizationPolicy {
    /// `default/web-readers`, for logs.
    pub name: Arc<str>,
    /// What its rules do to those whom they match.
    pub action: Action,
    /// It is only said what would happen.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Any of these. None matches nobody.
    pub rules: Vec<AccessRule>,
}

/// What a rule does to those whom it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// They may call, and nobody else whom no other ALLOW policy matches.
    #[default]
    Allow,
    /// They may not, whatever else is allowed.
    Deny,
    /// Their calls are logged and counted.
    Audit,
}

/// One rule: any of `from`, any of `to`, all of `when`. What is empty holds for everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessRule {
    /// Who calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Source>,
    /// What is called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Operation>,
    /// What else must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<Condition>,
}

/// Who calls: all fields that are not empty must hold, each by one of its values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Source {
    /// `cluster.local/ns/default/sa/web`: the SPIFFE id without its scheme.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<Glob>,
    /// `ISSUER/SUBJECT` of a token that was verified.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub request_principals: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_request_principals: Vec<Glob>,
    /// Namespaces of identities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<Glob>,
    /// Trust domains of identities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trust_domains: Vec<Glob>,
    /// Addresses from which connections come.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip_blocks: Vec<IpNet>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_ip_blocks: Vec<IpNet>,
}

/// What is called: all fields that are not empty must hold, each by one of its values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Operation {
    /// Hosts without a port, in any case.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_hosts: Vec<Glob>,
    /// The app's ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_ports: Vec<u16>,
    /// Methods.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_methods: Vec<Glob>,
    /// Paths in normal form, without a query.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<Glob>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_paths: Vec<Glob>,
}

/// `when`: a value by its key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Condition {
    /// `request.headers[x-team]`.
    pub key: Arc<str>,
    /// One of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Arc<str>>,
    /// None of these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_values: Vec<Arc<str>>,
}

/// What a condition is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// `request.headers[NAME]`, in lower case.
    Header(Arc<str>),
    /// `request.auth.claims[A][B]`.
    Claim(Vec<Arc<str>>),
    /// `request.auth.principal`.
    RequestPrincipal,
    /// `request.auth.audiences`.
    Audiences,
    /// `source.ip`.
    SourceIp,
    /// `source.namespace`.
    SourceNamespace,
    /// `source.principal`.
    SourcePrincipal,
    /// `destination.port`.
    DestinationPort,
}

impl Condition {
    /// What it is about.
    pub fn key(&self) -> Result<Key, Unusable> {
        let of = |name: &str| self.key.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']');
        match &*self.key {
            "request.auth.principal" => Ok(Key::RequestPrincipal),
            "request.auth.audiences" => Ok(Key::Audiences),
            "source.ip" => Ok(Key::SourceIp),
            "source.namespace" => Ok(Key::SourceNamespace),
            "source.principal" => Ok(Key::SourcePrincipal),
            "destination.port" => Ok(Key::DestinationPort),
            _ => match (of("request.headers"), of("request.auth.claims")) {
                (Some(name), _) => header(name).map_err(|reason| Unusable::new("key", reason)),
                (_, Some(path)) if path.split("][").all(|part| !part.is_empty()) => {
                    Ok(Key::Claim(path.split("][").map(Arc::from).collect()))
                }
                _ => Err(Unusable::new(
                    "key",
                    format!(
                        "`{}` is not known: write request.headers[NAME], request.auth.claims[NAME], \
                         request.auth.principal, request.auth.audiences, source.ip, source.namespace, source.principal \
                         or destination.port",
                        self.key
                    ),
                )),
            },
        }
    }
}

fn header(name: &str) -> Result<Key, String> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    match name.to_ascii_lowercase() {
        // Over HTTP/2 there is none: who wrote this would be led astray.
        name if name == "host" => Err("a host is matched by to.operation.hosts".into()),
        name if !name.is_empty() && name.bytes().all(token) => Ok(Key::Header(name.into())),
        _ => Err(format!("`{name}` is not a header's name")),
    }
}

/// A text, or a part of one: `web`, `web-*`, `*.example.org`, or `*` for any text at all.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Glob {
    /// The whole text.
    Exact(Arc<str>),
    /// Its beginning.
    Prefix(Arc<str>),
    /// Its end.
    Suffix(Arc<str>),
    /// Any text that is not empty.
    Present,
}

/// Not a [`Glob`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GlobError {
    /// A `*` in the middle.
    #[error("a `*` stands at the beginning or at the end")]
    Middle,
    /// Nothing at all.
    #[error("an empty text matches nothing")]
    Empty,
}

impl Glob {
    /// Whether a text is one of these.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }

    /// The same, in any case of ASCII letters.
    pub fn matches_in_any_case(&self, text: &str) -> bool {
        let text = text.as_bytes();
        match self {
            Self::Exact(exact) => text.eq_ignore_ascii_case(exact.as_bytes()),
            Self::Prefix(prefix) => {
                text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix.as_bytes()))
            }
            Self::Suffix(suffix) => text
                .len()
                .checked_sub(suffix.len())
                .and_then(|at| text.get(at..))
                .is_some_and(|end| end.eq_ignore_ascii_case(suffix.as_bytes())),
            Self::Present => !text.is_empty(),
        }
    }

    /// What it says without its `*`.
    pub fn literal(&self) -> &str {
        match self {
            Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text) => text,
            Self::Present => "",
        }
    }

    /// Whether paths can be matched by it; they are held against it in normal form (RFC 3986 §6.2.2, slashes merged,
    /// and every escape undone that need not be one).
    pub fn check_path(&self) -> Result<(), &'static str> {
        let text = self.literal();
        let whole: Vec<&str> = text.split('/').collect();
        // A part that is cut off by the `*` may go on.
        let cut = match self {
            Self::Present => return Ok(()),
            Self::Exact(_) => &whole[..],
            Self::Prefix(_) => &whole[..whole.len() - 1],
            Self::Suffix(_) => &whole[1..],
        };
        match text {
            _ if !matches!(self, Self::Suffix(_)) && !text.starts_with('/') => Err("a path begins with /"),
            _ if cut.iter().any(|part| matches!(*part, "." | "..")) => Err("no path has a `.` or `..` in it by then"),
            _ if text.contains("//") => Err("slashes are merged before it is looked at: write one"),
            _ if text.contains(['?', '#']) => Err("a path is matched without its query"),
            _ if text.contains([';', '\\']) => Err("parameters (`;`) and backslashes are no part of what is matched"),
            _ if text.contains(['{', '}']) => Err("templates are not obeyed here: write a beginning with `*`"),
            _ if !is_normal(text) => Err("write it with no escapes but those that a path needs, in upper case: %20"),
            _ => Ok(()),
        }
    }

    /// Whether hosts can be matched by it.
    pub fn check_host(&self) -> Result<(), &'static str> {
        let text = self.literal();
        // An address of IPv6 stands in brackets, and may be cut off.
        let behind = if text.contains('[') { text.split_once(']').map_or("", |(_, rest)| rest) } else { text };
        match text {
            _ if behind.contains(':') => Err("a host has no port here: write it under `ports`"),
            _ if text.contains(['/', '@', ' ']) => Err("that is not a host"),
            _ if text.ends_with('.') && !matches!(self, Self::Prefix(_)) => {
                Err("a host is written without a dot at its end")
            }
            _ => Ok(()),
        }
    }
}

/// Whether a path's escapes are those of its normal form.
fn is_normal(text: &str) -> bool {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            if !is_plain(byte) && byte != b'/' {
                return false;
            }
            continue;
        }
        let upper = |b: u8| matches!(b, b'0'..=b'9' | b'A'..=b'F').then(|| (b as char).to_digit(16)).flatten();
        let (high, low) = (bytes.next().and_then(upper), bytes.next().and_then(upper));
        match (high, low) {
            (Some(high), Some(low)) if !is_plain((high * 16 + low) as u8) => {}
            _ => return false,
        }
    }
    true
}

/// What stands in a path as it is: `pchar` of RFC 3986 §3.3 but the percent sign.
pub fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte)
}

impl TryFrom<String> for Glob {
    type Error = GlobError;
    fn try_from(text: String) -> Result<Self, GlobError> {
        let (start, end) = (text.starts_with('*'), text.ends_with('*'));
        let literal = text.strip_prefix('*').unwrap_or(&text);
        let literal = if text.len() > 1 { literal.strip_suffix('*').unwrap_or(literal) } else { literal };
        match (start, end) {
            _ if text.is_empty() => Err(GlobError::Empty),
            _ if text == "*" => Ok(Self::Present),
            (true, true) => Err(GlobError::Middle),
            _ if literal.contains('*') => Err(GlobError::Middle),
            (true, false) => Ok(Self::Suffix(literal.into())),
            (false, true) => Ok(Self::Prefix(literal.into())),
            (false, false) => Ok(Self::Exact(literal.into())),
        }
    }
}

impl From<Glob> for String {
    fn from(glob: Glob) -> Self {
        glob.to_string()
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Present => f.write_str("*"),
        }
    }
}

impl Access {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        self.issuers.iter().try_for_each(TokenIssuer::check)?;
        self.policies.iter().try_for_each(|policy| policy.check())
    }
}

impl AuthorizationPolicy {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        for rule in &self.rules {
            for operation in &rule.to {
                let paths = operation.paths.iter().chain(&operation.not_paths);
                let hosts = operation.hosts.iter().chain(&operation.not_hosts);
                paths
                    .map(Glob::check_path)
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|why| Unusable::new("paths", why))?;
                hosts
                    .map(Glob::check_host)
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|why| Unusable::new("hosts", why))?;
            }
            rule.when.iter().try_for_each(Condition::check)?;
        }
        Ok(())
    }
}

impl Condition {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let key = self.key()?;
        if self.values.is_empty() && self.not_values.is_empty() {
            return Err(Unusable::new("values", "a condition has values or notValues"));
        }
        for value in self.values.iter().chain(&self.not_values) {
            let refuse = |why: String| Unusable::new("values", format!("`{value}`: {why}"));
            match key {
                Key::SourceIp => range(value).map(drop).ok_or_else(|| refuse("not a range of addresses".into()))?,
                Key::DestinationPort => value.parse::<u16>().map(drop).map_err(|_| refuse("not a port".into()))?,
                _ => Glob::try_from(value.to_string()).map(drop).map_err(|why| refuse(why.to_string()))?,
            }
        }
        Ok(())
    }
}

/// `10.0.0.0/8`, or one address. One of IPv4 addresses in the form of IPv6 ones (RFC 4291 §2.5.5.2) is one of IPv4:
/// callers are known by that.
pub fn range(text: &str) -> Option<IpNet> {
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?.trunc();
    let IpNet::V6(six) = net else { return Some(net) };
    let four = || Ipv4Net::new(six.addr().to_ipv4_mapped()?, six.prefix_len().checked_sub(96)?).ok();
    Some(four().map_or(net, IpNet::V4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(text: &str) -> Glob {
        Glob::try_from(text.to_string()).unwrap()
    }

    #[test]
    fn a_glob_is_a_text_its_beginning_its_end_or_any() {
        for (pattern, good, bad) in [
            ("web", "web", "web-1"),
            ("web-*", "web-1", "web"),
            ("*.example.org", "a.example.org", "example.org"),
            ("*", "anything", ""),
        ] {
            assert!(glob(pattern).matches(good) && !glob(pattern).matches(bad), "{pattern}");
            assert!(glob(pattern).matches_in_any_case(&good.to_uppercase()), "{pattern}");
            assert!(!glob(pattern).matches_in_any_case(bad), "{pattern}");
            assert_eq!(glob(pattern).to_string(), pattern);
        }
        for wrong in ["", "a*b", "*a*", "**", "a**"] {
            assert!(Glob::try_from(wrong.to_string()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_path_that_no_request_can_have_by_then_is_refused() {
        for good in ["/", "/a/b", "/a/*", "*/b", "*", "/caf%C3%A9", "/a%20b", "/.well-known/*", "/v1:do", "/..*"] {
            assert_eq!(glob(good).check_path(), Ok(()), "{good}");
        }
        for wrong in ["a", "/a//b", "/a/../b", "/a/./*", "/%61", "/%c3", "/a;b", "/a?b", "/a%2", "/é", "/{x}", "/a b"]
        {
            assert!(glob(wrong).check_path().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_range_of_mapped_addresses_is_one_of_ipv4() {
        for (text, expected) in [
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.0.0.1", "10.0.0.1/32"),
            ("::ffff:10.0.0.1", "10.0.0.1/32"),
            ("::ffff:10.0.0.1/104", "10.0.0.0/8"),
            ("::/0", "::/0"),
            ("2001:db8::1", "2001:db8::1/128"),
        ] {
            assert_eq!(range(text), expected.parse().ok(), "{text}");
        }
        assert_eq!(range("10.0.0.0/33"), None);
    }

    #[test]
    fn a_condition_says_what_it_is_about() {
        let key = |key: &str| Condition { key: key.into(), ..Condition::default() }.key();
        assert_eq!(key("request.headers[X-Team]"), Ok(Key::Header("x-team".into())));
        assert_eq!(key("request.auth.claims[a][b]"), Ok(Key::Claim(vec!["a".into(), "b".into()])));
        assert_eq!(key("source.ip"), Ok(Key::SourceIp));
        for wrong in ["request.headers[]", "request.headers[host]", "request.headers", "request.auth.claims[]", "x"] {
            assert!(key(wrong).is_err(), "{wrong}");
        }
    }
}
