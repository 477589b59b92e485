//! One request, one answer: attempts, retries, and what is counted. Outbound and inbound share it.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use http::header::{CONNECTION, RETRY_AFTER, UPGRADE};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, request};
use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::upgrade::OnUpgrade;
use sheetbend_certs::IdentityStore;
use sheetbend_control_plane_client::model::{MOST_ATTEMPTS, Retry, Transport};
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{sleep, timeout, timeout_at};

use crate::admission::RouteLimits;
use crate::http::body::{Keeper, Passed, Passing, RequestBody, ResponseBody};
use crate::http::deadline::Deadline;
use crate::http::error::{Error, Processed, Refusal};
use crate::http::exchange::Exchange;
use crate::http::expect::{self, Ask};
use crate::http::headers::{self, ATTEMPTS, GRPC_ATTEMPTS, GRPC_STATUS, IN_VAIN, PROXY_STATUS, SENT_VERSION, UNSENT};
use crate::http::idle::Idle;
use crate::http::known::Known;
use crate::http::upgrade;
use crate::rest::Rest;
use crate::tcp::Transferred;
use crate::telemetry::{Counter, Protocol, Telemetry};
use crate::traffic::limit::Limit;
use crate::traffic::outlier::Fault;
use crate::traffic::retry::{self, Failure, Verdict};
use crate::upstream::{Checkout, DialError, EndpointState, Lease, Permit, Pool, Reuse, SendError, Stage, Wire};

/// What an attempt needs beside the request.
pub(crate) struct Way<'a> {
    pub(crate) pool: &'a Arc<Pool>,
    pub(crate) identity: &'a Arc<IdentityStore>,
    pub(crate) telemetry: &'a Arc<Telemetry>,
}

/// A request on its way: the head as it will be sent, the body as often as it can be.
pub(crate) struct Outgoing<'a> {
    /// Not moved in: every byte of a request's future is copied more than once.
    pub(crate) head: &'a mut request::Parts,
    pub(crate) authority: Authority,
    /// The version the caller spoke.
    pub(crate) sent: Version,
    pub(crate) body: Body1,
    /// What passed of it, where there is one.
    pub(crate) passed: Option<Arc<Passed>>,
    pub(crate) upgrade: bool,
    /// When the caller no longer cares.
    pub(crate) deadline: Option<Deadline>,
    /// There is one attempt, which takes the head with it.
    pub(crate) once: bool,
    /// Whether the latest attempt had a connection that was there before.
    pub(crate) reused: Option<bool>,
    /// Attempts made so far, but for the one under way.
    pub(crate) before: u32,
    /// It follows from a request that was a retry itself.
    pub(crate) follows_a_retry: bool,
    /// A gRPC call of which it matters how it ends, should it end before there is anything of its answer.
    pub(crate) heeds_end: bool,
    /// Those of its route.
    pub(crate) limits: Option<&'a RouteLimits>,
}

/// The request's body.
pub(crate) enum Body1 {
    None,
    Kept(Keeper),
    Once(Option<(Incoming, Passing)>),
    WhenAsked(Option<(Incoming, Passing)>),
}

/// How a body may be sent.
pub(crate) enum Sending {
    /// More than once, while it is short.
    Again,
    /// Once.
    Once,
    /// Once, and only when the server asks for it.
    WhenAsked,
}

impl Body1 {
    /// `exchange` hears how many bytes pass.
    pub(crate) fn new(head: &mut request::Parts, body: Incoming, sending: Sending, exchange: &mut Exchange) -> Self {
        if body.is_end_stream() {
            return Self::None;
        }
        let passing: Passing = head.extensions.remove().unwrap_or_default();
        exchange.request_passed = Some(Arc::clone(&passing.passed));
        match sending {
            Sending::Again => Self::Kept(Keeper::new(body, passing)),
            Sending::Once => Self::Once(Some((body, passing))),
            Sending::WhenAsked => Self::WhenAsked(Some((body, passing))),
        }
    }

    fn attempt(&mut self) -> Option<(RequestBody, Option<Ask>)> {
        let body = match self {
            Self::None => Some(RequestBody::Empty),
            Self::Kept(keeper) => keeper.attempt(),
            Self::Once(body) => body.take().map(|(body, passing)| RequestBody::Streamed(body, passing)),
            Self::WhenAsked(body) => {
                let (ask, asked) = expect::ask();
                let body = body.take().map(|(body, passing)| RequestBody::Asked(asked, body, passing));
                return body.map(|body| (body, Some(ask)));
            }
        };
        body.map(|body| (body, None))
    }

    /// Whether all of it has passed, and is at hand.
    fn is_complete(&self) -> bool {
        match self {
            Self::None => true,
            Self::Kept(keeper) => keeper.is_complete(),
            Self::Once(_) | Self::WhenAsked(_) => false,
        }
    }

    pub(crate) fn is_whole(&self) -> bool {
        match self {
            Self::None => true,
            Self::Kept(keeper) => keeper.is_whole(),
            Self::Once(body) | Self::WhenAsked(body) => body.is_some(),
        }
    }
}

/// What the edge shows of a request.
pub(crate) fn protocol(head: &request::Parts, known: Known) -> Protocol {
    match head.version {
        _ if known.has(Known::GRPC) => Protocol::Grpc,
        Version::HTTP_2 => Protocol::Http2,
        _ => Protocol::Http,
    }
}

impl Way<'_> {
    /// One attempt at one endpoint, which has so much time for the head of its answer.
    ///
    /// In parts, since whatever is at hand while something is waited for takes up room in every request's future, and that
    /// is copied more than once.
    pub(crate) async fn attempt(
        &self,
        mut lease: Lease,
        wire: Wire,
        reuse: Reuse,
        timers: (Option<Duration>, Option<&mut Idle>),
        outgoing: &mut Outgoing<'_>,
    ) -> Result<Response<ResponseBody>, Error> {
        lease.until(outgoing.deadline, outgoing.passed.as_ref());
        let deadline = outgoing.deadline;
        let (heeds_end, upgrade) = (outgoing.heeds_end, outgoing.upgrade);
        let answered = self.answered(&mut lease, (wire, reuse), timers, outgoing).await?;
        if heeds_end && outgoing.body.is_complete() && !answered.0.headers().contains_key(GRPC_STATUS) {
            // Allocates where a route asks for it.
            let (answer, ahead) = Box::pin(with_end(answered)).await;
            return judged(lease, answer, ahead, (deadline, upgrade));
        }
        judged(lease, answered, None, (deadline, upgrade))
    }

    /// The head of an answer, in time.
    async fn answered(
        &self,
        lease: &mut Lease,
        (wire, reuse): (Wire, Reuse),
        (time, idle): (Option<Duration>, Option<&mut Idle>),
        outgoing: &mut Outgoing<'_>,
    ) -> Result<(Response<Incoming>, Checkout), Error> {
        let fired = {
            let exchange = pin!(self.exchange(lease, wire, reuse, outgoing));
            match (time, idle) {
                (None, None) => return exchange.await,
                // Allocates where a route asks for it.
                (time, idle) => match Box::pin(patiently(exchange, time, idle)).await {
                    Ok(answered) => return answered,
                    Err(fired) => fired,
                },
            }
        };
        lease.too_slow();
        match fired {
            Timer::Idle(time) => Err(Error::Idle(time)),
            Timer::PerTry(within) => {
                self.telemetry.count(Counter::TimeoutPerTry);
                let sent = lease.stage() == Stage::Sent;
                let processed = if sent { Processed::Maybe } else { Processed::No(Counter::RetriedTimeout) };
                Err(Error::TooSlow { endpoint: lease.endpoint.place.clone(), within, processed })
            }
        }
    }

    /// A request, and the head of its answer.
    async fn exchange(
        &self,
        lease: &mut Lease,
        wire: Wire,
        reuse: Reuse,
        outgoing: &mut Outgoing<'_>,
    ) -> Result<(Response<Incoming>, Checkout), Error> {
        let endpoint = &Arc::clone(&lease.endpoint);
        if reuse == Reuse::Recent && may_be_http1(endpoint, wire) {
            // The runtime hears of what came in: a connection that has ended by now is not taken.
            yield_now().await;
        }
        let ready = self.pool.ready(endpoint, wire, reuse);
        outgoing.reused = Some(ready.is_some());
        let (mut sender, checkout) = match ready {
            Some(ready) => ready,
            // Allocates: a connection's beginning is large, and every request would carry room for it.
            None => {
                let of_route = outgoing.limits.map_or(Ok(None), |limits| limits.take(Limit::Pending));
                let full = || Error::overflow(Limit::Pending, &endpoint.place);
                let pending = of_route.and_then(|of_route| {
                    endpoint.bounds.take(Limit::Pending).map(|pending| (pending, of_route)).ok_or_else(full)
                });
                let _pending = pending.inspect_err(|_| lease.unreachable(&DialError::Overflow(Limit::Pending)))?;
                let checkout = self.pool.checkout(lease, (wire, reuse), self.identity, self.telemetry);
                match checkout.boxed().await {
                    Ok(connected) => {
                        lease.connects();
                        connected
                    }
                    Err(source) => {
                        lease.unreachable(&source);
                        return Err(Error::unreachable(endpoint.place.clone(), source));
                    }
                }
            }
        };
        let request = self.request(outgoing, sender.wire(), endpoint.is_ours())?;
        lease.sends();
        match sender.send(request).await {
            Ok(answer) => Ok((answer, checkout.holding(sender))),
            Err(_) if checkout.is_misunderstood() => {
                lease.misunderstood();
                Err(Error::NotHttp2(endpoint.place.clone()))
            }
            Err(SendError { source, processed }) => {
                match outgoing.passed.as_ref().is_some_and(|passed| passed.broke()) {
                    true => lease.hung_up(),
                    false => lease.broken(processed),
                }
                Err(Error::Broken { endpoint: endpoint.place.clone(), source, processed })
            }
        }
    }

    /// What is sent.
    fn request(&self, outgoing: &mut Outgoing<'_>, wire: Wire, to_peer: bool) -> Result<Request<RequestBody>, Error> {
        let Some((body, ask)) = outgoing.body.attempt() else {
            return Err(Error::Refused(Refusal::Malformed("the body cannot be sent again")));
        };
        let mut request = Request::from_parts(outgoing.for_wire(wire, to_peer)?, body);
        if wire == Wire::Http1 {
            headers::say_length(&mut request);
            expect::listen(&mut request, ask, self.telemetry);
        }
        Ok(request)
    }

    /// Whether a failed attempt is made once more; nothing where there is nothing to make better. Whoever asks counts it, and
    /// grants it or not where everything else speaks for it.
    pub(crate) fn again(
        &self,
        result: &Result<Response<ResponseBody>, Error>,
        policy: &Retry,
        outgoing: &Outgoing<'_>,
        from_peer: bool,
        is_granted: impl FnOnce() -> bool,
    ) -> Option<Verdict> {
        let attempt = retry::Attempt {
            policy,
            failure: failure(result, policy, from_peer)?,
            before: outgoing.before,
            idempotent: headers::is_idempotent(outgoing.head),
            replayable: outgoing.body.is_whole(),
            caller_retries: outgoing.follows_a_retry || outgoing.head.headers.contains_key(GRPC_ATTEMPTS),
            in_vain: from_peer && result.as_ref().is_ok_and(|answer| answer.headers().contains_key(IN_VAIN)),
            left: outgoing.deadline.map(Deadline::left),
        };
        Some(retry::decide(&attempt, rand::random(), is_granted))
    }
}

/// Whether something of a body is to come.
fn has_more(body: &Incoming) -> bool {
    !body.is_end_stream() && body.size_hint().exact() != Some(0)
}

/// Whether a request may have an HTTP/1.1 connection for itself.
fn may_be_http1(endpoint: &EndpointState, wire: Wire) -> bool {
    wire == Wire::Http1 || matches!(endpoint.transport, Transport::MutualTls(_))
}

/// An answer, its connection, and what came of its body so far.
type Ahead = Option<Box<Result<Frame<Bytes>, hyper::Error>>>;

/// Waits for the trailers of an answer that may have nothing else.
async fn with_end((mut answer, checkout): (Response<Incoming>, Checkout)) -> ((Response<Incoming>, Checkout), Ahead) {
    let ahead = timeout(END, answer.body_mut().frame()).await.ok().flatten().map(Box::new);
    let trailers = ahead.as_deref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
    if let Some(ended) = trailers.and_then(headers::grpc_status) {
        answer.extensions_mut().insert(Ended(ended));
    }
    ((answer, checkout), ahead)
}

/// Tells an endpoint what its answer says of it.
///
/// # Errors
///
/// It cannot be passed on.
fn judged(
    mut lease: Lease,
    (answer, mut checkout): (Response<Incoming>, Checkout),
    ahead: Ahead,
    (deadline, upgrade): (Option<Deadline>, bool),
) -> Result<Response<ResponseBody>, Error> {
    let (mut head, body) = answer.into_parts();
    let known = Known::of(&head.headers);
    if let Err(what) = headers::check_answer(&mut head, known, upgrade) {
        lease.broken(Processed::Maybe);
        return Err(Error::BadAnswer(lease.endpoint.place.clone(), what));
    }
    if known.has(Known::OTHER_HOP_BY_HOP)
        && let Some(time) = headers::keep_alive(&head.headers)
    {
        checkout.is_kept_for(time);
    }
    let ended = head.extensions.get::<Ended>().map(|ended| ended.0);
    // Where it is a proxy of ours, what that says of the app.
    let unsent = (lease.endpoint.is_ours() && known.has(Known::OURS)).then(|| head.headers.get(UNSENT)).flatten();
    let status = ended.or_else(|| grpc_status(&head.headers, known));
    // Its proxy was told of the same deadline, and saw it pass a moment sooner.
    let late = head.status == StatusCode::GATEWAY_TIMEOUT
        && lease.is_callers_deadline()
        && lease.endpoint.is_ours()
        && head.headers.contains_key(PROXY_STATUS);
    let mut more = false;
    match unsent {
        _ if status == Some(headers::GRPC_DEADLINE_EXCEEDED) || late => lease.expired(),
        Some(unsent) if *unsent == headers::SHED => lease.shed(),
        Some(unsent) if *unsent == headers::NOT_HTTP2 => lease.misunderstood(),
        _ => more = lease.answered(says(head.status, status), ended.is_none() && has_more(&body)),
    }
    let lease = more.then_some(lease);
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        // What becomes of the connection rests and counts as it did.
        checkout.rest().and_then(|rest| head.extensions.insert(rest.clone()));
        checkout.permit().and_then(|permit| head.extensions.insert(Arc::clone(permit)));
    }
    Ok(Response::from_parts(head, ResponseBody::of_endpoint(body, ahead, checkout, lease, deadline)))
}

/// What ends the wait for an answer's head.
enum Timer {
    /// The time of an attempt.
    PerTry(Duration),
    /// Nothing moved for so long.
    Idle(Duration),
}

/// Waits for `call` for as long as one may.
async fn patiently<T>(
    mut call: Pin<&mut impl Future<Output = T>>,
    time: Option<Duration>,
    mut idle: Option<&mut Idle>,
) -> Result<T, Timer> {
    let mut per_try = pin!(time.map(sleep));
    if let Some(idle) = &mut idle {
        idle.moved();
    }
    poll_fn(|cx| {
        if let Poll::Ready(done) = call.as_mut().poll(cx) {
            return Poll::Ready(Ok(done));
        }
        if let Some(idle) = &mut idle
            && idle.poll(cx).is_ready()
        {
            return Poll::Ready(Err(Timer::Idle(idle.time())));
        }
        match (time, per_try.as_mut().as_pin_mut()) {
            (Some(time), Some(passed)) => passed.poll(cx).map(|()| Err(Timer::PerTry(time))),
            _ => Poll::Pending,
        }
    })
    .await
}

/// What an answer's head says of the endpoint. A method or a version that it does not know is its caller's choice.
fn says(status: StatusCode, grpc_status: Option<u16>) -> Result<(), Fault> {
    let of_grpc = || grpc_status.and_then(headers::grpc_fault).map_or(Ok(()), Err);
    match status {
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => Ok(()),
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Err(Fault::Gateway),
        status if status.is_server_error() => Err(Fault::Answer),
        _ => of_grpc(),
    }
}

/// How an attempt failed, if it did.
fn failure(result: &Result<Response<ResponseBody>, Error>, policy: &Retry, from_peer: bool) -> Option<Failure> {
    let answer = match result {
        Ok(answer) => answer,
        Err(error) => {
            return Some(match (error.processed(), error) {
                (Processed::No(counter), _) => Failure::Unprocessed(counter),
                (Processed::Maybe, Error::Broken { .. }) => Failure::Reset,
                (Processed::Maybe, Error::TooSlow { .. }) => Failure::TooSlow,
                (Processed::Maybe, Error::Idle(_)) => Failure::Idle,
                _ => Failure::Refused,
            });
        }
    };
    let known = Known::of(answer.headers());
    let told = from_peer && known.has(Known::OURS);
    if let Some(unsent) = told.then(|| answer.headers().get(UNSENT)).flatten() {
        if *unsent == headers::NOT_HTTP2 {
            // Nor would another endpoint of it.
            return None;
        }
        let shed = *unsent == headers::SHED;
        return Some(Failure::Unprocessed(if shed { Counter::RetriedShed } else { Counter::RetriedPeerConnect }));
    }
    let status = answer.status().as_u16();
    if status >= 500 || policy.wants_status(status) {
        let after = answer.headers().get(RETRY_AFTER);
        let seconds = after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        return Some(Failure::Status { status, retry_after: seconds.map(Duration::from_secs) });
    }
    let ended = answer.extensions().get::<Ended>().map(|ended| ended.0);
    let ended = ended.or_else(|| grpc_status(answer.headers(), known));
    ended.filter(|status| headers::grpc_fault(*status).is_some() || policy.wants_grpc(*status)).map(Failure::Grpc)
}

/// How long the trailers of an empty answer are waited for, where it matters what they say. Whoever waits for the head of
/// a stream that says nothing at first waits as long at most.
const END: Duration = Duration::from_millis(100);

/// The gRPC status of an answer without a body, out of its trailers.
#[derive(Clone, Copy)]
struct Ended(u16);

/// The same, out of its head.
fn grpc_status(headers: &HeaderMap, known: Known) -> Option<u16> {
    known.has(Known::GRPC_STATUS).then(|| headers::grpc_status(headers)).flatten()
}

impl Outgoing<'_> {
    /// The head in the form that the next hop wants.
    fn for_wire(&mut self, wire: Wire, to_peer: bool) -> Result<request::Parts, Error> {
        let mut head = match self.once {
            true => std::mem::replace(self.head, Request::new(()).into_parts().0),
            // A copy for each attempt: header maps share their values.
            false => self.head.clone(),
        };
        if let Some(deadline) = self.deadline {
            deadline.tell(&mut head.headers);
        }
        let before = (self.before + u32::from(self.follows_a_retry)).min(MOST_ATTEMPTS);
        if before > 0 {
            let before = HeaderValue::from(before);
            if headers::is_grpc(&head.headers) {
                head.headers.insert(GRPC_ATTEMPTS, before.clone());
            }
            if to_peer {
                head.headers.insert(ATTEMPTS, before);
            }
        }
        match wire {
            Wire::Http2 => {
                headers::to_h2(&mut head, self.authority.clone()).map_err(Error::Refused)?;
                if to_peer && self.sent < Version::HTTP_2 {
                    head.headers.insert(SENT_VERSION, HeaderValue::from_static("1.1"));
                }
            }
            Wire::Http1 => headers::to_h1(&mut head, &self.authority).map_err(Error::Refused)?,
        }
        Ok(head)
    }
}

/// Makes of an endpoint's answer what the caller gets: hop-by-hop headers end here, an upgrade joins the two sides.
pub(crate) fn finish(
    mut answer: Response<ResponseBody>,
    mut exchange: Box<Exchange>,
    client: Option<OnUpgrade>,
    telemetry: &Telemetry,
    drain: &watch::Sender<bool>,
) -> Response<ResponseBody> {
    let known = Known::of(answer.headers());
    exchange.answered(answer.status().as_u16(), grpc_status(answer.headers(), known));
    headers::strip_ours(answer.headers_mut(), known);
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        if let Some(client) = client {
            telemetry.count(Counter::UpgradesTunnelled);
            let rest = answer.extensions_mut().remove::<Rest>();
            let held = (exchange.give_permits(), answer.extensions_mut().remove::<Arc<Permit>>());
            // A tunnel takes up what its request did.
            held.0.tunnels(0);
            let moved = move |moved: Transferred| held.0.tunnels(moved.client_to_server + moved.server_to_client);
            upgrade::join(client, hyper::upgrade::on(&mut answer), rest, drain.subscribe(), moved);
        }
        exchange.complete();
        return answer.map(|_| ResponseBody::empty());
    }
    headers::strip_hop_by_hop(answer.headers_mut(), known);
    *answer.version_mut() = Version::HTTP_11;
    answer.map(|body| body.reporting(exchange))
}

/// Ends a call when its deadline passes, wherever it is by then. Only a call that has one pays for the box.
pub(crate) async fn within<T>(
    deadline: Option<Deadline>,
    call: Pin<&mut impl Future<Output = Result<T, Error>>>,
) -> Result<T, Error> {
    match deadline {
        None => call.await,
        Some(deadline) => {
            Box::pin(timeout_at(deadline.at(), call)).await.unwrap_or(Err(Error::Deadline(deadline.set_by())))
        }
    }
}

/// Ends what is meant for this hop alone, but for an upgrade that is asked for, whose client's side this gives.
pub(crate) fn strip(head: &mut request::Parts, known: Known, upgrade: bool) -> Option<OnUpgrade> {
    let client = upgrade.then(|| head.extensions.remove::<OnUpgrade>()).flatten();
    let to = upgrade.then(|| head.headers.get(UPGRADE).cloned()).flatten();
    headers::strip_hop_by_hop(&mut head.headers, known);
    if let Some(to) = to {
        head.headers.insert(UPGRADE, to);
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
    client
}
