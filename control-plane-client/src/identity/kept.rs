//! An identity kept on disk, so that a restart needs no token.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sheetbend_certs::files::{Access, make_private_dir, replace};
use sheetbend_certs::{Identity, TrustBundle};

/// The key, the chain and the bundle. One file, because two could be of different issues after a crash.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    path: PathBuf,
}

impl Kept {
    pub(super) fn in_directory(directory: &Path) -> Self {
        Self { path: directory.join("identity.json") }
    }

    /// What was kept. `None`: nothing, which is how it begins.
    pub(super) fn load(&self) -> Result<Option<(Identity, Arc<TrustBundle>)>, String> {
        let wrong = |reason: String| format!("{}: {reason}; delete it to start with a join token", self.path.display());
        let text = match std::fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(wrong(error.to_string())),
        };
        let file: File = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let identity = Identity::from_pem(&file.chain, &file.key).map_err(|error| wrong(error.to_string()))?;
        let bundle = TrustBundle::from_pem(&file.bundle).map_err(|error| wrong(error.to_string()))?;
        Ok(Some((identity, Arc::new(bundle))))
    }

    /// Keeps it, mode 0600, in one step.
    pub(super) fn save(&self, identity: &Identity, bundle: &TrustBundle) -> io::Result<()> {
        if let Some(directory) = self.path.parent() {
            make_private_dir(directory)?;
        }
        let file = File { chain: identity.cert_pem(), key: identity.key_pem(), bundle: bundle.to_pem() };
        replace(&self.path, &serde_json::to_vec_pretty(&file)?, Access::Owner)
    }
}

/// All PEM.
#[derive(serde::Serialize, serde::Deserialize)]
struct File {
    key: String,
    chain: String,
    bundle: String,
}
