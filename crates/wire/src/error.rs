//! What can go wrong on the way to a peer.

use std::fmt;
use std::sync::Arc;

use crate::messages::Refused;

/// Kinds of failure; stable, to be matched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The peer's certificate is not the one that was pinned. Nothing was sent to it.
    WrongCertificate,
    /// The peer's certificate is its own, and our CA's, and its time is over or has not come. Nothing was sent to it.
    CertificateNotToday,
    /// The peer wants a client certificate and got none (401).
    Unauthorized,
    /// The peer does not know us (any more), or we may not do that there (403).
    Forbidden,
    /// The peer understood and refused; [`Error::refused`] has its reason.
    Refused,
    /// The peer cannot be reached, or the connection broke.
    Link,
    /// The peer did not answer in time.
    Timeout,
    /// What answers does not speak our protocol.
    Protocol,
    /// The invite cannot be used; nothing was sent.
    Invite,
}

/// A failure, with the peer and the operation it concerns. It can be cloned: an upload that has failed
/// says the same to everybody who asks.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    /// `peer address: operation`, once both are known.
    context: Option<Arc<str>>,
    message: Arc<str>,
    refused: Option<Arc<Refused>>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, context: None, message: message.into().into(), refused: None, source: None }
    }

    pub(crate) fn link(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Link, message)
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Protocol, message)
    }

    pub(crate) fn refusal(kind: ErrorKind, refused: Refused) -> Self {
        let message = refused.message.as_str().into();
        Self { kind, context: None, message, refused: Some(Arc::new(refused)), source: None }
    }

    pub(crate) fn caused_by(self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { source: Some(Arc::new(source)), ..self }
    }

    /// Says whom and what it concerns, unless that is said already.
    pub(crate) fn at(self, address: &str, operation: impl fmt::Display) -> Self {
        let context = self.context.unwrap_or_else(|| format!("site at {address}: {operation}").into());
        Self { context: Some(context), ..self }
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The peer's own words, where it refused.
    #[must_use]
    pub fn refused(&self) -> Option<&Refused> {
        self.refused.as_deref()
    }

    /// Whether it may clear by itself.
    #[must_use]
    pub fn transient(&self) -> bool {
        match self.kind {
            ErrorKind::Link | ErrorKind::Timeout | ErrorKind::Protocol | ErrorKind::CertificateNotToday => {
                true
            }
            ErrorKind::Refused | ErrorKind::Forbidden => {
                self.refused.as_ref().is_some_and(|refused| refused.transient)
            }
            ErrorKind::WrongCertificate | ErrorKind::Unauthorized | ErrorKind::Invite => false,
        }
    }

    /// Whether the way to the peer failed, rather than the peer's judgement.
    #[must_use]
    pub const fn is_broken_link(&self) -> bool {
        matches!(self.kind, ErrorKind::Link | ErrorKind::Timeout)
    }

    /// Whether the peer refused with this code.
    #[must_use]
    pub fn has_code(&self, code: &str) -> bool {
        self.refused.as_ref().is_some_and(|refused| refused.code == code)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(context) = &self.context {
            write!(f, "{context}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
