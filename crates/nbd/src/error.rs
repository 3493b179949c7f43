//! What can go wrong with an export.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::codec::{DecodeError, Errno, ReplyCode};

/// A failure, with the export and the place it concerns. It can be cloned: when a server dies, every
/// request in flight gets the same one.
#[derive(Debug, Clone)]
pub struct Error {
    /// What kind it is; stable, to be matched on.
    pub kind: ErrorKind,
    /// The export's name.
    pub export: String,
    /// What was being done, such as `read`.
    pub operation: &'static str,
    /// Where on the export, if it has a place.
    pub offset: Option<u64>,
    pub(crate) source: Option<Arc<io::Error>>,
}

/// Kinds of failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The socket cannot be reached.
    #[error("cannot connect to {0}; is the NBD server running?")]
    Connect(String),
    /// The server has no such export.
    #[error("the server has no such export")]
    UnknownExport,
    /// The server refuses the client, with the protocol's number for why.
    #[error("the server refuses the export: {}{}", refusal(*.reply), with_words(.message))]
    Refused {
        /// The number.
        reply: u32,
        /// The server's words.
        message: String,
    },
    /// The server lacks something that is needed.
    #[error("the server does not offer {0}")]
    NotOffered(String),
    /// The server did not answer in time.
    #[error(
        "the server did not finish the handshake within {0} s; it may serve another client and only one at a time"
    )]
    HandshakeTimeout(u64),
    /// The connection ended with the request in flight, or before it.
    #[error("the server ended the connection")]
    Disconnected,
    /// The server sent what the protocol does not allow; the connection is given up.
    #[error("the server broke the protocol: {0}")]
    Protocol(DecodeError),
    /// The server answered the request with an error.
    #[error("the server answers {errno}{}", with_words(.message))]
    Answered {
        /// The number.
        errno: Errno,
        /// The server's words.
        message: String,
    },
    /// The range is not on the export.
    #[error("{len} bytes from there are past the end of the export, which has {size_bytes}")]
    OutOfBounds {
        /// Bytes asked for.
        len: u64,
        /// The export's size.
        size_bytes: u64,
    },
    /// The caller asks for more at once than the protocol can carry.
    #[error("{what} of {len} bytes is more than the {max} that one request can carry")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// How long.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// A write to a read-only export.
    #[error("the export is read-only")]
    ReadOnly,
    /// The server cannot listen.
    #[error("cannot listen on {0}; the folder must exist, and no other server may use the socket")]
    Listen(String),
    /// The server shows another disk under the name.
    #[error("the server has an export of that name; remove it first, or take another name")]
    NameTaken,
    /// The server was served before.
    #[error("the server was served already; bind a new one")]
    Served,
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether a read failed in the way in which QEMU fails reads of a moment that it could not keep
    /// (the scratch of a fleecing was lost): EINVAL or EIO. The moment is gone, the disk is not: the cycle
    /// is to be given up and begun again.
    #[must_use]
    pub fn may_be_lost_moment(&self) -> bool {
        self.operation == "read"
            && matches!(self.kind, ErrorKind::Answered { errno: Errno::EINVAL | Errno::EIO, .. })
    }

    /// Whether the connection is gone, so that nothing more can be had from this client.
    #[must_use]
    pub const fn is_connection_lost(&self) -> bool {
        matches!(self.kind, ErrorKind::Disconnected | ErrorKind::Protocol(_))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NBD export {:?}: {}", self.export, self.operation)?;
        if let Some(offset) = self.offset {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": {}", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Why a connection ended, before it is known which request it concerns.
#[derive(Debug, Clone)]
pub(crate) struct Cause {
    pub kind: ErrorKind,
    pub source: Option<Arc<io::Error>>,
}

impl Cause {
    pub(crate) fn error(&self, export: &str, operation: &'static str, offset: Option<u64>) -> Error {
        Error {
            kind: self.kind.clone(),
            export: export.to_owned(),
            operation,
            offset,
            source: self.source.clone(),
        }
    }
}

impl From<ErrorKind> for Cause {
    fn from(kind: ErrorKind) -> Self {
        Self { kind, source: None }
    }
}

impl From<DecodeError> for Cause {
    fn from(error: DecodeError) -> Self {
        ErrorKind::Protocol(error).into()
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self { kind: ErrorKind::Disconnected, source: Some(Arc::new(error)) }
    }
}

/// What the numbers of refusals mean: servers often send no words with them.
fn refusal(reply: u32) -> String {
    let meaning = match ReplyCode(reply) {
        ReplyCode::ERR_POLICY => "its policy forbids it",
        ReplyCode::ERR_INVALID => "it takes the request for malformed",
        ReplyCode::ERR_TLS_REQD => "it wants TLS, which is not spoken here",
        ReplyCode::ERR_SHUTDOWN => "it is shutting down",
        ReplyCode::ERR_BLOCK_SIZE_REQD => "it wants block sizes to be agreed on",
        ReplyCode::ERR_TOO_BIG => "it takes the request for too large",
        _ => return format!("reply {reply:#x}"),
    };
    meaning.to_owned()
}

/// The server's own words, without what would upset a terminal.
fn with_words(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(": {}", message.escape_debug()) }
}
