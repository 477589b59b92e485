//! Connections that asked once and then stay open.

use std::io;
use std::net::SocketAddr;

use super::http1::Client;

/// Opens `count` connections, one after another, each with one answered request.
pub(crate) async fn open(to: SocketAddr, request: &[u8], count: usize) -> io::Result<Vec<Client>> {
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        let mut client = Client::connect(to).await?;
        client.ask(request).await?;
        clients.push(client);
    }
    Ok(clients)
}
