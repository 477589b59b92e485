//! PEM in and out: certificates, keys, requests.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A chain, a key or a request is small; what is larger than this is none.
pub(crate) const MAX_PEM: usize = 256 * 1024;

/// One PEM block.
pub(crate) fn encode(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        out.extend(line.iter().map(|&byte| char::from(byte)));
        out.push('\n');
    }
    out + "-----END " + label + "-----\n"
}

/// Certificates as PEM, in the order given.
pub fn encode_certificates<'a>(chain: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    chain.into_iter().map(|der| encode("CERTIFICATE", der)).collect()
}

/// Every certificate of a PEM text, in its order; `Err` says in words what is wrong.
pub fn decode_certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    if text.len() > MAX_PEM {
        return Err("it is larger than 256 KiB".to_owned());
    }
    let certs = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| format!("it is not well-formed PEM ({e})"))?;
    if certs.is_empty() {
        let found = label(text).map(|label| format!("; it has a {label}")).unwrap_or_default();
        return Err(format!("no certificate in it (-----BEGIN CERTIFICATE-----){found}"));
    }
    Ok(certs)
}

/// The private key of a PEM text.
pub(crate) fn decode_key(text: &str) -> Result<PrivateKeyDer<'static>, String> {
    if text.len() > MAX_PEM {
        return Err("it is larger than 256 KiB".to_owned());
    }
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|_| {
        let found = label(text).map(|label| format!("; it has a {label}")).unwrap_or_default();
        format!("no private key in it (-----BEGIN PRIVATE KEY-----){found}")
    })
}

/// What the first PEM block calls itself.
pub(crate) fn label(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("-----BEGIN ")?;
    let (label, _) = rest.split_once("-----")?;
    (label.len() < 40 && label.bytes().all(|b| b.is_ascii_uppercase() || b == b' ' || b.is_ascii_digit()))
        .then_some(label)
}
