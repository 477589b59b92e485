//! Real TLS handshakes between two sides of the mesh, in memory: who is believed, and who is not.

mod common;

use std::time::SystemTime;

use common::{TestCa, handshake, workload};
use sheetbend_certs::{MeshAlpn, verify_peer};

const SNI: &str = "80.web.default.cluster.local";

#[tokio::test]
async fn two_workloads_of_one_mesh_learn_each_others_names() {
    let ca = TestCa::new();
    let (caller, web) = (ca.material("caller"), ca.material("web"));
    for alpn in MeshAlpn::ALL {
        let (client, server) = handshake(caller.mesh_client(alpn), &web.server, SNI).await;
        let (client, server) = (client.unwrap(), server.unwrap());
        let now = SystemTime::now();
        assert_eq!(verify_peer(client.peer.as_deref(), &caller.bundle, now).unwrap(), workload("web"));
        assert_eq!(verify_peer(server.peer.as_deref(), &web.bundle, now).unwrap(), workload("caller"));
        assert_eq!(client.alpn.as_deref(), Some(alpn.wire()));
        assert_eq!(client.version, Some(rustls::ProtocolVersion::TLSv1_3));
        if !client.resumed {
            assert_eq!(client.group, Some(rustls::NamedGroup::X25519MLKEM768));
        }
    }
}
