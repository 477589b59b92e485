//! What HTTP/2 promises its users, through two sidecars: resets and goodbyes keep their meaning.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use h2::Reason;
use h2::client::SendRequest;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use sheetbend_tests::{Mesh, START, Sidecar, eventually};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};

/// What the server does with a stream, by its path.
async fn treat(request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>, story: Story) {
    let head = |end| (Response::new(()), end);
    match request.uri().path() {
        "/reset" => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
        "/reset-later" => {
            let (response, end) = head(false);
            let mut body = respond.send_response(response, end).expect("a stream");
            body.send_data(Bytes::from_static(b"half"), false).expect("a stream");
            story.half_read.notified().await;
            body.send_reset(Reason::INTERNAL_ERROR);
        }
        "/hold" => {
            story.held.send_replace(Held::Yes);
            let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            story.held.send_replace(Held::Ended(reason.ok()));
        }
        _ => {
            let (response, end) = head(false);
            let mut body = respond.send_response(response, end).expect("a stream");
            body.send_data(Bytes::from_static(b"well\n"), false).expect("a stream");
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", http::HeaderValue::from_static("42"));
            body.send_trailers(trailers).expect("a stream");
        }
    }
}

/// What becomes of the stream that is held.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    NotYet,
    Yes,
    /// And why it ended.
    Ended(Option<Reason>),
}

/// What the server and the story tell each other.
#[derive(Clone)]
struct Story {
    held: watch::Sender<Held>,
    /// The client has got the first half of the answer that is to be reset.
    half_read: Arc<Notify>,
}

struct Server {
    port: u16,
    story: Story,
    connections: Arc<AtomicU32>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Server {
    /// Says goodbye on a connection after so many streams; the streams that come meanwhile are not served.
    async fn start(streams: Option<u32>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let story = Story { held: watch::Sender::new(Held::NotYet), half_read: Arc::default() };
        let told = story.clone();
        let connections = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&connections);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (told, count) = (told.clone(), Arc::clone(&count));
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                    count.fetch_add(1, Ordering::Relaxed);
                    let mut served = 0;
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(treat(request, respond, told.clone()));
                        served += 1;
                        if streams == Some(served) {
                            connection.graceful_shutdown();
                        }
                    }
                });
            }
        });
        Self { port, story, connections, accepting }
    }
}

async fn client(proxy: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(proxy).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn ask(path: &str) -> Request<()> {
    Request::get(format!("http://server{path}")).body(()).unwrap()
}

async fn pair(server: &Server) -> (Mesh, Sidecar, Sidecar) {
    let mesh = Mesh::with_control_plane(&[]);
    let sidecar = mesh.run("server").port(server.port).serve();
    let caller = mesh.caller("caller");
    let proxy = caller.proxy();
    eventually("the server is known", START, || async {
        let mut sender = client(proxy).await.ready().await.ok()?;
        let (response, _) = sender.send_request(ask("/"), true).ok()?;
        response.await.ok().filter(|response| response.status() == 200)
    })
    .await;
    (mesh, sidecar, caller)
}

/// Reads a body to its end or its reset.
async fn read(mut body: h2::RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        let _ = body.flow_control().release_capacity(data.len());
        all.extend_from_slice(&data);
    }
    Ok((all, body.trailers().await?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_s_reset_reaches_the_client_with_its_reason_and_a_client_s_the_server() {
    let server = Server::start(None).await;
    let (_mesh, _sidecar, caller) = pair(&server).await;
    let mut sender = client(caller.proxy()).await.ready().await.unwrap();

    let (response, _) = sender.send_request(ask("/"), true).unwrap();
    let (body, trailers) = read(response.await.unwrap().into_body()).await.unwrap();
    assert_eq!((body.as_slice(), trailers.unwrap()["x-sum"].to_str().unwrap()), (&b"well\n"[..], "42"));

    // Reset in the middle of an answer: there is nothing to say but the same reset.
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(ask("/reset-later"), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "half");
    server.story.half_read.notify_one();
    let error = read(body).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::INTERNAL_ERROR), "{error}");

    // Before any answer, the proxy answers, and says why.
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(ask("/reset"), true).unwrap();
    match response.await {
        Ok(response) => {
            assert_eq!(response.status(), 502);
            let said = response.headers()["proxy-status"].to_str().unwrap().to_string();
            assert!(said.contains("connection_terminated"), "{said}");
        }
        Err(error) => assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM), "{error}"),
    }

    // The client gives up a request that the server holds.
    let mut sender = sender.ready().await.unwrap();
    let (response, mut stream) = sender.send_request(ask("/hold"), true).unwrap();
    let mut held = server.story.held.subscribe();
    let begun = tokio::time::timeout(START, held.wait_for(|held| *held != Held::NotYet));
    assert_eq!(*begun.await.expect("the server has it").unwrap(), Held::Yes);
    stream.send_reset(Reason::CANCEL);
    drop(response);
    let ended = tokio::time::timeout(START, held.wait_for(|held| *held != Held::Yes));
    assert_eq!(*ended.await.expect("the server hears of it").unwrap(), Held::Ended(Some(Reason::CANCEL)));

    // None of this has cost the connection anything.
    let mut sender = sender.ready().await.unwrap();
    let (response, _) = sender.send_request(ask("/"), true).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_says_goodbye_again_and_again_costs_no_request() {
    let server = Server::start(Some(7)).await;
    let (_mesh, _sidecar, caller) = pair(&server).await;
    let before = server.connections.load(Ordering::Relaxed);
    let sender = client(caller.proxy()).await;
    // Three at a time: however long anybody is held up, no more of them have to be sent again at once than may be.
    let turns = Arc::new(Semaphore::new(3));
    let mut asking = tokio::task::JoinSet::new();
    for number in 0..200 {
        let (sender, turns) = (sender.clone(), Arc::clone(&turns));
        asking.spawn(async move {
            let _turn = turns.acquire().await.map_err(|e| e.to_string())?;
            let mut sender = sender.ready().await.map_err(|e| e.to_string())?;
            let (response, _) = sender.send_request(ask("/"), true).map_err(|e| e.to_string())?;
            let response = response.await.map_err(|e| format!("{number}: {e}"))?;
            let status = response.status();
            let (body, _) = read(response.into_body()).await.map_err(|e| format!("{number}: {e}"))?;
            if status == 200 && body == b"well\n" { Ok(()) } else { Err(format!("{number}: {status}")) }
        });
    }
    while let Some(asked) = asking.join_next().await {
        asked.unwrap().unwrap_or_else(|e| panic!("{e}"));
    }
    let connections = server.connections.load(Ordering::Relaxed) - before;
    assert!(connections >= 10, "{connections} connections: goodbyes were heard");
}
