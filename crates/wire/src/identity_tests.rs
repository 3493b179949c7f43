//! Identities on the disk: made, read again, renewed, replaced, damaged.

use super::*;

fn made() -> (tempfile::TempDir, Identity) {
    let dir = tempfile::tempdir().unwrap();
    let identity = Identity::create(dir.path(), "site-1").unwrap();
    (dir, identity)
}

#[test]
fn an_identity_is_made_once_and_read_again() {
    let (dir, identity) = made();
    let mode = std::fs::metadata(dir.path().join(KEY_FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(Identity::load(dir.path()).unwrap().fingerprint(), identity.fingerprint());
    let error = Identity::create(dir.path(), "site-1").unwrap_err();
    assert!(matches!(error, IdentityError::Exists(_)), "{error}");
    assert_ne!(made().1.fingerprint(), identity.fingerprint());
}

#[test]
fn a_fingerprint_is_what_other_tools_compute() {
    let (dir, identity) = made();
    let der = CertificateDer::from_pem_file(dir.path().join(CERTIFICATE_FILE)).unwrap();
    let ours = aws_lc_digest(&der);
    assert_eq!(identity.fingerprint().to_string(), ours);
    assert_eq!(ours.parse::<Fingerprint>().unwrap(), identity.fingerprint());
    for bad in ["", "zz", &ours[1..], &format!("{ours}0")] {
        assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
    }
}

/// SHA-256 by the library that TLS uses, not the one that makes fingerprints.
fn aws_lc_digest(der: &[u8]) -> String {
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    hex::encode(suite.common.hash_provider.hash(der).as_ref())
}

#[test]
fn a_key_that_others_can_read_is_not_used() {
    let (dir, _) = made();
    let key = dir.path().join(KEY_FILE);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = Identity::load(dir.path()).unwrap_err();
    assert!(matches!(error, IdentityError::Exposed { mode: 0o640, .. }), "{error}");
    assert!(error.to_string().contains("chmod 600"));
}

#[test]
fn a_renewed_certificate_is_another_one_for_the_same_key() {
    let (dir, identity) = made();
    let (clone, before) = (identity.clone(), identity.shown());
    let now = Timestamp::from(SystemTime::now());
    let left = before.left(now).unwrap();
    assert!(before.is_self_made && left > LIFETIME - BACKDATED * 2 && left <= LIFETIME, "{left:?}");
    identity.renew(dir.path(), "site-1").unwrap();
    let after = identity.shown();
    assert_eq!(after.key, before.key);
    assert_ne!(after.fingerprint, before.fingerprint);
    assert_eq!(clone.fingerprint(), after.fingerprint, "clones show it too");
    assert_eq!(Identity::load(dir.path()).unwrap().fingerprint(), after.fingerprint);
}

#[test]
fn a_new_key_takes_its_place_whole_wherever_it_was_cut_off() {
    let (dir, identity) = made();
    let before = identity.shown();
    let next = Identity::prepare_new(dir.path(), "site-1").unwrap();
    assert_ne!(next.shown().key, before.key);
    let loaded = || Identity::load(dir.path()).unwrap().shown().key;
    assert_eq!((identity.shown().key, loaded()), (before.key, before.key), "nothing shows it yet");
    // Cut off between the two names.
    std::fs::rename(dir.path().join(NEXT_KEY_FILE), dir.path().join(KEY_FILE)).unwrap();
    assert_eq!(loaded(), next.shown().key);
    assert_eq!(loaded(), next.shown().key, "and so it stays");
    let again = Identity::prepare_new(dir.path(), "site-1").unwrap();
    identity.adopt_next(dir.path()).unwrap();
    assert_eq!((identity.shown().key, loaded()), (again.shown().key, again.shown().key));
    let mode = std::fs::metadata(dir.path().join(KEY_FILE)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn files_that_do_not_go_together_are_not_prepared() {
    let ((dir, _), (other, _)) = (made(), made());
    let (key, certificate) = (other.path().join(KEY_FILE), dir.path().join(CERTIFICATE_FILE));
    let error = Identity::prepare_from(dir.path(), &certificate, &key).unwrap_err();
    assert!(error.to_string().contains("does not go with the key"), "{error}");
    assert!(!dir.path().join(NEXT_KEY_FILE).exists());
    let certificate = other.path().join(CERTIFICATE_FILE);
    let next = Identity::prepare_from(dir.path(), &certificate, &key).unwrap();
    assert_eq!(next.fingerprint(), Identity::load(other.path()).unwrap().fingerprint());
}

#[test]
fn damage_is_named() {
    let (dir, _) = made();
    let (other, _) = made();
    std::fs::copy(other.path().join(CERTIFICATE_FILE), dir.path().join(CERTIFICATE_FILE)).unwrap();
    let error = Identity::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("does not go with the key"), "{error}");
    std::fs::write(dir.path().join(KEY_FILE), b"nothing").unwrap();
    let error = Identity::load(dir.path()).unwrap_err();
    assert!(matches!(&error, IdentityError::Damaged { path, .. } if path.ends_with(KEY_FILE)), "{error}");
    std::fs::remove_file(dir.path().join(KEY_FILE)).unwrap();
    assert!(matches!(Identity::load(dir.path()), Err(IdentityError::File { .. })));
}
