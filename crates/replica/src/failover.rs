//! The replica in place of the primary: each disk gets a writable layer over a point, and the VM runs from that.
//!
//! ```text
//!                             cancel: phase back, layers removed, nothing else has changed
//!                        ┌──────────────────────────────────────────────────────────────┐
//! "failover to P" ─▶ layers made ─▶ ready: the VM runs, the point is read through the chain
//!                                        └─complete─▶ other points dropped ─▶ logs up to P folded in
//!                                              ─▶ layers rest on the base ─▶ released: no replica any more
//! ```
//!
//! Until it is completed nothing is received, applied or merged, and every point stays: whoever finds that the
//! point is no good cancels and takes another. So it begins at once, whatever the number of logs. What lies
//! below the layers is read through [`Store::failover_view`], which a site shows to QEMU over NBD; once the
//! failover is completed they rest on the flat files, and need nothing of ours (`docs/decisions/0018`).

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use model::{DiskName, LogNumber, Phase, VmId};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::reader::{ChainReader, OpenFiles};
use crate::relationship::set_phase;
use crate::rows::{DiskSize, FailoverRow};
use crate::store::Store;
use crate::vm::{State, Vm};

/// A disk that a VM can be started from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailoverDisk {
    /// The disk.
    pub name: DiskName,
    /// Its flat file, which must not be written: what the layer rests on once the failover is completed.
    pub base: PathBuf,
    /// The writable qcow2 layer over the point: what the VM gets.
    pub overlay: PathBuf,
    /// The disk's size in bytes.
    pub size_bytes: u64,
}

impl FailoverDisk {
    pub(crate) fn of(folder: &Folder, disk: &DiskSize) -> Self {
        Self {
            name: disk.name.clone(),
            base: folder.disk(&disk.name),
            overlay: folder.failover().join(format!("{}.qcow2", disk.name)),
            size_bytes: disk.size_bytes,
        }
    }
}

/// How far a failover is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailoverStatus {
    /// The point that the VM was failed over to.
    pub point: LogNumber,
    /// The VM can be started.
    pub ready: bool,
    /// It was completed by a person, and is on its way to need nothing of ours.
    pub completing: bool,
    /// The flat files equal the point: the layers can rest on them.
    pub folded: bool,
}

/// What lies below a failed-over VM's layers: its disks at the point, for as long as the failover lasts.
pub struct FailoverView {
    vm: Arc<Vm>,
    reader: ChainReader,
    /// Which failover of the VM it is of.
    failover: u64,
}

impl Store {
    /// Begins a failover to a point and gives the disks to start the VM from. Called again for the same point, it
    /// carries on where it was cut off. It waits for nothing that is under way, and takes no longer with more logs.
    pub fn failover_begin(&self, vm: VmId, point: LogNumber) -> Result<Vec<FailoverDisk>> {
        // Before anything is begun: without it there is nothing to start from.
        self.inner.config.layers.check()?;
        let vm = self.vm(vm)?;
        let _layering = vm.layering.lock().unwrap_or_else(PoisonError::into_inner);
        self.mark_failover(&vm, point)?;
        self.make_layers(&vm)
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
        if let Some(relocating) = state.row.doc.relocating.as_ref().filter(|relocating| relocating.sealed) {
            let why = format!(
                "it is being handed over to {}, which has everything: fail over there, or end that with 'afterimage migrate {} --cancel' first",
                relocating.to, state.row.name
            );
            return Err(Error::busy(vm.id, why));
        }
        if !state.points.contains_key(&point) {
            return Err(Error::NoSuchPoint { vm: vm.id, point });
        }
        let disks = disks_at(&state, point)?;
        let mut row = state.row.clone();
        let doc = &mut row.doc;
        let (before, before_since) = (doc.phase.clone(), doc.phase_since);
        doc.failover =
            Some(FailoverRow { point, before, before_since, ready: false, disks, completing: false });
        set_phase(doc, Phase::Failover { point }, self.now());
        durable_step("replica::failover::marking");
        self.commit_row(&mut state, row)?;
        durable_step("replica::failover::marked");
        Ok(())
    }

    /// Makes the layers of a failover that has been written down.
    pub(crate) fn carry_on_failover(&self, vm: &Vm) -> Result<()> {
        let _layering = vm.layering.lock().unwrap_or_else(PoisonError::into_inner);
        self.make_layers(vm).map(drop)
    }

    fn make_layers(&self, vm: &Vm) -> Result<Vec<FailoverDisk>> {
        let disks = self.failover_disks(vm.id)?;
        let folder = {
            let state = vm.live()?;
            match &state.row.doc.failover {
                Some(failover) if !failover.ready => state.folder(),
                _ => return Ok(disks),
            }
        };
        folder.files.remove_folder(&folder.failover())?;
        folder.files.make_folder(&folder.failover())?;
        for disk in &disks {
            let below = shown_as(&self.inner.config.nbd_socket, vm.id, &disk.name);
            self.inner.config.layers.make(&below, &disk.overlay, disk.size_bytes)?;
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
        durable_step("replica::failover::ready");
        Ok(disks)
    }

    /// The disks of a failover; none if there is no failover.
    pub fn failover_disks(&self, vm: VmId) -> Result<Vec<FailoverDisk>> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let Some(failover) = &state.row.doc.failover else { return Ok(Vec::new()) };
        let folder = state.folder();
        Ok(failover.disks.iter().map(|disk| FailoverDisk::of(&folder, disk)).collect())
    }

    /// Opens what lies below the layers of a failed-over VM.
    pub fn failover_view(&self, vm: VmId) -> Result<FailoverView> {
        let vm = self.vm(vm)?;
        let (files, failover) = {
            let state = vm.live()?;
            let Some(row) = &state.row.doc.failover else {
                return Err(Error::busy(vm.id, "it is not failed over"));
            };
            (OpenFiles::open(&state, row.point)?, state.failovers)
        };
        let reader = files.into_reader(self.inner.config.view_cache_bytes)?;
        Ok(FailoverView { vm, reader, failover })
    }

    /// The VMs that are failed over here.
    #[must_use]
    pub fn failed_over(&self) -> Vec<VmId> {
        let vms: Vec<Arc<Vm>> = self.vms().values().cloned().collect();
        vms.iter().filter(|vm| vm.lock().row.doc.failover.is_some()).map(|vm| vm.id).collect()
    }

    /// Ends a failover as if it had not been: what was written in its layers is gone, logs are taken again.
    /// The VM that was started from it must have been stopped.
    pub fn failover_cancel(&self, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let _layering = vm.layering.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = vm.live()?;
        let Some(failover) = state.row.doc.failover.clone() else { return Ok(()) };
        if failover.completing {
            let why = "its failover was completed: the other points are gone, and there is no way back";
            return Err(Error::busy(vm.id, why));
        }
        let mut row = state.row.clone();
        row.doc.failover = None;
        row.doc.phase = failover.before;
        row.doc.phase_since = failover.before_since;
        durable_step("replica::failover::cancelling");
        self.commit_row(&mut state, row)?;
        state.failovers += 1;
        durable_step("replica::failover::cancelled");
        // Only now: a failover that is ready has its layers. What stays here is removed at the next start.
        let removed = state.files.remove_folder(&state.folder().failover());
        drop(state);
        self.wake(vm.id);
        removed
    }
}

/// The VM's disks at a point.
pub(crate) fn disks_at(state: &State, point: LogNumber) -> Result<Vec<DiskSize>> {
    match state.logs.get(&point).filter(|_| point > state.applied()) {
        Some(log) => {
            let meta = log.open(&state.folder())?.meta()?;
            Ok(meta.header.disks.iter().map(DiskSize::from).collect())
        }
        None => Ok(state.row.doc.base.disks.clone()),
    }
}

/// The name under which a site shows a failed-over VM's disk over NBD.
#[must_use]
pub fn failover_export(vm: VmId, disk: &DiskName) -> String {
    format!("failover-{vm}-{disk}")
}

/// The same as QEMU opens it. It waits for a site that is started anew: a day is longer than anybody lets a VM
/// stand still, and an error would be the guest's.
fn shown_as(socket: &std::path::Path, vm: VmId, disk: &DiskName) -> String {
    let below = serde_json::json!({
        "driver": "raw",
        "file": {
            "driver": "nbd", "export": failover_export(vm, disk), "reconnect-delay": 86_400,
            "server": { "type": "unix", "path": socket },
        },
    });
    format!("json:{below}")
}

impl FailoverView {
    /// The disks.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskSize> {
        let disks = self.reader.disks().iter();
        disks.map(|disk| DiskSize { name: disk.name.clone(), size_bytes: disk.size_bytes }).collect()
    }

    /// Fills `buf` with a disk's bytes from `offset`; beyond its end they are zeros.
    pub fn read_at(&self, disk: &DiskName, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.reader.read_at(disk, offset, buf)?;
        self.check()
    }

    /// What of a range of a disk is not certainly zeros, in order and joined.
    pub fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let found = self.reader.data_extents(disk, range)?;
        self.check()?;
        Ok(found)
    }

    /// Fails once the failover has ended: what is read then may be newer than the point.
    fn check(&self) -> Result<()> {
        if self.vm.lock().failovers == self.failover {
            return Ok(());
        }
        Err(Error::busy(self.vm.id, "the failover that is read was cancelled"))
    }
}
