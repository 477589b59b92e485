//! Limits as they are written, made into what a proxy obeys.

use serde_saphyr::{Location, Spanned};
use sheetbend_control_plane_client::model;

use super::kinds::limits as kinds;
use super::policy::refused;
use crate::resources::parse::Checked;

/// `connectionPool` of a BackendPolicy.
pub(super) fn connection_pool(raw: &Spanned<kinds::ConnectionPool>) -> Checked<model::ConnectionPool> {
    let (tcp, http) = (raw.value.tcp.as_ref(), raw.value.http.as_ref());
    let connections = tcp.and_then(|tcp| tcp.max_connections.as_ref());
    let pending = http.and_then(|http| http.http1_max_pending_requests.as_ref());
    let requests = http.and_then(|http| http.http2_max_requests.as_ref());
    let pool = model::ConnectionPool {
        tcp: model::TcpPool { max_connections: number(connections) },
        http: model::HttpPool {
            http1_max_pending_requests: number(pending),
            http2_max_requests: number(requests),
            max_requests_per_connection: number(http.and_then(|http| http.max_requests_per_connection.as_ref())),
            max_retries: number(http.and_then(|http| http.max_retries.as_ref())),
        },
    };
    pool.check().or_else(|error| {
        let at = match error.field.rsplit('.').next() {
            Some("maxConnections") => connections,
            Some("http1MaxPendingRequests") => pending,
            _ => requests,
        };
        refused(&error, place(at).unwrap_or(raw.referenced))
    })?;
    Ok(pool)
}

fn number(found: Option<&Spanned<u32>>) -> Option<u32> {
    found.map(|found| found.value)
}

fn place(found: Option<&Spanned<u32>>) -> Option<Location> {
    found.map(|found| found.referenced)
}
