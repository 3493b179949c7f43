//! A record's head and extents, and what the index repeats of them.

use super::{EXTENT_BYTES, INDEX_ENTRY_BYTES, RECORD_HEAD_BYTES, RECORD_TAG, reserved};
use crate::error::ErrorKind;
use crate::types::{Encoding, Extent, RecordEntry};

mod head {
    use crate::layout::Field;
    pub(super) const TAG: Field<4> = Field::FIRST;
    /// What the index repeats.
    pub(super) const ENTRY: Field<{ super::INDEX_ENTRY_BYTES }> = Field::after(TAG);
    pub(super) const CRC: Field<4> = Field::after(ENTRY);
    const _: () = assert!(CRC.end() == super::RECORD_HEAD_BYTES);
}

mod entry {
    use crate::layout::Field;
    pub(super) const DISK: Field<2> = Field::FIRST;
    pub(super) const ENCODING: Field<1> = Field::after(DISK);
    pub(super) const RESERVED: Field<1> = Field::after(ENCODING);
    pub(super) const EXTENTS: Field<4> = Field::after(RESERVED);
    pub(super) const STORED_BYTES: Field<4> = Field::after(EXTENTS);
    pub(super) const RAW_BYTES: Field<4> = Field::after(STORED_BYTES);
    const _: () = assert!(RAW_BYTES.end() == super::INDEX_ENTRY_BYTES);
}

mod extent {
    use crate::layout::Field;
    pub(super) const OFFSET: Field<8> = Field::FIRST;
    pub(super) const LEN: Field<8> = Field::after(OFFSET);
    const _: () = assert!(LEN.end() == super::EXTENT_BYTES);
    const _: () = assert!(super::EXTENT_BYTES == super::INDEX_ENTRY_BYTES);
}

/// A record without its extents and payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordHead {
    pub disk: u16,
    pub encoding: Encoding,
    pub extents: u32,
    pub stored_bytes: u32,
    pub raw_bytes: u32,
}

impl RecordHead {
    pub fn of(entry: &RecordEntry) -> Self {
        Self {
            disk: entry.disk,
            encoding: entry.encoding,
            extents: entry.extents.end.wrapping_sub(entry.extents.start),
            stored_bytes: entry.stored_bytes,
            raw_bytes: entry.raw_bytes,
        }
    }

    /// The bytes of its extents in the file.
    pub const fn extent_bytes(&self) -> usize {
        self.extents as usize * EXTENT_BYTES
    }

    /// The bytes of the whole record in the file.
    pub const fn record_bytes(&self) -> u64 {
        (RECORD_HEAD_BYTES + self.extent_bytes()) as u64 + self.stored_bytes as u64
    }

    /// As the index has it.
    pub fn encode_entry(&self) -> [u8; INDEX_ENTRY_BYTES] {
        let mut part = [0; INDEX_ENTRY_BYTES];
        let encoding = match self.encoding {
            Encoding::Zero => 0,
            Encoding::Stored => 1,
            Encoding::Zstd => 2,
        };
        entry::DISK.put(&mut part, self.disk.to_le_bytes());
        entry::ENCODING.put(&mut part, [encoding]);
        entry::EXTENTS.put(&mut part, self.extents.to_le_bytes());
        entry::STORED_BYTES.put(&mut part, self.stored_bytes.to_le_bytes());
        entry::RAW_BYTES.put(&mut part, self.raw_bytes.to_le_bytes());
        part
    }

    pub fn decode_entry(part: &[u8; INDEX_ENTRY_BYTES]) -> Result<Self, ErrorKind> {
        reserved(&entry::RESERVED.get(part))?;
        let encoding = match entry::ENCODING.get(part)[0] {
            0 => Encoding::Zero,
            1 => Encoding::Stored,
            2 => Encoding::Zstd,
            _ => return Err(ErrorKind::Field("encoding")),
        };
        Ok(Self {
            disk: u16::from_le_bytes(entry::DISK.get(part)),
            encoding,
            extents: u32::from_le_bytes(entry::EXTENTS.get(part)),
            stored_bytes: u32::from_le_bytes(entry::STORED_BYTES.get(part)),
            raw_bytes: u32::from_le_bytes(entry::RAW_BYTES.get(part)),
        })
    }

    /// A record's bytes up to its payload, with the CRC over all of it.
    pub fn encode(&self, extents: &[Extent], payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; RECORD_HEAD_BYTES];
        head::TAG.put(&mut bytes, RECORD_TAG);
        head::ENTRY.put(&mut bytes, self.encode_entry());
        bytes.extend(extents.iter().flat_map(encode_extent));
        let crc = crc32c::crc32c(&bytes[..head::CRC.at]);
        let crc = crc32c::crc32c_append(crc, &bytes[RECORD_HEAD_BYTES..]);
        head::CRC.put(&mut bytes, crc32c::crc32c_append(crc, payload).to_le_bytes());
        bytes
    }

    /// Decodes a record's head; also the CRC it claims and the CRC of the head itself, to be continued
    /// over extents and payload.
    pub fn decode(part: &[u8; RECORD_HEAD_BYTES]) -> Result<(Self, RecordCrc), ErrorKind> {
        if head::TAG.get(part) != RECORD_TAG {
            return Err(ErrorKind::BadTag("record"));
        }
        let claimed = u32::from_le_bytes(head::CRC.get(part));
        let crc = RecordCrc { claimed, found: crc32c::crc32c(&part[..head::CRC.at]) };
        Ok((Self::decode_entry(&head::ENTRY.get(part))?, crc))
    }
}

/// A record's checksum while it is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecordCrc {
    claimed: u32,
    found: u32,
}

impl RecordCrc {
    pub fn add(&mut self, bytes: &[u8]) {
        self.found = crc32c::crc32c_append(self.found, bytes);
    }

    pub fn check(self) -> Result<(), ErrorKind> {
        if self.claimed == self.found { Ok(()) } else { Err(ErrorKind::RecordCrc) }
    }
}

pub(crate) fn encode_extent(extent: &Extent) -> [u8; EXTENT_BYTES] {
    let mut part = [0; EXTENT_BYTES];
    extent::OFFSET.put(&mut part, extent.offset.to_le_bytes());
    extent::LEN.put(&mut part, extent.len.to_le_bytes());
    part
}

/// The extents in these bytes, whose length is a multiple of [`EXTENT_BYTES`].
pub(crate) fn decode_extents(bytes: &[u8]) -> impl Iterator<Item = Extent> {
    bytes.chunks_exact(EXTENT_BYTES).map(|part| Extent {
        offset: u64::from_le_bytes(extent::OFFSET.get(part)),
        len: u64::from_le_bytes(extent::LEN.get(part)),
    })
}
