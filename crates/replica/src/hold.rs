//! Holds: the flat files, quiet and equal to one point, for any other program.
//!
//! A hold is a lease in the catalog. It survives a restart and ends by itself; a reader that was still
//! reading then learns so when it gives the hold back, and must throw away what it read.

use std::path::PathBuf;
use std::time::Duration;

use model::gate::{Access, Admission};
use model::{ApplyState, DiskName, LogNumber, PointInfo, Timestamp, VmId};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::gate::{Admitted, Pin};
use crate::rows::{self, HoldRow};
use crate::store::Store;
use crate::view::ConsistentView;
use crate::vm::{State, Vm};

/// A flat file of a hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldDisk {
    /// The disk.
    pub name: DiskName,
    /// Its file.
    pub path: PathBuf,
    /// The disk's size in bytes.
    pub size_bytes: u64,
}

/// The flat files of a VM, equal to one point and quiet until `expires_at`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Names it, for [`Store::release`].
    pub id: String,
    /// The VM.
    pub vm: VmId,
    /// The point that the files equal.
    pub point: PointInfo,
    /// The files.
    pub disks: Vec<HeldDisk>,
    /// When it ends by itself.
    pub expires_at: Timestamp,
}

impl Hold {
    /// Reads the held files as a view does, with the admission that the hold was made of; valid only as long
    /// as the hold is.
    pub fn view(&self, store: &Store, admission: Admission) -> Result<ConsistentView> {
        let vm = store.vm(self.vm)?;
        let admitted = (admission.vm(), admission.point(), admission.access());
        if admitted != (self.vm, self.point.number, Access::Hold) {
            return Err(Error::busy(vm.id, "the admission is not the one that the hold was made of"));
        }
        let pin = {
            let mut state = vm.live()?;
            find(&state, &self.id, store.now()).ok_or_else(|| store.ran_out(&vm, self.point.number))?;
            Pin::new(store, &vm, &mut state, self.point)
        };
        store.view(admission, pin, Some(self.id.clone()))
    }
}

/// No apply starts while it lives (within [`crate::Config::barrier_max`]), so that a hold can be had.
pub struct BarrierGuard {
    store: Store,
    vm: std::sync::Arc<Vm>,
    number: u64,
}

/// No log of the VM is taken while it lives: what has arrived is folded in, and then its files are quiet. Whatever becomes
/// of the process, replication goes on afterwards: nothing of a pause is written down.
pub struct PauseGuard(std::sync::Arc<Vm>);

impl Drop for PauseGuard {
    fn drop(&mut self) {
        self.0.lock().pauses -= 1;
    }
}

impl Drop for BarrierGuard {
    fn drop(&mut self) {
        self.vm.lock().barriers.remove(&self.number);
        self.vm.changed.notify_all();
        self.store.wake(self.vm.id);
    }
}

impl Store {
    /// Makes the hold that was admitted: for `lease`, but no longer than the config allows. The admission
    /// comes back for who wants to read the hold as a view ([`Hold::view`]).
    pub fn open_hold(&self, admitted: Admitted, lease: Duration) -> Result<(Hold, Admission)> {
        let Admitted { admission, pin } = admitted;
        let vm = pin.vm.clone();
        if admission.access() != Access::Hold {
            return Err(Error::busy(vm.id, "a view was admitted, not a hold; ask the gate for a hold"));
        }
        let mut state = vm.live()?;
        pin.check_in(&state)?;
        let made_at = self.now();
        let expires_at = made_at.plus(lease.min(self.inner.config.hold_max));
        let row =
            HoldRow { id: self.new_hold_id()?, vm: vm.id, point: pin.point.number, made_at, expires_at };
        let saved = row.clone();
        durable_step("replica::hold::making");
        self.catalog().write(move |tx| rows::add_hold(tx, &saved))?;
        durable_step("replica::hold::committed");
        let hold = shown(&state, &row, pin.point);
        state.holds.push(row);
        drop(state); // the pin takes the lock when it goes
        Ok((hold, admission))
    }

    /// The holds that last, of one VM.
    pub fn holds(&self, vm: VmId) -> Result<Vec<Hold>> {
        let vm = self.vm(vm)?;
        let (state, now) = (vm.live()?, self.now());
        let lasting = state.holds.iter().filter(|hold| hold.expires_at > now);
        Ok(lasting.filter_map(|hold| Some(shown(&state, hold, *state.points.get(&hold.point)?))).collect())
    }

    /// Ends a hold. True if it still lasted: only then is what was read of its files the point's.
    pub fn release(&self, id: &str) -> Result<bool> {
        let vms: Vec<_> = self.vms().values().cloned().collect();
        for vm in vms {
            let mut state = vm.lock();
            let Some(place) = state.holds.iter().position(|hold| hold.id == id) else { continue };
            let lasted = state.holds[place].expires_at > self.now();
            let gone = id.to_owned();
            durable_step("replica::hold::releasing");
            self.catalog().write(move |tx| rows::remove_hold(tx, &gone))?;
            durable_step("replica::hold::released");
            state.holds.remove(place);
            drop(state);
            vm.changed.notify_all();
            self.wake(vm.id);
            return Ok(lasted);
        }
        Ok(false)
    }

    /// Gives a hold that still lasts a new end.
    pub fn renew(&self, vm: VmId, id: &str, lease: Duration) -> Result<Timestamp> {
        let vm = self.vm(vm)?;
        let (mut state, now) = (vm.live()?, self.now());
        let hold = find(&state, id, now).cloned().ok_or_else(|| self.ran_out(&vm, LogNumber::ZERO))?;
        let renewed = HoldRow { expires_at: now.plus(lease.min(self.inner.config.hold_max)), ..hold };
        let saved = renewed.clone();
        self.catalog().write(move |tx| {
            rows::remove_hold(tx, &saved.id)?;
            rows::add_hold(tx, &saved)
        })?;
        let expires_at = renewed.expires_at;
        state.holds.retain(|hold| hold.id != id);
        state.holds.push(renewed);
        Ok(expires_at)
    }

    pub(crate) fn check_hold(&self, vm: VmId, id: &str) -> Result<()> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        find(&state, id, self.now()).map(drop).ok_or_else(|| self.ran_out(&vm, state.applied()))
    }

    fn new_hold_id(&self) -> Result<String> {
        let bytes = self.inner.config.chance.bytes::<8>();
        let bytes = bytes.map_err(Error::io("drawing the name of a hold in", &self.inner.config.dir))?;
        Ok(format!("hold-{}", hex::encode(bytes)))
    }

    fn ran_out(&self, vm: &Vm, point: LogNumber) -> Error {
        let why = "the hold has ended (it ran out, or was given back)".to_owned();
        Error::Revoked { vm: vm.id, point, why }
    }

    /// Forgets the holds that have run out.
    pub(crate) fn expire_holds(&self, state: &mut State) -> Result<()> {
        let now = self.now();
        let expired: Vec<String> =
            state.holds.iter().filter(|hold| hold.expires_at <= now).map(|hold| hold.id.clone()).collect();
        if expired.is_empty() {
            return Ok(());
        }
        durable_step("replica::hold::expiring");
        self.catalog().write(move |tx| expired.iter().try_for_each(|id| rows::remove_hold(tx, id)))?;
        durable_step("replica::hold::expired");
        state.holds.retain(|hold| hold.expires_at > now);
        Ok(())
    }

    /// Pauses the replication of a VM for a backup. Its primary is told to come again; its changes wait there.
    pub fn pause(&self, vm: VmId) -> Result<PauseGuard> {
        let vm = self.vm(vm)?;
        vm.live()?.pauses += 1;
        Ok(PauseGuard(vm))
    }

    /// Puts up a barrier: the running apply ends (waited for no longer than `patience`), no further one starts.
    /// An apply that was interrupted or has failed is still run again: without it there is no hold.
    pub fn barrier(&self, vm: VmId, patience: Duration) -> Result<BarrierGuard> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        state.barriers_made += 1;
        let number = state.barriers_made;
        state.barriers.insert(number, self.now().plus(self.inner.config.barrier_max));
        let guard = BarrierGuard { store: self.clone(), vm: vm.clone(), number };
        // Another thread's apply is waited for, so the time is real whatever the clock of the config says.
        let runs = |state: &mut State| matches!(state.apply, ApplyState::Running { .. });
        let (mut state, _) = vm
            .changed
            .wait_timeout_while(state, patience, runs)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let still_runs = runs(&mut state);
        drop(state); // the guard takes the lock when it goes
        if still_runs {
            return Err(Error::busy(vm.id, "the running apply has not ended in time; try again later"));
        }
        Ok(guard)
    }

    /// Brings the flat files as far as retention lets them, barrier or not, and tells the point that they
    /// equal then: the one to ask the gate for. Takes as long as the apply.
    pub fn prepare_hold(&self, vm: VmId) -> Result<Option<PointInfo>> {
        let found = self.vm(vm)?;
        while self.apply_now(&found)? {}
        self.hold_point(vm)
    }
}

fn find<'a>(state: &'a State, id: &str, now: Timestamp) -> Option<&'a HoldRow> {
    state.holds.iter().find(|hold| hold.id == id && hold.expires_at > now)
}

fn shown(state: &State, row: &HoldRow, point: PointInfo) -> Hold {
    let folder = state.folder();
    let disks = state.row.doc.base.disks.iter().map(|disk| HeldDisk {
        name: disk.name.clone(),
        path: folder.disk(&disk.name),
        size_bytes: disk.size_bytes,
    });
    Hold { id: row.id.clone(), vm: row.vm, point, disks: disks.collect(), expires_at: row.expires_at }
}
