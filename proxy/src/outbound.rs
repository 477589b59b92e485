//! App → mesh: whom a connection or a request is for, and its way there.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::FutureExt;
use http::header::SET_COOKIE;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, request};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use sheetbend_certs::MeshAlpn;
use sheetbend_control_plane_client::model::{AppProtocol, OutboundPolicy, Retry, Target, Transport};

use crate::admission::RouteLimits;
use crate::app::Shared;
use crate::client_hello::Hello;
use crate::detect::{Detected, is_known_opaque};
use crate::faults::suffer;
use crate::first_bytes::{FirstBytes, Patience, Speaker, read_first, read_hello, who_speaks_first};
use crate::forward::{Body1, Outgoing, Sending, Way, finish, protocol, strip, within};
use crate::http::body::ResponseBody;
use crate::http::deadline::Deadline;
use crate::http::error::{Error, Refusal};
use crate::http::exchange::Exchange;
use crate::http::headers::{self, X_REQUEST_ID};
use crate::http::idle::Idle;
use crate::http::known::Known;
use crate::http::serve::{PATIENCE, fault, serve};
use crate::http::story::Caught;
use crate::http::upgrade;
use crate::policy::{Filtered, inject};
use crate::refuse::refuse;
use crate::rest::{Over, Rest, splice_for};
use crate::rewind::Rewind;
use crate::route::{Caller, Candidates, Choice, Route, Routes};
use crate::tcp::Abort;
use crate::telemetry::{Counter, Flags, Protocol, Reporter, Telemetry};
use crate::traffic::limit::Limit;
use crate::traffic::retry::{self, Retrying, Verdict};
use crate::upstream::{BoxIo, EndpointState, Permit, Pool, Reuse, Wire, dial};
use crate::worker::Live;

/// One worker's way out. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Outbound {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) routes: Arc<Routes>,
    /// The connection counts for as long as this is held, by a tunnel within it too.
    pub(crate) live: Arc<Live>,
    /// How the connection came here.
    pub(crate) caught: Caught,
}

impl Outbound {
    /// A connection whose requests name their destinations themselves: absolute-form, Host, CONNECT.
    pub(crate) async fn explicit(self, mut io: BoxIo, peer: SocketAddr) {
        let mut bytes = BytesMut::new();
        let first = read_first(&mut io, &mut bytes, PATIENCE).await;
        first.iter().for_each(|first| self.shared.telemetry.detected(*first));
        let http2 = match first {
            Ok(FirstBytes::Detected(Detected::Http1)) => false,
            Ok(FirstBytes::Detected(Detected::Http2)) => true,
            _ => {
                self.shared.telemetry.count(Counter::MalformedRequest);
                return;
            }
        };
        self.http(Box::new(Rewind::new(bytes.freeze(), io)), http2, None, peer).await;
    }

    /// A connection that is for one destination as a whole.
    ///
    /// Boxed by its callers: a tunnel within HTTP comes back here.
    pub(crate) async fn caught(self, mut io: BoxIo, target: Target, peer: SocketAddr) {
        let mut bytes = BytesMut::new();
        let route = match self.route(&target).await {
            Ok(route) => route,
            Err(error) => return self.refuse(io, bytes, error, peer).await,
        };
        let opaque = match route.destination().map(|destination| destination.protocol) {
            // Untouched: nobody asked us to read what is no part of the mesh.
            None => true,
            Some(AppProtocol::Tcp | AppProtocol::Tls) => true,
            Some(_) => is_known_opaque(target.port()),
        };
        if route.asks_server_name() {
            if let Ok(name) = server_name(&mut io, &mut bytes, &self.shared.telemetry).await {
                self.opaque(io, bytes, &route, name.as_deref(), None, peer).boxed().await;
            }
            return;
        }
        if opaque {
            self.shared.telemetry.detected(FirstBytes::Detected(Detected::Opaque));
            return self.opaque(io, bytes, &route, None, None, peer).boxed().await;
        }
        let mut first = read_first(&mut io, &mut bytes, Patience::default()).await;
        first.iter().for_each(|first| self.shared.telemetry.detected(*first));
        let mut dialed = None;
        if matches!(first, Ok(FirstBytes::ServerFirst)) {
            let mut server = match self.connect(&route, None, peer).await {
                Ok(server) => server,
                Err(error) => return self.refuse(io, bytes, error, peer).await,
            };
            let mut server_bytes = BytesMut::new();
            let speaker = who_speaks_first(&mut io, &mut bytes, &mut server.io, &mut server_bytes).await;
            server.io = Box::new(Rewind::new(server_bytes.freeze(), server.io));
            match speaker {
                Ok(Speaker::Client) => {
                    first = read_first(&mut io, &mut bytes, Patience::default()).await;
                    dialed = Some(server);
                }
                Ok(_) => return self.opaque(io, bytes, &route, None, Some(server), peer).boxed().await,
                // Half a conversation is not a whole one: whoever is left sees it break.
                Err(_) => return io.abort(),
            }
        }
        match first {
            Ok(FirstBytes::Detected(spoken @ (Detected::Http1 | Detected::Http2))) => {
                // Requests have connections of their own; this one was for bytes.
                drop(dialed);
                let io = Box::new(Rewind::new(bytes.freeze(), io));
                self.http(io, spoken == Detected::Http2, Some(target), peer).await;
            }
            Ok(FirstBytes::Closed) | Err(_) => {}
            Ok(_) => self.opaque(io, bytes, &route, None, dialed, peer).boxed().await,
        }
    }

    async fn http(self, io: BoxIo, http2: bool, target: Option<Target>, peer: SocketAddr) {
        let drain = self.shared.outbound_drain.subscribe();
        let telemetry = Arc::clone(&self.shared.telemetry);
        let this = Arc::new((self, target));
        let handle = move |request| Self::request(Arc::clone(&this), request, peer);
        if let Err(error) = serve(io, http2, drain, None, handle).await {
            fault(&error).into_iter().for_each(|counter| telemetry.count(counter));
        }
    }

    /// One request of the app.
    ///
    /// Not an async function, which would keep the request as it was given it: a request's future is copied more than
    /// once on its way to where it is polled, and stays small.
    fn request(
        this: Arc<(Self, Option<Target>)>,
        request: Request<Incoming>,
        peer: SocketAddr,
    ) -> impl Future<Output = Response<ResponseBody>> + Send {
        let (mut head, body) = request.into_parts();
        let known = Known::of(&head.headers);
        if !known.has(Known::REQUEST_ID) {
            head.headers.insert(X_REQUEST_ID, headers::request_id(rand::random()));
        }
        let mut exchange = Exchange::begin(&this.0.shared.telemetry, Reporter::Source, &head, known, (peer, None));
        let grpc = known.has(Known::GRPC);
        let deadline = Deadline::of(&head.headers, known);
        async move {
            let (outbound, target) = &*this;
            let result = {
                let call =
                    pin!(outbound.forward((&mut head, known), body, (target.as_ref(), peer), deadline, &mut exchange));
                within(deadline, call).await
            };
            let shared = &outbound.shared;
            match result {
                Ok((answer, client)) => finish(answer, exchange, client, &shared.telemetry, &shared.outbound_drain),
                Err(error) => {
                    if matches!(error, Error::Deadline(_)) {
                        shared.telemetry.count(Counter::NotRetriedDeadline);
                    }
                    exchange.failed(&error);
                    error.respond_to(exchange.method(), grpc, false).map(|body| body.reporting(exchange))
                }
            }
        }
    }

    async fn forward(
        &self,
        (head, known): (&mut request::Parts, Known),
        body: Incoming,
        (target, peer): (Option<&Target>, SocketAddr),
        deadline: Option<Deadline>,
        exchange: &mut Exchange,
    ) -> Result<(Response<ResponseBody>, Option<OnUpgrade>), Error> {
        exchange.story.caught(self.caught);
        headers::check_framing(head, known).map_err(Error::Refused)?;
        headers::strip_ours(&mut head.headers, known);
        headers::join_cookies(head, known);
        if head.method == Method::CONNECT {
            if target.is_some() {
                return Err(Error::Refused(Refusal::Malformed(headers::NO_CONNECT)));
            }
            return Ok((self.tunnel(std::mem::replace(head, Request::new(()).into_parts().0), body, peer)?, None));
        }
        let named = headers::authority(head);
        let target = match (target, &named) {
            (Some(target), _) => target.clone(),
            (None, Some(authority)) => Target::new(host(authority.host()), authority.port_u16().unwrap_or(80))
                .map_err(|_| Error::Refused(Refusal::Malformed("the authority is not a host and a port")))?,
            (None, None) => return Err(Error::Refused(Refusal::Malformed("no authority"))),
        };
        let mut authority = match named {
            Some(authority) => authority,
            None => target.to_string().parse().map_err(|_| Error::Refused(Refusal::Malformed("no authority")))?,
        };
        let route = self.route(&target).await?;
        let Choice { rule, endpoints, changes, faults } = route.choose(head);
        exchange.story.routed(&target, rule);
        let fault = if faults.is_empty() { None } else { inject(faults, head, rand::random) };
        let protocol = protocol(head, known);
        let (upgrade, expects) = (headers::asks_upgrade(head, known), headers::expects_continue(head, known));
        let client = strip(head, known, upgrade);
        if let Filtered::Answer(status, location) = changes.apply(head, &mut authority) {
            self.shared.telemetry.count(Counter::Redirected);
            return Ok((redirect(status, location), None));
        }
        let endpoints = endpoints.ok_or_else(|| Error::NoRule(target.clone()))?;
        // Where it counts, if it comes to nobody.
        let edge = || endpoints.edge(&self.shared.telemetry, protocol);
        let mut caller = endpoints.caller(Some(&head.headers), peer);
        let now = self.shared.epoch.elapsed();
        let limits = route.limits(rule);
        if let Some(limits) = limits
            && let Some(permit) = limits.admit(head, now).inspect_err(|_| exchange.on_if_none(edge))?
        {
            exchange.holding(permit);
        }
        let Some(permit) = endpoints.bounds.take(Limit::Requests) else {
            exchange.on_if_none(edge);
            return Err(Error::overflow(Limit::Requests, &target));
        };
        exchange.holding(permit);
        exchange.within(&endpoints.budget, now);
        let sending = match (upgrade, expects) {
            (_, true) => Sending::WhenAsked,
            (true, false) => Sending::Once,
            (false, false) => Sending::Again,
        };
        let body = Body1::new(head, body, sending, exchange);
        let passed = exchange.request_passed.clone();
        let timeouts = rule.map(|rule| &rule.policy.timeouts);
        let of_route = timeouts.and_then(|timeouts| timeouts.request).filter(|time| !time.is_zero());
        let of_route = of_route.and_then(|time| Deadline::of_route(exchange.started(), time, known.has(Known::GRPC)));
        // The caller's own is kept further up.
        let of_route = of_route.filter(|route| deadline.is_none_or(|callers| route.at() < callers.at()));
        let deadline = of_route.or(deadline);
        if let Some(fault) = fault {
            // Allocates: seldom, and every request would carry room for it.
            let suffered = suffer(fault, &self.routes.delayed, &self.shared.telemetry, exchange).boxed();
            let suffered = within(of_route, pin!(suffered)).await;
            suffered.inspect_err(|_| exchange.on_if_none(edge))?;
        }
        let sent = head.version;
        let retry = rule.map_or(&retry::DEFAULT, |rule| &rule.policy.retry);
        let mut outgoing = Outgoing {
            heeds_end: retry.heeds_grpc() && known.has(Known::GRPC),
            head,
            authority,
            sent,
            body,
            passed,
            upgrade,
            deadline,
            once: false,
            before: 0,
            follows_a_retry: self.shared.layers.follows_a_retry(exchange.call(), now),
            reused: None,
            limits,
        };
        let time = timeouts.and_then(|timeouts| timeouts.backend_request).filter(|time| !time.is_zero());
        let idle = timeouts.and_then(|timeouts| timeouts.stream_idle).filter(|time| !time.is_zero());
        // Allocates where a route asks for it.
        let mut idle = idle.map(|time| Box::new(Idle::new(time, outgoing.passed.clone(), protocol == Protocol::Grpc)));
        let attempts = Attempts {
            route: &route,
            endpoints,
            caller: &caller,
            protocol,
            expects,
            time,
            idle: idle.as_deref_mut(),
            retry,
        };
        let answer = within(of_route, pin!(self.attempts(attempts, &mut outgoing, exchange))).await;
        let mut answer = answer.inspect_err(|_| exchange.on_if_none(edge))?;
        if let Some(cookie) = caller.cookie.take() {
            answer.headers_mut().append(SET_COOKIE, *cookie);
        }
        changes.answer(answer.headers_mut());
        Ok((answer.map(|body| body.unless(idle)), client))
    }

    /// As many attempts as it takes, and as there may be.
    async fn attempts(
        &self,
        Attempts { route, endpoints, caller, protocol, expects, time, mut idle, retry }: Attempts<'_>,
        outgoing: &mut Outgoing<'_>,
        exchange: &mut Exchange,
    ) -> Result<Response<ResponseBody>, Error> {
        let way = self.way();
        let mut tried: Vec<Arc<EndpointState>> = Vec::new();
        // Until the answer's head is here. Boxed: every request would carry room for it.
        let mut retrying: Option<Box<(Retrying, RetryPermits)>> = None;
        loop {
            let harmless = headers::is_idempotent(outgoing.head) || retry.non_idempotent;
            let retryable = harmless && retry.attempts() > 0;
            let now = self.shared.epoch.elapsed();
            exchange.story.picking(now, || endpoints.as_json(now));
            let lease = route
                .pick(endpoints, caller, &tried, retryable, now)
                .inspect_err(|_| exchange.story.nobody(|| endpoints.as_json(now)))?;
            let endpoint = Arc::clone(&lease.endpoint);
            exchange.on(Arc::clone(endpoint.edge(&self.shared.telemetry, protocol)));
            exchange.attempt(&endpoint);
            let wire = wire(&endpoint, outgoing, expects);
            let reuse = match outgoing.upgrade || expects || outgoing.before > 0 {
                true => Reuse::Never,
                // What must not be sent twice takes no connection that may have closed in the meantime.
                false => {
                    if retryable {
                        Reuse::Any
                    } else {
                        Reuse::Recent
                    }
                }
            };
            // In a block of its own: nobody holds on to an answer that is not given.
            let after = {
                let result = way.attempt(lease, wire, reuse, (time, idle.as_deref_mut()), outgoing).await;
                let (mut permits, limits) = (None, outgoing.limits);
                let (_until_decided, held) = retrying.take().map(|retrying| *retrying).unzip();
                let mut again = way.again(&result, retry, outgoing, endpoint.is_ours(), || {
                    // What this attempt took is free again.
                    drop(held);
                    permits = retry_permits(&endpoint, limits);
                    permits.is_some() && endpoints.budget.take(self.shared.epoch.elapsed())
                });
                if again == Some(Verdict::GiveUp(Counter::NotRetriedBudget)) && permits.is_none() {
                    self.shared.telemetry.count(Counter::OverflowRetries);
                    again = Some(Verdict::GiveUp(Counter::NotRetriedLimit));
                }
                let mut after = None;
                match again {
                    Some(Verdict::Retry { reason, after: wait }) => {
                        let taken = Retrying(Arc::clone(&endpoints.budget));
                        retrying = permits.map(|permits| Box::new((taken, permits)));
                        after = Some(wait);
                        self.shared.telemetry.count(reason);
                    }
                    Some(Verdict::GiveUp(why)) => self.gave_up(why, outgoing.before > 0, exchange),
                    None => {}
                }
                exchange.story.over(outgoing.reused.take());
                exchange.story.tried(&endpoint, again.as_ref(), &result, || endpoints.as_json(endpoint.now()));
                match after {
                    Some(after) => after,
                    None => return result,
                }
            };
            tokio::time::sleep(after).await;
            outgoing.before += 1;
            tried.push(endpoint);
        }
    }

    /// No other attempt is made. Whoever waits for what would have come of it makes none for that reason either.
    #[cold]
    fn gave_up(&self, why: Counter, after_retries: bool, exchange: &mut Exchange) {
        self.shared.telemetry.count(why);
        let at_the_limit = matches!(
            why,
            Counter::NotRetriedBudget
                | Counter::NotRetriedLimit
                | Counter::NotRetriedCaller
                | Counter::NotRetriedInVain
        );
        if after_retries || at_the_limit {
            self.shared.layers.in_vain(exchange.call(), self.shared.epoch.elapsed());
        }
        if after_retries && why == Counter::NotRetriedAttempts {
            exchange.flags |= Flags::RETRIES_EXHAUSTED;
        }
    }

    /// `CONNECT host:port`: what comes through is a connection like any other.
    fn tunnel(&self, head: request::Parts, body: Incoming, peer: SocketAddr) -> Result<Response<ResponseBody>, Error> {
        let malformed = Error::Refused(Refusal::Malformed("CONNECT needs HOST:PORT"));
        let authority = head.uri.authority().filter(|authority| authority.port_u16().is_some());
        let Some(authority) = authority else { return Err(malformed) };
        let Ok(target) = Target::new(host(authority.host()), authority.port_u16().unwrap_or(443)) else {
            return Err(malformed);
        };
        self.check_loop(&target)?;
        self.shared.telemetry.count(Counter::ConnectsTunnelled);
        let this = Self { caught: Caught::Tunnel, ..self.clone() };
        tokio::spawn(async move {
            if let Ok(upgraded) = hyper::upgrade::on(Request::from_parts(head, body)).await {
                let within: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> =
                    Box::pin(this.caught(upgrade::connection(upgraded), target, peer));
                within.await;
            }
        });
        Ok(Response::new(ResponseBody::empty()))
    }

    /// What would come back to this proxy goes nowhere.
    fn check_loop(&self, target: &Target) -> Result<(), Error> {
        match target.address().filter(|address| self.shared.here.is_listener(*address)) {
            Some(address) => Err(Error::Loop(address)),
            None => Ok(()),
        }
    }

    async fn route(&self, target: &Target) -> Result<Arc<Route>, Error> {
        self.check_loop(target)?;
        let shared = &self.shared;
        let deny = shared.deny_unknown || shared.discovery.snapshot().outbound_policy() == OutboundPolicy::Deny;
        if let Some(known) = self.routes.known(target, &shared.discovery, deny) {
            return Ok(known);
        }
        // Allocates: seldom, and every request would carry room for it.
        let (discovery, endpoints) = (&shared.discovery, &shared.endpoints);
        self.routes.to(target, discovery, endpoints, deny, &shared.telemetry).boxed().await
    }

    fn way(&self) -> Way<'_> {
        let shared = &self.shared;
        Way { pool: &self.pool, identity: &shared.identity, telemetry: &shared.telemetry }
    }

    async fn connect(&self, route: &Route, server_name: Option<&str>, peer: SocketAddr) -> Result<Connected, Error> {
        let candidates = route.opaque(server_name)?;
        let caller = candidates.caller(None, peer);
        let mut tried = Vec::new();
        let full = || Error::overflow(Limit::Connections, route.target());
        let permit = candidates.bounds.take(Limit::Connections).ok_or_else(full)?;
        loop {
            let (now, telemetry) = (self.shared.epoch.elapsed(), &self.shared.telemetry);
            let mut lease = route.pick(candidates, &caller, &tried, true, now)?;
            let endpoint = Arc::clone(&lease.endpoint);
            let dialed = dial(&endpoint, MeshAlpn::Tcp, &self.shared.identity, telemetry, &self.pool.own).await;
            match &dialed {
                Ok(_) => lease.connected(),
                Err(error) => lease.unreachable(error),
            }
            match dialed {
                Ok(dialed) => return Ok(Connected { endpoint, io: dialed.io, rest: dialed.rest, permit }),
                // Nothing was sent yet: another endpoint may be tried, once.
                Err(_) if tried.is_empty() && candidates.len() > 1 => tried.push(endpoint),
                Err(source) => {
                    endpoint.edge(&self.shared.telemetry, Protocol::Tcp).connection_failed();
                    return Err(Error::unreachable(endpoint.place.clone(), source));
                }
            }
        }
    }

    /// Bytes that nobody looks into.
    async fn opaque(
        &self,
        io: BoxIo,
        bytes: BytesMut,
        route: &Route,
        server_name: Option<&str>,
        dialed: Option<Connected>,
        peer: SocketAddr,
    ) {
        let _under_way = self.shared.outbound_drain.subscribe();
        let Connected { endpoint, io: mut server, rest, permit: _counted } = match dialed {
            Some(dialed) => dialed,
            None => match self.connect(route, server_name, peer).await {
                Ok(dialed) => dialed,
                Err(error) => return self.refuse(io, bytes, error, peer).await,
            },
        };
        let edge = endpoint.edge(&self.shared.telemetry, Protocol::Tcp);
        let _open = edge.connection();
        let mut client = Rewind::new(bytes.freeze(), io);
        let moved = |moved: crate::tcp::Transferred| edge.bytes(moved.client_to_server, moved.server_to_client);
        let idle = endpoint.bounds.limits.tcp_idle();
        if splice_for(&mut client, &mut server, rest, idle, moved).await == Over::Idle {
            self.shared.telemetry.count(Counter::TimeoutTcpIdle);
        }
    }

    async fn refuse(&self, io: BoxIo, bytes: BytesMut, error: Error, peer: SocketAddr) {
        refuse(&self.shared, Reporter::Source, io, bytes, error, peer).await;
    }
}

/// Where a request may go, and how.
struct Attempts<'a> {
    route: &'a Route,
    endpoints: &'a Candidates,
    caller: &'a Caller,
    protocol: Protocol,
    /// The client waits until it is asked for the body.
    expects: bool,
    /// What one attempt has for the head of its answer.
    time: Option<Duration>,
    /// Looks whether anything moves.
    idle: Option<&'a mut Idle>,
    retry: &'a Retry,
}

/// What a retry takes up of its destination's limits, and of its route's.
type RetryPermits = (Permit, Option<Permit>);

/// None where as many retries are under way as may be.
fn retry_permits(endpoint: &EndpointState, limits: Option<&RouteLimits>) -> Option<RetryPermits> {
    let of_route = limits.map_or(Ok(None), |limits| limits.take(Limit::Retries)).ok()?;
    Some((endpoint.bounds.take(Limit::Retries)?, of_route))
}

/// A connection for bytes that nobody looks into.
struct Connected {
    endpoint: Arc<EndpointState>,
    io: BoxIo,
    rest: Option<Rest>,
    permit: Permit,
}

/// The server that a client's hello names; none where it is no hello, or names nobody. Reads no more than that takes.
async fn server_name(io: &mut BoxIo, bytes: &mut BytesMut, telemetry: &Telemetry) -> io::Result<Option<Box<str>>> {
    let first = read_first(io, bytes, PATIENCE).await?;
    telemetry.detected(first);
    match first {
        FirstBytes::Detected(Detected::Tls) => match read_hello(io, bytes, PATIENCE.decision).await? {
            Hello::Parsed(hello) => Ok(hello.sni),
            Hello::NotParseable | Hello::NeedMore => Ok(None),
        },
        FirstBytes::Closed => Err(io::ErrorKind::UnexpectedEof.into()),
        FirstBytes::Detected(_) | FirstBytes::ServerFirst => Ok(None),
    }
}

/// What is spoken to an endpoint. One that is not ours, behind TLS, chooses itself between HTTP's versions.
fn wire(endpoint: &EndpointState, outgoing: &Outgoing<'_>, expects: bool) -> Wire {
    match outgoing.upgrade || expects {
        true => Wire::Http1,
        false if !matches!(endpoint.transport, Transport::Plain) => Wire::Http2,
        false if outgoing.sent == Version::HTTP_2 => Wire::Http2,
        false => Wire::Http1,
    }
}

/// Where to go instead.
fn redirect(status: StatusCode, location: HeaderValue) -> Response<ResponseBody> {
    let mut answer = Response::new(ResponseBody::empty());
    *answer.status_mut() = status;
    answer.headers_mut().insert(http::header::LOCATION, location);
    let ours = HeaderValue::from_static("sheetbend; error=proxy_internal_response; details=\"RequestRedirect\"");
    answer.headers_mut().insert(headers::PROXY_STATUS, ours);
    answer
}

/// A host of a URI, without the brackets of an IPv6 address.
fn host(text: &str) -> &str {
    text.trim_start_matches('[').trim_end_matches(']')
}
