//! What a replica passes on to a third site, as far as the store is concerned: a point to read, what changed in it since
//! an earlier one, and *marks*, which remember that one.
//!
//! A mark stands where a primary has a dirty bitmap: mark *k* is the point whose state log *k* of the third site's chain
//! has. Nothing is noted meanwhile, for the chain itself tells what changed since a point: its logs while they are there,
//! the change map once they are folded in. So all that is kept is a number, and the rules are those of bitmaps
//! (`model::bitmaps`): the same cuts at the same places leave the same marks.
//!
//! Marks are in the VM's row, and go with it. Where the chain loses logs, it loses the marks on them.

use std::ops::Range;
use std::sync::Arc;

use chain::{ApplyPlan, next_to_forward, next_to_move};
use log::EncodedRecord;
use model::bitmaps::{Ours, Step};
use model::{DiskName, LogNumber, PointInfo, VmId};
use serde::{Deserialize, Serialize};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::failover::disks_at;
use crate::gate::Pin;
use crate::reader::{ChainReader, OpenFiles};
use crate::rows::DiskSize;
use crate::store::Store;
use crate::survivors::Survivors;
use crate::vm::{Indexed, OpenLog, State};

/// While less than so much is free beyond the reserve, nobody keeps logs here by reading slowly.
const ROOM_BYTES: u64 = 256 << 20;

/// A point whose state a log of the third site's chain has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The third site's log.
    pub k: LogNumber,
    /// The point here.
    pub at: LogNumber,
}

/// What there is to pass on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwardable {
    /// The newest point; none before the end of the first pass, or after a loss.
    pub newest: Option<PointInfo>,
    /// The VM's disks at it.
    pub disks: Vec<DiskSize>,
    /// Seconds between two points, as its primary wants it.
    pub interval_s: u64,
    /// Hourly points beside the latest, as kept here.
    pub points: u8,
    /// How often the VM has changed its site for good, and one more.
    pub generation: u64,
    /// The peer that it comes from.
    pub peer: String,
    /// It was failed over to this site for good: what is written to it now is in no log.
    pub failed_over: bool,
}

/// A point that is passed on, readable byte for byte as long as this lives.
pub struct Forward {
    pin: Pin,
    store: Store,
    reader: Arc<ChainReader>,
    /// What the third site has.
    since: Option<LogNumber>,
    /// The logs after that, if all of them are still there.
    logs: Option<Vec<OpenLog>>,
}

impl Store {
    /// What there is to pass on of a VM.
    pub fn forwardable(&self, vm: VmId) -> Result<Forwardable> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let newest = state.points.values().next_back().copied();
        let disks = newest.map_or(Ok(Vec::new()), |point| disks_at(&state, point.number))?;
        let doc = &state.row.doc;
        Ok(Forwardable {
            newest,
            disks,
            interval_s: doc.interval_s,
            points: doc.points,
            generation: doc.generation,
            peer: state.row.peer.clone(),
            failed_over: state.is_completing(),
        })
    }

    /// Whether there is a replica of a VM that can be passed on.
    #[must_use]
    pub fn is_forwardable(&self, vm: VmId) -> bool {
        self.vm(vm).is_ok_and(|vm| {
            let state = vm.lock();
            !state.removed && !state.is_completing()
        })
    }

    /// The marks, as bitmaps that record.
    pub fn marks(&self, vm: VmId) -> Result<Vec<Ours>> {
        Ok(ours(&*self.vm(vm)?.live()?))
    }

    /// Whether there is a point newer than what mark `k` has.
    pub fn is_newer_than_mark(&self, vm: VmId, k: LogNumber) -> Result<bool> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let newest = state.points.keys().next_back();
        Ok(mark(&state, k).is_none_or(|mark| newest.is_some_and(|newest| *newest > mark.at)))
    }

    /// Whether more is to be passed on at once after mark `k`, whatever the interval: where the replica moves.
    #[must_use]
    pub fn has_backlog(&self, vm: VmId, k: LogNumber) -> bool {
        self.vm(vm).is_ok_and(|found| found.lock().row.doc.relocating.is_some())
            && self.is_newer_than_mark(vm, k).unwrap_or(false)
    }

    /// The bytes of the logs after mark `k`.
    pub fn bytes_after_mark(&self, vm: VmId, k: LogNumber) -> Result<u64> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let after = mark(&state, k).map_or(LogNumber::ZERO, |mark| mark.at);
        Ok(bytes_after(&state, after))
    }

    /// Changes the marks by the rules of bitmaps.
    pub fn change_marks(&self, vm: VmId, steps: impl FnOnce(&[Ours]) -> Vec<Step>) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let mut row = state.row.clone();
        for step in steps(&ours(&state)) {
            carry_out(&mut row.doc.forwarded, step);
        }
        if row == state.row {
            return Ok(());
        }
        durable_step("replica::forward::changing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::forward::changed");
        drop(state);
        self.wake(vm.id);
        Ok(())
    }

    /// Opens the next point to pass on after that of mark `base`, and marks it as `next`. Without a `base` it is the
    /// newest one.
    ///
    /// Where the replica moves to the other site every point goes there, the oldest first; within the pass that begins it
    /// (`in_pass`) it stays the same one.
    pub fn forward(
        &self,
        vm: VmId,
        base: Option<LogNumber>,
        next: LogNumber,
        in_pass: bool,
    ) -> Result<Forward> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        if state.is_completing() {
            return Err(Error::busy(vm.id, "it was failed over to this site for good"));
        }
        let since = match base {
            Some(k) => Some(mark(&state, k).ok_or_else(|| Error::busy(vm.id, "its marks have changed"))?.at),
            None => None,
        };
        let points: Vec<PointInfo> = state.points.values().copied().collect();
        let newest = points.last().copied();
        let disks = |point: PointInfo| disks_at(&state, point.number);
        let chosen = match &state.row.doc.relocating {
            None => next_to_forward(&points, since),
            Some(_) => {
                let begun = since.filter(|_| in_pass).and_then(|at| state.points.get(&at).copied());
                let usable = same_disks(&state, &points)?;
                begun.or_else(|| next_to_move(&usable, since))
            }
        };
        let point = match (chosen, newest) {
            // Disks that have changed in between are the newest point's to show.
            (Some(point), Some(newest)) if disks(point)? != disks(newest)? => newest,
            (Some(point), _) => point,
            // There is nothing newer, and what the third site has may not be what was marked: the same again.
            (None, Some(newest)) => newest,
            (None, None) => return Err(Error::busy(vm.id, "it has no recovery point yet")),
        };
        let files = OpenFiles::open(&state, point.number)?;
        let logs = since.map_or(Ok(None), |since| logs_between(&state, since, point.number))?;
        let mut row = state.row.clone();
        row.doc.forwarded.retain(|mark| mark.k != next);
        row.doc.forwarded.push(Mark { k: next, at: point.number });
        durable_step("replica::forward::marking");
        self.commit_row(&mut state, row)?;
        durable_step("replica::forward::marked");
        let pin = Pin::new(self, &vm, &mut state, point);
        drop(state);
        let reader = Arc::new(files.into_reader(self.inner.config.view_cache_bytes)?);
        Ok(Forward { pin, store: self.clone(), reader, since, logs })
    }
}

impl Forward {
    /// The point.
    #[must_use]
    pub fn point(&self) -> PointInfo {
        self.pin.point
    }

    /// The VM's disks at it.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskSize> {
        let disks = self.reader.disks().iter();
        disks.map(|disk| DiskSize { name: disk.name.clone(), size_bytes: disk.size_bytes }).collect()
    }

    /// Fills `buf` with a disk's bytes from `offset`; beyond its end they are zeros.
    pub fn read_at(&self, disk: &DiskName, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.right(self.reader.read_at(disk, offset, buf))
    }

    /// What of a range of a disk is not certainly zeros, in order and joined.
    pub fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.right(self.reader.data_extents(disk, range))
    }

    /// Where a disk may differ from what the third site has, in order and joined; nothing in a pass that has just begun.
    pub fn changed(&self, disk: &DiskName) -> Result<Vec<Range<u64>>> {
        match self.since {
            Some(since) => self.right(self.reader.changed_since(disk, since)),
            None => Ok(Vec::new()),
        }
    }

    /// Gives all that changed as the records of the logs that it is in, for a log of these disks: a record of which
    /// everything is still true goes as it is, with its checksum, and without being decompressed; of others, what is
    /// overwritten in a newer log is left out. False if it has to be read instead: those logs are folded in, or are of
    /// other disks, or more than fit in memory. Ends early when `take` says false.
    pub fn records(
        &self,
        disks: &[DiskName],
        level: i32,
        mut take: impl FnMut(EncodedRecord) -> bool,
    ) -> Result<bool> {
        let Some(logs) = &self.logs else { return Ok(false) };
        let mut indexed = Vec::with_capacity(logs.len());
        let mut extents = 0;
        for log in logs {
            let log = self.right(Indexed::read(log.clone(), disks))?;
            extents += log.index.extents.len();
            let same = log.header.disks.iter().map(|disk| &disk.name).eq(disks);
            if !same || extents > self.store.inner.config.plan_extents_max {
                return Ok(false);
            }
            indexed.push(log);
        }
        let plan = ApplyPlan::new(disks.len(), indexed.iter().map(Indexed::layer))?;
        let indexed: Vec<&Indexed> = indexed.iter().collect();
        let survivors = Survivors { lifts: true, level, take: |record| Ok(take(record)) };
        let lifted = self.right(survivors.of(&plan, &indexed))?;
        tracing::trace!(vm = %self.pin.vm.id, point = %self.pin.point.number, lifted, "passed on");
        Ok(true)
    }

    /// Whether the disk here is so full that nobody may keep logs by reading this slowly.
    pub fn is_in_the_way(&self) -> Result<bool> {
        let (folder, kept) = {
            let state = self.pin.vm.live()?;
            (state.folder(), bytes_after(&state, self.pin.point.number))
        };
        Ok(kept > ROOM_BYTES && self.store.check_space(&folder, ROOM_BYTES).is_err())
    }

    /// What was read is the point's, if the point is still there. A log that cannot be decoded is looked at as a whole.
    fn right<T>(&self, read: Result<T>) -> Result<T> {
        match &read {
            Ok(_) => self.pin.check()?,
            Err(Error::Damaged { path, .. }) => self.store.check_damage(&self.pin.vm, path)?,
            Err(_) => {}
        }
        read
    }
}

/// The points that have the disks of the newest one: a relationship has one set of them at a time.
fn same_disks(state: &State, points: &[PointInfo]) -> Result<Vec<PointInfo>> {
    let Some(newest) = points.last() else { return Ok(Vec::new()) };
    let disks = disks_at(state, newest.number)?;
    let mut same = Vec::with_capacity(points.len());
    for point in points {
        if disks_at(state, point.number)? == disks {
            same.push(*point);
        }
    }
    Ok(same)
}

fn mark(state: &State, k: LogNumber) -> Option<Mark> {
    state.row.doc.forwarded.iter().find(|mark| mark.k == k).copied()
}

fn ours(state: &State) -> Vec<Ours> {
    let marks = state.row.doc.forwarded.iter();
    marks.map(|mark| Ours { k: mark.k, recording: true, inconsistent: false, count_bytes: 0 }).collect()
}

fn bytes_after(state: &State, point: LogNumber) -> u64 {
    state.logs.values().filter(|log| log.row.number > point).map(|log| log.row.bytes).sum()
}

/// The logs that say what changed between two points; none if they no longer are logs of their own.
fn logs_between(state: &State, since: LogNumber, point: LogNumber) -> Result<Option<Vec<OpenLog>>> {
    if since < state.applied() {
        return Ok(None);
    }
    let between = || state.logs.range(since.next()..=point).map(|(_, log)| log);
    if since >= point || between().any(|log| log.row.first <= since) {
        return Ok(None);
    }
    let folder = state.folder();
    between().map(|log| log.open(&folder)).collect::<Result<_>>().map(Some)
}

/// What a step for a bitmap means for a mark: one that stands for the changes of two is the older one.
fn carry_out(marks: &mut Vec<Mark>, step: Step) {
    match step {
        // What it is merged from says where it is.
        Step::Add(k) => marks.push(Mark { k, at: LogNumber(u64::MAX) }),
        Step::Merge { from, into } => {
            let older = marks.iter().find(|mark| mark.k == from).map(|mark| mark.at);
            let into = marks.iter_mut().find(|mark| mark.k == into);
            if let (Some(older), Some(into)) = (older, into) {
                into.at = into.at.min(older);
            }
        }
        Step::Remove(k) => marks.retain(|mark| mark.k != k),
        Step::Enable(_) | Step::Disable(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use model::bitmaps::{after_durable, after_failure, repair};

    use super::*;

    fn marks(marks: &[(u64, u64)]) -> Vec<Mark> {
        marks.iter().map(|&(k, at)| Mark { k: LogNumber(k), at: LogNumber(at) }).collect()
    }

    /// What becomes of these marks.
    fn after(found: &[(u64, u64)], steps: impl FnOnce(&[Ours]) -> Vec<Step>) -> Vec<Mark> {
        let mut marks = marks(found);
        let ours: Vec<Ours> = marks
            .iter()
            .map(|mark| Ours { k: mark.k, recording: true, inconsistent: false, count_bytes: 0 })
            .collect();
        steps(&ours).into_iter().for_each(|step| carry_out(&mut marks, step));
        marks
    }

    #[test]
    fn marks_follow_the_rules_of_bitmaps() {
        let (base, next) = (Some(LogNumber(7)), LogNumber(8));
        let during = [(7, 70), (8, 80)];
        assert_eq!(after(&during, |found| after_durable(found, base, next)), marks(&[(8, 80)]));
        assert_eq!(after(&during, |found| after_failure(found, base)), marks(&[(7, 70)]));
        // It was given back, and the third site says that it has it: what changed since an older point is more.
        assert_eq!(after(&[(7, 70)], |found| repair(found, Some(next))), marks(&[(8, 70)]));
        // Killed in the middle; the third site has log 8, or has not.
        assert_eq!(after(&during, |found| repair(found, Some(next))), marks(&[(8, 80)]));
        assert_eq!(after(&during, |found| repair(found, base)), marks(&[(7, 70)]));
        assert_eq!(after(&during, |found| repair(found, None)), []);
    }
}
