//! What to write so that the base takes in its oldest logs.

use std::ops::{Range, RangeInclusive};

use log::Extent;
use model::LogNumber;

use crate::packed::{Content, Packed};
use crate::{IndexError, Layer, Overlay};

/// What to write to fold logs into something: each surviving byte once, zeros apart.
///
/// Survivors are disjoint, so the order of the writes does not matter; they come log by log and record
/// by record, so that every log is read once from front to back, no record is decompressed twice and a
/// record without a survivor is not read at all. Carried out twice, or again after a part of it was, the
/// outcome is the same: an apply that was cut off starts over.
///
/// Before its writes the shell sets each disk's file to [`ApplyPlan::disk_sizes`].
#[derive(Debug, Clone)]
pub struct ApplyPlan {
    /// In order of log and record.
    work: Vec<PackedWork>,
    pieces: Vec<RecordPiece>,
    /// The extents to make zero, with their disk.
    pub zeros: Vec<(usize, Extent)>,
    /// What size each disk has afterwards; none if no log has the disk.
    pub disk_sizes: Vec<Option<u64>>,
}

/// One record and what to write of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordWork<'a> {
    /// The log.
    pub log: LogNumber,
    /// The record, by its place in the log's index.
    pub record: u32,
    /// The disk, by its place in the chain.
    pub disk: usize,
    /// What to write of it, in order of [`RecordPiece::skip`].
    pub pieces: &'a [RecordPiece],
}

/// A run of a record's raw payload that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordPiece {
    /// Where to, in bytes.
    pub disk_offset: u64,
    /// From where in the raw payload, in bytes.
    pub skip: u32,
    /// How much, in bytes.
    pub len: u32,
}

#[derive(Debug, Clone)]
struct PackedWork {
    log: LogNumber,
    record: u32,
    disk: usize,
    pieces: Range<usize>,
}

impl ApplyPlan {
    /// The plan for these logs, in any order, of a chain of this many disks.
    pub fn new<'a>(disks: usize, layers: impl IntoIterator<Item = Layer<'a>>) -> Result<Self, IndexError> {
        Ok(Self::from_overlay(Overlay::build(disks, layers)?))
    }

    /// The plan for the logs of an overlay (built log by log where not all indexes fit in memory).
    #[must_use]
    pub fn from_overlay(overlay: Overlay) -> Self {
        let disk_sizes = (0..overlay.disk_count()).map(|disk| overlay.disk_size(disk)).collect();
        let (numbers, disks) = overlay.into_parts();
        let mut plan = Self { work: Vec::new(), pieces: Vec::new(), zeros: Vec::new(), disk_sizes };
        for (disk, mut run) in disks.into_iter().enumerate() {
            run.sort_unstable_by_key(|piece| (numbers[piece.slot as usize], source_order(piece)));
            for piece in &run {
                plan.add(disk, numbers[piece.slot as usize], piece);
            }
        }
        plan.work.sort_by_key(|work| (work.log, work.record));
        plan
    }

    fn add(&mut self, disk: usize, log: LogNumber, piece: &Packed) {
        let Content::Record { record, skip } = piece.content() else {
            return self.zeros.push((disk, Extent { offset: piece.offset, len: piece.len() }));
        };
        let place = self.pieces.len();
        let len = u32::try_from(piece.len()).expect("no piece is longer than its record");
        self.pieces.push(RecordPiece { disk_offset: piece.offset, skip, len });
        match self.work.last_mut() {
            Some(work) if (work.log, work.record, work.disk) == (log, record, disk) => {
                work.pieces.end = place + 1;
            }
            _ => self.work.push(PackedWork { log, record, disk, pieces: place..place + 1 }),
        }
    }

    /// The records to read and what to write of each, log by log from the oldest.
    pub fn records(&self) -> impl ExactSizeIterator<Item = RecordWork<'_>> {
        self.work.iter().map(|work| RecordWork {
            log: work.log,
            record: work.record,
            disk: work.disk,
            pieces: &self.pieces[work.pieces.clone()],
        })
    }

    /// The bytes that are written, zeros not counted.
    #[must_use]
    pub fn write_bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| u64::from(piece.len)).sum()
    }
}

/// Zeros go first, then the order of the log's file.
const fn source_order(piece: &Packed) -> (u32, u64) {
    match piece.content() {
        Content::Zero => (0, piece.offset),
        Content::Record { record, skip } => (record + 1, skip as u64),
    }
}

/// Cuts a long list of logs (each with the extents it has, oldest first) into runs to be applied one after
/// the other, each of at most `extents_max` extents or of one log, so that no plan outgrows memory.
///
/// Between two runs the base equals no point: to the gate, all of it is one apply, and after a crash all of
/// it starts over. It still writes no more than the logs hold.
#[must_use]
pub fn apply_batches(logs: &[(LogNumber, usize)], extents_max: usize) -> Vec<RangeInclusive<LogNumber>> {
    let mut batches: Vec<RangeInclusive<LogNumber>> = Vec::new();
    let mut extents_in_last = 0_usize;
    for &(number, extents) in logs {
        extents_in_last = extents_in_last.saturating_add(extents);
        match batches.last_mut() {
            Some(last) if extents_in_last <= extents_max => *last = *last.start()..=number,
            _ => {
                batches.push(number..=number);
                extents_in_last = extents;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_stay_within_their_bound_where_one_log_does() {
        let logs =
            [(1, 4), (2, 4), (3, 20), (4, 1), (6, 9), (7, 0)].map(|(n, extents)| (LogNumber(n), extents));
        let batches: Vec<_> =
            apply_batches(&logs, 10).into_iter().map(|batch| (batch.start().0, batch.end().0)).collect();
        assert_eq!(batches, [(1, 2), (3, 3), (4, 7)]);
        assert!(apply_batches(&[], 10).is_empty());
    }
}
