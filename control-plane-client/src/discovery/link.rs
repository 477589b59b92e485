//! One stream to the control plane, from the first attempt to its end.

use std::pin::Pin;
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::mpsc;
use tokio::time::Sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::channel::Connector;
use crate::xds::shown;

/// One answer: 10,000 endpoints are 1.5 MiB.
const MAX_ANSWER: usize = 16 << 20;
/// From the first packet to the answer's headers.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests that the other end has not taken yet. More means that it does not read.
const MAX_UNREAD: usize = 256;

type Answers = Streaming<DeltaDiscoveryResponse>;

/// Where the stream stands.
pub(super) enum Link {
    /// Nothing was tried yet.
    Idle,
    /// Until the next attempt.
    Waiting(Pin<Box<Sleep>>),
    /// The first requests are on their way.
    Opening {
        requests: mpsc::Sender<DeltaDiscoveryRequest>,
        opened: Pin<Box<dyn Future<Output = Result<Answers, String>> + Send>>,
    },
    /// Requests go out, answers come in.
    Up { requests: mpsc::Sender<DeltaDiscoveryRequest>, answers: Box<Answers> },
}

/// What happened.
pub(super) enum Event {
    /// The wait is over.
    Retry,
    /// The stream is up.
    Opened,
    /// The control plane said something.
    Answer(Box<DeltaDiscoveryResponse>),
    /// It could not be opened, or it ended.
    Down(String),
}

impl Link {
    pub(super) fn wait(how_long: Duration) -> Self {
        Self::Waiting(Box::pin(tokio::time::sleep(how_long)))
    }

    /// Opens a stream whose first messages are `first`.
    pub(super) fn open(connector: &Connector, first: Vec<DeltaDiscoveryRequest>) -> Self {
        let (requests, outgoing) = mpsc::channel(MAX_UNREAD);
        for request in first {
            // There is room: one a kind.
            let _ = requests.try_send(request);
        }
        let connector = connector.clone();
        let opened = async move {
            let channel = connector.connect().await.map_err(|error| error.to_string())?;
            let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
            let stream = client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await;
            stream.map(tonic::Response::into_inner).map_err(said)
        };
        let opened = async move {
            let late = || format!("no answer within {} s", OPEN_TIMEOUT.as_secs());
            tokio::time::timeout(OPEN_TIMEOUT, opened).await.unwrap_or_else(|_| Err(late()))
        };
        Self::Opening { requests, opened: Box::pin(opened) }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self, Self::Up { .. })
    }

    /// Sends, where the stream is up. Before that nothing needs to be sent: opening it says everything.
    pub(super) fn send(&mut self, request: DeltaDiscoveryRequest) -> Result<(), &'static str> {
        let Self::Up { requests, .. } = self else { return Ok(()) };
        requests.try_send(request).map_err(|_| "the control plane does not read what it is sent")
    }

    /// What happens next. Safe to drop and call again.
    pub(super) async fn next(&mut self) -> Event {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Waiting(sleep) => {
                sleep.as_mut().await;
                Event::Retry
            }
            Self::Opening { requests, opened } => match opened.as_mut().await {
                Ok(answers) => {
                    *self = Self::Up { requests: requests.clone(), answers: Box::new(answers) };
                    Event::Opened
                }
                Err(reason) => Event::Down(reason),
            },
            Self::Up { answers, .. } => match answers.message().await {
                Ok(Some(response)) => Event::Answer(Box::new(response)),
                Ok(None) => Event::Down("the control plane ended the stream".to_string()),
                Err(status) => Event::Down(said(status)),
            },
        }
    }
}

fn said(status: tonic::Status) -> String {
    format!("{}: {}", status.code(), shown(status.message(), 300))
}
