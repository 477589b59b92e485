//! What the bearer of a join token reads in it. Whether it is genuine, only the control plane can say.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use serde::Deserialize;
use sheetbend_certs::{Sha256, SpiffeId};

/// Longer than any token.
const MAX_TEXT: usize = 4_096;

/// A join token: it proves, once, who this proxy may become, and names the root that it may trust.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The identity it is good for.
    pub id: SpiffeId,
    /// Digest of the control plane's root.
    pub root: Sha256,
    text: String,
}

#[derive(Deserialize)]
struct Claims {
    id: SpiffeId,
    root_sha256: String,
}

impl JoinToken {
    /// The text that goes to the control plane. A secret: it is never logged.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("id", &self.id).field("root", &self.root).finish_non_exhaustive()
    }
}

/// Not a join token. It does not repeat the text, which may be another secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token: it must look like v1.….…, as `sheetbend token create` prints it")]
pub struct TokenError;

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TEXT {
            return Err(TokenError);
        }
        let (claims, _signature) = text.strip_prefix("v1.").and_then(|rest| rest.split_once('.')).ok_or(TokenError)?;
        let claims = BASE64.decode(claims).map_err(|_| TokenError)?;
        let claims: Claims = serde_json::from_slice(&claims).map_err(|_| TokenError)?;
        let root = digest(&claims.root_sha256).ok_or(TokenError)?;
        Ok(Self { id: claims.id, root, text: text.to_string() })
    }
}

/// 64 hex digits.
fn digest(hex: &str) -> Option<Sha256> {
    let mut bytes = [0u8; 32];
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(Sha256(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(claims: &str) -> Result<JoinToken, TokenError> {
        format!("v1.{}.c2lnbmF0dXJl\n", BASE64.encode(claims)).parse()
    }

    #[test]
    fn a_token_tells_its_identity_and_the_root_to_trust() {
        let root = "ab".repeat(32);
        let claims = format!(
            r#"{{"id":"spiffe://cluster.local/ns/default/sa/web","expires":1,"nonce":"n","root_sha256":"{root}"}}"#
        );
        let token = token(&claims).unwrap();
        assert_eq!(token.id.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        assert_eq!(token.root, Sha256([0xab; 32]));
        assert!(!format!("{token:?}").contains(token.as_str()), "a secret must not be printed");
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        for text in ["", "v1", "v1.e30.x", "secret", &"x".repeat(9000)] {
            let error = text.parse::<JoinToken>().unwrap_err();
            assert!(text.is_empty() || !error.to_string().contains(text) || text == "v1");
        }
        assert_eq!(token(r#"{"id":"spiffe://a/ns/b/sa/c","root_sha256":"é"}"#), Err(TokenError));
    }
}
