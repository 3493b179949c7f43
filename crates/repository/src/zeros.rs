//! Chunks of zeros: a few lengths, whose hashes are known without hashing gigabytes.
//!
//! A stretch of zeros is chunks of 8 MiB, then one of a multiple of 64 KiB, then one of a multiple of 4 KiB
//! (and at the end of a disk perhaps one of an odd length). So all disks share about 140 chunks of zeros, and a
//! sparse disk's list is as long as its data is, not as its size.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};

use crate::id::Id;
use crate::list::{BLOCK_BYTES, CHUNK_BYTES_MAX, Chunk};

/// Stretches of zeros of this length and more are chunks of their own; shorter ones are part of the data.
pub(crate) const ZERO_RUN_BYTES: u64 = 64 * 1024;

/// The hashes of zeros, of all multiples of 64 KiB up to the longest chunk, and of 4 KiB below the first.
struct Known {
    runs: Vec<Id>,
    blocks: Vec<Id>,
}

/// One pass over 8 MiB gives all: the hash of more zeros goes on where that of fewer stood.
static KNOWN: LazyLock<Known> = LazyLock::new(|| Known {
    runs: hashes(ZERO_RUN_BYTES, u64::from(CHUNK_BYTES_MAX) / ZERO_RUN_BYTES),
    blocks: hashes(BLOCK_BYTES, ZERO_RUN_BYTES / BLOCK_BYTES),
});

fn hashes(step: u64, count: u64) -> Vec<Id> {
    let zeros = zeros(step);
    let mut hasher = Sha256::new();
    (0..count)
        .map(|_| {
            hasher.update(&zeros);
            Id(hasher.clone().finalize().into())
        })
        .collect()
}

fn zeros(len: u64) -> Vec<u8> {
    vec![0; usize::try_from(len).unwrap_or(0)]
}

/// The hash of a chunk of so many zeros.
fn zero_id(len: u64) -> Id {
    let place = |step: u64| usize::try_from(len / step - 1).unwrap_or(usize::MAX);
    let known = if len == 0 {
        None
    } else if len.is_multiple_of(ZERO_RUN_BYTES) {
        KNOWN.runs.get(place(ZERO_RUN_BYTES))
    } else if len.is_multiple_of(BLOCK_BYTES) {
        KNOWN.blocks.get(place(BLOCK_BYTES))
    } else {
        None
    };
    known.copied().unwrap_or_else(|| Id::of(&zeros(len)))
}

/// The chunks for a stretch of zeros.
pub(crate) fn zero_chunks(len: u64) -> impl Iterator<Item = Chunk> {
    let mut left = len;
    std::iter::from_fn(move || {
        let piece = if left >= u64::from(CHUNK_BYTES_MAX) {
            u64::from(CHUNK_BYTES_MAX)
        } else if left >= ZERO_RUN_BYTES {
            left / ZERO_RUN_BYTES * ZERO_RUN_BYTES
        } else if left >= BLOCK_BYTES {
            left / BLOCK_BYTES * BLOCK_BYTES
        } else {
            left
        };
        left -= piece;
        let bytes = u32::try_from(piece).ok().filter(|bytes| *bytes > 0)?;
        Some(Chunk::zeros(zero_id(piece), bytes))
    })
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In stretches that the compiler turns into wide instructions, with an early end for what is not zero.
    bytes.chunks(1024).all(|stretch| stretch.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_known_hashes_are_right_and_lengths_add_up() {
        for len in [1, 4095, 4096, 61_440, 65_536, 70_000, 9 << 20, (8 << 20) - 4096, (25 << 20) + 4097] {
            let chunks: Vec<_> = zero_chunks(len).collect();
            assert_eq!(chunks.iter().map(Chunk::bytes).sum::<u64>(), len);
            for chunk in &chunks {
                assert!(chunk.is_zero());
                assert_eq!(chunk.id, Id::of(&zeros(chunk.bytes())), "{len}");
            }
            let large = usize::try_from(len >> 23).unwrap();
            assert!(chunks.len() <= large + 3, "{len}: {chunks:?}");
        }
        assert_eq!(zero_chunks(0).count(), 0);
    }
}
