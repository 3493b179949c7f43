//! Which chunks of a disk a backup has to look at, and what the others are.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use model::LogNumber;

use crate::Repository;
use crate::error::Error;
use crate::id::Id;
use crate::info::BackupInfo;
use crate::manifest::{self, BackupDisk};
use crate::shape::{Shape, index_of};
use crate::source::{Source, SourceDisk};
use crate::tree::TreeFile;

/// What to do for one disk.
pub(crate) struct DiskPlan {
    pub(crate) shape: Shape,
    /// Whether a parent's list was taken over.
    pub(crate) incremental: bool,
    /// Runs of chunks to look at, in order and disjoint.
    pub(crate) dirty: Vec<Range<u64>>,
    /// Each chunk's hash: the parent's or that of zeros, until a worker knows better.
    ids: Mutex<Vec<Id>>,
}

impl DiskPlan {
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.dirty.iter().map(|run| self.shape.bytes_of(run)).map(|bytes| bytes.end - bytes.start).sum()
    }

    /// Notes the hashes of chunks from `first`.
    pub(crate) fn set_ids(&self, first: u64, new: &[Id]) {
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        let first = index_of(first);
        ids[first..first + new.len()].copy_from_slice(new);
    }

    /// Whether any chunk has this hash.
    pub(crate) fn uses(&self, id: &Id) -> bool {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// The list, once it is complete.
    pub(crate) fn take_ids(&self) -> Vec<Id> {
        std::mem::take(&mut *self.ids.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Repository {
    /// Plans every disk of the source.
    pub(super) fn plan_disks(
        &self,
        source: &dyn Source,
        parent: Option<&BackupInfo>,
    ) -> Result<Vec<DiskPlan>, Error> {
        let mut files = match parent.map(|parent| self.read_tree(&parent.tree)) {
            Some(Ok(files)) => files,
            Some(Err(why)) => {
                tracing::warn!(why, "the parent backup is damaged; everything is read");
                Vec::new()
            }
            None => Vec::new(),
        };
        let mut plans = Vec::new();
        for (number, disk) in source.disks().iter().enumerate() {
            let old = parent.and_then(|parent| {
                let known = parent.disks.iter().find(|known| known.name == disk.name)?;
                Some((parent.point.number, known, take_list(&mut files, known)?))
            });
            plans.push(match old {
                Some((since, known, list)) => self.plan_changes(source, number, disk, since, known, list)?,
                None => plan_all(disk),
            });
        }
        Ok(plans)
    }

    fn plan_changes(
        &self,
        source: &dyn Source,
        number: usize,
        disk: &SourceDisk,
        since: LogNumber,
        known: &BackupDisk,
        list: Vec<Id>,
    ) -> Result<DiskPlan, Error> {
        let failed = |source| Error::Source { disk: disk.name.clone(), offset: 0, source };
        if !manifest::chunk_bytes_still_serve(known.chunk_bytes, disk.size_bytes) {
            return Ok(plan_all(disk));
        }
        let Some(changed) = source.changed_since(number, since).map_err(failed)? else {
            return Ok(plan_all(disk));
        };
        let shape = Shape::new(disk.size_bytes, known.chunk_bytes);
        let chunk_bytes = u64::from(known.chunk_bytes);
        let touched = changed
            .into_iter()
            .map(|range| range.start..range.end.min(disk.size_bytes))
            .filter(|range| range.start < range.end)
            .map(|range| range.start / chunk_bytes..range.end.div_ceil(chunk_bytes));
        // Where the size has changed, so has every chunk that was not whole before or is not now.
        let resized = (known.size_bytes != disk.size_bytes)
            .then(|| known.size_bytes.min(disk.size_bytes) / chunk_bytes..shape.chunk_count());
        let mut dirty: Vec<_> = touched.chain(resized).collect();
        dirty.extend(self.lost_chunks(&shape, &list));
        dirty.sort_unstable_by_key(|run| run.start);
        let dirty = joined(dirty);
        let mut ids = list;
        ids.resize(index_of(shape.chunk_count()), shape.zeros);
        for chunk in dirty.iter().cloned().flatten() {
            ids[index_of(chunk)] = shape.zero_id(chunk);
        }
        Ok(DiskPlan { shape, incremental: true, dirty, ids: Mutex::new(ids) })
    }

    /// Chunks of the parent that the repository no longer has: they are read again.
    fn lost_chunks(&self, shape: &Shape, list: &[Id]) -> Vec<Range<u64>> {
        let index = self.index();
        let mut last = shape.zeros;
        let mut lost = Vec::new();
        for (chunk, id) in (0..shape.chunk_count()).zip(list) {
            // Chunks of zeros are seen to at the end, and neighbours are often the same.
            if *id == last || *id == shape.zero_id(chunk) {
                continue;
            }
            if index.has_data(id) {
                last = *id;
            } else {
                lost.push(chunk..chunk + 1);
            }
        }
        if !lost.is_empty() {
            tracing::warn!(chunks = lost.len(), "chunks of the parent backup are lost; they are read again");
        }
        lost
    }
}

/// A parent's list for a disk, if it is whole: as long as its size says, with the digest that it had.
fn take_list(files: &mut [TreeFile], known: &BackupDisk) -> Option<Vec<Id>> {
    let file = files.iter_mut().find(|file| file.name == known.file_name())?;
    let list = std::mem::take(&mut file.content);
    let whole = list.len() as u64 == known.chunk_count()
        && manifest::digest(known.size_bytes, known.chunk_bytes, &list) == known.digest;
    if !whole {
        tracing::warn!(disk = %known.name, "the parent's list does not have its digest; everything is read");
    }
    whole.then_some(list)
}

fn plan_all(disk: &SourceDisk) -> DiskPlan {
    let shape = Shape::new(disk.size_bytes, manifest::chunk_bytes_for(disk.size_bytes));
    let all = 0..shape.chunk_count();
    let mut ids = vec![shape.zeros; index_of(all.end)];
    if let Some(last) = ids.last_mut() {
        *last = shape.zero_id(all.end - 1);
    }
    let dirty = if all.is_empty() { Vec::new() } else { vec![all] };
    DiskPlan { shape, incremental: false, dirty, ids: Mutex::new(ids) }
}

/// Sorted runs, joined where they touch.
fn joined(runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(runs.len());
    for run in runs.into_iter().filter(|run| run.start < run.end) {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

/// Chunks for one worker to do at a time, with the stretches of them that have data.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) disk: usize,
    pub(crate) chunks: Range<u64>,
    pub(crate) data: Vec<Range<u64>>,
}

/// At most this many bytes of disk are one piece of work, and at least a chunk.
const WORK_BYTES: u64 = 2 << 20;
/// How much of a disk the source is asked about at a time.
const WINDOW_BYTES: u64 = 1 << 30;

/// Cuts a disk's dirty chunks into work, leaving out what has no data. `send` gets each piece, or the number of
/// bytes that were left out; it ends the planning by returning false.
pub(crate) fn cut(
    source: &dyn Source,
    disk: usize,
    plan: &DiskPlan,
    send: &mut dyn FnMut(Option<Work>, u64) -> bool,
) -> io::Result<()> {
    let chunk_bytes = u64::from(plan.shape.chunk_bytes);
    let window_chunks = (WINDOW_BYTES / chunk_bytes).max(1);
    for run in &plan.dirty {
        let mut start = run.start;
        while start < run.end {
            let chunks = start..run.end.min(start + window_chunks);
            start = chunks.end;
            let bytes = plan.shape.bytes_of(&chunks);
            let extents = source.data_extents(disk, bytes.clone())?;
            check_extents(&extents, &bytes)?;
            if !cut_window(disk, plan, chunks, &extents, send) {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn check_extents(extents: &[Range<u64>], within: &Range<u64>) -> io::Result<()> {
    let mut end = within.start;
    for extent in extents {
        if extent.start < end || extent.end < extent.start || extent.end > within.end {
            let what = format!("the source named the stretches {extents:?} within {within:?}: not in order");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        end = extent.end;
    }
    Ok(())
}

fn cut_window(
    disk: usize,
    plan: &DiskPlan,
    window: Range<u64>,
    extents: &[Range<u64>],
    send: &mut dyn FnMut(Option<Work>, u64) -> bool,
) -> bool {
    let chunk_bytes = u64::from(plan.shape.chunk_bytes);
    let touched = extents
        .iter()
        .filter(|extent| extent.start < extent.end)
        .map(|extent| extent.start / chunk_bytes..extent.end.div_ceil(chunk_bytes));
    let mut done = window.start;
    let mut first_extent = 0;
    for run in joined(touched.collect()) {
        let skipped = plan.shape.bytes_of(&(done..run.start));
        if !send(None, skipped.end - skipped.start) {
            return false;
        }
        let mut start = run.start;
        while start < run.end {
            let chunks = start..run.end.min(start + (WORK_BYTES / chunk_bytes).max(1));
            start = chunks.end;
            let bytes = plan.shape.bytes_of(&chunks);
            while extents.get(first_extent).is_some_and(|extent| extent.end <= bytes.start) {
                first_extent += 1;
            }
            let data = extents[first_extent..]
                .iter()
                .take_while(|extent| extent.start < bytes.end)
                .map(|extent| extent.start.max(bytes.start)..extent.end.min(bytes.end))
                .filter(|extent| extent.start < extent.end)
                .collect();
            if !send(Some(Work { disk, chunks, data }), 0) {
                return false;
            }
        }
        done = run.end;
    }
    let skipped = plan.shape.bytes_of(&(done..window.end));
    send(None, skipped.end - skipped.start)
}
