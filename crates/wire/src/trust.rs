//! By what one site knows another again: a pinned key, or a name that an own CA vouches for.
//!
//! ```text
//! entry without a name ─▶ the pinned certificate, any certificate for its key, or for the key that the peer has
//!                         announced as its next one; dates are not looked at
//! entry with a name    ─▶ a certificate that the CA has issued for that name and that is good today; no pin is looked at
//! ```

use std::path::Path;
use std::sync::Arc;

use model::Timestamp;
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::certificate::{KeyId, Shown};
use crate::identity::{Fingerprint, IdentityError, provider};

/// By what a peer is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pin {
    /// The certificate that was seen last, or that its invite named.
    pub fingerprint: Fingerprint,
    /// That certificate's key, once it was seen.
    pub key: Option<KeyId>,
    /// The key that the peer has said it will have next.
    pub next_key: Option<KeyId>,
    /// The name for which a certificate of our CA must be. With one, the CA alone decides.
    pub name: Option<String>,
}

impl From<Fingerprint> for Pin {
    fn from(fingerprint: Fingerprint) -> Self {
        Self { fingerprint, key: None, next_key: None, name: None }
    }
}

/// Why a certificate is not taken for a peer's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    /// It is somebody else's.
    #[error("its certificate is {shown}, but {pinned} was pinned")]
    Other {
        /// The one that was shown.
        shown: Fingerprint,
        /// The one that is known.
        pinned: Fingerprint,
    },
    /// The CA has not issued it, or not for this name.
    #[error("its certificate {shown} is not one of this site's CA for {name}: {why}")]
    NotIssued {
        /// The one that was shown.
        shown: Fingerprint,
        /// The name that it should be for.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The CA has issued it for this name, and its time is over, or has not come.
    #[error(
        "its certificate for {name} is not good today ({when}); its people must install a new one with 'afterimage identity use', or the clock of one of the two sites is wrong"
    )]
    NotToday {
        /// The name.
        name: String,
        /// Since or until when.
        when: String,
    },
}

impl Pin {
    /// Whether the peer has shown this certificate.
    pub fn check(&self, shown: &Shown, ca: Option<&Ca>, now: Timestamp) -> Result<(), Distrust> {
        if let Some(name) = &self.name {
            return match ca {
                Some(ca) => ca.check(shown, name, now),
                None => Err(Distrust::NotIssued {
                    shown: shown.fingerprint,
                    name: name.clone(),
                    why: "this site has no CA; install it with 'afterimage identity use --ca FILE'".into(),
                }),
            };
        }
        let is_known = self.fingerprint == shown.fingerprint
            || self.key == Some(shown.key)
            || self.next_key == Some(shown.key);
        let other = Distrust::Other { shown: shown.fingerprint, pinned: self.fingerprint };
        is_known.then_some(()).ok_or(other)
    }
}

/// The certificates of a CA of one's own.
#[derive(Debug, Clone)]
pub struct Ca(Arc<RootCertStore>);

impl Ca {
    /// Reads a file of certificates in PEM.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        let unusable = |why: String| IdentityError::Damaged { path: path.to_owned(), why };
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(unusable("there is no certificate in it".into()));
        }
        Ok(Self(Arc::new(roots)))
    }

    /// Whether it has issued this certificate, for this name, and it is good at this moment.
    pub fn check(&self, shown: &Shown, name: &str, now: Timestamp) -> Result<(), Distrust> {
        let not_issued =
            |why: String| Distrust::NotIssued { shown: shown.fingerprint, name: name.to_owned(), why };
        let [first, others @ ..] = shown.chain.as_slice() else {
            return Err(not_issued("there is none".into()));
        };
        let parsed = ParsedCertificate::try_from(first).map_err(|error| not_issued(error.to_string()))?;
        let asked = ServerName::try_from(name).map_err(|error| not_issued(error.to_string()))?;
        // The name first: whose it is must be known before anything is said of its dates.
        verify_server_name(&parsed, &asked).map_err(|error| not_issued(error.to_string()))?;
        let now = UnixTime::since_unix_epoch(now.since(Timestamp::default()));
        let algorithms = provider().signature_verification_algorithms;
        let verified =
            verify_server_cert_signed_by_trust_anchor(&parsed, &self.0, others, now, algorithms.all);
        verified.map_err(|error| match error {
            rustls::Error::InvalidCertificate(
                why @ (CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. }),
            ) => Distrust::NotToday { name: name.to_owned(), when: why.to_string() },
            other => not_issued(other.to_string()),
        })
    }
}

/// A name that a certificate can be for.
pub fn check_certificate_name(name: &str) -> Result<(), String> {
    ServerName::try_from(name).map(drop).map_err(|_| {
        format!("{name:?} is no name that a certificate can be for: a DNS name or an IP address is")
    })
}
