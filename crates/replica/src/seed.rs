//! A replica that begins with what is there: an older copy of the disks lies below its first logs.
//!
//! ```text
//! folder made ─▶ each seed copied to disks/<disk>.raw, synced ─▶ "resynchronization required", with these sizes: one row
//! ```
//!
//! Nothing is known of a seed but its bytes: the first pass compares both sides, and sends what differs; before its end
//! there is no point. A seed is copied, never used where it lies: whoever starts the old VM by mistake writes to that
//! VM's files, and not to the replica's.

use std::path::PathBuf;
use std::sync::PoisonError;

use model::{DiskName, LogId, LogNumber, Phase, ResyncReason, VmId};
use steps::durable_step;

use crate::completion::fresh_home;
use crate::error::{Error, Result};
use crate::relationship::{Offer, first_doc, first_row, set_phase};
use crate::rows::{Base, DiskSize, VmRow};
use crate::store::Store;
use crate::vm::{State, Vm};

/// An image of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// The disk.
    pub disk: DiskName,
    /// The image.
    pub path: PathBuf,
    /// Its format, in QEMU's words.
    pub format: String,
}

impl Store {
    /// Makes the replica of a VM that is offered out of older copies of its disks. It takes as long as copying them;
    /// a VM of which there is a replica stays as it is.
    pub fn create_seeded(&self, peer: &str, offer: &Offer, seeds: &[Seed]) -> Result<()> {
        if self.vm(offer.vm).is_ok() {
            return Ok(());
        }
        let now = self.now();
        let folder = fresh_home(&self.home(peer, offer.vm)?)?;
        folder.files.remove_folder(&folder.path)?;
        folder.create()?;
        durable_step("replica::seed::made");
        let mut disks = Vec::new();
        for seed in seeds {
            let path = folder.disk(&seed.disk);
            self.inner.config.layers.flatten(seed, &path)?;
            let file = folder.files.open_read(&path)?;
            file.sync_all().map_err(Error::io("syncing", &path))?;
            let size_bytes = file.len().map_err(Error::io("reading", &path))?;
            disks.push(DiskSize { name: seed.disk.clone(), size_bytes });
            durable_step("replica::seed::copied");
        }
        folder.files.sync_folder(&folder.disks())?;
        durable_step("replica::seed::synced");
        let mut doc = first_doc(offer, now);
        for DiskSize { name, .. } in &disks {
            if !doc.disks.contains(name) {
                doc.disks.push(name.clone());
            }
        }
        doc.base = Base { applied: LogNumber::ZERO, id: LogId::NONE, disks };
        set_phase(&mut doc, Phase::ResyncRequired { why: ResyncReason::Reversed }, now);
        let row = first_row(peer, offer, folder.path, doc);
        self.enlist(State::new(row, folder.files, now))
    }

    fn enlist(&self, mut state: State) -> Result<()> {
        let _registry = self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let (vm, row): (VmId, VmRow) = (state.row.vm, state.row.clone());
        self.check_name(vm, &row.name)?;
        durable_step("replica::seed::committing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::seed::committed");
        crate::rebuild::describe(&state)?;
        durable_step("replica::seed::described");
        self.vms_mut().insert(vm, Vm::new(state));
        Ok(())
    }
}
