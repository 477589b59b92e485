//! A TLS client that believes every server: for finding out what a sidecar refuses.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::http::{Error, WITHIN};

/// A configuration with the certificate and key of a folder that `sheetbend certs issue` made, or with none.
pub fn config(identity: Option<&Path>, alpn: &[&str], versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_protocol_versions(versions).expect("versions that the provider has");
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Believer(provider)));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(folder) => {
            let chain = CertificateDer::pem_file_iter(folder.join("cert.pem")).expect("a certificate file");
            let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
            let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).expect("a key");
            builder.with_client_auth_cert(chain, key).expect("a key that belongs to its certificate")
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

/// Connects and shakes hands, with `sni` as the name asked for.
pub async fn connect(to: SocketAddr, config: ClientConfig, sni: &str) -> Result<TlsStream<TcpStream>, Error> {
    shake(TcpStream::connect(to).await?, config, sni).await
}

/// Shakes hands over a connection.
pub async fn shake(stream: TcpStream, config: ClientConfig, sni: &str) -> Result<TlsStream<TcpStream>, Error> {
    let name = ServerName::try_from(sni.to_string())?;
    Ok(tokio::time::timeout(WITHIN, TlsConnector::from(Arc::new(config)).connect(name, stream)).await??)
}

/// Asks for `/` over a fresh connection, as [`ask_over`] does.
pub async fn ask(to: SocketAddr, config: ClientConfig, sni: &str) -> Result<String, Error> {
    ask_over(connect(to, config, sni).await?).await
}

/// Asks for `/` in HTTP/1.1 and gives all that comes back. With TLS 1.3 a server refuses a client's certificate only after
/// the client's side of the handshake is done: the read tells.
pub async fn ask_over(mut stream: TlsStream<TcpStream>) -> Result<String, Error> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n").await?;
    let mut said = Vec::new();
    let read = tokio::time::timeout(WITHIN, stream.read_to_end(&mut said)).await?;
    match read {
        Err(error) if said.is_empty() => Err(error.into()),
        _ if said.is_empty() => Err("closed without a word".into()),
        _ => Ok(String::from_utf8_lossy(&said).into_owned()),
    }
}

#[derive(Debug)]
struct Believer(Arc<CryptoProvider>);

impl ServerCertVerifier for Believer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
