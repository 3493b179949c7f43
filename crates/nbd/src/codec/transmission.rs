//! After the negotiation: requests, simple replies and the chunks of structured replies.

use super::{
    Cursor, DecodeError, Errno, NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, STATUS_EXTENTS_MAX, StatusExtent,
};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_DONE: u16 = 1 << 0;

/// Flags of a request.
pub mod command_flags {
    /// Write through to stable storage before answering.
    pub const FUA: u16 = 1 << 0;
    /// Zeros are to be allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Answer a read in one piece.
    pub const DF: u16 = 1 << 2;
    /// Answer a block status with one extent per context.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Command(pub u16);

impl Command {
    /// Read.
    pub const READ: Self = Self(0);
    /// Write; the data follow the header.
    pub const WRITE: Self = Self(1);
    /// Good-bye; has no reply.
    pub const DISCONNECT: Self = Self(2);
    /// Everything written before is to be on stable storage.
    pub const FLUSH: Self = Self(3);
    /// The bytes are no longer needed.
    pub const TRIM: Self = Self(4);
    /// Make a range read as zeros.
    pub const WRITE_ZEROES: Self = Self(6);
    /// What metadata contexts say of a range.
    pub const BLOCK_STATUS: Self = Self(7);
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// See [`command_flags`].
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// What the reply will be known by.
    pub cookie: u64,
    /// Where on the export, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

impl Request {
    /// Its length on the wire.
    pub const BYTES: usize = 28;

    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.0.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.len.to_be_bytes());
        out
    }

    /// From bytes. A write's length is checked here, because its payload is on its way already and a
    /// length past the limit cannot be answered, only cut off.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a request", bytes);
        match cursor.u32()? {
            REQUEST_MAGIC => {}
            found => return Err(DecodeError::Magic { what: "a request", found: found.into() }),
        }
        let request = Self {
            flags: cursor.u16()?,
            command: Command(cursor.u16()?),
            cookie: cursor.u64()?,
            offset: cursor.u64()?,
            len: cursor.u32()?,
        };
        if request.command == Command::WRITE {
            bounded("a write", request.len, PAYLOAD_BYTES_MAX)?;
        }
        Ok(request)
    }
}

/// What leads in a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A whole reply; the data of a successful read follow.
    Simple {
        /// The request's cookie.
        cookie: u64,
        /// Why it failed, if it did.
        error: Option<Errno>,
    },
    /// One chunk of a structured reply.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// Bytes of the magic number that every reply starts with.
    pub const MAGIC_BYTES: usize = 4;
    /// The most bytes after the magic number.
    pub const REST_BYTES_MAX: usize = 16;
    /// Bytes of a simple reply's header.
    pub const SIMPLE_BYTES: usize = 16;

    /// How many bytes of header follow this magic number.
    pub fn rest_bytes(magic: [u8; Self::MAGIC_BYTES]) -> Result<usize, DecodeError> {
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => Ok(12),
            CHUNK_MAGIC => Ok(16),
            found => Err(DecodeError::Magic { what: "a reply", found: found.into() }),
        }
    }

    /// From the bytes after the magic number; their number tells which header it is.
    pub fn decode(rest: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a reply", rest);
        if rest.len() == 12 {
            let error = Some(Errno(cursor.u32()?)).filter(|errno| errno.0 != 0);
            return Ok(Self::Simple { cookie: cursor.u64()?, error });
        }
        let flags = cursor.u16()?;
        let kind = ChunkKind::from_code(cursor.u16()?)?;
        let (cookie, len) = (cursor.u64()?, cursor.u32()?);
        cursor.end()?;
        kind.check_len(len)?;
        Ok(Self::Chunk(ChunkHeader { done: flags & CHUNK_DONE != 0, kind, cookie, len }))
    }

    /// A simple reply, to bytes.
    #[must_use]
    pub fn encode_simple(cookie: u64, error: Option<Errno>) -> [u8; Self::SIMPLE_BYTES] {
        let mut out = [0; Self::SIMPLE_BYTES];
        out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&error.map_or(0, |errno| errno.0).to_be_bytes());
        out[8..].copy_from_slice(&cookie.to_be_bytes());
        out
    }
}

/// The header of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Whether it is the request's last.
    pub done: bool,
    /// What it holds.
    pub kind: ChunkKind,
    /// The request's cookie.
    pub cookie: u64,
    /// Bytes of payload that follow; within the limits of the kind.
    pub len: u32,
}

impl ChunkHeader {
    /// Its length on the wire.
    pub const BYTES: usize = 20;

    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&(if self.done { CHUNK_DONE } else { 0 }).to_be_bytes());
        out[6..8].copy_from_slice(&self.kind.code().to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..].copy_from_slice(&self.len.to_be_bytes());
        out
    }
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing.
    None,
    /// Where, and data.
    Data,
    /// Where and how many zeros.
    Hole,
    /// Extents of one metadata context.
    Status,
    /// Why the request failed.
    Error,
    /// The same, with the place.
    ErrorOffset,
    /// A failure of a newer kind.
    OtherError(u16),
}

impl ChunkKind {
    const ERROR_BIT: u16 = 1 << 15;
    /// Bytes of a data chunk before its data: the offset.
    pub const DATA_PREFIX_BYTES: u32 = 8;

    const fn code(self) -> u16 {
        match self {
            Self::None => 0,
            Self::Data => 1,
            Self::Hole => 2,
            Self::Status => 5,
            Self::Error => Self::ERROR_BIT + 1,
            Self::ErrorOffset => Self::ERROR_BIT + 2,
            Self::OtherError(code) => code,
        }
    }

    const fn from_code(code: u16) -> Result<Self, DecodeError> {
        Ok(match code {
            0 => Self::None,
            1 => Self::Data,
            2 => Self::Hole,
            5 => Self::Status,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            other if other & Self::ERROR_BIT != 0 => Self::OtherError(other),
            _ => return Err(DecodeError::Invalid("a chunk is of an unknown kind")),
        })
    }

    fn check_len(self, len: u32) -> Result<(), DecodeError> {
        let (least, most) = match self {
            Self::None => (0, 0),
            Self::Data => (Self::DATA_PREFIX_BYTES + 1, Self::DATA_PREFIX_BYTES + PAYLOAD_BYTES_MAX),
            Self::Hole => (12, 12),
            Self::Status => (12, 4 + 8 * STATUS_EXTENTS_MAX as u32),
            Self::Error | Self::OtherError(_) => (6, 64 + NAME_BYTES_MAX as u32),
            Self::ErrorOffset => (14, 14 + NAME_BYTES_MAX as u32),
        };
        if len < least {
            return Err(DecodeError::Truncated { what: "a chunk" });
        }
        bounded("a chunk", len, most)
    }
}

/// Zeros, as a chunk of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HoleChunk {
    /// Where on the export.
    pub offset: u64,
    /// How many.
    pub len: u32,
}

impl HoleChunk {
    /// Its length on the wire.
    pub const BYTES: u32 = 12;

    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [self.offset.to_be_bytes().as_slice(), &self.len.to_be_bytes()].concat()
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a chunk of zeros", bytes);
        let hole = Self { offset: cursor.u64()?, len: cursor.u32()? };
        cursor.end()?;
        Ok(hole)
    }
}

/// Extents of one metadata context, from the start of the request on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusChunk {
    /// The context's number.
    pub context: u32,
    /// One after the other; at least one, none empty.
    pub extents: Vec<StatusExtent>,
}

impl StatusChunk {
    /// To bytes. Lengths past 32 bits, which a decoder never gives, are cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + 8 * self.extents.len());
        out.extend_from_slice(&self.context.to_be_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&u32::try_from(extent.len).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(&extent.flags.to_be_bytes());
        }
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a block status chunk", bytes);
        let context = cursor.u32()?;
        if cursor.remaining() == 0 || !cursor.remaining().is_multiple_of(8) {
            return Err(DecodeError::Invalid("a block status chunk holds no whole number of extents"));
        }
        let mut extents = Vec::with_capacity(cursor.remaining() / 8);
        while cursor.remaining() > 0 {
            let extent = StatusExtent { len: cursor.u32()?.into(), flags: cursor.u32()? };
            // An empty extent would let a reader go round for ever.
            if extent.len == 0 {
                return Err(DecodeError::Invalid("a block status chunk holds an empty extent"));
            }
            extents.push(extent);
        }
        Ok(Self { context, extents })
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorChunk {
    /// The number.
    pub errno: Errno,
    /// The server's own words; often empty.
    pub message: String,
    /// Where, if the server says.
    pub offset: Option<u64>,
}

impl ErrorChunk {
    /// What the chunk is to be sent as.
    #[must_use]
    pub const fn kind(&self) -> ChunkKind {
        if self.offset.is_some() { ChunkKind::ErrorOffset } else { ChunkKind::Error }
    }

    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.errno.0.to_be_bytes().to_vec();
        out.extend_from_slice(&(self.message.len() as u16).to_be_bytes());
        out.extend_from_slice(self.message.as_bytes());
        out.extend(self.offset.iter().flat_map(|offset| offset.to_be_bytes()));
        out
    }

    /// From the bytes of an error chunk of this kind. An error is an error, however badly it is worded:
    /// a message that is not text is left out.
    pub fn decode(kind: ChunkKind, bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("an error chunk", bytes);
        let errno = match cursor.u32()? {
            0 => return Err(DecodeError::Invalid("an error chunk says that there is no error")),
            number => Errno(number),
        };
        let message_len = usize::from(cursor.u16()?);
        let message = std::str::from_utf8(cursor.take(message_len)?).unwrap_or_default().to_owned();
        let offset = match kind {
            ChunkKind::ErrorOffset => Some(cursor.u64()?),
            _ => None,
        };
        Ok(Self { errno, message, offset })
    }
}

const fn bounded(what: &'static str, len: u32, max: u32) -> Result<(), DecodeError> {
    if len > max {
        return Err(DecodeError::TooLong { what, len: len as u64, max: max as u64 });
    }
    Ok(())
}
