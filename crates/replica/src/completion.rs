//! A failover that was completed: what is left of the replica becomes the running VM's, and needs nothing of ours.
//!
//! ```text
//! "completed", other points dropped: one transaction ─▶ logs up to P folded in ─▶ logs after P removed
//!    ─▶ each layer rests on its flat file ─▶ folder marked as released ─▶ row removed, fence raised: one transaction
//!    ─▶ what only a replica needs removed
//! ```
//!
//! A layer that a running QEMU has open is that QEMU's to move ([`Store::failover_disks`] says to what); one that
//! nobody has open is moved here. The fence keeps the old primary from replicating over what has taken its place.

use std::path::Path;
use std::time::Duration;

use model::{ApplyState, Head, LogNumber, VmId, VmName};
use serde::{Deserialize, Serialize};
use steps::durable_step;

use crate::error::{Error, Refused, Result};
use crate::failover::FailoverDisk;
use crate::folder::Folder;
use crate::maintain::Step;
use crate::relationship::check_peer;
use crate::rows::{self, DiskSize, Fence};
use crate::store::Store;
use crate::vm::{State, Vm};

/// What a folder says that is a running VM's and no replica's.
#[derive(Debug, Serialize, Deserialize)]
struct Released {
    vm: VmId,
    name: VmName,
    /// A primary of this generation or an older one is not the VM any more.
    generation: u64,
    at: model::Timestamp,
    replicated: (String, u64, u8),
    /// What its primary's site told of it.
    #[serde(default)]
    definition: serde_json::Value,
    #[serde(default)]
    disks: Vec<DiskSize>,
}

/// A VM that was failed over to this site for good, as far as its folder tells.
#[derive(Debug, Clone, PartialEq)]
pub struct ReleasedVm {
    /// The VM.
    pub vm: VmId,
    /// A primary of this generation is the VM that runs here.
    pub generation: u64,
    /// The VM's definition.
    pub definition: serde_json::Value,
    /// Its disks.
    pub disks: Vec<FailoverDisk>,
}

impl Store {
    /// A primary whose VM is off gives it to this site: the replica is failed over to its newest point, for good. Gives
    /// the disks to start it from; none any more once all of that is at its end. With `done` it only tells whether that
    /// was done already: then whatever has become of the VM at its primary since is not the VM.
    pub fn hand_over(&self, peer: &str, vm: VmId, newest: Head, done: bool) -> Result<Vec<FailoverDisk>> {
        let found = match self.vm(vm) {
            Ok(found) => found,
            Err(error) => return if self.was_failed_over(vm)? { Ok(Vec::new()) } else { Err(error) },
        };
        {
            let state = found.live()?;
            check_peer(&state, peer)?;
            let doc = &state.row.doc;
            if done && !(state.is_completing() && doc.head == newest) {
                let message = format!("VM {} was not handed over to this site", state.row.name);
                return Err(Refused::lasting("not-handed-over", message).into());
            }
            if doc.head != newest || !state.points.contains_key(&newest.number) {
                let message = format!(
                    "the newest point of VM {} here is not number {} ({}); replicate it once more, then try again",
                    state.row.name, newest.number, newest.id
                );
                return Err(Refused::transient("wrong-number", message, Duration::from_secs(1)).into());
            }
        }
        check_pins(&*found.live()?, newest.number)?;
        let disks = self.failover_begin(vm, newest.number)?;
        self.failover_complete(vm)?;
        Ok(disks)
    }

    /// Makes a failover final: the other points go, and what is below the layers becomes flat. It cannot be taken
    /// back. The VM may be running.
    pub fn failover_complete(&self, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let Some(failover) = state.row.doc.failover.clone().filter(|failover| failover.ready) else {
            return Err(Error::busy(vm.id, "it is not failed over; there is nothing to complete"));
        };
        if failover.completing {
            return Ok(());
        }
        check_pins(&state, failover.point)?;
        let mut row = state.row.clone();
        if let Some(failover) = &mut row.doc.failover {
            failover.completing = true;
        }
        let gone: Vec<LogNumber> =
            state.points.keys().copied().filter(|number| *number != failover.point).collect();
        let (id, dropped) = (vm.id, gone.clone());
        durable_step("replica::completion::marking");
        self.commit(&mut state, row, move |tx| rows::remove_points(tx, id, &dropped))?;
        durable_step("replica::completion::marked");
        state.points.retain(|number, _| !gone.contains(number));
        state.revoke_views("the VM's failover was completed");
        drop(state);
        self.wake(vm.id);
        Ok(())
    }

    /// Does the next thing that brings a completed failover to its end. Under the VM's `work` lock.
    pub(crate) fn carry_on_completion(&self, vm: &Vm, point: LogNumber) -> Result<Step> {
        let job = {
            let mut state = vm.live()?;
            let later = matches!(state.apply, ApplyState::Failed { .. }) && state.retry_at > self.now();
            if later {
                return Ok(Step::Idle);
            }
            let unfinished = state.row.doc.applying.is_some() || state.applied() < point;
            if unfinished { Some(self.begin_apply(&mut state, point, Vec::new())?) } else { None }
        };
        if let Some(job) = job {
            return self.run_apply(vm, job);
        }
        self.cut_off(vm, point)?;
        for disk in self.failover_disks(vm.id)? {
            if !self.inner.config.layers.rest(&disk.overlay, &disk.base)? {
                // The VM has it open; its QEMU moves it, or the next look after the VM has stopped.
                return Ok(Step::Idle);
            }
            durable_step("replica::completion::rested");
        }
        if self.inner.below_is_read.get().is_some_and(|is_read| is_read(vm.id)) {
            return Ok(Step::Idle);
        }
        self.release_vm(vm)?;
        Ok(Step::Released)
    }

    /// Removes the logs after the point.
    fn cut_off(&self, vm: &Vm, point: LogNumber) -> Result<()> {
        let mut state = vm.live()?;
        let later: Vec<String> =
            state.logs.range(point.next()..).map(|(_, log)| log.row.file.clone()).collect();
        if later.is_empty() {
            return Ok(());
        }
        let (id, row) = (vm.id, state.row.clone());
        durable_step("replica::completion::cutting");
        self.commit(&mut state, row, move |tx| rows::remove_logs(tx, id, point.next(), LogNumber(u64::MAX)))?;
        durable_step("replica::completion::cut");
        state.logs.retain(|number, _| *number <= point);
        let folder = state.folder();
        drop(state);
        later.iter().try_for_each(|file| folder.files.remove_file(&folder.log(file)))
    }

    fn release_vm(&self, vm: &Vm) -> Result<()> {
        let _registry = self.inner.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut state = vm.live()?;
        let folder = state.folder();
        let fence = fence_of(&state, self.now());
        let marker = Released {
            vm: vm.id,
            name: state.row.name.clone(),
            generation: fence.generation,
            at: fence.at,
            replicated: fence.replicated.clone(),
            definition: serde_json::from_str(&state.row.definition).unwrap_or_default(),
            disks: state.row.doc.failover.iter().flat_map(|failover| failover.disks.clone()).collect(),
        };
        let text = serde_json::to_vec_pretty(&marker).expect("plain values can be written as JSON");
        durable_step("replica::completion::releasing");
        folder.files.replace(&folder.released(), &text)?;
        durable_step("replica::completion::flagged");
        let id = vm.id;
        self.catalog().write(move |tx| {
            rows::remove_vm(tx, id)?;
            rows::raise_fence(tx, &fence)
        })?;
        durable_step("replica::completion::released");
        state.removed = true;
        state.failovers += 1;
        state.revoke_views("the VM runs here now; it is no replica any more");
        drop(state);
        self.vms_mut().remove(&vm.id);
        tidy_released(&folder)
    }

    /// A VM that was failed over to this site for good, and its disks; none if there never was one of that name.
    pub fn released_vm(&self, name: &VmName) -> Result<Option<ReleasedVm>> {
        let Some(path) = self.fence_of_name(name)?.and_then(|fence| fence.folder) else { return Ok(None) };
        let folder = Folder { files: self.files(), path };
        let Some(released) = read_released(&folder)? else { return Ok(None) };
        Ok(Some(ReleasedVm {
            vm: released.vm,
            generation: released.generation,
            definition: released.definition,
            disks: released.disks.iter().map(|disk| FailoverDisk::of(&folder, disk)).collect(),
        }))
    }

    /// The fence that keeps older primaries of a VM away, if there is one.
    pub fn fence(&self, vm: VmId) -> Result<Option<Fence>> {
        rows::fence(self.catalog(), vm)
    }

    fn was_failed_over(&self, vm: VmId) -> Result<bool> {
        Ok(self.fence(vm)?.is_some_and(|fence| fence.moved_to.is_none()))
    }

    /// The fence of a VM that was failed over to this site for good.
    pub fn fence_of_name(&self, name: &VmName) -> Result<Option<Fence>> {
        rows::fence_of_name(self.catalog(), name)
    }
}

/// Points that a person wants kept are not given up by the way.
fn check_pins(state: &State, point: LogNumber) -> Result<()> {
    let others = state.row.doc.pinned.iter().filter(|pin| pin.number != point);
    let others: Vec<String> = others.map(|pin| pin.id.to_string()).collect();
    if others.is_empty() {
        return Ok(());
    }
    let why = format!(
        "a completed failover to point {point} ends all other points, and these are pinned by hand: {}; unpin them first",
        others.join(", ")
    );
    Err(Error::PinnedByHand { vm: state.row.vm, why })
}

fn fence_of(state: &State, at: model::Timestamp) -> Fence {
    let row = &state.row;
    let replicated = (row.peer.clone(), row.doc.interval_s, row.doc.points);
    let folder = Some(row.folder.clone());
    Fence {
        vm: row.vm,
        name: row.name.clone(),
        generation: row.doc.generation + 1,
        at,
        replicated,
        folder,
        moved_to: None,
    }
}

/// The fence that the folder of a running VM tells of.
pub(crate) fn released(folder: &Folder) -> Result<Option<Fence>> {
    let fence = |Released { vm, name, generation, at, replicated, .. }| {
        let folder = Some(folder.path.clone());
        Fence { vm, name, generation, at, replicated, folder, moved_to: None }
    };
    Ok(read_released(folder)?.map(fence))
}

fn read_released(folder: &Folder) -> Result<Option<Released>> {
    if !is_released(folder)? {
        return Ok(None);
    }
    let text = folder.files.read(&folder.released())?;
    let marker = serde_json::from_slice::<Released>(&text);
    if let Err(error) = &marker {
        tracing::error!(%error, folder = %folder.path.display(), "what a failover has left cannot be read");
    }
    Ok(marker.ok())
}

/// Whether a folder is a running VM's.
pub(crate) fn is_released(folder: &Folder) -> Result<bool> {
    folder.files.exists(&folder.released())
}

/// Removes what only a replica needs from the folder of a VM that runs. Whatever of it stays harms nobody.
pub(crate) fn tidy_released(folder: &Folder) -> Result<()> {
    for part in [folder.logs(), folder.incoming(), folder.changes()] {
        folder.files.remove_folder(&part)?;
    }
    folder.files.remove_file(&folder.description())
}

/// A folder's name for the next time that a VM has a replica here: the disks of a released one stay where they are.
pub(crate) fn fresh_home(home: &Folder) -> Result<Folder> {
    let mut folder = home.clone();
    let mut generation = 1;
    while is_released(&folder)? {
        generation += 1;
        folder.path = numbered(&home.path, generation);
    }
    Ok(folder)
}

fn numbered(home: &Path, generation: u64) -> std::path::PathBuf {
    let mut name = home.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{generation}"));
    home.with_file_name(name)
}
