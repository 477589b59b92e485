//! Everything that can end a request before its destination has answered, and the one table that makes a response of it.
//!
//! Statuses and error words are those that RFC 9209 §2.3 recommends, the flags Envoy's.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_LENGTH;
use http::{HeaderValue, Method, Response, StatusCode};
use hyper::body::Body;
use sheetbend_control_plane_client::model::Target;

use super::body::ResponseBody;
use super::deadline::SetBy;
use super::headers::{self, PROXY_STATUS, UNSENT};
use crate::policy::authz::{Ambiguous, Denied};
use crate::policy::tokens::BadToken;
use crate::policy::{Abort, Unrouted};
use crate::telemetry::{Counter, Flags};
use crate::traffic::limit::Limit;
use crate::traffic::shed::Shed;
use crate::upstream::{DialError, Place};

/// What is wrong with the request itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not HTTP as the RFCs want it.
    Malformed(&'static str),
    /// Could be read as two different messages (RFC 9112 §11.2).
    Smuggling(&'static str),
    /// A policy looks at what servers could read in several ways.
    Ambiguous(Ambiguous),
}

/// Whether another attempt could pay twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processed {
    /// Provably not: connect failure, unsent, REFUSED_STREAM, above a GOAWAY's last stream, or the peer says so.
    No(Counter),
    /// Nobody knows.
    Maybe,
}

/// Why there is no answer from the destination.
#[derive(Debug)]
pub enum Error {
    /// The caller's fault.
    Refused(Refusal),
    /// No control plane has said where the target is.
    NoAnswer(Target),
    /// Not a mesh destination, and nothing else may be called.
    NotAllowed(Target),
    /// The destination has no endpoint.
    NoEndpoint(String),
    /// A limit of ours is reached.
    Overflow {
        /// Which.
        limit: Limit,
        /// Whose: a destination, an endpoint, or a route.
        of: Box<str>,
    },
    /// More requests came than may in that time.
    RateLimited {
        /// Which limit says so.
        by: Arc<str>,
        /// When one may come again.
        after: Duration,
        /// What it counts as.
        side: Counter,
    },
    /// The app has enough to do.
    Shed(Shed),
    /// The destination's circuit breaker lets nothing through for so long.
    CircuitOpen(Target, Duration),
    /// The endpoint could not be reached.
    Connect {
        /// Which.
        endpoint: Place,
        /// Why.
        source: DialError,
    },
    /// The connection broke, or the stream was reset, before there was an answer.
    Broken {
        /// Which.
        endpoint: Place,
        /// What broke.
        source: hyper::Error,
        /// What is known of the request's fate.
        processed: Processed,
    },
    /// It was asked in HTTP/2, and has never spoken it.
    NotHttp2(Place),
    /// Its answer cannot be passed on: what is wrong with it.
    BadAnswer(Place, &'static str),
    /// The request's deadline has passed; who set it.
    Deadline(SetBy),
    /// One attempt had no answer within the time that the route gives an attempt.
    TooSlow {
        /// Who was asked.
        endpoint: Place,
        /// The time.
        within: Duration,
        /// What is known of the request's fate.
        processed: Processed,
    },
    /// Nothing moved for so long.
    Idle(Duration),
    /// The caller kept the app waiting for so long, while others waited for its room there.
    Stalled(Duration),
    /// The caller may not.
    Denied(Denied),
    /// It shows a token that is not to be believed.
    Token(BadToken),
    /// The request would come back to this proxy.
    Loop(SocketAddr),
    /// Nobody knows where the connection was going before it came to this listener.
    NotRedirected(SocketAddr),
    /// This proxy's own connection was redirected to itself.
    OwnConnection {
        /// Where it was going.
        to: SocketAddr,
        /// The user that this proxy runs as.
        user: u32,
    },
    /// No rule takes the request, or one that has nothing for it.
    NoRule(Target),
    /// Routes of connections lead this one nowhere.
    Unrouted(Target, Unrouted),
    /// Somebody wants to see what callers make of this.
    Injected(Box<Abort>),
    /// This proxy has no valid certificate of its own.
    NoIdentity,
}

impl Error {
    /// A limit of ours is reached.
    pub fn overflow(limit: Limit, of: impl fmt::Display) -> Self {
        Self::Overflow { limit, of: of.to_string().into() }
    }

    /// An endpoint that could not be reached.
    pub fn unreachable(endpoint: Place, why: DialError) -> Self {
        if let Some(limit) = why.limit() {
            return Self::overflow(limit, &endpoint);
        }
        match why {
            DialError::Loop(own) => Self::Loop(own),
            DialError::First(why) | DialError::Shared(why) => match *why {
                DialError::Loop(own) => Self::Loop(own),
                _ => Self::Connect { endpoint, source: DialError::Shared(why) },
            },
            source => Self::Connect { endpoint, source },
        }
    }

    /// Whether the request may have been processed.
    pub fn processed(&self) -> Processed {
        match self {
            Self::Connect { .. } => Processed::No(Counter::RetriedConnect),
            Self::Shed(_) => Processed::No(Counter::RetriedShed),
            Self::Broken { processed, .. } | Self::TooSlow { processed, .. } => *processed,
            Self::Refused(_)
            | Self::NoAnswer(_)
            | Self::NotAllowed(_)
            | Self::NoEndpoint(_)
            | Self::Overflow { .. }
            | Self::RateLimited { .. }
            | Self::CircuitOpen(..)
            | Self::Deadline(_)
            | Self::Idle(_)
            | Self::Stalled(_)
            | Self::NotHttp2(_)
            | Self::BadAnswer(..)
            | Self::Denied(_)
            | Self::Token(_)
            | Self::Loop(_)
            | Self::NotRedirected(_)
            | Self::OwnConnection { .. }
            | Self::NoRule(_)
            | Self::Unrouted(..)
            | Self::Injected(_)
            | Self::NoIdentity => Processed::Maybe,
        }
    }

    /// Status, RFC 9209's error word, and response flags.
    pub fn verdict(&self) -> (StatusCode, &'static str, Flags) {
        match self {
            Self::Refused(_) => (StatusCode::BAD_REQUEST, "http_request_error", Flags::DOWNSTREAM_PROTOCOL_ERROR),
            Self::NoAnswer(_) => (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable", Flags::NO_DISCOVERY),
            Self::NotAllowed(_) => (StatusCode::BAD_GATEWAY, "destination_ip_prohibited", Flags::NO_ROUTE),
            Self::NoEndpoint(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable", Flags::NO_HEALTHY_UPSTREAM)
            }
            Self::RateLimited { .. } => (StatusCode::TOO_MANY_REQUESTS, "http_request_denied", Flags::RATE_LIMITED),
            Self::Overflow { .. } | Self::Shed(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_limit_reached", Flags::UPSTREAM_OVERFLOW)
            }
            Self::CircuitOpen(..) => (StatusCode::SERVICE_UNAVAILABLE, "destination_unavailable", Flags::CIRCUIT_OPEN),
            Self::Connect { source, .. } => source.verdict(),
            Self::Broken { source, .. } if h2_reason(source).is_some() => {
                (StatusCode::BAD_GATEWAY, "connection_terminated", Flags::UPSTREAM_RESET)
            }
            Self::NotHttp2(_) | Self::BadAnswer(..) => {
                (StatusCode::BAD_GATEWAY, "http_protocol_error", Flags::UPSTREAM_PROTOCOL_ERROR)
            }
            Self::Broken { source, .. } if source.is_parse() => {
                (StatusCode::BAD_GATEWAY, "http_protocol_error", Flags::UPSTREAM_PROTOCOL_ERROR)
            }
            Self::Broken { .. } => {
                (StatusCode::BAD_GATEWAY, "connection_terminated", Flags::UPSTREAM_CONNECTION_CLOSED)
            }
            Self::Deadline(_) | Self::TooSlow { .. } => {
                (StatusCode::GATEWAY_TIMEOUT, "http_response_timeout", Flags::UPSTREAM_TIMEOUT)
            }
            Self::Idle(_) => (StatusCode::GATEWAY_TIMEOUT, "connection_read_timeout", Flags::STREAM_IDLE_TIMEOUT),
            Self::Stalled(_) => (StatusCode::REQUEST_TIMEOUT, "http_request_error", Flags::STREAM_IDLE_TIMEOUT),
            Self::Token(_) => (StatusCode::UNAUTHORIZED, "http_request_denied", Flags::DENIED),
            Self::Denied(_) => (StatusCode::FORBIDDEN, "http_request_denied", Flags::DENIED),
            Self::Loop(_) | Self::NotRedirected(_) | Self::OwnConnection { .. } => {
                (StatusCode::LOOP_DETECTED, "proxy_loop_detected", Flags::LOOP)
            }
            // HTTPRouteRule: "a HTTP 404 status code MUST be returned".
            Self::NoRule(_) => (StatusCode::NOT_FOUND, "destination_not_found", Flags::NO_ROUTE),
            Self::Unrouted(..) => (StatusCode::BAD_GATEWAY, "destination_not_found", Flags::NO_ROUTE),
            Self::Injected(abort) => {
                let status = StatusCode::from_u16(abort.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                (status, "proxy_internal_response", Flags::FAULT_INJECTED)
            }
            Self::NoIdentity => (StatusCode::SERVICE_UNAVAILABLE, "tls_certificate_error", Flags::NO_IDENTITY),
        }
    }

    /// The counter that says how often this proxy answered for this reason; none where another counter has said it.
    pub fn counter(&self) -> Option<Counter> {
        match self {
            Self::Refused(Refusal::Malformed(_)) => Some(Counter::MalformedRequest),
            Self::Refused(Refusal::Smuggling(_)) => Some(Counter::Smuggling),
            Self::Refused(Refusal::Ambiguous(_)) => Some(Counter::AmbiguousRequest),
            Self::NoAnswer(_) => Some(Counter::RejectedNoDiscovery),
            Self::NotAllowed(_) => Some(Counter::RefusedPolicy),
            Self::NoEndpoint(_) => Some(Counter::RejectedNoEndpoint),
            Self::Overflow { limit, .. } => Some(Counter::overflow(*limit)),
            Self::RateLimited { side, .. } => Some(*side),
            Self::Shed(Shed::Full) => Some(Counter::ShedFull),
            Self::Shed(Shed::Waited) => Some(Counter::ShedWaited),
            Self::Shed(Shed::Late) => Some(Counter::ShedLate),
            Self::CircuitOpen(..) => Some(Counter::CircuitRejected),
            Self::Denied(why) => Some(why.counter()),
            Self::Token(_) => Some(Counter::RefusedToken),
            Self::Loop(_) | Self::OwnConnection { .. } => Some(Counter::RefusedLoop),
            Self::NotRedirected(_) => Some(Counter::RefusedNotRedirected),
            Self::NoRule(_) => Some(Counter::RejectedNoRule),
            Self::Unrouted(..) => Some(Counter::RefusedNoRoute),
            Self::Injected(_) => Some(Counter::FaultAbort),
            Self::NoIdentity => Some(Counter::RefusedNoIdentity),
            Self::Connect { source, .. } => source.counter(),
            Self::Deadline(set_by) => Some(set_by.counter()),
            Self::NotHttp2(_) => Some(Counter::RejectedNotHttp2),
            Self::Idle(_) => Some(Counter::TimeoutStreamIdle),
            Self::Stalled(_) => Some(Counter::StalledRequest),
            // Each attempt has counted for itself.
            Self::Broken { .. } | Self::BadAnswer(..) | Self::TooSlow { .. } => None,
        }
    }

    /// What the log says of it, which may be more than a caller is told.
    pub fn detail(&self) -> String {
        match self {
            Self::Denied(why) => format!("{self}: {why}"),
            Self::Token(why) => format!("{self}: {why}"),
            Self::RateLimited { by, .. } => format!("{self}: {by}"),
            other => other.to_string(),
        }
    }

    /// The answer to a `HEAD`, and with a status that has no body: nothing of it but its head (RFC 9110 §9.3.2, §6.4.1).
    pub fn respond_to(&self, method: &Method, grpc: bool, to_peer: bool) -> Response<ResponseBody> {
        let mut response = self.respond(grpc, to_peer);
        let no_body = matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        if *method == Method::HEAD || no_body {
            let body = std::mem::replace(response.body_mut(), ResponseBody::empty());
            if let Some(length) = body.size_hint().exact().filter(|_| !no_body) {
                response.headers_mut().insert(CONTENT_LENGTH, length.into());
            }
        }
        response
    }

    /// The response that tells the caller, in gRPC's form to a gRPC call. `unsent` is told to a mesh peer only.
    fn respond(&self, grpc: bool, to_peer: bool) -> Response<ResponseBody> {
        let (status, word, _) = self.verdict();
        let mut response = if grpc {
            self.grpc_response()
        } else {
            let mut response = Response::new(ResponseBody::text(format!("sheetbend: {self}\n")));
            *response.status_mut() = status;
            response
                .headers_mut()
                .insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
            response
        };
        let headers = response.headers_mut();
        // The details hold no more than what the body says, quoted as an sf-string (RFC 8941 §3.3.3).
        let quoted: String =
            self.to_string().chars().filter(|c| matches!(c, ' '..='~') && !"\"\\".contains(*c)).collect();
        if let Ok(value) = HeaderValue::try_from(format!("sheetbend; error={word}; details=\"{quoted}\"")) {
            headers.insert(PROXY_STATUS, value);
        }
        if to_peer && matches!(self.processed(), Processed::No(_)) {
            let shed = matches!(self, Self::Shed(_));
            headers.insert(UNSENT, if shed { headers::SHED } else { HeaderValue::from_static("?1") });
        }
        if to_peer && matches!(self, Self::NotHttp2(_)) {
            headers.insert(UNSENT, headers::NOT_HTTP2);
        }
        self.say_when(headers);
        if matches!(self, Self::Token(_)) {
            // RFC 6750 §3: which of them it was helps nobody but a stranger.
            headers.insert(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer error=\"invalid_token\""));
        }
        if matches!(self, Self::Refused(_) | Self::Stalled(_)) {
            // Where such a message ends, nobody can be sure. (HTTP/2 frames its messages; hyper leaves this out there.)
            headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// When to come again: in whole seconds, so that whoever waits for them does not wait in vain. Also as
    /// draft-ietf-httpapi-ratelimit-headers says it, which wants a name for the limit; which of them it was is for the log.
    fn say_when(&self, headers: &mut http::HeaderMap) {
        let seconds = match self {
            Self::RateLimited { after, .. } | Self::CircuitOpen(_, after) => {
                after.as_secs() + u64::from(after.subsec_nanos() > 0)
            }
            Self::Shed(_) => 1,
            _ => return,
        };
        headers.insert(http::header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        if matches!(self, Self::RateLimited { .. })
            && let Ok(value) = HeaderValue::try_from(format!("\"limit\";r=0;t={}", seconds.max(1)))
        {
            headers.insert("ratelimit", value);
        }
    }

    /// A trailers-only answer with the gRPC status that gRPC's own mapping of HTTP statuses gives.
    fn grpc_response(&self) -> Response<ResponseBody> {
        let mut response = Response::new(ResponseBody::empty());
        *response.headers_mut() = self.grpc_status();
        response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        response
    }

    /// How a gRPC call ends that ends for this reason.
    pub fn grpc_status(&self) -> http::HeaderMap {
        let code = match self {
            Self::Refused(_) => "13",
            Self::Denied(_) => "7",
            Self::Token(_) => "16",
            Self::Deadline(_) | Self::TooSlow { .. } => "4",
            Self::NoRule(_) => "12",
            Self::RateLimited { .. } => "8",
            _ => "14",
        };
        let mut headers = http::HeaderMap::new();
        let code = match self {
            Self::Injected(abort) => abort.grpc.map(HeaderValue::from),
            _ => None,
        }
        .unwrap_or(HeaderValue::from_static(code));
        headers.insert("grpc-status", code);
        // Percent-encoding of grpc-message leaves printable ASCII but `%` as it is.
        let message: String =
            self.to_string().chars().map(|c| if matches!(c, ' '..='~') && c != '%' { c } else { '?' }).collect();
        if let Ok(value) = HeaderValue::try_from(message) {
            headers.insert("grpc-message", value);
        }
        headers
    }
}

/// The HTTP/2 error code behind a failure, when the peer reset the stream or said goodbye.
pub fn h2_reason(error: &(dyn std::error::Error + 'static)) -> Option<h2::Reason> {
    h2_error(error).and_then(h2::Error::reason)
}

/// The h2 error behind a failure.
pub fn h2_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a h2::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(h2) = error.downcast_ref::<h2::Error>() {
            return Some(h2);
        }
        cause = error.source();
    }
    None
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(Refusal::Ambiguous(what)) => write!(f, "the request is ambiguous: {what}"),
            Self::Refused(Refusal::Malformed(what)) => write!(f, "the request is malformed: {what}"),
            Self::Refused(Refusal::Smuggling(what)) => {
                write!(f, "the request has {what}; it could be read as two different messages")
            }
            Self::NoAnswer(target) => write!(f, "the control plane has not said where {target} is"),
            Self::NotAllowed(target) => {
                write!(f, "{target} is not in the mesh, and outboundPolicy Deny allows nothing else")
            }
            Self::NoEndpoint(cluster) => write!(f, "{cluster} has no endpoint"),
            Self::RateLimited { .. } => f.write_str("the rate limit is reached"),
            Self::Shed(Shed::Full) => f.write_str("the app has as many requests as it may have at once"),
            Self::Shed(Shed::Waited) => f.write_str("no room at the app came free in time"),
            Self::Shed(Shed::Late) => f.write_str("the deadline passed before there was room at the app"),
            Self::Overflow { limit, of } => write!(f, "the limit of {limit} is reached for {of}"),
            Self::CircuitOpen(target, _) => write!(f, "the circuit breaker of {target} is open"),
            Self::Connect { endpoint, source } => write!(f, "cannot connect to {endpoint}: {source}"),
            Self::Broken { endpoint, source, .. } => {
                write!(f, "the connection to {endpoint} broke before an answer: {}", Causes(source))
            }
            Self::NotHttp2(at) => write!(
                f,
                "the request is HTTP/2, and {at} does not speak it: call it in HTTP/1.1, or give its port as --port PORT/http, so \
                 that it gets HTTP/1.1 (gRPC needs HTTP/2)"
            ),
            Self::BadAnswer(at, what) => write!(f, "the answer of {at} has {what}"),
            Self::Deadline(set_by) => write!(f, "{set_by} has passed"),
            Self::TooSlow { endpoint, within, .. } => {
                write!(f, "no answer of {endpoint} within {within:?} (timeouts.backendRequest)")
            }
            Self::Idle(time) => write!(f, "nothing moved for {time:?} (stream-idle-timeout)"),
            Self::Stalled(time) => {
                write!(f, "the app waited too long for the rest of the request: more than {time:?} (stallTimeout)")
            }
            Self::Token(_) => f.write_str("the token is not valid"),
            Self::Denied(_) => f.write_str("the caller is not allowed"),
            Self::Loop(own) => write!(f, "{own} is this proxy itself"),
            Self::NotRedirected(own) => write!(
                f,
                "{own} is this proxy itself, which takes redirected connections only: this one came to it directly, or the \
                 kernel does not track connections (nf_conntrack)"
            ),
            Self::OwnConnection { to, user } => write!(
                f,
                "on its way to {to}, a connection of this proxy was caught for this proxy: it must run as the user that \
                 `sheetbend intercept --proxy-uid` lets through, and it runs as user {user}"
            ),
            Self::NoRule(target) => write!(f, "no rule of a route to {target} takes this request"),
            Self::Unrouted(target, why) => write!(f, "a connection to {target} goes nowhere: {why}"),
            Self::Injected(abort) => write!(f, "the FaultInjection {} failed this request on purpose", abort.by),
            Self::NoIdentity => f.write_str("this proxy has no valid certificate"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            // hyper reads the HTTP/2 error code from this chain, so that a reset is passed on with its meaning.
            Self::Broken { source, .. } => Some(source),
            Self::Connect { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// An error with its causes: `a: b: c`.
pub struct Causes<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
