//! What the tests of this crate share: a CA in a directory of its own, identities from it, handshakes in memory.
#![allow(dead_code, unreachable_pub)]

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use sheetbend_certs::{Ca, Csr, Identity, IssueRequest, KeyAndCsr, Material, SpiffeId, TrustDomain};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A CA that is gone when dropped.
pub struct TestCa {
    pub dir: tempfile::TempDir,
    pub ca: Ca,
}

impl TestCa {
    pub fn new() -> Self {
        Self::at(SystemTime::now())
    }

    /// A CA made at some other time.
    pub fn at(now: SystemTime) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::init(&dir.path().join("ca"), &TrustDomain::default(), now).unwrap();
        Self { dir, ca }
    }

    pub fn identity(&self, service: &str) -> Identity {
        self.identity_at(service, SystemTime::now(), Duration::from_secs(3600))
    }

    pub fn identity_at(&self, service: &str, now: SystemTime, ttl: Duration) -> Identity {
        self.issue(service, now, |request| request.ttl = ttl)
    }

    pub fn issue(&self, service: &str, now: SystemTime, change: impl FnOnce(&mut IssueRequest)) -> Identity {
        let key = KeyAndCsr::generate().unwrap();
        let mut request = IssueRequest::new(workload(service), Csr::parse(key.csr_der()).unwrap());
        change(&mut request);
        let issued = self.ca.issue(&request, now).unwrap();
        key.into_identity(issued.chain).unwrap()
    }

    pub fn material(&self, service: &str) -> Material {
        Material::new(self.identity(service), self.ca.bundle().unwrap()).unwrap()
    }
}

pub fn workload(service: &str) -> SpiffeId {
    SpiffeId::for_workload(&TrustDomain::default(), "default", service).unwrap()
}

/// What one side of a finished handshake knows of the other.
#[derive(Debug)]
pub struct Side {
    pub peer: Option<Vec<CertificateDer<'static>>>,
    pub alpn: Option<Vec<u8>>,
    pub resumed: bool,
    pub group: Option<rustls::NamedGroup>,
    pub version: Option<rustls::ProtocolVersion>,
}

fn side(connection: &rustls::CommonState) -> Side {
    Side {
        peer: connection.peer_certificates().map(|certs| certs.to_vec()),
        alpn: connection.alpn_protocol().map(<[u8]>::to_vec),
        resumed: connection.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        group: connection.negotiated_key_exchange_group().map(|group| group.name()),
        version: connection.protocol_version(),
    }
}

/// A real handshake, one byte each way (so that session tickets arrive), and what both sides say: client, server.
pub async fn handshake(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    name: &str,
) -> (Result<Side, std::io::Error>, Result<Side, std::io::Error>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let client = async {
        let mut stream = tokio_rustls::TlsConnector::from(client.clone()).connect(name, near).await?;
        stream.write_all(b"?").await?;
        stream.read_exact(&mut [0]).await?;
        Ok(side(stream.get_ref().1))
    };
    let server = async {
        let mut stream = tokio_rustls::TlsAcceptor::from(server.clone()).accept(far).await?;
        stream.read_exact(&mut [0]).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        let side = side(stream.get_ref().1);
        let _ = stream.read(&mut [0]).await;
        Ok(side)
    };
    tokio::join!(client, server)
}

/// The issuing CA of a directory, for signing what the CA itself would never sign.
pub fn forger(ca: &TestCa) -> (rcgen::Issuer<'static, rcgen::KeyPair>, CertificateDer<'static>) {
    let dir = ca.ca.dir();
    let manifest: serde_json::Value = std::fs::read_to_string(dir.join("ca.json")).unwrap().parse().unwrap();
    let name = manifest["issuer"].as_str().unwrap();
    let key = rcgen::KeyPair::from_pem(&std::fs::read_to_string(dir.join(format!("{name}.key"))).unwrap()).unwrap();
    let pem = std::fs::read_to_string(dir.join(format!("{name}.pem"))).unwrap();
    let der = sheetbend_certs::decode_certificates(&pem).unwrap().remove(0);
    (rcgen::Issuer::from_ca_cert_der(&der, key).unwrap(), der)
}

/// What a leaf of ours looks like, to be spoilt.
pub fn leaf_params(uris: &[&str]) -> rcgen::CertificateParams {
    use rcgen::{ExtendedKeyUsagePurpose as Eku, KeyUsagePurpose, SanType};
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![Eku::ServerAuth, Eku::ClientAuth];
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    let now = SystemTime::now();
    (params.not_before, params.not_after) =
        ((now - Duration::from_secs(60)).into(), (now + Duration::from_secs(3600)).into());
    params
}

/// A chain whose leaf has these parameters, signed by the CA's own issuing key, and the leaf's key.
pub fn forge(ca: &TestCa, params: rcgen::CertificateParams) -> (Vec<CertificateDer<'static>>, rcgen::KeyPair) {
    let (issuer, der) = forger(ca);
    let key = rcgen::KeyPair::generate().unwrap();
    (vec![params.signed_by(&key, &issuer).unwrap().into(), der], key)
}

/// Whether a test may go on: without the tool it is left out by name, and under `SHEETBEND_TEST_STRICT=1` it fails.
pub fn has(tool: &str, probe: &str) -> bool {
    use std::io::Write;
    let found = std::process::Command::new(tool).arg(probe).output().is_ok_and(|output| output.status.success());
    let strict = std::env::var_os("SHEETBEND_TEST_STRICT").is_some_and(|v| v == "1");
    assert!(found || !strict, "{tool} is missing, and nothing may be left out");
    if !found {
        let thread = std::thread::current();
        let line = format!("left out: {}: `{tool}` is not installed\n", thread.name().unwrap_or("a test"));
        let _ = std::io::stderr().write_all(line.as_bytes()); // Past the capturing of `print!`.
    }
    found
}
