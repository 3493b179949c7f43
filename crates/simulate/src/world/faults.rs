//! Sites that die and are started again, disks that err and rot, guests that do what guests do.

use std::path::Path;

use catalog::Catalog;
use model::VmId;

use super::{Checked, World};
use crate::disk::Loss;
use crate::event::Side;
use crate::guest::Machine;
use crate::power::{Fate, Power};

/// A catalog in memory whose commits are steps of a site's power.
pub(super) fn guarded_catalog(power: &Power) -> Catalog {
    let power = power.clone();
    let guard = move || match (power.failed_commit(), power.step()) {
        (Some(false), Fate::Lives) => catalog::Fate::Lost,
        (Some(true), Fate::Lives) => catalog::Fate::Doubtful,
        (_, fate) => as_commit(fate),
    };
    Catalog::in_memory_guarded(guard).expect("memory can be had")
}

fn as_commit(fate: Fate) -> catalog::Fate {
    match fate {
        Fate::Lives => catalog::Fate::Kept,
        Fate::DiesBefore => catalog::Fate::Lost,
        Fate::DiesAfter => catalog::Fate::KeptUnheard,
    }
}

impl World {
    pub(super) fn cut(&mut self, side: Side, steps: u64, after: bool) {
        match side {
            Side::Primary => self.primary.ports.power.cut_at(steps, after),
            Side::Replica => self.replica.power.cut_at(steps, after),
        }
    }

    /// Starts a site; one that lives is killed first.
    pub(super) fn boot(&mut self, side: Side, loss: Loss) -> Checked {
        self.coverage.hit(format!("boot {side:?} {loss:?}"));
        match side {
            Side::Primary => self.boot_primary(),
            Side::Replica => self.boot_replica(loss),
        }
    }

    pub(super) fn write(&mut self, vm: u64, disk: u64, sector: u64, count: u64, zeros: bool) {
        let place = self.vm_place(vm);
        let mut machine = self.vms[place].machine.lock();
        let disk = usize::try_from(disk).unwrap_or(0) % machine.disk_count();
        let sectors = machine.history.now().disks[disk].len();
        if sectors > 0 {
            let sector = usize::try_from(sector % sectors as u64).unwrap_or(0);
            machine.write(disk, sector, usize::try_from(count).unwrap_or(1), zeros);
        }
    }

    pub(super) fn resize(&mut self, vm: u64, disk: u64, blocks: u64) {
        let place = self.vm_place(vm);
        let mut machine = self.vms[place].machine.lock();
        let disk = usize::try_from(disk).unwrap_or(0) % machine.disk_count();
        self.causes[place].resized |= machine.resize(disk, usize::try_from(blocks).unwrap_or(1));
    }

    pub(super) fn machine(&mut self, vm: u64, change: impl FnOnce(&mut Machine)) {
        change(&mut self.vms[self.vm_place(vm)].machine.lock());
    }

    /// A bit of a log file rots. The flat files and their change maps have no checksums: what rots there is the
    /// file system's to find, or a verify's.
    pub(super) fn rot(&mut self, file: u64, at: u64) {
        let disk = self.replica.disk.clone();
        let mut logs = disk.files_below(Path::new("/"));
        logs.retain(|(path, len)| *len > 0 && path.parent().is_some_and(|folder| folder.ends_with("logs")));
        if logs.is_empty() {
            return;
        }
        let (path, len) = &logs[usize::try_from(file % logs.len() as u64).unwrap_or(0)];
        if disk.rot(path, at % len) {
            self.coverage.hit("rotten bits");
            let owner = |id: &VmId| path.components().any(|part| part.as_os_str() == id.to_string().as_str());
            if let Some(id) = self.vms.iter().filter_map(|vm| vm.id).find(owner) {
                self.truth.rotted(id);
            }
        }
    }
}
