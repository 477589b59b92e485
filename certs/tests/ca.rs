//! What the CA signs, refuses, records and rotates.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::{TestCa, has, leaf_params, workload};
use sheetbend_certs::{
    Ca, CaError, CertFacts, Csr, CsrError, DEFAULT_TTL, Identity, IssueRequest, KeyAndCsr, PeerError, TrustBundle,
    TrustDomain, verify_peer,
};

const DAY: Duration = Duration::from_secs(86_400);

fn names(chain: &[rustls::pki_types::CertificateDer<'static>], bundle: &TrustBundle, at: SystemTime) -> String {
    verify_peer(Some(chain), bundle, at).unwrap().to_string()
}

/// `openssl verify`, as strictly as it can.
fn openssl_verify(ca: &TestCa, bundle: &TrustBundle, identity: &Identity) {
    let file = |name: &str, text: String| {
        let path = ca.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (roots, chain) = (file("roots.pem", bundle.to_pem()), file("chain.pem", identity.cert_pem()));
    for purpose in ["sslserver", "sslclient"] {
        let mut openssl = Command::new("openssl");
        openssl.args(["verify", "-x509_strict", "-purpose", purpose, "-no-CApath", "-no-CAstore", "-CAfile"]);
        let output = openssl.arg(&roots).arg("-untrusted").arg(&chain).arg(&chain).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains(": OK"), "{purpose}: {said}");
    }
}

#[test]
fn openssl_accepts_what_we_issue_before_while_and_after_roots_rotate() {
    if !has("openssl", "version") {
        return;
    }
    let ca = TestCa::new();
    let old_bundle = ca.ca.bundle().unwrap();
    openssl_verify(&ca, &old_bundle, &ca.identity("web"));
    let both = ca.ca.rotate(SystemTime::now()).unwrap();
    let while_rotating = ca.identity("web");
    openssl_verify(&ca, &both, &while_rotating);
    openssl_verify(&ca, &old_bundle, &while_rotating);
    ca.ca.drop_old().unwrap();
    openssl_verify(&ca, &ca.ca.bundle().unwrap(), &while_rotating);
    openssl_verify(&ca, &ca.ca.bundle().unwrap(), &ca.identity("web"));
}

#[test]
fn at_no_moment_of_a_rotation_does_a_proxy_meet_a_leaf_that_it_cannot_verify() {
    let (ca, now) = (TestCa::new(), SystemTime::now());
    let (old_bundle, old_leaf) = (ca.ca.bundle().unwrap(), ca.identity("old"));
    let both = ca.ca.rotate(now).unwrap();
    let new_leaf = ca.identity("new");
    assert_eq!(both.roots().len(), 2);
    assert_eq!(names(&new_leaf.chain, &old_bundle, now), workload("new").to_string(), "a proxy without the new root");
    for leaf in [&old_leaf, &new_leaf] {
        assert_eq!(names(&leaf.chain, &both, now), leaf.id.to_string());
    }
    ca.ca.drop_old().unwrap();
    let new_bundle = ca.ca.bundle().unwrap();
    assert_eq!(new_bundle.roots().len(), 1);
    assert_eq!(names(&new_leaf.chain, &new_bundle, now), workload("new").to_string());
    assert_eq!(ca.identity("later").chain.len(), 2, "no cross-signed root is carried any more");
    let refused = verify_peer(Some(&old_leaf.chain), &new_bundle, now).unwrap_err();
    let (theirs, ours) = (old_bundle.roots()[0].subject(), new_bundle.roots()[0].subject());
    assert_eq!(refused.to_string(), format!("the peer's root `{theirs}` is not in our bundle [`{ours}`]"));
}

#[test]
fn another_process_sees_a_rotation_at_its_next_issue() {
    let ca = TestCa::new();
    let other = Ca::open(ca.ca.dir(), SystemTime::now()).unwrap();
    ca.ca.rotate(SystemTime::now()).unwrap();
    assert_eq!(other.bundle().unwrap().roots().len(), 2);
    assert_eq!(other.active_root().unwrap().sha256(), ca.ca.active_root().unwrap().sha256());
    other.drop_old().unwrap();
    assert_eq!(ca.ca.bundle().unwrap().roots().len(), 1);
    assert!(matches!(ca.ca.drop_old(), Err(CaError::NothingToDrop { .. })));
}

#[test]
fn the_keys_of_a_dropped_root_are_gone_and_the_rest_stays() {
    let ca = TestCa::new();
    let keys = || {
        let files = std::fs::read_dir(ca.ca.dir()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|e| e == "key")).collect::<Vec<_>>()
    };
    let before = keys();
    ca.ca.rotate(SystemTime::now()).unwrap();
    assert_eq!(keys().len(), 4);
    ca.ca.drop_old().unwrap();
    let after = keys();
    assert_eq!(after.len(), 2);
    assert!(before.iter().all(|key| !after.contains(key)));
    assert!(after.iter().all(|key| key.metadata().unwrap().permissions().mode() & 0o777 == 0o600));
    Ca::open(ca.ca.dir(), SystemTime::now()).unwrap();
}

#[test]
fn a_ca_is_never_overwritten() {
    let ca = TestCa::new();
    let root = ca.ca.active_root().unwrap().sha256();
    let again = Ca::init(ca.ca.dir(), &TrustDomain::default(), SystemTime::now());
    assert!(matches!(again, Err(CaError::Exists { .. })));
    assert_eq!(Ca::open(ca.ca.dir(), SystemTime::now()).unwrap().active_root().unwrap().sha256(), root);
}

#[test]
fn a_directory_that_others_can_write_to_gets_no_ca() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = Ca::init(dir.path(), &TrustDomain::default(), SystemTime::now()).unwrap_err().to_string();
    assert!(refused.contains("others can write to") && refused.contains("chmod go-w"), "{refused}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn keys_of_others_in_the_directory_stay() {
    let ca = TestCa::new();
    let theirs = ca.ca.dir().join("token.key");
    std::fs::write(&theirs, "theirs").unwrap();
    ca.ca.rotate(SystemTime::now()).unwrap();
    ca.ca.drop_old().unwrap();
    assert_eq!(std::fs::read_to_string(&theirs).unwrap(), "theirs");
}

#[test]
fn the_names_that_a_csr_asks_for_are_ignored() {
    let (ca, now) = (TestCa::new(), SystemTime::now());
    let key = rcgen::KeyPair::generate().unwrap();
    let mut wishes = leaf_params(&["spiffe://cluster.local/ns/default/sa/admin", "spiffe://cluster.local/x"]);
    wishes.subject_alt_names.push(rcgen::SanType::DnsName("admin.example".try_into().unwrap()));
    wishes.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    wishes.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    wishes.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
    let csr = Csr::parse(wishes.serialize_request(&key).unwrap().der()).unwrap();
    let issued = ca.ca.issue(&IssueRequest::new(workload("web"), csr), now).unwrap();
    let leaf = CertFacts::of(&issued.chain[0]).unwrap();
    assert_eq!(leaf.uris, ["spiffe://cluster.local/ns/default/sa/web"]);
    assert_eq!((leaf.subject.as_str(), leaf.dns.len(), leaf.is_ca), ("", 0, false));
    assert_eq!(names(&issued.chain, &ca.ca.bundle().unwrap(), now), workload("web").to_string());
}

#[test]
fn a_request_that_was_altered_or_is_too_weak_or_is_none_has_its_own_words() {
    let good = KeyAndCsr::generate().unwrap();
    let mut altered = good.csr_der().to_vec();
    let last = altered.len() - 1;
    altered[last] ^= 1;
    assert_eq!(Csr::parse(&altered).unwrap_err(), CsrError::Signature);
    let mut trailing = good.csr_der().to_vec();
    trailing.push(0);
    assert!(matches!(Csr::parse(&trailing), Err(CsrError::NotARequest(_))));
    assert!(matches!(Csr::parse(b""), Err(CsrError::NotARequest(_))));
    assert!(matches!(Csr::parse(&[0x30; 20_000]), Err(CsrError::TooLarge(20_000))));
    let key = good.key_pem();
    assert!(Csr::parse(key.as_bytes()).unwrap_err().to_string().contains("this PEM holds a PRIVATE KEY"));
    assert_eq!(
        Csr::parse(good.csr_pem().as_bytes()).unwrap().key_sha256(),
        Csr::parse(good.csr_der()).unwrap().key_sha256()
    );
}

#[test]
fn keys_that_other_proxies_send_are_signed_too() {
    let (ca, now) = (TestCa::new(), SystemTime::now());
    for algorithm in [&rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        let issued = ca.ca.issue(&IssueRequest::new(workload("web"), Csr::parse(csr.der()).unwrap()), now).unwrap();
        names(&issued.chain, &ca.ca.bundle().unwrap(), now);
    }
}

#[test]
fn what_cannot_be_recorded_is_not_signed() {
    let ca = TestCa::new();
    let log = ca.ca.dir().join("issued.log");
    ca.identity("web");
    let recorded = std::fs::read_to_string(&log).unwrap();
    let entry: serde_json::Value = recorded.lines().next().unwrap().parse().unwrap();
    assert_eq!(entry["id"], "spiffe://cluster.local/ns/default/sa/web");
    for field in ["serial", "not_after", "key_sha256", "issuer", "at"] {
        assert!(entry[field].as_str().is_some_and(|value| !value.is_empty()), "{field}");
    }
    std::fs::remove_file(&log).unwrap();
    std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    let csr = Csr::parse(KeyAndCsr::generate().unwrap().csr_der()).unwrap();
    let refused = ca.ca.issue(&IssueRequest::new(workload("web"), csr), SystemTime::now()).unwrap_err().to_string();
    assert!(refused.contains("issued.log") && refused.contains("nothing was signed"), "{refused}");
}

#[test]
fn a_leaf_lives_a_day_from_two_minutes_ago_and_never_longer_than_its_issuer() {
    let made = SystemTime::now() - 3 * 365 * DAY;
    let ca = TestCa::at(made);
    let leaf = ca.identity_at("web", made, DEFAULT_TTL);
    let second = Duration::from_secs(1); // Certificates count in whole seconds.
    assert!(
        leaf.not_before <= made - Duration::from_secs(120)
            && leaf.not_before + second > made - Duration::from_secs(121)
    );
    assert!(leaf.not_after <= made + DAY && leaf.not_after + second > made + DAY - second);

    // Ten years on, less half a day: the root's end is everybody's end.
    let late = made + 3650 * DAY - DAY / 2;
    let leaf = ca.identity_at("web", late, DEFAULT_TTL);
    assert_eq!(leaf.not_after, ca.ca.active_root().unwrap().not_after());
    let csr = Csr::parse(KeyAndCsr::generate().unwrap().csr_der()).unwrap();
    let request = IssueRequest { ttl: 2 * DAY, ..IssueRequest::new(workload("web"), csr) };
    assert!(matches!(ca.ca.issue(&request, late), Err(CaError::TtlTooLong { .. })));
    assert!(matches!(ca.ca.issue(&request, late + DAY), Err(CaError::Expired { .. })));
    assert!(matches!(ca.ca.issue(&request, made - DAY), Err(CaError::NotYetValid { .. })));
}

#[test]
fn the_issuing_ca_makes_way_for_a_new_one_under_the_same_root() {
    let made = SystemTime::now() - 365 * DAY;
    let ca = TestCa::at(made);
    let issuer = |at: SystemTime| ca.identity_at("web", at, DEFAULT_TTL).chain[1].clone();
    let first = issuer(made);
    assert_eq!(issuer(made + 200 * DAY), first);
    let second = issuer(made + 250 * DAY);
    assert_ne!(second, first);
    assert_eq!(issuer(made + 260 * DAY), second);
    let later = ca.identity_at("web", made + 364 * DAY, DEFAULT_TTL);
    names(&later.chain, &ca.ca.bundle().unwrap(), made + 364 * DAY);
    assert_eq!(ca.ca.bundle().unwrap().roots().len(), 1);
}

#[test]
fn many_threads_and_processes_issue_at_once() {
    let ca = TestCa::new();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let own = Ca::open(ca.ca.dir(), SystemTime::now()).unwrap();
                for _ in 0..10 {
                    let csr = Csr::parse(KeyAndCsr::generate().unwrap().csr_der()).unwrap();
                    own.issue(&IssueRequest::new(workload("web"), csr), SystemTime::now()).unwrap();
                }
            });
        }
        ca.ca.rotate(SystemTime::now()).unwrap();
    });
    let log = std::fs::read_to_string(ca.ca.dir().join("issued.log")).unwrap();
    let serials: std::collections::HashSet<_> = log
        .lines()
        .map(|line| line.parse::<serde_json::Value>().unwrap()["serial"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(serials.len(), 40, "each on a line of its own, each with a serial of its own");
}

#[test]
fn a_directory_that_lost_a_file_or_holds_a_wrong_key_says_which() {
    let ca = TestCa::new();
    let other = TestCa::new();
    let dir = ca.ca.dir();
    let find = |dir: &std::path::Path, prefix: &str, suffix: &str| {
        let mut files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        files
            .find(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                name.starts_with(prefix) && name.ends_with(suffix)
            })
            .unwrap()
    };
    let issuing = find(dir, "issuing-", ".key");
    std::fs::copy(find(other.ca.dir(), "issuing-", ".key"), &issuing).unwrap();
    let refused = Ca::open(dir, SystemTime::now()).unwrap_err().to_string();
    assert!(
        refused.contains(&*issuing.to_string_lossy()) && refused.contains("the key is not the certificate's"),
        "{refused}"
    );
    std::fs::remove_file(&issuing).unwrap();
    let refused = Ca::open(dir, SystemTime::now()).unwrap_err().to_string();
    assert!(refused.contains("cannot read") && refused.contains(&*issuing.to_string_lossy()), "{refused}");
    std::fs::write(dir.join("ca.json"), "{").unwrap();
    let refused = Ca::open(dir, SystemTime::now()).unwrap_err().to_string();
    assert!(refused.contains("ca.json is damaged"), "{refused}");
}

#[test]
fn a_bundle_that_a_crash_left_behind_is_mended() {
    let ca = TestCa::new();
    let file = ca.ca.dir().join("bundle.pem");
    let stale = std::fs::read(&file).unwrap();
    let both = ca.ca.rotate(SystemTime::now()).unwrap();
    std::fs::write(&file, stale).unwrap();
    Ca::open(ca.ca.dir(), SystemTime::now()).unwrap();
    assert_eq!(TrustBundle::from_pem(&std::fs::read_to_string(&file).unwrap()).unwrap(), *both);
}

#[test]
fn a_name_of_another_trust_domain_is_not_signed() {
    let ca = TestCa::new();
    let csr = Csr::parse(KeyAndCsr::generate().unwrap().csr_der()).unwrap();
    let request = IssueRequest::new("spiffe://elsewhere/ns/a/sa/b".parse().unwrap(), csr);
    assert!(matches!(ca.ca.issue(&request, SystemTime::now()), Err(CaError::OtherTrustDomain { .. })));
}

#[test]
fn another_ca_of_the_same_name_is_another_ca() {
    let (ours, theirs) = (TestCa::new(), TestCa::new());
    let peer = theirs.identity("web");
    let refused = verify_peer(Some(&peer.chain), &ours.ca.bundle().unwrap(), SystemTime::now()).unwrap_err();
    assert!(matches!(refused, PeerError::UnknownRoot { .. }), "{refused}");
}
