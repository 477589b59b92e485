//! Chains that our own issuing key signed and that no proxy may believe all the same: the rules for a leaf.

mod common;

use std::time::{Duration, SystemTime};

use common::{TestCa, forge, forger, leaf_params, workload};
use proptest::prelude::*;
use rustls::pki_types::CertificateDer;
use sheetbend_certs::{PeerError, RENEWAL_GRACE, SpiffeId, TrustBundle, verify_peer, verify_peer_for_renewal};

const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";

fn judge(ca: &TestCa, params: rcgen::CertificateParams) -> Result<SpiffeId, PeerError> {
    verify_peer(Some(&forge(ca, params).0), &ca.ca.bundle().unwrap(), SystemTime::now())
}

fn spoilt(change: impl FnOnce(&mut rcgen::CertificateParams)) -> Result<SpiffeId, PeerError> {
    let mut params = leaf_params(&[WEB]);
    change(&mut params);
    judge(&TestCa::new(), params)
}

#[test]
fn an_unspoilt_leaf_is_believed() {
    assert_eq!(spoilt(|_| {}).unwrap(), workload("web"));
}

#[test]
fn a_leaf_has_exactly_one_uri_name_and_it_is_a_workloads() {
    let ca = TestCa::new();
    assert_eq!(judge(&ca, leaf_params(&[])), Err(PeerError::Names { uris: 0 }));
    assert_eq!(judge(&ca, leaf_params(&[WEB, WEB])), Err(PeerError::Names { uris: 2 }));
    let many = vec![WEB; 300];
    assert_eq!(judge(&ca, leaf_params(&many)), Err(PeerError::Names { uris: 300 }));
    for bad in ["spiffe://cluster.local", "https://cluster.local/ns/default/sa/web", "spiffe://cluster.local/a//b"] {
        assert!(matches!(judge(&ca, leaf_params(&[bad])), Err(PeerError::Id(_))), "{bad}");
    }
}

#[test]
fn a_long_name_is_read_to_its_end() {
    let long = format!("spiffe://cluster.local/ns/default/sa/{}", "a".repeat(1900));
    assert_eq!(judge(&TestCa::new(), leaf_params(&[&long])).unwrap().to_string(), long);
}

#[test]
fn a_dns_name_beside_the_uri_is_no_second_name() {
    let dns = rcgen::SanType::DnsName("web.example".try_into().unwrap());
    assert_eq!(spoilt(|params| params.subject_alt_names.push(dns)).unwrap(), workload("web"));
}

#[test]
fn a_ca_is_no_workload() {
    let refused = spoilt(|params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    });
    assert_eq!(refused, Err(PeerError::Ca));
}

#[test]
fn a_leaf_signs_handshakes_and_nothing_else_and_serves_both_sides() {
    use rcgen::{ExtendedKeyUsagePurpose as Eku, KeyUsagePurpose as Ku};
    for usages in [vec![], vec![Ku::KeyEncipherment], vec![Ku::DigitalSignature, Ku::KeyCertSign]] {
        let refused = spoilt(|params| params.key_usages = usages.clone());
        assert!(matches!(refused, Err(PeerError::Usage(_))), "{usages:?}: {refused:?}");
    }
    for usages in [vec![], vec![Eku::ServerAuth], vec![Eku::ClientAuth], vec![Eku::Any], vec![Eku::CodeSigning]] {
        let refused = spoilt(|params| params.extended_key_usages = usages.clone());
        assert!(matches!(refused, Err(PeerError::Usage(_))), "{usages:?}: {refused:?}");
    }
}

#[test]
fn what_is_expired_says_since_when_and_what_is_early_blames_a_clock() {
    let ca = TestCa::new();
    let (bundle, leaf) = (ca.ca.bundle().unwrap(), ca.identity("web"));
    let late = leaf.not_after + Duration::from_secs(7200);
    let said = verify_peer(Some(&leaf.chain), &bundle, late).unwrap_err().to_string();
    assert!(said.starts_with("the peer's certificate expired at 2") && said.ends_with("Z, 2h 0m ago"), "{said}");
    // Seen before, and remembered as good: time is looked at every time.
    verify_peer(Some(&leaf.chain), &bundle, SystemTime::now()).unwrap();
    assert!(matches!(verify_peer(Some(&leaf.chain), &bundle, late), Err(PeerError::Expired { .. })));
    let early = leaf.not_before - Duration::from_secs(60);
    let said = verify_peer(Some(&leaf.chain), &bundle, early).unwrap_err().to_string();
    assert!(said.contains("is not valid before") && said.contains("clocks is off"), "{said}");
}

#[test]
fn an_expired_leaf_still_renews_for_thirty_days_and_does_nothing_else() {
    let ca = TestCa::new();
    let (bundle, leaf) = (ca.ca.bundle().unwrap(), ca.identity("web"));
    let chain = Some(leaf.chain.as_slice());
    let now = verify_peer_for_renewal(chain, &bundle, SystemTime::now()).unwrap();
    assert_eq!((now.id, now.expired_since), (workload("web"), None));
    let late = leaf.not_after + RENEWAL_GRACE;
    let renewing = verify_peer_for_renewal(chain, &bundle, late).unwrap();
    assert_eq!((renewing.id, renewing.expired_since), (workload("web"), Some(leaf.not_after)));
    assert!(matches!(verify_peer(chain, &bundle, late), Err(PeerError::Expired { .. })));
    let later = late + Duration::from_secs(1);
    assert!(matches!(verify_peer_for_renewal(chain, &bundle, later), Err(PeerError::Expired { .. })));
    let other = TestCa::new().ca.bundle().unwrap();
    assert!(matches!(verify_peer_for_renewal(chain, &other, late), Err(PeerError::UnknownRoot { .. })));
}

#[test]
fn one_altered_byte_anywhere_in_a_leaf_is_noticed() {
    let ca = TestCa::new();
    let (bundle, leaf) = (ca.ca.bundle().unwrap(), ca.identity("web"));
    verify_peer(Some(&leaf.chain), &bundle, SystemTime::now()).unwrap();
    for at in 0..leaf.chain[0].len() {
        let mut altered = leaf.chain[0].to_vec();
        altered[at] ^= 1;
        let chain = [altered.into(), leaf.chain[1].clone()];
        assert!(verify_peer(Some(&chain), &bundle, SystemTime::now()).is_err(), "byte {at}");
    }
}

#[test]
fn a_workload_cannot_sign_for_another() {
    let ca = TestCa::new();
    let (chain, key) = forge(&ca, leaf_params(&[WEB]));
    // The leaf as an issuer of its own.
    let issuer = rcgen::Issuer::from_ca_cert_der(&chain[0], key).unwrap();
    let own = rcgen::KeyPair::generate().unwrap();
    let forged = leaf_params(&["spiffe://cluster.local/ns/default/sa/admin"]).signed_by(&own, &issuer).unwrap();
    let forged = [forged.into(), chain[0].clone(), chain[1].clone()];
    assert!(verify_peer(Some(&forged), &ca.ca.bundle().unwrap(), SystemTime::now()).is_err());
}

#[test]
fn an_issuing_ca_cannot_make_another() {
    let ca = TestCa::new();
    let (issuer, issuer_der) = forger(&ca);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = leaf_params(&[]);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages.clear();
    params.distinguished_name.push(rcgen::DnType::CommonName, "rogue");
    let rogue = rcgen::CertifiedIssuer::signed_by(params, key, &issuer).unwrap();
    let leaf = leaf_params(&[WEB]).signed_by(&rcgen::KeyPair::generate().unwrap(), &rogue).unwrap();
    let chain = [leaf.into(), rogue.der().clone(), issuer_der];
    let refused = verify_peer(Some(&chain), &ca.ca.bundle().unwrap(), SystemTime::now()).unwrap_err();
    assert!(refused.to_string().contains("PathLen"), "{refused}");
}

#[test]
fn a_chain_beyond_measure_is_not_read() {
    let ca = TestCa::new();
    let (bundle, leaf, now) = (ca.ca.bundle().unwrap(), ca.identity("web"), SystemTime::now());
    assert_eq!(verify_peer(None, &bundle, now), Err(PeerError::NoCertificate));
    assert_eq!(verify_peer(Some(&[]), &bundle, now), Err(PeerError::NoCertificate));
    let long = vec![leaf.chain[0].clone(); 9];
    assert!(matches!(verify_peer(Some(&long), &bundle, now), Err(PeerError::TooLong { certificates: 9, .. })));
    let large = [leaf.chain[0].clone(), CertificateDer::from(vec![0x30; 40_000])];
    assert!(matches!(verify_peer(Some(&large), &bundle, now), Err(PeerError::TooLong { certificates: 2, .. })));
}

#[test]
fn what_a_stranger_calls_its_root_cannot_break_a_log_line() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = leaf_params(&[WEB]);
    let name = format!("it's \n\u{202e}\u{1b}[31m\0 {}", "x".repeat(5000));
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let chain = [CertificateDer::from(params.self_signed(&key).unwrap())];
    let bundle = TestCa::new().ca.bundle().unwrap();
    let said = verify_peer(Some(&chain), &bundle, SystemTime::now()).unwrap_err().to_string();
    assert!(said.contains("`CN=it's \\n\\u{202e}\\u{1b}[31m"), "{said}");
    assert!(said.len() < 1000 && said.chars().all(|c| c.is_ascii_graphic() || c == ' '), "{said}");
}

#[test]
fn a_bundle_holds_roots_and_says_what_is_no_root() {
    let ca = TestCa::new();
    let leaf = ca.identity("web");
    let said = TrustBundle::from_pem(&leaf.cert_pem()).unwrap_err().to_string();
    assert!(said.contains("is no CA certificate"), "{said}");
    let said = TrustBundle::from_pem(&leaf.key_pem()).unwrap_err().to_string();
    assert!(said.contains("it has a PRIVATE KEY"), "{said}");
    let twice = ca.ca.bundle().unwrap().to_pem().repeat(2);
    assert_eq!(TrustBundle::from_pem(&twice).unwrap().roots().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_make_verification_panic(garbage in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..700, flips in prop::collection::vec((0usize..700, any::<u8>()), 0..6)) {
        thread_local!(static CA: (TestCa, Vec<CertificateDer<'static>>) = {
            let ca = TestCa::new();
            let chain = ca.identity("web").chain;
            (ca, chain)
        });
        CA.with(|(ca, chain)| {
            let bundle = ca.ca.bundle().unwrap();
            let mut spoilt = chain[0].to_vec();
            spoilt.truncate(cut.max(1));
            let length = spoilt.len();
            for (at, byte) in flips {
                spoilt[at % length] ^= byte;
            }
            let now = SystemTime::now();
            for last in [garbage.clone(), chain[1].to_vec()] {
                for first in [garbage.clone(), spoilt.clone()] {
                    let whole = first == *chain[0] && last == *chain[1];
                    let chain = [CertificateDer::from(first), CertificateDer::from(last.clone())];
                    let said = verify_peer(Some(&chain), &bundle, now).map_err(|e| e.to_string());
                    assert_eq!(said.is_ok(), whole);
                    let _ = verify_peer_for_renewal(Some(&chain), &bundle, now);
                }
            }
        });
    }
}
