//! The index of a log as a row of units: each record's head, then its extents.

use crate::error::ErrorKind;
use crate::layout::{CRC_BYTES, EXTENT_BYTES, IndexHead, RecordHead, encode_extent};
use crate::types::Index;

/// Goes through the units of an index.
#[derive(Debug, Default)]
pub(crate) struct Units {
    record: usize,
    extents: std::ops::Range<u32>,
}

impl Units {
    pub fn next(&mut self, index: &Index) -> Option<[u8; EXTENT_BYTES]> {
        if let Some(place) = self.extents.next() {
            return index.extents.get(place as usize).map(encode_extent);
        }
        let record = index.records.get(self.record)?;
        self.record += 1;
        self.extents = record.extents.clone();
        Some(RecordHead::of(record).encode_entry())
    }
}

/// Compares an index that arrives with the one made from the records: no second copy is kept.
#[derive(Debug)]
pub(crate) struct IndexCheck {
    units: Units,
    left: u64,
    crc: u32,
    /// A unit, or at the end the CRC, that has not arrived whole.
    part: Vec<u8>,
    same: bool,
}

impl IndexCheck {
    /// After the index's head, whose bytes are `bytes`.
    pub fn new(head: IndexHead, bytes: &[u8]) -> Self {
        Self {
            units: Units::default(),
            left: u64::from(head.records) + u64::from(head.extents),
            crc: crc32c::crc32c(bytes),
            part: Vec::with_capacity(EXTENT_BYTES),
            same: true,
        }
    }

    /// Takes what is the index's of `bytes` and gives the rest; none if the index goes on.
    pub fn feed<'b>(&mut self, mut bytes: &'b [u8], index: &Index) -> Result<Option<&'b [u8]>, ErrorKind> {
        while self.left > 0 {
            if self.part.is_empty() && bytes.len() >= EXTENT_BYTES {
                let whole = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len() / EXTENT_BYTES);
                let (now, later) = bytes.split_at(whole * EXTENT_BYTES);
                self.compare(now, index);
                bytes = later;
            } else if self.fill(&mut bytes, EXTENT_BYTES) {
                let unit = std::mem::take(&mut self.part);
                self.compare(&unit, index);
            } else {
                return Ok(None);
            }
        }
        if !self.fill(&mut bytes, CRC_BYTES) {
            return Ok(None);
        }
        if self.part != self.crc.to_le_bytes() {
            return Err(ErrorKind::IndexCrc);
        }
        if self.same { Ok(Some(bytes)) } else { Err(ErrorKind::IndexMismatch) }
    }

    fn fill(&mut self, bytes: &mut &[u8], wanted: usize) -> bool {
        let (now, later) = bytes.split_at(bytes.len().min(wanted - self.part.len()));
        self.part.extend_from_slice(now);
        *bytes = later;
        self.part.len() == wanted
    }

    /// A difference is reported only after the CRC: damage is the likelier cause of it.
    fn compare(&mut self, units: &[u8], index: &Index) {
        self.crc = crc32c::crc32c_append(self.crc, units);
        for unit in units.chunks_exact(EXTENT_BYTES) {
            self.same &= self.units.next(index).is_some_and(|expected| expected == unit);
            self.left -= 1;
        }
    }
}
