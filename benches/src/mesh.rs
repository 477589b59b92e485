//! The control plane that Sheetbend's pairs belong to: beside the load, on a thread of its own, never on the way of a
//! request.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sheetbend_certs::{Ca, Csr, IssueRequest, TrustDomain, encode_certificates};
use sheetbend_control_plane::{Config, ControlPlane, create_token};

use crate::pki;

/// The service for which every policy is switched off.
pub(crate) const BARE: &str = "bare";

/// A control plane that runs until the process ends.
pub(crate) struct Mesh {
    dir: PathBuf,
    /// `https://127.0.0.1:PORT`.
    pub(crate) url: String,
}

impl Mesh {
    /// Makes a CA in `dir` and serves it, for services whose app is on the port `app`.
    pub(crate) fn start(dir: &Path, app: u16) -> io::Result<Self> {
        let domain: TrustDomain = "cluster.local".parse().map_err(io::Error::other)?;
        let ca = Ca::init(dir, &domain, SystemTime::now()).map_err(io::Error::other)?;
        let key = pki::key()?;
        let csr = rcgen::CertificateParams::default().serialize_request(&key).map_err(io::Error::other)?;
        let csr = Csr::parse(csr.der()).map_err(io::Error::other)?;
        let id = pki::CALLER.parse().map_err(io::Error::other)?;
        let issued = ca.issue(&IssueRequest::new(id, csr), SystemTime::now()).map_err(io::Error::other)?;
        std::fs::write(dir.join("caller.pem"), encode_certificates(&issued.chain))?;
        std::fs::write(dir.join("caller.key"), key.serialize_pem())?;
        drop(ca);
        let (tell, told) = std::sync::mpsc::channel();
        let resources = dir.join("resources");
        std::fs::create_dir_all(&resources)?;
        std::fs::write(resources.join("bare.yaml"), include_str!("bare.yaml").replace("PORT", &app.to_string()))?;
        let mut config = Config::new(dir);
        config.resources = Some(resources);
        config.listen = ([127, 0, 0, 1], 0).into();
        config.admin = ([127, 0, 0, 1], 0).into();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let started = ControlPlane::start(config).await.map_err(io::Error::other);
                tell.send(started.as_ref().map(|plane| plane.url().to_string()).map_err(ToString::to_string)).ok();
                let _plane = started?;
                std::future::pending::<io::Result<()>>().await
            })
        });
        let url = told.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
        Ok(Self { dir: dir.to_path_buf(), url })
    }

    /// Writes a token for one start of `service`.
    pub(crate) fn token(&self, service: &str, to: &Path) -> io::Result<PathBuf> {
        let token = create_token(&self.dir, service, "default", Duration::from_secs(60)).map_err(io::Error::other)?;
        let file = to.join(format!("{service}.token"));
        std::fs::write(&file, token)?;
        Ok(file)
    }

    /// Where the certificates for handshakes are.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}
