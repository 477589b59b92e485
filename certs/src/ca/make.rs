//! What the CA puts into certificates.

use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, DnsName};
use time::OffsetDateTime;

use super::layout::{Authority, CaError, Loaded};
use super::record::Entry;
use super::{BACKDATE, DEFAULT_TTL, IssueRequest};
use crate::csr::Csr;
use crate::facts::{Sha256, format_time, hex};
use crate::spiffe::TrustDomain;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// A root outlives the machines that trust it, and can be rotated at any time.
const ROOT_LIFE: Duration = Duration::from_secs(3650 * DAY.as_secs());
/// The issuing CA makes way for a new one by itself, at two thirds of this.
const ISSUER_LIFE: Duration = Duration::from_secs(365 * DAY.as_secs());
/// A CA is valid from a little before any leaf that it signs in its first second.
const CA_BACKDATE: Duration = Duration::from_secs(2 * BACKDATE.as_secs());
/// Below a root: its successor while it retires, and an issuing CA.
const ROOT_PATH_LEN: u8 = 2;

pub(crate) fn root(trust_domain: &TrustDomain, now: SystemTime) -> Result<Authority, CaError> {
    let key = KeyPair::generate().map_err(failed)?;
    let not_before = now - CA_BACKDATE;
    let params = authority(trust_domain, "root", &key, ROOT_PATH_LEN, not_before, now + ROOT_LIFE)?;
    let der = params.self_signed(&key).map_err(failed)?.into();
    Authority::new("root", der, key).map_err(CaError::Sign)
}

pub(crate) fn issuer(root: &Authority, trust_domain: &TrustDomain, now: SystemTime) -> Result<Authority, CaError> {
    let key = KeyPair::generate().map_err(failed)?;
    let not_before = (now - CA_BACKDATE).max(root.facts.not_before);
    let not_after = (now + ISSUER_LIFE).min(root.facts.not_after);
    let params = authority(trust_domain, "issuing", &key, 0, not_before, not_after)?;
    let der = params.signed_by(&key, &root.signer).map_err(failed)?.into();
    Authority::new("issuing", der, key).map_err(CaError::Sign)
}

/// The new root's name and key, signed by the old root: whoever has only the old one can believe the new one.
pub(crate) fn cross(new: &Authority, old: &Authority, now: SystemTime) -> Result<CertificateDer<'static>, CaError> {
    let not_before = (now - CA_BACKDATE).max(old.facts.not_before);
    let not_after = new.facts.not_after.min(old.facts.not_after);
    let key = new.signer.key();
    let mut params = ca_params(ROOT_PATH_LEN - 1, not_before, not_after)?;
    params.distinguished_name = distinguished_name(&new.facts.subject);
    Ok(params.signed_by(key, &old.signer).map_err(failed)?.into())
}

fn authority(
    trust_domain: &TrustDomain,
    role: &str,
    key: &KeyPair,
    path_len: u8,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, CaError> {
    let mut params = ca_params(path_len, not_before, not_after)?;
    // The digest makes each name unique, so that a message which names two roots says something.
    let digest = Sha256::of(&key.subject_public_key_info()).short();
    let realm: String = trust_domain.as_str().chars().take(32).collect(); // ub-common-name is 64, RFC 5280 A.1.
    params.distinguished_name = distinguished_name(&format!("CN={realm} {role} {digest}"));
    Ok(params)
}

/// From `CN=…`, as facts show it.
fn distinguished_name(subject: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, subject.strip_prefix("CN=").unwrap_or(subject));
    name
}

fn ca_params(path_len: u8, not_before: SystemTime, not_after: SystemTime) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial()?);
    (params.not_before, params.not_after) = (OffsetDateTime::from(not_before), OffsetDateTime::from(not_after));
    Ok(params)
}

/// 128 random bits, positive and without a leading zero (RFC 5280 §4.1.2.2).
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| CaError::Sign("the system gives no random numbers".to_owned()))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Whether two thirds of the issuing CA's life are over, and its root could give it a longer one.
pub(crate) fn issuer_is_due(state: &Loaded, now: SystemTime) -> bool {
    let issuer = &state.issuer.facts;
    let life = issuer.not_after.duration_since(issuer.not_before).unwrap_or_default();
    now >= issuer.not_before + life * 2 / 3 && issuer.not_after < state.root.not_after()
}

/// When a leaf begins and ends: never outside its issuer's time. The default lifetime shrinks to fit; a longer one that
/// was asked for and does not fit is refused, so that nobody is surprised later.
pub(crate) fn leaf_validity(
    state: &Loaded,
    ttl: Duration,
    now: SystemTime,
) -> Result<(SystemTime, SystemTime), CaError> {
    let issuer = &state.issuer.facts;
    if ttl < Duration::from_secs(1) {
        return Err(CaError::Request("a lifetime must be at least one second".to_owned()));
    }
    if now < issuer.not_before {
        return Err(CaError::NotYetValid { what: issuer.subject.clone(), from: issuer.not_before, now });
    }
    let left = issuer.not_after.duration_since(now).unwrap_or_default();
    if left.is_zero() {
        return Err(CaError::Expired { what: issuer.subject.clone(), since: issuer.not_after });
    }
    if ttl > left && ttl > DEFAULT_TTL {
        return Err(CaError::TtlTooLong { ttl, left });
    }
    Ok(((now - BACKDATE).max(issuer.not_before), now + ttl.min(left)))
}

/// A leaf that is ready to be recorded, then signed.
pub(crate) struct Leaf {
    params: CertificateParams,
    serial: SerialNumber,
    not_after: SystemTime,
}

impl Leaf {
    pub(crate) fn new(request: &IssueRequest, not_before: SystemTime, not_after: SystemTime) -> Result<Self, CaError> {
        let mut params = CertificateParams::default();
        // An empty subject: the name is the URI, and the extension is then critical (RFC 5280 §4.1.2.6).
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (OffsetDateTime::from(not_before), OffsetDateTime::from(not_after));
        let serial = serial()?;
        params.serial_number = Some(serial.clone());
        let ia5 = |text: &str| text.try_into().map_err(|_| CaError::Request(format!("`{text}` is no ASCII name")));
        params.subject_alt_names.push(SanType::URI(ia5(request.id.as_str())?));
        for name in &request.dns {
            DnsName::try_from(name.as_str())
                .map_err(|_| CaError::Request(format!("`{}` is no DNS name", name.escape_debug())))?;
            params.subject_alt_names.push(SanType::DnsName(ia5(name)?));
        }
        params.subject_alt_names.extend(request.ips.iter().copied().map(SanType::IpAddress));
        Ok(Self { params, serial, not_after })
    }

    pub(crate) fn serial(&self) -> String {
        hex(&self.serial.to_bytes())
    }

    pub(crate) fn entry(&self, request: &IssueRequest, issuer: &str, now: SystemTime) -> Entry {
        Entry {
            at: format_time(now),
            serial: self.serial(),
            id: request.id.clone(),
            not_after: format_time(self.not_after),
            key_sha256: request.csr.key_sha256().to_string(),
            issuer: issuer.to_owned(),
        }
    }

    pub(crate) fn sign(&self, csr: &Csr, state: &Loaded) -> Result<CertificateDer<'static>, CaError> {
        Ok(self.params.signed_by(&csr.key, &state.issuer.signer).map_err(failed)?.into())
    }
}

fn failed(error: rcgen::Error) -> CaError {
    CaError::Sign(error.to_string())
}
