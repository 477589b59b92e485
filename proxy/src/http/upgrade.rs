//! Connections that leave HTTP behind: 101 and CONNECT.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::watch;

use crate::rest::{Rest, splice_for};
use crate::tcp::Abort;

impl Abort for TokioIo<Upgraded> {
    fn abort(&mut self) {
        // hyper owns the socket underneath; dropping it is all there is.
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Carries bytes between two connections once both have left HTTP. `rest` is what the one within the mesh rests on;
/// whoever stops this proxy waits until `under_way` is dropped.
pub fn join(client: OnUpgrade, server: OnUpgrade, rest: Option<Rest>, under_way: watch::Receiver<bool>) {
    tokio::spawn(async move {
        let _under_way = under_way;
        let (Ok(client), Ok(server)) = (client.await, server.await) else { return };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        splice_for(&mut client, &mut server, rest, |_| {}).await;
    });
}
