//! Files that survive a crash: written whole, beside the old one, then renamed over it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system said no.
    #[error("{}: cannot {what}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The file is there and makes no sense.
    #[error(
        "{}:{line}:{column}: this state file is damaged ({reason}). Restore it from a backup, or move it away to start \
         without what it held",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// What the parser missed.
        reason: String,
    },
}

/// Reads a JSON file; `None` when there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StateError::Io { path: path.into(), what: "read it", source }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| StateError::Damaged {
        path: path.into(),
        line: error.line().max(1),
        column: error.column().max(1),
        reason: without_place(&error.to_string()),
    })
}

/// serde_json ends its messages with a place that we print in front.
fn without_place(message: &str) -> String {
    message.split(" at line ").next().unwrap_or(message).to_string()
}

/// Writes a JSON file that is either the old one or the new one, whatever happens in between. Mode 0600.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let mut text = serde_json::to_vec(value).map_err(|error| StateError::Io {
        path: path.into(),
        what: "encode its content",
        source: io::Error::other(error),
    })?;
    text.push(b'\n');
    write(path, &text)
}

/// Writes a file whole, mode 0600: a crash leaves the old content or the new one.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), StateError> {
    let failed = |what| move |source| StateError::Io { path: path.into(), what, source };
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let beside = path.with_file_name(name);
    let attempt = || -> io::Result<()> {
        // A leftover of a crash under the same pid would make `create_new` fail for ever.
        let _ = fs::remove_file(&beside);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        // Without this a power cut may bring the old name back.
        File::open(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))?.sync_all()
    };
    attempt().map_err(|error| {
        let _ = fs::remove_file(&beside);
        failed("write it")(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_state_file_is_named_with_its_place_and_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registrations.json");
        fs::write(&path, "{\"a\": 1,\n \"b\": }").unwrap();
        let error = read_json::<serde_json::Value>(&path).unwrap_err().to_string();
        assert!(error.contains("registrations.json:2:7"), "{error}");
        assert!(error.contains("damaged") && error.contains("move it away"), "{error}");
        assert!(!error.contains(" at line "), "{error}");
    }

    #[test]
    fn a_written_file_is_whole_and_private_and_leaves_nothing_beside_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write_json(&path, &[1, 2]).unwrap();
        write_json(&path, &[3]).unwrap();
        assert_eq!(read_json::<Vec<u8>>(&path).unwrap(), Some(vec![3]));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_json(&dir.path().join("gone/state.json"), &1).unwrap_err().to_string();
        assert!(error.contains("gone/state.json") && error.contains("cannot write it"), "{error}");
    }
}
