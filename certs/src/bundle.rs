//! The trust bundle: the roots that a mesh believes, and the check of a chain against them.

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, TrustAnchor};

use crate::facts::{CertFacts, Sha256};
use crate::pem;
use crate::verify::{self, PeerError, VerifiedPeer};

/// More roots than a mesh has while it rotates, or federates with a few neighbours.
const MAX_ROOTS: usize = 64;
/// Chains remembered as verified. At about 150 bytes each, 150 KiB at most.
const MAX_REMEMBERED: usize = 1024;

/// One root of a bundle.
#[derive(Clone)]
pub struct Root {
    der: CertificateDer<'static>,
    pub(crate) anchor: TrustAnchor<'static>,
    facts: CertFacts,
}

impl Root {
    fn new(der: CertificateDer<'static>) -> Result<Self, String> {
        let facts = CertFacts::of(&der)?;
        if !facts.is_ca {
            return Err(format!("`{}` is no CA certificate", facts.subject));
        }
        let anchor = webpki::anchor_from_trusted_cert(&der)
            .map_err(|e| format!("`{}` cannot be a root: {e}", facts.subject))?
            .to_owned();
        Ok(Self { der, anchor, facts })
    }

    /// SHA-256 of the certificate: what a join token pins.
    pub fn sha256(&self) -> Sha256 {
        self.facts.sha256
    }

    /// The root's name.
    pub fn subject(&self) -> &str {
        &self.facts.subject
    }

    /// When it ends.
    pub fn not_after(&self) -> SystemTime {
        self.facts.not_after
    }

    /// Everything that it says.
    pub fn facts(&self) -> &CertFacts {
        &self.facts
    }

    /// The certificate.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
}

/// The roots that a mesh believes: one, or two while it rotates.
///
/// It remembers which chains it has verified, byte for byte, so that a chain is checked in full after every handshake
/// at the cost of one digest. A bundle never changes; a rotation makes another, which remembers nothing.
pub struct TrustBundle {
    roots: Vec<Root>,
    pub(crate) anchors: Vec<TrustAnchor<'static>>,
    verified: Mutex<HashMap<Sha256, VerifiedPeer>>,
}

impl TrustBundle {
    /// A bundle of these certificates, each once.
    pub fn new(roots: impl IntoIterator<Item = CertificateDer<'static>>) -> Result<Self, BundleError> {
        let mut unique: Vec<Root> = Vec::new();
        for der in roots {
            let root = Root::new(der).map_err(BundleError)?;
            if unique.iter().any(|known| known.sha256() == root.sha256()) {
                continue;
            }
            if unique.len() == MAX_ROOTS {
                return Err(BundleError(format!("it has more than {MAX_ROOTS} roots")));
            }
            unique.push(root);
        }
        if unique.is_empty() {
            return Err(BundleError("it has no root".to_owned()));
        }
        let anchors = unique.iter().map(|root| root.anchor.clone()).collect();
        Ok(Self { roots: unique, anchors, verified: Mutex::new(HashMap::new()) })
    }

    /// The bundle that a PEM text holds.
    pub fn from_pem(text: &str) -> Result<Self, BundleError> {
        Self::new(pem::decode_certificates(text).map_err(BundleError)?)
    }

    /// All roots as PEM.
    pub fn to_pem(&self) -> String {
        pem::encode_certificates(self.roots.iter().map(Root::der))
    }

    /// The roots, in the order given.
    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// Whether a root of this digest is in it.
    pub fn contains(&self, root: Sha256) -> bool {
        self.roots.iter().any(|known| known.sha256() == root)
    }

    /// Verifies a peer's chain (leaf first) up to a root of this bundle, and the leaf's usages and its one name.
    ///
    /// Nothing that the peer sent is believed before its signature is: a chain seen before, byte for byte, was verified
    /// then, and only its times are looked at again.
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<VerifiedPeer, PeerError> {
        verify::check_size(chain)?;
        let key = verify::digest_of(chain);
        if let Some(known) = self.remembered().get(&key)
            && known.valid_at(now)
        {
            return Ok(known.clone());
        }
        let peer = verify::verify_chain(self, chain, now)?;
        let mut verified = self.remembered();
        if verified.len() >= MAX_REMEMBERED {
            verified.clear(); // Rare, and one full check a peer mends it: no order of use needs keeping.
        }
        verified.insert(key, peer.clone());
        Ok(peer)
    }

    /// A panic while the lock is held leaves a map that is still whole: each entry is inserted at once.
    fn remembered(&self) -> std::sync::MutexGuard<'_, HashMap<Sha256, VerifiedPeer>> {
        self.verified.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.subject(), self.sha256().short())
    }
}

impl Clone for TrustBundle {
    fn clone(&self) -> Self {
        Self { roots: self.roots.clone(), anchors: self.anchors.clone(), verified: Mutex::default() }
    }
}

/// Equal when they hold the same roots, in whatever order.
impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.roots.len() == other.roots.len() && self.roots.iter().all(|root| other.contains(root.sha256()))
    }
}

impl Eq for TrustBundle {}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.roots).finish()
    }
}

/// Why a text or a list of certificates is no trust bundle.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not a trust bundle: {0}")]
pub struct BundleError(String);
