//! A workload's own certificate and key, and the fresh key that a new one is asked for with.

use std::sync::Arc;
use std::time::SystemTime;

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::facts::CertFacts;
use crate::pem;
use crate::spiffe::SpiffeId;
use crate::tls::provider;

/// A certificate, the chain above it, and its key: who one is, and the proof of it.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The name in the leaf.
    pub id: SpiffeId,
    /// Leaf first, then what leads to a root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's first moment.
    pub not_before: SystemTime,
    /// The leaf's last moment.
    pub not_after: SystemTime,
    key: Arc<PrivateKeyDer<'static>>,
    pub(crate) certified: Arc<CertifiedKey>,
}

impl Identity {
    /// Joins a chain (leaf first) and a key, which must be the leaf's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, IdentityError> {
        let leaf = chain.first().ok_or_else(|| IdentityError::Certificate("the chain is empty".to_owned()))?;
        let facts = CertFacts::of(leaf).map_err(IdentityError::Certificate)?;
        let [uri] = facts.uris.as_slice() else {
            let found = facts.uris.len();
            return Err(IdentityError::Certificate(format!("it must have exactly one URI name, and has {found}")));
        };
        let id = uri.parse().map_err(|e: crate::SpiffeIdError| IdentityError::Certificate(e.to_string()))?;
        let certified = CertifiedKey::from_der(chain.clone(), key.clone_key(), provider()).map_err(|e| match e {
            rustls::Error::InconsistentKeys(_) => IdentityError::Mismatch,
            other => IdentityError::Key(other.to_string()),
        })?;
        let (not_before, not_after) = (facts.not_before, facts.not_after);
        Ok(Self { id, chain, not_before, not_after, key: Arc::new(key), certified: Arc::new(certified) })
    }

    /// Reads `cert.pem` (leaf first) and `key.pem`.
    pub fn from_pem(cert: &str, key: &str) -> Result<Self, IdentityError> {
        let chain = pem::decode_certificates(cert).map_err(IdentityError::Certificate)?;
        Self::new(chain, pem::decode_key(key).map_err(IdentityError::Key)?)
    }

    /// The chain as PEM, leaf first.
    pub fn cert_pem(&self) -> String {
        pem::encode_certificates(&self.chain)
    }

    /// The key as PEM. Whoever writes it to a file makes it 0600.
    pub fn key_pem(&self) -> String {
        key_pem(&self.key)
    }
}

fn key_pem(key: &PrivateKeyDer<'_>) -> String {
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    pem::encode(label, key.secret_der())
}

/// A fresh ECDSA P-256 key, and the request that shows that one holds it. Every certificate gets its own.
pub struct KeyAndCsr {
    key: PrivateKeyDer<'static>,
    csr: Vec<u8>,
}

impl KeyAndCsr {
    /// Makes a key and a request that asks for no name: the CA writes the one that is proven.
    pub fn generate() -> Result<Self, IdentityError> {
        let failed = |e: rcgen::Error| IdentityError::Key(e.to_string());
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(failed)?.der().to_vec();
        Ok(Self { key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr })
    }

    /// The request, DER.
    pub fn csr_der(&self) -> &[u8] {
        &self.csr
    }

    /// The request, PEM.
    pub fn csr_pem(&self) -> String {
        pem::encode("CERTIFICATE REQUEST", &self.csr)
    }

    /// The key, PEM.
    pub fn key_pem(&self) -> String {
        key_pem(&self.key)
    }

    /// Joins the key with the chain that was issued for it (leaf first).
    pub fn into_identity(self, chain: Vec<CertificateDer<'static>>) -> Result<Identity, IdentityError> {
        Identity::new(chain, self.key)
    }
}

/// Why a certificate and a key are no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The certificate is at fault.
    #[error("the certificate is refused: {0}")]
    Certificate(String),
    /// The key is at fault.
    #[error("the private key is refused: {0}")]
    Key(String),
    /// They do not belong together.
    #[error("the private key is not the certificate's: one of the two files is from another issue")]
    Mismatch,
}
