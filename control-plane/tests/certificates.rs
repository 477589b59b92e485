//! Who gets a certificate, and who does not.

use std::time::{Duration, SystemTime};

use sheetbend_certs::{KeyAndCsr, control_plane_client, decode_certificates, verify_peer};
use sheetbend_control_plane::{ControlPlane, create_token};
use tonic::Code;

mod support;
use support::*;

#[tokio::test]
async fn a_join_token_gives_its_identity_to_the_first_key_and_to_that_key_again() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let token = create_token(dir.path(), "web", "default", Duration::from_secs(600)).unwrap();
    let key = KeyAndCsr::generate().unwrap();
    for _ in 0..2 {
        let channel = stranger(&control_plane, &ca).await;
        let chain = ask_for_certificate(channel, &key.csr_pem(), Some(&token)).await.unwrap();
        let (bundle, chain) = chain.split_last().unwrap();
        let leaf_and_issuers = decode_certificates(&chain.concat()).unwrap();
        let bundle = sheetbend_certs::TrustBundle::from_pem(bundle).unwrap();
        let who = verify_peer(Some(&leaf_and_issuers), &bundle, SystemTime::now()).unwrap();
        assert_eq!(who, id("web"), "whatever the request's own names are");
    }
    let other = KeyAndCsr::generate().unwrap();
    let refused = ask_for_certificate(stranger(&control_plane, &ca).await, &other.csr_pem(), Some(&token)).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("already spent by another key"), "{refused}");
    control_plane.shutdown().await;

    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let refused = ask_for_certificate(stranger(&control_plane, &ca).await, &other.csr_pem(), Some(&token)).await;
    assert!(refused.unwrap_err().message().contains("already spent"), "a restart forgets nothing");
}

#[tokio::test]
async fn without_a_proof_or_with_a_bad_one_nothing_is_signed() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let csr = KeyAndCsr::generate().unwrap().csr_pem();
    let expired = create_token(dir.path(), "web", "default", Duration::ZERO).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    new_ca(elsewhere.path());
    let forged = create_token(elsewhere.path(), "web", "default", Duration::from_secs(60)).unwrap();
    for (token, reason) in [
        (None, "send a join token"),
        (Some(expired.as_str()), "expired"),
        (Some(forged.as_str()), "not made by this control plane's CA"),
        (Some("nonsense"), "not a join token"),
    ] {
        let refused = ask_for_certificate(stranger(&control_plane, &ca).await, &csr, token).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert!(refused.message().contains(reason), "{refused}");
    }
    let token = create_token(dir.path(), "web", "default", Duration::from_secs(60)).unwrap();
    let refused = ask_for_certificate(stranger(&control_plane, &ca).await, "garbage", Some(&token)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
}

#[tokio::test]
async fn an_expired_certificate_is_good_for_renewal_and_for_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    // Issued with the backdate of two minutes, so that it is over already.
    let short = identity(&ca, "web", Duration::from_secs(1), SystemTime::now());
    tokio::time::sleep_until(
        tokio::time::Instant::now()
            + short.not_after.duration_since(SystemTime::now()).unwrap_or_default()
            + Duration::from_millis(1100),
    )
    .await;
    let tls = control_plane_client(Some(&short), ca.bundle().unwrap()).unwrap();
    let channel = channel(control_plane.listen(), tls).await.unwrap();
    let csr = KeyAndCsr::generate().unwrap().csr_pem();
    ask_for_certificate(channel.clone(), &csr, None).await.unwrap();
    let refused = Delta::open(channel, node("web-1", "sheetbend-proxy", Some(serves(80, 1)))).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("good for renewal, and for nothing else"), "{refused}");
}

#[tokio::test]
async fn a_stranger_gets_no_discovery() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let refused = Delta::open(stranger(&control_plane, &ca).await, node("x", "sheetbend-proxy", None)).await;
    assert_eq!(refused.err().unwrap().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_full_disk_signs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ca = new_ca(dir.path());
    let control_plane = ControlPlane::start(config(dir.path())).await.unwrap();
    let token = create_token(dir.path(), "web", "default", Duration::from_secs(60)).unwrap();
    let state = dir.path().join("state");
    // What a vanished disk looks like, to root too.
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::write(&state, "not a folder").unwrap();
    let csr = KeyAndCsr::generate().unwrap().csr_pem();
    let refused = ask_for_certificate(stranger(&control_plane, &ca).await, &csr, Some(&token)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("cannot sign now") && refused.message().contains("spent-tokens"), "{refused}");
}
