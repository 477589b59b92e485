//! The handshake of mutual TLS with whoever calls: who they are, or why they are refused, and what they speak inside.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{ALPN_H2, MeshAlpn, VerifiedPeer, format_time};
use sheetbend_control_plane_client::model::AppProtocol;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::app::Shared;
use crate::rewind::Rewind;
use crate::telemetry::Counter;
use crate::upstream::BoxIo;

/// For a ClientHello, and for the handshake after it.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(2);

/// Shakes hands with a proxy of ours, or with anybody else who has a certificate of the mesh. Whoever is refused is counted
/// and, now and then, logged.
pub(crate) async fn accept(
    io: Rewind<BoxIo>,
    ours: bool,
    peer: SocketAddr,
    app: AppProtocol,
    shared: &Shared,
) -> Option<(TlsStream<Rewind<BoxIo>>, VerifiedPeer)> {
    let telemetry = &shared.telemetry;
    let Some(material) = shared.identity.current() else {
        telemetry.count(Counter::RefusedNoIdentity);
        return None;
    };
    if material.is_over(SystemTime::now()) {
        if let Some(left_out) = telemetry.refused(Counter::RefusedNoIdentity) {
            let since = format_time(material.identity.not_after);
            tracing::error!(%peer, since, left_out, "a connection is refused: this proxy's own certificate has expired");
        }
        return None;
    }
    let config = match ours {
        true => &material.server,
        false => material.server_any(matches!(app, AppProtocol::Http2 | AppProtocol::Grpc)),
    };
    let stream = match timeout(HANDSHAKE, TlsAcceptor::from(config.clone()).accept(io)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            if let Some(left_out) = telemetry.refused(handshake_refusal(&error)) {
                tracing::warn!(%peer, %error, left_out, "a TLS handshake failed");
            }
            return None;
        }
        Err(_) => {
            telemetry.count(Counter::RefusedHandshakeTimeout);
            return None;
        }
    };
    let connection = stream.get_ref().1;
    telemetry.count(match connection.handshake_kind() {
        Some(rustls::HandshakeKind::Resumed) => Counter::HandshakesResumed,
        _ => Counter::HandshakesFull,
    });
    // After every handshake: a resumed one has verified nobody.
    let chain = connection.peer_certificates().unwrap_or_default();
    match material.bundle.verify(chain, SystemTime::now()) {
        Ok(verified) => Some((stream, verified)),
        Err(error) => {
            if let Some(left_out) = telemetry.refused(Counter::RefusedCertificate) {
                tracing::warn!(%peer, %error, left_out, "a peer is refused");
            }
            None
        }
    }
}

/// What runs inside a TLS connection.
pub(crate) enum Inside {
    Http {
        http2: bool,
    },
    Opaque,
    /// The peer did not say: its first bytes tell.
    Unsaid,
}

impl Inside {
    /// What one of our own proxies said.
    pub(crate) fn ours(alpn: MeshAlpn) -> Self {
        match alpn {
            MeshAlpn::H2 => Self::Http { http2: true },
            MeshAlpn::Http1 => Self::Http { http2: false },
            MeshAlpn::Tcp => Self::Opaque,
        }
    }

    /// What was agreed on, on a port where `app` is spoken as far as someone said so.
    pub(crate) fn of(alpn: Option<&[u8]>, app: AppProtocol) -> Self {
        match (alpn.and_then(MeshAlpn::from_wire), alpn) {
            (Some(ours), _) => Self::ours(ours),
            // Bytes that nobody is to look into, whatever they are called.
            (None, _) if app == AppProtocol::Tcp => Self::Opaque,
            // Nothing but HTTP/1.1 and HTTP/2 is ever agreed on.
            (None, Some(http)) => Self::Http { http2: http == ALPN_H2 },
            (None, None) => Self::Unsaid,
        }
    }
}

/// Why a handshake failed, as it is counted.
fn handshake_refusal(error: &std::io::Error) -> Counter {
    use rustls::{Error as E, PeerIncompatible as P};
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(E::NoCertificatesPresented) => Counter::RefusedNoCertificate,
        Some(E::InvalidCertificate(_)) => Counter::RefusedCertificate,
        // What a client without TLS 1.3 looks like: it lists older versions, or has never heard of listing them.
        Some(E::PeerIncompatible(P::Tls12NotOfferedOrEnabled | P::SupportedVersionsExtensionRequired)) => {
            Counter::RefusedTlsVersion
        }
        _ => Counter::RefusedHandshake,
    }
}
