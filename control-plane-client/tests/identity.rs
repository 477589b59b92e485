//! First certificates and renewals, from a real CA over real TLS.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use sheetbend_certs::{Ca, IdentityStore, Material};
use sheetbend_control_plane_client::channel::Connector;
use sheetbend_control_plane_client::discovery::{Discovery, DiscoveryConfig, NodeInfo};
use sheetbend_control_plane_client::identity::{IdentityClient, IdentityConfig, NoIdentity, Proof};
use sheetbend_control_plane_client::xds::{Kind, ROOT_CA, encode};
use support::authority::{Authority, Spoil, issue, token, web};
use support::*;
use tokio::sync::watch;
use tonic::Status;

fn start(config: IdentityConfig) -> (IdentityClient, Arc<IdentityStore>) {
    let store = Arc::new(IdentityStore::new());
    let (client, task) = IdentityClient::start(config, store.clone()).unwrap();
    tokio::spawn(task);
    (client, store)
}

fn joining(authority: &Authority) -> IdentityConfig {
    IdentityConfig::new(authority.url(), Proof::Join(authority.token()))
}

/// Waits for material that satisfies a condition.
async fn material(store: &IdentityStore, condition: impl Fn(&Material) -> bool) -> Arc<Material> {
    let mut changes = store.subscribe();
    let found = within(changes.wait_for(|found| found.as_ref().is_some_and(|found| condition(found)))).await;
    found.unwrap().clone().unwrap()
}

#[tokio::test]
async fn a_join_token_becomes_a_certificate_and_the_root_is_trusted_by_its_digest() {
    let authority = Authority::start().await;
    let began = Instant::now();
    let (client, store) = start(joining(&authority));
    let first = client.first(DEADLINE).await.unwrap();
    // What the answer took on its way counts as a clock that is behind, and so do whole seconds.
    let noise = -(began.elapsed().as_secs() as i64 + 2);
    assert_eq!(first.identity.id, web());
    assert_eq!(first.bundle.roots()[0].sha256(), authority.ca.active_root().unwrap().sha256());
    assert!(store.current().is_some());
    let asked = authority.asked();
    assert_eq!((asked.len(), asked[0].certificate.clone()), (1, None));
    assert_eq!(asked[0].bearer.as_deref(), Some(format!("Bearer {}", authority.token().as_str()).as_str()));
    let status = client.status().borrow().clone();
    assert_eq!((status.issued, status.failures), (1, 0));
    assert!(status.clock_ahead.is_some_and(|ahead| (noise..=0).contains(&ahead)), "{status:?}");
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    let authority = Authority::start().await;
    authority.spoil_next(Spoil::Lose);
    authority.spoil_next(Spoil::Lose);
    let (client, _store) = start(joining(&authority));
    client.first(DEADLINE).await.unwrap();
    let asked = authority.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|one| one.key == asked[0].key), "a token is spent by the first key: {asked:?}");
}

#[tokio::test]
async fn a_refused_token_is_told_with_the_control_planes_reason() {
    let authority = Authority::start().await;
    authority.spoil_next(Spoil::Refuse(Status::unauthenticated("this join token was already spent by another key")));
    let (client, _store) = start(joining(&authority));
    let refused = client.first(DEADLINE).await.unwrap_err();
    assert_eq!(refused, NoIdentity::Refused("this join token was already spent by another key".to_string()));
}

#[tokio::test]
async fn a_control_plane_with_another_root_than_the_tokens_gets_no_token() {
    let authority = Authority::start().await;
    let (client, store) = start(IdentityConfig::new(authority.url(), Proof::Join(token(&[7; 32]))));
    let mut status = client.status();
    let unknown = |reason: &Option<Arc<str>>| reason.as_deref().is_some_and(|reason| reason.contains("root"));
    within(status.wait_for(|status| unknown(&status.last_error))).await.unwrap();
    assert!(store.current().is_none());
    assert_eq!(authority.asked(), [], "the token must not leave before the root is proven");
    let away = client.first(Duration::from_millis(1)).await.unwrap_err();
    assert!(matches!(&away, NoIdentity::Away(reason) if reason.contains("root")), "{away}");
}

#[tokio::test]
async fn a_certificate_for_somebody_else_is_refused() {
    let authority = Authority::start().await;
    authority.spoil_next(Spoil::Other("spiffe://cluster.local/ns/default/sa/db"));
    let (client, _store) = start(joining(&authority));
    let refused = client.first(DEADLINE).await.unwrap_err();
    assert!(refused.to_string().contains("sa/db, the token for"), "{refused}");
}

#[tokio::test]
async fn a_bundle_without_the_pinned_root_is_refused() {
    let authority = Authority::start().await;
    let dir = tempfile::tempdir().unwrap();
    let other =
        Ca::init(dir.path().join("ca").as_path(), &"cluster.local".parse().unwrap(), SystemTime::now()).unwrap();
    authority.spoil_next(Spoil::Bundle(other.bundle().unwrap().to_pem()));
    let (client, _store) = start(joining(&authority));
    let refused = client.first(DEADLINE).await.unwrap_err();
    assert!(refused.to_string().contains("lacks the root"), "{refused}");
}

#[tokio::test]
async fn a_renewal_has_a_fresh_key_and_is_proven_by_the_certificate_before() {
    let authority = Authority::start().await;
    authority.sign_for(Duration::from_secs(2));
    let (client, store) = start(joining(&authority));
    let first = client.first(DEADLINE).await.unwrap();
    authority.sign_for(Duration::from_secs(3600));
    let next = material(&store, |found| found.identity.chain != first.identity.chain).await;
    assert_eq!(next.identity.id, web());
    let asked = authority.asked();
    // Where a certificate of two seconds was over before it came, it was asked for again with the same key.
    let renewal = asked.iter().find(|one| one.key != asked[0].key).expect("a fresh key");
    assert_eq!((renewal.bearer.clone(), renewal.certificate.clone()), (None, Some(web())));
}

#[tokio::test]
async fn a_renewal_that_fails_keeps_the_last_good_one_and_is_tried_again() {
    let authority = Authority::start().await;
    authority.sign_for(Duration::from_secs(2));
    let (client, store) = start(joining(&authority));
    let first = client.first(DEADLINE).await.unwrap();
    authority.sign_for(Duration::from_secs(3600));
    authority.spoil_next(Spoil::Refuse(Status::unavailable("the disk is full")));
    let mut status = client.status();
    within(status.wait_for(|status| status.failures == 1)).await.unwrap();
    assert_eq!(store.current().unwrap().identity.chain, first.identity.chain);
    material(&store, |found| found.identity.chain != first.identity.chain).await;
    within(status.wait_for(|status| status.issued == 2 && status.failures == 0)).await.unwrap();
}

#[tokio::test]
async fn an_identity_that_was_kept_needs_no_token_after_a_restart() {
    let authority = Authority::start().await;
    let home = tempfile::tempdir().unwrap();
    let directory = Some(home.path().join("identity"));
    let (client, _) = start(IdentityConfig { directory: directory.clone(), ..joining(&authority) });
    let first = client.first(DEADLINE).await.unwrap();
    let mut status = client.status();
    within(status.wait_for(|status| status.issued == 1)).await.unwrap();
    let file = directory.as_ref().unwrap().join("identity.json");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let (client, _) = start(IdentityConfig { directory, ..IdentityConfig::new(authority.url(), Proof::Kept) });
    let again = client.first(DEADLINE).await.unwrap();
    assert_eq!(again.identity.chain, first.identity.chain);
    assert_eq!(authority.asked().len(), 1);
}

#[tokio::test]
async fn an_expired_identity_that_was_kept_still_proves_who_may_renew_it() {
    let authority = Authority::start().await;
    let home = tempfile::tempdir().unwrap();
    let yesterday = SystemTime::now() - Duration::from_secs(60);
    let old = issue(&authority.ca, &web(), Duration::from_secs(30), yesterday);
    let kept = serde_json::json!({
        "chain": old.cert_pem(), "key": old.key_pem(), "bundle": authority.ca.bundle().unwrap().to_pem(),
    });
    std::fs::write(home.path().join("identity.json"), kept.to_string()).unwrap();
    let directory = Some(home.path().to_path_buf());
    let (client, _) = start(IdentityConfig { directory, ..IdentityConfig::new(authority.url(), Proof::Kept) });
    let renewed = client.first(DEADLINE).await.unwrap();
    assert_ne!(renewed.identity.chain, old.chain);
    assert_eq!(authority.asked()[0].certificate, Some(web()));
}

#[tokio::test]
async fn what_was_kept_and_is_damaged_is_told_and_the_token_used() {
    let authority = Authority::start().await;
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("identity.json"), "{").unwrap();
    let directory = Some(home.path().to_path_buf());
    let (client, _) = start(IdentityConfig { directory, ..joining(&authority) });
    assert_eq!(client.first(DEADLINE).await.unwrap().identity.id, web());
}

#[tokio::test]
async fn without_a_token_and_without_a_kept_identity_it_is_said_at_once() {
    let (client, _) = start(IdentityConfig::new("https://127.0.0.1:9", Proof::Kept));
    let refused = client.first(DEADLINE).await.unwrap_err();
    assert!(refused.to_string().contains("no token to ask for one"), "{refused}");
}

#[tokio::test]
async fn a_new_bundle_is_installed_acknowledged_and_followed_by_a_leaf_of_the_new_root() {
    let (accepted, mut streams) = tokio::sync::mpsc::channel(16);
    let authority = Authority::with(|router| router.add_service(discovery_service(accepted))).await;
    let (client, store) = start(joining(&authority));
    let first = client.first(DEADLINE).await.unwrap();
    let (discovery, task) = Discovery::start(DiscoveryConfig {
        connector: Connector::mesh(&authority.url(), store.clone()).unwrap(),
        node: NodeInfo::default(),
        registration: watch::channel(None).1,
    });
    tokio::spawn(task);
    let mut conn = within(streams.recv()).await.unwrap();
    conn.tell_mesh().await;
    until(&discovery, |discovery| discovery.snapshot().mesh().is_some()).await;

    let both = authority.ca.rotate(SystemTime::now()).unwrap();
    let bundle = || encode::resource(ROOT_CA, "2", encode::root_ca(&both.to_pem()));
    conn.say(Kind::Secret, vec![bundle()], &[]).await;
    material(&store, |found| found.bundle.roots().len() == 2).await;
    let leaf = material(&store, |found| found.identity.chain != first.identity.chain).await;
    assert!(leaf.identity.chain.len() > first.identity.chain.len(), "the new root comes with the old one's signature");

    // The acknowledgement may be lost with a connection that rests on older material; the next one brings it again.
    let acknowledged = async {
        loop {
            let mut conn = streams.recv().await.unwrap();
            if let Some(reply) = conn.try_ask(Kind::Secret, bundle()).await {
                return (conn, reply);
            }
        }
    };
    let (mut conn, reply) = within(acknowledged).await;
    assert_eq!(reply.error_detail, None);
    assert!(discovery.snapshot().mesh().is_some(), "what is known survives the reconnection");

    let nonce = conn.say(Kind::Secret, vec![encode::resource(ROOT_CA, "3", encode::root_ca("nothing"))], &[]).await;
    let refusal = conn.reply(&nonce).await.error_detail.expect("no bundle is refused");
    assert!(refusal.message.starts_with("ROOTCA: "), "{}", refusal.message);
    assert_eq!(store.current().unwrap().bundle.roots().len(), 2);
}

#[tokio::test]
async fn a_bundle_that_our_own_leaf_does_not_fit_is_refused() {
    let (accepted, mut streams) = tokio::sync::mpsc::channel(16);
    let authority = Authority::with(|router| router.add_service(discovery_service(accepted))).await;
    let store = Arc::new(IdentityStore::new());
    let own = issue(&authority.ca, &web(), Duration::from_secs(3600), SystemTime::now());
    store.install(own, authority.ca.bundle().unwrap(), SystemTime::now()).unwrap();
    let (_discovery, task) = Discovery::start(DiscoveryConfig {
        connector: Connector::mesh(&authority.url(), store.clone()).unwrap(),
        node: NodeInfo::default(),
        registration: watch::channel(None).1,
    });
    tokio::spawn(task);
    let mut conn = within(streams.recv()).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other =
        Ca::init(dir.path().join("ca").as_path(), &"cluster.local".parse().unwrap(), SystemTime::now()).unwrap();
    let pem = other.bundle().unwrap().to_pem();
    let nonce = conn.say(Kind::Secret, vec![encode::resource(ROOT_CA, "2", encode::root_ca(&pem))], &[]).await;
    let refusal = conn.reply(&nonce).await.error_detail.expect("it would lock us out");
    assert!(refusal.message.contains("peers would refuse our own certificate"), "{}", refusal.message);
}
