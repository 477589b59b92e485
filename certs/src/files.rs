//! Files that hold keys and state: written whole or not at all, and readable by their owner alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The owner alone: 0600.
    Owner,
    /// Everybody: 0644, less the umask.
    Everybody,
}

impl Access {
    fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Everybody => 0o644,
        }
    }
}

/// Makes a directory, and those above it, for the owner alone (0700). One that is there stays as it is.
pub fn make_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Writes a file that is not there yet; one that is there is an error, and stays as it is.
pub fn create_new(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(access.mode()).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    sync_dir_of(path)
}

/// Replaces a file in one step: a reader, or a crash, sees the old one or the new one.
pub fn replace(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::other("a file must have a name"))?;
    // Two threads may replace the same file: each has a file of its own aside. A process id may come again after a crash.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let unique = format!("{}.{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
    let aside = path.with_file_name(format!(".{}.{unique}.tmp", name.to_string_lossy()));
    let _ = fs::remove_file(&aside);
    let written = create_new(&aside, bytes, access).and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written?;
    sync_dir_of(path)
}

/// A name in a directory is durable once the directory is.
pub(crate) fn sync_dir_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
