//! The bytes of the NBD protocol, pure: values to bytes and bytes to values, no socket.
//!
//! Every decoder takes arbitrary bytes and gives a [`DecodeError`] for what it does not understand. Lengths
//! are checked against the limits below *before* anything of that length is allocated or read.

mod handshake;
mod transmission;

pub use handshake::{
    Greeting, Info, ListedExport, MetaContext, MetaRequest, OpenRequest, OptionCode, OptionHeader,
    OptionReplyHeader, ReplyCode, encode_opened, handshake_flags, info_code,
};
pub use transmission::{
    ChunkHeader, ChunkKind, Command, ErrorChunk, HoleChunk, ReplyHeader, Request, StatusChunk, command_flags,
};

/// The most bytes of data in one request or reply chunk: what every NBD peer accepts without asking.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// The most bytes of a name (export, metadata context) or message, as the protocol says.
pub const NAME_BYTES_MAX: usize = 4096;
/// The most bytes of one option or of one reply to it: a few names, with room to spare.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// The most extents in one block status chunk (nbdkit's limit; QEMU's is an eighth of it).
pub const STATUS_EXTENTS_MAX: usize = 1 << 20;
/// The most metadata contexts asked for in one option.
pub const CONTEXTS_MAX: usize = 64;

/// Flags of an export, as the server gives them when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    /// The other flags mean something.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// The flush command is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The trim command is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// The write-zeroes command is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Reads can be asked for in one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers writes completed on the others.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u16) -> bool {
        self.0 & bits == bits
    }
}

/// What a server says about the sizes of requests to an export, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Every offset and length is a multiple of this.
    pub minimum: u32,
    /// What works best.
    pub preferred: u32,
    /// The longest payload.
    pub maximum: u32,
}

/// Error numbers as they travel (they equal Linux's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// Not permitted: a write to a read-only export.
    pub const EPERM: Self = Self(1);
    /// Input/output error.
    pub const EIO: Self = Self(5);
    /// Out of memory.
    pub const ENOMEM: Self = Self(12);
    /// Invalid request.
    pub const EINVAL: Self = Self(22);
    /// No space left.
    pub const ENOSPC: Self = Self(28);
    /// Value too large.
    pub const EOVERFLOW: Self = Self(75);
    /// Not supported.
    pub const ENOTSUP: Self = Self(95);
    /// The server is shutting down.
    pub const ESHUTDOWN: Self = Self(108);
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match *self {
            Self::EPERM => "EPERM",
            Self::EIO => "EIO",
            Self::ENOMEM => "ENOMEM",
            Self::EINVAL => "EINVAL",
            Self::ENOSPC => "ENOSPC",
            Self::EOVERFLOW => "EOVERFLOW",
            Self::ENOTSUP => "ENOTSUP",
            Self::ESHUTDOWN => "ESHUTDOWN",
            Self(other) => return write!(f, "error {other}"),
        };
        f.write_str(name)
    }
}

/// A run of an export with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Its length in bytes; never 0 in what a decoder gives.
    pub len: u64,
    /// What the metadata context says of it; see [`StatusExtent::HOLE`] and the others.
    pub flags: u32,
}

impl StatusExtent {
    /// In `base:allocation`: not allocated. What is read there is *not* promised to be zeros.
    pub const HOLE: u32 = 1 << 0;
    /// In `base:allocation`: reads as zeros.
    pub const ZERO: u32 = 1 << 1;
    /// In `qemu:dirty-bitmap:NAME`: dirty.
    pub const DIRTY: u32 = 1 << 0;

    /// In `base:allocation`: bytes that have to be read.
    #[must_use]
    pub const fn data(len: u64) -> Self {
        Self { len, flags: 0 }
    }

    /// In `base:allocation`: not allocated, and reads as zeros.
    #[must_use]
    pub const fn zeros(len: u64) -> Self {
        Self { len, flags: Self::HOLE | Self::ZERO }
    }

    /// Whether all of `bits` are set.
    #[must_use]
    pub const fn has(self, bits: u32) -> bool {
        self.flags & bits == bits
    }
}

/// Bytes that are not what the protocol allows at that place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A magic number is wrong.
    #[error("{what} starts with {found:#x}: this is not NBD")]
    Magic {
        /// Of what.
        what: &'static str,
        /// The number found.
        found: u64,
    },
    /// Too few bytes.
    #[error("{what} is cut short")]
    Truncated {
        /// What is.
        what: &'static str,
    },
    /// Bytes are left over.
    #[error("{what} has {bytes} bytes too many")]
    Trailing {
        /// What has.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A length above its limit.
    #[error("{what} of {len} is more than the {max} allowed")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// The length found.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// Text that is not UTF-8 or holds a NUL.
    #[error("{what} is not text")]
    NotText {
        /// What is not.
        what: &'static str,
    },
    /// Anything else that the protocol forbids.
    #[error("{0}")]
    Invalid(&'static str),
}

/// Takes values off the front of a slice.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) =
            self.rest.split_at_checked(len).ok_or(DecodeError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        Ok(self.take(N)?.try_into().expect("take gives just that many"))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Text of that many bytes.
    pub(crate) fn text(&mut self, len: usize) -> Result<String, DecodeError> {
        if len > NAME_BYTES_MAX {
            return Err(DecodeError::TooLong {
                what: self.what,
                len: len as u64,
                max: NAME_BYTES_MAX as u64,
            });
        }
        match std::str::from_utf8(self.take(len)?) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(DecodeError::NotText { what: self.what }),
        }
    }

    /// Text after its length in 32 bits.
    pub(crate) fn prefixed_text(&mut self) -> Result<String, DecodeError> {
        let len = self.u32()?;
        self.text(len as usize)
    }

    pub(crate) const fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn rest_as_text(&mut self) -> Result<String, DecodeError> {
        self.text(self.rest.len())
    }

    pub(crate) const fn end(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(DecodeError::Trailing { what: self.what, bytes }),
        }
    }
}

/// Appends text after its length in 32 bits.
pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}
