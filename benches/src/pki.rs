//! A root, an issuing CA and the leaves of both ends, the same for every system: ECDSA P-256, one SPIFFE id and one
//! DNS name each, so that every proxy checks its peer in the way it can.

use std::io;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// The SPIFFE id of the calling side.
pub(crate) const CALLER: &str = "spiffe://cluster.local/ns/default/sa/caller";
/// The SPIFFE id of the called side.
pub(crate) const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

/// Files under one folder: `caller.pem`, `caller.key`, `web.pem`, `web.key`, their concatenations `*.all.pem`, and
/// `bundle.pem`.
pub(crate) struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes everything anew in `dir`.
    pub(crate) fn make(dir: &Path) -> io::Result<Self> {
        let root = CertifiedIssuer::self_signed(ca_params("bench root", 1), key()?).map_err(io::Error::other)?;
        let issuing =
            CertifiedIssuer::signed_by(ca_params("bench issuing", 0), key()?, &root).map_err(io::Error::other)?;
        for (name, id) in [("caller", CALLER), ("web", WEB)] {
            let key = key()?;
            let leaf = leaf_params(name, id)?.signed_by(&key, &issuing).map_err(io::Error::other)?;
            let chain = leaf.pem() + &issuing.pem();
            std::fs::write(dir.join(format!("{name}.pem")), &chain)?;
            std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
            std::fs::write(dir.join(format!("{name}.all.pem")), chain + &key.serialize_pem())?;
        }
        std::fs::write(dir.join("bundle.pem"), root.pem())?;
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// Where the file `name` is.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// A new key.
pub(crate) fn key() -> io::Result<KeyPair> {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(io::Error::other)
}

fn ca_params(name: &str, below: u8) -> CertificateParams {
    let mut params = validity(CertificateParams::default());
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(name: &str, id: &str) -> io::Result<CertificateParams> {
    let mut params = validity(CertificateParams::default());
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![
        SanType::URI(id.try_into().map_err(io::Error::other)?),
        SanType::DnsName(format!("{name}.default").try_into().map_err(io::Error::other)?),
    ];
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn validity(mut params: CertificateParams) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::minutes(2);
    params.not_after = now + Duration::hours(24);
    params
}
