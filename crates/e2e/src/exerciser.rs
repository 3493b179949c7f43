//! Exercises a file at random against a copy of it in memory, as `fsx` does; but where `fsx` begins with a file
//! of zeros, this begins with what is there, so that the layer over a recovery point has to fill blocks from
//! below.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use crate::oracle::Dice;

/// The longest operation is of 2 to the power of this; short ones are as likely as long ones.
const POWER_MAX: u64 = 16;
/// Holes are punched in whole blocks: a discard of less may be ignored.
const BLOCK_BYTES: u64 = 4096;

/// Operations made so far, by kind.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Reads, each compared.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Ranges zeroed.
    pub zeroed: u64,
    /// Holes punched.
    pub punched: u64,
    /// Syncs, each of them followed by forgetting what the kernel had cached.
    pub synced: u64,
}

impl Counts {
    /// All together.
    #[must_use]
    pub fn all(&self) -> u64 {
        self.reads + self.writes + self.zeroed + self.punched + self.synced
    }
}

/// A stretch of a file, and what it must hold.
pub struct Exerciser {
    file: File,
    start: u64,
    model: Vec<u8>,
    dice: Dice,
    counts: Counts,
}

impl Exerciser {
    /// Exercises the stretch of `path` that starts at `start`, which must hold `model` now.
    pub fn new(path: &Path, start: u64, model: Vec<u8>, seed: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        Ok(Self { file, start, model, dice: Dice::new(seed), counts: Counts::default() })
    }

    /// Makes so many operations; an error names the first byte that is wrong.
    pub fn run(&mut self, operations: u64) -> io::Result<()> {
        (0..operations).try_for_each(|_| self.step())
    }

    /// What was done, and what the stretch must hold now.
    #[must_use]
    pub fn end(self) -> (Counts, Vec<u8>) {
        (self.counts, self.model)
    }

    fn step(&mut self) -> io::Result<()> {
        let power = self.dice.below(POWER_MAX + 1);
        let len = 1 + self.dice.below(1 << power);
        let at = self.dice.below(self.model.len() as u64 - len + 1);
        match self.dice.below(20) {
            0..=8 => self.read(at, len),
            9..=15 => self.write(at, len),
            16 | 17 => self.clear(at, len, FallocateFlags::FALLOC_FL_ZERO_RANGE),
            18 => {
                let whole = len.next_multiple_of(BLOCK_BYTES);
                let at = (at - at % BLOCK_BYTES).min(self.model.len() as u64 - whole);
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                self.clear(at, whole, punch)
            }
            _ => self.sync_and_forget(),
        }
    }

    fn read(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.counts.reads += 1;
        let mut found = vec![0; len as usize];
        self.file.read_exact_at(&mut found, self.start + at)?;
        let expected = &self.model[at as usize..][..len as usize];
        let Some(wrong) = found.iter().zip(expected).position(|(found, expected)| found != expected) else {
            return Ok(());
        };
        Err(io::Error::other(format!(
            "operation {}: byte {} is {:#x}, not {:#x}, in a read of {len} bytes at {}",
            self.counts.all(),
            self.start + at + wrong as u64,
            found[wrong],
            expected[wrong],
            self.start + at
        )))
    }

    fn write(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.counts.writes += 1;
        let bytes = rig::noise(self.dice.roll(), len);
        self.file.write_all_at(&bytes, self.start + at)?;
        self.model[at as usize..][..len as usize].copy_from_slice(&bytes);
        Ok(())
    }

    /// Makes bytes zeros, by `how`.
    fn clear(&mut self, at: u64, len: u64, how: FallocateFlags) -> io::Result<()> {
        let is_hole = how.contains(FallocateFlags::FALLOC_FL_PUNCH_HOLE);
        *if is_hole { &mut self.counts.punched } else { &mut self.counts.zeroed } += 1;
        fallocate(&self.file, how, (self.start + at) as i64, len as i64)?;
        self.model[at as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn sync_and_forget(&mut self) -> io::Result<()> {
        self.counts.synced += 1;
        self.file.sync_all()?;
        Ok(posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_file_passes_and_a_wrong_byte_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let before = rig::noise(5, 1 << 20);
        std::fs::write(&path, &before).unwrap();
        let mut exerciser = Exerciser::new(&path, 4096, before[4096..].to_vec(), 9).unwrap();
        exerciser.run(2000).unwrap();
        let (counts, model) = exerciser.end();
        assert_eq!(counts.all(), 2000);
        assert!(counts.punched > 0 && counts.zeroed > 0 && counts.synced > 0, "{counts:?}");
        let mut after = std::fs::read(&path).unwrap();
        assert!(after[4096..] == model && after[..4096] == before[..4096]);

        after[500_000] ^= 1;
        std::fs::write(&path, &after).unwrap();
        let error = Exerciser::new(&path, 4096, model, 9).unwrap().run(2000).unwrap_err();
        assert!(error.to_string().contains("byte 500000 is"), "{error}");
    }
}
