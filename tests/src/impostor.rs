//! Somebody who stands where a sidecar stood, and keeps every byte that arrives.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::mesh::START;
use crate::wait::eventually;

/// A listener that records: in plain, or behind TLS with somebody's certificate.
#[derive(Debug)]
pub struct Impostor {
    told: Arc<Mutex<Vec<u8>>>,
    listening: JoinHandle<()>,
}

impl Impostor {
    /// Waits until the address is free, and listens there. It answers whatever comes in plain with `200 OK`.
    pub async fn in_plain(address: SocketAddr) -> Self {
        Self::start(address, None).await
    }

    /// The same behind TLS, with the certificate of a folder that `sheetbend certs issue` made. It keeps what comes
    /// after the handshake.
    pub async fn with_certificate(address: SocketAddr, identity: &Path) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let chain = CertificateDer::pem_file_iter(identity.join("cert.pem")).expect("a certificate file");
        let chain = chain.map(|certificate| certificate.expect("a certificate")).collect();
        let key = PrivateKeyDer::from_pem_file(identity.join("key.pem")).expect("a key");
        let config = builder.expect("TLS 1.3").with_no_client_auth().with_single_cert(chain, key);
        let mut config = config.expect("a key that belongs to its certificate");
        config.alpn_protocols =
            ["sheetbend/h2", "sheetbend/http1.1", "sheetbend/tcp"].map(|name| name.as_bytes().to_vec()).to_vec();
        Self::start(address, Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn start(address: SocketAddr, tls: Option<TlsAcceptor>) -> Self {
        let listener =
            eventually("the address is free", START, || async { TcpListener::bind(address).await.ok() }).await;
        let told = Arc::new(Mutex::new(Vec::new()));
        let keep = told.clone();
        let listening = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(listen(stream, tls.clone(), keep.clone()));
            }
        });
        Self { told, listening }
    }

    /// Every byte so far.
    pub fn told(&self) -> Vec<u8> {
        self.told.lock().expect("no panic holds this lock").clone()
    }

    /// Panics when any of these texts is among the bytes.
    #[track_caller]
    pub fn assert_never_told(&self, texts: &[&str]) {
        let told = self.told();
        for text in texts {
            let found = told.windows(text.len()).any(|window| window == text.as_bytes());
            assert!(!found, "`{text}` was sent: {:?}", String::from_utf8_lossy(&told));
        }
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn listen(mut plain: TcpStream, tls: Option<TlsAcceptor>, told: Arc<Mutex<Vec<u8>>>) {
    let mut bytes = [0; 4096];
    let keep = |bytes: &[u8]| told.lock().expect("no panic holds this lock").extend_from_slice(bytes);
    match tls {
        Some(tls) => {
            let Ok(mut stream) = tls.accept(plain).await else { return };
            while let Ok(length @ 1..) = stream.read(&mut bytes).await {
                keep(&bytes[..length]);
            }
        }
        None => {
            while let Ok(length @ 1..) = plain.read(&mut bytes).await {
                keep(&bytes[..length]);
                let _ = plain.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nimpostor\n").await;
            }
        }
    }
}
