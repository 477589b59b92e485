//! Mesh → app: who calls, whether they may, and the way to the app.

mod admission;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use bytes::BytesMut;
use futures_util::FutureExt;
use http::{HeaderValue, Method, Request, Response, Version, request};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use sheetbend_certs::{MeshAlpn, SpiffeId, VerifiedPeer};
use sheetbend_control_plane_client::model::{AppProtocol, Transport};

use crate::app::Shared;
use crate::client_hello::Hello;
use crate::detect::Detected;
use crate::first_bytes::{FirstBytes, Patience, Speaker, read_first, read_hello, who_speaks_first};
use crate::forward::{Body1, Outgoing, Sending, Way, finish, protocol, strip, within};
use crate::http::body::ResponseBody;
use crate::http::deadline::Deadline;
use crate::http::error::{Error, Refusal};
use crate::http::exchange::Exchange;
use crate::http::headers::{self, IN_VAIN, SENT_VERSION};
use crate::http::known::Known;
use crate::http::serve::{fault, serve};
use crate::http::story::Caught;
use crate::inbound_rules::InboundRules;
use crate::mtls::{self, HANDSHAKE, Inside};
use crate::rest::{Rest, splice_for};
use crate::rewind::Rewind;
use crate::tcp::Abort;
use crate::telemetry::{Counter, Edge, EdgeKey, Peer, Protocol, Reporter};
use crate::upstream::{BoxIo, EndpointState, Lease, Place, Pool, Reuse, Wire, dial};

/// One port of the app.
pub(crate) struct Port {
    /// The service's port.
    pub(crate) port: u16,
    /// What the app speaks there, as far as someone said so.
    pub(crate) protocol: AppProtocol,
    /// TLS that comes in is the mesh's, whatever protocol it offers: for peers that are not ours, where plain
    /// connections are taken too.
    pub(crate) mesh_tls: bool,
    /// `web.default:8000`.
    pub(crate) name: Arc<str>,
    /// Where the app is.
    pub(crate) app: ArcSwap<EndpointState>,
}

impl Port {
    pub(crate) fn app_at(address: SocketAddr) -> Arc<EndpointState> {
        Arc::new(EndpointState::new(Place::App(address), Transport::Plain, None))
    }
}

/// One worker's way in.
#[derive(Clone)]
pub(crate) struct Inbound {
    pub(crate) shared: Arc<Shared>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) port: Arc<Port>,
}

/// Who is at the other end of a connection.
struct Caller {
    id: Option<SpiffeId>,
    /// A proxy of ours, whose headers are believed.
    ours: bool,
    peer: SocketAddr,
    /// What the connection rests on; nothing where it is plain.
    rest: Option<Rest>,
    /// The service port that it called, where that is not the app's own: `web.default:80`.
    destination: Option<Arc<str>>,
    edges: [OnceLock<Arc<Edge>>; 4],
}

/// Somebody who shows nothing.
fn caller_in_plain(peer: SocketAddr) -> Caller {
    Caller { id: None, ours: false, peer, rest: None, destination: None, edges: Default::default() }
}

impl Inbound {
    /// A connection from anywhere.
    pub(crate) async fn connection(self, mut io: BoxIo, peer: SocketAddr) {
        let mut bytes = BytesMut::new();
        // Where plain callers are refused, nobody but a client of TLS is listened to, and that one speaks first.
        let patience = match self.shared.strict || self.may_connect(&caller_in_plain(peer)).is_err() {
            true => Patience { first_byte: Some(HANDSHAKE), decision: HANDSHAKE },
            // An app that speaks HTTP never speaks first.
            false if self.speaks_http() => Patience { first_byte: None, ..Patience::default() },
            false => Patience::default(),
        };
        let mut first = match read_first(&mut io, &mut bytes, patience).await {
            Ok(FirstBytes::Closed) | Err(_) => return,
            Ok(first) => first,
        };
        let mut dialed = None;
        if first == FirstBytes::ServerFirst && patience == Patience::default() {
            // Either the app speaks first, or a peer's hello is late: whoever breaks the silence tells.
            let Some(mut app) = self.dial().await else { return io.abort() };
            let mut said = BytesMut::new();
            match who_speaks_first(&mut io, &mut bytes, &mut app, &mut said).await {
                Ok(Speaker::Client) => match read_first(&mut io, &mut bytes, patience).await {
                    Ok(FirstBytes::Closed) | Err(_) => return,
                    Ok(spoken) => first = spoken,
                },
                Ok(_) => {}
                // Half a conversation is not a whole one: whoever is left sees it break.
                Err(_) => return io.abort(),
            }
            dialed = Some(Box::new(Rewind::new(said.freeze(), app)) as BoxIo);
        }
        self.shared.telemetry.detected(first);
        if first == FirstBytes::Detected(Detected::Tls) && self.port.protocol != AppProtocol::Tls {
            let hello = read_hello(&mut io, &mut bytes, HANDSHAKE).await;
            let mesh = MeshAlpn::ALL.map(MeshAlpn::wire);
            let ours = matches!(&hello, Ok(Hello::Parsed(hello)) if hello.offers(&mesh));
            if ours || self.shared.strict || self.port.mesh_tls {
                drop(dialed);
                return self.terminate(Rewind::new(bytes.freeze(), io), ours, peer).boxed().await;
            }
        } else if self.shared.strict && first != FirstBytes::Detected(Detected::Tls) {
            if let Some(left_out) = self.shared.telemetry.refused(Counter::RefusedPlain) {
                let port = self.port.port;
                tracing::warn!(%peer, port, left_out, "a connection without mutual TLS is refused (strict)");
            }
            io.abort();
            return;
        }
        self.detected(first, bytes, io, caller_in_plain(peer), dialed).await;
    }

    async fn detected(self, first: FirstBytes, bytes: BytesMut, io: BoxIo, caller: Caller, dialed: Option<BoxIo>) {
        let io: BoxIo = Box::new(Rewind::new(bytes.freeze(), io));
        match first {
            FirstBytes::Detected(spoken @ (Detected::Http1 | Detected::Http2)) => {
                // Requests have connections of their own; this one was for bytes.
                drop(dialed);
                self.http(io, spoken == Detected::Http2, caller).await;
            }
            _ => self.opaque(io, caller, dialed).boxed().await,
        }
    }

    /// A connection inside mutual TLS, of a proxy of ours or of anybody else with a certificate of the mesh.
    async fn terminate(self, io: Rewind<BoxIo>, ours: bool, peer: SocketAddr) {
        let Some((stream, verified)) = mtls::accept(io, ours, peer, self.port.protocol, &self.shared).await else {
            return;
        };
        let connection = stream.get_ref().1;
        let inside = Inside::of(connection.alpn_protocol(), self.port.protocol);
        if connection.alpn_protocol() == Some(MeshAlpn::H2.wire()) {
            // Both ends of it always read, so that silence means that one is gone.
            stream.get_ref().0.expect_steady_reader();
        }
        let VerifiedPeer { id, root, .. } = verified;
        let rest = Some(Rest::on(root, &self.shared.identity));
        let called = connection.server_name().filter(|_| ours);
        let names = &self.shared.here.names;
        let destination = called.and_then(|name| names.called(name, id.trust_domain().as_str()));
        let caller = Caller { id: Some(id), ours, peer, rest, destination, edges: Default::default() };
        self.inside(Box::new(stream), inside, caller).await;
    }

    /// A connection of this proxy itself, with its own identity and under the same rules as everybody's.
    pub(crate) async fn entered(self, io: BoxIo, alpn: MeshAlpn, destination: Option<Arc<str>>) {
        let Some(material) = self.shared.identity.current() else { return };
        let peer = SocketAddr::new(self.shared.here.advertise, 0);
        let id = Some(material.identity.id.clone());
        let caller = Caller { id, ours: true, peer, rest: None, destination, edges: Default::default() };
        self.inside(io, Inside::ours(alpn), caller).await;
    }

    /// What comes over a connection of somebody who is known.
    async fn inside(self, mut io: BoxIo, inside: Inside, caller: Caller) {
        match inside {
            Inside::Http { http2 } => self.http(io, http2, caller).await,
            Inside::Opaque => self.opaque(io, caller, None).boxed().await,
            Inside::Unsaid => {
                let mut bytes = BytesMut::new();
                match read_first(&mut io, &mut bytes, Patience::default()).await {
                    Ok(FirstBytes::Closed) | Err(_) => {}
                    Ok(first) => self.detected(first, bytes, io, caller, None).boxed().await,
                }
            }
        }
    }

    /// What limits how much passes, if anything does.
    fn limits(&self) -> Option<Arc<InboundRules>> {
        let rules = self.shared.inbound_rules.load();
        (!rules.admission.is_open()).then(|| Arc::clone(&rules))
    }

    fn edge<'a>(&self, caller: &'a Caller, protocol: Protocol) -> &'a Arc<Edge> {
        let slot = match protocol {
            Protocol::Http => &caller.edges[0],
            Protocol::Http2 => &caller.edges[1],
            Protocol::Grpc => &caller.edges[2],
            Protocol::Tcp => &caller.edges[3],
        };
        slot.get_or_init(|| {
            let peer = Peer::from(caller.id.clone());
            let destination = Arc::clone(caller.destination.as_ref().unwrap_or(&self.port.name));
            let mtls = caller.id.is_some();
            self.shared.telemetry.edge(EdgeKey { reporter: Reporter::Destination, peer, destination, protocol, mtls })
        })
    }

    async fn http(self, io: BoxIo, http2: bool, caller: Caller) {
        let (drain, rest) = (self.shared.inbound_drain.subscribe(), caller.rest.clone());
        let telemetry = Arc::clone(&self.shared.telemetry);
        let this = Arc::new((self, caller));
        let handle = move |request| Self::request(Arc::clone(&this), request);
        if let Err(error) = serve(io, http2, drain, rest, handle).await {
            fault(&error).into_iter().for_each(|counter| telemetry.count(counter));
        }
    }

    /// Not an async function, for the reason that the way out has.
    fn request(
        this: Arc<(Self, Caller)>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<ResponseBody>> + Send {
        let (inbound, caller) = &*this;
        let (mut head, body) = request.into_parts();
        let telemetry = &inbound.shared.telemetry;
        let known = Known::of(&head.headers);
        let who = (caller.peer, caller.id.clone());
        let mut exchange = Exchange::begin(telemetry, Reporter::Destination, &head, known, who);
        let grpc = known.has(Known::GRPC);
        let deadline = Deadline::of(&head.headers, known);
        async move {
            let (inbound, caller) = &*this;
            let result = {
                let call = pin!(inbound.forward((&mut head, known), body, caller, deadline, &mut exchange));
                within(deadline, call).await
            };
            let shared = &inbound.shared;
            match result {
                Ok((answer, client)) => {
                    let in_vain = caller.ours
                        && shared.layers.was_in_vain(exchange.call(), shared.epoch.elapsed())
                        && failed(&answer);
                    let mut answer = finish(answer, exchange, client, &shared.telemetry, &shared.inbound_drain);
                    if in_vain {
                        answer.headers_mut().insert(IN_VAIN, HeaderValue::from_static("?1"));
                    }
                    answer
                }
                Err(error) => {
                    exchange.failed(&error);
                    error.respond_to(exchange.method(), grpc, caller.ours).map(|body| body.reporting(exchange))
                }
            }
        }
    }

    async fn forward(
        &self,
        (head, known): (&mut request::Parts, Known),
        body: Incoming,
        caller: &Caller,
        deadline: Option<Deadline>,
        exchange: &mut Exchange,
    ) -> Result<(Response<ResponseBody>, Option<OnUpgrade>), Error> {
        exchange.story.caught(match (caller.ours, &caller.id) {
            (true, _) => Caught::Peer,
            (false, Some(_)) => Caught::MutualTls,
            (false, None) => Caught::Plain,
        });
        headers::check_framing(head, known).map_err(Error::Refused)?;
        let sent_http1 = caller.ours && known.has(Known::OURS) && head.headers.contains_key(SENT_VERSION);
        let told = caller.ours && known.has(Known::OURS);
        exchange.attempts = told.then(|| headers::attempts_before(&head.headers)).flatten().unwrap_or(0);
        if exchange.attempts > 0 || caller.ours && known.has(Known::GRPC_ATTEMPTS) {
            self.shared.layers.comes_again(exchange.call(), self.shared.epoch.elapsed());
        }
        headers::strip_ours(&mut head.headers, known);
        headers::join_cookies(head, known);
        if head.method == Method::CONNECT {
            return Err(Error::Refused(Refusal::Malformed(headers::NO_CONNECT)));
        }
        let sent = if sent_http1 { Version::HTTP_11 } else { head.version };
        head.version = sent;
        exchange.on(Arc::clone(self.edge(caller, protocol(head, known))));
        // Who names no host means the one that was called.
        let authority =
            headers::authority(head).or_else(|| self.port.app.load().socket_address()?.to_string().parse().ok());
        let authority = authority.ok_or(Error::Refused(Refusal::Malformed("no authority")))?;
        // Before anything is decided by what a header says: `Connection` names more that the app is not to see.
        let upgrade = headers::asks_upgrade(head, known);
        let client = strip(head, known, upgrade);
        self.admit(caller, head, &authority, exchange)?;
        if let Some(rules) = self.limits() {
            // Allocates: whoever has no limits carries no room for a wait.
            let admitted = rules.admission.admit(head, caller.id.as_ref(), deadline, &self.shared.telemetry);
            exchange.in_room(admitted.boxed().await?);
        }
        let reuse = match upgrade {
            true => Reuse::Never,
            // What must not be sent twice takes no connection that may have closed in the meantime.
            false => {
                if headers::is_idempotent(head) {
                    Reuse::Any
                } else {
                    Reuse::Recent
                }
            }
        };
        let sending = if headers::expects_continue(head, known) { Sending::WhenAsked } else { Sending::Once };
        let body = Body1::new(head, body, sending, exchange);
        let passed = exchange.request_passed.clone();
        if let (Some(stay), Some(passed)) = (exchange.stay(), &passed) {
            stay.request(passed);
        }
        let mut outgoing = Outgoing {
            head,
            authority,
            sent,
            body,
            passed,
            upgrade,
            deadline,
            // Whoever calls makes the attempts, and so they never multiply.
            once: true,
            before: 0,
            follows_a_retry: false,
            heeds_end: false,
            limits: None,
            reused: None,
        };
        let app = self.port.app.load_full();
        exchange.attempt(&app);
        // As it was sent, unless the app is said to know no other; gRPC has no other form.
        let http1 = self.port.protocol == AppProtocol::Http && !known.has(Known::GRPC);
        let wire = if sent == Version::HTTP_2 && !http1 { Wire::Http2 } else { Wire::Http1 };
        // The app's own servers ignore identities: there is none to show, and no TLS to it.
        let shared = &self.shared;
        let way = Way { pool: &self.pool, identity: &shared.identity, telemetry: &shared.telemetry };
        let answer = {
            let call = pin!(way.attempt(Lease::alone(app), wire, reuse, (None, None), &mut outgoing));
            match exchange.stay() {
                None => call.await,
                // Allocates: whoever has no limits carries no room for a wait.
                Some(stay) => Box::pin(stay.unless_over(call)).await,
            }
        };
        exchange.story.over(outgoing.reused.take());
        let mut answer = answer?;
        if let Some(rest) = caller.rest.clone().filter(|_| client.is_some()) {
            answer.extensions_mut().insert(rest);
        }
        Ok((answer, client))
    }

    /// Bytes that nobody looks into, over a connection to the app that may be there already.
    async fn opaque(&self, mut io: BoxIo, caller: Caller, dialed: Option<BoxIo>) {
        if self.admit_connection(&caller).is_err() || self.admit_bytes(&caller).is_err() {
            return io.abort();
        }
        let _under_way = self.shared.inbound_drain.subscribe();
        let edge = self.edge(&caller, Protocol::Tcp);
        let dialed = match dialed {
            None => self.dial().await,
            dialed => dialed,
        };
        let Some(mut app) = dialed else {
            edge.connection_failed();
            return io.abort();
        };
        let _open = edge.connection();
        // Sent and received are this proxy's view: what the caller sent was received.
        let moved = |moved: crate::tcp::Transferred| edge.bytes(moved.server_to_client, moved.client_to_server);
        splice_for(&mut io, &mut app, caller.rest.clone(), None, moved).await;
    }

    /// A connection to the app.
    async fn dial(&self) -> Option<BoxIo> {
        let app = self.port.app.load_full();
        let (identity, telemetry) = (&self.shared.identity, &self.shared.telemetry);
        match dial(&app, MeshAlpn::Tcp, identity, telemetry, &self.pool.own).await {
            Ok(dialed) => Some(dialed.io),
            Err(error) => {
                const WHAT: &str = "the app does not take the connection";
                if let Some(left_out) = telemetry.sparingly(WHAT) {
                    tracing::warn!(app = ?app.socket_address(), %error, left_out, "{WHAT}");
                }
                None
            }
        }
    }
}

/// Whether a caller might ask for the same once more.
fn failed(answer: &Response<ResponseBody>) -> bool {
    answer.status().as_u16() >= 400 || headers::grpc_status(answer.headers()).is_some_and(|status| status != 0)
}
