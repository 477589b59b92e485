//! The way to the control plane: one HTTP/2 connection that notices when the other end is gone.

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A dead control plane is noticed within 5 s + 5 s, the TTL after which it would have given us up too.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_PATIENCE: Duration = Duration::from_secs(5);

/// Makes channels to one control plane.
#[derive(Clone)]
pub struct Connector {
    endpoint: Endpoint,
}

/// Why a control plane is not reached.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not a URL of a control plane.
    #[error("`{url}` is not a control plane's address: write https://HOST:PORT ({reason})")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody there, or not willing.
    #[error("{url}: {reason}")]
    Unreachable {
        /// Which control plane.
        url: String,
        /// The chain of causes.
        reason: Arc<str>,
    },
}

impl Connector {
    /// Without TLS: for tests, and for a control plane behind something that does TLS itself.
    pub fn plain(url: &str) -> Result<Self, ConnectError> {
        let wrong = |reason: String| ConnectError::Url { url: url.to_string(), reason };
        let endpoint = Endpoint::from_shared(url.to_string()).map_err(|error| wrong(error.to_string()))?;
        Ok(Self { endpoint: tuned(endpoint) })
    }

    /// When to connect anew.
    pub(crate) fn rotations(&self) -> Rotations {
        Rotations
    }

    /// Puts the bundle that the control plane told in force, or says why not.
    pub(crate) fn install_bundle(&self, _pem: &str) -> Result<(), String> {
        Ok(())
    }

    /// Connects, within 3 s.
    pub async fn connect(&self) -> Result<Channel, ConnectError> {
        self.endpoint.connect().await.map_err(|error| ConnectError::Unreachable {
            url: self.endpoint.uri().to_string(),
            reason: causes(&error).into(),
        })
    }
}

impl std::fmt::Display for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.endpoint.uri().fmt(f)
    }
}

/// Tells when new channels would rest on another certificate or bundle.
pub(crate) struct Rotations;

impl Rotations {
    /// The next one. Never, where there is nothing to rotate.
    pub(crate) async fn next(&mut self) {
        std::future::pending().await
    }
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_PATIENCE)
        .keep_alive_while_idle(true)
}

/// An error and its causes in one line: the outermost alone says "transport error".
pub(crate) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
