//! How a disk is cut into chunks.

use std::ops::Range;

use crate::id::Id;

/// A disk's size, the size of its chunks, and what chunks of zeros are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) size_bytes: u64,
    pub(crate) chunk_bytes: u32,
    /// The hash of a whole chunk of zeros.
    pub(crate) zeros: Id,
    /// The hash of the last chunk if that is all zeros.
    zero_tail: Id,
}

impl Shape {
    /// The shape of a disk. `chunk_bytes` is at least 1.
    pub(crate) fn new(size_bytes: u64, chunk_bytes: u32) -> Self {
        let bytes = vec![0; chunk_bytes as usize];
        let zeros = Id::of(&bytes);
        let zero_tail = match index_of(size_bytes % u64::from(chunk_bytes)) {
            0 => zeros,
            tail => Id::of(&bytes[..tail]),
        };
        Self { size_bytes, chunk_bytes, zeros, zero_tail }
    }

    pub(crate) fn chunk_count(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.chunk_bytes))
    }

    /// The bytes of these chunks; the disk's last one may be short.
    pub(crate) fn bytes_of(&self, chunks: &Range<u64>) -> Range<u64> {
        let chunk_bytes = u64::from(self.chunk_bytes);
        let end = chunks.end.saturating_mul(chunk_bytes).min(self.size_bytes);
        chunks.start.saturating_mul(chunk_bytes).min(end)..end
    }

    /// The hash of this chunk if it is all zeros.
    pub(crate) fn zero_id(&self, chunk: u64) -> Id {
        if chunk + 1 == self.chunk_count() { self.zero_tail } else { self.zeros }
    }

    /// Runs of chunks that are not zeros, each of at most `most` chunks.
    pub(crate) fn data_runs(&self, ids: &[Id], most: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (chunk, id) in (0..self.chunk_count()).zip(ids) {
            if *id == self.zero_id(chunk) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == chunk && run.end - run.start < most => run.end += 1,
                _ => runs.push(chunk..chunk + 1),
            }
        }
        runs
    }
}

/// A place in a list that is in memory.
pub(crate) fn index_of(place: u64) -> usize {
    usize::try_from(place).expect("it is within something that is in memory")
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In stretches that the compiler turns into wide instructions, with an early end for what is not zero.
    bytes.chunks(1024).all(|stretch| stretch.iter().fold(0, |seen, byte| seen | byte) == 0)
}
