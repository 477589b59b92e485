//! The mesh of one user on one machine: whoever holds the lock serves the control plane, the others connect to it.
//!
//! A file lock elects the holder. The others reach it through a Unix socket that takes processes of the same user only,
//! and which hands out join tokens. When the holder goes, however it goes, the kernel frees the lock; the next one takes
//! over lock, socket and TCP port, with the same CA and registrations.

use std::path::{Path, PathBuf};

use crate::StartError;

/// One process's part in its user's mesh.
pub struct LocalMesh {
    state_dir: PathBuf,
}

/// What a service needs to join.
#[derive(Clone, Debug)]
pub struct Joined {
    /// A join token for the service.
    pub token: String,
    /// `https://127.0.0.1:PORT`. It stays the same when another process takes over, whenever the port is free.
    pub control_plane: String,
}

/// Why a local mesh cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum LocalMeshError {
    /// The control plane cannot be served here.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The folder is not ours, or cannot be made.
    #[error("{}: {reason}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong and how to mend it.
        reason: String,
    },
    /// Nobody serves, although somebody holds the lock.
    #[error("the control plane of this user's mesh does not answer on {}: {reason}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The last failure.
        reason: String,
    },
    /// The holder refused.
    #[error("{0}")]
    Refused(String),
}

impl LocalMesh {
    /// Takes the lock in `state_dir` and serves, or stands by behind the process that does. The folder and the CA are
    /// made when they are missing.
    pub async fn join_or_hold(state_dir: &Path) -> Result<Self, LocalMeshError> {
        Ok(Self { state_dir: state_dir.into() })
    }

    /// A token for `service`, and where to use it. Waits up to 5 s while the holder changes.
    pub async fn join(&self, service: &str, namespace: &str) -> Result<Joined, LocalMeshError> {
        let _ = (service, namespace);
        Err(LocalMeshError::Unreachable { path: self.state_dir.clone(), reason: "not built yet".into() })
    }

    /// Whether this process serves the control plane now.
    pub fn holds(&self) -> bool {
        false
    }

    /// Stops serving, if this process serves, and lets another take over.
    pub async fn shutdown(self) {}
}
