//! Connections that leave HTTP behind: 101 and CONNECT.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use crate::tcp::{Abort, splice};

impl Abort for TokioIo<Upgraded> {
    fn abort(&mut self) {
        // hyper owns the socket underneath; dropping it is all there is.
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Carries bytes between two connections once both have left HTTP.
pub fn join(client: OnUpgrade, server: OnUpgrade) {
    tokio::spawn(async move {
        let (Ok(client), Ok(server)) = (client.await, server.await) else { return };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        splice(&mut client, &mut server, |_| {}).await;
    });
}
