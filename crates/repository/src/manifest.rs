//! The manifest: what a backup says of itself, beside the disks. `docs/format/backup-v1.md` has it field by
//! field.

use model::{Consistency, DiskName, LogId, LogNumber, PointInfo, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};

/// The manifest's format.
pub(crate) const FORMAT: u32 = 1;
/// The name of the manifest's file in a backup.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// The name of the file with the VM's definition.
pub(crate) const DEFINITION_FILE: &str = "definition.json";

/// One disk of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Its name; the file is `<name>.raw`.
    pub name: DiskName,
    /// Its size.
    pub size_bytes: u64,
    /// How many chunks it is.
    pub chunks: u64,
    /// The digest over its size and its chunks' hashes and lengths, in hexadecimal.
    pub digest: String,
}

impl BackupDisk {
    /// The name of the disk's file in the backup.
    pub(crate) fn raw_file(&self) -> String {
        format!("{}.raw", self.name)
    }

    /// The name of the file with the lengths of its chunks.
    pub(crate) fn lengths_file(&self) -> String {
        format!("{}.chunks", self.name)
    }
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
