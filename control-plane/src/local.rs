//! The mesh of one user on one machine: whoever holds the lock serves the control plane, the others connect to it.
//!
//! A file lock elects the holder. The others reach it through a Unix socket that takes processes of the same user only,
//! and which hands out join tokens. When the holder goes, however it goes, the kernel frees the lock; the next one takes
//! over lock, socket and TCP port, with the same CA and registrations.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Ca, CaError, TrustDomain};
use sheetbend_control_plane_client::local::{self, JoinError, Joined};
use sheetbend_control_plane_client::proto::v1::local_server::{Local, LocalServer};
use sheetbend_control_plane_client::proto::v1::{JoinRequest, JoinResponse};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::persist;
use crate::{Config, ControlPlane, StartError};

/// How often a process looks whether the holder has gone. Nothing tells it: a kill leaves no word.
const LOOK: Duration = Duration::from_millis(50);
/// How long a join may take while the holder changes.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the port of the holder before us is waited for.
const SAME_PORT: Duration = Duration::from_millis(500);
/// Join tokens of a local mesh are used at once.
const TOKEN_TTL: Duration = Duration::from_secs(60);

/// One process's part in its user's mesh.
pub struct LocalMesh {
    socket: PathBuf,
    holding: watch::Receiver<Option<Holding>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Where the control plane that this process serves is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// `https://127.0.0.1:PORT`.
    pub control_plane: String,
    /// `http://127.0.0.1:PORT`: admin and graph page.
    pub admin: String,
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
    /// The holder refused, or nobody serves although somebody holds the lock.
    #[error(transparent)]
    Join(#[from] JoinError),
}

impl LocalMesh {
    /// Takes the lock in `state_dir` and serves, or stands by behind the process that does. The folder and the CA are
    /// made when they are missing.
    pub async fn join_or_hold(state_dir: &Path) -> Result<Self, LocalMeshError> {
        private_folder(state_dir)?;
        let lock_path = state_dir.join("control.lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(|error| {
            LocalMeshError::Folder { path: lock_path.clone(), reason: format!("cannot open it: {error}") }
        })?;
        let candidate = Candidate { state_dir: state_dir.into(), lock };
        // If nobody holds it, serving must work before we say that it does.
        let held = match candidate.try_hold() {
            true => Some(candidate.serve().await?),
            false => None,
        };
        let (stop, stopping) = watch::channel(false);
        let (tell, holding) = watch::channel(held.as_ref().map(Held::holding));
        let task = tokio::spawn(candidate.stand_by(held, tell, stopping));
        Ok(Self { socket: socket_of(state_dir), holding, stop, task })
    }

    /// A token for `service`, and where to use it. Waits up to 5 s while the holder changes.
    pub async fn join(&self, service: &str, namespace: &str) -> Result<Joined, LocalMeshError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match local::join(&self.socket, service, namespace).await {
                Err(JoinError::Unreachable { .. }) if Instant::now() < deadline => sleep(LOOK).await,
                answer => return Ok(answer?),
            }
        }
    }

    /// Whether this process serves the control plane now.
    pub fn holds(&self) -> bool {
        self.holding.borrow().is_some()
    }

    /// Changes when this process takes over.
    pub fn holding(&self) -> watch::Receiver<Option<Holding>> {
        self.holding.clone()
    }

    /// Stops serving, if this process serves, and lets another take over.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        let _ = self.task.await;
    }
}

fn socket_of(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}

/// 0700 and ours, made if need be. A folder of another user is never used: it would hold our CA's keys.
fn private_folder(path: &Path) -> Result<(), LocalMeshError> {
    let folder = |reason: String| LocalMeshError::Folder { path: path.into(), reason };
    sheetbend_certs::files::make_private_dir(path)
        .map_err(|error| folder(format!("cannot make this folder: {error}")))?;
    let meta = std::fs::metadata(path).map_err(|error| folder(format!("cannot look at it: {error}")))?;
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != own {
        return Err(folder(format!(
            "this folder is user {}'s, not ours ({own}); set XDG_STATE_HOME to one of ours",
            meta.uid()
        )));
    }
    if meta.mode() & 0o077 != 0 {
        let mode = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(path, mode).map_err(|error| folder(format!("cannot make it private: {error}")))?;
    }
    Ok(())
}

/// A process that may become the holder.
struct Candidate {
    state_dir: PathBuf,
    lock: File,
}

/// What the holder runs. Its lock is the candidate's.
struct Held {
    control_plane: Arc<ControlPlane>,
    socket: JoinHandle<()>,
    close: watch::Sender<bool>,
}

impl Held {
    fn holding(&self) -> Holding {
        Holding {
            control_plane: self.control_plane.url().to_string(),
            admin: format!("http://{}", self.control_plane.admin()),
        }
    }

    async fn shutdown(self) {
        self.close.send_replace(true);
        let _ = self.socket.await;
        if let Some(control_plane) = Arc::into_inner(self.control_plane) {
            control_plane.shutdown().await;
        }
    }
}

impl Candidate {
    fn try_hold(&self) -> bool {
        self.lock.try_lock().is_ok()
    }

    async fn stand_by(
        self,
        mut held: Option<Held>,
        tell: watch::Sender<Option<Holding>>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut complained = false;
        while held.is_none() && !*stop.borrow() {
            if self.try_hold() {
                match self.serve().await {
                    Ok(serving) => {
                        tracing::info!(
                            url = serving.control_plane.url(),
                            "took over the control plane of this user's mesh"
                        );
                        tell.send_replace(Some(serving.holding()));
                        held = Some(serving);
                        break;
                    }
                    Err(error) => {
                        // Another candidate may be able to; and if none is, the reason may pass.
                        let _ = self.lock.unlock();
                        if !std::mem::replace(&mut complained, true) {
                            tracing::error!(%error, "cannot take over the control plane of this user's mesh; trying on");
                        }
                    }
                }
            }
            tokio::select! {
                // Losing either is safe: the next round looks again.
                () = sleep(LOOK) => {}
                _ = stop.changed() => {}
            }
        }
        if let Some(held) = held {
            drop(stop.wait_for(|stop| *stop).await);
            held.shutdown().await;
        }
        // The lock goes with `self`, after everything that it guards.
    }

    async fn serve(&self) -> Result<Held, LocalMeshError> {
        let dir = self.state_dir.join("ca");
        match Ca::init(&dir, &TrustDomain::default(), SystemTime::now()) {
            Ok(_) | Err(CaError::Exists { .. }) => {}
            Err(error) => return Err(StartError::Ca(error.to_string()).into()),
        }
        let control_plane = Arc::new(self.start(dir).await?);
        let path = socket_of(&self.state_dir);
        let failed = |reason: io::Error| LocalMeshError::Folder {
            path: path.clone(),
            reason: format!("cannot listen on it: {reason}"),
        };
        // We hold the lock, so whoever made this socket is gone.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        // The folder is 0700: nobody else gets at the socket before its own mode is set.
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let (close, closing) = watch::channel(false);
        let socket = tokio::spawn(serve_socket(listener, control_plane.clone(), closing));
        Ok(Held { control_plane, socket, close })
    }

    /// On the port of the holder before us, so that its proxies find us; on another one only if somebody took it.
    async fn start(&self, dir: PathBuf) -> Result<ControlPlane, LocalMeshError> {
        let port_file = self.state_dir.join("control.port");
        let last: u16 = persist::read_json(&port_file).ok().flatten().unwrap_or(0);
        let mut config = Config::new(dir);
        config.admin = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        config.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, last));
        let deadline = Instant::now() + SAME_PORT;
        let control_plane = loop {
            match ControlPlane::start(config.clone()).await {
                Err(StartError::PortInUse { .. } | StartError::Held(_)) if Instant::now() < deadline => {
                    sleep(LOOK / 5).await
                }
                Err(StartError::PortInUse { .. }) if config.listen.port() != 0 => {
                    tracing::warn!(
                        port = last,
                        "the control plane's port was taken meanwhile; proxies must be restarted"
                    );
                    config.listen.set_port(0);
                }
                started => break started?,
            }
        };
        persist::write_json(&port_file, &control_plane.listen().port()).map_err(StartError::from)?;
        Ok(control_plane)
    }
}

async fn serve_socket(listener: UnixListener, control_plane: Arc<ControlPlane>, mut closing: watch::Receiver<bool>) {
    let own = rustix::process::geteuid().as_raw();
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    let incoming = tokio_stream::StreamExt::filter(incoming, move |socket| match socket {
        Ok(socket) => is_same_user(socket.peer_cred().map(|peer| peer.uid()), own),
        Err(_) => true,
    });
    let service = LocalServer::new(Joining { control_plane });
    let close = async move { drop(closing.wait_for(|close| *close).await) };
    let served = Server::builder()
        .max_connection_age(Duration::from_secs(10))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, close)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the local socket is no longer served: no further process can join");
    }
}

/// What the kernel says of the peer must be our own user; root is no exception, and neither is what cannot be told.
fn is_same_user(peer: io::Result<u32>, own: u32) -> bool {
    match peer {
        Ok(uid) if uid == own => true,
        Ok(uid) => {
            tracing::warn!(uid, "another user's process was turned away from the local socket");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "a process of an unknown user was turned away from the local socket");
            false
        }
    }
}

struct Joining {
    control_plane: Arc<ControlPlane>,
}

#[tonic::async_trait]
impl Local for Joining {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let JoinRequest { service, namespace } = request.into_inner();
        let namespace = if namespace.is_empty() { "default" } else { &namespace };
        match self.control_plane.token(&service, namespace, TOKEN_TTL) {
            Ok(token) => {
                let control_plane = self.control_plane.url().to_string();
                Ok(Response::new(JoinResponse { token, control_plane }))
            }
            Err(StartError::Invalid(problems)) => Err(Status::invalid_argument(problems.join("; "))),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_users_process_is_turned_away_root_included() {
        assert!(is_same_user(Ok(1000), 1000));
        assert!(!is_same_user(Ok(1001), 1000));
        assert!(!is_same_user(Ok(0), 1000));
        assert!(!is_same_user(Err(io::Error::other("unknown")), 1000));
    }

    /// Asked again where the machine takes longer than a process waits.
    async fn joined(mesh: &LocalMesh) -> Joined {
        let mut tries = 10;
        loop {
            tries -= 1;
            match mesh.join("web", "default").await {
                Err(LocalMeshError::Join(JoinError::Unreachable { .. })) if tries > 0 => {}
                answer => return answer.unwrap(),
            }
        }
    }

    #[tokio::test]
    async fn when_the_holder_goes_another_serves_the_same_root_on_the_same_port() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("sheetbend");
        // Held, so that the port becomes nobody else's between the two who listen on it.
        let held = tokio::net::TcpSocket::new_v4().unwrap();
        held.set_reuseaddr(true).unwrap();
        held.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        private_folder(&state).unwrap();
        persist::write_json(&state.join("control.port"), &held.local_addr().unwrap().port()).unwrap();
        let first = LocalMesh::join_or_hold(&state).await.unwrap();
        let second = LocalMesh::join_or_hold(&state).await.unwrap();
        assert!(first.holds() && !second.holds());
        let before = joined(&second).await;
        let root = std::fs::read(state.join("ca/bundle.pem")).unwrap();

        first.shutdown().await;
        let after = joined(&second).await;
        assert!(second.holds());
        assert_eq!(after.control_plane, before.control_plane);
        assert_ne!(after.token, before.token);
        assert_eq!(std::fs::read(state.join("ca/bundle.pem")).unwrap(), root);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&socket_of(&state))), (0o700, 0o600));
        let refused = second.join("not a name", "default").await.unwrap_err();
        assert!(refused.to_string().contains("not a name"), "{refused}");
        second.shutdown().await;
    }
}
