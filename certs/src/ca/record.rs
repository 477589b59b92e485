//! `issued.log`: one JSON line for every certificate, on disk before it is signed.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;

use super::layout::CaError;
use crate::files;
use crate::spiffe::SpiffeId;

/// What is kept of a certificate.
#[derive(Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) at: String,
    pub(crate) serial: String,
    pub(crate) id: SpiffeId,
    pub(crate) not_after: String,
    pub(crate) key_sha256: String,
    pub(crate) issuer: String,
}

/// Appends one line and waits until the disk has it.
pub(crate) fn append(path: &Path, entry: &Entry) -> Result<(), CaError> {
    let mut line = serde_json::to_string(entry).map_err(|e| CaError::Sign(e.to_string()))?;
    line.push('\n');
    let record = || {
        let new = !path.exists();
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        file.write_all(line.as_bytes())?; // One write: lines of two processes do not mix under O_APPEND.
        file.sync_data()?;
        if new { files::sync_dir_of(path) } else { Ok(()) }
    };
    record().map_err(|e| CaError::write(path, e))
}
