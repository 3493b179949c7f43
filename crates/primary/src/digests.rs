//! The replica's side of a compare.

use std::ops::Range;

use model::{DiskName, VmId};
use wire::{DigestRequest, block_digest, zero_digest};

use crate::error::Failure;
use crate::ports::Remote;

/// Blocks of this many bytes are compared: 16 bytes of digest for each, so that a compare of equal
/// disks sends 0.025 % of them.
pub(crate) const BLOCK_BYTES: u64 = 64 * 1024;

/// Asks the replica for the digests of its newest state.
pub(crate) struct Digests<'a, R> {
    pub remote: &'a R,
    pub vm: VmId,
}

/// The digests of one stretch of one disk.
pub(crate) struct Stretch {
    offset: u64,
    digests: Vec<[u8; 16]>,
}

impl<R: Remote> Digests<'_, R> {
    /// The digests of `range`, which starts at a whole block.
    pub async fn of(&self, disk: &DiskName, range: Range<u64>) -> Result<Stretch, Failure> {
        let request = DigestRequest {
            disk: disk.clone(),
            offset: range.start,
            len: range.end - range.start,
            block_bytes: BLOCK_BYTES,
        };
        let digests = self.remote.digests(self.vm, &request).await?;
        Ok(Stretch { offset: range.start, digests })
    }
}

impl Stretch {
    fn at(&self, offset: u64) -> Option<&[u8; 16]> {
        self.digests.get(usize::try_from((offset - self.offset) / BLOCK_BYTES).ok()?)
    }

    /// Whether the replica has these bytes there.
    pub fn matches(&self, offset: u64, block: &[u8]) -> bool {
        self.at(offset) == Some(&block_digest(block))
    }

    /// Whether the replica has zeros there.
    pub fn is_zero(&self, offset: u64, len: u64) -> bool {
        self.at(offset) == Some(&zero_digest(len))
    }
}
