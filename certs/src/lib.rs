//! Identities and certificates of a mesh.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A SPIFFE id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId(Arc<str>);

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Not a SPIFFE id.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a SPIFFE id")]
pub struct SpiffeIdError(String);

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;
    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = SpiffeIdError;
    fn try_from(text: String) -> Result<Self, SpiffeIdError> {
        text.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> String {
        id.0.to_string()
    }
}
