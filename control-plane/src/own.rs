//! The control plane's own certificate: the same CA, plus the names under which proxies dial us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sheetbend_certs::{
    Ca, CaError, Csr, Identity, IssueRequest, KeyAndCsr, SpiffeId, TrustBundle, control_plane_server,
};

use crate::listen::Door;

/// Our certificate, and the door made of it.
pub(crate) struct Own {
    dns: Vec<String>,
    ips: Vec<IpAddr>,
    not_before: SystemTime,
    not_after: SystemTime,
    root: String,
    bundle: Arc<TrustBundle>,
    door: Arc<Door>,
}

impl Own {
    /// A first certificate, for localhost and these names.
    pub(crate) fn issue(ca: &Ca, names: &[String]) -> Result<Self, CaError> {
        let (mut dns, mut ips) = (vec!["localhost".to_string()], Vec::new());
        ips.extend([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
        for name in names {
            match name.parse::<IpAddr>() {
                Ok(ip) if !ips.contains(&ip) => ips.push(ip),
                Ok(_) => {}
                Err(_) if !dns.contains(name) => dns.push(name.clone()),
                Err(_) => {}
            }
        }
        Self::with(ca, dns, ips)
    }

    /// Another certificate, with a fresh key, for the same names.
    pub(crate) fn renew(&self, ca: &Ca) -> Result<Self, CaError> {
        Self::with(ca, self.dns.clone(), self.ips.clone())
    }

    fn with(ca: &Ca, dns: Vec<String>, ips: Vec<IpAddr>) -> Result<Self, CaError> {
        let broken = |error: &dyn std::fmt::Display| CaError::Request(error.to_string());
        let trust_domain = ca.trust_domain()?;
        let id = SpiffeId::for_workload(&trust_domain, "sheetbend", "control-plane").map_err(|e| broken(&e))?;
        let key = KeyAndCsr::generate().map_err(|e| broken(&e))?;
        let csr = Csr::parse(key.csr_pem().as_bytes())?;
        let request = IssueRequest { dns: dns.clone(), ips: ips.clone(), ..IssueRequest::new(id, csr) };
        let issued = ca.issue(&request, SystemTime::now())?;
        let bundle = issued.bundle;
        let identity: Identity = key.into_identity(issued.chain).map_err(|e| broken(&e))?;
        let config = control_plane_server(&identity, bundle.clone()).map_err(|e| broken(&e))?;
        let door = Arc::new(Door { config, bundle: bundle.clone() });
        let root = issued.root.sha256().to_string();
        Ok(Self { dns, ips, not_before: issued.not_before, not_after: issued.not_after, root, bundle, door })
    }

    pub(crate) fn door(&self) -> Arc<Door> {
        self.door.clone()
    }

    pub(crate) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Two thirds of its life are over, or what it rests on is no longer what the mesh rests on.
    pub(crate) fn is_due(&self, bundle: &TrustBundle, active_root: &str, now: SystemTime) -> bool {
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        now >= self.not_before + life * 2 / 3 || *self.bundle != *bundle || self.root != active_root
    }
}
