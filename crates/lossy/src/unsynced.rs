//! What the disk still has of a file that was changed since its last sync.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::chance::Chance;
use crate::mount::Lost;

/// Bytes come to the disk in blocks of this size, in any order,
pub(crate) const BLOCK_BYTES: u64 = 4096;
/// and a block that was being written when the power went is torn between sectors of this size.
const SECTOR_BYTES: usize = 512;

/// A block as the disk has it; none: zeros, or beyond the end.
type OldBlock = Option<Box<[u8]>>;

/// The disk's side of one file.
#[derive(Debug, Default)]
pub(crate) struct Unsynced {
    /// By number, the blocks that were written since the last sync.
    blocks: BTreeMap<u64, OldBlock>,
    /// The length that the disk knows, if it is another one than the file's.
    len: Option<u64>,
    /// Blocks whose sync failed: the system takes them for written, the disk has the old ones.
    doomed: BTreeMap<u64, OldBlock>,
}

impl Unsynced {
    /// Before bytes are written: remembers what the disk has of their blocks.
    pub fn before_write(&mut self, file: &File, range: Range<u64>) -> io::Result<()> {
        let len = file.metadata()?.len();
        self.remember(file, range.clone(), len)?;
        if range.end > len {
            self.len.get_or_insert(len);
        }
        Ok(())
    }

    /// Before the file gets another length.
    pub fn before_resize(&mut self, file: &File, to: u64) -> io::Result<()> {
        let len = file.metadata()?.len();
        if to < len {
            // The rest of the last block becomes zeros when the file grows again.
            self.remember(file, to..len, len)?;
        }
        if to != len {
            self.len.get_or_insert(len);
        }
        Ok(())
    }

    fn remember(&mut self, file: &File, range: Range<u64>, len: u64) -> io::Result<()> {
        let durable_len = self.len.unwrap_or(len);
        for number in range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES) {
            if self.blocks.contains_key(&number) {
                continue;
            }
            let old = match self.doomed.remove(&number) {
                Some(old) => old,
                None => read_block(file, number, durable_len)?,
            };
            self.blocks.insert(number, old);
        }
        Ok(())
    }

    /// All of it is on the disk.
    pub fn synced(&mut self) {
        self.blocks.clear();
        self.len = None;
    }

    /// None of it came to the disk, and none of it will.
    pub fn sync_failed(&mut self) {
        let blocks = std::mem::take(&mut self.blocks);
        for (number, old) in blocks {
            self.doomed.entry(number).or_insert(old);
        }
    }

    /// Whether a power cut could change anything.
    pub fn is_clean(&self) -> bool {
        self.blocks.is_empty() && self.doomed.is_empty() && self.len.is_none()
    }

    /// The power is gone: some of the file becomes what the disk has.
    pub fn lose(self, file: &File, chance: &mut Chance, lost: &mut Lost) -> io::Result<()> {
        // All, none, or each block by itself: what is written back in one go often stays or goes together.
        let mood = chance.below(4);
        let now = file.metadata()?.len();
        let len = self.len.filter(|_| mood == 0 || (mood != 1 && chance.percent(50))).unwrap_or(now);
        for (number, old) in self.doomed {
            write_block(file, number, old.as_deref())?;
            lost.blocks += 1;
        }
        for (number, old) in self.blocks {
            match (mood, chance.below(5)) {
                (0, _) | (2.., 0 | 1) => {
                    write_block(file, number, old.as_deref())?;
                    lost.blocks += 1;
                }
                (2.., 2) => {
                    tear_block(file, number, old.as_deref(), chance)?;
                    lost.torn += 1;
                }
                _ => lost.kept += 1,
            }
        }
        lost.lengths += usize::from(len != now);
        file.set_len(len)
    }
}

fn read_block(file: &File, number: u64, durable_len: u64) -> io::Result<OldBlock> {
    let start = number * BLOCK_BYTES;
    if start >= durable_len {
        return Ok(None);
    }
    let mut block = vec![0; BLOCK_BYTES as usize];
    let wanted = usize::try_from((durable_len - start).min(BLOCK_BYTES)).unwrap_or(0);
    let mut filled = 0;
    while filled < wanted {
        match file.read_at(&mut block[filled..wanted], start + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(block.iter().any(|&byte| byte != 0).then(|| block.into_boxed_slice()))
}

fn write_block(file: &File, number: u64, old: Option<&[u8]>) -> io::Result<()> {
    file.write_all_at(old.unwrap_or(&[0; BLOCK_BYTES as usize]), number * BLOCK_BYTES)
}

/// Some sectors are the old ones.
fn tear_block(file: &File, number: u64, old: Option<&[u8]>, chance: &mut Chance) -> io::Result<()> {
    let old = old.unwrap_or(&[0; BLOCK_BYTES as usize]);
    for (place, sector) in old.chunks(SECTOR_BYTES).enumerate() {
        if chance.percent(50) {
            file.write_all_at(sector, number * BLOCK_BYTES + (place * SECTOR_BYTES) as u64)?;
        }
    }
    Ok(())
}
