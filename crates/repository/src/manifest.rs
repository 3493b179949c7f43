//! The manifest: what a backup says of itself, beside the disks. `docs/format/backup-v1.md` has it field by
//! field.

use model::{Consistency, DiskName, LogId, LogNumber, PointInfo, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::id::Id;

/// The manifest's format.
pub(crate) const FORMAT: u32 = 1;
/// The name of the manifest's file in a backup.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// The name of the file with the VM's definition.
pub(crate) const DEFINITION_FILE: &str = "definition.json";

/// The smallest chunk. Below it the lists grow and compression suffers; above it a small change costs more.
pub(crate) const CHUNK_BYTES_MIN: u32 = 256 * 1024;
/// The largest chunk, as restic's.
pub(crate) const CHUNK_BYTES_MAX: u32 = 8 * 1024 * 1024;
/// A disk's list of chunks is kept within this many, until chunks are at their largest.
const CHUNKS_MAX: u64 = 1 << 20;

/// The size of chunks for a disk of this size: the smallest power of two that keeps the list in bounds.
pub(crate) fn chunk_bytes_for(disk_size_bytes: u64) -> u32 {
    let mut chunk = CHUNK_BYTES_MIN;
    while chunk < CHUNK_BYTES_MAX && disk_size_bytes.div_ceil(u64::from(chunk)) > CHUNKS_MAX {
        chunk *= 2;
    }
    chunk
}

/// Whether a parent's chunk size still serves a disk that has this size now. Another size means that
/// everything is read again, so a list may grow to twice the bound first.
pub(crate) fn chunk_bytes_still_serve(chunk_bytes: u32, disk_size_bytes: u64) -> bool {
    let wanted = chunk_bytes_for(disk_size_bytes);
    chunk_bytes.is_power_of_two() && (chunk_bytes == wanted || chunk_bytes.checked_mul(2) == Some(wanted))
}

/// One disk of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Its name; the file is `<name>.raw`.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// The size of its chunks; the last one is shorter if it must be.
    pub chunk_bytes: u32,
    /// The digest over its size and its chunks' hashes, in hexadecimal.
    pub digest: String,
}

impl BackupDisk {
    /// The name of the disk's file in the backup.
    pub(crate) fn file_name(&self) -> String {
        raw_file_name(&self.name)
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.chunk_bytes.max(1)))
    }
}

/// The name of a disk's file in the backup.
pub(crate) fn raw_file_name(name: &DiskName) -> String {
    format!("{name}.raw")
}

/// The manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    pub(crate) vm: VmId,
    pub(crate) vm_name: VmName,
    pub(crate) point: LogId,
    pub(crate) number: LogNumber,
    /// Microseconds since 1970.
    pub(crate) taken_at: Timestamp,
    pub(crate) consistency: Consistency,
    pub(crate) made_at: Timestamp,
    pub(crate) disks: Vec<BackupDisk>,
}

impl Manifest {
    pub(crate) fn point_info(&self) -> PointInfo {
        PointInfo {
            id: self.point,
            number: self.number,
            taken_at: self.taken_at,
            consistency: self.consistency,
        }
    }
}

/// A disk's digest: from the hashes of its chunks alone, so that an incremental backup need not read what
/// has not changed.
pub(crate) fn digest(size_bytes: u64, chunk_bytes: u32, chunks: &[Id]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(b"afterimage disk v1\n");
    hasher.update(size_bytes.to_le_bytes());
    hasher.update(chunk_bytes.to_le_bytes());
    for chunk in chunks {
        hasher.update(chunk.0);
    }
    hex::encode(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_stay_within_a_million_chunks() {
        const GIB: u64 = 1 << 30;
        assert_eq!(chunk_bytes_for(0), 256 << 10);
        assert_eq!(chunk_bytes_for(256 * GIB), 256 << 10);
        assert_eq!(chunk_bytes_for(256 * GIB + 1), 512 << 10);
        assert_eq!(chunk_bytes_for(2048 * GIB), 2 << 20);
        assert_eq!(chunk_bytes_for(u64::MAX), 8 << 20);
        assert!(chunk_bytes_still_serve(256 << 10, 300 * GIB));
        assert!(!chunk_bytes_still_serve(256 << 10, 600 * GIB));
        assert!(!chunk_bytes_still_serve(0, 1));
        assert!(!chunk_bytes_still_serve(3, 1));
    }
}
