//! A site's identity: a key, and a certificate for it, which the site makes itself or has from a CA of its people's.
//!
//! A certificate that the site has made is made anew over the same key before it ends. Another key is prepared beside the
//! one in use, made known to the peers, and only then put into its place:
//!
//! ```text
//! identity.next.key, identity.next.crt written ─▶ announced ─▶ key renamed ─▶ certificate renamed ─▶ shown from now on
//! ```

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use model::Timestamp;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use steps::durable_step;

use crate::certificate::{Shown, date};

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";
const NEXT_KEY_FILE: &str = "identity.next.key";
const NEXT_CERTIFICATE_FILE: &str = "identity.next.crt";
const RENEWED_FILE: &str = "identity.renewed.crt";

/// How long a certificate of the site's own is good for.
const LIFETIME: Duration = Duration::from_secs(730 * 86_400);
/// It is made anew when less of that is left: a site that is down for months comes back in time.
pub const RENEW_BEFORE: Duration = Duration::from_secs(180 * 86_400);
/// It is good from a day ago on: clocks differ.
const BACKDATED: Duration = Duration::from_secs(86_400);

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
    /// The certificate is not the site's own to make anew.
    #[error(
        "the certificate of this site was issued by a CA: get a new one from it, and install it with 'afterimage identity use --cert FILE --key FILE'"
    )]
    Issued,
    /// No certificate could be made for this name.
    #[error("no certificate could be made for the site {name:?}: {why}")]
    Make {
        /// The site's name.
        name: String,
        /// Why not.
        why: String,
    },
}

/// A site's certificate and key. Clones are the same identity: what one of them is changed to, all show on their next
/// connections.
#[derive(Clone)]
pub struct Identity {
    current: Arc<RwLock<Current>>,
}

#[derive(Clone)]
struct Current {
    key: Arc<CertifiedKey>,
    shown: Arc<Shown>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes an identity in `dir`: `identity.key` (which only the owner can read) and `identity.crt`.
    pub fn create(dir: &Path, site_name: &str) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (dir.join(KEY_FILE), dir.join(CERTIFICATE_FILE));
        if let Some(path) = [&key_path, &certificate_path].into_iter().find(|path| path.exists()) {
            return Err(IdentityError::Exists(path.clone()));
        }
        let made = make_key().and_then(|key| Ok((key.serialize_pem(), make_certificate(site_name, &key)?)));
        let (key, certificate) = made.map_err(|error| not_made(site_name, &error))?;
        durable_step("wire::identity::made");
        write_new(&key_path, key.as_bytes(), 0o600)?;
        durable_step("wire::identity::key-written");
        write_new(&certificate_path, certificate.as_bytes(), 0o644)?;
        durable_step("wire::identity::certificate-written");
        sync_dir(dir)?;
        durable_step("wire::identity::settled");
        Self::load(dir)
    }

    /// Makes a new certificate over the same key, good from now on; each connection from now on shows it.
    pub fn renew(&self, dir: &Path, site_name: &str) -> Result<(), IdentityError> {
        if !self.shown().is_self_made {
            return Err(IdentityError::Issued);
        }
        let key_path = dir.join(KEY_FILE);
        let key = String::from_utf8(read_private(&key_path)?).map_err(|error| error.to_string());
        let key = key.and_then(|pem| rcgen::KeyPair::from_pem(&pem).map_err(|error| error.to_string()));
        let key = key.map_err(|why| IdentityError::Damaged { path: key_path, why })?;
        let certificate = make_certificate(site_name, &key).map_err(|error| not_made(site_name, &error))?;
        let (renewed, path) = (dir.join(RENEWED_FILE), dir.join(CERTIFICATE_FILE));
        remove(&renewed)?;
        durable_step("wire::identity::renewing");
        write_new(&renewed, certificate.as_bytes(), 0o644)?;
        durable_step("wire::identity::renewed-written");
        rename(&renewed, &path)?;
        durable_step("wire::identity::renewed");
        sync_dir(dir)?;
        durable_step("wire::identity::renewed-settled");
        self.become_what_lies_in(dir)
    }

    /// Prepares another key with a certificate that the site makes for it; nothing shows it before [`Self::adopt_next`].
    pub fn prepare_new(dir: &Path, site_name: &str) -> Result<Self, IdentityError> {
        let made = make_key().and_then(|key| Ok((key.serialize_pem(), make_certificate(site_name, &key)?)));
        let (key, certificate) = made.map_err(|error| not_made(site_name, &error))?;
        Self::prepare(dir, key.as_bytes(), certificate.as_bytes())
    }

    /// The same with files that people have: a certificate, with those between it and the CA after it, and its key.
    pub fn prepare_from(dir: &Path, certificate: &Path, key: &Path) -> Result<Self, IdentityError> {
        let (key_pem, certificate_pem) = (read_private(key)?, read(certificate)?);
        load_pair(&key_pem, &certificate_pem, key, certificate)?; // before anything is written
        Self::prepare(dir, &key_pem, &certificate_pem)
    }

    fn prepare(dir: &Path, key: &[u8], certificate: &[u8]) -> Result<Self, IdentityError> {
        let (key_path, certificate_path) = (dir.join(NEXT_KEY_FILE), dir.join(NEXT_CERTIFICATE_FILE));
        remove(&certificate_path)?;
        remove(&key_path)?;
        durable_step("wire::identity::next-preparing");
        write_new(&key_path, key, 0o600)?;
        durable_step("wire::identity::next-key-written");
        write_new(&certificate_path, certificate, 0o644)?;
        durable_step("wire::identity::next-certificate-written");
        sync_dir(dir)?;
        durable_step("wire::identity::next-prepared");
        let current = load_pair(key, certificate, &key_path, &certificate_path)?;
        Ok(Self { current: Arc::new(RwLock::new(current)) })
    }

    /// Puts the key and certificate that were prepared into the place of those in use; each connection from now on shows
    /// them.
    pub fn adopt_next(&self, dir: &Path) -> Result<(), IdentityError> {
        durable_step("wire::identity::next-adopting");
        rename(&dir.join(NEXT_KEY_FILE), &dir.join(KEY_FILE))?;
        durable_step("wire::identity::next-key-adopted");
        // Never the certificate without its key: the other way round, the next start brings them together.
        sync_dir(dir)?;
        durable_step("wire::identity::next-key-settled");
        rename(&dir.join(NEXT_CERTIFICATE_FILE), &dir.join(CERTIFICATE_FILE))?;
        durable_step("wire::identity::next-adopted");
        sync_dir(dir)?;
        durable_step("wire::identity::next-settled");
        self.become_what_lies_in(dir)
    }

    fn become_what_lies_in(&self, dir: &Path) -> Result<(), IdentityError> {
        let loaded = Self::load(dir)?.current();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
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
        let (key, certificate) = (read_private(&key_path)?, read(&certificate_path)?);
        let current = match load_pair(&key, &certificate, &key_path, &certificate_path) {
            Err(error) => finish_adopting(dir, &key).ok_or(error)?,
            Ok(current) => current,
        };
        Ok(Self { current: Arc::new(RwLock::new(current)) })
    }

    /// The certificate's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.current().shown.fingerprint
    }

    /// What others see of it.
    #[must_use]
    pub fn shown(&self) -> Arc<Shown> {
        self.current().shown
    }

    pub(crate) fn key(&self) -> Arc<CertifiedKey> {
        self.current().key
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A server's side of each handshake.
impl ResolvesServerCert for Identity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().key)
    }
}

/// A client's: shown to whoever asks for one, whatever issuers the server hints at.
impl ResolvesClientCert for Identity {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().key)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A new identity that had been half put into its place: the key is there, its certificate follows.
fn finish_adopting(dir: &Path, key: &[u8]) -> Option<Current> {
    let (next, path) = (dir.join(NEXT_CERTIFICATE_FILE), dir.join(CERTIFICATE_FILE));
    let current = load_pair(key, &read(&next).ok()?, &dir.join(KEY_FILE), &next).ok()?;
    durable_step("wire::identity::next-half-adopted");
    rename(&next, &path).ok()?;
    durable_step("wire::identity::next-whole");
    Some(current)
}

/// A key and the certificates that go with it, the key's own first.
fn load_pair(
    key_pem: &[u8],
    certificate_pem: &[u8],
    key_path: &Path,
    certificate_path: &Path,
) -> Result<Current, IdentityError> {
    let key = PrivateKeyDer::from_pem_slice(key_pem)
        .map_err(|error| IdentityError::Damaged { path: key_path.to_owned(), why: error.to_string() })?;
    let damaged = |why: String| IdentityError::Damaged { path: certificate_path.to_owned(), why };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(certificate_pem).collect();
    let chain = chain.map_err(|error| damaged(error.to_string()))?;
    let shown = Shown::of(&chain).ok_or_else(|| damaged("there is no certificate in it".into()))?;
    // Also checks that the key is the certificate's.
    let key = CertifiedKey::from_der(chain, key, &provider())
        .map_err(|error| damaged(format!("it does not go with the key beside it ({error})")))?;
    Ok(Current { key: Arc::new(key), shown: Arc::new(shown) })
}

/// The one source of cryptography; given to rustls explicitly, so that no other crate's choice matters.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: std::sync::OnceLock<Arc<CryptoProvider>> = std::sync::OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider())).clone()
}

fn make_key() -> Result<rcgen::KeyPair, rcgen::Error> {
    rcgen::KeyPair::generate()
}

/// A certificate for a key, as PEM, good from now on.
fn make_certificate(site_name: &str, key: &rcgen::KeyPair) -> Result<String, rcgen::Error> {
    let now = SystemTime::now();
    let at = |moment: SystemTime| {
        let (year, month, day) = date(Timestamp::from(moment));
        rcgen::date_time_ymd(year, month, day)
    };
    let mut params = rcgen::CertificateParams::default();
    params.not_before = at(now - BACKDATED);
    params.not_after = at(now + LIFETIME);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("Afterimage site {site_name}"));
    Ok(params.self_signed(key)?.pem())
}

fn not_made(site_name: &str, error: &rcgen::Error) -> IdentityError {
    IdentityError::Make { name: site_name.to_owned(), why: error.to_string() }
}

fn sync_dir(dir: &Path) -> Result<(), IdentityError> {
    let synced = std::fs::File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| IdentityError::File { what: "sync", path: dir.to_owned(), source })
}

fn rename(from: &Path, to: &Path) -> Result<(), IdentityError> {
    std::fs::rename(from, to).map_err(|source| IdentityError::File {
        what: "rename",
        path: from.to_owned(),
        source,
    })
}

/// Removes a file; it does not matter if it is gone.
fn remove(path: &Path) -> Result<(), IdentityError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(IdentityError::File { what: "remove", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
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
#[path = "identity_tests.rs"]
mod tests;
