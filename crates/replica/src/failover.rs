//! The replica in place of the primary: its base is brought to a point, and each disk gets a writable
//! layer over it.
//!
//! ```text
//! "failover to P", views end ─▶ logs up to P folded in ─▶ failover/<disk>.qcow2 over each base ─▶ ready
//!                                                                     cancel: phase back, layers removed
//! ```
//!
//! While it lasts nothing is received, applied or merged. After a cancel the base equals P, and the chain goes
//! on with the logs after it.

use std::path::PathBuf;

use model::{ApplyState, DiskName, LogNumber, Phase, VmId};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::relationship::set_phase;
use crate::rows::{self, Applying, FailoverRow};
use crate::store::Store;
use crate::vm::Vm;

/// A disk that a VM can be started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailoverDisk {
    /// The disk.
    pub name: DiskName,
    /// Its flat file, which must not be written.
    pub base: PathBuf,
    /// The writable qcow2 layer over it: what the VM gets.
    pub overlay: PathBuf,
    /// The disk's size in bytes.
    pub size_bytes: u64,
}

impl Store {
    /// Begins a failover to a point and gives the disks to start the VM from. Views that are open end; points
    /// before that one are given up. Called again for the same point, it carries on where it was cut off.
    pub fn failover_begin(&self, vm: VmId, point: LogNumber) -> Result<Vec<FailoverDisk>> {
        // Before anything is given up: without it there is nothing to start from.
        self.inner.config.layers.check()?;
        let vm = self.vm(vm)?;
        let _work = vm.work();
        self.mark_failover(&vm, point)?;
        self.carry_on_failover(&vm)
    }

    fn mark_failover(&self, vm: &Vm, point: LogNumber) -> Result<()> {
        let mut state = vm.live()?;
        match &state.row.doc.failover {
            Some(failover) if failover.point == point => return Ok(()),
            Some(failover) => {
                let why = format!("it is failed over to point {} already; cancel that first", failover.point);
                return Err(Error::busy(vm.id, why));
            }
            None => {}
        }
        if state.is_held(self.now()) || state.row.doc.migrating.is_some() {
            return Err(Error::busy(
                vm.id,
                "its files are held or being moved; wait, or release the hold first",
            ));
        }
        if !state.points.contains_key(&point) {
            return Err(Error::NoSuchPoint { vm: vm.id, point });
        }
        let older: Vec<String> = state
            .row
            .doc
            .pinned
            .iter()
            .filter(|pin| pin.number < point)
            .map(|pin| pin.id.to_string())
            .collect();
        if !older.is_empty() {
            let why = format!(
                "a failover to point {point} ends all older points, and these are pinned by hand: {}; unpin them first",
                older.join(", ")
            );
            return Err(Error::PinnedByHand { vm: vm.id, why });
        }
        let now = self.now();
        let mut row = state.row.clone();
        let doc = &mut row.doc;
        let (before, before_since) = (doc.phase.clone(), doc.phase_since);
        doc.failover = Some(FailoverRow { point, before, before_since, ready: false });
        set_phase(doc, Phase::Failover { point }, now);
        if point > doc.base.applied {
            let failed = doc.applying.take().and_then(|applying| applying.failed);
            doc.applying = Some(Applying { through: point, since: now, failed });
        }
        let gone: Vec<LogNumber> = state.points.range(..point).map(|(number, _)| *number).collect();
        let (id, dropped) = (vm.id, gone.clone());
        durable_step("replica::failover::marking");
        self.commit(&mut state, row, move |tx| rows::remove_points(tx, id, &dropped))?;
        state.points.retain(|number, _| !gone.contains(number));
        state.revoke_views("a failover of the VM has begun");
        durable_step("replica::failover::marked");
        Ok(())
    }

    /// Brings a failover that has been written down to its end. Under the VM's `work` lock.
    pub(crate) fn carry_on_failover(&self, vm: &Vm) -> Result<Vec<FailoverDisk>> {
        let job = {
            let mut state = vm.live()?;
            let Some(failover) = state.row.doc.failover.clone() else { return Ok(Vec::new()) };
            if failover.ready {
                drop(state);
                return self.failover_disks(vm.id);
            }
            match failover.point > state.applied() {
                true => Some(self.begin_apply(&mut state, failover.point, Vec::new())?),
                false => None,
            }
        };
        if let Some(job) = job {
            self.run_apply(vm, job)?;
        }
        durable_step("replica::failover::folded");
        let folder = vm.live()?.folder();
        folder.files.remove_folder(&folder.failover())?;
        folder.files.make_folder(&folder.failover())?;
        for disk in self.failover_disks(vm.id)? {
            self.inner.config.layers.make(&disk.base, &disk.overlay, disk.size_bytes)?;
            durable_step("replica::failover::layered");
            let overlay = folder.files.open_read(&disk.overlay)?;
            overlay.sync_all().map_err(Error::io("syncing", &disk.overlay))?;
            durable_step("replica::failover::flushed");
        }
        folder.files.sync_folder(&folder.failover())?;
        durable_step("replica::failover::settling");
        folder.files.sync_folder(&folder.path)?;
        durable_step("replica::failover::overlaid");
        let mut state = vm.live()?;
        let mut row = state.row.clone();
        if let Some(failover) = &mut row.doc.failover {
            failover.ready = true;
        }
        self.commit_row(&mut state, row)?;
        drop(state);
        durable_step("replica::failover::ready");
        self.failover_disks(vm.id)
    }

    /// The disks of a failover; none if there is no failover.
    pub fn failover_disks(&self, vm: VmId) -> Result<Vec<FailoverDisk>> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        if state.row.doc.failover.is_none() {
            return Ok(Vec::new());
        }
        let folder = state.folder();
        let disks = state.row.doc.base.disks.iter().map(|disk| FailoverDisk {
            name: disk.name.clone(),
            base: folder.disk(&disk.name),
            overlay: folder.failover().join(format!("{}.qcow2", disk.name)),
            size_bytes: disk.size_bytes,
        });
        Ok(disks.collect())
    }

    /// Ends a failover as if it had not been: what was written in its layers is gone, logs are taken again.
    /// The VM that was started from it must have been stopped.
    pub fn failover_cancel(&self, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let _work = vm.work();
        let mut state = vm.live()?;
        let Some(failover) = state.row.doc.failover.clone() else { return Ok(()) };
        let mut row = state.row.clone();
        row.doc.failover = None;
        row.doc.phase = failover.before;
        row.doc.phase_since = failover.before_since;
        if row.doc.applying.is_some() && state.apply == ApplyState::Idle {
            // It was marked and never begun: the logs are still to be folded in, and the base may be read
            // by nobody before that.
            state.apply = ApplyState::Interrupted { since: self.now() };
        }
        durable_step("replica::failover::cancelling");
        self.commit_row(&mut state, row)?;
        durable_step("replica::failover::cancelled");
        // Only now: a failover that is ready has its layers. What stays here is removed at the next start.
        let removed = state.files.remove_folder(&state.folder().failover());
        drop(state);
        self.wake(vm.id);
        removed
    }
}
