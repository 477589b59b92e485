//! Connections that leave HTTP behind: 101 and CONNECT.

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::sync::watch;

use super::serve::Clocked;
use crate::rest::{Rest, splice_for};
use crate::rewind::Rewind;
use crate::tcp::{Abort, Transferred};
use crate::upstream::BoxIo;

impl Abort for TokioIo<Upgraded> {
    fn abort(&mut self) {
        // A stream of HTTP/2: the socket underneath is not its own, and dropping the stream is all there is.
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// The connection underneath, so that it can be reset, and seen to be gone: one that this proxy serves, or one that it
/// has dialed. What hyper has read ahead of HTTP's end comes first.
pub fn connection(upgraded: Upgraded) -> BoxIo {
    let upgraded = match upgraded.downcast::<Clocked>() {
        Ok(served) => return Box::new(Rewind::new(served.read_buf, served.io.into_inner().into_inner())),
        Err(other) => other,
    };
    match upgraded.downcast::<TokioIo<BoxIo>>() {
        Ok(dialed) => Box::new(Rewind::new(dialed.read_buf, dialed.io.into_inner())),
        Err(other) => Box::new(TokioIo::new(other)),
    }
}

/// Carries bytes between two connections once both have left HTTP. `rest` is what the one within the mesh rests on;
/// whoever stops this proxy waits until `under_way` is dropped. `moved` hears of bytes that have passed, and lives as long as the
/// tunnel.
pub fn join(
    client: OnUpgrade,
    server: OnUpgrade,
    rest: Option<Rest>,
    under_way: watch::Receiver<bool>,
    moved: impl Fn(Transferred) + Send + Sync + 'static,
) {
    tokio::spawn(async move {
        let _under_way = under_way;
        let (Ok(client), Ok(server)) = (client.await, server.await) else { return };
        let (mut client, mut server) = (connection(client), connection(server));
        splice_for(&mut client, &mut server, rest, None, moved).await;
    });
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::SocketAddr;

    use http::{Request, Response};
    use hyper::body::Incoming;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::http::body::ResponseBody;
    use crate::http::serve::serve;

    /// Passes an upgrade on to `server`, as both sides of a proxy do.
    async fn pass_on(mut request: Request<Incoming>, server: SocketAddr) -> Response<ResponseBody> {
        let io: BoxIo = Box::new(TcpStream::connect(server).await.unwrap());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        let client = hyper::upgrade::on(&mut request);
        let mut answer = sender.send_request(request).await.unwrap();
        join(client, hyper::upgrade::on(&mut answer), None, watch::channel(false).1, |_| {});
        answer.map(|_| ResponseBody::empty())
    }

    /// A client and a server, joined through HTTP that both have left, each having heard from the other.
    async fn joined() -> (TcpStream, TcpStream) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (to, at) = (server.local_addr().unwrap(), proxy.local_addr().unwrap());
        tokio::spawn(async move {
            let (_not_yet, drain) = watch::channel(false);
            let client = Box::new(proxy.accept().await.unwrap().0);
            serve(client, false, drain, None, move |request| pass_on(request, to)).await.unwrap();
        });
        let mut client = TcpStream::connect(at).await.unwrap();
        let head = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";
        client.write_all(head).await.unwrap();
        let mut server = server.accept().await.unwrap().0;
        read_until(&mut server, b"\r\n\r\n").await;
        // The first bytes come with the head, and are read together with it.
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhalf";
        server.write_all(answer).await.unwrap();
        let heard = read_until(&mut client, b"half").await;
        assert!(heard.starts_with(b"HTTP/1.1 101"), "{heard:?}");
        client.write_all(b"half").await.unwrap();
        read_until(&mut server, b"half").await;
        (client, server)
    }

    async fn read_until(socket: &mut TcpStream, end: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !bytes.ends_with(end) {
            bytes.push(socket.read_u8().await.unwrap());
        }
        bytes
    }

    async fn hears_a_reset(socket: &mut TcpStream) -> bool {
        let heard = socket.read_u8().await;
        heard.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
    }

    #[tokio::test]
    async fn a_reset_is_a_reset_on_the_other_side_of_a_tunnel() {
        let (mut client, server) = joined().await;
        server.set_zero_linger().unwrap();
        drop(server);
        assert!(hears_a_reset(&mut client).await, "the client of a server that broke");
        let (client, mut server) = joined().await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(hears_a_reset(&mut server).await, "the server of a client that broke");
    }
}
