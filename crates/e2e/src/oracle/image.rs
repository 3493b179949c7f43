//! What a disk holds, as one number for each sector.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::SECTOR_BYTES;

const ZEROS: [u8; SECTOR_BYTES as usize] = [0; SECTOR_BYTES as usize];
/// Read at once.
const READ_BYTES: u64 = 1 << 20;

/// The sectors of a disk that are not zeros, each as 128 bits of a hash over its place and its bytes; and
/// their sum, which tells whether two images are alike.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    prints: HashMap<u64, u128>,
    sum: u128,
}

impl Image {
    /// What a raw file holds; its holes are passed over.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let end = file.metadata()?.len();
        let mut image = Self::default();
        let mut buffer = vec![0; READ_BYTES as usize];
        let mut at = 0;
        while let Some(data) = seek(&file, at, Whence::SeekData)? {
            let hole = seek(&file, data, Whence::SeekHole)?.unwrap_or(end);
            // File systems tell of whole blocks of theirs: sectors are never cut.
            at = data - data % SECTOR_BYTES;
            while at < hole {
                let piece = &mut buffer[..READ_BYTES.min(hole - at) as usize];
                file.read_exact_at(piece, at)?;
                image.write(at, piece);
                at += piece.len() as u64;
            }
        }
        Ok(image)
    }

    /// Writes whole sectors; gives those that are different now.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Vec<u64> {
        let sectors = (offset / SECTOR_BYTES..).zip(bytes.chunks(SECTOR_BYTES as usize));
        sectors
            .filter(|&(sector, bytes)| self.set(sector, print(sector, bytes)))
            .map(|(sector, _)| sector)
            .collect()
    }

    /// Makes whole sectors zeros; gives those that are different now.
    pub fn zero(&mut self, offset: u64, len: u64) -> Vec<u64> {
        let sectors = offset / SECTOR_BYTES..(offset + len) / SECTOR_BYTES;
        sectors.filter(|&sector| self.set(sector, 0)).collect()
    }

    /// The number of one sector, 0 for zeros.
    #[must_use]
    pub fn print(&self, sector: u64) -> u128 {
        self.prints.get(&sector).copied().unwrap_or(0)
    }

    /// The sectors that are not zeros, in no order.
    pub fn sectors(&self) -> impl Iterator<Item = u64> {
        self.prints.keys().copied()
    }

    /// One number for all of it.
    #[must_use]
    pub fn sum(&self) -> u128 {
        self.sum
    }

    fn set(&mut self, sector: u64, print: u128) -> bool {
        let before = if print == 0 { self.prints.remove(&sector) } else { self.prints.insert(sector, print) };
        let before = before.unwrap_or(0);
        self.sum = self.sum.wrapping_sub(before).wrapping_add(print);
        before != print
    }
}

fn print(sector: u64, bytes: &[u8]) -> u128 {
    if bytes == &ZEROS[..bytes.len()] {
        return 0;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&sector.to_le_bytes()).update(bytes);
    let (half, _) =
        hasher.finalize().as_bytes().split_first_chunk().map(|(half, rest)| (*half, rest)).expect("32 bytes");
    u128::from_le_bytes(half)
}

/// Where data, or a hole, begins at or after a place; `None` past the last.
fn seek(file: &File, at: u64, what: Whence) -> io::Result<Option<u64>> {
    match lseek(file, at as i64, what) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_as_what_was_written_to_an_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = File::create(&path).unwrap();
        file.set_len(5 << 20).unwrap();
        let mut image = Image::default();
        assert_eq!(Image::read(&path).unwrap(), image);
        for (offset, fill, len) in
            [(0, 1, 512), (3 << 20, 2, 1 << 20), ((5 << 20) - 1024, 3, 1024), (3 << 20, 0, 4096)]
        {
            file.write_all_at(&vec![fill; len], offset).unwrap();
            assert_eq!(image.write(offset, &vec![fill; len]).len(), len / 512);
            assert_ne!(image.sum(), 0);
        }
        assert_eq!(Image::read(&path).unwrap(), image);
        assert!(image.write(0, &[1; 512]).is_empty(), "nothing has changed");
        let sum = image.sum();
        assert_eq!(image.zero(0, 1024), [0]);
        assert_ne!(image.sum(), sum);
        image.write(0, &[1; 512]);
        assert_eq!(image.sum(), sum, "the sum tells what is there, not how it came about");
        image.write(512, &[1; 512]);
        image.zero(0, 512);
        assert_ne!(image.sum(), sum, "the same bytes elsewhere are another image");
    }
}
