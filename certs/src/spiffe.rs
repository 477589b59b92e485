//! SPIFFE ids, parsed strictly: what is not an id cannot become one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

const SCHEME: &str = "spiffe://";
/// SPIFFE-ID §2.3: an id is at most 2048 bytes, a trust domain at most 255.
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;

/// The realm of one CA, such as `cluster.local` (SPIFFE-ID §2.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        check_trust_domain(text).map_err(|why| SpiffeIdError::TrustDomain { text: clip(text), why })?;
        Ok(Self(text.into()))
    }
}

/// A workload's name: `spiffe://TRUST-DOMAIN/PATH`.
///
/// Workloads of a mesh have the path `/ns/NAMESPACE/sa/SERVICE-ACCOUNT`; [`SpiffeId::workload`] reads it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    text: Arc<str>,
    /// Where the trust domain ends and the path begins, in bytes of `text`.
    path_at: u16,
}

impl SpiffeId {
    /// The id of a service account in a namespace. Beside a local process the service's name stands for the account.
    pub fn for_workload(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        for (what, segment) in [("namespace", namespace), ("service", service_account)] {
            check_segment(segment).map_err(|why| SpiffeIdError::Segment { what, text: clip(segment), why })?;
        }
        format!("{SCHEME}{}/ns/{namespace}/sa/{service_account}", trust_domain.0).parse()
    }

    /// The realm that the id belongs to.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.text[SCHEME.len()..usize::from(self.path_at)].into())
    }

    /// What follows the trust domain: empty, or `/` and segments.
    pub fn path(&self) -> &str {
        &self.text[usize::from(self.path_at)..]
    }

    /// Namespace and service account, if the path has a workload's form.
    pub fn workload(&self) -> Option<(&str, &str)> {
        let (namespace, service_account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !service_account.contains('/')).then_some((namespace, service_account))
    }

    /// The whole id as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let refuse = |why| SpiffeIdError::Id { text: clip(text), why };
        if text.len() > MAX_ID {
            return Err(refuse("it is longer than 2048 bytes"));
        }
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Err(refuse("it does not begin with spiffe://"));
        };
        let (trust_domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        check_trust_domain(trust_domain).map_err(refuse)?;
        if let Some(segments) = path.strip_prefix('/') {
            segments.split('/').try_for_each(check_segment).map_err(refuse)?;
        }
        let path_at = u16::try_from(text.len() - path.len()).map_err(|_| refuse("it is too long"))?;
        Ok(Self { text: text.into(), path_at })
    }
}

fn check_trust_domain(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("the trust domain is empty");
    }
    if text.len() > MAX_TRUST_DOMAIN {
        return Err("the trust domain is longer than 255 bytes");
    }
    if !text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_')) {
        return Err("a trust domain has lower-case letters, digits, `.`, `-` and `_` only");
    }
    Ok(())
}

fn check_segment(segment: &str) -> Result<(), &'static str> {
    match segment {
        "" => Err("a part of the path is empty"),
        "." | ".." => Err("a part of the path is `.` or `..`"),
        _ if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) => {
            Err("letters, digits, `.`, `-` and `_` are all that a part of the path may have")
        }
        _ => Ok(()),
    }
}

/// At most 80 characters of what was refused, fit for a log line.
fn clip(text: &str) -> String {
    let mut clipped: String = text.chars().take(80).flat_map(char::escape_debug).collect();
    if text.chars().nth(80).is_some() {
        clipped.push('…');
    }
    clipped
}

/// Why a text is not a SPIFFE id, a trust domain, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Not an id.
    #[error("`{text}` is not a SPIFFE id: {why}; write spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE")]
    Id {
        /// What was read, clipped.
        text: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Not a trust domain.
    #[error("`{text}` is not a trust domain: {why}; write one like cluster.local")]
    TrustDomain {
        /// What was read, clipped.
        text: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// Not a namespace, or not a service account.
    #[error("`{text}` is not the name of a {what}: {why}")]
    Segment {
        /// `namespace` or `service`.
        what: &'static str,
        /// What was read, clipped.
        text: String,
        /// The rule it breaks.
        why: &'static str,
    },
}

macro_rules! text_forms {
    ($name:ident, $field:tt) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$field)
            }
        }

        impl TryFrom<String> for $name {
            type Error = SpiffeIdError;

            fn try_from(text: String) -> Result<Self, SpiffeIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.$field.to_string()
            }
        }
    };
}

text_forms!(TrustDomain, 0);
text_forms!(SpiffeId, text);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_workload_is_read_back_from_its_id() {
        let id = SpiffeId::for_workload(&TrustDomain::default(), "default", "web").unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        assert_eq!(id.workload(), Some(("default", "web")));
        assert_eq!(id.trust_domain(), TrustDomain::default());
    }

    #[test]
    fn what_the_spiffe_id_specification_forbids_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "SPIFFE://td/a",
            "https://td/a",
            "spiffe://TD/a",
            "spiffe://td/",
            "spiffe://td/a/",
            "spiffe://td//a",
            "spiffe://td/./a",
            "spiffe://td/../a",
            "spiffe://td/a?q",
            "spiffe://td/a#f",
            "spiffe://td/a%20b",
            "spiffe://user@td/a",
            "spiffe://td:80/a",
            "spiffe://td/ä",
            "spiffe://td/a b",
            "spiffe://td/a\0",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?} was accepted");
        }
        assert!(format!("spiffe://{}/a", "d".repeat(256)).parse::<SpiffeId>().is_err());
        assert!(format!("spiffe://td/{}", "a".repeat(2048 - 12)).parse::<SpiffeId>().is_ok());
        assert!(format!("spiffe://td/{}", "a".repeat(2049 - 12)).parse::<SpiffeId>().is_err());
    }

    #[test]
    fn only_a_path_of_namespace_and_account_is_a_workload() {
        for other in ["spiffe://td", "spiffe://td/a", "spiffe://td/ns/a/sa/b/c", "spiffe://td/ns/a/b/sa/c"] {
            assert_eq!(other.parse::<SpiffeId>().unwrap().workload(), None, "{other}");
        }
    }

    #[test]
    fn a_service_name_cannot_smuggle_a_path() {
        for bad in ["", "a/b", "..", "a b", "a/sa/b"] {
            assert!(SpiffeId::for_workload(&TrustDomain::default(), "default", bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_it_accepts_it_writes_unchanged(text in "\\PC*|spiffe://[a-z.]{1,9}(/[a-zA-Z.]{0,4}){0,5}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
                prop_assert_eq!(format!("{SCHEME}{}{}", id.trust_domain(), id.path()), id.as_str());
            }
        }

        #[test]
        fn every_workload_round_trips(ns in "[a-z0-9-]{1,20}", sa in "[a-z0-9][a-z0-9.-]{0,20}") {
            let id = SpiffeId::for_workload(&TrustDomain::default(), &ns, &sa).unwrap();
            prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id.clone());
            prop_assert_eq!(id.workload(), Some((ns.as_str(), sa.as_str())));
        }
    }
}
