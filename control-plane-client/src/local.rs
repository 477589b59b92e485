//! The Unix socket through which processes of one user find their own control plane.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

use crate::channel::causes;
use crate::proto::v1::JoinRequest;
use crate::proto::v1::local_client::LocalClient;
use crate::xds::shown;

/// All of it: to connect, to ask, to be answered.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a process needs to become a service of its user's mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// A join token for the service.
    pub token: String,
    /// Where the control plane listens, `https://127.0.0.1:PORT`.
    pub control_plane: String,
}

/// Why nobody could be joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody answers there.
    #[error("no control plane answers on {}: {reason}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The chain of causes.
        reason: String,
    },
    /// It answered no.
    #[error("the control plane on {} refuses: {reason}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// What it says.
        reason: String,
    },
}

/// Asks the control plane on `socket` for a join token for `service`. Takes 3 s at most.
pub async fn join(socket: &Path, service: &str, namespace: &str) -> Result<Joined, JoinError> {
    let unreachable = |reason: String| JoinError::Unreachable { path: socket.to_path_buf(), reason };
    let asked = async {
        let path = socket.to_path_buf();
        let dial = move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        };
        // A name for the sake of HTTP; nobody resolves it.
        let endpoint = Endpoint::from_static("http://control.sock");
        let channel = endpoint.connect_with_connector(tower::service_fn(dial)).await;
        let channel = channel.map_err(|error| unreachable(causes(&error)))?;
        let request = JoinRequest { service: service.to_string(), namespace: namespace.to_string() };
        let answer = LocalClient::new(channel).join(request).await.map_err(|status| match status.code() {
            tonic::Code::Unavailable | tonic::Code::Unknown => unreachable(shown(status.message(), 500)),
            _ => JoinError::Refused { path: socket.to_path_buf(), reason: shown(status.message(), 500) },
        })?;
        let answer = answer.into_inner();
        Ok(Joined { token: answer.token, control_plane: answer.control_plane })
    };
    let late = || unreachable(format!("no answer within {} s", PATIENCE.as_secs()));
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::JoinResponse;
    use crate::proto::v1::local_server::{Local, LocalServer};
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::{Request, Response, Status};

    struct Keeper;

    #[tonic::async_trait]
    impl Local for Keeper {
        async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
            match request.into_inner().service.as_str() {
                "bad name" => Err(Status::invalid_argument("`bad name` is no service name")),
                service => Ok(Response::new(JoinResponse {
                    token: format!("v1.{service}"),
                    control_plane: "https://127.0.0.1:15112".to_string(),
                })),
            }
        }
    }

    async fn served() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let socket = tokio::net::UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let server = tonic::transport::Server::builder().add_service(LocalServer::new(Keeper));
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(socket)));
        dir
    }

    /// Asked again where the machine takes longer than a process waits.
    async fn joined(dir: &tempfile::TempDir, service: &str) -> Result<Joined, JoinError> {
        let mut tries = 10;
        loop {
            tries -= 1;
            match join(&dir.path().join("control.sock"), service, "default").await {
                Err(JoinError::Unreachable { reason, .. }) if tries > 0 && reason.starts_with("no answer within") => {}
                answer => return answer,
            }
        }
    }

    #[tokio::test]
    async fn a_service_gets_its_token_and_the_way_over_the_socket() {
        let dir = served().await;
        let joined = joined(&dir, "web").await.unwrap();
        assert_eq!(joined, Joined { token: "v1.web".into(), control_plane: "https://127.0.0.1:15112".into() });
    }

    #[tokio::test]
    async fn a_refusal_is_told_apart_from_nobody_there() {
        let dir = served().await;
        let refused = joined(&dir, "bad name").await.unwrap_err();
        assert!(
            matches!(&refused, JoinError::Refused { reason, .. } if reason.contains("no service name")),
            "{refused}"
        );
        let nobody = join(&dir.path().join("other.sock"), "web", "default").await.unwrap_err();
        assert!(matches!(nobody, JoinError::Unreachable { .. }), "{nobody}");
    }
}
