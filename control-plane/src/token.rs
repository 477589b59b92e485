//! Join tokens: a text that proves, once and for a while, who a process may become.
//!
//! `v1.PAYLOAD.SIGNATURE`, both parts base64url without padding. The payload is JSON; the signature is HMAC-SHA256
//! over everything before it, with a key that never leaves the CA's folder. A token is bound to one identity, and spent
//! by the first public key that uses it (see `ledger.rs`).

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, hmac};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use serde::{Deserialize, Serialize};
use sheetbend_certs::SpiffeId;

use crate::persist::{self, StateError};

/// Longer than any token of ours; what is longer is not looked at.
const MAX_TEXT: usize = 4096;
const KEY_FILE: &str = "token.key";
/// The longest life of a token: as long as that of a certificate.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);

/// What a join token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinToken {
    /// The one identity it is good for.
    pub id: SpiffeId,
    /// Seconds since 1970 (UTC) after which it is worthless.
    pub expires: u64,
    /// Tells two tokens for the same identity apart.
    pub nonce: String,
    /// SHA-256 of the root's DER, lower-case hex: whom the bearer may trust before it holds a bundle.
    pub root_sha256: String,
}

/// Why a token is refused. None of the messages repeats the token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not the shape of a token.
    #[error("this is not a join token: it must look like v1.….…, as `sheetbend token create` prints it")]
    Malformed,
    /// Signed with another key.
    #[error("this join token was not made by this control plane's CA, or it was altered on its way")]
    Forged,
    /// Too late.
    #[error("this join token expired {ago_seconds} s ago; make another with `sheetbend token create`")]
    Expired {
        /// Seconds since then.
        ago_seconds: u64,
    },
    /// Another public key was first.
    #[error("this join token was already spent by another key; make another with `sheetbend token create`")]
    Spent,
}

/// The key that makes and checks tokens. It is created on first use, in the CA's folder, mode 0600.
pub struct TokenKey(hmac::Key);

impl TokenKey {
    /// Reads the key of the CA in `dir`, or makes one.
    pub fn open_or_create(dir: &Path) -> Result<Self, StateError> {
        let path = dir.join(KEY_FILE);
        let io = |what| {
            let path = path.clone();
            move |source| StateError::Io { path, what, source }
        };
        match std::fs::read(&path) {
            Ok(key) if key.len() == 32 => Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &key))),
            Ok(key) => Err(StateError::Damaged {
                path,
                line: 1,
                column: 1,
                reason: format!("a token key has 32 bytes, this one {}", key.len()),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                // Two processes may both find none: the link is made by the first only, and both use the winner's.
                let fresh: [u8; 32] = rand::random();
                let mine = dir.join(format!("{KEY_FILE}.{}.{:08x}", std::process::id(), rand::random::<u32>()));
                persist::write(&mine, &fresh)?;
                let linked = std::fs::hard_link(&mine, &path);
                let _ = std::fs::remove_file(&mine);
                match linked {
                    Ok(()) => Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &fresh))),
                    Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Self::open_or_create(dir),
                    Err(error) => Err(io("create it")(error)),
                }
            }
            Err(error) => Err(io("read it")(error)),
        }
    }

    /// A token for `id`, good for `ttl` from `now`.
    pub fn issue(&self, id: SpiffeId, root_sha256: String, now: SystemTime, ttl: Duration) -> String {
        let nonce: [u8; 16] = rand::random();
        let expires = (now + ttl.min(MAX_TTL)).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.seal(&JoinToken { id, expires, nonce: BASE64.encode(nonce), root_sha256 })
    }

    fn seal(&self, token: &JoinToken) -> String {
        // A struct of strings and a number always has a JSON form.
        let payload = serde_json::to_vec(token).unwrap_or_default();
        let signed = format!("v1.{}", BASE64.encode(payload));
        let signature = hmac::sign(&self.0, signed.as_bytes());
        format!("{signed}.{}", BASE64.encode(signature))
    }

    /// What the token says, if this key made it and it has not expired at `now`.
    pub fn open(&self, text: &str, now: SystemTime) -> Result<JoinToken, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TEXT {
            return Err(TokenError::Malformed);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let payload = signed.strip_prefix("v1.").ok_or(TokenError::Malformed)?;
        let signature = BASE64.decode(signature).map_err(|_| TokenError::Malformed)?;
        let expected = hmac::sign(&self.0, signed.as_bytes());
        constant_time::verify_slices_are_equal(expected.as_ref(), &signature).map_err(|_| TokenError::Forged)?;
        let payload = BASE64.decode(payload).map_err(|_| TokenError::Malformed)?;
        let token: JoinToken = serde_json::from_slice(&payload).map_err(|_| TokenError::Malformed)?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match now >= token.expires {
            true => Err(TokenError::Expired { ago_seconds: now - token.expires }),
            false => Ok(token),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> (tempfile::TempDir, TokenKey) {
        let dir = tempfile::tempdir().unwrap();
        let key = TokenKey::open_or_create(dir.path()).unwrap();
        (dir, key)
    }

    fn web() -> SpiffeId {
        "spiffe://cluster.local/ns/default/sa/web".parse().unwrap()
    }

    #[test]
    fn a_token_says_again_what_it_was_made_for() {
        let (dir, key) = key();
        let now = SystemTime::now();
        let text = key.issue(web(), "ab".repeat(32), now, Duration::from_secs(600));
        let again = TokenKey::open_or_create(dir.path()).unwrap();
        let token = again.open(&format!("{text}\n"), now).unwrap();
        assert_eq!((token.id, token.root_sha256), (web(), "ab".repeat(32)));
    }

    #[test]
    fn an_expired_token_is_refused_and_says_since_when() {
        let (_dir, key) = key();
        let now = SystemTime::now();
        let text = key.issue(web(), String::new(), now, Duration::from_secs(600));
        let later = key.open(&text, now + Duration::from_secs(601));
        assert!(matches!(later, Err(TokenError::Expired { ago_seconds: 0..=2 })), "{later:?}");
    }

    #[test]
    fn a_token_that_was_altered_or_made_elsewhere_is_refused() {
        let (_dir, ours) = key();
        let (_other, theirs) = key();
        let now = SystemTime::now();
        let text = theirs.issue(web(), String::new(), now, Duration::from_secs(600));
        assert_eq!(ours.open(&text, now), Err(TokenError::Forged));
        for garbage in ["", "v1", "v1.", "v1..", "v2.a.b", "v1.!.!", &"v1.".repeat(4096)] {
            assert!(ours.open(garbage, now).is_err(), "{garbage}");
        }
    }
}
