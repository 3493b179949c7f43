//! What a cycle has read before its moment, and which of it still holds at the moment. Pure but for the reading.
//!
//! While a moment is fixed the guest pays a copy for its first write to each 64 KiB. What is read ahead costs it
//! nothing but its turn, and only what changes meanwhile is left to be read at the moment.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use nbd::DirtyExtent;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::error::Failure;
use crate::ports::{DiskReader, Which};
use crate::read::{MERGE_GAP_BYTES, REQUEST_BYTES_MAX, STRETCH_BYTES, by};

/// The most that all cycles of a site read ahead, in bytes: it is kept in memory, as it was read. One alone may
/// have all of it; at an interval of 30 s a guest of 500 writes a second has changed 60 MB.
const BYTES_OF_SITE: u64 = 64 << 20;
/// Cycles take of that in pieces of this many bytes.
const SHARE_BYTES: u64 = 16 << 20;
/// A cycle after one with less data than this reads nothing ahead: its moment is short enough.
pub const AHEAD_FROM_BYTES: u64 = 1 << 20;
/// How long it may take: what has been read by then is what there is.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Requests in flight: the guest's own wait behind no more than these.
const REQUESTS_IN_FLIGHT: usize = 2;

/// The memory for what the cycles of a site read ahead.
pub(crate) struct Memory(Semaphore);

/// What one cycle may keep.
pub(crate) struct Share<'a> {
    pub bytes: u64,
    _permit: SemaphorePermit<'a>,
}

impl Memory {
    pub fn of_site() -> Self {
        Self(Semaphore::new((BYTES_OF_SITE / SHARE_BYTES) as usize))
    }

    /// As much as is there of what a cycle needs that reads about so many bytes; none if nothing is.
    pub fn take(&self, about: u64) -> Option<Share<'_>> {
        // A cycle is seldom as large as the one before it, and what does not fit is read at the moment.
        let needed = (about + about / 4).div_ceil(SHARE_BYTES).clamp(1, BYTES_OF_SITE / SHARE_BYTES);
        let shares = (1..=u32::try_from(needed).unwrap_or(1)).rev();
        shares
            .filter_map(|shares| Some((shares, self.0.try_acquire_many(shares).ok()?)))
            .map(|(shares, permit)| Share { bytes: u64::from(shares) * SHARE_BYTES, _permit: permit })
            .next()
    }
}

/// The changes of a VM's disks that were read ahead.
#[derive(Debug, Default)]
pub(crate) struct ReadAhead {
    disks: Vec<Vec<Piece>>,
}

/// Bytes of a disk: where they are, and what they are.
pub(crate) type Piece = (u64, Bytes);

impl ReadAhead {
    /// Reads what had changed when it began, up to so many bytes.
    pub async fn of<D: DiskReader>(disks: &[D], bytes_max: u64) -> Result<Self, Failure> {
        let deadline = Instant::now() + TIME_MAX;
        let mut read = Self::default();
        let mut left = bytes_max;
        for disk in disks {
            let mut pieces = Vec::new();
            pieces_of(disk, deadline, &mut left, &mut pieces).await?;
            read.disks.push(pieces);
        }
        Ok(read)
    }

    /// The pieces of a stretch of a disk that nothing has changed since, of those that are data at the moment, and
    /// the extents that are left to be read. `data` and `again` are sorted and disjoint, as the pieces are.
    pub fn split(
        &self,
        disk: usize,
        data: &[DirtyExtent],
        again: &[DirtyExtent],
    ) -> (Vec<Piece>, Vec<DirtyExtent>) {
        let mut kept = Vec::new();
        let mut left = Vec::new();
        let pieces = self.disks.get(disk).map_or(&[][..], Vec::as_slice);
        for extent in data {
            let mut at = extent.offset;
            let first = pieces.partition_point(|piece| end(piece) <= extent.offset);
            for piece in pieces[first..].iter().take_while(|piece| piece.0 < extent.end()) {
                for still in without(piece.0.max(extent.offset)..end(piece).min(extent.end()), again) {
                    if at < still.start {
                        left.push(DirtyExtent { offset: at, len: still.start - at, zero: false });
                    }
                    at = still.end;
                    let bytes = (still.start - piece.0) as usize..(still.end - piece.0) as usize;
                    kept.push((still.start, piece.1.slice(bytes)));
                }
            }
            if at < extent.end() {
                left.push(DirtyExtent { offset: at, len: extent.end() - at, zero: false });
            }
        }
        (kept, left)
    }
}

fn end(piece: &Piece) -> u64 {
    piece.0 + piece.1.len() as u64
}

/// A range without what `again` names.
fn without(range: Range<u64>, again: &[DirtyExtent]) -> impl Iterator<Item = Range<u64>> {
    let first = again.partition_point(|extent| extent.end() <= range.start);
    let mut at = range.start;
    let mut cuts = again[first..].iter().take_while(move |extent| extent.offset < range.end);
    let mut done = false;
    std::iter::from_fn(move || {
        while !done {
            let (until, next) = match cuts.next() {
                Some(cut) => (cut.offset, cut.end()),
                None => {
                    done = true;
                    (range.end, range.end)
                }
            };
            let still = at..until.max(at);
            at = next.max(at);
            if !still.is_empty() {
                return Some(still);
            }
        }
        None
    })
}

async fn pieces_of<D: DiskReader>(
    disk: &D,
    deadline: Instant,
    left: &mut u64,
    pieces: &mut Vec<Piece>,
) -> Result<(), Failure> {
    for stretch in by(STRETCH_BYTES, 0..disk.size_bytes()) {
        if *left == 0 {
            return Ok(());
        }
        let extents = disk.extents(stretch, Which::Changed).await?;
        let plan = nbd::read_plan(&extents, MERGE_GAP_BYTES, REQUEST_BYTES_MAX);
        let read = |request: nbd::ReadRequest| async move {
            let bytes = disk.read(request.offset, request.len).await?;
            Ok::<_, Failure>((request, bytes))
        };
        let mut reads = stream::iter(plan).map(read).buffered(REQUESTS_IN_FLIGHT);
        while let Some((request, bytes)) = reads.try_next().await? {
            for (skip, len) in request.wanted {
                if *left < len || Instant::now() >= deadline {
                    *left = 0;
                    return Ok(());
                }
                *left -= len;
                // Of its own, so that the gaps in between are not kept.
                let wanted = Bytes::copy_from_slice(&bytes[skip as usize..(skip + len) as usize]);
                pieces.push((request.offset + skip, wanted));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: usize = 24;
    const BLOCK: u64 = 4;

    fn extents(of: &[bool]) -> Vec<DirtyExtent> {
        let mut found: Vec<DirtyExtent> = Vec::new();
        for (offset, _) in (0..).step_by(BLOCK as usize).zip(of).filter(|(_, is)| **is) {
            match found.last_mut() {
                Some(last) if last.end() == offset => last.len += BLOCK,
                _ => found.push(DirtyExtent { offset, len: BLOCK, zero: false }),
            }
        }
        found
    }

    #[test]
    fn a_cycle_takes_what_it_needs_and_others_what_is_left() {
        const MIB: u64 = 1 << 20;
        let memory = Memory::of_site();
        let large = memory.take(30 * MIB).unwrap();
        assert_eq!(large.bytes, 48 * MIB);
        let rest = memory.take(1000 * MIB).unwrap();
        assert_eq!(rest.bytes, 16 * MIB);
        assert!(memory.take(1).is_none());
        drop(large);
        assert_eq!(memory.take(0).unwrap().bytes, 16 * MIB);
        drop(rest);
        assert_eq!(memory.take(60 * MIB).unwrap().bytes, 64 * MIB);
    }

    proptest! {
        /// Block by block: from memory if it was read and has not changed, else to be read; nothing twice.
        #[test]
        fn each_block_of_data_is_kept_or_left(
            data in prop::collection::vec(any::<bool>(), BLOCKS),
            again in prop::collection::vec(any::<bool>(), BLOCKS),
            read in prop::collection::vec(any::<bool>(), BLOCKS),
            runs in 1..6_u64,
        ) {
            let piece = |offset: u64, len: u64| (offset, (offset..offset + len).map(|at| at as u8).collect::<Bytes>());
            let pieces = extents(&read).into_iter().flat_map(|extent| {
                (extent.offset..extent.end()).step_by((runs * BLOCK) as usize)
                    .map(|at| piece(at, (runs * BLOCK).min(extent.end() - at))).collect::<Vec<_>>()
            });
            let ahead = ReadAhead { disks: vec![pieces.collect()] };
            let (kept, left) = ahead.split(0, &extents(&data), &extents(&again));
            for block in 0..BLOCKS {
                let at = block as u64 * BLOCK;
                let from_memory = kept.iter().filter(|piece| piece.0 <= at && at < end(piece)).count();
                let to_read = left.iter().filter(|extent| extent.offset <= at && at < extent.end()).count();
                let is_kept = data[block] && read[block] && !again[block];
                prop_assert_eq!((from_memory, to_read), (usize::from(is_kept), usize::from(data[block] && !is_kept)));
            }
            for (offset, bytes) in &kept {
                prop_assert!(bytes.iter().zip(*offset..).all(|(byte, at)| u64::from(*byte) == at));
            }
            prop_assert!(kept.is_sorted_by_key(|piece| piece.0) && left.is_sorted_by_key(|extent| extent.offset));
        }
    }
}
