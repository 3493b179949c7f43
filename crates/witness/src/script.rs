//! The sequence of writes.

use crate::BLOCK_BYTES;

/// The part of a disk that the script may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// The disk, by its place.
    pub disk: usize,
    /// Where the region starts, in bytes; a multiple of [`BLOCK_BYTES`].
    pub offset: u64,
    /// Its length in bytes; a multiple of [`BLOCK_BYTES`].
    pub len: u64,
}

/// What a write does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Writes data that names the write.
    Data,
    /// Writes zeros (the writer may trim instead, where that reads as zeros).
    Zero,
}

/// One write of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Write {
    /// Its number, from 1.
    pub number: u64,
    /// The disk, by its place.
    pub disk: usize,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What.
    pub action: Action,
}

/// An endless sequence of writes, made by a seed.
#[derive(Debug, Clone)]
pub struct Script {
    seed: u64,
    regions: Vec<Region>,
    blocks_max: u64,
}

impl Script {
    /// A script over `regions` (disjoint, none empty) whose writes are 1 to `blocks_max` blocks long.
    ///
    /// # Panics
    /// If there is no region, or one is empty or not made of whole blocks.
    #[must_use]
    pub fn new(seed: u64, regions: Vec<Region>, blocks_max: u64) -> Self {
        assert!(!regions.is_empty() && blocks_max > 0, "a script needs somewhere to write");
        for region in &regions {
            assert!(region.len > 0 && (region.len | region.offset).is_multiple_of(BLOCK_BYTES), "{region:?}");
        }
        Self { seed, regions, blocks_max }
    }

    /// The regions that it writes.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The write of this number (from 1): always the same for the same script.
    #[must_use]
    pub fn write(&self, number: u64) -> Write {
        let mut random = Random::new(self.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        // Disks take turns, so that two neighbouring writes are on different disks: a replica whose
        // disks are of different moments is caught at once.
        let region = self.regions[(number % self.regions.len() as u64) as usize];
        let blocks = region.len / BLOCK_BYTES;
        let count = 1 + random.below(self.blocks_max.min(blocks));
        let first = random.below(blocks - count + 1);
        let action = if random.below(16) == 0 { Action::Zero } else { Action::Data };
        Write {
            number,
            disk: region.disk,
            offset: region.offset + first * BLOCK_BYTES,
            len: count * BLOCK_BYTES,
            action,
        }
    }

    /// The bytes of one block of a data write: its number, its place, and a pattern made of both, a
    /// part of it incompressible.
    pub fn fill_block(&self, write: &Write, offset: u64, block: &mut [u8]) {
        assert_eq!(block.len() as u64, BLOCK_BYTES, "a block is whole");
        block[..8].copy_from_slice(MAGIC);
        block[8..16].copy_from_slice(&self.seed.to_le_bytes());
        block[16..24].copy_from_slice(&write.number.to_le_bytes());
        block[24..32].copy_from_slice(&offset.to_le_bytes());
        let mut random = Random::new(self.seed ^ write.number.rotate_left(32) ^ offset);
        let (noise, text) = block[32..].split_at_mut(1024);
        for word in noise.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
        text.fill(b'a' + (write.number % 26) as u8);
    }

    /// The bytes of a whole write.
    #[must_use]
    pub fn data(&self, write: &Write) -> Vec<u8> {
        let mut data = vec![0; usize::try_from(write.len).expect("a write fits in memory")];
        if write.action == Action::Data {
            for (place, block) in
                (write.offset..).step_by(BLOCK_BYTES as usize).zip(data.chunks_mut(BLOCK_BYTES as usize))
            {
                self.fill_block(write, place, block);
            }
        }
        data
    }

    /// The number of the write that put this block there, if it is one of this script's.
    #[must_use]
    pub fn stamp(&self, block: &[u8]) -> Option<u64> {
        let word =
            |at: usize| block.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
        let ours = block.starts_with(MAGIC) && word(8)? == self.seed;
        ours.then(|| word(16)).flatten()
    }
}

const MAGIC: &[u8; 8] = b"WITNESS1";

/// SplitMix64: small, seedable, the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform enough in 0..bound, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}
