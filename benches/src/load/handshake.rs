//! Full TLS 1.3 handshakes with a client certificate, never resumed, at an inbound proxy.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Shared;
use crate::frames;

/// What a handshake needs to know.
#[derive(Clone)]
pub(crate) struct Caller {
    connector: TlsConnector,
    server_name: ServerName<'static>,
}

impl Caller {
    /// The calling side: its chain, key and the roots it trusts are files that `path` finds. It asks for `server_name`
    /// and offers `alpn`. The server's chain and signature are verified, its name is not.
    pub(crate) fn new(path: impl Fn(&str) -> PathBuf, server_name: &str, alpn: &str) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(path("bundle.pem")).map_err(io::Error::other)? {
            roots.add(root.map_err(io::Error::other)?).map_err(io::Error::other)?;
        }
        let chain = CertificateDer::pem_file_iter(path("caller.pem"))
            .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
            .map_err(io::Error::other)?;
        let key = PrivateKeyDer::from_pem_file(path("caller.key")).map_err(io::Error::other)?;
        // That of our proxies: a post-quantum key share comes with the first message, for whoever takes it.
        let provider = sheetbend_certs::provider().clone();
        let verifier = rustls::client::WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone())
            .build()
            .map_err(io::Error::other)?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyName(verifier)))
            .with_client_auth_cert(chain, key)
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        config.resumption = Resumption::disabled();
        let server_name = ServerName::try_from(server_name.to_string()).map_err(io::Error::other)?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), server_name })
    }

    /// One handshake, until the server has verified the client: its first HTTP/2 frame comes after that. Gives the
    /// name of the key exchange that was agreed.
    pub(crate) async fn shake(&self, to: SocketAddr) -> io::Result<String> {
        let tcp = TcpStream::connect(to).await?;
        tcp.set_nodelay(true)?;
        let mut tls = self.connector.connect(self.server_name.clone(), tcp).await?;
        let mut hello = frames::PREFACE.to_vec();
        frames::push(&mut hello, frames::SETTINGS, 0, 0, &[]);
        tls.write_all(&hello).await?;
        tls.flush().await?;
        let mut first = [0; 9];
        tls.read_exact(&mut first).await?;
        match first[3] {
            frames::SETTINGS => {
                Ok(tls.get_ref().1.negotiated_key_exchange_group().map_or(String::new(), |g| format!("{:?}", g.name())))
            }
            _ => Err(io::Error::other(format!("expected SETTINGS, got {first:02x?}"))),
        }
    }
}

/// Handshakes one after another.
pub(crate) async fn again_and_again(caller: Caller, to: SocketAddr, shared: Arc<Shared>) {
    while !shared.stopped() {
        let outcome = caller.shake(to).await;
        if outcome.is_ok() {
            shared.count();
        }
        shared.note(outcome.map(drop));
    }
}

/// Chain and validity as usual, whatever the name: the load is not what is measured.
#[derive(Debug)]
struct AnyName(Arc<rustls::client::WebPkiServerVerifier>);

impl rustls::client::danger::ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match self.0.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(rustls::client::danger::ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
