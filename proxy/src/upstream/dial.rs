//! A connection to an endpoint: TCP, then mutual TLS where the endpoint is meshed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;
use rustls::pki_types::ServerName;
use sheetbend_certs::{ALPN_H2, IdentityStore, MeshAlpn, PeerError, SpiffeId, format_time};
use sheetbend_control_plane_client::model::Transport;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{EndpointState, Own, Permit, Place};
use crate::listen::{expect_steady_reader, tune};
use crate::rest::Rest;
use crate::tcp::Abort;
use crate::telemetry::{Counter, Flags, Telemetry};
use crate::traffic::limit::Limit;

/// For a TCP connection within the mesh.
const CONNECT_MESH: Duration = Duration::from_secs(1);
/// For the TLS handshake within the mesh.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// For a TCP connection elsewhere, name look-up included.
const CONNECT_ELSEWHERE: Duration = Duration::from_secs(10);

/// A connection of any kind.
pub trait Io: AsyncRead + AsyncWrite + Abort + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Abort + Unpin + Send> Io for T {}

/// A connection whose kind does not matter any more. One box a connection.
pub type BoxIo = Box<dyn Io>;

/// Why an endpoint cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No connection.
    #[error("{0}")]
    Tcp(#[source] io::Error),
    /// Nobody answered in time.
    #[error("no answer within {0:?}")]
    TcpTimeout(Duration),
    /// The TLS handshake failed.
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[source] io::Error),
    /// The TLS handshake took too long.
    #[error("the TLS handshake took longer than {0:?}")]
    HandshakeTimeout(Duration),
    /// The peer's certificate is not good.
    #[error("the peer's certificate: {0}")]
    Peer(#[source] PeerError),
    /// The peer is somebody else.
    #[error("the peer is {found}, expected was {expected}")]
    Identity {
        /// Whom the control plane named.
        expected: SpiffeId,
        /// Who answered.
        found: SpiffeId,
    },
    /// This proxy cannot show who it is.
    #[error("this proxy has no certificate")]
    NoIdentity,
    /// This proxy cannot show who it is any more.
    #[error("this proxy's own certificate expired at {}", format_time(*.0))]
    OwnExpired(SystemTime),
    /// The peer agreed to nothing that was offered.
    #[error("the peer speaks nothing inside TLS that was offered to it (ALPN)")]
    Protocol,
    /// The HTTP connection could not be begun.
    #[error("HTTP could not be begun: {0}")]
    Http(#[source] hyper::Error),
    /// The endpoint is a listener of this proxy.
    #[error("{0} is this proxy itself")]
    Loop(SocketAddr),
    /// A name that is no part of the mesh leads to an address that is.
    #[error(
        "this name leads to {0}, which is of the mesh and not called in plain: call it by its address or its own name"
    )]
    OfMesh(SocketAddr),
    /// A limit of the destination is reached.
    #[error("the limit of {0} is reached")]
    Overflow(Limit),
    /// This one waited for too long for a connection.
    #[error("no connection became free in time, within the limit of {0}")]
    WaitedTooLong(Limit),
    /// Somebody else's dial, which this one waited for, took too long.
    #[error("a connection that another request dials was not there in time")]
    NoTurn,
    /// What this one met while others waited for the same connection.
    #[error("{0}")]
    First(#[source] Arc<DialError>),
    /// What somebody else met who wanted the same connection.
    #[error("{0}")]
    Shared(#[source] Arc<DialError>),
}

impl DialError {
    /// Status, RFC 9209's error word, and response flags.
    pub fn verdict(&self) -> (StatusCode, &'static str, Flags) {
        match self {
            Self::Tcp(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                (StatusCode::BAD_GATEWAY, "connection_refused", Flags::UPSTREAM_CONNECT_FAILURE)
            }
            Self::Tcp(_) => (StatusCode::BAD_GATEWAY, "destination_ip_unroutable", Flags::UPSTREAM_CONNECT_FAILURE),
            Self::TcpTimeout(_) | Self::HandshakeTimeout(_) | Self::NoTurn => {
                (StatusCode::GATEWAY_TIMEOUT, "connection_timeout", Flags::UPSTREAM_CONNECT_FAILURE)
            }
            Self::Handshake(_) | Self::Http(_) | Self::Protocol => {
                (StatusCode::BAD_GATEWAY, "tls_protocol_error", Flags::UPSTREAM_CONNECT_FAILURE)
            }
            Self::Peer(_) | Self::Identity { .. } => {
                (StatusCode::BAD_GATEWAY, "tls_certificate_error", Flags::PEER_REFUSED)
            }
            Self::NoIdentity | Self::OwnExpired(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "tls_certificate_error", Flags::NO_IDENTITY)
            }
            Self::Loop(_) => (StatusCode::LOOP_DETECTED, "proxy_loop_detected", Flags::LOOP),
            Self::OfMesh(_) => (StatusCode::BAD_GATEWAY, "destination_ip_prohibited", Flags::NO_ROUTE),
            Self::First(error) | Self::Shared(error) => error.verdict(),
            Self::Overflow(_) | Self::WaitedTooLong(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "connection_limit_reached", Flags::UPSTREAM_OVERFLOW)
            }
        }
    }
}

impl DialError {
    /// Which limit of ours is reached, if that is why.
    pub fn limit(&self) -> Option<Limit> {
        match self {
            Self::Overflow(limit) | Self::WaitedTooLong(limit) => Some(*limit),
            Self::First(error) | Self::Shared(error) => error.limit(),
            _ => None,
        }
    }

    /// What a refusal of ours is counted as; none where it is the other end that cannot be reached.
    pub fn counter(&self) -> Option<Counter> {
        match self {
            Self::NoIdentity | Self::OwnExpired(_) => Some(Counter::RefusedNoIdentity),
            Self::Peer(PeerError::NoCertificate) => Some(Counter::RefusedNoCertificate),
            Self::Peer(_) => Some(Counter::RefusedCertificate),
            Self::Identity { .. } => Some(Counter::RefusedIdentity),
            Self::Loop(_) => Some(Counter::RefusedLoop),
            Self::OfMesh(_) => Some(Counter::RefusedPolicy),
            Self::Overflow(limit) | Self::WaitedTooLong(limit) => Some(Counter::overflow(*limit)),
            Self::First(error) | Self::Shared(error) => error.counter(),
            Self::Tcp(_)
            | Self::TcpTimeout(_)
            | Self::Handshake(_)
            | Self::HandshakeTimeout(_)
            | Self::NoTurn
            | Self::Protocol
            | Self::Http(_) => None,
        }
    }
}

/// A connection to an endpoint, and what it turned out to speak.
pub(crate) struct Dialed {
    /// The connection.
    pub(crate) io: BoxIo,
    /// Whether it speaks HTTP/2, as far as it speaks HTTP at all.
    pub(crate) http2: bool,
    /// What it rests on; nothing where there is no TLS.
    pub(crate) rest: Option<Rest>,
    /// Counts it among its destination's connections.
    pub(crate) permit: Option<Arc<Permit>>,
}

/// Connects to an endpoint. `alpn` says what will be spoken; of a peer that is not ours, [`MeshAlpn::H2`] asks for
/// either HTTP, and the peer chooses.
pub(crate) async fn dial(
    endpoint: &EndpointState,
    alpn: MeshAlpn,
    identity: &IdentityStore,
    telemetry: &Telemetry,
    own: &Own,
) -> Result<Dialed, DialError> {
    if let Some(address) = endpoint.socket_address().filter(|address| own.is_listener(*address)) {
        return Err(DialError::Loop(address));
    }
    let (began, asked) = (Instant::now(), endpoint.bounds.limits.connect_timeout());
    let plain = |io| Dialed { io, http2: alpn == MeshAlpn::H2, rest: None, permit: None };
    let (expected, ours) = match &endpoint.transport {
        Transport::Sheetbend(id) => (id, true),
        Transport::MutualTls(id) => (id, false),
        Transport::Plain => {
            let (counter, within) = match endpoint.place {
                Place::App(_) => (Counter::DialedApp, CONNECT_MESH),
                Place::Address(_) | Place::Name(_) => (Counter::DialedExternal, CONNECT_ELSEWHERE),
            };
            telemetry.count(counter);
            let stream = connect(&endpoint.place, asked.unwrap_or(within), telemetry).await?;
            // A name may lead here as well, or into the mesh; only its look-up tells. Nothing is sent before.
            let address = stream.peer_addr().map_err(DialError::Tcp)?;
            if own.is_listener(address) {
                return Err(DialError::Loop(address));
            }
            if matches!(endpoint.place, Place::Name(_)) && own.is_of_mesh(address).await {
                return Err(DialError::OfMesh(address));
            }
            return Ok(plain(Box::new(stream)));
        }
    };
    let material = identity.current().ok_or(DialError::NoIdentity)?;
    if material.is_over(SystemTime::now()) {
        return Err(DialError::OwnExpired(material.identity.not_after));
    }
    if ours
        && *expected == material.identity.id
        && let Some(io) = own.enter(endpoint, alpn)
    {
        telemetry.count(Counter::DialedSelf);
        return Ok(plain(io));
    }
    telemetry.count(Counter::DialedMesh);
    let stream = connect(&endpoint.place, asked.unwrap_or(CONNECT_MESH), telemetry).await?;
    if ours && alpn == MeshAlpn::H2 {
        // Both ends of it always read, so that silence means that one is gone.
        expect_steady_reader(&stream).map_err(DialError::Tcp)?;
    }
    let config = if ours { material.mesh_client(alpn) } else { material.foreign_client(alpn) };
    let handshake = TlsConnector::from(config.clone()).connect(server_name(endpoint), stream);
    let left = asked.map_or(HANDSHAKE, |asked| asked.saturating_sub(began.elapsed()));
    let stream = match timeout(left, handshake).await {
        Ok(Ok(stream)) => stream,
        // In our own words where it was we who refused the peer.
        Ok(Err(error)) => {
            return Err(match PeerError::of_handshake(&error) {
                Some(refused) => DialError::Peer(refused.clone()),
                None => DialError::Handshake(error),
            });
        }
        Err(_) => {
            telemetry.count(Counter::TimeoutConnect);
            return Err(DialError::HandshakeTimeout(asked.unwrap_or(HANDSHAKE)));
        }
    };
    let connection = stream.get_ref().1;
    telemetry.count(match connection.handshake_kind() {
        Some(rustls::HandshakeKind::Resumed) => Counter::HandshakesResumed,
        _ => Counter::HandshakesFull,
    });
    // After every handshake: a resumed one has verified nobody.
    let chain = connection.peer_certificates().unwrap_or_default();
    let found = material.bundle.verify(chain, SystemTime::now()).map_err(DialError::Peer)?;
    if found.id != *expected {
        telemetry.count(Counter::RefusedIdentity);
        return Err(DialError::Identity { expected: expected.clone(), found: found.id });
    }
    let http2 = match (ours, connection.alpn_protocol()) {
        (true, Some(agreed)) if agreed == alpn.wire() => alpn == MeshAlpn::H2,
        (true, _) => return Err(DialError::Protocol),
        // A peer that has never heard of ALPN speaks HTTP/1.1 (RFC 7301 §3.2, RFC 9113 §3.3).
        (false, agreed) => agreed == Some(ALPN_H2),
    };
    Ok(Dialed { io: Box::new(stream), http2, rest: Some(Rest::on(found.root, identity)), permit: None })
}

async fn connect(place: &Place, within: Duration, telemetry: &Telemetry) -> Result<TcpStream, DialError> {
    let attempt = async {
        match place {
            Place::Address(address) | Place::App(address) => TcpStream::connect(address).await,
            Place::Name(target) => TcpStream::connect((target.host(), target.port())).await,
        }
    };
    let stream = match timeout(within, attempt).await {
        Ok(stream) => stream.map_err(DialError::Tcp)?,
        Err(_) => {
            telemetry.count(Counter::TimeoutConnect);
            return Err(DialError::TcpTimeout(within));
        }
    };
    tune(&stream).map_err(DialError::Tcp)?;
    Ok(stream)
}

/// `PORT.SERVICE.NAMESPACE.TRUST-DOMAIN`, so that both ends name the edge alike.
fn server_name(endpoint: &EndpointState) -> ServerName<'static> {
    let name = endpoint.service.as_ref().and_then(|(name, domain)| {
        let text = format!("{}.{}.{}.{domain}", name.port, name.service.service, name.service.namespace);
        ServerName::try_from(text).ok()
    });
    // A name that cannot travel as SNI: the address is none either, and goes unsent (RFC 6066 §3).
    name.unwrap_or_else(|| match endpoint.socket_address() {
        Some(address) => ServerName::from(address.ip()),
        None => ServerName::from(std::net::IpAddr::from([127, 0, 0, 1])),
    })
}
