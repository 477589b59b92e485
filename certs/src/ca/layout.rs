//! The directory of a CA: which files there are, in what order they are written, and what is wrong with them.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::Lock;
use crate::bundle::{Root, TrustBundle};
use crate::csr::CsrError;
use crate::facts::{CertFacts, format_span, format_time};
use crate::files::{self, Access};
use crate::pem;
use crate::spiffe::{SpiffeId, TrustDomain};

/// `ca.json`: written whole, and last. What it does not name is not there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) version: u32,
    pub(crate) trust_domain: TrustDomain,
    /// The active root: `root-XXXXXXXX`.
    pub(crate) root: String,
    /// The issuing CA below it: `issuing-XXXXXXXX`.
    pub(crate) issuer: String,
    /// Roots that are still believed, and sign nothing any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) retiring: Vec<String>,
}

impl Manifest {
    pub(crate) fn new(trust_domain: TrustDomain, root: String, issuer: String) -> Self {
        Self { version: 1, trust_domain, root, issuer, retiring: Vec::new() }
    }
}

/// A CA certificate with its key.
pub(crate) struct Authority {
    pub(crate) der: CertificateDer<'static>,
    pub(crate) facts: CertFacts,
    pub(crate) signer: Issuer<'static, KeyPair>,
    role: &'static str,
}

impl Authority {
    pub(crate) fn new(role: &'static str, der: CertificateDer<'static>, key: KeyPair) -> Result<Self, String> {
        let facts = CertFacts::of(&der)?;
        if crate::Sha256::of(&rcgen::PublicKeyData::subject_public_key_info(&key)) != facts.key_sha256 {
            return Err("the key is not the certificate's".to_owned());
        }
        let signer = Issuer::from_ca_cert_der(&der, key).map_err(|e| e.to_string())?;
        Ok(Self { der, facts, signer, role })
    }

    /// The stem of its files' names: role, and the first digits of its key's digest.
    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.role, self.facts.key_sha256.short())
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

/// Tells one manifest from the next: each is a file of its own.
pub(crate) type Stamp = (u64, u64, i64, i64);

/// What the manifest names, read.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) stamp: Stamp,
    pub(crate) manifest: Manifest,
    pub(crate) root: Root,
    pub(crate) issuer: Authority,
    /// The active root, signed by the retiring one.
    pub(crate) cross: Option<CertificateDer<'static>>,
    pub(crate) bundle: Arc<TrustBundle>,
}

impl Loaded {
    pub(crate) fn read(paths: &Paths) -> Result<Self, CaError> {
        // The stamp first: if the manifest changes in between, the next look sees another stamp and reads again.
        let stamp = paths.stamp()?;
        let path = paths.manifest();
        let text = fs::read_to_string(&path).map_err(|e| CaError::read(&path, e))?;
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| CaError::damaged(&path, e))?;
        if manifest.version != 1 {
            return Err(CaError::damaged(&path, format!("version {} is not known here", manifest.version)));
        }
        let names = std::iter::once(&manifest.root).chain(&manifest.retiring);
        let roots = names.map(|name| paths.read_cert(name)).collect::<Result<Vec<_>, _>>()?;
        let bundle = TrustBundle::new(roots).map_err(|e| CaError::damaged(&paths.cert(&manifest.root), e))?;
        let root = bundle.roots()[0].clone(); // A bundle has at least one, and keeps the order.
        let issuer = paths.read_authority(&manifest.issuer)?;
        let cross = match manifest.retiring.is_empty() {
            true => None,
            false => Some(paths.read_cert(&cross_name(&manifest.root))?),
        };
        Ok(Self { stamp, manifest, root, issuer, cross, bundle: Arc::new(bundle) })
    }

    pub(crate) fn retiring(&self) -> Vec<Root> {
        self.bundle.roots().iter().filter(|root| root.sha256() != self.root.sha256()).cloned().collect()
    }

    pub(crate) fn check_root(&self, now: SystemTime) -> Result<(), CaError> {
        let (root, facts) = (self.root.subject().to_owned(), self.root.facts());
        if now < facts.not_before {
            return Err(CaError::NotYetValid { what: root, from: facts.not_before, now });
        }
        if now > facts.not_after {
            return Err(CaError::Expired { what: root, since: facts.not_after });
        }
        Ok(())
    }
}

fn cross_name(root: &str) -> String {
    format!("cross-{root}")
}

/// Where everything is.
#[derive(Clone, Debug)]
pub(crate) struct Paths(PathBuf);

impl Paths {
    pub(crate) fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    pub(crate) fn manifest(&self) -> PathBuf {
        self.0.join("ca.json")
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.0.join("bundle.pem")
    }

    pub(crate) fn issued(&self) -> PathBuf {
        self.0.join("issued.log")
    }

    fn cert(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.pem"))
    }

    fn key(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.key"))
    }

    pub(crate) fn stamp(&self) -> Result<Stamp, CaError> {
        let path = self.manifest();
        let meta = fs::metadata(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => CaError::Missing { dir: self.0.clone() },
            _ => CaError::read(&path, e),
        })?;
        Ok((meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec()))
    }

    pub(crate) fn lock_exclusive(&self) -> Result<Lock, CaError> {
        self.lock(|file| file.lock())
    }

    pub(crate) fn lock_shared(&self) -> Result<Lock, CaError> {
        self.lock(|file| file.lock_shared())
    }

    /// Held for a few file operations by whoever has it, so waiting for it is short; the kernel frees it if they die.
    fn lock(&self, how: impl Fn(&fs::File) -> io::Result<()>) -> Result<Lock, CaError> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.0.join("ca.lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = open.map_err(|e| CaError::write(&path, e))?;
        how(&file).map_err(|e| CaError::write(&path, e))?;
        Ok(Lock { _file: file })
    }

    pub(crate) fn write_authority(&self, authority: &Authority) -> Result<(), CaError> {
        let (cert, key) = (self.cert(&authority.name()), self.key(&authority.name()));
        let key_pem = authority.signer.key().serialize_pem();
        files::create_new(&key, key_pem.as_bytes(), Access::Owner).map_err(|e| CaError::write(&key, e))?;
        self.create_cert(&cert, &authority.der)
    }

    pub(crate) fn write_cross(&self, root: &str, cross: &CertificateDer<'static>) -> Result<(), CaError> {
        self.create_cert(&self.cert(&cross_name(root)), cross)
    }

    fn create_cert(&self, path: &Path, der: &CertificateDer<'static>) -> Result<(), CaError> {
        let text = pem::encode_certificates([der]);
        files::create_new(path, text.as_bytes(), Access::Everybody).map_err(|e| CaError::write(path, e))
    }

    fn read_cert(&self, name: &str) -> Result<CertificateDer<'static>, CaError> {
        let path = self.cert(name);
        let text = fs::read_to_string(&path).map_err(|e| CaError::read(&path, e))?;
        let certs = pem::decode_certificates(&text).map_err(|e| CaError::damaged(&path, e))?;
        certs.into_iter().next().ok_or_else(|| CaError::damaged(&path, "it is empty"))
    }

    pub(crate) fn read_authority(&self, name: &str) -> Result<Authority, CaError> {
        let role = if name.starts_with("root-") { "root" } else { "issuing" };
        let der = self.read_cert(name)?;
        let path = self.key(name);
        let text = fs::read_to_string(&path).map_err(|e| CaError::read(&path, e))?;
        let key = KeyPair::from_pem(&text).map_err(|_| CaError::damaged(&path, "it holds no private key"))?;
        Authority::new(role, der, key).map_err(|e| CaError::damaged(&path, e))
    }

    /// Puts a manifest in force, then writes the bundle that follows from it.
    pub(crate) fn commit(&self, manifest: &Manifest) -> Result<(), CaError> {
        let path = self.manifest();
        let text = serde_json::to_string_pretty(manifest).map_err(|e| CaError::damaged(&path, e))? + "\n";
        files::replace(&path, text.as_bytes(), Access::Everybody).map_err(|e| CaError::write(&path, e))?;
        let (path, bundle) = (self.bundle(), Loaded::read(self)?.bundle.to_pem());
        files::replace(&path, bundle.as_bytes(), Access::Everybody).map_err(|e| CaError::write(&path, e))
    }

    /// Deletes the keys of CAs that the manifest does not name any more. One that stays harms nobody.
    pub(crate) fn delete_stale_keys(&self, now: &Manifest) {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "key")) {
            // Others may keep keys of their own here: only what is named like ours is.
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            let old_root = stem.starts_with("root-") && stem != now.root && !now.retiring.contains(&stem);
            let old_issuer = stem.starts_with("issuing-") && stem != now.issuer;
            if (old_root || old_issuer)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "a key that nobody needs any more stays");
            }
        }
    }

    /// A directory that others can write to is no place for a CA: they could put theirs in its place.
    pub(crate) fn check_private(&self) -> Result<(), CaError> {
        let meta = fs::metadata(&self.0).map_err(|e| CaError::read(&self.0, e))?;
        match meta.mode() & 0o022 {
            0 => Ok(()),
            _ => Err(CaError::Open { dir: self.0.clone() }),
        }
    }
}

/// Why the CA did not do what it was asked: what, where, and how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// `init` where a CA is.
    #[error("{} already has a CA, and nothing in it was touched; use it, or name another directory", dir.display())]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// No CA there.
    #[error("{} has no CA (no ca.json in it); make one with `sheetbend certs init --dir {}`", dir.display(), dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// `init` where everybody may write.
    #[error("others can write to {}, so it is no place for a CA; `chmod go-w {}`, or name a new directory", dir.display(), dir.display())]
    Open {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}{}", path.display(), hint(source))]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file cannot be written, and nothing was signed.
    #[error("cannot write {}: {source}; nothing was signed{}", path.display(), hint(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged: {why}; put it back from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The CA is out of date.
    #[error("the CA `{what}` expired at {}; make a new one in another directory with `sheetbend certs init`", format_time(*.since))]
    Expired {
        /// Its name.
        what: String,
        /// Its end.
        since: SystemTime,
    },
    /// The CA is from the future: a clock is, or was, off.
    #[error("the CA `{what}` is not valid before {}, and here it is {}: this clock is off, or was when the CA was made", format_time(*.from), format_time(*.now))]
    NotYetValid {
        /// Its name.
        what: String,
        /// Its begin.
        from: SystemTime,
        /// This clock.
        now: SystemTime,
    },
    /// Longer than what signs it.
    #[error("a lifetime of {} is too long: the CA itself ends in {}; ask for less, or `sheetbend certs rotate` first", format_span(*.ttl), format_span(*.left))]
    TtlTooLong {
        /// What was asked for.
        ttl: std::time::Duration,
        /// What the CA has left.
        left: std::time::Duration,
    },
    /// A name of another realm.
    #[error("`{id}` is not of this CA's trust domain, which is {ours}")]
    OtherTrustDomain {
        /// The name.
        id: SpiffeId,
        /// This CA's realm.
        ours: TrustDomain,
    },
    /// A bad CSR.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// Anything else in the request.
    #[error("the request is refused: {0}")]
    Request(String),
    /// `rotate` while an old root retires.
    #[error("a rotation is under way in {}: `{old}` still retires; finish it with `sheetbend certs rotate --dir {} --drop-old`", dir.display(), dir.display())]
    Rotating {
        /// The directory.
        dir: PathBuf,
        /// The retiring root.
        old: String,
    },
    /// `drop_old` with nothing to drop.
    #[error("{} has one root only, there is no old one to drop; `sheetbend certs rotate --dir {}` makes a new one", dir.display(), dir.display())]
    NothingToDrop {
        /// The directory.
        dir: PathBuf,
    },
    /// The cryptographic library failed.
    #[error("cannot sign: {0}")]
    Sign(String),
}

impl CaError {
    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, why: impl std::fmt::Display) -> Self {
        Self::Damaged { path: path.to_owned(), why: why.to_string() }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; its owner must be who runs this (keys are 0600)",
        io::ErrorKind::StorageFull => "; free some space",
        io::ErrorKind::ReadOnlyFilesystem => "; a CA needs a place that it can write to",
        _ => "",
    }
}
