//! Who may hold the control plane's door.

use std::time::{Duration, SystemTime};

use sheetbend_certs::{KeyAndCsr, first_trust_client};
use sheetbend_control_plane::{ControlPlane, create_token};
use sheetbend_control_plane_client::xds::{Kind, MESH};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

mod support;
use support::*;

/// More than there are places for.
const STRANGERS: usize = 300;
/// Connections on which nothing is ever said.
const SILENT: usize = 100;

#[tokio::test]
async fn however_many_strangers_stay_a_proxy_comes_in_and_a_new_one_joins() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        silent.push(TcpStream::connect(control_plane.listen()).await.unwrap());
    }
    let tls = first_trust_client(ca.active_root().unwrap().sha256()).unwrap();
    let mut strangers = Vec::new();
    for _ in 0..STRANGERS {
        let socket = TcpStream::connect(control_plane.listen()).await.unwrap();
        let name = rustls::pki_types::ServerName::IpAddress(control_plane.listen().ip().into());
        // The last of them may find every place held by one that has just come, and be sent away.
        strangers.extend(tokio_rustls::TlsConnector::from(tls.clone()).connect(name, socket).await);
    }

    let web = workload(&control_plane, &ca, "web").await;
    let mut web = Delta::open(web, node("web-1", "sheetbend-proxy", None)).await.unwrap();
    web.subscribe(Kind::Listener, &[MESH]).await;
    assert_eq!(web.next().await.resources.len(), 1);

    let token = create_token(dir.path(), "new", "default", Duration::from_secs(600)).unwrap();
    let csr = KeyAndCsr::generate().unwrap().csr_pem();
    let deadline = SystemTime::now() + SOON;
    loop {
        let tls = first_trust_client(ca.active_root().unwrap().sha256()).unwrap();
        let joined = async {
            Some(ask_for_certificate(channel(control_plane.listen(), tls).await.ok()?, &csr, Some(&token)).await)
        };
        match joined.await {
            Some(Ok(_)) => break,
            refused => assert!(SystemTime::now() < deadline, "{refused:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let gone = async { while !matches!(strangers[0].read(&mut [0]).await, Ok(0) | Err(_)) {} };
    tokio::time::timeout(SOON, gone).await.expect("whoever has been there for the longest goes");
}
