//! One request and its answer, as it will be counted and logged. Counted once, when it is dropped, whatever ended it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::header::HOST;
use http::{HeaderValue, Method, Uri, Version, request};
use sheetbend_certs::{SpiffeId, format_time};

use super::body::{BodyError, Passed};
use super::error::{Causes, Error, h2_reason};
use super::headers::{TRACEPARENT, X_REQUEST_ID};
use super::known::Known;
use super::story::{Story, millis};
use crate::room::{Room, Stay};
use crate::telemetry::{AccessEntry, Counter, Edge, Flags, Outcome, Reporter, Telemetry};
use crate::traffic::layers::Call;
use crate::traffic::retry::Budget;
use crate::upstream::{EndpointState, Permit};

/// What a request takes up of its limits.
#[derive(Default)]
pub(crate) struct Permits {
    /// Of its destination, and of its route.
    outbound: [Option<Permit>; 2],
    /// At the app.
    room: Option<Room>,
}

impl Permits {
    /// So many bytes have passed through the tunnel that it is held for.
    pub(crate) fn tunnels(&self, bytes: u64) {
        if let Some(room) = &self.room {
            room.stay().tunnels(bytes);
        }
    }
}

/// What policies want to be seen of a request or a connection, in the access log and nowhere else.
pub struct Noted {
    /// The rule that audits it: `default/watched#0`.
    pub audit: Option<Arc<str>>,
    /// What would have become of it if policies that run dry were obeyed, where that is something else.
    pub dry_run: Option<Box<str>>,
}

/// What is counted when it ends.
pub struct Exchange {
    telemetry: Arc<Telemetry>,
    edge: Option<Arc<Edge>>,
    started: Instant,
    /// When the endpoint's head came.
    answered: Option<Instant>,
    facts: Facts,
    /// Status of the response.
    pub status: u16,
    /// From trailers, or from the head of an answer without a body.
    pub grpc_status: Option<u16>,
    /// Why the response is what it is.
    pub flags: Flags,
    /// Bytes of the request's body; shared with whoever sends it. `None` when there is none.
    pub request_passed: Option<Arc<Passed>>,
    /// Bytes of the response's body so far.
    pub response_bytes: u64,
    /// Attempts made.
    pub attempts: u32,
    detail: String,
    endpoint: Option<Arc<EndpointState>>,
    budget: Option<Arc<Budget>>,
    /// What policies want to be seen of it.
    pub noted: Option<Box<Noted>>,
    /// What it takes up of its limits.
    permits: Permits,
    ended: bool,
    /// What is decided for it.
    pub story: Story,
}

/// What the access log shows of a request. Cheap to keep: names and targets are shared, not copied.
struct Facts {
    reporter: Reporter,
    method: Method,
    uri: Uri,
    /// Where the target names none.
    host: Option<HeaderValue>,
    version: Version,
    request_id: Option<HeaderValue>,
    trace: Option<HeaderValue>,
    downstream: SocketAddr,
    source: Option<SpiffeId>,
}

impl Facts {
    fn authority(&self) -> &str {
        let host = || self.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or_default();
        self.uri.authority().map_or_else(host, |authority| authority.as_str())
    }
}

impl Exchange {
    /// Begins with a request as it came, its `x-request-id` made. In a box, since it goes from hand to hand.
    pub fn begin(
        telemetry: &Arc<Telemetry>,
        reporter: Reporter,
        head: &request::Parts,
        known: Known,
        (downstream, source): (SocketAddr, Option<SpiffeId>),
    ) -> Box<Self> {
        let started = Instant::now();
        Box::new(Self {
            telemetry: Arc::clone(telemetry),
            edge: None,
            started,
            answered: None,
            facts: Facts {
                reporter,
                method: head.method.clone(),
                uri: head.uri.clone(),
                host: if head.uri.authority().is_none() { head.headers.get(HOST).cloned() } else { None },
                version: head.version,
                request_id: head.headers.get(X_REQUEST_ID).cloned(),
                trace: known.has(Known::TRACE).then(|| head.headers.get(TRACEPARENT).cloned()).flatten(),
                downstream,
                source,
            },
            status: 0,
            grpc_status: None,
            flags: Flags::NONE,
            request_passed: None,
            response_bytes: 0,
            attempts: 0,
            detail: String::new(),
            endpoint: None,
            budget: None,
            noted: None,
            permits: Permits::default(),
            ended: false,
            story: Story::new(telemetry.explained().samples(started)),
        })
    }

    /// By what it is known in the requests that follow from it.
    pub fn call(&self) -> Call<'_> {
        Call { request_id: self.facts.request_id.as_ref(), trace: self.facts.trace.as_ref() }
    }

    /// When the request came.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The edge that this exchange counts on.
    pub fn on(&mut self, edge: Arc<Edge>) {
        self.edge = Some(edge);
    }

    /// The edge that this exchange counts on, unless it does on one already.
    pub fn on_if_none(&mut self, edge: impl FnOnce() -> Option<Arc<Edge>>) {
        if self.edge.is_none() {
            self.edge = edge();
        }
    }

    /// Counts in a destination's retry budget until the end.
    pub fn within(&mut self, budget: &Arc<Budget>, now: std::time::Duration) {
        budget.begin(now);
        self.budget = Some(Arc::clone(budget));
    }

    /// Takes up one of what is limited until the end.
    pub fn holding(&mut self, permit: Permit) {
        let free = self.permits.outbound.iter_mut().find(|held| held.is_none());
        debug_assert!(free.is_some(), "there are as many places as there are limits of a request");
        if let Some(free) = free {
            *free = Some(permit);
        }
    }

    /// Takes up room at the app until the end.
    pub(crate) fn in_room(&mut self, room: Option<Room>) {
        self.permits.room = room;
    }

    /// Its stay at the app, where there is room for so many only.
    pub(crate) fn stay(&self) -> Option<&Arc<Stay>> {
        self.permits.room.as_ref().map(Room::stay)
    }

    /// What it takes up, for what goes on after it.
    pub(crate) fn give_permits(&mut self) -> Permits {
        std::mem::take(&mut self.permits)
    }

    /// An attempt begins.
    pub fn attempt(&mut self, endpoint: &Arc<EndpointState>) {
        self.attempts += 1;
        self.endpoint = Some(Arc::clone(endpoint));
    }

    /// The head of the answer is here.
    pub fn answered(&mut self, status: u16, grpc_status: Option<u16>) {
        self.status = status;
        self.grpc_status = grpc_status;
        self.answered = Some(Instant::now());
    }

    /// This proxy answers in the destination's place.
    pub fn failed(&mut self, error: &Error) {
        let (status, _, flags) = error.verdict();
        self.status = status.as_u16();
        self.flags |= flags;
        self.detail = error.detail();
        if let Some(counter) = error.counter() {
            self.telemetry.count(counter);
        }
    }

    /// The whole response went to the caller.
    pub fn complete(&mut self) {
        self.ended = true;
    }

    /// The response broke off.
    pub fn body_failed(&mut self, error: &BodyError) {
        self.ended = true;
        self.flags |= match error {
            BodyError::Deadline(_) => Flags::UPSTREAM_TIMEOUT,
            BodyError::Idle { .. } | BodyError::Unread(_) => Flags::STREAM_IDLE_TIMEOUT,
            BodyError::Superseded => Flags::NONE,
            BodyError::Hyper(error) if h2_reason(error).is_some() => Flags::UPSTREAM_RESET,
            BodyError::Hyper(_) => Flags::UPSTREAM_CONNECTION_CLOSED,
        };
        let timer = match error {
            BodyError::Deadline(deadline) => Some((deadline.set_by().counter(), deadline.is_grpc().then_some(4))),
            BodyError::Idle { grpc, .. } => Some((Counter::TimeoutStreamIdle, grpc.then_some(14))),
            BodyError::Unread(_) => Some((Counter::StalledAnswer, None)),
            BodyError::Hyper(_) | BodyError::Superseded => None,
        };
        if let Some((counter, grpc_status)) = timer {
            self.telemetry.count(counter);
            self.grpc_status = grpc_status.or(self.grpc_status);
        }
        if self.facts.reporter == Reporter::Source {
            // Whoever has had the beginning of an answer cannot have another.
            self.telemetry.count(Counter::NotRetriedBegun);
        }
        self.detail = format!("the response broke off: {}", Causes(error));
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.ended {
            // Nobody said how it ended: the caller went away, and this future or body was dropped.
            self.flags |= Flags::DOWNSTREAM_CLOSED;
        }
        if let Some(budget) = &self.budget {
            budget.end();
        }
        let now = Instant::now();
        let outcome = Outcome {
            status: self.status,
            grpc_status: self.grpc_status,
            latency: now - self.started,
            request_bytes: self.request_passed.as_ref().map_or(0, |passed| passed.bytes()),
            response_bytes: self.response_bytes,
            flags: self.flags,
        };
        if let Some(edge) = &self.edge {
            edge.request(&outcome);
        }
        let failed = outcome.is_error();
        if self.telemetry.access_log().wants(failed || self.flags.is_injected() || self.noted.is_some()) {
            self.log(&outcome, now);
        }
        if failed || self.story.is_kept() {
            self.explain(&outcome);
        }
    }
}

impl Exchange {
    /// Keeps what was decided, for `/explain`.
    #[cold]
    fn explain(&mut self, outcome: &Outcome) {
        let id = self.facts.request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or_default().to_string();
        let began = SystemTime::now() - outcome.latency;
        let ended_by = self.ended_by(outcome);
        let mut record = self.story.end(self.attempts, self.endpoint.as_deref(), ended_by.clone(), outcome.latency);
        let facts = &self.facts;
        let more = serde_json::json!({
            "request_id": id,
            "at": format_time(began),
            "side": if facts.reporter == Reporter::Source { "outbound" } else { "inbound" },
            "method": facts.method.as_str(),
            // Without its query, where secrets travel.
            "path": facts.uri.path(),
            "downstream": facts.downstream.to_string(),
            "source": facts.source.as_ref().map(ToString::to_string),
            "detected": if facts.version >= Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
            "destination": self.edge.as_deref().map(|edge| &*edge.key().destination),
            "status": outcome.status,
            "grpc_status": outcome.grpc_status,
            "flags": outcome.flags.to_string(),
            "ms": millis(outcome.latency),
            "ended_by": ended_by,
        });
        if let (Some(record), serde_json::Value::Object(more)) = (record.as_object_mut(), more) {
            record.extend(more);
        }
        let at = began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        self.telemetry.explained().keep(&id, at, &record);
    }

    /// The timer or the side that ended it, in words.
    fn ended_by(&self, outcome: &Outcome) -> String {
        let headed = self.answered.is_some();
        if outcome.flags.contains(Flags::DOWNSTREAM_CLOSED) {
            let when = if headed { "in the middle of the answer" } else { "before there was an answer" };
            return format!("the caller went away {when}");
        }
        match (self.detail.is_empty(), headed) {
            (false, true) => format!("after the answer's head, {}", self.detail),
            (false, false) => format!("this proxy: {}", self.detail),
            (true, true) => "the answer's end".to_string(),
            (true, false) => "this proxy".to_string(),
        }
    }

    /// How it was asked for.
    pub fn method(&self) -> &Method {
        &self.facts.method
    }

    /// Off the usual way: a failure, something noted, or a log that wants everything.
    #[cold]
    fn log(&self, outcome: &Outcome, now: Instant) {
        let facts = &self.facts;
        let (endpoint, noted) = (self.endpoint.as_deref(), self.noted.as_deref());
        let identity = endpoint.and_then(EndpointState::identity).map(ToString::to_string).unwrap_or_default();
        let source = match facts.reporter {
            Reporter::Source => Some(self.telemetry.identity()),
            Reporter::Destination => facts.source.as_ref(),
        };
        self.telemetry.access_log().write(&AccessEntry {
            start: SystemTime::now() - outcome.latency,
            reporter: facts.reporter,
            method: facts.method.as_str(),
            path: facts.uri.path(),
            authority: facts.authority(),
            protocol: if facts.version >= Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
            status: outcome.status,
            grpc_status: outcome.grpc_status,
            flags: outcome.flags,
            detail: &self.detail,
            duration: now - self.started,
            upstream_duration: self.answered.map(|at| at - self.started),
            request_bytes: outcome.request_bytes,
            response_bytes: outcome.response_bytes,
            upstream: endpoint.and_then(EndpointState::socket_address),
            downstream: Some(facts.downstream),
            destination: self.edge.as_deref().map_or("", |edge| &edge.key().destination),
            source_identity: &source.map(ToString::to_string).unwrap_or_default(),
            destination_identity: &identity,
            request_id: facts.request_id.as_ref().and_then(|id| id.to_str().ok()).unwrap_or(""),
            attempts: self.attempts,
            audit: noted.and_then(|noted| noted.audit.as_deref()).unwrap_or_default(),
            dry_run: noted.and_then(|noted| noted.dry_run.as_deref()).unwrap_or_default(),
        });
    }
}
