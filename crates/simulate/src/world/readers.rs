//! Who reads a replica while everything goes on: views, and holds of the flat files. Whatever they are given is
//! held against the truth, also in the middle of an apply.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use files::{FileSystem, Open};
use model::VmId;
use model::gate::{Access, Refusal};
use replica::{ConsistentView, Hold, Store};

use super::check::{Seen, check_view, flat_equals};
use super::{Checked, Violation, World, wrong};
use crate::disk::SimDisk;
use crate::history::Moment;
use crate::power::Power;

/// No more than so many are open at once.
const READERS_MAX: usize = 6;

struct OpenView {
    vm: VmId,
    moment: Moment,
    view: ConsistentView,
}

struct OpenHold {
    moment: Moment,
    hold: Hold,
}

/// What is going on at the store while its writes are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    /// Logs are folded in.
    Apply,
    /// Files are moved.
    Move,
}

/// Who reads; clones share it.
#[derive(Clone, Default)]
pub(super) struct Readers(Arc<Mutex<Reading>>);

#[derive(Default)]
struct Reading {
    views: Vec<OpenView>,
    holds: Vec<OpenHold>,
    violation: Option<Violation>,
    /// What the gate answered while something went on.
    refused: Vec<(Access, Refusal)>,
    looked: u64,
}

impl Readers {
    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Views end with their process; holds are leases that outlive it.
    pub fn process_ended(&self) {
        let views = std::mem::take(&mut self.lock().views);
        drop(views);
    }
}

impl Reading {
    /// Looks at the views of a VM while the store is at work on it, and asks the gate.
    fn look(&mut self, store: &Store, vm: VmId, what: Watch, may_lose: bool) -> Checked {
        self.looked += 1;
        for open in self.views.iter().filter(|open| open.vm == vm) {
            check_view(&open.view, &open.moment, may_lose)?;
        }
        let newest = store.points(vm).ok().and_then(|points| points.last().copied());
        let Some(point) = newest else { return Ok(()) };
        for access in [Access::Hold, Access::Strict, Access::Pinned] {
            let admitted = store.admit(vm, access, point.number);
            match (&admitted, access, what) {
                (Err(replica::Error::Gate(refusal)), _, _) => self.refused.push((access, refusal.clone())),
                (Ok(_), Access::Pinned, Watch::Apply) | (Err(_), _, _) => {}
                (Ok(_), _, _) => return wrong(format!("the gate gave {access:?} in the middle of {what:?}")),
            }
        }
        Ok(())
    }
}

impl World {
    /// From now on the next writes of flat files are looked beside.
    pub(super) fn watch(&mut self, vm: VmId, what: Watch, looks: u64) {
        let Some(store) = self.replica.store().filter(|_| looks > 0) else { return };
        let may_lose = self.truth.may_lose(vm);
        let (readers, power, mut left) = (self.replica.readers.clone(), self.replica.power.clone(), looks);
        let look = move || {
            if left > 0 {
                left -= 1;
                observed(&power, || {
                    let mut reading = readers.lock();
                    if let Err(violation) = reading.look(&store, vm, what, may_lose) {
                        reading.violation.get_or_insert(violation);
                    }
                });
            }
        };
        self.replica.disk.meanwhile(Some(Box::new(look)));
    }

    /// What was seen; and what the gate answered.
    pub(super) fn watched(&mut self) -> Checked<Vec<(Access, Refusal)>> {
        self.replica.disk.meanwhile(None);
        let (refused, looked, violation) = {
            let mut reading = self.replica.readers.lock();
            (
                std::mem::take(&mut reading.refused),
                std::mem::take(&mut reading.looked),
                reading.violation.take(),
            )
        };
        self.coverage.count("looks in the middle", looked);
        for (_, refusal) in &refused {
            self.coverage.hit(format!("refused {}", refusal.condition));
        }
        violation.map_or(Ok(refused), Err)
    }

    pub(super) fn open_view(&mut self, place: usize, point: u64, strict: bool) -> Checked {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return Ok(()) };
        let Some(point) = self.pick_point(&store, vm, point) else { return Ok(()) };
        if self.replica.readers.lock().views.len() >= READERS_MAX {
            return Ok(());
        }
        let access = if strict { Access::Strict } else { Access::Pinned };
        let opened = store.admit(vm, access, point.number).and_then(|admitted| store.open_view(admitted));
        self.coverage.hit(if opened.is_ok() { "views" } else { "views that were not given" });
        let Ok(view) = opened else { return Ok(()) };
        let Some(moment) = self.truth.moment(vm, point.id) else {
            return wrong("a view of a point that nobody made");
        };
        let seen = self.replica.observed(|| check_view(&view, &moment, self.truth.may_lose(vm)))?;
        if seen == Seen::Right {
            self.replica.readers.lock().views.push(OpenView { vm, moment, view });
        }
        Ok(())
    }

    pub(super) fn close_view(&mut self, which: u64) {
        let mut reading = self.replica.readers.lock();
        if let Some(place) = which.checked_rem(reading.views.len() as u64) {
            let closed = reading.views.swap_remove(usize::try_from(place).unwrap_or(0));
            drop(reading);
            drop(closed);
        }
    }

    pub(super) fn open_hold(&mut self, place: usize, seconds: u64) -> Checked {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return Ok(()) };
        let Ok(Some(point)) = store.prepare_hold(vm) else { return Ok(()) };
        let held = store
            .admit(vm, Access::Hold, point.number)
            .and_then(|admitted| store.open_hold(admitted, Duration::from_secs(seconds)));
        self.coverage.hit(if held.is_ok() { "holds" } else { "holds that were not given" });
        let Ok((hold, _)) = held else { return Ok(()) };
        let Some(moment) = self.truth.moment(vm, point.id) else {
            return wrong("a hold of a point that nobody made");
        };
        self.replica.readers.lock().holds.push(OpenHold { moment, hold });
        self.look_at_readers()
    }

    pub(super) fn release(&mut self, which: u64) {
        let Some(store) = self.replica.store() else { return };
        let mut reading = self.replica.readers.lock();
        if let Some(place) = which.checked_rem(reading.holds.len() as u64) {
            let open = &reading.holds[usize::try_from(place).unwrap_or(0)];
            let id = open.hold.id.clone();
            // Whether it has heard of that or not: nobody reads it any more.
            let _ = store.release(&id);
            reading.holds.retain(|open| open.hold.id != id);
        }
    }

    /// Looks at everything that is open.
    pub(super) fn look_at_readers(&mut self) -> Checked {
        let Some(store) = self.replica.store() else { return Ok(()) };
        let readers = self.replica.readers.clone();
        let mut reading = readers.lock();
        let mut ended = Vec::new();
        for (place, open) in reading.views.iter().enumerate() {
            let may_lose = self.truth.may_lose(open.vm);
            if self.replica.observed(|| check_view(&open.view, &open.moment, may_lose))? == Seen::Revoked {
                ended.push(place);
            }
        }
        let gone: Vec<OpenView> =
            ended.into_iter().rev().map(|place| reading.views.swap_remove(place)).collect();
        let (lasting, now) = (self.lasting_holds(&store), self.replica.clock.latest());
        reading.holds.retain(|open| open.hold.expires_at > now);
        for open in &reading.holds {
            if !lasting.contains(&open.hold.id) {
                return wrong(format!(
                    "the hold of point {} has ended before its time",
                    open.hold.point.number
                ));
            }
            for disk in &open.hold.disks {
                let read = self.replica.observed(|| read_flat(&self.replica.disk, &disk.path));
                flat_equals(&disk.name, &read, disk.size_bytes, &open.moment)?;
            }
        }
        drop(reading);
        drop(gone);
        Ok(())
    }

    fn lasting_holds(&self, store: &Store) -> Vec<String> {
        let vms = self.vms.iter().filter_map(|vm| vm.id);
        vms.filter_map(|vm| store.holds(vm).ok()).flatten().map(|hold| hold.id).collect()
    }

    /// The oldest point of a VM that a view is open of and still good.
    pub(super) fn oldest_view(&self, vm: VmId) -> Option<model::LogNumber> {
        self.viewed(vm).into_iter().min()
    }

    /// The points of a VM that a view is open of and still good.
    pub(super) fn viewed(&self, vm: VmId) -> Vec<model::LogNumber> {
        let reading = self.replica.readers.lock();
        let good = reading.views.iter().filter(|open| open.vm == vm && open.view.still_valid().is_ok());
        good.map(|open| open.view.point().number).collect()
    }

    /// All who read go.
    pub(super) fn send_readers_away(&mut self) {
        while !self.replica.readers.lock().views.is_empty() {
            self.close_view(0);
        }
        let Some(store) = self.replica.store() else { return };
        let holds = std::mem::take(&mut self.replica.readers.lock().holds);
        for open in holds {
            let _ = store.release(&open.hold.id);
        }
    }
}

fn observed(power: &Power, look: impl FnOnce()) {
    power.observe(true);
    look();
    power.observe(false);
}

/// A flat file as any other program reads it.
pub(super) fn read_flat(disk: &SimDisk, path: &Path) -> Result<Vec<u8>, PathBuf> {
    let read = || {
        let file = disk.open(path, Open::Read)?;
        let mut bytes = vec![0; usize::try_from(file.len()?).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        std::io::Result::Ok(bytes)
    };
    read().map_err(|_| path.to_path_buf())
}
