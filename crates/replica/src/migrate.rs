//! Moves a VM's files to another folder.
//!
//! ```text
//! "moving to D" ─▶ everything copied and synced ─▶ the folder switched in one transaction ─▶ the old folder removed
//! ```
//!
//! A crash before the switch: the copy is removed at the next start. After it: the old folder is.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use model::VmId;
use steps::durable_step;

use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::rows::Migrating;
use crate::store::Store;
use crate::vm::Vm;

impl Store {
    /// Moves a VM's files to a folder of its own within `parent`. Logs that arrive meanwhile are refused for
    /// now; views that are open go on reading the old files.
    pub fn migrate(&self, vm: VmId, parent: &Path) -> Result<PathBuf> {
        let vm = self.vm(vm)?;
        let _work = vm.work();
        let target = Folder { files: self.files(), path: parent.join(vm.id.to_string()) };
        let source = self.mark_migration(&vm, parent, &target)?;
        let copied = copy_folders(&source, &target);
        durable_step("replica::migrate::copied");
        let outcome = copied.and_then(|()| self.switch(&vm, &source, &target));
        if let Err(error) = outcome {
            self.give_up_migration(&vm, &target)?;
            return Err(error);
        }
        self.remove_leftover(&vm)?;
        durable_step("replica::migrate::removed");
        self.wake(vm.id);
        Ok(target.path)
    }

    fn mark_migration(&self, vm: &Vm, parent: &Path, target: &Folder) -> Result<Folder> {
        // Whatever is arriving is given up; its primary sends it again.
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = vm.live()?;
        if state.is_held(self.now()) || state.in_failover() {
            return Err(Error::busy(
                vm.id,
                "its files are held or failed over; release or cancel that first",
            ));
        }
        if !target.files.is_folder(parent) || target.files.exists(&target.path)? {
            let why = format!(
                "its files cannot be moved to {}: it must be a folder that has nothing called {}",
                parent.display(),
                vm.id
            );
            return Err(Error::busy(vm.id, why));
        }
        let mut row = state.row.clone();
        row.doc.migrating = Some(Migrating { since: self.now(), to: target.path.clone() });
        durable_step("replica::migrate::marking");
        self.commit_row(&mut state, row)?;
        *receiving = None;
        durable_step("replica::migrate::marked");
        Ok(state.folder())
    }

    fn switch(&self, vm: &Vm, source: &Folder, target: &Folder) -> Result<()> {
        durable_step("replica::migrate::synced");
        let mut state = vm.live()?;
        let mut row = state.row.clone();
        row.folder = target.path.clone();
        row.doc.migrating = None;
        row.doc.leftover = Some(source.path.clone());
        self.commit_row(&mut state, row)?;
        // Cached readers have the old files open, which keeps them on the disk.
        state.newest = None;
        durable_step("replica::migrate::switched");
        Ok(())
    }

    fn give_up_migration(&self, vm: &Vm, target: &Folder) -> Result<()> {
        let mut state = vm.live()?;
        if state.row.doc.migrating.is_none() {
            return Ok(()); // it was switched; only the old folder is still to go
        }
        // First it is written down, then the copy goes: whatever fails here must not stop replication.
        let mut row = state.row.clone();
        row.doc.migrating = None;
        row.doc.leftover = Some(target.path.clone());
        durable_step("replica::migrate::giving-up");
        self.commit_row(&mut state, row)?;
        durable_step("replica::migrate::given-up");
        drop(state);
        self.remove_leftover(vm)
    }

    /// Ends what a move has left whose end failed too. Under the VM's `work` lock: no move is under way.
    pub(crate) fn tidy_migration(&self, vm: &Vm) -> Result<()> {
        let (migrating, folder) = {
            let state = vm.live()?;
            (state.row.doc.migrating.clone(), state.folder())
        };
        match migrating {
            Some(migrating) => self.give_up_migration(vm, &Folder { path: migrating.to, ..folder }),
            None => self.remove_leftover(vm),
        }
    }

    /// Removes the folder that a VM has moved out of.
    pub(crate) fn remove_leftover(&self, vm: &Vm) -> Result<()> {
        let mut state = vm.live()?;
        let Some(leftover) = state.row.doc.leftover.clone() else { return Ok(()) };
        state.files.remove_folder(&leftover)?;
        let mut row = state.row.clone();
        row.doc.leftover = None;
        durable_step("replica::migrate::forgetting");
        self.commit_row(&mut state, row)?;
        durable_step("replica::migrate::forgotten");
        Ok(())
    }
}

fn copy_folders(source: &Folder, target: &Folder) -> Result<()> {
    let files = &source.files;
    target.create()?;
    let parts = [
        (source.disks(), target.disks()),
        (source.logs(), target.logs()),
        (source.changes(), target.changes()),
    ];
    for (from, to) in parts {
        for name in files.names(&from)? {
            durable_step("replica::migrate::copying");
            files.copy_sparse(&from.join(&name), &to.join(&name))?;
            durable_step("replica::migrate::file-copied");
        }
        files.sync_folder(&to)?;
        durable_step("replica::migrate::folder-synced");
    }
    files.copy_sparse(&source.description(), &target.description())?;
    durable_step("replica::migrate::described");
    files.sync_folder(&target.path)?;
    durable_step("replica::migrate::settled");
    Ok(())
}
