//! What a file begins with: in plain, so that whose it is can be said without the key, and sealed in with every chunk.

use model::{LogId, LogNumber, MediaId, VmId};

use crate::error::{Error, Result};

const MAGIC: [u8; 8] = *b"\x89AFTMED\n";
const VERSION: u16 = 1;

/// The bytes of a file before its first chunk.
pub const HEADER_BYTES: usize = 72;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A log.
    Log,
    /// The end of the set.
    End,
}

/// Which file of which set it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it holds.
    pub kind: Kind,
    /// The set.
    pub set: MediaId,
    /// Whose disks.
    pub vm: VmId,
    /// The log's number; of the end the newest log's.
    pub number: LogNumber,
    /// The log's id; of the end one of its own. No other attempt at the file has it: the file's key is made with it.
    pub id: LogId,
}

impl Header {
    /// As the file has it.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = match self.kind {
            Kind::Log => 1,
            Kind::End => 2,
        };
        bytes[16..32].copy_from_slice(self.set.as_bytes());
        bytes[32..48].copy_from_slice(self.vm.as_bytes());
        bytes[48..56].copy_from_slice(&self.number.0.to_le_bytes());
        bytes[56..72].copy_from_slice(self.id.as_bytes());
        bytes
    }

    /// Reads it. Nothing in it is to be believed before a chunk of the file has opened.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
            return Err(Error::NotMedia);
        }
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(Error::Truncated)?;
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(Error::Version(version));
        }
        let kind = match bytes[10] {
            1 => Kind::Log,
            2 => Kind::End,
            _ => return Err(Error::Field("kind")),
        };
        if bytes[11..16] != [0; 5] {
            return Err(Error::Field("reserved part"));
        }
        let id = |at: usize| <[u8; 16]>::try_from(&bytes[at..at + 16]).expect("16 bytes");
        let number = u64::from_le_bytes(bytes[48..56].try_into().expect("8 bytes"));
        Ok(Self {
            kind,
            set: MediaId::from_bytes(id(16)),
            vm: VmId::from_bytes(id(32)),
            number: LogNumber(number),
            id: LogId::from_bytes(id(56)),
        })
    }

    /// Whether it is the one that is looked for. Any id of a log fits: the log itself says what it continues.
    pub fn check(&self, kind: Kind, set: MediaId, vm: VmId, number: LogNumber) -> Result<()> {
        if self.set != set {
            return Err(Error::Foreign("set"));
        }
        if self.vm != vm {
            return Err(Error::Foreign("VM"));
        }
        if (self.kind, self.number) != (kind, number) {
            return Err(Error::Foreign("place in the set"));
        }
        Ok(())
    }
}
