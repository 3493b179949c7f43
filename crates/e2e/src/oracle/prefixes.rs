//! Every state that a disk went through.

use std::collections::{HashMap, HashSet};
use std::io;

use super::{Entry, Image, Kind, WriteLog};

/// All states of a disk that was zeros when its log began: state *k* is that after its first *k* changes
/// (a flush changes nothing).
#[derive(Debug)]
pub struct Prefixes {
    log: WriteLog,
    states: HashMap<u128, Vec<usize>>,
    changes: usize,
}

/// The state that comes closest to an image, for the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closest {
    /// How many changes lead to it.
    pub state: usize,
    /// How many sectors differ.
    pub sectors: usize,
    /// The first sector that differs.
    pub first: u64,
}

impl Prefixes {
    /// Replays a log.
    pub fn replay(log: WriteLog) -> io::Result<Self> {
        let mut image = Image::default();
        let mut states = HashMap::from([(image.sum(), vec![0])]);
        let mut changes = 0;
        for entry in changes_of(&log) {
            apply(&log, entry, &mut image)?;
            changes += 1;
            states.entry(image.sum()).or_insert_with(Vec::new).push(changes);
        }
        Ok(Self { log, states, changes })
    }

    /// How many changes there were.
    #[must_use]
    pub fn changes(&self) -> usize {
        self.changes
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &WriteLog {
        &self.log
    }

    /// The states that are this image; none if the disk never was so. Several where changes changed nothing.
    #[must_use]
    pub fn of(&self, image: &Image) -> &[usize] {
        self.states.get(&image.sum()).map_or(&[], Vec::as_slice)
    }

    /// The state that comes closest to an image.
    pub fn closest(&self, image: &Image) -> io::Result<Closest> {
        let mut replayed = Image::default();
        let mut differing: HashSet<u64> = image.sectors().collect();
        let (mut state, mut fewest) = (0, differing.clone());
        for (number, entry) in changes_of(&self.log).enumerate() {
            for sector in apply(&self.log, entry, &mut replayed)? {
                if replayed.print(sector) == image.print(sector) {
                    differing.remove(&sector);
                } else {
                    differing.insert(sector);
                }
            }
            if differing.len() < fewest.len() {
                (state, fewest) = (number + 1, differing.clone());
            }
        }
        Ok(Closest { state, sectors: fewest.len(), first: fewest.into_iter().min().unwrap_or(0) })
    }
}

/// The entries of a log that change the disk.
pub(super) fn changes_of(log: &WriteLog) -> impl Iterator<Item = &Entry> {
    log.entries().iter().filter(|entry| entry.kind != Kind::Flush)
}

/// The sectors that are different now.
fn apply(log: &WriteLog, entry: &Entry, image: &mut Image) -> io::Result<Vec<u64>> {
    match entry.kind {
        Kind::Write => Ok(image.write(entry.offset, &log.data(entry)?)),
        Kind::Discard => Ok(image.zero(entry.offset, entry.len)),
        Kind::Flush => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::write_log::tests::log_of;
    use super::*;

    fn image(sectors: &[u8]) -> Image {
        let mut image = Image::default();
        image.write(0, &sectors.iter().flat_map(|&fill| [fill; 512]).collect::<Vec<_>>());
        image
    }

    #[test]
    fn images_are_told_by_the_changes_that_led_to_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        // Writes 1, 2; a flush; a write of zeros; a write that changes nothing; a discard.
        log_of(&path, &[(0, 2, 0, 1), (1, 1, 0, 2), (0, 0, 1, 0), (1, 1, 0, 0), (0, 1, 0, 1), (0, 1, 4, 0)]);
        let prefixes = Prefixes::replay(WriteLog::open(&path, 1024).unwrap()).unwrap();
        assert_eq!(prefixes.changes(), 5);
        assert_eq!(prefixes.of(&image(&[1, 1])), [1]);
        assert_eq!(prefixes.of(&image(&[1, 2])), [2]);
        assert_eq!(prefixes.of(&image(&[1, 0])), [3, 4]);
        assert_eq!(prefixes.of(&image(&[0, 0])), [0, 5]);
        for never in [[0, 1], [2, 1], [0, 2], [3, 3]] {
            assert!(prefixes.of(&image(&never)).is_empty(), "{never:?}");
        }
        let closest = prefixes.closest(&image(&[3, 2])).unwrap();
        assert_eq!(closest, Closest { state: 2, sectors: 1, first: 0 });
    }
}
