//! How much may be under way to a destination at once.

use serde::{Deserialize, Serialize};

use super::Unusable;

/// `connectionPool`. What is not said is as it is without a policy; each proxy counts for itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct ConnectionPool {
    /// Of connections of any kind.
    #[serde(skip_serializing_if = "TcpPool::is_default")]
    pub tcp: TcpPool,
    /// Of requests.
    #[serde(skip_serializing_if = "HttpPool::is_default")]
    pub http: HttpPool,
}

/// `connectionPool.tcp`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TcpPool {
    /// Connections at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
}

/// `connectionPool.http`. The names are Istio's; each limit holds for HTTP/1.1, HTTP/2 and gRPC alike.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct HttpPool {
    /// Requests that wait for a connection at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http1_max_pending_requests: Option<u32>,
    /// Requests under way at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http2_max_requests: Option<u32>,
    /// Requests on one connection before it is replaced; 0 is any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests_per_connection: Option<u32>,
    /// Retries under way at once; 0 is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_retries: Option<u32>,
}

impl TcpPool {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl HttpPool {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl ConnectionPool {
    /// Whether it can be obeyed; if not, the field and the reason.
    pub fn check(&self) -> Result<(), Unusable> {
        let needed = [
            ("tcp.maxConnections", self.tcp.max_connections),
            ("http.http1MaxPendingRequests", self.http.http1_max_pending_requests),
            ("http.http2MaxRequests", self.http.http2_max_requests),
        ];
        match needed.into_iter().find(|(_, limit)| *limit == Some(0)) {
            Some((field, _)) => Err(Unusable::new(
                format!("connectionPool.{field}"),
                "with 0 nothing would ever pass: write 1 or more, or leave it out",
            )),
            None => Ok(()),
        }
    }
}
