//! PURE: who may call. Compiled once for each thing that the control plane says; a decision allocates nothing.
//!
//! Whom a caller is said to be comes from the mutual TLS of its connection, and from nowhere else.

use std::fmt;
use std::sync::Arc;

use sheetbend_certs::SpiffeId;
use sheetbend_control_plane_client::model::{Access, DefaultAccess};

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    /// By its certificate; `None` where the connection is plain.
    pub id: Option<&'a SpiffeId>,
}

/// Why a caller may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It is not on the proxy's own list, `--allow`.
    NotListed,
    /// No policy speaks of it, and the mesh's default is not to let it in.
    Default(DefaultAccess),
    /// This one says so: `default/web-readers#0`.
    By(Arc<str>),
}

/// In the words of Envoy's `response_code_details`, for the log. A caller never sees it.
impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotListed => f.write_str("rbac_access_denied: the caller is not one of --allow"),
            Self::Default(default) => write!(f, "rbac_access_denied: defaultInboundPolicy is {default:?}"),
            Self::By(policy) => write!(f, "rbac_access_denied_matched_policy[{policy}]"),
        }
    }
}

/// Every policy that is about the service beside this proxy.
#[derive(Debug, Default)]
pub struct Authz {
    default: DefaultAccess,
}

impl Authz {
    /// Made ready.
    pub fn new(access: &Access) -> Self {
        Self { default: access.default }
    }

    /// Whether a connection of which nothing is read may pass to the app.
    pub fn connection(&self, caller: &Caller<'_>) -> Result<(), Denied> {
        self.by_default(caller)
    }

    /// Whether a request may.
    pub fn request(&self, caller: &Caller<'_>) -> Result<(), Denied> {
        self.by_default(caller)
    }

    fn by_default(&self, caller: &Caller<'_>) -> Result<(), Denied> {
        match self.default {
            DefaultAccess::Allow => Ok(()),
            DefaultAccess::MeshOnly if caller.id.is_some() => Ok(()),
            DefaultAccess::MeshOnly | DefaultAccess::Deny => Err(Denied::Default(self.default)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_policy_the_default_decides() {
        let id = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        let decide = |default, id| Authz::new(&Access { default }).request(&Caller { id });
        assert_eq!(decide(DefaultAccess::Allow, None), Ok(()));
        assert_eq!(decide(DefaultAccess::MeshOnly, Some(&id)), Ok(()));
        assert_eq!(decide(DefaultAccess::MeshOnly, None), Err(Denied::Default(DefaultAccess::MeshOnly)));
        assert_eq!(decide(DefaultAccess::Deny, Some(&id)), Err(Denied::Default(DefaultAccess::Deny)));
    }
}
