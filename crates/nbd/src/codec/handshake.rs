//! Fixed newstyle negotiation: the greeting, options and the replies to them.

use super::{
    BlockSizes, CONTEXTS_MAX, Cursor, DecodeError, ExportFlags, NAME_BYTES_MAX, OPTION_BYTES_MAX, put_text,
};

const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Flags that the two sides greet each other with.
pub mod handshake_flags {
    /// Options that are not understood are answered, not cut off.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No padding after the reply to the oldest option.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Kinds of [`Info`].
pub mod info_code {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What a server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// See [`handshake_flags`].
    pub flags: u16,
}

impl Greeting {
    /// Its length on the wire.
    pub const BYTES: usize = 18;

    /// To bytes.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
        out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[16..].copy_from_slice(&self.flags.to_be_bytes());
        out
    }

    /// From bytes. Old-style servers (before 2011) are refused.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("the greeting", bytes);
        expect_magic("the greeting", &mut cursor, GREETING_MAGIC)?;
        expect_magic("the greeting's second part", &mut cursor, OPTION_MAGIC)?;
        Ok(Self { flags: cursor.u16()? })
    }
}

/// What a client asks for in the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionCode(pub u32);

impl OptionCode {
    /// Open an export the old way.
    pub const EXPORT_NAME: Self = Self(1);
    /// Give up.
    pub const ABORT: Self = Self(2);
    /// List exports.
    pub const LIST: Self = Self(3);
    /// Change to TLS.
    pub const STARTTLS: Self = Self(5);
    /// Describe an export.
    pub const INFO: Self = Self(6);
    /// Open an export.
    pub const GO: Self = Self(7);
    /// Use structured replies.
    pub const STRUCTURED_REPLY: Self = Self(8);
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: Self = Self(9);
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: Self = Self(10);
}

/// What leads in an option's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// The option.
    pub option: OptionCode,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionHeader {
    /// Its length on the wire.
    pub const BYTES: usize = 16;

    /// The header and its data, to bytes.
    #[must_use]
    pub fn encode_with(option: OptionCode, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES + data.len());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.0.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("an option", bytes);
        expect_magic("an option", &mut cursor, OPTION_MAGIC)?;
        let option = OptionCode(cursor.u32()?);
        Ok(Self { option, len: bounded("an option", cursor.u32()?)? })
    }
}

/// How a server answers an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyCode(pub u32);

impl ReplyCode {
    const ERROR_BIT: u32 = 1 << 31;

    /// Done; the last reply to the option.
    pub const ACK: Self = Self(1);
    /// One export of a list.
    pub const SERVER: Self = Self(2);
    /// One piece of information about an export.
    pub const INFO: Self = Self(3);
    /// One metadata context.
    pub const META_CONTEXT: Self = Self(4);
    /// The server does not know the option.
    pub const ERR_UNSUP: Self = Self(Self::ERROR_BIT + 1);
    /// The server is not allowed to.
    pub const ERR_POLICY: Self = Self(Self::ERROR_BIT + 2);
    /// The option is malformed, or out of turn.
    pub const ERR_INVALID: Self = Self(Self::ERROR_BIT + 3);
    /// TLS comes first.
    pub const ERR_TLS_REQD: Self = Self(Self::ERROR_BIT + 5);
    /// No such export.
    pub const ERR_UNKNOWN: Self = Self(Self::ERROR_BIT + 6);
    /// The server is shutting down.
    pub const ERR_SHUTDOWN: Self = Self(Self::ERROR_BIT + 7);
    /// The client must ask for block sizes and keep to them.
    pub const ERR_BLOCK_SIZE_REQD: Self = Self(Self::ERROR_BIT + 8);
    /// The option is too long.
    pub const ERR_TOO_BIG: Self = Self(Self::ERROR_BIT + 9);

    /// Whether the option was refused.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 & Self::ERROR_BIT != 0
    }
}

/// What leads in the data of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option answered.
    pub option: OptionCode,
    /// The answer.
    pub reply: ReplyCode,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionReplyHeader {
    /// Its length on the wire.
    pub const BYTES: usize = 20;

    /// The header and its data, to bytes.
    #[must_use]
    pub fn encode_with(option: OptionCode, reply: ReplyCode, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES + data.len());
        out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out.extend_from_slice(&option.0.to_be_bytes());
        out.extend_from_slice(&reply.0.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a reply to an option", bytes);
        expect_magic("a reply to an option", &mut cursor, OPTION_REPLY_MAGIC)?;
        let (option, reply) = (OptionCode(cursor.u32()?), ReplyCode(cursor.u32()?));
        Ok(Self { option, reply, len: bounded("a reply to an option", cursor.u32()?)? })
    }
}

/// Asks to open ([`OptionCode::GO`]) or to describe ([`OptionCode::INFO`]) an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRequest {
    /// The export's name; empty for the server's default.
    pub export: String,
    /// What the client wants to be told; see [`info_code`].
    pub infos: Vec<u16>,
}

impl OpenRequest {
    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, &self.export);
        out.extend_from_slice(&(self.infos.len() as u16).to_be_bytes());
        for info in &self.infos {
            out.extend_from_slice(&info.to_be_bytes());
        }
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a request to open an export", bytes);
        let export = cursor.prefixed_text()?;
        let count = cursor.u16()?;
        let infos = (0..count).map(|_| cursor.u16()).collect::<Result<_, _>>()?;
        cursor.end()?;
        Ok(Self { export, infos })
    }
}

/// One piece of information about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// Size and flags.
    Export {
        /// Its size.
        size_bytes: u64,
        /// What it can do.
        flags: ExportFlags,
    },
    /// The sizes of requests.
    BlockSize(BlockSizes),
    /// Something that we do not use.
    Other(u16),
}

impl Info {
    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match *self {
            Self::Export { size_bytes, flags } => {
                out.extend_from_slice(&info_code::EXPORT.to_be_bytes());
                out.extend_from_slice(&size_bytes.to_be_bytes());
                out.extend_from_slice(&flags.0.to_be_bytes());
            }
            Self::BlockSize(BlockSizes { minimum, preferred, maximum }) => {
                out.extend_from_slice(&info_code::BLOCK_SIZE.to_be_bytes());
                for size in [minimum, preferred, maximum] {
                    out.extend_from_slice(&size.to_be_bytes());
                }
            }
            Self::Other(code) => out.extend_from_slice(&code.to_be_bytes()),
        }
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("information about an export", bytes);
        let info = match cursor.u16()? {
            info_code::EXPORT => {
                Self::Export { size_bytes: cursor.u64()?, flags: ExportFlags(cursor.u16()?) }
            }
            info_code::BLOCK_SIZE => {
                let sizes =
                    BlockSizes { minimum: cursor.u32()?, preferred: cursor.u32()?, maximum: cursor.u32()? };
                if !sizes.minimum.is_power_of_two() || sizes.maximum < sizes.minimum {
                    return Err(DecodeError::Invalid("the block sizes of the export make no sense"));
                }
                Self::BlockSize(sizes)
            }
            other => return Ok(Self::Other(other)),
        };
        cursor.end()?;
        Ok(info)
    }
}

/// The answer to [`OptionCode::EXPORT_NAME`], which has no header; with the padding that clients before
/// [`handshake_flags::NO_ZEROES`] expect.
#[must_use]
pub fn encode_opened(size_bytes: u64, flags: ExportFlags, padded: bool) -> Vec<u8> {
    let mut out = size_bytes.to_be_bytes().to_vec();
    out.extend_from_slice(&flags.0.to_be_bytes());
    out.resize(out.len() + if padded { 124 } else { 0 }, 0);
    out
}

/// Asks for metadata contexts of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export's name.
    pub export: String,
    /// The contexts, such as `base:allocation`.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, &self.export);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_text(&mut out, query);
        }
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let what = "a request for metadata contexts";
        let mut cursor = Cursor::new(what, bytes);
        let export = cursor.prefixed_text()?;
        let count = cursor.u32()?;
        if count as usize > CONTEXTS_MAX {
            return Err(DecodeError::TooLong { what, len: count.into(), max: CONTEXTS_MAX as u64 });
        }
        let queries = (0..count).map(|_| cursor.prefixed_text()).collect::<Result<_, _>>()?;
        cursor.end()?;
        Ok(Self { export, queries })
    }
}

/// A metadata context that the server has, with the number it goes by in block status replies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaContext {
    /// The number.
    pub id: u32,
    /// The name.
    pub name: String,
}

impl MetaContext {
    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.id.to_be_bytes().to_vec();
        out.extend_from_slice(self.name.as_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("a metadata context", bytes);
        Ok(Self { id: cursor.u32()?, name: cursor.rest_as_text()? })
    }
}

/// One export of a server's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// What it is, for a person; often empty.
    pub description: String,
}

impl ListedExport {
    /// To bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, &self.name);
        out.extend_from_slice(self.description.as_bytes());
        out
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new("an export of the list", bytes);
        Ok(Self { name: cursor.prefixed_text()?, description: cursor.rest_as_text()? })
    }
}

fn expect_magic(what: &'static str, cursor: &mut Cursor<'_>, magic: u64) -> Result<(), DecodeError> {
    match cursor.u64()? {
        found if found == magic => Ok(()),
        found => Err(DecodeError::Magic { what, found }),
    }
}

const fn bounded(what: &'static str, len: u32) -> Result<u32, DecodeError> {
    if len > OPTION_BYTES_MAX {
        return Err(DecodeError::TooLong { what, len: len as u64, max: OPTION_BYTES_MAX as u64 });
    }
    Ok(len)
}

// The longest name must fit in an option with room for what stands beside it.
const _: () = assert!(OPTION_BYTES_MAX as usize > 4 * NAME_BYTES_MAX);
