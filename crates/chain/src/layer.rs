//! One log as the chain sees it, and whether its index can be believed.

use std::fmt;

use log::{Encoding, Extent, Header, Index, RecordEntry};
use model::{DiskName, LogNumber};

use crate::packed::{Packed, push_joined};

/// One log of a chain: its number, its index and what its disks are called here.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// The log's number; among layers the greatest outranks all others.
    pub number: LogNumber,
    /// What the log holds.
    pub index: &'a Index,
    /// One for each disk of the log's header, in its order.
    pub disks: &'a [LayerDisk],
}

/// A disk of a log's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerDisk {
    /// Its place in the caller's list of disks; none if the caller has no use for it.
    pub disk: Option<usize>,
    /// Its size at the log's moment, in bytes. A smaller size than in an older log cuts that disk off
    /// there, a greater one adds zeros.
    pub size_bytes: u64,
}

/// The disks of `header` as places in `chain`, matched by name.
#[must_use]
pub fn match_disks(header: &Header, chain: &[DiskName]) -> Vec<LayerDisk> {
    let place = |name| chain.iter().position(|disk| disk == name);
    header
        .disks
        .iter()
        .map(|disk| LayerDisk { disk: place(&disk.name), size_bytes: disk.size_bytes })
        .collect()
}

/// A log's index contradicts itself or the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the index of log {log} cannot be used: {fault}; verify the log's file, and resynchronize the VM if it is damaged"
)]
pub struct IndexError {
    /// The log.
    pub log: LogNumber,
    /// What is wrong with it.
    pub fault: IndexFault,
}

/// What is wrong with an index. Records and disks are places in the index and in the log's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexFault {
    /// A record names a disk that the log or the chain does not have.
    NoSuchDisk {
        /// The record.
        record: usize,
        /// The place named.
        disk: usize,
    },
    /// A record's extents are not in the index, or it has more records than can be counted.
    NoSuchExtents {
        /// The record.
        record: usize,
    },
    /// A record's extents do not add up to its payload.
    RawBytes {
        /// The record.
        record: usize,
    },
    /// An extent is empty or ends beyond its disk.
    BeyondDisk {
        /// The disk.
        disk: usize,
        /// Where the extent starts, in bytes.
        offset: u64,
    },
    /// A byte of a disk is in the log twice.
    Overlap {
        /// The disk, by its place in the chain.
        disk: usize,
        /// Where the second extent starts, in bytes.
        offset: u64,
    },
    /// The log was given twice.
    GivenTwice,
}

impl IndexFault {
    /// The stable code, for scripts.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::NoSuchDisk { .. } => "index-no-such-disk",
            Self::NoSuchExtents { .. } => "index-no-such-extents",
            Self::RawBytes { .. } => "index-raw-bytes",
            Self::BeyondDisk { .. } => "index-beyond-disk",
            Self::Overlap { .. } => "index-overlap",
            Self::GivenTwice => "index-given-twice",
        }
    }
}

impl fmt::Display for IndexFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchDisk { record, disk } => {
                write!(f, "record {record} is for disk {disk}, which is not there")
            }
            Self::NoSuchExtents { record } => {
                write!(f, "record {record} has extents that the index does not list")
            }
            Self::RawBytes { record } => {
                write!(f, "the extents of record {record} do not add up to its payload")
            }
            Self::BeyondDisk { disk, offset } => {
                write!(f, "the extent at offset {offset} of disk {disk} is empty or ends beyond the disk")
            }
            Self::Overlap { disk, offset } => write!(f, "offset {offset} of disk {disk} is in it twice"),
            Self::GivenTwice => f.write_str("it was given twice"),
        }
    }
}

impl Layer<'_> {
    /// The log's pieces for each of the chain's `disks` disks: sorted, disjoint and within the disk.
    pub(crate) fn runs(&self, disks: usize, slot: u32) -> Result<Vec<Vec<Packed>>, IndexError> {
        let mut runs = vec![Vec::new(); disks];
        for (place, record) in self.index.records.iter().enumerate() {
            self.add_record(place, record, slot, &mut runs).map_err(|fault| self.error(fault))?;
        }
        for (disk, run) in runs.iter_mut().enumerate() {
            if !run.is_sorted_by_key(|piece| piece.offset) {
                run.sort_unstable_by_key(|piece| piece.offset);
            }
            if let Some(pair) = run.windows(2).find(|pair| pair[0].end() > pair[1].offset) {
                return Err(self.error(IndexFault::Overlap { disk, offset: pair[1].offset }));
            }
        }
        Ok(runs)
    }

    pub(crate) const fn error(&self, fault: IndexFault) -> IndexError {
        IndexError { log: self.number, fault }
    }

    fn add_record(
        &self,
        place: usize,
        record: &RecordEntry,
        slot: u32,
        runs: &mut [Vec<Packed>],
    ) -> Result<(), IndexFault> {
        let (number, extents) = self.checked_extents(place, record)?;
        let disk = usize::from(record.disk);
        let named = self.disks.get(disk).ok_or(IndexFault::NoSuchDisk { record: place, disk })?;
        let Some(mapped) = named.disk else { return Ok(()) };
        let run = runs.get_mut(mapped).ok_or(IndexFault::NoSuchDisk { record: place, disk: mapped })?;
        let mut skip = 0_u32;
        for extent in extents {
            let end = extent.offset.saturating_add(extent.len);
            if extent.len == 0 || end > named.size_bytes {
                return Err(IndexFault::BeyondDisk { disk, offset: extent.offset });
            }
            if record.encoding == Encoding::Zero {
                push_joined(run, Packed::zeros(extent.offset, extent.len, slot));
                continue;
            }
            let raw_bytes = IndexFault::RawBytes { record: place };
            let len = u32::try_from(extent.len).map_err(|_| raw_bytes)?;
            let next = skip.checked_add(len).filter(|&next| next <= record.raw_bytes).ok_or(raw_bytes)?;
            push_joined(run, Packed::record(extent.offset, len, slot, number, skip));
            skip = next;
        }
        if skip == record.raw_bytes { Ok(()) } else { Err(IndexFault::RawBytes { record: place }) }
    }

    fn checked_extents(&self, place: usize, record: &RecordEntry) -> Result<(u32, &[Extent]), IndexFault> {
        let missing = IndexFault::NoSuchExtents { record: place };
        let range = record.extents.start as usize..record.extents.end as usize;
        let extents = self.index.extents.get(range).ok_or(missing)?;
        match u32::try_from(place) {
            Ok(number) if number < u32::MAX => Ok((number, extents)),
            _ => Err(missing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(disk: u16, encoding: Encoding, raw_bytes: u32, extents: &[(u64, u64)]) -> Index {
        let extents: Vec<_> = extents.iter().map(|&(offset, len)| Extent { offset, len }).collect();
        let count = u32::try_from(extents.len()).unwrap();
        let record = RecordEntry {
            disk,
            encoding,
            position: 0,
            stored_bytes: raw_bytes,
            raw_bytes,
            extents: 0..count,
        };
        Index { records: vec![record], extents }
    }

    fn fault(index: &Index) -> Option<&'static str> {
        let disks = [LayerDisk { disk: Some(0), size_bytes: 100 }];
        let layer = Layer { number: LogNumber(3), index, disks: &disks };
        layer.runs(1, 0).err().map(|error| error.fault.code())
    }

    #[test]
    fn an_index_that_contradicts_itself_is_an_error_never_a_panic() {
        let stored = Encoding::Stored;
        assert_eq!(fault(&index(0, stored, 30, &[(0, 10), (20, 20)])), None);
        assert_eq!(fault(&index(1, stored, 10, &[(0, 10)])), Some("index-no-such-disk"));
        assert_eq!(fault(&index(0, stored, 11, &[(0, 10)])), Some("index-raw-bytes"));
        assert_eq!(fault(&index(0, stored, 9, &[(0, 10)])), Some("index-raw-bytes"));
        assert_eq!(fault(&index(0, Encoding::Zero, 9, &[(0, 10)])), Some("index-raw-bytes"));
        assert_eq!(fault(&index(0, stored, 10, &[(95, 10)])), Some("index-beyond-disk"));
        assert_eq!(fault(&index(0, stored, 10, &[(u64::MAX, 10)])), Some("index-beyond-disk"));
        assert_eq!(fault(&index(0, Encoding::Zero, 0, &[(5, 0)])), Some("index-beyond-disk"));
        assert_eq!(fault(&index(0, stored, 20, &[(5, 10), (0, 10)])), Some("index-overlap"));
        let mut beyond = index(0, stored, 10, &[(0, 10)]);
        beyond.records[0].extents = 0..2;
        assert_eq!(fault(&beyond), Some("index-no-such-extents"));
        #[expect(clippy::reversed_empty_ranges, reason = "that is what is tried")]
        let backwards = 1..0;
        beyond.records[0].extents = backwards;
        assert_eq!(fault(&beyond), Some("index-no-such-extents"));
    }
}
