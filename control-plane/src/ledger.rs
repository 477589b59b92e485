//! Spent join tokens. A token is spent by the first public key that uses it; the same key may come again until it
//! expires, because an answer can get lost. What cannot be written down is not spent, and nothing is signed for it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::persist::{self, StateError};
use crate::token::{JoinToken, TokenError};

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Spent {
    /// SHA-256 of the public key, hex.
    key: String,
    /// Seconds since 1970; after that the token is refused anyway.
    expires: u64,
}

/// The spent tokens, in memory and on disk.
pub(crate) struct Ledger {
    path: PathBuf,
    spent: Mutex<BTreeMap<String, Spent>>,
}

/// Why a token was not spent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpendError {
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    State(#[from] StateError),
}

impl Ledger {
    pub(crate) fn open(path: PathBuf) -> Result<Self, StateError> {
        let spent = persist::read_json(&path)?.unwrap_or_default();
        Ok(Self { path, spent: Mutex::new(spent) })
    }

    /// Spends a token for a key. Blocks for one small file's write; the lock is held meanwhile, so that of two keys at
    /// the same time one loses.
    pub(crate) fn spend(&self, token: &JoinToken, key: &str, now: u64) -> Result<(), SpendError> {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = spent.get(&token.nonce) {
            return if first.key == key { Ok(()) } else { Err(TokenError::Spent.into()) };
        }
        let mut next = spent.clone();
        // Tokens live for a day at most, and only the CA's owner makes them: this keeps the ledger small.
        next.retain(|_, spent| spent.expires > now);
        next.insert(token.nonce.clone(), Spent { key: key.to_string(), expires: token.expires });
        persist::write_json(&self.path, &next)?;
        *spent = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(nonce: &str, expires: u64) -> JoinToken {
        let id = "spiffe://cluster.local/ns/default/sa/web".parse().unwrap();
        JoinToken { id, expires, nonce: nonce.to_string(), root_sha256: String::new() }
    }

    #[test]
    fn the_first_key_spends_a_token_and_may_come_again_even_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spent.json");
        let ledger = Ledger::open(path.clone()).unwrap();
        ledger.spend(&token("n", 100), "key-1", 10).unwrap();
        let ledger = Ledger::open(path).unwrap();
        ledger.spend(&token("n", 100), "key-1", 20).unwrap();
        let error = ledger.spend(&token("n", 100), "key-2", 20).unwrap_err();
        assert!(matches!(error, SpendError::Token(TokenError::Spent)), "{error}");
    }

    #[test]
    fn what_cannot_be_written_down_is_not_spent() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path().join("gone/spent.json")).unwrap();
        assert!(matches!(ledger.spend(&token("n", 100), "key-1", 10), Err(SpendError::State(_))));
        std::fs::create_dir(dir.path().join("gone")).unwrap();
        ledger.spend(&token("n", 100), "key-2", 10).unwrap();
    }
}
