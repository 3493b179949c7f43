//! The end of a set: written last, it says what the set consists of.

use model::{Head, LogId, LogNumber, MediaId, VmId};

use crate::error::{Error, Result};
use crate::header::{HEADER_BYTES, Header, Kind};
use crate::key::MediaKey;
use crate::open::Opener;
use crate::seal::Sealer;

/// The end's file.
pub const END_FILE: &str = "end.sealed";

/// The most logs of a set: each holds at least a stretch of disk, and an end of it is read at once.
const LOGS_MAX: u64 = 1 << 20;

/// What a whole set consists of: its newest log, and how large the files of all its logs are, in bytes, from log 1 on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The newest log.
    pub head: Head,
    /// The sizes of the files, in bytes.
    pub files: Vec<u64>,
}

impl End {
    /// Bytes of all files of logs.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, &bytes| sum.saturating_add(bytes))
    }

    /// The file. `attempt` is a random id that nothing else has.
    pub fn encode(&self, key: &MediaKey, set: MediaId, vm: VmId, attempt: LogId) -> Result<Vec<u8>> {
        let Head { number, id } = self.head;
        let mut sealer = Sealer::new(key, &Header { kind: Kind::End, set, vm, number, id: attempt });
        let sizes: Vec<u8> = self.files.iter().flat_map(|bytes| bytes.to_le_bytes()).collect();
        let mut file = Vec::new();
        sealer.push(id.as_bytes(), &mut file)?;
        sealer.push(&sizes, &mut file)?;
        sealer.finish(&mut file)?;
        Ok(file)
    }

    /// How large the file of the end of so many logs is at the most, in bytes.
    #[must_use]
    pub const fn file_bytes_max() -> u64 {
        crate::sealed_bytes(16 + LOGS_MAX * 8)
    }

    /// Reads the file.
    pub fn decode(file: &[u8], key: &MediaKey, set: MediaId, vm: VmId) -> Result<Self> {
        let header = Header::decode(file)?;
        header.check(Kind::End, set, vm, header.number)?;
        let mut opener = Opener::new(key, &header);
        let mut plain = Vec::new();
        opener.push(&file[HEADER_BYTES..], &mut plain)?;
        opener.finish(&mut plain)?;
        let (id, sizes) = plain.split_first_chunk().ok_or(Error::Field("length"))?;
        let files: Vec<u64> = sizes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let LogNumber(logs) = header.number;
        if sizes.len() as u64 != logs.saturating_mul(8) || logs == 0 || logs > LOGS_MAX {
            return Err(Error::Field("number of logs"));
        }
        Ok(Self { head: Head { number: header.number, id: LogId::from_bytes(*id) }, files })
    }
}
