//! Who may call the service beside a proxy.

use serde::{Deserialize, Serialize};

use super::Unusable;

/// What decides about those who call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Access {
    /// What holds for a caller of whom no policy speaks.
    #[serde(skip_serializing_if = "DefaultAccess::is_allow")]
    pub default: DefaultAccess,
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

impl Access {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        Ok(())
    }
}
