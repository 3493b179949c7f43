//! A site's identity: a self-signed certificate and its key. Who somebody is, is the certificate's
//! fingerprint; names and dates in it mean nothing.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use steps::durable_step;

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";

/// The SHA-256 of a certificate's DER: who a site is. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(Sha256::digest(certificate.as_ref()).into())
    }

    /// The fingerprint made of these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a fingerprint: 64 hexadecimal digits are expected")]
pub struct FingerprintError(String);

impl FromStr for Fingerprint {
    type Err = FingerprintError;
    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let mut bytes = [0; 32];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) => Ok(Self(bytes)),
            Err(_) => Err(FingerprintError(text.chars().take(80).collect())),
        }
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = FingerprintError;
    fn try_from(text: String) -> Result<Self, FingerprintError> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

/// Why an identity could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is one already: making a new one would cut this site off from its peers.
    #[error("there is an identity already: {}; a new one would be unknown to every peer", .0.display())]
    Exists(PathBuf),
    /// A file of it could not be worked with.
    #[error("cannot {what} {}: {source}", .path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Others than the owner can read the key.
    #[error("the key {} can be read by others (mode {mode:o}): run 'chmod 600' on it; if somebody may have copied it, make a new identity", .path.display())]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file is not what it should be, or the two do not belong together.
    #[error("{} is not usable: {why}; restore it from a copy of the site's directory", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No certificate could be made for this name.
    #[error("no certificate could be made for the site {name:?}: {why}")]
    Make {
        /// The site's name.
        name: String,
        /// Why not.
        why: String,
    },
}

/// A site's certificate and key.
#[derive(Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes an identity in `dir`: `identity.key` (which only the owner can read) and `identity.crt`.
    pub fn create(dir: &Path, site_name: &str) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        if let Some(path) = [&key_path, &certificate_path].into_iter().find(|path| path.exists()) {
            return Err(IdentityError::Exists(path.clone()));
        }
        let (key, certificate) = make(site_name)
            .map_err(|error| IdentityError::Make { name: site_name.to_owned(), why: error.to_string() })?;
        durable_step("wire::identity::made");
        write_new(&key_path, key.as_bytes(), 0o600)?;
        durable_step("wire::identity::key-written");
        write_new(&certificate_path, certificate.as_bytes(), 0o644)?;
        durable_step("wire::identity::certificate-written");
        std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| IdentityError::File {
            what: "sync",
            path: dir.to_owned(),
            source,
        })?;
        durable_step("wire::identity::settled");
        Self::load(dir)
    }

    /// Puts aside what lies in `dir` of an identity that was not made to its end, so that one can be made.
    pub fn put_aside(dir: &Path) -> Result<(), IdentityError> {
        for name in [KEY_FILE, CERTIFICATE_FILE] {
            let path = dir.join(name);
            match std::fs::rename(&path, dir.join(format!("{name}.unfinished"))) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(IdentityError::File { what: "put aside", path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads the identity in `dir`.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        let key_pem = read_private(&key_path)?;
        let certificate_pem = read(&certificate_path)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|error| IdentityError::Damaged { path: key_path, why: error.to_string() })?;
        let damaged = |why: String| IdentityError::Damaged { path: certificate_path.clone(), why };
        let certificate =
            CertificateDer::from_pem_slice(&certificate_pem).map_err(|error| damaged(error.to_string()))?;
        let fingerprint = Fingerprint::of(&certificate);
        // Also checks that the key is the certificate's.
        let key = CertifiedKey::from_der(vec![certificate], key, &provider())
            .map_err(|error| damaged(format!("it does not go with the key beside it ({error})")))?;
        Ok(Self { key: Arc::new(key), fingerprint })
    }

    /// The certificate's fingerprint.
    #[must_use]
    pub const fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(crate) fn key(&self) -> Arc<CertifiedKey> {
        self.key.clone()
    }
}

/// The one source of cryptography; given to rustls explicitly, so that no other crate's choice matters.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::OnceLock<Arc<CryptoProvider>> = std::sync::OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

/// A new key and its certificate, both as PEM.
fn make(site_name: &str) -> Result<(String, String), rcgen::Error> {
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("Afterimage site {site_name}"));
    let certificate = params.self_signed(&key)?;
    Ok((key.serialize_pem(), certificate.pem()))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| IdentityError::File { what: "write", path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| IdentityError::File { what: "read", path: path.to_owned(), source })
}

fn read_private(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let metadata = std::fs::metadata(path).map_err(|source| IdentityError::File {
        what: "read",
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    read(path)
}

#[cfg(test)]
mod tests {
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
}
