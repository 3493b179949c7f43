//! What a backup has to read, given what its parent has.
//!
//! A log that was folded into the base is gone, so the shell keeps, per disk, a file of one number per
//! chunk: the newest log folded in that changed it. A backup of a point reads the chunks whose number is
//! greater than the parent's, and those that newer logs of its view touch. Both err to reading more.

use std::ops::Range;

use log::Extent;
use model::LogNumber;

use crate::Overlay;

/// How much of a disk one entry of the change map speaks for: at 8 bytes each, 32 MiB of map per TiB.
pub const CHANGE_CHUNK_BYTES: u64 = 256 * 1024;

/// The chunks that extents touch, as runs: disjoint and in order if the extents are sorted.
pub fn touched_chunks(extents: impl IntoIterator<Item = Extent>) -> impl Iterator<Item = Range<u64>> {
    let mut chunks = extents
        .into_iter()
        .filter(|extent| extent.len > 0)
        .map(|extent| extent.offset / CHANGE_CHUNK_BYTES..(extent.end() - 1) / CHANGE_CHUNK_BYTES + 1);
    let mut pending = chunks.next();
    std::iter::from_fn(move || {
        let mut run = pending.take()?;
        for next in chunks.by_ref() {
            if next.start < run.start || next.start > run.end {
                pending = Some(next);
                break;
            }
            run.end = run.end.max(next.end);
        }
        Some(run)
    })
}

/// The parts of a disk whose entry in the change map is newer than `after`, in order and joined.
///
/// `entries` are those of the whole disk from its first chunk. What they do not reach counts as changed:
/// a map that is too short must not hide a change.
#[must_use]
pub fn changed_since(
    entries: impl IntoIterator<Item = u64>,
    after: LogNumber,
    disk_size_bytes: u64,
) -> Vec<Extent> {
    let chunk_count = disk_size_bytes.div_ceil(CHANGE_CHUNK_BYTES);
    let mut entries = entries.into_iter();
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut chunk = 0;
    while chunk < chunk_count {
        let (changed, end) = match entries.next() {
            Some(entry) => (entry > after.0, chunk + 1),
            None => (true, chunk_count),
        };
        match runs.last_mut() {
            _ if !changed => {}
            Some(run) if run.end == chunk => run.end = end,
            _ => runs.push(chunk..end),
        }
        chunk = end;
    }
    runs.into_iter().map(|run| chunk_extent(run, disk_size_bytes)).collect()
}

/// Whole chunks as bytes, cut off at the end of the disk.
fn chunk_extent(chunks: Range<u64>, disk_size_bytes: u64) -> Extent {
    let offset = chunks.start * CHANGE_CHUNK_BYTES;
    let end = chunks.end.saturating_mul(CHANGE_CHUNK_BYTES).min(disk_size_bytes);
    Extent { offset, len: end - offset }
}

/// Two sorted lists of extents as one, sorted and joined.
#[must_use]
pub fn union(left: &[Extent], right: &[Extent]) -> Vec<Extent> {
    let mut all = [left, right].concat();
    all.sort_unstable();
    let mut joined: Vec<Extent> = Vec::with_capacity(all.len());
    for extent in all {
        match joined.last_mut() {
            Some(last) if extent.offset <= last.end() => last.len = last.len.max(extent.end() - last.offset),
            _ => joined.push(extent),
        }
    }
    joined
}

impl Overlay {
    /// What folding the overlay's logs into a base disk of this size does to its change map: the chunks to
    /// raise to at least the log's number. The map is raised, durably, before the apply touches the base: so
    /// a crash between the two makes a backup read more, never less.
    pub fn changes(
        &self,
        disk: usize,
        base_size_bytes: u64,
    ) -> impl Iterator<Item = (Range<u64>, LogNumber)> + '_ {
        let pieces = self.extents(disk).map(|survivor| (survivor.extent, survivor.log));
        pieces
            .chain(self.growth_over(disk, base_size_bytes))
            .flat_map(|(extent, log)| touched_chunks([extent]).map(move |chunks| (chunks, log)))
    }

    /// The chunks of a disk that the overlay's logs newer than `after` change over a base disk of this
    /// size, in order and joined.
    #[must_use]
    pub fn changed_since(&self, disk: usize, base_size_bytes: u64, after: LogNumber) -> Vec<Extent> {
        let size = self.disk_size(disk).unwrap_or(u64::MAX);
        let newer = self.extents(disk).filter(|survivor| survivor.log > after);
        let growth = self.growth_over(disk, base_size_bytes).filter(|(_, log)| *log > after);
        let extents = newer.map(|survivor| survivor.extent).chain(growth.map(|(extent, _)| extent));
        let extents: Vec<_> = touched_chunks(extents).map(|chunks| chunk_extent(chunks, size)).collect();
        union(&extents, &[])
    }

    /// Where the disk is larger than its base it may have been cut off and grown again before the oldest
    /// log here, and zeros may have taken the place of older bytes. The newest log answers for it.
    fn growth_over(&self, disk: usize, base_size_bytes: u64) -> Option<(Extent, LogNumber)> {
        let len = self.disk_size(disk)?.checked_sub(base_size_bytes).filter(|len| *len > 0)?;
        Some((Extent { offset: base_size_bytes, len }, self.newest()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CHUNK: u64 = CHANGE_CHUNK_BYTES;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { offset, len }
    }

    #[test]
    fn chunks_are_joined_and_cut_off_at_the_end_of_the_disk() {
        let mut touched = touched_chunks([extent(0, 1), extent(CHUNK, 1), extent(3 * CHUNK - 1, 2)]);
        assert_eq!((touched.next(), touched.next()), (Some(0..4), None));
        let apart = touched_chunks([extent(CHUNK - 1, 1), extent(2 * CHUNK, CHUNK)]);
        assert_eq!(apart.collect::<Vec<_>>(), [0..1, 2..3]);
        let size = 4 * CHUNK + 5;
        let changed = changed_since([9, 3, 7, 8, 8], LogNumber(7), size);
        assert_eq!(changed, [extent(0, CHUNK), extent(3 * CHUNK, CHUNK + 5)]);
    }

    #[test]
    fn what_the_map_does_not_reach_counts_as_changed() {
        assert_eq!(changed_since([0, 0], LogNumber(7), 3 * CHUNK + 1), [extent(2 * CHUNK, CHUNK + 1)]);
        assert_eq!(changed_since([], LogNumber(7), u64::MAX), [extent(0, u64::MAX)]);
        assert_eq!(changed_since([9], LogNumber(7), 0), []);
    }

    proptest! {
        #[test]
        fn no_touched_chunk_is_missing(raw in prop::collection::vec((0..40 * CHUNK, 1..3 * CHUNK), 0..20)) {
            let mut extents: Vec<_> = raw.iter().map(|&(offset, len)| extent(offset, len)).collect();
            let mut naive = vec![false; 64];
            for extent in &extents {
                for byte_chunk in extent.offset / CHUNK..=(extent.end() - 1) / CHUNK {
                    naive[usize::try_from(byte_chunk).unwrap()] = true;
                }
            }
            let marked = |extents: &[Extent]| {
                let mut marked = vec![false; 64];
                for run in touched_chunks(extents.iter().copied()) {
                    marked[usize::try_from(run.start).unwrap()..usize::try_from(run.end).unwrap()].fill(true);
                }
                marked
            };
            prop_assert_eq!(&marked(&extents), &naive);
            extents.sort_unstable();
            prop_assert_eq!(&marked(&extents), &naive);
            let runs: Vec<_> = touched_chunks(extents.iter().copied()).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));

            let entries: Vec<u64> = naive.iter().map(|&touched| if touched { 8 } else { 7 }).collect();
            let whole = changed_since(entries, LogNumber(7), 64 * CHUNK);
            let from_runs: Vec<_> = runs.into_iter().map(|run| chunk_extent(run, 64 * CHUNK)).collect();
            prop_assert_eq!(&whole, &from_runs);
            prop_assert_eq!(union(&whole[..whole.len() / 2], &whole), whole);
        }
    }
}
