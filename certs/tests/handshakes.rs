//! Real TLS handshakes between two sides of the mesh, in memory: who is believed, and who is not.

mod common;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::{TestCa, forge, handshake, leaf_params, workload};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ServerConfig};
use sheetbend_certs::{
    Identity, IdentityError, IdentityStore, Material, MeshAlpn, PeerError, control_plane_client, control_plane_server,
    first_trust_client, verify_peer, verify_peer_for_renewal,
};

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

/// What the server said when it refused, or the client when the server did not get so far.
async fn refusal(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> String {
    let (client, server) = handshake(client, server, SNI).await;
    let words = |e: std::io::Error| PeerError::of_handshake(&e).map_or_else(|| e.to_string(), ToString::to_string);
    // TLS 1.3: a client is done before the server has looked at its certificate; the answer never comes.
    assert!(client.is_err(), "the client was served");
    let said = server.err().map(words).unwrap_or_default();
    format!("{said} | {}", client.err().map(words).unwrap_or_default())
}

fn with_identity(ca: &TestCa, identity: Identity) -> Material {
    Material::new(identity, ca.ca.bundle().unwrap()).unwrap()
}

#[tokio::test]
async fn a_peer_of_another_ca_is_refused_and_both_roots_are_named() {
    let (ours, theirs) = (TestCa::new(), TestCa::new());
    let (web, stranger) = (ours.material("web"), theirs.material("caller"));
    let names = [&ours, &theirs].map(|ca| ca.ca.active_root().unwrap().subject().to_owned());
    // The stranger believes our server, but we do not believe the stranger.
    let gullible = Material::new(stranger.identity.clone(), web.bundle.clone()).unwrap();
    for client in [&gullible, &stranger] {
        let said = refusal(client.mesh_client(MeshAlpn::H2), &web.server).await;
        assert!(names.iter().all(|name| said.contains(name)), "{said}");
        assert!(said.contains("is not in our bundle"), "{said}");
    }
}

#[tokio::test]
async fn a_peer_that_is_expired_is_refused_on_either_side() {
    let before = SystemTime::now() - Duration::from_secs(7200);
    let ca = TestCa::at(before);
    let expired = with_identity(&ca, ca.identity_at("old", before, Duration::from_secs(60)));
    let fresh = ca.material("web");
    for (client, server) in [(&expired, &fresh), (&fresh, &expired)] {
        let said = refusal(client.mesh_client(MeshAlpn::H2), &server.server).await;
        assert!(said.contains("the peer's certificate expired at"), "{said}");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new();
    let web = ca.material("web");
    let mut nobody = ClientConfig::clone(web.mesh_client(MeshAlpn::H2));
    let silent = control_plane_client(None, web.bundle.clone()).unwrap();
    nobody.client_auth_cert_resolver = silent.client_auth_cert_resolver.clone();
    let said = refusal(&Arc::new(nobody), &web.server).await;
    assert!(said.contains("no certificates"), "{said}");
}

#[tokio::test]
async fn leaves_that_break_a_rule_are_refused_in_the_handshake() {
    let ca = TestCa::new();
    let web = ca.material("web");
    let cases: [(&[&str], &str); 2] = [
        (&["spiffe://cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/c"], "exactly one URI name, and has 2"),
        (&["spiffe://cluster.local"], "names a trust domain, not a workload"),
    ];
    for (uris, why) in cases {
        let (chain, key) = forge(&ca, leaf_params(uris));
        let client = raw_client(&web, chain, &key, &[&rustls::version::TLS13]);
        let said = refusal(&client, &web.server).await;
        assert!(said.contains(why), "{said}");
    }
}

/// A client that presents whatever it is given, in whatever version, and believes our server.
fn raw_client(
    of: &Material,
    chain: Vec<CertificateDer<'static>>,
    key: &rcgen::KeyPair,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(of.bundle.roots()[0].der().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    config.alpn_protocols = vec![MeshAlpn::H2.wire().to_vec()];
    if versions == [&rustls::version::TLS13] {
        // A client of ours in all but its certificate.
        let resolver = config.client_auth_cert_resolver;
        config = ClientConfig::clone(of.mesh_client(MeshAlpn::H2));
        config.client_auth_cert_resolver = resolver;
    }
    Arc::new(config)
}

#[tokio::test]
async fn tls_1_2_is_refused() {
    let ca = TestCa::new();
    let web = ca.material("web");
    let (chain, key) = forge(&ca, leaf_params(&["spiffe://cluster.local/ns/default/sa/old"]));
    let said = refusal(&raw_client(&web, chain, &key, &[&rustls::version::TLS12]), &web.server).await;
    assert!(said.contains("Tls13") || said.contains("ProtocolVersion") || said.contains("SupportedVersions"), "{said}");
}

#[tokio::test]
async fn a_resumed_session_whose_root_was_dropped_is_refused() {
    let ca = TestCa::new();
    let (caller, web) = (ca.material("caller"), ca.material("web"));
    let h2 = caller.mesh_client(MeshAlpn::H2);
    handshake(h2, &web.server, SNI).await.0.unwrap();
    let (client, server) = handshake(h2, &web.server, SNI).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    assert!(client.resumed && server.resumed, "the library would go on with it");
    let now = SystemTime::now();
    verify_peer(client.peer.as_deref(), &caller.bundle, now).unwrap();

    ca.ca.rotate(now).unwrap();
    ca.ca.drop_old().unwrap();
    let bundle = ca.ca.bundle().unwrap();
    for peer in [client.peer, server.peer] {
        let refused = verify_peer(peer.as_deref(), &bundle, now).unwrap_err();
        assert!(matches!(refused, PeerError::UnknownRoot { .. }), "{refused}");
    }
    // And no session reaches across: new material resumes nothing, neither as a server nor as a client.
    let (caller_now, web_now) = (ca.material("caller"), ca.material("web"));
    let said = refusal(h2, &web_now.server).await;
    assert!(said.contains("is not in our bundle"), "{said}");
    let said = refusal(caller_now.mesh_client(MeshAlpn::H2), &web.server).await;
    assert!(said.contains("is not in our bundle"), "{said}");
}

#[tokio::test]
async fn a_rotation_of_the_leaf_alone_starts_new_sessions_too() {
    let ca = TestCa::new();
    let web = ca.material("web");
    let store = IdentityStore::new();
    let install = || store.install(ca.identity("caller"), web.bundle.clone(), SystemTime::now()).unwrap();
    let before = install();
    handshake(before.mesh_client(MeshAlpn::H2), &web.server, SNI).await.0.unwrap();
    let after = install();
    let (client, server) = handshake(after.mesh_client(MeshAlpn::H2), &web.server, SNI).await;
    assert!(!client.unwrap().resumed);
    assert_eq!(server.unwrap().peer.unwrap()[0], after.identity.chain[0], "the new leaf is shown");
}

#[tokio::test]
async fn peers_that_are_not_ours_agree_on_http() {
    let ca = TestCa::new();
    let (caller, web) = (ca.material("caller"), ca.material("web"));
    let agreed = async |offers, speaks_http2| {
        let (client, _) = handshake(caller.foreign_client(offers), web.server_any(speaks_http2), SNI).await;
        client.unwrap().alpn
    };
    assert_eq!(agreed(MeshAlpn::H2, true).await.as_deref(), Some(&b"h2"[..]));
    assert_eq!(agreed(MeshAlpn::H2, false).await.as_deref(), Some(&b"http/1.1"[..]), "which every app speaks");
    assert_eq!(agreed(MeshAlpn::Http1, true).await.as_deref(), Some(&b"http/1.1"[..]));
    assert_eq!(agreed(MeshAlpn::Tcp, true).await, None, "the app's own bytes have no name");
    let (client, _) = handshake(caller.mesh_client(MeshAlpn::H2), web.server_any(true), SNI).await;
    assert_eq!(client.unwrap().alpn.as_deref(), Some(MeshAlpn::H2.wire()), "our own are still our own");
    let (client, _) = handshake(caller.foreign_client(MeshAlpn::H2), &web.server, SNI).await;
    assert!(client.is_err(), "a port that is for our own proxies alone");
}

/// A control plane at `localhost` and 127.0.0.1, under this CA.
fn control_plane(ca: &TestCa) -> Identity {
    ca.issue("control-plane", SystemTime::now(), |request| {
        request.dns = vec!["localhost".to_owned()];
        request.ips = vec!["127.0.0.1".parse().unwrap()];
    })
}

#[tokio::test]
async fn a_joiner_that_knows_the_roots_digest_alone_meets_the_right_control_plane() {
    let ca = TestCa::new();
    let bundle = ca.ca.bundle().unwrap();
    let server = control_plane_server(&control_plane(&ca), bundle.clone()).unwrap();
    let joiner = first_trust_client(ca.ca.active_root().unwrap().sha256()).unwrap();
    for name in ["localhost", "127.0.0.1"] {
        let (client, server) = handshake(&joiner, &server, name).await;
        assert_eq!(client.unwrap().alpn.as_deref(), Some(&b"h2"[..]));
        assert_eq!(server.unwrap().peer, None, "a client without a certificate is let in");
    }
    let other = first_trust_client(TestCa::new().ca.active_root().unwrap().sha256()).unwrap();
    let said = handshake(&other, &server, "localhost").await.0.unwrap_err().to_string();
    assert!(said.contains("does not lead to the root that the token names"), "{said}");
    let said = handshake(&joiner, &server, "elsewhere").await.0.unwrap_err().to_string();
    assert!(said.contains("is not for `elsewhere` but for [localhost, 127.0.0.1]"), "{said}");
}

#[tokio::test]
async fn a_workload_cannot_pose_as_the_control_plane() {
    let ca = TestCa::new();
    let bundle = ca.ca.bundle().unwrap();
    let impostor = control_plane_server(&ca.identity("web"), bundle.clone()).unwrap();
    for client in [
        first_trust_client(ca.ca.active_root().unwrap().sha256()).unwrap(),
        control_plane_client(Some(&ca.identity("caller")), bundle).unwrap(),
    ] {
        let said = handshake(&client, &impostor, "localhost").await.0.unwrap_err().to_string();
        assert!(said.contains("is not for `localhost`"), "{said}");
    }
}

#[tokio::test]
async fn the_pinned_root_must_have_signed_what_is_shown_with_it() {
    let (ca, evil) = (TestCa::new(), TestCa::new());
    // The chain of another CA, with the pinned root beside it.
    let mut identity = control_plane(&evil);
    identity.chain.push(ca.ca.active_root().unwrap().der().clone());
    let key = identity.key_pem();
    let identity = Identity::from_pem(&identity.cert_pem(), &key).unwrap();
    let server = control_plane_server(&identity, evil.ca.bundle().unwrap()).unwrap();
    let joiner = first_trust_client(ca.ca.active_root().unwrap().sha256()).unwrap();
    let said = handshake(&joiner, &server, "localhost").await.0.unwrap_err().to_string();
    assert!(said.contains("is not in our bundle"), "{said}");
}

#[tokio::test]
async fn a_control_plane_lets_in_who_renews_and_tells_them_apart() {
    let before = SystemTime::now() - Duration::from_secs(7200);
    let ca = TestCa::at(before);
    let bundle = ca.ca.bundle().unwrap();
    let server = control_plane_server(&control_plane(&ca), bundle.clone()).unwrap();
    let expired = ca.identity_at("web", before, Duration::from_secs(60));
    let client = control_plane_client(Some(&expired), bundle.clone()).unwrap();
    let (_, seen) = handshake(&client, &server, "localhost").await;
    let peer = seen.unwrap().peer;
    assert!(matches!(verify_peer(peer.as_deref(), &bundle, SystemTime::now()), Err(PeerError::Expired { .. })));
    assert_eq!(verify_peer_for_renewal(peer.as_deref(), &bundle, SystemTime::now()).unwrap().id, workload("web"));

    let stranger = control_plane_client(Some(&TestCa::new().identity("web")), bundle).unwrap();
    assert!(handshake(&stranger, &server, "localhost").await.1.is_err());
}

#[tokio::test]
async fn tokens_of_either_root_work_with_a_control_plane_that_rotates() {
    let ca = TestCa::new();
    let old_root = ca.ca.active_root().unwrap().sha256();
    let bundle = ca.ca.rotate(SystemTime::now()).unwrap();
    let server = control_plane_server(&control_plane(&ca), bundle).unwrap();
    for root in [old_root, ca.ca.active_root().unwrap().sha256()] {
        let (client, _) = handshake(&first_trust_client(root).unwrap(), &server, "localhost").await;
        client.unwrap();
    }
}

#[tokio::test]
async fn the_store_keeps_the_last_good_identity() {
    let ca = TestCa::new();
    let store = IdentityStore::new();
    assert!(store.current().is_none());
    let mut changes = store.subscribe();
    let good = store.install(ca.identity("web"), ca.ca.bundle().unwrap(), SystemTime::now()).unwrap();
    assert!(changes.has_changed().unwrap());
    assert!(Arc::ptr_eq(changes.borrow_and_update().as_ref().unwrap(), &good));
    let stranger = TestCa::new().identity("web");
    let refused = store.install(stranger, ca.ca.bundle().unwrap(), SystemTime::now()).unwrap_err();
    assert!(refused.to_string().contains("peers would refuse our own certificate"), "{refused}");
    assert!(!changes.has_changed().unwrap());
    assert!(Arc::ptr_eq(&store.current().unwrap(), &good));
}

#[tokio::test]
async fn a_renewal_and_a_new_bundle_that_come_at_once_both_take_effect() {
    let ca = TestCa::new();
    let store = IdentityStore::new();
    store.install(ca.identity("web"), ca.ca.bundle().unwrap(), SystemTime::now()).unwrap();
    let both = ca.ca.rotate(SystemTime::now()).unwrap();
    let renewed = ca.identity("web");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let update = |current: Option<&Material>| (current.unwrap().identity.clone(), both.clone());
            store.update(SystemTime::now(), update).unwrap();
        });
        scope.spawn(|| {
            let update = |current: Option<&Material>| (renewed.clone(), current.unwrap().bundle.clone());
            store.update(SystemTime::now(), update).unwrap();
        });
    });
    let now = store.current().unwrap();
    assert_eq!((now.bundle.as_ref(), &now.identity.chain), (both.as_ref(), &renewed.chain));
    assert!(Arc::ptr_eq(&now, store.subscribe().borrow().as_ref().unwrap()), "both views agree");
}

#[test]
fn a_key_of_another_issue_is_noticed() {
    let ca = TestCa::new();
    let (one, two) = (ca.identity("web"), ca.identity("web"));
    assert_eq!(Identity::from_pem(&one.cert_pem(), &two.key_pem()).unwrap_err(), IdentityError::Mismatch);
    assert_eq!(Identity::from_pem(&one.cert_pem(), &one.key_pem()).unwrap().id, workload("web"));
    assert!(!format!("{one:?}").contains("PRIVATE") && !format!("{one:?}").contains("MIG"));
}
