//! Who a peer is: its chain, its times, its usages, and its one name.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeId, KeyPurposeIdIter};

use crate::bundle::TrustBundle;
use crate::facts::{CertFacts, Sha256, format_span, format_time};
use crate::spiffe::SpiffeId;
use crate::tls::provider;

/// Leaf, issuer and, while roots rotate, a cross-signed root; others have an intermediate or two more.
const MAX_CHAIN: usize = 8;
/// A certificate of ours is below 1 KiB, one with an RSA-4096 key and many names below 4 KiB.
const MAX_CHAIN_BYTES: usize = 32 * 1024;
/// How long after its end a certificate still proves who asks for the next one, outside Kubernetes.
pub const RENEWAL_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);

/// What a verified chain proves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedPeer {
    /// The name in the leaf.
    pub id: SpiffeId,
    /// The root that the chain ends at.
    pub root: Sha256,
    /// When the first certificate of the chain, root included, ends.
    pub not_after: SystemTime,
    /// When the last of them began.
    pub not_before: SystemTime,
}

impl VerifiedPeer {
    pub(crate) fn valid_at(&self, now: SystemTime) -> bool {
        (self.not_before..=self.not_after).contains(&now)
    }
}

/// Says who the peer of a finished handshake is. To be called after *every* handshake, resumed ones included: a TLS
/// library verifies neither side when it resumes a session.
///
/// The whole chain is checked against `bundle` as it is now; the caller compares the name with those it expects.
pub fn verify_peer(
    certs: Option<&[CertificateDer<'_>]>,
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<SpiffeId, PeerError> {
    Ok(bundle.verify(certs.unwrap_or_default(), now)?.id)
}

/// Who asks for a new certificate, and since when the old one is expired, if it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewing {
    /// The name in the old certificate.
    pub id: SpiffeId,
    /// When the old certificate ended, if it has.
    pub expired_since: Option<SystemTime>,
}

/// Like [`verify_peer`], but a leaf that ended within [`RENEWAL_GRACE`] still proves who it was: for renewing, and for
/// nothing else.
pub fn verify_peer_for_renewal(
    certs: Option<&[CertificateDer<'_>]>,
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<Renewing, PeerError> {
    let chain = certs.unwrap_or_default();
    check_size(chain)?;
    let leaf = facts_of(chain, 0)?;
    let within_grace = leaf.not_after < now && now <= leaf.not_after + RENEWAL_GRACE;
    let at = if within_grace { leaf.not_after } else { now };
    let id = bundle.verify(chain, at)?.id;
    Ok(Renewing { id, expired_since: within_grace.then_some(leaf.not_after) })
}

/// Whether the leaf of a chain names the host that was asked for. The chain itself is verified elsewhere.
pub(crate) fn verify_host(leaf: &CertificateDer<'_>, host: &ServerName<'_>) -> Result<(), PeerError> {
    let cert = EndEntityCert::try_from(leaf).map_err(PeerError::Chain)?;
    cert.verify_is_valid_for_subject_name(host).map_err(|_| {
        let names = CertFacts::of(leaf).map(|facts| {
            let ips = facts.ips.iter().map(ToString::to_string);
            facts.dns.iter().cloned().chain(ips).take(20).collect::<Vec<_>>().join(", ")
        });
        PeerError::WrongHost { host: host.to_str().into_owned(), names: names.unwrap_or_default() }
    })
}

/// Nothing of a chain is read before its size is known to be sane.
pub(crate) fn check_size(chain: &[CertificateDer<'_>]) -> Result<(), PeerError> {
    if chain.is_empty() {
        return Err(PeerError::NoCertificate);
    }
    let bytes = chain.iter().map(|der| der.len()).sum::<usize>();
    if chain.len() > MAX_CHAIN || bytes > MAX_CHAIN_BYTES {
        return Err(PeerError::TooLong { certificates: chain.len(), bytes });
    }
    Ok(())
}

pub(crate) fn digest_of(chain: &[CertificateDer<'_>]) -> Sha256 {
    let mut context = digest::Context::new(&digest::SHA256);
    for der in chain {
        context.update(&u32::try_from(der.len()).unwrap_or(u32::MAX).to_be_bytes());
        context.update(der);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    Sha256(out)
}

/// The full check, signatures first. Only what a root of ours has signed is read any further.
pub(crate) fn verify_chain(
    bundle: &TrustBundle,
    chain: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<VerifiedPeer, PeerError> {
    let (leaf_der, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
    let cert = EndEntityCert::try_from(leaf_der).map_err(PeerError::Chain)?;
    let path = cert
        .verify_for_usage(
            provider().signature_verification_algorithms.all,
            &bundle.anchors,
            intermediates,
            unix(now),
            BothUsages,
            None,
            None,
        )
        .map_err(|e| explain(e, bundle, chain, now))?;
    let root = bundle
        .roots()
        .iter()
        .find(|root| {
            root.anchor.subject == path.anchor().subject
                && root.anchor.subject_public_key_info == path.anchor().subject_public_key_info
        })
        .ok_or_else(|| unknown_root(bundle, chain))?;

    let leaf = facts_of(chain, 0)?;
    let id = leaf_name(&leaf)?;
    let mut peer = VerifiedPeer {
        id,
        root: root.sha256(),
        not_before: leaf.not_before,
        not_after: leaf.not_after.min(root.not_after()),
    };
    for intermediate in path.intermediate_certificates() {
        let facts = CertFacts::of(&intermediate.der()).map_err(PeerError::Unreadable)?;
        peer.not_before = peer.not_before.max(facts.not_before);
        peer.not_after = peer.not_after.min(facts.not_after);
    }
    if now > root.not_after() {
        return Err(PeerError::RootExpired { root: root.subject().to_owned(), since: root.not_after() });
    }
    peer.not_before = peer.not_before.max(root.facts().not_before);
    if now < peer.not_before {
        return Err(PeerError::NotYetValid { from: peer.not_before, now });
    }
    Ok(peer)
}

/// The rules of X.509-SVID §4 and §5 for a leaf, and its one name.
fn leaf_name(leaf: &CertFacts) -> Result<SpiffeId, PeerError> {
    if leaf.is_ca {
        return Err(PeerError::Ca);
    }
    if !leaf.signs_handshakes_only {
        return Err(PeerError::Usage("keyUsage must have digitalSignature, and neither keyCertSign nor cRLSign"));
    }
    if !(leaf.server_auth && leaf.client_auth) {
        return Err(PeerError::Usage("extendedKeyUsage must have serverAuth and clientAuth"));
    }
    let [uri] = leaf.uris.as_slice() else {
        return Err(PeerError::Names { uris: leaf.uris.len() });
    };
    let id: SpiffeId = uri.parse().map_err(|e: crate::SpiffeIdError| PeerError::Id(e.to_string()))?;
    if id.path().is_empty() {
        return Err(PeerError::Id(format!("`{id}` names a trust domain, not a workload")));
    }
    Ok(id)
}

/// serverAuth and clientAuth, wherever a certificate limits its usages at all. That a leaf does is checked beside it.
struct BothUsages;

impl ExtendedKeyUsageValidator for BothUsages {
    fn validate(&self, usages: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        // id-kp-serverAuth and id-kp-clientAuth, RFC 5280 §4.2.1.12.
        const SERVER: KeyPurposeId<'static> = KeyPurposeId::new(&[0x2b, 6, 1, 5, 5, 7, 3, 1]);
        const CLIENT: KeyPurposeId<'static> = KeyPurposeId::new(&[0x2b, 6, 1, 5, 5, 7, 3, 2]);
        let (mut any, mut server, mut client) = (false, false, false);
        for usage in usages {
            let usage = usage?;
            any = true;
            server |= usage == SERVER;
            client |= usage == CLIENT;
        }
        let missing = if server { webpki::KeyUsage::client_auth() } else { webpki::KeyUsage::server_auth() };
        match any && !(server && client) {
            true => Err(webpki::Error::RequiredEkuNotFoundContext(webpki::RequiredEkuNotFoundContext {
                required: missing,
                present: Vec::new(),
            })),
            false => Ok(()),
        }
    }
}

fn explain(error: webpki::Error, bundle: &TrustBundle, chain: &[CertificateDer<'_>], now: SystemTime) -> PeerError {
    use webpki::Error as E;
    match error {
        E::CertExpired { not_after, .. } => PeerError::Expired { since: system(not_after), now },
        E::CertNotValidYet { not_before, .. } => PeerError::NotYetValid { from: system(not_before), now },
        E::CaUsedAsEndEntity => PeerError::Ca,
        E::RequiredEkuNotFoundContext(_) => {
            PeerError::Usage("extendedKeyUsage must have serverAuth and clientAuth, wherever it stands in the chain")
        }
        E::UnknownIssuer => unknown_root(bundle, chain),
        other => PeerError::Chain(other),
    }
}

/// Names both sides' roots. What the peer's last certificate says of its issuer is hearsay, good enough for a message.
fn unknown_root(bundle: &TrustBundle, chain: &[CertificateDer<'_>]) -> PeerError {
    let theirs = match facts_of(chain, chain.len().saturating_sub(1)) {
        Ok(last) if last.issuer.is_empty() => "of no name".to_owned(),
        Ok(last) => format!("`{}`", last.issuer),
        Err(_) => "that cannot be read".to_owned(),
    };
    let ours = bundle.roots().iter().map(|root| format!("`{}`", root.subject())).collect::<Vec<_>>().join(", ");
    PeerError::UnknownRoot { theirs, ours }
}

fn facts_of(chain: &[CertificateDer<'_>], at: usize) -> Result<CertFacts, PeerError> {
    CertFacts::of(chain.get(at).ok_or(PeerError::NoCertificate)?).map_err(PeerError::Unreadable)
}

pub(crate) fn unix(at: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

pub(crate) fn system(at: UnixTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(at.as_secs())
}

/// Why a peer is not believed.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It showed none.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// Its chain is beyond all measure, and was not read.
    #[error("the peer's chain has {certificates} certificates and {bytes} bytes: more than 8, or than 32 KiB")]
    TooLong {
        /// How many certificates it sent.
        certificates: usize,
        /// Their size in all.
        bytes: usize,
    },
    /// A certificate of it cannot be read.
    #[error("the peer's certificate is refused: {0}")]
    Unreadable(String),
    /// No root of ours signed it.
    #[error("the peer's root {theirs} is not in our bundle [{ours}]")]
    UnknownRoot {
        /// The peer's root, quoted.
        theirs: String,
        /// Ours, quoted and joined.
        ours: String,
    },
    /// Out of date.
    #[error("the peer's certificate expired at {}, {} ago", format_time(*.since), format_span(.now.duration_since(*.since).unwrap_or_default()))]
    Expired {
        /// Its end.
        since: SystemTime,
        /// The clock it was held against.
        now: SystemTime,
    },
    /// From the future: a clock is off.
    #[error("the peer's certificate is not valid before {}, and here it is {}: one of the two clocks is off", format_time(*.from), format_time(*.now))]
    NotYetValid {
        /// Its begin.
        from: SystemTime,
        /// The clock it was held against.
        now: SystemTime,
    },
    /// The root itself is out of date.
    #[error("our root `{root}` expired at {}: rotate to a new one", format_time(*.since))]
    RootExpired {
        /// Its name.
        root: String,
        /// Its end.
        since: SystemTime,
    },
    /// A CA's certificate was shown as a workload's.
    #[error("the peer showed a CA's certificate as its own")]
    Ca,
    /// Its usages do not allow what it is used for.
    #[error("the peer's certificate is not for this use: {0}")]
    Usage(&'static str),
    /// Not exactly one name.
    #[error("the peer's certificate must have exactly one URI name, and has {uris}")]
    Names {
        /// How many it has.
        uris: usize,
    },
    /// Its name is no workload's.
    #[error("the peer's name is refused: {0}")]
    Id(String),
    /// The control plane is not the host that was asked for.
    #[error(
        "the certificate is not for `{host}` but for [{names}]; use one of these names, or issue it with --dns {host}"
    )]
    WrongHost {
        /// What was asked for.
        host: String,
        /// What the certificate names.
        names: String,
    },
    /// The pinned root was not shown.
    #[error(
        "the server's chain does not lead to the root that the token names ({pinned}); it shows {shown}. Make a new token with `sheetbend token create`, or check that this is the right control plane"
    )]
    WrongPin {
        /// The digest in the token.
        pinned: Sha256,
        /// What stood at the end of the chain.
        shown: String,
    },
    /// Anything else that path building refuses.
    #[error("the peer's chain is refused: {0}")]
    Chain(webpki::Error),
}

impl PeerError {
    /// The reason in our own words, if a handshake failed because the peer's certificate was refused on this side.
    pub fn of_handshake(error: &std::io::Error) -> Option<&Self> {
        Self::of_tls(error.get_ref()?.downcast_ref()?)
    }

    /// Likewise, from the TLS library's error.
    pub fn of_tls(error: &rustls::Error) -> Option<&Self> {
        match error {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => other.0.downcast_ref(),
            _ => None,
        }
    }
}

/// As `Display`: the TLS library writes the reason into its own messages in this form, and operators read those.
impl std::fmt::Debug for PeerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
