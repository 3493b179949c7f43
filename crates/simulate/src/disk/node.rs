//! A file: what is on the platter, what its readers see, and the writes in between.

use std::io;
use std::ops::Range;

use crate::chance::Chance;

const SECTOR_BYTES: usize = 512;
pub(super) const PAGE_BYTES: usize = 4096;

/// How much of what was not synced a power cut takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: the process was killed, the system lives on.
    Nothing,
    /// All of it.
    Everything,
    /// Everything after some write of each file.
    Suffix,
    /// Each page of 4 KiB on its own.
    Pages,
    /// Each sector of 512 bytes on its own.
    Sectors,
}

impl Loss {
    /// All that a power cut may do.
    pub const CUTS: [Self; 4] = [Self::Everything, Self::Suffix, Self::Pages, Self::Sectors];
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Len(usize),
    Zero(Range<usize>),
}

#[derive(Debug, Default)]
pub(super) struct FileNode {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// What was done since `durable`, in order.
    pending: Vec<Change>,
}

impl FileNode {
    pub fn len(&self) -> u64 {
        self.now.len() as u64
    }

    pub fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let start = usize::try_from(offset).map_or(self.now.len(), |start| start.min(self.now.len()));
        let len = buf.len().min(self.now.len() - start);
        buf[..len].copy_from_slice(&self.now[start..start + len]);
        len
    }

    /// Whether a write needs space that the file does not have yet.
    pub fn grows_by(&self, bytes: &[u8], offset: u64) -> bool {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.now.get(start..start.saturating_add(bytes.len()));
        there.is_none_or(is_zero)
    }

    pub fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        self.change(Change::Write { offset, bytes: bytes.to_vec() });
        Ok(())
    }

    pub fn set_len(&mut self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if len != self.now.len() {
            self.change(Change::Len(len));
        }
        Ok(())
    }

    /// Zeros within the file's length.
    pub fn zero(&mut self, range: Range<u64>) {
        let clamp = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(self.now.len());
        self.change(Change::Zero(clamp(range.start)..clamp(range.end)));
    }

    fn change(&mut self, change: Change) {
        apply(&change, &mut self.now);
        self.pending.push(change);
    }

    pub fn sync(&mut self) {
        for change in self.pending.drain(..) {
            apply(&change, &mut self.durable);
        }
    }

    /// A sync that fails: some of it got through, the rest is dropped and never written. Those who read it may
    /// go on seeing it, until the system needs the memory.
    pub fn fail_sync(&mut self, chance: &mut Chance) {
        self.durable = self.image(Loss::Pages, chance);
        // A length that was set is the journal's, not the page cache's: it is still to be written.
        self.pending.retain(|change| matches!(change, Change::Len(_)));
        if chance.one_in(2) {
            self.now = self.durable.clone();
            self.pending.iter().for_each(|change| apply(change, &mut self.now));
        }
    }

    /// What a power cut leaves.
    pub fn settle(&mut self, loss: Loss, chance: &mut Chance) {
        if loss == Loss::Nothing {
            return; // the cache outlives the process, and so does what it owes the platter
        }
        self.durable = self.image(loss, chance);
        self.now = self.durable.clone();
        self.pending.clear();
    }

    fn image(&self, loss: Loss, chance: &mut Chance) -> Vec<u8> {
        let unit = match loss {
            Loss::Everything => return self.durable.clone(),
            Loss::Nothing | Loss::Suffix => {
                let kept = if loss == Loss::Nothing { self.pending.len() } else { self.up_to(chance) };
                let mut image = self.durable.clone();
                self.pending[..kept].iter().for_each(|change| apply(change, &mut image));
                return image;
            }
            Loss::Pages => PAGE_BYTES,
            Loss::Sectors => SECTOR_BYTES,
        };
        if self.pending.is_empty() {
            return self.durable.clone();
        }
        self.mixed(unit, chance)
    }

    /// How many of the writes since the last sync count.
    fn up_to(&self, chance: &mut Chance) -> usize {
        chance.place(self.pending.len() + 1)
    }

    /// Every unit as it was after some write, each on its own; so the length.
    fn mixed(&self, unit: usize, chance: &mut Chance) -> Vec<u8> {
        let longest = self.pending.iter().map(Change::end).chain([self.durable.len()]).max().unwrap_or(0);
        let age: Vec<usize> = (0..longest.div_ceil(unit)).map(|_| self.up_to(chance)).collect();
        let age_of_len = self.up_to(chance);
        let (mut image, mut seen, mut len) = (vec![0; longest], self.durable.clone(), self.durable.len());
        for done in 0..=self.pending.len() {
            if let Some(change) = done.checked_sub(1).and_then(|last| self.pending.get(last)) {
                apply(change, &mut seen);
            }
            if done == age_of_len {
                len = seen.len();
            }
            for (place, _) in age.iter().enumerate().filter(|(_, age)| **age == done) {
                let (start, end) = (place * unit, ((place + 1) * unit).min(seen.len()));
                if start < end {
                    image[start..end].copy_from_slice(&seen[start..end]);
                }
            }
        }
        image.resize(len, 0);
        image
    }

    pub fn rot(&mut self, at: u64) -> bool {
        let Ok(at) = usize::try_from(at) else { return false };
        if let Some(byte) = self.durable.get_mut(at) {
            *byte ^= 1 << (at % 8);
        }
        self.now.get_mut(at).map(|byte| *byte ^= 1 << (at % 8)).is_some()
    }

    /// The pages of a range that are not zeros, joined.
    pub fn data_ranges(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (place, page) in self.now.chunks(PAGE_BYTES).enumerate() {
            let start = (place * PAGE_BYTES) as u64;
            let (start, end) = (start.max(range.start), (start + page.len() as u64).min(range.end));
            if start >= end || is_zero(page) {
                continue;
            }
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(start..end),
            }
        }
        found
    }

    pub fn allocated_bytes(&self) -> u64 {
        let data = self.now.chunks(PAGE_BYTES).filter(|page| !is_zero(page));
        data.count() as u64 * PAGE_BYTES as u64
    }
}

impl Change {
    fn end(&self) -> usize {
        match self {
            Self::Write { offset, bytes } => offset + bytes.len(),
            Self::Len(len) => *len,
            Self::Zero(_) => 0,
        }
    }
}

/// Compared piece by piece: asked one byte at a time, this was a quarter of all that a world takes.
fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    bytes.chunks(PAGE_BYTES).all(|piece| *piece == ZEROS[..piece.len()])
}

fn apply(change: &Change, image: &mut Vec<u8>) {
    match change {
        Change::Write { offset, bytes } => {
            let end = offset + bytes.len();
            if image.len() < end {
                image.resize(end, 0);
            }
            image[*offset..end].copy_from_slice(bytes);
        }
        Change::Len(len) => image.resize(*len, 0),
        Change::Zero(range) => {
            let end = range.end.min(image.len());
            image[range.start.min(end)..end].fill(0);
        }
    }
}
