//! What must always be true, looked at from outside with nothing but the history of what the guests wrote.

use std::collections::BTreeMap;
use std::path::PathBuf;

use model::gate::{Access, Condition};
use model::{ApplyState, Consistency, DiskName, Health, LogNumber, Phase, PointInfo, VmId};
use replica::{ConsistentView, Store, VmFacts};

use super::readers::read_flat;
use super::{Checked, World, wrong};
use crate::history::Moment;
use crate::repository::{CHUNK_BYTES, SimRepository};

/// What reading a view came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Every byte is right.
    Right,
    /// The store says that it can no longer be read.
    Revoked,
    /// A log of it is damaged, and the store says so.
    Damaged,
}

/// What is remembered of a VM's replica between two looks.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// The points that were read and were right.
    seen: BTreeMap<model::LogId, LogNumber>,
    newest: LogNumber,
    shown: Vec<PointInfo>,
    phase: &'static str,
    /// How far its initial replication was, in bytes of disk.
    covered_bytes: u64,
}

/// The place of a disk in the VM: their names go by it.
pub(super) fn place_of(name: &DiskName) -> usize {
    name.as_str().bytes().last().map_or(0, |letter| usize::from(letter.saturating_sub(b'a')))
}

/// A view reads as the VM was at its moment, on all disks, and calls nothing zeros that is not.
pub(super) fn check_view(view: &ConsistentView, moment: &Moment, may_lose: bool) -> Checked<Seen> {
    let point = view.point().number;
    let disks = view.disks();
    if disks.len() != moment.state.disks.len() {
        return wrong(format!(
            "point {point} has {} disks, the VM had {}",
            disks.len(),
            moment.state.disks.len()
        ));
    }
    for disk in disks {
        let place = place_of(&disk.name);
        let size_bytes = moment.state.bytes(place);
        if disk.size_bytes != size_bytes {
            let sizes = format!("{} bytes at point {point}, it had {size_bytes}", disk.size_bytes);
            return wrong(format!("disk {} has {sizes}", disk.name));
        }
        let mut bytes = vec![0xee; usize::try_from(size_bytes).unwrap_or(0)];
        let read = view
            .read_at(&disk.name, 0, &mut bytes)
            .and_then(|()| view.data_extents(&disk.name, 0..size_bytes));
        let data = match read {
            Ok(data) => data,
            Err(replica::Error::Revoked { .. }) => return Ok(Seen::Revoked),
            Err(_) if may_lose => return Ok(Seen::Damaged),
            Err(error) => return wrong(format!("point {point} cannot be read: {error}")),
        };
        if let Err(what) = moment.state.check(place, 0, &bytes) {
            return wrong(format!("point {point} is not what the VM was: {what}"));
        }
        for hole in holes(&data, size_bytes) {
            if !moment.state.is_zero(place, hole.clone()) {
                return wrong(format!("point {point} calls bytes {hole:?} of disk {} zeros", disk.name));
            }
        }
    }
    Ok(Seen::Right)
}

fn holes(data: &[std::ops::Range<u64>], size_bytes: u64) -> Vec<std::ops::Range<u64>> {
    let ends = std::iter::once(0).chain(data.iter().map(|range| range.end));
    let starts = data.iter().map(|range| range.start).chain([size_bytes]);
    ends.zip(starts).filter(|(end, start)| end < start).map(|(end, start)| end..start).collect()
}

/// What lies below a failed-over VM's layers is the point that it was failed over to.
pub(super) fn check_failover(store: &Store, vm: VmId, moment: &Moment, may_lose: bool) -> Checked {
    let read = || {
        let view = store.failover_view(vm)?;
        let disks = view.disks().into_iter().map(|disk| {
            let mut bytes = vec![0; usize::try_from(disk.size_bytes).unwrap_or(0)];
            view.read_at(&disk.name, 0, &mut bytes).map(|()| (disk, bytes))
        });
        disks.collect::<replica::Result<Vec<_>>>()
    };
    match read() {
        Ok(disks) => disks.into_iter().try_for_each(|(disk, bytes)| {
            let path = PathBuf::from(disk.name.as_str());
            flat_equals(&disk.name, &Ok(bytes), disk.size_bytes, moment)
                .or_else(|what| wrong(format!("{} below a failover: {what}", path.display())))
        }),
        Err(_) if may_lose => Ok(()),
        Err(error) => wrong(format!("what lies below a failover cannot be read: {error}")),
    }
}

/// A flat file reads as the disk was.
pub(super) fn flat_equals(
    name: &DiskName,
    read: &Result<Vec<u8>, PathBuf>,
    size_bytes: u64,
    moment: &Moment,
) -> Checked {
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(path) => return wrong(format!("the flat file {} cannot be read", path.display())),
    };
    let place = place_of(name);
    if bytes.len() as u64 != size_bytes || size_bytes != moment.state.bytes(place) {
        return wrong(format!("the flat file of disk {name} has {} bytes", bytes.len()));
    }
    moment.state.check(place, 0, bytes).or_else(|what| wrong(format!("flat files are not the point: {what}")))
}

/// What must be refused, and with which code of several: the first, of which a person learns the most. Written down again
/// here, so that the gate is not held against itself.
fn must_refuse(facts: &VmFacts, access: Access) -> Option<Condition> {
    let VmFacts { phase, apply, migrating_since, health, .. } = facts;
    let conditions = [
        (Condition::InitialReplication, matches!(phase, Phase::InitialReplication { .. })),
        (Condition::Failover, matches!(phase, Phase::Failover { .. })),
        (Condition::Migration, migrating_since.is_some()),
        (Condition::Resync, matches!(phase, Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. })),
        (Condition::ApplyFailed, matches!(apply, ApplyState::Failed { .. })),
        (Condition::ApplyInterrupted, matches!(apply, ApplyState::Interrupted { .. })),
        (Condition::HealthCritical, health.health == Health::Critical),
        (Condition::ApplyInProgress, matches!(apply, ApplyState::Running { .. }) && access != Access::Pinned),
    ];
    conditions.into_iter().find(|(_, holds)| *holds).map(|(condition, _)| condition)
}

impl World {
    /// Looks at everything.
    pub(super) fn check_all(&mut self) -> Checked {
        let Some(store) = self.replica.store() else { return Ok(()) };
        for place in self.places() {
            let Some(vm) = self.vms[place].id else { continue };
            let Ok(facts) = store.facts(vm) else {
                if self.truth.newest_acked(vm) > LogNumber::ZERO {
                    return wrong(format!("{} has acknowledged logs and no replica", self.vms[place].name));
                }
                continue;
            };
            self.check_chain(place, vm, &store, &facts)?;
            self.check_gate(vm, &store, &facts)?;
            self.check_points(place, vm, &store)?;
        }
        self.look_at_readers()?;
        self.replica.clock.looked_at();
        Ok(())
    }

    fn check_chain(&mut self, place: usize, vm: VmId, store: &Store, facts: &VmFacts) -> Checked {
        let name = self.vms[place].name.clone();
        let (Ok(head), Ok(applied), Ok(points)) = (store.head(vm), store.applied(vm), store.points(vm))
        else {
            return wrong(format!("{name} has facts and no chain"));
        };
        let acked = self.truth.newest_acked(vm);
        if head.number < acked {
            return wrong(format!(
                "log {acked} of {name} was acknowledged, its chain ends with {}",
                head.number
            ));
        }
        let oldest = points.first().map(|point| point.number).into_iter().chain(self.oldest_view(vm)).min();
        if applied > head.number || oldest.is_some_and(|oldest| applied > oldest) {
            return wrong(format!(
                "the base of {name} is at {applied}, past its oldest point {oldest:?} or its head"
            ));
        }
        // What is lost is said in the phase too, and a status costs more than all of this.
        let whole = matches!(facts.phase, Phase::Replicating | Phase::InitialReplication { .. });
        let damage = if whole { None } else { store.status(vm).ok().and_then(|status| status.damage) };
        if let Some(damage) = damage.filter(|_| !self.truth.may_lose(vm)) {
            return wrong(format!("a part of {name} was lost without a cause: {damage}"));
        }
        let remembered = &mut self.replica.remembered(vm);
        let newest = points.last().map_or(LogNumber::ZERO, |point| point.number);
        if newest < remembered.newest && !self.truth.may_lose(vm) {
            return wrong(format!("{name} has shown point {} and no longer does", remembered.newest));
        }
        remembered.newest = newest;
        let (before, after) =
            (std::mem::replace(&mut remembered.phase, facts.phase.name()), facts.phase.name());
        let covered_bytes = match &facts.phase {
            Phase::InitialReplication { progress } => progress.covered_bytes,
            _ => u64::MAX,
        };
        // Once, and never anew: what has arrived of it has arrived.
        let covered_before = std::mem::replace(&mut remembered.covered_bytes, covered_bytes);
        if covered_bytes < covered_before {
            return wrong(format!(
                "the initial replication of {name} goes back from {covered_before} bytes to {covered_bytes}"
            ));
        }
        if before != after {
            self.coverage
                .hit(format!("replica {} -> {after}", if before.is_empty() { "none" } else { before }));
        }
        Ok(())
    }

    fn check_gate(&mut self, vm: VmId, store: &Store, facts: &VmFacts) -> Checked {
        let newest = store.points(vm).ok().and_then(|points| points.last().copied());
        for access in [Access::Pinned, Access::Strict, Access::Hold] {
            let expected = must_refuse(facts, access);
            let point = match access {
                Access::Hold => store.hold_point(vm).ok().flatten(),
                _ => newest,
            };
            let answer = store.admit(vm, access, point.map_or(LogNumber::ZERO, |point| point.number));
            match answer {
                Err(replica::Error::Gate(refusal)) if expected == Some(refusal.condition) => {
                    self.coverage.hit(format!("refused {}", refusal.condition.code()));
                }
                Err(replica::Error::Gate(refusal)) => {
                    let code = refusal.condition;
                    return wrong(format!("{access:?} was refused with {code} in place of {expected:?}"));
                }
                _ if expected.is_some() => {
                    return wrong(format!("{access:?} was not refused in spite of {expected:?}"));
                }
                Err(error) if point.is_some() => return wrong(format!("{access:?} was not given: {error}")),
                _ => {}
            }
        }
        Ok(())
    }

    /// Every new point is read, byte by byte.
    fn check_points(&mut self, place: usize, vm: VmId, store: &Store) -> Checked {
        let points = store.points(vm).unwrap_or_default();
        let before = std::mem::replace(&mut self.replica.remembered(vm).shown, points.clone());
        self.check_gone(place, vm, &before, &points)?;
        for point in points {
            if self.replica.remembered(vm).seen.contains_key(&point.id) {
                continue;
            }
            let Some(seen) = self.check_point(place, vm, store, point)? else { continue };
            if seen == Seen::Right {
                self.replica.remembered(vm).seen.insert(point.id, point.number);
            }
        }
        Ok(())
    }

    /// Reads a point through the gate; none if it is not given.
    fn check_point(
        &mut self,
        place: usize,
        vm: VmId,
        store: &Store,
        point: PointInfo,
    ) -> Checked<Option<Seen>> {
        let name = self.vms[place].name.clone();
        let Some(moment) = self.truth.moment(vm, point.id) else {
            return wrong(format!("point {} of {name} is of a log that was never sent", point.number));
        };
        if self.vms[place].machine.lock().history.after(moment.state.writes) != *moment.state {
            return wrong(format!("point {} of {name} is no moment of its VM over all disks", point.number));
        }
        let consistent = moment.frozen || point.consistency == Consistency::Crash;
        if point.taken_at != moment.at || !consistent {
            return wrong(format!("point {} of {name} says that it is of another moment", point.number));
        }
        let open =
            || store.admit(vm, Access::Pinned, point.number).and_then(|admitted| store.open_view(admitted));
        let view = match self.replica.observed(open) {
            Ok(view) => view,
            Err(replica::Error::Gate(_)) => return Ok(None),
            Err(_) if self.truth.may_lose(vm) => return Ok(None),
            Err(error) => {
                return wrong(format!("point {} of {name} cannot be opened: {error}", point.number));
            }
        };
        let may_lose = self.truth.may_lose(vm);
        let seen = self.replica.observed(|| check_view(&view, &moment, may_lose))?;
        self.coverage.hit("points checked");
        Ok(Some(seen))
    }

    /// Reads every point again, whether it was looked at or not.
    pub(super) fn check_every_point(&mut self) -> Checked {
        let Some(store) = self.replica.store() else { return Ok(()) };
        for place in self.places() {
            let Some(vm) = self.vms[place].id else { continue };
            for point in store.points(vm).unwrap_or_default() {
                self.check_point(place, vm, &store, point)?;
            }
        }
        Ok(())
    }

    /// The flat files of which no apply is said to be under way are the point that they are said to be.
    pub(super) fn check_bases(&mut self) -> Checked {
        let Some(store) = self.replica.store() else { return Ok(()) };
        for place in self.places() {
            let Some(vm) = self.vms[place].id.filter(|vm| !self.truth.may_lose(*vm)) else { continue };
            let (Ok(facts), Ok(applied)) = (store.facts(vm), store.applied(vm)) else { continue };
            if facts.apply != ApplyState::Idle || facts.phase != Phase::Replicating {
                continue;
            }
            let seen = &self.replica.remembered(vm).seen;
            let id = seen.iter().find(|(_, number)| **number == applied).map(|(id, _)| *id);
            let moment = id.and_then(|id| self.truth.moment(vm, id));
            let (Some(moment), Ok(status)) = (moment, store.status(vm)) else { continue };
            for disk in status.disks {
                let path = status.folder.join("disks").join(format!("{}.raw", disk.name));
                let size_bytes = moment.state.bytes(place_of(&disk.name));
                let read = self.replica.observed(|| read_flat(&self.replica.disk, &path));
                flat_equals(&disk.name, &read, size_bytes, &moment)?;
            }
            self.coverage.hit("bases looked at");
        }
        Ok(())
    }

    /// Every backup that is listed can be restored, byte by byte, with nothing but what is on the disk.
    pub(super) fn check_backups(&mut self) -> Checked {
        if self.replica.power.is_down() {
            return Ok(());
        }
        let root = self.replica.repository();
        let restored = self.replica.observed(|| {
            let repository =
                SimRepository::open(&self.replica.disk, &root).map_err(|error| error.to_string())?;
            let backups = repository.backups().map_err(|error| error.to_string())?;
            Ok::<_, String>((repository, backups))
        });
        let (repository, backups) = match restored {
            Ok(found) => found,
            Err(error) => return wrong(format!("the repository cannot be opened: {error}")),
        };
        for backup in &backups {
            let Some(moment) = self.truth.moment(backup.vm, backup.point.id) else {
                return wrong(format!("{backup} is of a point that nobody made"));
            };
            for disk in &backup.disks {
                let place = place_of(&disk.name);
                if disk.size_bytes != moment.state.bytes(place) {
                    return wrong(format!("{backup} has a disk of {} bytes", disk.size_bytes));
                }
                for (number, chunk) in disk.chunks.iter().enumerate() {
                    let bytes = self.replica.observed(|| repository.chunk(chunk));
                    let bytes =
                        bytes.or_else(|error| wrong(format!("{backup} cannot be restored: {error}")))?;
                    let checked = moment.state.check(place, number as u64 * CHUNK_BYTES, &bytes);
                    checked.or_else(|what| wrong(format!("{backup} is not what the VM was: {what}")))?;
                }
            }
            self.coverage.hit("backups checked");
        }
        Ok(())
    }
}
