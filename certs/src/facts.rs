//! What one certificate says, read once. Saying is not proving: nothing here checks a signature.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// A SHA-256 digest, written as lower-case hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// The digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut out = [0; 32];
        out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
        Self(out)
    }

    /// The first eight hex digits: enough for an eye, never for a decision.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl std::fmt::Display for Sha256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Sha256 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || "a SHA-256 digest is 64 hex digits".to_owned();
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return Err(refuse());
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok()).ok_or_else(refuse);
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(out))
    }
}

/// The fields of a certificate that a person or a rule asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertFacts {
    /// Subject, as text fit for a log line; empty when the certificate has none.
    pub subject: String,
    /// Issuer, likewise.
    pub issuer: String,
    /// Serial number in hex.
    pub serial: String,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// Whether basicConstraints say that it may sign certificates.
    pub is_ca: bool,
    /// How many CAs may stand below this one, if it says so.
    pub path_len: Option<u32>,
    /// URI names, byte for byte: to be parsed, or escaped before they are shown.
    pub uris: Vec<String>,
    /// DNS names, likewise.
    pub dns: Vec<String>,
    /// Addresses.
    pub ips: Vec<IpAddr>,
    /// Whether keyUsage is there, with digitalSignature and without keyCertSign and cRLSign.
    pub signs_handshakes_only: bool,
    /// Whether extendedKeyUsage names serverAuth.
    pub server_auth: bool,
    /// Whether extendedKeyUsage names clientAuth.
    pub client_auth: bool,
    /// Subject key identifier, in hex.
    pub key_id: Option<String>,
    /// Authority key identifier, in hex.
    pub issuer_key_id: Option<String>,
    /// Digest of the whole certificate.
    pub sha256: Sha256,
    /// Digest of the public key (SubjectPublicKeyInfo).
    pub key_sha256: Sha256,
}

impl CertFacts {
    /// Reads a certificate; `Err` says in words why it is none.
    pub fn of(der: &[u8]) -> Result<Self, String> {
        let (rest, cert) = X509Certificate::from_der(der).map_err(|_| "this is not an X.509 certificate".to_owned())?;
        if !rest.is_empty() {
            return Err("bytes follow the certificate".to_owned());
        }
        let broken =
            |what: &'static str| move |_| format!("the certificate's {what} cannot be read, or stands there twice");
        let basic = cert.basic_constraints().map_err(broken("basicConstraints"))?.map(|ext| ext.value);
        let usage = cert.key_usage().map_err(broken("keyUsage"))?.map(|ext| ext.value);
        let extended = cert.extended_key_usage().map_err(broken("extendedKeyUsage"))?.map(|ext| ext.value);
        let names = cert.subject_alternative_name().map_err(broken("subjectAltName"))?.map(|ext| ext.value);
        let mut facts = Self {
            subject: printable(&cert.subject().to_string()),
            issuer: printable(&cert.issuer().to_string()),
            serial: hex(cert.tbs_certificate.raw_serial()),
            not_before: moment(cert.validity().not_before.timestamp()),
            not_after: moment(cert.validity().not_after.timestamp()),
            is_ca: basic.is_some_and(|b| b.ca),
            path_len: basic.and_then(|b| b.path_len_constraint),
            uris: Vec::new(),
            dns: Vec::new(),
            ips: Vec::new(),
            signs_handshakes_only: usage.is_some_and(|u| u.digital_signature() && !u.key_cert_sign() && !u.crl_sign()),
            server_auth: extended.is_some_and(|e| e.server_auth),
            client_auth: extended.is_some_and(|e| e.client_auth),
            key_id: None,
            issuer_key_id: None,
            sha256: Sha256::of(der),
            key_sha256: Sha256::of(cert.public_key().raw),
        };
        for name in names.map(|n| n.general_names.as_slice()).unwrap_or_default() {
            match name {
                GeneralName::URI(uri) => facts.uris.push((*uri).to_owned()),
                GeneralName::DNSName(dns) => facts.dns.push(printable(dns)),
                GeneralName::IPAddress(bytes) => facts.ips.extend(ip(bytes)),
                _ => {}
            }
        }
        for extension in cert.extensions() {
            use x509_parser::extensions::ParsedExtension as P;
            match extension.parsed_extension() {
                P::SubjectKeyIdentifier(id) => facts.key_id = Some(hex(id.0)),
                P::AuthorityKeyIdentifier(id) => facts.issuer_key_id = id.key_identifier.as_ref().map(|id| hex(id.0)),
                _ => {}
            }
        }
        Ok(facts)
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// What a stranger wrote, made fit for one log line: 300 characters at most, and all that is not plain ASCII escaped, so
/// that nothing in it can break the line, colour it, or turn it round.
pub(crate) fn printable(text: &str) -> String {
    text.chars().take(300).flat_map(char::escape_default).collect::<String>().replace("\\'", "'").replace("\\\"", "\"")
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Seconds since 1970 as a time; what lies before is 1970, what lies beyond the year 9999 is its end.
fn moment(seconds: i64) -> SystemTime {
    const YEAR_9999_ENDS: u64 = 253_402_300_799;
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0).min(YEAR_9999_ENDS))
}

/// A time as an operator reads it: `2026-11-22T04:03:05Z`.
pub fn format_time(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(seconds)
        .ok()
        .and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok())
        .and_then(|t| t.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

/// A span in its two largest units: `23h 59m`, `3d 2h`, `45s`.
pub fn format_span(span: Duration) -> String {
    let seconds = span.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}
