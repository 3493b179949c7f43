//! What a storage can answer instead of what was asked for.

use std::io;

/// The kinds of trouble, as far as somebody decides by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TroubleKind {
    /// There is no such file.
    Missing,
    /// The file ends before what was to be read.
    Short,
    /// A local file system is full.
    NoSpace,
    /// Who asks is not known, or may not do this.
    Denied,
    /// The server does not answer, is full, or says that it cannot now.
    Unavailable,
    /// Anything else: waiting does not mend it.
    Other,
}

/// Why a storage could not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub(crate) struct Trouble {
    pub(crate) kind: TroubleKind,
    /// For a person; no secret in it.
    pub(crate) why: String,
}

impl Trouble {
    pub(crate) fn new(kind: TroubleKind, why: impl Into<String>) -> Self {
        Self { kind, why: why.into() }
    }

    pub(crate) fn unavailable(why: impl Into<String>) -> Self {
        Self::new(TroubleKind::Unavailable, why)
    }

    pub(crate) fn other(why: impl Into<String>) -> Self {
        Self::new(TroubleKind::Other, why)
    }

    /// Whether another try may go better.
    pub(crate) fn is_transient(&self) -> bool {
        self.kind == TroubleKind::Unavailable
    }
}

impl From<io::Error> for Trouble {
    /// Of a local file.
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => TroubleKind::Missing,
            io::ErrorKind::UnexpectedEof => TroubleKind::Short,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => TroubleKind::NoSpace,
            _ => TroubleKind::Other,
        };
        Self::new(kind, error.to_string())
    }
}
