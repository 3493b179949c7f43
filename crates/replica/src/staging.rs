//! Images that a replica is to begin with, brought by a person: before the VM is offered, or while nothing of it is here.
//!
//! ```text
//! images ─copied─▶ seeds/new/<vm>/<disk>.raw ─synced, renamed─▶ seeds/ready/<vm> ─ the VM's next offer:
//!    each file moved to the replica's disks/ ─▶ "resynchronization required (seeded)", with these sizes: one row ─▶ folder removed
//! ```
//!
//! Cut off before the rename, nothing was brought; after it, the next offer goes on. Nothing is known of an image but its
//! bytes, as with [`crate::seed`]: the first pass compares, and there is no point before its end.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};

use model::{DiskName, Head, Phase, ResyncReason, VmName};
use steps::durable_step;

use crate::error::{Error, Refused, Result};
use crate::folder::Folder;
use crate::relationship::set_phase;
use crate::rows::DiskSize;
use crate::seed::Seed;
use crate::store::Store;
use crate::vm::{State, Vm};

/// Which VMs' images are here, or just being copied, and whose media are being imported.
#[derive(Default)]
pub(crate) struct Staging {
    ready: BTreeSet<VmName>,
    copying: BTreeSet<VmName>,
    /// Of these the media are being imported.
    pub importing: BTreeSet<VmName>,
}

impl Store {
    /// Copies images of a VM's disks to here, so that its replica begins with them: the one that is here and empty, or
    /// the one that will be made when the VM is offered. It takes as long as copying them. Images that were brought
    /// before are replaced.
    pub fn stage_seed(&self, name: &VmName, seeds: &[Seed]) -> Result<Vec<DiskSize>> {
        let named: BTreeSet<&DiskName> = seeds.iter().map(|seed| &seed.disk).collect();
        if named.len() < seeds.len() || seeds.is_empty() {
            let message = format!("name each disk of {name} once, with its image");
            return Err(Refused::lasting("seed", message).into());
        }
        self.check_seedable(name)?;
        if !self.staging().copying.insert(name.clone()) {
            let message = format!("images of {name} are being copied already; wait for that to end");
            return Err(Refused::lasting("seed", message).into());
        }
        let outcome = self.copy_images(name, seeds);
        let mut staging = self.staging();
        staging.copying.remove(name);
        if outcome.is_ok() {
            staging.ready.insert(name.clone());
        }
        outcome
    }

    fn copy_images(&self, name: &VmName, seeds: &[Seed]) -> Result<Vec<DiskSize>> {
        let (new, ready) = (self.seeds("new", name), self.seeds("ready", name));
        let files = self.files();
        let parent = self.inner.config.dir.join("seeds/ready");
        files.remove_folder(&new)?;
        files.make_folder(&new)?;
        files.make_folder(&parent)?;
        durable_step("replica::staging::made");
        let mut disks = Vec::new();
        for seed in seeds {
            let home = Folder { files: files.clone(), path: new.clone() };
            self.check_space(&home, files.allocated_bytes(&seed.path))?;
            let path = new.join(format!("{}.raw", seed.disk));
            self.inner.config.layers.flatten(seed, &path)?;
            let file = files.open_read(&path)?;
            file.sync_all().map_err(Error::io("syncing", &path))?;
            let size_bytes = file.len().map_err(Error::io("reading", &path))?;
            disks.push(DiskSize { name: seed.disk.clone(), size_bytes });
            durable_step("replica::staging::copied");
        }
        files.sync_folder(&new)?;
        durable_step("replica::staging::synced");
        // It may have been replicated since the copy began.
        self.check_seedable(name)?;
        files.remove_folder(&ready)?;
        durable_step("replica::staging::renaming");
        files.rename(&new, &ready)?;
        durable_step("replica::staging::renamed");
        for folder in [parent.as_path(), &self.inner.config.dir.join("seeds"), &self.inner.config.dir] {
            files.sync_folder(folder)?;
            durable_step("replica::staging::listed");
        }
        Ok(disks)
    }

    /// Has a replica that is empty begin with the images that were brought for it, if there are some.
    pub(crate) fn adopt_seed(&self, vm: &Vm) -> Result<()> {
        let mut state = vm.live()?;
        let name = state.row.name.clone();
        let comes_by_media = state.row.doc.media.is_some();
        if !self.staging().ready.contains(&name) || state.row.doc.migrating.is_some() || comes_by_media {
            return Ok(());
        }
        let staged = self.seeds("ready", &name);
        if is_empty(&state) {
            self.take_images(&mut state, &staged)?;
        }
        durable_step("replica::staging::removing");
        self.files().remove_folder(&staged)?;
        self.staging().ready.remove(&name);
        Ok(())
    }

    fn take_images(&self, state: &mut State, staged: &std::path::Path) -> Result<()> {
        let (folder, now) = (state.folder(), self.now());
        let files = &folder.files;
        for image in files.names(staged)? {
            durable_step("replica::staging::moving");
            files.rename(&staged.join(&image), &folder.disks().join(&image))?;
            durable_step("replica::staging::moved");
        }
        files.sync_folder(&folder.disks())?;
        durable_step("replica::staging::gathered");
        let mut row = state.row.clone();
        let mut disks = Vec::new();
        for image in files.names(&folder.disks())? {
            let name =
                image.to_str().and_then(|image| image.strip_suffix(".raw")).map(str::parse::<DiskName>);
            let Some(Ok(name)) = name else { continue };
            let size_bytes = files.len(&folder.disk(&name))?.unwrap_or(0);
            if !row.doc.disks.contains(&name) {
                row.doc.disks.push(name.clone());
            }
            disks.push(DiskSize { name, size_bytes });
        }
        row.doc.base.disks = disks;
        set_phase(&mut row.doc, Phase::ResyncRequired { why: ResyncReason::Seeded }, now);
        durable_step("replica::staging::committing");
        self.commit_row(state, row)?;
        durable_step("replica::staging::committed");
        crate::rebuild::describe(state)?;
        durable_step("replica::staging::described");
        state.newest = None;
        Ok(())
    }

    /// What a process that was killed has left of images: those that had all arrived.
    pub(crate) fn recover_seeds(&self) -> Result<()> {
        let (files, seeds) = (self.files(), self.inner.config.dir.join("seeds"));
        if !files.is_folder(&seeds) {
            return Ok(());
        }
        files.remove_folder(&seeds.join("new"))?;
        let ready = seeds.join("ready");
        if files.is_folder(&ready) {
            let names = files.names(&ready)?;
            let names = names.iter().filter_map(|name| name.to_str()?.parse::<VmName>().ok());
            self.staging().ready.extend(names);
        }
        Ok(())
    }

    fn check_seedable(&self, name: &VmName) -> Result<()> {
        let Some(vm) = self.find(name) else { return Ok(()) };
        if self.vm(vm)?.live()?.row.doc.media.is_some() {
            let message = format!(
                "{name} comes here on media; 'afterimage configure {name} --initial seed' at the site that protects it takes images instead"
            );
            return Err(Refused::lasting("media", message).into());
        }
        if is_empty(&*self.vm(vm)?.live()?) {
            return Ok(());
        }
        let message = format!(
            "the replica of {name} has begun already; images can only be what it begins with. Remove it first ('afterimage unprotect {name}' at both sites), or let it go on as it is"
        );
        Err(Refused::lasting("not-empty", message).into())
    }

    fn seeds(&self, kind: &str, name: &VmName) -> PathBuf {
        self.inner.config.dir.join("seeds").join(kind).join(name.as_str())
    }

    pub(crate) fn staging(&self) -> MutexGuard<'_, Staging> {
        self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nothing of the VM is here, and nothing was.
fn is_empty(state: &State) -> bool {
    let doc = &state.row.doc;
    doc.head == Head::EMPTY
        && doc.base.disks.is_empty()
        && matches!(doc.phase, Phase::InitialReplication { .. })
        && state.logs.is_empty()
}
