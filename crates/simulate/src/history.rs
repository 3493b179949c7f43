//! What a VM has written, write by write: the truth that everything else is held against.
//!
//! Every write has a number, and every sector says which write it shows. So a disk that was read somewhere is
//! either the state after some prefix of the writes, exactly, or it can be said what is wrong with it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::chance::splitmix;

/// Writes are made of whole sectors.
pub const SECTOR_BYTES: usize = 512;

/// All disks of a VM at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// How many writes are in it.
    pub writes: u64,
    /// For each disk and each of its sectors, the number of the write that it shows; 0 for zeros.
    pub disks: Vec<Vec<u64>>,
}

#[derive(Debug, Clone)]
enum Event {
    Write { disk: usize, sectors: Range<usize>, zeros: bool },
    Resize { disk: usize, sectors: usize },
}

/// The history of a VM.
#[derive(Debug)]
pub struct History {
    first: Vec<usize>,
    events: Vec<Event>,
    now: State,
}

impl History {
    /// Disks of so many sectors, all zeros.
    #[must_use]
    pub fn new(sectors: &[usize]) -> Self {
        let now = State { writes: 0, disks: sectors.iter().map(|sectors| vec![0; *sectors]).collect() };
        Self { first: sectors.to_vec(), events: Vec::new(), now }
    }

    /// The disks as they are.
    #[must_use]
    pub const fn now(&self) -> &State {
        &self.now
    }

    /// Writes some sectors of a disk: data that nothing else has, or zeros.
    pub fn write(&mut self, disk: usize, sectors: Range<usize>, zeros: bool) {
        self.happen(Event::Write { disk, sectors, zeros });
    }

    /// Gives a disk another size.
    pub fn resize(&mut self, disk: usize, sectors: usize) {
        self.happen(Event::Resize { disk, sectors });
    }

    fn happen(&mut self, event: Event) {
        self.now.follow(&event);
        self.events.push(event);
    }

    /// The state after the first `writes` events, by going through them from the beginning: what checkers use, so
    /// that they trust no copy that was made on the way.
    #[must_use]
    pub fn after(&self, writes: u64) -> State {
        let mut state = Self::new(&self.first).now;
        let count = usize::try_from(writes).unwrap_or(usize::MAX).min(self.events.len());
        self.events[..count].iter().for_each(|event| state.follow(event));
        state
    }
}

impl State {
    fn follow(&mut self, event: &Event) {
        self.writes += 1;
        match event {
            Event::Write { disk, sectors, zeros } => {
                let number = if *zeros { 0 } else { self.writes };
                self.disks[*disk][sectors.clone()].fill(number);
            }
            Event::Resize { disk, sectors } => self.disks[*disk].resize(*sectors, 0),
        }
    }

    /// The bytes of a disk.
    #[must_use]
    pub fn bytes(&self, disk: usize) -> u64 {
        (self.disks[disk].len() * SECTOR_BYTES) as u64
    }

    /// Fills `buf` with the disk's bytes from `offset`, both whole sectors; zeros beyond its end.
    pub fn read(&self, disk: usize, offset: u64, buf: &mut [u8]) {
        let first = place(offset);
        for (sector, bytes) in (first..).zip(buf.chunks_mut(SECTOR_BYTES)) {
            fill(bytes, self.disks[disk].get(sector).copied().unwrap_or(0), disk, sector);
        }
    }

    /// Whether all sectors of a range of bytes are zeros.
    #[must_use]
    pub fn is_zero(&self, disk: usize, bytes: Range<u64>) -> bool {
        let sectors = &self.disks[disk];
        let end = place(bytes.end).min(sectors.len());
        sectors[place(bytes.start).min(end)..end].iter().all(|number| *number == 0)
    }

    /// Holds bytes that were read of a disk at `offset` against the truth.
    pub fn check(&self, disk: usize, offset: u64, bytes: &[u8]) -> Result<(), Wrong> {
        let mut expected = [0; SECTOR_BYTES];
        for (sector, found) in (place(offset)..).zip(bytes.chunks(SECTOR_BYTES)) {
            let number = self.disks[disk].get(sector).copied().unwrap_or(0);
            fill(&mut expected, number, disk, sector);
            if found != &expected[..found.len()] {
                return Err(Wrong { disk, sector, expected: number, found: Found::of(found, disk, sector) });
            }
        }
        Ok(())
    }
}

/// A sector that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    disk: usize,
    sector: usize,
    expected: u64,
    found: Found,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    Zeros,
    Write(u64),
    Elsewhere,
    Garbage,
}

impl Found {
    fn of(bytes: &[u8], disk: usize, sector: usize) -> Self {
        let mut expected = [0; SECTOR_BYTES];
        let Some(head) = bytes.first_chunk::<8>() else { return Self::Garbage };
        let number = u64::from_le_bytes(*head);
        fill(&mut expected, number, disk, sector);
        match () {
            () if bytes.iter().all(|byte| *byte == 0) => Self::Zeros,
            () if bytes == &expected[..bytes.len()] => Self::Write(number),
            () if number < 1 << 32 => Self::Elsewhere,
            () => Self::Garbage,
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, sector, expected, found } = self;
        write!(f, "sector {sector} of disk {disk} should show write {expected} and shows ")?;
        match found {
            Found::Zeros => f.write_str("zeros"),
            Found::Write(number) => write!(f, "write {number}"),
            Found::Elsewhere => f.write_str("a write of another place, or parts of several"),
            Found::Garbage => f.write_str("what was never written"),
        }
    }
}

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX) / SECTOR_BYTES
}

/// What write `number` puts into a sector: its number and place again and again, or, for every third write, once
/// and then what does not compress.
fn fill(sector_bytes: &mut [u8], number: u64, disk: usize, sector: usize) {
    if number == 0 {
        return sector_bytes.fill(0);
    }
    let place = ((disk as u64) << 32) | sector as u64;
    let mut noise = splitmix(number ^ (place << 20));
    for (at, part) in sector_bytes.chunks_mut(16).enumerate() {
        let mut bytes = [0; 16];
        if at == 0 || !number.is_multiple_of(3) {
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            bytes[8..].copy_from_slice(&place.to_le_bytes());
        } else {
            noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            bytes[..8].copy_from_slice(&(noise ^ (noise >> 29)).to_le_bytes());
            bytes[8..].copy_from_slice(&noise.rotate_left(23).to_le_bytes());
        }
        part.copy_from_slice(&bytes[..part.len()]);
    }
}

/// A moment that was fixed over all disks of a VM.
#[derive(Debug, Clone)]
pub struct Moment {
    /// The disks as they were.
    pub state: Arc<State>,
    /// What the primary's clock showed.
    pub at: model::Timestamp,
    /// The guest was at rest.
    pub frozen: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_what_its_writes_made_it_and_nothing_else_passes() {
        let mut history = History::new(&[16, 8]);
        history.write(0, 2..6, false);
        history.write(1, 0..8, false);
        let early = history.now().clone();
        history.write(0, 4..5, true);
        history.resize(1, 12);
        history.write(1, 7..12, false);
        assert_eq!(history.after(2), early);
        assert_eq!(history.after(5), *history.now());
        let mut bytes = vec![0xee; 16 * SECTOR_BYTES];
        history.now().read(0, 0, &mut bytes);
        assert_eq!(history.now().check(0, 0, &bytes), Ok(()));
        assert!(
            early
                .check(0, 0, &bytes)
                .unwrap_err()
                .to_string()
                .contains("should show write 1 and shows zeros")
        );
        assert!(history.now().check(1, 0, &bytes[..512]).is_err());
        bytes[5 * SECTOR_BYTES + 300] ^= 1;
        assert!(history.now().check(0, 0, &bytes).is_err());
        assert!(history.now().is_zero(0, 6 * 512..16 * 512) && !history.now().is_zero(0, 0..1536));
    }
}
