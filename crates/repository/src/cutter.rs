//! Where a disk is cut into chunks: by what is in it, at blocks of 4 KiB.
//!
//! A file system puts the same file at another place on each disk, but always at a block. Cuts that depend on
//! the content find it there again: on a disk filled from /usr that saves 7 % that chunks of a fixed size do
//! not find, and more over several VMs of one kind. To look at each block's content costs little, because a cut
//! is possible only between blocks; a rolling hash has to look at each byte.

use crate::list::{BLOCK_BYTES, CHUNK_BYTES_MAX};
use crate::zeros::{ZERO_RUN_BYTES, is_zero};

const BLOCK: usize = BLOCK_BYTES as usize;
const ZERO_RUN_BLOCKS: usize = (ZERO_RUN_BYTES / BLOCK_BYTES) as usize;
/// The usual length of a chunk of a disk that is read whole. Shorter ones compress worse and make longer lists.
const AVERAGE_BYTES: usize = 768 * 1024;
/// The usual length where a disk has changed. What is written once is often written again, and a chunk is
/// stored anew for each block of it: so what changes is cut finer, and what rests is packed tighter.
const CHANGED_BYTES: usize = 256 * 1024;
/// A disk's list is kept within about this many, as long as chunks can become longer.
const CHUNKS_MAX: u64 = 1 << 20;

/// What comes first in some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// A chunk of so many bytes.
    Data(usize),
    /// So many zeros.
    Zeros(usize),
    /// That can be told only when more bytes are there.
    More,
}

/// How long chunks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cutter {
    min: usize,
    average: usize,
    max: usize,
}

impl Cutter {
    /// For a disk of this size that is read whole.
    pub(crate) fn for_disk(size_bytes: u64) -> Self {
        Self::with_average(AVERAGE_BYTES << growth(size_bytes))
    }

    /// For what has changed on a disk of this size.
    pub(crate) fn for_changes(size_bytes: u64) -> Self {
        Self::with_average(CHANGED_BYTES << growth(size_bytes))
    }

    fn with_average(average: usize) -> Self {
        let max = (4 * average).min(CHUNK_BYTES_MAX as usize);
        Self { min: (average / 4).min(128 * 1024), average, max }
    }

    /// As many bytes as a chunk can have, so that more is never needed beyond them.
    pub(crate) fn longest(&self) -> usize {
        self.max + self.min
    }

    /// What comes first in `bytes`, which begin at a block; `end` says that nothing follows them.
    pub(crate) fn first(&self, bytes: &[u8], end: bool) -> Cut {
        let zeros = leading_zeros(bytes);
        if zeros >= ZERO_RUN_BLOCKS * BLOCK || (end && zeros == bytes.len()) {
            return Cut::Zeros(zeros);
        }
        let mut zeros = 0;
        for (place, block) in bytes.chunks(BLOCK).enumerate() {
            let len = place * BLOCK + block.len();
            match mark(block) {
                None => {
                    zeros += 1;
                    if zeros == ZERO_RUN_BLOCKS && place + 1 > zeros {
                        return Cut::Data((place + 1 - zeros) * BLOCK);
                    }
                }
                Some(mark) => {
                    zeros = 0;
                    // What would be left over is too short for a chunk of its own.
                    let leaves_scrap = end && bytes.len() - len < self.min;
                    if len >= self.min && self.cuts(mark, len) && !leaves_scrap {
                        return Cut::Data(len);
                    }
                }
            }
            if len >= self.max && !(end && bytes.len() - len < self.min) {
                return Cut::Data(len);
            }
        }
        if end { Cut::Data(bytes.len()) } else { Cut::More }
    }

    /// Whether a block with this mark ends a chunk that has become so long: seldom below the average, often
    /// above it, so that lengths vary little.
    fn cuts(&self, mark: u64, len: usize) -> bool {
        let average = self.average / BLOCK;
        let one_in = if len < self.average { average * 4 } else { average / 2 };
        mark.is_multiple_of(one_in.max(1) as u64)
    }
}

/// How often the usual length is doubled for a disk of this size: at most so that chunks stay within bounds.
fn growth(size_bytes: u64) -> u32 {
    (0..2).find(|growth| size_bytes / ((AVERAGE_BYTES as u64) << growth) <= CHUNKS_MAX).unwrap_or(2)
}

/// Bytes of whole blocks of zeros at the start.
fn leading_zeros(bytes: &[u8]) -> usize {
    bytes.chunks(BLOCK).take_while(|block| is_zero(block)).map(<[u8]>::len).sum()
}

/// A number that depends on a block's content; none if it is zero. One word in eight is looked at: enough to
/// tell blocks apart, and the others need not be.
fn mark(block: &[u8]) -> Option<u64> {
    let mut mark = 0_u64;
    let mut seen = 0;
    for word in block.chunks_exact(8).step_by(8) {
        let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
        seen |= word;
        mark = (mark ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    if seen == 0 && is_zero(block) {
        return None;
    }
    Some((mark ^ (mark >> 32)).wrapping_mul(0xff51_afd7_ed55_8ccd) >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut word = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        (0..len.div_ceil(8)).flat_map(|_| word()).take(len).collect()
    }

    fn all_cuts(cutter: Cutter, mut bytes: &[u8]) -> Vec<Cut> {
        let mut cuts = Vec::new();
        while !bytes.is_empty() {
            let cut = cutter.first(bytes, true);
            let (Cut::Data(len) | Cut::Zeros(len)) = cut else { panic!("at the end there is no more") };
            cuts.push(cut);
            bytes = &bytes[len..];
        }
        cuts
    }

    #[test]
    fn lengths_are_as_they_should_be() {
        let cutter = Cutter::with_average(64 * 1024);
        let bytes = noise(3, 40 << 20);
        let cuts = all_cuts(cutter, &bytes);
        for cut in &cuts {
            let Cut::Data(len) = cut else { panic!("{cut:?}") };
            assert!((cutter.min..=cutter.longest()).contains(len) && len % BLOCK == 0, "{len}");
        }
        let average = bytes.len() / cuts.len();
        assert!((48 << 10..96 << 10).contains(&average), "{average}");
    }

    #[test]
    fn what_is_known_before_the_end_stays_so() {
        let cutter = Cutter::with_average(64 * 1024);
        let bytes = noise(4, 1 << 20);
        assert_eq!(cutter.first(&bytes[..8192], false), Cut::More);
        let early = cutter.first(&bytes[..cutter.longest()], false);
        assert_eq!(early, cutter.first(&bytes, true));
        assert!(matches!(early, Cut::Data(_)));
    }

    #[test]
    fn the_same_content_at_another_block_is_cut_the_same() {
        let cutter = Cutter::with_average(64 * 1024);
        let file = noise(5, 4 << 20);
        let moved = [noise(6, 3 * BLOCK), file.clone()].concat();
        let ends = |bytes: &[u8], shift: usize| {
            let mut place = 0;
            let mut ends = std::collections::BTreeSet::new();
            for cut in all_cuts(cutter, bytes) {
                let (Cut::Data(len) | Cut::Zeros(len)) = cut else { panic!() };
                place += len;
                ends.insert(place.wrapping_sub(shift));
            }
            ends
        };
        let (here, there) = (ends(&file, 0), ends(&moved, 3 * BLOCK));
        assert!(here.intersection(&there).count() * 10 >= here.len() * 9, "{here:?} {there:?}");
    }

    #[test]
    fn zeros_are_told_from_data() {
        let cutter = Cutter::with_average(64 * 1024);
        let data = noise(7, 5 * BLOCK + 100);
        let zeros = |blocks: usize| vec![0; blocks * BLOCK];
        let bytes = [zeros(20), data[..5 * BLOCK].to_vec(), zeros(16), data.clone()].concat();
        let cuts = all_cuts(cutter, &bytes);
        let [Cut::Zeros(a), Cut::Data(b), Cut::Zeros(c), Cut::Data(d)] = cuts[..] else { panic!("{cuts:?}") };
        assert_eq!([a, b, c, d], [20 * BLOCK, 5 * BLOCK, 16 * BLOCK, data.len()]);
        // A short stretch of zeros is data.
        let bytes = [zeros(3), data.clone(), zeros(15)].concat();
        assert!(matches!(cutter.first(&bytes, true), Cut::Data(_)));
        assert_eq!(cutter.first(&zeros(2), true), Cut::Zeros(2 * BLOCK));
        assert_eq!(cutter.first(&zeros(2), false), Cut::More);
        let mut almost = zeros(1);
        almost[9] = 1;
        assert_eq!(cutter.first(&almost, true), Cut::Data(BLOCK));
    }

    #[test]
    fn lists_stay_within_bounds() {
        const GIB: u64 = 1 << 30;
        for (size, average) in [(0, 768), (768 * GIB, 768), (769 * GIB, 1536), (u64::MAX, 3072)] {
            let cutter = Cutter::for_disk(size);
            assert_eq!(cutter.average, average << 10, "{size}");
            assert_eq!(Cutter::for_changes(size).average, cutter.average / 3);
            assert!(cutter.max <= CHUNK_BYTES_MAX as usize && cutter.min < cutter.average);
        }
    }
}
