//! Documents that go on: server-sent events, as a browser's `EventSource` reads them too.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::Method;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{AskError, authority, begin, within};

/// What a client takes that wants a document that goes on.
pub const EVENT_STREAM: &str = "text/event-stream";

/// Longer than this no one event is.
const LONGEST: usize = 16 << 20;
/// Whoever serves says so at least this often; who is silent for longer is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub name: String,
    /// What it says.
    pub data: String,
}

impl Event {
    /// As it travels. Neither part has a line's end in it.
    pub fn encode(name: &str, data: &serde_json::Value) -> Bytes {
        Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
    }

    /// Nothing, said so that the other end knows that this one is there.
    pub fn nothing() -> Bytes {
        Bytes::from_static(b":\n\n")
    }

    /// What stands between two empty lines; `None` where that is nothing.
    fn decode(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let lines = text.lines().filter_map(move |line| line.strip_prefix(name)?.strip_prefix(':'));
            lines.map(|value| value.strip_prefix(' ').unwrap_or(value)).collect::<Vec<_>>()
        };
        let data = field("data");
        let name = field("event").pop().unwrap_or("message");
        (!data.is_empty()).then(|| Self { name: name.to_string(), data: data.join("\n") })
    }
}

/// Asks for a document that goes on.
///
/// # Errors
///
/// As of [`super::get`]; what comes later ends the events.
pub async fn watch(base: &str, path: &str) -> Result<Events, AskError> {
    let authority = authority(base)?;
    let mut tasks = JoinSet::new();
    let begun = begin(authority.as_str(), Method::GET, path, Bytes::new(), Some(EVENT_STREAM), &mut tasks);
    let response = within(authority.as_str(), begun).await?;
    Ok(Events { body: response.into_body(), come: BytesMut::new(), _connection: tasks })
}

/// The events of a document that goes on.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    come: BytesMut,
    _connection: JoinSet<Result<(), hyper::Error>>,
}

impl Events {
    /// The next one; `None` once there is none any more. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(end) = self.come.windows(2).position(|two| two == b"\n\n") {
                let text = String::from_utf8_lossy(&self.come[..end]).into_owned();
                self.come.advance(end + 2);
                if let Some(event) = Event::decode(&text) {
                    return Some(event);
                }
            }
            if self.come.len() > LONGEST {
                return None;
            }
            let frame = tokio::time::timeout(SILENCE, self.body.frame()).await.ok()??.ok()?;
            if let Ok(more) = frame.into_data() {
                self.come.extend_from_slice(&more);
            }
        }
    }
}

/// A body that is there already, and what is said after it.
#[derive(Debug)]
pub(super) struct Spoken {
    pub(super) whole: Bytes,
    pub(super) more: Option<mpsc::Receiver<Bytes>>,
}

impl Body for Spoken {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if !self.whole.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.whole)))));
        }
        match &mut self.more {
            Some(more) => more.poll_recv(context).map(|said| said.map(|bytes| Ok(Frame::data(bytes)))),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.whole.is_empty() && self.more.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        match self.more {
            Some(_) => SizeHint::default(),
            None => SizeHint::with_exact(self.whole.len() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use serde_json::json;
    use tokio::net::TcpListener;

    use super::super::{Answer, serve};
    use super::*;

    #[tokio::test]
    async fn what_is_said_later_reaches_whoever_watches_and_who_has_gone_is_told_nothing() {
        let (give, mut given) = mpsc::channel(1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, true, move |asked| {
            assert_eq!(asked.accept.as_deref(), Some(EVENT_STREAM));
            let (say, said) = mpsc::channel(1);
            give.try_send(say).unwrap();
            let first = Event::encode("first", &json!({"a": "line\nand another"}));
            Answer { events: Some(said), body: first, ..Answer::text(StatusCode::OK, "") }
        }));
        let mut events = watch(&base, "/breakers").await.unwrap();
        let say = given.recv().await.unwrap();
        let first = events.next().await.unwrap();
        assert_eq!((first.name.as_str(), first.data.as_str()), ("first", r#"{"a":"line\nand another"}"#));
        say.send(Event::nothing()).await.unwrap();
        // Torn apart on its way.
        let second = Event::encode("second", &json!(2));
        say.send(second.slice(..5)).await.unwrap();
        say.send(second.slice(5..)).await.unwrap();
        assert_eq!(events.next().await, Some(Event { name: "second".into(), data: "2".into() }));
        drop(events);
        say.closed().await;
    }

    #[tokio::test]
    async fn events_end_with_whoever_says_them() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, true, |_| Answer {
            events: Some(mpsc::channel(1).1),
            ..Answer::text(StatusCode::OK, "")
        }));
        assert_eq!(watch(&base, "/breakers").await.unwrap().next().await, None);
    }

    #[tokio::test]
    async fn a_connection_ends_after_its_time_unless_something_goes_on_in_it() {
        use std::sync::atomic::AtomicBool;

        let short = Duration::from_millis(5);
        super::super::lives(std::future::pending::<()>(), short, &AtomicBool::new(false)).await;
        let (ended, goes_on) = (AtomicBool::new(false), AtomicBool::new(true));
        let connection = async {
            tokio::time::sleep(short * 10).await;
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
        };
        super::super::lives(connection, short, &goes_on).await;
        assert!(ended.into_inner());
    }

    #[test]
    fn what_other_servers_write_is_read_too() {
        assert_eq!(Event::decode(": a remark"), None);
        let two = Event { name: "message".into(), data: "a\nb".into() };
        assert_eq!(Event::decode("id: 1\ndata:a\ndata: b"), Some(two));
    }
}
