//! Ten seconds each of bytes that nobody should send. The seed is fixed: what fails once fails again.

use std::io::Cursor;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use rustls::ClientConnection;
use rustls::pki_types::ServerName;
use sheetbend_tests::{App, Mesh, Sidecar, http, tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LENGTH: Duration = Duration::from_secs(10);
const MOST_MEMORY: u64 = 64 << 20;
/// Connections at a time.
const AT_ONCE: u64 = 8;

struct Pair {
    // In the order in which they end: a sidecar takes its leave of the mesh.
    caller: Sidecar,
    server: Sidecar,
    _app: App,
    _mesh: Mesh,
}

impl Pair {
    async fn start() -> Self {
        sheetbend_tests::raise_file_limit();
        let mesh = Mesh::with_control_plane(&[]);
        let app = App::saying("well\n").await;
        let server = mesh.run("server").port(app.port()).serve();
        let caller = mesh.caller("caller");
        let pair = Self { _mesh: mesh, _app: app, server, caller };
        pair.caller.first_answer("http://server/").await;
        pair
    }

    fn doors(&self) -> [SocketAddr; 2] {
        [self.caller.proxy(), self.server.inbound()]
    }

    async fn next_good_request_is_answered(&self) {
        let answer = http::get(self.caller.proxy(), "http://server/").await.expect("an answer");
        assert_eq!(answer.text(), "well\n");
    }

    /// Sends what `make` makes to both doors until the time is over; then both processes are the same, small, and serve.
    async fn survives(mut self, make: fn(&mut StdRng) -> Vec<u8>) {
        let doors = self.doors();
        let before = [self.server.process.id(), self.caller.process.id()];
        let end = Instant::now() + LENGTH;
        let mut senders = tokio::task::JoinSet::new();
        for number in 0..AT_ONCE {
            let door = doors[number as usize % doors.len()];
            senders.spawn(async move {
                let mut random = StdRng::seed_from_u64(number);
                let mut sent = 0u64;
                while Instant::now() < end {
                    let bytes = make(&mut random);
                    let patience = Duration::from_millis(random.random_range(0..20));
                    let _ = throw(door, &bytes, patience).await;
                    sent += 1;
                }
                sent
            });
        }
        let mut sent = 0;
        while let Some(count) = senders.join_next().await {
            sent += count.expect("a sender");
        }
        assert!(sent > 100, "only {sent} connections in {LENGTH:?}");
        for (sidecar, id) in [&mut self.server, &mut self.caller].into_iter().zip(before) {
            assert!(sidecar.process.is_alive() && sidecar.process.id() == id, "{}", sidecar.process.told());
            let said = sidecar.process.stderr();
            assert!(!said.contains("panicked"), "{said}");
            let resident = sidecar.process.resident();
            assert!(resident < MOST_MEMORY, "{} holds {} MiB", sidecar.service, resident >> 20);
        }
        self.next_good_request_is_answered().await;
    }
}

/// Sends the bytes, reads for a while what comes back, and goes.
async fn throw(door: SocketAddr, bytes: &[u8], patience: Duration) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(door).await?;
    let exchange = async {
        stream.write_all(bytes).await?;
        let mut answer = [0; 4096];
        while stream.read(&mut answer).await? > 0 {}
        Ok(())
    };
    tokio::time::timeout(patience, exchange).await.unwrap_or(Ok(()))
}

fn noise(random: &mut StdRng, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; random.random_range(0..most)];
    random.fill_bytes(&mut bytes);
    bytes
}

/// Changes, takes out or puts in a few bytes.
fn spoil(random: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..6) {
        if bytes.is_empty() {
            return;
        }
        let at = random.random_range(0..bytes.len());
        match random.random_range(0..4) {
            0 => bytes[at] = random.random(),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, random.random()),
            _ => bytes.truncate(at),
        }
    }
}

fn raw(random: &mut StdRng) -> Vec<u8> {
    const REQUESTS: [&str; 6] = [
        "GET http://server/ HTTP/1.1\r\nHost: server\r\n\r\n",
        "POST http://server/ HTTP/1.1\r\nHost: server\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        "POST http://server/ HTTP/1.1\r\nHost: server\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        "POST / HTTP/1.1\r\nHost: server\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
        "CONNECT server:80 HTTP/1.1\r\nHost: server:80\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ];
    if random.random_bool(0.3) {
        return noise(random, 8192);
    }
    let mut bytes = REQUESTS[random.random_range(0..REQUESTS.len())].repeat(random.random_range(1..4)).into_bytes();
    if random.random_bool(0.05) {
        bytes.truncate(bytes.len() - 2);
        bytes.extend("X-Long: ".bytes().chain(std::iter::repeat_n(b'x', 100_000)));
    }
    spoil(random, &mut bytes);
    bytes
}

fn frames(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    for _ in 0..random.random_range(1..40) {
        let mut payload = noise(random, 200);
        let kind: u8 = random.random_range(0..12);
        if kind == 1 && random.random_bool(0.5) {
            // `GET /` of `http://server`, in HPACK.
            payload = vec![0x82, 0x86, 0x84, 0x41, 0x06, b's', b'e', b'r', b'v', b'e', b'r'];
        }
        let claimed = if random.random_bool(0.9) { payload.len() as u32 } else { random.random_range(0..1 << 24) };
        bytes.extend(&claimed.to_be_bytes()[1..]);
        bytes.extend([kind, random.random()]);
        bytes.extend(random.random_range(0..9u32).to_be_bytes());
        bytes.extend(payload);
    }
    if random.random_bool(0.2) {
        spoil(random, &mut bytes);
    }
    bytes
}

fn records(random: &mut StdRng) -> Vec<u8> {
    if random.random_bool(0.3) {
        let payload = noise(random, 2000);
        let kind = [20, 21, 22, 23, 24][random.random_range(0..5)];
        let mut bytes = vec![kind, 3, random.random_range(0..5)];
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend(payload);
        return bytes;
    }
    let alpn = ["sheetbend/h2", "sheetbend/http1.1", "sheetbend/tcp", "h2"][random.random_range(0..4)];
    let config = tls::config(None, &[alpn], &[&rustls::version::TLS13]);
    let name = ServerName::try_from("80.server.default.cluster.local").expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Cursor::new(Vec::new());
    client.write_tls(&mut bytes).expect("a ClientHello");
    let mut bytes = bytes.into_inner();
    if random.random_bool(0.9) {
        spoil(random, &mut bytes);
    }
    if random.random_bool(0.5) {
        bytes.extend(noise(random, 4000));
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_seconds_of_raw_bytes_and_spoilt_requests_change_nothing() {
    Pair::start().await.survives(raw).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_seconds_of_http2_frames_change_nothing() {
    Pair::start().await.survives(frames).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_seconds_of_tls_records_change_nothing() {
    Pair::start().await.survives(records).await;
}
