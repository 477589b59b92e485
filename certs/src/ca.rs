//! The certificate authority of a mesh: a directory with a root, an issuing CA below it, and a record of all it signed.
//!
//! A root is either *active* (new certificates lead to it) or *retiring* (still believed, and signs nothing). Rotation
//! goes `one root → rotate → active and retiring → drop_old → one root`, and is safe at every moment, for each proxy by
//! itself: while an old root retires, what is issued carries the new root *cross-signed* by the old one, so a proxy that
//! has only the old root verifies it, and one that has only the new root does too.
//!
//! Several processes may use one directory: each change is made under a lock, the manifest is replaced in one step and
//! last, and everybody looks whether it changed before they sign.

mod layout;
mod make;
mod record;

use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;

pub use self::layout::CaError;
use self::layout::{Loaded, Manifest, Paths};
use crate::bundle::{Root, TrustBundle};
use crate::csr::Csr;
use crate::facts::format_span;
use crate::files::{self, Access};
use crate::pem;
use crate::spiffe::{SpiffeId, TrustDomain};

/// How long a workload's certificate lives, unless asked otherwise.
pub const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// A leaf is valid from a little before it was made: clocks differ.
pub const BACKDATE: Duration = Duration::from_secs(2 * 60);
/// Host names and addresses that one certificate may have.
const MAX_HOSTS: usize = 64;

/// What is to be signed. The name is the one that the asker has proven, not one that the CSR asks for.
#[derive(Clone, Debug)]
pub struct IssueRequest {
    /// The name to write.
    pub id: SpiffeId,
    /// The key, and the proof that the asker holds it.
    pub csr: Csr,
    /// How long it is to live.
    pub ttl: Duration,
    /// DNS names, for a control plane alone: they are what makes a certificate one of a control plane.
    pub dns: Vec<String>,
    /// Addresses, likewise.
    pub ips: Vec<IpAddr>,
}

impl IssueRequest {
    /// A workload's certificate, with the default lifetime.
    pub fn new(id: SpiffeId, csr: Csr) -> Self {
        Self { id, csr, ttl: DEFAULT_TTL, dns: Vec::new(), ips: Vec::new() }
    }
}

/// What was signed.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf, issuing CA and, while an old root retires, the new root signed by it.
    pub chain: Vec<CertificateDer<'static>>,
    /// The active root.
    pub root: Root,
    /// The roots to believe, as they stood when this was signed: a rotation that comes right after is news to its owner.
    pub bundle: Arc<TrustBundle>,
    /// The leaf's serial number in hex.
    pub serial: String,
    /// The leaf's first moment.
    pub not_before: SystemTime,
    /// The leaf's last moment.
    pub not_after: SystemTime,
}

impl Issued {
    /// The chain as PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        pem::encode_certificates(&self.chain)
    }
}

/// A CA in a directory. Cheap to share: all methods take `&self`.
#[derive(Debug)]
pub struct Ca {
    paths: Paths,
    /// What the manifest said when it was last read. The lock is held for a `stat`, or to read the directory again.
    loaded: Mutex<Arc<Loaded>>,
}

impl Ca {
    /// Makes a root and an issuing CA in `dir`. A directory that has a CA is refused, and stays as it is.
    pub fn init(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let paths = Paths::new(dir);
        let exists = || CaError::Exists { dir: dir.to_owned() };
        if paths.manifest().exists() {
            return Err(exists());
        }
        files::make_private_dir(dir).map_err(|e| CaError::write(dir, e))?;
        paths.check_private()?;
        let _lock = paths.lock_exclusive()?;
        if paths.manifest().exists() {
            return Err(exists()); // Somebody was faster.
        }
        let root = make::root(trust_domain, now)?;
        let issuer = make::issuer(&root, trust_domain, now)?;
        paths.write_authority(&root)?;
        paths.write_authority(&issuer)?;
        let manifest = Manifest::new(trust_domain.clone(), root.name(), issuer.name());
        paths.commit(&manifest)?;
        Self::load(paths, now)
    }

    /// Opens the CA in `dir`.
    pub fn open(dir: &Path, now: SystemTime) -> Result<Self, CaError> {
        let paths = Paths::new(dir);
        if !paths.manifest().exists() {
            return Err(CaError::Missing { dir: dir.to_owned() });
        }
        Self::load(paths, now)
    }

    fn load(paths: Paths, now: SystemTime) -> Result<Self, CaError> {
        let loaded = Mutex::new(Arc::new(Loaded::read(&paths)?));
        let ca = Self { paths, loaded };
        ca.mend_bundle()?;
        ca.state()?.check_root(now)?;
        Ok(ca)
    }

    /// A crash between the manifest and the bundle leaves an old bundle. One that cannot be mended is no obstacle: it is
    /// a copy for people and for other programs.
    fn mend_bundle(&self) -> Result<(), CaError> {
        let file = self.paths.bundle();
        let is_right =
            |state: &Loaded| std::fs::read(&file).is_ok_and(|found| found == state.bundle.to_pem().as_bytes());
        if is_right(&*self.state()?) {
            return Ok(());
        }
        // Looked at again under the lock: perhaps somebody rotates just now.
        let Ok(_lock) = self.paths.lock_exclusive() else { return Ok(()) };
        let state = self.state()?;
        if !is_right(&state) {
            let _ = files::replace(&file, state.bundle.to_pem().as_bytes(), Access::Everybody);
        }
        Ok(())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.paths.dir()
    }

    /// The realm that it signs for.
    pub fn trust_domain(&self) -> Result<TrustDomain, CaError> {
        Ok(self.state()?.manifest.trust_domain.clone())
    }

    /// The roots to believe, the active one first. Reads the directory again if it has changed since.
    pub fn bundle(&self) -> Result<Arc<TrustBundle>, CaError> {
        Ok(self.state()?.bundle.clone())
    }

    /// The root that new certificates lead to. Its digest is what a join token pins.
    pub fn active_root(&self) -> Result<Root, CaError> {
        Ok(self.state()?.root.clone())
    }

    /// The roots that are still believed and sign nothing any more. Empty unless a rotation is under way.
    pub fn retiring_roots(&self) -> Result<Vec<Root>, CaError> {
        Ok(self.state()?.retiring())
    }

    /// Signs a certificate, once it is on record: what cannot be recorded is not signed. Waits for the disk, so not to be
    /// called where a request waits for the same thread.
    pub fn issue(&self, request: &IssueRequest, now: SystemTime) -> Result<Issued, CaError> {
        if make::issuer_is_due(&*self.state()?, now)
            && let Err(error) = self.renew_issuer(now)
        {
            // The old one still signs; it will be tried again at the next request.
            tracing::warn!(%error, "no new issuing CA could be made, and the old one is two thirds through its life");
        }
        // Shared with other issuers; a rotation waits, so nothing is signed below a root that has begun to retire.
        let _lock = self.paths.lock_shared()?;
        let state = self.state()?;
        state.check_root(now)?;
        self.sign(&state, request, now)
    }

    fn sign(&self, state: &Loaded, request: &IssueRequest, now: SystemTime) -> Result<Issued, CaError> {
        if request.id.trust_domain() != state.manifest.trust_domain {
            return Err(CaError::OtherTrustDomain {
                id: request.id.clone(),
                ours: state.manifest.trust_domain.clone(),
            });
        }
        if request.dns.len() + request.ips.len() > MAX_HOSTS {
            return Err(CaError::Request(format!("more than {MAX_HOSTS} DNS names and addresses")));
        }
        let (not_before, not_after) = make::leaf_validity(state, request.ttl, now)?;
        let leaf = make::Leaf::new(request, not_before, not_after)?;
        record::append(&self.paths.issued(), &leaf.entry(request, &state.manifest.issuer, now))?;
        let mut chain = vec![leaf.sign(&request.csr, state)?, state.issuer.der.clone()];
        chain.extend(state.cross.iter().cloned());
        let (root, serial) = (state.root.clone(), leaf.serial());
        Ok(Issued { chain, root, bundle: state.bundle.clone(), serial, not_before, not_after })
    }

    /// A new root beside the old one, and a new issuing CA below it that signs from now on. The old root retires: it
    /// stays in the bundle until [`Ca::drop_old`].
    pub fn rotate(&self, now: SystemTime) -> Result<Arc<TrustBundle>, CaError> {
        let _lock = self.paths.lock_exclusive()?;
        let old = self.state()?;
        if let Some(retiring) = old.retiring().first() {
            return Err(CaError::Rotating { dir: self.dir().to_owned(), old: retiring.subject().to_owned() });
        }
        let old_root = self.paths.read_authority(&old.manifest.root)?;
        let root = make::root(&old.manifest.trust_domain, now)?;
        let issuer = make::issuer(&root, &old.manifest.trust_domain, now)?;
        let cross = make::cross(&root, &old_root, now)?;
        self.paths.write_authority(&root)?;
        self.paths.write_authority(&issuer)?;
        self.paths.write_cross(&root.name(), &cross)?;
        let mut manifest = old.manifest.clone();
        manifest.retiring = vec![std::mem::replace(&mut manifest.root, root.name())];
        manifest.issuer = issuer.name();
        self.paths.commit(&manifest)?;
        self.bundle()
    }

    /// Stops believing the retiring root, and deletes its keys. Whoever calls this has made sure that every proxy has
    /// the new root and shows a certificate below it.
    pub fn drop_old(&self) -> Result<Vec<Root>, CaError> {
        let _lock = self.paths.lock_exclusive()?;
        let old = self.state()?;
        let dropped = old.retiring();
        if dropped.is_empty() {
            return Err(CaError::NothingToDrop { dir: self.dir().to_owned() });
        }
        let mut manifest = old.manifest.clone();
        manifest.retiring.clear();
        self.paths.commit(&manifest)?;
        // From here on nobody believes them. Their keys are of no use but to be stolen.
        self.paths.delete_stale_keys(&manifest);
        Ok(dropped)
    }

    fn renew_issuer(&self, now: SystemTime) -> Result<(), CaError> {
        let _lock = self.paths.lock_exclusive()?;
        let state = self.state()?;
        if !make::issuer_is_due(&state, now) {
            return Ok(()); // Another process was faster.
        }
        let root = self.paths.read_authority(&state.manifest.root)?;
        let issuer = make::issuer(&root, &state.manifest.trust_domain, now)?;
        self.paths.write_authority(&issuer)?;
        let manifest = Manifest { issuer: issuer.name(), ..state.manifest.clone() };
        self.paths.commit(&manifest)?;
        tracing::info!(issuer = %manifest.issuer, "made a new issuing CA: the old one is two thirds through its life");
        Ok(())
    }

    /// What the directory says now: what was read before, unless the manifest has changed.
    fn state(&self) -> Result<Arc<Loaded>, CaError> {
        let mut loaded: MutexGuard<'_, _> = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.stamp != self.paths.stamp()? {
            *loaded = Arc::new(Loaded::read(&self.paths)?);
        }
        Ok(loaded.clone())
    }
}

/// A root as an operator reads it: its name (which ends in the first digits of its key's digest) and what it has left.
pub fn describe_root(root: &Root, now: SystemTime) -> String {
    match root.not_after().duration_since(now) {
        Ok(left) => format!("`{}` ({} left)", root.subject(), format_span(left)),
        Err(ended) => format!("`{}` (expired {} ago)", root.subject(), format_span(ended.duration())),
    }
}

/// A lock on the directory, let go when dropped.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Where a control plane that serves this directory writes how to reach it.
pub fn control_plane_file(dir: &Path) -> PathBuf {
    dir.join("control-plane.json")
}
