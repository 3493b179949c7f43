//! What of a disk a backup has to read, and what it takes over from its parent.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use model::LogNumber;

use crate::Repository;
use crate::cutter::Cutter;
use crate::error::{Error, Unread};
use crate::info::BackupInfo;
use crate::list::{BLOCK_BYTES, Chunk, index_of};
use crate::source::{Source, SourceDisk};
use crate::zeros::{ZERO_RUN_BYTES, zero_chunks};

/// A part of a disk; parts follow one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    /// These chunks of the parent.
    Keep(Range<usize>),
    /// These bytes, to be read and cut anew.
    Read(Range<u64>),
    /// The bytes of one chunk that is lost, to be read and stored as that chunk: so older backups heal too.
    Again(Range<u64>),
}

/// What to do for one disk.
pub(crate) struct DiskPlan {
    pub(crate) cutter: Cutter,
    /// Whether a parent's list is taken over.
    pub(crate) incremental: bool,
    parent: Vec<Chunk>,
    parts: Vec<Part>,
    /// What the parts that were read have become: chunks, by the place of the first.
    made: Mutex<BTreeMap<u64, Vec<Chunk>>>,
}

impl DiskPlan {
    fn new(size_bytes: u64, incremental: bool, parent: Vec<Chunk>, parts: Vec<Part>) -> Self {
        let cutter = if incremental { Cutter::for_changes(size_bytes) } else { Cutter::for_disk(size_bytes) };
        Self { cutter, incremental, parent, parts, made: Mutex::default() }
    }

    fn everything(disk: &SourceDisk) -> Self {
        let all = 0..disk.size_bytes;
        let parts = if all.is_empty() { Vec::new() } else { vec![Part::Read(all)] };
        Self::new(disk.size_bytes, false, Vec::new(), parts)
    }

    pub(crate) fn bytes_to_read(&self) -> u64 {
        let bytes = self.parts.iter().map(|part| match part {
            Part::Keep(_) => 0,
            Part::Read(bytes) | Part::Again(bytes) => bytes.end - bytes.start,
        });
        bytes.sum()
    }

    /// Notes what a stretch from `offset` has become.
    pub(crate) fn note(&self, offset: u64, chunks: Vec<Chunk>) {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(offset, chunks);
    }

    /// The list, once everything is read.
    pub(crate) fn finished_list(&self) -> Vec<Chunk> {
        let made = std::mem::take(&mut *self.made.lock().unwrap_or_else(PoisonError::into_inner));
        let mut list = Vec::new();
        for part in &self.parts {
            match part {
                Part::Keep(chunks) => list.extend_from_slice(&self.parent[chunks.clone()]),
                Part::Read(bytes) | Part::Again(bytes) => {
                    list.extend(made.range(bytes.clone()).flat_map(|(_, chunks)| chunks))
                }
            }
        }
        list
    }
}

/// A part of the parent; none where it is damaged.
fn useful<T>(part: Result<T, Unread>) -> Result<Option<T>, Error> {
    match part {
        Ok(part) => Ok(Some(part)),
        Err(unread) => {
            let why = unread.damage()?;
            tracing::warn!(why, "the parent backup is damaged; everything is read");
            Ok(None)
        }
    }
}

impl Repository {
    /// Plans every disk of the source.
    pub(super) fn plan_disks(
        &self,
        source: &dyn Source,
        parent: Option<&BackupInfo>,
    ) -> Result<Vec<DiskPlan>, Error> {
        let mut files = match parent {
            Some(parent) => useful(self.read_tree(&parent.tree))?.unwrap_or_default(),
            None => Vec::new(),
        };
        let mut plans = Vec::new();
        for (number, disk) in source.disks().iter().enumerate() {
            let known = parent.and_then(|parent| {
                Some((parent.point.number, parent.disks.iter().find(|known| known.name == disk.name)?))
            });
            let old = match known {
                Some((since, known)) => {
                    let list = useful(self.disk_list(&mut files, known))?;
                    list.map(|list| (since, known.size_bytes, list))
                }
                None => None,
            };
            plans.push(match old {
                Some((since, size, list)) => self.plan_changes(source, number, since, size, list)?,
                None => DiskPlan::everything(disk),
            });
        }
        Ok(plans)
    }

    fn plan_changes(
        &self,
        source: &dyn Source,
        number: usize,
        since: LogNumber,
        old_size: u64,
        list: Vec<Chunk>,
    ) -> Result<DiskPlan, Error> {
        let disk = &source.disks()[number];
        let failed = |source| Error::Source { disk: disk.name.clone(), offset: 0, source };
        let Some(mut changed) = source.changed_since(number, since).map_err(failed)? else {
            return Ok(DiskPlan::everything(disk));
        };
        // Where the size has changed, so has everything from the smaller one on, with its last block if that
        // was not whole.
        if old_size != disk.size_bytes {
            let whole = old_size.min(disk.size_bytes) / BLOCK_BYTES * BLOCK_BYTES;
            changed.push(whole..disk.size_bytes.max(old_size));
        }
        changed.sort_unstable_by_key(|range| range.start);
        let lost = self.lost_chunks(&list);
        let parts = parts_of(&list, &changed, &lost, disk.size_bytes);
        Ok(DiskPlan::new(disk.size_bytes, true, list, parts))
    }

    /// Chunks of the parent that the repository no longer has, by their places: they are read again. Those of
    /// zeros are seen to at the end.
    fn lost_chunks(&self, list: &[Chunk]) -> Vec<usize> {
        let index = self.index();
        let is_lost = |chunk: &Chunk| !chunk.is_zero() && !index.has_data(&chunk.id);
        let lost: Vec<_> = (0..list.len()).filter(|place| is_lost(&list[*place])).collect();
        if !lost.is_empty() {
            tracing::warn!(chunks = lost.len(), "chunks of the parent backup are lost; they are read again");
        }
        lost
    }
}

/// A disk of `size_bytes` as parts: chunks that a change touches or that are lost are read, and so is what is
/// past the end of the parent; `changed` and `lost` are in order.
fn parts_of(list: &[Chunk], changed: &[Range<u64>], lost: &[usize], size_bytes: u64) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut changed = changed.iter().filter(|range| range.start < range.end).peekable();
    let mut lost = lost.iter().copied().peekable();
    let mut offset = 0;
    // Changes may overlap: the furthest end of those that begin before the chunk's.
    let mut changed_to = 0;
    for (place, chunk) in list.iter().enumerate() {
        let end = offset + chunk.bytes();
        while let Some(range) = changed.next_if(|range| range.start < end) {
            changed_to = changed_to.max(range.end);
        }
        let is_lost = lost.next_if_eq(&place).is_some();
        if changed_to > offset || end > size_bytes {
            add_read(&mut parts, offset..end.min(size_bytes));
        } else if is_lost {
            parts.push(Part::Again(offset..end));
        } else {
            match parts.last_mut() {
                Some(Part::Keep(kept)) => kept.end = place + 1,
                _ => parts.push(Part::Keep(place..place + 1)),
            }
        }
        offset = end;
    }
    add_read(&mut parts, offset..size_bytes);
    parts
}

fn add_read(parts: &mut Vec<Part>, bytes: Range<u64>) {
    if bytes.start >= bytes.end {
        return;
    }
    match parts.last_mut() {
        Some(Part::Read(last)) => last.end = bytes.end,
        _ => parts.push(Part::Read(bytes)),
    }
}

/// A stretch of a disk for one worker to do, with what of it has data.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) disk: usize,
    pub(crate) bytes: Range<u64>,
    pub(crate) data: Vec<Range<u64>>,
    /// It is one chunk, and not to be cut.
    pub(crate) is_chunk: bool,
}

/// A stretch for one worker is at most so long. Its end is a cut, whatever is there, so it should be long; and
/// short, so that all cores have work to the end.
const WORK_BYTES: u64 = 32 << 20;
/// How much of a disk the source is asked about at a time.
const WINDOW_BYTES: u64 = 1 << 30;

/// Cuts what is to be read of a disk into work, and notes what has no data. `send` ends the planning by
/// returning false; it also gets the number of bytes that were left out.
pub(crate) fn hand_out(
    source: &dyn Source,
    disk: usize,
    plan: &DiskPlan,
    send: &mut dyn FnMut(Option<Work>, u64) -> bool,
) -> io::Result<()> {
    let extents_of = |bytes: &Range<u64>| {
        let extents = source.data_extents(disk, bytes.clone())?;
        check_extents(&extents, bytes).map(|()| extents)
    };
    for part in &plan.parts {
        match part {
            Part::Keep(_) => {}
            Part::Again(bytes) => {
                let work = Work { disk, bytes: bytes.clone(), data: extents_of(bytes)?, is_chunk: true };
                if !send(Some(work), 0) {
                    return Ok(());
                }
            }
            Part::Read(bytes) => {
                let mut start = bytes.start;
                while start < bytes.end {
                    let window = start..bytes.end.min(start + WINDOW_BYTES);
                    start = window.end;
                    if !hand_out_window(disk, plan, &window, &extents_of(&window)?, send) {
                        return Ok(());
                    }
                }
            }
        }
    }
    Ok(())
}

fn check_extents(extents: &[Range<u64>], within: &Range<u64>) -> io::Result<()> {
    let mut end = within.start;
    for extent in extents {
        if extent.start < end || extent.end < extent.start || extent.end > within.end {
            let what = format!(
                "the source named the stretch {extent:?}, which is out of order or not within {within:?}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        end = extent.end;
    }
    Ok(())
}

fn hand_out_window(
    disk: usize,
    plan: &DiskPlan,
    window: &Range<u64>,
    extents: &[Range<u64>],
    send: &mut dyn FnMut(Option<Work>, u64) -> bool,
) -> bool {
    let mut done = window.start;
    let mut rest = extents;
    for stretch in stretches(extents, window) {
        if !leave_out(plan, done..stretch.start, send) {
            return false;
        }
        let mut start = stretch.start;
        while start < stretch.end {
            let bytes = start..stretch.end.min(start + WORK_BYTES);
            start = bytes.end;
            let passed = rest.iter().take_while(|extent| extent.end <= bytes.start).count();
            rest = &rest[passed..];
            let data = rest
                .iter()
                .take_while(|extent| extent.start < bytes.end)
                .map(|extent| extent.start.max(bytes.start)..extent.end.min(bytes.end))
                .filter(|extent| extent.start < extent.end)
                .collect();
            if !send(Some(Work { disk, bytes, data, is_chunk: false }), 0) {
                return false;
            }
        }
        done = stretch.end;
    }
    leave_out(plan, done..window.end, send)
}

fn leave_out(plan: &DiskPlan, bytes: Range<u64>, send: &mut dyn FnMut(Option<Work>, u64) -> bool) -> bool {
    if bytes.start >= bytes.end {
        return true;
    }
    plan.note(bytes.start, zero_chunks(bytes.end - bytes.start).collect());
    send(None, bytes.end - bytes.start)
}

/// Extents as whole blocks, joined where the gap between them is no stretch of zeros of its own.
fn stretches(extents: &[Range<u64>], window: &Range<u64>) -> Vec<Range<u64>> {
    let mut stretches: Vec<Range<u64>> = Vec::new();
    for extent in extents.iter().filter(|extent| extent.start < extent.end) {
        let start = (extent.start / BLOCK_BYTES * BLOCK_BYTES).max(window.start);
        let end = extent.end.next_multiple_of(BLOCK_BYTES).min(window.end);
        match stretches.last_mut() {
            Some(last) if start < last.end + ZERO_RUN_BYTES => last.end = last.end.max(end),
            _ => stretches.push(start..end),
        }
    }
    stretches
}

/// The part of `extent` that is within `bytes`, as places from the start of `bytes`; none if there is none.
pub(crate) fn within(extent: &Range<u64>, bytes: &Range<u64>) -> Option<Range<usize>> {
    let (start, end) = (extent.start.max(bytes.start), extent.end.min(bytes.end));
    (start < end).then(|| index_of(start - bytes.start)..index_of(end - bytes.start))
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is tested, short ones too")]
mod tests {
    use super::*;
    use crate::id::Id;

    const B: u64 = BLOCK_BYTES;

    fn list(lengths: &[u64]) -> Vec<Chunk> {
        let chunk = |(place, blocks): (usize, &u64)| {
            Chunk::data(Id::of(&place.to_le_bytes()), u32::try_from(blocks * B).unwrap())
        };
        lengths.iter().enumerate().map(chunk).collect()
    }

    #[test]
    fn only_what_is_touched_lost_or_new_is_read() {
        use Part::{Again, Keep, Read};
        let chunks = list(&[2, 1, 3, 4]);
        let size = 10 * B;
        let parts = |changed: &[Range<u64>], lost: &[usize], size| parts_of(&chunks, changed, lost, size);
        assert_eq!(parts(&[], &[], size), [Keep(0..4)]);
        assert_eq!(parts(&[2 * B..2 * B + 1], &[], size), [Keep(0..1), Read(2 * B..3 * B), Keep(2..4)]);
        assert_eq!(parts(&[2 * B - 1..3 * B + 1], &[], size), [Read(0..6 * B), Keep(3..4)]);
        assert_eq!(parts(&[0..9 * B, B..2 * B], &[], size), [Read(0..size)]);
        assert_eq!(parts(&[5..5, 2 * B..2 * B], &[3], size), [Keep(0..3), Again(6 * B..size)]);
        assert_eq!(parts(&[0..1], &[0, 1], size), [Read(0..2 * B), Again(2 * B..3 * B), Keep(2..4)]);
        assert_eq!(parts(&[], &[], size + 5), [Keep(0..4), Read(size..size + 5)]);
        assert_eq!(parts(&[], &[], 5 * B), [Keep(0..2), Read(3 * B..5 * B)]);
        assert_eq!(parts(&[], &[], 0), []);
        assert_eq!(parts_of(&[], &[], &[], 7), [Read(0..7)]);
    }

    #[test]
    fn stretches_are_blocks_and_small_gaps_belong_to_them() {
        let window = 0..100 * B;
        let near = [B + 5..B + 6, 3 * B..4 * B];
        assert_eq!(stretches(&near, &window), [B..4 * B]);
        let far = [0..B, 17 * B..18 * B, 99 * B..100 * B];
        assert_eq!(stretches(&far, &window), [0..B, 17 * B..18 * B, 99 * B..100 * B]);
        assert_eq!(stretches(&[7..7], &window), []);
    }
}
