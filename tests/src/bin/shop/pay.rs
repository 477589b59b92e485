//! Charges cards, over HTTP/2.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, StatusCode};

use crate::Error;

pub(crate) async fn serve(port: u16) -> Result<(), Error> {
    crate::serve::http(port, (), answer).await
}

async fn answer(_: Arc<()>, method: Method, path: String, body: Bytes) -> Result<(StatusCode, String), Error> {
    match (method, path.as_str()) {
        (Method::POST, "/charge") => Ok((StatusCode::OK, format!("paid for {}\n", String::from_utf8_lossy(&body)))),
        _ => Ok((StatusCode::NOT_FOUND, "no such page\n".into())),
    }
}
