//! One key names the next: the proof that whoever announces a key holds it.
//!
//! The announcement comes over a connection on which the key of now was shown, and is signed by the next one, over both.
//! So nobody announces a key that he has only seen, be it another peer's: what was signed to follow one key follows no
//! other.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::SignatureScheme;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::certificate::{KeyId, Shown, public_key};
use crate::error::{Error, Result};
use crate::identity::{Identity, provider};

/// What is signed begins with this, so that it can be taken for nothing else.
const PURPOSE: &[u8] = b"afterimage next key v1\0";

/// A peer's next key, and the proof that it holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NextKey {
    /// A certificate for the key: its DER, in base64.
    certificate: String,
    /// How it is signed, as TLS numbers it.
    scheme: u16,
    /// The signature, in base64.
    signature: String,
}

impl NextKey {
    /// The announcement that `next` follows the key `before`.
    pub fn of(next: &Identity, before: KeyId) -> Result<Self> {
        let (key, shown) = (next.key(), next.shown());
        let schemes: Vec<SignatureScheme> =
            provider().signature_verification_algorithms.mapping.iter().map(|(scheme, _)| *scheme).collect();
        let unusable = |why: String| Error::protocol(format!("the new key cannot sign: {why}"));
        let signer =
            key.key.choose_scheme(&schemes).ok_or_else(|| unusable("its kind is not known".into()))?;
        let signature =
            signer.sign(&message(shown.key, before)).map_err(|error| unusable(error.to_string()))?;
        let certificate = shown.chain.first().map(|certificate| STANDARD.encode(certificate));
        Ok(Self {
            certificate: certificate.unwrap_or_default(),
            scheme: signer.scheme().into(),
            signature: STANDARD.encode(signature),
        })
    }

    /// The key that follows `before`, if that is proved.
    #[must_use]
    pub fn prove(&self, before: KeyId) -> Option<KeyId> {
        let certificate = CertificateDer::from(STANDARD.decode(&self.certificate).ok()?);
        let signature = STANDARD.decode(&self.signature).ok()?;
        let key = Shown::of(std::slice::from_ref(&certificate))?.key;
        let (algorithm, bits) = public_key(&certificate)?;
        let scheme = SignatureScheme::from(self.scheme);
        let known = provider().signature_verification_algorithms.mapping;
        let (_, algorithms) = known.iter().find(|(known, _)| *known == scheme)?;
        let message = message(key, before);
        let signed = algorithms
            .iter()
            .filter(|known| known.public_key_alg_id().as_ref() == algorithm)
            .any(|known| known.verify_signature(bits, &message, &signature).is_ok());
        signed.then_some(key)
    }
}

fn message(key: KeyId, before: KeyId) -> Vec<u8> {
    [PURPOSE, key.as_bytes(), before.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        Identity::create(tempfile::tempdir().unwrap().path(), name).unwrap()
    }

    #[test]
    fn only_the_holder_announces_a_key_and_only_after_his_own() {
        let [now, next, other] = ["now", "next", "other"].map(identity);
        let announced = NextKey::of(&next, now.shown().key).unwrap();
        assert_eq!(announced.prove(now.shown().key), Some(next.shown().key));
        // Somebody else repeats it as his own; or names the key with a signature that is not its own.
        assert_eq!(announced.prove(other.shown().key), None);
        let theirs = NextKey::of(&other, now.shown().key).unwrap();
        let mixed = NextKey { certificate: announced.certificate.clone(), ..theirs };
        assert_eq!(mixed.prove(now.shown().key), None);
        for scheme in [0, 0x0804, 0xffff] {
            assert_eq!(NextKey { scheme, ..announced.clone() }.prove(now.shown().key), None);
        }
        for certificate in ["", "!", "AAAA"] {
            let damaged = NextKey { certificate: certificate.into(), ..announced.clone() };
            assert_eq!(damaged.prove(now.shown().key), None);
        }
    }

    #[test]
    fn keys_of_other_kinds_sign_too() {
        let now = identity("now");
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let certificate = rcgen::CertificateParams::default().self_signed(&key).unwrap();
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("identity.crt"), certificate.pem()).unwrap();
            let path = dir.path().join("identity.key");
            std::fs::write(&path, key.serialize_pem()).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            let next = Identity::load(dir.path()).unwrap();
            let announced = NextKey::of(&next, now.shown().key).unwrap();
            assert_eq!(announced.prove(now.shown().key), Some(next.shown().key));
        }
    }
}
