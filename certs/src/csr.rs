//! Certificate signing requests, coming in: a public key, and the proof that the asker holds its other half.

use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

use crate::facts::Sha256;
use crate::pem;

/// A request with an RSA-4096 key and many names is below 4 KiB.
const MAX_CSR: usize = 16 * 1024;

/// sha1WithRSAEncryption and ecdsa-with-SHA1.
const SHA1: [&str; 2] = ["1.2.840.113549.1.1.5", "1.2.840.10045.4.1"];

/// A request whose own signature holds. Of what it says, the public key alone is kept: whatever names it asks for are
/// never looked at, since the CA writes the name that the asker has proven.
#[derive(Clone, Debug)]
pub struct Csr {
    pub(crate) key: SubjectPublicKeyInfo,
    key_sha256: Sha256,
}

impl Csr {
    /// Reads a request in PEM or DER, checks its signature, and that its key is strong enough.
    pub fn parse(bytes: &[u8]) -> Result<Self, CsrError> {
        if bytes.len() > MAX_CSR {
            return Err(CsrError::TooLarge(bytes.len()));
        }
        let owned;
        let der = match std::str::from_utf8(bytes).ok().filter(|text| text.contains("-----BEGIN ")) {
            Some(text) => {
                owned = CertificateSigningRequestDer::from_pem_slice(text.as_bytes()).map_err(|_| {
                    CsrError::NotARequest(match pem::label(text) {
                        Some(label) => format!("this PEM holds a {label}"),
                        None => "this PEM is damaged".to_owned(),
                    })
                })?;
                owned.as_ref()
            }
            None => bytes,
        };
        Self::from_der(der)
    }

    fn from_der(der: &[u8]) -> Result<Self, CsrError> {
        let (rest, request) = X509CertificationRequest::from_der(der)
            .map_err(|_| CsrError::NotARequest("these bytes are no PKCS #10 request".to_owned()))?;
        if !rest.is_empty() {
            return Err(CsrError::NotARequest("bytes follow the request".to_owned()));
        }
        let spki = &request.certification_request_info.subject_pki;
        let weak = match spki.parsed() {
            Ok(PublicKey::EC(_)) | Ok(PublicKey::Unknown(_)) => None, // What is not supported is refused just below.
            Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
                2048..=4096 => None,
                bits => Some(format!("an RSA key of {bits} bits; take 2048 to 4096, or better ECDSA P-256")),
            },
            _ => Some("a key of an old or unreadable kind; take ECDSA P-256".to_owned()),
        };
        if let Some(weak) = weak {
            return Err(CsrError::Key(weak));
        }
        let key = SubjectPublicKeyInfo::from_der(spki.raw)
            .map_err(|_| CsrError::Key("a key of an unsupported kind; take ECDSA P-256".to_owned()))?;
        let algorithm = request.signature_algorithm.algorithm.to_id_string();
        if SHA1.contains(&algorithm.as_str()) {
            return Err(CsrError::Key(
                "it is signed with SHA-1, which proves nothing any more; take SHA-256".to_owned(),
            ));
        }
        request.verify_signature().map_err(|_| CsrError::Signature)?;
        let key_sha256 = Sha256::of(&key.subject_public_key_info());
        Ok(Self { key, key_sha256 })
    }

    /// SHA-256 of the public key (SubjectPublicKeyInfo): two requests with the same key have the same one.
    pub fn key_sha256(&self) -> Sha256 {
        self.key_sha256
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Not a request at all.
    #[error(
        "not a certificate signing request: {0}; make one with `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -subj / -out web.csr`"
    )]
    NotARequest(String),
    /// Larger than any request.
    #[error("a certificate signing request of {0} bytes is refused: 16 KiB are the most")]
    TooLarge(usize),
    /// Its key is too weak, or of a kind that nobody here verifies.
    #[error("the request's key is refused: {0}")]
    Key(String),
    /// Nobody has shown that they hold the private key.
    #[error("the request's own signature does not hold: it was altered, or signed with another key")]
    Signature,
}
