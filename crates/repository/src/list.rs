//! A disk as a list of chunks.
//!
//! Chunks have different lengths, all of them whole blocks of 4 KiB but the last one's. The tree has their
//! hashes; their lengths are in a small file beside the disk, two bytes each, so that a lost chunk leaves a gap
//! of known length and not a disk that cannot be put together.

use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::id::Id;

/// Disks are cut at multiples of this.
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// The longest chunk; restic's too. (The last one of a stretch may be a little longer.)
pub(crate) const CHUNK_BYTES_MAX: u32 = 8 * 1024 * 1024;

const ZERO: u32 = 1 << 31;
const ZERO_ON_DISK: u16 = 1 << 15;

/// One chunk of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) id: Id,
    /// Its length, and in the highest bit whether it is all zeros.
    len: u32,
}

impl Chunk {
    /// A chunk with data; far shorter than 2 GiB.
    pub(crate) fn data(id: Id, bytes: u32) -> Self {
        Self { id, len: bytes & !ZERO }
    }

    /// A chunk of zeros.
    pub(crate) fn zeros(id: Id, bytes: u32) -> Self {
        Self { id, len: bytes | ZERO }
    }

    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.len & !ZERO)
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.len & ZERO != 0
    }
}

/// The lengths of chunks as they are stored: for each a little-endian 16-bit number, of blocks, with the
/// highest bit set for zeros.
pub(crate) fn encode_lengths(chunks: &[Chunk]) -> Vec<u8> {
    chunks
        .iter()
        .flat_map(|chunk| {
            let blocks = u16::try_from(chunk.bytes().div_ceil(BLOCK_BYTES)).unwrap_or(ZERO_ON_DISK - 1);
            (blocks | if chunk.is_zero() { ZERO_ON_DISK } else { 0 }).to_le_bytes()
        })
        .collect()
}

/// The list from its two halves; else what is wrong with them.
pub(crate) fn decode(ids: &[Id], lengths: &[u8], size_bytes: u64) -> Result<Vec<Chunk>, &'static str> {
    if lengths.len() != 2 * ids.len() {
        return Err("there is not one length for each chunk");
    }
    let mut left = size_bytes;
    let mut chunks = Vec::with_capacity(ids.len());
    for (id, length) in ids.iter().zip(lengths.chunks_exact(2)) {
        let length = u16::from_le_bytes([length[0], length[1]]);
        // The last chunk ends where the disk does.
        let bytes = (u64::from(length & !ZERO_ON_DISK) * BLOCK_BYTES).min(left);
        let len = u32::try_from(bytes).map_err(|_| "a chunk is too long")?;
        if len == 0 || len > 2 * CHUNK_BYTES_MAX {
            return Err("a chunk has an impossible length");
        }
        left -= bytes;
        let is_zero = length & ZERO_ON_DISK != 0;
        chunks.push(if is_zero { Chunk::zeros(*id, len) } else { Chunk::data(*id, len) });
    }
    if left == 0 { Ok(chunks) } else { Err("the chunks are shorter than the disk") }
}

/// A disk's digest: from its size and its chunks' hashes and lengths alone, so that an incremental backup need
/// not read what has not changed.
pub(crate) fn digest(size_bytes: u64, chunks: &[Chunk]) -> String {
    let mut hasher = Sha256::new();
    hasher.update(b"afterimage disk v1\n");
    hasher.update(size_bytes.to_le_bytes());
    for chunk in chunks {
        hasher.update(chunk.id.0);
        hasher.update((chunk.len & !ZERO).to_le_bytes());
    }
    hex::encode(hasher.finalize())
}

/// Neighbouring chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Their places in the list.
    pub(crate) chunks: Range<usize>,
    /// Their bytes on the disk.
    pub(crate) bytes: Range<u64>,
}

/// The stretches of chunks with data, each of at most `most` bytes (or one chunk).
pub(crate) fn data_stretches(chunks: &[Chunk], most: u64) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    let mut offset = 0;
    for (place, chunk) in chunks.iter().enumerate() {
        let end = offset + chunk.bytes();
        if !chunk.is_zero() {
            match stretches.last_mut() {
                Some(last) if last.bytes.end == offset && end - last.bytes.start <= most => {
                    (last.chunks.end, last.bytes.end) = (place + 1, end);
                }
                _ => stretches.push(Stretch { chunks: place..place + 1, bytes: offset..end }),
            }
        }
        offset = end;
    }
    stretches
}

/// A place in something that is in memory.
pub(crate) fn index_of(place: u64) -> usize {
    usize::try_from(place).expect("it is within something that is in memory")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::zeros::zero_chunks;

    fn some() -> Vec<Chunk> {
        let mut chunks = vec![Chunk::data(Id::of(b"a"), 8192), Chunk::data(Id::of(b"b"), 4096)];
        chunks.extend(zero_chunks((8 << 20) + 70_000 / 4096 * 4096));
        chunks.push(Chunk::data(Id::of(b"c"), 5000));
        chunks
    }

    #[test]
    fn lengths_come_back_and_nonsense_does_not() {
        let chunks = some();
        let size: u64 = chunks.iter().map(Chunk::bytes).sum();
        let ids: Vec<Id> = chunks.iter().map(|chunk| chunk.id).collect();
        let lengths = encode_lengths(&chunks);
        assert_eq!(decode(&ids, &lengths, size).unwrap(), chunks);
        assert_eq!(decode(&[], &[], 0).unwrap(), []);
        for (ids, lengths, size) in [
            (&ids[1..], &lengths[..], size),
            (&ids[..], &lengths[2..], size),
            (&ids[..], &lengths[..], size + 1 + 4096),
            (&ids[..], &lengths[..], size - 5000),
            (&ids[..1], &[0, 0][..], 0),
            (&ids[..1], &[0xff, 0x7f][..], u64::MAX),
        ] {
            assert!(decode(ids, lengths, size).is_err());
        }
    }

    #[test]
    fn stretches_leave_zeros_out_and_stay_short() {
        let chunks = some();
        let stretches = data_stretches(&chunks, 1 << 20);
        assert_eq!(stretches[0], Stretch { chunks: 0..2, bytes: 0..12_288 });
        assert_eq!(stretches.len(), 2);
        assert_eq!(stretches[1].bytes.end - stretches[1].bytes.start, 5000);
        assert_eq!(data_stretches(&chunks, 1).len(), 3);
    }

    #[test]
    fn the_digest_depends_on_everything() {
        let chunks = some();
        let mut other = chunks.clone();
        other[0] = Chunk::data(other[0].id, 4096);
        let digests = [digest(1, &chunks), digest(2, &chunks), digest(1, &chunks[1..]), digest(1, &other)];
        let mut different = digests.to_vec();
        different.sort();
        different.dedup();
        assert_eq!(different.len(), digests.len());
    }
}
