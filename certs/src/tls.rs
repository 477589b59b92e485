//! TLS as the mesh speaks it: 1.3 only, post-quantum key exchange first, and verifiers that ask for a workload's name.
//!
//! A verifier belongs to one trust bundle for good. Another bundle means other verifiers and configurations, hence other
//! session caches: no session is resumed across a change of roots.

use std::sync::{Arc, LazyLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::bundle::TrustBundle;
use crate::facts::{CertFacts, Sha256};
use crate::identity::Identity;
use crate::verify::{PeerError, check_size, system, verify_host, verify_peer_for_renewal};

/// What runs inside a TLS connection between two of our proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MeshAlpn {
    /// HTTP, many requests at a time.
    H2,
    /// One HTTP/1.1 exchange, for what HTTP/2 cannot carry.
    Http1,
    /// Opaque bytes.
    Tcp,
}

impl MeshAlpn {
    /// All of them, the one we like best first.
    pub const ALL: [Self; 3] = [Self::H2, Self::Http1, Self::Tcp];

    /// The protocol's name on the wire.
    pub const fn wire(self) -> &'static [u8] {
        match self {
            Self::H2 => b"sheetbend/h2",
            Self::Http1 => b"sheetbend/http1.1",
            Self::Tcp => b"sheetbend/tcp",
        }
    }

    /// Reads a negotiated protocol; anything that is not ours is `None`.
    pub fn from_wire(wire: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|alpn| alpn.wire() == wire)
    }
}

/// HTTP/2 inside TLS, as everybody but us calls it (RFC 9113 §3.2).
pub const ALPN_H2: &[u8] = b"h2";
/// HTTP/1.1 inside TLS (RFC 7301 §6).
pub const ALPN_HTTP1: &[u8] = b"http/1.1";

/// The one provider: AES-128-GCM first (on every machine with AES instructions the cheapest of three that are all
/// strong enough), X25519MLKEM768 first.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        use aws_lc_rs::{cipher_suite, kx_group};
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
            ..aws_lc_rs::default_provider()
        })
    });
    &PROVIDER
}

/// Towards any mesh peer: our certificate, its chain against the bundle. The peer's name is the caller's to check, with
/// [`crate::verify_peer`].
pub(crate) fn mesh_client(identity: &Identity, bundle: Arc<TrustBundle>) -> Result<ClientConfig, rustls::Error> {
    client(ServerTrust::Mesh(bundle), Some(identity))
}

/// For mesh peers: they must show a certificate.
pub(crate) fn mesh_server(identity: &Identity, bundle: Arc<TrustBundle>) -> Result<ServerConfig, rustls::Error> {
    server(identity, ClientTrust { bundle, optional: false })
}

/// Towards a control plane whose root is known: its chain against the bundle, and the DNS or IP name that was dialed.
/// Offers `h2`.
pub fn control_plane_client(
    identity: Option<&Identity>,
    bundle: Arc<TrustBundle>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = client(ServerTrust::Host(bundle), identity)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Towards a control plane at the first meeting: of its root only the digest is known, from a join token. The server
/// must show a chain that leads to, and includes, that root, and have the DNS or IP name that was dialed. Offers `h2`.
pub fn first_trust_client(root: Sha256) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut config = client(ServerTrust::Pinned(root), None)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // One meeting, then the bundle is known.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

/// For a control plane: clients may come without a certificate (to ask for their first), or with one that ended within
/// [`crate::RENEWAL_GRACE`]. What such a client may do is the caller's to decide, with [`crate::verify_peer`] and
/// [`crate::verify_peer_for_renewal`]. The chain shown includes the root, which a join token pins.
pub fn control_plane_server(identity: &Identity, bundle: Arc<TrustBundle>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut whole = identity.clone();
    let last_issuer = whole.chain.last().and_then(|last| CertFacts::of(last).ok()).and_then(|last| last.issuer_key_id);
    for root in bundle.roots() {
        let signed_the_last = last_issuer.is_some() && root.facts().key_id == last_issuer;
        let beside_a_cross_signed_one = whole.chain.iter().any(|der| {
            CertFacts::of(der).is_ok_and(|facts| facts.key_sha256 == root.facts().key_sha256 && facts.is_ca)
        });
        if (signed_the_last || beside_a_cross_signed_one) && !whole.chain.contains(root.der()) {
            whole.chain.push(root.der().clone());
        }
    }
    let key = rustls::sign::CertifiedKey::new(whole.chain.clone(), identity.certified.key.clone());
    whole.certified = Arc::new(key);
    let mut config = server(&whole, ClientTrust { bundle, optional: true })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn client(trust: ServerTrust, identity: Option<&Identity>) -> Result<ClientConfig, rustls::Error> {
    let builder = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(trust));
    Ok(match identity {
        Some(identity) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone())))
        }
        None => builder.with_no_client_auth(),
    })
}

fn server(identity: &Identity, trust: ClientTrust) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(trust))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified.clone())));
    // One ticket a connection keeps a peer supplied with one for its next; each costs a write and a cache entry.
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// What a client asks of a server's certificate.
#[derive(Debug)]
enum ServerTrust {
    Mesh(Arc<TrustBundle>),
    Host(Arc<TrustBundle>),
    Pinned(Sha256),
}

impl ServerTrust {
    fn check(&self, chain: &[CertificateDer<'_>], host: &ServerName<'_>, now: UnixTime) -> Result<(), PeerError> {
        check_size(chain)?;
        let now = system(now);
        match self {
            Self::Mesh(bundle) => bundle.verify(chain, now).map(|_| ()),
            Self::Host(bundle) => {
                bundle.verify(chain, now)?;
                verify_host(&chain[0], host)
            }
            Self::Pinned(pin) => {
                pinned_bundle(*pin, chain)?.verify(chain, now)?;
                verify_host(&chain[0], host)
            }
        }
    }
}

/// The bundle of the one root that is pinned, taken from what the server shows.
fn pinned_bundle(pinned: Sha256, chain: &[CertificateDer<'_>]) -> Result<TrustBundle, PeerError> {
    let Some(root) = chain.iter().skip(1).find(|der| Sha256::of(der) == pinned) else {
        let shown = chain.last().and_then(|last| CertFacts::of(last).ok());
        let shown = shown.map_or("nothing readable".to_owned(), |last| format!("`{}` ({})", last.subject, last.sha256));
        return Err(PeerError::WrongPin { pinned, shown });
    };
    TrustBundle::new([root.clone().into_owned()]).map_err(|e| PeerError::Unreadable(e.to_string()))
}

/// What a handshake's signature must be, whoever signed it. TLS 1.2 is never negotiated, and would be refused here too.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _cert: &CertificateDer<'_>,
            _dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("the mesh speaks TLS 1.3 only".to_owned()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for ServerTrust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(&joined(end_entity, intermediates), server_name, now).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

/// What a server asks of a client's certificate.
#[derive(Debug)]
struct ClientTrust {
    bundle: Arc<TrustBundle>,
    /// A control plane's: none will do, and so will one that ended lately.
    optional: bool,
}

impl ClientCertVerifier for ClientTrust {
    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    /// None: a peer has one certificate and needs no hint which to show.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = joined(end_entity, intermediates);
        match self.optional {
            true => verify_peer_for_renewal(Some(&chain), &self.bundle, system(now)).map(|_| ()),
            false => self.bundle.verify(&chain, system(now)).map(|_| ()),
        }
        .map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

/// The chain as one list. Copies pointers, not certificates.
fn joined<'a>(end_entity: &'a CertificateDer<'_>, intermediates: &'a [CertificateDer<'_>]) -> Vec<CertificateDer<'a>> {
    std::iter::once(end_entity).chain(intermediates).map(|der| CertificateDer::from(der.as_ref())).collect()
}

/// Keeps our own words for the log on this side; the peer is told `certificate_unknown`.
fn refused(error: PeerError) -> rustls::Error {
    rustls::Error::InvalidCertificate(match error {
        PeerError::Unreadable(_) => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}
