//! Where a proxy's identity lives: everything built from it, swapped whole at each rotation, the last good one kept.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls::{ClientConfig, ServerConfig};
use tokio::sync::watch;

use crate::bundle::TrustBundle;
use crate::identity::Identity;
use crate::tls::{self, ALPN_H2, ALPN_HTTP1, MeshAlpn};
use crate::verify::{PeerError, verify_peer};

/// One identity, one bundle, and the TLS configurations made of them, with their own verifiers and session caches.
#[derive(Debug)]
pub struct Material {
    /// Who we are.
    pub identity: Identity,
    /// Whom we believe.
    pub bundle: Arc<TrustBundle>,
    /// For our own proxies: takes `sheetbend/*`.
    pub server: Arc<ServerConfig>,
    /// In the order of [`MeshAlpn::ALL`].
    mesh: [Arc<ClientConfig>; 3],
    /// Likewise.
    foreign: [Arc<ClientConfig>; 3],
    /// HTTP/1.1 preferred, then HTTP/2 preferred.
    any: [Arc<ServerConfig>; 2],
}

impl Material {
    /// Builds everything anew: nothing is shared with any other material, so no session survives into this one.
    pub fn new(identity: Identity, bundle: Arc<TrustBundle>) -> Result<Self, rustls::Error> {
        // Clones of one configuration share verifier and session cache, as peers of one identity and bundle may.
        let client = tls::mesh_client(&identity, bundle.clone())?;
        let offering = |alpn: &[&[u8]]| {
            let mut config = client.clone();
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            Arc::new(config)
        };
        let mesh = MeshAlpn::ALL.map(|alpn| offering(&[alpn.wire()]));
        let foreign = MeshAlpn::ALL.map(|alpn| match alpn {
            MeshAlpn::H2 => offering(&[ALPN_H2, ALPN_HTTP1]),
            MeshAlpn::Http1 => offering(&[ALPN_HTTP1]),
            MeshAlpn::Tcp => offering(&[]),
        });

        let server = tls::mesh_server(&identity, bundle.clone())?;
        let taking = |others: &[&[u8]]| {
            let mut config = server.clone();
            config.alpn_protocols = MeshAlpn::ALL
                .iter()
                .map(|alpn| alpn.wire())
                .chain(others.iter().copied())
                .map(<[u8]>::to_vec)
                .collect();
            Arc::new(config)
        };
        let any = [taking(&[ALPN_HTTP1, ALPN_H2]), taking(&[ALPN_H2, ALPN_HTTP1])];
        Ok(Self { server: taking(&[]), identity, bundle, mesh, foreign, any })
    }

    /// Towards a peer that is not ours. [`MeshAlpn::H2`] offers `h2` and `http/1.1`, and the peer chooses;
    /// [`MeshAlpn::Http1`] offers `http/1.1` alone, and [`MeshAlpn::Tcp`] nothing: the bytes are the app's own.
    pub fn foreign_client(&self, alpn: MeshAlpn) -> &Arc<ClientConfig> {
        let [h2, http1, tcp] = &self.foreign;
        match alpn {
            MeshAlpn::H2 => h2,
            MeshAlpn::Http1 => http1,
            MeshAlpn::Tcp => tcp,
        }
    }

    /// For our own and for others: takes `sheetbend/*`, `h2` and `http/1.1`. Of a peer that offers both of HTTP's, it is
    /// HTTP/1.1 that is taken, which every app speaks, unless this app is known to speak HTTP/2.
    pub fn server_any(&self, speaks_http2: bool) -> &Arc<ServerConfig> {
        let [http1, h2] = &self.any;
        if speaks_http2 { h2 } else { http1 }
    }

    /// Whether our own certificate has ended: nobody is to be spoken to with it.
    pub fn is_over(&self, now: SystemTime) -> bool {
        self.identity.not_after <= now
    }

    /// Towards one of our own proxies, offering one protocol.
    pub fn mesh_client(&self, alpn: MeshAlpn) -> &Arc<ClientConfig> {
        let [h2, http1, tcp] = &self.mesh;
        match alpn {
            MeshAlpn::H2 => h2,
            MeshAlpn::Http1 => http1,
            MeshAlpn::Tcp => tcp,
        }
    }
}

/// Holds the current material. Readers take an `Arc` and are never blocked by a rotation.
#[derive(Debug)]
pub struct IdentityStore {
    current: ArcSwapOption<Material>,
    changes: watch::Sender<Option<Arc<Material>>>,
    /// Held while something is put in force; readers never wait for it.
    installing: Mutex<()>,
}

impl IdentityStore {
    /// A store that holds nothing yet.
    pub fn new() -> Self {
        Self { current: ArcSwapOption::empty(), changes: watch::Sender::new(None), installing: Mutex::new(()) }
    }

    /// What is in force, if anything is.
    pub fn current(&self) -> Option<Arc<Material>> {
        self.current.load_full()
    }

    /// Tells of every change; holds what is in force.
    pub fn subscribe(&self) -> watch::Receiver<Option<Arc<Material>>> {
        self.changes.subscribe()
    }

    /// Tells subscribers, for as long as it is polled, when what is in force ends without a successor: they are told of it
    /// once more, and [`Material::is_over`] from then on.
    pub async fn tell_ends(&self) {
        /// A clock may be put forward meanwhile.
        const LOOK: Duration = Duration::from_secs(10);
        let (mut changes, mut told) = (self.subscribe(), None);
        loop {
            let ends = changes.borrow_and_update().as_ref().map(|material| material.identity.not_after);
            let left = ends.map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
            match left {
                Some(Duration::ZERO) if told != ends => {
                    told = ends;
                    self.changes.send_modify(|_| {});
                }
                Some(left) if !left.is_zero() => {
                    // Whichever comes first; both lead to another look.
                    drop(tokio::time::timeout(left.min(LOOK), changes.changed()).await);
                }
                // The store holds the sender, so there is always a next change.
                Some(_) | None => drop(changes.changed().await),
            }
        }
    }

    /// Puts a new identity and bundle in force. What would not work is refused, and the last good one stays: the identity
    /// must verify against the bundle now.
    pub fn install(
        &self,
        identity: Identity,
        bundle: Arc<TrustBundle>,
        now: SystemTime,
    ) -> Result<Arc<Material>, InstallError> {
        self.update(now, |_| (identity, bundle))
    }

    /// Like [`IdentityStore::install`], for whoever changes one half and keeps the other: `change` sees what is in force,
    /// and nobody else changes it meanwhile. A renewal and a new bundle that come at once both take effect.
    pub fn update(
        &self,
        now: SystemTime,
        change: impl FnOnce(Option<&Material>) -> (Identity, Arc<TrustBundle>),
    ) -> Result<Arc<Material>, InstallError> {
        let _one_at_a_time = self.installing.lock().unwrap_or_else(PoisonError::into_inner);
        let (identity, bundle) = change(self.current.load().as_deref());
        verify_peer(Some(&identity.chain), &bundle, now)?;
        let material = Arc::new(Material::new(identity, bundle)?);
        self.current.store(Some(material.clone()));
        self.changes.send_replace(Some(material.clone()));
        Ok(material)
    }
}

impl Default for IdentityStore {
    fn default() -> Self {
        Self::new()
    }
}

/// Why an identity was not put in force.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Our own peers would refuse it.
    #[error("peers would refuse our own certificate: {0}")]
    Refused(#[from] PeerError),
    /// The TLS library refuses it.
    #[error("no TLS configuration can be made of our certificate: {0}")]
    Tls(#[from] rustls::Error),
}
