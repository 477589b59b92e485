//! A running control plane.

use std::net::SocketAddr;
use std::time::Duration;

use crate::{Config, StartError};

/// A running control plane. Several may run in one process, each with its own folders and ports.
pub struct ControlPlane {
    listen: SocketAddr,
    admin: SocketAddr,
    url: String,
}

impl ControlPlane {
    /// Opens the CA, binds both ports and serves on the current tokio runtime.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let problems = config.problems();
        match problems.is_empty() {
            true => Err(StartError::Ca("not built yet".into())),
            false => Err(StartError::Invalid(problems)),
        }
    }

    /// Where discovery and the CA service are served.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Where the admin is served.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// `https://127.0.0.1:15112`: what a proxy on this machine connects to.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A join token for a service.
    pub fn token(&self, service: &str, namespace: &str, ttl: Duration) -> Result<String, StartError> {
        let _ = (service, namespace, ttl);
        Err(StartError::Ca("not built yet".into()))
    }

    /// Stops serving: says goodbye to every proxy, writes the state, frees the ports.
    pub async fn shutdown(self) {}
}
