//! `Expect: 100-continue`, end to end: a client's body is read, which is what tells the client to send it, once the
//! server has asked for it (RFC 9110 §10.1.1).

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::{Request, StatusCode};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::body::RequestBody;
use crate::telemetry::{Counter, Telemetry};

/// How long a server may take to ask for a body before it gets it unasked: there are servers that do not know the
/// expectation, and clients do not wait for ever either (curl for just as long).
const UNASKED: Duration = Duration::from_secs(1);

/// Ready when a body may be read.
pub type Asked = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Tells that the server has asked.
#[derive(Debug)]
pub struct Ask(oneshot::Sender<()>);

/// The two ends of the question whether the server wants the body.
pub fn ask() -> (Ask, Asked) {
    let (ask, asked) = oneshot::channel();
    let asked = async move {
        // Answered without having asked: nobody wants the body any more.
        if let Ok(Err(_)) = timeout(UNASKED, asked).await {
            std::future::pending::<()>().await;
        }
    };
    (Ask(ask), Box::pin(asked))
}

/// Listens for the 1xx answers to a request over HTTP/1.1. A 100 that was waited for opens the way for the body; hyper can
/// pass on none of the others, which are counted. Allocates: hyper takes a callback only by way of the extensions.
pub fn listen(request: &mut Request<RequestBody>, ask: Option<Ask>, telemetry: &Telemetry) {
    let dropped = telemetry.handle(Counter::InformationalDropped);
    let ask = Mutex::new(ask);
    hyper::ext::on_informational(request, move |said| {
        let waited_for = match said.status() {
            StatusCode::CONTINUE => ask.lock().unwrap_or_else(PoisonError::into_inner).take(),
            _ => None,
        };
        match waited_for {
            Some(Ask(ask)) => drop(ask.send(())),
            None => dropped.increment(1),
        }
    });
}
