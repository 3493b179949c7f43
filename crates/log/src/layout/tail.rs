//! What follows the records: the index's start, the footer and the seal.

use model::{Consistency, LogClass, Progress};

use super::{
    CRC_BYTES, END_MAGIC, EXTENT_BYTES, FOOTER_BYTES, FOOTER_TAG, INDEX_HEAD_BYTES, INDEX_TAG, SEAL_BYTES,
    TRAILER_BYTES, reserved,
};
use crate::encode::Summary;
use crate::error::ErrorKind;
use crate::types::Footer;

mod index {
    use crate::layout::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    pub(super) const RECORDS: Field<4> = Field::after(TAG);
    pub(super) const EXTENTS: Field<4> = Field::after(RECORDS);
    pub(super) const RESERVED: Field<4> = Field::after(EXTENTS);
    const _: () = assert!(RESERVED.end() == super::INDEX_HEAD_BYTES);
}

mod footer {
    use crate::layout::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    pub(super) const CLASS: Field<1> = Field::after(TAG);
    pub(super) const RESERVED: Field<3> = Field::after(CLASS);
    pub(super) const COVERED_BYTES: Field<8> = Field::after(RESERVED);
    pub(super) const TOTAL_BYTES: Field<8> = Field::after(COVERED_BYTES);
    pub(super) const INDEX_POSITION: Field<8> = Field::after(TOTAL_BYTES);
    pub(super) const DATA_BYTES: Field<8> = Field::after(INDEX_POSITION);
    pub(super) const ZERO_BYTES: Field<8> = Field::after(DATA_BYTES);
    pub(super) const RECORDS: Field<4> = Field::after(ZERO_BYTES);
    pub(super) const EXTENTS: Field<4> = Field::after(RECORDS);
    const _: () = assert!(EXTENTS.end() == super::FOOTER_BYTES);
}

mod seal {
    use crate::layout::Field;
    pub(super) const HASH: Field<32> = Field::FIRST;
    pub(super) const CRC: Field<4> = Field::after(HASH);
    pub(super) const END_MAGIC: Field<4> = Field::after(CRC);
    const _: () = assert!(END_MAGIC.end() == super::SEAL_BYTES);
}

/// The start of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IndexHead {
    pub records: u32,
    pub extents: u32,
}

impl IndexHead {
    /// The bytes between the index's head and its CRC.
    pub const fn unit_bytes(&self) -> u64 {
        (self.records as u64 + self.extents as u64) * EXTENT_BYTES as u64
    }

    /// The bytes of the whole index.
    pub const fn index_bytes(&self) -> u64 {
        (INDEX_HEAD_BYTES + CRC_BYTES) as u64 + self.unit_bytes()
    }

    pub fn encode(&self) -> [u8; INDEX_HEAD_BYTES] {
        let mut part = [0; INDEX_HEAD_BYTES];
        index::TAG.put(&mut part, INDEX_TAG);
        index::RECORDS.put(&mut part, self.records.to_le_bytes());
        index::EXTENTS.put(&mut part, self.extents.to_le_bytes());
        part
    }

    pub fn decode(part: &[u8; INDEX_HEAD_BYTES]) -> Result<Self, ErrorKind> {
        if index::TAG.get(part) != INDEX_TAG {
            return Err(ErrorKind::BadTag("index"));
        }
        reserved(&index::RESERVED.get(part))?;
        Ok(Self {
            records: u32::from_le_bytes(index::RECORDS.get(part)),
            extents: u32::from_le_bytes(index::EXTENTS.get(part)),
        })
    }
}

/// What the footer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FooterPart {
    pub footer: Footer,
    pub index_position: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    pub index: IndexHead,
}

impl FooterPart {
    pub fn encode(&self) -> [u8; FOOTER_BYTES] {
        let mut part = [0; FOOTER_BYTES];
        let class = match self.footer.class {
            LogClass::Partial => 0,
            LogClass::Point(Consistency::Crash) => 1,
            LogClass::Point(Consistency::Application) => 2,
        };
        footer::TAG.put(&mut part, FOOTER_TAG);
        footer::CLASS.put(&mut part, [class]);
        footer::COVERED_BYTES.put(&mut part, self.footer.progress.covered_bytes.to_le_bytes());
        footer::TOTAL_BYTES.put(&mut part, self.footer.progress.total_bytes.to_le_bytes());
        footer::INDEX_POSITION.put(&mut part, self.index_position.to_le_bytes());
        footer::DATA_BYTES.put(&mut part, self.data_bytes.to_le_bytes());
        footer::ZERO_BYTES.put(&mut part, self.zero_bytes.to_le_bytes());
        footer::RECORDS.put(&mut part, self.index.records.to_le_bytes());
        footer::EXTENTS.put(&mut part, self.index.extents.to_le_bytes());
        part
    }

    /// Decodes a footer whose CRC is right.
    pub fn decode(part: &[u8; FOOTER_BYTES]) -> Result<Self, ErrorKind> {
        if footer::TAG.get(part) != FOOTER_TAG {
            return Err(ErrorKind::BadTag("footer"));
        }
        reserved(&footer::RESERVED.get(part))?;
        let class = match footer::CLASS.get(part)[0] {
            0 => LogClass::Partial,
            1 => LogClass::Point(Consistency::Crash),
            2 => LogClass::Point(Consistency::Application),
            _ => return Err(ErrorKind::Field("class")),
        };
        let progress = Progress {
            covered_bytes: u64::from_le_bytes(footer::COVERED_BYTES.get(part)),
            total_bytes: u64::from_le_bytes(footer::TOTAL_BYTES.get(part)),
        };
        let footer = Footer { class, progress };
        check_footer(&footer)?;
        Ok(Self {
            footer,
            index_position: u64::from_le_bytes(footer::INDEX_POSITION.get(part)),
            data_bytes: u64::from_le_bytes(footer::DATA_BYTES.get(part)),
            zero_bytes: u64::from_le_bytes(footer::ZERO_BYTES.get(part)),
            index: IndexHead {
                records: u32::from_le_bytes(footer::RECORDS.get(part)),
                extents: u32::from_le_bytes(footer::EXTENTS.get(part)),
            },
        })
    }
}

impl FooterPart {
    /// The bytes of the whole log.
    pub const fn total_bytes(&self) -> u64 {
        self.index_position.saturating_add(self.index.index_bytes() + TRAILER_BYTES as u64)
    }

    /// The log in figures.
    pub const fn summary(&self, hash: [u8; 32]) -> Summary {
        Summary {
            total_bytes: self.total_bytes(),
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            records: self.index.records,
            extents: self.index.extents,
            hash,
        }
    }
}

/// What both sides demand of a footer.
pub(crate) const fn check_footer(footer: &Footer) -> Result<(), ErrorKind> {
    if footer.progress.covered_bytes > footer.progress.total_bytes {
        return Err(ErrorKind::Field("progress"));
    }
    Ok(())
}

/// The last bytes of a log.
pub(crate) fn encode_seal(footer: &[u8; FOOTER_BYTES], hash: [u8; 32]) -> [u8; SEAL_BYTES] {
    let mut part = [0; SEAL_BYTES];
    seal::HASH.put(&mut part, hash);
    seal::CRC.put(&mut part, seal_crc(footer, &hash));
    seal::END_MAGIC.put(&mut part, END_MAGIC);
    part
}

/// Checks a seal's own checksum and gives the hash that it claims for the whole.
pub(crate) fn decode_seal(
    footer: &[u8; FOOTER_BYTES],
    part: &[u8; SEAL_BYTES],
) -> Result<[u8; 32], ErrorKind> {
    let hash = seal::HASH.get(part);
    if seal::END_MAGIC.get(part) != END_MAGIC {
        return Err(ErrorKind::BadTag("end"));
    }
    if seal::CRC.get(part) != seal_crc(footer, &hash) {
        return Err(ErrorKind::FooterCrc);
    }
    Ok(hash)
}

fn seal_crc(footer: &[u8; FOOTER_BYTES], hash: &[u8; 32]) -> [u8; 4] {
    crc32c::crc32c_append(crc32c::crc32c(footer), hash).to_le_bytes()
}
