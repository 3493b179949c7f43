//! What a backup reads.

use std::io;
use std::ops::Range;

use model::gate::Admission;
use model::{DiskName, LogNumber};

/// One disk of what is backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceDisk {
    /// Its name: it is `<name>.raw` in the backup.
    pub name: DiskName,
    /// Its size; any number of bytes.
    pub size_bytes: u64,
}

/// The disks of one VM at one recovery point, as the gate has admitted them to be read.
///
/// A backup takes nothing else, and only the gate makes an [`Admission`]: so what was not admitted
/// cannot be backed up. Called from several threads at once.
pub trait Source: Sync {
    /// What the gate has admitted.
    fn admission(&self) -> &Admission;

    /// The disks, in a fixed order; the other functions name a disk by its place in it.
    fn disks(&self) -> &[SourceDisk];

    /// What of `range` is not certainly zero: in order, disjoint, within `range`. The rest is not read.
    fn data_extents(&self, disk: usize, range: Range<u64>) -> io::Result<Vec<Range<u64>>>;

    /// What has changed since the point `parent`, in order and disjoint; none if that is not known.
    /// It may name more than has changed, never less; where a disk has shrunk and grown again in between, the
    /// zeros that it grew by are a change.
    fn changed_since(&self, disk: usize, parent: LogNumber) -> io::Result<Option<Vec<Range<u64>>>>;

    /// Fills `buffer` with the disk's bytes from `offset`; it never reaches past the end of the disk.
    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Whether everything read so far was right to be read: the pin or the hold was in force all the while.
    /// Asked once, when all data is durable, before the backup is listed. An error says why not.
    fn still_valid(&self) -> Result<(), String>;
}
