//! What becomes of connections as a whole, whatever is said on them: the rules of TCPRoutes and TLSRoutes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{ClusterName, Unusable};

/// Backends of one rule; the Gateway API stops at 16.
const MOST_BACKENDS: usize = 64;

/// A rule of a `TCPRoute`, or of a `TLSRoute` for one of its hostnames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectionRule {
    /// `namespace/route#rule`, for logs.
    pub name: Arc<str>,
    /// Where it is written: `resources/web.yaml:12`. Empty where nobody said.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub place: Arc<str>,
    /// The server name of the TLS connections that it takes, lower case: `db.example`, or `*.example` for every name
    /// below it. None: it takes every connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// Weighted backends; the weights' sum fits in u32. None, or none with any weight: the connection is refused.
    pub backends: Vec<ConnectionBackend>,
}

/// A weighted choice, made once a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectionBackend {
    /// A key of [`super::Destination::clusters`].
    pub cluster: ClusterName,
    /// Its share among the rule's backends.
    pub weight: u32,
}

impl ConnectionRule {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let plain = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
        let sum: u64 = self.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if !plain(&self.name) || self.place.chars().any(char::is_control) {
            return Err(Unusable::new("name", "it is empty, or has control characters"));
        }
        if self.hostname.as_ref().is_some_and(|name| !is_hostname(name)) {
            return Err(Unusable::new("hostnames", "it is no name of a server"));
        }
        if self.backends.len() > MOST_BACKENDS || sum > u64::from(u32::MAX) {
            return Err(Unusable::new("backendRefs", "there are too many, or their weights are too large"));
        }
        match self.backends.iter().all(|backend| plain(&backend.cluster)) {
            true => Ok(()),
            false => Err(Unusable::new("backendRefs", "one of them has no name")),
        }
    }

    /// Whether it takes a connection whose ClientHello names this server; none where it names nobody, or is not TLS.
    ///
    /// A wildcard stands for one label or more, as in every hostname of the Gateway API.
    pub fn takes(&self, server_name: Option<&str>) -> bool {
        let Some(hostname) = &self.hostname else { return true };
        let Some(named) = server_name else { return false };
        match hostname.strip_prefix('*') {
            Some(below) => named.len() > below.len() && named.ends_with(below),
            None => named == &**hostname,
        }
    }
}

/// A name of RFC 1123 in lower case, perhaps with a wildcard as its first label; no address (RFC 6066 §3).
pub fn is_hostname(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && name.split('.').all(label) && super::Target::new(name, 1).is_ok_and(|t| t.address().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(hostname: Option<&str>) -> ConnectionRule {
        let hostname = hostname.map(Arc::from);
        ConnectionRule { name: "default/r#0".into(), place: "".into(), hostname, backends: vec![] }
    }

    #[test]
    fn a_wildcard_takes_every_name_below_it_and_nothing_else() {
        let below = rule(Some("*.db.example"));
        for taken in ["a.db.example", "b.a.db.example"] {
            assert!(below.takes(Some(taken)), "{taken}");
        }
        for other in ["db.example", ".db.example", "adb.example", "a.db.example.org", ""] {
            assert!(!below.takes(Some(other)), "{other}");
        }
        assert!(!below.takes(None));
    }

    #[test]
    fn without_a_hostname_every_connection_is_taken_and_with_one_that_one_alone() {
        assert!(rule(None).takes(None) && rule(None).takes(Some("db.example")));
        let exact = rule(Some("db.example"));
        assert!(exact.takes(Some("db.example")));
        assert!(!exact.takes(Some("a.db.example")) && !exact.takes(None));
    }

    #[test]
    fn what_is_no_name_of_a_server_is_refused() {
        for good in ["db.example", "*.db.example", "a-1.b", "xn--d1a.example", "db"] {
            assert!(rule(Some(good)).check().is_ok(), "{good}");
        }
        for bad in ["", "*", "*.", "a.*.b", "Db.example", "127.0.0.1", "a..b", "-a.b", "*a.b", "fd00::1", "a_b"] {
            assert!(rule(Some(bad)).check().is_err(), "{bad}");
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_refused() {
        let large = ConnectionBackend { cluster: "web.default:80".into(), weight: u32::MAX };
        let rule = ConnectionRule { backends: vec![large.clone(), large], ..rule(None) };
        assert!(rule.check().is_err());
    }
}
