//! PURE: what a token says, once somebody has verified it.

use serde_json::{Map, Value};
use sheetbend_control_plane_client::model::Glob;
use std::sync::Arc;

/// The claims of a verified token.
#[derive(Clone, Debug)]
pub struct Claims {
    all: Map<String, Value>,
    /// `ISSUER/SUBJECT`.
    principal: Option<String>,
}

impl Claims {
    /// Claims that were verified.
    pub fn new(all: Map<String, Value>) -> Self {
        let text = |name: &str| all.get(name).and_then(Value::as_str);
        let principal = text("iss").zip(text("sub")).map(|(issuer, subject)| format!("{issuer}/{subject}"));
        Self { all, principal }
    }

    /// `ISSUER/SUBJECT`, where the token has both.
    pub fn principal(&self) -> Option<&str> {
        self.principal.as_deref()
    }

    /// Whether a claim is a text that matches, or a list that has one. `scope` is a list with spaces (RFC 8693 §4.2).
    pub fn say(&self, name: &[Arc<str>], glob: &Glob) -> bool {
        let Some((first, rest)) = name.split_first() else { return false };
        let mut found = self.all.get(&**first);
        for part in rest {
            found = found.and_then(|value| value.get(&**part));
        }
        match found {
            Some(Value::String(text)) => {
                let list = rest.is_empty() && matches!(&**first, "scope" | "permission");
                glob.matches(text) || (list && text.split(' ').any(|word| glob.matches(word)))
            }
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(|text| glob.matches(text)),
            _ => false,
        }
    }
}
