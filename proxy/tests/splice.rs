//! Opaque bytes through `tcp::splice`, over real sockets.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheetbend_proxy::tcp::{EndedBy, SpliceOutcome, Transferred, splice};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A client, a server, and a splice between them.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    outcome: JoinHandle<SpliceOutcome>,
    progress: Arc<Mutex<Transferred>>,
}

impl Pair {
    async fn new() -> Self {
        Self::of(connected().await, connected().await)
    }

    fn of((client, mut near): (TcpStream, TcpStream), (mut far, server): (TcpStream, TcpStream)) -> Self {
        let progress = Arc::new(Mutex::new(Transferred::default()));
        let seen = progress.clone();
        let outcome = tokio::spawn(async move {
            splice(&mut near, &mut far, |moved| {
                let mut seen = seen.lock().unwrap();
                seen.client_to_server += moved.client_to_server;
                seen.server_to_client += moved.server_to_client;
            })
            .await
        });
        Self { client, server, outcome, progress }
    }

    async fn outcome(self) -> SpliceOutcome {
        let outcome = soon(self.outcome).await.unwrap();
        let seen = *self.progress.lock().unwrap();
        assert_eq!(seen.client_to_server, outcome.client_to_server, "what was reported on the way is what was moved");
        assert_eq!(seen.server_to_client, outcome.server_to_client);
        outcome
    }
}

/// Both ends of a TCP connection.
async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = TcpStream::connect(listener.local_addr().unwrap());
    let (dialed, accepted) = tokio::join!(dial, listener.accept());
    (dialed.unwrap(), accepted.unwrap().0)
}

async fn soon<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(60), future).await.expect("this should not take a minute")
}

async fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    soon(stream.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

#[tokio::test]
async fn a_client_that_has_said_all_still_gets_the_answer() {
    let mut pair = Pair::new().await;
    pair.client.write_all(b"question").await.unwrap();
    pair.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.server).await, b"question");
    pair.server.write_all(b"answer").await.unwrap();
    pair.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.client).await, b"answer");
    let outcome = pair.outcome().await;
    assert!(matches!(outcome.ended_by, EndedBy::Client), "{outcome:?}");
    assert_eq!((outcome.client_to_server, outcome.server_to_client), (8, 6));
}

#[tokio::test]
async fn a_server_that_has_said_all_still_hears_the_client() {
    let mut pair = Pair::new().await;
    pair.server.write_all(b"greeting").await.unwrap();
    pair.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.client).await, b"greeting");
    pair.client.write_all(b"reply").await.unwrap();
    pair.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.server).await, b"reply");
    let outcome = pair.outcome().await;
    assert!(matches!(outcome.ended_by, EndedBy::Server), "{outcome:?}");
}

#[tokio::test]
async fn a_reset_by_the_client_is_a_reset_at_the_server() {
    let mut pair = Pair::new().await;
    pair.client.write_all(b"half a mess").await.unwrap();
    let mut bytes = [0; 11];
    soon(pair.server.read_exact(&mut bytes)).await.unwrap();
    pair.client.set_zero_linger().unwrap();
    drop(std::mem::replace(&mut pair.client, connected().await.0));
    let error = soon(pair.server.read(&mut bytes)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let outcome = pair.outcome().await;
    assert!(matches!(outcome.ended_by, EndedBy::ClientBroke(_)), "{outcome:?}");
}

#[tokio::test]
async fn a_reset_by_the_server_is_a_reset_at_the_client() {
    let mut pair = Pair::new().await;
    pair.server.set_zero_linger().unwrap();
    drop(std::mem::replace(&mut pair.server, connected().await.0));
    let error = soon(pair.client.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let outcome = pair.outcome().await;
    assert!(matches!(outcome.ended_by, EndedBy::ServerBroke(_)), "{outcome:?}");
}

#[tokio::test]
async fn a_reset_by_a_side_that_nobody_reads_any_more_is_noticed_all_the_same() {
    let mut pair = Pair::new().await;
    pair.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.client).await, b"");
    pair.server.set_zero_linger().unwrap();
    drop(std::mem::replace(&mut pair.server, connected().await.0));
    // The client is silent and keeps its half open, and yet this does not last for ever.
    let outcome = pair.outcome().await;
    assert!(matches!(outcome.ended_by, EndedBy::ServerBroke(_)), "{outcome:?}");
}

#[tokio::test]
async fn an_early_refusal_of_an_upload_reaches_the_client_whole() {
    let mut pair = Pair::new().await;
    pair.client.write_all(&[7; 1000]).await.unwrap();
    pair.server.write_all(b"413 too large").await.unwrap();
    let mut answer = [0; 13];
    // Closed with bytes unread, the server's socket answers what still comes with a reset.
    drop(std::mem::replace(&mut pair.server, connected().await.0));
    soon(pair.client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"413 too large");
}

#[tokio::test]
async fn what_was_sent_right_before_a_reset_arrives_when_both_are_there_at_once() {
    let ((mut client, near), (far, mut server)) = (connected().await, connected().await);
    server.write_all(b"413 too large").await.unwrap();
    server.set_zero_linger().unwrap();
    drop(server);
    // As a task finds them that had no turn in between.
    let both = async {
        while !far.ready(Interest::READABLE).await.unwrap().is_read_closed() {
            tokio::task::yield_now().await;
        }
    };
    soon(both).await;
    let (mut near, mut far) = (near, far);
    let outcome = tokio::spawn(async move { splice(&mut near, &mut far, |_| {}).await });
    let mut answer = [0; 13];
    soon(client.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"413 too large");
    assert_eq!(soon(client.read(&mut answer)).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(matches!(soon(outcome).await.unwrap().ended_by, EndedBy::ServerBroke(_)));
}

#[tokio::test]
async fn a_side_that_does_not_read_stops_the_other() {
    let (near, far) = (connected().await, connected().await);
    for socket in [&near.0, &near.1, &far.0, &far.1].map(socket2::SockRef::from) {
        // Said, since a kernel may let them grow to any size.
        socket.set_send_buffer_size(256 * 1024).unwrap();
        socket.set_recv_buffer_size(256 * 1024).unwrap();
    }
    let mut pair = Pair::of(near, far);
    let chunk = vec![1; 64 * 1024];
    let mut sent = 0u64;
    // Until nothing has moved for a second: the sockets of both connections are full, and one buffer between them.
    while let Ok(written) = timeout(Duration::from_secs(1), pair.client.write(&chunk)).await {
        sent += written.unwrap() as u64;
        assert!(sent < 16 << 20, "16 MiB went into a connection that nobody reads");
    }
    let moved = pair.progress.lock().unwrap().client_to_server;
    assert!(moved < sent, "the last bytes wait in the client's socket");
    // The other direction is not concerned.
    pair.server.write_all(b"still there").await.unwrap();
    soon(pair.client.read_exact(&mut [0; 11])).await.unwrap();
    // And nothing is lost once the server reads.
    pair.client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.server).await.len() as u64, sent);
}

#[tokio::test]
async fn a_hundred_mebibytes_each_way_at_once_arrive_unchanged() {
    const TOTAL: usize = 100 << 20;
    let pair = Pair::new().await;
    // A prime, so that the pattern meets every offset of every buffer.
    let pattern: Arc<Vec<u8>> = Arc::new((0..65_521u32).map(|i| (i * 31) as u8).collect());
    let mut tasks = Vec::new();
    for (name, stream) in [("client", pair.client), ("server", pair.server)] {
        let (mut read, mut write) = stream.into_split();
        let expected = pattern.clone();
        let pattern = pattern.clone();
        tasks.push(tokio::spawn(async move {
            let mut left = TOTAL;
            while left > 0 {
                let len = left.min(pattern.len());
                write.write_all(&pattern[..len]).await.unwrap();
                left -= len;
            }
            write.shutdown().await.unwrap();
        }));
        tasks.push(tokio::spawn(async move {
            let mut buffer = vec![0; 256 * 1024];
            let mut at = 0;
            loop {
                let read = read.read(&mut buffer).await.unwrap();
                if read == 0 {
                    break;
                }
                for byte in &buffer[..read] {
                    assert!(*byte == expected[at % expected.len()], "{name} reads a wrong byte at {at}");
                    at += 1;
                }
            }
            assert_eq!(at, TOTAL);
        }));
    }
    for task in tasks {
        timeout(Duration::from_secs(300), task).await.unwrap().unwrap();
    }
    let outcome = soon(pair.outcome).await.unwrap();
    assert_eq!((outcome.client_to_server, outcome.server_to_client), (TOTAL as u64, TOTAL as u64));
}

#[test]
fn an_idle_splice_owns_no_buffer() {
    fn size_of_future<F>(_: impl FnOnce(&'static mut TcpStream, &'static mut TcpStream) -> F) -> usize {
        size_of::<F>()
    }
    let size = size_of_future(|client, server| splice(client, server, |_| {}));
    assert!(size <= 512, "{size} bytes a connection");
}

/// Both ends of a TLS connection, the accepting one first.
async fn secured() -> (tokio_rustls::TlsStream<TcpStream>, tokio_rustls::TlsStream<TcpStream>) {
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["web".into()]).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = rustls::pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (dialed, accepted) = connected().await;
    let accept = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let connect = tokio_rustls::TlsConnector::from(Arc::new(client));
    let (accepted, dialed) = tokio::join!(accept.accept(accepted), connect.connect("web".try_into().unwrap(), dialed));
    (accepted.unwrap().into(), dialed.unwrap().into())
}

/// Plain bytes to the first proxy, TLS to the second, plain bytes to the server: as two of our proxies carry them.
async fn through_tls() -> (TcpStream, TcpStream, JoinHandle<SpliceOutcome>, JoinHandle<SpliceOutcome>) {
    let (client, mut near) = connected().await;
    let (mut accepted, mut dialed) = secured().await;
    let (mut far, server) = connected().await;
    let first = tokio::spawn(async move { splice(&mut near, &mut dialed, |_| {}).await });
    let second = tokio::spawn(async move { splice(&mut accepted, &mut far, |_| {}).await });
    (client, server, first, second)
}

#[tokio::test]
async fn a_half_close_crosses_tls_in_both_directions() {
    for client_first in [true, false] {
        let (mut client, mut server, first, second) = through_tls().await;
        let (one, other) = if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
        one.write_all(b"question").await.unwrap();
        one.shutdown().await.unwrap();
        assert_eq!(read_all(other).await, b"question");
        other.write_all(b"answer").await.unwrap();
        other.shutdown().await.unwrap();
        assert_eq!(read_all(one).await, b"answer");
        for outcome in [soon(first).await.unwrap(), soon(second).await.unwrap()] {
            assert!(matches!(outcome.ended_by, EndedBy::Client) == client_first, "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn a_reset_crosses_tls_and_is_never_an_orderly_end() {
    let (mut client, server, first, second) = through_tls().await;
    server.set_zero_linger().unwrap();
    drop(server);
    let error = soon(client.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    for outcome in [soon(first).await.unwrap(), soon(second).await.unwrap()] {
        assert!(matches!(outcome.ended_by, EndedBy::ServerBroke(_)), "{outcome:?}");
    }
}

#[tokio::test]
async fn tls_that_is_cut_off_without_a_close_notify_is_a_reset_too() {
    let (mut accepted, dialed) = secured().await;
    let (mut client, mut near) = connected().await;
    let splicing = tokio::spawn(async move {
        let mut dialed = dialed;
        splice(&mut near, &mut dialed, |_| {}).await
    });
    accepted.write_all(b"all but the").await.unwrap();
    accepted.flush().await.unwrap();
    soon(client.read_exact(&mut [0; 11])).await.unwrap();
    accepted.get_mut().0.shutdown().await.unwrap(); // FIN, as anybody on the way can send it.
    let error = soon(client.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(matches!(soon(splicing).await.unwrap().ended_by, EndedBy::ServerBroke(_)));
}

#[tokio::test]
async fn a_hundred_mebibytes_cross_tls_unharmed_and_nothing_lingers_unflushed() {
    let (mut client, mut server, first, second) = through_tls().await;
    const TOTAL: usize = 100 << 20;
    let send = tokio::spawn(async move {
        let chunk = vec![7; 65_521];
        let mut left = TOTAL;
        while left > 0 {
            client.write_all(&chunk[..left.min(chunk.len())]).await.unwrap();
            left -= left.min(chunk.len());
        }
        client // Open, so that only a flush brings the last bytes out.
    });
    let mut buffer = vec![0; 256 * 1024];
    let mut left = TOTAL;
    while left > 0 {
        left -= timeout(Duration::from_secs(60), server.read(&mut buffer)).await.unwrap().unwrap();
    }
    drop(soon(send).await.unwrap());
    drop(server);
    assert_eq!(soon(first).await.unwrap().client_to_server, TOTAL as u64);
    assert_eq!(soon(second).await.unwrap().client_to_server, TOTAL as u64);
}
