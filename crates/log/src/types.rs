//! What a log says, apart from how its bytes are laid out.

use std::ops::Range;

use model::{DiskName, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId};

/// What is known of a log before its first record is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The VM.
    pub vm: VmId,
    /// This log.
    pub id: LogId,
    /// Its place in the chain, from 1.
    pub number: LogNumber,
    /// The id of log `number - 1`; [`LogId::NONE`] for the first.
    pub predecessor: LogId,
    /// The moment whose after-images the log holds.
    pub moment: Timestamp,
    /// What the log was made for.
    pub purpose: Purpose,
    /// The VM's disks; records name them by their place in this list.
    pub disks: Vec<DiskInfo>,
}

/// One disk of the VM at the log's moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What is known of a log only after its last record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Whether the log makes a recovery point, and of what consistency.
    pub class: LogClass,
    /// How far the pass is to which a log of an initial replication or resynchronization belongs.
    pub progress: Progress,
}

/// A run of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Where it starts on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub len: u64,
}

impl Extent {
    /// The first byte after it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// How a record's bytes are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// All extents of the record read as zeros; nothing is stored.
    Zero,
    /// The bytes of all extents one after the other, as they are (they did not compress).
    Stored,
    /// The same in one zstd frame.
    Zstd,
}

/// One record as the index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordEntry {
    /// The disk, by its place in the header.
    pub disk: u16,
    /// How the payload is stored.
    pub encoding: Encoding,
    /// Where the record starts in the log file.
    pub position: u64,
    /// The payload's bytes in the file.
    pub stored_bytes: u32,
    /// The bytes of all extents together (0 for [`Encoding::Zero`]).
    pub raw_bytes: u32,
    /// Which of [`Index::extents`] are this record's.
    pub extents: Range<u32>,
}

/// What a log holds and where: enough for a random read. Extents are sorted and disjoint within a
/// record; no byte of a disk is in two records of one log.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    /// The records, in file order.
    pub records: Vec<RecordEntry>,
    /// The extents of all records, in the records' order.
    pub extents: Vec<Extent>,
}

impl Index {
    /// The extents of one record. The payload is their bytes, one after the other.
    #[must_use]
    pub fn extents_of(&self, record: &RecordEntry) -> &[Extent] {
        &self.extents[record.extents.start as usize..record.extents.end as usize]
    }
}
