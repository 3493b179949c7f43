//! The bounds of format v1. They hold on both sides: nobody may write what nobody would read.

/// Bytes of disk in one record, at most; a zero record has none and may cover any length.
pub const RECORD_RAW_BYTES_MAX: usize = 256 * 1024;
/// Bytes of payload in one record, at most: what does not compress is stored as it is.
pub const RECORD_STORED_BYTES_MAX: usize = RECORD_RAW_BYTES_MAX;
/// Extents in one record, at most.
pub const RECORD_EXTENTS_MAX: usize = 4096;
/// Records in one log, at most: 32 MiB in memory.
pub const RECORDS_MAX: usize = 1 << 20;
/// Extents in one log, at most: 64 MiB in memory. A primary cuts its logs at a quarter of it.
pub const EXTENTS_MAX: usize = 1 << 22;
/// Disks of one VM, at most.
pub const DISKS_MAX: usize = 256;
/// Bytes of a disk's name, at most; the same as `model`'s.
pub const DISK_NAME_BYTES_MAX: usize = 64;
/// Data that is zero is left out in aligned blocks of this many bytes.
pub const ZERO_BLOCK_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::DISK_NAME_BYTES_MAX;

    #[test]
    fn every_name_that_a_disk_may_have_fits() {
        assert!("x".repeat(DISK_NAME_BYTES_MAX).parse::<model::DiskName>().is_ok());
        assert!("x".repeat(DISK_NAME_BYTES_MAX + 1).parse::<model::DiskName>().is_err());
    }
}
