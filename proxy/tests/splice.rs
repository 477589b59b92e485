//! Opaque bytes through `tcp::splice`, over real sockets.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheetbend_proxy::tcp::{EndedBy, SpliceOutcome, Transferred, splice};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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
        let (client, mut near) = connected().await;
        let (mut far, server) = connected().await;
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
    timeout(Duration::from_secs(20), future).await.expect("this should not take 20 s")
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
async fn a_reset_is_passed_on_after_the_half_close_of_whoever_sends_it() {
    let mut pair = Pair::new().await;
    pair.server.shutdown().await.unwrap();
    assert_eq!(read_all(&mut pair.client).await, b"");
    pair.server.set_zero_linger().unwrap();
    drop(std::mem::replace(&mut pair.server, connected().await.0));
    // The client, who is silent, is told all the same.
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
async fn a_side_that_does_not_read_stops_the_other() {
    let mut pair = Pair::new().await;
    let chunk = vec![1; 64 * 1024];
    let mut sent = 0u64;
    // Until nothing has moved for a second: the sockets of both connections are full, and one buffer between them.
    while let Ok(written) = timeout(Duration::from_secs(1), pair.client.write(&chunk)).await {
        sent += written.unwrap() as u64;
        assert!(sent < 64 << 20, "64 MiB went into a connection that nobody reads");
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
        timeout(Duration::from_secs(120), task).await.unwrap().unwrap();
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
