//! What can be wrong with a log.

use std::fmt;
use std::io;
use std::sync::Arc;

/// A failure, with the place in the log's bytes that it concerns. It can be cloned: a verifier that has
/// failed gives the same error again.
#[derive(Debug, Clone)]
pub struct Error {
    /// What kind it is; to be matched on.
    pub kind: ErrorKind,
    /// Where in the log, in bytes from its start: the start of the header, record, index, footer or seal that
    /// is wrong.
    pub position: u64,
    source: Option<Arc<io::Error>>,
}

/// Kinds of failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Reading or writing failed; the source says how.
    #[error("cannot {0} it")]
    Io(&'static str),
    /// The log ends too early.
    #[error("the log ends too early; receive it again")]
    Truncated,
    /// It is not a log.
    #[error("this is not a log: it does not begin as one")]
    BadMagic,
    /// A later version of the format.
    #[error("the log has format version {0}, this program knows version 1; use a newer Afterimage")]
    Version(u16),
    /// The header's checksum is wrong.
    #[error("the header is damaged (CRC32C); receive the log again")]
    HeaderCrc,
    /// A record's checksum is wrong.
    #[error("the record is damaged (CRC32C); receive the log again")]
    RecordCrc,
    /// The index's checksum is wrong.
    #[error("the index is damaged (CRC32C); receive the log again")]
    IndexCrc,
    /// The index or the footer says something else than the records.
    #[error("the index does not match the records; receive the log again")]
    IndexMismatch,
    /// The seal's checksum is wrong.
    #[error("the footer is damaged (CRC32C); receive the log again")]
    FooterCrc,
    /// The BLAKE3 over the whole is wrong.
    #[error("the log is damaged (BLAKE3 over the whole); receive it again")]
    HashMismatch,
    /// There are bytes after the end.
    #[error("there are bytes after the end of the log")]
    TrailingBytes,
    /// Neither a record nor an index nor a footer begins where one must.
    #[error("no {0} begins here")]
    BadTag(&'static str),
    /// A field has a value that the format does not allow.
    #[error("the {0} has a value that the format does not allow")]
    Field(&'static str),
    /// More than the format's limits allow.
    #[error("{found} {what} are more than the {max} that the format allows")]
    Limit {
        /// Of what.
        what: &'static str,
        /// How many.
        found: u64,
        /// How many at most.
        max: u64,
    },
    /// A record is for a disk that the header does not have.
    #[error("the record is for disk {0}, which the header does not list")]
    NoSuchDisk(u16),
    /// Two disks have one name.
    #[error("two disks have the name {0}")]
    DuplicateDisk(String),
    /// The lengths of a record contradict each other.
    #[error("the record's lengths contradict each other")]
    RecordLengths,
    /// A record's extents are empty, not sorted or not disjoint.
    #[error("the extent at offset {offset} is empty, not sorted or not disjoint from the one before it")]
    ExtentOrder {
        /// Where the extent starts on the disk, in bytes.
        offset: u64,
    },
    /// An extent ends beyond its disk.
    #[error("the extent at offset {offset} of disk {disk} ends beyond the disk")]
    BeyondDisk {
        /// The disk, by its place in the header.
        disk: u16,
        /// Where the extent starts on the disk, in bytes.
        offset: u64,
    },
    /// A byte of a disk is in two records.
    #[error("offset {offset} of disk {disk} is in the log twice")]
    Overlap {
        /// The disk, by its place in the header.
        disk: u16,
        /// Where the second extent starts on the disk, in bytes.
        offset: u64,
    },
    /// A payload does not decompress to exactly the bytes that its extents have.
    #[error("the record does not decompress to its length of {raw_bytes} bytes")]
    Decompress {
        /// What it should have come to.
        raw_bytes: u32,
    },
    /// The bytes are not those of the record that was asked for.
    #[error("the bytes are not those of the record that the index lists here; verify the log's file")]
    WrongRecord,
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(what: &'static str, position: u64, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return ErrorKind::Truncated.at(position);
        }
        Self { kind: ErrorKind::Io(what), position, source: Some(Arc::new(source)) }
    }

    /// The stable code, for scripts and for the wire.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        self.kind.code()
    }

    /// Whether the log is only incomplete.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        matches!(self.kind, ErrorKind::Truncated)
    }

    /// Whether the storage failed, rather than the bytes being wrong.
    #[must_use]
    pub const fn is_io(&self) -> bool {
        matches!(self.kind, ErrorKind::Io(_))
    }
}

impl ErrorKind {
    pub(crate) const fn at(self, position: u64) -> Error {
        Error { kind: self, position, source: None }
    }

    /// The stable code, for scripts and for the wire.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "log-io",
            Self::Truncated => "log-truncated",
            Self::BadMagic => "log-bad-magic",
            Self::Version(_) => "log-version",
            Self::HeaderCrc => "log-header-crc",
            Self::RecordCrc => "log-record-crc",
            Self::IndexCrc => "log-index-crc",
            Self::IndexMismatch => "log-index-mismatch",
            Self::FooterCrc => "log-footer-crc",
            Self::HashMismatch => "log-hash-mismatch",
            Self::TrailingBytes => "log-trailing-bytes",
            Self::BadTag(_) => "log-bad-tag",
            Self::Field(_) => "log-bad-field",
            Self::Limit { .. } => "log-limit",
            Self::NoSuchDisk(_) => "log-no-such-disk",
            Self::DuplicateDisk(_) => "log-duplicate-disk",
            Self::RecordLengths => "log-record-lengths",
            Self::ExtentOrder { .. } => "log-extent-order",
            Self::BeyondDisk { .. } => "log-beyond-disk",
            Self::Overlap { .. } => "log-overlap",
            Self::Decompress { .. } => "log-decompress",
            Self::WrongRecord => "log-wrong-record",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "log at byte {}: {}", self.position, self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
