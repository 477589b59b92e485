//! An HTTP/1.1 server that keeps every byte it hears and says exactly what it is told to.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::http::WITHIN;
use crate::wait::loopback;

/// A server on a free loopback port. Dropping it ends it.
#[derive(Debug)]
pub struct Scripted {
    /// Where it listens.
    pub address: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
    accepting: JoinHandle<()>,
}

/// One connection of it.
#[derive(Debug)]
pub struct Line {
    stream: TcpStream,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Line {
    /// Hears until what came on this connection since the last call ends with `end`; `None` where the client hung up before.
    pub async fn hear(&mut self, end: &str) -> Option<String> {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let byte = self.stream.read_u8().await.ok()?;
            text.push(byte);
            self.heard.lock().unwrap_or_else(PoisonError::into_inner).push(byte);
        }
        Some(String::from_utf8_lossy(&text).into_owned())
    }

    /// Says something.
    pub async fn say(&mut self, text: &str) {
        let _ = self.stream.write_all(text.as_bytes()).await;
    }

    /// Says nothing more, but goes on hearing.
    pub async fn fall_silent(&mut self) {
        let _ = self.stream.shutdown().await;
    }
}

impl Scripted {
    /// A server that treats each connection as `script` says.
    pub async fn start<A, F>(script: A) -> Self
    where
        A: Fn(Line) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(loopback(0)).await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let heard = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&heard);
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let _ = stream.set_nodelay(true);
                tokio::spawn(script(Line { stream, heard: Arc::clone(&kept) }));
            }
        });
        Self { address, heard, accepting }
    }

    /// A server that answers whatever head it hears with `answer`, on and on.
    pub async fn answering(answer: &'static str) -> Self {
        Self::start(move |mut line| async move {
            while line.hear("\r\n\r\n").await.is_some() {
                line.say(answer).await;
            }
        })
        .await
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// All that it has heard, on all of its connections.
    pub fn heard(&self) -> String {
        String::from_utf8_lossy(&self.heard.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Says `text` to a server or proxy over a connection of its own, and hears until the answer ends with `end`, or until
/// its end where `end` is empty.
///
/// # Errors
///
/// No connection, its early end, or no such answer within half a minute; with what was heard until then.
pub async fn dialogue(to: SocketAddr, text: &str, end: &str) -> Result<String, crate::http::Error> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    // Who has heard enough may answer and close before it has heard all.
    let _ = stream.write_all(text.as_bytes()).await;
    hear(&mut stream, end).await
}

/// Hears until what comes ends with `end`, or until its end where `end` is empty.
///
/// # Errors
///
/// As of [`dialogue`].
pub async fn hear(stream: &mut TcpStream, end: &str) -> Result<String, crate::http::Error> {
    let mut heard = Vec::new();
    let listening = async {
        let mut more = [0; 4096];
        while end.is_empty() || !heard.ends_with(end.as_bytes()) {
            // One byte at a time where an end is looked for: what comes after it stays in the stream.
            let room = if end.is_empty() { more.len() } else { 1 };
            match stream.read(&mut more[..room]).await? {
                0 if end.is_empty() => break,
                0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
                length => heard.extend_from_slice(&more[..length]),
            }
        }
        Ok(())
    };
    let done = tokio::time::timeout(WITHIN, listening).await;
    let text = String::from_utf8_lossy(&heard).into_owned();
    match done {
        Ok(Ok(())) => Ok(text),
        Ok(Err(error)) => Err(format!("{error}, after {text:?}").into()),
        Err(_) => Err(format!("not ended after {WITHIN:?}: {text:?}").into()),
    }
}
